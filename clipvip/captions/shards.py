"""Caption the clips of shards, and write shards that differ from them in captions alone.

Each worker process reads some of the tars in sequence, a batch at a time, and copies a tar with its
captions when all of them are there. A copy is whole or absent, so a run that was killed resumes
after the last whole one.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipvip import distributed
from clipvip.captions.captioner import Captioner
from clipvip.captions.summary import Summary, joined
from clipvip.captions.work import (
    UNREADABLE,
    Given,
    Prepared,
    Reader,
    Record,
    note_files,
    records,
)
from clipvip.data.loading import BadFile, BadFiles, Failure, Workers
from clipvip.data.shards import Shard, ShardCopies
from clipvip.data.video import DecodeError
from clipvip.terminal import progress


class Batch(NamedTuple):
    """A part of a tar's clips. lane: shards of one lane are read by one process, in sequence."""

    lane: int
    shard: int
    batch: int


class Copy(NamedTuple):
    """A tar to be copied, when its clips are captioned. captions: by their places in the tar."""

    lane: int
    shard: int
    captions: dict[int, str | None]
    bad: int


@dataclass
class ShardWork:
    """The work of processes for shards: a Batch is read, a Copy is written.

    firsts: place of each shard's first clip among all. overwrite: also caption clips that have a
    caption.
    """

    copies: ShardCopies
    reader: Reader
    firsts: list[int]
    batch_size: int
    overwrite: bool
    _open: dict[int, tuple[int, int, Iterator[list[Given | Failure]]]] = field(
        default_factory=dict, repr=False
    )

    def __call__(self, task: Batch | Copy, excluded: frozenset[int]) -> Prepared | Shard:
        if isinstance(task, Copy):
            return self.copies.write(task.shard, task.captions, task.bad)
        # Removed, so that the tar is opened again if this batch fails midway.
        shard, batch, coming = self._open.pop(task.lane, (-1, 0, iter(())))
        if (shard, batch) != (task.shard, task.batch):
            coming = self._batches(task.shard)
            for _ in range(task.batch):
                next(coming, None)
        found = next(coming, [])
        self._open[task.lane] = task.shard, task.batch + 1, coming
        prepared = self.reader((each for each in found if isinstance(each, Given)), excluded)
        prepared.failures.extend(each for each in found if isinstance(each, Failure))
        return prepared

    def _batches(self, number: int) -> Iterator[list[Given | Failure]]:
        """Yield the clips of a tar that are to be captioned, batch by batch, in order."""
        wanted = self._wanted(number)
        while found := list(islice(wanted, self.batch_size)):
            yield found

    def _wanted(self, number: int) -> Iterator[Given | Failure]:
        for place, stored in enumerate(self.copies.samples(number), self.firsts[number]):
            if isinstance(stored, DecodeError):
                yield Failure(place, BadFile(str(stored.path), stored.reason, 0))
            elif self.overwrite or stored.clip.caption is None:
                name = str(stored.clip.video)
                yield Given(place, stored.clip, stored.video, stored.image, name)

    def name(self, place: int) -> str:
        """Describe a place, for logs."""
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        return f"clip {place - self.firsts[number]} of {self.copies.shards[number][0]}"


class Taken(NamedTuple):
    """Results of a shard. records: some of those of its clips. shard: its copy, once it is
    whole."""

    number: int
    records: list[Record]
    shard: Shard | None


Elsewhere = Callable[[ShardCopies, list[int], int, bool], Generator[Taken, None, None]]


