"""The page of benchmark records: one HTML file that needs no server and no network.

Pictures are SVG, and a click on a heading sorts its table.
"""

import collections
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pictures import Pictures
from records import (
    H100,
    Record,
    baseline,
    best_peer,
    exponents,
    floors,
    group,
    is_ours,
    is_rate,
    is_sweep,
    malloc,
    memory_ratio,
    name,
    on_gpu,
    series,
    shares,
    time_ratio,
)
from tables import heading, machines, number, ordered, percent, quartiles, rate

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
        if (x === "" || y === "") return (x === "") - (y === "");  // unknown values come last
        return (down ? -1 : 1) * (x - y);
      });
      for (const row of rows) row.classList.remove("first");
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
"""

INTRODUCTION = (
    "Every contestant's result was compared with a reference before it was timed. Contestants "
    "took turns, one call each per round. Times are medians with quartiles; memory is what a call "
    "adds at its peak. <b>× eager</b> is the median over rounds of a time divided by that of the "
    "authors' eager form in the same round; <b>× best peer</b> is the ratio of medians to the "
    "fastest other contestant. Below 1 is less time or memory. <b>Of products</b> and <b>of "
    "copies</b> compare the operations and bytes per second that the work needs at least with the "
    "rates of a large matrix product and a large copy on this machine. On a GPU, <b>host ms</b> is "
    "the time the processor needs to queue the call, and a <b>floor</b> is the shortest possible "
    "time at these rates, or at an H100's 800 TFLOP/s in bf16 and 3.0 TB/s."
)


class Cell(NamedTuple):
    """A number in a table: the text that is shown, and the value to sort by (None: unknown)."""

    text: str
    value: float | None = None


Row = tuple[str, list["Cell | str"]]  # class names, cells: a str is text, a Cell a number


def table(heads: Sequence[str], rows: Iterable[Row], *, sortable: bool = True) -> str:
    """Return an HTML table. A column holds text if its first cell is a str."""
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
    """Return the whole report as one HTML file.

    others: names of files in the store that hold no records.
    source: name of the store.
    """
    draw = Pictures()
    sections, links = [], []
    for suite in dict.fromkeys(record["suite"] for record in records):
        anchor, title = html.escape(suite), html.escape(heading(suite))
        links.append(f"<a href='#{anchor}'>{title}</a>")
        sections.append(f"<h2 id='{anchor}'>{title}</h2>")
        inside = [record for record in records if record["suite"] == suite]
        titles = list(dict.fromkeys(map(group, inside)))
        for title in titles:
            if titles != [suite]:
                sections.append(f"<h3>{html.escape(title)}</h3>")
            sections += section([record for record in inside if group(record) == title], draw)
    left = ", ".join(f"<code>{html.escape(other)}</code>" for other in others)
    return "\n".join(
        [
            "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>clipvip benchmarks</title><style>{STYLE}</style></head><body>",
            "<h1>clipvip benchmarks</h1>",
            f"<p>{len(records)} records of {html.escape(source)}. {INTRODUCTION}</p>",
            f"<nav>{' '.join(links)} <a href='#machine'>Machine</a></nav>",
            *sections,
            "<h2 id='machine'>Machine</h2>",
            facts(records),
            *[f"<p><small>Not benchmark records, so not shown here: {left}.</small></p>"]
            * bool(left),
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def facts(records: list[Record]) -> str:
    """Return a table of the machines' facts, one machine per column."""
    rows = machines(records)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    names = [f"machine {i}" for i in range(1, len(rows) + 1)] if len(rows) > 1 else ["machine"]
    lines: list[Row] = [("", [head, *(row.get(head, "–") for row in rows)]) for head in heads]
    return table(["", *names], lines, sortable=False)


COMPARED = "case|contestant|median ms|quartiles|× eager|× best peer|peak MiB|memory × eager"
COMPARED += "|of products|of copies|error"
COMPARED_ON_GPU = f"{COMPARED}|host ms|floor ms|H100 floor ms"
DECODED = "case|contestant|clips/s|median ms|quartiles|× eager|× best peer|peak MiB|error"


