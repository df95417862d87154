"""Verify annotations and shards: frames of every clip, and the checksum of every tar."""

import logging
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from clipvip.data.annotations import Annotations, Clip, write_annotations
from clipvip.data.loading import (
    BadFile,
    Failure,
    On,
    check_not_excluded,
    check_seen,
    for_each_clip,
    names_of,
    set_place,
    some_files,
    start_workers,
)
from clipvip.data.shards.manifest import (
    MOST_CLIPS,
    Shard,
    ShardError,
    Tally,
    load_manifest,
    name_in,
    write_manifest,
)
from clipvip.data.shards.tars import open_url, read_samples, reason_of, unpack
from clipvip.data.video import DecodeError, check_decodes
from clipvip.files import Hashed, shown
from clipvip.terminal import progress

logger = logging.getLogger(__name__)


CLIPS_PER_TASK, CLIPS_PER_LARGE_TASK, MANY_CLIPS = 16, 128, 100_000
Tars = list[tuple[str, Shard | None]]  # URLs of tars, with what their manifests say of them


class Verified(NamedTuple):
    """The number of clips verified, and the files that cannot be read."""

    clips: int
    bad: list[BadFile]


def verify_files(
    annotations: Path,
    clean: Path | None = None,
    *,
    num_workers: int | None = None,
    on: On = "local",
) -> Verified:
    """Decode the first, middle and last frame of every clip, and its image.

    clean: file to write the annotations of the readable clips to.
    num_workers, on: see write_shards.
    """
    clips = Annotations(annotations)
    places = range(len(clips))
    # One process takes all results, so those of many workers must not be too many.
    size = CLIPS_PER_TASK if len(clips) < MANY_CLIPS else CLIPS_PER_LARGE_TASK
    tasks = (places[first : first + size] for first in places[::size])
    found: list[Failure] = []
    work = partial(_verify_clips, clips)
    with (
        start_workers(
            on,
            work,
            num_workers,
            len(places[::size]),
            names_of(clips),
            lambda done: advance(done),
            sees=partial(some_files, clips),
        ) as workers,
        progress(f"verifying {len(clips)} clips", len(clips)) as advance,
    ):
        for _, failures in workers.run(tasks, ordered=False):
            if on == "ray":
                check_seen(failure.file for failure in failures)
            found += failures
    found.sort(key=lambda failure: failure.place)
    if clean is not None:
        kept = np.ones(len(clips), np.bool_)
        kept[[failure.place for failure in found]] = False
        write_annotations(clean, (clips[int(place)] for place in np.flatnonzero(kept)))
    return Verified(len(clips), [failure.file for failure in found])


def _verify_clips(clips: Annotations, places: range, excluded: frozenset[int]) -> list[Failure]:
    def check(place: int, clip: Clip) -> None:
        check_decodes(clip.video, clip.image, clip.start, clip.end)

    return for_each_clip(clips, places, excluded, check)


def verify_shards(
    source: str,
    clean: Path | None = None,
    manifest: Path | None = None,
    *,
    num_workers: int | None = None,
    on: On = "local",
) -> Verified:
    """Compare tars with their manifest, and decode the first, middle and last frame of every clip.

    source: see load_manifest.
    clean: file to write the annotations to from which the readable clips were made.
    manifest: file to write a manifest of the tars to, which then need not have one.
    num_workers, on: see write_shards.
    """
    shards: Tars
    if manifest is None:
        shards = list(load_manifest(source))
    else:
        from webdataset.shardlists import expand_urls

        shards = [(url, None) for url in expand_urls(source)]
    counts = (MOST_CLIPS if shard is None else shard.clips for _, shard in shards)
    firsts = np.cumsum([0, *counts]).tolist()
    found: dict[int, _Checked] = {}
    lines, numbers = array("q"), array("q")  # of each clip's annotation, and of its tar

    def name(place: int) -> str:
        number = int(np.searchsorted(firsts, place, side="right")) - 1
        return f"clip {place - firsts[number]} of {shards[number][0]}"

    def urls() -> list[str]:
        return [url for url, _ in shards]

    def readable() -> Iterator[Clip]:
        """Verify the tars, several at a time; yield the annotations of the clips that can be read,
        those of a tar in its order."""
        work = partial(_verify_shard, shards, firsts)
        with (
            start_workers(on, work, num_workers, len(shards), name, sees=urls) as workers,
            progress(f"verifying {len(shards)} shards", len(shards)) as done,
        ):
            for number, checked in workers.run(range(len(shards)), ahead=1, ordered=False):
                lines.extend(clip.line for clip in checked.annotations)
                numbers.extend([number] * len(checked.annotations))
                yield from checked.annotations
                found[number] = checked._replace(annotations=[])
                done(1)

    if clean is None:
        deque(readable(), maxlen=0)
    else:
        _write_in_order(clean, readable(), (numbers, lines), source)
    in_order = [found[number] for number in range(len(shards))]
    if manifest is not None:
        records = [checked.shard for checked in in_order if checked.shard is not None]
        named = [replace(record, shard=name_in(manifest, record.shard)) for record in records]
        write_manifest(manifest, named)
    bad = [file for checked in in_order for file in checked.bad]
    return Verified(sum(checked.clips for checked in in_order), bad)


