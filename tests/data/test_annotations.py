import json
import os
import pickle
import re
import tracemalloc
from pathlib import Path

import pytest

from clipvip.data import annotations
from clipvip.data.annotations import (
    AnnotationError,
    Annotations,
    Clip,
    load_annotations,
    write_annotations,
)
from clipvip.data.video import DecodeError, read_frames


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "clips.jsonl"
    path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in lines))
    return path


def test_documented_example_is_valid(tmp_path: Path) -> None:
    example = re.findall(r"^    (\{.*\})$", annotations.__doc__ or "", re.M)
    clips = load_annotations(write(tmp_path, *example))
    assert len(clips) == 4
    assert clips[1] == Clip(
        tmp_path / "talk.mp4", 12.5, 20.0, ("a man speaks", "he points"), line=2
    )


def test_paths_are_relative_to_the_file_and_lines_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        b"\xef\xbb\xbf" + b'{"video": "a.mp4", "image": "b.jpg", "text": null}',
        "",
        '{"video": "/elsewhere/c.mp4"}',
    )
    first, second = load_annotations(path)
    assert (first.video, first.image, first.text) == (tmp_path / "a.mp4", tmp_path / "b.jpg", ())
    assert (second.video, second.line) == (Path("/elsewhere/c.mp4"), 3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"video": "a.mp4"', "not JSON"),
        (b'{"video": "\xff"}', "not UTF-8"),
        ('["a.mp4"]', "expected an object in braces, got a list"),
        ('{"text": "a"}', "no 'video'"),
        ('{"video": 3}', "'video' must be a string, got the number 3"),
        ('{"vidoe": "a.mp4"}', "unknown key 'vidoe' (did you mean 'video'?)"),
        ('{"video": "a.mp4", "zzz": 1}', "unknown key 'zzz' (known: video, start"),
        ('{"video": "a.mp4", "start": "1"}', "'start' must be a number of seconds, got a string"),
        ('{"video": "a.mp4", "start": true}', "got true or false"),
        ('{"video": "a.mp4", "end": -1}', "'end' must be finite and not negative, got -1"),
        ('{"video": "a.mp4", "end": NaN}', "'end' must be finite"),
        ('{"video": "a.mp4", "start": 5, "end": 5}', "'end' 5 is not after 'start' 5"),
        ('{"video": "a.mp4", "text": []}', "'text' is an empty list"),
        ('{"video": "a.mp4", "text": ["a", 1]}', "'text'[1] must be a sentence, got the number 1"),
        ('{"video": "a.mp4", "caption": " "}', "'caption' is empty"),
        ('{"video": "a.mp4", "subtitle": {}}', "'subtitle' must be a string, got an object"),
        ('{"video": "a.mp4", "start": 1' + "0" * 400 + "}", "'start' must be finite"),
        (b'{"video": "a.mp4", "text": "\xed\xa0\xbd"}', "not UTF-8 (byte 28)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"\\u001b[2J": 1}', r"unknown key '\x1b[2J'"),
    ],
)
def test_bad_line_is_named_with_file_line_and_reason(
    tmp_path: Path, line: str | bytes, reason: str
) -> None:
    path = write(tmp_path, '{"video": "a.mp4"}', line)
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and reason in message and message.isprintable()


def test_several_bad_lines_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, *[json.dumps({"text": str(i)}) for i in range(8)])
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path)
    message = str(caught.value)
    assert message.count("no 'video'") == 5 and "and 3 more bad lines" in message


def test_a_file_of_another_kind_is_reported_what_is_expected(tmp_path: Path) -> None:
    pretty = write(tmp_path, "[", '  {"video": "a.mp4"},', "]")
    with pytest.raises(AnnotationError, match="expected JSON Lines"):
        load_annotations(pretty)
    with pytest.raises(AnnotationError) as caught:
        load_annotations(write(tmp_path, '{"video": "a.mp4"}', "{"))
    assert "expected JSON Lines" not in str(caught.value)


