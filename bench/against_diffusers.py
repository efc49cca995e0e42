"""The oracle of a bench row: the same LoRA step in eager diffusers and peft, on random weights of the same sizes, in the same session.

`fluxsmith bench lora-bf16-1024-b1-full --against diffusers` runs it; `python bench/against_diffusers.py ORDER.json ANSWER.json` by hand.
bf16 rows without look-ahead, streaming or quantisation have a counterpart; others are answered with the reason.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from fluxsmith.bench import meter  # noqa: E402  needs the path above
from fluxsmith.bench.job import WARM_UP, Order  # noqa: E402
from fluxsmith.bench.sizes import SIZES, Size, drawn  # noqa: E402

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
TARGETS = rf".*transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"


def transformer(size: Size, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> Any:
    """diffusers' class with random weights and a LoRA of rank 16 on the layers that `targets = "blocks"` names."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    p = size.params
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=p.in_channels, num_layers=p.depth, num_single_layers=p.depth_single_blocks, attention_head_dim=sum(p.axes_dim),
            num_attention_heads=p.num_heads, joint_attention_dim=p.context_in_dim, pooled_projection_dim=p.vec_in_dim,
            guidance_embeds=p.guidance_embed, axes_dims_rope=p.axes_dim,
        )  # fmt: skip
    values = {key: drawn(key, tuple(tensor.shape), 0, device).to(dtype) for key, tensor in model.state_dict().items()}
    model.load_state_dict(values, strict=True, assign=True)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, init_lora_weights="gaussian"))
    if checkpointing:
        model.enable_gradient_checkpointing()
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return model.train()


def measure(order: Order) -> dict[str, Any]:
    """Time and memory of the same step."""
    scenario, size, device = order.scenario, SIZES[order.size], torch.device(order.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    is_checkpointed = bool(scenario.run.get("memory", {}).get("checkpointing"))
    model = transformer(size, device, dtype, is_checkpointed)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    rows, text, p = size.side(scenario.side) // 16, size.text(scenario.text), size.params
    b = scenario.batch
    img_ids = torch.zeros(rows, rows, 3, device=device)
    img_ids[..., 1] += torch.arange(rows, device=device)[:, None]
    img_ids[..., 2] += torch.arange(rows, device=device)[None]
    inputs = {
        "hidden_states": torch.randn(b, rows * rows, p.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(b, text, p.context_in_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(b, p.vec_in_dim, device=device, dtype=dtype),
        "timestep": torch.full((b,), 0.6, device=device, dtype=dtype),
        "guidance": torch.ones(b, device=device),
        "img_ids": img_ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    target = torch.randn(b, rows * rows, p.out_channels, device=device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
            made = model(**inputs, return_dict=False)[0]
        loss = (made.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    trained = sum(param.numel() for param in params)
    for _ in range(WARM_UP):
        step()
    meter.begin_memory(device)
    row = meter.spread([meter.timed(step, device)[0] for _ in range(order.repeats)])
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("diffusers", "peft")}
    static = {device.type: sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) + 8 * trained}
    counts = meter.counted(step, device, static=static)
    return {**row, "memory_bytes": meter.memory(device), "counts": counts, "versions": versions, "trained": trained}


def why_not(order: Order) -> str:
    """Empty where both sides can do the same."""
    run = order.scenario.run
    if set(run) - {"adapter", "memory"} or run.get("adapter", {}).get("type") != "lora":
        return "only a LoRA on the plain base has a counterpart"
    if set(run.get("memory", {})) - {"checkpointing"} or order.scenario.options:
        return "only plain and checkpointed steps have a counterpart"
    return ""


def main(words: list[str]) -> None:
    """Command line of the process."""
    order = Order(**json.loads(Path(words[0]).read_text(encoding="utf-8")))
    answer: dict[str, Any]
    if why := why_not(order):
        answer = {"skipped": why}
    else:
        try:
            answer = {"name": "diffusers + peft, eager", **measure(order)}
        except ImportError as error:
            answer = {"skipped": f"{error}: pip install diffusers peft"}
        except torch.OutOfMemoryError as error:
            answer = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    Path(words[1]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
