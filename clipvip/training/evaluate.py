"""Metrics of a model on annotated clips: of text-video retrieval, or of captions."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipvip import distributed
from clipvip.caption_metrics import check_installed, score_captions
from clipvip.captioning import BEAMS, caption_clips, has_decoder, load_for_captioning
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
from clipvip.model import CLIPViPForCaptioning, CLIPViPModel, CLIPViPProcessor
from clipvip.retrieval import METRICS, TABLES, both_directions
from clipvip.training import watch
from clipvip.training.config import Preempted, TrainConfig

EXAMPLES = 5  # captions that are printed with their metrics
Result = TypeVar("Result", Tensor, str)


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
        videos = _of_all_ranks(batches, asked_to_stop, _as_one_tensor)
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


def evaluate_captions(
    model: CLIPViPForCaptioning,
    clips: Sequence[Clip],
    processor: CLIPViPProcessor,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    max_bad_share: float = 0.05,
    decoder: str = "auto",
    mixed_precision: str = "auto",
    beams: int = BEAMS,
    length: int | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Caption clips, and score each caption against the clip's texts, over all ranks.

    As in `evaluate`, whose other arguments and errors these are, the results do not depend on the
    number of ranks, and clips that cannot be decoded are listed in `missing`. Clips without a
    text are left out: there is nothing to compare with.

    beams, length: see clipvip.captioning.caption_clips.

    Returns, the same on every rank, {"captions": metrics by name (clipvip.caption_metrics),
    "clips", "texts": numbers of those compared, "missing": paths, "generated": [{"video", "start",
    "end", "caption", "texts"}] of each clip}.
    """
    check_installed()
    clips = [clip for clip in join_texts(clips, processor.paragraph) if clip.text]
    if not clips:
        raise ValueError("none of the clips has a text to compare captions with")
    precision, training = autocast(model, mixed_precision), model.training
    model.eval()
    with torch.inference_mode(), precision:
        unread: list[BadFile] = []
        batches = caption_clips(
            *(model, processor, clips, unread),
            beams=beams,
            length=length,
            batch_size=batch_size,
            num_workers=num_workers,
            decoder=decoder,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        captions = _of_all_ranks(batches, asked_to_stop)
        _check_missing(len(clips) - len(captions), len(clips), max_bad_share, unread)
    model.train(training)
    if not captions:
        raise ValueError(f"none of the {len(clips)} clips could be read")
    told = {index: clips[index] for index in sorted(captions)}
    scores = distributed.first_does(
        lambda: score_captions(
            [captions[index] for index in told], [clip.text for clip in told.values()]
        )
    )
    generated = [
        {
            "video": str(clip.video),
            "start": clip.start,
            "end": clip.end,
            "caption": captions[index],
            "texts": list(clip.text),
        }
        for index, clip in told.items()
    ]
    return {
        "captions": scores,
        "clips": len(told),
        "texts": sum(len(clip.text) for clip in told.values()),
        "missing": [str(clip.video) for index, clip in enumerate(clips) if index not in captions],
        "generated": generated,
    }


def evaluate_checkpoint(
    checkpoint: str | Path,
    annotations: str | Path,
    *,
    task: str | None = None,
    out: str | Path | None = None,
    backend: str | None = None,
    mixed_precision: str = "auto",
    print_table: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Load a model, evaluate it, print a table and write JSON, as `clipvip eval` does.

    Under torchrun each rank reads a share of the clips.

    checkpoint: model that load_for_embedding accepts.
    annotations: JSON Lines, whose texts are the queries, or what captions are compared with.
    task: "retrieval" or "captioning"; None for captioning if the model has a decoder.
    out: JSON file for the result, written whole or not at all.
    backend: attention_backend of the model; by default that of its configuration.
    mixed_precision: see clipvip.embedding.precision_on; the result names what was chosen.
    options: options of `evaluate` and `evaluate_captions`: batch_size, num_workers, max_bad_share,
        decoder; of the latter also beams and length.

    Raises ValueError if a model without a decoder is to caption.
    """
    state = distributed.start(TrainConfig.timeout)
    with watch.Watch(TrainConfig.lost_after):
        clips = load_annotations(annotations)
        given_backend = {} if backend is None else {"attention_backend": backend}
        captions = has_decoder(checkpoint) if task is None else task == "captioning"
        load: Any = load_for_captioning if captions else load_for_embedding
        model, processor = load(checkpoint, **given_backend)
        model.to(state.device)
        precision = precision_on(model, mixed_precision)
        measure: Any = evaluate_captions if captions else evaluate
        result = measure(model, clips, processor, mixed_precision=precision, **options)
    given = {"checkpoint": str(checkpoint), "annotations": str(annotations)}
    given["task"] = "captioning" if captions else "retrieval"
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
    """Print a table with a row per direction, with and without DSL; of captions, their metrics and
    those of the first clips."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['clips']} clips, {result['texts']} texts", title_justify="left")
    captions = result.get("captions")
    if captions is None:
        table.add_column("direction")
    for metric in METRICS if captions is None else captions:
        table.add_column(metric.replace("_", " "), justify="right")
    if captions is not None:
        table.add_row(*(f"{value:.1f}" for value in captions.values()))
    for name in TABLES if captions is None else ():
        label = name.replace("_to_", " → ").replace("_dsl", " + DSL")
        table.add_row(label, *(f"{result[name][metric]:.1f}" for metric in METRICS))
    console = Console()
    console.print(table)
    for row in result.get("generated", ())[:EXAMPLES]:
        line = f"{shown(row['video'])}: {shown(row['caption'])}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if result["missing"]:
        console.print(f"{len(result['missing'])} clips could not be read and were left out:")
        for path in result["missing"]:
            console.print(f"  {shown(path)}", markup=False, highlight=False, soft_wrap=True)


def _as_one_tensor(features: list[Tensor]) -> Tensor:
    return torch.stack(features) if features else torch.empty(0)


def _of_all_ranks(
    batches: Iterator[dict[int, Result]],
    asked_to_stop: Callable[[], bool],
    pack: Callable[[list[Result]], Any] = lambda results: results,
) -> dict[int, Result]:
    """Collect the results of all ranks' clips by the clips' indices. pack: makes a rank's results
    ready to be sent."""
    own: dict[int, Result] = {}
    while not (stopped := asked_to_stop()) and (batch := next(batches, None)) is not None:
        own.update(batch)
    if any(distributed.all_gather_objects(stopped)):
        raise Preempted("SIGTERM: the evaluation ends before its last clip")
    found: dict[int, Result] = {}
    for indices, theirs in distributed.all_gather_objects((list(own), pack(list(own.values())))):
        found.update(zip(indices, theirs, strict=True))
    return found


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
