"""Embed a collection of videos into an index, and keep the index up to date.

A build compares the named files with those of the index (`clipvip.index.changes`), embeds what is
new and puts whole files into the store: at least once a minute, so that a killed build resumes
there. Several builds may write to one index at once, and the ranks of one build do. Before a file
is read, the index is asked again whether another build has put it meanwhile.
"""

import itertools
import math
import os
import random
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from clipvip import distributed
from clipvip.collection import IndexedClip, clips_of, listed, place_of
from clipvip.data.loading import COUNTED_FROM, BadFile, Division, On, is_ray, worker_count
from clipvip.embedding import Embedded, autocast, embed_files, fingerprint, load_for_embedding
from clipvip.files import shown
from clipvip.index.captions import ANNOTATIONS, key_of
from clipvip.index.changes import (
    Changes,
    NamedFile,
    New,
    Places,
    changes,
    dealt,
    is_held,
    named_files,
    plan_of,
)
from clipvip.index.migrate import migrate
from clipvip.index.on_ray import embed_on_ray
from clipvip.index.query import Files, files_of, model_here, note_model
from clipvip.index.rows import About, FileState
from clipvip.index.store import Store
from clipvip.index.tables import Span, check_place, is_index
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.terminal import share_done

SAVE_SECONDS = 60.0  # least time between two saves of a build
LOOK_SECONDS = 10.0  # least time between two looks at what other builds have put
FILES_AT_ONCE = 200  # whose vectors are in memory while they are copied
PATIENCE = 24 * 3600.0  # seconds that a rank waits for the others, whose films may be longer
NOT_FINITE = "the model gives no finite features for it"
CHANGED = "it changed while it was read; run the same command again"
BAD_SHOWN = 3  # unreadable files that the last lines name

Result = TypeVar("Result")
FileRows = tuple[FileState, list[Span], np.ndarray]  # as Store.put takes them


class Progress(NamedTuple):
    """How far a build is.

    done, files: files that are embedded, and all to be embedded. share: of their bytes that is
    done. moments: moments that are embedded. seconds: since the first file was opened.
    """

    done: int
    files: int
    share: float
    moments: int
    seconds: float


class Added(NamedTuple):
    """What a build did with the named files.

    embedded: files whose moments were embedded. unchanged: files that the index held already.
    moved: files that the index held under another name or time. dropped: files that are gone.
    bad_files: {"path", "reason"} of every file that cannot be read.
    """

    embedded: int
    unchanged: int
    moved: int
    dropped: int
    bad_files: list[dict[str, str]]


