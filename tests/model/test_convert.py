import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from clipvip.convert import convert
from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.checkpoints import read_checkpoint
from clipvip.model.layouts import authors_state_dict
from clipvip.model.processing import READING


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
    with pytest.raises(ValueError, match="no CLIP or CLIP-ViP checkpoint"):
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
    with pytest.raises(ValueError, match="expected 'clipvip', 'clip' or 'authors'"):
        convert(tmp_path / "ours", tmp_path / "y", to="open_clip")
    with pytest.raises(ValueError, match="give the name of a folder, or --to authors"):
        convert(tmp_path / "ours", tmp_path / "y.pt")


def read_by(folder):
    processor = CLIPViPProcessor.from_pretrained(folder)
    return {name: getattr(processor, name) for name in READING}


CLIPS_WAY = {
    "num_frames": 12,
    "text_length": None,
    "paragraph": False,
    "sampling": "uniform",
    "resize": "crop",
}


def test_authors_files_are_read_as_in_their_code(make_model, tokenizer, tmp_path):
    torch.save(authors_state_dict(make_model()), tmp_path / "x.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert(tmp_path / "x.pt", tmp_path / "ours", tokenizer=tmp_path / "tokenizer")
    authors_way = {**CLIPS_WAY, "sampling": "authors", "resize": "squash"}
    assert read_by(tmp_path / "ours") == authors_way
    processor = CLIPViPProcessor.from_pretrained(
        tmp_path / "x.pt", tokenizer=tmp_path / "tokenizer"
    )
    assert {name: getattr(processor, name) for name in READING} == authors_way
    assert processor.image_size == 32


@pytest.mark.parametrize("by", ["the line that is logged", "files put beside it"])
def test_how_videos_are_read_waits_for_a_tokenizer(
    make_model, tokenizer, tmp_path, by, monkeypatch
):
    torch.save(authors_state_dict(make_model()), tmp_path / "x.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    said = []
    monkeypatch.setattr("clipvip.convert.logger.warning", said.append)
    convert(tmp_path / "x.pt", tmp_path / "ours")
    with pytest.raises(OSError, match="holds no tokenizer"):
        CLIPViPProcessor.from_pretrained(tmp_path / "ours")
    if by == "the line that is logged":
        (line,) = said
        assert "\n" not in line and "--tokenizer" in line
        command = line[line.index("CLIPViPProcessor.from_pretrained") :]
        hub = "openai/clip-vit-base-patch32"
        eval(command.replace(hub, str(tmp_path / "tokenizer")), {**globals()})
    else:
        tokenizer.save_pretrained(tmp_path / "ours")
    assert read_by(tmp_path / "ours") == {**CLIPS_WAY, "sampling": "authors", "resize": "squash"}


def test_how_videos_are_read_is_kept(make_model, clip_folder, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(clip_folder)
    convert(clip_folder, tmp_path / "of clip")
    assert read_by(tmp_path / "of clip") == CLIPS_WAY
    chosen = {
        "num_frames": 32,
        "text_length": 9,
        "paragraph": True,
        "sampling": "fps:2",
        "resize": "pad",
    }
    make_model().save_pretrained(tmp_path / "ours")
    CLIPViPProcessor(tokenizer, image_size=32, **chosen).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again")
    assert read_by(tmp_path / "again") == chosen
    said = []
    monkeypatch.setattr("clipvip.convert.logger.warning", said.append)
    convert(tmp_path / "ours", tmp_path / "x.pt", to="authors")
    assert "resize='pad' and sampling='fps:2'" in said[0]


def test_a_tokenizer_that_is_none_leaves_nothing(make_model, tmp_path):
    torch.save(authors_state_dict(make_model()), tmp_path / "x.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty holds no tokenizer"):
        convert(tmp_path / "x.pt", tmp_path / "ours", tokenizer=tmp_path / "empty")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("to", ["clipvip", "authors"])
def test_a_disk_without_room_is_an_os_error_and_nothing_is_left(clip_folder, tmp_path, to):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|could not be written"):
            convert(clip_folder, tmp_path / "converted", to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


def test_a_plain_clip_stays_one(clip_folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(clip_folder)
    settings = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 32}, "crop_size": 32}
    (clip_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(clip_folder, tmp_path / "clip", to="clip")
    written, source = (CLIPModel.from_pretrained(x) for x in (tmp_path / "clip", clip_folder))
    assert_same_weights(source, written)
    assert source.config.to_diff_dict() == written.config.to_diff_dict()
    settings = [
        CLIPViPProcessor.from_pretrained(x).settings() for x in (clip_folder, tmp_path / "clip")
    ]
    assert settings[0] == settings[1] and settings[0]["image_mean"] == [0.1, 0.2, 0.3]
    model, processor = load_for_embedding(tmp_path / "clip")
    assert model.config.vision_config.frame_pooling == "mean"
    assert processor.tokenizer("a cat").input_ids == tokenizer("a cat").input_ids


def test_heads_that_the_kernel_does_not_take_are_converted_for_the_reference(
    make_model, tmp_path, caplog
):
    folder = tmp_path / "heads of 4"
    make_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'heads of 4 .*attention_backend="reference"'):
        CLIPViPModel.from_pretrained(folder)
    convert(folder, tmp_path / "ours")
    (line,) = [r.getMessage() for r in caplog.records if "compiled attention" in r.getMessage()]
    assert "ours says attention_backend='reference'" in line and "\n" not in line
    written = CLIPViPModel.from_pretrained(tmp_path / "ours")
    assert written.config.vision_config.attention_backend == "reference"
    written.get_video_features(torch.zeros(1, 2, 3, 32, 32))


def test_a_file_of_safetensors_is_read_once(make_model, tmp_path, monkeypatch):
    """Its configuration comes from its header."""
    path = tmp_path / "x.safetensors"
    save_file(authors_state_dict(make_model().half()), path)
    whole, shapes = (read_checkpoint(path, device).state_dict for device in ("cpu", "meta"))
    assert [(x, y.shape, y.dtype) for x, y in whole.items()] == [
        (x, y.shape, y.dtype) for x, y in shapes.items()
    ]
    assert all(weight.is_meta for weight in shapes.values())
    read = []

    def load_once(path):
        read.append(path)
        return load_file(path)

    monkeypatch.setattr("clipvip.model.checkpoints.load_file", load_once)
    convert(path, tmp_path / "ours")
    assert read == [path]


def test_formats_that_cannot_hold_a_model_refuse_it(make_model, clip_folder, tmp_path):
    make_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"a video model, and CLIP has no place.* --to clip"):
        convert(tmp_path / "ours", tmp_path / "x", to="clip")
    clip = CLIPModel.from_pretrained(clip_folder)
    clip.config.vision_config.hidden_act = "gelu"
    clip.save_pretrained(tmp_path / "gelu")
    with pytest.raises(ValueError, match="activation gelu/quick_gelu and heads of 64, which the"):
        convert(tmp_path / "gelu", tmp_path / "x.pt", to="authors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gelu", "ours"]
