"""Write clips into shards, WebDataset tars that training reads in sequence.

`write_shards` makes a folder:

    00000.tar, 00001.tar, …   clips_per_shard clips each, drawn at random by the seed
    manifest.jsonl            one line per finished shard, see manifest.py
    settings.json             the annotations and options that the shards were made from
    bad_files.jsonl           files left out, and why

tars.py says how a clip is stored. A tar is written under a temporary name, flushed, renamed, and
then added to the manifest. So every shard in the manifest is whole, and a run that was killed
resumes after the last one.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from clipvip.data.annotations import Annotations, Clip, kind_of
from clipvip.data.loading import (
    BadFiles,
    Failure,
    On,
    check_seen,
    for_each_clip,
    names_of,
    some_files,
    start_workers,
)
from clipvip.data.shards.manifest import (
    MANIFEST,
    Shard,
    ShardError,
    Tally,
    append_to_manifest,
    finished_shards,
    on_disk,
    write_manifest,
)
from clipvip.data.shards.tars import members_of
from clipvip.data.video import CODING, Cut, as_decode_errors, cut, is_image, reencode, whole
from clipvip.files import Hashed, only_run, sha256_of, write_whole
from clipvip.ops.resize_crop import check_compiled
from clipvip.terminal import progress

logger = logging.getLogger(__name__)

FORMAT = "clipvip shards 1"
PARTIAL = re.compile(r"(.*\.tar)\.([0-9a-f]{32}\.)?partial", re.DOTALL)
# A shard, the clips left out of it, and the number of clips by how they were stored instead of as
# requested, and why.
Written = tuple[Shard, list[Failure], Counter[str]]


def write_shards(
    annotations: Path,
    out: Path,
    *,
    clips_per_shard: int = 1000,
    cut: bool = False,
    size: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    on: On = "local",
    max_bad_share: float = 0.05,
) -> list[Shard]:
    """Write a folder of shards, or resume a run that was killed.

    cut: store only the part of each video that its clip needs, with unchanged packets.
    size: re-encode that part as H.264 with this shortest side, in pixels.
    on: "local" for processes of this machine, "ray" for those of a Ray cluster, which makes the
        same tars. All nodes must see the clips and `out` under the same paths.

    Without these, whole files are stored. So are files that cannot be cut or re-encoded without
    changing what they show; the log counts them. The first, middle and last frame of every clip
    are decoded. A clip that fails is left out and listed in bad_files.jsonl; the run stops if more
    than max_bad_share of at least 100 clips fail.

    Raises AnnotationError; ShardError if the folder holds other shards; LoaderError for too many
    bad files, where finished shards are kept.
    """
    for name, value in (("clips_per_shard", clips_per_shard), ("size", size)):
        if value is not None and value < 1:
            raise ShardError(f"{name} is {value}; expected at least 1")
    clips = Annotations(annotations)
    settings = {
        "format": FORMAT,
        "annotations": sha256_of(annotations),
        "clips_per_shard": clips_per_shard,
        "cut": cut,
        "size": size,
        "coding": None if size is None else CODING,
        "seed": seed,
    }
    with only_run(out, "writes shards", ShardError):
        check_settings(out, settings)
        order = np.random.default_rng(seed).permutation(len(clips))
        plan = np.split(order, range(clips_per_shard, len(clips), clips_per_shard))
        names = [_shard_name(number) for number in range(len(plan))]
        delete_partial(out, {*names})
        finished = finished_shards(out / MANIFEST, set(names))
        bad = BadFiles(len(clips), max_bad_share, out / "bad_files.jsonl")
        for shard in finished.values():
            bad.resume(plan[int(shard.shard.removesuffix(".tar"))], shard.bad)
        _write_missing(_Writer(clips, plan, out, cut, size), finished, bad, on, num_workers)
        delete_partial(out, {*names})  # of workers that died
        bad.note((), (), final=True)
        shards = [finished[name] for name in names]
        write_manifest(out / MANIFEST, shards)
    return shards


def _shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def partial_path(path: Path) -> Path:
    """Return a new name for a tar that is being written. It is never used twice, since a worker
    that was given up may still write on a lost node."""
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


def delete_partial(out: Path, names: Collection[str]) -> None:
    """Delete what workers left that died while they wrote tars of these names."""
    for name in os.listdir(out):
        found = PARTIAL.fullmatch(name)
        if found is not None and found[1] in names:
            (out / name).unlink(missing_ok=True)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder without shards; raise ShardError if it holds shards of other
    settings, or of another tool."""
    path = out / "settings.json"
    names = os.listdir(out)
    shards = [x for x in names if x.endswith(".tar") or PARTIAL.fullmatch(x) or x == MANIFEST]
    if not path.exists():
        if shards:
            raise ShardError(
                f"{out} holds {min(shards)!r} and no settings.json, so it is not from an earlier "
                "run; give a new or empty folder"
            )
        _write_settings(path, settings)
        return
    try:
        old = json.loads(path.read_bytes())
        if not isinstance(old, dict):
            raise ValueError(f"expected an object in braces, got {kind_of(old)}")
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: {error}; give a new or empty folder") from error
    if not shards and old.get("format") == settings["format"]:  # of a run that wrote none
        _write_settings(path, settings)
        return
    for key, value in settings.items():
        if old.get(key) != value:
            other = {"annotations": "other annotations", "coding": "another video coding"}
            other |= {"shards": "other shards", "model": "another model"}
            was = other.get(key, f"{key}={old.get(key)}")
            raise ShardError(
                f"{out} holds shards made with {was}; give another folder, or the same "
                f"{'shards' if 'shards' in settings else 'annotations'} and options to resume"
            )


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    with on_disk(path):
        write_whole(path, json.dumps(settings, indent=1) + "\n")


