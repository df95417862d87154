"""Text-video retrieval of a model over an annotation file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipvip import distributed
from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import BadFile, LoaderError
from clipvip.embedding import embed_clips, embed_texts, join_texts, load_for_embedding
from clipvip.files import shown, write_whole
from clipvip.model import CLIPViPModel
from clipvip.model.processing import CLIPViPProcessor
from clipvip.retrieval import METRICS, TABLES, both_directions
from clipvip.training import watch
from clipvip.training.config import Preempted, TrainConfig


def evaluate(
    model: CLIPViPModel,
    clips: Sequence[Clip],
    processor: CLIPViPProcessor,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    max_bad_share: float = 0.05,
    decoder: str = "auto",
    dtype: torch.dtype | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Both directions of retrieval, with and without DSL, over all ranks' shares together.

    Every clip and every text counts once, and is embedded in the same batch, on any number of
    ranks, so that figures do not depend on it. A clip that cannot be decoded is in `missing`, it
    and its texts are left out of the tables; more than max_bad_share of such clips is an error.

    Args:
        clips: those without text are rivals in text→video only.
        processor: says how clips and texts are read.
        decoder: see clipvip.data.loading.LoaderOptions.
        dtype: autocast the towers to it; None for the weights' own.
        asked_to_stop: asked before each batch.

    Returns:
        {"text_to_video", "video_to_text", "text_to_video_dsl", "video_to_text_dsl": {"R@1",
        "R@5", "R@10" in percent, "median_rank", "mean_rank"}, "clips": number of clips
        compared, "texts": of texts, "missing": paths}; the same on every rank.

    Raises:
        Preempted: on all ranks, where any was asked to stop.
        LoaderError: too many clips cannot be decoded.
    """
    clips = join_texts(clips, processor.paragraph)
    texts = [(index, text) for index, clip in enumerate(clips) for text in clip.text]
    if not texts:
        raise ValueError(f"none of the {len(clips)} clips has a text to search with")
    training = model.training
    model.eval()
    device = model.device.type
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype is not None):
        videos = _embed_videos(
            *(model, clips, processor, batch_size, num_workers, max_bad_share, decoder),
            asked_to_stop,
        )
        sentences = embed_texts(model, processor, [text for _, text in texts], batch_size)
    model.train(training)

    if not videos:
        raise ValueError(f"none of the {len(clips)} clips could be read")
    seen = sorted(videos)
    row_of_clip = {clip: row for row, clip in enumerate(seen)}
    asked = [i for i, (clip, _) in enumerate(texts) if clip in row_of_clip]
    video_of_text = torch.tensor([row_of_clip[texts[i][0]] for i in asked])
    # One computes them for all, as what is done next, such as saving the best, hangs on them.
    tables = distributed.first_does(
        lambda: both_directions(
            torch.stack([videos[clip] for clip in seen]), sentences[asked], video_of_text
        )
    )
    missing = [str(clip.video) for index, clip in enumerate(clips) if index not in row_of_clip]
    return {**tables, "clips": len(seen), "texts": len(asked), "missing": missing}


def evaluate_checkpoint(
    checkpoint: str | Path,
    annotations: str | Path,
    *,
    out: str | Path | None = None,
    num_frames: int | None = None,
    text_length: int | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    max_bad_share: float = 0.05,
    decoder: str = "auto",
    backend: str = "native",
    print_table: bool = True,
) -> dict[str, Any]:
    """What `clipvip eval` does: load, evaluate, print a table, write JSON.

    Args:
        checkpoint: anything load_for_embedding takes.
        annotations: JSON Lines; texts are the queries.
        out: JSON file for the result; written whole or not at all.
        num_frames, text_length: by default as the checkpoint's processor says.
        max_bad_share: of clips that may be unreadable; they are left out and listed.
        decoder: see clipvip.data.loading.LoaderOptions.

    Under torchrun the clips are shared out over the processes.
    """
    state = distributed.start(TrainConfig.timeout)
    with watch.Watch(TrainConfig.lost_after):
        clips = load_annotations(annotations)
        model, processor = load_for_embedding(checkpoint, attention_backend=backend)
        processor.num_frames = num_frames or processor.num_frames
        processor.text_length = text_length or processor.text_length
        result = evaluate(
            model.to(state.device),
            clips,
            processor,
            batch_size=batch_size,
            num_workers=num_workers,
            max_bad_share=max_bad_share,
            decoder=decoder,
        )
    result = {"checkpoint": str(checkpoint), "annotations": str(annotations), **result}
    if state.is_main_process:
        try:
            if out is not None:
                write_whole(Path(out), json.dumps(result, indent=2) + "\n")
        finally:  # the file may be refused
            if print_table:
                print_result(result)
    return result


def print_result(result: dict[str, Any]) -> None:
    """The four tables as one, a row each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['clips']} clips, {result['texts']} texts", title_justify="left")
    table.add_column("direction")
    for metric in METRICS:
        table.add_column(metric.replace("_", " "), justify="right")
    for name in TABLES:
        label = name.replace("_to_", " → ").replace("_dsl", " + DSL")
        table.add_row(label, *(f"{result[name][metric]:.1f}" for metric in METRICS))
    console = Console()
    console.print(table)
    if result["missing"]:
        console.print(f"{len(result['missing'])} clips could not be read and were left out:")
        for path in result["missing"]:
            console.print(f"  {shown(path)}", markup=False, highlight=False, soft_wrap=True)


def _embed_videos(
    model: CLIPViPModel,
    clips: Sequence[Clip],
    processor: CLIPViPProcessor,
    batch_size: int,
    num_workers: int,
    max_bad_share: float,
    decoder: str,
    asked_to_stop: Callable[[], bool],
) -> dict[int, Tensor]:
    """Index of each clip that could be read → its unit feature [P], fp32 on the CPU."""
    unread: list[BadFile] = []
    batches = embed_clips(
        *(model, processor, clips, unread),
        batch_size=batch_size,
        num_workers=num_workers,
        decoder=decoder,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    own: dict[int, Tensor] = {}
    stopped = asked_to_stop()
    for part in () if stopped else batches:
        own.update(part)
        if stopped := asked_to_stop():
            break
    if any(distributed.all_gather_objects(stopped)):
        raise Preempted("SIGTERM: the evaluation ends before its last clip")
    videos: dict[int, Tensor] = {}
    bad: list[BadFile] = []
    features = torch.stack(list(own.values())) if own else torch.empty(0)  # else sent one by one
    for places, part, files in distributed.all_gather_objects((list(own), features, unread)):
        videos.update(zip(places, part, strict=True))
        bad += files
    missing = len(clips) - len(videos)
    if missing > max_bad_share * len(clips):
        last = f"; the last: {bad[-1].path}: {bad[-1].reason}" if bad else ""
        raise LoaderError(
            f"{missing} of {len(clips)} clips could not be read "
            f"({missing / len(clips):.1%}, allowed {max_bad_share:.1%}){last}"
        )
    return videos
