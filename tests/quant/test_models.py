"""Whole transformers on quantised bases: how far velocity and gradients are off, which layers are in what, loading block by block."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from quantised import BASES, adapted, config_of, cosine, gradients, normal_dit, relative
from streams import tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fluxsmith.config.choice import plugin_names
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import load_dit, load_t5xxl
from fluxsmith.quant.base import QuantLinear, by_block, quantise
from fluxsmith.quant.none import Config as NoneConfig

GATES = {"fp8": 4e-2, "int8": 4e-2, "int4": 8e-2, "nf4": 8e-2, "int2": 0.3}  # velocity, relative L2
ANGLES = {"fp8": 0.99, "int8": 0.99, "int4": 0.97, "nf4": 0.97, "int2": 0.8}  # adapter gradients, cosine
ADAPTERS = plugin_names("fluxsmith.adapters")


@pytest.mark.ledger("KS-21")
@pytest.mark.ledger("ST-05")
@pytest.mark.ledger("DS-07")
@pytest.mark.parametrize("name", BASES)
def test_velocity_and_adapter_gradients(name: str) -> None:
    kind, plain, dit = BASES[name][0], normal_dit(), normal_dit()
    assert quantise(config_of(name), "dit", dit) == 13
    with torch.no_grad():
        assert 1e-4 < relative(dit(tokens(0)), plain(tokens(0))) < GATES[kind]
    one, other = gradients(dit, adapted(dit)), gradients(plain, adapted(plain))
    joined = [torch.cat([grad.flatten() for grad in grads]) for grads in (one, other)]
    assert cosine(*joined) > ANGLES[kind]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["fp8", "int8-dynamic", "int4", "int2", "nf4"])
def test_every_adapter_works_on_every_base(name: str, adapter: str) -> None:
    """As on a plain base with the dequantised weights: output and gradients; merging is refused."""
    dit, same = normal_dit(), normal_dit()
    quantise(config_of(name), "dit", dit)
    for one, other in zip(dit.modules(), same.modules(), strict=False):
        if isinstance(one, QuantLinear) and isinstance(other, Linear):
            other.weight = nn.Parameter(one.dequantize(), requires_grad=False)
    sets = [adapted(one, adapter) for one in (dit, same)]
    with torch.no_grad():
        assert relative(dit(tokens(0)), same(tokens(0))) < (0.02 if "dynamic" in name else 1e-4)
    mine, theirs = (torch.cat([grad.flatten() for grad in gradients(*pair)]) for pair in zip((dit, same), sets, strict=True))
    assert mine.norm() > 0
    assert cosine(mine, theirs) > (0.995 if "dynamic" in name else 0.9999)
    with pytest.raises(ValueError, match="is quantised: merge into the full weights instead"):
        sets[0].merge()


def kinds(module: nn.Module) -> dict[str, str]:
    return {path: one.form if isinstance(one, QuantLinear) else "" for path, one in module.named_modules() if isinstance(one, Linear)}


@pytest.mark.ledger("ST-05")
@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "nf4"])
def test_modulation_is_in_8_bits_and_embedders_stay(name: str) -> None:
    dit = normal_dit()
    quantise(config_of(name), "dit", dit)
    for path, form in kinds(dit).items():
        eight = name if name == "fp8" else "int8"
        expected = "" if "_blocks." not in path else eight if path.endswith(("mod.lin", "modulation.lin")) else name
        assert form == expected, path


def test_options_say_which_layers() -> None:
    dit = normal_dit()
    config = config_of("int4", modulation="keep", embedders="int8", exclude=(r"single_blocks\.0\.linear2", r"final_layer"))
    quantise(config, "dit", dit)
    found = kinds(dit)
    assert found["double_blocks.0.img_mod.lin"] == ""
    assert found["img_in"] == "int8"
    assert found["final_layer.linear"] == found["single_blocks.0.linear2"] == ""
    assert found["single_blocks.0.linear1"] == "int4"


def test_layers_without_whole_groups_are_in_8_bits() -> None:
    linear = Linear(12, 8).requires_grad_(False)
    holder = nn.Sequential(linear)
    config = config_of("int4", text_encoders=True)
    assert quantise(config, "t5xxl", holder) == 1
    assert isinstance(holder[0], QuantLinear)
    assert holder[0].form == "int8"


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run.write_model(tmp_path_factory.mktemp("files"))
    save_weights(folder / "dit.safetensors", normal_dit().state_dict())
    return folder


@pytest.mark.ledger("ST-05")
@pytest.mark.parametrize("via", ["device", "cpu"])
@pytest.mark.parametrize("name", ["fp8", "int4", "nf4"])
def test_blocks_are_quantised_while_they_are_read(files: Path, name: str, via: str) -> None:
    config, after = config_of(name, via=via), load_dit(files / "dit.safetensors")
    quantise(config, "dit", after)
    how = by_block(config, "dit", torch.device("cpu"))
    assert how is not None
    seen = []

    def finish(path: str, block: nn.Module) -> None:
        how.finish(path, block)
        seen.append(path)
        assert all(isinstance(one, QuantLinear) for one in block.modules() if isinstance(one, Linear))

    during = load_dit(files / "dit.safetensors", by_block=how._replace(finish=finish))
    assert seen == ["double_blocks.0", "single_blocks.0"]
    assert kinds(during) == kinds(after)
    with torch.no_grad():
        assert torch.equal(during(tokens(0)), after(tokens(0)))


def test_no_more_than_one_block_is_there_in_full(files: Path) -> None:
    how = by_block(config_of("int8"), "dit", torch.device("cpu"))
    assert how is not None
    made: list[nn.Module] = []

    def finish(path: str, block: nn.Module) -> None:
        made.append(block)
        assert all(not param.is_meta for param in block.parameters())
        for earlier in made[:-1]:
            assert all(isinstance(one, QuantLinear) for one in earlier.modules() if isinstance(one, Linear))
        how.finish(path, block)

    load_dit(files / "dit.safetensors", by_block=how._replace(finish=finish))
    assert len(made) == 2


@pytest.mark.ledger("KS-20")
@pytest.mark.parametrize(("choice", "expected"), [(True, "int4"), ("int8", "int8"), ({"t5xxl": "fp8"}, "fp8"), ({"clip_l": "int8"}, "")])
def test_text_encoders_have_a_kind_of_their_own(files: Path, choice: object, expected: str) -> None:
    config = type(config_of("int4")).model_validate({"type": "int4", "text_encoders": choice})
    t5 = load_t5xxl(files / "t5xxl.safetensors", by_block=by_block(config, "t5xxl", torch.device("cpu")))
    quantise(config, "t5xxl", t5)
    assert set(kinds(t5).values()) == {expected}
    plain = load_t5xxl(files / "t5xxl.safetensors")
    states = [one.model(torch.tensor([[3, 5, 7]])).last_hidden_state for one in (t5, plain)]
    assert relative(*states) < (0.15 if expected == "int4" else 0.05)  # and transformers fed the layers floats


def test_only_the_text_encoders() -> None:
    config = NoneConfig(type="none", text_encoders="int8")
    dit = normal_dit()
    assert quantise(config, "dit", dit) == 0
    assert by_block(config, "dit", torch.device("cpu")) is None
    assert by_block(config, "t5xxl", torch.device("cpu")) is not None


PARTITIONED = ("int8-dynamic", "nf4-kernel")


@pytest.mark.ledger("ST-42")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic", "int8", "int8-dynamic", "int4", "nf4", "nf4-kernel"])
def test_blocks_compile_whole_on_every_base(name: str) -> None:
    torch._dynamo.reset()
    backend = "aot_eager" if name in PARTITIONED else "eager"  # the first traces the backward pass too, and takes its time
    counter, plain, dit = CompileCounterWithBackend(backend), normal_dit(), normal_dit()
    for one in (plain, dit):
        quantise(config_of(name), "dit", one)
    sets = [adapted(one) for one in (plain, dit)]
    for block in dit.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    mine, theirs = (torch.cat([grad.flatten() for grad in gradients(*pair)]) for pair in zip((plain, dit), sets, strict=True))
    torch._dynamo.reset()
    assert counter.frame_count <= 4, "as many as with adapters on a plain base"
    assert cosine(mine, theirs) > 0.9999


WIDE = 512  # FLUX's own 3072 is what tests/gpu measures


def wide_dit() -> FluxDiT:
    """A double and a single block, heads of 128."""
    size = {"hidden_size": WIDE, "mlp_hidden": 4 * WIDE, "num_heads": WIDE // 128, "axes_dim": (16, 56, 56)}
    made, generator = FluxDiT(replace(tiny_run.flux_params(), **size)), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, Linear):
                module.weight.normal_(std=0.7 * module.in_features**-0.5, generator=generator)
                module.bias.zero_()
    return made.requires_grad_(False)


def wide_gradients(dit: FluxDiT) -> torch.Tensor:
    found = adapted(dit, targets="blocks")
    dit(tokens(0, cells=8, text=16, batch=1)).square().mean().backward()
    return torch.cat([param.grad.flatten() for param in found.params.values() if param.grad is not None])


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    """Gradients on the plain base."""
    return wide_gradients(wide_dit())


@pytest.mark.ledger("FS-08")
@pytest.mark.ledger("DS-31")
@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic", "int4", "nf4"])
def test_gradients_of_two_wide_blocks(exact: torch.Tensor, name: str) -> None:
    dit = wide_dit()
    quantise(config_of(name), "dit", dit)
    assert cosine(wide_gradients(dit), exact) > ANGLES[BASES[name][0]]
