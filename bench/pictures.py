"""Pictures of benchmark records for the page, drawn with matplotlib as SVG."""

import io
import math
import re
from typing import Any

from records import (
    BASELINES,
    OURS,
    Record,
    baseline,
    fit,
    is_ours,
    memory_ratio,
    name,
    series,
    time_ratio,
)
from tables import number, ordered, rate

INK, SOFT = "#010203", "#030201"  # placeholders: `svg` puts the page's own colours in their place
COLOURS = {OURS: "#e8590c", "eager": "#868e96", "naive": "#868e96"}
PEERS = ("#228be6", "#12b886", "#be4bdb", "#f2b705", "#15aabf", "#fa5252", "#82c91e", "#7950f2")


class Pictures:
    """Draws figures in which a contestant has the same colour on the whole page."""

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
            "svg.fonttype": "none",  # keep text as text
            "svg.hashsalt": "clipvip",  # the same records must give the same page
            "figure.constrained_layout.use": True,
        }

    def colour(self, each: str) -> str:
        return self.colours.setdefault(each, PEERS[(len(self.colours) - 3) % len(PEERS)])

    def svg(self, figure: Any) -> str:
        """Return a figure as an element of the page, in the page's colours."""
        text = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
        self.plt.close(figure)
        drawn = text.getvalue()
        drawn = drawn[drawn.index("<svg") :].strip()
        drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn).replace("xlink:href", "href")
        drawn = drawn.replace(INK, "currentColor").replace(SOFT, "var(--line)")
        drawn = drawn.replace("DejaVu Sans", "system-ui")
        # Identifiers that are unique in a figure must be unique on the page.
        self.count += 1
        return re.sub(r'( id="|url\(#|href="#)', rf"\1p{self.count}-", drawn)

    def bars(self, records: list[Record]) -> str:
        """Draw time and memory as multiples of eager's: bars that start at 1, grouped by case."""
        contestants = [each for each in _contestants(records) if each not in BASELINES]
        places, ticks, lines = _places(records, contestants)
        with self.plt.rc_context(self.style):
            figure, axes = self.plt.subplots(
                1, 2, sharey=True, figsize=(10, 0.155 * lines + 1.1), width_ratios=(1, 1)
            )
            for axis, title, ratio in (
                (axes[0], "time", time_ratio),
                (axes[1], "peak memory", memory_ratio),
            ):
                for record, each, y in places:
                    results = record["results"]
                    if x := ratio(results[each], results.get(baseline(results))):
                        self._bar(axis, y, x, self.colour(each))
                axis.set_xscale("log")
                low, high = axis.get_xlim()
                axis.set_xlim(min(low, 0.5) / 1.5, max(high, 2) * 1.5)
                axis.axvline(1, color=INK, linewidth=0.8)
                axis.set_title(title, loc="left", fontsize=9)
                _plain(axis.xaxis)
                axis.tick_params(axis="x", which="minor", length=0)
            axes[0].set_yticks(ticks, map(name, records))
            return self._grouped(figure, axes, lines, contestants)

    def _bar(self, axis: Any, y: float, x: float, colour: str) -> None:
        """Draw a bar from 1 to x with its figure at the end."""
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
        """Draw the clips per second of each decoder."""
        contestants = _contestants(records)
        places, ticks, lines = _places(records, contestants)
        with self.plt.rc_context(self.style):
            figure, axis = self.plt.subplots(figsize=(10, 0.17 * lines + 1.0))
            for record, each, y in places:
                r, colour = record["results"][each], self.colour(each)
                spread = [[rate(r) - 1e3 / r["high_ms"]], [1e3 / r["low_ms"] - rate(r)]]
                axis.barh(y, rate(r), xerr=spread, color=colour, height=0.86, ecolor=INK)
            axis.set_yticks(ticks, map(name, records))
            return self._grouped(figure, [axis], lines, contestants)

    def _grouped(self, figure: Any, axes: Any, lines: int, contestants: list[str]) -> str:
        """Finish a figure of bars that are grouped by case."""
        axes[0].set_ylim(lines - 0.5, -1)
        for axis in axes:
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", alpha=0.7, linewidth=0.6)
            axis.set_axisbelow(True)
        patches = [self.plt.Rectangle((0, 0), 1, 1, color=self.colour(c)) for c in contestants]
        columns = min(6, len(contestants))
        place = {"loc": "outside upper left", "ncols": columns, "fontsize": 8, "framealpha": 0}
        figure.legend(patches, contestants, **place)
        return self.svg(figure)

    def growth(self, record: Record) -> str:
        """Draw time and memory over the parameter of a sweep, with the fitted powers."""
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


def _contestants(records: list[Record]) -> list[str]:
    """Return the contestants of all records, ours last."""
    return sorted(dict.fromkeys(c for r in records for c in ordered(r["results"])), key=is_ours)


def _places(
    records: list[Record], contestants: list[str]
) -> tuple[list[tuple[Record, str, int]], list[float], int]:
    """Return the line of each contestant of each case, the middle of each case, and the number of
    lines, with one empty line after each case."""
    places, ticks, line = [], [], 0
    for record in records:
        there = [each for each in contestants if each in record["results"]]
        places += [(record, each, line + i) for i, each in enumerate(there)]
        ticks.append(line + (len(there) - 1) / 2)
        line += len(there) + 1
    return places, ticks, line


def _plain(axis: Any) -> None:
    """Label the ticks of a logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())
