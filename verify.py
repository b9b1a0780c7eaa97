"""Eq. (1): is a photograph of the same person as another one, and could a patch change the answer?

    python verify.py A.jpg B.jpg                              # by the F of data/demo
    python verify.py A.jpg B.jpg --run RUN --method ours      # by a trained one
    python verify.py A.jpg B.jpg --run RUN --model FILE.py:NAME       # by a model of your own
    python verify.py --run RUN                                # the rule's rows, all target persons

In:  result.json (the threshold) and embedding.pt of a run, or result.json of attacks.py --model;
     for the rows <method>/attacks/clean.json too, of whose persons and pairs they are, with both
     defences of Sec. 4.2 where it has them.
Out: for two photographs distance, threshold and answer; for a run <method>/attacks/rule.csv, for
     metrics.py, with the genuine pairs that set the rule's threshold.

Not in the paper: the rule. Every mask of `cover` in turn hides a part of the candidate, and the
largest distance decides. A patch at any place lies inside some mask, and the distance under that
mask is what it is without the patch: whatever the patch shows, the score stays above `certify`'s
bound. The bound is the rule's, not F's; it is of this photograph and of one patch of at most that
size, and says nothing about evasion.

Images are float NCHW in [0, 1]. Distances are Euclidean, the root of the mean square over views.

Measured (demo, rendered faces, mixed, seed 0, 20 targets): AU-ROC 0.927 clean, 0.860 with every
intruder at its bound for 10 x 10 pixels; 0.45 s an image, 121 masks, on one busy x86-64 core.
"""

from __future__ import annotations

import contextlib
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    from embed import Mirrored, load_embedding, smallest_delta, squared_distance
except ImportError:

    def squared_distance(features: Tensor, anchor: Tensor) -> Tensor:
        """Compute the squared distance (N,) of features (N, V, D) or (N, D), a mean over V."""
        return (
            (features.flatten(1).unflatten(1, (-1, anchor.shape[-1])) - anchor.unsqueeze(-2))
            .square()
            .sum(-1)
            .mean(-1)
        )


try:
    import attacks
    from attacks import check_inputs, extract, frozen, scale
except ImportError:
    attacks, frozen = None, contextlib.nullcontext  # type: ignore[assignment]

    def check_inputs(embed: Embed, images: Tensor, *anchors: Tensor) -> list[Tensor]:
        """Take the inputs as they are: without attacks.py the caller answers for them."""
        return [images, *anchors]


try:
    import data
    from data import model, run
except ImportError:
    data = model = run = None  # type: ignore[assignment]

Embed = Callable[[Tensor], Tensor]
Size = Sequence[int]  # height and width, pixels
SMALLER = (2, 4, 6, 8)  # sides, of 64, of smaller patches whose bounds stand in the rows


@dataclass(frozen=True)
class Config:
    """Hold every setting of the rule; whom it judges stands in clean.json of attacks.py."""

    preset: str = "paper"  # take the mask of demo | paper | model; by default the run's own
    method: tuple[str, ...] = ("all",)  # not in the paper: judge by these methods of the run
    model: str = ""  # not in the paper: FILE.py:NAME, judged by attacks.py before; its code is run
    rows: str = "attacks"  # not in the paper: folder of clean.json, attacks-NAME after --data
    patch: tuple[int, ...] = (10,)  # not in the paper: side, or height and width, of 64 pixels
    mask: tuple[int, ...] = (12,)  # not in the paper: hide such patches by masks of this side
    persons: int = 20  # not in the paper: set the threshold by so many validation persons


PRESETS: dict[str, dict] = {"paper": {}, "demo": {"mask": (14,)}, "model": {"mask": (20,)}}


def is_different(features: Tensor, anchor: Tensor, delta: float) -> Tensor:
    """Decide eq. (1): D(t; x), bool (N,), True where t is not of the person of x.

    features (N, V, D) of V views of t, anchor (D,) of x: with `Mirrored` the rule of Sec. 4.2.
    """
    # Eq. (1)
    return squared_distance(features, anchor).sqrt() >= delta


