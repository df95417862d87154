"""Write a caption for each moment of an index that has none.

Captions are put into the index at least once a minute, so that a command which was killed resumes
there. Files are taken in random order, and what has a caption is asked again for every ROUND of
moments. So several commands may work on one index at once, and share it.

An index may come from a stranger and name any file. So a file is opened only if it has the name of
a video or image, and the size and modification time that the index knows.
"""

import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipvip.captioning import BEAMS, caption_clips, load_for_captioning
from clipvip.data.annotations import Clip
from clipvip.data.loading import BadFile, worker_count
from clipvip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from clipvip.embedding import autocast
from clipvip.files import shown
from clipvip.index.build import bad_lines, state_of
from clipvip.index.captions import key_of
from clipvip.index.rows import FileState, Moment
from clipvip.index.store import Store
from clipvip.terminal import progress

SAVE_SECONDS = 60.0  # least time between two saves
TIDY_SAVES = 30  # saves between which the table of captions is compacted, and its keys sorted
ROUND = 2048  # moments that are read together, or those of one longer file

# Reads clips, and yields batches of captions, by the place of the clip in the sequence. A file of
# which clips cannot be read is added to the list, and these clips are left out.
Captioner = Callable[[Sequence[Clip], list[BadFile]], Iterable[Mapping[int, str]]]


class Described(NamedTuple):
    """What was done. written: captions that were put. kept: those that the index had already.

    empty: moments for which the model wrote nothing; they stay as they were.
    bad_files: {"path", "reason"} of each file with moments that cannot be read.
    """

    written: int
    kept: int
    empty: int
    bad_files: list[dict[str, str]]


def describe_index(
    store: Store,
    model: str | Path,
    *,
    overwrite: bool = False,
    beams: int = BEAMS,
    length: int | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    decoder: str = "auto",
    device: str | torch.device | None = None,
    mixed_precision: str = "auto",
    show: Callable[[int], None] | None = None,
) -> Described:
    """Put a caption that a model writes into an index, for each moment that has none.

    model: folder or hub name of a model with a decoder (clipvip.captioning.load_for_captioning).
    beams, length: see clipvip.captioning.caption_clips. batch_size: moments per batch.
    num_workers: number of decoding processes; by default one per core.
    decoder: see clipvip.data.loading.LoaderOptions. device: by default a CUDA GPU, if there is one.
    mixed_precision: see clipvip.embedding.precision_on.
    store, overwrite, show, and what is returned and raised: see describe_moments. Raises ValueError
        also for a model without a decoder.
    """
    network: Any
    network, processor = load_for_captioning(model)
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = autocast(network, mixed_precision)
    options: dict[str, Any] = {"beams": beams, "length": length, "decoder": decoder}

    def caption(clips: Sequence[Clip], bad_files: list[BadFile]) -> Iterator[dict[int, str]]:
        sizes = {"batch_size": batch_size, "num_workers": worker_count(num_workers, len(clips))}
        batches = caption_clips(network, processor, clips, bad_files, **sizes, **options)
        while True:
            with precision:  # which must not reach into the caller's code
                captions = next(batches, None)
            if captions is None:
                return
            yield captions

    by = os.path.realpath(model) if os.path.exists(model) else os.fspath(model)
    return describe_moments(store, caption, shown(by), overwrite=overwrite, show=show)


def describe_moments(
    store: Store,
    caption: Captioner,
    by: str,
    *,
    overwrite: bool = False,
    show: Callable[[int], None] | None = None,
) -> Described:
    """Put a caption of each moment that has none into an index.

    caption: see Captioner. by: absolute path or hub name of its model.
    overwrite: also of moments that have one.
    show: called with each number of moments that are done; None to show the progress on standard
        error.

    Raises ValueError if no moment could be read, and OSError if captions cannot be written; those
    that were saved stay.
    """
    # The processes that decode are forked, and never use LanceDB.
    warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
    work = _Work(store, caption, by, overwrite)
    if show is not None:
        return work.run(show)
    with progress(work.note, work.total) as show:
        return work.run(show)


