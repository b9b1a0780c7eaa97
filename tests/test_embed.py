"""embed.py: the equations, sampling, the inner attacks, DOA's search, training and the command."""

import ast
import dataclasses
import functools
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import attacks
import data
import embed as e
import generator as g
from data import run
from tests.test_generator import FLAGS as GENERATOR_FLAGS

TINY = {
    "preset": "demo",
    "data": "synthetic",
    "width": 1 / 32,
    "dim": 16,
    "standardise": True,
    "batch": 6,
    "attack_steps": 2,
    "attack_alpha": 32.0,
}
FLAGS = (
    "--synthetic-persons 14 --synthetic-images 10 --validation-persons 3 --target-persons 3 "
    "--width 0.03125 --dim 16 --batch 6 --steps 6 --validate-every 2 --attack-steps 2 "
    "--no-evaluation"
).split()
WEAK = ["--method", "weak-at", "--attack-steps", "1"]  # the quickest, without a generator


ONE = torch.zeros(3, 64, 64, dtype=torch.uint8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(dim=5, seed=0):
    weight = torch.randn(3 * 64 * 64, dim, generator=rng(seed)) / 64
    return lambda x: x.flatten(1) @ weight


def faces(persons=5, each=4):
    base = torch.rand(persons, 1, 3, 8, 8, generator=rng()).repeat(1, each, 1, 1, 1) * 0.8
    base = base + 0.2 * torch.rand(persons, each, 3, 8, 8, generator=rng(1))
    images = torch.nn.functional.interpolate(base.flatten(0, 1), 64, mode="bilinear")
    return (images * 255).to(torch.uint8), torch.arange(persons).repeat_interleave(each)


# equations


def test_eq1_decides_by_the_distance():
    target, candidate = (
        torch.zeros(3, 4),
        torch.tensor([[2.9, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.1, 0]]),
    )
    assert e.different(candidate, target, 3.0).tolist() == [False, True, True]


def test_eq2_and_the_released_hinge():
    fx, fy, ft, fu = torch.randn(4, 7, 3, generator=rng())
    plus, minus = ((fx - fy) ** 2).sum(1), ((ft - fu) ** 2).sum(1)
    squared, distance = (10 - minus).clamp(min=0), (10 - minus.sqrt()).clamp(min=0) ** 2
    found = e.two_pair_loss(fx, fy, ft, fu, 10.0, "squared")
    torch.testing.assert_close(found, (plus + squared).mean())
    torch.testing.assert_close(e.two_pair_loss(fx, fy, ft, fu, 10.0), (plus + distance).mean())
    far = fu + 100
    for hinge in ("distance", "squared"):
        assert e.two_pair_loss(fx, fx, far, fu, 10.0, hinge) == 0


def test_a_constant_embedding_is_stationary_for_eq2_but_not_for_the_released_hinge():
    sizes = []
    for hinge in ("squared", "distance"):
        f = torch.zeros(1, 4, requires_grad=True)
        shift = torch.full((1, 4), 1e-9)
        e.two_pair_loss(f, f, f, (f + shift).detach(), 10.0, hinge).backward()
        sizes.append(float(f.grad.norm()))
    assert sizes[0] < 1e-6 < sizes[1]
    f = torch.zeros(1, 4, requires_grad=True)
    e.two_pair_loss(f.detach(), f.detach(), f, torch.full((1, 4), 1e-3), 10.0).backward()
    assert float(f.grad.norm()) == pytest.approx(20, rel=1e-2)  # 2 m


def test_embedding_is_vgg16_with_unit_rows():
    f = e.Embedding()
    channels = [m.out_channels for m in f.trunk if isinstance(m, torch.nn.Conv2d)]
    assert channels == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert f.weight.shape == (128, 2048)
    torch.manual_seed(0)
    small = e.Embedding(1 / 8, 16, standardise=True)
    x = torch.rand(3, 3, 64, 64)
    before = small(x)
    small.weight.data *= 7  # the constraint is on the weights, whatever their stored length
    torch.testing.assert_close(small(x), before)
    assert before.shape == (3, 16)
    assert not torch.allclose(before.norm(dim=1), torch.ones(3), atol=0.1)
    assert float(before.detach().min()) < 0  # no final ReLU


@pytest.mark.parametrize("wrapped", ["module", "state_dict", "none"])
def test_vgg_files_as_trainings_wrap_them(wrapped, tmp_path):
    trunk = e.Embedding().trunk.state_dict()
    state = {f"{'module.' * (wrapped == 'module')}features.{k}": v for k, v in trunk.items()}
    if wrapped == "none":
        state = {"encoder.weight": torch.ones(1)}
    torch.save({"state_dict": state} if wrapped == "state_dict" else state, tmp_path / "vgg.pth")
    config = e.Config(weights=str(tmp_path / "vgg.pth"))
    if wrapped == "none":
        with pytest.raises(
            run.UsageError, match=r"vgg.pth.*no features.0.weight in it, but encoder"
        ):
            e.new_embedding(config, torch.device("cpu"))
        return
    started = e.new_embedding(config, torch.device("cpu")).trunk.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in started.items())


def test_vgg_weights_start_the_trunk():
    f = e.Embedding()
    state = {f"features.{k}": torch.randn_like(v) for k, v in f.trunk.state_dict().items()}
    state["classifier.0.bias"] = torch.zeros(3)
    f.load_vgg(state)
    assert torch.equal(f.trunk[0].weight, state["features.0.weight"])
    with pytest.raises(RuntimeError):
        e.Embedding(0.5).load_vgg(state)


# the script's forms and the kernels'


@pytest.fixture(scope="module")
def script():
    """The operations as embed.py has them where there is no kernels/."""
    names = "box_mask masked_step gaussian_cutout augment positions window_energy painted"
    names = {*names.split(), "local_attack"}
    tree = ast.parse(Path(e.__file__).read_text())
    kept = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {n.name for n in kept} == names
    space = {"torch": torch, "Tensor": torch.Tensor}
    first = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*first, *kept], []), "embed.py", "exec"), space)  # noqa: S102
    return space


