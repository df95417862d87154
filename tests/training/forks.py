"""Trainings in processes of their own, forked after the imports, which take seconds.

python forks.py kill CONFIG key=value …   four times; three of them killed at a random moment
python forks.py two CONFIG key=value …    two processes of one training, as torchrun starts them
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import clipvip.training.trainer  # noqa: F401
from clipvip.training.__main__ import main
from clipvip.training.config import load_config

torch.set_num_threads(1)


def start(arguments, **environment):
    process = os.fork()
    if process == 0:
        os.environ.update(environment)
        try:
            main(arguments)
        except SystemExit as stop:
            os._exit(int(stop.code))
        except BaseException:
            os._exit(3)
        os._exit(0)
    return process


def status(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_three_times(arguments):
    log = Path(load_config(arguments[0], arguments[1:]).out) / "metrics.jsonl"
    for _ in range(3):
        process = start(arguments)
        before = log.read_text().count("\n") if log.exists() else 0
        wanted, deadline = before + random.randint(1, 12), time.monotonic() + 60
        while not log.exists() or log.read_text().count("\n") < wanted:
            assert time.monotonic() < deadline
            if os.waitpid(process, os.WNOHANG)[0]:
                break
            time.sleep(0.001)
        else:
            time.sleep(random.random() * 0.1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            print("killed:", status(process), "after", log.read_text().count("\n"), "rows")
    return status(start(arguments))


def two_processes(arguments):
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randint(20000, 60000)),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    if torch.cuda.is_available():  # one GPU is not enough for two ranks
        shared["ACCELERATE_USE_CPU"] = "true"
    ranks = [start(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    return max(status(rank) for rank in ranks)


if __name__ == "__main__":
    run = {"kill": kill_three_times, "two": two_processes}[sys.argv[1]]
    sys.exit(run(sys.argv[2:]))
