"""The embedding F: eq. (1)-(6), Sec. 2-3.1 and App. A, for our method and for every baseline.

    python embed.py --method ours                                # demo, rendered, two CPU cores
    python embed.py --method ours --preset paper --data celeba --root CELEBA    # the paper, one GPU
    python embed.py --verify A.jpg B.jpg --run runs/synthetic-demo-0   # eq. (1), two photographs
    python embed.py --verify A.jpg B.jpg                  # the same by the F of data/

In:  faces from `data/`; for `ours` and `no-at` the run's generator.pt (the demo's is in `data/`).
Out: runs/<data>-<preset>-<seed>/<method>/ with embedding.pt, log.jsonl, result.json, and in
     attacks/ the rows of clean and eyeglasses. The same command goes on after a stop.

x and t are real photographs of different persons, y and u are generated with x's identity: y shares
x's content, u shares t's. Images are float NCHW in [0, 1], 64 x 64; distances are Euclidean.

Measured (demo, rendered faces, two to six minutes a run on two x86-64 cores, seed 0, 20 targets):
clean AU-ROC 0.91, under eyeglasses 0.85; without the inner attack 0.91 and 0.80. The preset paper
has not been run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Every setting of the training; the defaults are the paper's, a preset replaces some."""

    preset: str = "paper"  # demo | paper | released; on the command line demo unless named
    method: str = "ours"  # ours | no-at | weak-at | doa
    positive: str = "reconstruct"  # Sec. 2: y = G(E_cl(x), E_co(x)); not in the paper: the others
    data: str = "celeba"  # synthetic | folder | celeba
    root: str = ""  # where the photographs are
    crop: str = ""  # lfw | centre | celeba | none; empty: by image size
    person_folder: str = ""  # first | last: which folder below root is the person's, if several
    seed: int = 0  # not in the paper: of the training, and of who is judged
    split_seed: int = 0  # not in the paper: who is train, validation, target
    train_persons: int = 9177  # Sec. 4: of the generator; 0: all that are left
    validation_persons: int = 100  # Sec. 4: of F, not trained on
    target_persons: int = 30  # Sec. 4.2: 30 drawn
    persons: int = 2000  # Sec. 4: of the train persons, those F is trained on; 0: all
    images: int = 0  # not in the paper: of each the first, that F may see; 0: all; 1: real y is x
    synthetic_persons: int = 370  # not in the paper: size of the rendered set
    synthetic_images: int = 12  # not in the paper: images of each rendered person
    width: float = 1.0  # Sec. 4: VGG16; less, not in the paper: a fraction of its channels
    dim: int = 128  # Sec. 4: of the embedding
    standardise: bool = False  # not in the paper: feed (x - 0.5) / 0.25, for a random start
    weights: str = ""  # released: a torchvision VGG16 file to start from; empty: random
    margin: float = 10.0  # Sec. 4: m of eq. (2)
    hinge: str = "distance"  # released: max(m - d, 0)^2; squared, eq. (2): max(m - d^2, 0)
    batch: int = 128  # App. A: quadruplets a step
    steps: int = 20000  # App. A: of the training
    lr: float = 1e-3  # App. A: Adam's
    lr_end: float = 1e-3  # App. A: constant; not in the paper: cosine down to this
    amsgrad: bool = False  # released: True, Adam's variant
    mine: int = 2  # App. A: n_m, candidates t of which the nearest to u is taken
    shift: int = 5  # App. A: pixels, at most
    cutout: float = 0.5  # App. A: p, that an image is erased
    cutout_area: tuple[float, ...] = (0.02, 0.2)  # App. A: of the image
    cutout_aspect: tuple[float, ...] = (0.5, 2.0)  # App. A: height / width
    fill: str = "gaussian"  # App. A: what erased pixels become; released: uniform
    generate_from: str = "clean"  # Sec. 2; released: erased (augmented content)
    attack_steps: int = 10  # Sec. 4, App. A: of the inner attack
    attack_alpha: float = 16.0  # Sec. 4, App. A: length of a step of the inner attack, in 255ths
    attack_warmup: int = 0  # not in the paper: steps over which alpha grows from 0
    attacked: str = "auto"  # App. A: erased for ours, all for the others; or one of them
    weak_area: tuple[float, ...] = (0.02, 0.1)  # App. A: weak AT's rectangles
    masks: int = 0  # not in the paper: an image that has no patch is hidden by the worst of so many
    mask_side: int = 14  # not in the paper: of these, pixels, as of attacks.py's certificate
    candidates: int = 10  # Sec. 4: C of DOA, 4 or 10
    doa_size: int = 20  # App. A: side of DOA's square, pixels
    doa_stride: int = 5  # App. A: between the places searched, pixels
    validate_every: int = 50  # released: steps
    select: str = "auto"  # weights judged, last | best; App. B.3: best for weak AT only
    precision: str = "auto"  # not in the paper: float32 | tf32 | bfloat16, where fast
    compile: bool = False  # not in the paper: F and G by torch.compile

    @property
    def run(self) -> Path:
        return Path("runs") / f"{self.data}-{self.preset}-{self.seed}"

    @property
    def name(self) -> str:
        """Folder of this method in the run."""
        usual = PRESETS.get(self.preset, {}).get("attack_steps", Config.attack_steps)
        masked = "-masked" * (self.masks > 0)
        if self.method == "doa":
            return f"doa-{self.candidates}"
        if self.method == "weak-at" and self.attack_steps != usual:  # Fig. 5
            return f"weak-at-{self.attack_steps}{masked}"
        if not self.generated:
            return self.method + masked
        positive = f"-{self.positive}" * (self.positive != "reconstruct")
        return self.method + positive + "-all" * (self.attacked == "all") + masked

    @property
    def generated(self) -> bool:
        """Whether y and u come from the generator (Sec. 2) or are real photographs (eq. 6)."""
        return self.method in ("ours", "no-at")

    @property
    def attack_share(self) -> str:
        if self.attacked != "auto":
            return self.attacked
        return "erased" if self.generated else "all"

    @property
    def area(self) -> tuple[float, ...]:
        """Of the rectangles, as shares of the image."""
        return self.weak_area if self.method == "weak-at" else self.cutout_area

    @property
    def early_stopping(self) -> bool:
        return self.select == "best" or (self.select == "auto" and self.method == "weak-at")

    def alpha(self, step: int) -> float:
        """Step size of the inner attack, in 255ths, at a step of the training."""
        growth = min(step / self.attack_warmup, 1.0) if self.attack_warmup else 1.0
        return self.attack_alpha * growth


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"amsgrad": True, "fill": "uniform", "generate_from": "erased"},
    "demo": {"data": "synthetic", "train_persons": 0, "validation_persons": 40}
    | {"target_persons": 30, "persons": 0, "width": 0.125, "standardise": True}
    | {"batch": 24, "steps": 400, "lr": 2e-3, "lr_end": 1e-4}
    | {"attack_steps": 2, "attack_alpha": 64.0, "attack_warmup": 150},
}


