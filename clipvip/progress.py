"""How far long work is."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(note: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with each number of clips done.

    On standard error: a bar with rate and time left on a terminal; plain lines, at most one in
    10 s, elsewhere.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=True),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(note, total=total)
            yield lambda clips: bar.advance(task, clips)
        return
    print(note, file=sys.stderr, flush=True)
    started = shown = time.monotonic()
    done = 0

    def advance(clips: int) -> None:
        nonlocal done, shown
        done += clips
        now = time.monotonic()
        if now - shown > 10:
            rate = done / (now - started)
            line = f"{done}/{total}, {rate:.1f} clips/s, {(total - done) / rate:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            shown = now

    yield advance
