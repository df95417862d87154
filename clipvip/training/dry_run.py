"""`--dry-run`: the cost of a run, and one step through all its parts with a tiny model."""

import json
import os
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from clipvip.model import CLIPViPConfig
from clipvip.model.configuration import DECODERS
from clipvip.training import lora
from clipvip.training.build import (
    build_processor,
    freeze_for,
    load_clips,
    model_config,
    settled,
)
from clipvip.training.config import ConfigError, DecoderConfig, TrainConfig, check_batch
from clipvip.training.optimization import run_steps
from clipvip.training.plan import plan
from clipvip.training.sources import describe_sources, image_share
from clipvip.training.task import task_of
from clipvip.training.trainer import train


def dry_run(config: TrainConfig, processes: int) -> None:
    """Print the plan of a run on so many processes, then take one step of its trial in this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("a dry run takes one process; --processes=N plans for more")
    check_batch(config, processes)
    clips = load_clips(config)[0]
    _, steps = run_steps(config, len(clips) // (config.batch_size // config.accumulation))
    shapes = model_config(config)
    config = settled(config, build_processor(config, shapes))
    with torch.device("meta"):
        model = task_of(config).model_class(shapes)
    lora.prepare(model, config)
    freeze_for(model, config)
    cost = plan(model, config, processes, image_share(clips))
    print(cost.describe(len(clips), steps, describe_sources(clips)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        loss = train(trial(config, shapes, Path(folder)))["loss"]
    print(f"one step with a 32-channel model of the same depth: loss {loss:.4f}; the run can start")


def trial(config: TrainConfig, shapes: CLIPViPConfig, folder: Path) -> TrainConfig:
    """Return the configuration of one step through all parts of a run, in this folder.

    The model has the layers, patches, frames and vocabulary of `shapes`, but 32 channels. The clips
    are synthetic, two per micro-batch.

    config: configuration with all settings of how clips are read.
    """
    given = {**shapes.to_dict(), "projection_dim": 32}
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1}
    for tower in ("text_config", "vision_config"):
        given[tower] = {**given[tower], **narrow}
    for key in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
        given.pop(key, None)
    source = config.model.tokenizer or config.model.name
    model = replace(config.model, name=None, config=given, tokenizer=source)
    decoder = given.pop("decoder_config")
    tokens = given.pop("decoder_tokens")
    if config.task == "captioning":
        gpt2 = {"n_embd": 32, "n_head": 1, "n_inner": 64}
        own = set(DECODERS[decoder["model_type"]]().to_dict()) - {"vocab_size"}  # the tokenizer's
        decoder = {name: value for name, value in decoder.items() if name in own}
        decoder |= gpt2 if decoder["model_type"] == "gpt2" else narrow
        model = replace(model, decoder=DecoderConfig(config=decoder, tokens=tokens))
    assert config.data.num_frames is not None
    clips = 2 * config.accumulation
    path = str(_made_up(folder, clips, config.data.num_frames))
    workers = min(config.data.num_workers, 1)
    data = replace(config.data, train=path, sources=[], validation=path, num_workers=workers)
    config = replace(config, batch_size=clips, micro_batch=config.micro_batch and 1)
    config = replace(config, epochs=None, max_steps=1, resume="never")
    return replace(config, out=str(folder / "run"), model=model, data=data)


def _made_up(folder: Path, clips: int, frames: int) -> Path:
    """Write annotations of a video of a moving pattern, each clip with every kind of text."""
    import av

    video = folder / "clip.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.time_base = Fraction(1, 25)
        picture = np.random.default_rng(0).integers(0, 256, (15, 20, 3), np.uint8)
        picture = picture.repeat(16, 0).repeat(16, 1)
        for t in range(2 * frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * t, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path = folder / "clips.jsonl"
    row = {"video": video.name, "text": "a", "subtitle": "a b", "caption": "a b c"}
    path.write_text((json.dumps(row) + "\n") * clips)
    return path
