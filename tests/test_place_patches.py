"""place_patches against its reference and a loop of slices; gradients to the patches against
autograd of the reference."""

import pytest
import torch

from kernels.place_patches import place_patches, place_patches_ref, positions
from tests.conftest import same

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.float16, torch.bfloat16)]
SHAPES = [  # image, patch, stride
    pytest.param((1, 1, 1, 1), (1, 1), 1, id="1x1"),
    pytest.param((2, 3, 7, 5), (3, 2), 2, id="odd-flush-edges"),
    pytest.param((2, 3, 6, 5), (6, 5), 1, id="patch-as-large-as-the-image"),
    pytest.param((1, 3, 11, 31), (4, 31), 3, id="block-1"),
    pytest.param((2, 1, 32, 32), (30, 31), 1, id="block"),
    pytest.param((1, 5, 5, 41), (5, 1), 19, id="block+1"),
]


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def loop(images, patches, places, size=None):
    B, P = len(images), places.shape[-2]
    out = images[:, None].repeat(1, P, 1, 1, 1)
    for b in range(B):
        for p, (top, left) in enumerate((places[b] if places.dim() == 3 else places).tolist()):
            if isinstance(patches, float):
                out[b, p, :, top : top + size[0], left : left + size[1]] = patches
            else:
                patch = patches[b % len(patches), p % patches.shape[1]]
                out[b, p, :, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, size, stride", SHAPES)
def test_equals_reference(shape, size, stride, dtype, layout, device):
    B, C, H, W = shape
    images = random(*shape).to(device, dtype).contiguous(memory_format=layout)
    places = positions(H, W, *size, stride, device)
    P = len(places)
    for patches in (random(B, P, C, *size, seed=1), random(1, 1, C, *size, seed=2)):
        patches = patches.to(device, dtype)
        want = place_patches_ref(images, patches, places)
        got = place_patches(images, patches, places)
        assert same(got, want) and torch.equal(want, loop(images, patches, places))
        assert got.shape == (B, P, C, H, W) and got.flatten(0, 1).is_contiguous(
            memory_format=layout
        )
    grey = place_patches(images, 0.5, places, size)
    assert torch.equal(grey, place_patches_ref(images, 0.5, places, size)) and torch.equal(
        grey, loop(images, 0.5, places, size)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "of", [(1, 1), (3, 1), (1, 4), (3, 4)], ids=("one", "per-image", "per-place", "per-both")
)
@pytest.mark.parametrize("per_sample", (False, True))
def test_gradient_to_the_patches(of, per_sample, layout, device):
    B, P, C, H, W, h, w = 3, 4, 3, 9, 8, 5, 6  # C * h * w = 90, a block and a half
    images = random(B, C, H, W).to(device).contiguous(memory_format=layout)
    generator = torch.Generator().manual_seed(3)
    places = torch.stack(
        [torch.randint(n + 1, (B, P), generator=generator) for n in (H - h, W - w)], -1
    ).to(device)
    places = places if per_sample else places[0]
    weight = random(B, P, C, H, W, seed=4).to(device)
    grads = []
    for op in (place_patches, place_patches_ref):
        patches = random(*of, C, h, w, seed=5).to(device).requires_grad_()
        out = op(images, patches, places)
        assert same(out.detach(), loop(images, patches.detach(), places))
        (out * weight).sum().backward()
        grads.append(patches.grad)
    assert grads[0].shape == (*of, C, h, w)
    terms = B * P // (of[0] * of[1])
    # two orders of adding up `terms` numbers below 1
    assert (grads[0] - grads[1]).abs().max() <= 2.0**-24 * terms * terms
    if terms == 1:
        assert torch.equal(*grads)


def test_positions_equal_an_enumerated_list():
    assert positions(64, 64, 20, 20, 5)[:, 1].unique().tolist() == [
        0,
        5,
        10,
        15,
        20,
        25,
        30,
        35,
        40,
        44,
    ]
    assert positions(64, 64, 10, 10, 6)[:, 0].unique().tolist() == [
        0,
        6,
        12,
        18,
        24,
        30,
        36,
        42,
        48,
        54,
    ]
    assert positions(3, 4, 2, 2, 2).tolist() == [[0, 0], [0, 2], [1, 0], [1, 2]]
    assert positions(5, 5, 5, 5, 3).tolist() == [[0, 0]] and positions(1, 1, 1, 1).tolist() == [
        [0, 0]
    ]
    assert len(positions(64, 64, 10, 10)) == 55 * 55
    with pytest.raises(ValueError, match="does not fit"):
        positions(4, 4, 5, 1)


def test_every_branch_is_reached(launched, device):
    places = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for layout in LAYOUTS:
        images = torch.rand(2, 3, 4, 4, device=device).contiguous(memory_format=layout)
        place_patches(images, 0.5, places, (2, 2))
        for of in ((1, 1), (2, 1), (1, 2), (2, 2)):
            place_patches(
                images, torch.rand(*of, 3, 2, 2, device=device, requires_grad=True), places
            ).sum().backward()
    forward = {c["CHANNELS_LAST"] for name, c in launched if name == "_kernel"}
    flags = ("SHARED_B", "SHARED_P", "CHANNELS_LAST")
    backward = {tuple(c[k] for k in flags) for name, c in launched if name != "_kernel"}
    assert len(forward) == 2 and len(backward) == 8


def test_the_reference_runs_outside_the_interpreter_and_for_nothing_to_do(launched, monkeypatch):
    images, places = torch.rand(2, 3, 4, 4), positions(4, 4, 2, 2)
    assert place_patches(images, 0.5, places[:0], (2, 2)).shape == (2, 0, 3, 4, 4)
    assert place_patches(images[:0], 0.5, places, (2, 2)).shape == (0, 9, 3, 4, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert (
        torch.equal(place_patches(images, 0.5, places, (2, 2)), loop(images, 0.5, places, (2, 2)))
        and not launched
    )


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"images": torch.rand(3, 4, 4)}, "images must have shape", id="images"),
        pytest.param(
            {"images": torch.rand(2, 3, 4, 4, requires_grad=True)},
            "must not require a gradient",
            id="grad",
        ),
        pytest.param(
            {"patches": torch.rand(3, 1, 3, 2, 2)}, "patches must have shape", id="patches"
        ),
        pytest.param(
            {"patches": torch.rand(1, 1, 3, 5, 2)},
            "a 5x2 patch does not fit a 4x4 image",
            id="size",
        ),
        pytest.param({"patches": 0.5}, "a grey level needs size", id="grey"),
        pytest.param(
            {"positions": torch.zeros(2, 2)}, "positions must be int32 or int64", id="float"
        ),
        pytest.param(
            {"positions": torch.zeros(3, 1, 2, dtype=torch.int64)},
            "positions must have shape",
            id="places",
        ),
        pytest.param({"positions": torch.tensor([[3, 0]])}, "inside the image", id="outside"),
        pytest.param({"positions": torch.tensor([[0, -1]])}, "inside the image", id="negative"),
    ],
)
def test_clear_errors(change, message):
    arguments = {
        "images": torch.rand(2, 3, 4, 4),
        "patches": torch.rand(1, 1, 3, 2, 2),
        "positions": torch.tensor([[0, 0]]),
    }
    with pytest.raises(ValueError, match=message):
        place_patches(**(arguments | change))
