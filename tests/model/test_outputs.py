"""Properties of hidden states, attentions and tokens that a model returns."""

import pytest
import torch
from transformers import CLIPModel

from clipvip.model import CLIPViPModel

LENGTHS = [3, 0, 1, 5]
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def frames(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def batch(lengths=LENGTHS):
    return frames(sum(lengths)), offsets(lengths)


@torch.no_grad()
def test_one_proxy_and_one_frame_give_what_clip_gives(clip_folder, texts, backend):
    options = {"attn_implementation": "eager"}
    clip = CLIPModel.from_pretrained(clip_folder, **options)
    options |= {"num_proxies": 1, "attention_backend": backend}
    model = CLIPViPModel.from_pretrained(clip_folder, **options)
    theirs = clip(pixel_values=frames(3), **texts, **EVERYTHING)
    ours = model(pixel_values=frames(3)[:, None], **texts, **EVERYTHING)
    near = {"atol": 1e-5, "rtol": 0}
    for tower in ("vision_model_output", "text_model_output"):
        wanted, found = theirs[tower], ours[tower]
        assert wanted.keys() == found.keys()
        for name in ("hidden_states", "attentions"):
            assert type(found[name]) is tuple and len(found[name]) == len(wanted[name])
            for x, y in zip(found[name], wanted[name], strict=True):
                torch.testing.assert_close(x.view_as(y), y, **near)
        assert found.hidden_states[-1].shape == found.last_hidden_state.shape
    assert ours.vision_model_output.hidden_states[-1] is ours.vision_model_output.last_hidden_state

    as_tuple = model(pixel_values=frames(3)[:, None], **texts, **EVERYTHING, return_dict=False)
    assert [type(part) for part in as_tuple] == [torch.Tensor] * 4 + [tuple] * 2
    for tuples, tower in zip(
        as_tuple[4:], (ours.text_model_output, ours.vision_model_output), strict=True
    ):
        assert len(tuples) == 4 and torch.equal(tuples[2][1], tower.hidden_states[1])


@torch.no_grad()
@pytest.mark.parametrize("frame_pooling", ["proxy", "mean"])
def test_asking_for_more_changes_nothing_else(make_model, texts, frame_pooling):
    model = make_model(frame_pooling=frame_pooling)
    pixels, where = batch([3, 1, 2])
    plain = model(pixel_values=pixels, frame_offsets=where, **texts)
    whole = model(pixel_values=pixels, frame_offsets=where, **texts, **EVERYTHING)
    for name in ("logits_per_video", "video_embeds", "text_embeds"):
        assert torch.equal(plain[name], whole[name])
    tower = plain.vision_model_output
    assert tower.keys() == {"last_hidden_state", "pooler_output"}
    assert torch.equal(tower.last_hidden_state, whole.vision_model_output.last_hidden_state)
    seen = 3 if frame_pooling == "proxy" else 6  # videos that the tower sees
    assert len(tower.pooler_output) == len(whole.vision_model_output.attentions[0]) == seen


@torch.no_grad()
def test_outputs_of_a_ragged_batch_are_those_of_its_videos(make_model, backend):
    model = make_model(attention_backend=backend).vision_model
    pixels, where = batch()
    together = model(pixels, where, **EVERYTHING)
    alone = [model(x, offsets([len(x)]), **EVERYTHING) for x in pixels.split(LENGTHS)]
    for layer, states in enumerate(together.hidden_states):
        expected = torch.cat([video.hidden_states[layer] for video in alone])
        torch.testing.assert_close(states, expected)
    for layer, weights in enumerate(together.attentions):
        assert weights.shape == (4, 2, 4 + 5 * 16, 4 + 5 * 16)
        for video, output in enumerate(alone):
            own = output.attentions[layer][0]
            size = own.shape[-1]
            torch.testing.assert_close(weights[video, :, :size, :size], own)
            assert not weights[video, :, size:].any() and not weights[video, :, :, size:].any()


def test_hidden_states_and_attentions_carry_gradients(make_model):
    model = make_model().vision_model
    output = model(*batch(), **EVERYTHING)
    tokens = model.embeddings.patch_embedding.weight
    for kind in (output.hidden_states, output.attentions):
        for each in kind:
            (gradient,) = torch.autograd.grad(each.pow(2).sum(), tokens, retain_graph=True)
            assert gradient.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_attentions_of_checkpointed_layers(make_model):
    model = make_model().vision_model.train()
    wanted = model(*batch(), **EVERYTHING).attentions[1]
    model.gradient_checkpointing_enable()
    found = model(*batch(), **EVERYTHING).attentions[1]
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found.pow(2).sum(), model.embeddings.class_embedding)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_the_configuration_may_ask_too(clip_folder, texts):
    options = {"output_hidden_states": True, "attn_implementation": "eager"}
    model = CLIPViPModel.from_pretrained(clip_folder, **options)
    given = {"pixel_values": frames(3)[:, None], **texts}
    for tower in (model(**given).vision_model_output, model(**given).text_model_output):
        assert len(tower.hidden_states) == 3 and "attentions" not in tower
    assert "hidden_states" not in model(**given, output_hidden_states=False).vision_model_output
    model.config.output_hidden_states = False
    model.config.vision_config.output_attentions = True
    output = model(**given)
    assert output.vision_model_output.keys() - {"last_hidden_state", "pooler_output"} == {
        "attentions"
    }
    assert output.text_model_output.keys() == {"last_hidden_state", "pooler_output"}
    model.config.return_dict = model.config.vision_config.return_dict = False
    assert type(model(**given)) is tuple
    assert model.get_video_features(given["pixel_values"]).shape == (3, 24)


