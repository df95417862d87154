"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(note: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of `total` clips are done.

    On a terminal, show a bar with rate and remaining time; elsewhere print plain lines, at most one
    per 10 s. Yields a function to call with each number of clips done.
    """
    if sys.stderr.isatty():
        from rich import progress as rich
        from rich.console import Console

        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TaskProgressColumn(show_speed=True),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=Console(stderr=True)) as bar:
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
