"""What an index holds, and what a search asks for and returns.

Search imports neither torch nor transformers, which take seconds to load. So vectors are NumPy
arrays here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class FileState:
    """A file of an index, as it was when it was embedded.

    path: absolute; bytes that are not UTF-8 are lone surrogates, as everywhere in Python.
    size, mtime_ns: bytes and modification time; with an equal `plan`, the file is unchanged.
    content: hash of size and parts of the content, see clipvip.index.build.content_of. Files of
        equal content have equal vectors.
    plan: how the file was divided into moments, such as "windows 10 5", "scenes" or a hash of the
        spans that annotations give.
    duration: seconds; 0 for an image.
    date: when it was recorded, if its container says so, else when it was last modified; seconds
        since 1970.
    """

    path: str
    size: int
    mtime_ns: int
    content: str
    plan: str
    duration: float
    date: float


@dataclass(frozen=True, slots=True)
class Moment:
    """One row of an index: a span of a file, with one unit vector.

    id: 16 hexadecimal digits, a hash of path, start and end.
    start, end: seconds from the start of the file, None for the file's own start or end.
    """

    id: str
    file: FileState
    start: float | None
    end: float | None


@dataclass(frozen=True, slots=True)
class Where:
    """Which files a search looks at; None leaves a limit out.

    folder: files in it and below; an absolute path, except for VideoIndex, which makes it one.
    min_duration, max_duration: seconds, of the whole file.
    after, before: seconds since 1970; after ≤ date < before.
    """

    folder: str | None = None
    min_duration: float | None = None
    max_duration: float | None = None
    after: float | None = None
    before: float | None = None


class About(NamedTuple):
    """What an index says of itself.

    model: absolute path or hub name. fingerprint: of its weights and of how it reads videos, see
    clipvip.embedding.fingerprint. width: values per vector. sources: what was given to embed.
    """

    model: str
    fingerprint: str
    width: int
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search: the best moment, and the stretch of the video around it that matches.

    score: cosine of the query and the best moment (a weighted sum of queries is a unit vector too).
    start, end: seconds, the best moment; None for the file's own start or end.
    from_, to: seconds, all touching moments that match nearly as well; see clipvip.index.hits.
    caption: what the best moment shows, one line, if the index has a caption of it; not safe to
        print, as a stranger may have written it.
    """

    score: float
    moment: Moment
    from_: float | None
    to: float | None
    caption: str | None = None

    @property
    def path(self) -> str:
        return self.moment.file.path

    @property
    def start(self) -> float | None:
        return self.moment.start

    @property
    def end(self) -> float | None:
        return self.moment.end

    def as_json(self) -> dict[str, Any]:
        """Return the hit as `clipvip search --json` and the page's API give it."""
        file = self.moment.file
        return {
            "score": round(self.score, 6),
            "path": file.path,
            "start": self.start,
            "end": self.end,
            "from": self.from_,
            "to": self.to,
            "id": self.moment.id,
            "duration": file.duration,
            "date": file.date,
            "caption": self.caption,
        }
