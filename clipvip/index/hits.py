"""From the scores of moments to hits: the stretches of videos that match a query.

Windows of a video overlap, and a scene lasts longer than one window. So a film that fits would
fill a page with nearly equal rows. This module returns each matching stretch once:

1. The scores of a file's moments, in the order of time, are its curve. Two moments touch if they
   overlap or if one starts where the other ends. A peak is a moment to which no better one touches.
   Of equal scores, the earlier counts as better.
2. Half height is halfway from the median of the file's scores up to the peak. A peak's stretch is
   the peak and all that can be reached from it over touching moments of at least half height: its
   full width at half maximum. Moments that contain the peak do not widen it. A peak that does not
   rise above the median is its own stretch.
3. Peaks are taken from best to worst. One whose stretch touches that of a better peak of the same
   file belongs to that one, and is no hit of its own. So between two hits of a film the curve falls
   below the half height of both.

A hit names the peak as its best moment, and its score. A file of one moment is one hit. How a file
is divided depends on its own scores alone, not on other files, on k or on the number of candidates.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from clipvip.index.rows import FileState, Hit, Moment, Where
from clipvip.index.tables import moment_id

FILES_AT_ONCE = 256  # whose curves are read, if k is less
ROUNDING = 1e-6  # of scores in fp32: nearer ones count as equal until they are computed again


class Curve(NamedTuple):
    """All moments of one file, with the scores of a query.

    start, end: float64 [n], seconds, NaN for the file's own start or end. scores: float32 [n].
    """

    file: FileState
    start: np.ndarray
    end: np.ndarray
    scores: np.ndarray


class Stretch(NamedTuple):
    """A peak of a curve: its row, and start and end of its stretch, None for the file's own."""

    row: int
    from_: float | None
    to: float | None


class Source(Protocol):
    """Where moments are: an index on disk, or in memory."""

    def candidates(
        self, vector: np.ndarray, most: int, where: Where | None
    ) -> tuple[list[str], np.ndarray]:
        """Return files, and bounds of the scores of their best moments, best first.

        A moment that is better than the last bound is in one of these files. Fewer than `most` are
        returned if there are no other moments. A file may appear again with lower bounds.
        """

    def curves(self, vector: np.ndarray, paths: Sequence[str]) -> list[Curve]:
        """Return the curves of these files, in any order."""


def scores_of(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the scores of vectors [n, P] for a query float64 [P]: float32 [n].

    They are summed in double precision, so that a moment's score is the same whichever others are
    computed with it.
    """
    return (vectors.astype(np.float64, copy=False) @ query).astype(np.float32)


def best_hits(source: Source, vector: np.ndarray, k: int, where: Where | None) -> list[Hit]:
    """Return the k best hits for a unit vector [P], best first, then by path and time."""
    most, at_once = 16 * k + 1024, k  # on disk, an hour of film takes 720 places
    seen: set[str] = set()
    found: list[Hit] = []
    while True:
        paths, bounds = source.candidates(vector, most, where)
        order = [path for path in dict.fromkeys(paths) if path not in seen]
        best = dict(zip(reversed(paths), reversed(bounds.tolist()), strict=True))
        while order and not _certain(found, k, best[order[0]]):
            some, order = order[:at_once], order[at_once:]
            seen.update(some)
            at_once = max(k, min(2 * at_once, FILES_AT_ONCE))  # many are equal, such as black ones
            for curve in source.curves(vector, some):
                found += _hits(curve, k, found[-1].score if len(found) == k else -np.inf)
                found = sorted(found, key=_rank)[:k]
        if len(paths) < most or _certain(found, k, float(bounds[-1])):
            return found
        most *= 4


def _certain(found: list[Hit], k: int, other: float) -> bool:
    """Whether no moment with at most the score `other` can be among the k best hits."""
    return len(found) >= k and found[k - 1].score > other + ROUNDING


def _rank(hit: Hit) -> tuple[float, str, float]:
    return -hit.score, hit.path, hit.start or 0.0


def _hits(curve: Curve, k: int, least: float) -> list[Hit]:
    hits = []
    for row, from_, to in stretches(curve.start, curve.end, curve.scores, k, least):
        start, end = _seconds(curve.start[row]), _seconds(curve.end[row])
        moment = Moment(moment_id(curve.file.path, start, end), curve.file, start, end)
        hits.append(Hit(float(curve.scores[row]), moment, from_, to))
    return hits


def stretches(
    start: np.ndarray, end: np.ndarray, scores: np.ndarray, k: int, least: float = -np.inf
) -> list[Stretch]:
    """Return the k best hits in one file's curve, best first, of those with a score of at least
    `least`; see this module.

    start, end, scores: [n], as in Curve, in any order.
    """
    if len(scores) == 1:  # a short file, of which there may be many
        only = Stretch(0, _seconds(start[0]), _seconds(end[0]))
        return [only] if scores[0] >= least else []
    first, last = np.nan_to_num(start, nan=0.0), np.nan_to_num(end, nan=np.inf)
    by_time = np.argsort(first, kind="stable")
    middle = float(np.median(scores))
    found: list[Stretch] = []
    taken: list[tuple[float, float]] = []

    def is_taken(begin: float, finish: float) -> bool:
        return any(begin <= other[1] and other[0] <= finish for other in taken)

    for row in _peaks(first, last, scores, least):
        if is_taken(first[row], last[row]):  # spares the work, as its stretch only adds to it
            continue
        score = float(scores[row])
        height = (score + min(middle, score)) / 2
        begin, finish, rows = _widened(first, last, scores, by_time, row, height)
        if is_taken(begin, finish):
            continue
        taken.append((begin, finish))
        at_own_start = np.isnan(start[rows]) & (first[rows] == begin)
        found.append(
            Stretch(
                row,
                None if at_own_start.any() else begin,
                None if np.isinf(finish) else finish,
            )
        )
        if len(found) == k:
            break
    return found


def _peaks(first: np.ndarray, last: np.ndarray, scores: np.ndarray, least: float) -> Iterator[int]:
    """Yield the rows to which no better row touches, best first."""
    begins: list[float] = []  # the union of all better rows, as disjoint spans
    ends: list[float] = []
    for row in np.lexsort((last, first, -scores)).tolist():
        if scores[row] < least:
            return
        begin, end = float(first[row]), float(last[row])
        # Those spans that this row touches.
        low, high = bisect.bisect_left(ends, begin), bisect.bisect_right(begins, end)
        if low == high:
            yield row
        else:
            begin, end = min(begin, begins[low]), max(end, ends[high - 1])
        begins[low:high], ends[low:high] = [begin], [end]


def _widened(
    first: np.ndarray,
    last: np.ndarray,
    scores: np.ndarray,
    by_time: np.ndarray,
    peak: int,
    height: float,
) -> tuple[float, float, np.ndarray]:
    """Return start, end and rows of a peak's stretch: what touching rows of this height reach.

    by_time: the rows in the order of `first`.
    """
    begin, end = first[peak], last[peak]
    belongs = (scores >= height) & ~(
        (first <= begin) & (last >= end) & ((first < begin) | (last > end))
    )
    belongs[peak] = True  # whatever rounding does to its height
    rows = by_time[belongs[by_time]]
    gaps = np.flatnonzero(first[rows][1:] > np.maximum.accumulate(last[rows])[:-1])
    low = int(np.searchsorted(gaps, np.flatnonzero(rows == peak)[0]))  # number before the peak
    rows = rows[gaps[low - 1] + 1 if low else 0 : gaps[low] + 1 if low < len(gaps) else None]
    return float(first[rows[0]]), float(last[rows].max()), rows


def _seconds(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
