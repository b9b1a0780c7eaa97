"""embed.py: the equations, sampling, mining and the inner attacks by hand-made values; the command.

Most values are worked out on images of one colour each, which mirroring and shifts leave as they
are: what is erased, and of which image, can be read off the pixels. F is linear there.
"""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import embed as e
import generator as g
import metrics
from data import run
from tests.test_generator import TINY as TINY_GENERATOR

METHODS = ("ours", "transfer", "mixed", "no-at", "weak-at", "doa")
FLAGS = (
    "--synthetic-persons 14 --synthetic-images 10 --validation-persons 3 --target-persons 3 "
    "--width 0.03125 --dim 16 --batch 6 --steps 6 --validate-every 2 --attack-steps 2 "
    "--no-evaluation"
).split()
WEAK = ["--method", "weak-at", "--attack-steps", "1"]  # the quickest, without a generator
SIDE = 16  # pixels


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(method="ours", **more):
    sizes = {"width": 1 / 32, "dim": 16, "standardise": True, "batch": 6, "doa_size": 6}
    attack = {"doa_stride": 3, "candidates": 4, "attack_steps": 3, "attack_alpha": 32.0}
    return e.Config(**{"preset": "demo", "method": method, **sizes, **attack, **more})


class Linear:
    """F(x) = x W / 8 of images with this many values."""

    def __init__(self, values=3 * SIDE * SIDE, dim=5):
        self.weight = torch.randn(values, dim, generator=rng(3)) / 8

    def __call__(self, images):
        return images.flatten(1) @ self.weight


def colours(persons=5, each=4):
    """A sampler of images of one colour each."""
    pixels = torch.randint(0, 256, (persons * each, 3, 1, 1), generator=rng(1), dtype=torch.uint8)
    person = torch.arange(persons).repeat_interleave(each)
    return e.Sampler(pixels.repeat(1, 1, SIDE, SIDE), person)


def faces(persons=5, each=4):
    """Images (N, 3, 64, 64) of persons that differ, and whose they are."""
    base = torch.rand(persons, 1, 3, 8, 8, generator=rng()).repeat(1, each, 1, 1, 1) * 0.8
    base = base + 0.2 * torch.rand(persons, each, 3, 8, 8, generator=rng(1))
    images = F.interpolate(base.flatten(0, 1), 64, mode="bilinear")
    return (images * 255).to(torch.uint8), torch.arange(persons).repeat_interleave(each)


def fake(identity, content):
    """G: images of which the first row shows the identity, the others the content."""
    images = (content / 100).view(-1, 1, 1, 1).repeat(1, 3, SIDE, SIDE)
    images[:, :, 0] = (identity / 50).view(-1, 1, 1)
    return images


def quadruplets(config, embed, sampler, seed=0):
    """The batch of a method, and what its sampler draws with the same seed."""
    if config.generated and config.method != "mixed":
        drawn = sampler.draw(config.batch, config.mine, rng(seed))
        return e.generated_quadruplets(config, embed, sampler, fake, rng(seed)), drawn
    if config.method == "mixed":
        return e.mixed_quadruplets(config, embed, sampler, fake, rng(seed)), None
    drawn = sampler.draw(config.batch, config.mine, rng(seed), same_person=True)
    return e.real_quadruplets(config, embed, sampler, rng(seed)), drawn


# equations


def test_a_distance_is_the_mean_over_the_views():
    features, anchors = torch.randn(4, 3, 5, generator=rng()), torch.randn(4, 5, generator=rng(1))
    by_hand = sum(((features[:, v] - anchors) ** 2).sum(1) for v in range(3)) / 3
    torch.testing.assert_close(e.squared_distance(features, anchors), by_hand)
    one = ((features[:, 0] - anchors) ** 2).sum(1)
    torch.testing.assert_close(e.squared_distance(features[:, 0], anchors), one)
    to_one = ((features - anchors[2]) ** 2).sum(2).mean(1)
    torch.testing.assert_close(e.squared_distance(features, anchors[2]), to_one)


def test_mirrored_has_the_views_of_both_images():
    images, embed = torch.rand(3, 3, SIDE, SIDE), Linear()
    plain, mirror = embed(images), embed(images.flip(3))
    found = e.Mirrored(embed)(images)
    assert found.shape == (3, 2, 5)
    torch.testing.assert_close(found, torch.stack([plain, mirror], 1))
    twice = e.Mirrored(lambda x: torch.stack([embed(x), 2 * embed(x)], 1))(images)
    wanted = torch.stack([plain, 2 * plain, mirror, 2 * mirror], 1)
    torch.testing.assert_close(twice, wanted)


def test_eq2_and_the_hinge_of_the_authors_code():
    fx, fy, ft, fu = torch.randn(4, 7, 3, generator=rng())
    plus, minus = ((fx - fy) ** 2).sum(1), ((ft - fu) ** 2).sum(1)
    squared, distance = (10 - minus).clamp(min=0), (10 - minus.sqrt()).clamp(min=0) ** 2
    found = e.two_pair_loss(fx, fy, ft, fu, 10.0, "squared")
    torch.testing.assert_close(found, (plus + squared).mean())
    torch.testing.assert_close(e.two_pair_loss(fx, fy, ft, fu, 10.0), (plus + distance).mean())
    far = fu + 100
    for hinge in ("distance", "squared"):
        assert e.two_pair_loss(fx, fx, far, fu, 10.0, hinge) == 0
    assert (e.Config().hinge, e.Config().margin) == ("distance", 10)


