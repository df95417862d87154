"""Proxy-guided masked attention (CLIP-ViP, section 3.2)."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from clipvip.ops import _native


def takes_heads_of(head_dim: int) -> bool:
    """Return whether the compiled op takes heads of this size, D."""
    return head_dim % 8 == 0 and 8 <= head_dim <= 128


def proxy_attention(
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
    *,
    backend: str = "native",
) -> Tensor:
    """Attention in which a patch sees its own frame and the proxies, and a proxy sees everything.

    Equivalent, for a batch of one video, to

        frame = torch.arange(num_frames).repeat_interleave(patches_per_frame)
        frame = torch.cat([torch.full((num_proxies,), -1), frame])  # -1: a proxy
        seen = (frame[:, None] == frame) | (frame == -1) | (frame[:, None] == -1)
        query, key, value = qkv.permute(1, 2, 0, 3)  # [H, T, D]
        out = F.scaled_dot_product_attention(query, key, value, seen, scale=scale).transpose(0, 1)

    Videos of different lengths lie one after another without padding. Video b starts at token
    b·M + frame_offsets[b]·L, with its M proxies and then the patches of its frames.

    Args:
        qkv: [T, 3, H, D], a packed projection's output, in fp32, bf16 or fp16, on the CPU or a
            GPU of compute capability 8.0 or newer. D is a multiple of 8, at most 128.
            T = B·M + frame_offsets[B]·L. It is read in place whatever its strides, with two
            exceptions that are copied: a last dimension with gaps, and on a GPU heads that do not
            start on 16 bytes.
        frame_offsets: [B + 1] int32, the running sum of frames: 0, n_0, n_0 + n_1, … A video of
            0 frames has proxies only; an image is a video of one frame. On a GPU its values are
            not checked, which would mean waiting for them: wrong values give a wrong result, but
            no access outside the tensors.
        num_proxies: M ≥ 1.
        patches_per_frame: L ≥ 1.
        scale: factor of the logits; D ** -0.5 by default.
        backend: "native", the compiled kernel, or "reference", plain PyTorch for any device and
            floating dtype.

    Returns:
        [T, H, D], contiguous, in qkv's dtype; statistics and sums are fp32. Differentiable once
        in qkv; backward recomputes the weights. Result and gradient are deterministic: they depend
        neither on the number of threads nor on a GPU's order of work. fp32 never becomes tf32.
        Under autocast qkv is cast first.

    Raises:
        ValueError: sizes do not fit together, frame_offsets decreases, or backend is unknown.
        TypeError: qkv has none of the dtypes above, or frame_offsets is not int32.
        RuntimeError: the compiled module, or its kernels for this device, are missing.
        NotImplementedError: a derivative in forward mode is requested, which only the reference
            has.

    Source: CLIP-ViP (arXiv 2209.06430), section 3.2.
    """
    _native.check_arguments(backend, qkv=qkv)
    _check(qkv, frame_offsets, num_proxies, patches_per_frame)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    others = frame_offsets, num_proxies, patches_per_frame, scale
    if backend == "reference":
        with _native.without_autocast(qkv) as (qkv,):
            return proxy_attention_reference(qkv, *others)
    if dtype := _native.autocast_dtype(qkv):
        qkv = qkv.to(dtype)
    _native.check_kernels("qkv", qkv, frame_offsets)
    if not takes_heads_of(qkv.shape[-1]):
        raise ValueError(
            f"qkv has heads of D={qkv.shape[-1]}, expected a multiple of 8 up to 128; "
            "backend='reference' takes others"
        )
    return _forward(qkv, *others)[0]


def proxy_attention_reference(
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
) -> Tensor:
    """Compute `proxy_attention` in plain PyTorch; differentiable, any dtype and device.

    Where frame_offsets has no values to read, under torch.export and in FakeTensorMode, every pair
    of tokens gets a logit, which takes H·T² numbers.
    """
    if frame_offsets.is_meta:  # no values to read, none to compute
        return qkv[:, 2].clone()
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting() or isinstance(frame_offsets, FakeTensor):
        return _whole_batch_reference(qkv, frame_offsets, num_proxies, patches_per_frame, scale)
    _check_offsets(qkv, frame_offsets, num_proxies, patches_per_frame)
    outputs = []
    offsets = frame_offsets.tolist()
    for video, (first, last) in enumerate(itertools.pairwise(offsets)):
        start = video * num_proxies + first * patches_per_frame
        tokens = num_proxies + (last - first) * patches_per_frame
        query, key, value = qkv[start : start + tokens].permute(1, 2, 0, 3)  # [H, tokens, D]
        # A proxy belongs to frame -1, which everyone sees and which sees everyone.
        frame = torch.arange(last - first, device=qkv.device).repeat_interleave(patches_per_frame)
        frame = torch.cat([frame.new_full((num_proxies,), -1), frame])
        seen = (frame[:, None] == frame) | (frame == -1) | (frame[:, None] == -1)
        logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        outputs.append((logits.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs) if outputs else qkv[:, 0]


def proxy_attention_weights(
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
) -> Tensor:
    """Compute the weights by which `proxy_attention` averages values, in plain PyTorch.

    For arguments see `proxy_attention`; any floating dtype, head size and device.

    Returns [B, H, S, S] in qkv's dtype, with softmax in fp32 or wider. S is the number of tokens of
    the longest video: M + N·L for N frames. Row i, column j is what token i of a video takes from
    token j: a video's proxies come first, then its patches frame by frame. It is zero where a token
    is not seen, and past a shorter video's end. Differentiable in qkv. B·H·S² values are stored.
    """
    _check(qkv, frame_offsets, num_proxies, patches_per_frame)
    _check_offsets(qkv, frame_offsets, num_proxies, patches_per_frame)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    offsets = frame_offsets.tolist()
    most = max([0, *(last - first for first, last in itertools.pairwise(offsets))])
    longest = num_proxies + most * patches_per_frame
    # Each token's frame; below 0 for a proxy. It is the same in shorter videos.
    frame = (torch.arange(longest, device=qkv.device) - num_proxies) // patches_per_frame
    hidden = (frame[:, None] != frame) & (frame >= 0) & (frame[:, None] >= 0)
    precise = torch.promote_types(qkv.dtype, torch.float32)
    weights = qkv.new_zeros(len(offsets) - 1, qkv.shape[2], longest, longest)
    for video, (first, last) in enumerate(itertools.pairwise(offsets)):
        start = video * num_proxies + first * patches_per_frame
        tokens = num_proxies + (last - first) * patches_per_frame
        query, key, _ = qkv[start : start + tokens].permute(1, 2, 0, 3)  # [H, tokens, D]
        logits = query @ key.transpose(-1, -2) * scale
        logits = logits.masked_fill(hidden[:tokens, :tokens], float("-inf"))
        weights[video, :, :tokens, :tokens] = logits.softmax(-1, dtype=precise)
    return weights


def equal_lengths_reference(
    qkv: Tensor,
    frames_per_video: int,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
) -> Tensor:
    """Compute `proxy_attention` of videos that all have the same number of frames, N.

    Plain PyTorch whose shapes depend on no values, and in which a patch's logits are those of the
    M + L tokens that it sees. So torch.export traces it for any number of videos and frames.

    qkv: [B·(M + N·L), 3, H, D]. frames_per_video: N. Returns [B·(M + N·L), H, D].
    """
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    tokens = num_proxies + frames_per_video * patches_per_frame
    query, key, value = qkv.unflatten(0, (-1, tokens)).permute(2, 0, 3, 1, 4)  # [B, H, M + N·L, D]

    def by_frame(x: Tensor) -> Tensor:  # [B, H, N, L, D]
        return x[:, :, num_proxies:].unflatten(2, (frames_per_video, patches_per_frame))

    def seen(x: Tensor) -> Tensor:  # [B, H, N, M + L, D]
        proxies = x[:, :, None, :num_proxies].expand(-1, -1, frames_per_video, -1, -1)
        return torch.cat([proxies, by_frame(x)], 3)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value

    of_proxies = attend(query[:, :, :num_proxies], key, value)
    of_patches = attend(by_frame(query), seen(key), seen(value))
    return torch.cat([of_proxies, of_patches.flatten(2, 3)], 2).transpose(1, 2).flatten(0, 1)


def _whole_batch_reference(
    qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int, scale: float
) -> Tensor:
    """Compute `proxy_attention` without reading values of frame_offsets."""
    token = torch.arange(qkv.shape[0], device=qkv.device)
    videos = torch.arange(frame_offsets.shape[0], device=qkv.device)
    starts = videos * num_proxies + frame_offsets * patches_per_frame
    video = torch.searchsorted(starts, token, right=True) - 1
    # A proxy belongs to frame -1 of its video.
    frame = (token - starts[video] - num_proxies).div(patches_per_frame, rounding_mode="floor")
    frame = frame.clamp(min=-1)
    seen = (frame[:, None] == frame) | (frame == -1) | (frame[:, None] == -1)
    seen &= video[:, None] == video
    query, key, value = qkv.permute(1, 2, 0, 3)  # [H, T, D]
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1) @ value).transpose(0, 1)


def _check(qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int) -> None:
    """Check all that needs no values of frame_offsets."""
    if not isinstance(frame_offsets, Tensor) or frame_offsets.dtype != torch.int32:
        given = _native.type_of(frame_offsets)
        raise TypeError(f"frame_offsets is {given}, expected an int32 tensor")
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv is {list(qkv.shape)}, expected [T, 3, H, D]")
    if frame_offsets.ndim != 1 or frame_offsets.shape[0] == 0:
        raise ValueError(f"frame_offsets is {list(frame_offsets.shape)}, expected [B + 1]")
    for name, value in (("num_proxies", num_proxies), ("patches_per_frame", patches_per_frame)):
        if not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name} is {type(value).__name__}, expected int")
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def _check_offsets(
    qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int
) -> int:
    """Return the number of frames; reads the values of frame_offsets, which tracing cannot."""
    _native.check_memory(frame_offsets)
    offsets = frame_offsets.tolist()
    if offsets[0] != 0:
        raise ValueError(f"frame_offsets[0] is {offsets[0]}, expected 0")
    for i, (first, last) in enumerate(itertools.pairwise(offsets)):
        if last < first:
            raise ValueError(
                f"frame_offsets decreases: [{i}] is {first} and [{i + 1}] is {last}; "
                "expected the running sum of frames"
            )
    tokens, videos = qkv.shape[0], len(offsets) - 1
    patches = tokens - videos * num_proxies
    if patches != offsets[-1] * patches_per_frame:
        frames, rest = divmod(patches, patches_per_frame)
        held = f"{frames} frames" if rest == 0 else f"{patches / patches_per_frame:.2f} frames"
        raise ValueError(
            f"frame_offsets[-1] is {offsets[-1]} but qkv holds {held} "
            f"(T={tokens}, B={videos}, M={num_proxies}, L={patches_per_frame})"
        )
    return offsets[-1]


def _check_saved(qkv: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
    tokens, _, heads, head_dim = qkv.shape
    for name, tensor, dtype, shape in (
        ("grad_out", grad_out, qkv.dtype, [tokens, heads, head_dim]),
        ("out", out, qkv.dtype, [tokens, heads, head_dim]),
        ("lse", lse, torch.float32, [heads, tokens]),
    ):
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} is {given}, expected {dtype} {shape}")


def _count_frames(qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches: int) -> int:
    """Return the number of frames from qkv's size: reading frame_offsets would wait for the GPU."""
    tokens, videos = qkv.shape[0], len(frame_offsets) - 1
    frames, rest = divmod(tokens - videos * num_proxies, patches)
    if rest or frames < 0 or (frames and not videos):
        raise ValueError(
            f"qkv holds {tokens} tokens, which are not {videos} videos' proxies and whole frames "
            f"(T={tokens}, B={videos}, M={num_proxies}, L={patches})"
        )
    if tokens >= 1 << 31:
        raise ValueError(f"qkv holds {tokens} tokens, expected fewer than 2^31 on a GPU")
    return frames


