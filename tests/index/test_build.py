"""Properties of embedding a collection into an index, and of keeping the index up to date."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipvip import cli
from clipvip.index import VideoIndex
from clipvip.index import build as module
from clipvip.index.build import build as build_index
from clipvip.index.captions import key_of
from clipvip.index.store import Store
from clipvip.index.tables import is_index

LATIN = os.fsdecode(b"caf\xe9.mp4")
# One process, and features that do not depend on the batch.
PLAIN = {"num_workers": 0, "device": "cpu", "mixed_precision": "no"}
ODD = ["[dQw4w9WgXcQ].mp4", "it's 100%.mp4", "red\x1b[31m\n.mp4", "a\u202eb.mp4", LATIN]


def write_clip(path, colour, seconds=0.75, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(round(8 * seconds)):
            image = np.full((size, size, 3), colour, np.uint8)
            image[: number % size] = 255 - number % 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def models(save_model, tmp_path_factory):
    """The folders of two models."""
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for seed, folder in enumerate(folders):
        save_model(folder, seed)
    return folders


@pytest.fixture(scope="module")
def model(models):
    return models[0]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    for name, colour in {"a": (220, 30, 30), "b": (30, 200, 30), "deep/c": (40, 40, 230)}.items():
        write_clip(folder / f"{name}.mp4", colour)
    write_clip(folder / "film.mp4", (90, 90, 90), seconds=23)
    return folder


@pytest.fixture
def videos(drawn, tmp_path):
    """Three clips, in a folder of the test's own."""
    folder = tmp_path / "videos"
    shutil.copytree(drawn, folder)
    (folder / "film.mp4").unlink()
    return folder


@pytest.fixture
def film(drawn, videos):
    """A film of 23 s beside them."""
    return Path(shutil.copy2(drawn / "film.mp4", videos))


@pytest.fixture
def build(model, tmp_path):
    def run(videos, out=tmp_path / "index", model=model, **options):
        return build_index(out, model, videos, **{**PLAIN, **options})

    return run


@pytest.fixture
def embedded(monkeypatch):
    """Names of the files that builds decode and embed from now on."""
    names = []
    embed = module.embed_files

    def spy(model, processor, files, *rest, **options):
        names.extend(os.path.basename(path) for path, _ in files)
        return embed(model, processor, files, *rest, **options)

    monkeypatch.setattr(module, "embed_files", spy)
    return names


def held(where):
    """Name of each file of an index → its spans and vectors."""
    store = Store.open(where)
    moments, vectors = store.of_files(sorted(store.files()))
    found = {}
    for moment, vector in zip(moments, vectors, strict=True):
        spans, rows = found.setdefault(os.path.basename(moment.file.path), ([], []))
        spans.append((moment.start, moment.end))
        rows.append(vector)
    return {name: (spans, np.array(rows)) for name, (spans, rows) in found.items()}


def same(one, other):
    return one[0] == other[0] and np.array_equal(one[1], other[1])


def test_each_moment_has_the_feature_of_its_span(build, model, film, videos, tmp_path):
    from clipvip.data.video import read_frames
    from clipvip.embedding import load_for_embedding

    Image.new("RGB", (40, 30), "red").save(videos / "red.png")
    assert build([videos, videos / "red.png"])[:4] == (5, 0, 0, 0)
    network, processor = load_for_embedding(model)
    rows = held(tmp_path / "index")
    assert rows["film.mp4"][0] == [(0.0, 10.0), (5.0, 15.0), (10.0, 20.0), (13.0, 23.0)]
    assert all(rows[name][0] == [(None, None)] for name in ("a.mp4", "c.mp4", "red.png"))
    for name, (spans, vectors) in rows.items():
        path = next(videos.rglob(name))
        for (start, end), vector in zip(spans, vectors, strict=True):
            frames = read_frames(path, processor.num_frames, start=start, end=end, size=32)
            with torch.no_grad():
                alone = network.get_video_features(**processor(videos=[frames]))
            torch.testing.assert_close(
                torch.from_numpy(vector), F.normalize(alone[0], dim=-1), atol=1e-3, rtol=0
            )
    states = {os.path.basename(x): y for x, y in Store.open(tmp_path / "index").files().items()}
    assert states["film.mp4"].duration == 23 and states["red.png"].duration == 0
    assert states["film.mp4"].date == film.stat().st_mtime_ns / 1e9