def test_embedding_is_vgg16_and_a_head_with_unit_rows():
    f = e.Embedding()
    channels = [m.out_channels for m in f.trunk if isinstance(m, torch.nn.Conv2d)]
    assert channels == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert f.weight.shape == (128, 2048)
    torch.manual_seed(0)
    small = e.Embedding(1 / 8, 16, standardise=True)
    small.weight.data *= torch.arange(1, 17)[:, None]  # rows of any length
    small.bias.data = torch.arange(16.0)
    x = torch.rand(3, 3, 64, 64)
    trunk = small.trunk((x - 0.5) / 0.25).flatten(1)
    rows = [row / row.square().sum().sqrt() for row in small.weight]
    by_hand = torch.stack([trunk @ row for row in rows], 1) + torch.arange(16.0)
    torch.testing.assert_close(small(x), by_hand)


def test_vgg_weights_start_the_trunk(tmp_path):
    trunk = e.Embedding().trunk.state_dict()
    state = {f"module.features.{k}": v for k, v in trunk.items()}
    torch.save(state | {"module.classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg.pth")
    config = e.Config(weights=str(tmp_path / "vgg.pth"))
    started = e.create_embedding(config, torch.device("cpu")).trunk.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in started.items())
    with pytest.raises(run.UsageError, match=r"vgg.pth.*--width 1"):
        e.create_embedding(dataclasses.replace(config, width=0.5), torch.device("cpu"))


# the script's forms and the kernels'


@pytest.fixture(scope="module")
def script():
    """The operations as embed.py has them where there is no kernels/."""
    names = "box_mask masked_step gaussian_cutout augment positions window_energy painted"
    names = {*names.split(), "local_views"}
    tree = ast.parse(Path(e.__file__).read_text())
    kept = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {n.name for n in kept} == names
    space = {"torch": torch, "Tensor": torch.Tensor}
    first = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*first, *kept], []), "embed.py", "exec"), space)  # noqa: S102
    return space


def alike(script, module, name, *inputs, seeded=False, **more):
    """What script form, reference and operation make of the same, which must be the same bits."""
    results = []
    for form in (script[name], getattr(module, f"{name}_ref"), getattr(module, name)):
        found = form(*inputs, **more, **({"generator": rng(4)} if seeded else {}))
        results.append(found if isinstance(found, tuple) else (found,))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == b.dtype == c.dtype
        assert a.stride() == b.stride() == c.stride()


def test_script_forms_are_the_kernels_references(script):
    from kernels import augment, gaussian_cutout, masked_step, window_energy
    from kernels.patch_local import local_views_ref
    from kernels.place_patches import painted, place_patches_ref

    images = torch.rand(40, 3, 17, 23)
    boxes = e.draw_boxes(40, 17, 23, 0.5, (0.02, 0.2), (0.5, 2.0), rng(3))
    assert 8 < int((boxes[:, 2] > 0).sum()) < 32
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    flips, shifts = e.draw_moves(40, 5, rng(5))
    moves = {"flips": flips, "shifts": shifts, "boxes": boxes}
    alike(script, augment, "augment", pixels, seeded=True, **moves)
    grad, alpha = torch.randn_like(images), torch.randn(40)
    grad[:, :, ::2] = 0
    places = torch.stack([torch.randint(0, n, (40, 6)) for n in (17 - 5 + 1, 23 - 8 + 1)], 2)
    for layout in (torch.channels_last, torch.contiguous_format):
        laid = images.contiguous(memory_format=layout)
        alike(script, gaussian_cutout, "gaussian_cutout", laid, seeded=True, boxes=boxes)
        alike(script, masked_step, "masked_step", laid, grad, alpha, boxes)
        wanted = place_patches_ref(laid, 0.5, places, (5, 8)).unbind(1)
        for form in (script["painted"], painted):
            for found, want in zip(form(laid, 0.5, places, (5, 8)), wanted, strict=True):
                assert torch.equal(found, want) and found.stride() == laid.stride()
    whole = torch.randint(-9, 9, (4, 3, 17, 23)).float()  # sums without rounding
    for window in ((5, 8, 3), (17, 23, 1), (1, 1, 4)):
        alike(script, window_energy, "window_energy", whole, *window)
    inputs = (Linear(), images, boxes)
    forms = [list(form(*inputs)) for form in (script["local_views"], local_views_ref)]
    assert forms[0] == forms[1] == list(e.local_views(*inputs))  # no layers to follow


def test_rectangles_and_moves_are_those_of_appendix_a():
    boxes = e.draw_boxes(4000, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng()).double()
    top, left, h, w = boxes.unbind(1)
    area, aspect = h * w / 64**2, h / w
    assert 0.015 < float(area.min()) < 0.025 and 0.19 < float(area.max()) < 0.21
    assert float(area.mean()) == pytest.approx(0.11, abs=0.004)
    assert 0.45 < float(aspect.min()) and float(aspect.max()) < 2.2
    assert float(aspect.mean()) == pytest.approx(1.25, abs=0.03)  # its inverse: 0.92
    assert int((top + h).max()) == 64 and int((left + w).max()) == 64
    assert int(top.min()) == int(left.min()) == 0
    some = e.draw_boxes(4000, 64, 64, 0.3, (0.02, 0.2), (0.5, 2.0), rng())
    assert float((some.sum(1) > 0).double().mean()) == pytest.approx(0.3, abs=0.03)
    flips, shifts = e.draw_moves(4000, 5, rng())
    assert float(flips.double().mean()) == pytest.approx(0.5, abs=0.03)
    for direction in shifts.unbind(1):
        assert direction.unique().tolist() == list(range(-5, 6))
        assert float(direction.double().mean()) == pytest.approx(0, abs=0.2)