def _batch(
    cuda: bool, qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches: int, scale: float
) -> tuple[Any, ...]:
    """Check a batch, and return it as the kernels for a GPU or the CPU take it."""
    count, readable = (_count_frames, _native.aligned) if cuda else (_check_offsets, _native.rows)
    frames = count(qkv, frame_offsets, num_proxies, patches)
    # Kernels size their memory by both numbers, and one that the batch does not use may be huge.
    sizes = num_proxies if len(frame_offsets) > 1 else 1, patches if frames else 1
    return readable(qkv), _native.dense(frame_offsets), *sizes, scale


@_native.custom_op("proxy_attention_forward")
def _forward(
    qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T] (fp32), base 2: log2 of the sum of 2^(scaled logit · log2 e)."""
    outputs = _forward_like(qkv)
    batch = _batch(False, qkv, frame_offsets, num_proxies, patches_per_frame, scale)
    _native.run("proxy_attention_forward", *batch, *outputs)
    return outputs


@_forward.register_kernel("cuda")
def _forward_cuda(*batch: Any) -> tuple[Tensor, Tensor]:
    outputs = _forward_like(*batch)
    _native.run("proxy_attention_forward_cuda", *_batch(True, *batch), *outputs)
    return outputs


@_forward.register_fake
def _forward_like(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    return qkv.new_empty(tokens, heads, head_dim), lse


@_native.custom_op("proxy_attention_backward")
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """The gradient of qkv, [T, 3, H, D], from that of out and what forward returned."""
    batch = qkv, frame_offsets, num_proxies, patches_per_frame, scale
    return _run_backward(False, grad_out, batch, out, lse)


@_backward.register_kernel("cuda")
def _backward_cuda(grad_out: Tensor, *given: Any) -> Tensor:
    *batch, out, lse = given
    return _run_backward(True, grad_out, batch, out, lse)


def _run_backward(
    cuda: bool, grad_out: Tensor, batch: Sequence[Any], out: Tensor, lse: Tensor
) -> Tensor:
    name, readable = "proxy_attention_backward", _native.rows
    if cuda:
        name, readable = f"{name}_cuda", _native.aligned
    given = _batch(cuda, *batch)
    _check_saved(batch[0], grad_out, out, lse)
    grad_qkv = _backward_like(grad_out, batch[0])
    _native.run(name, readable(grad_out), *given, readable(out), _native.dense(lse), grad_qkv)
    return grad_qkv


@_backward.register_fake
def _backward_like(grad_out: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    qkv, frame_offsets, *ctx.sizes = inputs
    ctx.save_for_backward(qkv, frame_offsets, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out: Tensor | None, grad_lse: None):
    if grad_out is None:
        return None, None, None, None, None
    qkv, frame_offsets, out, lse = ctx.saved_tensors
    grad_qkv = _backward(grad_out, qkv, frame_offsets, *ctx.sizes, out, lse)
    return grad_qkv, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
