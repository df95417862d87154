"""Our kernels without peers, for compute-sanitizer and ncu.

python bench/kernels.py check   compares small cases with float64 (compute-sanitizer)
python bench/kernels.py run     runs attention of B/16 on 32 videos and the symmetric loss of 16384
                                rows once, and the work between the products of B/16 (ncu)
--device cpu                    uses the CPU instead of the GPU
--tiny                          runs at tiny sizes, to try the program
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence

import bench_elementwise as elementwise
import bench_pairwise_logsumexp as losses
import bench_proxy_attention as attention
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops import proxy_attention
from clipvip.ops.proxy_attention import proxy_attention_reference

# (dtype, D, L): several warps. Rows stay in shared memory, or pass through a ring: in backward, and
# for fp32 and D=128 in forward, too. Heads of 72 and 104 end within a pair of tiles.
ATTENTION = [
    (torch.bfloat16, 64, 140),
    (torch.float32, 64, 140),
    (torch.bfloat16, 64, 576),
    (torch.float32, 64, 576),
    (torch.float16, 128, 576),
    (torch.bfloat16, 72, 256),
    (torch.bfloat16, 104, 256),
    (torch.float32, 88, 256),
]
# (dtype, n, D): rows that stay in shared memory, and rows that pass through a ring.
LOSSES = [(torch.bfloat16, 300, 512), (torch.bfloat16, 300, 40), (torch.float32, 300, 512)]
# (dtype of the products, columns): one piece of a row, several, and the widest.
ELEMENTWISE = [(torch.bfloat16, 768), (torch.float16, 72), (torch.float32, 2048)]
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def check(device: str) -> None:
    """Compare forward and backward with float64 on the CPU, which a sanitizer does not check.

    Raises AssertionError that names all wrong results.
    """
    checks = [functools.partial(check_attention, *case, device) for case in ATTENTION]
    for case in LOSSES:
        checks.append(functools.partial(check_loss, "symmetric", 2, *case, device))
        checks.append(functools.partial(check_loss, "vsc_fc", 4, *case, device))
    for case in ELEMENTWISE:
        for part in elementwise.WIDTHS:
            checks.append(functools.partial(check_elementwise, part, *case, device))
    wrong = [found for found in (each() for each in checks) if found]
    assert not wrong, "; ".join(wrong)


def check_attention(dtype: torch.dtype, dim: int, patches: int, device: str) -> str | None:
    """Check videos of two, no and one frame, with 4 proxies and two heads; return what is wrong."""
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
    return fault(name, both_ways(proxy_attention, qkv.to(device)), expected, dtype)


def check_loss(
    kind: str, sources: int, dtype: torch.dtype, n: int, depth: int, device: str
) -> str | None:
    given = [*unit_rows(sources, n, depth, dtype), torch.tensor(100.0)]
    expected = losses.step(losses.FORMS[kind]["chunked"], *[x.double() for x in given])
    got = losses.step(losses.FORMS[kind]["ours"], *[x.to(device) for x in given])
    return fault(f"{kind} {dtype} n={n} D={depth}", got, expected, dtype)


def check_elementwise(part: str, dtype: torch.dtype, width: int, device: str) -> str | None:
    given = elementwise.inputs(part, 77, width, dtype)
    expected = elementwise.EAGER[part](*elementwise.with_bias(*[x.double() for x in given]))
    got = elementwise.OURS[part](*[x.to(device) for x in given])
    return fault(f"{part} {dtype} C={width}", got, expected, dtype)


def unit_rows(count: int, n: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    rows = torch.randn(count, n, depth, generator=torch.Generator().manual_seed(0))
    return list(F.normalize(rows, dim=-1).to(dtype))


def fault(
    name: str, got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> str | None:
    """Return what is wrong, or None. The error is the largest ‖x − expected‖ / ‖expected‖."""
    errors = [
        float((x.to(want) - want).norm() / want.norm().clamp(min=1e-30))
        for x, want in zip(got, expected, strict=True)
    ]
    worst = max((error if error == error else math.inf) for error in errors)
    print(f"{name}: off by {worst:.1e}", flush=True)
    if worst <= ALLOWED[dtype]:
        return None
    return f"{name} is off by {worst:.1e}, allowed {ALLOWED[dtype]:.1e}"


def run(device: str, tiny: bool) -> None:
    """Run each kernel once, forward and backward."""
    videos, rows = (1, 64) if tiny else (32, 16384)
    frames, patches = (12,) * videos, 9 if tiny else 196
    tokens = sum(attention.PROXIES + n * patches for n in frames)
    qkv = torch.randn(tokens, 3, attention.HEADS, attention.HEAD_DIM).to(device, torch.bfloat16)
    qkv.requires_grad_()
    features = [x.to(device) for x in unit_rows(2, rows, losses.DEPTH, torch.bfloat16)]
    out = attention.ours(qkv, frames, patches, attention.PROXIES)
    out.backward(torch.randn_like(out))
    losses.step(losses.FORMS["symmetric"]["ours"], *features, torch.tensor(100.0, device=device))
    for part, width in elementwise.WIDTHS.items():
        given = elementwise.inputs(part, tokens, width, torch.bfloat16)
        elementwise.OURS[part](*[x.to(device) for x in given])
    print(
        f"ran attention and the work between products on {tokens} tokens, and the symmetric loss "
        f"on {rows} rows, with backward"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "run"))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device (%(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="run at tiny sizes, to try the program")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("kernels: torch sees no CUDA GPU; --device cpu uses the CPU")
    if given.what == "check":
        try:
            check(given.device)
        except AssertionError as error:
            sys.exit(f"kernels: {error}")
    else:
        run(given.device, given.tiny)


if __name__ == "__main__":
    main()
