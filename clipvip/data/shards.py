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

import hashlib
import json
import logging
import os
import re
from array import array
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from clipvip.data import workers
from clipvip.data.annotations import (
    REPAIRED,
    Annotations,
    Clip,
    kind_of,
    parse_record,
    write_annotations,
)
from clipvip.data.bad_files import BadFile, BadFiles, Failure
from clipvip.data.container import (
    Blob,
    DecodeError,
    Source,
    as_decode_errors,
    file_of,
    is_image,
)
from clipvip.data.decode import read_frames
from clipvip.data.tars import MEDIA, Packed, open_url, read_samples
from clipvip.data.transcode import CODING, Cut, cut, reencode, whole
from clipvip.data.workers import Workers
from clipvip.files import decode_text, json_line, only_run, shown, write_whole
from clipvip.ops.resize_crop import check_compiled
from clipvip.progress import progress

logger = logging.getLogger(__name__)

FORMAT = "clipvip shards 1"
MANIFEST = "manifest.jsonl"
MANIFEST_BYTES = 1 << 28  # a million shards
MOST_CLIPS = 10**10  # in all shards of a manifest
LEAST_BYTES = 512  # that a clip takes in a tar


class ShardError(ValueError):
    """Shards that cannot be used, or made; one line that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A line of a manifest. texts, subtitles, captions: clips that have one."""

    shard: str
    clips: int
    bytes: int
    sha256: str
    texts: int
    subtitles: int
    captions: int
    bad: int = 0


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
        "annotations": _sha256(annotations),
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
                min(_cores(num_workers), len(todo)),
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
        _write_manifest(out / MANIFEST, shards)
    return shards


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        hashed = _Hashed(file)
        while hashed.read(1 << 20):
            pass
    return hashed.digest.hexdigest()


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def _cores(num_workers: int | None) -> int:
    if num_workers is not None:
        return num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        with _on_disk(path):
            write_whole(path, json.dumps(settings, indent=1) + "\n")


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Name the file in errors of the disk, and say that the run can be resumed."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; what is finished stays: correct that and run again"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def _resume(out: Path, names: Collection[str]) -> dict[str, Shard]:
    """Return those of these shards that are finished; delete partial files of a killed run."""
    for name in names:
        (out / f"{name}.partial").unlink(missing_ok=True)
    path = out / MANIFEST
    finished: dict[str, Shard] = {}
    if path.exists():
        text, _, _ = path.read_bytes().rpartition(b"\n")
        try:
            shards = _parse_manifest(text, str(path))
        except ShardError as error:
            raise ShardError(f"{error}; delete that line, and its shard is written again") from None
        finished = {
            s.shard: s for s in shards if s.shard in names and _size(out / s.shard) == s.bytes
        }
        _write_manifest(path, finished.values())
    return finished


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write_manifest(path: Path, shards: Iterable[Shard]) -> None:
    with _on_disk(path):
        write_whole(path, (json_line(asdict(shard)) for shard in shards))


def _append_line(path: Path, record: dict[str, Any]) -> None:
    with _on_disk(path), path.open("ab") as file:
        file.write(json_line(record))
        file.flush()
        os.fsync(file.fileno())


class _Written(NamedTuple):
    """instead: how many clips are stored otherwise than was asked for, and how, by why."""

    shard: Shard
    failures: list[Failure]
    instead: Counter[str]


class _Hashed:
    """Passes on what is written or read, and takes its SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self._take(data)
        return self.file.write(data)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self._take(data)
        return data

    def _take(self, data: Any) -> None:
        self.digest.update(data)
        self.bytes += len(data)


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
            with _on_disk(partial):
                return self._write(number, partial, condemned)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, number: int, partial: Path, condemned: frozenset[int]) -> _Written:
        from webdataset import TarWriter

        failures: list[Failure] = []
        instead: Counter[str] = Counter()
        counts = {"clips": 0, "texts": 0, "subtitles": 0, "captions": 0}
        with partial.open("wb") as file:
            hashed = _Hashed(file)
            with TarWriter(hashed, encoder=False, mtime=0) as tar:
                for place in self.plan[number].tolist():
                    workers.at(place)
                    clip = self.clips[place]
                    try:
                        if place in condemned:
                            raise DecodeError(clip.video, workers.CONDEMNED)
                        # An error of reading is the clip's fault; one of writing is the disk's.
                        with as_decode_errors(file_of(clip.video)):
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
    part = replace(clip, start=stored.start, end=stored.end)
    check_decodes(part, None if stored.compared else stored.blob, image)
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


def check_decodes(clip: Clip, video: Source | None, image: Source | None) -> None:
    """Decode the first, middle and last frame, and the image. Raises DecodeError."""
    if video is not None:
        read_frames(video, 3, size=16, start=clip.start, end=clip.end)
    if image is not None:
        read_frames(image, 1, size=16)


# --- reading --------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A clip of a shard: what to read, and the annotation it was made from, if that is known."""

    clip: Clip
    video: Blob
    image: Blob | None
    source: Clip | None


