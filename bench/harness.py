"""Paired timings of functions that should agree, with peak memory and the machine's rates.

Contestants run in turn, one call each per round, so that whatever else the machine does falls on
all of them; medians are reported with quartiles, and ratios are medians of a round's own ratios.
"""

import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch
from machine import machine

BENCH = Path(__file__).resolve().parent
SUITES = {
    "ops": (
        "bench_proxy_attention",
        "bench_pairwise_logsumexp",
        "bench_linear",
        "bench_resize_crop",
    ),
    "model": ("bench_model",),
    "train": ("bench_train",),
    "decode": ("bench_decode",),
    "growth": ("bench_growth",),
}
CPU_ONLY = ("bench_linear", "bench_resize_crop")
# What comes first, on a GPU or elsewhere; all others follow in the order of their modules.
IMPORTANT = (
    "ops proxy_attention-b16-bf16-batch32-both-cuda",
    "ops proxy_attention-b32-bf16-batch32-both-cuda",
    "ops pairwise_logsumexp-symmetric-bf16-16384-cuda",
    "ops pairwise_logsumexp-symmetric-bf16-65536-cuda",
    "ops proxy_attention-b16-bf16-batch32-forward-cuda",
    "ops proxy_attention-b16-bf16-batch32-backward-cuda",
    "ops proxy_attention-b32-bf16-batch32-forward-cuda",
    "ops proxy_attention-b32-bf16-batch32-backward-cuda",
    "train b16-bf16-batch32-cuda",
    "ops pairwise_logsumexp-vsc_fc-bf16-16384-cuda",
    "ops proxy_attention-b16-bf16-ragged32-both-cuda",
    "ops proxy_attention-l14-bf16-batch32-both-cuda",
    "train b32-bf16-batch32-cuda",
    "model b16-bf16-batch32-forward-cuda",
    "ops proxy_attention-b16-bf16-batch1-both-cuda",
    "ops proxy_attention-b16-bf16-batch128-both-cuda",
    "growth frames-cuda",
    "ops proxy_attention-b16-fp32-both-default",
    "ops proxy_attention-b16-bf16-both-default",
    "ops proxy_attention-b32-fp32-both-default",
    "ops pairwise_logsumexp-symmetric-fp32-16384-default",
    "ops pairwise_logsumexp-vsc_fc-fp32-8192-default",
)
MIB, GIB = 2**20, 2**30
L2_BYTES = 256 * MIB  # more than any GPU's second level of cache holds
HEAD_START = 2_000_000  # clocks of the GPU, about 1 ms, in which the host queues a call

Contestants = dict[str, Callable[[], Sequence[torch.Tensor]]]


# --- measuring -----------------------------------------------------------------------------------


class Diary:
    """Notes from a measuring process to the one that started it, which reads them if it ends early.

    They are two files in a folder: found.json, the results so far, and running, the name of the
    contestant being run. Without a folder nothing is written. See cases.py.
    """

    FOLDER = "CLIPVIP_BENCH_DIARY"

    def __init__(self) -> None:
        folder = os.environ.get(self.FOLDER)
        self._folder = Path(folder) if folder else None
        self.given: dict[str, Any] = {}
        self._running = -1
        if self._folder:
            self.given = json.loads((self._folder / "given.json").read_text())
            self._running = os.open(self._folder / "running", os.O_CREAT | os.O_WRONLY)

    @property
    def without(self) -> dict[str, str]:
        """Contestants that ended the process in an earlier try, with the reason."""
        return self.given.get("without", {})

    @property
    def settled(self) -> list[str]:
        """Contestants that were measured in an earlier try."""
        return self.given.get("settled", [])

    def trace(self, name: str) -> Path | None:
        """Where to write the profiler's trace of a contestant, if one is wanted."""
        if self.given.get("profile") not in ("all", name):
            return None
        return Path(f"{self.given['trace']}-{name.replace(' ', '_')}.json.gz")

    @contextlib.contextmanager
    def runs(self, name: str) -> Iterator[None]:
        """Notes who is being run. Costs a system call or two: it happens between timed calls."""
        if self._running >= 0:
            text = name.encode()
            os.pwrite(self._running, text, 0)
            os.ftruncate(self._running, len(text))
        yield
        if self._running >= 0:
            os.ftruncate(self._running, 0)

    def found(self, so_far: dict[str, Any]) -> None:
        if self._folder:
            records.write(self._folder / "found.json", so_far)


