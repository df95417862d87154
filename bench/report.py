"""A page and a Markdown table of what a directory of benchmark records says.

    python bench/report.py [DIR]               writes DIR/report.html and DIR/report.md
    python bench/report.py --readme README.md  also puts the table between README's two marks

A record is a file SUITE-CASE.json; other files are named and left alone. The page is one file that
needs no server and no network: pictures are SVG inside it, and tables sort by a click on a heading.
"""

import argparse
import collections
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
MARKS = ("<!-- measured: written by bench/report.py -->", "<!-- end of measured -->")
SUITES = {
    "ops": "Operations",
    "model": "Vision model",
    "train": "Training step",
    "decode": "Decoding",
    "growth": "Growth",
}
BASELINES, OURS = ("eager", "naive"), "ours"
FACTS = ("cpu", "cores", "threads", "capability", "memory_gib", "gpu", "driver", "cuda", "torch")

Record = dict[str, Any]


# --- what records say ----------------------------------------------------------------------------


def read(directory: Path) -> tuple[list[Record], list[str]]:
    """The records of a directory in the order they are shown, and the names of other files."""
    records, others = [], []
    for path in sorted(directory.glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it or measure again") from None
        if isinstance(record, dict) and {"suite", "case", "results", "machine"} <= record.keys():
            records.append(record)
        else:
            others.append(path.name)
    if not records:
        raise ValueError(f"{directory} holds no benchmark records; `clipvip bench` makes some")
    order = [*SUITES, *sorted({r["suite"] for r in records} - SUITES.keys())]
    records.sort(key=lambda r: (order.index(r["suite"]), natural(r["case"]), malloc(r)))
    return records, others


def natural(text: str) -> list:
    """A key that sorts 2 before 16."""
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", text)]


def malloc(record: Record) -> str:
    return record["machine"].get("malloc", "default")


def group(record: Record) -> str:
    """What a record stands under: its op in the suite of the ops, otherwise its suite."""
    return record["case"].split("-")[0] if record["suite"] == "ops" else record["suite"]


def name(record: Record) -> str:
    """The case within its group."""
    return record["case"].removeprefix(f"{group(record)}-").removesuffix("-default")


def is_sweep(record: Record) -> bool:
    return "points" in record


def is_rate(record: Record) -> bool:
    """Whether clips a second are what is compared."""
    return record["suite"] == "decode"


def baseline(results: dict[str, dict]) -> str | None:
    return next((each for each in BASELINES if each in results), None)


def is_ours(contestant: str) -> bool:
    """ "ours", or a variant such as "ours by DALI"."""
    return contestant.split(" ")[0] == OURS


def best_peer(results: dict[str, dict]) -> str | None:
    """Who is quickest of all but the baseline and ours."""
    peers = [each for each in results if each not in BASELINES and not is_ours(each)]
    return min(peers, key=lambda each: results[each]["median_ms"], default=None)


def time_ratio(result: dict, eager: dict | None) -> float | None:
    """Of one round's times, over all rounds; of medians where rounds were not kept."""
    if result.get("ratio") is not None or eager is None:
        return result.get("ratio")
    return result["median_ms"] / eager["median_ms"]


def memory_ratio(result: dict, eager: dict | None) -> float | None:
    """None where either took too little to be seen."""
    figures = (result.get("peak_mib"), eager.get("peak_mib") if eager else None)
    return figures[0] / figures[1] if all(figures) else None


def shares(record: Record, result: dict[str, float]) -> dict[str, float]:
    """Of the rates that the machine reached in a product and in a copy, what a contestant did."""
    ceilings, work = record["machine"].get("ceilings", {}), record.get("work", {})
    low = {str(each) for each in record.get("params", {}).values()} & {"bfloat16", "bf16"}
    seconds = result["median_ms"] / 1e3
    found = {}
    rate = ceilings.get("matmul_bf16_gflops" if low else "matmul_fp32_gflops")
    if rate and "flop" in work:
        found["product"] = work["flop"] / seconds / (rate * 1e9)
    if ceilings.get("copy_gib_s") and "bytes" in work:
        found["copy"] = work["bytes"] / seconds / (ceilings["copy_gib_s"] * 2**30)
    return found


class Fit(NamedTuple):
    """figure ≈ factor · value ^ exponent, over the larger half of the values."""

    exponent: float
    factor: float
    first: float  # the least value that was fitted


def fit(values: Sequence[float], figures: Sequence[float]) -> Fit | None:
    """Least squares of logarithms; None where fewer than two figures are above zero."""
    pairs = sorted((v, f) for v, f in zip(values, figures, strict=True) if f > 0)
    pairs = pairs[min(len(pairs) // 2, len(pairs) - 2) :] if len(pairs) > 1 else []
    if not pairs:
        return None
    x, y = ([math.log(each) for each in column] for column in zip(*pairs, strict=True))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - middle_x) ** 2 for a in x)
    return Fit(slope, math.exp(middle_y - slope * middle_x), pairs[0][0])


def series(record: Record, figure: str) -> dict[str, tuple[list[float], list[float]]]:
    """Of a sweep's record: for each contestant the values it was timed at, and its figures."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in record["points"]:
        for each, result in point["results"].items():
            values, figures = found.setdefault(each, ([], []))
            values.append(point["value"])
            figures.append(result[figure])
    return found


def exponents(record: Record) -> dict[str, dict[str, float | None]]:
    """Of a sweep's record: how time and memory of each contestant grow."""
    found: dict[str, dict[str, float | None]] = collections.defaultdict(dict)
    for kind, figure in (("time", "median_ms"), ("memory", "peak_mib")):
        for each, line in series(record, figure).items():
            fitted = fit(*line)
            found[each][kind] = fitted.exponent if fitted else None
    return dict(found)


# --- figures as text -----------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three digits or so."""
    if x is None:
        return "–"
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}" if x >= 0.1 else f"{x:.1%}"


