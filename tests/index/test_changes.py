"""Properties of finding out what has changed since files were put into an index.

The files hold noise, as nothing is decoded.
"""

import itertools
import os
import shutil
from dataclasses import replace

import pytest

from clipvip.collection import clips_of, place_of
from clipvip.index.changes import (
    BLOCK,
    BLOCKS,
    Changes,
    New,
    changes,
    content_of,
    dealt,
    named_files,
    plan_of,
)
from clipvip.index.rows import FileState

PLAN = "windows 10 5"


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for name in ("a.mp4", "b.mp4", "deep/c.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def compare(sources, held, plan=PLAN):
    sources = [os.fspath(source) for source in sources]
    clips, _ = clips_of(sources)
    return changes(named_files(clips, plan), map(place_of, sources), held)


def put(found: Changes, held):
    """What an index holds after these changes; every file is a minute long."""
    after = {path: state for path, state in held.items() if path not in found.gone}
    for state in [state for _, state in found.copied]:
        after[state.path] = state
    for path, state in found.moved.items():
        del after[path]
        after[state.path] = state
    for new in found.new:
        for state in new.states:
            after[state.path] = replace(state, duration=60.0, date=state.mtime_ns / 1e9)
    return after


def names(found: Changes):
    """Names of new files, moves and copies."""
    base = os.path.basename
    new = sorted(base(state.path) for each in found.new for state in each.states)
    moved = sorted((base(path), base(state.path)) for path, state in found.moved.items())
    copied = sorted((base(path), base(state.path)) for path, state in found.copied)
    return new, moved, copied


def test_only_what_is_new_or_changed_is_embedded(videos):
    held = put(compare([videos], {}), {})
    assert sorted(held) == sorted(map(str, videos.rglob("*.mp4")))
    again = compare([videos], held)
    assert (len(again.kept), names(again), again.gone) == (3, ([], [], []), [])

    (videos / "d.mp4").write_bytes(b"new")
    (videos / "a.mp4").write_bytes(b"b.mp3" * 100)  # of the same size
    os.utime(videos / "b.mp4", ns=(1, 1))
    (videos / "deep" / "c.mp4").unlink()
    found = compare([videos], held)
    assert names(found) == (["a.mp4", "d.mp4"], [("b.mp4", "b.mp4")], [])
    assert [os.path.basename(path) for path in found.gone] == ["c.mp4"]
    (state,) = found.moved.values()
    assert (state.mtime_ns, state.duration, state.date) == (1, 60.0, 1e-9)
    after = put(found, held)
    assert len(compare([videos], after).kept) == 3


def test_a_renamed_file_moves_and_a_copied_one_is_copied(videos):
    held = put(compare([videos], {}), {})
    os.rename(videos / "a.mp4", videos / "z.mp4")
    shutil.copy(videos / "b.mp4", videos / "deep" / "y.mp4")
    shutil.copy2(videos / "z.mp4", videos / "x.mp4")
    found = compare([videos], held)
    assert names(found) == ([], [("a.mp4", "x.mp4")], [("a.mp4", "z.mp4"), ("b.mp4", "y.mp4")])
    assert not found.gone
    assert len(compare([videos], put(found, held)).kept) == 5


def test_files_that_swap_names_swap_vectors(videos):
    held = put(compare([videos], {}), {})
    os.rename(videos / "a.mp4", videos / "tmp")
    os.rename(videos / "b.mp4", videos / "a.mp4")
    os.rename(videos / "tmp", videos / "b.mp4")
    for name in ("a.mp4", "b.mp4"):
        os.utime(videos / name)
    found = compare([videos], held)
    assert names(found) == ([], [], [("a.mp4", "b.mp4"), ("b.mp4", "a.mp4")])


def test_a_moved_folder_moves_and_files_of_equal_content_are_embedded_once(videos):
    held = put(compare([videos], {}), {})
    os.rename(videos / "deep", videos / "deeper")
    for name in ("e.mp4", "f.mp4"):
        (videos / name).write_bytes(b"the same")
    found = compare([videos], held)
    assert names(found) == (["e.mp4", "f.mp4"], [("c.mp4", "c.mp4")], [])
    assert len(found.new) == 1


def test_what_moved_out_of_an_unnamed_folder_is_there_once(videos, tmp_path):
    held = put(compare([videos], {}), {})
    os.rename(videos, tmp_path / "films")
    found = compare([tmp_path / "films"], held)
    assert names(found) == ([], [(f"{x}.mp4", f"{x}.mp4") for x in "abc"], [])
    assert sorted(put(found, held)) == sorted(map(str, (tmp_path / "films").rglob("*.mp4")))


def test_rows_of_other_sources_and_of_absent_disks_stay(videos, tmp_path):
    held = put(compare([videos], {}), {})
    shutil.rmtree(videos / "deep")  # as if it were not mounted
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "o.mp4").write_bytes(b"other")
    os.unlink(videos / "a.mp4")
    found = compare([tmp_path / "other"], held)
    assert (names(found)[0], found.gone) == (["o.mp4"], [])
    held = put(found, held)
    assert compare([videos], held).gone == [str(videos / "a.mp4")]
    assert compare([f"{videos}/*.mp4"], held).gone == [str(videos / "a.mp4")]
    (videos / "list.txt").write_text("a.mp4\nb.mp4\n")
    assert compare([videos / "list.txt"], held).gone == [str(videos / "a.mp4")]
    assert compare([videos / "b.mp4"], held).gone == []


