"""Every attack of Sec. 3, 4.3, 4.4 and App. B.2, C on any callable `embed(images) -> features`.

    python attacks.py                                         # the F of data/, two CPU cores
    python attacks.py --run runs/synthetic-demo-0                             # a trained one
    python attacks.py --run runs/celeba-paper-0 --attacks all --defences all  # the paper, one GPU
    python attacks.py --run RUN --data folder --root PERSONS --crop lfw       # on other persons
    python attacks.py --model FILE.py:NAME --data folder --root PHOTOS        # any model: yours

In:  people.json, run.json and <method>/embedding.pt of a run; or --model and photographs.
Out: <method>/attacks/<attack>.csv, one row a compared pair, with .json (settings, counters,
     versions) and .npz (example images) beside it, for metrics.py.

Intruders are images of the other target persons and, if those are too few, of the validation
persons; the universal patch is trained on validation persons first. Nobody who was trained on takes
part. The same command goes on after the last finished target.

Images are float NCHW in [0, 1]. A distance is the root of the squared distance to the anchor's
features, of its mean over the views where a candidate has several (`Mirrored`, `Transformed`); the
anchor itself is not mirrored (Sec. 4.2).

Measured (demo, rendered faces, one busy x86-64 core): eyeglasses, 80 iterations on 12 intruders for
each of 20 targets, 85 s; against the paper's 1000 x 5 on the same pairs they leave at most 0.01 of
AU-ROC. The preset paper has not been run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from kernels.patch_local import local_features
except ImportError:
    # whole images: the same numbers, half the speed
    local_features = None  # type: ignore[assignment]

Embed = Callable[[Tensor], Tensor]
Places = Sequence[tuple[int, int]]
Rng = torch.Generator
Start = Tensor | Rng | None
# Fig. 6, rows 24-39 of 64, columns 16-47, bit 31 left-most
EYEGLASSES = (
    "0 0 7ff80ffe f00ff007 e003e003 c003c003 60024002 60024002 "
    "20062006 20042004 20043004 1008100c 18180808 0ff007f0 0 0"
)
ATTACKS = (
    *("clean", "eyeglasses", "square", "eye_patch", "random_eyeglasses", "noise", "evasion"),
    *("indirect", "distal", "eot_eyeglasses", "eot_eye_patch", "grey_eye_patch"),
    *("rule", "rule_places", "rule_one", "rule_attacked"),
)
# modules that answer otherwise in training mode; batch normalisation also moves its averages
BY_MODE = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU
# of the features' norm, between an image alone and beside another: rounding in float32 came to
# 2e-6, TF32 keeps 10 bits; dropout and batch normalisation in training mode came to 0.02 and more
SAME = 1e-3
# Sec. 4.2: mirroring, selection
DEFENCES = {"basic": (0, 0), "mirroring": (1, 0), "selection": (0, 1), "both": (1, 1)}
COLUMNS = tuple("attack mirroring selection seed target anchor candidate person".split())
COLUMNS += ("role", "distance")
SMALLER = (2, 4, 6, 8)  # patches, of 64, whose bounds stand beside that of rule_patch
PRECISIONS = ("auto", "float32", "tf32", "bfloat16")  # auto, of the command: where fast
COUNTERS = ("zero_gradients", "nonfinite", "gradients")


@dataclass(frozen=True)
class Config:
    """Every setting of the attacks; the defaults are the paper's, a preset replaces some."""

    preset: str = "paper"  # demo | paper | released | model; on the command line the run's own
    method: tuple[str, ...] = ("all",)  # not in the paper: methods, or all that the run holds
    attacks: tuple[str, ...] = ("clean", "eyeglasses")  # not in the paper: which, or all
    defences: tuple[str, ...] = ("both",)  # Sec. 4.2: basic, mirroring, selection, both, or all
    data: str = ""  # not in the paper: judge on other persons: folder | celeba | synthetic
    root: str = ""  # not in the paper: folder of --data
    crop: str = ""  # not in the paper: crop of --data
    person_folder: str = ""  # not in the paper: the person is root/a/b's a, first, or b, last
    model: str = ""  # not in the paper: FILE.py:NAME or package.module:NAME; its code is run
    judge: str = ""  # not in the paper: a second --model, which sees patches made on the first
    mask: str = ""  # not in the paper: a PNG, white is what the attack `mask` may change
    size: int = 64  # not in the paper: side of the images that --model takes, 32 to 256
    distance: str = "euclidean"  # not in the paper: of --model's features; cosine normalises them
    min_images: int = 10  # Sec. 4: fewest images of a target
    target_images: int = 0  # not in the paper: most images of a target, the first; 0: all
    targets: int = 27  # Sec. 4: persons that are impersonated
    intruders: int = 64  # App. C, released code: attacking images a target
    seed: int = -1  # not in the paper: -1 takes the run's
    iterations: int = 1000  # Sec. 4: of every attack that has no number of its own
    optimiser: str = "adam"  # Sec. 4: adam; not in the paper: sign, without lr and decay
    lr: float = 0.01  # Sec. 4: Adam's, on delta
    restarts: int = 5  # Sec. 4: the best is kept
    decay: bool = False  # not in the paper: the learning rate falls linearly to zero
    square_stride: int = 5  # App. C: between the places searched, pixels of 64
    square_search_iterations: int = 20  # App. C: at every place
    square_search_lr: float = 0.1  # App. C: in the search
    patch_train: int = 100  # App. C, Fig. 8: intruders that the universal patch is trained on
    patch_iterations: int = 5000  # App. C: of the universal patch
    patch_lr: float = 0.005  # App. C: of the universal patch
    patch_batch: int = 0  # not in the paper: training intruders a step sees, in turn; 0: all
    patterns: int = 1000  # App. B.2: random eyeglasses an intruder
    clean_intruders: int = 200  # not in the paper: un-attacked intruders, the attacked ones first
    noise: float = 10 / 255  # App. B.2: uniform, plus or minus this
    evasion_iterations: int = 2000  # Sec. 4.3, released code: of evasion (dodging)
    evasion_lr: float = 0.05  # Sec. 4.3, released code: theirs
    evasion_restarts: int = 5  # Sec. 4.3, released code: theirs
    distal_iterations: int = 2000  # App. C: from noise
    distal_lr: float = 0.01  # App. C: from noise
    eot_samples: int = 4  # not in the paper: transformed copies a step
    eot_tests: int = 16  # not in the paper: fresh transformed copies that a face is scored on
    eot_shift: float = 2.0  # not in the paper: pixels of 64
    eot_scale: float = 0.05  # not in the paper: 1 +- this
    eot_rotation: float = 5.0  # not in the paper: degrees
    eot_brightness: float = 0.1  # not in the paper: 1 +- this
    rule_patch: tuple[int, ...] = (10,)  # not in the paper: side, or height and width, of 64
    rule_mask: tuple[int, ...] = (12,)  # not in the paper: of the masks that hide such a patch
    rule_fill: str = "around"  # not in the paper: what covers: around (the mask) | mean | noise
    rule_anchor: str = "whole"  # not in the paper: whole | masked, as the candidate
    rule_persons: int = 20  # not in the paper: validation persons who set the rule's threshold
    rule_intruders: int = 64  # not in the paper: intruders a target whose patch attacks the rule
    rule_iterations: int = 200  # not in the paper: of that attack
    rule_lr: float = 0.05  # not in the paper: of that attack
    chunk: int = 0  # not in the paper: images in one pass; 0: 128 on a CPU, 2048 on a GPU
    precision: str = "auto"  # not in the paper: of iterations: float32 | tf32 | bfloat16


PRESETS: dict[str, dict] = {
    "paper": {},
    # where the released code's attacks differ they are wrong, so nothing is taken from them
    "released": {},
    # mean distance on 10 faces, 80 iterations at 0.2 falling to zero against 1000 at 0.01:
    # +0.2 % (robust F), -2 % (untrained F)
    "demo": {"targets": 20, "intruders": 12, "clean_intruders": 60, "patterns": 100}
    | {"iterations": 80, "lr": 0.2, "restarts": 1, "decay": True}
    | {"square_search_iterations": 2, "square_search_lr": 0.3, "eot_samples": 1, "eot_tests": 8}
    | {"patch_train": 64, "patch_iterations": 60, "patch_lr": 0.2, "patch_batch": 16}
    | {"evasion_iterations": 80, "evasion_lr": 0.2, "evasion_restarts": 1}
    | {"distal_iterations": 150, "distal_lr": 0.2}
    | {"rule_mask": (14,), "rule_intruders": 4, "rule_iterations": 20, "rule_lr": 0.2},
}
# of --model, whose passes are dear: fewer than the demo's, by sign steps, which come closer for as
# many (`Sign`). A descriptor of 0.5 GFLOP, 16 pairs under eyeglasses by Adam: AU-ROC 0.905 after 20
# iterations, 0.876 after 30, 0.826 after 80
PRESETS["model"] = (
    PRESETS["demo"]
    | {"attacks": ("clean", "eyeglasses", "square", "evasion", "rule"), "target_images": 12}
    | {"targets": 10, "intruders": 10, "clean_intruders": 40, "rule_mask": (20,)}
    | {"iterations": 30, "evasion_iterations": 30, "optimiser": "sign", "precision": "float32"}
    | {"square_stride": 10, "square_search_iterations": 1}
)


class Eot(NamedTuple):
    """Expectation over transforms: the loss is the mean over S transforms of an iteration, and
    every tenth iterate is scored under the same T transforms, which choose the best."""

    steps: Tensor  # (iterations, S, 5)
    validation: Tensor  # (T, 5)


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """A GPU multiplies float32 as TF32 in here."""
    places: Any = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        yield
    finally:
        for place, allowed in zip(places, before):
            place.allow_tf32 = allowed


