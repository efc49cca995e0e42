"""What a run trains: named tensors in learning-rate groups, whether they are adapters or parts of the model itself.

Names are stable across versions and machines (`dit.double_blocks.0.img_attn.qkv.weight`): checkpoints are keyed by them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.config.choice import realise
from fluxsmith.config.section import PluginConfig
from fluxsmith.models.assembly import Models
from fluxsmith.models.text_encoders import CLIP_ROOT, ClipText
from fluxsmith.optim.groups import Group
from fluxsmith.train.placement import Placement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """Trained tensors by name, their groups, and the modules that are switched to train mode."""

    params: Mapping[str, nn.Parameter]
    groups: tuple[Group, ...]
    modules: tuple[nn.Module, ...] = field(default=(), repr=False)
    adapters: AdapterSet | None = field(default=None, repr=False)
    placement: Placement = field(default_factory=Placement, repr=False)

    def train_mode(self, on: bool) -> None:
        """Dropout of what is trained on or off; the frozen base always stays in eval mode."""
        for module in self.modules:
            module.train(on)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for param in self.params.values():
            param.grad = None
        self.placement.clear()

    def elsewhere(self, params: Mapping[str, nn.Parameter], placement: Placement) -> "Trained":
        """The same with other tensors in the place of those of these names."""
        new = {id(self.params[name]): param for name, param in params.items()}
        groups = tuple(group._replace(params=tuple(new.get(id(param), param) for param in group.params)) for group in self.groups)
        return replace(self, params={**self.params, **params}, groups=groups, placement=placement)


def file_key(role: str, module: nn.Module, key: str) -> str:
    """A parameter's key in this role's file: `text_model.` is CLIP's root there but not in memory."""
    if isinstance(module, ClipText):
        return CLIP_ROOT + key.removeprefix("model.")
    return key.removeprefix("model.") if role == "t5xxl" else key


def train_modules(modules: Mapping[str, nn.Module], dtype: torch.dtype) -> Trained:
    """Train whole parts (role -> module): every parameter of each, in `dtype`."""
    params: dict[str, nn.Parameter] = {}
    groups = []
    for role, module in modules.items():
        named = {f"{role}.{file_key(role, module, key)}": param for key, param in module.named_parameters()}
        for param in named.values():
            param.data = param.data.to(dtype)
            param.requires_grad_(True)
        params.update(named)
        groups.append(Group(role, tuple(named.values())))
    return Trained(params, tuple(groups), tuple(modules.values()))


def train_adapter(models: Models, config: PluginConfig, *, seed: int, dtype: torch.dtype) -> Trained:
    """Train an adapter beside the frozen parts; raises ConfigError for targets that hit nothing."""
    adapters: AdapterSet = realise(config).build(models.loaded(), seed=seed, dtype=dtype)
    groups = tuple(Group(group.name, group.params, group.lr, group.lr_factor) for group in adapters.groups)
    return Trained(adapters.params, groups, adapters.modules, adapters)
