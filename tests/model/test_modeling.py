import json
import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, CLIPConfig, CLIPModel

from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.model.vision import temporal_positions
from clipvip.ops import proxy_attention

LENGTHS = [3, 0, 1, 12, 5]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def frames(count, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("frame_pooling", ["proxy", "mean"])
def test_one_proxy_and_one_frame_is_clip(clip_folder, texts, frame_pooling, backend):
    clip = CLIPModel.from_pretrained(clip_folder)
    model = CLIPViPModel.from_pretrained(
        clip_folder, num_proxies=1, frame_pooling=frame_pooling, attention_backend=backend
    )
    pixels = frames(3)
    image = clip.get_image_features(pixels).pooler_output
    image = F.normalize(image, dim=-1) if frame_pooling == "mean" else image
    torch.testing.assert_close(model.get_video_features(pixels[:, None]), image, atol=1e-5, rtol=0)
    text = clip.get_text_features(**texts).pooler_output
    torch.testing.assert_close(model.get_text_features(**texts), text, atol=1e-5, rtol=0)
    ours, theirs = model(pixel_values=pixels[:, None], **texts), clip(pixel_values=pixels, **texts)
    torch.testing.assert_close(ours.logits_per_video, theirs.logits_per_image)
    torch.testing.assert_close(ours.logits_per_text, theirs.logits_per_text)


@torch.no_grad()
def test_vit_b32_shape_is_clip():
    towers = {f"{tower}_config": {"num_hidden_layers": 2} for tower in ("text", "vision")}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(**towers)).eval()
    model = CLIPViPModel(CLIPViPConfig(**towers, num_proxies=1)).eval()
    fit = model.load_state_dict(clip.state_dict(), strict=False)
    assert fit.missing_keys == ["vision_model.embeddings.temporal_embedding"]
    assert not fit.unexpected_keys
    pixels = frames(2, size=224)
    expected = clip.get_image_features(pixels).pooler_output
    torch.testing.assert_close(
        model.get_video_features(pixels[:, None]), expected, atol=1e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("frame_pooling", ["proxy", "mean"])
def test_ragged_batch_equals_one_by_one(make_model, frame_pooling, backend):
    model = make_model(frame_pooling=frame_pooling, attention_backend=backend)
    pixels = frames(sum(LENGTHS))
    together = model.get_video_features(pixels, offsets(LENGTHS))
    alone = torch.cat([model.get_video_features(video[None]) for video in pixels.split(LENGTHS)])
    torch.testing.assert_close(together, alone)
    assert together.isfinite().all()


@torch.no_grad()
def test_the_order_of_videos_does_not_matter(make_model):
    model = make_model()
    videos = list(frames(sum(LENGTHS)).split(LENGTHS))
    forward = model.get_video_features(torch.cat(videos), offsets(LENGTHS))
    backward = model.get_video_features(torch.cat(videos[::-1]), offsets(LENGTHS[::-1]))
    torch.testing.assert_close(forward, backward.flip(0))


@torch.no_grad()
def test_only_the_temporal_embedding_tells_the_order_of_frames(make_model):
    model = make_model()
    pixels = frames(5)[None]
    assert not torch.allclose(
        model.get_video_features(pixels), model.get_video_features(pixels.flip(1)), atol=0.05
    )
    model.vision_model.embeddings.temporal_embedding.zero_()
    torch.testing.assert_close(
        model.get_video_features(pixels), model.get_video_features(pixels.flip(1))
    )


@torch.no_grad()
def test_patches_see_proxies_and_their_own_frame_only(make_model):
    """In the first layer, patches of frame 1 ignore frame 0; later they see it through proxies."""
    model = make_model().vision_model
    first, changed = frames(2), frames(2)
    changed[0] += 1
    where = offsets([2])
    tokens = [model.pre_layrnorm(model.embeddings(x, where)) for x in (first, changed)]
    proxies, patches = 4, model.patches_per_frame
    for depth, layer in enumerate(model.encoder.layers):
        tokens = [layer(x, where) for x in tokens]
        same = (tokens[0] - tokens[1]).abs().amax(1) == 0
        assert not same[: proxies + patches].any()
        assert same[proxies + patches :].all() == (depth == 0)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_temporal_positions_are_linear_interpolation(rows):
    embedding = torch.randn(rows, 8, requires_grad=True)
    positions = temporal_positions(embedding, offsets(LENGTHS), sum(LENGTHS))
    expected = torch.cat(
        [
            F.interpolate(embedding.T[None], length, mode="linear", align_corners=False)[0].T
            for length in LENGTHS
            if length
        ]
    )
    torch.testing.assert_close(positions, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(positions)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, embedding, weight)[0] for x in (positions, expected)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_temporal_positions_of_full_length_are_exact():
    embedding = torch.randn(12, 8)
    assert torch.equal(temporal_positions(embedding, offsets([12, 12]), 24), embedding.repeat(2, 1))


@torch.no_grad()
def test_mean_pooling_averages_unit_features_of_frames(make_model):
    model = make_model(num_proxies=1, frame_pooling="mean")
    pixels = frames(5)
    pooled = model.get_video_features(pixels, offsets([2, 3]))
    model.config.vision_config.frame_pooling = "proxy"
    each = F.normalize(model.get_video_features(pixels[:, None]), dim=-1)
    torch.testing.assert_close(pooled, torch.stack([each[:2].mean(0), each[2:].mean(0)]))


@torch.no_grad()
def test_other_activations_are_clips(tower_configs):
    towers = {
        **tower_configs,
        "vision_config": {**tower_configs["vision_config"], "hidden_act": "gelu"},
    }
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(**towers)).eval()
    model = CLIPViPModel(CLIPViPConfig(**towers, num_proxies=1)).eval()
    model.load_state_dict(clip.state_dict(), strict=False)
    pixels = frames(2)
    expected = clip.get_image_features(pixels).pooler_output
    torch.testing.assert_close(model.get_video_features(pixels[:, None]), expected)


