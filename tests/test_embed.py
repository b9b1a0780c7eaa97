"""embed.py: the equations, sampling, the inner attacks, DOA's search, training, resuming and the command."""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import embed as e
import generator as g
from tests.test_generator import FLAGS as GENERATOR_FLAGS
from tests.test_generator import Evil

TINY = dict(preset="demo", data="synthetic", width=1 / 32, dim=16, standardise=True, batch=6, attack_steps=2, attack_alpha=32.0)
FLAGS = (
    "--synthetic-persons 14 --synthetic-images 10 --validation-persons 3 --target-persons 3 --width 0.03125 --dim 16 --batch 6 "
    "--steps 6 --validate-every 2 --attack-steps 2 --no-evaluation"
).split()


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


# ---------------------------------------------------------------------------------------------------------- equations
def test_eq1_decides_by_the_distance():
    target, candidate = torch.zeros(3, 4), torch.tensor([[2.9, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.1, 0]])
    assert e.different(candidate, target, 3.0).tolist() == [False, True, True]


def test_eq2_and_the_released_hinge():
    fx, fy, ft, fu = torch.randn(4, 7, 3, generator=rng())
    plus, minus = ((fx - fy) ** 2).sum(1), ((ft - fu) ** 2).sum(1)
    torch.testing.assert_close(e.two_pair_loss(fx, fy, ft, fu, 10.0, "squared"), (plus + (10 - minus).clamp(min=0)).mean())
    torch.testing.assert_close(e.two_pair_loss(fx, fy, ft, fu, 10.0), (plus + (10 - minus.sqrt()).clamp(min=0) ** 2).mean())
    far = fu + 100
    assert e.two_pair_loss(fx, fx, far, fu, 10.0) == e.two_pair_loss(fx, fx, far, fu, 10.0, "squared") == 0


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
    convs = [m for m in f.trunk if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert f.weight.shape == (128, 2048)
    torch.manual_seed(0)
    small = e.Embedding(1 / 8, 16, standardise=True)
    x = torch.rand(3, 3, 64, 64)
    before = small(x)
    small.weight.data *= 7  # the constraint is on the weights, whatever their stored length
    torch.testing.assert_close(small(x), before)
    assert before.shape == (3, 16) and not torch.allclose(before.norm(dim=1), torch.ones(3), atol=0.1)
    assert float(before.detach().min()) < 0  # no final ReLU


def test_vgg_weights_start_the_trunk(tmp_path):
    f = e.Embedding()
    state = {f"features.{k}": torch.randn_like(v) for k, v in f.trunk.state_dict().items()} | {"classifier.0.bias": torch.zeros(3)}
    f.load_vgg(state)
    assert torch.equal(f.trunk[0].weight, state["features.0.weight"])
    with pytest.raises(RuntimeError):
        e.Embedding(0.5).load_vgg(state)


# ------------------------------------------------------------------------------------- the script's forms and the kernels'
def test_script_forms_are_the_kernels_references():
    import ast

    from kernels import augment as moves
    from kernels import gaussian_cutout as cutout
    from kernels import masked_step as step
    from kernels import window_energy as energy

    source = Path(e.__file__).read_text()
    tree = ast.parse(source)
    names = ("box_mask", "masked_step", "draw_boxes", "gaussian_cutout", "window_energy", "augment")
    kept = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    space = {"torch": torch, "Tensor": torch.Tensor}
    exec(compile(ast.Module([ast.parse("from __future__ import annotations").body[0], *kept], []), "embed.py", "exec"), space)  # noqa: S102
    images = torch.rand(40, 3, 17, 23)
    boxes = space["draw_boxes"](40, 17, 23, 0.5, (0.02, 0.2), (0.5, 2.0), rng(3))
    assert torch.equal(boxes, cutout.draw_boxes(40, 17, 23, 0.5, (0.02, 0.2), (0.5, 2.0), rng(3)))
    assert 8 < int((boxes[:, 2] > 0).sum()) < 32
    for fill in ("gaussian", "uniform"):
        script, ref = (f(images, fill=fill, generator=rng(4), boxes=boxes) for f in (space["gaussian_cutout"], cutout.gaussian_cutout_ref))
        assert all(torch.equal(a, b) for a, b in zip(script, ref))
    noise = torch.rand_like(images)
    three = [f(images, boxes=boxes, noise=noise)[0] for f in (space["gaussian_cutout"], cutout.gaussian_cutout_ref, cutout.gaussian_cutout)]
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])
    pixels, (flips, shifts) = torch.randint(0, 256, images.shape, dtype=torch.uint8), e.draw_moves(40, 5, rng(5))
    for given in (noise, None):
        settings = dict(flips=flips, shifts=shifts, boxes=boxes, noise=given, layout=torch.channels_last)
        three = [f(pixels, generator=rng(4), **settings) for f in (space["augment"], moves.augment_ref, moves.augment)]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*three))
        assert three[0][0].stride() == three[1][0].stride()
    grad, alpha = torch.randn_like(images), torch.randn(40)
    grad[:, :, ::2] = 0
    three = [f(images, grad, alpha, boxes) for f in (space["masked_step"], step.masked_step_ref, step.masked_step)]
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])
    whole = torch.randint(-9, 9, (4, 3, 17, 23)).float()  # sums without rounding
    three = [f(whole, 5, 8, 3) for f in (space["window_energy"], energy.window_energy_ref, energy.window_energy)]
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])


def test_rectangles_are_those_of_appendix_a():
    boxes = e.draw_boxes(4000, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng()).double()
    top, left, h, w = boxes.unbind(1)
    area, aspect = h * w / 64**2, h / w
    assert 0.015 < float(area.min()) < 0.025 and 0.19 < float(area.max()) < 0.21
    assert float(area.mean()) == pytest.approx(0.11, abs=0.004)
    assert 0.45 < float(aspect.min()) and float(aspect.max()) < 2.2
    assert int((top + h).max()) == 64 and int((left + w).max()) == 64 and int(top.min()) == int(left.min()) == 0