def test_search_finds_what_was_added(build, videos, film, tmp_path):
    build(videos)
    hits = VideoIndex(tmp_path / "index").search("a red square")
    assert {os.path.basename(hit.path) for hit in hits} == {"a.mp4", "b.mp4", "c.mp4", "film.mp4"}


def test_only_new_and_changed_files_are_embedded(build, videos, film, embedded, tmp_path):
    build(videos)
    before = held(tmp_path / "index")
    version = Store.open(tmp_path / "index").version()
    embedded.clear()
    assert build(videos)[:4] == (0, 4, 0, 0) and not embedded
    assert Store.open(tmp_path / "index").version() == version  # nothing was written

    os.rename(film, videos / "deep" / "renamed.mp4")
    os.utime(videos / "b.mp4", ns=(1, 1))
    shutil.copy(videos / "a.mp4", videos / "copy.mp4")
    (videos / "deep" / "c.mp4").unlink()
    write_clip(videos / "d.mp4", (250, 250, 20))
    assert build(videos)[:4] == (1, 1, 3, 1)
    assert embedded == ["d.mp4"]
    after = held(tmp_path / "index")
    assert sorted(after) == ["a.mp4", "b.mp4", "copy.mp4", "d.mp4", "renamed.mp4"]
    assert same(after["renamed.mp4"], before["film.mp4"])
    assert same(after["copy.mp4"], before["a.mp4"]) and same(after["b.mp4"], before["b.mp4"])
    assert build(videos)[:4] == (0, 5, 0, 0)

    write_clip(videos / "a.mp4", (1, 2, 3))
    assert build(videos)[:4] == (1, 4, 0, 0)
    assert not same(held(tmp_path / "index")["a.mp4"], before["a.mp4"])


def test_files_of_equal_content_are_read_once(build, videos, embedded, tmp_path):
    for name in ("x.mp4", "y.mp4"):
        shutil.copy(videos / "a.mp4", videos / name)
    assert build(videos).embedded == 5
    assert len(embedded) == 3
    rows = held(tmp_path / "index")
    assert same(rows["a.mp4"], rows["x.mp4"]) and same(rows["a.mp4"], rows["y.mp4"])


def test_an_index_is_the_union_of_all_that_was_embedded(build, videos, tmp_path):
    write_clip(tmp_path / "more" / "d.mp4", 90)
    build(videos / "deep")
    build([tmp_path / "more", videos / "a.mp4"])
    assert sorted(held(tmp_path / "index")) == ["a.mp4", "c.mp4", "d.mp4"]
    sources = {os.path.realpath(x) for x in (videos / "deep", tmp_path / "more", videos / "a.mp4")}
    assert set(Store.open(tmp_path / "index").about.sources) == sources
    shutil.move(videos, tmp_path / "unplugged")
    shutil.rmtree(tmp_path / "more")
    assert build(tmp_path / "unplugged" / "b.mp4")[:4] == (1, 0, 0, 0)
    assert len(held(tmp_path / "index")) == 4


def test_another_window_divides_the_named_long_files_again(build, videos, film, embedded, tmp_path):
    build(videos)
    embedded.clear()
    assert build(videos / "a.mp4", window=4).unchanged == 1
    assert build(videos, window=12, stride=12)[:2] == (1, 3) and embedded == ["film.mp4"]
    assert held(tmp_path / "index")["film.mp4"][0] == [(0.0, 12.0), (11.0, 23.0)]


