import json
import os
from pathlib import Path

import pytest

from clipvip.files import files_in, json_line, shown, write_whole


def test_a_name_that_is_not_utf8_comes_back_from_json() -> None:
    name = os.fsdecode(b'caf\xe9 \xf0\x9f\x98\x80 \\ ".mp4')
    line = json_line({"video": name})
    assert line.decode("utf-8").count("\n") == 1
    assert os.fsencode(json.loads(line)["video"]) == os.fsencode(name)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    write_whole(path, "first\n")

    def broken():
        yield b"sec"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, broken())
    assert path.read_text() == "first\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    real, outside = tmp_path / "videos" / "z", tmp_path / "outside"
    real.mkdir(parents=True)
    outside.mkdir()
    for path in (real / "a.mp4", outside / "b.mp4", real / "._a.mp4"):
        path.write_bytes(b"x")
    (real / "loop").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "a-link").symlink_to(real)
    (tmp_path / "videos" / "out1").symlink_to(outside)
    (tmp_path / "videos" / "out2").symlink_to(outside)
    (tmp_path / "videos" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    found = [str(path.relative_to(tmp_path)) for path in files_in(tmp_path / "videos")]
    assert found == ["videos/gone.mp4", "videos/out1/b.mp4", "videos/z/a.mp4"]


def test_what_is_shown_cannot_command_a_terminal() -> None:
    assert shown("plain [name] é 日本 👩\u200d👩") == "plain [name] é 日本 👩\u200d👩"
    assert shown(os.fsdecode(b"\xff\n\x1b[31m")) == "\\xff\\n\\x1b[31m"
    assert shown("a\u202eb\u2028c\ud83d") == "a\\u202eb\\u2028c\\ud83d"
