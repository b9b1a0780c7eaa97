"""The embedding F: eq. (1)-(6), Sec. 2-3.1 and App. A, for our method and for every baseline.

    python embed.py --method ours                                # demo, rendered, two CPU cores
    python embed.py --method ours --preset paper --data celeba --root CELEBA    # the paper, one GPU

In:  faces from `data/`; the run's generator.pt, but for weak-at and doa (demo: data/demo/).
Out: runs/<data>-<preset>-<seed>/<method>/ with embedding.pt, log.jsonl, result.json, and in
     attacks/ the rows of clean and eyeglasses. After a stop the same command continues.

x and t are real photographs of different persons, y and u are generated with x's identity: y shares
x's content, u shares t's. Images are float NCHW in [0, 1], 64 x 64; distances are Euclidean.

Measured (demo, rendered faces, two to six minutes a run on two x86-64 cores, seed 0, 20 targets):
clean AU-ROC 0.85, under eyeglasses 0.82; mixed: 0.93 and 0.90. The preset paper
has not been run.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import data
    from data import run
except ImportError:
    data = run = None  # type: ignore[assignment]
try:
    import generator
except ImportError:
    generator = None  # type: ignore[assignment]

Embed = Callable[[Tensor], Tensor]
Range = tuple[float, ...]  # lowest, highest
Rng = torch.Generator


@dataclass(frozen=True)
class Config:
    """Hold every setting of the training; the defaults are the paper's, a preset replaces some."""

    preset: str = "paper"  # demo | paper; the command line takes demo unless it names one
    # Sec. 2-3.1, App. B.1; not in the paper: transfer and mixed
    method: Literal["ours", "transfer", "mixed", "no-at", "weak-at", "doa"] = "ours"
    data: Literal["synthetic", "folder", "celeba"] = "celeba"  # Sec. 4: CelebA
    root: str = ""  # folder of the photographs
    crop: str = ""  # lfw | centre | celeba | none (empty: chosen by the size of the images)
    # which folder below root names the person, where photographs lie several folders deep
    person_folder: Literal["", "first", "last"] = ""
    seed: int = 0  # not in the paper: seed of the training and of the choice of intruders
    split_seed: int = 0  # not in the paper: seed of the split in train, validation, target persons
    train_persons: int = 9177  # Sec. 4: persons that train the generator (0: all that are left)
    validation_persons: int = 100  # Sec. 4: persons that validate F
    target_persons: int = 30  # Sec. 4.2: persons that are attacked
    persons: int = 2000  # Sec. 4: train on so many of the train persons (0: all)
    images: int = 0  # not in the paper: use only the first n images of each person (0: all)
    synthetic_persons: int = 370  # not in the paper: persons in the rendered set
    synthetic_images: int = 12  # not in the paper: images of each rendered person
    width: float = 1.0  # Sec. 4: VGG16's channels are multiplied by this
    dim: int = 128  # Sec. 4: dimension of the embedding
    standardise: bool = False  # not in the paper: feed (x - 0.5) / 0.25, for a random start
    weights: str = ""  # not in the paper: torchvision VGG16 file to start from (empty: random)
    margin: float = 10.0  # Sec. 4: m of eq. (2)
    # distance: max(m - d, 0)^2 as in the authors' code; squared: max(m - d^2, 0) of eq. (2)
    hinge: Literal["distance", "squared"] = "distance"
    batch: int = 128  # App. A: quadruplets in a step
    steps: int = 20000  # App. A: steps of the training
    lr: float = 1e-3  # App. A: learning rate of Adam
    lr_end: float = 1e-3  # App. A: constant; not in the paper: decay to this by a cosine
    mine: int = 2  # App. A: n_m, candidates t of which the one nearest to u is kept
    shift: int = 5  # App. A: shift images by at most so many pixels
    cutout: float = 0.5  # App. A: p, the probability that an image is erased
    cutout_area: tuple[float, ...] = (0.02, 0.2)  # App. A: erase this share of the image
    cutout_aspect: tuple[float, ...] = (0.5, 2.0)  # App. A: height / width of what is erased
    attack_steps: int = 10  # Sec. 4, App. A: steps of the inner attack
    attack_alpha: float = 16.0  # Sec. 4, App. A: length of a step of the inner attack, in 255ths
    attack_warmup: int = 0  # not in the paper: steps of training over which alpha grows from 0
    weak_area: tuple[float, ...] = (0.02, 0.1)  # App. A: weak AT attacks this share of the image
    candidates: int = 10  # Sec. 4: C of DOA, 4 or 10
    doa_size: int = 20  # App. A: side of DOA's square, in pixels
    doa_stride: int = 5  # App. A: distance between the places that DOA searches, in pixels
    validate_every: int = 50  # not in the paper: steps between two validations
    # which weights are kept; App. B.3 stops early for weak AT alone, which auto does
    select: Literal["auto", "last", "best"] = "auto"
    # not in the paper: auto takes bfloat16 where the device multiplies it faster
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def run(self) -> Path:
        return Path("runs") / f"{self.data}-{self.preset}-{self.seed}"

    @property
    def name(self) -> str:
        """The folder of this method in the run."""
        usual_steps = PRESETS.get(self.preset, {}).get("attack_steps", Config.attack_steps)
        if self.method == "doa":
            return f"doa-{self.candidates}"
        if self.method == "weak-at" and self.attack_steps != usual_steps:  # Fig. 5
            return f"weak-at-{self.attack_steps}"
        return self.method

    @property
    def generated(self) -> bool:
        """Whether a generator makes y and u; otherwise they are real photographs, eq. (6)."""
        return self.method not in ("weak-at", "doa")

    @property
    def early_stopping(self) -> bool:
        return self.select == "best" or (self.select == "auto" and self.method == "weak-at")

    def alpha(self, step: int) -> float:
        """Compute the step size of the inner attack, in 255ths, at a step of the training."""
        growth = min(step / self.attack_warmup, 1.0) if self.attack_warmup else 1.0
        return self.attack_alpha * growth


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {"data": "synthetic", "train_persons": 0, "validation_persons": 40, "persons": 0}
    | {"width": 0.125, "standardise": True, "batch": 24, "steps": 400, "lr": 2e-3, "lr_end": 1e-4}
    | {"attack_steps": 2, "attack_alpha": 64.0, "attack_warmup": 150},
}


