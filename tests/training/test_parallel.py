"""However weights lie and towers run, the run is the same."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipvip.model import CLIPViPModel
from clipvip.training import parallel, trainer
from clipvip.training.build import build_model
from clipvip.training.config import OptimizerConfig
from clipvip.training.optimization import adamw
from clipvip.training.trainer import train

FORKS = Path(__file__).with_name("forks.py")
COMMON = ("task=omnisource", "save_every=3", "eval_every=3")


def two(make_config, *overrides, mode="two"):
    command = [sys.executable, str(FORKS), mode, str(make_config.path), *map(str, overrides)]
    subprocess.run(command, check=True, timeout=120)


def losses(out):
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(out):
    return CLIPViPModel.from_pretrained(Path(out) / "last").state_dict()


@pytest.fixture
def common(world):
    return (*COMMON, f"data.validation={world / 'annotations.jsonl'}", "ema=0.7")


def test_shards_of_weights_on_two_ranks_are_one_process(make_config, tmp_path, common):
    """Also gone on with from one to the other: a checkpoint is the same."""
    one, cut, mixed = (tmp_path / name for name in ("one", "cut", "mixed"))
    fsdp = ("parallel=fsdp", "micro_batch=2", "model.gradient_checkpointing=true")
    train(make_config(*common, f"out={one}"))
    two(make_config, *common, *fsdp, f"out={cut}")
    assert losses(cut) == pytest.approx(losses(one), rel=1e-4)
    # Not every weight: Adam makes whole steps of rounding errors where a gradient is zero.
    name = "visual_projection.weight"
    torch.testing.assert_close(weights(cut)[name], weights(one)[name], rtol=1e-3, atol=1e-4)
    scales = weights(cut)["logit_scale"], weights(one)["logit_scale"]  # the one that is no shard
    torch.testing.assert_close(*scales, rtol=0, atol=1e-5)

    # The cosine ends with the run, so a run that is gone on with has been cut short, not ended.
    (cut / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    cut.rename(mixed)
    train(make_config(*common, f"out={mixed}", "resume=latest"))
    assert losses(mixed) == pytest.approx(losses(one), rel=1e-4)
    (mixed / "checkpoints" / "step-00000006").rename(tmp_path / "aside-too")
    two(make_config, *common, *fsdp, f"out={mixed}", "resume=latest")
    assert losses(mixed) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_only_the_rank_that_writes_holds_what_is_saved(make_config, tmp_path, kind):
    given = ("ema=0.7", f"parallel={kind}", "resume=latest", f"out={tmp_path / kind}")
    two(make_config, *COMMON, *given, mode="hold")
    kept = losses(tmp_path / kind)
    (tmp_path / kind / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    two(make_config, *COMMON, *given, mode="hold")
    assert losses(tmp_path / kind) == pytest.approx(kept, rel=1e-5) and len(kept) == 6


def test_the_average_is_saved_and_the_run_resumes_from_its_own_weights(
    make_config, tmp_path, common
):
    whole, broken, plain = (tmp_path / name for name in ("whole", "broken", "plain"))
    train(make_config(*common, f"out={whole}"))
    train(make_config(*common, f"out={broken}"))
    (broken / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    train(make_config(*common, f"out={broken}", "resume=latest"))
    train(make_config(*common, "ema=null", f"out={plain}"))
    assert losses(broken) == losses(whole) == losses(plain)
    for name, weight in weights(whole).items():
        assert weights(broken)[name].equal(weight)
    name = "visual_projection.weight"
    assert not weights(plain)[name].equal(weights(whole)[name])


def test_the_average_follows_and_gives_its_place_back(make_config):
    model, _ = build_model(make_config("model.freeze=['text_model.*']"), None)
    average = parallel.Average(model, 0.9)
    start = model.visual_projection.weight.detach().clone()
    with torch.no_grad():
        model.visual_projection.weight += 1
        after = model.visual_projection.weight.clone()
    average.update(1000)
    with average.in_place():
        torch.testing.assert_close(model.visual_projection.weight.data, start + 0.1)
    assert model.visual_projection.weight.equal(after)


def test_a_run_resumes_with_its_moments_and_the_configurations_settings(make_config):
    """Also with other groups, and with parameters that were frozen."""
    before, _ = build_model(make_config("model.freeze=['text_model.*']"), None)
    first = adamw(before, OptimizerConfig())
    for p in before.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    first.step()
    moments = parallel.whole_moments(before, first)

    model, _ = build_model(make_config(), None)
    settings = OptimizerConfig(weight_decay=0.03, layer_decay=0.5, betas=(0.8, 0.9))
    optimizer = adamw(model, settings)
    wanted = [(group["share"], group["weight_decay"]) for group in optimizer.param_groups]
    parallel.load_moments(model, optimizer, moments)
    groups = optimizer.param_groups
    assert [(group["share"], group["weight_decay"]) for group in groups] == wanted
    assert all(tuple(group["betas"]) == (0.8, 0.9) and group["fused"] for group in groups)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            given = first.state[old][name] if old.requires_grad else torch.zeros_like(old)
            assert optimizer.state[new][name].equal(given)


def test_gradients_are_clipped_together(make_config):
    model, _ = build_model(make_config(), None)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(parallel.clip_gradients(model, 0.5), norm)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5))


@pytest.mark.parametrize("which", ["none", "text", "all"])
def test_the_chosen_layers_are_compiled(make_config, which):
    model, _ = build_model(make_config(f"compile={which}"), None)
    text, video = (
        {layer._compiled_call_impl is not None for layer in tower.encoder.layers}
        for tower in (model.text_model, model.vision_model)
    )
    assert text == {which != "none"} and video == {which == "all"}


def test_compiled_towers_are_compiled_once_for_all_lengths(
    make_config, tmp_path, monkeypatch, world
):
    """Also with all that calls them: caching's two passes, and evaluation."""
    from torch._dynamo.utils import counters

    # What is compiled, and how often, does not depend on what is made of it; that takes a minute.
    quick = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(parallel.nn.Module, "compile", quick)
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    # Frames a clip differ, and so do tokens a batch; texts are padded to a batch's longest. Each
    # step has a part of one clip, which is compiled for itself, as is a text without padding.
    common = ("batch_size=7", "data.sampling=fps:4", "data.num_frames=4", "max_steps=6")
    common += ("micro_batch=3", "eval_batch_size=5", "backend=native")
    common += (f"data.validation={world / 'annotations.jsonl'}",)
    train(make_config(*common, f"out={eager}"))
    torch._dynamo.reset()
    counters.clear()
    validate, graphs = trainer.validate, []

    def counting(*given):
        better = validate(*given)
        graphs.append(counters["stats"]["unique_graphs"])
        return better

    monkeypatch.setattr(trainer, "validate", counting)
    # monkeypatch would leave these settings deleted, and later tests could compile nothing.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4):
        train(make_config(*common, "compile=all", f"out={compiled}"))
    assert len(graphs) == 3 and 0 < graphs[0] == graphs[2]
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)
