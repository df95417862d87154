"""Say which of the given labels fit videos best. This is `clipvip classify`.

Nothing is trained, as in zero-shot classification by CLIP (Radford et al. 2021, section 3.1). Each
label is put into sentences by templates such as "a video of {}.". The vector of a label is the
normalised mean of the unit features of its sentences, and its score is the cosine with the video's
feature. Probabilities are the softmax of all labels' scores, times the model's logit scale.
"""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.collection import clips_of, list_left_out
from clipvip.data.annotations import Clip
from clipvip.data.loading import BadFile
from clipvip.embedding import autocast, embed_clips, embed_texts, load_for_embedding
from clipvip.files import TEXT_BYTES, decode_text, shown, write_whole
from clipvip.sentences import sentence
from clipvip.terminal import progress

# Templates that fit things, scenes and actions alike.
TEMPLATES = ("{}", "a photo of {}.", "a video of {}.", "a video clip of {}.", "footage of {}.")
COLUMNS = ("path", "start", "end", "rank", "label", "score", "probability")
TEXTS = 64  # sentences per batch

Labels = str | Sequence[str] | Mapping[str, Sequence[str]]


class Guess(NamedTuple):
    """One label of a clip. score: cosine. probability: relative to the given labels only."""

    label: str
    score: float
    probability: float


class Classified(NamedTuple):
    """A clip and its best labels, best first; start, end: seconds, None for the video's own."""

    path: Path
    start: float | None
    end: float | None
    guesses: list[Guess]


def classify(
    model: str | Path,
    videos: str | Path | Sequence[str | Path],
    labels: Labels,
    templates: Sequence[str] = TEMPLATES,
    *,
    top: int = 5,
    **options: Any,
) -> list[Classified]:
    """Return the best labels of each clip, in the order of the clips.

    Unreadable files are left out and listed on standard error.

    model: a model folder or hub name, as for `load_for_embedding`.
    videos: videos, images, folders, annotations (.jsonl), lists (.txt) and patterns, see
        clipvip.collection.
    labels: names; or name → sentences of its own, which replace the templates if there are any.
    templates: sentences in which {} stands for the label.
    top: number of labels to return per clip.
    options: batch_size, clips per batch (16); num_workers, decoding processes (one per core);
        decoder, see clipvip.data.loading.LoaderOptions; device (a CUDA GPU, if there is one);
        mixed_precision, see clipvip.embedding.precision_on.

    Raises ValueError for unusable labels and templates, for a name in `videos` that matches
    nothing, and if no clip could be classified.
    """
    return list(_Classifier(model, videos, labels, templates, top, **options).run())


def classify_to_csv(
    model: str | Path,
    videos: str | Path | Sequence[str | Path],
    labels: Labels,
    out: Path | None,
    templates: Sequence[str] = TEMPLATES,
    *,
    top: int = 5,
    **options: Any,
) -> int:
    """Write the best labels of each clip as CSV, and return the number of clips.

    There is one row per clip and rank, with COLUMNS. Rows are written as soon as a clip is done.
    The file is UTF-8. In paths and labels, control characters and bytes that are not UTF-8 become
    escapes such as \\x1b, so that each row is one line.

    out: file that appears only when it is complete; None for standard output. Raises OSError if it
        cannot be written.
    The other arguments and errors are those of `classify`.
    """
    classifier = _Classifier(model, videos, labels, templates, top, **options)
    if out is None:
        for line in _csv_lines(classifier.run()):
            print(line, end="", flush=True)
    else:
        write_whole(out, (line.encode() for line in _csv_lines(classifier.run())))
    return classifier.done