# Patch operations in their shortest form; where kernels/ is there, its forms take their place.


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Make masks bool (B, 1, height, width), True in boxes (B, 4) = (top, left, height, width)."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (B, 1)
    row = torch.arange(height, device=boxes.device)
    col = torch.arange(width, device=boxes.device)
    rows = (row >= top) & (row < top + h)
    cols = (col >= left) & (col < left + w)
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def masked_step(x: Tensor, grad: Tensor, alpha: Tensor, boxes: Tensor) -> Tensor:
    """Step x + alpha (B,) * sign(grad) in boxes (B, 4), clipped to [0, 1]; x, grad (B, C, H, W)."""
    stepped = (x + alpha.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)
    return torch.where(box_mask(boxes, *x.shape[2:]), stepped, x)


def gaussian_cutout(
    images: Tensor, *, generator: Rng | None, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the pixels of images (B, C, H, W) in boxes (B, 4) by noise N(0.5, 0.25^2) (App. A).

    Returns images, boxes and bool (B,), which are erased.
    """
    images = images.clone()
    mask = box_mask(boxes, *images.shape[2:]).expand_as(images)
    noise = torch.empty(int(mask.sum()), device=images.device)
    images[mask] = noise.normal_(0.5, 0.25, generator=generator).clamp_(0, 1).to(images.dtype)
    return images, boxes, boxes[:, 2] * boxes[:, 3] > 0


def augment(
    images: Tensor, *, flips: Tensor, shifts: Tensor, boxes: Tensor, generator: Rng
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror, shift (the edge is repeated) and erase images uint8 (B, 3, H, W), as in App. A.

    flips bool (B,), shifts (B, 2), boxes (B, 4). Returns as `gaussian_cutout`.
    """
    _, _, H, W = images.shape
    row = (torch.arange(H, device=images.device) + shifts[:, :1]).clamp(0, H - 1)  # (B, H)
    col = (torch.arange(W, device=images.device) + shifts[:, 1:]).clamp(0, W - 1)
    col = torch.where(flips[:, None], W - 1 - col, col)  # (B, W)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[batch, row[:, :, None], col[:, None, :]]  # (B, H, W, C)
    moved = moved.permute(0, 3, 1, 2).float() / 255  # (B, C, H, W), channels_last
    return gaussian_cutout(moved, generator=generator, boxes=boxes)


def positions(H: int, W: int, h: int, w: int, stride: int) -> Tensor:
    """List (P, 2) = (top, left) of h x w windows at every stride, the flush edge included."""
    tops = sorted({*range(0, H - h + 1, stride), H - h})
    lefts = sorted({*range(0, W - w + 1, stride), W - w})
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts))


def window_energy(grad: Tensor, h: int, w: int, stride: int) -> Tensor:
    """Sum the squared gradient (B, C, H, W) in the windows of `positions` -> (B, P) (Sec. 3.1)."""
    windows = grad.float().square().sum(1).unfold(1, h, 1).unfold(2, w, 1).sum((-1, -2))
    H, W = grad.shape[2:]
    top, left = positions(H, W, h, w, stride).to(grad.device).unbind(1)
    return windows[:, top, left]


