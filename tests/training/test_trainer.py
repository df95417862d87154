"""Training: its loss falls, its resumed run is the unbroken one, its parts are METHOD's."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipvip.data.loading import LoaderError
from clipvip.model import CLIPViPModel
from clipvip.training import checkpoint
from clipvip.training.config import ConfigError, Preempted, TrainingError
from clipvip.training.evaluate import evaluate_checkpoint
from clipvip.training.task import TASKS, Omnisource, Retrieval
from clipvip.training.trainer import train


def rows(out, key="loss"):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if key in row]


def losses(out):
    return {row["step"]: row["loss"] for row in rows(out)}


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=retrieval"],
        ["task=omnisource"],
        ["task=omnisource", "variant=vs", "accumulation=2", "model.gradient_checkpointing=true"],
        ["task=retrieval", "mixed_precision=bf16", "data.num_workers=1", "data.paragraph=true"],
    ],
    ids=["retrieval", "vsc_fc", "vs-accumulated", "bf16"],
)
def test_loss_falls(make_config, overrides):
    config = make_config("max_steps=60", "save_every=60", *overrides)
    result = train(config)
    curve = list(losses(config.out).values())
    assert result["step"] == len(curve) == 60
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


def test_a_new_model_is_that_of_the_runs_seed(make_config, tmp_path):
    """Whatever random numbers its process drew before."""
    found = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        config = make_config("max_steps=2", f"seed={seed}", f"out={tmp_path / str(number)}")
        train(config)
        found.append((losses(config.out), (Path(config.out) / "last/model.safetensors")))
    (first, weights), (again, same), (other, _) = found
    assert first == again != other
    assert weights.read_bytes() == same.read_bytes()


@pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None,
    reason='NVIDIA DALI is not installed: pip install "clipvip[dali]"',
)
@pytest.mark.parametrize("task", ["retrieval", "omnisource"])
def test_training_on_frames_from_dali_is_training_on_pyavs(task, make_config, vp9_world, tmp_path):
    curves = {}
    for decoder in ("pyav", "dali"):
        annotations = vp9_world / "annotations.jsonl"
        config = make_config(
            *(f"task={task}", f"out={tmp_path / decoder}", f"data.decoder={decoder}"),
            *(f"data.train={annotations}", f"data.validation={annotations}"),
            *("data.num_workers=1", "max_steps=6"),
        )
        train(config)
        curves[decoder] = list(losses(config.out).values())
        assert not (Path(config.out) / "bad_files.jsonl").exists()
    assert curves["dali"] == pytest.approx(curves["pyav"], rel=0.02)


def test_a_run_leaves_what_it_promises(make_config, world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from clipvip.model.processing import CLIPViPProcessor

    annotations = world / "annotations.jsonl"
    config = make_config(f"data.validation={annotations}", "eval_every=2", "save_every=3")
    result = train(config)
    out = Path(config.out)
    for row in rows(out):
        assert {"lr", "logit_scale", "grad_norm", "clips_per_second", "data_wait"} < row.keys()
        assert 1 <= row["logit_scale"] <= 200.001 and 0 <= row["data_wait"] <= 1
    key = "validation/text_to_video/R@1"
    scores = {row["step"]: row[key] for row in rows(out, key)}
    assert list(scores) == [2, 4, 6]
    assert scores[result["best_step"]] == result["best_metric"] == max(scores.values())
    assert (out / "config.yaml").is_file()
    (events,) = (out / "tensorboard").rglob("events*")
    tracked = EventAccumulator(str(events)).Reload()
    assert {"grad_norm", "clips_per_second", "data_wait", key} < set(tracked.Tags()["scalars"])
    assert [event.step for event in tracked.Scalars("logit_scale")] == [1, 2, 3, 4, 5, 6]
    assert (out / "last").resolve().parent.name == "step-00000006"

    for link in ("best", "last"):
        CLIPViPModel.from_pretrained(out / link)
        CLIPViPProcessor.from_pretrained(out / link)
    saved = out / "scores.json"
    again = evaluate_checkpoint(
        out / "best", annotations, out=saved, backend="reference", mixed_precision="no"
    )
    assert again["text_to_video"]["R@1"] == result["best_metric"]
    written = json.loads(saved.read_text())
    assert written["mixed_precision"] == "no"
    assert written["clips"] == 16 and written["texts"] == 32 and written["missing"] == []
    tables = ("text_to_video", "video_to_text", "text_to_video_dsl", "video_to_text_dsl")
    for name in tables:
        assert written[name].keys() == {"R@1", "R@5", "R@10", "median_rank", "mean_rank"}


def test_utilisation_is_that_of_the_plans_operations(make_config, monkeypatch):
    from clipvip.training import state
    from clipvip.training.plan import plan

    planned = []

    def noting(*given):
        planned.append(plan(*given))
        return planned[-1]

    monkeypatch.setattr(state, "plan", noting)
    monkeypatch.setattr(state, "peak_tera", lambda device: 0.5)
    config = make_config("max_steps=2", "accumulation=2")
    train(config)
    for row in rows(config.out):
        seconds = config.batch_size / row["clips_per_second"]
        tera = planned[0].step_flops / 1e12 / seconds
        assert row["tera_flops"] == pytest.approx(tera)
        assert row["mfu"] == pytest.approx(tera / 0.5)


def test_a_variant_that_the_data_have_nothing_for_is_refused(make_config, world, tmp_path, caplog):
    """Its loss would be 0, and the run would go through without a word."""
    from clipvip.data.shards import write_shards
    from clipvip.training.build import load_clips

    rows = [json.loads(line) for line in (world / "annotations.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"caption": row.pop("subtitle"), "video": str(world / row["video"])}
        del row["text"]
    annotations = tmp_path / "clips.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_shards(annotations, tmp_path / "tars", clips_per_shard=8, num_workers=0)
    given = {
        "annotations": f"data.train={annotations}",
        "shards": f"data.train={tmp_path / 'tars'}",
        "sources": f"data.sources=[{{shards: {tmp_path / 'tars'}}}]",
    }
    for train_data in given.values():
        config = make_config("task=omnisource", "variant=vs", train_data)
        with pytest.raises(ConfigError, match="alone, and no clip has a subtitle") as error:
            train(config)
        assert "vsc_fc" in str(error.value) and "\n" not in str(error.value)
        load_clips(make_config("task=omnisource", "variant=vsc_fc", train_data))
        (told,) = [record.getMessage() for record in caplog.records if "variant" in record.msg]
        assert told == "variant=vsc_fc: no clip has a subtitle; its terms with them are 0"
        caplog.clear()
    mixed = f"data.sources=[{{shards: {tmp_path / 'tars'}}}, {{shards: {tmp_path / 'both'}}}]"
    write_shards(world / "annotations.jsonl", tmp_path / "both", clips_per_shard=8, num_workers=0)
    load_clips(make_config("task=omnisource", "variant=vsc", mixed))
    assert not caplog.records
    load_clips(make_config("task=omnisource", "variant=vs", mixed))
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"no clip of {tmp_path / 'tars'} has a subtitle or text" in told


def test_figures_are_written_though_they_cannot_be_shown_and_shown_though_not_written(
    make_config, world, tmp_path, monkeypatch, capsys
):
    from clipvip.training import evaluate

    config = make_config("max_steps=1")
    train(config)
    given = (Path(config.out) / "last", world / "annotations.jsonl")
    settings = {"num_workers": 0, "backend": "reference"}
    capsys.readouterr()
    with pytest.raises(OSError, match="exists"):
        evaluate_checkpoint(*given, out=world / "annotations.jsonl" / "out.json", **settings)
    assert "video + DSL" in capsys.readouterr().out

    def broken(result):
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(evaluate, "print_result", broken)
    with pytest.raises(OSError, match="Broken pipe"):
        evaluate_checkpoint(*given, out=tmp_path / "out.json", **settings)
    assert json.loads((tmp_path / "out.json").read_text())["clips"] == 16


def test_a_folder_with_a_run_is_not_written_over(make_config):
    train(make_config("max_steps=1"))
    with pytest.raises(ConfigError, match=r"already holds a run .* resume=latest"):
        train(make_config("max_steps=1"))
    assert train(make_config("max_steps=1", "resume=latest"))["step"] == 1


NOT_OURS = ["config.yaml", "metrics.jsonl", "bad_files.jsonl", "trackers.json", "last", "best"]


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", [*NOT_OURS, "last.new", "best.new"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nowhere"])
def test_files_that_no_run_wrote_are_not_written_over(make_config, tmp_path, name, kind):
    out = tmp_path / "run"
    out.mkdir()
    mine = out / name
    if kind == "folder":
        mine.mkdir()
    elif kind == "file":
        mine.write_text("mine: 1\n")
    else:
        (tmp_path / "mine").write_text("mine: 1\n")
        mine.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    before = contents(tmp_path)
    for resume in ("never", "latest"):
        with pytest.raises(ConfigError, match="but no run of clipvip train") as refused:
            train(make_config(f"resume={resume}"))
        said = str(refused.value)
        assert f"holds {name} but" in said and said.endswith(f"such as {out / 'run'}")
    assert contents(tmp_path) == before


def test_the_configuration_that_was_passed_is_not_written_over(make_config, tmp_path, monkeypatch):
    from clipvip.training.config import load_config

    passed = make_config.path.rename(tmp_path / "config.yaml")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"out is \., which holds config\.yaml .* such as run$"):
        train(load_config(passed, ["out=."]))
    assert contents(tmp_path) == before


def test_a_copy_of_a_runs_configuration_is_no_run(make_config, tmp_path):
    train(make_config("max_steps=1"))
    copy = tmp_path / "mine" / "config.yaml"
    copy.parent.mkdir()
    shutil.copy(tmp_path / "run" / "config.yaml", copy)
    with pytest.raises(ConfigError, match="but no run of clipvip train"):
        train(make_config(f"out={copy.parent}"))
    assert list(copy.parent.iterdir()) == [copy]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(make_config, monkeypatch):
    """By the same command, beside files that no run touches."""
    from clipvip.training import state, trainer

    def killed(*given, **settings):
        raise KeyboardInterrupt

    config = make_config("max_steps=2", "save_every=1")
    notes = Path(config.out) / "checkpoints" / ".unfinished-notes" / "a.md"
    notes.parent.mkdir(parents=True)
    notes.touch()
    (Path(config.out) / "annotations.jsonl").touch()
    for place, name in ((state, "start_trackers"), (trainer, "save_state")):
        with monkeypatch.context() as broken:
            broken.setattr(place, name, killed)
            with pytest.raises(KeyboardInterrupt):
                train(config)
    assert train(config)["step"] == 2 and list(losses(config.out)) == [1, 2]
    assert notes.exists()


def test_a_run_of_an_earlier_version_resumes(make_config):
    config = make_config("max_steps=1")
    train(config)
    settings = Path(config.out) / "config.yaml"
    settings.write_text(settings.read_text().partition("\n")[2])
    assert train(make_config("max_steps=2", "resume=latest"))["step"] == 2
    assert settings.read_text().startswith("# written by clipvip train\n")


def test_a_disk_that_is_full_at_the_start_is_reported_in_one_line(make_config, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "write_whole", full)
    config = make_config("max_steps=1")
    with pytest.raises(ConfigError) as error:
        train(config)
    path = Path(config.out) / "config.yaml"
    assert str(error.value).startswith(f"{path} cannot be written: No space left on device; free ")
    assert not (path.parent / "tensorboard").exists()  # whose thread prints a traceback


def test_a_loss_that_is_not_finite_stops_with_the_clips_names(make_config, monkeypatch):
    def broken(task, features, batch):
        return features["video"].sum() * math.nan

    monkeypatch.setattr(Retrieval, "loss", broken)
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*(red|blue|green|grey)-\w+\.mp4"):
        train(make_config())


def test_steps_that_are_not_finite_are_left_out_if_asked_to(make_config, monkeypatch, capsys):
    loss, calls, broken = Retrieval.loss, [], {2, 3}

    def sometimes_broken(*given):
        calls.append(1)
        return loss(*given) * (math.nan if len(calls) in broken else 1)

    monkeypatch.setattr(Retrieval, "loss", sometimes_broken)
    config = make_config("on_nonfinite=skip", "save_every=1", "keep_checkpoints=6")
    train(config)
    found = Path(config.out) / "checkpoints"
    first, *left_out, after = (
        load_file(found / f"step-0000000{step}" / "model" / "model.safetensors")
        for step in (1, 2, 3, 4)
    )
    assert all(each[name].equal(first[name]) for each in left_out for name in first)
    assert not all(after[name].equal(first[name]) for name in first)
    curve = losses(config.out)
    assert [step for step, loss in curve.items() if loss is None] == [2, 3]
    assert [row["skipped_steps"] for row in rows(config.out)] == [0, 1, 2, 2, 2, 2]
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(said) == 2 and all("skipped; its clips: " in line for line in said)
    assert all(line.count(".mp4 (line ") == 8 for line in said)

    calls.clear()
    broken.update(range(4, 30))
    config = make_config("on_nonfinite=skip", "max_steps=30", f"out={config.out}-again")
    with pytest.raises(TrainingError, match=r"step 11: loss nan.* the 10th step in a row; clips"):
        train(config)


@pytest.mark.parametrize("task", ["retrieval", "omnisource"])
def test_texts_and_names_that_are_not_utf8_train_and_are_shown(
    make_config, world, tmp_path, monkeypatch, capsys, task
):
    loss, calls = TASKS[task].loss, []

    def broken_at_first(*given):
        calls.append(1)
        return loss(*given) * (math.nan if len(calls) == 1 else 1)

    monkeypatch.setattr(TASKS[task], "loss", broken_at_first)
    lines = [json.loads(line) for line in (world / "annotations.jsonl").open()][:4]
    for number, line in enumerate(lines):
        name = os.fsdecode(b"caf\xe9-%d.mp4" % number)
        shutil.copy(world / line["video"], tmp_path / name)
        said = {key: f"half \ud83d a {number}" for key in ("text", "subtitle", "caption")}
        lines[number] = {"video": name, **said}
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(
        make_config(
            *(f"task={task}", f"data.train={annotations}", f"data.validation={annotations}"),
            *("on_nonfinite=skip", "batch_size=4", "max_steps=2", "best_metric=text_to_video/R@5"),
        )
    )
    (skipped,) = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert all(rf"caf\xe9-{number}.mp4" in skipped for number in range(4))


def test_a_full_disk_costs_only_the_checkpoints_that_found_it_full(
    make_config, world, monkeypatch, caplog
):
    """Files of more than a few bytes cannot be written; the error is the real writers'."""
    import resource

    save, limit = checkpoint.save, resource.RLIMIT_FSIZE
    unlimited = resource.getrlimit(limit)

    def save_on_a_full_disk(folder, step, write):
        full = 10_000 if step in (2, 3, 6) else unlimited[0]
        resource.setrlimit(limit, (full, unlimited[1]))
        try:
            return save(folder, step, write)
        finally:
            resource.setrlimit(limit, unlimited)

    monkeypatch.setattr(checkpoint, "save", save_on_a_full_disk)
    overrides = ["save_every=1", "eval_every=1", f"data.validation={world / 'annotations.jsonl'}"]
    config = make_config(*overrides)
    with pytest.raises(TrainingError, match="step 6: the checkpoint could not be written") as end:
        train(config)
    assert "\n" not in str(end.value) and "resume=latest" in str(end.value)
    warned = [record.getMessage() for record in caplog.records]
    assert [line[:7] for line in warned] == ["step 2:", "step 3:"]
    assert all("could not be written" in line and "\n" not in line for line in warned)
    out = Path(config.out)
    kept = {path.name for path in (out / "checkpoints").iterdir()} - {".lock"}
    assert {"step-00000004", "step-00000005"} <= kept <= {f"step-0000000{n}" for n in (1, 4, 5)}
    assert (out / "last" / "config.json").exists() and (out / "best" / "config.json").exists()

    monkeypatch.setattr(checkpoint, "save", save)
    train(make_config(*overrides, "resume=latest"))
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]


