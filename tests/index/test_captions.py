"""Properties of captions: each is shown for its own moment and content, or not at all."""

import json
import random
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from clipvip.files import shown
from clipvip.index import VideoIndex, captions, tables
from clipvip.index.captions import ANNOTATIONS, LONGEST, key_of
from clipvip.index.rows import About, FileState
from clipvip.index.show import print_hits
from clipvip.index.store import Store

WIDTH = 16
ABOUT = About("/models/mine", "0" * 64, WIDTH, ("/videos",))
TEXTS = ["it's 'quoted' --", '"); drop', "<b>bold</b>", "映画 é", "\x1b[31mred", "a\u202eb", "%41"]


def one(path, n=3, content="c", plan="windows 10 5"):
    """A file as Store.put takes it."""
    state = FileState(path, 9, 7, content, plan, 60.0, 1.7e9)
    vectors = np.eye(WIDTH, dtype=np.float32)[np.arange(n) % WIDTH]
    return state, [(5.0 * i, 5.0 * i + 10) for i in range(n)], vectors


def keys(store, *paths):
    return [key_of(m.file, m.start, m.end) for m in store.of_files(paths)[0]]


def shown_captions(store, *paths):
    """Path → captions of its moments, as a search looks them up."""
    found = {}
    for moment in store.of_files(paths or sorted(store.files()))[0]:
        key = key_of(moment.file, moment.start, moment.end)
        found.setdefault(moment.file.path, []).append(store.captions.of([key]).get(key))
    return found


def caption(store, *paths, by="model"):
    """Give every moment of these files a caption that names path and start."""
    moments = store.of_files(paths)[0]
    texts = {key_of(m.file, m.start, m.end): f"{m.file.path} {m.start}" for m in moments}
    assert store.captions.put(texts, by) == len(texts)


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "index", ABOUT)
    store.put([one("/v/a.mp4", content="A"), one("/v/b.mp4", content="B")])
    return store


def test_an_index_without_captions_works_as_before(store, tmp_path):
    store.tidy()
    assert store.drop(["/v/a.mp4"]) == 3
    assert store.move({"/v/b.mp4": one("/v/c.mp4", content="B")[0]}) == {"/v/c.mp4"}
    assert shown_captions(store) == {"/v/c.mp4": [None] * 3} and store.captioned() == 0
    assert not (tmp_path / "index" / "captions.lance").exists()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_kept_and_seen_by_an_open_reader(store, tmp_path, text):
    reader = Store.open(tmp_path / "index")
    key, other, _ = keys(store, "/v/a.mp4")
    assert reader.captions.of([key]) == {} and reader.captioned() == 0
    store.captions.put({key: text}, "it's a model")
    assert reader.captions.of([key, other]) == {key: text} and reader.captioned() == 1
    store.captions.put({key: "another"}, "it's another model")
    assert reader.captions.of([key, other]) == {key: "another"} and reader.captioned() == 1


def test_a_text_becomes_one_line_that_arrow_can_hold(store):
    first, second, third = keys(store, "/v/a.mp4")
    long = "word " * LONGEST
    store.captions.put({first: " a\n dog\t\x00 ", second: long, third: " \n "}, "model")
    store.captions.put({third: "half \ud83d"}, "model")
    found = store.captions.of([first, second, third])
    assert found[first] == "a dog \x00" and found[third] == "half ?"
    assert found[second] == long[:LONGEST].strip()


