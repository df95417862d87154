"""Paired timings of functions that should agree, with their errors and peak memory.

Contestants take turns, one call each per round, so that other load on the machine affects all of
them alike. Medians are reported with quartiles; ratios are medians of the ratios of each round.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import records
import torch
from device import MIB, Took, elapsed, peak_memory, profile, settle
from machine import machine

Contestants = dict[str, Callable[[], Sequence[torch.Tensor]]]


class Diary:
    """Notes from a measuring process to its parent, which reads them if the process ends early.

    The notes are two files in a folder: found.json holds the results so far, and `running` the name
    of the contestant that is being run. Without a folder nothing is written. See cases.py.
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
        """Reason per contestant that ended the process in an earlier try."""
        return self.given.get("without", {})

    @property
    def settled(self) -> list[str]:
        """Contestants that were measured in an earlier try."""
        return self.given.get("settled", [])

    def trace(self, name: str) -> Path | None:
        """Return where to write a contestant's profiler trace, or None if none was requested."""
        if self.given.get("profile") not in ("all", name):
            return None
        return Path(f"{self.given['trace']}-{name.replace(' ', '_')}.json.gz")

    @contextlib.contextmanager
    def runs(self, name: str) -> Iterator[None]:
        """Note which contestant runs. This costs one or two system calls between timed calls."""
        if self._running >= 0:
            text = name.encode()
            os.pwrite(self._running, text, 0)
            os.ftruncate(self._running, len(text))
        yield
        if self._running >= 0:
            os.ftruncate(self._running, 0)

    def found(self, so_far: dict[str, Any]) -> None:
        """Write the results so far."""
        if self._folder:
            records.write(self._folder / "found.json", so_far)


@dataclasses.dataclass
class Check:
    """Compares results with the expected ones and takes peak memory; see `compare`."""

    contestants: Contestants
    expected: Sequence[torch.Tensor]
    tolerance: float
    expected_of: dict[str, Sequence[torch.Tensor]]
    device: str
    passed: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str) -> None:
        """Raise AssertionError if a result is off by more than is allowed."""
        run, allowed = self.contestants[name], self.allowed(name)
        error = _error(run(), self.expected_of.get(name, self.expected))
        if not error <= allowed:
            raise AssertionError(f"{name} is off by {error:.2e}, allowed {allowed:.2e}")
        self.passed[name] = {"error": error, "peak_mib": peak_memory(run, self.device) / MIB}

    def allowed(self, name: str) -> float:
        """Return the largest error that a contestant may have."""
        same = [x for x in self.passed if not records.is_ours(x) and x not in self.expected_of]
        if not records.is_ours(name) or not same:
            return self.tolerance
        twice = 2 * self.passed[same[0]]["error"]
        return min(self.tolerance, max(twice, self.tolerance / 10))


def compare(
    contestants: Contestants,
    *,
    expected: Sequence[torch.Tensor],
    tolerance: float,
    work: Mapping[str, float] | None = None,
    expected_of: dict[str, Sequence[torch.Tensor]] | None = None,
    device: str = "cpu",
    left_out: dict[str, str] | None = None,
    **rounds: Any,
) -> dict[str, Any]:
    """Check every contestant against `expected`, then time all that pass, round by round.

    A contestant is a function without arguments that returns the tensors of `expected` in order.
    Its error is the largest max|x − expected| / max|expected| of its tensors and must not exceed
    `tolerance`. The error of ours must also not exceed twice that of the first other contestant
    that passes (the baseline, if it runs), or a tenth of the tolerance if that is more. A
    contestant that raises or is wrong is left out and listed with the reason. The first contestant
    is the baseline of all ratios.

    On a GPU all others are checked and timed before ours, so that a fault of our kernels cannot
    lose their results. Then ours, and after it each of its variants, takes turns with the baseline
    and the best peer, which are timed again.

    Args:
        expected: tensors in float64, or in the next wider dtype.
        work: least number of operations ("flop") and bytes ("bytes") that the task needs.
        expected_of: other expected tensors for contestants that compute another function.
        device: "cpu" or "cuda"; decides how time and memory are taken.
        left_out: reason per contestant that was not tried.
        rounds: seconds, min_rounds and max_rounds for `take_turns`.

    Returns {"work", "machine", "left_out", "results"}. The results hold, per name, error, peak_mib
    (see `peak_memory`) and the figures of `take_turns`.
    Raises RuntimeError if an error leaves the GPU unusable for the rest of the process.
    """
    diary = Diary()
    results: dict[str, dict[str, Any]] = {}
    left_out = (left_out or {}) | diary.without
    found = {"work": dict(work or {}), "machine": machine()}
    found |= {"left_out": left_out, "results": results}
    base = next(iter(contestants))
    check = Check(contestants, expected, tolerance, expected_of or {}, device)
    names = [name for name in contestants if name not in {*diary.without, *diary.settled}]
    for group in _groups(names, device):
        for name in group:
            with diary.runs(name):
                _attempt(functools.partial(check, name), name, left_out, device)
                settle(device)
            diary.found(found)
        able = [name for name in group if name in check.passed]
        if able and results:
            again = (base, records.best_peer(results))
            able = [*(name for name in again if name in results and name not in able), *able]
        lost: dict[str, str] = {}
        timed = take_turns(
            {name: contestants[name] for name in able},
            device=device,
            baseline=base,
            left_out=lost,
            diary=diary,
            **rounds,
        )
        # One that fails beside ours, such as for lack of memory, keeps the times it had before.
        left_out |= {name: why for name, why in lost.items() if name not in results}
        both = results | {name: check.passed[name] | timed[name] for name in timed}
        found["results"] = results = {name: both[name] for name in contestants if name in both}
        diary.found(found)
        for name in group:
            if name in results and (path := diary.trace(name)):
                _trace(contestants[name], name, path)
    return found