def _write_missing(
    writer: "_Writer",
    finished: dict[str, Shard],
    bad: BadFiles,
    on: On,
    num_workers: int | None,
) -> None:
    """Write the shards that are not finished, and add them to `finished` and to the manifest."""
    plan = writer.plan
    missing = [number for number in range(len(plan)) if _shard_name(number) not in finished]
    clips = sum(len(plan[number]) for number in missing)
    note = f"writing {len(missing)} shards of {clips} clips"
    note += f", {len(finished)} are finished" if finished else ""
    fallbacks: Counter[str] = Counter()
    with (
        # Ends the workers too: none may still write when another run begins.
        start_workers(
            on,
            writer,
            num_workers,
            len(missing),
            names_of(writer.clips),
            lambda clips: done(clips),
            sees=partial(some_files, writer.clips),
            writes=writer.out,
        ) as workers,
        progress(note, clips) as done,
    ):
        for number, (shard, failures, stored) in workers.run(missing, ahead=1, ordered=False):
            if on == "ray":
                check_seen(failure.file for failure in failures)
            try:  # bad files first, since a shard in the manifest is not checked again
                bad.note(plan[number].tolist(), failures)
            finally:
                append_to_manifest(writer.out / MANIFEST, shard)
            finished[shard.shard] = shard
            fallbacks += stored
    for fallback, times in fallbacks.most_common():
        logger.warning("%d %s %s", times, "clips" if times > 1 else "clip", fallback)


@dataclass(frozen=True)
class _Writer:
    """Write a shard, given its number. plan: places of the clips of each shard."""

    clips: Annotations
    plan: Sequence[NDArray[Any]]
    out: Path
    cut: bool
    size: int | None

    def __call__(self, number: int, excluded: frozenset[int]) -> Written:
        from webdataset import TarWriter

        check_compiled()  # or every clip would seem to be bad
        name, tally = _shard_name(number), Tally()
        partial = partial_path(self.out / name)
        fallbacks: Counter[str] = Counter()

        def store(place: int, clip: Clip) -> None:
            with as_decode_errors(clip.video):  # errors of reading, not those of writing
                stored = self._stored(clip)
                members = members_of(clip, stored)
            tar.write({"__key__": f"{place:09d}", **members})
            fallbacks.update([stored.instead] if stored.instead else ())
            tally.clips += 1
            tally.add(clip, clip.video)

        try:
            with on_disk(self.out / name):
                with partial.open("wb") as file:
                    hashed = Hashed(file)
                    with TarWriter(hashed, encoder=False, mtime=0) as tar:
                        places = self.plan[number].tolist()
                        failures = for_each_clip(self.clips, places, excluded, store)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.out / name)
        finally:
            partial.unlink(missing_ok=True)
        return tally.shard(name, hashed, bad=len(failures)), failures, fallbacks

    def _stored(self, clip: Clip) -> Cut:
        if is_image(clip.video):
            return whole(clip.video)
        if self.size is not None:
            return reencode(clip.video, self.size, clip.start, clip.end)
        if self.cut:
            return cut(clip.video, clip.start, clip.end)
        return whole(clip.video, clip.start, clip.end)