def fill_around(images: Tensor, boxes: Tensor) -> Tensor:
    """Fill boxes (N, 4) = (top, left, height, width) of images (N, C, H, W) from around.

    A pixel becomes the mean of the next pixels outside, up, down, left and right, each weighted by
    one over its distance, so nothing inside matters. A box over a whole image becomes 0.
    """
    N, _, H, W = images.shape
    y = torch.arange(H, device=images.device)[:, None]  # (H, 1)
    x = torch.arange(W, device=images.device)  # (W,)
    top, left, height, width = boxes.T[:, :, None, None]  # (N, 1, 1) each
    bottom, right = top + height, left + width
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (N, H, W)
    total: Any = 0
    weights: Any = 0
    for dim, pixels, edge in ((2, y, top - 1), (2, y, bottom), (3, x, left - 1), (3, x, right)):
        size = images.shape[dim]
        weight = ((edge >= 0) & (edge < size)) / (pixels - edge).abs().clamp(min=1)
        # (N, C, 1, W) of the row, (N, C, H, 1) of the column
        rows = torch.arange(N, device=images.device), edge.flatten().clamp(0, size - 1)
        total = total + weight[:, None] * images.movedim(dim, 1)[rows].unsqueeze(dim)
        weights = weights + weight[:, None]
    # both sums are rounded alike, so the mean of pixels in [0, 1] stays there
    mean = total / weights.clamp(min=1e-6)
    return torch.where(inside[:, None], mean.to(images.dtype), images)


def hold_places(boxes: Tensor, patch: Size, height: int, width: int) -> Tensor:
    """Compute which boxes (K, 4) hold a patch at which place of an image: (L, K) bool.

    The L places are all of the image, row by row; a box holds a patch that lies inside it.
    """
    rows = torch.arange(height - patch[0] + 1, device=boxes.device)
    columns = torch.arange(width - patch[1] + 1, device=boxes.device)
    offset = torch.cartesian_prod(rows, columns)[:, None] - boxes[:, :2]  # (L, K, 2)
    return ((offset >= 0) & (offset + boxes.new_tensor(patch) <= boxes[:, 2:])).all(2)


def cover(height: int, width: int, patch: Size, mask: Size) -> tuple[Tensor, Tensor]:
    """Place masks so that a patch at any place of an image lies inside at least one of them.

    Returns boxes (K, 4) of height and width mask, at stride mask - patch + 1 both ways and flush
    with the edges, and which places they hold (L, K). Raises ValueError unless the mask is larger
    than the patch and fits the image.
    """
    starts = []
    for n, p, m in zip((height, width), patch, mask):
        if not 1 <= p < m <= n:
            raise ValueError(
                f"a mask of {mask[0]}x{mask[1]} against a patch of {patch[0]}x{patch[1]} in "
                f"{height}x{width}: the mask must be larger than the patch and fit the image"
            )
        starts.append(torch.tensor(sorted({*range(0, n - m, m - p + 1), n - m})))
    corners = torch.cartesian_prod(*starts)
    boxes = torch.cat([corners, torch.tensor(mask).expand(len(corners), 2)], 1)
    return boxes, hold_places(boxes, patch, height, width)


class MaskedVerifier(nn.Module):
    """Judge an image under each mask; its features are those under the mask that decides.

    embed   any embedding, `Mirrored` or not: the mask comes before the mirror
    anchor  (D,), features of the target's whole image, one view
    boxes   (K, 4) of `cover`

    The squared distance of its features (N, V, D) to the anchor is the squared score, so every
    attack runs on it as on any embedding.
    """

    def __init__(self, embed: Embed, anchor: Tensor, boxes: Tensor) -> None:
        super().__init__()
        self.embed, self.anchor, self.boxes = embed, anchor, boxes.to(anchor.device)

    @torch.no_grad()
    def squared_distances(self, images: Tensor, chunk: int = 256) -> Tensor:
        """Compute the squared distances (N, K) under each mask; one that is NaN counts as 0."""
        squared = images.new_zeros(len(images), len(self.boxes))
        for n, image in enumerate(images):
            parts = []
            for boxes in self.boxes.split(chunk):
                masked = fill_around(image.expand(len(boxes), -1, -1, -1), boxes)
                parts.append(squared_distance(self.embed(masked), self.anchor))
            squared[n] = torch.cat(parts)
        return squared.nan_to_num(nan=0.0, posinf=math.inf)

    def forward(self, images: Tensor) -> Tensor:
        deciding = self.squared_distances(images.detach()).argmax(1)  # (N,)
        return self.embed(fill_around(images, self.boxes[deciding]))


