"""Attack any callable `embed(images) -> features`: Sec. 3, 4.3, 4.4 and App. B.2, C.

    python attacks.py                                         # the F of data/demo, two CPU cores
    python attacks.py --run runs/synthetic-demo-0                             # a trained one
    python attacks.py --run runs/celeba-paper-0 --attacks all --defences all  # the paper, one GPU
    python attacks.py --run RUN --data folder --root PERSONS --crop lfw       # on other persons
    python attacks.py --model FILE.py:NAME --data folder --root PHOTOS        # any model: yours

In:  people.json, run.json and <method>/embedding.pt of a run; or --model and photographs.
Out: <method>/attacks/<attack>.csv, one row a compared pair, with .json (settings, counters,
     versions) and .npz (example images) beside it; last, the table of metrics.py.

Intruders are images of the other target persons and, if those are too few, of the validation
persons; the universal patch is trained on validation persons first. Nobody who was trained on takes
part. A target's rows are written once it is done; the same command goes on with the next target.

Images are float NCHW in [0, 1]; features are (N, D), or (N, V, D) of V views of each image. A
distance is the root of the squared distance to the anchor's features, of its mean over the views;
the anchor itself is not mirrored (Sec. 4.2).

Measured (demo, rendered faces, one busy x86-64 core): eyeglasses, 80 iterations on 12 intruders for
each of 20 targets, 85 s; the paper's 1000 x 5 took 0.02 of AU-ROC more from the same pairs at most.
The preset paper has not been run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    from kernels.patch_local import local_features
except ImportError:
    # whole images: the same numbers, half the speed
    local_features = None  # type: ignore[assignment]

try:
    from embed import Mirrored, genuine_threshold, load_embedding, squared_distance
except ImportError:

    class Mirrored(nn.Module):  # type: ignore[no-redef]
        """Embed an image and its mirror image: (N, 3, H, W) -> (N, 2, D) (Sec. 4.2)."""

        def __init__(self, embed: Embed) -> None:
            super().__init__()
            self.embed = embed

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([self.embed(images), self.embed(images.flip(-1))], 1)

    def squared_distance(features: Tensor, anchor: Tensor) -> Tensor:
        """Compute ||features - anchor||_2^2 (N,), the mean over the V views of an image."""
        views = features.reshape(len(features), -1, anchor.shape[-1])  # (N, V, D)
        return (views - anchor.unsqueeze(-2)).square().sum(-1).mean(-1)


try:
    import data
    from data import model, run
    from generator import load_generator
except ImportError:
    data = model = run = load_generator = None  # type: ignore[assignment]

Embed = Callable[[Tensor], Tensor]
Rng = torch.Generator
Attack = Literal[
    "clean",
    "eyeglasses",
    "square",
    "eye_patch",
    "random_eyeglasses",
    "noise",
    "evasion",
    "indirect",
    "distal",
    "eot_eyeglasses",
]
ATTACKS = get_args(Attack)
Defence = Literal["basic", "mirroring", "selection", "both"]
DEFENCES = {"basic": (0, 0), "mirroring": (1, 0), "selection": (0, 1), "both": (1, 1)}  # Sec. 4.2
# Fig. 6, rows 24-39 of 64, columns 16-47, bit 31 left-most
EYEGLASSES = (
    "0 0 7ff80ffe f00ff007 e003e003 c003c003 60024002 60024002 "
    "20062006 20042004 20043004 1008100c 18180808 0ff007f0 0 0"
)


@dataclass(frozen=True)
class Config:
    """Hold every setting of the attacks; the defaults are the paper's, a preset replaces some."""

    preset: str = "paper"  # demo | paper | model; the command line takes the run's own
    method: tuple[str, ...] = ("all",)  # not in the paper: attack these methods of the run, or all
    attacks: tuple[Attack, ...] = ("clean", "eyeglasses")  # not in the paper: make these attacks
    defences: tuple[Defence, ...] = ("both",)  # Sec. 4.2: attack through each of these defences
    data: Literal["", "synthetic", "folder", "celeba"] = ""  # not in the paper: other persons
    root: str = ""  # not in the paper: read the images of --data from this folder
    crop: str = ""  # not in the paper: crop the images of --data in this way
    # which folder below root names the person, where photographs lie several folders deep
    person_folder: Literal["", "first", "last"] = ""
    model: str = ""  # not in the paper: attack FILE.py:NAME or package.module:NAME; its code is run
    judge: str = ""  # not in the paper: measure what is made on --model on this second model too
    mask: str = ""  # not in the paper: attack the white pixels of this PNG as well
    size: int = 64  # not in the paper: side of the images that --model takes, in pixels
    distance: Literal["euclidean", "cosine"] = "euclidean"  # not in the paper: of --model
    min_images: int = 10  # Sec. 4: fewest images of a target person
    target_images: int = 0  # not in the paper: use only the first n images of a target (0: all)
    targets: int = 27  # Sec. 4: persons that are impersonated
    intruders: int = 64  # App. C, released code: attacking images for each target
    clean_intruders: int = 200  # not in the paper: un-attacked intruders, the attacked ones first
    seed: int = -1  # not in the paper: seed of every random choice (-1: the run's)
    iterations: int = 1000  # Sec. 4: iterations of each attack that has no number of its own
    optimiser: Literal["adam", "sign"] = "adam"  # Sec. 4: adam; sign, not there, ignores lr, decay
    lr: float = 0.01  # Sec. 4: learning rate of Adam, on delta
    restarts: int = 5  # Sec. 4: random starts, of which the best is kept
    decay: bool = False  # not in the paper: let the learning rate fall linearly to zero
    square_stride: int = 5  # App. C: distance between the places searched, in pixels of 64
    square_search_iterations: int = 20  # App. C: iterations at every place searched
    square_search_lr: float = 0.1  # App. C: learning rate of the search
    patch_train: int = 100  # App. C, Fig. 8: intruders that the universal patch is trained on
    patch_iterations: int = 5000  # App. C: iterations of the universal patch
    patch_lr: float = 0.005  # App. C: learning rate of the universal patch
    patterns: int = 1000  # App. B.2: random eyeglasses that are tried on an intruder
    noise: float = 10 / 255  # App. B.2: largest change of a pixel by uniform noise
    evasion_iterations: int = 2000  # Sec. 4.3, released code: iterations of evasion (dodging)
    evasion_lr: float = 0.05  # Sec. 4.3, released code: learning rate of evasion
    evasion_restarts: int = 5  # Sec. 4.3, released code: random starts of evasion
    distal_iterations: int = 2000  # App. C: iterations of the distal attack
    distal_lr: float = 0.01  # App. C: learning rate of the distal attack
    eot_samples: int = 16  # not in the paper: fixed transforms that eot_eyeglasses attacks under
    eot_tests: int = 16  # not in the paper: fresh transforms that it is measured under
    eot_shift: float = 2.0  # not in the paper: largest shift of a transform, in pixels of 64
    eot_scale: float = 0.05  # not in the paper: its largest change of scale
    eot_rotation: float = 5.0  # not in the paper: its largest rotation, in degrees
    eot_brightness: float = 0.1  # not in the paper: its largest change of brightness
    chunk: int = 0  # not in the paper: images in a pass (0: 128 of 64 x 64 on a CPU, 2048 on a GPU)
    # not in the paper: of the iterations; auto takes bfloat16 where the device multiplies it faster
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


# demo: mean distance on 10 faces, 80 iterations at 0.2 falling to zero against 1000 at 0.01:
# +0.2 % (robust F), -2 % (untrained F)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {"targets": 20, "intruders": 12, "clean_intruders": 60, "patterns": 100}
    | {"iterations": 80, "lr": 0.2, "restarts": 1, "decay": True}
    | {"square_search_iterations": 2, "square_search_lr": 0.3}
    | {"patch_train": 32, "patch_iterations": 40, "patch_lr": 0.2}
    | {"evasion_iterations": 80, "evasion_lr": 0.2, "evasion_restarts": 1}
    | {"distal_iterations": 150, "distal_lr": 0.2, "eot_samples": 3, "eot_tests": 8},
}
# --model's passes are dear: fewer than the demo's, by sign steps, which come closer for as many
PRESETS["model"] = (
    PRESETS["demo"]
    | {"attacks": ("clean", "eyeglasses", "square", "evasion"), "target_images": 12}
    | {"targets": 10, "intruders": 10, "clean_intruders": 40}
    | {"iterations": 30, "evasion_iterations": 30, "optimiser": "sign", "precision": "float32"}
    | {"square_stride": 10, "square_search_iterations": 1}
)


