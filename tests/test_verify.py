"""The rule: `cover` leaves no place out, no attack gets below the bound, and where one of its
conditions is broken an attack does; the command's answers and rows."""

import csv
import dataclasses
import itertools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import attacks as a
import data
import embed as e
import metrics
import verify as v
from data import model, run

# where the mask that decides hides the patch nothing is left to gain
pytestmark = pytest.mark.filterwarnings("ignore:.* gradients")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(H, W, dim=8):
    weight = torch.randn(3 * H * W, dim, generator=rng(1)) / math.sqrt(H * W)
    return lambda x: x.flatten(1) @ weight


def small_f():
    torch.manual_seed(0)
    return e.Embedding(1 / 16, 16, True).eval().requires_grad_(False)


def places(H, W, h, w):
    return itertools.product(range(H - h + 1), range(W - w + 1))


def masks_of(boxes, H, W):
    masks = torch.zeros(len(boxes), H, W, dtype=torch.bool)
    for mask, (top, left, height, width) in zip(masks, boxes.tolist()):
        mask[top : top + height, left : left + width] = True
    return masks


def holding(masks, r, c, h, w):
    """Which masks (K, H, W) hide all of a patch at (r, c)."""
    return masks[:, r : r + h, c : c + w].flatten(1).all(1)


# eq. (1), the fill and the cover


def test_a_distance_of_delta_is_another_person_and_views_are_averaged():
    features = torch.tensor([[[3.0, 0], [0, 4]], [[3, 0], [0, 3]]])  # squares 9, 16 and 9, 9
    anchor = torch.zeros(2)
    assert v.is_different(features, anchor, math.sqrt(12.5)).tolist() == [True, False]
    assert v.is_different(features, anchor, 3.0).tolist() == [True, True]
    assert v.is_different(features[1], anchor, 3.0).tolist() == [True, True]


def test_fill_around_is_the_mean_of_the_next_pixels_by_distance():
    H, W = 9, 8
    boxes = [[0, 0, 3, 4], [5, 5, 4, 3], [2, 3, 0, 0], [0, 2, 9, 3], [4, 1, 1, 2], [0, 0, 9, 8]]
    images = torch.rand(len(boxes), 3, H, W, generator=rng(2))
    filled = v.fill_around(images, torch.tensor(boxes))
    for image, got, (top, left, height, width) in zip(images, filled, boxes):
        for r, c in itertools.product(range(H), range(W)):
            if not (top <= r < top + height and left <= c < left + width):
                assert torch.equal(got[:, r, c], image[:, r, c])
                continue
            near = [(top - 1, c), (top + height, c), (r, left - 1), (r, left + width)]
            near = [(i, j) for i, j in near if 0 <= i < H and 0 <= j < W]
            weights = [1 / (abs(i - r) + abs(j - c)) for i, j in near]
            mean = sum(w * image[:, i, j] for w, (i, j) in zip(weights, near))
            wanted = mean / sum(weights) if near else torch.zeros(3)
            torch.testing.assert_close(got[:, r, c], wanted)
    # weights sum to 1 up to rounding; a value above 1 was refused
    boxes, _ = v.cover(24, 24, (5, 5), (9, 9))
    assert float(v.fill_around(torch.ones(len(boxes), 3, 24, 24), boxes).max()) <= 1


@pytest.mark.parametrize("H, W, patch, mask, K", [
    (12, 10, (3, 5), (4, 9), 10), (12, 10, (1, 1), (2, 2), 30), (12, 10, (6, 2), (8, 8), 6),
    (64, 64, (10, 10), (14, 14), 11 * 11), (64, 60, (23, 7), (34, 8), 4 * 27),
])  # fmt: skip
def test_every_place_of_the_patch_is_inside_a_mask(H, W, patch, mask, K):
    boxes, holds = v.cover(H, W, patch, mask)
    masks = masks_of(boxes, H, W)
    assert len(boxes) == K  # no more than it needs
    assert (masks.sum((1, 2)) == mask[0] * mask[1]).all()  # none leaves the image
    for row, (r, c) in zip(holds, places(H, W, *patch), strict=True):
        assert torch.equal(row, holding(masks, r, c, *patch)) and row.any()


