"""Training from shards: batches as clipvip.data.loading.loader gives them, read tar by tar.

Which clips are in which batch is a function of (seed, epoch, rank, world size) alone, whatever
the number of worker processes, so a run goes on at any batch with exactly those that would have
followed:

- An epoch puts the shards in an order drawn by the seed. The row of their clips is cut into even
  parts, one for each of LANES lanes of each rank: no clip is given twice, and shards need not
  outnumber ranks or workers. (A shard that a cut goes through is read by both sides.)
- A lane gives its clips shuffled within a moving window. Batch b of a rank is the next of lane
  b modulo LANES. A worker serves the lanes that fall to it, and opens each where it has to.
- Of several sources, each batch's clips come in the ratio asked for, on average over an epoch,
  which is as many clips as all sources hold. Each source is gone through at its own pace, in a
  new order every time (one very small, or rarely drawn, by each lane for itself).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipvip.data.loading import (
    BadFiles,
    ClipLoader,
    LoaderOptions,
    Reading,
    Sample,
    reading_of,
    workers,
)
from clipvip.data.shards.manifest import ShardError, load_manifest, reason_of, unpack
from clipvip.data.shards.tars import Packed, open_url, read_samples
from clipvip.data.video import DecodeError

LANES = 16
RETRIES = (1.0, 4.0)  # seconds to wait before a tar is opened again
SMALL = 2  # clips a lane below which each lane has all of a source, in an order of its own
# An unreadable clip is replaced by one of the first NEAR clips of some shard, which are quick to
# reach. Each of five further tries doubles that, since a shard may begin with unreadable clips.
NEAR = 8


class Source:
    """Shards of one kind. url: see load_manifest; ratio: share of clips, relative to others'."""

    def __init__(self, url: str, ratio: float = 1.0) -> None:
        if not ratio > 0:
            raise ShardError(f"ratio of {url} is {ratio}; expected above 0")
        found = [(url, shard) for url, shard in load_manifest(url) if shard.clips]
        if not found:
            raise ShardError(f"{url}: its shards hold no clips")
        self.url = url
        self.ratio = ratio
        self.urls = [url for url, _ in found]
        self.counts = np.array([shard.clips for _, shard in found])
        self.firsts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.texts = sum(shard.texts for _, shard in found)
        self.bad = sum(shard.bad for _, shard in found)
        self.subtitles = sum(shard.subtitles for _, shard in found)
        self.captions = sum(shard.captions for _, shard in found)

    def __len__(self) -> int:
        return int(self.counts.sum())