def painted(images: Tensor, grey: float, places: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Paint images (B, C, H, W) grey at the first of their places (B, K, 2), then at the second."""
    sides = torch.tensor(size, device=places.device).expand_as(places)
    for boxes in torch.cat([places, sides], 2).unbind(1):
        yield torch.where(box_mask(boxes, *images.shape[2:]), grey, images)


def local_views(
    embed: Embed, images: Tensor, boxes: Tensor
) -> Iterator[tuple[Any, Any, Tensor, Embed]]:
    """Split images (B, 3, H, W) into groups of crops around boxes (B, 4), each with F of a crop.

    Yields a group's rows, its crops images[place], the boxes inside them, and F of the images with
    other crops. Here the whole images; the kernel's windows cost half on a CPU.
    """
    yield slice(None), slice(None), boxes, embed


try:
    from kernels.augment import augment  # type: ignore[no-redef,assignment]
    from kernels.gaussian_cutout import gaussian_cutout  # type: ignore[no-redef,assignment]
    from kernels.masked_step import masked_step  # type: ignore[no-redef,assignment]
    from kernels.patch_local import local_views  # type: ignore[no-redef,assignment]
    from kernels.place_patches import painted  # type: ignore[no-redef,assignment]
    from kernels.window_energy import window_energy  # type: ignore[no-redef,assignment]
except ImportError:
    pass


def draw_boxes(B: int, H: int, W: int, p: float, area: Range, aspect: Range, rng: Rng) -> Tensor:
    """Draw rectangles (B, 4) = (top, left, height, width) of App. A; a row is all zero with 1 - p.

    Their share of the image is uniform in area, height / width uniform in aspect, drawn again until
    the rectangle fits (the first of 32 that does); the place is uniform. On the device of rng.
    """
    u = torch.rand(6, B, 32, generator=rng, device=rng.device)
    share = area[0] + (area[1] - area[0]) * u[0]  # (B, 32)
    ratio = aspect[0] + (aspect[1] - aspect[0]) * u[1]
    h = (share * ratio * (H * W)).sqrt().round().clamp(min=1)
    w = (share / ratio * (H * W)).sqrt().round().clamp(min=1)
    first = ((h <= H) & (w <= W)).to(torch.uint8).argmax(1, keepdim=True)  # (B, 1)
    h, w = h.gather(1, first)[:, 0].clamp(max=H), w.gather(1, first)[:, 0].clamp(max=W)
    top, left = (u[4, :, 0] * (H - h + 1)).floor(), (u[4, :, -1] * (W - w + 1)).floor()
    boxes = torch.stack((torch.minimum(top, H - h), torch.minimum(left, W - w), h, w), 1)
    return boxes.long() * (u[5, :, :1] < p)


def draw_moves(B: int, shift: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """Draw App. A's mirroring, bool (B,), and shifts (B, 2) = (down, right) of at most `shift`."""
    flips = torch.rand(B, generator=rng, device=rng.device) < 0.5
    return flips, torch.randint(-shift, shift + 1, (2, B), generator=rng, device=rng.device).T


# The embedding (Sec. 4)

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pool


class Embedding(nn.Module):
    """F: VGG16 trunk, linear layer with weight rows of unit norm. (B, 3, 64, 64) -> (B, dim)."""

    plain_forward = True  # kernels/patch_local.py may follow it, but no subclass

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
            if isinstance(m, nn.Conv2d):  # thirteen without normalisation must keep the variance
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


class Mirrored(nn.Module):
    """F of an image and of its mirror image (Sec. 4.2): (N, 3, H, W) -> (N, 2 V, D), V views of F.

    F gives (N, V, D), or (N, D), which is one view.
    """

    plain_forward = True  # as `Embedding`

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, images: Tensor) -> Tensor:
        both = self.embed(torch.cat([images, images.flip(-1)]))  # (2 N, D) or (2 N, V, D)
        return both.unflatten(0, (2, len(images))).transpose(0, 1).flatten(1, -2)


def squared_distance(features: Tensor, anchor: Tensor) -> Tensor:
    """Compute ||features - anchor||_2^2 (N,), the mean over the V views of an image (Sec. 4.2).

    features (N, V, D) or (N, D); anchor (N, D), or (D,) for all.
    """
    views = features.flatten(1).unflatten(1, (-1, anchor.shape[-1]))  # (N, V, D)
    return (views - anchor.unsqueeze(-2)).square().sum(-1).mean(-1)


