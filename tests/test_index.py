"""Properties of the search index."""

import json
import os
import shutil

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipvip import cli
from clipvip import index as index_module
from clipvip.files import only_run
from clipvip.index import build_index, load_index, search


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
        return build_index(model, videos, out, num_workers=0, device="cpu")

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


def test_a_folder_is_embedded_recursively_as_the_model_embeds_it(build, model, videos, tmp_path):
    from clipvip.data.decode import read_frames
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
    assert search(index, "word " * 200, k=1)  # longer than the model reads: cut, not an error


def names(index):
    return [os.path.basename(clip.path) for clip in index.clips]


LATIN = os.fsdecode(b"caf\xe9.mp4")
ODD = ["[dQw4w9WgXcQ].mp4", "[b].mp4", "red\x1b[31m\n.mp4", "a\u202eb.mp4", LATIN]


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


def test_linked_folders_are_searched_once_and_other_files_are_counted(
    build, videos, tmp_path, capsys
):
    write_clip(tmp_path / "elsewhere" / "d.mp4", 90)
    (videos / "linked").symlink_to(tmp_path / "elsewhere")
    (videos / "circle").symlink_to(videos)
    for other in ("a.srt", "b.SRT", "linked/c.nfo", "photo.jpg", "._a.mp4"):
        (videos / other).write_bytes(b"")
    found = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert names(build(videos)) == found
    assert "4 other files skipped: 2 .srt, 1 .jpg, 1 .nfo\n" in capsys.readouterr().err
    for given in (
        f"{videos}/**/*.mp4",
        f"{videos}/**",
        [videos / "circle", videos, videos / "deep"],
    ):
        assert sorted(names(build(given, tmp_path / str(hash(str(given)))))) == found


def test_files_folders_patterns_and_lists_are_embedded_alike(build, videos, tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (videos / "clips.jsonl").write_text('{"video": "a.mp4", "end": 0.5}\n')
    shutil.copy(videos / "b.mp4", videos / LATIN)
    lines = [b"b.mp4", b"", b"gone.mp4", b"caf\xe9.mp4", os.fsencode(tmp_path / "red.png")]
    (videos / "list.txt").write_bytes(b"\r\n".join(lines))
    (videos / "empty").mkdir()
    given = ["red.png", "videos/[de]*", "videos/[ab].mp4", "videos/clips.jsonl", "videos/list.txt"]
    monkeypatch.chdir(tmp_path)
    index = build(given)
    assert names(index) == ["red.png", "c.mp4", "a.mp4", "b.mp4", "a.mp4", LATIN]
    assert [clip.end for clip in index.clips] == [None] * 4 + [0.5, None]
    assert [os.path.basename(bad["path"]) for bad in index.bad_files] == ["gone.mp4"]

    os.rename(videos / "a.mp4", videos / "[ab].mp4")  # a name goes before a pattern
    assert names(build(videos / "[ab].mp4", tmp_path / "literal")) == ["[ab].mp4"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gone.mp4", "'gone.mp4' does not exist; expected videos, "),
        ("", "'' does not exist"),
        (["videos", "none/*.mkv"], r"'none/\*.mkv' matches nothing; expected videos, "),
        (["videos", "empty"], "no videos in empty; looked for "),
        (["videos", "em*"], r"no videos in em\*; looked for "),
        ("notes.srt", "no videos in notes.srt; looked for .*; 1 other file skipped: 1 .srt"),
        ("captions.txt", "captions.txt names no file; .* not 'a red square'"),
        ([], "no videos were named"),
    ],
)
def test_what_matches_nothing_is_told(build, videos, tmp_path, monkeypatch, given, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.srt").write_text("")
    (tmp_path / "captions.txt").write_text("a red square\na blue one\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        build(given)
    assert not (tmp_path / "index").exists()


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


def test_a_model_that_moved_is_told_and_taken_where_it_is(build, videos, embedded, tmp_path):
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


def test_a_build_that_dies_goes_on_where_it_saved(build, videos, embedded, monkeypatch):
    monkeypatch.setattr(index_module, "SAVE_SECONDS", 0.0)
    spied = index_module._embed

    def dying(*arguments):
        model, processor, clips, _, *rest = arguments
        for number, rows in enumerate(spied(model, processor, clips, 1, *rest)):
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


def test_a_second_build_into_a_folder_is_told_of_the_first(build, videos, tmp_path):
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


@pytest.mark.parametrize("content", [b"", b"{", bytes(64)], ids=repr)
def test_damaged_embeddings_are_told_in_one_line(build, videos, tmp_path, content):
    build(videos)
    (file,) = (tmp_path / "index").glob("embeddings-*")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*make it again") as error:
        load_index(tmp_path / "index")
    assert "\n" not in str(error.value)
