"""Benchmark records as tables: plain text for a terminal, Markdown for a README."""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from records import (
    H100,
    OURS,
    Record,
    baseline,
    best_peer,
    clips_per_second,
    exponents,
    failure,
    floors,
    group,
    is_ours,
    is_rate,
    is_sweep,
    memory_ratio,
    name,
    on_gpu,
    read,
    replace,
    shares,
    time_ratio,
)

MARKS = ("<!-- measured: written by bench/report.py -->", "<!-- end of measured -->")
FACTS = ("cpu", "cores", "threads", "capability", "memory_gib", "gpu", "driver", "cuda", "torch")


# --- figures -------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three digits or so."""
    if x is None:
        return "–"
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 0.1 or not x else f"{x:.2g}"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}" if x >= 0.1 else f"{x:.1%}"


def rate(result: dict[str, float]) -> float:
    """Clips per second, of a time per clip."""
    return 1e3 / result["median_ms"]


class Case:
    """A record's figures as text, "–" for those that are unknown."""

    def __init__(self, record: Record) -> None:
        results = record["results"]
        self.record, self.ours = record, results.get(OURS)
        self.peer = best_peer(results)
        self.eager, self.best = results.get(baseline(results)), results.get(self.peer)

    def _ours(self, figure: Callable[[dict[str, Any]], float | None]) -> float | None:
        return figure(self.ours) if self.ours else None

    def time(self, result: dict[str, Any] | None) -> str:
        return number(result and result["median_ms"])

    def memory(self, result: dict[str, Any] | None) -> str:
        return number(result and result.get("peak_mib"))

    @property
    def host(self) -> str:
        return number(self._ours(lambda ours: ours.get("host_ms")))

    @property
    def over_eager(self) -> str:
        return number(self._ours(lambda ours: time_ratio(ours, self.eager)))

    @property
    def over_peer(self) -> str:
        if not self.ours or not self.best:
            return number(None)
        return number(self.ours["median_ms"] / self.best["median_ms"])

    @property
    def memory_over_eager(self) -> str:
        return number(self._ours(lambda ours: memory_ratio(ours, self.eager)))

    @property
    def of_ceiling(self) -> str:
        return percent(
            self._ours(lambda ours: max(shares(self.record, ours).values(), default=None))
        )

    def floor(self, ceilings: dict[str, float] | None = None) -> str:
        return number(max(floors(self.record, ceilings).values(), default=None))

    @property
    def clips(self) -> str:
        return number(self._ours(lambda ours: clips_per_second(self.record, ours)))


# --- plain text ----------------------------------------------------------------------------------


def contestants(record: Record) -> str:
    """A line per contestant, and a line for each that was left out."""
    on_host = on_gpu(record)
    of_clips = any(clips_per_second(record, r) for r in record["results"].values())
    lines = [
        f"{'':30}{'median ms':>11}{'quartiles':>20}"
        + f"{'host ms':>9}" * on_host
        + f"{'clips/s':>9}" * of_clips
        + f"{'ratio':>8}{'of ceiling':>12}{'peak MiB':>10}{'error':>10}"
    ]
    for each, r in record["results"].items():
        quartiles = f"{number(r['low_ms'])}–{number(r['high_ms'])}"
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}"
        part = percent(max(shares(record, r).values(), default=None))
        lines.append(
            f"{each:30}{number(r['median_ms']):>11}{quartiles:>20}"
            + f"{number(r.get('host_ms')):>9}" * on_host
            + f"{number(clips_per_second(record, r)):>9}" * of_clips
            + f"{ratio:>8}{part:>12}{r['peak_mib']:10.1f}{r['error']:10.1e}"
        )
    lines += [f"left out: {each} ({why})" for each, why in record.get("left_out", {}).items()]
    return "\n".join(lines)