# inner attacks


def attack_by_hand(embed, image, anchor, box, alpha, steps):
    """Sign steps on an image (3, H, W) in a box, by the gradient of a linear F written out."""
    top, left, h, w = box.tolist()
    place = (slice(None), slice(top, top + h), slice(left, left + w))
    for _ in range(steps):
        gradient = 2 * embed.weight @ (embed(image[None])[0] - anchor)
        stepped = (image + alpha * gradient.view_as(image).sign()).clamp(0, 1)
        image = image.clone()
        image[place] = stepped[place]
    return image


def same(found, wanted):
    """Equal but for a few pixels whose gradient is zero up to rounding."""
    return float(((found - wanted).abs() > 1e-5).double().mean()) < 1e-3


def test_inner_attack_is_steps_of_the_sign_by_hand():
    embed, images = Linear(), torch.rand(3, 3, SIDE, SIDE, generator=rng())
    anchors = embed(torch.rand(3, 3, SIDE, SIDE, generator=rng(1)))
    alpha = torch.tensor([0.1, 0.03, -0.1])
    boxes = torch.tensor([[0, 0, 10, 10], [9, 7, 7, 9], [5, 9, 8, 4]])
    found = e.inner_attack(embed, images, anchors, alpha, boxes, 4)
    for i in range(3):
        wanted = attack_by_hand(embed, images[i], anchors[i], boxes[i], alpha[i], 4)
        assert same(found[i], wanted)
        fewer = attack_by_hand(embed, images[i], anchors[i], boxes[i], alpha[i], 3)
        assert not same(found[i], fewer)
    before, after = (e.squared_distance(embed(v), anchors) for v in (images, found))
    assert bool(((after - before) * alpha > 0).all())
    outside = ~e.box_mask(boxes, SIDE, SIDE).expand_as(images)
    assert torch.equal(found[outside], images[outside])
    assert torch.equal(e.inner_attack(embed, images, anchors, alpha, boxes, 0), images)
    nothing = (v[:0] for v in (images, anchors, alpha, boxes))
    assert e.inner_attack(embed, *nothing, 2).shape == (0, 3, SIDE, SIDE)


def test_doa_paints_positives_away_and_negatives_towards_the_anchor():
    """Every candidate is compared by hand; the opposite sign for the negatives would choose another
    window."""
    embed, images = Linear(), torch.rand(4, 3, SIDE, SIDE, generator=rng())
    anchors = embed(torch.rand(4, 3, SIDE, SIDE, generator=rng(1)))
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
    places = e.positions(SIDE, SIDE, 6, 6, 3)
    config = settings("doa", candidates=len(places))
    got = e.doa_boxes(config, embed, images, anchors, sign)
    for i in range(4):
        d = []
        for r, c in places.tolist():
            grey = images[i : i + 1].clone()
            grey[:, :, r : r + 6, c : c + 6] = 0.5
            d.append(float(e.squared_distance(embed(grey), anchors[i : i + 1])))
        best = d.index(max(d) if sign[i] > 0 else min(d))
        assert got[i].tolist() == [*places[best].tolist(), 6, 6]
        assert d.index(max(d)) != d.index(min(d))
    # one candidate: the window of the largest gradient
    few = e.doa_boxes(settings("doa", candidates=1), embed, images, anchors, sign)
    grad = 2 * (embed(images) - anchors) @ embed.weight.T
    energy = e.window_energy(grad.view_as(images), 6, 6, 3)
    assert few[:, :2].tolist() == places[energy.argmax(1)].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_attacks_its_patch_from_noise_by_hand(method):
    """x away from y, t towards u, by as many steps of alpha / 255; where no box was erased, a box
    is filled with noise first."""
    config, embed = settings(method, batch=8, cutout_area=(0.1, 0.3)), Linear()
    q, _ = quadruplets(config, embed, colours())
    x, t = e.adversarial(config, embed, q, 32.0, rng(1))
    images, boxes = torch.cat([q.x, q.t]), torch.cat([q.x_boxes, q.t_boxes])
    anchors, sign = torch.cat([q.fy, q.fu]), torch.tensor([1.0] * 8 + [-1.0] * 8)
    assert bool(boxes.any()) == (method in ("ours", "transfer", "no-at"))
    again = rng(1)
    if method == "doa":
        boxes = e.doa_boxes(config, embed, images, anchors, sign)
    if method in ("weak-at", "mixed"):
        area = (0.02, 0.1) if method == "weak-at" else (0.1, 0.3)
        boxes = e.draw_boxes(16, SIDE, SIDE, 1.0, area, (0.5, 2.0), again)
        assert area[0] * 0.6 < float((boxes[:, 2] * boxes[:, 3]).double().mean()) / 256 < area[1]
    if method in ("weak-at", "doa", "mixed"):
        images = e.gaussian_cutout(images, generator=again, boxes=boxes)[0]
    steps = 0 if method == "no-at" else 3
    for i, found in enumerate([*x, *t]):
        alpha = sign[i] * 32 / 255
        assert same(found, attack_by_hand(embed, images[i], anchors[i], boxes[i], alpha, steps)), i


