"""The change of variables of App. C, x' = (tanh(w + M * delta) + 1) / 2, with the mirror image of x', and the attack's whole update.

`tanh_perturb`: one pass, reads w and delta, writes x' and its mirror; backward reads both gradients, w and delta, writes delta's.
`attack_update`: one pass over the K masked pixels only: adds up the gradients of both halves, moves Adam's moments and delta, writes the new
pixels into both halves. Per masked value it reads 6 and writes 5 numbers; the rest of the images is not touched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import FLOATS, INTEGERS, expect, jit, memory_format, runs_triton, tl, triton


@jit
def _squash(z):
    """(tanh(z) + 1) / 2 and its derivative, without overflow or cancellation."""
    e = tl.exp(-2 * tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1 + e), 2 * e / ((1 + e) * (1 + e))


@jit
def _forward_kernel(
    out, mirrored, w, delta, mask,
    delta_b, mask_b,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, MIRROR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the sample's memory
    valid = i < C * H * W
    pixel = i // C if CHANNELS_LAST else i % (H * W)
    at = b * (C * H * W) + i
    d = tl.load(delta + b * delta_b + i, mask=valid, other=0).to(tl.float32)
    if MASKED:
        d *= tl.load(mask + b * mask_b + pixel, mask=valid, other=0).to(tl.float32)
    x, _ = _squash(tl.load(w + at, mask=valid, other=0).to(tl.float32) + d)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=valid)
    if MIRROR:
        flip = (W - 1 - 2 * (pixel % W)) * (C if CHANNELS_LAST else 1)
        tl.store(mirrored + at + flip, x.to(out.dtype.element_ty), mask=valid)


@jit
def _backward_kernel(
    grad_delta, grad, grad_mirrored, w, delta, mask,
    B, delta_b, mask_b,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SHARED: tl.constexpr, MASKED: tl.constexpr, MIRROR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one delta; a delta shared by the batch adds up its samples, ROWS at a time."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < C * H * W
    pixel = i // C if CHANNELS_LAST else i % (H * W)
    flip = (W - 1 - 2 * (pixel % W)) * (C if CHANNELS_LAST else 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B if SHARED else 1, ROWS):
        k = tl.arange(0, ROWS).to(tl.int64) + (start if SHARED else tl.program_id(0))
        inside = (k < B)[:, None] & valid[None, :]
        at = k[:, None] * (C * H * W) + i[None, :]
        d = tl.load(delta + k[:, None] * delta_b + i[None, :], mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        if MIRROR:
            g += tl.load(grad_mirrored + at + flip[None, :], mask=inside, other=0).to(tl.float32)
        if MASKED:
            m = tl.load(mask + k[:, None] * mask_b + pixel[None, :], mask=inside, other=0).to(tl.float32)
            d, g = d * m, g * m
        _, slope = _squash(tl.load(w + at, mask=inside, other=0).to(tl.float32) + d)
        total += tl.sum(g * slope, axis=0)
    at = tl.program_id(0).to(tl.int64) * (C * H * W) + i
    tl.store(grad_delta + at, total.to(grad_delta.dtype.element_ty), mask=valid)


@jit
def _update_kernel(
    images, mirrored, grad, grad_mirrored, w, delta, first, second, index, step,
    K, index_b, rate, root, beta1, beta2, epsilon,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr, MIRROR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # offset in the sample's (C, K)
    valid = i < C * K
    channel, pixel = i // K, tl.load(index + b * index_b + i % K, mask=valid, other=0)
    there = b * (C * H * W) + (pixel * C + channel if CHANNELS_LAST else channel * (H * W) + pixel)
    flipped = there + (W - 1 - 2 * (pixel % W)) * (C if CHANNELS_LAST else 1)
    at = b * C * K + i
    if STEP_ON_DEVICE:
        t = tl.load(step).to(tl.float32)
        rate = rate / (1 - tl.exp(t * tl.log(beta1)))
        root = tl.sqrt(1 - tl.exp(t * tl.log(beta2)))

    g = tl.load(grad + there, mask=valid, other=0).to(tl.float32)
    if MIRROR:
        g += tl.load(grad_mirrored + flipped, mask=valid, other=0).to(tl.float32)
    z, d = tl.load(w + at, mask=valid, other=0), tl.load(delta + at, mask=valid, other=0)
    _, slope = _squash(z + d)
    g *= slope
    m = beta1 * tl.load(first + at, mask=valid, other=0) + (1 - beta1) * g
    v = beta2 * tl.load(second + at, mask=valid, other=0) + (1 - beta2) * g * g
    d -= rate * m / (tl.sqrt(v) / root + epsilon)
    x, _ = _squash(z + d)
    tl.store(first + at, m, mask=valid)
    tl.store(second + at, v, mask=valid)
    tl.store(delta + at, d, mask=valid)
    tl.store(images + there, x.to(images.dtype.element_ty), mask=valid)
    if MIRROR:
        tl.store(mirrored + flipped, x.to(images.dtype.element_ty), mask=valid)


class _TanhPerturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, delta, mask, mirror):
        B, C, H, W = w.shape
        layout = memory_format("tanh_perturb: w", w)
        strides = 0 if len(delta) == 1 else C * H * W, 0 if mask is None or mask.dim() == 2 else H * W
        out = torch.empty_like(w, memory_format=layout)
        mirrored = torch.empty_like(w, memory_format=layout) if mirror else None
        ctx.save_for_backward(w, delta, mask)
        ctx.mirror, ctx.layout, ctx.strides = mirror, layout, strides
        block = 1024  # 8 elements for each of 128 threads
        with torch.cuda.device_of(w):
            _forward_kernel[(B, triton.cdiv(C * H * W, block))](
                out, mirrored, w, delta, mask, *strides, C=C, H=H, W=W, BLOCK=block,
                MASKED=mask is not None, MIRROR=mirror, CHANNELS_LAST=layout is torch.channels_last,
            )  # fmt: skip
        return out, mirrored

    @staticmethod
    def backward(ctx, grad, grad_mirrored):
        w, delta, mask = ctx.saved_tensors
        B, C, H, W = w.shape
        shared = len(delta) == 1 and B > 1
        grads = [g.contiguous(memory_format=ctx.layout) if g is not None else None for g in (grad, grad_mirrored)]
        result = torch.empty_like(delta, memory_format=ctx.layout)
        # one delta for the batch: small blocks, so that there are enough programs, and 16 samples in flight in each
        block, rows = (64, 16) if shared else (1024, 1)
        with torch.cuda.device_of(w):
            _backward_kernel[(len(delta), triton.cdiv(C * H * W, block))](
                result, *grads, w, delta, mask, B, *ctx.strides, C=C, H=H, W=W, BLOCK=block, ROWS=rows,
                SHARED=shared, MASKED=mask is not None, MIRROR=ctx.mirror, CHANNELS_LAST=ctx.layout is torch.channels_last,
            )  # fmt: skip
        return None, result, None, None


def to_tanh(x: Tensor) -> Tensor:
    """w = atanh((2 x - 1) * 0.999999), float32, App. C: the w at which x' = x when delta = 0 (to 5e-7)."""
    return torch.atanh((2 * x.float() - 1) * 0.999999)


