"""What a CUDA device does during a step: kernels, memory, and how often Python waits for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.autograd import DeviceType


def counts_of(run: Callable[[], object]) -> dict[str, int]:
    """Returns the kernels that a step launches, and how often it waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return {"kernels": len(kernels), "syncs": sum("called a synchronizing" in str(each.message) for each in caught)}


def peak_of(step: Callable[[], float], device: str) -> dict[str, float]:
    """Returns the seconds of a step, and the bytes that it adds, at its peak, to what is allocated before."""
    if device != "cuda":
        return {"seconds": step()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return {"seconds": step(), "peak_bytes": torch.cuda.max_memory_allocated() - before}
