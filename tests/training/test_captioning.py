"""Training a captioner: what is trained, on how many ranks, and what a checkpoint is good for."""

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipvip.model import CLIPViPForCaptioning, CLIPViPModel, CLIPViPProcessor
from clipvip.model.processing import normalize_frames
from clipvip.training.__main__ import main
from clipvip.training.build import build_model, build_processor, load_clips, training_loader
from clipvip.training.config import ConfigError
from clipvip.training.evaluate import evaluate_checkpoint
from clipvip.training.optimization import parameter_groups
from clipvip.training.task import Captioning, task_of
from clipvip.training.trainer import train

GPT2 = "{model_type: gpt2, n_layer: 2, n_embd: 48, n_head: 2, n_positions: 40}"
STEADY = GPT2.replace("}", ", resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}")
BERT = (
    "{model_type: bert, num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, "
    "intermediate_size: 64, max_position_embeddings: 40}"
)
ALL = "model.decoder.tokens=all"
NOT_REACHED = (
    "text_model.", "text_projection.", "visual_projection.", "logit_scale",
    "vision_model.post_layernorm.",
)  # fmt: skip


@pytest.fixture
def captions(make_config):
    def make(*overrides, decoder=STEADY):
        given = ["task=captioning", "optimizer.decoder_lr=3e-3"]
        given += [f"model.decoder.config={decoder}"] * (decoder is not None)
        return make_config(*given, *overrides)

    make.path, make.plain = make_config.path, make_config
    return make


def losses(out):
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(out):
    return CLIPViPForCaptioning.from_pretrained(Path(out) / "last").state_dict()


def trained_once(config):
    """The towers, the batch and the gradients of the first step."""
    torch.manual_seed(0)
    model, processor = build_model(config, None)
    task = task_of(config)
    batch = next(iter(training_loader(config, load_clips(config)[0], processor)))
    towers = task.towers(model.eval(), processor)
    loss = task.loss(towers(batch), batch)
    loss.backward()
    return towers, batch, loss


@pytest.mark.parametrize(
    ("decoder", "overrides"),
    [
        (GPT2, []),
        (BERT, [ALL, "accumulation=2", "model.gradient_checkpointing=true"]),
        (GPT2, [ALL, "mixed_precision=bf16", "data.num_workers=1", "data.paragraph=true"]),
        (GPT2, ["model.config.vision_config.frame_pooling=mean", "micro_batch=3", "ema=0.9"]),
        (GPT2, ["model.lora={r: 2}", "batch_size=2", "accumulation=2"]),  # one clip at a time
    ],
    ids=["gpt2", "bert-all", "bf16", "mean", "lora"],
)
def test_loss_falls(captions, decoder, overrides):
    config = captions("max_steps=30", "save_every=30", *overrides, decoder=decoder)
    assert train(config)["step"] == 30
    curve = list(losses(config.out).values())
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    torch.manual_seed(config.seed)
    before, _ = build_model(config, None)
    after = weights(config.out)
    if config.model.lora is None:
        assert after.keys() == before.state_dict().keys()
    for name, weight in before.state_dict().items():
        if name.startswith(NOT_REACHED) and ".base_layer." not in name and ".lora_" not in name:
            assert torch.equal(after[name], weight), name


def test_gradients_reach_the_decoder_and_what_of_the_encoder_is_not_frozen(captions):
    lower = [
        "vision_model.embeddings.*",
        "vision_model.pre_layrnorm.*",
        "vision_model.*.layers.0.*",
    ]
    for frozen in ([], lower, ["vision_model.*"]):
        names = ",".join(f"'{name}'" for name in frozen)
        globs = f"model.freeze=[{names}]"
        towers, batch, _ = trained_once(captions(globs))
        for name, parameter in towers.model.named_parameters():
            globs = [*frozen, *(f"{start}*" for start in NOT_REACHED)]
            trained = not any(fnmatchcase(name, glob) for glob in globs)
            assert parameter.requires_grad == trained, name
            assert (parameter.grad is not None) == trained, name
            # A key's bias changes no attention.
            assert not trained or "k_proj.bias" in name or parameter.grad.abs().sum() > 0, name
        if frozen == ["vision_model.*"]:  # its forward builds no graph
            pixels = normalize_frames(batch["pixel_values"])
            hidden = towers.model.vision_model.tokens(pixels, batch["frame_offsets"], -1)
            assert not hidden.requires_grad


