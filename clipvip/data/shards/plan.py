"""Which clips of shards are in which training batch: arithmetic over the numbers of clips.

- An *epoch* has as many clips as all sources together.
- A *source* is a set of shards. Each batch takes clips from the sources by their ratios, on
  average over an epoch.
- A *pass* reads the clips of a source once. It puts the source's shards in a random order and
  divides the sequence of their clips into equal parts, one per lane of each rank. So no clip is
  read twice in a pass, and shards need not outnumber ranks or workers; a shard at the boundary of
  two parts is read by both lanes. With one source, a pass is an epoch. With several, each source
  begins its next pass, in a new order, when its last one is over.
- A *lane* is one of LANES sequences of clips of a rank: batch b of the rank is the next batch of
  lane b modulo LANES. A worker reads one or more lanes, each tar by tar. Lanes do not depend on
  the number of workers, and so neither do batches.
- A source too small to divide is not divided: each lane makes its own passes over all of it.

All of this depends on (seed, epoch, rank, world size) alone. So a resumed run continues, at any
batch, with exactly the batches that would have followed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from clipvip.data.loading import LoaderOptions, apportioned, shares_of
from clipvip.data.shards.manifest import ShardError, load_manifest

LANES = 16
SMALL = 2  # clips per lane below which a source is not divided


class Source:
    """A set of shards.

    name: url, see load_manifest. ratio: share of clips, relative to the ratios of other sources.
    paragraph: join the texts of a clip to one; None for what holds for all sources.
    images: how many of its clips are images; None if an older manifest does not say.
    """

    def __init__(self, url: str, ratio: float = 1.0, paragraph: bool | None = None) -> None:
        if not ratio > 0:
            raise ShardError(f"ratio of {url} is {ratio}; expected above 0")
        found = [(url, shard) for url, shard in load_manifest(url) if shard.clips]
        if not found:
            raise ShardError(f"{url}: its shards hold no clips")
        self.name = url
        self.ratio = ratio
        self.paragraph = paragraph
        self.urls = [url for url, _ in found]
        self.counts = np.array([shard.clips for _, shard in found])
        self.firsts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.texts = sum(shard.texts for _, shard in found)
        self.bad = sum(shard.bad for _, shard in found)
        self.subtitles = sum(shard.subtitles for _, shard in found)
        self.captions = sum(shard.captions for _, shard in found)
        images = [shard.images for _, shard in found]
        self.images = None if None in images else sum(each or 0 for each in images)

    def __len__(self) -> int:
        return int(self.counts.sum())


class Shards:
    """Sources to train from together. A place numbers the clips of all of them, in order."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.firsts = np.cumsum([0, *map(len, self.sources)]).tolist()

    @property
    def shares(self) -> NDArray[np.float64]:
        return shares_of([source.ratio for source in self.sources])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def locate(self, place: int) -> tuple[int, int, int]:
        """Return the indices of a place's source, of its shard there, and of its clip in that."""
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        source, index = self.sources[number], place - self.firsts[number]
        shard = int(np.searchsorted(source.firsts, index, side="right")) - 1
        return number, shard, index - int(source.firsts[shard])

    def name(self, place: int) -> str:
        """Describe a place by its clip and tar."""
        number, shard, index = self.locate(place)
        return f"clip {index} of {self.sources[number].urls[shard]}"

    def check(self, task: str) -> None:
        """Raise ShardError if a source lacks the texts that the task trains on."""
        for source in self.sources:
            without = len(source) - source.texts
            # Unreadable clips may have a text; they are reported when they are read.
            if task == "retrieval" and without > source.bad:
                raise ShardError(f"{source.name}: {without} of {len(source)} clips have no text")
            if task == "omnisource" and not (source.subtitles or source.captions or source.texts):
                raise ShardError(f"{source.name}: no clip has a subtitle, caption or text")


