"""Ranks match brute force, with ties and with many captions per video."""

import pytest
import torch

from clipvip.retrieval import both_directions, dual_softmax, retrieval_metrics, retrieval_ranks


def brute_force(similarity, query_ids, gallery_ids):
    """Apply the definition to one query at a time: competitors that tie come first."""
    ranks = []
    for row, query in zip(similarity.tolist(), query_ids.tolist(), strict=True):
        own = [s for s, g in zip(row, gallery_ids.tolist(), strict=True) if g == query]
        rivals = [s for s, g in zip(row, gallery_ids.tolist(), strict=True) if g != query]
        ranks.append(1 + sum(s >= max(own) for s in rivals))
    return torch.tensor(ranks)


@pytest.mark.parametrize("levels", [3, 50, None], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize("dsl", [False, True])
def test_ranks_equal_brute_force_with_many_captions(levels, dsl):
    generator = torch.Generator().manual_seed(0)
    videos, texts = 1003, 1500
    video_of_text = torch.cat(
        [torch.arange(videos), torch.randint(videos, (texts - videos,), generator=generator)]
    )
    similarity = torch.rand(texts, videos, generator=generator) * 2 - 1
    if levels:
        similarity = (similarity * levels).round() / levels
    ids = torch.arange(videos)
    for matrix, queries, gallery in [
        (similarity, video_of_text, ids),
        (similarity.T, ids, video_of_text),
    ]:
        ranks = retrieval_ranks(matrix, queries, gallery, dsl=dsl)
        scores = dual_softmax(matrix) if dsl else matrix
        sample = torch.randint(len(queries), (60,), generator=generator)
        assert ranks.shape == (len(queries),)
        assert ranks[sample].equal(brute_force(scores[sample], queries[sample], gallery))


def test_blocks_of_queries_do_not_change_ranks(monkeypatch):
    similarity = torch.rand(1003, 1003, generator=torch.Generator().manual_seed(1))
    whole = retrieval_ranks(similarity)
    monkeypatch.setattr("clipvip.retrieval._ENTRIES_AT_ONCE", 10_000)
    assert retrieval_ranks(similarity).equal(whole)


def test_a_constant_model_ranks_last():
    assert retrieval_ranks(torch.zeros(7, 7)).eq(7).all()
    assert retrieval_metrics(torch.zeros(20, 20))["R@10"] == 0


def test_the_best_ranked_caption_counts_and_siblings_are_no_rivals():
    similarity = torch.tensor([[0.1, 0.9, 0.8, 0.5]])  # one video; texts 1 and 2 are its own
    ids = torch.tensor([0]), torch.tensor([7, 0, 0, 7])
    assert retrieval_ranks(similarity, *ids).tolist() == [1]
    assert retrieval_ranks(-similarity, *ids).tolist() == [3]


def test_metrics_of_known_ranks():
    similarity = torch.eye(4)
    similarity[3] = torch.tensor([3.0, 2.0, 1.0, 0.0])  # ranks 1, 1, 1, 4
    assert retrieval_metrics(similarity) == {
        "R@1": 75, "R@5": 100, "R@10": 100, "median_rank": 1, "mean_rank": 1.75,
    }  # fmt: skip


def test_median_of_an_even_number_of_ranks_is_the_middle():
    similarity = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # ranks 1 and 2
    assert retrieval_metrics(similarity)["median_rank"] == 1.5


def test_dsl_has_its_own_keys_and_changes_only_them():
    generator = torch.Generator().manual_seed(2)
    video, text = torch.randn(2, 30, 8, generator=generator).unbind()
    video, text = video / video.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    tables = both_directions(video, text, torch.arange(30))
    similarity = text @ video.T
    assert tables["text_to_video"] == retrieval_metrics(similarity)
    assert tables["video_to_text"] == retrieval_metrics(similarity.T)
    assert tables["text_to_video_dsl"] == retrieval_metrics(similarity, dsl=True)
    assert tables["video_to_text_dsl"] == retrieval_metrics(similarity.T, dsl=True)
    assert tables["text_to_video"] != tables["text_to_video_dsl"]


def test_dual_softmax_normalises_over_queries():
    similarity = torch.rand(5, 3, dtype=torch.float64)
    assert torch.allclose((dual_softmax(similarity) / similarity).sum(0), torch.ones(3).double())


def test_videos_without_text_are_rivals_but_no_queries():
    tables = both_directions(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]))
    assert tables["video_to_text"]["R@1"] == 100
    hidden = both_directions(torch.eye(3), torch.eye(3)[2:], torch.tensor([0]))
    assert hidden["text_to_video"]["mean_rank"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), "queries, gallery"),
        ((torch.zeros(2, 3),), "must be square"),
        ((torch.full((2, 2), float("nan")),), "4 NaN"),
        ((torch.eye(2), torch.tensor([0, 5]), torch.arange(2)), "row 1 with id 5"),
        ((torch.eye(2), torch.arange(3), torch.arange(2)), "2 integers"),
    ],
)
def test_errors_say_what_was_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(*arguments)
