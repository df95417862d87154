"""Checkpoints of other makers: the features are those that their own code computes, and what CLIP's
towers cannot hold is refused by name."""

import json
import shutil
import zipfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from clipvip.convert import convert
from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPModel
from clipvip.model.layouts import authors_state_dict
from clipvip.model.processing import AUTHORS_READING, read_settings

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
    ours = CLIPViPModel.from_pretrained(source, **(PLAIN | options)).eval()
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
    assert "\n" not in str(error.value) and "--activation" in str(error.value)
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
    assert read_settings(file) == read_settings(tmp_path / "hub")
    # Some folders hold both open_clip's files and those of transformers.
    (tmp_path / "hub" / "config.json").write_text('{"text_config": {}, "vision_config": {}}')
    assert_same_features(model, file)


def test_clip4clip(openai, tmp_path, caplog):
    model = openai().float()
    weights = {f"clip.{name}": weight for name, weight in model.state_dict().items()}
    weights["frame_position_embeddings.weight"] = torch.zeros(16, 128)
    weights["transformerClip.resblocks.0.ln_1.weight"] = torch.zeros(128)
    torch.save(weights, tmp_path / "pytorch_model.bin.4")
    assert_same_features(model, tmp_path / "pytorch_model.bin.4")
    (said,) = [r.getMessage() for r in caplog.records if "CLIP4Clip" in r.getMessage()]
    assert "frame_position_embeddings, transformerClip" in said and "\n" not in said


@pytest.mark.parametrize(
    ("activation", "end", "dtype", "kind"),
    [
        ("gelu", 2, torch.float16, "shards"),
        ("quick_gelu", 59, torch.bfloat16, "bin"),
        ("gelu", 59, torch.float32, "safetensors"),
        ("quick_gelu", 2, torch.float32, "file"),
    ],
    ids=str,
)
def test_folder_of_transformers(tmp_path, activation, end, dtype, kind):
    """As OpenAI, LAION, MetaCLIP and DFN publish them; old ones say 2 for their end token."""
    tower = {"hidden_size": 128, "intermediate_size": 96, "hidden_act": activation}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    ends = {"bos_token_id": 58, "eos_token_id": end, "pad_token_id": 1, "vocab_size": 60}
    text = {**tower, **ends, "max_position_embeddings": 16}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)
    model = stirred(CLIPModel(config)).to(dtype)
    options = {"max_shard_size": "100KB"} if kind == "shards" else {}
    model.save_pretrained(tmp_path, **options)
    source, options = tmp_path, {}
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    elif kind == "file":
        (tmp_path / "config.json").unlink()
        source, options = (
            tmp_path / "model.safetensors",
            {"activation": activation, "head_width": 64},
        )
    assert CLIPViPModel.from_pretrained(source, **options).dtype == dtype

    class Theirs:
        logit_scale = model.logit_scale

        def float(self):
            model.float()
            return self

        def encode_image(self, images):
            return model.get_image_features(images).pooler_output

        def encode_text(self, ids):
            return model.get_text_features(ids).pooler_output

    assert_same_features(Theirs(), source, dtype=torch.float32, **options)


@pytest.mark.parametrize("source", ["ours", "CLIP"])
def test_a_file_beside_its_configuration_is_not_guessed_at(
    make_model, clip_folder, tmp_path, source
):
    """Our own names say no more about activation and heads than those of transformers do."""
    folder = clip_folder
    if source == "ours":
        make_model().save_pretrained(folder := tmp_path / "ours")
    file = folder / "model.safetensors"
    for load in (CLIPViPModel.from_pretrained, read_settings):
        with pytest.raises(
            ValueError, match=r"lies beside its config.json.* give the folder, "
        ) as e:
            load(file)
        assert "\n" not in str(e.value)
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="does not say which activation"):
        CLIPViPModel.from_pretrained(alone)
    options = {"activation": "gelu", "head_width": 32}
    config = CLIPViPModel.from_pretrained(alone, **options).config
    assert (config.vision_config.hidden_act, config.vision_config.num_attention_heads) == (
        "gelu",
        4,
    )


