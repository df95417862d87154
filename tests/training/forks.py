"""Trainings in processes of their own, forked after the imports, which take seconds.

python forks.py kill COUNTS CONFIG key=value …   as many processes as the first of COUNTS (such as
    1,1,2) says, of which one is killed at a random moment; then as many as the second, and so on;
    the last ones end by themselves
python forks.py damage COUNTS CONFIG key=value …   besides, the newest of several checkpoints is cut
python forks.py two CONFIG key=value …    two processes of one training, as torchrun starts them
python forks.py hold CONFIG key=value …   the same; fail if the second holds what is to be saved
python forks.py stop OUT CONFIG key=value …   sent SIGTERM and started again; alone
    in OUT-1, two processes in OUT-2
python forks.py lose OUT CONFIG key=value …   two, of which either is killed, or stopped; and of
    which the second is while it builds its model
python forks.py full CONFIG key=value …   the same, on a disk without room for a checkpoint
python forks.py skip CONFIG key=value …   the same, with a NaN as the second rank's second loss
python forks.py refused CONFIG key=value …   the same, in a folder where another run is
python forks.py eval COUNT CHECKPOINT ANNOTATIONS OUT   as many processes of one evaluation
Several such are parted by a +.
"""

import contextlib
import functools
import math
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

# One GPU is not enough for all ranks, and forks cannot use it at all.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from torch.utils._pytree import tree_leaves

import clipvip.files
import clipvip.training.state
from clipvip.distributed import rank
from clipvip.training import parallel
from clipvip.training.__main__ import main
from clipvip.training.checkpoint import checkpoints
from clipvip.training.config import load_config
from clipvip.training.evaluate import evaluate_checkpoint
from clipvip.training.task import Retrieval

torch.set_num_threads(1)
clipvip.files.HERE_WAIT = 2.0
os.fsync = lambda descriptor: None  # processes are killed here, but no power is cut


def start(arguments, run=main, **environment):
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
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


def out_of(arguments):
    return Path(load_config(arguments[0], arguments[1:]).out)


def rows(arguments):
    log = out_of(arguments) / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_rows(arguments, wanted, processes):
    """False where a process ended before."""
    deadline = time.monotonic() + 60
    while rows(arguments) < wanted:
        assert time.monotonic() < deadline
        if any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in processes):
            return False
        time.sleep(0.001)
    time.sleep(random.random() * 0.1)
    return True


def kill_and_go_on(arguments, damage=False):
    counts, *arguments = arguments
    *broken, last = map(int, counts.split(","))
    for count in broken:
        processes = ranks(count, arguments)
        if wait_for_rows(arguments, rows(arguments) + random.randint(4, 10), processes):
            os.kill(random.choice(processes), signal.SIGKILL)
        ends = [status(process) for process in processes]
        print("killed:", ends, "after", rows(arguments), "rows")
        found = checkpoints(out_of(arguments) / "checkpoints")
        if damage and len(found) > 1:
            os.truncate(found[-1] / "state.pt", 1000)
    return max(map(status, ranks(last, arguments)))


def group_is_gone(group):
    with contextlib.suppress(ProcessLookupError):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)
        return False
    return True


def stop_and_go_on(arguments):
    """SIGTERM to the whole group of a lone process, workers included; else to one rank. Twice, as
    by a scheduler and by torchrun."""
    out, *given = arguments
    for count in (1, 2):
        arguments = [*given, f"out={out}-{count}"]
        processes = ranks(count, arguments)
        assert wait_for_rows(arguments, random.randint(1, 8), processes)
        chosen = random.choice(processes)
        for _ in range(2):
            (os.killpg if count == 1 else os.kill)(chosen, signal.SIGTERM)
            time.sleep(0.01)
        print("ended with", [status(process) for process in processes])
        assert all(map(group_is_gone, processes))
        assert max(map(status, ranks(count, arguments))) == 0


def lose_a_rank(arguments):
    out, *given = arguments
    began, runs = {}, {}
    for lost, sent in ((0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)):
        arguments = [*given, f"out={out}-{sent.name}-{lost}"]
        runs[lost, sent, ""] = arguments, ranks(2, arguments)
    for (lost, sent, _), (arguments, processes) in runs.items():
        assert wait_for_rows(arguments, random.randint(1, 8), processes)
        os.kill(processes[lost], sent)
        began[lost, sent, ""] = time.monotonic()
    for sent in (signal.SIGKILL, signal.SIGSTOP):
        arguments = [*given, f"out={out}-{sent.name}-early"]
        processes = ranks(2, arguments, functools.partial(the_second_is_lost_early, sent))
        os.waitid(os.P_PID, processes[1], os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        began[1, sent, " early"] = time.monotonic()
        runs[1, sent, " early"] = arguments, processes
    for (lost, sent, when), (_, processes) in runs.items():
        ended = status(processes[1 - lost])
        took = time.monotonic() - began[lost, sent, when]
        print(f"{processes[lost]} {sent.name}{when}; the other ended with {ended} in {took:.1f} s")
        os.kill(processes[lost], signal.SIGKILL)
        status(processes[lost])


def the_second_is_lost_early(sent, arguments):
    state, build_model = clipvip.training.state, clipvip.training.state.build_model

    def lost(*given):
        os.kill(os.getpid(), sent)
        return build_model(*given)

    if os.environ["RANK"] == "1":
        state.build_model = lost
    main(arguments)


def evaluate(arguments):
    checkpoint, annotations, out = arguments
    given = {"num_workers": 0, "max_bad_share": 0.1, "backend": "reference"}
    evaluate_checkpoint(checkpoint, annotations, out=out, batch_size=3, **given)


def ranks(count, arguments, run=main):
    """The processes of as many ranks."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randint(20000, 60000)),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    if count == 1:
        return [start(arguments, run)]
    return [
        start(arguments, run, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def two_processes(arguments, run=main):
    return max(map(status, ranks(2, arguments, run)))


def saving_what_the_first_holds(arguments):
    for name in ("whole_weights", "whole_moments"):
        monitor(name)
    main(arguments)


def monitor(name):
    whole = getattr(parallel, name)

    def watched(*given):
        held = whole(*given)
        assert any(isinstance(x, torch.Tensor) for x in tree_leaves(held)) == (rank() == 0)
        return held

    setattr(parallel, name, watched)


def broken_on_the_second_rank(arguments):
    calls, loss = [], Retrieval.loss

    def broken(*given):
        calls.append(1)
        return loss(*given) * (math.nan if len(calls) == 2 else 1)

    if os.environ["RANK"] == "1":
        Retrieval.loss = broken
    main(arguments)


def two_without_room(arguments):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    print("ended with", [status(process) for process in ranks(2, arguments)])
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def two_refused(arguments):
    print("ended with", [status(process) for process in ranks(2, arguments)])


if __name__ == "__main__":
    modes = {
        "kill": kill_and_go_on,
        "damage": functools.partial(kill_and_go_on, damage=True),
        "two": two_processes,
        "stop": stop_and_go_on,
        "lose": lose_a_rank,
        "skip": functools.partial(two_processes, run=broken_on_the_second_rank),
        "hold": functools.partial(two_processes, run=saving_what_the_first_holds),
        "full": two_without_room,
        "refused": two_refused,
        "eval": lambda given: max(map(status, ranks(int(given[0]), given[1:], evaluate))),
    }
    jobs = sys.argv[1:]
    while jobs:
        end = jobs.index("+") if "+" in jobs else len(jobs)
        if modes[jobs[0]](jobs[1:end]):
            sys.exit(1)
        del jobs[: end + 1]
