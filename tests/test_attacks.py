"""Each attack is held to its definition by value: plain loops, known optima, hand-made masks, signs
and seeds; then the real command on a small run."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import attacks
import data
import embed as embedding
import generator
from attacks import Config, Effort, Mirrored, eye_patch_mask, eyeglasses_mask, tanh_attack
from data import run
from tests.test_generator import TINY as TINY_GENERATOR


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def faces(n, seed=0, size=64):
    return torch.rand(n, 3, size, size, generator=seeded(seed))


class Linear(nn.Module):
    """Features that are weighted sums of all pixels."""

    def __init__(self, dim=8, size=64, seed=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * size * size, dim, generator=seeded(seed)) / size)

    def forward(self, x):
        return x.flatten(1) @ self.weight


class Small(nn.Module):
    """A small embedding with dropout and batch norm, which behave differently in training mode."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 6, 5, 4, 2), nn.BatchNorm2d(6), nn.ReLU()]
        layers += [nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(512, 8))

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


# masks


def test_masks_and_places_are_the_papers():
    glasses, patch = eyeglasses_mask(), eye_patch_mask()
    assert glasses.shape == (64, 64) and glasses.sum() == 107 and f"{107 / 4096:.1%}" == "2.6%"
    rows, columns = glasses.nonzero().unbind(1)
    assert 24 <= rows.min() and rows.max() < 40 and 16 <= columns.min() and columns.max() < 48
    # 7ff80ffe: bits 30 to 19
    assert glasses[26, 17] and not glasses[26, 16] and glasses[26, 28] and not glasses[26, 29]
    assert patch[26:38, 16:48].all() and patch.sum() == 12 * 32
    square = attacks.square_mask(15, 35)
    assert square.sum() == 100 and square[15:25, 35:45].all()
    for stride, starts in ((5, (15, 20, 25, 30, 35)), (8, (15, 23, 31, 35)), (50, (15, 35))):
        assert attacks.square_positions(stride) == [*itertools.product(starts, repeat=2)]


@pytest.mark.parametrize("height, width", [(32, 32), (150, 150), (112, 96)])
def test_masks_and_places_are_to_the_images_scale(height, width):
    y, x = (lambda pixels, n=n: int(pixels * n / 64 + 0.5) for n in (height, width))
    row, column = (torch.arange(n) * 64 + 32 for n in (height, width))  # centres, in 64ths
    nearest = eyeglasses_mask()[row.div(height).long()][:, column.div(width).long()]
    assert torch.equal(eyeglasses_mask(height, width), nearest)
    patch = eye_patch_mask(height, width)
    assert patch[y(26) : y(38), x(16) : x(48)].all()
    assert patch.sum() == (y(38) - y(26)) * (x(48) - x(16))
    places = attacks.square_positions(5, height, width)
    assert len(places) == 25 and (places[0], places[-1]) == ((y(15), x(15)), (y(35), x(35)))
    for r, c in places:
        square = attacks.square_mask(r, c, height, width)
        assert square.sum() == y(10) * x(10) and square[r : r + y(10), c : c + x(10)].all()


def test_a_mask_of_another_size_type_or_none_is_refused():
    unequal = torch.stack([attacks.square_mask(0, k) for k in (0, 5, 50)])
    unequal[2, :, :52] = False
    good = eyeglasses_mask()
    wrong = eyeglasses_mask(32, 32), good.float(), good.expand(2, -1, -1), good & False, unequal
    for mask in wrong:
        with pytest.raises(ValueError, match="^mask: "):
            tanh_attack(EMBED, X, A, mask, QUICK)
        with pytest.raises(ValueError, match="^mask: "):
            attacks.random_patterns(EMBED, X, A, mask, 1, seeded())


# distances


def test_distance_mirrors_the_candidate_and_not_the_anchor():
    embed, x = Linear(), faces(3)
    anchor = embed(faces(1, 9))[0].detach()
    plain = (embed(x) - anchor).square().sum(1)
    both = (plain + (embed(x.flip(3)) - anchor).square().sum(1)) / 2
    for views, want in ((embed, plain), (Mirrored(embed), both)):
        for chunk in (2, 256):
            assert torch.allclose(attacks.distances(views, x, anchor, chunk), want.sqrt())


def test_views_of_transforms_and_mirrors_count_by_their_mean():
    embed, x, anchor = Linear(), faces(3), torch.randn(8, generator=seeded())
    moves = attacks.draw_transforms(4, Config(), seeded(2))
    features = attacks.Transformed(Mirrored(embed), moves)(x)
    assert features.shape == (3, 2 * 4, 8)
    views = [attacks._transform(x, moves[k : k + 1]) for k in range(4)]
    views += [view.flip(3) for view in views]
    by_hand = torch.stack([(embed(view) - anchor).square().sum(1) for view in views]).mean(0)
    assert torch.allclose(attacks.squared_distance(features, anchor), by_hand)


def test_anchor_is_the_image_nearest_to_the_others():
    features = torch.tensor([[9.0, 0], [0, 0], [1, 0], [0, 1]])
    squared = [sum(math.dist(a, b) ** 2 for b in features.tolist()) for a in features.tolist()]
    assert attacks.select_anchor(features) == squared.index(min(squared)) == 2
    for seed in range(20):
        features = 1000 + torch.randn(2 + seed, 5, generator=seeded(seed))  # two: a tie, the first
        squared = torch.cdist(features.double(), features.double()).square().sum(1)
        assert attacks.select_anchor(features) == int(
            (squared <= squared.min() + 1e-9).byte().argmax()
        )
    features = torch.randn(300_000, 4, generator=seeded())  # (n, n, D) would be 2.9 TB
    assert attacks.select_anchor(features) == int(
        (features - features.mean(0)).norm(dim=1).argmin()
    )


def test_transform_moves_scales_turns_and_brightens():
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 20:24, 30:34] = 0.5
    moves = [[0, 0, 1, 0, 1], [2, -3, 1, 0, 1], [0, 0, 1, 0, 1.4], [0, 0, 1, math.pi / 2, 1]]
    moves = torch.tensor([*moves, [0, 0, 2, 0, 1]])
    same, moved, bright, turned, large = attacks._transform(x, moves).split(1)
    assert torch.allclose(same, x, atol=1e-5)
    assert torch.allclose(bright, x * 1.4, atol=1e-5)
    assert torch.allclose(moved, torch.roll(x, (-2, 3), (2, 3)), atol=1e-4)
    assert min((turned - torch.rot90(x, k, (2, 3))).abs().max() for k in (1, 3)) < 1e-4
    assert torch.isclose(large.sum(), 4 * x.sum(), rtol=0.02)
    draws = attacks.draw_transforms(1000, Config(), seeded()) - torch.tensor([0, 0, 1.0, 0, 1])
    limits = torch.tensor([2, 2, 0.05, math.radians(5), 0.1])
    assert (draws.abs() <= limits + 1e-6).all() and (draws.abs().amax(0) > 0.95 * limits).all()


# the checks at the door

