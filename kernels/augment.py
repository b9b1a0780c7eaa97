"""Static augmentation, App. A: mirroring, a small shift (edge filled) and Gaussian cutout.

One pass: reads each image once where no rectangle covers it, writes the result once, in the layout
that the model takes: no copy before or after. Nothing waits for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import INTS, elements, expect, in_box, jit, launch, memory_format, runs_triton, tl
from .gaussian_cutout import check_boxes, draw_seed, fill_box, fill_boxes


@jit
def _kernel(
    out,
    images,
    flips,
    shifts,
    boxes,
    noise,
    seed,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of what is written
    LAST_IN: tl.constexpr,
    COPIED: tl.constexpr,
):
    b, i, valid, channel, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    inside = valid & in_box(boxes, b, row, col)
    row = tl.minimum(tl.maximum(row + tl.load(shifts + 2 * b).to(tl.int32), 0), H - 1)
    col = tl.minimum(tl.maximum(col + tl.load(shifts + 2 * b + 1).to(tl.int32), 0), W - 1)
    col = tl.where(tl.load(flips + b) != 0, W - 1 - col, col)
    pixel = row * W + col
    source = b * (C * H * W) + (pixel * C + channel if LAST_IN else channel * (H * W) + pixel)
    stays = valid & ~inside
    value = tl.load(images + source, mask=stays, other=0).to(tl.float32)
    value = tl.div_rn(value, 255.0)  # correctly rounded, as PyTorch divides
    at = b * (C * H * W) + i
    tl.store(out + at, value, mask=stays)
    fill_box(out, noise, seed, b, i, at, inside, COPIED)


def augment_ref(
    images: Tensor,
    *,
    flips: Tensor,
    shifts: Tensor,
    boxes: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch of `augment`."""
    B, C, H, W = images.shape
    device = images.device
    rows = (torch.arange(H, device=device) + shifts[:, :1]).clamp(0, H - 1)  # (B, H)
    cols = (torch.arange(W, device=device) + shifts[:, 1:]).clamp(0, W - 1)  # (B, W)
    cols = torch.where(flips[:, None], W - 1 - cols, cols)
    planes = torch.arange(B * C, device=device).view(B, C, 1) * H
    rows = (planes + rows[:, None]).view(-1)  # whole rows first, then within them
    moved = images.contiguous().view(-1, W).index_select(0, rows).view(B, C, H, W)
    moved = moved.gather(3, cols[:, None, None].expand(B, C, H, W))
    # by a tensor: by a number a GPU would multiply with 1 / 255
    moved = moved.float().div_(torch.full((), 255.0, device=device))
    return fill_boxes(moved.contiguous(memory_format=layout), boxes, generator, noise)


@torch.no_grad()
def augment(
    images: Tensor,
    *,
    flips: Tensor,
    shifts: Tensor,
    boxes: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move each image with its edge repeated, mirror it, then replace a rectangle with noise.

    images:  uint8 (B, C, H, W), contiguous or channels_last
    flips:   bool (B,); shifts: int (B, 2): pixel (r, c) of the result is pixel (r + shifts[0], c')
             of the image, c' = c + shifts[1] or its mirror image, both clamped to the image
    boxes, generator, noise: see `gaussian_cutout`; the rectangle lies in the moved image
    layout:  memory format of the result
    returns  images float32 (B, C, H, W) in [0, 1], boxes, erased bool (B,)
    Raises ValueError for another shape, dtype, device or layout.
    """
    op = "augment: "
    expect(op + "images", images, ("B", "C", "H", "W"), (torch.uint8,))
    layout_in = memory_format(op + "images", images)
    expect(op + "flips", flips, (len(images),), (torch.bool,), images)
    expect(op + "shifts", shifts, (len(images), 2), INTS, images)
    check_boxes(op, images, boxes, generator, noise)
    if layout not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"{op}layout must be contiguous_format or channels_last")
    if not runs_triton(images):
        moves = {"flips": flips, "shifts": shifts, "boxes": boxes}
        return augment_ref(images, **moves, generator=generator, noise=noise, layout=layout)
    out = torch.empty(images.shape, device=images.device, memory_format=layout)
    seed = draw_seed(images, generator, noise)
    source = noise if noise is None else noise.contiguous(memory_format=layout)
    inputs = images, flips.contiguous().view(torch.uint8), shifts.contiguous(), boxes.contiguous()
    flags = {"COPIED": noise is not None, "LAST_IN": layout_in is torch.channels_last}
    launch(_kernel, images, layout, out, *inputs, source, seed, **flags)
    return out, boxes, (boxes[:, 2] * boxes[:, 3]) > 0
