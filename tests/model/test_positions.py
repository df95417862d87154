"""Models of other frame sizes and text lengths, whose positions are interpolated."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

from clipvip import cli
from clipvip.convert import convert
from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.positions import interpolate_patches, interpolate_texts

PATCHES = "vision_model.embeddings.position_embedding.weight"
TEXTS = "text_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize(("old", "new"), [(7, 10), (10, 7), (14, 24), (4, 5), (5, 1)])
def test_positions_of_patches_are_those_of_open_clip(open_clip, old, new):
    positions = torch.randn(1 + old**2, 12)
    weights = {"visual.positional_embedding": positions}
    model = SimpleNamespace(visual=SimpleNamespace(grid_size=(new, new)))
    open_clip.model.resize_pos_embed(weights, model)
    expected = weights["visual.positional_embedding"]
    actual = interpolate_patches(positions, new)
    assert actual.shape == (1 + new**2, 12)
    assert torch.equal(actual[0], positions[0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(77, 154), (77, 248), (154, 77), (16, 15)])
def test_positions_of_texts_are_those_of_open_clip(open_clip, old, new):
    positions = torch.randn(old, 12)
    weights = {"positional_embedding": positions}
    model = SimpleNamespace(positional_embedding=torch.empty(new, 12))
    open_clip.model.resize_text_pos_embed(weights, model)
    actual = interpolate_texts(positions, new)
    torch.testing.assert_close(actual, weights["positional_embedding"], rtol=0, atol=1e-6)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("clipvip.model.positions.logger.warning", lines.append)
    return lines


@pytest.fixture(params=["clip", "ours", "authors.pt"])
def source(request, clip_folder, make_model, tmp_path):
    if request.param == "clip":
        return clip_folder
    ours = tmp_path / "ours"
    make_model().save_pretrained(ours)
    if request.param == "authors.pt":
        convert(ours, tmp_path / request.param, to="authors")
    return tmp_path / request.param


def sizes_known_to(model):
    """Every number that a module of a model keeps, by its name."""
    known = {}
    for name, module in model.named_modules():
        kept = {**vars(module), **vars(getattr(module, "config", SimpleNamespace()))}
        known |= {f"{name}.{key}": value for key, value in kept.items() if type(value) is int}
    return known


@pytest.mark.parametrize(("size", "length"), [(40, 24), (24, 9)])
def test_a_resized_model_is_one_of_that_size(source, size, length, texts, said, tmp_path):
    """It knows its sizes everywhere, computes as a model built with them, and is saved so."""
    before = CLIPViPModel.from_pretrained(source)
    assert not said
    model = CLIPViPModel.from_pretrained(source, image_size=size, text_length=length).eval()
    side = size // 8
    assert len(said) == 2 and all(str(source.name) in line for line in said)
    assert f"positions of patches interpolated from 4 × 4 to {side} × {side}" in said[0]
    assert f"positions of texts interpolated from 16 to {length}" in said[1]
    assert model.config.vision_config.image_size == size
    assert model.config.text_config.max_position_embeddings == length

    weights, old = model.state_dict(), before.state_dict()
    assert torch.equal(weights[PATCHES], interpolate_patches(old[PATCHES], side))
    assert torch.equal(weights[TEXTS], interpolate_texts(old[TEXTS], length))
    assert weights.keys() == old.keys()
    for name in weights.keys() - {PATCHES, TEXTS}:
        assert torch.equal(weights[name], old[name]), name

    model.save_pretrained(tmp_path / "saved")
    said.clear()
    loaded = CLIPViPModel.from_pretrained(tmp_path / "saved").eval()
    assert not said
    assert sizes_known_to(loaded) == sizes_known_to(model)
    buffers = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    pixels, long = torch.randn(2, 3, 3, size, size), torch.full((1, length), 3)
    for this, other in (
        (model.get_video_features(pixels), loaded.get_video_features(pixels)),
        (model.get_text_features(**texts), loaded.get_text_features(**texts)),
        (model.get_text_features(long), loaded.get_text_features(long)),
    ):
        torch.testing.assert_close(this, other)
    model.get_video_features(pixels).sum().backward()
    assert model.vision_model.embeddings.position_embedding.weight.grad.all(1).any()


def test_sizes_that_stay_change_nothing(clip_folder, said):
    same = CLIPViPModel.from_pretrained(clip_folder, image_size=32, text_length=16)
    assert not said
    for name, weight in CLIPViPModel.from_pretrained(clip_folder).state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name


def test_weights_keep_their_dtype(clip_folder):
    half = CLIPViPModel.from_pretrained(clip_folder, image_size=40, dtype=torch.bfloat16)
    whole = CLIPViPModel.from_pretrained(clip_folder, image_size=40)
    assert half.state_dict()[PATCHES].dtype == torch.bfloat16
    torch.testing.assert_close(
        half.state_dict()[PATCHES].float(), whole.state_dict()[PATCHES], rtol=2**-7, atol=1e-4
    )


def test_the_auto_classes_take_sizes_too(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, image_size=40).config.vision_config.image_size == 40


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"image_size": 36},
            "image_size is 36; expected a multiple of 8, the patch size, such as 32",
        ),
        ({"image_size": 0}, "image_size is 0; expected a multiple of 8"),
        ({"image_size": -8}, "image_size is -8; expected a multiple of 8"),
        ({"image_size": 80_000}, "image_size is 80000; expected .*, up to 10000"),
        ({"image_size": "40"}, "image_size is '40'; expected a multiple of 8"),
        ({"text_length": "9"}, "text_length is '9'; expected a number of tokens"),
        ({"image_size": 40.0}, r"image_size is 40\.0; expected"),
        ({"text_length": 1}, "text_length is 1; expected a number of tokens from 2 to 10000"),
        ({"text_length": 10**9}, "text_length is 1000000000; expected"),
    ],
)
def test_sizes_of_no_model_are_refused(clip_folder, option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CLIPViPModel.from_pretrained(clip_folder, **option)
    with pytest.raises(ValueError, match=message):
        convert(clip_folder, tmp_path / "converted", **option)
    assert not list(tmp_path.iterdir())


def test_positions_of_another_number_are_refused_unless_their_size_was_asked_for(
    make_model, tmp_path
):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["image_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shape: vision_model.*position_embedding.*\[17, 128\]"):
        CLIPViPModel.from_pretrained(tmp_path)


def test_the_processor_reads_what_a_resized_model_reads(clip_folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(clip_folder)
    words = "ab " * 40
    for again in range(2):
        source, name = (tmp_path / "ours0", "ours1") if again else (clip_folder, "ours0")
        sizes = (48, 30) if again else (40, 24)
        cli.convert(str(source), tmp_path / name, image_size=sizes[0], text_length=sizes[1])
        processor = CLIPViPProcessor.from_pretrained(tmp_path / name)
        assert (processor.image_size, processor.text_length) == sizes
        assert processor.tokenizer.model_max_length == processor.longest_text == sizes[1]
        model, fitted = load_for_embedding(tmp_path / name)
        assert (fitted.image_size, fitted.text_length) == sizes
        batch = fitted(text=words, videos=torch.zeros(2, 20, 30, 3, dtype=torch.uint8))
        assert batch["input_ids"].shape == (1, sizes[1])
        assert model(**batch).logits_per_text.isfinite().all()

    for source in (clip_folder, tmp_path / "ours0"):
        model, processor = load_for_embedding(source, image_size=48, text_length=32)
        assert (processor.image_size, processor.text_length) == (48, 32)
        batch = processor(text=words, videos=torch.zeros(2, 20, 30, 3, dtype=torch.uint8))
        assert batch["input_ids"].shape == (1, 32)
        assert model(**batch).logits_per_text.isfinite().all()


def test_sizes_wait_for_a_tokenizer(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "before")
    convert(tmp_path / "before", tmp_path / "x.pt", to="authors")
    convert(tmp_path / "x.pt", tmp_path / "ours", image_size=40, text_length=24)
    tokenizer.save_pretrained(tmp_path / "ours")
    _, processor = load_for_embedding(tmp_path / "ours")
    assert (processor.image_size, processor.text_length) == (40, 24)
    convert(tmp_path / "x.pt", tmp_path / "y.pt", to="authors", image_size=40, text_length=24)
    config = CLIPViPModel.from_pretrained(tmp_path / "y.pt").config
    assert config.vision_config.image_size == 40
    assert config.text_config.max_position_embeddings == 24


def test_a_tokenizer_without_a_limit_is_read_up_to_the_model(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    processor = CLIPViPProcessor(tokenizer)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["model_max_length"] = 10**30
    path.write_text(json.dumps(settings))
    model, processor = load_for_embedding(tmp_path)
    assert processor.longest_text == 16
    CLIPViPModel.from_pretrained(tmp_path, text_length=100).save_pretrained(tmp_path)
    model, processor = load_for_embedding(tmp_path)
    assert processor.longest_text == model.config.text_config.max_position_embeddings == 100
