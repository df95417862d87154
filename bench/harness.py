"""Paired timings of functions that should agree, with peak memory and the machine's facts.

Contestants run in turn, one call each a round, so that whatever else the machine does falls on
all of them; medians are reported with quartiles, and ratios are medians of a round's own ratios.
"""

import ctypes
import datetime
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def compare(
    contestants: dict[str, Callable[[], Sequence[torch.Tensor]]],
    *,
    expected: Sequence[torch.Tensor],
    tolerance: float,
    seconds: float = 8.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, dict[str, float]]:
    """Checks every contestant against `expected`, then times all of them round by round.

    A contestant is a function without arguments that returns what `expected` holds, in order
    (fewer tensors if it computes only the first ones, as a forward does). Its error is
    max|x − expected| / max|expected| for each tensor and must not exceed `tolerance`. The first
    contestant is the one that ratios refer to.

    Returns, for each name: median_ms, low_ms and high_ms (quartiles), min_ms, ratio (median over
    rounds of its time over the first one's), error, and peak_mib (see peak_memory).
    """
    results: dict[str, dict[str, float]] = {}
    for name, run in contestants.items():
        error = max(
            float((got.double() - want.double()).abs().max() / want.double().abs().max())
            for got, want in zip(run(), expected, strict=False)
        )
        if not error <= tolerance:
            raise AssertionError(f"{name} is off by {error:.2e}, allowed {tolerance:.2e}")
        results[name] = {"error": error, "peak_mib": peak_memory(run) / 2**20}
    timed = take_turns(contestants, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds)
    return {name: results[name] | timed[name] for name in contestants}


def take_turns(
    contestants: dict[str, Callable[[], Any]],
    *,
    seconds: float = 8.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    units: int = 1,
) -> dict[str, dict[str, float]]:
    """Times all contestants round by round; what `compare` returns, without error and memory.

    units: of work in one call; times are those of one unit.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3 / units)
    first = times[next(iter(contestants))]
    results = {}
    for name, each in times.items():
        low, median, high = statistics.quantiles(each, n=4, method="inclusive")
        results[name] = {
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "min_ms": min(each),
            "ratio": statistics.median(t / f for t, f in zip(each, first, strict=True)),
            "rounds": len(each),
        }
    return results


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises at most during a call that has been made before.

    Counts every allocation that is touched, a library's scratch space too. Linux only: the
    kernel's own high-water mark, reset just before the call.
    """
    gc.collect()
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


def machine() -> dict[str, Any]:
    """Facts that a timing means nothing without."""
    from clipvip.ops import _native

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": _native.module().cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": "tuned" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default",
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--", "csrc", "clipvip") else ""),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True)
    return done.stdout.strip()


def in_process(malloc: str, module: str, function: str, **arguments: Any) -> dict[str, Any]:
    """`module.function(**arguments)` in a process of its own, with malloc "default" or "tuned".

    A tuned malloc keeps what is freed, which spares a program of many large tensors its page
    faults. It is read when a process starts, hence the process. Arguments and result are JSON.
    """
    environment = os.environ | (TUNED_MALLOC if malloc == "tuned" else {})
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(BENCH.parent), str(BENCH), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, str(BENCH / "harness.py"), module, function, json.dumps(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function} ended with {done.returncode}; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, float]]) -> str:
    """Plain text, a line a contestant."""
    lines = [f"{'':24}{'median ms':>11}{'quartiles':>18}{'ratio':>8}{'peak MiB':>10}{'error':>10}"]
    for name, r in results.items():
        quartiles = f"{r['low_ms']:.2f}–{r['high_ms']:.2f}"
        lines.append(
            f"{name:24}{r['median_ms']:11.2f}{quartiles:>18}{r['ratio']:8.2f}"
            f"{r['peak_mib']:10.1f}{r['error']:10.1e}"
        )
    return "\n".join(lines)


def save(name: str, record: dict[str, Any]) -> Path:
    """Writes bench/results/NAME.json."""
    path = BENCH / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _main() -> None:
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
