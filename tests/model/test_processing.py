import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from clipvip.model import CLIPViPProcessor, processing
from clipvip.model.processing import NoTokenizer, normalize_frames, read_settings, save_settings
from clipvip.ops.resize_crop import RESIZES, resize_frames


@pytest.fixture
def processor(tokenizer):
    return CLIPViPProcessor(tokenizer, image_size=32, num_frames=4)


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalisation_is_the_formula():
    pixels = noise(2, 3, 4, 5)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    shape = (3, 1, 1)
    expected = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(normalize_frames(pixels, mean, std), expected)
    with pytest.raises(TypeError, match="expected uint8"):
        normalize_frames(expected)


@pytest.mark.parametrize("resize", RESIZES)
def test_every_form_of_a_video_gives_the_same(processor, resize, tmp_path):
    processor.resize = resize
    clip = noise(2, 40, 61, 3)
    for number, frame in enumerate(clip.numpy()):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    forms = [
        clip,
        clip.numpy(),
        clip.permute(0, 3, 1, 2),
        list(clip),
        [Image.fromarray(frame.numpy()) for frame in clip],
        [tmp_path / "0.png", tmp_path / "1.png"],
    ]
    batch = processor(videos=forms)
    assert batch["frame_offsets"].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert batch["frame_offsets"].dtype == torch.int32
    first = batch["pixel_values"][:2]
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(batch["pixel_values"], first.repeat(6, 1, 1, 1))
    squares = resize_frames(clip.permute(0, 3, 1, 2), 32, resize)
    assert torch.equal(first, normalize_frames(squares))
    assert torch.equal(processor(videos=clip)["pixel_values"], first)


def test_lone_images_and_empty_videos(processor):
    image = Image.new("I;16", (50, 40), 32896)
    grey = normalize_frames(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8))
    assert torch.equal(processor(videos=image)["pixel_values"], grey)
    batch = processor(videos=[image, [], [image, image]])
    assert batch["frame_offsets"].tolist() == [0, 1, 1, 3]
    assert processor(videos=image)["frame_offsets"].tolist() == [0, 1]
    assert processor(videos=[])["pixel_values"].shape == (0, 3, 32, 32)


def test_paths_are_decoded_as_the_processor_says(processor, monkeypatch, tmp_path):
    asked = []

    def read_frames(path, num_frames, **how):
        asked.append((path, num_frames, how))
        return noise(num_frames, 3, how["size"], how["size"])

    monkeypatch.setattr("clipvip.model.processing.read_frames", read_frames)
    processor.resize, processor.sampling = "pad", "fps:2"
    batch = processor(videos=[tmp_path / "a.mp4", "b.mp4"])
    how = {"size": 32, "resize": "pad", "sampling": "fps:2"}
    assert asked == [(tmp_path / "a.mp4", 4, how), (Path("b.mp4"), 4, how)]
    assert batch["frame_offsets"].tolist() == [0, 4, 8]


def test_text_is_unescaped_and_truncated_before_its_end(processor):
    end = processor.tokenizer.eos_token_id
    plain, escaped = (processor(text=text)["input_ids"] for text in ("a & b", "a &amp; b"))
    assert torch.equal(plain, escaped)
    long = processor(text=["a " * 40, "b"], text_length=6)
    assert long["input_ids"].shape == (2, 6)
    assert long["input_ids"][0, -1] == end
    assert long["attention_mask"].sum(1).tolist() == [6, 3]
    assert processor(text="a " * 40)["input_ids"].shape == (1, 16)
    processor.text_length = 9
    assert processor(text="a " * 40)["input_ids"].shape == (1, 9)


READ_OTHERWISE = {
    "image_size": 32,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "num_frames": 4,
    "text_length": 11,
    "paragraph": True,
    "sampling": "authors",
    "resize": "squash",
}


def test_save_and_load_round_trip(tokenizer, tmp_path):
    processor = CLIPViPProcessor(tokenizer, **READ_OTHERWISE)
    processor.save_pretrained(tmp_path)
    for loaded in (
        CLIPViPProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is CLIPViPProcessor
        assert {name: getattr(loaded, name) for name in READ_OTHERWISE} == READ_OTHERWISE
        assert loaded("a cat")["input_ids"].tolist() == processor("a cat")["input_ids"].tolist()


def test_settings_saved_alone_wait_for_a_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model").mkdir()
    save_settings(tmp_path / "model", **READ_OTHERWISE)
    assert read_settings(tmp_path / "model") == READ_OTHERWISE
    with pytest.raises(NoTokenizer, match="model holds no tokenizer; convert it with one"):
        CLIPViPProcessor.from_pretrained(tmp_path / "model")
    whole = CLIPViPProcessor.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    whole.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "model")
    for folder in ("model", "whole"):
        loaded = CLIPViPProcessor.from_pretrained(tmp_path / folder)
        assert {name: getattr(loaded, name) for name in READ_OTHERWISE} == READ_OTHERWISE


