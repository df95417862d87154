"""Text-video retrieval: metrics of a model on annotated clips."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipvip import distributed
from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import BadFile, LoaderError
from clipvip.embedding import (
    autocast,
    embed_clips,
    embed_texts,
    join_texts,
    load_for_embedding,
    precision_on,
)
from clipvip.files import shown, write_whole
from clipvip.model import CLIPViPModel, CLIPViPProcessor
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
    mixed_precision: str = "auto",
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure both directions of retrieval, with and without dual softmax (DSL), over all ranks.

    Every clip and text counts once, and batches do not depend on the number of ranks, so neither do
    the results. A clip that cannot be decoded is listed in `missing`; it and its texts are left out
    of the tables.

    clips: clips to rank; those without a text are candidates in text→video only.
    processor: processor of the model, which decides how clips and texts are read.
    batch_size: clips or texts that a rank embeds at a time, with num_workers processes that decode.
    max_bad_share: share of clips that may be unreadable.
    decoder: see clipvip.data.loading.LoaderOptions.
    mixed_precision: "auto", "bf16" or "no", see clipvip.embedding.precision_on.
    asked_to_stop: function called before each batch; True ends the evaluation.

    Returns, the same on every rank, {"text_to_video", "video_to_text", "text_to_video_dsl",
    "video_to_text_dsl": {"R@1", "R@5", "R@10" in percent, "median_rank", "mean_rank"}, "clips",
    "texts": numbers of those compared, "missing": paths}.

    Raises Preempted on all ranks if one was asked to stop, LoaderError if too many clips cannot be
    decoded, and ValueError if there is no clip or no text to compare.
    """
    clips = join_texts(clips, processor.paragraph)
    texts = [(index, text) for index, clip in enumerate(clips) for text in clip.text]
    if not texts:
        raise ValueError(f"none of the {len(clips)} clips has a text to search with")
    precision, training = autocast(model, mixed_precision), model.training
    model.eval()
    with torch.inference_mode(), precision:
        unread: list[BadFile] = []
        batches = embed_clips(
            *(model, processor, clips, unread),
            batch_size=batch_size,
            num_workers=num_workers,
            decoder=decoder,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        videos = _of_all_ranks(batches, asked_to_stop)
        _check_missing(len(clips) - len(videos), len(clips), max_bad_share, unread)
        sentences = embed_texts(model, processor, [text for _, text in texts], batch_size)
    model.train(training)

    if not videos:
        raise ValueError(f"none of the {len(clips)} clips could be read")
    row_of_clip = {clip: row for row, clip in enumerate(sorted(videos))}
    features = torch.stack([videos[clip] for clip in row_of_clip])
    asked = [i for i, (clip, _) in enumerate(texts) if clip in row_of_clip]
    video_of_text = torch.tensor([row_of_clip[texts[i][0]] for i in asked])
    # The first rank computes them for all: whether all save a best checkpoint depends on them.
    tables = distributed.first_does(
        lambda: both_directions(features, sentences[asked], video_of_text)
    )
    missing = [str(clip.video) for index, clip in enumerate(clips) if index not in videos]
    return {**tables, "clips": len(videos), "texts": len(asked), "missing": missing}


def evaluate_checkpoint(
    checkpoint: str | Path,
    annotations: str | Path,
    *,
    out: str | Path | None = None,
    backend: str | None = None,
    mixed_precision: str = "auto",
    print_table: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Load a model, evaluate it, print a table and write JSON, as `clipvip eval` does.

    Under torchrun each rank reads a share of the clips.

    checkpoint: model that load_for_embedding accepts.
    annotations: JSON Lines, whose texts are the queries.
    out: JSON file for the result, written whole or not at all.
    backend: attention_backend of the model; by default that of its configuration.
    mixed_precision: see clipvip.embedding.precision_on; the result names what was chosen.
    options: options of `evaluate`: batch_size, num_workers, max_bad_share, decoder.
    """
    state = distributed.start(TrainConfig.timeout)
    with watch.Watch(TrainConfig.lost_after):
        clips = load_annotations(annotations)
        given_backend = {} if backend is None else {"attention_backend": backend}
        model, processor = load_for_embedding(checkpoint, **given_backend)
        model.to(state.device)
        precision = precision_on(model, mixed_precision)
        result = evaluate(model, clips, processor, mixed_precision=precision, **options)
    given = {"checkpoint": str(checkpoint), "annotations": str(annotations)}
    result = {**given, "mixed_precision": precision, **result}
    if state.is_main_process:
        try:
            if out is not None:
                write_whole(Path(out), json.dumps(result, indent=2) + "\n")
        finally:  # also if the file cannot be written
            if print_table:
                print_result(result)
    return result


def print_result(result: dict[str, Any]) -> None:
    """Print a table with a row per direction, with and without DSL."""
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


def _of_all_ranks(
    batches: Iterator[dict[int, Tensor]], asked_to_stop: Callable[[], bool]
) -> dict[int, Tensor]:
    """Collect the features of all ranks' clips: index → [P], fp32 on the CPU."""
    own: dict[int, Tensor] = {}
    while not (stopped := asked_to_stop()) and (batch := next(batches, None)) is not None:
        own.update(batch)
    if any(distributed.all_gather_objects(stopped)):
        raise Preempted("SIGTERM: the evaluation ends before its last clip")
    features = torch.stack(list(own.values())) if own else torch.empty(0)  # sent as one tensor
    videos: dict[int, Tensor] = {}
    for indices, theirs in distributed.all_gather_objects((list(own), features)):
        videos.update(zip(indices, theirs, strict=True))
    return videos


def _check_missing(missing: int, clips: int, max_bad_share: float, unread: list[BadFile]) -> None:
    """Raise LoaderError, on all ranks, if too many clips are missing. unread: this rank's."""
    if missing <= max_bad_share * clips:
        return
    bad = list(itertools.chain(*distributed.all_gather_objects(unread)))
    last = f"; the last: {bad[-1].path}: {bad[-1].reason}" if bad else ""
    raise LoaderError(
        f"{missing} of {clips} clips could not be read "
        f"({missing / clips:.1%}, allowed {max_bad_share:.1%}){last}"
    )
