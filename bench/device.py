"""How time and memory of a call are taken, on a CPU and on a GPU."""

import ctypes
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20
L2_BYTES = 256 * MIB  # more than the second-level cache of any GPU
HEAD_START = 2_000_000  # GPU clocks, about 1 ms, during which the host queues a call


def settle(device: str) -> None:
    """Free what a contestant held. Raises RuntimeError if it has left the GPU unusable."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Took(NamedTuple):
    """Seconds until a call was done, and until the processor had queued it."""

    seconds: float
    host: float


def elapsed(run: Callable[[], Any], device: str = "cpu") -> Took:
    """Time one call. On a GPU it is timed by events, with a cold cache, and queued while the GPU
    waits, so that the time to queue it does not count."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        return Took(took, took)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    torch.cuda._sleep(HEAD_START)
    first.record()
    begin = time.perf_counter()
    run()
    queued = time.perf_counter() - begin
    last.record()
    last.synchronize()
    return Took(first.elapsed_time(last) / 1e3, queued)


def flush() -> None:
    """Empty a GPU's second-level cache.

    The data written last stays there as dirty lines, which would be written back during the call
    that is timed next. So another buffer is read afterwards.
    """
    written, read, total = _buffers()
    written.zero_()
    torch.sum(read, 0, out=total)


@functools.cache
def _buffers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    written, read = torch.zeros(2, L2_BYTES // 4, device="cuda")
    return written, read, torch.zeros((), device="cuda")


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> int:
    """Return the bytes by which memory rises at its peak during a call that ran once before.

    On a CPU this is memory of the process, which includes a library's scratch space: the kernel's
    high-water mark, reset just before the call (Linux only). On a GPU it is the memory that torch's
    allocator hands out.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory that is freed and reused would not show
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    run()
    return max(0, _status_kib("VmHWM") - before) * 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def profile(run: Callable[[], Any], path: Path) -> None:
    """Write torch.profiler's trace of one call, which Perfetto and chrome://tracing can show.

    path: ends in .json, or in .json.gz for a compressed trace.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")  # its suffix decides about compression
    trace.export_chrome_trace(str(partial))
    partial.replace(path)