def test_the_loss_is_the_mean_over_all_tokens(captions):
    """Not of the means of clips: longer texts count more."""
    towers, batch, loss = trained_once(captions("label_smoothing=0"))
    model, total, count = towers.model, 0.0, 0
    pixels = normalize_frames(batch["pixel_values"], towers.mean, towers.std)
    lengths = batch["text_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    with torch.no_grad():
        for row, length in enumerate(lengths):
            first, last = batch["frame_offsets"][row : row + 2].tolist()
            text = batch["text_ids"][row : row + 1, :length]
            logits = model(text, pixels[None, first:last]).logits[0]
            picked = logits.log_softmax(-1)[torch.arange(length - 1), text[0, 1:]]
            total, count = total - picked.sum().item(), count + length - 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_in_parts_the_gradient_is_the_same(captions, tmp_path):
    """With dropout too: each part is embedded twice from the same random state."""
    found = {}
    for number, given in enumerate(([], ["micro_batch=3"], ["micro_batch=8"])):
        config = captions("max_steps=3", f"out={tmp_path / str(number)}", *given)
        train(config)
        found[number] = losses(config.out)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    config = captions("max_steps=12", f"out={tmp_path / 'dropout'}", "micro_batch=3", decoder=GPT2)
    train(config)
    curve = list(losses(config.out).values())
    assert curve[-1] < curve[0]


def test_the_decoder_has_its_own_rate(captions):
    config = captions("optimizer.lr=1e-5", "optimizer.decoder_lr=1e-3", "optimizer.layer_decay=0.5")
    model, _ = build_model(config, None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["share"] * config.optimizer.lr
        for group in parameter_groups(model, config.optimizer)
        for parameter in group["params"]
    }
    new = {name for name in rates if name.startswith(("decoder.", "bridge."))}
    assert new and all(rates[name] == pytest.approx(1e-3) for name in new)
    assert rates["vision_model.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(5e-6)
    assert max(rates[name] for name in rates if name not in new) <= 1e-5


def test_a_run_leaves_a_model_for_captioning_and_for_search(captions, world, capsys):
    annotations = world / "annotations.jsonl"
    config = captions(f"data.validation={annotations}", "eval_every=3", "max_steps=6")
    result = train(config)
    out = Path(config.out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["validation/captions/CIDEr"] for r in rows if "loss" not in r}
    assert list(scores) == [3, 6]
    assert scores[result["best_step"]] == result["best_metric"] == max(scores.values())
    assert "best_metric: captions/CIDEr" in (out / "config.yaml").read_text()

    settings = {"mixed_precision": "no", "num_workers": 0, "print_table": False}
    written = evaluate_checkpoint(out / "best", annotations, out=out / "c.json", **settings)
    assert written["task"] == "captioning"
    assert written["captions"]["CIDEr"] == pytest.approx(result["best_metric"])
    assert (written["clips"], written["texts"]) == (16, 32)
    assert [Path(row["video"]).name for row in written["generated"]] == [
        json.loads(line)["video"] for line in annotations.read_text().splitlines()
    ]
    assert written["generated"][0]["texts"] == ["red moves left", "the red moves left"]
    found = evaluate_checkpoint(out / "best", annotations, task="retrieval", **settings)
    assert found["text_to_video"]["R@10"] >= 0 and found["task"] == "retrieval"
    CLIPViPModel.from_pretrained(out / "last").save_pretrained(out / "search")
    CLIPViPProcessor.from_pretrained(out / "last").save_pretrained(out / "search")
    assert evaluate_checkpoint(out / "search", annotations, **settings)["task"] == "retrieval"
    with pytest.raises(ValueError, match=r"search has no decoder.*clipvip train msrvtt_captions"):
        evaluate_checkpoint(out / "search", annotations, task="captioning", **settings)
    card = (out / "last" / "README.md").read_text()
    assert "clipvip describe" in card and "| CIDEr |" in card and "gpt2, 2 layers of 48" in card

    # And to be trained further, for either task.
    more = [f"model.name={out / 'best'}", "model.config=null", "max_steps=1"]
    for number, further in enumerate(
        (["task=captioning", "optimizer.decoder_lr=1e-3"], ["task=retrieval"])
    ):
        given = ["task=captioning", *more, *further, f"out={out / str(number)}"]
        again = train(captions.plain(*given))
        assert again["step"] == 1


def test_resumed_it_is_the_unbroken_run(captions, tmp_path, monkeypatch):
    """Bit for bit, with dropout, an average, weights that are tied, and LoRA."""
    for name, more in (("ema", ["ema=0.8"]), ("lora", ["model.lora={r: 2, dropout: 0.1}"])):
        overrides = ["max_steps=8", "save_every=2", "accumulation=2", *more]
        unbroken, broken = tmp_path / name, tmp_path / f"{name}-broken"
        train(captions(*overrides, f"out={unbroken}", decoder=GPT2))
        calls, loss = [], Captioning.loss

        def failing(*given, calls=calls, loss=loss):
            calls.append(1)
            if len(calls) == 11:
                raise KeyboardInterrupt
            return loss(*given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Captioning, "loss", failing)
            train(captions(*overrides, f"out={broken}", decoder=GPT2))
        train(captions(*overrides, f"out={broken}", "resume=latest", decoder=GPT2))
        assert losses(broken) == losses(unbroken)
        ended, whole = weights(broken), weights(unbroken)
        assert all(torch.equal(ended[key], whole[key]) for key in whole)
        stored = load_file(broken / "last" / "model.safetensors")
        assert len([key for key in stored if stored[key].shape == (514, 48)]) == 1
        tied = "decoder.lm_head.weight", "decoder.transformer.wte.weight"
        assert torch.equal(ended[tied[0]], ended[tied[1]])


def forks(*arguments):
    command = [sys.executable, str(Path(__file__).with_name("forks.py")), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_two_processes_train_as_one(captions, tmp_path, world):
    overrides = [
        "task=captioning", f"model.decoder.config={STEADY}", "accumulation=2", "max_steps=4",
        "optimizer.lr=1e-4", "optimizer.decoder_lr=1e-3", ALL, "eval_every=4", "ema=0.5",
        "data.text_length=12", f"data.validation={world / 'annotations.jsonl'}",
    ]  # fmt: skip
    runs = {
        "ddp": [],
        "parts": ["micro_batch=1"],
        "fsdp": ["parallel=fsdp"],
        "frozen": ["model.freeze=['vision_model.*']"],
    }
    jobs = []
    for name, more in runs.items():
        jobs += ["two", captions.path, *overrides, *more, f"out={tmp_path / name}", "+"]
    forks(*jobs[:-1])
    for name, more in runs.items():
        one = tmp_path / f"{name}-one"
        alone = [x for x in more if "parallel" not in x]
        train(captions.plain(*overrides, *alone, f"out={one}"))
        two = losses(tmp_path / name)
        assert two == pytest.approx(losses(one), rel=1e-4) and len(two) == 4
        names = [x for x in weights(one) if x.startswith("decoder.transformer.h.1.mlp")]
        for key in names:
            torch.testing.assert_close(
                weights(tmp_path / name)[key], weights(one)[key], rtol=1e-3, atol=2e-4
            )


def test_every_clip_is_captioned_once_on_any_number_of_ranks(captions, tmp_path, world):
    out = Path(captions().out)
    train(captions("max_steps=20", "save_every=20", "data.text_length=12"))
    lines = (world / "annotations.jsonl").read_text().splitlines()[:13]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["video"] = str(world / row["video"])
    rows.insert(7, {"video": "absent.mp4", "text": "nothing to be seen"})
    del rows[9]["text"]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"num_workers": 0, "max_bad_share": 0.1, "batch_size": 3, "print_table": False}
    one = evaluate_checkpoint(out / "last", path, backend="reference", **settings)
    assert one["clips"] == 12 and one["missing"] == [str(tmp_path / "absent.mp4")]
    jobs = [["eval", count, out / "last", path, tmp_path / f"{count}.json"] for count in (2, 3)]
    forks(*jobs[0], "+", *jobs[1])
    for count in (2, 3):
        assert json.loads((tmp_path / f"{count}.json").read_text()) == one


def test_shards_train_it_too(captions, tmp_path, world):
    from clipvip.data.shards import write_shards

    write_shards(world / "annotations.jsonl", tmp_path / "tars", clips_per_shard=5, num_workers=0)
    assert train(captions(f"data.train={tmp_path / 'tars'}", "max_steps=2"))["step"] == 2


def test_a_language_model_by_name(captions, gpt2_folder, capsys):
    """Its tokenizer reads the texts, and lies beside the model."""
    folder = gpt2_folder
    config = captions(f"model.decoder.name={folder}", "max_steps=2", decoder=None)
    train(config)
    processor = CLIPViPProcessor.from_pretrained(Path(config.out) / "last")
    start, *_, end = processor.caption_tokenizer("a dog")["input_ids"]
    assert start == end == 256
    train(captions(f"model.decoder.name={folder}", "max_steps=3", "resume=latest", decoder=None))
    assert len(losses(config.out)) == 3
    capsys.readouterr()
    main([str(captions.path), *override(config, folder), "--dry-run"])
    assert capsys.readouterr().out.rstrip().endswith("the run can start")


def override(config, folder):
    return ["task=captioning", f"model.decoder.name={folder}", f"out={config.out}-dry"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "task=captioning needs a decoder: give model.decoder.name, such as gpt2"),
        (["model.decoder.tokens=some"], "task=captioning needs a decoder"),
        (["model.decoder={config: {}, tokens: some}"], "model.decoder.tokens is 'some'; it must"),
        (
            ["model.decoder={config: {n_embd: 8}, name: gpt2}"],
            "command line: give either model.decoder.nam",
        ),
        (["model.decoder.nam=gpt2"], "unknown key model.decoder.nam; did you mean model.decoder.n"),
        (["model.decoder.config={}"], "the decoder's model_type is None; expected one with cross-"),
        (["model.decoder.config={model_type: opt}"], "the decoder's model_type is 'opt'; expected"),
        (
            ["model.decoder.config={model_type: gpt2, n_layers: 2}"],
            "model.decoder.config: unknown key n_layers; did you mean n_layer?",
        ),
        (["model.decoder.config={model_type: gpt2, n_head: 7}"], "model.decoder: "),
        (["model.decoder.name=/absent/lm"], "model.decoder.name is '/absent/lm', which does not"),
        (
            ["model.decoder.config={model_type: gpt2, n_positions: 20, n_embd: 32, n_head: 1}"],
            "data.text_length is 32; expected at most 20, which the new model or its decoder",
        ),
        (["label_smoothing=1", f"model.decoder.config={GPT2}"], "label_smoothing is 1.0; it must"),
        (
            ["best_metric=text_to_video/R@1", f"model.decoder.config={GPT2}"],
            "best_metric is 'text_to_video/R@1'; it must be one of captions/CIDEr, ",
        ),
        (["task=retrieval", f"model.decoder.config={GPT2}"], "model.decoder is of task=captioning"),
        (["task=retrieval", "optimizer.decoder_lr=1"], "optimizer.decoder_lr is of task=captioni"),
        (["task=retrieval", "best_metric=captions/CIDEr"], "best_metric is 'captions/CIDEr'; it"),
    ],
)
def test_settings_that_make_no_captioner_are_refused(captions, overrides, message):
    with pytest.raises(ConfigError) as caught:
        config = captions.plain("task=captioning", *overrides)
        build_model(config, None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_has_one_decoder(captions, tmp_path):
    train(captions("max_steps=1"))
    named = [f"model.name={tmp_path / 'run' / 'last'}", "model.config=null", "task=captioning"]
    with pytest.raises(ConfigError, match=r"which has a decoder; to train it further, give mo"):
        build_model(captions.plain(*named, f"model.decoder.config={GPT2}"), None)
    with pytest.raises(ConfigError, match=r"model\.decoder\.tokens is 'all', but the decoder of"):
        build_model(captions.plain(*named, "model.decoder.tokens=all"), None)
    CLIPViPModel.from_pretrained(tmp_path / "run" / "last").save_pretrained(tmp_path / "search")
    named[0] = f"model.name={tmp_path / 'search'}"
    with pytest.raises(ConfigError, match=r"which has no decoder; give model\.decoder\.name"):
        build_model(captions.plain(*named), None)


def test_texts_longer_than_the_text_tower_reads_change_no_tower(captions, tmp_path):
    """The decoder reads texts, so the text tower's positions are not stretched for them."""
    train(captions("max_steps=1"))
    named = [f"model.name={tmp_path / 'run' / 'last'}", "model.config=null", "task=captioning"]
    config = captions.plain(*named, "data.text_length=36")
    model, _ = build_model(captions.plain(*named), None)
    assert model.config.text_config.max_position_embeddings == 32
    with pytest.raises(ConfigError, match=r"data\.text_length is 36; expected at most 32"):
        build_processor(config, model.config)
