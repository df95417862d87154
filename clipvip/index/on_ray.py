"""Embed files on a Ray cluster: each worker holds the model, and the command puts the vectors."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from clipvip.data.loading import BadFile, RayJob, RayWorkers, check_seen, joined_cluster
from clipvip.embedding import Embedded, autocast, embed_files, fingerprint, load_for_embedding
from clipvip.files import shown
from clipvip.index.rows import About
from clipvip.index.tables import Span

SEND_SECONDS = 1.0  # least time between two results of a worker
MOST_FILES = 1024  # in a task; between two tasks a worker's decoders start anew
TASKS_PER_WORKER = 8  # at least, so that all workers end at about the same time

File = tuple[int, Path, Sequence[Span] | None]  # its place among all files, path and moments


class Part(NamedTuple):
    """Some of the files of a task. moments: embedded since the last part. bad: files that lack
    moments."""

    files: list[Embedded]
    moments: int
    bad: list[BadFile]


@dataclass
class EmbedFiles(RayJob[list[File], Part]):
    """Embed lists of files. options: those of embed_files. hashed: the model's fingerprint."""

    model: str
    hashed: str
    mixed_precision: str
    device: str
    options: dict[str, Any]
    loaded: list[Any] = field(default_factory=list)

    def begin(self, report: Callable[[int], None]) -> None:
        self.loaded = [*load_for_embedding(self.model)]
        if fingerprint(*self.loaded) != self.hashed:
            raise ValueError(
                f"a Ray worker finds other weights at {shown(self.model)} than this machine; put "
                "the model into a folder that all nodes of the cluster share"
            )
        self.loaded[0].to(self.device)

    def do(self, task: list[File], excluded: frozenset[int]) -> Iterator[Part]:
        model, processor = self.loaded
        part, sent = Part([], 0, []), time.monotonic()
        moments = 0

        def count(number: int) -> None:
            nonlocal moments
            moments += number

        files = [(path, spans) for _, path, spans in task]
        bad: list[BadFile] = []
        with autocast(model, self.mixed_precision):
            for one in embed_files(model, processor, files, bad, on_moments=count, **self.options):
                part.files.append(one._replace(place=task[one.place][0]))
                if time.monotonic() - sent > SEND_SECONDS:
                    yield part._replace(moments=moments, bad=[*bad])
                    part, sent, moments = Part([], 0, []), time.monotonic(), 0
                    bad.clear()
        yield part._replace(moments=moments, bad=bad)

    def rest(self, task: list[File], result: Part) -> list[File]:
        done = {one.place for one in result.files}
        return [file for file in task if file[0] not in done]


def embed_on_ray(
    about: About,
    files: Sequence[tuple[Path, Sequence[Span] | None]],
    bad_files: list[BadFile],
    *,
    order: Iterable[int],
    on_moments: Callable[[int], None],
    mixed_precision: str,
    num_workers: int | None,
    **options: Any,
) -> Iterator[Embedded]:
    """Embed files as embed_files does, on the cluster that clipvip.data.loading.joined_cluster
    finds; yield them in any order. Vectors are the same up to rounding, as other moments are in a
    batch.

    about: the index, which names the model. num_workers: number of workers that each hold a model;
    None for one per GPU, or without GPUs one per four CPUs.
    """
    with joined_cluster() as cluster:
        count, cpus, gpus = cluster.for_model(num_workers)
        count = min(count, len(files))
        size = min(max(len(files) // (count * TASKS_PER_WORKER), 1), MOST_FILES)
        device = "cuda" if gpus else "cpu"
        options["num_workers"] = cpus
        job = EmbedFiles(about.model, about.fingerprint, mixed_precision, device, options)
        sees = [about.model, *(str(path) for path, _ in files)]
        places = iter(order)

        def tasks() -> Iterator[list[File]]:
            while some := [(place, *files[place]) for place in islice(places, size)]:
                yield some

        with closing(RayWorkers(job, count, cpus=cpus, gpus=gpus, sees=sees)) as workers:
            for _, part in workers.run(tasks(), ahead=2, ordered=False):
                check_seen(part.bad)
                bad_files += part.bad
                on_moments(part.moments)
                yield from part.files
