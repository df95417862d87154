"""The unit of work: clips in, a record per clip out.

`Reader` reads the pictures of clips and prepares the model's inputs; it runs in worker processes,
without the model's weights. `records` joins that with the model's answers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clipvip.captions.captioner import Answer, Picture, Preparer
from clipvip.captions.filters import fault_of, said
from clipvip.data.annotations import Annotations, Clip
from clipvip.data.loading import BadFile, BadFiles, Failure, check_not_excluded, set_place
from clipvip.data.video import DecodeError, Media, as_decode_errors, read_pictures

SIDE = 1280  # pixels: larger pictures are shrunk, as captioners read smaller ones
UNREADABLE = "unreadable"


class Record(NamedTuple):
    """The result of a clip.

    place: of the clip among the data. caption: None if it is filtered or the clip is unreadable.
    left_out: why there is no caption, see filters.fault_of; or "unreadable". said: what the model
    said instead, or why the clip is unreadable. cut: the caption reached the most tokens. file: a
    file that is unreadable or damaged.
    """

    place: int
    caption: str | None = None
    left_out: str | None = None
    said: str = ""
    cut: bool = False
    file: BadFile | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """A clip to be captioned. video, image: where its files are read. name: for messages."""

    place: int
    clip: Clip
    video: Media
    image: Media | None
    name: str


def given_of(place: int, clip: Clip) -> Given:
    """A clip of annotations."""
    return Given(place, clip, clip.video, clip.image, str(clip.image or clip.video))


class Prepared(NamedTuple):
    """Clips that were read. inputs: of the model; empty if no clip could be read. counts: pictures
    of each clip of `places`."""

    places: list[int]
    counts: list[int]
    inputs: dict[str, Any]
    failures: list[Failure]
    damaged: list[tuple[int, BadFile]]


@dataclass(frozen=True)
class Reader:
    """Read clips and prepare them. frames: number of frames per clip; a clip that has an annotated
    image is that image instead, as its caption is to be about it."""

    prepare: Preparer
    frames: int

    def __call__(self, clips: Iterable[Given], excluded: frozenset[int] = frozenset()) -> Prepared:
        """excluded: places that must not be read, see clipvip.data.loading.Workers."""
        failures: list[Failure] = []
        damaged: list[tuple[int, BadFile]] = []
        read: list[tuple[Given, Sequence[Picture]]] = []
        for given in clips:
            set_place(given.place)
            try:
                check_not_excluded(given.place, excluded, given.name)
                pictures, damage = self._read(given)
            except DecodeError as error:
                failures.append(_failure(given, error.reason))
                continue
            read.append((given, pictures))
            if damage is not None:
                damaged.append((given.place, BadFile(given.name, damage, given.clip.line)))
        set_place(-1)  # an error from here on is not the fault of the last clip
        inputs, read = self._prepare(read, failures)
        places = [given.place for given, _ in read]
        return Prepared(places, [len(each) for _, each in read], inputs, failures, damaged)

    def _read(self, given: Given) -> tuple[Sequence[Picture], str | None]:
        clip = given.clip
        if given.image is not None:
            with as_decode_errors(given.image):
                return read_pictures(given.image, side=SIDE)
        with as_decode_errors(given.video):
            return read_pictures(
                given.video, self.frames, start=clip.start, end=clip.end, side=SIDE
            )

    def _prepare(
        self, read: list[tuple[Given, Sequence[Picture]]], failures: list[Failure]
    ) -> tuple[dict[str, Any], list[tuple[Given, Sequence[Picture]]]]:
        """Prepare the clips together. A processor may refuse a picture, such as a very narrow one:
        each clip is then tried alone."""
        if not read:
            return {}, []
        try:
            return self.prepare([pictures for _, pictures in read]), read
        except Exception as error:
            kept = []
            for given, pictures in read:
                try:
                    self.prepare([pictures])
                    kept.append((given, pictures))
                except Exception as own:
                    reason = " ".join(f"{type(own).__name__}: {own}".split())[:200]
                    failures.append(_failure(given, f"the captioner's processor: {reason}"))
            if len(kept) == len(read):
                raise error
        return self._prepare(kept, failures)


def _failure(given: Given, reason: str) -> Failure:
    return Failure(given.place, BadFile(given.name, reason, given.clip.line))


def records(prepared: Prepared, answers: Sequence[Answer]) -> list[Record]:
    """Return one record per clip that was to be read."""
    damaged = dict(prepared.damaged)
    found = [
        Record(place, None, UNREADABLE, file.reason, file=file) for place, file in prepared.failures
    ]
    for place, answer in zip(prepared.places, answers, strict=True):
        text, file = said(answer.text), damaged.get(place)
        fault = fault_of(text)
        if fault is None:
            found.append(Record(place, text, cut=answer.cut, file=file))
        else:
            found.append(Record(place, None, fault, text, answer.cut, file))
    return found


def note_files(bad: BadFiles, found: Sequence[Record]) -> None:
    """List unreadable and damaged files. Raises LoaderError if too many clips are unreadable."""
    files = [(r.place, r.left_out == UNREADABLE, r.file) for r in found if r.file is not None]
    failures = [Failure(place, file) for place, unread, file in files if unread]
    damaged = [file for _, unread, file in files if not unread]
    bad.note([record.place for record in found], failures, damaged)


def read_batch(
    clips: Annotations, reader: Reader, places: Sequence[int], excluded: frozenset[int]
) -> Prepared:
    """Read clips of annotations by their places, in a worker."""
    return reader((given_of(place, clips[place]) for place in places), excluded)
