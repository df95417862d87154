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
    data = config.data
    assert (data.text_length, data.num_frames) == (text, frames)
    assert (data.sampling, data.resize) == ("authors", "squash")
    assert data.paragraph == name.startswith(("didemo", "activitynet"))
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


@pytest.mark.parametrize("name", [path.stem for path in packaged_configs()])
def test_a_run_of_a_packaged_config_may_be_so_many_steps(name):
    config = load_config(name, [*GIVEN, "max_steps=5"])
    assert (config.epochs, config.max_steps) == (None, 5)


def test_of_two_ways_to_say_one_thing_the_higher_layer_says_it(tmp_path):
    (tmp_path / "steps.yaml").write_text("base: msrvtt\nmax_steps: 3\ndata: {train: a.jsonl}\n")
    (tmp_path / "none.yaml").write_text("base: steps.yaml\nseed: 1\n")
    (tmp_path / "epochs.yaml").write_text(
        "base: none.yaml\nepochs: 2\ndata: {sources: [{shards: a.tar}]}\n"
    )

    def told(name, *overrides):
        config = load_config(tmp_path / f"{name}.yaml", [GIVEN[0], GIVEN[2], *overrides])
        sources = [source.shards for source in config.data.sources]
        return config.epochs, config.max_steps, config.data.train, sources

    assert told("steps") == told("none") == (None, 3, "a.jsonl", [])
    assert told("epochs") == (2, None, None, ["a.tar"])
    assert told("epochs", "max_steps=4", "data.train=b.jsonl") == (None, 4, "b.jsonl", [])
    assert told("steps", "epochs=0.5", "max_steps=null")[:2] == (0.5, None)

    (tmp_path / "both.yaml").write_text("base: steps.yaml\nepochs: 1\nmax_steps: 2\n")
    with pytest.raises(ConfigError, match=r"both\.yaml: give either epochs or max_steps, not both"):
        told("both", "epochs=1")


def test_a_clip_has_another_to_be_compared_with_in_every_backward_pass():
    assert load_config("msrvtt", [*GIVEN, "batch_size=2"]).batch_size == 2
    assert load_config("msrvtt", [*GIVEN, "batch_size=8", "accumulation=4"]).accumulation == 4


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
        (["data.text_length=2"], "data.text_length is 2; it must be at least 3"),
        (["task=pretrain"], "task is 'pretrain'; it must be one of omnisource, retrieval"),
        (["variant=vcs"], "variant is 'vcs'; it must be one of vs, "),
        (["epochs=1", "max_steps=5"], "command line: give either epochs or max_steps, not both"),
        (["epochs=null"], "give either epochs or max_steps: epochs is None, max_steps is None"),
        (
            ["batch_size=1"],
            "batch_size is 1 and accumulation 1; a clip is compared with the others",
        ),
        (["batch_size=1"], "give batch_size of at least 2 × accumulation, 2"),
        (["batch_size=8", "accumulation=8"], "at least 2 × accumulation, 16"),
        (["batch_size=8", "accumulation=16"], "at least 2 × accumulation, 32"),
        (["best_metric=R@1"], "best_metric is 'R@1'; it must be one of text_to_video/R@1, "),
        (["model.name=null"], "model.name is empty; expected the folder of a model, "),
        (["model.config={}"], "give either model.name"),
        (["model.config={}"], "model.name=null or model.config=null removes the one that a"),
        (["data.resize=fit"], "data.resize is 'fit'; it must be one of crop, squash, pad"),
        (["data.sampling=best"], "data.sampling is 'best'; expected 'uniform', 'authors', 'fps:R'"),
        (["seed"], "override 'seed' is not of the form key=value"),
        (["data.train=null"], "data.train is required: give it as data.train=VALUE"),
        (
            ["data.sources=[{shards: a.tar}]"],
            "command line: give either data.train or data.sources",
        ),
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
