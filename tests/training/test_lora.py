"""LoRA: only its weights are trained, and its checkpoints load with PEFT and without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.training import lora
from clipvip.training.__main__ import main
from clipvip.training.config import ConfigError
from clipvip.training.trainer import train

peft = pytest.importorskip("peft")

TARGETS = ("[qv]_proj", "fc1", "*_projection")
LORA = f"model.lora={{r: 4, alpha: 16, dropout: 0.1, targets: {list(TARGETS)}}}"
FORKS = Path(__file__).with_name("forks.py")


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A plain CLIP, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 1
    tokens = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = {**tower, **tokens, "max_position_embeddings": 32}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(world / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def make(make_config, base, world):
    """A configuration that trains LoRA on `base`."""

    def build(*overrides, lora=LORA):
        given = ["model.config=null", f"model.name={base}", "model.tokenizer=null", lora]
        return make_config(*given, "optimizer.lr=1e-2", "backend=native", *overrides)

    build.path = make_config.path
    return build


def losses(out):
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def checkpoint(out, step):
    return Path(out) / "checkpoints" / f"step-{step:08d}"


def features(model, seed=0):
    """Features of two videos of 2 and 3 frames, and of two texts."""
    torch.manual_seed(seed)
    pixels, ids = torch.randn(5, 3, 32, 32), torch.randint(0, 512, (2, 8))
    ids[:, -1] = 513
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    return model.get_video_features(pixels, offsets), model.get_text_features(ids)


def test_what_is_trained_loads_with_peft_and_without(make, base):
    """Changes of linear layers and what CLIP lacks; PEFT merges them as the checkpoint does."""
    config = make("max_steps=60", "save_every=60", "optimizer.lr=5e-3")
    train(config)
    trained = Path(config.out)
    curve = list(losses(trained).values())
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    whole = CLIPViPModel.from_pretrained(trained / "last")
    before = CLIPViPModel.from_pretrained(base).state_dict()
    after = load_file(trained / "last" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not after[name].equal(before[name])}
    targets = {f"{name}.weight" for name in lora.linear_layers(whole, list(TARGETS))}
    assert changed == targets | set(lora.TRAINED_WHOLE)

    adapter = checkpoint(trained, 60) / "adapter"
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", lora.WEIGHTS}
    state = torch.load(checkpoint(trained, 60) / "state.pt", weights_only=True)
    assert not set(state["weights"]) & set(after)  # nothing is stored twice
    loaded = peft.PeftModel.from_pretrained(CLIPViPModel.from_pretrained(base), str(adapter))
    with torch.inference_mode():
        found, wanted = features(loaded.base_model.model), features(whole)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload().state_dict()
    assert merged.keys() == whole.state_dict().keys()
    for name, weight in whole.state_dict().items():
        assert merged[name].equal(weight), name


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("ema=0.7",),
        ("accumulation=2", "micro_batch=2", "model.gradient_checkpointing=true"),
        ("mixed_precision=bf16", 'model.unfreeze=["*.q_proj.*"]', 'model.freeze=["text_model.*"]'),
    ],
    ids=["plain", "ema", "in-parts", "bf16"],
)
def test_a_resumed_run_is_the_unbroken_one(make, tmp_path, overrides):
    """Which saved once, and the broken one after each step: saving disturbs nothing."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    overrides = ("max_steps=4", *overrides)
    train(make(f"out={whole}", *overrides))
    train(make(f"out={broken}", "save_every=1", "keep_checkpoints=9", *overrides))
    for step in (3, 4):
        checkpoint(broken, step).rename(tmp_path / f"aside-{step}")
    train(make(f"out={broken}", "resume=latest", *overrides))
    assert losses(broken) == losses(whole)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        weights = [load_file(checkpoint(out, 4) / name) for out in (whole, broken)]
        assert weights[0].keys() == weights[1].keys()
        assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_the_layers_with_changes_compute_what_merged_ones_do(make, base):
    """Forward and backward, although merged ones run in the fused kernels."""
    merged = CLIPViPModel.from_pretrained(base)
    changed = CLIPViPModel.from_pretrained(base)
    lora.prepare(changed, make(lora="model.lora={targets: ['*']}"))
    for name, weight in changed.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    merged.load_state_dict(lora.merged(changed, changed.state_dict()))
    for found, wanted in zip(features(changed), features(merged), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        found.sum().backward()
        wanted.sum().backward()
    for name in lora.TRAINED_WHOLE[:2]:
        gradients = [model.get_parameter(name).grad for model in (changed, merged)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_ranks_train_as_one(make, base, tmp_path):
    overrides = ["model.config=null", f"model.name={base}", "model.tokenizer=null"]
    overrides += [LORA.replace("dropout: 0.1", "dropout: 0"), "max_steps=2", "optimizer.lr=1e-3"]
    train(make(*overrides, f"out={tmp_path / 'one'}"))
    given = ["two", str(make.path), *overrides]
    both = [*given, f"out={tmp_path / 'ddp'}"]
    both += ["+", *given, "parallel=fsdp", f"out={tmp_path / 'fsdp'}"]
    subprocess.run([sys.executable, str(FORKS), *both], check=True, timeout=120)
    one = load_file(checkpoint(tmp_path / "one", 2) / "adapter" / lora.WEIGHTS)
    for kind in ("ddp", "fsdp"):
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        adapter = load_file(checkpoint(tmp_path / kind, 2) / "adapter" / lora.WEIGHTS)
        torch.testing.assert_close(adapter, one, rtol=1e-3, atol=1e-5)


def test_a_dry_run_counts_moments_of_trained_weights_alone(make, base, world, capsys):
    given = [str(make.path), "model.config=null", f"model.name={base}", "model.tokenizer=null"]
    main([*given, "model.lora={}", "--dry-run"])
    said = capsys.readouterr().out
    # q_proj and v_proj of two layers of both towers, 3 proxies, 12 positions in time, the scale
    model = CLIPViPModel(CLIPViPConfig.from_pretrained(base))
    lora.prepare(model, make(lora="model.lora={}"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * 2 * 8 * (32 + 32) + (3 + 12) * 32 + 1
    assert f"{trained / 1e6:.1f} M trained" in said
    assert "the run can start" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "model.lora={targets: [q_poj]}",
            r"'q_poj' matches no linear layer; did you mean q_proj\?",
        ),
        ("model.lora={targets: [patch_embedding]}", "'patch_embedding' matches no linear layer"),
        ("model.lora={targets: []}", r"model.lora.targets is \[\]; it must be a list with"),
        ("model.lora={r: 0}", "model.lora.r is 0; it must be at least 1"),
        ("model.lora={rank: 8}", "unknown key model.lora.rank"),
        ("model.lora.dropout=1", r"model.lora.dropout is 1.0; it must be in \[0, 1\)"),
        ("model.lora=8", "model.lora is 8; expected settings, such as model.lora.r"),
        (
            "model.lora.targets=fc1",
            r"is 'fc1'; expected a list, such as model.lora.targets=\[fc1\]",
        ),
    ],
)
def test_wrong_settings_are_one_line(make, given, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(make(lora=given))
    assert "\n" not in str(error.value)


def test_a_run_resumes_with_its_own_lora_alone(make):
    config = make("max_steps=1")
    train(config)
    others = {
        "model.lora=null": "here None",
        LORA.replace("r: 4", "r: 2"): "'r': 2",
        LORA.replace("fc1", "fc2"): "is with .*fc1, and here without .*fc1",
    }
    for other, message in others.items():
        with pytest.raises(ConfigError, match=f"model.lora of the checkpoint.*{message}"):
            train(make("max_steps=2", "resume=latest", lora=other))
    merged = f"model.name={Path(config.out) / 'last'}"
    train(make("max_steps=1", merged, f"out={config.out}-more"))


def test_a_missing_peft_is_one_line(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'model.lora needs PEFT: pip install "clipvip\[lora\]"'):
        train(make())
