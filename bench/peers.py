"""Published third-party kernels and runtimes as contestants of the benchmarks.

Each function imports its package when called, so a missing package raises ImportError only there.
Written for flash-attn 2.8, FlashAttention-3 of August 2026, flash-attn-4 4.0.0b36, natten 0.21.7,
inf-cl 1.2.1, memeff 0.3.1 and siglip-kernel 0.1.1.
"""

import copy
import functools
import importlib
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
TEMPERATURE = 0.02  # the fixed temperature of memeff, see there

# --- proxy attention -----------------------------------------------------------------------------
# Each function takes qkv [T, 3, H, D] packed as for clipvip.ops.proxy_attention, the frames of
# each video (B of them, at least 1 each), patches per frame L and proxies M, and returns
# [T, H, D]. F is the number of frames in the batch.

Lengths = tuple[int, ...]
Attend = Callable[[Tensor, Tensor, Tensor, Lengths, Lengths], Tensor]


def cudnn_sdpa(qkv: Tensor, frames: Lengths, patches: int, proxies: int) -> Tensor:
    """Two calls of scaled_dot_product_attention with the cuDNN backend; bf16 and fp16.

    Raises ValueError for videos of different lengths, RuntimeError where cuDNN has no kernel.
    """
    if len(set(frames)) > 1:
        raise ValueError("needs videos of one length")

    def attend(
        query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths
    ) -> Tensor:
        batch = [x.unflatten(0, (len(queries), -1)).transpose(1, 2) for x in (query, key, value)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*batch)
        return out.transpose(1, 2).flatten(0, 1)

    return _two_calls(attend, qkv, frames, patches, proxies)


def flash_attention(
    module: str, qkv: Tensor, frames: Lengths, patches: int, proxies: int
) -> Tensor:
    """Two calls of a version of FlashAttention (by Dao-AILab); bf16 and fp16.

    module: "flash_attn" is FlashAttention-2 (flash-attn), "flash_attn_interface" FlashAttention-3
        (folder hopper of Dao-AILab/flash-attention), "flash_attn.cute" FlashAttention-4
        (flash-attn-4).
    """
    kernel = importlib.import_module(module).flash_attn_varlen_func
    return _two_calls(_varlen(kernel), qkv, frames, patches, proxies)


def natten(qkv: Tensor, frames: Lengths, patches: int, proxies: int) -> Tensor:
    """Three calls of natten.attention (SHI-Labs/NATTEN); bf16 and fp16.

    Patches attend to their own frame in one call and to the proxies in another, and
    natten.merge_attentions combines both by log-sum-exp, so no keys are copied per frame. The
    backward of merge_attentions overwrites, in place, the output and log-sum-exp that each
    attention saved. Its inputs must therefore be views of what the attentions returned.
    """
    from natten import attention, merge_attentions

    def attend(
        query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths
    ) -> tuple[Tensor, Tensor]:
        ragged = len(set(queries)) > 1 or len(set(keys)) > 1
        lengths = {
            "cumulative_seqlen_Q": _offsets(queries, query.device),
            "cumulative_seqlen_KV": _offsets(keys, query.device),
            "max_seqlen_Q": max(queries),
            "max_seqlen_KV": max(keys),
        }
        batch = [x.unflatten(0, (1 if ragged else len(queries), -1)) for x in (query, key, value)]
        out, lse = attention(*batch, **(lengths if ragged else {}), return_lse=True)
        return out.view(1, *query.shape), lse.view(1, *query.shape[:2])

    query, key, value = qkv.unbind(1)
    proxy_q, q = _parts(query, frames, patches, proxies)
    proxy_k, k = _parts(key, frames, patches, proxies)
    proxy_v, v = _parts(value, frames, patches, proxies)
    per_video = (proxies,) * len(frames)
    per_frame = (patches,) * sum(frames)
    of_video = tuple(n * patches for n in frames)
    tokens = tuple(proxies + n for n in of_video)
    seen_by_proxies, _ = attend(proxy_q, key, value, per_video, tokens)
    of_frame, frame_lse = attend(q, k, v, per_frame, per_frame)
    of_proxies, proxies_lse = attend(q, proxy_k, proxy_v, of_video, per_video)
    seen_by_patches, _ = merge_attentions([of_frame, of_proxies], [frame_lse, proxies_lse])
    return _packed(seen_by_proxies[0], seen_by_patches[0], frames, patches, proxies)


