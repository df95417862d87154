"""Measure whether the memory and the open files of training's loaders grow with the clips read.

    python bench/loader_memory.py [CLIPS] [WORKERS] [DECODER]

Reads CLIPS (10000) small clips, from files and then from shards, in WORKERS (2) processes, by
DECODER (pyav; or dali, for which they are VP9 instead of H.264). After every tenth of them it
prints the memory of all processes together (PSS, which counts shared pages once) and the number of
open files of each process. Both should stay flat after the first tenth, which warms up.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import ClipLoader, LoaderOptions, build_loader
from clipvip.data.shards import Shards, Source, build_shard_loader, write_shards

FILES, BATCH = 200, 16
CODECS = {
    "pyav": (".mp4", "libx264", {"preset": "ultrafast"}),
    "dali": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
}


def main(clips: int = 10_000, workers: int = 2, decoder: str = "pyav") -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotations = render(folder, *CODECS[decoder])
        shards = folder / "shards"
        write_shards(annotations, shards, clips_per_shard=20, num_workers=workers)
        options = LoaderOptions(
            tokenizer=None,
            image_size=64,
            num_frames=8,
            text_length=8,
            task="video",
            batch_size=BATCH,
            seed=1,
            num_workers=workers,
            decoder=decoder,
        )
        given: list[Clip] = load_annotations(annotations)
        watch("files", build_loader(given, options, training=True), clips)
        watch("shards", build_shard_loader(Shards([Source(str(shards))]), options), clips)


def render(folder: Path, suffix: str, codec: str, options: dict[str, str]) -> Path:
    """Render FILES clips of 24 frames of 128×96; return their annotations."""
    noise = np.random.default_rng(0)
    lines = []
    for number in range(FILES):
        path = folder / f"{number}{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=12, options=options)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for _ in range(24):
                pixels = noise.integers(0, 255, (96, 128, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f'{{"video": "{path.name}", "text": "clip {number}"}}\n')
    annotations = folder / "clips.jsonl"
    annotations.write_text("".join(lines))
    return annotations


def watch(name: str, loader: ClipLoader, clips: int) -> None:
    started, seen, epoch, shown = time.monotonic(), 0, 0, 0
    print(f"{name}: clips, MiB, open files", flush=True)
    while seen < clips:
        loader.set_epoch(epoch)
        for batch in loader:
            seen += len(batch["clip_index"])
            if seen * 10 // clips > shown:
                shown = seen * 10 // clips
                processes = [os.getpid(), *children()]
                memory = sum(map(held, processes)) / 2**20
                files = [len(os.listdir(f"/proc/{process}/fd")) for process in processes]
                print(f"{seen:6} {memory:8.1f}   {files}", flush=True)
            if seen >= clips:
                break
        epoch += 1
    print(f"{seen / (time.monotonic() - started):.0f} clips/s")


def children() -> list[int]:
    return [int(word) for word in Path("/proc/thread-self/children").read_text().split()]


def held(process: int) -> int:
    """Bytes of memory of a process; a page that k processes share counts 1/k."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
