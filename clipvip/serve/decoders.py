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

from clipvip.data.video import DecodeError
from clipvip.serve.threads import Threads

logger = logging.getLogger(__name__)

MOST_WAITING = 300  # tasks: a page asks for up to 200 pictures at once
START = 120.0  # seconds: the first process imports torch, which is slow on a busy machine
GRACE = 5.0  # seconds after its limit until a process that its own alarm did not end is killed


class Decoders:
    """At most `count` processes, started when they are first needed.

    They are forked from one process that has loaded this package and nothing else. So a new one
    takes milliseconds, and holds neither the server's threads nor its files.
    """

    def __init__(self, count: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["clipvip.serve.in_decoder"])
        self._threads = Threads(count, MOST_WAITING)
        self._lock = threading.Lock()
        self._idle: list[_Decoder] = []
        self._busy: set[_Decoder] = set()
        self._closed = False

    async def run(self, work: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """Return work(*arguments), computed by a process within `seconds`.

        work: a function of a module. Raises DecodeError if it fails, crashes or takes too long, and
        Busy if too many tasks are waiting.
        """
        return await self._threads.run(self._run, work, arguments, seconds)

    def close(self) -> None:
        """End all processes, in the middle of their tasks too."""
        with self._lock:
            self._closed = True
            for decoder in [*self._idle, *self._busy]:
                decoder.process.kill()

    def _run(self, work: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
        with self._lock:
            decoder = self._idle.pop() if self._idle else None
        try:
            decoder = decoder or _Decoder(self._context)
            with self._lock:
                self._busy.add(decoder)
                if self._closed:
                    decoder.process.kill()
            good, value = decoder.ask(work, arguments, seconds)
        except (EOFError, OSError):
            if decoder is None:
                raise DecodeError("", "its decoder did not start") from None
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
        if not self.connection.poll(START):
            self.process.kill()
            raise OSError("a decoder did not start")
        self.connection.recv()

    def ask(self, work: Any, arguments: tuple[Any, ...], seconds: float) -> tuple[bool, Any]:
        """Return whether the work succeeded, and its result, or the reason why not. Raises EOFError
        or OSError if the process ends or hangs."""
        self.connection.send((work, arguments, seconds))
        if not self.connection.poll(seconds + GRACE):
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
