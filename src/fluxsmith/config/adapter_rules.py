"""Rules of the adapter against the rest of the run: what the chosen file format can hold, and what happens between steps."""

from collections.abc import Iterator

from fluxsmith.config.adapter import LoraConfig
from fluxsmith.config.finding import Finding
from fluxsmith.config.model_rules import kind
from fluxsmith.config.schema import RunConfig

PEFT_KINDS = ("lora", "dora")
OWN_KINDS = ("lora", "dora", "lokr", "loha", "full", "ia3", "glora", "oft", "diag_oft", "boft")


def file_format(config: RunConfig) -> Iterator[Finding]:
    """PEFT's names hold LoRA and DoRA; what cannot be written is said before the first step, not after the last."""
    name = kind(config.adapter)
    if config.checkpoint.format != "peft" or name not in OWN_KINDS:
        return
    fix = 'write checkpoint.format = "kohya"'
    if name not in PEFT_KINDS:
        yield Finding(("checkpoint", "format"), f"PEFT's format has no names for {name}", fix)
    elif config.adapter is not None and config.adapter.model_dump().get("norm_per") == "input":
        yield Finding(("checkpoint", "format"), "PEFT's format has no DoRA with norms per input", fix)


def between_steps(config: RunConfig) -> Iterator[Finding]:
    """A fused update has no moment between the gradients and the step."""
    adapter = config.adapter
    if config.memory.fused_update == "off" or not isinstance(adapter, LoraConfig):
        return
    fix = 'write memory.fused_update = "off"'
    for name, is_on in (("max_norm", adapter.max_norm is not None), ("ggpo_sigma", adapter.ggpo_sigma is not None)):
        if is_on:
            yield Finding(("adapter", name), f"adapter.{name} does not work with a fused update", fix)


RULES = (file_format, between_steps)
