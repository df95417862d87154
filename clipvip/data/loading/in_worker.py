"""Code that runs inside a worker process, and the messages between it and its parent.

Work calls `set_place` before each clip, so that the parent can name the clip if the process dies
or hangs there, and `report_progress` to advance a progress bar while a task is under way.

On Linux, large tensors of a message are written to an anonymous file in memory (memfd), whose
descriptor is sent over the socket and closed after the parent has mapped it. So they take no room
in /dev/shm, which is small in containers, and no open files, and their memory is freed with the
last tensor that uses it. Elsewhere, torch's own pickling shares tensors.
"""

import ctypes
import errno
import gc
import io
import math
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipvip.data.video import DecodeError

# Python's own os.memfd_create is missing where Python was built for older systems.
_memory_file: Any = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
CLOSE_ON_EXEC = 1
# Bytes below which a tensor is sent within the message. A small tensor that a user keeps, such as
# a batch's clip_index, would otherwise keep the memory of all tensors of its message.
SMALL = 1 << 16
ALIGNED = 64  # bytes
HEADER = 8  # bytes that give the size of the shared memory
_CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class WorkerError(RuntimeError):
    """Workers die one after the other, or cannot pass on a result; says what to do."""


class Slot(ctypes.Structure):
    """The place a process works at (-1: none), and since when, in seconds of the monotonic clock.
    It lies in memory that the parent shares."""

    _fields_ = (("place", ctypes.c_longlong), ("since", ctypes.c_double))


Key = tuple[int, int]  # of a task: its run, and its number within the run


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
    """Do tasks until the parent is gone. Messages are (key, result or WorkFailure), or
    (None, clips) for progress."""
    global _slot, _on_progress

    _set_up()
    _slot = slots[number]
    _on_progress = lambda clips: send(connection, pack((None, clips)))  # noqa: E731
    try:
        report_progress(0)  # says that this process has started
        while True:
            try:
                key, task, excluded = connection.recv()
            except (EOFError, OSError):
                break
            try:
                message = pack((key, work(task, excluded)))
            except Exception as error:
                message = pack((key, failure_of(error, _slot.place)))
            set_place(-1)
            send(connection, message)
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
    limit_memory()
    gc.freeze()  # or collecting would copy, page by page, what is shared with the parent
    gc.enable()
    torch.set_num_threads(1)  # one core per process; and OpenMP's threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def limit_memory() -> None:
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


def failure_of(error: BaseException, place: int) -> WorkFailure:
    """Pass on an error as it is if it can be pickled, else a WorkerError with its text."""
    trace = traceback.format_exc()
    try:
        passed = pickle.loads(ForkingPickler.dumps(error))
        if not isinstance(passed, Exception):
            raise TypeError
    except Exception:
        passed = WorkerError(traceback.format_exception_only(type(error), error)[-1].strip())
    return WorkFailure(passed, trace, place)


# --- messages ---------------------------------------------------------------------------------


class Message(NamedTuple):
    """A pickled value. file: descriptor of the memory that holds its tensors, `size` bytes."""

    data: bytes
    file: int | None = None
    size: int = 0


def pack(value: Any) -> Message:
    """Pickle a value, with its large tensors in shared memory.

    Raises WorkerError if memory ran out, and whatever pickling raises.
    """
    if _memory_file is None:
        return Message(bytes(ForkingPickler.dumps(value)))
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    if not pickler.size:
        return Message(buffer.getvalue())
    file = -1
    try:
        file = _memory_file(b"clipvip", CLOSE_ON_EXEC)
        if file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.ftruncate(file, pickler.size)  # torch.from_file writes to one that is shorter
        for start, data in pickler.tensors:
            # Written, since copying into a mapping would crash when memory runs out.
            while data:
                written = os.pwrite(file, data, start)
                start, data = start + written, data[written:]
    except OSError as error:
        if file >= 0:
            os.close(file)
        raise WorkerError(
            f"no room to pass on a result of {pickler.size / 1e6:.0f} MB ({error.strerror}); if "
            "memory ran out, use fewer workers or smaller batches"
        ) from error
    return Message(buffer.getvalue(), file, pickler.size)


def send(connection: Connection, message: Message) -> None:
    """Send the size of the shared memory, its descriptor if there is one, then the pickled data."""
    files = [] if message.file is None else [message.file]
    with _socket_of(connection) as ours:
        socket.send_fds(ours, [message.size.to_bytes(HEADER, "little")], files)
    for file in files:
        os.close(file)
    connection.send_bytes(message.data)


def receive(connection: Connection) -> Any:
    """Return the value of the next message.

    Raises EOFError or OSError if the sender is gone, WorkerError if its memory cannot be mapped.
    """
    with _socket_of(connection) as ours:
        header, files, _, _ = socket.recv_fds(ours, HEADER, 1, _CLOSED_ON_EXEC)
    if len(header) < HEADER:
        raise EOFError
    size = int.from_bytes(header, "little")
    try:
        memory = _mapped(files, size) if size else None
    finally:
        for file in files:
            os.close(file)
    return _Unpickler(io.BytesIO(connection.recv_bytes()), memory).load()


class _Pickler(ForkingPickler):
    """Keep large tensors out of the pickle; `tensors` are their bytes, and where these start."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Any]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or not value.is_cpu or value.requires_grad:
            return None
        data: Any = value.contiguous().view(-1).view(torch.uint8).numpy().data
        if len(data) < SMALL:
            return bytearray(data), value.dtype, value.shape
        start = self.size
        self.tensors.append((start, data))
        self.size += math.ceil(len(data) / ALIGNED) * ALIGNED
        return start, value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: Tensor | None) -> None:
        super().__init__(file)
        self.memory = memory

    def persistent_load(self, pid: Any) -> Tensor:
        data, dtype, shape = pid
        if isinstance(data, bytearray):
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        else:
            assert self.memory is not None
            size = shape.numel() * dtype.itemsize
            flat = self.memory[data : data + size].view(dtype)
        return flat.view(shape)


def _mapped(files: list[int], size: int) -> Tensor:
    """Map the memory behind a descriptor: uint8 [size]."""
    try:
        if not files:  # the system drops a descriptor beyond the limit of open files
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        path = f"/proc/self/fd/{files[0]}"
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WorkerError(
            f"a batch of {size / 1e6:.0f} MB cannot be received from its worker: {error}; if too "
            "many files are open, raise `ulimit -n`; if memory ran out, use smaller batches"
        ) from error


@contextmanager
def _socket_of(connection: Connection) -> Iterator[socket.socket]:
    """Borrow the socket of a connection, to pass descriptors over it."""
    ours = socket.socket(fileno=connection.fileno())
    try:
        yield ours
    finally:
        ours.detach()
