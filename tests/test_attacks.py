"""Each attack is held to its definition: known optima, masks, signs, seeds; the real command."""

import functools
import itertools
import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attacks
import embed as embedding
from attacks import (
    Config,
    Effort,
    Mirrored,
    eye_patch_mask,
    eyeglasses_mask,
    run_attack,
    square_mask,
)
from data import run

ROOT = Path(__file__).resolve().parents[1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def faces(n, seed=0, size=64):
    return torch.rand(n, 3, size, size, generator=seeded(seed))


def judge(embed, mirroring=True, transforms=None):
    """The embedding as an attack is given it."""
    embed = Mirrored(embed) if mirroring else embed
    return embed if transforms is None else attacks.Transformed(embed, transforms)


def distances(embed, images, anchor, mirroring=True, transforms=None, chunk=256):
    return attacks.distances(judge(embed, mirroring, transforms), images, anchor, chunk)


def tanh_attack(embed, images, anchor, mask, mirroring=True, start=None, **effort):
    start = seeded() if start is None else start
    return attacks.tanh_attack(
        judge(embed, mirroring), images, anchor, mask, Effort(**effort), start
    )


def universal_patch(embed, images, anchor, mask, **effort):
    embed = Mirrored(embed)
    return attacks.universal_patch(embed, images, anchor, mask, Effort(**effort), seeded())


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
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 5, 4, 2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(512, 8),
        )

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


# masks
def test_masks_are_the_papers():
    glasses, patch = eyeglasses_mask(), eye_patch_mask()
    assert glasses.shape == (64, 64) and glasses.sum() == 107 and f"{107 / 4096:.1%}" == "2.6%"
    rows, columns = glasses.nonzero().unbind(1)
    assert 24 <= rows.min() and rows.max() < 40 and 16 <= columns.min() and columns.max() < 48
    assert (
        glasses[26, 17] and not glasses[26, 16] and glasses[26, 28] and not glasses[26, 29]
    )  # 7ff80ffe: bits 30 to 19
    assert patch[26:38, 16:48].all() and patch.sum() == 12 * 32
    square = square_mask(15, 35)
    assert square.sum() == 100 and square[15:25, 35:45].all()


@pytest.mark.parametrize("stride, count", [(5, 25), (1, 21 * 21), (3, 64), (50, 4)])
def test_square_positions_cover_the_region_with_its_flush_edge(stride, count):
    places = attacks.square_positions(stride)
    assert len(places) == len(set(places)) == count
    assert (
        {p for place in places for p in place} <= set(range(15, 36))
        and (15, 15) in places
        and (35, 35) in places
    )
    if stride == 5:
        assert {row for row, _ in places} == {15, 20, 25, 30, 35}


to_scale = lambda pixels, size: int(pixels * size / 64 + 0.5)
SIZES = [(32, 32), (64, 64), (112, 112), (150, 150), (112, 96)]


@pytest.mark.parametrize("height, width", SIZES)
def test_masks_and_places_are_to_the_images_scale(height, width):
    glasses, patch = eyeglasses_mask(height, width), eye_patch_mask(height, width)
    row, column = (torch.arange(n) * 64 + 32 for n in (height, width))  # centres, in 64ths
    nearest = eyeglasses_mask()[row.div(height).long()][:, column.div(width).long()]
    assert torch.equal(glasses, nearest)
    for mask, drawn in ((glasses, eyeglasses_mask()), (patch, eye_patch_mask())):
        assert mask.shape == (height, width)
        assert abs(mask.float().mean() - drawn.float().mean()) < 0.003
        for side, n in ((1, height), (0, width)):
            ends, wanted = (m.any(side).nonzero()[[0, -1], 0] for m in (mask, drawn))
            assert ((ends / n - wanted / 64).abs() <= 1 / min(n, 64)).all()
    places = attacks.square_positions(5, height, width)
    h, w = to_scale(10, height), to_scale(10, width)
    assert len(places) == 25 and places[0] == (to_scale(15, height), to_scale(15, width))
    assert places[-1] == (to_scale(35, height), to_scale(35, width))
    for (r, c), square in zip(places, attacks.squares(places, height, width)):
        assert square.sum() == h * w and square[r : r + h, c : c + w].all()


@pytest.mark.parametrize("height, width", [(32, 32), (112, 112), (150, 150), (64, 80)])
def test_every_attack_covers_the_images_own_size(height, width):
    weight = torch.randn(3 * height * width, 8, generator=seeded(1)) / 64
    embed = lambda images: images.flatten(1) @ weight
    x, train = (torch.rand(2, 3, height, width, generator=seeded(k)) for k in (0, 1))
    short = dict.fromkeys(("restarts", "evasion_restarts", "eot_samples", "eot_tests"), 1)
    names = ("", "patch_", "evasion_", "distal_", "square_search_")
    short |= {"patterns": 2, "rule_mask": (32,)} | {f"{name}iterations": 2 for name in names}
    config = replace(Config(), square_stride=20, rule_iterations=2, **short)
    for name in attacks.ATTACKS:
        given = embed, x, embed(x)[0]
        if name.startswith("rule"):
            rule = attacks.cover_named(name, config, height, width)
            covered = attacks.Covered(embed, train[0], rule, torch.full_like(x[0], 0.5))
            given = covered, x, covered.anchor
        found = run_attack(name, config, *given, seeded(), training=train, virtual=embed(train)[0])
        images = found.images if name == "distal" else x
        mask = found.mask.expand(len(images), -1, -1)[:, None].expand_as(images)
        assert mask.shape[2:] == (height, width) and found.images.shape[1:] == x.shape[1:]
        assert torch.equal(found.images[~mask], images[~mask])
        still = ("clean", "distal", "rule", "rule_places", "rule_one")
        assert name in still or (found.images != x[: len(images)])[mask].any()
        if name == "square":
            assert set(found.extra["row"].tolist()) <= {to_scale(n, height) for n in (15, 35)}
        if name == "eye_patch":
            assert found.extra["pattern"].shape[1] == to_scale(38, height) - round(26 * height / 64)


def test_a_larger_image_is_as_vulnerable_and_a_mask_of_another_size_an_error():
    weight = torch.randn(3 * 112 * 112, 8, generator=seeded(1)) / 112
    embed, x = lambda images: images.flatten(1) @ weight, faces(4, size=112)
    anchor = embed(faces(1, 9, 112))[0]
    found = tanh_attack(embed, x, anchor, eyeglasses_mask(112, 112), False, iterations=100, lr=0.1)
    assert found.distance.max() < 0.01 and distances(embed, x, anchor, False).min() > 0.2
    smeared = torch.zeros(112, 112, dtype=torch.bool)
    smeared.view(-1)[eyeglasses_mask().flatten().nonzero()] = True  # what came of it before
    before = tanh_attack(embed, x, anchor, smeared, False, iterations=100, lr=0.1)
    assert before.distance.mean() > 10 * found.distance.mean()
    calls = [
        lambda mask: tanh_attack(embed, x, anchor, mask, iterations=1),
        lambda mask: universal_patch(embed, x, anchor, mask, iterations=1),
        lambda mask: attacks.random_patterns(embed, x, anchor, mask, 1, seeded()),
        lambda mask: attacks.apply_pattern(x, torch.zeros(3, int(mask.sum())), mask),
    ]
    wrong = (
        eyeglasses_mask(),
        eyeglasses_mask(112, 96),
        smeared.float(),
        smeared.expand(3, -1, -1),
    )
    for call, mask in itertools.product(calls, wrong):
        with pytest.raises(ValueError, match="^mask: "):
            call(mask)


# distances
def test_distance_mirrors_the_candidate_and_not_the_anchor():
    embed, x = Linear(), faces(3)
    anchor = embed(faces(1, 9))[0].detach()
    by_hand = [
        ((embed(x) - anchor).square().sum(1) + (embed(x.flip(3)) - anchor).square().sum(1)) / 2,
        (embed(x) - anchor).square().sum(1),
    ]
    for mirroring, want in zip((True, False), by_hand):
        assert torch.allclose(distances(embed, x, anchor, mirroring), want.sqrt())
        assert torch.allclose(distances(embed, x, anchor, mirroring, chunk=2), want.sqrt())


def test_views_are_side_by_side_at_the_mean_distance():
    embed, x, anchor = Linear(), faces(3), torch.randn(8, generator=seeded())
    moves = attacks.draw_transforms(4, Config(), seeded(2))
    seen = []
    handle = embed.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    features = judge(embed, True, moves)(x)
    handle.remove()
    assert features.shape == (3, 2 * 4 * 8) and seen == [2 * 4 * 3]  # one pass
    views = [attacks.transform(x, moves[k : k + 1]) for k in range(4)]
    views += [view.flip(3) for view in views]
    by_hand = torch.stack([(embed(view) - anchor).square().sum(1) for view in views]).mean(0)
    assert torch.allclose(attacks.squared_distance(features, anchor), by_hand)


