"""The change of variables of App. C, x' = (tanh(w + delta) + 1) / 2, of the pixels under the mask.

One pass: reads w and delta, writes x'; backward reads the gradient, w and delta, writes delta's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import BLOCK as WIDE
from . import FLOATS, expect, jit, runs_triton, tl, triton


@jit
def _squash(z):
    """Compute (tanh(z) + 1) / 2 and its derivative, without overflow or cancellation."""
    e = tl.exp(-2 * tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1 + e), 2 * e / ((1 + e) * (1 + e))


@jit
def _forward_kernel(out, w, delta, size, delta_n, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    d = tl.load(delta + n * delta_n + i, mask=valid, other=0).to(tl.float32)
    x, _ = _squash(tl.load(w + n * size + i, mask=valid, other=0).to(tl.float32) + d)
    tl.store(out + n * size + i, x.to(out.dtype.element_ty), mask=valid)


@jit
def _backward_kernel(
    grad_delta,
    grad,
    w,
    delta,
    N,
    size,
    delta_n,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write BLOCK elements of one delta's gradient; one shared by the batch adds up its samples,
    ROWS at a time."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N if SHARED else 1, ROWS):
        k = tl.arange(0, ROWS).to(tl.int64) + (start if SHARED else tl.program_id(0))
        inside = (k < N)[:, None] & (i < size)[None, :]
        at = k[:, None] * size + i[None, :]
        under = k[:, None] * delta_n + i[None, :]
        d = tl.load(delta + under, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        _, slope = _squash(tl.load(w + at, mask=inside, other=0).to(tl.float32) + d)
        total += tl.sum(g * slope, axis=0)
    at = tl.program_id(0).to(tl.int64) * size + i
    tl.store(grad_delta + at, total.to(grad_delta.dtype.element_ty), mask=i < size)


class _TanhPerturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, delta):
        size = w[0].numel()
        ctx.save_for_backward(w, delta)
        ctx.sizes = size, size if len(delta) > 1 else 0
        out = torch.empty_like(w)
        with torch.cuda.device_of(w):
            grid = (len(w), triton.cdiv(size, WIDE))
            _forward_kernel[grid](out, w, delta, *ctx.sizes, BLOCK=WIDE)
        return out

    @staticmethod
    def backward(ctx, grad):
        w, delta = ctx.saved_tensors
        size, delta_n = ctx.sizes
        grad, result = grad.contiguous(), torch.empty_like(delta)
        shared = len(delta) < len(w)
        # One delta for the batch: small blocks, so that there are enough programs, and 16 samples
        # in flight in each.
        block, rows = (64, 16) if shared else (WIDE, 1)
        with torch.cuda.device_of(grad):
            grid = (len(delta), triton.cdiv(size, block))
            flags = {"BLOCK": block, "SHARED": shared, "ROWS": rows}
            _backward_kernel[grid](result, grad, w, delta, len(w), size, delta_n, **flags)
        return None, result


def tanh_perturb_ref(w: Tensor, delta: Tensor) -> Tensor:
    """Plain PyTorch of `tanh_perturb`."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return ((torch.tanh(w.to(wide) + delta.to(wide)) + 1) / 2).to(w.dtype)


def tanh_perturb(w: Tensor, delta: Tensor) -> Tensor:
    """Compute x' = (tanh(w + delta) + 1) / 2, differentiable in delta.

    w:       (N, C, P), the P pixels x under the mask as atanh((2 x - 1) * 0.999999); float32,
             float16 or bfloat16 (and float64, without a kernel); no gradient flows to it
    delta:   (N or 1, C, P), any of these dtypes: one for each image or one for all
    returns  (N, C, P) of w's dtype; arithmetic in float32 at least
    Raises ValueError for another shape, dtype or device, and for w that requires a gradient.
    """
    op, dtypes = "tanh_perturb: ", (*FLOATS, torch.float64)
    expect(op + "w", w, ("N", "C", "P"), dtypes)
    many = 1 if isinstance(delta, Tensor) and len(delta) == 1 else len(w)
    expect(op + "delta", delta, (many, *w.shape[1:]), dtypes, w)
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(op + "w must not require a gradient")
    if not runs_triton(w) or torch.float64 in (w.dtype, delta.dtype):
        return tanh_perturb_ref(w, delta)
    return _TanhPerturb.apply(w.contiguous(), delta.contiguous())
