"""Properties of embedding videos into an index and of searching it."""

import errno
import json
import os
import shutil
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipvip import cli, files
from clipvip.files import only_run
from clipvip.index import old as index_module
from clipvip.index.old import Index, IndexedClip, build_index, load_index, search
from clipvip.index_files import write_index


def write_clip(path, colour, frames=6, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        image = np.full((size, size, 3), colour, np.uint8)
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def save_model(folder, seed, plain=False, **vision):
    """A small model and its processor; plain: CLIP as transformers has it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    torch.manual_seed(seed)
    towers = {
        "text_config": {
            **tower,
            "vocab_size": len(tokens),
            "max_position_embeddings": 60,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "vision_config": {**tower, "image_size": 32, "patch_size": 16},
        "projection_dim": 16,
    }
    video = {"num_frames": 2, "attention_backend": "reference", **vision}
    model = (
        CLIPModel(CLIPConfig(**towers)) if plain else CLIPViPModel(CLIPViPConfig(**towers, **video))
    )
    model.save_pretrained(folder)
    CLIPViPProcessor(tokenizer, image_size=32, num_frames=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for name, colour in {"a": (220, 30, 30), "b": (30, 200, 30), "deep/c": (40, 40, 230)}.items():
        write_clip(folder / f"{name}.mp4", colour)
    return folder


@pytest.fixture
def build(model, tmp_path):
    def run(videos, out=tmp_path / "index", model=model):
        options = {"num_workers": 0, "device": "cpu", "mixed_precision": "no"}
        return build_index(model, videos, out, **options)

    return run


@pytest.fixture
def embedded(monkeypatch):
    """Names of the files that builds decode and embed from now on."""
    names = []
    embed = index_module._embed

    def spy(model, processor, clips, *rest):
        names.extend(os.path.basename(clip.path) for clip in clips)
        return embed(model, processor, clips, *rest)

    monkeypatch.setattr(index_module, "_embed", spy)
    return names


def names(index):
    return [os.path.basename(clip.path) for clip in index.clips]


def content(folder):
    """Every file of a folder and what is in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LATIN = os.fsdecode(b"caf\xe9.mp4")
ODD = ["[dQw4w9WgXcQ].mp4", "[b].mp4", "red\x1b[31m\n.mp4", "a\u202eb.mp4", LATIN]


def test_an_index_in_bf16_ranks_as_one_in_fp32(model, videos, tmp_path):
    """Either can be updated in the other's precision."""
    given = {"num_workers": 0, "device": "cpu"}
    exact, near = (
        build_index(model, videos, tmp_path / name, mixed_precision=name, **given)
        for name in ("no", "bf16")
    )
    assert not near.embeddings.equal(exact.embeddings)
    assert F.cosine_similarity(near.embeddings, exact.embeddings).min() >= 0.99
    for query in ("a red dog", "blue"):
        ranked = [[hit.path for hit in index.search(query)] for index in (exact, near)]
        assert ranked[0] == ranked[1]

    write_clip(videos / "d.mp4", (200, 200, 40))
    updated = build_index(model, videos, tmp_path / "no", mixed_precision="bf16", **given)
    rows = dict(zip(updated.clips, updated.embeddings, strict=True))
    for clip, row in zip(exact.clips, exact.embeddings, strict=True):
        assert rows[clip].equal(row)
    assert len(rows) == len(exact.clips) + 1


def test_the_command_passes_the_precision_on(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        index_module, "build_index", lambda *names, **options: given.append(options)
    )
    cli.embed("model", ("videos",), tmp_path, mixed_precision="bf16")
    assert given == [{"decoder": "auto", "mixed_precision": "bf16"}]


def test_a_folder_is_embedded_recursively_as_the_model_embeds_it(build, model, videos, tmp_path):
    from clipvip.data.video import read_frames
    from clipvip.model import CLIPViPModel, CLIPViPProcessor

    (videos / "notes.txt").write_text("not a video")
    index = build(videos)
    assert [os.path.relpath(clip.path, videos) for clip in index.clips] == [
        "a.mp4",
        "b.mp4",
        os.path.join("deep", "c.mp4"),
    ]
    assert torch.equal(load_index(tmp_path / "index").embeddings, index.embeddings)

    network, processor = (
        CLIPViPModel.from_pretrained(model),
        CLIPViPProcessor.from_pretrained(model),
    )
    frames = read_frames(videos / "b.mp4", processor.num_frames, size=32)
    with torch.no_grad():
        alone = network.get_video_features(**processor(videos=[frames]))
    torch.testing.assert_close(index.embeddings[1], F.normalize(alone[0], dim=-1))


def test_search_ranks_by_cosine_best_first(build, videos, tmp_path):
    index = build(videos)
    hits = search(tmp_path / "index", "a red square", k=10)
    assert sorted(hit.path for hit in hits) == sorted(videos.rglob("*.mp4"))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(-1.001 <= hit.score <= 1.001 for hit in hits)
    assert search(index, "a red square", k=2) == hits[:2]
    # Longer than the model reads: cut, not an error.
    assert search(index, "word " * 2_000_000, k=10**30) == search(index, "word " * 200)
    assert search(index, " " * 20_000 + "a red square\0") == search(index, "a red square\0")


def test_a_name_of_any_bytes_is_found_again(build, embedded, tmp_path):
    write_clip(tmp_path / "plain.mp4", 200)
    for name in ODD:
        shutil.copy(tmp_path / "plain.mp4", tmp_path / name)
    (tmp_path / os.fsdecode(b"broken\xff.mp4")).write_bytes(b"no video at all")
    (tmp_path / "plain.mp4").unlink()
    index = build(tmp_path)
    assert sorted(names(index)) == sorted(ODD)
    kept = load_index(tmp_path / "index")
    assert kept.clips == index.clips
    assert [bad["path"] for bad in kept.bad_files] == [str(tmp_path / "broken\udcff.mp4")]
    embedded.clear()
    assert build(tmp_path).clips == index.clips
    assert embedded == ["broken\udcff.mp4"]
    assert {hit.path.name for hit in search(index, "a square")} == set(ODD)


def test_names_and_queries_are_shown_as_they_are(build, tmp_path, monkeypatch, capsys):
    write_clip(tmp_path / "plain.mp4", 200)
    for name in ODD:
        shutil.copy(tmp_path / "plain.mp4", tmp_path / name)
    build([tmp_path / name for name in ODD])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    cli.search("[/b] [red]\x1b[2J :smile:", tmp_path / "index")
    said = capsys.readouterr().out
    assert r"[/b] [red]\x1b[2J :smile:" in said
    shown = ("[dQw4w9WgXcQ].mp4", "[b].mp4", r"red\x1b[31m\n.mp4", r"a\u202eb.mp4", r"caf\xe9.mp4")
    assert all(f" {name} " in said for name in shown)

    monkeypatch.setattr("sys.argv", ["clipvip", "embed", "no\x1b[2J model", "[b].mp4"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b" not in capsys.readouterr().err


def test_an_index_grows_by_other_videos_and_loses_none_unasked(build, videos, embedded, tmp_path):
    write_clip(tmp_path / "more" / "d.mp4", 90)
    build(videos / "deep")
    for others in (tmp_path / "more", videos / "a.mp4"):
        with pytest.raises(ValueError, match=r"an index of .*deep; 1 of its clips would be lost"):
            build(others)
    embedded.clear()
    assert names(build([tmp_path / "more", videos / "deep"])) == ["d.mp4", "c.mp4"]
    assert names(build([videos, tmp_path / "more"])) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert embedded == ["d.mp4", "a.mp4", "b.mp4"]

    (videos / "a.mp4").unlink()
    (tmp_path / "more" / "d.mp4").unlink()  # files that are deleted are not missed
    assert names(build([videos / "b.mp4", videos / "deep"])) == ["b.mp4", "c.mp4"]
    shutil.move(videos, tmp_path / "unplugged")
    with pytest.raises(ValueError, match="2 of its clips would be lost"):
        build(tmp_path / "unplugged" / "b.mp4")


def test_everybody_may_read_an_index_whom_the_umask_lets(build, videos, tmp_path):
    old = os.umask(0o022)
    try:
        build(videos)
    finally:
        os.umask(old)
    for path in (tmp_path / "index").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_a_model_that_moved_is_reported_and_taken_where_it_is(build, videos, embedded, tmp_path):
    own = save_model(tmp_path / "own", seed=1)
    before = build(videos, model=own)
    shutil.move(own, tmp_path / "moved")
    with pytest.raises(ValueError, match=f"the model {own} .* is no longer there; .*clipvip embed"):
        search(tmp_path / "index", "a square")
    with pytest.raises(FileNotFoundError, match=f"the model is '{own}', which does not exist; "):
        build(videos, model=own)
    embedded.clear()
    after = build(videos, model=tmp_path / "moved")
    assert not embedded and torch.equal(after.embeddings, before.embeddings)
    assert len(search(tmp_path / "index", "a square")) == 3


def test_plain_clip_is_embedded_and_searched_alike_at_each_load(build, videos, tmp_path):
    plain = save_model(tmp_path / "plain", seed=3, plain=True)
    torch.manual_seed(0)
    hits = build(videos, model=plain).search("a square")
    torch.manual_seed(1)
    assert search(tmp_path / "index", "a square") == hits
    again = build(videos, tmp_path / "again", model=plain)
    assert torch.equal(again.embeddings, load_index(tmp_path / "index").embeddings)


def test_an_index_never_mixes_poolings(build, videos, tmp_path):
    own = save_model(tmp_path / "own", seed=1)
    build(videos, model=own)
    save_model(own, seed=1, frame_pooling="mean")
    with pytest.raises(ValueError, match="has changed since"):
        build(videos, model=own)


def test_only_new_and_changed_files_are_embedded_again(build, videos, embedded):
    first = build(videos)
    assert build(videos).clips == first.clips
    assert embedded == ["a.mp4", "b.mp4", "c.mp4"]
    embedded.clear()

    write_clip(videos / "d.mp4", (250, 250, 20))
    os.utime(videos / "b.mp4", ns=(1, 1))
    (videos / "a.mp4").unlink()
    second = build(videos)
    assert sorted(embedded) == ["b.mp4", "d.mp4"]
    assert [os.path.basename(clip.path) for clip in second.clips] == ["b.mp4", "d.mp4", "c.mp4"]
    torch.testing.assert_close(second.embeddings[[0, 2]], first.embeddings[[1, 2]])


def test_a_build_that_dies_resumes_where_it_saved(build, videos, embedded, monkeypatch):
    monkeypatch.setattr(index_module, "SAVE_SECONDS", 0.0)
    spied = index_module._embed

    def dying(*arguments):
        model, processor, clips, bad_files, options = arguments
        single = options | {"batch_size": 1}
        for number, rows in enumerate(spied(model, processor, clips, bad_files, single)):
            if number == 2:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(index_module, "_embed", dying)
    with pytest.raises(KeyboardInterrupt):
        build(videos)
    embedded.clear()
    monkeypatch.setattr(index_module, "_embed", spied)
    assert len(build(videos).clips) == 3
    assert len(embedded) < 3


def test_a_second_build_into_a_folder_is_refused_and_names_the_first(
    build, videos, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "HERE_WAIT", 0.1)
    before = build(videos)
    told = rf"another run embeds there .*process {os.getpid()}"
    with only_run(tmp_path / "index", "embeds"), pytest.raises(ValueError, match=told):
        build(videos)
    assert build(videos).clips == before.clips


def test_bad_files_are_listed_and_left_out(build, videos, tmp_path):
    (videos / "broken.mp4").write_bytes(b"no video at all")
    index = build(videos)
    assert len(index.clips) == 3
    listed = json.loads((tmp_path / "index" / "bad_files.jsonl").read_text())
    assert listed["path"] == str(videos / "broken.mp4") and listed["reason"]

    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"none of 1 clips .* could be read"):
        build(tmp_path / "only", tmp_path / "other")


def test_an_image_is_a_video_of_one_frame_and_other_files_of_a_list_may_be_missing(build, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "list.txt").write_text("gone.mp4\nred.png\n")
    index = build(tmp_path / "list.txt")
    assert names(index) == ["red.png"]
    assert [os.path.basename(bad["path"]) for bad in index.bad_files] == ["gone.mp4"]


def test_clips_of_an_annotations_file_keep_their_times(build, videos, tmp_path):
    lines = [{"video": "a.mp4", "start": 0.25, "end": 0.5}, {"video": "a.mp4"}]
    lines += [{"video": "a.mp4"}, {"video": "gone.mp4"}]
    file = videos / "clips.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = build(file)
    assert [(clip.start, clip.end) for clip in index.clips] == [(0.25, 0.5), (None, None)]
    assert [os.path.basename(bad["path"]) for bad in index.bad_files] == ["gone.mp4"]
    assert {hit[2:] for hit in search(index, "a square")} == {(0.25, 0.5), (None, None)}


def test_a_changed_model_is_refused(build, videos, tmp_path):
    own = save_model(tmp_path / "own", seed=1)
    build(videos, model=own)
    save_model(own, seed=2)
    with pytest.raises(ValueError, match="has changed since"):
        search(tmp_path / "index", "a square")
    with pytest.raises(ValueError, match="has changed since"):
        build(videos, model=own)


def test_an_index_of_something_else_is_refused(build, videos, tmp_path):
    build(videos)
    with pytest.raises(ValueError, match=r"is an index of .*; 2 of its clips would be lost"):
        build(videos / "deep")
    with pytest.raises(ValueError, match="is an index made with the model"):
        build(videos, model=save_model(tmp_path / "own", seed=1))
    with pytest.raises(ValueError, match="no index in"):
        search(tmp_path / "nowhere", "a square")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos in"):
        build(tmp_path / "empty", tmp_path / "new")


def test_sources_and_folder_are_checked_before_the_model_is_loaded(
    build, videos, tmp_path, monkeypatch
):
    def refused(*given, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(index_module, "_load", refused)
    with pytest.raises(ValueError, match="does not exist"):
        build("gone.mp4")
    assert not (tmp_path / "index").exists()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "a.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{tmp_path / 'index'} holds 'a.mp4' and no index"):
        build(videos)
    assert content(tmp_path / "index") == {"a.mp4": b"x"}


@pytest.mark.parametrize(
    ("query", "k", "said"),
    [(" ", 1, "query is empty"), ("a", 0, "k is 0"), ("a caf\udce9", 1, "is not UTF-8")],
)
def test_a_query_without_sense_is_refused(build, videos, query, k, said):
    with pytest.raises(ValueError, match=said):
        search(build(videos), query, k)


def test_an_index_lies_in_a_folder_of_any_name(build, videos, tmp_path):
    out = tmp_path / os.fsdecode(b"caf\xe9 [/b]\n")
    build(videos, out)
    assert len(search(out, "a", 9)) == len(load_index(out).embeddings) == 3


def test_the_same_build_again_writes_nothing(build, videos, tmp_path):
    (videos / "broken.mp4").write_bytes(b"no video at all")
    build(videos)
    before = content(tmp_path / "index")
    for _ in range(2):
        build(videos)
        assert content(tmp_path / "index") == before
    assert [bad["path"] for bad in load_index(tmp_path / "index").bad_files] == [
        str(videos / "broken.mp4")
    ]


@pytest.mark.parametrize("which", ["embeddings", "clips"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_the_same_build_again_repairs_an_index(
    build, videos, tmp_path, embedded, caplog, which, damage
):
    before = build(videos)
    (file,) = (tmp_path / "index").glob(which + "-*")
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(data[: len(data) // 2 * (damage == "cut")])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        load_index(tmp_path / "index")
    with pytest.raises(
        ValueError, match=f"{file.name} is damaged .* name everything that it should hold"
    ):
        build(videos / "a.mp4")
    embedded.clear()
    caplog.clear()
    assert build(videos).clips == before.clips
    assert embedded == ["a.mp4", "b.mp4", "c.mp4"]
    assert any(
        f"{file.name} is damaged" in message and "are embedded again" in message
        for message in caplog.messages
    )
    after = load_index(tmp_path / "index")
    assert torch.equal(after.embeddings, before.embeddings)
    assert len(content(tmp_path / "index")) == 5


def test_rows_of_another_length_are_embedded_again(build, videos, tmp_path):
    before = build(videos)
    wide = F.pad(before.embeddings, (0, 4))
    write_index(replace(before, embeddings=wide), tmp_path / "index")
    with pytest.raises(ValueError, match="have 20 values each, those of its model 16"):
        search(tmp_path / "index", "a square")
    assert torch.equal(build(videos).embeddings, before.embeddings)


def in_cache(model, cache, name):
    """Put a model into a cache of the hub."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, folder / "snapshots" / ("0" * 40))


@pytest.fixture
def network(monkeypatch):
    """Requests to the network. Each fails, which a library may catch, and is noted here."""
    import socket

    from huggingface_hub import constants

    asked = []

    def refused(*given, **options):
        asked.append(given)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    # Like a user's machine: online, and no answer of the hub is kept from earlier.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", os.devnull + "/none", raising=False)
    detect = sys.modules.get("huggingface_hub.utils._detect_agent")
    if detect is not None:
        monkeypatch.setattr(detect, "_registry", None)
    return asked


def test_search_takes_models_from_this_machine_alone(
    build, model, videos, tmp_path, monkeypatch, network
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    built = build(videos)

    def rename_model(name):
        write_index(replace(built, model=name), tmp_path / "index")

    hits = search(tmp_path / "index", "a square")

    shutil.copytree(model, tmp_path / "someone" / "model")  # brought along with an index
    monkeypatch.chdir(tmp_path)
    rename_model("someone/model")
    with pytest.raises(ValueError, match=r"is not on this machine.*hf download someone/model"):
        search(tmp_path / "index", "a square")
    for name in (
        "../model",
        "./someone/model",
        "a/b/c",
        "https://evil/x",
        "--model",
        "",
        "a\0",
        "\ud83d",
    ):
        rename_model(name)
        with pytest.raises(ValueError, match=r"index names no model that may be loaded") as error:
            search(tmp_path / "index", "a square")
        assert str(error.value).isprintable() and "hf download" not in str(error.value)
    rename_model("/a\0\ud83d")
    with pytest.raises(ValueError, match="is no longer there"):
        search(tmp_path / "index", "a square")

    in_cache(model, tmp_path / "cache", "someone/model")
    rename_model("someone/model")
    monkeypatch.chdir("/")
    assert search(tmp_path / "index", "a square") == hits
    assert not network


def test_an_index_made_by_hub_name_is_searched_without_the_network(
    build, model, videos, tmp_path, monkeypatch, network
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    in_cache(model, tmp_path / "cache", "someone/model")
    by_path = build(videos, tmp_path / "by_path")
    load = index_module._load
    with monkeypatch.context() as patch:
        patch.setattr(
            index_module,
            "_load",
            lambda name, device: load(name, device, local_files_only=True),
        )
        built = build(videos, model="someone/model")  # by name, as when it was just fetched
    assert built.model == "someone/model"
    assert built.fingerprint == by_path.fingerprint
    network.clear()
    assert search(tmp_path / "index", "a square") == search(by_path, "a square")
    assert not network


def test_features_that_are_not_finite_become_no_rows(build, videos, tmp_path, monkeypatch, model):
    from safetensors.torch import load_file, save_file

    own = tmp_path / "own"
    shutil.copytree(model, own)
    weights = load_file(own / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].sign() * 3e38
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights give no finite features for any of 3 clips"):
        build(videos, model=own)
    assert [*content(tmp_path / "index")] == [".lock"]

    embed = index_module._embed

    def one_not_finite(*arguments):
        for rows in embed(*arguments):
            yield {
                clip: row * (float("inf") if clip.path.endswith("b.mp4") else 1)
                for clip, row in rows.items()
            }

    monkeypatch.setattr(index_module, "_embed", one_not_finite)
    index = build(videos)
    assert names(index) == ["a.mp4", "c.mp4"]
    assert index.bad_files == [{"path": str(videos / "b.mp4"), "reason": index_module.NOT_FINITE}]
    monkeypatch.setattr(index_module, "_embed", embed)
    assert names(build(videos)) == ["a.mp4", "b.mp4", "c.mp4"]


def test_a_query_without_finite_features_is_refused():
    class Model:
        def get_text_features(self, **inputs):
            return torch.full((1, 16), float("nan"))

    clips = [IndexedClip(f"/videos/{row}.mp4", None, 1.5, 9, 7) for row in range(3)]
    index = Index("/models/mine", "0" * 64, ["/videos"], torch.eye(3, 16), clips)
    index.__dict__["_encoder"] = Model(), lambda text: {}
    with pytest.raises(ValueError, match="gives the query no finite features"):
        index.search("a")


def test_a_full_disk_leaves_the_index_as_it_was(build, videos, tmp_path, monkeypatch):
    before = build(videos)
    there = content(tmp_path / "index")
    write_clip(videos / "d.mp4", 90)
    fsync, room = os.fsync, [0]

    def full(descriptor):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    for steps in (1, 4, 6, 9):  # the lock's note is the first
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            room[0] = steps
            with pytest.raises(
                OSError, match=r"cannot be saved .*No space left on device"
            ) as error:
                build(videos)
        assert "\n" not in str(error.value)
        assert load_index(tmp_path / "index").clips == before.clips
    assert there.keys() - content(tmp_path / "index").keys() == set()
    assert len(build(videos).clips) == 4
    assert len(content(tmp_path / "index")) == len(there)


def test_a_full_disk_at_the_first_save_claims_none(build, videos, tmp_path, monkeypatch):
    def full(index, out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = index_module.write_index
    monkeypatch.setattr(index_module, "write_index", full)
    with pytest.raises(OSError, match=r"cannot be saved \(No space .*\); no clip is saved yet: "):
        build(videos)
    monkeypatch.setattr(index_module, "write_index", write)
    build(videos / "a.mp4")
    monkeypatch.setattr(index_module, "write_index", full)
    with pytest.raises(OSError, match=r"\); it stays as last saved: "):
        build(videos)


def test_an_empty_out_is_reported(build, videos):
    with pytest.raises(ValueError, match="out is empty; expected the folder of an index"):
        build(videos, "")


def test_a_query_is_read_as_utf8_in_a_locale_of_ascii(build, videos):
    index = build(videos)
    held = "café a".encode().decode("ascii", "surrogateescape")  # as Python holds arguments there
    assert index.search(held) == index.search("café a")


def test_names_that_no_file_can_have_cost_themselves_alone(build, videos, tmp_path):
    lines = [b"a.mp4", b"nul\0.mp4", b"x" * 300 + b".mp4", b"f\0lder/b.mp4", b"\xff.mp4"]
    (videos / "list.txt").write_bytes(b"\n".join(lines))
    records = [
        {"video": "b.mp4"},
        {"video": "nul\0.mp4"},
        {"video": "half\ud83d.mp4"},
        {"video": "y" * 300 + "/c.mp4"},
        {"vidoe": "deep/c.mp4"},
        {"video": "deep/c.mp4", "start": 0.25},
    ]
    with (videos / "clips.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (videos / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (videos / "binary.jsonl").write_bytes(bytes(range(256)) * 10)
    (videos / "texts.txt").write_text("a red square")
    os.mkfifo(videos / "pipe.mp4")
    os.mkfifo(videos / "pipe.txt")
    (videos / "zero.mp4").symlink_to("/dev/zero")
    (videos / "gone.mkv").symlink_to("nowhere")
    for given in (videos / "*", [videos, *sorted(videos.iterdir())]):
        out = tmp_path / str(len(str(given)))
        index = build(given, out)
        assert sorted(set(names(index))) == ["a.mp4", "b.mp4", "c.mp4"]
        assert load_index(out).bad_files == index.bad_files
        bad = [os.path.relpath(file["path"], videos) for file in index.bad_files]
        assert len(set(bad)) == len(bad)
        assert set(bad) == {
            *("nul\0.mp4", "x" * 300 + ".mp4", "f\0lder/b.mp4", "\udcff.mp4"),
            *("half\ud83d.mp4", "y" * 300 + "/c.mp4", "clips.jsonl:5"),
            *("binary.txt", "binary.jsonl", "texts.txt"),
            *("pipe.mp4", "pipe.txt", "zero.mp4", "gone.mkv"),
        }
        assert build(given, out).bad_files == index.bad_files


def test_weights_with_another_activation_are_another_model(build, videos, model, tmp_path):
    """No weight differs, but every feature does."""
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    build([videos], model=folder)
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has changed since this index was made"):
        search(tmp_path / "index", "a red clip")
