"""Properties of classifying videos by labels."""

import csv
import os
import sys

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from clipvip import classify as module
from clipvip import cli
from clipvip.classify import TEMPLATES, classify, classify_to_csv, read_labels
from clipvip.embedding import load_for_embedding
from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

LABELS = ["dog", "a red ball", "someone plays the guitar", "rain"]
ODD = os.fsdecode(b"caf\xe9 \x1b[31mred\n.mp4")
HERE = {"num_workers": 0, "device": "cpu", "mixed_precision": "no"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tower = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    tower |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **ends, "vocab_size": len(tokens), "max_position_embeddings": 60}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPViPConfig(
        text_config=text, vision_config=vision, projection_dim=16, num_frames=2, num_proxies=1
    )
    folder = tmp_path_factory.mktemp("model")
    CLIPViPModel(config).save_pretrained(folder)
    CLIPViPProcessor(tokenizer, image_size=32, num_frames=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, colour in {"a.mp4": (220, 30, 30), ODD: (30, 200, 30)}.items():
        with av.open(str(folder / name), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for level in range(4):
                pixels = np.full((32, 32, 3), colour, np.uint8) // (level + 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*words) → (exit status, standard output, standard error) of `clipvip classify`."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipvip", "classify", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return run


def by_label(clip):
    return {guess.label: (guess.score, guess.probability) for guess in clip.guesses}


def test_scores_are_cosines_with_the_mean_of_a_labels_sentences(model, videos):
    network, processor = load_for_embedding(model)
    (found,) = classify(model, videos / "a.mp4", LABELS, top=99, **HERE)
    with torch.no_grad():
        video = F.normalize(network.get_video_features(**processor(videos=[videos / "a.mp4"])))
        vectors = []
        for label in LABELS:
            inputs = processor(text=[template.replace("{}", label) for template in TEMPLATES])
            vectors.append(F.normalize(network.get_text_features(**inputs)).mean(0))
        scores = (F.normalize(torch.stack(vectors)) @ video.T)[:, 0]
        chances = (network.logit_scale.exp() * scores).softmax(0)
    for label, score, chance in zip(LABELS, scores.tolist(), chances.tolist(), strict=True):
        assert by_label(found)[label] == pytest.approx((score, chance), abs=1e-5)
    ranked = [guess.score for guess in found.guesses]
    assert ranked == sorted(ranked, reverse=True)


def test_the_order_of_labels_changes_no_score(model, videos):
    one, other = (
        classify(model, videos, labels, top=99, **HERE) for labels in (LABELS, LABELS[::-1])
    )
    assert len(one) == len(other) == 2
    for clip, same in zip(one, other, strict=True):
        assert clip[:3] == same[:3] and by_label(clip).keys() == by_label(same).keys()
        for label, figures in by_label(clip).items():
            assert by_label(same)[label] == pytest.approx(figures, abs=1e-12)


def test_probabilities_are_relative_to_the_labels(model, videos):
    for labels in (LABELS, LABELS[:1], "dog"):
        for clip in classify(model, videos, labels, top=99, **HERE):
            assert sum(guess.probability for guess in clip.guesses) == pytest.approx(1)
    assert [len(x.guesses) for x in classify(model, videos, LABELS, top=3, **HERE)] == [3, 3]


def test_a_labels_own_sentences_replace_the_templates(model, videos):
    own = {"dog": ["rain", "it rains"], "cat": []}
    first, second = (
        classify(model, videos / "a.mp4", labels, templates, top=99, **HERE)[0]
        for labels, templates in ((own, ["a {} {}"]), ({"x": ["it rains", "rain"]}, []))
    )
    assert by_label(first)["dog"][0] == pytest.approx(by_label(second)["x"][0], abs=1e-12)
    (cat,) = classify(model, videos / "a.mp4", "a cat cat", ["{}"], **HERE)
    assert by_label(first)["cat"][0] == pytest.approx(cat.guesses[0].score, abs=1e-5)


def test_bf16_is_that_of_the_model_alone(model, videos):
    """The product with the labels stays exact, or close labels would tie."""
    near = classify(model, videos, LABELS, top=99, **HERE | {"mixed_precision": "bf16"})
    exact = classify(model, videos, LABELS, top=99, **HERE)
    assert not torch.is_autocast_enabled("cpu")
    for clip, same in zip(near, exact, strict=True):
        for label, (score, _) in by_label(clip).items():
            assert score == pytest.approx(by_label(same)[label][0], abs=0.02)
            assert torch.tensor(score).bfloat16().item() != score


def test_labels_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "labels.txt"
    text = "# of a trip\r\n\r\n dog \r\nschlaf\t ein Mensch schläft \tBett\t\r\n{0}\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        labels = read_labels(path)
        assert labels == {"dog": [], "schlaf": ["ein Mensch schläft", "Bett"], "{0}": []}
        assert list(labels) == ["dog", "schlaf", "{0}"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"dog\n# pets\ncat\n dog\ta dog runs\n", "lines 1 and 4"),
        (b"dog\n\ta dog runs\n", "line 2: no label"),
        (b"# only this\n\n", "holds no label"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"a\0b\n", "NUL"),
        (b"\n" * (1 << 24) + b"a", "more than 16 MiB"),
    ],
)
def test_an_unusable_list_of_labels_is_refused(tmp_path, data, said):
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read_labels(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([], {}, "no labels"),
        (["dog", " dog "], {}, "twice"),
        (["dog", " "], {}, "label is empty"),
        (["dog"], {"templates": ["a dog"]}, "has no {}"),
        (["dog"], {"templates": []}, "give a template"),
        (["dog"], {"top": 0}, "top is 0"),
        (["half \ud83d"], {}, "not UTF-8"),
    ],
)
def test_unusable_labels_are_refused_before_work(videos, labels, options, said):
    with pytest.raises(ValueError, match=said):
        classify("no such model", videos, labels, **options)


