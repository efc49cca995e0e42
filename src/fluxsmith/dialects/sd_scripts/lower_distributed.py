"""`--deepspeed` and its settings: the ZeRO stages are done by FSDP2, which comes with PyTorch."""

from fluxsmith.dialects.base import Draft
from fluxsmith.io.launcher import STAGES


def deepspeed(draft: Draft) -> None:
    """Shares of weights, gradients and optimizer states; the launcher says on how many cards."""
    settings = [name for name in ("offload_optimizer_device", "offload_param_device") if draft[name]]
    if not draft["deepspeed"]:
        for name in [*settings, *(["zero_stage"] if draft.has("zero_stage") else [])]:
            draft.note(f"--{name}", "has no effect without --deepspeed")
        return
    shard = STAGES[draft["zero_stage"]]
    more = ", gradients are shared out too" if draft["zero_stage"] == 1 else ""
    draft.note("--deepspeed", f'ZeRO-{draft["zero_stage"]} is done by FSDP2 (distributed.shard = "{shard}"{more}); start it with torchrun')
    if shard != "none":
        draft.put("distributed.shard", shard, "--zero_stage")
    for name in settings:
        if draft[name] == "nvme":
            draft.refuse(draft.where(name), f"--{name} nvme is not available", f"write --{name} cpu", "shares wait in host memory")
        elif shard != "none":
            draft.put("distributed.cpu_offload", True, f"--{name}")