def test_anchor_is_the_image_nearest_to_the_others():
    features = torch.tensor([[9.0, 0], [0, 0], [1, 0], [0, 1]])
    squared = [sum(math.dist(a, b) ** 2 for b in features.tolist()) for a in features.tolist()]
    assert attacks.select_anchor(features) == squared.index(min(squared)) == 2


def test_transform_moves_scales_turns_and_brightens():
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 20:24, 30:34] = 0.5
    same, moved, bright, turned, large = attacks.transform(
        x,
        torch.tensor(
            [
                [0, 0, 1, 0, 1],
                [2, -3, 1, 0, 1],
                [0, 0, 1, 0, 1.4],
                [0, 0, 1, math.pi / 2, 1],
                [0, 0, 2, 0, 1],
            ]
        ),
    ).split(1)
    assert torch.allclose(same, x, atol=1e-5)
    assert torch.allclose(bright, x * 1.4, atol=1e-5)
    assert torch.allclose(moved, torch.roll(x, (-2, 3), (2, 3)), atol=1e-4)
    assert min((turned - torch.rot90(x, k, (2, 3))).abs().max() for k in (1, 3)) < 1e-4
    assert torch.isclose(large.sum(), 4 * x.sum(), rtol=0.02)
    drawn = attacks.draw_transforms(1000, Config(), seeded())
    limits = torch.tensor([2, 2, 0.05, math.radians(5), 0.1])
    assert ((drawn - torch.tensor([0, 0, 1.0, 0, 1])).abs() <= limits + 1e-6).all()
    assert ((drawn - torch.tensor([0, 0, 1.0, 0, 1])).abs().amax(0) > 0.95 * limits).all()


