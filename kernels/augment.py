"""Static augmentation, App. A: random mirroring, shifts of at most 5 pixels (edge filled) and Gaussian cutout, in one gather.

One pass: reads each image once where no rectangle covers it, writes the result once. Images may be the data set's uint8 (scaled by 1 / 255
on the way), and may come out in another layout than they came in: no copy before or after. Nothing waits for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import FLOATS, INTEGERS, expect, jit, memory_format, runs_triton, tl, triton
from .gaussian_cutout import FILLS, draw_boxes, gaussian_cutout_ref, random_pixels


@jit
def _kernel(
    out, images, flips, shifts, boxes, noise, seed,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    BYTES: tl.constexpr, GIVEN: tl.constexpr, GAUSSIAN: tl.constexpr, LAST_IN: tl.constexpr, LAST_OUT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the sample's memory, as written
    valid = i < C * H * W
    channel = i % C if LAST_OUT else i // (H * W)
    pixel = i // C if LAST_OUT else i % (H * W)
    row, col = pixel // W, pixel % W
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    bottom, right = top + tl.load(boxes + 4 * b + 2), left + tl.load(boxes + 4 * b + 3)
    inside = valid & (row >= top) & (row < bottom) & (col >= left) & (col < right)

    source_row = tl.minimum(tl.maximum(row + tl.load(shifts + 2 * b).to(tl.int32), 0), H - 1)
    source_col = tl.minimum(tl.maximum(col + tl.load(shifts + 2 * b + 1).to(tl.int32), 0), W - 1)
    source_col = tl.where(tl.load(flips + b) != 0, W - 1 - source_col, source_col)
    source = source_row * W + source_col
    source = source * C + channel if LAST_IN else channel * (H * W) + source
    value = tl.load(images + b * (C * H * W) + source, mask=valid & ~inside, other=0).to(tl.float32)
    if BYTES:
        value = tl.div_rn(value, 255.0)  # correctly rounded, as PyTorch divides
    at = b * (C * H * W) + i
    tl.store(out + at, value.to(out.dtype.element_ty), mask=valid & ~inside)
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        if GIVEN:
            fill = tl.load(noise + at, mask=inside, other=0).to(tl.float32)
        else:
            fill = random_pixels(tl.load(seed), b, i, GAUSSIAN)
        tl.store(out + at, fill.to(out.dtype.element_ty), mask=inside)


def draw_moves(
    B: int, shift: int = 5, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Mirror or not with even odds, bool (B,), and offsets U{-shift, ..., shift}, int64 (B, 2) = (down, right)."""
    flips = torch.rand(B, generator=generator, device=device) < 0.5
    return flips, torch.randint(-shift, shift + 1, (B, 2), generator=generator, device=device)