def test_the_inner_step_grows_over_the_warmup():
    config = e.Config(attack_alpha=32.0, attack_warmup=4)
    assert [config.alpha(step) for step in (0, 1, 3, 4, 9)] == [0.0, 8.0, 24.0, 32.0, 32.0]
    assert e.Config(attack_alpha=32.0).alpha(0) == 32.0


# sampling and mining


def test_sampler_draws_persons_evenly_and_pairs_truly():
    person = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 2, 2])[torch.randperm(10, generator=rng())]
    s = e.Sampler(torch.zeros(10, 3, 64, 64, dtype=torch.uint8), person)
    x, companion, t = s.draw(3000, 2, rng())
    assert bool((person[t] != person[x][:, None]).all())
    share = person[x].bincount() / 3000
    # persons evenly, however many images they have
    assert float((share - 1 / 3).abs().max()) < 0.05
    assert len(x.unique()) == len(companion.unique()) == len(t.unique()) == 10
    x, y, t = s.draw(3000, 1, rng(), same_person=True)
    assert bool((person[x] == person[y]).all()) and bool((x != y).all())
    assert bool((person[t[:, 0]] != person[x]).all())
    assert set(person[x].tolist()) == {0, 2}  # a person with one image gives no pair
    assert len({(a, b) for a, b in zip(x.tolist(), y.tolist())}) == 7 * 6 + 2
    one = e.Sampler(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), torch.tensor([2, 0, 1]))
    x, y, t = one.draw(300, 1, rng(), same_person=True)  # --images 1
    assert torch.equal(x, y) and len(x.unique()) == 3 and bool((t[:, 0] != x).all())


def test_sampler_takes_any_labels_and_float_images():
    """Labels are numbered, floats are pixels of 0..255: the same draws and batches as of those."""
    plain = colours(3, 4)
    images = plain.images.float() / 255
    other = e.Sampler(images, torch.tensor([3, 13, 23])[plain.person])
    for one, two in zip(plain.draw(200, 2, rng()), other.draw(200, 2, rng())):
        assert torch.equal(one, two)
    person = torch.arange(3).repeat_interleave(4)
    x, _, t = other.draw(3000, 1, rng())
    assert (person[t[:, 0]] != person[x]).all() and len(x.unique()) == 12
    batches = (quadruplets(settings("weak-at"), Linear(), s)[0] for s in (plain, other))
    assert all(map(torch.equal, *batches))
    for wrong in (images * 255, images - 0.1, plain.images.int()):
        with pytest.raises(ValueError, match=r"give uint8, or float in \[0, 1\]"):
            e.Sampler(wrong, plain.person)


@pytest.mark.parametrize("method", ["ours", "transfer", "no-at", "mixed"])
def test_a_step_of_generated_images_needs_a_generator(method):
    with pytest.raises(ValueError, match=f"method {method}: y and u are generated"):
        e.train_step(settings(method), Linear(), None, colours(), None, rng(), 0.0)


@pytest.mark.parametrize("method", ["ours", "transfer", "no-at", "weak-at", "doa"])
def test_quadruplets_and_mining_by_value(method):
    """y = G(x, x), for transfer G(x, another); u = G(x, t); or y real, u = y (eq. 6). Of three
    candidates t the one nearest to u is kept, for real pairs the one nearest to x."""
    config, embed, sampler = settings(method, batch=32, mine=3, cutout=0.0), Linear(), colours()
    q, (x, other, t) = quadruplets(config, embed, sampler)
    real = sampler.images.float() / 255
    assert q.image_index.tolist() == [*x.tolist(), *t.flatten().tolist()]
    content = other if method == "transfer" else x
    y = fake(x, content) if config.generated else real[other]
    assert torch.equal(q.x, real[x]) and torch.equal(q.y, y)
    for i in range(32):
        virtual = fake(x[i].repeat(3), t[i])
        reference = virtual if config.generated else real[x[i]][None]
        best = int((embed(real[t[i]]) - embed(reference)).square().sum(1).argmin())
        assert torch.equal(q.t[i], real[t[i, best]])
        assert torch.equal(q.u[i], virtual[best] if config.generated else y[i])
    torch.testing.assert_close(q.fy, embed(q.y))
    torch.testing.assert_close(q.fu, embed(q.u))


@pytest.mark.parametrize("method", ["ours", "transfer", "no-at"])
def test_boxes_are_those_of_the_images_that_are_kept(method):
    config, embed, sampler = settings(method, batch=32, mine=3), Linear(), colours()
    q, (x, _, _) = quadruplets(config, embed, sampler)
    assert torch.equal(q.y[:, 0, 0, 0], x / 50)  # generated images are not erased
    for images, boxes in ((q.x, q.x_boxes), (q.t, q.t_boxes)):
        colour = images.flatten(2).median(2).values[:, :, None, None]
        erased = (images != colour).any(1)
        assert torch.equal(erased, e.box_mask(boxes, SIDE, SIDE)[:, 0])
        assert 8 < int(erased.flatten(1).any(1).sum()) < 24  # p = 0.5
    assert torch.equal(q.x.flatten(2).median(2).values, sampler.images[x, :, 0, 0] / 255)


