"""Small files in the formats in which the data sets are published."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from clipvip import cli
from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.prepare import PrepareError, prepare


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
        "ret1,msr7020,video7020,a boy plays grand theft auto 5\n"
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
        ("msrvtt", "x.json", "{}", "no JSON with videos and sentences there"),
        ("didemo", "train_data.json", '[{"description": "a"}]', "not as didemo is published"),
        ("didemo", "train_data.json", '{"a": 1}', "not as didemo is published"),
        ("lsmdc", "LSMDC16_annos_training.csv", "a\tb\n", "2 fields, expected 6"),
        ("activitynet", "train.json", "[]", "not as activitynet is published"),
        ("hdvila", "a.jsonl", "{}\n", "not as hdvila is published"),
        ("folder", "a.mp4", "", "of 1 nothing is said"),
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
    assert "8 videos are missing and were left out: v_0, v_1, v_2, v_4, v_5, …" in said
    assert (tmp_path / "out.missing.txt").read_text().split() == [
        f"v_{i}" for i in range(9) if i != 3
    ]
