"""Properties of the tables of an index: what is put is found, whole and once."""

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
from lancedb.merge import LanceMergeInsertBuilder

from clipvip.index import store as store_module
from clipvip.index import tables
from clipvip.index.rows import About, FileState, Where
from clipvip.index.store import Store
from clipvip.index.tables import decoded, encoded, moment_id

WIDTH = 16
ABOUT = About("/models/mine", "0" * 64, WIDTH, ("/videos",))


def state(path, **values):
    given = {"size": 9, "mtime_ns": 7, "content": "c", "plan": "windows 10 5", **values}
    return FileState(path, **{"duration": 60.0, "date": 1.7e9, **given})


def unit(*shape, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((*shape, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def windows(n):
    return [(5.0 * i, 5.0 * i + 10) for i in range(n)]


def one(path, n=3, seed=0, **values):
    """A file as `put` takes it."""
    return state(path, **values), windows(n), unit(n, seed=seed)


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "index", ABOUT)


def paths(moments):
    return [moment.file.path for moment in moments]


ODD = [
    "/v/plain.mp4",
    "/v/it's.mp4",
    "/v/''.mp4",
    '/v/"quoted".mp4',
    "/v/100%.mp4",
    "/v/%41.mp4",
    "/v/_.mp4",
    "/v/back\\slash\\.mp4",
    "/v/\\'.mp4",
    os.fsdecode(b"/v/caf\xe9.mp4"),
    "/v/café.mp4",
    "/v/映画.mp4",
    "/v/\x1b[31m\n.mp4",
    "/v/') or 1=1 --.mp4",
]


def test_every_name_is_kept_apart_from_every_other(store):
    store.put([one(path, n=2, seed=i) for i, path in enumerate(ODD)])
    assert sorted(store.files()) == sorted(ODD)
    for path in ODD:
        moments, _ = store.of_files([path])
        assert paths(moments) == [path, path]
        assert decoded(encoded(path)) == path
    for i, path in enumerate(ODD):
        assert store.drop([path]) == 2
        assert sorted(store.files()) == sorted(ODD[i + 1 :])


def test_a_path_that_no_file_can_have_is_refused(store):
    with pytest.raises(ValueError, match="is no path"):
        store.put([one("/v/\ud800.mp4")])
    with pytest.raises(ValueError, match="is no path"):
        store.files(Where(folder="/v/\ud800"))


@pytest.mark.parametrize("folder", ["/a", "/a%", "/a'", os.fsdecode(b"/a\xe9"), "/_", "/a\\"])
def test_a_folder_is_itself_and_what_is_below_it(store, folder):
    inside = [f"{folder}/x.mp4", f"{folder}/deep/er/y.mp4"]
    beside = [f"{folder}b/x.mp4", f"{folder}.mp4", f"{folder}0", f"{folder}.x/y", "/b/a/x", "/A/x"]
    store.put([one(path, n=1) for path in inside + beside])
    for name in (folder, f"{folder}/"):
        assert sorted(store.files(Where(folder=name))) == sorted(inside)
    assert len(store.files(Where(folder="/"))) == len(inside + beside)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A store of 40 files of 25 moments, and these as arrays."""
    store = Store.create(tmp_path_factory.mktemp("many") / "index", ABOUT)
    generator = np.random.default_rng(1)
    files = []
    for i in range(40):
        folder = f"/v/{'ab'[i % 2]}"
        duration, date = float(generator.integers(0, 100)), float(generator.integers(0, 100))
        files.append(one(f"{folder}/{i}.mp4", n=25, seed=i, duration=duration, date=date))
    store.put(files[:25])
    store.put(files[25:])
    return store, files


WHERES = [
    None,
    Where(),
    Where(folder="/v/a"),
    Where(min_duration=50),
    Where(max_duration=20.0),
    Where(after=30, before=60.5),
    Where(folder="/v/b", min_duration=10, max_duration=90, after=5, before=95),
    Where(min_duration=1e9),
]


def passes(file, where):
    where = where or Where()
    return (
        (where.folder is None or file.path.startswith(where.folder + "/"))
        and (where.min_duration is None or file.duration >= where.min_duration)
        and (where.max_duration is None or file.duration <= where.max_duration)
        and (where.after is None or file.date >= where.after)
        and (where.before is None or file.date < where.before)
    )


@pytest.mark.parametrize("where", WHERES, ids=str)
@pytest.mark.parametrize("k", [1, 10, 5000])
def test_search_equals_a_product_of_all_vectors(many, where, k):
    store, files = many
    query = unit(seed=99)
    expected = []
    for file, spans, vectors in files:
        if passes(file, where):
            scores = vectors.astype(np.float16).astype(np.float64) @ query
            expected += [(score, file, *span) for score, span in zip(scores, spans, strict=True)]
    expected.sort(key=lambda row: -row[0])
    moments, scores = store.nearest(query, k, where)
    assert [(m.file, m.start, m.end) for m in moments] == [row[1:] for row in expected[:k]]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [row[0] for row in expected[:k]], atol=1e-6)
    assert store.count(where) == len(expected)
    assert list(store.files(where).values()) == [f for f, *_ in files if passes(f, where)]


def test_everything_is_all_of_it(many):
    store, files = many
    rows = store.everything()
    assert set(rows.files) == {file for file, *_ in files}
    for file, spans, vectors in files:
        own = rows.file == rows.files.index(file)
        assert list(zip(rows.start[own], rows.end[own], strict=True)) == spans
        assert (rows.vectors[own] == vectors.astype(np.float16)).all()


def test_near_ties_are_in_the_right_order(store):
    query = unit(seed=5)
    vectors = unit(400, seed=6) * 2e-4 + query
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store.put([(state("/v/a.mp4"), windows(400), vectors)])
    exact = np.sort(vectors.astype(np.float16).astype(np.float64) @ query)[::-1]
    for k in (1, 7, 150):
        np.testing.assert_allclose(store.nearest(query, k)[1], exact[:k], atol=2e-7)


def test_an_empty_index_has_no_nearest(store):
    moments, scores = store.nearest(unit(), 5)
    assert moments == [] and scores.shape == (0,)
    assert store.files() == {} and store.count() == 0 and store.bad_files() == []
    assert store.everything().vectors.shape == (0, WIDTH)
    assert store.of_files(["/v/a.mp4"])[1].shape == (0, WIDTH)
    store.put([])
    store.tidy()


def test_put_replaces_all_of_a_file(store):
    store.put([one("/v/a.mp4", n=9), one("/v/b.mp4", n=2)])
    store.put([one("/v/a.mp4", n=4, seed=1, plan="scenes")])
    moments, vectors = store.of_files(["/v/b.mp4", "/v/a.mp4"])
    assert paths(moments) == ["/v/b.mp4"] * 2 + ["/v/a.mp4"] * 4
    assert (vectors[2:] == unit(4, seed=1).astype(np.float16)).all()
    assert store.files()["/v/a.mp4"].plan == "scenes"
    assert store.count() == 6


def test_a_moment_is_found_by_its_id(store):
    store.put([(state("/v/a.mp4"), [(None, None)], unit(1))])
    moment, vector = store.moment(moment_id("/v/a.mp4", None, None))
    assert (moment.file.path, moment.start, moment.end) == ("/v/a.mp4", None, None)
    assert (vector == unit(1)[0].astype(np.float16)).all()
    for id in ("0" * 16, "' or 1=1 --", ""):
        with pytest.raises(KeyError):
            store.moment(id)


def test_files_are_renamed_copied_and_touched_with_their_vectors(store):
    store.put([one("/v/a.mp4", seed=1), one("/v/b.mp4", seed=2), one("/v/c.mp4", seed=3)])
    new = state("/v/new.mp4", mtime_ns=8)
    touched = state("/v/b.mp4", mtime_ns=8)
    moves = {"/v/a.mp4": new, "/v/b.mp4": touched, "/v/missing.mp4": state("/v/x.mp4")}
    assert store.move(moves) == {"/v/new.mp4", "/v/b.mp4"}
    swap = {"/v/b.mp4": state("/v/c.mp4"), "/v/c.mp4": state("/v/b.mp4")}
    assert store.move(swap) == {"/v/b.mp4", "/v/c.mp4"}
    assert store.copy([("/v/b.mp4", state("/v/d.mp4"))]) == {"/v/d.mp4"}
    seeds = {"/v/new.mp4": 1, "/v/c.mp4": 2, "/v/b.mp4": 3, "/v/d.mp4": 3}
    assert store.files().keys() == seeds.keys()
    for path, seed in seeds.items():
        moments, vectors = store.of_files([path])
        assert [(m.start, m.end) for m in moments] == windows(3)
        assert all(m.id == moment_id(path, m.start, m.end) for m in moments)
        assert (vectors == unit(3, seed=seed).astype(np.float16)).all()
    assert store.files()["/v/new.mp4"] == new


def test_bad_files_are_those_of_the_last_build_that_considered_them(store):
    odd = os.fsdecode(b"/v/caf\xe9'.mp4")
    store.put_bad_files([odd, "/v/b.mp4"], [{"path": odd, "reason": "it's \udce9 bad"}])
    store.put_bad_files(["/v/c.mp4"], [{"path": "/v/c.mp4", "reason": "empty"}])
    known = [{"path": odd, "reason": "it's \udce9 bad"}, {"path": "/v/c.mp4", "reason": "empty"}]
    assert store.bad_files() == sorted(known, key=lambda file: file["path"])
    store.put_bad_files(["/v/c.mp4"], [{"path": "/v/c.mp4", "reason": "short"}])
    store.put_bad_files([odd], [])
    assert store.bad_files() == [{"path": "/v/c.mp4", "reason": "short"}]


def test_sources_add_up_and_the_model_stays(tmp_path, store):
    odd = os.fsdecode(b"/caf\xe9")
    again = Store.create(tmp_path / "index", ABOUT._replace(sources=(odd, "/videos")))
    assert store.about == again.about == ABOUT._replace(sources=("/videos", odd))
    Store.create(tmp_path / "index", ABOUT)
    assert store.about.sources == ("/videos", odd)
    for other in (ABOUT._replace(fingerprint="1"), ABOUT._replace(width=8, model="other")):
        with pytest.raises(ValueError, match="give another --out"):
            Store.create(tmp_path / "index", other)


@pytest.mark.filterwarnings("ignore:optimize")  # it is just what the test is about
def test_an_open_reader_sees_what_is_put_later(store, tmp_path, monkeypatch):
    reader = Store.open(tmp_path / "index")
    seen = {reader.version()}
    monkeypatch.setattr(tables, "KEPT", timedelta(0))
    for i in range(4):
        store.put([one(f"/v/{i}.mp4", seed=i)])
        store.drop([f"/v/{i - 1}.mp4"])
        store.tidy()
        assert list(reader.files()) == [f"/v/{i}.mp4"]
        assert len(reader.nearest(unit(), 10)[0]) == 3
        seen.add(reader.version())
    assert len(seen) == 5


WRONG = {
    "a vector that is not finite": (state("/v/a"), [(None, None)], unit(1) * np.nan),
    "a vector that is not unit": (state("/v/a"), [(None, None)], unit(1) * 2),
    "too few vectors": (state("/v/a"), windows(3), unit(2)),
    "vectors of another width": (state("/v/a"), windows(1), np.ones((1, 1), np.float32)),
    "no spans": (state("/v/a"), [], unit(0)),
    "a span that ends before it starts": (state("/v/a"), [(3.0, 2.0)], unit(1)),
    "a start that is not finite": (state("/v/a"), [(np.nan, None)], unit(1)),
    "a negative size": (state("/v/a", size=-1), [(None, None)], unit(1)),
    "a huge size": (state("/v/a", size=1 << 63), [(None, None)], unit(1)),
    "a duration that is not finite": (state("/v/a", duration=np.inf), [(None, None)], unit(1)),
}


@pytest.mark.parametrize("file", WRONG.values(), ids=WRONG)
def test_what_no_index_may_hold_is_refused_whole(store, file):
    with pytest.raises(ValueError, match="/v/a has ") as error:
        store.put([one("/v/good.mp4"), file])
    assert "\n" not in str(error.value)
    assert store.count() == 0


def test_a_query_of_another_shape_is_refused(store):
    for query in (np.ones(3, np.float32), unit() * np.nan, unit() * 3, unit(2)):
        with pytest.raises(ValueError, match="expected a unit vector"):
            store.nearest(query, 1)
    with pytest.raises(ValueError, match="at least 1"):
        store.nearest(unit(), 0)


def only(folder, pattern):
    (file,) = folder.glob(pattern)
    return file


FILE_DAMAGE = {
    "no data": lambda folder: only(folder, "moments.lance/data/*").unlink(),
    "data cut": lambda folder: os.truncate(only(folder, "moments.lance/data/*"), 99),
    "data of zeros": lambda folder: only(folder, "moments.lance/data/*").write_bytes(bytes(999)),
    "no manifests": lambda folder: shutil.rmtree(folder / "moments.lance" / "_versions"),
    "manifests of zeros": lambda folder: [
        file.write_bytes(bytes(99))
        for file in (folder / "about.lance/_versions").glob("*.manifest")
    ],
    "no table of bad files": lambda folder: shutil.rmtree(folder / "bad_files.lance"),
    "an empty table": lambda folder: shutil.rmtree(folder / "about.lance" / "data"),
}


def use(folder):
    """Read all that an index holds, or raise one line."""
    with pytest.raises(ValueError) as error:
        store = Store.open(folder)
        store.files(), store.nearest(unit(), 3), store.everything()
        store.of_files(["/v/a.mp4"]), store.moment(moment_id("/v/a.mp4", 0.0, 10.0))
        store.bad_files()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert "clipvip embed" in str(error.value) and ".rs:" not in str(error.value)


@pytest.mark.parametrize("harm", FILE_DAMAGE.values(), ids=FILE_DAMAGE)
def test_damaged_files_are_reported_in_one_line(store, tmp_path, harm):
    store.put([one("/v/a.mp4")])
    harm(tmp_path / "index")
    use(tmp_path / "index")


VALUES = {
    "id": ["0" * 16] * 3,
    "size": [-1] * 3,
    "duration": [float("nan")] * 3,
    "start": [-1.0, 5.0, 10.0],
    "end": [float("inf"), 15.0, 20.0],
    "path": ["", "", ""],
    "vector": unit(3) * 1.1,
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("read", ["nearest", "of_files", "everything", "moment", "files"])
def test_no_value_out_of_range_is_believed(store, name, read):
    import pyarrow as pa

    table = store._as_table([one("/v/a.mp4")])
    kind = table.schema.field(name)
    values = VALUES[name]
    if name == "vector":
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(values.astype(np.float16).ravel()), WIDTH
        )
    else:
        column = pa.array(values, kind.type)
    store._moments.add(table.set_column(table.schema.names.index(name), kind, column))
    calls = {
        "nearest": lambda: store.nearest(unit(), 3)[0],
        "of_files": lambda: store.of_files(["/v/a.mp4"])[0],
        "moment": lambda: [store.moment(moment_id("/v/a.mp4", 0.0, 10.0))[0]],
        "everything": lambda: store.everything().vectors,
        "files": lambda: store.files().values(),
    }
    unseen = {"files": ("id", "start", "end", "vector"), "everything": ("id",)}
    if name in unseen.get(read, ()):
        return
    if (read, name) == ("of_files", "path"):
        assert calls[read]() == []
        return
    with pytest.raises((ValueError, KeyError)) as error:
        calls[read]()
    assert "\n" not in str(error.value)


STRANGE_ABOUT = [
    "",
    "[" * 100_000,
    "[]",
    "{}",
    '{"format": 3, "model": 3, "fingerprint": "", "width": 16, "sources": []}',
    '{"format": 3, "model": "", "fingerprint": "", "width": -1, "sources": []}',
    '{"format": 3, "model": "", "fingerprint": "", "width": 1e9, "sources": []}',
    '{"format": 3, "model": "", "fingerprint": "", "width": 16, "sources": [3]}',
    '{"format": 3, "model": "", "fingerprint": "", "width": 16, "sources": 3}',
    '{"format": 3, "model": "", "fingerprint": "", "width": 16, "sources": [], "more": 1}',
]


@pytest.mark.parametrize("text", STRANGE_ABOUT, ids=lambda text: text[:80])
def test_another_about_is_refused_in_one_line(store, tmp_path, text):
    store._about.update(values={"json": text})
    with pytest.raises(ValueError, match="damaged") as error:
        Store.open(tmp_path / "index")
    assert "\n" not in str(error.value)


def test_a_newer_format_and_a_missing_index_are_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"no index in .*clipvip embed MODEL VIDEOS --out"):
        Store.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    store._about.update(values={"json": '{"format": 4, "other": 1}'})
    with pytest.raises(ValueError, match="format 4; this version reads up to 3"):
        Store.open(tmp_path / "index")


def test_other_tables_are_no_index(store, tmp_path):
    store._database.create_table("moments", [{"text": "mine"}], mode="overwrite")
    with pytest.raises(ValueError, match="other columns"):
        Store.open(tmp_path / "index")


@pytest.mark.parametrize("name", ["about", "moments", "bad_files"])
def test_tables_that_name_functions_are_refused(store, tmp_path, name):
    # LanceDB loads the model that such a note names, from anywhere, as soon as a row is added.
    note = json.dumps([{"name": "huggingface", "source_column": "path", "vector_column": "vector"}])
    table = store._database.open_table(name)
    schema = table.schema.with_metadata({"embedding_functions": note})
    store._database.drop_table(name)
    store._database.create_table(name, None, schema=schema)
    with pytest.raises(ValueError, match=f"table {name} has notes"):
        Store.open(tmp_path / "index")


@pytest.mark.parametrize("name", ["a.mp4", "moments.lance", "index.html"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds '{name}' and no index"):
        Store.create(tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a b%20#?é'", "file://", "s3:", "-x"])
def test_a_folder_may_have_any_name_that_is_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    where = f"file://{tmp_path}/index" if name == "file://" else name
    Store.create(where, ABOUT).put([one("/v/a.mp4")])
    assert list(Store.open(where).files()) == ["/v/a.mp4"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"caf\\xe9 is not UTF-8"):
        Store.create(tmp_path / os.fsdecode(b"caf\xe9"), ABOUT)


def test_an_index_may_be_elsewhere_than_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.create("memory://index", ABOUT)
    store.put([one("/v/a.mp4", n=3)])
    store.tidy()
    assert len(store.nearest(unit(), 10)[0]) == 3
    assert not list(tmp_path.iterdir())


def test_search_loads_no_torch(store, tmp_path):
    code = (
        "import sys; from clipvip.index.store import Store; import numpy as np; "
        f"Store.open({str(tmp_path / 'index')!r}).nearest(np.eye({WIDTH})[0], 3); "
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def mixed(store):
    """What two processes leave that put one file at the same moment: both sets of its rows."""
    early = store._as_table([one("/v/a.mp4", n=4, seed=1, plan="early")])
    late = store._as_table([one("/v/a.mp4", n=3, seed=2, plan="late"), one("/v/b.mp4", n=2)])
    for table in (late, early):
        store._moments.add(table)


def test_of_rows_that_were_put_twice_the_latest_are_read(store):
    mixed(store)
    assert {path: file.plan for path, file in store.files().items()}["/v/a.mp4"] == "late"
    moments, vectors = store.of_files(["/v/a.mp4"])
    assert [moment.file.plan for moment in moments] == ["late"] * 3
    assert (vectors == unit(3, seed=2).astype(np.float16)).all()
    rows = store.everything()
    assert len(rows.file) == 5
    assert (rows.vectors[rows.file == rows.files.index(store.files()["/v/a.mp4"])] == vectors).all()
    ids = [moment.id for moment in store.nearest(unit(), 50)[0]]
    assert len(set(ids)) == len(ids)
    store.tidy()
    assert store.count() == 5
    assert store.of_files(["/v/a.mp4"])[0] == moments


def test_a_process_that_put_a_file_at_the_same_moment_as_another_deletes_the_other_rows(
    store, monkeypatch
):
    execute = LanceMergeInsertBuilder.execute

    def raced(self, *args):
        mixed(store)  # another process, whose rows this one does not see
        self._when_not_matched_by_source_condition = "false"
        return execute(self, *args)

    monkeypatch.setattr(LanceMergeInsertBuilder, "execute", raced)
    store.put([one("/v/b.mp4", n=4, seed=3)])
    assert store.count() - store.drop(["/v/a.mp4"]) == len(store.of_files(["/v/b.mp4"])[0]) > 0


def test_changes_that_others_prevent_are_retried_and_then_named(store, monkeypatch):
    monkeypatch.setattr(tables, "COMMITS", 3)
    calls = []

    def busy(self, *args, **options):
        calls.append(args)
        raise RuntimeError("lance error: Retryable commit conflict for version 18\nmore")

    store.put([one("/v/a.mp4")])
    monkeypatch.setattr(LanceMergeInsertBuilder, "execute", busy)
    with pytest.raises(ValueError, match=r"other processes .* run the same command again"):
        store.put([one("/v/a.mp4")])
    assert len(calls) == 3
    monkeypatch.setattr(type(store._moments), "optimize", busy)
    store.tidy()


def test_new_files_are_put_without_reading_the_table(store, monkeypatch):
    """A merge would read all of a large index each time."""
    monkeypatch.setattr(LanceMergeInsertBuilder, "execute", None)
    store.put([one("/v/a.mp4")])
    store.put([one("/v/b.mp4")])
    assert set(store.files()) == {"/v/a.mp4", "/v/b.mp4"}


def test_a_full_disk_is_no_damage(store, monkeypatch):
    def full(self, *args, **options):
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), a")

    monkeypatch.setattr(type(store._moments), "add", full)
    with pytest.raises(OSError, match=r"No space left on device: .*index"):
        store.put([one("/v/a.mp4")])


def test_a_large_index_is_searched_nearly_exactly(store, monkeypatch):
    monkeypatch.setattr(store_module, "EXACT_ROWS", 300)
    for name, value in (("PARTITION_ROWS", 50), ("COMPARED", 60), ("COMPARED_SHARE", 2)):
        monkeypatch.setattr(store_module, name, value)  # so that most rows are not compared exactly
    store.put([one(f"/v/{i}/a.mp4", n=60, seed=i, date=i) for i in range(10)])
    store.tidy()
    indexed = {index.columns[0]: index.num_indexed_rows for index in store._moments.list_indices()}
    assert indexed == {"vector": 600, "path": 600, "id": 600}
    store.put([one(f"/v/{i}/b.mp4", n=10, seed=50 + i) for i in range(10)])  # not yet in the index
    store.drop(["/v/3/a.mp4"])
    rows = store.everything()
    plain = rows.vectors.astype(np.float32)
    for tidied in (False, True):
        found = 0
        for seed in range(20):
            query = unit(seed=1000 + seed)
            expected = np.sort(plain @ query)[::-1][:10]
            _, scores = store.nearest(query, 10)
            found += int(np.isclose(scores[:, None], expected, atol=1e-6).any(0).sum())
            few = store.nearest(query, 10, Where(folder="/v/7"))[1]  # few enough for exactness
            own = [file.path.startswith("/v/7/") for file in rows.files]
            exact = np.sort((plain @ query)[np.array(own)[rows.file]])[::-1][:10]
            np.testing.assert_allclose(few, exact, atol=1e-6)
        assert found >= 0.95 * 200
        newest, _ = store.nearest(unit(10, seed=55)[0], 1)
        assert newest[0].file.path == "/v/5/b.mp4"
        if not tidied:
            store.tidy()