def machines(records: Iterable[Record]) -> list[dict[str, str]]:
    """A row a machine: its facts, what it can do at best, and when and what it measured."""
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


# --- Markdown ------------------------------------------------------------------------------------


def markdown(directory: Path) -> str:
    """Tables for a README: a line a case, eager, the best peer and ours side by side."""
    records, _ = read(directory)
    parts = []
    for title in dict.fromkeys(map(group, records)):
        inside = [r for r in records if group(r) == title]
        timed = [r for r in inside if not is_sweep(r)]
        grown = [r for r in inside if is_sweep(r)]
        if grown:
            heads = ["growth", "eager", "best peer", "ours"]
            parts.append(_markdown(heads, map(_growth, grown)))
        elif is_rate(timed[0]):
            names = list(dict.fromkeys(c for r in timed for c in _order(r["results"])[::-1]))
            lines = [
                [
                    name(r),
                    *(number(rate(r["results"][c])) if c in r["results"] else "–" for c in names),
                ]
                for r in timed
            ]
            parts.append(_markdown([f"{title}, clips/s", *names], lines))
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


def _line(record: Record) -> list[str]:
    results = record["results"]
    eager, peer = results.get(baseline(results)), best_peer(results)
    ours = results.get(OURS)
    best = results.get(peer)
    return [
        name(record),
        number(eager["median_ms"]) if eager else "–",
        f"{number(best['median_ms'])} ({peer})" if best else "–",
        f"**{number(ours['median_ms'])}**" if ours else "–",
        number(time_ratio(ours, eager)) if ours else "–",
        number(ours["median_ms"] / best["median_ms"]) if ours and best else "–",
        number(eager["peak_mib"]) if eager else "–",
        number(ours["peak_mib"]) if ours else "–",
        number(memory_ratio(ours, eager)) if ours else "–",
        percent(max(shares(record, ours).values(), default=None)) if ours else "–",
    ]


