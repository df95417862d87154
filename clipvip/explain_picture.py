"""Draw how a model reads a video and how well it fits texts: `clipvip explain`."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipvip.data.video import is_image
from clipvip.embedding import load_for_embedding
from clipvip.explain import WINDOWS, Explanation, check_texts, explain
from clipvip.files import json_line, shown, write_whole
from clipvip.terminal import progress

MADE_BY = "clipvip explain"  # in a picture's metadata
MOST_FRAMES, MOST_PROXIES = 32, 8  # that are drawn
INK, SOFT, LINE = "#1c2430", "#667085", "#d5dae3"
COLOURS = (
    *("#1f56c4", "#d9480f", "#16874a", "#9c36b5", "#b08900"),
    *("#0b7285", "#c2255c", "#5c4033", "#748ffc", "#868e96"),
)
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "text.parse_math": False,  # a text may hold dollars
}
PALE = 0.5  # share of white in the grey frames under the maps
HEAT = ("#ffd60010", "#ff8c00b0", "#e3371ed8", "#86003cf0")  # of the maps, with their opacity
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)  # of the colour scale
STEPS = (10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200)  # seconds
OWN_FONT = "DejaVu Sans"  # comes with matplotlib
SMALL = 8  # points
LEFT, RIGHT, EDGE, GAP = 1.2, 1.0, 0.2, 0.04  # inches: margins, and between two frames
PIXELS = 100  # per inch


def explain_to_files(
    model: str | Path,
    video: str | Path,
    texts: Sequence[str],
    layers: int = 3,
    *,
    out: str | Path | None = None,
    numbers: str | Path | None = None,
) -> Path:
    """Explain a video to people: write a picture (PNG), and its numbers if wanted. This is
    `clipvip explain`.

    model: a model folder or hub name. video, texts, layers: see `explain`.
    out: the picture; by default VIDEO.explain.png in the current folder. An earlier picture of
        this function is replaced, any other file refused.
    numbers: JSON file to write too.
    Returns the picture's path. Raises ValueError for what cannot be used, and OSError.
    """
    if find_spec("matplotlib") is None:
        raise ValueError('matplotlib is not installed: pip install "clipvip[explain]"')
    path = Path(video)
    check_texts(texts)
    out = Path(f"{path.stem}.explain.png" if out is None else out)
    _check_output("out", out, ".png")
    if numbers is not None:
        _check_output("json", Path(numbers), ".json")
    if out.exists() and not _is_ours(out):
        raise ValueError(f"{out} exists and is no picture of {MADE_BY}; give another out")
    if not path.is_file():
        what = "not a file" if path.exists() else "a file that does not exist"
        raise ValueError(f"the video is {str(video)!r}, {what}; expected a video or image")
    network: Any
    network, processor = load_for_embedding(model)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    windows = 0 if is_image(path) else WINDOWS
    note = f"embedding {shown(path.name)}" + f" and {windows} windows of it" * (windows > 0)
    with progress(note, 1 + windows) as advance:
        found = explain(network, processor, path, texts, layers=layers, advance=advance)
    write_whole(out, picture(found))
    if numbers is not None:
        write_whole(Path(numbers), json_line(_as_numbers(found)))
    return out


def _check_output(name: str, path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ValueError(f"{name} is {str(path)!r}; expected a name that ends with {suffix}")


def _is_ours(path: Path) -> bool:
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            return False
        with Image.open(path) as image:
            return image.info.get("Software") == MADE_BY
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _as_numbers(found: Explanation) -> dict[str, Any]:
    """Return everything but the frames' pixels as JSON can hold it."""

    def rounded(tensor: Tensor) -> Any:
        return tensor.double().round(decimals=9).tolist()

    return {
        "video": str(found.video),
        "texts": found.texts,
        "similarity": rounded(found.similarity),
        "times": rounded(found.times),
        "frame_similarity": rounded(found.frame_similarity),
        "windows": rounded(found.windows),
        "window_similarity": rounded(found.window_similarity),
        "frame_pooling": found.frame_pooling,
        "layers": found.layers,
        "attention": rounded(found.maps),
    }


# --- the picture ----------------------------------------------------------------------------------