def unpack(sample: Packed, url: str) -> Stored:
    """Return a sample's clip. Raises DecodeError where it holds none."""
    name, members = f"{url}/{sample.key}", sample.members
    if sample.fault is not None:
        raise DecodeError(name, sample.fault)
    try:
        record = json.loads(members.get("json", b"{}"))
        if not isinstance(record, dict):
            raise ValueError(f"expected an object in braces, got {kind_of(record)}")
        keys = ("text", "subtitle", "caption", "start", "end")
        known = {key: record[key] for key in keys if record.get(key) not in (None, "", [])}
        text, guessed = decode_text(members.get("txt", b""))
        text = text.strip()
        if text:
            known = {"text": text, "caption": text} | known
        said = {key: known[key] for key in keys[:3] if key in known}
        origin = _origin(record.get("source"), said)
        line = 0 if origin is None else origin.line
        # A tar may give its members names that no file can have.
        clip = replace(parse_record({**known, "video": "in a tar"}, Path(), line), video=Path(name))
    except Exception as error:  # a stranger may have written anything
        reason = str(error) or type(error).__name__
        raise DecodeError(name, f"its text or JSON: {reason}") from error
    if clip.repaired:
        _warn_first(name, REPAIRED)
    if guessed:
        _warn_first(name, "its text is not UTF-8; read as Windows-1252")
    media = [key for key in members if f".{key.rpartition('.')[2]}" in MEDIA]
    videos = [key for key in media if "." not in key]
    images = [key for key in media if "." in key]
    if len(videos) != 1:
        raise DecodeError(name, f"expected one video or image, got {', '.join(videos) or 'none'}")
    blobs = [Blob(f"{name}.{key}", members[key]) for key in videos + images[:1]]
    return Stored(clip, blobs[0], blobs[1] if images else None, origin)


def _origin(source: Any, said: dict[str, Any]) -> Clip | None:
    """Return the annotation that a clip was made from; None where 'source' is another program's.

    said: the clip's texts.
    """
    if not isinstance(source, dict):
        return None
    line = source.get("line", 0)
    if type(line) is not int or not 0 <= line < 1 << 63:
        return None
    try:
        given = {key: value for key, value in source.items() if key != "line"}
        return parse_record(given | said, Path(), line)
    except ValueError:
        return None


_warned: set[str] = set()


def _warn_first(name: str, fault: str) -> None:
    """Warn of the first clip with this fault in this process; there may be millions."""
    if fault not in _warned:
        _warned.add(fault)
        logger.warning("%s: %s; further clips like it are not named", shown(name), fault)


def load_manifest(source: str) -> list[tuple[str, Shard]]:
    """(URL, shard) of what `source` names: tars with braces ("clips/{00000..00099}.tar", several
    joined by "::"), a folder of shards, or a manifest. Raises ShardError."""
    from webdataset.shardlists import expand_urls

    if source.endswith(".jsonl"):
        return [(join(parent(source), s.shard), s) for s in _read_manifest(source).values()]
    if not source.endswith(".tar"):
        return load_manifest(join(source, MANIFEST))
    found: list[tuple[str, Shard]] = []
    manifests: dict[str, dict[str, Shard]] = {}
    for url in expand_urls(source):
        path = join(parent(url), MANIFEST)
        if path not in manifests:
            manifests[path] = _read_manifest(path)
        names = (url.rpartition("/")[2], _absolute(url))
        shard = next((manifests[path][name] for name in names if name in manifests[path]), None)
        if shard is None:
            raise ShardError(
                f"{url} is not in {path}, which names {len(manifests[path])} shards; "
                "is `clipvip shard` still at work, or the range too long?"
            )
        found.append((url, shard))
    return found


def is_shards(source: str) -> bool:
    """Whether a source of clips names shards: a tar, a manifest or a folder; else annotations."""
    return source.endswith((".tar", "/", MANIFEST)) or os.path.isdir(source)


