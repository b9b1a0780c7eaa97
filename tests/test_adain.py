"""adain against its reference and, forward and backward, against the formula in float64."""

import pytest
import torch

import generator
from kernels.adain import AdaIN, adain, adain_ref
from tests.cases import LAYOUTS, layouts, random, refused, seeded

DTYPES = {  # dtype, relative rounding of the result
    "float32": (torch.float32, 0.0),
    "float16": (torch.float16, 2.0**-10),
    "bfloat16": (torch.bfloat16, 2.0**-7),
}
SHAPES = {
    "1x1": (1, 1, 1, 1),
    "odd": (2, 5, 3, 7),
    "4x4": (2, 9, 4, 4),
    "channels+1": (1, 33, 11, 31),
    "plane+1": (1, 2, 64, 65),  # 4160 pixels: beyond one tile of channels_last
    "large-plane": (1, 1, 128, 257),  # beyond one tile of both layouts
}


def formula(x, scale, offset, slope=0.2, eps=1e-5):
    x, scale, offset = (v.double() for v in (x, scale, offset))
    a = torch.where(x > 0, x, x * slope)
    mean = a.mean((2, 3), keepdim=True)
    var = (a - mean).square().mean((2, 3), keepdim=True)
    return (a - mean) / (var + eps).sqrt() * scale[:, :, None, None] + offset[:, :, None, None]


def data(shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu"):
    rng = seeded(0)
    x, weight = torch.randn(2, *shape, generator=rng).to(device, dtype)
    x, weight = ((v + 0.3).contiguous(memory_format=layout) for v in (x, weight))
    scale, offset = (torch.rand(2, *shape[:2], generator=rng).to(device) + 0.5).unbind(0)
    return x, scale, offset, weight


@layouts
@pytest.mark.parametrize("dtype, rounding", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_reference_and_formula(shape, dtype, rounding, layout, device):
    x, scale, offset, weight = data(shape, dtype, layout, device)
    results = []
    for op in (formula, adain, adain_ref):
        leaves = [v.clone().requires_grad_() for v in (x, scale, offset)]
        y = op(*leaves)
        (y.double() * weight.double()).sum().backward()
        results.append([y.detach(), *(v.grad for v in leaves)])
    for result in results[1:]:
        assert result[0].dtype == dtype and result[0].is_contiguous(memory_format=layout)
        for got, want in zip(result, results[0]):
            # the upstream gradient and x's are rounded to dtype; sums over H * W pixels to float32
            pixels = 1 if got.dim() == 4 else shape[2] * shape[3]
            bound = rounding * want.abs() + 2.0**-19 * (1 + want.abs()) + 2.0**-22 * pixels
            assert ((got.double() - want).abs() <= bound).all()


@layouts
@pytest.mark.parametrize("shape", ((1, 3, 16, 16), (1, 3, 80, 64)), ids=str)
def test_a_large_mean_does_not_cancel(shape, layout, device):
    x, scale, offset, _ = data(shape, layout=layout, device=device)
    error = adain(x + 100, scale, offset) - formula(x + 100, scale, offset)
    assert error.abs().max() < 2e-4  # 100 * 2^-24 before the division by 1


def test_constant_planes_give_the_offset_and_slope_one_is_plain(device):
    x, scale, offset, _ = data((2, 3, 8, 8), device=device)
    constant = adain(torch.ones_like(x), scale, offset)
    assert (constant - offset[:, :, None, None]).abs().max() <= 1e-6
    assert (adain(x, scale, offset, slope=1.0) - formula(x, scale, offset, 1.0)).abs().max() < 3e-6
    mixed = x.half(), scale.half(), offset.bfloat16()
    assert (adain(*mixed) - adain_ref(*mixed)).abs().max() <= 2.0**-8


def test_the_closed_form_of_a_cpu_has_the_right_gradient():
    inputs = [random(*s).double().requires_grad_() for s in ((3, 4, 5, 6), (3, 4), (3, 4))]
    assert torch.autograd.gradcheck(AdaIN.apply, inputs)


def test_every_branch_is_reached(launched, device, monkeypatch):
    one = torch.ones(1, 2, device=device)
    for layout in LAYOUTS:
        for side in (8, 184):
            x = random(1, 2, side, side, device=device).contiguous(memory_format=layout)
            adain(x.requires_grad_(), one, one).sum().backward()
    assert len({(name, c["ONE"], c["CHANNELS_LAST"]) for name, c in launched}) == 8
    launched.clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, scale, offset, _ = data((2, 3, 8, 8))
    assert torch.equal(adain(x, scale, offset), adain_ref(x, scale, offset)) and not launched
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [v.requires_grad_() for v in (x[:0].to(dtype), scale[:0], offset[:0])]
        y = adain(*leaves)
        y.sum().backward()
        assert y.shape == (0, 3, 8, 8) and y.dtype == dtype and not launched
        assert [v.grad.shape for v in leaves] == [v.shape for v in leaves]


def test_clear_errors():
    arguments = {"x": torch.rand(2, 3, 4, 4), "scale": torch.rand(2, 3), "offset": torch.rand(2, 3)}
    changes = {
        "x must have shape": {"x": torch.rand(3, 4, 4)},
        "x must be float32": {"x": torch.rand(2, 3, 4, 4).double()},
        "contiguous or channels_last": {"x": torch.rand(2, 3, 4, 8)[..., ::2]},
        r"scale must have shape \(2, 3\)": {"scale": torch.rand(3)},
        "offset must be float32": {"offset": torch.ones(2, 3, dtype=torch.int64)},
    }
    refused(adain, arguments, changes)


def test_the_generator_is_the_same_with_the_kernel(monkeypatch, device, launched):
    sizes = {"class_dim": 8, "content_dim": 8, "hidden": (16, 16), "out_channels": 4}
    torch.manual_seed(0)
    G = generator.Generator(generator.Config(**sizes, channels=(8, 8, 8, 8))).to(device)
    codes = torch.randn(2, 3, 8, device=device)
    weight = torch.randn(3, 3, 64, 64, device=device)
    results = []
    for form in (generator.leaky_adain, adain):  # what a CPU takes, what a GPU takes
        monkeypatch.setattr(generator, "leaky_adain", form)
        leaves = [v.clone().requires_grad_() for v in codes]
        G.zero_grad()
        images = G(*leaves)
        (images * weight).sum().backward()
        grads = [v.grad.clone() for v in (*leaves, *G.parameters())]
        results.append([images.detach(), *grads])
    assert [name for name, _ in launched] == ["_forward_kernel"] * 4 + ["_backward_kernel"] * 4
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
