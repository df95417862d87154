"""Shards of files with any name and of texts with any bytes."""

import json
import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipvip.data.annotations import Clip, load_annotations, write_annotations
from clipvip.data.shards import tars, verify_shards
from clipvip.data.shards.tars import read_samples, unpack
from clipvip.data.shards.write import write_shards

NAME = os.fsdecode(b"caf\xe9 \xc3\xa9\n.mp4")
PICTURE = os.fsdecode(b"\xff.png")


@pytest.fixture
def annotations(make_video, tmp_path: Path) -> Path:
    folder = tmp_path / os.fsdecode(b"in \xe9")
    folder.mkdir()
    shutil.copy(make_video("tiny.mp4", count=3), folder / NAME)
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / PICTURE)
    clips = [
        Clip(folder / NAME, text=("half \ud83d", "b"), caption="c", image=folder / PICTURE),
        Clip(folder / PICTURE, text=("a picture",)),
        Clip(folder / "gone.mp4", text=("nothing",)),
    ]
    write_annotations(folder / "clips.jsonl", clips)
    return folder / "clips.jsonl"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_names_that_are_not_utf8_come_back_from_shards(
    num_workers: int, annotations: Path, tmp_path: Path
) -> None:
    out, clean = tmp_path / os.fsdecode(b"out \xe9"), tmp_path / "clean.jsonl"
    write_shards(annotations, out, num_workers=num_workers, max_bad_share=0.5)
    found = verify_shards(str(out), clean, num_workers=num_workers)
    assert found.clips == 2 and not found.bad
    first, second = load_annotations(clean)
    assert (first.video, first.image) == (annotations.parent / NAME, annotations.parent / PICTURE)
    assert (first.text, first.repaired) == (("half \ufffd", "b"), False)
    assert second.video == annotations.parent / PICTURE
    (bad,) = (out / "bad_files.jsonl").read_text("utf-8").splitlines()
    assert json.loads(bad)["path"] == str(annotations.parent / "gone.mp4")


def sample(**files: bytes) -> dict:
    """A sample of a tar that was made elsewhere."""
    tar = BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for suffix, data in files.items():
            info = tarfile.TarInfo(f"a.{suffix}")
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    tar.seek(0)
    (found,) = read_samples(tar, "x.tar")
    return found


@pytest.mark.parametrize(
    ("files", "text", "fault"),
    [
        ({"txt": b"\xef\xbb\xbf caf\xc3\xa9\n"}, "café", None),
        ({"txt": b"\xff\xfec\0a\0f\0\xe9\0"}, "café", None),
        ({"txt": b"caf\xe9"}, "café", "not UTF-8"),
        ({"json": b'{"text": "half \\ud83d"}'}, "half \ufffd", "half a character"),
        ({"json": b'{"text": "\\ud83d\\ude00"}'}, "😀", None),
    ],
)
def test_texts_of_tars_from_elsewhere_are_decoded_or_repaired_and_logged_once(
    files: dict[str, bytes], text: str, fault: str | None, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(tars, "_warned", set())
    for _ in range(2):
        assert unpack(sample(jpg=b"", **files), "x.tar").clip.text == (text,)
    assert len(caplog.messages) == (fault is not None)
    assert all(fault in message and "x.tar/a: " in message for message in caplog.messages)
