"""Code that runs inside a Ray actor, and what the actor says to the command that started it.

An actor does one task at a time, in a thread. The command calls `exchange` again and again: it
brings new tasks and takes what was said meanwhile. Most jobs do their work in a process of the
actor's own (`InProcess`), which is replaced if a clip crashes or blocks it, as on a single machine.
"""

import logging
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import clipvip
from clipvip.data.loading.in_worker import Key, WorkerError, WorkFailure, failure_of
from clipvip.data.loading.workers import Work, Workers
from clipvip.files import shown

TELL_SECONDS = 1.0  # between two messages of an actor that has no result yet
SHARE = (
    "with --on ray, all files must lie in folders that all nodes of the cluster share under the "
    "same paths"
)
SEE_SECONDS = 10.0  # a shared file system may take that long to show a new file elsewhere

Task = TypeVar("Task")
Result = TypeVar("Result")


class Line(NamedTuple):
    """A line of a log. name: of its logger."""

    name: str
    level: int
    text: str

    def log(self) -> None:
        logging.getLogger(self.name).log(self.level, "%s", self.text)


class RayJob(Generic[Task, Result]):
    """A kind of work. It is pickled, and each actor has its own copy.

    begin: called once in each actor, before its first task; such as to load a model.
        report: to be called with numbers of clips that are done, for the progress bar.
    do: yields the results of a task, one or more. excluded: places that must be skipped.
    place: number of the clip that is worked at; -1 for none.
    rest: what is left of a task after one of several results has arrived.
    """

    def begin(self, report: Callable[[int], None]) -> None:
        pass

    def do(self, task: Task, excluded: frozenset[int]) -> Iterator[Result]:
        raise NotImplementedError

    def place(self) -> int:
        return -1

    def rest(self, task: Task, result: Result) -> Task:
        return task


class InProcess(RayJob[Task, Result]):
    """Do `work` in a process of the actor's own, see Workers."""

    def __init__(self, work: Work[Task, Result], name: Callable[[int], str]) -> None:
        self._work, self._name = _Logged(work), name
        self._workers: Workers[Any, Any] | None = None

    def begin(self, report: Callable[[int], None]) -> None:
        self._workers = Workers(self._work, 1, self._name, report)

    def do(self, task: Task, excluded: frozenset[int]) -> Iterator[Result]:
        assert self._workers is not None
        for _, (result, lines) in self._workers.run([(task, excluded)]):
            for line in lines:
                line.log()
            yield result

    def place(self) -> int:
        return -1 if self._workers is None else self._workers.places()[0]


@dataclass
class _Logged(Generic[Task, Result]):
    """Do `work` and return also what it logged, which nobody reads in the actor's process."""

    work: Work[Task, Result]

    def __call__(
        self, given: tuple[Task, frozenset[int]], excluded: frozenset[int]
    ) -> tuple[Result, list[Line]]:
        task, also_excluded = given
        lines: list[Line] = []
        package = logging.getLogger(clipvip.__name__)
        package.handlers = [_Lines(lines.append)]  # not those that the process has inherited
        return self.work(task, excluded | also_excluded), lines


class _Lines(logging.Handler):
    def __init__(self, put: Callable[[Line], None]) -> None:
        super().__init__()
        self._put = put

    def emit(self, record: logging.LogRecord) -> None:
        self._put(Line(record.name, record.levelno, self.format(record)))


# --- messages, beside Line ------------------------------------------------------------------------


class Begun(NamedTuple):
    """The actor can do tasks."""

    host: str


class Refused(NamedTuple):
    """The actor cannot do any task, nor could another."""

    error: Exception


class Reported(NamedTuple):
    """Clips of a task that are done."""

    key: Key
    clips: int


class Done(NamedTuple):
    """Results of a task. last: it is done."""

    key: Key
    results: list[Any]
    last: bool


class Failed(NamedTuple):
    """An error of the job in a task."""

    key: Key
    failure: WorkFailure


Message = Begun | Refused | Reported | Done | Failed | Line


class Expected(NamedTuple):
    """Things that must be the same for an actor as for the command.

    version: of this package. folder: the working folder, to which relative paths refer.
    paths: files and folders that exist. lock: path and content of a file that the command has just
    written, which shows that a folder is the same one; None if actors write no files.
    """

    version: str
    folder: str
    paths: Sequence[str]
    lock: tuple[str, bytes] | None

    def check(self) -> None:
        """Enter the command's working folder. Raises WorkerError if this machine has another
        version of the package, or does not see a path."""
        here = f"the Ray worker on {socket.gethostname()}"
        if clipvip.__version__ != self.version:
            raise WorkerError(
                f"{here} has clipvip {clipvip.__version__}, this machine {self.version}; install "
                "the same version on all nodes of the cluster"
            )
        with suppress(OSError):  # no matter if all paths are absolute
            os.chdir(self.folder)
        missing = next((path for path in self.paths if not os.path.exists(path)), None)
        until = time.monotonic() + SEE_SECONDS
        while missing is None and self.lock is not None and not self._sees_lock():
            if time.monotonic() > until:
                missing = os.path.dirname(self.lock[0])
            time.sleep(0.1)
        if missing is not None:
            raise WorkerError(
                f"{here} does not see {shown(os.path.join(self.folder, missing))} of this "
                f"machine; {SHARE}"
            )

    def _sees_lock(self) -> bool:
        assert self.lock is not None
        path, content = self.lock
        with suppress(OSError):
            return Path(path).read_bytes() == content
        return False


# --- the actor ------------------------------------------------------------------------------------


class Actor:
    """Do the tasks of a job. Ray makes an actor of this class."""

    def __init__(self, job: RayJob[Any, Any], expected: Expected) -> None:
        self._job = job
        self._tasks: queue.SimpleQueue[tuple[Key, Any, frozenset[int]]] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._key: Key = (0, -1)  # of the task under way
        threading.Thread(target=self._serve, args=(expected,), daemon=True).start()

    def exchange(
        self, tasks: Sequence[tuple[Key, Any, frozenset[int]]]
    ) -> tuple[int, list[Message]]:
        """Take tasks. Return the place that is worked at, and what was said since the last call: at
        the first result, else after TELL_SECONDS."""
        for task in tasks:
            self._tasks.put(task)
        said: list[Message] = []
        until = time.monotonic() + TELL_SECONDS
        while not any(isinstance(message, Begun | Refused | Done | Failed) for message in said):
            try:
                said.append(self._said.get(timeout=max(until - time.monotonic(), 0)))
            except queue.Empty:
                break
        while not self._said.empty():
            said.append(self._said.get())
        return self._job.place(), said

    def _serve(self, expected: Expected) -> None:
        try:
            expected.check()
            self._job.begin(self._report)
        except BaseException as error:
            self._said.put(Refused(failure_of(error, -1).error))
            return
        # From now on, since what a beginning job logs would be logged by every actor.
        logging.getLogger(clipvip.__name__).addHandler(_Lines(self._said.put))
        self._said.put(Begun(socket.gethostname()))
        while True:
            self._key, task, excluded = self._tasks.get()
            try:
                # One result is held back, to say with the last one that it is the last.
                held: list[Any] = []
                for result in self._job.do(task, excluded):
                    if held:
                        self._said.put(Done(self._key, held, last=False))
                    held = [result]
                self._said.put(Done(self._key, held, last=True))
            except BaseException as error:  # a SystemExit would end this thread alone
                traceback.print_exc()  # into Ray's own log
                self._said.put(Failed(self._key, failure_of(error, self._job.place())))

    def _report(self, clips: int) -> None:
        self._said.put(Reported(self._key, clips))