def two_pair_loss(
    fx: Tensor, fy: Tensor, ft: Tensor, fu: Tensor, margin: float, hinge: str = "distance"
) -> Tensor:
    """Compute the two-pair contrastive loss of features (B, D), the mean over the batch.

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
    """Draws x, t and companions of x: a person uniformly, then an image of theirs; t is another's.

    images (N, 3, H, W), uint8 or float in [0, 1], which become uint8; person int64 (N,), any
    labels, which are numbered from 0; both on the device of the draws. Raises ValueError.
    """

    def __init__(self, images: Tensor, person: Tensor) -> None:
        if images.dtype != torch.uint8:
            if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
                raise ValueError(f"images are {images.dtype}: give uint8, or float in [0, 1]")
            images = (images * 255).round().to(torch.uint8)
        self.images = images
        self.person = person.unique(return_inverse=True)[1]  # 0..P-1
        self.count = self.person.bincount()  # (P,)
        index = self.person.argsort(stable=True).split(self.count.tolist())
        self.table = nn.utils.rnn.pad_sequence(list(index), batch_first=True)  # row p: p's images
        paired = (self.count > 1).nonzero()[:, 0]
        self.paired = paired if len(paired) else self.count.nonzero()[:, 0]

    def draw_image(self, person: Tensor, rng: Rng) -> Tensor:
        """Draw an image index of each person (B,)."""
        r = torch.rand(person.shape, generator=rng, device=person.device)
        return self.table[person, (r * self.count[person]).long()]

    def draw(
        self, batch: int, mine: int, rng: Rng, same_person: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw image indices of x (B,), of a companion (B,) and of candidates t (B, mine).

        t shows another person than x. The companion is any image, or with same_person another image
        of x's person, who has two; x itself where nobody has two.
        """
        device, P = self.images.device, len(self.count)
        r = torch.rand(batch, generator=rng, device=device)
        person = self.paired[(r * len(self.paired)).long()] if same_person else (r * P).long()
        x = self.draw_image(person, rng)
        if same_person:
            r = torch.rand(batch, generator=rng, device=device)
            companion = self.table[person, (r * (self.count[person] - 1)).long()]
            last = self.table[person, self.count[person] - 1]
            companion = torch.where(companion == x, last, companion)
        else:
            companion = torch.randint(len(self.person), (batch,), generator=rng, device=device)
        others = torch.randint(1, P, (batch, mine), generator=rng, device=device)
        return x, companion, self.draw_image((person[:, None] + others) % P, rng)


class Generated:
    """G over codes that are computed once; identity and content are named by image indices.

    z_cl (N, class_dim), z_co (N, content_dim): E_cl and E_co of the N images; copies: half
    (N, 3, H, W), G(z_cl, z_co), since y = G(E_cl(x), E_co(x)) is the same in every step.
    """

    def __init__(self, G: Any, z_cl: Tensor, z_co: Tensor, copies: Tensor | None = None) -> None:
        self.G, self.z_cl, self.z_co, self.copies = G, z_cl, z_co, copies

    def __call__(self, identity: Tensor, content: Tensor) -> Tensor:
        """Make images (B, 3, H, W) with the identity of images (B,) and the content of others."""
        if self.copies is not None and content is identity:
            return self.copies[identity].float()
        return self.G(self.z_cl[identity], self.z_co[content])


class Quadruplets(NamedTuple):
    """A batch after augmentation and mining, before any attack; y and u of G are not augmented."""

    x: Tensor  # (B, 3, H, W), as y, t and u
    y: Tensor
    t: Tensor
    u: Tensor
    x_boxes: Tensor  # (B, 4), the box of x that is erased; all zero: nothing is
    t_boxes: Tensor
    fy: Tensor  # (B, dim), sg(F(y)) and sg(F(u)) of eq. (4)
    fu: Tensor
    image_index: Tensor  # image indices of x and of every candidate t


def augment_real(config: Config, images: Tensor, p: float, rng: Rng) -> tuple[Tensor, Tensor]:
    """Augment photographs uint8 (B, 3, H, W) and erase a box of each with probability p (App. A).

    Returns float images and boxes (B, 4), all zero where nothing is erased.
    """
    B, _, H, W = images.shape
    flips, shifts = draw_moves(B, config.shift, rng)
    boxes = draw_boxes(B, H, W, p, config.cutout_area, config.cutout_aspect, rng)
    return augment(images, flips=flips, shifts=shifts, boxes=boxes, generator=rng)[:2]


@torch.no_grad()
def generated_quadruplets(
    config: Config, embed: Embed, sampler: Sampler, G: Generated, rng: Rng
) -> Quadruplets:
    """Draw x, t and make y = G(E_cl(x), E_co(x)), u = G(E_cl(x), E_co(t)) (Sec. 2).

    transfer, not in the paper: y takes the content of any other image in place of x's.
    """
    B, n = config.batch, config.mine
    x_index, other, t_index = sampler.draw(B, n, rng)
    index = torch.cat([x_index, t_index.flatten()])  # x, then the n candidates of each x
    real, boxes = augment_real(config, sampler.images[index], config.cutout, rng)
    x, t = real[:B], real[B:]  # (B, 3, H, W), (B n, 3, H, W)
    # y = G(E_cl(x), E_co(x))
    y = G(x_index, other if config.method == "transfer" else x_index)
    # u = G(E_cl(x), E_co(t))
    u = G(x_index.repeat_interleave(n), t_index.flatten())
    # App. A: of n_m candidates the one nearest to its u
    fy, ft, fu = embed(torch.cat([y, t, u])).split([B, B * n, B * n])
    nearest = squared_distance(ft, fu).view(B, n).argmin(1)
    pick = torch.arange(B, device=x.device) * n + nearest
    return Quadruplets(x, y, t[pick], u[pick], boxes[:B], boxes[B:][pick], fy, fu[pick], index)