def test_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="No such file"):
        load_annotations(tmp_path / "none.jsonl")
    with pytest.raises(AnnotationError, match="holds no clips"):
        load_annotations(write(tmp_path, ""))


IMPOSSIBLE = ["\ud83d.mp4", "a\0.mp4", "a" * 300 + ".mp4", "a/" * 3000 + ".mp4"]


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=["half", "NUL", "long", "deep"])
def test_a_name_that_no_file_can_have_costs_its_clip_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    write_annotations(path, [Clip(tmp_path / "good.mp4"), Clip(tmp_path / name)])
    for good, bad in (load_annotations(path), Annotations(path)):
        assert good.video == tmp_path / "good.mp4"
        with pytest.raises(DecodeError, match=r"name|long"):
            read_frames(bad.video, 1, size=16)


NAMES = [os.fsdecode(name) for name in (b"caf\xe9.mp4", b"\xff\n\xfe.jpg", b"\xc3\xa9 \xe9.mp4")]


def test_names_that_are_not_utf8_are_written_and_read_back(tmp_path: Path) -> None:
    clips = [Clip(tmp_path / name, image=tmp_path / "a" / name) for name in NAMES]
    path = tmp_path / os.fsdecode(b"\xe9.jsonl")
    write_annotations(path, clips)
    path.read_text("utf-8")
    for read in (load_annotations(path), Annotations(path)):
        for clip, again in zip(clips, read, strict=True):
            assert os.fsencode(again.video) == os.fsencode(clip.video)
            assert again.image == clip.image


@pytest.mark.parametrize("load", [load_annotations, Annotations])
def test_half_a_character_in_a_text_is_replaced_with_one_warning(
    load, tmp_path: Path, caplog
) -> None:
    halves = {"a \ud83d b": "a \ufffd b", "\ude00\ud83d": "\ufffd\ufffd", "\udc80": "\ufffd"}
    lines = ['{"video": "a.mp4", "text": "whole \\ud83d\\ude00 é"}', ""]
    for half in halves:
        lines.append(json.dumps({"video": "a.mp4", "text": ["b", half], "caption": half}))
        lines.append(json.dumps({"video": "a.mp4", "subtitle": half}))
    path = write(tmp_path, *lines)
    whole, *clips = load(path)
    assert whole.text == ("whole 😀 é",) and not whole.repaired
    assert [(clip.text, clip.caption) for clip in clips[::2]] == [
        (("b", right), right) for right in halves.values()
    ]
    assert [clip.subtitle for clip in clips[1::2]] == list(halves.values())
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}:3: a text holds half a character")
    assert warning.endswith("so do 5 more lines")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_clips_by_place_are_those_of_the_whole_file(end: str, start: bytes, tmp_path: Path) -> None:
    lines = [json.dumps({"video": f"{i}.mp4", "text": "é\r\n" * i or "a"}) for i in range(9)]
    for place, blank in ((9, " "), (4, ""), (4, "\t"), (0, "")):
        lines.insert(place, blank)
    path = tmp_path / "clips.jsonl"
    path.write_bytes(start + end.join(lines).encode())
    clips = load_annotations(path)
    by_place = pickle.loads(pickle.dumps(Annotations(path)))
    assert len(by_place) == len(clips) == 9
    assert [by_place[place] for place in range(9)] == clips


def test_clips_by_place_take_a_few_bytes_each(tmp_path: Path) -> None:
    text = "a sentence of many words, as captions of the web have them " * 4
    path = write(tmp_path, *(json.dumps({"video": f"{i}.mp4", "text": text}) for i in range(5000)))
    tracemalloc.start()
    clips = Annotations(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 16 * len(clips) and peak < 100 * len(clips)


def test_a_file_changed_while_in_use_is_an_error(tmp_path: Path) -> None:
    lines = [json.dumps({"video": f"{i}.mp4"}) for i in range(3)]
    clips = Annotations(write(tmp_path, *lines))
    write(tmp_path, "{}", *lines)
    with pytest.raises(AnnotationError, match=r"clips\.jsonl:2: changed .*start again"):
        clips[1]
