"""What is dispatched, counted: operations that compute, memory traffic beside products, waits for the device, bytes over the bus."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_int_mm", "_scaled_mm")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # the host reads a value
COPIES = ("copy_", "_to_copy")


class Counters(TorchDispatchMode):
    """Counts what is dispatched below autograd; repeats exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.bytes = 0
        """Read and written by everything but matrix products and attention."""
        self.waits = 0
        self.bus_bytes = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # the hook's own signature
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        self.waits += name in WAITS
        if name in COPIES and len({tensor.device.type for tensor in given + made}) > 1:
            self.bus_bytes += sum(tensor.numel() * tensor.element_size() for tensor in made)
        if not is_view(func, given, made):
            self.kernels += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
            if name not in PRODUCTS and "scaled_dot_product" not in name:
                self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in given + made)
        return result


def is_view(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """True if nothing is computed: every result shares memory with an argument, and none is written to."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return bool(made) and all(tensor.untyped_storage()._cdata in storages for tensor in made)