@torch.no_grad()
def real_quadruplets(config: Config, embed: Embed, sampler: Sampler, rng: Rng) -> Quadruplets:
    """Draw x, t and a real y of x's person, u = y (eq. 6); nothing is erased: all are attacked."""
    B, n = config.batch, config.mine
    x_index, y_index, t_index = sampler.draw(B, n, rng, same_person=True)
    index = torch.cat([x_index, t_index.flatten()])
    real, boxes = augment_real(config, sampler.images[index], 0.0, rng)
    x, t, no_boxes = real[:B], real[B:], boxes[:B]
    flips, shifts = draw_moves(B, config.shift, rng)
    moves = {"flips": flips, "shifts": shifts, "boxes": no_boxes}
    y, _, _ = augment(sampler.images[y_index], generator=rng, **moves)
    # App. A: of n_m candidates the one nearest to x
    fy, ft, fx = embed(torch.cat([y, t, x])).split([B, B * n, B])
    nearest = squared_distance(ft, fx.repeat_interleave(n, 0)).view(B, n).argmin(1)
    pick = torch.arange(B, device=x.device) * n + nearest
    # Eq. (6): u = y
    return Quadruplets(x, y, t[pick], y, no_boxes, no_boxes, fy, fy, index)


def mixed_quadruplets(
    config: Config, embed: Embed, sampler: Sampler, G: Generated, rng: Rng
) -> Quadruplets:
    """Draw real quadruplets for one half of the batch and those of transfer for the other.

    Not in the paper. Nothing is erased: all are attacked, as with eq. (6).
    """
    B = config.batch // 2
    real = dataclasses.replace(config, batch=B)
    transfer = dataclasses.replace(config, batch=config.batch - B, method="transfer", cutout=0.0)
    first = real_quadruplets(real, embed, sampler, rng)
    second = generated_quadruplets(transfer, embed, sampler, G, rng)
    return Quadruplets(*map(torch.cat, zip(first, second)))


# The inner problem (Sec. 2.3, 3.1)


def inner_attack(
    embed: Embed, images: Tensor, anchors: Tensor, alpha: Tensor, boxes: Tensor, steps: int
) -> Tensor:
    """Attack images (B, 3, H, W) in boxes (B, 4) by sign gradient steps, from the pixels they have.

    The inner maximisation of eq. (4)-(6). anchors (B, D), constants; alpha (B,): positive moves
    away from the anchor (x from y), negative towards it (t to u). Returns images, detached.
    """
    attacked = images.detach().clone()
    for rows, place, inside, view in local_views(embed, images.detach(), boxes):
        crops = attacked[place]
        for _ in range(steps):
            crops = crops.detach().requires_grad_()
            # Eq. (5): both terms, each sample by itself; no gradient of a weight is computed
            distance = squared_distance(view(crops), anchors[rows])
            (grad,) = torch.autograd.grad(distance.sum(), crops)
            crops = masked_step(crops.detach(), grad.to(crops.dtype), alpha[rows], inside)
        attacked[place] = crops
    return attacked


def doa_boxes(
    config: Config, embed: Embed, images: Tensor, anchors: Tensor, sign: Tensor
) -> Tensor:
    """Search the place of DOA's square (Sec. 3.1; Wu et al. 2020) -> boxes (B, 4).

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
    with torch.no_grad():  # a candidate of each image at a time, so that memory holds one batch
        grey = painted(images.detach(), 0.5, best, (size, size))
        d = torch.stack([squared_distance(embed(x), anchors) for x in grey], 1)  # (B, K)
    winner = best[torch.arange(len(d), device=d.device), (d * sign[:, None]).argmax(1)]
    return torch.cat([winner, torch.full_like(winner, size)], 1)


def adversarial(
    config: Config, embed: Embed, q: Quadruplets, alpha: float, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Attack x and t inside the patch of the method (Sec. 2.3, 3.1, App. A)."""
    B, _, H, W = q.x.shape
    images, anchors = torch.cat([q.x, q.t]), torch.cat([q.fy, q.fu])
    sign = torch.ones(2 * B, device=images.device)
    sign[B:] = -1.0  # eq. (5): x moves away from y, t towards u
    rows: Any = slice(None)
    match config.method:
        case "no-at":  # App. B.1
            return q.x, q.t
        case "ours" | "transfer":  # App. A: what cutout erased, from its noise
            boxes = torch.cat([q.x_boxes, q.t_boxes])
            rows = (boxes[:, 2] > 0).nonzero()[:, 0]
        case "doa":  # Sec. 3.1: all, at the place that the search returns
            boxes = doa_boxes(config, embed, images, anchors, sign)
            images, _, _ = gaussian_cutout(images, generator=rng, boxes=boxes)
        case "weak-at" | "mixed":  # App. A: all, at random places
            area = config.weak_area if config.method == "weak-at" else config.cutout_area
            boxes = draw_boxes(2 * B, H, W, 1.0, area, config.cutout_aspect, rng)
            images, _, _ = gaussian_cutout(images, generator=rng, boxes=boxes)
    step = sign[rows] * (alpha / 255)
    images[rows] = inner_attack(
        embed, images[rows], anchors[rows], step, boxes[rows], config.attack_steps
    )
    return images[:B], images[B:]


