"""Times, memory and counts of something that is done again and again: a training step, a drawing step, a kernel.

On a card every time ends with a wait for the device; memory is the allocator's. On the CPU memory is what `LiveBytes` counts in one
more step, on top of what is there all the time.
"""

import math
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fluxsmith.bench.counting import Counters
from fluxsmith.memory.live import LiveBytes


def synchronise(device: torch.device) -> None:
    """Wait for everything that was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what came out."""
    synchronise(device)
    begun = time.perf_counter()
    made = work()
    synchronise(device)
    return time.perf_counter() - begun, made


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, and the value that nine of ten stay below."""
    ordered = sorted(seconds)
    return {"median_s": statistics.median(ordered), "p90_s": ordered[math.ceil(0.9 * len(ordered)) - 1], "repeats": len(ordered)}


def begin_memory(device: torch.device) -> None:
    """Peaks are counted from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, int]:
    """Peaks on a card; on the CPU the most that the process has held."""
    if device.type == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def counted(work: Callable[[], Any], device: torch.device, *, static: dict[str, int] | None = None) -> dict[str, Any]:
    """What one more call costs in counts: operations, waits of the host, bytes over the bus, and on the CPU the peak of its tensors.

    The bus is counted where there is one. On a card waits are also taken from CUDA's own warnings, and launches from the profiler.
    """
    counters, live = Counters(), LiveBytes()
    with counters, live:
        work()
    found: dict[str, Any] = {"operations": counters.kernels, "traffic_mb": round(counters.bytes / 1e6, 1), "waits": counters.waits}
    if device.type == "cuda":
        found |= {"bus_bytes": counters.bus_bytes, "waits": _waits(work), **_launches(work)}
    else:
        found["allocated"] = live.peak.get("cpu", 0) + (static or {}).get("cpu", 0)
    return found


def _waits(work: Callable[[], Any]) -> int:
    """Host synchronisations that CUDA warns of."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(one.message) for one in seen)


def _launches(work: Callable[[], Any]) -> dict[str, int]:
    """Kernels and copies that reached the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    events = [event for event in profile.events() or [] if event.device_type.name == "CUDA"]
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    return {"kernels": len(events) - len(copies), "copies": len(copies)}


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name and memory of what measures."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
        }
    return {"type": "cpu", "name": "CPU", "threads": torch.get_num_threads()}