@dataclass(frozen=True)
class Effort:
    """Say how hard an attack tries, and in which direction. Raises ValueError for other values."""

    iterations: int = 1000
    lr: float = 0.01
    restarts: int = 5
    decay: bool = False  # let the learning rate fall linearly to zero
    chunk: int = 128  # images in one pass of the embedding: speed and memory alone
    direction: str = "impersonate"  # lower the distance to the anchor; evade raises it
    optimiser: str = "adam"  # App. C; sign ignores lr and decay
    # bfloat16: of the iterations alone. On the demo's F the mean distance is within 0.2 % of
    # float32's, as after another start; nearer to the anchor than 1 % of the features' norm it
    # comes less near
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("iterations", "restarts", "chunk"):
            if (n := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be 1 or more, not {n}")
        for name, words in (
            ("direction", ("impersonate", "evade")),
            ("optimiser", ("adam", "sign")),
            ("precision", ("float32", "bfloat16")),
        ):
            if (word := getattr(self, name)) not in words:
                raise ValueError(f"{name} must be {' or '.join(words)}, not {word!r}")

    @property
    def sign(self) -> int:
        """Return the sign of the loss, which is minimised."""
        return 1 if self.direction == "impersonate" else -1


@dataclass
class AttackResult:
    """Hold the images that an attack made of B images, and how far they are from the anchor."""

    images: Tensor  # (B, C, H, W)
    distance: Tensor  # (B,) root of the squared distance to the anchor
    zero_gradients: int = 0  # (image, iteration) pairs whose whole gradient was zero
    nonfinite: int = 0  # pairs with a distance or gradient that is not finite, or such patterns
    gradients: int = 0  # (image, iteration) pairs in all
    mask: Tensor | None = None  # (H, W) or (B, H, W) bool: where the images may differ
    extra: dict[str, Tensor] = field(default_factory=dict)  # what one attack adds, see there
    direction: str = "impersonate"  # of its `Effort`: which distances are the better ones

    def add_counts(self, other: AttackResult) -> None:
        """Add the counters of another attack to these."""
        self.zero_gradients += other.zero_gradients
        self.nonfinite += other.nonfinite
        self.gradients += other.gradients

    def warn_if_gradients_lost(self) -> AttackResult:
        """Warn where a gradient was zero or not finite, and return this result."""
        if self.zero_gradients or self.nonfinite:
            warnings.warn(
                f"{self.zero_gradients} zero and {self.nonfinite} non-finite of {self.gradients} "
                "gradients: the attack could not follow them, its distances do not show robustness",
                stacklevel=3,
            )
        return self


# Masks, Fig. 6


def scale(pixels: int, size: int) -> int:
    """Scale pixels of the paper's 64 to an image of another size, halves rounded up."""
    return (2 * pixels * size + 64) // 128


def eyeglasses_mask(height: int = 64, width: int = 64) -> Tensor:
    """Draw the authors' eyeglasses, (height, width) bool: 107 of 64 x 64 pixels, else the nearest
    of these."""
    rows = [[int(word, 16) >> (31 - bit) & 1 for bit in range(32)] for word in EYEGLASSES.split()]
    mask = torch.zeros(1, 1, 64, 64)
    mask[0, 0, 24:40, 16:48] = torch.tensor(rows)
    return F.interpolate(mask, (height, width), mode="nearest-exact")[0, 0].bool()


def eye_patch_mask(height: int = 64, width: int = 64) -> Tensor:
    """Draw a rectangle over the eyes, (height, width) bool: 12 x 32 of 64 x 64 pixels."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[scale(26, height) : scale(38, height), scale(16, width) : scale(48, width)] = True
    return mask


def square_mask(row: int, column: int, height: int = 64, width: int = 64) -> Tensor:
    """Draw a square with its upper left pixel at (row, column), (height, width) bool: 10 x 10 of
    64 x 64 pixels. Raises ValueError where a part of it would lie outside."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    h, w = max(1, scale(10, height)), max(1, scale(10, width))
    if not (0 <= row <= height - h and 0 <= column <= width - w):
        raise ValueError(f"place {(row, column)}: {h} x {w} pixels there leave {height} x {width}")
    mask[row : row + h, column : column + w] = True
    return mask


def square_positions(stride: int = 5, height: int = 64, width: int = 64) -> list[tuple[int, int]]:
    """List the square's places of Fig. 7, flush edge included: 15, 15 + stride, ..., 35 of 64 both
    ways, 25 places at stride 5."""
    starts = sorted({*range(15, 36, stride), 35})
    places = [(scale(r, height), scale(c, width)) for r in starts for c in starts]
    return [*dict.fromkeys(places)]


def mask_pixels(mask: Tensor, images: Tensor) -> Tensor:
    """Compute the flat pixel numbers (N, P) of mask (H, W) or (N, H, W) bool for images
    (N, C, H, W). Raises ValueError for a mask of another size or without a pixel, and where not
    each has equally many."""
    N, _, H, W = images.shape
    if mask.dtype != torch.bool or mask.shape not in ((H, W), (N, H, W)):
        kind = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask: {kind}, wanted bool {(H, W)} or {(N, H, W)}")
    several = mask.to(images.device).expand(N, H, W).flatten(1)  # (N, H W)
    counts = several.sum(1)
    if not several.any() or (counts != counts[0]).any():
        raise ValueError("mask: each image of a batch must have equally many pixels, one at least")
    return several.nonzero()[:, 1].view(N, -1)


def _paste(images: Tensor, values: Tensor, pixels: Tensor) -> Tensor:
    """Replace pixels (N, P), flat numbers, of images (N, C, H, W) by values (N, C, P); all others
    stay as they are, bit for bit."""
    index = pixels[:, None].expand(-1, images.shape[1], -1)  # (N, C, P)
    return images.flatten(2).scatter(2, index, values).view(images.shape)


def apply_pattern(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """Paste a pattern (C, P), or one for each image (N, C, P), under mask (H, W) into images; both
    in [0, 1]. Raises ValueError for others."""
    check_pixels("images", images)
    pixels = mask_pixels(mask, images)
    N, C = images.shape[:2]
    each = C, pixels.shape[1]
    check_pixels("pattern", pattern, each, (1, *each), (N, *each))
    return _paste(images, pattern.to(images).expand(N, -1, -1), pixels)


# What an attack starts from, and the distance that counts


@contextlib.contextmanager
def frozen(embed: Embed) -> Iterator[None]:
    """Put a Module in evaluation mode, without weight gradients, and afterwards back as it was."""
    if not isinstance(embed, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in embed.modules()]
    flags = [(weight, weight.requires_grad) for weight in embed.parameters()]
    try:
        embed.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, flag in flags:
            weight.requires_grad_(flag)


def check_pixels(name: str, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError where x is not a float tensor in [0, 1], of one of these shapes or, without
    one, (N, C, H, W)."""
    dtype = getattr(x, "dtype", type(x).__name__)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: {dtype}, wanted a tensor of float32 or float64")
    if not (x.shape in shapes if shapes else x.dim() == 4 and x.numel()):
        wanted = " or ".join(map(str, shapes)) or "(N, C, H, W)"
        raise ValueError(f"{name}: of shape {tuple(x.shape)}, wanted {wanted}")
    low, high = (float(end) for end in x.detach().aminmax())
    if not (low >= 0 and high <= 1):  # nor NaN
        raise ValueError(f"{name}: values from {low:.4g} to {high:.4g}, wanted [0, 1]")


def check_inputs(embed: Embed, images: Tensor, *anchors: Tensor) -> list[Tensor]:
    """Return images and, for each of them, an anchor (N, D), without gradients.

    Raises ValueError for images that `check_pixels` refuses; anchors that are not finite (D,) or
    (N, D) of one view; an embed that changes its images, or whose features are not finite (N, D) or
    (N, V, D), or differ alone or again by more than a thousandth of their norm (rounding: 2e-6).
    """
    check_pixels("images", images)
    # 16 that differ: with two, chance passed dropped paths in 17 of 30 calls
    k = torch.arange(16, device=images.device)
    ramp = torch.linspace(0, 1, images.shape[3]).to(images)
    share = (k / 16).to(images).view(-1, 1, 1, 1)
    batch = torch.lerp(images[k % len(images)], ramp, share).detach()
    copy = batch.clone()
    with frozen(embed), torch.no_grad():
        answers = embed(copy), embed(batch.clone()), embed(batch[:1].clone())
    for views, n in zip(answers, (16, 16, 1)):
        number = isinstance(views, Tensor) and views.is_floating_point()
        if not number or views.dim() not in (2, 3) or len(views) != n:
            kind = f"{type(views).__name__} {list(getattr(views, 'shape', ()))}"
            raise ValueError(f"embed: gives {kind} for {n} images, wanted ({n}, D) or ({n}, V, D)")
        if not views.isfinite().all():
            raise ValueError("embed: features are not finite")
    if not torch.equal(copy, batch):
        raise ValueError("embed: changes its images in place")
    first, again, alone = (views.flatten(1).float() for views in answers)
    apart = torch.cat([again - first, alone - first[:1]]).norm(dim=1).max()
    if apart > max(1e-3, torch.finfo(answers[0].dtype).eps) * first.norm(dim=1).mean():
        how = "alone and in a batch, or in another call"
        why = "is it in training mode (call model.eval()), random, or does the batch count?"
        raise ValueError(f"embed: answers an image differently {how}: {why}")
    N, D = len(images), answers[0].shape[-1]
    for anchor in anchors:
        kind = tuple(anchor.shape) if isinstance(anchor, Tensor) else type(anchor).__name__
        if kind not in ((D,), (1, D), (N, D)) or not anchor.isfinite().all():
            wanted = f"wanted finite features {(D,)} or {(N, D)} of one view"
            raise ValueError(f"anchor: {kind}, {wanted}")
    return [images.detach(), *(anchor.detach().to(images).expand(N, -1) for anchor in anchors)]


@torch.no_grad()
def distances(embed: Embed, images: Tensor, anchor: Tensor, chunk: int = 128) -> Tensor:
    """Compute the distance (N,) of images (N, C, H, W) to an anchor (N, D) or (D,)."""
    check_pixels("images", images)
    anchor = anchor.to(images).expand(len(images), -1)
    with frozen(embed):
        parts = zip(images.split(chunk), anchor.split(chunk))
        return torch.cat([squared_distance(embed(x), a) for x, a in parts]).sqrt()


@torch.no_grad()
def extract(embed: Embed, images: Tensor, chunk: int = 128) -> Tensor:
    """Compute the features of images (N, C, H, W), uint8 or float in [0, 1]. Raises ValueError for
    what `check_inputs` refuses."""
    check_inputs(embed, to_float(images[:1]))
    with frozen(embed):
        features = torch.cat([embed(to_float(part)) for part in images.split(chunk)])
    return features.to(torch.promote_types(features.dtype, torch.float32))  # half is too narrow


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 into float in [0, 1]; float stays."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def select_anchor(features: Tensor) -> int:
    """Choose, of features (n, D) of one person, the one nearest to the others by the mean squared
    distance (Sec. 4.2), and return its index."""
    # sum_j |f_i - f_j|^2 = n |f_i - mean|^2 + what is the same for all i: memory n D, not n n D
    away = features.double() - features.double().mean(0)
    return int(away.square().sum(-1).argmin())


def lowest(values: Tensor, dim: int = 0) -> Tensor:
    """Return where the smallest finite value is: in an argmin NaN would win."""
    return values.where(values.isfinite(), torch.inf).argmin(dim)


# Eq. (7) in the form of App. C


def tanh_perturb(w: Tensor, delta: Tensor) -> Tensor:
    """Compute the pixels under the mask, in [0, 1] whatever delta is: Adam needs no projection."""
    return (torch.tanh(w + delta) + 1) / 2


try:
    from kernels.tanh_perturb import tanh_perturb  # type: ignore[no-redef,assignment]
except ImportError:
    pass


def patched_features(embed: Embed, images: Tensor, pixels: Tensor) -> Embed:
    """Return the function that gives the features of images (n, C, H, W) with a patch (n, C, P)
    pasted over pixels (n, P)."""
    # what lies around the patch is computed once, where the layers of embed can be followed
    local = local_features and local_features(embed, images, pixels)
    return local or (lambda patch: embed(_paste(images, patch, pixels)))


class SignSteps:
    """Step along the sign of the gradient on the pixels themselves: Alg. 1 (APGD) of Croce and Hein
    (2020), with its constants but for the first step, a quarter of the range. Not in the paper.

    Each row has a step size of its own. At checkpoints, which come closer, a row goes back to its
    best iterate and halves its step size if fewer than 3/4 of the steps since the last one lowered
    the loss, or if neither the step size nor the best loss changed since then.

    Mean distance of a public descriptor (dlib's, LFW at 150 x 150, 16 pairs, eyeglasses, one start)
    after 30 and 80 passes: 0.474, 0.437; PGD with constant steps, the best of 4, 8, 16 and 32 of
    255: 0.522, 0.482; Adam at the demo's rate 0.552, 0.498, at the paper's 0.684, 0.595.
    """

    def __init__(self, x: Tensor, iterations: int) -> None:
        """x (N, C, P): the first iterate."""
        shares = 0.22, 0.03, 0.06  # until the first checkpoint, fewer each time, at least
        self.wait, self.fewer, self.least = (max(1, int(s * iterations)) for s in shares)
        self.steps = -1  # since the last checkpoint; the first iterate is no step
        self.before, self.best, self.best_grad = x, x, torch.zeros_like(x)
        self.size = torch.full_like(x[:, :1, :1], 0.25)
        self.last_loss = torch.full_like(x[:, 0, 0], -torch.inf)
        self.lowered = torch.zeros_like(self.last_loss)
        self.improved, self.halved = self.lowered > 0, self.lowered == 0

    def step(self, x: Tensor, grad: Tensor, loss: Tensor, better: Tensor) -> Tensor:
        """Return the iterate after x (N, C, P), which has this gradient and loss (N,); better (N,):
        x is the best so far."""
        self.best = torch.where(better[:, None, None], x, self.best)
        self.best_grad = torch.where(better[:, None, None], grad, self.best_grad)
        self.lowered = self.lowered + (loss < self.last_loss)
        self.improved, self.last_loss = self.improved | better, loss
        self.steps += 1
        if self.steps == self.wait:
            self.halved = (self.lowered < 0.75 * self.wait) | ~(self.halved | self.improved)
            back = self.halved[:, None, None]
            self.size = torch.where(back, self.size / 2, self.size)
            x, grad = torch.where(back, self.best, x), torch.where(back, self.best_grad, grad)
            self.before = torch.where(back, x, self.before)  # without the momentum of before
            self.lowered = torch.zeros_like(self.lowered)
            self.improved = torch.zeros_like(self.improved)
            self.steps, self.wait = 0, max(self.wait - self.fewer, self.least)
        z = (x - self.size * grad.sign()).clamp(0, 1)
        momentum, self.before = x - self.before, x
        return (x + 0.75 * (z - x) + 0.25 * momentum).clamp(0, 1)


def optimise(
    embed: Embed, batches: Sequence[Sequence[Tensor]], w: Tensor, start: Tensor, effort: Effort
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise eq. (7) over the pixels under the mask, and keep the best iterate of each row.

    batches  images (n, C, H, W), their pixels (n, P) under the mask and anchors (n, D): one batch
             with a row for each image, or several that share one row, by the mean over all images
    w        the pixels by the hyperbolic arc-tangent, as many rows as start
    start    (N or 1, C, P), the first delta
    Returns the best patch (N, C, P), its loss (N,), and the counts (3,) of zero, non-finite and all
    gradients. On a GPU an iteration waits for nothing.
    """
    tanh, device = effort.optimiser == "adam", start.device
    x = start.clone() if tanh else tanh_perturb(w, start)  # delta, or the pixels themselves
    adam = torch.optim.Adam([x], lr=effort.lr, fused=True if x.is_cuda else None)
    sign_steps = SignSteps(x, effort.iterations)
    best, best_loss = x.clone(), torch.full_like(x[:, 0, 0], torch.inf)
    counts = torch.zeros(3, dtype=torch.long, device=device)
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=effort.precision == "bfloat16")
    with bfloat16:
        parts = [(patched_features(embed, images, pixels), a) for images, pixels, a in batches]
    total = sum(len(anchor) for _, anchor in parts)
    shared = len(x) < total
    for step in range(effort.iterations + 1):
        last = step == effort.iterations  # it is scored, without a gradient
        losses, grad = [], torch.zeros_like(x)
        for features_of, anchor in parts:
            leaf = x.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                with bfloat16:
                    patch = tanh_perturb(w, leaf) if tanh else leaf
                    patch = patch.expand(len(anchor), -1, -1)
                    # Eq. (7)
                    loss = effort.sign * squared_distance(features_of(patch), anchor)
                if not last:
                    reached = loss.requires_grad
                    part = reached and torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0]
                    if not isinstance(part, Tensor):
                        why = "has it no_grad, detach or numpy inside?"
                        raise ValueError(f"embed: no gradient reaches the images: {why}")
                    grad += part / (total if shared else 1)
            losses.append(loss.detach())
        loss = torch.cat(losses).mean(0, keepdim=True) if shared else torch.cat(losses)
        better = loss.isfinite() & (loss < best_loss)  # NaN never wins
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better[:, None, None], x, best)
        if last:
            break
        lost = ~(loss.isfinite() & grad.isfinite().flatten(1).all(1))
        zero = ~lost & (grad == 0).flatten(1).all(1)
        counts += torch.stack([zero.sum(), lost.sum(), torch.ones_like(zero).sum()])
        grad = torch.where(lost[:, None, None], 0.0, grad)
        if tanh:
            decay = 1 - step / effort.iterations if effort.decay else 1
            adam.param_groups[0]["lr"], x.grad = effort.lr * decay, grad
            adam.step()
        else:
            x = sign_steps.step(x, grad, loss, better & ~lost)
    return tanh_perturb(w, best) if tanh else best, best_loss, counts


def tanh_attack(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    mask: Tensor,
    effort: Effort,
    start: Tensor | Rng | None = None,
) -> AttackResult:
    """Attack each image by itself inside its mask: eq. (7) in the form of App. C.

    images  (B, C, H, W) in [0, 1]; anchor (B, D) or (D,), features of one view
    mask    (H, W) or (B, H, W) bool
    start   (restarts, B, C, P), the first delta, or the generator that draws it (None: seeded by 0)
    Raises ValueError for what `check_inputs` and `mask_pixels` refuse; warns of lost gradients.
    """
    images, anchor = check_inputs(embed, images, anchor)
    pixels = mask_pixels(mask, images)  # (B, P)
    B, C = images.shape[:2]
    if not isinstance(start, Tensor):
        rng, size = start or torch.Generator().manual_seed(0), (B, C, pixels.shape[1])
        # a restart is the same however many follow it
        draws = [torch.rand(size, generator=rng) - 0.5 for _ in range(effort.restarts)]
        start = torch.stack(draws)  # (R, B, C, P)
    start, R = start.to(images), len(start)
    values = images.flatten(2).gather(2, pixels[:, None].expand(-1, C, -1))
    w = torch.atanh((2 * values - 1) * 0.999999)  # (B, C, P), of which tanh makes values, to 5e-7
    result, counts = AttackResult(images.clone(), images.new_empty(B)), torch.zeros(3).long()
    result.direction = effort.direction
    with frozen(embed):
        for i in torch.arange(B, device=images.device).split(max(1, effort.chunk // R)):
            again = i.repeat(R)  # each image from R starts
            batch = images[again], pixels[again], anchor[again]
            first = start[:, i].flatten(0, 1)  # (R n, C, P)
            patch, loss, lost = optimise(embed, [batch], w[again], first, effort)
            winner = loss.view(R, -1).argmin(0) * len(i) + torch.arange(len(i)).to(i)  # (n,)
            result.images[i] = _paste(images[i], patch[winner], pixels[i])
            # measured on the images in float32, not taken from the loop: a wrong choice would show
            with torch.no_grad():
                squared = squared_distance(embed(result.images[i]), anchor[i])
            result.distance[i] = squared.sqrt()
            counts += lost.cpu()
    result.zero_gradients, result.nonfinite, result.gradients = map(int, counts)
    return result.warn_if_gradients_lost()


def check_gradient(embed: Embed, images: Tensor) -> None:
    """Raise ValueError where `tanh_attack` refuses the embedding, or could not follow its gradient
    from any of these images to the last."""
    anchor, everywhere = extract(embed, images)[-1], torch.ones(images.shape[2:]).bool()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = tanh_attack(embed, images, anchor, everywhere, Effort(1, restarts=1))
    if step.nonfinite or step.zero_gradients == step.gradients:
        why = "does it round, or stop it with detach?"
        raise ValueError(f"embed: the gradient for the images is zero or not finite: {why}")


# Square with a search for its place, Sec. 3, App. C


def square_attack(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    places: Sequence[tuple[int, int]],
    effort: Effort,
    search: Effort,
    rng: Rng,
) -> AttackResult:
    """Attack each image by a square at each of K places for a short time, then anew at the best
    place; extra: row, col (B,) of that place."""
    images, anchor = check_inputs(embed, images, anchor)
    B, _, H, W = images.shape
    K = len(places)
    if not places:
        raise ValueError("places must be 1 or more, not 0")
    masks = torch.stack([square_mask(row, column, H, W) for row, column in places])
    several = images.repeat_interleave(K, 0), anchor.repeat_interleave(K, 0), masks.repeat(B, 1, 1)
    search = replace(search, restarts=1, direction=effort.direction)
    searched = tanh_attack(embed, *several, search, rng)
    best = lowest(effort.sign * searched.distance.view(B, K), 1).cpu()  # (B,)
    result = tanh_attack(embed, images, anchor, masks[best], effort, rng)
    result.add_counts(searched)
    result.mask = masks[best]
    result.extra = dict(zip(("row", "col"), torch.tensor(places)[best].T))
    return result


# Universal eye patch, Sec. 3, App. C


def universal_patch(
    embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, effort: Effort, rng: Rng
) -> tuple[Tensor, AttackResult]:
    """Train one pattern that replaces the masked pixels of every image, for the lowest mean squared
    distance to the anchor.

    images (B, C, H, W): the training intruders, all of which count at every step; mask (H, W).
    Returns the pattern (C, P) in [0, 1] and the patched training images.
    """
    images, anchor = check_inputs(embed, images, anchor)
    pixels = mask_pixels(mask, images)
    start = torch.rand(1, images.shape[1], pixels.shape[1], generator=rng).to(images) - 0.5
    w = torch.zeros_like(start)  # grey, not a face's pixels: the pattern is the same on all
    batches = [*zip(*(x.split(effort.chunk) for x in (images, pixels, anchor)))]
    with frozen(embed):
        pattern, _, counts = optimise(embed, batches, w, start, effort)
    patched = apply_pattern(images, pattern, mask)
    distance = distances(embed, patched, anchor, effort.chunk)
    result = AttackResult(patched, distance, *counts.tolist())
    result.direction = effort.direction
    return pattern[0], result.warn_if_gradients_lost()


# Random perturbations, App. B.2


def random_patterns(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    mask: Tensor,
    patterns: int,
    rng: Rng,
    chunk: int = 128,
) -> AttackResult:
    """Choose, for each image, the closest of so many uniform random fillings of the mask."""
    if patterns < 1:
        raise ValueError(f"patterns must be 1 or more, not {patterns}")
    images, anchor = check_inputs(embed, images, anchor)
    C, P = images.shape[1], mask_pixels(mask, images).shape[1]
    result = AttackResult(images.clone(), images.new_empty(len(images)))
    for i, image in enumerate(images):
        values = torch.rand(patterns, C, P, generator=rng).to(images)
        several = image.expand(patterns, -1, -1, -1)
        parts = zip(several.split(chunk), values.split(chunk))
        filled = (apply_pattern(x, v, mask) for x, v in parts)
        distance = torch.cat([distances(embed, x, anchor[i], chunk) for x in filled])
        best = lowest(distance)
        result.images[i] = apply_pattern(image[None], values[best], mask)[0]
        result.distance[i] = distance[best]
        result.nonfinite += int((~distance.isfinite()).sum())
    return result


def uniform_noise(images: Tensor, amount: float, rng: Rng) -> Tensor:
    """Add U(-amount, amount) to every pixel of the images, clipped to [0, 1]."""
    check_pixels("images", images)
    noise = torch.rand(images.shape, generator=rng) * 2 - 1
    return (images + amount * noise.to(images)).clamp(0, 1)


# Indirect anchor and distal, Sec. 4.4


def indirect_attack(
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    virtual: Tensor,
    mask: Tensor,
    effort: Effort,
    rng: Rng,
) -> AttackResult:
    """Attack the anchor and, from the same start, the features `virtual` (D,) of the autoencoded
    target; keep, for each image, what comes closer to the true anchor.

    extra: direct, indirect (B,), both distances to the true anchor.
    """
    state = rng.get_state()
    direct = tanh_attack(embed, images, anchor, mask, effort, rng)
    rng.set_state(state)
    indirect = tanh_attack(embed, images, virtual, mask, effort, rng)
    indirect.distance = distances(embed, indirect.images, anchor, effort.chunk)
    result = strongest(direct, indirect)
    result.extra = {"direct": direct.distance, "indirect": indirect.distance}
    return result


def distal_attack(
    embed: Embed, shape: Sequence[int], anchor: Tensor, effort: Effort, rng: Rng
) -> AttackResult:
    """Attack noise of this shape (B, C, H, W) at all its pixels: Fig. 4."""
    noise = torch.rand(tuple(shape), generator=rng).to(anchor)
    return tanh_attack(embed, noise, anchor, torch.ones(shape[2:]).bool(), effort, rng)


def strongest(*results: AttackResult) -> AttackResult:
    """Keep, of several attacks on the same images, the one that came closest to each, or farthest
    where they evade, as of both optimisers; counters are summed; extra: strongest (B,), which.
    Raises ValueError for attacks in different directions."""
    directions = {result.direction for result in results}
    if len(directions) != 1:
        raise ValueError(f"results: directions {sorted(directions)}, wanted one")
    distance = torch.stack([result.distance for result in results])  # (A, B)
    sign = -1 if "evade" in directions else 1
    which, each = lowest(sign * distance), torch.arange(distance.shape[1], device=distance.device)
    images = torch.stack([result.images for result in results])[which, each]
    best = AttackResult(images, distance[which, each], extra={"strongest": which})
    best.direction = results[0].direction
    for result in results:
        best.add_counts(result)
    return best


# Expectation over transforms: a patch that is printed (not in the paper, see Sec. 3)


def draw_transforms(n: int, config: Config, rng: Rng) -> Tensor:
    """Draw n transforms (n, 5), uniform in the config's ranges: rows and columns of shift in pixels
    of 64, scale, rotation in radians, brightness."""
    shift, rotation = config.eot_shift, config.eot_rotation * torch.pi / 180
    ranges = torch.tensor([shift, shift, config.eot_scale, rotation, config.eot_brightness])
    unit = torch.rand(n, 5, generator=rng) * 2 - 1
    return unit * ranges + torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])


def _transform(images: Tensor, transforms: Tensor) -> Tensor:
    """Transform images (N, C, H, W) by each of transforms (S, 5): (S * N, C, H, W), all by the
    first, then all by the second, ..."""
    N, C, H, W = images.shape
    S = len(transforms)
    row, column, scale, angle, brightness = transforms.to(images).unbind(1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, -sin * H / W, column / 32, sin * W / H, cos, row / 32], 1)
    theta = theta.view(S, 2, 3).repeat_interleave(N, 0)
    grid = F.affine_grid(theta, [S * N, C, H, W], align_corners=False)
    images = images.repeat(S, 1, 1, 1)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (moved * brightness.repeat_interleave(N).view(-1, 1, 1, 1)).clamp(0, 1)


