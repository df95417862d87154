"""Caption the clips of annotations or shards. This is `clipvip caption`.

For annotations, `Job` says which clips are left and takes their records in any order, from any
executor: the ranks of a run, each with worker processes that read ahead of the model, or the
workers of a Ray cluster (on_ray.py). shards.py does the same for shards.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from clipvip import distributed
from clipvip.captions.captioner import Asking, Captioner
from clipvip.captions.journal import Journal, JournalError, difference
from clipvip.captions.on_ray import (
    CaptionerThere,
    caption_clips_on_ray,
    caption_shards_on_ray,
)
from clipvip.captions.shards import caption_shards
from clipvip.captions.summary import Summary
from clipvip.captions.work import (
    UNREADABLE,
    Reader,
    Record,
    note_files,
    read_batch,
    records,
)
from clipvip.data.annotations import Annotations, Clip, write_annotations
from clipvip.data.loading import (
    BadFiles,
    LoaderError,
    On,
    Workers,
    is_ray,
    names_of,
    worker_count,
)
from clipvip.data.shards import is_shards
from clipvip.files import sha256_of, shown, write_whole
from clipvip.terminal import progress

FORMAT = "clipvip captions 1"
PATIENCE = 7 * 24 * 3600.0  # seconds that a rank waits for the others, which may be slower


def caption(
    model: str,
    source: str | Path,
    out: str | Path,
    *,
    asking: Asking | None = None,
    overwrite: bool = False,
    batch_size: int = 16,
    num_workers: int | None = None,
    mixed_precision: str = "auto",
    max_bad_share: float = 0.05,
    device: str | None = None,
    on: On = "local",
) -> Summary:
    """Write captions of clips, and resume a run that was killed.

    Under torchrun, the ranks share the clips. The captions do not depend on the number of ranks.

    model: a folder or hub name, see Captioner.
    source: annotations (.jsonl), or shards, as for clipvip.data.shards.load_manifest.
    out: annotations to write, whole when all clips are done; until then, results are kept in the
        journal `OUT.journal` (see journal.py). For shards, a folder.
    asking: the prompt, and how captions are generated.
    overwrite: also caption clips that have a caption; without it, theirs are kept.
    batch_size: clips per call of the model. num_workers: processes that read; by default one per
        core. mixed_precision, device: see Captioner.
    on: "local", or "ray" for a Ray cluster: see on_ray.py. num_workers is then the number of
        workers that each hold a captioner, by default one per GPU, or one per four cores; and
        mixed_precision "auto" is decided by this machine.
    max_bad_share: share of unreadable clips, among those to be captioned, above which LoaderError
        is raised; what is captioned stays in the journal.

    Returns, on the first rank, its summary. All clips of `source` are in `out`: filtered
    and unreadable ones without a new caption. Raises ValueError if `out` exists and is from another
    run, or if the journal is of other options; and the errors of Captioner.
    """
    asking = asking or Asking()
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    _check_names(os.fspath(source), Path(out))  # loading a model may take minutes
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        own = distributed.start(PATIENCE).device
        device = device or str(own)
    loaded: list[Captioner] = []

    def load() -> dict[str, Any]:
        loaded.append(Captioner(model, asking, device, mixed_precision))
        return _about(loaded[0], overwrite)

    with distributed.first_reports():
        about = distributed.first_does(load)
    captioner = loaded[0] if loaded else Captioner(model, asking, device, mixed_precision)
    workers = worker_count(num_workers, sys.maxsize, distributed.ranks_here())
    there = None
    if is_ray(on):
        there = CaptionerThere(model, asking, captioner.precision, about["model"])
    options: dict[str, Any] = {"batch_size": batch_size, "max_bad_share": max_bad_share}
    if is_shards(os.fspath(source)):
        if there is not None:
            options["elsewhere"] = partial(caption_shards_on_ray, there, num_workers=num_workers)
        return caption_shards(captioner, os.fspath(source), Path(out), about, workers, **options)
    job = Job(Path(source), Path(out), about, **options)
    with job.only_run() as finished:
        if finished is not None:
            return finished
        if there is not None:
            _caption_on_ray(there, job, num_workers)
        else:
            reader = Reader(captioner.prepare, asking.frames)
            _caption_own(captioner.start(), reader, job, workers)
        distributed.all_gather_objects(None)  # all have written their last record
        with distributed.first_reports():
            return distributed.first_does(job.finish)


def caption_and_leave(
    model: str, source: str, out: Path, *, asking: Asking, **options: Any
) -> None:
    """Caption clips and print a summary, as a command; end a rank's process."""
    summary = caption(model, source, out, asking=asking, **options)
    if distributed.rank() == 0:
        print(f"{shown(out)}: " + "\n".join(summary.lines(asking.length)))
    distributed.leave(0)


