"""Losses match the plain formula on stored logits, in float64."""

import pytest
import torch
import torch.nn.functional as F

from clipvip.losses import VARIANTS, contrastive_loss, omnisource_loss

NAMES = "video", "subtitle", "frame", "caption"


def unit(n: int, dimension: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dimension, dtype=torch.float64, generator=generator), dim=-1)


def inputs(n: int, scale: float = 30.0) -> list[torch.Tensor]:
    tensors = [unit(n, seed=seed) for seed in range(4)]
    tensors.append(torch.tensor(scale, dtype=torch.float64))
    return [tensor.requires_grad_() for tensor in tensors]


def negative_log_share(positive: torch.Tensor, everything: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(everything).logsumexp(0) - positive


def plain_loss(video, subtitle, frame, caption, scale, variant, present) -> torch.Tensor:
    """Compute the loss from one clip and one logit at a time; present: bool mask per source."""
    features = {"v": video, "s": subtitle, "f": frame, "c": caption}
    clips = range(len(video))

    def mean(terms: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(terms).mean() if terms else scale * 0

    def parts(x: str, y: str) -> tuple[torch.Tensor, torch.Tensor]:
        logits = scale * features[x] @ features[y].T
        columns = [j for j in clips if present[y][j]]
        lines = [i for i in clips if present[x][i]]
        both = [i for i in clips if present[x][i] and present[y][i]]
        row = mean(
            [negative_log_share(logits[i, i], [logits[i, j] for j in columns]) for i in both]
        )
        col = mean([negative_log_share(logits[j, j], [logits[i, j] for i in lines]) for j in both])
        return row, col

    def joint() -> torch.Tensor:
        logits = {y: scale * video @ features[y].T for y in "sc"}
        loss = parts("v", "s")[1] + parts("v", "c")[1]
        for y in "sc":
            terms = []
            for i in clips:
                if present["v"][i] and present[y][i]:
                    negatives = [
                        logits[z][i, j] for z in "sc" for j in clips if present[z][j] and j != i
                    ]
                    own = logits[y][i, i]
                    terms.append(negative_log_share(own, [own, *negatives]))
            loss = loss + mean(terms)
        return loss

    terms = [joint() if term == "vsc" else sum(parts(*term)) for term in variant.split("_")]
    return sum(terms)


def assert_same(ours: torch.Tensor, plain: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, plain)
    found = torch.autograd.grad(ours, tensors, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(plain, tensors, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_contrastive_loss_is_cross_entropy_both_ways(n):
    a, b, _, _, scale = inputs(n)
    own = torch.arange(n)
    logits = scale * a @ b.T
    plain = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    assert_same(contrastive_loss(a, b, scale, backend="reference"), plain, [a, b, scale])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_omnisource_loss_is_the_plain_formula(variant, n):
    tensors = inputs(n)
    present = {letter: [True] * n for letter in "vsfc"}
    plain = plain_loss(*tensors, variant, present)
    assert_same(omnisource_loss(*tensors, variant, backend="reference"), plain, tensors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_missing_sources_take_no_part(variant, seed):
    n = 6
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, generator=generator) < share for share in (0.7, 0.5, 0.6, 0.8)]
    masks = [*masks[3:], *masks[:3]]
    if seed == 2:  # nobody has a video
        masks[0] = torch.zeros(n, dtype=torch.bool)
    if seed == 3:  # nobody has a caption
        masks[3] = torch.zeros(n, dtype=torch.bool)
    tensors = inputs(n)
    present = dict(zip("vsfc", masks, strict=True))
    plain = plain_loss(*tensors, variant, present)
    garbage = [t.detach().clone().requires_grad_() for t in tensors]
    for tensor, mask in zip(garbage[:4], masks, strict=True):
        tensor.data[~mask] = float("nan")
    keywords = {f"{name}_present": mask for name, mask in zip(NAMES, masks, strict=True)}
    loss = omnisource_loss(*garbage, variant, backend="reference", **keywords)
    torch.testing.assert_close(loss, plain)
    expected = torch.autograd.grad(plain, tensors, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(loss, garbage, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_present_equals_no_masks(variant):
    tensors = inputs(5)
    everyone = torch.ones(5, dtype=torch.bool)
    keywords = {f"{name}_present": everyone for name in NAMES}
    masked = omnisource_loss(*tensors, variant, backend="reference", **keywords)
    assert_same(omnisource_loss(*tensors, variant, backend="reference"), masked, tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_present_is_zero_with_zero_gradient(variant):
    tensors = inputs(4)
    nobody = torch.zeros(4, dtype=torch.bool)
    keywords = {f"{name}_present": nobody for name in NAMES}
    loss = omnisource_loss(*tensors, variant, backend="reference", **keywords)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_the_same_loss(dtype):
    features = [tensor.detach().to(dtype) for tensor in inputs(50)[:4]]
    scale = torch.tensor(30.0)
    mask = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.7
    found, expected = (
        omnisource_loss(*tensors, factor, caption_present=mask, backend=backend)
        for tensors, factor, backend in (
            (features, scale, "native"),
            ([x.double() for x in features], scale.double(), "reference"),
        )
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_order_of_clips_does_not_matter():
    *features, scale = inputs(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = [feature[order] for feature in features]
    loss = omnisource_loss(*features, scale, backend="reference")
    torch.testing.assert_close(omnisource_loss(*shuffled, scale, backend="reference"), loss)


def test_errors_name_the_argument():
    video, subtitle, frame, caption, scale = inputs(3)
    with pytest.raises(ValueError, match="variant is 'all', expected one of vs, vs_fc"):
        omnisource_loss(video, subtitle, frame, caption, scale, "all")
    with pytest.raises(ValueError, match="caption is None"):
        omnisource_loss(video, subtitle, frame, None, scale)
    with pytest.raises(ValueError, match=r"subtitle is \[2, 12\], expected \[3, 12\]"):
        omnisource_loss(video, subtitle[:2], frame, caption, scale, "vs")
    with pytest.raises(TypeError, match=r"frame_present is torch.int64, expected torch.bool"):
        omnisource_loss(video, subtitle, frame, caption, scale, frame_present=torch.ones(3).long())
    with pytest.raises(ValueError, match=r"caption_present is \[2\], expected \[3\]"):
        mask = torch.ones(2, dtype=torch.bool)
        omnisource_loss(video, subtitle, frame, caption, scale, caption_present=mask)
    with pytest.raises(ValueError, match=r"b is \[2, 12\], expected \[3, 12\]"):
        contrastive_loss(video, subtitle[:2], scale)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_meta_tensors_give_the_shape_of_a_loss(backend):
    tensors = [x.detach().float().to("meta").requires_grad_() for x in inputs(5)]
    present = torch.ones(5, dtype=torch.bool, device="meta")
    masks = {f"{name}_present": present for name in NAMES}
    for variant in VARIANTS:
        loss = omnisource_loss(*tensors, variant, backend=backend, **masks)
        assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, tensors)
    assert [x.shape for x in gradients] == [x.shape for x in tensors]
    video, *others = (x.detach().float() for x in inputs(5))
    with pytest.raises(ValueError, match="subtitle_present is on meta, without values"):
        omnisource_loss(video, *others, "vs", subtitle_present=present)


def test_a_nan_reaches_the_loss():
    tensors = [x.detach().float() for x in inputs(5)]
    tensors[1][:] = torch.nan
    for variant in VARIANTS:
        assert omnisource_loss(*tensors, variant).isnan()
    assert contrastive_loss(tensors[1], tensors[1], tensors[4]).isnan()