def test_a_disk_with_room_for_the_checkpoints_that_are_kept_is_large_enough(
    make_config, monkeypatch, caplog
):

    flush = checkpoint._hash_and_flush

    def flush_to_a_small_disk(folder):
        if len(list(folder.parent.glob("*step-*"))) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return flush(folder)

    monkeypatch.setattr(checkpoint, "_hash_and_flush", flush_to_a_small_disk)
    config = make_config("save_every=1", "max_steps=4", "keep_checkpoints=2")
    train(config)
    out = Path(config.out)
    left = checkpoint.checkpoints(out / "checkpoints")
    assert [checkpoint.checkpoint_step(path) for path in left] == [3, 4]
    assert [checkpoint.damage(path) for path in left] == [None, None]
    CLIPViPModel.from_pretrained(out / "last")
    told = [record.getMessage() for record in caplog.records]
    assert ["the disk is full; deleted step-" in line for line in told] == [True, True]


def test_links_that_cannot_be_moved_cost_no_checkpoint(make_config, caplog):
    """A copy of a run that followed links has folders in their place."""

    config = make_config("save_every=1", "max_steps=3", "keep_checkpoints=1", "resume=latest")
    last = Path(config.out) / "last"
    train(make_config("max_steps=1"))
    last.unlink()
    last.mkdir()
    (last / "copied").touch()
    train(config)
    (left,) = checkpoint.checkpoints(Path(config.out) / "checkpoints")
    assert left.name == "step-00000003" and list(last.iterdir()) == [last / "copied"]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{last} could not be moved to step {n}: last is not a link; move it away"
        for n in (1, 2, 3)
    ]
    train(make_config("save_every=1", "max_steps=4", "resume=latest"))


