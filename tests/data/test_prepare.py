"""Small files in the formats in which the data sets are published."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipvip import cli
from clipvip.data.annotations import Clip, load_annotations, write_annotations
from clipvip.data.prepare import PrepareError, prepare
from clipvip.data.published import lines_in


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def add(source: Path, make_video) -> Any:
    """add("a/b.mp4", …): real videos in the source."""

    def make(*names: str) -> None:
        for name in names:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(make_video("tiny.mp4", count=3), source / name)

    return make


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def texts(clips: list[Clip]) -> dict[str, tuple[str, ...]]:
    return {clip.video.name: clip.text for clip in clips}


def msrvtt(source: Path) -> None:
    splits = {0: "train", 1: "train", 2: "validate", 7010: "test", 7020: "test"}
    videos = [
        {
            "category": 9,
            "url": f"https://www.youtube.com/watch?v=id{i}",
            "video_id": f"video{i}",
            "start time": 137.72,
            "end time": 149.44,
            "split": split,
            "id": i,
        }
        for i, split in splits.items()
    ]
    sentences = [
        {"caption": f"caption {j} of {i}", "video_id": f"video{i}", "sen_id": 20 * i + j}
        for j in range(3)
        for i in splits
    ]
    dump(source / "MSRVTT_data.json", {"info": {}, "videos": videos, "sentences": sentences})


def test_msrvtt_with_the_9k_and_1k_a_tables(source: Path, add, tmp_path: Path) -> None:
    msrvtt(source)
    (source / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\nvideo9\n")
    (source / "MSRVTT_JSFUSION_test.csv").write_text(
        "key,vid_key,video_id,sentence\n"
        'ret0,msr7010,video7010,"a woman creating a fondant baby, and flower"\n'
        'ret1,msr7020,video7020,"a boy\nplays grand theft auto 5"\n'
    )
    add("videos/all/video0.mp4", "videos/all/video2.mp4", "videos/all/video7010.webm")
    out = tmp_path / "train.jsonl"
    done = prepare("msrvtt", source, out)
    clips = load_annotations(out)
    assert list(texts(clips)) == ["video0.mp4", "video2.mp4"]
    assert clips[0].text == tuple(f"caption {j} of 0" for j in range(3))
    assert (done.clips, done.missing, done.mute) == (2, [], ["video9"])
    done = prepare("msrvtt", source, out, split="test")
    found = texts(load_annotations(out))
    assert found == {"video7010.webm": ("a woman creating a fondant baby, and flower",)}
    assert done.missing == ["video7020"]


def test_msrvtt_without_tables_has_its_own_splits(source: Path, add, tmp_path: Path) -> None:
    msrvtt(source)
    add(*(f"video{i}.mp4" for i in (0, 1, 2, 7010, 7020)))
    for split, names in (
        ("train", ["video0.mp4", "video1.mp4"]),
        ("val", ["video2.mp4"]),
        ("test", ["video7010.mp4", "video7020.mp4"]),
    ):
        prepare("msrvtt", source, tmp_path / "out.jsonl", split=split)
        assert list(texts(load_annotations(tmp_path / "out.jsonl"))) == names


def test_didemo_has_all_descriptions_of_a_video(source: Path, add, tmp_path: Path) -> None:
    videos = ["12090392@N02_13482799053_87ef417396.mov", "54322086@N00_2408598493_274c77d26a.avi"]
    moments = [
        {
            "num_segments": 6,
            "description": f"moment {i}",
            "dl_link": "https://www.flickr.com/video_download.gne?id=13482799053",
            "times": [[0, 0], [0, 0], [1, 1]],
            "video": videos[i % 2],
            "annotation_id": i,
            "context": 0,
        }
        for i in range(4)
    ]
    dump(source / "val_data.json", moments)
    add("v/12090392@N02_13482799053_87ef417396.mov.mp4", "v/54322086@N00_2408598493_274c77d26a.mp4")
    prepare("didemo", source, tmp_path / "out.jsonl", split="val")
    clips = load_annotations(tmp_path / "out.jsonl")
    assert [clip.text for clip in clips] == [("moment 0", "moment 2"), ("moment 1", "moment 3")]
    with pytest.raises(PrepareError, match=r"no train_data\.json there"):
        prepare("didemo", source, tmp_path / "out.jsonl")


def test_lsmdc(source: Path, add, tmp_path: Path) -> None:
    clips = [
        "0001_American_Beauty_00.00.51.926-00.00.54.129",
        "1012_Unbreakable_00.05.16.065-00.05",
    ]
    times = "00.00.51.926\t00.00.54.129\t00.00.51.926\t00.00.54.129"
    lines = [f'{clips[0]}\t{times}\tSOMEONE says "no", twice.', f"{clips[1]}\t{times}\tHe falls."]
    lines.append(f"{clips[0]}\t{times}\tShe leaves.")
    (source / "LSMDC16_annos_training.csv").write_text("\n".join(lines) + "\n")
    add(f"0001_American_Beauty/{clips[0]}.avi")
    done = prepare("lsmdc", source, tmp_path / "out.jsonl")
    (clip,) = load_annotations(tmp_path / "out.jsonl")
    assert clip.text == ('SOMEONE says "no", twice.', "She leaves.")
    assert done.missing == [clips[1]]


def test_activitynet_has_all_sentences(source: Path, add, tmp_path: Path) -> None:
    content = {
        "v_uqiMw7tQ1Cc": {
            "duration": 55.15,
            "timestamps": [[0.28, 55.15], [13.79, 54.32]],
            "sentences": ["A man stands.", " He lifts a weight. "],
        },
        "v_bXdq2zI1Ms0": {"duration": 10.0, "timestamps": [[0, 9]], "sentences": ["A dog."]},
    }
    dump(source / "val_1.json", content)
    add("v_uqiMw7tQ1Cc.mkv", "bXdq2zI1Ms0.mp4")
    for split in ("val", "test"):
        prepare("activitynet", source, tmp_path / "out.jsonl", split=split)
        clips = load_annotations(tmp_path / "out.jsonl")
        assert [clip.text for clip in clips] == [
            ("A man stands.", "He lifts a weight."),
            ("A dog.",),
        ]


def database(folder: Path, content: dict[str, str]) -> None:
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(folder), map_size=1 << 20) as environment,
        environment.begin(write=True) as t,
    ):
        for key, text in content.items():
            t.put(key.encode(), text.encode())


def test_hdvila_clips_with_lmdbs(source: Path, add, tmp_path: Path) -> None:
    keys = [f"QMi8x8o55Ns.{i}.mp4" for i in range(4)]
    rows = [{"video_id": "QMi8x8o55Ns", "clip_id": key} for key in keys]
    (source / "hdvila_subtitles_92m_db.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    database(source / "hdvila_subtitles_92m_db", {key: f"said {key}" for key in keys[:3]})
    database(source / "hdvila_captions_db", {keys[0]: "a person talking"})
    add(f"clips/QMi8x8o55Ns/{keys[0]}", f"clips/{keys[1]}", f"clips/{keys[3]}")
    done = prepare("hdvila", source, tmp_path / "out.jsonl", videos=source / "clips")
    first, second = load_annotations(tmp_path / "out.jsonl")
    assert (first.subtitle, first.caption) == (f"said {keys[0]}", "a person talking")
    assert (second.subtitle, second.caption) == (f"said {keys[1]}", None)
    assert done.missing == [keys[2]] and done.mute == [keys[3]]


def test_hdvila_spans_of_whole_videos(source: Path, add, tmp_path: Path) -> None:
    row = {
        "video_id": "QMi8x8o55Ns",
        "url": "https://www.youtube.com/watch?v=QMi8x8o55Ns",
        "clip": [
            {"clip_id": "QMi8x8o55Ns.1.mp4", "span": ["00:00:17.759", "00:00:23.279"]},
            {"clip_id": "QMi8x8o55Ns.16.mp4", "span": ["00:04:52.140", "00:05:03.350"]},
        ],
    }
    (source / "hdvila_part0.jsonl").write_text(json.dumps(row) + "\n")
    database(source / "subtitles", {c["clip_id"]: f"said {c['clip_id']}" for c in row["clip"]})
    add("QMi8x8o55Ns.mp4", "QMi8x8o55Ns.1.mp4")
    prepare("hdvila", source, tmp_path / "out.jsonl")
    cut, span = load_annotations(tmp_path / "out.jsonl")
    assert (cut.video.name, cut.start, cut.end) == ("QMi8x8o55Ns.1.mp4", None, None)
    assert (span.video.name, span.start, span.end) == ("QMi8x8o55Ns.mp4", 292.14, 303.35)


def test_folder_takes_texts_beside_videos_and_images(source: Path, add, tmp_path: Path) -> None:
    add("a/one.mp4", "two.MKV", "silent.mp4")
    (source / "a" / "one.txt").write_text("first\n\n second \nfirst\n")
    (source / "two.txt").write_text("ünï\n")
    (source / "pic.png").write_bytes(b"")
    (source / "pic.txt").write_text("a picture")
    done = prepare("folder", source, source / "out.jsonl")
    found = texts(load_annotations(source / "out.jsonl"))
    assert found == {"one.mp4": ("first", "second"), "pic.png": ("a picture",), "two.MKV": ("ünï",)}
    assert done.mute == ["silent.mp4"]
    assert json.loads((source / "out.jsonl").read_text().splitlines()[0])["video"] == "a/one.mp4"


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("msrvtt", "x.json", "{", "not JSON"),
        ("msrvtt", "x.json", "{}", "holds no list of train; expected MSRVTT_train.9k.csv, "),
        ("msrvtt", "MSRVTT_train.9k.csv", "key\n1\n", "no column video_id; it has key"),
        ("didemo", "train_data.json", '[{"description": "a"}]', "entry 1: no 'video'"),
        ("didemo", "train_data.json", '{"a": 1}', "expected a list, got an object"),
        ("lsmdc", "LSMDC16_annos_training.csv", "a\tb\n", "2 fields, expected 6"),
        ("activitynet", "train.json", "[]", "expected an object in braces, got a list"),
        ("activitynet", "train.json", "[" * 100_000, "nested too deeply"),
        ("hdvila", "a.jsonl", "{}\n", "a.jsonl:1: no 'clip_id'"),
        ("captions", "train.json", "[]", "names no clips"),
        ("captions", "test.json", "[]", "0 files .jsonl or .json have 'train' in their names"),
        ("folder", "a.mp4", "", "1 clips have no text"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    kind: str, name: str, content: str, message: str, source, tmp_path, monkeypatch, capsys
) -> None:
    (source / name).write_text(content)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["clipvip", "prepare", kind, str(source), str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 1 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_the_command_names_what_is_missing(source, add, tmp_path, monkeypatch, capsys) -> None:
    content = {f"v_{i}": {"sentences": [f"text {i}"]} for i in range(9)}
    dump(source / "train.json", content)
    add("v_3.mp4")
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["clipvip", "prepare", "activitynet", str(source), str(out)])
    cli.main()
    said = capsys.readouterr().out
    assert f"{out}: 1 clips" in said
    assert "8 videos are missing and were left out: v_0; v_1; v_2; v_4; v_5; …" in said
    assert (tmp_path / "out.missing.txt").read_text().split() == [
        f"v_{i}" for i in range(9) if i != 3
    ]


# --- names and bytes ---------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments: object) -> str:
    """What the command says of it."""
    monkeypatch.setattr(sys, "argv", ["clipvip", "prepare", *map(str, arguments)])
    cli.main()
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    return said


def test_names_of_any_bytes_come_back(source, add, tmp_path, monkeypatch, capsys) -> None:
    names = [b"caf\xe9/\xff.mp4", b"new\nline.mp4", b"\x1b[31m\xc3\xa9.mp4", b"\xe9.mp4"]
    add(*map(os.fsdecode, names))
    for name in names[:3]:
        (source / os.fsdecode(name)).with_suffix(".txt").write_text("a text")
    (source / os.fsdecode(b"\xe9.txt")).write_bytes(b"\0")
    out = tmp_path / os.fsdecode(b"out\xe9.jsonl")
    said = run(monkeypatch, capsys, "folder", source, out)
    out.read_text("utf-8")
    found = {os.fsencode(clip.video.relative_to(source)) for clip in load_annotations(out)}
    assert found == set(names[:3])
    assert "1 lines or files cannot be used and were left out: " in said
    assert "\\xe9.txt: not a text: holds NUL characters" in said


def test_a_terminal_of_few_letters_does_not_end_the_work(source, add, tmp_path) -> None:
    add("日本.mp4")
    (source / "日本.txt").write_bytes(b"caf\xe9")
    command = [sys.executable, "-m", "clipvip.cli", "prepare", "folder", source, tmp_path / "o"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert rb"\u65e5\u672c.txt" in done.stdout


def test_texts_in_any_encoding_and_of_any_line(source, add, tmp_path, monkeypatch, capsys) -> None:
    right = {
        "mark": "naïve – café".encode("utf-8-sig"),
        "utf16": "naïve – café".encode("utf-16"),
        "latin": "naïve – café".encode("cp1252"),
        "crlf": b"\r\n\r\n  \r\na\r\nb\r\n",
        "mac": b"a\rb\r",
        "inner": "a\x85b\u2028c\x0bd\x0ce\x1cf\n\n".encode(),
    }
    wrong = {"cut16": b"\xff\xfea", "picture": b"\xff\xd8\xff\xe0\0\x10JFIF"}
    for name, data in (right | wrong).items():
        add(f"{name}.mp4")
        (source / f"{name}.txt").write_bytes(data)
    (source / "._mark.mp4").write_bytes(b"shadow")
    (source / "._mark.txt").write_bytes(b"Mac OS X\0")
    said = run(monkeypatch, capsys, "folder", source, tmp_path / "out.jsonl")
    assert texts(load_annotations(tmp_path / "out.jsonl")) == {
        **{f"{name}.mp4": ("naïve – café",) for name in ("latin", "mark", "utf16")},
        **{f"{name}.mp4": ("a", "b") for name in ("crlf", "mac")},
        "inner.mp4": ("a\x85b\u2028c\x0bd\x0ce\x1cf",),
    }
    assert f"1 texts are not UTF-8 and were read as Windows-1252: {source}/latin.txt\n" in said
    assert "2 lines or files cannot be used" in said
    assert f"{source}/cut16.txt: not utf-16, as its byte-order mark says" in said
    assert "have no text" not in said and "._mark" not in said


def test_links_are_followed_once_and_other_kinds_counted(source, add, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    add("a.mp4")
    elsewhere.mkdir()
    shutil.move(source / "a.mp4", elsewhere / "a.mp4")
    (elsewhere / "A.TXT").write_text("wrong case of the name")
    (elsewhere / "a.TXT").write_text("a text")
    for name in ("linked", "again"):
        (source / name).symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    for name in ("1.srt", "2.SRT", "1.nfo", "README"):
        (source / name).touch()
    for _ in range(2):  # the second time OUT lies there
        done = prepare("folder", source, source / "out.jsonl")
        (clip,) = load_annotations(source / "out.jsonl")
        assert clip.text == ("a text",) and clip.video.is_file()
        assert done.notes == [
            "5 files of other kinds skipped: 2 .srt, 1 .nfo, 1 without a suffix, 1 .txt"
        ]


def test_half_characters_are_repaired_and_counted(
    source, add, tmp_path, monkeypatch, capsys, caplog
) -> None:
    content = {"a": {"sentences": ["half \ud83d", "b"]}, "b": {"sentences": ["\ud83d\ude00"]}}
    dump(source / "train.json", content)
    add("a.mp4", "b.mp4")
    said = run(monkeypatch, capsys, "activitynet", source, tmp_path / "out.jsonl")
    clips = load_annotations(tmp_path / "out.jsonl")
    assert [clip.text for clip in clips] == [("half \ufffd", "b"), ("😀",)]
    assert "1 clips had half a character in a text, now U+FFFD: a\n" in said
    assert not caplog.messages


# --- one bad entry costs itself ------------------------------------------------------------------

TIMES = "\t".join(["00.00.51.926"] * 4)


@pytest.mark.parametrize(
    ("kind", "name", "content", "bad"),
    [
        (
            "didemo",
            "train_data.json",
            '[{"video": "a", "description": "t"}, {"video": "a"}, 3, {"video": "b", '
            '"description": ["t"]}, {"video": "b", "description": "u"}]',
            [
                "entry 2: no 'description'",
                "entry 3: expected an object in braces, got the number 3",
                "entry 4: 'description': expected a string, got a list",
            ],
        ),
        (
            "lsmdc",
            "LSMDC16_annos_training.csv",
            f"a\t{TIMES}\tt\n\nb\t1\nb\t{TIMES}\tu\n",
            [":3: 2 fields, expected 6 between tabs"],
        ),
        (
            "activitynet",
            "train.json",
            '{"a": {"sentences": ["t"]}, "c": {"sentences": [null]}, "d": [], "b": '
            '{"sentences": ["u"]}}',
            [": c: expected a string, got null", ": d: expected an object in braces, got a list"],
        ),
        (
            "hdvila",
            "x.jsonl",
            b'{"clip_id": "a", "text": "t"}\n\n{"clip_id": 3}\n{"clip_id": "\xff"}\n[1]\n{\n'
            b'{"clip": [{"clip_id": "b", "text": "u"}, {"clip_id": "c", "span": ["0", "1"]}]}\n',
            [
                ":3: 'clip_id': expected a string, got the number 3",
                ":4: 'utf-8' codec can't decode byte 0xff",
                ":5: expected an object in braces, got a list",
                ":6: not JSON",
                ":7: span: expected times such as 00:04:52.140, got '0'",
            ],
        ),
        (
            "captions",
            "train.jsonl",
            '{"clip_id": "x/a", "text": ["t"]}\n{"clip_id": "b"}\nnull\n\n'
            '{"video": "b.mp4", "caption": "u"}',
            [":2: no 'text' or 'caption'", ":3: expected an object in braces, got null"],
        ),
        (
            "msrvtt",
            "MSRVTT_train.9k.csv",
            f'video_id,sentence\na,t\n\nc\nc,"{"x" * (csv.field_size_limit() + 1)}"\n'
            'd,"v\ne,w,x\nb,u\n',
            [
                ": row 4: 1 fields, expected 2",
                ": row 5: field larger than field limit",
                ": row 6: unexpected end of data",
                ": row 7: 3 fields, expected 2",
            ],
        ),
    ],
)
def test_a_bad_line_or_entry_costs_itself(
    kind: str, name: str, content: str | bytes, bad: list[str], source, add, tmp_path
) -> None:
    (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    add("a.mp4", "b.mp4")
    done = prepare(kind, source, tmp_path / "out.jsonl")
    clips = load_annotations(tmp_path / "out.jsonl")
    said = {clip.video.name: clip.text or (clip.subtitle,) for clip in clips}
    assert said == {"a.mp4": ("t",), "b.mp4": ("u",)}
    assert len(done.bad) == len(bad)
    for told, expected in zip(done.bad, bad, strict=True):
        assert told.startswith(str(source / name)) and expected in told


def test_a_bad_text_of_an_lmdb_costs_its_clip(source, add, tmp_path) -> None:
    lmdb = pytest.importorskip("lmdb")
    (source / "x.jsonl").write_text('{"clip_id": "a.mp4"}\n{"clip_id": "b.mp4"}\n')
    folder = source / os.fsdecode(b"subtitles \xe9")
    with lmdb.open(os.fsencode(folder), map_size=1 << 20) as db, db.begin(write=True) as writing:
        writing.put(b"a.mp4", b"caf\xe9")
        writing.put(b"b.mp4", b"fine")
    add("a.mp4", "b.mp4")
    done = prepare("hdvila", source, tmp_path / "out.jsonl")
    assert done.clips == 1 and len(done.bad) == 1 and "x.jsonl:1: " in done.bad[0]


def test_a_clip_that_annotations_would_refuse_is_not_written(source, add, tmp_path) -> None:
    spans = [["00:00:00.0", "00:00:01.0"], ["00:00:02.0", "00:00:02.0"], ["00:00:nan", "00:00:03"]]
    clips = [{"clip_id": f"v.{i}", "span": span, "text": "t"} for i, span in enumerate(spans)]
    dump(source / "x.jsonl", {"video_id": "v", "clip": clips})
    add("v.mp4")
    for _ in range(2):  # the second time OUT lies there
        done = prepare("hdvila", source, source / "out.jsonl")
        assert len(load_annotations(source / "out.jsonl")) == 1
        assert [bad.partition(":")[0] for bad in done.bad] == ["v.1", "v.2"]


# --- layouts of peers ----------------------------------------------------------------------------


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def frozen_in_time(source: Path) -> Path:
    """The folder that the loaders of frozen-in-time and its descendants read; its lists."""
    videos = [0, 1, 2, 7010, 7020]
    annotations = [
        {"image_id": f"video{i}", "id": 20 * i + j, "caption": f"caption {j} of {i}"}
        for j in range(3)
        for i in videos
    ]
    images = [{"id": f"video{i}"} for i in videos]
    content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
    dump(source / "annotation" / "MSR_VTT.json", content | {"type": "captions"})
    lists = source / "high-quality" / "structured-symlinks"
    lists.mkdir(parents=True)
    for name, ids in {
        "train_list_jsfusion": [0, 1, 2, 7020],
        "val_list_jsfusion": [7010],
        "train_list_full": [0, 1],
        "val_list_full": [2],
        "test_list_full": [7010, 7020],
    }.items():
        (lists / f"{name}.txt").write_text("".join(f"video{i}\n" for i in ids))
    return lists


def test_msrvtt_as_frozen_in_time_has_it(source, add, tmp_path) -> None:
    lists = frozen_in_time(source)
    for protocol, key in ((2, "video7010"), (4, "video7010")):
        (lists / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps({key: 2}, protocol))
        add(*(f"videos/all/video{i}.mp4" for i in (0, 1, 2, 7010, 7020)))
        expected = {
            "train": [0, 1, 2, 7020],
            "train-9k": [0, 1, 2, 7020],
            "train-full": [0, 1],
            "val": [2],
            "test-full": [7010, 7020],
        }
        for split, ids in expected.items():
            prepare("msrvtt", source, tmp_path / "out.jsonl", split=split)
            assert texts(load_annotations(tmp_path / "out.jsonl")) == {
                f"video{i}.mp4": tuple(f"caption {j} of {i}" for j in range(3)) for i in ids
            }
        for split in ("test", "test-1k"):
            done = prepare("msrvtt", source, tmp_path / "out.jsonl", split=split)
            (clip,) = load_annotations(tmp_path / "out.jsonl")
            assert clip.text == ("caption 2 of 7010",)
            assert done.notes == [f"{split}: test-1k as {lists}/val_list_jsfusion.txt lists it"]
    with pytest.raises(
        PrepareError, match=r"holds no list of train-7k; expected MSRVTT_train\.7k\.csv"
    ):
        prepare("msrvtt", source, tmp_path / "out.jsonl", split="train-7k")


def test_a_pickle_runs_no_code(source, add, tmp_path) -> None:
    lists = frozen_in_time(source)
    add("video7010.mp4")
    path, ran = lists / "jsfusion_val_caption_idx.pkl", tmp_path / "ran"
    out = tmp_path / "out.jsonl"
    with pytest.raises(PrepareError, match=r"without jsfusion_val_caption_idx\.pkl"):
        prepare("msrvtt", source, out, split="test-1k")
    for content in (Exploit(ran), {"video7010": Exploit(ran)}, {"video7010": "2"}, [2], None):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(PrepareError, match="expected the number of a caption by video"):
            prepare("msrvtt", source, out, split="test-1k")
    for data in (b"", b"no pickle", pickle.dumps({"video7010": 2})[:-3]):
        path.write_bytes(data)
        with pytest.raises(PrepareError, match="expected the number of a caption by video"):
            prepare("msrvtt", source, out, split="test-1k")
    assert not ran.exists() and not out.exists()
    path.write_bytes(pickle.dumps({"video7010": 3}))
    with pytest.raises(PrepareError, match=r"video7010: caption 3 of 3"):
        prepare("msrvtt", source, out, split="test-1k")


def test_videos_to_train_and_to_measure_on_are_reported_apart(source, add, tmp_path) -> None:
    msrvtt(source)
    (source / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo1\nvideo2\nvideo7020\n")
    (source / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo7010,a text\n")
    add(*(f"video{i}.mp4" for i in (0, 1, 2, 7010, 7020)))

    def notes(split: str) -> list[str]:
        done = prepare("msrvtt", source, tmp_path / "out.jsonl", split=split)
        return [note for note in done.notes if note.startswith("warning")]

    for split in ("train", "train-9k"):
        of_val, of_test = notes(split)
        assert of_val.startswith("warning: 1 of the 4 videos of train-9k are in val too")
        assert of_test.startswith("warning: 1 of the 4 videos of train-9k are in test-full too")
    (of_9k,) = notes("val")
    assert "1 of the 1 videos of val are in train-9k too (MSRVTT_train.9k.csv)" in of_9k
    assert len(notes("test-full")) == 1
    assert notes("test") == notes("test-1k") == notes("train-full") == []


def test_msrvtt_as_lavis_and_vindlu_have_it(source, add, tmp_path) -> None:
    add("video0.mp4", "video1.mp4", "video7010.mp4")
    train = [{"video": f"video{i % 2}.mp4", "caption": f"caption {i}"} for i in range(4)]
    dump(source / "msrvtt_ret_train9k.json", train)
    dump(source / "msrvtt_ret_test1k.json", [{"video": "video7010.mp4", "caption": ["one"]}])
    out = tmp_path / "out.jsonl"
    for split in ("train", "train-9k"):
        prepare("msrvtt", source, out, split=split)
        assert texts(load_annotations(out)) == {
            "video0.mp4": ("caption 0", "caption 2"),
            "video1.mp4": ("caption 1", "caption 3"),
        }
    (source / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo0,other\n")
    prepare("msrvtt", source / "msrvtt_ret_test1k.json", out, split="test")
    assert texts(load_annotations(out)) == {"video7010.mp4": ("one",)}  # the file that was given


@pytest.mark.parametrize("name", ["train9k.jsonl", "didemo_ret_train.json", "Train.JSON"])
@pytest.mark.parametrize("whole", [False, True])
def test_captions_as_the_authors_and_peers_have_them(
    name: str, whole: bool, source, add, tmp_path
) -> None:
    records = [
        {"clip_id": "didemo/1", "text": ["a", "b"]},
        {"clip_id": "0001_Film_00.51.926-00.54.129", "text": "c"},
        {"video": "deep/1.mp4", "caption": "d"},
        {"clip_id": "didemo/1", "text": "e"},
    ]
    add("1.mp4", "films/0001_Film_00.51.926-00.54.129.avi", "deep/1.mp4")
    lines = [json.dumps(record) for record in records]
    (source / name).write_text(f"[{', '.join(lines)}]" if whole else "\n".join(lines))
    if name == "Train.JSON":
        with pytest.raises(PrepareError, match="0 files"):
            prepare("captions", source, tmp_path / "out.jsonl")
    else:
        (source / "latest.jsonl").touch()
        with pytest.raises(PrepareError, match="0 files"):
            prepare("captions", source, tmp_path / "out.jsonl", split="test")
        prepare("captions", source, tmp_path / "out.jsonl")
    prepare("captions", source / name, tmp_path / "out.jsonl", videos=source, split="test")
    found = {c.video.relative_to(source): c.text for c in load_annotations(tmp_path / "out.jsonl")}
    assert found == {
        Path("1.mp4"): ("a", "b", "e"),
        Path("films/0001_Film_00.51.926-00.54.129.avi"): ("c",),
        Path("deep/1.mp4"): ("d",),
    }
    (source / "train_2.jsonl").touch()
    if name != "Train.JSON":
        with pytest.raises(PrepareError, match=r"2 files .*train_2\.jsonl"):
            prepare("captions", source, tmp_path / "out.jsonl")


def test_didemo_may_end_after_30_seconds(source, add, tmp_path, monkeypatch, capsys) -> None:
    dump(source / "train_data.json", [{"video": "a.mp4", "description": "t"}])
    add("a.mp4")
    out = tmp_path / "out.jsonl"
    for flags, end in (([], None), (["--first-30s"], 30.0)):
        said = run(monkeypatch, capsys, "didemo", source, out, *flags)
        assert load_annotations(out)[0].end == end
        assert f"train: {source}/train_data.json" in said
    with pytest.raises(PrepareError, match="first_30s is for didemo"):
        prepare("lsmdc", source, out, first_30s=True)


@pytest.mark.parametrize("kind", ["didemo", "folder"])
def test_splits_of_msrvtt_are_refused_elsewhere(kind: str, source, tmp_path) -> None:
    with pytest.raises(PrepareError, match=f"'test-1k'; {kind} has train, val, test"):
        prepare(kind, source, tmp_path / "out.jsonl", split="test-1k")
    with pytest.raises(PrepareError, match="no such folder of videos"):
        prepare(kind, source, tmp_path / "out.jsonl", videos=tmp_path / "nowhere")


def test_what_verify_says_is_safe_to_print(source, tmp_path, monkeypatch, capsys) -> None:
    name = os.fsdecode(b"\xe9\x1b[31m.mp4")
    (source / name).write_bytes(b"no video")
    write_annotations(source / "clips.jsonl", [Clip(source / name, text=("t",))])
    monkeypatch.setattr(sys, "argv", ["clipvip", "verify", str(source / "clips.jsonl")])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert f"{source}/\\xe9\\x1b[31m.mp4 (line 1): " in said
    assert all(line.isprintable() for line in said.splitlines())


# --- files of strangers --------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
NAMES = ["a\0b", "a\0b.mp4", "half \ud83d", "half \ud83d.mp4", "x" * 300, "x" * 300 + ".mp4"]
NAMES += ["", " ", ".", "..", "/", "../..", "/etc/passwd", "/dev/zero", "y/" * 3000, "~", ".mp4"]
NAMES += ["pipe.mp4", "folder.mp4", "loop.mp4"]


def strange(source: Path) -> None:
    """Pipes and devices that have names of videos."""
    os.mkfifo(source / "pipe.mp4")
    (source / "folder.mp4").mkdir()
    (source / "loop.mp4").symlink_to("loop.mp4")


def spoil_didemo(source: Path) -> None:
    moments = [{"video": name, "description": "d"} for name in [*NAMES, "right"]]
    dump(source / "train_data.json", moments)


def spoil_lsmdc(source: Path) -> None:
    rows = [f"{name}\t0\t1\t2\t3\td\n" for name in [*NAMES, "right"]]
    text = "".join(rows).replace("\0", "").encode("utf-8", "surrogatepass")
    (source / "LSMDC16_annos_training.csv").write_bytes(text)


def spoil_activitynet(source: Path) -> None:
    dump(source / "train.json", {name: {"sentences": ["d"]} for name in [*NAMES, "right"]})


def spoil_hdvila(source: Path) -> None:
    spans = [None, ["00:00:00.0", "00:00:01.0"], ["9" * 4000 + ":0:0", "0:0:0"], ["nan:0:0", "inf"]]
    spans += [["0:0:nan", "0:0:inf"], [5, {}], "ab"]
    clips = [
        {"clip_id": name, "text": "d"} | ({} if span is None else {"span": span})
        for name in NAMES
        for span in spans
    ]
    clips += [{"clip_id": "right.1", "text": "d", "span": span} for span in spans[2:]]
    clips.append({"clip_id": "right.mp4", "text": "d"})
    lines = [*map(json.dumps, clips), DEEP, '{"clip": 5}', "5", "\0"]
    (source / "x.jsonl").write_text("\n".join(lines))


def spoil_captions(source: Path) -> None:
    lines = [json.dumps({"video": name, "caption": "d"}) for name in [*NAMES, "right"]]
    (source / "train.jsonl").write_text("\n".join([*lines, DEEP, "5", "[]"]))


def spoil_msrvtt(source: Path) -> None:
    names = [*NAMES, "right"]
    videos = [{"video_id": name, "split": "train"} for name in names]
    sentences = [{"video_id": name, "caption": "d"} for name in names]
    dump(source / "MSRVTT_data.json", {"videos": videos, "sentences": sentences})
    (source / "deep.json").write_text(DEEP)
    (source / "zeros.json").write_bytes(bytes(1000))
    (source / "endless.json").symlink_to("/dev/zero")


def spoil_folder(source: Path) -> None:
    (source / "right.txt").write_text("d")
    for name in ("a", "b", "c", "d", "e"):
        shutil.copy(source / "right.mp4", source / f"{name}.mp4")
    os.mkfifo(source / "a.txt")
    os.mkfifo(source / "somewhere else")
    (source / "b.txt").symlink_to("somewhere else")
    (source / "c.txt").symlink_to("/dev/zero")
    (source / "d.txt").write_bytes(bytes(1000))
    with (source / "e.txt").open("wb") as file:  # holes
        file.truncate(10**10)
    for name in ("..mp4", "..txt", "...txt", ".txt", "....mp4", "x" * 251 + ".mp4"):
        (source / name).write_bytes(b"x")


SPOIL = {
    "didemo": spoil_didemo,
    "lsmdc": spoil_lsmdc,
    "activitynet": spoil_activitynet,
    "hdvila": spoil_hdvila,
    "captions": spoil_captions,
    "msrvtt": spoil_msrvtt,
    "folder": spoil_folder,
}


@pytest.mark.parametrize("kind", SPOIL)
def test_strange_names_and_files_cost_themselves_alone(kind: str, source, add, tmp_path) -> None:
    add("right.mp4")
    strange(source)
    SPOIL[kind](source)
    done = prepare(kind, source, tmp_path / "out.jsonl")
    clips = load_annotations(tmp_path / "out.jsonl")
    right = [clip for clip in clips if clip.video.name == "right.mp4"]
    assert [clip.text or (clip.subtitle,) for clip in right] == [("d",)]
    assert len(clips) == done.clips
    assert all(len(bad) < 10_000 and "\n" not in bad for bad in done.bad)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("didemo", "train_data.json"),
        ("activitynet", "train.json"),
        ("lsmdc", "LSMDC16_annos_training.csv"),
        ("captions", "train.jsonl"),
        ("hdvila", "x.jsonl"),
        ("msrvtt", "MSRVTT_data.json"),
    ],
)
def test_a_list_that_is_none_is_one_error(kind: str, name: str, source, add, tmp_path) -> None:
    add("right.mp4")
    path = source / name

    def refused() -> None:
        for given in (source, path):
            with pytest.raises(PrepareError) as caught:
                prepare(kind, given, tmp_path / "out.jsonl", videos=source)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000

    for text in (DEEP, "5", "{" * 100_000, "\0" * 1000, ""):
        path.write_text(text)
        refused()
    path.unlink()
    os.mkfifo(path)
    refused()
    path.unlink()
    path.symlink_to("/dev/zero")
    refused()
    path.unlink()
    with path.open("wb") as file:
        file.truncate(10**11 if kind != "hdvila" else 10**8)  # which is read line by line
    refused()


def test_a_line_that_never_ends_costs_itself(source, add, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("clipvip.data.prepare.TEXT_BYTES", 100)
    monkeypatch.setattr(lines_in, "__defaults__", (100,))
    add("right.mp4")
    right = json.dumps({"clip_id": "right.mp4", "text": "d"})
    for line in ("x" * 101, "x" * 1000, " " * 101, json.dumps({"clip_id": "right.mp4" + "x" * 90})):
        (source / "x.jsonl").write_text(f"{line}\n{right}\n{line}")
        done = prepare("hdvila", source, tmp_path / "out.jsonl")
        assert done.clips == 1
        assert [bad.rpartition("x.jsonl:")[2] for bad in done.bad] == [
            "1: a line of more than 100 bytes",
            "3: a line of more than 100 bytes",
        ]


def test_a_pickle_asks_for_no_memory(source, add, tmp_path) -> None:
    lists = frozen_in_time(source)
    add("video7010.mp4")
    path = lists / "jsfusion_val_caption_idx.pkl"
    huge = (1 << 40).to_bytes(8, "little")
    right = pickle.dumps({"video7010": 2})
    for data in (
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in a table of 2**31
        b"\x80\x05\x96" + huge + b".",  # an array of a terabyte
        b"\x80\x04\x8e" + huge + b".",
        b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
        right[:-1] + b"0" + right,
        pickle.dumps({"video7010": True}),
        pickle.dumps({"video7010": [2]}),
        pickle.dumps({}),
    ):
        path.write_bytes(data)
        with pytest.raises(PrepareError, match="expected the number of a caption by video"):
            prepare("msrvtt", source, tmp_path / "out.jsonl", split="test-1k")
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"video7010": 2, "é": 300, "x": 10**9}, protocol))
        prepare("msrvtt", source, tmp_path / "out.jsonl", split="test-1k")
        (clip,) = load_annotations(tmp_path / "out.jsonl")
        assert clip.text == ("caption 2 of 7010",)
