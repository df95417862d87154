"""Compares two runs of the suites: `clipvip bench --compare BEFORE AFTER`.

The noise of a median is the interval between its quartiles, or, if there were few rounds,
±1.57·IQR/√rounds around it (the notches of box plots by McGill, Tukey and Larsen, 1978). A figure
moved beyond noise if the intervals of the two runs do not overlap.

Contestants of one run took turns, so their ratio to the baseline is fair even if the machine was
slower that day. The time of ours and of its variants ("ours compiled") is therefore judged by that
ratio. If the runs have no ratio to the same baseline, it is judged in milliseconds; these, and peak
memory, are compared on the same machine only.

A loss is a regression, too: ours is absent or not finite, or a case is absent in which ours was
measured before, provided that the later run measured that suite (that op) as the earlier one did,
which means some case with the same parameters. So a run with --quick may leave out other cases, and
a run on a CPU the cases of a GPU. If AFTER is a file, only its own cases are expected.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import records
from records import Record

SAME = ("cpu", "cores", "threads", "capability", "malloc", "gpu")  # equal if times are comparable
PRINTED = (*SAME, "torch", "commit")
MEMORY_NOISE_MIB = 4.0  # pages that the allocator happens to keep

Key = tuple[str, str]  # suite and case
Run = dict[Key, Record]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A measured figure with its interval of noise."""

    value: float
    low: float
    high: float

    @property
    def measured(self) -> bool:
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    def moved_to(self, after: "Quantity", share: float = 0.0) -> bool:
        """Return whether `after` differs beyond noise and by more than a share of this value."""
        apart = after.low > self.high or after.high < self.low
        return apart and abs(self.change(after)) > share

    def change(self, after: "Quantity") -> float:
        return after.value / self.value - 1 if self.value else math.inf * after.value


LOST = Quantity(math.nan, math.nan, math.nan)


def interval(median: float, low: float, high: float, rounds: int) -> Quantity:
    """Return a median with its interval of noise, from its quartiles."""
    wider = max(1.0, 2 * 1.57 / math.sqrt(rounds))
    return Quantity(median, median - wider * (median - low), median + wider * (high - median))


@dataclasses.dataclass(frozen=True)
class Move:
    """A figure of a contestant in both runs."""

    contestant: str
    what: str  # "ms", "ratio" or "MiB"
    before: Quantity
    after: Quantity
    why: str = "not finite"  # reason, if the figure was lost

    @property
    def lost(self) -> bool:
        return not self.after.measured

    @property
    def moved(self) -> bool:
        return self.lost or self.before.moved_to(self.after)

    def worse(self, share: float) -> bool:
        more = self.before.value < self.after.value
        return self.lost or (more and self.before.moved_to(self.after, share))

    def __str__(self) -> str:
        digits = 3 if self.what == "ratio" else 2
        then = f"{self.before.value:.{digits}f} → "
        if self.lost:
            return f"{then}lost ({self.why})"
        return f"{then}{self.after.value:.{digits}f} ({self.before.change(self.after):+.0%})"


def load(path: Path) -> Run:
    """Return the cases of a store of records, or of one of its files.

    Raises ValueError if there is no record, or if one lacks figures to compare.
    """
    found = {}
    for place, record in records.stored(path):
        if not isinstance(record, dict) or "suite" not in record:
            continue  # a file of another program
        try:
            for case, each in _cases(record):
                moves(each, each)
                found[record["suite"], case] = each
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{place} is no whole record: {error!r}") from None
    if not found:
        raise ValueError(f"{path} holds no record; `clipvip bench --out` writes them")
    return found


def _cases(record: Record) -> Iterator[tuple[str, Record]]:
    """Yield a record after its name, or each point of a sweep after the name of the point."""
    facts = {key: record[key] for key in ("suite", "case", "machine")}
    facts["params"] = record.get("params", {})
    for point in record["points"] if records.is_sweep(record) else [record]:
        name = f"{record['case']} {point['value']}" if records.is_sweep(record) else record["case"]
        left_out = dict(point.get("left_out", {}))
        yield name, facts | {"results": dict(point["results"]), "left_out": left_out}


def moves(before: Record, after: Record) -> list[Move]:
    """Return figures of the contestants that were timed before: ms, MiB, and the ratio if both runs
    have one to the same baseline.

    If a contestant is absent after, its ms are lost, unless a run with other parameters left it out
    on purpose.
    """
    found = []
    comparable = _baseline(before) == _baseline(after)
    for name in before["results"]:
        then = {what: x for what, x in _quantities(before, name) if x.measured}
        if name in after["results"]:
            now = dict(_quantities(after, name))
            shared = [what for what in then if what in now and (comparable or what != "ratio")]
            found += [Move(name, what, then[what], now[what]) for what in shared]
        elif "ms" in then:
            why = after["left_out"].get(name)
            if why is None or before["params"] == after["params"]:
                found.append(Move(name, "ms", then["ms"], LOST, why or "absent"))
    return found


