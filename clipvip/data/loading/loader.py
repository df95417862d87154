"""Batches of clips: decoded in worker processes, packed, tokenised, exactly repeatable.

Order, frames and texts drawn are functions of (seed, epoch, place of the clip) alone, so
they are the same for any number of workers and after a resume. All ranks share one order:
a global batch is batch_size · world_size clips, of which rank r takes the r-th part.

A file that cannot be read is logged once, listed in `bad_files` and appended to
bad_files.jsonl, where one that is damaged but could be used is listed too. In training another
clip, drawn by the seed, takes its place. In evaluation nothing takes its place: the clip is left
out of its batch (clip_index says which are there; a batch of which nothing is left is not given).
Either way, more than max_bad_share of the distinct clips tried stops the run. A process that dies
is replaced and its batches are made again; a clip that two processes died of counts as unreadable.

With DALI the processes pass on encoded frames, and the main process has a
batch decoded while the last is in use. What DALI turns out not to decode is read again by PyAV, as
if DALI had never been, so both decoders give the same clips in the same order.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from clipvip.data.annotations import Clip
from clipvip.data.loading import workers
from clipvip.data.loading.bad_files import BadFile, BadFiles, LoaderError
from clipvip.data.loading.by_dali import ByDali, Encoding
from clipvip.data.loading.collate import Batch, Collate
from clipvip.data.loading.options import LoaderOptions
from clipvip.data.loading.samples import TRIES, FileBatches, Order, Reading, Report, Work
from clipvip.data.loading.workers import Workers
from clipvip.data.video import start_engine
from clipvip.files import shown

__all__ = ["Batch", "ClipLoader", "LoaderError", "build_loader"]

logger = logging.getLogger(__name__)


def build_loader(
    clips: Sequence[Clip],
    options: LoaderOptions,
    *,
    training: bool,
    drop_last: bool | None = None,
) -> "ClipLoader":
    """Make a loader of one rank's batches from video and image files.

    training: shuffle the clips, jitter the chosen frames and draw one text per clip. Otherwise
        every clip comes once, in order, with all its texts.
    drop_last: leave out the last clips of an epoch that do not fill a batch on every rank;
        None for the value of `training`.

    A batch is a dict of CPU tensors (on the GPU if DALI decodes there):
    - pixel_values uint8 [F, 3, S, S], frames of B clips, packed; frame_offsets int32 [B+1],
      their running sum; clip_index int64 [B], places in `clips`.
    - task "retrieval": text_ids, text_mask int64 [n, len] and text_clip int64 [n], the place in
      `clips` that each text belongs to (in training n = B and text_clip = clip_index).
    - task "omnisource": subtitle_ids, subtitle_mask, caption_ids, caption_mask int64 [B, len];
      subtitle_present, caption_present bool [B]; image uint8 [B, 3, S, S], the
      annotated image or the clip's middle frame. Absent texts are tokenised as empty.
    - task "video": nothing more.
    """
    if options.task == "retrieval":
        without = next((clip for clip in clips if not clip.text), None)
        if without is not None:
            named = f"line {without.line} ({shown(without.video)})"
            raise ValueError(f"{named} has no 'text' to retrieve by")
    return ClipLoader(
        FileBatches(clips, reading_of(options, training)),
        _Batches(len(clips), options, training, drop_last),
        options,
        BadFiles(len(clips), options.max_bad_share, options.bad_files),
        lambda place: f"{clips[place].video} (line {clips[place].line})",
    )


def reading_of(options: LoaderOptions, training: bool) -> Reading:
    return Reading(
        size=options.image_size,
        num_frames=options.num_frames,
        sampling=options.sampling,
        resize=options.resize,
        task=options.task,
        training=training,
        seed=options.seed,
        engine=start_engine(options.decoder),
    )


class ClipLoader:
    """Iterates over one epoch's batches of one rank.

    decoded: how many clips were decoded by "DALI" and by "PyAV"; where DALI was to do it, "PyAV
    (why not DALI)".
    """

    def __init__(
        self,
        work: Work,
        order: Order,
        options: LoaderOptions,
        bad: BadFiles,
        name: Callable[[int], str],
    ) -> None:
        collate = Collate(options.tokenizer, options.text_length, options.task)
        self.name = name
        self.decoded: Counter[str] = Counter()
        self._order = order
        self._bad = bad
        self._finish: ByDali | None = None
        in_workers: Callable[[Any, frozenset[int]], Any] = _ByPyAV(work, collate)
        if work.reading.engine is not None:
            in_workers = Encoding(work)
            self._finish = ByDali(work, collate, options.num_workers, name)
        self._workers: Workers[Any, Any] = Workers(in_workers, options.num_workers, name)

    @property
    def bad_files(self) -> list[BadFile]:
        """What could not be read so far."""
        return self._bad.found

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self._order)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives."""
        self._order.epoch = epoch

    def skip(self, batches: int) -> None:
        """Leaves out the first batches of the next iteration, without decoding them."""
        self._order.skipped = batches

    def __iter__(self) -> Iterator[Batch]:
        if torch.cuda.is_available() or self._finish is not None:
            return _ahead(self._batches())
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        before = self.decoded.copy()
        for _, made in self._workers.run(self._order, worker_of=self._order.lane):
            batch, report = made if self._finish is None else self._finish(made)
            self._count(report.decoders)
            self._bad.note(report.tried, report.failures, report.damaged)
            if report.gave_up:
                self._bad.stop(f"{TRIES} in a row, drawn at random")
            if batch is not None:
                yield batch
        counts = self.decoded - before
        if set(counts) - {"DALI", "PyAV"}:
            logger.warning("clips decoded by: %s", counted(counts))

    def _count(self, decoders: "list[str]") -> None:
        for decoder in decoders:
            if not self.decoded[decoder] and decoder not in ("DALI", "PyAV"):
                logger.warning("a clip is decoded by %s; more like it are counted", decoder)
            self.decoded[decoder] += 1


