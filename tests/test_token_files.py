"""Properties of the tokens that are written to files."""

import errno
import json
import os
import sys

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from clipvip import cli, token_files
from clipvip.embedding import load_for_embedding
from clipvip.files import write_whole
from clipvip.token_files import save_tokens


def write_clip(path, colour, frames=6):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            image = np.full((32, 32, 3), colour + 9 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def save_model(folder, seed=0, **vision):
    from transformers import CLIPTokenizer

    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    tokens = [*"abc", *(f"{letter}</w>" for letter in "abc"), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 1, "projection_dim": 16}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    text = {**sizes, **ends, "vocab_size": len(tokens)}
    images = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(seed)
    config = CLIPViPConfig(text_config=text, vision_config=images, projection_dim=16, **vision)
    CLIPViPModel(config).save_pretrained(folder)
    CLIPViPProcessor(tokenizer, image_size=32, num_frames=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, colour in {"a": 30, "b": 90, os.fsdecode(b"caf\xe9"): 150}.items():
        write_clip(folder / f"{name}.mp4", colour)
    return folder


@pytest.fixture
def write(model, tmp_path):
    def run(videos, out=tmp_path / "tokens", model=model, **options):
        given = {"num_workers": 0, "device": "cpu", "mixed_precision": "no"}
        return save_tokens(model, videos, out, **{**given, **options})

    return run


@pytest.fixture
def computed(monkeypatch):
    """Names of the videos whose tokens are computed from now on."""
    names = []
    read = token_files.read_clips

    def spy(model, processor, clips, *rest, **options):
        names.extend(clip.video.name for clip in clips)
        return read(model, processor, clips, *rest, **options)

    monkeypatch.setattr(token_files, "read_clips", spy)
    return names


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def lines(file):
    return [json.loads(line) for line in file.read_bytes().splitlines()]


@torch.no_grad()
@pytest.mark.parametrize("frame_pooling", ["proxy", "mean"])
def test_files_hold_the_tokens_of_their_clips(write, videos, tmp_path, frame_pooling):
    """Also of a part of a video, of an image, and of a name that is not UTF-8."""
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(videos / "red.png")
    part = {"video": "a.mp4", "start": 0.2, "end": 0.45}
    (videos / "parts.jsonl").write_text(json.dumps(part))
    model = save_model(tmp_path / "own", frame_pooling=frame_pooling)
    sources = [videos, videos / "parts.jsonl", videos / "red.png"]
    records = write(sources, model=model, layer=-2, dtype="fp32")
    assert records == lines(tmp_path / "tokens" / "clips.jsonl") and len(records) == 5
    network, processor = load_for_embedding(model)
    for record in records:
        file = tmp_path / "tokens" / record["file"]
        tokens = load_file(file)
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["clip"])
        assert about == {
            **{key: record[key] for key in ("video", "start", "end")},
            **{"model": str(model), "layer": 1},
        }
        times = [0.0] if record["video"].endswith("png") else [0, 0.375, 0.625]
        if record["start"]:
            times = [0.125, 0.25, 0.375]
        else:
            inputs = processor(videos=[record["video"]])
            wanted = network.get_video_tokens(**inputs, layer=1)
            proxies = wanted.proxies if frame_pooling == "mean" else wanted.proxies[0]
            torch.testing.assert_close(tokens["proxies"], proxies)
            torch.testing.assert_close(tokens["patches"], wanted.patches)
        assert tokens["times"].tolist() == record["times"] == times
        assert record["frames"] == len(times) and record["bytes"] == file.stat().st_size


def test_the_same_run_again_writes_nothing(write, videos, tmp_path, computed):
    (videos / "broken.mp4").write_bytes(b"no video at all")
    first = write(videos)
    before = content(tmp_path / "tokens")
    computed.clear()
    assert write(videos) == first and computed == ["broken.mp4"]
    assert content(tmp_path / "tokens") == before
    (bad,) = lines(tmp_path / "tokens" / "bad_files.jsonl")
    assert bad["path"] == str(videos / "broken.mp4") and bad["reason"]
    again = content(tmp_path / "tokens")
    write(videos, tmp_path / "other")
    assert content(tmp_path / "other") == again  # to the byte


def test_clips_are_added_and_those_of_changed_videos_replaced(write, videos, tmp_path, computed):
    out = tmp_path / "tokens"
    (old,) = write(videos / "a.mp4")
    write(videos / "b.mp4")
    assert [os.path.basename(r["video"]) for r in lines(out / "clips.jsonl")] == ["a.mp4", "b.mp4"]
    write_clip(videos / "a.mp4", 200)
    (new,) = write(videos / "a.mp4")
    assert computed == ["a.mp4", "b.mp4", "a.mp4"]
    assert not (out / old["file"]).exists() and new["file"] != old["file"]
    assert {r["file"] for r in lines(out / "clips.jsonl")} == {
        str(path.relative_to(out)) for path in out.rglob("*.safetensors")
    }


@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_a_full_disk_or_a_kill_leaves_whole_files(
    write, videos, tmp_path, monkeypatch, computed, steps
):
    out, room, fsync = tmp_path / "tokens", [steps], os.fsync

    def full(descriptor):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            write(videos)
    there = list(out.rglob("*.safetensors"))
    for file in there:
        assert load_file(file).keys() == {"proxies", "patches", "times"}
    assert not list(out.rglob("*.partial"))
    computed.clear()
    assert len(write(videos)) == 3 and len(computed) == 3 - len(there)
    assert len(lines(out / "clips.jsonl")) == 3


def test_files_that_were_cut_off_are_written_again(write, videos, tmp_path, computed):
    first = write(videos)
    file = tmp_path / "tokens" / first[0]["file"]
    whole = file.read_bytes()
    for cut in (whole[:-1], None):
        for with_list in (True, False):
            file.unlink() if cut is None else file.write_bytes(cut)
            if not with_list:
                (tmp_path / "tokens" / "clips.jsonl").unlink()
            computed.clear()
            assert write(videos) == first and computed == ["a.mp4"]
            assert file.read_bytes() == whole


def test_other_models_layers_and_folders_are_refused(write, videos, tmp_path):
    write(videos)
    before = content(tmp_path / "tokens")
    with pytest.raises(ValueError, match="tokens of layer 2 in fp16, not of layer 1 in bf16"):
        write(videos, layer=1, dtype="bf16")
    with pytest.raises(ValueError, match=r"holds tokens of the model .*, not .*own"):
        write(videos, model=save_model(tmp_path / "own", seed=1))
    with pytest.raises(ValueError, match="layer is 3; expected 0 "):
        write(videos, tmp_path / "new", layer=3)
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of fp16, bf16, fp32"):
        write(videos, tmp_path / "new", dtype="int8")
    with pytest.raises(ValueError, match="out is empty"):
        write(videos, "")
    with pytest.raises(ValueError, match=r"holds 'a.mp4' and no tokens; give a new or empty"):
        write(videos, videos)
    assert content(tmp_path / "tokens") == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("tokens.json", b"{", "tokens.json is damaged"),
        ("tokens.json", b'{"format": 2}', "damaged or from another version"),
        ("clips.jsonl", b'{"video": "a"}\n', r"clips.jsonl is damaged \(line 1\); delete this"),
        (
            "clips.jsonl",
            b'{"video": "a", "start": null, "end": null, "file": "../a", "bytes": 1}\n',
            r"clips.jsonl is damaged \(line 1\)",
        ),
    ],
)
def test_damaged_folders_are_refused(write, videos, tmp_path, file, data, said):
    write(videos / "a.mp4")
    (tmp_path / "tokens" / file).write_bytes(data)
    with pytest.raises(ValueError, match=said):
        write(videos)


