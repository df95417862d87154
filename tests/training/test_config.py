"""Configurations: layers, overrides, and errors of one line that say what to change."""

import pytest

from clipvip.training.config import ConfigError, load_config, packaged_configs

GIVEN = ["out=runs/a", "data.train=train.jsonl", "model.name=some/checkpoint"]


def test_every_packaged_config_loads_by_name():
    names = [path.stem for path in packaged_configs()]
    assert {"pretrain", "msrvtt", "didemo", "lsmdc", "activitynet"} <= set(names)
    for name in names:
        config = load_config(name, GIVEN)
        assert config.data.train == "train.jsonl"
        assert config.optimizer.betas == (0.9, 0.98)


@pytest.mark.parametrize(
    ("name", "text", "frames", "batch", "lr", "decay", "epochs", "clip"),
    [
        ("pretrain", 70, 12, 1024, 5e-6, 0.05, 5, 5.0),
        ("pretrain_b16", 70, 12, 1024, 5e-6, 0.05, 5, 5.0),
        ("msrvtt", 50, 12, 128, 1e-6, 0.2, 100, 1.0),
        ("didemo", 50, 12, 128, 1e-6, 0.2, 20, 1.0),
        ("didemo_b16", 70, 12, 128, 1e-6, 0.2, 20, 1.0),
        ("lsmdc", 50, 12, 128, 1e-6, 0.2, 10, 1.0),
        ("activitynet", 70, 32, 128, 1e-6, 0.2, 20, 1.0),
    ],
)
def test_schedules_are_the_papers(name, text, frames, batch, lr, decay, epochs, clip):
    config = load_config(name, GIVEN)
    assert (config.data.text_length, config.data.num_frames) == (text, frames)
    assert (config.batch_size, config.epochs) == (batch, epochs)
    optim = config.optimizer
    assert (optim.lr, optim.weight_decay, optim.max_grad_norm) == (lr, decay, clip)
    assert config.task == ("omnisource" if name.startswith("pretrain") else "retrieval")


def test_a_file_is_a_diff_from_its_base_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("base: msrvtt\nseed: 1\noptimizer: {lr: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\noptimizer: {weight_decay: 0.5}\n")
    config = load_config(tmp_path / "b.yaml", [*GIVEN, "seed=7", "epochs=null", "max_steps=3"])
    assert config.optimizer.lr == 1e-3 and config.optimizer.weight_decay == 0.5
    assert (config.seed, config.epochs, config.max_steps) == (7, None, 3)


def test_a_bare_no_is_a_precision():
    assert load_config("msrvtt", [*GIVEN, "mixed_precision=no"]).mixed_precision == "no"


def test_a_new_model_is_nested_keys(tmp_path):
    path = tmp_path / "new.yaml"
    path.write_text(
        "epochs: 1\nmodel:\n  tokenizer: folder\n  config:\n    vision_config: {hidden_size: 32}\n"
    )
    config = load_config(path, [*GIVEN[:2], "model.config.vision_config.num_proxies=2"])
    assert config.model.config == {"vision_config": {"hidden_size": 32, "num_proxies": 2}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["lr=1"], "command line: unknown key lr; did you mean optimizer.lr?"),
        (["data.num_frame=3"], "unknown key data.num_frame; did you mean data.num_frames?"),
        (["optimizer.lr=fast"], "command line: optimizer.lr: "),
        (["batch_size=0"], "batch_size is 0; it must be above 0"),
        (["task=pretrain"], "task is 'pretrain'; it must be one of omnisource, retrieval"),
        (["variant=vcs"], "variant is 'vcs'; it must be one of vs, "),
        (["max_steps=5"], "give either epochs or max_steps"),
        (["best_metric=R@1"], "best_metric is 'R@1'; it must be one of text_to_video/R@1, "),
        (["model.name=null"], "model.name is empty; expected the folder of a model, "),
        (["model.config={}"], "give either model.name"),
        (["seed"], "override 'seed' is not of the form key=value"),
        (["data.train=null"], "data.train is required: give it as data.train=VALUE"),
        (["data.sources=[{shards: a.tar}]"], "give either data.train or data.sources"),
        (["data.train=null", "data.sources=[{shard: a.tar}]"], "Key 'shard' not in 'SourceConfig'"),
        (["data.train=null", "data.sources=[{shards: a.tar, ratio: 0}]"], "ratio is 0.0; it must"),
        (["data.train=???"], "data.train is required: give it as data.train=VALUE"),
    ],
)
def test_errors_are_one_line_and_say_what_to_change(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("msrvtt", [*GIVEN, *overrides])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede: 1", "config.yaml: unknown key sede; did you mean seed?"),
        ("base: config.yaml", "is its own base"),
        ("base: nothing.yaml", "no configuration 'nothing.yaml'"),
        ("a: [", "config.yaml: "),
        ("- 1", "holds a list"),
    ],
)
def test_errors_of_files_name_the_file(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, GIVEN)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_packaged_ones():
    with pytest.raises(ConfigError, match="msrvtt"):
        load_config("msrvt")
