"""Properties of a model loaded to embed with."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from clipvip.embedding import (
    autocast,
    embed_texts,
    load_for_embedding,
    needed_mask,
    precision_on,
    text_features,
)
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


def test_proxies_that_were_never_trained_are_told(plain, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("clipvip.embedding.logger.warning", said.append)
    load_for_embedding(plain)
    model = CLIPViPModel.from_pretrained(plain)
    for trained in (False, True):
        if trained:
            model.vision_model.embeddings.temporal_embedding.data[0, 0, 0] = 1e-3
        model.save_pretrained(plain)
        load_for_embedding(plain)
        assert len(said) == 1 and "never trained" in said[0]


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


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
END = 2  # what OpenAI's models say for the highest token of a text


def ends_with(model, token):
    """The model, whose texts end with this token; None for its own."""
    config = model.text_model.config
    config.eos_token_id = model.text_model.eos_token_id = token or config.eos_token_id
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("end", [None, END])
def test_padding_behind_a_text_is_masked_on_a_gpu_only_by_order(make_model, texts, end, attention):
    """Neither features nor gradients depend on that padding, whatever it holds."""
    model = ends_with(make_model(attn_implementation=attention), end)
    config = model.text_model.config
    assert config._attn_implementation == attention
    ids, mask = texts["input_ids"], texts["attention_mask"]
    assert needed_mask(config, ids, mask, CUDA) is None
    assert needed_mask(config, ids, mask, CPU) is mask
    assert needed_mask(config, ids, torch.ones_like(mask), CPU) is None

    def found(ids, mask):
        model.zero_grad()
        features = text_features(model, ids, mask)
        features[:, 0].sum().backward()
        return features, *(p.grad for p in model.text_model.encoder.parameters())

    other = ids.where(mask.bool(), 5)
    wanted = found(ids, mask)
    for given in ((ids, None), (other, None), (other, mask)):
        torch.testing.assert_close(found(*given), wanted, rtol=1e-4, atol=1e-6)


def test_a_mask_that_a_feature_depends_on_is_kept(make_model, texts):
    model = make_model()
    config, (ids, mask) = model.text_model.config, texts.values()
    left = ids.flip(-1), mask.flip(-1)
    for end in (config.eos_token_id, END):
        ends_with(model, end)
        assert needed_mask(config, *left, CUDA) is left[1]
        assert needed_mask(config, ids, torch.ones_like(mask), CUDA) is None
    beyond = ids.where(mask.bool(), int(ids.max()) + 1)  # padding is the highest token
    assert needed_mask(config, beyond, mask, CUDA) is mask
    config.is_causal = False
    assert needed_mask(config, ids, mask, CUDA) is mask


def test_the_mask_is_what_lets_padding_before_a_text_be_ignored(make_model, texts):
    """Or a feature would not depend on it, and there would be nothing to keep."""
    model, (ids, mask) = make_model(), texts.values()
    ids, mask = ids.flip(-1), mask.flip(-1)
    assert not torch.allclose(text_features(model, ids, mask), text_features(model, ids, None))


@torch.no_grad()
def test_texts_are_embedded_on_a_cpu_as_the_model_embeds_them(make_model, tokenizer):
    """To the bit, padded or not."""
    model, processor = make_model(), CLIPViPProcessor(tokenizer, image_size=32)
    texts = ["a dog", "a cat runs", "it", "so"]
    found = embed_texts(model, processor, texts, batch_size=2)
    for start in (0, 2):
        inputs = processor(text=texts[start : start + 2])
        wanted = F.normalize(model.get_text_features(**inputs), dim=-1)
        assert found[start : start + 2].equal(wanted)
        assert inputs["attention_mask"].all() == (start == 2)


def test_a_gpu_that_computes_in_bf16_embeds_in_it(monkeypatch):
    on_gpu, on_cpu = (SimpleNamespace(device=where, dtype=torch.float32) for where in (CUDA, CPU))
    capability = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    for capability[:], chosen in (([(9, 0)], "bf16"), ([(8, 0)], "bf16"), ([(7, 5)], "no")):
        assert precision_on(on_gpu, "auto") == chosen
        assert precision_on(on_gpu, "no") == "no" and precision_on(on_gpu, "bf16") == "bf16"
    assert precision_on(on_cpu, "auto") == "no" and precision_on(on_cpu, "bf16") == "bf16"
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; expected one of auto, bf16"):
        precision_on(on_cpu, "fp16")


@torch.no_grad()
def test_weights_in_fp16_are_not_mixed_with_bf16(make_model, texts, monkeypatch):
    """PyTorch's autocast fails on them, or rounds them to fewer digits."""
    model = make_model().half()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = SimpleNamespace(device=CUDA, dtype=model.dtype)
    assert precision_on(on_gpu, "auto") == precision_on(on_gpu, "no") == "no"
    for given in (model, on_gpu):
        with pytest.raises(ValueError, match="weights are fp16; use no"):
            autocast(given, "bf16")
    with autocast(model, "auto"):
        assert text_features(model, *texts.values()).isfinite().all()


@torch.no_grad()
def test_a_model_computes_in_bf16_where_that_is_asked_for(make_model, texts):
    model, seen = make_model(), []
    model.text_projection.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    for precision in ("auto", "no", "bf16"):
        with autocast(model, precision):
            assert text_features(model, *texts.values()).dtype == torch.float32
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
