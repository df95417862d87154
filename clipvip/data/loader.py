"""Batches of clips: decoded in worker processes, packed, tokenised, exactly repeatable.

Order, frames and texts drawn are functions of (seed, epoch, place of the clip) alone, so
they are the same for any number of workers and after a resume. All ranks share one order:
a global batch is batch_size · world_size clips, of which rank r takes the r-th part.

A file that cannot be read is logged once, listed in `bad_files` and appended to
bad_files.jsonl. In training another clip, drawn by the seed, takes its place. In evaluation
nothing takes its place: the clip is left out of its batch (clip_index says which are there; a
batch of which nothing is left is not given). Either way, more than max_bad_share of the
distinct clips tried stops the run. A process that dies is replaced and its batches are made
again; a clip that two processes died of counts as unreadable.
"""

import html
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clipvip.data import workers
from clipvip.data.annotations import Clip
from clipvip.data.bad_files import BadFile, BadFiles, Failure, LoaderError
from clipvip.data.decode import DecodeError, Source, read_frames
from clipvip.data.sampling import check_sampling
from clipvip.data.workers import Workers

__all__ = ["Batch", "ClipLoader", "LoaderError", "build_loader", "tokenize"]

TASKS = ("retrieval", "omnisource", "video")
TRIES = 100  # clips tried in the place of an unreadable one

Batch = dict[str, Tensor]


def build_loader(
    clips: Sequence[Clip],
    *,
    tokenizer: Any,
    image_size: int,
    num_frames: int,
    text_length: int,
    task: str,
    batch_size: int,
    training: bool,
    seed: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool | None = None,
    max_bad_share: float = 0.05,
    bad_files: Path | None = None,
    sampling: str = "uniform",
) -> "ClipLoader":
    """A loader of one rank's batches; batch_size is per rank.

    tokenizer: a transformers CLIPTokenizer (None for task "video"). training: shuffle, jitter
    frames, draw one text a clip; else every clip once, in order, with all its texts.
    drop_last: leave out an uneven tail; as `training` unless given. bad_files: where to append
    unreadable files. sampling: see clipvip.data.sampling.

    A batch is a dict of CPU tensors:
    - pixel_values uint8 [F, 3, S, S], frames of B clips, packed; frame_offsets int32 [B+1],
      their running sum; clip_index int64 [B], places in `clips`.
    - task "retrieval": text_ids, text_mask int64 [n, len] and text_clip int64 [n], the place in
      `clips` that each text belongs to (in training n = B and text_clip = clip_index).
    - task "omnisource": subtitle_ids, subtitle_mask, caption_ids, caption_mask int64 [B, len];
      subtitle_present, caption_present, image_present bool [B]; image uint8 [B, 3, S, S], the
      annotated image or the clip's middle frame. Absent texts are tokenised as empty.
    - task "video": nothing more.
    """
    if task == "retrieval":
        without = next((clip for clip in clips if not clip.text), None)
        if without is not None:
            raise ValueError(f"line {without.line} ({without.video}) has no 'text' to retrieve by")
    reading = Reading(
        size=image_size,
        num_frames=num_frames,
        sampling=sampling,
        task=task,
        training=training,
        seed=seed,
    )
    order = _Batches(len(clips), batch_size, rank, world_size, training, seed, drop_last=drop_last)
    return ClipLoader(
        _FileBatches(clips, reading, Collate(tokenizer, text_length, task)),
        order,
        num_workers,
        BadFiles(len(clips), max_bad_share, bad_files),
        lambda place: f"{clips[place].video} (line {clips[place].line})",
    )


class Order(Protocol):
    """What is asked of the workers, a task a batch; `epoch` and `skipped` are of the next
    iteration, which sets skipped back to 0. lane: see Workers.run's worker_of."""

    epoch: int
    skipped: int
    lane: Callable[[Any], int] | None

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class ClipLoader:
    """Iterates over one epoch's batches of one rank."""

    def __init__(
        self,
        work: Callable[[Any, frozenset[int]], "tuple[Batch | None, Report]"],
        order: Order,
        num_workers: int,
        bad: BadFiles,
        name: Callable[[int], str],
    ) -> None:
        self.name = name
        self._order = order
        self._bad = bad
        self._workers: Workers[Any, Any] = Workers(work, num_workers, name)

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
        return _pinned(self._batches()) if torch.cuda.is_available() else self._batches()

    def _batches(self) -> Iterator[Batch]:
        for _, (batch, report) in self._workers.run(self._order, worker_of=self._order.lane):
            self._bad.note(report.tried, report.failures)
            if report.gave_up:
                self._bad.stop()
            if batch is not None:
                yield batch


