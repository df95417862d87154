"""Paired timings of functions that should agree, with peak memory and the machine's facts.

Contestants run in turn, one call each a round, so that whatever else the machine does falls on
all of them; medians are reported with quartiles, and ratios are medians of a round's own ratios.
"""

import collections
import ctypes
import datetime
import functools
import gc
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch

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
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PROFILE = "CLIPVIP_BENCH_PROFILE"  # where traces go: a folder and the start of their names
MIB, GIB = 2**20, 2**30
L2_BYTES = 256 * MIB  # more than any GPU's second level of cache holds

Contestants = dict[str, Callable[[], Sequence[torch.Tensor]]]


# --- measuring -----------------------------------------------------------------------------------


def compare(
    contestants: Contestants,
    *,
    expected: Sequence[torch.Tensor],
    tolerance: float,
    expected_of: dict[str, Sequence[torch.Tensor]] | None = None,
    seconds: float = 8.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    device: str = "cpu",
    left_out: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Checks every contestant against `expected`, then times all that pass round by round.

    A contestant is a function without arguments that returns what `expected` holds, in order. Its
    error is max|x − expected| / max|expected| for each tensor and must not exceed `tolerance`. One
    that raises or is wrong is left out and listed with the reason; "ours" raises instead. The
    first contestant is the baseline, which ratios refer to.

    Args:
        expected: of float64, or the next wider dtype.
        expected_of: for contestants that serve the same end by another function, what that gives.
        seconds: of timing, all contestants together.
        device: "cpu" or "cuda": how time and memory are taken, and what is freed in between.
        left_out: contestants that were not even tried, with the reason.

    Returns {"results": …, "left_out": …}. Results, for each name: error, peak_mib (see
    peak_memory) and what take_turns gives.
    """
    checked: dict[str, dict[str, Any]] = {}
    left_out = dict(left_out or {})
    trace = os.environ.get(PROFILE)
    for name, run in contestants.items():
        try:
            error = _error(run(), (expected_of or {}).get(name, expected))
            if not error <= tolerance:
                raise AssertionError(f"{name} is off by {error:.2e}, allowed {tolerance:.2e}")
            checked[name] = {"error": error, "peak_mib": peak_memory(run, device) / MIB}
            if trace:
                profile(run, Path(f"{trace}-{name.replace(' ', '_')}.json.gz"))
        except Exception as reason:  # whatever a peer dies of is a result
            if name == "ours":
                raise
            checked.pop(name, None)
            left_out[name] = why(reason)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    able = {name: run for name, run in contestants.items() if name in checked}
    timed = take_turns(
        able,
        seconds=seconds,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        device=device,
        baseline=next(iter(contestants)),
    )
    return {"results": {name: checked[name] | timed[name] for name in able}, "left_out": left_out}


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


def why(error: Exception) -> str:
    """An error that keeps a contestant out, in one line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, AssertionError):
        return text
    install = ': pip install "clipvip[peers]"' if isinstance(error, ImportError) else ""
    return f"{type(error).__name__}: {text}{install}"


def take_turns(
    contestants: dict[str, Callable[[], Any]],
    *,
    seconds: float = 8.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    units: int = 1,
    device: str = "cpu",
    baseline: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Times all contestants round by round.

    units: of work in one call; times are those of one unit.
    baseline: by default the first.

    Returns, for each name: median_ms, low_ms and high_ms (quartiles), min_ms, rounds, and ratio,
    ratio_low and ratio_high: median and quartiles over rounds of its time over the baseline's of
    the same round, None where the baseline does not take part.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        for name, run in contestants.items():
            times[name].append(elapsed(run, device) * 1e3 / units)
    first = times.get(baseline or next(iter(contestants)))
    results: dict[str, dict[str, Any]] = {}
    for name, each in times.items():
        low, median, high = statistics.quantiles(each, n=4, method="inclusive")
        ratios: Sequence[float | None] = (None, None, None)
        if first:
            ratios = statistics.quantiles(
                [t / f for t, f in zip(each, first, strict=True)], n=4, method="inclusive"
            )
        results[name] = {
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "min_ms": min(each),
            "ratio": ratios[1],
            "ratio_low": ratios[0],
            "ratio_high": ratios[2],
            "rounds": len(each),
        }
    return results


def elapsed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call; on a GPU by events, from a cold cache."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush().zero_()
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")


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


def machine() -> dict[str, Any]:
    """Facts that a timing means nothing without."""
    import clipvip
    from clipvip.ops import _native

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    facts = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": _native.module().cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": "tuned" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default",
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "clipvip": clipvip.__version__,
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
        }
    return facts


def _commit() -> str:
    """Of the checkout that this file lies in, or "" where it was installed."""
    if given := os.environ.get("CLIPVIP_COMMIT"):
        return given
    if not (BENCH.parent / ".git").exists():
        return ""
    changed = _git("status", "--porcelain", "--", "csrc", "clipvip")
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True)
    return done.stdout.strip()


