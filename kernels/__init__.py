"""Patch operations, one file each: Triton kernel, `op_ref` (plain PyTorch, also what runs on a CPU) and `op`.

`op` checks its arguments, then runs the kernel on CUDA tensors and under TRITON_INTERPRET=1 (set before the first import), otherwise
`op_ref`. Without Triton every `op` is its `op_ref`. Images are float NCHW in [0, 1], contiguous or channels_last.
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
INTEGERS = (torch.int32, torch.int64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides this once, when it is imported


def runs_triton(x: Tensor) -> bool:
    """Whether an op launches its kernel for x: on CUDA, or in the interpreter while TRITON_INTERPRET=1; never for an empty x."""
    interpreted = INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and (x.is_cuda or interpreted) and x.numel() > 0


def expect(name: str, x: Any, shape: tuple, dtypes: tuple = FLOATS, like: Tensor | None = None) -> None:
    """Raise TypeError unless x is a tensor, ValueError unless of this shape (a str entry is free), one of these dtypes, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or any(isinstance(s, int) and s != n for s, n in zip(shape, x.shape)):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def memory_format(name: str, x: Tensor) -> torch.memory_format:
    """contiguous_format or channels_last of x (B, C, H, W); raises ValueError for any other strides."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=layout):
            return layout
    raise ValueError(f"{name} must be contiguous or channels_last, got strides {x.stride()}")
