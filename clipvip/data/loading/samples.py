"""TODO."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from clipvip.data.annotations import Clip
from clipvip.data.loading import workers
from clipvip.data.loading.bad_files import BadFile, Failure
from clipvip.data.video import (
    DecodeError,
    Encoded,
    Engine,
    Frames,
    Media,
    OpenClip,
    Refused,
    check_sampling,
    encode,
    is_image,
    open_clip,
    read_frames,
)
from clipvip.ops.resize_crop import check_resize

TASKS = ("retrieval", "omnisource", "video")


TRIES = 100  # clips tried in the place of an unreadable one


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


@dataclass(slots=True)
class Sample:
    """What became of one place in the order; frames is None where nothing could be read.

    key: what Work.sample makes it of; attempt: which of its tries this is. image: the annotated
    image, or the clip's middle frame.
    """

    key: Any
    place: int
    attempt: int = 0
    frames: Tensor | Encoded | None = None
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    decoder: str = "PyAV"
    tried: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    damaged: list[BadFile] = field(default_factory=list)

    def hold(self, decoded: Frames | Encoded) -> None:
        """Hold the clip's frames, and its middle frame, if given, as the image."""
        if isinstance(decoded, Encoded):
            self.frames = decoded
            return
        self.frames = decoded.frames
        if decoded.middle is not None:
            self.image = decoded.middle

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
        video: Media | None = None,
        image: Media | None = None,
    ) -> None:
        """Fills the sample. video, image: read instead of the clip's own files.

        Raises DecodeError, whatever it was that went wrong; the sample then has no frames.
        """
        image = clip.image if image is None else image
        omnisource = self.task == "omnisource"
        sample.texts, sample.subtitle, sample.caption = clip.text, clip.subtitle, clip.caption
        if self.training and clip.text:
            sample.texts = (clip.text[int(generator.integers(len(clip.text)))],)
        try:
            if omnisource and image is not None:
                sample.image = read_frames(image, 1, size=self.size, resize=self.resize)[0]
            with_middle = omnisource and image is None
            video = clip.video if video is None else video
            self._read_frames(sample, clip, video, generator, with_middle)
        except DecodeError:
            raise
        except Exception as error:  # one clip never ends a run; if all fail so, their share does
            line = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
            raise DecodeError(clip.video, reason) from error

    def _read_frames(
        self,
        sample: Sample,
        clip: Clip,
        video: Media,
        generator: np.random.Generator,
        with_middle: bool,
    ) -> None:
        if is_image(video):
            frames = read_frames(video, 1, size=self.size, resize=self.resize)
            sample.hold(Frames(frames, frames[0] if with_middle else None))
            sample.decoder = "PyAV" if self.engine is None else "PyAV (an image)"
            return
        with open_clip(
            video,
            self.num_frames,
            start=clip.start,
            end=clip.end,
            sampling=self.sampling,
            generator=generator if self.training else None,
            with_middle=with_middle,
        ) as opened:
            decoded, decoder = self._decode(opened)
            damage = opened.damage
        if damage is not None:
            sample.damaged.append(BadFile(str(opened.path), damage, clip.line))
        sample.hold(decoded)
        sample.decoder = decoder

    def _decode(self, opened: OpenClip) -> tuple[Frames | Encoded, str]:
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