def test_augment_mirrors_and_shifts_with_edges_filled():
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)

    def augmented():
        generator = rng()
        flips, shifts = e.draw_moves(64, 2, generator)
        return e.augment(images, flips=flips, shifts=shifts, boxes=torch.zeros(64, 4, dtype=torch.long), generator=generator)[0]

    out = augmented()
    padded = torch.nn.functional.pad(images.float() / 255, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for i in range(64):
        options = {
            (m, r, c): (padded[i, :, r : r + 16, c : c + 16].flip(2) if m else padded[i, :, r : r + 16, c : c + 16])
            for m in (0, 1) for r in range(5) for c in range(5)
        }  # fmt: skip
        match = [k for k, v in options.items() if torch.equal(v, out[i])]
        assert len(match) == 1
        seen.add(match[0])
    assert len({k[0] for k in seen}) == 2 and len(seen) > 20
    assert torch.equal(augmented(), out)


# ----------------------------------------------------------------------------------------------------------- inner attacks
def test_inner_attack_moves_each_sample_its_way_and_stays_in_its_rectangle():
    embed, images = linear(), torch.rand(6, 3, 64, 64, generator=rng())
    anchors = embed(torch.rand(6, 3, 64, 64, generator=rng(1)))
    sign = torch.tensor([1.0, 1, 1, -1, -1, -1])
    boxes = torch.tensor([[0, 0, 10, 10], [54, 50, 10, 14], [5, 9, 30, 20]] * 2)
    found = e.inner_attack(embed, images, anchors, sign, boxes, 5, 16 / 255)
    before, after = (e.squared_distance(embed(v), anchors) for v in (images, found))
    assert bool(((after - before) * sign > 0).all())
    outside = ~e.box_mask(boxes, 64, 64).expand_as(images)
    assert torch.equal(found[outside], images[outside])
    assert float(found.min()) >= 0 and float(found.max()) <= 1 and not torch.equal(found, images)
    one = e.inner_attack(embed, images, anchors, sign, boxes, 1, 16 / 255)
    assert float((one - images).abs().max()) <= 16 / 255 + 1e-6
    assert torch.equal(e.inner_attack(embed, images, anchors, sign, boxes, 0, 16 / 255), images)


def test_inner_attack_on_windows_is_the_one_on_whole_images(monkeypatch):
    from kernels.masked_step import masked_step_ref

    monkeypatch.setattr(e, "masked_step", masked_step_ref)  # in float64, where rounding turns no sign
    torch.manual_seed(0)
    f, ran = e.Embedding(1 / 16, 16, standardise=True).double(), []
    images, other = torch.rand(2, 24, 3, 64, 64, generator=rng(), dtype=torch.float64)
    anchors, sign = f(other).detach(), torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(12)
    boxes = e.draw_boxes(24, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng(3))
    boxes[:6] = torch.tensor([[0, 0, 5, 9], [57, 0, 7, 7], [0, 60, 12, 4], [61, 61, 3, 3], [0, 0, 64, 64], [9, 9, 0, 0]])
    call = e.PatchLocal.__call__
    monkeypatch.setattr(e.PatchLocal, "__call__", lambda self, x: ran.append(x.shape) or call(self, x))
    for several in (boxes, boxes[:1].repeat(24, 1), boxes[3:4]):
        n, ran[:] = len(several), []
        near, whole = (e.inner_attack(f, images[:n], anchors[:n], sign[:n], several, 3, 0.1, local=v) for v in (True, False))
        assert ran and ran[0][2] < 64 and float((near - whole).abs().max()) < 1e-9 and not torch.equal(whole, images[:n])
    for rows, window in e.box_windows(boxes, 64, 64):
        assert bool((window[:, :2] <= boxes[rows, :2]).all()) and bool((window[:, :2] >= 0).all())
        assert bool((window[:, :2] + window[:, 2:] >= boxes[rows, :2] + boxes[rows, 2:]).all()) and bool((window[:, :2] + window[:, 2:] <= 64).all())
        assert bool((window[:, :2] % 4 == 0).all()) and len(window[:, 2:].unique(dim=0)) == 1
    assert sorted(torch.cat([rows for rows, _ in e.box_windows(boxes, 64, 64)]).tolist()) == list(range(24))


def test_inner_attack_computes_no_weight_gradients():
    f = e.Embedding(1 / 32, 16)
    e.inner_attack(f, torch.rand(2, 3, 64, 64), torch.zeros(2, 16), torch.ones(2), torch.tensor([[0, 0, 9, 9]] * 2), 2, 0.1)
    assert all(p.grad is None for p in f.parameters())


@pytest.mark.parametrize("size, stride", [(20, 5), (10, 5), (10, 1), (64, 5), (20, 7)])
def test_positions_are_the_enumerated_list(size, stride):
    starts = list(range(0, 64 - size + 1, stride))
    starts += [64 - size] if starts[-1] != 64 - size else []
    assert e.positions(64, 64, size, stride).tolist() == [[r, c] for r in starts for c in starts]


def test_window_energy_is_the_brute_force_sum():
    grad = torch.randn(3, 3, 64, 64, generator=rng())
    grad[1] *= 1e3 * (torch.arange(64) < 8)  # large beside small: running sums would lose the small ones
    places = e.positions(64, 64, 20, 5)
    wanted = torch.stack([(grad.double()[:, :, r : r + 20, c : c + 20] ** 2).sum((1, 2, 3)) for r, c in places.tolist()], 1)
    torch.testing.assert_close(e.window_energy(grad, 20, 20, 5).double(), wanted, rtol=1e-5, atol=0)


def test_doa_paints_positives_away_and_negatives_towards_the_anchor():
    """Every candidate is compared by hand; the opposite sign for the negatives would choose another window."""
    embed, images = linear(), torch.rand(4, 3, 64, 64, generator=rng())
    anchors = embed(torch.rand(4, 3, 64, 64, generator=rng(1)))
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
    places = e.positions(64, 64, 20, 5)
    got = e.doa_boxes(embed, images, anchors, sign, 20, 5, len(places))
    for i in range(4):
        d = []
        for r, c in places.tolist():
            grey = images[i : i + 1].clone()
            grey[:, :, r : r + 20, c : c + 20] = 0.5
            d.append(float(e.squared_distance(embed(grey), anchors[i : i + 1])))
        best = d.index(max(d) if sign[i] > 0 else min(d))
        assert got[i].tolist() == [*places[best].tolist(), 20, 20]
        assert d.index(max(d)) != d.index(min(d))
    few = e.doa_boxes(embed, images, anchors, sign, 20, 5, 1)  # one candidate: the window of the largest gradient
    x = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(e.squared_distance(embed(x), anchors).sum(), x)
    assert few[:, :2].tolist() == places[e.window_energy(grad, 20, 20, 5).argmax(1)].tolist()


# ------------------------------------------------------------------------------------------------------ sampling and mining
def test_sampler_draws_persons_evenly_and_pairs_truly():
    person = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 2, 2])[torch.randperm(10, generator=rng())]
    s = e.Sampler(torch.zeros(10, 3, 64, 64, dtype=torch.uint8), person)
    x, other, t = s.draw(3000, 2, rng())
    assert bool((person[t] != person[x][:, None]).all())
    share = person[x].bincount() / 3000
    assert float((share - 1 / 3).abs().max()) < 0.05  # persons evenly, however many images they have
    assert len(other.unique()) == 10
    x, y, t = s.draw(3000, 1, rng(), pairs=True)
    assert bool((person[x] == person[y]).all()) and bool((x != y).all()) and bool((person[t[:, 0]] != person[x]).all())
    assert set(person[x].tolist()) == {0, 2}  # a person with one image gives no pair
    assert len({(a, b) for a, b in zip(x.tolist(), y.tolist())}) == 7 * 6 + 2


