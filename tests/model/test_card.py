"""Model cards: they go along with their weights, tell no private path, and keep edits."""

import inspect
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from clipvip.convert import convert
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.card import README, is_edited


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder that stands for a repository on the hub."""
    folder = tmp_path / "hub"

    def upload_folder(self, *, repo_id, folder_path, **options):
        assert repo_id == "user/name"
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)
        return "https://…/commit/1"

    stand_ins = {
        "create_repo": lambda self, repo_id, **options: huggingface_hub.RepoUrl(
            f"https://huggingface.co/user/{repo_id.rpartition('/')[2]}"
        ),
        "file_exists": lambda self, repo_id, name, **options: (folder / name).exists(),
        "hf_hub_download": lambda self, repo_id, name, **options: str(folder / name),
        "upload_folder": upload_folder,
    }
    for name, stand_in in stand_ins.items():
        signature = inspect.signature(getattr(huggingface_hub.HfApi, name))

        def checked(*given, stand_in=stand_in, signature=signature, **options):
            signature.bind(*given, **options)
            return stand_in(*given, **options)

        monkeypatch.setattr(huggingface_hub.HfApi, name, checked)
    return folder


def edit(folder):
    card = folder / README
    card.write_text(card.read_text().replace("library_name", "license: mit\nlibrary_name"))
    return card.read_text()


def test_a_pushed_model_comes_back_with_a_card(make_model, tokenizer, hub):
    model = make_model()
    address = model.push_to_hub("user/name", tags=["dogs"])
    CLIPViPProcessor(tokenizer, image_size=32).push_to_hub("name")
    assert address == "https://…/commit/1"
    again = CLIPViPModel.from_pretrained(hub).state_dict()
    assert all(again[name].equal(weight) for name, weight in model.state_dict().items())
    assert CLIPViPProcessor.from_pretrained(hub).image_size == 32
    data = ModelCard.load(hub / README).data
    assert data.library_name == "clipvip" and data.license is None and data.base_model is None
    assert {"clip-vip", "dogs"} < set(data.tags)


def test_a_card_on_the_hub_is_replaced_unless_it_was_edited(make_model, hub):
    make_model(num_proxies=2).push_to_hub("user/name")
    assert "from 2 video proxies" in (hub / README).read_text()
    make_model(num_proxies=3).save_pretrained(hub.parent / "name", push_to_hub=True, private=True)
    assert "from 3 video proxies" in (hub / README).read_text()
    edited = edit(hub.parent / "name")
    CLIPViPModel.from_pretrained(hub.parent / "name").save_pretrained(
        hub.parent / "name", push_to_hub=True, commit_message="With a license"
    )
    assert (hub / README).read_text() == edited
    make_model(num_proxies=4).push_to_hub("user/name")
    assert (hub / README).read_text() == edited


def test_a_card_goes_along_with_its_weights_alone(make_model, tmp_path):
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    make_model().save_pretrained(first)
    assert not is_edited((first / README).read_text())
    edited = edit(first)
    model = CLIPViPModel.from_pretrained(first)
    model.save_pretrained(same)
    model.save_pretrained(first)
    assert (first / README).read_text() == (same / README).read_text() == edited
    with torch.no_grad():
        model.logit_scale += 1
    model.save_pretrained(other)
    card = (other / README).read_text()
    assert "license: mit" not in card and "Made from first." in card
    assert not is_edited(card)


def test_a_converted_model_names_its_source_and_no_folder(clip_folder, tmp_path):
    convert(clip_folder, tmp_path / "ours")
    card = (tmp_path / "ours" / README).read_text()
    assert f"Made from {clip_folder.name}." in card
    assert str(clip_folder.parent) not in card


def test_the_base_of_a_base_is_named(make_model, tmp_path):
    """A hub name is one; a folder is named if its own card says what it was made from."""
    model = make_model()
    model.config.name_or_path = model.name_or_path = "openai/clip-vit-base-patch32"
    model.save_pretrained(tmp_path / "tuned")
    assert ModelCard.load(tmp_path / "tuned" / README).data.base_model == model.name_or_path
    again = CLIPViPModel.from_pretrained(tmp_path / "tuned")
    again.logit_scale.data += 1
    again.save_pretrained(tmp_path / "more")
    card = ModelCard.load(tmp_path / "more" / README)
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert "Made from tuned." in card.text and str(tmp_path) not in card.text


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"---\nbase_model: [\n---\n",
        b"---\nbase_model: {a: b}\n---\n",
        b"---\n- a\n---\n",
    ],
)
def test_a_card_that_is_none_of_ours_is_left_alone(make_model, tmp_path, content):
    make_model().save_pretrained(tmp_path)
    (tmp_path / README).write_bytes(content)
    model = CLIPViPModel.from_pretrained(tmp_path)
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / README).read_bytes() == content
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path / "more")
    assert ModelCard.load(tmp_path / "more" / README).data.base_model is None
