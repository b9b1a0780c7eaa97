"""The embedding F: eq. (1)-(6), Sec. 2-3.1 and App. A, for our method and for every baseline.

    python embed.py --method ours                                     # demo: rendered faces, two CPU cores, minutes
    python embed.py --all                                             # every method, attack, table and figure
    python embed.py --method ours --preset paper --data celeba --root CELEBA           # the paper's numbers, one GPU
    python embed.py --verify A.jpg B.jpg --run runs/synthetic-demo-0  # eq. (1) for two photographs

In:  faces from `data/`, and for `ours` and `no-at` a generator (runs/.../generator.pt, or the demo's own in `data/`).
Out: runs/<data>-<preset>-<seed>/<method>/ with embedding.pt (the weights that are judged; also -last, -best-loss and
     -best-auroc), log.jsonl, result.json, and the rows of the clean and the eyeglasses evaluation in attacks/.

x and t are real photographs of different persons, y and u are generated with x's identity: y shares x's content, u shares
t's. Images are float NCHW in [0, 1], 64 x 64; distances are Euclidean, in the units of the embedding.

Measured (demo, rendered faces, five minutes a run on two x86-64 cores, means of three seeds, 20 targets each): clean AU-ROC 0.85,
under eyeglasses 0.80; without the inner attack 0.87 and 0.73. The preset paper has not been run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Embed = Callable[[Tensor], Tensor]


class UsageError(ValueError):
    """Something the user can mend: one line that names the file or flag and says what to do."""


class NotFinite(FloatingPointError):
    """A loss or gradient that is not finite: what was found, and the indices (B,) of the batch's images among those trained on."""

    def __init__(self, told: str, index: Tensor) -> None:
        super().__init__(f"{told}; images {index.tolist()}")
        self.told, self.index = told, index


@dataclass(frozen=True)
class Config:
    """Every setting of the training; the defaults are the paper's, a preset replaces some of them."""

    preset: str = "paper"  # demo | paper | released; on the command line demo unless named
    method: str = "ours"  # ours | no-at | weak-at | doa
    positive: str = "reconstruct"  # Sec. 2: y = G(E_cl(x), E_co(x)); ours: transfer, y = G(E_cl(x), E_co(x')) with another x'
    truth: bool = False  # ours: rendered faces only: y and u by the renderer from the true factors, what a perfect G would make
    data: str = "celeba"  # synthetic | folder | celeba
    root: str = ""  # where the photographs are
    crop: str = ""  # lfw | centre | celeba; empty: by image size
    seed: int = 0  # ours: of everything random in the training, and of which targets are judged
    split_seed: int = 0  # ours: who is train, validation, target
    train_persons: int = 9177  # Sec. 4: of the generator; 0: all that are left
    validation_persons: int = 100  # Sec. 4: of F, not trained on
    target_persons: int = 30  # Sec. 4.2: 30 drawn
    persons: int = 2000  # Sec. 4: of the train persons, those F is trained on; 0: all
    synthetic_persons: int = 370  # ours: size of the rendered set
    synthetic_images: int = 12  # ours: images of each rendered person
    width: float = 1.0  # Sec. 4: VGG16; ours: a fraction of its channels
    dim: int = 128  # Sec. 4: of the embedding
    standardise: bool = False  # ours: feed (x - 0.5) / 0.25, for a random start
    weights: str = ""  # released: a torchvision VGG16 file to start from; empty: random
    margin: float = 10.0  # Sec. 4: m of eq. (2)
    hinge: str = "distance"  # released: distance, max(m - d, 0)^2; eq. (2): squared, max(m - d^2, 0)
    batch: int = 128  # App. A: quadruplets a step
    steps: int = 20000  # App. A: of the training
    rate: float = 1e-3  # App. A: Adam's
    rate_end: float = 1e-3  # App. A: constant; ours: cosine down to this
    amsgrad: bool = False  # released: True, Adam's variant
    mine: int = 2  # App. A: n_m, candidates t of which the nearest to u is taken
    shift: int = 5  # App. A: pixels, at most
    cutout: float = 0.5  # App. A: p, that an image is erased
    cutout_area: tuple[float, ...] = (0.02, 0.2)  # App. A: of the image
    cutout_aspect: tuple[float, ...] = (0.5, 2.0)  # App. A: height / width
    fill: str = "gaussian"  # App. A: what erased pixels become; released: uniform
    generate_from: str = "clean"  # Sec. 2; released: erased (the augmented images' content, one class code a person)
    attack_steps: int = 10  # Sec. 4, App. A: of the inner attack
    attack_alpha: float = 16.0  # Sec. 4, App. A: length of a step of the inner attack, in 255ths
    attack_warmup: int = 0  # ours: steps over which alpha grows from 0, for a random start (the authors start from ImageNet weights)
    attacked: str = "auto"  # which images, erased | all; auto: App. A, ours only where erased, the baselines all
    weak_area: tuple[float, ...] = (0.02, 0.1)  # App. A: weak AT's rectangles
    candidates: int = 10  # Sec. 4: C of DOA, 4 or 10
    doa_size: int = 20  # App. A: side of DOA's square, pixels
    doa_stride: int = 5  # App. A: between the places searched, pixels
    validate_every: int = 50  # released: steps
    select: str = "auto"  # the weights to judge, last | best-loss | best-auroc; auto: Sec. 4.2, best-auroc for weak AT, last for the others
    autocast: bool = False  # ours: bfloat16 in training on a GPU
    local: bool = True  # ours: on a CPU the inner attack recomputes only what its rectangles change; the same up to rounding

    @property
    def run(self) -> Path:
        return Path("runs") / f"{self.data}-{self.preset}-{self.seed}"

    @property
    def name(self) -> str:
        """Folder of this method in the run."""
        usual = PRESETS.get(self.preset, {}).get("attack_steps", Config.attack_steps)
        suffix = f"-{self.candidates}" if self.method == "doa" else ""
        if self.method == "weak-at" and self.attack_steps != usual:  # Fig. 5
            suffix = f"-{self.attack_steps}"
        if self.generated:
            suffix = ("-transfer" if self.positive == "transfer" else "") + ("-truth" if self.truth else "")
        return self.method + suffix

    @property
    def generated(self) -> bool:
        """Whether y and u come from the generator (Sec. 2) or are real photographs (eq. 6)."""
        return self.method in ("ours", "no-at")

    @property
    def attack_share(self) -> str:
        return self.attacked if self.attacked != "auto" else ("erased" if self.generated else "all")

    def alpha(self, step: int) -> float:
        """Step size of the inner attack, in 255ths, at a step of the training."""
        return self.attack_alpha * min(step / self.attack_warmup, 1.0) if self.attack_warmup else self.attack_alpha

    @property
    def selected(self) -> str:
        return self.select if self.select != "auto" else ("best-auroc" if self.method == "weak-at" else "last")


PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "released": dict(amsgrad=True, fill="uniform", generate_from="erased"),
    "demo": dict(
        data="synthetic", train_persons=0, validation_persons=40, target_persons=30, persons=0, width=0.125,
        standardise=True, batch=32, steps=300, rate=2e-3, rate_end=1e-4, attack_steps=5, attack_alpha=32.0, attack_warmup=150,
    ),
}  # fmt: skip
METHODS = ("ours", "no-at", "weak-at", "doa")
STEP_SETTINGS = ((7, 30.0), (10, 16.0), (20, 12.0), (40, 6.0))  # App. A, Fig. 5: steps, alpha
FULL = ("ours", "ours-transfer")  # ours: --all runs every attack on these, those of Tables 1, 2 and Sec. 4.3 on all
TRAININGS = {
    "ours": (), "ours-transfer": ("--positive=transfer",), "no-at": ("--method=no-at",), "weak-at": ("--method=weak-at",),
    "doa-4": ("--method=doa", "--candidates=4"), "doa-10": ("--method=doa", "--candidates=10"),
}  # fmt: skip


# ------------------------------------------------------------------ several devices: torchrun starts one process for each
def processes() -> tuple[int, int]:
    """Rank of this process and how many there are; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own(whole: Tensor) -> Tensor:
    """This process's rows of the whole batch."""
    rank, world = processes()
    return whole.chunk(world)[rank]


def ended(why: object) -> None:
    """One line and the end, whatever this process was doing."""
    line = "process {} of {} stops, as another one or torchrun has ended ({}); the same command with --resume goes on\n"
    os.write(2, f"{Path(sys.argv[0]).name}: {line}".format(*processes(), " ".join(str(why).split())[:120]).encode())
    os._exit(1)


