"""Processes that do tasks, and are replaced when they die.

`Workers(work, count).run(tasks)` gives (task, work(task, condemned)) for each task. A process
that dies (a decoder crashes, memory runs out) or stays at one place without a word for TIMEOUT
seconds is named in the log with the place it was `at`, and another takes over its tasks. A place
at which two processes died is condemned: work is to leave it out. On Linux one process gets no
more than half of the machine's or container's memory. With no processes (count 0), work that
crashes, never ends or takes all memory takes this one with it.

Results may hold tensors: on Linux these go through memory that has no name, neither in /dev/shm,
of which a container has little, nor elsewhere, and that is free once nobody holds them.

No process outlives its parent, however that ends.
"""

import ctypes
import errno
import gc
import io
import logging
import math
import mmap
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
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from clipvip.files import shown

logger = logging.getLogger(__name__)

TIMEOUT = 900.0  # seconds at one place without a word after which a process counts as stuck
START = 60.0  # the same for one that was forked and has not begun
CONDEMNED = "two processes died while they read it"
DEATHS_IN_A_ROW = 10  # without a result between them: more is wrong than a file

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, frozenset[int]], Result]


class WorkerError(RuntimeError):
    """Processes die faster than they get anything done."""


class RemoteTraceback(Exception):
    """Where another process's error, whose cause this is, was raised."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class _Key(NamedTuple):
    run: int
    number: int


BEGUN = _Key(-1, -1)  # stands for no task: the first word of each process


class _Failure(NamedTuple):
    """An error of `work`, as it goes between processes."""

    error: Exception
    trace: str
    place: int


class _Slot(ctypes.Structure):
    """The place a process is at, and since when by the monotonic clock, in shared memory."""

    _fields_ = (("place", ctypes.c_longlong), ("since", ctypes.c_double))


class Workers(Generic[Task, Result]):
    """`count` processes that do `work`; with 0 it is done in this one.

    work(task, condemned): picklable where processes are not forked. name: what a place is, in
    words, for the log. heard: called with what `work` says through `tell`.
    """

    def __init__(
        self,
        work: "Work[Task, Result]",
        count: int,
        name: Callable[[int], str] = str,
        heard: Callable[[Any], None] = lambda value: None,
    ) -> None:
        self._work = work
        self._name = name
        self._heard = heard
        self._runs = 0
        self._deaths: Counter[int] = Counter()
        self._deaths_in_a_row = 0
        self._condemned: frozenset[int] = frozenset()
        self._slots = _slots(count)
        self._crew: list[_Worker] = []
        weakref.finalize(self, _stop, self._crew, os.getpid())
        for number in range(count):
            self._crew.append(_Worker(number, work, self._slots))

    def run(
        self,
        tasks: Iterable[Task],
        *,
        ahead: int = 2,
        ordered: bool = True,
        worker_of: Callable[[Task], int] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """Each task with its result, in the order of tasks or else as they are done.

        ahead: tasks given out and not yet taken, a process. worker_of: number, modulo their
        count, of the process that has to do a task; else the one with least to do.
        An error of `work` is raised here. Leaving early is fine.
        """
        if not self._crew:
            yield from self._run_here(tasks)
            return
        self._runs += 1
        run, due = self._runs, 0
        source = enumerate(tasks)
        given: dict[int, Task] = {}
        done: dict[int, Result] = {}
        for worker in self._crew:
            worker.tasks.clear()  # left over from a run that was left early
        while True:
            while len(given) < ahead * len(self._crew):
                following = next(source, None)
                if following is None:
                    break
                number, task = following
                given[number] = task
                if worker_of is None:
                    worker = min(self._crew, key=lambda worker: len(worker.tasks))
                else:
                    worker = self._crew[worker_of(task) % len(self._crew)]
                worker.give(_Key(run, number), task, self._condemned)
            if not given:
                return
            ready = due if ordered else next(iter(done), -1)
            if ready in done:
                due += 1
                yield given.pop(ready), done.pop(ready)
                continue
            for key, result in self._results():
                if key.run == run:
                    done[key.number] = result

    def _run_here(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        global _slot, _told
        for task in tasks:
            _slot, _told = _Slot(-1), self._heard
            try:
                result = self._work(task, frozenset())
            except Exception as error:
                logger.error("%s %s", type(error).__name__, self._where(_slot.place))
                raise
            yield task, result

    def _results(self) -> Iterator[tuple[_Key, Result]]:
        """Waits for word from any process; looks after those that died."""
        busy = [worker for worker in self._crew if worker.tasks]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        waited: list[Any] = [w.connection for w in busy if not w.connection.closed]
        ready = wait([*waited, *(worker.process.sentinel for worker in busy)], max(left, 0.0))
        for worker in busy:
            if worker.connection in ready:
                try:
                    key, value, failure = worker.receive()
                except (EOFError, OSError):  # died
                    self._replace(worker)
                    continue
                if key == BEGUN:
                    continue
                if failure is not None and key in worker.tasks:
                    self._fail(worker, failure)
                if key is None:
                    self._heard(value)
                    continue
                self._deaths_in_a_row = 0
                worker.tasks.pop(key, None)
                yield key, value
            elif worker.process.sentinel in ready:
                self._replace(worker)
            elif time.monotonic() > worker.deadline:
                worker.process.kill()
                self._replace(
                    worker,
                    f"said nothing for {worker.patience:.0f} s"
                    if worker.begun
                    else f"did not begin within {worker.patience:.0f} s of its start",
                )

    def _where(self, place: int) -> str:
        return "between two clips" if place < 0 else f"at {shown(self._name(place))}"

    def _fail(self, worker: "_Worker", failure: _Failure) -> None:
        error, where = failure.error, self._where(failure.place)
        logger.error("%s %s, in worker %d", type(error).__name__, where, worker.number)
        raise error from RemoteTraceback(f"In worker {worker.number}, {where}:\n{failure.trace}")

    def _replace(self, worker: "_Worker", reason: str | None = None) -> None:
        worker.process.join(5)
        place = worker.slot.place
        told = (
            f"worker {worker.number} (process {worker.process.pid}) "
            f"{reason or _how_it_ended(worker.process.exitcode)} {self._where(place)}"
        )
        # A scheduler sends SIGTERM to all processes: it says nothing of a clip.
        own = worker.process.exitcode != -signal.SIGTERM
        self._deaths_in_a_row += own
        if self._deaths_in_a_row > DEATHS_IN_A_ROW:
            raise WorkerError(
                f"{told}, the {self._deaths_in_a_row}th to die without a result between; if "
                "memory ran out, use fewer workers or smaller batches"
            )
        if own and place >= 0:
            self._deaths[place] += 1
            if self._deaths[place] == 2:
                self._condemned |= {place}
                told += ", as another did before; it is left out from now on"
        logger.warning("%s; another takes its place", told)
        tasks = worker.tasks
        worker.connection.close()
        new = _Worker(worker.number, self._work, self._slots)
        self._crew[worker.number] = new
        for key, task in tasks.items():
            new.give(key, task, self._condemned)


class _Worker:
    """One process, as its parent sees it, and the tasks it has not done yet."""

    def __init__(self, number: int, work: Any, slots: Any) -> None:
        self.number = number
        self.slot: _Slot = slots[number]
        self.slot.place, self.slot.since = -1, time.monotonic()
        self.tasks: dict[_Key, Any] = {}
        self.heard = self.slot.since
        self.begun = False
        with _starting, _interrupts_held(), _garbage_kept():
            self.connection, theirs = multiprocessing.Pipe()
            self.process: BaseProcess = multiprocessing.Process(
                target=_serve, args=(theirs, work, slots, number), daemon=True
            )
            self.process.start()
            theirs.close()

    @property
    def patience(self) -> float:
        """Seconds; a process that is not forked has much to import first."""
        return START if _forks() and not self.begun else TIMEOUT

    @property
    def deadline(self) -> float:
        return max(self.heard, self.slot.since) + self.patience

    def give(self, key: _Key, task: Any, condemned: frozenset[int]) -> None:
        if not self.tasks:
            self.heard = time.monotonic()
        self.tasks[key] = task
        with suppress(OSError):  # it died; that is noticed, and the task given again
            self.connection.send((key, task, condemned))

    def receive(self) -> Any:
        """One message. Raises EOFError or OSError where the process died."""
        try:
            message = _receive(self.connection)
        except (EOFError, OSError):
            raise
        except BaseException:  # ctrl-C too: what follows part of a message makes no sense
            self.process.terminate()
            self.connection.close()
            raise
        self.heard = time.monotonic()
        self.begun = True
        return message


def _forks() -> bool:
    return multiprocessing.get_start_method() == "fork"


def _slots(count: int) -> Any:
    """_Slot [count], shared with the processes to come."""
    if not _forks():
        return RawArray(_Slot, count)
    kind = _Slot * count  # RawArray would make a file in /dev/shm
    return kind.from_buffer(mmap.mmap(-1, max(ctypes.sizeof(kind), 1)))


# One at a time, or a process would inherit, and keep open, the ends of another's pipe.
_starting = threading.Lock()


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Nothing is collected in a new process before it sets that apart: what its parent left would
    end there, and wait (a pool, a pipeline) for threads that only the parent has."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """What runs around a fork (of logging, of torch) ignores exceptions, ctrl-C's too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def _stop(crew: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked process drops its copy of what is not its own
        return
    for worker in crew:
        worker.process.terminate()
    for worker in crew:
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()


