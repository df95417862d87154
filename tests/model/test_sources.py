"""How a model that is not there is told."""

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


def test_a_subfolder_is_looked_for_where_it_is(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "inner")
    loaded = CLIPViPModel.from_pretrained(tmp_path, subfolder="inner")
    assert loaded.config.projection_dim == model.config.projection_dim
    with pytest.raises(FileNotFoundError, match=r"a folder without config\.json"):
        CLIPViPModel.from_pretrained(tmp_path)
