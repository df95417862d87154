import codecs
import errno
import itertools
import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from clipvip import files
from clipvip.files import (
    NOT_A_FILE,
    OtherRunError,
    decode_text,
    files_in,
    json_line,
    only_run,
    read_own,
    shown,
    write_new,
    write_whole,
)


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


def test_a_strangers_partial_file_is_let_be(tmp_path: Path) -> None:
    stranger = tmp_path / "x.txt.partial"
    stranger.write_text("mine")
    write_whole(tmp_path / "x.txt", "new")
    assert stranger.read_text() == "mine"
    assert (tmp_path / "x.txt").read_text() == "new"
    write_whole(tmp_path / ("é" * 127), "the longest name")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch, locks: bool) -> None:
    if not locks:
        refused = OSError(errno.ENOLCK, "no locks")
        monkeypatch.setattr("fcntl.flock", lambda *given: (_ for _ in ()).throw(refused))
    path, failed = tmp_path / "x", []

    def write(mark: bytes) -> None:
        try:
            for _ in range(50):
                write_whole(path, [mark * 5000] * 4)
                content = path.read_bytes()
                assert len(content) == 20000 and len(set(content)) == 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(mark,)) for mark in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_what_killed_writers_leave_does_not_pile_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, b"0" * 100_000)
    for delay in (0.02, 0.023, 0.027, 0.031, 0.04):
        child = os.fork()
        if not child:
            with suppress(BaseException):
                for number in itertools.count():
                    write_whole(path, [str(number % 10).encode() * 5000] * 20)
            os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = path.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
        assert len(list(tmp_path.iterdir())) <= 2
    write_whole(path, "done")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("write", [write_whole, write_new])
def test_a_full_disk_is_reported_by_the_files_own_name(tmp_path: Path, monkeypatch, write) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.txt'") as error:
        write(tmp_path / "x.txt", [b"new"])
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_new_file_takes_no_others_place(tmp_path: Path) -> None:
    write_new(tmp_path / "a", [b"1", b"2"])
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"3")
    assert read_own(tmp_path / "a") == b"12"


def test_a_folder_or_missing_file_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_whole(tmp_path, "x")
    with pytest.raises(FileNotFoundError):
        read_own(tmp_path / "none")


def make_special(folder: Path) -> dict[str, Path]:
    """A pipe, a socket, and links to a pipe and to a device, all named like videos."""
    made = {name: folder / f"{name}.mp4" for name in ("pipe", "socket", "piped", "device")}
    os.mkfifo(made["pipe"])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(made["socket"]))
    made["piped"].symlink_to("pipe.mp4")
    made["device"].symlink_to("/dev/zero")
    return made


def test_only_files_are_replaced_and_links_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    special = make_special(Path())

    def states() -> list[tuple[int, ...]]:
        """Without the time of access, which following a link changes."""
        found = map(os.lstat, special.values())
        return [(state.st_ino, state.st_mode, state.st_mtime_ns) for state in found]

    before = states()
    for path in special.values():
        with pytest.raises(OSError, match=NOT_A_FILE):
            write_whole(path, "x")
    assert states() == before
    for target in ("here", "new/there"):
        Path("link").symlink_to(target)
        write_whole(Path("link"), "x")
        assert Path("link").is_symlink() and Path(target).read_text() == "x"
        Path("link").unlink()


def test_only_what_is_a_file_itself_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert read_own(Path("real")) == b"x"
    for path in [*make_special(Path()).values(), Path("link"), tmp_path]:
        with pytest.raises(OSError, match="not a file") as error:
            read_own(path)
        assert error.value.filename == str(path)


def test_pipes_and_devices_among_files_are_reported_and_left_out(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    special = make_special(Path())
    assert files_in(Path(), lambda name: name.endswith(".mp4")) == [Path("a.mp4")]
    said = sorted(f"left out ./{path}: {NOT_A_FILE}" for path in special.values())
    assert sorted(caplog.messages) == said
    told: list[tuple[str, str]] = []
    files_in(Path(), left_out=lambda path, reason: told.append((path, reason)))
    assert sorted(told) == sorted((f"./{path}", NOT_A_FILE) for path in special.values())


@pytest.mark.parametrize("content", ["the pumps are locked\n", "host", "x" * 3000])
def test_a_strangers_lock_file_keeps_its_content(tmp_path: Path, monkeypatch, content: str) -> None:
    monkeypatch.setattr(files, "HERE_WAIT", 0.0)
    monkeypatch.setattr(files, "ELSEWHERE_WAIT", 0.0)
    (tmp_path / ".lock").write_text(content)
    with only_run(tmp_path, "writes"), pytest.raises(OtherRunError), only_run(tmp_path, "writes"):
        pass
    assert (tmp_path / ".lock").read_text() == content


def test_a_lock_file_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OtherRunError, match=r"\.lock is not a file"), only_run(tmp_path, "writes"):
        pass
    assert not (tmp_path / "elsewhere").exists()


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
