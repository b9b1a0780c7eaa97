"""Patch operations, one file each: a Triton kernel, `op_ref` (plain PyTorch) and `op`.

`op` checks its arguments, then runs the kernel on CUDA tensors and under TRITON_INTERPRET=1 (set
before the first import), otherwise `op_ref`. Without Triton every `op` is its `op_ref`. Images are
float NCHW in [0, 1], contiguous or channels_last.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # every op falls back to its reference
    triton = tl = None

    def jit(function):
        return function


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides this once, when imported
# 8 elements for each of 128 threads: one access of 16 bytes in half precision, two in float32.
# Larger blocks would meet a rectangle, and draw noise, more often.
BLOCK = 1024


def runs_triton(x: Tensor) -> bool:
    """Tell whether an op launches its kernel for x: on CUDA or in the interpreter, unless empty."""
    interpreted = INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and (x.is_cuda or interpreted) and x.numel() > 0


def expect(
    name: str, x: Any, shape: tuple, dtypes: tuple = FLOATS, like: Tensor | None = None
) -> None:
    """Raise TypeError unless x is a tensor, ValueError unless its shape (a str entry is free), its
    dtype and its device, that of `like`, are as they should be."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or any(isinstance(s, int) and s != n for s, n in zip(shape, x.shape)):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d)[6:] for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {str(x.dtype)[6:]}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def memory_format(name: str, x: Tensor) -> torch.memory_format:
    """Return contiguous_format or channels_last of x (B, C, H, W); ValueError for other strides."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=layout):
            return layout
    raise ValueError(f"{name} must be contiguous or channels_last, got strides {x.stride()}")


def launch(kernel: Any, x: Tensor, layout: torch.memory_format, *arguments, **constants) -> None:
    """Run a kernel over images of x's shape (B, C, H, W), BLOCK elements of one a program, in the
    order of their memory; it gets what `elements` needs beside its own constants."""
    B, C, H, W = x.shape
    sizes = {"C": C, "H": H, "W": W, "BLOCK": BLOCK}
    last = layout is torch.channels_last
    with torch.cuda.device_of(x):
        grid = (B, triton.cdiv(C * H * W, BLOCK))
        kernel[grid](*arguments, **sizes, CHANNELS_LAST=last, **constants)


@jit
def elements(
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Compute a sample, offsets in its memory, whether they are in it, and their channel, row and
    column."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel = i // C if LAST else i % (H * W)
    channel = i % C if LAST else i // (H * W)
    return b, i, i < C * H * W, channel, pixel // W, pixel % W


@jit
def in_box(boxes, b, row, col):
    """Tell whether pixels lie in the rectangle (top, left, height, width) of sample b."""
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    bottom, right = top + tl.load(boxes + 4 * b + 2), left + tl.load(boxes + 4 * b + 3)
    return (row >= top) & (row < bottom) & (col >= left) & (col < right)