@pytest.mark.parametrize("method", e.METHODS)
def test_mining_keeps_the_nearest_candidate(method, monkeypatch):
    images, person = faces()
    config = e.Config(**{**TINY, "method": method, "mine": 3})
    embed, sampler = linear(), e.Sampler(images, person)
    kept = {}

    def draw(*args, **kwargs):
        kept["draw"] = e.Sampler.draw(sampler, *args, **kwargs)
        return kept["draw"]

    monkeypatch.setattr(sampler, "draw", draw, raising=False)
    monkeypatch.setattr(e, "augment", lambda v, boxes, **settings: (v.float() / 255, boxes, None))
    made = (images.float() / 255).flip(2)
    make = (lambda identity, content, pixels: (made[identity] + made[content]) / 2) if config.generated else None
    batch = e.make_batch(dataclasses.replace(config, cutout=0.0), embed, sampler, make, rng())
    x, other, t = kept["draw"]
    for i in range(config.batch):
        reals = images[t[i]].float() / 255
        against = (made[x[i]] + made[t[i]]) / 2 if config.generated else (images[x[i]].float() / 255)[None].expand(3, -1, -1, -1)
        best = int(e.squared_distance(embed(reals), embed(against)).argmin())
        assert torch.equal(batch["t"][i], reals[best])
        if config.generated:
            assert torch.equal(batch["u"][i], against[best])  # u belongs to the t that was kept
            assert torch.equal(batch["y"][i], made[x[i]])
        else:
            assert torch.equal(batch["y"][i], images[other[i]].float() / 255) and batch["u"] is batch["y"]
    torch.testing.assert_close(batch["anchor_t"], embed(batch["u"]))
    torch.testing.assert_close(batch["anchor_x"], embed(batch["y"]))


def test_what_each_method_attacks():
    images, person = faces()
    sampler, embed = e.Sampler(images, person), linear()
    make = lambda identity, content, pixels: images[content].float() / 255
    for method, share in (("ours", "half"), ("no-at", "none"), ("weak-at", "all"), ("doa", "all")):
        config = e.Config(**{**TINY, "method": method, "batch": 64, "candidates": 4})
        batch = e.make_batch(config, embed, sampler, make if config.generated else None, rng())
        x, t = e.attack_batch(config, embed, batch, rng(1))
        changed = torch.cat([(x != batch["x"]).flatten(1).any(1), (t != batch["t"]).flatten(1).any(1)]).float().mean()
        erased = torch.cat([batch["x_boxes"], batch["t_boxes"]])[:, 2].gt(0).float().mean()
        assert {"half": 0.3 < changed < 0.7, "none": changed == 0, "all": changed == 1}[share], method
        assert (erased > 0.3) == (method in ("ours", "no-at"))
        moved = (x != batch["x"]).any(1).float().mean((1, 2))  # share of the pixels of each image
        if method == "weak-at":
            assert float(moved.max()) < 0.11
        if method == "doa":
            assert float(moved.max()) <= 400 / 4096 and float(moved.min()) > 0.08


def test_the_inner_step_grows_over_the_warmup():
    config = e.Config(attack_alpha=32.0, attack_warmup=4)
    assert [config.alpha(step) for step in (0, 1, 3, 4, 9)] == [0.0, 8.0, 24.0, 32.0, 32.0]
    assert e.Config(attack_alpha=32.0).alpha(0) == 32.0


def test_transfer_takes_another_images_content():
    images, person = faces()
    asked = []
    make = lambda identity, content, pixels: asked.append((identity, content)) or images[content].float() / 255
    for positive in ("reconstruct", "transfer"):
        e.make_batch(e.Config(**{**TINY, "positive": positive}), linear(), e.Sampler(images, person), make, rng())
    (same, own), _, (identity, content), _ = asked
    assert torch.equal(same, own) and not torch.equal(identity, content)


# -------------------------------------------------------------------------------------------------------------- validation
def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    genuine, intruder = torch.rand(50, generator=rng()).mul(10).round(), torch.rand(80, generator=rng(1)).mul(14).round()
    truth = torch.cat([torch.zeros(50), torch.ones(80)])
    assert e.auroc(genuine, intruder) == pytest.approx(roc_auc_score(truth, torch.cat([genuine, intruder])))