# --- between the processes ------------------------------------------------------------------

# Python's own os.memfd_create is missing where Python was built for older systems.
_memory_file: Any = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
CLOSE_ON_EXEC = 1
# Bytes of a tensor that is sent as it is. One that a user keeps (a batch's clip_index) would
# otherwise keep all tensors of its result.
SMALL = 1 << 16
ALIGNED = 64  # bytes
HEADER = 8  # bytes of a message's first part
_CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class _Pickler(ForkingPickler):
    """Leaves plain tensors out, to be written after each other."""

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


class _Message(NamedTuple):
    """Bytes to send, with the file, of `size` bytes, that holds the tensors, or none."""

    data: bytes
    file: int | None = None
    size: int = 0


def _pack(value: Any) -> _Message:
    """Raises WorkerError where memory ran out, or what pickling raises."""
    if _memory_file is None:
        return _Message(bytes(ForkingPickler.dumps(value)))
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    if not pickler.size:
        return _Message(buffer.getvalue())
    file = None
    try:
        file = _memory_file(b"clipvip", CLOSE_ON_EXEC)
        if file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.ftruncate(file, pickler.size)  # torch.from_file writes to one that is shorter
        for start, data in pickler.tensors:
            # Written, not copied into a mapping, where to run out of memory would be a crash.
            while data:
                written = os.pwrite(file, data, start)
                start, data = start + written, data[written:]
    except OSError as error:
        if file is not None and file >= 0:
            os.close(file)
        raise WorkerError(
            f"no room to pass on a result of {pickler.size / 1e6:.0f} MB ({error.strerror}); if "
            "memory ran out, use fewer workers or smaller batches"
        ) from error
    return _Message(buffer.getvalue(), file, pickler.size)


