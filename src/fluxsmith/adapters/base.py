"""The contract of an adapter (seam 5), and the set of adapters that is attached to the layers of the loaded models.

`adapters = AdapterSet(bases, adapters_by_path); adapters.attach()`; then every forward of the models includes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fluxsmith.adapters.formats.state import AdapterState, LayerState
from fluxsmith.adapters.swaps import Swaps
from fluxsmith.adapters.targets import Layer, clip_layers, t5_layers
from fluxsmith.errors import ModelFileError, NumericError
from fluxsmith.models.linear import Factors, Linear

CLIP_ROOT = "text_model."


class LrGroup(NamedTuple):
    """Trained tensors with one rate: `lr` None is the run's rate, `lr_factor` multiplies it. Names are stable."""

    name: str
    params: tuple[nn.Parameter, ...]
    lr: float | None = None
    lr_factor: float = 1.0


class Adapter(nn.Module):
    """What sits in a Linear's slot. A method overrides `forward`, `delta`, `tensors`, `state` and `load`; `rows.LayerAdapter` does."""

    def __init__(self) -> None:
        super().__init__()
        # A 0-dim tensor, so that changing it compiles nothing anew; no buffer, so that a cast of the model does not round it.
        self.strength = torch.ones((), dtype=torch.float64)
        self.is_enabled = True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Layer input x (..., in) and output so far y (..., out) -> y with the adapter."""
        raise NotImplementedError

    def factors(self) -> Factors | None:
        """down (rank, in), up (out, rank) and their scale, if x -> scale up(down(x)) is all that is added now; None otherwise.

        The layer then multiplies in one autograd function, without calling `forward`.
        """
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight` (out, in), float32, at the current strength."""
        raise NotImplementedError

    def bias_delta(self) -> Tensor | None:
        """What merging adds to the bias (out,), float32; None for nothing."""
        return None

    def bind(self, base: Linear) -> None:
        """Told once which layer it is for."""

    def after_backward(self) -> None:
        """Called when the gradients of a whole step are there, before the optimizer takes them."""

    def after_step(self, max_norm: float | None) -> dict[str, float]:
        """Called after the optimizer's step: keeps the norm of what it adds below a limit; returns figures of this layer for logs."""
        return {}

    def extra(self) -> dict[str, Tensor]:
        """What an exact resume needs beside the tensors, by short names."""
        return {}

    def load_extra(self, values: Mapping[str, Tensor]) -> None:
        """Take it back."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Trained tensors by short names that never change (`down`, `up`, `q.down`)."""
        raise NotImplementedError

    def state(self, values: Mapping[str, Tensor]) -> LayerState:
        """What goes into a file, with `values` (by the names of `tensors`) in place of the parameters."""
        raise NotImplementedError

    def load(self, state: LayerState) -> None:
        """Take the factors of a file. Raises ModelFileError if they do not fit."""
        raise NotImplementedError


