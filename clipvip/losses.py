"""Contrastive losses of CLIP-ViP (section 3.3), without storing the logits.

Features are unit vectors [n, D] of n clips, and logits are `logit_scale` times their cosines. A
clip's own pair is the positive, and every other clip of the batch is a negative.

`sharded`: the n clips are this rank's share, of any size, of a batch over all ranks. Every rank
gets the loss of the whole batch, and gradients whose mean over ranks, which data parallelism
takes, is the gradient of that loss; see clipvip.sharded. Several ranks tell each other their
counts of clips once per loss, for which the host waits for a GPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipvip.inputs import send
from clipvip.ops import pairwise_logsumexp
from clipvip.sharded import all_reduce, gather_counts, sharded_logsumexp

VARIANTS = ("vs", "vs_fc", "vs_vc", "vs_vc_fc", "vsc", "vsc_fc")


class _Features(NamedTuple):
    """One source's features, and which clips have them."""

    name: str
    features: Tensor  # [n, D]
    present: Tensor | None  # bool [n]; None: all

    def number(self) -> int:
        """Return how many clips have the source."""
        if self.present is None or self.present.is_meta:
            return len(self.features)
        return int(self.present.sum())


class _Pair(NamedTuple):
    """Statistics of two sources in the order of clips, and the clips that have both sources."""

    row_lse: Tensor
    col_lse: Tensor
    positive: Tensor
    clips: Tensor | slice


_Terms = list[list[tuple[_Features, _Features]]]
_LogSumExp = Callable[..., tuple[Tensor, Tensor, Tensor]]


def contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, *, sharded: bool = False, backend: str = "native"
) -> Tensor:
    """Symmetric InfoNCE: mean cross entropy of rows plus mean cross entropy of columns.

    a, b: unit vectors [n, D].
    logit_scale: 0-d, the multiplier itself (the exponential of the model's parameter).
    sharded: see the top of this module.
    backend: see `clipvip.ops.pairwise_logsumexp`.
    Returns a 0-d tensor in at least fp32. Equivalent to this, without the n × n matrix:

        logits = logit_scale * a @ b.T
        own = torch.arange(len(a))
        return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

    Raises ValueError if the shapes differ.
    """
    rows, columns = _Features("a", a, None), _Features("b", b, None)
    _check(rows, columns)
    return _loss([[(rows, columns)]], logit_scale, sharded, backend)