def _two_calls(attend: Attend, qkv: Tensor, frames: Lengths, patches: int, proxies: int) -> Tensor:
    """Attention of proxies over their video, and of patches over proxies and their own frame.

    attend takes query [Q, H, D], key and value [K, H, D], and the lengths of the sequences in
    them. The first call reads keys and values in place; for the second they are copied, with the
    proxies' before those of each frame.
    """
    query, kv = qkv.split([1, 2], 1)
    proxy_q, patch_q = _parts(query.squeeze(1), frames, patches, proxies)
    key, value = kv.unbind(1)
    per_video = (proxies,) * len(frames)
    tokens = tuple(proxies + n * patches for n in frames)
    seen_by_proxies = attend(proxy_q, key, value, per_video, tokens)
    own_key, own_value = _frame_tokens(kv, frames, patches, proxies).unbind(1)
    per_frame, seen = (patches,) * sum(frames), (proxies + patches,) * sum(frames)
    seen_by_patches = attend(patch_q, own_key, own_value, per_frame, seen)
    return _packed(seen_by_proxies, seen_by_patches, frames, patches, proxies)


def _varlen(kernel: Callable[..., Tensor | tuple[Tensor, ...]]) -> Attend:
    """Wrap flash_attn_varlen_func, which in some versions returns the log-sum-exp too."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths
    ) -> Tensor:
        out = kernel(
            query,
            key,
            value,
            cu_seqlens_q=_offsets(queries, query.device),
            cu_seqlens_k=_offsets(keys, query.device),
            max_seqlen_q=max(queries),
            max_seqlen_k=max(keys),
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def _parts(x: Tensor, frames: Lengths, patches: int, proxies: int) -> tuple[Tensor, Tensor]:
    """Packed tokens [T, …] → proxies [B·M, …] and patches [F·L, …], both contiguous."""
    pieces = x.split([length for n in frames for length in (proxies, n * patches)])
    return torch.cat(pieces[::2]), torch.cat(pieces[1::2])


def _packed(
    of_proxies: Tensor, of_patches: Tensor, frames: Lengths, patches: int, proxies: int
) -> Tensor:
    """Proxies [B·M, …] and patches [F·L, …] → packed tokens [T, …]."""
    pieces = zip(
        of_proxies.split(proxies), of_patches.split([n * patches for n in frames]), strict=True
    )
    return torch.cat([*itertools.chain.from_iterable(pieces)])


def _frame_tokens(x: Tensor, frames: Lengths, patches: int, proxies: int) -> Tensor:
    """Packed tokens [T, …] → each frame's, after a copy of the proxies': [F·(M + L), …].

    Videos of one length avoid a gather, whose backward uses atomic additions.
    """
    if len(set(frames)) > 1:
        return x.index_select(0, _frame_map(frames, patches, proxies, x.device))
    videos = x.unflatten(0, (len(frames), -1))
    of_proxies, of_patches = videos.split([proxies, frames[0] * patches], 1)
    of_patches = of_patches.unflatten(1, (frames[0], patches))
    copies = of_proxies[:, None].expand(-1, frames[0], *of_proxies.shape[1:])
    return torch.cat([copies, of_patches], 2).flatten(0, 2)


@functools.cache
def _frame_map(frames: Lengths, patches: int, proxies: int, device: torch.device) -> Tensor:
    """Indices of the packed tokens that each frame's patches see, [F·(M + L)] int64."""
    tokens: list[int] = []
    start = 0
    for count in frames:
        first = start + proxies
        end = first + count * patches
        for frame in range(first, end, patches):
            tokens += [*range(start, first), *range(frame, frame + patches)]
        start = end
    return torch.tensor(tokens, device=device)


@functools.cache
def _offsets(lengths: Lengths, device: torch.device) -> Tensor:
    """Running sum of the lengths from 0 on, [len(lengths) + 1] int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


ATTENTION: dict[str, Callable[[Tensor, Lengths, int, int], Tensor]] = {
    "cuDNN SDPA": cudnn_sdpa,
    "FlashAttention-2": functools.partial(flash_attention, "flash_attn"),
    "FlashAttention-3": functools.partial(flash_attention, "flash_attn_interface"),
    "FlashAttention-4": functools.partial(flash_attention, "flash_attn.cute"),
    "NATTEN": natten,
}

# --- contrastive losses --------------------------------------------------------------------------
# Each function takes unit rows a and b [n, D], bf16 or fp32, and a 0-d fp32 scale, and returns a
# 0-d loss with gradients for all three.

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def inf_cl(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of rows plus that of columns by Inf-CL (DAMO-NLP-SG/Inf-CLIP, inf-cl).

    cal_flash_loss computes one direction, a loss per row; cal_inf_loss does the same on a single
    process, but its gradient of the scale needs a process group. Rows are multiplied by the scale
    in their own dtype; products are tf32.

    Raises ValueError if n is not a multiple of 64: the backward kernel reads past the end.
    """
    from inf_cl import cal_flash_loss

    if len(a) % 64:
        raise ValueError(f"n is {len(a)}, expected a multiple of 64")
    width = math.gcd(a.shape[1], 256)
    rows = cal_flash_loss(a, b, scale=scale, head_dim=width)
    columns = cal_flash_loss(b, a, scale=scale, head_dim=width)
    return rows.mean() + columns.mean()