def losses_gradients(model, texts):
    pixels = frames(6)
    output = model(pixel_values=pixels, frame_offsets=offsets([1, 2, 3]), return_loss=True, **texts)
    output.loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return output.loss.detach(), gradients


def test_every_weight_gets_a_gradient(make_model, texts, backend):
    _, gradients = losses_gradients(make_model(attention_backend=backend).train(), texts)
    silent = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9}
    # A key's bias shifts all logits of a query alike.
    assert all(name.endswith("k_proj.bias") for name in silent)


def test_loss_sums_both_directions(make_model, texts):
    model = make_model()
    output = model(pixel_values=frames(6).unflatten(0, (3, 2)), return_loss=True, **texts)
    own = torch.arange(3)
    expected = F.cross_entropy(output.logits_per_video, own)
    expected = expected + F.cross_entropy(output.logits_per_text, own)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_changes_nothing(make_model, texts):
    model = make_model().train()
    loss, gradients = losses_gradients(model, texts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.vision_model.encoder.layers)
    again, recomputed = losses_gradients(model, texts)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_near_fp32(make_model, texts, dtype, backend):
    model = make_model(attention_backend=backend)
    video = {"pixel_values": frames(6), "frame_offsets": offsets([1, 2, 3])}
    exact = model(**video, **texts)
    model = model.to(dtype)
    video["pixel_values"] = video["pixel_values"].to(dtype)
    near = model(**video, **texts)
    assert near.video_embeds.dtype == dtype
    assert F.cosine_similarity(near.video_embeds.float(), exact.video_embeds).min() > 0.999
    assert F.cosine_similarity(near.text_embeds.float(), exact.text_embeds).min() > 0.999


def test_autocast_trains_near_fp32(make_model, texts):
    model = make_model().train()
    loss, gradients = losses_gradients(model, texts)
    with torch.autocast("cpu", torch.bfloat16):
        near, rough = losses_gradients(model, texts)
    assert abs(near - loss) < 0.05 * loss
    name = "vision_model.encoder.layers.0.self_attn.v_proj.weight"
    assert F.cosine_similarity(rough[name].flatten(), gradients[name].flatten(), 0) > 0.98


def test_compiled_whole_equals_eager(make_model):
    model = make_model()
    model.vision_model.encoder.layers = model.vision_model.encoder.layers[:1]
    where = offsets([1, 2, 3])
    compiled = torch.compile(model.get_video_features, fullgraph=True, backend="aot_eager")
    expected = model.get_video_features(frames(6), where)
    actual = compiled(frames(6), where)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), model.vision_model.parameters()) for x in (actual, expected))
    )


