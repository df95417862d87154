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

With DALI (see clipvip.data.dali) the processes pass on encoded frames, and the main process has a
batch decoded while the last is in use. What DALI turns out not to decode is read again by PyAV, as
if DALI had never been, so both decoders give the same clips in the same order.
"""

import html
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clipvip.data import workers
from clipvip.data.annotations import Clip
from clipvip.data.bad_files import BadFile, BadFiles, Failure, LoaderError
from clipvip.data.container import DecodeError, Source, is_image
from clipvip.data.dali import DaliDecoder, Encoded, Engine, Refused, encode, start_engine
from clipvip.data.decode import OpenClip, open_clip, read_frames
from clipvip.data.sampling import check_sampling
from clipvip.data.workers import Workers
from clipvip.files import shown
from clipvip.ops.resize_crop import check_resize

__all__ = ["Batch", "ClipLoader", "LoaderError", "build_loader", "tokenize"]

logger = logging.getLogger(__name__)

TASKS = ("retrieval", "omnisource", "video")
TRIES = 100  # clips tried in the place of an unreadable one
LONGEST = 20_000  # characters: a text of megabytes would take seconds for each, and much memory

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
    resize: str = "crop",
    decoder: str = "pyav",
) -> "ClipLoader":
    """A loader of one rank's batches; batch_size is per rank.

    tokenizer: a transformers CLIPTokenizer (None for task "video"). training: shuffle, jitter
    frames, draw one text per clip; else every clip once, in order, with all its texts.
    drop_last: leave out an uneven tail; as `training` unless given. bad_files: where to append
    unreadable files. sampling: see clipvip.data.sampling. resize: see clipvip.ops.resize_crop.
    decoder: "pyav", "dali", or "auto" for DALI where there is a GPU on which it starts; clips,
    frames and order are the same.

    A batch is a dict of CPU tensors (what DALI decodes on a GPU is there already):
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
            named = f"line {without.line} ({shown(without.video)})"
            raise ValueError(f"{named} has no 'text' to retrieve by")
    reading = Reading(
        size=image_size,
        num_frames=num_frames,
        sampling=sampling,
        resize=resize,
        task=task,
        training=training,
        seed=seed,
        engine=start_engine(decoder),
    )
    order = _Batches(len(clips), batch_size, rank, world_size, training, seed, drop_last=drop_last)
    return ClipLoader(
        FileBatches(clips, reading),
        Collate(tokenizer, text_length, task),
        order,
        num_workers,
        BadFiles(len(clips), max_bad_share, bad_files),
        lambda place: f"{clips[place].video} (line {clips[place].line})",
    )


class Order(Protocol):
    """Tasks for the workers, one per batch; `epoch` and `skipped` apply to the next iteration,
    which sets skipped back to 0. lane: see Workers.run's worker_of."""

    epoch: int
    skipped: int
    lane: Callable[[Any], int] | None

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class Work(Protocol):
    """What the workers do, a batch a task."""

    reading: "Reading"

    def samples(self, task: Any, condemned: frozenset[int]) -> "list[Sample]": ...

    def sample(self, key: Any, first: int, condemned: frozenset[int]) -> "Sample":
        """One of them anew by its key, from its attempt `first` on."""
        ...


class ClipLoader:
    """Iterates over one epoch's batches of one rank.

    decoded: how many clips were decoded by "DALI" and by "PyAV"; where DALI was to do it, "PyAV
    (why not DALI)".
    """

    def __init__(
        self,
        work: Work,
        collate: "Collate",
        order: Order,
        num_workers: int,
        bad: BadFiles,
        name: Callable[[int], str],
    ) -> None:
        self.name = name
        self.decoded: Counter[str] = Counter()
        self._order = order
        self._bad = bad
        self._finish: _ByDali | None = None
        in_workers: Callable[[Any, frozenset[int]], Any] = _ByPyAV(work, collate)
        if work.reading.engine is not None:
            in_workers = _Encoding(work)
            self._finish = _ByDali(work, collate, num_workers, name)
        self._workers: Workers[Any, Any] = Workers(in_workers, num_workers, name)

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