# what an attack is given
CALLS = {
    "distances": lambda *given: attacks.distances(*given),
    "tanh": lambda *given: attacks.tanh_attack(*given, eyeglasses_mask(), Effort(2, restarts=1)),
    "square": lambda *given: attacks.square_attack(
        *given, [(15, 15), (35, 20)], Effort(2, restarts=1), Effort(1), seeded()
    ),
    "universal": lambda *given: attacks.universal_patch(
        *given, eye_patch_mask(), Effort(2), seeded()
    )[1],
    "random": lambda *given: attacks.random_patterns(*given, eyeglasses_mask(), 2, seeded()),
    "indirect": lambda embed, images, anchor: attacks.indirect_attack(
        embed, images, anchor, anchor, square_mask(20, 20), Effort(2, restarts=1)
    ),
    "run clean": lambda *given: run_attack("clean", Config(), *given, seeded()),
    "run glasses": lambda *given: run_attack("eyeglasses", Config(iterations=1), *given, seeded()),
}
EMBED, X = Linear(), faces(3)
A = EMBED(faces(1, 9))[0].detach()
WRONG = {
    "uint8": (EMBED, (X * 255).byte(), A, "images: uint8 .3, 3, 64, 64., wanted float32"),
    "float16": (EMBED, X.half(), A, "images: float16"),
    "one image": (EMBED, X[0], A, r"images: float32 \(3, 64, 64\), wanted .* \(N, C, H, W\)"),
    "numpy": (EMBED, X.numpy(), A, "images: ndarray"),
    "0 to 255": (EMBED, X * 255, A, r"images: values from .* to 2\d\d.*, wanted \[0, 1\]"),
    "-1 to 1": (EMBED, X * 2 - 1, A, "images: values from -"),
    "NaN": (EMBED, X.where(X < 0.99, math.nan), A, "images: values from nan"),
    "tuple": (lambda x: (EMBED(x), x), X, A, "embed: gives tuple"),
    "maps": (lambda x: EMBED(x)[..., None, None], X, A, r"embed: gives float32 \(2, 8, 1, 1\)"),
    "flat": (lambda x: EMBED(x).flatten(), X, A, r"embed: gives float32 \(16,\) for 2 images"),
    "labels": (lambda x: EMBED(x).long(), X, A, "embed: gives int64"),
    "NaN features": (lambda x: EMBED(x) * math.nan, X, A, "embed: features .* not finite"),
    "narrow anchor": (EMBED, X, A[:1], r"anchor: float32 \(1,\) for features of width 8 of 1 view"),
    "part of the anchor": (Mirrored(EMBED), X, A[:4], "anchor: float32 .* width 16 of 2 views"),
    "wide anchor": (EMBED, X, torch.cat([A, A]), "anchor: float32 .16,. for features of width 8"),
    "anchor of maps": (EMBED, X, A[None, :, None], "anchor: float32 .1, 8, 1., wanted features"),
    "two anchors": (EMBED, X, torch.stack([A, A]), r"anchor: float32 \(2, 8\), wanted .*\(3, D\)"),
    "NaN anchor": (EMBED, X, A * math.inf, "anchor: not finite"),
    "no anchor": (EMBED, X, None, "anchor: NoneType"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("embed, images, anchor, told", WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_one_line(call, embed, images, anchor, told):
    with pytest.raises(ValueError, match="^" + told) as error:
        call(embed, images, anchor)
    assert "\n" not in str(error.value)


def test_wrong_inputs_of_the_calls_without_an_anchor():
    for name in ("uint8", "float16", "one image", "0 to 255", "NaN", "numpy"):
        embed, images, _, told = WRONG[name]
        with pytest.raises(ValueError, match="^" + told):
            attacks.uniform_noise(images, 0.1, seeded())
        if name != "uint8":  # which it is for
            with pytest.raises(ValueError, match="^" + told):
                attacks.extract(embed, images)
    for name in ("tuple", "maps", "NaN features"):
        with pytest.raises(ValueError, match="^" + WRONG[name][3]):
            attacks.extract(WRONG[name][0], X)
        with pytest.raises(ValueError, match="^" + WRONG[name][3]):
            attacks.distal_attack(WRONG[name][0], (1, 3, 64, 64), A, Effort(1), seeded())
    last = lambda x: EMBED(x) / (x[:, :1, 0, 0] != 0.5)  # infinite for one image
    bad = torch.cat([X, X[:1].clone()])
    bad[3, 0, 0, 0] = 0.5
    with pytest.raises(ValueError, match="1 of 4 images have no finite distance"):
        attacks.distances(last, bad, A)
    with pytest.raises(ValueError, match="features are not finite"):
        attacks.extract(last, bad)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_right_stays_right(call):
    """float64, an anchor for each image, one of shape (1, D), one that is mirrored too."""
    alike = [(EMBED, X, A), (EMBED, X, A.expand(3, -1)), (EMBED, X, A[None])]
    found = [getattr(r, "distance", r) for r in (call(*given) for given in alike)]
    assert all(torch.equal(found[0], other) for other in found) and found[0].isfinite().all()
    call(Linear().double(), X.double(), A.double())
    twice = Mirrored(EMBED)
    call(twice, X, twice(faces(1, 9))[0].detach())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_empty_batch_gives_an_empty_result(call):
    strict = lambda x: EMBED(x) if len(x) else 1 / 0
    if call is CALLS["universal"]:
        with pytest.raises(ValueError, match="none to train"):
            call(strict, X[:0], A)
        return
    found = call(strict, X[:0], A)
    assert getattr(found, "distance", found).shape == (0,)
    assert getattr(found, "images", X[:0]).shape == (0, 3, 64, 64)
    assert (
        attacks.extract(strict, X[:0]).shape == attacks.extract(strict, X[:0] * 1).shape == (0, 8)
    )
    assert attacks.extract(strict, X[:0].byte()).shape == (0, 8)
    assert attacks.uniform_noise(X[:0], 0.1, seeded()).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_off(call, mode):
    plain = call(EMBED, X, A)
    with mode():
        given = EMBED, X.clone(), A.clone()
        found = call(*given)
    again = call(EMBED, X.clone().requires_grad_(), A.clone().requires_grad_())
    for other in (found, again):
        assert torch.equal(*(getattr(r, "distance", r) for r in (plain, other)))
        assert not getattr(other, "images", X).requires_grad


def test_a_start_of_the_attacks_own():
    given = EMBED, X, A, eyeglasses_mask(), Effort(3, 0.1, 2)
    assert torch.equal(
        attacks.tanh_attack(*given).images, attacks.tanh_attack(*given, seeded()).images
    )


def train_mode():
    """A model in training mode behind every kind of callable, and what must not move in it."""
    torch.manual_seed(0)
    model = Small()

    class Holder:
        def __init__(self):
            self.model = model

        def features(self, x):
            return self.model(x)

        def __call__(self, x):
            return self.model(x)

    helper = lambda x: model(x)
    callables = {
        "closure": lambda x: model(x),
        "global": eval("lambda x: model(x)", {"model": model}),
        "default": lambda x, model=model: model(x),
        "partial": functools.partial(lambda net, x: net(x), model),
        "method": model.forward,
        "method of another": Holder().features,
        "object": Holder(),
        "helper": lambda x: torch.nn.functional.normalize(helper(x)),
    }
    return model, callables | {f"mirrored {k}": Mirrored(v) for k, v in callables.items()}


@pytest.mark.parametrize("name", train_mode()[1])
def test_training_mode_behind_a_callable_is_refused_and_nothing_moves(name):
    model, callables = train_mode()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anchor = torch.zeros(8)
    for call in (*CALLS.values(), lambda embed, x, _: attacks.extract(embed, x)):
        with pytest.raises(ValueError, match=r"^embed: .*: call model\.eval\(\) first$"):
            call(callables[name], X, anchor)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()
    attacks.distances(callables[name], X, anchor)


@pytest.mark.parametrize("images", [X, X[:1], X[:1].expand(3, -1, -1, -1), X[:1] * 0])
@pytest.mark.parametrize("mirroring", [False, True])
def test_training_mode_that_is_not_found_is_seen_in_the_answers(images, mirroring):
    """Batch statistics and dropout of no module; an image alone, and a batch of copies."""
    weight = EMBED.weight.detach()
    callables = {
        "alone and in a batch": lambda x: F.batch_norm(x, None, None, training=True),
        "a second time": lambda x: F.dropout(x + 0.1, 0.1),
    }
    for told, layer in callables.items():
        embed = judge(lambda x, layer=layer: layer(x).flatten(1) @ weight, mirroring)
        with pytest.raises(ValueError, match=f"differently {told}: call model.eval"):
            attacks.distances(embed, images, A)


def test_rounding_that_depends_on_the_batch_is_not_refused(small):
    import embed

    torch.manual_seed(0)
    for model in (embed.Embedding(1 / 4), ResNet(), small):
        model.eval()
        for image in faces(5, 3):
            attacks.distances(lambda x, f=model: f(x), image[None], model(X[:1])[0].detach())


# tanh attack
@pytest.mark.parametrize("direction", ["impersonate", "evade"])
def test_attack_stays_in_its_mask_and_range_and_has_the_right_sign(small, direction):
    x = faces(4)
    x[0], x[1] = 0.0, 1.0  # saturated pixels
    anchor = small(faces(1, 5))[0].detach()
    before = distances(small, x, anchor)
    mask = eyeglasses_mask()
    result = tanh_attack(
        small, x, anchor, mask, direction=direction, iterations=20, lr=0.3, restarts=2
    )
    assert torch.equal(result.images[:, :, ~mask], x[:, :, ~mask])
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert torch.allclose(result.distance, distances(small, result.images, anchor), atol=1e-5)
    assert (
        result.distance < before if direction == "impersonate" else result.distance > before
    ).all()
    assert (result.zero_gradients, result.nonfinite, result.gradients) == (0, 0, 4 * 2 * 20)


def test_direction_must_be_named(small):
    with pytest.raises(ValueError, match="impersonate or evade"):
        tanh_attack(small, faces(1), torch.zeros(8), eyeglasses_mask(), direction="both")


def test_more_restarts_never_hurt(small):
    x, anchor = faces(6), small(faces(1, 5))[0].detach()
    found = [
        tanh_attack(
            small, x, anchor, eyeglasses_mask(), iterations=6, lr=0.3, restarts=n, start=seeded(3)
        )
        for n in (1, 2, 4)
    ]
    for fewer, more in pairwise(found):
        assert (more.distance <= fewer.distance + 1e-6).all()
    assert (found[2].distance < found[0].distance - 1e-4).any()
    assert torch.allclose(found[2].extra["by_restarts"][1], found[0].distance, atol=1e-5)
    assert torch.equal(found[2].extra["loss"][:2], found[1].extra["loss"])


@pytest.mark.filterwarnings("ignore:.*gradients")  # far out, tanh is flat
def test_best_iterate_is_kept(small):
    x, anchor = faces(4), small(faces(1, 5))[0].detach()
    settings = {"lr": 50.0, "restarts": 1}  # overshoots
    start = attacks.draw_start(4, 1, 3, 107, seeded(3))
    found = [
        tanh_attack(small, x, anchor, eyeglasses_mask(), iterations=n, **settings, start=start)
        for n in (1, 4, 9)
    ]
    for fewer, more in pairwise(found):
        assert (more.distance <= fewer.distance + 1e-6).all()


def test_empty_mask_changes_nothing(small):
    x, anchor = faces(3), small(faces(1, 5))[0].detach()
    result = tanh_attack(small, x, anchor, torch.zeros(64, 64, dtype=torch.bool), iterations=5)
    assert torch.equal(result.images, x) and result.gradients == 0
    assert torch.equal(result.distance, distances(small, x, anchor))


def test_linear_embedding_reaches_the_known_optimum():
    """One feature, so that the distance inside the box [0, 1]^P is known: |what can be reached|."""
    embed, x, mask = Linear(dim=1), faces(4), eyeglasses_mask()
    w = embed.weight.view(3, 64, 64)[:, mask].detach()
    outside = embed(x * ~mask)[:, 0].detach()
    low, high = outside + w.clamp(max=0).sum(), outside + w.clamp(min=0).sum()
    for anchor in (
        torch.tensor([1e3]),
        torch.tensor([-1e3]),
    ):  # out of reach: every pixel goes to its end
        result = tanh_attack(
            embed, x, anchor, mask, mirroring=False, iterations=150, lr=0.3, restarts=1
        )
        want = (anchor - high).abs() if anchor > 0 else (anchor - low).abs()
        assert torch.allclose(result.distance, want, rtol=0, atol=2e-3 * float(high[0] - low[0]))
        away = tanh_attack(
            embed,
            x,
            anchor,
            mask,
            direction="evade",
            mirroring=False,
            iterations=150,
            lr=0.3,
            restarts=1,
        )
        want = (anchor - low).abs() if anchor > 0 else (anchor - high).abs()
        assert torch.allclose(away.distance, want, rtol=0, atol=2e-3 * float(high[0] - low[0]))
    inside = (low.max() + high.min())[None] / 2  # within reach of all: distance zero
    result = tanh_attack(
        embed, x, inside, mask, mirroring=False, iterations=150, lr=0.1, restarts=1, decay=True
    )
    assert result.distance.max() < 1e-3 * float(high[0] - low[0])


def test_mirroring_optimum_is_that_of_the_mean():
    """The image alone can reach the anchor; the attack through the mirror finds the lowest mean."""
    embed, x, mask = Linear(dim=2), faces(2), eyeglasses_mask()
    weight = embed.weight.detach().view(3, 64, 64, 2)
    columns = torch.cat(
        [weight[:, mask].flatten(0, 1), weight.flip(2)[:, mask].flatten(0, 1)], 1
    ).T  # (4, P)
    rest = torch.cat([embed(x * ~mask), embed((x * ~mask).flip(3))], 1).detach()
    anchor = rest[:, :2].mean(0) + weight[:, mask].sum((0, 1)) / 2 + torch.tensor([0.2, -0.1])
    result = tanh_attack(embed, x, anchor, mask, iterations=400, lr=0.1, restarts=1, decay=True)
    for i in range(2):  # projected gradient on the same convex problem
        pixels, goal = torch.full((columns.shape[1],), 0.5), torch.cat([anchor, anchor]) - rest[i]
        step = 1 / torch.linalg.matrix_norm(columns, 2) ** 2
        for _ in range(3000):
            pixels = (pixels - step * columns.T @ (columns @ pixels - goal)).clamp(0, 1)
        want = ((columns @ pixels - goal).square().sum() / 2).sqrt()
        assert abs(result.distance[i] - want) < 0.01 * distances(embed, x, anchor)[i]


def test_same_seed_same_result_and_chunks_do_not_matter(small):
    x, anchor = faces(5), small(faces(1, 5))[0].detach()
    run = lambda chunk, seed: tanh_attack(
        small.double(),
        x.double(),
        anchor.double(),
        eyeglasses_mask(),
        iterations=8,
        lr=0.1,
        restarts=3,
        chunk=chunk,
        start=seeded(seed),
    )
    first = run(256, 1)
    assert torch.equal(first.images, run(256, 1).images)
    assert not torch.allclose(first.images, run(256, 2).images, atol=1e-3)
    for chunk in (1, 4, 7):
        assert torch.allclose(run(chunk, 1).images, first.images, atol=1e-9)


def test_targets_in_one_batch_as_alone(small):
    """Rows of several targets, each with its own start and anchor, as when attacked alone."""
    x, anchors = faces(6), small(faces(2, 5)).detach()
    settings = {"iterations": 5, "lr": 0.1, "restarts": 2}
    starts = [attacks.draw_start(3, 2, 3, 107, seeded(k + 1)) for k in range(2)]
    both = tanh_attack(
        small,
        x,
        anchors.repeat_interleave(3, 0),
        eyeglasses_mask(),
        start=torch.cat(starts, 1),
        **settings,
    )
    for k in range(2):
        own = slice(3 * k, 3 * k + 3)
        alone = tanh_attack(
            small, x[own], anchors[k], eyeglasses_mask(), start=seeded(k + 1), **settings
        )
        assert torch.allclose(both.images[own], alone.images, atol=1e-4)


def test_mode_and_gradient_flags_are_restored(small):
    small.train()
    small.net[3].eval()
    small.net[0].weight.requires_grad_(False)
    modes = [m.training for m in small.modules()]
    flags = [p.requires_grad for p in small.parameters()]
    state = {k: v.clone() for k, v in small.state_dict().items()}
    anchor = torch.zeros(8)
    seen = []
    handle = small.register_forward_hook(
        lambda m, _, __: seen.append((m.training, any(p.requires_grad for p in m.parameters())))
    )
    universal_patch(small, faces(2), anchor, eye_patch_mask(), iterations=2)
    tanh_attack(small, faces(2), anchor, eyeglasses_mask(), iterations=2)
    handle.remove()
    with pytest.raises(ValueError, match="^anchor: "):
        tanh_attack(small, faces(2), torch.zeros(5), eyeglasses_mask(), iterations=2)
    fails = small.register_forward_hook(lambda *_: 1 / (not torch.is_grad_enabled()) and None)
    with pytest.raises(ZeroDivisionError):  # in the loop, after the checks
        tanh_attack(small, faces(2), anchor, eyeglasses_mask(), iterations=2)
    fails.remove()
    assert set(seen) == {(False, False)}
    assert [m.training for m in small.modules()] == modes and [
        p.requires_grad for p in small.parameters()
    ] == flags
    assert all(p.grad is None for p in small.parameters())
    assert all(torch.equal(v, state[k]) for k, v in small.state_dict().items())


def test_zero_and_nonfinite_gradients_are_counted_and_warned_of():
    rounded = lambda x: (x * 255).round().mean((2, 3))
    with pytest.warns(UserWarning, match="^6 zero and 0 non-finite of 6 gradients") as told:
        result = tanh_attack(
            rounded, faces(2), torch.ones(3), eyeglasses_mask(), iterations=3, restarts=1
        )
    assert (result.zero_gradients, result.nonfinite, result.gradients) == (6, 0, 6)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    broken = lambda x: (x - x.detach()).sum((1, 2, 3))[:, None].sqrt()  # 0, with an infinite slope
    given = broken, faces(2), torch.ones(1)
    with pytest.warns(UserWarning, match="^0 zero and 6 non-finite of 6 gradients"):
        result = tanh_attack(*given, eyeglasses_mask(), iterations=3, restarts=1)
    assert (result.zero_gradients, result.nonfinite, result.gradients) == (0, 6, 6)
    assert result.images.isfinite().all()
    efforts = Effort(3, restarts=1), Effort(1)
    calls = [  # once for each attack that was asked for, whatever it is made of
        lambda: universal_patch(*given, eye_patch_mask(), iterations=3),
        lambda: attacks.square_attack(*given, [(15, 15), (35, 35)], *efforts, seeded()),
        lambda: attacks.indirect_attack(*given, given[2] + 1, square_mask(9, 9), efforts[0]),
        lambda: attacks.distal_attack(broken, (2, 3, 64, 64), given[2], efforts[0], seeded()),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="gradients: the attack could not follow") as told:
            call()
        assert len(told) == 1 and told[0].filename == __file__


def test_attacks_that_follow_every_gradient_do_not_warn(small, recwarn):
    tanh_attack(small, faces(2), torch.ones(8), eyeglasses_mask(), iterations=3)
    universal_patch(small, faces(2), torch.ones(8), eye_patch_mask(), iterations=3)
    assert not recwarn.list


class Broken(nn.Module):
    """Distances to zero of 1 + the mean under the glasses, in some images something else."""

    def __init__(self, value, share=1.0):
        super().__init__()
        self.value, self.share = value, share

    def forward(self, x):
        mean = x[:, :, eyeglasses_mask()].mean((1, 2))
        # which ones hangs on all pixels, so that it is the same alone and in a batch
        bad = (x.double().sum((1, 2, 3)) * 1e3).frac() < self.share
        return torch.where(bad, self.value, 1 + mean)[:, None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_never_wins_a_minimum_and_is_counted(value):
    embed, x, mask, zero = Broken(value, 0.5), faces(4, 1), eyeglasses_mask(), torch.zeros(1)
    found, drawn, features = (
        attacks.random_patterns(embed, x, zero, mask, 40, seeded()),
        seeded(),
        [],
    )
    for image in x:
        values = torch.rand(40, 3, 107, generator=drawn)
        features.append(embed(attacks.apply_pattern(image.expand(40, -1, -1, -1), values, mask)))
    features = torch.cat(features, 1)
    assert found.nonfinite == (~features.isfinite()).sum() and 0 < found.nonfinite < 160
    by_hand = features.where(features.isfinite(), torch.inf).amin(0)
    assert torch.allclose(found.distance, by_hand)
    for direction in ("impersonate", "evade"):
        settings = {"direction": direction, "iterations": 12, "lr": 0.1, "restarts": 3}
        with pytest.warns(UserWarning, match="non-finite"):
            found = tanh_attack(embed, x, zero, mask, False, **settings)
        assert found.nonfinite and found.distance.isfinite().all()
        lost = found.extra["loss"].isinf()  # restarts that never met a number
        assert lost.any() and not found.extra["loss"].isnan().any() and (found.distance <= 2).all()
    loss = torch.tensor([[value, 2.0, 1.0], [3.0, value, value]])
    assert attacks.lowest(loss, 1).tolist() == [2, 0]
    one = attacks.Attacked(x[:2], torch.tensor([value, 1.0]))
    two = attacks.Attacked(1 - x[:2], torch.tensor([2.0, value]))
    assert attacks.worst(one, two).distance.tolist() == [2, 1]


def test_a_place_that_is_no_number_is_not_searched_further():
    def embed(images):  # the square at (15, 15) breaks it, that at (15, 35) helps
        seen = images[:, :, 15:25, 35:45].mean((1, 2, 3))
        return torch.where(images[:, 0, 15, 15] == 0.5, seen, torch.nan)[:, None]

    efforts = Effort(8, 0.1, 1), Effort(2, 0.1)
    places, x = [(15, 15), (35, 35), (15, 35)], torch.full((2, 3, 64, 64), 0.5)
    with pytest.warns(UserWarning, match="non-finite"):
        found = attacks.square_attack(embed, x, torch.ones(1), places, *efforts, seeded())
    assert found.extra["col"].tolist() == [35, 35] and found.extra["row"].tolist() == [15, 15]
    assert found.distance.isfinite().all() and found.nonfinite > 0


# square
@pytest.mark.filterwarnings("ignore:.*gradients")  # at places that the window does not touch
def test_location_search_finds_the_planted_place():
    """The embedding reads one window for each image, so only the square on that window can help."""
    planted = [(15, 35), (25, 20), (35, 35)]
    x = faces(3) * 0.2
    x[:, :, 0, 0] = torch.tensor([0.1, 0.2, 0.3])[:, None]  # the image says which window is read

    def embed(images):
        which = ((images[:, 0, 0, 0] * 10).round().long() - 1).clamp(0, 2)
        views = torch.stack(
            [images[:, :, r : r + 10, c : c + 10].mean((1, 2, 3)) for r, c in planted], 1
        )  # (N, 3)
        return views.gather(1, which[:, None])

    def attack(images, places, search_iterations, iterations):
        efforts = Effort(iterations, 0.3, 1), Effort(search_iterations, 0.1)
        return attacks.square_attack(embed, images, torch.ones(1), places, *efforts, seeded())

    result = attack(x, attacks.square_positions(), 4, 60)
    assert list(zip(result.extra["row"].tolist(), result.extra["col"].tolist())) == planted
    assert result.distance.max() < 0.02
    for i, (row, column) in enumerate(planted):
        outside = ~square_mask(row, column)
        assert torch.equal(result.images[i][:, outside], x[i][:, outside])
    fine = attack(x[:1], [(r, c) for r in (13, 15, 17) for c in (34, 35, 36)], 2, 2)
    assert (fine.extra["row"].item(), fine.extra["col"].item()) == planted[0]


def test_location_search_does_not_depend_on_chunks(small):
    x, anchor = faces(3).double(), torch.ones(8).double()
    places, embed = attacks.square_positions(10), Mirrored(small.double())
    found = [
        attacks.location_search(embed, x, anchor, places, Effort(2, 0.1, chunk=c), seeded())[0]
        for c in (1, 40, 500)
    ]
    assert found[0].shape == (3, 9)
    assert all(torch.allclose(found[0], f, atol=1e-9) for f in found[1:])


# universal patch
def test_universal_patch_helps_on_intruders_it_never_saw(small):
    anchor = small(faces(1, 5))[0].detach()
    seen, unseen, mask = faces(12, 1), faces(12, 2), eye_patch_mask()
    pattern, trained = universal_patch(small, seen, anchor, mask, iterations=60, lr=0.1)
    patched = attacks.apply_pattern(unseen, pattern, mask)
    assert pattern.shape == (3, 384) and 0 <= pattern.min() and pattern.max() <= 1
    assert torch.equal(patched[:, :, mask], pattern.expand(12, -1, -1)) and torch.equal(
        patched[:, :, ~mask], unseen[:, :, ~mask]
    )
    grey = attacks.apply_pattern(unseen, torch.full_like(pattern, 0.5), mask)
    clean, after, occluded = (distances(small, x, anchor) for x in (unseen, patched, grey))
    assert after.mean() < 0.9 * clean.mean() and after.mean() < 0.9 * occluded.mean()
    assert trained.distance.mean() < 0.9 * distances(small, seen, anchor).mean()
    again, _ = universal_patch(small, seen, anchor, mask, iterations=60, lr=0.1, chunk=7)
    assert torch.allclose(again, pattern, atol=0.02)


# the other attacks
def test_random_patterns_keep_the_closest_of_all(small):
    x, anchor, mask = faces(3), small(faces(1, 5))[0].detach(), eyeglasses_mask()
    found = [
        attacks.random_patterns(Mirrored(small), x, anchor, mask, n, seeded(), chunk=16)
        for n in (1, 20)
    ]
    values = torch.rand(20, 3, 107, generator=seeded())
    by_hand = distances(
        small, attacks.apply_pattern(x[:1].expand(20, -1, -1, -1), values, mask), anchor
    )
    assert torch.isclose(found[1].distance[0], by_hand.min()) and torch.equal(
        found[1].images[:, :, ~mask], x[:, :, ~mask]
    )
    gradient = tanh_attack(small, x, anchor, mask, iterations=30, lr=0.2, restarts=1)
    assert (gradient.distance < found[1].distance).all()


def test_uniform_noise_is_bounded_and_fills_its_range():
    x = faces(4) * 0.8 + 0.1
    moved = attacks.uniform_noise(x, 10 / 255, seeded()) - x
    assert moved.abs().max() <= 10 / 255 + 1e-6 and abs(moved.mean()) < 1e-3
    assert abs(moved.std() - 10 / 255 / 3**0.5) < 1e-3
    assert attacks.uniform_noise(torch.ones(1, 3, 8, 8), 10 / 255, seeded()).max() == 1


def test_indirect_takes_the_stronger_by_true_distance(small):
    x, anchor, virtual = faces(6), *small(faces(2, 5)).detach()
    start, mask = attacks.draw_start(6, 1, 3, 107, seeded()), eyeglasses_mask()
    settings = {"iterations": 10, "lr": 0.2, "start": start}
    indirectly = Effort(10, 0.2), start
    result = attacks.indirect_attack(Mirrored(small), x, anchor, virtual, mask, *indirectly)
    direct = tanh_attack(small, x, anchor, eyeglasses_mask(), **settings)
    indirect = tanh_attack(small, x, virtual, eyeglasses_mask(), **settings)
    assert torch.allclose(result.extra["direct"], direct.distance, atol=1e-5)
    assert torch.allclose(
        result.extra["indirect"], distances(small, indirect.images, anchor), atol=1e-5
    )
    assert torch.allclose(
        result.distance, torch.minimum(result.extra["direct"], result.extra["indirect"]), atol=1e-5
    )
    near = attacks.indirect_attack(Mirrored(small), x, anchor, anchor, mask, *indirectly)
    assert torch.equal(near.extra["direct"], near.extra["indirect"])


def test_worst_is_the_strongest_per_intruder():
    one = attacks.Attacked(torch.zeros(3, 1, 2, 2), torch.tensor([1.0, 5, 3]), 1, 2, 3)
    two = attacks.Attacked(torch.ones(3, 1, 2, 2), torch.tensor([2.0, 4, 3]), 1, 2, 3)
    both = attacks.worst(one, two)
    assert both.distance.tolist() == [1, 4, 3] and both.extra["strongest"].tolist() == [0, 1, 0]
    assert both.images[:, 0, 0, 0].tolist() == [0, 1, 0] and (
        both.zero_gradients,
        both.nonfinite,
        both.gradients,
    ) == (
        2,
        4,
        6,
    )


def test_distal_reaches_the_anchor_from_noise(small):
    anchor = small(faces(1, 5))[0].detach()
    result = attacks.distal_attack(small, (2, 3, 64, 64), anchor, Effort(80, 0.1, 1), seeded())
    start = distances(small, torch.rand(2, 3, 64, 64, generator=seeded()), anchor, False)
    assert (result.distance < 0.1 * start).all()


@pytest.mark.parametrize("name", ["eot_eyeglasses", "eot_eye_patch"])
def test_eot_survives_transforms_better_than_the_plain_attack(small, name):
    config = Config(
        iterations=40,
        lr=0.2,
        restarts=1,
        patch_iterations=40,
        patch_lr=0.2,
        eot_samples=3,
        eot_tests=12,
        eot_shift=3.0,
        eot_rotation=8.0,
    )
    x, train, anchor = faces(4), faces(6, 1), small(faces(1, 5))[0].detach()
    embed = Mirrored(small)
    robust = run_attack(name, config, embed, x, anchor, generator=seeded(), training=train)
    plain = run_attack(name[4:], config, embed, x, anchor, generator=seeded(), training=train)
    fresh = attacks.draw_transforms(64, config, seeded(77))
    scores = [distances(small, r.images, anchor, True, fresh).mean() for r in (robust, plain)]
    assert scores[0] < scores[1] and scores[0] < distances(small, x, anchor, True, fresh).mean()
    assert (
        abs(robust.distance.mean() - scores[0]) < 0.1 * scores[0]
    )  # the row is the distance under transforms
    assert torch.equal(robust.images[:, :, ~robust.mask], x[:, :, ~robust.mask])


# a foreign embedding
class Block(nn.Module):
    def __init__(self, c, d, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d)
        self.conv2, self.bn2 = nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d)
        self.downsample = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """In torchvision's form: stem, basic blocks, average pooling, the input normalised inside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.fc = nn.Linear(32, 16)

    def forward(self, x):
        return self.fc(self.stages(self.stem((x - self.mean) / self.std)).mean((2, 3)))


def test_every_attack_runs_on_a_resnet_that_is_not_ours():
    torch.manual_seed(0)
    embed = ResNet()  # left in training mode: the attacks must not use or move its batch statistics
    config = replace(
        Config(**attacks.PRESETS["demo"]),
        iterations=8,
        square_search_iterations=1,
        square_stride=20,
        patch_iterations=8,
        patterns=8,
        evasion_iterations=8,
        distal_iterations=8,
        rule_mask=(32,),
        rule_iterations=2,
    )
    x, train = faces(3), faces(4, 2)
    anchor, virtual = attacks.extract(embed, faces(2, 5))
    clean = distances(embed, x, anchor)
    for name in attacks.ATTACKS:
        given = Mirrored(embed), x, anchor
        if name.startswith("rule"):
            rule = attacks.cover_named(name, config, 64, 64)
            covered = attacks.Covered(given[0], faces(1, 5)[0], rule, torch.full_like(x[0], 0.5))
            given = covered, x, covered.anchor
        result = run_attack(name, config, *given, seeded(), training=train, virtual=virtual)
        images = result.images if name == "distal" else x
        mask = result.mask.expand(len(images), -1, -1)[:, None].expand_as(images)
        assert (
            torch.equal(result.images[~mask], images[~mask])
            and 0 <= result.images.min() <= result.images.max() <= 1
        )
        assert (
            result.distance.shape == (len(images),)
            and result.distance.isfinite().all()
            and result.nonfinite == 0
        )
        if name in ("eyeglasses", "square", "indirect"):
            assert (result.distance < clean).all()
        if name == "evasion":
            assert (result.distance > clean).all()
    assert embed.training and all(p.requires_grad for p in embed.parameters())


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
    a, b, c = (
        attacks.stable_generator(*parts).initial_seed() for parts in ((0, "a"), (0, "a"), (1, "a"))
    )
    assert a == b == 3426483283761622585 != c  # the same on every machine


# the command
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on photographs of eight persons with an untrained embedding, as embed.py leaves it."""
    from PIL import Image

    import data
    import embed

    home = tmp_path_factory.mktemp("attacks")
    for p in range(8):
        (home / f"people/p{p}").mkdir(parents=True)
        for k in range(5):
            image = (
                (faces(1, p, 8) * 0.7 + faces(1, 100 * p + k, 8) * 0.3)[0]
                .permute(1, 2, 0)
                .mul(255)
                .byte()
                .numpy()
            )
            Image.fromarray(image).resize((64, 64)).save(home / f"people/p{p}/{k}.png")
    loaded = data.load("folder", home / "people", cache=None, progress=False)
    run = home / "run"
    (run / "ours").mkdir(parents=True)
    data.write_manifest(
        run / "people.json", loaded, data.split_persons(loaded, 2, 2, 4, 0, min_target_images=5)
    )
    torch.manual_seed(0)
    model = embed.Embedding(1 / 32, 16)
    torch.save(
        {
            "kind": "embedding",
            "config": {"width": 1 / 32, "dim": 16, "standardise": False},
            "model": model.state_dict(),
        },
        run / "ours" / "embedding.pt",
    )
    about = {
        "data": "folder",
        "root": str(home / "people"),
        "crop": "",
        "preset": "demo",
        "seed": 3,
        "options": {},
    }
    (run / "run.json").write_text(json.dumps(about))
    return run


SMALL = [
    "--iterations=4",
    "--patch-iterations=2",
    "--patterns=4",
    "--evasion-iterations=2",
    "--distal-iterations=2",
    "--eot-tests=2",
    "--eot-samples=1",
    "--patch-train=4",
    "--square-stride=20",
    "--square-search-iterations=1",
    "--intruders=3",
    "--clean-intruders=6",
    "--targets=3",
    "--rule-mask=32",
    "--rule-persons=2",
    "--rule-intruders=2",
    "--rule-iterations=2",
]


def rows(run, name, folder="attacks"):
    lines = (run / "ours" / folder / f"{name}.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]


def in_process(run, monkeypatch, *flags):
    monkeypatch.chdir(run.parent)
    return attacks.main(["--run", str(run), *SMALL, *flags])


def test_command_writes_rows_sidecar_and_images(trained, monkeypatch, capsys):
    import metrics

    names = [name for name in attacks.ATTACKS if name != "indirect"]
    flags = ("--attacks", ",".join(names), "--defences", "basic,both", "--targets", "2")
    assert in_process(trained, monkeypatch, *flags) == 0
    told = capsys.readouterr().out
    assert "ours eyeglasses: 4 iterations, 1 restarts, 2 targets, 12 pairs" in told
    manifest = json.loads((trained / "people.json").read_text())
    clean = rows(trained, "clean")
    assert len(clean) == 2 * 2 * (4 + 6) and tuple(clean[0]) == attacks.COLUMNS
    assert {r["role"] for r in clean} == {"genuine", "intruder"}
    for row in clean:
        assert (row["person"] == row["target"]) == (row["role"] == "genuine") and row[
            "candidate"
        ] != row["anchor"]
        assert row["target"] in manifest["target"] and row["person"] not in manifest["train"]
    counts = {"evasion": 2 * 2 * 4, "distal": 2 * 2, "rule_attacked": 2 * 2 * 2}
    counts |= dict.fromkeys(attacks.RULES, 2 * 2 * (4 + 3) + 2 * 2 * 4) | {"noise": 2 * 2 * (4 + 3)}
    for name in names[1:]:
        found = rows(trained, name)
        assert len(found) == counts.get(name, 2 * 2 * 3), name
        about = json.loads((trained / "ours/attacks" / f"{name}.json").read_text())
        assert about["trained_in"] == "float32"
        assert (
            about["n"] == len(found)
            and about["seed"] == 3
            and about["n_targets"] == 2
            and about["reproducible"] is True
        )
        assert (
            about["outside_mask_max"] == 0
            and about["nonfinite"] == 0
            and about["config"]["intruders"] == 3
        )
        with np.load(trained / "ours/attacks" / f"{name}.npz") as images:
            assert (
                images["attacked"].shape[0] == len(images["target"]) == 2
                and images["attacked"].dtype == np.uint8
            )
            assert images["anchor"].shape == (2, 3, 64, 64) and images["mask"].shape == (2, 64, 64)
    pairs = {
        tuple(r[k] for k in ("target", "candidate", "mirroring", "selection", "anchor"))
        for r in clean
    }
    for row in rows(trained, "square"):
        assert (
            tuple(row[k] for k in ("target", "candidate", "mirroring", "selection", "anchor"))
            in pairs
        )
        assert row["row"] in ("15", "35") and row["col"] in ("15", "35")
    assert set(metrics.summary(metrics.read_run(trained))["ours"]) >= {
        "clean",
        "eyeglasses",
        "square",
        "evasion",
        "noise",
    }


def test_clean_rows_are_the_distances_of_the_embedding(trained, monkeypatch):
    import data
    import embed

    flags = ("--attacks", "clean", "--defences", "all", "--overwrite")
    assert in_process(trained, monkeypatch, *flags) == 0
    loaded = data.load(
        "folder", json.loads((trained / "run.json").read_text())["root"], cache=None, progress=False
    )
    model = embed.load_embedding(trained / "ours/embedding.pt")
    x = loaded.images.float() / 255
    with torch.no_grad():
        features, mirrored = model(x).double(), model(x.flip(3)).double()
    for row in rows(trained, "clean"):
        a, c = int(row["anchor"]), int(row["candidate"])
        squared = [
            (f[c] - features[a]).square().sum()
            for f in (features, mirrored)[: 1 + int(row["mirroring"])]
        ]
        assert math.isclose(
            float(row["distance"]), math.sqrt(sum(squared) / len(squared)), rel_tol=1e-3
        )
        own = [i for i in range(len(x)) if loaded.names[loaded.person[i]] == row["target"]]
        costs = {i: float((features[own] - features[i]).square().sum()) for i in own}
        assert a == (min(costs, key=costs.get) if row["selection"] == "1" else own[0])


def test_same_command_same_rows_whatever_the_targets_beside(trained, monkeypatch):
    flags = ("--attacks", "eyeglasses,square", "--overwrite")
    assert in_process(trained, monkeypatch, *flags) == 0
    first = {name: rows(trained, name) for name in ("eyeglasses", "square")}
    assert in_process(trained, monkeypatch, *flags) == 0
    assert all(rows(trained, name) == first[name] for name in first)
    assert in_process(trained, monkeypatch, *flags, "--targets", "1", "--chunk", "2") == 0
    fewer = rows(trained, "eyeglasses")
    same = [row for row in first["eyeglasses"] if row["target"] == fewer[0]["target"]]
    assert len(fewer) == len(same) == 3
    for a, b in zip(fewer, same):
        assert {**a, "distance": 0} == {**b, "distance": 0} and math.isclose(
            float(a["distance"]), float(b["distance"]), rel_tol=1e-3
        )
    assert in_process(trained, monkeypatch, *flags, "--seed", "4") == 0
    assert rows(trained, "eyeglasses") != first["eyeglasses"]


def test_the_command_leaves_lost_gradients_to_the_health_check(
    trained, monkeypatch, capsys, recwarn
):
    import embed
    import metrics

    rounded = lambda self, x: (x * 255).round() / 255
    monkeypatch.setattr(embed.Embedding, "standardised", rounded)
    assert in_process(trained, monkeypatch, "--attacks", "eyeglasses", "--overwrite") == 0
    assert not recwarn.list and "gradients" not in capsys.readouterr().err
    about = json.loads((trained / "ours/attacks/eyeglasses.json").read_text())
    assert about["zero_gradients"] == about["gradients"] > 0
    checks = {check.name: check for check in metrics.health([metrics.read_run(trained)])}
    assert checks["gradients"].status == metrics.FAILED
    assert "eyeglasses" in checks["gradients"].detail
    (trained / "ours/attacks/eyeglasses.csv").unlink()


def test_goes_on_after_a_stop_keeps_what_is_finished_and_refuses_other_settings(
    trained, monkeypatch, capsys, interrupted_at
):
    flags = ("--attacks", "eyeglasses", "--intruders", "2")
    table = trained / "ours/attacks/eyeglasses.csv"
    table.unlink(missing_ok=True)
    with interrupted_at(attacks, "attack_target", 3):
        assert in_process(trained, monkeypatch, *flags) == 130
    assert "goes on" in capsys.readouterr().err and not table.exists()
    assert in_process(trained, monkeypatch, *flags, "--lr", "0.3") == 2
    error = capsys.readouterr().err
    assert "lr (0.2 before, 0.3 now)" in error and "--overwrite" in error and error.count("\n") == 1
    with interrupted_at(attacks, "attack_target", 0) as calls:  # never
        assert in_process(trained, monkeypatch, *flags) == 0
    assert len(calls) == 1  # only the third
    resumed = rows(trained, "eyeglasses")
    assert in_process(trained, monkeypatch, *flags) == 0 and "kept" in capsys.readouterr().out
    assert in_process(trained, monkeypatch, *flags, "--lr", "0.3") == 2  # finished with others
    assert "lr (0.2 before, 0.3 now)" in capsys.readouterr().err
    assert in_process(trained, monkeypatch, *flags, "--overwrite") == 0
    assert "kept" not in capsys.readouterr().out and rows(trained, "eyeglasses") == resumed
    assert in_process(trained, monkeypatch, *flags, "--defences", "basic,both") == 0  # more of them
    again = rows(trained, "eyeglasses")
    assert len(again) == 2 * len(resumed) and [r for r in again if r["mirroring"] == "1"] == resumed
    assert in_process(trained, monkeypatch, *flags) == 0 and "kept" in capsys.readouterr().out


def test_refuses_other_photographs_and_clears_what_a_kill_left(
    trained, monkeypatch, capsys, interrupted_at
):
    flags, partial = (
        ("--attacks", "noise", "--intruders", "2"),
        trained / "ours/attacks/.noise.partial",
    )
    (trained / "ours/attacks/noise.csv").unlink(missing_ok=True)
    with interrupted_at(attacks, "attack_target", 2):
        assert in_process(trained, monkeypatch, *flags) == 130 and partial.exists()
    photograph = Path(json.loads((trained / "run.json").read_text())["root"], "p0/0.png")
    photograph.rename(photograph.with_name("9.png"))
    capsys.readouterr()
    assert in_process(trained, monkeypatch, *flags) == 2 and "people" in capsys.readouterr().err
    photograph.with_name("9.png").rename(photograph)
    assert in_process(trained, monkeypatch, *flags) == 0 and not partial.exists()
    partial.mkdir()  # killed while it was removed
    assert in_process(trained, monkeypatch, *flags) == 0 and not partial.exists()


def test_other_people_are_judged(trained, monkeypatch, capsys):
    others = trained.parent / "others"
    if not others.exists():
        shutil.copytree(trained.parent / "people", others)
    people = ("--data", "folder", "--root", str(others))
    assert in_process(trained, monkeypatch, *people, "--min-images", "5", "--attacks", "clean") == 0
    assert len({row["target"] for row in rows(trained, "clean", "attacks-others")}) == 3
    for flags, told in [
        ((*people,), "--min-images"),
        (
            ("--data", "folder", "--root", str(trained.parent / "people")),
            "trained on these persons",
        ),
        (("--data", "folder", "--root", str(trained.parent / "nowhere")), "nowhere"),
    ]:
        capsys.readouterr()
        assert in_process(trained, monkeypatch, *flags) == 2
        error = capsys.readouterr().err
        assert told in error.splitlines()[-1] and error.count("attacks.py:") == 1


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--attacks", "glasses"), "--attacks glasses"),
        (("--optimiser", "sgd"), "--optimiser"),
        (("--defences", "none"), "--defences none"),
        (("--method", "nonsense"), "nonsense"),
        (("--restarts", "0"), "--restarts 0"),
        (("--restarts", "many"), "--restarts"),
        (("--preset", "fast"), "--preset fast"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--attacks", "indirect"), "generator"),
        (("--lr", "nan"), "--lr nan"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(trained, monkeypatch, capsys, flags, told):
    assert in_process(trained, monkeypatch, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert (
        len([line for line in error if line.startswith("attacks.py:")]) == 1 and told in error[-1]
    )


def test_missing_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attacks.py", "--run", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(ROOT / "attacks.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such folder" in error


def test_presets_fit_the_config():
    paper = Config()
    assert (paper.iterations, paper.lr, paper.restarts, paper.patch_iterations, paper.patch_lr) == (
        1000,
        0.01,
        5,
        5000,
        0.005,
    )
    assert (
        paper.square_search_iterations,
        paper.square_search_lr,
        paper.patterns,
        paper.noise,
    ) == (
        20,
        0.1,
        1000,
        10 / 255,
    )
    assert (paper.distal_iterations, paper.distal_lr, paper.patch_train, paper.targets) == (
        2000,
        0.01,
        100,
        27,
    )
    for preset in attacks.PRESETS.values():
        replace(paper, **preset)


@pytest.mark.parametrize(
    "held, wanted, answer",
    [
        ("both", "both", True),
        ("both", "basic,mirroring,selection,both", False),
        ("basic,mirroring,selection,both", "both", True),
        ("basic,both", "both,basic", True),
    ],
)
def test_finished_asks_for_every_defence(tmp_path, held, wanted, answer):
    table, begun = tmp_path / "square.csv", tmp_path / "config.json"
    settings = {"defences": wanted.split(",")}
    assert not attacks.finished(table, begun, settings)
    table.write_text("rows\n")
    table.with_suffix(".json").write_text(json.dumps({"config": {"defences": held.split(",")}}))
    assert attacks.finished(table, begun, settings) is answer


def test_the_last_iterate_counts_without_a_gradient():
    image, calls = torch.full((1, 3, 64, 64), 0.5), []

    def counted(x):
        calls.append(torch.is_grad_enabled())
        return x.flatten(1)

    anchor = torch.zeros(3 * 64 * 64)
    tanh_attack(counted, image, anchor, eyeglasses_mask(), iterations=3, restarts=1)
    # three for the check, three steps, the last iterate, the distance
    assert calls == [False] * 3 + [True] * 3 + [False] * 2


# sign steps, after Croce and Hein (2020)
def sign_steps(losses, every=1):
    """Step sizes and pixels (n, N) after each step of `Sign` that is told these losses (n, N); the
    gradient points down."""
    losses = torch.tensor(losses).T
    zero = torch.zeros(losses.shape[1], 1, 1)
    moving, best = attacks.Sign(zero, zero, Effort(len(losses) * every), every), torch.inf
    found = []
    for step, loss in enumerate(losses):
        better = loss < best
        best = torch.where(better, loss, best)
        moving.step(step, torch.ones_like(zero), loss, better)
        for _ in range(every - 1):  # not scored: no progress to judge
            moving.step(step, torch.ones_like(zero), None, better)
        found.append(torch.stack([moving.size.flatten(), moving.x.flatten()]))
    return torch.stack(found, 1)


@pytest.mark.parametrize("every", [1, 10])
def test_sign_halves_where_progress_stops(every):
    """At the paper's checkpoints, by each of its two conditions, every row by itself."""
    rows = {
        "stands": [1.0] * 100,
        "falls": [-float(k) for k in range(100)],
        "17 of 22": [float(k if k <= 5 else 10 - k) for k in range(100)],
        "16 of 22": [float(k if k <= 6 else 12 - k) for k in range(100)],
        "no new best": [float(-k if k <= 22 else 100 - k) for k in range(100)],
    }
    sizes, pixels = sign_steps([*rows.values()], every)
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
    if every == 1:  # back to its best, the start, and a step of half the size from there
        assert pixels[21, 0] == 0 and pixels[22, 0] == 0.5 - 0.75 * 0.125
        assert pixels[22, 1] == 0


def plain_pgd(embed, images, anchor, mask, step, passes, sign):
    """Distance of the best iterate of constant sign steps from a random start."""
    x = images.clone()
    x[:, :, mask] = torch.rand(x[:, :, mask].shape, generator=seeded(1))
    best = torch.full((len(x),), torch.inf)
    for _ in range(passes + 1):
        x = x.detach().requires_grad_()
        loss = sign * attacks.squared_distance(embed(x), anchor)
        best = torch.minimum(best, loss.detach())
        grad = torch.autograd.grad(loss.sum(), x)[0]
        x = torch.where(mask, (x.detach() - step * grad.sign()).clamp(0, 1), images)
    return best.abs().sqrt()


@pytest.mark.parametrize(
    "kind, way, passes", [("linear", 1, 80), ("small", 1, 30), ("small", 1, 80), ("small", -1, 30)]
)
def test_sign_is_at_least_as_near_as_plain_pgd_with_its_best_step(small, kind, way, passes):
    """way: 1 to the anchor, -1 away from it (there a linear embedding has many optima)."""
    embed, x, mask = {"linear": Linear(dim=16), "small": small}[kind], faces(8), eyeglasses_mask()
    anchor = embed(faces(1, 5))[0].detach() * 3
    settings = {"optimiser": "sign", "direction": "impersonate" if way > 0 else "evade"}
    settings |= {"iterations": passes, "restarts": 1}
    found = tanh_attack(embed, x, anchor, mask, mirroring=False, **settings).distance
    for step in (4, 8, 16, 32):
        plain = plain_pgd(embed, x, anchor, mask, step / 255, passes, way)
        assert way * found.mean() <= way * plain.mean()


@pytest.mark.parametrize("direction", ["impersonate", "evade"])
def test_sign_reaches_the_known_optimum_inside_the_mask_alone(direction):
    embed, x, mask = Linear(dim=1), faces(4), eyeglasses_mask()
    w = embed.weight.view(3, 64, 64)[:, mask].detach()
    outside = embed(x * ~mask)[:, 0].detach()
    low, high = outside + w.clamp(max=0).sum(), outside + w.clamp(min=0).sum()
    settings = {"iterations": 40, "restarts": 2, "optimiser": "sign", "direction": direction}
    result = tanh_attack(embed, x, torch.tensor([1e3]), mask, mirroring=False, **settings)
    want = 1e3 - (high if direction == "impersonate" else low)
    assert torch.allclose(result.distance, want, rtol=0, atol=1e-3)
    assert torch.equal(result.images * ~mask, x * ~mask)
    assert set(result.images[:, :, mask].unique().tolist()) == {0.0, 1.0}
    assert result.gradients == 4 * 2 * 40 and not result.zero_gradients + result.nonfinite
    assert torch.equal(result.distance, distances(embed, result.images, torch.tensor([1e3]), False))


@pytest.mark.parametrize("name", [n for n in attacks.ATTACKS if not n.startswith("rule")])
def test_every_attack_takes_sign(small, name):
    """Also the universal patch in turns and EOT, which score every tenth iterate."""
    less = {"iterations": 20, "patch_iterations": 20, "evasion_iterations": 20, "patch_batch": 4}
    config = replace(Config(), restarts=1, evasion_restarts=1, square_stride=20, lr=0.2, **less)
    config = replace(config, distal_iterations=20, patterns=10, square_search_iterations=2)
    x, anchor = faces(4), small(faces(1, 5))[0].detach() * 3
    given = {"training": faces(8, 7)} if name.endswith("eye_patch") else {}
    given |= {"virtual": anchor * 0.9} if name == "indirect" else {}
    adam, sign = (
        run_attack(
            name, replace(config, optimiser=k), Mirrored(small), x, anchor, seeded(2), **given
        )
        for k in ("adam", "sign")
    )
    assert 0 <= sign.images.min() and sign.images.max() <= 1
    x = faces(1) if name == "distal" else x
    if name != "distal":  # there all is free
        outside = ~(sign.mask if sign.mask.dim() == 3 else sign.mask.expand(4, -1, -1))[:, None]
        assert torch.equal(sign.images * outside, x * outside)
    if name in ("clean", "random_eyeglasses", "noise", "grey_eye_patch"):  # nothing is optimised
        assert torch.equal(adam.images, sign.images)
        return
    assert sign.gradients == adam.gradients > 0
    assert not torch.equal(adam.images, sign.images)
    clean, found = distances(small, x, anchor).mean(), sign.distance.mean()
    assert found > clean if name == "evasion" else found < clean
    assert name.startswith("eot_") or abs(found - clean) >= abs(adam.distance.mean() - clean)
    again = run_attack(
        name,
        replace(config, optimiser="sign"),
        Mirrored(small),
        faces(4),
        anchor,
        seeded(2),
        **given,
    )
    assert torch.equal(again.images, sign.images)


def test_sign_takes_lost_gradients_as_zero_and_goes_on():
    broken = lambda x: (x - x.detach()).sum((1, 2, 3))[:, None].sqrt()  # 0, with an infinite slope
    sign, mask = {"restarts": 1, "optimiser": "sign"}, eyeglasses_mask()
    with pytest.warns(UserWarning, match="^0 zero and 60 non-finite of 60 gradients"):
        result = tanh_attack(broken, faces(2), torch.ones(1), mask, iterations=30, **sign)
    assert (result.zero_gradients, result.nonfinite, result.gradients) == (0, 60, 60)
    assert result.images.isfinite().all()
    rounded = lambda x: (x * 255).round().mean((2, 3))
    with pytest.warns(UserWarning, match="^60 zero and 0 non-finite of 60 gradients"):
        tanh_attack(rounded, faces(2), torch.ones(3), mask, iterations=30, **sign)

    def half_lost(x):  # no number beyond 0.6, where steps lead
        mean = x[:, :, mask].mean((1, 2))
        return torch.where(mean < 0.6, mean, torch.nan)[:, None]

    with pytest.warns(UserWarning, match="non-finite"):
        found = tanh_attack(half_lost, faces(2), torch.ones(1), mask, False, iterations=80, **sign)
    assert 0 < found.nonfinite < 160  # it came back from there, again and again nearer
    assert (found.distance > 0.4).all() and (found.distance < 0.41).all()


def test_what_is_no_optimiser_is_refused_in_one_line(small):
    x, anchor, wanted = faces(2), torch.ones(8), "^optimiser must be adam or sign, not 'sgd'$"
    for attack in (tanh_attack, universal_patch):
        with pytest.raises(ValueError, match=wanted):
            attack(small, x, anchor, eyeglasses_mask(), iterations=2, optimiser="sgd")
    with pytest.raises(ValueError, match=wanted):
        run_attack("square", Config(optimiser="sgd"), small, x, anchor, seeded())


def test_the_nearest_of_both_optimisers_counts(small):
    x, anchor, mask = faces(6), small(faces(1, 5))[0].detach(), eyeglasses_mask()
    both = [
        tanh_attack(small, x, anchor, mask, iterations=8, lr=0.5, restarts=1, optimiser=name)
        for name in ("adam", "sign")
    ]
    nearest = attacks.worst(*both)
    assert torch.equal(nearest.distance, torch.minimum(both[0].distance, both[1].distance))
    assert torch.equal(nearest.distance, distances(small, nearest.images, anchor))
    assert nearest.gradients == 6 * 8 * 2


def test_presets_of_the_paper_attack_with_adam():
    optimisers = {name: Config(**preset).optimiser for name, preset in attacks.PRESETS.items()}
    assert optimisers == {**dict.fromkeys(("paper", "released", "demo"), "adam"), "model": "sign"}
    for name in attacks.ATTACKS:
        assert attacks.effort_of(name, Config()).optimiser == "adam"
        assert attacks.effort_of(name, Config(optimiser="sign")).optimiser == "sign"


@pytest.mark.parametrize("kind", ("tanh", "universal", "square"))
def test_iterations_are_in_the_precision_asked_for_and_distances_in_float32(kind):
    torch.manual_seed(0)
    embed, seen = embedding.Embedding(1 / 16, 16, True), []
    head, (dnn, blas) = embed.head, (torch.backends.cudnn, torch.backends.cuda.matmul)
    allowed = lambda: (dnn.allow_tf32, blas.allow_tf32)
    run.tf32(False)
    # patch-local passes end there too
    embed.head = lambda x: seen.append((head(x), allowed())) or seen[-1][0]
    # out of reach: within a hundredth of the features' norm bfloat16 comes less near
    x, anchor, mask = faces(8), 3 * embed(faces(1, 5))[0].detach(), eyeglasses_mask()
    effort, mean, clean = Effort(40, 0.2, 1), [], distances(embed, x, anchor).mean()
    for precision in ("float32", "tf32", "bfloat16"):
        seen.clear()
        hard = effort._replace(precision=precision)
        given = Mirrored(embed), x, anchor
        if kind == "tanh":
            found = attacks.tanh_attack(*given, mask, hard, seeded())
        elif kind == "universal":
            found = attacks.universal_patch(*given, mask, hard, seeded())[1]
        else:
            places, short = [(15, 15), (35, 30)], hard._replace(iterations=2)
            found = attacks.square_attack(*given, places, hard, short, seeded())
        narrow = [features.dtype == torch.bfloat16 for features, _ in seen]
        assert not narrow[0] and not narrow[-1]  # `accepted` before, the distances afterwards
        assert any(narrow) == (precision == "bfloat16")
        faster = [of_gpu == (True, True) for _, of_gpu in seen]
        assert not faster[0] and not faster[-1] and any(faster) == (precision == "tf32")
        assert torch.equal(found.distance, distances(embed, found.images, anchor))
        mean.append(float(found.distance.mean()))
    assert mean[0] == mean[1]  # a CPU has no TF32
    # another optimum: of a universal patch and of a place
    assert mean[2] == pytest.approx(mean[0], rel=0.03) and mean[0] != mean[2]
    assert max(mean) < 0.93 * clean


def test_the_precision_is_the_commands_and_no_other_is_taken(small):
    with pytest.raises(
        ValueError, match=r"^precision must be float32, tf32 or bfloat16, not 'half'$"
    ):
        tanh_attack(small, faces(2), torch.ones(8), eyeglasses_mask(), precision="half")
    for name in attacks.ATTACKS:
        assert attacks.effort_of(name, Config(precision="tf32")).precision == "tf32"
        assert attacks.effort_of(name, Config(precision="bfloat16")).precision == "bfloat16"
    assert Config(**attacks.PRESETS["model"]).precision == "float32"  # a stranger's