def test_damaged_videos_are_left_out_and_listed(model, videos, tmp_path, run):
    (tmp_path / "\x1bnoise.mp4").write_bytes(b"noise")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    status, out, err = run(model, tmp_path, videos, "--labels", labels, "--csv", "-")
    assert status == 0 and len(out.splitlines()) == 1 + 2 * len(LABELS)
    assert "1 file could not be used:" in err and err.splitlines()[-1].startswith(
        f"  {tmp_path}/\\x1bnoise"
    )
    out = tmp_path / "out.csv"
    status, _, err = run(model, tmp_path, "--labels", labels, "--csv", out)
    assert status == 1 and "none of the clips" in err and not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_csv_is_whole_or_as_before(model, videos, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    assert classify_to_csv(model, videos, LABELS, out, top=2, **HERE) == 2
    written = out.read_bytes()
    rows = list(csv.reader(written.decode().splitlines()))
    assert rows[0] == list(module.COLUMNS) and len(rows) == 5
    found = classify(model, videos, LABELS, top=2, **HERE)
    flat = [(clip, rank) for clip in found for rank in range(2)]
    for row, (clip, rank) in zip(rows[1:], flat, strict=True):
        label, score, chance = clip.guesses[rank]
        assert row[1:5] == ["", "", str(rank + 1), label]
        assert [float(x) for x in row[5:]] == pytest.approx([score, chance], abs=1e-5)
    assert str(videos / "a.mp4") in rows[1] and "caf\\xe9 \\x1b[31mred\\n.mp4" in rows[3][0]

    best = module._Classifier._best

    def interrupted(self, *given):
        if self.done == 2:
            raise KeyboardInterrupt
        return best(self, *given)

    monkeypatch.setattr(module._Classifier, "_best", interrupted)
    for path in (out, tmp_path / "new.csv"):
        with pytest.raises(KeyboardInterrupt):
            classify_to_csv(model, videos, LABELS, path, **HERE)
    assert out.read_bytes() == written and list(tmp_path.iterdir()) == [out]


def test_clips_of_annotations_keep_their_spans(model, videos, tmp_path):
    lines = tmp_path / "clips.jsonl"
    lines.write_text(f'{{"video": "{videos}/a.mp4", "start": 0.25}}\n{{"video": "{videos}/a.mp4"}}')
    out = tmp_path / "out.csv"
    classify_to_csv(model, lines, LABELS, out, top=1, **HERE)
    spans = [row[1:3] for row in csv.reader(out.read_text().splitlines()[1:])]
    assert spans == [["0.25", ""], ["", ""]]


def test_the_command_prints_a_table(model, videos, tmp_path, run):
    labels, templates = tmp_path / "labels.txt", tmp_path / "templates.txt"
    labels.write_text("dog\nrain [b]\n")
    templates.write_text("# mine\nwe see {}\n")
    words = (model, videos, "--labels", labels)
    status, out, _ = run(*words, "--template", "{} here", "--templates", templates, "--top", 1)
    assert status == 0 and "\x1b" not in out and "these 2 labels" in out
    assert out.count("%") == 3 and ("dog" in out or "[b]" in out)
    status, _, err = run(*words, "--csv", videos / "a.mp4")
    assert status == 1 and "ends in .csv" in err and err.count("\n") == 1
