"""Keep an index of moments in LanceDB tables, in a folder or a bucket.

An index consists of three tables:

    about      rows of one JSON text each: the format, the model and sources; the last one says
               where the model is, and the sources of all count. `made` is random, and tells an
               index from one made in its place.
    moments    one row per moment: its file's state, its span, and a unit vector in float16
    bad_files  files that could not be decoded, and why

Every change is one commit of LanceDB: it is there whole, or not at all. Several processes may
change and read an index at once. Each change of a file's moments gives them a new mark, `put`. If
two processes put the same file at the same moment, both sets of its rows can get in. The later mark
wins: the second process deletes the other set as soon as it has committed, and readers leave it
out.

Up to EXACT_ROWS moments, a search compares every vector. In larger collections it reads one bit per
value (RaBitQ, arXiv 2405.12497) and compares the best of these exactly.

An index may come from a stranger. So the tables' columns are compared with those expected, and
every value that is read is checked. Paths are stored with all bytes that could end an SQL text
escaped (see `encoded`).
"""

import errno
import hashlib
import json
import math
import os
import random
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np

from clipvip.files import check_folder, only_run, shown
from clipvip.index.rows import About, FileState, Moment, Where

FORMAT = 3
EXACT_ROWS = 1_000_000  # up to here every vector is compared; reading them takes about a second
KEPT = timedelta(hours=1)  # a reader is at most one search behind, and none takes that long
COMMITS = 30  # attempts, with pauses that grow to a second
MOST_VALUES = 1 << 16  # per vector
PATHS_AT_ONCE = 1000  # in one SQL condition
TABLES = ("moments", "bad_files", "about")  # a folder with the last one is an index

# Two processes that compact at once, or one that changes rows while another compacts them.
_CONFLICT = re.compile(r"conflict|concurrent|retryable|preempted", re.IGNORECASE)
_PLACE = re.compile(r", /\S+:\d+(:\d+)?")  # in LanceDB's sources
_SYSTEM = re.compile(r"os error (\d+)")
# What a path may hold that an SQL text cannot, or that no UTF-8 text can.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f%'\"\\\ud800-\udfff]")

Span = tuple[float | None, float | None]


class StoreError(ValueError):
    """An error in an index, or in what was asked of it, in one line."""


class Rows(NamedTuple):
    """All moments of an index, as columns.

    files: every file. file: int32 [n], each row's number in `files`. start, end: float64 [n],
    seconds, NaN for None. vectors: float16 [n, P].
    """

    files: list[FileState]
    file: np.ndarray
    start: np.ndarray
    end: np.ndarray
    vectors: np.ndarray


def moment_id(path: str, start: float | None, end: float | None) -> str:
    """Return 16 hexadecimal digits that stand for a span of a file."""
    text = f"{encoded(path)}\n{_number(start)}\n{_number(end)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encoded(path: str) -> str:
    """Return a path as the tables hold it.

    Quotes, backslashes, control characters, bytes that are not UTF-8, and % become %XX. What two
    paths begin with in common, their encoded forms do too.
    """
    try:
        return _UNSAFE.sub(lambda found: "".join(map("%{:02X}".format, _bytes(found[0]))), path)
    except UnicodeEncodeError:
        raise StoreError(f"{shown(path)!r} is no path: it holds half of a character") from None


def decoded(path: str) -> str:
    """Return the path that `encoded` was given."""
    return os.fsdecode(unquote_to_bytes(path))


def _bytes(letter: str) -> bytes:
    return letter.encode("utf-8", "surrogateescape")


