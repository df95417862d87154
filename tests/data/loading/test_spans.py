"""How videos are divided into moments."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from clipvip.data.loading.spans import check_windows, find_cuts, scenes, windows
from clipvip.data.video import DecodeError

PATH = Path("a.mp4")


def frames(duration: float, rate: float = 25.0) -> np.ndarray:
    return np.arange(round(duration * rate)) / rate


@pytest.mark.parametrize("window, stride", [(10, 5), (10, 10), (4, 1.5), (3, 0.7), (0.5, 0.3)])
@pytest.mark.parametrize("duration", [10.04, 11, 12.52, 23.48, 60, 61.72])
def test_windows_cover_a_video_without_slivers(duration, window, stride):
    found = windows(frames(duration), duration, window, stride, PATH)
    if found == [(None, None)]:
        assert duration < window + stride / 2
        return
    assert found[0][0] == 0 and found[-1][1] == pytest.approx(duration, abs=5e-4)
    for start, end in found:
        assert (start, end) == (round(start, 3), round(end, 3))
        assert window - 1e-6 <= end - start < window + stride / 2 + 1e-3
    for (start, end), (following, later) in itertools.pairwise(found):
        assert 0 < following - start <= stride + 1e-6
        assert following <= end + 1e-6 and end < later
    assert [start for start, _ in found[:-1]] == pytest.approx(np.arange(len(found) - 1) * stride)


def test_the_end_of_a_video_makes_a_window_only_where_it_is_long():
    def of(duration):
        return windows(frames(duration), duration, 10.0, 5.0, PATH)

    assert of(10.0) == of(3.0) == of(12.4) == [(None, None)]
    assert of(12.6) == [(0, 10), (2.6, 12.6)]
    assert of(15.0) == [(0, 10), (5, 15)]
    assert of(17.4) == [(0, 10), (5, 17.4)]
    assert of(17.6) == [(0, 10), (5, 15), (7.6, 17.6)]


def test_a_frame_that_stands_still_is_one_moment():
    times = np.array([0.0, 1.0, 2.0, 61.0, 62.0])
    found = windows(times, 63.0, 10.0, 5.0, PATH)
    assert found == [(0, 10), (5, 60), (53, 63)]
    assert windows(np.array([0.0]), 3600.0, 10.0, 5.0, PATH) == [(None, None)]


def test_a_file_that_claims_years_is_refused():
    with pytest.raises(DecodeError, match=r"its 1000000 s make more than 100000 windows; give a"):
        windows(np.array([0.0, 1e6 - 1]), 1e6, 10.0, 5.0, PATH)


@pytest.mark.parametrize(
    "window, stride, message",
    [
        (0, 0, "window is 0; expected seconds, at least 0.1"),
        (math.nan, 1, "window is nan; expected"),
        (math.inf, 1, "window is inf; expected"),
        (10, -1, "stride is -1; expected seconds"),
        (5, 10, r"stride is 10 s, longer than the window \(5 s\)"),
    ],
)
def test_lengths_that_divide_nothing_are_refused(window, stride, message):
    with pytest.raises(ValueError, match=message):
        check_windows(window, stride, scenes=False)


def test_scenes_without_their_package_say_what_to_install(monkeypatch):
    check_windows(10, 5, scenes=True)
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(ValueError, match=r'cannot be loaded \(.*\): pip install "clipvip\[search'):
        check_windows(10, 5, scenes=True)
    check_windows(10, 5, scenes=False)


def test_scenes_are_not_short_and_long_ones_are_windows():
    def of(cuts, duration):
        return scenes(cuts, frames(duration), duration, 10.0, 5.0, PATH)

    assert of([4.0, 9.52], 15.0) == [(0, 4), (4, 9.52), (9.52, 15)]
    assert of([0.4, 4.0, 4.8, 14.2], 15.0) == [(0, 4), (4, 15)]  # in the middle and at both ends
    assert of([], 15.0) == [(None, None)]
    assert of([5.0], 30.0) == [(0, 5), (5, 15), (10, 20), (15, 25), (20, 30)]
    third = 1 / 3
    assert of([third + 1], 4.0) == [(0, 1.333333), (1.333333, 4)]


def test_scenes_begin_where_the_picture_changes(write_video, tmp_path):
    # Three scenes of moving noise, each of other colours and brightness.
    generator = np.random.default_rng(0)
    pictures = []
    for colour in ((200, 30, 30), (20, 180, 40), (40, 40, 220)):
        noise = generator.integers(0, 30, (48, 64, 3))
        pictures += [np.roll(noise + colour, shift, 1).astype(np.uint8) for shift in range(15)]
    path = write_video(tmp_path / "scenes.mp4", pictures, options={"g": "8"})
    told = []
    assert find_cuts(path, lambda: told.append(1)) == pytest.approx([0.6, 1.2])
    assert told
