"""A clip as it passes from reading to a batch."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clipvip.data.loading.bad_files import BadFile, Failure
from clipvip.data.video import Encoded, Frames

TRIES = 100  # clips tried in training in the place of an unreadable one


@dataclass(slots=True)
class Sample:
    """A clip of a batch: its frames and texts, and what was tried to read it.

    key: identifies it to BatchReader.read_sample.
    place: number of the clip among the data; another clip's if that one replaced it.
    attempt: how many clips were tried before this one.
    frames: uint8 [N, 3, S, S], or Encoded for DALI to decode; None if no clip could be read.
    image: uint8 [3, S, S], the annotated image or the clip's middle frame.
    decoder: "DALI" or "PyAV", with the reason why PyAV took the place of DALI.
    tried: places of all clips tried. failures: those that could not be read. damaged: files that
        were read, with some of their frames missing.
    """

    key: Hashable
    place: int
    attempt: int = 0
    frames: Tensor | Encoded | None = None
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

    def add_failure(self, path: str, reason: str, line: int) -> None:
        self.failures.append(Failure(self.place, BadFile(path, reason, line)))


class Report(NamedTuple):
    """How the samples of a batch were read. gave_up: TRIES clips in a row could not be read."""

    tried: list[int]
    failures: list[Failure]
    damaged: list[BadFile]
    decoders: list[str]
    gave_up: bool
