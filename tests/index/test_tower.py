"""Properties of the text tower in NumPy: it computes what the model does, or it is not used."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from clipvip.index.tower import (
    PROBES,
    TextTower,
    UnusualModel,
    describe,
    load_description,
    save_description,
)

TEXTS = [
    *PROBES,
    "a cat",
    "dog dog dog 12",
    "é" * 30,
    "   x",
    "&lt;b&gt;",
    "<|endoftext|> dog",
    "\n",
]


def relative_error(tower, model, processor, text):
    with torch.inference_mode():
        expected = model.get_text_features(**processor(text=text))[0].numpy()
    expected = expected / np.linalg.norm(expected)
    return np.linalg.norm(tower.embed(text) - expected)


@pytest.mark.parametrize("by_torch", [False, True, "without oneDNN's own order"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_act": "gelu", "num_attention_heads": 1, "layer_norm_eps": 1e-3},
        {"eos_token_id": 2, "num_attention_heads": 8, "num_hidden_layers": 1},
        {"shard": "20KB"},
    ],
    ids=["usual", "gelu", "old-end-token", "shards"],
)
def test_a_tower_computes_what_the_model_does(save_model, tmp_path, options, by_torch, monkeypatch):
    if isinstance(by_torch, str):
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    model, processor = save_model(tmp_path, **options)
    description = describe(model, processor, tmp_path)
    saved = load_description(json.loads(json.dumps(save_description(description))))
    tower = TextTower(saved, tmp_path, bool(by_torch))
    assert tower.width == 16
    assert max(relative_error(tower, model, processor, text) for text in TEXTS) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_computed_with_in_fp32(save_model, tmp_path, dtype):
    model, processor = save_model(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    tower = TextTower(describe(model, processor, tmp_path), tmp_path)
    assert max(relative_error(tower, model.float(), processor, text) for text in TEXTS) <= 2e-6


def test_token_ids_are_those_of_the_processor(save_model, tmp_path):
    model, processor = save_model(tmp_path)
    tower = TextTower(describe(model, processor, tmp_path), tmp_path)
    draw = random.Random(0)
    letters = "dogcat12 \t\n'’.,!&;<>|éÉßñ北京🙂́‍﷽İſÅΩ\u00a0\u2028\x00\x7f"
    parts = [
        *letters,
        "&amp;",
        "&amp;lt;",
        "<|endoftext|>",
        "<|startoftext|>",
        "don't",
        "  ",
        "dog",
    ]
    texts = ["".join(draw.choices(parts, k=draw.randrange(30))) for _ in range(200)]
    for text in texts:
        assert tower.tokens(text) == processor(text=text)["input_ids"][0].tolist(), repr(text)


def test_what_the_model_does_differently_has_no_tower(save_model, tmp_path):
    model, processor = save_model(tmp_path)
    assert describe(model, processor, tmp_path) is not None

    model.text_model.config.is_causal = False
    assert describe(model, processor, tmp_path) is None
    del model.text_model.config.is_causal

    model.config.text_config.hidden_act = "gelu_new"
    assert describe(model, processor, tmp_path) is None
    model.config.text_config.hidden_act = "gelu"  # the layers have quick_gelu
    assert describe(model, processor, tmp_path) is None
    model.config.text_config.hidden_act = "quick_gelu"

    with torch.no_grad():  # other weights than those in the folder
        model.text_projection.weight[0, 0] += 0.1
    assert describe(model, processor, tmp_path) is None


def test_damaged_files_make_no_tower(save_model, tmp_path):
    model, processor = save_model(tmp_path)
    description = describe(model, processor, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 4], b"\xff" * 100, b"PK" + whole):
        file.write_bytes(damaged)
        with pytest.raises(UnusualModel):
            tower = TextTower(description, tmp_path)
            tower.embed("a dog")
    file.unlink()
    with pytest.raises(UnusualModel):
        TextTower(description, tmp_path)
    file.write_bytes(whole)
    with pytest.raises(UnusualModel):
        TextTower(replace(description, heads=5), tmp_path)
    with pytest.raises(UnusualModel):
        TextTower(replace(description, layers=3), tmp_path)


@pytest.mark.parametrize("change", [{"heads": "2"}, {"length": 1.5}, {"more": 1}, {"end": True}])
def test_a_description_of_other_types_is_refused(save_model, tmp_path, change):
    model, processor = save_model(tmp_path)
    content = save_description(describe(model, processor, tmp_path)) | change
    with pytest.raises(ValueError):
        load_description(content)
