"""An index of a few videos made on the spot, and a client of its server."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from clipvip.index.captions import key_of
from clipvip.index.rows import About, FileState
from clipvip.index.store import Store
from clipvip.index.video_index import VideoIndex
from clipvip.serve.app import build_app

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}
# What a name may hold: HTML, a terminal's command, a mark that turns text around, bytes that are
# not UTF-8.
HOSTILE = os.fsdecode("<img src=x onerror=alert(1)>\x1b[31m\u202e".encode() + b"\xe9.mp4")


CAPTION = "a red square with a white bar that grows from second to second, " * 5
HOSTILE_CAPTION = "<img src=x onerror=alert(2)> \x1b[31m\u202e & </p>"


def write_video(path: Path, colour, codec="libx264", seconds=4, sound=False) -> Path:
    with av.open(os.fsencode(path).decode("utf-8", "surrogateescape"), "w") as out:
        stream = out.add_stream(codec, rate=10, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 36, "yuv420p"
        audio = out.add_stream("aac", rate=48000, layout="mono") if sound else None
        for number in range(10 * seconds):
            picture = np.full((36, 64, 3), colour, np.uint8)
            picture[:, : 6 * (number // 10)] = 255  # the second, as the width of a white bar
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
        if audio is not None:
            tone = np.sin(np.arange(48000 * seconds) / 20, dtype=np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate = 48000
            out.mux(audio.encode(frame))
            out.mux(audio.encode())
    return path


class Encoder:
    """Stands for a model: a sentence's vector is that of its colour, a file's is green's."""

    def __init__(self, about):
        self.about = about

    def combined(self, queries, weights):
        (query,) = queries
        if isinstance(query, Path):
            with Image.open(query) if query.suffix == ".png" else av.open(str(query)):
                pass
            query = "green"
        colour = next((place for place, name in enumerate(COLOURS) if name in query), None)
        if colour is None:
            raise ValueError("the query names no colour")
        return np.eye(4, dtype=np.float32)[colour]


class Index(VideoIndex):
    def _encoder_of_index(self):
        return Encoder(self.about)


def state(path: Path, duration: float, date: float) -> FileState:
    status = os.stat(path)
    return FileState(
        str(path), status.st_size, status.st_mtime_ns, "", "windows 2 2", duration, date
    )


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Index:
    """red.mp4 with sound and two moments, green.avi, blue.png, and one of a hostile name."""
    folder = tmp_path_factory.mktemp("serve")
    videos = folder / "videos"
    videos.mkdir()
    Image.new("RGB", (80, 40), COLOURS["blue"]).save(videos / "blue.png")
    (videos / HOSTILE).write_bytes(write_video(folder / "h.mp4", COLOURS["red"]).read_bytes())
    one = np.eye(4, dtype=np.float32)
    files = [
        (state(write_video(videos / "red.mp4", COLOURS["red"], sound=True), 4.0, 1e9), 0),
        (state(write_video(videos / "green.avi", COLOURS["green"], "mpeg4"), 4.0, 1.2e9), 1),
        (state(videos / "blue.png", 0.0, 1.4e9), 2),
        (state(videos / HOSTILE, 4.0, 1.6e9), 3),
    ]
    near = (one[0] + 0.5 * one[3]) / np.linalg.norm(one[0] + 0.5 * one[3])
    spans = {0: [(0.0, 2.0), (2.0, 4.0)], 1: [(None, None)], 2: [(None, None)], 3: [(1.0, 3.0)]}
    vectors = {0: np.stack([one[0], one[1]]), 1: one[1:2], 2: one[2:3], 3: near[None]}
    store = Store.create(folder / "index", About("model", "fingerprint", 4, (str(videos),)))
    store.put([(file, spans[place], vectors[place]) for file, place in files])
    texts = [(0, CAPTION), (2, "a blue square"), (3, HOSTILE_CAPTION)]
    keys = {key_of(files[place][0], *spans[place][0]): text for place, text in texts}
    store.captions.put(keys, "model")
    return Index(folder / "index")


@pytest.fixture(scope="session")
def client(index):
    from starlette.testclient import TestClient

    with TestClient(build_app(index, index.where), base_url="http://127.0.0.1:8000") as client:
        yield client