def test_captions_go_where_their_moments_go(store):
    store.put([one("/v/c.mp4", content="C"), one("/v/d.mp4", content="D")])
    caption(store, "/v/a.mp4", "/v/b.mp4", "/v/c.mp4")
    before = shown_captions(store)

    def state(path, content):
        return one(path, content=content)[0]

    store.move({"/v/a.mp4": state("/v/new.mp4", "A")})
    store.move({"/v/b.mp4": state("/v/c.mp4", "B"), "/v/c.mp4": state("/v/b.mp4", "C")})
    store.move({"/v/d.mp4": state("/v/e.mp4", "D")})  # which has none
    store.copy([("/v/b.mp4", state("/v/copy.mp4", "C"))])
    touched = FileState(**{**_fields(state("/v/c.mp4", "B")), "mtime_ns": 8})
    store.move({"/v/c.mp4": touched})
    expected = {"/v/new.mp4": before["/v/a.mp4"], "/v/b.mp4": before["/v/c.mp4"]}
    expected |= {"/v/c.mp4": before["/v/b.mp4"], "/v/copy.mp4": before["/v/c.mp4"]}
    expected |= {"/v/e.mp4": [None] * 3}
    for _ in range(2):
        assert shown_captions(store) == expected and store.captioned() == 12
        store.tidy()
    assert len(store.captions.keys()) == 12  # none is left of the old names


def _fields(state):
    return {name: getattr(state, name) for name in FileState.__slots__}


def test_captions_of_what_is_gone_are_never_shown_and_then_deleted(store, monkeypatch):
    caption(store, "/v/a.mp4", "/v/b.mp4")
    store.put([one("/v/a.mp4", content="other")])  # with the same spans, and so the same ids
    assert shown_captions(store, "/v/a.mp4") == {"/v/a.mp4": [None] * 3}
    assert store.captioned() == 3
    store.tidy()
    assert len(store.captions.keys()) == 6  # another process may be about to move their moments
    monkeypatch.setattr(captions, "KEPT", timedelta(0))
    store.tidy()
    assert sorted(store.captions.keys().to_pylist()) == sorted(keys(store, "/v/b.mp4"))
    store.drop(["/v/b.mp4"])
    assert len(store.captions.keys()) == 0
    store.put([one("/v/b.mp4", content="B")])
    assert shown_captions(store, "/v/b.mp4") == {"/v/b.mp4": [None] * 3}


def test_the_last_caption_is_shown_and_the_same_annotation_changes_nothing(store):
    first, second, third = keys(store, "/v/a.mp4")
    assert store.annotate({first: "a dog", second: "", "0" * 17: "of no moment"}) == 1
    assert store.captions.of([first, second]) == {first: "a dog"}
    store.captions.put({first: "an animal", third: "a cat"}, "model")
    store.annotate({first: "a dog"})
    assert store.captions.of([first, third]) == {first: "an animal", third: "a cat"}
    store.tidy()
    assert store.captions.of([first, third]) == {first: "an animal", third: "a cat"}
    store.annotate({first: "a big dog"})
    assert store.captions.of([first]) == {first: "a big dog"}
    store.annotate({first: ""})  # the annotation is gone: what a model wrote is left
    assert store.captions.of([first]) == {first: "an animal"}
    store.annotate({third: ""})
    assert store.captioned() == 2


def test_tidying_keeps_what_is_shown(store, monkeypatch):
    monkeypatch.setattr(captions, "INDEXED_ROWS", 4)
    draw = random.Random(0)
    names = keys(store, "/v/a.mp4", "/v/b.mp4")
    for number in range(30):
        chosen = draw.sample(names, 2)
        texts = {key: f"{number}" for key in chosen}
        # As two processes do that put at the same moment: neither deletes the other's rows.
        with monkeypatch.context() as patch:
            patch.setattr(type(store.captions._created()), "delete", lambda *_: None)
            store.captions.put(texts, draw.choice([ANNOTATIONS, "model", "other"]))
    before = store.captions.of(names)
    assert len(before) == 6 and len(store.captions.keys()) == 60
    store.tidy()
    assert store.captions.of(names) == before and store.captioned() == 6
    assert len(store.captions.keys()) <= 12
    (index,) = store.captions._table().list_indices()
    assert index.columns == ["key"]
    store.captions.put({names[0]: "later than the sorted keys"}, "model")
    assert store.captions.of(names[:1]) == {names[0]: "later than the sorted keys"}


