"""Keep an index of moments in LanceDB tables, in a folder or a bucket.

Every change is one commit of LanceDB: it is there whole, or not at all. Several processes may
change and read an index at once. Each change of a file's moments gives them a new mark, `put`. If
two processes put the same file at the same moment, both sets of its rows can get in. The later mark
wins: the second process deletes the other set as soon as it has committed, and readers leave it
out.

Up to EXACT_ROWS moments, a search compares every vector. In larger collections it reads four bits
per value (RaBitQ, arXiv 2409.09913) and compares the best of these exactly.
"""

import os
import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from clipvip.files import shown
from clipvip.index.captions import Captions
from clipvip.index.rows import About, FileState, Moment, Where
from clipvip.index.tables import (
    FILE,
    ID,
    KEY_CONTENT,
    ROW,
    Span,
    StoreError,
    about_row,
    about_schema,
    alone,
    are_unit,
    bad_files_schema,
    caption_key,
    check_model,
    check_place,
    check_width,
    checked_table,
    chunks,
    committed,
    compact,
    condition_of,
    connect,
    damaged,
    decoded,
    encoded,
    is_index,
    is_sound,
    is_span,
    moment_id,
    moments_schema,
    new_mark,
    open_or_create,
    parse_about,
    path_in,
    reported,
    sql_text,
)

EXACT_ROWS = 1_000_000  # up to here every vector is compared; reading them takes about a second


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


