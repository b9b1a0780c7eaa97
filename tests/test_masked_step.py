"""masked_step against its reference: elementwise float32, so every comparison is exact."""

import pytest
import torch

from kernels.masked_step import box_mask, masked_step, masked_step_ref
from tests.conftest import same

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((3, 3, 7, 5), id="odd"),
    pytest.param((2, 3, 11, 31), id="block-1"),  # 1023 elements
    pytest.param((1, 1, 32, 32), id="block"),
    pytest.param((1, 5, 5, 41), id="block+1"),  # 1025
    pytest.param((2, 3, 24, 24), id="even"),
]
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.float16, torch.bfloat16)]


def data(shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    grad.view(-1)[::3] = 0
    return (v.to(device, dtype).contiguous(memory_format=layout) for v in (x, grad))


def some_boxes(B, H, W, device="cpu"):
    """Whole image, one pixel in the far corner, empty, then something in the middle."""
    kinds = [
        (0, 0, H, W),
        (H - 1, W - 1, 1, 1),
        (0, 0, 0, W),
        (H // 3, W // 4, (H + 1) // 2, (W + 1) // 2),
    ]
    return torch.tensor([kinds[b % 4] for b in range(B)], device=device)


def step(B, alpha=0.1, device="cpu"):
    return torch.full((B,), alpha, device=device)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype, layout, device):
    x, grad = data(shape, dtype, layout, device)
    boxes, alpha = some_boxes(shape[0], *shape[2:], device), step(shape[0], 16 / 255, device)
    want = masked_step_ref(x, grad, alpha, boxes)
    got = masked_step(x, grad, alpha, boxes)
    assert same(got, want)
    assert got.is_contiguous(memory_format=layout)


def test_the_reference_equals_a_loop_over_pixels():
    x, grad = data((4, 3, 9, 13), layout=torch.channels_last)
    boxes, alpha = some_boxes(4, 9, 13), torch.tensor([-0.1, 0.1, 0.2, 2.0])
    want = brute_force(x, grad, alpha, box_mask(boxes, 9, 13))
    assert torch.equal(masked_step_ref(x, grad, alpha, boxes), want)


def brute_force(x, grad, alpha, inside):
    result = x.clone()
    for at in inside.expand_as(x).nonzero().tolist():
        at = tuple(at)
        sign = torch.tensor(float((grad[at] > 0).item() - (grad[at] < 0).item()))
        result[at] = (x[at] + alpha[at[0]] * sign).clamp(0, 1)
    return result


def test_alpha_per_sample_steps_both_ways(device):
    x, grad = data((4, 3, 8, 8), device=device)
    alpha = torch.tensor([0.05, -0.05, 0.0, 2.0], device=device)
    boxes = torch.tensor([[1, 2, 5, 4]] * 4, device=device, dtype=torch.int32)
    got = masked_step(x, grad, alpha, boxes)
    assert torch.equal(got, masked_step_ref(x, grad, alpha, boxes))
    for b in range(4):
        one = (v[b : b + 1] for v in (x, grad, alpha, boxes))
        assert torch.equal(got[b : b + 1], masked_step(*one))
    assert got.min() >= 0 and got.max() <= 1


def test_unchanged_outside_even_out_of_range_and_where_the_gradient_is_zero(device):
    x, grad = data((2, 3, 6, 6), device=device)
    x = x * 4 - 2  # outside [0, 1] before the step
    boxes = torch.tensor([[1, 1, 3, 2], [0, 0, 0, 0]], device=device)
    alpha = step(2, device=device)
    inside = box_mask(boxes, 6, 6).expand_as(x)
    got = masked_step(x, grad, alpha, boxes)
    assert torch.equal(got[~inside], x[~inside])
    assert got[inside].min() >= 0 and got[inside].max() <= 1
    clean = x.clamp(0, 1)
    assert torch.equal(masked_step(clean, torch.zeros_like(clean), alpha, boxes), clean)


def test_takes_any_gradient_layout_and_dtype(device):
    x, grad = data((2, 3, 5, 6), device=device)
    boxes, alpha = some_boxes(2, 5, 6, device), step(2, device=device)
    other = grad.contiguous(memory_format=torch.channels_last).half()
    got, want = masked_step(x, other, alpha, boxes), masked_step_ref(x, other, alpha, boxes)
    assert torch.equal(got, want)


def test_every_branch_is_reached(launched, device):
    for layout in LAYOUTS:
        x, grad = data((2, 3, 5, 5), layout=layout, device=device)
        masked_step(x, grad, step(2, device=device), some_boxes(2, 5, 5, device))
    assert [c["CHANNELS_LAST"] for _, c in launched] == [False, True]


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    (x, grad), boxes, alpha = data((2, 3, 5, 5)), some_boxes(2, 5, 5), step(2)
    assert masked_step(x[:0], grad[:0], alpha[:0], boxes[:0]).shape == (0, 3, 5, 5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    want = masked_step_ref(x, grad, alpha, boxes)
    assert torch.equal(masked_step(x, grad, alpha, boxes), want)
    assert not launched


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"x": torch.rand(3, 5, 5)}, r"x must have shape \(B, C, H, W\)", id="x-3d"),
        pytest.param({"x": torch.rand(2, 3, 5, 5).double()}, "x must be float32", id="x-double"),
        pytest.param(
            {"x": torch.rand(2, 3, 5, 10)[..., ::2]}, "contiguous or channels_last", id="x-strided"
        ),
        pytest.param(
            {"grad": torch.rand(2, 3, 5, 4)}, r"grad must have shape \(2, 3, 5, 5\)", id="grad"
        ),
        pytest.param({"boxes": torch.rand(2, 4)}, "boxes must be int32 or int64", id="boxes-float"),
        pytest.param({"alpha": torch.ones(3)}, "alpha must have shape", id="alpha"),
    ],
)
def test_clear_errors(change, message):
    x, grad = data((2, 3, 5, 5))
    arguments = {"x": x, "grad": grad, "alpha": step(2), "boxes": some_boxes(2, 5, 5)} | change
    with pytest.raises(ValueError, match=message):
        masked_step(**arguments)