def counted(decoded: Counter[str]) -> str:
    """ClipLoader.decoded in words."""
    return ", ".join(f"{decoder} {count}" for decoder, count in decoded.most_common())


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, made in a thread while the last one is in use; in page-locked memory where
    that speeds copies to a GPU."""
    pin = torch.cuda.is_available()

    def following() -> Batch | None:
        batch = next(batches, None)
        if batch is None or not pin:
            return batch
        return {key: value if value.is_cuda else value.pin_memory() for key, value in batch.items()}

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while (batch := coming.result()) is not None:
            coming = thread.submit(following)
            yield batch


# --- order ----------------------------------------------------------------------------------


class _Batches:
    """One rank's batches of (epoch, place of the clip)."""

    lane: Callable[[Any], int] | None = None

    def __init__(
        self, count: int, options: LoaderOptions, training: bool, drop_last: bool | None
    ) -> None:
        self.count = count
        self.batch_size = options.batch_size
        self.rank = options.rank
        self.stride = options.batch_size * options.world_size
        self.training = training
        self.seed = options.seed
        self.drop_last = training if drop_last is None else drop_last
        self.epoch = 0
        self.skipped = 0
        if count == 0 or (self.drop_last and count < self.stride):
            raise ValueError(
                f"{count} clips make no batch of {self.batch_size} on {options.world_size} ranks; "
                "give more clips, a smaller batch, or drop_last=False"
            )

    def __len__(self) -> int:
        tail = 0 if self.drop_last else self.count % self.stride > self.rank * self.batch_size
        return self.count // self.stride + tail

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        skipped, self.skipped = self.skipped, 0
        epoch = self.epoch
        order = np.arange(self.count)
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        for batch in range(skipped, len(self)):
            start = batch * self.stride + self.rank * self.batch_size
            yield [(epoch, int(place)) for place in order[start : start + self.batch_size]]


# --- in the workers -------------------------------------------------------------------------


class _ByPyAV:
    """In a worker: a task to a whole batch."""

    def __init__(self, work: Work, collate: "Collate") -> None:
        self.work = work
        self.collate = collate

    def __call__(self, task: Any, condemned: frozenset[int]) -> tuple[Batch | None, Report]:
        samples = self.work.samples(task, condemned)
        workers.at(-1)  # what goes wrong from here on says nothing of the last clip
        return self.collate(samples)
