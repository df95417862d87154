"""A checkpoint is whole or absent; the log agrees with it."""

import errno
import json
import os
import random
import threading
import time

import numpy as np
import pytest
import torch

from clipvip.training import checkpoint, state
from clipvip.training.config import TrainingError

WEIGHTS = "model/model.safetensors"
FILES = [names[0] for names in checkpoint.REQUIRED]


def write_one(folder):
    (folder / "model").mkdir()
    for name in FILES:
        (folder / name).write_text("w" * 1000)


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    def killed(folder):
        write_one(folder)
        raise KeyboardInterrupt

    first = checkpoint.save(tmp_path, 5, write_one)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 6, killed)
    assert checkpoint.newest_good(tmp_path) == first
    second = checkpoint.save(tmp_path, 6, write_one)
    assert checkpoint.checkpoints(tmp_path) == [first, second]
    assert sorted(tmp_path.iterdir()) == [first, second]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name", "told"),
    [
        (truncate, WEIGHTS, f"{WEIGHTS} has 500 bytes of 1000"),
        (flip, WEIGHTS, f"{WEIGHTS} is not what was written"),
        (lambda path: path.unlink(), WEIGHTS, "model.safetensors: No such file"),
        (lambda path: path.unlink(), "manifest.json", "manifest.json: No such file"),
        (truncate, "manifest.json", "manifest.json cannot be read"),
        (lambda path: path.write_text("[1]"), "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, harm, name, told):
    first, second, third = (checkpoint.save(tmp_path, step, write_one) for step in (1, 2, 3))
    harm(third / name)
    harm(second / name)
    assert checkpoint.newest_good(tmp_path) == first
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all(told in line and "\n" not in line for line in said)
    assert "step-00000003" in said[0] and said[0].endswith("resuming from step-00000001")
    assert checkpoint.checkpoints(tmp_path) == [first]
    checkpoint.save(tmp_path, 3, write_one)
    assert checkpoint.newest_good(tmp_path) == third


def change(path, how):
    manifest = json.loads((path / "manifest.json").read_text())
    how(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [None, *FILES])
def test_a_manifest_names_all_that_a_checkpoint_must_have(tmp_path, name):
    """Else two runs that remove each other's files leave what is called whole and cannot be loaded;
    None: it names nothing."""
    path = checkpoint.save(tmp_path, 1, write_one)
    change(path, lambda manifest: manifest.pop(name) if name else manifest.clear())
    assert checkpoint.damage(path) == f"manifest.json does not name {name or FILES[0]}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_vanishes_while_it_is_saved_is_no_checkpoint(tmp_path, name):
    def robbed(folder):
        write_one(folder)
        (folder / name).unlink()

    first = checkpoint.save(tmp_path, 1, write_one)
    with pytest.raises(OSError, match=f"{name} is missing"):
        checkpoint.save(tmp_path, 2, robbed)
    assert list(tmp_path.iterdir()) == [first]


def test_checkpoints_of_several_weight_files_and_of_earlier_versions_are_whole(tmp_path):
    def earlier(folder):
        write_one(folder)
        for new, old in (
            ("tokenizer.json", "vocab.json"),
            ("processor_config.json", "reading.json"),
        ):
            (folder / "model" / new).rename(folder / "model" / old)
        (folder / WEIGHTS).rename(folder / "model" / "part-1")
        index = {"weight_map": {"a": "part-1", "b": "part-1"}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    path = checkpoint.save(tmp_path, 1, earlier)
    assert checkpoint.damage(path) is None
    change(path, lambda manifest: manifest.pop("model/part-1"))
    assert checkpoint.damage(path) == "manifest.json does not name model/part-1"


@pytest.mark.parametrize(
    "entries",
    [
        {"../outside": {"bytes": 1000, "sha256": "0" * 64}},
        {"model/../../outside": {"bytes": 1000, "sha256": "0" * 64}},
        {"/etc/hostname": {"bytes": 1, "sha256": "0" * 64}},
        {"state.pt": {"bytes": "1000", "sha256": "0" * 64}},
        {"state.pt": {"bytes": True, "sha256": "0" * 64}},
        {"state.pt": {"bytes": 1000, "sha256": 5}},
        {"state.pt": {"bytes": 1000}},
        {"state.pt": [1000]},
        {"state.pt": None},
        {"a\0b": {"bytes": 1000, "sha256": "0" * 64}},
        {"\ud800": {"bytes": 1000, "sha256": "0" * 64}},
    ],
)
def test_a_manifest_of_anything_else_is_damage(tmp_path, entries):
    path = checkpoint.save(tmp_path / "a", 1, write_one)
    (tmp_path / "a" / "outside").write_text("w" * 1000)
    change(path, lambda manifest: manifest.update(entries))
    assert checkpoint.damage(path) == "manifest.json cannot be read"


def test_no_manifest_makes_the_check_wait_or_fail(tmp_path):
    path = checkpoint.save(tmp_path, 1, write_one)
    (path / "manifest.json").write_text("[" * 100_000)
    assert checkpoint.damage(path) == "manifest.json cannot be read"
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    assert checkpoint.damage(path) == "manifest.json cannot be read"
    path = checkpoint.save(tmp_path, 2, write_one)
    (path / WEIGHTS).unlink()
    os.mkfifo(path / WEIGHTS)
    assert checkpoint.damage(path) == f"{WEIGHTS} is not a file"


def test_what_is_pruned_anyway_makes_room_but_never_the_newest_whole_checkpoint(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def steps_left(keep, protect=(), error=full, damaged=()):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for step in (1, 2, 3):
            path = checkpoint.save(folder, step, write_one)
            if step in damaged:
                truncate(path / "state.pt")
        gone = checkpoint.make_room(folder, error, keep, protect)
        left = [checkpoint.checkpoint_step(path) for path in checkpoint.checkpoints(folder)]
        assert len(gone) + len(left) == 3
        return left

    assert steps_left(keep=2) == [3]
    assert steps_left(keep=3) == [2, 3]
    assert steps_left(keep=9) == [1, 2, 3]
    assert steps_left(keep=1) == [3]
    assert steps_left(keep=2, protect={1, None}) == [1, 3]
    assert steps_left(keep=2, damaged={3}) == [2, 3]
    assert steps_left(keep=1, damaged={3}) == [2]
    assert steps_left(keep=1, damaged={1, 2, 3}) == [1, 2, 3]
    assert steps_left(keep=1, error=OSError(errno.EIO, "")) == [1, 2, 3]


def test_a_link_among_checkpoints_is_removed_and_what_it_shows_stays(tmp_path):
    other = checkpoint.save(tmp_path / "other", 1, write_one)
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.checkpoint_path(folder, 1).symlink_to(other)
    for step in (2, 3):
        checkpoint.save(folder, step, write_one)
    checkpoint.prune(folder, keep=1)
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-00000003"]
    checkpoint.save(folder, 4, write_one)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint.damage(other) is None


def test_with_no_good_checkpoint_the_error_says_what_is_wrong_with_each(tmp_path):
    for step in (1, 2):
        truncate(checkpoint.save(tmp_path, step, write_one) / WEIGHTS)
    with pytest.raises(TrainingError) as caught:
        checkpoint.newest_good(tmp_path)
    said = str(caught.value)
    assert f"step-00000001: {WEIGHTS} has" in said and "step-00000002: " in said
    assert "\n" not in said
    assert len(checkpoint.checkpoints(tmp_path)) == 2


def test_a_checkpoint_that_another_machine_wrote_is_waited_for(tmp_path):
    def write():
        time.sleep(0.2)
        checkpoint.save(tmp_path, 1, write_one)

    assert not checkpoint.appears(checkpoint.checkpoint_path(tmp_path, 1), within=0.0)
    writer = threading.Thread(target=write)
    writer.start()
    assert checkpoint.appears(checkpoint.checkpoint_path(tmp_path, 1))
    writer.join()


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    paths = [checkpoint.save(tmp_path, step, write_one) for step in (1, 2, 3)]
    monkeypatch.setattr(checkpoint, "_remove", lambda path: None)
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.checkpoints(tmp_path) == paths[2:]


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 100_000_000 - 1):
        checkpoint.save(tmp_path, step, write_one)
        checkpoint.prune(tmp_path, keep=2, protect={1})
    steps = [checkpoint.checkpoint_step(path) for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [1, 4, 99_999_999]


def test_links_move_and_survive_moving_the_whole_run(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoint.save(run / "checkpoints", step, write_one)
        checkpoint.move_links(run, step, best_step=1)
    run.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert (moved / "last").resolve().parent.name == "step-00000002"
    assert (moved / "best" / "model.safetensors").read_text() == "w" * 1000
    assert not list(moved.glob("*.new"))


@pytest.mark.parametrize("name", ["last", "best", "last.new", "best.new"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_only_links_are_replaced_or_unlinked(tmp_path, caplog, name, is_folder):
    mine = tmp_path / name
    if is_folder:
        mine.mkdir()
    else:
        mine.write_text("mine")
    for best_step in (1, None):
        checkpoint.save(tmp_path / "checkpoints", 1 if best_step else 2, write_one)
        checkpoint.move_links(tmp_path, 1, best_step)
    assert mine.is_dir() if is_folder else mine.read_text() == "mine"
    told = {record.getMessage().partition(": ")[2] for record in caplog.records}
    assert told == {f"{name} is not a link; move it away"}


def test_only_what_a_killed_writer_left_is_cleared_away(tmp_path):
    left = [".unfinished-step-00000001", ".unfinished-old-step-00000001"]
    others = [".unfinished-notes", ".unfinished-step-1", ".unfinished-step-00000001.bak"]
    for name in left + others:
        (tmp_path / name).mkdir()
    saved = checkpoint.save(tmp_path, 2, write_one)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, saved.name])


def test_the_log_is_cut_to_the_checkpoints_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 3} for step in (1, 2, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    with path.open("ab") as file:
        file.write(b"\xff\n[1]\n{}\n" + b"[" * 100_000 + b"\n")  # no rows
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows[1:])
        file.write(b'{"step": 3, "lo')
    checkpoint.truncate_jsonl(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:3]
    checkpoint.truncate_jsonl(tmp_path / "absent.jsonl", 2)


def test_random_states_come_back_through_a_file_without_pickle(tmp_path):
    torch.save(state.random_state(), tmp_path / "state.pt")
    expected = random.random(), np.random.rand(), torch.rand(3)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    state.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.rand(3).equal(expected[2])


def test_a_changed_setting_is_reported_with_whether_it_takes_effect(make_config):
    then = state.course(make_config(), 1)
    now = make_config("optimizer.lr=2e-3", "model.tokenizer=other", "log_every=7")
    assert list(state.changes(then, now, 1)) == [
        f"model.tokenizer was {then['model.tokenizer']} and is now other; the checkpoint's model "
        "is kept",
        "resuming with another optimizer.lr: was 0.001, is now 0.002",
    ]


def test_a_captioners_settings_are_reported_for_captioners_alone(make_config):
    then = state.course(make_config(), 1)
    assert "label_smoothing" not in then  # as in checkpoints from before it existed
    given = ["task=captioning", "model.decoder.name=a"]
    then = state.course(make_config(*given), 1)
    now = make_config(*given[:1], "model.decoder.name=b", "label_smoothing=0.2")
    smoothing, decoder = sorted(state.changes(then, now, 1), key=lambda line: "model" in line)
    assert smoothing == "resuming with another label_smoothing: was 0.1, is now 0.2"
    assert decoder.startswith("model.decoder was {") and decoder.endswith("model is kept")