@pytest.mark.parametrize("patch, mask", [
    ((10, 10), (10, 11)), ((10, 10), (9, 20)), ((0, 1), (5, 5)), ((10, 10), (65, 64))
])  # fmt: skip
def test_a_mask_that_cannot_cover_is_refused(patch, mask):
    with pytest.raises(ValueError, match="larger than the patch and fit"):
        v.cover(64, 64, patch, mask)


# the bound


def brute_force(embed, anchor, image, boxes, mirroring=True):
    """Distances (K,) by the definition: mask, then mirror; the mean over both views."""
    d = []
    for box, mask in zip(boxes, masks_of(boxes, *image.shape[1:])):
        seen = torch.where(mask, v.fill_around(image[None], box[None])[0], image)
        views = (seen, seen.flip(-1)) if mirroring else (seen,)
        squares = [(embed(x[None])[0] - anchor).square().sum() for x in views]
        d.append(torch.stack(squares).mean().sqrt())
    return torch.stack(d)


@pytest.mark.parametrize("patch", [(3, 2), (2, 1), (1, 1)])
def test_bound_equals_brute_force_for_the_patch_and_smaller_ones(patch):
    H, W = 9, 8
    plain, images = linear(H, W), torch.rand(4, 3, H, W, generator=rng(7))
    boxes, holds = v.cover(H, W, (3, 2), (5, 4))
    anchor = plain(images[3:])[0]
    verifier = v.MaskedVerifier(e.Mirrored(plain), anchor, boxes)
    known = v.certify(verifier, holds, images[:3])
    smaller = v.bound_patch(known, boxes, patch, H, W)
    masks = masks_of(boxes, H, W)
    for n, image in enumerate(images[:3]):
        d = brute_force(plain, anchor, image, boxes)
        bounds = torch.stack(
            [d[holding(masks, r, c, *patch)].max() for r, c in places(H, W, *patch)]
        )
        torch.testing.assert_close(smaller[n], bounds.min())
        torch.testing.assert_close(known.score[n], d.max())
        if patch == (3, 2):
            torch.testing.assert_close(known.bound[n], bounds.min())
            assert known.place[n] == bounds.argmin()
    # its features are those of the mask that decides
    features = verifier(images[:3])
    assert features.shape == (3, 2, 8)
    torch.testing.assert_close(e.squared_distance(features, anchor).sqrt(), known.score)
    torch.testing.assert_close(verifier.squared_distances(images[:3], 2).sqrt(), known.distance)
    assert [len(x) for x in v.certify(verifier, holds, images[:0])] == [0] * 4


def test_no_patch_of_any_place_and_pattern_gets_below_the_bound_and_one_reaches_it():
    """All patches of two levels at all places of a tiny image, under an F that reads a pixel."""
    H, W, patch = 5, 4, (2, 1)
    boxes, holds = v.cover(H, W, patch, (3, 2))
    verifier = v.MaskedVerifier(lambda x: x[:, :1, 2, 1], torch.zeros(1), boxes)
    image = 0.1 + 0.8 * torch.rand(1, H, W, generator=rng(4))
    _, bound, _, distance = v.certify(verifier, holds, image[None])
    scores = {}
    for r, c in places(H, W, *patch):
        for values in itertools.product((0.0, 1.0), repeat=2):
            patched = image.clone()
            patched[0, r : r + 2, c] = torch.tensor(values)
            scores[r, c, values] = float(v.certify(verifier, holds, patched[None]).score)
    least = min(scores, key=scores.get)
    assert scores[least] == pytest.approx(float(bound)) and float(bound) < float(distance.max())
    assert least[:2] in ((1, 1), (2, 1))


