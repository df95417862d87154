"""Captions of the moments of an index, in a table of their own.

    captions   rows of key, text, by, put

    key    of a moment and its file's content, see clipvip.index.tables.caption_key
    text   one line
    by     path or hub name of the model that wrote it; empty if it comes from annotations
    put    mark of the change that put it; later ones are greater

An index without captions lacks the table, as do those of earlier versions. Captions are read by
key, for the moments that are shown, so a search does not depend on how many there are.

A moment may have one caption from annotations and one by a model. The one that was put last is
shown. Readers need nothing else to be right: rows that were put earlier, and those whose moment or
content is gone, are never read. `tidy` deletes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clipvip.index.rows import FileState
from clipvip.index.tables import (
    KEPT,
    alone,
    caption_key,
    captions_schema,
    checked_table,
    chunks,
    committed,
    compact,
    encoded,
    mark_before,
    moment_id,
    new_mark,
    open_or_create,
    reported,
    sql_text,
)

ANNOTATIONS = ""  # in the column `by`
LONGEST = 2000  # characters
INDEXED_ROWS = 20_000  # from here on keys are sorted; reading all of fewer takes milliseconds


class Captions:
    """The captions of an index; see this module.

    where: the index. database: as clipvip.index.tables.connect returns it.
    Every method raises ValueError if the table is damaged, and those that change it OSError if it
    cannot be written.
    """

    def __init__(self, where: str, database: Any) -> None:
        self._where, self._database = where, database
        self._opened: Any = None

    def _table(self) -> Any | None:
        """Return the table, None while there is none; another process may make it at any time."""
        if self._opened is None:
            schema = captions_schema()
            self._opened = checked_table(self._where, self._database, "captions", schema)
        return self._opened

    def exist(self) -> bool:
        """Whether the index has ever had captions."""
        return self._table() is not None

    def version(self) -> int:
        """Return a number that grows with every change."""
        table = self._table()
        with reported(self._where):
            return 0 if table is None else int(table.version)

    def of(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the texts of those keys that have one."""
        found: dict[str, tuple[str, str]] = {}
        for row in self._rows(keys):
            found[row["key"]] = max(found.get(row["key"], ("", "")), (row["put"], row["text"]))
        return {key: one_line(text) for key, (_, text) in found.items()}

    def keys(self) -> Any:
        """Return the keys that have a caption, as an array of Arrow, some of them twice."""
        table = self._table()
        if table is None:
            return captions_schema().empty_table()["key"].combine_chunks()
        with reported(self._where):
            return table.search().select(["key"]).to_arrow()["key"].combine_chunks()

    def put(self, texts: Mapping[str, str], by: str) -> int:
        """Put a caption of each key, which replaces an earlier one: those by models replace those
        by models, those from annotations those from annotations.

        texts: by key. Empty ones are left out; others are made one line.
        by: see this module.
        Return the number of captions.
        """
        lines = {key: line for key, text in texts.items() if (line := one_line(text))}
        if not lines:
            return 0
        table, mark = self._created(), new_mark()
        rows = [[*lines], [*lines.values()], [by] * len(lines), [mark] * len(lines)]
        kind = f"by = '{ANNOTATIONS}'" if by == ANNOTATIONS else f"by != '{ANNOTATIONS}'"
        with reported(self._where):
            committed(table.add, _as_table(rows))
            earlier = f"{kind} and put < '{mark}'"
            search = table.search().where(earlier).select(["key"])
            known: set[str] = set()
            for batch in search.to_batches(8192):
                known.update(lines.keys() & batch["key"].to_pylist())
            self._delete([*known], f" and {earlier}")
        return len(lines)

    def annotate(self, texts: Mapping[str, str]) -> None:
        """Bring the captions from annotations up to date: put those that differ, and delete those
        that are empty now.

        texts: by key, of the moments that annotations name, all at once.
        A moment whose annotation is the same as before keeps the caption that a model wrote later.
        """
        table = self._table()
        known: dict[str, tuple[str, str]] = {}
        if table is not None:
            with reported(self._where):
                search = (
                    table.search().where(f"by = '{ANNOTATIONS}'").select(["key", "put", "text"])
                )
                for batch in search.to_batches(8192):
                    for row in batch.to_pylist():
                        if (key := row["key"]) in texts:
                            known[key] = max(known.get(key, ("", "")), (row["put"], row["text"]))
        lines = {key: one_line(text) for key, text in texts.items()}
        self.put(
            {key: line for key, line in lines.items() if known.get(key, ("", ""))[1] != line},
            ANNOTATIONS,
        )
        gone = [key for key in known if not lines[key]]
        self._delete(gone, f" and by = '{ANNOTATIONS}'")

    def copy(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Give new keys the captions of old ones.

        pairs: old and new key. Called before the moments themselves are moved or copied, so that
        no process that is killed in between loses any.
        """
        new_keys: dict[str, list[str]] = {}
        for old, new in pairs:
            if old != new:
                new_keys.setdefault(old, []).append(new)
        if not new_keys or self._table() is None:
            return
        rows = sorted(self._rows(new_keys), key=lambda row: row["put"])
        mark = new_mark()
        copies = [
            (new, row["text"], row["by"], f"{mark}-{number:08d}")  # in the same order
            for number, row in enumerate(rows)
            for new in new_keys[row["key"]]
        ]
        if copies:
            with reported(self._where):
                committed(self._created().add, _as_table([*map(list, zip(*copies, strict=True))]))

    def drop(self, keys: Iterable[str]) -> None:
        """Delete the captions of these keys."""
        self._delete([*dict.fromkeys(keys)], "")

    def tidy(self, moments: Any) -> None:
        """Delete what is not read any more, compact the table, and sort the keys of a large one.

        moments: keys of all moments, as an array of Arrow. Captions without a moment stay for an
        hour: another process may be about to move their moment.
        """
        import pyarrow.compute as pc

        table = self._table()
        if table is None:
            return
        with reported(self._where):
            rows = table.search().select(["key", "by", "put"]).to_arrow()
            kind = pc.equal(rows["by"], ANNOTATIONS)
            rows = rows.drop_columns(["by"]).append_column("kind", kind)
            latest = rows.group_by(["key", "kind"]).aggregate([("put", "max"), ("put", "count")])
            twice = latest.filter(pc.greater(latest["put_count"], 1))
            earlier = [
                f"(key = {sql_text(row['key'])} and put < {sql_text(row['put_max'])} and "
                f"by {'=' if row['kind'] else '!='} '{ANNOTATIONS}')"
                for row in twice.to_pylist()
            ]
            for some in chunks(earlier):
                committed(table.delete, " or ".join(some))
            without = pc.invert(pc.is_in(latest["key"], value_set=moments))
            mark = mark_before(KEPT)
            gone = latest.filter(pc.and_(without, pc.less(latest["put_max"], mark)))["key"]
            self._delete(pc.unique(gone).to_pylist(), f" and put < '{mark}'")
            compact(table)
            if table.count_rows() >= INDEXED_ROWS and not table.list_indices():
                from lancedb.index import BTree

                committed(table.create_index, "key", config=BTree())

    def _rows(self, keys: Iterable[str]) -> list[dict[str, str]]:
        table = self._table()
        if table is None:
            return []
        with reported(self._where):
            return [
                row
                for some in chunks([*dict.fromkeys(keys)])
                for row in table.search().where(_key_in(some)).to_arrow().to_pylist()
            ]

    def _delete(self, keys: Sequence[str], among: str) -> None:
        table = self._table()
        if table is None:
            return
        with reported(self._where):
            for some in chunks(keys):
                committed(table.delete, _key_in(some) + among)

    def _created(self) -> Any:
        """Return the table, which is made if there is none."""
        if self._table() is None:
            with alone(self._where), reported(self._where):
                open_or_create(self._database, "captions", captions_schema())
        table = self._table()
        assert table is not None
        return table


def key_of(file: FileState, start: float | None, end: float | None) -> str:
    """Return the key of the caption of a span of a file."""
    return caption_key(moment_id(file.path, start, end), encoded(file.content))


def one_line(text: str) -> str:
    """Return a caption as it is stored and shown: one line of at most LONGEST characters."""
    line = " ".join(text[: 10 * LONGEST].split())[:LONGEST].rstrip()
    return line.encode(errors="replace").decode()  # half a character is no UTF-8


def _key_in(keys: Iterable[str]) -> str:
    return f"key in ({', '.join(map(sql_text, keys))})"


def _as_table(columns: Sequence[Sequence[str]]) -> Any:
    import pyarrow as pa

    return pa.table([pa.array(column, pa.string()) for column in columns], captions_schema())
