"""Write the page and the Markdown tables of benchmark records.

    python bench/report.py [STORE]           writes report.html and report.md beside the records
    python bench/report.py [STORE] --pages   also updates the tables of README.md and docs

STORE: see records.py; by default bench/results. Files in it that hold no records are listed on the
page and otherwise ignored. `--pages` replaces the text between the two marks: the README gets the
table of a few rows, docs/benchmarks.md all tables, docs/cluster.md those of bench/cluster.py.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import cluster
from page import page
from records import BENCH, RESULTS, Record, folder_of, read
from tables import markdown, short

from clipvip.files import write_whole

ROOT = BENCH.parent
MARKS = ("<!-- measured: written by bench/report.py -->", "<!-- end of measured -->")


def write(store: Path) -> list[Path]:
    """Write report.md and report.html of a store's records beside them; return their paths.

    Without matplotlib, which draws the page's pictures, only report.md is written.
    Raises ValueError if there are no records or a file is not JSON.
    """
    records, others = read(store)
    folder = folder_of(store)
    paths = [folder / "report.md"]
    write_whole(paths[0], markdown(records) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        paths.append(folder / "report.html")
        write_whole(paths[1], page(records, others, store.resolve().name))
    return paths


def publish(store: Path) -> None:
    """Write the report of a store and print which files were written."""
    paths = write(store)
    for path in paths:
        print(path)
    if len(paths) == 1:
        print("report.html needs matplotlib and was not written: pip install 'clipvip[bench]'")


def pages(records: Sequence[Record]) -> dict[Path, str]:
    """Return the generated part of each page of the documentation."""
    return {
        ROOT / "README.md": short(records),
        ROOT / "docs" / "benchmarks.md": markdown(records),
        ROOT / "docs" / "cluster.md": cluster.documented(),
    }


def put_into(path: Path, tables: str) -> None:
    """Replace the text between the two marks of a file."""
    before, after = around(path)
    write_whole(path, f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}")


def around(path: Path) -> tuple[str, str]:
    """Return the text of a file before the first mark and after the second.

    Raises ValueError if the file does not hold both marks exactly once.
    """
    parts = re.split("|".join(map(re.escape, MARKS)), path.read_text())
    if len(parts) != 3:
        raise ValueError(f"{path} does not hold the lines {MARKS[0]} and {MARKS[1]} once each")
    return parts[0], parts[2]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", nargs="?", type=Path, default=RESULTS, help="%(default)s")
    parser.add_argument(
        "--pages", action="store_true", help="also update the tables of README.md and docs"
    )
    given = parser.parse_args(arguments)
    try:
        publish(given.store)
        if given.pages:
            for path, tables in pages(read(given.store)[0]).items():
                put_into(path, tables)
                print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
