"""The command `clipvip`: parse, call, print."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

Model = Annotated[Positional[str], arg(metavar="MODEL")]
INDEXES = (Path("index"), Path("demo/out/clip_vip/index"))
Annotations = Annotated[Positional[Path], arg(metavar="ANNOTATIONS.jsonl")]


def train(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE …]")] = (),
) -> None:
    """Post-pretrain or fine-tune by a configuration.

    Several processes: `torchrun --nproc-per-node 8 -m clipvip.training CONFIG.yaml key=value`.

    Args:
        config: A YAML file, or the name of a packaged one (pretrain, msrvtt, didemo, …).
        overrides: Settings that replace the file's, as key=value (optimizer.lr=1e-6).
    """
    from clipvip.training.__main__ import main as train_main

    train_main([config, *overrides])


def evaluate(
    model: Model,
    annotations: Annotations,
    out: Path | None = None,
) -> None:
    """Measure text-video retrieval: both directions, with and without dual softmax.

    Args:
        model: A model folder, hub name, or one of the authors' .pt files.
        annotations: JSON Lines, one clip a line, with `video` and `text`.
        out: Also write the figures to this JSON file.
    """
    from clipvip.training.evaluate import evaluate_checkpoint

    evaluate_checkpoint(model, annotations, out=out)


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION")],
    to: Literal["clipvip", "authors"] = "clipvip",
) -> None:
    """Convert a checkpoint: CLIP or the authors' into ours, or ours into the authors' names.

    Args:
        source: A model folder, hub name, or one of the authors' .pt files.
        destination: A folder (to clipvip) or a .pt file (to authors).
        to: The layout to write.
    """
    from clipvip.model.conversion import convert as convert_checkpoint

    convert_checkpoint(source, destination, to=to)


def embed(
    model: Model,
    videos: Annotated[Positional[Path], arg(metavar="VIDEOS")],
    out: Path = Path("index"),
) -> None:
    """Embed one's own videos into an index that can be searched by text.

    Args:
        model: A model folder or hub name.
        videos: A folder, searched recursively, or an annotations file (JSON Lines).
        out: Where the index goes; videos that are in it and unchanged are not embedded again.
    """
    from clipvip.index import build_index

    build_index(model, videos, out)


def search(
    query: Annotated[Positional[str], arg(metavar="QUERY")],
    index: Path | None = None,
    k: Annotated[int, arg(aliases=["-k"])] = 10,
) -> None:
    """Rank the videos of an index by a sentence.

    Args:
        query: What to look for, in words.
        index: A folder that `clipvip embed` made; by default ./index, or where there is none,
            that of the demo.
        k: How many videos to show.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from clipvip.index import search as search_index

    index = index or next((path for path in INDEXES if path.is_dir()), INDEXES[0])
    video = Column("video", overflow="fold")
    table = Table("rank", "score", video, "seconds", title=query)
    for rank, hit in enumerate(search_index(index, query, k), start=1):
        path = hit.path.relative_to(Path.cwd()) if hit.path.is_relative_to(Path.cwd()) else hit.path
        whole = hit.start is None and hit.end is None
        span = "" if whole else f"{hit.start or 0:g}–{'' if hit.end is None else f'{hit.end:g}'}"
        table.add_row(str(rank), f"{hit.score:.3f}", str(path), span)
    Console().print(table)


def doctor() -> None:
    """Say what was built, what runs here, and what is missing."""
    from clipvip.doctor import report

    if not report():
        raise SystemExit(1)


COMMANDS: dict[str, Any] = {
    "train": train,
    "eval": evaluate,
    "convert": convert,
    "embed": embed,
    "search": search,
    "doctor": doctor,
}


def main() -> None:
    """Runs one command; an error that the user can mend is one line and exit status 1."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="clipvip", description="Video-text models from CLIP, trained fast."
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("CLIPVIP_TRACEBACK"):
            raise
        print(f"clipvip: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
