"""Training at other frame sizes and text lengths than a checkpoint's."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPModel
from clipvip.training.build import build_model
from clipvip.training.config import ConfigError
from clipvip.training.dry_run import dry_run
from clipvip.training.trainer import train

SIZES = ("model.image_size=64", "data.text_length=48")


@pytest.fixture
def named(make_config, tmp_path):
    """A configuration of a run from a checkpoint that reads frames of 32 and 32 tokens."""
    model, processor = build_model(make_config(), None)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = ["model.config=null", "model.tokenizer=null", f"model.name={tmp_path / 'base'}"]
    return lambda *overrides: make_config(*base, *overrides)


def test_a_run_reads_the_sizes_that_it_asks_for_and_resumes_with_them(named, capsys):
    config = named(*SIZES, "save_every=3", "resume=latest")
    whole = train(config)
    rows = (Path(config.out) / "metrics.jsonl").read_text()
    for folder in ("last", "checkpoints/step-00000003/model"):
        model, processor = load_for_embedding(Path(config.out) / folder)
        assert model.config.vision_config.image_size == processor.image_size == 64
        assert model.config.text_config.max_position_embeddings == processor.text_length == 48
        assert processor.tokenizer.model_max_length == 48
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")
    capsys.readouterr()
    again = train(config)
    assert "interpolated" not in capsys.readouterr().err
    assert again == whole
    losses = [
        [json.loads(line)["loss"] for line in lines.splitlines() if '"loss"' in line]
        for lines in (rows, (Path(config.out) / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6

    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")
    with pytest.raises(ConfigError, match=r"image_size is 96, but the run that is resumed"):
        train(named("model.image_size=96", "resume=latest"))
    with pytest.raises(ConfigError, match=r"text_length is 77; expected at most 48"):
        train(named("data.text_length=77", "resume=latest"))


def test_a_run_starts_from_the_weights_that_loading_gives(named, tmp_path):
    model, _ = build_model(named(*SIZES), None)
    sizes = {"image_size": 64, "text_length": 48}
    loaded = CLIPViPModel.from_pretrained(tmp_path / "base", **sizes).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded[name]), name
    shorter, processor = build_model(named("data.text_length=20"), None)
    assert shorter.config.text_config.max_position_embeddings == 32
    assert processor.text_length == 20


def test_a_dry_run_plans_the_sizes_of_the_run(named, make_config, capsys):
    for config in (named(*SIZES), make_config("model.image_size=64")):
        dry_run(config, processes=1)
        said = capsys.readouterr().out
        assert f"{2 + 2 * 16} of video" in said and "the run can start" in said
    dry_run(named(*SIZES), processes=1)
    assert "at most 48 of text" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_a_size_that_no_frame_can_have_is_one_line(named, flag, capsys, tmp_path):
    from clipvip.training.__main__ import main

    given = [f"model.name={tmp_path / 'base'}", "model.config=null", "model.tokenizer=null"]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "tiny.yaml"), *given, "model.image_size=40", *flag])
    said = capsys.readouterr().err
    assert "model.image_size is 40; expected a multiple of 16, the patch size" in said
    assert said.startswith("clipvip: error: ") and said.count("\n") == 1
