"""Shards: clips in WebDataset tars, so that a hundred million of them are read in sequence.

`write_shards` makes a folder:

    00000.tar, 00001.tar, …   clips_per_shard clips each, drawn at random by the seed
    manifest.jsonl            a line per finished shard: shard, clips, bytes, sha256, and how many
                              of its clips have a text, a subtitle, a caption; bad: left out
    settings.json             what the shards were made from and how
    bad_files.jsonl           files left out, and why

A clip is `000001234.mp4` (its place in the annotations; or another container, or an image) and
`000001234.json`: text (a list), subtitle, caption; start and end within these bytes where the
clip is not all of them; source, the annotation it was made from. An annotated image is
`000001234.image.jpg`.

A tar is written under a temporary name, flushed and renamed, and then noted in the manifest. So
every shard in the manifest is whole, and a run that was killed resumes after the last one.

Other tars train too, given a manifest (`verify_shards` writes one): `.txt` beside the video or
image counts as its text and as its caption. They must not be compressed. A fault in one clip of a
tar, whatever a stranger wrote there, costs that clip alone.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipvip.data.annotations import Annotations, Clip, kind_of
from clipvip.data.loading import BadFile, BadFiles, Failure, Workers, cores, workers
from clipvip.data.shards.manifest import (
    MANIFEST,
    Shard,
    ShardError,
    on_disk,
    parse_manifest,
    write_manifest,
)
from clipvip.data.shards.tars import MEDIA
from clipvip.data.video import (
    CODING,
    Blob,
    Cut,
    DecodeError,
    as_decode_errors,
    check_decodes,
    cut,
    is_image,
    reencode,
    whole,
)
from clipvip.files import Hashed, json_line, only_run, sha256_of, shown, write_whole
from clipvip.ops.resize_crop import check_compiled
from clipvip.progress import progress

logger = logging.getLogger(__name__)

FORMAT = "clipvip shards 1"


# --- writing --------------------------------------------------------------------------------


def write_shards(
    annotations: Path,
    out: Path,
    *,
    clips_per_shard: int = 1000,
    cut: bool = False,
    size: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    max_bad_share: float = 0.05,
) -> list[Shard]:
    """Write a folder of shards, or resume a run that was killed.

    cut: store of each clip's video only what its part needs, packets unchanged. size: store
    the part coded anew as H.264, the shortest side this. Else whole files are stored, as are
    those that cannot be cut or coded so that they show the same; the log counts them. Every
    clip is decoded in three places first; what fails is left out, listed, and stops the run
    where more than max_bad_share of at least 100 clips do.

    Raises AnnotationError, ShardError (the folder holds other shards), LoaderError (too many
    bad files; what is finished stays).
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
        _settle(out, settings)
        order = np.random.default_rng(seed).permutation(len(clips))
        plan = np.split(order, range(clips_per_shard, len(clips), clips_per_shard))
        finished = _resume(out, {shard_name(number) for number in range(len(plan))})
        todo = [number for number in range(len(plan)) if shard_name(number) not in finished]
        bad = BadFiles(len(clips), max_bad_share, out / "bad_files.jsonl")
        for shard in finished.values():
            places = plan[int(shard.shard.removesuffix(".tar"))]
            bad.resume(places.tolist(), shard.bad)
        instead: Counter[str] = Counter()
        count = sum(len(plan[number]) for number in todo)
        note = f"writing {len(todo)} shards of {count} clips"
        with progress(
            note + (f", {len(finished)} are finished" if finished else ""), count
        ) as done:
            crew: Workers[int, _Written] = Workers(
                _Writer(clips, plan, out, cut, size),
                min(cores(num_workers), len(todo)),
                lambda place: f"{shown(clips[place].video)} (line {clips[place].line})",
                done,
            )
            for number, written in crew.run(todo, ahead=1, ordered=False):
                try:  # in this order, since what is noted as finished is not looked at again
                    bad.note(plan[number].tolist(), written.failures)
                finally:
                    _append_line(out / MANIFEST, asdict(written.shard))
                finished[written.shard.shard] = written.shard
                instead += written.instead
        for why, times in instead.most_common():
            logger.warning("%d %s %s", times, "clips" if times > 1 else "clip", why)
        bad.note((), (), final=True)
        shards = [finished[shard_name(number)] for number in range(len(plan))]
        write_manifest(out / MANIFEST, shards)
    return shards


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a new folder; raise ShardError where one holds shards made otherwise,
    or by others."""
    path = out / "settings.json"
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
            if not isinstance(old, dict):
                raise ValueError(f"expected an object in braces, got {kind_of(old)}")
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{path}: {error}; give a new or empty folder") from error
        for key, value in settings.items():
            if old.get(key) != value:
                other = {"annotations": "other annotations", "coding": "another video coding"}
                was = other.get(key, f"{key}={old.get(key)}")
                raise ShardError(
                    f"{out} holds shards made with {was}; give another folder, or the same "
                    "annotations and options to resume"
                )
    else:
        taken = re.compile(rf".*\.tar(\.partial)?|{re.escape(MANIFEST)}", re.DOTALL)
        others = sorted(filter(taken.fullmatch, os.listdir(out)))
        if others:
            raise ShardError(
                f"{out} holds {others[0]!r} and no settings.json, so that is not of an earlier "
                "run; give a new or empty folder"
            )
        with on_disk(path):
            write_whole(path, json.dumps(settings, indent=1) + "\n")


def _resume(out: Path, names: Collection[str]) -> dict[str, Shard]:
    """Return those of these shards that are finished; delete partial files of a killed run."""
    for name in names:
        (out / f"{name}.partial").unlink(missing_ok=True)
    path = out / MANIFEST
    finished: dict[str, Shard] = {}
    if path.exists():
        text, _, _ = path.read_bytes().rpartition(b"\n")
        try:
            shards = parse_manifest(text, str(path))
        except ShardError as error:
            raise ShardError(f"{error}; delete that line, and its shard is written again") from None
        finished = {
            s.shard: s for s in shards if s.shard in names and _size(out / s.shard) == s.bytes
        }
        write_manifest(path, finished.values())
    return finished


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _append_line(path: Path, record: dict[str, Any]) -> None:
    with on_disk(path), path.open("ab") as file:
        file.write(json_line(record))
        file.flush()
        os.fsync(file.fileno())


class _Written(NamedTuple):
    """instead: how many clips are stored otherwise than was asked for, and how, by why."""

    shard: Shard
    failures: list[Failure]
    instead: Counter[str]


class _Writer:
    """Write a shard, given its number."""

    def __init__(
        self,
        clips: Annotations,
        plan: Sequence[Any],
        out: Path,
        cut: bool,
        size: int | None,
    ) -> None:
        self.clips = clips
        self.plan = plan
        self.out = out
        self.cut = cut
        self.size = size

    def __call__(self, number: int, condemned: frozenset[int]) -> _Written:
        check_compiled()  # or every clip would seem to be bad
        partial = self.out / f"{shard_name(number)}.partial"
        try:
            with on_disk(partial):
                return self._write(number, partial, condemned)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, number: int, partial: Path, condemned: frozenset[int]) -> _Written:
        from webdataset import TarWriter

        failures: list[Failure] = []
        instead: Counter[str] = Counter()
        counts = {"clips": 0, "texts": 0, "subtitles": 0, "captions": 0}
        with partial.open("wb") as file:
            hashed = Hashed(file)
            with TarWriter(hashed, encoder=False, mtime=0) as tar:
                for place in self.plan[number].tolist():
                    workers.at(place)
                    clip = self.clips[place]
                    try:
                        if place in condemned:
                            raise DecodeError(clip.video, workers.CONDEMNED)
                        # An error of reading is the clip's fault; one of writing is the disk's.
                        with as_decode_errors(clip.video):
                            stored = self._stored(clip)
                            sample = _sample(clip, stored)
                    except DecodeError as error:
                        # An error of bytes in memory has only a name for a path.
                        path = clip.image if error.path == clip.image else clip.video
                        bad = BadFile(str(path), error.reason, clip.line)
                        failures.append(Failure(place, bad))
                    else:
                        tar.write({"__key__": f"{place:09d}", **sample})
                        instead.update([stored.instead] if stored.instead else ())
                        counts["clips"] += 1
                        counts["texts"] += bool(clip.text)
                        counts["subtitles"] += clip.subtitle is not None
                        counts["captions"] += clip.caption is not None
                    workers.tell(1)
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(
            shard=shard_name(number),
            bytes=hashed.bytes,
            sha256=hashed.digest.hexdigest(),
            bad=len(failures),
            **counts,
        )
        partial.replace(self.out / shard.shard)
        return _Written(shard, failures, instead)

    def _stored(self, clip: Clip) -> Cut:
        if is_image(clip.video):
            return whole(clip.video)
        if self.size is not None:
            return reencode(clip.video, self.size, clip.start, clip.end)
        if self.cut:
            return cut(clip.video, clip.start, clip.end)
        return whole(clip.video, clip.start, clip.end)


def _sample(clip: Clip, stored: Cut) -> dict[str, bytes]:
    """Members of a tar. Raises DecodeError where they cannot be read."""
    record = {
        "text": list(clip.text) or None,
        "subtitle": clip.subtitle,
        "caption": clip.caption,
        "start": stored.start,
        "end": stored.end,
        "source": {
            "video": os.path.abspath(clip.video),
            "start": clip.start,
            "end": clip.end,
            "image": clip.image and os.path.abspath(clip.image),
            "line": clip.line,
        },
    }
    sample = {
        "json": json_line(_given(record)),
        _suffix(stored.blob.name, ".mp4"): stored.blob.data,
    }
    image: Blob | None = None
    if clip.image is not None:
        image = Blob(str(clip.image), whole(clip.image).blob.data)
        sample[f"image.{_suffix(image.name, '.jpg')}"] = image.data
    unseen = None if stored.compared else stored.blob
    check_decodes(unseen, image, stored.start, stored.end)
    return sample


def _suffix(name: str, otherwise: str) -> str:
    """Return the suffix of a member, without its dot. Readers know media by it alone."""
    suffix = Path(name).suffix.lower()
    return (suffix if suffix in MEDIA else otherwise)[1:]


def _given(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in record.items()
        if value is not None
    }


# --- reading --------------------------------------------------------------------------------


# --- verifying ------------------------------------------------------------------------------
