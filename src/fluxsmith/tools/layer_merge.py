"""What adapters make of one model's tensors, one layer at a time; the arithmetic behind `merge`.

`LayerMerge(base, [Weighted(state, 0.8, "cats")]).tensor("single_blocks.0.linear1.weight")`
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fluxsmith.adapters.base import Adapter
from fluxsmith.adapters.formats.kinds import ADDITIVE
from fluxsmith.adapters.formats.state import AdapterState, LayerState
from fluxsmith.adapters.load import WIDENED, from_state
from fluxsmith.errors import ModelFileError
from fluxsmith.models.linear import Linear
from fluxsmith.tools.model_file import ModelFile

INPUTS_AT_ONCE = 1024


class Weighted(NamedTuple):
    """An adapter at a strength; `name` is for messages."""

    state: AdapterState
    strength: float
    name: str


class LayerMerge:
    """`changed` holds the layer paths and parameters of the adapters that the model has. Raises ModelFileError for other sizes."""

    def __init__(self, file: ModelFile, adapters: Sequence[Weighted], device: str = "cpu") -> None:
        self.file, self.device = file, device
        self.layers: dict[str, list[tuple[Weighted, LayerState]]] = {}
        self.replaced: dict[str, Tensor] = {}
        self.changed: set[str] = set()
        prefix = f"{file.role}."
        for item in adapters:
            for path, layer in item.state.layers.items():
                name = path.removeprefix(prefix)
                if path.startswith(prefix) and f"{name}.weight" in file.shapes:
                    self.layers.setdefault(name, []).append((item, layer))
                    self.changed.add(path)
            for path, value in item.state.replaced.items():
                self._replace(path, value, item)
        for name in self.layers:
            self._check(name)

    def _replace(self, path: str, value: Tensor, item: Weighted) -> None:
        key = path.removeprefix(f"{self.file.role}.")
        if path.startswith(f"{self.file.role}.") and key in self.file.shapes:
            if tuple(value.shape) != self.file.shapes[key]:
                raise ModelFileError(
                    f"{path} is {tuple(value.shape)} in the adapter, {self.file.shapes[key]} in the model", where=item.name
                )
            self.replaced[key] = value
            self.changed.add(path)

    def _check(self, name: str) -> None:
        """Sizes and biases before anything is written."""
        rows, inputs = self.shape(f"{name}.weight")
        for item, layer in self.layers[name]:
            fits = layer.in_features in (None, inputs) and layer.out_features in (None, rows)
            if not fits or max(part.stop for part in layer.parts) > rows:
                why = f"{layer.out_features or '?'} x {layer.in_features or '?'} against {rows} x {inputs}"
                what = f"the adapter is for a model of another size at {self.file.role}.{name}"
                raise ModelFileError(what, where=item.name, why=why, fix="use it with its own base model")
            if any("bias" in part.tensors for part in layer.parts) and f"{name}.bias" not in self.file.shapes:
                raise ModelFileError(f"the adapter changes the bias of {name}, which has none", where=item.name, fix="attach it instead")

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a merged tensor: a control LoRA gives img_in more inputs."""
        shape = self.file.shapes[key]
        name = key.removesuffix(".weight")
        if f"{self.file.role}.{name}" == WIDENED and key != name:
            wider = [layer.in_features or 0 for item, layer in self.layers.get(name, ()) if item.state.format == "bfl_control"]
            return (shape[0], max(shape[1], *wider)) if wider else shape
        return shape

    def stored_shape(self, key: str, name: str) -> tuple[int, ...]:
        """The same of one stored tensor of a fused layer."""
        own = self.file.weights.infos[name].shape
        return (own[0], *self.shape(key)[1:]) if len(own) == 2 and len(self.file.shapes[key]) == 2 else own

    @torch.no_grad()
    def tensor(self, key: str) -> Tensor:
        """A tensor of the merged model; unchanged ones as stored, changed ones in fp32."""
        if key in self.replaced:
            return self.replaced[key]
        name, _, leaf = key.rpartition(".")
        if name not in self.layers or leaf not in ("weight", "bias"):
            return self.file.read(key)
        if leaf == "bias":
            return self._bias(name)
        weight = self.file.read(key, device=self.device).float()
        rows, inputs = self.shape(key)
        if inputs > weight.shape[1]:
            weight = torch.cat((weight, weight.new_zeros(rows, inputs - weight.shape[1])), dim=1)
        return self._weight(name, weight)

    def _bias(self, name: str) -> Tensor:
        stored = self.file.read(f"{name}.bias")
        changes = [(part, item.strength) for item, layer in self.layers[name] for part in layer.parts if "bias" in part.tensors]
        if not changes:
            return stored
        bias = stored.float()
        for part, strength in changes:
            bias[part.start : part.stop] += strength * part.tensors["bias"].float()
        return bias

    def _weight(self, name: str, weight: Tensor) -> Tensor:
        return merged_weight(f"{self.file.role}.{name}", self.layers[name], weight)


@torch.no_grad()
def merged_weight(path: str, shares: Sequence[tuple[Weighted, LayerState]], weight: Tensor) -> Tensor:
    """The weight that a layer has with these adapters attached in this order; `weight` (out, in), fp32, is used up."""
    if all(part.is_plain_lora and part.rows for _, layer in shares for part in layer.parts):
        for item, layer in shares:
            for part in layer.parts:
                up, down = part.up.to(weight), part.down.to(weight)
                weight[part.start : part.stop].addmm_(up, down, alpha=part.scale * item.strength)
        return weight
    base = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    made = [_adapter(path, item, layer, base) for item, layer in shares]
    if all(adds_only(layer) for _, layer in shares[1:]):  # what the others add does not depend on the weight
        deltas = [adapter.delta(weight) for adapter in made]
        return sum(deltas[1:], weight + deltas[0])
    return through(made, weight)


def _adapter(path: str, item: Weighted, layer: LayerState, base: Linear) -> Adapter:
    adapter = from_state(AdapterState({path: layer}, format=item.state.format), {path: base}).adapters[path]
    adapter.eval()
    adapter.strength.fill_(item.strength)
    return adapter


def adds_only(layer: LayerState) -> bool:
    """Does it add the same matrix to any weight?"""
    return all(part.kind in (*ADDITIVE, "full") and "magnitude" not in part.tensors for part in layer.parts)


def through(adapters: Sequence[Adapter], weight: Tensor) -> Tensor:
    """The weight that a layer has with adapters attached in this order: what they make of the unit vectors, some inputs at a time."""
    columns = []
    for start in range(0, weight.shape[1], INPUTS_AT_ONCE):
        stop = min(start + INPUTS_AT_ONCE, weight.shape[1])
        x = torch.zeros(stop - start, weight.shape[1], device=weight.device)
        x[:, start:stop] = torch.eye(stop - start, device=weight.device)
        y = weight[:, start:stop].T
        for adapter in adapters:
            y = adapter(x, y)
        columns.append(y.T)
    return torch.cat(columns, dim=1)