def test_mixed_is_half_real_pairs_half_transfer():
    config, embed, sampler = settings("mixed", batch=7, mine=2), Linear(), colours()
    q, _ = quadruplets(config, embed, sampler)
    again, half = rng(), settings("weak-at", batch=3)
    first = e.real_quadruplets(half, embed, sampler, again)
    rest = settings("transfer", batch=4, cutout=0.0)
    second = e.generated_quadruplets(rest, embed, sampler, fake, again)
    for found, one, other in zip(q, first, second, strict=True):
        assert torch.equal(found, torch.cat([one, other]))
    assert torch.equal(q.y[:3], q.u[:3]) and not q.x_boxes.any() and not q.t_boxes.any()
    assert bool((q.y[:3] == q.y[:3, :, :1, :1]).all())  # real
    assert bool((q.y[3:, :, 0] != q.y[3:, :, 1]).any(1).any(1).all())  # of the fake G


def test_a_real_y_is_moved_by_itself():
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    sampler = e.Sampler(images, torch.arange(3))  # one image each: y is x
    q = e.real_quadruplets(settings("weak-at", batch=20), Linear(), sampler, rng())
    still = images[q.image_index[:20]] / 255
    for one, other in ((q.x, q.y), (q.x, still), (q.y, still)):
        assert float((one != other).flatten(1).any(1).double().mean()) > 0.8


def test_generated_images_come_from_codes_or_copies():
    z_cl, z_co = torch.rand(5, 2), torch.rand(5, 3)
    copies = torch.rand(5, 3, 4, 4).half()
    G = lambda a, b: torch.cat([a, b], 1)
    i, k = torch.tensor([3, 1]), torch.tensor([0, 4])
    made = e.Generated(G, z_cl, z_co, copies)
    assert torch.equal(made(i, k), torch.cat([z_cl[i], z_co[k]], 1))
    assert torch.equal(made(i, i), copies[i].float())
    assert torch.equal(e.Generated(G, z_cl, z_co)(i, i), torch.cat([z_cl[i], z_co[i]], 1))


def test_real_pairs_need_two_images_of_a_person():
    alone = type("Faces", (), {"person": torch.arange(4), "names": ()})
    split = data.Split((0, 1, 2), (3,), (), 0)
    for method in METHODS:
        config = settings(method, persons=0, images=1)  # y is x, moved otherwise
        if method in ("weak-at", "doa", "mixed"):
            more = dataclasses.replace(config, images=0)
            with pytest.raises(run.UsageError, match=f"--method {method}: .*two images"):
                e.training_images(more, alone, split)
        assert torch.equal(e.training_images(config, alone, split), torch.arange(3))


def test_persons_and_images_choose_what_trains():
    some = type("Faces", (), {"person": torch.tensor([0, 1, 2, 0, 1, 2, 3]), "names": ()})
    split = data.Split((0, 2), (1,), (3,), 0)
    for persons, images, wanted in ((0, 0, [0, 2, 3, 5]), (1, 0, [0, 3]), (0, 1, [0, 2])):
        config = settings("ours", persons=persons, images=images)
        assert e.training_images(config, some, split).tolist() == wanted
    with pytest.raises(run.UsageError, match="one train person alone"):
        e.training_images(settings("ours"), some, data.Split((0,), (1,), (3,), 0))


# a step


@pytest.mark.parametrize("method", ["ours", "no-at", "weak-at"])
def test_a_step_is_eq4_by_hand(method):
    """The loss of the attacked x and t beside y and u, and its gradient, taken by plain descent."""
    images, person = faces()
    sampler, config = e.Sampler(images, person), settings(method, cutout=0.9)
    copies = images.float() / 255
    G = lambda identity, content: (copies[identity] + copies[content]) / 2
    torch.manual_seed(0)
    f = e.Embedding(config.width, config.dim, config.standardise)
    plain = e.Embedding(config.width, config.dim, config.standardise)
    plain.load_state_dict(f.state_dict())
    again = rng(5)
    if method == "weak-at":
        q = e.real_quadruplets(config, plain, sampler, again)
    else:
        q = e.generated_quadruplets(config, plain, sampler, G, again)
    x, t = e.adversarial(config, plain, q, 24.0, again)
    assert torch.equal(x, q.x) == torch.equal(t, q.t) == (method == "no-at")
    fx, fy, ft, fu = (plain(v) for v in (x, q.y, t, q.u))
    d_positive, d_negative = (fx - fy).norm(dim=1), (ft - fu).norm(dim=1)
    loss = (d_positive**2 + (10 - d_negative).clamp(min=0) ** 2).mean()
    grads = torch.autograd.grad(loss, list(plain.parameters()))
    for p in f.parameters():
        p.grad = torch.ones_like(p)  # of an earlier step
    sgd = torch.optim.SGD(f.parameters(), lr=1.0)
    found = e.train_step(config, f, sgd, sampler, G if config.generated else None, rng(5), 24.0)
    wanted = {"loss": loss, "d_positive": d_positive.mean(), "d_negative": d_negative.mean()}
    assert found.keys() == {*wanted, "gradient"}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value.detach()), rel=1e-4)
    norm = torch.cat([v.flatten() for v in grads]).norm()
    assert found["gradient"] == pytest.approx(float(norm), rel=1e-3)
    for new, old, grad in zip(f.parameters(), plain.parameters(), grads):
        assert float((old - grad - new).detach().abs().max()) < 1e-3 * float(norm)


