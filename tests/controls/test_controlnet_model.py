"""ControlNet networks: a copy of the base adds nothing at first, files of both layouts come back, sizes are read. Numbers: tests/parity."""

from pathlib import Path

import pytest
import torch
from small_dit import dit, tokens

from fluxsmith.controls.controlnet import Config, Control, Residual
from fluxsmith.controls.controlnet_model import ControlNet, Layout, Residuals, file_tensors, from_base, load_controlnet
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.packing import pack

LAYOUTS: tuple[Layout, ...] = ("latents", "pixels")


def network(layout: Layout, double: int = 2, single: int = 0) -> ControlNet:
    return from_base(dit(), layout=layout, double_blocks=double, single_blocks=single, generator=torch.Generator().manual_seed(0))


def condition(layout: Layout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, 3, 32, 32, generator=generator) if layout == "pixels" else torch.randn(1, 16, 4, 4, generator=generator)


@pytest.mark.ledger("KS-54")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_network_is_a_copy_of_the_base_that_adds_nothing(layout: Layout) -> None:
    base, net = dit(), network(layout)
    own, theirs = net.state_dict(), base.state_dict()
    shared = [key for key in own if key in theirs]
    assert len([key for key in shared if key.startswith("double_blocks.1.")]) == 24
    assert all(torch.equal(own[key], theirs[key]) for key in shared)
    hooks = Residual(Control(net, base.params, Config()), condition(layout)).hooks(tokens())
    assert torch.equal(base(tokens(), hooks), base(tokens()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_gradient_reaches_what_has_to_learn_first(layout: Layout) -> None:
    base, net = dit(), network(layout)
    hooks = Residual(Control(net, base.params, Config()), condition(layout)).hooks(tokens())
    base(tokens(), hooks).square().mean().backward()
    heads = [param.grad for name, param in net.named_parameters() if name.startswith("controlnet_blocks.") and name.endswith("weight")]
    assert all(grad is not None and grad.any() for grad in heads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_comes_back(layout: Layout, tmp_path: Path) -> None:
    net = network(layout, 2, 3 if layout == "latents" else 0)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.01)
    path = tmp_path / "c.safetensors"
    save_weights(path, file_tensors(net, net.state_dict()), {})
    found = identify(path)
    assert (found.role, found.variant) == ("controlnet", "pixels" if layout == "pixels" else "plain")
    again = load_controlnet(path, axes_dim=net.params.axes_dim)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())
    assert net.state_dict().keys() == again.state_dict().keys()
    names = set(file_tensors(net, net.state_dict()))
    assert ("transformer_blocks.0.attn.to_q.weight" in names) == (layout == "latents")


def test_residuals_are_spread_by_the_layouts_rule() -> None:
    marks = [torch.tensor(float(i)) for i in range(4)]

    def spread(double: int, single: int, layout: Layout) -> list[float | None]:
        made = Residuals(marks[:double], marks[:single], layout)
        return [None if (found := made.of(index, 5, 4)) is None else float(found) for index in range(9)]

    assert spread(2, 0, "pixels") == [0, 1, 0, 1, 0, None, None, None, None]
    assert spread(2, 3, "latents") == [0, 0, 0, 1, 1, 0, 0, 1, 1]


def test_more_blocks_than_the_base_has() -> None:
    with pytest.raises(ConfigError, match="more blocks than the base has"):
        network("latents", double=4)


def test_a_file_that_is_no_controlnet(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    save_weights(path, dit().state_dict(), {})
    with pytest.raises(ModelFileError, match="controlnet was expected"):
        load_controlnet(path)


def test_tokens_that_other_controls_appended_are_left_alone() -> None:
    base, net = dit(), network("latents")
    with torch.no_grad():
        for param in net.controlnet_blocks.parameters():
            param.fill_(0.1)
    longer = tokens()
    longer = longer._replace(
        img=torch.cat((longer.img, longer.img), dim=1), img_ids=torch.cat((longer.img_ids, longer.img_ids + 1), dim=1), n_target=4
    )
    control = Residual(Control(net, base.params, Config()), condition("latents"))
    assert net.residuals(longer, pack(condition("latents"))).double[0].shape == (1, 4, 32)
    assert base(longer, control.hooks(longer)).shape == (1, 4, 64)
    assert not torch.equal(base(longer, control.hooks(longer)), base(longer))
