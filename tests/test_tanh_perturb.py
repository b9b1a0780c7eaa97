"""tanh_perturb against its reference; exp and tanh differ in the last places: a few roundings."""

import pytest
import torch

from kernels.tanh_perturb import tanh_perturb, tanh_perturb_ref
from tests.cases import random, refused

SHAPES = {
    "1": (1, 1, 1),
    "odd": (3, 3, 35),
    "block-1": (2, 3, 341),
    "block": (1, 1, 1024),
    "block+1": (1, 5, 205),
}
DTYPES = {  # dtype, rounding of values in [0, 1]: the interpreter truncates to bfloat16
    "float32": (torch.float32, 2.0**-22),
    "float16": (torch.float16, 2.0**-11),
    "bfloat16": (torch.bfloat16, 2.0**-8),
}


def to_tanh(x):
    """App. C."""
    return torch.atanh((2 * x - 1) * 0.999999)


@pytest.mark.parametrize("dtype, rounding", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_reference(shape, dtype, rounding, device):
    w = to_tanh(random(*shape).round(decimals=1)).to(device, dtype)  # 0 and 1 occur
    delta = (random(*shape, seed=1, device=device) * 4 - 2).to(dtype)
    got, want = (op(w, delta) for op in (tanh_perturb, tanh_perturb_ref))
    assert (got.float() - want.float()).abs().max() <= rounding
    assert got.dtype == dtype and got.shape == w.shape
    assert got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize("N", (1, 3, 37))  # more than 16 samples in flight
@pytest.mark.parametrize("shared", (False, True))
def test_gradient_equals_autograd(shared, N, device):
    w, weight = to_tanh(random(N, 3, 72)).to(device), random(N, 3, 72, seed=2, device=device)
    grads = []
    for op in (tanh_perturb, tanh_perturb_ref):
        delta = random(1 if shared else N, 3, 72, seed=1, device=device) - 0.5
        delta.requires_grad_()
        (op(w, delta) * weight).sum().backward()
        grads.append(delta.grad)
    assert grads[0].shape == grads[1].shape
    # 1 - tanh^2 loses 2^-23
    assert (grads[0] - grads[1]).abs().max() <= 2.0**-21 * (N if shared else 1)


def test_to_tanh_is_inverted_and_any_strides_are_taken(device):
    x = torch.linspace(0, 1, 256, device=device).reshape(1, 8, 32)
    w, zero = to_tanh(x), torch.zeros_like(x)
    assert (tanh_perturb(w, zero) - x).abs().max() < 6e-7
    assert torch.equal(tanh_perturb(w.mT, zero.mT), tanh_perturb(w, zero).mT)


def test_every_branch_is_reached(launched, device, monkeypatch):
    w = torch.zeros(2, 3, 16, device=device)
    for of in (1, 2):
        delta = torch.zeros(of, 3, 16, device=device, requires_grad=True)
        tanh_perturb(w, delta).sum().backward()
    assert [c["SHARED"] for name, c in launched if name == "_backward_kernel"] == [True, False]
    launched.clear()
    assert tanh_perturb(w.double(), delta.double()).dtype == torch.float64
    assert tanh_perturb(w[:0], delta[:1]).shape == (0, 3, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if device == "cpu":
        assert torch.equal(tanh_perturb(w, w), tanh_perturb_ref(w, w)) and not launched


def test_clear_errors():
    w = torch.rand(2, 3, 16)
    changes = {
        "w must have shape": {"w": w[0]},
        "w must be float32": {"w": w.long()},
        r"delta must have shape \(2, 3, 16\)": {"delta": torch.rand(3, 3, 16)},
        r"delta must have shape \(1, 3, 16\)": {"delta": torch.rand(1, 3, 9)},
        "w must not require": {"w": w.clone().requires_grad_()},
    }
    refused(tanh_perturb, {"w": w, "delta": torch.rand(1, 3, 16)}, changes)
