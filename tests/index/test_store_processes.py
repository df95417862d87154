"""Properties of an index that several processes change at once, some of which are killed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from clipvip.index.store import Store

WRITER = Path(__file__).with_name("writers.py")
WIDTH, FILES = 16, 12  # as in that file
KILLED, KEPT = 2, 2


def start(where, seed, rounds):
    command = [sys.executable, WRITER, where, str(seed), str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def assert_whole(rows):
    """Each file has as many moments as its last writer gave it, each once."""
    for number, file in enumerate(rows.files):
        own = rows.file == number
        assert rows.start[own].tolist() == list(range(file.size))


def test_nothing_is_lost_halved_or_doubled(tmp_path):
    where = tmp_path / "index"
    processes = [start(where, seed, 1000 if seed < KILLED else 3) for seed in range(KILLED + KEPT)]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        store = Store.open(where)
        query = np.eye(WIDTH, dtype=np.float32)[0]
        for process in processes[:KILLED]:
            until = time.monotonic() + random.uniform(0, 0.3)
            while time.monotonic() < until:
                moments, _ = store.nearest(query, 50)
                assert len({moment.id for moment in moments}) == len(moments)
                assert_whole(store.everything())
                files = list(store.files())
                assert {m.file.path for m in store.of_files(files)[0]} <= set(files)
            process.kill()
            process.wait()
        assert [process.wait() for process in processes[KILLED:]] == [0] * KEPT
    finally:
        for process in processes:
            process.kill()
            process.stdout.close()
    store = Store.open(where)
    store.tidy()
    names = {f"/v/{i}.mp4" for i in range(FILES)}
    only = {f"/v/only-{seed}.mp4" for seed in range(KILLED, KILLED + KEPT)}
    files = store.files()
    assert names | only <= files.keys()
    assert store.count() == sum(file.size for file in files.values())
    assert_whole(store.everything())
    assert set(store.about.sources) == {f"/source/{seed}" for seed in range(KILLED + KEPT)}
