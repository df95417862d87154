import codecs
import json
import os
from pathlib import Path

import pytest

from clipvip.files import decode_text, files_in, json_line, shown, write_whole


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
    (tmp_path / "videos" / "round").symlink_to("round")
    found = [str(path.relative_to(tmp_path)) for path in files_in(tmp_path / "videos")]
    assert found == ["videos/gone.mp4", "videos/out1/b.mp4", "videos/round", "videos/z/a.mp4"]
    kept = files_in(tmp_path / "videos", lambda name: name.startswith("b"))
    assert [path.name for path in kept] == ["b.mp4"]


TEXT = "é 日本\r\n\x85 \u2028\n"


@pytest.mark.parametrize(
    ("data", "text", "guessed"),
    [
        (TEXT.encode(), TEXT, False),
        (TEXT.encode("utf-8-sig"), TEXT, False),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), TEXT, False),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), TEXT, False),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), TEXT, False),
        ("naïve – “café”".encode("cp1252"), "naïve – “café”", True),
        ("é 日本\n".encode() + b"\xe9\n\x81\xe9", "é 日本\né\n\x81é", True),
        (b"", "", False),
    ],
)
def test_a_text_is_decoded_by_its_mark_or_as_what_it_can_be(
    data: bytes, text: str, guessed: bool
) -> None:
    assert decode_text(data) == (text, guessed)


@pytest.mark.parametrize("data", [b"\xff\xfea", "as UTF-16".encode("utf-16-le"), b"\xff\xd8\0\0"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not"):
        decode_text(data)


def test_what_is_shown_cannot_command_a_terminal() -> None:
    assert shown("plain [name] é 日本 👩\u200d👩") == "plain [name] é 日本 👩\u200d👩"
    assert shown(os.fsdecode(b"\xff\n\x1b[31m")) == "\\xff\\n\\x1b[31m"
    assert shown("a\u202eb\u2028c\ud83d") == "a\\u202eb\\u2028c\\ud83d"
