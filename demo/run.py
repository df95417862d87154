"""Train text-video retrieval from scratch on one small machine: `python -m demo.run`.

Renders clips, post-pretrains and fine-tunes a small CLIP-ViP on them through the package's own
trainer, and trains a decoder that captions them. Does the same with mean-pooled frames, and
measures both on clips that neither has seen, and on films in which those clips follow each other.
Everything goes to demo/out: results.json, results.png, index.html, the models, search indexes.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.utils import logging

from clipvip.caption_metrics import exact_match
from clipvip.data.annotations import load_annotations
from clipvip.index import VideoIndex
from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor
from clipvip.training.config import load_config
from clipvip.training.evaluate import evaluate_checkpoint
from clipvip.training.trainer import train
from demo.found import Found, margin, search_all
from demo.render import FRAMES as CLIP_FRAMES
from demo.render import RATE, render_all, render_films
from demo.report import page, plot

HERE = Path(__file__).parent
OUT = HERE / "out"
SEED = 1
QUERY = "a red triangle moves up and to the right"  # as in the README
FRAMES, IMAGE, PATCH, WIDTH, LAYERS, TEXT_LENGTH = 6, 48, 12, 64, 3, 24
MODELS = {
    "clip_vip": {"num_proxies": 4, "frame_pooling": "proxy"},
    "mean_pool": {"num_proxies": 1, "frame_pooling": "mean"},
}
STAGES = ("pretrain", "finetune", "captions")  # each starts from the model of the one before
INDEXES = {"clips": "index", "films": "films"}  # folders beside the model's runs
# Length and stride in seconds. A clip is as long as its window, so it is one moment. For the films,
# both together are less than the shortest shot, so that every shot holds a window without a cut.
WINDOWS = {"clips": (CLIP_FRAMES / RATE, CLIP_FRAMES / RATE), "films": (2.75, 0.75)}
SURE = 1e-4  # margin of cosines that is safe against rounding in another process


def main() -> None:
    started = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        print(f"\n[{minutes}:{seconds:02}] {text}", flush=True)

    # Tensors this small gain little from a second thread; decoding uses it better.
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of loading and saving models
    shutil.rmtree(OUT, ignore_errors=True)
    say("rendering clips and films")
    splits = render_all(OUT / "clips", SEED, os.cpu_count() or 1)
    splits["films"] = render_films(OUT, SEED)
    tokenizer = train_tokenizer(splits["train"])
    runs = {}
    for name in MODELS:
        say(f"{name}: training")
        runs[name] = train_model(name, tokenizer, splits)

    say("measuring on held-out clips and films")
    clips = load_annotations(splits["heldout"])
    results: dict[str, Any] = {"chance": chance(len(clips)), "held_out_clips": len(clips)}
    found: dict[str, dict[str, Found]] = {}
    captions: dict[str, list[dict[str, Any]]] = {}
    for name in reversed(MODELS):
        # The last stage freezes what searches, so its model is measured in both.
        last = runs[name]["captions"] / "last"
        results[name], found[name] = measure(last, OUT / name, splits)
        results[name]["captions"], captions[name] = measure_captions(last, splits["heldout"])
    results["seconds"] = round(time.monotonic() - started)
    (OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(runs, results, OUT / "results.png")
    page(found, captions, results, OUT / "results.png", OUT / "index.html")
    show(results)
    say("captioning the moments of clips and films, so that searches show what was found")
    for folder in INDEXES.values():
        index = VideoIndex(OUT / "clip_vip" / folder)
        index.describe(runs["clip_vip"]["captions"] / "last", beams=1)
    for kind, hits in found["clip_vip"].items():
        search_again(kind, hits, OUT / "clip_vip" / INDEXES[kind])
    films = shlex.quote(str(OUT / "clip_vip" / INDEXES["films"]))
    print(f"\nTo search the films in a browser: clipvip serve --index {films}")
    say(f"done; see {OUT / 'index.html'}, results.png and results.json beside it")


def train_model(name: str, tokenizer: CLIPTokenizer, splits: dict[str, Path]) -> dict[str, Path]:
    """Train a new model in all stages. Returns the folder of each stage's run."""
    checkpoint = OUT / name / "start"
    untrained(tokenizer, MODELS[name]).save_pretrained(checkpoint)
    processor(tokenizer).save_pretrained(checkpoint)
    runs = {}
    for stage in STAGES:
        out = OUT / name / stage
        overrides = {
            "out": out,
            "model.name": checkpoint,
            "data.train": splits["train"],
            "data.validation": splits["validation"],
            "seed": SEED,
        }
        train(load_config(HERE / f"{stage}.yaml", [f"{k}={v}" for k, v in overrides.items()]))
        runs[stage], checkpoint = out, out / "last"
    return runs