def build(
    where: str | Path,
    model: str | Path | None,
    videos: str | Path | Sequence[str | Path],
    *,
    window: float = 10.0,
    stride: float | None = None,
    scenes: bool = False,
    batch_size: int = 16,
    num_workers: int | None = None,
    decoder: str = "auto",
    device: str | torch.device | None = None,
    mixed_precision: str = "auto",
    on: On = "local",
    progress: Callable[[Progress], None] | None = None,
) -> Added:
    """Put videos into an index, divided into moments with one vector each.

    Files that the index holds already with the same size, modification time and division are kept.
    Files of the same content as one in the index, renamed or copied, get its vectors. Files in the
    named folders that no longer exist are dropped; other files of the index stay. Files that cannot
    be decoded are left out and listed in the index.

    Under torchrun, the ranks share the files.

    where: folder or address of the index: new, empty, or an index to add to.
    model: a CLIP-ViP folder or hub name, with its processor; None for that of the index.
    videos: one or more videos, images, folders, annotations (.jsonl), lists (.txt) and patterns;
        see clipvip.collection. Clips of annotations that have a start or end are moments as they
        are; other files are divided.
    window, stride: length of a moment and distance between the starts of two, in seconds; stride
        None for half a window. A file no longer than a window is one moment.
    scenes: divide at cuts instead. Scenes of more than two windows are divided into windows.
    num_workers: number of decoding processes, by default one per core; with on="ray", number of
        workers that each hold a model, by default one per GPU or four cores of the cluster.
    decoder: see clipvip.data.loading.LoaderOptions.
    device: by default a CUDA GPU, if there is one.
    mixed_precision: "auto", "bf16" or "no", see clipvip.embedding.precision_on. An index may hold
        files of either precision.
    on: "local", or "ray" to embed on a Ray cluster, see clipvip.index.on_ray. All nodes must see
        the files, and the model, under the same paths.
    progress: called while files are embedded; None to show the progress on standard error.

    Raises ValueError if no named file can be read, if a name in `videos` matches nothing, and if
    `where` is refused or is the index of another model; OSError if the index cannot be written,
    which leaves it as last saved.
    """
    where = os.fspath(where)
    if not where:
        raise ValueError("out is empty; expected the folder of an index")
    stride = window / 2 if stride is None else stride
    Division(window, stride, scenes)  # raises the ValueError
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    device = _join_ranks(device)
    clips, left_out = _first(lambda: _listed(where, sources))
    files = named_files(clips, plan_of(window, stride, scenes))
    network, processor, about = _load(where, model, sources)
    if not is_ray(on):
        network.to(device)  # type: ignore[arg-type]
    run = _Build(where, about, progress)
    found = _first(lambda: run.compare(files, [place_of(source) for source in sources]))
    options: dict[str, Any] = {"window": window, "stride": stride, "scenes": scenes}
    options |= {"batch_size": batch_size, "decoder": decoder}
    if is_ray(on):
        options |= {"num_workers": num_workers, "mixed_precision": mixed_precision}
        run.embed(found, partial(embed_on_ray, about, **options))
    else:
        options["num_workers"] = worker_count(num_workers, sys.maxsize, distributed.ranks_here())
        with autocast(network, mixed_precision):
            run.embed(found, partial(embed_files, network, processor, **options))
    return run.finish(files, found, left_out, sources)


def build_and_leave(*names: Any, **options: Any) -> None:
    """Build an index as a command: under torchrun, this also ends the process."""
    build(*names, **options)
    distributed.leave(0)


