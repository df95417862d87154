"""The demo's data, tokenizer and initial models, on which its figures depend."""

from pathlib import Path

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


def test_the_last_searches_find_theirs_first_and_are_the_readmes_where_that_does(capsys):
    pytest.importorskip("matplotlib")
    from demo import run

    others = {"a blue cross moves up": 0.2, "a green cross moves up": 0.3}
    assert run.to_search({run.QUERY: 0.1, **others}, "films") == run.QUERY
    assert capsys.readouterr().out == ""
    for margin in (-0.1, 0.0, 1e-7):  # another one is first, or this one only by rounding
        assert run.to_search({run.QUERY: margin, **others}, "films") == "a green cross moves up"
        said = capsys.readouterr().out
        assert f"“{run.QUERY}”" in said and "films" in said and "2 of 3 sentences are" in said
    with pytest.raises(SystemExit, match="films: none of 2 held-out sentences is found first"):
        run.to_search({run.QUERY: -0.1, "a blue cross moves up": -0.2}, "films")


def test_the_readmes_search_is_the_demos_of_a_held_out_clip():
    pytest.importorskip("matplotlib")
    from demo import run

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f'clipvip search "{run.QUERY}"' in readme
    assert run.QUERY in {scene.text for scene in scenes(run.SEED)["heldout"]}


def hit(score, path, start=None, end=None):
    from clipvip.index import FileState, Hit, Moment

    file = FileState(str(path), 1, 1, "", "", 60.0, 0.0)
    return Hit(score, Moment("0" * 16, file, start, end), start, end)


def test_every_shot_of_a_film_holds_a_window_without_a_cut_that_counts_as_found():
    pytest.importorskip("matplotlib")
    from demo import found, render, run

    window, stride = run.WINDOWS["films"]
    shortest, longest = (frames / render.RATE for frames in render.SHOT_FRAMES)
    assert window + stride <= shortest
    assert window / longest >= found.OVERLAP


def test_a_margin_is_the_distance_of_the_own_hit_to_the_best_other_one(tmp_path):
    from clipvip.data.annotations import Clip
    from demo import found

    one = Clip(tmp_path / "1.mp4", text=("one",))
    hits = [hit(0.7, tmp_path / "1.mp4"), hit(0.4, tmp_path / "2.mp4")]
    assert found.margin(hits, one) == pytest.approx(0.3)
    assert found.margin(hits, Clip(tmp_path / "2.mp4")) == pytest.approx(-0.3)

    shot = Clip(tmp_path / "1.mp4", 10.0, 14.0)
    film = [hit(0.6, tmp_path / "1.mp4", 11, 14), hit(0.5, tmp_path / "1.mp4", 20, 23)]
    assert found.margin(film, shot) == pytest.approx(0.1)
    assert found.margin(film[1:], shot) < 0  # not found at all


def test_a_moment_is_found_if_it_shares_half_of_what_both_cover(tmp_path):
    from clipvip.data.annotations import Clip
    from demo import found

    film = tmp_path / "film.mp4"
    shot = Clip(film, 10.0, 14.0)
    for start, end, shared in ((10, 14, 1), (11, 14, 3 / 4), (12, 16, 1 / 3), (14, 18, 0)):
        assert found.overlap(hit(0.5, film, start, end), shot) == pytest.approx(shared)
    assert found.overlap(hit(0.5, tmp_path / "other.mp4", 10, 14), shot) == 0


def test_a_film_shows_each_held_out_scene_once_from_cut_to_cut(tmp_path, monkeypatch):
    from clipvip.data.annotations import load_annotations
    from clipvip.data.video import read_frames
    from demo import render

    few = {"heldout": render.scenes(seed=1)["heldout"][:9]}
    monkeypatch.setattr(render, "scenes", lambda seed: few)
    shots = load_annotations(render.render_films(tmp_path, seed=1))
    assert sorted(shot.text[0] for shot in shots) == sorted(s.text for s in few["heldout"])
    by_text = {scene.text: scene for scene in few["heldout"]}
    for shot in shots:
        count = round((shot.end - shot.start) * render.RATE)
        scene = by_text[shot.text[0]]
        drawn, _ = draw(scene, np.random.default_rng(scene.seed), count)
        read = read_frames(shot.video, count, size=drawn.shape[1], start=shot.start, end=shot.end)
        assert np.abs(read.permute(0, 2, 3, 1).numpy().astype(int) - drawn).mean() < 4


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "captions"])
def test_every_stage_is_a_configuration_that_can_run(stage):
    pytest.importorskip("matplotlib")
    from clipvip.training.config import load_config
    from demo import run

    assert stage in run.STAGES
    given = ["out=run", "model.name=start", "data.train=a.jsonl", "data.validation=b.jsonl"]
    config = load_config(run.HERE / f"{stage}.yaml", given)
    assert (config.task == "captioning") == (stage == "captions")
    if config.task == "captioning":  # one model searches and captions, so only the decoder learns
        assert config.model.freeze == ["vision_model.*"]
