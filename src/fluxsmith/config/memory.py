"""Section `memory`: where weights and activations live, and what is recomputed."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from fluxsmith.config.section import Section


class CheckpointingPlan(Section):
    """Numbers of blocks by what they keep for the backward pass."""

    keep: NonNegativeInt = 0
    """Blocks, the last ones, that keep everything."""
    selective: NonNegativeInt = 0
    """Blocks before them that keep large products and attention, and compute norms, rotations and activations again."""
    offloaded: NonNegativeInt = 0
    """Blocks, the first ones, whose inputs wait in host memory."""


class OffloadConfig(Section):
    """Grouped offload, in SimpleTuner's words."""

    level: Literal["block", "leaf"] = "block"
    """block: groups of `blocks_per_group`; leaf: the smallest groups there are, one block, since its gradients need all of it."""
    blocks_per_group: PositiveInt = 1
    """Blocks that travel together."""
    streams: bool = True
    """Fetch the next group while one computes, into a second place on the card; without it one place, and waiting."""
    disk: Path | None = None
    """Folder for weights that wait on disk, memory-mapped, instead of in memory."""


class MemoryConfig(Section):
    """Where things live and what is recomputed."""

    plan: Literal["off", "auto"] = "off"
    """auto chooses look-ahead, streaming and checkpointing for `card`, and says so; it never quantises."""
    card: PositiveFloat | None = None
    """The card's memory in GiB (or "12GB"), for `plan`; by default that of the card that is there."""
    checkpointing: bool = False
    """Recompute activations in backward instead of keeping them."""
    checkpointing_offload: bool = False
    """Keep the inputs of recomputed blocks in host memory; needs `checkpointing`."""
    checkpointing_interval: PositiveInt = 1
    """Recompute every n-th block of each stack and keep the others; needs `checkpointing`."""
    checkpointing_plan: CheckpointingPlan | None = None
    """How many blocks keep what; the rest is recomputed. Needs `checkpointing`."""
    swap_blocks: int = Field(default=0, ge=0)
    """Blocks of the transformer whose weights wait in host memory, half of the number double blocks, twice the rest single ones."""
    stream_blocks: NonNegativeInt | Literal["all"] = 0
    """Blocks, evenly spaced over both stacks, whose weights wait in host memory; "all" is every one."""
    offload: OffloadConfig | None = None
    """All blocks wait in host memory, in groups."""
    modulation: Literal["auto", "resident", "lookahead"] = "auto"
    """lookahead: modulation weights (27 %) stay in host memory and are evaluated ahead of use; auto: on a card, where that is possible."""
    fused_update: Literal["off", "tensor", "block"] = "off"
    """Update inside the backward pass and free gradients at once, tensor by tensor or block by block; needs `train.accumulation = 1`."""
    optimizer_offload: Literal["off", "states", "masters"] = "off"
    """states: whole models are updated in host memory, where optimizer states live; masters: with fp32 weights beside them."""
    compile: bool = False
    """Compile each block with torch.compile."""
    compile_lengths: Literal["auto", "static", "dynamic"] = "auto"
    """Graphs for each token length (static), one set for all (dynamic), or one for the first and one for all others (auto); needs
    `compile`."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "flash3", "sage"] = "auto"
    """Attention kernel: torch's choice (auto, sdpa), one of torch's, or one of a package (flash3; sage, which cannot train)."""
    kernels: Literal["auto", "torch", "triton"] = "torch"
    """Who computes the steps between products: torch, or fused Triton kernels on a card (not measured yet, so auto is torch)."""
    reference_rounding: bool = False
    """Round every intermediate as the original implementation does, step by step; slower, for comparisons."""

    @field_validator("card", mode="before")
    @classmethod
    def _gib(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return value.strip().upper().removesuffix("B").removesuffix("I").removesuffix("G").strip()

    @property
    def streams(self) -> str:
        """The option that sends blocks to host memory; empty for none."""
        asked = {"swap_blocks": self.swap_blocks, "stream_blocks": self.stream_blocks, "offload": self.offload}
        return next((name for name, value in asked.items() if value), "")
