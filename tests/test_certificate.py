"""The certificate: `cover` leaves no place out, no attack gets below the bound, and where one of
its conditions is broken an attack does."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import attacks as a
import embed as e
from data import run
from data.certificate import certified
from tests import soundness

# where the mask that decides hides the patch nothing is left to gain
pytestmark = pytest.mark.filterwarnings("ignore:.* gradients. the attack could not follow")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(H, W, seed=3):
    return (torch.randn(3, H, W, generator=rng(seed)) * 0.25 + 0.5).clamp(0, 1)


def linear(H, W, dim=8):
    weight = torch.randn(3 * H * W, dim, generator=rng(1)) / math.sqrt(H * W)
    return lambda x: x.flatten(1) @ weight


def small_f():
    torch.manual_seed(0)
    return e.Embedding(1 / 16, 16, True).eval().requires_grad_(False)


def normalised():
    """Another kind of network: strides, batch normalisation, features of unit length."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 16, 5, 3), nn.Tanh()
    )
    head = nn.Linear(16 * 9 * 9, 12)
    net.append(nn.Flatten()).append(head).eval().requires_grad_(False)
    return lambda x: nn.functional.normalize(net(x), dim=1)


# the cover


@pytest.mark.parametrize("side", [64, 112, 150])
@pytest.mark.parametrize("patch", [10, 17, 23])
def test_every_place_of_the_patch_is_inside_a_mask(side, patch):
    for mask in (patch + 1, patch + 4, patch + 11)[side // 100 :]:
        found = a.cover(side, side, patch, mask)
        assert found.masks.shape[1:] == (side, side) and (found.masks.sum((1, 2)) == mask**2).all()
        n = side - patch + 1
        assert found.holds.shape == (n * n, len(found.masks)) and found.holds.any(1).all()
        # a mask holds a place where its corners do: looked up in the masks themselves
        held = [
            found.masks[:, r : r + n, c : c + n] for r in (0, patch - 1) for c in (0, patch - 1)
        ]
        corners = torch.stack(held).all(0).flatten(1).T  # (n * n, K)
        assert torch.equal(found.holds, corners)


@pytest.mark.parametrize("patch, mask", [((3, 5), (4, 9)), ((1, 1), (2, 2)), ((6, 2), (8, 8))])
def test_cover_equals_the_definition(patch, mask):
    H, W = 12, 10
    found = a.cover(H, W, patch, mask)
    places = itertools.product(range(H - patch[0] + 1), range(W - patch[1] + 1))
    for holds, (r, c) in zip(found.holds, places, strict=True):
        inside = found.masks[:, r : r + patch[0], c : c + patch[1]].flatten(1).all(1)
        assert torch.equal(holds, inside) and inside.any()
    for k, (r, c) in enumerate(found.corners.tolist()):
        assert found.masks[k, r : r + mask[0], c : c + mask[1]].all()


@pytest.mark.parametrize("patch, mask", [(10, 10), (10, 9), (0, 5), (10, 65), ((10, 70), (12, 72))])
def test_a_mask_that_cannot_cover_is_refused(patch, mask):
    with pytest.raises(ValueError, match="larger than the patch and fit"):
        a.cover(64, 64, patch, mask)


def test_named_masks_are_a_threat_model_too():
    squares = torch.stack([a.square_mask(r, c) for r, c in a.square_positions()])
    patches = torch.stack([a.eyeglasses_mask(), a.eye_patch_mask(), *squares])
    nine = torch.stack(
        [a.square_mask(r, c, 16) for r, c in itertools.product((15, 22, 29), repeat=2)]
    )
    hide = torch.stack([a.eyeglasses_mask(), a.eye_patch_mask(), *nine])
    with pytest.raises(ValueError, match="inside no mask"):
        a.cover_of(hide[:2], patches)
    found = a.cover_of(hide, patches)
    assert found.holds.shape == (27, 11)
    assert found.holds[0].tolist() == [True, True] + [False] * 9  # the eye patch hides eyeglasses


# the rule and the bound


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
def test_bound_equals_brute_force(mirrored, masked):
    H, W, p, m = 9, 8, 2, 4
    plain, fill, images = linear(H, W), noise(H, W), torch.rand(4, 3, H, W, generator=rng(7))
    target, found = torch.rand(3, H, W, generator=rng(8)), a.cover(H, W, p, m)
    rule = a.Covered(a.Mirrored(plain) if mirrored else plain, target, found, fill, masked)
    score, bound, *_ = a.certify(rule, images)
    for image, s, b in zip(images, score, bound):
        d = []
        for mask in found.masks:
            seen = torch.where(mask, fill, image)
            anchor = plain(torch.where(mask, fill, target)[None] if masked else target[None])
            views = [seen, seen.flip(-1)] if mirrored else [seen]
            squares = [(plain(v[None]) - anchor).square().sum() for v in views]
            d.append(torch.stack(squares).mean().sqrt())
        places = itertools.product(range(H - p + 1), range(W - p + 1))
        held = [
            max(d[k] for k in range(len(d)) if found.masks[k, r : r + p, c : c + p].all())
            for r, c in places
        ]
        assert s == pytest.approx(float(max(d)), rel=1e-5)
        assert b == pytest.approx(float(min(held)), rel=1e-5) and b <= s
    assert torch.allclose(a.distances(rule, images, rule.anchor), score, rtol=1e-5)


@pytest.mark.parametrize("patch", [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_bound_of_smaller_patches_equals_brute_force(patch):
    H, W, images = 9, 8, torch.rand(3, 3, 9, 8, generator=rng(7))
    found = a.cover(H, W, (3, 2), (5, 4))
    rule = a.Covered(linear(H, W), images[2], found, noise(H, W))
    known = a.certify(rule, images[:2])
    smaller = a.bound_of_smaller(rule, known.distance, patch)
    for d, b in zip(known.distance, smaller):
        held = [
            max(
                d[k]
                for k in range(len(d))
                if found.masks[k, r : r + patch[0], c : c + patch[1]].all()
            )
            for r, c in itertools.product(range(H - patch[0] + 1), range(W - patch[1] + 1))
        ]
        assert b == min(held)
    assert (smaller >= known.bound).all()
    assert torch.equal(smaller, known.bound) == (patch == (3, 2))


@pytest.mark.parametrize("fill", [noise(64, 64), None], ids=["noise", "around"])
def test_rectangles_by_the_kernel_and_any_mask_are_one(fill):
    found, images = a.cover(64, 64, 10, 16), torch.rand(2, 3, 64, 64)
    by_kernel = a.Covered(small_f(), images[0], found, fill)
    any_mask = a.Covered(small_f(), images[0], found._replace(corners=None, mask=None), fill)
    covered = by_kernel.cover(images)
    assert torch.allclose(covered, any_mask.cover(images), rtol=0, atol=1e-7)
    outside = ~found.masks[:, None].expand_as(covered[0])
    for image, several in zip(images, covered):
        assert torch.equal(several[outside], image.expand_as(several)[outside])
    if fill is not None:
        wanted = torch.where(found.masks[:, None], fill, images[:, None])
        assert torch.equal(covered, wanted)


def test_what_is_around_a_mask_covers_it_by_the_nearest_in_four_directions():
    image, mask = torch.rand(3, 7, 6, generator=rng(1)), torch.zeros(1, 7, 6, dtype=torch.bool)
    mask[0, 2:5, 3:] = True  # no pixel to its right
    mask[0, 1, 4] = True  # and no rectangle
    rule = a.Covered(lambda x: x.flatten(1), image, a.cover_of(mask, mask))
    covered = rule.cover(image[None])[0, 0]
    assert torch.equal(covered[:, ~mask[0]], image[:, ~mask[0]])
    above, below, left = image[:, 0, 4], image[:, 5, 4], image[:, 3, 2]  # of pixel (3, 4)
    wanted = (above / 3 + below / 2 + left / 2) / (1 / 3 + 1 / 2 + 1 / 2)
    assert torch.allclose(covered[:, 3, 4], wanted, atol=1e-6)
    # nothing of it depends on what it covers, all of it on what is around
    other = torch.where(mask, 1 - image, image)
    assert torch.equal(rule.cover(other[None])[0, 0], covered)
    moved = rule.cover((image / 2)[None])[0, 0]
    assert torch.allclose(moved, covered / 2)


def test_a_mask_over_all_of_the_image_leaves_nothing_of_it():
    image, mask = torch.rand(3, 5, 5, generator=rng(1)), torch.ones(1, 5, 5, dtype=torch.bool)
    rule = a.Covered(lambda x: x.flatten(1), image, a.cover_of(mask, mask))
    assert (rule.cover(image[None]) == 0).all()


def test_float32_is_near_float64():
    found, fill, images = a.cover(64, 64, 10, 16), noise(64, 64), torch.rand(3, 3, 64, 64)
    f = small_f()
    one = a.certify(a.Covered(f, images[2], found, fill), images[:2])
    two = (v.double() for v in (images, fill))
    images, fill = two
    rule = a.Covered(f.double(), images[2], found, fill)
    both = a.certify(rule, images[:2])
    for x, y in zip(one[:2], both[:2]):
        assert torch.allclose(x.double(), y, rtol=1e-5)


def test_what_is_no_number_is_not_certified():
    """No features where pixel (8, 8) is hidden: a patch there is certified against by nothing."""
    found, fill = a.cover(16, 16, 3, 6), noise(16, 16)
    whole = linear(16, 16)
    broken = lambda x: torch.where(x[:, :1, 8, 8] == fill[0, 8, 8], torch.nan, whole(x))
    rule = a.Covered(broken, torch.zeros(3, 16, 16), found, fill)
    images = torch.rand(2, 3, 16, 16, generator=rng(3))
    score, bound, place, _ = a.certify(rule, images)
    assert (score > 0.1).all() and (bound == 0).all()
    assert all(found.masks[found.holds[p], 8, 8].all() for p in place)
    right = a.Covered(whole, torch.zeros(3, 16, 16), found, fill)
    assert (a.certify(right, images)[1] > 0.1).all()


def test_no_images_no_scores():
    found = a.cover(16, 16, 3, 6)
    rule = a.Covered(linear(16, 16), torch.zeros(3, 16, 16), found, noise(16, 16))
    assert [len(v) for v in a.certify(rule, torch.rand(0, 3, 16, 16))] == [0] * 4


# embed.py --verify A B --certified


def test_verify_says_what_no_patch_could_change(tmp_path):
    """The threshold decides: above the score, between the bounds of two sizes, below all."""
    weight = torch.randn(3 * 64 * 64, 8, generator=rng(1)) / 64
    embed = lambda x: x.flatten(1) @ weight
    target, candidate = (torch.rand(2, 1, 3, 64, 64, generator=rng(2)) * 255).byte()
    fill = (noise(64, 64) * 255).byte()
    np.savez(tmp_path / "rule.npz", fill=fill.numpy()[None])
    config = {"rule_patch": [10], "rule_mask": [16], "rule_anchor": "whole"}
    (tmp_path / "rule.json").write_text(json.dumps({"config": config}))
    found, anchor = a.cover(64, 64, 10, 16), target[0].float() / 255
    rule = a.Covered(a.Mirrored(embed), anchor, found, fill.float() / 255)
    known = a.certify(rule, candidate.float() / 255)
    by_size = {s: float(a.bound_of_smaller(rule, known.distance, (s, s))) for s in range(1, 11)}
    assert by_size[10] < by_size[1] < known.score

    def answer(delta, role="validation"):
        lines = ["mirroring,role,distance", f"0,{role},99", "1,genuine,99", f"1,{role},{delta}"]
        (tmp_path / "rule.csv").write_text("\n".join(lines))
        return certified(tmp_path, embed, target, candidate)

    assert " same person\n" in answer(float(known.score) * 1.01)
    assert "nothing is certain" in answer((by_size[1] + float(known.score)) / 2)
    sure = answer(by_size[10] * 0.99)
    assert sure.endswith("NOT the same person, and no patch of 10 x 10 could change that")
    between = (by_size[1] + by_size[10]) / 2
    largest = max(s for s, bound in by_size.items() if bound > between)
    wanted = f"no patch of {largest} x {largest} could change that; a larger one might"
    assert answer(between).endswith(wanted) and 1 <= largest < 10
    with pytest.raises(run.UsageError, match="no validation persons"):
        answer(1, "genuine")


# soundness


def attacked(rule, image, place, patch, iterations=40):
    """The lowest score of the rule that Adam finds for a patch at this place."""
    H, W = image.shape[1:]
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[place[0] : place[0] + patch, place[1] : place[1] + patch] = True
    effort = a.Effort(iterations, 0.3, 2, decay=True)
    return float(a.tanh_attack(rule, image[None], rule.anchor, mask, effort, rng(1)).distance)


MODELS = {"F": (small_f, 64, 10, 16), "norm": (normalised, 64, 10, 16), "linear": (None, 24, 5, 9)}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("masked, around", [(False, True), (True, True), (True, False)])
def test_no_attack_on_the_rule_gets_below_the_bound(name, masked, around):
    make, side, patch, mask = MODELS[name]
    embed = a.Mirrored(make() if make else linear(side, side))
    found, fill = a.cover(side, side, patch, mask), None if around else noise(side, side)
    images = torch.rand(5, 3, side, side, generator=rng(5))
    rule = a.Covered(embed, images[4], found, fill, masked)
    score, bound, weakest, _ = a.certify(rule, images[:2])
    assert (bound < score).any()
    for image, s, b, place in zip(images[:2], score, bound, found.places(weakest).tolist()):
        reached = attacked(rule, image, place, patch, 12)
        assert b * (1 - 1e-5) <= reached <= s * (1 + 1e-5)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_mean_of_pixels_at_the_end_of_their_range_stays_in_it(level):
    """Weights sum to 1 up to rounding; an anchor above 1 was refused."""
    found, image = a.cover(24, 24, 5, 9), torch.full((3, 24, 24), level)
    rule = a.Covered(linear(24, 24), image, found, masked=True)
    shown = rule.cover(image[None])
    assert 0 <= float(shown.min()) and float(shown.max()) <= 1
    torch.testing.assert_close(shown, image.expand_as(shown))


def test_the_bound_is_reached_where_a_patch_decides_alone():
    """An F that reads one pixel's brightness: the attacker's best place gives the bound itself."""
    side, patch, mask = 12, 3, 5
    embed = lambda x: x[:, :1, 6, 6]  # (N, 1)
    found, fill = a.cover(side, side, patch, mask), torch.full((3, side, side), 0.4)
    rule = a.Covered(embed, torch.zeros(3, side, side), found, fill)
    image = torch.full((3, side, side), 0.9)
    score, bound, *_ = a.certify(rule, image[None])
    assert score == pytest.approx(0.9) and bound == pytest.approx(0.4)
    assert attacked(rule, image, (5, 5), patch, 200) == pytest.approx(0.4, abs=1e-3)


def broken_attack(rule, images, side, patch, places):
    """Lowest of score minus bound that an attack at these places finds."""
    _, bound, *_ = a.certify(rule, images)
    found = [
        attacked(rule, image, place, patch, 60) - float(b)
        for image, b in zip(images, bound)
        for place in places
    ]
    return min(found)


def test_a_place_left_uncovered_is_found_and_an_attack_there_breaks_the_bound():
    side, patch, mask = 16, 4, 8
    found, fill = a.cover(side, side, patch, mask), noise(side, side)
    gone = ~found.masks[:, 7, 7]  # every mask that hides pixel (7, 7) is left out
    less = a.Cover(found.masks[gone], found.holds[:, gone], found.corners[gone], found.mask)
    images = torch.full((3, 3, side, side), 0.9)
    images[2] = 0
    embed = lambda x: x[:, :1, 7, 7]  # (N, 1)
    with pytest.raises(ValueError, match="inside no mask"):
        a.Covered(embed, images[2], less, fill)
    # what a wrong cover would take for all places
    less = less._replace(holds=less.holds[less.holds.any(1)])
    rule = a.Covered(embed, images[2], less, fill)
    assert broken_attack(rule, images[:2], side, patch, [(6, 6)]) < -1e-3
    whole = a.Covered(embed, images[2], found, fill)
    assert broken_attack(whole, images[:2], side, patch, [(6, 6)]) > -1e-5


def test_a_mask_after_the_mirror_breaks_the_bound():
    """It hides another part of the mirrored image: there the patch is seen. F reads two pixels
    that mirror each other."""
    side, patch, mask = 12, 3, 5
    embed = lambda x: torch.stack([x[:, 0, 3, 2], x[:, 0, 3, 9]], 1)  # (N, 2)
    found, fill = a.cover(side, side, patch, mask), torch.full((3, side, side), 0.3)
    images = torch.full((3, 3, side, side), 0.9)
    images[2] = 0

    class Wrong(a.Covered):
        def both(self, images, k):
            views = [torch.where(self.masks[k], self.fill, v) for v in (images, images.flip(-1))]
            return a.side_by_side(torch.cat([self.embed(v) for v in views]), len(images))

        def squared(self, images, chunk=256):
            every = range(len(self.masks))
            return torch.stack(
                [a.squared_distance(self.both(images, k), self.anchor) for k in every], 1
            )

        def forward(self, images):
            k = int(self.squared(images.detach())[0].argmax())
            return self.both(images, k)

    places = [(2, 1)]
    wrong = Wrong(embed, images[2], found, fill)
    assert broken_attack(wrong, images[:2], side, patch, places) < -1e-3
    right = a.Covered(a.Mirrored(embed), images[2], found, fill)
    assert broken_attack(right, images[:2], side, patch, places) > -1e-5


def test_a_fill_from_the_hidden_pixels_breaks_the_bound():
    side, patch, mask = 16, 4, 8
    embed, found = linear(side, side), a.cover(side, side, patch, mask)
    images = torch.rand(3, 3, side, side, generator=rng(6))

    class Wrong(a.Covered):
        def cover(self, images):
            hidden = self.masks * images[:, None]
            level = hidden.sum((-2, -1), keepdim=True) / self.masks.sum((-2, -1), keepdim=True)
            return torch.where(self.masks, level, images[:, None])

        def forward(self, images):
            k = int(self.squared(images.detach())[0].argmax())
            return self.embed(self.cover(images)[:, k])

    places = [(0, 0), (0, 12), (6, 6), (12, 0), (12, 12)]
    wrong = Wrong(embed, images[2], found, noise(side, side))
    assert broken_attack(wrong, images[:2], side, patch, places) < -1e-3


def test_batch_normalisation_in_train_mode_breaks_the_bound_and_is_refused(monkeypatch):
    """F reads two pixels, in units of the spread of all pixels of the batch: a patch of black and
    white far away, seen under the other masks, shrinks them."""
    side, patch, mask = 16, 4, 8
    found, fill = a.cover(side, side, patch, mask), torch.full((3, side, side), 0.5)
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)  # statistics of the batch

    def embed(x):
        x = norm(x)
        return torch.stack([x[:, 0, 2, 13], x[:, 0, 13, 2]], 1)

    class Wrong(a.Covered):  # all masked versions in one batch
        def forward(self, images):
            k = int(self.squared(images.detach())[0].argmax())
            return self.embed(torch.where(self.masks, self.fill, images[:, None])[0])[k][None]

    images = 0.5 + 0.01 * torch.randn(3, 3, side, side, generator=rng(9))
    images[:2, 0, 2, 13] = images[:2, 0, 13, 2] = 0.55
    images[2] = 0.5
    monkeypatch.setattr(a, "answer", lambda embed, images: embed(images[:1]))  # no check
    wrong = Wrong(embed, images[2], found, fill)
    assert broken_attack(wrong, images[:2], side, patch, [(0, 0)]) < -1e-3
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        a.certify(a.Covered(lambda x: norm(x).flatten(1), images[2], found, fill), images[:2])


# tests/soundness.py, shortened


def hunt(embed):
    config = a.Config(rule_mask=(30,), rule_iterations=1, rule_lr=0.3)
    images = torch.full((3, 3, 64, 64), 0.9) - 0.2 * torch.rand(3, 3, 64, 64, generator=rng(4))
    images[2] = 0.1
    return soundness.hunt(config, a.Mirrored(embed), images[2], None, images[:2])


def test_none_of_the_projects_attacks_on_the_rule_gets_below_the_bound(capsys):
    found = hunt(normalised())
    assert len(found) == 10
    assert soundness.told("F", [{"pairs": 2, "attacks": found}]) == 0
    assert "2 pairs, 10 attacks, none below its bound" in capsys.readouterr().out
    for name in ("steepest", "indirect", "sign"):
        assert found[f"rule: {name}"][2] < found["rule: none"][2], name


def test_of_a_cover_with_a_hole_they_do(monkeypatch, capsys):
    """F reads a pixel that no mask hides, and its mirror image."""
    right = a.cover_named

    def wrong(name, *given):
        found = right(name, *given)
        if name != "rule":
            return found
        seen = ~(found.masks[:, 7, 7] | found.masks[:, 7, 56])
        holds = found.holds[:, seen]
        holds[~holds.any(1), 0] = True  # it says so
        corners = found.corners[seen]
        return found._replace(masks=found.masks[seen], holds=holds, corners=corners)

    monkeypatch.setattr(a, "cover_named", wrong)
    found = hunt(lambda x: x[:, :1, 7, 7])
    assert soundness.told("F", [{"pairs": 2, "attacks": found}]) == 1
    assert "BELOW" in capsys.readouterr().out and found["rule: steepest"][0] < -0.1


def test_a_patch_of_the_command_may_have_a_height_and_a_width(tmp_path):
    (tmp_path / "run.json").write_text('{"data": "synthetic", "preset": "demo"}')
    flags = ["--run", str(tmp_path), "--rule-patch", "16,32"]
    config = a.parse([*flags, "--rule-mask", "22,38"])[0]
    found = a.cover_named("rule", config, 64, 64)
    assert found.patch == (16, 32) and found.mask == (22, 38) and len(found.masks) == 35
    for mask, told in (
        ("1,2,3", "give 1 or 2 numbers"),
        ("22,32", "must be larger than the patch"),
    ):
        with pytest.raises(run.UsageError, match=told):
            a.parse([*flags, "--rule-mask", mask])