EMBED, X = Linear(), faces(3)
A = EMBED(faces(1, 9))[0].detach()
GLASSES, PATCH, QUICK = eyeglasses_mask(), eye_patch_mask(), Effort(2, 0.1, 1)
PLACES = [(15, 15), (35, 35), (15, 35)]
CALLS = {
    "tanh": lambda f, x, a: tanh_attack(f, x, a, GLASSES, QUICK),
    "square": lambda f, x, a: attacks.square_attack(f, x, a, PLACES, QUICK, QUICK, seeded()),
    "universal": lambda f, x, a: attacks.universal_patch(f, x, a, PATCH, QUICK, seeded()),
    "random": lambda f, x, a: attacks.random_patterns(f, x, a, GLASSES, 2, seeded()),
    "indirect": lambda f, x, a: attacks.indirect_attack(f, x, a, a, PATCH, QUICK, seeded()),
    "run clean": lambda f, x, a: attacks.run_attack("clean", Config(), f, x, a, seeded()),
    "run noise": lambda f, x, a: attacks.run_attack("noise", Config(), f, x, a, seeded()),
}
WRONG = {
    "uint8": (EMBED, (X * 255).byte(), A, "images: torch.uint8, wanted a tensor of float32"),
    "one image": (EMBED, X[0], A, r"images: of shape \(3, 64, 64\), wanted \(N, C, H, W\)"),
    "none": (EMBED, X[:0], A, r"images: of shape \(0, "),
    "numpy": (EMBED, X.numpy(), A, "images: float32, wanted a tensor"),
    "0 to 255": (EMBED, X * 255, A, r"images: values from .* to 2\d\d.*, wanted \[0, 1\]"),
    "-1 to 1": (EMBED, X * 2 - 1, A, "images: values from -"),
    "NaN": (EMBED, X.where(X < 0.99, math.nan), A, "images: values from nan"),
    "tuple": (lambda x: (EMBED(x), x), X, A, "embed: gives tuple"),
    "maps": (lambda x: EMBED(x)[..., None, None], X, A, r"embed: gives Tensor \[16, 8, 1, 1\]"),
    "flat": (lambda x: EMBED(x).flatten(), X, A, r"embed: gives Tensor \[128\] for 16 images"),
    "labels": (lambda x: EMBED(x).long(), X, A, "embed: gives Tensor"),
    "NaN features": (lambda x: EMBED(x) * math.nan, X, A, "embed: features are not finite"),
    "narrow anchor": (EMBED, X, A[:1], r"anchor: \(1,\), wanted finite features \(8,\)"),
    "mirrored anchor": (Mirrored(EMBED), X, torch.cat([A, A]), r"anchor: \(16,\)"),
    "two anchors": (EMBED, X, torch.stack([A, A]), r"anchor: \(2, 8\), .* \(3, 8\)"),
    "NaN anchor": (EMBED, X, A * math.inf, r"anchor: \(8,\), wanted finite"),
    "no anchor": (EMBED, X, None, "anchor: NoneType"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs_are_one_line(wrong):
    *inputs, message = WRONG[wrong]
    with pytest.raises(ValueError, match="^" + message) as error:
        CALLS["tanh"](*inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", CALLS)
def test_every_attack_has_a_door(call):
    for wrong in ("uint8", "0 to 255", "tuple", "NaN anchor"):
        *inputs, message = WRONG[wrong]
        with pytest.raises(ValueError, match="^" + message):
            CALLS[call](*inputs)
    with torch.no_grad():
        CALLS[call](EMBED, X, A)


def test_a_model_in_training_mode_behind_a_callable_is_refused(small):
    """It is seen in the answers: batch statistics, and dropout. Rounding is not refused."""
    for layer in (nn.BatchNorm2d(3), nn.Dropout(0.1)):
        embed = lambda x, layer=layer: EMBED(layer(x))
        for views in (embed, Mirrored(embed)):
            with pytest.raises(ValueError, match=r"alone and in a batch, .*model.eval\(\)"):
                CALLS["tanh"](views, X, A)
    for model in (embedding.Embedding(1 / 4).eval(), small):
        for image in faces(5, 3):
            attacks.check_inputs(lambda x, f=model: f(x), image[None])


def test_mode_and_gradient_flags_are_restored(small):
    small.train()
    small.net[3].eval()
    small.net[0].weight.requires_grad_(False)
    weights = {k: v.clone() for k, v in small.state_dict().items()}
    modes, flags = (
        [m.training for m in small.modules()],
        [p.requires_grad for p in small.parameters()],
    )
    seen, zeros = [], torch.zeros(8)
    look = lambda m, *_: seen.append((m.training, any(p.requires_grad for p in m.parameters())))
    handle = small.register_forward_hook(look)
    for call in ("tanh", "universal"):
        CALLS[call](small, X, zeros)
    handle.remove()
    fails = small.register_forward_hook(lambda *_: 1 / (not torch.is_grad_enabled()) and None)
    with pytest.raises(ZeroDivisionError):  # in the loop, after the checks
        CALLS["tanh"](small, X, zeros)
    fails.remove()
    assert set(seen) == {(False, False)} and [m.training for m in small.modules()] == modes
    assert [p.requires_grad for p in small.parameters()] == flags
    assert all(p.grad is None for p in small.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in small.state_dict().items())


# App. C


def plain_attack(embed, images, anchor, mask, start, effort, shared=False):
    """Eq. (7) by torch.optim.Adam on delta, written out: the best images, and the squared distances
    of each iterate (iterations + 1, N). The pattern that all share starts from grey."""
    w = torch.atanh((2 * images[:, :, mask] - 1) * 0.999999) * (not shared)  # (N, C, P)
    delta = start.clone().requires_grad_()
    adam, losses, iterates = torch.optim.Adam([delta], lr=effort.lr), [], []
    for step in range(effort.iterations + 1):
        patched = images.clone()
        patched[:, :, mask] = (torch.tanh(w + delta) + 1) / 2
        loss = effort.sign * (embed(patched) - anchor).square().sum(1)
        iterates.append(patched.detach())
        losses.append(loss.detach())
        adam.zero_grad()
        (loss.mean() if shared else loss.sum()).backward()
        adam.param_groups[0]["lr"] = effort.lr * (1 - effort.decay * step / effort.iterations)
        adam.step()
    losses = torch.stack(losses)
    best = losses.mean(1, keepdim=True).expand_as(losses) if shared else losses
    return torch.stack(iterates)[best.argmin(0), torch.arange(len(images))], losses


@pytest.mark.parametrize("direction", ["impersonate", "evade"])
@pytest.mark.parametrize("lr, decay", [(0.05, False), (0.05, True), (3.0, False)])
def test_the_loop_is_adam_on_delta_and_keeps_the_best_iterate(small, direction, lr, decay):
    """At lr 3 it overshoots: for some image another iterate than the last is the best."""
    small, x = small.double(), faces(3).double()
    x[0], x[1, :, :, :32] = 0.0, 1.0  # saturated pixels
    anchor, mask = small(faces(1, 5).double())[0].detach(), eyeglasses_mask()
    effort = Effort(6, lr, 1, decay, direction=direction)
    start = torch.rand(1, 3, 3, 107, generator=seeded(3)).double() - 0.5
    result = tanh_attack(small, x, anchor, mask, effort, start)
    images, losses = plain_attack(small, x, anchor, mask, start[0], effort)
    assert torch.allclose(result.images, images, atol=1e-9)
    assert torch.allclose(result.distance, losses.amin(0).abs().sqrt())
    assert lr < 1 or direction == "evade" or (losses.argmin(0) < 6).any()
    assert (result.zero_gradients, result.nonfinite, result.gradients) == (0, 0, 3 * 6)
    # saturated pixels come back to 5e-7: where nothing moves, the images stay
    still = tanh_attack(small, x, anchor, mask, replace(effort, lr=0.0), start * 0)
    assert (still.images - x).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_universal_patch_lowers_the_mean_over_all_images(small, chunk):
    """Whatever the passes: for the first and the last image alone another iterate is the best."""
    small, x = small.double(), faces(5).double()[[2, 1, 3, 4, 0]]
    anchor, mask = small(faces(1, 5).double())[0].detach(), eye_patch_mask()
    effort = Effort(9, 0.3, chunk=chunk)
    pattern, result = attacks.universal_patch(small, x, anchor, mask, effort, seeded(3))
    start = torch.rand(1, 3, 384, generator=seeded(3)).double() - 0.5
    images, losses = plain_attack(small, x, anchor, mask, start, effort, shared=True)
    assert (losses.argmin(0)[[0, 4]] != losses.mean(1).argmin()).all()
    assert torch.allclose(result.images, images, atol=1e-9)
    assert torch.equal(result.images[:, :, mask], pattern.expand(5, -1, -1))
    assert result.distance.square().mean() == pytest.approx(float(losses.mean(1).min()))
    assert result.gradients == 9  # one delta, for all


def test_the_start_is_uniform_in_half_and_a_restart_is_the_same_however_many_follow():
    x, mask, effort = faces(2), eyeglasses_mask(), Effort(1, 0.0, 3)
    rng, w = seeded(4), torch.atanh((2 * x[:, :, mask] - 1) * 0.999999)
    starts = [torch.rand(2, 3, 107, generator=rng) - 0.5 for _ in range(3)]
    images = torch.stack([x] * 3)
    for k, start in enumerate(starts):
        images[k][:, :, mask] = (torch.tanh(w + start) + 1) / 2
    distance = torch.stack([attacks.distances(EMBED, image, A) for image in images])
    for direction, way in (("impersonate", 1), ("evade", -1)):
        for n in (1, 2, 3):
            now = replace(effort, restarts=n, direction=direction)
            result = tanh_attack(EMBED, x, A, mask, now, seeded(4))
            winner = (way * distance[:n]).argmin(0)
            assert torch.allclose(result.images, images[winner, [0, 1]], atol=1e-6)
            assert torch.allclose(result.distance, distance[winner, [0, 1]])
    assert len({*distance.argmin(0).tolist(), *distance.argmax(0).tolist()}) > 1
    again = tanh_attack(EMBED, x, A, mask, Effort(2), None)
    assert torch.equal(again.images, tanh_attack(EMBED, x, A, mask, Effort(2), seeded()).images)


def linear_bounds(embed, x, mask):
    """The least and largest of a single linear feature when the pixels under the mask are free."""
    w = embed.weight.view(3, 64, 64)[:, mask].detach()
    outside = embed(x * ~mask)[:, 0].detach()
    return outside + w.clamp(max=0).sum(), outside + w.clamp(min=0).sum()


@pytest.mark.parametrize("optimiser", ["adam", "sign"])
def test_a_linear_embedding_reaches_the_known_optimum(optimiser):
    """Out of reach every pixel goes to its end; within reach the distance is zero."""
    embed, x, mask = Linear(dim=1), faces(4), eyeglasses_mask()
    low, high = linear_bounds(embed, x, mask)
    effort = Effort(150, 0.3, 1, optimiser=optimiser)
    for anchor, near, far in ((1e3, high, low), (-1e3, low, high)):
        for direction, end in (("impersonate", near), ("evade", far)):
            now = replace(effort, direction=direction)
            result = tanh_attack(embed, x, torch.tensor([anchor]), mask, now)
            most = 2e-3 * float(high[0] - low[0])
            assert torch.allclose(result.distance, (anchor - end).abs(), rtol=0, atol=most)
            assert torch.equal(result.images * ~mask, x * ~mask)
            if optimiser == "sign":
                assert set(result.images[:, :, mask].unique().tolist()) == {0.0, 1.0}
    inside = (low.max() + high.min())[None] / 2
    result = tanh_attack(embed, x, inside, mask, replace(effort, lr=0.1, decay=True))
    assert result.distance.max() < 1e-3 * float(high[0] - low[0])


@pytest.mark.parametrize("optimiser", ["adam", "sign"])
def test_chunks_and_targets_beside_do_not_matter(small, optimiser):
    small, x = small.double(), faces(6).double()
    anchors, mask = small(faces(2, 5).double()).detach(), eyeglasses_mask()
    starts = [torch.rand(3, 3, 3, 107, generator=seeded(k)).double() - 0.5 for k in range(2)]
    effort = Effort(8, 0.1, 3, optimiser=optimiser)
    each, start = anchors.repeat_interleave(3, 0), torch.cat(starts, 1)
    both = tanh_attack(small, x, each, mask, effort, start)
    for chunk in (1, 7):
        part = tanh_attack(small, x, each, mask, replace(effort, chunk=chunk), start)
        assert torch.allclose(part.images, both.images, atol=1e-9)
    for k in range(2):
        own = slice(3 * k, 3 * k + 3)
        alone = tanh_attack(small, x[own], anchors[k], mask, effort, starts[k])
        assert torch.allclose(both.images[own], alone.images, atol=1e-9)


def test_lost_gradients_are_counted_and_warned_of():
    rounded = lambda x: (x * 255).round().mean((2, 3))
    broken = lambda x: (x - x.detach()).sum((1, 2, 3))[:, None].sqrt()  # 0, with an infinite slope
    x, mask, one = faces(2), eyeglasses_mask(), torch.ones(1)
    for optimiser, n in (("adam", 3), ("sign", 30)):
        effort, all_ = Effort(n, restarts=1, optimiser=optimiser), 2 * n
        with pytest.warns(UserWarning, match=f"^{all_} zero and 0 non-finite of {all_} gr") as seen:
            tanh_attack(rounded, x, torch.ones(3), mask, effort)
        assert len(seen) == 1 and seen[0].filename == __file__
        with pytest.warns(UserWarning, match=f"^0 zero and {all_} non-finite of {all_} gradients"):
            result = tanh_attack(broken, x, one, mask, effort)
        assert (result.zero_gradients, result.nonfinite, result.gradients) == (0, all_, all_)
        assert result.images.isfinite().all()
    with pytest.warns(UserWarning, match="3 non-finite of 3 gradients"):
        attacks.universal_patch(broken, x, one, PATCH, Effort(3), seeded())
    efforts = Effort(3, restarts=1), Effort(1)
    with pytest.warns(UserWarning, match="could not follow"):
        result = attacks.square_attack(broken, x, one, [(15, 15), (35, 35)], *efforts, seeded())
    assert result.gradients == result.nonfinite == 2 * 3 + 2 * 2  # the search is counted too


@pytest.mark.filterwarnings("ignore:.*gradients")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_wins_a_minimum(value):
    """One feature, 1 + the mean under the glasses, `value` where their first pixel is bright."""
    mask, zero, x = GLASSES, torch.zeros(1), faces(4) * 0.45

    def embed(images):
        under = images[:, :, mask]  # (N, 3, P)
        return torch.where(under[:, 0, 0] > 0.5, value, 1 + under.mean((1, 2)))[:, None]

    rng, result = seeded(), attacks.random_patterns(embed, x, zero, mask, 40, seeded())
    values = torch.stack([torch.rand(40, 3, 107, generator=rng) for _ in x])
    lost = values[:, :, 0, 0] > 0.5  # (4, 40)
    by_hand = (1 + values.mean((2, 3))).where(~lost, torch.inf).amin(1)
    assert torch.allclose(result.distance, by_hand) and result.nonfinite == lost.sum() > 0
    for direction, optimiser in itertools.product(("impersonate", "evade"), ("adam", "sign")):
        effort = Effort(30, 0.1, 6, direction=direction, optimiser=optimiser)
        result = tanh_attack(embed, x, zero, mask, effort)
        assert result.nonfinite and (result.distance <= 2).all()
    loss = torch.tensor([[value, 2.0, 1.0], [3.0, value, value]])
    assert attacks.lowest(loss, 1).tolist() == [2, 0]
    one = attacks.AttackResult(x[:2], torch.tensor([value, 1.0]))
    two = attacks.AttackResult(1 - x[:2], torch.tensor([2.0, value]))
    assert attacks.strongest(one, two).distance.tolist() == [2, 1]


# sign steps, after Croce and Hein (2020)


def sign_steps(losses):
    """Step sizes and pixels (n, N) after each step of `SignSteps` with these losses (n, N); the
    gradient points down."""
    losses = torch.tensor(losses).T
    x = torch.full((losses.shape[1], 1, 1), 0.5)
    steps, best, states = attacks.SignSteps(x, len(losses)), torch.inf, []
    for loss in losses:
        better = loss < best
        best = torch.where(better, loss, best)
        x = steps.step(x, torch.ones_like(x), loss, better)
        states.append(torch.stack([steps.size.flatten(), x.flatten()]))
    return torch.stack(states, 1)


def test_sign_halves_where_progress_stops():
    """At the paper's checkpoints, by each of its two conditions, every row by itself."""
    rows = {
        "stands": [1.0] * 100,
        "falls": [-float(k) for k in range(100)],
        "17 of 22": [float(k if k <= 5 else 10 - k) for k in range(100)],
        "16 of 22": [float(k if k <= 6 else 12 - k) for k in range(100)],
        "no new best": [float(-k if k <= 22 else 100 - k) for k in range(100)],
    }
    sizes, pixels = sign_steps([*rows.values()])
    halved = (sizes[1:] < sizes[:-1]).T
    got = {name: (row.nonzero().flatten() + 1).tolist() for name, row in zip(rows, halved)}
    assert got == {
        "stands": [22, 41, 57, 70, 80, 87, 93, 99],
        "falls": [],
        "17 of 22": [],
        "16 of 22": [22],
        "no new best": [41, 70, 87, 99],  # not twice in a row while it falls
    }
    assert (sizes[0] == 0.25).all() and sizes[-1, 0] == 0.25 / 2**8
    # back to its best, the start, and a step of half the size from there
    assert pixels[21, 0] == 0 and pixels[22, 0] == 0.5 - 0.75 * 0.125 and pixels[22, 1] == 0


def test_words_that_an_effort_does_not_know_are_refused():
    for name in ("direction", "optimiser", "precision"):
        with pytest.raises(ValueError, match=f"^{name} must be .* or .*, not 'sgd'$"):
            Effort(**{name: "sgd"})


def test_iterations_are_in_bfloat16_where_asked_and_distances_in_float32():
    torch.manual_seed(0)
    embed, seen, mean = embedding.Embedding(1 / 16, 16, True), [], []
    head = embed.head
    embed.head = lambda x: seen.append(head(x)) or seen[-1]  # patch-local passes end there too
    # out of reach: within a hundredth of the features' norm bfloat16 comes less near
    x, anchor, views = faces(8), 3 * embed(faces(1, 5))[0].detach(), Mirrored(embed)
    for precision in ("float32", "bfloat16"):
        seen.clear()
        effort = Effort(40, 0.2, 1, precision=precision)
        result = tanh_attack(views, x, anchor, GLASSES, effort, seeded())
        narrow = [features.dtype == torch.bfloat16 for features in seen]
        assert not narrow[0] and not narrow[-1] and any(narrow) == (precision == "bfloat16")
        assert torch.allclose(result.distance, attacks.distances(views, result.images, anchor))
        mean.append(float(result.distance.mean()))
    assert mean[1] == pytest.approx(mean[0], rel=0.03) and mean[0] != mean[1]


# the other attacks


@pytest.mark.filterwarnings("ignore:.*gradients")  # at places that the window does not touch
def test_location_search_finds_the_planted_place():
    """The embedding reads one window for each image, so only the square on that window can help."""
    planted, x = [(15, 35), (25, 20), (35, 35)], faces(3) * 0.2
    x[:, :, 0, 0] = torch.tensor([0.1, 0.2, 0.3])[:, None]  # the image says which window is read

    def embed(images):
        which = ((images[:, 0, 0, 0] * 10).round().long() - 1).clamp(0, 2)
        views = [images[:, :, r : r + 10, c : c + 10].mean((1, 2, 3)) for r, c in planted]
        return torch.stack(views, 1).gather(1, which[:, None])

    inputs = embed, x, torch.ones(1), attacks.square_positions()
    result = attacks.square_attack(*inputs, Effort(60, 0.3, 1), Effort(4, 0.1, 5), seeded())
    assert list(zip(result.extra["row"].tolist(), result.extra["col"].tolist())) == planted
    assert result.distance.max() < 0.02 and result.gradients == 3 * 25 * 4 + 3 * 60
    for i, place in enumerate(planted):
        assert torch.equal(result.mask[i], attacks.square_mask(*place))
        assert torch.equal(result.images[i][:, ~result.mask[i]], x[i][:, ~result.mask[i]])


@pytest.mark.filterwarnings("ignore:.*gradients")
def test_a_place_that_is_no_number_is_not_searched_further():
    def embed(images):  # the square at (15, 15) breaks it, that at (15, 35) helps
        seen = images[:, :, 15:25, 35:45].mean((1, 2, 3))
        edge = (images[:, 0, 15, 14] - images[:, 0, 15, 15]).abs()
        return torch.where(edge < 0.02, seen, torch.nan)[:, None]

    x, places = torch.full((2, 3, 64, 64), 0.5), [(15, 15), (35, 35), (15, 35)]
    efforts = Effort(8, 0.1, 1), Effort(2, 0.1)
    result = attacks.square_attack(embed, x, torch.ones(1), places, *efforts, seeded())
    assert result.extra["row"].tolist() == [15, 15] and result.extra["col"].tolist() == [35, 35]
    assert result.distance.isfinite().all() and result.nonfinite > 0


def test_random_patterns_keep_the_closest_of_all(small):
    x, anchor, mask = faces(3), small(faces(1, 5))[0].detach(), eyeglasses_mask()
    views = Mirrored(small)
    result = attacks.random_patterns(views, x, anchor, mask, 20, seeded(), chunk=16)
    values = torch.rand(20, 3, 107, generator=seeded())
    filled = attacks.apply_pattern(x[:1].expand(20, -1, -1, -1), values, mask)
    by_hand = attacks.distances(views, filled, anchor)
    assert torch.isclose(result.distance[0], by_hand.min())
    assert torch.equal(result.images[0], filled[by_hand.argmin()])
    assert torch.equal(result.images[:, :, ~mask], x[:, :, ~mask])


def test_uniform_noise_is_bounded_and_fills_its_range():
    x = faces(4) * 0.8 + 0.1
    moved = attacks.uniform_noise(x, 10 / 255, seeded()) - x
    assert moved.abs().max() <= 10 / 255 + 1e-6 and abs(moved.mean()) < 1e-3
    assert abs(moved.std() - 10 / 255 / 3**0.5) < 1e-3
    assert attacks.uniform_noise(torch.ones(1, 3, 8, 8), 10 / 255, seeded()).max() == 1


def test_indirect_takes_the_stronger_by_true_distance(small):
    x, (anchor, virtual), views = faces(6), small(faces(2, 5)).detach(), Mirrored(small)
    mask, effort = GLASSES, Effort(10, 0.2, 2)
    result = attacks.indirect_attack(views, x, anchor, virtual, mask, effort, seeded(7))
    direct = tanh_attack(views, x, anchor, mask, effort, seeded(7))
    indirect = tanh_attack(views, x, virtual, mask, effort, seeded(7))  # from the same start
    true = attacks.distances(views, indirect.images, anchor)
    assert torch.equal(result.extra["direct"], direct.distance)
    assert torch.equal(result.extra["indirect"], true)
    assert not torch.allclose(true, indirect.distance, rtol=0.01)
    assert torch.equal(result.distance, torch.minimum(direct.distance, true))
    images = torch.where((true < direct.distance)[:, None, None, None], indirect.images, x * 0)
    kept = true < direct.distance
    assert torch.equal(result.images[kept], images[kept]) and result.gradients == 2 * 6 * 2 * 10


def test_distal_reaches_the_anchor_from_noise(small):
    anchor, shape, rng = small(faces(1, 5))[0].detach(), (2, 3, 64, 64), seeded()
    noise, everywhere = torch.rand(shape, generator=rng), torch.ones(64, 64, dtype=torch.bool)
    result = attacks.distal_attack(small, shape, anchor, Effort(80, 0.1, 1), seeded())
    want = tanh_attack(small, noise, anchor, everywhere, Effort(80, 0.1, 1), rng)
    assert torch.equal(result.images, want.images)
    assert (result.distance < 0.1 * attacks.distances(small, noise, anchor)).all()


def test_eot_attacks_a_fixed_set_and_is_measured_under_another(small):
    config = Config(iterations=3, lr=0.2, restarts=1, eot_samples=3, eot_tests=5)
    x, anchor, views, rng = faces(4), small(faces(1, 5))[0].detach(), Mirrored(small), seeded()
    draws = (attacks.draw_transforms(n, config, rng) for n in (3, 5))
    seen, fresh = (attacks.Transformed(views, transforms) for transforms in draws)
    result = attacks.run_attack("eot_eyeglasses", config, views, x, anchor, seeded())
    effort = attacks.effort_of("eot_eyeglasses", config, 2 * 3)
    assert torch.equal(result.images, tanh_attack(seen, x, anchor, GLASSES, effort, rng).images)
    want = attacks.distances(fresh, result.images, anchor)
    assert torch.allclose(result.distance, want)


@pytest.mark.parametrize("optimiser, size", [("adam", (48, 80)), ("sign", (64, 64))])
def test_every_attack_by_its_name(optimiser, size):
    """On a network that is not ours, in training mode, at any size: moved the right way, inside its
    mask alone, and the same again."""
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.ReLU())
    embed.append(nn.AdaptiveAvgPool2d(4)).append(nn.Flatten()).append(nn.Linear(128, 8))
    config = Config(**attacks.PRESETS["demo"], square_stride=20, optimiser=optimiser)
    names = ("", "patch_", "evasion_", "distal_")
    config = replace(config, patterns=8, **{f"{name}iterations": 8 for name in names})
    x, train, others = (torch.rand(3, 3, *size, generator=seeded(k)) for k in (0, 1, 5))
    anchor, virtual = attacks.extract(embed, others)[:2] * 3
    views, needs = Mirrored(embed), {"training": train, "virtual": virtual}
    clean = attacks.distances(views, x, anchor)
    for name in attacks.ATTACKS:
        one, again = (
            attacks.run_attack(name, config, views, x, anchor, seeded(2), **needs) for _ in "12"
        )
        assert torch.equal(one.images, again.images)
        assert one.images.min() >= 0 and one.images.max() <= 1 and not one.nonfinite
        assert (one.gradients > 0) == (name not in ("clean", "noise", "random_eyeglasses"))
        if name == "distal":
            assert one.images.shape == (1, 3, *size) and one.mask.all()
            continue
        outside = ~one.mask.expand(3, *size)[:, None].expand_as(x)
        assert torch.equal(one.images[outside], x[outside])
        assert (name == "clean") == torch.equal(one.images, x)
        if name in ("eyeglasses", "square", "indirect", "eye_patch"):
            assert (one.distance < clean).all(), name
        assert name != "evasion" or (one.distance > clean).all()
    assert embed.training and all(p.requires_grad for p in embed.parameters())
    for name in ("mask", "eye_patch", "indirect", "glasses"):
        with pytest.raises(ValueError, match=f"^'{name}': give one of clean, eyeglasses, "):
            attacks.run_attack(name, config, views, x, anchor, seeded())


def test_the_efforts_are_those_of_the_paper():
    paper = Config()
    for name, numbers in {
        "eyeglasses": (1000, 0.01, 5, False, 128, "impersonate"),
        "square": (1000, 0.01, 5, False, 128, "impersonate"),
        "eye_patch": (5000, 0.005, 1, False, 128, "impersonate"),
        "distal": (2000, 0.01, 1, False, 128, "impersonate"),
        "evasion": (2000, 0.05, 5, False, 128, "evade"),
    }.items():
        assert attacks.effort_of(name, paper) == Effort(*numbers)
    other = replace(paper, optimiser="sign", precision="bfloat16", decay=True, chunk=9)
    effort = attacks.effort_of("indirect", other, 2)
    assert effort == Effort(1000, 0.01, 5, True, 4, "impersonate", "sign", "bfloat16")
    search = paper.square_search_iterations, paper.square_search_lr, paper.square_stride
    assert search == (20, 0.1, 5) and (paper.patch_train, paper.patterns) == (100, 1000)
    assert (paper.noise, paper.targets, paper.min_images) == (10 / 255, 27, 10)
    presets = {name: Config(**preset) for name, preset in attacks.PRESETS.items()}
    assert [c.optimiser for c in presets.values()] == ["adam", "adam", "sign"]
    assert presets["model"].precision == "float32"  # a stranger's


# who takes part


def test_intruders_are_others_and_patches_train_on_other_images():
    person = torch.arange(10).repeat_interleave(4)
    near, far = [0, 1, 2], [3, 4]
    tested, training = attacks.choose_intruders(person, 0, near, far, 6, 5, seeded())
    assert len(set(tested)) == 6 and {int(person[i]) for i in tested} <= {1, 2}
    assert len(set(training)) == 5 and {int(person[i]) for i in training} <= {3, 4}
    tested, training = attacks.choose_intruders(person, 0, near, far, 10, 100, seeded())
    assert [int(person[i]) in (1, 2) for i in tested] == [True] * 8 + [False] * 2
    assert not set(tested) & set(training) and len(tested) + len(training) == 16
    longer, _ = attacks.choose_intruders(person, 0, near, far, 12, 0, seeded())
    assert longer[:10] == tested
    parts = (0, "a"), (0, "a"), (1, "a")
    a, b, c = (attacks.stable_generator(*each).initial_seed() for each in parts)
    assert a == b == 3426483283761622585 != c  # the same on every machine


# the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on photographs of eight persons with an untrained embedding, as embed.py leaves it."""
    home = tmp_path_factory.mktemp("attacks")
    for p, k in itertools.product(range(8), range(5)):
        image = (faces(1, p, 8) * 0.7 + faces(1, 100 * p + k, 8) * 0.3)[0].permute(1, 2, 0)
        path = home / f"people/p{p}/{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.mul(255).byte().numpy()).resize((64, 64)).save(path)
    loaded, folder = data.load("folder", home / "people", cache=None, progress=False), home / "run"
    split = data.split_persons(loaded, 2, 2, 4, 0, min_target_images=5)
    data.write_manifest(folder / "people.json", loaded, split)
    torch.manual_seed(0)
    weights = embedding.Embedding(1 / 32, 16).state_dict()
    config = {"width": 1 / 32, "dim": 16, "standardise": False}
    run.save(folder / "ours/embedding.pt", "embedding", config=config, model=weights)
    about = {"data": "folder", "root": str(home / "people"), "crop": "", "preset": "demo"}
    run.write(folder / "run.json", about | {"seed": 3, "options": {}})
    return folder


@pytest.fixture
def command(trained, monkeypatch):
    """command(*flags) -> exit status of attacks.py on a copy-free small run."""
    flags = "--iterations 4 --patch-iterations 2 --patterns 4 --evasion-iterations 2 --eot-tests 2"
    flags += " --distal-iterations 2 --eot-samples 1 --patch-train 4 --square-stride 20"
    flags += " --square-search-iterations 1 --intruders 3 --clean-intruders 6 --targets 3"
    flags += " --precision float32"
    monkeypatch.chdir(trained.parent)
    return lambda *more: attacks.main(["--run", str(trained), *flags.split(), *more])


def rows(folder, name, rows="attacks"):
    with open(folder / "ours" / rows / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_command_writes_rows_sidecar_and_images(trained, command, capsys):
    names = [name for name in attacks.ATTACKS if name != "indirect"]
    flags = ("--attacks", ",".join(names), "--defences", "basic,both", "--targets", "2")
    assert command(*flags, "--overwrite") == 0
    line, out = "ours eyeglasses: 4 iterations, 1 restarts, 2 targets, 12 pairs", str(trained)
    printed = capsys.readouterr().out
    assert line in printed and all(f"\nours    {name} " in printed for name in names)
    assert printed.endswith(f"rows: {out}/*/attacks; the table again: {out}/tables.md\n")
    manifest = json.loads((trained / "people.json").read_text())
    clean = rows(trained, "clean")
    assert len(clean) == 2 * 2 * (4 + 6) and tuple(clean[0]) == attacks.COLUMNS
    for row in clean:
        assert (row["person"] == row["target"]) == (row["role"] == "genuine")
        assert row["candidate"] != row["anchor"]
        assert row["target"] in manifest["target"] and row["person"] not in manifest["train"]
    key = lambda r: tuple(r[k] for k in ("target", "candidate", "mirroring", "selection", "anchor"))
    counts = {"evasion": 2 * 2 * 4, "distal": 2 * 2, "noise": 2 * 2 * (4 + 3)}
    for name in names[1:]:
        own = rows(trained, name)
        assert len(own) == counts.get(name, 2 * 2 * 3), name
        assert name == "distal" or {key(r) for r in own} <= {key(r) for r in clean}
        about = json.loads((trained / "ours/attacks" / f"{name}.json").read_text())
        assert (about["n"], about["n_targets"], about["seed"]) == (len(own), 2, 3)
        assert about["outside_mask_max"] == about["nonfinite"] == 0
        assert name != "eyeglasses" or about["gradients"] == len(own) * 4
        assert about["trained_in"] == "float32" and about["config"]["intruders"] == 3
        with np.load(trained / "ours/attacks" / f"{name}.npz") as images:
            shown = {k: images[k].shape for k in ("anchor", "mask")}
            assert shown == {"anchor": (2, 3, 64, 64), "mask": (2, 64, 64)}
            assert len(images["attacked"]) == len({*images["target"]}) == 2
            assert images["attacked"].dtype == np.uint8
    for row in rows(trained, "square"):
        assert row["row"] in ("15", "35") and row["col"] in ("15", "35")


@pytest.fixture(scope="module")
def judged(trained):
    """The images of the run, in [0, 1], their persons' names, its F, features and split."""
    loaded = data.load("folder", trained.parent / "people", cache=None, progress=False)
    model, x = embedding.load_embedding(trained / "ours/embedding.pt"), loaded.images / 255
    return loaded, x, model, model(x), json.loads((trained / "people.json").read_text())


def test_clean_rows_are_the_distances_of_the_embedding(trained, command, judged):
    loaded, x, model, features, _ = judged
    assert command("--attacks", "clean", "--defences", "all", "--overwrite") == 0
    mirrored = model(x.flip(3))
    for row in rows(trained, "clean"):
        a, c = int(row["anchor"]), int(row["candidate"])
        views = (features, mirrored)[: 1 + int(row["mirroring"])]
        squared = sum((f[c] - features[a]).square().sum() for f in views) / len(views)
        assert float(row["distance"]) == pytest.approx(float(squared.sqrt()), rel=1e-4)
        own = [i for i in range(len(x)) if loaded.names[loaded.person[i]] == row["target"]]
        costs = {i: float((features[own] - features[i]).square().sum()) for i in own}
        assert a == (min(costs, key=costs.get) if row["selection"] == "1" else own[0])


def test_the_eye_patch_is_trained_on_images_of_persons_that_are_not_attacked(
    trained, command, judged
):
    """Made again from the manifest: four images of validation persons, none of the tested."""
    loaded, x, model, features, split = judged
    assert command("--attacks", "eye_patch", "--overwrite", "--patch-iterations", "15") == 0
    names = [loaded.names[p] for p in loaded.person]
    for target in split["target"]:
        own = [row for row in rows(trained, "eye_patch") if row["target"] == target]
        if not own:
            continue
        near, far = ([loaded.names.index(p) for p in split[k]] for k in ("target", "validation"))
        rng = attacks.stable_generator(3, target, "intruders")
        index = loaded.names.index(target)
        tested, training = attacks.choose_intruders(loaded.person, index, near, far, 3, 4, rng)
        assert [int(row["candidate"]) for row in own] == tested
        assert {names[i] for i in training} <= {*split["validation"]}
        views, a = Mirrored(model), int(own[0]["anchor"])
        anchor = features[a]
        with np.load(trained / "ours/attacks/eye_patch.npz") as shown:
            [t] = np.flatnonzero(shown["target"] == target)
            assert (shown["anchor"][t] == loaded.images[a].numpy()).all()
        want = []
        for index in (training, tested + training):
            inputs = views, x[index], anchor, PATCH, Effort(15, 0.2, 1, True)
            rng = attacks.stable_generator(3, target, "eye_patch")
            patched = attacks.apply_pattern(
                x[tested], attacks.universal_patch(*inputs, rng)[0], PATCH
            )
            want.append(attacks.distances(views, patched, anchor).tolist())
        distance = [float(row["distance"]) for row in own]
        assert distance == pytest.approx(want[0], rel=1e-5)
        assert distance != pytest.approx(want[1], rel=1e-3)  # it would show


def test_a_targets_rows_do_not_depend_on_those_beside(trained, command):
    flags = ("--attacks", "eyeglasses", "--overwrite")
    assert command(*flags) == 0
    whole = rows(trained, "eyeglasses")
    assert command(*flags, "--targets", "1", "--chunk", "2") == 0
    fewer = rows(trained, "eyeglasses")
    same = [row for row in whole if row["target"] == fewer[0]["target"]]
    assert len(fewer) == len(same) == 3
    names = json.loads((trained / "people.json").read_text())["target"]
    order = lambda name: attacks.stable_generator(3, name).initial_seed()
    assert fewer[0]["target"] == min(names, key=order)
    for a, b in zip(fewer, same):
        assert {**a, "distance": 0} == {**b, "distance": 0}
        assert float(a["distance"]) == pytest.approx(float(b["distance"]), rel=1e-3)
    assert command(*flags, "--targets", "1", "--seed", "4") == 0
    assert [r["distance"] for r in rows(trained, "eyeglasses")] != [r["distance"] for r in fewer]


def test_goes_on_after_a_stop_and_refuses_other_settings(trained, command, capsys, interrupted_at):
    flags, rng = ("--attacks", "eyeglasses", "--intruders", "2"), functools.partial(rows, trained)
    images = trained / "ours/attacks/eyeglasses.npz"
    assert command(*flags, "--overwrite") == 0
    whole, shown = rng("eyeglasses"), dict(np.load(images))
    with interrupted_at(run, "append_rows", 3):  # its images are written already
        assert command(*flags, "--overwrite") == 130
    assert "goes on" in capsys.readouterr().err and rng("eyeglasses") == whole[:4]
    assert command(*flags, "--lr", "0.3") == 2
    error = capsys.readouterr().err
    assert "lr (0.2 before, 0.3 now)" in error and "--overwrite" in error and error.count("\n") == 1
    with interrupted_at(attacks, "attack_target", 0) as calls:  # never
        assert command(*flags) == 0
    assert len(calls) == 1 and rng("eyeglasses") == whole  # only the third
    assert all((array == shown[key]).all() for key, array in np.load(images).items())
    assert command(*flags) == 0 and "kept" in capsys.readouterr().out
    photograph = trained.parent / "people/p0/0.png"
    photograph.rename(photograph.with_name("9.png"))
    assert command(*flags) == 2 and "people" in capsys.readouterr().err
    photograph.with_name("9.png").rename(photograph)


def test_a_line_a_minute_says_how_long_it_will_take(trained, command, capsys, monkeypatch):
    clock, append = [0.0], run.append_rows

    def later(*inputs, seconds):
        clock[0] += seconds
        append(*inputs)

    monkeypatch.setattr(attacks, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for seconds, wanted in {90: {1: "3.0", 2: "1.5", 3: "0.0"}, 40: {2: "0.7"}}.items():
        monkeypatch.setattr(run, "append_rows", functools.partial(later, seconds=seconds))
        assert command("--attacks", "noise,clean", "--overwrite") == 0
        lines = [f"ours noise: {k} of 3 targets, left {t} min" for k, t in wanted.items()]
        assert [x for x in capsys.readouterr().out.splitlines() if x[:10] == "ours noise"] == [
            *lines,
            "ours noise: 3 targets, 21 pairs, 0 s",
        ]


def test_indirect_rows_are_of_the_generator_too(trained, command, capsys):
    config = generator.Config(**TINY_GENERATOR)
    flags = ("--attacks", "clean,indirect", "--overwrite")
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = generator.Lord(config).state_dict()
        parts = {"config": dataclasses.asdict(config), "lord": state, "train": []}
        run.save(trained / "generator.pt", "generator", **parts)
        assert command(*flags[: 3 - seed]) == 2 * seed
    assert "indirect.json: other settings: generator (" in capsys.readouterr().err
    (trained / "generator.pt").unlink()


def test_an_attack_that_cannot_be_made_stops_those_before_it(command, capsys, interrupted_at):
    wanted = {"indirect": "generator.pt", "eye_patch --intruders 500": "too few images"}
    for words, named in wanted.items():
        with interrupted_at(attacks, "attack_target", 1) as calls:
            assert command("--overwrite", "--attacks", *f"clean,{words}".split()) == 2
        assert not calls and named in capsys.readouterr().err


def test_other_people_are_judged(trained, command, capsys):
    shutil.copytree(trained.parent / "people", trained.parent / "others")
    people = ("--data", "folder", "--root", "others")
    assert command(*people, "--min-images", "5", "--attacks", "clean") == 0
    targets = {row["target"] for row in rows(trained, "clean", "attacks-others")}
    trained_on = json.loads((trained / "people.json").read_text())["train"]
    assert len(targets) == 3 and not targets & {*trained_on}
    for root, message in (
        ("others", "--min-images"),
        ("people", "trained on these persons"),
        ("nowhere", "nowhere"),
    ):
        capsys.readouterr()
        assert command("--data", "folder", "--root", root) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and error.count("attacks.py:") == 1


BAD = {
    "--attacks glasses": "--attacks glasses",
    "--method nonsense": "nonsense",
    "--attacks indirect": "generator",
    "--size 112": "--size 112",
    "--judge net.py:f": "--judge",
    "--person-folder first": "--person-folder",
    "--mask nowhere.png": "nowhere.png",
    "--run nowhere": "no such folder",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_one_line_and_exit_2(command, capsys, flags):
    assert command(*flags.split(), "--overwrite") == 2
    error = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in error if line.startswith("attacks.py:")]
    assert len(lines) == 1 and BAD[flags] in error[-1]


# what a user's model may do, and what the functions beside the attacks refuse


class Drops:
    """Features with a path that is dropped at random, for each image, at inference too; its other
    head still trains."""

    def __init__(self, rate):
        self.rate, self.other = rate, nn.Dropout().train()

    def features(self, x):
        keep = torch.rand(len(x), 1) >= self.rate
        return EMBED(x) + keep * EMBED(x.flip(2))


@pytest.mark.parametrize("n", [1, 3])
def test_a_path_dropped_at_random_is_refused_each_time(n):
    torch.manual_seed(0)
    for rate in [0.2] * 30:
        with pytest.raises(ValueError, match="alone and in a batch, or in another call: .* random"):
            attacks.check_inputs(Drops(rate).features, X[:n], A)
    for rate in (0.0, 1.0):
        images, anchor = attacks.check_inputs(Drops(rate).features, X[:n], A)
        assert torch.equal(images, X[:n]) and torch.equal(anchor, A.expand(n, -1))
    named = Linear()
    named.views = ["a list of that name"]
    plain = CALLS["tanh"](EMBED, X[:n], A)
    assert torch.equal(CALLS["tanh"](named, X[:n], A).distance, plain.distance)


BLOCKED = {
    "no_grad": torch.no_grad()(lambda x: EMBED(x)),
    "inference_mode": torch.inference_mode()(lambda x: EMBED(x)),
    "detach": lambda x: EMBED(x.detach()),
    "numpy": lambda x: EMBED(torch.from_numpy(x.detach().numpy().copy())),
}


@pytest.mark.parametrize("blocked", BLOCKED)
@pytest.mark.parametrize("call", CALLS)
def test_a_model_without_a_gradient_is_refused_where_one_is_followed(call, blocked):
    if call not in ("tanh", "square", "universal", "indirect"):
        assert CALLS[call](BLOCKED[blocked], X, A).distance.isfinite().all()
        return
    with pytest.raises(ValueError, match="^embed: no gradient reaches the images: has it no_grad"):
        CALLS[call](BLOCKED[blocked], X, A)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_changes_its_images_is_refused(call):
    with pytest.raises(ValueError, match="^embed: changes its images in place"):
        CALLS[call](lambda x: EMBED(x.sub_(0.5)), X, A)


def test_a_model_is_tried_by_one_step_before_an_attack():
    normal = lambda x: nn.functional.normalize(EMBED(x), dim=1)
    attacks.check_gradient(normal, X)  # a norm that is constant
    bad = {
        "no gradient reaches": lambda x: normal(x.detach()),
        "the gradient for the images is zero": lambda x: normal((x * 255).round()),
        "zero or not finite": lambda x: (EMBED(x) - EMBED(x).detach()).sqrt(),
    }
    for reason, embed in bad.items():
        with pytest.raises(ValueError, match=f"^embed: .*{reason}"):
            attacks.check_gradient(embed, X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_precision_become_float32(dtype):
    """Their squares would be infinite in float16."""
    embed = lambda x: (300 * EMBED(x)).to(dtype)
    anchors = attacks.extract(embed, faces(2, 9))
    assert anchors.dtype == torch.float32 and torch.equal(anchors, embed(faces(2, 9)).float())
    far = embed(X).double() - anchors[0].double()
    for anchor in (anchors[0], anchors[0].to(dtype)):
        got = attacks.distances(embed, X, anchor)
        assert got.dtype == torch.float32 and torch.allclose(got.double(), far.norm(dim=1))
        for call, attack in CALLS.items():
            result = attack(embed, X, anchor)
            result = result[1] if call == "universal" else result
            want = (embed(result.images).double() - anchors[0].double()).norm(dim=1)
            assert torch.allclose(result.distance.double(), want) and want.max() > 256


def test_functions_beside_the_attacks_refuse_what_would_be_wrong_without_a_word():
    byte, values, P = (X * 255).byte(), torch.rand(3, 107), GLASSES.sum()
    assert torch.equal(attacks.apply_pattern(X, values, GLASSES)[1][:, GLASSES], values)
    larger = torch.rand(3, eyeglasses_mask(112, 112).sum())
    fill = attacks.apply_pattern
    wrong = {
        "images: torch.uint8": lambda: fill(byte, values, GLASSES),
        r"images: of shape \(3, 64, 64\)": lambda: fill(X[0], values, GLASSES),
        "pattern: values from .* to 2": lambda: fill(X, values * 255, GLASSES),
        "pattern: torch.uint8": lambda: fill(X, (values * 255).byte(), GLASSES),
        rf"pattern: of shape .* wanted \(3, {P}\)": lambda: fill(X, larger, GLASSES),
        "images: values from .* to 25": lambda: attacks.distances(EMBED, X * 255, A),
        "images: torch.uint8, wanted": lambda: attacks.uniform_noise(byte, 0.1, seeded()),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_numbers_and_places_that_do_nothing_are_refused_by_name():
    inputs, efforts = (EMBED, X, A), (QUICK, QUICK, seeded())
    random, square = attacks.random_patterns, attacks.square_attack
    wrong = {
        "iterations must be 1 or more, not -1": lambda: Effort(iterations=-1),
        "restarts must be 1 or more, not 0": lambda: Effort(restarts=0),
        "chunk must be 1 or more, not 0": lambda: Effort(chunk=0),
        "patterns must be 1 or more, not 0": lambda: random(*inputs, GLASSES, 0, seeded()),
        "places must": lambda: square(*inputs, [], *efforts),
        r"place \(60, 15\): 10 x 10 .* 64 x 64": lambda: square(*inputs, [(60, 15)], *efforts),
        r"place \(0, -1\)": lambda: attacks.square_mask(0, -1),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert attacks.square_mask(54, 54)[54:, 54:].all()


def test_the_strongest_of_attacks_that_evade_is_the_farthest():
    near, far = (Effort(5, 0.3, 1, direction=way) for way in ("impersonate", "evade"))
    results = {way: tanh_attack(EMBED, X, A, GLASSES, way) for way in (near, far)}
    assert [results[way].direction for way in (near, far)] == ["impersonate", "evade"]
    one, two = (
        attacks.AttackResult(X, torch.tensor(d), direction="evade")
        for d in ([1.0, 4.0, math.nan], [2.0, 3.0, 5.0])
    )
    best = attacks.strongest(one, two)
    assert best.distance.tolist() == [2, 4, 5] and best.extra["strongest"].tolist() == [1, 0, 1]
    assert best.direction == "evade" and attacks.strongest(best, one).distance[0] == 2
    with pytest.raises(ValueError, match="^results: directions .'evade', 'impersonate'., wanted"):
        attacks.strongest(*results.values())
    far_places = [attacks.square_attack(EMBED, X, A, PLACES, far, e, seeded()) for e in (near, far)]
    assert torch.equal(far_places[0].images, far_places[1].images)  # the search evades too
    pattern, result = attacks.universal_patch(EMBED, X, A, PATCH, far, seeded())
    assert result.direction == "evade" and pattern.shape == (3, 384)