class _Build:
    """One rank's work on an index.

    store: None while there is no index: a build that fails at once leaves none.
    """

    def __init__(self, where: str, about: About, show: Callable[[Progress], None] | None) -> None:
        self.where, self.about, self.show = where, about, show
        self.store = Store.create(where, about) if is_index(where) else None
        self.bad_files: dict[str, str] = {}  # path → reason
        self.ready: list[tuple[New, list[Embedded]]] = []  # files to be put
        self.embedded = 0
        self.by_others = 0
        self.moved = 0
        self.unseen_captions = 0
        self.captions: dict[str, tuple[tuple[Span, str], ...]] = {}  # see Changes
        self._save_due = time.monotonic() + SAVE_SECONDS
        self._look_due = time.monotonic() + LOOK_SECONDS
        # Version of the index, if only this process has changed it since it was last read.
        self._version = self.store.version() if self.store else None
        self._alone = True
        self._held: dict[str, FileState] = {}  # when it was last read

    # --- what needs no model ---

    def compare(self, files: list[NamedFile], places: list[str]) -> Changes:
        """Find what has changed, and put files of known content.

        Files whose content another build has taken out of the index meanwhile are new.
        """
        held = self.store.files() if self.store else {}
        found = changes(files, places, held)
        if self.store is None or not (found.copied or found.moved):
            return found
        targets = {state.path for _, state in found.copied}
        done: set[str] = set()
        # All originals that copies replace are read before the first is replaced.
        first = [pair for pair in found.copied if pair[0] in targets]
        rest = [pair for pair in found.copied if pair[0] not in targets]
        for some in (first, *_chunks(rest)):
            done |= self.store.copy(some)
        for moves in _chunks(list(found.moved.items())):
            done |= self.store.move(dict(moves))
        self.moved = len(done)
        self._version = self.store.version()
        named = {file.path: file for file in files}
        wanted = [state for _, state in (*found.copied, *found.moved.items())]
        found.new += [New(named[x.path], [x]) for x in wanted if x.path not in done]
        return found

    # --- what the model is for ---

    def embed(self, found: Changes, embedded: Callable[..., Iterator[Embedded]]) -> None:
        """Embed this rank's share of the new files and put them; what is done is also put before an
        error or a signal ends this.

        embedded: embed_files without its files, or what does the same elsewhere.
        """
        self.captions = found.captions
        own = dealt(found.new, distributed.world_size())[distributed.rank()]
        mine = [found.new[place] for place in own]
        if not mine:
            return
        # The processes that decode are forked, and never use LanceDB.
        warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
        try:
            with self._progress(found, mine) as done:
                self._embed(mine, embedded, done)
        except BaseException:
            with suppress(Exception):  # the first error is told
                self._save()
            raise
        self._save()

    def _embed(
        self, mine: list[New], embedded: Callable[..., Iterator[Embedded]], done: "_Done"
    ) -> None:
        owners = [place for place, new in enumerate(mine) for _ in new.file.parts]
        parts = [part for new in mine for part in new.file.parts]
        given = [(Path(mine[own].file.path), part) for own, part in zip(owners, parts, strict=True)]
        unread: list[BadFile] = []
        not_finite: set[int] = set()
        whole: dict[int, list[Embedded]] = {}
        for one in embedded(given, unread, on_moments=done.moments, order=self._order(mine)):
            own = owners[one.place]
            whole.setdefault(own, []).append(one)
            if not one.vectors.isfinite().all():
                not_finite.add(own)
                if len(not_finite) >= COUNTED_FROM and not self.embedded and not self.ready:
                    break  # the others would fail too
            if len(whole[own]) == len(mine[own].file.parts):
                done.file(mine[own].file.size)
                if own not in not_finite:
                    self.ready.append((mine[own], whole.pop(own)))
            if time.monotonic() > self._save_due:
                self._save()
        # What can be read of files that lack parts is put too.
        self.ready += [(mine[own], read) for own, read in whole.items() if own not in not_finite]
        by_path = {new.file.path: new for new in mine}
        bad = {file.path: file.reason for file in unread}
        bad |= {mine[own].file.path: NOT_FINITE for own in not_finite}
        for path, reason in bad.items():
            self.bad_files |= {state.path: reason for state in by_path[path].states}

    def _order(self, mine: list[New]) -> Iterator[int]:
        """Yield the places of all parts of files, one file after the other, without those that
        another build has put meanwhile.

        As soon as there is another build, the order is random, so that the two share the work.
        """
        ends = list(itertools.accumulate(len(new.file.parts) for new in mine))
        left, alone = deque(range(len(mine))), self._alone
        while left:
            self._look()
            if alone and not self._alone:
                alone = False
                random.shuffle(left)
            own = left.popleft()
            if is_held(mine[own].file, self._held.get(mine[own].file.path)):
                self.by_others += 1
            else:
                yield from range(ends[own] - len(mine[own].file.parts), ends[own])

    def _look(self) -> None:
        """Read what the index holds, if another process has changed it and the last look is not too
        recent."""
        started = time.monotonic()
        if started < self._look_due:
            return
        if self.store is None and is_index(self.where):
            self.store = Store.create(self.where, self.about)
        if self.store is not None and (version := self.store.version()) != self._version:
            self._version, self._held, self._alone = version, self.store.files(), False
        self._look_due = time.monotonic() + max(LOOK_SECONDS, 20 * (time.monotonic() - started))

    def _save(self) -> None:
        """Put the files that are ready."""
        started = time.monotonic()
        rows: list[FileRows] = []
        for new, parts in self.ready:
            spans, vectors = _joined(parts)
            facts = parts[0]
            for state in new.states:
                if state_of(state.path) != (state.size, state.mtime_ns):
                    self.bad_files[state.path] = CHANGED
                    continue
                date = state.mtime_ns / 1e9 if facts.date is None else facts.date
                state = replace(state, duration=facts.duration, date=date)
                rows.append((state, spans, vectors))
        if rows:
            with self._errors():
                if self.store is None:
                    self.store = Store.create(self.where, self.about)
                    self._version = self.store.version()
                before = self.store.version()
                self.store.put(rows)
                after = self.store.version()
                self._put_captions(self.store, rows)
                alone = before == self._version and after == before + 1
                self._version = after if alone else None
        self.embedded += len(rows)
        self.ready.clear()
        # However large the index grows, saving takes at most a twentieth of the time.
        self._save_due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))

    def _put_captions(self, store: Store, rows: list[FileRows]) -> None:
        """Put the captions that annotations give for files that were just put."""
        texts: dict[str, str] = {}
        for state, spans, _ in rows:
            given = dict(self.captions.get(state.path, ()))
            texts |= {key_of(state, *x): given[x] for x in spans if x in given}
        store.captions.put(texts, ANNOTATIONS)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            state = "it stays as last saved" if self.store else "nothing is saved yet"
            raise OSError(
                f"{shown(self.where)} cannot be saved ({error.strerror or error}); {state}: "
                "correct that and run the same command again"
            ) from error

    @contextmanager
    def _progress(self, found: Changes, mine: list[New]) -> Iterator["_Done"]:
        if self.show is not None:
            yield _Done(mine, self.show)
        elif distributed.rank() > 0:
            yield _Done(mine, lambda progress: None)
        else:
            there, world = len(found.kept) + self.moved, distributed.world_size()
            note = f"embedding {_count(len(mine), 'file')}"
            note += f" of {len(found.new)}, one of {world} shares" * (world > 1)
            note += f", {there} are in the index already" * bool(there)
            with share_done(note) as show:
                yield _Done(mine, lambda progress: show(progress.share, _text(progress)))

    # --- the end ---

    def finish(
        self,
        files: list[NamedFile],
        found: Changes,
        left_out: list[dict[str, str]],
        sources: list[str],
    ) -> Added:
        """Wait for all ranks; on the first, drop what is gone and report."""
        own = self.embedded, self.by_others, self.bad_files
        embedded, by_others, bad_files = zip(*distributed.all_gather_objects(own), strict=True)
        for theirs in bad_files:
            left_out += [{"path": path, "reason": reason} for path, reason in theirs.items()]
        left_out = [{**file, "path": _storable(file["path"])} for file in left_out]
        added = Added(
            sum(embedded), len(found.kept) + sum(by_others), self.moved, len(found.gone), left_out
        )
        return _first(lambda: self._finish(added, files, found, sources))

    def _finish(
        self, added: Added, files: list[NamedFile], found: Changes, sources: list[str]
    ) -> Added:
        held = added.embedded + added.unchanged + added.moved
        if self.store is None and (held or is_index(self.where)):
            self.store = Store.create(self.where, self.about)
        if self.store is not None:
            with self._errors():
                self._bring_up_to_date(self.store, added, files, found, sources)
        if held == 0:
            raise ValueError(self._nothing(added, files, sources))
        assert self.store is not None
        _report(self.where, self.store, added, self.unseen_captions)
        return added

    def _bring_up_to_date(
        self,
        store: Store,
        added: Added,
        files: list[NamedFile],
        found: Changes,
        sources: list[str],
    ) -> None:
        Store.create(self.where, self.about)  # adds the sources
        bad = {file["path"] for file in added.bad_files}
        suspects = [file for file in files if file.path in bad]
        now = store.files() if suspects else {}
        # What a file held before it became unreadable is no longer true.
        untrue = [
            file.path
            for file in suspects
            if file.path in now and file.mtime_ns and not is_held(file, now[file.path])
        ]
        store.drop([*found.gone, *untrue])
        places = Places([*map(place_of, sources), *(_storable(file.path) for file in files)])
        known = [file["path"] for file in store.bad_files()]
        # A place in a list is named by the list, a colon and a line.
        considered = [x for x in known if x in places or x.rpartition(":")[0] in places]
        # A damaged file whose other moments the index holds already was not read again.
        considered = [path for path in considered if path not in found.kept]
        store.put_bad_files(considered, added.bad_files)
        self.unseen_captions = self._annotate(store, found)
        store.tidy(_tell_of_index)

    def _annotate(self, store: Store, found: Changes) -> int:
        """Bring the captions from annotations up to date. Return how many no moment has."""
        given = found.captions.items()
        if not store.captions.exist() and not any(text for _, own in given for _, text in own):
            return 0
        now = store.files() if given else {}
        return store.annotate(
            {
                key_of(now[path], *span): text
                for path, own in given
                if path in now
                for span, text in own
            }
        )

    def _nothing(self, added: Added, files: list[NamedFile], sources: list[str]) -> str:
        reasons = [file["reason"] for file in added.bad_files]
        if NOT_FINITE in reasons:
            return (
                "the model's weights give no finite features for any of "
                f"{reasons.count(NOT_FINITE)} files: {shown(self.about.model)}; download or train "
                "it again"
            )
        first = added.bad_files[0]
        return (
            f"none of {_count(len(files), 'file')} in {shown(listed(sources))} could be read; the "
            f"first: {shown(first['path'])}: {shown(first['reason'])}"
        )