class Store:
    """The tables of an index, opened by `Store.open` or `Store.create`.

    Methods that read see what other processes have committed. Every method raises ValueError if
    the tables are damaged, and OSError if they cannot be written.
    """

    def __init__(self, where: str, database: Any) -> None:
        self.where = where
        self._database = database
        self._about = self._table("about", _about_schema())
        stored, self._made = self._read()
        self._width = stored.width
        self._moments = self._table("moments", _moments_schema(self._width))
        self._bad_files = self._table("bad_files", _bad_files_schema())

    @classmethod
    def open(cls, where: str | Path) -> "Store":
        """Open an index.

        where: a folder, or the URI of one in a bucket, such as s3://bucket/index.
        Raises ValueError if there is no index, or if it is damaged or of a newer format.
        """
        name = os.fspath(where)
        if not is_index(name):
            raise StoreError(
                f"no index in {shown(name)}; make one: "
                f"clipvip embed MODEL VIDEOS --out {shown(shlex.quote(name))}"
            )
        return cls(name, _connect(name))

    @classmethod
    def create(cls, where: str | Path, about: About) -> "Store":
        """Open an index, or create it, and add `about.sources` to its sources.

        A model of the same fingerprint may have moved: its place is then `about.model`.

        Raises ValueError if the folder holds something else, or if the index there is of another
        model.
        """
        name = os.fspath(where)
        _check_width(about.width, name)
        check_place(name)
        database = _connect(name)
        with _alone(name), _reported(name):
            # The table `about` comes first: of two processes that begin at once, one makes it, and
            # the other compares its model with that one's.
            made = secrets.token_hex(8)
            table = _make(database, "about", _about_schema(), _about_row(about, made))
            stored, made = _parse_about(name, table.to_arrow())
            _check_model(name, stored, about)
            _make(database, "moments", _moments_schema(about.width))
            _make(database, "bad_files", _bad_files_schema())
        store = cls(name, database)
        if stored.model != about.model or not set(about.sources) <= set(stored.sources):
            with _reported(name):
                _committed(store._about.add, _about_row(about, made))
        return store

    def _table(self, name: str, schema: Any) -> Any:
        with _reported(self.where):
            table = _opened(self._database, name)
            if table is None:
                raise StoreError(
                    f"the index in {shown(self.where)} lacks its table {name}: its first build has "
                    "just begun or was killed; run the same clipvip embed again"
                )
            if table.schema.names != schema.names or table.schema.types != schema.types:
                raise _damaged(self.where, f"table {name} has other columns than expected")
            # It can name functions that LanceDB runs when rows are added: with any model, from
            # anywhere.
            if table.schema.metadata:
                raise _damaged(self.where, f"table {name} has notes that clipvip embed never makes")
            return table

    @property
    def about(self) -> About:
        """What the index says of itself, read now."""
        return self._read()[0]

    def about_if_same(self) -> About | None:
        """Return the same, or None if the index was deleted since it was opened, and perhaps made
        again."""
        try:
            about, made = self._read()
        except StoreError:  # opening it again says what is wrong
            return None
        return about if made == self._made else None

    def _read(self) -> tuple[About, str]:
        with _reported(self.where):
            return _parse_about(self.where, self._about.to_arrow())

    def version(self) -> int:
        """Return a number that grows with every change of the moments."""
        with _reported(self.where):
            return int(self._moments.version)

    def count(self, where: Where | None = None) -> int:
        """Return the number of moments."""
        with _reported(self.where):
            return int(self._moments.count_rows(_condition(where)))

    def files(self, where: Where | None = None) -> dict[str, FileState]:
        """Return the state of every file, by its path."""
        first = " and ".join(filter(None, ("number = 0", _condition(where))))
        with _reported(self.where):
            table = self._moments.search().where(first).select(["put", *_FILE]).to_arrow()
            rows = zip(table["put"].to_pylist(), self._states(table), strict=True)
            return {state.path: state for _, state in sorted(rows, key=lambda row: row[0])}

    def put(self, files: Sequence[tuple[FileState, Sequence[Span], np.ndarray]]) -> None:
        """Replace all moments of these files, in one commit.

        files: state, spans and unit vectors [n, P] of each file, with at least one span.
        Raises ValueError for values that no index may hold, such as vectors that are not finite.
        """
        if files:
            paths = [state.path for state, _, _ in files]
            self._replace(self._as_table(files), paths)

    def move(self, moves: Mapping[str, FileState]) -> set[str]:
        """Give files another state, such as another path, and keep their vectors; in one commit.

        moves: the new state of the file at each path, with the same content. Rows of other files
        at the new paths are replaced. Return the new paths of the files whose content was here.
        """
        return self._derive(list(moves.items()), moves=True)

    def copy(self, copies: Sequence[tuple[str, FileState]]) -> set[str]:
        """Add files whose content equals that of stored ones, with the same vectors; in one commit.

        copies: the path of a stored file, and the state of the new one.
        Return the new paths of those whose content was here.
        """
        return self._derive(copies, moves=False)

    def drop(self, paths: Iterable[str]) -> int:
        """Delete all moments of these files. Return how many there were."""
        dropped = 0
        with _reported(self.where):
            for some in _chunks(list(paths)):
                result = _committed(self._moments.delete, _in(some))
                dropped += int(result.num_deleted_rows)
        return dropped

    def nearest(
        self, vector: np.ndarray, k: int, where: Where | None = None
    ) -> tuple[list[Moment], np.ndarray]:
        """Return the k moments nearest to a unit vector [P], best first, and their scores [k].

        A score is the dot product with the stored vector, in float32. Among equal scores, order is
        by path and start. There are fewer than k where fewer moments exist.

        If at most EXACT_ROWS moments pass the filter, the result is exact. Else it comes from the
        approximate index, if `tidy` has made one; only the scores are exact then.
        """
        query = _checked_query(vector, self._width)
        if k < 1:
            raise StoreError(f"k is {k}; expected at least 1")
        condition = _condition(where)
        with _reported(self.where):
            rows = int(self._moments.count_rows())
            if condition and rows > EXACT_ROWS:
                rows = int(self._moments.count_rows(condition))
            return self._nearest(query, k, condition, rows <= EXACT_ROWS)

    def _nearest(
        self, query: np.ndarray, k: int, condition: str | None, exact: bool
    ) -> tuple[list[Moment], np.ndarray]:
        # LanceDB rounds the query to float16, as the vectors are. Its scores may be wrong by:
        slack = float(np.linalg.norm(query - query.astype(np.float16).astype(np.float32))) + 1e-5
        most = k + 16
        while True:
            search = self._moments.search(query, vector_column_name="vector")
            search = search.distance_type("dot").limit(most).select([*_ROW, "vector", "_distance"])
            if condition:
                search = search.where(condition, prefilter=True)
            if exact:
                search = search.bypass_vector_index()
            else:
                search = search.nprobes(MOST_PARTITIONS).refine_factor(REFINED)
            table = search.to_arrow()
            vectors = self._vectors(table)
            scores = vectors @ query
            best = self._distinct(table, scores)
            enough = len(best) >= k
            if enough and exact and table.num_rows == most:
                least = 1 - max(table["_distance"].to_pylist())
                enough = scores[best[k - 1]] > least + slack
            if enough or table.num_rows < most:
                best = best[:k]
                return self._moments_of(table.take(np.array(best, np.int64))), scores[best].astype(
                    np.float32
                )
            most *= 4

    def _distinct(self, table: Any, scores: np.ndarray) -> list[int]:
        """Return the rows of a table by descending score, each moment once."""
        paths, numbers = table["path"].to_pylist(), table["number"].to_pylist()
        ids = table["id"].to_pylist()
        order = sorted(range(len(ids)), key=lambda i: (-scores[i], paths[i], numbers[i]))
        first = {ids[row]: row for row in reversed(order)}
        return [row for row in order if first[ids[row]] == row]

    def of_files(self, paths: Sequence[str]) -> tuple[list[Moment], np.ndarray]:
        """Return all moments of these files, in the order of `paths` and of their spans, and their
        vectors, float32 [n, P]."""
        with _reported(self.where):
            table = self._of_files(paths)
            place = {encoded(path): i for i, path in reversed(list(enumerate(paths)))}
            numbers = table["number"].to_pylist()
            places = [place[path] for path in table["path"].to_pylist()]
            order = sorted(range(len(numbers)), key=lambda i: (places[i], numbers[i]))
            table = table.take(np.array(order, np.int64))
            return self._moments_of(table), self._vectors(table)

    def moment(self, id: str) -> tuple[Moment, np.ndarray]:
        """Return a moment by its id, and its vector, float32 [P]. Raises KeyError."""
        if not _ID.fullmatch(id):
            raise KeyError(id)
        with _reported(self.where):
            search = self._moments.search().where(f"id = '{id}'").select([*_ROW, "vector"])
            table = search.limit(1).to_arrow()
            if not table.num_rows:
                raise KeyError(id)
            return self._moments_of(table)[0], self._vectors(table)[0]

    def everything(self) -> Rows:
        """Read all moments into memory: 2 bytes per value of a vector, and little else."""
        with _reported(self.where):
            return self._everything()

    def _everything(self) -> Rows:
        # A version that stays the same while its two parts are read.
        table = self._database.open_table("moments")
        table.checkout(table.version)
        n = int(table.count_rows())
        vectors = np.empty((n, self._width), np.float16)
        start, end = np.empty(n), np.empty(n)
        paths: dict[str, int] = {}
        file, number = np.empty(n, np.int32), np.empty(n, np.int32)
        puts: dict[str, int] = {}
        put = np.empty(n, np.int32)
        at = 0
        columns = ["put", "path", "number", "start", "end", "vector"]
        for batch in table.search().select(columns).to_batches(8192):
            rows = slice(at, at + batch.num_rows)
            if rows.stop > n:
                raise _damaged(self.where, "it has more rows than it says")
            at = rows.stop
            file[rows] = _numbered(batch["path"], paths)
            put[rows] = _numbered(batch["put"], puts)
            number[rows] = batch["number"].to_numpy()
            for name, column in (("start", start), ("end", end)):
                column[rows] = batch[name].to_numpy(zero_copy_only=False)
            vectors[rows] = _matrix(batch["vector"], self._width)
        if at < n:
            raise _damaged(self.where, "it has fewer rows than it says")
        first = table.search().where("number = 0").select(["put", *_FILE]).to_arrow()
        latest: dict[str, tuple[str, int]] = {}
        for row, (path, mark) in enumerate(
            zip(first["path"].to_pylist(), first["put"].to_pylist(), strict=True)
        ):
            latest[path] = max(latest.get(path, ("", 0)), (mark, row))
        if latest.keys() != paths.keys():
            raise _damaged(self.where, "some files lack their first moment")
        states = self._states(first.take(np.array([latest[path][1] for path in paths], np.int64)))
        wanted = np.array([puts[latest[path][0]] for path in paths], np.int64)
        keep = put == wanted[file] if n else np.ones(0, bool)
        order = np.lexsort((number, file))
        order = order[keep[order]]
        if not keep.all() or (order[1:] < order[:-1]).any():  # else spare the copy of all vectors
            file, start, end, vectors = file[order], start[order], end[order], vectors[order]
        for block in range(0, len(vectors), 1024):
            self._check_unit(vectors[block : block + 1024].astype(np.float32))
        if not ((start >= 0) | np.isnan(start)).all() or (end < start).any() or np.isinf(end).any():
            raise _damaged(self.where, "a span ends before it starts")
        return Rows(states, file, start, end, vectors)

    def bad_files(self) -> list[dict[str, str]]:
        """Return {"path", "reason"} of every file that could not be decoded, by path."""
        with _reported(self.where):
            table = self._bad_files.to_arrow()
            rows = zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True)
            reasons = {decoded(path): decoded(reason) for path, reason in rows}
            return [{"path": path, "reason": reasons[path]} for path in sorted(reasons)]

    def put_bad_files(self, considered: Iterable[str], bad: Sequence[Mapping[str, str]]) -> None:
        """Replace what is known of the files that a build considered by those that were bad."""
        import pyarrow as pa

        before = {file["path"]: file["reason"] for file in self.bad_files()}
        now = {file["path"]: file["reason"] for file in bad}
        gone = [path for path in before.keys() & set(considered) if path not in now]
        new = {path: reason for path, reason in now.items() if before.get(path) != reason}
        with _reported(self.where):
            for some in _chunks([*gone, *(path for path in new if path in before)]):
                _committed(self._bad_files.delete, _in(some))
            if new:
                texts = [list(map(encoded, column)) for column in (new, new.values())]
                table = pa.table(texts, schema=_bad_files_schema())
                _committed(self._bad_files.add, table)

    def tidy(self) -> None:
        """Compact the tables, delete duplicates and versions that nobody reads any more, and make
        or extend the approximate index of a large collection."""
        with _reported(self.where):
            self._delete_duplicates()
            self._index_columns()
            for table in (self._about, self._bad_files, self._moments):
                try:
                    _committed(
                        table.optimize, cleanup_older_than=KEPT
                    )  # and adds rows to the index
                except Exception as error:
                    if not _CONFLICT.search(str(error)):  # else the next process tidies
                        raise

    def _index_columns(self) -> None:
        """Make what a large table is searched by: sorted paths and ids, and the approximate index
        of vectors; the latter again after most of its rows are new."""
        from lancedb.index import BTree, IvfRq

        rows = int(self._moments.count_rows())
        if rows <= EXACT_ROWS:
            return
        indices = self._moments.list_indices()
        for column in ("path", "id"):
            if not any(column in index.columns for index in indices):
                _committed(self._moments.create_index, column, config=BTree())
        if self._width % 8:  # which an approximate index needs
            return
        known = [index for index in indices if "vector" in index.columns]
        if known and 2 * known[0].num_indexed_rows >= rows:
            return
        partitions = max(1, min(MOST_PARTITIONS, rows // PARTITION_ROWS))
        config = IvfRq(distance_type="dot", num_partitions=partitions, max_iterations=20)
        _committed(self._moments.create_index, "vector", config=config, replace=True)

    def _delete_duplicates(self, among: str | None = None) -> None:
        """Delete the rows of files that were put twice, except for the latest."""
        first = " and ".join(filter(None, ("number = 0", among)))
        table = self._moments.search().where(first).select(["path", "put"]).to_arrow()
        latest: dict[str, str] = {}
        earlier: set[str] = set()
        rows = zip(table["put"].to_pylist(), table["path"].to_pylist(), strict=True)
        for put, path in sorted(rows):
            if path in latest:
                earlier.add(f"(path = {_text(path)} and put = {_text(latest[path])})")
            latest[path] = put
        for some in _chunks(sorted(earlier)):
            _committed(self._moments.delete, " or ".join(some))

    def _replace(self, table: Any, paths: Sequence[str]) -> None:
        """Put the rows of a table, and delete all others of these paths, in one commit."""
        gone = _in(paths)
        with _reported(self.where):
            before = self._moments.version
            if self._moments.count_rows(gone):
                # No stored row has this mark, so every row is new.
                merge = self._moments.merge_insert("put").when_not_matched_insert_all()
                merge = merge.when_not_matched_by_source_delete(gone)
                result = _committed(merge.execute, table)
            else:  # a merge reads the whole table, which a large index should not do for new files
                result = _committed(self._moments.add, table)
            if result.version != before + 1:  # another process has committed meanwhile
                for some in _chunks(paths):
                    self._delete_duplicates(_in(some))

    def _derive(self, new: Sequence[tuple[str, FileState]], moves: bool) -> set[str]:
        with _reported(self.where):
            rows = self._of_files([path for path, _ in new])
            vectors = self._vectors(rows)
            starts, ends = rows["start"].to_pylist(), rows["end"].to_pylist()
            numbers, paths = rows["number"].to_pylist(), rows["path"].to_pylist()
            contents = rows["content"].to_pylist()
        # Another process may have put another content at a path meanwhile.
        found: dict[tuple[str, str], list[int]] = {}
        for row in sorted(range(len(paths)), key=numbers.__getitem__):
            found.setdefault((paths[row], contents[row]), []).append(row)
        files, gone = [], []
        for path, state in new:
            if own := found.get((encoded(path), encoded(state.content))):
                files.append((state, [(starts[row], ends[row]) for row in own], vectors[own]))
                gone += [path] * moves
        if files:
            done = [state.path for state, _, _ in files]
            self._replace(self._as_table(files), [*gone, *done])
        return {state.path for state, _, _ in files}

    def _of_files(self, paths: Sequence[str]) -> Any:
        """Return the rows of these files as one table, without those of earlier puts."""
        import pyarrow as pa

        parts = []
        for some in _chunks(list(dict.fromkeys(paths))):
            search = self._moments.search().where(_in(some)).select([*_ROW, "put", "vector"])
            parts.append(search.to_arrow())
        if not parts:
            return _moments_schema(self._width).empty_table()
        table = pa.concat_tables(parts)
        puts, names = table["put"].to_pylist(), table["path"].to_pylist()
        latest: dict[str, str] = {}
        for path, put in zip(names, puts, strict=True):
            latest[path] = max(put, latest.get(path, ""))
        keep = [latest[path] == put for path, put in zip(names, puts, strict=True)]
        return table if all(keep) else table.filter(pa.array(keep))

    def _as_table(self, files: Sequence[tuple[FileState, Sequence[Span], np.ndarray]]) -> Any:
        """Return new rows of these files. Raises ValueError for values that no index may hold."""
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in (*_ROW, "put")}
        # Later marks are greater.
        put = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        for state, spans, vectors in files:
            shape = (len(spans), self._width)
            if not spans or np.shape(vectors) != shape:
                raise StoreError(
                    f"{shown(state.path)} has {len(spans)} spans and vectors "
                    f"{list(np.shape(vectors))}; expected at least 1 and [n, {self._width}]"
                )
            if not (_is_sound(state) and all(map(_is_span, spans)) and _are_unit(vectors)):
                raise StoreError(
                    f"{shown(state.path)} has a value that no index may hold; expected finite "
                    "numbers, spans that end after they start, and unit vectors"
                )
            for number, (start, end) in enumerate(spans):
                columns["id"].append(moment_id(state.path, start, end))
                columns["number"].append(number)
                columns["start"].append(start)
                columns["end"].append(end)
            for name in _FILE:
                value = getattr(state, name)
                columns[name] += [encoded(value) if isinstance(value, str) else value] * len(spans)
            columns["put"] += [put] * len(spans)
        values = np.concatenate([np.asarray(x, np.float32) for *_, x in files]).astype(np.float16)
        schema = _moments_schema(self._width)
        arrays = [pa.array(columns[x.name], x.type) for x in schema if x.name != "vector"]
        vector = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self._width)
        return pa.table([*arrays, vector], schema=schema)

    def _states(self, table: Any) -> list[FileState]:
        columns = [table[name].to_pylist() for name in _FILE]
        states = [
            FileState(decoded(path), size, mtime_ns, decoded(content), decoded(plan), *times)
            for path, size, mtime_ns, content, plan, *times in zip(*columns, strict=True)
        ]
        if not all(map(_is_sound, states)):
            raise _damaged(self.where, "the state of a file has values out of range")
        return states

    def _moments_of(self, table: Any) -> list[Moment]:
        ids, starts, ends = (table[name].to_pylist() for name in ("id", "start", "end"))
        moments = [
            Moment(id, state, start, end)
            for id, state, start, end in zip(ids, self._states(table), starts, ends, strict=True)
        ]
        for moment in moments:
            start, end = moment.start, moment.end
            if not _is_span((start, end)) or moment.id != moment_id(moment.file.path, start, end):
                raise _damaged(self.where, f"moment {shown(moment.id)} is not what its id says")
        return moments

    def _vectors(self, table: Any) -> np.ndarray:
        vectors = [_matrix(part, self._width) for part in table["vector"].chunks]
        empty = np.empty((0, self._width), np.float16)
        values = np.concatenate([empty, *vectors]).astype(np.float32)
        self._check_unit(values)
        return values

    def _check_unit(self, vectors: np.ndarray) -> None:
        if not _are_unit(vectors):
            raise _damaged(self.where, "not all of its vectors are unit vectors")


