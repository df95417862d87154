"""Properties of captioning annotations: what is written, kept, resumed and refused."""

import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

import clipvip.files
from clipvip import cli
from clipvip.captions import Asking, Captioner, Job, Record, caption
from clipvip.captions import run as module
from clipvip.captions.captioner import Answer, Preparer
from clipvip.captions.on_ray import CaptionClips, CaptionerThere
from clipvip.captions.summary import Summary
from clipvip.data.annotations import load_annotations
from clipvip.data.loading import BadFile, LoaderError, LoaderOptions, build_loader
from clipvip.data.shards import write_shards
from clipvip.data.video import read_pictures

HERE = {"num_workers": 0, "device": "cpu", "mixed_precision": "no", "max_bad_share": 0.2}
ASKING = Asking(length=8)


@pytest.fixture
def run(captioners, annotations, tmp_path):
    """run(**options) → (clips of OUT, Summary)."""

    def run(model="git", source=annotations, name="out.jsonl", **options):
        options = {"asking": ASKING, "batch_size": 3, **HERE, **options}
        done = caption(str(captioners[model]), source, tmp_path / name, **options)
        return load_annotations(tmp_path / name), done

    return run


@pytest.fixture
def say(monkeypatch):
    """say(texts) lets captioners say these, one after the other, for the clips of a run."""

    def say(texts):
        coming = iter(texts)

        def answer(self, inputs, counts):
            return [Answer(next(coming), False) for _ in counts]

        monkeypatch.setattr(Captioner, "answer", answer)

    return say


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_but_the_caption_stays_in_its_order(run, annotations):
    clips, done = run()
    before = load_annotations(annotations)
    assert [replace(clip, caption=None) for clip in clips] == [
        replace(clip, caption=None, video=before[i].video, image=before[i].image)
        for i, clip in enumerate(before)
    ]
    for clip, old in zip(clips, before, strict=True):
        assert os.path.samefile(clip.video.parent, old.video.parent)
    assert clips[7].caption == "an old caption"
    assert clips[8].caption is None  # it is missing
    assert done.kept == 1 and done.left_out["unreadable"] == 1
    assert done.captioned + sum(done.left_out.values()) == 10
    assert done.captioned == sum(clip.caption is not None for clip in clips) - 1


def test_captions_are_of_the_middle_frame_or_the_annotated_image(run, captioners, annotations):
    clips, _ = run()
    captioner, compared = Captioner(str(captioners["git"]), ASKING, "cpu", "no").start(), 0
    for clip in load_annotations(annotations):
        if clip.caption is None and clip.video.exists():
            media = clip.image or clip.video
            pictures = read_pictures(media, start=clip.start, end=clip.end, side=1280).frames
            text = captioner.answer(captioner.prepare([pictures]), [1])[0].text
            compared += clips[clip.line - 1].caption == text
            assert clips[clip.line - 1].caption in (text, None)  # None where it was filtered
    assert compared > 4


def test_neither_batches_nor_workers_change_captions(run):
    expected, _ = run(name="a.jsonl")
    assert run(name="b.jsonl", batch_size=16, num_workers=2)[0] == expected
    assert run(name="c.jsonl", batch_size=1)[0] == expected


def test_overwrite_replaces_captions_but_not_those_of_unreadable_clips(run, annotations, tmp_path):
    records = lines(annotations)
    records[8]["caption"] = "what it was"
    source = annotations.with_name("captioned.jsonl")
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    clips, done = run(source=source, overwrite=True)
    assert clips[7].caption != "an old caption"
    assert clips[8].caption == "what it was" and done.kept == 0


def test_filtered_clips_stay_without_a_caption_and_are_counted(run, say):
    said = ["a dog", "", "a a a a a", "!!!", " one\n two ", "a \ufffd", "it", "is", "the end"]
    say(said)
    clips, done = run()
    kept = ["a dog", None, None, None, "one two", None, "it", "an old caption", None, "is"]
    assert [clip.caption for clip in clips] == [*kept, "the end"]
    assert done.left_out == {"empty": 1, "repeated": 1, "not text": 2, "unreadable": 1}
    text = "\n".join(done.lines(8))
    assert "1 without a caption: repeated, such as 'a a a a a'" in text
    assert "5 of 11 clips captioned, 1 had a caption already" in text


