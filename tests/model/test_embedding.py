"""Properties of a model loaded to embed with."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPModel, CLIPViPProcessor


@pytest.fixture
def plain(clip_folder, tokenizer, tmp_path):
    """A plain CLIP with its tokenizer."""
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    CLIPViPProcessor(tokenizer, image_size=32).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def logged(monkeypatch):
    said = []
    monkeypatch.setattr("clipvip.model.modeling.logger.warning", said.append)
    return said


@torch.no_grad()
def test_plain_clip_embeds_a_video_as_the_mean_of_its_frames(plain, logged):
    model, processor = load_for_embedding(plain)
    assert not model.training and processor.image_size == 32
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    each = F.normalize(CLIPModel.from_pretrained(plain).get_image_features(pixels)[1], dim=-1)
    torch.testing.assert_close(
        model.get_video_features(pixels[None]), each.mean(0, keepdim=True), atol=1e-5, rtol=0
    )
    assert len(logged) == 1 and "the mean of its frames'" in logged[0] and str(plain) in logged[0]


def test_explicit_options_hold(plain, logged):
    model, _ = load_for_embedding(plain, frame_pooling="proxy")
    trained = CLIPViPModel.from_pretrained(plain)
    for name, weight in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.config.vision_config.frame_pooling == "proxy"
    assert ["added 3 video proxies" in line for line in logged] == [True, True]

    written = json.loads((plain / "config.json").read_text())
    written["vision_config"]["frame_pooling"] = "proxy"
    (plain / "config.json").write_text(json.dumps(written))
    assert load_for_embedding(plain)[0].config.vision_config.num_proxies == 4


@pytest.mark.parametrize("frame_pooling", ["proxy", "mean"])
def test_a_video_model_stays_as_it_was_saved(plain, logged, frame_pooling, tmp_path):
    CLIPViPModel.from_pretrained(plain, frame_pooling=frame_pooling).save_pretrained(plain)
    logged.clear()
    vision = load_for_embedding(plain)[0].config.vision_config
    assert (vision.frame_pooling, vision.num_proxies) == (frame_pooling, 4)
    assert not logged