def alike(script, module, name, *given, **settings):
    """What script form, reference and operation make of the same, which must be the same bits."""
    forms = (script[name], getattr(module, f"{name}_ref"), getattr(module, name))
    seeded = {"generator": 4} if "fill" in settings else {}
    three = [f(*given, **settings, **{k: rng(v) for k, v in seeded.items()}) for f in forms]
    parts = [found if isinstance(found, tuple) else (found,) for found in three]
    for a, b, c in zip(*parts, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == b.dtype == c.dtype
    return three[:2]


def test_script_forms_are_the_kernels_references(script):
    from kernels import augment, gaussian_cutout, masked_step, window_energy
    from kernels.place_patches import painted, place_patches_ref

    images = torch.rand(40, 3, 17, 23)
    boxes = e.draw_boxes(40, 17, 23, 0.5, (0.02, 0.2), (0.5, 2.0), rng(3))
    assert 8 < int((boxes[:, 2] > 0).sum()) < 32
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    flips, shifts = e.draw_moves(40, 5, rng(5))
    moves = {"flips": flips, "shifts": shifts, "boxes": boxes}
    for fill in ("gaussian", "uniform"):
        alike(script, gaussian_cutout, "gaussian_cutout", images, fill=fill, boxes=boxes)
        for layout in (torch.channels_last, torch.contiguous_format):
            settings = {"fill": fill, "layout": layout, **moves}
            one, other = alike(script, augment, "augment", pixels, **settings)
            assert one[0].stride() == other[0].stride()
    grad, alpha = torch.randn_like(images), torch.randn(40)
    grad[:, :, ::2] = 0
    alike(script, masked_step, "masked_step", images, grad, alpha, boxes)
    whole = torch.randint(-9, 9, (4, 3, 17, 23)).float()  # sums without rounding
    for window in ((5, 8, 3), (17, 23, 1), (1, 1, 4)):
        alike(script, window_energy, "window_energy", whole, *window)
    places = torch.stack([torch.randint(0, n, (40, 6)) for n in (17 - 5 + 1, 23 - 8 + 1)], 2)
    for layout in (torch.channels_last, torch.contiguous_format):
        given = images.contiguous(memory_format=layout)
        wanted = place_patches_ref(given, 0.5, places, (5, 8)).unbind(1)
        for form in (script["painted"], painted):
            for found, want in zip(form(given, 0.5, places, (5, 8)), wanted, strict=True):
                assert torch.equal(found, want) and found.stride() == given.stride()


def test_the_scripts_inner_attack_is_the_one_on_whole_images(script):
    from kernels.patch_local import local_attack_ref

    embed, images = linear(), torch.rand(4, 3, 64, 64, generator=rng())
    boxes = torch.tensor([[0, 0, 10, 10], [54, 50, 10, 14], [5, 9, 30, 20], [9, 9, 0, 0]])
    parts = (images, torch.zeros(4, 5), torch.tensor([0.1, 0.1, -0.1, 0.1]), boxes)
    attack = functools.partial(e.inner_attack, steps=2)
    found = [f(attack, embed, *parts) for f in (script["local_attack"], local_attack_ref)]
    assert torch.equal(*found) and torch.equal(found[0], e.local_attack(attack, embed, *parts))
    assert not torch.equal(found[0], images)


def test_rectangles_are_those_of_appendix_a():
    boxes = e.draw_boxes(4000, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng()).double()
    top, left, h, w = boxes.unbind(1)
    area, aspect = h * w / 64**2, h / w
    assert 0.015 < float(area.min()) < 0.025 and 0.19 < float(area.max()) < 0.21
    assert float(area.mean()) == pytest.approx(0.11, abs=0.004)
    assert 0.45 < float(aspect.min()) and float(aspect.max()) < 2.2
    assert int((top + h).max()) == 64 and int((left + w).max()) == 64
    assert int(top.min()) == int(left.min()) == 0


def test_augment_mirrors_and_shifts_with_edges_filled():
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)

    def augmented():
        flips, shifts = e.draw_moves(64, 2, rng())
        boxes = torch.zeros(64, 4, dtype=torch.long)
        return e.augment(images, flips=flips, shifts=shifts, boxes=boxes, generator=rng())[0]

    out = augmented()
    padded = torch.nn.functional.pad(images.float() / 255, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for i in range(64):
        options = {}
        for r in range(5):
            for c in range(5):
                moved = padded[i, :, r : r + 16, c : c + 16]
                options |= {(0, r, c): moved, (1, r, c): moved.flip(2)}
        match = [k for k, v in options.items() if torch.equal(v, out[i])]
        assert len(match) == 1
        seen.add(match[0])
    assert len({k[0] for k in seen}) == 2 and len(seen) > 20
    assert torch.equal(augmented(), out)


# inner attacks


def test_inner_attack_moves_each_sample_its_way_and_stays_in_its_rectangle():
    embed, images = linear(), torch.rand(6, 3, 64, 64, generator=rng())
    anchors = embed(torch.rand(6, 3, 64, 64, generator=rng(1)))
    alpha = torch.tensor([1.0, 1, 1, -1, -1, -1]) * (16 / 255)
    boxes = torch.tensor([[0, 0, 10, 10], [54, 50, 10, 14], [5, 9, 30, 20]] * 2)
    found = e.inner_attack(embed, images, anchors, alpha, boxes, 5)
    before, after = (e.squared_distance(embed(v), anchors) for v in (images, found))
    assert bool(((after - before) * alpha > 0).all())
    outside = ~e.box_mask(boxes, 64, 64).expand_as(images)
    assert torch.equal(found[outside], images[outside])
    assert float(found.min()) >= 0 and float(found.max()) <= 1 and not torch.equal(found, images)
    one = e.inner_attack(embed, images, anchors, alpha, boxes, 1)
    assert float((one - images).abs().max()) <= 16 / 255 + 1e-6
    assert torch.equal(e.inner_attack(embed, images, anchors, alpha, boxes, 0), images)


def test_inner_attack_computes_no_weight_gradients():
    f, boxes = e.Embedding(1 / 32, 16), torch.tensor([[0, 0, 9, 9]] * 2)
    parts = (f, torch.rand(2, 3, 64, 64), torch.zeros(2, 16), torch.full((2,), 0.1), boxes)
    e.inner_attack(*parts, 2)
    e.local_attack(functools.partial(e.inner_attack, steps=2), *parts)
    assert all(p.grad is None for p in f.parameters())


@pytest.mark.parametrize("size, stride", [(20, 5), (10, 5), (10, 1), (64, 5), (20, 7)])
def test_positions_are_the_enumerated_list(size, stride):
    starts = list(range(0, 64 - size + 1, stride))
    starts += [64 - size] if starts[-1] != 64 - size else []
    found = e.positions(64, 64, size, size, stride).tolist()
    assert found == [[r, c] for r in starts for c in starts]


def test_window_energy_is_the_brute_force_sum():
    grad = torch.randn(3, 3, 64, 64, generator=rng())
    # large beside small: running sums would lose the small ones
    grad[1] *= 1e3 * (torch.arange(64) < 8)
    places = e.positions(64, 64, 20, 20, 5).tolist()
    squares = grad.double() ** 2
    wanted = [squares[:, :, r : r + 20, c : c + 20].sum((1, 2, 3)) for r, c in places]
    found = e.window_energy(grad, 20, 20, 5).double()
    torch.testing.assert_close(found, torch.stack(wanted, 1), rtol=1e-5, atol=0)


def test_doa_paints_positives_away_and_negatives_towards_the_anchor():
    """Every candidate is compared by hand; the opposite sign for the negatives would choose another
    window."""
    embed, images = linear(), torch.rand(4, 3, 64, 64, generator=rng())
    anchors = embed(torch.rand(4, 3, 64, 64, generator=rng(1)))
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
    places = e.positions(64, 64, 20, 20, 5)
    config = e.Config(candidates=len(places), doa_size=20, doa_stride=5)
    got = e.doa_boxes(config, embed, images, anchors, sign)
    for i in range(4):
        d = []
        for r, c in places.tolist():
            grey = images[i : i + 1].clone()
            grey[:, :, r : r + 20, c : c + 20] = 0.5
            d.append(float(e.squared_distance(embed(grey), anchors[i : i + 1])))
        best = d.index(max(d) if sign[i] > 0 else min(d))
        assert got[i].tolist() == [*places[best].tolist(), 20, 20]
        assert d.index(max(d)) != d.index(min(d))
    # one candidate: the window of the largest gradient
    few = e.doa_boxes(dataclasses.replace(config, candidates=1), embed, images, anchors, sign)
    x = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(e.squared_distance(embed(x), anchors).sum(), x)
    assert few[:, :2].tolist() == places[e.window_energy(grad, 20, 20, 5).argmax(1)].tolist()


# sampling and mining


def test_sampler_draws_persons_evenly_and_pairs_truly():
    person = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 2, 2])[torch.randperm(10, generator=rng())]
    s = e.Sampler(torch.zeros(10, 3, 64, 64, dtype=torch.uint8), person)
    x, other, t = s.draw(3000, 2, rng())
    assert bool((person[t] != person[x][:, None]).all())
    share = person[x].bincount() / 3000
    # persons evenly, however many images they have
    assert float((share - 1 / 3).abs().max()) < 0.05
    assert len(other.unique()) == 10
    x, y, t = s.draw(3000, 1, rng(), pairs=True)
    assert bool((person[x] == person[y]).all()) and bool((x != y).all())
    assert bool((person[t[:, 0]] != person[x]).all())
    assert set(person[x].tolist()) == {0, 2}  # a person with one image gives no pair
    assert len({(a, b) for a, b in zip(x.tolist(), y.tolist())}) == 7 * 6 + 2
    one = e.Sampler(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), torch.tensor([2, 0, 1]))
    x, y, t = one.draw(300, 1, rng(), pairs=True)  # --images 1
    assert torch.equal(x, y) and len(x.unique()) == 3 and bool((t[:, 0] != x).all())