def caption_shards(
    captioner: Captioner,
    source: str,
    out: Path,
    about: dict[str, Any],
    workers: int,
    *,
    batch_size: int,
    max_bad_share: float,
    elsewhere: Elsewhere | None = None,
) -> Summary:
    """Write shards with captions; see clipvip.captions.run.caption.

    elsewhere: captions and copies shards of these numbers on other machines, with batches of this
    size; also clips that have a caption, if the last argument is true.
    """
    settings = {key: value for key, value in about.items() if key != "name"}
    copies = ShardCopies(source, out, settings)
    with ExitStack() as stack:
        with distributed.first_reports():
            stack.enter_context(distributed.first_enters(copies.only_run()))
            finished = distributed.first_does(copies.finished)
        counts = [shard.clips for _, shard in copies.shards]
        firsts = np.cumsum([0, *counts]).tolist()
        bad = BadFiles(firsts[-1], max_bad_share, out / "bad_files.jsonl")
        for number, shard in finished.items():
            bad.resume(np.arange(firsts[number], firsts[number + 1]), shard.bad)
        left = [number for number in range(len(counts)) if number not in finished]
        rank, world = distributed.rank(), distributed.world_size()
        own = left[rank::world]
        given = copies, own, batch_size, about["overwrite"]
        if elsewhere is None:
            taken = ShardRun(captioner.start(), *given).taken(workers)
        else:
            taken = elsewhere(*given)
        own_summary, clips = Summary(), sum(counts[number] for number in own)
        note = f"captioning {len(own)} shards of {clips} clips"
        note += f", one of {world} shares" * (world > 1)
        show = progress(note, clips) if rank == 0 else nullcontext(lambda clips: None)
        with show as done, closing(taken):
            for number, found, copy in taken:
                note_files(bad, found)
                for record in found:
                    own_summary.add(record)
                if copy is not None:
                    copies.finish(number, copy, rank)
                    done(counts[number])
        bad.note((), (), final=True)
        summary = joined(distributed.all_gather_objects(own_summary))
        shards = distributed.first_does(copies.close)
    summary.clips = firsts[-1]
    summary.earlier = sum(counts[number] for number in finished)
    new = (shard for number, shard in enumerate(shards) if number not in finished)
    summary.kept = sum(shard.captions for shard in new) - summary.captioned
    return summary


class ShardRun:
    """Caption and copy shards of the numbers `own` in this process and its workers."""

    def __init__(
        self,
        captioner: Captioner,
        copies: ShardCopies,
        own: list[int],
        batch_size: int,
        overwrite: bool,
    ) -> None:
        self.captioner, self.copies, self.own = captioner, copies, own
        counts = [shard.clips for _, shard in copies.shards]
        firsts = np.cumsum([0, *counts]).tolist()
        reader = Reader(captioner.prepare, captioner.asking.frames)
        self.work = ShardWork(copies, reader, firsts[:-1], batch_size, overwrite)
        self.batches = {number: max(-(-counts[number] // batch_size), 1) for number in own}
        self.found: dict[int, list[Record]] = {number: [] for number in own}
        self.ready: deque[Copy] = deque()

    def taken(self, workers: int) -> Generator[Taken, None, None]:
        """Yield the records of each batch, and each copy."""
        workers = min(workers, len(self.own))
        with closing(Workers(self.work, workers, self.work.name)) as pool:
            for tasks in (self._tasks(max(workers, 1)), self._copies()):
                for task, result in pool.run(tasks, worker_of=lambda task: task.lane):
                    if isinstance(result, Shard):
                        yield Taken(task.shard, [], result)
                    elif isinstance(task, Batch):
                        yield Taken(task.shard, self._answer(task, result), None)

    def _tasks(self, lanes: int) -> Iterator[Batch | Copy]:
        """Yield batches of as many tars in turn as there are lanes, and copies as soon as they can
        be written."""
        streams = [self._lane(lane, self.own[lane::lanes]) for lane in range(lanes)]
        while streams:
            for stream in [*streams]:
                yield from self._copies()
                task = next(stream, None)
                if task is None:
                    streams.remove(stream)
                else:
                    yield task

    def _lane(self, lane: int, numbers: list[int]) -> Iterator[Batch]:
        for number in numbers:
            for batch in range(self.batches[number]):
                yield Batch(lane, number, batch)

    def _copies(self) -> Iterator[Copy]:
        while self.ready:
            yield self.ready.popleft()

    def _answer(self, task: Batch, prepared: Prepared) -> list[Record]:
        answers = self.captioner.answer(prepared.inputs, prepared.counts)
        new = records(prepared, answers)
        self.found[task.shard] += new
        if task.batch + 1 == self.batches[task.shard]:
            first, bad = self.work.firsts[task.shard], 0
            captions: dict[int, str | None] = {}
            for record in self.found.pop(task.shard):
                if record.left_out == UNREADABLE:
                    bad += 1
                else:
                    captions[record.place - first] = record.caption
            self.ready.append(Copy(task.lane, task.shard, captions, bad))
        return new
