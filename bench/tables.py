"""Benchmark records as tables: plain text for a terminal, Markdown for the documentation."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from records import (
    H100,
    OURS,
    SUITES,
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
    shares,
    time_ratio,
)

FACTS = ("cpu", "cores", "threads", "capability", "memory_gib", "gpu", "driver", "cuda", "torch")
# Rows of the table in the README: what is measured, and the suite and case of its record.
SHORT = (
    (
        "attention of one layer, forward and backward (B/16, 2 videos, bf16)",
        "ops proxy_attention-b16-bf16-both-default",
    ),
    (
        "contrastive loss of 16,384 pairs, forward and backward (fp32)",
        "ops pairwise_logsumexp-symmetric-fp32-16384-default",
    ),
    (
        "vision model, forward and backward (B/32, 4 videos, bf16)",
        "model b32-bf16-both-default",
    ),
    ("whole post-pretraining step (B/16, 2 videos, bf16)", "train b16-bf16-default"),
    ("12 frames from a 10 s clip, 720p H.264, one thread", "decode h264-1280x720-10s-one"),
    (
        "one decoded 720p frame to an RGB square of 224, one thread",
        "ops resize_crop-1280x720-default",
    ),
)
LEGEND = (
    "Times are medians; memory is what a call adds at its peak. *ours / eager* is the median of "
    "the ratios of each round; *ours / peer* is the ratio of medians to the fastest other "
    "contestant. Decoding is given in clips per second."
)


# --- figures -------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Return a figure with two or three digits, or "–" if it is unknown."""
    if x is None:
        return "–"
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 0.1 or not x else f"{x:.2g}"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}" if x >= 0.1 else f"{x:.1%}"


def duration(ms: float) -> str:
    """Return a time with its unit, ms or s."""
    return f"{number(ms)} ms" if ms < 1000 else f"{number(ms / 1000)} s"


def rate(result: dict[str, float]) -> float:
    """Return clips per second from a time per clip."""
    return 1e3 / result["median_ms"]


def quartiles(result: dict[str, float]) -> str:
    return f"{number(result['low_ms'])}–{number(result['high_ms'])}"


def columns(record: Record) -> dict[str, str]:
    """Return a record's figures as text by the heading of their column, "–" where unknown."""
    results = record["results"]
    peer, ours = best_peer(results), results.get(OURS)
    eager, best = results.get(baseline(results)), results.get(peer)
    found: dict[str, Any] = {}
    if ours:
        found = {
            "ours ms": ours["median_ms"],
            "host ms": ours.get("host_ms"),
            "ours / eager": time_ratio(ours, eager),
            "ours / peer": ours["median_ms"] / best["median_ms"] if best else None,
            "ours MiB": ours.get("peak_mib"),
            "memory ratio": memory_ratio(ours, eager),
            "clips/s": clips_per_second(record, ours),
        }
    least = (max(floors(record, rates).values(), default=None) for rates in (None, H100))
    found |= dict(zip(("floor ms", "H100 floor ms"), least, strict=True))
    for head, result in (("eager", eager), ("best peer", best)):
        if result:
            found |= {f"{head} ms": result["median_ms"], f"{head} MiB": result.get("peak_mib")}
    text = collections.defaultdict(lambda: "–", {key: number(x) for key, x in found.items()})
    text["best peer"] = peer or ""
    text["ours ms"] = text["ours ms"] if failure(record) is None else "fails"
    if ours:
        text["quartiles"] = quartiles(ours)
        text["of ceiling"] = percent(max(shares(record, ours).values(), default=None))
    return text


def ordered(results: dict[str, dict]) -> list[str]:
    """Return the names of contestants, the baseline first and ours last."""
    first = baseline(results)
    return sorted(results, key=lambda each: (each != first, is_ours(each)))


# --- plain text ----------------------------------------------------------------------------------


def contestants(record: Record) -> str:
    """Return one line per contestant, and one for each that was left out."""
    results = record["results"]
    heads = ["median ms", "quartiles", *(["host ms"] if on_gpu(record) else [])]
    heads += ["clips/s"] * any(clips_per_second(record, r) for r in results.values())
    heads += ["ratio", "of ceiling", "peak MiB", "error"]
    rows = []
    for each, r in results.items():
        cells = {
            "median ms": number(r["median_ms"]),
            "quartiles": quartiles(r),
            "host ms": number(r.get("host_ms")),
            "clips/s": number(clips_per_second(record, r)),
            "ratio": number(r["ratio"]),
            "of ceiling": percent(max(shares(record, r).values(), default=None)),
            "peak MiB": number(r["peak_mib"]),
            "error": f"{r['error']:.1e}",
        }
        rows.append([each, *(cells[head] for head in heads)])
    left_out = [f"left out: {each} ({why})" for each, why in record.get("left_out", {}).items()]
    return "\n".join([_aligned(heads, rows), *left_out])


ON_CPU = "eager ms|best peer ms|ours ms|quartiles|ours / eager|ours / peer|of ceiling"
ON_GPU = "eager ms|best peer ms|ours ms|host ms|ours / eager|ours / peer|floor ms|H100 floor ms"
ON_GPU += "|of ceiling|clips/s"


