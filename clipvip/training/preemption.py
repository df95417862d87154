"""SIGTERM, with which schedulers announce that a machine is taken away."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
# Schedulers signal all of a job's processes, and torchrun, one of them, passes its own on.
SAME_SIGNAL_SECONDS = 5.0


class Preemption:
    """Within it, SIGTERM only sets `asked`; one that comes after SAME_SIGNAL_SECONDS more ends the
    process at once.

    Threads other than the main one cannot take signals; there it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since: float | None = None
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:
            self.asked, self._since = True, now
        elif now - self._since > SAME_SIGNAL_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
