"""Gaussian cutout, App. A: with probability p a rectangle of each image is replaced with random pixels.

One pass: reads what stays, writes everything once, draws noise only for blocks of pixels that meet a rectangle (p * mean area = 5 % of
the pixels with the defaults); in place (out is images) it touches the rectangles alone. Box drawing never waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import FLOATS, INTEGERS, expect, jit, memory_format, runs_triton, tl, triton

FILLS = ("gaussian", "uniform")


@jit
def random_pixels(seed, b, i, GAUSSIAN: tl.constexpr):
    """Random pixels numbered i of sample b: N(0.5, 0.25^2) clipped to [0, 1], or U[0, 1)."""
    first, second, _, _ = tl.philox(seed, i, b.to(tl.int32) + i * 0, i * 0, i * 0)
    noise = tl.uint_to_uniform_float(first)
    if GAUSSIAN:
        normal, _ = tl.pair_uniform_to_normal(noise, tl.uint_to_uniform_float(second))
        noise = tl.minimum(tl.maximum(0.5 + 0.25 * normal, 0.0), 1.0)
    return noise


@jit
def _kernel(
    out, images, boxes, noise, seed,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    GIVEN: tl.constexpr, GAUSSIAN: tl.constexpr, IN_PLACE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the sample's memory
    valid = i < C * H * W
    pixel = i // C if CHANNELS_LAST else i % (H * W)
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    bottom, right = top + tl.load(boxes + 4 * b + 2), left + tl.load(boxes + 4 * b + 3)
    row, col = pixel // W, pixel % W
    inside = valid & (row >= top) & (row < bottom) & (col >= left) & (col < right)

    at = b * (C * H * W) + i
    if not IN_PLACE:
        tl.store(out + at, tl.load(images + at, mask=valid & ~inside, other=0), mask=valid & ~inside)
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        if GIVEN:
            fill = tl.load(noise + at, mask=inside, other=0).to(tl.float32)
        else:
            fill = random_pixels(tl.load(seed), b, i, GAUSSIAN)
        tl.store(out + at, fill.to(out.dtype.element_ty), mask=inside)


def draw_boxes(
    B: int,
    H: int,
    W: int,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.2),
    aspect: tuple[float, float] = (0.5, 2.0),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    joint: bool = False,
    candidates: int = 32,
) -> Tensor:
    """Random rectangles int64 (B, 4) = (top, left, height, width); with probability 1 - p a row is all zero.

    Share of the image ~ U(area), height / width ~ U(aspect) (the paper gives ranges only), sides rounded to whole pixels, at least 1.
    Sizes are redrawn until they fit (all candidates at once, the first that fits; the last is cut to the image if none does), then placed
    uniformly. joint=True places anywhere in the image and redraws size and place together until the rectangle fits, as the common eraser
    does; that favours small rectangles. generator lives on `device`; nothing waits for the GPU.
    """
    u = torch.rand(6, B, candidates, generator=generator, device=device)
    every = not joint and area[1] * aspect[1] * W <= H and area[1] * H <= aspect[0] * W  # every size fits: the first is taken
    share, ratio = (v[:, 0] for v in u[:2]) if every else u[:2]  # (B,) or (B, K)
    share, ratio = area[0] + (area[1] - area[0]) * share, aspect[0] + (aspect[1] - aspect[0]) * ratio
    h, w = (torch.stack((share * ratio, share / ratio)) * (H * W)).sqrt_().round_().clamp_(min=1)
    if not every:
        top, left = (u[2] * H).floor(), (u[3] * W).floor()
        fits = (top + h <= H) & (left + w <= W) if joint else (h <= H) & (w <= W)
        fits[:, -1] = True
        first = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first maximum
        h, w, top, left = (v.gather(1, first)[:, 0] for v in (h, w, top, left))
        h, w = h.clamp(max=H), w.clamp(max=W)
    if joint:
        top, left = torch.minimum(top, H - h), torch.minimum(left, W - w)
    else:  # u is at most 1 - 2^-24, so that u * n never rounds up to n
        top, left = (u[4, :, 0] * (H + 1 - h)).floor_(), (u[4, :, -1] * (W + 1 - w)).floor_()
    boxes = torch.stack((top, left, h, w), 1).long()
    return boxes * (u[5, :, :1] < p)


def gaussian_cutout_ref(
    images: Tensor,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.2),
    aspect: tuple[float, float] = (0.5, 2.0),
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    joint: bool = False,
    boxes: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch of `gaussian_cutout`: one small write for each rectangle, noise drawn only there."""
    B, C, H, W = images.shape
    boxes = draw_boxes(B, H, W, p, area, aspect, generator, images.device, joint) if boxes is None else boxes
    out = images.clone() if out is None else out.copy_(images)
    drawn = [(b, *box) for b, box in enumerate(boxes.tolist()) if box[2] and box[3]]
    counts = [C * h * w for _, _, _, h, w in drawn]
    if noise is None:
        flat = torch.empty(sum(counts), device=images.device)
        flat = (
            flat.normal_(0.5, 0.25, generator=generator).clamp_(0, 1)
            if fill == "gaussian"
            else flat.uniform_(generator=generator)
        )
        flat = flat.to(out.dtype)
    target: Any
    source, target = flat if noise is None else noise, out
    if target.dtype == source.dtype == torch.float32 and not target.is_cuda:
        source, target = (
            source.numpy(),
            target.detach().numpy(),
        )  # the same memory; its slices cost a fraction of torch's
    start = 0
    for n, (b, top, left, h, w) in zip(counts, drawn):
        rows, cols = slice(top, top + h), slice(left, left + w)
        target[b, :, rows, cols] = (
            source[start : start + n].reshape(C, h, w) if noise is None else source[b, :, rows, cols]
        )
        start += n
    return out, boxes, boxes[:, 2:].all(1)


