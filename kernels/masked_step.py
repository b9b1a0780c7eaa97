"""Sign-gradient step on part of each image, Sec. 3.1 (inner attack of eq. 4-6): x + alpha * sign(g) under a mask, clipped to [0, 1].

One pass: reads x, reads g only inside, writes the result; in place (out is x) it reads and writes only what lies inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import FLOATS, INTEGERS, expect, jit, memory_format, runs_triton, tl, triton


@jit
def _kernel(
    out, x, grad, alpha, boxes, mask,
    mask_stride,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    PER_SAMPLE: tl.constexpr, BOXES: tl.constexpr, IN_PLACE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the sample's memory
    valid = i < C * H * W
    pixel = i // C if CHANNELS_LAST else i % (H * W)
    if BOXES:
        top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
        bottom, right = top + tl.load(boxes + 4 * b + 2), left + tl.load(boxes + 4 * b + 3)
        row, col = pixel // W, pixel % W
        inside = valid & (row >= top) & (row < bottom) & (col >= left) & (col < right)
    else:
        inside = valid & (tl.load(mask + b * mask_stride + pixel, mask=valid, other=0) != 0)
    step = tl.load(alpha + b) if PER_SAMPLE else alpha

    at = b * (C * H * W) + i
    touched = inside if IN_PLACE else valid
    value = tl.load(x + at, mask=touched, other=0)
    g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    stepped = tl.minimum(tl.maximum(value.to(tl.float32) + step * sign, 0.0), 1.0)
    tl.store(out + at, tl.where(inside, stepped.to(value.dtype), value), mask=touched)


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool (B, 1, height, width), True inside boxes int (B, 4) = (top, left, height, width)."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (B, 1)
    rows = torch.arange(height, device=boxes.device)
    cols = torch.arange(width, device=boxes.device)
    inside = ((rows >= top) & (rows < top + h))[:, :, None] & ((cols >= left) & (cols < left + w))[:, None, :]
    return inside[:, None]  # (B, 1, H, W)


def masked_step_ref(
    x: Tensor,
    grad: Tensor,
    alpha: float | Tensor,
    boxes: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch of `masked_step`; on a CPU it works on the rectangles alone."""
    B, _, H, W = x.shape
    per_sample = isinstance(alpha, Tensor) and alpha.dim() > 0
    if boxes is not None and not x.is_cuda:
        result = x.clone() if out is None else out.copy_(x)
        steps = alpha.tolist() if per_sample else [alpha] * B
        for b, (top, left, h, w) in enumerate(boxes.tolist()):
            if h > 0 and w > 0:
                at = (b, slice(None), slice(top, top + h), slice(left, left + w))
                result[at] = grad[at].sign().float().mul_(steps[b]).add_(x[at]).clamp_(0, 1)
        return result
    inside = box_mask(boxes, H, W) if mask is None else mask.reshape(-1, 1, H, W) != 0
    step = alpha.reshape(B, 1, 1, 1) if per_sample else alpha
    stepped = grad.sign().float().mul_(step).add_(x).clamp_(0, 1).to(x.dtype)
    result = torch.where(inside, stepped, x)
    return result if out is None else out.copy_(result)


@torch.no_grad()
def masked_step(
    x: Tensor,
    grad: Tensor,
    alpha: float | Tensor,
    boxes: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x + alpha * sign(grad) inside the rectangles or the mask, clipped to [0, 1]; bit for bit x outside. sign(0) = 0.

    x:      (B, C, H, W) float32, float16 or bfloat16, contiguous or channels_last
    grad:   (B, C, H, W), any of these dtypes; another memory layout than x's is copied to it first
    alpha:  float, or float32 (B,): negative descends, so one batch may hold both directions
    boxes:  int32 or int64 (B, 4) = (top, left, height, width) in pixels; inside the image;
            height or width 0 is empty
    mask:   instead of boxes: (H, W), (B, H, W) or (B, 1, H, W), bool or float; inside is where it is not 0
    out:    where to write, of x's shape, dtype and layout; `out is x` steps in place
    returns (B, C, H, W), in x's dtype and layout; arithmetic in float32; no gradient flows through
    Raises ValueError for another shape, dtype, device or layout, and unless exactly one of boxes and mask is given.
    """
    op = "masked_step: "
    expect(op + "x", x, ("B", "C", "H", "W"))
    B, C, H, W = x.shape
    expect(op + "grad", grad, (B, C, H, W), FLOATS, x)
    layout = memory_format(op + "x", x)
    if (boxes is None) == (mask is None):
        raise ValueError(op + "give either boxes or mask")
    if boxes is not None:
        expect(op + "boxes", boxes, (B, 4), INTEGERS, x)
    if mask is not None:
        one = (1,) if mask.dim() == 4 else ()
        expect(op + "mask", mask, ((H, W) if mask.dim() == 2 else (B, *one, H, W)), (torch.bool, *FLOATS), x)
    per_sample = isinstance(alpha, Tensor)
    if per_sample:
        expect(op + "alpha", alpha, (B,), (torch.float32,), x)
    if out is not None:
        expect(op + "out", out, (B, C, H, W), (x.dtype,), x)
        if not out.is_contiguous(memory_format=layout):
            raise ValueError(op + "out must have the memory layout of x")
    if not runs_triton(x):
        return masked_step_ref(x, grad, alpha, boxes, mask, out)

    out = torch.empty_like(x, memory_format=layout) if out is None else out
    shared = mask is None or mask.dim() == 2
    if boxes is not None:
        boxes = boxes.contiguous()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.contiguous()
    block = 1024  # 8 elements for each of 128 threads: one 16-byte access in half precision, two in float32
    with torch.cuda.device_of(x):
        _kernel[(B, triton.cdiv(C * H * W, block))](
            out, x, grad.contiguous(memory_format=layout), alpha.contiguous() if per_sample else float(alpha), boxes, mask,
            0 if shared else H * W,
            C=C, H=H, W=W, BLOCK=block, PER_SAMPLE=per_sample, BOXES=boxes is not None,
            IN_PLACE=out.data_ptr() == x.data_ptr(), CHANNELS_LAST=layout is torch.channels_last,
        )  # fmt: skip
    return out
