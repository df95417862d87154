"""Load a model to embed with rather than to train."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip import distributed
from clipvip.data.annotations import Clip
from clipvip.data.loading import ClipLoader
from clipvip.model import CLIPViPModel
from clipvip.model.pretrained import found, hub_options, is_plain_clip, read_config
from clipvip.model.processing import CLIPViPProcessor, normalize_frames
from clipvip.text import tokenize


def load_for_embedding(
    source: str | PathLike, **options: Any
) -> tuple[CLIPViPModel, CLIPViPProcessor]:
    """Load a model and its processor to embed videos and texts with, not to train.

    A plain CLIP's proxies would be untrained, so it is loaded without them unless frame_pooling
    is given, here or in its config.json: a video's feature is then the mean of CLIP's own
    features of its frames, and that is logged.

    source: a folder or hub name that `CLIPViPModel.from_pretrained` takes, its tokenizer with it.
    options: of `CLIPViPModel.from_pretrained`, such as frame_pooling="proxy".
    Returns the model in eval mode on the CPU, and a processor that fits it. Raises
    FileNotFoundError where there is no model.
    """
    with found("the model", source, options.get("subfolder") or ""):
        processor = CLIPViPProcessor.from_pretrained(source, **hub_options(options))
        config = read_config(source, options)
        given = {**config, **(config.get("vision_config") or {}), **options}
        if is_plain_clip(config) and "frame_pooling" not in given:
            options = {"frame_pooling": "mean", "num_proxies": 1, **options}
        model = CLIPViPModel.from_pretrained(source, **options)
        processor.fit(model.config)
    return model, processor


def with_texts_read(clips: Sequence[Clip], paragraph: bool) -> list[Clip]:
    """The clips with their texts joined to one, if they are to be read as a paragraph."""
    if not paragraph:
        return list(clips)
    return [replace(clip, text=(" ".join(clip.text),)) if clip.text else clip for clip in clips]


def embed_batches(
    model: CLIPViPModel, processor: CLIPViPProcessor, loader: ClipLoader
) -> Iterator[dict[int, Tensor]]:
    """For each batch of a loader: clip_index → unit feature [P], fp32 on the CPU."""
    for batch in loader:
        frames = normalize_frames(
            batch["pixel_values"].to(model.device), processor.image_mean, processor.image_std
        )
        features = model.get_video_features(frames, batch["frame_offsets"].to(model.device))
        features = F.normalize(features.float(), dim=-1).cpu()
        yield dict(zip(batch["clip_index"].tolist(), features, strict=True))


def embed_texts(
    model: CLIPViPModel,
    texts: Sequence[str],
    processor: CLIPViPProcessor,
    batch_size: int,
) -> Tensor:
    """Unit features [n, P] in the order of the texts, fp32 on the CPU."""
    rank, world = distributed.rank(), distributed.world_size()
    chunks = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    own = []
    for chunk in chunks[rank::world]:  # the same chunks on any number of ranks
        ids, mask = tokenize(processor.tokenizer, chunk, processor.longest_text)
        features = model.get_text_features(ids.to(model.device), mask.to(model.device))
        own.append(F.normalize(features.float(), dim=-1).cpu())
    parts: list[Tensor] = [torch.empty(0)] * len(chunks)
    for first, given in enumerate(distributed.all_gather_objects(own)):
        parts[first::world] = given
    return torch.cat(parts)