# Columns of the table `moments`: those of a file, in the order of FileState, and those of a span.
_FILE = ("path", "size", "mtime_ns", "content", "plan", "duration", "date")
_SPAN = ("id", "number", "start", "end")
_ROW = (*_FILE, *_SPAN)
_ID = re.compile(r"[0-9a-f]{16}")

# The approximate index holds one bit per value of a vector. A search reads all of it, as texts lie
# far from all videos and so between partitions, and compares REFINED * k moments exactly. More
# partitions make the bits more exact, and the index slower to make.
PARTITION_ROWS, MOST_PARTITIONS, REFINED = 10_000, 256, 40


def _moments_schema(width: int) -> Any:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    of_file = zip(_FILE, (text, whole, whole, text, text, real, real), strict=True)
    return pa.schema(
        [
            pa.field("put", text, nullable=False),
            *(pa.field(name, kind, nullable=False) for name, kind in of_file),
            pa.field("id", text, nullable=False),
            pa.field("number", pa.int32(), nullable=False),
            pa.field("start", real),
            pa.field("end", real),
            pa.field("vector", pa.list_(pa.float16(), width), nullable=False),
        ]
    )


def _bad_files_schema() -> Any:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("path", "reason")])


def _about_schema() -> Any:
    import pyarrow as pa

    return pa.schema([pa.field("json", pa.string(), nullable=False)])


