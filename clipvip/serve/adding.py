"""Embed a folder into an index while the server runs, in a process of its own, and watch it."""

import asyncio
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from clipvip.files import shown
from clipvip.serve.errors import ApiError
from clipvip.serve.threads import Threads


class Adding:
    """At most one process that embeds. When it is stopped, the index keeps what it has saved."""

    def __init__(self, index: str) -> None:
        self._index = index
        self._process: Any = None
        self._watching: asyncio.Task[None] | None = None
        self._threads = Threads(1, 2)
        self._state: dict[str, Any] = {"state": "idle"}
        self._started = 0.0

    def state(self) -> dict[str, Any]:
        """Return {state, path, done, total, share, seconds, message}; idle has a state only."""
        if self._state["state"] == "running":
            self._state["seconds"] = round(time.monotonic() - self._started, 1)
        return dict(self._state)

    def start(self, path: str) -> None:
        """Begin to embed a folder or file. Raises ApiError if one is being embedded already."""
        if self._state["state"] == "running":
            raise ApiError(409, "a folder is being added already; wait until it is done")
        self._started = time.monotonic()
        self._state = {"state": "running", "path": shown(path), "done": 0, "total": 0, "share": 0.0}
        self._state |= {"seconds": 0.0, "message": "loading the model"}
        context = multiprocessing.get_context("forkserver")
        connection, theirs = context.Pipe()
        # Not a daemon, since it starts processes itself.
        self._process = context.Process(target=embed, args=(theirs, self._index, path))
        self._watching = asyncio.create_task(self._watch(self._process, connection, theirs))

    async def close(self) -> None:
        """End the process."""
        if self._watching is not None:
            with suppress(AttributeError, ValueError):  # it has not started, or has ended
                self._process.terminate()
                await asyncio.wait([self._watching], timeout=3)
                self._process.kill()
            self._watching.cancel()

    async def _watch(self, process: Any, connection: Connection, theirs: Connection) -> None:
        await self._threads.run(process.start)  # slow for the first process
        theirs.close()
        with suppress(EOFError, OSError):
            while True:
                self._state |= await self._threads.run(connection.recv)
        connection.close()
        await self._threads.run(process.join)
        self._state["seconds"] = round(time.monotonic() - self._started, 1)
        if self._state["state"] == "running":
            what = f"the process ended with exit status {process.exitcode}"
            self._state |= {"state": "failed", "message": f"{what}; see the terminal of the server"}


def embed(connection: Connection, index: str, path: str) -> None:
    """Embed a folder or file, and send changes of the state; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process
    try:
        from clipvip.index import VideoIndex

        def tell(progress: Any) -> None:
            state = {"done": progress.done, "total": progress.files, "share": progress.share}
            connection.send(state | {"message": f"{progress.moments} moments embedded"})

        added = VideoIndex(index).add([path], progress=tell)
        counts = (
            (added.embedded, "new"),
            (added.unchanged, "unchanged"),
            (added.moved, "moved"),
            (added.dropped, "dropped"),
            (len(added.bad_files), "unreadable"),
        )
        files = ", ".join(f"{count} {what}" for count, what in counts if count) or "no files"
        connection.send({"state": "done", "share": 1.0, "message": f"files: {files}"})
    except (ValueError, OSError, RuntimeError) as error:
        with suppress(OSError):
            message = shown(" ".join(str(error).split()))
            connection.send({"state": "failed", "message": message})


def folder_to_add(given: Any) -> str:
    """Return the absolute path of an existing folder or file. Raises ApiError."""
    if not isinstance(given, str) or not given.strip() or len(given) > 4096 or "\0" in given:
        raise ApiError(400, "no folder was given; expected its absolute path")
    path = os.path.expanduser(given.strip())
    if not os.path.isabs(path):
        raise ApiError(400, f"{shown(given)} is not an absolute path, such as /home/me/Videos")
    if not os.path.exists(path):
        raise ApiError(400, f"{shown(path)} does not exist on the machine of the server")
    return os.path.realpath(path)
