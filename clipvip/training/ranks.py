"""What ranks do for one another, so that they end alike."""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from clipvip import distributed

Result = TypeVar("Result")

_store: dist.Store | None = None  # where the ranks met


def start(timeout: float) -> PartialState:
    """Join the processes that a launcher started with this one; be alone where none did."""
    cpu = not torch.accelerator.is_available()  # without it, torchrun's ranks are strangers
    met = {}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        met = {"timeout": timedelta(seconds=timeout), **meet(timeout)}
    return PartialState(cpu=cpu, **met)


def meet(timeout: float) -> dict[str, Any]:
    """What init_process_group takes of ranks that a launcher started: store, rank, world_size.

    The launcher's store outlives the processes that it starts again, and with it the addresses
    that those before them left there. So they agree on a part of the store that is theirs: each
    rank shows a sign of its own, and the first answers each sign until it has been heard.
    """
    global _store
    patience = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    own = token = uuid.uuid4().hex
    store.set(f"clipvip-here-{rank}", own)
    until = time.monotonic() + timeout
    if rank == 0:
        awaited = set(range(1, world))
        while awaited:
            for other in sorted(awaited):
                if store.check([f"clipvip-here-{other}"]):
                    sign = store.get(f"clipvip-here-{other}").decode()
                    store.set(f"clipvip-answer-{sign}", own)
            awaited -= {other for other in awaited if store.check([f"{own}-{other}"])}
            if time.monotonic() > until:
                raise RuntimeError(f"ranks {sorted(awaited)} did not come within {timeout:.0f} s")
            time.sleep(0.02)
    else:
        answer = f"clipvip-answer-{own}"
        while not store.check([answer]) and time.monotonic() < until:
            time.sleep(0.02)  # waiting in the store would hold back signals
        token = store.get(answer).decode()
        store.set(f"{token}-{rank}", "")
    _store = dist.PrefixStore(token, store)
    return {"store": _store, "rank": rank, "world_size": world}


def first_does(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first rank, or the error it raises there, on every rank."""
    result: Result | None = None
    error: Exception | None = None
    if distributed.rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = distributed.all_gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextmanager
def first_enters(manager: AbstractContextManager[None]) -> Iterator[None]:
    """A context that the first rank alone is in; an error on its way in is raised on every rank."""
    with ExitStack() as entered:
        first_does(lambda: entered.enter_context(manager))
        yield


def on_any(flags: Tensor) -> Tensor:
    """Bools [n], each True where it is so on any rank. Nothing waits for a GPU that they are on."""
    if distributed.world_size() > 1:
        given = flags.int()
        dist.all_reduce(given, dist.ReduceOp.MAX)
        flags = given.bool()
    return flags


class LostRankError(RuntimeError):
    """Another rank is gone; one line that names it."""


class Watch:
    """Within it, a rank that is lost ends the others, and is named.

    A killed process or a machine that is off can leave the others waiting for it in a collective
    for as long as the process group's timeout, which has to be long: a rank may also be slow.
    So each rank gives signs of life, from a thread, in the store in which the ranks met, and
    listens to the next rank's. After `patience` seconds of silence it names that rank to all,
    and they end. One process that is stopped is lost too; one that computes, reads, or writes,
    however long, is not.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.interval = patience / 10
        self._left = threading.Event()
        self._heard = threading.Event()
        self._reached = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watch":
        rank, world = distributed.rank(), distributed.world_size()
        if _store is None:
            return self
        self._rank, self._next = rank, (rank + 1) % world
        self._ranks = distributed.all_gather_objects((socket.gethostname(), os.getpid()))
        self._store = dist.PrefixStore("watch", _store.clone())  # type: ignore[attr-defined]
        self._store.set(f"sign-{rank}", "0")
        self._store.set("lost", "")
        distributed.all_gather_objects(None)
        for work in (self._live, self._judge):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._threads:
            return
        if isinstance(error, dist.DistError) or (kind is RuntimeError and "gloo" in str(error)):
            self._name_the_lost(error)
        self._left.set()
        if error is None:  # the store goes with the first rank that leaves
            for thread in self._threads:
                thread.join(self.patience)
            distributed.all_gather_objects(None)

    def _live(self) -> None:
        """Give signs, hear those of the next; may block where the store's machine is off."""
        count, last = 0, b""
        while not self._left.wait(self.interval):
            self._reached = False
            count += 1
            try:
                self._store.set(f"sign-{self._rank}", str(count))
                sign, lost = self._store.multi_get([f"sign-{self._next}", "lost"])
            except dist.DistNetworkError:
                return  # the connection is broken; torch prints a page at each use of it
            except RuntimeError:
                continue
            self._reached = True
            if lost:
                self._end(lost.decode(), silent=self._rank != 0)
            if sign != last:
                last = sign
                self._heard.set()

    def _judge(self) -> None:
        silence = 0.0
        while not self._left.wait(self.interval):  # not by the clock: this process may be stopped
            silence = 0.0 if self._heard.is_set() else silence + self.interval
            self._heard.clear()
            if silence > self.patience:
                if not self._reached:  # what keeps the store
                    self._end(f"{self._name(0)} or its launcher")
                name = self._name(self._next)
                threading.Thread(target=self._tell, args=[name], daemon=True).start()
                self._left.wait(self.interval)
                self._end(name)

    def _name_the_lost(self, error: BaseException | None) -> None:
        """A collective failed: on this machine a process that is gone is seen at once, elsewhere
        by its silence, which ends this one."""
        until = time.monotonic() + self.patience + 3 * self.interval
        while time.monotonic() < until:
            for rank, (host, process) in enumerate(self._ranks):
                if host == self._ranks[self._rank][0] and _is_gone(process):
                    name = self._name(rank)
                    self._tell(name)
                    raise LostRankError(_said_of(name)) from error
            time.sleep(0.05)

    def _tell(self, name: str) -> None:
        with suppress(RuntimeError, OSError):  # the store may be lost with it
            self._store.set("lost", name)

    def _name(self, rank: int) -> str:
        host, process = self._ranks[rank]
        return f"rank {rank} ({host}, process {process})"

    def _end(self, name: str, silent: bool = False) -> None:
        """From a thread: the main one waits in a collective that cannot be left."""
        if not silent:
            who = "clipvip" if self._rank == 0 else f"clipvip, rank {self._rank}"
            print(f"{who}: error: {_said_of(name)}", file=sys.stderr, flush=True)
        os._exit(1)


def _said_of(name: str) -> str:
    return f"{name} is lost; the run ends, and resume=latest goes on from the last checkpoint"


def _is_gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists()
    return state == "Z"
