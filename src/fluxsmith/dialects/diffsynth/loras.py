"""LoRAs on a pipeline's networks: attached beside the weights (hot) or added to them (fused).

Hot ones are taken off again by `clear`; fused ones stay until the model is loaded anew. A file none of whose layers fit is an error.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet, linear_layers
from fluxsmith.adapters.formats.files import read_open
from fluxsmith.adapters.formats.state import AdapterState
from fluxsmith.adapters.load import from_state
from fluxsmith.dialects.diffsynth.held import InMemory
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.io.safetensors import WeightsFile

LOG = logging.getLogger("fluxsmith.dialects.diffsynth")


class Loras:
    """The hot LoRAs of one pipeline, in the order of loading (`Pipeline.loras`)."""

    def __init__(self, native: Pipeline) -> None:
        self.native = native
        self.count = 0

    @property
    def models(self) -> dict[str, nn.Module]:
        """Role -> network."""
        return self.native.models.loaded()

    def load(self, weights: WeightsFile, role: str, alpha: float, *, hot: bool) -> int:
        """Attach or fuse a LoRA's layers of one role ("" for all); returns how many. Raises ModelFileError for layers without a place."""
        where = str(weights.paths[0])
        state = self._of_role(read_open(weights), role, where)
        self.count += 1
        try:
            made = from_state(state, linear_layers(self.models), name=f"diffsynth{self.count}")
        except ModelFileError as error:
            problem = error.problems[0]
            raise ModelFileError(problem.what, where=where, why=problem.why, fix=problem.fix or "use it with its own base model") from error
        made.scale(alpha)
        made.attach(self.models)
        for adapter in made.modules:
            adapter.requires_grad_(False).eval()
        if hot:
            self.native.add_lora(made)
        else:
            _fuse(made, where)
        LOG.info("%d layers have the LoRA %s", len(state.layers), where)
        return len(state.layers)

    def clear(self) -> int:
        """Take all hot LoRAs off; returns how many layers are free again."""
        count = sum(len(one.adapters) for one in self.native.loras)
        self.native.clear_loras()
        return count

    def _of_role(self, state: AdapterState, role: str, where: str) -> AdapterState:
        prefixes = tuple(f"{name}." for name in ([role] if role else self.models))
        layers = {path: layer for path, layer in state.layers.items() if path.startswith(prefixes)}
        if not layers:
            parts = ", ".join(sorted({path.partition(".")[0] for path in state.layers})) or "none"
            what = f"this LoRA has no layer of the {role or 'loaded models'}"
            raise ModelFileError(what, where=where, why=f"its layers are of: {parts}", fix="load it on the network it was trained on")
        left = len(state.layers) - len(layers)
        if left:
            LOG.warning("%s: %d layers of other networks are left out; load it on `pipe` to use all of them", where, left)
        return replace(state, layers=layers)


def _fuse(made: AdapterSet, where: str) -> None:
    try:
        if any(base.weight.is_meta for base in made.bases.values()):
            raise ValueError("they visit the device layer by layer, and are not there now")
        made.merge()
    except ValueError as error:
        made.detach()
        fix = "pass hotload=True, which keeps the LoRA beside the weights"
        raise ConfigError("a LoRA cannot be fused into these weights", where=where, why=str(error), fix=fix) from error


def in_memory(state_dict: Mapping[str, Tensor]) -> InMemory:
    """A LoRA that a script has loaded itself."""
    return InMemory(
        {name: tensor.detach() if isinstance(tensor, torch.Tensor) else torch.tensor(tensor) for name, tensor in state_dict.items()}
    )
