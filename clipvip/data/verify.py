"""Verification of annotations: the first, middle and last frame of every clip."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipvip.data.annotations import Annotations, write_annotations
from clipvip.data.loading import BadFile, Failure, Workers, cores, workers
from clipvip.data.video import DecodeError, check_decodes
from clipvip.files import shown
from clipvip.progress import progress


class Verified(NamedTuple):
    clips: int
    bad: list[BadFile]


def verify_files(
    annotations: Path, clean: Path | None = None, *, num_workers: int | None = None
) -> Verified:
    """Decode the first, middle and last frame of every clip, and its image; write the
    annotations of those that can be to `clean`."""
    clips = Annotations(annotations)
    kept = np.ones(len(clips), np.bool_)
    bad: list[BadFile] = []
    with progress(f"verifying {len(clips)} clips", len(clips)) as done:
        crew: Workers[range, list[Failure]] = Workers(
            _FileVerifier(clips),
            min(cores(num_workers), len(clips)),
            lambda place: f"{shown(clips[place].video)} (line {clips[place].line})",
            done,
        )
        tasks = (range(i, min(i + 16, len(clips))) for i in range(0, len(clips), 16))
        for _, failures in crew.run(tasks):
            bad += [failure.file for failure in failures]
            kept[[failure.place for failure in failures]] = False
    if clean is not None:
        write_annotations(clean, (clips[int(place)] for place in np.flatnonzero(kept)))
    return Verified(len(clips), bad)


class _FileVerifier:
    """Find the places whose clips cannot be read."""

    def __init__(self, clips: Annotations) -> None:
        self.clips = clips

    def __call__(self, places: range, condemned: frozenset[int]) -> list[Failure]:
        failures = []
        for place in places:
            workers.at(place)
            clip = self.clips[place]
            try:
                if place in condemned:
                    raise DecodeError(clip.video, workers.CONDEMNED)
                check_decodes(clip.video, clip.image, clip.start, clip.end)
            except DecodeError as error:
                failures.append(Failure(place, BadFile(str(error.path), error.reason, clip.line)))
            workers.tell(1)
        return failures
