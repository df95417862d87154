import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from clipvip import cli
from clipvip.embedding import load_for_embedding
from clipvip.export import export
from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

TOWERS = ("text_config", "vision_config")
SIZES = [(1, 1), (3, 1), (1, 12), (2, 33)]  # none is that of tracing


def videos(count, frames):
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(count, frames, 3, 32, 32, generator=generator)


@torch.no_grad()
def features(model, pixels=None, **texts):
    if pixels is None:
        return F.normalize(model.get_text_features(**texts), dim=-1)
    return F.normalize(model.get_video_features(pixels), dim=-1)


@pytest.fixture(scope="module")
def one_layer(tower_configs):
    towers = {name: tower_configs[name] | {"num_hidden_layers": 1} for name in TOWERS}
    return {**towers, "projection_dim": 24}


@pytest.fixture(scope="module")
def source(one_layer, tokenizer, tmp_path_factory):
    """A model in bf16 whose features depend on every token, with a processor."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    model = CLIPViPModel(CLIPViPConfig(**one_layer, num_frames=5))
    torch.nn.init.normal_(model.vision_model.embeddings.temporal_embedding)
    for name, weight in model.vision_model.named_parameters():
        if name.endswith("proj.weight") or name.endswith("patch_embedding.weight"):
            torch.nn.init.normal_(weight, std=0.1)
    model.bfloat16().save_pretrained(folder)
    settings = {"image_size": 32, "num_frames": 5, "resize": "squash", "text_length": 9}
    CLIPViPProcessor(tokenizer, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported") / "out"
    done = export(source, folder, onnx=True)
    assert done.difference < 1e-5 and done.stored == "bfloat16"
    assert done.files == sorted(path.name for path in folder.iterdir())
    return folder


@pytest.fixture
def model(source):
    model, _ = load_for_embedding(source)
    assert model.config.vision_config.attention_backend == "native"
    return model.float()


def opened(folder: Path, tower: str):
    """Return both files of a tower as functions of its inputs."""
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / f"{tower}.onnx")
    names = [x.name for x in session.get_inputs()]

    def run(*inputs):
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(np.asarray(session.run(None, given)[0]))

    return run, torch.export.load(folder / f"{tower}.pt2").module()


def test_exported_videos_are_those_of_the_compiled_attention(exported, model):
    for run in opened(exported, "video"):
        for size in SIZES:
            got, want = run(videos(*size)), features(model, videos(*size))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_exported_texts_are_the_models(exported, model, texts):
    for run in opened(exported, "text"):
        for rows, length in ((slice(3), 5), (slice(1), 5), (slice(1, 3), 3)):
            given = {name: x[rows, :length] for name, x in texts.items()}
            want = features(model, **given)
            torch.testing.assert_close(run(*given.values()), want, atol=1e-5, rtol=0)


def test_what_a_runtime_must_know_is_written(exported, model, source):
    onnx = pytest.importorskip("onnx")
    about = json.loads((exported / "export.json").read_text())
    types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    for tower in ("video", "text"):
        assert about[tower]["files"] == [f"{tower}.onnx", f"{tower}.pt2"]
        graph = onnx.load(exported / f"{tower}.onnx").graph
        assert {x.name for x in graph.input} == about[tower]["inputs"].keys()
        for x in [*graph.input, *graph.output]:
            said = (about[tower]["inputs"] | about[tower]["outputs"])[x.name]
            shape = [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
            assert shape == said["shape"]
            assert x.type.tensor_type.elem_type == types[said["dtype"]]
    assert about["video"]["inputs"]["pixel_values"]["shape"] == ["videos", "frames", 3, 32, 32]
    assert about["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    processor = CLIPViPProcessor.from_pretrained(exported)
    want = CLIPViPProcessor.from_pretrained(source)("a b")["input_ids"]
    assert torch.equal(processor("a b")["input_ids"], want)
    assert about["frames"]["resize"] == "squash" and about["frames"]["count"] == 5
    assert about["texts"] == {"longest": 9, "pad_token_id": processor.tokenizer.pad_token_id}


def test_a_tower_holds_no_weights_of_the_other(exported):
    for tower in ("video", "text"):
        names = torch.export.load(exported / f"{tower}.pt2").state_dict
        assert names and not any(("text" in name) != (tower == "text") for name in names)


def test_plain_clip_from_the_shell(one_layer, tokenizer, texts, tmp_path, monkeypatch, capsys):
    """With OpenAI's end token, another activation, and heads that only the reference takes."""
    towers = {"hidden_act": "gelu", "num_attention_heads": 16}
    text = one_layer["text_config"] | towers | {"eos_token_id": 2}
    vision = one_layer["vision_config"] | towers | {"attention_backend": "reference"}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    out = tmp_path / "new" / "out"
    monkeypatch.setattr("sys.argv", ["clipvip", "export", str(tmp_path / "clip"), str(out)])
    cli.main()
    assert "largest difference" in capsys.readouterr().out
    pixels, frames = videos(2, 4), videos(2, 4).flatten(0, 1)
    with torch.no_grad():
        of_frames = F.normalize(clip.get_image_features(frames).pooler_output, dim=-1)
        of_texts = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)
    want = F.normalize(of_frames.unflatten(0, (2, 4)).mean(1), dim=-1)
    got = torch.export.load(out / "video.pt2").module()(pixels)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    got = torch.export.load(out / "text.pt2").module()(*texts.values())
    torch.testing.assert_close(got, of_texts, atol=1e-5, rtol=0)


def test_what_differs_from_the_model_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "clipvip.model.vision.equal_lengths_reference", lambda qkv, *sizes: qkv[:, 2]
    )
    with pytest.raises(ValueError, match=r"video.pt2 differs from the model by .*\[1, 1, 3, 32"):
        export(source, tmp_path / "out", onnx=False)
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_explained(source, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        export(source, tmp_path, onnx=False)
    with pytest.raises(FileNotFoundError, match="nowhere', which does not exist"):
        export(tmp_path / "nowhere", tmp_path / "out", onnx=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"ONNX needs onnx and .* pip install \"clipvip\[export"):
        export(source, tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_an_os_error_and_nothing_is_left(source, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(source, tmp_path / "out", onnx=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


def test_a_whole_model_is_exported_for_any_number_of_videos_and_frames(source, texts, backend):
    model = CLIPViPModel.from_pretrained(source, attention_backend=backend).float()
    any_videos = {0: torch.export.Dim("videos"), 1: torch.export.Dim("frames")}
    given = {"pixel_values": videos(2, 3), **texts}
    shapes = {"pixel_values": any_videos} | dict.fromkeys(texts)
    program = torch.export.export(model, (), kwargs=given, dynamic_shapes=shapes)
    ops = {str(node.target) for node in program.graph.nodes if "clipvip" in str(node.target)}
    assert ops == ({"clipvip.proxy_attention_forward.default"} if backend == "native" else set())
    for size in SIZES:
        given["pixel_values"] = videos(*size)
        with torch.no_grad():
            got, want = program.module()(**given), model(**given)
        assert got.keys() == want.keys()
        torch.testing.assert_close(got.video_embeds, want.video_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.logits_per_text, want.logits_per_text, atol=1e-4, rtol=0)