def _about_row(about: About, made: str) -> Any:
    import pyarrow as pa

    # ASCII, so that names that are not UTF-8 are escaped.
    text = json.dumps({"format": FORMAT, "made": made, **about._asdict()})
    return pa.table([[text]], schema=_about_schema())


def _parse_about(where: str, table: Any) -> tuple[About, str]:
    """Join the rows of `about`: the model as last seen, and all sources. Return this, and what
    tells the index from another one that is made in its place. Raises ValueError."""
    if table.schema.names != _about_schema().names or not table.num_rows:
        raise _damaged(where, "its table about has other columns than expected, or no row")
    rows, made = [], set()
    for text in table["json"].to_pylist():
        try:
            row = json.loads(text)
            number = row.pop("format")
            if type(number) is int and number > FORMAT:
                raise StoreError(
                    f"the index in {shown(where)} has format {number}; this version reads up to "
                    f"{FORMAT}: install a newer clipvip, or make the index again with another --out"
                )
            made.add(row.pop("made", ""))
            about = About(**row)._replace(sources=tuple(row["sources"]))
        except (TypeError, KeyError, AttributeError, RecursionError, json.JSONDecodeError):
            raise _damaged(where, "its table about is not from clipvip embed") from None
        texts = (about.model, about.fingerprint, *about.sources)
        if number != FORMAT or not all(isinstance(text, str) for text in texts):
            raise _damaged(where, "its table about is not from clipvip embed")
        _check_width(about.width, where)
        rows.append(about)
    if len({(row.fingerprint, row.width) for row in rows}) > 1 or len(made) > 1:
        raise _damaged(where, "it names several models")
    sources = dict.fromkeys(source for row in rows for source in row.sources)
    return rows[-1]._replace(sources=tuple(sources)), made.pop()


