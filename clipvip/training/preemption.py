"""Reaction to SIGTERM, by which schedulers announce that they take a machine away."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
# Schedulers signal all of a job's processes, and torchrun, one of them, passes its own on.
SAME_SIGNAL_SECONDS = 5.0


def leave_on_sigterm() -> None:
    """Let SIGTERM end the process with EXIT_STATUS at once, as long as there is nothing to save.

    Call this before slow imports. Outside the main thread it does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # not print, which the signal may have interrupted
            os.write(2, b"clipvip: SIGTERM: no step is running; exits\n")
    os._exit(EXIT_STATUS)


class Preemption:
    """Context in which SIGTERM only sets `asked`.

    Another SIGTERM, more than SAME_SIGNAL_SECONDS later, ends the process at once. Outside the main
    thread, which cannot receive signals, the context does nothing.
    """

    asked = False
    _since: float | None = None
    _before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:
            self.asked, self._since = True, now
        elif now - self._since > SAME_SIGNAL_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
