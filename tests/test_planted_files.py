"""Every command on a folder with one file of every evil and one good clip: the good one comes
through, and each of the others is told of."""

import json
import os
import socket
import struct
import sys
import tarfile
import zlib
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from clipvip import cli
from clipvip.data.shards import is_shards, load_manifest
from clipvip.index.store import Store

TEXT = "a red circle moves left"


def write_clip(path: Path, times: list[float], size: int = 64, kind: str | None = None) -> None:
    """A video with a frame at each time, in seconds."""
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, seconds in enumerate(times):
            pixels = np.full((size, size, 3), (220, 30, 8 * number), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b" ")) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame + b"\x3b"


SCRIPTS = {
    "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 239.7.7.7\nt=0 0\n"
    "m=video 46802 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "list.mp4": "ffconcat version 1.0\nfile 'good.mp4'\n",
    "list.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\ngood.mp4\n#EXT-X-ENDLIST\n",
    "words.avi": "only words\n",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder. GOOD is the good clip; texts lie beside all."""
    folder = tmp_path_factory.mktemp("planted")
    write_clip(folder / "good.mp4", [i / 25 for i in range(20)])
    good = (folder / "good.mp4").read_bytes()
    write_clip(folder / "gap.mkv", [0, 0.04, 25_200, 25_200.04])
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text)
    (folder / "empty.mp4").touch()
    (folder / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "cut off.mp4").write_bytes(good[: len(good) // 2])
    sizes = good.index(b"stsz") + 8
    claim = struct.pack(">II", 1, 100_000_000)
    (folder / "claims.mp4").write_bytes(good[:sizes] + claim + good[sizes + 8 :])
    (folder / "large.mp4").write_bytes(png(12_000, 12_000))
    (folder / "large.gif").write_bytes(gif(16_000, 16_000))
    (folder / "dangling.mp4").symlink_to("nowhere")
    (folder / "round.mp4").symlink_to("round.mp4")
    (folder / "zeros.mp4").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in [b"\xe9 not UTF-8.mp4", b"\x1b[31mred\n.mp4", b"-rf.mp4"]:
        (folder / os.fsdecode(name)).write_bytes(good[: len(good) // 3])
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(TEXT)
    here = os.getcwd()
    os.chdir(folder)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket.mp4")
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(scope="module")
def annotations(planted: Path) -> Path:
    """A line for each file, and for names that no folder can hold."""
    script = planted / "script.jpg"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    (planted / "large.png").write_bytes(png(60_000, 60_000))
    names = sorted(path.name for path in planted.iterdir() if path.suffix != ".txt")
    names += [
        "nul\0.mp4",
        "half \ud83d.mp4",
        "long" * 100 + ".mp4",
        "../" * 2000 + "a.mp4",
        "/",
        ".",
    ]
    lines = [{"video": name, "text": TEXT, "subtitle": TEXT, "caption": TEXT} for name in names]
    lines.append({"video": "good.mp4", "text": TEXT, "caption": TEXT, "image": "script.jpg"})
    lines.append({"video": "good.mp4", "text": TEXT, "caption": TEXT, "image": "pipe.mp4"})
    lines.append({"video": "good.mp4", "start": 1e300, "text": TEXT, "caption": TEXT})
    path = planted / "annotations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


EVILS = 26  # at least, of which not all are evil to every command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPTokenizer

    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tower = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    tower |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **ends, "vocab_size": len(tokens), "max_position_embeddings": 77}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    towers = {"text_config": text, "vision_config": vision, "projection_dim": 16}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    CLIPViPModel(CLIPViPConfig(**towers, num_frames=2)).save_pretrained(folder)
    CLIPViPProcessor(tokenizer, image_size=32, num_frames=2).save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """run(*words) → (exit status, what was said) of a command of the shell."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["clipvip", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        said = "".join(capfd.readouterr())
        assert "Traceback" not in said
        assert "\x1b[31mred" not in said  # a name that would colour the terminal
        return status, said

    return run


def bad_files(path: Path) -> set[str]:
    return {json.loads(line)["path"] for line in path.read_bytes().splitlines()}


def test_embed(planted: Path, annotations: Path, model: Path, run, tmp_path: Path) -> None:
    names = [
        *map(os.fsencode, planted.iterdir()),
        b"nul\0.mp4",
        b"\xff.mp4",
        b"long" * 100 + b".mp4",
    ]
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\n".join(name for name in names if b"\n" not in name))
    for number, source in enumerate((planted, annotations, listed)):
        out = tmp_path / str(number)
        status, said = run("embed", model, source, "--out", out)
        assert status == 0, said
        index = Store.open(out)
        assert str(planted / "good.mp4") in index.files()
        assert np.isfinite(index.everything().vectors).all()
        assert len(index.bad_files()) > 8


def test_embed_tokens(planted: Path, annotations: Path, model: Path, run, tmp_path: Path) -> None:
    status, said = run("embed", model, annotations, "--tokens", "--out", tmp_path / "tokens")
    assert status == 0, said
    listed = [json.loads(x) for x in (tmp_path / "tokens" / "clips.jsonl").open()]
    assert str(planted / "good.mp4") in {record["video"] for record in listed}
    assert len(bad_files(tmp_path / "tokens" / "bad_files.jsonl")) > 8


@pytest.mark.parametrize(
    "options", [(), ("--cut",), ("--size", "32")], ids=["whole", "cut", "size"]
)
def test_shard_and_verify(
    planted: Path, annotations: Path, options: tuple[str, ...], run, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    again = [out, tmp_path / "again"]
    for folder in again:
        status, said = run(
            "shard", annotations, folder, *options, "--max-bad-share", "1", "--clips-per-shard", "7"
        )
        assert status == 0, said
    assert len(bad_files(out / "bad_files.jsonl")) > 8
    assert sum(shard.clips for _, shard in load_manifest(str(out))) >= 2
    for tar in out.glob("*.tar"):
        assert tar.read_bytes() == (again[1] / tar.name).read_bytes()
    status, said = run("verify", out)
    assert status == 0 and ", 0 bad" in said


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        BertTokenizer,
        CLIPImageProcessor,
        GitConfig,
        GitForCausalLM,
        GitProcessor,
    )

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "moves", "left")
    tower = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    tower |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = GitConfig(vision_config=vision, vocab_size=len(words), **tower, **ends)
    folder = tmp_path_factory.mktemp("captioner")
    GitForCausalLM(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=size, crop_size=size)
    GitProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_caption(
    planted: Path, annotations: Path, captioner: Path, run, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out.jsonl"
    options = ("--overwrite", "--max-bad-share", "1", "--workers", workers, "--length", "4")
    status, said = run("caption", captioner, annotations, out, *options)
    assert status == 0 and "without a caption: unreadable" in said, said
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len(found) == len(annotations.read_bytes().splitlines())
    listed = out.with_suffix(".bad_files.jsonl").read_bytes().splitlines()
    unread = [json.loads(line)["line"] for line in listed]
    assert len(unread) > 20
    assert all(found[line - 1]["caption"] == TEXT for line in unread)  # they keep what they had


def test_caption_tars_of_others(planted: Path, captioner: Path, run, tmp_path: Path) -> None:
    folder, out = tmp_path / "tars", tmp_path / "out"
    folder.mkdir()
    hostile_tar(folder / "a.tar", (planted / "good.mp4").read_bytes())
    run("verify", folder / "a.tar", "--manifest", folder / "manifest.jsonl")
    options = ("--overwrite", "--max-bad-share", "1", "--workers", "2", "--length", "4")
    status, said = run("caption", captioner, folder, out, *options)
    assert status == 0, said
    status, said = run("verify", out)
    assert "sha256" not in said and f"{out}: " in said


def test_verify(annotations: Path, run, tmp_path: Path) -> None:
    clean = tmp_path / "clean.jsonl"
    status, said = run("verify", annotations, clean)
    assert status == 1 and "good.mp4" in clean.read_text() and said.count(" (line ") > 20
    status, said = run("verify", clean)
    assert status == 0 and ", 0 bad" in said


def test_explain(planted: Path, model: Path, run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.png"
    for path in sorted(planted.iterdir()):
        if path.suffix in (".txt", ".jsonl") or path.name == "gap.mkv":
            continue
        status, said = run("explain", model, path, TEXT, "--out", out)
        assert status == int(path.name != "good.mp4"), said
        assert out.exists() == (status == 0) and not list(tmp_path.glob(".*"))
        out.unlink(missing_ok=True)


def test_classify(annotations: Path, model: Path, run, tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.txt", tmp_path / "out.csv"
    labels.write_text(f"{TEXT}\nnoise\n")
    status, said = run("classify", model, annotations, "--labels", labels, "--csv", out)
    assert status == 0 and "files could not be used:" in said, said
    rows = out.read_text().splitlines()
    good = [row for row in rows if row.startswith(f"{annotations.parent}/good.mp4,,,")]
    assert len(good) == 2 and len(rows) % 2


def test_prepare(planted: Path, run, tmp_path: Path) -> None:
    out = tmp_path / "prepared.jsonl"
    status, said = run("prepare", "folder", planted, out)
    assert status == 0, said
    assert "good.mp4" in out.read_text()


@pytest.mark.parametrize("task", ["retrieval", "omnisource"])
@pytest.mark.parametrize("workers", [0, 2])
def test_train(
    annotations: Path, model: Path, task: str, workers: int, run, tmp_path: Path
) -> None:
    status, said = train(run, model, annotations, tmp_path / "run", task, workers)
    assert status == 0, said
    assert len(bad_files(tmp_path / "run" / "bad_files.jsonl")) > 5


def train(run, model: Path, source: Path, out: Path, task: str, workers: int) -> tuple[int, str]:
    settings = {
        "task": task,
        "model.name": model,
        "data.train": source,
        "data.num_frames": 2,
        "data.num_workers": workers,
        "data.max_bad_share": 1,
        "batch_size": 4,
        "max_steps": 8,
        "mixed_precision": "no",
        "out": out,
    }
    config = out.parent / "config.yaml"
    config.write_text("{}\n")
    return run("train", config, *(f"{key}={value}" for key, value in settings.items()))


def test_eval(annotations: Path, model: Path, run, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    status, said = run("eval", model, annotations, "--out", out)
    # Too many are bad for figures to mean much, which is said in a line.
    assert status == 1 and "could not be read" in said, said


# --- tars of others -----------------------------------------------------------------------------


def hostile_tar(path: Path, good: bytes) -> None:
    """A good clip first, last and in between."""
    deep, wrong = b"[" * 100_000, [b"[]", b"1", b'"a"', b"null", b'{"text": 1}', b'{"text": [[]]}']
    wrong += [b'{"start": "a"}', b'{"end": []}', b'{"source": []}', b'{"source": {"video": 1}}']
    wrong += [
        b'{"start": 1e999}',
        b'{"start": NaN}',
        b'{"caption": {"a": 1}}',
        b"{",
        b"\xff\xfe",
        deep,
    ]
    wrong += [
        b'{"text": "\\ud83d"}',
        b'{"start": ' + b"9" * 5000 + b"}",
        b'{"source": {"line": "x"}}',
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            member.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            tar.addfile(member, BytesIO(data))

        text = json.dumps({"text": TEXT, "subtitle": TEXT, "caption": TEXT}).encode()
        number = 0
        for record in (text, *wrong, text):
            add(f"{number:03d}.json", record)
            add(f"{number:03d}.mp4", good)
            number += 1
        for name, data in (
            ("only.json", text),
            ("twice.mp4", good),
            ("twice.avi", good),
            ("empty.mp4", b""),
            ("words.txt", b"\xff\xfe\0\0"),
            ("../../up.mp4", good),
            ("/etc/abs.mp4", good),
            ("a\x1b[31mred.mp4", good),
            ("without", b"a"),
        ):
            add(name, data)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            add(f"kind{kind.decode()}.mp4", b"", kind)
        add(f"{number:03d}.json", text)
        add(f"{number:03d}.mp4", good)


def test_tars_of_others(planted: Path, model: Path, run, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    hostile_tar(folder / "a.tar", (planted / "good.mp4").read_bytes())
    manifest = folder / "manifest.jsonl"
    status, said = run("verify", folder / "a.tar", "--manifest", manifest)
    assert status == 1, said
    shard = json.loads(manifest.read_bytes())
    assert shard["texts"] >= 3 and is_shards(str(folder))
    for workers in (0, 2):
        status, said = train(run, model, folder, tmp_path / f"run{workers}", "omnisource", workers)
        assert status == 0, said


# --- models of others ---------------------------------------------------------------------------


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_models_of_others(
    planted: Path, annotations: Path, model: Path, run, tmp_path, monkeypatch
):
    """Each command says in one line what is wrong with a file, runs no code and writes nothing."""
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.proj": torch.zeros(1), "a": Planted()}, "code.pt")
    torch.save({"visual.proj": torch.zeros(100)}, "part.pt")
    Path("cut off.bin").write_bytes(Path("part.pt").read_bytes()[:-200])
    Path("empty.pth").touch()
    Path("words.safetensors").write_text("only words\n")
    files = sorted(path.name for path in tmp_path.iterdir())
    trained = (f"data.train={annotations}", "batch_size=4", "out=out", "--dry-run")
    for file in files:
        for words in (
            ("convert", file, "out", "--tokenizer", model),
            ("embed", file, planted / "good.mp4", "--out", "out"),
            ("eval", file, annotations, "--out", "out"),
            ("caption", file, annotations, "out.jsonl"),
            ("train", "msrvtt", f"model.name={file}", *trained),
        ):
            status, said = run(*words)
            assert status == 1 and said.count("\n") == 1 and file in said, (words, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
