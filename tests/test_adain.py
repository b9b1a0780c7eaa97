"""adain against its reference and, forward and backward, against the formula in float64."""

import pytest
import torch

from kernels.adain import adain, adain_ref

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = [  # dtype, relative rounding of the result
    pytest.param(torch.float32, 0.0, id="float32"),
    pytest.param(torch.float16, 2.0**-10, id="float16"),
    pytest.param(torch.bfloat16, 2.0**-7, id="bfloat16"),
]
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((2, 5, 3, 7), id="odd"),
    pytest.param((2, 9, 4, 4), id="4x4"),
    pytest.param((1, 33, 11, 31), id="channels+1"),
    pytest.param((1, 2, 64, 65), id="plane+1"),  # 4160 pixels: beyond one tile of channels_last
    pytest.param((1, 1, 128, 257), id="large-plane"),  # beyond one tile of both layouts
]


def formula(x, scale, offset, slope=0.2, eps=1e-5):
    x, scale, offset = (v.double() for v in (x, scale, offset))
    a = torch.where(x > 0, x, x * slope)
    mean = a.mean((2, 3), keepdim=True)
    var = (a - mean).square().mean((2, 3), keepdim=True)
    return (a - mean) / (var + eps).sqrt() * scale[:, :, None, None] + offset[:, :, None, None]


def data(shape, dtype, layout, device):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, *shape, generator=generator).to(device, dtype)
    x, weight = ((v + 0.3).contiguous(memory_format=layout) for v in (x, weight))
    scale, offset = (torch.rand(2, *shape[:2], generator=generator).to(device) + 0.5).unbind(0)
    return x, scale, offset, weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype, rounding", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
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


def test_a_large_mean_does_not_cancel(device):
    for layout in LAYOUTS:
        for shape in ((1, 3, 16, 16), (1, 3, 80, 64)):
            x, scale, offset, _ = data(shape, torch.float32, layout, device)
            got = adain(x + 100, scale, offset)
            assert (
                got - formula(x + 100, scale, offset)
            ).abs().max() < 2e-4  # 100 * 2^-24 before the division by 1


def test_constant_planes_give_the_offset_and_slope_one_is_plain(device):
    x, scale, offset, _ = data((2, 3, 8, 8), torch.float32, torch.contiguous_format, device)
    assert torch.allclose(
        adain(torch.ones_like(x), scale, offset),
        offset[:, :, None, None].expand_as(x),
        rtol=0,
        atol=1e-6,
    )
    assert (adain(x, scale, offset, slope=1.0) - formula(x, scale, offset, 1.0)).abs().max() < 3e-6
    half = adain(x.half(), scale.half(), offset.bfloat16())
    assert (half - adain_ref(x.half(), scale.half(), offset.bfloat16())).abs().max() <= 2.0**-8


def test_every_branch_is_reached(launched, device):
    for layout in LAYOUTS:
        for side in (8, 184):
            x = (
                torch.rand(1, 2, side, side, device=device)
                .contiguous(memory_format=layout)
                .requires_grad_()
            )
            adain(
                x, torch.ones(1, 2, device=device), torch.ones(1, 2, device=device)
            ).sum().backward()
    seen = {(name, c["ONE"], c["CHANNELS_LAST"]) for name, c in launched}
    assert len(seen) == 8


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, scale, offset, _ = data((2, 3, 8, 8), torch.float32, torch.contiguous_format, "cpu")
    assert torch.equal(adain(x, scale, offset), adain_ref(x, scale, offset)) and not launched
    for dtype in (torch.float32, torch.bfloat16):
        empty = x[:0].to(dtype), scale[:0], offset[:0]
        leaves = [v.detach().requires_grad_() for v in empty]
        y = adain(*leaves)
        y.sum().backward()
        assert y.shape == (0, 3, 8, 8) and y.dtype == dtype and not launched
        assert [v.grad.shape for v in leaves] == [v.shape for v in leaves]


@pytest.mark.parametrize(
    "at, value, message",
    [
        pytest.param(0, torch.rand(3, 4, 4), "x must have shape", id="x"),
        pytest.param(0, torch.rand(2, 3, 4, 4).double(), "x must be float32", id="double"),
        pytest.param(
            0, torch.rand(2, 3, 4, 8)[..., ::2], "contiguous or channels_last", id="strided"
        ),
        pytest.param(1, torch.rand(3), r"scale must have shape \(2, 3\)", id="scale"),
        pytest.param(2, torch.ones(2, 3, dtype=torch.int64), "offset must be float32", id="offset"),
    ],
)
def test_clear_errors(at, value, message):
    arguments = [torch.rand(2, 3, 4, 4), torch.rand(2, 3), torch.rand(2, 3)]
    arguments[at] = value
    with pytest.raises(ValueError, match=message):
        adain(*arguments)


def test_the_generator_is_the_same_with_the_kernel(monkeypatch, device, launched):
    import generator

    config = generator.Config(
        class_dim=8, content_dim=8, hidden=(16, 16), channels=(8, 8, 8, 8), out_channels=4
    )
    torch.manual_seed(0)
    G, codes, weight = (
        generator.Generator(config).to(device),
        torch.randn(2, 3, 8, device=device),
        torch.randn(3, 3, 64, 64, device=device),
    )
    results = []
    for fused in (None, adain):
        if fused is not None:  # where a GPU would take it
            monkeypatch.setattr(generator, "leaky_adain", adain)
        leaves = [v.clone().requires_grad_() for v in codes]
        G.zero_grad()
        images = G(*leaves)
        (images * weight).sum().backward()
        results.append(
            [images.detach(), *(v.grad for v in leaves), *(p.grad.clone() for p in G.parameters())]
        )
    assert [name for name, _ in launched] == ["_forward_kernel"] * 4 + ["_backward_kernel"] * 4
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
