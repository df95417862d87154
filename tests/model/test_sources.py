"""How a model that is not there is told."""

import copy
import os
import shutil
from itertools import product

import huggingface_hub.constants
import pytest

from clipvip.model import CLIPViPModel, convert, load_for_embedding

LOADS = {
    "from_pretrained": CLIPViPModel.from_pretrained,
    "load_for_embedding": load_for_embedding,
    "convert": lambda source: convert(source, "converted"),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/absent/model", "the model is '/absent/model', which does not exist; expected"),
        ("absent/model", "the model is 'absent/model', which does not exist here, nor could it"),
        ("../some/absent/model", "the model is '../some/absent/model', which does not exist; "),
        ("absent.pt", "the model is 'absent.pt', which does not exist; expected"),
        (".", "the model is '.', a folder without config.json; expected"),
        (" ", "the model is empty; expected the folder of a model, an authors' .pt file"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_one_line(
    load, source, message, monkeypatch, tmp_path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load(source)
    said = str(error.value)
    assert said.startswith(message) and "such as openai/clip-vit-base-patch32" in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [*product(FILES, (b"", b"{", b"\xff" * 64)), ("config.json", b"[]")],
)
def test_a_damaged_model_is_told_in_one_line(name, content, clip_folder, tokenizer, tmp_path):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        load_for_embedding(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"size": "big"}', '{"crop_size": [8, 8]}'])
def test_a_damaged_image_processor_is_told_in_one_line(content, clip_folder, tokenizer, tmp_path):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=tmp_path.name):
        load_for_embedding(tmp_path)


def test_more_tokens_than_the_model_knows_are_refused(clip_folder, tokenizer, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["one", "more"])
    larger.save_pretrained(tmp_path / "larger")
    larger.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model \d+"):
        load_for_embedding(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model \d+"):
        convert(clip_folder, tmp_path / "ours", tokenizer=tmp_path / "larger")
    assert not (tmp_path / "ours").exists()


def test_names_of_models_are_utf8(clip_folder, tokenizer, tmp_path):
    named = tmp_path / os.fsdecode(b"caf\xe9")
    for act in (
        lambda: load_for_embedding(named),
        lambda: CLIPViPModel.from_pretrained(named),
        lambda: convert(clip_folder, named),
    ):
        with pytest.raises(ValueError, match=r"caf.*a name that is not UTF-8"):
            act()
    assert not list(tmp_path.iterdir())


def test_a_subfolder_is_looked_for_where_it_is(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "inner")
    loaded = CLIPViPModel.from_pretrained(tmp_path, subfolder="inner")
    assert loaded.config.projection_dim == model.config.projection_dim
    with pytest.raises(FileNotFoundError, match=r"a folder without config\.json"):
        CLIPViPModel.from_pretrained(tmp_path)