def _write_in_order(
    clean: Path, clips: Iterator[Clip], keys: tuple[Sequence[int], Sequence[int]], source: str
) -> None:
    """Write annotations in the order of their line numbers, then of their tars. keys: numbers of
    the tars and of the lines, filled once `clips` has been read."""
    clean.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unsorted-", dir=clean.parent) as folder:
        unsorted = Path(folder, "clips.jsonl")
        write_annotations(unsorted, clips)
        if not keys[0]:
            raise ShardError(f"{source}: no clip of it can be read and says what it was made from")
        found = Annotations(unsorted)
        order = np.lexsort([np.array(key) for key in keys])
        write_annotations(clean, (found[int(place)] for place in order))


class _Checked(NamedTuple):
    """The findings in a tar.

    annotations: those of the clips that can be read; none if the tar is not as its manifest says.
    shard: its line for a manifest; None if it could not be read to its end.
    """

    clips: int
    bad: list[BadFile]
    annotations: list[Clip]
    shard: Shard | None


def _verify_shard(
    shards: Tars, firsts: list[int], number: int, excluded: frozenset[int]
) -> _Checked:
    """Verify the tar of shards[number]. firsts: place of the first clip of each shard."""
    url, expected = shards[number]
    bad: list[BadFile] = []
    annotations: list[Clip] = []
    tally = Tally()
    try:
        with open_url(url) as file:
            hashed = Hashed(file)
            for sample in read_samples(hashed, url):
                place = firsts[number] + tally.clips
                tally.clips += 1
                set_place(place)
                try:
                    clip, video, image, annotation = unpack(sample, url)
                    tally.add(clip, video)
                    check_not_excluded(place, excluded, video.name)
                    check_decodes(video, image, clip.start, clip.end)
                    annotations += [annotation] if annotation else []
                except DecodeError as error:
                    bad.append(BadFile(str(error.path), error.reason, 0))
            read_rest(hashed, url)
    except Exception as error:  # of fsspec and its file systems
        return _Checked(tally.clips, [*bad, BadFile(url, reason_of(error), 0)], [], None)
    shard = tally.shard(url if expected is None else expected.shard, hashed, bad=len(bad))
    if expected is not None and shard.sha256 != expected.sha256:
        reason = f"sha256 is {shard.sha256[:12]}…, its manifest says {expected.sha256[:12]}…"
        return _Checked(tally.clips, [*bad, BadFile(url, reason, 0)], [], shard)
    return _Checked(tally.clips, bad, annotations, shard)


def read_rest(file: Hashed, url: str) -> None:
    """Hash what follows the end of the tar, and warn if that is more than padding."""
    unread = False
    while rest := file.read(1 << 20):
        unread = unread or bool(rest.rstrip(b"\0"))
    if unread:
        logger.warning(
            "%s: the tar ends before its file; if tars were joined by cat, only the first is "
            "read: give each as a file of its own",
            shown(url),
        )
