"""Bytes of tensors that live, counted operation by operation: exact and repeatable where a process's memory is neither.

`with LiveBytes() as live: step()`; then `live.peak["cpu"]`. Works on fake tensors too, which is how a plan measures a block that has
no memory. Memory that a kernel takes and gives back inside one operation is not seen.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that come into being under it, by device type, until they are let go."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors whose storages are there already and are not counted."""
        super().__init__()
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._watch(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # the hook's own signature
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._watch(leaf, counted=False)  # what comes from outside was there before
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf, counted=True)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was made before, as if it were new."""
        self._watch(tensor, counted=True)

    def mark(self) -> dict[str, int]:
        """Peaks since the last mark (or the beginning); counting goes on from what lives now."""
        peaks, self.peak = self.peak, dict(self.now)
        return peaks

    def _watch(self, tensor: Tensor, *, counted: bool) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        place, size = tensor.device.type, storage.nbytes() if counted else 0

        def gone(_: object) -> None:
            self._seen.pop(key, None)
            self.now[place] -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now[place] = self.now.get(place, 0) + size
        self.peak[place] = max(self.peak.get(place, 0), self.now[place])
