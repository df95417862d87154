"""Decode batches by DALI in the main process, and what DALI cannot decode by PyAV in workers.

Worker processes cannot use the main process's GPU, so they pass on encoded frames. A clip takes
one of three paths to its batch:

    worker process            main process                    second worker process
    (one of num_workers)                                      (started when first needed)

    ClipReader.read
      _encode_or_decode
        DALI can decode it:
          Encoded  ─────────► DecodeByDali
                                DaliDecoder.decode
                                  decoded: frames on its device
                                  failed: key, attempt ─────► read_sample, without DALI
                                                                ClipReader.read
                                  frames  ◄───────────────────    frames by PyAV
        DALI cannot:
          frames by PyAV ───►   copied to the device
                                Collate → batch, report

Both decoders give the same clips in the same order: the second worker repeats the failed attempt
with the same random numbers. Codecs and sizes that DALI only fails on are soon left to PyAV: each
task for a worker says which (`read_for_dali`).
"""

import logging
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipvip.data.loading.reader import BatchReader
from clipvip.data.loading.samples import Batch, Report, Sample, collate
from clipvip.data.loading.workers import Workers
from clipvip.data.video import DaliDecoder, Encoded, Engine
from clipvip.files import shown

logger = logging.getLogger(__name__)


EngineTask = tuple[Any, Engine | None]  # a task for BatchReader.read_batch, and DALI's engine


def read_for_dali(
    batch_reader: BatchReader, task: EngineTask, excluded: frozenset[int]
) -> list[Sample]:
    """Read a batch, in a worker, for the engine as it was when the task was given out."""
    batch, engine = task
    batch_reader.reader = replace(batch_reader.reader, engine=engine)
    return batch_reader.read_batch(batch, excluded)


class DecodeByDali:
    """Turn the samples of a batch from a worker into the batch, in the main process.

    name: description of a place for the log.
    """

    def __init__(
        self, batch_reader: BatchReader, engine: Engine, name: Callable[[int], str]
    ) -> None:
        self.options = batch_reader.reader.options
        self.decoder = DaliDecoder(
            self.options.image_size, engine, self.options.num_workers, self.options.resize
        )
        self._without_dali = copy(batch_reader)
        self._without_dali.reader = replace(batch_reader.reader, engine=None)
        self._name = name
        self._workers: Workers[tuple[Any, int], Sample] | None = None

    def with_engine(
        self, tasks: Iterable[Any], worker_of: Callable[[Any], int] | None
    ) -> tuple[Iterable[EngineTask], Callable[[EngineTask], int] | None]:
        """Make a BatchReader's tasks, and the choice of their workers, those of read_for_dali.
        Workers thus skip what DALI fails on in this process."""
        given = ((task, self.decoder.engine) for task in tasks)
        return given, worker_of and (lambda task: worker_of(task[0]))

    def __call__(self, samples: list[Sample]) -> tuple[Batch | None, Report]:
        with self.decoder.apart():
            batch, report = collate(self._decode(samples), self.options)
        for value in (batch or {}).values():
            if value.is_cuda:  # made on another stream than the one it is used on
                value.record_stream(torch.cuda.default_stream(value.device))
        return batch, report

    def _decode(self, samples: list[Sample]) -> list[Sample]:
        places = [i for i, sample in enumerate(samples) if isinstance(sample.frames, Encoded)]
        decoded = self.decoder.decode([samples[i].frames for i in places])  # type: ignore[misc]
        for i, frames in zip(places, decoded, strict=True):
            if isinstance(frames, str):
                samples[i] = self._decode_by_pyav(samples[i], frames)
            else:
                samples[i].hold(frames)
        if places:
            for sample in samples:
                if isinstance(sample.frames, Tensor):
                    sample.frames = sample.frames.to(self.decoder.device)
                if sample.image is not None:
                    sample.image = sample.image.to(self.decoder.device)
        return samples

    def _decode_by_pyav(self, sample: Sample, reason: str) -> Sample:
        """Read a sample again, in another process: a file that DALI fails on may crash PyAV too."""
        logger.log(
            logging.INFO if self._workers else logging.WARNING,
            "DALI could not decode %s: %s; PyAV decodes it",
            shown(self._name(sample.place)),
            shown(reason),
        )
        if self._workers is None:
            processes = min(self.options.num_workers, 1)
            self._workers = Workers(self._without_dali.read_sample, processes, self._name)
        ((_, again),) = self._workers.run([(sample.key, sample.attempt)])
        again.tried = sample.tried[:-1] + again.tried
        again.failures = sample.failures + again.failures
        again.decoder = "PyAV (DALI could not)"
        return again