def test_videos_are_read_as_by_the_authors_for_their_files_alone(make_model, tmp_path, caplog):
    model = make_model(num_frames=5)
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    torch.save(authors_state_dict(model), tmp_path / "theirs.pt")
    frames = {"image_size": 32, "num_frames": 5}
    assert read_settings(tmp_path / "theirs.pt") == frames | AUTHORS_READING
    assert not caplog.text
    assert read_settings(tmp_path / "ours.pt") == frames
    assert "ours.pt does not say how its model read videos" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "clipmodel."])
def test_two_weights_of_one_name_are_refused(make_model, tmp_path, prefix):
    weights = make_model().state_dict()
    torch.save({**weights, f"{prefix}logit_scale": torch.tensor(9.0)}, tmp_path / "two.pt")
    message = rf"holds two weights of one name, logit_scale and {prefix}logit_scale"
    refused_in_one_line(tmp_path / "two.pt", message)


@pytest.mark.parametrize(
    ("mode", "resize"), [("shortest", "crop"), ("longest", "pad"), ("squash", "squash")]
)
def test_frames_are_read_as_open_clip_reads_images(clip, tmp_path, caplog, mode, resize):
    torch.save(clip().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    towers = {"vision_cfg": VISION, "text_cfg": TEXT}
    config = {"model_cfg": towers, "preprocess_cfg": {"resize_mode": mode, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    convert(tmp_path, tmp_path / "ours")
    settings = read_settings(tmp_path / "ours")
    assert (settings["resize"], settings["image_std"], settings["image_size"]) == (
        resize,
        [0.5] * 3,
        32,
    )
    assert ("using the nearest way" in caplog.text) == (mode == "squash")


@pytest.mark.parametrize("to", ["clipvip", "clip"])
def test_conversion_keeps_features_and_takes_a_tokenizer(clip, tokenizer, tmp_path, to):
    model = clip(quick_gelu=True)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"activation": "quick_gelu", "head_width": 64}
    convert(tmp_path / "clip.pt", tmp_path / "ours", to, tmp_path / "tokenizer", **options)
    options = {"strict": False, "num_proxies": 1} if to == "clipvip" else {}
    assert_same_features(model, tmp_path / "ours", **options)
    processor = load_for_embedding(tmp_path / "ours")[1]
    assert (processor.image_size, processor.resize) == (32, "crop")
    assert processor.tokenizer("a cat").input_ids == tokenizer("a cat").input_ids


FOREIGN = {
    "ResNet": ({"vision": {"layers": [1, 1, 1, 1], "width": 16}}, "a ResNet"),
    "LayerScale": ({"vision": {"ls_init_value": 0.1}}, "LayerScale .visual.transformer"),
    "text LayerScale": ({"text": {"ls_init_value": 0.1}}, "LayerScale .transformer"),
    "attentional pooling": ({"vision": {"attentional_pool": True}}, "attentional pooling"),
    "SigLIP's loss": ({"init_logit_bias": -10.0}, "the bias of SigLIP's loss .logit_bias"),
    "class token": ({"custom": True, "text": {"embed_cls": True}}, "a class token in its text"),
    "no first norm": ({"vision": {"no_ln_pre": True}}, "lacks visual.ln_pre.weight, visual"),
    "no projection": ({"text": {"proj_type": "none"}}, "it lacks text_projection"),
    "biased projection": (
        {"custom": True, "text": {"proj_bias": True}},
        "lacks text.text_projection; CLIP has no text.text_projection.weight, text.text_proj",
    ),
    "normed queries": ({"vision": {"qk_norm": True}}, "CLIP has no visual.transformer"),
}


@pytest.mark.parametrize(("changes", "message"), FOREIGN.values(), ids=FOREIGN)
def test_architectures_that_clip_cannot_hold_are_refused_by_name(clip, tmp_path, changes, message):
    torch.save(clip(**changes).state_dict(), tmp_path / "open_clip.pt")
    refused_in_one_line(tmp_path / "open_clip.pt", message, activation="gelu", head_width=64)


OTHERS = {
    "SigLIP": ("visual.trunk.blocks.0.norm1.weight", "a vision tower of timm"),
    "EVA": ("visual.blocks.0.attn.q_proj.weight", "the vision tower of EVA"),
    "CoCa": ("text_decoder.ln_final.weight", "a text decoder, as CoCa"),
    "HF text": ("text.transformer.embeddings.word_embeddings.weight", "a text tower of trans"),
    "SigLIP of transformers": ("vision_model.head.probe", "the pooling head of SigLIP"),
    "none": ("layers.0.weight", "none of the names looked for .*; the first .*: layers.0.weight"),
}


@pytest.mark.parametrize(("name", "message"), OTHERS.values(), ids=OTHERS)
def test_other_models_are_refused_by_name(tmp_path, name, message):
    torch.save({name: torch.zeros(2, 2), "logit_scale": torch.zeros(())}, tmp_path / "x.pt")
    refused_in_one_line(tmp_path / "x.pt", message)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_one_tower_is_no_model(clip, tmp_path, tower):
    weights = clip().state_dict()
    kept = {k: v for k, v in weights.items() if k.startswith("visual.") == (tower == "vision")}
    torch.save(kept, tmp_path / "x.pt")
    other = {"text": "vision", "vision": "text"}[tower]
    refused_in_one_line(tmp_path / "x.pt", f"it has no {other} tower; it lacks ", activation="gelu")


def refused_in_one_line(path, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        convert(path, path.parent / "converted", **options)
    said = str(error.value)
    assert path.name in said and "\n" not in said and len(said) < 900, said
    assert not (path.parent / "converted").exists()


SETTINGS = {
    "timm": ({"vision": {"timm_model_name": "vit_base"}}, "timm_model_name='vit_base'"),
    "text of HF": ({"text": {"hf_model_name": "roberta-base"}}, "hf_model_name='roberta-base'"),
    "average": ({"vision": {"pool_type": "avg"}}, "pool_type='avg'; expected tok"),
    "norm after": ({"vision": {"final_ln_after_pool": True}}, "final_ln_after_pool=True"),
    "end token": ({"text": {"pool_type": "eos", "eos_id": 1}}, "pool_type='eos'; expected argmax"),
    "both ways": ({"text": {"no_causal_mask": True}}, "no_causal_mask=True"),
    "tanh": ({"text": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs="),
    "epsilon": ({"vision": {"norm_kwargs": {"eps": 1e-6}}}, "norm_kwargs="),
    "width": ({"vision": {"width": 64}}, "width is 64, that of the weights 128"),
    "layers": ({"text": {"layers": 5}}, "layers is 5, that of the weights 3"),
    "image": ({"vision": {"image_size": 64}}, "image_size is 64, that of the weights 32"),
    "heads": ({"text": {"heads": 3}}, "heads are 3"),
    "head width": ({"vision": {"head_width": 48}}, "heads of 48 do not divide"),
    "head of words": ({"vision": {"head_width": "a"}}, "head_width is 'a'"),
}


@pytest.mark.parametrize(("changes", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_of_open_clip_that_clip_cannot_hold_are_refused(clip, tmp_path, changes, message):
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(clip().state_dict(), folder / "open_clip_pytorch_model.bin")
    towers = {"vision_cfg": {**VISION}, "text_cfg": {**TEXT}}
    for tower, settings in changes.items():
        towers[f"{tower}_cfg"].update(settings)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers}))
    refused_in_one_line(folder, message)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def integer(number):
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def tensor(count=4, size=(4,), stride=(1,), offset=0, key="0"):
    """Instructions of a pickle that build a tensor over a storage of so many numbers."""
    identity = (text("storage"), name("torch", "FloatStorage"), text(key), text("cpu"))
    storage = b"(" + b"".join(identity) + integer(count) + b"tQ"
    shape = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride)]
    hooks = b"\x89" + name("collections", "OrderedDict") + b")R"
    given = storage + integer(offset) + b"".join(shape) + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + given + b"tR"


def module(**attributes):
    items = b"".join(text(key) + value for key, value in attributes.items())
    return name("__torch__", "Module") + b")\x81}(" + items + b"ub"


def pickled(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


def write_planted(path, data, compression=zipfile.ZIP_STORED, storage=bytes(16)):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/constants.pkl", pickled(b")"))
        archive.writestr("archive/data/0", storage)


def tree(depth):
    """A tree of modules, each of which holds the one below twice."""
    instructions = module(weight=tensor())
    for level in range(depth):
        put, get = (code + bytes([level]) for code in (b"q", b"h"))
        instructions = module(a=instructions + put, b=get)
    return pickled(instructions)


CALL = text("planted") + b"\x85R"
STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
STORAGE += integer(4) + b"tQ"
# Tensor.__setstate__ takes a storage, offset, size and stride, and trusts them.
STATE = b"(" + STORAGE + integer(0) + integer(10**6) + b"\x85" + integer(1) + b"\x85t"
HOSTILE = {
    "code": (pickled(name("os", "mkdir") + CALL), "holds more than weights"),
    "code in a module": (pickled(module(a=name("os", "mkdir") + CALL)), "holds more than weights"),
    "import": (pickled(name("torch.hub", "load")), "holds more than weights"),
    "new names": (b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + CALL + b".", "holds more than weights"),
    "extension": (pickled(b"\x82\x01"), "holds more than weights"),
    "memo": (pickled(module(), b"r\xff\xff\xff\x7f"), "data.pkl is damaged"),
    "no module": (pickled(tensor()), "describes no module"),
    "more numbers": (pickled(module(a=tensor(count=10**15))), "storage 0 has 16 bytes"),
    "fewer numbers": (pickled(module(a=tensor(count=2, size=(2,)))), "storage 0 has 16 bytes"),
    "negative": (pickled(module(a=tensor(count=-4))), "storage 0 has 16 bytes"),
    "beyond": (pickled(module(a=tensor(size=(10**6,)))), "does not lie within its 4 numbers"),
    "before": (pickled(module(a=tensor(offset=-3))), "does not lie within"),
    "strided beyond": (
        pickled(module(a=tensor(size=(2, 2), stride=(9, 1)))),
        "does not lie within its 4 numbers",
    ),
    "expanded": (
        pickled(module(a=tensor(size=(10**9, 10**9), stride=(0, 0)))),
        "does not lie within",
    ),
    "no storage": (pickled(module(a=tensor(key="1"))), r"no item named"),
    "elsewhere": (
        pickled(module(a=tensor(key="../0"))),
        r"storage \.\./0 is not named by a number",
    ),
    "changed after": (pickled(module(a=tensor() + STATE + b"b")), "cannot be read as a PyTorch"),
    "changed storage": (pickled(module(a=STORAGE + STATE + b"b")), "cannot be read as a PyTorch"),
    "not a tensor": (pickled(module(a=b"]")), "none of the names looked for"),
    "cut off": (pickled(module(a=tensor()))[:-20], "cannot be read as a PyTorch file"),
    "wide tree": (tree(200), "none of the names looked for"),
    "endless": (pickled(name("__torch__", "M") + b")\x81q\0}X\1\0\0\0ah\0sb"), "none of the names"),
    "deep": (pickled(b"(" * 50_000, b"t" * 50_000), "describes no module"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused_in_one_line(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    write_planted(tmp_path / "planted.pt", data)
    refused_in_one_line(tmp_path / "planted.pt", message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted.pt"]


def test_damaged_files_are_refused_in_one_line(openai, tmp_path):
    write_archive(openai(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for content in (b"", b"PK\3\4", whole[:100], whole[:middle], whole[:-1], flipped):
        for name in ("x.pt", "x.safetensors", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(content)
            refused_in_one_line(tmp_path / name, "is empty|cannot be read|damaged")
            (tmp_path / name).unlink()


@pytest.mark.parametrize(("script", "key"), [(True, "0"), (False, "0"), (False, "code/0")], ids=str)
def test_a_small_file_that_claims_much_is_refused(tmp_path, script, key):
    huge = bytes(50_000_000)
    data = pickled(module(a=tensor(count=len(huge) // 4)))
    write_planted(tmp_path / "bomb.pt", data, zipfile.ZIP_DEFLATED, huge)
    if not script:
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickled(tensor(count=len(huge) // 4, key=key)))
            archive.writestr(f"archive/data/{key}", huge)
    refused_in_one_line(tmp_path / "bomb.pt", r"it has \d+ bytes, but its members claim 50000")


def test_a_dict_that_holds_itself_is_no_state_dict(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pt")
    refused_in_one_line(tmp_path / "endless.pt", "holds no state dict")
