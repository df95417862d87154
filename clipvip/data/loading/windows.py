"""Read the moments of files, many of one file together, as batches for a model.

A file is read in parts. Each part is some moments in a row and one task of a worker process. So the
frames of a part fit in memory, and all workers share a long film. The first task of a file also
divides the file into moments. The frames that a part's moments need are decoded once, in order.

    PartReader       task → part, in workers
    read_parts       parts in the order of files and of their moments
    moment_batches   parts → batches, with the files that are done; lists what was lost
"""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipvip.data.loading.bad_files import BadFile
from clipvip.data.loading.in_worker import check_not_excluded, set_place
from clipvip.data.loading.spans import check_windows, find_cuts, scenes, windows
from clipvip.data.loading.workers import Workers
from clipvip.data.video import DecodeError, OpenVideo, Span, is_image, open_whole, read_frames
from clipvip.files import shown

logger = logging.getLogger(__name__)

PART = 64 << 20  # bytes of the frames of a part
LARGE_PART = 256 << 20  # the same where a later part of a file takes longer than an earlier one
NOTHING = torch.empty(0)  # frames of a part that cannot be read

File = tuple[Path, Sequence[Span] | None]  # and its moments; None to divide it


@dataclass(frozen=True)
class Division:
    """How files are divided into moments, see clipvip.data.loading.spans. Raises ValueError for
    lengths out of their range."""

    window: float
    stride: float
    scenes: bool

    def __post_init__(self) -> None:
        check_windows(self.window, self.stride, self.scenes)

    def spans(self, video: OpenVideo, place: int) -> list[Span]:
        """Divide a video, in a worker."""
        path, index = video.path, video.index
        given = index.times, index.duration, self.window, self.stride, path
        if not self.scenes:
            return windows(*given)
        return scenes(find_cuts(path, partial(set_place, place)), *given)


class Facts(NamedTuple):
    """A file as its first task finds it.

    spans: its moments, by their start. duration: seconds, 0 for an image. date: when it was
    recorded, in seconds since 1970, if its container says so. damage: what of it is lost.
    """

    spans: list[Span]
    duration: float = 0.0
    date: float | None = None
    damage: str | None = None


class Task(NamedTuple):
    """Moments of a file to read; spans None: its first ones, after dividing it."""

    place: int
    spans: list[Span] | None = None


class Part(NamedTuple):
    """What a task gives.

    place: of the file. spans: moments that were read. counts: number of frames of each, which lie
    in frames, uint8 [F, 3, S, S]. lost: why each of the other moments cannot be read, or why the
    file cannot. facts, more: of the first task alone: the file, and the spans of its other parts.
    """

    place: int
    spans: Sequence[Span]
    counts: Sequence[int]
    frames: Tensor
    lost: Sequence[str]
    facts: Facts | None = None
    more: Sequence[list[Span]] = ()