class _Done:
    """Counts of what is done, told to `show` at each change."""

    def __init__(self, files: list[New], show: Callable[[Progress], None]) -> None:
        self._show = show
        self._bytes = max(sum(new.file.size for new in files), 1)
        self._read = 0
        self._began = time.monotonic()
        self._last = Progress(0, len(files), 0.0, 0, 0.0)

    def moments(self, number: int) -> None:
        self._tell(moments=self._last.moments + number)

    def file(self, size: int) -> None:
        self._read += size
        self._tell(done=self._last.done + 1, share=self._read / self._bytes)

    def _tell(self, **changed: Any) -> None:
        seconds = time.monotonic() - self._began
        self._last = self._last._replace(seconds=seconds, **changed)
        self._show(self._last)


# --- before the work ------------------------------------------------------------------------------


def _listed(where: str, sources: list[str]) -> tuple[list[IndexedClip], list[dict[str, str]]]:
    """List the clips of the sources, and check that `where` is an index or may become one."""
    clips, left_out = clips_of(sources)
    migrate(where)
    check_place(where)
    return clips, left_out


def _load(
    where: str, model: str | Path | None, sources: list[str]
) -> tuple[CLIPViPModel, CLIPViPProcessor, About]:
    """Load the model, on the first rank first, as that may download it.

    Raises ValueError if the index is of another model.
    """
    loaded: list[Any] = []

    def load() -> About:
        if model is None:
            stored = Store.open(where).about
            name, source = stored.model, model_here(stored.model, stored.sources)
        else:
            name, source = os.fspath(model), os.fspath(model)
            if os.path.exists(source):
                name = os.path.realpath(source)
        files = files_of(source)
        loaded.extend(load_for_embedding(source, local_files_only=model is None))
        if distributed.rank() > 0:
            return about
        network, processor = loaded
        hashed = fingerprint(network, processor)
        _note(source, files, network, processor, hashed)
        real = tuple(sorted(map(os.path.realpath, sources)))
        new = About(name, hashed, network.config.projection_dim, real)
        if is_index(where):
            Store.create(where, new)  # raises the ValueError
        return new

    about = _first(load)
    if not loaded:
        load()
    return loaded[0], loaded[1], about


