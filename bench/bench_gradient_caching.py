"""Gradient caching against a whole batch at once: `pytest bench/bench_gradient_caching.py -s`.

The model is small (4 frames of 64², two layers of 128 channels), so that the batch decides memory.
Writes gradient_caching.json to --bench-out, by default bench/results.
"""

import time
from contextlib import nullcontext

import cases
import pytest
import records
import torch
from device import MIB, peak_memory
from machine import machine
from transformers import CLIPTextConfig

from clipvip.losses import contrastive_loss
from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.training.step import forward_backward_in_parts

BATCHES = (64, 256, 1024, 4096)
MICRO_BATCH, FRAMES, TOKENS = 32, 4, 16
TOWER = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def towers():
    """Return a model, and a function from a batch to its features."""
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 1000, "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": 998, "eos_token_id": 999}
    vision = {**TOWER, "image_size": 64, "patch_size": 16}
    shapes = CLIPViPConfig(
        projection_dim=128, text_config=CLIPTextConfig(**text).to_dict(), vision_config=vision
    )
    model = CLIPViPModel(shapes)

    def embed(batch):
        pixels = batch["pixel_values"].float() / 255
        video = model.get_video_features(pixels, batch["frame_offsets"])
        text = model.get_text_features(batch["text_ids"])
        unit = torch.nn.functional.normalize
        return {
            "video": unit(video, dim=-1),
            "text": unit(text, dim=-1),
            "scale": model.logit_scale.exp(),
        }

    return model, embed


def step(model, embed, batch, micro_batch):
    """Run forward and backward of one batch; return the loss and a gradient."""
    model.zero_grad()

    def loss_of(features):
        return contrastive_loss(features["video"], features["text"], features["scale"])

    if micro_batch is None:
        loss = loss_of(embed(batch))
        loss.backward()
    else:
        loss = forward_backward_in_parts(
            *(embed, loss_of, batch, micro_batch),
            send_parts=lambda parts: ((part, part) for part in parts),
            backward=torch.Tensor.backward,
            without_sync=nullcontext,
        )
    return [loss, model.visual_projection.weight.grad]


def rows(clips: int) -> dict[str, dict[str, float]]:
    """Return seconds, and peak memory in MiB beyond batch and model, at once and in parts."""
    model, embed = towers()
    batch = {
        "pixel_values": torch.randint(256, (FRAMES * clips, 3, 64, 64), dtype=torch.uint8),
        "frame_offsets": torch.arange(0, FRAMES * clips + 1, FRAMES, dtype=torch.int32),
        "text_ids": torch.randint(1, 990, (clips, TOKENS)),
    }
    batch["text_ids"][:, -1] = 999
    found, expected = {}, None
    for name, micro_batch in (("at once", None), ("in parts", MICRO_BATCH)):
        got = step(model, embed, batch, micro_batch)
        expected = expected or [x.clone() for x in got]
        for x, want in zip(got, expected, strict=True):
            torch.testing.assert_close(x, want, rtol=1e-3, atol=1e-5)
        times = []

        def timed(micro_batch=micro_batch, times=times):
            started = time.perf_counter()
            step(model, embed, batch, micro_batch)
            times.append(time.perf_counter() - started)

        peak = peak_memory(timed)
        found[name] = {"seconds": times[0], "peak_mib": peak / MIB}
    return found


def test_gradient_caching(request: pytest.FixtureRequest) -> None:
    """Measure each batch in a process of its own, so that memory freed earlier is not reused."""
    results = {}
    for n in BATCHES:
        results[n] = row = cases.run("bench_gradient_caching", "rows", {"clips": n})
        assert "left_out" not in row, row["left_out"]
        cells = "   ".join(
            f"{name} {r['seconds']:6.2f} s {r['peak_mib']:7.0f} MiB" for name, r in row.items()
        )
        print(f"\n{n:5} clips   {cells}", end="")
    record = {"micro_batch": MICRO_BATCH, "results": results, "machine": machine()}
    records.write(request.config.getoption("--bench-out") / "gradient_caching.json", record)
