"""A page and Markdown tables of benchmark records.

    python bench/report.py [STORE]             writes report.html and report.md beside the records
    python bench/report.py --readme README.md  also puts the tables between README's two marks

STORE: see records.py. Files that hold no records are named and left alone. The page is one file
that needs no server and no network: pictures are SVG, and tables sort by a click on a heading.
"""

import argparse
import collections
import html
import importlib.util
import io
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from records import (
    BASELINES,
    H100,
    OURS,
    SUITES,
    Record,
    baseline,
    best_peer,
    exponents,
    fit,
    floors,
    folder_of,
    group,
    is_ours,
    is_rate,
    is_sweep,
    malloc,
    memory_ratio,
    name,
    on_gpu,
    read,
    replace,
    series,
    shares,
    time_ratio,
)
from tables import machines, markdown, number, ordered, percent, put_into, rate

RESULTS = Path(__file__).resolve().parent / "results"


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
        "operations and bytes that the work needs at least, per second, as shares of what this "
        "machine reached in a large matrix product and in a large copy. On a GPU, <b>host ms</b> "
        "is what the processor takes to queue the call; a <b>floor</b> is the least time at these "
        "rates, or at an H100's 800 TFLOP/s in bf16 and 3.0 TB/s.</p>",
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
    shown = [record for record in records if record["results"]]
    timed = [record for record in shown if not is_sweep(record)]
    if timed and is_rate(timed[0]):
        parts += [figure(draw.rates(timed), "Clips a second, quartiles as lines.")]
        heads = "case|contestant|clips/s|ms a clip|quartiles|× naive|× best peer|peak MiB|error"
        parts.append(table(heads.split("|"), _decoded(timed)))
    elif timed:
        for allocator in sorted(set(map(malloc, timed))):
            alike = [record for record in timed if malloc(record) == allocator]
            caption = (
                "Time and peak memory as multiples of the eager form's, on a logarithmic axis: "
                "left of 1 is less."
            )
            caption += "" if on_gpu(timed[0]) else f" With {allocator} malloc."
            parts.append(figure(draw.bars(alike), caption))
        heads = "case|contestant|median ms|quartiles|× eager|× best peer|peak MiB|memory × eager"
        heads += "|of products|of copies|error" + "|host ms|floor ms|H100 floor ms" * on_gpu(
            timed[0]
        )
        parts.append(table(heads.split("|"), _compared(timed)))
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


def _classes(each: str, index: int) -> str:
    return " ".join(["ours"] * is_ours(each) + ["first"] * (index == 0))


def _compared(records: list[Record]) -> Iterable[Row]:
    for record in records:
        results = record["results"]
        eager, best = results.get(baseline(results)), results.get(best_peer(results))
        for i, each in enumerate(ordered(results)):
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
                    *(_on_gpu(record, r) if on_gpu(record) else ()),
                ],
            )


def _on_gpu(record: Record, r: dict[str, float]) -> list[Cell]:
    """How long the host took to queue the call; the least time on this GPU, and on an H100."""
    least = (max(floors(record, rates).values(), default=None) for rates in (None, H100))
    return [Cell(number(x), x) for x in (r.get("host_ms"), *least)]


def _decoded(records: list[Record]) -> Iterable[Row]:
    for record in records:
        results = record["results"]
        naive, best = results.get(baseline(results)), results.get(best_peer(results))
        for i, each in enumerate(ordered(results)):
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
    for i, each in enumerate(ordered(found)):
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
        import matplotlib

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
            for each in dict.fromkeys(c for r in records for c in ordered(r["results"]))
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
        contestants = list(dict.fromkeys(c for r in records for c in ordered(r["results"])))
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
                for each in ordered(lines):
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


def write(store: Path) -> list[Path]:
    """Writes report.md and report.html of a store's records beside them.

    Without matplotlib, which draws the page's pictures, only report.md.
    Raises ValueError where there are no records, or a file is not JSON.
    """
    records, others = read(store)
    folder = folder_of(store)
    paths = [folder / "report.md"]
    replace(paths[0], markdown(store) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        paths.append(folder / "report.html")
        replace(paths[1], page(records, others, store.resolve().name))
    return paths


def publish(store: Path) -> None:
    """Writes what `write` does, and prints what was written and what was not."""
    paths = write(store)
    for path in paths:
        print(path)
    if len(paths) == 1:
        print("no report.html, for which matplotlib is needed: pip install 'clipvip[bench]'")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, help="a file to put the table into")
    given = parser.parse_args(arguments)
    try:
        publish(given.directory)
        if given.readme:
            put_into(given.readme, markdown(given.directory))
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
