"""Changes of the base models that last while a control LoRA is attached: whole parameters replaced, a layer given more inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.models.linear import Linear


@dataclass
class Swaps:
    """`replaced`: parameter path (`dit.single_blocks.0.norm.key_norm.scale`) -> value. `widened`: layer path -> inputs."""

    replaced: dict[str, Tensor]
    widened: dict[str, int]
    saved: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    narrow: list[tuple[Linear, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def put(self, bases: Mapping[str, Linear], models: Mapping[str, nn.Module] | None) -> None:
        """Make the changes. Raises ModelFileError for a parameter that the model lacks or has in another size."""
        for path, inputs in self.widened.items():
            base = bases[path]
            self.narrow.append((base, base.weight))
            added = base.weight.new_zeros(base.out_features, inputs - base.in_features)
            base.weight = nn.Parameter(torch.cat((base.weight, added), dim=1), requires_grad=False)
            base.in_features = inputs
        for path, value in self.replaced.items():
            param = self._parameter(path, models or {})
            if param.shape != value.shape:
                raise ModelFileError(f"{path} is {tuple(value.shape)} in the adapter file, {tuple(param.shape)} in the model")
            self.saved.append((param, param.detach().clone()))
            param.copy_(value)

    @staticmethod
    def _parameter(path: str, models: Mapping[str, nn.Module]) -> nn.Parameter:
        role, _, name = path.partition(".")
        try:
            return models[role].get_parameter(name)
        except (KeyError, AttributeError):
            raise ModelFileError(f"the adapter file replaces {path}, which the model does not have") from None

    @torch.no_grad()
    def undo(self) -> None:
        """Take the changes back."""
        for param, before in self.saved:
            param.copy_(before)
        for base, weight in self.narrow:
            base.weight, base.in_features = weight, weight.shape[1]  # type: ignore[assignment]  # the very parameter
        self.keep()

    def keep(self) -> None:
        """Make the changes last."""
        self.saved.clear()
        self.narrow.clear()
