"""Properties of hits: which stretches of a file match, whatever was fetched to find them."""

import numpy as np
import pytest

from clipvip.index import hits
from clipvip.index.hits import Curve, best_hits, stretches
from clipvip.index.rows import FileState

NAN = float("nan")


def windows(count, length=10.0, stride=5.0):
    start = np.arange(count) * stride
    return start, start + length


def file(path):
    return FileState(path, 1, 1, "", "", 100.0, 0.0)


def reference(start, end, scores):
    """The rule of clipvip.index.hits in plain loops, without its shortcuts."""
    spans = [
        (0.0 if np.isnan(a) else a, np.inf if np.isnan(b) else b)
        for a, b in zip(start, end, strict=True)
    ]
    n, middle = len(spans), np.median(scores)

    def touch(a, b):
        return a[0] <= b[1] and b[0] <= a[1]

    def contains(a, b):
        return a != b and a[0] <= b[0] and b[1] <= a[1]

    order = sorted(range(n), key=lambda i: (-scores[i], spans[i], i))
    found = []
    for place, peak in enumerate(order):
        if any(touch(spans[peak], spans[other]) for other in order[:place]):
            continue
        height = (scores[peak] + min(middle, scores[peak])) / 2
        group, grown = {peak}, True
        while grown:
            more = {
                i
                for i in range(n)
                if scores[i] >= height
                and not contains(spans[i], spans[peak])
                and any(touch(spans[i], spans[j]) for j in group)
            }
            grown = not more <= group
            group |= more
        stretch = (min(spans[i][0] for i in group), max(spans[i][1] for i in group))
        if not any(touch(stretch, other) for _, other in found):
            found.append((peak, stretch))
    return found


def plain(found):
    return [(x.row, (x.from_ or 0.0, np.inf if x.to is None else x.to)) for x in found]


@pytest.mark.parametrize("kind", ["windows", "any spans", "ties", "with whole file"])
def test_hits_follow_the_rule(kind):
    draw = np.random.default_rng(0)
    for _ in range(60):
        n = int(draw.integers(1, 40))
        scores = draw.standard_normal(n).astype(np.float32)
        if kind == "windows":
            start, end = windows(n)
            scores = np.convolve(scores, np.ones(5) / 5, "same")[:n].astype(np.float32)
        else:
            start = draw.integers(0, 60, n).astype(float)
            end = start + draw.integers(0, 15, n)
        if kind == "ties":
            scores = np.round(scores).astype(np.float32)
        if kind == "with whole file":
            start[0] = end[0] = start[-1] = NAN
        expected = reference(start, end, scores)
        assert plain(stretches(start, end, scores, 1000)) == expected
        k = int(draw.integers(1, 5))
        assert plain(stretches(start, end, scores, k)) == expected[:k]
        least = float(np.median(scores))
        enough = [x for x in expected if scores[x[0]] >= least]
        assert plain(stretches(start, end, scores, 1000, least)) == enough


def test_a_peak_reaches_down_to_half_height():
    start, end = windows(9, 10.0, 10.0)
    scores = np.array([0.2, 0.2, 0.25, 0.31, 0.4, 0.29, 0.2, 0.2, 0.2])
    (best,) = stretches(start, end, scores, 10)  # the flat rest belongs to it
    assert (best.row, best.from_, best.to) == (4, 30.0, 50.0)


def test_two_scenes_of_a_film_are_two_hits_and_a_dent_makes_no_third():
    start, end = windows(20)
    scores = np.full(20, 0.2)
    scores[[3, 4, 5]] = 0.35, 0.33, 0.34  # a dent
    scores[[14, 15]] = 0.3, 0.32
    best, second = stretches(start, end, scores, 2)
    assert (best.from_, best.to) == (15.0, 35.0)
    assert (second.row, second.from_, second.to) == (15, 70.0, 85.0)


