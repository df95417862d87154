"""Turn clips and texts into vectors with a model that is loaded for it.

The index and evaluation embed through this module, so that search needs no training package.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig
from transformers.utils import logging

from clipvip import distributed
from clipvip.data.annotations import Clip
from clipvip.data.loading import (
    BadFile,
    Division,
    Facts,
    LoaderOptions,
    MomentBatch,
    PartReader,
    build_loader,
    divide_files,
    moment_batches,
    worker_count,
)
from clipvip.data.video import Span, start_engine
from clipvip.files import shown
from clipvip.inputs import send, sent_ahead, tokenize
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.pretrained import found, hub_options, read_json
from clipvip.model.processing import normalize_frames
from clipvip.ops import _native

logger = logging.get_logger(__name__)

PRECISIONS = ("auto", "bf16", "no")


def load_for_embedding(
    source: str | PathLike, **options: Any
) -> tuple[CLIPViPModel, CLIPViPProcessor]:
    """Load a model and its processor to embed videos and texts with, not to train.

    A plain CLIP has no trained proxies. Unless frame_pooling is given, here or in its config.json,
    it is loaded without them: a video's feature is then the mean of CLIP's own features of its
    frames, and a warning says so.

    source: folder or hub name for `CLIPViPModel.from_pretrained`, which also holds a tokenizer.
    options: options of `CLIPViPModel.from_pretrained`, such as frame_pooling="proxy".
    Returns the model in eval mode on the CPU, and a processor that fits it. Raises
    FileNotFoundError if there is no model.
    """
    with found("the model", source, options.get("subfolder") or ""):
        processor = CLIPViPProcessor.from_pretrained(source, **hub_options(options))
        config = read_json(source, "config.json", options)
        given = {**config, **(config.get("vision_config") or {}), **options}
        if config.get("model_type") != "clipvip" and "frame_pooling" not in given:
            options = {"frame_pooling": "mean", "num_proxies": 1, **options}
        model = CLIPViPModel.from_pretrained(source, **options)
        processor.fit(model.config, options.get("text_length"))
        _warn_if_untrained(source, model)
    return model, processor


def _warn_if_untrained(source: str | PathLike, model: CLIPViPModel) -> None:
    """Warn of proxies that were added to a plain CLIP if the temporal embedding is still zero."""
    added = model.vision_model.embeddings.added_cls is not None
    if added and not model.vision_model.embeddings.temporal_embedding.any():
        logger.warning(
            f"{shown(source)} has video proxies that were never trained, so its features are not "
            "those of the CLIP that they were added to; train it, or convert that CLIP again with "
            "--to clip"
        )


def precision_on(model: CLIPViPModel, mixed_precision: str) -> str:
    """Return the precision, "bf16" or "no", in which a model computes on its device.

    mixed_precision: "bf16" for autocast over the model's weights, as in training; "no" for the
        weights' own precision; "auto" for bf16 on a CUDA GPU or a CPU (AVX512-BF16) that computes
        in it, else "no".

    Weights in fp16 cannot be mixed with bf16: "auto" is "no" for them, and "bf16" a ValueError.
    """
    return precision_of(model.dtype, model.device, mixed_precision)


def precision_of(dtype: torch.dtype, device: torch.device, mixed_precision: str) -> str:
    """Return what `precision_on` says of a model whose weights are stored in `dtype`."""
    if mixed_precision not in PRECISIONS:
        raise ValueError(
            f"mixed_precision is {mixed_precision!r}; expected one of {', '.join(PRECISIONS)}"
        )
    mixable = dtype != torch.float16
    if mixed_precision == "bf16" and not mixable:
        raise ValueError('mixed_precision is "bf16", but the model\'s weights are fp16; use no')
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if mixable and _computes_in_bf16(device) else "no"


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _native.module().cpu_capability() == "avx512bf16"


def autocast(model: CLIPViPModel, mixed_precision: str) -> torch.autocast:
    """Return a context in which a model computes in this precision; see `precision_on`."""
    enabled = precision_on(model, mixed_precision) == "bf16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


@torch.inference_mode()
def embed_clips(
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    clips: Sequence[Clip],
    bad_files: list[BadFile],
    **options: Any,
) -> Iterator[dict[int, Tensor]]:
    """Embed one rank's share of clips, one batch per step, in the caller's `autocast`.

    Arguments are those of `read_clips`. Yields index in `clips` → unit feature [P], fp32 on the
    CPU.
    """
    for batch, frames, offsets in read_clips(model, processor, clips, bad_files, **options):
        features = _video_features(model, frames, offsets)
        yield dict(zip(batch["clip_index"].tolist(), features, strict=True))


class Embedded(NamedTuple):
    """A file whose moments are embedded.

    place: in the files given. spans: start and end of each moment in seconds, by their start; None
    for the file's own. vectors: unit features of the moments, fp32 [n, P] on the CPU. duration:
    seconds, 0 for an image. date: when it was recorded, in seconds since 1970, if its container
    says so.
    """

    place: int
    spans: list[Span]
    vectors: Tensor
    duration: float
    date: float | None


@torch.inference_mode()
def embed_files(
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    files: Sequence[tuple[Path, Sequence[Span] | None]],
    bad_files: list[BadFile],
    *,
    window: float,
    stride: float,
    scenes: bool,
    batch_size: int,
    num_workers: int | None,
    decoder: str,
    on_moments: Callable[[int], None] = lambda moments: None,
    order: Iterable[int] | None = None,
) -> Iterator[Embedded]:
    """Embed the moments of files, in the caller's `autocast`, and yield each file once all of its
    moments are embedded, in that order.

    A moment's vector is the feature of Clip(path, start, end). What cannot be read is left out: a
    file without any readable moment is not yielded, and each file that lacks moments is added to
    bad_files, with the reason.

    files: paths of videos and images, each with the spans of its moments; None to divide it.
    window, stride: length of windows and seconds from one to the next. A video no longer than a
        window is one moment, (None, None), as is an image. See clipvip.data.loading.spans.
    scenes: divide videos into scenes instead, and scenes longer than two windows into windows.
    batch_size: moments per batch. num_workers: processes that decode; None for one per core.
    decoder: see clipvip.data.loading.LoaderOptions.
    on_moments: called with the number of moments in each batch, once they are embedded.
    order: places of the files to read, asked for one by one just before each is read; by default
        all. DALI reads all files in their own order.

    Raises ValueError for a window or a stride out of its range.
    """
    reading = processor.loading()
    reading.pop("text_length")
    reader = PartReader(files, Division(window, stride, scenes), **reading)
    workers = worker_count(num_workers, sys.maxsize)  # the number of parts is not known
    if start_engine(decoder) is not None:
        options = {"batch_size": batch_size, "num_workers": workers, "decoder": decoder}
        yield from _embed_as_clips(model, processor, reader, bad_files, on_moments, options)
        return

    def send_frames(batch: MomentBatch) -> dict[str, Tensor]:
        if not batch.moments:
            return {}
        given = {"pixel_values": batch.pixel_values, "frame_offsets": batch.frame_offsets}
        return {key: send(value, model.device) for key, value in given.items()}

    rows: dict[int, list[tuple[Span, Tensor]]] = defaultdict(list)
    places = range(len(files)) if order is None else order
    batches = moment_batches(reader, places, bad_files, batch_size, workers)
    for batch, sent in sent_ahead(batches, send_frames, model.device):
        if sent:
            frames = normalize_frames(
                sent["pixel_values"], processor.image_mean, processor.image_std
            )
            features = _video_features(model, frames, sent["frame_offsets"])
            for (place, span), row in zip(batch.moments, features, strict=True):
                rows[place].append((span, row))
            on_moments(len(features))
        for file in batch.done:
            spans, vectors = zip(*rows.pop(file.place), strict=True)
            yield Embedded(file.place, [*spans], torch.stack(vectors), file.duration, file.date)


def _embed_as_clips(
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    reader: PartReader,
    bad_files: list[BadFile],
    on_moments: Callable[[int], None],
    options: dict[str, Any],
) -> Iterator[Embedded]:
    """Embed each moment as a clip of its own, as DALI decodes them; see embed_files."""
    clips: list[Clip] = []
    owners: list[int] = []
    facts: dict[int, Facts] = {}
    for place, file in divide_files(reader, bad_files, options["num_workers"]):
        facts[place] = file
        clips += [Clip(reader.files[place][0], *span) for span in file.spans]
        owners += [place] * len(file.spans)
    if not clips:
        return
    rows: dict[int, list[tuple[Span, Tensor]]] = defaultdict(list)

    def embedded(place: int) -> Embedded:
        spans, vectors = zip(*rows.pop(place), strict=True)
        return Embedded(
            place, [*spans], torch.stack(vectors), facts[place].duration, facts[place].date
        )

    for features in embed_clips(model, processor, clips, bad_files, **options):
        for number, row in features.items():
            clip = clips[number]
            rows[owners[number]].append(((clip.start, clip.end), row))
        on_moments(len(features))
        for place in [place for place in rows if place < owners[max(features)]]:
            yield embedded(place)
    for place in [*rows]:
        yield embedded(place)


def _video_features(model: CLIPViPModel, frames: Tensor, offsets: Tensor) -> Tensor:
    """Return unit features of videos, fp32 [B, P] on the CPU."""
    return F.normalize(model.get_video_features(frames, offsets).float(), dim=-1).cpu()


def read_clips(
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    clips: Sequence[Clip],
    bad_files: list[BadFile],
    *,
    batch_size: int,
    num_workers: int,
    decoder: str,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Read one rank's share of clips as inputs of the model, one batch per step.

    Yields the loader's batch (see clipvip.data.loading.build_loader; its clip_index says which
    clips it holds), and on the model's device frames [F, 3, S, S], fp32 and normalised, and
    frame_offsets int32 [B+1]. Clips that cannot be read are left out; after the last batch, their
    files are appended to bad_files.

    batch_size: clips per batch. num_workers, decoder: see clipvip.data.loading.LoaderOptions.
    rank, world_size: this rank and the number of ranks that share the clips.
    """
    options = LoaderOptions(
        task="video",
        tokenizer=None,
        batch_size=batch_size,
        seed=0,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        max_bad_share=1.0,  # the caller judges the clips of all ranks
        decoder=decoder,
        **processor.loading(),
    )
    loader = build_loader(clips, options, training=False)

    def send_frames(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: send(batch[key], model.device) for key in ("pixel_values", "frame_offsets")}

    for batch, sent in sent_ahead(loader, send_frames, model.device):
        frames = normalize_frames(sent["pixel_values"], processor.image_mean, processor.image_std)
        yield batch, frames, sent["frame_offsets"]
    bad_files += loader.bad_files


