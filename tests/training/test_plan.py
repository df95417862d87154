"""A dry run of every packaged configuration; what it predicts is what a model does."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPTokenizer

from clipvip.model import CLIPViPModel
from clipvip.training.__main__ import main
from clipvip.training.build import build_model, model_config
from clipvip.training.config import load_config, packaged_configs
from clipvip.training.plan import plan
from clipvip.training.trainer import Towers

PATCHES = {"b32": 32, "b16": 16, "l14": 14}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, world):
    """Folders of CLIP's true shapes, with a tokenizer and without weights."""
    folders = {}
    for kind, patch in PATCHES.items():
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        CLIPTokenizer.from_pretrained(world / "tokenizer").save_pretrained(folder)
        vision = {"patch_size": patch, "image_size": 224, "hidden_size": 768}
        text = {"hidden_size": 512, "num_attention_heads": 8}
        if kind == "l14":
            vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
            vision |= {"num_hidden_layers": 24}
            text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        dimension = 768 if kind == "l14" else 512
        shapes = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)
        shapes.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """As many lines as the largest batch has clips, of a video that is not there."""
    path = tmp_path_factory.mktemp("clips") / "clips.jsonl"
    row = {"video": "absent.mp4", "text": "a", "subtitle": "b", "caption": "c"}
    path.write_text((json.dumps(row) + "\n") * 2048)
    return path


@pytest.mark.parametrize("name", [path.stem for path in packaged_configs()])
def test_every_packaged_config_runs_dry(name, checkpoints, annotations, tmp_path, capsys):
    kind = name.rpartition("_")[2] if "_" in name else "b32"
    given = [f"out={tmp_path / 'run'}", f"data.train={annotations}"]
    given += [f"model.name={checkpoints[kind]}", "data.num_workers=0"]
    main([name, *given, "--dry-run", "--processes", "8"])
    said = capsys.readouterr().out
    config = load_config(name, given)
    tokens = 4 + config.data.num_frames * (224 // PATCHES[kind]) ** 2
    assert f"tokens of a clip      {tokens} of video" in said
    parameters = {"b32": 151.3, "b16": 149.6, "l14": 427.6}[kind]
    assert f"{parameters} M, {parameters} M trained" in said
    assert f"{config.batch_size // 8} on each of 8 processes" in said
    steps = int(config.epochs * (2048 // config.batch_size))
    assert f"{steps} steps, {steps * config.batch_size} samples drawn of 2048 clips" in said
    assert said.rstrip().endswith("the run can start")
    assert not (tmp_path / "run").exists()


CLIPS = 8


@pytest.fixture
def wide(make_config):
    """Makes a wide enough configuration, its towers and a batch, of videos of so many frames."""

    def make(frames):
        width = {"hidden_size": 96, "intermediate_size": 384}
        config = make_config(
            "task=omnisource",
            f"data.num_frames={frames}",
            "model.config.vision_config.image_size=96",
            *(f"model.config.text_config.{key}={value}" for key, value in width.items()),
            *(f"model.config.vision_config.{key}={value}" for key, value in width.items()),
        )
        model, processor = build_model(config, None)
        batch = {
            "pixel_values": torch.randint(256, (frames * CLIPS, 3, 96, 96), dtype=torch.uint8),
            "frame_offsets": torch.arange(0, frames * CLIPS + 1, frames, dtype=torch.int32),
            "image": torch.randint(256, (CLIPS, 3, 96, 96), dtype=torch.uint8),
        }
        for name in ("subtitle", "caption"):
            ids = torch.randint(500, (CLIPS, config.data.text_length))
            batch |= {f"{name}_ids": ids, f"{name}_mask": torch.ones_like(ids)}
        return config, Towers(model, config, processor), batch

    return make


def test_operations_are_those_of_the_model(wide):
    # Of one frame: of more, the reference's attention multiplies what its mask leaves out.
    config, towers, batch = wide(1)
    towers.model.text_model.config._attn_implementation = "eager"  # SDPA's would not be counted
    with FlopCounterMode(display=False) as counter:
        towers(batch)
    predicted = CLIPS * plan(towers.model, config, 1).tower_flops
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_memory_is_what_the_model_keeps(wide, precision):
    config, towers, batch = wide(10)
    config.mixed_precision = precision
    towers.model.vision_model.config.attention_backend = "native"
    weights = {p.untyped_storage().data_ptr() for p in towers.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        towers(batch)
    total = sum(size for size, _ in kept.values())
    assert total == pytest.approx(plan(towers.model, config, 1).activation_bytes, rel=0.15)


def test_shapes_are_known_without_weights(checkpoints, make_config):
    config = load_config("pretrain", ["out=x", "data.train=y", f"model.name={checkpoints['b32']}"])
    with torch.device("meta"):
        model = CLIPViPModel(model_config(config))
    assert model.config.vision_config.num_proxies == 4
    fewer = make_config("micro_batch=1", "parallel=fsdp", "ema=0.9")
    tiny, _ = build_model(fewer, None)
    size = sum(p.numel() for p in tiny.parameters())
    assert plan(tiny, fewer, 4).state_bytes == 4 * size * 5 / 4
    whole = plan(tiny, make_config(), 4).activation_bytes
    assert plan(tiny, fewer, 4).activation_bytes == whole / 2
