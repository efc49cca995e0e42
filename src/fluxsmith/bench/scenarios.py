"""What is measured: the table of scenarios, as data. A name says everything: `lora-int8-1024-b1-full`.

`run` holds the sections of a run file that differ from the plain LoRA; `chosen(["lora-*-1024*"])` selects by glob.
"""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from fluxsmith.errors import ConfigError

Kind = Literal["train", "draw", "micro"]
LORA: Mapping[str, Any] = {"type": "lora", "rank": 16, "targets": "blocks"}
ALL_SELECTIVE = 1000  # more blocks than any model has: cut to the number there is
CHECKPOINTING: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "selective": {"checkpointing": True, "checkpointing_plan": {"selective": ALL_SELECTIVE}},
    "full": {"checkpointing": True},
}
FULL = CHECKPOINTING["full"]
BASES = ("bf16", "fp8", "int8", "nf4")


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    name: str
    kind: Kind
    about: str
    side: int = 1024
    text: int = 512
    batch: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a run file: adapter, quant, memory, optim, train, control."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of a drawing: steps, limit (GiB), cache, lora, compile. Of a micro-measurement: what. Of a training: loader."""


def _base(kind: str) -> dict[str, Any]:
    return {} if kind == "bf16" else {"quant": {"type": kind}}


def _loras() -> Iterator[Scenario]:
    for kind, side, batch, (name, memory) in product(BASES, (512, 768, 1024), (1, 4), CHECKPOINTING.items()):
        about = f"LoRA of rank 16, {kind} base, {side} px, batch {batch}, {name} checkpointing"
        run = {"adapter": LORA, **_base(kind), "memory": memory}
        yield Scenario(f"lora-{kind}-{side}-b{batch}-{name}", "train", about, side, batch=batch, run=run)
    for text in (128, 256, 512):
        run = {"adapter": LORA, "memory": FULL}
        yield Scenario(f"text-{text}", "train", f"LoRA with {text} text tokens", text=text, run=run)
    for side, count in product((512, 1024), (10, 20, 35, 57)):
        memory = {**FULL, "stream_blocks": count}
        run = {"adapter": LORA, **_base("int8"), "memory": memory}
        yield Scenario(f"streamed-{side}-{count}", "train", f"LoRA on int8 with {count} of 57 blocks streamed", side, run=run)
    run = {"adapter": LORA, "memory": {**FULL, "checkpointing_offload": True}}
    yield Scenario("offloaded-1024", "train", "LoRA with boundaries in host memory", run=run)
    run = {"adapter": LORA, "memory": {**FULL, "modulation": "lookahead"}}
    yield Scenario("lookahead-1024", "train", "LoRA with modulation look-ahead (on a card every LoRA row has it)", run=run)
    for side in (512, 1024):
        run = {"adapter": LORA, "memory": CHECKPOINTING["none"]}
        yield Scenario(f"loader-{side}", "train", "LoRA fed from disk caches by the loader", side, run=run, options={"loader": True})
        run = {"adapter": LORA, "memory": {"compile": True}}
        yield Scenario(f"compiled-{side}", "train", "LoRA with compiled blocks", side, run=run)


def _others() -> Iterator[Scenario]:
    full = {"weights_dtype": "bf16"}
    eight = {"type": "bnb", "name": "adamw8bit"}
    yield Scenario("full-8bit", "train", "full fine-tune, 8-bit AdamW", run={"train": full, "optim": eight, "memory": FULL})
    fused = {"train": full, "optim": {"type": "adamw_bf16"}, "memory": {**FULL, "fused_update": "block"}}
    yield Scenario("full-fused", "train", "full fine-tune, stochastic rounding, updates inside the backward pass", run=fused)
    for kind in ("lokr", "loha", "dora"):
        run = {"adapter": {**LORA, "type": kind}, "memory": FULL}
        yield Scenario(kind, "train", f"{kind} of rank 16", run=run)
    control = [{"type": "controlnet", "train": True, "double_blocks": 2}]
    yield Scenario("controlnet", "train", "ControlNet of two double blocks", run={"control": control, "memory": FULL})


def _drawings() -> Iterator[Scenario]:
    table: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
        "bf16": ("28 steps, bf16", {}, {}),
        "compiled": ("compiled blocks", {}, {"compile": True}),
        "fp8": ("fp8 base", _base("fp8"), {}),
        "nf4": ("nf4 base", _base("nf4"), {}),
        "streamed-8gib": ("within 8 GiB", {}, {"limit": 8.0}),
        "streamed-6gib": ("within 6 GiB", {}, {"limit": 6.0}),
        "streamed-4gib": ("within 4 GiB", {}, {"limit": 4.0}),
        "cache": ("TeaCache at 0.4", {}, {"cache": {"type": "teacache", "threshold": 0.4}}),
        "lora": ("with a LoRA of rank 16 attached", {"adapter": LORA}, {}),
    }
    for name, (about, run, options) in table.items():
        yield Scenario(f"draw-{name}", "draw", f"drawing, {about}", run=run, options={"steps": 28, **options})


def _micros() -> Iterator[Scenario]:
    for name, about in MICROS.items():
        yield Scenario(f"micro-{name}", "micro", about, options={"what": name})


MICROS: Mapping[str, str] = {
    "modulate": "layer norm and modulation, forward and backward",
    "heads": "q/k RMS norm and rotation, forward and backward",
    "adapter": "adapted linear layer, forward and backward",
    **{f"forward-{kind}": f"product with {kind} weights" for kind in ("bf16", "fp8", "int8", "int4", "nf4")},
    **{f"dx-{kind}": f"gradient of the input through {kind} weights" for kind in ("bf16", "fp8", "int8", "int4", "nf4")},
    **{f"unpack-{kind}": f"{kind} weights unpacked" for kind in ("fp8", "int8", "int4", "nf4")},
    "host-copy": "one block's bytes from pinned host memory",
}
SCENARIOS: tuple[Scenario, ...] = (*_loras(), *_others(), *_drawings(), *_micros())


def chosen(patterns: Sequence[str]) -> list[Scenario]:
    """Scenarios whose name fits one of the globs, in the table's order. Raises ConfigError for a glob that fits none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(one.name, pattern) for one in SCENARIOS):
            near = difflib.get_close_matches(pattern, [one.name for one in SCENARIOS], 1, 0.5)
            fix = f"did you mean {near[0]}?" if near else "see fluxsmith bench --list"
            raise ConfigError(f"no scenario is called {pattern}", fix=fix)
    return [one for one in SCENARIOS if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)]
