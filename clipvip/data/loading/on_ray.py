"""Do tasks on a Ray cluster instead of in local processes.

`start_workers` gives local processes (`Workers`) or Ray actors (`RayWorkers`), which do the same
tasks with the same results. All nodes of a cluster must have this package, and see all files under
the same paths. in_actor.py is the code inside an actor.

An actor that dies (its node was lost or preempted, or memory ran out) is replaced, and its tasks
are given again. A place at which two actors died is excluded, as with local processes; a lost node
does not count. All actors end with the command, however it ends.
"""

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

import clipvip
from clipvip.data.loading.bad_files import BadFile
from clipvip.data.loading.in_actor import (
    SHARE,
    Actor,
    Begun,
    Expected,
    Failed,
    InProcess,
    Line,
    Message,
    RayJob,
    Refused,
    Reported,
    Result,
    Task,
)
from clipvip.data.loading.in_worker import Key, WorkerError
from clipvip.data.loading.ray_cluster import On, at_least_one, is_ray, joined_cluster
from clipvip.data.loading.workers import DEATHS_IN_A_ROW, Work, Workers, worker_count
from clipvip.files import LOCK, shown

logger = logging.getLogger(__name__)

LOST = "node has died"  # in Ray's reason for the death of an actor
TASK_DEATHS = 5  # of actors at one task without a result of it: more is not bad luck
NOT_FOUND = "no such file"  # in the reason of a bad file
MOST_PATHS = 100  # that every actor looks for before it begins
WAITING = 60.0  # seconds without any actor after which that is said


@contextmanager
def start_workers(
    on: On,
    work: Work[Task, Result],
    num_workers: int | None,
    tasks: int,
    name: Callable[[int], str] = str,
    on_progress: Callable[[int], None] = lambda clips: None,
    *,
    sees: Callable[[], Sequence[str | Path]] = tuple,
    writes: Path | None = None,
) -> Iterator["Workers[Task, Result] | RayWorkers[Task, Result]"]:
    """Start processes that do `work`, on this machine or on a Ray cluster; end them afterwards.

    work, name, on_progress: see Workers. num_workers: number of processes; None for one per core.
    tasks: number of tasks, and so the most processes that are of use.
    sees: gives files that workers read. Some of them are looked for by every worker of a cluster:
        those that exist here must exist there.
    writes: folder that workers write to, held by clipvip.files.only_run.

    Raises ValueError without Ray or a cluster, WorkerError if a worker cannot see a path.
    """
    if not is_ray(on) or not tasks:
        count = worker_count(num_workers, tasks)
        with closing(Workers(work, count, name, on_progress)) as workers:
            yield workers
        return
    with joined_cluster() as cluster:
        count = min(at_least_one(num_workers) or cluster.cpus, tasks)
        job = InProcess(work, name)
        given: dict[str, Any] = {"name": name, "on_progress": on_progress}
        with closing(RayWorkers(job, count, sees=sees(), writes=writes, **given)) as actors:
            yield actors


def check_seen(bad_files: Iterable[BadFile]) -> None:
    """Raise WorkerError if a worker of a cluster did not find a file that this machine sees."""
    for file in bad_files:
        if NOT_FOUND in file.reason and os.path.exists(file.path):
            raise WorkerError(f"a Ray worker does not see {shown(file.path)}; {SHARE}")


@dataclass
class _Given(Generic[Task]):
    """A task. deaths: of actors at it since its last result. reported: clips of it that are done,
    in the attempt under way."""

    task: Task
    deaths: int = 0
    reported: int = 0


