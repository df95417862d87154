"""A model that is absent, damaged or hostile gives an error of one line, and runs no code."""

import copy
import json
import math
import os
import pickle
import re
import shutil
import socket
import sys
import zipfile
from itertools import product
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipvip.convert import convert
from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.model.layouts import authors_state_dict

LOADS = {
    "from_pretrained": CLIPViPModel.from_pretrained,
    "load_for_embedding": load_for_embedding,
    "convert": lambda source: convert(source, "converted"),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/absent/model", "the model is '/absent/model', which does not exist; expected"),
        ("absent/model", "the model is 'absent/model', which does not exist here and could not"),
        ("../some/absent/model", "the model is '../some/absent/model', which does not exist; "),
        ("absent.pt", "the model is 'absent.pt', which does not exist; expected"),
        (".", "the model is '.', a folder without config.json; expected"),
        (" ", "the model is empty; expected the folder of a model, a file of weights or"),
    ],
)
def test_a_model_that_is_not_there_is_reported_in_one_line(
    load, source, message, monkeypatch, tmp_path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load(source)
    said = str(error.value)
    assert said.startswith(message) and "such as openai/clip-vit-base-patch32" in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [*product(FILES, (b"", b"{", b"\xff" * 64)), ("config.json", b"[]")],
)
def test_a_damaged_model_is_reported_in_one_line(name, content, clip_folder, tokenizer, tmp_path):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        load_for_embedding(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def damage_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    for keys, value in change.items():
        *towers, key = keys.split(".")
        inner = config
        for tower in towers:
            inner = inner[tower]
        inner[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def model_folder(clip_folder, tokenizer, tmp_path):
    """A plain CLIP with its tokenizer, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    tokenizer.save_pretrained(folder)
    return folder


HUGE = ("hidden_size", "intermediate_size", "num_hidden_layers")
CONFIGS = [
    *({f"{tower}.{key}": 10**9} for tower in ("text_config", "vision_config") for key in HUGE),
    {"text_config.vocab_size": 10**30},
    {"text_config.max_position_embeddings": 10**10},
    {"text_config.hidden_size": 0, "text_config.num_hidden_layers": 10**9},
    {"text_config.num_attention_heads": 0},
    {"vision_config.num_attention_heads": -1},
    {"vision_config.patch_size": 10**9, "vision_config.image_size": 10**9},
    {"vision_config.num_frames": 10**12},
    {"vision_config.layer_norm_eps": math.inf},
    {"vision_config.hidden_size": "32"},
    {"vision_config.image_size": [8, 8]},
    {"vision_config.hidden_act": "nope"},
    {"projection_dim": True},
    {"projection_dim": 1.5},
    {"logit_scale_init_value": math.nan},
    {"text_config": None, "vision_config": None},
    {"text_config": 5},
    {"vision_config": [1]},
    {"dtype": "int8"},
    {"dtype": "hub"},
    {"dtype": 5},
]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_configuration_of_no_model_is_reported_in_one_line(change, model_folder):
    """The error comes before memory is allocated for weights that no file holds."""
    damage_config(model_folder, change)
    with pytest.raises(ValueError, match=model_folder.name) as error:
        load_for_embedding(model_folder)
    assert str(model_folder) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=model_folder.name):
        convert(model_folder, model_folder / "converted")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"null", b"5", b'"a"'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_json_of_anything_else_is_reported_in_one_line(name, content, model_folder):
    (model_folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        load_for_embedding(model_folder)
    assert str(model_folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["metaclip_2", "chinese_clip", "siglip", None, ["clip"]])
def test_other_models_with_names_and_shapes_of_clip_are_refused(kind, model_folder):
    """MetaCLIP 2 reads a text's feature at another token."""
    damage_config(model_folder, {"model_type": kind})
    config = CLIPViPConfig()
    for load in (
        CLIPViPModel.from_pretrained,
        CLIPViPConfig.from_pretrained,
        lambda source: CLIPViPModel.from_pretrained(source, config=config),
        lambda source: convert(source, model_folder / "converted"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"holds a {kind!r} model; expected")):
            load(model_folder)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("harm", ["cut", "cut by one", "random", "zeros", "more", "NaN", "index"])
def test_damaged_weights_are_reported_and_never_made_up(harm, model_folder):
    path = model_folder / "model.safetensors"
    whole = path.read_bytes()
    if harm == "NaN":
        rewrite(model_folder, lambda weights: weights["visual_projection.weight"].fill_(math.nan))
    elif harm == "index":
        path.unlink()
        index = {"metadata": {}, "weight_map": {"logit_scale": "../other.safetensors"}}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        noise = np.random.default_rng(0).bytes(len(whole))
        header = 8 + int.from_bytes(whole[:8], "little")
        damaged = {"cut": whole[: len(whole) // 2], "cut by one": whole[:-1], "more": whole + b"a"}
        damaged |= {"zeros": bytes(len(whole)), "random": whole[:header] + noise[header:]}
        path.write_bytes(damaged[harm])
    with pytest.raises(ValueError, match=model_folder.name) as error:
        load_for_embedding(model_folder)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_or_of_another_shape_are_named(model_folder):
    rewrite(model_folder, lambda weights: weights.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match=r"missing: visual_projection\.weight"):
        load_for_embedding(model_folder)
    added = {"visual_projection.weight": torch.zeros(3, 3)}
    rewrite(model_folder, lambda weights: weights.update(added))
    with pytest.raises(ValueError, match=r"shape: visual_projection\.weight is \[3, 3\]"):
        load_for_embedding(model_folder)
    rewrite(model_folder, lambda weights: weights.clear())
    with pytest.raises(ValueError, match=r"cannot be loaded|missing: "):
        load_for_embedding(model_folder)


def test_more_layers_than_there_are_weights_for_are_refused(model_folder):
    """A layer takes memory however narrow it is."""
    narrow = {"hidden_size": 1, "intermediate_size": 1, "num_attention_heads": 1}
    layers = {"num_hidden_layers": 10**6, **narrow}
    damage_config(model_folder, {f"text_config.{name}": size for name, size in layers.items()})
    with pytest.raises(ValueError, match=r"its configuration has .* weights"):
        CLIPViPModel.from_pretrained(model_folder)


class Planted:
    def __reduce__(self):
        return Path.touch, (Path("planted"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "authors.pt"])
def test_pickles_are_not_executed(name, model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)
    (model_folder / "model.safetensors").unlink()
    source = name if name.startswith("authors") else model_folder
    for content in ({"a": Planted()}, Planted()):
        for zipped in (True, False):
            torch.save(content, name, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=f"{source}.*holds more than weights") as error:
                CLIPViPModel.from_pretrained(source)
            assert "\n" not in str(error.value) and "safetensors" in str(error.value)
        Path(name).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"{source}.*holds more than weights"):
            CLIPViPModel.from_pretrained(source)
    with zipfile.ZipFile(name, "w") as script:  # by which TorchScript differs from weights
        script.writestr("archive/constants.pkl", pickle.dumps(()))
        script.writestr("archive/version", "3")
    with pytest.raises(ValueError, match=f"{source}.*holds more than weights"):
        CLIPViPModel.from_pretrained(source)
    assert not Path("planted").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "authors.pt"])
def test_weights_cut_short_are_not_called_code(name, model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)
    (model_folder / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save({"a": torch.zeros(100)}, name, _use_new_zipfile_serialization=zipped)
        whole = Path(name).read_bytes()
        for cut in (1, len(whole) // 2, len(whole) - 1):
            Path(name).write_bytes(whole[:cut])
            with pytest.raises(ValueError) as error:
                CLIPViPModel.from_pretrained(name if name.startswith("authors") else model_folder)
            assert "code" not in str(error.value) and "\n" not in str(error.value)


def test_an_authors_file_of_large_shapes_without_their_numbers_is_refused(make_model, tmp_path):
    weights = authors_state_dict(make_model())
    for tower in ("clipmodel.text_model", "clipmodel.vision_model"):
        weights[f"{tower}.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(1).expand(10**7, 10**7)
    torch.save(weights, tmp_path / "authors.pt")
    with pytest.raises(ValueError, match=r"authors\.pt.*its configuration has .* weights"):
        CLIPViPModel.from_pretrained(tmp_path / "authors.pt")


CODE = {
    "auto_map": {"AutoModel": "planted.Model", "AutoConfig": "someone/else--planted.Config"},
    "attn_implementation": "someone/kernels",
    "_attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation_internal": "someone/kernels",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "fusion_config": {"patch_embeddings": True},
    "transformers_weights": "other.safetensors",
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "someone/kernels:Norm"},
    "text_config.attn_implementation": "someone/kernels",
    "vision_config._attn_implementation": "kernels-community/flash-attn",
    "text_config.quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "name_or_path": "someone/else",
    "custom_pipelines": {"a": {"impl": "planted.Pipeline"}},
    "__class__": "planted",
    "from_dict": "planted",
}


def test_no_file_of_a_model_has_code_fetched_or_run(model_folder, monkeypatch, caplog):
    """The model is the same as without the settings that name code."""
    import transformers.integrations.hub_kernels as kernels
    import transformers.modeling_utils as modeling

    plain = load_for_embedding(model_folder, frame_pooling="proxy")[0]

    def refuse(*given, **options):
        pytest.fail(f"asked for {given} {options}")

    for name in ("get_kernel", "load_and_register_attn_kernel", "register_kernel_mapping"):
        monkeypatch.setattr(kernels, name, refuse, raising=False)
    monkeypatch.setattr(modeling, "is_kernels_available", lambda *given, **options: True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    damage_config(model_folder, CODE)
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": ["planted.Slow", "planted.Fast"]}}
    settings |= {**code, "tokenizer_class": "Planted", "backend": "planted"}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (model_folder / "processor_config.json").write_text(json.dumps(code))
    for path in (model_folder / "planted.py", model_folder / "chat_template.jinja"):
        path.write_text("raise SystemExit('planted')")
    monkeypatch.chdir(model_folder)
    model = load_for_embedding(model_folder, frame_pooling="proxy")[0]
    for (name, weight), (_, expected) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert weight.equal(expected), name
    assert model.config.to_dict() == plain.config.to_dict()
    assert "planted" not in sys.modules
    (told,) = [record.getMessage() for record in caplog.records if "names" in record.msg]
    assert "a model's files choose no code" in told and "\n" not in told
    assert all(name in told for name in ("auto_map", "someone/kernels", "quantization_config"))


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_an_adapter_is_refused(where, model_folder, tmp_path, monkeypatch):
    """With peft installed, transformers would load the model that it names."""
    (model_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    source = model_folder
    if where == "hub":
        source, cached = "some/model", tmp_path / "models--some--model"
        shutil.copytree(model_folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"the model is .*: it holds an adapter; merge it"):
        CLIPViPModel.from_pretrained(source, cache_dir=tmp_path)


def test_plain_names_of_attention_in_a_configuration_are_followed(model_folder):
    damage_config(model_folder, {"attn_implementation": "eager"})
    model = load_for_embedding(model_folder)[0]
    assert model.text_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("content", ["{", "[]", '{"size": "big"}', '{"crop_size": [8, 8]}'])
def test_a_damaged_image_processor_is_reported_in_one_line(
    content, clip_folder, tokenizer, tmp_path
):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=tmp_path.name):
        load_for_embedding(tmp_path)


def test_more_tokens_than_the_model_knows_are_refused(clip_folder, tokenizer, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["one", "more"])
    larger.save_pretrained(tmp_path / "larger")
    larger.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model \d+"):
        load_for_embedding(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model \d+"):
        convert(clip_folder, tmp_path / "ours", tokenizer=tmp_path / "larger")
    assert not (tmp_path / "ours").exists()


def test_names_of_models_are_utf8(clip_folder, tokenizer, tmp_path):
    named = tmp_path / os.fsdecode(b"caf\xe9")
    for act in (
        lambda: load_for_embedding(named),
        lambda: CLIPViPModel.from_pretrained(named),
        lambda: convert(clip_folder, named),
    ):
        with pytest.raises(ValueError, match=r"caf.*a name that is not UTF-8"):
            act()
    assert not list(tmp_path.iterdir())


def test_a_subfolder_is_looked_for_where_it_is(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "inner")
    loaded = CLIPViPModel.from_pretrained(tmp_path, subfolder="inner")
    assert loaded.config.projection_dim == model.config.projection_dim
    with pytest.raises(FileNotFoundError, match=r"a folder without config\.json"):
        CLIPViPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("./models/clpvip-b32", r"does not exist; .*; did you mean models/clipvip-b32\?"),
        ("models/clpvip-b32", r"the folder models does not hold and .* mean models/clipvip-b32\?"),
        ("models/other", r"the folder models does not hold and could not .*base-patch32$"),
        ("modls/clipvip-b32", r"does not exist here and could not .*; did you mean models\?"),
        ("models/mine/best/model", r"does not exist; .* models exists, but holds no mine$"),
        ("models/clipvip-b3/model", r"does not exist; .*; did you mean models/clipvip-b32\?"),
        ("models/weights", r"without config.json; .* in it, give models/weights/epoch_1\.pt$"),
        ("models/weights/epoch_2.pt", r"did you mean models/weights/epoch_1\.pt\?"),
        ("zzz", r"does not exist here and could not be fetched .*base-patch32$"),
    ],
)
def test_names_close_to_one_that_is_not_there_are_suggested(source, hint, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("clipvip-b32", "weights"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "weights" / "epoch_1.pt").touch()
    with pytest.raises(FileNotFoundError, match=hint) as error:
        load_for_embedding(source)
    assert "\n" not in str(error.value)


def test_a_load_shows_one_line_and_no_bar_or_table(clip_folder, capfd, caplog):
    CLIPViPModel.from_pretrained(clip_folder)
    shown = "".join(capfd.readouterr())
    assert "LOAD REPORT" not in shown + caplog.text and "%" not in shown
    assert [record.getMessage() for record in caplog.records] == [
        f"{clip_folder} is a CLIP checkpoint: added 3 video proxies (proxy_init='class_token') "
        "and a temporal embedding of 12 frames, zero at the start"
    ]


def test_a_save_shows_nothing(clip_folder, tmp_path, capfd, caplog):
    model = CLIPViPModel.from_pretrained(clip_folder)
    capfd.readouterr(), caplog.clear()
    model.save_pretrained(tmp_path)
    assert "".join(capfd.readouterr()) + caplog.text == ""


@pytest.mark.parametrize("told", [{"activation": "gelu"}, {"head_width": 32}], ids=str)
def test_what_a_given_configuration_says_is_not_told_twice(make_model, tmp_path, told):
    model = make_model()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    (name,) = told
    with pytest.raises(ValueError, match=rf"config says the {name}; leave out {name}"):
        CLIPViPModel.from_pretrained(tmp_path / "x.pt", config=model.config, **told)
    CLIPViPModel.from_pretrained(tmp_path / "x.pt", config=model.config)


def test_heads_that_the_kernel_does_not_take_are_left_to_the_reference(model_folder):
    damage_config(model_folder, {"vision_config.num_attention_heads": 32})
    with pytest.raises(ValueError, match=r'heads of 4 .*attention_backend="reference"') as error:
        CLIPViPModel.from_pretrained(model_folder)
    assert model_folder.name in str(error.value) and "\n" not in str(error.value)
    model = CLIPViPModel.from_pretrained(model_folder, attention_backend="reference")
    model.get_video_features(torch.zeros(1, 2, 3, 32, 32))
