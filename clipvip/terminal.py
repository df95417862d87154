"""Output that ends no work: on any terminal, into a pipe that is closed, to a disk that is full."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class _Output(io.FileIO):
    """A file for output that drops what cannot be written and remembers why."""

    failure: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        try:
            while (
                written := super().write(data)
            ) is None:  # a pipe that does not block, and is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


@contextmanager
def safe_output() -> Iterator[None]:
    """Keep printing from raising errors: letters that a terminal lacks become escapes, and output
    that cannot be written is dropped.

    A reader that closes its pipe early, such as `| head -1`, is no error. Any other loss of output,
    such as on a full disk, ends with one line on stderr and exit status 1. Streams that were
    replaced, such as by a test, are left as they are.
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
    """Put /dev/null where stdin, stdout or stderr is closed: else the next file to be opened, such
    as an index, would take its number, and what libraries print would be written into it."""
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
