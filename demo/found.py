"""What the sentences of clips find, and whether it is their own clip."""

from pathlib import Path

from clipvip.data.annotations import Clip
from clipvip.index import Hit, VideoIndex

OVERLAP = 0.5  # least intersection over union of a moment that counts as found

# Clips, each with all hits of the search for its sentence, best first.
Found = list[tuple[Clip, list[Hit]]]


def search_all(index: VideoIndex, clips: list[Clip]) -> Found:
    """Search for the sentence of each clip. Returns each clip with all hits, best first."""
    return [(clip, index.search(clip.text[0], index.count)) for clip in clips]


def overlap(hit: Hit, clip: Clip) -> float:
    """Intersection over union of a hit's best moment and a clip, which may be part of a film."""
    if Path(hit.path) != clip.video.resolve():
        return 0.0
    if hit.start is None or hit.end is None or clip.start is None or clip.end is None:
        return 1.0
    shared = max(0.0, min(hit.end, clip.end) - max(hit.start, clip.start))
    return shared / (hit.end - hit.start + clip.end - clip.start - shared)


def margin(hits: list[Hit], clip: Clip) -> float:
    """Score of a clip's own hit minus that of the best other hit: above 0 if it is found first."""
    own = max((hit.score for hit in hits if overlap(hit, clip) >= OVERLAP), default=-1.0)
    return own - max((hit.score for hit in hits if overlap(hit, clip) < OVERLAP), default=-1.0)