def test_save_and_load_round_trip(make_model, tmp_path):
    model = make_model(num_proxies=3, num_frames=5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (CLIPViPModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is CLIPViPModel
        assert loaded.config.vision_config.num_proxies == 3
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
    changed = AutoModel.from_pretrained(tmp_path, attention_backend="reference")
    assert changed.config.vision_config.attention_backend == "reference"


def test_weights_that_do_not_fit_are_listed(make_model, tmp_path):
    model = make_model()
    weights = model.state_dict()
    weights["visual_projection.bias"] = torch.zeros(24)
    del weights["vision_model.embeddings.added_cls"]
    weights["vision_model.embeddings.temporal_embedding"] = torch.zeros(1, 7, 128)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError) as error:
        CLIPViPModel.from_pretrained(tmp_path)
    for line in (
        "missing: vision_model.embeddings.added_cls",
        "unexpected: visual_projection.bias",
        "shape: vision_model.embeddings.temporal_embedding is [1, 7, 128] in the checkpoint, "
        "[1, 12, 128] in the model",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="shape: "):
        CLIPViPModel.from_pretrained(tmp_path, strict=False)
    with pytest.raises(ValueError, match="missing: "):
        CLIPViPModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    loaded = CLIPViPModel.from_pretrained(tmp_path, strict=False, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.text_projection.weight, model.text_projection.weight)


def test_proxies_start_as_asked(clip_folder):
    class_token = "vision_model.embeddings.class_embedding"
    gentle = CLIPViPModel.from_pretrained(clip_folder).vision_model.embeddings
    noise = gentle.added_cls - gentle.class_embedding
    assert gentle.added_cls.shape == (3, 128), class_token
    assert 0 < noise.std() < 0.05
    assert not torch.equal(noise[0], noise[1])
    assert not gentle.temporal_embedding.any()
    authors = CLIPViPModel.from_pretrained(clip_folder, proxy_init="normal").vision_model.embeddings
    assert 0.8 < authors.added_cls.std() < 1.2


def drawn(source, seed, **options):
    """A model's weights, loaded under a global seed that must neither matter nor change."""
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    model = CLIPViPModel.from_pretrained(source, **options)
    assert torch.equal(torch.get_rng_state(), before)
    return model.state_dict()


@pytest.mark.parametrize("proxy_init", ["class_token", "normal"])
def test_proxies_added_to_clip_are_the_same_at_each_load(clip_folder, proxy_init):
    first, again = (drawn(clip_folder, seed, proxy_init=proxy_init) for seed in (0, 1))
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    half = drawn(clip_folder, 2, proxy_init=proxy_init, dtype=torch.bfloat16)
    name = "vision_model.embeddings.added_cls"
    assert half[name].dtype == torch.bfloat16
    torch.testing.assert_close(half[name].float(), first[name], atol=1e-3, rtol=2**-7)


def test_all_that_a_checkpoint_lacks_is_the_same_at_each_load(make_model, tmp_path):
    model = make_model()
    weights = {"logit_scale": model.logit_scale, "visual_projection.weight": torch.zeros(7, 7)}
    model.save_pretrained(tmp_path, state_dict=weights)
    options = {"strict": False, "ignore_mismatched_sizes": True}
    first, again = (drawn(tmp_path, seed, **options) for seed in (0, 1))
    new = CLIPViPModel(model.config).state_dict()
    for name, weight in first.items():
        assert torch.equal(again[name], weight), name
        if weight.numel() > 500:
            torch.testing.assert_close(weight.std(), new[name].std(), rtol=0.15, atol=0)
            assert not torch.equal(weight, new[name]) or weight.std() == 0, name


def test_new_models_heed_the_global_seed(tower_configs):
    def projection(seed):
        torch.manual_seed(seed)
        return CLIPViPModel(CLIPViPConfig(**tower_configs)).text_projection.weight

    assert torch.equal(projection(0), projection(0))
    assert not torch.equal(projection(0), projection(1))


def with_heads_of(head_dim, tower_configs):
    """Tower configs whose vision tower has two heads of head_dim."""
    return {
        **tower_configs,
        "vision_config": {**tower_configs["vision_config"], "hidden_size": 2 * head_dim},
    }


@pytest.mark.parametrize("head_dim", [4, 8, 72, 76, 104, 128, 136, 144])
def test_heads_that_the_kernels_refuse_are_refused_at_once(tower_configs, head_dim):
    qkv = torch.zeros(5, 3, 2, head_dim)
    try:
        proxy_attention(qkv, offsets([1]), 1, 4)
    except ValueError:
        with pytest.raises(ValueError, match=f'heads of {head_dim}.*attention_backend="reference"'):
            CLIPViPModel(CLIPViPConfig(**with_heads_of(head_dim, tower_configs)))
    else:
        CLIPViPModel(CLIPViPConfig(**with_heads_of(head_dim, tower_configs)))


@pytest.mark.parametrize("head_dim", [72, 88, 104])
def test_heads_of_so400m_g14_and_bigg_train_as_with_the_reference(tower_configs, texts, head_dim):
    towers = with_heads_of(head_dim, tower_configs)
    native, reference = (
        CLIPViPModel(CLIPViPConfig(**towers, attention_backend=backend)).train()
        for backend in ("native", "reference")
    )
    native.load_state_dict(reference.state_dict())
    loss, gradients = losses_gradients(native, texts)
    expected, exact = losses_gradients(reference, texts)
    torch.testing.assert_close(loss, expected)
    for name, gradient in exact.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_clip_with_other_heads_loads_with_the_reference(tower_configs, texts, tmp_path):
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(**with_heads_of(68, tower_configs))).eval()
    clip.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vision_config has heads of 68"):
        CLIPViPModel.from_pretrained(tmp_path)
    options = {"num_proxies": 1, "attention_backend": "reference"}
    pixels = frames(3)
    expected = clip.get_image_features(pixels).pooler_output
    model = CLIPViPModel.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(model.get_video_features(pixels[:, None]), expected)
    assert model(pixel_values=pixels[:, None], return_loss=True, **texts).loss.isfinite()

    written = json.loads((tmp_path / "config.json").read_text())
    written["vision_config"] |= options
    (tmp_path / "config.json").write_text(json.dumps(written))
    model = CLIPViPModel.from_pretrained(tmp_path)
    torch.testing.assert_close(model.get_video_features(pixels[:, None]), expected)


