"""Streams that wait on the host between forward and backward: pinned buffers used again and again, copies beside the computing.

On a card a stream goes out on a copy stream of its own and comes back ordered by events; the host waits for nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Buffer:
    """Host memory, and on a card the event after which it may be read or written."""

    def __init__(self, like: Tensor) -> None:
        on_card = like.device.type == "cuda"
        self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_card)
        self.done = torch.cuda.Event() if on_card else None


class Parked:
    """A tensor on the host. Its buffer is free again when the graph lets go of it."""

    def __init__(self, buffer: Buffer, device: torch.device, free: list[Buffer]) -> None:
        self.buffer, self.device, self.free = buffer, device, free

    def __del__(self) -> None:
        self.free.append(self.buffer)


class HostRing:
    """Buffers by size, type and device."""

    def __init__(self) -> None:
        self.free: dict[tuple[torch.device, tuple[int, ...], torch.dtype], list[Buffer]] = {}
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.sent = self.fetched = self.buffers = 0  # for tests and logs

    def keeper(self, *wanted: Tensor) -> Callable[[Tensor], Tensor | Parked]:
        """A pack hook that parks these tensors, and leaves others where they are."""
        places = {(t.data_ptr(), tuple(t.shape), t.stride()) for t in wanted}

        def keep(tensor: Tensor) -> Tensor | Parked:
            is_wanted = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) in places
            return self.park(tensor.detach()) if is_wanted else tensor

        return keep

    def park(self, tensor: Tensor) -> Parked:
        """Send a tensor to the host."""
        self.sent += 1
        pool = self.free.setdefault((tensor.device, tuple(tensor.shape), tensor.dtype), [])
        self.buffers += not pool
        buffer = pool.pop() if pool else Buffer(tensor)
        if buffer.done is None:
            buffer.host.copy_(tensor)
        else:
            side = self._stream(tensor.device)
            side.wait_event(buffer.done)  # the fetch of its last content
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(side):
                buffer.host.copy_(tensor, non_blocking=True)
                buffer.done.record(side)
            tensor.record_stream(side)
        return Parked(buffer, tensor.device, pool)

    def fetch(self, parked: Tensor | Parked) -> Tensor:
        """An unpack hook: the tensor on its device again."""
        if isinstance(parked, Tensor):
            return parked
        self.fetched += 1
        buffer = parked.buffer
        stream = None if buffer.done is None else torch.cuda.current_stream(parked.device)
        if stream is not None and buffer.done is not None:
            stream.wait_event(buffer.done)
        made = torch.empty_like(buffer.host, device=parked.device)
        made.copy_(buffer.host, non_blocking=True)
        if stream is not None and buffer.done is not None:
            buffer.done.record(stream)
        return made

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]