def _read_manifest(path: str) -> dict[str, Shard]:
    try:
        with open_url(path) as file:
            text = file.read(MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise ShardError(
            f"no manifest {path}; `clipvip shard` writes one, `clipvip verify --manifest` one of "
            "tars made elsewhere"
        ) from None
    except Exception as error:  # fsspec and what lies below it
        raise ShardError(f"{path}: {reason_of(error)}; expected a manifest of shards") from error
    if len(text) > MANIFEST_BYTES:
        raise ShardError(f"{path}: more than {MANIFEST_BYTES >> 20} MiB; expected a manifest")
    shards = _parse_manifest(text, path)
    clips = sum(shard.clips for shard in shards)
    if not 0 < clips <= MOST_CLIPS:
        raise ShardError(f"{path}: names {clips or 'no'} clips; expected 1 to {MOST_CLIPS}")
    return {shard.shard: shard for shard in shards}


def _parse_manifest(text: bytes, path: str) -> list[Shard]:
    shards = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            shards += [_parse_shard(line)] if line.strip() else []
        except (ValueError, TypeError, RecursionError) as error:
            raise ShardError(
                f"{path}:{number}: expected a shard, as `clipvip shard` notes it; {error}"
            ) from error
    return shards


def _parse_shard(line: bytes) -> Shard:
    shard = Shard(**json.loads(line))
    name, parts = shard.shard, [shard.clips, shard.texts, shard.subtitles, shard.captions]
    if not isinstance(name, str) or not name or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"'shard' is {name!r:.80}, not the name of a tar beside it, or in full")
    if "::" in name:  # fsspec would keep copies, or open one file inside another
        raise ValueError(f"'shard' is {name!r:.80}, not one plain URL")
    name.encode("utf-8", "surrogateescape")
    if not all(type(count) is int and count >= 0 for count in [*parts, shard.bytes, shard.bad]):
        raise ValueError("its counts are not all whole numbers from 0 on")
    if max(parts) > shard.clips or shard.clips * LEAST_BYTES > shard.bytes:
        raise ValueError(f"its {shard.clips} clips do not agree with its other counts or its bytes")
    if not isinstance(shard.sha256, str) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError("its sha256 is not 64 hexadecimal digits")
    return shard


def parent(url: str) -> str:
    return url.rpartition("/")[0] if "/" in url else "."


def join(folder: str, name: str) -> str:
    """A manifest's shard may be a whole URL or path."""
    if urlsplit(name).scheme or name.startswith("/"):
        return name
    return f"{folder.rstrip('/')}/{name}"


def _absolute(url: str) -> str:
    return url if urlsplit(url).scheme else os.path.abspath(url)


def _name_in(manifest: Path, url: str) -> str:
    """Return a tar's name for a manifest: the bare name where both lie in one folder, so that the
    folder can be moved."""
    folder, name = os.path.split(_absolute(url))
    return name if folder == os.path.abspath(manifest.parent) else _absolute(url)


# --- verifying ------------------------------------------------------------------------------


class Verified(NamedTuple):
    clips: int
    bad: list[BadFile]


def verify_files(
    annotations: Path, clean: Path | None = None, *, num_workers: int | None = None
) -> Verified:
    """Decode the first, middle and last frame of every clip, and its image; write the
    annotations of those that can be to `clean`."""
    clips = Annotations(annotations)
    kept = np.ones(len(clips), np.bool_)
    bad: list[BadFile] = []
    with progress(f"verifying {len(clips)} clips", len(clips)) as done:
        crew: Workers[range, list[Failure]] = Workers(
            _FileVerifier(clips),
            min(_cores(num_workers), len(clips)),
            lambda place: f"{shown(clips[place].video)} (line {clips[place].line})",
            done,
        )
        tasks = (range(i, min(i + 16, len(clips))) for i in range(0, len(clips), 16))
        for _, failures in crew.run(tasks):
            bad += [failure.file for failure in failures]
            kept[[failure.place for failure in failures]] = False
    if clean is not None:
        write_annotations(clean, (clips[int(place)] for place in np.flatnonzero(kept)))
    return Verified(len(clips), bad)


class _FileVerifier:
    """Find the places whose clips cannot be read."""

    def __init__(self, clips: Annotations) -> None:
        self.clips = clips

    def __call__(self, places: range, condemned: frozenset[int]) -> list[Failure]:
        failures = []
        for place in places:
            workers.at(place)
            clip = self.clips[place]
            try:
                if place in condemned:
                    raise DecodeError(clip.video, workers.CONDEMNED)
                check_decodes(clip, clip.video, clip.image)
            except DecodeError as error:
                failures.append(Failure(place, BadFile(str(error.path), error.reason, clip.line)))
            workers.tell(1)
        return failures


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
                _ShardVerifier(shards, firsts), min(_cores(num_workers), len(shards)), name
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
        named = [replace(record, shard=_name_in(manifest, record.shard)) for record in records]
        _write_manifest(manifest, named)
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
                hashed = _Hashed(file)
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
                        check_decodes(stored.clip, stored.video, stored.image)
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


def reason_of(error: Exception) -> str:
    """Return the reason why a tar cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, DecodeError):
        return error.reason
    if isinstance(error, OSError) and (error.strerror or str(error)):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
