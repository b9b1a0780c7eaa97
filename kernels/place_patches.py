"""Patches at many places of many images, Sec. 3.1 (DOA's search), App. C (square, eye patch).

One pass: each image is read once and written P times with its patch in place. Backward to the
patches reads the gradient only under them, in a fixed order (no atomics): it is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import FLOATS, INTS, elements, expect, jit, launch, memory_format, runs_triton, tl, triton


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
    """BLOCK elements of one image, kept in registers while P images are written."""
    b, i, valid, channel, row, col = elements(C, H, W, BLOCK, CHANNELS_LAST)
    image = tl.load(images + b * (C * H * W) + i, mask=valid, other=0)
    for p in range(P):
        place = places + b * place_b + 2 * p
        r, c = row - tl.load(place), col - tl.load(place + 1)
        inside = valid & (r >= 0) & (r < PH) & (c >= 0) & (c < PW)
        at = b * patch_b + p * patch_p + (channel * PH + r) * PW + c
        patch = tl.load(patches + at, mask=inside, other=0).to(tl.float32)
        at = (b * P + p) * (C * H * W) + i
        tl.store(out + at, tl.where(inside, patch.to(image.dtype), image), mask=valid)


@jit
def _backward_kernel(
    grad_patches,
    grad,
    places,
    B,
    P,
    place_b,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_B: tl.constexpr,
    SHARED_P: tl.constexpr,
):
    """BLOCK elements of one patch: adds up the images and places that share it, ROWS at a time."""
    pid = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the patch
    channel, r, c = i // (PH * PW), i // PW % PH, i % PW
    if SHARED_P:  # `shared` places of an image share the patch
        first_b, first_p, shared = pid, 0, P
    else:
        first_b, first_p, shared = pid // P, pid % P, 1
    n = (B if SHARED_B else 1) * shared
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, ROWS):
        k = start + tl.arange(0, ROWS)
        b, p = (first_b + k // shared).to(tl.int64), first_p + k % shared
        here = k < n
        place = places + b * place_b + 2 * p
        row = tl.load(place, mask=here, other=0)[:, None] + r[None, :]
        col = tl.load(place + 1, mask=here, other=0)[:, None] + c[None, :]
        inside = here[:, None] & (i < C * PH * PW)[None, :]
        inside = inside & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        pixel = row * W + col
        at = pixel * C + channel[None, :] if CHANNELS_LAST else channel[None, :] * (H * W) + pixel
        at += (b * P + p)[:, None] * (C * H * W)
        total += tl.sum(tl.load(grad + at, mask=inside, other=0).to(tl.float32), axis=0)
    at = pid.to(tl.int64) * (C * PH * PW) + i
    tl.store(grad_patches + at, total.to(grad_patches.dtype.element_ty), mask=i < C * PH * PW)


class _PlacePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, patches, places):
        layout, P = memory_format("images", images), places.shape[-2]
        ctx.save_for_backward(places)
        ctx.layout, ctx.patches = layout, (patches.shape, patches.dtype)
        out, (h, w) = _empty(images, P), patches.shape[3:]
        strides = [patches.stride(d) if patches.shape[d] > 1 else 0 for d in (0, 1)]
        strides.append(2 * P if places.dim() == 3 else 0)
        launch(_kernel, images, layout, out, images, patches, places, P, *strides, PH=h, PW=w)
        return out

    @staticmethod
    def backward(ctx, grad):
        (places,), (shape, dtype) = ctx.saved_tensors, ctx.patches
        B, P, C, H, W = grad.shape
        grad = grad.flatten(0, 1).contiguous(memory_format=ctx.layout)
        result = torch.empty(shape, dtype=dtype, device=grad.device)
        block = 64  # small, so that one patch shared by a whole batch still gives some 20 programs
        sizes = {"C": C, "H": H, "W": W, "PH": shape[3], "PW": shape[4], "BLOCK": block}
        flags = {"SHARED_B": shape[0] == 1 and B > 1, "SHARED_P": shape[1] == 1 and P > 1}
        sizes["ROWS"] = 16 if any(flags.values()) else 1
        flags["CHANNELS_LAST"] = ctx.layout is torch.channels_last
        with torch.cuda.device_of(grad):
            grid = (shape[0] * shape[1], triton.cdiv(shape[2:].numel(), block))
            place_b = 2 * P if places.dim() == 3 else 0
            _backward_kernel[grid](result, grad, places, B, P, place_b, **sizes, **flags)
        return None, result, None


def _empty(images: Tensor, P: int) -> Tensor:
    """Room for P versions of each image (B, P, C, H, W), in the images' memory layout."""
    layout, (B, C, H, W) = memory_format("place_patches: images", images), images.shape
    out = torch.empty(
        B * P, C, H, W, dtype=images.dtype, device=images.device, memory_format=layout
    )
    return out.unflatten(0, (B, P))


