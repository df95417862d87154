"""Batches of clips from files: decoded in worker processes, packed, tokenised, repeatable exactly.

Which clips, frames and texts are in a batch depends on (seed, epoch, rank, world size) alone, so
batches are the same for any number of workers and after resuming. (Only which frames of a damaged
file can be read may depend on what was read of it before.) All ranks share one order, see order.py.

A file that cannot be read is logged once, listed in `ClipLoader.bad_files` and appended to
LoaderOptions.bad_files, as are files that are damaged but usable. In training, another clip, drawn
by the seed, takes its place. In evaluation the clip is missing from its batch (clip_index tells
which are present), and a batch without clips is skipped. Either way, the run stops if more than
max_bad_share of the distinct clips tried are unreadable. If a worker process dies, a new one makes
its batches again; a clip at which two processes died counts as unreadable.

A batch is made in these steps:

    Order                     which clips are in a batch             order.py, shards' plan.py
    BatchReader, ClipReader   clips → samples, in workers            reader.py, shards' stream.py
    collate                   samples → batch, in workers            samples.py
    DecodeByDali              with DALI: the end of both, in the     by_dali.py
                              main process
    ClipLoader                runs these, counts unreadable clips    loader.py
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch

from clipvip.data.annotations import Clip
from clipvip.data.loading.bad_files import BadFile, BadFiles
from clipvip.data.loading.by_dali import DecodeByDali, read_for_dali
from clipvip.data.loading.in_worker import set_place
from clipvip.data.loading.order import ClipSources, FileOrder, MixedOrder
from clipvip.data.loading.reader import BatchReader, ClipReader, FileBatchReader, names_of
from clipvip.data.loading.samples import TRIES, Batch, LoaderOptions, Report, collate
from clipvip.data.loading.workers import Workers
from clipvip.data.video import start_engine
from clipvip.files import shown

logger = logging.getLogger(__name__)


def build_loader(
    clips: Sequence[Clip], options: LoaderOptions, *, training: bool, drop_last: bool | None = None
) -> "ClipLoader":
    """Make a loader of one rank's batches from video and image files.

    clips: several ClipSources are mixed by their ratios in training.
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
      annotated image or the clip's middle frame. Absent texts are tokenised as empty. video_present
      bool [B] is False for an image that is not embedded as a video too and so has no frames in
      pixel_values; see roles.py.
    - task "video": frame_times float64 [F], seconds from the start of a frame's video.
    """
    if options.task == "retrieval":
        without = next((clip for clip in clips if not clip.text), None)
        if without is not None:
            named = f"line {without.line} ({shown(without.video)})"
            raise ValueError(f"{named} has no 'text' to retrieve by")
    reader = ClipReader(options, training, start_engine(options.decoder))
    order = FileOrder(len(clips), options, training, training if drop_last is None else drop_last)
    if isinstance(clips, ClipSources) and len(clips.sources) > 1 and training:
        order = MixedOrder(clips, options)
    return ClipLoader(FileBatchReader(clips, reader), order, len(clips), names_of(clips))


class Order(Protocol):
    """Which clips are in the batches of an epoch; its length is their number."""

    def __len__(self) -> int: ...

    def tasks(self, epoch: int, skipped: int) -> Iterator[Any]:
        """Yield a task for BatchReader.read_batch per batch, without the first `skipped`."""
        ...

    @property
    def worker_of(self) -> Callable[[Any], int] | None: ...  # see Workers.run


class ClipLoader:
    """Iterates over one epoch's batches of one rank. Made by build_loader or build_shard_loader.

    count: number of places of the data.
    decoded: how many clips "DALI" decoded, and how many "PyAV"; if DALI was asked for, the latter
        as "PyAV (reason why not DALI)", without a reason once DALI has failed on too many.
    name: describes a place, a value of clip_index, for logs.
    """

    def __init__(
        self, batch_reader: BatchReader, order: Order, count: int, name: Callable[[int], str]
    ) -> None:
        options, engine = batch_reader.reader.options, batch_reader.reader.engine
        self.name = name
        self.decoded: Counter[str] = Counter()
        self._order = order
        self._epoch = 0
        self._skipped = 0
        self._bad = BadFiles(count, options.max_bad_share, options.bad_files)
        self._finish: DecodeByDali | None = None
        work: Callable[[Any, frozenset[int]], Any] = partial(_read_and_collate, batch_reader)
        if engine is not None:
            work = partial(read_for_dali, batch_reader)
            self._finish = DecodeByDali(batch_reader, engine, name)
        self._workers: Workers[Any, Any] = Workers(work, options.num_workers, name)

    @property
    def bad_files(self) -> list[BadFile]:
        """Files that could not be read so far."""
        return self._bad.found

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self._order)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next iteration, without decoding them."""
        self._skipped = batches

    def __iter__(self) -> Iterator[Batch]:
        if torch.cuda.is_available() or self._finish is not None:
            return _prefetched(self._batches())
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        before = self.decoded.copy()
        skipped, self._skipped = self._skipped, 0
        tasks: Iterable[Any] = self._order.tasks(self._epoch, skipped)
        worker_of = self._order.worker_of
        if self._finish is not None:
            tasks, worker_of = self._finish.with_engine(tasks, worker_of)
        for _, result in self._workers.run(tasks, worker_of=worker_of):
            batch, report = result if self._finish is None else self._finish(result)
            for decoder in report.decoders:
                if not self.decoded[decoder] and decoder not in ("DALI", "PyAV"):
                    logger.warning("decoding a clip by %s; later ones are only counted", decoder)
                self.decoded[decoder] += 1
            self._bad.note(report.tried, report.failures, report.damaged)
            if report.gave_up:
                self._bad.stop(f"{TRIES} in a row, drawn at random")
            if batch is not None:
                yield batch
        counts = self.decoded - before
        if set(counts) - {"DALI", "PyAV"}:
            logger.warning("clips decoded by: %s", counted(counts))


def counted(decoded: Counter[str]) -> str:
    """ClipLoader.decoded as text, such as "DALI 24, PyAV (an image) 1"."""
    return ", ".join(f"{decoder} {count}" for decoder, count in decoded.most_common())


def _prefetched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Make the next batch in a thread while the last one is in use; in page-locked memory if there
    is a GPU, which speeds up copies to it."""
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


def _read_and_collate(
    batch_reader: BatchReader, task: Any, excluded: frozenset[int]
) -> tuple[Batch | None, Report]:
    """Make a whole batch, in a worker."""
    samples = batch_reader.read_batch(task, excluded)
    set_place(-1)  # an error from here on is not the fault of the last clip
    return collate(samples, batch_reader.reader.options)