def summary(records: Sequence[Record]) -> str:
    """A line per case: ours against the baseline and the best peer; a GPU's with both floors."""
    parts = []
    for kind in (False, True):
        alike = [record for record in records if on_gpu(record) == kind]
        if alike:
            parts.append(_gpu_summary(alike) if kind else _cpu_summary(alike))
    absent = collections.Counter(
        each for record in records for each in record.get("left_out", {}).items()
    )
    together: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for (each, reason), count in absent.items():
        together[reason, count].append(each)
    parts += [
        f"left out of {count} of {len(records)} cases: {', '.join(names)} ({reason})"
        for (reason, count), names in together.items()
    ]
    return "\n".join(parts)


def _cpu_summary(records: Sequence[Record]) -> str:
    heads = "eager ms|best peer ms|ours ms|quartiles|/ eager|/ peer|of ceiling|eager MiB|ours MiB"
    rows = []
    for record in records:
        case = Case(record)
        quartiles = "–"
        if case.ours:
            quartiles = f"{number(case.ours['low_ms'])}–{number(case.ours['high_ms'])}"
        cells = [case.time(case.eager), case.time(case.best), _ours(case), quartiles]
        cells += [case.over_eager, case.over_peer, case.of_ceiling]
        rows.append([*cells, case.memory(case.eager), case.memory(case.ours), case.peer or ""])
    return _aligned(records, [*heads.split("|"), "best peer"], rows)


def _gpu_summary(records: Sequence[Record]) -> str:
    heads = "eager ms|best peer ms|ours ms|host ms|/ eager|/ peer|floor ms|H100 floor|of ceiling"
    heads += "|clips/s|eager MiB|ours MiB|best peer"
    rows = []
    for record in records:
        case = Case(record)
        cells = [case.time(case.eager), case.time(case.best), _ours(case), case.host]
        cells += [case.over_eager, case.over_peer, case.floor(), case.floor(H100)]
        cells += [case.of_ceiling, case.clips, case.memory(case.eager), case.memory(case.ours)]
        rows.append([*cells, case.peer or ""])
    return _aligned(records, heads.split("|"), rows)


def _ours(case: Case) -> str:
    return case.time(case.ours) if failure(case.record) is None else "fails"


