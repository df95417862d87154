"""Code that runs inside a worker process: its loop, its limits, and what work may report.

Work calls `set_place` before each clip, so that the parent can name the clip if the process dies
or hangs there, and `report_progress` to advance a progress bar while a task is under way.
"""

import ctypes
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipvip.data.loading import messages
from clipvip.data.loading.messages import WorkerError
from clipvip.data.video import DecodeError


class Slot(ctypes.Structure):
    """The place a process works at (-1: none), and since when, in seconds of the monotonic clock.
    It lies in memory that the parent shares."""

    _fields_ = (("place", ctypes.c_longlong), ("since", ctypes.c_double))


class Key(NamedTuple):
    """A task: its run, and its number within the run."""

    run: int
    number: int


STARTED = Key(-1, -1)  # key of the first message of each process


class WorkFailure(NamedTuple):
    """An error of `work`, with its traceback and the place it was raised at."""

    error: Exception
    trace: str
    place: int


_slot = Slot(-1)
_on_progress: Callable[[int], None] = lambda clips: None  # noqa: E731


def set_place(place: int) -> None:
    """Note that this process now works at a place, a number of a clip; -1 for none."""
    _slot.place, _slot.since = place, time.monotonic()


def check_not_excluded(place: int, excluded: frozenset[int], path: str | Path) -> None:
    """Raise DecodeError for a place at which two processes died."""
    if place in excluded:
        raise DecodeError(path, "two processes died while they read it")


def report_progress(clips: int) -> None:
    """Report the number of clips done since the last report."""
    _on_progress(clips)


def report_here(on_progress: Callable[[int], None]) -> Slot:
    """Let work that runs in this process report to it; the slot shows the place of the work."""
    global _slot, _on_progress
    _slot, _on_progress = Slot(-1), on_progress
    return _slot


def serve(connection: Connection, work: Any, slots: Any, number: int) -> None:
    """Do tasks until the parent is gone. Messages are (key, result, failure); those about progress
    have no key, and the number of clips for a result."""
    global _slot, _on_progress

    _set_up()
    _slot = slots[number]

    def send(key: Key | None, value: Any = None) -> None:
        messages.send(connection, messages.pack((key, value, None)))

    _on_progress = lambda clips: send(None, clips)  # noqa: E731
    try:
        send(STARTED)
        while True:
            try:
                key, task, excluded = connection.recv()
            except (EOFError, OSError):
                break
            try:
                message = messages.pack((key, work(task, excluded), None))
            except Exception as error:
                message = messages.pack((key, None, _failure(error)))
            set_place(-1)
            messages.send(connection, message)
    except ConnectionError:
        pass
    except BaseException:  # a library wants to end the process, such as by SystemExit: so be it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # without the exit handlers, which are the parent's


def _set_up() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops this process
    for code in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(code, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _limit_memory()
    gc.freeze()  # or collecting would copy, page by page, what is shared with the parent
    gc.enable()
    torch.set_num_threads(1)  # one core per process; and OpenMP's threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _limit_memory() -> None:
    """Limit this process to what it inherited and half of the memory, so that a large request by a
    library fails with an error before memory runs out for all processes. If it does run out, the
    system kills this process rather than its parent."""
    with suppress(OSError, ValueError, IndexError):  # a sandbox may lack any of these
        status = Path("/proc/self/status").read_text()
        inherited = int(status.partition("VmData:")[2].split()[0]) << 10
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = {inherited + _memory() // 2, soft, hard} - {resource.RLIM_INFINITY}
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str((int(score.read_text()) + 1000) // 2))


def _memory() -> int:
    """Bytes that the machine has, or that the container allows."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        with suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found)


def _failure(error: Exception) -> WorkFailure:
    """Pass on an error as it is if it can be pickled, else a WorkerError with its text."""
    trace = traceback.format_exc()
    try:
        if not isinstance(pickle.loads(ForkingPickler.dumps(error)), Exception):
            raise TypeError
    except Exception:
        error = WorkerError(traceback.format_exception_only(type(error), error)[-1].strip())
    return WorkFailure(error, trace, _slot.place)
