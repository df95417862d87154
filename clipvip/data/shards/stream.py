"""Train from shards: read the clips that plan.py chooses, tar by tar, into batches.

Batches have the tensors of clipvip.data.loading.build_loader. Each worker serves some of the
lanes, whose tars it reads from the start to the end of the lane's part, and holds a window of
encoded clips per lane to shuffle them.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from clipvip.data.loading import (
    BadFile,
    ClipLoader,
    ClipReader,
    Failure,
    LoaderOptions,
    Sample,
    check_not_excluded,
    set_place,
)
from clipvip.data.shards.plan import Plan, Shards
from clipvip.data.shards.tars import Packed, open_url, read_samples, reason_of, unpack
from clipvip.data.video import DecodeError, start_engine

RETRIES = (1.0, 4.0)  # seconds to wait before a tar is opened again
# An unreadable clip is replaced by one of the first NEAR clips of some shard, which are quick to
# reach. Each of five further tries doubles that, since a shard may begin with unreadable clips.
NEAR = 8


def build_shard_loader(
    shards: Shards, options: LoaderOptions, *, paragraph: bool = False, shuffle: int = 1024
) -> ClipLoader:
    """Make a loader of one rank's training batches from shards; batches are build_loader's.

    clip_index is a place of `shards`. More than LANES workers gain nothing.

    paragraph: join the texts of a clip to one, where its source does not say.
    shuffle: encoded clips that a rank holds in memory to shuffle among.
    """
    shards.check(options.task)
    plan = Plan(shards, options, max(shuffle, 1))
    options = replace(options, num_workers=min(options.num_workers, plan.lanes))
    reader = ClipReader(options, training=True, engine=start_engine(options.decoder))
    return ClipLoader(_ShardBatchReader(plan, reader, paragraph), plan, len(shards), shards.name)


class _Drawn(NamedTuple):
    """A clip as read from its tar, or the reason why it could not be.

    number: index of its source. pass_number: pass over the source. place: see Shards.
    """

    number: int
    pass_number: int
    place: int
    url: str
    sample: Packed | DecodeError


class _ShardBatchReader:
    """Read batches from shards. A task is (epoch, number of the batch).

    lanes: batches of each lane that this process serves, and (epoch, step) of the next one.
    """

    def __init__(self, plan: Plan, reader: ClipReader, paragraph: bool) -> None:
        self.plan = plan
        self.reader = reader
        self.paragraph = paragraph
        self.lanes: dict[int, tuple[tuple[int, int], Iterator[list[_Drawn]]]] = {}

    def read_batch(self, task: tuple[int, int], excluded: frozenset[int]) -> list[Sample]:
        epoch, batch = task
        step, lane = divmod(batch, self.plan.lanes)
        # Removed, so that the lane is opened again if this batch fails midway.
        coming, batches = self.lanes.pop(lane, (None, iter(())))
        if coming != (epoch, step):
            batches = _batches(self.plan, lane, epoch, step)
        samples = [self._sample(drawn, 0, excluded) for drawn in next(batches)]
        last = step + 1 == self.plan.lane_batches(lane)
        self.lanes[lane] = (epoch + 1, 0) if last else (epoch, step + 1), batches
        return samples

    def read_sample(self, task: tuple[tuple[int, int], int], excluded: frozenset[int]) -> Sample:
        """task: ((pass_number, place) of a _Drawn, attempt to start with)."""
        (pass_number, place), first = task
        drawn = self._drawn(pass_number, *self.plan.shards.locate(place))
        return self._sample(drawn, first, excluded)

    def _sample(self, drawn: _Drawn, first: int, excluded: frozenset[int]) -> Sample:
        place, pass_number = drawn.place, drawn.pass_number
        sample = Sample((pass_number, place), place)
        for attempt, generator in self.reader.attempts(first, 3, pass_number, place):
            sample.attempt = attempt
            if attempt:
                drawn = self._other(drawn.number, generator, NEAR << min(attempt - 1, 5))
                sample.place = drawn.place
            sample.tried.append(sample.place)
            set_place(sample.place)
            name, line = drawn.url, 0
            try:
                if isinstance(drawn.sample, DecodeError):
                    raise drawn.sample
                name = f"{drawn.url}/{drawn.sample.key}"
                stored = unpack(drawn.sample, drawn.url)
                clip, line = stored.clip, stored.clip.line
                check_not_excluded(sample.place, excluded, name)
                if self.reader.options.task == "retrieval" and not clip.text:
                    raise DecodeError(name, "no text")
                own = self.plan.shards.sources[drawn.number].paragraph
                if clip.text and (self.paragraph if own is None else own):
                    clip = replace(clip, text=(" ".join(clip.text),))
                self.reader.read(sample, clip, stored.video, stored.image, generator)
                break
            except DecodeError as error:
                file = BadFile(name, error.reason, line)
                sample.failures.append(Failure(sample.place, file))
        return sample

    def _other(self, number: int, generator: np.random.Generator, near: int) -> _Drawn:
        """Draw a clip of the same source, one of the first `near` clips of some shard."""
        source = self.plan.shards.sources[number]
        shard = int(generator.integers(len(source.urls)))
        index = int(generator.integers(min(near, int(source.counts[shard]))))
        return self._drawn(0, number, shard, index)

    def _drawn(self, pass_number: int, number: int, shard: int, index: int) -> _Drawn:
        source = self.plan.shards.sources[number]
        place = self.plan.shards.firsts[number] + int(source.firsts[shard]) + index
        ((_, sample),) = _read(source.urls[shard], index, index + 1)
        return _Drawn(number, pass_number, place, source.urls[shard], sample)


def _batches(plan: Plan, lane: int, epoch: int, step: int) -> Iterator[list[_Drawn]]:
    """Yield the batches of a lane, from a step of an epoch on, without end."""
    size = plan.batch_size
    given = plan.picks(epoch, lane)[: step * size]
    streams = [
        _stream(plan, lane, number, epoch * int(quota) + int((given == number).sum()))
        for number, quota in enumerate(plan.quotas(lane))
    ]
    while True:
        picks = plan.picks(epoch, lane)
        for first in range(step * size, len(picks), size):
            yield [next(streams[number]) for number in picks[first : first + size].tolist()]
        epoch, step = epoch + 1, 0


def _stream(plan: Plan, lane: int, number: int, skipped: int) -> Iterator[_Drawn]:
    """Yield a source's clips for a lane, pass after pass, each shuffled, without end."""
    low, high = plan.span(number, lane)
    first, skipped = divmod(skipped, high - low)
    for pass_number in itertools.count(first):
        order = plan.shuffled(number, pass_number, lane, high - low)
        given = np.zeros(high - low, bool)
        given[order[:skipped]] = True
        coming = _in_sequence(plan, lane, number, pass_number, int(order[skipped:].min()))
        held: dict[int, _Drawn] = {}
        for wanted in order[skipped:].tolist():
            while wanted not in held:
                position, drawn = next(coming)
                if not given[position]:
                    held[position] = drawn
            yield held.pop(wanted)
        skipped = 0


