"""Batches of clips: decoded in worker processes, packed, tokenised, exactly repeatable.

Order, frames and texts drawn are functions of (seed, epoch, place of the clip) alone, so
they are the same for any number of workers and after a resume. All ranks share one order:
a global batch is batch_size · world_size clips, of which rank r takes the r-th part.

A file that cannot be read is logged once, listed in `bad_files` and appended to
bad_files.jsonl. In training another clip, drawn by the seed, takes its place. In evaluation
nothing takes its place: the clip is left out of its batch (clip_index says which are there; a
batch of which nothing is left is not given). Either way, more than max_bad_share of the
distinct clips tried stops the run.
"""

import fcntl
import html
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from clipvip.data.annotations import Clip
from clipvip.data.decode import DecodeError, read_frames
from clipvip.data.sampling import check_sampling

logger = logging.getLogger(__name__)

TASKS = ("retrieval", "omnisource", "video")
TRIES = 100  # clips tried in the place of an unreadable one
COUNTED_FROM = 100  # distinct clips tried before their share of bad ones means anything
TIMEOUT = 900  # seconds without a batch after which a worker counts as stuck

Batch = dict[str, Tensor]


class LoaderError(RuntimeError):
    """Data cannot be had: too many bad files, or a worker died."""


class BadFile(NamedTuple):
    """A file that could not be read, why, and the annotation line that names it."""

    path: str
    reason: str
    line: int


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
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; expected 0 ≤ rank < world_size")
    check_sampling(sampling)
    if task == "retrieval":
        without = next((clip for clip in clips if not clip.text), None)
        if without is not None:
            raise ValueError(f"line {without.line} ({without.video}) has no 'text' to retrieve by")
    order = _Batches(len(clips), batch_size, rank, world_size, training, seed, drop_last=drop_last)
    dataset = _Clips(
        clips,
        size=image_size,
        num_frames=num_frames,
        sampling=sampling,
        task=task,
        training=training,
        seed=seed,
        decoding=torch.full((max(num_workers, 1),), -1).share_memory_(),
    )
    collate = _Collate(tokenizer, text_length, task)
    return ClipLoader(dataset, order, collate, num_workers, max_bad_share, bad_files)


class ClipLoader:
    """Iterates over one epoch's batches of one rank. `bad_files`: what could not be read."""

    def __init__(
        self,
        dataset: "_Clips",
        order: "_Batches",
        collate: "_Collate",
        num_workers: int,
        max_bad_share: float,
        bad_files: Path | None,
    ) -> None:
        self.bad_files: list[BadFile] = []
        self._clips = dataset.clips
        self._decoding = dataset.decoding
        self._order = order
        self._max_bad_share = max_bad_share
        self._file = bad_files
        self._paths: set[str] = set()
        self._tried: set[int] = set()
        self._bad: set[int] = set()
        self._batches: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
            timeout=TIMEOUT if num_workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the process's own random state alone
        )

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
        batches = iter(self._batches)
        while True:
            try:
                batch, report = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader"):
                    raise
                raise LoaderError(self._what_died(error)) from error
            self._note(report)
            if batch is not None:
                yield batch

    def _what_died(self, error: RuntimeError) -> str:
        paths = [str(self._clips[place].video) for place in self._decoding.tolist() if place >= 0]
        return (
            f"{error} The workers were last decoding: {', '.join(paths) or 'nothing yet'}. "
            "If memory ran out, use fewer workers or smaller batches; "
            "if a file crashes the decoder, take it out of the annotations."
        )

    def _note(self, report: "_Report") -> None:
        self._tried.update(report.tried)
        for place, path, reason in report.failures:
            self._bad.add(place)
            if path not in self._paths:
                self._paths.add(path)
                bad = BadFile(path, reason, self._clips[place].line)
                self.bad_files.append(bad)
                logger.warning("left out %s: %s", path, reason)
                if self._file is not None:
                    _append(self._file, bad)
        tried, bad_count = len(self._tried), len(self._bad)
        enough = tried >= min(COUNTED_FROM, len(self._clips)) or report.gave_up
        if enough and (bad_count > self._max_bad_share * tried or report.gave_up):
            last = self.bad_files[-1]
            raise LoaderError(
                f"{bad_count} of {tried} clips tried could not be read "
                f"({bad_count / tried:.1%}, allowed {self._max_bad_share:.1%}); "
                f"the last: {last.path}: {last.reason}"
            )


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


