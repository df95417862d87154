"""Say what videos show, with a model that captions. This is `clipvip describe`."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clipvip.captioning import BEAMS, caption_clips, load_for_captioning
from clipvip.collection import clips_of, list_left_out
from clipvip.data.annotations import Clip
from clipvip.data.loading import BadFile, Division, PartReader, divide_files
from clipvip.embedding import autocast
from clipvip.files import json_line, shown
from clipvip.model import CLIPViPProcessor
from clipvip.terminal import progress


def describe(
    model: str | Path,
    videos: str | Path | Sequence[str | Path],
    *,
    window: float | None = None,
    beams: int = BEAMS,
    length: int | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    decoder: str = "auto",
    device: str | torch.device | None = None,
    mixed_precision: str = "auto",
) -> Iterator[tuple[Clip, str]]:
    """Yield each clip with its caption, in the order of the clips, as soon as it is captioned.

    Unreadable files are left out, and listed on standard error after the last caption.

    model: folder or hub name of a model with a decoder, see `load_for_captioning`.
    videos: videos, images, folders, annotations (.jsonl), lists (.txt) and patterns, see
        clipvip.collection.
    window: seconds of a moment; longer videos are described moment by moment. None describes every
        clip as a whole. Clips with a start or end of their own are not divided.
    beams, length: see clipvip.captioning.caption_clips.
    batch_size: clips per batch. num_workers: decoding processes, by default one per core.
    decoder: see clipvip.data.loading.LoaderOptions.
    device: by default a CUDA GPU, if there is one.
    mixed_precision: see clipvip.embedding.precision_on.

    Raises ValueError if the model has no decoder, for a name in `videos` that matches nothing, for
    a number out of its range, and if no clip could be described.
    """
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    found, left_out = clips_of(sources)
    bad_files = [BadFile(bad["path"], bad["reason"], 0) for bad in left_out]
    clips = [Clip(Path(clip.path), clip.start, clip.end) for clip in found]
    network: Any
    network, processor = load_for_captioning(model)
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    if window is not None:
        clips = _moments(clips, window, processor, bad_files, workers)
    done, precision = 0, autocast(network, mixed_precision)
    with progress(f"describing {len(clips)} clips", len(clips)) as advance:
        options: dict[str, Any] = {"decoder": decoder, "beams": beams, "length": length}
        options |= {"batch_size": batch_size, "num_workers": min(workers, len(clips))}
        batches = caption_clips(network, processor, clips, bad_files, **options) if clips else None
        while batches is not None:
            with precision:  # which must not reach into the caller's code
                captions = next(batches, None)
            if captions is None:
                break
            for place, caption in captions.items():
                done += 1
                yield clips[place], caption
            advance(len(captions))
    reasons = {str(bad.path): bad.reason for bad in bad_files}
    list_left_out(reasons, sources, None if done else "described")


def _moments(
    clips: list[Clip],
    window: float,
    processor: CLIPViPProcessor,
    bad_files: list[BadFile],
    workers: int,
) -> list[Clip]:
    """Divide whole videos into moments of so many seconds; other clips stay as they are."""
    reading = processor.loading()
    reading.pop("text_length")
    spans = [None if clip == Clip(clip.video) else [(clip.start, clip.end)] for clip in clips]
    files = [(clip.video, given) for clip, given in zip(clips, spans, strict=True)]
    reader = PartReader(files, Division(window, window, False), **reading)
    moments: list[Clip] = []
    with progress(f"dividing {len(files)} videos into moments", len(files)) as advance:
        for place, facts in divide_files(reader, bad_files, min(workers, len(files))):
            moments += [Clip(files[place][0], *span) for span in facts.spans]
            advance(1)
    return moments


def print_captions(described: Iterable[tuple[Clip, str]], as_json: bool) -> None:
    """Print a line per clip: as JSON, or its path, its seconds unless it is whole, and caption."""
    here = Path.cwd()
    for clip, caption in described:
        if as_json:
            row = {"path": str(clip.video), "start": clip.start, "end": clip.end}
            print(json_line(row | {"caption": caption}).decode(), end="", flush=True)
            continue
        path = clip.video.relative_to(here) if clip.video.is_relative_to(here) else clip.video
        span = ""
        if clip.start is not None or clip.end is not None:
            span = f" {clip.start or 0:g}–{'' if clip.end is None else f'{clip.end:g}'} s"
        print(f"{shown(path)}{span}: {shown(caption)}", flush=True)
