"""augment with noise given equals its reference and a loop over pixels exactly; noise that is drawn
follows the seed."""

import itertools

import pytest
import torch

from kernels.augment import augment, augment_ref
from kernels.masked_step import box_mask

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((4, 3, 7, 5), id="odd"),
    pytest.param((2, 3, 11, 31), id="block-1"),
    pytest.param((1, 1, 32, 32), id="block"),
    pytest.param((1, 5, 5, 41), id="block+1"),
]


def generator(seed, device):
    return torch.Generator(device).manual_seed(seed)


def data(shape, device="cpu"):
    images, noise = torch.rand(2, *shape, generator=generator(0, "cpu")).to(device)
    return (images * 255).round().byte(), noise


def given(B, H, W, device):
    kinds = [
        (H // 3, W // 4, (H + 1) // 2, (W + 1) // 2),
        (0, 0, 0, 0),
        (0, 0, H, W),
        (H - 1, W - 1, 1, 1),
    ]
    moves = [(-2, 3), (5, -5), (0, 0), (-1, -4)]  # beyond some of the images: the edge fills all
    boxes, shifts, flips = kinds[:B], moves[:B], [b % 2 == 0 for b in range(B)]
    return {
        "flips": torch.tensor(flips, device=device),
        "shifts": torch.tensor(shifts, device=device),
        "boxes": torch.tensor(boxes, device=device),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_everything_given(shape, layout, device):
    images, noise = data(shape, device)
    images = images.contiguous(memory_format=layout)
    arguments = given(shape[0], *shape[2:], device) | {"noise": noise}
    for other in LAYOUTS:
        want, _, flags = augment_ref(images, layout=other, **arguments)
        got, boxes, erased = augment(images, layout=other, **arguments)
        assert torch.equal(got, want) and got.is_contiguous(memory_format=other)
        assert got.dtype == want.dtype == torch.float32
        assert torch.equal(boxes, arguments["boxes"]) and torch.equal(erased, flags)


def test_the_reference_equals_a_loop_over_pixels():
    B, C, H, W = 4, 2, 5, 7
    images, noise = data((B, C, H, W))
    arguments = given(B, H, W, "cpu")
    want = torch.empty_like(noise)
    for b, r, c in itertools.product(range(B), range(H), range(W)):
        (down, right), (top, left, h, w) = (
            arguments["shifts"][b].tolist(),
            arguments["boxes"][b].tolist(),
        )
        row, col = min(max(r + down, 0), H - 1), min(max(c + right, 0), W - 1)
        col = W - 1 - col if arguments["flips"][b] else col
        inside = top <= r < top + h and left <= c < left + w
        want[b, :, r, c] = noise[b, :, r, c] if inside else images[b, :, row, col] / 255
    assert torch.equal(augment_ref(images, noise=noise, **arguments)[0], want)


@pytest.mark.parametrize("op", (augment, augment_ref))
@pytest.mark.parametrize("fill", ("gaussian", "uniform"))
def test_seed_decides_everything_and_noise_stays_in_its_box(fill, op, device):
    images = data((8, 3, 16, 16), device)[0]
    still = {
        "flips": torch.zeros(8, dtype=torch.bool, device=device),
        "shifts": torch.zeros(8, 2, dtype=torch.int64, device=device),
    }
    whole, some = (torch.tensor([box] * 8, device=device) for box in ([0, 0, 16, 16], [3, 4, 9, 7]))
    made = [
        op(images, fill=fill, boxes=some, generator=generator(s, device), **still)[0]
        for s in (3, 3, 4)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    got, _, erased = op(images, fill=fill, boxes=some, generator=generator(5, device), **still)
    inside = box_mask(some, 16, 16).expand_as(got)
    assert erased.all() and torch.equal(got[~inside], (images.float() / 255)[~inside])
    noise = op(images, fill=fill, boxes=whole, generator=generator(6, device), **still)[0]
    std = 0.2416 if fill == "gaussian" else 12**-0.5
    assert abs(noise.mean() - 0.5) < 5 * std / noise.numel() ** 0.5
    assert abs(noise.std() - std) < 5 * std / noise.numel() ** 0.5
    assert torch.equal(op(images, boxes=whole * 0, **still)[0], images.float() / 255)


def test_every_branch_is_reached(launched, device):
    for own, layout in itertools.product(LAYOUTS, LAYOUTS):
        images, noise = data((2, 3, 4, 4), device)
        images, moves = images.contiguous(memory_format=own), given(2, 4, 4, device)
        augment(images, layout=layout, **moves)
        augment(images, layout=layout, fill="uniform", **moves)
        augment(images, layout=layout, noise=noise, **moves)
    flags = ("GIVEN", "GAUSSIAN", "LAST_IN", "CHANNELS_LAST")
    assert len({tuple(c[k] for k in flags) for _, c in launched}) == 12


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    images, moves = data((3, 3, 9, 9))[0], given(3, 9, 9, "cpu")
    none = {k: v[:0] for k, v in moves.items()}
    assert augment(images[:0], **none)[0].shape == (0, 3, 9, 9)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    got, want = (
        op(images, generator=generator(0, "cpu"), **moves) for op in (augment, augment_ref)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not launched


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            {"images": torch.zeros(3, 5, 5).byte()},
            r"images must have shape \(B, C, H, W\)",
            id="images",
        ),
        pytest.param({"images": torch.rand(2, 3, 5, 5)}, "images must be uint8", id="float"),
        pytest.param(
            {"images": torch.zeros(2, 3, 5, 10).byte()[..., ::2]},
            "contiguous or channels_last",
            id="strided",
        ),
        pytest.param({"fill": "grey"}, "fill must be gaussian or uniform", id="fill"),
        pytest.param({"layout": torch.preserve_format}, "layout must be", id="layout"),
        pytest.param({"flips": torch.zeros(2)}, "flips must be bool", id="flips"),
        pytest.param(
            {"shifts": torch.zeros(2, dtype=torch.int64)},
            r"shifts must have shape \(2, 2\)",
            id="shifts",
        ),
        pytest.param(
            {"boxes": torch.zeros(3, 4, dtype=torch.int64)}, "boxes must have shape", id="boxes"
        ),
        pytest.param({"noise": torch.rand(2, 3, 5, 4)}, "noise must have shape", id="noise"),
    ],
)
def test_clear_errors(change, message):
    arguments = {"images": torch.zeros(2, 3, 5, 5).byte(), **given(2, 5, 5, "cpu")}
    with pytest.raises(ValueError, match=message):
        augment(**(arguments | change))
