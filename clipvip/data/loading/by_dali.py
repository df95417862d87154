"""TODO."""

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipvip.data.loading.collate import Batch, Collate
from clipvip.data.loading.samples import Report, Sample, Work
from clipvip.data.loading.workers import Workers
from clipvip.data.video import DaliDecoder, Encoded
from clipvip.files import shown

logger = logging.getLogger(__name__)


class Encoding:
    """In a worker: a task to samples whose frames DALI is to decode."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, task: Any, condemned: frozenset[int]) -> list[Sample]:
        return self.work.samples(task, condemned)


class _Again:
    """In a worker: a sample that DALI could not decode, read by PyAV."""

    def __init__(self, work: Work) -> None:
        self.work = copy(work)
        self.work.reading = replace(work.reading, engine=None)

    def __call__(self, sample: tuple[Any, int], condemned: frozenset[int]) -> Sample:
        return self.work.sample(*sample, condemned)


class ByDali:
    """In the main process: encoded samples to a whole batch."""

    def __init__(
        self, work: Work, collate: "Collate", num_workers: int, name: Callable[[int], str]
    ) -> None:
        reading = work.reading
        assert reading.engine is not None
        self.collate = collate
        self.decoder = DaliDecoder(reading.size, reading.engine, num_workers, reading.resize)
        self._again = _Again(work)
        self._processes = min(num_workers, 1)
        self._name = name
        self._workers: Workers[Any, Sample] | None = None

    def __call__(self, samples: list[Sample]) -> tuple[Batch | None, Report]:
        with self.decoder.apart():
            batch, report = self.collate(self._decoded(samples))
        for value in (batch or {}).values():
            if value.is_cuda:  # made on another stream than it is used on
                value.record_stream(torch.cuda.default_stream(value.device))
        return batch, report

    def _decoded(self, samples: list[Sample]) -> list[Sample]:
        places = [i for i, sample in enumerate(samples) if isinstance(sample.frames, Encoded)]
        decoded = self.decoder.decode([samples[i].frames for i in places])  # type: ignore[misc]
        for i, frames in zip(places, decoded, strict=True):
            if isinstance(frames, str):
                samples[i] = self._read_again(samples[i], frames)
            else:
                samples[i].hold(frames)
        if places:
            for sample in samples:
                if isinstance(sample.frames, Tensor):
                    sample.frames = sample.frames.to(self.decoder.device)
                if sample.image is not None:
                    sample.image = sample.image.to(self.decoder.device)
        return samples

    def _read_again(self, sample: Sample, reason: str) -> Sample:
        """By PyAV, in a process of its own: what DALI stumbles over may break more than DALI."""
        level = logging.INFO if self._workers else logging.WARNING
        logger.log(
            level, "DALI could not decode %s: %s", shown(self._name(sample.place)), shown(reason)
        )
        if self._workers is None:
            self._workers = Workers(self._again, self._processes, self._name)
        ((_, again),) = self._workers.run([(sample.key, sample.attempt)])
        again.tried = sample.tried[:-1] + again.tried
        again.failures = sample.failures + again.failures
        again.decoder = "PyAV (DALI could not)"
        return again
