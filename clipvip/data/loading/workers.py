"""Worker processes that do tasks in parallel, and are replaced if they die or hang.

`Workers(work, count).run(tasks)` yields (task, work(task, excluded)) for each task. A process that
dies (a decoder crashes, memory runs out), or stays at one place for TIMEOUT seconds without a
message, is logged with that place, and a new process takes over its tasks. A place at which two
processes died is excluded: `work` must skip it. On Linux, one process gets at most half of the
memory of the machine or container. Without processes (count 0), work runs in this process, which
it can then crash, block or fill.

No worker outlives its parent, however the parent ends.

The code inside the processes, and their messages, are in in_worker.py.
"""

import ctypes
import gc
import logging
import mmap
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any, Generic, TypeVar

from clipvip.data.loading import in_worker
from clipvip.data.loading.in_worker import Key, Slot, WorkerError, WorkFailure
from clipvip.files import shown

logger = logging.getLogger(__name__)

TIMEOUT = 900.0  # seconds at one place without a message after which a process counts as stuck
START = 60.0  # the same for a forked process that has not sent its first message
DEATHS_IN_A_ROW = 10  # without a result in between: more is not the fault of a file

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, frozenset[int]], Result]


def worker_count(num_workers: int | None, tasks: int, ranks: int = 1) -> int:
    """Number of workers for a number of tasks. num_workers None: one per core, which the ranks of
    a machine share. Raises ValueError for less than none."""
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"--workers is {num_workers}; expected at least 0")
    if num_workers is None:
        known = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
        num_workers = max(cores // ranks, 1)
    return min(num_workers, tasks)


class Workers(Generic[Task, Result]):
    """`count` processes that do `work`; with 0, this process does it.

    work: called with a task and the excluded places; picklable where processes are not forked.
    name: description of a place for the log, such as a path and a line number.
    on_progress: called with each number of clips that `work` reports by report_progress.
    """

    def __init__(
        self,
        work: Work[Task, Result],
        count: int,
        name: Callable[[int], str] = str,
        on_progress: Callable[[int], None] = lambda clips: None,
    ) -> None:
        self._work = work
        self._name = name
        self._on_progress = on_progress
        self._runs = 0
        self._deaths: Counter[int] = Counter()
        self._deaths_in_a_row = 0
        self._excluded: frozenset[int] = frozenset()
        self._slots = _shared_slots(count)
        self._workers: list[_Worker] = []
        self._stop = weakref.finalize(self, _stop, self._workers, os.getpid())
        for number in range(count):
            self._workers.append(_Worker(number, work, self._slots))

    def close(self) -> None:
        """End all processes, in the middle of their tasks too. Without it, they end when this
        object is no longer used, which an error that is kept may delay."""
        self._stop()

    def places(self) -> list[int]:
        """The place that each process works at; -1 for none."""
        return [worker.slot.place for worker in self._workers]

    def run(
        self,
        tasks: Iterable[Task],
        *,
        ahead: int = 2,
        ordered: bool = True,
        worker_of: Callable[[Task], int] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result. The caller may stop early and call run again.

        ahead: tasks per worker that are given out before their results are taken.
        ordered: yield results in the order of the tasks, otherwise as they are done.
        worker_of: number of the worker that must do a task, modulo their count; None for the
            worker with the fewest tasks.

        Raises errors of `work`, and WorkerError if workers die one after the other.
        """
        if not self._workers:
            yield from self._run_here(tasks)
            return
        self._runs += 1
        run, due = self._runs, 0
        coming = enumerate(tasks)
        given: dict[int, Task] = {}
        done: dict[int, Result] = {}
        for worker in self._workers:
            worker.tasks.clear()  # of an earlier run that was stopped
        while True:
            for number, task in islice(coming, ahead * len(self._workers) - len(given)):
                given[number] = task
                if worker_of is None:
                    worker = min(self._workers, key=lambda worker: len(worker.tasks))
                else:
                    worker = self._workers[worker_of(task) % len(self._workers)]
                worker.give((run, number), task, self._excluded)
            if not given:
                return
            ready = due if ordered else next(iter(done), -1)
            if ready in done:
                due += 1
                yield given.pop(ready), done.pop(ready)
                continue
            for (its_run, number), result in self._results():
                if its_run == run:
                    done[number] = result

    def _run_here(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        for task in tasks:
            slot = in_worker.report_here(self._on_progress)
            try:
                result = self._work(task, frozenset())
            except Exception as error:
                logger.error("%s %s", type(error).__name__, self._where(slot.place))
                raise
            yield task, result

    def _results(self) -> Iterator[tuple[Key, Result]]:
        """Wait for a message of any process; replace processes that died or hang."""
        busy = [worker for worker in self._workers if worker.tasks]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        waited: list[Any] = [w.connection for w in busy if not w.connection.closed]
        ready = wait([*waited, *(worker.process.sentinel for worker in busy)], max(left, 0.0))
        for worker in busy:
            if worker.connection in ready:
                try:
                    key, value = worker.receive()
                except (EOFError, OSError):  # died
                    self._replace(worker)
                    continue
                if key is None:
                    if value:
                        self._on_progress(value)
                    continue
                if isinstance(value, WorkFailure) and key in worker.tasks:
                    error, where = value.error, self._where(value.place)
                    logger.error("%s %s, in worker %d", type(error).__name__, where, worker.number)
                    trace = f"in worker {worker.number}, {where}:\n{value.trace}"
                    raise error from RuntimeError(trace)
                self._deaths_in_a_row = 0
                worker.tasks.pop(key, None)
                yield key, value
            elif worker.process.sentinel in ready:
                self._replace(worker)
            elif time.monotonic() > worker.deadline:
                worker.process.kill()
                missing = "respond" if worker.started else "start"
                self._replace(worker, f"did not {missing} within {worker.patience:.0f} s")

    def _where(self, place: int) -> str:
        return "between two clips" if place < 0 else f"at {shown(self._name(place))}"

    def _replace(self, worker: "_Worker", reason: str | None = None) -> None:
        """Start a process that replaces one that ended, with the same tasks. reason: why it was
        killed; None if it ended by itself."""
        worker.process.join(5)
        place, code = worker.slot.place, worker.process.exitcode
        if reason is None:
            reason = f"ended with exit status {code}"
            if code is not None and code < 0:
                reason = f"was killed by {signal.Signals(-code).name}"
        event = (
            f"worker {worker.number} (process {worker.process.pid}) {reason} {self._where(place)}"
        )
        # A scheduler sends SIGTERM to all processes: the clip is not the cause.
        own_fault = code != -signal.SIGTERM
        self._deaths_in_a_row += own_fault
        if self._deaths_in_a_row > DEATHS_IN_A_ROW:
            raise WorkerError(
                f"{event}, the {self._deaths_in_a_row}th to die without a result in between; if "
                "memory ran out, use fewer workers or smaller batches"
            )
        if own_fault and place >= 0:
            self._deaths[place] += 1
            if self._deaths[place] == 2:
                self._excluded |= {place}
                event += ", the second to die there; this clip is skipped from now on"
        logger.warning("%s; a new process takes over its tasks", event)
        tasks = worker.tasks
        worker.connection.close()
        new = _Worker(worker.number, self._work, self._slots)
        self._workers[worker.number] = new
        for key, task in tasks.items():
            new.give(key, task, self._excluded)


class _Worker:
    """A process as its parent sees it, and the tasks it has not done yet."""

    def __init__(self, number: int, work: Any, slots: Any) -> None:
        self.number = number
        self.slot: Slot = slots[number]
        self.slot.place, self.slot.since = -1, time.monotonic()
        self.tasks: dict[Key, Any] = {}
        self.last_message = self.slot.since
        self.started = False
        with _starting():
            self.connection, theirs = multiprocessing.Pipe()
            self.process: BaseProcess = multiprocessing.Process(
                target=in_worker.serve, args=(theirs, work, slots, number), daemon=True
            )
            self.process.start()
            theirs.close()

    @property
    def patience(self) -> float:
        """Seconds to wait; a process that is not forked first imports for long."""
        return START if _forks() and not self.started else TIMEOUT

    @property
    def deadline(self) -> float:
        return max(self.last_message, self.slot.since) + self.patience

    def give(self, key: Key, task: Any, excluded: frozenset[int]) -> None:
        if not self.tasks:
            self.last_message = time.monotonic()
        self.tasks[key] = task
        with suppress(OSError):  # it died; _results notices, and the task is given again
            self.connection.send((key, task, excluded))

    def receive(self) -> Any:
        """Return one message. Raises EOFError or OSError if the process died."""
        try:
            message = in_worker.receive(self.connection)
        except (EOFError, OSError):
            raise
        except BaseException:  # ctrl-C too: the rest of a message cannot be read as one
            self.process.terminate()
            self.connection.close()
            raise
        self.last_message = time.monotonic()
        self.started = True
        return message


def _forks() -> bool:
    return multiprocessing.get_start_method() == "fork"


def _shared_slots(count: int) -> Any:
    """Slot [count], shared with the processes to be started."""
    if not _forks():
        return RawArray(Slot, count)
    kind = Slot * count  # RawArray would make a file in /dev/shm
    return kind.from_buffer(mmap.mmap(-1, max(ctypes.sizeof(kind), 1)))


_lock = threading.Lock()


@contextmanager
def _starting() -> Iterator[None]:
    """Start one process at a time, or it would inherit, and keep open, the ends of another's pipe.

    Ctrl-C is held back: the handlers that logging and torch run around a fork ignore exceptions.
    No garbage is collected before the new process sets the parent's objects apart: destructors of
    a pool or pipeline would wait there for threads that only the parent has.
    """
    with _lock:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked process drops its copy; the workers are its parent's
        return
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