def train_step(
    config: Config,
    embed: Embedding,
    adam: torch.optim.Optimizer,
    sampler: Sampler,
    G: Any,
    rng: Rng,
    alpha: float,
) -> dict[str, float]:
    """Take a step of eq. (3), (4) or (6). Returns loss, mean distances and the gradient's norm.

    G is a `Generated`, or None for the methods of eq. (6); alpha is in 255ths. Raises
    FloatingPointError(what, indices of the images) where loss or gradient is not finite.
    """
    if config.generated and G is None:
        raise ValueError(f"method {config.method}: y and u are generated, give G a `Generated`")
    device, low = sampler.images.device.type, config.precision == "bfloat16"
    with torch.autocast(device, torch.bfloat16, low):
        match config.method:
            case "ours" | "no-at" | "transfer":
                q = generated_quadruplets(config, embed, sampler, G, rng)
            case "mixed":
                q = mixed_quadruplets(config, embed, sampler, G, rng)
            case "weak-at" | "doa":
                q = real_quadruplets(config, embed, sampler, rng)
        x, t = adversarial(config, embed, q, alpha, rng)
    # A context of its own: weights that were cast under no_grad would get no gradient.
    with torch.autocast(device, torch.bfloat16, low):
        if q.u is q.y:
            fx, fy, ft = embed(torch.cat([x, q.y, t])).float().chunk(3)
            fu = fy
        else:
            fx, fy, ft, fu = embed(torch.cat([x, q.y, t, q.u])).float().chunk(4)
    # Eq. (3), (4), (6): the outer minimisation
    loss = two_pair_loss(fx, fy, ft, fu, config.margin, config.hinge)
    adam.zero_grad()
    loss.backward()
    d_positive = squared_distance(fx, fy).detach().sqrt().mean()
    d_negative = squared_distance(ft, fu).detach().sqrt().mean()
    norm = nn.utils.get_total_norm([p.grad for p in embed.parameters() if p.grad is not None])
    # The only transfer to the host in a step
    values = torch.stack([loss.detach(), d_positive, d_negative, norm]).tolist()
    if not (math.isfinite(values[0]) and math.isfinite(values[3])):
        raise FloatingPointError(f"loss {values[0]}, gradient norm {values[3]}", q.image_index)
    adam.step()
    return dict(zip(("loss", "d_positive", "d_negative", "gradient"), values))


# Validation (Sec. 4, App. A)


@torch.no_grad()
def features(embed: Embed, images: Tensor) -> Tensor:
    """Compute the features (N, ...) of images uint8 (N, 3, H, W), 256 of 64 x 64 at a time."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: give uint8, 0 to 255")
    batch = max(1, 256 * 64**2 // images.shape[2:].numel())  # as much memory at any size
    parts = torch.cat([embed(part.float() / 255) for part in images.split(batch)])
    return parts.to(torch.promote_types(parts.dtype, torch.float32))  # of a half precision model


def auroc(genuine: Tensor, intruder: Tensor) -> float:
    """Compute how often an intruder (M,) lies farther than a genuine one (N,), ties one half."""
    ordered = genuine.sort().values
    below = torch.searchsorted(ordered, intruder)
    level = torch.searchsorted(ordered, intruder, right=True)
    return float((below + level).double().mean() / (2 * len(genuine)))


@torch.no_grad()
def validate(
    config: Config, embed: Embed, sampler: Sampler, rng: Rng, pairs: int = 1000
) -> dict[str, float]:
    """Compute loss and AU-ROC on fresh pairs of the sampler's persons: x, y of x's person, t."""
    f = features(embed, sampler.images)
    x_index, y_index, t_index = sampler.draw(pairs, 1, rng, same_person=True)
    fx, fy, ft = f[x_index], f[y_index], f[t_index[:, 0]]
    return {
        "val_loss": float(two_pair_loss(fx, fy, ft, fx, config.margin, config.hinge)),
        "val_auroc": auroc(squared_distance(fx, fy), squared_distance(fx, ft)),
    }


@torch.no_grad()
def genuine_threshold(embed: Embed, images: Tensor, person: Tensor, fpr: float = 0.05) -> float:
    """Compute the smallest delta of eq. (1) that refuses at most `fpr` of the genuine pairs.

    They are all ordered pairs of images uint8 (N, 3, H, W) of the same person (N,), the candidate
    with its mirror image (Sec. 4.2, 4.3).
    """
    views = features(Mirrored(embed), images)  # (N, 2, D)
    genuine = []
    for p in person.unique():
        same = views[person == p]
        squared = torch.stack([squared_distance(same, anchor) for anchor in same[:, 0]])
        genuine.append(squared[~torch.eye(len(same), dtype=torch.bool, device=same.device)])
    return smallest_delta(torch.cat(genuine).sqrt(), fpr)


def smallest_delta(genuine: Tensor, fpr: float = 0.05) -> float:
    """Compute the smallest delta that refuses at most `fpr` of genuine distances (n,)."""
    d = genuine.sort().values
    refused = math.floor(fpr * len(d) + 1e-9)
    return float(d[len(d) - 1 - refused].nextafter(d.new_tensor(math.inf)))


def is_collapsed(d_negative: float, config: Config) -> bool:
    """Tell whether F has become constant: negatives nearer than 2 % of the margin."""
    margin = config.margin if config.hinge == "distance" else math.sqrt(config.margin)
    return d_negative < 0.02 * margin


def cosine(start: float, end: float, progress: float) -> float:
    """Compute the cosine schedule from start to end at progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


