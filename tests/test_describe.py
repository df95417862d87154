"""Properties of `clipvip describe`."""

import json
import os
import sys

import av
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from clipvip import cli
from clipvip.captioning import caption_clips, has_decoder, load_for_captioning
from clipvip.describe import describe
from clipvip.model import CLIPViPConfig, CLIPViPForCaptioning, CLIPViPModel, CLIPViPProcessor

ODD = os.fsdecode(b"caf\xe9 \x1b[31mred\n.mp4")
HERE = {"num_workers": 0, "device": "cpu", "mixed_precision": "no", "length": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tower = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    tower |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = {name: getattr(tokenizer, name) for name in names} | {"vocab_size": len(tokens)}
    decoder = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 1, "n_positions": 30}
    config = CLIPViPConfig(
        text_config={**tower, **ends, "max_position_embeddings": 60},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        decoder_config=decoder | ends,
        projection_dim=16,
        num_frames=2,
    )
    torch.manual_seed(0)
    network = CLIPViPForCaptioning(config)
    with torch.no_grad():  # so that captions depend on videos
        for weight in (*network.decoder.parameters(), *network.vision_model.parameters()):
            weight.mul_(6)
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    CLIPViPProcessor(tokenizer, image_size=32, num_frames=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in {"a.mp4": 20, ODD: 4}.items():
        with av.open(str(folder / name), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for number in range(frames):
                pixels = np.full((64, 64, 3), (220, 30, 12 * number), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*words) → (exit status, standard output, standard error) of `clipvip describe`."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipvip", "describe", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return run


def test_captions_are_the_models_own(model, videos):
    described = list(describe(model, videos, batch_size=2, **HERE))
    assert [clip.video.name for clip, _ in described] == ["a.mp4", ODD]
    network, processor = load_for_captioning(model)
    for clip, caption in described:
        batch = processor(videos=[clip.video])
        tokens = network.generate(**batch, num_beams=5, max_new_tokens=6)
        assert processor.captions(tokens) == [caption] and caption
    assert list(describe(model, videos, batch_size=1, **HERE)) == described
    (again,) = caption_clips(
        *(network, processor, [clip for clip, _ in described], []),
        **{"length": 6, "batch_size": 8, "num_workers": 0, "decoder": "pyav"},
    )
    assert list(again.values()) == [caption for _, caption in described]


def test_moments_of_long_videos_are_described(model, videos, tmp_path):
    lines = tmp_path / "clips.jsonl"
    rows = [{"video": str(videos / "a.mp4")}, {"video": str(videos / "a.mp4"), "end": 0.5}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = list(describe(model, lines, window=1, **HERE))
    spans = [(clip.start, clip.end) for clip, _ in described]
    assert spans[0] == (0, 1) and spans[-1] == (None, 0.5)
    assert len(spans) >= 3
    for clip, caption in described:
        line = tmp_path / "one.jsonl"
        row = {"video": str(clip.video), "start": clip.start, "end": clip.end}
        line.write_text(json.dumps(row))
        ((same, alone),) = describe(model, line, **HERE)
        assert (same, alone) == (clip, caption)
    (whole,) = describe(model, videos / ODD, window=30, **HERE)
    assert (whole[0].start, whole[0].end) == (None, None)
    with pytest.raises(ValueError, match="window is 0"):
        list(describe(model, videos, window=0, **HERE))


def test_lines_on_a_terminal_and_for_programs(model, videos, run, monkeypatch):
    monkeypatch.chdir(videos)
    status, out, err = run(model, videos, "--length", 6, "--beams", 2)
    assert status == 0 and out.count("\n") == 2 and "describing 2 clips" in err
    assert out.startswith("a.mp4: ") and "\x1b" not in out
    status, out, _ = run(model, videos, "--length", 6, "--json", "--window", 1)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and {row["path"] for row in rows} == {
        str(videos / name) for name in ("a.mp4", ODD)
    }
    assert rows[0].keys() == {"path", "start", "end", "caption"}


def test_a_bad_video_costs_the_others_nothing(model, videos, tmp_path, run):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "good.mp4").symlink_to(videos / "a.mp4")
    for more in ((), ("--window", 1)):
        status, out, err = run(model, tmp_path, "--length", 3, *more)
        assert status == 0 and "good.mp4" in out and "bad.mp4" not in out
        assert "1 file could not be used:" in err and f"{tmp_path / 'bad.mp4'}: " in err
    status, out, err = run(model, tmp_path / "bad.mp4")
    assert status == 1 and out == ""
    assert "could be described; the first" in err.splitlines()[-1]


def test_a_model_without_a_decoder_is_refused_in_one_line(model, videos, tmp_path, run):
    CLIPViPModel.from_pretrained(model).save_pretrained(tmp_path)
    CLIPViPProcessor.from_pretrained(model).save_pretrained(tmp_path)
    assert has_decoder(model) and not has_decoder(tmp_path)
    status, out, err = run(tmp_path, videos)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert "has no decoder, so it cannot caption videos; train one first: clipvip train msr" in err
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    status, out, err = run(tmp_path, videos)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert "holds a 'blip' model; expected one that clipvip" in err
    assert f"clipvip caption {tmp_path} ANNOTATIONS.jsonl OUT.jsonl" in err
    with pytest.raises(FileNotFoundError, match="no such model"):
        list(describe("no such model", videos, **HERE))
    for options, message in (
        (["--beams", 0], "beams is 0; expected 1 to"),
        (["--length", 99], "length is 99; expected 1 to 29"),
    ):
        status, out, err = run(model, videos, *options)
        assert status == 1 and message in err.splitlines()[-1] and out == ""


def test_autocast_does_not_reach_the_callers_code(model, videos):
    options = HERE | {"mixed_precision": "bf16"}
    for _ in describe(model, videos, batch_size=1, **options):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
