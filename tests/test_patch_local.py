"""Patch-local recomputation is the full pass: at every layer boundary, in attacks, on and off."""

import pytest
import torch
import torch.nn.functional as F

import attacks
import embed as e
from kernels.masked_step import masked_step_ref
from kernels.patch_local import (
    PatchLocal,
    align,
    box_windows,
    local_features,
    local_views,
    local_views_ref,
)

BOXES = {
    "centre": (27, 27, 10, 10),
    "corner": (0, 0, 10, 10),
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
def test_features_and_gradients_at_every_switch_over(model, box):
    images, boxes = rand(2, 3, 64, 64), torch.tensor([box] * 2)
    for layers in range(19):
        local = PatchLocal(model, images, boxes, layers)
        assert local.layers == layers
        differences, gradient = compare(model, images, boxes, local)
        assert max(differences) < 1e-10 and gradient > 0, layers


@pytest.mark.parametrize(
    "box, least", [((27, 27, 10, 10), 7), ((24, 16, 16, 32), 6), ((0, 0, 64, 64), 0)]
)
def test_float32_within_rounding_and_where_it_switches_by_itself(box, least):
    torch.manual_seed(1)
    model, images = e.Embedding(1 / 8), rand(4, 3, 64, 64).float()
    boxes = torch.tensor([box] * 4)
    local = PatchLocal(model, images, boxes)
    assert local.layers >= least and (least or local.layers == 0)
    assert max(compare(model, images, boxes, local)[0]) < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_places_and_sizes_of_each_sample(model):
    boxes = [[0, 0, 10, 10], [15, 20, 10, 10], [54, 54, 10, 10], [33, 7, 3, 12]]
    boxes = torch.tensor([*boxes, [20, 39, 10, 10], [53, 1, 11, 9]])
    images = rand(6, 3, 64, 64)
    local = PatchLocal(model, images, align(boxes, 64, 64))
    low, high = local.boxes[:, :2], local.boxes[:, :2] + local.boxes[:, 2:]
    assert (low <= boxes[:, :2]).all() and (high >= boxes[:, :2] + boxes[:, 2:]).all()
    assert (low >= 0).all() and (high <= 64).all()
    assert (local.boxes[:, 2:] == local.boxes[0, 2:]).all() and local.layers >= 6
    assert max(compare(model, images, local.boxes, local)[0]) < 1e-10
    alike = torch.tensor([[15, 35, 10, 10], [15, 19, 10, 10]])
    assert torch.equal(align(alike, 64, 64), alike)


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
    shapes, rng = [], torch.Generator().manual_seed(3)
    images, anchors = rand(24, 3, 64, 64), model(rand(24, 3, 64, 64, seed=1))
    alpha = torch.tensor([0.1, -0.1], dtype=torch.float64).repeat(12)
    boxes = e.draw_boxes(24, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng)
    edges = [[0, 0, 5, 9], [57, 0, 7, 7], [0, 60, 12, 4], [61, 61, 3, 3]]
    boxes[:6] = torch.tensor([*edges, [0, 0, 64, 64], [9, 9, 0, 0]])
    call = PatchLocal.__call__
    watched = lambda self, x: shapes.append(x.shape) or call(self, x)
    monkeypatch.setattr(PatchLocal, "__call__", watched)
    for some in (boxes, boxes[:1].repeat(24, 1), boxes[3:4]):
        n, shapes[:] = len(some), []
        inputs = (model, images[:n], anchors[:n], alpha[:n], some, 3)
        near = e.inner_attack(*inputs)
        assert shapes and shapes[0][2] < 64
        with monkeypatch.context() as patch:
            patch.setattr(e, "local_views", local_views_ref)
            whole = e.inner_attack(*inputs)
        assert float((near - whole).abs().max()) < 1e-9 and not torch.equal(whole, images[:n])


def test_windows_lie_on_the_grid_around_their_boxes(model):
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
    images = rand(24, 3, 64, 64)
    for (rows, place, inside, view), (_, window) in zip(local_views(model, images, boxes), groups):
        top, left, h, w = window[3].tolist()
        image = images[rows[3]]
        assert torch.equal(images[place][3], image[:, top : top + h, left : left + w])
        assert inside[3].tolist() == (boxes[rows[3]] - torch.tensor([top, left, 0, 0])).tolist()
        assert torch.allclose(view(images[place]), model(images[rows]))


# attacks


def on_and_off(monkeypatch, *inputs):
    """Eq. (7)'s attack with windows, which must be what it is with whole images."""
    on = attacks.tanh_attack(*inputs)
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "local_features", None)
        off = attacks.tanh_attack(*inputs)
    assert torch.allclose(on.images, off.images, rtol=0, atol=1e-9)
    assert torch.allclose(on.distance, off.distance, atol=1e-9)
    assert not torch.allclose(on.images, inputs[1], atol=1e-3)