class Transformed(nn.Module):
    """Embed an image under a fixed set of transforms (S, 5): (N, 3, H, W) -> (N, S V, D). An attack
    on it lowers the mean over the transforms."""

    def __init__(self, embed: Embed, transforms: Tensor) -> None:
        super().__init__()
        self.embed, self.transforms = embed, transforms

    def forward(self, images: Tensor) -> Tensor:
        views = self.embed(_transform(images, self.transforms))  # (S N, D) or (S N, V, D)
        return views.unflatten(0, (-1, len(images))).transpose(0, 1).flatten(1, -2)


# Every attack by its name


def effort_of(name: str, config: Config, views: int = 1) -> Effort:
    """Return the effort of an attack of `ATTACKS` on an embedding of so many views."""
    own = {
        "eye_patch": (config.patch_iterations, config.patch_lr, 1),
        "evasion": (config.evasion_iterations, config.evasion_lr, config.evasion_restarts),
        "distal": (config.distal_iterations, config.distal_lr, 1),
    }
    return Effort(
        *own.get(name, (config.iterations, config.lr, config.restarts)),
        decay=config.decay,
        chunk=max(1, (config.chunk or 128) // views),
        direction="evade" if name == "evasion" else "impersonate",
        optimiser=config.optimiser,
        precision="bfloat16" if config.precision == "bfloat16" else "float32",
    )


def run_attack(
    name: str,
    config: Config,
    embed: Embed,
    images: Tensor,
    anchor: Tensor,
    rng: Rng,
    *,
    training: Tensor | None = None,
    virtual: Tensor | None = None,
    mask: Tensor | None = None,
) -> AttackResult:
    """Make one attack of `ATTACKS`; ValueError for another name, or for one without what it needs.

    images    (B, C, H, W): the intruders, or for evasion the target's own; anchor (D,)
    training  (T, C, H, W), the intruders that `eye_patch` is trained on
    virtual   (D,), features of the autoencoded target, for `indirect`
    mask      (H, W) bool, for the attack `mask`
    """
    check_pixels("images", images)
    C, H, W = images.shape[1:]
    views = 2 if isinstance(embed, Mirrored) else 1
    effort, scorer, inputs = effort_of(name, config, views), embed, (images, anchor)
    glasses, everywhere = eyeglasses_mask(H, W), torch.ones(H, W, dtype=torch.bool)
    own = {"eye_patch": eye_patch_mask(H, W), "noise": everywhere, "distal": everywhere}
    allowed = own.get(name, glasses) if mask is None else mask
    result = AttackResult(images.detach(), images.new_zeros(len(images)))  # measured below
    match name:
        case "clean" | "noise":
            check_inputs(embed, images, anchor)
            if name == "noise":
                result.images = uniform_noise(images, config.noise, rng)
        case "eyeglasses" | "evasion":
            result = tanh_attack(embed, *inputs, allowed, effort, rng)
        case "mask" if mask is not None:
            result = tanh_attack(embed, *inputs, allowed, effort, rng)
        case "square":
            places = square_positions(config.square_stride, H, W)
            short, lr = config.square_search_iterations, config.square_search_lr
            search = replace(effort, iterations=short, lr=lr, decay=False)
            result = square_attack(embed, *inputs, places, effort, search, rng)
        case "eye_patch" if training is not None:
            pattern, result = universal_patch(embed, training, anchor, allowed, effort, rng)
            result.images = apply_pattern(images, pattern, allowed)
            result.extra["pattern"] = pattern.view(C, int(allowed.any(1).sum()), -1)
        case "random_eyeglasses":
            result = random_patterns(embed, *inputs, allowed, config.patterns, rng, effort.chunk)
        case "indirect" if virtual is not None:
            result = indirect_attack(embed, *inputs, virtual, allowed, effort, rng)
        case "distal":
            result = distal_attack(embed, (1, C, H, W), anchor, effort, rng)
        case "eot_eyeglasses":
            attacked = Transformed(embed, draw_transforms(config.eot_samples, config, rng))
            # the attack has not seen these
            scorer = Transformed(embed, draw_transforms(config.eot_tests, config, rng))
            effort = effort_of(name, config, views * config.eot_samples)
            result = tanh_attack(attacked, *inputs, allowed, effort, rng)
        case _:
            raise ValueError(f"{name!r}: give one of {', '.join(ATTACKS)}, and what it needs")
    if config.model and name != "clean":
        # 8 bits, as a picture keeps them; those of F are the paper's, of floats
        result.images = (result.images * 255).round() / 255
    result.mask = allowed if result.mask is None else result.mask
    result.distance = distances(scorer, result.images, anchor, effort.chunk)
    if not result.distance.isfinite().all():
        raise ValueError(f"embed: features of images under the attack {name} are not finite")
    return result


def choose_intruders(
    person: Tensor,
    target: int,
    near: Sequence[int],
    far: Sequence[int],
    tests: int,
    training: int,
    rng: Rng,
) -> tuple[list[int], list[int]]:
    """Choose images of other persons, by index: `tests` that are attacked or compared, of near
    persons before far ones, and `training` others for the universal patch, of far persons first, so
    as not to have seen the tested persons.

    person (n,): of each image.
    """

    def shuffle_images(persons: Sequence[int]) -> list[int]:
        others = torch.tensor([p for p in persons if p != target], dtype=torch.long)
        images = torch.isin(person, others).nonzero().flatten()
        return images[torch.randperm(len(images), generator=rng)].tolist()

    first, second = shuffle_images(near), shuffle_images(far)
    tested = (first + second)[:tests]
    rest = set(tested)
    return tested, [i for i in second + first if i not in rest][:training]


# main

# of a row; square adds row and col, indirect direct and indirect, --judge judge
COLUMNS = tuple("attack mirroring selection seed target anchor candidate person".split())
COLUMNS += ("role", "distance")
# what changes no number, or says only which rows to make
NOT_SETTINGS = ("method", "attacks", "chunk", "model", "judge", "mask")
MORE_COLUMNS = ("row", "col", "direct", "indirect", "judge")
LINE_EVERY = 60.0  # seconds between the lines of an attack, at the least


class JudgedPeople(NamedTuple):
    """Hold who is judged: persons of `faces` (data.Faces), by index."""

    faces: Any
    targets: list[int]  # impersonated
    near: list[int]  # whose images attack first
    far: list[int]  # whose images the universal patch is trained on first
    folder: str  # of the rows
    mask: Tensor | None = None  # of --mask


def stable_generator(*parts: object) -> Rng:
    """Seed a generator from these values alone, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json, which embed.py wrote. Raises run.UsageError."""
    if not folder.is_dir():
        advice = "give the folder that embed.py wrote, or --model"
        raise run.UsageError(f"--run {folder}: no such folder: {advice}")
    file, advice = folder / "run.json", "give the --run folder of a training"
    record = {"root": "", "crop": "", "preset": "", "seed": 0, "options": {}}
    record |= run.read_json(file, advice)
    kinds = {"data": str, "root": str, "crop": str, "preset": str, "seed": int, "options": dict}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            why = f"{key} is {record.get(key)!r}, not what embed.py wrote"
            raise run.UsageError(f"{file}: {why}: run embed.py again")
    return record


def choose_preset(args: Any) -> str:
    """Choose the preset of --model or of the run, which is the demo's where none is named."""
    if getattr(args, "model", ""):
        return "model"
    args.run = args.run or data.demo_run()
    preset = read_run(args.run)["preset"]
    return preset if preset in PRESETS else "demo"


def parse(argv: Sequence[str] | None):
    """Return config, flags and what run.json says ({} with --model). Raises run.UsageError."""
    bounds = {"seed": (-1, run.LARGEST), "min_images": (2, run.LARGEST), "size": (32, 256)}
    bounds |= dict.fromkeys(("chunk", "target_images"), (0, run.LARGEST))
    about = (
        "Attack a trained embedding (Sec. 3, 4, App. B.2, C), or your own --model: its NAME takes "
        "images, float (N, 3, size, size) in [0, 1], and gives features (N, D) - a function, a "
        "Module - or takes nothing and returns such a thing."
    )
    config, args = run.parse(Config, PRESETS, argv, about, choose_preset, bounds)
    record: dict[str, Any] = {}
    if config.model:
        config = prepare_model(config, args)
    else:
        args.run = args.run or data.demo_run()
        record = read_run(args.run)
        for flag in ("size", "distance", "judge"):
            if getattr(config, flag) != getattr(Config, flag):
                raise run.UsageError(f"--{flag} {getattr(config, flag)}: it goes with --model")
    if config.person_folder and not config.data:
        raise run.UsageError("--person-folder: it goes with --data folder")
    if config.target_images == 1:
        raise run.UsageError("--target-images 1: no genuine pair: give 2 or more, or 0 for all")
    if config.seed < 0:
        config = replace(config, seed=record.get("seed", 0))
    if config.mask:
        config = replace(config, attacks=(*config.attacks, "mask"))
    return config, args, record


def prepare_model(config: Config, args: Any) -> Config:
    """Return what --model makes of the flags, and name its run. Raises run.UsageError."""
    flag, name = f"--model {config.model}", model.model_name(config.model)
    if not config.data:
        raise run.UsageError(f"{flag}: give --data folder --root PHOTOS, a folder a person")
    if config.method != Config.method:
        raise run.UsageError(f"{flag} --method: the methods are those of a trained run")
    if not hasattr(args, "attacks"):
        config = replace(config, attacks=PRESETS["model"]["attacks"])
    elif config.attacks == ATTACKS:
        config = replace(config, attacks=tuple(a for a in ATTACKS if a != "indirect"))
    if "indirect" in config.attacks:
        raise run.UsageError(f"{flag} --attacks indirect: it needs the generator of a run")
    photographs = Path(config.root).resolve().name if config.root else config.data
    args.run = args.run or Path("runs", f"{photographs}-{name}")
    return config


def read_mask(config: Any, faces: Any, photographs: Sequence[Path]) -> Tensor:
    """Read --mask as (size, size) bool, True where a patch may be, and say where that is: a picture
    of that size as it is, one as large as a photograph in their crop. Raises run.UsageError."""
    flag, side = f"--mask {config.mask}", config.size
    sizes = {(side, side)}
    for path in photographs:
        with contextlib.suppress(OSError):  # its name had to be escaped
            sizes.add(data.image_size(path))
    with run.reading(config.mask, "give a picture"):
        size = data.image_size(config.mask)
    if size not in sizes:
        wanted = " or ".join(f"{W} x {H}" for W, H in sorted(sizes)[:4])
        why = f"{size[0]} x {size[1]} pixels: draw it {wanted}, as --size or a photograph"
        raise run.UsageError(f"{flag}: {why}")
    mask = data.load_mask(config.mask, "none" if size == (side, side) else faces.crop, side)
    if mask.all() or not mask.any():
        advice = "paint white what a patch may change, all else black"
        raise run.UsageError(f"{flag}: it is of one colour: {advice}")
    (top, left), (bottom, right) = (x.tolist() for x in mask.nonzero().aminmax(dim=0))
    where = f"rows {top}-{bottom}, columns {left}-{right}"
    print(f"{flag}: {int(mask.sum())} of {side} x {side} pixels may change, {where}", flush=True)
    return mask


def judged_people(config: Any, folder: Path, record: dict) -> JudgedPeople:
    """Choose the run's own test persons, or those of --data; record: what run.json says. Raises
    run.UsageError."""
    manifest, root, rows = folder / "people.json", config.root or None, "attacks"
    if not config.data:
        options = {"crop": record["crop"] or None, **record["options"]}
        options["person_folder"] = record.get("person_folder") or None
        faces = data.load(record["data"], root or record["root"] or None, **options)
        split = data.read_manifest(manifest, faces)
        near, far = list(split.target), list(split.validation)
    else:
        options = {"size": config.size, "person_folder": config.person_folder or None}
        faces = data.load(config.data, root, crop=config.crop or None, **options)
        trained: set[str] = set()
        if not config.model:
            rows = f"attacks-{Path(root).resolve().name if root else config.data}"
            trained = data.trained_persons(manifest, faces)
            if record["crop"] not in ("", faces.crop):  # as they looked in the training
                with contextlib.suppress(run.UsageError):  # a crop that fits none of them
                    again = data.load(config.data, root, crop=record["crop"], **options)
                    trained |= data.trained_persons(manifest, again)
        n = faces.person.bincount(minlength=len(faces.names)).tolist()
        others = [p for p, name in enumerate(faces.names) if name not in trained]
        near = [p for p in others if n[p] >= config.min_images]
        far = [p for p in others if n[p] < config.min_images]
        about = f"--root {root}"
        if trained:
            about += f": {len(trained)} of {len(n)} persons left out, the embedding was trained on "
            about += "these persons"
            print(about, flush=True)
        if not near:
            why = f"nobody{' else' * bool(trained)} has {config.min_images} images"
            most = max(n[p] for p in others) if others else 0
            flags = f"--min-images {most}" if most > 1 else ""
            raise run.UsageError(f"{about}: {why}: lower --min-images or add images", flags)
        if len(others) < 2:
            raise run.UsageError(f"{about}: one person alone has no intruders: add persons")
    order = [stable_generator(config.seed, faces.names[p]).initial_seed() for p in near]
    shuffled = [p for _, p in sorted(zip(order, near))]
    targets, mask = sorted(shuffled[: config.targets]), None
    if getattr(config, "mask", ""):
        folder = Path(root or record.get("root", ""))
        files = [folder / faces.files[i] for i in data.images_of(faces, targets)]
        mask = read_mask(config, faces, files)
    return JudgedPeople(faces, targets, near, far, rows, mask)


def settings_of(config: Any, people: JudgedPeople) -> dict[str, Any]:
    """Return what must be the same for rows to stand in one file."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SETTINGS}
    settings["root"] = config.root and str(Path(config.root).resolve())
    faces = people.faces
    who = json.dumps([faces.names, faces.files, people.targets])
    settings["people"] = hashlib.sha256(who.encode()).hexdigest()[:16]
    # Of rendered faces the factors: how a pixel is rounded depends on the machine.
    settings["images"] = run.digest(faces.hashes, faces.identity, faces.content)
    return settings


def effort_record(name: str, config: Config) -> dict[str, int]:
    """Return the iterations, restarts and more that stand beside the rows of an attack."""
    effort, places = effort_of(name, config), len(square_positions(config.square_stride))
    usual = {"iterations": effort.iterations, "restarts": effort.restarts}
    search = {"positions": places, "search_iterations": config.square_search_iterations}
    records = {
        "clean": {},
        "noise": {},
        "random_eyeglasses": {"patterns": config.patterns},
        "eye_patch": usual | {"training_intruders": config.patch_train},
        "square": usual | search,
    }
    return records.get(name, usual)


def choose_others(
    config: Config, name: str, people: JudgedPeople, person: int
) -> tuple[list[int], list[int]]:
    """Choose the intruders of a target, and the images that its universal patch is trained on.
    Raises run.UsageError where there are too few."""
    faces, target = people.faces, people.faces.names[person]
    tests = max(config.clean_intruders, config.intruders) if name == "clean" else config.intruders
    sizes = tests, config.patch_train, stable_generator(config.seed, target, "intruders")
    tested, training = choose_intruders(faces.person, person, people.near, people.far, *sizes)
    if not tested or (name == "eye_patch" and not training):
        why = f"too few images of persons other than {target}"
        raise run.UsageError(f"--intruders {config.intruders}: {why}: add persons, or lower it")
    return tested, training


def attack_target(
    config: Config,
    embed: Embed,
    judge: Embed | None,
    people: JudgedPeople,
    lord: nn.Module | None,
    device: torch.device,
    name: str,
    person: int,
) -> tuple[list[str], list[list], dict, dict]:
    """Attack one target under each of the defences; return header, rows, statistics and examples.

    They depend on the seed and the target's name, not on which others are attacked, or where.
    judge: a second model, which measures the same images; lord: the generator, for `indirect`.
    Raises run.UsageError.
    """
    began, faces, target = time.monotonic(), people.faces, people.faces.names[person]

    def load(index: Sequence[int]) -> Tensor:
        return to_float(faces.images[list(index)].to(device))

    tested, training = choose_others(config, name, people, person)
    own = (faces.person == person).nonzero().flatten().tolist()[: config.target_images or None]
    features = extract(embed, load(own), config.chunk)
    rows: list[list] = []
    stats = {"zero_gradients": 0, "nonfinite": 0, "gradients": 0, "outside_mask_max": 0.0}
    for mirroring, selection in (DEFENCES[defence] for defence in config.defences):
        best = select_anchor(features) if selection else 0
        anchor_image = load([own[best]])
        genuine = [i for i in own if i != own[best]]
        candidates = {"clean": genuine + tested, "noise": genuine + tested, "evasion": genuine}
        chosen, needs = candidates.get(name, tested), {}
        if name == "eye_patch":
            needs["training"] = load(training)
        if lord is not None and name == "indirect":
            with torch.no_grad():
                needs["virtual"] = extract(embed, lord(anchor_image).clamp(0, 1))[0]
        if name == "mask":
            needs["mask"] = people.mask
        rng = stable_generator(config.seed, target, "eyeglasses" if name == "indirect" else name)
        views: Callable[[Embed], Embed] = Mirrored if mirroring else lambda embed: embed
        images = load(chosen)
        result = run_attack(name, config, views(embed), images, features[best], rng, **needs)
        if name == "distal":
            chosen, images = [-1], result.images
        if judge is not None:
            seen = extract(judge, anchor_image)[0]
            chunk = max(1, config.chunk // 2)
            result.extra["judge"] = distances(views(judge), result.images, seen, chunk)
            if not result.extra["judge"].isfinite().all():
                raise run.UsageError(f"--judge {config.judge}: features are not finite")
        outside = ~result.mask.to(device).expand(len(images), -1, -1)[:, None]
        moved = float(((result.images - images).abs() * outside).max())
        stats["outside_mask_max"] = max(stats["outside_mask_max"], moved)
        for key in ("zero_gradients", "nonfinite", "gradients"):
            stats[key] += getattr(result, key)
        more = [key for key in MORE_COLUMNS if key in result.extra]
        columns = [result.distance.tolist(), *(result.extra[key].tolist() for key in more)]
        for candidate, *values in zip(chosen, *columns):
            other = faces.names[int(faces.person[candidate])] if candidate >= 0 else ""
            role = "genuine" if other == target else "intruder"
            row = [name, mirroring, selection, config.seed, target, own[best], candidate, other]
            rows.append([*row, role, *values])
    shown = {"anchor": anchor_image[0], "clean": images[:4], "attacked": result.images[:4]}
    shown |= {key: result.extra[key] for key in ("pattern",) if key in result.extra}
    mask = result.mask if result.mask.dim() == 2 else result.mask[0]
    example: dict[str, Any] = {"candidate": chosen[:4], "mask": mask.numpy()}
    example["distance"] = result.distance[:4].cpu().numpy()
    for key, image in shown.items():
        example[key] = (image * 255).round().to(torch.uint8).cpu().numpy()
    stats["seconds"] = time.monotonic() - began
    return [*COLUMNS, *more], rows, stats, {} if name == "clean" else example


def add_example(path: Path, target: str, example: dict, finished: Sequence[str]) -> None:
    """Add a target's example images to <attack>.npz, where those of the finished targets stay."""
    arrays: dict[str, list] = {key: [] for key in ("target", *example)}
    if finished and path.exists():
        with run.reading(path, "delete it"), np.load(path) as old:
            rows = np.isin(old["target"], finished)
            arrays = {key: [*old[key][rows]] for key in arrays}
    for key, value in {"target": target, **example}.items():
        arrays[key].append(np.asarray(value))
    fewest = min(map(len, arrays["clean"]))
    for key in ("clean", "attacked", "candidate", "distance"):
        arrays[key] = [images[:fewest] for images in arrays[key]]
    stacked: dict[str, Any] = {key: np.stack(values) for key, values in arrays.items()}
    run.write(path, lambda file: np.savez_compressed(file, **stacked))
    if "pattern" in example:
        picture = path.with_suffix("") / f"{target}.png"
        model.write_pattern(picture, example["pattern"], example["mask"])


def write_rows(
    table: Path,
    about: dict,
    people: JudgedPeople,
    others: Sequence[int],
    make: Callable[[int], tuple],
    effort: dict,
    overwrite: bool,
) -> None:
    """Write the rows of the targets and of other persons where they are missing, a person at a
    time; torchrun's processes share them.

    make(person) gives header, rows, statistics and example images, which may be empty.
    """
    names, title = people.faces.names, f"{table.parents[1].name} {table.stem}"
    finished = [*run.open_table(table, about | effort, overwrite)]
    missing = [p for p in (*people.targets, *others) if names[p] not in finished]
    began = line_at = time.monotonic()
    for first in range(0, len(missing), run.world()):
        part = None
        for person in missing[first:][run.rank() : run.rank() + 1]:
            with warnings.catch_warnings():  # metrics.py tells of the gradients, once
                warnings.filterwarnings("ignore", ".* of .* gradients")
                part = names[person], *make(person)
        for target, header, rows, stats, example in filter(None, run.gather(part)):
            if example:
                add_example(table.with_suffix(".npz"), target, example, finished)
            run.append_rows(table, header, rows, target, stats)
            finished.append(target)
        now, made = time.monotonic(), min(first + run.world(), len(missing))
        if now - line_at >= LINE_EVERY and run.rank() == 0:
            left = (now - began) / made * (len(missing) - made) / 60
            print(f"{title}: {made} of {len(missing)} targets, left {left:.1f} min", flush=True)
            line_at = now
    if run.rank() == 0:
        totals = run.read_json(table.with_suffix(".json"))
        line = "".join(f"{n} {what.replace('_', ' ')}, " for what, n in effort.items())
        state = f"{totals.get('seconds', 0):.0f} s" if missing else f"kept, {table} is finished"
        line += f"{len(people.targets)} targets, {totals['n']} pairs, {state}"
        print(f"{title}: {line}", flush=True)


def open_tables(
    config: Config, people: JudgedPeople, out: Path, settings: dict, overwrite: bool
) -> dict[Path, dict]:
    """Open the table of each attack in `out`, and of clean where its rows are missing, before the
    first attack runs; return what stands beside the rows. Raises run.UsageError."""
    file, now = out / "clean.json", settings["config"]
    clean = run.read_json(file) if file.exists() else {}
    before = clean.get("config", {})
    same = all(before.get(key) == now[key] for key in ("images", "embedding", "size", "distance"))
    same = same and {*config.defences} <= {*before["defences"]}
    names, tables = {people.faces.names[p] for p in people.targets}, {}
    there = "clean" in config.attacks or (same and names <= {*clean["targets"]})
    for name in config.attacks if there else ("clean", *config.attacks):
        for person in people.targets:
            choose_others(config, name, people, person)
        about = {"attack": name, **settings, **effort_record(name, config)}
        if name == "mask":
            about["config"] = now | {"mask": run.digest(Path(config.mask))}
        if name == "indirect":
            about["config"] = now | {"generator": run.digest(out.parents[1] / "generator.pt")}
        tables[out / f"{name}.csv"] = about
    for table, about in tables.items():
        run.open_table(table, about, overwrite)
    run.barrier()
    return tables


def fill_tables(tables: dict, config: Config, people: JudgedPeople, make: Callable) -> None:
    """Make every attack on one embedding, by make(name, person)."""
    for table, about in tables.items():
        effort, attack = effort_record(table.stem, config), functools.partial(make, table.stem)
        write_rows(table, about, people, (), attack, effort, False)


def shown_defence(defences: Sequence[str]) -> tuple[int, int]:
    """Choose (mirroring, selection) of the tables: both, or else the first of the defences."""
    return DEFENCES["both" if "both" in defences else defences[0]]


def print_table(folder: Path, rows: str, defences: Sequence[str], figures: Sequence[str]) -> int:
    """Print the table of a run under one of the defences, and where it lies; return the status."""
    if run.rank():
        return 0
    mirroring, selection = shown_defence(defences)
    out = folder if rows == "attacks" else folder / rows
    flags = ["--run", str(folder), "--rows", rows, "--out", str(out), "--figures", *figures]
    flags += ["--mirroring", str(mirroring), "--selection", str(selection)]
    code = run.run_stage("metrics", flags)
    print(f"rows: {folder}/*/{rows}; the table again: {out}/tables.md", flush=True)
    return code


def choose_methods(method: Sequence[str], folder: Path) -> Sequence[str]:
    """Choose the methods that are trained in a run, or some of them. Raises run.UsageError."""
    trained = sorted(path.parent.name for path in folder.glob("*/embedding.pt"))
    methods = trained if tuple(method) == ("all",) else method
    unknown = sorted({*methods} - {*trained})
    if unknown or not methods:
        advice = f"choose all or some of {', '.join(trained) or '(there is none)'}"
        raise run.UsageError(f"--method {','.join(unknown) or 'all'}: {advice}")
    return methods


def load_method(
    config: Any, folder: Path, people: JudgedPeople, device: torch.device
) -> tuple[Embed, dict[str, Any]]:
    """Load the F of a method, and return it with the settings of its rows. Raises
    run.UsageError."""
    file, manifest = folder / "embedding.pt", folder.parent / "people.json"
    embed, content = load_embedding(file, device), run.load(file, "embedding")
    persons = content.get("people")
    if not config.data and persons and persons != run.read_json(manifest)["sha256"]:
        why = f"trained on other persons than {manifest} names"
        raise run.UsageError(f"{file}: {why}: train it again with --overwrite")
    digest = model.model_digest(embed, None, fixed_images(config.size).to(device))
    made_with = settings_of(config, people) | {"embedding": digest}
    settings = {"config": made_with, "seed": config.seed, "data": people.faces.data}
    settings["trained_in"] = content["config"].get("precision", "float32")
    return embed, settings | run.machine(device)


def fixed_images(size: int) -> Tensor:
    """Draw the images (8, 3, size, size) by which a model is known again."""
    return torch.rand(8, 3, size, size, generator=stable_generator("fixed images"))


def attack_model(config: Config, args: Any, device: torch.device) -> int:
    """Attack --model, measure by --judge too, and print the table and the checks."""
    flags = {
        f"--{key} {text}": text for key in ("model", "judge") if (text := getattr(config, key))
    }
    print(f"{', '.join(flags)}: runs this Python code with your rights", flush=True)
    loaded = {flag: model.load_model(flag, text, device) for flag, text in flags.items()}
    with run.rank_0_first():
        people = judged_people(config, args.run, {})
    faces, name, effort = people.faces, model.model_name(config.model), effort_of("", config)
    n = faces.person.bincount()
    pairs = sum(min(config.intruders, len(faces) - int(n[p])) for p in people.targets)
    about = f"{config.size} x {config.size}, crop {faces.crop or 'none'}, {len(people.targets)} "
    about += f"targets of {len(n)} persons, {pairs} pairs, preset {config.preset}: "
    about += f"{effort.iterations} iterations x {effort.restarts}, {effort.optimiser}"
    persons = [*dict.fromkeys([*people.targets, *people.near, *people.far])][:30]
    index = [i for p in persons for i in (faces.person == p).nonzero().flatten()[:4].tolist()]
    images, person = (x[index].to(device) for x in (faces.images, faces.person))
    for flag, (embed, _) in loaded.items():
        with model.user_code(flag, f"fails on the first images, {device}"):
            check_gradient(embed, to_float(images[:4]))
    unknown = "nothing is known of the persons that it was trained on"
    print(f"{name}: {about}; {unknown}", flush=True)
    cosine, embeds, digests = config.distance == "cosine", [], []
    for flag, (embed, file) in loaded.items():
        lines = model.check_clean(flag, embed, images, person, cosine, config.chunk)
        if run.rank() == 0 and "as given" in lines[-1]:
            picture = args.run / name / "input.png"
            shown = [int((faces.person == p).nonzero()[0]) for p in people.near[:6]]
            model.picture_for(picture, faces.images[shown])
            lines[-1] += f": look at {picture}, what the model got"
        whose = f"{model.model_name(flags[flag])}: " if config.judge else ""
        print(*(f"{whose}{line}" for line in lines), sep="\n", flush=True)
        with model.user_code(flag, "fails on random images"):
            digest = model.model_digest(embed, file, fixed_images(config.size).to(device))
        digests.append(digest)
        embeds.append(model.Cosine(embed) if cosine else embed)
    made_with = settings_of(config, people) | dict(zip(("embedding", "judge"), digests))
    settings = {"config": made_with, "seed": config.seed, "data": faces.data}
    settings |= {"model": config.model, "judge": config.judge} | run.machine(device)
    embed, judge = embeds[0], embeds[1] if config.judge else None
    tables = open_tables(config, people, args.run / name / people.folder, settings, args.overwrite)
    with model.user_code(f"--model {config.model}"):
        # what verify.py needs to compare two photographs by it
        result = {key: made_with[key] for key in ("embedding", "size", "distance")}
        result |= {"crop": faces.crop, "persons": len(persons), "data": faces.data}
        result["threshold"] = genuine_threshold(embed, images, person)
        if run.rank() == 0:
            run.write(args.run / name / "result.json", result)
        make = functools.partial(attack_target, config, embed, judge, people, None, device)
        fill_tables(tables, config, people, make)
    figures = ["6", "roc", *(["7"] if "square" in config.attacks else [])]
    return print_table(args.run, people.folder, config.defences, figures)


def attack_run(argv: Sequence[str] | None) -> int:
    """Attack every embedding of a run, or --model."""
    config, args, record = parse(argv)
    device = run.start(args.device)
    images_64 = 128 if device.type == "cpu" else 2048  # larger images, fewer: as much memory
    chunk = config.chunk or max(1, images_64 * 64**2 // config.size**2)
    precision: Any = run.resolve_precision(config.precision, device)
    config = replace(config, chunk=chunk, precision=precision)
    if config.model:
        return attack_model(config, args, device)
    methods = choose_methods(config.method, args.run)
    with run.rank_0_first():
        people = judged_people(config, args.run, record)
    lord, work = None, []
    if "indirect" in config.attacks:
        try:
            lord, _ = load_generator(args.run / "generator.pt", device)
        except run.UsageError as error:
            raise run.UsageError(f"--attacks indirect: needs the generator: {error}") from None
    for method in methods:
        embed, settings = load_method(config, args.run / method, people, device)
        out = args.run / method / people.folder
        work.append((embed, open_tables(config, people, out, settings, args.overwrite)))
    for embed, tables in work:
        make = functools.partial(attack_target, config, embed, None, people, lord, device)
        fill_tables(tables, config, people, make)
    return print_table(args.run, people.folder, config.defences, ["2"])


def main(argv: Sequence[str] | None = None) -> int:
    """Do the command and return its exit status."""
    if run is None:
        raise SystemExit("attacks.py: the command needs the folder data/ beside it")
    return run.command("attacks.py", attack_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
