"""A source gives the same model in every process, on every device and in every dtype."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from clipvip.embedding import load_for_embedding, precision_on
from clipvip.index import VideoIndex
from clipvip.index.build import build
from clipvip.index.store import Store
from clipvip.model import CLIPViPModel, pretrained
from clipvip.model.pretrained import check_finite
from clipvip.training.evaluate import evaluate_checkpoint

ADDED = "vision_model.embeddings.added_cls"


@pytest.fixture
def plain(clip_folder, tokenizer, tmp_path):
    """A plain CLIP with its tokenizer, and three images to embed beside it."""
    folder = tmp_path / "plain"
    CLIPModel.from_pretrained(clip_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = []
    for name, colour in {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (9, 9, 240)}.items():
        pixels = np.full((40, 60, 3), colour, np.uint8)
        pixels[10:20, 5:45] = 255 - pixels[10:20, 5:45]
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        rows.append(json.dumps({"video": f"{name}.png", "text": f"a {name} one"}) + "\n")
    (tmp_path / "clips.jsonl").write_text("".join(rows))
    return folder


@pytest.mark.parametrize("proxy_init", ["class_token", "normal"])
def test_what_clip_lacks_is_the_same_however_it_is_loaded(clip_folder, proxy_init):
    def load(seed, **options):
        torch.manual_seed(seed)
        return CLIPViPModel.from_pretrained(clip_folder, proxy_init=proxy_init, **options)

    expected = load(0).state_dict()
    for seed, options in enumerate(
        (
            {"strict": False},
            {"ignore_mismatched_sizes": True},
            {"device_map": "cpu"},
            {"low_cpu_mem_usage": True},
            {"image_size": 40},
            {"dtype": torch.bfloat16},
            {"dtype": torch.float16, "device_map": {"": "cpu"}},
        )
    ):
        actual = load(seed, **options).state_dict()[ADDED]
        # "class_token" adds two numbers in the model's dtype.
        rounding = {"rtol": torch.finfo(actual.dtype).eps, "atol": torch.finfo(actual.dtype).eps}
        exact = proxy_init == "normal" or actual.dtype == torch.float32
        given = {"rtol": 0, "atol": 0} if exact else rounding
        torch.testing.assert_close(actual, expected[ADDED].to(actual.dtype), **given)


def test_other_proxies_than_those_of_a_checkpoint_are_the_same_each_time(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shape: .*added_cls is \[3, 128\] in the checkpoint"):
        CLIPViPModel.from_pretrained(tmp_path, num_proxies=6)
    first, again = [], []
    for seed, into in enumerate((first, again)):
        torch.manual_seed(seed)
        given = {"num_proxies": 6, "num_frames": 5, "ignore_mismatched_sizes": True}
        into += CLIPViPModel.from_pretrained(tmp_path, **given).state_dict().items()
    for (name, this), (_, other) in zip(first, again, strict=True):
        assert torch.equal(this, other), name


def test_random_numbers_are_drawn_for_missing_weights_only(clip_folder, monkeypatch):
    drawn, randn = [], torch.randn

    def spy(*size, **options):
        drawn.append(size)
        return randn(*size, **options)

    monkeypatch.setattr(torch, "randn", spy)
    CLIPViPModel.from_pretrained(clip_folder)
    monkeypatch.undo()
    assert [size for size in drawn if size != (128,)] == [(torch.Size([3, 128]),)]


def embed_and_evaluate(model, clips, out):
    """Write an index and figures of a plain CLIP, and the weights that it has with proxies."""
    build(out / "index", model, [str(clips)], num_workers=0, device="cpu")
    store = Store.open(out / "index")
    (out / "vectors").write_bytes(store.of_files(sorted(store.files()))[1].tobytes())
    evaluate_checkpoint(model, clips, out=out / "figures.json", num_workers=0, print_table=False)
    weights = CLIPViPModel.from_pretrained(model).state_dict().values()
    (out / "weights").write_bytes(b"".join(weight.numpy().tobytes() for weight in weights))


def test_another_process_writes_the_same_bytes(plain, tmp_path):
    given = plain, tmp_path / "clips.jsonl"
    script = "import pathlib, sys, test_loading as test\n"
    script += "test.embed_and_evaluate(*map(pathlib.Path, sys.argv[1:]))"
    search = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": search}
    other = subprocess.Popen(
        [sys.executable, "-c", script, *given, tmp_path / "other"], env=environment
    )
    embed_and_evaluate(*given, tmp_path / "own")
    assert other.wait() == 0
    for written in ("vectors", "figures.json", "weights"):
        own, others = ((tmp_path / x / written).read_bytes() for x in ("own", "other"))
        assert own == others, written


@pytest.fixture
def stored(clip_folder, tmp_path):
    """Store a plain CLIP's weights in dtypes by glob of their names, and one in config.json."""

    def store(dtypes, named):
        model = CLIPModel.from_pretrained(clip_folder)
        folder = tmp_path / "stored"
        model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        for part, dtype in dtypes.items():
            weights |= {name: w.to(dtype) for name, w in weights.items() if part in name}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype", None)
        config |= {"torch_dtype": named} if named else {}
        (folder / "config.json").write_text(json.dumps(config))
        return folder, weights

    return store