class Shards:
    """Sources to train from together. Places number the clips of all."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.firsts = np.cumsum([0, *map(len, self.sources)]).tolist()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def name(self, place: int) -> str:
        """Which clip of which tar a place is."""
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        source, place = self.sources[number], place - self.firsts[number]
        shard = int(np.searchsorted(source.firsts, place, side="right")) - 1
        return f"clip {place - source.firsts[shard]} of {source.urls[shard]}"

    def check(self, task: str) -> None:
        """ShardError where the task has nothing to train on."""
        for source in self.sources:
            mute = len(source) - source.texts
            # Unreadable clips may have a text; they are reported when they are read.
            if task == "retrieval" and mute > source.bad:
                raise ShardError(f"{source.url}: {mute} of {len(source)} clips have no text")
            if task == "omnisource" and not (source.subtitles or source.captions):
                raise ShardError(f"{source.url}: no clip has a subtitle or caption")


def build_shard_loader(
    shards: Shards,
    options: LoaderOptions,
    *,
    paragraph: bool = False,
    shuffle: int = 1024,
) -> ClipLoader:
    """Make a loader of one rank's training batches from shards; batches are build_loader's.

    clip_index is a place of `shards`. More than LANES workers gain nothing.

    paragraph: join the texts of a clip to one.
    shuffle: encoded clips that a rank holds in memory to shuffle among.
    """
    shards.check(options.task)
    plan = _Plan(shards, options, max(shuffle, 1))
    return ClipLoader(
        _ShardBatches(plan, reading_of(options, training=True), paragraph),
        _Order(plan),
        replace(options, num_workers=min(options.num_workers, plan.lanes)),
        BadFiles(len(shards), options.max_bad_share, options.bad_files),
        shards.name,
    )


# --- order ----------------------------------------------------------------------------------


class _Plan:
    """Which clips come when: arithmetic over the shards' counts."""

    def __init__(self, shards: Shards, options: LoaderOptions, window: int) -> None:
        self.shards = shards
        self.batch_size = options.batch_size
        self.seed = options.seed
        self.rank = options.rank
        self.world = options.world_size
        self.batches = len(shards) // (self.batch_size * self.world)
        if not self.batches:
            raise ValueError(
                f"{len(shards)} clips make no batch of {self.batch_size} on {self.world} ranks; "
                "give more clips or a smaller batch"
            )
        self.lanes = min(LANES, self.batches)
        ratios = np.array([source.ratio for source in shards.sources])
        self.shares = ratios / ratios.sum()
        self.windows = np.maximum(1, window * self.shares / self.lanes)

    def lane_batches(self, lane: int) -> int:
        """Of an epoch."""
        return (self.batches - lane - 1) // self.lanes + 1

    def before(self, lane: int) -> int:
        """Clips of an epoch on lower ranks, and on lower lanes of this one."""
        batches = self.batches // self.lanes * lane + min(self.batches % self.lanes, lane)
        return (self.rank * self.batches + batches) * self.batch_size

    def quotas(self, lane: int) -> NDArray[np.int64]:
        """Clips of each source in an epoch of a lane, the same in every epoch.

        What was rounded off on the lanes before is made up for, so the ratios hold over all of
        them, and a source of less than a clip a lane is drawn on some.
        """
        first = self.before(lane)
        return _apportioned(first + self.lane_batches(lane) * self.batch_size, self.shares) - (
            _apportioned(first, self.shares)
        )

    def picks(self, epoch: int, lane: int) -> NDArray[np.int8]:
        """The source of each clip of an epoch of a lane."""
        picks = np.repeat(np.arange(len(self.shares), dtype=np.int8), self.quotas(lane))
        return np.random.default_rng((self.seed, 0, epoch, self.rank, lane)).permutation(picks)

    def span(self, number: int, lane: int) -> tuple[int, int]:
        """The lane's part of a source's clips in a pass's order."""
        if len(self.shards.sources) == 1:  # whole batches, so that an epoch is a pass
            first = self.before(lane)
            return first, first + self.lane_batches(lane) * self.batch_size
        count, parts = len(self.shards.sources[number]), self.world * self.lanes
        if self.is_small(number):
            return 0, count
        part = self.rank * self.lanes + lane
        first = count * part // parts
        return first, count * (part + 1) // parts

    def is_small(self, number: int) -> bool:
        """Whether a source, mixed with others, is too small to cut into even parts, or drawn so
        rarely that some parts never would be."""
        parts = self.world * self.lanes
        drawn = self.shares[number] * self.batches * self.batch_size * self.world
        count = min(len(self.shards.sources[number]), drawn)
        return len(self.shards.sources) > 1 and count < SMALL * parts

    def pieces(self, number: int, turn: int, lane: int) -> list[tuple[int, int, int]]:
        """The lane's part of one pass over a source: (shard, first clip, end), in order."""
        source, (low, high) = self.shards.sources[number], self.span(number, lane)
        own = (self.rank, lane) if self.is_small(number) else ()
        generator = np.random.default_rng((self.seed, 1, number, turn, *own))
        order = generator.permutation(len(source.urls))
        # Turned by a random amount, so that cuts do not always fall on the same clips of a tar.
        first = (low + int(generator.integers(len(source)))) % len(source)
        ends = np.cumsum(source.counts[order])
        pieces = []
        wanted = high - low
        at = int(np.searchsorted(ends, first, side="right"))
        while wanted:
            shard = int(order[at])
            begin = max(first - int(ends[at] - source.counts[shard]), 0)
            end = min(begin + wanted, int(source.counts[shard]))
            pieces.append((shard, begin, end))
            wanted -= end - begin
            at, first = (at + 1) % len(order), 0
        return pieces


