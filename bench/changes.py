"""What moved between two runs of the suites: `clipvip bench --compare BEFORE AFTER`.

A median is taken to lie within its quartiles, and where there were few rounds within
1.57·IQR/√rounds of the median (the notches of McGill, Tukey and Larsen's box plots, 1978). What
moved beyond noise is what two such intervals, one of each run, have no number in common of.

Contestants of one run took turns, so a ratio to the baseline is fair even if the machine was slower
that day; times are so on one machine only. There, ours has regressed if both moved past what is
allowed; on different machines the ratio alone says so.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

SAME = ("cpu", "cores", "threads", "capability", "malloc", "gpu")  # what makes times comparable
TOLD = (*SAME, "torch", "commit")
MEMORY_NOISE_MIB = 4.0  # pages that the allocator happens to hold

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A measured figure and the interval that it is taken to lie in."""

    value: float
    low: float
    high: float

    def moved_to(self, after: "Quantity", share: float = 0.0) -> bool:
        """Whether `after` differs beyond noise, and by more than a share of this value."""
        apart = after.low > self.high or after.high < self.low
        return apart and abs(self.change(after)) > share

    def change(self, after: "Quantity") -> float:
        return after.value / self.value - 1 if self.value else math.inf * after.value


def interval(median: float, low: float, high: float, rounds: int) -> Quantity:
    """A median with its noise, from its quartiles."""
    wider = max(1.0, 2 * 1.57 / math.sqrt(rounds))
    return Quantity(median, median - wider * (median - low), median + wider * (high - median))


@dataclasses.dataclass(frozen=True)
class Move:
    """A contestant's figure in both runs."""

    contestant: str
    what: str  # "ms", "ratio" or "MiB"
    before: Quantity
    after: Quantity

    @property
    def moved(self) -> bool:
        return self.before.moved_to(self.after)

    def worse(self, share: float) -> bool:
        return self.before.moved_to(self.after, share) and self.before.value < self.after.value

    def __str__(self) -> str:
        digits = 3 if self.what == "ratio" else 2
        change = self.before.change(self.after)
        return f"{self.before.value:.{digits}f} → {self.after.value:.{digits}f} ({change:+.0%})"


def load(path: Path) -> dict[tuple[str, str], Record]:
    """(suite, case) → record, of a record's file or of a folder of them.

    ValueError: there is no record, or it lacks what is compared.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path} is neither a record nor a folder of records")
    found = {}
    for file in files:
        try:
            record = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        if not isinstance(record, dict) or "suite" not in record:
            continue  # what other programs keep beside the records
        try:
            for case, each in _cases(record):
                moves(each, each)
                found[record["suite"], case] = each
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no whole record: {error!r}") from None
    if not found:
        raise ValueError(f"{path} holds no record; `clipvip bench --out` writes them")
    return found


def _cases(record: Record) -> Iterator[tuple[str, Record]]:
    """A record's name and itself, or those of each point of a sweep."""
    facts = {"machine": dict(record["machine"])}
    if not report.is_sweep(record):
        yield record["case"], facts | {"results": record["results"]}
        return
    for point in record["points"]:
        yield f"{record['case']} {point['value']}", facts | {"results": point["results"]}


def moves(before: Record, after: Record) -> list[Move]:
    """Figures of the contestants that both runs timed: ms, ratio where there is one, MiB."""
    found = []
    for name in before["results"]:
        if name in after["results"]:
            pair = [dict(_quantities(record, name)) for record in (before, after)]
            found += [
                Move(name, what, pair[0][what], pair[1][what])
                for what in pair[0]
                if what in pair[1]
            ]
    return found


def _quantities(record: Record, name: str) -> Iterator[tuple[str, Quantity]]:
    results = record["results"]
    r = results[name]
    yield "ms", interval(r["median_ms"], r["low_ms"], r["high_ms"], r["rounds"])
    if r.get("ratio") is not None and name != report.baseline(results):
        # Records from before ratios had quartiles: as if the baseline's times had no spread.
        scale = r["ratio"] / r["median_ms"]
        low, high = (
            r.get("ratio_low", r["low_ms"] * scale),
            r.get("ratio_high", r["high_ms"] * scale),
        )
        yield "ratio", interval(r["ratio"], low, high, r["rounds"])
    if "peak_mib" in r:
        peak = r["peak_mib"]
        yield "MiB", Quantity(peak, peak - MEMORY_NOISE_MIB / 2, peak + MEMORY_NOISE_MIB / 2)


def differences(before: Record, after: Record, facts: tuple[str, ...]) -> dict[str, tuple]:
    """Machine facts that differ: name → (before, after)."""
    pairs = {key: tuple(r["machine"].get(key) for r in (before, after)) for key in facts}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def regressions(before: Record, after: Record, allow: float) -> list[Move]:
    """What of ours got worse by more than `allow`, beyond noise.

    Time on one machine if the ratio to the baseline did too (or there is no baseline); the ratio on
    different ones; memory on one machine.
    """
    worse = {m.what: m for m in moves(before, after) if m.contestant == "ours" and m.worse(allow)}
    judged = {m.what for m in moves(before, after) if m.contestant == "ours"}
    if differences(before, after, SAME):
        return [worse["ratio"]] if "ratio" in worse else []
    time = ["ms"] if "ms" in worse and ("ratio" in worse or "ratio" not in judged) else []
    return [worse[what] for what in (*time, "MiB") if what in worse]


def compare(before: Path, after: Path, allow: float) -> tuple[str, int]:
    """What to print, and how many cases have regressed.

    ValueError: a path holds no record, no case is in both, or `allow` is negative.
    """
    if not allow >= 0:
        raise ValueError(f"--allow is {allow:g}, expected a share that is not negative (0.1: 10%)")
    runs = load(before), load(after)
    both = [key for key in runs[0] if key in runs[1]]
    if not both:
        raise ValueError(f"{before} and {after} have no case in common")
    lines, bad, still = _heading([(runs[0][key], runs[1][key]) for key in both]), 0, 0
    for key in both:
        pair = runs[0][key], runs[1][key]
        past = {move.what for move in regressions(*pair, allow)}
        other = bool(differences(*pair, SAME))
        shown = [m for m in moves(*pair) if m.moved and not (other and m.what != "ratio")]
        bad, still = bad + bool(past), still + (not shown)
        lines += [f"{key[0]} {key[1]}"] * bool(shown)
        for move in shown:
            regressed = move.contestant == "ours" and move.what in past
            note = f"  REGRESSION past {allow:.0%}" if regressed else ""
            lines.append(f"  {move.contestant:24}{move.what:6}{move}{note}")
    for name, run, rest in ((before, *runs), (after, *reversed(runs))):
        alone = [" ".join(key) for key in run if key not in rest]
        lines += [f"only in {name}: {', '.join(alone)}"] * bool(alone)
    lines.append(
        f"{len(both)} cases compared, {still} within noise, {bad} regressed past {allow:.0%}"
    )
    return "\n".join(lines), bad


def _heading(pairs: list[tuple[Record, Record]]) -> list[str]:
    """What differs between the machines, and what that means."""
    facts: dict[str, set[tuple]] = {}
    for pair in pairs:
        for key, values in differences(*pair, TOLD).items():
            facts.setdefault(key, set()).add(values)
    lines = [
        f"{key}: {', '.join(f'{a} → {b}' for a, b in sorted(values, key=str))}"
        for key, values in facts.items()
    ]
    if any(key in SAME for key in facts):
        lines.append("Different machines or settings: only ratios to the baseline are compared.")
    return lines