def section(records: list[Record], draw: Pictures) -> list[str]:
    """Return the parts of one op or suite: pictures, a table, and who was left out."""
    parts = []
    shown = [record for record in records if record["results"]]
    timed = [record for record in shown if not is_sweep(record)]
    if timed and is_rate(timed[0]):
        parts += [figure(draw.rates(timed), "Clips per second, with quartiles as lines.")]
        heads = DECODED.replace("median ms", "ms per clip").replace("eager", "naive")
        parts.append(table(heads.split("|"), _rows(timed, DECODED)))
    elif timed:
        for allocator in sorted(set(map(malloc, timed))):
            alike = [record for record in timed if malloc(record) == allocator]
            caption = (
                "Time and peak memory as multiples of the eager form's, on a logarithmic axis: "
                "left of 1 is less."
            )
            caption += "" if on_gpu(timed[0]) else f" With {allocator} malloc."
            parts.append(figure(draw.bars(alike), caption))
        chosen = COMPARED_ON_GPU if on_gpu(timed[0]) else COMPARED
        parts.append(table(chosen.split("|"), _rows(timed, chosen)))
    parts += left_out([record for record in records if not is_sweep(record)])
    for record in (r for r in shown if is_sweep(r)):
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
    """Return the parameters that a sweep keeps fixed."""
    params = record["params"]
    kept = {k: v for k, v in params.get("fixed", {}).items() if isinstance(v, str | int | float)}
    facts = [key if value is True else f"{key} {value}" for key, value in kept.items()]
    return ", ".join([*filter(None, [params.get("op"), params.get("device")]), *facts])


def left_out(records: list[Record]) -> list[str]:
    """Return a list of contestants that were not timed and why, cases with equal reasons joined."""
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


def _classes(each: str, index: int) -> str:
    return " ".join(["ours"] * is_ours(each) + ["first"] * (index == 0))


def _rows(records: list[Record], columns: str) -> Iterable[Row]:
    """Yield one row per contestant of each case."""
    for record in records:
        for i, each in enumerate(ordered(record["results"])):
            cells = _cells(record, each)
            yield _classes(each, i), [cells[column] for column in columns.split("|")]


def _cells(record: Record, each: str) -> dict[str, Cell | str]:
    """Return all cells of one contestant by the headings of their columns."""
    results = record["results"]
    r, share = results[each], shares(record, results[each])
    eager, best = results.get(baseline(results)), results.get(best_peer(results))
    least = (max(floors(record, rates).values(), default=None) for rates in (None, H100))
    error = r.get("error")
    figures = {
        "median ms": r["median_ms"],
        "clips/s": rate(r),
        "× eager": time_ratio(r, eager),
        "× best peer": r["median_ms"] / best["median_ms"] if best else None,
        "peak MiB": r.get("peak_mib"),
        "memory × eager": memory_ratio(r, eager),
        "host ms": r.get("host_ms"),
        **dict(zip(("floor ms", "H100 floor ms"), least, strict=True)),
    }
    return {
        "case": name(record),
        "contestant": each,
        "quartiles": Cell(quartiles(r), r["low_ms"]),
        "error": Cell("–" if error is None else f"{error:.0e}", error),
        **{key: Cell(number(x), x) for key, x in figures.items()},
        "of products": Cell(percent(share.get("product")), share.get("product")),
        "of copies": Cell(percent(share.get("copy")), share.get("copy")),
    }


def _grown(record: Record) -> Iterable[Row]:
    over, found = record["sweep"]["over"], exponents(record)
    times, memories = series(record, "median_ms"), series(record, "peak_mib")
    for i, each in enumerate(ordered(found)):
        (values, ms), (_, mib) = times[each], memories[each]
        powers = [found[each][kind] for kind in ("time", "memory")]
        cells: list[Cell | str] = [each]
        cells += [Cell("–" if x is None else f"{over}^{x:.2f}", x) for x in powers]
        for end in (0, -1):
            cells.append(Cell(f"{values[end]:g}", values[end]))
            cells += [Cell(number(x), x) for x in (ms[end], mib[end])]
        yield _classes(each, i), cells
