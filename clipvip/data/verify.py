"""Verify annotations: decode the first, middle and last frame of every clip."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipvip.data.annotations import Annotations, write_annotations
from clipvip.data.loading import (
    BadFile,
    Failure,
    Workers,
    check_not_excluded,
    names_of,
    report_progress,
    set_place,
    worker_count,
)
from clipvip.data.video import DecodeError, check_decodes
from clipvip.terminal import progress

CLIPS_PER_TASK = 16


class Verified(NamedTuple):
    """The number of clips verified, and the files that cannot be read."""

    clips: int
    bad: list[BadFile]


def verify_files(
    annotations: Path, clean: Path | None = None, *, num_workers: int | None = None
) -> Verified:
    """Decode the first, middle and last frame of every clip, and its image.

    clean: file to write the annotations of the readable clips to.
    """
    clips = Annotations(annotations)
    kept = np.ones(len(clips), np.bool_)
    bad: list[BadFile] = []
    with progress(f"verifying {len(clips)} clips", len(clips)) as done:
        workers: Workers[range, list[Failure]] = Workers(
            partial(_verify, clips), worker_count(num_workers, len(clips)), names_of(clips), done
        )
        places = range(len(clips))
        tasks = (places[i : i + CLIPS_PER_TASK] for i in places[::CLIPS_PER_TASK])
        for _, failures in workers.run(tasks):
            bad += [failure.file for failure in failures]
            kept[[failure.place for failure in failures]] = False
    if clean is not None:
        write_annotations(clean, (clips[int(place)] for place in np.flatnonzero(kept)))
    return Verified(len(clips), bad)


def _verify(clips: Annotations, places: range, excluded: frozenset[int]) -> list[Failure]:
    """Return those of the clips at some places that cannot be read."""
    failures = []
    for place in places:
        set_place(place)
        clip = clips[place]
        try:
            check_not_excluded(place, excluded, clip.video)
            check_decodes(clip.video, clip.image, clip.start, clip.end)
        except DecodeError as error:
            failures.append(Failure(place, BadFile(str(error.path), error.reason, clip.line)))
        report_progress(1)
    return failures
