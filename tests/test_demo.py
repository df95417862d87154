"""The demo's data, tokenizer and initial models, on which its figures depend."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from demo.render import MOTIONS, SPLITS, Scene, draw, render, scenes


def test_held_out_sentences_are_distinct_and_no_clip_is_in_two_splits():
    splits = scenes(seed=1)
    sentences = [scene.text for scene in splits["heldout"]]
    assert len(sentences) == len(set(sentences)) >= 128
    assert set(sentences) == {scene.text for scene in splits["train"]}
    seeds = [scene.seed for split in SPLITS for scene in splits[split]]
    assert len(seeds) == len(set(seeds))


@pytest.mark.parametrize("motion", ["left", "up", "up and to the left", "down and to the left"])
def test_the_reverse_of_a_motion_shows_the_same_frames_backwards(motion):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    reverse = " ".join(opposite.get(word, word) for word in motion.split())
    assert reverse in MOTIONS
    forwards, _ = draw(Scene("red", "cross", motion, 0), np.random.default_rng(5))
    backwards, _ = draw(Scene("red", "cross", reverse, 0), np.random.default_rng(5))
    np.testing.assert_allclose(forwards[::-1].astype(int), backwards.astype(int), atol=1)


def test_a_clip_decodes_to_what_was_drawn_and_its_caption_leaves_out_the_motion(tmp_path):
    from clipvip.data.video import read_frames

    scene = Scene("blue", "triangle", "left", 3)
    (tmp_path / "train").mkdir()
    record = render(scene, tmp_path / "train" / "0000.mp4")
    assert record["text"] == "a blue triangle moves left"
    assert record["caption"].startswith("a blue triangle in the ")
    drawn, _ = draw(scene, np.random.default_rng(scene.seed))
    read = read_frames(tmp_path / record["video"], len(drawn), size=drawn.shape[1])
    error = np.abs(read.permute(0, 2, 3, 1).numpy().astype(int) - drawn)
    assert error.mean() < 4

    centres = [np.argwhere(frame[..., 2] > 150)[:, 1].mean() for frame in drawn]
    assert centres[-1] < centres[0] - 0.3 * drawn.shape[2]


def test_the_tokenizer_and_the_untrained_models_fit_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    import torch

    from demo import run

    file = tmp_path / "train.jsonl"
    file.write_text('{"video": "a.mp4", "text": "a red circle moves left", "subtitle": "uh"}\n')
    tokenizer = run.train_tokenizer(file)
    ids = tokenizer("a red circle moves left")["input_ids"]
    assert len(ids) == 7  # one token per word, and the two special tokens
    assert tokenizer.decode(ids[1:-1]).strip() == "a red circle moves left"
    assert len(tokenizer("an unseen word: zebra!")["input_ids"]) > 7  # spelled out, never unknown

    video = torch.rand(1, run.FRAMES, 3, run.IMAGE, run.IMAGE)
    for name, options in run.MODELS.items():
        model = run.untrained(tokenizer, {**options, "attention_backend": "reference"})
        with torch.no_grad():
            both = [model.get_video_features(x) for x in (video, video.flip(1))]
        # The baseline gives a clip the same feature when it is reversed; CLIP-ViP does not.
        assert torch.allclose(*both, atol=1e-4) == (name == "mean_pool")


def test_the_last_search_finds_its_clip_first_and_is_the_readmes_where_that_does(capsys):
    pytest.importorskip("matplotlib")
    from demo import run

    others = {"a blue cross moves up": 0.2, "a green cross moves up": 0.3}
    assert run.to_search({run.QUERY: 0.1, **others}) == run.QUERY
    assert capsys.readouterr().out == ""
    for margin in (-0.1, 0.0, 1e-7):  # another clip is first, or this one only by rounding
        assert run.to_search({run.QUERY: margin, **others}) == "a green cross moves up"
        said = capsys.readouterr().out
        assert f"“{run.QUERY}”" in said and "2 of 3 sentences do" in said
    with pytest.raises(SystemExit, match="none of 2 held-out sentences finds its clip first"):
        run.to_search({run.QUERY: -0.1, "a blue cross moves up": -0.2})


def test_the_readmes_search_is_the_demos_of_a_held_out_clip():
    pytest.importorskip("matplotlib")
    from demo import run

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f'clipvip search "{run.QUERY}"' in readme
    assert run.QUERY in {scene.text for scene in scenes(run.SEED)["heldout"]}


def test_a_margin_is_the_distance_to_the_best_other_clip(tmp_path):
    pytest.importorskip("matplotlib")
    from clipvip.data.annotations import Clip
    from clipvip.index import Hit
    from demo import run

    scores = {"one": {"1.mp4": 0.7, "2.mp4": 0.4}, "two": {"2.mp4": 0.1, "1.mp4": 0.6}}

    def search(query, k):
        return [Hit(score, tmp_path / name, None, None) for name, score in scores[query].items()]

    index = SimpleNamespace(search=search, clips=["1.mp4", "2.mp4"])
    clips = [Clip(tmp_path / "1.mp4", text=("one",)), Clip(tmp_path / "2.mp4", text=("two",))]
    assert run.margins(clips, index) == pytest.approx({"one": 0.3, "two": -0.5})
