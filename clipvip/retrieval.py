"""Ranks and recalls from a similarity matrix, counted so that no tie flatters the model.

The rank of a query is 1 plus the number of gallery items that do *not* belong to it and
score at least as high as its best-scoring own item. A tie therefore counts once, against
the model; every query has exactly one rank; further captions of the same video are neither
rivals nor extra queries.
"""

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
METRICS = (*(f"R@{k}" for k in RECALLS), "median_rank", "mean_rank")
TABLES = ("text_to_video", "video_to_text", "text_to_video_dsl", "video_to_text_dsl")
_ENTRIES_AT_ONCE = 1 << 24  # bounds the memory of comparing ids: about 150 MB


def dual_softmax(similarity: Tensor, temperature: float = 100.0) -> Tensor:
    """S·softmax(temperature·S over the queries), float64: DSL, a re-scoring at test time.

    It sees all queries at once, so figures with it answer another question than figures
    without: keep the two apart.

    Args:
        similarity: [Q, G] cosines.
    """
    similarity = similarity.double()  # e^-200, the smallest factor of cosines, needs float64
    return similarity * (temperature * similarity).softmax(0)


def retrieval_ranks(
    similarity: Tensor,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    *,
    dsl: bool = False,
) -> Tensor:
    """The rank, from 1, of each query's best-ranked own item; ties count against it.

    Args:
        similarity: [Q, G], any float dtype; higher is nearer.
        query_ids, gallery_ids: [Q] and [G] integers; an item belongs to a query when their
            ids are equal. For text→video give each text its video's index as query_ids; for
            video→text swap the two. Left out, row i belongs to column i.
        dsl: re-score with dual_softmax first.

    Returns:
        int64 [Q].

    Raises:
        ValueError: similarity is no matrix or holds NaN, ids do not fit it, or a query has
            no item of its own in the gallery.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(
            f"similarity must be [queries, gallery], neither empty; got {list(similarity.shape)}"
        )
    queries, gallery = similarity.shape
    if query_ids is None and gallery_ids is None and queries != gallery:
        raise ValueError(
            f"similarity is {queries} × {gallery}: without query_ids and gallery_ids it must be "
            "square, row i belonging to column i"
        )
    query_ids = _ids(query_ids, queries, "query_ids", similarity.device)
    gallery_ids = _ids(gallery_ids, gallery, "gallery_ids", similarity.device)
    if similarity.isnan().any():
        raise ValueError(
            f"similarity {queries} × {gallery} holds {int(similarity.isnan().sum())} NaN"
        )
    orphans = (~torch.isin(query_ids, gallery_ids)).nonzero().flatten()
    if len(orphans):
        raise ValueError(
            f"{len(orphans)} of {queries} queries have no item in the gallery; the first is row "
            f"{int(orphans[0])} with id {int(query_ids[orphans[0]])}"
        )
    scores = dual_softmax(similarity) if dsl else similarity
    rows = max(1, _ENTRIES_AT_ONCE // gallery)
    ranks = []
    for ids, block in zip(query_ids.split(rows), scores.split(rows), strict=True):
        own = ids[:, None] == gallery_ids
        best = block.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
        ranks.append(1 + ((block >= best) & ~own).sum(1))
    return torch.cat(ranks)


def retrieval_metrics(
    similarity: Tensor,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    *,
    dsl: bool = False,
) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, and median_rank and mean_rank, of retrieval_ranks."""
    ranks = retrieval_ranks(similarity, query_ids, gallery_ids, dsl=dsl).double()
    metrics = {f"R@{k}": 100 * (ranks <= k).double().mean().item() for k in RECALLS}
    ordered = ranks.sort().values
    middle = ordered[[(len(ranks) - 1) // 2, len(ranks) // 2]]
    metrics["median_rank"] = middle.mean().item()
    metrics["mean_rank"] = ranks.mean().item()
    return metrics


def both_directions(
    video_embeds: Tensor, text_embeds: Tensor, video_of_text: Tensor
) -> dict[str, dict[str, float]]:
    """All four tables of a test set: each direction, plain and with DSL, under its own key.

    Args:
        video_embeds: [V, D] unit vectors.
        text_embeds: [T, D] unit vectors, any number of texts a video.
        video_of_text: [T] integers, the row in video_embeds of each text's video.

    Videos without a text are rivals in text→video and no queries in video→text.
    """
    similarity = text_embeds @ video_embeds.T
    videos = torch.arange(len(video_embeds), device=similarity.device)
    video_of_text = video_of_text.to(similarity.device)
    asked = torch.isin(videos, video_of_text)
    tables = {}
    for suffix, dsl in (("", False), ("_dsl", True)):
        tables["text_to_video" + suffix] = retrieval_metrics(
            similarity, video_of_text, videos, dsl=dsl
        )
        tables["video_to_text" + suffix] = retrieval_metrics(
            similarity.T[asked], videos[asked], video_of_text, dsl=dsl
        )
    return tables


def _ids(ids: Tensor | None, length: int, name: str, device: torch.device) -> Tensor:
    if ids is None:
        return torch.arange(length, device=device)
    if ids.shape != (length,) or ids.is_floating_point():
        raise ValueError(f"{name} must be {length} integers; got {list(ids.shape)} {ids.dtype}")
    return ids.to(device)
