"""Verification of shards: checksums, and frames of every clip."""

import logging
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from clipvip.data.annotations import Annotations, Clip, write_annotations
from clipvip.data.loading import BadFile, Workers, cores, workers
from clipvip.data.shards.manifest import (
    MOST_CLIPS,
    Shard,
    ShardError,
    load_manifest,
    name_in,
    reason_of,
    unpack,
    write_manifest,
)
from clipvip.data.shards.tars import open_url, read_samples
from clipvip.data.verify import Verified
from clipvip.data.video import DecodeError, check_decodes
from clipvip.files import Hashed, shown
from clipvip.progress import progress

logger = logging.getLogger(__name__)


def verify_shards(
    source: str,
    clean: Path | None = None,
    manifest: Path | None = None,
    *,
    num_workers: int | None = None,
) -> Verified:
    """Compare tars with their manifest, and decode the frames of every clip that verify_files
    decodes.

    clean: where to write the annotations from which the clips that can be read were made.
    manifest: where to write a manifest of the tars as they are; they need have none before.
    """
    shards: list[tuple[str, Shard | None]]
    if manifest is None:
        shards = list(load_manifest(source))
    else:
        from webdataset.shardlists import expand_urls

        shards = [(url, None) for url in expand_urls(source)]
    firsts = np.cumsum([0, *(shard.clips if shard else MOST_CLIPS for _, shard in shards)]).tolist()

    def name(place: int) -> str:
        number = int(np.searchsorted(firsts, place, side="right")) - 1
        return f"clip {place - firsts[number]} of {shards[number][0]}"

    clips, bad, records, lines = 0, [], [], array("q")

    def sources() -> Iterator[Clip]:
        """Verify tar by tar; yield the annotations of the clips that can be read."""
        nonlocal clips, bad, records
        with progress(f"verifying {len(shards)} shards", len(shards)) as done:
            crew: Workers[int, _Checked] = Workers(
                _ShardVerifier(shards, firsts), min(cores(num_workers), len(shards)), name
            )
            for _, checked in crew.run(range(len(shards)), ahead=1):
                clips += checked.clips
                bad += checked.bad
                records += [checked.shard] if checked.shard else []
                lines.extend(clip.line for clip in checked.sources)
                yield from checked.sources
                done(1)

    if clean is None:
        deque(sources(), maxlen=0)
    else:
        _write_in_order(clean, sources(), lines, source)
    if manifest is not None:
        named = [replace(record, shard=name_in(manifest, record.shard)) for record in records]
        write_manifest(manifest, named)
    return Verified(clips, bad)


def _write_in_order(clean: Path, clips: Iterator[Clip], lines: Sequence[int], source: str) -> None:
    """Write annotations sorted by their line numbers, which `lines` holds once `clips` is read."""
    clean.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unsorted-", dir=clean.parent) as folder:
        unsorted = Path(folder, "clips.jsonl")
        write_annotations(unsorted, clips)
        if not lines:
            raise ShardError(f"{source}: no clip of it can be read and says what it was made from")
        found = Annotations(unsorted)
        order = np.argsort(np.array(lines), kind="stable")
        write_annotations(clean, (found[int(place)] for place in order))


class _Checked(NamedTuple):
    clips: int
    bad: list[BadFile]
    sources: list[Clip]
    shard: Shard | None


class _ShardVerifier:
    """Verify a shard, given its number."""

    def __init__(self, shards: Sequence[tuple[str, Shard | None]], firsts: list[int]) -> None:
        self.shards = shards
        self.firsts = firsts

    def __call__(self, number: int, condemned: frozenset[int]) -> _Checked:
        url, expected = self.shards[number]
        bad: list[BadFile] = []
        sources: list[Clip] = []
        counts = {"clips": 0, "texts": 0, "subtitles": 0, "captions": 0}
        try:
            with open_url(url) as file:
                hashed = Hashed(file)
                for sample in read_samples(hashed, url):
                    place = self.firsts[number] + counts["clips"]
                    workers.at(place)
                    counts["clips"] += 1
                    try:
                        stored = unpack(sample, url)
                        counts["texts"] += bool(stored.clip.text)
                        counts["subtitles"] += stored.clip.subtitle is not None
                        counts["captions"] += stored.clip.caption is not None
                        if place in condemned:
                            raise DecodeError(stored.video.name, workers.CONDEMNED)
                        check_decodes(
                            stored.video, stored.image, stored.clip.start, stored.clip.end
                        )
                    except DecodeError as error:
                        bad.append(BadFile(str(error.path), error.reason, 0))
                        continue
                    sources += [stored.source] if stored.source else []
                unread = False
                while rest := hashed.read(1 << 20):
                    unread = unread or bool(rest.rstrip(b"\0"))
            if unread:
                logger.warning(
                    "%s: the tar ends before its file; if tars were joined by cat, only the first "
                    "is read: give each as a file of its own",
                    shown(url),
                )
        except Exception as error:  # fsspec and what lies below it
            return _Checked(counts["clips"], [*bad, BadFile(url, reason_of(error), 0)], [], None)
        shard = Shard(
            shard=url if expected is None else expected.shard,
            bytes=hashed.bytes,
            sha256=hashed.digest.hexdigest(),
            bad=len(bad),
            **counts,
        )
        if expected is not None and shard.sha256 != expected.sha256:
            reason = f"sha256 is {shard.sha256[:12]}…, its manifest says {expected.sha256[:12]}…"
            return _Checked(counts["clips"], [*bad, BadFile(url, reason, 0)], [], shard)
        return _Checked(counts["clips"], bad, sources, shard)
