"""Properties of what `clipvip explain` computes and draws."""

import json
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipvip import cli
from clipvip.data.annotations import Clip
from clipvip.data.video import DecodeError, read_frames
from clipvip.embedding import embed_clips, load_for_embedding
from clipvip.explain import WINDOWS, Explanation, explain
from clipvip.explain_picture import MOST_FRAMES, picture

pytest.importorskip("matplotlib")

LAYERS, HEADS, SIZE, PATCH, FRAMES = 3, 2, 32, 8, 3
TEXTS = ["a red circle", "moves left"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Nine frames at 8 per second, each of its own colour and with a square at its own place."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(9):
            pixels = np.full((32, 48, 3), (30 * number, 90, 250 - 30 * number), np.uint8)
            pixels[8:24, 4 * number : 4 * number + 12] = 255 * (number % 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def save_model(folder: Path, **vision) -> Path:
    from transformers import CLIPTokenizer

    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": HEADS}
    tower["num_hidden_layers"] = LAYERS
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **ends, "vocab_size": len(tokens), "max_position_embeddings": 60}
    vision = {**tower, "image_size": SIZE, "patch_size": PATCH, "num_frames": FRAMES, **vision}
    towers = {"text_config": text, "vision_config": vision, "projection_dim": 16}
    torch.manual_seed(0)
    model = CLIPViPModel(CLIPViPConfig(**towers))
    for name, weight in model.vision_model.named_parameters():
        if name.endswith("proj.weight") or "embedding" in name:
            torch.nn.init.normal_(weight, std=0.5)  # so that attention is uneven
    model.save_pretrained(folder)
    CLIPViPProcessor(tokenizer, image_size=SIZE, num_frames=FRAMES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_proxies=4)


@pytest.fixture(scope="module")
def averaging(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("mean"), num_proxies=1, frame_pooling="mean")


@pytest.fixture(scope="module")
def found(folder, clip):
    return explain(*load_for_embedding(folder), clip, TEXTS, layers=2)


def plain_attention(model, frames, processor):
    """Attention weights of every layer of one video, [layers, S, S], mean over heads, by softmax
    over a masked matrix."""
    tower, vision = model.vision_model, model.config.vision_config
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std)
    )
    pixels = (frames / 255 - mean) / std
    x = tower.embeddings(pixels, torch.tensor([0, len(frames)], dtype=torch.int32))
    x = tower.pre_layrnorm(x)
    patches = (vision.image_size // vision.patch_size) ** 2
    frame = torch.arange(len(frames)).repeat_interleave(patches)
    frame = torch.cat([torch.full((vision.num_proxies,), -1), frame])
    seen = (frame[:, None] == frame) | (frame[:, None] == -1) | (frame == -1)
    weights = []
    for layer in tower.encoder.layers:
        own, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (
            project(normed).unflatten(1, (HEADS, -1)).transpose(0, 1)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        weights.append(attention.mean(0))
        x = x + own.out_proj((attention @ v).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.layer_norm2(x))
    return torch.stack(weights)


@torch.no_grad()
def test_attention_is_that_of_plain_masked_attention(folder, clip, found):
    model, processor = load_for_embedding(folder)
    expected = plain_attention(model, found.frames, processor)[-2:, :4]
    patches = expected[..., 4:].unflatten(-1, (FRAMES, SIZE // PATCH, SIZE // PATCH))
    torch.testing.assert_close(found.attention, patches, atol=1e-5, rtol=1e-4)
    whole = found.attention.sum((2, 3, 4)) + expected[..., :4].sum(-1)
    torch.testing.assert_close(whole, torch.ones(2, 4))
    assert found.layers == [1, 2] and found.shares.shape == (4, FRAMES)
    assert found.attention.std() > 1e-3  # uneven enough to tell an error


@torch.no_grad()
def test_with_averaged_frames_each_frame_has_attention_of_its_own(averaging, clip):
    model, processor = load_for_embedding(averaging)
    found = explain(model, processor, clip, TEXTS, layers=LAYERS + 5)
    assert found.frame_pooling == "mean" and found.layers == [0, 1, 2]
    for number, frame in enumerate(found.frames):
        expected = plain_attention(model, frame[None], processor)[:, 0, 1:]
        own = found.attention[:, 0, number].flatten(1)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    assert (found.shares < 1).all()


def test_the_frames_are_those_that_the_model_reads_with_their_times(folder, clip, found):
    assert torch.equal(found.frames, read_frames(clip, FRAMES, size=SIZE))
    assert found.times.tolist() == [0, 0.5, 1.0]


@torch.no_grad()
def test_similarities_are_those_of_the_model_on_whole_video_frames_and_parts(folder, clip, found):
    model, processor = load_for_embedding(folder)
    frames = list(found.frames)
    output = model(**processor(text=TEXTS, videos=[str(clip), *frames]))
    cosines = output.video_embeds @ output.text_embeds.T
    torch.testing.assert_close(found.similarity, cosines[0])
    torch.testing.assert_close(found.frame_similarity, cosines[1:].T)

    assert found.windows.shape == (WINDOWS, 2)
    assert found.windows[0, 0] == 0 and found.windows[-1, 1] == pytest.approx(9 / 8)
    parts = [Clip(clip, start, end) for start, end in found.windows.tolist()]
    options = {"batch_size": 4, "num_workers": 0, "decoder": "pyav"}
    rows = {}
    for batch in embed_clips(model, processor, parts, [], **options):
        rows |= batch
    features = torch.stack([rows[number] for number in range(WINDOWS)])
    expected = F.normalize(output.text_embeds, dim=-1) @ features.T
    torch.testing.assert_close(found.window_similarity, expected)


def test_explaining_leaves_the_model_as_it_was(folder, clip, tmp_path):
    model, processor = load_for_embedding(folder)
    batch = processor(videos=str(clip))
    with torch.no_grad():
        before = model.get_video_features(**batch)
    explain(model, processor, clip, TEXTS)
    with pytest.raises(DecodeError):
        explain(model, processor, tmp_path / "none.mp4", TEXTS)
    with torch.no_grad():
        assert torch.equal(model.get_video_features(**batch), before)
    assert not any(layer._forward_pre_hooks for layer in model.vision_model.encoder.layers)


def drawn(found: Explanation) -> Image.Image:
    """The picture, made without a warning."""
    from io import BytesIO

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Image.open(BytesIO(picture(found)))


@pytest.mark.parametrize(
    ("frames", "proxies", "pooling"), [(1, 1, "proxy"), (40, 9, "proxy"), (12, 1, "mean")]
)
def test_pictures_of_few_and_many_frames_fit_a_screen(found, frames, proxies, pooling):
    many = replace(
        found,
        frames=torch.zeros(frames, 3, SIZE, SIZE, dtype=torch.uint8),
        times=torch.linspace(0, 4000, frames, dtype=torch.float64),
        frame_similarity=torch.zeros(2, frames),
        windows=found.windows * 4000,
        attention=torch.full((1, proxies, frames, 4, 4), 1 / 16 / frames),
        frame_pooling=pooling,
    )
    width, height = drawn(many).size
    assert 700 < width < 2000 and 400 < height < 1500
    assert frames > MOST_FRAMES or many.shares.sum(-1).allclose(torch.ones(proxies))


def test_any_name_and_text_can_be_drawn(found, caplog):
    texts = ["costs $5, and $x^{", "自転車 🚲 مرحبا", "\x1b[31mred\n", "word " * 5000]
    more = {
        "similarity": torch.zeros(4),
        "frame_similarity": torch.zeros(4, FRAMES),
        "window_similarity": torch.zeros(4, WINDOWS),
    }
    with caplog.at_level(logging.WARNING):
        odd = drawn(replace(found, video=Path("\udce9 名 $_{ " + "x" * 200), texts=texts, **more))
    assert odd.size[0] == drawn(found).size[0]
    assert not caplog.records


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*words) → (exit status, output, errors) of `clipvip explain`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipvip", "explain", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def test_the_command_writes_a_picture_and_numbers(folder, clip, found, run):
    status, output, errors = run(folder, clip, *TEXTS, "--json", "numbers.json", "--layers", "2")
    assert status == 0, errors
    assert output == "wrote clip.explain.png\nwrote numbers.json\n"
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["texts"] == TEXTS and numbers["times"] == [0, 0.5, 1.0]
    assert numbers["layers"] == [1, 2]
    for name in ("similarity", "window_similarity", "attention"):
        expected = found.maps if name == "attention" else getattr(found, name)
        torch.testing.assert_close(torch.tensor(numbers[name]), expected, atol=1e-8, rtol=1e-4)
    assert {path.name for path in Path().iterdir()} == {"clip.explain.png", "numbers.json"}

    before = Path("clip.explain.png").read_bytes()
    assert run(folder, clip, "another text")[0] == 0  # replaces its own picture
    assert Path("clip.explain.png").read_bytes() != before


def test_an_image_is_explained_as_one_frame(folder, run):
    Image.new("RGB", (20, 60), "red").save("tall.png")
    status, _, errors = run(folder, "tall.png", TEXTS[0], "--json", "n.json")
    assert status == 0, errors
    numbers = json.loads(Path("n.json").read_text())
    assert (
        numbers["times"] == [0]
        and numbers["windows"] == []
        and numbers["window_similarity"] == [[]]
    )
    assert np.shape(numbers["attention"]) == (4, 1, 4, 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("{model}", "none.mp4", "a"), "the video is 'none.mp4', a file that does not exist"),
        (("{model}", "noise.mp4", "a"), "noise.mp4: "),
        (("{model}", "{clip}", " "), "the text is empty"),
        (("{model}", "{clip}"), "0 texts were given; expected 1 to 10"),
        (("{model}", "{clip}", *"abcdefghijk"), "11 texts were given"),
        (("{model}", "{clip}", "a", "--layers", "0"), "layers is 0; expected at least 1"),
        (("{model}", "{clip}", "a", "--out", "{clip}"), "expected a name that ends with .png"),
        (("{model}", "{clip}", "a", "--out", "mine.png"), "mine.png exists and is no picture of"),
        (("{model}", "{clip}", "a", "--json", "n.txt"), "expected a name that ends with .json"),
        (("bare", "{clip}", "a"), "holds no tokenizer"),
        (("no/such/model", "{clip}", "a"), "which does not exist"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(folder, clip, run, words, expected):
    Path("noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    Image.new("RGB", (4, 4)).save("mine.png")
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).symlink_to(folder / name)
    before = sorted(Path().iterdir())
    status, output, errors = run(*(str(word).format(model=folder, clip=clip) for word in words))
    last = errors.splitlines()[-1]
    assert status == 1 and last.startswith("clipvip: error: ") and expected in last
    assert "Traceback" not in errors and output == ""
    assert sorted(Path().iterdir()) == before


def test_without_matplotlib_one_line_says_how_to_install_it(folder, clip, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, errors = run(folder, clip, "a")
    assert status == 1
    assert errors == 'clipvip: error: matplotlib is not installed: pip install "clipvip[explain]"\n'