def measure(
    checkpoint: Path, out: Path, splits: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, Found]]:
    """Measure a model on the held-out clips and the films, and write an index of either to `out`.

    Returns its figures, and what each sentence found among "clips" and in "films".
    """
    tables = evaluate_checkpoint(checkpoint, splits["heldout"], task="retrieval", print_table=False)
    figures = {
        direction: {cut: round(tables[direction][cut], 2) for cut in ("R@1", "R@5", "R@10")}
        for direction in ("text_to_video", "video_to_text")
    }
    found = {}
    for kind, split, folder in (("clips", "heldout", "clips/heldout"), ("films", "films", "films")):
        index = VideoIndex(out / INDEXES[kind], in_memory=True)
        window, stride = WINDOWS[kind]
        index.add(OUT / folder, checkpoint, window=window, stride=stride)
        found[kind] = search_all(index, load_annotations(splits[split]))
    first = [margin(hits, shot) > 0 for shot, hits in found["films"]]
    figures["films"] = {"R@1": round(100 * sum(first) / len(first), 2)}
    return figures, found


def measure_captions(
    checkpoint: Path, annotations: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Caption the held-out clips. Returns figures of the captions, and a row per clip."""
    result = evaluate_checkpoint(checkpoint, annotations, print_table=False)
    rows = result["generated"]
    exact = exact_match([row["caption"] for row in rows], [row["texts"] for row in rows])
    figures = {"exact": exact, **result["captions"]}
    return {name: round(value, 2) for name, value in figures.items()}, rows


def search_again(kind: str, found: Found, index: Path) -> None:
    """Run the README's search on an index as a user would, or another one that finds its clip."""
    margins = {clip.text[0]: margin(hits, clip) for clip, hits in found}
    command = ["search", to_search(margins, kind), "--index", str(index), "-k", "5"]
    print("\n$ clipvip " + shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "clipvip.cli", *command], check=True)


def to_search(margins: dict[str, float], where: str) -> str:
    """Choose a sentence that is found first: QUERY, or else the one with the widest margin.

    The second case is printed. where: what is searched, for the messages.
    Raises SystemExit if no sentence is found first.
    """
    widest = max(margins, key=lambda sentence: margins[sentence])
    first = sum(margin > SURE for margin in margins.values())
    if not first:
        raise SystemExit(f"{where}: none of {len(margins)} held-out sentences is found first")
    if margins[QUERY] > SURE:
        return QUERY
    print(
        f"\n“{QUERY}”, the README's example, is not found first in the {where} of this run; "
        f"{first} of {len(margins)} sentences are. This one is by the widest margin:"
    )
    return widest


def train_tokenizer(annotations: Path) -> CLIPTokenizer:
    """Train a byte-pair tokenizer of CLIP's kind on the sentences of the training clips."""
    sentences = [
        sentence
        for clip in load_annotations(annotations)
        for sentence in (*clip.text, clip.subtitle, clip.caption)
        if sentence
    ]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIP's tokenizer also needs every byte as the end of a word. Given before training, these have
    # the same numbers in every run, so equally frequent pairs merge in the same order.
    ends = [character + "</w>" for character in alphabet]
    learned.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=1024,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            special_tokens=ends,
            show_progress=False,
        ),
    )
    state = json.loads(learned.to_str())["model"]
    vocabulary = [*state["vocab"], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[tuple(merge) for merge in state["merges"]],
        model_max_length=TEXT_LENGTH,
    )


