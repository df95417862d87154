"""Code that runs inside a decoder process: pictures, films, and queries that were uploaded."""

import gc
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from clipvip.data.loading import limit_memory
from clipvip.data.video import DecodeError, film_of, picture_of, plain_copy
from clipvip.files import shown


def answer(connection: Connection) -> None:
    """Do tasks until the server is gone. Each answer is (True, result) or (False, reason)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_server, daemon=True).start()
    limit_memory()
    gc.freeze()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        connection.send("ready")
        while True:
            work, arguments, seconds = connection.recv()
            # The system ends this process when the alarm rings, whatever library it is in.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                message = (True, work(*arguments))
            except DecodeError as error:
                message = (False, shown(error.reason))
            except Exception as error:
                message = (False, shown(f"{type(error).__name__}: {error}"))
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(message)
    os._exit(0)


def _exit_with_server() -> None:
    if server := multiprocessing.parent_process():
        server.join()
    os._exit(1)


def picture(path: str, start: float | None, end: float | None, side: int) -> bytes:
    """Return a frame of a moment as JPEG."""
    return picture_of(Path(path), start, end, side=side)


def film(path: str, start: float, end: float) -> bytes:
    """Return a part of a video as MP4."""
    return film_of(Path(path), start, end)


def copy(path: str) -> str:
    """Write a copy of an uploaded image or video beside it, and return its path. A file of no
    suffix may be either."""
    file = Path(path)
    if file.suffix:
        made = plain_copy(file)
    else:
        try:
            made = plain_copy(file.rename(file.with_suffix(".png")))
        except DecodeError:
            made = plain_copy(file.with_suffix(".png").rename(file.with_suffix(".video")))
    copied = file.with_name(made.name)
    copied.write_bytes(made.data)
    return str(copied)


def nothing() -> None:
    """Do nothing, in a process that is ready then."""
