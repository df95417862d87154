"""A tiny world to train in: a byte tokenizer, clips of moving squares, a two-layer model."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "grey": (128,) * 3}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def write_clip(path, colour, motion, frames=8, size=48, codec="libx264"):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"crf": "12"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 8)
        for t in range(frames):
            image = np.full((size, size, 3), 20, np.uint8)
            x, y = (18 + round((t - frames / 2) * 4 * d) for d in MOTIONS[motion])
            image[max(y, 0) : y + 12, max(x, 0) : x + 12] = COLOURS[colour]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with annotations.jsonl of 16 clips and tokenizer/."""
    return make_world(tmp_path_factory.mktemp("world"), "libx264", ".mp4")


@pytest.fixture(scope="session")
def vp9_world(tmp_path_factory):
    """The same of VP9, which DALI decodes without a GPU."""
    return make_world(tmp_path_factory.mktemp("vp9_world"), "libvpx-vp9", ".webm")


def make_world(folder, codec, suffix):
    from transformers import CLIPTokenizer

    lines = []
    for colour in COLOURS:
        for motion in MOTIONS:
            name = f"{colour}-{motion}{suffix}"
            write_clip(folder / name, colour, motion, codec=codec)
            text = f"{colour} moves {motion}"
            row = {"video": name, "text": [text, f"the {text}"], "subtitle": f"uh {text}"}
            if motion != "up":  # some clips have no caption
                row["caption"] = f"a {colour} square"
            lines.append(json.dumps(row) + "\n")
    (folder / "annotations.jsonl").write_text("".join(lines))

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as byte-level BPE does
    table = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*table, *(c + "</w>" for c in table), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """No test cuts the power, and a disk may take longer to flush than the rest of a step."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def own_device(request, monkeypatch):
    """Runs are on the CPU where there is a GPU too, except those of tests that ask for it.
    accelerate would keep the device of the first run for all."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
}


@pytest.fixture
def make_config(world, tmp_path):
    """A YAML file of a run on the world; returns load_config's result with overrides."""
    from clipvip.training.config import load_config

    path = tmp_path / "tiny.yaml"
    lines = {
        "out": str(tmp_path / "run"),
        "task": "retrieval",
        "batch_size": 8,
        "max_steps": 6,
        "mixed_precision": "no",
        "backend": "reference",
        "data": {
            "train": str(world / "annotations.jsonl"),
            "num_frames": 2,
            "text_length": 32,
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-3, "warmup": 0.2},
        "model": {
            "tokenizer": str(world / "tokenizer"),
            "config": {
                "projection_dim": 32,
                "text_config": {**TOWER, "max_position_embeddings": 32},
                "vision_config": {**TOWER, "image_size": 32, "patch_size": 16, "num_proxies": 2},
            },
        },
    }
    path.write_text(json.dumps(lines))  # JSON is YAML

    def make(*overrides):
        return load_config(path, overrides)

    make.path = path
    return make