def _growth(record: Record) -> list[str]:
    """Exponents of time and memory; the peer is the one that is quickest at the largest value."""
    found, last = exponents(record), record["points"][-1]["results"]
    eager = baseline(found)
    cells = [f"{name(record)}, {record['points'][0]['value']} … {record['points'][-1]['value']}"]
    for each in (eager, best_peer(last), OURS):
        grown = found.get(each or "", {})
        cell = f"time {number(grown.get('time'))}, memory {number(grown.get('memory'))}"
        cells.append(cell + (f" ({each})" if each not in (eager, OURS) else "") if grown else "–")
    return cells


def rate(result: dict[str, float]) -> float:
    """Clips a second."""
    return 1e3 / result["median_ms"]


def put_into(readme: Path, table: str) -> None:
    """Replaces what stands between the two marks of a file."""
    before, after = around(readme)
    _replace(readme, f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")


def around(readme: Path) -> tuple[str, str]:
    """A file's text before the first mark and after the second."""
    parts = re.split("|".join(map(re.escape, MARKS)), readme.read_text())
    if len(parts) != 3:
        raise ValueError(f"{readme} does not hold the lines {MARKS[0]} and {MARKS[1]} once each")
    return parts[0], parts[2]


# --- the page ------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff;
  --line: #d5dae0; --head: #f2f4f7; --ours: #d9480f14; --accent: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #9aa4af; --paper: #14171b;
  --line: #363c44; --head: #20252b; --ours: #ff8a4c1f; --accent: #ff9d66; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 80rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.6rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin-bottom: .3rem; }
a { color: var(--accent); } nav a { margin-right: 1rem; } p, li { max-width: 52rem; }
small, figcaption, .why { color: var(--soft); font-size: .87rem; }
.wide { overflow-x: auto; } .why { margin: .8rem 0 1.4rem; } .why ul { margin: .2rem 0; }
 figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); } th.text, td.text { text-align: left; }