def _pinned(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same in page-locked memory, copied there in a thread while the last one is in use."""

    def following() -> Batch | None:
        batch = next(batches, None)
        return batch and {key: value.pin_memory() for key, value in batch.items()}

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while (batch := coming.result()) is not None:
            coming = thread.submit(following)
            yield batch


def tokenize(tokenizer: Any, texts: Sequence[str], text_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [len(texts), longest], at most text_length with both specials.

    HTML entities are undone first, as CLIP's own tokenizer did.
    """
    tokens = tokenizer(
        [html.unescape(html.unescape(text)) for text in texts],
        padding=True,
        truncation=True,
        max_length=text_length,
        return_tensors="pt",
    )
    return tokens["input_ids"], tokens["attention_mask"]


def check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; expected 0 ≤ rank < world_size")


# --- order ----------------------------------------------------------------------------------


class _Batches:
    """One rank's batches of (epoch, place of the clip)."""

    lane: Callable[[Any], int] | None = None

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int,
        world_size: int,
        training: bool,
        seed: int,
        drop_last: bool | None,
    ) -> None:
        check_rank(rank, world_size)
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.stride = batch_size * world_size
        self.training = training
        self.seed = seed
        self.drop_last = training if drop_last is None else drop_last
        self.epoch = 0
        self.skipped = 0
        if count == 0 or (self.drop_last and count < self.stride):
            raise ValueError(
                f"{count} clips make no batch of {batch_size} on {world_size} ranks; "
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


@dataclass(slots=True)
class Sample:
    """What became of one place in the order; frames is None where nothing could be read."""

    place: int
    frames: Tensor | None = None
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    tried: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def failed(self, path: str, reason: str, line: int) -> None:
        self.failures.append(Failure(self.place, BadFile(path, reason, line)))


class Report(NamedTuple):
    """What workers tell the main process with a batch."""

    tried: list[int]
    failures: list[Failure]
    gave_up: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How clips become samples."""

    size: int
    num_frames: int
    sampling: str
    task: str
    training: bool
    seed: int

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        check_sampling(self.sampling)

    @property
    def tries(self) -> int:
        return TRIES if self.training else 1

    def read(
        self,
        sample: Sample,
        clip: Clip,
        generator: np.random.Generator,
        video: Source | None = None,
        image: Source | None = None,
    ) -> None:
        """Fills the sample. video, image: read instead of the clip's own files."""
        image = clip.image if image is None else image
        omnisource = self.task == "omnisource"
        sample.texts, sample.subtitle, sample.caption = clip.text, clip.subtitle, clip.caption
        if self.training and clip.text:
            sample.texts = (clip.text[int(generator.integers(len(clip.text)))],)
        frames = read_frames(
            clip.video if video is None else video,
            self.num_frames,
            size=self.size,
            start=clip.start,
            end=clip.end,
            sampling=self.sampling,
            generator=generator if self.training else None,
            with_middle=omnisource and image is None,
        )
        if omnisource and image is None:
            frames, sample.image = frames[:-1], frames[-1]
        elif omnisource and image is not None:
            sample.image = read_frames(image, 1, size=self.size)[0]
        sample.frames = frames


class _FileBatches:
    """Work: places of one batch, with their epoch, to (batch, report)."""

    def __init__(self, clips: Sequence[Clip], reading: Reading, collate: "Collate") -> None:
        self.clips = clips
        self.reading = reading
        self.collate = collate

    def __call__(
        self, task: list[tuple[int, int]], condemned: frozenset[int]
    ) -> tuple[Batch | None, Report]:
        return self.collate([self._sample(*key, condemned) for key in task])

    def _sample(self, epoch: int, place: int, condemned: frozenset[int]) -> Sample:
        sample, seed = Sample(place), self.reading.seed
        for attempt in range(self.reading.tries):
            generator = np.random.default_rng((seed, epoch, place, attempt))
            if attempt:
                sample.place = int(generator.integers(len(self.clips)))
            sample.tried.append(sample.place)
            clip = self.clips[sample.place]
            workers.at(sample.place)
            try:
                if sample.place in condemned:
                    raise DecodeError(clip.video, workers.CONDEMNED)
                self.reading.read(sample, clip, generator)
                break
            except DecodeError as error:
                sample.failed(str(error.path), error.reason, clip.line)
        return sample


class Collate:
    """Samples to (batch, report); the batch is None where none of them could be read."""

    def __init__(self, tokenizer: Any, text_length: int, task: str) -> None:
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.task = task

    def __call__(self, samples: list[Sample]) -> tuple[Batch | None, Report]:
        read = [sample for sample in samples if sample.frames is not None]
        report = Report(
            [place for sample in samples for place in sample.tried],
            [failure for sample in samples for failure in sample.failures],
            any(len(sample.failures) == TRIES for sample in samples),
        )
        return (self._pack(read) if read else None), report

    def _pack(self, samples: list[Sample]) -> Batch:
        frames = [sample.frames for sample in samples if sample.frames is not None]
        batch = {
            "pixel_values": torch.cat(frames),
            "frame_offsets": _offsets([len(part) for part in frames]),
            "clip_index": torch.tensor([sample.place for sample in samples]),
        }
        if self.task == "retrieval":
            texts = [text for sample in samples for text in sample.texts]
            owners = [sample.place for sample in samples for _ in sample.texts]
            batch["text_ids"], batch["text_mask"] = self._tokens(texts)
            batch["text_clip"] = torch.tensor(owners)
        elif self.task == "omnisource":
            for name in ("subtitle", "caption"):
                given = [getattr(sample, name) for sample in samples]
                ids, mask = self._tokens([text or "" for text in given])
                batch[f"{name}_ids"], batch[f"{name}_mask"] = ids, mask
                batch[f"{name}_present"] = torch.tensor([text is not None for text in given])
            images = [sample.image for sample in samples if sample.image is not None]
            batch["image"] = torch.stack(images)
            batch["image_present"] = torch.ones(len(samples), dtype=torch.bool)
        return batch

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return tokenize(self.tokenizer, texts, self.text_length)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