def _check_width(width: object, where: str) -> None:
    if type(width) is not int or not 1 <= width <= MOST_VALUES:
        raise _damaged(where, f"vectors of {width!r} values; expected 1 to {MOST_VALUES}")


def _check_model(where: str, stored: About, given: About) -> None:
    if stored.fingerprint == given.fingerprint and stored.width == given.width:
        return
    here, model = shown(where), shown(given.model)
    changed = f"the model {model} has changed since {here} was made with it"
    other = f"{here} is an index made with the model {shown(stored.model)}, not {model}"
    what = changed if stored.model == given.model else other
    raise StoreError(f"{what}; give another --out, or delete it")


def is_index(where: str | Path) -> bool:
    """Whether a folder or bucket holds an index, of any version from this format on."""
    name = os.fspath(where)
    if not _is_uri(name):
        return os.path.isdir(os.path.join(_local(name), "about.lance"))
    with _reported(name):
        return "about" in _tables(_connect(name))


def check_place(where: str | Path) -> None:
    """Raise ValueError if an index made there would harm what is in it."""
    name = os.fspath(where)
    if not _is_uri(name):
        check_folder(Path(_local(name)), "an index", lambda: is_index(name))


def _is_uri(where: str) -> bool:
    return "://" in where and not where.startswith("file://")