# Patch operations in their shortest form; kernels/ takes their place where it is there


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool (B, 1, height, width), True inside boxes (B, 4) = (top, left, height, width)."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (B, 1)
    row, col = (torch.arange(n, device=boxes.device) for n in (height, width))
    rows, cols = (row >= top) & (row < top + h), (col >= left) & (col < left + w)
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def masked_step(x: Tensor, grad: Tensor, alpha: Tensor, boxes: Tensor) -> Tensor:
    """x + alpha (B,) * sign(grad) inside boxes (B, 4), clipped to [0, 1]; x, grad (B, C, H, W)."""
    stepped = (x + alpha.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)
    return torch.where(box_mask(boxes, *x.shape[2:]), stepped, x)


def gaussian_cutout(
    images: Tensor, *, fill: str, generator: torch.Generator | None, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Random pixels inside boxes (B, 4): `gaussian` N(0.5, 0.25^2) in [0, 1], or `uniform`, App. A.

    images (B, C, H, W). Returns images, boxes and bool (B,), which are erased.
    """
    images, erased = images.clone(), (boxes[:, 2] * boxes[:, 3]) > 0
    drawn = [(b, *box) for b, box in enumerate(boxes.tolist()) if box[2] and box[3]]
    C, device = images.shape[1], images.device
    flat = torch.empty(sum(C * h * w for *_, h, w in drawn), device=device)
    if fill == "uniform":
        flat.uniform_(generator=generator)
    else:
        flat.normal_(0.5, 0.25, generator=generator).clamp_(0, 1)
    for b, top, left, h, w in drawn:
        inside, flat = flat[: C * h * w], flat[C * h * w :]
        images[b, :, top : top + h, left : left + w] = inside.view(C, h, w)
    return images, boxes, erased


def augment(
    images: Tensor,
    *,
    flips: Tensor,
    shifts: Tensor,
    boxes: Tensor,
    fill: str = "gaussian",
    generator: torch.Generator | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor, Tensor]:
    """App. A: uint8 (B, 3, H, W) mirrored, shifted (edge filled), random pixels in boxes (B, 4).

    flips bool (B,), shifts (B, 2). Returns float images, boxes and bool (B,), which are erased.
    """
    _, _, H, W = images.shape
    row, col = (
        (torch.arange(n, device=images.device) + by).clamp(0, n - 1)
        for n, by in ((H, shifts[:, :1]), (W, shifts[:, 1:]))
    )
    col = torch.where(flips[:, None], W - 1 - col, col)  # (B, W)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[batch, row[:, :, None], col[:, None, :]]  # (B, H, W, C)
    moved = (moved.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=layout)
    return gaussian_cutout(moved, fill=fill, generator=generator, boxes=boxes)


def positions(H: int, W: int, h: int, w: int, stride: int) -> Tensor:
    """(P, 2) = (top, left) of h x w windows at every stride, the flush edge included."""
    tops, lefts = (sorted({*range(0, n + 1, stride), n}) for n in (H - h, W - w))
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts))


def window_energy(grad: Tensor, h: int, w: int, stride: int) -> Tensor:
    """Sum of squared gradient (B, C, H, W) in the windows of `positions` -> (B, P), Sec. 3.1."""
    windows = grad.float().square().sum(1).unfold(1, h, 1).unfold(2, w, 1).sum((-1, -2))
    H, W = grad.shape[2:]
    top, left = positions(H, W, h, w, stride).to(grad.device).unbind(1)
    return windows[:, top, left]


def painted(images: Tensor, grey: float, places: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Images (B, C, H, W), grey at the first of their places (B, K, 2), then at the second, ..."""
    sides = torch.tensor(size, device=places.device).expand_as(places)
    for boxes in torch.cat([places, sides], 2).unbind(1):
        yield torch.where(box_mask(boxes, *images.shape[2:]), grey, images)


def local_attack(attack: Callable, embed: Embed, *inputs: Tensor) -> Tensor:
    """attack(embed, *inputs); the kernel runs it on windows around the boxes alone, on a CPU."""
    return attack(embed, *inputs)


try:
    from kernels.augment import augment  # type: ignore[no-redef,assignment]
    from kernels.gaussian_cutout import gaussian_cutout  # type: ignore[no-redef,assignment]
    from kernels.masked_step import masked_step  # type: ignore[no-redef,assignment]
    from kernels.patch_local import local_attack  # type: ignore[no-redef,assignment]
    from kernels.place_patches import painted  # type: ignore[no-redef,assignment]
    from kernels.window_energy import window_energy  # type: ignore[no-redef,assignment]
except ImportError:
    pass


Range = tuple[float, ...]  # lowest, highest


def draw_boxes(
    B: int, H: int, W: int, p: float, area: Range, aspect: Range, rng: torch.Generator
) -> Tensor:
    """Random rectangles (B, 4) = (top, left, height, width), App. A; with 1 - p a row is all zero.

    Share of the image ~ U(area), height / width ~ U(aspect), redrawn until it fits (the first of 32
    that does), placed uniformly. Drawn on the device of rng.
    """
    u = torch.rand(6, B, 32, generator=rng, device=rng.device)
    share, ratio = (low + (high - low) * v for (low, high), v in zip((area, aspect), u))
    h, w = ((v * (H * W)).sqrt().round().clamp(min=1) for v in (share * ratio, share / ratio))
    first = ((h <= H) & (w <= W)).to(torch.uint8).argmax(1, keepdim=True)  # of (B, 32)
    h, w = h.gather(1, first)[:, 0].clamp(max=H), w.gather(1, first)[:, 0].clamp(max=W)
    top, left = (u[4, :, 0] * (H - h + 1)).floor(), (u[4, :, -1] * (W - w + 1)).floor()
    boxes = torch.stack((torch.minimum(top, H - h), torch.minimum(left, W - w), h, w), 1)
    return boxes.long() * (u[5, :, :1] < p)


def draw_moves(B: int, shift: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """App. A: mirror or not, bool (B,); offsets (B, 2) = (down, right), at most `shift` pixels."""
    flips = torch.rand(B, generator=rng, device=rng.device) < 0.5
    return flips, torch.randint(-shift, shift + 1, (2, B), generator=rng, device=rng.device).T


# The embedding (Sec. 4)

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pool


class Embedding(nn.Module):
    """F: VGG16 trunk, linear layer with weight rows of unit norm. (B, 3, 64, 64) -> (B, dim)."""

    def __init__(self, width: float = 1.0, dim: int = 128, standardise: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for channels in VGG16:
            if channels:
                channels = max(round(channels * width), 1)
                layers += [nn.Conv2d(previous, channels, 3, padding=1), nn.ReLU(inplace=True)]
                previous = channels
            else:
                layers.append(nn.MaxPool2d(2))
        self.trunk = nn.Sequential(*layers)
        self.weight = nn.Parameter(torch.randn(dim, 2 * 2 * previous))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.standardise = standardise
        for m in self.trunk:
            if isinstance(m, nn.Conv2d):  # thirteen without normalisation: keep the variance
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                nn.init.zeros_(m.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(self.standardised(images)))

    def standardised(self, images: Tensor) -> Tensor:
        images = (images - 0.5) * 4 if self.standardise else images
        return images.contiguous(memory_format=torch.channels_last)

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), F.normalize(self.weight, dim=1), self.bias)

    def load_vgg(self, state: dict[str, Tensor]) -> None:
        """Start the trunk from a torchvision VGG16 state dict. Raises KeyError or RuntimeError."""
        features = "features."
        own = {k[len(features) :]: v for k, v in state.items() if k.startswith(features)}
        self.trunk.load_state_dict(own)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_2^2 of features (B, D), (B, D) -> (B,)."""
    return (a - b).square().sum(1)


def different(candidate: Tensor, target: Tensor, delta: float) -> Tensor:
    """Eq. (1): D(t; x), bool (B,), True where features (B, D) are not of the same person."""
    # Eq. (1)
    return squared_distance(candidate, target).sqrt() >= delta


def two_pair_loss(
    fx: Tensor, fy: Tensor, ft: Tensor, fu: Tensor, margin: float, hinge: str = "distance"
) -> Tensor:
    """Two-pair contrastive loss of features (B, D), mean over the batch.

    hinge `squared` is eq. (2) as printed; it has no gradient where F(t) = F(u), so a constant F is
    a stationary point. `distance` is max(m - d, 0)^2 as in the authors' code: there its gradient is
    2 m.
    """
    positive, negative = squared_distance(fx, fy), squared_distance(ft, fu)
    if hinge == "squared":
        # Eq. (2)
        return (positive + F.relu(margin - negative)).mean()
    return (positive + F.relu(margin - (negative + 1e-12).sqrt()).square()).mean()


# Quadruplets (Sec. 2, App. A)


class Sampler:
    """Draws x, t and their companions: a person uniformly, then an image of theirs; t is another's.

    images uint8 (N, 3, H, W) and person int64 (N,) with values 0..P-1, on the device of the draws.
    """

    def __init__(self, images: Tensor, person: Tensor) -> None:
        self.images, self.person = images, person
        order = person.argsort(stable=True)
        self.count = person.bincount()
        shape = len(self.count), int(self.count.max())
        self.table = torch.zeros(shape, dtype=torch.long, device=images.device)
        starts = self.count.cumsum(0) - self.count
        column = torch.arange(len(person), device=images.device) - starts[person[order]]
        self.table[person[order], column] = order
        several = (self.count > 1).nonzero()[:, 0]  # who can give a real positive pair
        self.several = several if len(several) else self.count.nonzero()[:, 0]

    def image_of(self, person: Tensor, rng: torch.Generator) -> Tensor:
        """One image index of each person (B,)."""
        r = torch.rand(person.shape, generator=rng, device=person.device)
        return self.table[person, (r * self.count[person]).long()]

    def draw(
        self, batch: int, mine: int, rng: torch.Generator, pairs: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image indices x (B,), a companion (B,) and candidates t (B, mine) of other persons.

        The companion is another image of x's person if `pairs` (eq. 6), x itself where nobody has
        two; else any other image.
        """
        device, P = self.images.device, len(self.count)
        r = torch.rand(batch, generator=rng, device=device)
        person = self.several[(r * len(self.several)).long()] if pairs else (r * P).long()
        x = self.image_of(person, rng)
        if pairs:
            r = torch.rand(batch, generator=rng, device=device)
            k = (r * (self.count[person] - 1)).long()  # a place among the others
            other = self.table[person, k]
            last = self.table[person, self.count[person] - 1]
            other = torch.where(other == x, last, other)
        else:
            other = torch.randint(len(self.person), (batch,), generator=rng, device=device)
        others = torch.randint(1, P, (batch, mine), generator=rng, device=device)
        return x, other, self.image_of((person[:, None] + others) % P, rng)


class Generated:
    """y and u (Sec. 2): G over codes computed once; identity and content are image indices.

    z_cl (N, class_dim), z_co (N, content_dim): E_cl and E_co of the N images; copies: half
    (N, 3, H, W), G(z_cl, z_co), as a copy of x is always the same; E_co: released, where content
    comes from pixels.
    """

    def __init__(
        self,
        G: Callable[[Tensor, Tensor], Tensor],
        z_cl: Tensor,
        z_co: Tensor,
        copies: Tensor | None = None,
        E_co: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.G, self.z_cl, self.z_co, self.copies, self.E_co = G, z_cl, z_co, copies, E_co

    def __call__(self, identity: Tensor, content: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) with the identity of images (B,) and the content of images (B,)."""
        if self.E_co is not None and pixels is not None:
            return self.G(self.z_cl[identity], self.E_co(pixels))
        if self.copies is not None and content is identity:
            return self.copies[identity].float()
        return self.G(self.z_cl[identity], self.z_co[content])


class Quadruplets(NamedTuple):
    """A batch after augmentation and mining, before any attack; y and u are never augmented."""

    x: Tensor  # (B, 3, H, W), as y, t and u
    y: Tensor
    t: Tensor
    u: Tensor
    x_boxes: Tensor  # (B, 4), what is erased of x; all zero: nothing
    t_boxes: Tensor
    fy: Tensor  # (B, dim), F(y) and F(u): constants of the inner attack
    fu: Tensor
    drawn: Tensor  # indices of x and of every candidate t


@torch.no_grad()
def quadruplets(
    config: Config, embed: Embed, people: Sampler, made: Generated | None, rng: torch.Generator
) -> Quadruplets:
    """x, y, t, u of Sec. 2; without `made` real pairs, eq. (6).

    Not in the paper: positive `transfer` takes y = G(E_cl(x), E_co(x')), x' any other image;
    `mixed` does so in one half of the batch and has real pairs in the other.
    """
    B, n, size = config.batch, config.mine, people.images.shape[-1]
    if made is not None and config.positive == "mixed":
        sizes = (None, B // 2), (made, B - B // 2)
        parts = [dataclasses.replace(config, positive="transfer", batch=b) for _, b in sizes]
        both = [quadruplets(c, embed, people, m, rng) for c, (m, _) in zip(parts, sizes)]
        return Quadruplets(*map(torch.cat, zip(*both)))
    xi, other, ti = people.draw(B, n, rng, pairs=made is None)
    index = torch.cat([xi, ti.flatten()])  # x, then the candidates of each x
    flips, shifts = draw_moves(len(index), config.shift, rng)
    p = config.cutout if config.attack_share == "erased" or config.method == "no-at" else 0.0
    boxes = draw_boxes(len(index), size, size, p, config.area, config.cutout_aspect, rng)
    moves: dict[str, Any] = {"flips": flips, "shifts": shifts, "boxes": boxes}
    real, boxes, _ = augment(people.images[index], fill=config.fill, generator=rng, **moves)
    x, t = real[:B], real[B:]  # (B, 3, H, W), (B n, 3, H, W)
    if made is None:
        flips, shifts = draw_moves(B, config.shift, rng)
        moves |= {"flips": flips, "shifts": shifts, "boxes": torch.zeros_like(boxes[:B])}
        y = augment(people.images[other], generator=rng, **moves)[0]
        # Eq. (6): u = y
        u, reference = y.repeat_interleave(n, 0), x
    else:
        # y = G(E_cl(x), E_co(x))
        y = made(xi, other) if config.positive == "transfer" else made(xi, xi, x)
        # u = G(E_cl(x), E_co(t))
        u = made(xi.repeat_interleave(n), ti.flatten(), t)
        reference = u
    # App. A: of n_m candidates the nearest negative to u, for the baselines to x
    fy, ft, fr = embed(torch.cat([y, t, reference])).split([B, B * n, len(reference)])
    fu = fy.repeat_interleave(n, 0) if made is None else fr
    fr = fr.repeat_interleave(B * n // len(fr), 0)
    nearest = squared_distance(ft, fr).view(B, n).argmin(1)
    pick = torch.arange(B, device=x.device) * n + nearest
    return Quadruplets(x, y, t[pick], u[pick], boxes[:B], boxes[B:][pick], fy, fu[pick], index)


# The inner problem (Sec. 2.3, 3.1)


def inner_attack(
    embed: Embed, images: Tensor, anchors: Tensor, alpha: Tensor, boxes: Tensor, steps: int
) -> Tensor:
    """The inner maximisation of eq. (4)-(6): sign gradient steps inside boxes, from what is there.

    images (B, 3, H, W); anchors (B, D), constants; alpha (B,): positive moves away from the anchor
    (x from y), negative towards it (t to u); boxes (B, 4). Returns images, detached.
    """
    for _ in range(steps):
        images = images.detach().requires_grad_()
        # Eq. (5): both terms, each sample on its own; no gradient of a weight is computed
        (grad,) = torch.autograd.grad(squared_distance(embed(images), anchors).sum(), images)
        images = masked_step(images.detach(), grad.to(images.dtype), alpha, boxes)
    return images.detach()


def doa_boxes(
    config: Config, embed: Embed, images: Tensor, anchors: Tensor, sign: Tensor
) -> Tensor:
    """Where DOA puts its square (Sec. 3.1; Wu et al. 2020): boxes (B, 4).

    The C windows of the largest squared gradient are each painted grey, and the one that serves the
    adversary best wins: the largest distance to the anchor where sign is +1, the smallest where -1.
    """
    size, (H, W) = config.doa_size, images.shape[2:]
    places = positions(H, W, size, size, config.doa_stride).to(images.device)
    images = images.detach().requires_grad_()
    (grad,) = torch.autograd.grad(squared_distance(embed(images), anchors).sum(), images)
    grad = grad.contiguous(memory_format=torch.channels_last)
    energy = window_energy(grad, size, size, config.doa_stride)
    best = places[energy.topk(min(config.candidates, len(places)), 1).indices]  # (B, K, 2)
    with torch.no_grad():  # one candidate of each image at a time: nothing is K times the batch
        grey = painted(images.detach(), 0.5, best, (size, size))
        d = torch.stack([squared_distance(embed(x), anchors) for x in grey], 1)  # (B, K)
    winner = best[torch.arange(len(d), device=d.device), (d * sign[:, None]).argmax(1)]
    return torch.cat([winner, torch.full_like(winner, size)], 1)


def around(images: Tensor, boxes: Tensor) -> Tensor:
    """Images (B, C, H, W) with, inside boxes (B, 4), the mean of the next pixels outside, up, down,
    left and right, each over its distance: as the masks of attacks.py's certificate are filled."""
    (B, _, H, W), device = images.shape, images.device
    top, left, h, w = boxes[:, :, None, None].unbind(1)  # (B, 1, 1)
    row, col = torch.arange(H, device=device)[:, None], torch.arange(W, device=device)
    batch, pixels = torch.arange(B, device=device)[:, None, None], images.permute(0, 2, 3, 1)
    total = weights = torch.zeros(B, H, W, 1, device=device)
    for r, c in ((top - 1, col), (top + h, col), (row, left - 1), (row, left + w)):
        inside = (r >= 0) & (r < H) & (c >= 0) & (c < W)
        weight = (inside / ((r - row).abs() + (c - col).abs()).clamp(min=1))[..., None]
        near = pixels[batch, r.clamp(0, H - 1), c.clamp(0, W - 1)]
        total, weights = total + weight * near, weights + weight
    filled = (total / weights.clamp(min=1e-6)).permute(0, 3, 1, 2).to(images.dtype)
    return torch.where(box_mask(boxes, H, W), filled, images)


@torch.no_grad()
def hidden(
    config: Config,
    embed: Embed,
    images: Tensor,
    anchors: Tensor,
    sign: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """Not in the paper: images (N, 3, H, W), each under the mask, of `masks` random ones, that
    moves it farthest from its anchor where sign (N,) is +1, nearest where -1: greedy cutout (Saha
    et al. 2023), for what the certificate will ask."""
    worst, reached, side = images, torch.full_like(sign, -math.inf), config.mask_side
    ends = [n - side + 1 for n in images.shape[2:]]
    for _ in range(config.masks):
        drawn = torch.rand(2, len(images), generator=rng, device=rng.device)
        corner = torch.stack([(u * end).long() for u, end in zip(drawn, ends)], 1)
        tried = around(images, torch.cat([corner, torch.full_like(corner, side)], 1))
        d = squared_distance(embed(tried), anchors) * sign
        worst = torch.where((d > reached)[:, None, None, None], tried, worst)
        reached = torch.maximum(d, reached)
    return worst


def attacked(
    config: Config, embed: Embed, q: Quadruplets, alpha: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x and t of the batch after the inner attack of the method (Sec. 2.3, 3.1, App. A)."""
    if config.method == "no-at" and not config.masks:
        return q.x, q.t
    (B, _, H, W), images = q.x.shape, torch.cat([q.x, q.t])
    anchors, boxes = torch.cat([q.fy, q.fu]), torch.cat([q.x_boxes, q.t_boxes])
    sign = torch.ones(2 * B, device=images.device)
    sign[B:] = -1.0  # x away from y, t towards u
    attack = functools.partial(inner_attack, steps=config.attack_steps)
    if config.attack_share == "all":
        if config.method == "doa":
            boxes = doa_boxes(config, embed, images, anchors, sign)
        else:
            boxes = draw_boxes(2 * B, H, W, 1.0, config.area, config.cutout_aspect, rng)
        images = gaussian_cutout(images, fill=config.fill, generator=rng, boxes=boxes)[0]
        images = local_attack(attack, embed, images, anchors, sign * (alpha / 255), boxes)
        return images[:B], images[B:]
    erased = boxes[:, 2] > 0  # only what is erased is attacked
    if len(chosen := erased.nonzero()[:, 0]) and config.method != "no-at":
        parts = images, anchors, sign * (alpha / 255), boxes
        found = local_attack(attack, embed, *(part[chosen] for part in parts))
        images = images.index_copy(0, chosen, found)
    if config.masks and len(chosen) < 2 * B:  # the others, found without another wait
        bare = erased.argsort(stable=True)[: 2 * B - len(chosen)]
        found = hidden(config, embed, images[bare], anchors[bare], sign[bare], rng)
        images = images.index_copy(0, bare, found)
    return images[:B], images[B:]


def train_step(
    config: Config,
    embed: Embedding,
    adam: torch.optim.Optimizer,
    people: Sampler,
    made: Generated | None,
    rng: torch.Generator,
    alpha: float,
) -> dict[str, float]:
    """One step of eq. (3), (4) or (6). Returns loss, mean distances and the gradient's norm.

    Raises FloatingPointError(what, indices of the images) where loss or gradient is not finite.
    """
    device, low = people.images.device.type, config.precision == "bfloat16"
    with torch.autocast(device, torch.bfloat16, low):
        q = quadruplets(config, embed, people, made, rng)
        x, t = attacked(config, embed, q, alpha, rng)
    # of its own: weights that were cast under no_grad would get no gradient
    with torch.autocast(device, torch.bfloat16, low):
        if made is None:
            fx, fy, ft = embed(torch.cat([x, q.y, t])).float().chunk(3)
            fu = fy
        else:
            fx, fy, ft, fu = embed(torch.cat([x, q.y, t, q.u])).float().chunk(4)
    # Eq. (3), (4), (6): the outer minimisation
    loss = two_pair_loss(fx, fy, ft, fu, config.margin, config.hinge)
    adam.zero_grad()
    loss.backward()
    apart = [squared_distance(*pair).detach().sqrt().mean() for pair in ((fx, fy), (ft, fu))]
    norm = nn.utils.get_total_norm([p.grad for p in embed.parameters() if p.grad is not None])
    values = torch.stack([loss.detach(), *apart, norm]).tolist()  # the one transfer to the host
    if not (math.isfinite(values[0]) and math.isfinite(values[3])):
        raise FloatingPointError(f"loss {values[0]}, gradient norm {values[3]}", q.drawn)
    adam.step()
    return dict(zip(("loss", "d_positive", "d_negative", "gradient"), values))


# Validation (Sec. 4, App. A)


@torch.no_grad()
def features(embed: Embed, images: Tensor, mirror: bool = False, batch: int = 256) -> Tensor:
    """Features (N, D) of images uint8 (N, 3, H, W), of their mirror images if asked."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: give uint8, 0 to 255")
    parts = (part.float() / 255 for part in images.split(batch))
    return torch.cat([embed(part.flip(3) if mirror else part) for part in parts])


def auroc(genuine: Tensor, intruder: Tensor) -> float:
    """Probability that an intruder (M,) lies farther than a genuine one (N,), ties one half."""
    ordered = genuine.sort().values
    below, level = (torch.searchsorted(ordered, intruder, right=right) for right in (False, True))
    return float((below + level).double().mean() / (2 * len(genuine)))


@torch.no_grad()
def validate(
    config: Config, embed: Embed, people: Sampler, rng: torch.Generator, pairs: int = 1000
) -> dict[str, float]:
    """Loss and AU-ROC on fresh pairs of held-out persons: x, another of theirs, one of another."""
    found = features(embed, people.images)
    xi, yi, ti = people.draw(pairs, 1, rng, pairs=True)
    fx, fy, ft = found[xi], found[yi], found[ti[:, 0]]
    return {
        "val_loss": float(two_pair_loss(fx, fy, ft, fx, config.margin, config.hinge)),
        "val_auroc": auroc(squared_distance(fx, fy), squared_distance(fx, ft)),
    }


@torch.no_grad()
def genuine_threshold(embed: Embed, images: Tensor, person: Tensor, fpr: float = 0.05) -> float:
    """The smallest delta of eq. (1) that refuses at most `fpr` of the genuine pairs of images uint8
    (N, 3, H, W) of person (N,), mirrored (Sec. 4.2, 4.3)."""
    views = [features(embed, images, mirror) for mirror in (False, True)]
    exact = "donot_use_mm_for_euclid_dist"  # products of matrices cancel
    found = []
    for p in person.unique():
        anchor, *both = (view[person == p] for view in (views[0], *views))
        apart = torch.stack([torch.cdist(anchor, view, compute_mode=exact) for view in both])
        squared = apart.square().mean(0)  # (n, n)
        found.append(squared[~torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)])
    return smallest_delta(torch.cat(found).sqrt(), fpr)


def smallest_delta(genuine: Tensor, fpr: float = 0.05) -> float:
    """The smallest delta of eq. (1) that refuses at most `fpr` of the genuine distances (n,)."""
    d = genuine.sort().values
    refused = math.floor(fpr * len(d) + 1e-9)
    return float(d[len(d) - 1 - refused].nextafter(d.new_tensor(math.inf)))


def collapsed(d_negative: float, config: Config) -> bool:
    """Whether F has become constant: the negatives' distance all but vanishes beside the margin."""
    margin = config.margin if config.hinge == "distance" else math.sqrt(config.margin)
    return d_negative < 0.02 * margin


def cosine(start: float, end: float, progress: float) -> float:
    """Cosine schedule from start to end; progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


# main

SHIPPED = Path(__file__).resolve().parent / "data" / "embedding_demo.pt"
CHOICES = {
    "method": ("ours", "no-at", "weak-at", "doa"),
    "positive": ("reconstruct", "transfer", "mixed"),
    "hinge": ("distance", "squared"),
    "data": ("synthetic", "folder", "celeba"),
    "person_folder": ("", "first", "last"),
    "fill": ("gaussian", "uniform"),
    "generate_from": ("clean", "erased"),
    "attacked": ("auto", "erased", "all"),
    "select": ("auto", "last", "best"),
    "precision": ("auto", "float32", "tf32", "bfloat16"),
    **{k: (0, 2**31 - 1) for k in ("seed", "split_seed", "train_persons", "persons", "images")},
    "attack_warmup": (0, 2**31 - 1),
    "validation_persons": (2, 2**31 - 1),
    "shift": (0, 63),
    "doa_size": (1, 64),
    "mask_side": (1, 64),
    "masks": (0, 1000),
    "width": (0.001, 16),
    "cutout": (0, 1),
    "cutout_area": (0.0001, 1),
    "weak_area": (0.0001, 1),
    "cutout_aspect": (0.01, 100),
    "lr": (1e-12, 1e3),
    "margin": (1e-6, 1e6),
    "attack_alpha": (0, 255),
}


def parse(argv: Sequence[str] | None):
    """Config and flags. Raises run.UsageError."""
    from data import run

    photographs = {"nargs": 2, "metavar": ("A", "B")}
    config, args = run.parse(
        Config,
        PRESETS,
        argv,
        "Train and judge the embedding F (Sec. 2-4).",
        CHOICES,
        verify={**photographs, "help": "are these two photographs of one person? (eq. 1)"},
        certified={"action": "store_true", "help": "with --verify: what no patch could change"},
        model={"help": "of --verify: FILE.py:NAME, judged by attacks.py in --run, in place of F"},
        no_evaluation={"action": "store_true", "help": "train only"},
        export={"type": Path, "help": "write the run's trained F to this file, half precision"},
    )
    for name in ("persons", "train_persons"):
        if getattr(config, name) == 1:
            flag = "--" + name.replace("_", "-")
            raise run.UsageError(f"{flag} 1: give 2 or more, or 0 for all: t is of another person")
    for name in ("cutout_area", "cutout_aspect", "weak_area"):
        low, high = getattr(config, name)
        if low > high:
            flag = "--" + name.replace("_", "-")
            raise run.UsageError(f"{flag} {low},{high}: give two numbers, the lower first")
    if args.certified and not args.verify:
        raise run.UsageError("--certified: it is that of --verify A B")
    if args.model and not args.verify:
        raise run.UsageError("--model: it is that of --verify; attacks.py --model judges a model")
    if config.masks and config.attack_share == "all":
        raise run.UsageError("--masks: no image is left without a patch: add --attacked erased")
    if config.method == "doa" and config.attacked == "erased":
        raise run.UsageError("--attacked erased: DOA searches a place in every image: leave it out")
    return config, args


def load_embedding(path: str | Path, device: str | torch.device = "cpu") -> Embedding:
    """A trained F in eval mode, without weight gradients. Raises run.UsageError."""
    from data import run

    content = run.load(path, "embedding")
    with run.reading(path, "weights and settings do not fit together: train it again"):
        sizes = [content["config"][k] for k in ("width", "dim", "standardise")]
        with torch.device("meta"):  # costs nothing, whatever the settings say
            shapes = {k: v.shape for k, v in Embedding(*sizes).state_dict().items()}
        if shapes != {k: v.shape for k, v in content["model"].items()}:
            raise ValueError("shapes differ")
        embed = Embedding(*sizes)
        embed.load_state_dict(content["model"])
    return embed.to(device).eval().requires_grad_(False)


def sampler_of(faces, index: Tensor, device: torch.device) -> Sampler:
    """Draws from these images (N,) of the faces (`data.Faces`), their persons numbered from 0."""
    person = faces.person[index].unique(return_inverse=True)[1]
    return Sampler(faces.images[index].to(device), person.to(device))


def generator_file(config: Config, folder: Path) -> Path | None:
    """The run's generator; for the demo on rendered faces the one in data/. None for real pairs."""
    import generator
    from data import run

    path = folder / "generator.pt"
    shipped = Path(__file__).resolve().parent / "data" / "generator_demo.pt"
    if not config.generated:
        return None
    demo = (config.preset, config.data) == ("demo", "synthetic") and shipped.exists()
    with run.rank_0_first():
        if demo and not path.exists():
            run.write(path, shipped.read_bytes())
            print(f"generator: the demo's own, from data/{shipped.name}")
    if not path.exists():
        preset = "demo" if config.preset == "demo" else "paper"
        usual = generator.Config(**{**generator.PRESETS[preset], "preset": preset})
        names = ("data", "root", "crop", "person_folder", "seed", "split_seed", "train_persons")
        names += ("validation_persons", "target_persons", "synthetic_persons", "synthetic_images")
        flags = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(usual, n)}
        told = "".join(f" --{n.replace('_', '-')} {v}" for n, v in flags.items())
        command = f"python generator.py --preset {preset}{told} --run {folder}"
        raise run.UsageError(f"{path}: no generator in this run yet: {command}")
    return path


def generated(config: Config, path: Path, faces, split, people: Sampler) -> Generated:
    """How y and u of the sampler's persons are made by the generator in the file."""
    import generator
    from data import run

    lord, content = generator.load_generator(path, people.images.device)
    if config.compile:
        run.compile_(lord.generator)
    held_out = {faces.names[p] for p in (*split.validation, *split.target)}
    if seen := held_out & {*content["train"]}:
        told = f"trained on {len(seen)} of the validation or target persons ({min(seen)}, ...)"
        raise run.UsageError(f"{path}: {told}: train one with generator.py on this split")
    z_cl, z_co = generator.encode(lord, people.images)
    if config.generate_from == "erased":  # released: one class code a person, of the first image
        persons = range(len(people.count))
        first = torch.stack([(people.person == p).nonzero()[0, 0] for p in persons])
        z_cl = z_cl[first[people.person]]
        return Generated(lord.generator, z_cl, z_co, E_co=lord.content_encoder)
    copied = config.positive == "reconstruct"
    copies = generator.decode(lord, z_cl, z_co).half() if copied else None
    return Generated(lord.generator, z_cl, z_co, copies)


def trained_on(config: Config, faces, split) -> Tensor:
    """Indices of the images that F is trained on."""
    import data
    from data import run

    if config.persons > len(split.train):
        told = f"--persons {config.persons}: there are only {len(split.train)} train persons"
        raise run.UsageError(f"{told}: ask for fewer")
    index = data.images_of(faces, split.train[: config.persons or None], config.images)
    real = "--positive mixed" if config.positive == "mixed" else ""
    real = real if config.generated else f"--method {config.method}"
    if real and config.images != 1 and int(faces.person[index].bincount().max()) < 2:
        told = "needs train persons with two images or more, there is none: give more photographs"
        raise run.UsageError(f"{real}: {told}, or --images 1: y is x, moved otherwise")
    return index


def new_embedding(config: Config, device: torch.device) -> Embedding:
    """F at its start: random, or VGG16's weights."""
    from data import run

    torch.manual_seed(config.seed)
    embed = Embedding(config.width, config.dim, config.standardise)
    if config.weights:
        import generator

        state = generator.read_vgg(config.weights, "--weights")
        with run.reading(config.weights, "--weights: it starts F at --width 1"):
            embed.load_vgg(state)
    return embed.to(device)


def train(argv: Sequence[str] | None) -> int:
    """`python embed.py`: F by one method, then its evaluation."""
    import data
    from data import run

    config, args = parse(argv)
    device, folder = run.start(args.device), args.run / config.name
    if args.verify:
        return verify(config, args, device)
    if args.export:
        return export(config, args, device)
    config = dataclasses.replace(config, precision=run.precision(config.precision, device))
    run.tf32(config.precision == "tf32")
    share = dataclasses.replace(config, batch=run.share("--batch", config.batch))
    with run.rank_0_first():
        faces, split = data.open_run(config, args.run)
    index = trained_on(config, faces, split)
    people = sampler_of(faces, index, device)
    held_out = sampler_of(faces, data.images_of(faces, split.validation), device)
    embed, file = new_embedding(config, device), generator_file(config, args.run)
    adam = torch.optim.Adam(
        embed.parameters(), lr=config.lr, amsgrad=config.amsgrad, fused=device.type == "cuda"
    )
    run.average_gradients(adam)
    # of rendered faces the factors: how a pixel is rounded depends on the number of threads
    images = people.images if faces.identity is None else faces.identity
    made_of = {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "root"},
        "people": run.read_json(args.run / "people.json")["sha256"],
        "images": run.fingerprint(images, faces.content),
        "generator": run.fingerprint(file) if file else "",
    }
    training = run.Training(folder, made_of, args.overwrite, model=embed, adam=adam)
    if training.done:
        print(f"{folder} is trained already (--overwrite trains it again)")
        return 0 if args.no_evaluation else evaluate(config, args)
    made = generated(config, file, faces, split, people) if file else None
    if config.compile:
        run.compile_(embed)
    told = f"{len(people.images)} images of {len(people.count)} persons, {config.steps} steps"
    print(f"{config.name}: {told} of {config.batch} on {device}, {config.precision}", flush=True)

    rng = torch.Generator(device)
    while training.step < config.steps:
        step = training.step
        rng.manual_seed(run.step_seed(config.seed, step))
        adam.param_groups[0]["lr"] = cosine(config.lr, config.lr_end, step / config.steps)
        try:
            found = train_step(share, embed, adam, people, made, rng, config.alpha(step))
        except FloatingPointError as error:
            what, drawn = error.args
            left = training.left_by(drawn, faces.files, index)
            raise FloatingPointError(f"step {step + 1}: {what}; {left}") from None
        training.count(**found)
        if training.step % config.validate_every and training.step < config.steps:
            continue
        rng.manual_seed(run.step_seed(config.seed, 500_009 + training.step))
        found = validate(config, embed, held_out, rng)
        keep = training.step == config.steps
        if config.early_stopping:  # App. B.3
            keep = found["val_auroc"] > training.best
            training.best = max(found["val_auroc"], training.best)
        if keep and run.rank() == 0:
            about = {"config": made_of["config"], "people": made_of["people"]}
            state = {"commit": run.commit(), "step": training.step, "model": embed.state_dict()}
            run.save(folder / "embedding.pt", "embedding", **about, **state)
        line = training.log(config.steps, **found)
        if collapsed(line.get("d_negative", math.inf), config):
            told = f"mean negative distance {line['d_negative']:.3g}"
            print(f"WARNING: {told}: F has become a constant (try --hinge distance, a lower --lr)")
    run.barrier()
    judged = load_embedding(folder / "embedding.pt", device)
    delta = genuine_threshold(judged, held_out.images, held_out.person)
    selected = "best" if config.early_stopping else "last"
    training.end(threshold=delta, selected=selected, **run.record(device))
    print(f"wrote {folder}/embedding.pt, log.jsonl, result.json")
    return 0 if args.no_evaluation else evaluate(config, args)


def evaluate(config: Config, args) -> int:
    """The target persons, clean and under eyeglasses, mirroring and selection; then the table."""
    from data import run

    preset = "demo" if config.preset == "demo" else "paper"
    flags = ["--run", str(args.run), "--method", config.name, "--preset", preset]
    flags += ["--seed", str(config.seed), *(["--device", args.device] if args.device else [])]
    flags += ["--attacks=clean,eyeglasses", *(["--overwrite"] if args.overwrite else [])]
    if (code := run.then("attacks", flags)) or run.rank():
        return code
    return run.then("metrics", ["--run", str(args.run), "--figures", "2"])


def export(config: Config, args, device: torch.device) -> int:
    """Writes the run's F to a file of its own, in half precision, with its threshold."""
    import data
    from data import run

    file = args.run / config.name / "embedding.pt"
    content, judged = run.load(file, "embedding"), load_embedding(file, device).half().float()
    faces, split = data.open_run(config, args.run)
    held_out = sampler_of(faces, data.images_of(faces, split.validation), device)
    delta = genuine_threshold(judged, held_out.images, held_out.person)
    content["model"] = {k: v.half() for k, v in content["model"].items()}
    run.save(args.export, **content, threshold=delta)
    print(f"wrote {args.export}, threshold {delta:.4g}")
    return 0


def shipped_run(folder: Path = Path("runs/shipped")) -> tuple[Path, str]:
    """A run that holds the F of data/, for who has trained none: (folder, method)."""
    import data
    from data import run

    content = run.load(SHIPPED, "embedding")
    config = Config(**content["config"])
    told = "trained on rendered faces; train one by embed.py, or name another --run"
    print(f"F: data/{SHIPPED.name}, {config.name}, {told}", flush=True)
    data.open_run(config, folder)
    own = folder / config.name
    run.write(own / "embedding.pt", SHIPPED.read_bytes())
    result = {"threshold": content["threshold"], "commit": content["commit"]}
    run.write(own / "result.json", result | {"made_of": {"config": content["config"]}})
    return folder, config.name


def verify(config: Config, args, device: torch.device) -> int:
    """Eq. (1) for two photographs, with mirroring, by the run's F or by a model judged in it."""
    import data
    from data import certificate, model, run

    name = model.model_name(args.model) if args.model else config.name
    if args.run == config.run and not args.run.exists() and not args.model:
        args.run, name = shipped_run()
    file = args.run / name / "result.json"
    advice = "train to the end first, or name another --run"
    if args.model:
        advice = f"let attacks.py --model {args.model} judge it first, or name its --run"
    held = run.read_json(file, advice)
    with run.reading(file, advice):
        delta, size = float(held["threshold"]), int(held.get("size", data.SIZE))
        if not 0 < delta < math.inf:
            raise ValueError(f"threshold {delta}")
        told = "genuine validation pairs"
        if args.model:
            told = f"the genuine pairs of {held['persons']} persons"
    crop = config.crop or (held if args.model else run.read_json(args.run / "run.json")).get("crop")
    pair = (data.load_image(Path(p), crop=crop or None, size=size) for p in args.verify)
    target, candidate = (image[None].to(device) for image in pair)
    if args.model:
        embed = model.known(args.model, held, candidate)
    else:
        embed = load_embedding(file.with_name("embedding.pt"), device)
    views = torch.cat([features(embed, candidate, mirror) for mirror in (False, True)], 1)
    anchor = torch.cat([features(embed, target)] * 2, 1)
    views, anchor = views / math.sqrt(2), anchor / math.sqrt(2)  # the mean over both views
    distance = float(squared_distance(views, anchor).sqrt())
    answer = "NOT the same person" if bool(different(views, anchor, delta)) else "same person"
    print(f"distance {distance:.3f}  threshold {delta:.3f} (5 % of {told} refused)  {answer}")
    if args.certified:
        print(certificate.certified(file.parent / "attacks", embed, target, candidate))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    try:
        from data import run
    except ModuleNotFoundError:
        raise SystemExit("embed.py: the command needs the folder data/ beside it") from None
    return run.command("embed.py", train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