def meet(collective: Callable | None = None, *args: object) -> None:
    """A collective of all processes, by default a barrier; nothing without torchrun."""
    if processes()[1] > 1:
        try:
            (collective or torch.distributed.barrier)(*args)
        except RuntimeError as error:
            ended(error)


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Each tensor becomes its mean over the processes, all in one message."""
    if (world := processes()[1]) > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        meet(torch.distributed.all_reduce, flat)
        for t, mean in zip(tensors, (flat / world).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def join(name: str) -> torch.device:
    """The device asked for, else a GPU if there is one; under torchrun this process's own, once it is one of the group."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: cannot be used here ({' '.join(str(error).split())[:100]}): cpu, or a device torch sees") from None
    rank, world = processes()
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"torchrun: this machine has {torch.cuda.device_count()} GPUs: start no more processes on it")
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        signal.signal(signal.SIGTERM, lambda *_: ended("SIGTERM"))
        if rank:  # rank 0 writes and prints
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    return device


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others, which find what it wrote, or fail as it did."""
    rank = processes()[0]
    if rank:
        meet()
    try:
        yield
    finally:
        if not rank:
            meet()


def tell(line: str) -> None:
    """An error's one line, not one of every process, nor any more from torchrun's SIGTERM, which follows."""
    if processes()[1] > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not int(os.environ.get("LOCAL_RANK", "0")):
        print(line, file=sys.stderr)


# ------------------------------------------------------------------------------------ patch operations (kernels/ when there)
def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool (B, 1, height, width), True inside boxes (B, 4) = (top, left, height, width)."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (B, 1)
    row, col = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    rows, cols = (row >= top) & (row < top + h), (col >= left) & (col < left + w)
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def masked_step(x: Tensor, grad: Tensor, alpha: Tensor, boxes: Tensor) -> Tensor:
    """x + alpha * sign(grad) inside boxes (B, 4) = (top, left, height, width), clipped to [0, 1]; x, grad (B, C, H, W), alpha (B,)."""
    return torch.where(box_mask(boxes, *x.shape[2:]), (x + alpha.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1), x)


def draw_boxes(
    B: int, H: int, W: int, p: float, area: tuple[float, ...], aspect: tuple[float, ...], generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Random rectangles int64 (B, 4) = (top, left, height, width), App. A; with probability 1 - p a row is all zero.

    Share of the image ~ U(area), height / width ~ U(aspect), redrawn until it fits (the first of 32 that does), placed uniformly.
    """
    u = torch.rand(6, B, 32, generator=generator, device=device)
    share, ratio = area[0] + (area[1] - area[0]) * u[0], aspect[0] + (aspect[1] - aspect[0]) * u[1]
    h, w = ((v * (H * W)).sqrt().round().clamp(min=1) for v in (share * ratio, share / ratio))  # (B, 32)
    first = ((h <= H) & (w <= W)).to(torch.uint8).argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0].clamp(max=H), w.gather(1, first)[:, 0].clamp(max=W)
    top, left = (u[4, :, 0] * (H - h + 1)).floor(), (u[4, :, -1] * (W - w + 1)).floor()
    return torch.stack((torch.minimum(top, H - h), torch.minimum(left, W - w), h, w), 1).long() * (u[5, :, :1] < p)