# --- order ----------------------------------------------------------------------------------


class _Batches(Sampler[list[tuple[int, int]]]):
    """One rank's batches of (epoch, place of the clip)."""

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
class _Sample:
    """What became of one place in the order; frames is None where nothing could be read."""

    place: int
    frames: Tensor | None = None
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    tried: list[int] = field(default_factory=list)
    failures: list[tuple[int, str, str]] = field(default_factory=list)


class _Report(NamedTuple):
    """What workers tell the main process with a batch: places, and (place, path, reason)."""

    tried: list[int]
    failures: list[tuple[int, str, str]]
    gave_up: bool


class _Clips(Dataset[_Sample]):
    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        size: int,
        num_frames: int,
        sampling: str,
        task: str,
        training: bool,
        seed: int,
        decoding: Tensor,
    ) -> None:
        self.clips = clips
        self.size = size
        self.num_frames = num_frames
        self.sampling = sampling
        self.task = task
        self.training = training
        self.seed = seed
        self.decoding = decoding  # shared: the place that each worker is at

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, place = key
        sample = _Sample(place)
        for attempt in range(TRIES if self.training else 1):
            generator = np.random.default_rng((self.seed, epoch, place, attempt))
            if attempt:
                sample.place = int(generator.integers(len(self.clips)))
            sample.tried.append(sample.place)
            try:
                self._read(sample, generator)
                break
            except DecodeError as error:
                sample.failures.append((sample.place, str(error.path), error.reason))
        return sample

    def _read(self, sample: _Sample, generator: np.random.Generator) -> None:
        worker = get_worker_info()
        self.decoding[worker.id if worker else 0] = sample.place
        clip = self.clips[sample.place]
        omnisource = self.task == "omnisource"
        sample.texts, sample.subtitle, sample.caption = clip.text, clip.subtitle, clip.caption
        if self.training and clip.text:
            sample.texts = (clip.text[int(generator.integers(len(clip.text)))],)
        frames = read_frames(
            clip.video,
            self.num_frames,
            size=self.size,
            start=clip.start,
            end=clip.end,
            sampling=self.sampling,
            generator=generator if self.training else None,
            with_middle=omnisource and clip.image is None,
        )
        if omnisource and clip.image is None:
            frames, sample.image = frames[:-1], frames[-1]
        elif omnisource and clip.image is not None:
            sample.image = read_frames(clip.image, 1, size=self.size)[0]
        sample.frames = frames


class _Collate:
    """Samples to (batch, report); the batch is None where none of them could be read."""

    def __init__(self, tokenizer: Any, text_length: int, task: str) -> None:
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.task = task

    def __call__(self, samples: list[_Sample]) -> tuple[Batch | None, _Report]:
        read = [sample for sample in samples if sample.frames is not None]
        report = _Report(
            [place for sample in samples for place in sample.tried],
            [failure for sample in samples for failure in sample.failures],
            any(len(sample.failures) == TRIES for sample in samples),
        )
        return (self._pack(read) if read else None), report

    def _pack(self, samples: list[_Sample]) -> Batch:
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


def _start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough


# --- the list of bad files ------------------------------------------------------------------


def _append(path: Path, bad: BadFile) -> None:
    """One line, unless the file names that path already, as another rank or an earlier run may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole, _, cut = file.read().rpartition("\n")
        if any(json.loads(line)["path"] == bad.path for line in whole.splitlines()):
            return
        # A run killed while writing leaves part of a line.
        file.write(("\n" if cut else "") + json.dumps(bad._asdict(), ensure_ascii=False) + "\n")