def omnisource_loss(
    video: Tensor,
    subtitle: Tensor | None,
    frame: Tensor | None,
    caption: Tensor | None,
    logit_scale: Tensor,
    variant: str = "vsc_fc",
    *,
    video_present: Tensor | None = None,
    subtitle_present: Tensor | None = None,
    frame_present: Tensor | None = None,
    caption_present: Tensor | None = None,
    sharded: bool = False,
    backend: str = "native",
) -> Tensor:
    """Omnisource cross-modal loss (section 3.3); the variant names its terms.

    video, subtitle, frame, caption: unit vectors [n, D]; those that the variant does not use may
        be None.
    logit_scale, sharded, backend: see `contrastive_loss`.
    variant: terms joined by "_". "vs", "vc" and "fc" are `contrastive_loss` of two sources. "vsc"
        has the column halves of "vs" and "vc"; in its row halves, the negatives of a video are the
        subtitles and captions of all other clips together.
    *_present: bool [n], False if a clip lacks the source, as an image lacks a video (its features
        are ignored). The source is then neither a positive nor a negative; the clip's other sources
        remain negatives for other clips. Each mean is over the clips that have both sources of a
        term; a term that no clip has is 0. All masks are on one device; if that is the CPU, reading
        them waits for no GPU.
    Returns a 0-d tensor in at least fp32. For meta tensors, only its shape is computed.

    Raises ValueError for an unknown variant, for shapes that differ, or if a source that the
    variant needs is None; TypeError for masks that are not bool.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    given = {
        "v": ("video", video, video_present),
        "s": ("subtitle", subtitle, subtitle_present),
        "f": ("frame", frame, frame_present),
        "c": ("caption", caption, caption_present),
    }
    sources = {}
    for letter, (name, features, present) in given.items():
        if letter in variant:
            if features is None:
                raise ValueError(f"{name} is None, but {variant} needs it as [n, D] features")
            sources[letter] = _Features(name, features, present)
    _check(*sources.values())
    terms = [[(sources[term[0]], sources[x]) for x in term[1:]] for term in variant.split("_")]
    return _loss(terms, logit_scale, sharded, backend)


def _loss(terms: _Terms, logit_scale: Tensor, sharded: bool, backend: str) -> Tensor:
    """Add up the means of all terms, each over the clips of all ranks if sharded."""
    given: dict[str, Any] = {"scale": logit_scale, "backend": backend}
    functions: Iterator[_LogSumExp] = repeat(partial(pairwise_logsumexp, **given))
    if sharded:
        columns = [columns for term in terms for _, columns in term]
        of_ranks = gather_counts([x.number() for x in columns], columns[0].features.device)
        functions = (partial(sharded_logsumexp, counts=each, **given) for each in of_ranks)
    means = [
        mean for term in terms for mean in _means([_pair(*pair, next(functions)) for pair in term])
    ]
    totals = torch.stack([total for total, _ in means])
    counts = send(torch.tensor([clips for _, clips in means], dtype=totals.dtype), totals.device)
    if sharded:
        totals, counts = all_reduce(torch.stack([totals, counts]))
    return (totals / counts.clamp(min=1)).sum()


def _pair(rows: _Features, columns: _Features, logsumexp: _LogSumExp) -> _Pair:
    a, b = rows.features, columns.features
    masks = [mask for mask in (rows.present, columns.present) if mask is not None]
    if all(mask.is_meta for mask in masks):  # no mask, or none with values
        return _Pair(*logsumexp(a, b), slice(None))

    # Clips with both sources come first among the rows and last among the columns, so that their
    # positives are exactly the diagonal that ends in the last column.
    everyone = torch.ones_like(masks[0])
    has_row = everyone if rows.present is None else rows.present
    has_column = everyone if columns.present is None else columns.present
    clips = (has_row & has_column).nonzero().squeeze(1)
    row_order = torch.cat([clips, (has_row & ~has_column).nonzero().squeeze(1)])
    column_order = torch.cat([(has_column & ~has_row).nonzero().squeeze(1), clips])
    orders = clips, row_order, column_order
    clips, row_order, column_order = send(torch.cat(orders), a.device).split(list(map(len, orders)))
    row_lse, col_lse, positive = logsumexp(
        _at(a, row_order), _at(b, column_order), diagonal=len(column_order) - len(clips)
    )
    absent = row_lse.new_full((len(a),), float("-inf"))
    return _Pair(
        absent.index_copy(0, row_order, row_lse),
        absent.index_copy(0, column_order, col_lse),
        absent.index_copy(0, row_order, positive),
        clips,
    )


def _means(pairs: list[_Pair]) -> Iterator[tuple[Tensor, int]]:
    """Yield sum and count over clips of a term's cross entropies, log(1 + Σ exp(other - positive)).

    The rows of all pairs share their negatives; the columns of each have their own.
    """
    negatives = [pair.row_lse for pair in pairs]
    for pair in pairs:
        for others in (negatives, [pair.col_lse]):
            positive = _at(pair.positive, pair.clips)  # per mean, which orders sums of gradients
            loss = positive.new_zeros(())
            for other in others:
                loss = torch.logaddexp(loss, _at(other, pair.clips) - positive)
            yield loss.sum(), len(positive)


def _at(values: Tensor, clips: Tensor | slice) -> Tensor:
    """Return values[clips]. A GPU sorts indices in the backward of `[]`, as they may repeat."""
    return values[clips] if isinstance(clips, slice) else values.index_select(0, clips)


def _check(first: _Features, *others: _Features) -> None:
    shape = list(first.features.shape)
    if len(shape) != 2:
        raise ValueError(f"{first.name} is {shape}, expected [n, D]")
    for name, features, present in (first, *others):
        if list(features.shape) != shape:
            raise ValueError(f"{name} is {list(features.shape)}, expected {shape} as {first.name}")
        if present is not None and present.dtype != torch.bool:
            raise TypeError(f"{name}_present is {present.dtype}, expected torch.bool")
        if present is not None and present.is_meta and not features.is_meta:
            raise ValueError(f"{name}_present is on meta, without values, but {name} is not")
        if present is not None and present.shape != features.shape[:1]:
            raise ValueError(f"{name}_present is {list(present.shape)}, expected [{len(features)}]")