def gaussian_cutout(
    images: Tensor, *, fill: str = "gaussian", generator: torch.Generator | None = None, boxes: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random pixels inside boxes (B, 4): `gaussian` N(0.5, 0.25^2) clipped to [0, 1] (App. A) or `uniform` U[0, 1) (released).

    images (B, C, H, W); noise of that shape is used instead of drawing. Returns images, boxes and bool (B,), which are erased.
    """
    images, erased = images.clone(), (boxes[:, 2] * boxes[:, 3]) > 0
    drawn = [(b, *box) for b, box in enumerate(boxes.tolist()) if box[2] and box[3]]
    flat = torch.empty(sum(images.shape[1] * h * w for *_, h, w in drawn), device=images.device)
    flat = flat.uniform_(generator=generator) if fill == "uniform" else flat.normal_(0.5, 0.25, generator=generator).clamp_(0, 1)
    start = 0
    for b, top, left, h, w in drawn:
        inside = images[b, :, top : top + h, left : left + w]
        inside.copy_(flat[start : start + inside.numel()].view_as(inside) if noise is None else noise[b, :, top : top + h, left : left + w])
        start += inside.numel()
    return images, boxes, erased


def window_energy(grad: Tensor, h: int, w: int, stride: int) -> Tensor:
    """Sum of squared gradient (B, C, H, W) over channels and h x w windows at every stride, flush edges included -> (B, P), Sec. 3.1."""
    def windows(n: int, size: int) -> Tensor:
        starts = torch.tensor(sorted({*range(0, n - size + 1, stride), n - size}), device=grad.device)[:, None]
        return ((torch.arange(n, device=grad.device) >= starts) & (torch.arange(n, device=grad.device) < starts + size)).float()

    H, W = grad.shape[2:]
    return (windows(H, h) @ (grad.float().square().sum(1) @ windows(W, w).T)).flatten(1)  # no running sums: they would cancel


def draw_moves(B: int, shift: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mirror or not, bool (B,), and offsets (B, 2) = (down, right) of at most `shift` pixels, App. A."""
    flips = torch.rand(B, generator=generator, device=device) < 0.5
    return flips, torch.randint(-shift, shift + 1, (2, B), generator=generator, device=device).T


def augment(
    images: Tensor, *, flips: Tensor, shifts: Tensor, boxes: Tensor, fill: str = "gaussian",
    generator: torch.Generator | None = None, noise: Tensor | None = None, layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """uint8 (B, 3, H, W) mirrored and shifted (edge filled), then random pixels inside boxes (B, 4), App. A.

    flips bool (B,), shifts (B, 2); the rest as `gaussian_cutout`. Returns float images in [0, 1], boxes and bool (B,), which are erased.
    """
    B, _, H, W = images.shape
    row, col = ((torch.arange(n, device=images.device) + d).clamp(0, n - 1) for n, d in ((H, shifts[:, :1]), (W, shifts[:, 1:])))
    col = torch.where(flips[:, None], W - 1 - col, col)  # (B, W)
    batch = torch.arange(B, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[batch, row[:, :, None], col[:, None, :]]  # (B, H, W, C)
    moved = (moved.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=layout)
    return gaussian_cutout(moved, fill=fill, generator=generator, boxes=boxes, noise=noise)


try:  # the same operations, as Triton kernels on a GPU
    from kernels.augment import augment  # type: ignore[no-redef,assignment]
    from kernels.gaussian_cutout import gaussian_cutout  # type: ignore[no-redef,assignment]
    from kernels.masked_step import masked_step  # type: ignore[no-redef,assignment]
    from kernels.window_energy import window_energy  # type: ignore[no-redef,assignment]
except ImportError:
    pass


# -------------------------------------------------------------------------------------------------- the embedding (Sec. 4)
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max-pool


class Embedding(nn.Module):
    """F: VGG16 trunk, one linear layer whose weight rows have unit L2 norm, no final ReLU. (B, 3, 64, 64) -> (B, dim)."""

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
            if isinstance(m, nn.Conv2d):  # thirteen convolutions without normalisation: keep the variance
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                nn.init.zeros_(m.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(self.standardised(images)))

    def standardised(self, images: Tensor) -> Tensor:
        return ((images - 0.5) * 4 if self.standardise else images).contiguous(memory_format=torch.channels_last)

    def head(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # (B, 2048 * width)
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)

    def load_vgg(self, state: dict[str, Tensor]) -> None:
        """Start the trunk from a torchvision VGG16 state dict. Raises KeyError or RuntimeError if it does not fit."""
        self.trunk.load_state_dict({k[len("features.") :]: v for k, v in state.items() if k.startswith("features.")})

    def patch_local(self, images: Tensor, boxes: Tensor) -> PatchLocal:
        """`PatchLocal` of images with boxes (B, 4) of any places and sizes: its own `boxes` cover them and are what it takes."""
        return PatchLocal(self, images, align(boxes, *images.shape[2:]))


def align(boxes: Tensor, height: int, width: int, grid: int = 4) -> Tensor:
    """Boxes (B, 4) of one size and of like places modulo `grid` that cover the given ones; those that are alike stay as they are."""
    covers = boxes.clone()
    for k, n in enumerate((height, width)):
        start, size = boxes[:, k], boxes[:, k + 2]
        if bool((size != size[0]).any()) or bool(((start - start[0]) % grid).any()):
            low = start // grid * grid
            size = (-((-start - size) // grid) * grid - low).amax().clamp(max=n)
            covers[:, k], covers[:, k + 2] = torch.minimum(low, n - size), size
    return covers


class PatchLocal:
    """F of `images` with other pixels inside one box each: (B or 1, 3, h, w) -> (B, dim), exact, for as long as the weights stay.

    A change inside a box changes only a window of each map: one pixel more on all sides after a 3x3 convolution, half of it after a
    max-pool. Convolutions are linear, so that of the changed map is that of the map with a hole in the window's place, computed
    once, plus that of the window alone. The window may reach over the edge: there the hole's map is -inf, zero after the ReLU.
    After `layers` convolutions (with their ReLU) and pools the window is pasted into the map of `images`, and the rest runs in full.

    boxes (B, 4) = (top, left, height, width) of one size, whose places are alike modulo 2 to the power of the pools among `layers`.
    layers: by default as long as the places allow and a window is at most 0.8 of its map. Raises ValueError for other boxes.
    """

    def __init__(self, embed: Embedding, images: Tensor, boxes: Tensor, layers: int | None = None) -> None:
        self.embed, self.boxes, self.layers = embed, boxes, 0
        self.units = [m for m in embed.trunk if not isinstance(m, nn.ReLU)]
        self.local: list[tuple[nn.Module, Tensor | None, tuple[int, int], tuple[slice, slice]]] = []
        corners, (h, w) = boxes[:, :2], boxes[0, 2:].tolist()
        if bool((boxes[:, 2:] != boxes[:1, 2:]).any()):
            raise ValueError("boxes must be of one size")
        with torch.no_grad():
            x = embed.standardised(images)
            for unit, following in zip(self.units, [*self.units[1:], None]):
                if self.layers == layers:
                    break
                if isinstance(unit, nn.MaxPool2d):
                    corners, h, w, x = corners // 2, h // 2, w // 2, unit(x)
                    self.local.append((unit, None, (0, 0), (slice(None), slice(None))))
                    self.layers += 1
                    continue
                grown, padding, crop = [], [], []
                for start, size in zip(corners[0].tolist(), (h, w)):  # rows, then columns
                    low, high = start - 1, start + size + 1
                    if isinstance(following, nn.MaxPool2d):
                        low, high = low // 2 * 2, -(-high // 2) * 2
                    p = max(start - low, high - start - size) + 1
                    grown.append((start - low, high - low))  # where the hole begins in the new window, and the window's size
                    padding.append(p)
                    crop.append(slice(p - 1 - (start - low), p - 1 - (start - low) + high - low))
                ((up, height), (back, width)), (H, W) = grown, x.shape[2:]
                if layers is None and height * width > 0.8 * H * W:
                    break
                outer = corners - torch.tensor([up, back], device=corners.device)
                if isinstance(following, nn.MaxPool2d) and bool((outer % 2).any()):
                    if layers is None:
                        break
                    raise ValueError(f"boxes must be alike modulo {2 * images.shape[2] // H}")
                hole = self.rows(outer - 1, height + 2, width + 2, H, W)
                slab = F.pad(x.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 1))[hole].view(len(x), height + 2, width + 2, -1)
                slab[:, up + 1 : up + 1 + h, back + 1 : back + 1 + w] = 0
                kept = F.conv2d(slab.permute(0, 3, 1, 2), unit.weight, unit.bias)
                outside = self.rows(outer, height, width, H, W) == len(x) * H * W
                kept.masked_fill_(outside.view(-1, 1, height, width), -math.inf)
                self.local.append((unit, kept, (padding[0], padding[1]), (crop[0], crop[1])))
                corners, h, w, x = outer, height, width, unit(x).relu_()
                self.layers += 1
            self.shape, self.at = x.shape, self.rows(corners, h, w, *x.shape[2:])
            self.map = F.pad(x.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 1))  # (B H W + 1, C)

    def rows(self, corners: Tensor, h: int, w: int, H: int, W: int) -> Tensor:
        """Where the pixels of h x w windows lie among (B, H, W), flat (B h w,); B H W for those outside the image."""
        B, device = len(corners), corners.device
        row, col = (corners[:, :1] + torch.arange(h, device=device))[:, :, None], (corners[:, 1:] + torch.arange(w, device=device))[:, None]
        flat = (torch.arange(B, device=device)[:, None, None] * H + row) * W + col  # (B, h, w)
        return flat.where((row >= 0) & (row < H) & (col >= 0) & (col < W), B * H * W).flatten()

    def __call__(self, patch: Tensor) -> Tensor:
        x = self.embed.standardised(patch)
        for unit, kept, padding, (rows, cols) in self.local:
            x = unit(x) if kept is None else (F.conv2d(x, unit.weight, None, 1, padding)[:, :, rows, cols] + kept).relu_()
        B, C, H, W = self.shape
        window = x.permute(0, 2, 3, 1).expand(B, -1, -1, -1).reshape(-1, C).to(self.map.dtype)
        x = self.map.index_copy(0, self.at, window)[:-1].view(B, H, W, C).permute(0, 3, 1, 2)
        for unit in self.units[self.layers :]:
            x = unit(x) if isinstance(unit, nn.MaxPool2d) else unit(x).relu_()
        return self.embed.head(x)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_2^2 of features (B, D), (B, D) -> (B,)."""
    return (a - b).square().sum(1)


def different(candidate: Tensor, target: Tensor, delta: float) -> Tensor:
    """Eq. (1): D(t; x), True where the features (B, D) are at least delta apart, that is, not the same person."""
    # Eq. (1)
    return squared_distance(candidate, target).sqrt() >= delta


def two_pair_loss(fx: Tensor, fy: Tensor, ft: Tensor, fu: Tensor, margin: float, hinge: str = "distance") -> Tensor:
    """Two-pair contrastive loss of features (B, D), mean over the batch.

    hinge `squared` is eq. (2) as printed; it has no gradient where F(t) = F(u), so a constant embedding is a stationary point.
    `distance` is max(m - d, 0)^2 as in the authors' code: there its gradient is 2 m.
    """
    positive, negative = squared_distance(fx, fy), squared_distance(ft, fu)
    if hinge == "squared":
        # Eq. (2)
        return (positive + F.relu(margin - negative)).mean()
    return (positive + F.relu(margin - (negative + 1e-12).sqrt()).square()).mean()


# --------------------------------------------------------------------------------------- the inner problem (Sec. 2.3, 3.1)
def box_windows(boxes: Tensor, height: int, width: int, grid: int = 4, groups: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of boxes (B, 4) alike in shape, tall or wide: which rows, and for each a window (n, 4) around its box, of one size and on a
    grid of `grid` pixels. (Groups alike in area have larger windows: an inner attack takes 1.1 times as long.)

    Boxes that are all the same are their own windows.
    """
    if bool((boxes == boxes[:1]).all()) and bool((boxes[:, 2:] > 0).all()):
        yield torch.arange(len(boxes), device=boxes.device), boxes
        return
    corner = boxes[:, :2] // grid * grid
    size = (-((corner - boxes[:, :2] - boxes[:, 2:]) // grid) * grid).clamp(min=grid)  # (B, 2), rounded up
    sizes = size.unique(dim=0)
    for rows in (size[:, 0] - size[:, 1]).argsort(stable=True).chunk(min(groups, len(sizes))):
        largest = size[rows].amax(0)
        last = torch.tensor([height, width], device=boxes.device) - largest
        yield rows, torch.cat([torch.minimum(corner[rows], last), largest.expand(len(rows), 2)], 1)


def inner_attack(
    embed: Embed, images: Tensor, anchors: Tensor, sign: Tensor, boxes: Tensor, steps: int, alpha: float, local: bool = True
) -> Tensor:
    """The inner maximisation of eq. (4)-(6): sign gradient steps inside fixed random rectangles, from what stands there.

    images (B, 3, H, W); anchors (B, D), constants; sign (B,): +1 moves away from the anchor (x from y), -1 towards it (t to u);
    boxes (B, 4); alpha in units of the image. Only the gradient of the input is computed. Returns images, detached.
    local: on a CPU an `Embedding` is run on windows around the rectangles alone (`PatchLocal`), the same up to rounding.
    """
    H, W, grid = *images.shape[2:], 4
    if not local or images.is_cuda or not isinstance(embed, Embedding) or not len(images) or H % grid or W % grid:
        return sign_steps(embed, images, anchors, sign * alpha, boxes, steps)
    found = images.detach().clone()
    for rows, around in box_windows(boxes, H, W, grid):
        near, corners = PatchLocal(embed, images[rows].detach(), around), around[:, :2]
        if not near.layers:
            found[rows] = sign_steps(embed, images[rows], anchors[rows], sign[rows] * alpha, boxes[rows], steps)
            continue
        places = [(b, slice(None), slice(r, r + h), slice(c, c + w)) for b, (r, c, h, w) in zip(rows.tolist(), around.tolist())]
        inside = torch.cat([boxes[rows, :2] - corners, boxes[rows, 2:]], 1)
        crops = torch.stack([found[place] for place in places]).contiguous(memory_format=torch.channels_last)
        for place, crop in zip(places, sign_steps(near, crops, anchors[rows], sign[rows] * alpha, inside, steps)):
            found[place] = crop
    return found


def sign_steps(embed: Embed, images: Tensor, anchors: Tensor, alpha: Tensor, boxes: Tensor, steps: int) -> Tensor:
    """`steps` of alpha (B,) along the sign of the gradient of the squared distance to the anchors, inside boxes (B, 4)."""
    for _ in range(steps):
        images = images.detach().requires_grad_()
        # Eq. (5): both terms, each sample on its own
        (grad,) = torch.autograd.grad(squared_distance(embed(images), anchors).sum(), images)
        images = masked_step(images.detach(), grad.to(images.dtype), alpha, boxes)
    return images.detach()


def positions(height: int, width: int, size: int, stride: int) -> Tensor:
    """Top-left corners (P, 2) of a size x size window at every stride, the flush edge included."""
    def starts(n: int) -> list[int]:
        return sorted({*range(0, n - size + 1, stride), n - size})

    return torch.tensor([(r, c) for r in starts(height) for c in starts(width)])


def doa_boxes(
    embed: Embed, images: Tensor, anchors: Tensor, sign: Tensor, size: int, stride: int, candidates: int
) -> Tensor:
    """Where DOA puts its square (Sec. 3.1; Wu et al. 2020): boxes (B, 4).

    The `candidates` windows of the largest squared gradient are each painted grey, and the one that serves the adversary best
    wins: the largest distance to the anchor where sign is +1 (positives), the smallest where it is -1 (negatives).
    """
    B, _, H, W = images.shape
    places = positions(H, W, size, stride).to(images.device)
    images = images.detach().requires_grad_()
    (grad,) = torch.autograd.grad(squared_distance(embed(images), anchors).sum(), images)
    K = min(candidates, len(places))
    best = places[window_energy(grad.contiguous(), size, size, stride).topk(K, 1).indices]  # (B, K, 2)
    boxes = torch.cat([best, torch.full_like(best, size)], 2)  # (B, K, 4)
    with torch.no_grad():
        # one candidate of each image at a time: nothing is K times as large as the batch
        painted = (torch.where(box_mask(each, H, W), images.new_tensor(0.5), images) for each in boxes.unbind(1))
        d = torch.stack([squared_distance(embed(each), anchors) for each in painted], 1)  # (B, K)
    winner = (d * sign[:, None]).argmax(1)
    return boxes[torch.arange(B, device=images.device), winner]


# ------------------------------------------------------------------------------------------------------ sampling (Sec. 2)
class Sampler:
    """Draws x, t and their companions: a person uniformly, then an image of theirs; t's person is another one.

    images uint8 (N, 3, H, W) and person int64 (N,) with values 0..P-1, resident on the device of the generator `rng`.
    """

    def __init__(self, images: Tensor, person: Tensor) -> None:
        self.images, self.person = images, person
        order = person.argsort(stable=True)
        self.count = person.bincount()
        self.table = torch.zeros(len(self.count), int(self.count.max()), dtype=torch.long, device=images.device)
        starts = self.count.cumsum(0) - self.count
        column = torch.arange(len(person), device=images.device) - starts[person[order]]
        self.table[person[order], column] = order
        self.several = (self.count > 1).nonzero()[:, 0]  # persons that can give a real positive pair

    def image_of(self, person: Tensor, rng: torch.Generator) -> Tensor:
        """One image index of each person (B,)."""
        r = torch.rand(person.shape, generator=rng, device=person.device)
        return self.table[person, (r * self.count[person]).long()]

    def draw(self, batch: int, mine: int, rng: torch.Generator, pairs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Image indices x (B,), a companion (B,) and candidates t (B, mine) of other persons.

        The companion is another image of x's person if `pairs` (eq. 6), else any other image (for `transfer`).
        """
        device, P = self.images.device, len(self.count)
        r = torch.rand(batch, generator=rng, device=device)
        person = self.several[(r * len(self.several)).long()] if pairs else (r * P).long()
        x = self.image_of(person, rng)
        if pairs:
            r = torch.rand(batch, generator=rng, device=device)
            k = (r * (self.count[person] - 1)).long()  # a place among the others
            other = self.table[person, k]
            other = torch.where(other == x, self.table[person, self.count[person] - 1], other)
        else:
            other = torch.randint(len(self.person), (batch,), generator=rng, device=device)
        others = torch.randint(1, P, (batch, mine), generator=rng, device=device)
        return x, other, self.image_of((person[:, None] + others) % P, rng)


def picked(faces, persons: Sequence[int]) -> Tensor:
    """bool (N,), which images of the faces (`data.Faces`) are of these persons."""
    return torch.isin(faces.person, torch.tensor(persons))


def sampler_of(faces, persons: Sequence[int], device: torch.device) -> Sampler:
    """Draws from these persons of the faces (`data.Faces`), numbered anew."""
    pick = picked(faces, persons)
    return Sampler(faces.images[pick].to(device), faces.person[pick].unique(return_inverse=True)[1].to(device))


# -------------------------------------------------------------------------------------------------------- one training step
Make = Callable[[Tensor, Tensor, Tensor], Tensor]  # (identity of image indices, content of image indices, content images) -> images


def make_batch(config: Config, embed: Embed, sampler: Sampler, make: Make | None, rng: torch.Generator) -> dict[str, Tensor]:
    """x, y, t, u after augmentation and mining, before any attack (App. A): images (B, 3, H, W), rectangles of x and t (B, 4).

    Under torchrun the random numbers are those of the whole batch, the rows this process's own.
    """
    B, n, size = config.batch, config.mine, sampler.images.shape[-1]
    xi, other, ti = sampler.draw(B, n, rng, pairs=not config.generated)
    index = torch.cat([xi, ti.flatten()])  # x, then the candidates of each x
    flips, shifts = draw_moves(len(index), config.shift, rng, index.device)
    p = config.cutout if config.attack_share == "erased" or config.method == "no-at" else 0.0
    area = config.weak_area if config.method == "weak-at" else config.cutout_area
    boxes = draw_boxes(len(index), size, size, p, area, config.cutout_aspect, rng, index.device)
    real, boxes, _ = augment(
        sampler.images[index], flips=flips, shifts=shifts, boxes=boxes, fill=config.fill, generator=rng, layout=torch.channels_last
    )
    x, t, x_boxes, t_boxes = map(own, (real[:B], real[B:].view(B, n, *real.shape[1:]), boxes[:B], boxes[B:].view(B, n, 4)))
    y = None
    if make is None:
        flips, shifts = draw_moves(B, config.shift, rng, other.device)
        whole = torch.zeros(B, 4, dtype=torch.long, device=other.device)  # nothing erased
        y = own(augment(sampler.images[other], flips=flips, shifts=shifts, boxes=whole, generator=rng, layout=torch.channels_last)[0])
    xi, other, ti, B, real_t = own(xi), own(other), own(ti), len(x), t.flatten(0, 1)
    with torch.no_grad():
        if make is None:
            fy, u = embed(y), y  # eq. (6): u = y
            fu = fy.repeat_interleave(n, 0)
            reference = embed(x).repeat_interleave(n, 0)
        else:
            yi = other if config.positive == "transfer" else xi
            content = sampler.images[yi].float() / 255 if config.positive == "transfer" else x
            y = make(xi, yi, content)
            u = make(xi.repeat_interleave(n), ti.flatten(), real_t)  # (B n, 3, H, W)
            fy, fu = embed(y), embed(u)
            reference = fu
        # App. A: of n_m candidates the negative pair of the lowest feature distance, for the baselines against x
        fc = embed(real_t)
        pick = squared_distance(fc, reference).view(B, n).argmin(1)
        rows = torch.arange(B, device=pick.device)
        batch = {"x": x, "y": y, "t": t[rows, pick], "x_boxes": x_boxes, "t_boxes": t_boxes[rows, pick], "index": index}
        batch["anchor_t"] = fu.view(B, n, -1)[rows, pick]  # what t is attacked towards, already known
        batch["anchor_x"] = fy
        batch["u"] = y if make is None else u.view(B, n, *u.shape[1:])[rows, pick]
    return batch


def attack_batch(config: Config, embed: Embed, batch: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and t of the batch after the inner attack of the method (Sec. 2.3, 3.1, App. A)."""
    if config.method == "no-at":
        return batch["x"], batch["t"]
    B, size, world = len(batch["x"]), batch["x"].shape[-1], processes()[1]
    images = torch.cat([batch["x"], batch["t"]])
    anchors = torch.cat([batch["anchor_x"], batch["anchor_t"]])
    sign = torch.ones(2 * B, device=images.device)
    sign[B:] = -1.0  # x away from y, t towards u
    boxes = torch.cat([batch["x_boxes"], batch["t_boxes"]])
    if config.attack_share == "all":
        if config.method == "doa":
            boxes = doa_boxes(embed, images, anchors, sign, config.doa_size, config.doa_stride, config.candidates)
            boxes = torch.cat([boxes[:B]] * world + [boxes[B:]] * world)
        else:
            area = config.weak_area if config.method == "weak-at" else config.cutout_area
            boxes = draw_boxes(2 * B * world, size, size, 1.0, area, config.cutout_aspect, rng, images.device)
        whole = torch.cat([batch["x"]] * world + [batch["t"]] * world)  # for the noise of the whole batch; only own rows are kept
        whole, boxes, _ = gaussian_cutout(whole, fill=config.fill, generator=rng, boxes=boxes)
        images, boxes = (torch.cat([*map(own, both.chunk(2))]) for both in (whole, boxes))
    chosen = (boxes[:, 2] > 0).nonzero()[:, 0]  # only what is erased is attacked
    if len(chosen):
        found = inner_attack(
            embed, images[chosen], anchors[chosen], sign[chosen], boxes[chosen], config.attack_steps, config.attack_alpha / 255, config.local
        )
        images = images.index_copy(0, chosen, found)
    return images[:B], images[B:]


def train_step(
    config: Config, embed: Embedding, adam: torch.optim.Optimizer, sampler: Sampler, make: Make | None, rng: torch.Generator
) -> dict[str, float]:
    """One step of eq. (3), (4) or (6). Returns loss and mean distances. Raises FloatingPointError on a non-finite loss."""
    cast = torch.autocast(sampler.images.device.type, torch.bfloat16, enabled=config.autocast)
    with cast:
        batch = make_batch(config, embed, sampler, make, rng)
        x, t = attack_batch(config, embed, batch, rng)
        if config.generated:
            fx, fy, ft, fu = embed(torch.cat([x, batch["y"], t, batch["u"]])).float().chunk(4)
        else:
            fx, fy, ft = embed(torch.cat([x, batch["y"], t])).float().chunk(3)
            fu = fy
    # Eq. (4), (6): the outer minimisation
    loss = two_pair_loss(fx, fy, ft, fu, config.margin, config.hinge)
    adam.zero_grad()
    loss.backward()
    values = torch.stack([loss.detach(), squared_distance(fx, fy).detach().sqrt().mean(), squared_distance(ft, fu).detach().sqrt().mean()])
    all_reduce_mean([values, *(p.grad for p in embed.parameters())])
    norm = nn.utils.clip_grad_norm_(embed.parameters(), math.inf)
    loss_value, d_positive, d_negative, norm_value = torch.cat([values, norm[None]]).tolist()  # the one transfer to the host
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise NotFinite(f"loss {loss_value}, gradient norm {norm_value}", batch["index"])
    adam.step()
    return {"loss": loss_value, "d_positive": d_positive, "d_negative": d_negative, "gradient": norm_value}


# -------------------------------------------------------------------------------------------------- validation (Sec. 4, App. A)
@torch.no_grad()
def features(embed: Embed, images: Tensor, mirror: bool = False, batch: int = 256) -> Tensor:
    """Features (N, D) of images uint8 (N, 3, H, W), of their mirror images if asked."""
    parts = (part.float() / 255 for part in images.split(batch))
    return torch.cat([embed(part.flip(3) if mirror else part) for part in parts])


def auroc(genuine: Tensor, intruder: Tensor) -> float:
    """Probability that an intruder (M,) lies farther than a genuine one (N,), ties one half."""
    ordered = genuine.sort().values
    below = torch.searchsorted(ordered, intruder, right=False) + torch.searchsorted(ordered, intruder, right=True)
    return float(below.double().mean() / (2 * len(genuine)))


@torch.no_grad()
def validate(config: Config, embed: Embed, sampler: Sampler, rng: torch.Generator, pairs: int = 1000) -> dict[str, float]:
    """Loss and AU-ROC on fresh real pairs of the validation persons: x, another of theirs, and one of another person."""
    found = features(embed, sampler.images)
    xi, yi, ti = sampler.draw(pairs, 1, rng, pairs=True)
    fx, fy, ft = found[xi], found[yi], found[ti[:, 0]]
    return {
        "val_loss": float(two_pair_loss(fx, fy, ft, fx, config.margin, config.hinge)),
        "val_auroc": auroc(squared_distance(fx, fy), squared_distance(fx, ft)),
    }


@torch.no_grad()
def genuine_threshold(embed: Embed, images: Tensor, person: Tensor, fpr: float = 0.05) -> float:
    """delta of eq. (1) at which `fpr` of the genuine pairs are refused, with mirroring (Sec. 4.2, 4.3)."""
    plain, mirrored = features(embed, images), features(embed, images, mirror=True)
    both = (torch.cdist(plain, plain).square() + torch.cdist(mirrored, plain).square()) / 2  # (candidate, target)
    same = (person[:, None] == person[None]) & ~torch.eye(len(person), dtype=torch.bool, device=person.device)
    return float(both[same].sqrt().quantile(1 - fpr))


def collapsed(line: dict[str, float], config: Config) -> bool:
    """Whether F has become constant: the negatives' distance all but vanishes beside the margin."""
    return line["d_negative"] < 0.02 * (config.margin if config.hinge == "distance" else math.sqrt(config.margin))


# ----------------------------------------------------------------------------------------------------------- checkpoints
def replace(path: Path, fill: Callable[[BinaryIO], object], keep: bool = False) -> None:
    """fill(file) beside `path`, synced, then renamed: a crash leaves the old file or the new one, never half of one.

    keep: the old file stays as <name>.old, where the disk knows hard links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    try:
        with open(beside, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            old.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.link(path, old)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        beside.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise UsageError(f"{path}: cannot be written ({reason}): free some space or choose another --run") from None


def save(path: Path, content: dict[str, object], keep: bool = False) -> None:
    replace(path, lambda f: torch.save(content, f), keep)


def read(path: Path, kind: str) -> dict:
    """A checkpoint of this project, loaded with weights_only. Raises UsageError if it is missing, broken or another kind."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint: train it first with embed.py, or name another --run") from None
    except Exception as error:  # noqa: BLE001 torch.load raises many kinds for a file that is not a checkpoint
        line = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"{path}: not a readable checkpoint ({line}): restore the file or train again") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UsageError(f"{path}: not a checkpoint of kind {kind!r}: name the right file")
    return content


def read_newest(path: Path, kind: str) -> dict:
    """`read`; a damaged file is named, and the one before it taken in its place if it was kept."""
    try:
        return read(path, kind)
    except UsageError as error:
        old = path.with_name(path.name + ".old")
        if not old.exists():
            raise
        print(f"WARNING: {error}; going on from the one before, {old}", file=sys.stderr)
        return read(old, kind)


def fingerprint(*tensors: Tensor | None) -> str:
    """Sixteen hexadecimal digits that another value changes. For photographs, their pixels; for rendered faces, their factors: how
    a pixel is rounded depends on the number of threads."""
    found = hashlib.sha256()
    for tensor in tensors:
        for part in () if tensor is None else tensor.split(4096):
            found.update(part.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def read_json(path: Path) -> dict:
    """A json file's object. Raises UsageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")  # noqa: TRY004 one kind for all that is wrong with the file
        return content
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}): restore it, or train again with --overwrite") from None


def whole_lines(log: Path, key: str, last: int) -> list[str]:
    """The log's lines that are whole and not beyond `last`."""
    kept = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)[key] <= last:
                kept.append(line)
    return kept


def load_embedding(path: str | Path, device: str | torch.device = "cpu") -> Embedding:
    """A trained F in eval mode, without weight gradients. Raises UsageError if missing, broken, or of another architecture."""
    content = read(Path(path), "embedding")
    try:
        c = content["config"]
        with torch.device("meta"):  # costs nothing, whatever the settings say
            shapes = {k: v.shape for k, v in Embedding(c["width"], c["dim"], c["standardise"]).state_dict().items()}
        if shapes != {k: v.shape for k, v in content["model"].items()}:
            raise ValueError("shapes differ")
        embed = Embedding(c["width"], c["dim"], c["standardise"])
        embed.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError, MemoryError) as error:
        line = " ".join(str(error).split())[:160]
        raise UsageError(f"{path}: weights and settings do not fit together ({line}): train it again") from None
    return embed.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------- main
@functools.cache
def notes(settings: type) -> dict[str, str]:
    """What the source says beside each of a dataclass's fields: the help of its flag."""
    with contextlib.suppress(OSError):  # no source at hand
        return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.MULTILINE))
    return {}


def described(field: dataclasses.Field) -> str:
    """Help of a setting's flag: its note, the paper's default, the demo's where it is another."""
    demo, note = PRESETS["demo"].get(field.name, field.default), notes(Config).get(field.name, "")
    return f"{note} [{field.default!r}{f'; demo: {demo!r}' * (demo != field.default)}]".replace("%", "%%").strip()


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (--help lists the flags)")


def pair(text: str) -> tuple[float, ...]:
    return tuple(float(v) for v in text.split(","))


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """The command line made from Config; a flag wins over the preset, the preset over the paper's default."""
    parser = Parser(prog="embed.py", description="Train and judge the embedding F (Sec. 2-4). In brackets: the preset paper's value; the demo's.")
    choices = {
        "preset": tuple(PRESETS), "method": METHODS, "positive": ("reconstruct", "transfer"), "hinge": ("distance", "squared"),
        "data": ("synthetic", "folder", "celeba"), "fill": ("gaussian", "uniform"), "generate_from": ("clean", "erased"),
        "attacked": ("auto", "erased", "all"), "select": ("auto", "last", "best-loss", "best-auroc"),
    }  # fmt: skip
    for field in dataclasses.fields(Config):
        flag, default, told = "--" + field.name.replace("_", "-"), field.default, described(field)
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=told)
        elif isinstance(default, tuple):
            parser.add_argument(flag, type=pair, metavar="LOW,HIGH", help=told)
        else:
            kind, named = type(default), choices.get(field.name)
            parser.add_argument(flag, type=kind, choices=named, metavar=None if named else kind.__name__, help=told)
    parser.set_defaults(**{f.name: None for f in dataclasses.fields(Config)})
    parser.add_argument("--all", action="store_true", help="every method, attack, table and figure; the same command goes on after a stop")
    parser.add_argument("--jobs", type=int, default=0, help="with --all: methods at a time (default: one a core up to 4, on a GPU 1)")
    parser.add_argument("--run", type=Path, help="folder of the run (default runs/<data>-<preset>-<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted training stopped")
    parser.add_argument("--overwrite", action="store_true", help="train again over a finished or unfinished method")
    parser.add_argument("--no-evaluation", action="store_true", help="train only")
    parser.add_argument("--profile", action="store_true", help="train nothing: print where the time of a training step goes")
    parser.add_argument("--verify", nargs=2, metavar=("A", "B"), help="are these two photographs of one person? (eq. 1)")
    parser.add_argument("--device", default="", help="cpu, cuda, ... (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    preset = str(given.get("preset", "demo"))
    config = Config(**{**PRESETS[preset], "preset": preset, **given})  # type: ignore[arg-type]
    check(config)
    if config.method == "doa" and config.attacked == "erased":
        raise UsageError("--attacked erased: DOA searches a place in every image (Sec. 3.1), so it attacks all; leave it out")
    if args.jobs < 0:
        raise UsageError(f"--jobs {args.jobs}: give 0 or more")
    return config, args


# settings whose numbers have other bounds than 0 (a float) or 1 (an integer) to what a computer holds
BOUNDS: dict[str, tuple[float, float]] = {name: (0, 2**31 - 1) for name in "seed split_seed train_persons persons attack_warmup".split()}
BOUNDS |= {"validation_persons": (2, 2**31 - 1)}
BOUNDS |= {"shift": (0, 63), "doa_size": (1, 64), "width": (0.001, 16), "cutout": (0, 1), "cutout_area": (0.0001, 1), "weak_area": (0.0001, 1)}
BOUNDS |= {"cutout_aspect": (0.01, 100), "rate": (1e-12, 1e3), "margin": (1e-6, 1e6), "attack_alpha": (0, 255)}


def check(config: Config) -> None:
    """UsageError naming the flag unless every number is in its bounds, and every range has two of them in order."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        low, high = BOUNDS.get(field.name, (1, 2**31 - 1) if isinstance(field.default, int) else (0, 1e9))
        several = value if isinstance(value, tuple) else (value,)
        told = ",".join(map(str, several))
        if isinstance(value, list):  # what argparse makes of --flag=--
            raise UsageError(f"{flag}: give a value")
        if isinstance(value, tuple) and (len(value) != 2 or value[0] > value[1]):
            raise UsageError(f"{flag} {told}: give two numbers, the lower first")
        if not isinstance(value, (bool, str)) and not all(low <= v <= high for v in several):
            raise UsageError(f"{flag} {told}: give {'numbers' if len(several) > 1 else 'a number'} from {low} to {high}")
        if field.name in ("persons", "train_persons") and value == 1:
            raise UsageError(f"{flag} 1: give 2 or more, or 0 for all: t is of another person than x")


def differing(old: dict, new: dict) -> str:
    """The fields in which two settings differ, as text; empty if they agree."""
    old, new = ({k: list(v) if isinstance(v, tuple) else v for k, v in d.items()} for d in (old, new))
    return ", ".join(f"{k} ({old.get(k)} before, {new.get(k)} now)" for k in sorted({*old, *new}) if old.get(k) != new.get(k))


def versions(device: torch.device) -> dict[str, str]:
    """Device, package versions and commit, for the result's record."""
    import platform
    import subprocess

    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} x{torch.get_num_threads()}"
    name += f", {processes()[1]} processes" * (processes()[1] > 1)
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": git.stdout.strip() or "unknown"}


