import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from clipvip.model import CLIPViPProcessor
from clipvip.model.processing import normalize_frames, resize_and_crop


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


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (32, 32), (20, 31)])
def test_resizing_is_near_pillow(shape):
    """Against Pillow's bicubic, which CLIP was trained with, on a smooth picture."""
    y, x = np.mgrid[: shape[0], : shape[1]] / 8
    picture = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) * 100 + 128
    picture = picture.astype(np.uint8)
    short = min(shape)
    scaled = Image.fromarray(picture).resize(
        (shape[1] * 32 // short, shape[0] * 32 // short), Image.Resampling.BICUBIC
    )
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = np.array(scaled.crop((left, top, left + 32, top + 32)))
    ours = resize_and_crop(torch.from_numpy(picture).permute(2, 0, 1)[None], 32)[0]
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_every_form_of_a_video_gives_the_same(processor):
    clip = noise(2, 40, 60, 3)
    forms = [
        clip,
        clip.numpy(),
        clip.permute(0, 3, 1, 2),
        list(clip),
        [Image.fromarray(frame.numpy()) for frame in clip],
    ]
    batch = processor(videos=forms)
    assert batch["frame_offsets"].tolist() == [0, 2, 4, 6, 8, 10]
    assert batch["frame_offsets"].dtype == torch.int32
    first = batch["pixel_values"][:2]
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(batch["pixel_values"], first.repeat(5, 1, 1, 1))
    assert torch.equal(processor(videos=clip)["pixel_values"], first)


def test_lone_images_and_empty_videos(processor):
    image = Image.new("L", (50, 40))
    batch = processor(videos=[image, [], [image, image]])
    assert batch["frame_offsets"].tolist() == [0, 1, 1, 3]
    assert processor(videos=image)["frame_offsets"].tolist() == [0, 1]
    assert processor(videos=[])["pixel_values"].shape == (0, 3, 32, 32)


def test_paths_are_decoded(processor, monkeypatch, tmp_path):
    decode = pytest.importorskip("clipvip.data.decode")
    asked = []

    def read_frames(path, num_frames, *, size):
        asked.append((path, num_frames, size))
        return noise(num_frames, 3, size, size)

    monkeypatch.setattr(decode, "read_frames", read_frames)
    batch = processor(videos=[tmp_path / "a.mp4", "b.mp4"])
    assert asked == [(tmp_path / "a.mp4", 4, 32), (Path("b.mp4"), 4, 32)]
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


def test_save_and_load_round_trip(processor, tmp_path):
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path)
    for loaded in (
        CLIPViPProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is CLIPViPProcessor
        assert (loaded.image_size, loaded.num_frames) == (32, 4)
        assert loaded.image_mean == [0.1, 0.2, 0.3]
        assert loaded("a cat")["input_ids"].tolist() == processor("a cat")["input_ids"].tolist()


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


def test_wrong_input_is_explained(processor, tmp_path):
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        CLIPViPProcessor.from_pretrained(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="neither text nor videos"):
        processor()
    with pytest.raises(TypeError, match="expected uint8"):
        processor(videos=[torch.zeros(1, 3, 32, 32)])
    with pytest.raises(ValueError, match=r"\[1, 4, 32, 32\]"):
        processor(videos=[torch.zeros(1, 4, 32, 32, dtype=torch.uint8)])
