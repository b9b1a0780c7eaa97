"""Patches at many places of many images, Sec. 3.1 (DOA's search), App. C (square, eye patch).

One pass: each image is read once and written P times with its patch in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import FLOATS, INTS, elements, expect, jit, launch, memory_format, runs_triton, tl


@jit
def _kernel(
    out,
    images,
    patches,
    places,
    P,
    patch_b,
    patch_p,
    place_b,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Keep BLOCK elements of one image in registers while P images are written."""
    b, i, valid, channel, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    image = tl.load(images + b * (C * H * W) + i, mask=valid, other=0)
    B = tl.num_programs(0)
    for p in range(P):
        place = places + b * place_b + 2 * p
        r, c = row - tl.load(place), col - tl.load(place + 1)
        inside = valid & (r >= 0) & (r < PH) & (c >= 0) & (c < PW)
        at = b * patch_b + p * patch_p + (channel * PH + r) * PW + c
        patch = tl.load(patches + at, mask=inside, other=0).to(tl.float32)
        at = (p * B + b) * (C * H * W) + i
        tl.store(out + at, tl.where(inside, patch.to(image.dtype), image), mask=valid)


def _empty(images: Tensor, P: int) -> Tensor:
    """Allocate P versions of each image (B, P, C, H, W): all images of one place lie together, in
    the images' memory layout, so that a model takes them as they are."""
    layout, (B, C, H, W) = memory_format("place_patches: images", images), images.shape
    out = torch.empty(
        P * B, C, H, W, dtype=images.dtype, device=images.device, memory_format=layout
    )
    return out.unflatten(0, (P, B)).transpose(0, 1)


def positions(
    H: int, W: int, h: int, w: int, stride: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """List places int64 (P, 2) = (top, left), row by row: range(0, H - h + 1, stride) and the flush
    edge, in both directions."""
    if not (1 <= h <= H and 1 <= w <= W and stride >= 1):
        raise ValueError(f"positions: {h}x{w} with stride {stride} does not fit a {H}x{W} image")
    tops, lefts = (sorted({*range(0, n + 1, stride), n}) for n in (H - h, W - w))
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)).to(device)


def _slices(images: Tensor) -> Any:
    """Return the same memory where NumPy can write slices of it, in a fraction of torch's time."""
    return images if images.dtype != torch.float32 or images.is_cuda else images.detach().numpy()


def place_patches_ref(images: Tensor, patches: Any, positions: Tensor, size: Any = None) -> Tensor:
    """Plain PyTorch of `place_patches`: P copies of the images, then a write for each patch."""
    P, tensor = positions.shape[-2], isinstance(patches, Tensor)
    h, w = patches.shape[3:] if tensor else size
    out, shared = _empty(images, P), positions.dim() == 2
    target, places = _slices(out), (positions[None] if shared else positions).tolist()
    if tensor:
        patches = _slices(patches.expand(len(images), P, -1, -1, -1).to(out.dtype))
    for k in range(P):
        out[:, k].copy_(images)
        for n, (top, left) in enumerate(each[k] for each in places):
            some = slice(None) if shared else n
            patch = patches[some, k] if tensor else patches
            target[some, k, :, top : top + h, left : left + w] = patch
    return out


@torch.no_grad()
def place_patches(
    images: Tensor, patches: Tensor | float, positions: Tensor, size: tuple | None = None
) -> Tensor:
    """Paste a patch into every image at each of P places.

    images:    (B, C, H, W), float32, float16 or bfloat16, contiguous or channels_last; no gradient
               flows to them
    patches:   (B or 1, P or 1, C, h, w), any of these dtypes; or a float, a grey level, with
               size = (h, w); no gradient flows to them
    positions: int32 or int64 (top, left): (P, 2) for all images or (B, P, 2). A patch must lie
               inside the image: checked on a CPU; on a GPU, where checking would wait for it, what
               lies outside is not painted
    returns    (B, P, C, H, W) of the images' dtype: [:, p] is in their memory layout
    Raises ValueError for another shape, dtype, device, layout or place.
    """
    op = "place_patches: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    B, C, H, W = images.shape
    memory_format(op + "images", images)
    P: Any = positions.shape[-2] if isinstance(positions, Tensor) and positions.dim() > 1 else "P"
    shape = (P, 2) if positions.dim() == 2 else (B, P, 2)
    expect(op + "positions", positions, shape, INTS, images)
    if isinstance(patches, Tensor):
        expect(op + "patches", patches, ("B", "P", C, "h", "w"), FLOATS, images)
        if patches.shape[0] not in (1, B) or patches.shape[1] not in (1, P):
            wanted, got = f"(1 or {B}, 1 or {P}, ...)", tuple(patches.shape)
            raise ValueError(f"{op}patches must have shape {wanted}, got {got}")
        size = tuple(patches.shape[3:])
    elif size is None:
        raise ValueError(op + "a grey level needs size = (h, w)")
    if not (1 <= size[0] <= H and 1 <= size[1] <= W):
        raise ValueError(f"{op}a {size[0]}x{size[1]} patch does not fit a {H}x{W} image")
    if not images.is_cuda and positions.numel():
        top, left = positions.reshape(-1, 2).unbind(1)
        if min(top.min(), left.min()) < 0 or top.max() > H - size[0] or left.max() > W - size[1]:
            raise ValueError(op + "positions must keep the patch inside the image")
    if not runs_triton(images) or P == 0:
        return place_patches_ref(images, patches, positions, size)
    if not isinstance(patches, Tensor):
        patches = torch.full((1, 1, C, *size), float(patches), device=images.device)
    patches, positions, out = patches.contiguous(), positions.contiguous(), _empty(images, P)
    strides = [patches.stride(d) if patches.shape[d] > 1 else 0 for d in (0, 1)]
    strides.append(2 * P if positions.dim() == 3 else 0)
    layout, (h, w) = memory_format(op + "images", images), size
    launch(_kernel, images, layout, out, images, patches, positions, P, *strides, PH=h, PW=w)
    return out


@torch.no_grad()
def painted(images: Tensor, grey: float, places: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Paint the images with a grey patch at the first of their places, then at the second, ...

    images (B, C, H, W), places (B, K, 2), size (h, w) as in `place_patches`; K times (B, C, H, W),
    in the images' memory layout. On a CPU the patch moves over one copy of the images, so use each
    before the next: new memory for each took six times as long.
    """
    if images.dtype != torch.float32 or images.is_cuda:
        yield from place_patches(images, grey, places, size).unbind(1)
        return
    (h, w), out = size, images.clone()
    target, source = out.numpy(), images.detach().numpy()
    for corners in places.unbind(1):
        at = [
            (n, ..., slice(r, r + h), slice(c, c + w)) for n, (r, c) in enumerate(corners.tolist())
        ]
        for patch in at:
            target[patch] = grey
        yield out
        for patch in at:
            target[patch] = source[patch]