@dataclass(frozen=True)
class PartReader:
    """Divide files and read parts of them, in workers.

    num_frames, sampling, image_size, resize: see LoaderOptions.
    """

    files: Sequence[File]
    division: Division
    num_frames: int
    sampling: str
    image_size: int
    resize: str

    def name(self, place: int) -> str:
        """Describe a place for the log."""
        return str(self.files[place][0])

    def divide(self, task: Task, excluded: frozenset[int]) -> Facts | str:
        """Divide a file. Return why it cannot be read where that is so."""
        path, _ = self.files[task.place]
        try:
            self._begin(task, excluded)
            if is_image(path):
                return self._image_facts(task)
            with open_whole(path) as video:
                return self._facts(video, task)
        except DecodeError as error:
            return error.reason

    def read(self, task: Task, excluded: frozenset[int]) -> Part:
        """Read a part of a file."""
        path, _ = self.files[task.place]
        try:
            self._begin(task, excluded)
            if is_image(path):
                return self._read_image(task)
            with open_whole(path) as video:
                return self._read_video(video, task)
        except DecodeError as error:
            lost = [error.reason] * len(task.spans or (None,))
            return Part(task.place, (), (), NOTHING, lost)

    def _begin(self, task: Task, excluded: frozenset[int]) -> None:
        set_place(task.place)
        check_not_excluded(task.place, excluded, self.files[task.place][0])

    def _facts(self, video: OpenVideo, task: Task) -> Facts:
        _, given = self.files[task.place]
        if given is None:
            spans = self.division.spans(video, task.place)
        else:
            spans = sorted(given, key=lambda span: span[0] or 0.0)
        # In ms, as spans are: a sum of 61.00000000000001 s would not pass a filter of 61 s.
        duration = round(video.index.duration, 3)
        return Facts(spans, duration, video.video.recorded, video.index.damage)

    def _image_facts(self, task: Task) -> Facts:
        given = self.files[task.place][1]
        return Facts([(None, None)] if given is None else list(given))

    def _read_image(self, task: Task) -> Part:
        path, facts = self.files[task.place][0], self._image_facts(task)
        frame = read_frames(path, 1, size=self.image_size, resize=self.resize)
        counts = [1] * len(facts.spans)
        frames = frame.expand(len(counts), -1, -1, -1)
        return Part(task.place, facts.spans, counts, frames, (), facts)

    def _read_video(self, video: OpenVideo, task: Task) -> Part:
        facts, spans = None, task.spans
        if spans is None:
            facts = self._facts(video, task)
            spans = facts.spans[: self._moments(PART)]
        frames, found = NOTHING, list[int | str]()
        try:
            frames, found = video.read(
                spans,
                self.num_frames,
                size=self.image_size,
                resize=self.resize,
                sampling=self.sampling,
            )
        except DecodeError as error:
            found = [error.reason] * len(spans)
        if facts is not None:  # reading may find more damage than the index did
            facts = facts._replace(damage=video.index.damage)
        return Part(
            task.place,
            [span for span, count in zip(spans, found, strict=True) if isinstance(count, int)],
            [count for count in found if isinstance(count, int)],
            frames,
            [reason for reason in found if isinstance(reason, str)],
            facts,
            () if facts is None else self._parts(facts.spans[len(spans) :], video.in_parts),
        )

    def _parts(self, spans: list[Span], in_parts: bool) -> list[list[Span]]:
        step = self._moments(PART if in_parts else LARGE_PART)
        return [spans[first : first + step] for first in range(0, len(spans), step)]

    def _moments(self, size: int) -> int:
        """Return the number of moments whose frames fill a part of so many bytes."""
        return max(size // (self.num_frames * 3 * self.image_size**2), 1)


class _Tasks:
    """Tasks in the order of files. The other parts of a file are added once its first part is read.

    Workers.run asks for a task again after there was none.
    """

    def __init__(self, files: Iterable[int]) -> None:
        self.files = iter(files)
        self.begun: deque[int] = deque()
        self.more: deque[Task] = deque()

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        if self.more:
            return self.more.popleft()
        self.begun.append(next(self.files))
        return Task(self.begun[-1])


def read_parts(
    reader: PartReader, files: Iterable[int], num_workers: int
) -> Iterator[tuple[Part, bool]]:
    """Yield the parts of each file in order; with each, whether it is the last of its file.

    The order does not depend on the number of workers.

    files: places of the files to read, asked for one by one.
    """
    workers: Workers[Task, Part] = Workers(reader.read, num_workers, reader.name)
    tasks = _Tasks(files)
    # First parts of later files arrive before the rest of the file that is due: a few per worker.
    held: dict[int, deque[Part]] = defaultdict(deque)
    left: dict[int, int] = {}  # parts of each file that are still to be given
    try:
        for task, part in workers.run(tasks):
            held[task.place].append(part)
            if task.spans is None:
                left[task.place] = 1 + len(part.more)
                tasks.more += [Task(task.place, spans) for spans in part.more]
            while tasks.begun and held[due := tasks.begun[0]]:
                left[due] -= 1
                yield held[due].popleft(), not left[due]
                if not left[due]:
                    del held[due], left[due]
                    tasks.begun.popleft()
    finally:
        workers.close()


def divide_files(
    reader: PartReader, bad_files: list[BadFile], num_workers: int
) -> Iterator[tuple[int, Facts]]:
    """Yield the place and the moments of each file, in order, without reading their frames.

    bad_files: each file that cannot be read is added, and is not yielded.
    """
    workers: Workers[Task, Facts | str] = Workers(reader.divide, num_workers, reader.name)
    try:
        for task, facts in workers.run(map(Task, range(len(reader.files)))):
            if isinstance(facts, str):
                _tell(reader.files[task.place][0], None, 0, [facts], bad_files)
            else:
                yield task.place, facts
    finally:
        workers.close()


class FileDone(NamedTuple):
    """A file of which all moments were given. duration, date: see Facts."""

    place: int
    duration: float
    date: float | None


@dataclass
class MomentBatch:
    """Moments of one or more files, packed.

    moments: place of the file and span of each. frames: of each, uint8 [N, 3, S, S]. done: files
    all of whose moments are in this batch or in earlier ones.
    """

    moments: list[tuple[int, Span]] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    done: list[FileDone] = field(default_factory=list)

    @property
    def pixel_values(self) -> Tensor:
        """Frames of all moments, uint8 [F, 3, S, S]."""
        return torch.cat(self.frames)

    @property
    def frame_offsets(self) -> Tensor:
        """Running sum of the frames of the moments, int32 [B + 1]."""
        return torch.tensor([0, *map(len, self.frames)]).cumsum(0).to(torch.int32)


def moment_batches(
    reader: PartReader,
    files: Iterable[int],
    bad_files: list[BadFile],
    batch_size: int,
    num_workers: int,
) -> Iterator[MomentBatch]:
    """Yield batches of moments in the order of the files. The last one may hold no moment.

    files: places of the files to read, asked for one by one. bad_files: each file of which
    something cannot be read is added once it has been read.
    """
    batch = MomentBatch()
    lost: list[str] = []
    facts: Facts | None = None
    read = 0
    for part, last in read_parts(reader, files, num_workers):
        facts = part.facts or facts
        rows = part.frames.split([*part.counts])
        for span, frames in zip(part.spans, rows, strict=True):
            if len(batch.moments) == batch_size:
                yield batch
                batch = MomentBatch()
            batch.moments.append((part.place, span))
            batch.frames.append(frames)
        read += len(part.spans)
        lost += part.lost
        if last:
            if facts is not None and read:
                batch.done.append(FileDone(part.place, facts.duration, facts.date))
            _tell(reader.files[part.place][0], facts, read, lost, bad_files)
            facts, read, lost = None, 0, []
        if len(batch.moments) == batch_size:  # without waiting for the next part
            yield batch
            batch = MomentBatch()
    if batch.moments or batch.done:
        yield batch


def _tell(
    path: Path, facts: Facts | None, read: int, lost: list[str], bad_files: list[BadFile]
) -> None:
    """Log and list what of a file could not be read."""
    if not lost:
        if facts is not None and facts.damage is not None:
            logger.warning("damaged %s: %s; its other frames are used", shown(path), facts.damage)
        return
    reason = lost[0]
    if read:
        reason += f"; {len(lost)} of its {read + len(lost)} moments are left out"
    logger.warning("%s %s: %s", "damaged" if read else "left out", shown(path), shown(reason))
    bad_files.append(BadFile(str(path), reason, 0))
