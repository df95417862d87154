"""Read clips into samples, one batch at a time; unreadable clips are replaced in training."""

import traceback
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from clipvip.data.annotations import Annotations, Clip
from clipvip.data.loading.bad_files import BadFile
from clipvip.data.loading.by_dali import encode_or_decode
from clipvip.data.loading.in_worker import check_not_excluded, set_place
from clipvip.data.loading.options import LoaderOptions
from clipvip.data.loading.samples import TRIES, Sample
from clipvip.data.video import DecodeError, Engine, Frames, Media, is_image, open_clip, read_frames


class BatchReader(Protocol):
    """Read the samples of a batch, in a worker process.

    A task identifies a batch. excluded: places of clips that must not be read, see Workers.
    """

    reader: "ClipReader"

    def read_batch(self, task: Any, excluded: frozenset[int]) -> list[Sample]: ...

    def read_sample(self, task: tuple[Any, int], excluded: frozenset[int]) -> Sample:
        """Read one sample of a batch again. task: its key, and the attempt to start with."""
        ...


_BatchReader = TypeVar("_BatchReader", bound=BatchReader)


def without_dali(batch_reader: _BatchReader) -> _BatchReader:
    """A batch reader that reads the same clips and frames by PyAV alone."""
    copied = copy(batch_reader)
    copied.reader = replace(batch_reader.reader, engine=None)
    return copied


@dataclass(frozen=True)
class ClipReader:
    """Read a clip's frames, image and texts into a sample.

    training: jitter the frames and draw one text. engine: where DALI decodes; None for PyAV.
    """

    options: LoaderOptions
    training: bool
    engine: Engine | None

    @property
    def tries(self) -> int:
        """Number of clips to try for each place of a batch."""
        return TRIES if self.training else 1

    def read(
        self,
        sample: Sample,
        clip: Clip,
        generator: np.random.Generator,
        video: Media | None = None,
        image: Media | None = None,
    ) -> None:
        """Fill the sample. video, image: read instead of the clip's own files.

        Raises DecodeError, whatever went wrong; the sample then has no frames.
        """
        video = clip.video if video is None else video
        image = clip.image if image is None else image
        with_image = self.options.task == "omnisource"
        sample.texts, sample.subtitle, sample.caption = clip.text, clip.subtitle, clip.caption
        if self.training and clip.text:
            sample.texts = (clip.text[int(generator.integers(len(clip.text)))],)
        try:
            if with_image and image is not None:
                sample.image = self._read_image(image)[0]
            self._read_frames(sample, clip, video, generator, with_image and image is None)
        except DecodeError:
            raise
        except Exception as error:  # one clip never ends a run; a large share of clips does
            line = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
            raise DecodeError(clip.video, reason) from error

    def _read_image(self, image: Media) -> Any:
        return read_frames(image, 1, size=self.options.image_size, resize=self.options.resize)

    def _read_frames(
        self,
        sample: Sample,
        clip: Clip,
        video: Media,
        generator: np.random.Generator,
        with_middle: bool,
    ) -> None:
        if is_image(video):
            frames = self._read_image(video)
            sample.hold(Frames(frames, frames[0] if with_middle else None))
            sample.decoder = "PyAV" if self.engine is None else "PyAV (an image)"
            return
        with open_clip(
            video,
            self.options.num_frames,
            start=clip.start,
            end=clip.end,
            sampling=self.options.sampling,
            generator=generator if self.training else None,
            with_middle=with_middle,
        ) as opened:
            decoded, decoder = encode_or_decode(opened, self.engine, self.options)
            damage = opened.damage
        if damage is not None:
            sample.damaged.append(BadFile(str(opened.path), damage, clip.line))
        sample.hold(decoded)
        sample.decoder = decoder


class FileBatchReader:
    """Read batches from files. A task is a list of (epoch, place of the clip)."""

    def __init__(self, clips: Sequence[Clip], reader: ClipReader) -> None:
        self.clips = clips
        self.reader = reader

    def read_batch(self, task: list[tuple[int, int]], excluded: frozenset[int]) -> list[Sample]:
        return [self.read_sample((key, 0), excluded) for key in task]

    def read_sample(self, task: tuple[tuple[int, int], int], excluded: frozenset[int]) -> Sample:
        key, first = task
        epoch, place = key
        sample = Sample(key, place)
        for attempt in range(first, self.reader.tries):
            generator = np.random.default_rng((self.reader.options.seed, epoch, place, attempt))
            sample.attempt = attempt
            if attempt:
                sample.place = int(generator.integers(len(self.clips)))
            sample.tried.append(sample.place)
            clip = self.clips[sample.place]
            set_place(sample.place)
            try:
                check_not_excluded(sample.place, excluded, clip.video)
                self.reader.read(sample, clip, generator)
                break
            except DecodeError as error:
                sample.add_failure(str(error.path), error.reason, clip.line)
        return sample


def names_of(clips: Sequence[Clip] | Annotations) -> Callable[[int], str]:
    """A function that describes a place of `clips` by its file and annotation line, for logs."""
    return lambda place: f"{clips[place].video} (line {clips[place].line})"