def picture(found: Explanation) -> bytes:
    """Draw an explanation as docs/explain.md describes; return the bytes of a PNG.

    Frames are columns. Of more than MOST_FRAMES frames, or more than MOST_PROXIES proxies, evenly
    spread ones are drawn.
    """
    import matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = "".join(shown(text) for text in (found.video.name, *found.texts))
    with (
        warnings.catch_warnings(),
        matplotlib.style.context("default"),  # whatever the user's own style is
        matplotlib.rc_context(STYLE | {"font.family": _families(texts)}),
    ):
        warnings.simplefilter("ignore", UserWarning)  # about letters that no font has
        figure = Figure(dpi=PIXELS, facecolor="white")
        FigureCanvasAgg(figure)  # measures texts while the page is made
        _Page(figure, found).draw()
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=PIXELS, metadata={"Software": MADE_BY})
    return buffer.getvalue()


class _Page:
    """A figure that is filled from top to bottom. Lengths are inches."""

    def __init__(self, figure: Any, found: Explanation) -> None:
        self.figure, self.found = figure, found
        proxies, count = found.maps.shape[:2]
        self.columns, self.rows = _spread(count, MOST_FRAMES), _spread(proxies, MOST_PROXIES)
        shape = len(self.columns), 1 + len(self.rows)
        self.cell = max(min(1.5, 12 / shape[0], 9 / shape[1]), 0.5)
        self.step = self.cell + GAP
        self.wide = max(shape[0] * self.step - GAP, 7.4)  # between the margins
        self.shares = count > 1 and found.frame_pooling == "proxy"
        self.over_time = len(found.windows) > 0
        self.width = LEFT + self.wide + RIGHT
        self.height = 1.0 + 0.22 * len(found.texts) + shape[1] * self.step
        self.height += 1.25 * self.shares + 2.45 * self.over_time
        figure.set_size_inches(self.width, self.height)

    def draw(self) -> None:
        top = self._header(0.15)
        top = self._frames(top)
        if self.shares:
            top = self._shares(top)
        if self.over_time:
            self._similarity(top)

    def _text(self, left: float, top: float, text: str, **options: Any) -> Any:
        place = left / self.width, 1 - top / self.height
        return self.figure.text(*place, text, **{"va": "top", **options})

    def _bold(self, left: float, top: float, text: str, **options: Any) -> None:
        # Other fonts may have no bold face, of which matplotlib would tell.
        self._text(left, top, text, **{"weight": "bold", "family": OWN_FONT, **options})

    def _line(self, left: float, top: float, text: str, **options: Any) -> None:
        """Write a name or text from elsewhere; leave out its middle if it is too long."""
        text = shown(text)
        ends = min((len(text) + 1) // 2, 200)  # letters kept on either side
        line = self._text(left, top, text, **options)
        room = (self.width - left - EDGE) * PIXELS
        while True:
            if 2 * ends < len(text):
                line.set_text(f"{text[:ends]}…{text[-ends:]}")
            wide = line.get_window_extent(self.figure.canvas.get_renderer()).width
            if wide <= room or ends <= 1:
                return
            ends = max(1, min(ends - 1, int(ends * room / wide)))

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = 1 - (top + height) / self.height
        size = width / self.width, height / self.height
        return self.figure.add_axes((left / self.width, bottom, *size))

    def _header(self, top: float) -> float:
        found = self.found
        self._line(EDGE, top, found.video.name, fontsize=13)
        for number, text in enumerate(found.texts):
            line = top + 0.29 + 0.22 * number
            score = f"{found.similarity[number]:.3f}".replace("-", "−")
            colour = {"color": COLOURS[number], "fontsize": 10}
            self._bold(EDGE + 0.53, line, score, ha="right", **colour)
            self._line(EDGE + 0.63, line, text, **colour)
        return top + 0.42 + 0.22 * len(found.texts)

    def _frames(self, top: float) -> float:
        """Draw the frames, and below them a row of maps for each proxy."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, LogNorm

        found, left = self.found, LEFT
        self._text(EDGE, top, self._about_attention(), color=SOFT, fontsize=SMALL)
        top += 0.36
        last = float(found.times[-1])
        for place, frame in enumerate(self.columns):
            middle = left + place * self.step + self.cell / 2
            time = _clock(float(found.times[frame]), last) if self.over_time else ""
            self._text(middle, top, time, ha="center", va="bottom", fontsize=SMALL, color=SOFT)
        top += 0.03
        maps = (found.maps / self._even()).numpy()
        highest = max(float(np.quantile(maps, 0.998)), 2.0)
        norm = LogNorm(1, highest)
        colours = LinearSegmentedColormap.from_list("heat", HEAT).with_extremes(under="#ffffff00")
        rows = 1 + len(self.rows)
        wide, tall = len(self.columns) * self.step, rows * self.step
        grid = self._axes(left, top, wide, tall)
        grid.axis("off")
        grid.set(xlim=(0, wide), ylim=(tall, 0), autoscale_on=False)
        for row in range(rows):
            self._label(row, top + row * self.step)
            for place, frame in enumerate(self.columns):
                x, y = place * self.step, row * self.step
                where = {"extent": (x, x + self.cell, y + self.cell, y), "aspect": "auto"}
                pixels = found.frames[frame].permute(1, 2, 0).numpy()
                if row == 0:
                    grid.imshow(pixels, **where)
                else:
                    pale = (1 - PALE) * pixels.mean(-1) + PALE * 255
                    grid.imshow(pale, "gray", vmin=0, vmax=255, **where)
                    heat = maps[self.rows[row - 1], frame]
                    grid.imshow(heat, colours, norm, interpolation="nearest", **where)
        high = min(tall - self.step - GAP, 3.0)
        axes = self._axes(left + wide + 0.08, top + self.step, 0.12, high)
        scale = ScalarMappable(norm, colours)
        ticks = [tick for tick in TICKS if tick <= highest]
        bar = self.figure.colorbar(scale, axes, extend="max", ticks=ticks, format="%g ×")
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, length=2)
        bar.set_label("even spread", fontsize=SMALL)
        return top + tall

    def _even(self) -> float:
        """Attention to each token, if all that a proxy attends to had the same."""
        proxies, frames, *patches = self.found.maps.shape
        together = 1 if self.found.frame_pooling == "mean" else frames
        return 1 / (proxies + together * patches[0] * patches[1])

    def _about_attention(self) -> str:
        found = self.found
        count, layers = len(found.frames), len(found.layers)
        which = "frame" if count == 1 else f"{count} frames"
        if len(self.columns) < count:
            which += f" (here {len(self.columns)} of them)"
        where = "the class token attends" if len(found.maps) == 1 else "each proxy attends"
        if found.frame_pooling == "mean":
            where += " in each by itself (features of frames are averaged)"
        over = "the last layer" if layers == 1 else f"the last {layers} layers"
        heads = "" if found.heads == 1 else f"{found.heads} heads of "
        means = f"mean over {heads}{over}, the same for every text"
        return f"The {which} that the model read, and where {where}: {means}"

    def _label(self, row: int, top: float) -> None:
        """Name a row, and say how much of a proxy's attention its maps show."""
        middle, right = top + self.cell / 2, LEFT - 0.12
        if row == 0:
            return self._text(right, middle, "frames", ha="right", va="center")
        proxy = self.rows[row - 1]
        mean, share = self.found.frame_pooling == "mean", self.found.shares[proxy]
        on_patches = float(share.mean() if mean else share.sum())
        name = "class token" if proxy == 0 else f"proxy {proxy + 1}"
        at = {"ha": "right", "va": "center"}
        self._bold(right, middle - 0.09, name, color=self._colour(row), **at)
        note = f"{100 * on_patches:.0f} % on patches"
        self._text(right, middle + 0.09, note, color=SOFT, fontsize=SMALL, **at)

    def _colour(self, row: int) -> Any:
        """Colour of a proxy, unlike those of texts."""
        import matplotlib

        return matplotlib.colormaps["viridis"](0.8 * (row - 1) / max(len(self.rows) - 1, 1))

    def _shares(self, top: float) -> float:
        """Draw below each frame the share of each proxy's attention that it receives."""
        found, rows, columns = self.found, len(self.rows), len(self.columns)
        axes = self._axes(LEFT, top + 0.1, columns * self.step - GAP, 0.75)
        axes.set_xlim(-0.5 * self.cell / self.step, columns - 1 + 0.5 * self.cell / self.step)
        shares, places = found.shares[:, self.columns].numpy(), np.arange(columns)
        for number, proxy in enumerate(self.rows):
            shift = 0.8 * ((number + 0.5) / rows - 0.5)
            heights = 100 * shares[proxy]
            axes.bar(places + shift, heights, 0.8 / rows, color=self._colour(number + 1))
        even = 100 * found.maps[0, 0].numel() * self._even()
        axes.axhline(even, color=SOFT, linewidth=0.8, linestyle="--")
        axes.set_xticks([])
        axes.tick_params(axis="y", labelsize=SMALL, length=2)
        axes.locator_params(axis="y", nbins=4)
        axes.set_ylim(0, max(1.1 * even, *axes.get_ylim()))
        self._label_axis(axes, "% per frame")
        note = "share of each proxy's attention per frame; dashed: an even spread"
        self._text(LEFT, top + 0.9, note, color=SOFT, fontsize=SMALL)
        return top + 1.25

    def _label_axis(self, axes: Any, text: str) -> None:
        axes.set_ylabel(text, fontsize=SMALL)
        axes.yaxis.set_label_coords(-0.5 / (axes.get_position().width * self.width), 0.5)

    def _similarity(self, top: float) -> None:
        """Draw the similarity to each text over time."""
        from matplotlib.lines import Line2D

        found = self.found
        axes = self._axes(LEFT, top + 0.3, self.wide, 1.7)
        middles, times = found.windows.mean(1).numpy(), found.times.numpy()
        for text, colour in zip(range(len(found.texts)), COLOURS, strict=False):
            axes.axhline(float(found.similarity[text]), color=colour, linewidth=1, linestyle="--")
            axes.plot(middles, found.window_similarity[text].numpy(), color=colour, linewidth=2)
            single = {"s": 22, "facecolors": "white", "edgecolors": colour, "zorder": 3}
            axes.scatter(times, found.frame_similarity[text].numpy(), **single)
        start, end = float(found.windows[0, 0]), float(found.windows[-1, 1])
        axes.set_xlim(start - 0.01 * end, 1.01 * end)
        if end < 60:
            axes.xaxis.set_major_formatter("{x:g} s")
        else:
            step = next((step for step in STEPS if end <= 9 * step), end / 8)
            places = np.arange(0, end, step)
            axes.set_xticks(places, [_clock(place, end) for place in places])
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=SMALL, length=2)
        self._label_axis(axes, "cosine")
        length = _clock(float(found.windows[0, 1]), end)
        kinds: dict[str, dict[str, Any]] = {
            "whole video": {"linestyle": "--"},
            f"windows of {length}, at their middles": {"linewidth": 2},
            "each frame alone": {"linestyle": "", "marker": "o", "markerfacecolor": "white"},
        }
        lines = [Line2D([], [], color=SOFT, label=label, **how) for label, how in kinds.items()]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
        axes.legend(handles=lines, ncols=3, fontsize=SMALL, frameon=False, **place)
        axes.set_title("similarity of video and text", loc="left", fontsize=9)