def _aligned(records: Sequence[Record], heads: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need, the last one to the left."""
    titles = [f"{record['suite']} {record['case']}" for record in records]
    lines = [["", *heads], *([title, *row] for title, row in zip(titles, rows, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [
                f"{line[0]:{widths[0]}}",
                *(f"{cell:>{w}}" for cell, w in zip(line[1:-1], widths[1:-1], strict=True)),
                line[-1],
            ]
        ).rstrip()
        for line in lines
    )


# --- Markdown ------------------------------------------------------------------------------------


def markdown(directory: Path) -> str:
    """Tables for a README: a line per case, eager, the best peer and ours side by side."""
    records, _ = read(directory)
    parts = []
    for title in dict.fromkeys(map(group, records)):
        inside = [r for r in records if group(r) == title]
        timed = [r for r in inside if not is_sweep(r)]
        grown = [r for r in inside if is_sweep(r)]
        if grown:
            heads = [title, "eager", "best peer", "ours"]
            parts.append(_markdown(heads, map(_growth, grown)))
        elif is_rate(timed[0]):
            names = list(dict.fromkeys(c for r in timed for c in ordered(r["results"])[::-1]))
            lines = [
                [
                    name(r),
                    *(number(rate(r["results"][c])) if c in r["results"] else "–" for c in names),
                ]
                for r in timed
            ]
            parts.append(_markdown([f"{title}, clips/s", *names], lines))
        elif on_gpu(timed[0]):
            heads = "eager ms|best peer ms|ours ms|host ms|× eager|× peer|floor ms|H100 floor ms"
            heads = [title, *heads.split("|"), "of ceiling", "eager MiB", "ours MiB", "× eager"]
            parts.append(_markdown(heads, map(_gpu_line, timed)))
        else:
            heads = "eager ms, best peer ms, ours ms, × eager, × peer, eager MiB, ours MiB, × eager"
            heads = [title, *heads.split(", "), "of ceiling"]
            parts.append(_markdown(heads, map(_line, timed)))
    for row in machines(records):
        facts = {k: v for k, v in row.items() if k not in ("suites", "load before")}
        parts.append("; ".join(f"{key} {value}" for key, value in facts.items()) + ".")
    return "\n\n".join(parts)


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _times(case: Case) -> list[str]:
    ours = _ours(case)
    return [
        name(case.record),
        case.time(case.eager),
        f"{case.time(case.best)} ({case.peer})" if case.best else "–",
        ours if ours == "–" else f"**{ours}**",
    ]


def _line(record: Record) -> list[str]:
    case = Case(record)
    memory = [case.memory(case.eager), case.memory(case.ours), case.memory_over_eager]
    return [*_times(case), case.over_eager, case.over_peer, *memory, case.of_ceiling]


def _gpu_line(record: Record) -> list[str]:
    case = Case(record)
    memory = [case.memory(case.eager), case.memory(case.ours), case.memory_over_eager]
    floor = [case.floor(), case.floor(H100), case.of_ceiling]
    return [*_times(case), case.host, case.over_eager, case.over_peer, *floor, *memory]


def _growth(record: Record) -> list[str]:
    """Exponents of time and memory; the peer is the one that is quickest at the largest value."""
    if not record.get("points"):
        return [name(record), "–", "–", "**fails**"]
    found, last = exponents(record), record["points"][-1]["results"]
    eager = baseline(found)
    cells = [f"{name(record)}, {record['points'][0]['value']} … {record['points'][-1]['value']}"]
    for each in (eager, best_peer(last), OURS):
        grown = found.get(each or "", {})
        cell = f"time {number(grown.get('time'))}, memory {number(grown.get('memory'))}"
        cells.append(cell + (f" ({each})" if each not in (eager, OURS) else "") if grown else "–")
    return cells


def ordered(results: dict[str, dict]) -> list[str]:
    """The baseline first, ours last."""
    first = baseline(results)
    return sorted(results, key=lambda each: (each != first, is_ours(each)))


def machines(records: Iterable[Record]) -> list[dict[str, str]]:
    """A row per machine: its facts, what it can do at best, and when and what it measured."""
    kinds: dict[tuple, list[Record]] = collections.defaultdict(list)
    for record in records:
        kinds[tuple(str(record["machine"].get(fact, "")) for fact in FACTS)].append(record)
    rows = []
    for facts, alike in kinds.items():
        row = {fact: each for fact, each in zip(FACTS, facts, strict=True) if each}
        for head, key in (
            ("fp32 product, GFLOP/s", "matmul_fp32_gflops"),
            ("bf16 product, GFLOP/s", "matmul_bf16_gflops"),
            ("copy, GiB/s", "copy_gib_s"),
        ):
            found = [r["machine"]["ceilings"][key] for r in alike if _has(r, key)]
            if found:
                row[head] = "–".join(dict.fromkeys(map(number, (min(found), max(found)))))
        loads = [r["machine"]["load"] for r in alike if "load" in r["machine"]]
        if loads:
            row["load before"] = "–".join(dict.fromkeys(map(number, (min(loads), max(loads)))))
        for key in ("date", "commit"):
            row[key] = ", ".join(sorted({r["machine"].get(key) or "unknown" for r in alike}))
        row["suites"] = ", ".join(dict.fromkeys(r["suite"] for r in alike))
        rows.append(row)
    return rows


def _has(record: Record, ceiling: str) -> bool:
    return bool(record["machine"].get("ceilings", {}).get(ceiling))


def put_into(readme: Path, table: str) -> None:
    """Replaces what stands between the two marks of a file."""
    before, after = around(readme)
    replace(readme, f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")


def around(readme: Path) -> tuple[str, str]:
    """A file's text before the first mark and after the second."""
    parts = re.split("|".join(map(re.escape, MARKS)), readme.read_text())
    if len(parts) != 3:
        raise ValueError(f"{readme} does not hold the lines {MARKS[0]} and {MARKS[1]} once each")
    return parts[0], parts[2]