@pytest.mark.parametrize("kind", ["file", "file above", "checkpoints are a file"])
def test_an_out_that_cannot_be_is_reported_in_one_line(make_config, tmp_path, kind):
    (tmp_path / "taken").mkdir()
    file = tmp_path / "taken" / ("checkpoints" if kind.startswith("checkpoints") else "a")
    file.touch()
    out = {"file": file, "file above": file / "run"}.get(kind, file.parent)
    with pytest.raises(ConfigError, match="where no run can be written") as error:
        train(make_config(f"out={out}"))
    assert str(error.value).startswith(f"out is {out}, ") and "\n" not in str(error.value)
    assert list((tmp_path / "taken").glob("[!.]*")) == [file]


def test_a_state_of_something_else_is_reported_in_one_line(make_config):

    config = make_config("save_every=1", "max_steps=1")
    train(config)
    (path,) = checkpoint.checkpoints(Path(config.out) / "checkpoints")
    manifest = json.loads((path / "manifest.json").read_text())
    contents = ({}, [1], {"optimizer": {}, "random": 1, "course": 2}, Path("code"), b"no file")
    for content in contents:
        torch.save(content, path / "state.pt")
        if isinstance(content, bytes):
            (path / "state.pt").write_bytes(content)
        data = (path / "state.pt").read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "manifest.json").write_text(json.dumps({**manifest, "state.pt": entry}))
        with pytest.raises(TrainingError, match=r"state\.pt does not hold the state of a") as error:
            train(make_config("max_steps=2", "resume=latest"))
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
        assert ("could run it" in str(error.value)) == isinstance(content, Path)