class Plan:
    """The clips of each lane of one rank, in order.

    Arguments named `number` are indices of sources.

    window: clips that the rank holds in memory to shuffle among, over all its lanes.
    """

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
        self.shares = shards.shares
        self.windows = np.maximum(1, window * self.shares / self.lanes)  # clips, per source

    def __len__(self) -> int:
        return self.batches

    def tasks(self, epoch: int, skipped: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, number of the batch) for the batches of an epoch, see Order."""
        return ((epoch, batch) for batch in range(skipped, self.batches))

    def worker_of(self, task: tuple[int, int]) -> int:
        """Return the lane of a batch: one worker reads all batches of a lane."""
        return task[1] % self.lanes

    def lane_batches(self, lane: int) -> int:
        """Number of batches of a lane in an epoch."""
        return (self.batches - lane - 1) // self.lanes + 1

    def clips_before(self, lane: int) -> int:
        """Number of clips in an epoch on lower ranks, and on lower lanes of this one."""
        batches = self.batches // self.lanes * lane + min(self.batches % self.lanes, lane)
        return (self.rank * self.batches + batches) * self.batch_size

    def quotas(self, lane: int) -> NDArray[np.int64]:
        """Number of clips of each source in an epoch of a lane, the same in every epoch.

        A lane makes up for the rounding on the lanes before it. So the ratios hold over all of
        them, and a source with less than a clip per lane is drawn on some lanes.
        """
        first = self.clips_before(lane)
        last = first + self.lane_batches(lane) * self.batch_size
        return apportioned(last, self.shares) - apportioned(first, self.shares)

    def picks(self, epoch: int, lane: int) -> NDArray[np.int8]:
        """Number of the source of each clip in an epoch of a lane."""
        picks = np.repeat(np.arange(len(self.shares), dtype=np.int8), self.quotas(lane))
        return np.random.default_rng((self.seed, 0, epoch, self.rank, lane)).permutation(picks)

    def span(self, number: int, lane: int) -> tuple[int, int]:
        """First and end position of the lane's part in a pass over a source."""
        if len(self.shards.sources) == 1:  # whole batches, so that a pass is an epoch
            first = self.clips_before(lane)
            return first, first + self.lane_batches(lane) * self.batch_size
        count, parts = len(self.shards.sources[number]), self.world * self.lanes
        if self.is_small(number):
            return 0, count
        part = self.rank * self.lanes + lane
        first = count * part // parts
        return first, count * (part + 1) // parts

    def is_small(self, number: int) -> bool:
        """Whether a source, mixed with others, is too small to divide into equal parts, or drawn
        so rarely that some parts would never be read."""
        parts = self.world * self.lanes
        drawn = self.shares[number] * self.batches * self.batch_size * self.world
        count = min(len(self.shards.sources[number]), drawn)
        return len(self.shards.sources) > 1 and count < SMALL * parts

    def pieces(self, number: int, pass_number: int, lane: int) -> list[tuple[int, int, int]]:
        """The lane's part of a pass over a source, as (shard, first clip, end) in order."""
        source, (low, high) = self.shards.sources[number], self.span(number, lane)
        own = (self.rank, lane) if self.is_small(number) else ()
        generator = np.random.default_rng((self.seed, 1, number, pass_number, *own))
        order = generator.permutation(len(source.urls))
        # Rotated by a random number, so that boundaries do not always fall on the same clips.
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

    def shuffled(self, number: int, pass_number: int, lane: int, count: int) -> NDArray[np.int64]:
        """Order in which a lane gives the `count` clips of its part of a pass.

        Clips are sorted by their position plus noise up to the window. So each moves by less than
        the window, and no more than about a window of them is held at any time.
        """
        seed = (self.seed, 2, number, pass_number, self.rank, lane)
        noise = np.random.default_rng(seed).uniform(0, self.windows[number], count)
        return np.argsort(np.arange(count) + noise, kind="stable")
