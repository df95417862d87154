"""Copy shards with other captions: all else in the tars stays as it is.

A folder of copies has the files of `clipvip shard`: one tar per source tar, manifest.jsonl, once
all are whole, and settings.json. While they are written, each process that writes lists its whole
tars in `.finished-NNNNN.jsonl`. So a run that was killed resumes, with any number of processes.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from clipvip.data.shards.manifest import (
    MANIFEST,
    Shard,
    ShardError,
    Tally,
    append_to_manifest,
    finished_shards,
    load_manifest,
    on_disk,
    write_manifest,
)
from clipvip.data.shards.tars import Packed, Stored, open_url, read_samples, reason_of, unpack
from clipvip.data.shards.verify import read_rest
from clipvip.data.shards.write import check_settings, delete_partial, partial_path
from clipvip.data.video import DecodeError
from clipvip.files import Hashed, decode_text, json_line, only_run

FORMAT = "clipvip shard copies 1"
FINISHED = ".finished-*.jsonl"


@dataclass
class ShardCopies:
    """Shards and the folder of their copies. Picklable: other processes read and write too.

    source: as for load_manifest. out: a new folder, or that of an earlier run. settings: what
    copies depend on; a folder made with others is refused.

    shards: URL and manifest line of each source tar. names: of the copies. Raises ShardError.
    """

    source: str
    out: Path
    settings: dict[str, Any]
    shards: list[tuple[str, Shard]] = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.shards = load_manifest(self.source)
        self.names = [url.rpartition("/")[2] for url, _ in self.shards]
        if max(Counter(self.names).values()) > 1:  # from several folders
            self.names = [f"{number:05d}.tar" for number in range(len(self.shards))]
        for url, _ in self.shards:
            if os.path.realpath(os.path.dirname(url) or ".") == os.path.realpath(self.out):
                raise ShardError(f"{self.out} is the folder of the shards; give another one")
        hashes = json.dumps([shard.sha256 for _, shard in self.shards])
        shards = hashlib.sha256(hashes.encode()).hexdigest()
        self.settings = {"format": FORMAT, "shards": shards, **self.settings}

    @contextmanager
    def only_run(self) -> Iterator[None]:
        """Keep other runs out of the folder; raise ShardError if its settings are others."""
        with only_run(self.out, "writes shards", ShardError):
            check_settings(self.out, self.settings)
            yield

    def finished(self) -> dict[int, Shard]:
        """Return the whole copies by their numbers, and list them in one file. For one process of
        a run, before the others write."""
        found: dict[str, Shard] = {}
        lists = sorted(self.out.glob(FINISHED))
        for path in (self.out / MANIFEST, *lists):
            found |= finished_shards(path, {*self.names})
        if lists:
            write_manifest(self._list(0), found.values())
        for path in lists:
            if path != self._list(0):
                path.unlink()
        delete_partial(self.out, {*self.names})
        numbers = {name: number for number, name in enumerate(self.names)}
        return {numbers[name]: shard for name, shard in found.items()}

    def _list(self, process: int) -> Path:
        return self.out / f".finished-{process:05d}.jsonl"

    def finish(self, number: int, shard: Shard, process: int) -> None:
        """List a copy as whole. process: number of this process among those of the run."""
        append_to_manifest(self._list(process), shard)

    def close(self) -> list[Shard]:
        """Write the manifest of the copies, which are all whole; return it."""
        whole = self.finished()
        if len(whole) < len(self.names):
            missing = next(n for i, n in enumerate(self.names) if i not in whole)
            raise ShardError(f"{self.out}: {missing} is missing; run the same command again")
        shards = [whole[number] for number in range(len(self.names))]
        write_manifest(self.out / MANIFEST, shards)
        for path in self.out.glob(FINISHED):
            path.unlink()
        return shards

    def samples(self, number: int) -> Iterator[Stored | DecodeError]:
        """Read the clips of a source tar in order, or why one is unusable. Raises ShardError."""
        url, _ = self.shards[number]
        with _readable(url), open_url(url) as file:
            for sample in read_samples(file, url):
                try:
                    yield unpack(sample, url)
                except DecodeError as error:
                    yield error

    def write(self, number: int, captions: Mapping[int, str | None], bad: int) -> Shard:
        """Copy a tar with other captions, whole or not at all; return its line of the manifest.

        captions: new caption of clips by their places in the tar, None to remove it. Samples that
            the tar makes unusable are left out. bad: number of unreadable clips.
        Raises ShardError if the tar cannot be read to its end or is not as its manifest says.
        """
        url, name = self.shards[number][0], self.names[number]
        partial, tally = partial_path(self.out / name), Tally()
        try:
            with on_disk(self.out / name):
                with partial.open("wb") as out:
                    copied = Hashed(out)
                    with tarfile.open(fileobj=cast(IO[bytes], copied), mode="w|") as tar:
                        for place, sample in enumerate(self._members(number)):
                            if sample.fault is not None:
                                continue
                            if place in captions:
                                sample.members = _captioned(sample.members, captions[place])
                            _add(tar, sample)
                            tally.clips += 1
                            _count(tally, sample, url)
                    out.flush()
                    os.fsync(out.fileno())
                partial.replace(self.out / name)
        finally:
            partial.unlink(missing_ok=True)
        if not tally.clips:
            raise ShardError(f"{url}: no sample of it is usable; leave it out of the shards")
        return tally.shard(name, copied, bad)

    def _members(self, number: int) -> Iterator[Packed]:
        url, expected = self.shards[number]
        with _readable(url), open_url(url) as file:
            hashed = Hashed(file)
            yield from read_samples(hashed, url, everything=True)
            read_rest(hashed, url)
        if hashed.digest.hexdigest() != expected.sha256:
            raise ShardError(f"{url} is not as its manifest says (sha256); {_MEND}")


_MEND = "replace it, as `clipvip verify` of the shards says, and run again: finished ones are kept"


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except (ShardError, GeneratorExit):
        raise
    except Exception as error:  # of fsspec and its file systems
        raise ShardError(f"{url}: {reason_of(error)}; {_MEND}") from error


def _add(tar: tarfile.TarFile, sample: Packed) -> None:
    # webdataset's TarWriter would drop members whose suffix begins with "_", and fail at others.
    for suffix, data in sorted(sample.members.items()):
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")
        member.size, member.mode = len(data), 0o444
        tar.addfile(member, io.BytesIO(data))


def _captioned(members: dict[str, bytes], caption: str | None) -> dict[str, bytes]:
    """Replace or remove the caption of a clip that `unpack` can read."""
    record = json.loads(members.get("json", b"{}"))
    record.pop("caption", None)
    if caption is not None:
        record["caption"] = caption
    elif "txt" in members:  # which counts as a caption where there is none
        members = {**members}
        text, _ = decode_text(members.pop("txt"))
        if record.get("text") in (None, "", []):  # as `unpack` reads it
            record["text"] = text.strip()
    return {**members, "json": json_line(record)}


def _count(tally: Tally, sample: Packed, url: str) -> None:
    try:
        clip, video, _, _ = unpack(sample, url)
    except DecodeError:
        return  # it stays in the tar, and training lists it
    tally.add(clip, video)