def test_what_is_no_number_is_not_certified():
    """No features where pixel (8, 8) is hidden: a patch there is certified against by nothing."""
    images = torch.rand(2, 3, 16, 16, generator=rng(3))
    images[:, 0] = 0.25
    images[:, 0, 8, 8] = 1
    boxes, holds = v.cover(16, 16, (3, 3), (6, 6))
    whole = linear(16, 16)
    broken = lambda x: torch.where((x[:, :1, 8, 8] - 0.25).abs() < 1e-3, torch.nan, whole(x))
    score, bound, place, _ = v.certify(
        v.MaskedVerifier(broken, torch.zeros(8), boxes), holds, images
    )
    assert (score > 0.1).all() and (bound == 0).all()
    assert all(masks_of(boxes[holds[p]], 16, 16)[:, 8, 8].all() for p in place)
    assert (v.certify(v.MaskedVerifier(whole, torch.zeros(8), boxes), holds, images)[1] > 0.1).all()


# soundness


def attack(verifier, image, place, patch, iterations=60, optimiser="adam"):
    """The lowest score that an attack on the rule reaches with a patch at this place."""
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    mask[place[0] : place[0] + patch, place[1] : place[1] + patch] = True
    effort = a.Effort(iterations, 0.3, 2, decay=True, optimiser=optimiser)
    result = a.tanh_attack(verifier, image[None], verifier.anchor, mask, effort, rng(1))
    return float(result.distance)


@pytest.mark.parametrize("optimiser", ["adam", "sign"])
@pytest.mark.parametrize("make, side, patch, mask", [(small_f, 64, 10, 30), (linear, 24, 5, 9)])
def test_no_attack_on_the_rule_gets_below_the_bound(make, side, patch, mask, optimiser):
    F = make() if make is small_f else make(side, side)
    boxes, holds = v.cover(side, side, (patch, patch), (mask, mask))
    images = torch.rand(3, 3, side, side, generator=rng(5))
    verifier = v.MaskedVerifier(e.Mirrored(F), F(images[2:])[0], boxes)
    score, bound, weakest, _ = v.certify(verifier, holds, images[:2])
    for image, s, b, place in zip(images[:2], score, bound, weakest.tolist()):
        reached = attack(verifier, image, divmod(place, side - patch + 1), patch, 12, optimiser)
        assert b * (1 - 1e-5) <= reached < s


LEVEL = torch.full((1, 3, 16, 16), 0.9)


def below(verifier, holds, optimiser="adam", place=(6, 6)):
    """By how much an attack by a patch of 4 x 4 gets below the bound of LEVEL."""
    bound = float(v.certify(verifier, holds, LEVEL).bound)
    assert bound == pytest.approx(0.9)
    return bound - attack(verifier, LEVEL[0], place, 4, optimiser=optimiser)


@pytest.mark.parametrize("optimiser", ["adam", "sign"])
def test_a_hole_in_the_cover_breaks_the_bound(optimiser):
    """F reads a pixel that no mask hides."""
    boxes, holds = v.cover(16, 16, (4, 4), (8, 8))
    embed, anchor = lambda x: x[:, :1, 7, 7], torch.zeros(1)
    assert below(v.MaskedVerifier(embed, anchor, boxes), holds, optimiser) < 1e-5
    hides = masks_of(boxes, 16, 16)[:, 7, 7]
    less, known = v.MaskedVerifier(embed, anchor, boxes[~hides]), holds[:, ~hides]
    with pytest.raises(ValueError, match="places of the patch lie inside no mask"):
        v.certify(less, known, LEVEL)
    # what a wrong cover would take for all places
    assert below(less, known[known.any(1)], optimiser) > 0.5


