"""Blocks with adapters of every kind compile whole, and a new strength compiles nothing anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxsmith.config.choice import config_class, realise
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import Tokens

KINDS: list[dict[str, Any]] = [
    {"type": "dora"},
    {"type": "dora", "norm_per": "input"},
    {"type": "lokr"},
    {"type": "loha", "weight_decompose": True},
    {"type": "ia3", "on_input": True},
    {"type": "oft", "constraint": 0.5},
    {"type": "diag_oft", "rescale": True},
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler hides it by itself, unless errors
@pytest.mark.parametrize("values", KINDS, ids=lambda values: "-".join(map(str, values.values())))
def test_blocks_compile_whole(values: dict[str, Any], dit: FluxDiT, fixtures_root: Path) -> None:
    inputs = load_file(fixtures_root / "flux-dev-tiny/inputs.safetensors")
    tokens = Tokens(*(inputs[name] for name in ("img", "img_ids", "txt", "txt_ids", "y", "timesteps", "guidance")))
    made = realise(config_class("fluxsmith.adapters", values["type"]).model_validate({"rank": 4, **values})).build({"dit": dit})
    for param in made.params.values():
        param.add_(torch.randn(param.shape) * 0.05)
    wanted = dit(tokens)
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for block in dit.blocks:
        block.compile(fullgraph=True, backend=backend, dynamic=False)
    assert torch.allclose(dit(tokens), wanted, atol=1e-5)
    before = len(graphs)
    made.scale(0.5)
    assert not torch.allclose(dit(tokens), wanted)
    assert len(graphs) == before
