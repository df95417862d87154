"""Hits on a terminal, and filters as people type them."""

import math
import os
import re
from collections.abc import Sequence
from datetime import datetime

from clipvip.files import json_line, shown
from clipvip.index.rows import Hit


def print_hits(hits: Sequence[Hit], title: str, as_json: bool) -> None:
    """Print hits as a table, or as JSON Lines (see Hit.as_json)."""
    if as_json:
        for hit in hits:
            print(json_line(hit.as_json()).decode(), end="")
        return
    if not hits:
        print("nothing in the index fits these filters")
        return
    from rich.console import Console, Group
    from rich.table import Column, Table
    from rich.text import Text

    video = Column("video", overflow="fold")
    heading = Text(shown(title), style="italic")  # Text, as brackets in a str are markup
    table = Table("rank", "score", video, Column("moment", no_wrap=True), title=heading)
    here = os.path.join(os.getcwd(), "")
    for rank, hit in enumerate(hits, start=1):
        lines = [Text(shown(hit.path.removeprefix(here)))]
        if hit.caption is not None:
            lines.append(Text(shown(hit.caption), "dim", no_wrap=True, overflow="ellipsis"))
        table.add_row(str(rank), f"{hit.score:.3f}", Group(*lines), span(hit.start, hit.end))
    Console().print(table)


def span(start: float | None, end: float | None) -> str:
    """Return a span as 00:41:05–00:41:20; empty for a whole file.

    Seconds are rounded to whole ones; a span of less than two seconds has a decimal.
    """
    if start is None and end is None:
        return ""
    digits = 1 if end is not None and end - (start or 0.0) < 2 else 0
    return f"{_clock(start or 0.0, digits)}–{'' if end is None else _clock(end, digits)}"


def _clock(seconds: float, digits: int) -> str:
    tenths = round(seconds * 10**digits)
    whole, rest = divmod(tenths, 10**digits)
    text = f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{text}.{rest}" if digits else text


def duration(option: str, text: str | None) -> float | None:
    """Return a duration in seconds from 90, 1:30 or 1:02:03. Raises ValueError for another text."""
    if text is None:
        return None
    parts = text.split(":")
    whole = all(re.fullmatch(r"\d{1,9}", part, re.ASCII) for part in parts[:-1])
    if whole and len(parts) <= 3 and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", parts[-1], re.ASCII):
        numbers = [float(part) for part in parts]
        if all(number < 60 for number in numbers[1:]):
            return math.fsum(number * 60**place for place, number in enumerate(reversed(numbers)))
    raise ValueError(f"{option} is {text!r}; expected seconds or a time such as 1:30 or 1:02:03")


def day(option: str, text: str | None) -> float | None:
    """Return the start of a day, or a time of it, in this time zone: seconds since 1970.

    Raises ValueError for another text.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{option} is {text!r}; expected a day such as 2024-05-01, or 2024-05-01T18:30"
        ) from None