def test_a_mask_after_the_mirror_breaks_the_bound():
    """It hides another part of the mirror image: there the patch is seen. F reads two pixels that
    mirror each other."""
    boxes, holds = v.cover(16, 16, (4, 4), (6, 6))
    embed = lambda x: torch.stack([x[:, 0, 7, 4], x[:, 0, 7, 11]], 1) / math.sqrt(2)

    class Wrong(v.MaskedVerifier):
        def views(self, images, boxes):
            both = (images, images.flip(-1))
            return torch.stack([self.embed(v.fill_around(x, boxes)) for x in both], 1)

        def squared_distances(self, images, chunk=256):
            views = [self.views(x.expand(len(self.boxes), -1, -1, -1), self.boxes) for x in images]
            return torch.stack([e.squared_distance(x, self.anchor) for x in views])

        def forward(self, images):
            return self.views(images, self.boxes[self.squared_distances(images).argmax(1)])

    right = v.MaskedVerifier(e.Mirrored(embed), torch.zeros(2), boxes)
    assert below(right, holds, place=(6, 2)) < 1e-5
    assert below(Wrong(embed, torch.zeros(2), boxes), holds, place=(6, 2)) > 0.1


def test_a_fill_from_the_hidden_pixels_breaks_the_bound(monkeypatch):
    boxes, holds = v.cover(16, 16, (4, 4), (8, 8))
    verifier = v.MaskedVerifier(lambda x: x[:, :1, 7, 7], torch.zeros(1), boxes)

    def wrong(images, boxes):
        mask = masks_of(boxes, 16, 16)[:, None]
        level = (mask * images).sum((-2, -1), keepdim=True) / mask.sum((-2, -1), keepdim=True)
        return torch.where(mask, level, images)

    monkeypatch.setattr(v, "fill_around", wrong)
    assert below(verifier, holds) > 0.01


def test_batch_normalisation_in_train_mode_is_refused():
    """Statistics of the batch let a patch change what is seen under the other masks."""
    boxes, holds = v.cover(16, 16, (4, 4), (8, 8))
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    images = torch.rand(3, 3, 16, 16, generator=rng(9))
    with pytest.raises(ValueError, match="alone"):
        batch = lambda x: norm(x).flatten(1)
        v.certify(v.MaskedVerifier(batch, torch.zeros(768), boxes), holds, images)


# the command