def test_whole_files_and_short_curves():
    (only,) = stretches(np.array([NAN]), np.array([NAN]), np.array([0.1]), 5)
    assert (only.row, only.from_, only.to) == (0, None, None)
    apart = stretches(np.array([0.0, 50.0]), np.array([10.0, 60.0]), np.array([0.1, 0.3]), 5)
    assert [x.row for x in apart] == [1, 0]  # both can be found
    flat = stretches(*windows(50), np.full(50, 0.25), 5)
    assert [(x.row, x.from_, x.to) for x in flat] == [(0, 0.0, 255.0)]
    open_end = stretches(np.array([NAN, 10.0]), np.array([10.0, NAN]), np.array([0.3, 0.29]), 5)
    assert [(x.from_, x.to) for x in open_end] == [(None, 10.0)]


class Planted:
    """A source of planted curves that counts what is asked of it."""

    def __init__(self, curves):
        self.all = curves
        self.asked = []

    def candidates(self, vector, most, where):
        self.asked.append(most)
        rows = [(-s, c.file.path) for c in self.all for s in c.scores.tolist()]
        rows = sorted(rows)[:most]
        return [path for _, path in rows], -np.array([score for score, _ in rows], np.float32)

    def curves(self, vector, paths):
        return [curve for curve in self.all if curve.file.path in set(paths)]


def test_hits_do_not_depend_on_what_was_fetched():
    draw = np.random.default_rng(1)
    curves = []
    for number in range(30):
        n = int(draw.integers(1, 60))
        scores = (draw.standard_normal(n) * 0.05 + draw.standard_normal() * 0.1).astype(np.float32)
        curves.append(Curve(file(f"/{number:02d}"), *windows(n), scores))
    # One long file has all the best rows, but only one stretch of them.
    curves.append(Curve(file("/long"), *windows(12_000), np.full(12_000, 0.9, np.float32)))
    every = [
        (-float(c.scores[x.row]), c.file.path, float(c.start[x.row]), x.from_, x.to)
        for c in curves
        for x in stretches(c.start, c.end, c.scores, 10_000)
    ]
    for k in (1, 3, 10, 500):
        source = Planted(curves)
        hits = best_hits(source, np.zeros(4), k, None)
        found = [(-hit.score, hit.path, hit.start, hit.from_, hit.to) for hit in hits]
        assert found == sorted(every)[:k]
        assert len(source.asked) > 1


def test_equal_files_are_ordered_by_path_whatever_was_fetched():
    curves = [
        Curve(file(f"/{number:03d}"), *windows(1), np.array([0.5], np.float32))
        for number in reversed(range(200))
    ]
    hits = best_hits(Planted(curves), np.zeros(4), 3, None)
    assert [hit.path for hit in hits] == ["/000", "/001", "/002"]


def test_an_empty_index_has_no_hits():
    assert best_hits(Planted([]), np.zeros(4), 3, None) == []


def test_equal_files_are_read_many_at_once_and_long_curves_once(monkeypatch):
    """A search among black films asks for all of them, and a film that fits has many peaks."""
    calls = []

    class Black:
        def candidates(self, vector, most, where):
            return [f"/v/{i:04d}.mp4" for i in range(2000)][:most], np.ones(min(most, 2000))

        def curves(self, vector, paths):
            calls.append(len(paths))
            none, score = np.full(1, NAN), np.ones(1, np.float32)
            return [Curve(file(path), none, none, score) for path in paths]

    assert [hit.path for hit in best_hits(Black(), np.ones(1), 2, None)] == [
        "/v/0000.mp4",
        "/v/0001.mp4",
    ]
    assert sum(calls) == 2000 and len(calls) < 50

    widened = []
    real = hits._widened
    monkeypatch.setattr(hits, "_widened", lambda *given: widened.append(1) or real(*given))
    scores = np.where(np.arange(900) % 3, 0.3, 0.31).astype(np.float32)
    scores[:500] = 0.2
    start, end = windows(900)
    assert len(stretches(start, end, scores, 5)) == 1 and len(widened) < 5