def _spread(count: int, most: int) -> list[int]:
    """Return all of 0 … count-1, or `most` evenly spread ones."""
    return torch.linspace(0, count - 1, min(count, most)).round().int().tolist()


def _clock(seconds: float, longest: float) -> str:
    if longest < 60:
        return f"{seconds:.{2 if longest < 10 else 1}f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if longest >= 3600 else f"{minutes}:{rest:02}"


def _families(text: str) -> list[str]:
    """Return font families to draw a text with: matplotlib's own, and for letters that it lacks,
    installed ones that have them."""
    from matplotlib.font_manager import fontManager, get_font

    families = [OWN_FONT]
    missing = {letter for letter in text if not letter.isspace()}
    # Its own first, and plain faces before bold or slanted ones.
    fonts = sorted(
        fontManager.ttflist,
        key=lambda font: (font.name != families[0], font.style != "normal", font.name, font.fname),
    )
    for entry in fonts:
        if not missing:
            break
        try:
            font = get_font(entry.fname)
        except (OSError, RuntimeError):
            continue
        has = {letter for letter in missing if font.get_char_index(ord(letter))}
        # Fonts of pictures, such as emoji, cannot be drawn, and one has a box for every letter.
        if has and font.scalable and not entry.name.startswith("Last Resort"):
            missing -= has
            families.append(entry.name)
    return list(dict.fromkeys(families))