@pytest.mark.parametrize("method", e.CHOICES["method"])
def test_mining_keeps_the_nearest_candidate(method, monkeypatch):
    images, person = faces()
    config = e.Config(**{**TINY, "method": method, "mine": 3, "cutout": 0.0})
    embed, sampler = linear(), e.Sampler(images, person)
    kept = {}

    def draw(*args, **kwargs):
        kept["draw"] = e.Sampler.draw(sampler, *args, **kwargs)
        return kept["draw"]

    def unmoved(v, boxes, **settings):
        return v.float() / 255, boxes, None

    monkeypatch.setattr(sampler, "draw", draw, raising=False)
    monkeypatch.setattr(e, "augment", unmoved)
    real, flipped = images.float() / 255, (images.float() / 255).flip(2)
    mixed = lambda identity, content, pixels=None: (flipped[identity] + flipped[content]) / 2
    q = e.quadruplets(config, embed, sampler, mixed if config.generated else None, rng())
    x, other, t = kept["draw"]
    assert q.drawn.tolist() == [*x.tolist(), *t.flatten().tolist()]
    for i in range(config.batch):
        reals, against = real[t[i]], real[x[i]][None].expand(3, -1, -1, -1)
        if config.generated:
            against = (flipped[x[i]] + flipped[t[i]]) / 2
        best = int(e.squared_distance(embed(reals), embed(against)).argmin())
        assert torch.equal(q.x[i], real[x[i]]) and torch.equal(q.t[i], reals[best])
        if config.generated:
            assert torch.equal(q.u[i], against[best])  # u belongs to the t that was kept
            assert torch.equal(q.y[i], flipped[x[i]])
        else:
            assert torch.equal(q.y[i], real[other[i]]) and torch.equal(q.u[i], q.y[i])
    torch.testing.assert_close(q.fu, embed(q.u))
    torch.testing.assert_close(q.fy, embed(q.y))


def test_what_each_method_attacks():
    images, person = faces()
    sampler, embed = e.Sampler(images, person), linear()
    made = lambda identity, content, pixels=None: images[content].float() / 255
    shares = {"ours": "half", "no-at": "none", "weak-at": "all", "doa": "all"}
    for method, share in shares.items():
        config = e.Config(**{**TINY, "method": method, "batch": 64, "candidates": 4})
        q = e.quadruplets(config, embed, sampler, made if config.generated else None, rng())
        x, t = e.attacked(config, embed, q, config.attack_alpha, rng(1))
        changed = torch.cat([(x != q.x).flatten(1).any(1), (t != q.t).flatten(1).any(1)])
        changed = changed.float().mean()
        erased = torch.cat([q.x_boxes, q.t_boxes])[:, 2].gt(0).float().mean()
        wanted = {"half": 0.3 < changed < 0.7, "none": changed == 0, "all": changed == 1}
        assert wanted[share], method
        assert (erased > 0.3) == (method in ("ours", "no-at"))
        moved = (x != q.x).any(1).float().mean((1, 2))  # share of the pixels of each image
        if method == "weak-at":
            assert float(moved.max()) < 0.11
        if method == "doa":
            assert float(moved.max()) <= 400 / 4096 and float(moved.min()) > 0.08