@functools.cache
def ceilings(device: str = "cpu") -> dict[str, float]:
    """What this machine does at best, measured once a process: products and copies.

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
    if device == "cuda":
        del x, y, out, source
        torch.cuda.empty_cache()
    return found


def _best(run: Callable[[], Any], device: str) -> float:
    elapsed(run, device)
    return min(elapsed(run, device) for _ in range(10))


# --- processes, files, text ----------------------------------------------------------------------


def in_process(
    malloc: str, module: str, function: str, *, trace: Path | None = None, **arguments: Any
) -> dict[str, Any]:
    """`module.function(**arguments)` in a process of its own, with malloc "default" or "tuned".

    A tuned malloc keeps what is freed, which spares a program of many large tensors its page
    faults. It is read when a process starts, hence the process. Arguments and result are JSON.
    trace: `compare` in that process writes profiles to files whose names start so.
    """
    environment = os.environ | (TUNED_MALLOC if malloc == "tuned" else {})
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(BENCH.parent), str(BENCH), environment.get("PYTHONPATH", "")]
    )
    if trace:
        environment[PROFILE] = str(trace.absolute())
    done = subprocess.run(
        [sys.executable, str(BENCH / "harness.py"), module, function, json.dumps(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function} ended with {done.returncode}; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def save(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes OUT/SUITE-CASE.json and returns what it holds: the record with measured ceilings.

    A record: suite, case, params (with device "cuda" where it ran there), work ({"flop", "bytes"}:
    what the task needs at least; either may be absent), machine, left_out and results.
    """
    device = record["params"].get("device", "cpu")
    record = record | {"machine": record["machine"] | {"ceilings": ceilings(device)}}
    order = ("suite", "case", "params", "work", "machine", "left_out", "results")
    record = {key: record[key] for key in order if key in record} | record
    write(record_path(out, record["suite"], record["case"]), record)
    return record


def record_path(out: Path, suite: str, case: str) -> Path:
    return out / f"{suite}-{case}.json"


def write(path: Path, value: Any) -> Path:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    return partial.replace(path)


def table(record: dict[str, Any]) -> str:
    """Plain text, a line a contestant, and a line for each that was left out."""
    lines = [
        f"{'':30}{'median ms':>11}{'quartiles':>20}{'ratio':>8}{'of ceiling':>12}"
        f"{'peak MiB':>10}{'error':>10}"
    ]
    for name, r in record["results"].items():
        quartiles = f"{r['low_ms']:.2f}–{r['high_ms']:.2f}"
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}"
        part = report.percent(max(report.shares(record, r).values(), default=None))
        lines.append(
            f"{name:30}{r['median_ms']:11.2f}{quartiles:>20}{ratio:>8}{part:>12}"
            f"{r['peak_mib']:10.1f}{r['error']:10.1e}"
        )
    lines += [f"left out: {name} ({why})" for name, why in record.get("left_out", {}).items()]
    return "\n".join(lines)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Plain text, a line a case: ours against the baseline and the best peer."""
    records = [record for record in records if "ours" in record["results"]]
    titles = [f"{record['suite']} {record['case']}" for record in records]
    width = max(map(len, titles), default=0)
    lines = [
        f"{'':{width}}{'eager ms':>10}{'best peer ms':>14}{'ours ms':>10}{'quartiles':>20}"
        f"{'/ eager':>9}{'/ peer':>8}{'of ceiling':>12}{'eager MiB':>11}{'ours MiB':>10}  best peer"
    ]
    for title, record in zip(titles, records, strict=True):
        results = record["results"]
        ours, best = results["ours"], report.best_peer(results)
        eager, peer = results.get(report.baseline(results)), results.get(best)
        cells = [
            report.number(eager and eager["median_ms"]),
            report.number(peer and peer["median_ms"]),
            report.number(ours["median_ms"]),
            f"{report.number(ours['low_ms'])}–{report.number(ours['high_ms'])}",
            report.number(report.time_ratio(ours, eager)),
            report.number(peer and ours["median_ms"] / peer["median_ms"]),
            report.percent(max(report.shares(record, ours).values(), default=None)),
            report.number(eager and eager["peak_mib"]),
            report.number(ours["peak_mib"]),
        ]
        widths = (10, 14, 10, 20, 9, 8, 12, 11, 10)
        line = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{title:{width}}{line}  {best or ''}")
    absent = collections.Counter(
        f"{name} ({reason})"
        for record in records
        for name, reason in record.get("left_out", {}).items()
    )
    lines += [f"left out of {n} of {len(records)} cases: {what}" for what, n in absent.items()]
    return "\n".join(lines)


def _main() -> None:
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