th { background: var(--head); font-weight: 600; vertical-align: bottom; }
.sortable th { cursor: pointer; } th[aria-sort=ascending]::after { content: " ↑"; }
th[aria-sort=descending]::after { content: " ↓"; }
tr.ours td { background: var(--ours); font-weight: 600; } tr.first td { border-top: 2px solid
  var(--line); }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const numeric = head.className !== "text";
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!numeric) return (down ? -1 : 1) * x.localeCompare(y, undefined, {numeric: true});
        if (x === "" || y === "") return (x === "") - (y === "");  // nothing comes last
        return (down ? -1 : 1) * (x - y);
      });
      for (const row of rows) row.classList.remove("first");
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
"""


class Cell(NamedTuple):
    """Of a table: what is read, and what is sorted by (None: the text)."""

    text: str
    value: float | None = None


Row = tuple[str, list["Cell | str"]]  # class names, cells: a str is text, a Cell a number


def table(heads: Sequence[str], rows: Iterable[Row], *, sortable: bool = True) -> str:
    """A column is of text where its first cell is a str."""
    rows = list(rows)
    kinds = [" class='text'" if isinstance(cell, str) else "" for cell in rows[0][1]]
    parts = [f"<div class='wide'><table{' class=sortable' if sortable else ''}><thead><tr>"]
    parts += [f"<th{k}>{html.escape(h)}</th>" for h, k in zip(heads, kinds, strict=True)]
    parts.append("</tr></thead><tbody>")
    for classes, cells in rows:
        parts.append(f"<tr class='{classes}'>" if classes else "<tr>")
        for cell in cells:
            if isinstance(cell, str):
                parts.append(f"<td class='text'>{html.escape(cell)}</td>")
            else:
                value = "" if cell.value is None else f"{cell.value:.6g}"
                parts.append(f"<td data-value='{value}'>{html.escape(cell.text)}</td>")
        parts.append("</tr>")
    return "".join([*parts, "</tbody></table></div>"])


def page(records: list[Record], others: list[str], source: str) -> str:
    """The whole report as one HTML file."""
    suites = list(dict.fromkeys(record["suite"] for record in records))
    draw = Pictures()
    sections, links = [], []
    for suite in suites:
        title = SUITES.get(suite, suite)
        links.append(f"<a href='#{html.escape(suite)}'>{html.escape(title)}</a>")
        sections.append(f"<h2 id='{html.escape(suite)}'>{html.escape(title)}</h2>")
        inside = [record for record in records if record["suite"] == suite]
        titles = list(dict.fromkeys(map(group, inside)))
        for title in titles:
            if titles != [suite]:
                sections.append(f"<h3>{html.escape(title)}</h3>")
            sections += section([record for record in inside if group(record) == title], draw)
    rows = machines(records)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    facts: list[Row] = [("", [head, *(row.get(head, "–") for row in rows)]) for head in heads]
    columns = ["", *(f"machine {i + 1}" if len(rows) > 1 else "machine" for i in range(len(rows)))]
    parts = [
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>clipvip benchmarks</title><style>{STYLE}</style></head><body>",
        "<h1>clipvip benchmarks</h1>",
        f"<p>{len(records)} records of {html.escape(source)}. Every "
        "contestant was held against a reference before it was timed; contestants took turns, a "
        "call each a round. Times are medians with quartiles; memory is what a call adds at its "
        "peak. <b>× eager</b> is the median over rounds of a time over that of the authors' eager "
        "form in the same round, <b>× best peer</b> the ratio of medians to the quickest of the "
        "others. Below 1 is less time or memory. <b>Of products</b> and <b>of copies</b> are the "
        "operations and bytes that the work needs at least, a second, as shares of what this "
        "machine reached in a large matrix product and in a large copy.</p>",
        f"<nav>{' '.join(links)} <a href='#machine'>Machine</a></nav>",
        *sections,
        "<h2 id='machine'>Machine</h2>",
        table(columns, facts, sortable=False),
    ]
    if others:
        names = ", ".join(f"<code>{html.escape(other)}</code>" for other in others)
        parts.append(f"<p><small>Not benchmark records, so not shown here: {names}.</small></p>")
    return "\n".join([*parts, f"<script>{SCRIPT}</script></body></html>\n"])


def section(records: list[Record], draw: "Pictures") -> list[str]:
    """One op or suite: pictures, a table, and who was left out."""
    parts = []
    timed = [record for record in records if not is_sweep(record)]
    if timed and is_rate(timed[0]):
        parts += [figure(draw.rates(timed), "Clips a second, quartiles as lines.")]
        heads = "case|contestant|clips/s|ms a clip|quartiles|× naive|× best peer|peak MiB|error"
        parts.append(table(heads.split("|"), _decoded(timed)))
    elif timed:
        for allocator in sorted(set(map(malloc, timed))):
            alike = [record for record in timed if malloc(record) == allocator]
            caption = (
                "Time and peak memory as multiples of the eager form's, on a logarithmic axis: "
            )
            caption += f"left of 1 is less. With {allocator} malloc."
            parts.append(figure(draw.bars(alike), caption))
        heads = "case|contestant|median ms|quartiles|× eager|× best peer|peak MiB|memory × eager"
        parts.append(
            table([*heads.split("|"), "of products", "of copies", "error"], _compared(timed))
        )
    parts += left_out(timed)
    for record in (r for r in records if is_sweep(r)):
        over = record["sweep"]["over"]
        parts.append(f"<h3>{html.escape(name(record))}</h3>")
        parts.append(f"<p class='why'>{html.escape(described(record))}</p>")
        caption = f"Dashed: the power of {over} that fits the larger half best."
        parts.append(figure(draw.growth(record), caption))
        heads = "contestant|time grows as|memory grows as|from|ms|MiB|to|ms|MiB"
        parts.append(table(heads.split("|"), _grown(record)))
        parts += left_out([record])
    return parts


def figure(drawn: str, caption: str) -> str:
    caption = html.escape(caption)
    return f"<figure class='wide'>{drawn}<figcaption>{caption}</figcaption></figure>"


def described(record: Record) -> str:
    """What a sweep keeps as it is."""
    params = record["params"]
    kept = {k: v for k, v in params.get("fixed", {}).items() if isinstance(v, str | int | float)}
    facts = [key if value is True else f"{key} {value}" for key, value in kept.items()]
    return ", ".join([*filter(None, [params.get("op"), params.get("device")]), *facts])


def left_out(records: list[Record]) -> list[str]:
    """Who was not timed and why, cases with the same reason together."""
    reasons: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for record in records:
        for point in record.get("points", [record]):
            value = f"{record['sweep']['over']} {point['value']}" if "value" in point else ""
            for each, why in point.get("left_out", {}).items():
                reasons[each, why].append(value or name(record))
    if not reasons:
        return []
    items = []
    for (each, why), cases in reasons.items():
        where = f"{len(cases)} cases" if len(cases) > 6 else ", ".join(cases)
        items.append(
            f"<li><b>{html.escape(each)}</b> ({html.escape(where)}): {html.escape(why)}</li>"
        )
    return [f"<div class='why'>Left out:<ul>{''.join(items)}</ul></div>"]


def _order(results: dict[str, dict]) -> list[str]:
    """The baseline first, ours last."""
    return sorted(results, key=lambda each: (each not in BASELINES, is_ours(each)))


def _classes(each: str, index: int) -> str:
    return " ".join(["ours"] * is_ours(each) + ["first"] * (index == 0))


def _compared(records: list[Record]) -> Iterable[Row]:
    for record in records:
        results = record["results"]
        eager, best = results.get(baseline(results)), results.get(best_peer(results))
        for i, each in enumerate(_order(results)):
            r, share = results[each], shares(record, results[each])
            figures = (
                time_ratio(r, eager),
                r["median_ms"] / best["median_ms"] if best else None,
                r.get("peak_mib"),
                memory_ratio(r, eager),
            )
            yield (
                _classes(each, i),
                [
                    name(record),
                    each,
                    *_timing(r),
                    *(Cell(number(x), x) for x in figures),
                    *(Cell(percent(x), x) for x in map(share.get, ("product", "copy"))),
                    _error(r),
                ],
            )


def _decoded(records: list[Record]) -> Iterable[Row]:
    for record in records:
        results = record["results"]
        naive, best = results.get(baseline(results)), results.get(best_peer(results))
        for i, each in enumerate(_order(results)):
            r = results[each]
            figures = (
                time_ratio(r, naive),
                r["median_ms"] / best["median_ms"] if best else None,
                r.get("peak_mib"),
            )
            yield (
                _classes(each, i),
                [
                    name(record),
                    each,
                    Cell(number(rate(r)), rate(r)),
                    *_timing(r),
                    *(Cell(number(x), x) for x in figures),
                    _error(r),
                ],
            )


def _timing(r: dict[str, float]) -> list[Cell | str]:
    quartiles = f"{number(r['low_ms'])}–{number(r['high_ms'])}"
    return [Cell(number(r["median_ms"]), r["median_ms"]), Cell(quartiles, r["low_ms"])]


def _error(r: dict[str, float]) -> Cell:
    error = r.get("error")
    return Cell("–" if error is None else f"{error:.0e}", error)


def _grown(record: Record) -> Iterable[Row]:
    over, found = record["sweep"]["over"], exponents(record)
    times, memories = series(record, "median_ms"), series(record, "peak_mib")
    for i, each in enumerate(_order(found)):
        (values, ms), (_, mib) = times[each], memories[each]
        powers = [found[each][kind] for kind in ("time", "memory")]
        yield (
            _classes(each, i),
            [
                each,
                *(Cell("–" if x is None else f"{over}^{x:.2f}", x) for x in powers),
                *(
                    Cell(number(x) if x != value else f"{value:g}", x)
                    for end in (0, -1)
                    for value in [values[end]]
                    for x in (value, ms[end], mib[end])
                ),
            ],
        )


# --- pictures ------------------------------------------------------------------------------------

INK, SOFT = "#010203", "#030201"  # stand for the page's own colours in matplotlib's SVG
COLOURS = {OURS: "#e8590c", "eager": "#868e96", "naive": "#868e96"}
PEERS = ("#228be6", "#12b886", "#be4bdb", "#f2b705", "#15aabf", "#fa5252", "#82c91e", "#7950f2")


class Pictures:
    """Draws with matplotlib; a contestant has one colour on the whole page."""

    def __init__(self) -> None:
        try:
            import matplotlib
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "report.html needs matplotlib: pip install 'clipvip[bench]'"
            ) from None
        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        self.plt, self.count, self.colours = plt, 0, dict(COLOURS)
        text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
        self.style = text | {
            "axes.edgecolor": SOFT,
            "grid.color": SOFT,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "clipvip",  # the same records make the same page
            "figure.constrained_layout.use": True,
        }

    def colour(self, each: str) -> str:
        return self.colours.setdefault(each, PEERS[(len(self.colours) - 3) % len(PEERS)])

    def svg(self, figure: Any) -> str:
        """A figure as an element of the page, its colours the page's."""
        text = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
        self.plt.close(figure)
        drawn = text.getvalue()
        drawn = drawn[drawn.index("<svg") :].strip()
        drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn).replace("xlink:href", "href")
        drawn = drawn.replace(INK, "currentColor").replace(SOFT, "var(--line)")
        drawn = drawn.replace("DejaVu Sans", "system-ui")
        # Names that are unique in a figure shall be so on the page.
        self.count += 1
        return re.sub(r'( id="|url\(#|href="#)', rf"\1p{self.count}-", drawn)

    def bars(self, records: list[Record]) -> str:
        """Bars from 1, a group a case, to how many times eager's time and memory each takes."""
        contestants = [
            each
            for each in dict.fromkeys(c for r in records for c in _order(r["results"]))
            if each not in BASELINES
        ]
        contestants.sort(key=is_ours)
        rows = [
            (record, [each for each in contestants if each in record["results"]])
            for record in records
        ]
        lines = sum(len(there) + 1 for _, there in rows)
        with self.plt.rc_context(self.style):
            figure, axes = self.plt.subplots(
                1, 2, sharey=True, figsize=(10, 0.155 * lines + 1.1), width_ratios=(1, 1)
            )
            for axis, title, ratio in (
                (axes[0], "time", time_ratio),
                (axes[1], "peak memory", memory_ratio),
            ):
                y, ticks = 0, []
                for record, there in rows:
                    eager = record["results"].get(baseline(record["results"]))
                    ticks.append(y + (len(there) - 1) / 2)
                    for row, each in enumerate(there, y):
                        if x := ratio(record["results"][each], eager):
                            self._bar(axis, row, x, self.colour(each))
                    y += len(there) + 1
                axis.set_xscale("log")
                low, high = axis.get_xlim()
                axis.set_xlim(min(low, 0.5) / 1.5, max(high, 2) * 1.5)
                axis.axvline(1, color=INK, linewidth=0.8)
                axis.set_title(title, loc="left", fontsize=9)
                _plain(axis.xaxis)
                axis.tick_params(axis="x", which="minor", length=0)
                axis.grid(axis="x", alpha=0.7, linewidth=0.6)
                axis.set_axisbelow(True)
            axes[0].set_yticks(ticks, [name(record) for record, _ in rows])
            axes[0].set_ylim(y - 0.5, -1)
            axes[0].tick_params(axis="y", length=0)
            axes[1].tick_params(axis="y", length=0)
            self._legend(figure, contestants)
            return self.svg(figure)

    def _bar(self, axis: Any, y: float, x: float, colour: str) -> None:
        """From 1 to x, the figure at its end."""
        axis.barh(y, x - 1, left=1, color=colour, height=0.86)
        more = x >= 1
        axis.annotate(
            number(x),
            (x, y),
            (3 if more else -3, 0),
            textcoords="offset points",
            ha="left" if more else "right",
            va="center_baseline",
            fontsize=6.5,
        )

    def rates(self, records: list[Record]) -> str:
        """Clips a second of every decoder."""
        contestants = list(dict.fromkeys(c for r in records for c in _order(r["results"])))
        contestants.sort(key=is_ours)
        lines = sum(len(record["results"]) + 1 for record in records)
        with self.plt.rc_context(self.style):
            figure, axis = self.plt.subplots(figsize=(10, 0.17 * lines + 1.0))
            y, ticks = 0, []
            for record in records:
                ticks.append(y + (len(record["results"]) - 1) / 2)
                for each in (c for c in contestants if c in record["results"]):
                    r = record["results"][each]
                    spread = [[rate(r) - 1e3 / r["high_ms"]], [1e3 / r["low_ms"] - rate(r)]]
                    axis.barh(
                        y, rate(r), xerr=spread, color=self.colour(each), height=0.86, ecolor=INK
                    )
                    y += 1
                y += 1
            axis.set_yticks(ticks, [name(record) for record in records])
            axis.set_ylim(y - 0.5, -1)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", alpha=0.7, linewidth=0.6)
            axis.set_axisbelow(True)
            self._legend(figure, contestants)
            return self.svg(figure)

    def growth(self, record: Record) -> str:
        """Time and memory over what is swept, with the fitted powers."""
        with self.plt.rc_context(self.style):
            figure, axes = self.plt.subplots(1, 2, figsize=(10, 3.7))
            for axis, kind, figure_of in (
                (axes[0], "ms", "median_ms"),
                (axes[1], "MiB", "peak_mib"),
            ):
                lines = series(record, figure_of)
                for each in _order(lines):
                    values, figures = lines[each]
                    fitted = fit(values, figures)
                    power = f", power {fitted.exponent:.2f}" if fitted else ""
                    seen = [f if f > 0 else math.nan for f in figures]
                    axis.plot(
                        values,
                        seen,
                        "o-",
                        color=self.colour(each),
                        label=each + power,
                        markersize=4,
                        linewidth=2 if is_ours(each) else 1.2,
                        zorder=3 if is_ours(each) else 2,
                    )
                    if fitted:
                        ends = (fitted.first, max(values))
                        axis.plot(
                            ends,
                            [fitted.factor * v**fitted.exponent for v in ends],
                            "--",
                            color=INK,
                            linewidth=0.8,
                            zorder=4,
                        )
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.set_xticks([point["value"] for point in record["points"]])
                axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
                axis.minorticks_off()
                _plain(axis.yaxis)
                axis.set_xlabel(record["sweep"]["over"])
                axis.set_title("time, ms" if kind == "ms" else "peak memory, MiB", loc="left")
                axis.grid(alpha=0.7, linewidth=0.6)
                axis.legend(fontsize=7.5, framealpha=0)
            return self.svg(figure)

    def _legend(self, figure: Any, contestants: list[str]) -> None:
        patches = [self.plt.Rectangle((0, 0), 1, 1, color=self.colour(c)) for c in contestants]
        figure.legend(
            patches,
            contestants,
            loc="outside upper left",
            ncols=min(6, len(contestants)),
            fontsize=8,
            framealpha=0,
        )


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


# --- writing -------------------------------------------------------------------------------------


def write(directory: Path) -> list[Path]:
    """Writes report.html and report.md of the records in a directory beside them.

    Raises ValueError where there are no records, or a file is not JSON.
    """
    records, others = read(directory)
    paths = [directory / "report.html", directory / "report.md"]
    _replace(paths[0], page(records, others, directory.resolve().name))
    _replace(paths[1], markdown(directory) + "\n")
    return paths


def _replace(path: Path, text: str) -> None:
    """A file is whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, help="a file to put the table into")
    given = parser.parse_args(arguments)
    try:
        for path in write(given.directory):
            print(path)
        if given.readme:
            put_into(given.readme, markdown(given.directory))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
