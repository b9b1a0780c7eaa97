"""Shapes, types and layouts that the tests of the kernels share, and their wrong arguments."""

import pytest
import torch

LAYOUTS = (torch.contiguous_format, torch.channels_last)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
dtypes = pytest.mark.parametrize(
    "dtype",
    (torch.float32, torch.float16, torch.bfloat16),
    ids=("float32", "float16", "bfloat16"),
)
shapes = pytest.mark.parametrize(
    "shape",
    ((1, 1, 1, 1), (5, 3, 7, 5), (2, 3, 11, 31), (1, 1, 32, 32), (1, 5, 5, 41)),
    ids=("1x1", "odd", "block-1", "block", "block+1"),
)


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def random(*shape, seed=0, device="cpu"):
    return torch.rand(shape, generator=seeded(seed)).to(device)


def some_boxes(B, H, W, device="cpu"):
    """In the middle, the whole image, none, one pixel in the far corner, none by its width."""
    middle = (H // 3, W // 4, (H + 1) // 2, (W + 1) // 2)
    boxes = [middle, (0, 0, H, W), (0, 0, 0, W), (H - 1, W - 1, 1, 1), (0, 0, H, 0)]
    return torch.tensor(boxes[:B], device=device)


def refused(op, arguments, changes):
    """Each change of the arguments is a ValueError with its message."""
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            op(**(arguments | change))