def test_a_read_only_index_is_searched(store, tmp_path):
    caption(store, "/v/a.mp4")
    folder = tmp_path / "index"
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    reader = Store.open(folder)
    assert reader.captioned() == 3 and shown_captions(reader) == shown_captions(store)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_foreign_and_damaged_captions_are_one_line(store, tmp_path):
    import pyarrow as pa

    folder = tmp_path / "index"
    note = json.dumps([{"name": "huggingface", "source_column": "text", "vector_column": "v"}])
    strange = [
        (tables.captions_schema().with_metadata({"embedding_functions": note}), "has notes"),
        (pa.schema([pa.field("key", pa.string())]), "other columns"),
    ]
    for schema, reason in strange:
        store._database.create_table("captions", None, schema=schema)
        with pytest.raises(ValueError, match=f"table captions .*{reason}") as error:
            Store.open(folder).captions.of(["0" * 16])
        assert "\n" not in str(error.value)
        store._database.drop_table("captions")
    caption(store, "/v/a.mp4")
    shutil.rmtree(folder / "captions.lance" / "data")
    with pytest.raises(ValueError, match="damaged") as error:
        Store.open(folder).captions.of(keys(store, "/v/a.mp4"))
    assert "\n" not in str(error.value)
    shutil.rmtree(folder / "captions.lance")  # which is how captions are thrown away
    assert shown_captions(Store.open(folder)) == dict.fromkeys(["/v/a.mp4", "/v/b.mp4"], [None] * 3)


def test_processes_that_change_captions_at_once_and_are_killed(tmp_path):
    """Each caption says which moment it is of; writers move, replace and tidy, and some die."""
    where = tmp_path / "index"
    script = Path(__file__).with_name("caption_writers.py")
    command = [sys.executable, script, where]
    processes = [
        subprocess.Popen([*command, str(seed), "4" if seed else "1000"], stdout=subprocess.PIPE)
        for seed in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        store = Store.open(where)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert_own(store)
        processes[0].kill()
        assert [process.wait() for process in processes[1:]] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    assert_own(store)
    store.tidy()
    assert assert_own(store) == store.captioned() > 0


def assert_own(store):
    """Check that each caption is that of its moment's content; return how many there are."""
    count = 0
    for moment in store.moments(sorted(store.files())):
        key = key_of(moment.file, moment.start, moment.end)
        text = store.captions.of([key]).get(key)
        assert text in (None, f"{moment.file.content} {moment.start}")
        count += text is not None
    return count


class Index(VideoIndex):
    """An index whose model gives every sentence the same vector."""

    def _encoder_of_index(self):
        class Encoder:
            about = self.about

            def combined(self, queries, weights):
                return np.eye(WIDTH, dtype=np.float32)[0]

        return Encoder()


@pytest.mark.parametrize("in_memory", [False, True])
def test_hits_have_the_captions_of_their_best_moments(store, in_memory):
    caption(store, "/v/a.mp4")
    index = Index(store.where, in_memory=in_memory)
    assert index.captions == 3
    hits = index.search("anything")
    assert {hit.path: hit.caption for hit in hits} == {
        "/v/a.mp4": f"/v/a.mp4 {hits[0].start}",
        "/v/b.mp4": None,
    }
    (other,) = [hit for hit in hits if hit.path == "/v/b.mp4"]
    assert [hit.caption for hit in index.like(other) if hit.path == "/v/a.mp4"] == ["/v/a.mp4 0.0"]


def test_captions_are_printed_on_one_safe_line_and_whole_as_json(store, capsys):
    texts = [f"{text} {'long ' * 50}" for text in TEXTS]
    for text in texts:
        store.captions.put({keys(store, "/v/a.mp4")[0]: text}, "model")
        hits = Index(store.where).search("anything")
        print_hits(hits, "anything", False)
        printed = capsys.readouterr().out
        assert printed.count("long") < 50 and printed.count("…") == 1
        assert shown(text)[:8] in printed and "\x1b" not in printed and "\u202e" not in printed
        print_hits(hits, "anything", True)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["caption"] for line in lines] == [text.strip(), None]
