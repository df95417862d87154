"""Search a collection of videos: an index of moments in LanceDB, and what embeds and asks it."""

from typing import Any

from clipvip.index.rows import FileState, Hit, Moment, Where

__all__ = ["FileState", "Hit", "Moment", "Where"]


def __getattr__(name: str) -> Any:
    if name in ("Index", "build_index", "load_index", "search", "IndexedClip"):  # until replaced
        from clipvip.index import old

        return getattr(old, name)
    raise AttributeError(name)
