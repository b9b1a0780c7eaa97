"""gaussian_cutout: noise that is passed is copied exactly; what is drawn follows the seed and the
stated distribution, inside the box only."""

import pytest
import torch

from kernels.gaussian_cutout import gaussian_cutout, gaussian_cutout_ref
from kernels.masked_step import box_mask
from tests.cases import LAYOUTS, dtypes, layouts, random, refused, seeded, shapes, some_boxes
from tests.conftest import same

ops = pytest.mark.parametrize("op", (gaussian_cutout, gaussian_cutout_ref))


@layouts
@dtypes
@shapes
def test_equals_reference_with_the_same_boxes_and_noise(shape, dtype, layout, device):
    images, noise = random(2, *shape, device=device)
    images = images.to(dtype).contiguous(memory_format=layout)
    boxes = some_boxes(shape[0], *shape[2:], device)
    want, _, flags = gaussian_cutout_ref(images, boxes=boxes, noise=noise)
    got, same_boxes, erased = gaussian_cutout(images, boxes=boxes, noise=noise)
    assert same(got, want) and got.is_contiguous(memory_format=layout)
    assert torch.equal(same_boxes, boxes) and torch.equal(erased, flags)
    assert erased.tolist() == [True, True, False, True, False][: shape[0]]


def test_the_reference_equals_a_loop_over_pixels():
    images, noise = random(2, 3, 2, 6, 5)
    boxes = torch.tensor([[1, 2, 3, 2], [0, 0, 6, 5], [5, 4, 1, 1]])
    want = images.clone()
    for b, (top, left, h, w) in enumerate(boxes.tolist()):
        for row in range(top, top + h):
            for col in range(left, left + w):
                want[b, :, row, col] = noise[b, :, row, col]
    assert torch.equal(gaussian_cutout_ref(images, boxes=boxes, noise=noise)[0], want)


@ops
def test_seed_decides_the_noise(op, device):
    images = random(8, 3, 16, 16, device=device)
    whole = torch.tensor([[0, 0, 16, 16]] * 8, device=device)
    noise = [op(images, boxes=whole, generator=seeded(s, device))[0] for s in (3, 3, 4)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    # samples and channels differ; a few values clip
    assert noise[0].unique().numel() > 0.9 * noise[0].numel() / 1.05


@ops
def test_noise_has_the_stated_moments_and_nothing_changes_outside(op, device):
    images = random(16, 3, 33, 35, device=device)
    sides = torch.randint(1, 34, (2, 16), generator=seeded(2))
    places = (torch.rand(2, 16, generator=seeded(3)) * (34 - sides)).long()
    boxes = torch.cat((places, sides)).T.to(device)
    got, _, erased = op(images, boxes=boxes, generator=seeded(0, device))
    inside = box_mask(boxes, 33, 35).expand_as(images)
    assert erased.all() and torch.equal(got[~inside], images[~inside])
    box = torch.tensor([[0, 0, 33, 35]] * 16, device=device)
    noise = op(images, boxes=box, generator=seeded(1, device))[0].double()
    n = noise.numel()
    assert noise.min() >= 0 and noise.max() <= 1
    clipped = (noise == 0).double().mean() + (noise == 1).double().mean()
    std, share = 0.2416, 0.0455  # of N(0.5, 0.25^2) clipped to [0, 1]; P(|z| > 2)
    assert abs(clipped - share) < 5 * (share / n) ** 0.5
    assert abs(noise.mean() - 0.5) < 5 * std / n**0.5
    assert abs(noise.std() - std) < 5 * std / n**0.5
    flat = noise.flatten() - noise.mean()
    assert abs((flat[1:] * flat[:-1]).mean()) < 5 * std**2 / n**0.5  # neighbours are independent


def test_every_branch_is_reached(launched, device, monkeypatch):
    boxes = some_boxes(3, 5, 5, device)
    for layout in LAYOUTS:
        images = random(3, 3, 5, 5, device=device).contiguous(memory_format=layout)
        gaussian_cutout(images, boxes=boxes)
        gaussian_cutout(images, boxes=boxes, noise=images)
    branches = [(c["COPIED"], c["CHANNELS_LAST"]) for _, c in launched]
    assert branches == [(False, False), (True, False), (False, True), (True, True)]
    launched.clear()
    images, boxes = random(3, 3, 9, 9), some_boxes(3, 9, 9)
    assert gaussian_cutout(images[:0], boxes=boxes[:0])[0].shape == (0, 3, 9, 9)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    results = [op(images, boxes=boxes, generator=seeded(0)) for op in ops.args[1]]
    assert all(torch.equal(a, b) for a, b in zip(*results)) and not launched
    assert torch.equal(gaussian_cutout(images, boxes=boxes * 0)[0], images)


def test_clear_errors():
    arguments = {"images": torch.rand(2, 3, 5, 5), "boxes": torch.zeros(2, 4, dtype=torch.int64)}
    changes = {
        r"images must have shape \(B, C, H, W\)": {"images": torch.rand(3, 5, 5)},
        "images must be float32": {"images": torch.zeros(2, 3, 5, 5, dtype=torch.uint8)},
        "contiguous or channels_last": {"images": torch.rand(2, 3, 5, 10)[..., ::2]},
        r"boxes must have shape \(2, 4\)": {"boxes": torch.zeros(3, 4, dtype=torch.int64)},
        "noise must have shape": {"noise": torch.rand(2, 3, 5, 4)},
    }
    refused(gaussian_cutout, arguments, changes)
