"""Settings of loaders, and a clip on its way from reading to a batch of tensors."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from clipvip.data.loading.bad_files import BadFile, Failure
from clipvip.data.loading.roles import COMPARED
from clipvip.data.video import Encoded, Frames, check_sampling
from clipvip.inputs import tokenize
from clipvip.ops.resize_crop import check_resize

TASKS = ("retrieval", "omnisource", "video")
TRIES = 100  # clips tried in training instead of an unreadable one

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How clips become one rank's batches.

    num_workers and decoder change the speed, not which clips, frames and texts are in a batch.

    task: which texts and images a batch holds, see build_loader.
    tokenizer: a transformers CLIPTokenizer; None for task "video".
    compared: for task "omnisource", which of subtitle, frame and caption the loss compares; see
        clipvip.data.loading.roles.
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
    compared: tuple[str, ...] = COMPARED
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


@dataclass(slots=True)
class Sample:
    """A clip of a batch: its frames and texts, and what was tried to read it.

    key: identifies it to BatchReader.read_sample.
    place: number of the clip among the data; another clip's if that one replaced it.
    attempt: how many clips were tried before this one.
    frames: uint8 [N, 3, S, S], or Encoded for DALI to decode; None if no clip could be read. N is 0
        for an image that is not embedded as a video.
    times: for task "video", when each frame is shown, in seconds from the start of its video.
    image: uint8 [3, S, S], the annotated image or the clip's middle frame.
    decoder: "DALI" or "PyAV", with the reason why PyAV took the place of DALI.
    tried: places of all clips tried. failures: those that could not be read. damaged: files that
        were read, with some of their frames missing.
    """

    key: Hashable
    place: int
    attempt: int = 0
    frames: Tensor | Encoded | None = None
    times: tuple[float, ...] = ()
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    decoder: str = "PyAV"
    tried: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    damaged: list[BadFile] = field(default_factory=list)

    def hold(self, decoded: Frames | Encoded) -> None:
        """Hold the clip's frames, and its middle frame, if given, as the image."""
        if isinstance(decoded, Encoded):
            self.frames = decoded
            return
        self.frames = decoded.frames
        if decoded.middle is not None:
            self.image = decoded.middle


class Report(NamedTuple):
    """How the samples of a batch were read. gave_up: TRIES clips in a row could not be read."""

    tried: list[int]
    failures: list[Failure]
    damaged: list[BadFile]
    decoders: list[str]
    gave_up: bool


def collate(samples: list[Sample], options: LoaderOptions) -> tuple[Batch | None, Report]:
    """Pack samples into a batch, see build_loader; None if none of them could be read."""
    read = [sample for sample in samples if sample.frames is not None]
    report = Report(
        [place for sample in samples for place in sample.tried],
        [failure for sample in samples for failure in sample.failures],
        [file for sample in samples for file in sample.damaged],
        [sample.decoder for sample in read],
        any(len(sample.failures) == TRIES for sample in samples),
    )
    return (_pack(read, options) if read else None), report


def _pack(samples: list[Sample], options: LoaderOptions) -> Batch:
    tokens = partial(tokenize, options.tokenizer, text_length=options.text_length)
    frames = cast(list[Tensor], [sample.frames for sample in samples])
    batch = {
        "pixel_values": torch.cat(frames),
        "frame_offsets": torch.tensor([0, *map(len, frames)]).cumsum(0).to(torch.int32),
        "clip_index": torch.tensor([sample.place for sample in samples]),
    }
    if options.task == "video":
        times = [seconds for sample in samples for seconds in sample.times]
        batch["frame_times"] = torch.tensor(times, dtype=torch.float64)
    elif options.task == "retrieval":
        texts = [text for sample in samples for text in sample.texts]
        batch["text_ids"], batch["text_mask"] = tokens(texts)
        owners = [sample.place for sample in samples for _ in sample.texts]
        batch["text_clip"] = torch.tensor(owners)
    elif options.task == "omnisource":
        for name in ("subtitle", "caption"):
            given = [getattr(sample, name) for sample in samples]
            batch[f"{name}_ids"], batch[f"{name}_mask"] = tokens([text or "" for text in given])
            batch[f"{name}_present"] = torch.tensor([text is not None for text in given])
        batch["video_present"] = batch["frame_offsets"].diff() > 0
        batch["image"] = torch.stack([s.image for s in samples if s.image is not None])
    return batch
