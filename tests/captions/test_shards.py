"""Properties of captioning shards: what is copied, changed, left out and refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from clipvip.captions import Asking, Captioner, caption
from clipvip.captions.captioner import Answer
from clipvip.data.annotations import load_annotations
from clipvip.data.loading import LoaderError
from clipvip.data.shards import ShardError, load_manifest, verify_shards, write_shards

HERE = {"num_workers": 0, "device": "cpu", "mixed_precision": "no", "max_bad_share": 0.3}
ASKING = Asking(length=8)


@pytest.fixture
def shards(annotations, tmp_path) -> Path:
    """Ten clips in three tars."""
    write_shards(annotations, tmp_path / "in", clips_per_shard=4, num_workers=0, max_bad_share=0.2)
    return tmp_path / "in"


@pytest.fixture
def run(captioners, tmp_path):
    """run(shards, out, **options) → Summary"""

    def run(source, out="out", **options):
        options = {"asking": ASKING, "batch_size": 3, **HERE, **options}
        return caption(str(captioners["git"]), source, tmp_path / out, **options)

    return run


@pytest.fixture
def say(monkeypatch):
    """say(text) lets captioners say this for every clip; say(None) forbids to ask them."""

    def say(text):
        def answer(self, inputs, counts):
            assert text is not None or not counts
            return [Answer(text, False) for _ in counts]

        monkeypatch.setattr(Captioner, "answer", answer)

    return say


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                found[f"{path.name}/{info.name}"] = tar.extractfile(info).read()
    return found


def repack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def manifest(folder: Path) -> dict[str, dict]:
    text = (folder / "manifest.jsonl").read_text()
    return {record["shard"]: record for record in map(json.loads, text.splitlines())}


def test_only_captions_differ(shards, run, tmp_path):
    done = run(shards)
    before, after = members(shards), members(tmp_path / "out")
    assert list(after) == list(before)
    for name, data in before.items():
        if not name.endswith(".json"):
            assert after[name] == data
            continue
        old, new = json.loads(data), json.loads(after[name])
        assert {**new, "caption": None} == {**old, "caption": None}
        if "caption" in old:
            assert after[name] == data
    captions = sum("caption" in json.loads(after[name]) for name in after if name.endswith("json"))
    assert done.clips == 10 and done.captioned + done.kept == captions and done.kept == 1
    found = manifest(tmp_path / "out")
    assert sum(shard["captions"] for shard in found.values()) == captions
    clips, bad = verify_shards(str(tmp_path / "out"), num_workers=0)  # compares all checksums
    assert clips == 10 and not bad


def test_captions_of_shards_are_those_of_their_annotations(shards, run, annotations, tmp_path):
    run(shards)
    run(annotations, "out.jsonl")
    by_line = {clip.line: clip.caption for clip in load_annotations(tmp_path / "out.jsonl")}
    compared = 0
    for name, data in members(tmp_path / "out").items():
        if name.endswith(".json"):
            record = json.loads(data)
            assert record.get("caption") == by_line[record["source"]["line"]]
            compared += "caption" in record
    assert compared > 4


def test_neither_batches_nor_workers_change_shards(shards, run, tmp_path):
    run(shards)
    for number, options in enumerate(({"batch_size": 1}, {"num_workers": 2}, {"batch_size": 16})):
        run(shards, f"other-{number}", **options)
        assert members(tmp_path / f"other-{number}") == members(tmp_path / "out")
        assert manifest(tmp_path / f"other-{number}") == manifest(tmp_path / "out")


def test_finished_shards_are_kept(shards, run, tmp_path, say, monkeypatch):
    with monkeypatch.context():
        run(shards, "one")
        write, written = Captioner.answer, []

        def failing(self, inputs, counts):
            written.append(counts)
            if len(written) == 5:
                raise RuntimeError("the GPU is gone")
            return write(self, inputs, counts)

        monkeypatch.setattr(Captioner, "answer", failing)
        with pytest.raises(RuntimeError, match="gone"):
            run(shards)
        monkeypatch.setattr(Captioner, "answer", write)
    out = tmp_path / "out"
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(kept) < 3 and not (out / "manifest.jsonl").exists()
    (out / "00002.tar.partial").write_bytes(b"left by a killed run")
    with (out / ".finished-00001.jsonl").open("w") as file:
        file.write('{"shard": "00002.t')
    done = run(shards)
    for name, time in kept.items():
        assert (out / name).stat().st_mtime_ns == time
    assert 0 < done.earlier < 10
    assert done.captioned + done.kept + done.earlier + done.left_out.total() == 10
    assert manifest(out) == manifest(tmp_path / "one")
    names = {".lock", "manifest.jsonl", "settings.json", *manifest(out)}
    assert {path.name for path in out.iterdir()} == names
    say(None)
    again = run(shards)
    assert (again.captioned, again.kept, again.earlier) == (0, 0, 10)
    assert "10 are in shards that an earlier run finished" in again.lines(8)[0]


def test_other_options_and_other_shards_are_refused(shards, run, tmp_path):
    run(shards)
    with pytest.raises(ShardError, match="made with length=8"):
        run(shards, asking=Asking(length=9))
    with pytest.raises(ShardError, match="made with other shards"):
        run(f"{shards}/{{00000..00001}}.tar")
    with pytest.raises(ShardError, match="is the folder of the shards"):
        run(shards, "in")
    with pytest.raises(ValueError, match="expected a folder"):
        run(shards, "out.jsonl")


def test_a_run_that_wrote_nothing_binds_to_no_options(shards, run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(Captioner, "answer", None)
        run(shards)
    assert run(shards, asking=Asking(length=9)).captioned


def test_filtered_captions_are_removed_and_counted(shards, run, tmp_path, say):
    say("!!!")
    done = run(shards, overwrite=True)
    assert done.left_out == {"not text": 10} and done.captioned == 0
    for name, data in members(tmp_path / "out").items():
        assert not name.endswith(".json") or "caption" not in json.loads(data)


def test_tars_of_other_tools_keep_all_their_members(shards, run, tmp_path, say):
    videos = [data for name, data in members(shards).items() if name.endswith(".mp4")]
    folder = tmp_path / "theirs"
    folder.mkdir()
    files = {"x/a.mp4": videos[0], "x/a.flac": b"sound", "x/a.cls": b"7", "__meta__": b"?"}
    files |= {"x/b.mp4": videos[1], "x/b.txt": b"its text"}
    files |= {"x/c.mp4": videos[2], "x/c.json": b'{"text": "t", "theirs": [1, {"k": null}]}'}
    files |= {"x/d.mp4": b"no video", "x/d.json": b'{"text": "bad"}', "x/e.mp4": videos[3]}
    files |= {"x/e.json": b"{not json"}
    repack(folder / "a.tar", files)
    verify_shards(f"{folder}/a.tar", manifest=folder / "manifest.jsonl", num_workers=0)
    say("a dog")
    done = run(folder, max_bad_share=0.5)
    found = {name.removeprefix("a.tar/"): data for name, data in members(tmp_path / "out").items()}
    assert done.left_out == {"unreadable": 2}
    assert (done.clips, done.captioned, done.kept) == (5, 2, 1)
    unchanged = {name: data for name, data in files.items() if name not in ("x/c.json", "__meta__")}
    assert unchanged.items() <= found.items()
    assert json.loads(found["x/a.json"]) == {"caption": "a dog"}
    assert json.loads(found["x/c.json"]) == {
        "text": "t", "theirs": [1, {"k": None}], "caption": "a dog",
    }  # fmt: skip
    assert len(found) == len(unchanged) + 2
    (shard,) = manifest(tmp_path / "out").values()
    assert (shard["clips"], shard["captions"], shard["bad"]) == (5, 3, 2)
    say("!!!")  # the text of b counts as its caption until it has another
    run(folder, "again", overwrite=True, max_bad_share=0.5)
    (shard,) = manifest(tmp_path / "again").values()
    assert (shard["texts"], shard["captions"]) == (3, 0)


def test_a_clip_is_not_lost_for_members_that_nobody_reads(shards, run, tmp_path, say):
    video = next(data for name, data in members(shards).items() if name.endswith(".mp4"))
    (tmp_path / "theirs").mkdir()
    files = {"a.mp4": video, "a.cls": b"7", "a.CLS": b"8"}
    files |= {"a.": b"9", "a._x": b"10", "a.__key__": b"11"}
    repack(tmp_path / "theirs" / "a.tar", files)
    source = f"{tmp_path}/theirs/a.tar"
    verify_shards(source, manifest=tmp_path / "theirs" / "manifest.jsonl", num_workers=0)
    say("a dog")
    assert run(source).captioned == 1
    (shard,) = manifest(tmp_path / "out").values()
    assert shard["clips"] == shard["captions"] == 1
    found = {name.partition("/")[2]: data for name, data in members(tmp_path / "out").items()}
    del files["a.CLS"]
    assert found.pop("a.json") and found == {**files, "a.cls": b"8"}


@pytest.mark.parametrize("json_text", [None, b"{}", b'{"text": null}', b'{"text": [], "x": 1}'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_text_outlives_the_caption_that_it_stood_for(
    json_text, encoding, shards, run, tmp_path, say
):
    video = next(data for name, data in members(shards).items() if name.endswith(".mp4"))
    files = {"a.mp4": video, "a.txt": "un café ".encode(encoding)}
    files |= {} if json_text is None else {"a.json": json_text}
    (tmp_path / "theirs").mkdir()
    repack(tmp_path / "theirs" / "a.tar", files)
    source = f"{tmp_path}/theirs/a.tar"
    verify_shards(source, manifest=tmp_path / "theirs" / "manifest.jsonl", num_workers=0)
    say("!!!")
    run(source, overwrite=True)
    found = members(tmp_path / "out")
    assert json.loads(found["a.tar/a.json"])["text"] == "un café"
    assert "a.tar/a.txt" not in found


def test_shards_of_several_folders_get_numbers(shards, run, tmp_path, say):
    say("a dog")
    for name in ("p", "q"):
        (tmp_path / name).mkdir()
        for path in (shards / "00000.tar", shards / "manifest.jsonl"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    source = "::".join(f"{tmp_path}/{name}/00000.tar" for name in ("p", "q"))
    run(source)
    assert sorted(manifest(tmp_path / "out")) == ["00000.tar", "00001.tar"]
    assert len(load_manifest(str(tmp_path / "out"))) == 2


def test_a_damaged_tar_stops_the_run_with_its_name(shards, run, tmp_path, say):
    say("a dog")
    data = (shards / "00001.tar").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    damaged = {"sha256": bytes(flipped), "cut off": data[: len(data) // 2], "empty file": b""}
    for why, content in damaged.items():
        (shards / "00001.tar").write_bytes(content)
        with pytest.raises((ShardError, LoaderError), match=r"00001\.tar") as caught:
            run(shards, max_bad_share=1.0)
        assert why in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "00001.tar").exists()
    (shards / "00001.tar").unlink()
    with pytest.raises(ShardError, match="no such file"):
        run(shards)
    (shards / "00001.tar").write_bytes(data)
    assert run(shards).clips == 10


def test_too_many_unreadable_clips_stop_the_run(shards, run, tmp_path):
    files = {name.partition("/")[2]: data for name, data in members(shards).items()}
    broken = {n: b"no video" if n.endswith(".mp4") else data for n, data in files.items()}
    folder = tmp_path / "broken"
    folder.mkdir()
    repack(folder / "a.tar", broken)
    verify_shards(f"{folder}/a.tar", manifest=folder / "manifest.jsonl", num_workers=0)
    with pytest.raises(LoaderError, match="could not be read"):
        run(folder)
