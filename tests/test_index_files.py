"""Properties of an index's files: what is written is read back, and nothing else is believed."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipvip.files import only_run
from clipvip.index_files import IndexedClip, StoredIndex, check_out, read_index, write_index


def content(folder):
    """Every file of a folder and what is in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made_index(rows=3, seed=0, model="/models/mine"):
    """An index that was not embedded."""
    torch.manual_seed(seed)
    clips = [IndexedClip(f"/videos/{seed}-{row}.mp4", None, 1.5, 9, 7) for row in range(rows)]
    embeddings = F.normalize(torch.randn(rows, 16), dim=-1)
    return StoredIndex(model, "0" * 64, ["/videos"], embeddings, clips)


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved index."""
    write_index(made_index(), tmp_path / "saved")
    return tmp_path / "saved"


def change(folder, **values):
    head = json.loads((folder / "index.json").read_bytes())
    (folder / "index.json").write_text(json.dumps({**head, **values}))


@pytest.mark.parametrize("content", [b"", b"{", bytes(64)], ids=repr)
def test_damaged_embeddings_are_reported_in_one_line(saved, content):
    (file,) = saved.glob("embeddings-*")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*clipvip embed ") as error:
        read_index(saved)
    assert "\n" not in str(error.value)


def test_a_command_to_copy_runs_nothing_of_a_folders_name(tmp_path):
    folder = tmp_path / "a; touch b"
    with pytest.raises(ValueError, match=f"--out '{folder}'"):
        read_index(folder)
    write_index(made_index(), folder)
    next(folder.glob("clips-*")).unlink()
    with pytest.raises(ValueError, match=f"--out '{folder}'"):
        read_index(folder)


STRANGE = {
    "a video": {"a.mp4": b"x"},
    "files like an index's": {"clips-test.jsonl": b"", "embeddings-old.safetensors": b"x"},
    "another index.json": {"index.json": b'{"pages": ["index.html"]}'},
    "an index.json that is no JSON": {"index.json": b"<html>"},
    "an index.json of null bytes": {"index.json": bytes(100)},
    "an index.json nested deeply": {"index.json": b"[" * 100_000},
    "a training run": {".lock": b"", "bad_files.jsonl": b'{"path":"a","reason":"b","line":3}\n'},
    "a list that is none": {"bad_files.jsonl": b"my own notes"},
    "a list like an index's": {"bad_files.jsonl": b'{"path": "a", "reason": "b"}\n'},
}


@pytest.mark.parametrize("there", STRANGE.values(), ids=STRANGE)
def test_a_folder_of_something_else_is_refused(tmp_path, there):
    for name, data in there.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        check_out(tmp_path)
    assert "\n" not in str(error.value)
    assert "give " in str(error.value)
    assert content(tmp_path) == there


def test_an_index_does_not_land_in_files_or_links_to_nowhere(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="file is a file; expected the folder of an index"):
        check_out(tmp_path / "file")
    with pytest.raises(ValueError, match="link is a link to nowhere"):
        check_out(tmp_path / "link")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="locked cannot be written to"):
        check_out(tmp_path / "locked")
    assert not (tmp_path / "nowhere").exists()


def test_the_current_folder_is_named_as_that(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    for out in (Path(""), Path(".")):
        with pytest.raises(ValueError, match=r"the current folder holds 'a\.mp4' and no index"):
            check_out(out)


@pytest.mark.parametrize(
    "there",
    [
        b"[" * 200_000,
        b"my own notes",
        b"\xff",
        b'{"path": 3, "reason": "b"}\n',
        b'{"path": "a", "reason": "b"}\n' + b"[" * 200_000,
        b'{"path": "a", "reason": "b", "line": 3}\n',
    ],
    ids=lambda there: repr(there[:60]),
)
def test_bad_files_beside_an_index_that_are_not_its_own_are_kept(saved, there):
    (saved / "bad_files.jsonl").write_bytes(there)
    with pytest.raises(
        ValueError, match=r"bad_files\.jsonl is not from clipvip embed; give .*move"
    ):
        check_out(saved)
    assert (saved / "bad_files.jsonl").read_bytes() == there
    assert read_index(saved).bad_files == []  # search needs none


def test_strangers_files_beside_an_index_are_let_be(tmp_path):
    real, out = tmp_path / "real", tmp_path / "index"
    real.mkdir()
    out.symlink_to(real)  # a link to a folder is one

    def save(seed):
        with only_run(out, "embeds"):
            check_out(out)
            write_index(made_index(seed=seed), out)

    for name in (".lock", ".DS_Store", "index.json.partial"):
        (out / name).write_text("x")
    save(seed=0)
    strange = {
        "clips-test.jsonl": b"",
        "clips-0123456789abcdef.jsonl": b"mine",
        "embeddings-old.safetensors": b"x",
    }
    for name, data in strange.items():
        (out / name).write_bytes(data)
    save(seed=1)
    there = content(real)
    assert all(there[name] == data for name, data in strange.items())
    assert there["index.json.partial"] == there[".DS_Store"] == there[".lock"] == b"x"
    assert len(there) == 4 + len(strange) + 3  # and nothing is left of the first save


def test_an_index_that_names_nothing_spare_is_read_too(saved):
    head = json.loads((saved / "index.json").read_bytes())
    change(saved, spare=[head["clips"]])  # or a build would delete what holds
    with pytest.raises(ValueError, match="damaged or not from clipvip embed"):
        read_index(saved)
    del head["spare"]
    (saved / "index.json").write_text(json.dumps(head))
    assert read_index(saved).clips == made_index().clips


def test_killed_saves_lose_nothing_and_leave_nothing(tmp_path):
    out = tmp_path / "index"
    write_index(made_index(2000, seed=1), out)
    for attempt in range(8):
        child = os.fork()
        if not child:
            with suppress(BaseException):
                index = made_index(2000, seed=2 + attempt % 2)
                while True:
                    write_index(index, out)
            os._exit(1)
        time.sleep(0.02 + 0.004 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        index = read_index(out)
        assert torch.equal(
            index.embeddings, made_index(2000, int(index.clips[0].path[8])).embeddings
        )
        assert len(content(out)) <= 2 * 2 + 2 + 2  # a save's data, those it replaced, partials
    write_index(made_index(), out)
    assert len(content(out)) == 4


def test_readers_never_fail_while_an_index_is_saved(tmp_path):
    out = tmp_path / "index"
    made = [made_index(seed=seed) for seed in range(4)]
    write_index(made[0], out)
    failed, loads, saved = [], [], threading.Event()

    def read():
        while not saved.is_set() and not failed:
            try:
                index = read_index(out)
                expected = made[int(index.clips[0].path[8])]
                assert torch.equal(index.embeddings, expected.embeddings)
                assert index.clips == expected.clips
                loads.append(1)
            except BaseException as error:
                failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    saves = 0
    while (saves < 20 or len(loads) < 20) and not failed:  # however busy the machine is
        saves += 1
        write_index(made[saves % 4], out)
    saved.set()
    for reader in readers:
        reader.join()
    assert not failed
    assert len(content(out)) == 4


@pytest.mark.parametrize(
    "values",
    [
        {"embeddings": "../secret"},
        {"embeddings": "/etc/passwd"},
        {"clips": "../saved/clips-0123456789abcdef.jsonl"},
        {"clips": None},
        {"embeddings": 3},
        {"embeddings": ["embeddings-0123456789abcdef.safetensors"]},
        {"spare": ["../x"]},
        {"spare": "index.json"},
        {"spare": ["embeddings-0123456789abcdef.safetensors", "index.json"]},
        {"spare": None},
        {"model": None},
        {"model": ["a"]},
        {"fingerprint": 7},
        {"sources": "videos"},
        {"sources": [1]},
        {"format": "2"},
        {"format": None},
        {"format": [2]},
        {"format": 99},
        {"format": 2.5},
    ],
    ids=repr,
)
def test_an_index_that_says_something_else_is_refused_in_one_line(saved, values):
    change(saved, **values)
    with pytest.raises(ValueError, match="saved") as error:
        read_index(saved)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("which", ["index.json", "bad_files.jsonl"])
def test_holes_in_a_list_are_not_read(saved, which):
    with open(saved / which, "ab") as file:
        file.truncate(1 << 42)
    if which == "index.json":
        with pytest.raises(ValueError, match=r"index\.json: 4398046511104 bytes; expected at most"):
            read_index(saved)
    else:
        assert read_index(saved).bad_files == []


@pytest.mark.parametrize("which", ["index.json", "embeddings", "clips"])
def test_links_and_pipes_in_an_index_are_not_followed(saved, tmp_path, which):
    (file,) = saved.glob(which + "*")
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{file.name}.*a link, not a file"):
        read_index(saved)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"{file.name}.*a pipe"):
        read_index(saved)


CLIP = {"path": "/a.mp4", "start": None, "end": None, "size": 1, "mtime_ns": 1}


@pytest.mark.parametrize(
    "clip",
    [
        [],
        "a.mp4",
        {"path": "a.mp4"},
        {**CLIP, "path": 3},
        {**CLIP, "path": None},
        {**CLIP, "start": "0"},
        {**CLIP, "end": float("nan")},
        {**CLIP, "end": 10**400},
        {**CLIP, "size": 1.5},
        {**CLIP, "size": True},
        {**CLIP, "mtime_ns": None},
        {**CLIP, "more": 1},
    ],
    ids=lambda clip: repr(clip)[:60],
)
def test_a_line_that_is_no_clip_is_reported(saved, clip):
    (file,) = saved.glob("clips-*")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], json.dumps(clip).encode() + b"\n", lines[2]]))
    with pytest.raises(ValueError, match=rf"{file.name} is damaged \(line 2 .*clipvip embed "):
        read_index(saved)


@pytest.mark.parametrize(
    "tensors",
    [
        {"embeddings": torch.full((3, 16), float("nan"))},
        {"embeddings": torch.zeros(3, 16)},
        {"embeddings": torch.zeros(3, 0)},
        {"embeddings": torch.eye(3, 16, dtype=torch.float64)},
        {"embeddings": torch.eye(2, 16)},
        {"embeddings": torch.ones(3)},
        {"others": torch.eye(3, 16)},
        {},
    ],
    ids=repr,
)
def test_embeddings_that_are_none_are_reported(saved, tensors):
    from safetensors.torch import save_file

    (file,) = saved.glob("embeddings-*")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"is damaged \(.*clipvip embed ") as error:
        read_index(saved)
    assert "\n" not in str(error.value)