def _in_sequence(
    plan: Plan, lane: int, number: int, pass_number: int, first: int
) -> Iterator[tuple[int, _Drawn]]:
    """Yield a lane's clips of a pass with their positions, in the order of the tars, from position
    `first` on."""
    source, position = plan.shards.sources[number], 0
    for shard, begin, end in plan.pieces(number, pass_number, lane):
        skipped = min(max(first - position, 0), end - begin)
        position += skipped
        url, place = source.urls[shard], plan.shards.firsts[number] + int(source.firsts[shard])
        for index, sample in _read(url, begin + skipped, end):
            yield position, _Drawn(number, pass_number, place + index, url, sample)
            position += 1


def _read(url: str, first: int, end: int) -> Iterator[tuple[int, Packed | DecodeError]]:
    """Yield clips [first, end) of a tar with their indices; an error for each that is missing."""
    set_place(-1)  # a slow tar is not the fault of the last clip
    if first == end:
        return
    reason = ""
    for wait in (0.0, *RETRIES) if "://" in url else (0.0,):
        time.sleep(wait)
        try:
            with open_url(url) as file:
                for index, sample in enumerate(read_samples(file, url)):
                    if index == first:
                        yield index, sample
                        first += 1
                    if first == end:
                        return
            reason = f"ends before its clip {first}; its manifest names more"
        except Exception as error:  # of fsspec and its file systems
            reason = reason_of(error)
            if isinstance(error, FileNotFoundError):
                break
    for index in range(first, end):
        yield index, DecodeError(url, reason)
