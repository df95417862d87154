"""Properties of listing a collection's clips. The files are empty, as nothing is decoded."""

import os

import pytest

from clipvip.collection import clips_of


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    write(folder, "a.mp4", "b.mp4", "deep/c.mp4")
    return folder


def names(*sources):
    clips, _ = clips_of([os.fspath(source) for source in sources])
    return [os.path.basename(clip.path) for clip in clips]


def test_a_clip_holds_its_files_state(videos):
    (videos / "a.mp4").write_bytes(b"1234")
    os.utime(videos / "a.mp4", ns=(1, 7))
    (clip,), bad_files = clips_of([str(videos / "a.mp4")])
    assert (clip.path, clip.size, clip.mtime_ns) == (str(videos / "a.mp4"), 4, 7)
    assert not bad_files


def test_linked_folders_are_searched_once_and_other_files_are_counted(videos, tmp_path, capsys):
    write(tmp_path / "elsewhere", "d.mp4")
    (videos / "linked").symlink_to(tmp_path / "elsewhere")
    (videos / "circle").symlink_to(videos)
    write(videos, "a.srt", "b.SRT", "linked/c.nfo", "photo.jpg", "._a.mp4")
    found = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert names(videos) == found
    assert "4 other files skipped: 2 .srt, 1 .jpg, 1 .nfo\n" in capsys.readouterr().err
    assert sorted(names(videos / "circle", videos, videos / "deep")) == found
    assert names(f"{videos}/**/*.mp4") == found
    assert names(f"{videos}/**") == [*found, "photo.jpg"]  # folders are searched for videos only


def test_files_folders_patterns_and_lists_are_listed_alike(videos, tmp_path, monkeypatch):
    latin = os.fsdecode(b"caf\xe9.mp4")
    write(tmp_path, "red.png")
    write(videos, latin)
    (videos / "clips.jsonl").write_text('{"video": "a.mp4", "end": 0.5}\n')
    lines = [b"b.mp4", b"", b"gone.mp4", b"caf\xe9.mp4", os.fsencode(tmp_path / "red.png")]
    (videos / "list.txt").write_bytes(b"\r\n".join(lines))
    (videos / "empty").mkdir()
    given = ["red.png", "videos/[de]*", "videos/[ab].mp4", "videos/clips.jsonl", "videos/list.txt"]
    monkeypatch.chdir(tmp_path)
    clips, bad_files = clips_of(given)
    found = [(os.path.basename(clip.path), clip.end) for clip in clips]
    assert found == [
        *(("red.png", None), ("c.mp4", None), ("a.mp4", None), ("b.mp4", None)),
        *(("a.mp4", 0.5), ("gone.mp4", None), (latin, None)),
    ]
    assert not bad_files

    os.rename(videos / "a.mp4", videos / "[ab].mp4")  # a name goes before a pattern
    assert names(videos / "[ab].mp4") == ["[ab].mp4"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["gone.mp4"], "'gone.mp4' does not exist; expected videos, "),
        ([""], "'' does not exist"),
        (["videos", "none/*.mkv"], r"'none/\*.mkv' matches nothing; expected videos, "),
        (["videos", "empty"], "no videos in empty; looked for "),
        (["videos", "em*"], r"no videos in em\*; looked for "),
        (["notes.srt"], "no videos in notes.srt; looked for .*; 1 other file skipped: 1 .srt"),
        (["captions.txt"], "captions.txt: names no file; .* not 'a red square'"),
        ([], "no videos were named"),
    ],
)
def test_what_matches_nothing_is_reported(videos, tmp_path, monkeypatch, given, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.srt").write_text("")
    (tmp_path / "captions.txt").write_text("a red square\na blue one\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        clips_of(given)


def test_a_bad_line_is_left_out_alone(videos):
    file = videos / "clips.jsonl"
    file.write_text('{"video": "a.mp4"}\n{"vidoe": "b.mp4"}\n[]\n{"video": "b.mp4", "end": 1}\n')
    clips, bad_files = clips_of([str(file)])
    assert [os.path.basename(clip.path) for clip in clips] == ["a.mp4", "b.mp4"]
    assert [bad["path"] for bad in bad_files] == [f"{file}:2", f"{file}:3"]
    assert all(bad["reason"] for bad in bad_files)


def test_only_what_can_be_no_clip_is_an_error(videos):
    os.mkfifo(videos / "pipe.mp4")
    for name in ("binary.txt", "binary.jsonl"):
        (videos / name).write_bytes(bytes(range(256)) * 10)
    strange = ("pipe.mp4", "binary.txt", "binary.jsonl")
    for name in strange:
        with pytest.raises(ValueError, match=name) as error:
            clips_of([str(videos / name)])
        assert str(error.value).isprintable()
        assert names(videos / name, videos / "a.mp4") == ["a.mp4"]
