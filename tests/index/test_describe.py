"""Properties of describing an index: every moment that can be read gets a caption, once."""

import os
import random

import numpy as np
import pytest

from clipvip.data.loading import BadFile
from clipvip.index import describe as module
from clipvip.index.captions import key_of
from clipvip.index.describe import describe_moments
from clipvip.index.rows import About, FileState
from clipvip.index.store import Store

WIDTH = 16
ABOUT = About("/models/mine", "0" * 64, WIDTH, ("/videos",))


@pytest.fixture
def videos(tmp_path):
    """Files, of which only the names and states matter: what reads them is a stand-in."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.mp4").write_bytes(b"a video" * number)
    return folder


@pytest.fixture
def store(videos, tmp_path):
    """An index of these files, of four moments each."""
    store = Store.create(tmp_path / "index", ABOUT)
    put(store, *sorted(videos.iterdir()))
    return store


def put(store, *paths):
    for path in paths:
        status = os.stat(path)
        content = f"{status.st_mtime_ns}"[-16:]
        state = FileState(str(path), status.st_size, status.st_mtime_ns, content, "p", 9.0, 0.0)
        spans = [(2.0 * i, 2.0 * i + 4) for i in range(4)]
        store.put([(state, spans, np.eye(WIDTH, dtype=np.float32)[:4])])


class StandIn:
    """Captions that name the clip. read: (name, start) of each clip that was asked for.

    bad: names of files that cannot be read. stop: raises this error after so many captions.
    """

    def __init__(self, *bad, stop=None, after=0):
        self.read, self.bad, self.stop, self.after = [], bad, stop, after
        self.written = 0

    def __call__(self, clips, bad_files):
        self.read += [(clip.video.name, clip.start) for clip in clips]
        places = [place for place, clip in enumerate(clips) if clip.video.name not in self.bad]
        for place in random.sample(places, len(places)):
            if self.stop is not None and self.written == self.after:
                raise self.stop
            self.written += 1
            yield {place: f"{clips[place].video.name}\n at {clips[place].start}"}
        for name in {clip.video for clip in clips if clip.video.name in self.bad}:
            bad_files.append(BadFile(str(name), "cut off", 0))


def describe(store, caption, by="model", **options):
    return describe_moments(store, caption, by, show=lambda number: None, **options)


def captions(store):
    """(name, start) of each moment → its caption or None; each must be its own."""
    found = {}
    for moment in store.moments(sorted(store.files())):
        key = key_of(moment.file, moment.start, moment.end)
        name, text = os.path.basename(moment.file.path), store.captions.of([key]).get(key)
        assert text is None or text.startswith(f"{name} at {moment.start}")
        found[name, moment.start] = text
    return found


def test_every_moment_gets_its_caption_once(store, videos, capsys):
    caption, told = StandIn(), []
    done = describe_moments(store, caption, "model", show=told.append)
    assert done == (20, 0, 0, []) and sum(told) == 20
    assert None not in captions(store).values() and store.captioned() == 20
    assert "index: 20 moments, 20 with a caption (20 new)\n" in capsys.readouterr().err
    assert describe(store, StandIn(stop=AssertionError())) == (0, 20, 0, [])

    (videos / "new.mp4").touch()
    put(store, videos / "new.mp4")
    caption = StandIn()
    assert describe(store, caption) == (4, 20, 0, [])
    assert {name for name, _ in caption.read} == {"new.mp4"} and len(caption.read) == 4
    caption = StandIn()
    assert describe(store, caption, by="other", overwrite=True) == (24, 0, 0, [])
    assert len(set(caption.read)) == 24 and len(store.captions.keys()) == 24


def test_moments_without_words_are_counted_and_stay_as_they_are(store):
    def silent(clips, bad_files):
        yield {place: "  " for place in range(len(clips))}

    assert describe(store, silent) == (0, 0, 20, []) and store.captioned() == 0
    describe(store, StandIn())
    assert describe(store, silent, overwrite=True) == (0, 0, 20, []) and store.captioned() == 20


def test_moments_with_an_annotation_are_left_as_they_are(store):
    moment = store.moments(sorted(store.files()))[7]
    key = key_of(moment.file, moment.start, moment.end)
    store.annotate({key: f"{os.path.basename(moment.file.path)} at {moment.start}, by a human"})
    assert describe(store, StandIn()) == (19, 1, 0, [])
    assert store.captions.of([key])[key].endswith("by a human")
    describe(store, StandIn(), overwrite=True)
    assert not store.captions.of([key])[key].endswith("by a human")


@pytest.mark.parametrize("rounds", [1, 5, 10_000])
def test_a_bad_video_costs_only_its_moments(store, videos, rounds, monkeypatch, capsys):
    monkeypatch.setattr(module, "ROUND", rounds)
    (videos / "1.mp4").write_bytes(b"another video")
    (videos / "2.mp4").unlink()
    caption, told = StandIn("3.mp4"), []
    done = describe_moments(store, caption, "model", show=told.append)
    assert done[:2] == (8, 0) and sum(told) == 20
    reasons = {os.path.basename(bad["path"]): bad["reason"] for bad in done.bad_files}
    assert reasons.keys() == {"1.mp4", "2.mp4", "3.mp4"}
    assert "run clipvip embed again" in reasons["1.mp4"] and "moved" in reasons["2.mp4"]
    assert not {name for name, _ in caption.read} & {"1.mp4", "2.mp4"}
    assert {name for (name, _), text in captions(store).items() if text} == {"0.mp4", "4.mp4"}
    assert "3 files unreadable" in capsys.readouterr().err
    assert describe(store, StandIn()) == (4, 8, 0, done.bad_files[:2])


def test_files_that_only_a_stranger_would_name_are_not_opened(store, tmp_path):
    (tmp_path / "secret.txt").write_bytes(b"mine")
    put(store, tmp_path / "secret.txt")
    caption = StandIn()
    done = describe(store, caption)
    assert [bad["reason"] for bad in done.bad_files] == ["not a video or image by its name"]
    assert "secret.txt" not in {name for name, _ in caption.read}


def test_captions_of_a_file_that_changes_meanwhile_are_not_put(store, videos):
    def caption(clips, bad_files):
        yield from StandIn()(clips, bad_files)
        os.utime(videos / "4.mp4", ns=(5, 5))

    done = describe(store, caption)
    assert done.written == 16 and [x["path"] for x in done.bad_files] == [str(videos / "4.mp4")]
    assert captions(store)["4.mp4", 0.0] is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_run_keeps_what_is_done(store, error):
    with pytest.raises(error):
        describe(store, StandIn(stop=error(), after=7))
    assert store.captioned() == 7
    caption = StandIn()
    assert describe(store, caption) == (13, 7, 0, [])
    assert len(caption.read) == 13


def test_captions_are_saved_while_it_works(store, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    seen = []
    monkeypatch.setattr(module.time, "monotonic", lambda: 60.0 * len(seen))

    def caption(clips, bad_files):
        for one in StandIn()(clips, bad_files):
            seen.append(store.captioned())
            yield one

    describe(store, caption)
    assert seen == list(range(20))


def test_two_runs_share_the_moments(store, monkeypatch):
    monkeypatch.setattr(module, "ROUND", 4)
    other, caption = StandIn(), StandIn()

    def with_another(clips, bad_files):
        if not other.read:
            describe(store, other)
        yield from caption(clips, bad_files)

    done = describe(store, with_another)
    assert done.written == 4 and len(other.read) == 20 and store.captioned() == 20


def test_a_full_disk_and_a_run_without_any_caption_are_errors(store, monkeypatch):
    with pytest.raises(ValueError, match=r"no moment could be described; .*/\d.mp4: cut off"):
        describe(store, StandIn(*(f"{number}.mp4" for number in range(5))))
    assert store.captioned() == 0

    def full(self, *args, **options):
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), a")

    describe(store, StandIn(*(f"{number}.mp4" for number in range(4))))
    with monkeypatch.context() as patch:
        patch.setattr(type(store.captions._table()), "add", full)
        with pytest.raises(OSError, match="No space left on device"):
            describe(store, StandIn())
    assert store.captioned() == 4
