"""Eq. (1): is a photograph of the same person as another one, and could a patch change the answer?

    python verify.py A.jpg B.jpg                              # by the F of data/demo
    python verify.py A.jpg B.jpg --run RUN --method ours      # by a trained one
    python verify.py A.jpg B.jpg --run RUN --model FILE.py:NAME       # by a model of your own
    python verify.py --run RUN                                # the rule's rows, all target persons

In:  result.json (the threshold) and embedding.pt of a run, or result.json of attacks.py --model.
Out: for two photographs distance, threshold and answer; for a run <method>/attacks/rule.csv, for
     metrics.py, with the genuine pairs that set the rule's threshold.

Not in the paper: the rule. Every mask of `cover` in turn hides a part of the candidate, and the
largest distance decides. A patch at any place lies inside some mask, and the distance under that
mask is what it is without the patch: whatever the patch shows, the score stays above `certify`'s
bound. The bound is the rule's, not F's; it is of this photograph and of one patch of at most that
size, and says nothing about evasion.

Images are float NCHW in [0, 1]. Distances are Euclidean, the root of the mean square over views.

Measured (demo, rendered faces, mixed, seed 0, 20 targets): AU-ROC 0.927 clean, 0.855 with every
intruder at its bound for 10 x 10 pixels; 0.45 s an image, 121 masks, on one busy x86-64 core.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

try:
    from embed import Mirrored, load_embedding, smallest_delta, squared_distance
except ImportError:

    def squared_distance(features: Tensor, anchor: Tensor) -> Tensor:
        """Compute the squared distance (N,) of features (N, V, D) or (N, D), a mean over V."""
        views = features.flatten(1).unflatten(1, (-1, anchor.shape[-1]))
        return (views - anchor.unsqueeze(-2)).square().sum(-1).mean(-1)


try:
    import attacks
    from attacks import Defence, check_inputs, extract, frozen, scale
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
    """Every setting of the rule and of whom it judges; a preset replaces some of the defaults."""

    preset: str = "paper"  # take the settings of demo | paper | model; by default the run's own
    method: tuple[str, ...] = ("all",)  # not in the paper: judge by these methods of the run
    defences: tuple[Defence, ...] = ("both",)  # Sec. 4.2: write rows under these defences
    model: str = ""  # not in the paper: FILE.py:NAME, judged by attacks.py before; its code is run
    data: Literal["", "synthetic", "folder", "celeba"] = ""  # not in the paper: judge others
    root: str = ""  # not in the paper: read the images of --data from this folder
    crop: str = ""  # not in the paper: crop the images of --data, or the photographs, in this way
    # not in the paper: of root/a/b take a, the first folder, or b, the last, as the person
    person_folder: Literal["", "first", "last"] = ""
    min_images: int = 10  # Sec. 4: take as targets only persons with so many images
    target_images: int = 0  # not in the paper: use only the first n images of a target (0: all)
    targets: int = 27  # Sec. 4: judge so many target persons
    intruders: int = 64  # App. C, released code: judge so many intruders for each target
    seed: int = -1  # not in the paper: seed every random choice (-1: the run's seed)
    patch: tuple[int, ...] = (10,)  # not in the paper: side, or height and width, of 64 pixels
    mask: tuple[int, ...] = (12,)  # not in the paper: hide such patches by masks of this side
    persons: int = 20  # not in the paper: set the threshold by so many validation persons


PRESETS: dict[str, dict] = {
    "paper": {},
    "demo": {"targets": 20, "intruders": 12, "mask": (14,)},
    "model": {"targets": 10, "intruders": 10, "target_images": 12, "mask": (20,)},
}


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
    rows = torch.arange(N, device=images.device)
    top, left, height, width = boxes.T
    total: Any = 0
    weights: Any = 0
    inside: Any = True
    for dim, size, start, length in ((2, H, top, height), (3, W, left, width)):
        shape = (N, 1, size, 1) if dim == 2 else (N, 1, 1, size)
        pixels = torch.arange(size, device=images.device)
        distance = pixels - start[:, None]  # (N, size)
        inside = inside & ((distance >= 0) & (distance < length[:, None])).view(shape)
        for edge in (start - 1, start + length):
            exists = (edge >= 0) & (edge < size)
            weight = exists[:, None] / (pixels - edge[:, None]).abs().clamp(min=1)  # (N, size)
            # (N, C, W) of the row, (N, C, H) of the column
            line = images.movedim(dim, 1)[rows, edge.clamp(0, size - 1)]
            total = total + weight.view(shape) * line.unsqueeze(dim)
            weights = weights + weight.view(shape)
    # both sums are rounded alike, so the mean of pixels in [0, 1] stays there
    mean = total / weights.clamp(min=1e-6)
    return torch.where(inside, mean.to(images.dtype), images)


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
    photographs = {"positional": True, "nargs": "*", "metavar": "PHOTOGRAPH"}
    photographs["help"] = "two: the target's, then the candidate's; none: all target persons"
    lowest = {"seed": -1, "target_images": 0, "min_images": 2}
    bounds = {name: (least, run.LARGEST) for name, least in lowest.items()}
    config, args = run.parse(
        Config, PRESETS, argv, about, attacks.choose_preset, bounds, photographs=photographs
    )
    if len(args.photographs) not in (0, 2):
        raise run.UsageError(
            f"{' '.join(args.photographs)}: give two photographs, the target's and the candidate's"
        )
    if not config.model:
        args.run = args.run or data.demo_run()
    elif not args.run:
        raise run.UsageError(f"--model {config.model}: give the --run of attacks.py --model")
    elif not args.photographs and not config.data:
        raise run.UsageError(f"--model {config.model}: give --data folder --root PHOTOS")
    return config, args


def load_judge(config: Config, folder: Path, device: torch.device) -> tuple[Embed, Path, dict]:
    """Load the F of a run, or --model as attacks.py judged it.

    Returns it with its folder and result.json, "embedding" being the digest that its rows name.
    Raises run.UsageError.
    """
    if config.model:
        name, flag = model.model_name(config.model), f"--model {config.model}"
        advice = f"let attacks.py {flag} judge it first, or name its --run"
    else:
        name, *others = attacks.choose_methods(config.method, folder)
        if others:
            raise run.UsageError(f"--method: choose one of {', '.join([name, *others])}")
        advice = "train to the end first, or name another --run"
    file = folder / name / "result.json"
    result = run.read_json(file, advice)
    with run.reading(file, advice):
        if not 0 < float(result["threshold"]) < math.inf:
            raise ValueError(f"threshold {result['threshold']}")
        result["pairs"] = "genuine validation pairs"
        if config.model:
            result["pairs"] = f"the genuine pairs of {result['persons']} persons"
    if not config.model:
        weights = file.with_name("embedding.pt")
        crop = attacks.read_run(folder)["crop"]
        result |= {"embedding": run.digest(weights), "size": data.SIZE, "crop": crop}
        return load_embedding(weights, device), file.parent, result
    embed, source = model.load_model(flag, config.model, device)
    images = attacks.fixed_images(int(result["size"])).to(device)
    with model.user_code(flag, f"fails on images of {result['size']} x {result['size']}"):
        digest = model.model_digest(embed, source, images)
    if digest != result["embedding"]:
        raise run.UsageError(
            f"{flag}: its file or features are not those that {file} is of: "
            "judge it again by attacks.py --overwrite"
        )
    embed = model.Cosine(embed) if result["distance"] == "cosine" else embed
    return embed, file.parent, result


def verify_pair(config: Config, args: Any, device: torch.device) -> int:
    """Decide eq. (1) for two photographs, with mirroring, and print what no patch could change."""
    embed, folder, result = load_judge(config, args.run, device)
    crop, size = config.crop or result["crop"] or None, int(result["size"])
    images = [data.load_image(path, crop=crop, size=size) for path in args.photographs]
    target, candidate = (image[None].to(device).float() / 255 for image in images)
    with model.user_code(f"--model {config.model}" if config.model else f"{folder}"):
        anchor = extract(embed, target)[0]
        features = extract(Mirrored(embed), candidate)
    distance, delta = float(squared_distance(features, anchor).sqrt()), float(result["threshold"])
    answer = "NOT the same person" if is_different(features, anchor, delta) else "same person"
    print(
        f"distance {distance:.3f}  threshold {delta:.3f} "
        f"(5 % of {result['pairs']} refused)  {answer}"
    )
    rows = folder / "attacks" / "rule.csv"
    if rows.exists():
        print(describe_certificate(rows, result["embedding"], embed, anchor, candidate))
    else:
        print(f"what a patch could change: verify.py without photographs writes {rows} first")
    return 0


def describe_certificate(
    rows: Path, digest: str, embed: Embed, anchor: Tensor, candidate: Tensor
) -> str:
    """Say what the rule answers for a candidate (1, 3, H, W), and what no patch could change.

    Masks and threshold are those of the rows of a run. Raises run.UsageError without them.
    """
    advice = "write them by verify.py --overwrite"
    settings = run.read_json(rows.with_suffix(".json"), advice)
    with run.reading(rows, advice), open(rows, newline="", encoding="utf-8") as file:
        settings = settings["config"]
        if settings["embedding"] != digest:
            raise ValueError("rows of another model")
        setters = [r for r in csv.DictReader(file) if r["role"] == "validation"]
        genuine = [float(r["distance"]) for r in setters if r["mirroring"] == "1"]
        if not genuine:
            raise ValueError("no validation persons, mirrored, to set the threshold")
        delta = smallest_delta(torch.tensor(genuine))
        height, width = candidate.shape[2:]
        patch = scale_size(settings["rule_patch"], height, width)
        boxes, holds = cover(height, width, patch, scale_size(settings["rule_mask"], height, width))
    known = certify(MaskedVerifier(Mirrored(embed), anchor, boxes), holds, candidate)
    about = (
        f"under the rule: {float(known.score):.3f}  threshold {delta:.3f} "
        f"(5 % of {len(genuine)} genuine validation pairs refused)"
    )
    if known.score < delta:
        return f"{about}  same person\n(the certificate is of refusals alone)"
    sure = None
    for k in range(1, max(patch) + 1):
        smaller = tuple(max(1, side * k // max(patch)) for side in patch)
        if bound_patch(known, boxes, smaller, height, width) >= delta:
            sure = smaller
    if sure is None:
        certain = "but nothing is certain: a small patch might change that"
    else:
        certain = f"and no patch of {sure[0]} x {sure[1]} could change that"
        certain += "" if sure == patch else "; a larger one might"
    return f"{about}  NOT the same person, {certain}"


def scale_size(sides: Sequence[int], height: int, width: int) -> Size:
    """Scale a side, or height and width, of 64 to an image of another size."""
    return max(1, scale(sides[0], height)), max(1, scale(sides[-1], width))


def threshold_setters(people: attacks.JudgedPeople, most: int) -> list[int]:
    """Choose the persons whose genuine pairs set the rule's threshold: not targets, of those left
    the ones with the most images, two at least."""
    n = people.faces.person.bincount(minlength=len(people.faces.names)).tolist()
    others = [p for p in people.far if n[p] > 1 and p not in people.targets]
    return sorted(others, key=lambda p: (-n[p], p))[:most]


def certify_person(
    config: Config, embed: Embed, people: attacks.JudgedPeople, device: torch.device, person: int
) -> tuple[list[str], list[list], dict, dict]:
    """Certify the images of a target person and the intruders, or of a person who sets the
    threshold; return header, rows, statistics and no example images."""
    began, faces, target = time.monotonic(), people.faces, people.faces.names[person]
    height, width = faces.images.shape[2:]
    patch, mask = (scale_size(sides, height, width) for sides in (config.patch, config.mask))
    boxes, holds = cover(height, width, patch, mask)
    rng = attacks.stable_generator(config.seed, target, "intruders")
    whom = faces.person, person, people.near, people.far, config.intruders, 0
    tested, _ = attacks.choose_intruders(*whom, rng)
    if person not in people.targets:
        tested = []
    own = (faces.person == person).nonzero().flatten().tolist()[: config.target_images or None]
    features = extract(embed, faces.images[own].to(device))
    smaller = [side for side in SMALLER if side < min(config.patch)]
    rows = []
    for mirroring, selection in (attacks.DEFENCES[defence] for defence in config.defences):
        best = attacks.select_anchor(features) if selection else 0
        candidates = [i for i in own if i != own[best]] + tested
        images = faces.images[candidates].to(device).float() / 255
        verifier = MaskedVerifier(Mirrored(embed) if mirroring else embed, features[best], boxes)
        known = certify(verifier, holds, images)
        columns = width - patch[1] + 1  # places in a row
        values = [known.score, known.place // columns, known.place % columns, known.bound]
        for side in smaller:
            sides = scale_size((side,), height, width)
            values.append(bound_patch(known, boxes, sides, height, width))
        for candidate, *numbers in zip(candidates, *(v.tolist() for v in values)):
            other = faces.names[int(faces.person[candidate])]
            role = "genuine" if other == target else "intruder"
            role = role if person in people.targets else "validation"
            row = ["rule", mirroring, selection, config.seed, target, own[best], candidate, other]
            rows.append([*row, role, *numbers])
    header = [*attacks.COLUMNS, "row", "col", "bound", *(f"bound_{side}" for side in smaller)]
    return header, rows, {"seconds": time.monotonic() - began}, {}


def verify_people(config: Config, args: Any, device: torch.device) -> int:
    """Write the rows `rule` of all target persons, by the methods of a run or by --model."""
    record: dict[str, Any] = {}
    result: dict[str, Any] = {"size": data.SIZE}
    if config.model:
        embed, folder, result = load_judge(config, args.run, device)
        methods: Sequence[str] = [folder.name]
    else:
        record = attacks.read_run(args.run)
        methods = attacks.choose_methods(config.method, args.run)
    if config.seed < 0:
        config = replace(config, seed=record.get("seed", 0))
    size = int(result["size"])
    patch, mask = (scale_size(sides, size, size) for sides in (config.patch, config.mask))
    try:
        boxes, _ = cover(size, size, patch, mask)
    except ValueError as error:
        raise run.UsageError(f"--patch, --mask: {error}") from None
    with run.rank_0_first():
        whom = SimpleNamespace(**asdict(config), size=size)
        people = attacks.judged_people(whom, args.run, record)
    for method in methods:
        if config.model:
            made_with = attacks.settings_of(config, people)
            made_with |= {key: result[key] for key in ("embedding", "size", "distance")}
            settings = {"config": made_with, "seed": config.seed, "data": people.faces.data}
            settings |= {"model": config.model} | run.machine(device)
        else:
            embed, settings = attacks.load_method(config, args.run / method, people, device)
        # the names that they have in the rows of all runs
        for key in ("patch", "mask", "persons"):
            settings["config"].pop(key, None)
            settings["config"][f"rule_{key}"] = getattr(config, key)
        make = functools.partial(certify_person, config, embed, people, device)
        table, effort = args.run / method / people.folder / "rule.csv", {"masks": len(boxes)}
        about = {"attack": "rule", **settings}
        setters = threshold_setters(people, config.persons)
        with model.user_code(f"--model {config.model}" if config.model else method):
            attacks.write_rows(table, about, people, setters, make, effort, args.overwrite)
    return 0


def verify(argv: Sequence[str] | None) -> int:
    """Do `python verify.py`: two photographs, or all target persons."""
    config, args = parse(argv)
    device = run.start(args.device)
    return (verify_pair if args.photographs else verify_people)(config, args, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the command and return its exit status."""
    if run is None or attacks is None:
        raise SystemExit("verify.py: the command needs the folder data/ beside it")
    return run.command("verify.py", verify, argv)


if __name__ == "__main__":
    raise SystemExit(main())
