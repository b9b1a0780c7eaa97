"""augment with moves, boxes and noise given equals its reference and a loop over pixels exactly; drawn ones follow the seed."""

import itertools

import pytest
import torch

from kernels.augment import augment, augment_ref, draw_moves
from kernels.masked_step import box_mask
from tests.conftest import same

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((4, 3, 7, 5), id="odd"),
    pytest.param((2, 3, 11, 31), id="block-1"),
    pytest.param((1, 1, 32, 32), id="block"),
    pytest.param((1, 5, 5, 41), id="block+1"),
]
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.uint8, torch.float32, torch.float16, torch.bfloat16)]


def generator(seed, device):
    return torch.Generator(device).manual_seed(seed)


def data(shape, dtype, device):
    images, noise = torch.rand(2, *shape, generator=generator(0, "cpu")).to(device)
    return (images * 255).round().byte() if dtype == torch.uint8 else images.to(dtype), noise


def given(B, H, W, device):
    kinds = [(H // 3, W // 4, (H + 1) // 2, (W + 1) // 2), (0, 0, 0, 0), (0, 0, H, W), (H - 1, W - 1, 1, 1)]
    moves = [(-2, 3), (5, -5), (0, 0), (-1, -4)]  # beyond some of the images: the edge fills all
    boxes, shifts, flips = kinds[:B], moves[:B], [b % 2 == 0 for b in range(B)]
    return {
        "flips": torch.tensor(flips, device=device),
        "shifts": torch.tensor(shifts, device=device),
        "boxes": torch.tensor(boxes, device=device),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_everything_given(shape, dtype, layout, device):
    images, noise = data(shape, dtype, device)
    images = images.contiguous(memory_format=layout)
    arguments = given(shape[0], *shape[2:], device) | {"noise": noise}
    want, _, flags = augment_ref(images, **arguments)
    got, boxes, erased = augment(images, **arguments)
    assert same(got, want) and got.is_contiguous(memory_format=layout)
    assert got.dtype == want.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert torch.equal(boxes, arguments["boxes"]) and torch.equal(erased, flags)
    for other in LAYOUTS:
        got = augment(images, layout=other, dtype=torch.float16, **arguments)[0]
        assert torch.equal(got, augment_ref(images, layout=other, dtype=torch.float16, **arguments)[0])
        assert got.is_contiguous(memory_format=other) and got.dtype == torch.float16


def test_the_reference_equals_a_loop_over_pixels():
    B, C, H, W = 4, 2, 5, 7
    images, noise = data((B, C, H, W), torch.float32, "cpu")
    arguments = given(B, H, W, "cpu")
    want = torch.empty_like(images)
    for b, r, c in itertools.product(range(B), range(H), range(W)):
        (down, right), (top, left, h, w) = arguments["shifts"][b].tolist(), arguments["boxes"][b].tolist()
        row, col = min(max(r + down, 0), H - 1), min(max(c + right, 0), W - 1)
        col = W - 1 - col if arguments["flips"][b] else col
        inside = top <= r < top + h and left <= c < left + w
        want[b, :, r, c] = noise[b, :, r, c] if inside else images[b, :, row, col]
    assert torch.equal(augment_ref(images, noise=noise, **arguments)[0], want)


@pytest.mark.parametrize("op", (augment, augment_ref))
@pytest.mark.parametrize("fill", ("gaussian", "uniform"))
def test_seed_decides_everything_and_noise_stays_in_its_box(fill, op, device):
    images = data((8, 3, 16, 16), torch.uint8, device)[0]
    first, second, other = (op(images, fill=fill, generator=generator(s, device)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and not torch.equal(first[0], other[0])
    still = {
        "flips": torch.zeros(8, dtype=torch.bool, device=device),
        "shifts": torch.zeros(8, 2, dtype=torch.int64, device=device),
    }
    got, boxes, erased = op(images, p=1.0, fill=fill, generator=generator(5, device), **still)
    inside = box_mask(boxes, 16, 16).expand_as(got)
    assert erased.all() and torch.equal(got[~inside], (images.float() / 255)[~inside])
    whole = torch.tensor([[0, 0, 16, 16]] * 8, device=device)
    noise = op(images, fill=fill, boxes=whole, generator=generator(6, device))[0]
    std = 0.2416 if fill == "gaussian" else 12**-0.5
    assert abs(noise.mean() - 0.5) < 5 * std / noise.numel() ** 0.5
    assert abs(noise.std() - std) < 5 * std / noise.numel() ** 0.5
    assert torch.equal(op(images, shift=0, p=0.0, flips=still["flips"])[0], images.float() / 255)


def test_moves_are_distributed_as_stated(device):
    flips, shifts = draw_moves(20000, 5, generator(0, device), device)
    assert abs(flips.float().mean() - 0.5) < 0.02
    counts = torch.bincount((shifts + 5).flatten(), minlength=11).double() / 40000
    assert counts.numel() == 11 and (counts - 1 / 11).abs().max() < 5 * (1 / 11 / 40000) ** 0.5


def test_every_branch_is_reached(launched, device):
    for own, layout in itertools.product(LAYOUTS, LAYOUTS):
        for dtype in (torch.uint8, torch.float32):
            images, noise = data((2, 3, 4, 4), dtype, device)
            images = images.contiguous(memory_format=own)
            augment(images, layout=layout)
            augment(images, layout=layout, fill="uniform")
            augment(images, layout=layout, noise=noise)
    flags = ("BYTES", "GIVEN", "GAUSSIAN", "LAST_IN", "LAST_OUT")
    assert len({tuple(c[k] for k in flags) for _, c in launched}) == 24


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    assert augment(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))[0].shape == (0, 3, 4, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    images = data((3, 3, 9, 9), torch.uint8, "cpu")[0]
    got, want = (op(images, generator=generator(0, "cpu")) for op in (augment, augment_ref))
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not launched


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"images": torch.rand(3, 5, 5)}, r"images must have shape \(B, C, H, W\)", id="images"),
        pytest.param({"images": torch.rand(2, 3, 5, 5).double()}, "images must be uint8 or float32", id="double"),
        pytest.param({"images": torch.rand(2, 3, 5, 10)[..., ::2]}, "contiguous or channels_last", id="strided"),
        pytest.param({"fill": "grey"}, "fill must be gaussian or uniform", id="fill"),
        pytest.param({"dtype": torch.uint8}, "dtype must be float32", id="dtype"),
        pytest.param({"layout": torch.preserve_format}, "layout must be", id="layout"),
        pytest.param({"flips": torch.zeros(2)}, "flips must be bool", id="flips"),
        pytest.param({"shifts": torch.zeros(2, dtype=torch.int64)}, r"shifts must have shape \(2, 2\)", id="shifts"),
        pytest.param({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, "boxes must have shape", id="boxes"),
        pytest.param({"noise": torch.rand(2, 3, 5, 4)}, "noise must have shape", id="noise"),
    ],
)
def test_clear_errors(change, message):
    with pytest.raises(ValueError, match=message):
        augment(**({"images": torch.rand(2, 3, 5, 5)} | change))