def print_table(found: Sequence[Classified], labels: int) -> None:
    """Print clips with their best labels of this number of labels."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text  # as brackets in a str are markup

    columns = Column("video", overflow="fold"), "seconds", Column("label", overflow="fold")
    table = Table(*columns, "probability", "score")
    here = Path.cwd()
    for clip in found:
        path = clip.path.relative_to(here) if clip.path.is_relative_to(here) else clip.path
        whole = clip.start is None and clip.end is None
        span = f"{clip.start or 0:g}–{'' if clip.end is None else f'{clip.end:g}'}"
        first = Text(shown(path)), "" if whole else span
        for rank, (label, score, probability) in enumerate(clip.guesses):
            place = ("", "") if rank else first
            table.add_row(*place, Text(shown(label)), f"{probability:.1%}", f"{score:.3f}")
        table.add_section()
    console = Console()
    console.print(table)
    which = "this label" if labels == 1 else f"these {labels} labels"
    note = f"probabilities are relative to {which}: they add up to 100 %, even if none fits"
    console.print(note, highlight=False, soft_wrap=True)


def _csv_lines(found: Iterable[Classified]) -> Iterator[str]:
    """Yield the header, then the rows of one clip after another."""

    def text(rows: Iterable[Sequence[object]]) -> str:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        return lines.getvalue()

    yield text([COLUMNS])
    for clip in found:
        place = shown(clip.path), clip.start, clip.end
        yield text(
            (*place, rank, shown(label), f"{score:.6f}", f"{probability:.6g}")
            for rank, (label, score, probability) in enumerate(clip.guesses, start=1)
        )


def read_labels(path: Path) -> dict[str, list[str]]:
    """Read labels, one per line: label → sentences of its own, none if templates are to be used.

    A label's own sentences follow it on its line, after tabs. Blank lines and lines that begin
    with # are skipped. Raises ValueError, which names the lines, if there is no label, if one is
    given twice, and if the file is not a UTF-8 text; OSError if it cannot be read.
    """
    found: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        label, *own = (field.strip() for field in line.split("\t"))
        if not label:
            raise ValueError(f"{shown(path)}, line {number}: no label before the tab")
        if label in lines:
            raise ValueError(
                f"{shown(path)}: the label {shown(label)!r} is on lines {lines[label]} and "
                f"{number}; keep one of them"
            )
        lines[label] = number
        found[label] = [text for text in own if text]
    if not found:
        raise ValueError(f"{shown(path)} holds no label; expected one per line")
    return found


def read_templates(path: Path) -> list[str]:
    """Read templates, one per line. Blank lines and lines that begin with # are skipped.

    Raises ValueError if there is none or the file is not a UTF-8 text; OSError if it cannot be
    read.
    """
    found = [line.strip() for _, line in _lines(path)]
    if not found:
        raise ValueError(f"{shown(path)} holds no template; expected one per line")
    return found


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text that are neither blank nor comments, with their numbers."""
    with open(path, "rb") as file:
        data = file.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:
        raise ValueError(
            f"{shown(path)} has more than {TEXT_BYTES >> 20} MiB; expected a short list"
        )
    try:
        text, guessed = decode_text(data)
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    if guessed:
        raise ValueError(f"{shown(path)} is not UTF-8; save it as UTF-8")
    return [
        (number, line)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _sentences(labels: Labels, templates: Sequence[str]) -> dict[str, list[str]]:
    """Return the sentences of each label. Raises ValueError if a label or template is unusable."""
    given = [labels] if isinstance(labels, str) else labels
    if not given:
        raise ValueError("no labels were given; expected at least one")
    templates = [sentence(template, "the template") for template in templates]
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"the template {shown(template)!r} has no {{}} where the label goes; expected, for "
                "example, 'a video of {}.'"
            )
    found: dict[str, list[str]] = {}
    for each in given:
        label = sentence(each, "the label").rstrip()
        if label in found:
            raise ValueError(f"the label {shown(label)!r} is given twice; give it once")
        own = given[each] if isinstance(given, Mapping) else ()
        found[label] = [sentence(text, f"a sentence of the label {shown(label)!r}") for text in own]
        found[label] = found[label] or [text.replace("{}", label) for text in templates]
        if not found[label]:
            raise ValueError(f"the label {shown(label)!r} has no sentence; give a template")
    return found


