"""place_patches and painted against a loop of slices."""

import pytest
import torch

import kernels.place_patches as module
from kernels.place_patches import painted, place_patches, place_patches_ref, positions
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


def anywhere(B, P, lowest, rightmost, device):
    """Places (B, P, 2), different for each image."""
    generator = torch.Generator().manual_seed(3)
    both = [torch.randint(n + 1, (B, P), generator=generator) for n in (lowest, rightmost)]
    return torch.stack(both, -1).to(device)


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
        assert got.shape == (B, P, C, H, W)
        assert all(each.is_contiguous(memory_format=layout) for each in got.unbind(1))
    grey = place_patches(images, 0.5, places, size)
    assert torch.equal(grey, place_patches_ref(images, 0.5, places, size)) and torch.equal(
        grey, loop(images, 0.5, places, size)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "of", [(1, 1), (3, 1), (1, 4), (3, 4)], ids=("one", "per-image", "per-place", "per-both")
)
@pytest.mark.parametrize("per_sample", (False, True))
def test_who_shares_a_patch_and_a_place(of, per_sample, layout, device):
    B, P, C, H, W, h, w = 3, 4, 3, 9, 8, 5, 6
    images = random(B, C, H, W).to(device).contiguous(memory_format=layout)
    places = anywhere(B, P, H - h, W - w, device)
    places = places if per_sample else places[0]
    patches = random(*of, C, h, w, seed=5).to(device)
    want = loop(images, patches, places)
    for op in (place_patches, place_patches_ref):
        assert torch.equal(op(images, patches, places), want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", (True, False))
def test_painted_is_place_patches_one_place_after_the_other(
    kernel, dtype, layout, device, monkeypatch, launched
):
    monkeypatch.setattr(module, "runs_triton", lambda x: kernel or x.is_cuda)
    images = random(3, 3, 9, 8).to(device, dtype).contiguous(memory_format=layout)
    before, places = images.clone(), anywhere(3, 4, 4, 2, device)
    want, many = loop(images, 0.25, places, (5, 6)), 0
    for k, found in enumerate(painted(images, 0.25, places, (5, 6))):
        assert same(found, want[:, k]) and found.is_contiguous(memory_format=layout)
        many = k + 1
    assert many == 4 and torch.equal(images, before)
    assert len(launched) == (kernel and (dtype != torch.float32 or device == "cuda"))


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
    assert [c["CHANNELS_LAST"] for _, c in launched] == [False, True]


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
