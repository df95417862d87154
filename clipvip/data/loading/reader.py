"""Read the clips of a batch into samples; unreadable clips are replaced in training."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clipvip.data.annotations import Annotations, Clip
from clipvip.data.loading.bad_files import BadFile, Failure
from clipvip.data.loading.in_worker import check_not_excluded, report_progress, set_place
from clipvip.data.loading.order import ClipSources
from clipvip.data.loading.roles import is_only_frame, role_of_text
from clipvip.data.loading.samples import TRIES, LoaderOptions, Sample
from clipvip.data.video import (
    DecodeError,
    Encoded,
    Engine,
    Frames,
    Media,
    OpenClip,
    Refused,
    encode,
    is_image,
    open_clip,
    read_frames,
)


class BatchReader(Protocol):
    """Read the samples of a batch, in a worker process. A task identifies a batch. excluded: places
    of clips that must not be read, see Workers."""

    reader: "ClipReader"

    def read_batch(self, task: Any, excluded: frozenset[int]) -> list[Sample]: ...

    def read_sample(self, task: tuple[Any, int], excluded: frozenset[int]) -> Sample:
        """Read one sample of a batch again. task: its key, and the attempt to start with."""
        ...


@dataclass(frozen=True)
class ClipReader:
    """Read a clip's frames, image and texts into a sample.

    training: jitter the frames and draw one text. engine: where DALI decodes; None for PyAV.
    """

    options: LoaderOptions
    training: bool
    engine: Engine | None

    def attempts(self, first: int, *seed: int) -> Iterator[tuple[int, np.random.Generator]]:
        """Yield the number and the random generator of each attempt to fill a place of a batch."""
        for attempt in range(first, TRIES if self.training else 1):
            yield attempt, np.random.default_rng((self.options.seed, *seed, attempt))

    def read(
        self,
        sample: Sample,
        clip: Clip,
        video: Media,
        image: Media | None,
        generator: np.random.Generator,
    ) -> None:
        """Fill the sample. video, image: where the clip's are read.

        Raises DecodeError, whatever went wrong; the sample then has no frames.
        """
        sample.texts, sample.subtitle, sample.caption = clip.text, clip.subtitle, clip.caption
        compared, role = self.options.compared, None
        if self.options.task == "omnisource":
            role, sample.texts = role_of_text(clip, is_image(video), compared)
        if self.training and clip.text:
            sample.texts = (sample.texts[int(generator.integers(len(sample.texts)))],)
        if role is not None:
            setattr(sample, role, sample.texts[0])
        with_middle = False
        try:
            if self.options.task == "omnisource":
                with_middle = image is None
                if image is not None:
                    sample.image = self._read_image(image)[0]
            if is_image(video):
                frames = self._read_image(video)
                middle = frames[0] if with_middle else None
                if with_middle and is_only_frame(clip, True, image, compared):
                    frames = frames[:0]
                sample.hold(Frames(frames, middle))
                sample.times = (0.0,)
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
                decoded, decoder = self._encode_or_decode(opened)
                if opened.damage is not None:
                    sample.damaged.append(BadFile(str(opened.path), opened.damage, clip.line))
                if self.options.task == "video":
                    sample.times = tuple(opened.index.times[opened.chosen.frames].tolist())
            sample.hold(decoded)
            sample.decoder = decoder
        except DecodeError:
            raise
        except Exception as error:  # one clip never ends a run; a large share of clips does
            line = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
            raise DecodeError(clip.video, reason) from error

    def _read_image(self, image: Media) -> Tensor:
        return read_frames(image, 1, size=self.options.image_size, resize=self.options.resize)

    def _encode_or_decode(self, clip: OpenClip) -> tuple[Frames | Encoded, str]:
        """Encode a clip's frames for DALI, or decode them by PyAV if there is no engine or it
        cannot decode them. Return them with Sample.decoder."""
        decoder = "PyAV"
        if self.engine is not None:
            try:
                return encode(clip, self.engine), "DALI"
            except Exception as error:
                reason = error.reason if isinstance(error, Refused) else "packets cannot be cut out"
                decoder = f"PyAV ({reason})"
        return clip.decode(self.options.image_size, resize=self.options.resize), decoder


@dataclass
class FileBatchReader:
    """Read batches from files. A task is a list of (epoch or pass, place of the clip)."""

    clips: Sequence[Clip]
    reader: ClipReader

    def _alike(self, place: int) -> range:
        """Places of the clips by which a clip may be replaced: those of its source."""
        if not isinstance(self.clips, ClipSources):
            return range(len(self.clips))
        number = self.clips.number(place)
        return range(*self.clips.firsts[number : number + 2])

    def read_batch(self, task: list[tuple[int, int]], excluded: frozenset[int]) -> list[Sample]:
        return [self.read_sample((key, 0), excluded) for key in task]

    def read_sample(self, task: tuple[tuple[int, int], int], excluded: frozenset[int]) -> Sample:
        (epoch, place), first = task
        sample = Sample((epoch, place), place)
        for attempt, generator in self.reader.attempts(first, epoch, place):
            sample.attempt = attempt
            if attempt:
                alike = self._alike(place)
                sample.place = alike[int(generator.integers(len(alike)))]
            sample.tried.append(sample.place)
            clip = self.clips[sample.place]
            set_place(sample.place)
            try:
                check_not_excluded(sample.place, excluded, clip.video)
                self.reader.read(sample, clip, clip.video, clip.image, generator)
                break
            except DecodeError as error:
                file = BadFile(str(error.path), error.reason, clip.line)
                sample.failures.append(Failure(sample.place, file))
        return sample


def for_each_clip(
    clips: Annotations,
    places: Iterable[int],
    excluded: frozenset[int],
    work: Callable[[int, Clip], None],
) -> list[Failure]:
    """Call `work` with each place and clip, in a worker. Return those that raise DecodeError."""
    failures = []
    for place in places:
        set_place(place)
        clip = clips[place]
        try:
            check_not_excluded(place, excluded, clip.video)
            work(place, clip)
        except DecodeError as error:
            # The path in an error about bytes in memory is only a name.
            path = clip.image if error.path == clip.image else clip.video
            failures.append(Failure(place, BadFile(str(path), error.reason, clip.line)))
        report_progress(1)
    return failures


def names_of(clips: Sequence[Clip] | Annotations) -> Callable[[int], str]:
    """A function that describes a place of `clips` by its file and annotation line, for logs."""
    return lambda place: f"{clips[place].video} (line {clips[place].line})"


def some_files(clips: Annotations) -> list[Path]:
    """Return the annotations and the files of up to 100 clips, spread evenly."""
    places = np.linspace(0, len(clips) - 1, min(len(clips), 100), dtype=int).tolist()
    some = [clips[place] for place in places]
    images = [clip.image for clip in some if clip.image is not None]
    return [clips.path, *(clip.video for clip in some), *images]
