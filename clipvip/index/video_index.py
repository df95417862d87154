"""VideoIndex: add videos to an index, and find the moments in it."""

import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipvip.files import shown
from clipvip.index import store as stored
from clipvip.index.captions import key_of
from clipvip.index.hits import Curve, best_hits, scores_of
from clipvip.index.migrate import migrate
from clipvip.index.query import Encoder, Query
from clipvip.index.rows import About, FileState, Hit, Moment, Where

if TYPE_CHECKING:
    from clipvip.index.build import Added
    from clipvip.index.describe import Described
    from clipvip.index.memory import Memory

MOST_HITS = 10_000
RELOAD_SHARE = 0.1  # of a server's time that is spent at most on reading an index that changes


class VideoIndex:
    """An index of moments of videos; see clipvip.index.rows for what it holds.

        index = VideoIndex("index")
        index.add("Videos", "openai/clip-vit-base-patch32")
        for hit in index.search("a dog catches a ball"):
            print(hit.score, hit.path, hit.start, hit.end)

    It is opened, and its model loaded, when first needed. Several threads may search at once.

    where: a folder, or a URI such as s3://bucket/index.
    in_memory: keep all vectors in memory, for many searches by one process; it needs torch. Beyond
        clipvip.index.store.EXACT_ROWS moments, searches use the index on disk all the same.
    """

    def __init__(self, where: str | Path, *, in_memory: bool = False) -> None:
        self.where = os.fspath(where)
        self.in_memory = in_memory
        self._lock = threading.RLock()
        self._store: stored.Store | None = None
        self._about: About | None = None  # as last read
        self._encoder: Encoder | None = None
        self._memory: tuple[int, Memory | None] | None = None  # of which version
        self._reload_from = 0.0  # time.monotonic()

    def add(
        self,
        videos: str | Path | Sequence[str | Path],
        model: str | Path | None = None,
        *,
        window: float = 10.0,
        stride: float | None = None,
        scenes: bool = False,
        **options: Any,
    ) -> "Added":
        """Embed what is new in videos, folders, annotations, lists and patterns; drop what is gone.

        model: a folder or hub name; None for the model of this index.
        All arguments and options are those of clipvip.index.build.build.
        """
        from clipvip.index.build import build

        options |= {"window": window, "stride": stride, "scenes": scenes}
        return build(self.where, model, videos, **options)

    def describe(
        self, model: str | Path, *, overwrite: bool = False, **options: Any
    ) -> "Described":
        """Write a caption for each moment that has none; hits then have it.

        model: a folder or hub name of a model that was trained to caption, not that of the index.
        overwrite: write captions for all moments, in place of those that they have.
        options: those of clipvip.index.describe.describe_index.
        """
        from clipvip.index.describe import describe_index

        return describe_index(self.store, model, overwrite=overwrite, **options)

    def search(
        self,
        query: Query | Sequence[Query],
        k: int = 10,
        *,
        weights: Sequence[float] | None = None,
        where: Where | None = None,
    ) -> list[Hit]:
        """Return the k best hits for a query, best first; see clipvip.index.hits for what a hit is.

        query: a sentence, the Path of an image or video, a PIL image, or a list of these.
        weights: of the queries in a list, also negative ones; by default all are 1. The unit vector
            of the weighted sum of their unit vectors is searched for.
        where: looks only at files that fit.

        Raises ValueError for a query that is empty or cannot be read, for k < 1, if there is no
        index or it is damaged, and for a model that has changed or moved.
        """
        where = _checked(k, where)
        queries = list(query) if isinstance(query, list | tuple) else [query]
        while True:
            encoder = self._encoder_of_index()
            vector = encoder.combined(queries, weights)
            source = self._source()
            if self._is_of_this_index(encoder):  # else it was replaced meanwhile
                return self._with_captions(best_hits(source, vector, k, where))

    def like(self, hit: Hit | str, k: int = 10, *, where: Where | None = None) -> list[Hit]:
        """Return the k best hits for a moment of this index, without the hit that it is in.

        hit: a hit, or a moment's id. Raises ValueError if this index has no such moment.
        """
        where = _checked(k, where)
        moment, vector = self._moment(hit.moment.id if isinstance(hit, Hit) else hit)
        vector = (vector / np.linalg.norm(vector)).astype(np.float32)
        found = best_hits(self._source(), vector, k + 1, where)
        return self._with_captions([x for x in found if not _within(moment, x)][:k])

    def moment(self, id: str) -> Moment:
        """Return a moment by its id. Raises ValueError if this index has no such moment."""
        return self._moment(id)[0]

    def videos(self, where: Where | None = None) -> list[FileState]:
        """Return the state of every file, by path."""
        return sorted(self.store.files(_checked(1, where)).values(), key=lambda file: file.path)

    def remove(self, path: str | Path) -> int:
        """Remove a file, or all files in a folder and below. Return the number of moments removed.

        The files themselves are not touched; they need not exist any more.
        """
        here = os.path.abspath(path)
        inside = self.store.files(Where(folder=here))
        return self.store.drop([*inside, here])

    @property
    def about(self) -> About:
        """The model of the index, and what was embedded."""
        return self._current()[1]

    @property
    def count(self) -> int:
        """Number of moments."""
        return self.store.count()

    @property
    def captions(self) -> int:
        """Number of moments that have a caption."""
        return self.store.captioned()

    @property
    def store(self) -> stored.Store:
        """The tables of the index, opened when first needed. Raises ValueError without an index."""
        return self._current()[0]

    def _current(self) -> tuple[stored.Store, About]:
        with self._lock:
            about = None if self._store is None else self._store.about_if_same()
            if self._store is None or about is None:
                self._memory = None
                migrate(self.where)
                self._store = stored.Store.open(self.where)
                about = self._store.about
            self._about = about
            return self._store, about

    def _with_captions(self, hits: list[Hit]) -> list[Hit]:
        """Return hits with the captions that the index has of them."""
        keys = [key_of(hit.moment.file, hit.start, hit.end) for hit in hits]
        texts = self.store.captions.of(keys)
        return [replace(hit, caption=texts.get(key)) for hit, key in zip(hits, keys, strict=True)]

    def _encoder_of_index(self) -> Encoder:
        with self._lock:
            about = self.about
            if self._encoder is None or not self._is_of_this_index(self._encoder):
                self._encoder = Encoder(about, by_torch=self.in_memory)
            return self._encoder

    def _is_of_this_index(self, encoder: Encoder) -> bool:
        """Whether an encoder has the model of the index as it was last looked at."""
        return self._about is not None and encoder.about[:3] == self._about[:3]  # sources may grow

    def _moment(self, id: str) -> tuple[Moment, np.ndarray]:
        try:
            return self.store.moment(id)
        except KeyError:
            raise ValueError(
                f"the index in {shown(self.where)} has no moment {shown(repr(id))}; expected an id "
                "of one that a search returned: 16 hexadecimal digits"
            ) from None

    def _source(self) -> "OnDisk | Memory":
        """Return where to search: in memory if that is wanted and the index fits, else on disk."""
        with self._lock:
            store = self.store
            if not self.in_memory:
                return OnDisk(store)
            version = store.version()
            known = self._memory
            if known is None or (known[0] != version and time.monotonic() >= self._reload_from):
                self._memory = None  # makes room for the new one
                self._memory = version, self._read(store)
            assert self._memory is not None
            return self._memory[1] or OnDisk(store)

    def _read(self, store: stored.Store) -> "Memory | None":
        """Read the index into memory; None if it is too large for exact search."""
        from clipvip.index.memory import Memory

        began = time.monotonic()
        fits = store.count() <= stored.EXACT_ROWS
        memory = Memory(store.everything()) if fits else None
        took = time.monotonic() - began
        self._reload_from = began + took / RELOAD_SHARE
        return memory