class _Classifier:
    """A model, clips and labels. done: number of clips classified so far."""

    def __init__(
        self,
        model: str | Path,
        videos: str | Path | Sequence[str | Path],
        labels: Labels,
        templates: Sequence[str],
        top: int,
        *,
        batch_size: int = 16,
        num_workers: int | None = None,
        decoder: str = "auto",
        device: str | torch.device | None = None,
        mixed_precision: str = "auto",
    ) -> None:
        if top < 1:
            raise ValueError(f"top is {top}; expected at least 1")
        self.top, self.name, self.done = top, str(model), 0
        self.sentences = _sentences(labels, templates)
        given = [videos] if isinstance(videos, str | os.PathLike) else videos
        self.sources = [os.fspath(source) for source in given]
        self.clips, self.bad_files = clips_of(self.sources)
        network: Any
        network, self.processor = load_for_embedding(model)
        self.network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = autocast(self.network, mixed_precision)
        workers = os.cpu_count() or 1 if num_workers is None else num_workers
        self.options = {
            "batch_size": batch_size,
            "num_workers": min(workers, len(self.clips)),
            "decoder": decoder,
        }

    def run(self) -> Iterator[Classified]:
        """Yield each clip as soon as it is classified; then list the files that could not be."""
        clips = [Clip(Path(clip.path), clip.start, clip.end) for clip in self.clips]
        scale = self.network.logit_scale.exp().item()
        unread: list[BadFile] = []
        count = len(self.sentences)
        note = f"classifying {len(clips)} clips by {count} label{'s' if count > 1 else ''}"
        with self.precision, progress(note, len(clips)) as advance:
            vectors = self._vectors()
            for features in embed_clips(
                self.network, self.processor, clips, unread, **self.options
            ):
                for place, feature in features.items():
                    # In float64, which autocast leaves as it is.
                    clip, scores = clips[place], vectors @ feature.double()
                    chances = (scale * scores).softmax(0)
                    if not chances.isfinite().all():
                        reason = "the model gives no finite features for it"
                        self.bad_files.append({"path": str(clip.video), "reason": reason})
                        continue
                    self.done += 1
                    guesses = self._best(scores, chances)
                    yield Classified(clip.video, clip.start, clip.end, guesses)
                advance(len(features))
        self.bad_files += [{"path": bad.path, "reason": bad.reason} for bad in unread]
        self._finish()

    @torch.inference_mode()
    def _vectors(self) -> Tensor:
        """Return one unit vector per label, float64 [labels, P] on the CPU."""
        # Sorting makes the features independent of the labels' order, and batches need little
        # padding.
        texts = sorted({text for each in self.sentences.values() for text in each}, key=_by_length)
        features = embed_texts(self.network, self.processor, texts, TEXTS)
        if not features.isfinite().all():
            raise ValueError(
                f"the model {shown(self.name)} gives labels no finite features; its weights are "
                "damaged: download or train it again"
            )
        of = dict(zip(texts, features.double(), strict=True))
        means = [torch.stack([of[x] for x in each]).mean(0) for each in self.sentences.values()]
        return F.normalize(torch.stack(means), dim=-1)

    def _best(self, scores: Tensor, chances: Tensor) -> list[Guess]:
        names = list(self.sentences)
        order = scores.sort(descending=True, stable=True).indices[: self.top].tolist()
        return [Guess(names[i], scores[i].item(), chances[i].item()) for i in order]

    def _finish(self) -> None:
        """List the files that were left out. Raises ValueError if no clip was classified."""
        reasons = {bad["path"]: bad["reason"] for bad in self.bad_files}
        list_left_out(reasons, self.sources, None if self.done else "classified")


def _by_length(text: str) -> tuple[int, str]:
    return len(text), text
