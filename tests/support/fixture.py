"""A folder of the parity fixtures: its meta, its inputs, and a comparison with what must come out."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_dit


class Fixture(SimpleNamespace):
    """One folder: meta, inputs `i`, expected `e`."""

    folder: Path
    meta: dict[str, Any]
    i: dict[str, Tensor]
    e: dict[str, Tensor]

    @property
    def weights(self) -> Path:
        return self.folder / self.meta.get("base_weights", "weights.safetensors")

    def dit(self) -> FluxDiT:
        return load_dit(self.weights, axes_dim=self.meta["config"]["axes_dim"])

    def close(self, value: Tensor, name: str, tolerance: str) -> None:
        allowed = self.meta["tolerance"][tolerance]
        expected = self.e[name]
        assert value.shape == expected.shape, name
        difference = (value.detach().double() - expected.double()).abs().max().item()
        assert difference <= allowed, f"{name}: {difference} > {allowed}"


def open_fixture(folder: Path) -> Fixture:
    meta = json.loads((folder / "meta.json").read_text())
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected")}
    return Fixture(folder=folder, meta=meta, i=tensors["inputs"], e=tensors["expected"])
