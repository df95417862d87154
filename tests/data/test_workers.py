import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal
from clipvip.data.workers import Workers
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    Workers(lambda task, condemned: task, 1)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_a_process_starts_is_not_lost() -> None:
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60
    )
    assert (run.stdout, run.stderr) == ("interrupted\n", "")


KILLED = """
import os, signal, sys, threading, torch
from clipvip.data.workers import Workers
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGKILL)).start()
for _ in Workers(lambda task, condemned: [torch.zeros(9)] * 20, 3).run(range(10**9)):
    pass
"""


@pytest.mark.parametrize("after", ["0.2", "0.5", "0.7"])
def test_processes_whose_parent_was_killed_end_without_a_word(after: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, after], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == -9 and run.stderr == ""