@pytest.mark.parametrize("mirroring", [True, False], ids=["mirrored", "plain"])
def test_attack_is_the_same_on_and_off(model, monkeypatch, mirroring):
    images, anchor = rand(3, 3, 64, 64), model(rand(1, 3, 64, 64, seed=5))[0]
    judge, effort = attacks.Mirrored(model) if mirroring else model, attacks.Effort(4, 0.1, 2)
    places = [attacks.square_mask(*place) for place in ((15, 35), (20, 30), (0, 54))]
    for mask in (attacks.eyeglasses_mask(), torch.stack(places)):
        assert local_features(judge, images, attacks.mask_pixels(mask, images)) is not None
        on_and_off(monkeypatch, judge, images, anchor, mask, effort)


@pytest.mark.parametrize("height, width", [(112, 96), (150, 150), (33, 47)])
def test_attack_at_the_far_corner_of_another_size_is_the_same_on_and_off(
    model, monkeypatch, height, width
):
    """Maps with an odd number of rows, of which a max-pool drops the last."""
    whole = model.head
    monkeypatch.setattr(model, "head", lambda x: whole(F.adaptive_avg_pool2d(x, 2)))
    images, anchor = rand(2, 3, height, width), model(rand(1, 3, height, width, seed=5))[0]
    h, w = attacks.scale(10, height), attacks.scale(10, width)
    mask = attacks.square_mask(height - h, width - w, height, width)
    pixels = attacks.mask_pixels(mask, images)
    assert local_features(model, images, pixels) is not None  # it is tried
    effort = attacks.Effort(3, 0.1, 1)
    on_and_off(monkeypatch, model, images, anchor, mask, effort)


def test_whole_images_and_other_models_fall_back(model):
    images, pixels = rand(1, 3, 64, 64), torch.arange(4096)[None]
    assert local_features(e.Mirrored(model), images, pixels) is None
    assert local_features(e.Mirrored(lambda x: x.flatten(1)), images, pixels[:, :5]) is None
    boxes = torch.tensor([[0, 0, 64, 64]])
    for embed in (model, lambda x: x.flatten(1)):
        ((rows, place, inside, view),) = local_views(embed, images, boxes)
        assert torch.equal(images[place], images[rows]) and torch.equal(images[rows], images)
        assert torch.equal(inside, boxes) and view is embed


# what is more than trunk and head


class Normalised(e.Embedding):
    """Its forward does more than its layers."""

    def forward(self, images):
        return F.normalize(super().forward(images), dim=1)


def own_forward(model):
    plain = model.forward
    model.forward = lambda images: F.normalize(plain(images), dim=1)


def dilated(model):
    model.trunk[2].dilation = model.trunk[2].padding = (2, 2)


def smooth(model):
    model.trunk[1] = torch.nn.Softplus()


MORE = {
    "own forward": own_forward,
    "dilated": dilated,
    "another activation": smooth,
    "hook": lambda m: m.register_forward_hook(lambda m, x, y: F.normalize(y, dim=1)),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] ** 3,)),
    "hook of a layer": lambda m: m.trunk[0].register_forward_hook(lambda m, x, y: y.sin()),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, g, _: (-g[0],)),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda m, g: (-g[0],)),
}


@pytest.mark.parametrize("more", ["subclass", "hooked mirror", *MORE])
@pytest.mark.parametrize("mirroring", [True, False], ids=["mirrored", "plain"])
def test_a_model_that_does_more_is_attacked_as_through_a_lambda(more, mirroring, monkeypatch):
    """The attack of App. C and training's inner attack: on whole images, whatever hides in F."""
    monkeypatch.setattr(e, "masked_step", masked_step_ref)  # takes float64
    torch.manual_seed(0)
    model = (Normalised if more == "subclass" else e.Embedding)(1 / 16, 8, True).double().eval()
    MORE.get(more, lambda model: None)(model)
    views = e.Mirrored(model) if mirroring or more == "hooked mirror" else model
    if more == "hooked mirror":
        views.register_forward_hook(lambda m, x, y: y**3)
    hidden = lambda x: views(x)
    images, anchor = rand(3, 3, 64, 64), model(rand(1, 3, 64, 64, seed=5))[0].detach()
    inputs = images, anchor, attacks.eyeglasses_mask(), attacks.Effort(3, 0.1, 1)
    one, two = (attacks.tanh_attack(f, *inputs) for f in (views, hidden))
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, images)
    boxes, alpha = torch.tensor([[20, 20, 10, 10]] * 3), torch.full((3,), 0.1).double()
    inputs = images, anchor.expand(3, -1), alpha, boxes, 2
    assert torch.equal(e.inner_attack(views, *inputs), e.inner_attack(hidden, *inputs))
