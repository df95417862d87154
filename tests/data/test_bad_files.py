import json
from pathlib import Path

import pytest

from clipvip.data import bad_files
from clipvip.data.bad_files import BadFile, BadFiles, Failure


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
def test_a_list_that_was_damaged_or_replaced_is_gone_on_with(left: str, tmp_path: Path) -> None:
    path = tmp_path / "bad_files.jsonl"
    bad = BadFiles(10, 1.0, path)
    bad.note([], [failure(0), failure(1)])
    path.write_text(left)
    bad.note([], [failure(2), failure(3)])
    lines = path.read_text().splitlines()
    assert [loads["path"] for loads in map(json.loads, lines[-2:])] == ["2.mp4", "3.mp4"]
    assert len(lines) == 2 + left.endswith("\n")
