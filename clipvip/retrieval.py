"""Ranks and recalls from a similarity matrix, in which ties never favour the model.

The rank of a query is 1 plus the number of gallery items that do *not* belong to it and score at
least as high as its best-scoring own item. So a tie counts against the model, every query has
exactly one rank, and further captions of the same video are neither competitors nor extra queries.
"""

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
METRICS = (*(f"R@{k}" for k in RECALLS), "median_rank", "mean_rank")
TABLES = ("text_to_video", "video_to_text", "text_to_video_dsl", "video_to_text_dsl")
_ENTRIES_AT_ONCE = 1 << 24  # limits the memory for comparing ids to about 150 MB


def dual_softmax(similarity: Tensor, temperature: float = 100.0) -> Tensor:
    """Re-score at test time by the dual softmax (DSL): S·softmax(temperature·S over queries).

    similarity: cosines [Q, G]. Returns float64 [Q, G]. As all queries are used at once, results
    are not comparable with results without DSL; report the two separately.
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
    """Rank, from 1, of each query's best own item; ties count against it.

    similarity: [Q, G], any float dtype; higher is nearer.
    query_ids, gallery_ids: integers [Q] and [G]; an item belongs to a query if their ids are
        equal. For text→video, the query id of a text is the index of its video; for video→text,
        swap the two. By default, row i belongs to column i.
    dsl: re-score with dual_softmax first.
    Returns int64 [Q]. Raises ValueError if similarity is no matrix or holds NaN, ids do not fit it,
    or a query has no own item in the gallery.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(
            f"similarity must be [queries, gallery], neither empty; got {list(similarity.shape)}"
        )
    queries, gallery = similarity.shape
    if query_ids is None and gallery_ids is None and queries != gallery:
        raise ValueError(
            f"similarity is {queries} × {gallery}; without query_ids and gallery_ids it must be "
            "square, with row i belonging to column i"
        )
    query_ids = _ids(query_ids, queries, "query_ids", similarity.device)
    gallery_ids = _ids(gallery_ids, gallery, "gallery_ids", similarity.device)
    if similarity.isnan().any():
        raise ValueError(
            f"similarity {queries} × {gallery} holds {int(similarity.isnan().sum())} NaN; expected "
            "finite features on both sides"
        )
    orphans = (~torch.isin(query_ids, gallery_ids)).nonzero().flatten()
    if len(orphans):
        raise ValueError(
            f"{len(orphans)} of {queries} queries have no own item in the gallery; the first is "
            f"row {int(orphans[0])} with id {int(query_ids[orphans[0]])}"
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
    """Summarise retrieval_ranks: R@1, R@5 and R@10 in percent, median_rank and mean_rank."""
    ranks = retrieval_ranks(similarity, query_ids, gallery_ids, dsl=dsl).double()
    metrics = {f"R@{k}": 100 * (ranks <= k).double().mean().item() for k in RECALLS}
    ordered = ranks.sort().values  # torch's quantile takes 2^24 values at most
    metrics["median_rank"] = ordered[[(len(ranks) - 1) // 2, len(ranks) // 2]].mean().item()
    metrics["mean_rank"] = ranks.mean().item()
    return metrics


def both_directions(
    video_embeds: Tensor, text_embeds: Tensor, video_of_text: Tensor
) -> dict[str, dict[str, float]]:
    """Compute the four TABLES of a test set: each direction, without and with DSL.

    video_embeds, text_embeds: unit vectors [V, D] and [T, D], any number of texts per video.
    video_of_text: integers [T], row in video_embeds of each text's video.
    Videos without a text are competitors in text→video, but not queries in video→text.
    """
    similarity = text_embeds @ video_embeds.T
    videos = torch.arange(len(video_embeds), device=similarity.device)
    video_of_text = video_of_text.to(similarity.device)
    asked = torch.isin(videos, video_of_text)
    to_video = similarity, video_of_text, videos
    to_text = similarity.T[asked], videos[asked], video_of_text
    tables = {}
    for suffix, dsl in (("", False), ("_dsl", True)):
        tables["text_to_video" + suffix] = retrieval_metrics(*to_video, dsl=dsl)
        tables["video_to_text" + suffix] = retrieval_metrics(*to_text, dsl=dsl)
    return tables


def _ids(ids: Tensor | None, length: int, name: str, device: torch.device) -> Tensor:
    if ids is None:
        return torch.arange(length, device=device)
    if ids.shape != (length,) or ids.is_floating_point():
        raise ValueError(f"{name} must be {length} integers; got {list(ids.shape)} {ids.dtype}")
    return ids.to(device)
