"""What is trained and at which rate is METHOD's, or what the configuration asks for."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from clipvip.training.build import build_model
from clipvip.training.config import ConfigError, OptimizerConfig
from clipvip.training.optimization import parameter_groups, run_steps, schedule


def by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_rate_rises_then_follows_a_cosine_to_zero():
    factors = [schedule(step, 1000, 0.01) for step in range(1000)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and factors[505] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-5
    assert schedule(0, 1, 0.01) == 1 and schedule(0, 10, 0) == 1


@pytest.mark.parametrize(("total", "rising"), [(1000, 10), (40, 8), (7, 0)])
def test_schedule_is_that_of_transformers_without_its_first_step_of_rate_0(total, rising):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    shift = int(rising > 0)
    theirs = get_cosine_schedule_with_warmup(optimizer, rising, total).lr_lambdas[0]
    for step in range(rising):
        assert schedule(step, total, rising / total) == pytest.approx(theirs(step + shift))
    for step in range(rising, total):
        assert schedule(step, total, rising / total) == pytest.approx(theirs(step))


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["epochs=10"], (5, 50)),
        (["epochs=10", "accumulation=2"], (2, 25)),  # of 50 batches
        (["epochs=0.5"], (5, 3)),
        (["epochs=1", "batch_size=16", "accumulation=8"], (1, 1)),
        (["epochs=null", "max_steps=7", "accumulation=2"], (2, 7)),
    ],
)
def test_epochs_are_passes_over_the_batches(make_config, overrides, steps):
    config = make_config("max_steps=null", *overrides)
    assert run_steps(config, 5) == steps


def test_only_biases_layer_norms_and_scale_are_free_of_decay(make_config):
    model, _ = build_model(make_config(), None)
    groups = by_name(model, parameter_groups(model, OptimizerConfig(weight_decay=0.2)))
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    assert all(group["share"] == 1 for group in groups.values())
    for name, group in groups.items():
        free = name.endswith("bias") or "norm" in name or "layrnorm" in name
        assert group["weight_decay"] == (0.0 if free or name == "logit_scale" else 0.2), name
    assert len(groups["logit_scale"]["params"]) == 1


def test_rates_fall_with_each_layer_below_the_projections(make_config):
    model, _ = build_model(make_config(), None)
    groups = by_name(model, parameter_groups(model, OptimizerConfig(layer_decay=0.5)))
    for tower in ("text_model", "vision_model"):
        for number, share in ((1, 0.5), (0, 0.25)):
            layer = f"{tower}.encoder.layers.{number}"
            assert groups[f"{layer}.mlp.fc1.weight"]["share"] == share
            assert groups[f"{layer}.layer_norm1.bias"]["share"] == share
        assert groups[f"{tower}.embeddings.position_embedding.weight"]["share"] == 0.125
    assert groups["vision_model.embeddings.added_cls"]["share"] == 0.125
    assert groups["vision_model.pre_layrnorm.weight"]["share"] == 0.125
    for name in ("visual_projection.weight", "vision_model.post_layernorm.bias", "logit_scale"):
        assert groups[name]["share"] == 1


def test_globs_freeze_and_unfreeze(make_config):
    config = make_config(
        "model.freeze=['text_model.*','vision_model.encoder.*']",
        "model.unfreeze=['*.layers.1.*']",
    )
    model, _ = build_model(config, None)
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("text_model.", "vision_model.encoder.")) and ".1." not in name
        assert parameter.requires_grad != frozen, name
    groups = by_name(model, parameter_groups(model, OptimizerConfig()))
    assert groups.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.freeze=['txt.*']", "model.freeze: 'txt.*' matches no parameter"),
        ("model.freeze=['*']", "leaves no parameter to train"),
    ],
)
def test_globs_that_cannot_be_meant(make_config, override, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        build_model(make_config(override), None)
