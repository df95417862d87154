"""All vectors of an index in memory, for a server that answers many searches.

A search multiplies every vector, in fp16 by torch, with the query. On a CPU that is limited by how
fast memory is read, and fp16 is half of fp32. The products only choose files: all moments of every
file that they leave in doubt are computed again in double precision. So results are exact.
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
    is twice that. A file's best product plus the bound is at least its best score.
    """

    def __init__(self, rows: Rows) -> None:
        self._start, self._end = rows.start, rows.end
        self._vectors = torch.from_numpy(rows.vectors)
        self._last = b"", torch.empty(0)
        # Rows of a file lie together.
        self._begins = np.flatnonzero(np.diff(rows.file, prepend=-1))
        ends = np.append(self._begins, len(rows.file))[1:]
        self.files = [rows.files[number] for number in rows.file[self._begins]]
        self._rows = {
            file.path: (file, slice(int(begin), int(end)))
            for file, begin, end in zip(self.files, self._begins, ends, strict=True)
        }
        self._durations = np.array([file.duration for file in self.files])
        self._dates = np.array([file.date for file in self.files])

    def candidates(
        self, vector: np.ndarray, most: int, where: Where | None = None
    ) -> tuple[list[str], np.ndarray]:
        """Return the `most` files that may have the best moments, and bounds of their scores."""
        if not len(self._begins):
            return [], np.empty(0, np.float32)
        best = np.maximum.reduceat(self._products(vector).numpy(), self._begins)
        files = np.arange(len(best))
        if where is not None and where != Where():
            files = np.flatnonzero(self._allowed(where))
        found, order = torch.from_numpy(best[files]).topk(min(most, len(files)))
        lost = float(np.linalg.norm(vector - vector.astype(np.float16).astype(np.float32)))
        width = self._vectors.shape[1]
        bound = 2 * (lost + 2**-11 + width * 2**-24) * 1.01  # a stored vector's norm is 1 ± 0.002
        return [self.files[file].path for file in files[order.numpy()]], found.numpy() + bound

    def _products(self, vector: np.ndarray) -> torch.Tensor:
        """Return the product of every vector and a query in fp16, as float32 [n].

        The last ones are kept: one search may ask for candidates several times.
        """
        key = vector.tobytes()
        known, products = self._last
        if known != key:
            products = (self._vectors @ torch.from_numpy(vector.astype(np.float16))).float()
            self._last = key, products  # one assignment, as several threads may search
        return products

    def curves(self, vector: np.ndarray, paths: Sequence[str]) -> list[Curve]:
        """Return the curves of these files."""
        found = []
        for path in paths:
            file, rows = self._rows[path]
            scores = self._scores(rows, vector)
            found.append(Curve(file, self._start[rows], self._end[rows], scores))
        return found

    def _scores(self, rows: slice, vector: np.ndarray) -> np.ndarray:
        query = vector.astype(np.float64)
        pieces = self._vectors[rows].split(AT_ONCE)
        # Converted by torch, which takes a quarter of NumPy's time.
        return np.concatenate([scores_of(piece.double().numpy(), query) for piece in pieces])

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
