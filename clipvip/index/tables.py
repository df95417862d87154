"""What an index is in LanceDB's tables, and how they are opened, changed and read.

An index consists of three tables:

    about      rows of one JSON text each: the format, the model and sources; the last one says
               where the model is, and the sources of all count. `made` is random, and tells an
               index from one made in its place.
    moments    one row per moment: its file's state, its span, and a unit vector in float16
    bad_files  files that could not be decoded, and why

There may be a fourth one, `captions`; see clipvip.index.captions.

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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from clipvip.files import check_folder, only_run, shown
from clipvip.index.rows import About, FileState, Where

FORMAT = 3
COMMITS = 30  # attempts, with pauses that grow to a second
MOST_VALUES = 1 << 16  # per vector
KEPT = timedelta(hours=1)  # a reader is at most one search behind, and none takes that long
PATHS_AT_ONCE = 1000  # in one SQL condition
TABLES = ("moments", "bad_files", "about")  # a folder with the last one is an index

# Two processes that compact at once, or one that changes rows while another compacts them.
CONFLICT = re.compile(r"conflict|concurrent|retryable|preempted", re.IGNORECASE)
_PLACE = re.compile(r", /\S+:\d+(:\d+)?")  # in LanceDB's sources
_SYSTEM = re.compile(r"os error (\d+)")
# What a path may hold that an SQL text cannot, or that no UTF-8 text can.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f%'\"\\\ud800-\udfff]")

Span = tuple[float | None, float | None]

# Columns of the table `moments`: those of a file, in the order of FileState, and those of a span.
FILE = ("path", "size", "mtime_ns", "content", "plan", "duration", "date")
SPAN = ("id", "number", "start", "end")
ROW = (*FILE, *SPAN)
ID = re.compile(r"[0-9a-f]{16}")
KEY_CONTENT = 16  # characters of a content hash in the key of a caption


class StoreError(ValueError):
    """An error in an index, or in what was asked of it, in one line."""


def moment_id(path: str, start: float | None, end: float | None) -> str:
    """Return 16 hexadecimal digits that stand for a span of a file."""
    text = f"{encoded(path)}\n{_number(start)}\n{_number(end)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def caption_key(id: str, content: str) -> str:
    """Return what a caption is stored under: a moment's id, and the start of its file's content
    hash, as the tables hold it. So a caption is never shown for what replaced the file."""
    return id + content[:KEY_CONTENT]


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


def moments_schema(width: int) -> Any:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    of_file = zip(FILE, (text, whole, whole, text, text, real, real), strict=True)
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


def bad_files_schema() -> Any:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("path", "reason")])


def about_schema() -> Any:
    import pyarrow as pa

    return pa.schema([pa.field("json", pa.string(), nullable=False)])


def captions_schema() -> Any:
    import pyarrow as pa

    names = ("key", "text", "by", "put")
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in names])


def about_row(about: About, made: str) -> Any:
    import pyarrow as pa

    # ASCII, so that names that are not UTF-8 are escaped.
    text = json.dumps({"format": FORMAT, "made": made, **about._asdict()})
    return pa.table([[text]], schema=about_schema())


def parse_about(where: str, table: Any) -> tuple[About, str]:
    """Join the rows of `about`: the model as last seen, and all sources. Return this, and what
    tells the index from another one that is made in its place. Raises ValueError."""
    if table.schema.names != about_schema().names or not table.num_rows:
        raise damaged(where, "its table about has other columns than expected, or no row")
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
            raise damaged(where, "its table about is not from clipvip embed") from None
        texts = (about.model, about.fingerprint, *about.sources)
        if number != FORMAT or not all(isinstance(text, str) for text in texts):
            raise damaged(where, "its table about is not from clipvip embed")
        check_width(about.width, where)
        rows.append(about)
    if len({(row.fingerprint, row.width) for row in rows}) > 1 or len(made) > 1:
        raise damaged(where, "it names several models")
    sources = dict.fromkeys(source for row in rows for source in row.sources)
    return rows[-1]._replace(sources=tuple(sources)), made.pop()


def check_width(width: object, where: str) -> None:
    if type(width) is not int or not 1 <= width <= MOST_VALUES:
        raise damaged(where, f"vectors of {width!r} values; expected 1 to {MOST_VALUES}")


def check_model(where: str, stored: About, given: About) -> None:
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
    if not is_uri(name):
        return os.path.isdir(os.path.join(local(name), "about.lance"))
    with reported(name):
        return "about" in table_names(connect(name))


def check_place(where: str | Path) -> None:
    """Raise ValueError if an index made there would harm what is in it."""
    name = os.fspath(where)
    if not is_uri(name):
        check_folder(Path(local(name)), "an index", lambda: is_index(name))


def is_uri(where: str) -> bool:
    """Whether an index is in a bucket."""
    return "://" in where and not where.startswith("file://")


def local(where: str) -> str:
    """Return the absolute path of an index that is in a folder."""
    return os.path.abspath(where.removeprefix("file://"))


def connect(where: str) -> Any:
    # What it warns of, such as two processes that compact at once, this module retries.
    os.environ.setdefault("LANCEDB_LOG", "error")
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise StoreError(  # which commands show as one line
            f'an index needs the package {error.name}: pip install "clipvip[search]"'
        ) from None
    uri = where if is_uri(where) else local(where)
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise StoreError(
            f"{shown(where)} is not UTF-8, which LanceDB needs; give another folder"
        ) from None
    with reported(where):
        # Look for what other processes have committed before each read.
        return lancedb.connect(uri, read_consistency_interval=timedelta(0))


def table_names(database: Any) -> list[str]:
    names: list[str] = []
    page = None
    while True:
        answer = database.list_tables(page_token=page)
        names += answer.tables
        page = answer.page_token
        if not page:
            return names


def open_table(database: Any, name: str) -> Any | None:
    """Open a table; None if it does not exist, or if the process that makes it has not committed it
    yet, or was killed before."""
    if name not in table_names(database):
        return None
    try:
        return database.open_table(name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        return None


def checked_table(where: str, database: Any, name: str, schema: Any) -> Any | None:
    """Open a table of an index; None if there is none. Raises StoreError for a foreign one."""
    with reported(where):
        table = open_table(database, name)
        if table is None:
            return None
        if table.schema.names != schema.names or table.schema.types != schema.types:
            raise damaged(where, f"table {name} has other columns than expected")
        # It can name functions that LanceDB runs when rows are added: with any model, from
        # anywhere.
        if table.schema.metadata:
            raise damaged(where, f"table {name} has notes that clipvip embed never makes")
        return table


def compact(table: Any) -> None:
    """Join small parts of a table, delete old versions, and add new rows to its indices."""
    try:
        committed(table.optimize, cleanup_older_than=KEPT)
    except Exception as error:
        if not CONFLICT.search(str(error)):  # else the next process tidies
            raise


def new_mark() -> str:
    """Return a mark for rows that are put now. Later marks are greater."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}"