class Certificate(NamedTuple):
    """What `certify` knows of N images."""

    score: Tensor  # (N,) under the rule
    bound: Tensor  # (N,) no patch brings the score below it
    place: Tensor  # (N,) the place of `hold_places` where the bound is that low
    distance: Tensor  # (N, K) under each mask


def lower_bounds(distance: Tensor, holds: Tensor) -> Tensor:
    """Compute the largest distance that a patch leaves as it is, (N, L), at each of L places.

    distance (N, K) under each mask, holds (L, K). Raises ValueError where no mask holds a place.
    """
    if not holds.any(1).all():
        raise ValueError(f"{int((~holds.any(1)).sum())} places of the patch lie inside no mask")
    bounds = distance.new_zeros(len(distance), len(holds))
    for n, one in enumerate(distance):
        bounds[n] = one.where(holds.to(one.device), -math.inf).amax(1)
    return bounds


@torch.no_grad()
def certify(verifier: MaskedVerifier, holds: Tensor, images: Tensor) -> Certificate:
    """Compute score and bound of images (N, C, H, W) against any patch of the cover's size.

    A patch at place l lies inside every mask k that holds it, and d_k is what it is without the
    patch. The score is the largest d_k, so at least the largest of these; the attacker chooses l,
    so the bound is the smallest over l. An intruder whose bound is delta or more is refused by
    eq. (1) under the rule. F must not depend on the rest of a batch: ValueError where it does.
    """
    if len(images):
        images, _ = check_inputs(verifier.embed, images, verifier.anchor)
    with frozen(verifier):
        distance = verifier.squared_distances(images).sqrt()
    bound, place = lower_bounds(distance, holds).min(1)
    return Certificate(distance.amax(1), bound, place, distance)


def bound_patch(known: Certificate, boxes: Tensor, patch: Size, height: int, width: int) -> Tensor:
    """Compute the bound (N,) against a smaller patch: the same masks hold it at more places."""
    return lower_bounds(known.distance, hold_places(boxes, patch, height, width)).amin(1)


# main


def parse(argv: Sequence[str] | None):
    """Return config and flags. Raises run.UsageError."""
    about = "Decide eq. (1) for two photographs, or for all target persons of a run."
    which = "two: the target's, then the candidate's; none: all target persons"
    photographs = {"positional": True, "nargs": "*", "metavar": "PHOTOGRAPH", "help": which}
    preset = attacks.choose_preset
    config, args = run.parse(Config, PRESETS, argv, about, preset, photographs=photographs)
    if len(args.photographs) not in (0, 2):
        names = " ".join(args.photographs)
        raise run.UsageError(f"{names}: give two photographs, the target's and the candidate's")
    if config.model and not args.run:
        raise run.UsageError(f"--model {config.model}: give the --run of attacks.py --model")
    args.run = args.run or data.demo_run()
    return config, args


def scale_size(sides: Size, size: int) -> Size:
    """Scale a side, or height and width, of 64 pixels to images of size x size."""
    return max(1, scale(sides[0], size)), max(1, scale(sides[-1], size))


def load_model(text: str, about: dict, file: Path, device: torch.device) -> Embed:
    """Load --model; about: its digest, size and distance in a file of attacks.py. Raises
    run.UsageError where it is another model than that."""
    flag, size = f"--model {text}", int(about["size"])
    embed, source = model.load_model(flag, text, device)
    with model.user_code(flag, f"fails on images of {size} x {size}"):
        digest = model.model_digest(embed, source, attacks.fixed_images(size).to(device))
    if digest != about["embedding"]:
        why = f"its file or features are not those that {file} is of"
        raise run.UsageError(f"{flag}: {why}: judge it again by attacks.py --overwrite")
    return model.Cosine(embed) if about["distance"] == "cosine" else embed


