"""Patch-local recomputation is the full pass: at every layer boundary, in attacks, on and off."""

import functools

import pytest
import torch
import torch.nn.functional as F

import attacks
import embed as e
from kernels.masked_step import masked_step_ref
from kernels.patch_local import PatchLocal, align, box_windows, local_attack, local_features

BOXES = {
    "centre": (27, 27, 10, 10),
    "corner": (0, 0, 10, 10),
    "far corner": (54, 54, 10, 10),
    "edge": (31, 0, 9, 11),
    "flush edge": (5, 50, 6, 14),
    "one pixel": (33, 32, 1, 1),
    "most of the image": (3, 2, 57, 61),
    "all of the image": (0, 0, 64, 64),
}
SWITCHES = [
    ((27, 27, 10, 10), 7),
    ((22, 22, 20, 20), 6),
    ((24, 16, 16, 32), 6),
    ((0, 0, 64, 64), 0),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return e.Embedding(1 / 16, 8, True).double().eval().requires_grad_(False)


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def compare(model, images, boxes, local):
    """Relative differences of features and input gradients from the full pass's, and the gradients'
    size."""
    h, w = boxes[0, 2:].tolist()
    patch = rand(len(images), 3, h, w, seed=1).to(images).requires_grad_()
    rows, cols = ((boxes[:, k, None] + torch.arange(n)) for k, n in ((0, h), (1, w)))
    each, channel = torch.arange(len(images))[:, None, None, None], torch.arange(3)[:, None, None]
    whole = images.index_put((each, channel, rows[:, None, :, None], cols[:, None, None, :]), patch)
    found = [
        (f, *torch.autograd.grad((f * rand(*f.shape, seed=2)).sum(), patch))
        for f in (local(patch), model(whole))
    ]
    gradient = float(found[1][1].abs().amin(0).max())
    pairs = [(a.detach(), b.detach()) for a, b in zip(*found)]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs], gradient


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("layers", range(19))
def test_features_and_gradients_at_every_switch_over(model, box, layers):
    images, boxes = rand(2, 3, 64, 64), torch.tensor([box] * 2)
    local = PatchLocal(model, images, boxes, layers)
    assert local.layers == layers
    differences, gradient = compare(model, images, boxes, local)
    assert max(differences) < 1e-10 and gradient > 0


@pytest.mark.parametrize("box, least", SWITCHES)
def test_float32_within_rounding_and_where_it_switches_by_itself(box, least):
    torch.manual_seed(1)
    model, images = e.Embedding(1 / 8), rand(4, 3, 64, 64).float()
    boxes = torch.tensor([box] * 4)
    local = PatchLocal(model, images, boxes)
    assert local.layers >= least and (least or local.layers == 0)
    assert max(compare(model, images, boxes, local)[0]) < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_places_and_sizes_of_each_sample(model):
    given = [[0, 0, 10, 10], [15, 20, 10, 10], [54, 54, 10, 10], [33, 7, 3, 12]]
    given = torch.tensor([*given, [20, 39, 10, 10], [53, 1, 11, 9]])
    images = rand(6, 3, 64, 64)
    local = PatchLocal(model, images, align(given, 64, 64))
    low, high = local.boxes[:, :2], local.boxes[:, :2] + local.boxes[:, 2:]
    assert (low <= given[:, :2]).all() and (high >= given[:, :2] + given[:, 2:]).all()
    assert (low >= 0).all() and (high <= 64).all()
    assert (local.boxes[:, 2:] == local.boxes[0, 2:]).all() and local.layers >= 6
    assert max(compare(model, images, local.boxes, local)[0]) < 1e-10
    same = torch.tensor([[15, 35, 10, 10], [15, 19, 10, 10]])
    assert torch.equal(align(same, 64, 64), same)


def test_one_patch_for_all(model):
    images, patch = rand(3, 3, 64, 64), rand(1, 3, 10, 12, seed=3)
    boxes = torch.tensor([[5, 9, 10, 12]] * 3)
    for layers in (0, 1, 6, 18):
        local = PatchLocal(model, images, boxes, layers)
        assert torch.allclose(local(patch), local(patch.repeat(3, 1, 1, 1)), atol=1e-12)


def test_boxes_that_do_not_go_together(model):
    images = rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="one size"):
        PatchLocal(model, images, torch.tensor([[0, 0, 4, 4], [0, 0, 4, 5]]))
    unlike = torch.tensor([[0, 0, 4, 4], [2, 0, 4, 4]])
    with pytest.raises(ValueError, match="alike modulo 4"):
        PatchLocal(model, images, unlike, 6)
    assert PatchLocal(model, images, unlike).layers == 4  # by itself: as far as it goes


# the inner attack


def test_inner_attack_on_windows_is_the_one_on_whole_images(model, monkeypatch):
    # in float64, where rounding turns no sign
    monkeypatch.setattr(e, "masked_step", masked_step_ref)
    ran, rng = [], torch.Generator().manual_seed(3)
    images, anchors = rand(24, 3, 64, 64), model(rand(24, 3, 64, 64, seed=1))
    alpha = torch.tensor([0.1, -0.1], dtype=torch.float64).repeat(12)
    boxes = e.draw_boxes(24, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng)
    edges = [[0, 0, 5, 9], [57, 0, 7, 7], [0, 60, 12, 4], [61, 61, 3, 3]]
    boxes[:6] = torch.tensor([*edges, [0, 0, 64, 64], [9, 9, 0, 0]])
    call = PatchLocal.__call__
    watched = lambda self, x: ran.append(x.shape) or call(self, x)
    monkeypatch.setattr(PatchLocal, "__call__", watched)
    attack = functools.partial(e.inner_attack, steps=3)
    for several in (boxes, boxes[:1].repeat(24, 1), boxes[3:4]):
        n, ran[:] = len(several), []
        parts = (images[:n], anchors[:n], alpha[:n], several)
        near, whole = local_attack(attack, model, *parts), attack(model, *parts)
        assert ran and ran[0][2] < 64
        assert float((near - whole).abs().max()) < 1e-9 and not torch.equal(whole, images[:n])


