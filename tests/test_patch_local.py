"""Patch-local recomputation against the full pass: at every layer boundary, in attacks, switched on and off."""

import pytest
import torch

import attacks
import embed as e

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


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return e.Embedding(1 / 16, 8, True).double().eval().requires_grad_(False)


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def compare(model, images, boxes, local):
    """Relative differences of features and input gradients from the full pass's, and the gradients' size."""
    h, w = boxes[0, 2:].tolist()
    patch = rand(len(images), 3, h, w, seed=1).to(images).requires_grad_()
    rows, cols = ((boxes[:, k, None] + torch.arange(n)) for k, n in ((0, h), (1, w)))
    each, channel = torch.arange(len(images))[:, None, None, None], torch.arange(3)[:, None, None]
    whole = images.index_put((each, channel, rows[:, None, :, None], cols[:, None, None, :]), patch)
    found = [(f, *torch.autograd.grad((f * rand(*f.shape, seed=2)).sum(), patch)) for f in (local(patch), model(whole))]
    return [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(*found)], float(found[1][1].abs().amin(0).max())


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("layers", range(19))
def test_features_and_gradients_at_every_switch_over(model, box, layers):
    images, boxes = rand(2, 3, 64, 64), torch.tensor([box] * 2)
    local = e.PatchLocal(model, images, boxes, layers)
    assert local.layers == layers
    differences, gradient = compare(model, images, boxes, local)
    assert max(differences) < 1e-10 and gradient > 0


@pytest.mark.parametrize("box, least", [((27, 27, 10, 10), 7), ((22, 22, 20, 20), 6), ((24, 16, 16, 32), 6), ((0, 0, 64, 64), 0)])
def test_float32_within_rounding_and_where_it_switches_by_itself(box, least):
    torch.manual_seed(1)
    model, images, boxes = e.Embedding(1 / 8), rand(4, 3, 64, 64).float(), torch.tensor([box] * 4)
    local = e.PatchLocal(model, images, boxes)
    assert local.layers >= least and (least or local.layers == 0)
    assert max(compare(model, images, boxes, local)[0]) < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_places_and_sizes_of_each_sample(model):
    given = torch.tensor([[0, 0, 10, 10], [15, 20, 10, 10], [54, 54, 10, 10], [33, 7, 3, 12], [20, 39, 10, 10], [53, 1, 11, 9]])
    images = rand(6, 3, 64, 64)
    local = model.patch_local(images, given)
    low, high = local.boxes[:, :2], local.boxes[:, :2] + local.boxes[:, 2:]
    assert (low <= given[:, :2]).all() and (high >= given[:, :2] + given[:, 2:]).all() and (low >= 0).all() and (high <= 64).all()
    assert (local.boxes[:, 2:] == local.boxes[0, 2:]).all() and local.layers >= 6
    assert max(compare(model, images, local.boxes, local)[0]) < 1e-10
    same = torch.tensor([[15, 35, 10, 10], [15, 19, 10, 10]])
    assert torch.equal(e.align(same, 64, 64), same)


def test_one_patch_for_all(model):
    images, boxes, patch = rand(3, 3, 64, 64), torch.tensor([[5, 9, 10, 12]] * 3), rand(1, 3, 10, 12, seed=3)
    for layers in (0, 1, 6, 18):
        local = e.PatchLocal(model, images, boxes, layers)
        assert torch.allclose(local(patch), local(patch.repeat(3, 1, 1, 1)), atol=1e-12)


def test_boxes_that_do_not_go_together(model):
    images = rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="one size"):
        e.PatchLocal(model, images, torch.tensor([[0, 0, 4, 4], [0, 0, 4, 5]]))
    unlike = torch.tensor([[0, 0, 4, 4], [2, 0, 4, 4]])
    with pytest.raises(ValueError, match="alike modulo 4"):
        e.PatchLocal(model, images, unlike, 6)
    assert e.PatchLocal(model, images, unlike).layers == 4  # by itself: as far as it goes


# attacks
def squares(n):
    return torch.stack([attacks.square_mask(*place) for place in [(15, 35), (20, 30), (35, 15)][:n]])


@pytest.mark.parametrize("mirroring", [True, False], ids=["mirrored", "plain"])
@pytest.mark.parametrize("mask", [attacks.eyeglasses_mask(), squares(3), attacks.square_mask(0, 54), attacks.square_mask(20, 20)],
                         ids=["eyeglasses", "squares", "corner", "square"])  # fmt: skip
def test_attack_is_the_same_on_and_off(model, mask, mirroring):
    images, anchor, seen = rand(3, 3, 64, 64), model(rand(1, 3, 64, 64, seed=5))[0], []
    settings = {"mirroring": mirroring, "iterations": 4, "lr": 0.1, "restarts": 2, "chunk": 4}
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    on, off = (attacks.tanh_attack(model, images, anchor, mask, local=local, **settings) for local in (True, False))
    handle.remove()
    per_pass = 3 if mirroring else 2  # chunks of the six rows
    scoring = 2 if mirroring else 1  # the best of one restart, and of two
    assert len(seen) == per_pass * 5 + 2 * 2 * scoring  # whole images only with local=False, and to score
    assert torch.allclose(on.images, off.images, rtol=0, atol=1e-9) and torch.allclose(on.distance, off.distance, atol=1e-9)
    assert not torch.allclose(on.images, images, atol=1e-3) and on.gradients == off.gradients


def test_square_and_universal_patch_are_the_same_on_and_off(model):
    images, anchor = rand(2, 3, 64, 64), model(rand(1, 3, 64, 64, seed=5))[0]
    places = [(15, 15), (20, 35), (35, 25)]
    on, off = (
        attacks.square_attack(model, images, anchor, positions=places, search_iterations=2, iterations=2, lr=0.1, restarts=1, local=local)
        for local in (True, False)
    )
    assert torch.equal(on.extra["row"], off.extra["row"]) and torch.allclose(on.images, off.images, atol=1e-9)
    mask = attacks.eye_patch_mask()
    on, off = (attacks.universal_patch(model, images, anchor, mask, iterations=3, lr=0.1, chunk=2, local=local)[0] for local in (True, False))
    assert torch.allclose(on, off, atol=1e-9)


def test_whole_images_and_transforms_fall_back(model):
    images, anchor = rand(1, 3, 64, 64), torch.zeros(8, dtype=torch.double)
    pixels = torch.arange(4096)[None]
    assert attacks.local_features(model, images, pixels, True) is None
    assert attacks.local_features(lambda x: x.flatten(1), images, pixels[:, :5], True) is None
    same = torch.tensor([[[0.0, 0, 1, 0, 1]]], dtype=torch.double)
    result = attacks.tanh_attack(model, images, anchor, attacks.square_mask(20, 20), iterations=1, restarts=1, transforms=same, validation=same[0])
    assert result.images.shape == images.shape