def test_tokens_that_cannot_be_stored_are_listed(write, videos, tmp_path, monkeypatch):
    compute = token_files.CLIPViPModel.get_video_tokens

    def large(self, *given, **options):
        tokens = compute(self, *given, **options)
        tokens.patches[0, 0, 0] = 1e5  # of the first clip
        tokens.patches[3:4, 0, 0] = float("nan")
        return tokens

    monkeypatch.setattr(token_files.CLIPViPModel, "get_video_tokens", large)
    (kept,) = write(videos)
    assert os.fsencode(kept["video"]).endswith(b"caf\xe9.mp4")
    reasons = [bad["reason"] for bad in lines(tmp_path / "tokens" / "bad_files.jsonl")]
    assert "too large for fp16: store them in bf16" in reasons[0]
    assert "no finite tokens" in reasons[1]
    (other,) = (r for r in write(videos / "a.mp4", tmp_path / "other", dtype="bf16"))
    stored = load((tmp_path / "other" / other["file"]).read_bytes())["patches"]
    assert stored.dtype == torch.bfloat16 and stored[0, 0, 0] == 99840
    with pytest.raises(ValueError, match=r"none of 1 clips .* gave tokens; the first: .*too large"):
        write(videos / "a.mp4", tmp_path / "none")
    assert os.listdir(tmp_path / "none") == [".lock"]


def test_a_run_that_gives_up_says_so(write, videos, tmp_path, monkeypatch):
    write(videos / "a.mp4")
    compute = token_files.CLIPViPModel.get_video_tokens

    def broken(self, *given, **options):
        tokens = compute(self, *given, **options)
        tokens.patches.fill_(float("nan"))
        return tokens

    monkeypatch.setattr(token_files.CLIPViPModel, "get_video_tokens", broken)
    monkeypatch.setattr(token_files, "COUNTED_FROM", 1)
    with pytest.raises(ValueError, match="first 1 clips gave tokens, and others were not"):
        write(videos, batch_size=1)
    assert len(lines(tmp_path / "tokens" / "clips.jsonl")) == 1


def test_the_list_is_saved_meanwhile(write, videos, tmp_path, monkeypatch):
    saved = []

    def spy(path, data):
        saved.append(path.name)
        write_whole(path, data)

    monkeypatch.setattr(token_files, "write_whole", spy)
    monkeypatch.setattr(token_files, "SAVE_SECONDS", -1e9)
    write(videos, batch_size=1)
    assert saved.index("clips.jsonl") < len(saved) - 2


def test_from_the_shell(model, videos, tmp_path, monkeypatch, capfd):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipvip", "embed", *map(str, words)])
        monkeypatch.chdir(tmp_path)
        try:
            cli.main()
        except SystemExit as end:
            return end.code, capfd.readouterr().err
        return 0, capfd.readouterr().err

    assert run(model, videos / "a.mp4", "--layer", "1") == (
        1,
        "clipvip: error: --layer and --dtype say which tokens to write; give --tokens as well\n",
    )
    status, said = run(model, videos / "a.mp4", "--tokens", "--layer", "-3", "--dtype", "bf16")
    assert status == 0
    assert "3 frames give 16 tokens of 32 values in bf16: at most 1.02 kB per clip" in said
    (record,) = lines(tmp_path / "tokens" / "clips.jsonl")
    assert load_file(tmp_path / "tokens" / record["file"])["patches"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text())["layer"] == 0
