"""Properties of a model loaded to embed with."""

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel

from clipvip.data.annotations import Clip
from clipvip.embedding import (
    autocast,
    embed_clips,
    embed_files,
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


def test_a_device_that_computes_in_bf16_embeds_in_it(monkeypatch):
    on_gpu, on_cpu = (SimpleNamespace(device=where, dtype=torch.float32) for where in (CUDA, CPU))
    capability = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    for capability[:], chosen in (([(9, 0)], "bf16"), ([(8, 0)], "bf16"), ([(7, 5)], "no")):
        assert precision_on(on_gpu, "auto") == chosen
        assert precision_on(on_gpu, "no") == "no" and precision_on(on_gpu, "bf16") == "bf16"
    for best, chosen in (("avx512bf16", "bf16"), ("avx512", "no"), ("avx2", "no")):
        core = SimpleNamespace(cpu_capability=lambda best=best: best)
        monkeypatch.setattr("clipvip.ops._native.module", lambda core=core: core)
        assert precision_on(on_cpu, "auto") == chosen
        assert precision_on(on_cpu, "no") == "no" and precision_on(on_cpu, "bf16") == "bf16"
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
    for precision in ("no", "bf16"):
        with autocast(model, precision):
            assert text_features(model, *texts.values()).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A video of several windows, an image, a missing file, and a short video."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 32, 48, 3), dtype=np.uint8)
    for name, count in (("long.mp4", 60), ("short.mkv", 15)):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("libx264", rate=25, options={"g": "10"})
            stream.width, stream.height = 48, 32
            for pixels in noise[:count]:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            out.mux(stream.encode())
    Image.fromarray(noise[0]).save(tmp_path / "image.png")
    return [tmp_path / name for name in ("long.mp4", "image.png", "none.mp4", "short.mkv")]


OPTIONS = {"window": 0.8, "stride": 0.4, "scenes": False, "batch_size": 3, "num_workers": 0}


def embedded(model, processor, given, **options):
    bad_files, counted = [], []
    options = {**OPTIONS, "decoder": "pyav", "on_moments": counted.append, **options}
    found = list(embed_files(model, processor, given, bad_files, **options))
    assert sum(counted) == sum(len(file.spans) for file in found)
    return found, bad_files


@torch.no_grad()
@pytest.mark.parametrize("as_clips", [False, True])
def test_a_moment_has_the_feature_of_a_clip(as_clips, make_model, tokenizer, files, monkeypatch):
    """Whether windows are read together, or as clips by their own decoder."""
    model, processor = make_model(), CLIPViPProcessor(tokenizer, image_size=32, num_frames=3)
    if as_clips:  # as where DALI decodes, here by PyAV
        monkeypatch.setattr("clipvip.embedding.start_engine", lambda decoder: decoder)
    found, bad_files = embedded(model, processor, [(path, None) for path in files])
    assert [file.place for file in found] == [0, 1, 3]
    windows = [(0, 0.8), (0.4, 1.2), (0.8, 1.6), (1.2, 2.0), (1.6, 2.4)]
    assert [file.spans for file in found] == [windows, [(None, None)], [(None, None)]]
    assert [file.duration for file in found] == pytest.approx([2.4, 0, 0.6], abs=0.01)
    assert [bad.path for bad in bad_files] == [str(files[2])]
    for file in found:
        clips = [Clip(files[file.place], *span) for span in file.spans]
        options = {"batch_size": 1, "num_workers": 0, "decoder": "pyav"}
        each = embed_clips(model, processor, clips, [], **options)
        wanted = torch.cat([torch.stack([*features.values()]) for features in each])
        torch.testing.assert_close(file.vectors, wanted, atol=1e-5, rtol=0)
        assert file.vectors.dtype == torch.float32 and file.vectors.device.type == "cpu"
        if len(clips) > 1:  # the property would be empty if all moments looked alike
            assert (wanted[0] - wanted[1]).abs().max() > 1e-3


@torch.no_grad()
def test_files_are_given_one_after_the_other_while_others_are_read(make_model, tokenizer, files):
    model, processor = make_model(), CLIPViPProcessor(tokenizer, image_size=32, num_frames=3)
    given = [(files[3], None)] * 4 + [(files[0], [(0.5, 1.0)])]
    told = []
    options = {**OPTIONS, "decoder": "pyav", "batch_size": 2, "on_moments": told.append}
    coming = embed_files(model, processor, given, [], **options)
    assert next(coming).place == 0 and told == [2]
    assert [file.place for file in coming] == [1, 2, 3, 4] and told == [2, 2, 1]
    assert not list(embed_files(model, processor, [], [], **options))
    with pytest.raises(ValueError, match="window is 0; expected seconds"):
        next(embed_files(model, processor, given, [], **{**options, "window": 0}))
