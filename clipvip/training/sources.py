"""The clips that a run trains on: one source, or several mixed by their ratios."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import ClipSource, ClipSources
from clipvip.data.shards import Shards, Source, is_shards
from clipvip.data.video import is_image
from clipvip.files import shown

Clips = list[Clip] | ClipSources | Shards
TEXTS = ("sentence", "paragraph")
MOST_COUNTED = 100_000  # clips whose kind is looked at


@dataclass
class SourceConfig:
    """One of several sources of clips: shards or a file of annotations, the same kind for all."""

    shards: str | None = None  # shards, in the forms that data.train allows; or else `clips`
    clips: str | None = None  # annotations (JSON Lines)
    ratio: float = 1.0  # share of clips from this source, relative to the ratios of the others
    # How several texts of a clip are used: "sentence" (one drawn at random) or "paragraph" (all
    # joined). By default as data.paragraph says.
    texts: str | None = None

    @property
    def path(self) -> str:
        return str(self.shards or self.clips)

    @property
    def paragraph(self) -> bool | None:
        return None if self.texts is None else self.texts == "paragraph"


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise ValueError if values are out of range or contradict each other."""
    for source in sources:
        if bool(source.shards) == bool(source.clips):
            has = "both shards and clips" if source.clips else "neither shards nor clips"
            raise ValueError(
                f"sources: one has {has}; give shards (tars, their folder or "
                "manifest) or clips (a file of annotations)"
            )
        if source.clips is not None and is_shards(source.clips):
            raise ValueError(
                f"sources: clips is {source.clips}, which is shards; expected a file of "
                f"annotations: give it as shards: {source.clips}"
            )
        if source.texts not in (None, *TEXTS):
            raise ValueError(
                f"sources: texts is {source.texts!r}; it must be one of {', '.join(TEXTS)}"
            )
        if not 0 < source.ratio < math.inf:
            raise ValueError(f"sources: ratio is {source.ratio}; it must be above 0 and finite")
    files = [source.clips for source in sources if source.clips is not None]
    if files and len(files) < len(sources):
        raise ValueError(
            f"sources: {files[0]} is a file of annotations and others are shards; expected one "
            f"kind: `clipvip shard {files[0]} FOLDER` makes shards of it"
        )


def load_sources(sources: Sequence[SourceConfig]) -> ClipSources | Shards:
    """Load checked sources. Raises AnnotationError or ShardError."""
    if sources[0].clips is None:
        return Shards([Source(each.path, each.ratio, each.paragraph) for each in sources])
    return ClipSources(
        [
            ClipSource(each.path, load_annotations(each.path), each.ratio, each.paragraph)
            for each in sources
        ]
    )


def describe_sources(clips: Clips) -> list[str]:
    """Return a line per source that is mixed; none if there is one alone.

    A line gives the source's share of the clips that are drawn, its name, its number of clips, and
    how often an epoch draws each of them.
    """
    if isinstance(clips, list) or len(clips.sources) == 1:
        return []
    lines = []
    for source, share in _shared(clips):
        often = f"each {share * len(clips) / len(source):.3g} times per epoch"
        texts = "" if source.paragraph is None else f", {TEXTS[source.paragraph]}s"
        name = shown(source.name)
        lines.append(f"{share:.1%} {name} ({len(source)} clips, {often}{texts})")
    return lines


def image_share(clips: Clips) -> float:
    """Return the share of images among the clips that are drawn; those that an older manifest does
    not count are taken for videos."""
    if isinstance(clips, list):
        return _images(clips)
    return sum(
        share
        * ((each.images or 0) / len(each) if isinstance(each, Source) else _images(each.clips))
        for each, share in _shared(clips)
    )


def _shared(clips: ClipSources | Shards) -> list[tuple[ClipSource | Source, float]]:
    sources: Sequence[ClipSource | Source] = clips.sources
    return list(zip(sources, clips.shares.tolist(), strict=True))


def _images(clips: Sequence[Clip]) -> float:
    """Return the share of images; if there are many clips, among some that are drawn."""
    if len(clips) > MOST_COUNTED:
        drawn = np.random.default_rng(0).integers(len(clips), size=MOST_COUNTED)
        clips = [clips[place] for place in drawn]
    return sum(is_image(clip.video) for clip in clips) / len(clips)
