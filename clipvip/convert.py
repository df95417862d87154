"""Convert checkpoints: from any kind that `CLIPViPModel.from_pretrained` reads to ours or the
authors' kind. This is `clipvip convert`.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import logging

from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.checkpoints import FILE_SUFFIXES
from clipvip.model.layouts import authors_state_dict
from clipvip.model.pretrained import check_name, failed_writes
from clipvip.model.processing import (
    AUTHORS_READING,
    CLIP_READING,
    NoTokenizer,
    read_settings,
    save_settings,
)

logger = logging.get_logger(__name__)


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str = "clipvip",
    tokenizer: str | os.PathLike | None = None,
    activation: str | None = None,
    head_width: int | None = None,
) -> None:
    """Read a checkpoint of any kind that `CLIPViPModel.from_pretrained` takes, and write another.

    to: "clipvip" for a folder with our model and a processor that reads videos as the source's
        does; without a tokenizer, only how videos are read is saved, and a warning says so.
        "authors" for one file that the authors' code loads.
    tokenizer: folder or hub name of the tokenizer; by default that of the source.
    activation, head_width: what a file of open_clip does not say; see `from_pretrained`.
    `destination` appears only when it is complete. Raises FileExistsError if it exists.
    """
    if to not in ("clipvip", "authors"):
        raise ValueError(f"to is {to!r}; expected 'clipvip' or 'authors'")
    destination = Path(destination)
    check_name("the destination", destination)
    if to == "clipvip" and destination.suffix in FILE_SUFFIXES:
        raise ValueError(
            f"{destination} has the name of a file, but a folder would be written; give the name "
            "of a folder, or --to authors for a file"
        )
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it or choose another destination")
    model = CLIPViPModel.from_pretrained(source, activation=activation, head_width=head_width)
    size = model.config.vision_config.image_size
    processor = _processor(source, tokenizer, model) if to == "clipvip" else None
    destination.parent.mkdir(parents=True, exist_ok=True)
    beside = TemporaryDirectory(
        prefix=f".{destination.name}.", dir=destination.parent, ignore_cleanup_errors=True
    )
    with beside as folder, failed_writes():
        unfinished = Path(folder, destination.name)
        if to == "authors":
            reading = CLIP_READING | read_settings(source)
            if any(reading[name] != value for name, value in AUTHORS_READING.items()):
                logger.warning(
                    f"{source} reads videos by resize={reading['resize']!r} and "
                    f"sampling={reading['sampling']!r}; the authors' code reads them otherwise"
                )
            with unfinished.open("wb") as file:  # its errors give the reason, torch's do not
                torch.save(authors_state_dict(model), file)
        elif processor is not None:
            model.save_pretrained(unfinished)
            processor.image_size = size
            processor.save_pretrained(unfinished)
        else:
            model.save_pretrained(unfinished)
            save_settings(unfinished, **(read_settings(source) | {"image_size": size}))
            logger.warning(
                f"{source} has no tokenizer, so none is saved; convert again with one (such as "
                "--tokenizer openai/clip-vit-base-patch32), or add it: CLIPViPProcessor."
                f"from_pretrained({str(destination)!r}, tokenizer='openai/clip-vit-base-patch32')"
                f".save_pretrained({str(destination)!r})"
            )
        os.rename(unfinished, destination)


def _processor(
    source: str | os.PathLike, tokenizer: str | os.PathLike | None, model: CLIPViPModel
) -> CLIPViPProcessor | None:
    """Load the processor; None if the source has no tokenizer and none was given."""
    try:
        processor = CLIPViPProcessor.from_pretrained(source, tokenizer=tokenizer)
        processor.check_tokens(model.config)
        return processor
    except (NoTokenizer, FileNotFoundError):
        if tokenizer is not None:
            raise
        return None
