"""masked_step against its reference: elementwise float32 arithmetic, so every comparison is exact."""

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
    kinds = [(0, 0, H, W), (H - 1, W - 1, 1, 1), (0, 0, 0, W), (H // 3, W // 4, (H + 1) // 2, (W + 1) // 2)]
    return torch.tensor([kinds[b % 4] for b in range(B)], device=device)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_boxes(shape, dtype, layout, device):
    x, grad = data(shape, dtype, layout, device)
    boxes = some_boxes(shape[0], *shape[2:], device)
    want = masked_step_ref(x, grad, 16 / 255, boxes)
    got = masked_step(x, grad, 16 / 255, boxes)
    assert same(got, want)
    assert got.is_contiguous(memory_format=layout)
    assert masked_step(x, grad, 16 / 255, boxes, out=x) is x and same(x, want)


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", ("HW", "BHW", "B1HW"))
def test_equals_reference_with_a_mask(form, dtype, device):
    B, C, H, W = 3, 3, 9, 13
    x, grad = data((B, C, H, W), layout=torch.channels_last, device=device)
    shape = {"HW": (H, W), "BHW": (B, H, W), "B1HW": (B, 1, H, W)}[form]
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4).to(device, dtype)
    want = masked_step_ref(x, grad, -0.1, mask=mask)
    assert torch.equal(masked_step(x, grad, -0.1, mask=mask), want)
    assert torch.equal(want.cpu(), brute_force(x.cpu(), grad.cpu(), -0.1, mask.cpu().reshape(-1, 1, H, W) != 0))


def brute_force(x, grad, alpha, inside):
    result = x.clone()
    for at in inside.expand_as(x).nonzero().tolist():
        at = tuple(at)
        sign = torch.tensor(float((grad[at] > 0).item() - (grad[at] < 0).item()))
        result[at] = (x[at] + alpha * sign).clamp(0, 1)
    return result


def test_alpha_per_sample_steps_both_ways(device):
    x, grad = data((4, 3, 8, 8), device=device)
    alpha = torch.tensor([0.05, -0.05, 0.0, 2.0], device=device)
    boxes = torch.tensor([[1, 2, 5, 4]] * 4, device=device, dtype=torch.int32)
    got = masked_step(x, grad, alpha, boxes)
    assert torch.equal(got, masked_step_ref(x, grad, alpha, boxes))
    for b in range(4):
        assert torch.equal(
            got[b : b + 1], masked_step(x[b : b + 1], grad[b : b + 1], alpha[b].item(), boxes[b : b + 1])
        )
    assert got.min() >= 0 and got.max() <= 1


def test_unchanged_outside_even_out_of_range_and_where_the_gradient_is_zero(device):
    x, grad = data((2, 3, 6, 6), device=device)
    x = x * 4 - 2  # outside [0, 1] before the step
    boxes = torch.tensor([[1, 1, 3, 2], [0, 0, 0, 0]], device=device)
    inside = box_mask(boxes, 6, 6).expand_as(x)
    got = masked_step(x, grad, 0.1, boxes)
    assert torch.equal(got[~inside], x[~inside])
    assert got[inside].min() >= 0 and got[inside].max() <= 1
    clean = x.clamp(0, 1)
    assert torch.equal(masked_step(clean, torch.zeros_like(clean), 0.1, boxes), clean)
    for mask in (torch.zeros(6, 6, device=device), torch.ones(6, 6, device=device)):
        assert torch.equal(masked_step(x, grad, 0.1, mask=mask), masked_step_ref(x, grad, 0.1, mask=mask))


def test_writes_into_another_tensor_and_takes_any_gradient_layout(device):
    x, grad = data((2, 3, 5, 6), device=device)
    boxes, out = some_boxes(2, 5, 6, device), torch.empty_like(x)
    other = grad.contiguous(memory_format=torch.channels_last).half()
    assert masked_step(x, other, 0.1, boxes, out=out) is out
    assert torch.equal(out, masked_step_ref(x, other, 0.1, boxes))


def test_every_branch_is_reached(launched, device):
    for layout in LAYOUTS:
        x, grad = data((2, 3, 5, 5), layout=layout, device=device)
        boxes, alpha = some_boxes(2, 5, 5, device), torch.ones(2, device=device)
        masked_step(x, grad, 0.1, boxes)
        masked_step(x, grad, alpha, mask=torch.ones(5, 5, device=device), out=x)
    seen = [tuple(c[k] for k in ("PER_SAMPLE", "BOXES", "IN_PLACE", "CHANNELS_LAST")) for _, c in launched]
    assert seen == [
        (False, True, False, False),
        (True, False, True, False),
        (False, True, False, True),
        (True, False, True, True),
    ]


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    x, grad = data((2, 3, 5, 5))
    assert masked_step(x[:0], grad[:0], 0.1, some_boxes(2, 5, 5)[:0]).shape == (0, 3, 5, 5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    boxes = some_boxes(2, 5, 5)
    assert torch.equal(masked_step(x, grad, 0.1, boxes), masked_step_ref(x, grad, 0.1, boxes))
    assert not launched


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"x": torch.rand(3, 5, 5)}, r"x must have shape \(B, C, H, W\)", id="x-3d"),
        pytest.param({"x": torch.rand(2, 3, 5, 5).double()}, "x must be float32 or float16 or bfloat16", id="x-double"),
        pytest.param({"x": torch.rand(2, 3, 5, 10)[..., ::2]}, "contiguous or channels_last", id="x-strided"),
        pytest.param({"grad": torch.rand(2, 3, 5, 4)}, r"grad must have shape \(2, 3, 5, 5\)", id="grad"),
        pytest.param({"boxes": None}, "either boxes or mask", id="neither"),
        pytest.param({"mask": torch.ones(5, 5)}, "either boxes or mask", id="both"),
        pytest.param({"boxes": torch.rand(2, 4)}, "boxes must be int32 or int64", id="boxes-float"),
        pytest.param({"boxes": None, "mask": torch.ones(5, 4)}, "mask must have shape", id="mask"),
        pytest.param({"alpha": torch.ones(3)}, "alpha must have shape", id="alpha"),
        pytest.param({"out": torch.empty(2, 3, 5, 5).half()}, "out must be float32", id="out"),
        pytest.param(
            {"out": torch.empty(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)},
            "memory layout of x",
            id="out-layout",
        ),
    ],
)
def test_clear_errors(change, message):
    x, grad = data((2, 3, 5, 5))
    arguments = {"x": x, "grad": grad, "alpha": 0.1, "boxes": some_boxes(2, 5, 5)} | change
    with pytest.raises(ValueError, match=message):
        masked_step(**arguments)