def test_attentions_need_no_other_attention_in_the_text_tower(make_model, texts):
    """With sdpa, a text tower of transformers has none, and would only warn."""
    model = make_model(attn_implementation="sdpa")
    output = model(pixel_values=frames(3)[:, None], **texts, output_attentions=True)
    assert len(output.vision_model_output.attentions) == 2
    assert output.text_model_output.attentions is None
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("frame_pooling", ["proxy", "mean"])
def test_tokens_are_the_hidden_states_of_their_layer(make_model, frame_pooling):
    model = make_model(frame_pooling=frame_pooling)
    tower, (pixels, where) = model.vision_model, batch()
    seen = where if frame_pooling == "proxy" else torch.arange(len(pixels) + 1).int()
    states = tower(pixels, seen, output_hidden_states=True).hidden_states
    for layer in (0, 1, -1):
        packed = model.get_video_tokens(pixels, where, layer=layer)
        assert packed.keys() == {"proxies", "patches", "frame_offsets"}
        assert torch.equal(packed.frame_offsets, where)
        videos = zip(packed.proxies, packed.patches.split(seen.diff().tolist()), strict=True)
        each = [torch.cat([proxies, patches.flatten(0, 1)]) for proxies, patches in videos]
        assert torch.equal(torch.cat(each), states[layer])

        padded = model.get_video_tokens(pixels, where, layer=layer, padded=True)
        assert padded.keys() == {"proxies", "patches", "frame_mask"}
        assert padded.frame_mask.sum(1).tolist() == LENGTHS
        assert padded.patches.shape == (4, 5, 16, 128)
        assert torch.equal(padded.patches[padded.frame_mask], packed.patches)
        assert not padded.patches[~padded.frame_mask].any()
        if frame_pooling == "mean":
            assert padded.proxies.shape == (4, 5, 4, 128)
            assert torch.equal(padded.proxies[padded.frame_mask], packed.proxies)
        else:
            assert torch.equal(padded.proxies, packed.proxies)


@torch.no_grad()
def test_the_first_token_of_the_last_layer_makes_the_feature(make_model):
    model, pixels = make_model(), frames(6).unflatten(0, (2, 3))
    proxies = model.get_video_tokens(pixels).proxies
    feature = model.visual_projection(model.vision_model.post_layernorm(proxies[:, 0]))
    torch.testing.assert_close(feature, model.get_video_features(pixels))
    padded = model.get_video_tokens(pixels, padded=True)
    assert padded.frame_mask.all() and padded.patches.shape[:2] == (2, 3)


def test_layers_after_the_wanted_one_are_not_computed(make_model):
    model, ran = make_model(), []
    for number, layer in enumerate(model.vision_model.encoder.layers, start=1):
        layer.register_forward_hook(lambda *given, number=number: ran.append(number))
    for layer, wanted in ((0, []), (-3, []), (1, [1]), (-2, [1]), (2, [1, 2]), (-1, [1, 2])):
        ran.clear()
        tokens = model.get_video_tokens(*batch(), layer=layer)
        assert ran == wanted and tokens.patches.requires_grad
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"layer is {layer}; expected 0 .* to 2 .* to -3"):
            model.get_video_tokens(*batch(), layer=layer)
