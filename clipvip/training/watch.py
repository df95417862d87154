"""What ranks do for one another, so that they end alike."""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from clipvip import distributed


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
        store = distributed.meeting_store()
        if store is None:
            return self
        self._rank, self._next = rank, (rank + 1) % world
        self._ranks = distributed.all_gather_objects((socket.gethostname(), os.getpid()))
        self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
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