@pytest.mark.parametrize(
    "settings",
    [{"image_mean": "abc"}, {"image_std": [0, 1, 1]}, {"resize": ["x"]}, {"image_size": [8]}],
    ids=str,
)
@pytest.mark.parametrize("load", [read_settings, CLIPViPProcessor.from_pretrained])
def test_saved_settings_of_no_processor_are_refused(settings, load, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    save_settings(tmp_path, **{"image_size": 32, **settings})
    (name,) = settings
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.* {name} is .*; expected") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_not_said_is_clips(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    processor = CLIPViPProcessor.from_pretrained(tmp_path)
    assert processor.loading() == {
        "image_size": 224,
        "num_frames": 12,
        "text_length": 16,  # as the tokenizer allows
        "sampling": "uniform",
        "resize": "crop",
    }
    assert processor.paragraph is False


def test_how_older_folders_were_read_is_kept(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    older = {"processor_class": "CLIPViPProcessor", "image_size": 32, "num_frames": 12}
    (tmp_path / "processor_config.json").write_text(json.dumps(older))
    reading = {"num_frames": 5, "text_length": 9, "paragraph": True, "sampling": "fps:2"}
    (tmp_path / "reading.json").write_text(json.dumps(reading))
    processor = CLIPViPProcessor.from_pretrained(tmp_path)
    assert {name: getattr(processor, name) for name in reading} == reading
    assert (processor.image_size, processor.resize) == (32, "crop")
    processor.num_frames = 7
    processor.save_pretrained(tmp_path)  # newer than reading.json, whose time is over
    assert CLIPViPProcessor.from_pretrained(tmp_path).num_frames == 7


@pytest.mark.parametrize("crop", [48, {"height": 48, "width": 48}])
@pytest.mark.parametrize("nested", [False, True])
def test_plain_clip_folder_loads(tokenizer, tmp_path, crop, nested):
    tokenizer.save_pretrained(tmp_path)
    settings = {"crop_size": crop, "image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 3}
    if nested:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = CLIPViPProcessor.from_pretrained(tmp_path)
    assert processor.image_size == 48
    assert processor.image_mean == [0.5] * 3
    assert processor.image_std == [0.4] * 3
    assert processor.resize == "crop"


@pytest.mark.parametrize(
    ("settings", "resize", "size", "said"),
    [
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}, "crop", 48, ""),
        ({"size": 48, "crop_size": 48, "do_center_crop": True}, "crop", 48, ""),
        ({"size": {"shortest_edge": 48}}, "crop", 48, "nearest"),
        ({"size": {"shortest_edge": 64}, "crop_size": 48}, "crop", 48, "nearest"),
        ({"size": {"height": 48, "width": 48}, "do_center_crop": False}, "squash", 48, "antialias"),
        ({"size": {"height": 48, "width": 48}, "crop_size": 48}, "squash", 48, "antialias"),
    ],
)
def test_other_clips_are_read_as_nearly_as_can_be(
    settings, resize, size, said, tokenizer, tmp_path, monkeypatch
):
    warnings = []
    monkeypatch.setattr(processing.logger, "warning", warnings.append)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    processor = CLIPViPProcessor.from_pretrained(tmp_path)
    assert (processor.resize, processor.image_size) == (resize, size)
    assert said in " ".join(warnings) if said else not warnings


@pytest.mark.parametrize(("fill", "said"), [(0, False), ([0, 0, 0], False), (127, True)], ids=str)
def test_only_frames_padded_with_black_are_read_alike(fill, said, caplog):
    chosen = {"resize_mode": "longest", "fill_color": fill}
    assert processing._settings_of_open_clip(chosen, "it") == {"resize": "pad"}
    assert (f"it pads frames with fill_color={fill}" in caplog.text) == said
    with pytest.raises(ValueError, match=r"it has resize_mode \['x'\]; expected one of shortest"):
        processing._settings_of_open_clip({"resize_mode": ["x"]}, "it")


def test_wrong_input_is_explained(processor, tmp_path):
    with pytest.raises(NoTokenizer, match="holds no tokenizer"):
        CLIPViPProcessor.from_pretrained(tmp_path)
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match=r"x\.pt is empty"):
        CLIPViPProcessor.from_pretrained(tmp_path / "x.pt")
    for wrong in ({"resize": "fit"}, {"sampling": "best"}):
        with pytest.raises(ValueError, match="expected"):
            CLIPViPProcessor(processor.tokenizer, **wrong)
    with pytest.raises(ValueError, match="neither text nor videos"):
        processor()
    with pytest.raises(TypeError, match="expected uint8"):
        processor(videos=[torch.zeros(1, 3, 32, 32)])
    with pytest.raises(ValueError, match=r"\[1, 4, 32, 32\]"):
        processor(videos=[torch.zeros(1, 4, 32, 32, dtype=torch.uint8)])
