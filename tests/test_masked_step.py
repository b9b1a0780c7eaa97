"""masked_step against its reference: elementwise float32, so every comparison is exact."""

import torch

from kernels.masked_step import box_mask, masked_step, masked_step_ref
from tests.cases import LAYOUTS, dtypes, layouts, refused, seeded, shapes, some_boxes
from tests.conftest import same


def data(shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu"):
    rng = seeded(0)
    x, grad = torch.rand(shape, generator=rng), torch.randn(shape, generator=rng)
    grad.view(-1)[::3] = 0
    return (v.to(device, dtype).contiguous(memory_format=layout) for v in (x, grad))


def step(B, alpha=0.1, device="cpu"):
    return torch.full((B,), alpha, device=device)


@layouts
@dtypes
@shapes
def test_equals_reference(shape, dtype, layout, device):
    x, grad = data(shape, dtype, layout, device)
    boxes = some_boxes(shape[0], *shape[2:], device)
    alpha = torch.tensor([0.05, -0.05, 0.0, 2.0, 16 / 255], device=device)[: shape[0]]
    got = masked_step(x, grad, alpha, boxes.int())
    assert same(got, masked_step_ref(x, grad, alpha, boxes))
    assert got.is_contiguous(memory_format=layout)


def test_the_reference_equals_a_loop_over_pixels():
    x, grad = data((4, 3, 9, 13), layout=torch.channels_last)
    boxes, alpha = some_boxes(4, 9, 13), torch.tensor([-0.1, 0.1, 0.2, 2.0])
    want = x.clone()
    for b, (top, left, h, w) in enumerate(boxes.tolist()):
        for row in range(top, top + h):
            for col in range(left, left + w):
                sign = grad[b, :, row, col].sign()
                want[b, :, row, col] = (x[b, :, row, col] + alpha[b] * sign).clamp(0, 1)
    assert torch.equal(masked_step_ref(x, grad, alpha, boxes), want)


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


def test_every_branch_is_reached(launched, device, monkeypatch):
    for layout in LAYOUTS:
        x, grad = data((2, 3, 5, 5), layout=layout, device=device)
        masked_step(x, grad, step(2, device=device), some_boxes(2, 5, 5, device))
    assert [c["CHANNELS_LAST"] for _, c in launched] == [False, True]
    launched.clear()
    (x, grad), boxes, alpha = data((2, 3, 5, 5)), some_boxes(2, 5, 5), step(2)
    assert masked_step(x[:0], grad[:0], alpha[:0], boxes[:0]).shape == (0, 3, 5, 5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    want = masked_step_ref(x, grad, alpha, boxes)
    assert torch.equal(masked_step(x, grad, alpha, boxes), want) and not launched


def test_clear_errors():
    x, grad = data((2, 3, 5, 5))
    arguments = {"x": x, "grad": grad, "alpha": step(2), "boxes": some_boxes(2, 5, 5)}
    changes = {
        r"x must have shape \(B, C, H, W\)": {"x": torch.rand(3, 5, 5)},
        "x must be float32": {"x": x.double()},
        "contiguous or channels_last": {"x": torch.rand(2, 3, 5, 10)[..., ::2]},
        r"grad must have shape \(2, 3, 5, 5\)": {"grad": torch.rand(2, 3, 5, 4)},
        "boxes must be int32 or int64": {"boxes": torch.rand(2, 4)},
        "alpha must have shape": {"alpha": torch.ones(3)},
    }
    refused(masked_step, arguments, changes)