def test_a_full_gpu_is_no_fault_of_the_checkpoint(make_config, monkeypatch):
    from clipvip.training import parallel

    train(make_config("save_every=1", "max_steps=1"))

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parallel, "load_moments", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train(make_config("max_steps=2", "resume=latest"))


def test_what_was_best_is_there_or_is_best_no_more(make_config, world, monkeypatch, caplog):
    """The newest checkpoint, the best, is damaged: alone, then with the best before it."""
    from clipvip.retrieval import METRICS, TABLES

    scores = iter([50.0, 10.0, 20.0, 60.0, 30.0, 30.0])

    def scored(*given, **settings):
        score = next(scores)
        return {table: dict.fromkeys(METRICS, score) for table in TABLES}

    monkeypatch.setattr(Retrieval, "evaluate", staticmethod(scored))
    config = make_config(
        *("max_steps=8", "eval_every=2", "save_every=2", "resume=latest"),
        f"data.validation={world / 'annotations.jsonl'}",
    )
    out = Path(config.out)
    newest = out / "checkpoints" / "step-00000008" / "state.pt"
    assert train(config)["best_step"] == 8
    os.truncate(newest, 1000)
    assert train(config)["best_step"] == 2
    assert (out / "best").resolve().parent.name == "step-00000002"
    assert (out / "best" / "config.json").exists()

    os.truncate(newest, 1000)
    os.truncate(out / "checkpoints" / "step-00000002" / "state.pt", 1000)
    assert train(config)["best_step"] == 8
    assert (out / "best" / "config.json").exists() and (
        out / "best"
    ).resolve() == newest.parent / "model"
    assert any(
        "step-00000002 was the best, but" in record.getMessage() for record in caplog.records
    )


