"""Patches at many places of many images, Sec. 3.1 (DOA's search) and App. C (square, universal eye patch).

One pass: each image is read once and written P times with its patch in place; traffic 1 + P images. Backward to the patches reads the
gradient only under them, in a fixed order (no atomics), so it is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import FLOATS, INTEGERS, expect, jit, memory_format, runs_triton, tl, triton


@jit
def _kernel(
    out, images, patches, places, level,
    P, patch_b, patch_p, place_b,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr,
    GREY: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the sample's memory
    valid = i < C * H * W
    pixel = i // C if CHANNELS_LAST else i % (H * W)
    channel = i % C if CHANNELS_LAST else i // (H * W)
    row, col = pixel // W, pixel % W
    image = tl.load(images + b * (C * H * W) + i, mask=valid, other=0)
    for p in range(P):
        place = places + b * place_b + 2 * p
        r, c = row - tl.load(place), col - tl.load(place + 1)
        inside = valid & (r >= 0) & (r < PH) & (c >= 0) & (c < PW)
        if GREY:
            patch = tl.full((BLOCK,), level, tl.float32)
        else:
            at = b * patch_b + p * patch_p + (channel * PH + r) * PW + c
            patch = tl.load(patches + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + (b * P + p) * (C * H * W) + i, tl.where(inside, patch.to(image.dtype), image), mask=valid)


@jit
def _backward_kernel(
    grad_patches, grad, places,
    B, P, place_b,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SHARED_B: tl.constexpr, SHARED_P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program adds up the gradient of BLOCK elements of one patch over the images and places that share it, ROWS at a time."""
    pid = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the patch
    channel, r, c = i // (PH * PW), i // PW % PH, i % PW
    n = (B if SHARED_B else 1) * (P if SHARED_P else 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, ROWS):
        k = start + tl.arange(0, ROWS)
        if SHARED_B and SHARED_P:
            b, p = k // P, k % P
        elif SHARED_B:
            b, p = k, pid + k * 0
        elif SHARED_P:
            b, p = pid + k * 0, k
        else:
            b, p = pid // P + k * 0, pid % P + k * 0
        here = k < n
        place = places + b.to(tl.int64) * place_b + 2 * p
        row = tl.load(place, mask=here, other=0)[:, None] + r[None, :]
        col = tl.load(place + 1, mask=here, other=0)[:, None] + c[None, :]
        inside = here[:, None] & (i < C * PH * PW)[None, :] & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        pixel = row * W + col
        at = pixel * C + channel[None, :] if CHANNELS_LAST else channel[None, :] * (H * W) + pixel
        at += (b.to(tl.int64) * P + p)[:, None] * (C * H * W)
        total += tl.sum(tl.load(grad + at, mask=inside, other=0).to(tl.float32), axis=0)
    at = pid.to(tl.int64) * (C * PH * PW) + i
    tl.store(grad_patches + at, total.to(grad_patches.dtype.element_ty), mask=i < C * PH * PW)


class _PlacePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, patches, positions):
        ctx.save_for_backward(positions)
        ctx.patches, ctx.layout = (patches.shape, patches.dtype), memory_format("place_patches: images", images)
        return _place(images, patches, positions)

    @staticmethod
    def backward(ctx, grad):
        (places,), (shape, dtype) = ctx.saved_tensors, ctx.patches
        B, P, C, H, W = grad.shape
        grad = grad.flatten(0, 1).contiguous(memory_format=ctx.layout)
        result = torch.empty(shape, dtype=dtype, device=grad.device)
        shared_b, shared_p = shape[0] == 1 and B > 1, shape[1] == 1 and P > 1
        block = 64  # small, so that one patch shared by a whole batch still gives some 20 programs
        rows = 1 if not (shared_b or shared_p) else 16
        with torch.cuda.device_of(grad):
            _backward_kernel[(shape[0] * shape[1], triton.cdiv(C * shape[3] * shape[4], block))](
                result, grad, places, B, P, 2 * P if places.dim() == 3 else 0,
                C=C, H=H, W=W, PH=shape[3], PW=shape[4], BLOCK=block, ROWS=rows,
                SHARED_B=shared_b, SHARED_P=shared_p, CHANNELS_LAST=ctx.layout is torch.channels_last,
            )  # fmt: skip
        return None, result, None


