"""Caption clips on a Ray cluster: each worker holds the captioner, and the command keeps the
records."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from clipvip.captions.captioner import Asking, Captioner
from clipvip.captions.shards import ShardRun, Taken
from clipvip.captions.work import UNREADABLE, Reader, Record, read_batch, records
from clipvip.data.annotations import Annotations
from clipvip.data.loading import (
    BadFile,
    RayJob,
    RayWorkers,
    Workers,
    check_seen,
    joined_cluster,
    names_of,
    some_files,
)
from clipvip.data.shards import ShardCopies
from clipvip.files import shown

MOST_BATCHES = 32  # in a task; between two tasks a worker does not read ahead
TASKS_PER_WORKER = 8  # at least, so that all workers end at about the same time


@dataclass(frozen=True)
class CaptionerThere:
    """A captioner to be loaded by workers of a cluster; see Captioner. hashed: its fingerprint."""

    source: str
    asking: Asking
    precision: str
    hashed: str

    def load(self, device: str) -> Captioner:
        """Raises ValueError if the model is another one there."""
        captioner = Captioner(self.source, self.asking, device, self.precision)
        if captioner.fingerprint() != self.hashed:
            raise ValueError(
                f"a Ray worker finds another captioner at {shown(self.source)} than this machine; "
                "put it into a folder that all nodes of the cluster share"
            )
        return captioner.start()


@dataclass
class CaptionClips(RayJob[list[list[int]], list[Record]]):
    """Caption batches of clips, given by their places. cpus: processes that read."""

    there: CaptionerThere
    device: str
    cpus: int
    clips: Annotations
    loaded: list[Any] = field(default_factory=list)

    def begin(self, report: Callable[[int], None]) -> None:
        captioner = self.there.load(self.device)
        read = partial(read_batch, self.clips, Reader(captioner.prepare, self.there.asking.frames))
        self.loaded = [captioner, Workers(read, self.cpus, names_of(self.clips))]

    def do(self, task: list[list[int]], excluded: frozenset[int]) -> Iterator[list[Record]]:
        captioner, workers = self.loaded
        for _, prepared in workers.run(task):
            yield records(prepared, captioner.answer(prepared.inputs, prepared.counts))

    def rest(self, task: list[list[int]], result: list[Record]) -> list[list[int]]:
        return task[1:]


@dataclass
class CaptionShards(RayJob[list[int], Taken]):
    """Copy shards with captions, given by their numbers; all of a task are read at once."""

    there: CaptionerThere
    device: str
    copies: ShardCopies
    batch_size: int
    overwrite: bool
    loaded: list[Captioner] = field(default_factory=list)

    def begin(self, report: Callable[[int], None]) -> None:
        self.loaded = [self.there.load(self.device)]

    def do(self, task: list[int], excluded: frozenset[int]) -> Iterator[Taken]:
        run = ShardRun(self.loaded[0], self.copies, task, self.batch_size, self.overwrite)
        found: dict[int, list[Record]] = {number: [] for number in task}
        for number, new, shard in run.taken(len(task)):
            found[number] += new
            if shard is not None:  # not before, or a shard that is begun again would count twice
                yield Taken(number, found.pop(number), shard)

    def rest(self, task: list[int], result: Taken) -> list[int]:
        return [number for number in task if number != result.number]


def caption_clips_on_ray(
    there: CaptionerThere,
    clips: Annotations,
    batches: Sequence[list[int]],
    num_workers: int | None,
) -> Iterator[list[Record]]:
    """Yield the records of batches, in any order. Batches are those of a run on one machine, and so
    are the captions.

    num_workers: number of workers that each hold a captioner; see Cluster.for_model.
    """
    with joined_cluster() as cluster:
        count, cpus, gpus = cluster.for_model(num_workers)
        count = min(count, len(batches))
        size = min(max(len(batches) // (count * TASKS_PER_WORKER), 1), MOST_BATCHES)
        starts = range(0, len(batches), size)
        tasks = ([*batches[first : first + size]] for first in starts)
        job = CaptionClips(there, "cuda" if gpus else "cpu", cpus, clips)
        sees: list[str | Path] = [there.source, *some_files(clips)]
        actors = RayWorkers(job, count, cpus=cpus, gpus=gpus, name=names_of(clips), sees=sees)
        with closing(actors):
            for _, found in actors.run(tasks, ordered=False):
                check_seen(_unreadable(found))
                yield found


def caption_shards_on_ray(
    there: CaptionerThere,
    copies: ShardCopies,
    left: list[int],
    batch_size: int,
    overwrite: bool,
    *,
    num_workers: int | None,
) -> Generator[Taken, None, None]:
    """Yield what becomes of the shards of the numbers `left`, each once, in any order."""
    if not left:
        return
    with joined_cluster() as cluster:
        count, cpus, gpus = cluster.for_model(num_workers)
        count = min(count, len(left))
        size = min(cpus, -(-len(left) // count))
        tasks = (left[first : first + size] for first in range(0, len(left), size))
        job = CaptionShards(there, "cuda" if gpus else "cpu", copies, batch_size, overwrite)
        sees: list[str | Path] = [there.source, *(url for url, _ in copies.shards)]
        actors = RayWorkers(job, count, cpus=cpus, gpus=gpus, sees=sees, writes=copies.out)
        with closing(actors):
            for _, taken in actors.run(tasks, ahead=1, ordered=False):
                yield taken


def _unreadable(found: list[Record]) -> list[BadFile]:
    return [r.file for r in found if r.left_out == UNREADABLE and r.file is not None]