def test_what_one_rank_finds_they_all_do(make_config, tmp_path):
    """The first cannot write the last checkpoint; the second's loss is not finite."""
    full = [make_config.path, "max_steps=2", "save_every=1", f"out={tmp_path / 'full'}"]
    skip = [make_config.path, "max_steps=4", "on_nonfinite=skip"]
    said = run_forks("full", *full, "+", "skip", *skip)
    lines = [line for line in said.splitlines() if "could not be written" in line]
    assert len(lines) == 2 and lines[0].startswith("step 1: ")
    assert lines[1].startswith("clipvip: error: step 2: ") and lines[1].endswith("which writes it")
    assert "ended with [1, 1]" in said
    assert said.count("not finite; skipped") == 1 and "step 2: loss " in said
    log = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in log] == [0, 1, 1, 1]
    assert [row["grad_norm"] is None for row in log] == [False, True, False, False]


def test_rows_of_metrics_wait_for_room_on_the_disk(make_config, tmp_path, caplog):
    import resource

    from clipvip.training.reporting import Reporter
    from clipvip.training.trainer import make_accelerator

    limit = resource.RLIMIT_FSIZE
    unlimited = resource.getrlimit(limit)
    (tmp_path / "run").mkdir()
    with Reporter(make_accelerator(make_config()), tmp_path / "run", 0, 4) as reporter:
        for step in range(1, 5):
            full = 30 if step in (2, 3) else unlimited[0]
            resource.setrlimit(limit, (full, unlimited[1]))
            try:
                reporter.write(step, {"loss": step / 3})
            finally:
                resource.setrlimit(limit, unlimited)
    assert losses(tmp_path / "run") == {step: step / 3 for step in range(1, 5)}
    assert len(caplog.records) == 1