# main


def parse(argv: Sequence[str] | None):
    """Read Config and flags from the command line. Raises run.UsageError."""
    from_0 = (0, run.LARGEST)
    config, args = run.parse(
        Config,
        PRESETS,
        argv,
        "Train and evaluate the embedding F (Sec. 2-4).",
        bounds={
            **dict.fromkeys(("seed", "split_seed", "attack_warmup"), from_0),
            **dict.fromkeys(("train_persons", "persons", "images"), from_0),
            **dict.fromkeys(("cutout_area", "weak_area"), (0.0001, 1)),
            "validation_persons": (2, run.LARGEST),
            "width": (0.001, 16),
            "margin": (1e-6, 1e6),
            "lr": (1e-12, 1e3),
            "shift": (0, 63),
            "cutout": (0, 1),
            "cutout_aspect": (0.01, 100),
            "attack_alpha": (0, 255),
            "doa_size": (1, 64),
        },
        no_evaluation={"action": "store_true", "help": "train only"},
    )
    for name in ("persons", "train_persons"):
        if getattr(config, name) == 1:
            flag = run.flag_of(name)
            raise run.UsageError(f"{flag} 1: give 2 or more, or 0 for all: t is of another person")
    for name in ("cutout_area", "cutout_aspect", "weak_area"):
        low, high = getattr(config, name)
        if low > high:
            flag = run.flag_of(name)
            raise run.UsageError(f"{flag} {low},{high}: give two numbers, the lower first")
    return config, args


def load_embedding(path: str | Path, device: str | torch.device = "cpu") -> Embedding:
    """Load a trained F in eval mode, without weight gradients. Raises run.UsageError."""
    content = run.load(path, "embedding")
    with run.reading(path, "weights and settings do not fit together: train it again"):
        sizes = [content["config"][k] for k in ("width", "dim", "standardise")]
        with torch.device("meta"):  # costs nothing, however large the settings are
            shapes = {k: v.shape for k, v in Embedding(*sizes).state_dict().items()}
        if shapes != {k: v.shape for k, v in content["model"].items()}:
            raise ValueError("shapes differ")
        embed = Embedding(*sizes)
        embed.load_state_dict(content["model"])
    return embed.to(device).eval().requires_grad_(False)


def sampler_of(faces, index: Tensor, device: torch.device) -> Sampler:
    """Make the Sampler of images (N,) of the faces (`data.Faces`)."""
    return Sampler(faces.images[index].to(device), faces.person[index].to(device))


def create_embedding(config: Config, device: torch.device) -> Embedding:
    """Create F with random weights, or with VGG16's."""
    torch.manual_seed(config.seed)
    embed = Embedding(config.width, config.dim, config.standardise)
    if config.weights:
        state = generator.read_vgg(config.weights, "--weights")
        trunk = {k[9:]: v for k, v in state.items() if k.startswith("features.")}
        with run.reading(config.weights, "--weights: it starts F at --width 1"):
            embed.trunk.load_state_dict(trunk)
    return embed.to(device)


def generator_file(config: Config, folder: Path) -> Path | None:
    """Locate the run's generator; the demo on rendered faces copies data/demo's. None: eq. (6)."""
    if not config.generated:
        return None
    path = folder / "generator.pt"
    shipped = Path(__file__).resolve().parent / "data" / "demo" / "generator.pt"
    is_demo = (config.preset, config.data) == ("demo", "synthetic")
    with run.rank_0_first():
        if is_demo and shipped.exists() and not path.exists():
            run.write(path, shipped.read_bytes())
            print("generator: the demo's, from data/demo/generator.pt")
    if not path.exists():
        raise run.UsageError(
            f"{path}: no generator in this run yet: python generator.py --preset {config.preset} "
            f"--data {config.data} --run {folder}, with the same --root, seeds and persons"
        )
    return path


def load_generated(config: Config, path: Path, faces, split, sampler: Sampler) -> Generated:
    """Load the generator and encode the sampler's images. Raises run.UsageError."""
    lord, content = generator.load_generator(path, sampler.images.device)
    others = {faces.names[p] for p in (*split.validation, *split.target)}
    if leaked := others & {*content["train"]}:
        raise run.UsageError(
            f"{path}: trained on {len(leaked)} of the validation or target persons "
            f"({min(leaked)}, ...): train one with generator.py on this split"
        )
    z_cl, z_co = generator.encode(lord, sampler.images)
    # transfer and mixed need no y = G(E_cl(x), E_co(x))
    copied = config.method in ("ours", "no-at")
    copies = generator.decode(lord, z_cl, z_co).half() if copied else None
    return Generated(lord.generator, z_cl, z_co, copies)