@torch.no_grad()
def gaussian_cutout(
    images: Tensor,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.2),
    aspect: tuple[float, float] = (0.5, 2.0),
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    joint: bool = False,
    boxes: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace a random rectangle of each image with random pixels, with probability p.

    images:    (B, C, H, W) in [0, 1], float32, float16 or bfloat16, contiguous or channels_last
    p, area, aspect, joint: how rectangles are drawn, see `draw_boxes`
    fill:      "gaussian" (App. A): N(0.5, 0.25^2) clipped to [0, 1], ours, as the paper gives no moments; "uniform": U[0, 1), as released
    generator: on the images' device, seeds rectangles and noise; the kernel's noise differs from the reference's
    boxes:     int (B, 4) = (top, left, height, width) inside the image, to use instead of drawing; height or width 0: none
    noise:     (B, C, H, W), to fill from instead of drawing
    out:       where to write, of the images' shape, dtype and layout; `out is images` works in place
    returns    images (B, C, H, W) as given in dtype and layout, boxes int (B, 4), erased bool (B,)
    Raises ValueError for another shape, dtype, device, layout or fill.
    """
    op = "gaussian_cutout: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    B, C, H, W = images.shape
    layout = memory_format(op + "images", images)
    if fill not in FILLS:
        raise ValueError(f"{op}fill must be gaussian or uniform, got {fill!r}")
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(f"{op}generator must be on {images.device}, got {generator.device}")
    if boxes is not None:
        expect(op + "boxes", boxes, (B, 4), INTEGERS, images)
    if noise is not None:
        expect(op + "noise", noise, (B, C, H, W), FLOATS, images)
    if out is not None:
        expect(op + "out", out, (B, C, H, W), (images.dtype,), images)
        if not out.is_contiguous(memory_format=layout):
            raise ValueError(op + "out must have the memory layout of images")
    if not runs_triton(images):
        return gaussian_cutout_ref(images, p, area, aspect, fill, generator, joint, boxes, noise, out)

    boxes = (
        draw_boxes(B, H, W, p, area, aspect, generator, images.device, joint) if boxes is None else boxes.contiguous()
    )
    out = torch.empty_like(images, memory_format=layout) if out is None else out
    given = noise is not None
    seed = None if given else torch.randint(2**31 - 1, (1,), generator=generator, device=images.device)
    block = 1024  # 8 elements for each of 128 threads; larger blocks would meet a rectangle, and draw noise, more often
    with torch.cuda.device_of(images):
        _kernel[(B, triton.cdiv(C * H * W, block))](
            out, images, boxes, noise.contiguous(memory_format=layout) if given else None, seed,
            C=C, H=H, W=W, BLOCK=block, GIVEN=given, GAUSSIAN=fill == "gaussian",
            IN_PLACE=out.data_ptr() == images.data_ptr(), CHANNELS_LAST=layout is torch.channels_last,
        )  # fmt: skip
    return out, boxes, (boxes[:, 2] * boxes[:, 3]) > 0
