"""Properties of queries: only the index's own model embeds them, and how it is known again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipvip.embedding import fingerprint
from clipvip.index import query as query_module
from clipvip.index.query import (
    Encoder,
    files_of,
    model_here,
    note_model,
    noted_fingerprint,
    notes,
)
from clipvip.index.rows import About


@pytest.fixture(scope="module")
def loaded(save_model, tmp_path_factory):
    """A folder, and the model and processor in it."""
    folder = tmp_path_factory.mktemp("model")
    return folder, *save_model(folder)


@pytest.fixture
def model(loaded, tmp_path, monkeypatch):
    """A copy of the folder, which no note names yet, and what the index says of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in loaded[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, About(str(folder), fingerprint(*loaded[1:]), 16, ("/videos",))


def note(folder, loaded):
    note_model(folder, files_of(folder), *loaded[1:], fingerprint(*loaded[1:]))


def text_vector(loaded, text):
    with torch.inference_mode():
        return F.normalize(loaded[1].get_text_features(**loaded[2](text=text)), dim=-1)[0].numpy()


def test_a_noted_model_embeds_a_sentence_without_torch(model, loaded):
    folder, about = model
    note(folder, loaded)
    program = (
        "import sys, json; from clipvip.index import VideoIndex; "
        "from clipvip.index.query import Encoder; from clipvip.index.rows import About; "
        f"vector = Encoder(About(*{tuple(about)!r})).vector('a dog'); "
        "assert not {'torch', 'transformers'} & set(sys.modules); "
        "print(json.dumps(vector.tolist()))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert np.allclose(json.loads(found.stdout), text_vector(loaded, "a dog"), atol=1e-6)


def test_a_model_is_noted_by_its_first_search(model, loaded, monkeypatch):
    folder, about = model
    assert noted_fingerprint(folder) is None
    first = Encoder(about).vector("a dog")
    assert noted_fingerprint(folder) == about.fingerprint

    def load(*_, **__):
        raise AssertionError("loaded again")

    monkeypatch.setattr("clipvip.embedding.load_for_embedding", load)
    assert np.allclose(Encoder(about).vector("a dog"), first, atol=1e-6)


@pytest.mark.parametrize("how", ["weights", "tokenizer", "settings", "new file"])
def test_a_changed_file_voids_the_note(model, loaded, how):
    folder, _ = model
    note(folder, loaded)
    assert noted_fingerprint(folder) is not None
    names = {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}
    file = folder / names.get(how, "processor_config.json" if how == "settings" else "merges.txt")
    status = file.stat() if file.exists() else None
    content = bytearray(file.read_bytes() if status else b"x")
    content[-1] ^= 1
    file.write_bytes(content)
    if status:  # size and time of modification stay as they were
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert noted_fingerprint(folder) is None


def test_another_model_in_its_place_is_refused(model, loaded, save_model):
    folder, about = model
    note(folder, loaded)
    save_model(folder, seed=1)
    for _ in range(2):  # noted, the second time
        with pytest.raises(ValueError, match="has changed since this index was made"):
            Encoder(about).vector("a dog")


def test_weights_replaced_during_the_load_are_not_noted(model, loaded):
    folder, _ = model
    before = files_of(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    note_model(folder, before, *loaded[1:], "0" * 64)
    assert noted_fingerprint(folder) is None


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": 1']
)
def test_a_damaged_note_counts_as_none(model, loaded, damage):
    folder, _ = model
    note(folder, loaded)
    (file,) = (notes() / "models").iterdir()
    file.write_bytes(damage)
    assert noted_fingerprint(folder) is None


def test_search_works_where_nothing_can_be_noted(model, loaded, monkeypatch, tmp_path):
    folder, about = model
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.allclose(Encoder(about).vector("a dog"), text_vector(loaded, "a dog"), atol=1e-6)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert notes() is None and noted_fingerprint(folder) is None
    note(folder, loaded)


def test_queries_add_up_by_their_weights(model, loaded):
    folder, about = model
    note(folder, loaded)
    encoder = Encoder(about)
    texts = ["a dog", "a cat", "12"]
    weights = [1.0, -0.5, 2.0]
    vectors = np.stack([text_vector(loaded, text) for text in texts])
    expected = np.array(weights) @ vectors
    expected /= np.linalg.norm(expected)
    assert np.allclose(encoder.combined(texts, weights), expected, atol=1e-6)
    assert np.allclose(encoder.combined(["a dog"], [-3.0]), -vectors[0], atol=1e-6)
    assert np.allclose(encoder.combined(texts, None), encoder.combined(texts, [7.0] * 3), atol=1e-6)

    for given, shares, wrong in [
        ([], None, "no query"),
        (texts, [1.0], "1 weights are given for 3"),
        (["a dog", "a dog"], [1.0, -1.0], "cancel"),
        (["a dog"], [0.0], "cancel"),
        (["a dog"], [float("nan")], "expected numbers"),
        (["  "], None, "empty"),
        (["a \ud83d"], None, "not UTF-8"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            encoder.combined(given, shares)
    with pytest.raises(TypeError, match="is a int"):
        encoder.combined([3], None)


def test_images_and_videos_have_the_features_of_the_model(model, loaded, tmp_path, real_clips):
    folder, about = model
    note(folder, loaded)
    encoder = Encoder(about)
    image = Image.effect_noise((60, 40), 90).convert("RGB")
    image.save(tmp_path / "image.png")
    video = real_clips["bikes"]
    with torch.inference_mode():
        features = loaded[1].get_video_features(**loaded[2](videos=[image, video]))
    of_image, of_video = F.normalize(features, dim=-1).numpy()
    assert np.allclose(encoder.vector(image), of_image, atol=1e-5)
    assert np.allclose(encoder.vector(tmp_path / "image.png"), of_image, atol=1e-5)
    assert np.allclose(encoder.vector(video), of_video, atol=1e-5)
    mixed = encoder.combined([image, "a dog"], None)
    assert np.linalg.norm(mixed) == pytest.approx(1, abs=1e-6)

    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for path, wrong in [("bad.mp4", "cannot be searched with"), ("no.mp4", "is no file")]:
        with pytest.raises(ValueError, match=wrong):
            encoder.vector(tmp_path / path)


def test_weights_that_give_no_numbers_are_reported(model, loaded, monkeypatch):
    folder, about = model
    note(folder, loaded)
    monkeypatch.setattr(query_module.TextTower, "embed", lambda *_: np.full(16, np.nan, np.float32))
    with pytest.raises(ValueError, match="no finite features for 'a dog'"):
        Encoder(about).vector("a dog")


def test_a_damaged_width_is_reported(model, loaded):
    folder, about = model
    note(folder, loaded)
    with pytest.raises(ValueError, match="17 values each, those of its model 16"):
        Encoder(about._replace(width=17)).vector("a dog")


def test_only_models_of_this_machine_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name, wrong in [
        ("here", "not on this machine"),  # a name on the hub, not this folder
        ("./here", "names no model that may be loaded"),
        ("../x/here", "names no model that may be loaded"),
        ("someone/model", "hf download someone/model"),
        (str(tmp_path / "gone"), "no longer there.*clipvip embed MODEL /videos"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            model_here(name, ("/videos",))
    assert model_here(str(tmp_path / "here"), ()) == str(tmp_path / "here")