def load_generator(path: Path, device: torch.device):
    """generator.py's trained Lord and its file's content; raises this script's own UsageError."""
    import generator

    try:
        return generator.load_generator(path, device)
    except generator.UsageError as error:
        raise UsageError(str(error)) from None


def find_generator(config: Config, run: Path, faces, split, args: argparse.Namespace, device: torch.device):
    """The run's generator (a `generator.Lord`); for the demo on rendered faces the one in data/; otherwise one is trained now."""
    import generator

    path = run / "generator.pt"
    shipped = Path(__file__).resolve().parent / "data" / "generator_demo.pt"
    if processes()[0] == 0 and not path.exists() and (config.preset, config.data) == ("demo", "synthetic") and shipped.exists():
        if (log := shipped.parents[1] / "results" / "demo" / "generator.jsonl").exists():
            copy(log, run / log.name)  # what its training took
        copy(shipped, path)
        print(f"generator: the demo's own, from data/{shipped.name}")
    meet()
    if not path.exists():
        print("generator: none in this run yet, so it is trained first")
        names: tuple[str, ...] = ("data", "root", "crop", "seed", "split_seed", "train_persons", "validation_persons", "target_persons")
        names += ("synthetic_persons", "synthetic_images")
        flags = [f"--{n.replace('_', '-')}={getattr(config, n)}" for n in names]
        preset = config.preset if config.preset in generator.PRESETS else "paper"
        flags += [f"--preset={preset}", f"--run={run}", *(["--resume"] if (run / "generator.ckpt").exists() else [])]
        if code := generator.main(flags + ([f"--device={args.device}"] if args.device else [])):
            raise SystemExit(code)
    lord, content = load_generator(path, device)
    seen = {*content["train"]} & {faces.names[p] for p in (*split.validation, *split.target)}
    if seen:
        raise UsageError(f"{path}: was trained on {len(seen)} of the validation or target persons ({min(seen)}, ...): train one with generator.py on this split")
    return lord


