import errno
import json
import os
from pathlib import Path

import pytest

from clipvip.data.loading import bad_files
from clipvip.data.loading.bad_files import BadFile, BadFiles, Failure, LoaderError


def failure(place: int) -> Failure:
    return Failure(place, BadFile(f"{place}.mp4", "no such file", place + 1))


def listed(path: Path) -> list[str]:
    return [json.loads(line)["path"] for line in path.read_text().splitlines()]


def test_ranks_that_share_a_list_name_each_file_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bad_files.jsonl"
    ranks = [BadFiles(100, 1.0, path) for _ in range(3)]
    for place in range(60):
        ranks[place % 3].note([place], [failure(place)])
        ranks[(place + 1) % 3].note([place // 2], [failure(place // 2)])
    assert sorted(listed(path)) == sorted(f"{place}.mp4" for place in range(60))


def test_work_for_a_line_does_not_grow_with_the_list(tmp_path: Path, monkeypatch) -> None:
    path, read = tmp_path / "bad_files.jsonl", []
    loads = json.loads
    monkeypatch.setattr(bad_files.json, "loads", lambda line: read.append(line) or loads(line))
    first, second = BadFiles(1000, 1.0, path), BadFiles(1000, 1.0, path)
    for place in range(0, 400, 2):
        first.note([], [failure(place)])
        second.note([], [failure(place + 1)])
    assert len(read) <= 2 * 400
    assert listed(path) == [f"{place}.mp4" for place in range(400)]


@pytest.mark.parametrize("left", ["", '{"path": "cut in the mi', '{"path": "cut\n', "[]\n"])
def test_a_list_that_was_damaged_or_replaced_is_continued(left: str, tmp_path: Path) -> None:
    path = tmp_path / "bad_files.jsonl"
    bad = BadFiles(10, 1.0, path)
    bad.note([], [failure(0), failure(1)])
    path.write_text(left)
    bad.note([], [failure(2), failure(3)])
    lines = path.read_text().splitlines()
    assert [loads["path"] for loads in map(json.loads, lines[-2:])] == ["2.mp4", "3.mp4"]
    assert len(lines) == 2 + left.endswith("\n")


@pytest.mark.parametrize("last", [b"my own notes", b'{"seen": 1}', b"\xff\0"])
def test_a_list_that_somebody_else_began_loses_nothing(last: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad_files.jsonl"
    path.write_bytes(b"first\n" + last)
    BadFiles(10, 1.0, path).note([], [failure(0), failure(1)])
    lines = path.read_bytes().split(b"\n")
    assert lines[:2] == [b"first", last]
    assert [json.loads(line)["path"] for line in lines[2:-1]] == ["0.mp4", "1.mp4"]


def test_where_a_file_system_has_no_locks_files_are_listed(tmp_path: Path, monkeypatch) -> None:
    def refused(*given: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refused)
    path = tmp_path / "bad_files.jsonl"
    BadFiles(10, 1.0, path).note([], [failure(0), failure(1)])
    assert listed(path) == ["0.mp4", "1.mp4"]


def test_names_come_back_from_the_list_and_are_logged_safely(tmp_path: Path, caplog) -> None:
    path = tmp_path / "bad_files.jsonl"
    name = os.fsdecode(b"caf\xe9\n\x1b[31m.mp4")
    for bad in (BadFiles(10, 1.0, path), BadFiles(10, 1.0, path)):  # two ranks
        bad.note([0], [Failure(0, BadFile(name, "moov\x1b[2J", 1))])
    (line,) = path.read_text("utf-8").splitlines()
    assert os.fsencode(json.loads(line)["path"]) == os.fsencode(name)
    assert caplog.messages == [r"left out caf\xe9\n\x1b[31m.mp4: moov\x1b[2J"] * 2
    with pytest.raises(LoaderError) as caught:
        bad.stop("none left")
    assert str(caught.value).startswith("1 of 1 clips tried could not be read (none left); the")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("place", ["folder", "folder/below/a/file"])
def test_a_list_that_cannot_be_written_costs_one_warning(
    place: str, tmp_path: Path, caplog
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "below").touch()
    path = tmp_path / place
    bad = BadFiles(10, 1.0, path)
    bad.note([0, 1, 2], [failure(0), failure(1)])
    bad.note([3], [failure(3)])
    assert (bad.tried, bad.bad, len(bad.found)) == (4, 3, 3)
    (warning,) = [message for message in caplog.messages if "cannot be listed" in message]
    assert str(path) in warning and "None" not in warning


def test_damage_is_logged_and_listed_once_but_not_counted(tmp_path: Path, caplog) -> None:
    path = tmp_path / "bad_files.jsonl"
    damaged = BadFile("0.mp4", "1 of 9 keyframes cannot be decoded", 1)
    for bad in (BadFiles(10, 0.0, path), BadFiles(10, 0.0, path)):
        bad.note([0], [], [damaged, damaged])
        bad.note([0], [], [damaged], final=True)
        assert (bad.tried, bad.bad, bad.found) == (1, 0, [])
    assert (
        caplog.messages
        == ["damaged 0.mp4: 1 of 9 keyframes cannot be decoded; its other frames are used"] * 2
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {**damaged._asdict(), "damaged": True}
    ]
    with pytest.raises(LoaderError):
        bad.note([1], [Failure(1, damaged._replace(reason="start lies after its end"))], final=True)
    assert listed(path) == ["0.mp4", "0.mp4"]