def fingerprint(model: CLIPViPModel, processor: CLIPViPProcessor) -> str:
    """Hash all weights, how videos are read and how features are computed from them; not the
    model's folder."""
    reading = {name: value for name, value in processor.loading().items() if name != "text_length"}
    colours = processor.image_mean, processor.image_std
    whole = sorted(reading.items()), colours, model.config.vision_config.frame_pooling
    digest = hashlib.sha256(f"{whole};".encode())
    towers = [
        (each.hidden_act, each.hidden_size // each.num_attention_heads)
        for each in (model.config.text_config, model.config.vision_config)
    ]
    if set(towers) != {("quick_gelu", 64)}:  # which weights do not show
        digest.update(f"{towers};".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def embed_texts(
    model: CLIPViPModel, processor: CLIPViPProcessor, texts: Sequence[str], batch_size: int
) -> Tensor:
    """Embed texts, shared out over the ranks, in the caller's `autocast`: unit features [n, P],
    fp32 on the CPU, in order."""
    rank, world = distributed.rank(), distributed.world_size()
    # The batches do not depend on the number of ranks, so neither do the features.
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    own = []
    for batch in batches[rank::world]:
        ids, padded = tokenize(processor.tokenizer, batch, processor.longest_text)
        mask = needed_mask(model.text_model.config, ids, padded, model.device)
        mask = None if mask is None else send(mask, model.device)
        own.append(text_features(model, send(ids, model.device), mask).cpu())
    parts: list[Tensor] = [torch.empty(0)] * len(batches)
    for first, theirs in enumerate(distributed.all_gather_objects(own)):
        parts[first::world] = theirs
    return torch.cat(parts)


def text_features(model: CLIPViPModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Embed a batch of texts: unit features [n, P], fp32.

    ids, mask: int64 [n, length], on the model's device; mask as `needed_mask` returns it.
    """
    config = model.text_model.config
    if mask is not None and config._attn_implementation == "sdpa" and _is_causal(config):
        mask = causal_mask(mask)
    return F.normalize(model.get_text_features(ids, mask).float(), dim=-1)


def needed_mask(
    config: CLIPTextConfig, ids: Tensor, mask: Tensor, device: torch.device
) -> Tensor | None:
    """Return the mask of a batch of texts, or None if their features on `device` are the same
    without it.

    A causal tower reads a text's feature at its end token, to which later tokens mean nothing. So
    padding behind it needs no mask. On a GPU, where PyTorch has flash attention only without a
    mask, none is given then; on a CPU, padding is always masked.

    config: configuration of the text tower.
    ids, mask: int64 [n, length], on the CPU; mask is 0 for padding.
    """
    if mask.all():
        return None
    if device.type != "cuda" or not _is_causal(config):
        return mask
    # The token whose feature is the text's, as transformers' CLIPTextModel finds it.
    end: Any = config.eos_token_id
    pooled = (ids if end == 2 else ids.eq(end).int()).argmax(-1)
    visible = mask.bool().cumprod(-1).gather(-1, pooled[:, None])  # no padding up to that token
    return None if visible.all() else mask


def causal_mask(mask: Tensor) -> Tensor:
    """Mask of text attention, bool [n, 1, length, length]: True where a token attends to another,
    which is an earlier one or itself, and never padding.

    mask: [n, length], 0 for padding. transformers builds the same mask, but first asks whether
    there is any padding at all, for which the host waits for the GPU.
    """
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return earlier & mask.bool()[:, None, None]


def _is_causal(config: CLIPTextConfig) -> bool:
    return getattr(config, "is_causal", True)  # transformers looks there too


def join_texts(clips: Sequence[Clip], paragraph: bool) -> list[Clip]:
    """Return the clips; if paragraph, all texts of a clip are joined into one."""
    if not paragraph:
        return list(clips)
    return [replace(clip, text=(" ".join(clip.text),)) if clip.text else clip for clip in clips]
