"""Gaussian cutout, App. A: a rectangle of each image is replaced with random pixels.

One pass: reads what stays, writes everything once, and draws noise only for blocks of pixels that
meet a rectangle (5 % of the pixels with the paper's settings).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import FLOATS, INTS, elements, expect, in_box, jit, launch, memory_format, runs_triton, tl

FILLS = ("gaussian", "uniform")


@jit
def fill_box(out, noise, seed, b, i, at, inside, GIVEN: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Write random pixels, those numbered i of sample b: N(0.5, 0.25^2) clipped to [0, 1], or
    U[0, 1); GIVEN: those of noise."""
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        if GIVEN:
            fill = tl.load(noise + at, mask=inside, other=0).to(tl.float32)
        else:
            zero = i * 0
            first, second, _, _ = tl.philox(tl.load(seed), i, b.to(tl.int32) + zero, zero, zero)
            fill = tl.uint_to_uniform_float(first)
            if GAUSSIAN:
                normal, _ = tl.pair_uniform_to_normal(fill, tl.uint_to_uniform_float(second))
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
    GIVEN: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    b, i, valid, _, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    inside = valid & in_box(boxes, b, row, col)
    at = b * (C * H * W) + i
    stays = valid & ~inside
    tl.store(out + at, tl.load(images + at, mask=stays, other=0), mask=stays)
    fill_box(out, noise, seed, b, i, at, inside, GIVEN, GAUSSIAN)


def check_fill(op: str, images: Tensor, boxes: Any, fill: str, generator: Any, noise: Any) -> None:
    """Raise ValueError for what neither `gaussian_cutout` nor `augment` takes."""
    if fill not in FILLS:
        raise ValueError(f"{op}fill must be gaussian or uniform, got {fill!r}")
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(f"{op}generator must be on {images.device}, got {generator.device}")
    expect(op + "boxes", boxes, (len(images), 4), INTS, images)
    if noise is not None:
        expect(op + "noise", noise, tuple(images.shape), FLOATS, images)


def drawn_seed(images: Tensor, generator: torch.Generator | None, noise: Tensor | None):
    """The seed of the noise a kernel draws, int (1,) on the device: nothing waits for a GPU."""
    if noise is not None:
        return None
    return torch.randint(2**31 - 1, (1,), generator=generator, device=images.device)


def fill_boxes(
    images: Tensor,
    boxes: Tensor,
    fill: str,
    generator: torch.Generator | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """In place, in plain PyTorch: one small write for each rectangle, noise drawn only there."""
    drawn = [(b, *box) for b, box in enumerate(boxes.tolist()) if box[2] and box[3]]
    counts = [images.shape[1] * h * w for _, _, _, h, w in drawn]
    source: Any = noise
    target: Any = images
    if noise is None:
        source = torch.empty(sum(counts), device=images.device)
        if fill == "gaussian":
            source.normal_(0.5, 0.25, generator=generator).clamp_(0, 1)
        else:
            source.uniform_(generator=generator)
        source = source.to(images.dtype)
    if target.dtype == source.dtype == torch.float32 and not target.is_cuda:
        # the same memory; its slices cost a fraction of torch's
        source, target = source.numpy(), target.detach().numpy()
    start = 0
    for n, (b, top, left, h, w) in zip(counts, drawn):
        at = (b, slice(None), slice(top, top + h), slice(left, left + w))
        target[at] = source[start : start + n].reshape(-1, h, w) if noise is None else source[at]
        start += n
    return images, boxes, boxes[:, 2:].all(1)


def gaussian_cutout_ref(
    images: Tensor,
    *,
    boxes: Tensor,
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch of `gaussian_cutout`."""
    return fill_boxes(images.clone(), boxes, fill, generator, noise)


@torch.no_grad()
def gaussian_cutout(
    images: Tensor,
    *,
    boxes: Tensor,
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace a rectangle of each image with random pixels.

    images:    (B, C, H, W) in [0, 1], float32, float16 or bfloat16, contiguous or channels_last
    boxes:     int (B, 4) = (top, left, height, width) inside the image; height or width 0: none
    fill:      "gaussian" (App. A): N(0.5, 0.25^2) clipped to [0, 1], as the paper gives no moments;
               "uniform": U[0, 1), as released
    generator: on the images' device; the kernel's noise differs from the reference's
    noise:     (B, C, H, W), to fill from instead of drawing
    returns    images (B, C, H, W) as given in dtype and layout, boxes, erased bool (B,)
    Raises ValueError for another shape, dtype, device, layout or fill.
    """
    op = "gaussian_cutout: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    layout = memory_format(op + "images", images)
    check_fill(op, images, boxes, fill, generator, noise)
    if not runs_triton(images):
        return gaussian_cutout_ref(images, boxes=boxes, fill=fill, generator=generator, noise=noise)
    out = torch.empty_like(images, memory_format=layout)
    seed = drawn_seed(images, generator, noise)
    given = noise if noise is None else noise.contiguous(memory_format=layout)
    flags = {"GIVEN": noise is not None, "GAUSSIAN": fill == "gaussian"}
    launch(_kernel, images, layout, out, images, boxes.contiguous(), given, seed, **flags)
    return out, boxes, (boxes[:, 2] * boxes[:, 3]) > 0