def maker(config: Config, lord, images: Tensor, person: Tensor) -> Make:
    """How y and u are made: from the codes of the sampled images, computed once (Sec. 2), or as in the released code."""
    import generator

    class_codes, content_codes = generator.encode(lord, images)
    if config.generate_from == "clean":
        copies = generator.decode(lord, class_codes, content_codes).half() if config.positive == "reconstruct" else None

        def make(identity: Tensor, content: Tensor, _: Tensor) -> Tensor:
            if content is identity and copies is not None:
                return copies[identity].float()
            return lord.generator(class_codes[identity], content_codes[content])

        return make
    first = torch.stack([(person == p).nonzero()[0, 0] for p in range(int(person.max()) + 1)])
    return lambda identity, _, pixels: lord.generator(class_codes[first[person[identity]]], lord.content_encoder(pixels))


def find_maker(
    config: Config, run: Path, faces, split, persons: Sequence[int], sampler: Sampler, args: argparse.Namespace, device: torch.device
) -> Make | None:
    """How y and u of the sampler's persons are made: by the generator, by the renderer (`truth`), or not at all (real pairs)."""
    if not config.generated:
        return None
    if config.truth:
        return true_maker(faces, picked(faces, persons), device)
    return maker(config, find_generator(config, run, faces, split, args, device), sampler.images, sampler.person)


