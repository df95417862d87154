"""Detection of lost ranks, so that the other ranks end instead of waiting for them."""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clipvip import distributed
from clipvip.terminal import print_error


class LostRankError(RuntimeError):
    """The loss of another rank; the message is one line and names it."""


class Watch:
    """Context in which the loss of a rank ends the other ranks with an error that names it.

    Without it, the others may wait in a collective until the process group's timeout, which must
    be long because a rank may be slow. So a thread of each rank writes signs of life to the store
    in which the ranks met, and reads those of the next rank. After `patience` seconds of silence it
    announces that this rank is lost, and all ranks end. A stopped process counts as lost; one that
    is busy for any length of time does not.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.interval = patience / 10
        self._left, self._heard = threading.Event(), threading.Event()
        self._reached = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watch":
        store = distributed.meeting_store()
        if store is None:
            return self
        self._rank = rank = distributed.rank()
        self._next = (rank + 1) % distributed.world_size()
        self._ranks = distributed.all_gather_objects((socket.gethostname(), os.getpid()))
        self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
        self._store.set(f"sign-{rank}", "0")
        self._store.set("lost", "")
        distributed.all_gather_objects(None)
        for work in (self._live, self._judge):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._threads:
            return
        if isinstance(error, dist.DistError) or (kind is RuntimeError and "gloo" in str(error)):
            self._name_the_lost(error)
        self._left.set()
        if error is None:  # the store disappears with the first rank that leaves
            for thread in self._threads:
                thread.join(self.patience)
            distributed.all_gather_objects(None)

    def _live(self) -> None:
        """Write own signs and read the next rank's; may block if the store's machine is off."""
        count, last = 0, b""
        while not self._left.wait(self.interval):
            self._reached = False
            count += 1
            try:
                self._store.set(f"sign-{self._rank}", str(count))
                sign, lost = self._store.multi_get([f"sign-{self._next}", "lost"])
            except dist.DistNetworkError:
                return  # the connection is broken; torch would print a page on each use of it
            except RuntimeError:
                continue
            self._reached = True
            if lost:
                self._end(lost.decode(), silent=self._rank != 0)
            if sign != last:
                last = sign
                self._heard.set()

    def _judge(self) -> None:
        """End this process if the next rank is silent for too long."""
        silence = 0.0
        while not self._left.wait(self.interval):  # not by a clock: this process may be stopped
            silence = 0.0 if self._heard.is_set() else silence + self.interval
            self._heard.clear()
            if silence > self.patience:
                if not self._reached:  # the process that holds the store
                    self._end(f"{self._name(0)} or its launcher")
                name = self._name(self._next)
                threading.Thread(target=self._tell, args=[name], daemon=True).start()
                self._left.wait(self.interval)
                self._end(name)

    def _name_the_lost(self, error: BaseException | None) -> None:
        """After a failed collective, raise LostRankError if a rank of this machine is gone.

        A rank of another machine is detected by its silence, which ends this process.
        """
        until = time.monotonic() + self.patience + 3 * self.interval
        while time.monotonic() < until:
            for rank, (host, process) in enumerate(self._ranks):
                if host == self._ranks[self._rank][0] and _is_gone(process):
                    name = self._name(rank)
                    self._tell(name)
                    raise _lost(name) from error
            time.sleep(0.05)

    def _tell(self, name: str) -> None:
        with suppress(RuntimeError, OSError):  # the store may be lost too
            self._store.set("lost", name)

    def _name(self, rank: int) -> str:
        host, process = self._ranks[rank]
        return f"rank {rank} ({host}, process {process})"

    def _end(self, name: str, silent: bool = False) -> None:
        """End the process from a thread, as the main thread waits in a collective."""
        if not silent:
            print_error(_lost(name))
        os._exit(1)


def _lost(name: str) -> LostRankError:
    return LostRankError(
        f"{name} is lost; the run ends; resume=latest resumes from the last checkpoint"
    )


def _is_gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists()
    return state == "Z"