def test_a_tracker_that_fails_does_not_end_the_run(make_config, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    class UnreachedError(Exception):
        pass

    def unreached(*given, **settings):
        raise UnreachedError("no route to host")

    monkeypatch.setattr(TensorBoardTracker, "log", unreached)
    monkeypatch.setattr(TensorBoardTracker, "finish", unreached)
    config = make_config("max_steps=3")
    assert train(config)["step"] == 3
    assert list(losses(config.out)) == [1, 2, 3]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and all("no route to host" in line for line in warned)


def test_a_resumed_run_is_one_run_of_its_trackers(make_config, monkeypatch):
    from types import ModuleType, SimpleNamespace

    import accelerate.tracking

    from clipvip.training import reporting

    said = {"wandb": [], "mlflow": [], "configurations": [], "steps": []}

    def wandb_init(**given):
        said["wandb"].append(given)
        log = lambda values, step: said["steps"].append(step)  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: None)

    def mlflow_run(**given):
        said["mlflow"].append(given)
        return SimpleNamespace(info=SimpleNamespace(run_id=given["run_id"] or "made by mlflow"))

    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    store = lambda values, **given: said["configurations"].append(values)  # noqa: E731
    wandb.init, wandb.config = wandb_init, SimpleNamespace(update=store)
    mlflow.start_run, mlflow.search_experiments = mlflow_run, lambda **given: []
    mlflow.create_experiment = mlflow.log_metrics = mlflow.end_run = lambda *_, **given: None
    mlflow.log_params = lambda values: said["configurations"].append(dict(values))
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=1000)
    mlflow.utils = SimpleNamespace(validation=limits)
    for module in (wandb, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    known = [accelerate.tracking.LoggerType(name) for name in ("wandb", "mlflow")]
    for place in (reporting, accelerate.tracking):
        monkeypatch.setattr(place, "get_available_trackers", lambda: known)

    config = make_config("trackers=[wandb,mlflow]", "save_every=2", "resume=latest")
    train(config)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000006")
    train(config)
    assert said["steps"] == [1, 2, 3, 4, 5, 6, 5, 6]
    first, second = (given["id"] for given in said["wandb"])
    assert first == second and said["wandb"][1]["resume"] == "allow"
    assert [given["run_id"] for given in said["mlflow"]] == [None, "made by mlflow"]
    assert len(said["configurations"]) == 2
    assert {str(settings["optimizer.lr"]) for settings in said["configurations"]} == {"0.001"}

    train(make_config("trackers=[wandb]", f"out={config.out}-other", "max_steps=1"))
    assert said["wandb"][2]["id"] != first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["accumulation=3"], "batch_size is 8; it must be a multiple of 3"),
        (["batch_size=64"], "holds 16 clips; expected at least 64, those of batch_size"),
        (["data.text_length=77"], "data.text_length is 77; expected at most 32"),
        (["model.config.vision_config.num_proxis=3"], "did you mean vision_config.num_proxies?"),
        (["data.train=absent.jsonl"], "absent.jsonl"),
        (["trackers=[tensorbord]"], "trackers: 'tensorbord' is not one of aim, "),
        (["trackers=[tensorboard,aim]"], "trackers: aim is not installed: pip install aim"),
    ],
)
def test_errors_of_the_command_are_one_line(make_config, capsys, overrides, message):
    from clipvip.training.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main([str(make_config.path), *overrides])
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert message in said and said.count("\n") == 1 and said.startswith("clipvip: error: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model.name is empty; expected the folder of a model, "),
        ("'  '", "model.name is empty; expected the folder of a model, "),
        ("/absent/model", "model.name is '/absent/model', which does not exist; expected"),
        ("absent/model", "model.name is 'absent/model', which does not exist here and could"),
        ("absent.pt", "model.name is 'absent.pt', which does not exist; expected"),
        (".", "model.name is '.', a folder without config.json; expected"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_model_that_is_not_there_is_reported_in_one_line(
    make_config, capsys, monkeypatch, name, message, flags
):
    import huggingface_hub.constants

    from clipvip.training.__main__ import main

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(make_config.path.parent)
    given = [f"model.name={name}", "model.config=null", "model.tokenizer=null"]
    with pytest.raises(SystemExit) as caught:
        main([str(make_config.path), *given, *flags])
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert message in said and said.count("\n") == 1 and said.startswith("clipvip: error: ")
    assert "such as openai/clip-vit-base-patch32" in said


@pytest.mark.parametrize("size", [20, 68, 144])
def test_heads_that_the_kernels_do_not_take_are_refused_at_the_start(
    make_config, world, tmp_path, capsys, size
):
    """A new model and a checkpoint are refused alike, in a run and dry; not with reference."""
    from clipvip.training.__main__ import main

    new = [f"model.config.vision_config.hidden_size={2 * size}", "max_steps=1"]
    new += ["model.config.vision_config.num_attention_heads=2"]
    assert train(make_config(*new, "backend=reference"))["step"] == 1
    named = [f"model.name={tmp_path / 'run' / 'last'}", "model.config=null"]
    native = ["backend=native", f"out={tmp_path / 'native'}"]
    refused = f"has heads of {size} (hidden_size {2 * size} / num_attention_heads 2), which the"
    for key, given in (("model.config", new), ("model.name", named)):
        for flags in ([], ["--dry-run"]):
            with pytest.raises(SystemExit) as caught:
                main([str(make_config.path), *given, *native, *flags])
            said = capsys.readouterr().err
            assert caught.value.code == 1 and said.count("\n") == 1
            assert said.startswith(f"clipvip: error: {key}: vision_config {refused}")
            assert "expected a multiple of 8 up to 128" in said and "give backend=reference" in said


def environment():
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


def run_forks(*arguments):
    forks = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    finished = subprocess.run(
        [*forks, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def test_killed_at_any_moment_the_resumed_run_equals_the_unbroken_one(make_config, tmp_path, world):
    overrides = [
        "max_steps=40", "save_every=3", "eval_every=7", "accumulation=2", "task=omnisource",
        "model.config.text_config.attention_dropout=0.1",  # so that random states matter
        f"data.validation={world / 'annotations.jsonl'}",
    ]  # fmt: skip
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(make_config(*overrides, f"out={unbroken}"))
    given = [make_config.path, *overrides, f"out={broken}", "resume=latest"]
    said = run_forks("damage", "1,1,1,1", *given)
    assert "killed: [-9]" in said and "state.pt has 1000 bytes of " in said
    assert losses(broken) == losses(unbroken)
    assert [row["step"] for row in rows(broken)] == list(range(1, 41))
    key = "validation/text_to_video/mean_rank"
    ranks = [[(row["step"], row[key]) for row in rows(out, key)] for out in (broken, unbroken)]
    assert ranks[0] == ranks[1]


def test_two_processes_killed_go_on_exactly_and_with_another_number_soundly(
    make_config, tmp_path, world
):
    from clipvip.data.shards import write_shards

    write_shards(world / "annotations.jsonl", tmp_path / "tars", clips_per_shard=5, num_workers=0)
    overrides = ["max_steps=24", "save_every=3"]
    given = [make_config.path, *overrides, "resume=latest"]
    dropout = "model.config.text_config.attention_dropout=0.1"  # so that random states matter
    train(make_config(*overrides, f"out={tmp_path / 'unbroken'}"))
    said = run_forks(
        *["kill", "2", *given, dropout, f"out={tmp_path / 'two-unbroken'}", "+"],
        *["kill", "2,2", *given, dropout, f"out={tmp_path / 'two'}", "+"],
        *["kill", "1,2,1", *given, f"out={tmp_path / 'changed'}", "+"],
        *["kill", "1,2", *given, f"data.train={tmp_path / 'tars'}", f"out={tmp_path / 'sharded'}"],
    )
    assert losses(tmp_path / "two") == losses(tmp_path / "two-unbroken")
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-4)
    assert list(losses(tmp_path / "sharded")) == list(range(1, 25))
    assert "resuming with 2 processes after 1: the batches are unchanged" in said
    assert "resuming with 1 processes after 2: the batches are unchanged" in said
    assert "resuming with 2 processes after 1: the rest of this epoch is drawn" in said


def test_sigterm_saves_and_the_run_resumes_as_if_unbroken(make_config, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(make_config("max_steps=20", f"out={unbroken}"))
    given = ["max_steps=20", "resume=latest", "data.num_workers=1"]
    said = run_forks("stop", broken, make_config.path, *given)
    assert "ended with [75]\n" in said and "ended with [75, 75]\n" in said
    ends = [line for line in said.splitlines() if "SIGTERM: ends after step" in line]
    assert len(ends) == 2 and all(line.startswith("clipvip: ") for line in ends)
    assert losses(f"{broken}-1") == losses(unbroken)
    assert losses(f"{broken}-2") == pytest.approx(losses(unbroken), rel=1e-4)


def test_sigterm_that_comes_twice_is_one_and_a_later_one_ends_at_once():
    """A scheduler sends it to torchrun and to its processes, to which torchrun sends it again."""
    code = """
import os, signal
from clipvip.training import preemption
with preemption.Preemption() as run:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert run.asked
    preemption.SAME_SIGNAL_SECONDS = 0.0
    print("lives", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert ended.stdout == b"lives\n" and ended.returncode == -signal.SIGTERM


SIGTERM_AT_IMPORT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGTERM)

wanted, run = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.meta_path.insert(0, Finder())
if run == "clipvip":
    from clipvip.cli import main
    main()
runpy.run_module(run, run_name="__main__")
"""


def test_sigterm_before_the_first_step_ends_with_75_too(make_config, tmp_path):
    """However early it comes; the first rank alone says so."""
    overrides = [str(make_config.path), f"out={tmp_path / 'absent'}"]
    starts = [
        *(("clipvip", name, "0") for name in ("tyro", "omegaconf")),
        *(("clipvip.training", name, "0") for name in ("omegaconf", "torch", "accelerate")),
        ("clipvip.training", "torch", "1"),
    ]
    runs = []
    for program, name, rank in starts:
        given = ["train"] * (program == "clipvip") + overrides
        command = [sys.executable, "-c", SIGTERM_AT_IMPORT, name, program, *given]
        ranked = environment() | {"RANK": rank}
        runs.append(subprocess.Popen(command, env=ranked, stderr=subprocess.PIPE, text=True))
    for run, (*_, rank) in zip(runs, starts, strict=True):
        said = run.communicate(timeout=60)[1]
        assert run.returncode == 75, said
        assert said == "clipvip: SIGTERM: no step is running; exits\n" * (rank == "0")
    assert not (tmp_path / "absent").exists()


def test_sigterm_leaves_a_validation_which_the_next_start_makes_up_for(
    make_config, tmp_path, world, monkeypatch
):
    """And where it comes before the first step, there is nothing to save."""
    from clipvip import embedding
    from clipvip.training import state

    overrides = ["max_steps=4", "eval_every=2", "save_every=4", "resume=latest", "ema=0.7"]
    overrides += [f"data.validation={world / 'annotations.jsonl'}", "eval_batch_size=4"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = train(make_config(*overrides, f"out={unbroken}"))

    def sending(function, call):
        """SIGTERM with that call of the function."""
        calls = []

        def sent(*given, **settings):
            calls.append(1)
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return function(*given, **settings)

        return sent

    given = make_config(*overrides, f"out={broken}")
    for where, name, call, step in (
        (state, "build_model", 1, 0),  # before the first step
        (embedding, "normalize_frames", 2, 2),  # in a validation
        (embedding, "normalize_frames", 7, 4),  # in the last, after that of step 2 was made up for
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, sending(getattr(where, name), call))
            with pytest.raises(Preempted, match=f"SIGTERM: ends after step {step} of 4"):
                train(given)
        found = sorted(path.name for path in (broken / "checkpoints").glob("[!.]*"))
        assert (found[-1:] == [f"step-0000000{step}"]) if step else not found
    assert train(given) == whole
    assert losses(broken) == losses(unbroken)
    key = "validation/text_to_video/mean_rank"
    assert [(row["step"], row[key]) for row in rows(broken, key)] == [
        (row["step"], row[key]) for row in rows(unbroken, key)
    ]
    assert (broken / "best").resolve().parent.name == f"step-{whole['best_step']:08d}"


def test_a_lost_rank_ends_the_others_and_is_named(make_config, tmp_path):
    given = [make_config.path, "max_steps=1000", "lost_after=2"]
    said = run_forks("lose", tmp_path / "run", *given)
    lost = re.findall(r"^(\d+) (SIG.+); the other ended with 1 in ([\d.]+) s", said, re.MULTILINE)
    hows = ["SIGKILL", "SIGSTOP", "SIGSTOP", "SIGKILL early", "SIGSTOP early"]
    assert [how for _, how, _ in lost] == hows
    assert all(float(seconds) < 30 for *_, seconds in lost)
    for rank, (process, *_) in zip((0, 0, 1, 1, 1), lost, strict=True):
        name = rf"error: rank {rank} \({socket.gethostname()}, process {process}\) .*is lost; "
        assert len(re.findall(name, said)) == 1, said


def test_torchrun_starts_lost_ranks_again_from_the_last_checkpoint(make_config, tmp_path):
    given = ["max_steps=20", "save_every=3"]
    train(make_config(*given, f"out={tmp_path / 'unbroken'}"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
        "-m", "clipvip.training", str(make_config.path), *given, "resume=latest",
        f"out={tmp_path / 'broken'}",
    ]  # fmt: skip
    log = tmp_path / "broken" / "metrics.jsonl"
    with subprocess.Popen(
        command,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        until = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < 8:
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.001)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ranks = {pid: Path(f"/proc/{pid}/environ").read_text() for pid in children}
        (victim,) = [pid for pid, told in ranks.items() if "\0RANK=1\0" in told]
        os.kill(int(victim), signal.SIGKILL)
        said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert f"rank 1 ({socket.gethostname()}, process {victim}) is lost" in said
    assert re.search(r"steps ([47]|10|13|16|19) to 20", said)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-4)
    assert [row["step"] for row in rows(tmp_path / "broken")] == list(range(1, 21))


def test_under_slurm_as_documented_a_job_that_is_told_to_end_is_requeued_once_it_has_saved(
    tmp_path,
):
    """The script of docs/training.md, among stand-ins of Slurm's commands and of torchrun."""
    told = tmp_path / "told"
    stand_ins = {
        "srun": 'exec "$@"',
        "torchrun": 'trap "sleep 0.3; echo saved >> $TOLD; exit 1" TERM; echo $$ > $TOLD.pid\n'
        "while true; do sleep 0.05; done",
        "scancel": 'echo "$@" >> $TOLD; kill -TERM $(cat $TOLD.pid)',
        "scontrol": '[ $1 = show ] || echo "$@" >> $TOLD',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (script,) = re.findall(r"^```bash\n(.*?)^```", docs, re.MULTILINE | re.DOTALL)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "TOLD": str(told), "PATH": path}
    with subprocess.Popen(["bash", "-c", script], env=os.environ | slurm) as shell:
        until = time.monotonic() + 30
        while not told.with_suffix(".pid").exists() or not told.with_suffix(".pid").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        shell.terminate()
    assert told.read_text().splitlines() == ["--signal=TERM 7", "saved", "requeue 7"]


def test_accelerate_launches_the_same_run(make_config, tmp_path):
    train(make_config("max_steps=2", f"out={tmp_path / 'one'}"))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
        *("-m", "clipvip.training", str(make_config.path), "max_steps=2"),
        f"out={tmp_path / 'two'}",
    ]
    given = environment() | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "clips on 2 × " in ended.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_two_processes_train_as_one(make_config, tmp_path, world):
    overrides = [
        "max_steps=3",
        "accumulation=2",
        "task=omnisource",
        "optimizer.lr=1e-4",  # Adam takes whole steps where a gradient is no more than rounding
        f"data.validation={world / 'annotations.jsonl'}",
    ]
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    command = [sys.executable, "-m", "clipvip.training", str(make_config.path), *overrides]
    alone = environment() | {"OMP_NUM_THREADS": "1"}  # as the two: with nothing of other tests
    subprocess.run([*command, f"out={one}"], env=alone, check=True, timeout=120)
    given = ["two", make_config.path, *overrides]
    run_forks(*given, f"out={two}", "+", *given, "micro_batch=1", f"out={parts}")
    for out in (two, parts):
        for key in ("loss", "grad_norm"):
            found, wanted = ([row[key] for row in rows(run)] for run in (out, one))
            assert found == pytest.approx(wanted, rel=1e-4)
    key = "validation/text_to_video/R@5"
    assert [row["step"] for row in rows(two, key)] == [row["step"] for row in rows(one, key)]


def test_every_clip_and_text_counts_once_on_any_number_of_ranks(make_config, tmp_path, world):
    """Also with a number of clips that ranks do not divide, and with one that is missing."""
    out = Path(make_config().out)
    train(make_config("max_steps=1"))
    lines = (world / "annotations.jsonl").read_text().splitlines()[:13]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["video"] = str(world / row["video"])
    rows[4]["text"] = rows[4]["text"][0]  # videos with one text and with two
    rows.insert(7, {"video": "absent.mp4", "text": "nothing to be seen"})
    annotations = tmp_path / "uneven.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [out / "last", annotations]
    with pytest.raises(LoaderError, match=r"1 of 14 clips .*absent\.mp4"):
        evaluate_checkpoint(*given, num_workers=0, backend="reference")
    one = evaluate_checkpoint(
        *given, num_workers=0, batch_size=3, max_bad_share=0.1, backend="reference"
    )
    assert (one["clips"], one["texts"]) == (13, 25)
    assert one["missing"] == [str(tmp_path / "absent.mp4")]
    jobs = [["eval", count, *given, tmp_path / f"{count}.json"] for count in (2, 3)]
    run_forks(*jobs[0], "+", *jobs[1])
    for count in (2, 3):
        assert json.loads((tmp_path / f"{count}.json").read_text()) == one


def test_real_clips(make_config, real_clips, tmp_path):
    """A few steps on real H.264 of several sizes."""
    lines = [
        {"video": str(clip), "text": name.replace("_", " "), "start": start, "end": start + 1}
        for name, clip in real_clips.items()
        for start in (0, 1, 2)
    ]
    path = tmp_path / "real.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(f"data.train={path}", "batch_size=4", "max_steps=3", "data.num_frames=4")
    assert math.isfinite(train(config)["loss"])


def test_training_from_mixed_shards_resumes_exactly_with_any_number_of_workers(
    make_config, tmp_path, world, monkeypatch
):
    from clipvip.data.shards import write_shards

    for name in ("one", "two"):
        write_shards(world / "annotations.jsonl", tmp_path / name, clips_per_shard=5, num_workers=0)
    sources = [
        f"{{shards: '{tmp_path}/{name}', ratio: {n}}}" for n, name in ((3, "one"), (1, "two"))
    ]
    overrides = [
        "data.train=null", f"data.sources=[{', '.join(sources)}]", "task=omnisource",
        "max_steps=9", "save_every=2",
    ]  # fmt: skip
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(make_config(*overrides, f"out={unbroken}"))
    loss, calls = Omnisource.loss, []

    def failing(*given):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(Omnisource, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(*overrides, f"out={broken}"))
    train(make_config(*overrides, f"out={broken}", "resume=latest", "data.num_workers=2"))
    assert losses(broken) == losses(unbroken)
    assert [row["step"] for row in rows(broken)] == list(range(1, 10))