def _send(connection: Connection, message: _Message) -> None:
    """Its size, with the file if there is one, then its bytes."""
    files = [] if message.file is None else [message.file]
    with _socket_of(connection) as ours:
        socket.send_fds(ours, [message.size.to_bytes(HEADER, "little")], files)
    for file in files:
        os.close(file)
    connection.send_bytes(message.data)


def _receive(connection: Connection) -> Any:
    """Raises EOFError or OSError where the sender is gone, WorkerError where its tensors cannot
    be had here."""
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


def _mapped(files: list[int], size: int) -> Tensor:
    """uint8 [size]: the memory of a file, with no file left open."""
    try:
        if not files:  # the system drops one for which there is no number
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        path = f"/proc/self/fd/{files[0]}"
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WorkerError(
            f"a batch of {size / 1e6:.0f} MB cannot be taken from its worker: {error}; if too many "
            "files are open, raise `ulimit -n`; if memory ran out, use smaller batches"
        ) from error


@contextmanager
def _socket_of(connection: Connection) -> Iterator[socket.socket]:
    """The socket that a connection is, for a moment."""
    ours = socket.socket(fileno=connection.fileno())
    try:
        yield ours
    finally:
        ours.detach()


# --- in the processes -----------------------------------------------------------------------

_slot: _Slot | None = None
_told: Callable[[Any], None] = lambda value: None  # noqa: E731


def _memory() -> int:
    """Bytes that the machine has, or the container allows."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        with suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found)


def _limit_memory() -> None:
    """Limit this process's memory, so that a request by a library fails with an error before memory
    runs out for all. Where it does run out, the system ends this process and not its parent."""
    with suppress(OSError, ValueError, IndexError):  # best effort: a sandbox may lack any of it
        status = Path("/proc/self/status").read_text()
        inherited = int(status.partition("VmData:")[2].split()[0]) << 10
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = {inherited + _memory() // 2, soft, hard} - {resource.RLIM_INFINITY}
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str((int(score.read_text()) + 1000) // 2))


def at(place: int) -> None:
    """Say which place this process works at, for the case that it dies there; -1 for none."""
    if _slot is not None:
        _slot.place, _slot.since = place, time.monotonic()


def tell(value: Any) -> None:
    """Give word to the parent while a task is still under way."""
    _told(value)


def _serve(connection: Connection, work: Any, slots: Any, number: int) -> None:
    global _slot, _told

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops this process
    for code in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(code, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _limit_memory()
    gc.freeze()  # or collecting would copy, page by page, what is shared with the parent
    gc.enable()
    torch.set_num_threads(1)  # a process a core; and OpenMP's threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _slot = slots[number]

    def send(key: _Key | None, value: Any = None, failure: _Failure | None = None) -> None:
        _send(connection, _pack((key, value, failure)))

    _told = lambda value: send(None, value)  # noqa: E731
    try:
        send(BEGUN)
        while True:
            try:
                key, task, condemned = connection.recv()
            except (EOFError, OSError):
                break
            try:
                message = _pack((key, work(task, condemned), None))
            except Exception as error:
                message = _pack((key, None, _failure(error)))
            at(-1)
            _send(connection, message)
    except ConnectionError:
        pass
    except BaseException:  # of a library that wants to end the process: so it does
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # the parent is gone; what it has to do at its own end is not to be done here


def _failure(error: Exception) -> _Failure:
    """The error, or a WorkerError with its words where it does not go between processes."""
    assert _slot is not None
    trace = traceback.format_exc()
    try:
        if not isinstance(pickle.loads(ForkingPickler.dumps(error)), Exception):
            raise TypeError
    except Exception:
        error = WorkerError(traceback.format_exception_only(type(error), error)[-1].strip())
    return _Failure(error, trace, _slot.place)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def cores(num_workers: int | None) -> int:
    if num_workers is not None:
        return num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
