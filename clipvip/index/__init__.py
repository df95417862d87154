"""Search a collection of videos: an index of moments in LanceDB, and what embeds and asks it.

    collection ── changes ── build ── store ── hits ── video_index
    paths to      what is    embeds   tables   rows    VideoIndex
    clips         new        it                to hits

captions.py keeps captions of moments, which describe.py writes.
query.py and tower.py turn a query into a vector; memory.py holds all vectors for a server.
"""

from clipvip.index.rows import About, FileState, Hit, Moment, Where
from clipvip.index.video_index import VideoIndex

__all__ = ["About", "FileState", "Hit", "Moment", "VideoIndex", "Where"]