def augment_ref(
    images: Tensor,
    shift: int = 5,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.2),
    aspect: tuple[float, float] = (0.5, 2.0),
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    joint: bool = False,
    flips: Tensor | None = None,
    shifts: Tensor | None = None,
    boxes: Tensor | None = None,
    noise: Tensor | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch of `augment`."""
    B, C, H, W = images.shape
    device = images.device
    if flips is None or shifts is None:
        drawn = draw_moves(B, shift, generator, device)
        flips, shifts = drawn[0] if flips is None else flips, drawn[1] if shifts is None else shifts
    boxes = draw_boxes(B, H, W, p, area, aspect, generator, device, joint) if boxes is None else boxes
    rows = (torch.arange(H, device=device) + shifts[:, :1]).clamp(0, H - 1)  # (B, H)
    cols = (torch.arange(W, device=device) + shifts[:, 1:]).clamp(0, W - 1)  # (B, W)
    cols = torch.where(flips[:, None], W - 1 - cols, cols)
    planes = torch.arange(B * C, device=device).view(B, C, 1) * H
    moved = images.contiguous().view(-1, W).index_select(0, (planes + rows[:, None]).view(-1)).view(B, C, H, W)
    moved = moved.gather(3, cols[:, None, None].expand(B, C, H, W))  # whole rows first, then within them
    if images.dtype == torch.uint8:
        moved = moved.float().div_(torch.full((), 255.0, device=device))  # a tensor: by a number a GPU multiplies with 1 / 255
    layout = memory_format("augment: images", images) if layout is None else layout
    dtype = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    moved = moved.to(dtype).contiguous(memory_format=layout)
    return gaussian_cutout_ref(moved, fill=fill, generator=generator, boxes=boxes, noise=noise, out=moved)


@torch.no_grad()
def augment(
    images: Tensor,
    shift: int = 5,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.2),
    aspect: tuple[float, float] = (0.5, 2.0),
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    joint: bool = False,
    flips: Tensor | None = None,
    shifts: Tensor | None = None,
    boxes: Tensor | None = None,
    noise: Tensor | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image moved by a random offset with its edge repeated, mirrored with even odds, then a rectangle of it replaced by noise.

    images:    (B, C, H, W), uint8, or float32, float16 or bfloat16 in [0, 1]; contiguous or channels_last
    shift:     largest offset in pixels, either way, down and right
    p, area, aspect, joint, fill, boxes, noise: the cutout's, see `gaussian_cutout`; the rectangle lies in the moved image
    generator: on the images' device, seeds everything drawn; the kernel's noise differs from the reference's
    flips:     bool (B,), to use instead of drawing; shifts: int (B, 2), likewise: pixel (r, c) of the result is
               pixel (r + shifts[0], c' ) of the image, c' = c + shifts[1] or its mirror image, both held inside
    dtype:     of the result: float32 for uint8, the images' own otherwise; layout: its memory format, by default the images'
    returns    images (B, C, H, W), boxes int (B, 4), erased bool (B,)
    Raises ValueError for another shape, dtype, device, layout or fill.
    """
    op = "augment: "
    expect(op + "images", images, ("B", "C", "H", "W"), (torch.uint8, *FLOATS))
    B, C, H, W = images.shape
    own = memory_format(op + "images", images)
    if fill not in FILLS:
        raise ValueError(f"{op}fill must be gaussian or uniform, got {fill!r}")
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(f"{op}generator must be on {images.device}, got {generator.device}")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"{op}dtype must be float32 or float16 or bfloat16, got {str(dtype)[6:]}")
    if layout not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(op + "layout must be contiguous_format or channels_last")
    checks = (("flips", flips, (B,), (torch.bool,)), ("shifts", shifts, (B, 2), INTEGERS))
    checks += (("boxes", boxes, (B, 4), INTEGERS), ("noise", noise, (B, C, H, W), FLOATS))
    for name, given, shape, dtypes in checks:
        if given is not None:
            expect(op + name, given, shape, dtypes, images)
    if not runs_triton(images):
        return augment_ref(
            images, shift, p, area, aspect, fill, generator, joint, flips, shifts, boxes, noise, dtype, layout
        )

    layout = own if layout is None else layout
    dtype = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    if flips is None or shifts is None:
        drawn = draw_moves(B, shift, generator, images.device)
        flips, shifts = drawn[0] if flips is None else flips, drawn[1] if shifts is None else shifts
    boxes = draw_boxes(B, H, W, p, area, aspect, generator, images.device, joint) if boxes is None else boxes
    boxes = boxes.contiguous()
    out = torch.empty(B, C, H, W, dtype=dtype, device=images.device, memory_format=layout)
    seed = None
    if noise is None:
        seed = torch.randint(2**31 - 1, (1,), generator=generator, device=images.device)
    block = 1024  # as in gaussian_cutout: larger blocks would meet a rectangle, and draw noise, more often
    with torch.cuda.device_of(images):
        _kernel[(B, triton.cdiv(C * H * W, block))](
            out, images, flips.contiguous().view(torch.uint8), shifts.contiguous(), boxes,
            None if noise is None else noise.contiguous(memory_format=layout), seed,
            C=C, H=H, W=W, BLOCK=block, BYTES=images.dtype == torch.uint8, GIVEN=noise is not None, GAUSSIAN=fill == "gaussian",
            LAST_IN=own is torch.channels_last, LAST_OUT=layout is torch.channels_last,
        )  # fmt: skip
    return out, boxes, (boxes[:, 2] * boxes[:, 3]) > 0