def compare(
    contestants: Contestants,
    *,
    expected: Sequence[torch.Tensor],
    tolerance: float,
    work: Mapping[str, float] | None = None,
    expected_of: dict[str, Sequence[torch.Tensor]] | None = None,
    seconds: float = 8.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    device: str = "cpu",
    left_out: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Checks every contestant against `expected`, then times all that pass round by round.

    A contestant is a function without arguments that returns what `expected` holds, in order. Its
    error is max|x − expected| / max|expected| for each tensor and must not exceed `tolerance`. The
    error of ours must not exceed twice that of the first other contestant that passes, which is the
    baseline if it runs, or a tenth of the tolerance if that is more. A contestant that raises or is
    wrong is left out and listed with the reason. The first one is the baseline, which ratios refer
    to.

    On a GPU all others are checked and timed before ours, so that a kernel of ours that breaks the
    process takes nothing along. Then ours, and after it each of its variants, takes turns with the
    baseline and the best peer, which are timed again.

    Args:
        expected: of float64, or the next wider dtype.
        work: the least operations ("flop") and bytes ("bytes") that the task needs.
        expected_of: for contestants that serve the same end by another function, what that gives.
        seconds: of timing, all contestants together.
        device: "cpu" or "cuda": how time and memory are taken, and what is freed in between.
        left_out: contestants that were not even tried, with the reason.

    Returns {"work", "machine", "left_out", "results"}. Results, for each name: error, peak_mib (see
    peak_memory) and what take_turns gives.
    Raises RuntimeError where an error leaves the GPU unusable for the rest of the process.
    """
    diary = Diary()
    names = [name for name in contestants if name not in {*diary.without, *diary.settled}]
    results: dict[str, dict[str, Any]] = {}
    left_out = (left_out or {}) | diary.without
    found = {"work": dict(work or {}), "machine": machine()}
    found |= {"left_out": left_out, "results": results}
    base = next(iter(contestants))

    def allowed(name: str) -> float:
        same = [x for x in checked if not records.is_ours(x) and x not in (expected_of or {})]
        if not records.is_ours(name) or not same:
            return tolerance
        return min(tolerance, max(2 * checked[same[0]]["error"], tolerance / 10))

    def check(name: str) -> None:
        run = contestants[name]
        error = _error(run(), (expected_of or {}).get(name, expected))
        if not error <= allowed(name):
            raise AssertionError(f"{name} is off by {error:.2e}, allowed {allowed(name):.2e}")
        checked[name] = {"error": error, "peak_mib": peak_memory(run, device) / MIB}

    checked: dict[str, dict[str, float]] = {}
    theirs = [name for name in names if not records.is_ours(name)]
    ours = [[name] for name in names if records.is_ours(name)]
    for group in [theirs, *ours] if device == "cuda" else [names]:
        for name in group:
            with diary.runs(name):
                _attempt(functools.partial(check, name), name, left_out, device)
                _settle(device)
            diary.found(found)
        able = [name for name in group if name in checked]
        if able and group in ours:
            again = (base, records.best_peer(results))
            able = [*(name for name in again if name in results and name not in able), *able]
        lost: dict[str, str] = {}
        timed = take_turns(
            {name: contestants[name] for name in able},
            seconds=seconds,
            min_rounds=min_rounds,
            max_rounds=max_rounds,
            device=device,
            baseline=base,
            left_out=lost,
            diary=diary,
        )
        # One that was timed before and fails beside ours, such as for lack of memory, was timed.
        left_out |= {name: why for name, why in lost.items() if name not in results}
        both = results | {name: checked[name] | timed[name] for name in timed}
        found["results"] = results = {name: both[name] for name in contestants if name in both}
        diary.found(found)
        for name in able:
            if name in results and name in group and (path := diary.trace(name)):
                try:
                    profile(contestants[name], path)
                except Exception as error:  # a trace is not worth losing what follows
                    print(f"no trace of {name}: {why(error)}", file=sys.stderr)
    return found


def _attempt(run: Callable[[], Any], name: str, left_out: dict[str, str], device: str) -> Any:
    """Return the result, or None with the reason in `left_out`: any error is a result, too."""
    try:
        return run()
    except Exception as error:
        left_out[name] = why(error)
    _settle(device)
    return None


def _settle(device: str) -> None:
    """Frees what a contestant held. Raises where it has left the GPU unusable to this process."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    if len(got) != len(expected):
        raise AssertionError(f"{len(got)} results, expected {len(expected)}")
    errors = []
    for x, want in zip(got, expected, strict=True):
        if x.shape != want.shape:
            raise AssertionError(f"a shape is {tuple(x.shape)}, expected {tuple(want.shape)}")
        off = float((x.double() - want.double()).abs().max() / want.double().abs().max())
        errors.append(off if off == off else math.inf)  # max() would pass over a NaN
    return max(errors)


def why(error: BaseException) -> str:
    """An error that keeps a contestant out, in one line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def take_turns(
    contestants: dict[str, Callable[[], Any]],
    *,
    seconds: float = 8.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    units: int = 1,
    device: str = "cpu",
    baseline: str | None = None,
    left_out: dict[str, str] | None = None,
    diary: Diary | None = None,
) -> dict[str, dict[str, Any]]:
    """Times all contestants round by round.

    units: of work in one call; times are those of one unit.
    baseline: by default the first.
    left_out: where given, a contestant that raises is dropped and listed there.

    Returns, for each name: median_ms, low_ms and high_ms (quartiles), min_ms, rounds, and ratio,
    ratio_low and ratio_high: median and quartiles over rounds of its time over the baseline's of
    the same round, None where the baseline does not take part. On a GPU also host_ms, the median of
    what the processor takes to queue the call.
    """
    times: dict[str, list[Took]] = {name: [] for name in contestants}
    diary = diary or Diary()
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        for name in list(times):
            timed = functools.partial(elapsed, contestants[name], device)
            with diary.runs(name):
                took = timed() if left_out is None else _attempt(timed, name, left_out, device)
            if took is None:
                del times[name]
            else:
                times[name].append(took)
    first = times.get(baseline or next(iter(contestants), ""))
    results: dict[str, dict[str, Any]] = {}
    for name, each in times.items():
        ms = [1e3 * took.seconds / units for took in each]
        low, median, high = statistics.quantiles(ms, n=4, method="inclusive")
        ratios: Sequence[float | None] = (None, None, None)
        if first:
            ratios = statistics.quantiles(
                [t.seconds / f.seconds for t, f in zip(each, first, strict=True)],
                n=4,
                method="inclusive",
            )
        results[name] = {
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "min_ms": min(ms),
            "ratio": ratios[1],
            "ratio_low": ratios[0],
            "ratio_high": ratios[2],
            "rounds": len(each),
        }
        if device == "cuda":
            results[name]["host_ms"] = 1e3 * statistics.median(t.host for t in each) / units
    return results


class Took(NamedTuple):
    """Seconds of one call: until it was done, and until the processor had queued it."""

    seconds: float
    host: float


def elapsed(run: Callable[[], Any], device: str = "cpu") -> Took:
    """Times one call; on a GPU by events, from a cold cache, its work queued while it waits."""
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
    """Empties a GPU's second level of cache. What is written last lies there dirty, and would be
    written back at the cost of the call that is timed next; so another buffer is read after it."""
    written, read, total = _buffers()
    written.zero_()
    torch.sum(read, 0, out=total)


@functools.cache
def _buffers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    written, read = torch.zeros(2, L2_BYTES // 4, device="cuda")
    return written, read, torch.zeros((), device="cuda")


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which memory rises at most during a call that has been made before.

    On the CPU that of the process, counting every allocation that is touched, a library's scratch
    space too. Linux only: the kernel's own high-water mark, reset just before the call. On a GPU
    what torch's allocator hands out.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that is used again would not show
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
    """Writes torch.profiler's trace of one call, which Perfetto and chrome://tracing show.

    path: ends in .json, or .json.gz for a compressed one.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")  # its ending says whether to compress
    trace.export_chrome_trace(str(partial))
    partial.replace(path)


# --- the machine ---------------------------------------------------------------------------------


def ceilings(device: str = "cpu") -> dict[str, float]:
    """Measure the rates that this machine reaches in large products and copies.

    matmul_fp32_gflops and matmul_bf16_gflops (10⁹ operations a second, a multiplication and an
    addition are two) of square matrices, copy_gib_s (what is read plus what is written).
    """
    side, copied = (8192, 2 * GIB) if device == "cuda" else (2048, 256 * MIB)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = torch.randn(2, side, side, device=device).to(dtype)
        out = torch.empty_like(x)
        best = _best(functools.partial(torch.mm, x, y, out=out), device)
        found[f"matmul_{name}_gflops"] = 2 * side**3 / best / 1e9
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    best = _best(functools.partial(torch.empty_like(source).copy_, source), device)
    found["copy_gib_s"] = 2 * copied / best / GIB
    return found


def _best(run: Callable[[], Any], device: str) -> float:
    elapsed(run, device)
    return min(elapsed(run, device).seconds for _ in range(10))


def facts(device: str) -> dict[str, Any]:
    """machine() with its ceilings."""
    return machine() | {"ceilings": ceilings(device)}