def tokenize(tokenizer: Any, texts: Sequence[str], text_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [len(texts), longest], at most text_length with both specials.

    HTML entities are undone first, as CLIP's own tokenizer did. No more than a text's first
    20,000 characters are looked at.
    """
    tokens = tokenizer(
        [html.unescape(html.unescape(text[:LONGEST])) for text in texts],
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
    """What became of one place in the order; frames is None where nothing could be read.

    key: what Work.sample makes it of; attempt: which of its tries this is. middle: its last frame
    is the image still.
    """

    key: Any
    place: int
    attempt: int = 0
    frames: Tensor | Encoded | None = None
    image: Tensor | None = None
    middle: bool = False
    texts: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    decoder: str = "PyAV"
    tried: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    damaged: list[BadFile] = field(default_factory=list)

    def failed(self, path: str, reason: str, line: int) -> None:
        self.failures.append(Failure(self.place, BadFile(path, reason, line)))


class Report(NamedTuple):
    """What workers tell the main process with a batch."""

    tried: list[int]
    failures: list[Failure]
    damaged: list[BadFile]
    decoders: list[str]
    gave_up: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How clips become samples. engine: of DALI, to decode them; None for PyAV."""

    size: int
    num_frames: int
    sampling: str
    resize: str = "crop"
    task: str
    training: bool
    seed: int
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        check_sampling(self.sampling)
        check_resize(self.resize)

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
        """Fills the sample. video, image: read instead of the clip's own files.

        Raises DecodeError, whatever it was that went wrong; the sample then has no frames.
        """
        image = clip.image if image is None else image
        omnisource = self.task == "omnisource"
        sample.texts, sample.subtitle, sample.caption = clip.text, clip.subtitle, clip.caption
        if self.training and clip.text:
            sample.texts = (clip.text[int(generator.integers(len(clip.text)))],)
        sample.middle = omnisource and image is None
        try:
            if omnisource and image is not None:
                sample.image = read_frames(image, 1, size=self.size, resize=self.resize)[0]
            self._read_frames(sample, clip, clip.video if video is None else video, generator)
        except DecodeError:
            raise
        except Exception as error:  # one clip never ends a run; if all fail so, their share does
            line = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
            raise DecodeError(clip.video, reason) from error

    def _read_frames(
        self, sample: Sample, clip: Clip, video: Source, generator: np.random.Generator
    ) -> None:
        settings: dict[str, Any] = {
            "start": clip.start,
            "end": clip.end,
            "sampling": self.sampling,
            "generator": generator if self.training else None,
            "with_middle": sample.middle,
        }
        if is_image(video):
            squares: dict[str, Any] = {"size": self.size, "resize": self.resize}
            sample.frames = read_frames(video, self.num_frames, **squares, **settings)
            sample.decoder = "PyAV" if self.engine is None else "PyAV (an image)"
            return
        with open_clip(video, self.num_frames, **settings) as opened:
            frames, decoder = self._decode(opened)
            damage = opened.damage
        if damage is not None:
            sample.damaged.append(BadFile(str(opened.path), damage, clip.line))
        sample.frames, sample.decoder = frames, decoder

    def _decode(self, opened: OpenClip) -> tuple[Tensor | Encoded, str]:
        decoder = "PyAV"
        if self.engine is not None:
            try:
                return encode(opened, self.engine), "DALI"
            except Exception as error:
                reason = "packets cannot be cut out"
                decoder = f"PyAV ({error.reason if isinstance(error, Refused) else reason})"
        return opened.decode(self.size, resize=self.resize), decoder


class FileBatches:
    """Work on files: places of one batch, with their epoch, to samples."""

    def __init__(self, clips: Sequence[Clip], reading: Reading) -> None:
        self.clips = clips
        self.reading = reading

    def samples(self, task: list[tuple[int, int]], condemned: frozenset[int]) -> list[Sample]:
        return [self.sample(key, 0, condemned) for key in task]

    def sample(self, key: tuple[int, int], first: int, condemned: frozenset[int]) -> Sample:
        epoch, place = key
        sample, seed = Sample(key, place), self.reading.seed
        for attempt in range(first, self.reading.tries):
            generator = np.random.default_rng((seed, epoch, place, attempt))
            sample.attempt = attempt
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


class _ByPyAV:
    """In a worker: a task to a whole batch."""

    def __init__(self, work: Work, collate: "Collate") -> None:
        self.work = work
        self.collate = collate

    def __call__(self, task: Any, condemned: frozenset[int]) -> tuple[Batch | None, Report]:
        samples = self.work.samples(task, condemned)
        workers.at(-1)  # what goes wrong from here on says nothing of the last clip
        return self.collate(samples)


class _Encoding:
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


class _ByDali:
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
                samples[i].frames = frames
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
            [file for sample in samples for file in sample.damaged],
            [sample.decoder for sample in read],
            any(len(sample.failures) == TRIES for sample in samples),
        )
        return (self._pack(read) if read else None), report

    def _pack(self, samples: list[Sample]) -> Batch:
        frames = []
        for sample in samples:
            assert isinstance(sample.frames, Tensor)
            if sample.middle:
                sample.frames, sample.image = sample.frames[:-1], sample.frames[-1]
            frames.append(sample.frames)
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
