"""Our kernels alone: checked at small sizes, or run once at the sizes that count.

python bench/kernels.py check   against float64, also for compute-sanitizer
python bench/kernels.py run     attention of B/16 at 32 videos, the symmetric loss of 16384
                                rows: for ncu
--device cpu                    instead of the GPU
--tiny                          run at tiny sizes, to see that the program works
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import bench_pairwise_logsumexp as losses
import bench_proxy_attention as attention
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops import proxy_attention
from clipvip.ops.proxy_attention import proxy_attention_reference

# (dtype, D, L): several warps, whose rows stay in shared memory, or come and go through a ring in
# backward, in fp32 and at D=128 in forward too.
ATTENTION = [
    (torch.bfloat16, 64, 140),
    (torch.float32, 64, 140),
    (torch.bfloat16, 64, 576),
    (torch.float32, 64, 576),
    (torch.float16, 128, 576),
]
# (dtype, n, D): rows that stay in shared memory, and that go through a ring.
LOSSES = [(torch.bfloat16, 300, 512), (torch.bfloat16, 300, 40), (torch.float32, 300, 512)]
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def check(device: str) -> None:
    """Forward and backward against float64 on the CPU, which a sanitizer leaves alone.

    Raises AssertionError where they are off.
    """
    for dtype, dim, patches in ATTENTION:
        check_attention(dtype, dim, patches, device)
    for dtype, n, depth in LOSSES:
        check_loss("symmetric", 2, dtype, n, depth, device)
        check_loss("vsc_fc", 4, dtype, n, depth, device)


def check_attention(dtype: torch.dtype, dim: int, patches: int, device: str) -> None:
    """Two frames, none, and one, with 4 proxies and two heads."""
    offsets, proxies = torch.tensor([0, 2, 2, 3], dtype=torch.int32), 4
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * proxies + 3 * patches
    qkv = torch.randn(tokens, 3, 2, dim, generator=generator).to(dtype)
    grad = torch.randn(tokens, 2, dim, generator=generator).to(dtype)

    def both_ways(form: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        out = form(leaf, offsets.to(x.device), proxies, patches)
        return out.detach(), *torch.autograd.grad(out, leaf, grad.to(x))

    expected = both_ways(proxy_attention_reference, qkv.double())
    name = f"attention {dtype} D={dim} L={patches}"
    hold(name, both_ways(proxy_attention, qkv.to(device)), expected, dtype)


def check_loss(
    kind: str, sources: int, dtype: torch.dtype, n: int, depth: int, device: str
) -> None:
    given = [*unit_rows(sources, n, depth, dtype), torch.tensor(100.0)]
    expected = losses.step(losses.FORMS[kind]["chunked"], *[x.double() for x in given])
    got = losses.step(losses.FORMS[kind]["ours"], *[x.to(device) for x in given])
    hold(f"{kind} {dtype} n={n} D={depth}", got, expected, dtype)


def unit_rows(count: int, n: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    rows = torch.randn(count, n, depth, generator=torch.Generator().manual_seed(0))
    return list(F.normalize(rows, dim=-1).to(dtype))


def hold(name: str, got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """By ‖x − expected‖ / ‖expected‖ of the worst tensor."""
    errors = [
        float((x.to(want) - want).norm() / want.norm().clamp(min=1e-30))
        for x, want in zip(got, expected, strict=True)
    ]
    print(f"{name}: off by {max(errors):.1e}", flush=True)
    wrong = [error for error in errors if not error <= ALLOWED[dtype]]  # a NaN, too
    assert not wrong, f"{name} is off by {wrong[0]:.1e}, allowed {ALLOWED[dtype]:.1e}"


def run(device: str, tiny: bool) -> None:
    """Each kernel once, forward and backward."""
    videos, rows = (1, 64) if tiny else (32, 16384)
    frames, patches = (12,) * videos, 9 if tiny else 196
    tokens = sum(attention.PROXIES + n * patches for n in frames)
    qkv = torch.randn(tokens, 3, attention.HEADS, attention.HEAD_DIM).to(device, torch.bfloat16)
    qkv.requires_grad_()
    features = [x.to(device) for x in unit_rows(2, rows, losses.DEPTH, torch.bfloat16)]
    out = attention.ours(qkv, frames, patches, attention.PROXIES)
    out.backward(torch.randn_like(out))
    losses.step(losses.FORMS["symmetric"]["ours"], *features, torch.tensor(100.0, device=device))
    print(f"ran attention on {tokens} tokens and the symmetric loss on {rows} rows, both ways")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("check", "run"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="run at tiny sizes")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("kernels: no CUDA GPU is seen; --device cpu runs them on the CPU")
    if given.what == "check":
        check(given.device)
    else:
        run(given.device, given.tiny)


if __name__ == "__main__":
    main()