def _groups(names: list[str], device: str) -> list[list[str]]:
    """Return the groups that are timed one after another: on a CPU one, on a GPU see `compare`."""
    if device == "cpu":
        return [names]
    ours = [name for name in names if records.is_ours(name)]
    return [[name for name in names if name not in ours], *([name] for name in ours)]


def _attempt(run: Callable[[], Any], name: str, left_out: dict[str, str], device: str) -> Any:
    """Return the result of `run`, or None after noting the error in `left_out`."""
    try:
        return run()
    except Exception as error:  # any error of a contestant is a result of the benchmark
        left_out[name] = why(error)
    settle(device)
    return None


def _trace(run: Callable[[], Any], name: str, path: Path) -> None:
    """Write a trace; a failure is printed, since a trace is not worth losing the other results."""
    try:
        profile(run, path)
    except Exception as error:
        print(f"no trace of {name}: {why(error)}", file=sys.stderr)


def _error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    if len(got) != len(expected):
        raise AssertionError(f"{len(got)} results, expected {len(expected)}")
    errors = []
    for x, want in zip(got, expected, strict=True):
        if x.shape != want.shape:
            raise AssertionError(f"a shape is {tuple(x.shape)}, expected {tuple(want.shape)}")
        off = float((x.double() - want.double()).abs().max() / want.double().abs().max())
        errors.append(off if off == off else math.inf)  # max() would ignore a NaN
    return max(errors)


def why(error: BaseException) -> str:
    """Return an error as one line, the reason for which a contestant is left out."""
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
    """Time all contestants, round by round.

    Args:
        seconds: time for all contestants together, once `min_rounds` rounds are done.
        units: units of work in one call; times are given per unit.
        baseline: contestant that ratios refer to; by default the first.
        left_out: if given, a contestant that raises is dropped and listed there with the reason.

    Returns, per name: median_ms, low_ms and high_ms (quartiles), min_ms, rounds, and ratio,
    ratio_low and ratio_high: median and quartiles over rounds of its time divided by the baseline's
    in the same round, or None if the baseline does not take part. On a GPU also host_ms, the median
    time in which the processor queues the call.
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
    found = {name: _figures(each, first, units) for name, each in times.items()}
    if device == "cuda":
        for name, each in times.items():
            found[name]["host_ms"] = 1e3 * statistics.median(took.host for took in each) / units
    return found


def _figures(times: list[Took], first: list[Took] | None, units: int) -> dict[str, Any]:
    """Return the figures of one contestant; first: the baseline's times."""
    ms = [1e3 * took.seconds / units for took in times]
    low, median, high = _quartiles(ms)
    ratios: Sequence[float | None] = (None, None, None)
    if first:
        ratios = _quartiles([t.seconds / f.seconds for t, f in zip(times, first, strict=True)])
    return {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "min_ms": min(ms),
        "ratio": ratios[1],
        "ratio_low": ratios[0],
        "ratio_high": ratios[2],
        "rounds": len(times),
    }


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")