def processor(tokenizer: CLIPTokenizer) -> CLIPViPProcessor:
    """Make a processor that normalises frames so that their dark backgrounds are near zero."""
    return CLIPViPProcessor(
        tokenizer,
        image_size=IMAGE,
        image_mean=[0.18] * 3,
        image_std=[0.25] * 3,
        num_frames=FRAMES,
    )


def untrained(tokenizer: CLIPTokenizer, options: dict[str, Any]) -> CLIPViPModel:
    """Make a new model with initial weights that suit a few hundred training clips.

    CLIP's own initial weights are meant for hundreds of millions of pairs. Here the embeddings of
    place and time start as smooth waves instead of noise (place) and zero (time), so that
    neighbouring frames look alike from the first step. Words start large compared with the special
    tokens, so that sentences differ. A motion shows where a shape is at which time, a product of
    place and time. So pixels start small beside these, and the vision tower's MLPs start less
    linear.
    """
    torch.manual_seed(SEED)
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": WIDTH // 32,
    }
    text = {
        **tower,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **tower,
        "num_hidden_layers": LAYERS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "num_frames": FRAMES,
        **options,
    }
    model = CLIPViPModel(
        CLIPViPConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=128,
            logit_scale_init_value=2.66,
        )
    )
    side = IMAGE // PATCH
    column, row = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    quarter = WIDTH // 4
    places = torch.cat([waves(x.flatten(), side, quarter) for x in (column, row)], 1)
    times = waves(torch.arange(FRAMES), FRAMES, 2 * quarter)
    # Places and times each get half of the channels; one rotation mixes all channels.
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    seen = model.vision_model.embeddings
    words = model.text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        seen.patch_embedding.weight.normal_(std=0.01)
        for layer in model.vision_model.encoder.layers:
            layer.mlp.fc1.weight.mul_(1.5)
        seen.class_embedding.normal_()
        if seen.added_cls is not None:
            seen.added_cls.normal_()
        seen.position_embedding.weight[0] = 0
        seen.position_embedding.weight[1:] = places @ rotation[: 2 * quarter]
        seen.temporal_embedding[0] = times @ rotation[2 * quarter :]
        words.normal_(std=0.3)
        words[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = 0
    return model


def waves(place: Tensor, count: int, channels: int) -> Tensor:
    """Sines and cosines of ½ to 2 half turns over places 0 … count-1, centred: [n, channels]."""
    turns = torch.linspace(0.5, 2, channels // 2) * torch.pi
    angle = (place[:, None] + 0.5) / count * turns
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return (wave - wave.mean(0)) / 2**0.5


def chance(clips: int) -> dict[str, dict[str, float]]:
    """Expected figures if that many clips are ranked at random, or moments or sentences drawn."""
    recall = {f"R@{k}": round(100 * k / clips, 2) for k in (1, 5, 10)}
    one = recall["R@1"]
    return {
        "text_to_video": recall,
        "video_to_text": recall,
        "films": {"R@1": one},
        "captions": {"exact": one},
    }


def show(results: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print(f"\n{results['held_out_clips']} held-out clips       text → video           video → text")
    cuts = f"{'R@1':>7}{'R@5':>7}{'R@10':>7}"
    print(f"{'':22}{cuts}  {cuts}  {'films R@1':>11}  {'captions':>9}")
    for name in ("chance", "mean_pool", "clip_vip"):
        rows = [
            "".join(f"{value:7.1f}" for value in results[name][direction].values())
            for direction in ("text_to_video", "video_to_text")
        ]
        films, captions = results[name]["films"]["R@1"], results[name]["captions"]["exact"]
        print(f"{name:22}{rows[0]}  {rows[1]}  {films:11.1f}  {captions:9.1f}")
    print("captions: % that equal the clip's own sentence, word for word")


if __name__ == "__main__":
    main()
