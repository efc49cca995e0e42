"""EliGen: regions have an effect alone and beside other controls, what is outside stays, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_dit import dit, tokens
from tiny_pipeline import latents, load, model_section

from fluxsmith.config.control import Ground
from fluxsmith.controls import controlnet
from fluxsmith.controls.controlnet_model import from_base
from fluxsmith.controls.eligen import Config, Entities, Kept, Regions, allowed_pairs, regions_of, token_masks
from fluxsmith.controls.kontext import Kontext
from fluxsmith.controls.value import Rows
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.models.assembly import joint_mask
from fluxsmith.models.stream import Conditioner, Tokens, Window

Draw = Callable[..., Image.Image]


def regions(*places: tuple[int, int], side: int = 4) -> Regions:
    """Of single cells (row, column)."""
    masks = torch.zeros(len(places), side, side, dtype=torch.bool)
    for number, place in enumerate(places):
        masks[(number, *place)] = True
    return Regions(masks, masks.any(dim=0))


def entities(*places: tuple[int, int], seen: torch.Tensor | None = None) -> Entities:
    texts = torch.randn(len(places), 3, tokens().txt.shape[-1], generator=torch.Generator().manual_seed(3))
    return Entities(texts, seen, regions(*places))


@pytest.fixture(scope="module")
def eligen(plain_model: Path, mask: Draw) -> Pipeline:
    entries = [{"prompt": "a blue square", "mask": mask((0, 0, 32, 64))}, {"prompt": "a green star", "mask": mask((32, 0, 64, 32))}]
    return load(plain_model, {"type": "eligen", "entities": entries})


@pytest.mark.ledger("DS-17")
def test_prompts_and_masks_have_an_effect(eligen: Pipeline, plain_model: Path, mask: Draw) -> None:
    left = {"prompt": "a blue square", "mask": mask((0, 0, 32, 64))}
    seen = [latents(eligen), latents(load(plain_model))]
    for given in ([left], [{**left, "prompt": "a red heart"}], [{**left, "mask": mask((0, 0, 64, 32))}]):
        seen.append(latents(eligen, controls={"eligen": {"entities": given}}))
    assert all((a - b).abs().max() > 1e-5 for number, a in enumerate(seen) for b in seen[:number])
    assert (seen[0] - latents(eligen, prompt="a yellow ring")).abs().max() > 1e-5


@pytest.mark.ledger("DS-17")
def test_the_negative_branch_has_regions_where_it_shall(eligen: Pipeline) -> None:
    guided = {"cfg": 3.0, "negative": "a yellow ring"}
    plain = latents(eligen, **guided)
    regional = latents(eligen, controls={"eligen": {"on_negative": True}}, **guided)
    assert (plain - regional).abs().max() > 1e-5


@pytest.mark.ledger("DS-17")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_what_is_outside_all_masks_stays_as_it_was(eligen: Pipeline, picture: Draw, mask: Draw, cfg: float) -> None:
    start = picture(1)
    assert eligen.models.ae is not None
    clean = eligen.encode_image(latents_request(start), torch.device("cpu"))
    options = {"image": start, "strength": 0.9, "cfg": cfg, "negative": "a yellow ring" if cfg > 1 else ""}
    made = latents(eligen, controls={"eligen": {"inpaint": True}}, steps=3, **options)
    outside = torch.zeros(8, 8, dtype=torch.bool)
    outside[5:, 5:] = True
    assert torch.allclose(made[..., outside], clean[..., outside], atol=1e-4)
    assert (made[..., :4] - clean[..., :4]).abs().max() > 1e-2
    free = latents(eligen, steps=3, **options)
    assert (free[..., outside] - clean[..., outside]).abs().max() > 1e-2


def latents_request(start: Image.Image) -> Any:
    from fluxsmith.generate.request import Request

    return Request("x", width=64, height=64, image=start)


def test_who_may_attend_to_whom() -> None:
    seen = token_masks(regions((0, 0), (3, 3)).masks)
    assert seen.tolist() == [[True, False, False, False], [False, False, False, True]]
    pairs = allowed_pairs(seen, 1, 1, 5).int()  # one row each: entity, entity, prompt, then four tokens and a reference
    assert pairs.tolist() == [
        [1, 0, 0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1, 0],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
    ]


def sequence(*controls: Conditioner, start: Tokens | None = None) -> Tokens:
    made = start or tokens()
    for control in sorted(controls, key=lambda one: one.order):
        made = control.tokens(made)
    return made


def test_references_and_further_text_belong_to_the_whole_picture() -> None:
    text = tokens().txt.shape[-1]
    made = sequence(entities((0, 0)), Kontext.of([torch.ones(1, 16, 2, 4)]), Rows(torch.ones(1, 2, text)))
    assert made.txt.shape[1] == 3 + 3 + 2
    assert made.n_prompt == 5
    assert made.mask is not None
    assert made.mask.shape == (1, 1, 14, 14)
    entity, prompt, reference = made.mask[0, 0, 0], made.mask[0, 0, 3], made.mask[0, 0, -1]
    assert entity.tolist() == [True] * 3 + [False] * 5 + [True] + [False] * 5
    assert prompt.tolist() == [False] * 3 + [True] * 11
    assert torch.equal(reference, prompt)
    assert dit()(made).isfinite().all()


def test_a_text_mask_hides_padding_of_every_text() -> None:
    start = tokens()._replace(mask=joint_mask(torch.tensor([[True, True, False]]), 4))
    seen = torch.tensor([[True, False, False]])
    made = sequence(entities((0, 0), seen=seen), start=start)
    assert made.mask is not None
    keys = made.mask[0, 0].any(dim=0).tolist()
    assert keys == [True, False, False, True, True, False] + [True] * 4
    assert made.mask[0, 0].any(dim=1).all()  # nobody is left alone
    other = sequence(entities((0, 0), seen=seen), start=start._replace(txt=start.txt + torch.tensor([0.0, 0.0, 9.0])[None, :, None]))
    assert torch.allclose(dit()(made), dit()(other), atol=1e-5)


def test_a_controlnet_beside_it_sees_the_prompt_alone() -> None:
    base = dit()
    net = from_base(base, layout="latents", double_blocks=1, single_blocks=0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for param in net.controlnet_blocks.parameters():
            param.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    condition = torch.ones(1, 4, 64)
    for start in (tokens(), tokens()._replace(mask=joint_mask(torch.tensor([[True, True, False]]), 4))):
        alone = net.residuals(start, condition).double[0]
        beside = net.residuals(sequence(entities((0, 0), (2, 2)), start=start), condition).double[0]
        assert torch.allclose(alone, beside, atol=1e-6)
    residual = controlnet.Residual(controlnet.Control(net, base.params, controlnet.Config()), torch.ones(1, 16, 4, 4))
    made = sequence(entities((0, 0)))
    assert not torch.allclose(base(made, residual.hooks(made)), base(made), atol=1e-4)


def test_a_window_sees_its_part_and_what_is_kept_is_kept_in_the_whole() -> None:
    whole = Entities(torch.ones(1, 3, 16), None, regions((2, 5), side=8), torch.zeros(1, 16, 8, 8))
    part = whole.tile(Window(2, 4, 4, 4, 8, 8))
    assert part.regions.masks.nonzero().tolist() == [[0, 0, 1]]
    assert part.clean is None
    x, v = torch.ones(1, 16, 8, 8), torch.zeros(1, 16, 8, 8)
    kept = whole.correct(v, x, 0.5)
    assert kept[0, 0, 2, 5] == 0
    assert kept.eq(2).sum() == 16 * 63
    assert Kept(whole.regions, None).correct(v, x, 0.5) is v


def test_masks_of_another_shape_are_cropped_or_stretched(mask: Draw) -> None:
    left = [mask((0, 0, 64, 64), 128, 64)]
    cropped, stretched = (regions_of(left, 64, 64, fit=fit).masks[0].int().sum(dim=1)[0] for fit in ("cover", "stretch"))
    assert (int(cropped), int(stretched)) == (4, 4)
    wide = [mask((0, 0, 32, 64), 128, 64)]
    assert not regions_of(wide, 64, 64).masks.any()
    assert regions_of(wide, 64, 64, fit="stretch").masks.sum() == 16


def test_tiles_are_drawn(eligen: Pipeline, mask: Draw) -> None:
    made = latents(eligen, width=96, denoise_tile=64)
    assert made.shape == (1, 16, 8, 12)
    right = {"entities": [{"prompt": "a blue square", "mask": mask((64, 0, 96, 64), 96, 64)}]}
    assert (made - latents(eligen, width=96, denoise_tile=64, controls={"eligen": right})).abs().max() > 1e-5


def test_what_is_refused(plain_model: Path, mask: Draw) -> None:
    entity = {"prompt": "a", "mask": mask((0, 0, 9, 9))}
    ground = Ground(cfg=1.0)
    assert "has no entities" in str(next(Config(type="eligen").problems(ground)))
    assert "gone.png" in str(next(Config(type="eligen", entities=({**entity, "mask": "gone.png"},)).problems(ground)))
    given = Config(type="eligen", entities=(entity,), inpaint=True, on_negative=True)
    assert [str(problem)[:20] for problem in given.problems(ground)] == ["eligen.inpaint witho", "eligen.on_negative h"]
    assert not list(given.problems(Ground(cfg=3.0, has_image=True)))
    assert "two eligen" in str(next(given.misfits(Ground(others=("eligen",)))))
    assert "needs a model with T5" in str(next(given.misfits(Ground(roles=("dit", "ae")))))
    with pytest.raises(ConfigError, match="takes no mask"):
        Pipeline.load(model_section(plain_model), controls=[{"type": "eligen", "entities": [entity]}], device="cpu", attention="flash")