@pytest.mark.parametrize(
    ("dtypes", "named", "expected"),
    [
        ({}, None, torch.float32),
        ({"": torch.float16}, None, torch.float16),
        ({"": torch.bfloat16}, None, torch.bfloat16),
        ({"": torch.float16}, "float32", torch.float32),
        ({}, "bfloat16", torch.bfloat16),
        ({"": torch.float16, "norm": torch.float32}, None, torch.float16),
        ({"": torch.float16, "logit_scale": torch.float32}, None, torch.float32),
    ],
    ids=str,
)
def test_weights_are_loaded_in_transformers_dtype(stored, dtypes, named, expected):
    """That of config.json; if it names none, that of the first weight. dtype= overrides both."""
    folder, weights = stored(dtypes, named)
    model = CLIPViPModel.from_pretrained(folder)
    assert model.dtype == CLIPModel.from_pretrained(folder).dtype == expected
    for loaded, dtype in (
        (model, expected),
        (CLIPViPModel.from_pretrained(folder, dtype=torch.float32), torch.float32),
    ):
        state = loaded.state_dict()
        assert {weight.dtype for weight in state.values()} == {dtype}
        for name, weight in weights.items():
            assert torch.equal(state[name], weight.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_embed_evaluate_and_search_on_a_cpu(plain, tmp_path, dtype):
    half = tmp_path / "half"
    CLIPModel.from_pretrained(plain).to(dtype).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((plain / name).read_bytes())
    whole, halved = load_for_embedding(plain)[0], load_for_embedding(half)[0]
    assert halved.dtype == dtype
    clips, found = tmp_path / "clips.jsonl", {}
    for source in (plain, half):
        out = tmp_path / f"index of {source.name}"
        build(out, source, [str(clips)], num_workers=0, device="cpu")
        figures = evaluate_checkpoint(source, clips, num_workers=0, print_table=False)
        hits = VideoIndex(out).search("a red one", 3)
        store = Store.open(out)
        vectors = torch.from_numpy(store.of_files(sorted(store.files()))[1])
        found[source] = vectors, torch.tensor(sorted(hit.score for hit in hits))
        chosen = precision_on(whole if source == plain else halved, "auto")
        assert figures["mixed_precision"] == chosen and figures["clips"] == 3
    assert whole.dtype == torch.float32
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    for this, other in zip(found[half], found[plain], strict=True):
        torch.testing.assert_close(this.float(), other.float(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_found_wherever_it_is(dtype, value):
    for shape in ((), (1,), (7,), (1000,), (33, 65), (4, 3, 5, 5)):
        weight = torch.randn(shape, dtype=dtype)
        model = torch.nn.ParameterDict({"a": torch.randn(5), "b": weight})
        check_finite("source", model)
        for at in {0, weight.numel() // 2, weight.numel() - 1}:
            kept = weight.flatten()[at].item()
            weight.view(-1)[at] = value
            with pytest.raises(ValueError, match=r"1 weights are not finite, the first is b"):
                check_finite("source", model)
            weight.view(-1)[at] = kept


def test_large_weights_are_finite():
    """Although their norm is not, in their own dtype."""
    large = [
        torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    check_finite("source", torch.nn.ParameterList([*large, *map(torch.neg, large)]))


def test_what_the_hub_cannot_say_is_not_taken_for_absent(monkeypatch, tmp_path):
    asked = []

    def unreachable(*given, local_files_only=False, **options):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    monkeypatch.setattr(pretrained, "_UNREACHED", set())
    hub = {"cache_dir": str(tmp_path)}
    for _ in range(2):
        with pytest.raises(LocalEntryNotFoundError):
            pretrained.cached("who/what", "processor_config.json", hub)
    assert asked == [False, True]  # the connection is tried once

    snapshot = tmp_path / "models--who--what" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert pretrained.cached("who/what", "processor_config.json", hub) is None
