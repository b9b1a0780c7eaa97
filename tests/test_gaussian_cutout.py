"""gaussian_cutout: noise given is copied exactly; what is drawn follows the seed and the stated
distribution, inside the box only."""

import pytest
import torch

from kernels.gaussian_cutout import gaussian_cutout, gaussian_cutout_ref
from kernels.masked_step import box_mask
from tests.conftest import same

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((5, 3, 7, 5), id="odd"),
    pytest.param((2, 3, 11, 31), id="block-1"),
    pytest.param((1, 1, 32, 32), id="block"),
    pytest.param((1, 5, 5, 41), id="block+1"),
]
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.float16, torch.bfloat16)]


def generator(seed, device):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_given_boxes_and_noise(shape, dtype, layout, device):
    B, _, H, W = shape
    images, noise = torch.rand(2, *shape, generator=generator(0, "cpu")).to(device)
    images = images.to(dtype).contiguous(memory_format=layout)
    kinds = [
        (H // 3, W // 4, (H + 1) // 2, (W + 1) // 2),
        (0, 0, H, W),
        (0, 0, 0, 0),
        (H - 1, W - 1, 1, 1),
        (0, 0, H, 0),
    ]
    boxes = torch.tensor([kinds[b] for b in range(B)], device=device)
    want, _, flags = gaussian_cutout_ref(images, boxes=boxes, noise=noise)
    got, same_boxes, erased = gaussian_cutout(images, boxes=boxes, noise=noise)
    assert same(got, want) and got.is_contiguous(memory_format=layout)
    assert torch.equal(same_boxes, boxes) and torch.equal(erased, flags)
    assert erased.tolist() == [True, True, False, True, False][:B]


def test_the_reference_equals_a_loop_over_pixels():
    images, noise = torch.rand(2, 3, 2, 6, 5)
    boxes = torch.tensor([[1, 2, 3, 2], [0, 0, 6, 5], [5, 4, 1, 1]])
    want = images.clone()
    for b, (top, left, h, w) in enumerate(boxes.tolist()):
        for row in range(top, top + h):
            for col in range(left, left + w):
                want[b, :, row, col] = noise[b, :, row, col]
    assert torch.equal(gaussian_cutout_ref(images, boxes=boxes, noise=noise)[0], want)


@pytest.mark.parametrize("op", (gaussian_cutout, gaussian_cutout_ref))
def test_seed_decides_the_noise(op, device):
    images = torch.rand(8, 3, 16, 16, device=device)
    whole = torch.tensor([[0, 0, 16, 16]] * 8, device=device)
    made = [op(images, boxes=whole, generator=generator(s, device))[0] for s in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    # samples and channels differ; a few values clip
    assert made[0].flatten().unique().numel() > 0.9 * made[0].numel() / 1.05


@pytest.mark.parametrize("op", (gaussian_cutout, gaussian_cutout_ref))
@pytest.mark.parametrize("fill", ("gaussian", "uniform"))
def test_noise_has_the_stated_moments_and_nothing_changes_outside(fill, op, device):
    images = torch.rand(16, 3, 33, 35, device=device)
    sides = torch.randint(1, 34, (2, 16), generator=generator(2, "cpu"))
    places = (torch.rand(2, 16, generator=generator(3, "cpu")) * (34 - sides)).long()
    boxes = torch.cat((places, sides)).T.to(device)
    got, _, erased = op(images, boxes=boxes, fill=fill, generator=generator(0, device))
    inside = box_mask(boxes, 33, 35).expand_as(images)
    assert erased.all() and torch.equal(got[~inside], images[~inside])
    box = torch.tensor([[0, 0, 33, 35]] * 16, device=device)
    noise = op(images, boxes=box, fill=fill, generator=generator(1, device))[0].double()
    n = noise.numel()
    assert noise.min() >= 0 and noise.max() <= 1
    if fill == "gaussian":
        clipped = (noise == 0).double().mean() + (noise == 1).double().mean()
        std, share = 0.2416, 0.0455  # of N(0.5, 0.25^2) clipped to [0, 1]; P(|z| > 2)
        assert abs(clipped - share) < 5 * (share / n) ** 0.5
    else:
        std = 12**-0.5
        assert (noise == 0).sum() + (noise == 1).sum() < 5
    assert abs(noise.mean() - 0.5) < 5 * std / n**0.5
    assert abs(noise.std() - std) < 5 * std / n**0.5
    flat = noise.flatten() - noise.mean()
    assert abs((flat[1:] * flat[:-1]).mean()) < 5 * std**2 / n**0.5  # neighbours are independent


def test_every_branch_is_reached(launched, device):
    boxes = torch.tensor([[1, 1, 3, 2], [0, 0, 0, 0]], device=device)
    for layout in LAYOUTS:
        images = torch.rand(2, 3, 5, 5, device=device).contiguous(memory_format=layout)
        gaussian_cutout(images, boxes=boxes)
        gaussian_cutout(images, boxes=boxes, fill="uniform")
        gaussian_cutout(images, boxes=boxes, noise=torch.rand(2, 3, 5, 5, device=device))
    seen = [tuple(c[k] for k in ("GIVEN", "GAUSSIAN", "CHANNELS_LAST")) for _, c in launched]
    once = [(False, True), (False, False), (True, True)]
    assert seen == [(*s, False) for s in once] + [(*s, True) for s in once]


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    images, boxes = torch.rand(3, 3, 9, 9), torch.tensor([[1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 9, 9]])
    assert gaussian_cutout(images[:0], boxes=boxes[:0])[0].shape == (0, 3, 9, 9)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    ops = (gaussian_cutout, gaussian_cutout_ref)
    got, want = (op(images, boxes=boxes, generator=generator(0, "cpu")) for op in ops)
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not launched
    assert torch.equal(gaussian_cutout(images, boxes=boxes * 0)[0], images)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            {"images": torch.rand(3, 5, 5)},
            r"images must have shape \(B, C, H, W\)",
            id="images-3d",
        ),
        pytest.param(
            {"images": torch.zeros(2, 3, 5, 5, dtype=torch.uint8)},
            "images must be float32",
            id="images-uint8",
        ),
        pytest.param(
            {"images": torch.rand(2, 3, 5, 10)[..., ::2]},
            "contiguous or channels_last",
            id="strided",
        ),
        pytest.param({"fill": "grey"}, "fill must be gaussian or uniform, got 'grey'", id="fill"),
        pytest.param(
            {"boxes": torch.zeros(3, 4, dtype=torch.int64)},
            r"boxes must have shape \(2, 4\)",
            id="boxes",
        ),
        pytest.param({"noise": torch.rand(2, 3, 5, 4)}, "noise must have shape", id="noise"),
    ],
)
def test_clear_errors(change, message):
    arguments = {"images": torch.rand(2, 3, 5, 5), "boxes": torch.zeros(2, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        gaussian_cutout(**(arguments | change))
