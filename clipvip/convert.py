"""TODO."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from clipvip.model.authors import authors_state_dict
from clipvip.model.pretrained import failed_writes

logger = logging.get_logger(__name__)


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str = "clipvip",
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Read a checkpoint of any kind `CLIPViPModel.from_pretrained` takes, and write another.

    to="clipvip": a folder with our model and its processor, which reads videos as the source's
        does. Where there is no tokenizer, that is logged and how videos are read is saved alone.
    to="authors": one file that the authors' code loads.
    tokenizer: a folder or hub name whose tokenizer is taken; by default the source's.
    Nothing is at `destination` before all of it is there. Raises FileExistsError where something
    already is.
    """
    from clipvip.model.modeling import CLIPViPModel
    from clipvip.model.pretrained import check_name
    from clipvip.model.processing import CLIPViPProcessor, NoTokenizer, read_settings, save_settings

    if to not in ("clipvip", "authors"):
        raise ValueError(f"to is {to!r}; expected 'clipvip' or 'authors'")
    destination = Path(destination)
    check_name("the destination", destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it or choose another destination")
    model = CLIPViPModel.from_pretrained(source)
    size = model.config.vision_config.image_size
    processor = None
    if to == "clipvip":
        try:
            processor = CLIPViPProcessor.from_pretrained(source, tokenizer=tokenizer)
            processor.check_tokens(model.config)
        except (NoTokenizer, FileNotFoundError):
            if tokenizer is not None:
                raise
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _written_then_renamed(destination) as unfinished, failed_writes():
        if to == "authors":
            reading = {"resize": "crop", "sampling": "uniform"} | read_settings(source)
            if (reading["resize"], reading["sampling"]) != ("squash", "authors"):
                logger.warning(
                    f"{source} reads videos by resize={reading['resize']!r} and "
                    f"sampling={reading['sampling']!r}, which the authors' code does not"
                )
            with unfinished.open("wb") as file:  # its errors say why; torch's do not
                torch.save(authors_state_dict(model), file)
            return
        model.save_pretrained(unfinished)
        if processor is None:
            save_settings(unfinished, **(read_settings(source) | {"image_size": size}))
            logger.warning(
                f"{source} holds no tokenizer, so none is saved; convert it again with one (such "
                "as --tokenizer openai/clip-vit-base-patch32), or add it: CLIPViPProcessor."
                f"from_pretrained({str(destination)!r}, tokenizer='openai/clip-vit-base-patch32')"
                f".save_pretrained({str(destination)!r})"
            )
        else:
            processor.image_size = size
            processor.save_pretrained(unfinished)


@contextlib.contextmanager
def _written_then_renamed(destination: Path) -> Iterator[Path]:
    """A path beside `destination` that takes its name when the block ends well."""
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield folder / destination.name
        os.rename(folder / destination.name, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
