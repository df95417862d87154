"""Convert checkpoints: from any kind that `CLIPViPModel.from_pretrained` reads to a model folder,
to a plain CLIP of transformers, or to the authors' kind. This is `clipvip convert`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging

from clipvip.files import renamed_when_whole
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.checkpoints import FILE_SUFFIXES
from clipvip.model.configuration import VIDEO_OPTIONS
from clipvip.model.layouts import ADDED_TO_CLIP, authors_state_dict
from clipvip.model.pretrained import (
    check_name,
    failed_writes,
    found,
    is_plain_clip,
    needs_reference,
    no_bars,
    read_config,
)
from clipvip.model.processing import (
    AUTHORS_READING,
    CLIP_READING,
    NoTokenizer,
    image_processor_settings,
    read_settings,
    save_settings,
)

KINDS = ("clipvip", "clip", "authors")
logger = logging.get_logger(__name__)


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str = "clipvip",
    tokenizer: str | os.PathLike | None = None,
    activation: str | None = None,
    head_width: int | None = None,
    image_size: int | None = None,
    text_length: int | None = None,
) -> None:
    """Read a checkpoint of any kind that `CLIPViPModel.from_pretrained` takes, and write another.

    to: "clipvip" for a folder with our model and a processor that reads videos as the source's
        does; without a tokenizer, only how videos are read is saved, and a warning says so.
        "clip" for a folder with a plain CLIP of transformers, from a source that has no proxies.
        "authors" for one file that the authors' code loads.
    tokenizer: folder or hub name of the tokenizer; by default that of the source.
    activation, head_width: what a file of open_clip does not say; see `from_pretrained`.
    image_size, text_length: see `CLIPViPModel.from_pretrained`. The processor gets them too.
    `destination` appears only when it is complete. Raises FileExistsError if it exists, and
    ValueError if the format to write cannot hold the model.
    """
    if to not in KINDS:
        raise ValueError(f"to is {to!r}; expected {', '.join(map(repr, KINDS[:-1]))} or 'authors'")
    destination = Path(destination)
    check_name("the destination", destination)
    if to != "authors" and destination.suffix in FILE_SUFFIXES:
        raise ValueError(
            f"{destination} has the name of a file, but a folder would be written; give the name "
            "of a folder, or --to authors for a file"
        )
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it or choose another destination")
    with found("the model", source):
        plain = is_plain_clip(source)
        config = read_config(source, activation, head_width)
        by_reference = needs_reference(config)
    told: dict[str, Any] = {"activation": activation, "head_width": head_width}
    if to == "clip" and plain:  # without what would be added to it
        told |= {"num_proxies": 1, "frame_pooling": "mean"}
    if by_reference:  # nothing is computed here
        told["attention_backend"] = "reference"
    model = CLIPViPModel.from_pretrained(
        source, image_size=image_size, text_length=text_length, **told
    )
    _check_kind(source, model, to, plain)
    processor = _processor(source, tokenizer, model) if to != "authors" else None
    if processor is not None and text_length is not None:
        processor.fit(model.config, text_length)
    settings = CLIP_READING | (read_settings(source) if processor is None else processor.settings())
    settings["image_size"] = model.config.vision_config.image_size
    if text_length is not None:
        settings["text_length"] = text_length
    with renamed_when_whole(destination) as unfinished, failed_writes(), no_bars():
        if to == "authors":
            _save_for_authors(model, settings, source, unfinished)
        elif to == "clip":
            _save_clip(model, settings, unfinished)
        else:
            model.save_pretrained(unfinished)
            save_settings(unfinished, **settings)
        if processor is not None:
            processor.tokenizer.save_pretrained(unfinished)
        elif to != "authors":
            _warn_of_no_tokenizer(source, destination)
    if config.decoder_config is not None:
        logger.warning(f"{source} has a decoder, which is left out: {destination} cannot caption")
    if by_reference and to == "clipvip":
        logger.warning(
            f"{source} has heads of a size that the compiled attention does not take; "
            f"{destination} says attention_backend='reference', which is slower plain PyTorch"
        )
    if plain and to == "clipvip":
        logger.warning(
            f"{source} is not trained on video: train {destination} first, or convert it with "
            "--to clip to search with CLIP's own features"
        )


def _check_kind(source: str | os.PathLike, model: CLIPViPModel, to: str, plain: bool) -> None:
    """Raise ValueError if a format cannot hold a model."""
    text, vision = model.config.text_config, model.config.vision_config
    if to == "clip" and not plain:
        raise ValueError(
            f"{source} is a video model, and CLIP has no place for its proxies and temporal "
            "embedding; leave out --to clip"
        )
    heads = {tower.hidden_size // tower.num_attention_heads for tower in (text, vision)}
    activations = {text.hidden_act, vision.hidden_act}
    if to == "authors" and (activations != {"quick_gelu"} or heads != {64}):
        raise ValueError(
            f"{source} has activation {'/'.join(sorted(activations))} and heads of "
            f"{'/'.join(map(str, sorted(heads)))}, which the authors' format does not store: their "
            "code has quick_gelu and heads of 64; leave out --to authors"
        )


def _save_for_authors(
    model: CLIPViPModel, settings: dict[str, Any], source: str | os.PathLike, path: Path
) -> None:
    if any(settings[name] != value for name, value in AUTHORS_READING.items()):
        logger.warning(
            f"{source} reads videos by resize={settings['resize']!r} and "
            f"sampling={settings['sampling']!r}; the authors' code reads them otherwise"
        )
    with path.open("wb") as file:  # its errors give the reason, torch's do not
        torch.save(authors_state_dict(model), file)


def _save_clip(model: CLIPViPModel, settings: dict[str, Any], folder: Path) -> None:
    """Save the model without what CLIP lacks, and how transformers' CLIPImageProcessor reads."""
    towers = {
        name: getattr(model.config, name).to_dict() for name in ("text_config", "vision_config")
    }
    for name in ("model_type", *VIDEO_OPTIONS):
        towers["vision_config"].pop(name)
    config = CLIPConfig(**towers, projection_dim=model.config.projection_dim, dtype=model.dtype)
    with torch.device("meta"):
        clip = CLIPModel(config)
    weights = {k: v for k, v in model.state_dict().items() if k not in ADDED_TO_CLIP}
    clip.load_state_dict(weights, assign=True)
    clip.save_pretrained(folder)
    images = json.dumps(image_processor_settings(settings), indent=2)
    Path(folder, "preprocessor_config.json").write_text(images + "\n")


def _warn_of_no_tokenizer(source: str | os.PathLike, destination: Path) -> None:
    logger.warning(
        f"{source} has no tokenizer, so none is saved; convert again with one (such as "
        "--tokenizer openai/clip-vit-base-patch32), or add it: CLIPViPProcessor."
        f"from_pretrained({str(destination)!r}, tokenizer='openai/clip-vit-base-patch32')"
        f".save_pretrained({str(destination)!r})"
    )


def _processor(
    source: str | os.PathLike, tokenizer: str | os.PathLike | None, model: CLIPViPModel
) -> CLIPViPProcessor | None:
    """Load the processor; None if the source has no tokenizer and none was given."""
    try:
        processor = CLIPViPProcessor.from_pretrained(source, tokenizer=tokenizer)
    except (NoTokenizer, FileNotFoundError):
        if tokenizer is not None:
            raise
        return None
    processor.check_tokens(model.config)
    return processor
