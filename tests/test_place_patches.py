"""place_patches and painted against a loop of slices."""

import pytest
import torch

import kernels.place_patches as module
from kernels.place_patches import painted, place_patches, place_patches_ref, positions
from tests.cases import LAYOUTS, dtypes, layouts, random, refused, seeded
from tests.conftest import same

CASES = {  # image, patch, stride
    "1x1": ((1, 1, 1, 1), (1, 1), 1),
    "odd-flush-edges": ((2, 3, 7, 5), (3, 2), 2),
    "patch-as-large-as-the-image": ((2, 3, 6, 5), (6, 5), 1),
    "block-1": ((1, 3, 11, 31), (4, 31), 3),
    "block": ((2, 1, 32, 32), (30, 31), 1),
    "block+1": ((1, 5, 5, 41), (5, 1), 19),
}


def anywhere(B, P, lowest, rightmost, device):
    """Places (B, P, 2), different for each image."""
    rng = seeded(3)
    both = [torch.randint(n + 1, (B, P), generator=rng) for n in (lowest, rightmost)]
    return torch.stack(both, -1).to(device)


def loop(images, patches, places, size=None):
    B, P = len(images), places.shape[-2]
    out = images[:, None].repeat(1, P, 1, 1, 1)
    for b in range(B):
        for p, (top, left) in enumerate((places[b] if places.dim() == 3 else places).tolist()):
            patch = patches
            if size is None:
                patch = patches[b % len(patches), p % patches.shape[1]]
            h, w = size or patch.shape[1:]
            out[b, p, :, top : top + h, left : left + w] = patch
    return out


@layouts
@dtypes
@pytest.mark.parametrize("shape, size, stride", CASES.values(), ids=CASES)
def test_equals_reference(shape, size, stride, dtype, layout, device):
    B, C, H, W = shape
    images = random(*shape, device=device).to(dtype).contiguous(memory_format=layout)
    places = positions(H, W, *size, stride, device)
    P = len(places)
    for of in ((B, P), (1, 1)):
        patches = random(*of, C, *size, seed=1, device=device).to(dtype)
        want = place_patches_ref(images, patches, places)
        got = place_patches(images, patches, places)
        assert same(got, want) and torch.equal(want, loop(images, patches, places))
        assert got.shape == (B, P, C, H, W)
        assert all(each.is_contiguous(memory_format=layout) for each in got.unbind(1))
    want = loop(images, 0.5, places, size)
    assert torch.equal(place_patches(images, 0.5, places, size), want)
    assert torch.equal(place_patches_ref(images, 0.5, places, size), want)


@layouts
@pytest.mark.parametrize("of", [(1, 1), (3, 1), (1, 4), (3, 4)], ids=str)
def test_who_shares_a_patch_and_a_place(of, layout, device):
    B, P, C, H, W, h, w = 3, 4, 3, 9, 8, 5, 6
    images = random(B, C, H, W, device=device).contiguous(memory_format=layout)
    patches = random(*of, C, h, w, seed=5, device=device)
    each = anywhere(B, P, H - h, W - w, device)
    for places in (each, each[0]):
        want = loop(images, patches, places)
        for op in (place_patches, place_patches_ref):
            assert torch.equal(op(images, patches, places), want)


@layouts
@dtypes
@pytest.mark.parametrize("kernel", (True, False))
def test_painted_is_place_patches_one_place_after_the_other(
    kernel, dtype, layout, device, monkeypatch, launched
):
    monkeypatch.setattr(module, "runs_triton", lambda x: kernel or x.is_cuda)
    images = random(3, 3, 9, 8, device=device).to(dtype).contiguous(memory_format=layout)
    before, places = images.clone(), anywhere(3, 4, 4, 2, device)
    want, many = loop(images, 0.25, places, (5, 6)), 0
    for k, grey in enumerate(painted(images, 0.25, places, (5, 6))):
        assert same(grey, want[:, k]) and grey.is_contiguous(memory_format=layout)
        many = k + 1
    assert many == 4 and torch.equal(images, before)
    assert len(launched) == (kernel and (dtype != torch.float32 or device == "cuda"))


def test_positions_equal_an_enumerated_list():
    lefts = [0, 5, 10, 15, 20, 25, 30, 35, 40, 44]
    assert positions(64, 64, 20, 20, 5)[:, 1].unique().tolist() == lefts
    assert positions(64, 64, 10, 10, 6)[:, 0].unique().tolist() == [*range(0, 55, 6)]
    assert positions(3, 4, 2, 2, 2).tolist() == [[0, 0], [0, 2], [1, 0], [1, 2]]
    for side in (1, 5):
        assert positions(side, side, side, side, 3).tolist() == [[0, 0]]
    assert len(positions(64, 64, 10, 10)) == 55 * 55
    with pytest.raises(ValueError, match="does not fit"):
        positions(4, 4, 5, 1)


def test_every_branch_is_reached(launched, device, monkeypatch):
    places = positions(4, 4, 2, 2)
    for layout in LAYOUTS:
        images = random(2, 3, 4, 4, device=device).contiguous(memory_format=layout)
        place_patches(images, 0.5, places.int().to(device), (2, 2))
    assert [c["CHANNELS_LAST"] for _, c in launched] == [False, True]
    launched.clear()
    images = random(2, 3, 4, 4)
    assert place_patches(images, 0.5, places[:0], (2, 2)).shape == (2, 0, 3, 4, 4)
    assert place_patches(images[:0], 0.5, places, (2, 2)).shape == (0, 9, 3, 4, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    want = loop(images, 0.5, places, (2, 2))
    assert torch.equal(place_patches(images, 0.5, places, (2, 2)), want) and not launched


def test_clear_errors():
    arguments = {
        "images": torch.rand(2, 3, 4, 4),
        "patches": torch.rand(1, 1, 3, 2, 2),
        "positions": torch.tensor([[0, 0]]),
    }
    changes = {
        "images must have shape": {"images": torch.rand(3, 4, 4)},
        "patches must have shape": {"patches": torch.rand(3, 1, 3, 2, 2)},
        "a 5x2 patch does not fit a 4x4 image": {"patches": torch.rand(1, 1, 3, 5, 2)},
        "a grey level needs size": {"patches": 0.5},
        "positions must be int32 or int64": {"positions": torch.zeros(2, 2)},
        "positions must have shape": {"positions": torch.zeros(3, 1, 2, dtype=torch.int64)},
        "inside the image": {"positions": torch.tensor([[3, 0]])},
        "keep the patch inside": {"positions": torch.tensor([[0, -1]])},
    }
    refused(place_patches, arguments, changes)
