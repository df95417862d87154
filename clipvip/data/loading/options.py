"""Settings that loaders of files and of shards share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvip.data.video import check_sampling
from clipvip.ops.resize_crop import check_resize

TASKS = ("retrieval", "omnisource", "video")


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How clips become one rank's batches.

    num_workers and decoder change the speed, not which clips, frames and texts are in a batch.

    task: which texts and images a batch holds, see build_loader.
    tokenizer: a transformers CLIPTokenizer; None for task "video".
    batch_size: clips per batch of this rank.
    image_size: side of the square frames, in pixels.
    num_frames, sampling: frames per clip, and how they are chosen (clipvip.data.video.sampling).
    resize: how frames are made square (clipvip.ops.resize_crop).
    text_length: tokens at which texts are cut off.
    seed: random seed for the order of clips and the choice of frames and texts.
    num_workers: worker processes; 0 reads clips in this process.
    rank, world_size: number of this rank, and of ranks that share the data.
    max_bad_share: share of unreadable clips, among those tried, above which LoaderError is raised.
    bad_files: file to append unreadable and damaged files to; None for none.
    decoder: "pyav", "dali", or "auto" for DALI if there is a GPU on which it starts.

    Raises ValueError for a setting out of its range.
    """

    task: str
    tokenizer: Any
    batch_size: int
    image_size: int
    num_frames: int
    text_length: int
    sampling: str = "uniform"
    resize: str = "crop"
    seed: int
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    max_bad_share: float = 0.05
    bad_files: Path | None = None
    decoder: str = "pyav"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank} of {self.world_size}; expected 0 ≤ rank < world_size"
            )
        check_sampling(self.sampling)
        check_resize(self.resize)