def memeff(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of rows plus that of columns by memeff (b0nce/MemoryEfficientCLIP).

    The package's loss is the mean of both directions, hence the factor of 2; stable=False keeps
    the gradient of that loss. Its temperature is a number without gradient, so it stays fixed,
    and the scale goes into a instead. The kernels subtract 1 / temperature from logits before the
    exponential, not the row's maximum. At 0.01 many exponentials of random rows underflow; at
    0.02 logits from -37 to 127 fit into fp32, for n up to 65536.

    In bf16 probabilities are rounded before the positive is subtracted, which makes gradients of
    rows whose loss is almost 0 inaccurate. fp32 rows of D = 512 need more shared memory than an
    H200 has.
    """
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(TEMPERATURE, normalized_inputs=True, stable=False)
    return 2 * loss(scale * TEMPERATURE * a, b)


LOSSES: dict[str, Loss] = {"Inf-CL": inf_cl, "memeff": memeff}


def siglip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Sigmoid loss by siglip-kernel (avocardio/siglip-kernel), equal to sigmoid_loss.

    The package takes the logarithm of the scale and a bias, here 0, and returns a loss of the
    rows' dtype. Forward computes the gradients too. Importing it needs a GPU.
    """
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(a, b, scale.log(), scale.new_zeros(()))


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Sigmoid loss of SigLIP (arXiv 2303.15343) without bias, in plain PyTorch.

    Equivalent, in chunks of rows whose logits backward computes again, to:

        sign = 2 * torch.eye(n) - 1
        -F.logsigmoid(sign * scale * a @ b.T).sum() / n

    Sums have the dtype of the rows, which should be fp32 or float64.
    """

    def part(first: int, rows: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        logits = scale.to(rows.dtype) * (rows @ b.T)
        own = torch.arange(first, first + len(rows), device=rows.device)[:, None]
        return -F.logsigmoid(-logits).sum() - logits.gather(1, own).sum()

    total = a.new_zeros(())
    for first in range(0, len(a), CHUNK):
        rows = a[first : first + CHUNK]
        total = total + checkpoint(part, first, rows, b, scale, use_reentrant=False)
    return total / len(a)


# Kernels of another loss, each with that loss in plain PyTorch.
OTHER_LOSSES: dict[str, tuple[Loss, Loss]] = {"siglip-kernel": (siglip, sigmoid_loss)}

# --- the vision tower ----------------------------------------------------------------------------


@functools.cache
def onnx_runtime(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels fp32 [B, N, 3, H, W] to unit features [B, P], fp32, by ONNX
    Runtime on the CPU, with as many threads as PyTorch has.

    The graph is the one that `clipvip export --onnx` writes. ONNX Runtime has no bf16 on a CPU.
    """
    import onnxruntime

    from clipvip.export import VideoTower, make_exportable
    from clipvip.export_files import Tower, write_onnx, write_program

    exported: Any = copy.deepcopy(model).eval()
    make_exportable(exported)
    side = exported.config.vision_config.image_size
    names = {"pixel_values": {0: "videos", 1: "frames"}}
    tower = Tower("video", VideoTower(exported), names, {}, (torch.zeros(2, 3, 3, side, side),), [])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads wait actively for a while, at the cost of the contestant that is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, torch.autocast("cpu", enabled=False):
        program = write_program(tower, Path(folder, "video.pt2"))
        write_onnx(tower, program, Path(folder, "video.onnx"))
        session = onnxruntime.InferenceSession(
            Path(folder, "video.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def run(pixels: Tensor) -> Tensor:
        (features,) = session.run([tower.output], {"pixel_values": pixels.numpy()})
        return torch.from_numpy(features)

    return run
