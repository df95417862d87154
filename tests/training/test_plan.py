"""A dry run of every packaged configuration; what it predicts is what a model does."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPTokenizer, GPT2Config

from clipvip.model import CLIPViPModel
from clipvip.training.__main__ import main
from clipvip.training.build import build_model, model_config
from clipvip.training.config import load_config, packaged_configs
from clipvip.training.plan import peak_tera, plan
from clipvip.training.task import task_of

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
        text |= {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # world's
        shapes = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)
        shapes.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, world):
    """Folder of GPT-2's true shapes, but for its vocabulary, with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    CLIPTokenizer.from_pretrained(world / "tokenizer").save_pretrained(folder)
    GPT2Config(vocab_size=514, bos_token_id=512, eos_token_id=513).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """As many lines as the largest batch has clips, of a video that is not there."""
    path = tmp_path_factory.mktemp("clips") / "clips.jsonl"
    row = {"video": "absent.mp4", "text": "a", "subtitle": "b", "caption": "c"}
    path.write_text((json.dumps(row) + "\n") * 2048)
    return path


@pytest.mark.parametrize("name", [path.stem for path in packaged_configs()])
def test_every_packaged_config_runs_dry(name, checkpoints, gpt2, annotations, tmp_path, capsys):
    kind = next((kind for kind in PATCHES if name.endswith(kind)), "b32")
    given = [f"out={tmp_path / 'run'}", f"data.train={annotations}"]
    parameters = {"b32": 151.3, "b16": 149.6, "l14": 427.6}[kind]
    all_of_them = f"{parameters} M, {parameters} M trained"
    if captions := name.endswith("captions"):  # with the shapes of GPT-2 and no weights
        given.append(f"model.decoder.name={gpt2}")
        all_of_them = "265.9 M, 202.1 M trained"
    given += [f"model.name={checkpoints[kind]}", "data.num_workers=0"]
    main([name, *given, "--dry-run", "--processes", "8"])
    said = capsys.readouterr().out
    config = load_config(name, given)
    tokens = 4 + config.data.num_frames * (224 // PATCHES[kind]) ** 2
    assert f"tokens per clip      {tokens} of video" in said
    assert all_of_them in said
    assert captions == (config.task == "captioning")
    assert f"{config.batch_size // 8} on each of 8 processes" in said
    steps = int(config.epochs * (2048 // config.batch_size))
    assert f"{steps} steps, {steps * config.batch_size} samples drawn from 2048 clips" in said
    assert said.rstrip().endswith("the run can start")
    assert not (tmp_path / "run").exists()


CLIPS = 8


@pytest.fixture
def wide(make_config):
    """Makes a wide enough configuration, its towers and a batch, of videos of so many frames."""

    def make(frames, *overrides):
        width = {"hidden_size": 96, "intermediate_size": 384}
        config = make_config(
            "task=omnisource",
            f"data.num_frames={frames}",
            "model.config.vision_config.image_size=96",
            *(f"model.config.text_config.{key}={value}" for key, value in width.items()),
            *(f"model.config.vision_config.{key}={value}" for key, value in width.items()),
            *overrides,
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
        return config, task_of(config).towers(model, processor), batch

    return make


_BELOW = "'vision_model.embeddings.*','vision_model.pre_layrnorm.*'"
FROZEN = {
    "nothing": "",
    "texts": "'text_*'",
    "videos": "'vision_*','visual_*'",
    "lower half": f"'text_*',{_BELOW},'vision_model.encoder.layers.0.*'",
    "upper half": "'text_model.encoder.layers.1.*','vision_model.encoder.layers.1.*'",
    "all but projections": "'text_model.*','vision_model.*'",
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_operations_are_those_of_the_model(wide, frozen):
    # Of one frame: of more, the reference's attention multiplies what its mask leaves out.
    config, towers, batch = wide(1, f"model.freeze=[{frozen}]")
    towers.model.text_model.config._attn_implementation = "eager"  # SDPA's would not be counted
    predicted = plan(towers.model, config, 1)
    with FlopCounterMode(display=False) as counter:
        features = towers(batch)
    forward = counter.get_total_flops()
    assert forward == pytest.approx(CLIPS * predicted.tower_flops, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        sum(feature.sum() for feature in features.values()).backward()
    backward = CLIPS * predicted.backward_flops
    assert counter.get_total_flops() == pytest.approx(backward, rel=0.02, abs=0.01 * forward)


@pytest.mark.parametrize("options", ["task=retrieval", "variant=vs", "variant=vs_vc_fc"])
def test_operations_of_the_loss_are_those_of_its_logits(make_config, options):
    config = make_config("task=omnisource", "batch_size=8", options)
    task = task_of(config)
    names = ("video", "text", "subtitle", "caption", "frame")
    features = {name: torch.rand(8, 32) for name in names} | {"scale": torch.tensor(1.0)}
    kinds = ("video_present", "subtitle_present", "caption_present")
    present = dict.fromkeys(kinds, torch.ones(8).bool())
    with FlopCounterMode(display=False) as counter:
        task.loss(features, present)
    model, _ = build_model(config, None)
    assert counter.get_total_flops() == plan(model, config, 1).loss_flops


def bytes_kept(call, parameters):
    """By the graph of a call, beside the parameters."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_memory_is_what_the_model_keeps(wide, precision, frozen):
    config, towers, batch = wide(10, "backend=native", f"model.freeze=[{frozen}]")
    config.mixed_precision = precision
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = bytes_kept(lambda: towers(batch), towers.parameters())
    predicted = plan(towers.model, config, 1).activation_bytes
    # Weights cast by autocast are not counted, and much beside tensors as narrow as these.
    assert kept == pytest.approx(predicted, rel=0.15, abs=2**18)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "fc1", "'*'"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_memory_with_lora_is_what_the_model_keeps(wide, precision, targets):
    config, towers, batch = wide(10, "backend=native", f"model.lora={{r: 1, targets: [{targets}]}}")
    config.mixed_precision = precision
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = bytes_kept(lambda: towers(batch), towers.parameters())
    predicted = plan(towers.model, config, 1).activation_bytes
    assert kept == pytest.approx(predicted, rel=0.15, abs=2**18)


@pytest.mark.parametrize("tokens", ["proxies", "all"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("frozen", ["", "'vision_model.*'"])
def test_operations_and_memory_of_a_captioner_are_those_of_the_model(
    make_config, tokens, kind, frozen
):
    width = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    width |= {"intermediate_size": 300, "max_position_embeddings": 40}
    if kind == "gpt2":
        width = {"n_embd": 192, "n_layer": 2, "n_head": 2, "n_positions": 40}
    config = make_config(
        *("task=captioning", f"model.decoder.tokens={tokens}", f"model.freeze=[{frozen}]"),
        f"model.decoder.config={json.dumps({'model_type': kind} | width)}",
        *("model.config.vision_config.hidden_size=128", "batch_size=4"),
        *("model.config.vision_config.intermediate_size=512", "data.num_frames=1"),
        "model.config.vision_config.image_size=96",
    )
    model, processor = build_model(config, None)
    model.decoder.config._attn_implementation = "eager"  # SDPA's would not be counted
    batch = {
        "pixel_values": torch.randint(256, (4, 3, 96, 96), dtype=torch.uint8),
        "frame_offsets": torch.arange(5, dtype=torch.int32),
        "text_ids": torch.randint(500, (4, 32)),
        "text_mask": torch.ones(4, 32, dtype=torch.int64),
    }
    towers, predicted = task_of(config).towers(model, processor), plan(model, config, 1)
    with FlopCounterMode(display=False) as counter:
        losses = towers(batch)["loss"]
    assert counter.get_total_flops() == pytest.approx(4 * predicted.tower_flops, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        losses.sum().backward()
    assert counter.get_total_flops() == pytest.approx(4 * predicted.backward_flops, rel=0.02)
    if frozen:  # as others measure the tower's own
        kept = bytes_kept(lambda: towers(batch), towers.parameters())
        assert kept == pytest.approx(predicted.activation_bytes, rel=0.2)


def test_memory_with_checkpoints_is_what_is_kept_and_a_layers_insides(wide):
    config, towers, batch = wide(10, "backend=native", "model.gradient_checkpointing=true")
    kept = bytes_kept(lambda: towers(batch), towers.parameters())
    predicted = plan(towers.model, config, 1)
    _, plain, _ = wide(10, "backend=native")
    insides = []
    for layer in plain.model.vision_model.encoder.layers:
        forward = layer.forward

        def measured(*given, forward=forward):
            insides.append(bytes_kept(lambda: forward(*given), plain.parameters()))
            return forward(*given)

        layer.forward = measured
    plain(batch)
    assert kept + max(insides) == pytest.approx(predicted.activation_bytes, rel=0.1)


def test_the_peak_is_that_of_the_very_device(monkeypatch):
    """As their drivers name them; of a part of one, and of others, it is not known."""
    peaks = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H100 NVL": 835.5,
        "NVIDIA H200": 989.4,
        "NVIDIA GB200": 2500.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA GeForce RTX 4090": None,
    }
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tera(torch.device("cuda")) == peak
    assert peak_tera(torch.device("cpu")) is None


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
