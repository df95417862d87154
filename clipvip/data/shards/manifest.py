"""The manifest of shards: manifest.jsonl, which has one line per tar, see Shard.

A tar is named by its file name if it lies beside the manifest, else by its path or URL.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from clipvip.data.annotations import Clip
from clipvip.data.shards.tars import open_url, reason_of
from clipvip.data.video import Media, is_image
from clipvip.files import Hashed, json_line, write_whole

MANIFEST = "manifest.jsonl"
MANIFEST_BYTES = 1 << 28  # a million shards
MOST_CLIPS = 10**10  # in all shards of a manifest
LEAST_BYTES = 512  # of a clip in a tar


class ShardError(ValueError):
    """Shards cannot be read or written; one line that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A line of a manifest.

    shard: name of the tar. bytes, sha256: size and checksum of its file.
    clips: number of clips in it. texts, subtitles, captions: number of them that have one.
    images: number of them whose video is an image; None in older manifests.
    bad: number of clips that could not be read when the tar was written (they are not in it), or
        verified (they are).
    """

    shard: str
    clips: int
    bytes: int
    sha256: str
    texts: int
    subtitles: int
    captions: int
    images: int | None = None
    bad: int = 0


@dataclass
class Tally:
    """Counts of the clips of a tar, as Shard has them."""

    clips: int = 0
    texts: int = 0
    subtitles: int = 0
    captions: int = 0
    images: int = 0

    def add(self, clip: Clip, media: Media) -> None:
        """Count what a clip has. media: its video or image."""
        self.images += is_image(media)
        self.texts += bool(clip.text)
        self.subtitles += clip.subtitle is not None
        self.captions += clip.caption is not None

    def shard(self, name: str, file: Hashed, bad: int) -> Shard:
        digest = file.digest.hexdigest()
        return Shard(shard=name, bytes=file.bytes, sha256=digest, bad=bad, **asdict(self))


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Name the file in errors of writing it, and say that the run can be resumed."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; finished shards are kept: fix this and run again"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def write_manifest(path: Path, shards: Iterable[Shard]) -> None:
    with on_disk(path):
        write_whole(path, (json_line(asdict(shard)) for shard in shards))


def append_to_manifest(path: Path, shard: Shard) -> None:
    with on_disk(path), path.open("ab") as file:
        file.write(json_line(asdict(shard)))
        file.flush()
        os.fsync(file.fileno())


def finished_shards(path: Path, names: Collection[str]) -> dict[str, Shard]:
    """Return those of the named shards that are in a manifest and whole, and remove others from it,
    as well as an incomplete last line, which a killed run leaves."""
    if not path.exists():
        return {}
    text, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        shards = _parse_manifest(text, str(path))
    except ShardError as error:
        raise ShardError(f"{error}; delete that line, and its shard is written again") from None
    finished = {}
    for shard in shards:
        file = path.parent / shard.shard
        if shard.shard in names and os.path.isfile(file) and file.stat().st_size == shard.bytes:
            finished[shard.shard] = shard
    write_manifest(path, finished.values())
    return finished


def load_manifest(source: str) -> list[tuple[str, Shard]]:
    """Return (URL, shard) of each tar that `source` names. Raises ShardError.

    source: tars with braces ("clips/{00000..00099}.tar", several joined by "::"), a folder of
        shards, or a manifest; each a path or any fsspec URL.
    """
    from webdataset.shardlists import expand_urls

    if source.endswith(".jsonl"):
        return [(_join(_parent(source), s.shard), s) for s in _read_manifest(source).values()]
    if not source.endswith(".tar"):
        return load_manifest(_join(source, MANIFEST))
    found: list[tuple[str, Shard]] = []
    manifests: dict[str, dict[str, Shard]] = {}
    for url in expand_urls(source):
        path = _join(_parent(url), MANIFEST)
        if path not in manifests:
            manifests[path] = _read_manifest(path)
        names = (url.rpartition("/")[2], _absolute(url))
        shard = next((manifests[path][name] for name in names if name in manifests[path]), None)
        if shard is None:
            raise ShardError(
                f"{url} is not in {path}, which names {len(manifests[path])} shards; "
                "is `clipvip shard` still running, or the range too long?"
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
    except Exception as error:  # of fsspec and its file systems
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
                f"{path}:{number}: expected a shard, as `clipvip shard` writes it; {error}"
            ) from error
    return shards


def _parse_shard(line: bytes) -> Shard:
    shard = Shard(**json.loads(line))
    name, images = shard.shard, 0 if shard.images is None else shard.images
    parts = [shard.clips, shard.texts, shard.subtitles, shard.captions, images]
    if not isinstance(name, str) or not name or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"'shard' is {name!r:.80}, not the name of a tar beside it, or in full")
    if "::" in name:  # fsspec would keep copies, or open one file inside another
        raise ValueError(f"'shard' is {name!r:.80}, not one plain URL")
    name.encode("utf-8", "surrogateescape")
    if not all(type(count) is int and count >= 0 for count in [*parts, shard.bytes, shard.bad]):
        raise ValueError("its counts must be whole numbers from 0 on")
    if max(parts) > shard.clips or shard.clips * LEAST_BYTES > shard.bytes:
        raise ValueError(f"its {shard.clips} clips do not agree with its other counts or its bytes")
    if not isinstance(shard.sha256, str) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError("its sha256 is not 64 hexadecimal digits")
    return shard


def _parent(url: str) -> str:
    return url.rpartition("/")[0] if "/" in url else "."


def _join(folder: str, name: str) -> str:
    """Return the URL of a shard, whose name in a manifest may be a full URL or path."""
    if urlsplit(name).scheme or name.startswith("/"):
        return name
    return f"{folder.rstrip('/')}/{name}"


def _absolute(url: str) -> str:
    return url if urlsplit(url).scheme else os.path.abspath(url)


def name_in(manifest: Path, url: str) -> str:
    """Return a tar's name for a manifest: the file name alone if both lie in one folder, so that
    the folder can be moved."""
    folder, name = os.path.split(_absolute(url))
    return name if folder == os.path.abspath(manifest.parent) else _absolute(url)