def verify_pair(config: Config, args: Any, folder: Path, device: torch.device) -> None:
    """Decide eq. (1) for two photographs, with mirroring, and print what no patch could change."""
    file, advice = folder / "result.json", "train to the end first, or name another --run"
    if config.model:
        advice = f"let attacks.py --model {config.model} judge it first, or name its --run"
    result = run.read_json(file, advice)
    with run.reading(file, advice):
        delta, pairs = float(result["threshold"]), "genuine validation pairs"
        if not 0 < delta < math.inf:
            raise ValueError(f"threshold {delta}")
        if config.model:
            pairs = f"the genuine pairs of {result['persons']} persons"
    if config.model:
        embed = load_model(config.model, result, file, device)
    else:
        weights, crop = folder / "embedding.pt", attacks.read_run(args.run)["crop"]
        embed = load_embedding(weights, device)
        digest = model.model_digest(embed, None, attacks.fixed_images(data.SIZE).to(device))
        result = {"embedding": digest, "size": data.SIZE, "crop": crop}
    crop, size = result["crop"] or None, int(result["size"])
    images = [data.load_image(path, crop=crop, size=size) for path in args.photographs]
    target, candidate = (image[None].to(device).float() / 255 for image in images)
    with model.user_code(f"--model {config.model}" if config.model else f"{folder}"):
        anchor = extract(embed, target)[0]
        features = extract(Mirrored(embed), candidate)
    distance = float(squared_distance(features, anchor).sqrt())
    answer = "NOT the same person" if is_different(features, anchor, delta) else "same person"
    print(f"distance {distance:.3f}  threshold {delta:.3f} (5 % of {pairs} refused)  {answer}")
    rows, advice = folder / config.rows / "rule.csv", "write them by verify.py --overwrite"
    if not rows.exists():
        print(f"what a patch could change: verify.py without photographs writes {rows} first")
        return
    # the masks and the threshold of the run's rows
    settings = run.read_json(rows.with_suffix(".json"), advice)
    with run.reading(rows, advice), open(rows, newline="", encoding="utf-8") as table:
        settings = settings["config"]
        if settings["embedding"] != result["embedding"]:
            raise ValueError("rows of another model")
        setters = [r for r in csv.DictReader(table) if r["role"] == "validation"]
        genuine = [float(r["distance"]) for r in setters if r["mirroring"] == "1"]
        if not genuine:
            why = "no pairs of others than the targets, mirrored, to set the threshold"
            advice = "attacks.py with fewer --targets and --defences both, then verify.py"
            raise run.UsageError(f"{rows}: {why}: {advice}")
        delta = smallest_delta(torch.tensor(genuine))
        patch, mask = (scale_size(settings[key], size) for key in ("rule_patch", "rule_mask"))
        boxes, holds = cover(size, size, patch, mask)
    known = certify(MaskedVerifier(Mirrored(embed), anchor, boxes), holds, candidate)
    answer = "NOT the same person, but nothing is certain: a small patch might change that"
    for k in range(1, max(patch) + 1):
        smaller = tuple(max(1, side * k // max(patch)) for side in patch)
        if bound_patch(known, boxes, smaller, size, size) >= delta:
            sure = f"no patch of {smaller[0]} x {smaller[1]} could change that"
            answer = f"NOT the same person, and {sure}"
            answer += "" if smaller == patch else "; a larger one might"
    if known.score < delta:
        answer = "same person\n(the certificate is of refusals alone)"
    pairs = f"{len(genuine)} genuine validation pairs"
    print(
        f"under the rule: {float(known.score):.3f}  threshold {delta:.3f} "
        f"(5 % of {pairs} refused)  {answer}"
    )


def threshold_setters(people: attacks.JudgedPeople, most: int) -> list[int]:
    """Choose the persons whose genuine pairs set the rule's threshold: not targets, those who could
    be last, of the others the ones with the most images, two at least."""
    n = people.faces.person.bincount(minlength=len(people.faces.names)).tolist()
    others = [p for p in {*people.near, *people.far} if n[p] > 1 and p not in people.targets]
    return sorted(others, key=lambda p: (p in people.near, -n[p], p))[:most]


def write_rule(config: Config, args: Any, file: Path, clean: dict, device: torch.device) -> None:
    """Write the rows `rule` of a clean.json's persons and pairs, with both defences where it has
    them. Raises run.UsageError where people or F have changed since."""
    advice = "judge them again by attacks.py --overwrite"
    with run.reading(file, advice):
        settings = dict(clean["config"])
        names = attacks.Config.__dataclass_fields__
        fields = {k: v for k, v in settings.items() if k in names}
        whom = attacks.Config(**fields | {"model": config.model})
        about = {k: clean[k] for k in ("seed", "data", "trained_in", "model") if k in clean}
    size = whom.size
    patch, mask = scale_size(config.patch, size), scale_size(config.mask, size)
    try:
        boxes, holds = cover(size, size, patch, mask)
    except ValueError as error:
        raise run.UsageError(f"--patch, --mask: {error}") from None
    with run.rank_0_first():
        record = {} if config.model else attacks.read_run(args.run)
        people = attacks.judged_people(whom, args.run, record)
    if config.model:
        embed = load_model(config.model, settings, file, device)
        now = attacks.settings_of(whom, people)
    else:
        embed, made_with = attacks.load_method(whom, file.parents[1], people, device)
        now = made_with["config"]
    if changes := run.differences(settings, settings | now):
        raise run.UsageError(f"{file}: other images or another model: {changes}: {advice}")
    mirroring, selection = attacks.shown_defence(whom.defences)
    faces, smaller = people.faces, [side for side in SMALLER if side < min(config.patch)]
    header = [*attacks.COLUMNS, "row", "col", "bound", *(f"bound_{side}" for side in smaller)]

    def certify_person(person: int) -> tuple[list[str], list[list], dict, dict]:
        """Make the rows of a target person, intruders too, or of one who sets the threshold."""
        began, target = time.monotonic(), faces.names[person]
        tested: list[int] = []
        if person in people.targets:
            rng = attacks.stable_generator(whom.seed, target, "intruders")
            others = people.near, people.far, whom.intruders, 0
            tested, _ = attacks.choose_intruders(faces.person, person, *others, rng)
        own = (faces.person == person).nonzero().flatten().tolist()[: whom.target_images or None]
        features = extract(embed, faces.images[own].to(device))
        best = attacks.select_anchor(features) if selection else 0
        candidates = [i for i in own if i != own[best]] + tested
        images = faces.images[candidates].to(device).float() / 255
        views = Mirrored(embed) if mirroring else embed
        known = certify(MaskedVerifier(views, features[best], boxes), holds, images)
        columns = size - patch[1] + 1  # places in a row
        values = [known.score, known.place // columns, known.place % columns, known.bound]
        for side in smaller:
            values.append(bound_patch(known, boxes, scale_size((side,), size), size, size))
        rows = []
        for candidate, *numbers in zip(candidates, *(v.tolist() for v in values)):
            other = faces.names[int(faces.person[candidate])]
            role = "genuine" if other == target else "intruder"
            role = role if person in people.targets else "validation"
            row = ["rule", mirroring, selection, whom.seed, target, own[best], candidate, other]
            rows.append([*row, role, *numbers])
        return header, rows, {"seconds": time.monotonic() - began}, {}

    settings |= {f"rule_{key}": getattr(config, key) for key in ("patch", "mask", "persons")}
    about |= {"attack": "rule", "config": settings, **run.machine(device)}
    setters, table = threshold_setters(people, config.persons), file.with_name("rule.csv")
    if not setters and run.rank() == 0:
        why = "nobody but the targets has two photographs: their own pairs set the rule's threshold"
        print(f"{table}: {why}; fewer --targets of attacks.py leave some", flush=True)
    with model.user_code(f"--model {config.model}" if config.model else f"{file.parent}"):
        effort = {"masks": len(boxes)}
        attacks.write_rows(table, about, people, setters, certify_person, effort, args.overwrite)


def verify(argv: Sequence[str] | None) -> int:
    """Do `python verify.py`: two photographs, or all target persons."""
    config, args = parse(argv)
    device = run.start(args.device)
    advice = f"let attacks.py judge it first: python attacks.py --run {args.run} --attacks clean"
    if config.model:
        names: Sequence[str] = [model.model_name(config.model)]
        advice += f" --model {config.model}"
    else:
        names = attacks.choose_methods(config.method, args.run)
    if config.model or config.rows != Config.rows:
        advice += " --data folder --root PHOTOS"
    if args.photographs:
        if len(names) > 1:
            raise run.UsageError(f"--method: choose one of {', '.join(names)}")
        verify_pair(config, args, args.run / names[0], device)
        return 0
    files = [args.run / name / config.rows / "clean.json" for name in names]
    every = [(file, run.read_json(file, advice)) for file in files]
    for file, clean in every:
        write_rule(config, args, file, clean, device)
    defences = every[0][1]["config"]["defences"]
    return attacks.print_table(args.run, config.rows, defences, ["none"])


def main(argv: Sequence[str] | None = None) -> int:
    """Do the command and return its exit status."""
    if run is None or attacks is None:
        raise SystemExit("verify.py: the command needs the folder data/ beside it")
    return run.command("verify.py", verify, argv)


if __name__ == "__main__":
    raise SystemExit(main())
