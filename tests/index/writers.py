"""A process that puts files into an index again and again; run by test_store_processes.py."""

import random
import sys
import time

import numpy as np

from clipvip.index.rows import About, FileState
from clipvip.index.store import Store

WIDTH = 16
FILES = 12
ABOUT = About("/models/mine", "0" * 64, WIDTH)


def file(number, spans, mark):
    """A file whose size says how many moments it has."""
    state = FileState(f"/v/{number}.mp4", spans, mark, "c", f"plan {mark}", 1.0, 1.0)
    vectors = np.eye(WIDTH, dtype=np.float32)[np.arange(spans) % WIDTH]
    return state, [(float(i), i + 1.0) for i in range(spans)], vectors


def main(where, seed, rounds):
    generator = random.Random(seed)
    store = Store.create(where, ABOUT._replace(sources=(f"/source/{seed}",)))
    print("ready", flush=True)
    for _ in range(rounds):
        order = generator.sample(range(FILES), FILES)
        for at in range(0, FILES, 3):
            files = [file(i, generator.randint(1, 6), seed) for i in order[at : at + 3]]
            store.put([*files, file(f"only-{seed}", generator.randint(1, 6), seed)])
            if generator.random() < 0.2:
                store.tidy()
        time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
