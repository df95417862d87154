"""Which clips of annotation files are in which batch.

All ranks share one order of an epoch: a global batch is its next batch_size · world_size clips, of
which rank r takes the r-th part. The order depends on seed and epoch alone. So a run that resumes
continues with the batches that would have followed, also on another number of ranks; with several
files, if batch_size · world_size stays.

One file: an epoch is a random order of its clips.

Several, mixed by ratio (ClipSources):
- An *epoch* has as many clips as all files together, rounded down to whole batches. Each file gives
  its share of them, in a random order. What rounding to whole clips leaves is made up for in later
  epochs, so the ratios hold over the whole run, and a file with a tiny share is drawn too.
- A *pass* over a file draws each of its clips once, in an order of its own. A file starts its next
  pass when its last one is over, also within an epoch, and continues it in the next epoch.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from clipvip.data.annotations import Clip
from clipvip.data.loading.samples import LoaderOptions


@dataclass(frozen=True)
class ClipSource:
    """Clips of one annotation file.

    name: path of the file. ratio: share of clips, relative to the ratios of other sources.
    paragraph: join the texts of a clip to one; None for what holds for all sources.
    """

    name: str
    clips: Sequence[Clip]
    ratio: float = 1.0
    paragraph: bool | None = None

    def __len__(self) -> int:
        return len(self.clips)


class ClipSources(Sequence[Clip]):
    """Clips of several sources, in order. A place numbers the clips of all of them."""

    def __init__(self, sources: Sequence[ClipSource]) -> None:
        self.sources = list(sources)
        self.firsts = np.cumsum([0, *map(len, self.sources)]).tolist()

    @property
    def shares(self) -> NDArray[np.float64]:
        return shares_of([source.ratio for source in self.sources])

    def number(self, place: int) -> int:
        """Return the index of a place's source."""
        return bisect_right(self.firsts, place) - 1

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @overload
    def __getitem__(self, place: int) -> Clip: ...
    @overload
    def __getitem__(self, place: slice) -> list[Clip]: ...
    def __getitem__(self, place: int | slice) -> Clip | list[Clip]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        number = self.number(place)
        return self.sources[number].clips[place - self.firsts[number]]


class FileOrder:
    """One rank's batches of (epoch or pass, place of the clip)."""

    worker_of = None

    def __init__(self, count: int, options: LoaderOptions, training: bool, drop_last: bool) -> None:
        self.count = count
        self.batch_size = options.batch_size
        self.first = options.rank * options.batch_size
        self.stride = options.batch_size * options.world_size
        self.training = training
        self.seed = options.seed
        if count == 0 or (drop_last and count < self.stride):
            raise ValueError(
                f"{count} clips make no batch of {self.batch_size} on {options.world_size} ranks; "
                "give more clips, a smaller batch, or drop_last=False"
            )
        self.batches = count // self.stride + (not drop_last and count % self.stride > self.first)

    def __len__(self) -> int:
        return self.batches

    def tasks(self, epoch: int, skipped: int) -> Iterator[list[tuple[int, int]]]:
        passes, places = self.drawn(epoch)
        for batch in range(skipped, self.batches):
            start = batch * self.stride + self.first
            part = slice(start, start + self.batch_size)
            yield list(zip(passes[part].tolist(), places[part].tolist(), strict=True))

    def drawn(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return epoch or pass, and place, of the clips of an epoch on all ranks, in order."""
        places = np.arange(self.count)
        if self.training:
            places = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return np.broadcast_to(np.int64(epoch), places.shape), places


class MixedOrder(FileOrder):
    """The same from several sources, in training."""

    def __init__(self, clips: ClipSources, options: LoaderOptions) -> None:
        super().__init__(len(clips), options, training=True, drop_last=True)
        self.counts = [*map(len, clips.sources)]
        self.firsts = clips.firsts
        self.shares = clips.shares

    def drawn(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size = self.batches * self.stride
        firsts = apportioned(epoch * size, self.shares)  # draws from each source so far
        ends = apportioned((epoch + 1) * size, self.shares)
        numbers = np.repeat(np.arange(len(firsts)), ends - firsts)
        numbers = np.random.default_rng((self.seed, 0, epoch)).permutation(numbers)
        passes, places = np.empty((2, len(numbers)), np.int64)
        pairs = zip(firsts.tolist(), ends.tolist(), self.counts, strict=True)
        for number, (first, end, count) in enumerate(pairs):
            drawn = np.flatnonzero(numbers == number)
            for each in range(first // count, -(-end // count)):
                order = np.random.default_rng((self.seed, 1, number, each)).permutation(count)
                begin = each * count
                low, high = max(first, begin), min(end, begin + count)
                part = drawn[low - first : high - first]
                passes[part] = each
                places[part] = self.firsts[number] + order[low - begin : high - begin]
        return passes, places


def shares_of(ratios: Sequence[float]) -> NDArray[np.float64]:
    """Scale ratios so that they sum to 1."""
    return np.array(ratios) / np.sum(ratios)


def apportioned(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Divide `count` clips by shares that sum to 1, each within a clip or two of its share.

    A larger count gives no source fewer clips: by Webster's method, a source gets its clip a + 1
    in the order of share / (2 a + 1).
    """
    # A start that is never too many clips: the count less len(shares) / 2, and 1 for rounding.
    at_least = np.floor(np.maximum(count - len(shares) / 2 - 1, 0) * shares + 0.5)
    given = at_least.astype(np.int64)
    for _ in range(count - int(given.sum())):
        given[np.argmax(shares / (2 * given + 1))] += 1
    return given