class Effort(NamedTuple):
    """What an attack tries, and how hard. Raises ValueError for another direction, optimiser or
    precision."""

    iterations: int = 1000
    lr: float = 0.01
    restarts: int = 5
    decay: bool = False  # the learning rate falls linearly to zero
    chunk: int = 256  # images in one pass of the embedding, views counted: speed and memory alone
    batch: int = 0  # of the universal patch: training images that a step sees, in turn; 0: all
    direction: str = "impersonate"  # lowers the distance to the anchor; evade raises it
    eot: Eot | None = None
    optimiser: str = "adam"  # App. C; sign takes neither lr nor decay
    # tf32 (GPU) or bfloat16: of the iterations, never of the distances found. In bfloat16 on the
    # demo's F the mean distance is within 0.2 % of float32's, as after another start; nearer to
    # the anchor than 1 % of the features' norm it comes less near
    precision: str = "float32"

    @property
    def sign(self) -> int:
        """Of the loss."""
        if self.direction not in ("impersonate", "evade"):
            raise ValueError(f"direction must be impersonate or evade, not {self.direction!r}")
        return 1 if self.direction == "impersonate" else -1

    def begin(self, w: Tensor, start: Tensor, every: int) -> Any:
        """`Adam` or `Sign`; every: between the iterates that are scored."""
        if self.optimiser not in OPTIMISERS:
            names = " or ".join(OPTIMISERS)
            raise ValueError(f"optimiser must be {names}, not {self.optimiser!r}")
        return OPTIMISERS[self.optimiser](w, start, self, every)

    @contextlib.contextmanager
    def iterating(self, embed: Embed, device: torch.device) -> Iterator[None]:
        """Embed frozen, and its products in the precision of the iterations."""
        if self.precision not in PRECISIONS:
            told = "float32, tf32 or bfloat16"
            raise ValueError(f"precision must be {told}, not {self.precision!r}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen(embed))
            if self.precision == "bfloat16":  # auto, which the command decides, is float32 here
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if self.precision == "tf32":
                stack.enter_context(tf32_products())
            yield

    def rows(self, embed: Embed) -> int:
        """Images of one pass, so that with all their views it has chunk."""
        views = views_of(embed) * (self.eot.steps.shape[1] if self.eot else 1)
        return max(1, self.chunk // views)

    def scorer(self, embed: Embed) -> Embed:
        """What an attacked image is judged by."""
        return Transformed(embed, self.eot.validation) if self.eot else embed


def kind(x: Any) -> str:
    """What came, in the words of an error."""
    return f"{str(x.dtype)[6:]} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


@dataclass
class Attacked:
    """What an attack found for B images."""

    images: Tensor  # (B, C, H, W)
    distance: Tensor  # (B,) root of the squared distance to the anchor
    zero_gradients: int = 0  # (image, iteration) pairs whose whole gradient was zero
    # (image, iteration) pairs with a non-finite distance or gradient, taken as zero, or random
    # patterns with a non-finite distance
    nonfinite: int = 0
    gradients: int = 0  # (image, iteration) pairs in all
    mask: Tensor | None = None  # (H, W) or (B, H, W) bool: where the images may differ
    extra: dict = dataclasses.field(default_factory=dict)  # what one attack adds, see there


# Masks, Fig. 6


def scale(pixels: int, size: int) -> int:
    """Pixels of the paper's 64 in an image of another size, halves rounded up."""
    return (2 * pixels * size + 64) // 128


def eyeglasses_mask(height: int = 64, width: int = 64) -> Tensor:
    """(height, width) bool, the authors' eyeglasses: 107 of 64 x 64 pixels, else their nearest."""
    rows = [[int(word, 16) >> (31 - bit) & 1 for bit in range(32)] for word in EYEGLASSES.split()]
    drawn = torch.zeros(1, 1, 64, 64)
    drawn[0, 0, 24:40, 16:48] = torch.tensor(rows)
    return F.interpolate(drawn, (height, width), mode="nearest-exact")[0, 0].bool()


def eye_patch_mask(height: int = 64, width: int = 64) -> Tensor:
    """(height, width) bool, a rectangle over the eyes: 12 x 32 of 64 x 64 pixels."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[scale(26, height) : scale(38, height), scale(16, width) : scale(48, width)] = True
    return mask


def square_mask(
    row: int, column: int, size: int | None = None, height: int = 64, width: int = 64
) -> Tensor:
    """(height, width) bool, a square with its upper left pixel at (row, column); without a size
    10 x 10 of 64 x 64 pixels, to scale."""
    h, w = (max(1, scale(10, n)) if size is None else size for n in (height, width))
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[row : row + h, column : column + w] = True
    return mask


def square_positions(stride: int = 5, height: int = 64, width: int = 64) -> list[tuple[int, int]]:
    """Starts 15, 15 + stride, ..., 35 in both directions, flush edge included (Fig. 7); 25 of them
    at stride 5. At another size the same places, to scale."""
    starts = sorted({*range(15, 36, stride), 35})
    places = [(scale(r, height), scale(c, width)) for r in starts for c in starts]
    return [*dict.fromkeys(places)]


def squares(places: Places, height: int, width: int) -> Tensor:
    """(n, height, width) bool, `square_mask` at each of n places."""
    masks = torch.zeros(len(places), height, width, dtype=torch.bool)
    for mask, (row, column) in zip(masks, places):
        mask |= square_mask(row, column, None, height, width)
    return masks


def mask_pixels(mask: Tensor, images: Tensor) -> Tensor:
    """Flat pixel numbers (N, P) of mask (H, W) or (N, H, W) bool for images (N, C, H, W). Raises
    ValueError for a mask of another size, and where not each has equally many pixels."""
    N, size = len(images), tuple(images.shape[2:])
    if mask.dtype != torch.bool or mask.shape not in (size, (N, *size)):
        told = f"{kind(mask)} for images {tuple(images.shape)}"
        raise ValueError(f"mask: {told}, wanted bool {size} or {(N, *size)}")
    mask = mask.to(images.device)
    if mask.dim() == 2 or not N:
        return mask.flatten().nonzero().flatten().expand(N, -1)
    counts = mask.flatten(1).sum(1)
    if (counts != counts[0]).any():
        raise ValueError("masks of one batch must have equally many pixels")
    return mask.flatten(1).nonzero()[:, 1].view(N, -1)


def paste(images: Tensor, values: Tensor, pixels: Tensor) -> Tensor:
    """images (N, C, H, W) with the pixels of these flat numbers (N, P) replaced by values
    (N, C, P); all others stay as they are, bit for bit."""
    index = pixels[:, None].expand(-1, images.shape[1], -1)  # (N, C, P)
    return images.flatten(2).scatter(2, index, values).view(images.shape)


# Views and distance, Sec. 4.2


def squared_distance(features: Tensor, anchor: Tensor) -> Tensor:
    """Features (N, V * D) of V views, anchor (N, D) or (D,) -> (N,), the mean over the views."""
    V = features.shape[-1] // anchor.shape[-1]
    anchor = torch.cat([anchor] * V, -1) / math.sqrt(V)
    # Eq. (7)
    return (features - anchor).square().sum(-1)


def side_by_side(features: Tensor, N: int) -> Tensor:
    """Features (V * N, D) of V views of N images -> (N, V * D), divided by sqrt(V): the squared
    distance to an anchor written V times, also / sqrt(V), is the mean over the views."""
    views = features.split(N)
    return torch.cat(views, 1) / math.sqrt(len(views))


class Mirrored(nn.Module):
    """The features of an image and of its mirror, (N, 2 D), from one pass (Sec. 4.2)."""

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.embed, self.views = embed, 2 * views_of(embed)

    def forward(self, images: Tensor) -> Tensor:
        return side_by_side(self.embed(torch.cat([images, images.flip(-1)])), len(images))


class Transformed(nn.Module):
    """The features of an image under S transforms (S, 5), (N, S * D), from one pass."""

    def __init__(self, embed: Embed, transforms: Tensor) -> None:
        super().__init__()
        self.embed, self.transforms = embed, transforms
        self.views = len(transforms) * views_of(embed)

    def forward(self, images: Tensor) -> Tensor:
        return side_by_side(self.embed(transform(images, self.transforms)), len(images))


def lowest(loss: Tensor, dim: int = 0) -> Tensor:
    """Where the smallest finite value is: in an argmin NaN would win."""
    return loss.where(loss.isfinite(), torch.inf).argmin(dim)


def views_of(embed: Embed) -> int:
    """How many images embed makes of one."""
    return int(getattr(embed, "views", 1))


def draw_transforms(n: int, config: Config, generator: Rng) -> Tensor:
    """(n, 5): rows and columns of shift in pixels of 64, scale, rotation in radians, brightness;
    uniform in +- the config's ranges."""
    unit = torch.rand(n, 5, generator=generator) * 2 - 1
    shift, rotation = config.eot_shift, config.eot_rotation * torch.pi / 180
    ranges = torch.tensor([shift, shift, config.eot_scale, rotation, config.eot_brightness])
    return unit * ranges + torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])


def draw_eot(iterations: int, config: Config, generator: Rng) -> Eot:
    """The transforms of an attack of so many iterations."""
    S, T = config.eot_samples, config.eot_tests
    steps = draw_transforms(iterations * S, config, generator).view(-1, S, 5)
    return Eot(steps, draw_transforms(T, config, generator))


def transform(images: Tensor, transforms: Tensor) -> Tensor:
    """images (N, C, H, W), transforms (S, 5) of `draw_transforms` -> (S * N, C, H, W), all under
    the first, then all under the second, ..."""
    (N, C, H, W), S = images.shape, len(transforms)
    row, column, scale, angle, brightness = transforms.to(images).unbind(1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, -sin * H / W, column / 32, sin * W / H, cos, row / 32], 1)
    theta = theta.view(S, 2, 3).repeat_interleave(N, 0)
    grid = F.affine_grid(theta, [S * N, C, H, W], align_corners=False)
    images = images.repeat(S, 1, 1, 1)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (moved * brightness.repeat_interleave(N).view(-1, 1, 1, 1)).clamp(0, 1)


@contextlib.contextmanager
def frozen(embed: Embed) -> Iterator[None]:
    """Evaluation mode without weight gradients; on leaving, modes and flags are as they were."""
    if not isinstance(embed, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in embed.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in embed.parameters()]
    try:
        embed.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


# What an attack is given


