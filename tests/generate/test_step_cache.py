"""Step caches: off by default, exact at 0, one state a branch and picture, and what controls, LoRAs and Chroma do behind them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_dit
import tiny_run
import torch
from PIL import Image
from torch import Tensor, nn

from fluxsmith.cli.main import run
from fluxsmith.controls.controlnet import Config, Control
from fluxsmith.controls.controlnet_model import from_base
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Picture, Request
from fluxsmith.generate.step_cache import CachedDiT, FirstBlock, Rule, StepCaches, TeaCache
from fluxsmith.io.metadata import png_text
from fluxsmith.memory.block_swap import BlockSwap, Streaming
from fluxsmith.memory.modulation import LookAhead
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import BlockHook, Stream, Tokens

BASE = Request("a large red circle at center on a grey background", width=32, height=32, steps=8, seed=5)
KINDS = ("teacache", "first_block")
GREEDY = 1e9  # skips whatever may be skipped


def cache(kind: str, threshold: float = GREEDY) -> dict[str, Any]:
    return {"type": kind, "threshold": threshold}


def draw(pipeline: Pipeline, **changes: Any) -> tuple[Tensor, list[list[bool]]]:
    """Latents, and for each branch which forwards skipped the blocks."""
    request = pipeline.completed(replace(BASE, **changes))
    caches = StepCaches(request.cache)
    with torch.no_grad():
        latents = pipeline.latents(request, None, caches)
    return latents, [branch.skipped for branch in caches.branches]


def runs(monkeypatch: pytest.MonkeyPatch, dit: FluxDiT) -> list[nn.Module]:
    """Every block that is called from now on."""
    called: list[nn.Module] = []
    plain = dit.call

    def call(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor]:
        called.append(block)
        return plain(block, *inputs)

    monkeypatch.setattr(dit, "call", call)
    return called


# ---- what is skipped ------------------------------------------------------------------------------------------------


@pytest.mark.ledger("DS-23")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"cfg": 3.0, "negative": "blue"}, {"sampler": "heun"}], ids=["plain", "cfg", "heun"])
def test_zero_is_no_cache_to_the_bit(pipeline: Pipeline, kind: str, changes: dict[str, Any]) -> None:
    plain, none = draw(pipeline, **changes)
    cached, skipped = draw(pipeline, cache=cache(kind, 0.0), **changes)
    assert none == []
    assert torch.equal(plain, cached)
    assert len(skipped) == (2 if "cfg" in changes else 1)
    assert not any(any(branch) for branch in skipped)


@pytest.mark.ledger("DS-23")
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_forwards_run_no_block(pipeline: Pipeline, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = pipeline.models.dit
    assert dit is not None
    plain = draw(pipeline)[0]
    called = runs(monkeypatch, dit)
    latents, skipped = draw(pipeline, cache=cache(kind))
    assert skipped == [[False, *[True] * 6, False]]
    always = 6 if kind == "first_block" else 0
    assert len(called) == 2 * len(dit.blocks) + always
    assert (latents - plain).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_threshold_skips_no_less(pipeline: Pipeline, kind: str) -> None:
    counts = [sum(draw(pipeline, steps=16, cache=cache(kind, threshold))[1][0]) for threshold in (0.01, 0.1, 0.5, 2.0, 50.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 14


@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_and_the_last_level_always_compute(pipeline: Pipeline, steps: int) -> None:
    latents, skipped = draw(pipeline, steps=steps, cache=cache("teacache"))
    assert skipped == [[False] * steps]
    assert torch.equal(latents, draw(pipeline, steps=steps)[0])


def test_image_to_image_counts_its_own_levels(pipeline: Pipeline, start: Image.Image) -> None:
    assert draw(pipeline, image=start, strength=0.5, cache=cache("teacache"))[1] == [[False, True, True, False]]


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.ledger("DS-23")
@pytest.mark.parametrize("kind", KINDS)
def test_each_branch_has_its_own_state(pipeline: Pipeline, kind: str) -> None:
    """The same prompt on both sides: were anything shared, the branches would differ and the scale would matter."""
    alike = {"negative": BASE.prompt, "cache": cache(kind)}
    one, skipped = draw(pipeline, cfg=3.0, **alike)
    assert skipped == [[False, *[True] * 6, False]] * 2
    assert torch.equal(one, draw(pipeline, cfg=2.0, **alike)[0])
    assert torch.equal(one, draw(pipeline, cache=cache(kind))[0])
    assert not torch.equal(one, draw(pipeline, cfg=3.0, negative="a blue square", cache=cache(kind))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_begins_anew(pipeline: Pipeline, kind: str) -> None:
    request = replace(BASE, cache=cache(kind))
    first = pipeline.generate(request)
    pipeline.generate(replace(request, prompt="a small blue square", width=48))
    again = pipeline.generate(request)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.notes == again.notes == {"forwards": 8, "forwards_skipped": 6}


def test_teacache_clears_its_sum_and_moves_on() -> None:
    rule = TeaCache(0.5)
    probe = torch.ones(1, 2, 3)
    assert not rule.skips(probe, must_compute=True)
    assert [rule.skips(probe, must_compute=False) for _ in range(4)] == [True, False, True, False]  # 0.264 a step
    assert rule.accumulated == 0
    assert not rule.skips(probe * torch.inf, must_compute=False)  # NaN computes


def test_the_first_block_is_compared_with_the_last_computed_one() -> None:
    rule = FirstBlock(0.25)
    probe = torch.ones(1, 2, 3)
    assert not rule.skips(probe, must_compute=False)
    assert [rule.skips(probe * factor, must_compute=False) for factor in (1.1, 1.2, 1.3, 1.4)] == [True, True, False, True]
    assert not rule.skips(torch.zeros(1, 2, 3), must_compute=False)
    assert not rule.skips(torch.zeros(1, 2, 3), must_compute=False)  # 0 / 0


# ---- controls, LoRAs, Chroma, memory --------------------------------------------------------------------------------


class Shift(BlockHook):
    """Adds a slope over the channels to the image after one block."""

    def __init__(self, size: float) -> None:
        self.size = size

    def after(self, index: int, stream: Stream) -> Stream:
        slope = torch.linspace(-self.size, self.size, stream.img.shape[-1])
        return stream._replace(img=stream.img + slope) if index == 1 else stream


class OtherShift(Shift):
    """The same, of another kind."""


@pytest.fixture
def behind() -> Callable[..., CachedDiT]:
    def make(rule: Rule, dit: FluxDiT | None = None) -> CachedDiT:
        return CachedDiT(small_dit.dit() if dit is None else dit, rule, last=0.0)

    return make


def walk(cached: CachedDiT, hooks: Sequence[BlockHook] = ()) -> list[Tensor]:
    """Outputs at three levels."""
    with torch.no_grad():
        return [cached(small_dit.tokens()._replace(t=torch.tensor([t])), hooks) for t in (0.9, 0.6, 0.3)]


@pytest.mark.parametrize("rule", [TeaCache, FirstBlock])
def test_hooks_act_at_skipped_steps(behind: Callable[..., CachedDiT], rule: type[TeaCache | FirstBlock]) -> None:
    plain, hooked = behind(rule(GREEDY)), behind(rule(GREEDY))
    without, with_hook = walk(plain), walk(hooked, [Shift(0.5)])
    assert plain.skipped == hooked.skipped == [False, True, True]
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(without, with_hook, strict=True))


@pytest.mark.parametrize("rule", [TeaCache, FirstBlock])
def test_a_hook_that_comes_or_goes_makes_the_blocks_run(behind: Callable[..., CachedDiT], rule: type[TeaCache | FirstBlock]) -> None:
    cached = behind(rule(GREEDY))
    tokens = small_dit.tokens()
    with torch.no_grad():
        for hooks in ([], [Shift(1.0)], [Shift(1.0)], [OtherShift(1.0)], [], []):
            cached(tokens, hooks)
        longer = tokens._replace(txt=tokens.txt.repeat(1, 2, 1), txt_ids=tokens.txt_ids.repeat(1, 2, 1))
        assert torch.equal(cached(longer), cached.dit(longer))
    assert cached.skipped == [False, False, True, False, False, True, False]


def test_tokens_that_a_control_appends_are_cut_off(behind: Callable[..., CachedDiT]) -> None:
    tokens = small_dit.tokens()._replace(n_target=3)
    cached = behind(TeaCache(GREEDY))
    with torch.no_grad():
        outputs = [cached(tokens._replace(t=torch.tensor([t]))) for t in (0.9, 0.6)]
    assert cached.skipped == [False, True]
    assert all(output.shape[1] == 3 for output in outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnet_acts_behind_a_cache(pipeline: Pipeline, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = pipeline.models.dit
    assert dit is not None
    generator = torch.Generator().manual_seed(0)
    net = from_base(dit, layout="pixels", double_blocks=1, single_blocks=0, generator=generator)
    for param in net.parameters():
        if not param.any():
            param.data.normal_(0, 0.3, generator=generator)
    without = draw(pipeline, cache=cache(kind))[0]
    condition = Image.fromarray(torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy())
    monkeypatch.setattr(pipeline, "controls", [Control(net, dit.params, Config(image=condition))])
    plain, exact = draw(pipeline)[0], draw(pipeline, cache=cache(kind, 0.0))[0]
    cached, skipped = draw(pipeline, cache=cache(kind))
    assert torch.equal(plain, exact)
    assert sum(skipped[0]) == 6
    assert (cached - without).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_lora(pipeline: Pipeline, make_lora: Callable[..., Path], kind: str) -> None:
    base = draw(pipeline, cache=cache(kind))[0]
    pipeline.load_lora(make_lora("cached", seed=1, size=0.3))
    assert torch.equal(draw(pipeline)[0], draw(pipeline, cache=cache(kind, 0.0))[0])
    assert (draw(pipeline, cache=cache(kind))[0] - base).abs().max() > 1e-3


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    model = tiny_run.write_model(tmp_path_factory.mktemp("chroma"))
    return Pipeline.load(tiny_run.chroma_model(model), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_with_chroma(chroma: Pipeline, kind: str) -> None:
    assert torch.equal(draw(chroma, cfg=3.0)[0], draw(chroma, cfg=3.0, cache=cache(kind, 0.0))[0])
    assert draw(chroma, cfg=3.0, cache=cache(kind))[1] == [[False, *[True] * 6, False]] * 2


@pytest.mark.parametrize("rule", [TeaCache, FirstBlock])
def test_weights_that_wait_on_the_host(behind: Callable[..., CachedDiT], rule: type[TeaCache | FirstBlock]) -> None:
    """Streamed blocks and a modulation look-ahead give the same bits, however many forwards are left out."""
    expected = walk(behind(rule(GREEDY)))
    for attach in (stream, look_ahead):
        dit = small_dit.dit()
        attach(dit)
        cached = behind(rule(GREEDY), dit)
        assert all(torch.equal(one, other) for one, other in zip(walk(cached), expected, strict=True))
        assert cached.skipped == [False, True, True]


def stream(dit: FluxDiT) -> None:
    BlockSwap(dit, Streaming(tuple(range(len(dit.blocks)))), torch.device("cpu")).attach()


def look_ahead(dit: FluxDiT) -> None:
    LookAhead(dit, torch.device("cpu")).attach()


def test_it_stands_for_the_transformer(behind: Callable[..., CachedDiT]) -> None:
    cached = behind(TeaCache(0.0))
    tokens: Tokens = small_dit.tokens()
    assert (cached.params, cached.visible_padding) == (cached.dit.params, 0)
    assert torch.equal(cached(tokens), cached.dit(tokens))


# ---- the option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"type": "tea", "threshold": 0.4}, "use one of teacache, first_block"),
        ({"type": "teacache"}, "a type and a threshold"),
        ({"type": "teacache", "threshold": 0.4, "skip": 1}, "a type and a threshold"),
        ({"type": "teacache", "threshold": -1}, "must be 0 or more"),
        ({"type": "teacache", "threshold": float("nan")}, "must be 0 or more"),
        ({"type": "teacache", "threshold": "0.4"}, "must be 0 or more"),
        ({"type": "teacache", "threshold": True}, "must be 0 or more"),
    ],
)
def test_bad_options(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Request("a", cache=option).check()


def test_the_picture_says_what_was_skipped(pipeline: Pipeline) -> None:
    plain = pipeline.generate(BASE)
    assert plain.settings["cache"] is None
    assert "forwards" not in plain.settings
    assert "Step cache" not in png_text(plain.settings)["parameters"]
    picture: Picture = pipeline.generate(replace(BASE, cfg=2.0, cache=cache("teacache", 99.0)))
    assert picture.settings["cache"] == {"type": "teacache", "threshold": 99.0}
    assert (picture.settings["forwards"], picture.settings["forwards_skipped"]) == (16, 12)
    text = png_text(picture.settings)
    assert "Step cache: teacache 99.0 (skipped 12 of 16)" in text["parameters"]
    assert json.loads(text["fluxsmith"])["forwards_skipped"] == 12


SMALL = ("generate", "-p", "a", "--device", "cpu", "--width", "32", "--height", "32", "--steps", "4")


def test_the_command(tiny_section: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{key.replace('_', '-')}={tiny_section[key]}" for key in ("clip_l", "t5xxl", "ae")]
    command = [*SMALL, f"--model={tiny_section['path']}", "--preset=flux-shapes", *files, "-o", str(tmp_path / "out.png")]
    assert run([*command, "--step-cache", "first_block:1e6"]) == 0
    assert capsys.readouterr().out.endswith("seed 0  skipped 2 of 4\n")
    with Image.open(tmp_path / "out.png") as image:
        assert "Step cache: first_block 1000000.0 (skipped 2 of 4)" in image.info["parameters"]
    for text in ("teacache", "teacache:much", "tea:0.4", "teacache:-1"):
        assert run([*command, "--step-cache", text]) == 2
        assert "Fix: " in capsys.readouterr().err
