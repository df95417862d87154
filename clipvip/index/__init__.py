"""Search a collection of videos: an index of moments in LanceDB, and what embeds and asks it."""

from typing import Any

from clipvip.index.rows import About, FileState, Hit, Moment, Where
from clipvip.index.video_index import VideoIndex

__all__ = ["About", "FileState", "Hit", "Moment", "VideoIndex", "Where"]


def __getattr__(name: str) -> Any:
    if name in ("Index", "build_index", "load_index", "search", "IndexedClip"):  # until replaced
        from clipvip.index import old

        return getattr(old, name)
    raise AttributeError(name)
