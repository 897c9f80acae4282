"""Peak memory of a call, above what was allocated before it.

Counted are the bytes that PyTorch's allocator hands out, its results included: on the CPU every allocation
and release as the allocator reports it to torch's profiler, on a GPU `torch.cuda.max_memory_allocated`.
Not counted are what the allocator keeps for later, fragmentation, and what libraries allocate by themselves.
The profiler does not see the release of what was there before the call, so what is measured here must not
release any of that.
"""

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Where there is no GPU, the profiler says so on the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that was allocated at one time during `call`, less what was allocated before it.

    Args:
        call: run once; whoever wants what lasts (optimiser states) left out runs it once before. It does
            not release what was there before.
        device: whose memory counts.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