class _Remote:
    """An actor as the command sees it. tasks: not done yet, in their order; the first is under
    way. place: the last one it told. death: why it ended, if it did."""

    def __init__(self, number: int, handle: Any) -> None:
        self.number, self.handle = number, handle
        self.host = ""
        self.begun = False
        self.place = -1
        self.tasks: dict[Key, _Given[Any]] = {}
        self.death: Exception | None = None
        self.pending: Any = None  # the call that it has not answered yet
        self._to_send: list[tuple[Key, Any, frozenset[int]]] = []

    def __str__(self) -> str:
        return f"Ray worker {self.number}" + (f" on {self.host}" if self.host else "")

    def give(self, key: Key, given: _Given[Any], excluded: frozenset[int]) -> None:
        self.tasks[key] = given
        self._to_send.append((key, given.task, excluded))

    def call(self) -> Any:
        """Return the reference of the call under way; begin one if there is none."""
        if self.pending is None:
            self.pending = self.handle.exchange.remote(self._to_send)
            self._to_send = []
        return self.pending


class RayWorkers(Generic[Task, Result]):
    """`count` Ray actors that do a job, each with so many CPUs and GPUs. The cluster is joined.

    name, on_progress: see Workers. sees, writes: see start_workers.
    """

    def __init__(
        self,
        job: RayJob[Task, Result],
        count: int,
        *,
        cpus: int = 1,
        gpus: int = 0,
        name: Callable[[int], str] = str,
        on_progress: Callable[[int], None] = lambda clips: None,
        sees: Sequence[str | Path] = (),
        writes: Path | None = None,
    ) -> None:
        import ray

        self._ray = ray
        self._job, self._name, self._on_progress = job, name, on_progress
        self._runs = 0
        self._deaths: Counter[int] = Counter()  # by place
        self._deaths_in_a_row = 0
        self._excluded: frozenset[int] = frozenset()
        self._begun = False  # one of the actors has
        self._asked = time.monotonic()
        some = sees[:: max(len(sees) // MOST_PATHS, 1)]
        paths = [os.fspath(path) for path in (*some, *([] if writes is None else [writes]))]
        paths = [path for path in paths if os.path.exists(path)]
        lock = None if writes is None else writes / LOCK
        content = None if lock is None else (os.fspath(lock), lock.read_bytes())
        expected = Expected(clipvip.__version__, os.getcwd(), paths, content)
        # Put once, so that the actors of a node share the memory of its arrays.
        given = ray.put(job), ray.put(expected)
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Actor)
        self._start = lambda number: _Remote(number, actor.remote(*given))
        self._actors = [self._start(number) for number in range(count)]

    def close(self) -> None:
        """End all actors, in the middle of their tasks too."""
        for actor in self._actors:
            with suppress(Exception):  # of a cluster that is gone
                self._ray.kill(actor.handle)
        self._actors = []

    def run(
        self, tasks: Iterable[Task], *, ahead: int = 2, ordered: Literal[False]
    ) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, as they are done; more than once if the job yields
        several results. See Workers.run.

        Raises errors of the job, and WorkerError if actors cannot begin, or die one after the
        other.
        """
        self._runs += 1
        coming = enumerate(tasks)
        again: deque[tuple[Key, _Given[Task]]] = deque()
        exhausted = False
        for actor in self._actors:
            actor.tasks.clear()  # of an earlier run that was stopped
        while True:
            for actor in self._free(ahead):
                if again:
                    actor.give(*again.popleft(), self._excluded)
                elif (following := next(coming, None)) is not None:
                    number, task = following
                    actor.give((self._runs, number), _Given(task), self._excluded)
                else:
                    exhausted = True
                    break
            if exhausted and not again and not any(actor.tasks for actor in self._actors):
                return
            for actor, message in self._said():
                yield from self._heard(actor, message)
            for actor in [actor for actor in self._actors if actor.death is not None]:
                again.extendleft(reversed(self._replace(actor)))

    def _free(self, ahead: int) -> Iterator[_Remote]:
        """Yield actors that can take one more task, those with the fewest tasks first."""
        for count in range(ahead):
            for actor in self._actors:
                if actor.begun and len(actor.tasks) == count:
                    yield actor

    def _said(self) -> Iterator[tuple[_Remote, Message]]:
        """Wait for what actors say, at most a second, and yield it. Note which have died."""
        calls = {actor.call(): actor for actor in self._actors if actor.tasks or not actor.begun}
        self._tell_of_waiting()
        ready, _ = self._ray.wait([*calls], num_returns=1, timeout=1.0)
        if ready:
            ready, _ = self._ray.wait([*calls], num_returns=len(calls), timeout=0)
        for call in ready:
            actor = calls[call]
            actor.pending = None
            try:
                actor.place, said = self._ray.get(call)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                actor.death = error
                continue
            for message in said:
                yield actor, message

    def _tell_of_waiting(self) -> None:
        if not self._begun and time.monotonic() - self._asked > WAITING:
            self._asked = math.inf  # say it once
            logger.warning(
                "none of %d Ray workers has started yet; `ray status` shows what they wait for",
                len(self._actors),
            )

    def _heard(self, actor: _Remote, message: Message) -> Iterator[tuple[Task, Result]]:
        if isinstance(message, Line):
            message.log()
        elif isinstance(message, Refused):
            raise message.error
        elif isinstance(message, Begun):
            actor.begun, actor.host = True, message.host
            self._begun = True
        elif (given := actor.tasks.get(message.key)) is None:
            pass  # of an earlier run
        elif isinstance(message, Reported):
            given.reported += message.clips
            self._on_progress(message.clips)
        elif isinstance(message, Failed):
            error, trace, _ = message.failure  # whose place the actor has logged
            raise error from RuntimeError(f"in {actor}:\n{trace}")
        else:
            self._deaths_in_a_row = given.deaths = 0
            if message.last:
                del actor.tasks[message.key]
            for result in message.results:
                task, given.task = given.task, self._job.rest(given.task, result)
                yield task, result

    def _where(self, place: int) -> str:
        return "between two clips" if place < 0 else f"at {shown(self._name(place))}"

    def _replace(self, dead: _Remote) -> list[tuple[Key, _Given[Task]]]:
        """Start an actor in place of a dead one. Return its tasks."""
        reason = str(dead.death)
        if getattr(dead.death, "actor_init_failed", False):  # another would fail too
            last = reason.strip().splitlines()[-1]
            raise WorkerError(
                f"Ray cannot start workers ({last}); is clipvip installed on all nodes?"
            )
        unavailable = isinstance(dead.death, self._ray.exceptions.ActorUnavailableError)
        if unavailable or LOST in reason or getattr(dead.death, "preempted", False):
            event = f"{dead} was lost with its node, or its connection was"
            under_way = None
        else:
            detail = " ".join(reason.partition("Worker exit detail:")[2].split()).partition(". ")[0]
            event = f"{dead} died {self._where(dead.place)}" + f" ({detail})" * bool(detail)
            under_way = next(iter(dead.tasks.values()), None)
            event += self._blamed(dead.place)
        self._count_death(event, under_way)
        tasks = [*dead.tasks.items()]
        logger.warning("%s; another one takes over its tasks", event)
        with suppress(Exception):  # it may be cut off rather than dead
            self._ray.kill(dead.handle)
        for _, given in tasks:
            if given.reported:
                self._on_progress(-given.reported)
            given.reported = 0
        self._actors[dead.number] = self._start(dead.number)
        return tasks

    def _blamed(self, place: int) -> str:
        """Count a death at a place. Return what follows from it, in words."""
        if place >= 0:
            self._deaths[place] += 1
            if self._deaths[place] == 2:
                self._excluded |= {place}
                return ", the second to die there; this clip is skipped from now on"
        return ""

    def _count_death(self, event: str, under_way: _Given[Task] | None) -> None:
        """Raise WorkerError if too many actors died in a row, or at one task."""
        self._deaths_in_a_row += 1
        deaths = 0
        if under_way is not None:
            under_way.deaths += 1
            deaths = under_way.deaths
        most = max(DEATHS_IN_A_ROW, 2 * len(self._actors))  # a node may have had all of them
        if self._deaths_in_a_row > most or deaths > TASK_DEATHS:
            raise WorkerError(
                f"{event}, the last of several in a row; if memory ran out, use fewer workers"
            )