def _local(where: str) -> str:
    return os.path.abspath(where.removeprefix("file://"))


def _connect(where: str) -> Any:
    # What it warns of, such as two processes that compact at once, this module retries.
    os.environ.setdefault("LANCEDB_LOG", "error")
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise StoreError(  # which commands show as one line
            f'an index needs the package {error.name}: pip install "clipvip[search]"'
        ) from None
    uri = where if _is_uri(where) else _local(where)
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise StoreError(
            f"{shown(where)} is not UTF-8, which LanceDB needs; give another folder"
        ) from None
    with _reported(where):
        # Look for what other processes have committed before each read.
        return lancedb.connect(uri, read_consistency_interval=timedelta(0))


def _tables(database: Any) -> list[str]:
    names: list[str] = []
    page = None
    while True:
        answer = database.list_tables(page_token=page)
        names += answer.tables
        page = answer.page_token
        if not page:
            return names


def _opened(database: Any, name: str) -> Any | None:
    """Open a table; None if it does not exist, or if the process that makes it has not committed it
    yet, or was killed before."""
    if name not in _tables(database):
        return None
    try:
        return database.open_table(name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        return None


@contextmanager
def _alone(where: str) -> Iterator[None]:
    """Let one process at a time create the tables of an index in a folder.

    Of two that create the same table at once, LanceDB 0.40 lets both succeed, and the rows that the
    first one has added meanwhile are lost.
    """
    if _is_uri(where):  # a bucket refuses to write a file that exists
        yield
        return
    with only_run(Path(_local(where)), "begins an index"):
        yield


def _make(database: Any, name: str, schema: Any, data: Any = None) -> Any:
    """Open a table, or create it."""
    if (table := _opened(database, name)) is not None:
        return table
    return database.create_table(name, data, schema=schema)


def _committed(change: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make a change, and again if other processes' changes came between."""
    for attempt in range(COMMITS):
        try:
            return change(*args, **options)
        except Exception as error:
            if attempt == COMMITS - 1 or not _CONFLICT.search(str(error)):
                raise
        time.sleep(random.uniform(0.5, 1) * min(1.0, 0.01 * 2**attempt))
    raise AssertionError


@contextmanager
def _reported(where: str) -> Iterator[None]:
    """Turn what LanceDB raises into one line that names the index."""
    try:
        yield
    except (StoreError, KeyError, MemoryError):
        raise
    except Exception as error:
        if _CONFLICT.search(str(error)):
            raise StoreError(
                f"other processes changed the index in {shown(where)} all the time; run the same "
                "command again"
            ) from error
        line = _PLACE.sub("", str(error).partition("\n")[0].removeprefix("lance error: "))
        number = int(found[1]) if (found := _SYSTEM.search(line)) else errno.ENOENT
        if number != errno.ENOENT:  # a full disk, for example; a missing file is damage
            raise OSError(number, os.strerror(number), where) from error
        raise _damaged(where, line) from error


def _damaged(where: str, why: str) -> StoreError:
    return StoreError(
        f"the index in {shown(where)} is damaged ({shown(why)}); make it again with clipvip embed "
        "and another --out"
    )


def _condition(where: Where | None) -> str | None:
    """Return a filter as an SQL condition, None if everything passes."""
    if where is None:
        return None
    parts = []
    if where.folder is not None:
        folder = encoded(where.folder.rstrip("/"))
        # All texts that begin with "folder/": the letter after "/" is "0".
        parts.append(f"path >= {_text(folder + '/')} and path < {_text(folder + '0')}")
    limits = [
        ("duration >=", where.min_duration),
        ("duration <=", where.max_duration),
        ("date >=", where.after),
        ("date <", where.before),
    ]
    for column, limit in limits:
        if limit is not None:
            if not math.isfinite(limit):
                raise StoreError(f"a filter's limit is {limit}; expected a finite number")
            parts.append(f"{column} {float(limit)!r}")
    return " and ".join(parts) or None


def _in(paths: Iterable[str]) -> str:
    return f"path in ({', '.join(_text(encoded(path)) for path in paths)})"


def _text(encoded_text: str) -> str:
    """Return an SQL text. Encoded texts hold no quotes, but a stranger's tables might."""
    return "'" + encoded_text.replace("'", "''") + "'"


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for at in range(0, len(values), PATHS_AT_ONCE):
        yield values[at : at + PATHS_AT_ONCE]


def _matrix(column: Any, width: int) -> np.ndarray:
    """Return a column of vectors as float16 [n, P]."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)


def _numbered(column: Any, numbers: dict[str, int]) -> np.ndarray:
    """Return the number of each text of a column, and give new texts the next ones."""
    distinct = column.dictionary_encode()
    texts = distinct.dictionary.to_pylist()
    own = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return own[distinct.indices.to_numpy()]


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _is_sound(state: FileState) -> bool:
    whole = (state.size, state.mtime_ns)
    real = (state.duration, state.date)
    return (
        all(isinstance(x, str) for x in (state.path, state.content, state.plan))
        and state.path != ""
        and all(isinstance(x, int) and -(2**63) <= x < 2**63 for x in whole)
        and state.size >= 0
        and all(isinstance(x, float | int) and math.isfinite(x) for x in real)
        and state.duration >= 0
    )


def _is_span(span: Span) -> bool:
    start, end = span
    if not all(x is None or (isinstance(x, float | int) and math.isfinite(x)) for x in span):
        return False
    return (start is None or start >= 0) and (end is None or end >= (start or 0))


def _are_unit(vectors: np.ndarray) -> bool:
    """Whether all vectors [n, P] are finite and have length 1, up to rounding to float16."""
    lengths = np.linalg.norm(np.asarray(vectors, np.float32), axis=-1)
    return bool((np.abs(lengths - 1) <= 2e-3).all())


def _checked_query(vector: np.ndarray, width: int) -> np.ndarray:
    query = np.asarray(vector, np.float32)
    if query.shape != (width,) or not _are_unit(query[None]):
        raise StoreError(
            f"a query of shape {list(query.shape)}; expected a unit vector of {width} values"
        )
    return query
