"""The demo's results to look at: a picture of curves and figures, and a page of clips with what was
found and said."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from clipvip.data.annotations import Clip
from clipvip.data.video import read_frames
from clipvip.index import Hit
from demo.found import Found, margin

NAMES = {"clip_vip": "CLIP-ViP", "mean_pool": "mean-pooled frames"}
PAINT = {"clip_vip": "#2f6fed", "mean_pool": "#e08a1e", "chance": "#b8bec9"}
STAGES = {"pretrain": "post-pretraining", "finetune": "fine-tuning"}
STRIP_FRAMES, STRIP_SIZE = 6, 64
SHOWN, QUERIES = 3, 12  # clips per query, queries per page
FILM_QUERIES, CAPTIONED = 6, 16


def plot(runs: dict[str, dict[str, Path]], results: dict[str, Any], out: Path) -> None:
    """Plot training loss and validation recall of retrieval, and held-out figures, side by side.

    runs: model → stage → folder of the run, whose metrics.jsonl is read.
    """
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    plt.rcParams.update({"grid.color": "#e6e9ef", "axes.axisbelow": True})
    figure, (loss, recall, bars) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, stages in runs.items():
        begun = 0
        curve: list[tuple[int, float]] = []
        for number, folder in enumerate(stages[stage] for stage in STAGES):
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            losses = [(begun + row["step"], row["loss"]) for row in rows if "loss" in row]
            label = NAMES[name] if number == 0 else None
            loss.plot(*zip(*losses, strict=True), color=PAINT[name], linewidth=1.2, label=label)
            key = "validation/text_to_video/R@1"
            curve += [(begun + row["step"], row[key]) for row in rows if key in row]
            begun = losses[-1][0]
            if number == 0:
                split = begun
        recall.plot(
            *zip(*curve, strict=True),
            color=PAINT[name],
            marker="o",
            markersize=3,
            label=NAMES[name],
        )
    for axis in (loss, recall):
        axis.axvline(split, color="#8a93a3", linestyle=":", linewidth=1)
        axis.set_xlabel("step")
    loss.legend(frameon=False, loc="center right")
    recall.legend(frameon=False, loc="center right")
    top = loss.get_ylim()[1]
    loss.set_ylim(0, top)
    style = {"rotation": 90, "va": "top", "color": "#5b6472"}
    loss.text(split, top, STAGES["pretrain"], ha="right", **style)
    loss.text(split, top, STAGES["finetune"], ha="left", **style)
    loss.set_title("training loss", loc="left", fontweight="bold")
    recall.set_ylim(0, 104)
    recall.set_title("text → video R@1 on validation clips, %", loc="left", fontweight="bold")

    cuts = ("R@1", "R@5", "R@10")
    for place, name in enumerate(("chance", "mean_pool", "clip_vip")):
        values = [results[name]["text_to_video"][cut] for cut in cuts]
        values.append(results[name]["captions"]["exact"])
        at = [group + 0.27 * (place - 1) for group in range(len(values))]
        drawn = bars.bar(at, values, 0.25, color=PAINT[name], label=NAMES.get(name, name))
        bars.bar_label(drawn, fmt="%.0f", padding=1, fontsize=8)
    bars.set_xticks(range(len(cuts) + 1), [*cuts, "captions"])
    bars.set_ylim(0, 118)
    bars.set_yticks(range(0, 101, 20))
    bars.grid(axis="x", visible=False)
    bars.legend(frameon=False, loc="upper left", ncols=3, fontsize=8, columnspacing=1)
    bars.set_title("held-out clips, %: recall, exact captions", loc="left", fontweight="bold")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def page(
    found: dict[str, dict[str, Found]],
    captions: dict[str, list[dict[str, Any]]],
    results: dict[str, Any],
    picture: Path,
    out: Path,
) -> None:
    """Write one self-contained HTML file: the figures, queries beside what they found, and clips
    beside their captions.

    found: model → "clips" or "films" → what was found there.
    captions: model → a row per clip, the same clips for each model.
    """
    clips, shots = found["clip_vip"]["clips"], found["clip_vip"]["films"]
    sentence = {str(clip.video.resolve()): clip.text[0] for clip, _ in clips}
    cards = "\n".join(
        _card({name: found[name]["clips"][number] for name in NAMES}, sentence)
        for number in _spread(len(clips), QUERIES)
    )
    films = "\n".join(_film_card(*shots[number]) for number in _spread(len(shots), FILM_QUERIES))
    said = "\n".join(
        _caption_card({name: captions[name][number] for name in NAMES})
        for number in _spread(len(clips), CAPTIONED)
    )
    chart = base64.b64encode(picture.read_bytes()).decode()
    out.write_text(
        TEMPLATE.replace("{{count}}", str(len(clips)))
        .replace("{{figures}}", _figures(results))
        .replace("{{chart}}", chart)
        .replace("{{films}}", films)
        .replace("{{captions}}", said)
        .replace("{{cards}}", cards),
        encoding="utf-8",
    )


def clock(seconds: float) -> str:
    """Format a time in a film, such as 1:02.5."""
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def _spread(count: int, wanted: int) -> range:
    """About `wanted` numbers below `count`, evenly spaced."""
    step = max(1, count // wanted)
    return range(step // 2, count, step)


def _figures(results: dict[str, Any]) -> str:
    rows = []
    for key, name in (("clip_vip", "CLIP-ViP"), ("mean_pool", "mean-pooled"), ("chance", "chance")):
        cells = "".join(
            f"<td>{results[key][direction][cut]:.1f}</td>"
            for direction in ("text_to_video", "video_to_text")
            for cut in ("R@1", "R@5", "R@10")
        )
        cells += f"<td>{results[key]['films']['R@1']:.1f}</td>"
        cells += f"<td>{results[key]['captions']['exact']:.1f}</td>"
        rows.append(f'<tr class="{key}"><th>{name}</th>{cells}</tr>')
    return "".join(rows)


def _card(found: dict[str, tuple[Clip, list[Hit]]], sentence: dict[str, str]) -> str:
    columns = []
    for name, (query, hits) in found.items():
        rank = 1 + [hit.path for hit in hits].index(str(query.video.resolve()))
        verdict = "found first" if rank == 1 else f"the true clip is at rank {rank}"
        clips = "".join(
            _found(place, hit, sentence[hit.path], place == rank)
            for place, hit in enumerate(hits[:SHOWN], 1)
        )
        columns.append(
            f'<div class="column"><h3>{NAMES[name]}'
            f'<span class="{"hit" if rank == 1 else "miss"}">{verdict}</span></h3>{clips}</div>'
        )
    text = html.escape(query.text[0])
    return f'<section><h2>“{text}”</h2><div class="columns">{"".join(columns)}</div></section>'


def _film_card(query: Clip, hits: list[Hit]) -> str:
    """A sentence, the best moment of the films, and where in its film it lies."""
    hit = hits[0]
    film, start, end = Path(hit.path), hit.start or 0.0, hit.end or hit.moment.file.duration
    left, width = (100 * x / hit.moment.file.duration for x in (start, end - start))
    verdict = "hit" if margin(hits, query) > 0 else "miss"
    true = f"{query.video.name} {clock(query.start or 0)}–{clock(query.end or 0)}"
    return (
        f"<section><h2>“{html.escape(query.text[0])}”</h2>"
        f'<h3><span class="{verdict}">{film.name} {clock(start)}–{clock(end)}</span>'
        f"<span>shot: {true} · score {hit.score:.2f}</span></h3>"
        f'<div class="film"><i style="left:{left:.2f}%;width:{width:.2f}%"></i></div>'
        f'<img src="{_strip(film, start, end)}" alt="frames of the moment, first to last">'
        "</section>"
    )


def _caption_card(rows: dict[str, dict[str, Any]]) -> str:
    """A clip's frames, its sentence, and each model's caption of it."""
    row = rows["clip_vip"]
    lines = "".join(
        f'<p class="{"hit" if said["caption"] == said["texts"][0] else "miss"}">'
        f"<b>{NAMES[name]}</b> {html.escape(said['caption'])}</p>"
        for name, said in rows.items()
    )
    return (
        f'<section class="said"><img src="{_strip(Path(row["video"]))}" '
        f'alt="frames of the clip, first to last">{lines}</section>'
    )


def _found(place: int, hit: Hit, sentence: str, right: bool) -> str:
    path = Path(hit.path)
    clip = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure class="{"right" if right else "wrong"}"><b>{place}</b>'
        f'<video src="data:video/mp4;base64,{clip}" autoplay loop muted playsinline></video>'
        f'<img src="{_strip(path)}" alt="frames of the clip, first to last">'
        f"<figcaption>{html.escape(sentence)}<i>{hit.score:.2f}</i></figcaption></figure>"
    )


def _strip(video: Path, start: float | None = None, end: float | None = None) -> str:
    """A clip's frames from first to last, side by side, as a data URL."""
    frames = read_frames(video, STRIP_FRAMES, size=STRIP_SIZE, start=start, end=end)
    gap = 2
    strip = Image.new("RGB", (STRIP_FRAMES * (STRIP_SIZE + gap) - gap, STRIP_SIZE), "white")
    for number, frame in enumerate(frames.permute(0, 2, 3, 1).numpy()):
        strip.paste(Image.fromarray(frame), (number * (STRIP_SIZE + gap), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CLIP-ViP demo: text-video retrieval and captions</title>
<style>
:root { --ink: #1c2430; --soft: #667085; --line: #e4e8ef; --good: #16874a; --bad: #b4541a }
* { box-sizing: border-box }
body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, "DejaVu Sans", sans-serif }
main { max-width: 1140px; margin: 0 auto; padding: 36px 20px 60px }
h1 { font-size: 28px; margin: 0 0 6px; letter-spacing: -.01em }
p { color: var(--soft); max-width: 74ch; margin: 0 0 22px }
section, .panel { background: #fff; border: 1px solid var(--line); border-radius: 12px;
  padding: 18px 20px; margin: 0 0 18px; box-shadow: 0 1px 2px #1018280a }
.panel img { display: block; width: 100% }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child { text-align: left } tr:last-child > * { border-bottom: 0 }
thead th { color: var(--soft); font-weight: 500; font-size: 13px }
thead tr:first-child th { text-align: center; border: 0; padding-bottom: 0 }
.clip_vip { font-weight: 700; color: #1f56c4 } .chance { color: var(--soft) }
.chance th { font-weight: 400 } .mean_pool th { font-weight: 500 }
h2 { font-size: 18px; margin: 0 0 10px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 26px }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 8px; display: flex;
  justify-content: space-between; color: var(--soft) }
.film { position: relative; height: 8px; border-radius: 4px; background: var(--line);
  margin: 0 0 10px }
.film i { position: absolute; top: 0; height: 8px; min-width: 4px; border-radius: 4px;
  background: #2f6fed }
section > img { max-width: 100%; border-radius: 4px }
.said p { margin: 6px 0 0; display: flex; justify-content: space-between }
.said p.hit { color: var(--good) } .said p.miss { color: var(--bad) }
.said b { font-weight: 500; color: var(--soft) }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 18px }
.hit { color: var(--good) } .miss { color: var(--bad) }
figure { display: grid; grid-template-columns: 18px 64px 1fr; gap: 3px 8px; align-items: center;
  margin: 0 0 8px; padding: 7px 8px; border: 1px solid var(--line); border-radius: 8px }
figure b { color: var(--soft); font-weight: 500 }
figure.right { border-color: #7cc79b; background: #f0faf4 }
figure video { width: 64px; height: 64px; border-radius: 4px; background: #222 }
figure img { width: 100%; max-width: 394px; border-radius: 4px }
figcaption { grid-column: 2 / -1; display: flex; justify-content: space-between; font-size: 13px }
figure.right figcaption { color: var(--good); font-weight: 600 }
figcaption i { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums }
@media (max-width: 520px) { .columns { grid-template-columns: 1fr } }
</style>
<main>
<h1>Which clip does the sentence mean?</h1>
<p>A small CLIP-ViP was post-pretrained from scratch on noisy speech and captions, then fine-tuned,
on clips of moving shapes. Here are {{count}} clips it never saw. Beside it is the same network with
mean-pooled frames and no video proxies: it sees the same pictures, but a motion and its reverse
look the same to it. Beside each, a small decoder learned to write the sentence of a clip.</p>
<div class="panel scroll"><table>
<thead><tr><th></th><th colspan="3">text → video, %</th><th colspan="3">video → text, %</th>
<th>films, %</th><th>captions, %</th></tr>
<tr><th></th><th>R@1</th><th>R@5</th><th>R@10</th><th>R@1</th><th>R@5</th><th>R@10</th><th>R@1</th>
<th>exact</th></tr></thead>
<tbody>{{figures}}</tbody></table></div>
<div class="panel"><img src="data:image/png;base64,{{chart}}"
 alt="training loss, validation recall and held-out recall of both models"></div>
<h1>Where in the films is it?</h1>
<p>Here the same clips follow each other in three films, cut back to back, at lengths of their own.
CLIP-ViP searched overlapping windows of the films, which know nothing of the cuts. A moment counts
as found if it and the true shot share at least half of what they cover together.</p>
{{films}}
<h1>What does it show?</h1>
<p>Captions of clips that no model saw, by decoders that read the four proxies of CLIP-ViP or the
tokens of single frames. Green ones equal the clip's own sentence.</p>
<div class="two">{{captions}}</div>
<h1>Which clip is it?</h1>
<p>The first three clips that each model found.</p>
{{cards}}
</main></html>
"""