def tanh_perturb_ref(
    w: Tensor, delta: Tensor, mask: Tensor | None = None, mirror: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch of `tanh_perturb`."""
    if mask is not None:
        delta = (mask if mask.dim() == 2 else mask.reshape(-1, 1, *mask.shape[-2:])) * delta
    x = ((torch.tanh(w.float() + delta.float()) + 1) / 2).to(w.dtype)
    return x, x.flip(-1) if mirror else None


def tanh_perturb(
    w: Tensor, delta: Tensor, mask: Tensor | None = None, mirror: bool = True
) -> tuple[Tensor, Tensor | None]:
    """x' = (tanh(w + mask * delta) + 1) / 2 and x' mirrored left to right, differentiable in delta.

    w:       (B, C, H, W), see `to_tanh`; float32, float16 or bfloat16, contiguous or channels_last; no gradient flows to it
    delta:   (B or 1, C, H, W), any of these dtypes: one for each image or one for all
    mask:    (H, W), (B, H, W) or (B, 1, H, W), bool or float, or None: everywhere
    returns  x' and its mirror (None unless mirror), (B, C, H, W) of w's dtype and layout; arithmetic in float32
    Raises ValueError for another shape, dtype, device or layout, and for w that requires a gradient.
    """
    op = "tanh_perturb: "
    expect(op + "w", w, ("B", "C", "H", "W"))
    B, C, H, W = w.shape
    layout = memory_format(op + "w", w)
    expect(op + "delta", delta, (1 if isinstance(delta, Tensor) and len(delta) == 1 else B, C, H, W), FLOATS, w)
    if mask is not None:
        one = (1,) if mask.dim() == 4 else ()
        expect(op + "mask", mask, ((H, W) if mask.dim() == 2 else (B, *one, H, W)), (torch.bool, *FLOATS), w)
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(op + "w must not require a gradient")
    if not runs_triton(w):
        return tanh_perturb_ref(w, delta, mask, mirror)
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.contiguous()
    return _TanhPerturb.apply(w, delta.contiguous(memory_format=layout), mask, mirror)


def attack_update_ref(
    images: Tensor,
    mirrored: Tensor | None,
    grad: Tensor,
    grad_mirrored: Tensor | None,
    w: Tensor,
    delta: Tensor,
    first: Tensor,
    second: Tensor,
    index: Tensor,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Plain PyTorch of `attack_update`."""
    B, C, _, W = images.shape
    index = index.expand(B, -1)[:, None].long()  # (B, 1, K)
    b, c = (torch.arange(n, device=images.device) for n in (B, C))
    at = (b[:, None, None], c[:, None], index // W, index % W)  # (B, C, K)
    flipped = (*at[:3], W - 1 - index % W)
    g = grad[at].float()
    if mirrored is not None:
        g += grad_mirrored[flipped]
    z = 2 * (w + delta)
    g *= 2 * torch.sigmoid(z) * torch.sigmoid(-z)
    first.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    rate, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    delta.sub_(rate * first / (second.sqrt() / root + eps))
    x = torch.sigmoid(2 * (w + delta)).to(images.dtype)
    images[at] = x
    if mirrored is not None:
        mirrored[flipped] = x


@torch.no_grad()
def attack_update(
    images: Tensor,
    mirrored: Tensor | None,
    grad: Tensor,
    grad_mirrored: Tensor | None,
    w: Tensor,
    delta: Tensor,
    first: Tensor,
    second: Tensor,
    index: Tensor,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One Adam step of the tanh attack on the masked pixels, everything in place.

    images, mirrored: (B, C, H, W), x' and its mirror (None: no mirroring), contiguous or channels_last; only masked pixels are written
    grad, grad_mirrored: (B, C, H, W), gradients of the loss with respect to them
    w, delta, first, second: float32 (B, C, K) contiguous: values of w under the mask, perturbation and Adam's moments (zero at first)
    index:   int32 or int64, (K,) for all images or (B, K): masked pixels as row * W + column, each once
    step:    1, 2, ...: int, or an int (1,) tensor on the device, for a CUDA graph
    lr:      learning rate; negative ascends
    Raises ValueError for another shape, dtype, device or layout.
    """
    op = "attack_update: "
    expect(op + "images", images, ("B", "C", "H", "W"))
    B, C, H, W = images.shape
    layout = memory_format(op + "images", images)
    if (mirrored is None) != (grad_mirrored is None):
        raise ValueError(op + "mirrored and grad_mirrored go together")
    if mirrored is not None:
        expect(op + "mirrored", mirrored, (B, C, H, W), (images.dtype,), images)
        expect(op + "grad_mirrored", grad_mirrored, (B, C, H, W), FLOATS, images)
        if not mirrored.is_contiguous(memory_format=layout):
            raise ValueError(op + "mirrored must have the memory layout of images")
    expect(op + "grad", grad, (B, C, H, W), FLOATS, images)
    expect(op + "index", index, ("K",) if index.dim() == 1 else (B, "K"), INTEGERS, images)
    K = index.shape[-1]
    for name, state in (("w", w), ("delta", delta), ("first", first), ("second", second)):
        expect(op + name, state, (B, C, K), (torch.float32,), images)
        if not state.is_contiguous():
            raise ValueError(f"{op}{name} must be contiguous")
    on_device = isinstance(step, Tensor)
    if on_device:
        expect(op + "step", step, (1,), INTEGERS, images)
    if not runs_triton(images) or K == 0:
        return attack_update_ref(
            images, mirrored, grad, grad_mirrored, w, delta, first, second, index, step, lr, betas, eps
        )
    rate, root = (lr, 1.0) if on_device else (lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step))
    grads = [g.contiguous(memory_format=layout) if g is not None else None for g in (grad, grad_mirrored)]
    block = 256  # few elements in all: small blocks spread them over the GPU
    with torch.cuda.device_of(images):
        _update_kernel[(B, triton.cdiv(C * K, block))](
            images, mirrored, *grads, w, delta, first, second, index.contiguous(), step if on_device else None,
            K, K if index.dim() == 2 else 0, float(rate), root, betas[0], betas[1], eps,
            C=C, H=H, W=W, BLOCK=block, STEP_ON_DEVICE=on_device, MIRROR=mirrored is not None,
            CHANNELS_LAST=layout is torch.channels_last,
        )  # fmt: skip
    return None