def true_maker(faces, pick: Tensor, device: torch.device) -> Make:
    """y and u rendered from the true factors of the picked images (N,) bool: the ceiling of what a better generator can bring."""
    from data import synthetic

    if faces.identity is None:
        raise UsageError(f"--truth: {faces.data} has no true factors: use --data synthetic, or leave it out")
    factors, content = faces.identity[faces.person[pick]].to(device), faces.content[pick].to(device)
    return lambda i, k, _: synthetic.render(factors[i], content[k]).float() / 255


def train(config: Config, run: Path, faces, split, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train F by `config.method`, with log, validation, progress and checkpoints; returns the record for result.json."""
    folder = run / config.name
    part, log, rank = folder / "training.ckpt", folder / "log.jsonl", processes()[0]
    settings, people = dataclasses.asdict(config), read_json(run / "people.json")["sha256"]
    persons = split.train[: config.persons or None]
    if config.persons > len(split.train):
        raise UsageError(f"--persons {config.persons}: there are only {len(split.train)} train persons: ask for fewer")

    training, held = sampler_of(faces, persons, device), sampler_of(faces, split.validation, device)
    if not config.generated and not len(training.several):
        raise UsageError(f"--method {config.method}: needs train persons with two images or more, there is none: give more photographs")
    made_of = {"images": fingerprint(training.images if faces.identity is None else faces.identity, faces.content), "generator": ""}
    if config.generated and not config.truth and (run / "generator.pt").exists():
        made_of["generator"] = hashlib.sha256((run / "generator.pt").read_bytes()).hexdigest()[:16]
    torch.manual_seed(config.seed)
    embed = Embedding(config.width, config.dim, config.standardise)
    if config.weights:
        try:
            embed.load_vgg(torch.load(config.weights, map_location="cpu", weights_only=True))
        except Exception as error:  # noqa: BLE001 as above
            told = " ".join(str(error).split())[:120]
            raise UsageError(f"--weights {config.weights}: not a VGG16 of this width ({told}): name a torchvision VGG16, --width 1") from None
    embed = embed.to(device)
    adam = torch.optim.Adam(embed.parameters(), lr=config.rate, amsgrad=config.amsgrad, fused=device.type == "cuda")
    rng = torch.Generator(device)
    step, seconds, best = 0, 0.0, {"best-loss": math.inf, "best-auroc": -math.inf}
    unfinished = part.exists()
    meet()  # every process has looked before rank 0 writes
    if args.resume and unfinished:
        state = read_newest(part, "embedding-training")
        try:
            if differs := differing(state["config"], settings):
                raise UsageError(f"--resume: {part} was made with other settings: {differs}; use those, or --overwrite")
            if state["people"] != people:
                raise UsageError(f"--resume: {part} was trained on other persons than {run / 'people.json'} names: use --overwrite")
            if differs := differing(state["made of"], made_of):
                raise UsageError(f"--resume: {part} was trained on other files: {differs}; restore them, or --overwrite")
            embed.load_state_dict(state["model"])
            adam.load_state_dict(state["adam"])
            step, seconds, best = int(state["step"]), float(state["seconds"]), {k: float(state["best"][k]) for k in best}
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{part}: does not hold this training ({' '.join(str(error).split())[:120]}): use --overwrite") from None
        if rank == 0:
            write(log, "".join(line + "\n" for line in whole_lines(log, "step", step)))
        print(f"resumed at step {step}")
    elif unfinished and not args.overwrite:
        raise UsageError(f"{part}: an unfinished training is here: --resume to go on, --overwrite to start again")
    elif rank == 0:
        log.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() or (folder / "result.json").exists():  # --overwrite: what is there counts as unfinished from here on
            progress = {"step": 0, "seconds": 0.0, "best": best, "model": embed.state_dict(), "adam": adam.state_dict()}
            save(part, {"kind": "embedding-training", "config": settings, "people": people, "made of": made_of, **progress})
        log.write_text("")
    make = find_maker(config, run, faces, split, persons, training, args, device)
    if config.generated and not config.truth:
        made_of["generator"] = hashlib.sha256((run / "generator.pt").read_bytes()).hexdigest()[:16]
    commit = versions(device)["commit"]
    print(f"{config.name}: {len(training.images)} images of {len(persons)} persons, {config.steps} steps of {config.batch} on {device}")

    def checkpoint(name: str) -> None:
        save(folder / f"embedding-{name}.pt", {"kind": "embedding", "config": settings, "people": people, "commit": commit, "step": step, "model": embed.state_dict()})

    started, begun, before, sums = time.time(), step, seconds, []
    while step < config.steps:
        rng.manual_seed(config.seed * 1_000_003 + step)  # a step's random numbers depend on (seed, step) alone
        for group in adam.param_groups:
            group["lr"] = config.rate_end + (config.rate - config.rate_end) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        now = dataclasses.replace(config, attack_alpha=config.alpha(step))
        try:
            sums.append(train_step(now, embed, adam, training, make, rng))
        except NotFinite as error:
            where = picked(faces, persons).nonzero()[error.index.cpu(), 0].tolist()
            raise FloatingPointError(
                f"step {step + 1}: {error.told}; images {where} of the data, the first is {faces.files[where[0]]}; "
                f"last good checkpoint: {part if part.exists() else 'none yet'}"
            ) from None
        step += 1
        if rank or (step % config.validate_every and step != config.steps):
            continue
        line: dict[str, float] = {"step": step, **{k: sum(s[k] for s in sums) / len(sums) for k in sums[0]}}
        sums = []
        line |= validate(config, embed, held, rng.manual_seed(config.seed * 1_000_003 + 500_009 + step))
        seconds = before + time.time() - started
        line["seconds"] = seconds
        if line["val_loss"] < best["best-loss"]:
            best["best-loss"] = line["val_loss"]
            checkpoint("best-loss")
        if line["val_auroc"] > best["best-auroc"]:
            best["best-auroc"] = line["val_auroc"]
            checkpoint("best-auroc")
        state = {"kind": "embedding-training", "config": settings, "people": people, "made of": made_of, "commit": commit}
        state |= {"step": step, "seconds": seconds, "best": best}
        with open(log, "a") as f:  # before the checkpoint: a resumed training drops the lines beyond it
            f.write(json.dumps(line) + "\n")
        save(part, {**state, "model": embed.state_dict(), "adam": adam.state_dict()}, keep=True)
        left = (time.time() - started) / (step - begun) * (config.steps - step)
        print(
            f"step {step}/{config.steps}  loss {line['loss']:.2f}  d+ {line['d_positive']:.2f}  d- {line['d_negative']:.2f}  "
            f"val loss {line['val_loss']:.2f}  val AU-ROC {line['val_auroc']:.3f}  left {left / 60:.1f} min", flush=True,
        )  # fmt: skip
        if collapsed(line, config):
            print(f"WARNING: mean negative distance {line['d_negative']:.3g}: the embedding has collapsed to a constant (try --hinge distance, a lower --rate)")
    meet()
    if rank:
        return {}
    checkpoint("last")
    copy(folder / f"embedding-{config.selected}.pt", folder / "embedding.pt")
    embed = load_embedding(folder / "embedding.pt", device)
    delta = genuine_threshold(embed, held.images, held.person)
    return {"config": settings, "people": people, "threshold": delta, "seconds": seconds, "seconds_per_step": seconds / config.steps, "selected": config.selected, **versions(device)}


def profile(config: Config, run: Path, faces, split, args: argparse.Namespace, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Seconds of a training step and of its parts (medians), its FLOPs and the FLOP/s of a matrix product, on 50 train persons; prints them."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Count(TorchDispatchMode):  # FlopCounterMode hooks modules, which torch.autograd.grad refuses
        flops = 0

        def __torch_dispatch__(self, function, types, inputs=(), named=None):
            result = function(*inputs, **(named or {}))
            if count := flop_registry.get(function._overloadpacket):
                self.flops += count(*inputs, **(named or {}), out_val=result)
            return result

    persons = split.train[: min(config.persons or 50, 50)]
    sampler = sampler_of(faces, persons, device)
    make = find_maker(config, run, faces, split, persons, sampler, args, device)
    torch.manual_seed(config.seed)
    embed = Embedding(config.width, config.dim, config.standardise).to(device)
    adam = torch.optim.Adam(embed.parameters(), lr=config.rate, amsgrad=config.amsgrad, fused=device.type == "cuda")
    rng = torch.Generator(device).manual_seed(config.seed)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=config.autocast)
    a = torch.randn(2, *[8192 if device.type == "cuda" else 1024] * 2, device=device)
    spent: dict[str, list[float]] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(name: str, call: Callable, *inputs):
        began = now()
        result = call(*inputs)
        spent[name][-1] += now() - began
        return result

    for n in range(repeats + 1):
        if n <= 1:  # the first one warms up
            spent = {name: [] for name in ("step", "batch", "generator", "mining", "inner attack", "product")}
        for times in spent.values():
            times.append(0.0)
        with cast:
            timed("product", torch.mm, *a)
            mine, generate = (lambda *v: timed("mining", embed, *v)), (lambda *v: timed("generator", make, *v)) if make else None
            batch = timed("batch", make_batch, config, mine, sampler, generate, rng)
            timed("inner attack", attack_batch, config, embed, batch, rng)
        timed("step", train_step, config, embed, adam, sampler, make, rng)
    with Count() as counter:
        train_step(config, embed, adam, sampler, make, rng.manual_seed(config.seed))
    m = {name: sorted(times)[len(times) // 2] for name, times in spent.items()}
    rest = sorted(b - g - n for b, g, n in zip(spent["batch"], spent["generator"], spent["mining"]))
    found = {"data": rest[len(rest) // 2], **{k: m[k] for k in ("generator", "mining", "inner attack")}}
    found["update"] = m["step"] - m["batch"] - m["inner attack"]
    for name, seconds in (*found.items(), ("step", m["step"])):
        print(f"{name:14}{seconds * 1e3:10.2f} ms{seconds / m['step'] * 100:7.1f} %")
    flops, rate = counter.flops, 2 * len(a[0]) ** 3 / m["product"]
    print(
        f"{flops / 1e9:.1f} GFLOP a step of {config.batch}, {flops / m['step'] / 1e9:.0f} GFLOP/s, {flops / m['step'] / rate:.0%} of the {rate / 1e9:.0f} of a "
        f"{len(a[0])} x {len(a[0])} product here ({'bfloat16' if config.autocast else 'float32'}, {versions(device)['device']}); medians of {repeats}"
    )
    return {**found, "step": m["step"], "flops": flops, "rate": rate}


def write(path: Path, text: str) -> None:
    replace(path, lambda f: f.write(text.encode()))


def write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=1) + "\n")


def copy(source: Path, path: Path) -> None:
    replace(path, lambda f: f.write(source.read_bytes()))


def trained(folder: Path) -> bool:
    """Whether the training of a method has ended: with a result, and no checkpoint of an unfinished one."""
    return (folder / "result.json").exists() and not (folder / "training.ckpt").exists()


def verify(config: Config, args: argparse.Namespace, run: Path, device: torch.device) -> None:
    """Eq. (1) for two photographs, with mirroring."""
    import data

    folder = run / config.name
    embed = load_embedding(folder / "embedding.pt", device)
    try:
        delta = float(read_json(folder / "result.json")["threshold"])
        if not 0 < delta < math.inf:
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise UsageError(f"{folder / 'result.json'}: no threshold there: train to the end first, or name another --run") from None
    target, candidate = (data.load_image(Path(p), crop=config.crop or None)[None].to(device) for p in args.verify)
    anchor = features(embed, target)
    d = torch.stack([squared_distance(features(embed, candidate, m), anchor) for m in (False, True)]).mean(0).sqrt()
    print(f"distance {float(d):.3f}  threshold {delta:.3f} (5 % of genuine validation pairs refused)  {'NOT the same person' if float(d) >= delta else 'same person'}")


def open_run(config: Config, run: Path):
    """The faces (`data.Faces`) and their split; a new run gets its manifest."""
    import data

    options = {}
    if config.data == "synthetic":
        options = dict(persons=config.synthetic_persons, images_per_person=config.synthetic_images)
    faces = data.load(config.data, config.root or None, crop=config.crop or None, **options)
    parts = config.train_persons or None, config.validation_persons, config.target_persons
    split = data.open_split(run / "people.json", faces, *parts, config.split_seed)
    record = {"data": config.data, "root": str(Path(config.root).resolve()) if config.root else "", "crop": config.crop, "preset": config.preset, "seed": config.seed, "options": options}
    if processes()[0] == 0:
        write_json(run / "run.json", record)
    return faces, split


def main(argv: list[str] | None = None) -> int:
    import data

    try:
        config, args = parse(argv)
        run, (rank, world) = args.run or config.run, processes()
        if config.batch % world:
            raise UsageError(f"--batch {config.batch}: must divide by torchrun's {world} processes: give a multiple of {world}")
        if args.all and world > 1:
            raise UsageError("--all: not under torchrun: leave out torchrun, or give it one --method after another")
        device = join(args.device)
        if args.verify:
            verify(config, args, run, device)
            return 0
        if args.all:
            return everything(config, args, run, device)
        with rank_0_first():
            faces, split = open_run(config, run)
        if args.profile:
            profile(config, run, faces, split, args, device)
            return 0
        folder = run / config.name
        result = folder / "result.json"
        if trained(folder) and not args.overwrite:
            record = read_json(result)
            if not isinstance(record.get("config"), dict):
                raise UsageError(f"{result}: does not say what was trained; use --overwrite or another --run")
            if record.get("people") != read_json(run / "people.json").get("sha256"):
                raise UsageError(f"{folder}: trained on other persons than {run / 'people.json'} names; use --overwrite or another --run")
            if differs := differing(record["config"], dataclasses.asdict(config)):
                raise UsageError(f"{folder}: trained with other settings: {differs}; use --overwrite or another --run")
            print(f"{folder} is trained already (--overwrite trains it anew)")
        else:
            record = train(config, run, faces, split, args, device)
            if rank == 0:
                write_json(result, record)
                for kept in ("training.ckpt.old", "training.ckpt"):
                    (folder / kept).unlink(missing_ok=True)
        meet()
        print(f"wrote {folder}/embedding.pt, log.jsonl, result.json")
        if not args.no_evaluation:
            if rank == 0 and not config.generated and (run / "generator.pt").exists():
                write_figure3(config, run, faces, split, device)
            return evaluate(config, run, args)
    except (UsageError, data.DataError) as error:
        tell(f"embed.py: {error}")
        return 2
    except OSError as error:
        tell(f"embed.py: {error.filename or run}: {error.strerror}: mend that, then the same command with --resume goes on")
        return 2
    except FloatingPointError as error:
        tell(f"embed.py: {error}")
        return 1
    except KeyboardInterrupt:
        tell("\nembed.py: interrupted; the same command with --resume goes on from the last checkpoint")
        return 130
    return 0


def evaluate(config: Config, run: Path, args: argparse.Namespace) -> int:
    """The target persons, clean and under eyeglasses, with mirroring and selection; then the table."""
    import attacks
    import metrics

    code = attacks.main([*attack_flags(config, run, args), "--attacks=clean,eyeglasses", *(["--resume"] if args.resume else [])])
    return code or (metrics.main(["--run", str(run), "--figures", "2"]) if processes()[0] == 0 else 0)


def attack_preset(config: Config) -> str:
    return "demo" if config.preset == "demo" else "paper"


def attack_flags(config: Config, run: Path, args: argparse.Namespace) -> list[str]:
    flags = ["--run", str(run), "--method", config.name, "--preset", attack_preset(config), "--seed", str(config.seed)]
    return flags + (["--device", args.device] if args.device else [])


def write_figure3(config: Config, run: Path, faces, split, device: torch.device, pairs: int = 500) -> None:
    """Fig. 3: distances from t to an image of another target person, once the real x, once u with x's identity and t's content."""
    import generator

    lord, _ = load_generator(run / "generator.pt", device)
    embed = load_embedding(run / config.name / "embedding.pt", device)
    sampler = sampler_of(faces, split.target, device)
    xi, _, ti = sampler.draw(pairs, 1, torch.Generator(device).manual_seed(config.seed))
    class_codes, content_codes = generator.encode(lord, sampler.images)
    u = generator.decode(lord, class_codes[xi], content_codes[ti[:, 0]])
    real = features(embed, sampler.images)
    kinds = {"real-real": real[xi], "real-generated": features(embed, (u * 255).round().to(torch.uint8))}
    lines = [f"{kind},{d:.7g}\n" for kind, f in kinds.items() for d in squared_distance(real[ti[:, 0]], f).sqrt().tolist()]
    path = run / config.name / "attacks" / "figure3.csv"
    path.parent.mkdir(exist_ok=True)
    write(path, "kind,distance\n" + "".join(lines))


# ------------------------------------------------------------------------------------------------------- --all, stage by stage
@dataclass(frozen=True)
class Stage:
    what: str
    work: float  # images through F, roughly; 0: nothing left to do. Only for the time left
    call: Callable[[], int | None]
    chain: str = ""  # stages of one chain follow each other, chains run side by side; empty: alone
    command: tuple[str, ...] = ()  # what `call` does, as a script and its flags


def training_work(config: Config) -> float:
    """Images through F, forward and backward, that a training takes, roughly; images from G count as several."""
    share = {"erased": config.cutout, "all": 1.0}[config.attack_share] * (config.method != "no-at")
    search = 1 + config.candidates / 3 if config.method == "doa" else 0
    return config.steps * config.batch * ((28 if config.generated else 8) + 2 * (share * config.attack_steps + search))


def stages(config: Config, args: argparse.Namespace, run: Path, device: torch.device) -> list[Stage]:
    """What Tables 1 and 2, B.2, Sec. 4.3, 4.4 and Figures 1-9 need, in order."""
    import attacks
    import generator
    import metrics

    common = ["--run", str(run), *(["--device", args.device] if args.device else [])]
    for name, value in ((f.name, getattr(args, f.name)) for f in dataclasses.fields(Config)):
        if value is not None:
            flag, text = name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, tuple) else value
            common.append(f"--{flag}={text}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}")

    def generator_stage() -> None:
        faces, split = open_run(config, run)
        lord = find_generator(config, run, faces, split, args, device)
        if not (run / "generator.json").exists():
            try:
                generator.evaluate(generator.Config(data=config.data, seed=config.seed), run, lord, faces, split, device)
            except generator.UsageError as error:
                raise UsageError(str(error)) from None

    def training(title: str, flags: tuple[str, ...]) -> Stage:
        method, _ = parse([*common, *flags])
        what, told = f"train {method.name}, {method.steps} steps{title}", [*common, *flags, "--resume", "--no-evaluation"]
        work = 0 if trained(run / method.name) else training_work(method)
        return Stage(what, work, lambda: main(told), method.name, ("embed.py", *told))

    def attacking(flags: tuple[str, ...], names: list[str], defences: str) -> Stage:
        method, _ = parse([*common, *flags])
        told = [*attack_flags(method, run, args), "--attacks", ",".join(names), "--defences", defences, "--resume"]
        left = [n for n in names if not attacks.finished(run / method.name / "attacks" / f"{n}.csv", defences)]
        work = attacks.work(left, attacks.Config(**{**attacks.PRESETS[attack_preset(method)], "defences": defences}))
        what = f"attack {method.name}: {', '.join(names)}" + (" (every defence)" if defences == "all" else "")
        return Stage(what, work, lambda: attacks.main(told), method.name, ("attacks.py", *told))

    def figure3_stage() -> None:
        faces, split = open_run(config, run)
        for name in ("weak-at", "doa-4", "doa-10"):  # networks that never saw a generated image, as in the paper
            write_figure3(parse([*common, *TRAININGS[name]])[0], run, faces, split, device)

    result = [Stage("generator: make or find it; its report and quadruplets (Fig. 1, 9)", 0 if (run / "generator.json").exists() else 1, generator_stage)]
    table_1 = ["clean", "eyeglasses", "square", "eye_patch"]
    others = [name for name in attacks.ATTACKS if name not in (*table_1, "evasion", "grey_eye_patch")]
    for name, flags in TRAININGS.items():
        result += [training("", flags), attacking(flags, table_1, "all" if name == "ours" else "both")]
        result.append(attacking(flags, ["evasion", "grey_eye_patch", *(others if name in FULL else [])], "both"))
    share = config.attack_steps / Config.attack_steps  # the demo takes half the steps, each twice as large
    for paper_steps, alpha in STEP_SETTINGS:
        if (steps := max(round(paper_steps * share), 1)) != config.attack_steps:
            flags = (*TRAININGS["weak-at"], f"--attack-steps={steps}", f"--attack-alpha={alpha * paper_steps / steps:g}")
            result.append(training(f" with {flags[-1][15:]}/255 x {steps} (Fig. 5)", flags))
    result.append(Stage("distances of real and generated pairs (Fig. 3)", 1, figure3_stage))
    return [*result, Stage("tables and figures", 1, lambda: metrics.main(["--run", str(run)]))]


def everything(config: Config, args: argparse.Namespace, run: Path, device: torch.device) -> int:
    """Every stage; what is finished is kept, what is not goes on. Returns the first exit status that is not 0."""
    for name in ("method", "positive", "candidates", "attack_steps", "attack_alpha", "overwrite", "no_evaluation"):
        if getattr(args, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')}: --all sets this itself: leave it out (another --run starts anew)")
    plan = stages(config, args, run, device)
    for i, stage in enumerate(plan, 1):
        print(f"stage {i:2} of {len(plan)}: {stage.what}" + ("" if stage.work else ", done"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = args.jobs or (min(cores, 4) if device.type == "cpu" else 1)
    return run_stages(plan, jobs, run / "logs", max(cores // jobs, 1))


def seconds_left(work: float, finished: list[tuple[float, float]], running: list[float], jobs: int) -> float | None:
    """Of a plan of so much work, `jobs` at a time: (work, seconds) of what is finished, seconds so far of what runs. None: not known yet."""
    large = [(w, s) for w, s in finished if w > 1]
    worked, spent = sum(w for w, _ in large), sum(s for _, s in large)
    return max((work - worked) * spent / worked - sum(running), 0.0) / jobs if worked else None


def run_stages(plan: list[Stage], jobs: int, logs: Path, threads: int) -> int:
    """The stages in order, or up to `jobs` chains side by side, each stage then a process of its own that writes to `logs`.

    On two cores, two trainings of one thread each take 1.12 s a step both, one of two threads 0.74 s: 1.3 times as much gets done.
    Returns the first exit status that is not 0; 130 after Ctrl-C.
    """
    from concurrent.futures import ThreadPoolExecutor

    began, failed = time.time(), 0
    finished: list[tuple[float, float]] = []  # work and seconds
    running: dict[int, float] = {}  # number of the stage: when it started

    def one(stage: Stage, beside: bool) -> None:
        nonlocal failed
        if failed:
            return
        number, now = plan.index(stage) + 1, time.time()
        seconds = seconds_left(sum(s.work for s in plan), list(finished), [now - start for start in list(running.values())], jobs)
        left = "known after the first training" if seconds is None else f"{seconds / 60:.0f} min"
        print(f"stage {number} of {len(plan)}: {stage.what}; elapsed {(now - began) / 60:.0f} min, left {left}", flush=True)
        running[number] = now
        if beside:
            code = in_a_process(stage, logs / f"{number}.log", threads)
        else:
            code = in_this_process(stage)
        took = time.time() - running.pop(number)
        if code:
            failed = failed or code
            print(f"embed.py: stage {number} of {len(plan)} ended with status {code}; the same command goes on there", file=sys.stderr)
        else:
            finished.append((stage.work, took))

    def in_order(chain: list[Stage]) -> None:
        for stage in chain:
            one(stage, True)

    for beside, group in itertools.groupby(plan, lambda stage: bool(stage.chain) and jobs > 1):
        if not beside:
            for stage in group:
                one(stage, False)
            continue
        chains: dict[str, list[Stage]] = {}
        for stage in group:
            chains.setdefault(stage.chain, []).append(stage)
        logs.mkdir(parents=True, exist_ok=True)
        print(f"{jobs} methods at a time; what they print goes to {logs}", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            longest_first = sorted(chains.values(), key=lambda chain: -sum(stage.work for stage in chain))
            futures = [pool.submit(in_order, chain) for chain in longest_first]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:  # the processes got it too
                failed = 130
    return failed


def in_this_process(stage: Stage) -> int:
    import data

    try:
        return stage.call() or 0
    except (UsageError, data.DataError) as error:
        print(f"embed.py: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130


def in_a_process(stage: Stage, log: Path, threads: int) -> int:
    """The stage's command; should it fail, its last line is shown."""
    import subprocess

    script, *flags = stage.command
    with open(log, "a") as out:
        code = subprocess.call(
            [sys.executable, str(Path(__file__).resolve().parent / script), *flags],
            stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    if code:
        print("".join(log.read_text().splitlines(True)[-1:]), end="", file=sys.stderr)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
