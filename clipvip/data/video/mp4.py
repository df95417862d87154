"""An MP4's tables (ISO/IEC 14496-12): what they claim, and when its samples are shown.

libav's own list of samples lacks the offsets from times of decoding to times of showing ("ctts"),
without which every packet would have to be read. And libav allocates what tables claim before it
reads them, so a few bytes could take all memory; check_claims refuses such files first.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_TABLES = 1 << 28  # bytes; a claim of more is damage


class Impossible(ValueError):
    """The tables of a file claim more than it can hold."""


def check_claims(file: BinaryIO) -> None:
    """Raise Impossible where the tables of an MP4 claim more than its bytes can hold. Boxes are
    searched where libav reads them, in damaged files too. Other formats pass."""
    length = file.seek(0, os.SEEK_END)
    _Claims(file, length).check(0, length)


# Boxes in which libav reads other boxes, and how deep.
_HOLDERS = frozenset(
    (b"moov", b"hoov", b"trak", b"edts", b"mdia", b"minf", b"dinf", b"stbl", b"udta", b"tref")
    + (b"mvex", b"moof", b"traf", b"sinf", b"schi")
)
_DEEPEST = 10
# Bytes per entry of the tables that begin with version, flags and a count of entries.
_ENTRIES = {
    **dict.fromkeys((b"stco", b"stss", b"stps"), 4),
    **dict.fromkeys((b"stts", b"ctts", b"co64", b"keys"), 8),
    **dict.fromkeys((b"stsc", b"elst"), 12),
}
# A sample has at least one byte, except for a few empty ones (_SLACK). A byte of coded sound may
# hold many samples, which libav takes 160 or more at a time.
_SLACK, _SOUND = 1 << 16, 160
_KINDS = frozenset((b"soun", b"vide", b"subp", b"clcp"))
_MOST_INFLATED = 1 << 26  # bytes of tables that were compressed


@dataclass
class _Track:
    """Claims of a track. If a table occurs twice, libav may take either."""

    kinds: set[bytes] = field(default_factory=set)
    samples: int = 0  # claimed where all have one size, without a table of sizes
    by_tick: bool = False  # a table says that each sample lasts a tick
    by_sample: bool = False  # a table gives samples times of their own
    chunks: int = 0
    runs: list[NDArray[np.int64]] = field(default_factory=list)  # first chunk, samples per chunk


class _Claims:
    """Walk through boxes as libav does, and add up their claims, to compare with `length` bytes."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        self.total = 0
        self.track = _Track()

    def check(self, start: int, stop: int, depth: int = 0) -> None:
        if depth > _DEEPEST:  # libav gives up
            return
        for name, at, size in _boxes(self.file, start, stop):
            if name == b"trak":
                self.track = _Track()
            freed = name == b"free" and self._peek(at + 4, 4) in (b"mvhd", b"cmov")
            if name in _HOLDERS or freed:
                self.check(at, at + size, depth + 1)
            elif name == b"meta":
                handler = self._peek(at, size).find(b"hdlr")
                if handler >= 4:
                    self.check(at + handler - 4, at + size, depth + 1)
            elif name == b"cmov":
                self._check_inflated(at, size)
            else:
                self._note(name, at, size)
            if name == b"trak":
                self._close()

    def _peek(self, at: int, size: int) -> bytes:
        self.file.seek(at)
        return self.file.read(min(size, MAX_TABLES))

    def _note(self, name: bytes, at: int, size: int) -> None:
        track = self.track
        if name == b"hdlr":
            track.kinds |= {self._peek(at + 8, 4)} & _KINDS
        elif name in (b"stsz", b"stz2"):
            each, count = _words(self._peek(at + 4, 8), 2)
            if name == b"stz2" or not each:
                self._refuse_above(2 * self.length, name, count)
            else:
                track.samples = max(track.samples, count)
        elif name == b"trun":
            self._add(_words(self._peek(at + 4, 4), 1)[0], name)
        elif name in _ENTRIES:
            (count,) = _words(self._peek(at + 4, 4), 1)
            self._refuse_above(self.length // _ENTRIES[name], name, count)
            if name in (b"stco", b"co64"):
                track.chunks = max(track.chunks, count)
            elif name == b"stts" and count == 1 and _words(self._peek(at + 8, 8), 2)[1] == 1:
                track.by_tick = True
            elif name in (b"stts", b"ctts"):
                track.by_sample = True
            elif name == b"stsc":
                table = self._peek(at + 8, 12 * count)
                runs = np.frombuffer(table, ">u4", len(table) // 12 * 3).reshape(-1, 3)
                track.runs.append(runs[:, :2].astype(np.int64))

    def _close(self) -> None:
        """Count the entries that libav makes at the end of a track: one for each sample, or for
        many at once of sound that is cut by the tick."""
        track = self.track
        if track.kinds != {b"soun"} or not track.by_tick or track.by_sample:
            self._add(track.samples, b"stsz")
        for firsts, counts in (runs.T for runs in track.runs if track.by_tick and len(runs)):
            chunks = np.diff(firsts, append=max(track.chunks + 1, firsts[-1])).clip(0, track.chunks)
            samples = chunks.astype(np.float64) @ counts  # an int64 would overflow
            self._add(int(samples / _SOUND), b"stsc")

    def _check_inflated(self, at: int, size: int) -> None:
        """Check a movie box that is compressed (QuickTime)."""
        for name, inside, length in _boxes(self.file, at, at + size):
            if name == b"cmvd":
                (claimed,) = _words(self._peek(inside, 4), 1)
                self._refuse_above(_MOST_INFLATED, name, claimed)
                try:
                    unpacked = zlib.decompressobj().decompress(
                        self._peek(inside + 4, length), _MOST_INFLATED
                    )
                except zlib.error:  # for libav too
                    return
                inflated = _Claims(BytesIO(unpacked), self.length + len(unpacked))
                inflated.check(0, len(unpacked))

    def _add(self, count: int, name: bytes) -> None:
        self.total += count
        self._refuse_above(self.length, name, self.total)

    def _refuse_above(self, limit: int, name: bytes, count: int) -> None:
        if count > limit + _SLACK:
            raise Impossible(
                f"its table {name.decode()!r} claims {count:,} entries, more than the file's "
                f"{self.length:,} bytes can hold"
            )


def _words(data: bytes, count: int) -> tuple[int, ...]:
    """Parse 32-bit numbers; 0 for those cut off."""
    return struct.unpack(f">{count}I", data[: 4 * count].ljust(4 * count, b"\0"))


# --- when samples are shown -----------------------------------------------------------------


def composition_offsets(file: BinaryIO, track: int, samples: int) -> NDArray[np.int64] | None:
    """Return time of showing minus time of decoding of each sample of a track, in its ticks.

    The array is empty where all are 0. None where there is no readable table, or one for another
    number of samples.
    """
    try:
        movie = next(_inside(file, (0, file.seek(0, os.SEEK_END)), b"moov"))
        if movie[1] - movie[0] > MAX_TABLES or next(_inside(file, movie, b"mvex"), None):
            return None  # fragments ("mvex") describe their own samples
        for trak in _inside(file, movie, b"trak"):
            header = _content(file, next(_inside(file, trak, b"tkhd")))
            # version and flags, two times of 4 or 8 bytes, then the track's number
            (number,) = struct.unpack_from(">I", header, 20 if header[0] else 12)
            if number == track:
                box = trak
                for name in (b"mdia", b"minf", b"stbl"):
                    box = next(_inside(file, box, name))
                table = next(_inside(file, box, b"ctts"), None)
                if table is None:
                    return np.zeros(0, np.int64)
                return _offsets(_content(file, table), samples)
    except (OSError, ValueError, StopIteration, IndexError, struct.error):
        pass
    return None


def _inside(file: BinaryIO, span: tuple[int, int], wanted: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of the content of each `wanted` box that lies directly in `span`."""
    for name, start, size in _boxes(file, *span, strict=True):
        if name == wanted:
            yield start, start + size


def _content(file: BinaryIO, span: tuple[int, int]) -> bytes:
    file.seek(span[0])
    return file.read(span[1] - span[0])


def _offsets(table: bytes, samples: int) -> NDArray[np.int64]:
    (count,) = struct.unpack_from(">I", table, 4)
    runs = np.frombuffer(table, ">i4", 2 * count, 8).reshape(-1, 2)
    if runs[:, 0].min(initial=0) < 0 or runs[:, 0].sum(dtype=np.int64) != samples:
        raise ValueError("runs for another number of samples")
    return np.repeat(runs[:, 1], runs[:, 0]).astype(np.int64)


def is_whole_in_fragments(file: BinaryIO) -> bool:
    """Return whether samples are in fragments, and the file ends where its last box does."""
    try:
        boxes = _boxes(file, 0, file.seek(0, os.SEEK_END), strict=True)
        return b"moof" in {name for name, _, _ in boxes}
    except (OSError, ValueError):
        return False


def _boxes(
    file: BinaryIO, start: int, stop: int, strict: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and size of the content of each box. A size beyond `stop` is cut, and an
    impossible size ends the list; with `strict`, both raise ValueError."""
    at = start
    while at + 8 <= stop:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        size, name = struct.unpack_from(">I4s", head)
        header = 8
        if size == 1 and at + 16 <= stop and len(head) == 16:
            (size,) = struct.unpack_from(">Q", head, 8)
            header = 16
        left = stop - at - header
        size = size - header if size else left
        if strict and not 0 <= size <= left:
            raise ValueError("a box of no possible size")
        if size < 0:
            return
        yield name, at + header, min(size, left)
        at += header + min(size, left)