def _apportioned(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """`count` clips by shares that sum to 1, each within a clip or two of its share; more
    clips take from no source (Webster: its clip a + 1 comes by share / (2 a + 1))."""
    # A count of len(shares) / 2 less has no more than this; one more for rounding.
    at_least = np.floor(np.maximum(count - len(shares) / 2 - 1, 0) * shares + 0.5)
    given = at_least.astype(np.int64)
    for _ in range(count - int(given.sum())):
        given[np.argmax(shares / (2 * given + 1))] += 1
    return given


class _Order:
    """Of batches: (epoch, number)."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.epoch = 0
        self.skipped = 0
        self.lane: Callable[[Any], int] | None = lambda task: task[1] % plan.lanes

    def __len__(self) -> int:
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        skipped, self.skipped = self.skipped, 0
        epoch = self.epoch
        for batch in range(skipped, len(self)):
            yield epoch, batch


# --- in the workers -------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """A clip as it comes from its tar; `turn`: how often the source had been gone through."""

    number: int
    turn: int
    place: int
    url: str
    sample: Packed | DecodeError


class _Lane:
    """An open lane: what its next batch is, and where each source stands."""

    def __init__(self, plan: _Plan, lane: int, epoch: int, step: int) -> None:
        self.plan = plan
        self.lane = lane
        self.epoch = epoch
        self.step = step
        self.picks = plan.picks(epoch, lane)
        given = self.picks[: step * plan.batch_size]
        self.sources = [
            self._draws(number, epoch * int(quota) + int((given == number).sum()))
            for number, quota in enumerate(plan.quotas(lane))
        ]

    def batch(self) -> list[_Drawn]:
        size = self.plan.batch_size
        picks = self.picks[self.step * size : (self.step + 1) * size]
        drawn = [next(self.sources[number]) for number in picks.tolist()]
        self.step += 1
        if self.step == self.plan.lane_batches(self.lane):
            self.epoch, self.step = self.epoch + 1, 0
            self.picks = self.plan.picks(self.epoch, self.lane)
        return drawn

    def _draws(self, number: int, start: int) -> Iterator[_Drawn]:
        """A source's clips for this lane without end, from the start-th on."""
        low, high = self.plan.span(number, self.lane)
        turn, offset = divmod(start, high - low)
        while True:
            yield from self._turn(number, turn, offset)
            turn, offset = turn + 1, 0

    def _turn(self, number: int, turn: int, offset: int) -> Iterator[_Drawn]:
        """One pass, from the offset-th clip on."""
        source, first = self.plan.shards.sources[number], self.plan.shards.firsts[number]
        pieces = self.plan.pieces(number, turn, self.lane)
        count = sum(end - begin for _, begin, end in pieces)
        seed = (self.plan.seed, 2, number, turn, self.plan.rank, self.lane)
        # Sorted by place + noise, so that a clip moves by less than the window and no more than
        # about a window of them is ever held.
        noise = np.random.default_rng(seed).uniform(0, self.plan.windows[number], count)
        order = np.argsort(np.arange(count) + noise, kind="stable")
        given = np.zeros(count, bool)
        given[order[:offset]] = True
        held: dict[int, _Drawn] = {}
        needed = int(order[offset:].min())

        def stream() -> Iterator[tuple[int, _Drawn]]:
            position = 0
            for shard, begin, end in pieces:
                skipped = min(max(needed - position, 0), end - begin)
                position += skipped
                for index, sample in _read(source.urls[shard], begin + skipped, end):
                    place = first + int(source.firsts[shard]) + index
                    yield position, _Drawn(number, turn, place, source.urls[shard], sample)
                    position += 1

        coming = stream()
        for wanted in order[offset:].tolist():
            while wanted not in held:
                position, drawn = next(coming)
                if not given[position]:
                    held[position] = drawn
            yield held.pop(wanted)


def _read(url: str, first: int, end: int) -> Iterator[tuple[int, Packed | DecodeError]]:
    """Clips [first, end) of a tar, each with its number; an error for each that is not there."""
    reason = ""
    workers.at(-1)  # a tar that is slow is not the fault of the clip before
    for wait in (0.0, *(RETRIES if "://" in url else ())) if first < end else ():
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
        except Exception as error:  # fsspec and what lies below it
            reason = reason_of(error)
            if isinstance(error, FileNotFoundError):
                break
    for index in range(first, end):
        yield index, DecodeError(url, reason)


class _ShardBatches:
    """Work on shards: (epoch, number of a batch) to samples."""

    def __init__(self, plan: _Plan, reading: Reading, paragraph: bool) -> None:
        self.plan = plan
        self.reading = reading
        self.paragraph = paragraph
        self.open: dict[int, _Lane] = {}

    def samples(self, task: tuple[int, int], condemned: frozenset[int]) -> list[Sample]:
        epoch, number = task
        step, lane = divmod(number, self.plan.lanes)
        stream = self.open.pop(lane, None)
        if stream is None or (stream.epoch, stream.step) != (epoch, step):
            stream = _Lane(self.plan, lane, epoch, step)
        samples = [self._sample(drawn, 0, condemned) for drawn in stream.batch()]
        self.open[lane] = stream
        return samples

    def sample(self, key: tuple[int, int, int], first: int, condemned: frozenset[int]) -> Sample:
        """key: number of the source, turn and place, as _Drawn has them."""
        number, turn, place = key
        source, index = self.plan.shards.sources[number], place - self.plan.shards.firsts[number]
        shard = int(np.searchsorted(source.firsts, index, side="right")) - 1
        return self._sample(
            self._drawn(number, turn, shard, index - int(source.firsts[shard])), first, condemned
        )

    def _sample(self, drawn: _Drawn, first: int, condemned: frozenset[int]) -> Sample:
        place, turn = drawn.place, drawn.turn
        sample = Sample((drawn.number, turn, place), place)
        for attempt in range(first, self.reading.tries):
            generator = np.random.default_rng((self.plan.seed, 3, turn, place, attempt))
            sample.attempt = attempt
            if attempt:
                drawn = self._other(drawn.number, generator, NEAR << min(attempt - 1, 5))
                sample.place = drawn.place
            sample.tried.append(sample.place)
            workers.at(sample.place)
            name, line = drawn.url, 0
            try:
                if isinstance(drawn.sample, DecodeError):
                    raise drawn.sample
                name = f"{drawn.url}/{drawn.sample.key}"
                stored = unpack(drawn.sample, drawn.url)
                clip, line = stored.clip, stored.clip.line
                if sample.place in condemned:
                    raise DecodeError(name, workers.CONDEMNED)
                if self.reading.task == "retrieval" and not clip.text:
                    raise DecodeError(name, "no text")
                if self.paragraph and clip.text:
                    clip = replace(clip, text=(" ".join(clip.text),))
                self.reading.read(sample, clip, generator, stored.video, stored.image)
                break
            except DecodeError as error:
                sample.failed(name, error.reason, line)
        return sample

    def _other(self, number: int, generator: np.random.Generator, near: int) -> _Drawn:
        """A clip of the same source, one of the first `near` of some shard."""
        source = self.plan.shards.sources[number]
        shard = int(generator.integers(len(source.urls)))
        index = int(generator.integers(min(near, int(source.counts[shard]))))
        return self._drawn(number, 0, shard, index)

    def _drawn(self, number: int, turn: int, shard: int, index: int) -> _Drawn:
        source = self.plan.shards.sources[number]
        place = self.plan.shards.firsts[number] + int(source.firsts[shard]) + index
        ((_, sample),) = _read(source.urls[shard], index, index + 1)
        return _Drawn(number, turn, place, source.urls[shard], sample)