def _place(images: Tensor, patches: Tensor | float, positions: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    B, C, H, W = images.shape
    P, grey = positions.shape[-2], not isinstance(patches, Tensor)
    h, w = size if grey else patches.shape[3:]
    layout = memory_format("place_patches: images", images)
    out = torch.empty(B * P, C, H, W, dtype=images.dtype, device=images.device, memory_format=layout)
    block = 1024  # 8 elements for each of 128 threads, kept in registers while P images are written
    with torch.cuda.device_of(images):
        _kernel[(B, triton.cdiv(C * H * W, block))](
            out, images, None if grey else patches, positions, float(patches) if grey else 0.0, P,
            0 if grey or len(patches) == 1 else patches.stride(0), 0 if grey or patches.shape[1] == 1 else patches.stride(1),
            2 * P if positions.dim() == 3 else 0,
            C=C, H=H, W=W, PH=h, PW=w, BLOCK=block, GREY=grey, CHANNELS_LAST=layout is torch.channels_last,
        )  # fmt: skip
    return out.unflatten(0, (B, P))


def positions(H: int, W: int, h: int, w: int, stride: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """int64 (P, 2) = (top, left), row by row: range(0, H - h + 1, stride) and the flush edge, in both directions."""
    if not (1 <= h <= H and 1 <= w <= W and stride >= 1):
        raise ValueError(f"positions: a {h}x{w} patch with stride {stride} does not fit a {H}x{W} image")
    tops, lefts = (sorted({*range(0, n + 1, stride), n}) for n in (H - h, W - w))
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)).to(device)


def place_patches_ref(
    images: Tensor, patches: Tensor | float, positions: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Plain PyTorch of `place_patches`: P copies of the images, then a small write for each patch."""
    B, C, H, W = images.shape
    P, device = positions.shape[-2], images.device
    h, w = patches.shape[3:] if isinstance(patches, Tensor) else size
    layout = memory_format("place_patches: images", images)
    out = torch.empty(B * P, C, H, W, dtype=images.dtype, device=device, memory_format=layout).unflatten(0, (B, P))
    out.copy_(images[:, None].expand(B, P, C, H, W))
    if not isinstance(patches, Tensor) or not (patches.requires_grad and torch.is_grad_enabled()):
        target: Any = out
        source: Any = patches
        if out.dtype == torch.float32 and not out.is_cuda:  # the same memory; its slices cost a fraction of torch's
            target, source = out.numpy(), patches.detach().float().numpy() if isinstance(patches, Tensor) else patches
        for b, places in enumerate(positions.tolist() if positions.dim() == 3 else [positions.tolist()]):
            some = slice(b, b + 1) if positions.dim() == 3 else slice(None)
            for p, (top, left) in enumerate(places):
                each = source
                if isinstance(patches, Tensor):
                    each = source[some if len(source) > 1 else slice(None), p if source.shape[1] > 1 else 0]
                target[some, p, :, top : top + h, left : left + w] = each
        return out
    top, left = positions.expand(B, P, 2)[..., None, None].unbind(2)  # (B, P, 1, 1)
    rows = (top + torch.arange(h, device=device)[:, None])[:, :, None]  # (B, P, 1, h, 1)
    cols = (left + torch.arange(w, device=device))[:, :, None]  # (B, P, 1, 1, w)
    b, p, c = (
        torch.arange(n, device=device).view(s) for n, s in ((B, (-1, 1, 1, 1, 1)), (P, (-1, 1, 1, 1)), (C, (-1, 1, 1)))
    )
    return out.index_put((b, p, c, rows, cols), patches.to(out.dtype).expand(B, P, C, h, w))  # one node for autograd


def place_patches(
    images: Tensor, patches: Tensor | float, positions: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Every image with its patch at each of P places.

    images:    (B, C, H, W), float32, float16 or bfloat16, contiguous or channels_last; no gradient flows to them
    patches:   (B or 1, P or 1, C, h, w), any of these dtypes, differentiable; or a float, a grey level, with size = (h, w)
    positions: int32 or int64 (top, left): (P, 2) for all images or (B, P, 2). A patch must lie inside the image: checked on a
               CPU; on a GPU, where checking would wait for it, what lies outside is not drawn
    returns    (B, P, C, H, W) of the images' dtype, each image in their memory layout
    Raises ValueError for another shape, dtype, device, layout or place, and for images that require a gradient.
    """
    op = "place_patches: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    B, C, H, W = images.shape
    memory_format(op + "images", images)
    P = positions.shape[-2] if isinstance(positions, Tensor) and positions.dim() > 1 else "P"
    expect(op + "positions", positions, (P, 2) if positions.dim() == 2 else (B, P, 2), INTEGERS, images)
    if isinstance(patches, Tensor):
        expect(op + "patches", patches, ("B", "P", C, "h", "w"), FLOATS, images)
        if patches.shape[0] not in (1, B) or patches.shape[1] not in (1, P):
            raise ValueError(f"{op}patches must have shape (1 or {B}, 1 or {P}, ...), got {tuple(patches.shape)}")
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
    if isinstance(patches, Tensor):
        return _PlacePatches.apply(images, patches.contiguous(), positions.contiguous())
    return _place(images, patches, positions.contiguous(), size)