class _Work:
    """The moments of an index that are to be described."""

    def __init__(self, store: Store, caption: Captioner, by: str, overwrite: bool) -> None:
        self.store, self.caption, self.by, self.overwrite = store, caption, by, overwrite
        moments = store.count()
        self.files = store.moments_per_file(described=overwrite)
        self.total = sum(self.files.values())
        self.kept = moments - self.total
        self.note = f"describing {self.total:,} of {moments:,} moments"
        self.bad_files: dict[str, str] = {}  # path → reason
        self.ready: dict[str, tuple[FileState, str]] = {}  # key → file and caption
        self.written = self.empty = self.saves = 0
        self._save_due = time.monotonic() + SAVE_SECONDS

    def run(self, show: Callable[[int], None]) -> Described:
        """Describe all of them; what is done is also put before an error or a signal ends this."""
        try:
            for paths in self._rounds():
                self._describe(paths, show)
        except BaseException:
            with suppress(Exception):  # the first error is told
                self._save()
            raise
        self._save()
        bad_files = [{"path": path, "reason": why} for path, why in sorted(self.bad_files.items())]
        if bad_files and not (self.written or self.kept or self.empty):
            first = shown(f"{bad_files[0]['path']}: {bad_files[0]['reason']}")
            raise ValueError(f"no moment could be described; the first file: {first}")
        self.store.tidy_captions()
        done = Described(self.written, self.kept, self.empty, bad_files)
        self._report(done)
        return done

    def _rounds(self) -> Iterator[list[str]]:
        """Yield the files in random order, those of about ROUND moments at once."""
        some: list[str] = []
        moments = 0
        for path in random.sample([*self.files], len(self.files)):
            if some and moments + self.files[path] > ROUND:
                yield some
                some, moments = [], 0
            some.append(path)
            moments += self.files[path]
        if some:
            yield some

    def _describe(self, paths: list[str], show: Callable[[int], None]) -> None:
        wanted = sum(self.files[path] for path in paths)
        moments = self._readable(self._lacking(paths))
        clips = [Clip(Path(m.file.path), m.start, m.end) for m in moments]
        unread: list[BadFile] = []
        done = 0
        if clips:
            for captions in self.caption(clips, unread):
                for place, text in captions.items():
                    one = moments[place]
                    self.ready[key_of(one.file, one.start, one.end)] = one.file, text
                done += len(captions)
                show(len(captions))
                if time.monotonic() > self._save_due:
                    self._save()
        self.bad_files |= {str(file.path): file.reason for file in unread}
        if wanted > done:  # unreadable, or described by another command meanwhile
            show(wanted - done)

    def _lacking(self, paths: list[str]) -> list[Moment]:
        """Return the moments of these files that are to be described now, file by file."""
        moments = sorted(self.store.moments(paths), key=lambda m: (m.file.path, m.start or 0.0))
        if self.overwrite:
            return moments
        keys = [key_of(m.file, m.start, m.end) for m in moments]
        held = self.store.captions.of(keys)
        return [moment for moment, key in zip(moments, keys, strict=True) if key not in held]

    def _readable(self, moments: list[Moment]) -> list[Moment]:
        """Leave out the moments of files that must not be opened, and list these."""
        reasons = {moment.file.path: _refused(moment.file) for moment in moments}
        self.bad_files |= {path: reason for path, reason in reasons.items() if reason is not None}
        return [moment for moment in moments if reasons[moment.file.path] is None]

    def _save(self) -> None:
        """Put the captions that are ready, except for those of files that changed meanwhile."""
        started = time.monotonic()
        files = {file.path: file for file, _ in self.ready.values()}
        reasons = {path: _refused(file) for path, file in files.items()}
        self.bad_files |= {path: reason for path, reason in reasons.items() if reason is not None}
        texts = {
            key: text for key, (file, text) in self.ready.items() if reasons[file.path] is None
        }
        written = self.store.captions.put(texts, self.by)
        self.written += written
        self.empty += len(texts) - written
        self.ready.clear()
        self.saves += 1
        if self.saves % TIDY_SAVES == 0:  # for those who search meanwhile
            self.store.tidy_captions()
        # However large the index grows, saving takes at most a twentieth of the time.
        self._save_due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))

    def _report(self, done: Described) -> None:
        counts = f"{done.written:,} new" + f", {done.empty:,} empty" * bool(done.empty)
        if done.bad_files:
            files = "file" if len(done.bad_files) == 1 else "files"
            counts += f", {len(done.bad_files):,} {files} unreadable"
        moments, captions = self.store.count(), self.store.captioned()
        first = f"{self.store.where}: {moments:,} moments, {captions:,} with a caption ({counts})"
        for line in (first, *bad_lines(done.bad_files)):
            print(shown(line), file=sys.stderr)


def _refused(file: FileState) -> str | None:
    """Return why a file must not be opened, None if it may be."""
    if os.path.splitext(file.path)[1].lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return "not a video or image by its name"
    state = state_of(file.path)
    if state is None:
        return "it cannot be found; was it moved, or is its disk missing?"
    if state != (file.size, file.mtime_ns):
        return "it has changed since it was embedded; run clipvip embed again"
    return None
