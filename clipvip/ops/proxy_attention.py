"""Proxy-guided masked attention (CLIP-ViP, section 3.2)."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipvip.ops import _native


def takes_heads_of(head_dim: int) -> bool:
    """Return whether the compiled op takes heads of this size, D."""
    return head_dim % 16 == 0 and 16 <= head_dim <= 128


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
            GPU of compute capability 8.0 or newer. D is a multiple of 16, at most 128.
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
    _check(qkv, frame_offsets, num_proxies, patches_per_frame)
    autocast = _native.autocast_dtype(qkv)
    if autocast is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(autocast)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "reference":
        given = qkv, frame_offsets, num_proxies, patches_per_frame, scale
        if autocast is None:
            return proxy_attention_reference(*given)
        with torch.autocast(qkv.device.type, enabled=False):
            return proxy_attention_reference(*given)
    if backend != "native":
        raise ValueError(f"backend is {backend!r}, expected 'native' or 'reference'")
    _native.check_kernels("qkv", qkv, frame_offsets)
    if not takes_heads_of(qkv.shape[-1]):
        raise ValueError(
            f"qkv has heads of D={qkv.shape[-1]}, expected a multiple of 16 up to 128; "
            "backend='reference' takes others"
        )
    return _forward(qkv, frame_offsets, num_proxies, patches_per_frame, scale)[0]


def proxy_attention_reference(
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
) -> Tensor:
    """Compute `proxy_attention` in plain PyTorch; differentiable, any dtype and device."""
    if frame_offsets.is_meta:  # no values to read, none to compute
        return qkv[:, 2].clone()
    _check_offsets(qkv, frame_offsets, num_proxies, patches_per_frame)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
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


def _check(qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int) -> None:
    """Check all that needs no values of frame_offsets."""
    if not isinstance(qkv, Tensor) or not qkv.is_floating_point():
        given: object = qkv.dtype if isinstance(qkv, Tensor) else type(qkv).__name__
        raise TypeError(f"qkv is {given}, expected a tensor of floating dtype")
    if not isinstance(frame_offsets, Tensor) or frame_offsets.dtype != torch.int32:
        tensor = isinstance(frame_offsets, Tensor)
        given = frame_offsets.dtype if tensor else type(frame_offsets).__name__
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
    offsets = _native.numbers(frame_offsets)
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


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy, whose rows of D elements each start on 16 bytes."""
    unit = 16 // tensor.element_size()
    whole = tensor.stride(-1) == 1 and all(step % unit == 0 for step in tensor.stride()[:-1])
    if whole and tensor.data_ptr() % 16 == 0:
        return tensor
    return _native.copied(tensor)


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


def _kernel_sizes(
    frames: int, frame_offsets: Tensor, num_proxies: int, patches: int
) -> tuple[int, int]:
    """Return num_proxies and patches for the kernel, 1 for either that the batch has none of.

    The kernel sizes its memory by them, and an unused number may be huge.
    """
    return num_proxies if len(frame_offsets) > 1 else 1, patches if frames else 1


@_native.custom_op("proxy_attention_forward")
def _forward(
    qkv: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T] (fp32), base 2: log2 of the sum of 2^(scaled logit · log2 e)."""
    given = qkv, frame_offsets, num_proxies, patches_per_frame
    frames = _check_offsets(*given)
    return _run_forward("proxy_attention_forward", _native.rows, frames, *given, scale)


@_forward.register_kernel("cuda")
def _forward_cuda(*given: Any) -> tuple[Tensor, Tensor]:
    frames = _count_frames(*given[:4])
    return _run_forward("proxy_attention_forward_cuda", _aligned, frames, *given)


def _run_forward(
    name: str,
    readable: Callable[[Tensor], Tensor],
    frames: int,
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """readable: returns a tensor, or a copy, with strides that the kernel takes."""
    outputs = _forward_like(qkv)
    sizes = _kernel_sizes(frames, frame_offsets, num_proxies, patches)
    given = readable(qkv), _native.dense(frame_offsets), *sizes, scale
    _native.run(name, *given, *outputs)
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
    given = qkv, frame_offsets, num_proxies, patches_per_frame
    frames = _check_offsets(*given)
    name = "proxy_attention_backward"
    return _run_backward(name, _native.rows, frames, grad_out, *given, scale, out, lse)


@_backward.register_kernel("cuda")
def _backward_cuda(*given: Any) -> Tensor:
    frames = _count_frames(*given[1:5])
    return _run_backward("proxy_attention_backward_cuda", _aligned, frames, *given)


def _run_backward(
    name: str,
    readable: Callable[[Tensor], Tensor],
    frames: int,
    grad_out: Tensor,
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """readable: returns a tensor, or a copy, with strides that the kernel takes."""
    _check_saved(qkv, grad_out, out, lse)
    grad_qkv = _backward_like(grad_out, qkv)
    sizes = _kernel_sizes(frames, frame_offsets, num_proxies, patches)
    given = readable(grad_out), readable(qkv), _native.dense(frame_offsets), *sizes, scale
    _native.run(name, *given, readable(out), _native.dense(lse), grad_qkv)
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