def _about(captioner: Captioner, overwrite: bool) -> dict[str, Any]:
    """Return all that captions depend on, except for the data."""
    asking, prepare = captioner.asking, captioner.prepare
    return {
        "mixed_precision": captioner.precision,
        "prompt": prepare.prompt or None,
        "length": asking.length,
        "beams": asking.beams,
        "frames": asking.frames,
        "overwrite": overwrite,
        "model": captioner.fingerprint(),
        "name": captioner.source,
    }


def _caption_own(captioner: Captioner, reader: Reader, job: "Job", workers: int) -> None:
    """Caption this rank's share of what is left."""
    rank, world = distributed.rank(), distributed.world_size()
    own = job.batches()[rank::world]
    count = sum(map(len, own))
    note = f"captioning {count} clips" + f", one of {world} shares" * (world > 1)
    show = progress(note, count) if rank == 0 else nullcontext(lambda clips: None)
    read = partial(read_batch, job.clips, reader)
    with (
        show as done,
        closing(Workers(read, min(workers, len(own)), names_of(job.clips))) as pool,
    ):
        for places, prepared in pool.run(own):
            answers = captioner.answer(prepared.inputs, prepared.counts)
            job.add(records(prepared, answers))
            done(len(places))


def _caption_on_ray(there: CaptionerThere, job: "Job", num_workers: int | None) -> None:
    batches = job.batches()
    count = sum(map(len, batches))
    if not count:
        return
    with progress(f"captioning {count} clips", count) as done:
        for found in caption_clips_on_ray(there, job.clips, batches, num_workers):
            job.add(found)
            done(len(found))