def test_windows_lie_on_the_grid_around_their_boxes():
    rng = torch.Generator().manual_seed(3)
    boxes = e.draw_boxes(24, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng)
    boxes[:2] = torch.tensor([[61, 61, 3, 3], [9, 9, 0, 0]])
    groups = list(box_windows(boxes, 64, 64))
    assert len(groups) == 2
    for rows, window in groups:
        low, high = window[:, :2], window[:, :2] + window[:, 2:]
        assert bool((low <= boxes[rows, :2]).all()) and bool((low >= 0).all())
        assert bool((high >= boxes[rows, :2] + boxes[rows, 2:]).all()) and bool((high <= 64).all())
        assert bool((low % 4 == 0).all()) and len(window[:, 2:].unique(dim=0)) == 1
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(24))


# attacks


def seeded():
    return torch.Generator().manual_seed(0)


def squares(n):
    return torch.stack(
        [attacks.square_mask(*place) for place in [(15, 35), (20, 30), (35, 15)][:n]]
    )


MASKS = {
    "eyeglasses": attacks.eyeglasses_mask(),
    "squares": squares(3),
    "corner": attacks.square_mask(0, 54),
    "square": attacks.square_mask(20, 20),
}


@pytest.fixture
def on_and_off(monkeypatch):
    """What a call gives with windows, and with whole images."""

    def both(call):
        on = call()
        with monkeypatch.context() as patch:
            patch.setattr(attacks, "local_features", None)
            return on, call()

    return both


@pytest.mark.parametrize("mirroring", [True, False], ids=["mirrored", "plain"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attack_is_the_same_on_and_off(model, on_and_off, mask, mirroring):
    images, anchor, seen = rand(3, 3, 64, 64), model(rand(1, 3, 64, 64, seed=5))[0], []
    effort = attacks.Effort(iterations=4, lr=0.1, restarts=2, chunk=4)
    judge = attacks.Mirrored(model) if mirroring else model
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    given = (judge, images, anchor, mask, effort)
    on, off = on_and_off(lambda: attacks.tanh_attack(*given, seeded()))
    handle.remove()
    per_pass = 3 if mirroring else 2  # chunks of the six rows
    scoring = 2 if mirroring else 1  # the best of one restart, and of two
    # whole images only where it is switched off, to score, and thrice in the check
    assert len(seen) == per_pass * 5 + 2 * (2 * scoring + 3)
    assert torch.allclose(on.images, off.images, rtol=0, atol=1e-9)
    assert torch.allclose(on.distance, off.distance, atol=1e-9)
    assert not torch.allclose(on.images, images, atol=1e-3) and on.gradients == off.gradients


@pytest.mark.parametrize("height, width", [(32, 32), (112, 96), (150, 150), (33, 47)])
def test_attack_at_the_far_corner_of_another_size_is_the_same_on_and_off(
    model, on_and_off, monkeypatch, height, width
):
    """Maps with an odd number of rows, of which a max-pool drops the last."""
    whole = model.head
    monkeypatch.setattr(model, "head", lambda x: whole(F.adaptive_avg_pool2d(x, 2)))
    images, anchor = rand(2, 3, height, width), model(rand(1, 3, height, width, seed=5))[0]
    h, w = height * 10 // 64, width * 10 // 64
    mask = attacks.square_mask(height - h, width - w, None, height, width)
    pixels = attacks.mask_pixels(mask, images)
    assert local_features(model, images, pixels) is not None  # it is tried
    given = (model, images, anchor, mask, attacks.Effort(3, 0.1, 1))
    on, off = on_and_off(lambda: attacks.tanh_attack(*given, seeded()))
    assert torch.allclose(on.images, off.images, rtol=0, atol=1e-9)
    assert torch.allclose(on.distance, off.distance, atol=1e-9)
    assert (on.distance < attacks.distances(model, images, anchor)).all()


def test_square_and_universal_patch_are_the_same_on_and_off(model, on_and_off):
    images, anchor = rand(2, 3, 64, 64), model(rand(1, 3, 64, 64, seed=5))[0]
    places = [(15, 15), (20, 35), (35, 25)]
    effort, search = attacks.Effort(2, 0.1, 1), attacks.Effort(2, 0.1)
    given = (model, images, anchor)
    on, off = on_and_off(lambda: attacks.square_attack(*given, places, effort, search, seeded()))
    assert torch.equal(on.extra["row"], off.extra["row"])
    assert torch.allclose(on.images, off.images, atol=1e-9)
    mask, effort = attacks.eye_patch_mask(), attacks.Effort(3, 0.1, chunk=2)
    on, off = on_and_off(lambda: attacks.universal_patch(*given, mask, effort, seeded())[0])
    assert torch.allclose(on, off, atol=1e-9)


def test_whole_images_and_transforms_fall_back(model):
    images, anchor = rand(1, 3, 64, 64), torch.zeros(8, dtype=torch.double)
    pixels = torch.arange(4096)[None]
    assert local_features(model, images, pixels, True) is None
    assert local_features(lambda x: x.flatten(1), images, pixels[:, :5], True) is None
    same = torch.tensor([[[0.0, 0, 1, 0, 1]]], dtype=torch.double)
    effort = attacks.Effort(1, restarts=1, eot=attacks.Eot(same, same[0]))
    mask = attacks.square_mask(20, 20)
    result = attacks.tanh_attack(model, images, anchor, mask, effort, seeded())
    assert result.images.shape == images.shape