def test_a_step_in_bfloat16_gives_every_weight_its_gradient():
    images, person = faces()
    copies, found = images.float() / 255, {}
    G = lambda identity, content: (copies[identity] + copies[content]) / 2
    for precision in ("float32", "bfloat16"):
        config = settings(precision=precision)
        torch.manual_seed(0)
        embed = e.Embedding(0.125, 16, standardise=True)
        sgd = torch.optim.SGD(embed.parameters(), lr=0.0)
        e.train_step(config, embed, sgd, e.Sampler(images, person), G, rng(), 0.0)
        found[precision] = torch.cat([p.grad.flatten() for p in embed.parameters()])
        grads = {name: p.grad for name, p in embed.named_parameters()}
        del grads["bias"]  # distances do not see it
        assert all(grad.dtype == torch.float32 and grad.any() for grad in grads.values())
    cosine = torch.cosine_similarity(*found.values(), dim=0)
    assert not torch.equal(*found.values()) and cosine > 0.95


def test_a_random_start_trains():
    images, person = faces(8, 6)
    config = settings("weak-at", mine=1, width=1 / 16, attack_steps=1)
    torch.manual_seed(0)
    f = e.Embedding(config.width, config.dim, config.standardise)
    adam, sampler = torch.optim.Adam(f.parameters(), lr=8e-3), e.Sampler(images, person)
    losses = [e.train_step(config, f, adam, sampler, None, rng(i), 8.0)["loss"] for i in range(30)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_collapse_and_non_finite_values_are_noticed():
    config = settings("weak-at")
    assert e.is_collapsed(0.01, config) and not e.is_collapsed(4.0, config)
    squared = dataclasses.replace(config, hinge="squared")  # its margin is of the squared distance
    assert e.is_collapsed(0.06, squared) and not e.is_collapsed(0.07, squared)
    images, person = faces()
    f = e.Embedding(1 / 32, 16)
    f.bias.data[0] = math.nan
    adam, before = torch.optim.Adam(f.parameters()), f.weight.clone()
    with pytest.raises(FloatingPointError, match="loss nan") as error:
        e.train_step(config, f, adam, e.Sampler(images, person), None, rng(), 32.0)
    assert torch.equal(f.weight, before)
    assert len(error.value.args[1]) == config.batch * (1 + config.mine)


# validation


def test_auroc_counts_ties_half():
    genuine, intruder = torch.tensor([2.0, 1, 0, 1]), torch.tensor([1.0, 3.0])
    assert e.auroc(genuine, intruder) == (1 + 2 / 2 + 4) / 8


def test_validation_is_of_fresh_real_pairs_by_hand():
    images, person = faces()
    person = person[torch.randperm(len(person), generator=rng())]  # distances that overlap
    embed, sampler = Linear(3 * 64 * 64), e.Sampler(images, person)
    x, y, t = sampler.draw(1000, 1, rng(), same_person=True)
    fx, fy, ft = (embed(images[i].float() / 255) for i in (x, y, t[:, 0]))
    plus, minus = (fx - fy).norm(dim=1), (fx - ft).norm(dim=1)
    margin = float(minus.median())
    found = e.validate(settings(margin=margin), embed, sampler, rng())
    loss = (plus**2 + (margin - minus).clamp(min=0) ** 2).mean()
    assert found["val_loss"] == pytest.approx(float(loss), rel=1e-4)
    higher = (minus[:, None] > plus).double() + 0.5 * (minus[:, None] == plus).double()
    assert found["val_auroc"] == pytest.approx(float(higher.mean()), abs=1e-4)


def test_threshold_refuses_the_asked_share_of_genuine_pairs():
    images, person = faces(6, 6)
    embed, d = Linear(3 * 64 * 64), []
    delta = e.genuine_threshold(embed, images, person, fpr=0.05)
    floats = images.float() / 255
    for i in range(len(images)):
        for j in range(len(images)):
            if i != j and person[i] == person[j]:
                anchor, views = embed(floats[j : j + 1]), (floats[i], floats[i].flip(2))
                both = [(embed(v[None]) - anchor).square().sum() for v in views]
                d.append(float(torch.stack(both).mean().sqrt()))
    d = torch.tensor(d)
    refused = int(0.05 * len(d))  # of 180 pairs: delta lies just above the largest but 9
    assert delta == pytest.approx(float(d.sort().values[-1 - refused]), rel=1e-5)
    assert (d >= delta * (1 + 1e-5)).double().mean() <= 0.05
    assert (d >= delta * (1 - 1e-5)).double().mean() > 0.05
    far = lambda x: (embed(x) / 100).double() + 1e6  # no cancellation far from the origin
    assert e.genuine_threshold(far, images, person) == pytest.approx(delta / 100, rel=1e-4)
    constant = e.genuine_threshold(lambda x: torch.ones(len(x), 2), images, person)
    assert 0 < constant < 1e-30  # refuses nobody: an attack on it is never "detected"
    with pytest.raises(ValueError, match="float32: give uint8"):
        e.features(embed, floats)


# the command


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(name): a run (in a folder with a space in its name) with a generator of random weights
    that knows the train persons alone."""
    (tmp_path / "a project").mkdir()
    monkeypatch.chdir(tmp_path / "a project")

    def made(name):
        folder = Path("runs", name)
        found, split = data.open_run(e.parse(FLAGS)[0], folder)
        config, names = g.Config(**TINY_GENERATOR), [found.names[p] for p in split.train]
        parts = {"config": dataclasses.asdict(config), "lord": g.Lord(config).state_dict()}
        run.save(folder / "generator.pt", "generator", train=names, **parts)
        return folder

    return made


def weights(folder):
    return torch.load(folder / "embedding.pt", weights_only=True)["model"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


@pytest.mark.parametrize("method", ["ours", "weak-at"])  # the last weights, the best weights
def test_interrupted_training_goes_on_bit_for_bit(run_of, capsys, interrupted_at, method):
    flags = [*FLAGS, "--run", str(run_of("stopped")), "--method", method]
    folder = Path("runs/stopped", method)
    assert e.main(flags) == 0
    whole, log = weights(folder), log_of(folder)
    assert [line["step"] for line in log] == [2, 4, 6]
    assert all(0 <= line["val_auroc"] <= 1 for line in log)
    result = json.loads((folder / "result.json").read_text())
    assert result["threshold"] > 0 and result["made_of"]["config"]["method"] == method
    assert result["selected"] == ("best" if method == "weak-at" else "last")
    assert bool(result["made_of"]["generator"]) == (method == "ours")
    assert {"seconds", "seconds_per_step", "device", "torch", "python", "commit"} <= set(result)
    assert "root" not in result["made_of"]["config"]  # photographs may move
    capsys.readouterr()
    assert e.main(flags) == 0 and "already" in capsys.readouterr().out
    with interrupted_at(e, "train_step", 6):
        assert e.main([*flags, "--overwrite"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert e.main([*flags, "--lr", "0.5"]) == 2 and "lr (" in capsys.readouterr().err
    assert e.main(flags) == 0 and "goes on at step 4" in capsys.readouterr().out
    assert equal(weights(folder), whole) and log_of(folder) == log
    again = json.loads((folder / "result.json").read_text())
    same = ("made_of", "threshold", "selected", "device", "torch", "python")
    assert {k: again[k] for k in same} == {k: result[k] for k in same}
    assert not list(folder.glob("training*"))


def test_a_vgg_file_that_moved_is_the_same_training(run_of, capsys):
    state = e.Embedding(1 / 32).trunk.state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, "a.pth")
    flags = [*FLAGS, "--run", str(run_of("moved")), "--method", "ours", "--weights"]
    assert e.main([*flags, "a.pth"]) == 0
    Path("a.pth").rename("b.pth")
    capsys.readouterr()
    assert e.main([*flags, "./b.pth"]) == 0 and "already" in capsys.readouterr().out
    state["0.bias"] += 1
    torch.save({f"features.{k}": v for k, v in state.items()}, "b.pth")
    assert e.main([*flags, "b.pth"]) == 2 and "weights (" in capsys.readouterr().err


def test_the_best_weights_are_kept_by_the_validation_persons(run_of, monkeypatch):
    """Also the rates and step sizes of each step, and whose images train and validate."""
    folder, scores = run_of("best"), iter([0.5, 0.9, 0.6, 0.7])
    states, rates, samplers = [], [], []
    train_step = e.train_step

    def step(config, embed, adam, sampler, G, rng, alpha):
        rates.append((adam.param_groups[0]["lr"], alpha))
        samplers.append(sampler)
        return train_step(config, embed, adam, sampler, G, rng, alpha)

    def validate(config, embed, sampler, rng):
        states.append({k: v.clone() for k, v in embed.state_dict().items()})
        samplers.append(sampler)
        return {"val_loss": 1.0, "val_auroc": next(scores)}

    monkeypatch.setattr(e, "train_step", step)
    monkeypatch.setattr(e, "validate", validate)
    flags = [*FLAGS, "--run", str(folder), *WEAK, "--lr", "0.01", "--lr-end", "0.001"]
    flags += ["--steps", "8"]
    assert e.main([*flags, "--attack-alpha", "60", "--attack-warmup", "3"]) == 0
    saved = run.load(folder / "weak-at-1/embedding.pt", "embedding")
    assert saved["step"] == 4 and equal(saved["model"], states[1])
    assert not equal(states[1], states[2])
    assert [alpha for _, alpha in rates] == [0, 20, 40, 60, 60, 60, 60, 60]
    by_hand = [0.001 + 0.0045 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [lr for lr, _ in rates] == pytest.approx(by_hand)
    found, split = data.open_run(e.parse(FLAGS)[0], folder)
    parts = {len(split.train): split.train, len(split.validation): split.validation}
    assert len(parts) == 2
    for sampler in samplers:
        index = data.images_of(found, parts[len(sampler.count)])
        assert torch.equal(sampler.images, found.images[index])
    assert [len(s.count) for s in samplers[:3]] == [8, 8, 3]
    held = data.images_of(found, split.validation)
    embed = e.load_embedding(folder / "weak-at-1/embedding.pt")
    delta = e.genuine_threshold(embed, found.images[held], found.person[held])
    assert json.loads((folder / "weak-at-1/result.json").read_text())["threshold"] == delta


def test_the_whole_chain_prints_the_table_and_json(run_of, capsys):
    folder = run_of("chain")
    flags = [f for f in FLAGS if f != "--no-evaluation"]
    assert e.main([*flags, "--run", str(folder), *WEAK]) == 0
    out = capsys.readouterr().out
    assert "eyeglasses" in out and "clean" in out and out.count("AU-ROC [95 %]") == 1
    assert metrics.main(["--run", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["weak-at-1"]
    for attack in ("clean", "eyeglasses"):
        assert 0 <= found[attack]["auroc"] <= 1 and found[attack]["n_targets"] == 3


def test_the_folder_of_each_method():
    def name(*flags):
        return e.parse(list(flags))[0].name

    for method in ("ours", "transfer", "mixed", "no-at", "weak-at"):
        assert name("--method", method) == method
    assert name("--method", "doa") == "doa-10"
    assert name("--method", "doa", "--candidates", "4") == "doa-4"
    weak = ("--method", "weak-at", "--attack-steps")
    assert [name(*weak, n) for n in ("2", "10")] == ["weak-at", "weak-at-10"]
    paper = ("--preset", "paper", *weak)
    assert [name(*paper, n) for n in ("7", "10")] == ["weak-at-7", "weak-at"]
    assert name("--attack-steps", "7") == "ours"


def test_generators_that_are_refused_and_the_demos_own(run_of, monkeypatch, capsys):
    """One line each, before any training: one that saw the test persons, none, a broken one."""
    folder = run_of("generators")
    file, flags = folder / "generator.pt", [*FLAGS, "--run", str(folder), "--steps", "1"]
    monkeypatch.setattr(e, "__file__", str(Path("checkout").resolve() / "embed.py"))

    def refused():
        assert e.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("embed.py: ") and str(file) in line
        return line

    content, good = torch.load(file, weights_only=True), file.read_bytes()
    target = json.loads((folder / "people.json").read_text())["target"][0]
    torch.save({**content, "train": [*content["train"], target]}, file)
    capsys.readouterr()
    assert target in refused()
    file.write_bytes(b"no checkpoint")
    refused()
    file.unlink()
    assert "no generator in this run yet: python generator.py --preset demo" in refused()
    shipped = Path("checkout/data/demo/generator.pt")
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(good)
    assert e.main(flags) == 0 and "the demo's" in capsys.readouterr().out
    assert file.read_bytes() == good


def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for flags, text in {
        "--persons 5000": "--persons 5000: there are 8 train persons: python embed.py",
        "--persons 1": "--persons 1: give 2 or more",
        "--validation-persons 1": "--validation-persons 1",
        "--cutout-area 0.2,0.1": "--cutout-area 0.2,0.1: give two numbers, the lower first",
    }.items():
        assert e.main([*FLAGS, *flags.split(), "--run", "runs/bad"]) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("embed.py:") and text in line


def test_checkpoints_that_are_refused(tmp_path):
    state = e.Embedding(1 / 32, 16).state_dict()
    good = dataclasses.asdict(settings())
    huge = good | {"width": 60}  # a small file that asks for a huge network
    for config in (good | {"width": 0.125}, huge, [1, 2], good):
        run.save(tmp_path / "F.pt", "embedding", config=config, model=state)
        if config is good:
            assert equal(e.load_embedding(tmp_path / "F.pt").state_dict(), state)
            continue
        with pytest.raises(run.UsageError, match="F.pt.*do not fit together"):
            e.load_embedding(tmp_path / "F.pt")


def test_a_non_finite_step_names_itself_the_images_and_the_checkpoint(run_of, monkeypatch, capsys):
    real, calls = e.two_pair_loss, []

    def broken(fx, *args):
        loss = real(fx, *args)
        calls.extend([1] * loss.requires_grad)  # not of the validation
        # finite, but not its gradient
        return loss + (fx * 0).abs().sqrt().sum() if len(calls) == 4 else loss

    folder = run_of("gradient")
    monkeypatch.setattr(e, "two_pair_loss", broken)
    assert e.main([*FLAGS, "--run", str(folder), *WEAK]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    left = folder / "weak-at-1/training.ckpt"
    assert "step 4: loss" in told and "images [" in told and str(left) in told
    assert run.load(left, "training")["step"] == 2
    found, split = data.open_run(e.parse(FLAGS)[0], folder)
    first = int(told.split("images [")[1].split(",")[0])
    assert f"the first is {found.files[first]};" in told and found.person[first] in split.train


def test_what_a_run_was_made_of_is_compared(run_of, capsys, interrupted_at):
    """Other persons, images or another G: one line that names the file, never a mixed result."""
    folder = run_of("made-of")
    flags = [*FLAGS, "--run", str(folder)]
    with interrupted_at(e, "train_step", 4):
        assert e.main(flags) == 130
    found, split = data.open_run(e.parse(FLAGS)[0], folder)
    train, target = split.train[:-1] + split.target[:1], (*split.target[1:], split.train[-1])
    other = dataclasses.replace(split, train=train, target=target)
    file, part, people = folder / "generator.pt", folder / "ours/training.ckpt", "people.json"
    content, state = (torch.load(path, weights_only=True) for path in (file, part))
    halved = content | {"lord": {k: v / 2 for k, v in content["lord"].items()}}
    moved = state | {"made_of": state["made_of"] | {"images": "0" * 16}}
    for name, path, change in (
        ("generator", file, lambda: torch.save(halved, file)),
        ("images", part, lambda: torch.save(moved, part)),
        ("people", folder / people, lambda: data.write_manifest(folder / people, found, other)),
    ):
        good = path.read_bytes()
        change()
        capsys.readouterr()
        assert e.main(flags) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "rendering" not in line]
        assert len(lines) == 1 and f"training.ckpt: other settings: {name} (" in lines[0]
        path.write_bytes(good)
    assert e.main(flags) == 0 and [line["step"] for line in log_of(folder / "ours")] == [2, 4, 6]