def held(owner: Any) -> Iterator[Any]:
    """What a callable refers to: attributes, closure, defaults, globals that its code names, the
    parts of a method or partial."""
    import dis

    for part in owner.modules() if isinstance(owner, nn.Module) else [owner]:
        yield from getattr(part, "__dict__", {}).values()
    yield getattr(owner, "__self__", None)
    if isinstance(owner, functools.partial):
        yield from (owner.func, *owner.args, *owner.keywords.values())
    yield from getattr(owner, "__defaults__", None) or ()
    for cell in getattr(owner, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # one that is still empty
            yield cell.cell_contents
    if code := getattr(owner, "__code__", None):
        names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        yield from (owner.__globals__[name] for name in names if name in owner.__globals__)


def hidden(embed: Embed) -> list[nn.Module]:
    """Modules that a callable leads to in three steps, those that are `embed`'s own included."""
    layer, seen = [embed], {id(embed): embed}
    for _ in range(3):
        found = {id(part): part for owner in layer for part in held(owner)}
        libraries = type, type(torch)
        layer = [x for k, x in found.items() if k not in seen and not isinstance(x, libraries)]
        seen |= found
    return [part for part in seen.values() if isinstance(part, nn.Module)]


def answer(embed: Embed, images: Tensor) -> Tensor:
    """Features (1, D) of the first of the images. Raises ValueError unless embed is in evaluation
    mode and answers an image alike a second time, and alone; it sees five images for that."""
    call = "call model.eval() first"
    ramp = torch.linspace(0, 1, images.shape[3]).to(images)
    pair = torch.cat([images[:1], (images[-1:] + ramp) / 2])  # two that differ
    with frozen(embed), torch.no_grad():
        for module in (m for part in hidden(embed) for m in part.modules()):
            if module.training and isinstance(module, BY_MODE):
                told = f"{type(module).__name__} in training mode behind a callable"
                raise ValueError(f"embed: {told}: {call}")
        several = [embed(pair), embed(pair), embed(images[:1])]
    for features, n in zip(several, (2, 2, 1)):
        float_ = isinstance(features, Tensor) and features.is_floating_point()
        if not float_ or features.dim() != 2 or len(features) != n:
            raise ValueError(f"embed: gives {kind(features)} for {n} images, wanted float ({n}, D)")
    one, again, alone = (features[0].float() for features in several)
    if not one.isfinite().all():
        raise ValueError("embed: features of the first image are not finite")
    least = max(SAME, torch.finfo(several[0].dtype).eps) * one.norm()
    for other, when in ((again, "a second time"), (alone, "alone and in a batch")):
        if not (one - other).norm() <= least:
            raise ValueError(f"embed: answers an image differently {when}: {call}")
    return several[2]


def accepted(embed: Embed | None, images: Tensor, *anchors: Tensor) -> list[Tensor]:
    """The images and an anchor (N, D) for each, as constants. Raises ValueError for what would
    become a wrong number.

    images   (N, C, H, W) float32 or float64 in [0, 1]
    anchors  (D,) or (N, D), features of one view, finite
    embed    see `answer`; without it only the rest is checked
    """
    N = len(images) if isinstance(images, Tensor) and images.dim() == 4 else -1
    if N < 0 or images.dtype not in (torch.float32, torch.float64):
        wanted = "wanted float32 or float64 (N, C, H, W) in [0, 1]"
        raise ValueError(f"images: {kind(images)}, {wanted}")
    if images.numel():
        low, high = (float(end) for end in images.detach().aminmax())
        if not (low >= 0 and high <= 1):  # nor NaN
            raise ValueError(f"images: values from {low:.4g} to {high:.4g}, wanted [0, 1]")
    width = answer(embed, images).shape[1] if embed is not None and N else 0
    for anchor in anchors:
        vector = isinstance(anchor, Tensor) and anchor.is_floating_point() and anchor.numel()
        if not vector or anchor.shape[:-1] not in ((), (1,), (N,)):
            raise ValueError(f"anchor: {kind(anchor)}, wanted features (D,) or ({N}, D)")
        views, rest = divmod(width, anchor.shape[-1])
        if width and (rest or not views or views_of(embed) % views):
            told = f"{kind(anchor)} for features of width {width}"
            raise ValueError(f"anchor: {told} of {views_of(embed)} views")
        if not anchor.isfinite().all():
            raise ValueError("anchor: not finite")
    given = [images, *(anchor.expand(N, -1) for anchor in anchors)]
    return [x.detach().clone() if x.is_inference() else x.detach() for x in given]


@torch.no_grad()
def score(embed: Embed, images: Tensor, anchor: Tensor, chunk: int) -> Tensor:
    """`distances` of what was accepted before; NaN and infinity stay."""
    rows = max(1, chunk // views_of(embed))
    parts = zip(images.split(rows), anchor.expand(len(images), -1).split(rows))
    with frozen(embed):
        found = [squared_distance(embed(x), a).sqrt() for x, a in parts if len(x)]
    return torch.cat(found) if found else images.new_empty(0)


def distances(embed: Embed, images: Tensor, anchor: Tensor, chunk: int = 256) -> Tensor:
    """images (N, C, H, W), anchor (N, D) or (D,) -> (N,) root of `squared_distance`. Raises
    ValueError for what `accepted` refuses, and for a distance that is not finite."""
    images, anchor = accepted(embed, images, anchor)
    found = score(embed, images, anchor, chunk)
    if lost := int((~found.isfinite()).sum()):
        raise ValueError(f"embed: {lost} of {len(images)} images have no finite distance")
    return found


@torch.no_grad()
def extract(embed: Embed, images: Tensor, chunk: int = 256) -> Tensor:
    """images (N, C, H, W) uint8 or float in [0, 1] -> features (N, D). Raises ValueError for what
    `accepted` refuses, and for features that are not finite."""
    grey = getattr(images, "dtype", None) == torch.uint8
    accepted(embed, to_float(images[:1]) if grey else images)
    parts = images.split(chunk) if len(images) else [images.new_zeros(1, *images.shape[1:])]
    with frozen(embed):
        found = torch.cat([embed(to_float(part)) for part in parts])[: len(images)]
    if not found.isfinite().all():
        raise ValueError("embed: features are not finite")
    return found


def to_float(images: Tensor) -> Tensor:
    """uint8 to float in [0, 1]; float stays."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def select_anchor(features: Tensor) -> int:
    """Features (n, D) of one person -> the index nearest to the others, by the mean squared
    distance (Sec. 4.2)."""
    squared = (features[:, None].double() - features[None].double()).square().sum(-1)  # (n, n)
    return int(squared.sum(1).argmin())


# The optimisation, App. C


def to_tanh(x: Tensor) -> Tensor:
    """w, of which tanh_perturb(w, 0) is x in [0, 1] (to 5e-7)."""
    return torch.atanh((2 * x - 1) * 0.999999)


def place_patches(images: Tensor, patches: Tensor, places: Tensor) -> Tensor:
    """images (B, C, H, W), patches (1, K, C, h, w), places (K, 2) of them -> (B, K, C, H, W)."""
    out, (h, w) = images[:, None].repeat(1, len(places), 1, 1, 1), patches.shape[3:]
    for k, (top, left) in enumerate(places.tolist()):
        out[:, k, :, top : top + h, left : left + w] = patches[:, k]
    return out


def tanh_perturb(w: Tensor, delta: Tensor) -> Tensor:
    """The pixels under the mask, in [0, 1] whatever delta is: Adam needs no projection."""
    return (torch.tanh(w + delta) + 1) / 2


try:
    from kernels.place_patches import place_patches  # type: ignore[no-redef,assignment]
    from kernels.tanh_perturb import tanh_perturb  # type: ignore[no-redef,assignment]
except ImportError:
    pass


class Batch(NamedTuple):
    """Images attacked in one pass, with their anchors and free pixels."""

    embed: Embed
    images: Tensor  # (n, C, H, W)
    anchor: Tensor  # (n, D)
    pixels: Tensor  # (n, P)
    local: Embed | None  # the patch's values -> features, from what it changes alone

    @classmethod
    def of(cls, embed: Embed, images: Tensor, anchor: Tensor, pixels: Tensor, whole: bool) -> Batch:
        """whole: recompute all of each image, not what the patch changes alone."""
        local = None
        if local_features is not None and not whole:
            inner = embed.embed if isinstance(embed, Mirrored) else embed
            local = local_features(inner, images, pixels, inner is not embed)
        return cls(embed, images, anchor, pixels, local)

    def features(self, patch: Tensor, transforms: Tensor | None) -> Tensor:
        """Of the images with patch (n, C, P) pasted in."""
        if self.local is not None:
            return side_by_side(self.local(patch), len(patch))
        embed = self.embed if transforms is None else Transformed(self.embed, transforms)
        return embed(paste(self.images, patch, self.pixels))


class Adam:
    """Adam on x = delta, the form of App. C."""

    def __init__(self, w: Tensor, start: Tensor, effort: Effort, every: int) -> None:
        self.w, self.x, self.effort = w, start.clone(), effort
        self.adam = torch.optim.Adam([self.x], lr=effort.lr, fused=True if start.is_cuda else None)

    def patch(self, x: Tensor) -> Tensor:
        return tanh_perturb(self.w, x)

    def step(self, step: int, grad: Tensor, loss: Tensor | None, better: Tensor) -> None:
        share = 1 - step / self.effort.iterations if self.effort.decay else 1
        self.adam.param_groups[0]["lr"], self.x.grad = self.effort.lr * share, grad
        self.adam.step()


class Sign:
    """Steps along the sign of the gradient on x = the pixels themselves, held in [0, 1]: Alg. 1 of
    Croce and Hein (2020), `Reliable evaluation of adversarial robustness`, with its constants but
    for the first step, a quarter of the range. Each row has a step size of its own.

    At checkpoints, which come closer, a row goes back to its best iterate and halves its step size
    if fewer than 3/4 of the steps since the last one lowered the loss, or if neither the step size
    nor the best loss changed since then.

    Mean distance of a public descriptor (dlib's, LFW at 150 x 150, 16 pairs, eyeglasses, one start)
    after 30 and 80 passes: 0.474, 0.437; PGD with constant steps, the best of 4, 8, 16 and 32 of
    255: 0.522, 0.482; Adam at the demo's rate 0.552, 0.498, at the paper's 0.684, 0.595.
    """

    def __init__(self, w: Tensor, start: Tensor, effort: Effort, every: int) -> None:
        scored = effort.iterations / every
        shares = 0.22, 0.03, 0.06  # until the first checkpoint, less each time, at least
        self.wait, self.less, self.least = (max(1, int(share * scored)) for share in shares)
        self.x = self.before = tanh_perturb(w, start)
        self.best = torch.stack([self.x, torch.zeros_like(self.x)])  # (2, N, C, P): x, gradient
        self.size = torch.full_like(start[:, :1, :1], 0.25)
        self.last = start.new_full((len(start),), -torch.inf)
        self.halved = torch.ones_like(self.last, dtype=torch.bool)
        self.tally, self.seen = torch.zeros_like(self.best[:, :, 0, 0]), -1  # (2, N): lower, best

    def patch(self, x: Tensor) -> Tensor:
        return x

    def step(self, step: int, grad: Tensor, loss: Tensor | None, better: Tensor) -> None:
        """grad (N, C, P) at x; loss (N,), None if x was not scored; better (N,): x is the best and
        its gradient is known."""
        if loss is not None:
            grad = self.check(grad, loss, better)
        z = (self.x - self.size * grad.sign()).clamp(0, 1)
        moved = self.x + 0.75 * (z - self.x) + 0.25 * (self.x - self.before)
        self.before, self.x = self.x, moved.clamp(0, 1)

    def check(self, grad: Tensor, loss: Tensor, better: Tensor) -> Tensor:
        """The gradient to step along: at a checkpoint that of the best iterate, where x is it."""
        now = torch.stack([self.x, grad])
        self.best = torch.where(better[:, None, None], now, self.best)
        self.tally += torch.stack([loss < self.last, better])
        self.last, self.seen = loss, self.seen + 1
        if self.seen < self.wait:
            return grad
        lower, found = self.tally
        halve = (lower < 0.75 * self.wait) | (~self.halved & (found == 0))
        back = halve[:, None, None]
        self.size = torch.where(back, self.size / 2, self.size)
        self.x, grad = torch.where(back, self.best, now)
        self.before = torch.where(back, self.x, self.before)  # without the momentum of before
        self.halved, self.tally = halve, torch.zeros_like(self.tally)
        self.seen, self.wait = 0, max(self.wait - self.less, self.least)
        return grad


OPTIMISERS: dict[str, Any] = {"adam": Adam, "sign": Sign}


def losses(
    batches: Sequence[Batch],
    patch_of: Callable[[Tensor], Tensor],
    x: Tensor,
    sign: int,
    transforms: Tensor | None,
    grad: Tensor | None,
) -> Tensor:
    """x (N, C, P) for the N images of one batch, or (1, C, P) for all -> (N or 1,).

    grad: where to add the gradient for x; without it none is computed.
    """
    total, found = sum(len(batch.images) for batch in batches), []
    shared = len(x) < total
    for batch in batches:
        with torch.set_grad_enabled(grad is not None):
            leaf = x.detach().requires_grad_(grad is not None)
            # App. C: batch.features pastes the patch into the images
            patch = patch_of(leaf).expand(len(batch.images), -1, -1)
            loss = sign * squared_distance(batch.features(patch, transforms), batch.anchor)
        if grad is not None:
            grad += torch.autograd.grad(loss.sum(), leaf)[0] / (total if shared else 1)
        found.append(loss.detach())
    return torch.cat(found).mean(0, keepdim=True) if shared else torch.cat(found)


def optimise(
    batches: Sequence[Batch], w: Tensor, start: Tensor, effort: Effort
) -> tuple[Tensor, Tensor, dict[int, Tensor], Tensor]:
    """The optimiser's steps from delta = start (N or 1, C, P), the best iterate of each row kept.

    One batch with a delta for each image, or several that share one: then the mean over all images
    counts; with effort.batch they take turns, and every tenth iterate is scored on all of them.
    Returns the best patch (N, C, P); its loss (N,); the loss (N,) of the iterate after an eighth, a
    quarter, half and all of the iterations; counts (3,) of zero, non-finite and all gradients.
    """
    n, sign = effort.iterations, effort.sign
    # moved once: an iteration waits for nothing
    eot = effort.eot and Eot(*(x.to(start) for x in effort.eot))
    rotate = 0 < effort.batch < sum(len(batch.images) for batch in batches)
    every = 10 if eot or rotate else 1
    marks = {n, *(k - k % every for k in (n // 8, n // 4, n // 2))}
    moving = effort.begin(w, start, every)
    best, curve = moving.x.clone(), {}
    best_loss, counts = start.new_full((len(start),), torch.inf), start.new_zeros(3).long()

    for step in range(n + 1):  # the last iterate is scored without a gradient
        turn = [batches[step % len(batches)]] if rotate else batches
        x, grad = moving.x, torch.zeros_like(best)
        transforms = eot.steps[min(step, n - 1)] if eot else None
        loss = losses(turn, moving.patch, x, sign, transforms, grad if step < n else None)
        lost = ~(loss.isfinite() & grad.isfinite().flatten(1).all(1))
        scored = step % every == 0 or step == n
        if scored:
            if every > 1:
                loss = losses(batches, moving.patch, x, sign, eot and eot.validation, None)
            better = (loss < best_loss) & loss.isfinite()
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better[:, None, None], x, best)
        if step in marks:
            curve[step] = loss
        if step < n:
            zero = ~lost & (grad == 0).flatten(1).all(1)
            counts += torch.stack([zero.sum(), lost.sum(), torch.full_like(zero, 1).sum()])
            grad = torch.where(lost[:, None, None], 0.0, grad)
            moving.step(step, grad, loss if scored else None, better & ~lost)
    return moving.patch(best), best_loss, curve, counts


def draw_start(rows: int, restarts: int, channels: int, pixels: int, generator: Rng) -> Tensor:
    """(restarts, rows, C, P) of U(-0.5, 0.5); restart r does not depend on how many follow it."""
    share = (rows, channels, pixels)
    return torch.stack([torch.rand(share, generator=generator) for _ in range(restarts)]) - 0.5


@torch.inference_mode(False)
def tanh_attack(
    embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, effort: Effort, start: Start = None
) -> Attacked:
    """Attack each image by itself inside its mask, eq. (7) in the form of App. C. Raises ValueError
    for what `accepted` refuses, and for a mask of another size; warns of lost gradients.

    images  (B, C, H, W) in [0, 1]; anchor (B, D) or (D,), features of one view
    mask    (H, W) or (B, H, W) bool
    start   (restarts, B, C, P): first delta, or the generator that draws it; None: seeded with 0
    extra   loss (R, B), the signed squared distance of each restart, the best of which counts;
            by_iterations, by_restarts {n: distance (B,)}
    """
    images, anchor = accepted(embed, images, anchor)
    return warned(attack_each(embed, images, anchor, mask, effort, start))


def attack_each(
    embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, effort: Effort, start: Start
) -> Attacked:
    """`tanh_attack` of what was accepted before."""
    B, C, scorer, each = *images.shape[:2], effort.scorer(embed), torch.arange(len(images))
    pixels = mask_pixels(mask, images)  # (B, P)
    if not pixels.numel():
        return Attacked(images.clone(), score(scorer, images, anchor, effort.chunk))
    if not isinstance(start, Tensor):
        start = torch.Generator().manual_seed(0) if start is None else start
        start = draw_start(B, effort.restarts, C, pixels.shape[1], start)
    R, start = len(start), start.to(images).flatten(0, 1)  # (R * B, C, P)
    w = to_tanh(images.flatten(2).gather(2, pixels[:, None].expand(-1, C, -1)))  # (B, C, P)
    rows, runs = effort.rows(embed), list[Any]()
    with effort.iterating(embed, images.device):
        for i, part in zip(each.repeat(R).split(rows), start.split(rows)):
            some = images[i], anchor[i], pixels[i]
            batch = Batch.of(embed, *some, whole=effort.eot is not None)
            runs.append(optimise([batch], w[i], part, effort))
    patch, loss = (torch.cat([run[k] for run in runs]).unflatten(0, (R, B)) for k in (0, 1))
    by_restarts, each = {}, each.to(images.device)
    # measured on the images, not taken from the loop's losses: a wrong choice would show
    for n in range(1, R + 1):
        winner = lowest(loss[:n])
        attacked = paste(images, patch[winner, each], pixels)
        by_restarts[n] = score(scorer, attacked, anchor, effort.chunk)
    curve = {n: torch.cat([run[2][n] for run in runs]).view(R, B)[winner, each] for n in runs[0][2]}
    counts = torch.stack([run[3] for run in runs]).sum(0).tolist()
    found = Attacked(attacked, by_restarts[R], *counts)
    found.extra = {"loss": loss, "by_restarts": by_restarts, "by_iterations": roots(curve)}
    return found


def warned(found: Attacked) -> Attacked:
    """The same; a warning says where gradients were lost."""
    import warnings

    if found.zero_gradients or found.nonfinite:
        lost = f"{found.zero_gradients} zero and {found.nonfinite} non-finite"
        told = f"{lost} of {found.gradients} gradients: the attack could not follow them"
        warnings.warn(f"{told}, its distances do not show robustness", stacklevel=4)
    return found


def roots(curve: dict[int, Tensor]) -> dict[int, Tensor]:
    """Signed squared distances to distances."""
    return {n: loss.abs().sqrt() for n, loss in curve.items()}


# Square with a search for its place, Sec. 3, App. C


def location_search(
    embed: Embed, images: Tensor, anchor: Tensor, places: Places, search: Effort, generator: Rng
) -> tuple[Tensor, Attacked]:
    """A short attack by a square at each place, on images that were accepted before: distances
    (B, K), and all of them as one attack.

    Only the square's window is recomputed, where the embedding's layers can be followed.
    """
    (B, C, H, W), K = images.shape, len(places)
    fits = search.chunk - search.chunk % (K * views_of(embed))  # all places of some images
    masks = squares(places, H, W)
    start = draw_start(B * K, 1, C, int(masks[0].sum()), generator)
    images, anchor = (x.repeat_interleave(K, 0) for x in (images, anchor.expand(B, -1)))
    search = search._replace(chunk=fits or search.chunk)
    result = attack_each(embed, images, anchor, masks.repeat(B, 1, 1), search, start)
    return result.distance.view(B, K), result


@torch.inference_mode(False)
def square_attack(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    places: Places,
    effort: Effort,
    search: Effort,
    generator: Rng,
) -> Attacked:
    """`location_search`, then `tanh_attack` from a new start at the best place of each image;
    extra: row, col (B,)."""
    images, anchor = accepted(embed, images, anchor)
    found, searched = location_search(embed, images, anchor, places, search, generator)
    best = torch.tensor(places)[lowest(effort.sign * found, 1).cpu()]  # (B, 2)
    mask = squares(best.tolist(), *images.shape[2:])
    result = attack_each(embed, images, anchor, mask, effort, generator)
    count(result, searched)
    result.mask = mask
    result.extra |= {"row": best[:, 0], "col": best[:, 1]}
    return warned(result)


def count(total: Attacked, part: Attacked) -> None:
    """Add the part's counters to the total's."""
    for key in COUNTERS:
        setattr(total, key, getattr(total, key) + getattr(part, key))


# Universal eye patch, Sec. 3, App. C


@torch.inference_mode(False)
def universal_patch(
    embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, effort: Effort, generator: Rng
) -> tuple[Tensor, Attacked]:
    """One pattern that replaces the masked pixels of every image, for the lowest mean squared
    distance to the anchor.

    images (B, C, H, W): the training intruders, which alone decide the best iterate; mask (H, W).
    Returns the pattern (C, P) in [0, 1] and the patched training images. Raises ValueError without
    images.
    """
    images, anchor = accepted(embed, images, anchor)
    B, C = images.shape[:2]
    if not B:
        raise ValueError("images: none to train the universal patch on")
    pixels = mask_pixels(mask, images)
    start = draw_start(1, 1, C, pixels.shape[1], generator)[0].to(images)
    rows = min(effort.rows(embed), effort.batch or B)
    parts = zip(images.split(rows), anchor.split(rows), pixels.split(rows))
    w = torch.zeros_like(start)  # not a face's: the pattern is the same on all
    with effort.iterating(embed, images.device):
        batches = [Batch.of(embed, *part, whole=effort.eot is not None) for part in parts]
        pattern, _, curve, counts = optimise(batches, w, start, effort)
    patched = apply_pattern(images, pattern[0], mask)
    distance = score(effort.scorer(embed), patched, anchor, effort.chunk)
    found = Attacked(patched, distance, *counts.tolist())
    found.extra = {"by_iterations": roots(curve)}
    return pattern[0], warned(found)


def apply_pattern(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """images (B, C, H, W), the pixels of mask (H, W) replaced by pattern (C, P) or (B, C, P)."""
    pattern = pattern.to(images).expand(len(images), -1, -1)
    return paste(images, pattern, mask_pixels(mask, images))


# Random perturbations, App. B.2


def random_patterns(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    mask: Tensor,
    patterns: int,
    generator: Rng,
    chunk: int = 256,
) -> Attacked:
    """For each image the closest of so many uniform random fillings of the mask: no gradient."""
    images, anchor = accepted(embed, images, anchor)
    C, P, lost, attacked = images.shape[1], mask_pixels(mask, images).shape[1], 0, images.clone()
    for i, image in enumerate(images):
        values = torch.rand(patterns, C, P, generator=generator).to(images)
        found = []
        for part in values.split(chunk):
            filled = apply_pattern(image.expand(len(part), -1, -1, -1), part, mask)
            found.append(score(embed, filled, anchor[i], chunk))
        distance = torch.cat(found)
        attacked[i] = apply_pattern(image[None], values[lowest(distance)], mask)[0]
        lost += int((~distance.isfinite()).sum())
    return Attacked(attacked, score(embed, attacked, anchor, chunk), nonfinite=lost)


def uniform_noise(images: Tensor, amount: float, generator: Rng) -> Tensor:
    """images plus U(-amount, amount) in every pixel, clipped to [0, 1]."""
    images = accepted(None, images)[0]
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    return (images + amount * noise.to(images)).clamp(0, 1)


# Indirect anchor and distal, Sec. 4.4


@torch.inference_mode(False)
def indirect_attack(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    virtual: Tensor,
    mask: Tensor,
    effort: Effort,
    start: Tensor | None = None,
) -> Attacked:
    """Attack the anchor and, from the same start, the features `virtual` (D,) of the autoencoded
    target; both are scored by the distance to the true anchor, the closer one is kept for each
    image; extra: direct, indirect (B,)."""
    images, anchor, virtual = accepted(embed, images, anchor, virtual)
    direct = attack_each(embed, images, anchor, mask, effort, start)
    indirect = attack_each(embed, images, virtual, mask, effort, start)
    indirect.distance = score(embed, indirect.images, anchor, effort.chunk)
    result = worst(direct, indirect)
    result.extra = {"direct": direct.distance, "indirect": indirect.distance}
    return warned(result)


@torch.inference_mode(False)
def distal_attack(
    embed: Embed, shape: Sequence[int], anchor: Tensor, effort: Effort, generator: Rng
) -> Attacked:
    """Images of this shape (B, C, H, W), all pixels free, from noise to the anchor; Fig. 4."""
    noise = torch.rand(tuple(shape), generator=generator).to(anchor)
    noise, anchor = accepted(embed, noise, anchor)
    mask = torch.ones(tuple(shape)[2:], dtype=torch.bool)
    return warned(attack_each(embed, noise, anchor, mask, effort, generator))


def worst(*results: Attacked) -> Attacked:
    """Of several attacks on the same images, for each image the one that came closest; counters are
    summed; extra: strongest (B,), which.

    A defender has to meet the nearest of both optimisers:
    worst(*(tanh_attack(..., Effort(optimiser=name)) for name in ("adam", "sign")))
    """
    distance = torch.stack([result.distance for result in results])  # (A, B)
    strongest, each = lowest(distance), torch.arange(distance.shape[1], device=distance.device)
    images = torch.stack([result.images for result in results])[strongest, each]
    best = Attacked(images, distance[strongest, each], extra={"strongest": strongest})
    for result in results:
        count(best, result)
    return best


# A certificate: no patch, whatever it shows and wherever it sits (not in the paper)

Size = int | tuple[int, int]  # a side, or height and width, pixels


class Cover(NamedTuple):
    """What the rule hides, and which of it holds which place of a patch."""

    masks: Tensor  # (K, H, W) bool
    holds: Tensor  # (L, K) bool: mask k hides all of place l
    corners: Tensor | None = None  # (K, 2) = (top, left) of masks that are rectangles of one size
    mask: tuple[int, int] | None = None  # height and width of these
    patch: tuple[int, int] | None = None  # and of the patch, whose places are all of the image

    def places(self, place: Tensor) -> Tensor:
        """(N,) -> (N, 2) = (top, left)."""
        columns = self.masks.shape[2] - self.patch[1] + 1
        return torch.stack([place // columns, place % columns], 1)

    def patches_at(self, place: Tensor) -> Tensor:
        """(N, H, W) bool, the patches at these places (N,)."""
        masks = torch.zeros(len(place), *self.masks.shape[1:], dtype=torch.bool)
        for mask, (row, column) in zip(masks, self.places(place).tolist()):
            mask[row : row + self.patch[0], column : column + self.patch[1]] = True
        return masks


def holding(corners: Tensor, mask: Sequence[int], patch: Sequence[int], H: int, W: int) -> Tensor:
    """(L, K) bool: a rectangle of height and width mask from corner (K, 2) holds a patch of height
    and width patch at place l, row by row."""
    places = torch.cartesian_prod(torch.arange(H - patch[0] + 1), torch.arange(W - patch[1] + 1))
    further = places[:, None] - corners  # (L, K, 2)
    return ((further >= 0) & (further <= torch.tensor(mask) - torch.tensor(patch))).all(2)


def cover(height: int, width: int, patch: Size = 10, mask: Size = 12) -> Cover:
    """Rectangles at stride mask - patch + 1 both ways, flush edges included: each of the
    (height - patch + 1) x (width - patch + 1) places of a patch lies inside at least one.

    Raises ValueError unless the mask is larger than the patch and fits the image.
    """
    (ph, pw), (mh, mw) = ((s, s) if isinstance(s, int) else s for s in (patch, mask))
    if not (1 <= ph < mh <= height and 1 <= pw < mw <= width):
        told = f"a mask of {mh}x{mw} against a patch of {ph}x{pw} in {height}x{width}"
        raise ValueError(f"{told}: the mask must be larger than the patch and fit the image")
    rows, columns = (
        torch.tensor(sorted({*range(0, n - m, m - p + 1), n - m}))
        for n, p, m in ((height, ph, mh), (width, pw, mw))
    )
    corners = torch.cartesian_prod(rows, columns)
    masks = holding(corners, (mh, mw), (1, 1), height, width).T.reshape(-1, height, width)
    holds = holding(corners, (mh, mw), (ph, pw), height, width)
    return checked(Cover(masks, holds, corners, (mh, mw), (ph, pw)))


def cover_of(masks: Tensor, patches: Tensor) -> Cover:
    """masks (K, H, W) that hide, patches (L, H, W) that an attacker may fill, bool: a threat model
    that is a list of places, as App. C's. Raises ValueError where no mask holds a patch."""
    uncovered = patches.flatten(1).float() @ (~masks).flatten(1).float().T  # (L, K)
    return checked(Cover(masks, uncovered == 0))


def checked(rule: Cover) -> Cover:
    """The cover; ValueError where a place lies inside no mask: the bound would be none."""
    if len(missing := (~rule.holds.any(1)).nonzero()):
        raise ValueError(f"{len(missing)} places of the patch lie inside no mask")
    return rule


def beside(masks: Tensor) -> tuple[Tensor, Tensor]:
    """masks (K, H, W) -> (K, 4, H * W) flat numbers of the pixels outside the mask that come next
    to each pixel, up, left, down and right, itself if outside; and their weights, one over the
    distance, of sum 1; 0 where the image ends before."""
    (K, H, W), numbers, weights = masks.shape, [], []
    each = torch.arange(H * W, device=masks.device).view(1, H, W).expand(K, H, W)
    for back, side in itertools.product((False, True), (1, 2)):
        turned = masks.flip(side) if back else masks
        at = torch.arange(masks.shape[side], device=masks.device).unsqueeze(
            2 - side
        )  # (H, 1), (W,)
        last = torch.where(turned, -1, at).cummax(side).values  # the last one outside so far
        steps, weight = at - last, (last >= 0) / (at - last).clamp(min=1)
        if back:
            steps, weight = -steps.flip(side), weight.flip(side)
        numbers.append((each - steps * (W if side == 1 else 1)).flatten(1).clamp(0, H * W - 1))
        weights.append(weight.flatten(1))
    weight = torch.stack(weights, 1)
    return torch.stack(numbers, 1), weight / weight.sum(1, keepdim=True).clamp(min=1e-6)


class Covered(nn.Module):
    """The rule: cover the image by each mask, judge it by the largest distance to the anchor.

    embed   any, mirrored or not: the mask comes before the mirror
    anchor  (C, H, W), the defender's own clean image; masked: it is covered as the candidate is
    fill    (C, H, W), what covers, the same for all; None: what stands around the mask, the mean of
            the four pixels `beside`. It must not depend on what is covered

    Its features (N, D) of an image are those of the mask that decides, so that their squared
    distance to `self.anchor` (D,) is the squared score: every attack runs on it as on any
    embedding. Raises ValueError for a cover that leaves a place out.
    """

    def __init__(
        self,
        embed: Embed,
        anchor: Tensor,
        rule: Cover,
        fill: Tensor | None = None,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.embed, self.views = embed, views_of(embed) * len(rule.masks)
        self.rule, self.fill = checked(rule), None if fill is None else fill.to(anchor)
        masks = rule.masks.to(anchor.device)
        self.pixels = torch.arange(masks[0].numel(), device=anchor.device).expand(len(masks), -1)
        if rule.mask is not None:
            self.corners = rule.corners.to(anchor.device)
            top, left = self.corners[:, :, None, None].unbind(1)  # (K, 1, 1)
            row, col = (torch.arange(n, device=anchor.device) for n in rule.mask)
            pixels = (top + row[:, None]) * masks.shape[2] + left + col  # (K, h, w)
            self.pixels = pixels.flatten(1)
        index = self.pixels[:, None].expand(-1, 4, -1)  # (K, 4, P)
        self.beside, self.weight = (v.gather(2, index) for v in beside(masks))
        self.masks = masks[:, None]  # (K, 1, H, W)
        plain = embed.embed if isinstance(embed, Mirrored) else embed
        self.anchor = extract(plain, anchor[None])[0]
        several = self.cover(anchor[None])[0] if masked else anchor[None]
        found = extract(plain, several)
        self.anchors = found.expand(len(rule.masks), -1)  # (K, D)

    def hidden(self, image: Tensor, k: Tensor) -> Tensor:
        """Of an image (C, H, W) what masks k (n,) show in place of the pixels (n, C, P)."""
        if self.fill is None:
            near = image.flatten(1)[:, self.beside[k]]  # (C, n, 4, P)
            mean = (near * self.weight[k].to(image)).sum(2).clamp(0, 1)  # 1 + 1e-7 is rounding
            return mean.transpose(0, 1)
        filled = torch.where(self.masks[k], self.fill, image).flatten(2)  # (n, C, H * W)
        return filled.gather(2, self.pixels[k][:, None].expand(-1, len(image), -1))

    def cover(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, C, H, W)."""
        every = torch.arange(len(self.pixels), device=images.device)
        values = [self.hidden(image, every) for image in images]  # (K, C, P) each
        if self.rule.mask is None or images.dtype != torch.float32 or not values:
            several = (x.expand(len(every), -1, -1, -1) for x in images)
            covered = [paste(x, v, self.pixels) for x, v in zip(several, values)]
            return torch.stack(covered) if covered else images[:, None]
        patches = torch.stack(values).unflatten(3, self.rule.mask)
        return place_patches(images, patches, self.corners)

    @torch.no_grad()
    def squared(self, images: Tensor, chunk: int = 256) -> Tensor:
        """Squared distances (N, K) under each mask; one that is no number is taken as 0."""
        found = images.new_zeros(len(images), len(self.masks))
        for n, image in enumerate(images):
            parts = zip(self.cover(image[None])[0].split(chunk), self.anchors.split(chunk))
            found[n] = torch.cat([squared_distance(self.embed(x), a) for x, a in parts])
        return found.nan_to_num(nan=0.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.under(images, self.squared(images.detach()).argmax(1))

    def under(self, images: Tensor, k: Tensor) -> Tensor:
        """Features (N, V * D) of each image under its mask k (N,)."""
        values = torch.cat([self.hidden(image, one[None]) for image, one in zip(images, k)])
        features = self.embed(paste(images, values, self.pixels[k]))
        V = features.shape[1] // self.anchors.shape[1]
        moved = (self.anchor - self.anchors[k]) / math.sqrt(V)  # nothing, unless masked
        return features + torch.cat([moved] * V, 1)


class Certified(NamedTuple):
    """What `certify` knows of N images."""

    score: Tensor  # (N,) under the rule
    bound: Tensor  # (N,) no patch brings the score below it
    place: Tensor  # (N,) where it is that low
    distance: Tensor  # (N, K) under each mask


@torch.no_grad()
def certify(rule: Covered, images: Tensor) -> Certified:
    """Bounds for images (N, C, H, W).

    A patch at place l lies inside every mask k that holds it. Covered by k, the image is what it is
    without the patch: d_k is known. The score is the largest of all d_k, so at least that of these;
    the attacker chooses l, so the bound is the smallest over l. An intruder whose bound is delta or
    more is refused by eq. (1) under the rule, whatever the patch shows. It bounds the rule, not F;
    this photograph, not another pose; one patch of at most that size; and nothing on evasion. F
    must not depend on the rest of the batch: `accepted` refuses one that does, ValueError.
    """
    images, _ = accepted(rule, images, rule.anchor)
    with frozen(rule):
        d = rule.squared(images).sqrt()  # (N, K)
    return Certified(d.amax(1), *floors(d, rule.rule.holds).min(1), d)


def floors(d: Tensor, holds: Tensor) -> Tensor:
    """Distances (N, K), holds (L, K) -> (N, L), the largest that a patch leaves as it is."""
    known = [torch.where(holds.to(d.device), each, -math.inf).amax(1) for each in d]  # (L, K) each
    return torch.stack(known) if known else d.new_empty(0, len(holds))


def bound_of_smaller(rule: Covered, d: Tensor, patch: Sequence[int]) -> Tensor:
    """The bound (N,) of distances (N, K) for a patch (height, width) smaller than the rule's: the
    same masks hold it at more places, so it is no lower."""
    corners, size = rule.rule.corners, rule.rule.masks.shape[1:]
    return floors(d, holding(corners, rule.rule.mask, patch, *size)).amin(1)


def cover_named(name: str, config: Config, height: int, width: int) -> Cover:
    """The cover of `rule` and `rule_attacked`, any place; of `rule_places`, App. C's own places,
    and of `rule_one`, which hides all of these at once (what the others have to beat)."""
    size = height, width
    if name in ("rule", "rule_attacked"):
        patch, mask = (
            (scale(both[0], height), scale(both[-1], width))
            for both in (config.rule_patch, config.rule_mask)
        )
        return cover(*size, patch, mask)
    named = torch.stack([eyeglasses_mask(*size), eye_patch_mask(*size)])
    patches = torch.cat([named, squares(square_positions(5, *size), *size)])
    if name == "rule_one":
        return cover_of(patches.any(0, keepdim=True), patches)
    # each holds all squares from its corner to 6 pixels further both ways, whatever is rounded
    ends = [[(scale(p, n), scale(p + 6, n) + scale(10, n)) for p in (15, 22, 29)] for n in size]
    masks = torch.zeros(9, *size, dtype=torch.bool)
    for mask, ((top, bottom), (left, right)) in zip(masks, itertools.product(*ends)):
        mask[top:bottom, left:right] = True
    return cover_of(torch.cat([named, masks]), patches)


# Every attack by its name


def effort_of(name: str, config: Config) -> Effort:
    """The iterations, learning rate and restarts that an attack of `ATTACKS` runs with."""
    own = config.iterations, config.lr, config.restarts
    if name.endswith("eye_patch"):
        own = config.patch_iterations, config.patch_lr, 1
    elif name == "evasion":
        own = config.evasion_iterations, config.evasion_lr, config.evasion_restarts
    elif name == "rule_attacked":
        own = config.rule_iterations, config.rule_lr, 1
    elif name == "distal":
        own = config.distal_iterations, config.distal_lr, 1
    batch = config.patch_batch if name.endswith("eye_patch") else 0
    direction = "evade" if name == "evasion" else "impersonate"
    effort = Effort(*own, config.decay, config.chunk or 256, batch, direction)
    return effort._replace(optimiser=config.optimiser, precision=config.precision)


def mask_named(name: str, height: int, width: int) -> Tensor:
    """What an attack may change, (H, W) bool; `square` chooses for itself. ValueError for `mask`,
    which is given."""
    if name == "mask":
        raise ValueError("the attack mask needs its mask, (H, W) bool")
    if name in ("noise", "distal"):
        return torch.ones(height, width, dtype=torch.bool)
    own = eye_patch_mask if name.endswith("eye_patch") else eyeglasses_mask
    return own(height, width)


def under_rule(
    name: str, rule: Covered, images: Tensor, effort: Effort, generator: Rng
) -> Attacked:
    """`certify`; for `rule_attacked` also an attack on the rule by a patch at its weakest place.
    extra: bound (B,), those of smaller patches, and row, col (B,) of that place."""
    known, size = certify(rule, images), images.shape[2:]
    result, place = Attacked(images, known.score), known.place.cpu()
    if name == "rule_attacked":
        mask = rule.rule.patches_at(place)
        result = tanh_attack(rule, images, rule.anchor, mask, effort, generator)
        result.mask = mask
    result.extra["bound"] = known.bound
    if rule.rule.patch is not None:
        result.extra |= dict(zip(("row", "col"), rule.rule.places(place).T))
        for side in (s for s in SMALLER if s < min(rule.rule.patch) * 64 / min(size)):
            smaller = [max(1, scale(side, n)) for n in size]
            result.extra[f"bound_{side}"] = bound_of_smaller(rule, known.distance, smaller)
    return result


def run_attack(
    name: str,
    config: Config,
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    generator: Rng,
    **given: Tensor,
) -> Attacked:
    """One attack of `ATTACKS`; ValueError for another name.

    images    (B, C, H, W): the intruders, or for evasion the target's own; anchor (D,)
    given     what some attacks need: `training`, the universal patch's intruders; `mask` (H, W)
              bool; `virtual` (D,), features of the autoencoded target, for `indirect`
    For the four of the rule embed is `Covered`, and anchor its own.
    """
    images, (_, C, H, W) = accepted(None, images, anchor)[0], images.shape
    training, virtual = given.get("training"), given.get("virtual")
    mask = given["mask"] if "mask" in given else mask_named(name, H, W)
    effort, pattern, scorer = effort_of(name, config), None, embed
    if name.startswith("eot_"):
        effort = effort._replace(eot=draw_eot(effort.iterations, config, generator))
        # fresh: the attack sees none of them
        scorer = Transformed(embed, draw_transforms(config.eot_tests, config, generator))
    result = Attacked(images, images.new_empty(0))
    if name in ("eyeglasses", "eot_eyeglasses", "evasion", "mask"):
        result = tanh_attack(embed, images, anchor, mask, effort, generator)
    elif name == "square":
        places = square_positions(config.square_stride, H, W)
        short = config.square_search_iterations, config.square_search_lr
        search = Effort(*short, chunk=effort.chunk, optimiser=config.optimiser)
        search = search._replace(precision=config.precision)
        result = square_attack(embed, images, anchor, places, effort, search, generator)
    elif name in ("eye_patch", "eot_eye_patch") and training is not None:
        pattern, result = universal_patch(embed, training, anchor, mask, effort, generator)
        result.extra["pattern"] = pattern.view(C, int(mask.any(1).sum()), -1)
    elif name == "grey_eye_patch":  # the control: what hiding the eyes does by itself
        pattern = images.new_full((C, int(mask.sum())), 0.5)
    elif name == "random_eyeglasses":
        how_many = config.patterns, generator, effort.chunk
        result = random_patterns(embed, images, anchor, mask, *how_many)
    elif name == "noise":
        result.images = uniform_noise(images, config.noise, generator)
    elif name == "indirect" and virtual is not None:
        start = draw_start(len(images), effort.restarts, C, int(mask.sum()), generator)
        result = indirect_attack(embed, images, anchor, virtual, mask, effort, start)
    elif name == "distal":
        result = distal_attack(embed, (1, *images.shape[1:]), anchor, effort, generator)
    elif name.startswith("rule") and isinstance(embed, Covered):
        result = under_rule(name, embed, images, effort, generator)
    elif name != "clean":
        raise ValueError(f"no such attack {name!r}, or it lacks its images: {', '.join(ATTACKS)}")
    if pattern is not None:
        result.images = apply_pattern(images, pattern, mask)
    # 8 bits, as a picture keeps them; those of F are the paper's, of floats
    if saved := bool(config.model) and result.images is not images:
        result.images = (result.images * 255).round() / 255
    if saved or pattern is not None or effort.eot or name in ("clean", "noise"):
        result.distance = distances(scorer, result.images, anchor, effort.chunk)
    result.mask = mask if result.mask is None else result.mask
    return result


def choose_intruders(
    person: Tensor,
    target: int,
    near: Sequence[int],
    far: Sequence[int],
    tests: int,
    training: int,
    generator: Rng,
) -> tuple[list[int], list[int]]:
    """Image indices of other persons, for attack or comparison and for the universal patch.

    person (n,): of each image. The first `tests`, of near persons before far ones, are attacked or
    compared; the patch is trained on `training` others, of far persons first, so as not to have
    seen the tested persons.
    """

    def shuffled(persons: Sequence[int]) -> list[int]:
        chosen = torch.tensor([p for p in persons if p != target], dtype=torch.long)
        images = torch.isin(person, chosen).nonzero().flatten()
        return images[torch.randperm(len(images), generator=generator)].tolist()

    first, second = shuffled(near), shuffled(far)
    tested = (first + second)[:tests]
    rest = set(tested)
    return tested, [i for i in second + first if i not in rest][:training]


# main

# what changes no number, or says only which rows to make
NOT_SETTINGS = ("method", "attacks", "chunk", "model", "judge", "mask")
# a short attack made twice tells whether this machine repeats itself
RESTARTS = ("restarts", "evasion_restarts", "square_search_iterations")
SHORT = ("iterations", "patterns", "patch_iterations", "evasion_iterations", "distal_iterations")
SHORT += ("rule_iterations",)
RULES = ("rule", "rule_places", "rule_one")  # attacks with a threshold of their own


class Judged(NamedTuple):
    """Who is judged: persons of `faces` (data.Faces), by index."""

    faces: Any
    targets: list[int]  # impersonated
    near: list[int]  # whose images attack first
    far: list[int]  # whose images the universal patch is trained on first
    folder: str  # of the rows


def stable_generator(*parts: object) -> torch.Generator:
    """A generator seeded from these values alone, the same on every machine."""
    import hashlib

    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def parse(argv: Sequence[str] | None):
    """Config, flags and what run.json says ({} with --model). Raises run.UsageError."""
    from data import run

    def about(args: Any) -> dict:
        if getattr(args, "model", ""):
            return {"preset": "model", "seed": 0}
        if not args.run:
            import embed

            args.run, _ = embed.shipped_run()
        folder = args.run
        if not folder.is_dir():
            told = "no such folder: give the folder that embed.py wrote, or --model"
            raise run.UsageError(f"--run {folder}: {told}")
        held = run.read_json(folder / "run.json", "give the --run folder of a training")
        kinds = {"data": str, "root": str, "crop": str, "preset": str, "seed": int, "options": dict}
        for key, kind in kinds.items():
            if not isinstance(held.setdefault(key, None if key == "data" else kind()), kind):
                told = f"{key} is {held[key]!r}, not what embed.py wrote"
                raise run.UsageError(f"{folder / 'run.json'}: {told}: run embed.py again")
        return held

    def own_preset(args) -> str:
        held = about(args)["preset"]
        return held if held in PRESETS else "demo"

    largest = run.LARGEST
    choices: dict[str, tuple] = {"attacks": tuple(ATTACKS), "defences": tuple(DEFENCES)}
    choices |= {"seed": (-1, largest), "min_images": (2, largest), "size": (32, 256)}
    choices |= dict.fromkeys(("chunk", "patch_batch", "target_images"), (0, largest))
    choices |= {"rule_fill": ("around", "mean", "noise"), "rule_anchor": ("whole", "masked")}
    choices |= {"optimiser": ("adam", "sign"), "precision": PRECISIONS}
    choices |= {"person_folder": ("", "first", "last"), "distance": ("euclidean", "cosine")}
    told = "Attack a trained embedding (Sec. 3, 4, App. B.2, C), or your own --model: its NAME "
    told += "takes images, float (N, 3, size, size) in [0, 1], and gives features (N, D) - a "
    told += "function, a Module - or takes nothing and returns such a thing."
    config, args = run.parse(Config, PRESETS, argv, told, choices, own_preset)
    try:
        cover_named("rule", config, config.size, config.size)
    except ValueError as error:
        raise run.UsageError(f"--rule-patch, --rule-mask: {error}") from None
    held = about(args)
    config = dataclasses.replace(config, seed=held["seed"] if config.seed < 0 else config.seed)
    if config.person_folder and not config.data:
        raise run.UsageError("--person-folder: it is that of --data folder")
    if not config.model and (config.size, config.distance) != (Config.size, Config.distance):
        told = f"--size {config.size} --distance {config.distance}"
        raise run.UsageError(f"{told}: these are --model's; F takes {Config.size}, euclidean")
    if config.judge and not config.model:
        raise run.UsageError("--judge: it is a second model beside --model")
    if config.model:
        config, args = of_model(config, args)
    if config.mask:
        read_mask(config)
        config = dataclasses.replace(config, attacks=(*config.attacks, "mask"))
    return config, args, held


def read_mask(config: Config) -> Tensor:
    """--mask as (size, size) bool, True where a patch may be. Raises run.UsageError."""
    import data
    from data import run

    white = data.load_image(config.mask, crop="none", size=config.size).float().mean(0) > 127
    if white.all() or not white.any():
        told = "paint white what a patch may change, all else black"
        raise run.UsageError(f"--mask {config.mask}: it is of one colour: {told}")
    return white


def of_model(config: Config, args: Any) -> tuple[Config, Any]:
    """What --model makes of the flags. Raises run.UsageError."""
    from data import model, run

    flag = f"--model {config.model}"
    if not config.data:
        raise run.UsageError(f"{flag}: give --data folder --root PHOTOS, a folder a person")
    if config.method != Config.method:
        raise run.UsageError(f"{flag} --method: the methods are those of a trained run")
    if not hasattr(args, "attacks"):
        config = dataclasses.replace(config, attacks=PRESETS["model"]["attacks"])
    elif config.attacks == ATTACKS:
        attacks = tuple(name for name in ATTACKS if name != "indirect")
        config = dataclasses.replace(config, attacks=attacks)
    names = [model.model_name(text) for text in (config.model, config.judge)]
    if names[0] == names[1]:
        told = (
            f"its rows would be called {names[0]}, as those of --model: give its file another name"
        )
        raise run.UsageError(f"--judge {config.judge}: {told}")
    if "indirect" in config.attacks:
        raise run.UsageError(f"{flag} --attacks indirect: it needs the generator of a run")
    photographs = Path(config.root).resolve().name if config.root else config.data
    args.run = args.run or Path("runs", f"{photographs}-{names[0]}")
    return config, args


def judged(config: Config, folder: Path, about: dict) -> Judged:
    """The run's own test persons, or those of --data. Raises run.UsageError."""
    import data
    from data import run

    manifest, root = folder / "people.json", config.root or None
    if config.data:
        options: dict[str, Any] = {"size": config.size}
        options["person_folder"] = config.person_folder or None
        faces, seen = data.load(config.data, root, crop=config.crop or None, **options), set()
        if not config.model:
            seen = data.trained_on(manifest, faces)
            if about["crop"] not in ("", faces.crop):  # as they looked in the training
                with contextlib.suppress(run.UsageError):  # a crop that fits none of them
                    again = data.load(config.data, root, crop=about["crop"], **options)
                    seen |= data.trained_on(manifest, again)
        others = [p for p, name in enumerate(faces.names) if name not in seen]
        n = faces.person.bincount(minlength=len(faces.names)).tolist()
        near = [p for p in others if n[p] >= config.min_images]
        far = [p for p in others if n[p] < config.min_images]
        told = f"--root {root}: {len(seen)} of {len(n)} persons left out, the embedding was"
        told = f"{told} trained on these persons" if seen else f"--root {root}"
        if not near:
            nobody = f"nobody{' else' * bool(seen)} has {config.min_images} images"
            raise run.UsageError(f"{told}: {nobody}: lower --min-images or add images")
        if len(others) < 2:
            raise run.UsageError(f"{told}: one person alone has no intruders: add persons")
        if seen:
            print(told, flush=True)
        rows = f"attacks-{Path(root).resolve().name if root else config.data}"
        rows = "attacks" if config.model else rows
    else:
        options = {"crop": about["crop"] or None, **about["options"]}
        options["person_folder"] = about.get("person_folder") or None
        faces = data.load(about["data"], root or about["root"] or None, **options)
        split = data.read_manifest(manifest, faces)
        near, far, rows = list(split.target), list(split.validation), "attacks"
    by_name = [stable_generator(config.seed, faces.names[p]).initial_seed() for p in near]
    drawn = [p for _, p in sorted(zip(by_name, near))]
    return Judged(faces, sorted(drawn[: config.targets]), near, far, rows)


def asked(config: Config, people: Judged) -> str:
    """The first line about --model: size, crop, persons, pairs, effort."""
    faces, effort = people.faces, effort_of("eyeglasses", config)
    n = faces.person.bincount()
    pairs = sum(min(config.intruders, len(faces) - int(n[p])) for p in people.targets)
    told = f"{config.size} x {config.size}, crop {faces.crop or 'none'}, {len(people.targets)} "
    told += f"targets of {len(n)} persons, {pairs} pairs, preset {config.preset}: "
    told += f"{effort.iterations} iterations x {effort.restarts}, {effort.optimiser}"
    return f"{told}; nothing is known of the persons that it was trained on"


def attack_model(config: Config, args: Any, device: torch.device) -> int:
    """`python attacks.py --model`: the attacks asked for on it, those of --judge on the second, the
    table, the checks."""
    import embed as embedding
    from data import model, run

    flags = {f"--{k} {v}": v for k in ("model", "judge") if (v := getattr(config, k))}
    print(f"{', '.join(flags)}: runs this Python code with your rights", flush=True)
    loaded = {flag: model.load_model(flag, text, device) for flag, text in flags.items()}
    with run.rank_0_first():
        people = judged(config, args.run, {})
    faces, name = people.faces, model.model_name(config.model)
    for flag, (embed, _) in loaded.items():
        model.check_model(flag, embed, to_float(faces.images[:4].to(device)))
    print(f"{name}: {asked(config, people)}", flush=True)
    some = [*dict.fromkeys([*people.targets, *people.near, *people.far])][:30]
    index = [i for p in some for i in (faces.person == p).nonzero().flatten()[:4].tolist()]
    images, person = (x[index].to(device) for x in (faces.images, faces.person))
    cosine = config.distance == "cosine"
    for flag, (embed, _) in loaded.items():
        whose = f"{model.model_name(flags[flag])}: " if config.judge else ""
        clean = model.check_clean(flag, embed, images, person, cosine, config.chunk)
        if run.rank() == 0 and "as given" in clean[-1]:
            picture = args.run / model.model_name(flags[flag]) / "input.png"
            first = [int((faces.person == p).nonzero()[0]) for p in people.near[:6]]
            model.picture_for(picture, faces.images[first])
            clean[-1] += f": look at {picture}, what the model got"
        print(*(f"{whose}{line}" for line in clean), sep="\n", flush=True)
    source: Any = (None, "")
    for flag, (embed, file) in loaded.items():
        out = args.run / model.model_name(flags[flag])
        settings = settings_of(config, people) | {"embedding": model.fingerprint(embed, file)}
        embed = model.Cosine(embed) if cosine else embed
        about = {"config": settings, "seed": config.seed, "data": faces.data, "model": flags[flag]}
        about |= run.record(device)
        if source[0] is not None:
            config = dataclasses.replace(config, attacks=("clean", "eyeglasses", "transfer"))
        more = about, args.overwrite, device, source
        with model.of_the_user(flag):
            attack_method(config, embed, people, out / people.folder, *more)
        # what `embed.py --verify --model` needs to ask it
        result = {k: settings[k] for k in ("embedding", "size", "distance")} | {"crop": faces.crop}
        result |= {"persons": len(some), "data": faces.data}
        result["threshold"] = embedding.genuine_threshold(embed, images, person)
        if run.rank() == 0:
            run.write(out / "result.json", result)
        source = embed, settings["embedding"]
    if run.rank():
        return 0
    # what needs rows of its own
    drawn = {"intruders": "eyeglasses", "7": "square", "places": "rule"}
    there = {path.stem for path in (args.run / name / people.folder).glob("*.csv")}
    figures = ["6", "roc", *(k for k, attack in drawn.items() if attack in there)]
    return run.then("metrics", ["--run", str(args.run), "--figures", *figures])


def autoencode(path: Path, images: Tensor) -> Tensor:
    """The generator's reconstruction of the images (Sec. 4.4)."""
    import generator
    from data import run

    try:
        lord, _ = generator.load_generator(path, images.device)
    except run.UsageError as error:
        told = f"--attacks indirect needs the run's generator: {error}"
        raise run.UsageError(told) from None
    with torch.no_grad():
        return lord(images).clamp(0, 1)


def attack_target(
    config: Config,
    name: str,
    embed: Embed,
    people: Judged,
    person: int,
    lord: Path,
    source: Embed | None,
    device: torch.device,
) -> tuple[dict, dict]:
    """One attack on one target under each defence asked for: rows with counters, and example
    images. They depend on the seed and the target's name, not on which others are attacked, or
    where. lord: the file of the run's generator; source: what `transfer` is made on."""
    import time

    from data import run

    began, faces, judged = time.monotonic(), people.faces, person in people.targets
    target = faces.names[person]

    def load(index: Sequence[int]) -> Tensor:
        return to_float(faces.images[list(index)].to(device))

    tests = max(config.clean_intruders, config.intruders) if name == "clean" else config.intruders
    drawn = stable_generator(config.seed, target, "intruders")
    sizes = tests, config.patch_train, drawn
    tested, training = choose_intruders(faces.person, person, people.near, people.far, *sizes)
    if not tested or (name in ("eye_patch", "eot_eye_patch") and not training):
        told = f"too few images of persons other than {target}: add persons, or lower it"
        raise run.UsageError(f"--intruders {config.intruders}: {told}")
    own = (faces.person == person).nonzero().flatten().tolist()
    own = own[: config.target_images or None]
    features = extract(embed, load(own), config.chunk)
    part: dict = {"rows": []} | dict.fromkeys(COUNTERS, 0)
    part |= {"outside_mask_max": 0.0, "by_iterations": {}, "by_restarts": {}}
    for mirroring, selection in (DEFENCES[defence] for defence in config.defences):
        best = select_anchor(features) if selection else 0
        genuine = [i for i in own if i != own[best]]
        others = {"clean": genuine + tested, "noise": genuine + tested, "evasion": genuine}
        others["rule_attacked"] = tested[: config.rule_intruders]
        others |= dict.fromkeys(RULES, genuine + tested * judged)
        candidates = others.get(name, tested)
        judge = Mirrored(embed) if mirroring else embed
        inputs: dict[str, Any] = {"embed": judge, "anchor": features[best]}
        if name.startswith("rule"):
            anchor = load([own[best]])[0]
            fill = fill_of(config.rule_fill, people, anchor)
            rule = cover_named(name, config, *anchor.shape[1:])
            judge = Covered(judge, anchor, rule, fill, config.rule_anchor == "masked")
            inputs = {"embed": judge, "anchor": judge.anchor}
        if name.endswith("eye_patch"):
            inputs["training"] = load(training)
        if name == "indirect":
            virtual = autoencode(lord, load([own[best]]))
            inputs["virtual"] = extract(embed, virtual, config.chunk)[0]
        if name == "mask":
            inputs["mask"] = read_mask(config)
        made = "eyeglasses" if name == "transfer" else name
        if name == "transfer" and source is not None:
            there = extract(source, load([own[best]]))[0]
            inputs = {"embed": Mirrored(source) if mirroring else source, "anchor": there}
        seeds = config.seed, target, "eyeglasses" if name == "indirect" else made
        attack: Any = functools.partial(run_attack, made, **inputs)
        images = load(candidates)
        result = attack(config, images=images, generator=stable_generator(*seeds))
        if person == people.targets[0] and "reproducible" not in part and name != "clean":
            less: dict[str, Any] = dict.fromkeys(RESTARTS, 1) | dict.fromkeys(SHORT, 5)
            short = dataclasses.replace(config, **less)
            repeats = (stable_generator(*seeds) for _ in range(2))
            one, two = (attack(short, images=images[:2], generator=g).images for g in repeats)
            part["reproducible"] = torch.equal(one, two)
        if name == "transfer":
            result.distance = distances(judge, result.images, features[best], config.chunk)
        if name == "distal":
            candidates, images = [-1], result.images
        mask: Any = result.mask
        outside = ~mask.to(device).expand(len(images), -1, -1)[:, None]
        moved = float(((result.images - images).abs() * outside).max())
        part["outside_mask_max"] = max(part["outside_mask_max"], moved * (name != "clean"))
        for key in COUNTERS:
            part[key] += getattr(result, key)
        for key in ("by_iterations", "by_restarts"):
            for n, distance in result.extra.get(key, {}).items():
                total, several = part[key].get(n, (0.0, 0))
                part[key][n] = (total + float(distance.sum()), several + len(distance))
        more = ["row", "col", "direct", "indirect", "bound", *(f"bound_{s}" for s in SMALLER)]
        more = [key for key in more if key in result.extra]
        columns = [result.extra[key].tolist() for key in more]
        for candidate, distance, *values in zip(candidates, result.distance.tolist(), *columns):
            other = faces.names[int(faces.person[candidate])] if candidate >= 0 else ""
            role = "genuine" if other == target else "intruder"
            role = role if judged else "validation"
            row = [name, mirroring, selection, config.seed, target, own[best], candidate, other]
            part["rows"].append([*row, role, distance, *values])
    shown = {"anchor": load([own[best]])[0], "clean": images[:4], "attacked": result.images[:4]}
    shown |= {key: result.extra[key] for key in ("pattern",) if key in result.extra}
    shown |= {"fill": fill} if name in RULES and fill is not None else {}
    arrays = {k: (v * 255).round().to(torch.uint8).cpu().numpy() for k, v in shown.items()}
    arrays |= {"candidate": candidates[:4], "distance": result.distance[:4].cpu().numpy()}
    arrays["mask"] = (mask if mask.dim() == 2 else mask[0]).cpu().numpy()
    part |= {"header": [*COLUMNS, *more], "seconds": time.monotonic() - began}
    return part, arrays if name != "clean" and judged else {}


def fill_of(name: str, people: Judged, like: Tensor) -> Tensor | None:
    """What the certificate's masks show, (C, H, W): the mean of up to 1,000 faces of persons that
    are not targets, or noise as in App. A; None for what is around them. It is fixed before any
    candidate is seen, in 255ths so that it can be stored."""
    if name == "around":
        return None
    if name == "noise":
        drawn = torch.randn(like.shape, generator=stable_generator("fill"))
        fill = (drawn * 0.25 + 0.5).clamp(0, 1)
    else:
        others = torch.isin(people.faces.person, torch.tensor(people.far or people.near))
        fill = to_float(people.faces.images[others][:1000]).mean(0)
    return to_float((fill * 255).round().to(torch.uint8)).to(like)


def threshold_setters(people: Judged, many: int) -> list[int]:
    """So many persons who are not judged, those with the most images, two at least: the genuine
    scores of these set the rule's threshold."""
    n = people.faces.person.bincount(minlength=len(people.faces.names)).tolist()
    others = [p for p in people.far if n[p] > 1 and p not in people.targets]
    return sorted(others, key=lambda p: (-n[p], p))[:many]


def effort_told(name: str, config: Config) -> dict[str, Any]:
    """The iterations and restarts, patterns and training intruders that an attack ran with."""
    if name in ("clean", "noise", "grey_eye_patch"):
        return {}
    if name.startswith("rule"):
        masks = len(cover_named(name, config, 64, 64).masks)
        told = {"masks": masks, "fill": config.rule_fill, "anchor_seen": config.rule_anchor}
        return told | ({"iterations": config.rule_iterations} if name == "rule_attacked" else {})
    if name == "random_eyeglasses":
        return {"patterns": config.patterns}
    effort = effort_of(name, config)
    told = {"iterations": effort.iterations, "restarts": effort.restarts}
    if name.endswith("eye_patch"):
        a_step = config.patch_batch or config.patch_train
        told |= {"training_intruders": config.patch_train, "a_step": a_step}
    if name == "square":
        told["positions"] = len(square_positions(config.square_stride))
        told["search_iterations"] = config.square_search_iterations
    return told


def merge(name: str, table: Path, parts: list[dict], images: dict, about: dict) -> str:
    """Put the targets' parts together as <attack>.csv, .json and .npz; returns the line to print.

    images: of each target's name its example images; about: what goes into the .json.
    """
    import csv
    import io

    import numpy as np

    from data import run

    rows = [row for part in parts for row in part["rows"]]
    if images:
        keys = next(iter(images.values()))
        shown = {key: [part[key] for part in images.values()] for key in keys}
        least = min(len(x) for x in shown["clean"])
        for key in ("clean", "attacked", "candidate", "distance"):
            shown[key] = [x[:least] for x in shown[key]]
        stacked = {"target": np.array([*images])} | {k: np.stack(v) for k, v in shown.items()}
        write = functools.partial(np.savez_compressed, **stacked)
        run.write(table.with_suffix(".npz"), write)
    for target, part in images.items():
        if "pattern" in part:
            to_print(table.with_suffix("") / f"{target}.png", part["pattern"], part["mask"])
    seconds = sum(part["seconds"] for part in parts)
    n_targets = len({row[4] for row in rows if row[8] != "validation"})
    record = {"attack": name, **about, "n": len(rows), "n_targets": n_targets}
    record["seconds"] = round(seconds, 2)
    record["outside_mask_max"] = max(part["outside_mask_max"] for part in parts)
    repeated = [part["reproducible"] for part in parts if "reproducible" in part]
    record["reproducible"] = repeated[0] if repeated else None
    for key in COUNTERS:
        record[key] = sum(part[key] for part in parts)
    for key in ("by_iterations", "by_restarts"):
        sums = {n: [sum(v) for v in zip(*(p[key][n] for p in parts))] for n in parts[0][key]}
        record[key] = {n: total / several for n, (total, several) in sums.items()}
    run.write(table.with_suffix(".json"), record)
    text, short = io.StringIO(), lambda v: f"{v:.7g}" if isinstance(v, float) else v
    lines = [parts[0]["header"], *([short(v) for v in row] for row in rows)]
    csv.writer(text, lineterminator="\n").writerows(lines)
    run.write(table, text.getvalue())
    told = f"{n_targets} targets, {len(rows)} pairs"
    for role in ("genuine", "intruder", "validation"):
        if found := [row[9] for row in rows if row[8] == role]:
            told += f", mean {role} distance {sum(found) / len(found):.3f}"
    return f"{told}, {seconds:.0f} s"


def to_print(path: Path, pattern: Any, mask: Any) -> None:
    """A universal patch, uint8 (3, h, w), as a PNG of the face's size: clear outside its mask."""
    import numpy as np
    from PIL import Image

    from data import run

    picture = np.zeros((*mask.shape, 4), np.uint8)
    picture[mask, :3], picture[mask, 3] = pattern.reshape(3, -1).T, 255
    run.write(path, functools.partial(Image.fromarray(picture).save, format="PNG"))


def finished(table: Path, begun: Path, settings: dict) -> bool:
    """Whether an attack's rows are there under at least the defences asked for.

    begun: the settings of an unfinished one, which then count. Raises run.UsageError where other
    settings were used: for all but fewer defences.
    """
    from data import run

    old = begun if begun.exists() else table.with_suffix(".json")
    if not old.exists() or not (begun.exists() or table.exists()):
        return False
    before = run.read_json(old).get("config")
    if not isinstance(before, dict):
        raise run.UsageError(f"{old}: does not say its settings: use --overwrite")
    done = old != begun
    same = before | ({"defences": settings["defences"]} if done else {})
    if differs := run.differences(same, settings):
        raise run.UsageError(f"{old}: other settings: {differs}: use those again, or --overwrite")
    return done and {*settings["defences"]} <= {*before["defences"]}


def progress(items: list, title: str) -> Iterator:
    """The items, with a bar on a terminal; without tqdm a line each."""
    from data import run

    try:
        from tqdm import tqdm
    except ImportError:
        for done, item in enumerate(items, 1):
            print(f"{title}: target {done} of {len(items)}", flush=True)
            yield item
        return
    yield from tqdm(items, title, unit="target", disable=True if run.rank() else None)


def attack_method(
    config: Config,
    embed: Embed,
    people: Judged,
    out: Path,
    given: dict,
    overwrite: bool,
    device: torch.device,
    source: tuple[Embed, str] = (None, ""),
) -> None:
    """Every attack asked for on one embedding, rows in `out`. A target's part is a file of its own,
    in a hidden folder, until the last is done; torchrun's processes share the targets. source: what
    `transfer` is made on, and its fingerprint."""
    import shutil
    import warnings

    import numpy as np

    from data import run

    for name in config.attacks:
        table, partial = out / f"{name}.csv", out / f".{name}.partial"
        begun, title = partial / "config.json", f"{out.parent.name} {name}"
        own_settings = {"transfer": {"source": source[1]}}
        if name == "mask":
            own_settings["mask"] = {"mask": run.fingerprint(Path(config.mask))}
        about = given | {"config": given["config"] | own_settings.get(name, {})}
        done = not overwrite and finished(table, begun, about["config"])
        goes_on = begun.exists() and not overwrite
        run.barrier()  # every process has looked before rank 0 writes
        if run.rank() == 0 and not goes_on:  # also what was left by a kill while it was removed
            shutil.rmtree(partial, ignore_errors=True)
        if done:
            print(f"{title}: kept, {table} is finished", flush=True)
            continue
        if run.rank() == 0:
            run.write(begun, about)
        run.barrier()
        setters = threshold_setters(people, config.rule_persons) if name in RULES else []
        everyone = people.targets + setters
        files = {p: partial / f"{p}.json" for p in everyone}
        own = everyone[run.rank() :: run.world()]
        for person in progress([p for p in own if not files[p].exists()], title):
            generator = out.parents[1] / "generator.pt"
            with warnings.catch_warnings():  # metrics.py tells of the gradients, once
                warnings.filterwarnings("ignore", ".* of .* gradients")
                sources = generator, source[0]
                part, images = attack_target(config, name, embed, people, person, *sources, device)
            if images:
                write = functools.partial(np.savez_compressed, **images)
                run.write(files[person].with_suffix(".npz"), write)
            run.write(files[person], part)
        run.barrier()
        if run.rank() == 0:
            parts = [run.read_json(file) for file in files.values()]
            images = {}
            for person, file in files.items():
                if (file := file.with_suffix(".npz")).exists():
                    with np.load(file) as held:
                        images[people.faces.names[person]] = dict(held)
            effort = effort_told(name, config)
            line = merge(name, table, parts, images, about | effort)
            told = "".join(f"{v} {k.replace('_', ' ')}, " for k, v in effort.items())
            print(f"{title}: {told}{line}", flush=True)
            begun.unlink()  # from here on the table counts
            shutil.rmtree(partial)


def settings_of(config: Config, people: Judged) -> dict[str, Any]:
    """What must be the same for rows to stand in one file."""
    import hashlib
    import json

    faces = people.faces
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SETTINGS}
    who = json.dumps([faces.names, faces.files, people.targets])
    return settings | {"people": hashlib.sha256(who.encode()).hexdigest()[:16]}


def attack_run(argv: Sequence[str] | None) -> int:
    """`python attacks.py`: the attacks asked for on every embedding of a run, or on --model."""
    import embed as embedding
    from data import run

    config, args, trained = parse(argv)
    device, held = run.start(args.device), args.run / "people.json"
    run.tf32(False)  # reported distances are those of full float32
    chunk = config.chunk or (128 if device.type == "cpu" else 2048)
    precision = run.precision(config.precision, device)
    config = dataclasses.replace(config, chunk=chunk, precision=precision)
    if config.model:
        return attack_model(config, args, device)
    there = sorted(path.parent.name for path in args.run.glob("*/embedding.pt"))
    methods = there if config.method == ("all",) else config.method
    unknown = sorted({*methods} - {*there})
    if unknown or not methods:
        told = f"choose all or some of {', '.join(there) or '(none found)'}"
        raise run.UsageError(f"--method {','.join(unknown) or 'all'}: {told}")
    with run.rank_0_first():
        people = judged(config, args.run, trained)
    settings = settings_of(config, people)
    for method in methods:
        file = args.run / method / "embedding.pt"
        embed, content = embedding.load_embedding(file, device), run.load(file, "embedding")
        persons = "" if config.data else run.read_json(held)["sha256"]
        if persons and content.get("people", persons) != persons:
            told = f"trained on other persons than {held} names: train it again with --overwrite"
            raise run.UsageError(f"{file}: {told}")
        settings["embedding"] = run.fingerprint(file)
        about = {"config": settings, "seed": config.seed, "data": people.faces.data}
        about["trained_in"] = content["config"].get("precision", "float32")
        about |= run.record(device)
        out = args.run / method / people.folder
        attack_method(config, embed, people, out, about, args.overwrite, device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    try:
        from data import run
    except ModuleNotFoundError:
        raise SystemExit("attacks.py: the command needs the folder data/ beside it") from None
    return run.command("attacks.py", attack_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
