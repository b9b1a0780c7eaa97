"""Sum of squared gradient in every window, Sec. 3.1: DOA's rank of places (Wu et al. 2020).

One pass: the gradient is read once, squared and added over channels on chip; the sums over windows
are two small products with 0/1 matrices, columns then rows. Only (B, P) floats are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import expect, jit, memory_format, runs_triton, tl, triton
from .place_patches import positions


@jit
def _kernel(
    out,
    grad,
    NH,
    NW,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Sum BLOCK_H x BLOCK_W positions of one image, over their pixels in tiles of ROWS x COLS."""
    b = tl.program_id(0).to(tl.int64)
    first_h, first_w = tl.program_id(1) * BLOCK_H, tl.program_id(2) * BLOCK_W
    ph, pw = first_h + tl.arange(0, BLOCK_H), first_w + tl.arange(0, BLOCK_W)
    # the last position is flush
    top, left = tl.minimum(ph * STRIDE, H - PH), tl.minimum(pw * STRIDE, W - PW)
    start_h, start_w = tl.minimum(first_h * STRIDE, H - PH), tl.minimum(first_w * STRIDE, W - PW)
    stop_h = tl.minimum((first_h + BLOCK_H - 1) * STRIDE, H - PH) + PH
    stop_w = tl.minimum((first_w + BLOCK_W - 1) * STRIDE, W - PW) + PW
    total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for h0 in range(start_h, stop_h, ROWS):
        row = h0 + tl.arange(0, ROWS)
        by_column = tl.zeros((ROWS, BLOCK_W), tl.float32)
        for w0 in range(start_w, stop_w, COLS):
            col = w0 + tl.arange(0, COLS)
            pixel = row[:, None] * W + col[None, :]
            inside = (row < H)[:, None] & (col < W)[None, :]
            energy = tl.zeros((ROWS, COLS), tl.float32)
            for c in tl.static_range(C):
                at = b * (C * H * W) + (pixel * C + c if CHANNELS_LAST else c * (H * W) + pixel)
                g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
                energy += g * g
            cols = col[:, None] >= left[None, :]  # (COLS, BLOCK_W)
            cols = cols & (col[:, None] < left[None, :] + PW)
            by_column += tl.dot(energy, cols.to(tl.float32), input_precision="ieee")
        rows = row[None, :] >= top[:, None]  # (BLOCK_H, ROWS)
        rows = rows & (row[None, :] < top[:, None] + PH)
        total += tl.dot(rows.to(tl.float32), by_column, input_precision="ieee")
    at = b * NH * NW + ph[:, None] * NW + pw[None, :]
    tl.store(out + at, total, mask=(ph < NH)[:, None] & (pw < NW)[None, :])


def window_energy_ref(grad: Tensor, h: int, w: int, stride: int = 1) -> Tensor:
    """Plain PyTorch of `window_energy`: the same two products with 0/1 matrices."""
    C, H, W = grad.shape[1:]
    energy = grad.float().square()
    tops = positions(H, 1, h, 1, stride, grad.device)[:, :1]  # (NH, 1)
    lefts = positions(1, W, 1, w, stride, grad.device)[:, 1]  # (NW,)
    row, col = torch.arange(H, device=grad.device), torch.arange(W, device=grad.device)[:, None]
    rows = ((row >= tops) & (row < tops + h)).float()  # (NH, H)
    cols = ((col >= lefts) & (col < lefts + w)).float()  # (W, NW)
    if C > 1 and energy.is_contiguous(memory_format=torch.channels_last):
        # the first product adds up the channels too: twice as fast as a sum over them
        energy, cols = energy.permute(0, 2, 3, 1).flatten(2), cols.repeat_interleave(C, 0)
    else:
        energy = energy.sum(1)  # (B, H, W)
    return (rows @ (energy @ cols)).flatten(1)  # (B, NH, NW) -> (B, P)


@torch.no_grad()
def window_energy(grad: Tensor, h: int, w: int, stride: int = 1) -> Tensor:
    """Sum grad^2 over channels and an h x w window, at each of `positions(H, W, h, w, stride)`.

    grad:    (B, C, H, W), float32, float16 or bfloat16, contiguous or channels_last
    returns  float32 (B, P), in the order of `positions`, flush edges included; sums in float32
             (without a kernel a GPU's TF32 setting applies)
    Raises ValueError for another shape, dtype or layout, or a window larger than the image.
    """
    op = "window_energy: "
    expect(op + "grad", grad, ("B", "C", "H", "W"))
    B, C, H, W = grad.shape
    layout = memory_format(op + "grad", grad)
    if not (1 <= h <= H and 1 <= w <= W and stride >= 1):
        raise ValueError(f"{op}a {h}x{w} window with stride {stride} does not fit a {H}x{W} image")
    if not runs_triton(grad):
        return window_energy_ref(grad, h, w, stride)

    NH, NW = (-(-n // stride) + 1 for n in (H - h, W - w))
    out = torch.empty(B, NH * NW, device=grad.device)
    # tl.dot needs sides of at least 16; at most 64, so that the sums stay in registers
    rows, cols, block_h, block_w = (
        min(64, max(16, triton.next_power_of_2(n))) for n in (H, W, NH, NW)
    )
    sizes = {"C": C, "H": H, "W": W, "PH": h, "PW": w, "STRIDE": stride}
    tiles = {"ROWS": min(32, rows), "COLS": cols, "BLOCK_H": block_h, "BLOCK_W": block_w}
    last = layout is torch.channels_last
    with torch.cuda.device_of(grad):
        grid = (B, triton.cdiv(NH, block_h), triton.cdiv(NW, block_w))
        _kernel[grid](out, grad, NH, NW, **sizes, **tiles, CHANNELS_LAST=last)
    return out
