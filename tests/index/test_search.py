"""Properties of searches: exact, the same on disk and in memory, filtered, and shown safely."""

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from clipvip import VideoIndex, cli
from clipvip.embedding import fingerprint
from clipvip.index import store as store_module
from clipvip.index.hits import stretches
from clipvip.index.memory import Memory
from clipvip.index.query import files_of, note_model
from clipvip.index.rows import About, FileState, Where
from clipvip.index.show import day, duration, span
from clipvip.index.store import Rows, Store
from clipvip.index.video_index import OnDisk

WIDTH = 16
DAY = 86_400.0


@pytest.fixture(scope="module")
def about(save_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    loaded = save_model(folder)
    print_of = fingerprint(*loaded)
    note_model(folder, files_of(folder), *loaded, print_of)
    return About(str(folder), print_of, WIDTH, ("/videos",))


def unit(draw, *shape):
    vectors = draw.standard_normal((*shape, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def planted(draw, path, windows, date=0.0):
    state = FileState(path, 1, 1, path, "windows 10 5", windows * 5.0 + 5.0, date)
    spans = [(i * 5.0, i * 5.0 + 10.0) for i in range(windows)] if windows > 1 else [(None, None)]
    return state, spans, unit(draw, windows)


NAMES = [
    "a/x.mp4",
    "a/y.mp4",
    "ab/z.mp4",
    "b/\udcff\x1b[31m.mp4",
    "b/<i>'\"%_.mp4",
    "b/é\u202e.mp4",
]


@pytest.fixture(scope="module")
def where(about, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "index"
    draw = np.random.default_rng(0)
    store = Store.create(folder, about)
    for number, name in enumerate(NAMES):
        store.put([planted(draw, f"/videos/{name}", 1 + 9 * (number % 3), number * DAY)])
    return folder


@pytest.fixture
def index(where):
    return VideoIndex(where)


def reference(index, vector, where=None):
    """Every hit by plain NumPy over all rows of the store."""
    found = []
    for path in index.store.files(where):
        moments, vectors = index.store.of_files([path])
        scores = vectors.astype(np.float64) @ vector
        spans = np.array([(m.start, m.end) for m in moments], float)
        for each in stretches(spans[:, 0], spans[:, 1], scores, 1000):
            moment = moments[each.row]
            found.append((-scores[each.row], path, moment.start, each.from_, each.to))
    return sorted(found, key=lambda hit: hit[:2])


def plain(hits):
    return [(-hit.score, hit.path, hit.start, hit.from_, hit.to) for hit in hits]


def same(found, expected):
    assert [x[1:] for x in found] == [x[1:] for x in expected]
    assert np.allclose([x[0] for x in found], [x[0] for x in expected], atol=1e-6)


FILTERS = [
    None,
    Where(),
    Where(folder="/videos/a"),
    Where(folder="/videos/a/"),
    Where(min_duration=50.0, max_duration=60.0),
    Where(after=DAY, before=4 * DAY),
    Where(folder="/videos/b", min_duration=50.0),
    Where(folder="/nowhere"),
]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("limits", FILTERS, ids=str)
def test_a_search_finds_what_a_look_at_everything_finds(where, in_memory, limits):
    index = VideoIndex(where, in_memory=in_memory)
    vector = index._encoder_of_index().vector("a dog")
    expected = reference(index, vector.astype(np.float64), limits)
    for k in (1, 4, 1000):
        same(plain(index.search("a dog", k, where=limits)), expected[:k])
    assert {file.path for file in index.videos(limits)} == {hit[1] for hit in expected}


def test_memory_and_disk_give_the_same_hits(where):
    on_disk, in_memory = VideoIndex(where), VideoIndex(where, in_memory=True)
    for query in ("a dog", "a cat", ["a dog", "12"]):
        hits = on_disk.search(query, 50)
        same(plain(hits), plain(in_memory.search(query, 50)))  # torch and NumPy round differently
        assert on_disk.like(hits[3], 50) == in_memory.like(hits[3].moment.id, 50)


def test_like_leaves_out_the_moment_itself(index):
    hits = index.search("a dog", 20)
    for hit in hits[:6]:
        others = index.like(hit, 20)
        assert hit.moment.id not in [other.moment.id for other in others]
        assert index.moment(hit.moment.id) == hit.moment
        _, vector = index.store.moment(hit.moment.id)
        best = reference(index, (vector / np.linalg.norm(vector)).astype(np.float64))
        assert best[0][1:3] == (hit.path, hit.start)  # it is its own best
        same(plain(others), best[1:21])
    for wrong in ("0" * 16, "x", "' or 1=1", ""):
        with pytest.raises(ValueError, match="has no moment"):
            index.like(wrong)


def test_a_server_sees_what_is_put_and_removed(about, tmp_path):
    draw = np.random.default_rng(1)
    store = Store.create(tmp_path / "index", about)
    index = VideoIndex(tmp_path / "index", in_memory=True)
    assert index.search("a dog") == [] and index.count == 0
    for number in range(3):
        index._reload_from = 0.0
        store.put([planted(draw, f"/videos/{number}/v.mp4", 4)])
        paths = {hit.path for hit in index.search("a dog", 100)}
        assert paths == {f"/videos/{x}/v.mp4" for x in range(number + 1)}
    assert index.remove("/videos/1") == 4 and index.remove("/videos/2/v.mp4") == 4
    assert index.remove("/videos") == 4 and index.remove("/videos") == 0
    assert index.count == 0 and index.about == about


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_index_made_again_in_its_place_is_seen(about, tmp_path, in_memory):
    folder, draw = tmp_path / "index", np.random.default_rng(1)
    index = VideoIndex(folder, in_memory=in_memory)
    for name in ("/v/old.mp4", "/v/new.mp4"):  # with equal numbers of versions
        Store.create(folder, about).put([planted(draw, name, 4)])
        assert {hit.path for hit in index.search("a dog")} == {name}
        assert [file.path for file in index.videos()] == [name]
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no index in"):
        index.search("a dog")


def test_a_large_index_is_left_on_disk(where, monkeypatch):
    monkeypatch.setattr(store_module, "EXACT_ROWS", 5)
    large = VideoIndex(where, in_memory=True)
    assert large.search("a dog", 3)
    assert isinstance(large._source(), OnDisk)


def test_a_query_is_embedded_again_if_the_index_is_replaced_meanwhile(index, monkeypatch):
    class Replaced:
        def __init__(self, real):
            self.about, self.real = real.about._replace(fingerprint="that of another model"), real

        def combined(self, queries, weights):
            return -self.real.combined(queries, weights)  # what another model would give

    expected, real = index.search("a dog"), index._encoder_of_index()
    encoders = iter([Replaced(real), real])
    monkeypatch.setattr(index, "_encoder_of_index", lambda: next(encoders))
    assert index.search("a dog") == expected


def test_threads_share_an_index(where):
    index = VideoIndex(where, in_memory=True)
    expected = index.search("a dog")
    with ThreadPoolExecutor(8) as pool:
        assert all(x == expected for x in pool.map(lambda _: index.search("a dog"), range(16)))


def near_ties(draw, rows, width, gap):
    """Unit vectors whose products with the first axis differ by about `gap`."""
    vectors = draw.standard_normal((rows, width))
    vectors[:, 0] = 0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = 0.5 + gap * draw.permutation(rows)
    vectors = vectors * np.sqrt(1 - scores[:, None] ** 2)
    vectors[:, 0] = scores
    return vectors


@pytest.mark.parametrize("kind", ["near ties", "equal", "tiny values", "many directions"])
def test_search_in_memory_is_exact(kind):
    draw = np.random.default_rng(2)
    rows, width = 3000, 512
    query = draw.standard_normal(width)
    query /= np.linalg.norm(query)
    if kind == "near ties":  # far nearer than fp16 tells apart
        turn = np.linalg.qr(np.column_stack([query, draw.standard_normal((width, width - 1))]))[0]
        vectors = near_ties(draw, rows, width, 1e-7) @ (turn * np.sign(turn[:, 0] @ query)).T
    elif kind == "equal":
        vectors = np.repeat(query[None], rows, 0)
    elif kind == "tiny values":  # below the normal range of fp16, all of one sign
        query = np.full(width, 4e-5)
        query[0] = np.sqrt(1 - (query[1:] ** 2).sum())
        vectors = np.abs(draw.standard_normal((rows, width))) * 3e-5
        vectors[:, 0] = 1
    else:
        vectors = draw.standard_normal((rows, width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    half, query = vectors.astype(np.float16), query.astype(np.float32)
    files = [FileState(f"/{i}", 1, 1, "", "", 1.0, 0.0) for i in range(rows // 10)]
    spans = np.tile(np.arange(10.0), rows // 10)
    file = np.repeat(np.arange(rows // 10, dtype=np.int32), 10)
    memory = Memory(Rows(files, file, spans, spans + 1, half))
    exact = (half.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    best = dict(zip((file.path for file in files), exact.reshape(-1, 10).max(1), strict=True))
    for most in (1, 10, 100, len(files), len(files) + 5):
        found, bounds = memory.candidates(query, most)
        assert len(set(found)) == len(found) == min(most, len(files))
        assert all(best[path] <= bound for path, bound in zip(found, bounds, strict=True))
        assert (bounds[1:] <= bounds[:-1]).all()
        assert all(best[path] <= bounds[-1] for path in best.keys() - set(found))
    for curve in memory.curves(query, [*best]):
        place = 10 * int(curve.file.path[1:])
        assert (curve.scores == exact[place : place + 10]).all()


@pytest.mark.parametrize("k", [0, -1, 1.5, 10**9, None])
def test_a_wrong_k_is_refused(index, k):
    with pytest.raises(ValueError, match="k is"):
        index.search("a dog", k)


@pytest.mark.parametrize("folder", ["videos/a", Path("/videos/a"), "/videos/b/../a/", "/videos//a"])
def test_a_filter_takes_any_form_of_a_folder(index, folder, monkeypatch):
    monkeypatch.chdir("/")
    filtered = index.search("a dog", 100, where=Where(folder=folder))
    assert {hit.path for hit in filtered} == {f"/videos/{name}" for name in ("a/x.mp4", "a/y.mp4")}
    assert len(index.videos(Where(folder=folder))) == 2


def test_an_absent_index_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="make one: clipvip embed"):
        VideoIndex(tmp_path / "no").search("a dog")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(where, monkeypatch, capsys):
    def command(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["clipvip", "search", *arguments, "--index", str(where)])
        if code:
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert left.value.code == code
        else:
            cli.main()
        output = capsys.readouterr()
        return output.err if code else output.out

    return command


def test_json_lines_are_the_hits(run, index):
    lines = run("a dog", "a cat", "--weights", "1", "-0.5", "--json", "-k", "7").splitlines()
    hits = index.search(["a dog", "a cat"], 7, weights=[1, -0.5])
    assert [json.loads(line) for line in lines] == [hit.as_json() for hit in hits]
    one = json.loads(run("--like", hits[0].moment.id, "-k", "1", "--json"))
    assert one == index.like(hits[0], 1)[0].as_json()


def test_the_table_shows_moments_and_no_control_characters(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = run("a dog", "-k", "100")
    assert "00:00:05–00:00:15" in table
    assert "\x1b" not in table and "\u202e" not in table and "<i>'\"%_.mp4" in table
    assert run("a dog", "--folder", "/nowhere") == "nothing in the index fits these filters\n"


def test_filters_are_typed_as_people_do(run):
    def paths(*filters):
        lines = run("a dog", "-k", "100", "--json", *filters).splitlines()
        return {json.loads(line)["path"].split("/")[2] for line in lines}

    assert paths("--folder", "/videos/a") == {"a"}
    assert paths("--min-duration", "0:50", "--max-duration", "1:00") == {"a", "b"}
    assert paths("--after", "2000-01-01") == set()
    assert paths("--before", "1960-01-01") == set()


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((), "there is no query"),
        (("a", "--like", "0" * 16), "--like takes no other query"),
        (("a", "--weights", "1", "2"), "2 weights are given for 1 queries"),
        (("a", "--min-duration", "1:99"), "--min-duration is '1:99'; expected seconds"),
        (("a", "--after", "May"), "--after is 'May'; expected a day"),
        (("--image", "none.jpg"), "none.jpg is no file"),
        (("a", "-k", "0"), "k is 0"),
    ],
)
def test_errors_are_one_line(run, arguments, wrong):
    error = run(*arguments, code=1)
    assert wrong in error and error.count("\n") == 1


def test_a_missing_package_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    error = run("a dog", code=1)
    assert 'pip install "clipvip[search]"' in error and error.count("\n") == 1


def test_spans_durations_and_days():
    assert span(None, None) == ""
    assert span(2465.4, 2480.0) == "00:41:05–00:41:20"
    assert span(None, 3599.6) == "00:00:00–01:00:00"
    assert span(86_400.0, None) == "24:00:00–"
    assert span(1.04, 1.96) == "00:00:01.0–00:00:02.0"
    assert [duration("x", text) for text in ("90", "1:30", "1:02:03", "0.5", None)] == [
        90.0, 90.0, 3723.0, 0.5, None
    ]  # fmt: skip
    for text in ("", "1:", ":1", "1:60", "-1", "1e3", "nan", "1:2:3:4", "²"):
        with pytest.raises(ValueError, match="expected seconds"):
            duration("x", text)
    assert day("x", None) is None
    assert day("x", "2024-05-02") == time.mktime((2024, 5, 2, 0, 0, 0, 0, 0, -1))
    assert day("x", "2024-05-02T00:00:00+00:00") == 1_714_608_000
    for text in ("", "2024-13-01", "yesterday", "9" * 50):
        with pytest.raises(ValueError, match="expected a day"):
            day("x", text)