class Store:
    """The tables of an index, opened by `Store.open` or `Store.create`.

    Methods that read see what other processes have committed. Every method raises ValueError if
    the tables are damaged, and OSError if they cannot be written.
    """

    def __init__(self, where: str, database: Any) -> None:
        self.where = where
        self._database = database
        self._about = self._table("about", about_schema())
        stored, self._made = self._read()
        self._width = stored.width
        self._moments = self._table("moments", moments_schema(self._width))
        self._bad_files = self._table("bad_files", bad_files_schema())
        self.captions = Captions(where, database)
        self._captioned: tuple[tuple[int, int], int] | None = None  # of which versions

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
        return cls(name, connect(name))

    @classmethod
    def create(cls, where: str | Path, about: About) -> "Store":
        """Open an index, or create it, and add `about.sources` to its sources.

        A model of the same fingerprint may have moved: its place is then `about.model`.

        Raises ValueError if the folder holds something else, or if the index there is of another
        model.
        """
        name = os.fspath(where)
        check_width(about.width, name)
        check_place(name)
        database = connect(name)
        with alone(name), reported(name):
            # The table `about` comes first: of two processes that begin at once, one makes it, and
            # the other compares its model with that one's.
            made = secrets.token_hex(8)
            table = open_or_create(database, "about", about_schema(), about_row(about, made))
            stored, made = parse_about(name, table.to_arrow())
            check_model(name, stored, about)
            open_or_create(database, "moments", moments_schema(about.width))
            open_or_create(database, "bad_files", bad_files_schema())
        store = cls(name, database)
        if stored.model != about.model or not set(about.sources) <= set(stored.sources):
            with reported(name):
                committed(store._about.add, about_row(about, made))
        return store

    def _table(self, name: str, schema: Any) -> Any:
        table = checked_table(self.where, self._database, name, schema)
        if table is None:
            raise StoreError(
                f"the index in {shown(self.where)} lacks its table {name}: its first build has "
                "just begun or was killed; run the same clipvip embed again"
            )
        return table

    @property
    def about(self) -> About:
        """What the index says of itself, read now."""
        return self._read()[0]

    def about_if_same(self) -> About | None:
        """Return `about`, or None if the index was deleted since it was opened, and perhaps made
        again."""
        try:
            about, made = self._read()
        except StoreError:  # opening it again says what is wrong
            return None
        return about if made == self._made else None

    def _read(self) -> tuple[About, str]:
        with reported(self.where):
            return parse_about(self.where, self._about.to_arrow())

    def version(self) -> int:
        """Return a number that grows with every change of the moments."""
        with reported(self.where):
            return int(self._moments.version)

    def count(self, where: Where | None = None) -> int:
        """Return the number of moments."""
        with reported(self.where):
            return int(self._moments.count_rows(condition_of(where)))

    def files(self, where: Where | None = None) -> dict[str, FileState]:
        """Return the state of every file, by its path."""
        first = " and ".join(filter(None, ("number = 0", condition_of(where))))
        with reported(self.where):
            table = self._moments.search().where(first).select(["put", *FILE]).to_arrow()
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
        """Delete all moments of these files, and their captions. Return how many there were."""
        dropped = 0
        with reported(self.where):
            for some in chunks(list(paths)):
                keys = self.caption_keys(path_in(some)) if self.captions.exist() else None
                result = committed(self._moments.delete, path_in(some))
                dropped += int(result.num_deleted_rows)
                if keys is not None:
                    self.captions.drop(keys.to_pylist())
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
        condition = condition_of(where)
        with reported(self.where):
            rows = int(self._moments.count_rows())
            if condition and rows > EXACT_ROWS:
                rows = int(self._moments.count_rows(condition))
            return self._nearest(query, k, condition, rows <= EXACT_ROWS)

    def _nearest(
        self, query: np.ndarray, k: int, condition: str | None, exact: bool
    ) -> tuple[list[Moment], np.ndarray]:
        # LanceDB rounds the query to float16, as the vectors are. Its scores may be wrong by:
        slack = float(np.linalg.norm(query - query.astype(np.float16).astype(np.float32))) + 1e-5
        most = k + min(k, 4096) + 16  # neighbours in a film are nearly equal
        while True:
            search = self._moments.search(query, vector_column_name="vector")
            search = search.limit(most).select([*ROW, "vector", "_distance"])
            if condition:
                search = search.where(condition, prefilter=True)
            if exact:
                search = search.distance_type("dot").bypass_vector_index()
            else:
                compared = max(COMPARED, COMPARED_SHARE * most)
                search = (
                    search.distance_type(METRIC)
                    .nprobes(ALL_PARTITIONS)
                    .refine_factor(-(-compared // most))
                )
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
        with reported(self.where):
            table = self._of_files(paths)
            place = {encoded(path): i for i, path in reversed(list(enumerate(paths)))}
            numbers = table["number"].to_pylist()
            places = [place[path] for path in table["path"].to_pylist()]
            order = sorted(range(len(numbers)), key=lambda i: (places[i], numbers[i]))
            table = table.take(np.array(order, np.int64))
            return self._moments_of(table), self._vectors(table)

    def moment(self, id: str) -> tuple[Moment, np.ndarray]:
        """Return a moment by its id, and its vector, float32 [P]. Raises KeyError."""
        if not ID.fullmatch(id):
            raise KeyError(id)
        with reported(self.where):
            search = self._moments.search().where(f"id = '{id}'").select([*ROW, "vector"])
            table = search.limit(1).to_arrow()
            if not table.num_rows:
                raise KeyError(id)
            return self._moments_of(table)[0], self._vectors(table)[0]

    def moments(self, paths: Sequence[str]) -> list[Moment]:
        """Return all moments of these files, in any order."""
        with reported(self.where):
            return self._moments_of(self._of_files(paths, [*ROW, "put"]))

    def caption_keys(self, condition: str | None = None) -> Any:
        """Return the keys that captions of the moments have, as an array of Arrow."""
        import pyarrow as pa

        with reported(self.where):
            search = self._moments.search().select(["id", "content"])
            batches = (search.where(condition) if condition else search).to_batches(8192)
            keys = [_caption_keys(batch) for batch in batches]
            return pa.concat_arrays(keys) if keys else pa.array([], pa.string())

    def moments_per_file(self, described: bool = True) -> dict[str, int]:
        """Return the number of moments of each file that has any.

        described: whether moments that have a caption count too.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        keys, paths = [], []
        with reported(self.where):
            columns = ["id", "content", "path"]
            for batch in self._moments.search().select(columns).to_batches(8192):
                keys.append(_caption_keys(batch))
                paths.append(batch["path"].dictionary_encode())
        if not paths:
            return {}
        every = pa.chunked_array(paths)
        if not described:
            has = pc.is_in(pa.chunked_array(keys), value_set=self.captions.keys())
            every = every.filter(pc.invert(has))
        counts = every.cast(pa.string()).value_counts().to_pylist()
        return {decoded(pair["values"]): pair["counts"] for pair in counts}

    def annotate(self, texts: Mapping[str, str]) -> int:
        """Bring the captions from annotations up to date, as Captions.annotate does for those keys
        that are moments. Return the number of other keys that have a text."""
        import pyarrow as pa
        import pyarrow.compute as pc

        keys = pa.array([*texts], pa.string())
        held = pc.is_in(keys, value_set=self.caption_keys()).to_pylist()
        own = {key: texts[key] for key, is_moment in zip(texts, held, strict=True) if is_moment}
        self.captions.annotate(own)
        return sum(1 for key, text in texts.items() if text and key not in own)

    def captioned(self) -> int:
        """Return the number of moments that have a caption."""
        import pyarrow.compute as pc

        if not self.captions.exist():
            return 0
        versions = self.version(), self.captions.version()
        if self._captioned is None or self._captioned[0] != versions:
            has = pc.is_in(self.caption_keys(), value_set=self.captions.keys())
            self._captioned = versions, pc.sum(has).as_py() or 0
        return self._captioned[1]

    def everything(self) -> Rows:
        """Read all moments into memory: 2 bytes per value of a vector, and little else."""
        with reported(self.where):
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
                raise damaged(self.where, "it has more rows than it says")
            at = rows.stop
            file[rows] = _numbered(batch["path"], paths)
            put[rows] = _numbered(batch["put"], puts)
            number[rows] = batch["number"].to_numpy()
            for name, column in (("start", start), ("end", end)):
                column[rows] = batch[name].to_numpy(zero_copy_only=False)
            vectors[rows] = _matrix(batch["vector"], self._width)
        if at < n:
            raise damaged(self.where, "it has fewer rows than it says")
        first = table.search().where("number = 0").select(["put", *FILE]).to_arrow()
        latest: dict[str, tuple[str, int]] = {}
        for row, (path, mark) in enumerate(
            zip(first["path"].to_pylist(), first["put"].to_pylist(), strict=True)
        ):
            latest[path] = max(latest.get(path, ("", 0)), (mark, row))
        if latest.keys() != paths.keys():
            raise damaged(self.where, "some files lack their first moment")
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
            raise damaged(self.where, "a span ends before it starts")
        return Rows(states, file, start, end, vectors)

    def bad_files(self) -> list[dict[str, str]]:
        """Return {"path", "reason"} of every file that could not be decoded, by path."""
        with reported(self.where):
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
        with reported(self.where):
            for some in chunks([*gone, *(path for path in new if path in before)]):
                committed(self._bad_files.delete, path_in(some))
            if new:
                texts = [list(map(encoded, column)) for column in (new, new.values())]
                table = pa.table(texts, schema=bad_files_schema())
                committed(self._bad_files.add, table)

    def tidy(self, tell: Callable[[int], None] = lambda moments: None) -> None:
        """Compact the tables, delete duplicates and versions that nobody reads any more, and make
        what a large table is searched by: sorted paths and ids, and the approximate index of
        vectors. That is extended when NEW_SHARE of all rows are not in it yet, and made again when
        half of them are not; until then, searches compare these exactly.

        tell: called with the number of moments before the index is made, which may take long.
        """
        from lancedb.index import BTree, IvfRq

        with reported(self.where):
            self._delete_duplicates()
            rows = int(self._moments.count_rows())
            indices = {index.columns[0]: index for index in self._moments.list_indices()}
            known = indices.get("vector")
            if known and self._moments.index_stats(known.name).distance_type != METRIC:
                known = None  # which no search uses
            new = rows - known.num_indexed_rows if known else rows
            makes = rows > EXACT_ROWS and self._width % 8 == 0 and 2 * new > rows
            compact(self._about)
            compact(self._bad_files)
            if not known or (new > NEW_SHARE * rows and not makes):
                compact(self._moments)
            if rows > EXACT_ROWS:
                for column in ("path", "id"):
                    if column not in indices:
                        committed(self._moments.create_index, column, config=BTree())
            if makes:
                tell(rows)
                config = IvfRq(
                    distance_type=METRIC,
                    num_partitions=max(1, rows // PARTITION_ROWS),
                    num_bits=BITS,
                    max_iterations=10,
                    sample_rate=64,
                )
                committed(self._moments.create_index, "vector", config=config, replace=True)
        self.tidy_captions()

    def tidy_captions(self) -> None:
        """Compact the table of captions, and delete those of moments that are gone."""
        if self.captions.exist():
            self.captions.tidy(self.caption_keys())

    def _delete_duplicates(self, among: str | None = None) -> None:
        """Delete the rows of files that were put twice, except for the latest."""
        first = " and ".join(filter(None, ("number = 0", among)))
        table = self._moments.search().where(first).select(["path", "put"]).to_arrow()
        latest: dict[str, str] = {}
        earlier: set[str] = set()
        rows = zip(table["put"].to_pylist(), table["path"].to_pylist(), strict=True)
        for put, path in sorted(rows):
            if path in latest:
                earlier.add(f"(path = {sql_text(path)} and put = {sql_text(latest[path])})")
            latest[path] = put
        for some in chunks(sorted(earlier)):
            committed(self._moments.delete, " or ".join(some))

    def _replace(self, table: Any, paths: Sequence[str]) -> None:
        """Put the rows of a table, and delete all others of these paths, in one commit."""
        gone = path_in(paths)
        with reported(self.where):
            before = self._moments.version
            if self._moments.count_rows(gone):
                # No stored row has this mark, so every row is new.
                merge = self._moments.merge_insert("put").when_not_matched_insert_all()
                merge = merge.when_not_matched_by_source_delete(gone)
                result = committed(merge.execute, table)
            else:  # a merge reads the whole table, which a large index should not do for new files
                result = committed(self._moments.add, table)
            if result.version != before + 1:  # another process has committed meanwhile
                for some in chunks(paths):
                    self._delete_duplicates(path_in(some))

    def _derive(self, new: Sequence[tuple[str, FileState]], moves: bool) -> set[str]:
        with reported(self.where):
            rows = self._of_files([path for path, _ in new])
            vectors = self._vectors(rows)
            starts, ends = rows["start"].to_pylist(), rows["end"].to_pylist()
            numbers, paths = rows["number"].to_pylist(), rows["path"].to_pylist()
            contents, ids = rows["content"].to_pylist(), rows["id"].to_pylist()
        # Another process may have put another content at a path meanwhile.
        found: dict[tuple[str, str], list[int]] = {}
        for row in sorted(range(len(paths)), key=numbers.__getitem__):
            found.setdefault((paths[row], contents[row]), []).append(row)
        files, gone = [], []
        renamed: list[tuple[str, str]] = []
        for path, state in new:
            if own := found.get((encoded(path), encoded(state.content))):
                files.append((state, [(starts[row], ends[row]) for row in own], vectors[own]))
                gone += [path] * moves
                content = encoded(state.content)
                for row in own:
                    id = moment_id(state.path, starts[row], ends[row])
                    renamed.append((caption_key(ids[row], content), caption_key(id, content)))
        if files:
            table = self._as_table(files)
            self.captions.copy(renamed)
            self._replace(table, [*gone, *(state.path for state, _, _ in files)])
            if moves:
                self.captions.drop({old for old, _ in renamed} - {new for _, new in renamed})
        return {state.path for state, _, _ in files}

    def _of_files(
        self, paths: Sequence[str], columns: Sequence[str] = (*ROW, "put", "vector")
    ) -> Any:
        """Return the rows of these files as one table, without those of earlier puts.

        columns: "path" and "put" among them.
        """
        import pyarrow as pa

        names = [*columns]
        parts = []
        for some in chunks(list(dict.fromkeys(paths))):
            search = self._moments.search().where(path_in(some)).select(names)
            parts.append(search.to_arrow())
        if not parts:
            return moments_schema(self._width).empty_table().select(names)
        table = pa.concat_tables(parts)
        puts, held = table["put"].to_pylist(), table["path"].to_pylist()
        latest: dict[str, str] = {}
        for path, put in zip(held, puts, strict=True):
            latest[path] = max(put, latest.get(path, ""))
        keep = [latest[path] == put for path, put in zip(held, puts, strict=True)]
        return table if all(keep) else table.filter(pa.array(keep))

    def _as_table(self, files: Sequence[tuple[FileState, Sequence[Span], np.ndarray]]) -> Any:
        """Return new rows of these files. Raises ValueError for values that no index may hold."""
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in (*ROW, "put")}
        put = new_mark()
        for state, spans, vectors in files:
            shape = (len(spans), self._width)
            if not spans or np.shape(vectors) != shape:
                raise StoreError(
                    f"{shown(state.path)} has {len(spans)} spans and vectors "
                    f"{list(np.shape(vectors))}; expected at least 1 and [n, {self._width}]"
                )
            if not (is_sound(state) and all(map(is_span, spans)) and are_unit(vectors)):
                raise StoreError(
                    f"{shown(state.path)} has a value that no index may hold; expected finite "
                    "numbers, spans that end after they start, and unit vectors"
                )
            for number, (start, end) in enumerate(spans):
                columns["id"].append(moment_id(state.path, start, end))
                columns["number"].append(number)
                columns["start"].append(start)
                columns["end"].append(end)
            for name in FILE:
                value = getattr(state, name)
                columns[name] += [encoded(value) if isinstance(value, str) else value] * len(spans)
            columns["put"] += [put] * len(spans)
        values = np.concatenate([np.asarray(x, np.float32) for *_, x in files]).astype(np.float16)
        schema = moments_schema(self._width)
        arrays = [pa.array(columns[x.name], x.type) for x in schema if x.name != "vector"]
        vector = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self._width)
        return pa.table([*arrays, vector], schema=schema)

    def _states(self, table: Any) -> list[FileState]:
        columns = [table[name].to_pylist() for name in FILE]
        states = [
            FileState(decoded(path), size, mtime_ns, decoded(content), decoded(plan), *times)
            for path, size, mtime_ns, content, plan, *times in zip(*columns, strict=True)
        ]
        if not all(map(is_sound, states)):
            raise damaged(self.where, "the state of a file has values out of range")
        return states

    def _moments_of(self, table: Any) -> list[Moment]:
        ids, starts, ends = (table[name].to_pylist() for name in ("id", "start", "end"))
        moments = [
            Moment(id, state, start, end)
            for id, state, start, end in zip(ids, self._states(table), starts, ends, strict=True)
        ]
        for moment in moments:
            start, end = moment.start, moment.end
            if not is_span((start, end)) or moment.id != moment_id(moment.file.path, start, end):
                raise damaged(self.where, f"moment {shown(moment.id)} is not what its id says")
        return moments

    def _vectors(self, table: Any) -> np.ndarray:
        vectors = [_matrix(part, self._width) for part in table["vector"].chunks]
        empty = np.empty((0, self._width), np.float16)
        values = np.concatenate([empty, *vectors]).astype(np.float32)
        self._check_unit(values)
        return values

    def _check_unit(self, vectors: np.ndarray) -> None:
        if not are_unit(vectors):
            raise damaged(self.where, "not all of its vectors are unit vectors")


# The approximate index holds BITS bits per value of a vector. A search reads all of it, as texts
# lie far from all videos and so between partitions, and compares the best COMPARED moments exactly,
# or COMPARED_SHARE times as many as it asks for if that is more. One bit needs ten times as many
# for equal recall. When LanceDB adds rows, it splits partitions of over 16,384 and joins those of
# under 1,024. With their neighbours that may be most of the index, so it is done for many at once.
BITS = 4
METRIC: Literal["l2"] = "l2"  # which LanceDB computes faster in float16 than products
PARTITION_ROWS, ALL_PARTITIONS = 8192, 1 << 16  # the latter: more than there are
COMPARED, COMPARED_SHARE = 1500, 5
NEW_SHARE = 0.02


def _matrix(column: Any, width: int) -> np.ndarray:
    """Return a column of vectors as float16 [n, P]."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)


def _caption_keys(batch: Any) -> Any:
    """Return the keys of captions of a batch of moments with id and content."""
    import pyarrow.compute as pc

    content = pc.utf8_slice_codeunits(batch["content"], 0, KEY_CONTENT)
    return pc.binary_join_element_wise(batch["id"], content, "")


def _numbered(column: Any, numbers: dict[str, int]) -> np.ndarray:
    """Return the number of each text of a column, and give new texts the next ones."""
    distinct = column.dictionary_encode()
    texts = distinct.dictionary.to_pylist()
    own = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return own[distinct.indices.to_numpy()]


def _checked_query(vector: np.ndarray, width: int) -> np.ndarray:
    query = np.asarray(vector, np.float32)
    if query.shape != (width,) or not are_unit(query[None]):
        raise StoreError(
            f"a query of shape {list(query.shape)}; expected a unit vector of {width} values"
        )
    return query