def test_threshold_refuses_the_asked_share_of_genuine_pairs():
    images, person = faces(6, 6)
    embed = linear()
    delta = e.genuine_threshold(embed, images, person, fpr=0.05)
    floats, d = images.float() / 255, []
    for i in range(len(images)):
        for j in range(len(images)):
            if i != j and person[i] == person[j]:
                anchor = embed(floats[j : j + 1])
                both = [e.squared_distance(embed(v), anchor) for v in (floats[i : i + 1], floats[i : i + 1].flip(3))]
                d.append(float(torch.stack(both).mean().sqrt()))
    assert delta == pytest.approx(float(torch.tensor(d).quantile(0.95)), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("method", e.METHODS)
def test_a_random_start_trains(method):
    images, person = faces(8, 6)
    config = e.Config(**{**TINY, "method": method, "batch": 16, "width": 1 / 16, "attack_steps": 1, "attack_alpha": 8.0})
    torch.manual_seed(0)
    f = e.Embedding(config.width, config.dim, config.standardise)
    adam = torch.optim.Adam(f.parameters(), lr=1e-3)
    sampler = e.Sampler(images, person)
    make = (lambda identity, content, pixels: images[identity].float() / 255) if config.generated else None
    losses = [e.train_step(config, f, adam, sampler, make, rng(i))["loss"] for i in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_collapse_and_non_finite_values_are_noticed():
    config = e.Config(**TINY)
    assert e.collapsed({"d_negative": 0.01}, config) and not e.collapsed({"d_negative": 4.0}, config)
    images, person = faces()
    f = e.Embedding(1 / 32, 16)
    f.bias.data[0] = math.nan
    adam = torch.optim.Adam(f.parameters())
    before = f.weight.clone()
    with pytest.raises(FloatingPointError, match="images"):
        e.train_step(dataclasses.replace(config, method="weak-at"), f, adam, e.Sampler(images, person), None, rng())
    assert torch.equal(f.weight, before)


@pytest.mark.parametrize("method", ["ours", "weak-at"])
def test_profile_adds_up_and_counts_every_product(method, monkeypatch, capsys):
    config = e.Config(**{**TINY, "method": method, "local": False})
    images, person = faces()
    monkeypatch.setattr(e, "find_generator", lambda *_: None)
    monkeypatch.setattr(e, "maker", lambda *_: lambda identity, content, pixels: images[identity].float() / 255)
    faces_, split = SimpleNamespace(images=images, person=person), SimpleNamespace(train=list(range(5)))
    found = e.profile(config, Path(), faces_, split, None, torch.device("cpu"), 1)
    step, flops, rate = (found.pop(k) for k in ("step", "flops", "rate"))
    assert list(found) == ["data", "generator", "mining", "inner attack", "update"] and found["data"] > 0 and rate > 1e8
    assert sum(found.values()) == pytest.approx(step) and min(found["mining"], found["inner attack"]) > 0
    assert (found["generator"] > 0) == (method == "ours")
    out = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in out[:6]] == [*found, "step"] and f"{flops / step / rate:.0%} of the" in out[6]
    if method == "weak-at":  # passes of F: one to mine y, one x, two t; two each attacked image and step; three in the update
        sides = [64, 64, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4]
        convs = [m for m in e.Embedding(config.width, config.dim).trunk if isinstance(m, torch.nn.Conv2d)]
        each = [2 * 9 * m.in_channels * m.out_channels * n * n for m, n in zip(convs, sides)] + [2 * 4 * convs[-1].out_channels * config.dim]
        assert flops == config.batch * (sum(each) * (4 + 2 * 2 * config.attack_steps + 3 * 3) - 3 * each[0])


# ------------------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder (with a space in its name) that holds a tiny run with its generator."""
    folder = tmp_path_factory.mktemp("a project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert g.main(GENERATOR_FLAGS) == 0
    return folder


@pytest.mark.parametrize("flags", [[], ["--method", "no-at"], ["--positive", "transfer"], ["--method", "weak-at"], ["--method", "doa"]])
def test_interrupted_and_resumed_training_is_bit_for_bit_the_unbroken_one(project, monkeypatch, capsys, interrupted_at, flags):
    monkeypatch.chdir(project)
    config, _ = e.parse([*FLAGS, *flags])
    folder = config.run / config.name
    assert e.main([*FLAGS, *flags]) == 0
    whole = torch.load(folder / "embedding-last.pt", weights_only=True)["model"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4, 6] and all(0 <= line["val_auroc"] <= 1 for line in log)
    assert {"loss", "d_positive", "d_negative", "val_loss", "seconds"} <= set(log[0])
    result = json.loads((folder / "result.json").read_text())
    assert result["threshold"] > 0 and result["config"]["method"] == config.method
    assert e.main([*FLAGS, *flags]) == 0 and "already" in capsys.readouterr().out
    assert e.main([*FLAGS, *flags, "--margin", "3"]) == 2 and "margin" in capsys.readouterr().err

    with interrupted_at(e, "train_step", 6):
        assert e.main([*FLAGS, *flags, "--overwrite"]) == 130 and "--resume" in capsys.readouterr().err
    assert e.main([*FLAGS, *flags]) == 2 and "--resume" in capsys.readouterr().err
    assert e.main([*FLAGS, *flags, "--resume", "--rate", "0.5"]) == 2 and "rate" in capsys.readouterr().err
    assert e.main([*FLAGS, *flags, "--resume"]) == 0
    resumed = torch.load(folder / "embedding-last.pt", weights_only=True)["model"]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    repeated = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in repeated] == [
        {k: v for k, v in line.items() if k != "seconds"} for line in log
    ]


def test_the_whole_chain_prints_the_table_and_json(project, monkeypatch, capsys):
    import metrics

    monkeypatch.chdir(project)
    flags = [f for f in FLAGS if f != "--no-evaluation"]
    shutil.copytree("runs/synthetic-demo-0", "runs/chain", ignore=shutil.ignore_patterns("ours*", "no-at", "weak-at*", "doa*"))
    assert e.main([*flags, "--run", "runs/chain", "--method", "weak-at", "--attack-steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "eyeglasses" in out and "clean" in out
    assert metrics.main(["--run", "runs/chain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["weak-at-1"]
    for attack in ("clean", "eyeglasses"):
        assert 0 <= found[attack]["auroc"] <= 1 and 0 <= found[attack]["aupr"] <= 1 and found[attack]["n_targets"] == 3
        assert len(found[attack]["interval"]) == 2

    # Fig. 3 against a loop
    config = e.parse([*flags, "--method", "weak-at", "--attack-steps", "1"])[0]
    faces, split = e.open_run(config, Path("runs/chain"))
    embed = e.load_embedding("runs/chain/weak-at-1/embedding.pt")
    lord, _ = g.load_generator("runs/chain/generator.pt")
    lines = [line.split(",") for line in Path("runs/chain/weak-at-1/attacks/figure3.csv").read_text().splitlines()]
    assert lines[0] == ["kind", "distance"] and [k for k, _ in lines[1:]] == ["real-real"] * 500 + ["real-generated"] * 500
    images = faces.images[torch.isin(faces.person, torch.tensor(split.target))]
    person = torch.arange(3).repeat_interleave(10)
    x, _, t = e.Sampler(images, person).draw(500, 1, rng(config.seed))
    assert (person[x] != person[t[:, 0]]).all()
    images = images.float() / 255
    for k in (0, 1, 499):
        a, b = images[t[k]], images[x[k]][None]
        with torch.no_grad():
            u = lord.generator(lord.class_encoder(b), lord.content_encoder(a))
            real, made = ((embed(a) - embed(v)).norm() for v in (b, (u * 255).round() / 255))
        assert float(lines[1 + k][1]) == pytest.approx(float(real), rel=1e-3, abs=1e-4)
        assert float(lines[501 + k][1]) == pytest.approx(float(made), rel=1e-2, abs=1e-3)
    before = Path("runs/chain/weak-at-1/attacks/figure3.csv").read_bytes()
    e.write_figure3(config, Path("runs/chain"), faces, split, torch.device("cpu"))
    assert Path("runs/chain/weak-at-1/attacks/figure3.csv").read_bytes() == before


def test_truth_renders_y_and_u_from_the_factors(project, monkeypatch, capsys):
    from data import synthetic

    monkeypatch.chdir(project)
    config, _ = e.parse([*FLAGS, "--truth"])
    faces, split = e.open_run(config, Path("runs/truth"))
    pick = torch.isin(faces.person, torch.tensor(split.train))
    images, person = faces.images[pick], faces.person[pick]
    make = e.true_maker(faces, pick, torch.device("cpu"))
    i, k = torch.tensor([0, 13]), torch.tensor([25, 4])
    assert torch.equal(make(i, i, images), images[i].float() / 255)  # y is x itself
    want = synthetic.render(faces.identity[person[i]], faces.content[pick][k]).float() / 255
    assert torch.equal(make(i, k, images), want) and not torch.equal(want, images[k].float() / 255)
    assert e.main([*FLAGS, "--truth", "--run", "runs/truth"]) == 0
    assert Path("runs/truth/ours-truth/embedding.pt").exists() and not Path("runs/truth/generator.pt").exists()
    with pytest.raises(e.UsageError, match="--truth"):
        e.true_maker(dataclasses.replace(faces, identity=None), pick, torch.device("cpu"))


def test_the_folder_of_each_method():
    def name(*flags):
        return e.parse(list(flags))[0].name

    assert [name(*flags) for flags in e.TRAININGS.values()] == list(e.TRAININGS)
    weak = ("--method", "weak-at")
    assert name(*weak, "--preset", "paper") == "weak-at" and name(*weak, "--preset", "paper", "--attack-steps", "10") == "weak-at"
    assert name(*weak, "--preset", "paper", "--attack-steps", "7") == "weak-at-7"
    assert name(*weak, "--attack-steps", "10") == "weak-at-10" and name(*weak, "--attack-steps", "5") == "weak-at"
    assert name("--truth") == "ours-truth" and name("--truth", "--positive", "transfer") == "ours-transfer-truth"
    assert name("--attack-steps", "7") == "ours" and name("--method", "no-at", "--positive", "transfer") == "no-at-transfer"


def test_an_unfinished_overwrite_keeps_the_old_result_and_is_not_taken_for_it(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    flags = [*FLAGS, "--run", "runs/over", "--method", "weak-at", "--attack-steps", "1"]
    folder = Path("runs/over/weak-at-1")
    assert e.main(flags) == 0
    kept = {n: (folder / n).read_bytes() for n in ("result.json", "embedding.pt")}

    def stopped(*args):
        raise KeyboardInterrupt

    step = e.train_step
    monkeypatch.setattr(e, "train_step", stopped)
    assert e.main([*flags, "--overwrite", "--margin", "5"]) == 130  # before the first checkpoint of the new training
    monkeypatch.setattr(e, "train_step", step)
    assert {n: (folder / n).read_bytes() for n in kept} == kept
    capsys.readouterr()
    assert e.main(flags) == 2 and "unfinished" in capsys.readouterr().err  # not "trained already"
    assert e.main([*flags, "--resume"]) == 2 and "margin" in capsys.readouterr().err
    assert e.main([*flags, "--resume", "--margin", "5"]) == 0 and not (folder / "training.ckpt").exists()
    resumed = torch.load(folder / "embedding-last.pt", weights_only=True)["model"]
    assert json.loads((folder / "result.json").read_text())["config"]["margin"] == 5
    assert e.main([*flags, "--overwrite", "--margin", "5"]) == 0
    whole = torch.load(folder / "embedding-last.pt", weights_only=True)["model"]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.fixture
def small_attacks(monkeypatch):
    import attacks

    small = dict(targets=2, intruders=2, clean_intruders=4, iterations=2, square_stride=20, square_search_iterations=1, patch_train=2,
                 patch_iterations=2, patterns=2, evasion_iterations=2, distal_iterations=2, eot_tests=1)  # fmt: skip
    monkeypatch.setitem(attacks.PRESETS, "demo", {**attacks.PRESETS["demo"], **small})
    return attacks


def test_all_makes_every_row_goes_on_after_a_stop_and_repeats_nothing(project, monkeypatch, capsys, small_attacks):
    import metrics

    monkeypatch.chdir(project)
    run = Path("runs/all")
    # the demo's own generator, and the plain command before
    shipped = project / "checkout" / "data"
    shipped.mkdir(parents=True)
    shutil.copy("runs/synthetic-demo-0/generator.pt", shipped / "generator_demo.pt")
    monkeypatch.setattr(e, "__file__", str(shipped.parent / "embed.py"))
    tiny = [f for f in FLAGS if f != "--no-evaluation"]
    tiny = [*tiny[: tiny.index("--steps")], "--steps", "2", "--validate-every", "1", "--run", str(run)]
    report = metrics.main
    monkeypatch.setattr(metrics, "main", lambda flags: 0)
    assert e.main(tiny) == 0
    first = (run / "ours" / "embedding.pt").read_bytes()

    real, seen = small_attacks.attack_target, []

    def stopping(config, name, *rest, **keywords):
        seen.append(name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(config, name, *rest, **keywords)

    monkeypatch.setattr(small_attacks, "attack_target", stopping)
    capsys.readouterr()
    assert e.main([*tiny, "--all", "--jobs", "1"]) == 130
    told = capsys.readouterr()
    assert "the same command goes on" in told.err and "stage  2 of 24: train ours, 2 steps, done" in told.out
    assert seen == ["clean", "clean", "eyeglasses", "eyeglasses"]  # again, now under every defence
    seen[:] = [""] * 10
    monkeypatch.setattr(metrics, "main", report)
    assert e.main([*tiny, "--all", "--jobs", "1"]) == 0
    told = capsys.readouterr().out
    assert seen.count("clean") == 5 * 2 and seen.count("eyeglasses") == 5 * 2 + 1  # ours: one target of eyeglasses was left
    assert "stage 24 of 24: tables and figures; elapsed" in told and "left" in told and "not made" not in told
    assert (run / "ours" / "embedding.pt").read_bytes() == first
    names = {p.parent.name for p in run.glob("*/embedding.pt")}
    assert names == {*e.TRAININGS, "weak-at-4", "weak-at-10", "weak-at-20"}
    settings = {n: json.loads((run / n / "result.json").read_text())["config"] for n in names}
    assert {(c["attack_steps"], c["attack_alpha"]) for n, c in settings.items() if "weak" in n} == {(5, 32), (4, 52.5), (10, 24), (20, 12)}
    held = metrics.read_run(run).methods
    assert set(held) == set(e.TRAININGS)
    for method, found in held.items():
        many = set(small_attacks.ATTACKS) if method in e.FULL else {"clean", "eyeglasses", "square", "eye_patch", "evasion", "grey_eye_patch"}
        assert set(found) == many, method
        defences = {(r.mirroring, r.selection) for r in found["square"].rows}
        assert len(defences) == (4 if method == "ours" else 1)
    table = (run / "tables.md").read_text()
    assert "not run" not in table.split("## Table 1")[1].split("## Beyond")[0].replace("generator", "")
    assert all((run / "figures" / f"figure{n}.png").exists() for n in range(1, 10))
    seen.clear()
    monkeypatch.setattr(metrics, "main", lambda flags: 0)
    assert e.main([*tiny, "--all", "--jobs", "1"]) == 0 and seen == []  # nothing is done twice
    assert "stage 23 of 24" in capsys.readouterr().out


def test_all_ends_with_the_status_of_a_failing_stage(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    flags = [f for f in FLAGS if f != "--no-evaluation"]
    flags = [*flags[: flags.index("--attack-steps")], "--run", "runs/fails", "--all", "--jobs", "2"]
    for more in (["--method", "doa"], ["--attack-steps", "7"], ["--overwrite"]):
        assert e.main([*flags, *more]) == 2 and more[0] in capsys.readouterr().err
    Path("runs/fails").mkdir()
    Path("runs/fails/generator.pt").write_bytes(b"no checkpoint")
    assert e.main(flags) == 2
    err = capsys.readouterr().err
    assert "generator.pt" in err and "stage 1 of 24" in err and "same command" in err and not Path("runs/fails/ours").exists()


def test_time_left_of_stages_side_by_side():
    assert e.seconds_left(100, [], [5.0], 2) is None and e.seconds_left(100, [(1, 30.0)], [5.0], 2) is None
    assert e.seconds_left(100, [(1, 30.0), (20, 40.0)], [], 1) == pytest.approx(160)  # two seconds a unit
    assert e.seconds_left(100, [(20, 40.0)], [10.0, 30.0], 2) == pytest.approx(60)  # 40 of the 160 are behind us, two at a time
    assert e.seconds_left(100, [(20, 40.0), (80, 160.0)], [0.1], 2) == 0


def test_stages_side_by_side(tmp_path, monkeypatch, capfd):
    """Chains keep their order, no more than `jobs` run at a time, stages without a chain wait for all, a failure stops what is left."""
    (tmp_path / "script.py").write_text(
        "import sys, time, pathlib, os\n"
        "name, seconds, code = sys.argv[1:]\n"
        "log = open('events.txt', 'a')\n"
        "print('begin', name, os.environ['OMP_NUM_THREADS'], file=log, flush=True)\n"
        "time.sleep(float(seconds))\n"
        "print('end', name, file=log, flush=True)\n"
        "print('last line of', name)\n"
        "sys.exit(int(code))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(e, "__file__", str(tmp_path / "embed.py"))

    def alone(name):
        return e.Stage(name, 1, lambda: print(f"alone {name}", file=open("events.txt", "a")), "")

    def stage(name, seconds=0.3, code=0):
        return e.Stage(name, 5, lambda: 1, name[0], ("script.py", name, str(seconds), str(code)))

    plan = [alone("first"), stage("a1"), stage("a2"), stage("b1", 1.0), stage("c1"), alone("last")]
    assert e.run_stages(plan, 2, tmp_path / "logs", 3) == 0
    events = [line.split() for line in Path("events.txt").read_text().splitlines()]
    order = [" ".join(w[:2]) for w in events]
    assert order[0] == "alone first" and order[-1] == "alone last" and all(w[2] == "3" for w in events if w[0] == "begin")
    assert order.index("end a1") < order.index("begin a2") < order.index("end a2") < order.index("begin c1")
    assert order.index("begin b1") < order.index("end a1")
    open_now = most = 0
    for word in order:
        open_now += {"begin": 1, "end": -1}.get(word.split()[0], 0)
        most = max(most, open_now)
    assert most == 2 and (tmp_path / "logs" / "2.log").read_text() == "last line of a1\n"

    Path("events.txt").unlink()
    assert e.run_stages([stage("a1", 0, 2), stage("a2"), stage("b1", 1.0), alone("last")], 2, tmp_path / "logs", 1) == 2
    assert "a2" not in Path("events.txt").read_text() and "alone" not in Path("events.txt").read_text()
    err = capfd.readouterr().err
    assert "last line of a1" in err and "stage 1 of 4 ended with status 2; the same command goes on there" in err


def test_verify_answers_eq1(project, monkeypatch, capsys):
    from PIL import Image

    import data

    monkeypatch.chdir(project)
    run = ["--run", "runs/verify", "--method", "weak-at"]
    assert e.main([*FLAGS, *run]) == 0
    found = data.load("synthetic", persons=14, images_per_person=10)
    for i in (0, 1):
        Image.fromarray(found.images[i].permute(1, 2, 0).numpy()).save(f"{i}.png")
    capsys.readouterr()
    run += ["--attack-steps", "2"]
    assert e.main(["--verify", "0.png", "0.png", *run]) == 0
    assert capsys.readouterr().out.rstrip().endswith("refused)  same person")
    assert e.main(["--verify", "0.png", "1.png", *run]) == 0
    out = capsys.readouterr().out.split()
    embed = e.load_embedding("runs/verify/weak-at-2/embedding.pt")
    a, b = (found.images[i : i + 1].float() / 255 for i in (0, 1))
    d = torch.stack([e.squared_distance(embed(v), embed(a)) for v in (b, b.flip(3))]).mean().sqrt()
    assert float(out[1]) == pytest.approx(float(d), abs=1e-3)
    assert e.main(["--verify", "0.png", "absent.png", *run]) == 2 and "absent.png" in capsys.readouterr().err
    assert e.main(["--verify", "0.png", "1.png", "--run", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err


def test_a_generator_that_saw_the_test_persons_is_refused(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    content = torch.load("runs/synthetic-demo-0/generator.pt", weights_only=True)
    people = json.loads(Path("runs/synthetic-demo-0/people.json").read_text())
    Path("runs/leak").mkdir(exist_ok=True)
    torch.save({**content, "train": [*content["train"], people["target"][0]]}, "runs/leak/generator.pt")
    assert e.main([*FLAGS, "--run", "runs/leak"]) == 2
    assert people["target"][0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--method", "nonsense"], "nonsense"),
        (["--data", "folder", "--root", "absent"], "absent"),
        (["--data", "folder", "--root", "empty"], "empty"),
        (["--persons", "5000"], "--persons"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--steps", "3.5"], "--steps"),
        (["--no-such-flag"], "--no-such-flag"),
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
    config = dataclasses.asdict(e.Config(**TINY))
    state = e.Embedding(1 / 32, 16).state_dict()
    e.save(Path("good.pt"), {"kind": "embedding", "config": {**config, "standardise": True}, "model": state})
    e.load_embedding("good.pt")
    torch.save({"kind": "embedding", "config": {**config, "width": 0.125}, "model": state}, "width.pt")
    torch.save({"kind": "embedding", "config": Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    Path("short.pt").write_bytes(Path("good.pt").read_bytes()[:2000])
    Path("empty.pt").write_bytes(b"")
    for name in ("width.pt", "evil.pt", "list.pt", "short.pt", "empty.pt", "absent.pt"):
        with pytest.raises(e.UsageError, match=name) as error:
            e.load_embedding(name)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_a_full_disk_during_a_save_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.pt"
    e.save(path, {"kind": "embedding", "value": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(e.os, "fsync", full)
    with pytest.raises(e.UsageError, match="No space left"):
        e.save(path, {"kind": "embedding", "value": 2})
    assert e.read(path, "embedding")["value"] == 1 and [p.name for p in tmp_path.iterdir()] == ["kept.pt"]


def test_a_disk_that_is_really_full_is_one_line(tmp_path):
    import resource

    path, limits = tmp_path / "kept.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    e.save(path, {"kind": "embedding", "value": torch.zeros(1)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for put in (lambda: e.save(path, {"kind": "embedding", "value": torch.rand(100_000)}), lambda: e.write(path, "x" * 30_000)):
            with pytest.raises(e.UsageError, match="kept.pt: cannot be written .File too large") as error:
                put()
            assert "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.read(path, "embedding")["value"] == 0 and [p.name for p in tmp_path.iterdir()] == ["kept.pt"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_other_persons_are_refused(project, monkeypatch, capsys, interrupted_at):
    import data

    monkeypatch.chdir(project)
    flags = [*FLAGS, "--run", "runs/damaged", "--method", "weak-at", "--attack-steps", "1"]
    folder, models = Path("runs/damaged/weak-at-1"), []
    for _ in range(2):  # the same command twice
        assert e.main([*flags, "--overwrite"]) == 0
        models.append(torch.load(folder / "embedding.pt", weights_only=True)["model"])

    with interrupted_at(e, "train_step", 6):
        assert e.main([*flags, "--overwrite"]) == 130
    part = folder / "training.ckpt"
    part.write_bytes(part.read_bytes()[:1000])
    people = Path("runs/damaged/people.json").read_bytes()
    config = e.parse(flags)[0]
    faces, _ = e.open_run(config, Path("runs/damaged"))
    other = dataclasses.replace(data.split_persons(faces, None, 3, 3, seed=1), seed=0)
    data.write_manifest("runs/damaged/people.json", faces, other)
    capsys.readouterr()
    assert e.main([*flags, "--resume"]) == 2 and "other persons" in capsys.readouterr().err
    Path("runs/damaged/people.json").write_bytes(people)
    assert e.main([*flags, "--resume"]) == 0
    told = capsys.readouterr()
    assert "resumed at step 2" in told.out and "training.ckpt: not a readable checkpoint" in told.err and "training.ckpt.old" in told.err
    models.append(torch.load(folder / "embedding.pt", weights_only=True)["model"])
    assert all(torch.equal(models[0][k], other[k]) for other in models[1:] for k in models[0])
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [2, 4, 6]
    assert not list(folder.glob("training*"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_names_itself_the_images_and_the_checkpoint(project, monkeypatch, capsys, what):
    monkeypatch.chdir(project)
    real, calls = e.two_pair_loss, []

    def broken(fx, *args):
        loss = real(fx, *args)
        if not loss.requires_grad:  # validation
            return loss
        calls.append(1)
        if len(calls) < 4:
            return loss
        return loss * math.nan if what == "loss" else loss + (fx * 0).abs().sqrt().sum()  # finite, but not its gradient

    monkeypatch.setattr(e, "two_pair_loss", broken)
    assert e.main([*FLAGS, "--run", f"runs/{what}", "--method", "weak-at", "--attack-steps", "1"]) == 1
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    assert "step 4: loss" in told and "images [" in told and f"runs/{what}/weak-at-1/training.ckpt" in told
    assert e.read(Path(f"runs/{what}/weak-at-1/training.ckpt"), "embedding-training")["step"] == 2


def test_a_broken_generator_met_after_training_gives_one_line(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    run = Path("runs/broken-generator")
    run.mkdir(parents=True)
    (run / "generator.pt").write_bytes(b"no checkpoint")
    flags = [*FLAGS, "--run", str(run), "--method", "weak-at", "--attack-steps", "1", "--steps", "2"]
    flags.remove("--no-evaluation")
    assert e.main(flags) == 2  # weak-at needs the generator for Fig. 3 alone
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("embed.py: ") and "generator.pt" in line
    assert (run / "weak-at-1" / "result.json").exists()


def test_what_a_run_was_made_of_is_held_against_it(project, monkeypatch, capsys, interrupted_at):
    """Other persons, another split, another G, damaged records: one line that names the file, never a result that mixes them."""
    from PIL import Image

    import attacks
    import data

    monkeypatch.chdir(project)
    run = Path("runs/made-of")
    run.mkdir(parents=True)
    for name in ("generator.pt", "people.json", "run.json"):
        if Path("runs/synthetic-demo-0", name).exists():
            shutil.copy(Path("runs/synthetic-demo-0", name), run)
    flags = [*FLAGS, "--run", str(run)]

    def refused(told, argv, main=e.main):
        capsys.readouterr()
        assert main([str(v) for v in argv]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "rendering faces" not in line]
        assert len(lines) == 1 and told in lines[0], lines

    def put(path, content):
        before = path.read_bytes()
        torch.save(content, path) if path.suffix in (".pt", ".ckpt") else path.write_text(content)
        return before

    with interrupted_at(e, "train_step", 4):
        assert e.main(flags) == 130
    content = torch.load(run / "generator.pt", weights_only=True)
    good = put(run / "generator.pt", content | {"lord": {k: v / 2 for k, v in content["lord"].items()}})
    refused("was trained on other files: generator (", [*flags, "--resume"])
    (run / "generator.pt").write_bytes(good)
    part = run / "ours/training.ckpt"
    state = torch.load(part, weights_only=True)
    for damaged in ({k: v for k, v in state.items() if k != "config"}, state | {"config": [1]}, state | {"model": {}}, state | {"best": 3}):
        good = put(part, damaged)
        refused("training.ckpt: does not hold this training", [*flags, "--resume"])
        part.write_bytes(good)
    images = state["made of"] | {"images": "0" * 16}
    good = put(part, state | {"made of": images})
    refused("was trained on other files: images (", [*flags, "--resume"])
    part.write_bytes(good)
    log = run / "ours/log.jsonl"
    log.write_bytes(b'{"a": 1}\ngarbage}\n\xff\xfe\n' + log.read_bytes())
    assert e.main([*flags, "--resume"]) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 6]

    refused("is another split: split seed (0 there, 5 asked for)", [*flags, "--method", "no-at", "--split-seed", 5])
    refused("target persons (3 there, 2 asked for)", [*flags, "--method", "no-at", "--target-persons", 2])
    people = run / "people.json"
    faces, split = e.open_run(e.parse(flags)[0], run)
    good = people.read_bytes()
    train, validation = split.train[:-1] + split.target[:1], split.validation
    data.write_manifest(people, faces, dataclasses.replace(split, train=train, target=(*split.target[1:], split.train[-1])))
    refused("trained on other persons", flags)
    refused("trained on other persons", ["--run", run, "--targets", 2, "--intruders", 2], attacks.main)
    assert validation and people.write_bytes(good)

    result = run / "ours/result.json"
    for text in ("{", "[]", "{}"):
        good = put(result, text)
        refused("result.json", flags)
        result.write_bytes(good)
    photographs = [str(Path(f"{k}.png")) for k in range(2)]
    for k, path in enumerate(photographs):
        Image.fromarray(faces.images[k].permute(1, 2, 0).numpy()).save(path)
    for threshold in ("null", "NaN", "-1", "[]"):
        good = put(result, f'{{"threshold": {threshold}}}')
        refused("result.json: no threshold there", [*flags, "--verify", *photographs])
        result.write_bytes(good)
    about = run / "run.json"
    for text in ("[]", "{}", '{"data": "synthetic", "options": 5}', '{"data": "synthetic", "seed": "x"}', '{"data": 3}'):
        good = put(about, text)
        refused("run.json", ["--run", run, "--targets", 2], attacks.main)
        about.write_bytes(good)
    for main, start in ((e.main, flags), (attacks.main, ["--run", run]), (g.main, [*GENERATOR_FLAGS, "--run", run])):
        refused("--device nonsense: cannot be used here", [*start, "--device", "nonsense"], main)
    refused("--validation-persons 1", [*flags, "--validation-persons", 1])
    refused("--persons 1: give 2 or more", [*flags, "--persons", 1])


def test_a_small_file_that_asks_for_a_huge_network_is_refused_at_once(tmp_path):
    state = e.Embedding(1 / 32, 16).state_dict()
    e.save(tmp_path / "huge.pt", {"kind": "embedding", "config": {"width": 60, "dim": 16, "standardise": True}, "model": state})
    begun = time.perf_counter()
    with pytest.raises(e.UsageError, match="do not fit together"):
        e.load_embedding(tmp_path / "huge.pt")
    assert time.perf_counter() - begun < 10