@pytest.mark.parametrize("box", [(0, 0, 14, 14), (50, 7, 14, 14), (20, 31, 14, 14), (3, 0, 14, 64)])
def test_a_training_mask_shows_what_the_certificates_does(box):
    images = torch.rand(2, 3, 64, 64, generator=rng())
    boxes = torch.tensor([box, (9, 9, 14, 14)])
    shown = e.around(images, boxes)
    mask = e.box_mask(boxes, 64, 64)[:, 0]
    for image, hides, seen in zip(images, mask, shown):
        cover = attacks.cover_of(hides[None], hides[None])
        rule = attacks.Covered(linear(), image, cover)
        torch.testing.assert_close(seen, rule.cover(image[None])[0, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(e.around(images, 0 * boxes), images)  # an empty box hides nothing
    changed = torch.where(mask[:, None], 1 - images, images)
    assert torch.equal(e.around(changed, boxes), shown)  # nothing of what is hidden enters


def test_images_without_a_patch_are_hidden_by_the_worst_mask():
    images, person = faces()
    sampler, embed = e.Sampler(images, person), linear()
    made = lambda identity, content, pixels=None: images[content].float() / 255
    for method, seen in (("ours", 1.0), ("no-at", 0.5), ("weak-at", 1.0)):
        settings = {"method": method, "batch": 32, "attacked": "erased", "masks": 3}
        config = e.Config(**{**TINY, **settings})
        given = made if config.generated else None
        q = e.quadruplets(config, embed, sampler, given, rng())
        both, boxes = torch.cat([q.x, q.t]), torch.cat([q.x_boxes, q.t_boxes])
        plain = torch.cat(
            e.attacked(e.Config(**{**TINY, **settings, "masks": 0}), embed, q, 8.0, rng(1))
        )
        found = torch.cat(e.attacked(config, embed, q, 8.0, rng(1)))
        bare = boxes[:, 2] == 0
        assert 0.3 < bare.float().mean() < 0.7
        assert torch.equal(found[~bare], plain[~bare]) and torch.equal(plain[bare], both[bare])
        changed = (found != both).any(1)
        assert changed[bare].flatten(1).sum(1).le(14 * 14).all() and changed[bare].any((1, 2)).all()
        assert changed.any((1, 2)).float().mean() > seen - 0.2
    anchors, sign = torch.cat([q.fy, q.fu]), torch.ones(64)
    sign[32:] = -1
    gain = []
    for masks in (1, 8):  # of more masks the worst is worse, of the first it is the first
        config = e.Config(**{**TINY, "masks": masks})
        worst = e.hidden(config, embed, both, anchors, sign, rng(2))
        gain.append(e.squared_distance(embed(worst), anchors) * sign)
    assert (gain[1] >= gain[0]).all() and (gain[1] > gain[0]).float().mean() > 0.5


def test_the_inner_step_grows_over_the_warmup():
    config = e.Config(attack_alpha=32.0, attack_warmup=4)
    assert [config.alpha(step) for step in (0, 1, 3, 4, 9)] == [0.0, 8.0, 24.0, 32.0, 32.0]
    assert e.Config(attack_alpha=32.0).alpha(0) == 32.0


def test_transfer_takes_another_images_content():
    images, person = faces()
    asked = []

    def made(identity, content, pixels=None):
        asked.append((identity, content, pixels))
        return images[content].float() / 255

    for positive in ("reconstruct", "transfer"):
        config = e.Config(**{**TINY, "positive": positive})
        e.quadruplets(config, linear(), e.Sampler(images, person), made, rng())
    (same, own, pixels), _, (identity, content, none), _ = asked
    assert torch.equal(same, own) and not torch.equal(identity, content)
    assert len(pixels) == 6 and none is None  # another image's content is not that of x's pixels


def test_mixed_is_half_real_pairs_half_transfer():
    images, person = faces()
    asked = []

    def made(identity, content, pixels=None):
        asked.append((identity, content))
        return torch.full((len(identity), 3, 64, 64), 0.25)

    config = e.Config(**{**TINY, "positive": "mixed", "batch": 7})
    q = e.quadruplets(config, linear(), e.Sampler(images, person), made, rng())
    assert torch.equal(q.y[:3], q.u[:3]) and q.y[:3].unique().numel() > 100  # eq. (6)
    assert (q.y[3:] == 0.25).all() and (q.u[3:] == 0.25).all()
    (identity, content), (again, t) = asked
    assert len(identity) == 4 and not torch.equal(identity, content)
    assert torch.equal(again, identity.repeat_interleave(2)) and (person[t] != person[again]).all()
    sizes = {len(v) for v in q[:-1]}
    assert sizes == {7} and len(q.drawn) == 7 * 3


def test_how_many_images_of_a_person_f_may_see():
    held = type("Faces", (), {"person": torch.tensor([2, 0, 1, 0, 2, 2, 0])})
    assert data.images_of(held, (0, 2)).tolist() == [0, 1, 3, 4, 5, 6]
    assert data.images_of(held, (0, 2), 2).tolist() == [0, 1, 3, 4]
    assert data.images_of(held, (0, 2), 1).tolist() == [0, 1]
    alone = type("Faces", (), {"person": torch.arange(4), "names": ()})
    split = data.Split((0, 1, 2), (3,), (), 0)
    for flags in ({"method": "weak-at"}, {"method": "doa"}, {"positive": "mixed"}):
        config = e.Config(persons=0, **flags)
        with pytest.raises(run.UsageError, match="two images or more, there is none: .*--images 1"):
            e.trained_on(config, alone, split)
        config = dataclasses.replace(config, images=1)  # asked for: y is x, moved otherwise
        assert e.trained_on(config, alone, split).tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", ["ours", "weak-at"])
def test_a_step_in_bfloat16_gives_every_weight_its_gradient(method):
    images, person = faces()
    made = lambda identity, content, pixels=None: (
        (images[identity] / 255 + images[content] / 255) / 2
    )
    found = {}
    for precision in ("float32", "bfloat16"):
        config = e.Config(**{**TINY, "method": method, "precision": precision})
        torch.manual_seed(0)
        embed = e.Embedding(0.125, 16, standardise=True)
        adam = torch.optim.SGD(embed.parameters(), lr=0.0)
        given = config, embed, adam, e.Sampler(images, person)
        e.train_step(*given, made if config.generated else None, rng(), 0.0)
        found[precision] = torch.cat([p.grad.flatten() for p in embed.parameters()])
        grads = {name: p.grad for name, p in embed.named_parameters()}
        del grads["bias"]  # distances do not see it
        assert all(g.dtype == torch.float32 and g.any() for g in grads.values())
    cosine = torch.cosine_similarity(*found.values(), dim=0)
    assert not torch.equal(*found.values()) and cosine > 0.95


def test_generated_images_come_from_codes_copies_or_pixels():
    z_cl, z_co, copies = rng_codes(5, 2, 0), rng_codes(5, 3, 1), torch.rand(5, 3, 4, 4).half()
    G = lambda a, b: torch.cat([a, b], 1)
    i, k, pixels = torch.tensor([3, 1]), torch.tensor([0, 4]), torch.rand(2, 3)
    made = e.Generated(G, z_cl, z_co, copies)
    assert torch.equal(made(i, k, pixels), torch.cat([z_cl[i], z_co[k]], 1))
    assert torch.equal(made(i, i, pixels), copies[i].float())
    assert torch.equal(e.Generated(G, z_cl, z_co)(i, i), torch.cat([z_cl[i], z_co[i]], 1))
    released = e.Generated(G, z_cl, z_co, E_co=lambda x: -x)
    assert torch.equal(released(i, i, pixels), torch.cat([z_cl[i], -pixels], 1))


def rng_codes(n, dim, seed):
    return torch.randn(n, dim, generator=rng(seed))


# validation


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    genuine = torch.rand(50, generator=rng()).mul(10).round()
    intruder = torch.rand(80, generator=rng(1)).mul(14).round()
    truth = torch.cat([torch.zeros(50), torch.ones(80)])
    wanted = roc_auc_score(truth, torch.cat([genuine, intruder]))
    assert e.auroc(genuine, intruder) == pytest.approx(wanted)


def test_threshold_refuses_the_asked_share_of_genuine_pairs():
    images, person = faces(6, 6)
    embed = linear()
    delta = e.genuine_threshold(embed, images, person, fpr=0.05)
    floats, d = images.float() / 255, []
    for i in range(len(images)):
        for j in range(len(images)):
            if i != j and person[i] == person[j]:
                anchor, views = embed(floats[j : j + 1]), (floats[i], floats[i].flip(2))
                both = [e.squared_distance(embed(v[None]), anchor) for v in views]
                d.append(float(torch.stack(both).mean().sqrt()))
    d = torch.tensor(d)
    refused = int(0.05 * len(d))  # of 180 pairs: delta lies just above the largest but 9
    assert delta == pytest.approx(float(d.sort().values[-1 - refused]), rel=1e-5)
    assert (
        (d >= delta * (1 + 1e-5)).float().mean() <= 0.05 < (d >= delta * (1 - 1e-5)).float().mean()
    )


def test_threshold_is_exact_far_from_the_origin_and_with_ties():
    images, person = faces(6, 6)
    embed = linear()
    far = lambda x: (embed(x) / 100).double() + 1e6
    near = e.genuine_threshold(embed, images, person) / 100
    assert e.genuine_threshold(far, images, person) == pytest.approx(near, rel=1e-4)
    constant = e.genuine_threshold(lambda x: torch.ones(len(x), 2), images, person)
    assert 0 < constant < 1e-30  # refuses nobody: an attack on it is never "detected"


def test_threshold_of_more_pairs_than_a_quantile_takes(monkeypatch):
    monkeypatch.setattr(e, "features", lambda embed, images, mirror=False: images[:, :1].float())
    images = torch.arange(4100, dtype=torch.uint8)[:, None].expand(-1, 3)  # 16.8 million pairs
    # 57 * 56 of 256^2 differences are 200 or more, 4.9 %; with those of 199 it is 5.04 %
    assert 199 < e.genuine_threshold(None, images, torch.zeros(4100).long()) < 199.001


def test_float_images_are_no_pixels():
    with pytest.raises(ValueError, match="float32: give uint8"):
        e.features(linear(), torch.rand(2, 3, 64, 64))


# training


@pytest.mark.parametrize("method", e.CHOICES["method"])
def test_a_random_start_trains(method):
    images, person = faces(8, 6)
    small = {"mine": 1, "width": 1 / 16, "candidates": 4, "attack_steps": 1, "attack_alpha": 8.0}
    config = e.Config(**{**TINY, "method": method, **small})
    torch.manual_seed(0)
    f = e.Embedding(config.width, config.dim, config.standardise)
    adam = torch.optim.Adam(f.parameters(), lr=8e-3)
    made = lambda identity, content, pixels=None: images[identity].float() / 255
    given = (config, f, adam, e.Sampler(images, person), made if config.generated else None)
    losses = [e.train_step(*given, rng(i), config.alpha(i))["loss"] for i in range(30)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_collapse_and_non_finite_values_are_noticed():
    config = e.Config(**{**TINY, "method": "weak-at"})
    assert e.collapsed(0.01, config) and not e.collapsed(4.0, config)
    squared = dataclasses.replace(config, hinge="squared")  # its margin is of the squared distance
    assert e.collapsed(0.06, squared) and not e.collapsed(0.07, squared)
    images, person = faces()
    f = e.Embedding(1 / 32, 16)
    f.bias.data[0] = math.nan
    adam = torch.optim.Adam(f.parameters())
    before = f.weight.clone()
    with pytest.raises(FloatingPointError, match="loss nan") as error:
        e.train_step(config, f, adam, e.Sampler(images, person), None, rng(), 32.0)
    assert torch.equal(f.weight, before)
    assert len(error.value.args[1]) == config.batch * (1 + config.mine)


# the command


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder (with a space in its name) that holds a tiny run with its generator."""
    folder = tmp_path_factory.mktemp("a project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert g.main(GENERATOR_FLAGS) == 0
    return folder


@pytest.fixture
def run_of(project, monkeypatch):
    """run_of(name): a new run with the project's persons and generator, in the project's folder."""
    monkeypatch.chdir(project)

    def made(name):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        for file in ("generator.pt", "people.json", "run.json"):
            if Path("runs/synthetic-demo-0", file).exists():
                shutil.copy(Path("runs/synthetic-demo-0", file), folder)
        return folder

    return made


def weights(folder):
    return torch.load(folder / "embedding.pt", weights_only=True)["model"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


METHODS = {
    "ours": [],
    "no-at": ["--method", "no-at"],
    "mixed": ["--positive", "mixed", "--attacked", "all"],
    "released": ["--generate-from", "erased", "--fill", "uniform", "--amsgrad"],
    "weak-at": ["--method", "weak-at"],
    "weak-at, last": ["--method", "weak-at", "--select", "last"],
    "doa": ["--method", "doa"],
}


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_interrupted_training_goes_on_bit_for_bit(
    project, monkeypatch, capsys, flags, interrupted_at
):
    monkeypatch.chdir(project)
    given = [*FLAGS, *flags]
    config, _ = e.parse(given)
    folder = config.run / config.name
    assert e.main([*given, "--overwrite"]) == 0
    whole, log = weights(folder), log_of(folder)
    assert [line["step"] for line in log] == [2, 4, 6]
    assert all(0 <= line["val_auroc"] <= 1 for line in log)
    assert {"loss", "d_positive", "d_negative", "gradient", "val_loss"} <= set(log[0])
    result = json.loads((folder / "result.json").read_text())
    assert result["threshold"] > 0 and result["made_of"]["config"]["method"] == config.method
    assert result["selected"] == ("best" if config.early_stopping else "last")
    assert bool(result["made_of"]["generator"]) == config.generated
    assert {"seconds", "seconds_per_step", "device", "torch", "python", "commit"} <= set(result)
    capsys.readouterr()
    assert e.main(given) == 0 and "already" in capsys.readouterr().out
    assert e.main([*given, "--margin", "3"]) == 2 and "margin" in capsys.readouterr().err

    with interrupted_at(e, "train_step", 6):
        assert e.main([*given, "--overwrite"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert e.main([*given, "--lr", "0.5"]) == 2 and "lr (" in capsys.readouterr().err
    assert e.main(given) == 0 and "goes on at step 4" in capsys.readouterr().out
    assert equal(weights(folder), whole) and log_of(folder) == log
    again = json.loads((folder / "result.json").read_text())
    same = ("made_of", "threshold", "selected", "device", "torch", "python")
    assert {k: again[k] for k in same} == {k: result[k] for k in same}
    assert not list(folder.glob("training*"))


def test_the_best_weights_are_kept_and_judged(run_of, monkeypatch):
    folder = run_of("best")
    found, states = iter([0.5, 0.9, 0.7]), []

    def validate(config, embed, *rest):
        states.append({k: v.clone() for k, v in embed.state_dict().items()})
        return {"val_loss": 1.0, "val_auroc": next(found)}

    monkeypatch.setattr(e, "validate", validate)
    assert e.main([*FLAGS, "--run", str(folder), *WEAK]) == 0
    saved = run.load(folder / "weak-at-1/embedding.pt", "embedding")
    assert saved["step"] == 4 and equal(saved["model"], states[1])
    assert not equal(states[1], states[2])


def test_the_whole_chain_prints_the_table_and_json(run_of, capsys):
    import metrics

    folder = run_of("chain")
    flags = [f for f in FLAGS if f != "--no-evaluation"]
    assert e.main([*flags, "--run", str(folder), *WEAK]) == 0
    out = capsys.readouterr().out
    assert "eyeglasses" in out and "clean" in out
    assert metrics.main(["--run", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["weak-at-1"]
    for attack in ("clean", "eyeglasses"):
        assert 0 <= found[attack]["auroc"] <= 1 and 0 <= found[attack]["aupr"] <= 1
        assert found[attack]["n_targets"] == 3 and len(found[attack]["interval"]) == 2


def test_the_folder_of_each_method():
    def name(*flags):
        return e.parse(list(flags))[0].name

    weak = ("--method", "weak-at")
    paper = (*weak, "--preset", "paper")
    assert name() == "ours" and name("--method", "no-at") == "no-at" and name(*weak) == "weak-at"
    assert name("--positive", "transfer") == "ours-transfer"
    assert name("--method", "no-at", "--positive", "transfer") == "no-at-transfer"
    assert name("--positive", "mixed", "--attacked", "all") == "ours-mixed-all"
    assert name("--positive", "transfer", "--masks", "4") == "ours-transfer-masked"
    masked = "--method", "weak-at", "--masks", "4"
    assert name(*masked, "--attacked", "erased") == "weak-at-masked"
    with pytest.raises(run.UsageError, match="--masks: no image is left"):
        name(*masked)
    assert name(*weak, "--positive", "mixed", "--attacked", "all") == "weak-at"
    assert name("--method", "doa") == "doa-10"
    assert name("--method", "doa", "--candidates", "4") == "doa-4"
    assert name(*paper) == name(*paper, "--attack-steps", "10") == "weak-at"
    assert name(*paper, "--attack-steps", "7") == "weak-at-7"
    assert name(*weak, "--attack-steps", "10") == "weak-at-10"
    assert name(*weak, "--attack-steps", "2") == "weak-at"
    assert name("--attack-steps", "7") == "ours"


def test_an_unfinished_overwrite_keeps_the_old_result_and_is_not_taken_for_it(
    run_of, capsys, interrupted_at
):
    given = [*FLAGS, "--run", str(run_of("over")), *WEAK, "--select", "last"]
    folder = Path("runs/over/weak-at-1")
    assert e.main(given) == 0
    kept = {n: (folder / n).read_bytes() for n in ("result.json", "embedding.pt")}
    with interrupted_at(e, "train_step", 1):  # before the first checkpoint of the new training
        assert e.main([*given, "--overwrite", "--margin", "5"]) == 130
    assert {n: (folder / n).read_bytes() for n in kept} == kept
    capsys.readouterr()
    assert e.main(given) == 2 and "margin (5.0 before, 10.0 now)" in capsys.readouterr().err
    assert e.main([*given, "--margin", "5"]) == 0 and not (folder / "training.ckpt").exists()
    went_on = weights(folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["made_of"]["config"]["margin"] == 5
    assert e.main([*given, "--overwrite", "--margin", "5"]) == 0
    assert equal(weights(folder), went_on)


def test_verify_answers_eq1(run_of, capsys):
    from PIL import Image

    import data

    folder = run_of("verify")
    given = ["--run", str(folder), "--method", "weak-at", "--attack-steps", "3"]
    assert e.main([*FLAGS, *given]) == 0
    found = data.load("synthetic", persons=14, images_per_person=10)
    for i in (0, 1):
        Image.fromarray(found.images[i].permute(1, 2, 0).numpy()).save(f"{i}.png")
    capsys.readouterr()
    assert e.main(["--verify", "0.png", "0.png", *given]) == 0
    assert capsys.readouterr().out.rstrip().endswith("refused)  same person")
    assert e.main(["--verify", "0.png", "1.png", *given]) == 0
    out = capsys.readouterr().out.split()
    embed = e.load_embedding(folder / "weak-at-3/embedding.pt")
    a, b = (found.images[i : i + 1].float() / 255 for i in (0, 1))
    d = torch.stack([e.squared_distance(embed(v), embed(a)) for v in (b, b.flip(3))]).mean().sqrt()
    assert float(out[1]) == pytest.approx(float(d), abs=1e-3)
    assert e.main(["--verify", "0.png", "1.png", "--certified", *given]) == 2
    assert "attacks.py --attacks clean,rule" in capsys.readouterr().err
    assert e.main(["--certified", *given]) == 2
    assert "--verify A B" in capsys.readouterr().err
    assert e.main(["--verify", "0.png", "absent.png", *given]) == 2
    assert "absent.png" in capsys.readouterr().err
    assert e.main(["--verify", "0.png", "1.png", "--run", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    result = folder / "weak-at-3/result.json"
    for threshold in ("null", "NaN", "-1", "[]"):
        result.write_text(f'{{"threshold": {threshold}}}')
        assert e.main(["--verify", "0.png", "1.png", *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(result) in line and "train to the end first" in line


def test_the_shipped_embedding_answers_and_is_attacked_without_a_run(
    run_of, tmp_path, monkeypatch, capsys
):
    from PIL import Image

    import attacks
    import data
    import metrics

    folder = run_of("export").resolve()
    given = ["--run", str(folder), "--method", "weak-at", "--attack-steps", "3"]
    assert e.main([*FLAGS, *given]) == 0
    assert e.main([*FLAGS, *given, "--export", str(tmp_path / "F.pt")]) == 0
    assert e.main([*FLAGS, "--run", "nowhere", "--export", str(tmp_path / "none.pt")]) == 2
    assert not Path("nowhere").exists() and not (tmp_path / "none.pt").exists()
    monkeypatch.setattr(e, "SHIPPED", tmp_path / "F.pt")
    monkeypatch.chdir(tmp_path)
    whole, half = (e.load_embedding(p) for p in (folder / "weak-at-3/embedding.pt", e.SHIPPED))
    assert (tmp_path / "F.pt").stat().st_size < 0.6 * (
        folder / "weak-at-3/embedding.pt"
    ).stat().st_size
    found = data.load("synthetic", persons=14, images_per_person=10)
    one, other = (f(found.images[:9].float() / 255) for f in (whole, half))
    assert not torch.equal(one, other) and torch.allclose(one, other, rtol=5e-3, atol=5e-3)
    for i in (0, 1):
        Image.fromarray(found.images[i].permute(1, 2, 0).numpy()).save(f"{i}.png")
    capsys.readouterr()
    assert e.main(["--verify", "0.png", "1.png"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("F: data/F.pt, weak-at-3, trained on rendered faces")
    a, b = (found.images[i : i + 1].float() / 255 for i in (0, 1))
    d = torch.stack([e.squared_distance(half(v), half(a)) for v in (b, b.flip(3))]).mean().sqrt()
    assert float(second.split()[1]) == pytest.approx(float(d), abs=1e-3)
    assert attacks.main(["--attacks", "clean"]) == 0
    assert metrics.read_run("runs/shipped").methods["weak-at-3"]["clean"].rows
    capsys.readouterr()
    # a run of one's own is asked, not this one
    Path("runs/synthetic-demo-0").mkdir()
    assert e.main(["--verify", "0.png", "1.png"]) == 2
    assert "train to the end first" in capsys.readouterr().err
    e.SHIPPED.unlink()
    assert attacks.main(["--attacks", "clean"]) == 2
    assert "F.pt" in capsys.readouterr().err


def test_a_generator_that_saw_the_test_persons_is_refused(run_of, capsys):
    folder = run_of("leak")
    content = torch.load(folder / "generator.pt", weights_only=True)
    seen = json.loads((folder / "people.json").read_text())["target"][0]
    torch.save({**content, "train": [*content["train"], seen]}, folder / "generator.pt")
    assert e.main([*FLAGS, "--run", str(folder)]) == 2
    assert seen in capsys.readouterr().err


def test_a_missing_or_broken_generator_is_one_line(project, monkeypatch, capsys):
    """Before any training; the demo on rendered faces has the one in data/, if it is there."""
    monkeypatch.chdir(project)
    checkout, folder = Path("checkout"), Path("runs/without")
    monkeypatch.setattr(e, "__file__", str(checkout.resolve() / "embed.py"))
    given = [*FLAGS, "--run", str(folder)]
    assert e.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    command = (
        "python generator.py --preset demo --validation-persons 3 --target-persons 3 "
        "--synthetic-persons 14 --synthetic-images 10 --run runs/without"
    )
    assert line == f"embed.py: {folder}/generator.pt: no generator in this run yet: {command}"
    (folder / "generator.pt").write_bytes(b"no checkpoint")
    assert e.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("embed.py: ") and f"{folder}/generator.pt" in line
    (folder / "generator.pt").unlink()
    shipped = checkout / "data" / "generator_demo.pt"
    shipped.parent.mkdir(parents=True)
    shutil.copy("runs/synthetic-demo-0/generator.pt", shipped)
    assert e.main([*given, "--steps", "1"]) == 0 and "the demo's own" in capsys.readouterr().out
    assert (folder / "generator.pt").read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--method", "nonsense"], "nonsense"),
        (["--data", "folder", "--root", "absent"], "absent"),
        (["--data", "folder", "--root", "empty"], "empty"),
        (["--persons", "5000"], "--persons"),
        (["--persons", "1"], "--persons 1: give 2 or more"),
        (["--validation-persons", "1"], "--validation-persons 1"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--steps", "3.5"], "--steps"),
        (["--cutout-area", "0.2,0.1"], "--cutout-area 0.2,0.1"),
        (["--method", "doa", "--attacked", "erased"], "--attacked erased"),
        (["--device", "nonsense"], "--device nonsense: cannot be used here"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--resume"], "--resume"),
    ],
)
def test_bad_input_is_one_line_and_status_2(project, monkeypatch, capfd, flags, named):
    monkeypatch.chdir(project)
    Path("empty").mkdir(exist_ok=True)
    assert e.main([*FLAGS, *flags, "--run", "runs/bad", "--overwrite"]) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("embed.py:")]
    assert len(err) == 1 and named in err[0]
    assert not Path("runs/bad/ours/embedding.pt").exists()


def test_checkpoints_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = e.Embedding(1 / 32, 16).state_dict()

    def put(name, **config):
        config = {**dataclasses.asdict(e.Config(**TINY)), **config}
        run.save(name, "embedding", config=config, model=state)

    put("good.pt")
    e.load_embedding("good.pt")
    put("width.pt", width=0.125)
    put("huge.pt", width=60)  # a small file that asks for a huge network
    run.save("other.pt", "generator", model=state)
    run.save("list.pt", "embedding", config=[1, 2], model=state)
    begun = time.perf_counter()
    for name in ("width.pt", "huge.pt", "other.pt", "list.pt", "absent.pt"):
        with pytest.raises(run.UsageError, match=name) as error:
            e.load_embedding(name)
        assert "\n" not in str(error.value)
        assert ("do not fit together" in str(error.value)) == (
            name not in ("other.pt", "absent.pt")
        )
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_names_itself_the_images_and_the_checkpoint(
    run_of, monkeypatch, capsys, what
):
    real, calls = e.two_pair_loss, []

    def broken(fx, *args):
        loss = real(fx, *args)
        if not loss.requires_grad:  # validation
            return loss
        calls.append(1)
        if len(calls) < 4:
            return loss
        # finite, but not its gradient
        return loss * math.nan if what == "loss" else loss + (fx * 0).abs().sqrt().sum()

    folder = run_of(what)
    monkeypatch.setattr(e, "two_pair_loss", broken)
    assert e.main([*FLAGS, "--run", str(folder), *WEAK]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    left = folder / "weak-at-1/training.ckpt"
    assert "step 4: loss" in told and "images [" in told and str(left) in told
    assert run.load(left, "training")["step"] == 2
    faces, split = data_of(folder)
    first = int(told.split("images [")[1].split(",")[0])
    assert f"the first is {faces.files[first]};" in told
    assert faces.person[first] in split.train


def data_of(folder):
    import data

    return data.open_run(e.parse(FLAGS)[0], folder)


def test_what_a_run_was_made_of_is_held_against_it(run_of, capsys, interrupted_at):
    """Other persons, another split, another G, damaged records: one line that names the file, never
    a result that mixes them."""
    import attacks
    import data

    folder = run_of("made-of")
    given = [*FLAGS, "--run", str(folder)]

    def refused(told, argv, main=e.main):
        capsys.readouterr()
        assert main([str(v) for v in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if line and "rendering faces" not in line]
        assert len(lines) == 1 and told in lines[0], lines

    def put(path, content):
        before = path.read_bytes()
        if path.suffix in (".pt", ".ckpt"):
            torch.save(content, path)
        else:
            path.write_text(content)
        return before

    with interrupted_at(e, "train_step", 4):
        assert e.main(given) == 130
    content = torch.load(folder / "generator.pt", weights_only=True)
    other = content | {"lord": {k: v / 2 for k, v in content["lord"].items()}}
    good = put(folder / "generator.pt", other)
    refused("training.ckpt: another training: generator (", given)
    (folder / "generator.pt").write_bytes(good)
    part = folder / "ours/training.ckpt"
    state = torch.load(part, weights_only=True)
    for name in ("images", "people"):
        good = put(part, state | {"made_of": state["made_of"] | {name: "0" * 16}})
        refused(f"training.ckpt: another training: {name} (", given)
        part.write_bytes(good)
    faces, split = data_of(folder)
    people = folder / "people.json"
    good, other = people.read_bytes(), data.split_persons(faces, None, 3, 3, seed=1)
    data.write_manifest(people, faces, dataclasses.replace(other, seed=0))
    refused("training.ckpt: another training: people (", given)
    people.write_bytes(good)
    assert e.main(given) == 0 and [line["step"] for line in log_of(folder / "ours")] == [2, 4, 6]

    asked = [*given, "--method", "no-at"]
    refused("is another split: split seed (0 there, 5 asked for)", [*asked, "--split-seed", 5])
    refused("target persons (3 there, 2 asked for)", [*asked, "--target-persons", 2])
    train, target = split.train[:-1] + split.target[:1], (*split.target[1:], split.train[-1])
    data.write_manifest(people, faces, dataclasses.replace(split, train=train, target=target))
    refused("result.json: another training: people (", given)
    few = ["--run", folder, "--targets", 2, "--intruders", 2]
    refused("trained on other persons", few, attacks.main)
    people.write_bytes(good)

    result = folder / "ours/result.json"
    for text in ("{", "[]", "{}"):
        good = put(result, text)
        refused("result.json", given)
        result.write_bytes(good)
    about, wrong = folder / "run.json", ('"options": 5', '"seed": "x"', '"data": 3')
    for text in ("[]", "{}", *(f'{{"data": "synthetic", {part}}}' for part in wrong)):
        good = put(about, text)
        refused("run.json", ["--run", folder, "--targets", 2], attacks.main)
        about.write_bytes(good)
    for main, start in ((attacks.main, ["--run", folder]), (g.main, GENERATOR_FLAGS)):
        refused("--device nonsense: cannot be used here", [*start, "--device", "nonsense"], main)


def photographs(root, persons=10, each=10, side=80):
    for p in range(persons):
        (root / f"p{p}").mkdir(parents=True)
        for i in range(each):
            pixels = torch.randint(256, (side, side, 3), generator=rng(p * each + i)).byte()
            Image.fromarray(pixels.numpy()).save(root / f"p{p}" / f"{i}.png")


def test_photographs_that_moved_go_on_with_the_run_and_verify_takes_its_crop(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "here")
    flags = [f for f in FLAGS if not f.startswith("--synthetic") and f not in ("14", "10")]
    flags = ["--data", "folder", "--crop", "none", "--run", "run", *WEAK, *flags]
    assert e.main(["--root", "here", *flags]) == 0
    (tmp_path / "here").rename("there")
    capsys.readouterr()
    assert e.main(["--root", "there", *flags]) == 0
    assert "is trained already" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(data, "load_image", lambda path, crop, size: asked.append(crop) or ONE)
    two = ["there/p0/0.png", "there/p0/1.png", "--run", "run", "--method", "weak-at"]
    assert e.main(["--verify", *two, "--attack-steps", "2"]) == 0
    assert asked == ["none", "none"]  # 80 x 80 alone would be centre
    (tmp_path / "there/p3/4.png").write_bytes((tmp_path / "there/p3/5.png").read_bytes())
    assert e.main(["--root", "there", *flags]) == 2  # another photograph is another training
