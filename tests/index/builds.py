"""Builds in processes of their own, forked after the imports, which take seconds.

python builds.py INDEX MODEL VIDEOS makes
    INDEX-kill    by builds that are killed at random moments, after each of which the index holds
                  whole files, and by one that is not
    INDEX-both    by two builds at once
    INDEX-ranks   by two ranks, as torchrun starts them
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
from functools import partial

import lancedb  # noqa: F401  # takes a second, which the forks are spared
import torch

from clipvip.index import build as module
from clipvip.index.store import Store
from clipvip.index.tables import is_index

torch.set_num_threads(1)
module.SAVE_SECONDS = module.LOOK_SECONDS = 0.0
INDEX, MODEL, VIDEOS = sys.argv[1:]


def forked(work, **environment):
    """Start a process that ends with the status that `work` returns.

    This process itself never uses LanceDB, which forks cannot use then.
    """
    process = os.fork()
    if process == 0:
        os.environ.update(environment)
        status = 1
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def status(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def start(index, slow=0.0, **environment):
    """Start a build, which ends with 100 + the number of files that it embedded."""

    def build():
        options = {"num_workers": 0, "device": "cpu", "mixed_precision": "no", "batch_size": 1}
        show = lambda progress: time.sleep(slow)  # noqa: E731
        return 100 + module.build(index, MODEL, VIDEOS, progress=show, **options).embedded

    return forked(build, **environment)


def read(index):
    """Return the number of files of the index, and check that each is whole."""
    found = status(forked(partial(count, index)))
    assert found >= 100, found
    return found - 100


def count(index):
    try:
        files = Store.open(index).files()
    except ValueError as error:
        assert "run the same clipvip embed again" in str(error)  # killed between two tables
        return 100
    moments, _ = Store.open(index).of_files(sorted(files))
    counts = dict.fromkeys(files, 0)
    for moment in moments:
        counts[moment.file.path] += 1
    for path, count in counts.items():
        assert count == (4 if path.endswith("film.mp4") else 1), (path, count)
    return 100 + len(files)


def kill_and_resume(index):
    held = 0
    for _ in range(3):
        process = start(index, slow=0.05)
        began = time.monotonic()
        while time.monotonic() < began + 60 and not is_index(index):
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        os.kill(process, signal.SIGKILL)
        status(process)
        now = read(index)
        assert now >= held
        held = now
    done = status(start(index))
    assert done == 100 + 8 - held, (done, held)


def build_twice_at_once(index):
    both = [start(index, slow=0.02), start(index, slow=0.02)]
    done = [status(process) for process in both]
    assert min(done) >= 100, done
    assert read(index) == 8


def build_by_ranks(index):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    meet["LOCAL_WORLD_SIZE"] = "2"
    ranks = [start(index, **meet, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert [status(process) for process in ranks] == [108, 108]
    assert read(index) == 8


kill_and_resume(INDEX + "-kill")
build_twice_at_once(INDEX + "-both")
build_by_ranks(INDEX + "-ranks")