def positions(
    H: int, W: int, h: int, w: int, stride: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """int64 (P, 2) = (top, left), row by row: range(0, H - h + 1, stride) and the flush edge, in
    both directions."""
    if not (1 <= h <= H and 1 <= w <= W and stride >= 1):
        raise ValueError(f"positions: {h}x{w} with stride {stride} does not fit a {H}x{W} image")
    tops, lefts = (sorted({*range(0, n + 1, stride), n}) for n in (H - h, W - w))
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)).to(device)


def place_patches_ref(images: Tensor, patches: Any, positions: Tensor, size: Any = None) -> Tensor:
    """Plain PyTorch of `place_patches`: P copies of the images, then a write for each patch."""
    B, C, H, W = images.shape
    P, tensor = positions.shape[-2], isinstance(patches, Tensor)
    h, w = patches.shape[3:] if tensor else size
    out = _empty(images, P).copy_(images[:, None].expand(B, P, C, H, W))
    if tensor and patches.requires_grad and torch.is_grad_enabled():  # one node for autograd
        top, left = positions.expand(B, P, 2)[..., None, None].unbind(2)  # (B, P, 1, 1)
        b, p, c, row, col = (torch.arange(n, device=images.device) for n in (B, P, C, h, w))
        rows = (top + row[:, None])[:, :, None]  # (B, P, 1, h, 1)
        cols = (left + col)[:, :, None]  # (B, P, 1, 1, w)
        at = (b.view(-1, 1, 1, 1, 1), p.view(-1, 1, 1, 1), c.view(-1, 1, 1), rows, cols)
        return out.index_put(at, patches.to(out.dtype).expand(B, P, C, h, w))
    target: Any = out
    if out.dtype == torch.float32 and not out.is_cuda:
        # the same memory; its slices cost a fraction of torch's
        target, patches = out.numpy(), patches.detach().float().numpy() if tensor else patches
    every = slice(None)
    for n, places in enumerate((positions if positions.dim() == 3 else positions[None]).tolist()):
        some = slice(n, n + 1) if positions.dim() == 3 else every
        for k, (up, back) in enumerate(places):
            each = patches
            if tensor:
                own = some if len(patches) > 1 else every
                each = patches[own, k if patches.shape[1] > 1 else 0]
            target[some, k, :, up : up + h, back : back + w] = each
    return out


def place_patches(
    images: Tensor, patches: Tensor | float, positions: Tensor, size: tuple | None = None
) -> Tensor:
    """Every image with its patch at each of P places.

    images:    (B, C, H, W), float32, float16 or bfloat16, contiguous or channels_last; no gradient
               flows to them
    patches:   (B or 1, P or 1, C, h, w), any of these dtypes, differentiable; or a float, a grey
               level, with size = (h, w)
    positions: int32 or int64 (top, left): (P, 2) for all images or (B, P, 2). A patch must lie
               inside the image: checked on a CPU; on a GPU, where checking would wait for it, what
               lies outside is not drawn
    returns    (B, P, C, H, W) of the images' dtype, each image in their memory layout
    Raises ValueError for another shape, dtype, device, layout or place, or images with a gradient.
    """
    op = "place_patches: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    B, C, H, W = images.shape
    memory_format(op + "images", images)
    P = positions.shape[-2] if isinstance(positions, Tensor) and positions.dim() > 1 else "P"
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
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError(op + "images must not require a gradient")
    if not images.is_cuda and positions.numel():
        top, left = positions.reshape(-1, 2).unbind(1)
        if min(top.min(), left.min()) < 0 or top.max() > H - size[0] or left.max() > W - size[1]:
            raise ValueError(op + "positions must keep the patch inside the image")
    if not runs_triton(images) or P == 0:
        return place_patches_ref(images, patches, positions, size)
    if not isinstance(patches, Tensor):
        patches = torch.full((1, 1, C, *size), float(patches), device=images.device)
    return _PlacePatches.apply(images, patches.contiguous(), positions.contiguous())
