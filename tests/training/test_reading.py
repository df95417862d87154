"""How clips are read: said by the processor, chosen by a run, kept with what it trained."""

import json

import huggingface_hub.constants
import pytest
import torch

from clipvip import cli, embedding
from clipvip.data.annotations import load_annotations
from clipvip.model import CLIPViPProcessor
from clipvip.model.layouts import authors_state_dict
from clipvip.model.processing import READING
from clipvip.training import evaluate as evaluation
from clipvip.training.build import build_model, settled
from clipvip.training.config import ConfigError
from clipvip.training.dry_run import dry_run
from clipvip.training.trainer import train

CHOSEN = {
    "num_frames": 3,
    "text_length": 20,
    "paragraph": True,
    "sampling": "fps:4",
    "resize": "pad",
}


def reading(processor):
    return {name: getattr(processor, name) for name in READING}


@pytest.fixture
def loaded(monkeypatch):
    """What loaders of evaluations are asked for."""
    asked = []

    def spy(clips, options, **settings):
        asked.append(vars(options))
        return build(clips, options, **settings)

    build = embedding.build_loader
    monkeypatch.setattr(embedding, "build_loader", spy)
    return asked


def test_what_a_run_chooses_is_read_by_all_that_load_its_model(
    make_config, world, loaded, tmp_path
):
    validation = f"data.validation={world / 'annotations.jsonl'}"
    chosen = [f"data.{name}={value}" for name, value in CHOSEN.items()]
    train(make_config("max_steps=1", validation, *chosen))
    model = tmp_path / "run/last"
    assert reading(CLIPViPProcessor.from_pretrained(model)) == CHOSEN

    # A run from it, left open; and one of other frames.
    options = ["model.config=null", f"model.name={model}", "model.tokenizer=null"]
    options += [f"data.{name}=null" for name in CHOSEN]
    config = make_config(*options)
    _, processor = build_model(config, None)
    assert reading(processor) == CHOSEN
    _, processor = build_model(make_config(*options, "data.resize=squash"), None)
    assert reading(processor) == {**CHOSEN, "resize": "squash"}
    filled = settled(config, processor)
    assert (filled.data.resize, filled.data.num_frames) == ("squash", 3)
    assert config.data.resize is None

    evaluation.evaluate_checkpoint(model, world / "annotations.jsonl", print_table=False)
    for settings in loaded:  # in the run, and after it
        expected = {name: CHOSEN[name] for name in ("num_frames", "sampling", "resize")}
        assert {name: settings[name] for name in expected} == expected
        assert settings["image_size"] == 32
    assert len(loaded) == 2


def test_a_model_is_evaluated_in_the_precision_that_is_asked_for(make_config, world, tmp_path):
    model, processor = build_model(make_config(), None)
    clips, seen = load_annotations(world / "annotations.jsonl"), set()
    for tower in (model.visual_projection, model.text_projection):
        tower.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    for precision in ("no", "bf16"):
        seen.clear()
        evaluation.evaluate(
            model, clips, processor, num_workers=0, mixed_precision=precision, decoder="pyav"
        )
        assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}

    train(make_config("max_steps=1"))
    cli.evaluate(
        *(str(tmp_path / "run/last"), world / "annotations.jsonl", tmp_path / "figures.json"),
        mixed_precision="bf16",
    )
    assert json.loads((tmp_path / "figures.json").read_text())["mixed_precision"] == "bf16"


def test_figures_are_shown_where_their_file_is_refused(make_config, world, tmp_path, capsys):
    train(make_config("max_steps=1"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluation.evaluate_checkpoint(
            tmp_path / "run/last", world / "annotations.jsonl", out=tmp_path / "file/figures.json"
        )
    assert "text → video" in capsys.readouterr().out


def test_a_new_model_is_read_as_clip_as_far_as_it_reads(make_config):
    options = [f"data.{name}=null" for name in CHOSEN]
    _, processor = build_model(make_config(*options), None)
    assert reading(processor) == {
        "num_frames": 12,
        "text_length": 32,  # its position embeddings
        "paragraph": False,
        "sampling": "uniform",
        "resize": "crop",
    }


def test_a_run_resumes_reading_as_before_the_processor_knew(make_config, world, tmp_path):
    train(make_config("max_steps=1"))
    model = tmp_path / "run/last"
    path = model / "processor_config.json"
    older = json.loads(path.read_text())
    for name in ("text_length", "paragraph", "sampling", "resize"):
        del older[name]
    path.write_text(json.dumps({**older, "num_frames": 12}))
    before = {"num_frames": 3, "text_length": 20, "paragraph": True, "sampling": "fps:4"}
    (model / "reading.json").write_text(json.dumps(before))
    assert reading(CLIPViPProcessor.from_pretrained(model)) == {**before, "resize": "crop"}


@pytest.fixture
def authors(make_config, tmp_path):
    """Options of a run from an authors' file."""
    model, _ = build_model(make_config(), None)
    torch.save(authors_state_dict(model), tmp_path / "authors.pt")
    options = ["model.config=null", f"model.name={tmp_path / 'authors.pt'}", "backend=reference"]
    return [*options, *(f"data.{name}=null" for name in CHOSEN)]


def test_authors_files_are_trained_as_they_were(make_config, authors):
    _, processor = build_model(make_config(*authors), None)
    assert (processor.sampling, processor.resize) == ("authors", "squash")
    assert processor.num_frames == 12 and processor.image_size == 32
    _, processor = build_model(make_config(*authors, "data.resize=crop"), None)
    assert (processor.sampling, processor.resize) == ("authors", "crop")
    with pytest.raises(ConfigError, match=r"authors.pt holds no tokenizer: give model.tokenizer="):
        build_model(make_config(*authors, "model.tokenizer=null"), None)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_tokenizer_that_is_none_is_reported(make_config, name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        build_model(make_config(f"model.tokenizer={name}"), None)


def test_a_dry_run_plans_for_what_the_processor_says(make_config, authors, capsys):
    dry_run(make_config(*authors), processes=1)
    patches, proxies = 4, 2
    assert f"{12 * patches + proxies} of video" in capsys.readouterr().out