def training_images(config: Config, faces, split) -> Tensor:
    """Choose the indices of the images that F is trained on. Raises run.UsageError."""
    if len(split.train) < 2:
        raise run.UsageError("one train person alone has no t: add persons, or hold out fewer")
    index = data.images_of(faces, split.train[: config.persons or None], config.images)
    real = config.method in ("mixed", "weak-at", "doa")
    if real and config.images != 1 and int(faces.person[index].bincount().max()) < 2:
        raise run.UsageError(
            f"--method {config.method}: needs train persons with two images or more, there is "
            f"none: give more photographs, or --images 1: y is x, moved otherwise"
        )
    return index


def train(argv: Sequence[str] | None) -> int:
    """Run `python embed.py`: train F by one method, then evaluate it."""
    config, args = parse(argv)
    device, folder = run.start(args.device), args.run / config.name
    config = dataclasses.replace(config, precision=run.resolve_precision(config.precision, device))
    step_config = dataclasses.replace(config, batch=run.share("--batch", config.batch))
    with run.rank_0_first():
        faces, split = data.open_run(config, args.run)
    index = training_images(config, faces, split)
    sampler = sampler_of(faces, index, device)
    validation = sampler_of(faces, data.images_of(faces, split.validation), device)
    embed, file = create_embedding(config, device), generator_file(config, args.run)
    adam = torch.optim.Adam(embed.parameters(), lr=config.lr, fused=device.type == "cuda")
    run.average_gradients(adam)
    # Of rendered faces the factors: how a pixel is rounded depends on the number of threads.
    images = sampler.images if faces.identity is None else faces.identity
    weights = run.digest(config.weights) if config.weights else ""
    settings = dataclasses.asdict(config) | {"weights": weights}  # wherever that file lies
    made_of = {
        "config": {k: v for k, v in settings.items() if k != "root"},
        "people": run.read_json(args.run / "people.json")["sha256"],
        "images": run.digest(images, faces.content),
        "generator": run.digest(file) if file else "",
    }
    training = run.Training(folder, made_of, args.overwrite, model=embed, adam=adam)
    if training.done:
        print(f"{folder} is trained already (--overwrite trains it again)")
        return 0 if args.no_evaluation else evaluate(config, args)
    G = load_generated(config, file, faces, split, sampler) if file else None
    size = f"{len(sampler.images)} images of {len(sampler.count)} persons"
    print(f"{config.name}: {size}, {config.steps} steps of {config.batch} on {device}", flush=True)

    rng = torch.Generator(device)
    while training.step < config.steps:
        step = training.step
        rng.manual_seed(run.step_seed(config.seed, step))
        adam.param_groups[0]["lr"] = cosine(config.lr, config.lr_end, step / config.steps)
        try:
            losses = train_step(step_config, embed, adam, sampler, G, rng, config.alpha(step))
        except FloatingPointError as error:
            what, batch_index = error.args
            where = training.describe_failure(batch_index, faces.files, index)
            raise FloatingPointError(f"step {step + 1}: {what}; {where}") from None
        training.count(**losses)
        if training.step % config.validate_every and training.step < config.steps:
            continue
        rng.manual_seed(run.step_seed(config.seed, 500_009 + training.step))
        scores = validate(config, embed, validation, rng)
        keep = training.step == config.steps
        if config.early_stopping:  # App. B.3
            keep = scores["val_auroc"] > training.best
            training.best = max(scores["val_auroc"], training.best)
        if keep and run.rank() == 0:
            about = {"commit": run.commit(), "step": training.step, "model": embed.state_dict()}
            origin = {k: made_of[k] for k in ("config", "people")}
            run.save(folder / "embedding.pt", "embedding", **origin, **about)
        line = training.log(config.steps, **scores)
        if is_collapsed(line.get("d_negative", math.inf), config):
            print(
                f"WARNING: mean negative distance {line['d_negative']:.3g}: F has become a "
                f"constant (try --hinge distance, a lower --lr)"
            )
    run.barrier()
    selected = load_embedding(folder / "embedding.pt", device)
    training.end(
        threshold=genuine_threshold(selected, validation.images, validation.person),
        selected="best" if config.early_stopping else "last",
        **run.machine(device),
    )
    print(f"wrote {folder}/embedding.pt, log.jsonl, result.json")
    return 0 if args.no_evaluation else evaluate(config, args)


def evaluate(config: Config, args) -> int:
    """Let attacks.py attack the target persons, clean and under eyeglasses, and print the table."""
    flags = ["--run", str(args.run), "--method", config.name, "--attacks=clean,eyeglasses"]
    flags += ["--preset", "demo" if config.preset == "demo" else "paper"]
    flags += ["--seed", str(config.seed)]
    flags += ["--device", args.device] if args.device else []
    flags += ["--overwrite"] if args.overwrite else []
    return run.run_stage("attacks", flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    if run is None:
        raise SystemExit("embed.py: the command needs the folder data/ beside it")
    return run.command("embed.py", train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