def mark_before(age: timedelta) -> str:
    """Return a mark that is greater than those of rows that were put longer ago."""
    return f"{time.time_ns() - round(age.total_seconds() * 1e9):020d}"


@contextmanager
def alone(where: str) -> Iterator[None]:
    """Let one process at a time create the tables of an index in a folder.

    Of two that create the same table at once, LanceDB 0.40 lets both succeed, and the rows that the
    first one has added meanwhile are lost.
    """
    if is_uri(where):  # a bucket refuses to write a file that exists
        yield
        return
    with only_run(Path(local(where)), "begins an index"):
        yield


def open_or_create(database: Any, name: str, schema: Any, data: Any = None) -> Any:
    """Open a table, or create it."""
    if (table := open_table(database, name)) is not None:
        return table
    return database.create_table(name, data, schema=schema)


def committed(change: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make a change, and again if other processes' changes came between."""
    for attempt in range(COMMITS):
        try:
            return change(*args, **options)
        except Exception as error:
            if attempt == COMMITS - 1 or not CONFLICT.search(str(error)):
                raise
        time.sleep(random.uniform(0.5, 1) * min(1.0, 0.01 * 2**attempt))
    raise AssertionError


@contextmanager
def reported(where: str) -> Iterator[None]:
    """Turn what LanceDB raises into one line that names the index."""
    try:
        yield
    except (StoreError, KeyError, MemoryError):
        raise
    except Exception as error:
        if CONFLICT.search(str(error)):
            raise StoreError(
                f"other processes changed the index in {shown(where)} all the time; run the same "
                "command again"
            ) from error
        line = _PLACE.sub("", str(error).partition("\n")[0].removeprefix("lance error: "))
        number = int(found[1]) if (found := _SYSTEM.search(line)) else errno.ENOENT
        if number != errno.ENOENT:  # a full disk, for example; a missing file is damage
            raise OSError(number, os.strerror(number), where) from error
        raise damaged(where, line) from error


def damaged(where: str, why: str) -> StoreError:
    return StoreError(
        f"the index in {shown(where)} is damaged ({shown(why)}); make it again with clipvip embed "
        "and another --out"
    )


def condition_of(where: Where | None) -> str | None:
    """Return a filter as an SQL condition, None if everything passes."""
    if where is None:
        return None
    parts = []
    if where.folder is not None:
        folder = encoded(where.folder.rstrip("/"))
        # All texts that begin with "folder/": the letter after "/" is "0".
        parts.append(f"path >= {sql_text(folder + '/')} and path < {sql_text(folder + '0')}")
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


def path_in(paths: Iterable[str]) -> str:
    return f"path in ({', '.join(sql_text(encoded(path)) for path in paths)})"


def sql_text(encoded_text: str) -> str:
    """Return an SQL text. Encoded texts hold no quotes, but a stranger's tables might."""
    return "'" + encoded_text.replace("'", "''") + "'"


def chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for at in range(0, len(values), PATHS_AT_ONCE):
        yield values[at : at + PATHS_AT_ONCE]


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def is_sound(state: FileState) -> bool:
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


def is_span(span: Span) -> bool:
    start, end = span
    if not all(x is None or (isinstance(x, float | int) and math.isfinite(x)) for x in span):
        return False
    return (start is None or start >= 0) and (end is None or end >= (start or 0))


def are_unit(vectors: np.ndarray) -> bool:
    """Whether all vectors [n, P] are finite and have length 1, up to rounding to float16."""
    lengths = np.linalg.norm(np.asarray(vectors, np.float32), axis=-1)
    return bool((np.abs(lengths - 1) <= 2e-3).all())
