"""tanh_perturb against its reference; exp and tanh differ in the last places: a few roundings."""

import pytest
import torch

from kernels.tanh_perturb import tanh_perturb, tanh_perturb_ref, to_tanh

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((3, 3, 7, 5), id="odd"),
    pytest.param((2, 3, 11, 31), id="block-1"),
    pytest.param((1, 1, 32, 32), id="block"),
    pytest.param((1, 5, 5, 41), id="block+1"),
]
DTYPES = [  # dtype, rounding of values in [0, 1]: the interpreter truncates to bfloat16
    pytest.param(torch.float32, 2.0**-22, id="float32"),
    pytest.param(torch.float16, 2.0**-11, id="float16"),
    pytest.param(torch.bfloat16, 2.0**-8, id="bfloat16"),
]


def random(*shape, seed=0, device="cpu"):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def masks(B, H, W):
    some = random(B, 1, H, W, seed=9) < 0.4
    return {
        "none": None,
        "HW": some[0, 0],
        "BHW": some[:, 0].float(),
        "B1HW": some,
        "empty": some[0, 0] & False,
        "full": some[0, 0] | True,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype, rounding", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype, rounding, layout, device):
    w = (
        to_tanh(random(*shape).round(decimals=1)).to(device, dtype).contiguous(memory_format=layout)
    )  # 0 and 1 occur
    delta = (random(*shape, seed=1, device=device) * 4 - 2).to(dtype)
    mask = masks(*shape[:1], *shape[2:])["HW"].to(device)
    got, want = (op(w, delta, mask) for op in (tanh_perturb, tanh_perturb_ref))
    assert (got.float() - want.float()).abs().max() <= rounding
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
    assert got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("form", ("none", "HW", "BHW", "B1HW", "empty", "full"))
@pytest.mark.parametrize("shared", (False, True))
def test_gradient_equals_autograd(shared, form, layout, device):
    B, C, H, W = 3, 3, 9, 8
    w = to_tanh(random(B, C, H, W)).to(device).contiguous(memory_format=layout)
    mask = masks(B, H, W)[form]
    mask = mask if mask is None else mask.to(device)
    grads = []
    for op in (tanh_perturb, tanh_perturb_ref):
        delta = (random(1 if shared else B, C, H, W, seed=1, device=device) - 0.5).requires_grad_()
        (op(w, delta, mask) * random(B, C, H, W, seed=2, device=device)).sum().backward()
        grads.append(delta.grad)
    assert grads[0].shape == grads[1].shape
    # 1 - tanh^2 loses 2^-23
    assert (grads[0] - grads[1]).abs().max() <= 2.0**-21 * (B if shared else 1)
    if form == "empty":
        assert (grads[0] == 0).all()
        assert torch.equal(tanh_perturb(w, w * 0 + 5, mask), tanh_perturb(w, w * 0, mask))


def test_to_tanh_is_inverted(device):
    x = torch.linspace(0, 1, 256, device=device).reshape(1, 1, 16, 16)
    assert (tanh_perturb(to_tanh(x), torch.zeros_like(x)) - x).abs().max() < 6e-7


def test_every_branch_is_reached(launched, device, monkeypatch):
    mask = torch.ones(4, 4, device=device)
    for layout in LAYOUTS:
        w = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=layout)
        for m in (None, mask):
            for of in (1, 2):
                delta = torch.zeros(of, 3, 4, 4, device=device, requires_grad=True)
                tanh_perturb(w, delta, m).sum().backward()
    count = {
        name: len({tuple(c.items()) for n, c in launched if n == name}) for name, _ in launched
    }
    assert count == {"_forward_kernel": 4, "_backward_kernel": 8}
    launched.clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if device == "cpu":
        assert torch.equal(tanh_perturb(w, w), tanh_perturb_ref(w, w)) and not launched


def test_an_empty_batch(launched):
    assert tanh_perturb(torch.rand(0, 3, 4, 4), torch.rand(1, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert not launched


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param((torch.rand(3, 4, 4), torch.rand(3, 4, 4)), "w must have shape", id="w"),
        pytest.param(
            (torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4)),
            r"delta must have shape \(2, 3, 4, 4\)",
            id="delta",
        ),
        pytest.param(
            (torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4), torch.ones(4, 3)),
            "mask must have shape",
            id="mask",
        ),
        pytest.param(
            (torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(1, 3, 4, 4)),
            "w must not require",
            id="grad",
        ),
        pytest.param(
            (torch.rand(2, 3, 4, 8)[..., ::2], torch.rand(1, 3, 4, 4)),
            "contiguous or channels_last",
            id="strided",
        ),
    ],
)
def test_clear_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tanh_perturb(*arguments)
