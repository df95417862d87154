"""Processes that do tasks, and are replaced when they die.

`Workers(work, count).run(tasks)` gives (task, work(task, condemned)) for each task. A process
that dies (a decoder crashes, memory runs out) or says nothing for TIMEOUT seconds is named in
the log with the place it was `at`, and another takes over its tasks. A place at which two
processes died is condemned: work is to leave it out.

No process outlives its parent, however that ends.
"""

import gc
import logging
import multiprocessing
import os
import signal
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
from multiprocessing.sharedctypes import RawArray
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

logger = logging.getLogger(__name__)

TIMEOUT = 900.0  # seconds without a word after which a process counts as stuck
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
        self._places = RawArray("q", [-1] * max(count, 1))
        self._crew: list[_Worker] = []
        weakref.finalize(self, _stop, self._crew, os.getpid())
        for number in range(count):
            self._crew.append(_Worker(number, work, self._places))

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
        global _told
        for task in tasks:
            _told = self._heard
            yield task, self._work(task, frozenset())

    def _results(self) -> Iterator[tuple[_Key, Result]]:
        """Waits for word from any process; looks after those that died."""
        busy = [worker for worker in self._crew if worker.tasks]
        left = min(worker.heard + TIMEOUT for worker in busy) - time.monotonic()
        waited: list[Any] = [worker.connection for worker in busy]
        ready = wait([*waited, *(worker.process.sentinel for worker in busy)], max(left, 0.0))
        for worker in busy:
            if worker.connection in ready:
                try:
                    key, value, error = worker.connection.recv()
                except (EOFError, OSError):  # died; what it shared may have gone with it
                    self._replace(worker)
                    continue
                worker.heard = time.monotonic()
                if error is not None and key in worker.tasks:
                    raise error[0] from RemoteTraceback(error[1])
                if key is None:
                    self._heard(value)
                    continue
                self._deaths_in_a_row = 0
                worker.tasks.pop(key, None)
                yield key, value
            elif worker.process.sentinel in ready:
                self._replace(worker)
            elif time.monotonic() > worker.heard + TIMEOUT:
                worker.process.kill()
                self._replace(worker, f"said nothing for {TIMEOUT:.0f} s")

    def _replace(self, worker: "_Worker", reason: str | None = None) -> None:
        worker.process.join(5)
        place = self._places[worker.number]
        what = "between two clips" if place < 0 else f"at {self._name(place)}"
        told = (
            f"worker {worker.number} (process {worker.process.pid}) "
            f"{reason or _how_it_ended(worker.process.exitcode)} {what}"
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
        new = _Worker(worker.number, self._work, self._places)
        self._crew[worker.number] = new
        for key, task in tasks.items():
            new.give(key, task, self._condemned)


class _Worker:
    """One process, as its parent sees it, and the tasks it has not done yet."""

    def __init__(self, number: int, work: Any, places: Any) -> None:
        places[number] = -1
        self.number = number
        self.tasks: dict[_Key, Any] = {}
        self.heard = time.monotonic()
        self.connection, theirs = multiprocessing.Pipe()
        self.process: BaseProcess = multiprocessing.Process(
            target=_serve, args=(theirs, work, places, number), daemon=True
        )
        with _interrupts_held():
            self.process.start()
        theirs.close()

    def give(self, key: _Key, task: Any, condemned: frozenset[int]) -> None:
        if not self.tasks:
            self.heard = time.monotonic()
        self.tasks[key] = task
        with suppress(OSError):  # it died; that is noticed, and the task given again
            self.connection.send((key, task, condemned))


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


# --- in the processes -----------------------------------------------------------------------

_slot: tuple[Any, int] | None = None
_told: Callable[[Any], None] = lambda value: None  # noqa: E731


def at(place: int) -> None:
    """Say which place this process works at, for the case that it dies there; -1 for none."""
    if _slot is not None:
        _slot[0][_slot[1]] = place


def tell(value: Any) -> None:
    """Give word to the parent while a task is still under way."""
    _told(value)


def _serve(connection: Connection, work: Any, places: Any, number: int) -> None:
    global _slot, _told
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops this process
    for code in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(code, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.excepthook = _report  # the thread that shares tensors has no other
    gc.freeze()  # or collecting would copy, page by page, what is shared with the parent
    torch.set_num_threads(1)  # a process a core; and OpenMP's threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _slot = (places, number)
    _told = lambda value: connection.send((None, value, None))  # noqa: E731
    while True:
        try:
            key, task, condemned = connection.recv()
        except (EOFError, OSError):
            return
        try:
            message: Any = (key, work(task, condemned), None)
        except Exception as error:
            message = (key, None, (error, traceback.format_exc()))
        at(-1)
        try:
            connection.send(message)
        except ConnectionError:
            return


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a parent that was killed there is nothing to tell but that it is gone."""
    parent = multiprocessing.parent_process()
    if isinstance(error, EOFError | ConnectionError) and parent is not None:
        parent.join(5)  # its connections close before it counts as ended
        if not parent.is_alive():
            os._exit(1)
    sys.__excepthook__(kind, error, trace)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
