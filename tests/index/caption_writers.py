"""A process that changes files of an index and their captions; run by test_captions.py."""

import random
import sys

import numpy as np

from clipvip.index.captions import key_of
from clipvip.index.rows import About, FileState
from clipvip.index.store import Store

WIDTH, FILES = 16, 6
ABOUT = About("/models/mine", "0" * 64, WIDTH)


def main(where, seed, rounds):
    draw = random.Random(seed)
    store = Store.create(where, ABOUT)
    print("ready", flush=True)
    for number in range(rounds):
        for _ in range(FILES):
            path = f"/v/{draw.randrange(FILES)}.mp4"
            content = f"{draw.randrange(10**8):08d}"
            spans = [(float(i), i + 1.0) for i in range(draw.randint(1, 4))]
            vectors = np.eye(WIDTH, dtype=np.float32)[: len(spans)]
            store.put([(FileState(path, 1, 1, content, "plan", 1.0, 1.0), spans, vectors)])
            moments = store.moments([path, f"/v/{draw.randrange(FILES)}.mp4"])
            texts = {key_of(m.file, m.start, m.end): f"{m.file.content} {m.start}" for m in moments}
            store.captions.put(texts, draw.choice(["", "model"]))
            held = store.files()
            old = draw.choice([*held.values()])
            new = FileState(f"/v/{draw.randrange(FILES)}.mp4", 1, 1, old.content, "plan", 1.0, 1.0)
            change = draw.choice(["move", "copy", "drop", "none"])
            if change == "move":
                store.move({old.path: new})
            elif change == "copy":
                store.copy([(old.path, new)])
            elif change == "drop":
                store.drop([old.path])
        if number % 2:
            store.tidy()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
