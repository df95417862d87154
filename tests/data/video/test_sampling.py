import numpy as np
import pytest

from clipvip.data.video.sampling import check_sampling, choose_frames, middle_frame

EVEN = np.arange(250) / 25  # ten seconds at 25 frames a second


@pytest.mark.parametrize("count", [2, 5, 12, 249, 250])
def test_uniform_takes_first_and_last_and_even_steps(count: int) -> None:
    chosen = choose_frames(EVEN, count)
    expected = np.floor(np.linspace(0, 249, count) + 0.5)
    assert chosen.tolist() == expected.tolist()


def test_a_tie_takes_the_later_frame() -> None:
    assert choose_frames(EVEN[:2], 1).tolist() == [1] and middle_frame(EVEN[:4]) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_jitter_moves_both_ends_inwards_by_less_than_one_interval(count: int) -> None:
    drawn = np.stack(
        [choose_frames(EVEN, count, generator=np.random.default_rng(i)) for i in range(200)]
    )
    interval = 249 / max(count - 1, 2) if count > 1 else 249
    assert (np.diff(drawn, axis=1) >= 0).all()
    assert drawn[:, 0].min() <= 0.05 * interval and drawn[:, 0].max() <= np.ceil(interval)
    assert drawn[:, -1].min() >= 249 - np.ceil(interval)
    assert len(np.unique(drawn[:, 0])) > 5 and len(np.unique(drawn[:, -1])) > 5


def test_the_same_generator_gives_the_same_frames() -> None:
    first, second = (
        choose_frames(EVEN, 12, generator=np.random.default_rng((1, 2))) for _ in range(2)
    )
    assert first.tolist() == second.tolist()


def test_a_short_clip_repeats_its_frames() -> None:
    assert choose_frames(EVEN[:3], 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert choose_frames(EVEN[:1], 4, "clip:8").tolist() == [0, 0, 0, 0]


def test_varying_frame_rate_is_sampled_by_time() -> None:
    times = np.concatenate([np.arange(50) / 50, 1 + np.arange(10)])
    chosen = choose_frames(times, 11)
    assert np.abs(times[chosen] - np.linspace(0, 10, 11)).max() <= 0.5
    assert chosen.tolist() == [0, *range(50, 60)]


def test_fixed_rate_gives_fewer_frames_of_a_short_clip_and_spreads_over_a_long_one() -> None:
    assert choose_frames(EVEN, 20, "fps:1").tolist() == list(range(0, 250, 25))
    assert choose_frames(EVEN, 5, "fps:1").tolist() == choose_frames(EVEN, 5).tolist()
    drawn = choose_frames(EVEN, 20, "fps:1", np.random.default_rng(0))
    assert len(drawn) == 10 and set(np.diff(drawn)) <= {24, 25, 26}


def test_random_clip_is_a_run_of_frames_from_one_place() -> None:
    drawn = [choose_frames(EVEN, 8, "clip:5", np.random.default_rng(i)).tolist() for i in range(50)]
    assert all(set(np.diff(row)) <= {4, 5, 6} for row in drawn)
    assert len({row[0] for row in drawn}) > 20
    middle = choose_frames(EVEN, 8, "clip:5")
    assert abs((middle[0] + middle[-1]) / 2 - 124.5) <= 1


def test_authors_frames_are_those_of_their_numbers_rounded_down() -> None:
    for count in (1, 2, 3, 11, 12, 13, 250, 3000):
        for wanted in (1, 2, 3, 12, 32):
            times = np.sort(np.random.default_rng(count).uniform(0, 9, count))  # whatever they are
            expected = np.linspace(0, count - 1, wanted).astype(int).tolist()
            assert choose_frames(times, wanted, "authors").tolist() == expected
        assert middle_frame(times, "authors") == count // 2
    assert choose_frames(EVEN[:13], 6, "authors").tolist() == [0, 2, 4, 7, 9, 12]
    assert choose_frames(EVEN[:13], 6).tolist() != [0, 2, 4, 7, 9, 12]


def test_authors_training_moves_both_ends_by_whole_frames_of_an_interval() -> None:
    drawn = [
        choose_frames(EVEN, 12, "authors", np.random.default_rng(i)).tolist() for i in range(2000)
    ]
    interval = 250 // 11
    assert {row[0] for row in drawn} == set(range(interval + 1))
    assert {row[-1] for row in drawn} == set(range(249 - interval, 250))
    for row in drawn[:50]:
        assert row == np.linspace(row[0], row[-1], 12).astype(int).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("wanted", [1, 2, 3, 12])
def test_authors_training_stays_within_short_clips(count: int, wanted: int) -> None:
    for seed in range(100):
        row = choose_frames(EVEN[:count], wanted, "authors", np.random.default_rng(seed))
        assert len(row) == wanted and (np.diff(row) >= 0).all()
        assert row[0] >= 0 and row[-1] < count


@pytest.mark.parametrize(
    "word", ["", "unifrom", "uniform:3", "authors:3", "fps", "fps:0", "clip:x", "fps:inf"]
)
def test_unknown_sampling_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="expected 'uniform', 'authors', 'fps:R' or 'clip:R'"):
        check_sampling(word)
