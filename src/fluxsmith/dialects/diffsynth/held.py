"""A network of the pipeline as scripts hold it (`pipe.dit`), and weights in memory read like a file.

`pipe.dit.load_state_dict(load_state_dict("epoch-4.safetensors"))` takes the names of BFL, diffusers or DiffSynth-Studio.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxsmith.io.canonical import canonical
from fluxsmith.io.header import TensorInfo
from fluxsmith.io.identify import check_role, identify
from fluxsmith.io.safetensors import STORED_NAMES, WeightsFile, open_weights
from fluxsmith.models.fill import check_keys, shapes_of

NAMED_AS_FILES = ("dit", "controlnet", "ae")  # roles whose names in memory are those of their files


class InMemory(WeightsFile):
    """Tensors of a dict, as one weights file."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "state_dict") -> None:
        self.tensors = dict(tensors)
        self.paths = (Path(name),)
        self.headers = ()
        self.metadata = {}
        self._fds = {}
        self.infos = {key: TensorInfo(STORED_NAMES[one.dtype], tuple(one.shape), 0, one.nbytes) for key, one in self.tensors.items()}

    def tensor(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As WeightsFile.tensor."""
        found = self.tensors[name]
        return found.to(device=device, dtype=dtype or found.dtype)

    def dtype(self, name: str) -> torch.dtype:
        """As WeightsFile.dtype."""
        return self.tensors[name].dtype


class Held:
    """One network with its role; everything else that is asked of it is asked of the module."""

    def __init__(self, role: str, module: nn.Module) -> None:
        self.role = role
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Put other weights in place of the network's, in its own type and where they are. `strict` False leaves missing ones as they are.

        Raises ModelFileError for weights of another role, unknown names and other shapes.
        """
        if self.role not in NAMED_AS_FILES:
            self.module.load_state_dict(state_dict, strict=strict)
            return
        given = InMemory(state_dict)
        identity = identify(given)
        sources = canonical(given, check_role(identity, self.role, where="state_dict") if strict else identity, self.role)
        own = {name: parameter for name, parameter in self.module.named_parameters() if ".adapters." not in name}
        expected = shapes_of(self.module)
        found = {key: source.shape for key, source in sources.items()}
        check_keys(expected if strict else {key: shape for key, shape in expected.items() if key in found}, found, "state_dict")
        for key, source in sources.items():
            own[key].copy_(source.read())

    def __repr__(self) -> str:
        return f"Held({self.role}, {type(self.module).__name__})"


class HeldSeveral:
    """Networks of one kind: `pipe.controlnet.models[1]`, `pipe.value_controller.encoders[0]`."""

    def __init__(self, held: list[Held]) -> None:
        self.models = held
        self.encoders = held

    def __len__(self) -> int:
        return len(self.models)


def load_state_dict(
    path: str | Path | list[str | Path], torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, of its shards, or of a list of files. Raises ModelFileError."""
    made: dict[str, Tensor] = {}
    for one in path if isinstance(path, list) else [path]:
        with open_weights(one) as weights:
            made |= {name: weights.tensor(name, dtype=_type_of(weights, name, torch_dtype), device=device) for name in weights}
    return made


def _type_of(weights: WeightsFile, name: str, wanted: torch.dtype | None) -> torch.dtype:
    stored = weights.dtype(name)
    return wanted if wanted is not None and stored.is_floating_point else stored