def _note(source: str, files: Files, network: Any, processor: Any, hashed: str) -> None:
    """Note the model, so that the first search starts quickly."""
    if not os.path.exists(source):  # a name on the hub, whose files in the cache never change
        try:
            source = model_here(source, ())
        except ValueError:
            return
        files = files_of(source)
    note_model(source, files, network, processor, hashed)


def _join_ranks(device: str | torch.device | None) -> str | torch.device:
    """Join the other ranks if a launcher started any. Return the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        own = distributed.start(PATIENCE).device
        return device or own
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _first(work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank; return its result on all. Only the first reports its error."""
    with distributed.first_reports():
        return distributed.first_does(work)


# --- small parts ----------------------------------------------------------------------------------


def _joined(parts: list[Embedded]) -> tuple[list[Span], np.ndarray]:
    """Join the moments of a file's parts, by their start, each span once."""
    spans = [span for part in parts for span in part.spans]
    vectors = np.concatenate([part.vectors.numpy() for part in parts])
    if len(parts) == 1:
        return spans, vectors
    rows = {span: row for row, span in reversed(list(enumerate(spans)))}
    order = sorted(
        rows, key=lambda span: (span[0] or 0.0, math.inf if span[1] is None else span[1])
    )
    return order, vectors[[rows[span] for span in order]]


