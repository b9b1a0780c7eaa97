"""gaussian_cutout: boxes and noise given are copied exactly; drawn ones are reproducible, of the stated distribution, inside the box only."""

import pytest
import torch

from kernels.gaussian_cutout import draw_boxes, gaussian_cutout, gaussian_cutout_ref
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
    assert gaussian_cutout(images, boxes=boxes, noise=noise, out=images)[0] is images and same(images, want)


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
def test_seed_decides_everything(op, device):
    images = torch.rand(8, 3, 16, 16, device=device)
    first, second, other = (op(images, generator=generator(s, device)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])
    box = torch.tensor([[0, 0, 16, 16]] * 8, device=device)
    filled = op(images, boxes=box, generator=generator(3, device))[0]
    assert not torch.equal(filled, op(images, boxes=box, generator=generator(4, device))[0])
    assert (
        filled.flatten().unique().numel() > 0.9 * filled.numel() / 1.05
    )  # samples and channels differ; a few values clip


@pytest.mark.parametrize("op", (gaussian_cutout, gaussian_cutout_ref))
@pytest.mark.parametrize("fill", ("gaussian", "uniform"))
def test_noise_has_the_stated_moments_and_nothing_changes_outside(fill, op, device):
    images = torch.rand(16, 3, 33, 35, device=device)
    got, boxes, erased = op(images, p=1.0, fill=fill, generator=generator(0, device))
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


def test_boxes_fit_and_are_distributed_as_stated(device):
    n, H, W = 20000, 64, 64
    boxes = draw_boxes(n, H, W, p=0.5, generator=generator(0, device), device=device)
    assert boxes.dtype == torch.int64 and boxes.device.type == device
    top, left, h, w = boxes.double().unbind(1)
    some = h > 0
    assert abs(some.double().mean() - 0.5) < 5 * 0.5 / n**0.5 and (boxes[~some] == 0).all()
    top, left, h, w = (v[some] for v in (top, left, h, w))
    assert ((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1) & (top + h <= H) & (left + w <= W)).all()
    share, ratio = h * w / (H * W), h / w
    assert (
        share.min() > 0.015 and share.max() < 0.21 and ratio.min() > 0.42 and ratio.max() < 2.4
    )  # sides round to pixels
    assert abs(share.mean() - 0.11) < 0.002 and abs(share.std() - 0.18 / 12**0.5) < 0.002
    assert abs(ratio.mean() - 1.25) < 0.02
    place = top / (H - h)
    assert abs(place.mean() - 0.5) < 0.02 and (top == 0).any() and (top + h == H).any() and (left + w == W).any()
    jointly = draw_boxes(n, H, W, p=1.0, generator=generator(0, device), device=device, joint=True).double()
    assert ((jointly[:, 0] + jointly[:, 2] <= H) & (jointly[:, 1] + jointly[:, 3] <= W)).all()
    assert (jointly[:, 2] * jointly[:, 3]).mean() / (H * W) < 0.1  # redrawing the place favours small rectangles


def test_boxes_of_extreme_images_fit():
    for H, W in ((1, 1), (1, 64), (64, 1), (2, 3)):
        for joint in (False, True):
            top, left, h, w = draw_boxes(200, H, W, p=1.0, joint=joint, generator=generator(0, "cpu")).unbind(1)
            assert ((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1) & (top + h <= H) & (left + w <= W)).all()
    assert (draw_boxes(50, 8, 8, p=0.0) == 0).all() and (draw_boxes(50, 8, 8, p=1.0)[:, 2] > 0).all()


def test_every_branch_is_reached(launched, device):
    for layout in LAYOUTS:
        images = torch.rand(2, 3, 5, 5, device=device).contiguous(memory_format=layout)
        gaussian_cutout(images)
        gaussian_cutout(images, fill="uniform", out=images)
        gaussian_cutout(images, noise=torch.rand(2, 3, 5, 5, device=device))
    seen = [tuple(c[k] for k in ("GIVEN", "GAUSSIAN", "IN_PLACE", "CHANNELS_LAST")) for _, c in launched]
    once = [(False, True, False), (False, False, True), (True, True, False)]
    assert seen == [(*s, False) for s in once] + [(*s, True) for s in once]


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    assert gaussian_cutout(torch.rand(0, 3, 5, 5))[0].shape == (0, 3, 5, 5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    images = torch.rand(3, 3, 9, 9)
    got, want = (op(images, generator=generator(0, "cpu")) for op in (gaussian_cutout, gaussian_cutout_ref))
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not launched
    assert torch.equal(gaussian_cutout(images, p=0.0)[0], images)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"images": torch.rand(3, 5, 5)}, r"images must have shape \(B, C, H, W\)", id="images-3d"),
        pytest.param(
            {"images": torch.zeros(2, 3, 5, 5, dtype=torch.uint8)}, "images must be float32", id="images-uint8"
        ),
        pytest.param({"images": torch.rand(2, 3, 5, 10)[..., ::2]}, "contiguous or channels_last", id="strided"),
        pytest.param({"fill": "grey"}, "fill must be gaussian or uniform, got 'grey'", id="fill"),
        pytest.param({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, r"boxes must have shape \(2, 4\)", id="boxes"),
        pytest.param({"noise": torch.rand(2, 3, 5, 4)}, "noise must have shape", id="noise"),
        pytest.param({"out": torch.rand(2, 3, 5, 5).half()}, "out must be float32", id="out"),
        pytest.param({"out": torch.rand(2, 5, 5, 3).permute(0, 3, 1, 2)}, "memory layout", id="out-layout"),
    ],
)
def test_clear_errors(change, message):
    with pytest.raises(ValueError, match=message):
        gaussian_cutout(**({"images": torch.rand(2, 3, 5, 5)} | change))