class AdapterSet:
    """Adapters by layer path, on their base layers. `params` and `groups` are what a trainer needs."""

    def __init__(
        self,
        bases: Mapping[str, Linear],
        adapters: Mapping[str, Adapter],
        *,
        name: str = "adapter",
        replaced: Mapping[str, Tensor] | None = None,
        widened: Mapping[str, int] | None = None,
    ) -> None:
        """`name` is the slot; several sets with different names add up in the order of attaching.

        `replaced`: whole parameters put in place of the models' while attached. `widened`: inputs that a layer needs to have (the
        base's weight gets zero columns while attached).
        """
        self.name = name
        self.adapters = dict(adapters)
        self.bases = {path: bases[path] for path in adapters}
        for path, adapter in self.adapters.items():
            adapter.bind(self.bases[path])
        self.params: dict[str, nn.Parameter] = {
            f"{path}.{short}": param for path, adapter in self.adapters.items() for short, param in adapter.tensors().items()
        }
        self.groups: tuple[LrGroup, ...] = ()
        self.max_norm: float | None = None
        self.swaps = Swaps(dict(replaced or {}), dict(widened or {}))

    @property
    def modules(self) -> tuple[Adapter, ...]:
        """The adapters, for train and eval mode."""
        return tuple(self.adapters.values())

    def attach(self, models: Mapping[str, nn.Module] | None = None) -> None:
        """Put every adapter into its layer's slot. Raises ValueError if the slot's name is taken.

        `models` are needed by files that replace whole parameters.
        """
        for path, adapter in self.adapters.items():
            slot = self.bases[path].adapters
            if self.name in slot:
                raise ValueError(f"{path} already has an adapter called {self.name}")
            slot[self.name] = adapter
        self.swaps.put(self.bases, models)

    def detach(self) -> None:
        """Take the adapters out again; the models are as before."""
        for path in self.adapters:
            if self.name in self.bases[path].adapters:
                del self.bases[path].adapters[self.name]
        self.swaps.undo()

    def scale(self, strength: float) -> None:
        """Multiply what the adapters do; 1 is as trained, 0 is the base."""
        for adapter in self.modules:
            adapter.strength.fill_(strength)

    def enable(self, on: bool = True) -> None:
        """Switch the adapters off or on without detaching them."""
        for adapter in self.modules:
            adapter.is_enabled = on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base models alone, for a while."""
        before = [adapter.is_enabled for adapter in self.modules]
        self.enable(False)
        try:
            yield
        finally:
            for adapter, was in zip(self.modules, before, strict=True):
                adapter.is_enabled = was

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the base weights (computed in float32) and detach them.

        Raises ValueError on a quantised layer, and on one whose weights wait elsewhere; nothing is changed then. Replaced parameters and
        widened inputs stay.
        """
        for path in self.adapters:
            weight = self.bases[path].weight
            if not weight.is_floating_point() or weight.dtype.itemsize == 1:
                raise ValueError(f"{path} is quantised: merge into the full weights instead")
            if weight.device.type == "meta":
                raise ValueError(f"the weights of {path} wait on the host: merge before blocks are streamed")
        for path, adapter in self.adapters.items():
            weight = self.bases[path].weight
            weight.copy_((weight.float() + adapter.delta(weight.float())).to(weight.dtype))
            bias, base = adapter.bias_delta(), self.bases[path]
            if bias is not None and base.bias is None:
                base.bias = nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)
            elif bias is not None:
                base.bias.copy_((base.bias.float() + bias.to(weight.device)).to(base.bias.dtype))
        self.swaps.keep()
        self.detach()

    def after_backward(self) -> None:
        """To be called when the gradients of a whole step are there (synchronised), before the optimizer's step."""
        for adapter in self.modules:
            adapter.after_backward()

    def after_step(self) -> dict[str, float]:
        """To be called after the optimizer's step: limits norms where `max_norm` is set.

        Returns figures for logs, empty if nothing is on: `keys_scaled` (layers), `max_key_norm`, `avg_key_norm`, `avg_grad_norm`,
        `avg_combined_norm`.
        """
        found = [figures for adapter in self.modules if (figures := adapter.after_step(self.max_norm))]
        totals: dict[str, list[float]] = {}
        for figures in found:
            for key, value in figures.items():
                totals.setdefault(key, []).append(value)
        made = {f"avg_{key}": sum(values) / len(values) for key, values in totals.items() if key != "scaled"}
        if "key_norm" in totals:
            made["max_key_norm"] = max(totals["key_norm"])
        if "scaled" in totals:
            made["keys_scaled"] = sum(totals["scaled"])
        return made

    def extra(self) -> dict[str, Tensor]:
        """What an exact resume needs beside `params` (GGPO's gradient norms); empty for most adapters."""
        return {f"{path}.{short}": value for path, adapter in self.adapters.items() for short, value in adapter.extra().items()}

    def load_extra(self, values: Mapping[str, Tensor]) -> None:
        """Take back what `extra` gave; to be called after the parameters are loaded."""
        for path, adapter in self.adapters.items():
            own = {key.removeprefix(f"{path}."): value for key, value in values.items() if key.startswith(f"{path}.")}
            adapter.load_extra(own)

    def state(self, values: Mapping[str, Tensor] | None = None) -> AdapterState:
        """The content of a weights file; `values` (named as `params`) replace the parameters, for an average of them.

        Raises NumericError if a tensor is not finite: such a file is never written.
        """
        values = values or self.params
        bad = [name for name, tensor in values.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise NumericError(f"{len(bad)} tensors of the adapter are not finite, e.g. {bad[0]}", fix="lower the learning rate")
        layers = {}
        for path, adapter in self.adapters.items():
            own = {short: values[f"{path}.{short}"].detach() for short in adapter.tensors()}
            layers[path] = adapter.state(own)
        return AdapterState(layers)

    def load(self, state: AdapterState) -> None:
        """Take a file's factors; layers that the file lacks keep theirs. Raises ModelFileError for layers that are not adapted."""
        unknown = [path for path in state.layers if path not in self.adapters]
        if unknown:
            raise unknown_layers(unknown, "the adapter's targets leave them out: widen adapter.targets")
        for path, layer in state.layers.items():
            try:
                self.adapters[path].load(layer)
            except ModelFileError as error:
                problem = error.problems[0]
                raise ModelFileError(f"{path}: {problem.what}", why=problem.why, fix=problem.fix) from error

    def group_by(self, key: Callable[[str, str], tuple[str, float | None, float]]) -> None:
        """Make learning-rate groups: `key(path, short)` gives a group's name, rate and factor."""
        members: dict[tuple[str, float | None, float], list[nn.Parameter]] = {}
        for path, adapter in self.adapters.items():
            for short, param in adapter.tensors().items():
                members.setdefault(key(path, short), []).append(param)
        self.groups = tuple(LrGroup(name, tuple(params), lr, factor) for (name, lr, factor), params in members.items())


def linear_layers(models: Mapping[str, nn.Module]) -> dict[str, Linear]:
    """Layer path -> Linear for every adaptable layer of the loaded models (`dit`, `clip_l`, `t5xxl`).

    The transformer's paths are its own names; those of text encoders come from a fixed table of file names, because their
    names in memory depend on the version of transformers.
    """
    found: dict[str, Linear] = {}
    if "dit" in models:
        named = models["dit"].named_modules()
        found |= {f"dit.{name}": module for name, module in named if isinstance(module, Linear) and ".adapters." not in name}
    for role, table in (("clip_l", clip_layers), ("t5xxl", t5_layers)):
        if role in models:
            memory = {name: module for name, module in models[role].named_modules() if isinstance(module, Linear)}
            for path in table(_depth(memory)):
                found[path] = _text_layer(memory, path)
    return found


def _depth(memory: Mapping[str, Linear]) -> int:
    """Number of transformer layers: one more than the highest number after `layers.` or `block.`."""
    numbers = [
        int(tail.split(".", 1)[0]) for name in memory for marker in ("layers.", "encoder.block.") if (tail := name.partition(marker)[2])
    ]
    return max(numbers, default=-1) + 1


def _text_layer(memory: Mapping[str, Linear], path: str) -> Linear:
    bare = path.split(".", 1)[1].removeprefix(CLIP_ROOT)
    for name in (f"model.{bare}", f"model.{CLIP_ROOT}{bare}", bare, f"{CLIP_ROOT}{bare}"):
        if name in memory:
            return memory[name]
    raise ModelFileError(f"the text encoder has no layer {path}")


def layers_of(bases: Mapping[str, Linear]) -> list[Layer]:
    """The same layers with their sizes, for `targets.select`."""
    return [Layer(path, base.in_features, base.out_features) for path, base in bases.items()]


def unknown_layers(paths: list[str], why: str) -> ModelFileError:
    """The error for layers of a file that have no place."""
    shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return ModelFileError(f"the adapter file has layers that have no place: {shown}", why=why)