CLEAN = "--attacks clean --target-images 4 --targets 2 --intruders 2 --clean-intruders 3"
ROWS = "--persons 3 --patch 20 --mask 29".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of rendered persons, an F that nobody trained, clean rows, two photographs."""
    sizes = {"train_persons": 3, "validation_persons": 4, "target_persons": 3, "width": 1 / 16}
    sizes |= {"synthetic_persons": 10, "synthetic_images": 10, "dim": 16, "method": "mixed"}
    config = e.Config(**e.PRESETS["demo"] | {"preset": "demo"} | sizes)
    folder = tmp_path_factory.mktemp("run")
    faces, split = data.open_run(config, folder)
    about = {"people": run.read_json(folder / "people.json")["sha256"]}
    about |= {"config": dataclasses.asdict(config), "model": small_f().state_dict()}
    run.save(folder / "mixed" / "embedding.pt", "embedding", **about)
    run.write(folder / "mixed" / "result.json", {"threshold": 2.0})
    for name, image in zip("ab", faces.images[[0, 15]]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    assert a.main(["--run", str(folder), "--defences", "both,basic", *CLEAN.split()]) == 0
    return folder, faces.images.float() / 255, split


def command(capsys, *argv):
    """Status, standard output and error of verify.py."""
    return v.main([*map(str, argv)]), *capsys.readouterr()


def test_rows_are_certificates_and_go_on(home, capsys, interrupted_at):
    folder, images, split = home
    file, argv = folder / "mixed" / "attacks" / "rule.csv", ["--run", folder, *ROWS]
    with interrupted_at(v, "certify", 3):  # two persons before
        assert command(capsys, *argv)[0] == 130
    begun = file.read_text()
    with interrupted_at(v, "certify", 0) as calls:
        status, out, _ = command(capsys, *argv)
    assert status == 0 and len(calls) == 3 and file.read_text().startswith(begun)
    assert (
        "mixed rule: 25 masks, 2 targets, 19 pairs" in out
    )  # 2 x (3 + 2) + 3 x 3, with both defences alone
    assert "\nmixed   certified " in out and out.endswith(f"{folder}/tables.md\n")
    rows = [*csv.DictReader(file.read_text().splitlines())]
    assert list(rows[0]) == [*a.COLUMNS, "row", "col", "bound", *(f"bound_{s}" for s in v.SMALLER)]
    roles = [row["role"] for row in rows]
    assert [roles.count(role) for role in ("genuine", "intruder", "validation")] == [6, 4, 9]
    assert {(row["mirroring"], row["selection"]) for row in rows} == {("1", "1")}
    # the settings of the clean rows, the first of their pairs
    clean = file.with_name("clean.csv")
    before, after = (run.read_json(x.with_suffix(".json"))["config"] for x in (clean, file))
    assert after == before | {"rule_patch": [20], "rule_mask": [29], "rule_persons": 3}
    pairs, judged = (
        [(r["mirroring"], r["target"], r["anchor"], r["candidate"], r["role"]) for r in table]
        for table in (rows, csv.DictReader(clean.read_text().splitlines()))
    )
    assert [x for x in judged if x in pairs] == [x for x in pairs if x[-1] != "validation"]
    assert len(judged) == 12 + 2 * 2 * 3
    # as attacks.py chooses them
    person = torch.arange(len(images)) // 10
    for row in rows[3], rows[8]:  # the first intruder of each target
        p, several = int(row["anchor"]) // 10, a.stable_generator(0, row["target"], "intruders")
        own = small_f()(images[10 * p : 10 * p + 4])
        best = int(torch.cdist(own, own).square().sum(0).argmin())
        assert int(row["anchor"]) == 10 * p + best
        tested, _ = a.choose_intruders(person, p, split.target, split.validation, 2, 0, several)
        assert int(row["candidate"]) == tested[0]
    boxes, _ = v.cover(64, 64, (20, 20), (29, 29))
    masks = masks_of(boxes, 64, 64)
    for row in rows[4], rows[9], rows[-1]:  # two intruders, one of validation
        anchor = small_f()(images[[int(row["anchor"])]])[0]
        d = brute_force(small_f(), anchor, images[int(row["candidate"])], boxes, 1)
        known = d[holding(masks, int(row["row"]), int(row["col"]), 20, 20)].max()
        two = min(d[holding(masks, r, c, 2, 2)].max() for r, c in places(64, 64, 2, 2))
        numbers = torch.tensor([float(row[key]) for key in ("distance", "bound", "bound_2")])
        torch.testing.assert_close(numbers, torch.stack([d.max(), known, two]))


def test_rows_without_defences_are_certificates_too(home, tmp_path):
    folder, images, _ = home
    copy = shutil.copytree(folder, tmp_path / "copy")
    flags = ["--run", str(copy), "--overwrite"]
    assert a.main([*flags, "--defences", "basic", *CLEAN.split()]) == 0
    assert v.main([*flags, *map(str, ROWS)]) == 0
    with open(copy / "mixed/attacks/rule.csv") as file:
        rows = [*csv.DictReader(file)]
    assert any(float(row["bound_8"]) < float(row["bound_2"]) for row in rows)
    row = rows[4]
    assert (row["mirroring"], row["selection"], row["role"]) == ("0", "0", "intruder")
    anchor = small_f()(images[[int(row["anchor"])]])[0]
    boxes, _ = v.cover(64, 64, (20, 20), (29, 29))
    d = brute_force(small_f(), anchor, images[int(row["candidate"])], boxes, 0)
    assert float(row["distance"]) == pytest.approx(float(d.max()))


def test_persons_with_the_most_images_set_the_threshold():
    faces = SimpleNamespace(person=torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]), names="abcde")
    people = SimpleNamespace(faces=faces, near=[4], far=[0, 1, 2, 3, 4], targets=[4])
    assert v.threshold_setters(people, 2) == [2, 1]
    assert v.threshold_setters(people, 9) == [2, 1, 3]  # one image makes no pair
    # those who could be targets, but are none, come after the others
    people = SimpleNamespace(faces=faces, near=[2, 4], far=[0, 1, 3], targets=[4])
    assert v.threshold_setters(people, 9) == [1, 3, 2]


def test_a_pair_is_decided_by_f_and_by_the_rule(home, capsys):
    folder, (target, candidate) = home[0], home[1][[0, 15]]
    rows, result = folder / "mixed" / "attacks" / "rule.csv", folder / "mixed" / "result.json"
    rows.unlink(missing_ok=True)
    pair = [folder / "a.png", folder / "b.png", "--run", folder]
    embed = small_f()
    anchor = embed(target[None])[0]
    views = embed(torch.stack([candidate, candidate.flip(-1)]))
    distance = float((views - anchor).square().sum(1).mean().sqrt())
    for delta, answer in ((distance * 0.99, "NOT the same"), (distance * 1.01, "same")):
        run.write(result, {"threshold": delta})
        line = f"distance {distance:.3f}  threshold {delta:.3f} (5 % of genuine validation pairs"
        out = command(capsys, *pair)[1]
        assert (
            out.startswith(f"{line} refused)  {answer} person\n") and f"writes {rows} first" in out
        )
    boxes, _ = v.cover(64, 64, (10, 10), (16, 16))
    d = brute_force(embed, anchor, candidate, boxes)
    known = v.Certificate(d, d, d, d[None])
    bounds = {s: float(v.bound_patch(known, boxes, (s, s), 64, 64)) for s in range(1, 11)}
    assert bounds[10] < bounds[1] < d.max()
    config = {"embedding": v.model.model_digest(embed, None, v.attacks.fixed_images(64))}
    config |= {"rule_patch": [10], "rule_mask": [16]}

    def answer(delta, role="validation"):
        lines = ["mirroring,role,distance", f"0,{role},99", "1,genuine,99", f"1,{role},{delta}"]
        run.write(rows, "\n".join(lines))
        run.write(rows.with_suffix(".json"), {"config": config})
        return "".join(command(capsys, *pair)[1:])

    assert " same person\n(" in answer(float(d.max()) * 1.01)
    assert "nothing is certain" in answer((bounds[1] + float(d.max())) / 2)
    assert "and no patch of 10 x 10 could change that\n" in answer(bounds[10] * 0.99)
    between = (bounds[1] + bounds[10]) / 2
    most = max(s for s, bound in bounds.items() if bound > between)
    assert f"{most} x {most} could change that; a larger one might" in answer(between)
    assert "no pairs of others than the targets" in answer(1, "genuine")
    config["embedding"] = "another"
    assert "rows of another model" in answer(1)
    rows.unlink()


def test_a_pair_is_decided_by_a_model_that_was_judged(home, capsys, tmp_path):
    folder, images, _ = home
    file = tmp_path / "net.py"
    file.write_text("embed = lambda x: x.mean((2, 3)) + 0.1")
    pair = [folder / "a.png", folder / "b.png", "--run", tmp_path, "--model", f"{file}:embed"]
    assert "let attacks.py --model" in command(capsys, *pair)[2]
    digest = model.model_digest(lambda x: x.mean((2, 3)) + 0.1, file, a.fixed_images(64))
    result = {"embedding": digest, "size": 64, "distance": "cosine", "crop": "none", "persons": 7}
    run.write(tmp_path / "net-embed" / "result.json", result | {"threshold": 0.5})
    one, two = nn.functional.normalize(images[[0, 15]].mean((2, 3)) + 0.1)
    line = (
        f"distance {float((one - two).norm()):.3f}  threshold 0.500 (5 % of the genuine pairs of 7"
    )
    assert command(capsys, *pair)[1].startswith(line)
    file.write_text("embed = lambda x: x.mean((2, 3)) + 0.2")
    status, _, err = command(capsys, *pair)
    assert status == 2 and "judge it again" in err


@pytest.mark.parametrize("argv, line", [
    (["a.png"], "give two photographs"), (["a.png", "missing.png"], "missing.png: No such file"),
    (["a.png", "b.png", "--method", "ours"], "choose all or some of mixed"),
    (["a.png", "b.png", "--run", "nowhere"], "nowhere: no such folder"),
    (["--mask", "10"], "--patch, --mask: a mask of 10x10 against a patch of 10x10"),
    (["--patch", "1,2,3"], "give 1 or 2 numbers"),
    (["--rows", "attacks-x"], "attacks-x/clean.json: no such file: let attacks.py judge it first"),
    (["--model", "m.py:f"], "m-f/attacks/clean.json: no such file: let attacks.py judge it first"),
    (["a.png", "b.png"], "mixed/result.json: no such file: train to the end first"),
    (["a.png", "b.png"], "mixed/result.json: cannot be read (threshold nan): train to the end"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(home, capsys, monkeypatch, argv, line):
    monkeypatch.chdir(home[0])
    result = home[0] / "mixed" / "result.json"
    run.write(result, {"threshold": math.nan if "nan" in line else 2.0})
    if "no such file: train" in line:
        result.unlink()
    status, _, err = command(capsys, "--run", home[0], *argv)
    run.write(result, {"threshold": 2.0})
    assert status == 2 and line in err and len(err.splitlines()) == 1


def test_rows_are_of_the_f_and_the_images_of_the_clean_rows(home, capsys):
    file = home[0] / "mixed" / "attacks" / "clean.json"
    content = run.read_json(file)
    for key in ("people", "embedding"):
        run.write(file, content | {"config": content["config"] | {key: "0123"}})
        status, _, err = command(capsys, "--run", home[0], *ROWS)
        assert status == 2 and f"other images or another model: {key} (0123 before" in err
    run.write(file, content)


def test_rows_of_a_model_are_of_its_clean_pairs(home, capsys, tmp_path):
    for i, image in enumerate(home[1][:38]):  # of the last person 8, who sets the threshold
        picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        (tmp_path / "people" / str(i // 10)).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "people" / str(i // 10) / f"{i}.png")
    (tmp_path / "net.py").write_text("embed = lambda x: x[:, :, ::8, ::8].flatten(1)")
    argv = ["--run", str(tmp_path), "--model", f"{tmp_path / 'net.py'}:embed"]
    more = ["--data", "folder", "--root", str(tmp_path / "people"), "--size", "48"]
    assert a.main([*argv, *more, *CLEAN.split()]) == 0
    status, out, _ = command(capsys, *argv, *ROWS)
    # 2 x (3 + 2) of the targets, 3 of the last person, 3 of the one who is no target
    assert status == 0 and "net-embed rule: 25 masks, 2 targets, 16 pairs" in out
    pair = [home[0] / "a.png", home[0] / "b.png"]
    assert "under the rule" in command(capsys, *argv, *pair)[1]
    # where all are targets nobody is left
    clean = CLEAN.replace("--targets 2", "--targets 9").split()
    assert a.main([*argv, *more, *clean, "--min-images", "8", "--overwrite"]) == 0
    status, out, _ = command(capsys, *argv, *ROWS, "--overwrite")
    nobody = "nobody but the targets has two photographs: their own pairs set the rule's threshold"
    assert status == 0 and nobody in out
    assert "threshold of its own pairs" in metrics.table(metrics.summary(tmp_path))
    status, _, err = command(capsys, *argv, *pair)
    assert status == 2 and "no pairs of others than the targets" in err and "--targets" in err
