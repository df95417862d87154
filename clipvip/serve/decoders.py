"""Processes that decode files from strangers for the server, within limits of time and memory.

A decoder that crashes, hangs or asks for too much memory ends its own process only. The next task
gets a new one.
"""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from anyio import CapacityLimiter, to_thread

from clipvip.data.video import DecodeError
from clipvip.serve.errors import Busy

logger = logging.getLogger(__name__)

MOST_WAITING = 300  # tasks: a page asks for up to 200 pictures at once
GRACE = 5.0  # seconds after its limit until a process that its own alarm did not end is killed


class Decoders:
    """At most `count` processes, started when they are first needed.

    They are forked from one process that has loaded this package and nothing else. So a new one
    takes milliseconds, and holds neither the server's threads nor its files.
    """

    def __init__(self, count: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["clipvip.serve.in_decoder"])
        self._limiter = CapacityLimiter(count)
        self._waiting = 0
        self._lock = threading.Lock()
        self._idle: list[_Decoder] = []
        self._busy: set[_Decoder] = set()
        self._closed = False

    async def run(self, work: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """Return work(*arguments), computed by a process within `seconds`.

        work: a function of a module. Raises DecodeError if it fails, crashes or takes too long, and
        Busy if too many tasks are waiting.
        """
        if self._waiting >= MOST_WAITING:
            raise Busy("too many pictures and films are being made; try again in a moment")
        self._waiting += 1
        try:
            return await to_thread.run_sync(
                self._run, work, arguments, seconds, limiter=self._limiter, abandon_on_cancel=True
            )
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End all processes, in the middle of their tasks too."""
        with self._lock:
            self._closed = True
            for decoder in [*self._idle, *self._busy]:
                decoder.process.kill()

    def _run(self, work: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
        with self._lock:
            if self._closed:
                raise DecodeError("", "the server is stopping")
            decoder = self._idle.pop() if self._idle else _Decoder(self._context)
            self._busy.add(decoder)
        try:
            good, value = decoder.ask(work, arguments, seconds)
        except (EOFError, OSError):
            with self._lock:
                self._busy.discard(decoder)
            reason = decoder.end(seconds)
            if not self._closed:
                logger.warning("a decoder %s; a new one takes over", reason)
            raise DecodeError("", f"its decoder {reason}") from None
        with self._lock:
            self._busy.discard(decoder)
            self._idle.append(decoder)
        if not good:
            raise DecodeError("", value)
        return value


class _Decoder:
    """A process as the server sees it."""

    def __init__(self, context: Any) -> None:
        from clipvip.serve.in_decoder import answer

        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, work: Any, arguments: tuple[Any, ...], seconds: float) -> tuple[bool, Any]:
        """Return whether the work succeeded, and its result, or the reason why not. Raises EOFError
        or OSError if the process ends or hangs."""
        self.connection.send((work, arguments, seconds))
        if not self.connection.poll(seconds + GRACE + 30 * (not self.process.is_alive())):
            raise EOFError
        return self.connection.recv()

    def end(self, seconds: float) -> str:
        """End the process, and return what happened to it."""
        self.process.join(1)
        self.process.kill()
        self.process.join(5)
        self.connection.close()
        code = self.process.exitcode
        if code in (-signal.SIGALRM, -signal.SIGKILL):
            return f"took more than {seconds:.0f} s, or too much memory"
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit status {code}"
