"""Captions of clips, by a model with a decoder: loads it, reads clips, and generates.

Evaluation and `clipvip describe` generate through this module.
"""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch

from clipvip.data.annotations import Clip
from clipvip.data.loading import BadFile
from clipvip.embedding import read_clips
from clipvip.files import shown
from clipvip.model import CLIPViPForCaptioning, CLIPViPProcessor
from clipvip.model.checkpoints import is_checkpoint_file
from clipvip.model.pretrained import found, hub_options, read_json

BEAMS = 5


def has_decoder(source: str | PathLike, **options: Any) -> bool:
    """Whether a model folder or hub name holds a decoder, so that it can caption.

    options: options of `from_pretrained`. Raises FileNotFoundError if there is no such model.
    """
    return _config(source, options).get("decoder_config") is not None


def _config(source: str | PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """Return a model's config.json; that of a checkpoint file, which has none, is empty."""
    with found("the model", source, options.get("subfolder") or ""):
        return {} if is_checkpoint_file(source) else read_json(source, "config.json", options)


def load_for_captioning(
    source: str | PathLike, **options: Any
) -> tuple[CLIPViPForCaptioning, CLIPViPProcessor]:
    """Load a model and its processor to caption with, not to train.

    source: folder or hub name. options: options of `CLIPViPForCaptioning.from_pretrained`.
    Returns the model in eval mode on the CPU, and a processor that fits it. Raises
    FileNotFoundError if there is no model, and ValueError if it has no decoder.
    """
    config = _config(source, options)
    if (kind := config.get("model_type", "clip")) not in ("clip", "clipvip"):
        raise ValueError(
            f"{shown(source)} holds a {shown(repr(kind))[:50]} model; expected one that clipvip "
            "has trained to caption. Other models caption the clips of a file: "
            f"clipvip caption {shown(source)} ANNOTATIONS.jsonl OUT.jsonl"
        )
    if config.get("decoder_config") is None:
        raise ValueError(
            f"the model {shown(source)} has no decoder, so it cannot caption videos; train one "
            f"first: clipvip train msrvtt_captions model.name={shown(source)} out=… data.train=…"
        )
    with found("the model", source, options.get("subfolder") or ""):
        processor = CLIPViPProcessor.from_pretrained(source, **hub_options(options))
        model = CLIPViPForCaptioning.from_pretrained(source, **options)
        processor.fit(model.config, options.get("text_length"))
    return model, processor


@torch.inference_mode()
def caption_clips(
    model: CLIPViPForCaptioning,
    processor: CLIPViPProcessor,
    clips: Sequence[Clip],
    bad_files: list[BadFile],
    *,
    beams: int = BEAMS,
    length: int | None = None,
    **options: Any,
) -> Iterator[dict[int, str]]:
    """Caption one rank's share of clips, one batch per step, in the caller's `autocast`.

    beams: width of the beam search. length: number of tokens at which a caption is cut off; None
        for that of the texts in training.
    The other arguments are those of clipvip.embedding.read_clips. Yields index in `clips` →
    caption. Clips that cannot be read are left out and added to bad_files after the last batch.
    Raises ValueError, before a clip is read, if beams or length is out of its range.
    """
    most = processor.longest_text - 1 if length is None else length
    model.check_search(beams, most)
    for batch, frames, offsets in read_clips(model, processor, clips, bad_files, **options):
        tokens = model.generate(frames, offsets, num_beams=beams, max_new_tokens=most)
        yield dict(zip(batch["clip_index"].tolist(), processor.captions(tokens), strict=True))
