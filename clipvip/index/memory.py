"""All vectors of an index in memory, for a server that answers many searches.

A search multiplies every vector, in fp16 by torch, with the query. On a CPU that is limited by how
fast memory is read, and fp16 is half of fp32. The products are only a first selection: every row
that they leave in doubt is computed again in double precision. So results are exact.
"""

from collections.abc import Sequence

import numpy as np
import torch

from clipvip.index.hits import Curve, scores_of
from clipvip.index.rows import Where
from clipvip.index.store import Rows

AT_ONCE = 1 << 14  # rows that are computed again in one piece: 64 MB for P = 512


class Memory:
    """A source of hits (see clipvip.index.hits) that holds everything.

    A product of a row v and a query q is wrong by at most

        ‖q - q₁₆‖·‖v‖ + 2⁻¹¹·|v·q₁₆| + P·2⁻²⁴·‖v‖·‖q₁₆‖

    with q₁₆ the query in fp16: its rounding; that of the result to fp16; and that of P sums in
    fp32, in which PyTorch adds fp16 products on a CPU unless it is told otherwise. The bound used
    is twice that. If row i is the m-th best by these products, every one of the m best rows has a
    product of at least its product minus two bounds.
    """

    def __init__(self, rows: Rows) -> None:
        self.files = rows.files
        self._start, self._end = rows.start, rows.end
        self._vectors, self._torch = rows.vectors, torch.from_numpy(rows.vectors)
        self._file = rows.file
        self._last = b"", torch.empty(0)
        # Rows of a file lie together.
        begins = np.flatnonzero(np.diff(rows.file, prepend=-1))
        ends = np.append(begins, len(rows.file))[1:]
        self._rows = {
            self.files[rows.file[begin]].path: slice(int(begin), int(end))
            for begin, end in zip(begins, ends, strict=True)
        }
        self._durations = np.array([file.duration for file in self.files])
        self._dates = np.array([file.date for file in self.files])

    def candidates(
        self, vector: np.ndarray, most: int, where: Where | None = None
    ) -> tuple[list[str], np.ndarray]:
        """Return the files of the `most` nearest moments, and their scores, best first."""
        rows, scores = self.nearest(vector, most, where)
        return [self.files[file].path for file in self._file[rows]], scores

    def nearest(
        self, vector: np.ndarray, most: int, where: Where | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the `most` nearest rows, best first, and their scores, float32."""
        count, width = self._vectors.shape
        allowed = None
        if where is not None and where != Where():
            allowed = self._allowed(where)[self._file]
            count = int(allowed.sum())
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        products = self._products(vector)
        if allowed is not None:
            products = products.masked_fill(torch.from_numpy(~allowed), -torch.inf)
        most = min(most, count)
        limit = float(products.topk(most).values[-1])
        lost = float(np.linalg.norm(vector - vector.astype(np.float16).astype(np.float32)))
        bound = 2 * (lost + 2**-11 + width * 2**-24) * 1.01  # a stored vector's norm is 1 ± 0.002
        rows = np.flatnonzero(products.numpy() >= limit - 2 * bound)  # much faster than by torch
        scores = self._scores(rows, vector)
        order = np.lexsort((rows, -scores))[:most]
        return rows[order], scores[order]

    def _products(self, vector: np.ndarray) -> torch.Tensor:
        """Return the product of every vector and a query in fp16, as float32 [n].

        The last ones are kept: one search may ask for the nearest rows several times.
        """
        key = vector.tobytes()
        known, products = self._last
        if known != key:
            products = (self._torch @ torch.from_numpy(vector.astype(np.float16))).float()
            self._last = key, products  # one assignment, as several threads may search
        return products

    def curves(self, vector: np.ndarray, paths: Sequence[str]) -> list[Curve]:
        """Return the curves of these files."""
        found = []
        for path in paths:
            rows = self._rows[path]
            scores = self._scores(np.arange(rows.start, rows.stop), vector)
            file = self.files[self._file[rows.start]]
            found.append(Curve(file, self._start[rows], self._end[rows], scores))
        return found

    def _scores(self, rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
        query = vector.astype(np.float64)
        pieces = np.split(rows, range(AT_ONCE, len(rows), AT_ONCE))
        return np.concatenate([scores_of(self._vectors[piece], query) for piece in pieces])

    def _allowed(self, where: Where) -> np.ndarray:
        """Return which files a search looks at, bool [number of files]."""
        allowed = np.ones(len(self.files), bool)
        if where.folder is not None:
            inside = where.folder.rstrip("/") + "/"
            allowed &= np.array([file.path.startswith(inside) for file in self.files], bool)
        if where.min_duration is not None:
            allowed &= self._durations >= where.min_duration
        if where.max_duration is not None:
            allowed &= self._durations <= where.max_duration
        if where.after is not None:
            allowed &= self._dates >= where.after
        if where.before is not None:
            allowed &= self._dates < where.before
        return allowed