class OnDisk:
    """A source of hits (see clipvip.index.hits) that reads the tables in each search."""

    def __init__(self, store: stored.Store) -> None:
        self._store = store

    def candidates(
        self, vector: np.ndarray, most: int, where: Where | None
    ) -> tuple[list[str], np.ndarray]:
        """Return the files of the `most` nearest moments, and their scores."""
        moments, scores = self._store.nearest(vector, most, where)
        return [moment.file.path for moment in moments], scores

    def curves(self, vector: np.ndarray, paths: Sequence[str]) -> list[Curve]:
        """Return the curves of these files."""
        moments, vectors = self._store.of_files(paths)
        scores = scores_of(vectors, vector.astype(np.float64))
        found, row = [], 0
        for _, same in groupby(moments, key=lambda moment: moment.file.path):
            own = list(same)
            spans = np.array([(moment.start, moment.end) for moment in own], np.float64)
            part = scores[row : row + len(own)]
            found.append(Curve(own[0].file, spans[:, 0], spans[:, 1], part))
            row += len(own)
        return found


def _within(moment: Moment, hit: Hit) -> bool:
    """Whether a moment lies in the stretch of a hit."""
    begins = (hit.from_ or 0.0) <= (moment.start or 0.0)
    ends = hit.to is None or (moment.end is not None and moment.end <= hit.to)
    return hit.path == moment.file.path and begins and ends


def _checked(k: Any, where: Where | None) -> Where | None:
    """Return a filter with the folder as the index names it. Raises ValueError for numbers with
    which nothing can be searched."""
    if not isinstance(k, int) or not 1 <= k <= MOST_HITS:
        raise ValueError(f"k is {k!r}; expected 1 to {MOST_HITS}")
    for limit in fields(where) if where is not None else ():
        value = getattr(where, limit.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{limit.name} is {value}; expected a finite number")
    if where is None or where.folder is None:
        return where
    return replace(where, folder=os.path.abspath(where.folder))
