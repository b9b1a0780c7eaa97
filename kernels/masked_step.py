"""Sign-gradient step in a rectangle of each image, Sec. 3.1 (inner attack of eq. 4-6): x + alpha *
sign(g) inside, clipped to [0, 1]. One pass: reads x, reads g only inside, writes the result."""

from __future__ import annotations

import torch
from torch import Tensor

from . import FLOATS, INTS, elements, expect, in_box, jit, launch, memory_format, runs_triton, tl


@jit
def _kernel(
    out,
    x,
    grad,
    alpha,
    boxes,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    b, i, valid, _, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    inside = valid & in_box(boxes, b, row, col)
    at = b * (C * H * W) + i
    value = tl.load(x + at, mask=valid, other=0)
    g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    stepped = value.to(tl.float32) + tl.load(alpha + b) * sign
    stepped = tl.minimum(tl.maximum(stepped, 0.0), 1.0)
    tl.store(out + at, tl.where(inside, stepped.to(value.dtype), value), mask=valid)


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Make masks bool (B, 1, height, width), True in boxes (B, 4) = (top, left, height, width)."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (B, 1)
    row = torch.arange(height, device=boxes.device)
    col = torch.arange(width, device=boxes.device)
    rows, cols = (row >= top) & (row < top + h), (col >= left) & (col < left + w)
    return (rows[:, :, None] & cols[:, None, :])[:, None]  # (B, 1, H, W)


def masked_step_ref(x: Tensor, grad: Tensor, alpha: Tensor, boxes: Tensor) -> Tensor:
    """Plain PyTorch of `masked_step`; on a CPU it works on the rectangles alone."""
    if x.is_cuda:
        stepped = grad.sign().float().mul_(alpha.view(-1, 1, 1, 1)).add_(x).clamp_(0, 1)
        return torch.where(box_mask(boxes, *x.shape[2:]), stepped.to(x.dtype), x)
    result = x.clone()
    for b, (step, (top, left, h, w)) in enumerate(zip(alpha.tolist(), boxes.tolist())):
        if h > 0 and w > 0:
            at = (b, slice(None), slice(top, top + h), slice(left, left + w))
            result[at] = grad[at].sign().float().mul_(step).add_(x[at]).clamp_(0, 1)
    return result


@torch.no_grad()
def masked_step(x: Tensor, grad: Tensor, alpha: Tensor, boxes: Tensor) -> Tensor:
    """Step x + alpha * sign(grad) in the boxes, clipped to [0, 1]; sign(0) = 0, x stays outside.

    x:      (B, C, H, W) float32, float16 or bfloat16, contiguous or channels_last
    grad:   (B, C, H, W), any of these dtypes; another memory layout than x's is copied to it first
    alpha:  float32 (B,): negative descends, so one batch may hold both directions
    boxes:  int32 or int64 (B, 4) = (top, left, height, width) in pixels, inside the image;
            height or width 0 is empty
    returns (B, C, H, W), in x's dtype and layout; arithmetic in float32; no gradient flows through
    Raises ValueError for another shape, dtype, device or layout.
    """
    op = "masked_step: "
    expect(op + "x", x, ("B", "C", "H", "W"))
    expect(op + "grad", grad, tuple(x.shape), FLOATS, x)
    expect(op + "alpha", alpha, (len(x),), (torch.float32,), x)
    expect(op + "boxes", boxes, (len(x), 4), INTS, x)
    layout = memory_format(op + "x", x)
    if not runs_triton(x):
        return masked_step_ref(x, grad, alpha, boxes)
    out, grad = torch.empty_like(x, memory_format=layout), grad.contiguous(memory_format=layout)
    launch(_kernel, x, layout, out, x, grad, alpha.contiguous(), boxes.contiguous())
    return out
