"""TODO."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from clipvip.data.annotations import REPAIRED, Clip, kind_of, parse_record
from clipvip.data.shards.tars import MEDIA, Packed, open_url
from clipvip.data.video import Blob, DecodeError
from clipvip.files import decode_text, json_line, shown, write_whole

logger = logging.getLogger(__name__)


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


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Name the file in errors of the disk, and say that the run can be resumed."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; what is finished stays: correct that and run again"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def write_manifest(path: Path, shards: Iterable[Shard]) -> None:
    with on_disk(path):
        write_whole(path, (json_line(asdict(shard)) for shard in shards))


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
    shards = parse_manifest(text, path)
    clips = sum(shard.clips for shard in shards)
    if not 0 < clips <= MOST_CLIPS:
        raise ShardError(f"{path}: names {clips or 'no'} clips; expected 1 to {MOST_CLIPS}")
    return {shard.shard: shard for shard in shards}


def parse_manifest(text: bytes, path: str) -> list[Shard]:
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


def name_in(manifest: Path, url: str) -> str:
    """Return a tar's name for a manifest: the bare name where both lie in one folder, so that the
    folder can be moved."""
    folder, name = os.path.split(_absolute(url))
    return name if folder == os.path.abspath(manifest.parent) else _absolute(url)


def reason_of(error: Exception) -> str:
    """Return the reason why a tar cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, DecodeError):
        return error.reason
    if isinstance(error, OSError) and (error.strerror or str(error)):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