def test_a_file_reached_by_a_link_is_the_one_that_is_held(videos, tmp_path):
    held = put(compare([videos], {}), {})
    (tmp_path / "link").symlink_to(videos)
    assert len(compare([tmp_path / "link"], held).kept) == 3


def test_another_plan_embeds_what_it_divides_otherwise(videos):
    held = put(compare([videos], {}), {})
    assert len(compare([videos], held, "windows 20 5").new) == 3
    short = {path: replace(state, duration=9.0) for path, state in held.items()}
    assert len(compare([videos], short, "windows 20 5").kept) == 3
    assert len(compare([videos], short, "windows 8 4").new) == 3
    assert len(compare([videos], short, "scenes 20 5").new) == 3
    # An index of old has one vector per file, and knows no durations.
    old = {path: replace(state, duration=0.0, plan="whole") for path, state in held.items()}
    assert len(compare([videos], old).new) == 3
    for plan in ("windows", "windows x", "windows nan 5", "windows 1e999 5", "windows 9" * 50):
        odd = {path: replace(state, plan=plan) for path, state in held.items()}
        assert len(compare([videos], odd).new) + len(compare([videos], odd).kept) == 3


def test_spans_of_annotations_are_a_plan_of_their_own(videos):
    lines = ['{"video": "a.mp4", "start": 2, "end": 3}', '{"video": "a.mp4", "end": 1}']
    for order in itertools.permutations(lines):
        (videos / "clips.jsonl").write_text("\n".join(order))
        (file,) = named_files(clips_of([str(videos / "clips.jsonl")])[0], PLAN)
        assert file.parts == ([(None, 1.0), (2.0, 3.0)],) and file.plan.startswith("spans ")
    both = [str(videos / "clips.jsonl"), str(videos)]
    files = {os.path.basename(x.path): x for x in named_files(clips_of(both)[0], PLAN)}
    assert files["a.mp4"].parts == (None, *file.parts)
    assert files["b.mp4"].parts == (None,) and files["b.mp4"].plan == PLAN
    held = put(compare(both, {}), {})
    assert len(compare(both, held).kept) == 3
    (videos / "clips.jsonl").write_text(lines[0])
    assert names(compare(both, held))[0] == ["a.mp4"]


def test_plans_tell_lengths_apart():
    assert plan_of(10, 5, False) == plan_of(10.0, 5.0, False) == "windows 10 5"
    assert plan_of(0.1 + 0.2, 0.1, True) != plan_of(0.3, 0.1, True)


@pytest.mark.parametrize("size", [0, 1, BLOCK * BLOCKS, BLOCK * BLOCKS + 1, 4_000_000])
def test_content_tells_sizes_heads_tails_and_middles_apart(tmp_path, size):
    path = tmp_path / "a.mp4"
    data = bytearray(os.urandom(size))
    path.write_bytes(data)
    seen = {content_of(str(path))}
    path.write_bytes(data + b"x")
    seen.add(content_of(str(path)))
    middle = (size - BLOCK) * 3 // (BLOCKS - 1) + 5 if size > BLOCK * BLOCKS else size // 2
    places = {0, size - 1, middle} if size else set()
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        seen.add(content_of(str(path)))
    assert len(seen) == 2 + len(places)
    path.write_bytes(data)
    assert content_of(str(path)) in seen


def test_files_are_dealt_evenly_each_to_one_rank(videos):
    (file,) = named_files(clips_of([str(videos / "a.mp4")])[0], PLAN)
    sizes = [7, 1, 9, 3, 3, 0, 8, 2]
    new = [New(replace(file, size=size), []) for size in sizes]
    for ranks in (1, 2, 3, 20):
        shares = dealt(new, ranks)
        assert sorted(itertools.chain(*shares)) == [*range(8)] and len(shares) == ranks
        loads = [sum(sizes[place] for place in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)


def test_hostile_states_are_no_reason_to_fail(videos):
    held = put(compare([videos], {}), {})
    odd = ["/nul\0/a.mp4", "/half\udcff.mp4", "relative.mp4", "/" + "x" * 5000, "/"]
    for path in odd:
        held[path] = FileState(path, 0, 0, "", "whole", 0.0, 0.0)
    assert len(compare([videos], held).kept) == 3