def _baseline(record: Record) -> str | None:
    """Return the contestant that ratios refer to; it is another if the usual one needs too much
    memory."""
    return next((name for name, r in record["results"].items() if r.get("ratio") == 1), None)


def _quantities(record: Record, name: str) -> Iterator[tuple[str, Quantity]]:
    r = record["results"][name]
    yield "ms", interval(r["median_ms"], r["low_ms"], r["high_ms"], r["rounds"])
    if r.get("ratio") is not None and name != _baseline(record):
        # In old records ratios have no quartiles: assume that the baseline's times have no spread.
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
    """Return the machine facts that differ: name → (before, after)."""
    pairs = {key: tuple(r["machine"].get(key) for r in (before, after)) for key in facts}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def regressions(found: list[Move], other: bool, allow: float) -> list[Move]:
    """Return the moves of ours that are worse beyond noise and by more than `allow`.

    other: whether the runs are of different machines; then only ratios are judged.
    """
    by_ratio = {move.contestant for move in found if move.what == "ratio"}

    def judged(move: Move) -> bool:
        if move.lost or move.what == "ratio":
            return True
        return not other and (move.what != "ms" or move.contestant not in by_ratio)

    ours = [move for move in found if records.is_ours(move.contestant)]
    return [move for move in ours if judged(move) and move.worse(allow)]


def gone(before: Run, after: Run, whole: bool) -> list[Key]:
    """Return cases in which ours was measured before and which are absent after, although their
    suite was run.

    whole: whether `after` holds whole suites. Then a suite was run as before if some case has the
    same parameters in both runs; otherwise this holds for a record (a sweep has several cases).
    """

    def part(record: Record) -> Any:
        return records.group(record) if whole else (record["suite"], record["case"])

    both = [key for key in before if key in after]
    ran = {part(before[key]) for key in both if before[key]["params"] == after[key]["params"]}
    return [
        key
        for key, record in before.items()
        if key not in after
        and part(record) in ran
        and any(records.is_ours(move.contestant) for move in moves(record, record))
    ]


def compare(before: Path, after: Path, allow: float) -> tuple[str, int]:
    """Return the text to print, and how many cases have regressed.

    Raises ValueError if a path holds no record, if no case is in both, or if `allow` is negative.
    """
    if not allow >= 0:
        raise ValueError(f"--allow is {allow:g}, expected a share that is not negative (0.1: 10%)")
    runs = load(before), load(after)
    pairs = {key: (runs[0][key], runs[1][key]) for key in runs[0] if key in runs[1]}
    if not pairs:
        raise ValueError(f"{before} and {after} have no case in common")
    lines, bad, still = _heading(list(pairs.values())), 0, 0
    for key, pair in pairs.items():
        shown, regressed = _case(*pair, allow)
        lines += [" ".join(key), *shown] if shown else []
        bad, still = bad + regressed, still + (not shown)
    absent = gone(*runs, whole=after.is_dir())
    lines += [f"{' '.join(key)}: absent in {after}  REGRESSION" for key in absent]
    for name, run, rest in ((before, *runs), (after, *reversed(runs))):
        alone = [" ".join(key) for key in run if key not in rest and key not in absent]
        lines += [f"only in {name}: {', '.join(alone)}"] * bool(alone)
    bad += len(absent)
    lines.append(
        f"{len(pairs)} cases compared, {still} within noise, "
        f"{bad} lost or regressed past {allow:.0%}"
    )
    return "\n".join(lines), bad


def _case(before: Record, after: Record, allow: float) -> tuple[list[str], bool]:
    """Return one line per figure that moved, and whether one of ours has regressed."""
    other, found = bool(differences(before, after, SAME)), moves(before, after)
    past = regressions(found, other, allow)
    shown = [m for m in found if m.moved and (m.lost or m.what == "ratio" or not other)]
    width = max((len(move.contestant) for move in shown), default=0)
    note = {True: "  REGRESSION", False: f"  REGRESSION past {allow:.0%}"}
    lines = [
        f"  {move.contestant:{width}}  {move.what:5}  {move}" + note[move.lost] * (move in past)
        for move in shown
    ]
    judged = {move.what for move in found if records.is_ours(move.contestant)}
    if other and judged and "ratio" not in judged:
        lines.append("  ours is not judged: there is no ratio to the same baseline in both")
    return lines, bool(past)


def _heading(pairs: list[tuple[Record, Record]]) -> list[str]:
    """Return lines with the facts that differ between the machines, and what that means."""
    facts: dict[str, set[tuple]] = {}
    for pair in pairs:
        for key, values in differences(*pair, PRINTED).items():
            facts.setdefault(key, set()).add(values)
    lines = [
        f"{key}: {', '.join(f'{a} → {b}' for a, b in sorted(values, key=str))}"
        for key, values in facts.items()
    ]
    if any(key in SAME for key in facts):
        lines.append("Different machines or settings: only ratios to the baseline are compared.")
    return lines
