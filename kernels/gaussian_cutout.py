"""Gaussian cutout, App. A: a rectangle of each image is replaced with random pixels.

One pass: reads what stays, writes everything once, and draws noise only for blocks of pixels that
meet a rectangle (5 % of the pixels with the paper's settings).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import FLOATS, INTS, elements, expect, in_box, jit, launch, memory_format, runs_triton, tl


@jit
def fill_box(out, noise, seed, b, i, at, inside, COPIED: tl.constexpr):
    """Write random pixels, those numbered i of sample b: N(0.5, 0.25^2) clipped to [0, 1]; COPIED:
    those of noise."""
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        if COPIED:
            fill = tl.load(noise + at, mask=inside, other=0).to(tl.float32)
        else:
            zero = i * 0
            first, second, _, _ = tl.philox(tl.load(seed), i, b.to(tl.int32) + zero, zero, zero)
            u1, u2 = tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second)
            normal, _ = tl.pair_uniform_to_normal(u1, u2)
            fill = tl.minimum(tl.maximum(0.5 + 0.25 * normal, 0.0), 1.0)
        tl.store(out + at, fill.to(out.dtype.element_ty), mask=inside)


@jit
def _kernel(
    out,
    images,
    boxes,
    noise,
    seed,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COPIED: tl.constexpr,
):
    b, i, valid, _, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    inside = valid & in_box(boxes, b, row, col)
    at = b * (C * H * W) + i
    stays = valid & ~inside
    tl.store(out + at, tl.load(images + at, mask=stays, other=0), mask=stays)
    fill_box(out, noise, seed, b, i, at, inside, COPIED)


def check_boxes(op: str, images: Tensor, boxes: Any, generator: Any, noise: Any) -> None:
    """Raise ValueError for what neither `gaussian_cutout` nor `augment` takes."""
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(f"{op}generator must be on {images.device}, got {generator.device}")
    expect(op + "boxes", boxes, (len(images), 4), INTS, images)
    if noise is not None:
        expect(op + "noise", noise, tuple(images.shape), FLOATS, images)


def draw_seed(images: Tensor, generator: torch.Generator | None, noise: Tensor | None):
    """Draw the seed of a kernel's noise, int (1,) on the device, so that nothing waits for a GPU;
    None where the noise is copied."""
    if noise is not None:
        return None
    return torch.randint(2**31 - 1, (1,), generator=generator, device=images.device)


def fill_boxes(
    images: Tensor, boxes: Tensor, generator: torch.Generator | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the boxes in place, in plain PyTorch: one small write for each rectangle, noise is drawn
    only there."""
    rectangles = [(b, *box) for b, box in enumerate(boxes.tolist()) if box[2] and box[3]]
    counts = [images.shape[1] * h * w for _, _, _, h, w in rectangles]
    source: Any = noise
    target: Any = images
    if noise is None:
        source = torch.empty(sum(counts), device=images.device)
        source.normal_(0.5, 0.25, generator=generator).clamp_(0, 1)
        source = source.to(images.dtype)
    if target.dtype == source.dtype == torch.float32 and not target.is_cuda:
        # NumPy shares the memory, and its slices cost a fraction of torch's
        source, target = source.numpy(), target.detach().numpy()
    start = 0
    for n, (b, top, left, h, w) in zip(counts, rectangles):
        at = (b, slice(None), slice(top, top + h), slice(left, left + w))
        target[at] = source[start : start + n].reshape(-1, h, w) if noise is None else source[at]
        start += n
    return images, boxes, boxes[:, 2:].all(1)


def gaussian_cutout_ref(
    images: Tensor,
    *,
    boxes: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch of `gaussian_cutout`."""
    return fill_boxes(images.clone(), boxes, generator, noise)


@torch.no_grad()
def gaussian_cutout(
    images: Tensor,
    *,
    boxes: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace a rectangle of each image with N(0.5, 0.25^2) clipped to [0, 1]: App. A gives no
    moments.

    images:    (B, C, H, W) in [0, 1], float32, float16 or bfloat16, contiguous or channels_last
    boxes:     int (B, 4) = (top, left, height, width) inside the image; height or width 0: none
    generator: on the images' device; the kernel's noise differs from the reference's
    noise:     (B, C, H, W), to fill from instead of drawing
    returns    images (B, C, H, W) of the same dtype and layout, boxes, erased bool (B,)
    Raises ValueError for another shape, dtype, device or layout.
    """
    op = "gaussian_cutout: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    layout = memory_format(op + "images", images)
    check_boxes(op, images, boxes, generator, noise)
    if not runs_triton(images):
        return gaussian_cutout_ref(images, boxes=boxes, generator=generator, noise=noise)
    out = torch.empty_like(images, memory_format=layout)
    seed = draw_seed(images, generator, noise)
    source = noise if noise is None else noise.contiguous(memory_format=layout)
    inputs = images, boxes.contiguous(), source, seed
    launch(_kernel, images, layout, out, *inputs, COPIED=noise is not None)
    return out, boxes, (boxes[:, 2] * boxes[:, 3]) > 0
