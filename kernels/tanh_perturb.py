"""The change of variables of App. C, x' = (tanh(w + M * delta) + 1) / 2.

One pass: reads w and delta, writes x'; backward reads the gradient, w and delta, writes delta's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import FLOATS, elements, expect, jit, launch, memory_format, runs_triton, tl, triton


@jit
def _squash(z):
    """(tanh(z) + 1) / 2 and its derivative, without overflow or cancellation."""
    e = tl.exp(-2 * tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1 + e), 2 * e / ((1 + e) * (1 + e))


@jit
def _forward_kernel(
    out,
    w,
    delta,
    mask,
    delta_b,
    mask_b,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    b, i, valid, _, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    at = b * (C * H * W) + i
    d = tl.load(delta + b * delta_b + i, mask=valid, other=0).to(tl.float32)
    if MASKED:
        d *= tl.load(mask + b * mask_b + row * W + col, mask=valid, other=0).to(tl.float32)
    x, _ = _squash(tl.load(w + at, mask=valid, other=0).to(tl.float32) + d)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=valid)


@jit
def _backward_kernel(
    grad_delta,
    grad,
    w,
    delta,
    mask,
    B,
    delta_b,
    mask_b,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """BLOCK elements of one delta; one shared by the batch adds up its samples, ROWS at a time."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < C * H * W
    pixel = i // C if CHANNELS_LAST else i % (H * W)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B if SHARED else 1, ROWS):
        k = tl.arange(0, ROWS).to(tl.int64) + (start if SHARED else tl.program_id(0))
        inside = (k < B)[:, None] & valid[None, :]
        at = k[:, None] * (C * H * W) + i[None, :]
        under = k[:, None] * delta_b + i[None, :]
        d = tl.load(delta + under, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        if MASKED:
            under = k[:, None] * mask_b + pixel[None, :]
            m = tl.load(mask + under, mask=inside, other=0).to(tl.float32)
            d, g = d * m, g * m
        _, slope = _squash(tl.load(w + at, mask=inside, other=0).to(tl.float32) + d)
        total += tl.sum(g * slope, axis=0)
    at = tl.program_id(0).to(tl.int64) * (C * H * W) + i
    tl.store(grad_delta + at, total.to(grad_delta.dtype.element_ty), mask=valid)


class _TanhPerturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, delta, mask):
        _, C, H, W = w.shape
        layout = memory_format("tanh_perturb: w", w)
        shared_mask = mask is None or mask.dim() == 2
        strides = 0 if len(delta) == 1 else C * H * W, 0 if shared_mask else H * W
        out = torch.empty_like(w, memory_format=layout)
        ctx.save_for_backward(w, delta, mask)
        ctx.layout, ctx.strides = layout, strides
        launch(_forward_kernel, w, layout, out, w, delta, mask, *strides, MASKED=mask is not None)
        return out

    @staticmethod
    def backward(ctx, grad):
        w, delta, mask = ctx.saved_tensors
        B, C, H, W = w.shape
        grad = grad.contiguous(memory_format=ctx.layout)
        result = torch.empty_like(delta, memory_format=ctx.layout)
        # one delta for the batch: small blocks, so that there are enough programs, and 16 samples
        # in flight in each
        shared = len(delta) == 1 and B > 1
        block, rows = (64, 16) if shared else (1024, 1)
        sizes = {"C": C, "H": H, "W": W, "BLOCK": block, "ROWS": rows}
        flags = {"MASKED": mask is not None, "SHARED": shared}
        flags["CHANNELS_LAST"] = ctx.layout is torch.channels_last
        with torch.cuda.device_of(grad):
            grid = (len(delta), triton.cdiv(C * H * W, block))
            _backward_kernel[grid](result, grad, w, delta, mask, B, *ctx.strides, **sizes, **flags)
        return None, result, None


def to_tanh(x: Tensor) -> Tensor:
    """w = atanh((2 x - 1) * 0.999999), float32, App. C: x' = x (to 5e-7) when delta = 0."""
    return torch.atanh((2 * x.float() - 1) * 0.999999)


def tanh_perturb_ref(w: Tensor, delta: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain PyTorch of `tanh_perturb`."""
    if mask is not None:
        delta = (mask if mask.dim() == 2 else mask.reshape(-1, 1, *mask.shape[-2:])) * delta
    return ((torch.tanh(w.float() + delta.float()) + 1) / 2).to(w.dtype)


def tanh_perturb(w: Tensor, delta: Tensor, mask: Tensor | None = None) -> Tensor:
    """x' = (tanh(w + mask * delta) + 1) / 2, differentiable in delta.

    w:       (B, C, H, W), see `to_tanh`; float32, float16 or bfloat16, contiguous or channels_last;
             no gradient flows to it
    delta:   (B or 1, C, H, W), any of these dtypes: one for each image or one for all
    mask:    (H, W), (B, H, W) or (B, 1, H, W), bool or float, or None: everywhere
    returns  (B, C, H, W) of w's dtype and layout; arithmetic in float32
    Raises ValueError for another shape, dtype, device or layout, or if w requires a gradient.
    """
    op = "tanh_perturb: "
    expect(op + "w", w, ("B", "C", "H", "W"))
    B, C, H, W = w.shape
    layout = memory_format(op + "w", w)
    many = 1 if isinstance(delta, Tensor) and len(delta) == 1 else B
    expect(op + "delta", delta, (many, C, H, W), FLOATS, w)
    if mask is not None:
        shape = {2: (H, W), 4: (B, 1, H, W)}.get(mask.dim(), (B, H, W))
        expect(op + "mask", mask, shape, (torch.bool, *FLOATS), w)
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(op + "w must not require a gradient")
    if not runs_triton(w):
        return tanh_perturb_ref(w, delta, mask)
    if mask is not None:
        mask = mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return _TanhPerturb.apply(w, delta.contiguous(memory_format=layout), mask)
