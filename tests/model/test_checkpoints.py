"""Checkpoints of other makers: the features are those that their own code computes, and what CLIP's
towers cannot hold is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPModel

PLAIN = {"frame_pooling": "mean", "num_proxies": 1}
VISION = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 60, "width": 128, "heads": 2, "layers": 3}
SIZES = {
    "input_resolution": torch.tensor(32),
    "context_length": torch.tensor(16),
    "vocab_size": torch.tensor(60),
}


def stirred(model):
    """The model with weights of which each changes the features, as after training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture
def clip(open_clip):
    def build(*, custom=False, vision=(), text=(), **options):
        towers = {"vision_cfg": VISION | dict(vision), "text_cfg": TEXT | dict(text)}
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        return stirred(kind(24, **towers, **options))

    return build


@pytest.fixture
def openai(clip, open_clip):
    """OpenAI's model: QuickGELU, weights of the large layers in fp16."""

    def build():
        model = clip(quick_gelu=True)
        open_clip.model.convert_weights_to_fp16(model)
        return model

    return build


def assert_same_features(theirs, source, **options):
    ours = CLIPViPModel.from_pretrained(source, **PLAIN, **options).eval()
    assert ours.dtype == torch.float32
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 58, (3, 16))
    ids[:, 0] = 58
    for text, end in enumerate((5, 9, 15)):
        ids[text, end], ids[text, end + 1 :] = 59, 0
    theirs = theirs.float()
    with torch.no_grad():
        videos = F.normalize(theirs.encode_image(images), dim=-1)
        torch.testing.assert_close(ours.get_video_features(images[:, None]), videos)
        torch.testing.assert_close(ours.get_text_features(ids), theirs.encode_text(ids))
        scale = theirs.logit_scale.reshape(())
    torch.testing.assert_close(ours.logit_scale.detach(), scale.detach())
    return ours


class Archive(nn.Module):
    """A model as OpenAI's archives hold it: its sizes are buffers beside the weights."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, weight in model.named_parameters(recurse=False):
            setattr(self, name, weight)
        for name, size in SIZES.items():
            self.register_buffer(name, size)

    def forward(self, image):
        return self.visual(image)


def write_archive(model, path):
    example = torch.zeros(1, 3, 32, 32, dtype=torch.float16)
    torch.jit.save(torch.jit.trace(Archive(model), example, check_trace=False), path)


def test_torchscript_archive_of_openai(openai, tmp_path):
    model = openai()
    write_archive(model, tmp_path / "ViT.pt")
    assert_same_features(model, tmp_path / "ViT.pt")


def test_state_dict_of_openai(openai, tmp_path):
    model = openai()
    torch.save({**model.state_dict(), **SIZES}, tmp_path / "ViT.pt")
    assert_same_features(model, tmp_path / "ViT.pt")


@pytest.mark.parametrize(
    ("kind", "custom", "activation"),
    [
        ("trained", False, "gelu"),
        ("bare", True, "quick_gelu"),
        ("safetensors", False, "quick_gelu"),
    ],
)
def test_file_of_open_clip_whose_activation_is_given(clip, tmp_path, activation, custom, kind):
    quick = activation == "quick_gelu"
    model = clip(custom=custom, quick_gelu=quick, vision={"head_width": 32})
    weights, path = model.state_dict(), tmp_path / "epoch_1.pt"
    if kind == "trained":
        weights = {f"module.{name}": weight for name, weight in weights.items()}
        torch.save({"epoch": 1, "name": "run", "state_dict": weights, "optimizer": {}}, path)
    elif kind == "bare":
        torch.save(weights, path)
    else:
        path = path.with_suffix(".safetensors")
        save_file(weights, path)
    assert_same_features(model, path, activation=activation, head_width=32)
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation]
    for wrong in (
        {"activation": other, "head_width": 32},
        {"activation": activation, "head_width": 64},
    ):
        with pytest.raises(AssertionError, match="not close"):
            assert_same_features(model, path, **wrong)
    with pytest.raises(ValueError, match=r"epoch_1\S* does not say which activation") as error:
        CLIPViPModel.from_pretrained(path, head_width=32)
    assert "\n" not in str(error.value) and "activation=gelu" in str(error.value)
    with pytest.raises(ValueError, match=r"does not say how wide the heads .* give head_width"):
        CLIPViPModel.from_pretrained(path, activation=activation)


def write_hub_folder(model, settings, folder, tokenizer, safe, preprocess=()):
    """Write a folder with open_clip's own code, as its hub repositories are made."""
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    set_model_preprocess_cfg(model, {"mean": mean, "std": std, **dict(preprocess)})
    save_for_hf(model, tokenizer, settings, str(folder), safe_serialization=safe)


@pytest.mark.parametrize(
    ("safe", "custom", "quick"), [(True, False, True), (False, True, False)], ids=str
)
def test_hub_folder_of_open_clip(clip, tokenizer, tmp_path, safe, custom, quick):
    vision, text = {"head_width": 16}, {"heads": 4}
    model = clip(custom=custom, quick_gelu=quick, vision=vision, text=text)
    towers = {"vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **text}}
    settings = {"embed_dim": 24, "quick_gelu": quick, **towers}
    write_hub_folder(model, settings, tmp_path / "hub", tokenizer, safe)
    assert_same_features(model, tmp_path / "hub")
    (file,) = (tmp_path / "hub").glob("open_clip_*[!g].[sb]*")
    assert_same_features(model, file)
    network, processor = load_for_embedding(tmp_path / "hub")
    assert network.config.vision_config.frame_pooling == "mean"
    assert processor.image_mean == [0.1, 0.2, 0.3] and processor.image_std == [0.4, 0.5, 0.6]
    assert (processor.image_size, processor.resize) == (32, "crop")
    assert processor.tokenizer("a cat").input_ids == tokenizer("a cat").input_ids


def test_clip4clip(openai, tmp_path, caplog):
    model = openai().float()
    weights = {f"clip.{name}": weight for name, weight in model.state_dict().items()}
    weights["frame_position_embeddings.weight"] = torch.zeros(16, 128)
    weights["transformerClip.resblocks.0.ln_1.weight"] = torch.zeros(128)
    torch.save(weights, tmp_path / "pytorch_model.bin.4")
    assert_same_features(model, tmp_path / "pytorch_model.bin.4")
    (said,) = [r.getMessage() for r in caplog.records if "CLIP4Clip" in r.getMessage()]
    assert "frame_position_embeddings, transformerClip" in said and "\n" not in said
