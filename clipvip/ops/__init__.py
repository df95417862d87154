"""The kernels as Python functions; the two here are differentiable PyTorch ops."""

from clipvip.ops.pairwise_logsumexp import pairwise_logsumexp
from clipvip.ops.proxy_attention import proxy_attention

__all__ = ["pairwise_logsumexp", "proxy_attention"]
