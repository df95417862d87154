import pytest
import torch

from clipvip.model import CLIPViPModel, CLIPViPProcessor, convert
from clipvip.model.conversion import authors_state_dict


def assert_same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, weight in a.state_dict().items():
        assert torch.equal(b.state_dict()[name], weight), name


def test_round_trip_through_the_authors_file(make_model, tmp_path):
    model = make_model(num_proxies=3, num_frames=5)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "authors.pt", to="authors")
    convert(tmp_path / "authors.pt", tmp_path / "back")
    back = CLIPViPModel.from_pretrained(tmp_path / "back")
    assert_same_weights(model, back)
    pixels = torch.randn(1, 2, 3, 32, 32)
    torch.testing.assert_close(model.get_video_features(pixels), back.get_video_features(pixels))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authors.pt", "back", "ours"]


def test_authors_names(make_model):
    names = authors_state_dict(make_model())
    assert all(name.startswith("clipmodel.") for name in names)
    assert names["clipmodel.vision_model.embeddings.added_cls"].shape == (3, 128)
    assert names["clipmodel.vision_model.embeddings.temporal_embedding"].shape == (1, 12, 128)
    assert names["clipmodel.vision_model.embeddings.position_ids"].tolist() == [list(range(17))]
    assert names["clipmodel.text_model.embeddings.position_ids"].tolist() == [list(range(16))]


@pytest.mark.parametrize("nest", ["model", "state_dict", "module."])
def test_nested_and_wrapped_files_load(make_model, tmp_path, nest):
    model = make_model()
    weights = authors_state_dict(model)
    if nest == "module.":
        content = {f"module.{name}": weight for name, weight in weights.items()}
    else:
        content = {nest: weights, "step": 3}
    torch.save(content, tmp_path / "x.pth")
    assert_same_weights(model, CLIPViPModel.from_pretrained(tmp_path / "x.pth"))


def test_configuration_comes_from_the_shapes(make_model, tmp_path):
    model = make_model()
    torch.save(authors_state_dict(model), tmp_path / "x.pt")
    config = CLIPViPModel.from_pretrained(tmp_path / "x.pt", attention_backend="reference").config
    assert config.vision_config.attention_backend == "reference"
    for tower in ("text_config", "vision_config"):
        ours, theirs = getattr(model.config, tower).to_dict(), getattr(config, tower).to_dict()
        for name in ("dtype", "attention_backend"):
            ours.pop(name, None)
            theirs.pop(name, None)
        assert ours == theirs


def test_file_that_does_not_fit_is_explained(make_model, tmp_path):
    weights = authors_state_dict(make_model())
    torch.save({**weights, "clipmodel.extra": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="unexpected: extra"):
        CLIPViPModel.from_pretrained(tmp_path / "more.pt")
    del weights["clipmodel.vision_model.encoder.layers.1.layer_norm1.bias"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(
        ValueError, match=r"missing: vision_model.encoder.layers.1.layer_norm1.bias"
    ):
        CLIPViPModel.from_pretrained(tmp_path / "less.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no CLIP-ViP checkpoint"):
        CLIPViPModel.from_pretrained(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as a PyTorch file"):
        CLIPViPModel.from_pretrained(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError, match=r"absent.pt"):
        CLIPViPModel.from_pretrained(tmp_path / "absent.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        CLIPViPModel.from_pretrained(tmp_path / "list.pt")


def test_clip_becomes_ours_with_its_tokenizer(clip_folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(clip_folder)
    convert(clip_folder, tmp_path / "ours")
    assert CLIPViPModel.from_pretrained(tmp_path / "ours").config.model_type == "clipvip"
    processor = CLIPViPProcessor.from_pretrained(tmp_path / "ours")
    assert processor.tokenizer("a cat").input_ids == tokenizer("a cat").input_ids
    assert processor.image_size == 32


def test_nothing_is_overwritten(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "ours")
    (tmp_path / "x.pt").touch()
    with pytest.raises(FileExistsError, match="choose another"):
        convert(tmp_path / "ours", tmp_path / "x.pt", to="authors")
    with pytest.raises(ValueError, match="expected 'clipvip' or 'authors'"):
        convert(tmp_path / "ours", tmp_path / "y", to="clip")
