"""Mixed sources in one run: what the loss of each reaches, on one rank and on two."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipvip.losses import VARIANTS
from clipvip.training.__main__ import main
from clipvip.training.build import build_model, load_clips, training_loader
from clipvip.training.config import ConfigError
from clipvip.training.sources import describe_sources, image_share
from clipvip.training.step import to_device
from clipvip.training.task import task_of
from clipvip.training.trainer import train

# Texts of sources have letters of their own, so that gradients of token embeddings tell them apart.
WORDS = {"a": "abab", "b": "cdcd", "c": "efef"}
OTHER = "dcdc"  # a second text in b


@pytest.fixture(scope="session")
def sources(world, tmp_path_factory):
    """Files of 12 clips each: a, video and subtitle; b, video and text; b2, video and caption; c,
    image and caption; all, a clip of each row of the table."""
    folder = tmp_path_factory.mktemp("mixed")
    videos = sorted(map(str, world.glob("*.mp4")))[:12]
    rows = {name: [] for name in ("a", "b", "b2", "c")}
    for i, video in enumerate(videos):
        picture = np.random.default_rng(i).integers(256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.jpg")
        rows["a"].append({"video": video, "subtitle": WORDS["a"]})
        rows["b"].append({"video": video, "text": [WORDS["b"], OTHER]})
        rows["b2"].append({"video": video, "caption": WORDS["b"]})
        rows["c"].append({"video": f"{i}.jpg", "caption": WORDS["c"]})
    rows["all"] = [rows[name][i] for i, name in enumerate(("a", "b", "b2", "c") * 3)]
    rows["all"] += [
        {"video": videos[0], "subtitle": "s", "caption": "c"},
        {"video": videos[1], "text": "t", "caption": "c"},
        {"video": "1.jpg", "text": "t"},
        {"video": "2.jpg", "subtitle": "s", "caption": "c"},
    ]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def losses(out):
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def mixing(folder, *names):
    """The overrides that mix sources; a name may have a ratio, such as "a: 2"."""
    given = []
    for name in names:
        path, _, ratio = name.partition(": ")
        given.append(f"{{clips: '{folder}/{path}.jsonl', ratio: {ratio or 1}}}")
    return "data.train=null", f"data.sources=[{', '.join(given)}]"


def gradients_of(make_config, path, *overrides):
    """Gradients of one batch: of the model's parameters, of the pixels of videos and of images, and
    of the features; besides, the batch and the features."""
    config = make_config("task=omnisource", f"data.train={path}", "batch_size=12", *overrides)
    torch.manual_seed(0)
    model, processor = build_model(config, None)
    task = task_of(config)
    towers = task.towers(model, processor)
    batch = next(iter(training_loader(config, load_clips(config)[0], processor)))
    seen = []
    whole = model.get_video_features

    def watched(pixels, offsets):
        seen.append(pixels.requires_grad_())
        return whole(pixels, offsets)

    model.get_video_features = watched
    features = towers(to_device(batch, model, towers.task))
    for feature in features.values():
        feature.retain_grad()
    task.loss(features, batch).backward()
    (pixels,) = seen
    frames = len(batch["pixel_values"])
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {"frames": pixels.grad[:frames], "images": pixels.grad[frames:]}
    return found, batch, features


def reached(gradient):
    """Which rows have a gradient that is not exactly zero."""
    return gradient.flatten(1).any(1)


FORKS = Path(__file__).with_name("forks.py")
EMBEDDINGS = "vision_model.embeddings."


@pytest.mark.parametrize("name", ["a", "b", "b2", "c"])
@pytest.mark.parametrize("variant", ["vsc_fc", "vs_vc_fc"])
def test_a_source_alone_reaches_what_it_has_and_nothing_else(
    name, variant, make_config, sources, world
):
    from transformers import CLIPTokenizer

    found, batch, features = gradients_of(
        make_config, sources / f"{name}.jsonl", f"variant={variant}"
    )
    everything = torch.ones(12).bool()
    # The proxies, through which each frame and image passes, and the patches of what is compared.
    assert reached(found[f"{EMBEDDINGS}added_cls"]).all()
    assert found[f"{EMBEDDINGS}patch_embedding.weight"].any()
    assert reached(found["frames"]).all() and len(found["frames"]) == (0 if name == "c" else 24)
    assert reached(found["images"]).equal(everything if name in ("b2", "c") else ~everything)

    # An image reads the temporal embedding in its middle; the first and last of two frames of a
    # video read it elsewhere.
    rows = set(reached(found[f"{EMBEDDINGS}temporal_embedding"][0]).nonzero().flatten().tolist())
    middle, ends = {5, 6}, {2, 3, 8, 9}
    assert rows == {"a": ends, "b": ends, "b2": ends | middle, "c": middle}[name]

    # The text tower, through the tokens of the source's texts and of no other one.
    tokens = reached(found["text_model.embeddings.token_embedding.weight"]).nonzero().flatten()
    tokenizer = CLIPTokenizer.from_pretrained(world / "tokenizer")
    texts = [WORDS[name[0]]] + [OTHER] * (name == "b")
    assert set(tokens.tolist()) == {token for text in texts for token in tokenizer(text).input_ids}

    has = {"video": name != "c", "frame": name in ("b2", "c")}
    has |= {"subtitle": name in ("a", "b"), "caption": name in ("b2", "c")}
    for kind, there in has.items():
        assert reached(features[kind].grad).equal(everything if there else ~everything), kind
    assert features["video"].any() == has["video"]
    assert batch["video_present"].equal(everything if has["video"] else ~everything)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_batch_reaches_exactly_the_parts_that_each_clip_has(variant, make_config, sources):
    given = ("data.text_length=8", f"variant={variant}", "batch_size=16")
    path = sources / "all.jsonl"
    _, batch, features = gradients_of(make_config, path, *given)
    clips = [json.loads(line) for line in path.read_text().splitlines()]
    clips = [clips[place] for place in batch["clip_index"].tolist()]
    compared = [name for name in ("subtitle", "frame", "caption") if name[0] in variant]
    for row, clip in enumerate(clips):
        image = clip["video"].endswith(".jpg")
        subtitle, caption = clip.get("subtitle"), clip.get("caption")
        if image and "caption" in compared:
            caption = caption or clip.get("text")
        else:
            subtitle = subtitle or clip.get("text")
        has = {
            "video": not (image and "frame" in compared and clip.get("subtitle") is None),
            "frame": True,
            "subtitle": subtitle is not None,
            "caption": caption is not None,
        }
        for kind in ("video", *compared):
            assert features[kind].grad[row].any() == has[kind], (clip, kind)


def test_a_loss_of_several_sources_is_that_of_their_parts(make_config, sources):
    """Images give nothing to the terms of videos, and videos without captions nothing to F-C but
    negatives."""
    from clipvip.losses import omnisource_loss

    given = ("data.text_length=8", "batch_size=16", "variant=vs_vc_fc")
    _, batch, features = gradients_of(make_config, sources / "all.jsonl", *given)
    parts = {name: feature.detach() for name, feature in features.items()}
    video, subtitle, caption = (
        batch[f"{name}_present"] for name in ("video", "subtitle", "caption")
    )

    def term(a, b, rows, columns):
        logits = parts["scale"] * parts[a] @ parts[b].T
        both = rows & columns
        own = logits.diagonal()[both]
        row = logits[both][:, columns].logsumexp(1) - own
        column = logits[rows][:, both].logsumexp(0) - own
        return row.mean() + column.mean()

    expected = term("video", "subtitle", video, subtitle) + term("video", "caption", video, caption)
    expected += term("frame", "caption", torch.ones(16).bool(), caption)
    found = omnisource_loss(
        *(parts[name] for name in ("video", "subtitle", "frame", "caption", "scale")),
        "vs_vc_fc",
        video_present=video,
        subtitle_present=subtitle,
        caption_present=caption,
    )
    torch.testing.assert_close(found, expected)
    assert 0 < video.sum() < 16 and 0 < caption.sum() < 16


@pytest.mark.parametrize(
    "variant, parallel", [("vsc_fc", "ddp"), ("vs_fc", "ddp"), ("vsc_fc", "fsdp")]
)
def test_two_ranks_are_one_though_a_rank_has_only_images_or_none(
    variant, parallel, make_config, sources, tmp_path
):
    given = ["task=omnisource", f"variant={variant}", *mixing(sources, "a", "b", "c: 2")]
    given += ["batch_size=4", "max_steps=9", "save_every=9"]
    config = make_config(*given, f"out={tmp_path / 'one'}")
    kinds = set()
    clips = load_clips(config)[0]
    for batch in training_loader(config, clips, build_model(config, None)[1]):
        images = [clips.number(place) == 2 for place in batch["clip_index"].tolist()]
        kinds |= {(sum(images[:2]), sum(images[2:]))}
    assert any(2 in kind and kind != (2, 2) for kind in kinds)  # one rank has only images
    train(config)
    overrides = [*given, f"parallel={parallel}", f"out={tmp_path / 'two'}"]
    command = [sys.executable, str(FORKS), "two", str(make_config.path), *overrides]
    subprocess.run(command, check=True, timeout=120)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert all(np.isfinite([*losses(tmp_path / "one").values()]))


def test_a_run_of_images_alone_trains_them_against_their_captions(make_config, tmp_path):
    rows = []
    for i in range(16):
        colour = np.full((32, 32, 3), (16 * i, 255 - 16 * i, 128), np.uint8)
        Image.fromarray(colour).save(tmp_path / f"{i}.jpg")
        rows.append({"video": f"{i}.jpg", "text": f"colour {chr(97 + i) * 3}"})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config("task=omnisource", f"data.train={tmp_path / 'c.jsonl'}", "max_steps=60")
    train(config)
    curve = list(losses(config.out).values())
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


@pytest.mark.parametrize("parts", [[], ["micro_batch=2", "accumulation=2"]], ids=["whole", "parts"])
def test_a_run_on_mixed_files_resumes_exactly(
    parts, make_config, sources, tmp_path, monkeypatch, capsys
):
    from clipvip.training.task import Omnisource

    given = ["task=omnisource", *mixing(sources, "a: 3", "b", "c: 2"), "max_steps=11", *parts]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(make_config(*given, f"out={unbroken}"))
    said = capsys.readouterr().out.splitlines()[0]
    assert f"36 clips · 50.0% {sources}/a.jsonl (12 clips, each 1.5 times per epoch), 16.7%" in said
    loss, calls = Omnisource.loss, []

    def failing(*given):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(Omnisource, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(*given, f"out={broken}", "save_every=2"))
    train(make_config(*given, f"out={broken}", "resume=latest", "data.num_workers=2"))
    assert losses(broken) == losses(unbroken)
    assert "resuming with another" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["clips", "shards"])
@pytest.mark.parametrize("task", ["retrieval", "omnisource"])
def test_texts_are_used_as_their_source_says(kind, task, make_config, sources, tmp_path, world):
    from transformers import CLIPTokenizer

    from clipvip.data.shards import write_shards

    where = {name: f"{sources}/b.jsonl" for name in ("sentence", "paragraph")}
    if kind == "shards":
        for name in where:
            where[name] = str(tmp_path / name)
            write_shards(sources / "b.jsonl", tmp_path / name, num_workers=0)
    given = [f"{{{kind}: '{path}', texts: {name}}}" for name, path in where.items()]
    given += [f"{{{kind}: '{where['sentence']}'}}"]
    config = make_config(
        *(f"task={task}", "data.train=null", f"data.sources=[{', '.join(given)}]"),
        *("data.paragraph=true", "batch_size=36"),
    )
    clips = load_clips(config)[0]
    (batch,) = training_loader(config, clips, build_model(config, None)[1])
    tokenizer = CLIPTokenizer.from_pretrained(world / "tokenizer")
    name = "text" if task == "retrieval" else "subtitle"
    found = {"sentence": set(), "paragraph": set()}
    for place, ids in zip(batch["clip_index"].tolist(), batch[f"{name}_ids"], strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
        found["sentence" if place < 12 else "paragraph"].add(text)
    assert found["sentence"] == {WORDS["b"], OTHER}
    assert found["paragraph"] == {WORDS["b"] + OTHER}
    lines = describe_sources(clips)
    assert lines[0].endswith(", sentences)") and lines[1].endswith(", paragraphs)")
    assert lines[2].endswith(" per epoch)")


def test_a_dry_run_says_the_sources_and_counts_images_as_such(make_config, sources, capsys):
    given = ["task=omnisource", *mixing(sources, "a: 3", "b: 1", "c: 4")]
    config = make_config(*given)
    assert image_share(load_clips(config)[0]) == pytest.approx(0.5)
    main([str(make_config.path), *given, "--dry-run"])
    said = capsys.readouterr().out
    assert (
        f"sources              37.5% {sources}/a.jsonl (12 clips, each 1.12 times per epoch)"
        in said
    )
    assert f"\n                     50.0% {sources}/c.jsonl (12 clips, each 1.5 times per" in said
    assert "10 of video (0 in images, 50.0% of the clips), 6 of image" in said
    assert said.rstrip().endswith("the run can start")


def test_operations_of_images_are_counted_as_such(make_config, sources):
    from clipvip.training.plan import plan

    for task, as_video in (("omnisource", 0), ("retrieval", 6)):
        config = make_config(f"task={task}")
        model, _ = build_model(config, None)
        costs = [plan(model, config, 1, images=share) for share in (0.0, 0.5, 1.0)]
        flops = [cost.tower_flops for cost in costs]
        assert flops[0] > flops[1] > flops[2] > 0
        assert flops[1] == pytest.approx((flops[0] + flops[2]) / 2)
        assert costs[0].tokens_as_video == as_video


@pytest.mark.parametrize(
    "given, message",
    [
        ("{}", "sources: one has neither shards nor clips; give shards (tars"),
        ("{clips: a.jsonl, shards: b}", "sources: one has both shards and clips"),
        ("{clips: FOLDER}", "which is shards; expected a file of annotations: give it as shards:"),
        ("{clips: a.jsonl, texts: words}", "texts is 'words'; it must be one of sentence, para"),
        ("{clips: a.jsonl, ratio: .inf}", "ratio is inf; it must be above 0"),
        (
            "{clips: a.jsonl}, {shards: b}",
            "expected one kind: `clipvip shard a.jsonl FOLDER` makes",
        ),
    ],
)
def test_errors_of_sources_are_one_line_and_say_what_to_change(
    given, message, make_config, tmp_path
):
    given = given.replace("FOLDER", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        make_config("data.train=null", f"data.sources=[{given}]")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_without_texts_for_the_task_is_named(make_config, sources, caplog):
    with pytest.raises(ConfigError, match=r"a\.jsonl: 12 of 12 clips have no text for task=retr"):
        load_clips(make_config(*mixing(sources, "b", "a")))
    load_clips(make_config("task=omnisource", "variant=vs", *mixing(sources, "a", "b", "c")))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == (
        f"variant=vs: no clip of {sources}/c.jsonl has a subtitle or text; they are only negatives"
    )


def test_real_videos_and_images_mix(make_config, sources, real_clips, tmp_path):
    rows = [{"video": str(path), "text": name} for name, path in real_clips.items()]
    path = Path(tmp_path / "real.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = f"data.sources=[{{clips: {path}, ratio: 1}}, {{clips: '{sources}/c.jsonl', ratio: 1}}]"
    config = make_config("task=omnisource", "data.train=null", given, "batch_size=4", "max_steps=4")
    assert np.isfinite(train(config)["loss"])