def test_clips_of_annotations_are_moments_as_they_are(build, videos, film, embedded, tmp_path):
    file = videos / "clips.jsonl"
    lines = [{"video": "film.mp4", "start": 2, "end": 5}, {"video": "film.mp4", "end": 1.5}]
    lines += [{"video": "a.mp4"}, {"video": "gone.mp4"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    added = build(file)
    rows = held(tmp_path / "index")
    assert rows["film.mp4"][0] == [(None, 1.5), (2.0, 5.0)] and len(rows) == 2
    assert [os.path.basename(bad["path"]) for bad in added.bad_files] == ["gone.mp4"]
    embedded.clear()
    assert build([file, film])[:2] == (1, 1) and embedded == ["film.mp4", "film.mp4", "gone.mp4"]
    spans = held(tmp_path / "index")["film.mp4"][0]
    assert spans == [(None, 1.5), (0.0, 10.0), (2.0, 5.0), (5.0, 15.0), (10.0, 20.0), (13.0, 23.0)]


def captions(where):
    """Name and span of each moment that has a caption → the caption, as a search finds it."""
    hits = VideoIndex(where).search("a square", 50)
    store = Store.open(where)
    every = store.moments(sorted(store.files()))
    known = {key_of(m.file, m.start, m.end): m for m in every}
    texts = store.captions.of(known)
    assert all(
        hit.caption == texts.get(key_of(hit.moment.file, hit.start, hit.end)) for hit in hits
    )
    return {
        (os.path.basename(known[key].file.path), known[key].start, known[key].end): text
        for key, text in texts.items()
    }


def test_moments_get_the_captions_of_annotations(build, videos, film, tmp_path, capsys):
    file, where = videos / "clips.jsonl", tmp_path / "index"
    (videos / "link").symlink_to("deep")

    def annotate(*lines):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return build(file)

    span = {"video": "film.mp4", "start": 2, "end": 5}
    given = [
        {"video": "a.mp4", "text": ["a red square", "a square"]},
        {"video": "a.mp4", "text": "too late"},
        {"video": "b.mp4"},
        {"video": "b.mp4", "caption": "a green square", "text": "other"},
        {"video": "link/c.mp4", "subtitle": "spoken", "text": "blue"},
        {**span, "caption": "a grey film"},
        {"video": "film.mp4", "text": "a whole film"},
    ]
    annotate(*given)
    expected = {
        ("a.mp4", None, None): "a red square",
        ("b.mp4", None, None): "a green square",
        ("c.mp4", None, None): "blue",
        ("film.mp4", 2.0, 5.0): "a grey film",
    }
    said = capsys.readouterr().err
    assert captions(where) == expected
    assert "8 moments, 4 with a caption (4 files new)\n" in said
    assert "  captions of 1 video are not shown, as they are of the whole video" in said

    assert build(videos)[:2] == (1, 3)  # a folder says nothing about captions; the film's span goes
    del expected["film.mp4", 2.0, 5.0]
    assert captions(where) == expected
    os.rename(videos / "a.mp4", videos / "renamed.mp4")
    shutil.copy(videos / "b.mp4", videos / "copy.mp4")
    build(videos)
    expected["renamed.mp4", None, None] = expected.pop(("a.mp4", None, None))
    expected["copy.mp4", None, None] = "a green square"
    assert captions(where) == expected
    write_clip(videos / "renamed.mp4", (9, 9, 9))
    (videos / "copy.mp4").unlink()
    build(videos)
    del expected["renamed.mp4", None, None], expected["copy.mp4", None, None]
    assert captions(where) == expected

    # Without embedding anything again, annotations are read anew.
    assert annotate({"video": "b.mp4", "text": "new"}, {"video": "deep/c.mp4"}).embedded == 0
    assert captions(where) == {("b.mp4", None, None): "new"}
    assert VideoIndex(where).captions == 1
    annotate({"video": "film.mp4", "text": "a whole film"})
    assert VideoIndex(where).captions == 1
    build(file, window=30)
    assert captions(where)["film.mp4", None, None] == "a whole film"
    assert VideoIndex(where).remove(film) == 1 and VideoIndex(where).captions == 1


def save_captioner(model, folder):
    """Save a model with a small decoder, whose captions are of random words."""
    from transformers import GPT2Config

    from clipvip.model import CLIPViPForCaptioning, CLIPViPModel, CLIPViPProcessor

    base = CLIPViPModel.from_pretrained(model)
    text = base.config.text_config
    torch.manual_seed(0)
    shapes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": text.vocab_size}
    ends = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
    decoder = GPT2Config(**shapes, **ends, pad_token_id=text.eos_token_id, n_positions=20)
    decoder.is_decoder = decoder.add_cross_attention = True
    CLIPViPForCaptioning.with_decoder(base, decoder, "proxies").save_pretrained(folder)
    CLIPViPProcessor.from_pretrained(model).save_pretrained(folder)


def test_a_model_describes_what_annotations_do_not(build, model, videos, film, tmp_path, capsys):
    own, where = tmp_path / "captioner", tmp_path / "index"
    save_captioner(model, own)
    (videos / "broken.mp4").write_bytes(b"no video at all")
    line = {"video": "a.mp4", "text": "a red square"}
    (videos / "clips.jsonl").write_text(json.dumps(line))
    shutil.copy(videos / "b.mp4", videos / "soon broken.mp4")
    build([videos, videos / "clips.jsonl"])
    state = (videos / "soon broken.mp4").stat()
    (videos / "soon broken.mp4").write_bytes(b"x" * state.st_size)
    os.utime(videos / "soon broken.mp4", ns=(state.st_mtime_ns, state.st_mtime_ns))

    options = {"num_workers": 0, "device": "cpu", "mixed_precision": "no", "beams": 2, "length": 4}
    done = VideoIndex(where).describe(own, **options)
    assert done.written + done.empty == 6 and done.written and done.kept == 1
    (bad,) = done.bad_files
    assert bad["path"] == str(videos / "soon broken.mp4") and bad["reason"]
    found = captions(where)
    assert len(found) == done.written + 1 and found["a.mp4", None, None] == "a red square"
    assert VideoIndex(where).describe(own, **options).kept == len(found)

    capsys.readouterr()
    cli.describe(str(own), index=str(where), overwrite=True, length=4)
    said = capsys.readouterr().err
    assert "describing 8 of 8 moments\n" in said and "1 file unreadable)\n" in said
    with pytest.raises(ValueError, match="has no decoder"):
        cli.describe(str(model), index=str(where))
    with pytest.raises(ValueError, match="no index in"):
        cli.describe(str(own), index=str(tmp_path / "none"))
    for wrong in ({"index": "index", "videos": ("a",)}, {"overwrite": True, "videos": ("a",)}, {}):
        with pytest.raises(ValueError, match=r"expected videos|leave videos|is for an index"):
            cli.describe(str(own), **wrong)


def test_captions_are_saved_with_their_files(build, videos, film, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    file = videos / "clips.jsonl"
    names = ["a.mp4", "b.mp4", "deep/c.mp4", "film.mp4"]
    file.write_text("".join(json.dumps({"video": x, "text": f"of {x}"}) + "\n" for x in names))

    def interrupted(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(file, progress=interrupted, batch_size=1)
    found = captions(tmp_path / "index")
    assert len(found) == len(held(tmp_path / "index")) > 0
    assert all(text.endswith(name) for (name, *_), text in found.items())


def test_bad_files_are_listed_until_they_are_mended(build, videos, tmp_path, capsys):
    (videos / "broken.mp4").write_bytes(b"no video at all")
    assert build(videos).embedded == 3
    said = capsys.readouterr().err
    assert "index: 3 files, 2 s, 3 moments (3 files new, 1 unreadable)\n" in said
    assert f"  unreadable: {videos / 'broken.mp4'}: " in said
    (bad,) = Store.open(tmp_path / "index").bad_files()
    assert bad["path"] == str(videos / "broken.mp4") and bad["reason"]
    build(videos / "a.mp4")
    assert Store.open(tmp_path / "index").bad_files() == [bad]
    shutil.copy(videos / "b.mp4", videos / "broken.mp4")
    assert build(videos)[:4] == (0, 3, 1, 0)
    assert not Store.open(tmp_path / "index").bad_files()
    # What an index says of a file that has become unreadable is no longer true.
    (videos / "broken.mp4").write_bytes(b"again no video")
    build(videos)
    assert len(held(tmp_path / "index")) == 3

    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"none of 1 file in .*only could be read; the first: "):
        build(tmp_path / "only", tmp_path / "other")
    assert not is_index(tmp_path / "other")


def test_names_of_any_bytes_are_found_again(build, videos, embedded, tmp_path, capsys):
    for number, name in enumerate(ODD):
        write_clip(videos / "plain.mp4", 20 + 40 * number)
        os.rename(videos / "plain.mp4", videos / name)
    (videos / os.fsdecode(b"broken\xff.mp4")).write_bytes(b"no video at all")
    build(videos)
    assert "\x1b" not in capsys.readouterr().err
    assert set(ODD) < set(held(tmp_path / "index"))
    embedded.clear()
    assert build(videos).unchanged == 3 + len(ODD)
    assert embedded == ["broken\udcff.mp4"]
    assert [x["path"] for x in Store.open(tmp_path / "index").bad_files()] == [
        str(videos / "broken\udcff.mp4")
    ]


def test_names_that_no_file_can_have_cost_themselves_alone(build, videos, tmp_path):
    lines = [b"a.mp4", b"nul\0.mp4", b"x" * 300 + b".mp4", b"f\0lder/b.mp4", b"\xff.mp4"]
    (videos / "list.txt").write_bytes(b"\n".join(lines))
    records = [{"video": "b.mp4"}, {"video": "nul\0.mp4"}, {"video": "half\ud83d.mp4"}]
    records += [{"video": "y" * 300 + "/c.mp4"}, {"vidoe": "deep/c.mp4"}]
    with (videos / "clips.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (videos / "binary.txt").write_bytes(bytes(range(256)) * 10)
    os.mkfifo(videos / "pipe.mp4")
    (videos / "zero.mp4").symlink_to("/dev/zero")
    (videos / "gone.mkv").symlink_to("nowhere")
    for _ in range(2):
        added = build([videos, *sorted(videos.iterdir())])
        assert sorted(held(tmp_path / "index")) == ["a.mp4", "b.mp4", "c.mp4"]
        bad = [os.path.relpath(file["path"], videos) for file in added.bad_files]
        assert len(set(bad)) == len(bad)
        assert set(bad) == {
            *("nul\0.mp4", "x" * 300 + ".mp4", "f\0lder/b.mp4", "\udcff.mp4"),
            *("half\\ud83d.mp4", "y" * 300 + "/c.mp4", "clips.jsonl:5", "binary.txt"),
            *("pipe.mp4", "zero.mp4", "gone.mkv"),
        }
        assert len(Store.open(tmp_path / "index").bad_files()) == len(bad)


def test_an_interrupted_build_keeps_what_is_done(build, videos, film, embedded, tmp_path):
    def interrupted(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(videos, progress=interrupted, batch_size=1)
    done = len(held(tmp_path / "index"))
    assert 0 < done < 4
    assert build(videos)[:2] == (4 - done, done)


def test_files_that_another_build_puts_meanwhile_are_not_read(
    build, videos, film, embedded, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    others = []

    def while_embedding(progress):
        if not others:
            others.append(1)
            build([videos / "a.mp4", film, videos / "deep"])

    assert build(videos, progress=while_embedding, batch_size=1)[:2] in ((1, 3), (2, 2))
    assert len(held(tmp_path / "index")) == 4


def test_a_file_that_changes_while_it_is_read_is_left_to_the_next_build(build, videos, tmp_path):
    added = build(videos, progress=lambda progress: os.utime(videos / "b.mp4", ns=(5, 5)))
    assert added.embedded == 2
    assert added.bad_files == [{"path": str(videos / "b.mp4"), "reason": module.CHANGED}]
    assert build(videos).embedded == 1


def test_progress_counts_files_moments_and_bytes(build, videos, film):
    told = []
    build(videos, progress=told.append, batch_size=2)
    assert told[-1][:4] == (4, 4, 1.0, 7)
    assert [x.moments for x in told] == sorted(x.moments for x in told)


def test_an_index_of_another_model_or_of_something_else_is_refused(
    build, models, videos, tmp_path, monkeypatch
):
    build(videos / "a.mp4")
    with pytest.raises(ValueError, match=r"is an index made with the model .*; give another --out"):
        build(videos, model=models[1])
    own = tmp_path / "own"
    shutil.copytree(models[0], own)
    build(videos / "a.mp4", tmp_path / "other", model=own)
    shutil.copy(models[1] / "model.safetensors", own)
    with pytest.raises(ValueError, match="has changed since"):
        build(videos, tmp_path / "other", model=own)

    monkeypatch.setattr(module, "load_for_embedding", None)  # errors below come before a model
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mine holds 'a.mp4' and no index"):
        build(videos, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"'gone.mp4' does not exist"):
        build("gone.mp4", tmp_path / "new")
    with pytest.raises(ValueError, match="out is empty; expected the folder of an index"):
        build(videos, "")
    with pytest.raises(ValueError, match="stride is 5 s, longer than the window"):
        build(videos, tmp_path / "new", window=2, stride=5)
    assert not (tmp_path / "new").exists()


def test_a_moved_model_embeds_nothing_again(build, models, videos, embedded, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(models[1], own)
    build(videos, model=own)
    shutil.move(own, tmp_path / "moved")
    embedded.clear()
    with pytest.raises(ValueError, match="is no longer there"):
        build(videos, model=None)
    assert build(videos, model=tmp_path / "moved").unchanged == 3 and not embedded
    assert build(videos, model=None).unchanged == 3
    assert len(VideoIndex(tmp_path / "index").search("a square")) == 3


def test_features_that_are_not_finite_become_no_rows(build, model, videos, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    own = tmp_path / "own"
    shutil.copytree(model, own)
    weights = load_file(own / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].sign() * 3e38
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights give no finite features for any of 3 files"):
        build(videos, model=own)
    assert not is_index(tmp_path / "index")

    embed = module.embed_files

    def one_not_finite(*given, **options):
        for number, file in enumerate(embed(*given, **options)):
            yield file._replace(vectors=file.vectors * (float("inf") if number == 1 else 1))

    monkeypatch.setattr(module, "embed_files", one_not_finite)
    assert build(videos).bad_files == [{"path": str(videos / "b.mp4"), "reason": module.NOT_FINITE}]
    monkeypatch.setattr(module, "embed_files", embed)
    assert build(videos)[:2] == (1, 2)


def test_a_full_disk_leaves_the_index_as_last_saved(build, videos, film, tmp_path, monkeypatch):
    put, saves = Store.put, [0]
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)

    def full(store, files):
        saves[0] += 1
        if saves[0] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(store, files)

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(OSError, match=r"cannot be saved \(No space left .*\); it stays as last"):
        build(videos, batch_size=1)
    monkeypatch.setattr(Store, "put", put)
    done = len(held(tmp_path / "index"))
    assert done >= 1
    assert build(videos)[:2] == (4 - done, done)


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(module, "build", lambda *names, **options: given.append((names, options)))
    cli.embed("model", ("videos",), window=4.0, scenes=True, mixed_precision="bf16")
    options = {"window": 4.0, "scenes": True, "decoder": "auto", "mixed_precision": "bf16"}
    assert given == [(("index", "model", ("videos",)), options)]
    with pytest.raises(ValueError, match="--tokens writes one file per clip; leave --stride out"):
        cli.embed("model", ("videos",), tokens=True, stride=2.0)


def test_builds_in_several_processes(model, videos, film, tmp_path):
    """Killed, two at once, and two ranks: see builds.py."""
    for number in range(4):
        write_clip(videos / f"{number}.mp4", 40 * number + 20)
    script = Path(__file__).parent / "builds.py"
    command = [sys.executable, script, tmp_path / "index", model, videos]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("index-ranks: 8 files") == 1  # only the first rank reports
    build_index(tmp_path / "alone", model, videos, **PLAIN)
    alone = held(tmp_path / "alone")
    for way in ("kill", "both", "ranks"):
        found = held(tmp_path / f"index-{way}")
        assert found.keys() == alone.keys() and len(found) == 8
        for name, (spans, vectors) in found.items():
            assert spans == alone[name][0]
            np.testing.assert_allclose(vectors, alone[name][1], atol=2e-3)
