"""One transformer over several cards (FSDP2): each has a share of the rows of every tensor, blocks are whole only while they compute.

The optimizer sees plain tensors, the local shares, in the memory of torch's DTensors. What is small beside the transformer (adapters,
text encoders) stays whole on each card, its gradients are averaged.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from fluxsmith.config.distributed import DistributedConfig
from fluxsmith.memory.masters import ADAPTERS
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation
from fluxsmith.train.distributed import World
from fluxsmith.train.placement import Placement, Span
from fluxsmith.train.trained import Trained

Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # name -> local share as the optimizer sees it, the model's DTensor


class Sharding(Placement):
    """The shares of one process."""

    is_shared = True

    def __init__(self, world: World, mesh: DeviceMesh, dit: FluxDiT, tensors: Mapping[str, nn.Parameter]) -> None:
        """`tensors`: the trained ones among the transformer's (sharded) tensors, by their names in `Trained.params`."""
        self.world = world
        self.mesh = mesh
        self.units = [module for module in dit.modules() if isinstance(module, FSDPModule)]
        self.pairs: Pairs = {name: (nn.Parameter(_local(param)), param) for name, param in tensors.items()}
        self.spans = {name: _span(param, mesh) for name, param in tensors.items()}

    def clear(self) -> None:
        """As Placement.clear."""
        for _, param in self.pairs.values():
            param.grad = None

    def collect(self) -> None:
        """The shares of gradients, which torch has averaged over the processes already."""
        self._follow()
        for share, param in self.pairs.values():
            share.grad = None if param.grad is None else _local(param.grad)

    def publish(self) -> None:
        """Tensors that are whole at the moment are old: let them go."""
        self._follow()
        for unit in self.units:
            unit.reshard()

    def _follow(self) -> None:
        """torch may move its shares (when it pads or pins them): the optimizer's tensors lie in the same memory again."""
        for share, param in self.pairs.values():
            share.data = _local(param)

    def norm(self, params: Mapping[str, nn.Parameter]) -> Tensor:
        """As Placement.norm: squares of shares are added up over the processes, whole tensors count once."""
        shares = [param.grad for name, param in params.items() if name in self.spans and param.grad is not None]
        others = [param.grad for name, param in params.items() if name not in self.spans and param.grad is not None]
        squares = self.world.total(torch.nn.utils.get_total_norm(shares).to(self.world.device).double() ** 2)
        return (squares + torch.nn.utils.get_total_norm(others).to(squares) ** 2).sqrt()

    def whole(self, name: str, value: Tensor) -> Tensor:
        """As Placement.whole; on the host."""
        if name not in self.spans:
            return value
        shape = torch.Size(self.spans[name].shape)
        stride = torch.empty(shape, device="meta").stride()
        share = DTensor.from_local(value.to(self.world.device), self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return share.full_tensor().cpu()


def _local(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        raise TypeError("the tensor is not sharded")
    return DTensor.to_local(tensor.detach())  # type: ignore[arg-type]  # tested above


def _span(param: Tensor, mesh: DeviceMesh) -> Span:
    """Rows are dealt out as torch.chunk does it."""
    rows, height = param.shape[0], -(-param.shape[0] // mesh.size())
    start = min(rows, mesh.get_local_rank() * height)
    return Span(start, min(rows, start + height), tuple(param.shape))


def shard(trained: Trained, dit: FluxDiT, config: DistributedConfig, world: World) -> Trained:
    """Deal the transformer out over the processes; returns what is trained, with shares in the place of its tensors."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    before = {id(param): name for name, param in dit.named_parameters()}
    adapters = {param for name, param in dit.named_parameters() if ADAPTERS in f".{name}"}
    for param in adapters:
        param.data = param.data.to(world.device)
    _deal(dit, mesh, config, adapters)
    after = dict(dit.named_parameters())
    held = {name: after[before[id(param)]] for name, param in trained.params.items() if id(param) in before and param not in adapters}
    placement = Sharding(world, mesh, dit, held)
    return trained.elsewhere({name: share for name, (share, _) in placement.pairs.items()}, placement)


def _deal(dit: FluxDiT, mesh: DeviceMesh, config: DistributedConfig, whole: set[nn.Parameter]) -> None:
    """One unit a block, one a modulation (they are called apart), one for the rest; `whole` stay as they are."""
    # It says this of every view that a unit returns; nothing here changes a unit's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": config.shard == "full",
        "mp_policy": precision_policy(config),
        "ignored_params": whole,
    }
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in dit.blocks:
        for module in block.modules():
            if isinstance(module, Modulation):
                fully_shard(module, **options)
        fully_shard(block, **options)
    fully_shard(dit, **options)


def precision_policy(config: DistributedConfig) -> MixedPrecisionPolicy:
    """Types in which weights and gradients travel; inputs are left to autocast."""
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.gather == "bf16" else None,
        reduce_dtype=torch.float32 if config.reduce == "fp32" else None,
        cast_forward_inputs=False,
    )