def summary(records: Sequence[Record]) -> str:
    """Return one line per case, ours against the baseline and the best peer, and who was left
    out. Cases of a CPU and of a GPU have tables of their own."""
    parts = []
    for heads, kind in ((ON_CPU, False), (ON_GPU, True)):
        alike = [record for record in records if on_gpu(record) == kind]
        shown = f"{heads}|eager MiB|ours MiB|best peer".split("|")
        rows = []
        for record in alike:
            text = columns(record)
            rows.append([f"{record['suite']} {record['case']}", *(text[head] for head in shown)])
        parts += [_aligned(shown, rows)] * bool(rows)
    together: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    absent = (each for record in records for each in record.get("left_out", {}).items())
    for (each, reason), count in collections.Counter(absent).items():
        together[reason, count].append(each)
    parts += [
        f"left out of {count} of {len(records)} cases: {', '.join(names)} ({reason})"
        for (reason, count), names in together.items()
    ]
    return "\n".join(parts)


def _aligned(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table with columns as wide as needed; text at both ends is aligned to the left."""
    lines = [["", *heads], *rows]
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

LONG_CPU = "ours / eager|ours / peer|eager MiB|ours MiB|memory ratio|of ceiling"
LONG_GPU = "host ms|ours / eager|ours / peer|floor ms|H100 floor ms|of ceiling"
LONG_GPU += "|eager MiB|ours MiB|memory ratio"


def short(records: Iterable[Record]) -> str:
    """Return the README's table: one row for each of SHORT that was measured, and below it the
    machine, the dates and the command."""
    found = {f"{record['suite']} {record['case']}": record for record in records}
    shown = [(title, found[case]) for title, case in SHORT if case in found]
    if not shown:
        raise ValueError(f"none of the {len(SHORT)} cases of the README's table was measured")
    rows = []
    for title, record in shown:
        text, results = columns(record), record["results"]
        peer = best_peer(results)
        times = {each: duration(r["median_ms"]) for each, r in results.items()}
        other = f"{times[peer]} ({peer})" if peer else "–"
        ours = f"**{times[OURS]}**" if failure(record) is None else "**fails**"
        eager = times.get(baseline(results) or "", "–")
        rows.append([title, eager, other, ours, text["ours / eager"], text["memory ratio"]])
    heads = "|eager|best other|ours|time, ours / eager|memory, ours / eager"
    machines_of = [record["machine"] for _, record in shown]
    facts = {
        f"{m.get('gpu') or m['cpu']}, {m['cores']} cores, torch {m['torch']}": None
        for m in machines_of
    }
    dates = sorted({m["date"] for m in machines_of})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"{markdown_table(heads.split('|'), rows)}\n\n"
        f"Measured {when} on {' and '.join(facts)}, by `clipvip bench`."
    )


def markdown(records: Sequence[Record]) -> str:
    """Return all tables: one row per case with eager, the best peer and ours side by side."""
    parts = [LEGEND]
    for title in dict.fromkeys(map(group, records)):
        inside = [r for r in records if group(r) == title]
        timed = [r for r in inside if not is_sweep(r)]
        grown = [r for r in inside if is_sweep(r)]
        subject = title.removesuffix(", GPU")
        parts.append(f"### {title.replace(subject, heading(subject))}")
        if grown:
            parts.append(
                markdown_table(["case", "eager", "best peer", "ours"], map(_growth, grown))
            )
        elif is_rate(timed[0]):
            names = list(dict.fromkeys(c for r in timed for c in ordered(r["results"])[::-1]))
            lines = [
                [
                    name(r),
                    *(number(rate(r["results"][c])) if c in r["results"] else "–" for c in names),
                ]
                for r in timed
            ]
            parts.append(markdown_table(["case", *names], lines))
        else:
            heads = (LONG_GPU if on_gpu(timed[0]) else LONG_CPU).split("|")
            lines = [_line(r, heads) for r in timed]
            parts.append(
                markdown_table(["case", "eager ms", "best peer ms", "ours ms", *heads], lines)
            )
    parts.append("### Machines")
    for row in machines(records):
        facts = {k: v for k, v in row.items() if k not in ("suites", "load before")}
        parts.append("; ".join(f"{key} {value}" for key, value in facts.items()) + ".")
    return "\n\n".join(parts)


def heading(subject: str) -> str:
    """Return the heading of a suite, or of an operation, whose name is its heading."""
    return SUITES[subject].title if subject in SUITES else subject


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _line(record: Record, heads: Sequence[str]) -> list[str]:
    text = columns(record)
    peer, ours = text["best peer"], text["ours ms"]
    return [
        name(record),
        text["eager ms"],
        f"{text['best peer ms']} ({peer})" if peer else "–",
        ours if ours == "–" else f"**{ours}**",
        *(text[head] for head in heads),
    ]


def _growth(record: Record) -> list[str]:
    """Exponents of time and memory; the peer is the fastest one at the largest value."""
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


def machines(records: Iterable[Record]) -> list[dict[str, str]]:
    """Return one row per machine: its facts, the rates it reaches, what it measured and when."""
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
            rates = [r["machine"].get("ceilings", {}).get(key) for r in alike]
            row |= _range(head, filter(None, rates))
        row |= _range(
            "load before", (r["machine"]["load"] for r in alike if "load" in r["machine"])
        )
        for key in ("date", "commit"):
            row[key] = ", ".join(sorted({r["machine"].get(key) or "unknown" for r in alike}))
        row["suites"] = ", ".join(dict.fromkeys(r["suite"] for r in alike))
        rows.append(row)
    return rows


def _range(head: str, figures: Iterable[float]) -> dict[str, str]:
    """Return the smallest and the largest figure under a heading, or nothing if there are none."""
    found = list(figures)
    ends = dict.fromkeys((number(min(found)), number(max(found)))) if found else {}
    return {head: "–".join(ends)} if ends else {}
