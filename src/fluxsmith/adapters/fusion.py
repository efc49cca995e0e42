"""LoRA fusion (DiffSynth-Studio's LoRAFusion): several LoRAs are weighed against the base and against each other, channel by channel.

b is a layer's output, l_k what LoRA k adds: g_k = sigmoid(N(b) w_base + N'(l_k) w_lora + N(b) N'(l_k) w_cross + bias), and the
layer gives b + sum_k w_out g_k l_k. `fusion = load_fusion(path); fusion.attach(pipeline.loras)`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxsmith.adapters.additive import Additive
from fluxsmith.adapters.base import Adapter, AdapterSet
from fluxsmith.adapters.rows import LayerAdapter, part_modules
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.keymaps import MAPS
from fluxsmith.models.fill import check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import opened

SLOT = "fusion"
PREFIX, SIZE = "model_dict.", ".weight_base"


class Merger(Adapter):
    """Takes the place of one layer's LoRAs, and holds them."""

    weight_base: Tensor
    weight_lora: Tensor
    weight_cross: Tensor
    weight_out: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        self.norm_base, self.norm_lora = nn.LayerNorm(width), nn.LayerNorm(width)
        self.adapters = nn.ModuleDict()
        self.base_ref: tuple[Linear] | tuple[()] = ()

    def bind(self, base: Linear) -> None:
        """As Adapter.bind: the gates look at the layer's output with its bias."""
        self.base_ref = (base,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As Adapter.forward."""
        b = y if not self.base_ref or self.base_ref[0].bias is None else y + self.base_ref[0].bias
        seen = self.norm_base(b)
        made = y
        for adapter in self.adapters.values():
            added = adapter(x, torch.zeros_like(y))
            own = self.norm_lora(added)
            gate = torch.sigmoid(seen * self.weight_base + own * self.weight_lora + seen * own * self.weight_cross + self.bias)
            made = made + self.weight_out * gate * added
        return made


class LoraFusion(nn.Module):
    """A merger for every layer of the blocks."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths`: a layer's name in the file (`blocks___0___attn___a_to_qkv`) -> its outputs."""
        super().__init__()
        self.model_dict = nn.ModuleDict({name: Merger(width) for name, width in widths.items()})
        self.paths = {_path(name): name for name in widths}
        self.held: list[tuple[Linear, dict[str, nn.Module]]] = []

    def attach(self, loras: Sequence[AdapterSet]) -> None:
        """Put the mergers in the place of these LoRAs, which are attached; layers that a LoRA lacks get nothing from it.

        Raises ConfigError for an adapter that does not simply add to a layer, ModelFileError for another model's mergers.
        """
        self.check(loras)
        for path, base in {path: base for lora in loras for path, base in lora.bases.items() if path in self.paths}.items():
            merger = self._merger(path)
            there = {lora.name: base.adapters[lora.name] for lora in loras if lora.name in base.adapters}
            if not there:
                continue
            for name, adapter in there.items():
                del base.adapters[name]
                merger.adapters[name] = adapter
            merger.bind(base)
            base.adapters[SLOT] = merger
            self.held.append((base, there))

    def detach(self) -> None:
        """The LoRAs add up again, as before."""
        while self.held:
            base, adapters = self.held.pop()
            merger = base.adapters[SLOT]
            del base.adapters[SLOT]
            for name, adapter in adapters.items():
                del merger.adapters[name]  # type: ignore[union-attr]  # it is a Merger
                base.adapters[name] = adapter

    def _merger(self, path: str) -> Merger:
        merger = self.model_dict[self.paths[path]]
        if not isinstance(merger, Merger):
            raise TypeError(path)
        return merger

    def check(self, loras: Sequence[AdapterSet]) -> None:
        """Raise what `attach` would; nothing is changed."""
        if not loras:
            raise ConfigError("there are no LoRAs to fuse", fix="load two or more first")
        for number, lora in enumerate(loras, start=1):
            for path, adapter in lora.adapters.items():
                if path not in self.paths:
                    continue
                width = self._merger(path).weight_base.numel()
                if lora.bases[path].out_features != width:
                    why = f"{path} has {lora.bases[path].out_features} outputs, its merger {width}"
                    raise ModelFileError("the LoRA fusion is for a model of another size", why=why, fix="use it with FLUX.1-dev")
                parts = part_modules(lora, path)
                if not isinstance(adapter, LayerAdapter) or any(
                    not isinstance(part, Additive) or part.magnitude is not None for part in parts
                ):
                    kinds = ", ".join(dict.fromkeys("dora" if isinstance(part, Additive) else part.kind for part in parts))
                    why = f"LoRA {number} of {len(loras)} is {kinds or 'of a kind of its own'} at {path}"
                    raise ConfigError("only LoRAs that add to a layer can be fused", why=why, fix="leave it out, or convert it to a LoRA")


def _path(name: str) -> str:
    place = MAPS["diffsynth"].bfl_layer(name.replace("___", "."))
    if place is None:
        raise ModelFileError(f"the LoRA fusion has an unknown layer {name}", fix="get the original file")
    return f"dit.{place.name}"


def fusion_of(shapes: Mapping[str, Sequence[int]]) -> LoraFusion:
    """The mergers that these tensor shapes belong to."""
    names = (key for key in shapes if key.startswith(PREFIX) and key.endswith(SIZE))
    return LoraFusion({key.removeprefix(PREFIX).removesuffix(SIZE): shapes[key][0] for key in names})


def load_fusion(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoraFusion:
    """Read the file, in eval mode. Raises ModelFileError for a wrong, incomplete or broken file."""
    with opened(path, "lora_fusion") as file:
        net = meta(lambda: fusion_of(file.shapes))
        check_keys(shapes_of(net), file.shapes, file.where)
        fill(net, {key: source.read for key, source in file.tensors.items()}, device=device, dtype=dtype)
        finish(net)
    return net.requires_grad_(False)