def test_one_caption_for_everything_is_reported_but_kept(run, say):
    say(["A close up."] * 6 + ["a dog", "a cat", "a close up"])
    clips, done = run()
    assert done.most_common() == ("A close up.", 7) and done.is_suspicious()
    assert sum(clip.caption is not None for clip in clips) == 10
    assert "warning: 7 of 9 captions (78%)" in "\n".join(done.lines(8))


@pytest.mark.parametrize(
    "captions,suspicious",
    [
        (["a dog"], False),
        (["a dog", "a dog"], False),
        (["a dog"] * 3, True),
        ([f"dog {i}" for i in range(300)] + ["a dog"] * 9, False),
        ([f"dog {i}" for i in range(300)] + ["a dog"] * 16, True),
        ([f"dog {i}" for i in range(300)] + ["a dog"] * 15, False),
    ],
)
def test_which_share_of_equal_captions_is_suspicious(captions, suspicious):
    parts = Summary(), Summary()
    for place, text in enumerate(captions):
        parts[place % 2].add(Record(place, text))
    parts[0].join(parts[1])
    assert parts[0].is_suspicious() == suspicious


def test_post_pretraining_reads_the_captions(run, tmp_path):
    clips, _ = run(max_bad_share=0.2)
    letters = [*"abcdefghijklmnopqrstuvwxyz:."]
    tokens = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    options = LoaderOptions(
        task="omnisource", tokenizer=tokenizer, batch_size=5, image_size=32, num_frames=2,
        text_length=60, seed=0, max_bad_share=0.5,
    )  # fmt: skip
    loader = build_loader(clips, options, training=False)
    seen = {}
    for batch in loader:
        for row, place in enumerate(batch["clip_index"].tolist()):
            ids = batch["caption_ids"][row][batch["caption_mask"][row].bool()]
            said = tokenizer.decode(ids, skip_special_tokens=True)
            seen[place] = said if batch["caption_present"][row] else None
    assert len(seen) == 10
    for place, said in seen.items():
        expected = clips[place].caption
        assert (said is None) == (expected is None)
        assert said is None or said.replace(" ", "") == expected.lower().replace(" ", "")


# --- resuming -------------------------------------------------------------------------------


