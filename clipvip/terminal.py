"""Output of commands: it never stops the work, shows errors as one line, and shows progress."""

import io
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from clipvip.files import shown


@contextmanager
def one_line_errors(alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Print an error that the user can correct as one line, and exit with status 1.

    CLIPVIP_TRACEBACK in the environment lets it through. An interrupt (Ctrl-C) exits with 130.
    alike: types of errors that every rank of a training run raises; only rank 0 prints them.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("CLIPVIP_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, alike):
            print_error(error)
        raise SystemExit(1) from None


def print_error(error: Exception) -> None:
    """Print an error as one line on stderr, with the rank of this process if it is not 0."""
    rank = os.environ.get("RANK", "0")
    name = "clipvip" if rank == "0" else f"clipvip, rank {rank}"
    print(shown(f"{name}: error: {' '.join(str(error).split())}"), file=sys.stderr)


class _Output(io.FileIO):
    """An output file that drops what it cannot write and remembers the first error."""

    failure: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        try:
            while (written := super().write(data)) is None:  # a non-blocking pipe that is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


@contextmanager
def safe_output() -> Iterator[None]:
    """Keep printing from raising errors.

    Characters that the terminal cannot show become escapes, and output that cannot be written is
    dropped. After a loss of output, such as on a full disk, print one line on stderr and exit with
    status 1; but a reader may close its pipe early, as `| head -1` does. Streams that something
    else replaced, such as a test, are not touched.
    """
    _open_standard_files()
    replaced = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    outputs: dict[str, _Output] = {}
    for name, stream in replaced.items():
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        if stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        outputs[name] = _Output(stream.fileno(), "w", closefd=False)
        text = io.TextIOWrapper(
            io.BufferedWriter(outputs[name]),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering or name == "stderr",
        )
        setattr(sys, name, text)
    try:
        yield
    finally:
        for name, stream in replaced.items():
            if getattr(sys, name) is not stream:
                getattr(sys, name).flush()
                setattr(sys, name, stream)
    failure = outputs["stdout"].failure if "stdout" in outputs else None
    if failure and not isinstance(failure, BrokenPipeError):
        with suppress(OSError):
            os.write(2, f"clipvip: error: output was lost: {failure}\n".encode())
        raise SystemExit(1)


def _open_standard_files() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr, or libraries would print into the next
    file opened, such as an index, which gets its descriptor."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


@contextmanager
def progress(note: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of `total` clips are done, with rate and remaining time.

    Shows a bar on a terminal, elsewhere prints at most one line per 10 s. Yields a function to call
    with each number of clips done.
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
    started = last_line = time.monotonic()
    done = 0

    def advance(clips: int) -> None:
        nonlocal done, last_line
        done += clips
        now = time.monotonic()
        if now - last_line > 10:
            rate = done / (now - started)
            line = f"{done}/{total}, {rate:.1f} clips/s, {(total - done) / rate:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            last_line = now

    yield advance


@contextmanager
def share_done(note: str) -> Iterator[Callable[[float, str], None]]:
    """Show on standard error what share of a work is done, with the remaining time.

    Shows a bar on a terminal, elsewhere prints at most one line per 10 s. Yields a function to call
    with the share, from 0 to 1, and a text that says how much is done.
    """
    started = last_line = time.monotonic()

    def with_time_left(share: float, text: str) -> str:
        left = (time.monotonic() - started) * (1 - share) / share if share else None
        return text if left is None else f"{text}, {left:.0f} s left"

    if sys.stderr.isatty():
        from rich import progress as rich
        from rich.console import Console

        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.TextColumn("{task.fields[text]}", markup=False),
        )
        with rich.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(note, total=1.0, text="")
            yield lambda share, text: bar.update(
                task, completed=share, text=with_time_left(share, text)
            )
        return
    print(note, file=sys.stderr, flush=True)

    def show(share: float, text: str) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > 10:
            print(with_time_left(share, text), file=sys.stderr, flush=True)
            last_line = time.monotonic()

    yield show
