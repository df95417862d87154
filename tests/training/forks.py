"""Trainings in processes of their own, forked after the imports, which take seconds.

python forks.py kill CONFIG key=value …   four times; three of them killed at a random moment
python forks.py two CONFIG key=value …    two processes of one training, as torchrun starts them
python forks.py full CONFIG key=value …   the same, on a disk without room for a checkpoint
python forks.py eval CHECKPOINT ANNOTATIONS OUT   two processes of one evaluation
"""

import contextlib
import functools
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import clipvip.training.trainer  # noqa: F401
from clipvip.training.__main__ import main
from clipvip.training.config import load_config
from clipvip.training.evaluate import evaluate_checkpoint

torch.set_num_threads(1)


def start(arguments, run=main, **environment):
    process = os.fork()
    if process == 0:
        os.environ.update(environment)
        try:
            run(arguments)
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


def evaluate(arguments):
    checkpoint, annotations, out = arguments
    evaluate_checkpoint(
        checkpoint, annotations, out=out, num_workers=0, max_bad_share=0.2, backend="reference"
    )


def several(count, arguments, run=main):
    """Exit statuses of as many ranks."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randint(20000, 60000)),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    if torch.cuda.is_available():  # one GPU is not enough for all ranks
        shared["ACCELERATE_USE_CPU"] = "true"
    started = [
        start(arguments, run, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]
    return [status(process) for process in started]


def two_processes(arguments, run=main):
    return max(several(2, arguments, run))


def two_without_room(arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    ends = several(2, arguments)
    print("ended with", ends)
    return ends != [1, 1]


if __name__ == "__main__":
    modes = {
        "kill": kill_three_times,
        "two": two_processes,
        "full": two_without_room,
        "eval": functools.partial(two_processes, run=evaluate),
    }
    sys.exit(modes[sys.argv[1]](sys.argv[2:]))
