"""Properties of bringing an index of the earlier format up to date."""

import json
import os
from contextlib import suppress

import numpy as np
import pytest
from safetensors.numpy import save_file

from clipvip.index import migrate as migrate_module
from clipvip.index.migrate import is_old_index, migrate
from clipvip.index.rows import About
from clipvip.index.store import Store
from clipvip.index.tables import is_index

ODD = os.fsdecode(b"/videos/caf\xe9'.mp4")
DATA = "embeddings-0123456789abcdef.safetensors", "clips-0123456789abcdef.jsonl"
CLIPS = [
    {"path": "/videos/a.mp4", "start": None, "end": None, "size": 9, "mtime_ns": 7_000_000_000},
    {"path": ODD, "start": 2.0, "end": 4.0, "size": 8, "mtime_ns": 6_000_000_000},
    {"path": ODD, "start": 0, "end": 2.5, "size": 8, "mtime_ns": 6_000_000_000},
]
HEAD = {
    "format": 2,
    "model": "/models/mine",
    "fingerprint": "0" * 64,
    "sources": ["/videos", ODD],
    "embeddings": DATA[0],
    "clips": DATA[1],
    "spare": ["clips-1111111111111111.jsonl"],
}
BAD_FILES = [{"path": ODD, "reason": "it's empty"}]


def vectors():
    values = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture
def old(tmp_path):
    """The folder of an index of format 2."""
    folder = tmp_path / "index"
    folder.mkdir()
    save_file({"embeddings": vectors()}, folder / DATA[0])
    (folder / DATA[1]).write_text("".join(json.dumps(clip) + "\n" for clip in CLIPS))
    (folder / "bad_files.jsonl").write_text(json.dumps(BAD_FILES[0]) + "\n")
    (folder / HEAD["spare"][0]).touch()
    (folder / ".lock").touch()
    write_head(folder)
    return folder


def write_head(folder, **values):
    (folder / "index.json").write_text(json.dumps({**HEAD, **values}))


def assert_new(folder):
    store = Store.open(folder)
    assert store.about == About("/models/mine", "0" * 64, 16, ("/videos", ODD))
    assert store.bad_files() == BAD_FILES
    moments, found = store.of_files(["/videos/a.mp4", ODD])
    spans = [(m.file.path, m.start, m.end) for m in moments]
    assert spans == [(clip["path"], clip["start"], clip["end"]) for clip in CLIPS]
    np.testing.assert_allclose(found, vectors(), atol=1e-3)
    states = {(m.file.size, m.file.mtime_ns, m.file.plan, m.file.date) for m in moments}
    assert states == {(9, 7_000_000_000, "whole", 7.0), (8, 6_000_000_000, "whole", 6.0)}
    assert not [
        path.name for path in folder.iterdir() if path.suffix not in (".lance", ".lock", "")
    ]


def test_an_old_index_becomes_a_new_one_in_its_place(old):
    assert is_old_index(old) and not is_index(old)
    assert migrate(old)
    assert_new(old)
    assert not is_old_index(old) and not migrate(old)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", range(9))
def test_a_migration_that_is_killed_leaves_one_index_and_is_done_later(old, monkeypatch, at):
    """`at`: how many renames and deletions the process lives for."""
    steps = iter(range(100))

    def dies(function):
        def step(*args, **options):
            if next(steps) == at:
                raise KilledError
            return function(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(migrate_module.os, "rename", dies(os.rename))
        patch.setattr(migrate_module.os, "unlink", dies(os.unlink))
        with suppress(KilledError):
            migrate(old)
    assert is_index(old) or is_old_index(old)
    migrate(old)
    assert_new(old)


def test_what_is_no_old_index_is_left_alone(tmp_path):
    assert not migrate(tmp_path)
    assert not migrate(tmp_path / "missing")
    assert not migrate("s3://bucket/index")
    assert not list(tmp_path.iterdir())


STRANGE = [
    b"{",
    b"[" * 100_000,
    bytes(100),
    b'{"pages": []}',
    json.dumps({**HEAD, "format": 1}).encode(),
    json.dumps({**HEAD, "embeddings": "../secret"}).encode(),
    json.dumps({**HEAD, "spare": ["../../videos/a.mp4"]}).encode(),
    json.dumps({**HEAD, "sources": [3]}).encode(),
]


@pytest.mark.parametrize("content", STRANGE, ids=lambda content: repr(content[:40]))
def test_another_index_json_is_refused_in_one_line(old, content):
    (old / "index.json").write_bytes(content)
    before = sorted(path.name for path in old.iterdir())
    with pytest.raises(ValueError, match="--out") as error:
        migrate(old)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in old.iterdir()) == before


def change_line(old, **values):
    lines = [{**CLIPS[0], **values}, *CLIPS[1:]]
    (old / DATA[1]).write_text("".join(json.dumps(line) + "\n" for line in lines))


DAMAGE = {
    "no vectors": lambda old: (old / DATA[0]).unlink(),
    "vectors cut": lambda old: os.truncate(old / DATA[0], 50),
    "vectors of zeros": lambda old: save_file(
        {"embeddings": np.zeros((3, 16), np.float32)}, old / DATA[0]
    ),
    "other vectors": lambda old: save_file({"embeddings": vectors()[:2]}, old / DATA[0]),
    "vectors in float64": lambda old: save_file({"embeddings": np.eye(3)}, old / DATA[0]),
    "a link": lambda old: ((old / DATA[1]).unlink(), (old / DATA[1]).symlink_to("/etc/passwd")),
    "a line cut": lambda old: os.truncate(old / DATA[1], 50),
    "a path that is none": lambda old: change_line(old, path="/v/\ud800"),
    "a size of text": lambda old: change_line(old, size="9"),
    "a huge size": lambda old: change_line(old, size=1 << 70),
    "a huge time": lambda old: change_line(old, start=10**400),
    "an end before its start": lambda old: change_line(old, start=3, end=2),
    "a foreign list": lambda old: (old / "bad_files.jsonl").write_text("my notes"),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_refused_in_one_line_and_kept(old, harm):
    harm(old)
    with pytest.raises(ValueError) as error:
        migrate(old)
    assert "\n" not in str(error.value)
    assert (old / "index.json").exists() and not is_index(old)


def test_an_old_index_without_data_is_deleted(old):
    write_head(old, embeddings=None, clips=None, spare=list(DATA))
    assert migrate(old)
    left = sorted(path.name for path in old.iterdir())
    assert left == [".lock", HEAD["spare"][0]] and not is_index(old)