def test_a_new_model_starts_as_clip_does(tower_configs):
    torch.manual_seed(0)
    new, clip = CLIPViPModel(CLIPViPConfig(**tower_configs)), CLIPModel(CLIPConfig(**tower_configs))
    ours = dict(new.named_parameters())
    for name, weight in clip.named_parameters():
        if weight.numel() > 500:
            torch.testing.assert_close(ours[name].std(), weight.std(), rtol=0.1, atol=0)


def test_adding_to_clip_is_logged(clip_folder, monkeypatch):
    said = []
    monkeypatch.setattr("clipvip.model.modeling.logger.warning", said.append)
    CLIPViPModel.from_pretrained(clip_folder)
    assert "added 3 video proxies" in said[0]
    assert "temporal embedding of 12 frames" in said[0]


@pytest.mark.parametrize(
    ("pixels", "where", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0, 2], TypeError, "normalize_frames"),
        (torch.zeros(2, 3, 32, 32), None, ValueError, "frame_offsets"),
        (torch.zeros(1, 2, 3, 32, 32), [0, 2], ValueError, "needs no frame_offsets"),
        (torch.zeros(3, 32, 32), None, ValueError, r"\[3, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32), [0, 3], ValueError, r"\[0, 3\]; expected to rise from 0 to 2"),
        (torch.zeros(2, 3, 32, 32), [0, 2, 1, 2], ValueError, "expected to rise"),
        (torch.zeros(2, 3, 32, 32), [], ValueError, r"expected int32 \[B\+1\]"),
        (torch.zeros(2, 3, 32, 16), [0, 2], ValueError, r"\[3, 32, 16\]; this model reads"),
    ],
)
def test_wrong_input_is_explained(make_model, pixels, where, error, message):
    where = where if where is None else torch.tensor(where, dtype=torch.int32)
    with pytest.raises(error, match=message):
        make_model().get_video_features(pixels, where)


def test_loss_needs_a_text_for_each_video(make_model, texts):
    with pytest.raises(ValueError, match="2 videos and 3 texts"):
        make_model()(pixel_values=frames(2)[:, None], return_loss=True, **texts)


@pytest.mark.parametrize(
    "options",
    [{"num_proxies": 0}, {"proxy_init": "zeros"}, {"frame_pooling": "max"}, {"num_frames": 0}],
)
def test_wrong_options_are_explained(tower_configs, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CLIPViPConfig(**tower_configs, **options)


def test_only_keys_that_may_miss_are_logged_as_a_table(clip_folder, make_model, tmp_path, caplog):
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        CLIPViPModel.from_pretrained(clip_folder)
        assert "MISSING" not in caplog.text
        model = make_model()
        weights = {"logit_scale": model.logit_scale}
        model.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match="missing: "):
            CLIPViPModel.from_pretrained(tmp_path)
        assert "MISSING" not in caplog.text
        CLIPViPModel.from_pretrained(tmp_path, strict=False)
        assert "MISSING" in caplog.text
    finally:
        library.removeHandler(caplog.handler)
