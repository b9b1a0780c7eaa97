"""augment with noise passed to it equals its reference and a loop over pixels exactly; noise that
is drawn follows the seed."""

import itertools

import pytest
import torch

from kernels.augment import augment, augment_ref
from kernels.masked_step import box_mask
from tests.cases import LAYOUTS, layouts, random, refused, seeded, shapes, some_boxes


def data(shape, device="cpu"):
    images, noise = random(2, *shape, device=device)
    return (images * 255).round().byte(), noise


def moves(B, H, W, device="cpu"):
    # beyond some of the images: the edge fills all
    shifts = [(-2, 3), (5, -5), (0, 0), (-1, -4), (4, 1)]
    return {
        "flips": torch.tensor([b % 2 == 0 for b in range(B)], device=device),
        "shifts": torch.tensor(shifts[:B], device=device),
        "boxes": some_boxes(B, H, W, device),
    }


@layouts
@shapes
def test_equals_reference_with_the_same_moves_and_noise(shape, layout, device):
    images, noise = data(shape, device)
    images = images.contiguous(memory_format=layout)
    arguments = moves(shape[0], *shape[2:], device) | {"noise": noise}
    for other in LAYOUTS:
        want, _, flags = augment_ref(images, layout=other, **arguments)
        got, boxes, erased = augment(images, layout=other, **arguments)
        assert torch.equal(got, want) and got.is_contiguous(memory_format=other)
        assert got.dtype == want.dtype == torch.float32
        assert torch.equal(boxes, arguments["boxes"]) and torch.equal(erased, flags)


def test_the_reference_equals_a_loop_over_pixels():
    B, C, H, W = 4, 2, 5, 7
    images, noise = data((B, C, H, W))
    arguments = moves(B, H, W)
    shifts, boxes = arguments["shifts"].tolist(), arguments["boxes"].tolist()
    want = torch.empty_like(noise)
    for b, r, c in itertools.product(range(B), range(H), range(W)):
        top, left, h, w = boxes[b]
        row = min(max(r + shifts[b][0], 0), H - 1)
        col = min(max(c + shifts[b][1], 0), W - 1)
        col = W - 1 - col if arguments["flips"][b] else col
        inside = top <= r < top + h and left <= c < left + w
        want[b, :, r, c] = noise[b, :, r, c] if inside else images[b, :, row, col] / 255
    assert torch.equal(augment_ref(images, noise=noise, **arguments)[0], want)


@pytest.mark.parametrize("op", (augment, augment_ref))
def test_seed_decides_everything_and_noise_stays_in_its_box(op, device):
    images = data((8, 3, 16, 16), device)[0]
    still = {
        "flips": torch.zeros(8, dtype=torch.bool, device=device),
        "shifts": torch.zeros(8, 2, dtype=torch.int64, device=device),
    }
    whole, some = (torch.tensor([box] * 8, device=device) for box in ([0, 0, 16, 16], [3, 4, 9, 7]))
    results = [op(images, boxes=some, generator=seeded(s, device), **still) for s in (3, 3, 4)]
    (first, _, erased), (second, *_), (third, *_) = results
    assert torch.equal(first, second) and not torch.equal(first, third) and erased.all()
    inside = box_mask(some, 16, 16).expand_as(first)
    assert torch.equal(first[~inside], (images.float() / 255)[~inside])
    noise = op(images, boxes=whole, generator=seeded(6, device), **still)[0]
    assert abs(noise.mean() - 0.5) < 5 * 0.2416 / noise.numel() ** 0.5
    assert abs(noise.std() - 0.2416) < 5 * 0.2416 / noise.numel() ** 0.5
    assert torch.equal(op(images, boxes=whole * 0, **still)[0], images.float() / 255)


def test_every_branch_is_reached(launched, device, monkeypatch):
    for layout_in, layout in itertools.product(LAYOUTS, LAYOUTS):
        images, noise = data((2, 3, 4, 4), device)
        images = images.contiguous(memory_format=layout_in)
        augment(images, layout=layout, **moves(2, 4, 4, device))
        augment(images, layout=layout, noise=noise, **moves(2, 4, 4, device))
    flags = ("COPIED", "LAST_IN", "CHANNELS_LAST")
    assert len({tuple(c[k] for k in flags) for _, c in launched}) == 8
    launched.clear()
    images, arguments = data((3, 3, 9, 9))[0], moves(3, 9, 9)
    assert augment(images[:0], **{k: v[:0] for k, v in arguments.items()})[0].shape == (0, 3, 9, 9)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    got, want = (op(images, generator=seeded(0), **arguments) for op in (augment, augment_ref))
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not launched


def test_clear_errors():
    arguments = {"images": torch.zeros(2, 3, 5, 5).byte(), **moves(2, 5, 5)}
    changes = {
        r"images must have shape \(B, C, H, W\)": {"images": torch.zeros(3, 5, 5).byte()},
        "images must be uint8": {"images": torch.rand(2, 3, 5, 5)},
        "contiguous or channels_last": {"images": torch.zeros(2, 3, 5, 10).byte()[..., ::2]},
        "layout must be": {"layout": torch.preserve_format},
        "flips must be bool": {"flips": torch.zeros(2)},
        r"shifts must have shape \(2, 2\)": {"shifts": torch.zeros(2, dtype=torch.int64)},
        "boxes must have shape": {"boxes": torch.zeros(3, 4, dtype=torch.int64)},
        "noise must have shape": {"noise": torch.rand(2, 3, 5, 4)},
    }
    refused(augment, arguments, changes)
