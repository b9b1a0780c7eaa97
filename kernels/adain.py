"""LeakyReLU followed by adaptive instance normalisation, the layer of the LORD generator (Gabbay
and Hoshen 2020; Sec. 2, App. A).

Forward: reads x, writes y; backward: reads x and the gradient, writes x's. A plane that fits is
kept on chip, so everything moves once; larger ones are read a second time, mostly from the L2
cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import FLOATS, expect, jit, memory_format, runs_triton, tl, triton


@jit
def _leaky(x, inside, slope):
    x = x.to(tl.float32)
    return tl.where(inside, tl.where(x > 0, x, x * slope), 0.0)


@jit
def _forward_kernel(
    out,
    mean_out,
    rstd_out,
    x,
    scale,
    offset,
    slope,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Normalise CHANNELS channels of one sample, ROWS pixels at a time (ONE: all at once)."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mine = (c < C)[None, :]
    r = tl.arange(0, ROWS)[:, None]
    at = b * (C * HW) + (r * C + c[None, :] if CHANNELS_LAST else c[None, :] * HW + r)
    jump = C if CHANNELS_LAST else 1
    s = tl.load(scale + b * C + c, mask=c < C, other=0).to(tl.float32)
    o = tl.load(offset + b * C + c, mask=c < C, other=0).to(tl.float32)
    if ONE:
        inside = (r < HW) & mine
        a = _leaky(tl.load(x + at, mask=inside, other=0), inside, slope)
        mean = tl.sum(a, axis=0) / HW
        d = tl.where(inside, a - mean[None, :], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(d * d, axis=0) / HW + eps)
        tl.store(
            out + at, (d * (rstd * s)[None, :] + o[None, :]).to(out.dtype.element_ty), mask=inside
        )
    else:
        mean, squares = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
        for start in range(0, HW, ROWS):  # Chan's update: no cancellation
            inside = (r + start < HW) & mine
            a = _leaky(tl.load(x + at + start * jump, mask=inside, other=0), inside, slope)
            n = tl.minimum(ROWS, HW - start)
            here = tl.sum(a, axis=0) / n
            d = tl.where(inside, a - here[None, :], 0.0)
            change = here - mean
            squares += tl.sum(d * d, axis=0) + change * change * (start * (n / (start + n)))
            mean += change * (n / (start + n))
        rstd = 1 / tl.sqrt(squares / HW + eps)
        for start in range(0, HW, ROWS):
            inside = (r + start < HW) & mine
            a = _leaky(tl.load(x + at + start * jump, mask=inside, other=0), inside, slope)
            y = (a - mean[None, :]) * (rstd * s)[None, :] + o[None, :]
            tl.store(out + at + start * jump, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean_out + b * C + c, mean, mask=c < C)
    tl.store(rstd_out + b * C + c, rstd, mask=c < C)


@jit
def _backward_kernel(
    grad_x,
    grad_scale,
    grad_offset,
    grad,
    x,
    scale,
    mean,
    rstd,
    slope,
    C: tl.constexpr,
    HW: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mine = (c < C)[None, :]
    r = tl.arange(0, ROWS)[:, None]
    at = b * (C * HW) + (r * C + c[None, :] if CHANNELS_LAST else c[None, :] * HW + r)
    jump = C if CHANNELS_LAST else 1
    per = b * C + c
    m = tl.load(mean + per, mask=c < C, other=0)[None, :]
    k = tl.load(rstd + per, mask=c < C, other=0)[None, :]
    s = tl.load(scale + per, mask=c < C, other=0).to(tl.float32)[None, :]
    if ONE:
        inside = (r < HW) & mine
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        normal = (_leaky(value, inside, slope) - m) * k
        total, along = tl.sum(g, axis=0), tl.sum(g * normal, axis=0)
        d = s * k * (g - total[None, :] / HW - normal * (along[None, :] / HW))
        tl.store(
            grad_x + at, tl.where(value > 0, d, d * slope).to(grad_x.dtype.element_ty), mask=inside
        )
    else:
        total, along = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
        for start in range(0, HW, ROWS):
            inside = (r + start < HW) & mine
            value = tl.load(x + at + start * jump, mask=inside, other=0)
            g = tl.load(grad + at + start * jump, mask=inside, other=0).to(tl.float32)
            total += tl.sum(g, axis=0)
            along += tl.sum(g * (_leaky(value, inside, slope) - m) * k, axis=0)
        for start in range(0, HW, ROWS):
            inside = (r + start < HW) & mine
            value = tl.load(x + at + start * jump, mask=inside, other=0).to(tl.float32)
            g = tl.load(grad + at + start * jump, mask=inside, other=0).to(tl.float32)
            normal = (_leaky(value, inside, slope) - m) * k
            d = s * k * (g - total[None, :] / HW - normal * (along[None, :] / HW))
            tl.store(
                grad_x + at + start * jump,
                tl.where(value > 0, d, d * slope).to(grad_x.dtype.element_ty),
                mask=inside,
            )
    tl.store(grad_offset + per, total.to(grad_offset.dtype.element_ty), mask=c < C)
    tl.store(grad_scale + per, along.to(grad_scale.dtype.element_ty), mask=c < C)


def _tile(HW: int, itemsize: int, channels_last: bool, tensors: int) -> dict[str, int]:
    """Choose tile and warps of a kernel that keeps `tensors` planes at once: at most 64 values of a
    tile a thread, else it loops."""
    rows = triton.next_power_of_2(HW)
    # 32 bytes are the least a GPU reads
    channels = 32 // itemsize if channels_last else max(1, 1024 // rows)
    one = rows * channels <= 32768 // tensors
    if not one:
        rows, channels = (256, 32) if channels_last else (4096, 1)
    return {
        "ROWS": rows,
        "CHANNELS": channels,
        "ONE": one,
        "num_warps": min(16, max(4, tensors * rows * channels // 2048)),
    }


class _AdaIN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, slope, eps):
        B, C, H, W = x.shape
        layout = memory_format("adain: x", x)
        out = torch.empty_like(x, memory_format=layout)
        mean, rstd = torch.empty(2, B, C, device=x.device)
        tile = _tile(H * W, x.element_size(), layout is torch.channels_last, 1)
        with torch.cuda.device_of(x):
            _forward_kernel[(B, triton.cdiv(C, tile["CHANNELS"]))](
                out,
                mean,
                rstd,
                x,
                scale,
                offset,
                slope,
                eps,
                C=C,
                HW=H * W,
                CHANNELS_LAST=layout is torch.channels_last,
                **tile,
            )
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.slope, ctx.layout, ctx.offset_dtype = slope, layout, offset.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale, mean, rstd = ctx.saved_tensors
        B, C, H, W = x.shape
        grad_x = torch.empty_like(x, memory_format=ctx.layout)
        grad_scale = torch.empty_like(scale)
        grad_offset = torch.empty_like(scale, dtype=ctx.offset_dtype)
        tile = _tile(H * W, x.element_size(), ctx.layout is torch.channels_last, 2)
        with torch.cuda.device_of(x):
            _backward_kernel[(B, triton.cdiv(C, tile["CHANNELS"]))](
                grad_x,
                grad_scale,
                grad_offset,
                grad.contiguous(memory_format=ctx.layout),
                x,
                scale,
                mean,
                rstd,
                ctx.slope,
                C=C,
                HW=H * W,
                CHANNELS_LAST=ctx.layout is torch.channels_last,
                **tile,
            )
        return grad_x, grad_scale, grad_offset, None, None


def adain_ref(
    x: Tensor, scale: Tensor, offset: Tensor, slope: float = 0.2, eps: float = 1e-5
) -> Tensor:
    """Plain PyTorch of `adain`: one native batch normalisation of B * C channels, each with its own
    scale and offset."""
    if not len(x):  # batch_norm wants a channel
        return x + (scale + offset)[:, :, None, None].to(x.dtype)
    B, C, H, W = x.shape
    a = F.leaky_relu(x.float(), slope).reshape(1, B * C, H, W)
    scale, offset = scale.float().reshape(-1), offset.float().reshape(-1)
    y = torch.batch_norm(a, scale, offset, None, None, True, 0.0, eps, False).view(B, C, H, W)
    return y.to(x.dtype).contiguous(memory_format=memory_format("adain: x", x))


def adain(
    x: Tensor, scale: Tensor, offset: Tensor, slope: float = 0.2, eps: float = 1e-5
) -> Tensor:
    """Compute scale * (a - mean(a)) / sqrt(var(a) + eps) + offset with a = LeakyReLU(x); mean and
    biased variance over H and W.

    x:       (B, C, H, W), float32, float16 or bfloat16, contiguous or channels_last; differentiable
    scale, offset: (B, C), any of these dtypes, contiguous; differentiable
    slope:   of the LeakyReLU below 0; 1 leaves x as it is
    returns  (B, C, H, W) of x's dtype and layout; arithmetic in float32
    Raises ValueError for another shape, dtype, device or layout.
    """
    op = "adain: "
    expect(op + "x", x, ("B", "C", "H", "W"))
    memory_format(op + "x", x)
    for name, each in (("scale", scale), ("offset", offset)):
        expect(op + name, each, tuple(x.shape[:2]), FLOATS, x)
    if not runs_triton(x):
        return adain_ref(x, scale, offset, slope, eps)
    return _AdaIN.apply(x, scale.contiguous(), offset.contiguous(), float(slope), float(eps))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute variance (biased) and mean over H and W of x (B, C, H, W), each (B, C)."""
    if x.is_cuda:
        return torch.var_mean(x, (2, 3), correction=0)
    # a fifth of var_mean's time in channels_last
    mean = x.mean((2, 3))
    return (x - mean[:, :, None, None]).square_().mean((2, 3)), mean


class AdaIN(torch.autograd.Function):
    """AdaIN with its gradient in closed form: both ways one affine map a channel, a third of
    autograd's passes. What runs on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, offset: Tensor, eps: float = 1e-5) -> Tensor:
        var, mean = moments(x)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        a = scale * rstd
        return torch.addcmul((offset - mean * a)[:, :, None, None], x, a[:, :, None, None])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, mean, rstd = ctx.saved_tensors
        n = x.shape[2] * x.shape[3]
        d_offset = grad.sum((2, 3))  # (B, C)
        d_scale = ((grad * x).sum((2, 3)) - mean * d_offset) * rstd
        a, b = scale * rstd, -scale * rstd.square() * d_scale / n
        c = -a * d_offset / n - b * mean
        d_x = torch.addcmul(c[:, :, None, None], x, b[:, :, None, None])
        return d_x.addcmul_(grad, a[:, :, None, None]), d_scale, d_offset, None


def leaky_adain(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Apply LeakyReLU(0.2), maybe in x itself, and AdaIN: the kernel on a GPU, else `AdaIN`."""
    if runs_triton(x) and x.is_cuda:
        return adain(x, scale, offset)
    return AdaIN.apply(F.leaky_relu(x, 0.2, inplace=True), scale, offset)