def test_killed_runs_and_ranks_write_what_one_run_writes(captioners, annotations, tmp_path):
    shards = tmp_path / "shards"
    write_shards(annotations, shards, clips_per_shard=3, num_workers=0, max_bad_share=0.2)
    script = Path(__file__).with_name("runs.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [str(captioners["git"]), str(annotations), str(shards), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("kill", "ranks"):
        ours, one = tmp_path / f"{name}.jsonl", tmp_path / "one.jsonl"
        assert ours.read_bytes() == one.read_bytes()
        report = ours.with_suffix(".caption.json")
        assert lines_of(report)["counts"] == lines_of(one.with_suffix(".caption.json"))["counts"]
        assert not (tmp_path / f"{name}.jsonl.journal").exists()
        for file in (tmp_path / "one").iterdir():
            if file.suffix == ".tar" or file.name == "manifest.jsonl":
                assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
        names = {file.name for file in (tmp_path / name).iterdir()}
        assert names == {file.name for file in (tmp_path / "one").iterdir()}


def lines_of(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def stopped(run, captioners, annotations, tmp_path, monkeypatch):
    """The journal of a run that stopped after its second batch."""
    answer, calls = Captioner.answer, []

    def failing(self, inputs, counts):
        calls.append(counts)
        if len(calls) == 3:
            raise RuntimeError("the GPU is gone")
        return answer(self, inputs, counts)

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "answer", failing)
        with pytest.raises(RuntimeError, match="gone"):
            run()
    journal = tmp_path / "out.jsonl.journal"
    assert len((journal / "00000.jsonl").read_bytes().splitlines()) == 6
    assert not (tmp_path / "out.jsonl").exists()
    return journal


def test_only_what_is_left_is_captioned(run, stopped, tmp_path, monkeypatch):
    expected, _ = run(name="whole.jsonl")
    clips, answer = [], Captioner.answer

    def counting(self, inputs, counts):
        clips.extend(counts)
        return answer(self, inputs, counts)

    monkeypatch.setattr(Captioner, "answer", counting)
    with (stopped / "00000.jsonl").open("ab") as file:
        file.write(b'{"place": 6, "caption": "a torn li')
    (stopped / "00003.jsonl").write_bytes(b'{"place": 7, "capt')  # of a rank that is not there now
    again, _ = run()
    assert again == expected and sum(clips) == 3 and not stopped.exists()


@pytest.mark.parametrize(
    "options,named",
    [
        ({"asking": Asking(length=9)}, "length 8 instead of 9"),
        ({"asking": Asking("a dog", 8)}, "prompt None instead of a dog"),
        ({"asking": Asking(length=8, beams=2)}, "beams 1 instead of 2"),
        ({"overwrite": True}, "overwrite False instead of True"),
        ({"model": "blip"}, "another model"),
    ],
)
def test_a_journal_of_other_options_is_refused(run, stopped, options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        run(**options)


def test_a_journal_of_other_annotations_is_refused(run, stopped, annotations):
    other = annotations.with_name("other.jsonl")
    other.write_text(annotations.read_text() + '{"video": "0.mp4"}\n')
    with pytest.raises(ValueError, match="other annotations"):
        run(source=other)


def test_a_run_that_captioned_nothing_binds_to_no_options(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(Captioner, "answer", None)
        run(asking=Asking("a dog", 8))
    _, done = run()
    assert done.captioned


def test_a_journal_that_was_being_deleted_is_not_resumed(run, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rmdir", killed)
        patch.setattr(os, "rmdir", killed)
        run()
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(Captioner, "answer", None)
    run()
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_run_that_waited_for_one_that_finished_does_not_start_again(run, tmp_path, monkeypatch):
    def finished_meanwhile(folder, *_):
        folder.mkdir()
        return nullcontext()  # its lock is that of a deleted file

    monkeypatch.setattr("clipvip.captions.journal.only_run", finished_meanwhile)
    with pytest.raises(ValueError, match="another run has just written"):
        run()


def test_another_run_is_kept_out(run, stopped, captioners, annotations, tmp_path, monkeypatch):
    monkeypatch.setattr(clipvip.files, "HERE_WAIT", 0.1)
    with (
        clipvip.files.only_run(stopped, "captions"),
        pytest.raises(ValueError, match="another run"),
    ):
        run()


def test_a_finished_run_is_not_repeated(run, tmp_path, monkeypatch):
    _, done = run()
    before = (tmp_path / "out.jsonl").stat()
    monkeypatch.setattr(Captioner, "answer", None)
    _, again = run()
    assert (tmp_path / "out.jsonl").stat() == before
    assert again.record()["left_out"] == done.record()["left_out"]
    assert again == done and again.lines(8)[0] == done.lines(8)[0]
    with pytest.raises(ValueError, match="made with length 8 instead of 7"):
        run(asking=Asking(length=7))
    (tmp_path / "mine.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"mine\.jsonl exists; delete it"):
        run(name="mine.jsonl")


def test_too_many_unreadable_clips_stop_the_run_and_are_tried_again(run, annotations, tmp_path):
    records = [{"video": f"later-{i}.mp4"} for i in range(3)] + lines(annotations)[:3]
    source = annotations.with_name("later.jsonl")
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(LoaderError, match="3 of 6 clips"):
        run(source=source)
    listed = lines(tmp_path / "out.bad_files.jsonl")
    assert [(bad["line"], bad["reason"]) for bad in listed] == [
        (i, "no such file") for i in (1, 2, 3)
    ]
    for i in range(3):
        (annotations.parent / f"later-{i}.mp4").symlink_to("0.mp4")
    _, done = run(source=source)
    assert not done.left_out["unreadable"] and done.clips == 6


def test_a_run_that_is_resumed_late_does_not_take_few_clips_for_all(tmp_path):
    count = 2000
    source = tmp_path / "many.jsonl"
    source.write_text("".join(f'{{"video": "{i}.mp4"}}\n' for i in range(count)))
    about = {"overwrite": False, "length": 8, "model": "m", "name": "m"}

    def record(place):
        bad = BadFile(f"{place}.mp4", "gone", place)
        if place % 25 == 0:
            return Record(place, None, "unreadable", "gone", file=bad)
        return Record(place, f"clip {place}")

    def attempt(last):
        job = Job(source, tmp_path / "out.jsonl", about, max_bad_share=0.05)
        with job.only_run() as finished:
            assert finished is None
            for batch in job.batches():
                if batch[0] >= last:
                    return None
                job.add([record(place) for place in batch])
            return job.finish()

    attempt(count - 200)
    attempt(count - 50)
    done = attempt(count)
    assert (done.captioned, done.left_out["unreadable"]) == (count - count // 25, count // 25)


def test_a_clip_that_the_processor_refuses_is_listed_alone(run, annotations, tmp_path, monkeypatch):
    prepare = Preparer.__call__

    def picky(self, pictures):
        if any(picture.shape == (30, 50, 3) for clip in pictures for picture in clip):
            raise ValueError("I read no PNG")
        return prepare(self, pictures)

    monkeypatch.setattr(Preparer, "__call__", picky)
    _, done = run(max_bad_share=0.5)
    assert done.left_out["unreadable"] == 3
    assert "I read no PNG" in (tmp_path / "out.bad_files.jsonl").read_text()


# --- other executors ------------------------------------------------------------------------


def test_records_may_come_from_elsewhere_in_any_order_and_twice(
    run, captioners, annotations, tmp_path
):
    expected, _ = run()
    captioner = Captioner(str(captioners["git"]), ASKING, "cpu", "no")
    about = module._about(captioner, False)
    there = CaptionerThere(str(captioners["git"]), ASKING, "no", captioner.fingerprint())
    job = Job(annotations, tmp_path / "far.jsonl", about, batch_size=4, max_bad_share=0.2)
    with job.only_run() as finished:
        assert finished is None
        work = CaptionClips(there, "cpu", 0, job.clips)
        sent = [pickle.loads(pickle.dumps(work)) for _ in range(2)]
        for each in sent:
            each.begin(lambda clips: None)
        batches = enumerate(job.batches())
        found = [part for i, batch in batches for part in sent[i % 2].do([batch], frozenset())]
        for part in [*found[::-1], found[0]]:
            job.add(part)
        written = (tmp_path / "far.jsonl.journal" / "00000.jsonl").read_bytes()
        assert written.count(b"\n") == 10
        job.finish()
    assert load_annotations(tmp_path / "far.jsonl") == expected


def test_a_job_that_is_not_done_cannot_finish(captioners, annotations, tmp_path):
    captioner = Captioner(str(captioners["git"]), ASKING, "cpu", "no")
    job = Job(annotations, tmp_path / "far.jsonl", module._about(captioner, False))
    with job.only_run():
        job.add([Record(0, "a dog")])
        with pytest.raises(ValueError, match="9 clips have no record"):
            job.finish()


# --- the command ----------------------------------------------------------------------------


def test_the_command(captioners, annotations, tmp_path, monkeypatch, capfd):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["clipvip", "caption", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    out = tmp_path / "out.jsonl"
    options = ("--length", 8, "--max-bad-share", 0.2, "--mixed-precision", "no", "--workers", 0)
    status, said, _ = command(captioners["blip"], annotations, out, *options)
    assert status == 0 and f"{out}: " in said and "of 11 clips captioned" in said
    status, _, error = command(captioners["blip"], annotations, annotations, *options)
    assert status == 1 and error.startswith("clipvip: error: OUT is ") and error.count("\n") == 1
    status, _, error = command(tmp_path / "no", annotations, out)
    assert status == 1 and "does not exist" in error and error.count("\n") == 1
    status, _, error = command(captioners["blip"], tmp_path / "no.jsonl", out)
    assert status == 1 and "no.jsonl" in error and error.count("\n") == 1


def test_less_than_no_workers_are_refused_by_the_name_of_the_option(run):
    with pytest.raises(ValueError, match="--workers is -1; expected at least 0"):
        run(num_workers=-1)
