"""Nearest upsampling x2 and a 3x3 convolution as one transposed convolution (blocks of G, App. A).

Repeated pixels let the taps that meet them be added beforehand: a 4x4 transposed convolution of
stride 2, exact, with 2.25 times fewer products. No Triton: it is PyTorch's own convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample_conv_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain form of `upsample_conv`."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Upsample x (B, C, H, W), then convolve it by weight (O, C, 3, 3) and bias (O,): (B, O, 2 H,
    2 W), differentiable."""
    taps = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))  # (C, O, 5, 5)
    taps = taps[..., 1:] + taps[..., :-1]
    return F.conv_transpose2d(x, taps[..., 1:, :] + taps[..., :-1, :], bias, stride=2, padding=1)