class Job:
    """The captioning of a file of annotations, whoever does it.

    about: what captions depend on besides the annotations.

    Enter `only_run`, caption the clips of `batches`, `add` their records in any order, then
    `finish`, once for all processes.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        about: dict[str, Any],
        *,
        batch_size: int = 16,
        max_bad_share: float = 0.05,
    ) -> None:
        with distributed.first_reports():
            annotations = distributed.first_does(lambda: sha256_of(source))
        self.clips = Annotations(source)
        self.out, self.batch_size, self.max_bad_share = out, batch_size, max_bad_share
        self.overwrite, self.length = about["overwrite"], about["length"]
        self.head = {
            "format": FORMAT,
            "annotations": annotations,
            **{key: value for key, value in about.items() if key != "name"},
        }
        self.name = about["name"]
        self.report = out.with_suffix(".caption.json")
        self.journal = Journal(out, len(self.clips))
        self.bad = BadFiles(len(self.clips), max_bad_share, out.with_suffix(".bad_files.jsonl"))

    @contextmanager
    def only_run(self) -> Iterator[Summary | None]:
        """Keep other runs out of the journal. Yield the summary of an earlier run that is finished,
        else None. Raises ValueError if something else is in the place of the captions."""
        with ExitStack() as stack:
            with distributed.first_reports():
                done = distributed.first_does(self._earlier)
                if done is None:
                    lock = distributed.first_enters(self.journal.only_run(self.head))
                    stack.enter_context(lock)
            if done is not None:
                yield done
                return
            self.journal.read()
            # Or the few clips that are tried again would seem to be all, and most of them bad.
            self.bad.resume(np.flatnonzero(self.journal.finished()), 0)
            distributed.all_gather_objects(None)  # all have read it, none has written
            self._writer = self.journal.writer(distributed.rank())
            yield None

    def _earlier(self) -> Summary | None:
        if not self.out.exists() or self.journal.folder.exists():
            return None
        name = shown(self.out)
        try:
            old = json.loads(self.report.read_bytes())
            settings, counts = old["settings"], old["counts"]
            earlier = Summary(**{key: counts[key] for key in ("clips", "kept", "captioned", "cut")})
            earlier.left_out.update(counts["left_out"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise JournalError(f"{name} exists; delete it, or give another OUT") from error
        if differing := difference(settings, self.head):
            raise JournalError(
                f"{name} exists, and its captions were made with {differing}; delete it, or give "
                "another OUT"
            )
        return earlier

    def wanted(self, clip: Clip) -> bool:
        """Whether a clip is to be captioned."""
        return self.overwrite or clip.caption is None

    def batches(self) -> "Batches":
        """Return the places of the clips that are left, in batches, in order."""
        wanted = np.fromiter(map(self.wanted, self.clips), bool, len(self.clips))
        left = np.flatnonzero(wanted & ~self.journal.finished())
        return Batches(left, self.batch_size, range(-(-len(left) // self.batch_size)))

    def add(self, found: Sequence[Record]) -> None:
        """Keep records. Raises LoaderError if too many clips are unreadable."""
        self._writer.add(found)
        note_files(self.bad, found)

    def finish(self) -> Summary:
        """Write the captions, and delete the journal. Raises LoaderError if too many clips are
        unreadable; ValueError if clips have no record."""
        self.journal.read()
        wanted = np.fromiter(map(self.wanted, self.clips), bool, len(self.clips))
        missing = int((wanted & ~self.journal.finished()).sum())
        unread = (
            [p for p in np.flatnonzero(wanted).tolist() if self._is_unread(p)] if missing else []
        )
        if missing > len(unread):
            raise JournalError(
                f"{missing - len(unread)} clips have no record; run the same command again"
            )
        if missing > self.max_bad_share * wanted.sum():
            last = self.journal[unread[-1]]
            assert last is not None and last.file is not None
            raise LoaderError(
                f"{missing} of {wanted.sum()} clips could not be read (allowed "
                f"{self.max_bad_share:.1%}); the last: {shown(last.file.path)}: "
                f"{shown(last.file.reason)}; the same command tries them again"
            )
        summary = Summary(clips=len(self.clips))
        write_annotations(self.out, self._captioned(summary))
        report = {"model": self.name, "settings": self.head, "counts": summary.record()}
        write_whole(self.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        self.journal.remove()
        return summary

    def _is_unread(self, place: int) -> bool:
        record = self.journal[place]
        return record is not None and record.left_out == UNREADABLE

    def _captioned(self, summary: Summary) -> Iterator[Clip]:
        """Yield all clips with their captions, and count them."""
        for place, clip in enumerate(self.clips):
            record = self.journal[place] if self.wanted(clip) else None
            if record is None:
                summary.kept += 1
                yield clip
                continue
            summary.add(record)
            # That a clip is unreadable now says nothing against a caption that it has.
            yield clip if record.left_out == UNREADABLE else replace(clip, caption=record.caption)


@dataclass(frozen=True)
class Batches(Sequence[list[int]]):
    """Places of clips in batches of `size`; a slice has those of `numbers`. It is made as it is
    read: a list of a hundred million Python integers would take gigabytes."""

    places: NDArray[np.int64]
    size: int
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, key: int) -> list[int]: ...

    @overload
    def __getitem__(self, key: slice) -> "Batches": ...

    def __getitem__(self, key: int | slice) -> "list[int] | Batches":
        if isinstance(key, slice):
            return replace(self, numbers=self.numbers[key])
        start = self.numbers[key] * self.size
        return self.places[start : start + self.size].tolist()


def _check_names(source: str, out: Path) -> None:
    """Raise ValueError if OUT cannot be what is written for SOURCE."""
    name, given = shown(out), shown(source)
    if is_shards(source):
        if out.suffix.lower() == ".jsonl":
            raise ValueError(
                f"OUT is {name}; expected a folder to write shards to, as {given} names shards"
            )
        return
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"OUT is {name}; expected a name that ends in .jsonl")
    if os.path.realpath(source) == os.path.realpath(out):
        raise ValueError(f"OUT is {name}, as are the annotations; give another name")
    if not os.path.isfile(source):
        raise ValueError(f"{given} is not a file; expected annotations (.jsonl) or shards")