def _storable(path: str) -> str:
    """Return a path, or what stands for it if it holds half of a character, as no file's can."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return shown(path)
    return path


def state_of(path: str) -> tuple[int, int] | None:
    """Return size and modification time of a file; None if it cannot be read."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns


def _tell_of_index(moments: int) -> None:
    print(
        f"making the approximate index of {moments:,} moments; meanwhile searches work, but slower",
        file=sys.stderr,
    )


def _report(where: str, store: Store, added: Added, unseen_captions: int) -> None:
    """Print what the index holds and what has changed, and name the first unreadable files."""
    files = store.files().values()
    counts = [
        (added.embedded, "file new"),
        (added.moved, "moved"),
        (added.dropped, "dropped"),
        (len(added.bad_files), "unreadable"),
    ]
    changed = [
        f"{number:,} {what if number == 1 else what.replace('file', 'files')}"
        for number, what in counts
        if number
    ]
    holds = [_count(len(files), "file"), length(sum(file.duration for file in files))]
    holds.append(_count(store.count(), "moment"))
    if captions := store.captioned():
        holds.append(f"{captions:,} with a caption")
    end = ", ".join(changed) or "nothing new"
    lines = [f"{where}: {', '.join(holds)} ({end})", *bad_lines(added.bad_files)]
    if unseen_captions:
        videos = _count(unseen_captions, "video")
        lines.append(
            f"  captions of {videos} are not shown, as they are of the whole video, which is "
            "divided into moments; a longer --window keeps it whole"
        )
    for line in lines:
        print(shown(line), file=sys.stderr)


def bad_lines(bad_files: list[dict[str, str]]) -> list[str]:
    """Return lines that name the first unreadable files."""
    lines = [f"  unreadable: {x['path']}: {x['reason']}" for x in bad_files[:BAD_SHOWN]]
    if (more := len(bad_files) - BAD_SHOWN) > 0:
        lines.append(f"  and {more:,} more")
    return lines


def _text(progress: Progress) -> str:
    rate = progress.moments / max(progress.seconds, 1e-9)
    return (
        f"{progress.done:,}/{progress.files:,} files, {_count(progress.moments, 'moment')}, "
        f"{rate:.1f} moments/s"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def length(seconds: float) -> str:
    """Format a length of video, such as 38 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"


def _chunks(values: list[Any]) -> Iterator[list[Any]]:
    for at in range(0, len(values), FILES_AT_ONCE):
        yield values[at : at + FILES_AT_ONCE]
