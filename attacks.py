"""Every attack of Sec. 3, 4.3, 4.4 and App. B.2, C against any `embed(images) -> features`.

    python attacks.py --run runs/synthetic-demo-0                        # clean and eyeglasses, two CPU cores
    python attacks.py --run runs/celeba-paper-0 --attacks all --defences all      # every number of the paper, one GPU
    python attacks.py --run RUN --data folder --root PEOPLE --crop lfw   # judge a trained embedding on other people

In: `people.json`, `run.json` and `<method>/embedding.pt` of a run. Out: `<method>/attacks/<attack>.csv`, one row a
compared pair, with `.json` (config, seed, counters, versions) and `.npz` (example images) beside it, for `metrics.py`.
Intruders are images of the other target persons and, if those are too few, of the validation persons; the universal
patch is trained on validation persons first. Nobody who was trained on takes part.
Images are float NCHW in [0, 1]. Distances are the root of the mean squared distance over a candidate and, with
mirroring, its mirror, to the anchor's features; the anchor is not mirrored (Sec. 4.2).

Measured (demo, rendered faces, one busy x86-64 core): eyeglasses, 80 iterations on 12 intruders for each of 20 targets, 85 s;
against the paper's 1000 x 5 on the same pairs they leave at most 0.01 of AU-ROC. The preset paper has not been run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

Embed = Callable[[Tensor], Tensor]
EYEGLASSES = "0 0 7ff80ffe f00ff007 e003e003 c003c003 60024002 60024002 20062006 20042004 20043004 1008100c 18180808 " \
             "0ff007f0 0 0"  # Fig. 6, rows 24-39 of 64, columns 16-47, bit 31 left-most
ATTACKS = ("clean", "eyeglasses", "square", "eye_patch", "random_eyeglasses", "noise", "evasion", "indirect", "distal",
           "eot_eyeglasses", "eot_eye_patch", "grey_eye_patch")
# Sec. 4.2: (mirroring, selection)
DEFENCES = {"basic": (0, 0), "mirroring": (1, 0), "selection": (0, 1), "both": (1, 1)}
COLUMNS = ("attack", "mirroring", "selection", "seed", "target", "anchor", "candidate", "person", "role", "distance")


class UsageError(ValueError):
    """Bad input; the text is one line that names the file or flag and says what to do."""


@dataclass(frozen=True)
class Config:
    run: str = ""  # ours: folder of the run
    preset: str = ""  # ours: demo | paper | released; empty: the run's own
    method: str = "all"  # ours: methods, comma-separated
    attacks: str = "clean,eyeglasses"  # ours: comma-separated, or all
    defences: str = "both"  # Sec. 4.2: basic, mirroring, selection, both, comma-separated, or all
    data: str = ""  # ours: judge on other people: folder, celeba or synthetic; empty: the run's test persons
    root: str = ""  # ours: folder of --data
    crop: str = ""  # ours: crop of --data
    min_images: int = 10  # Sec. 4: fewest images of a target
    targets: int = 27  # Sec. 4: persons that are impersonated
    intruders: int = 64  # App. C, released code: attacking images a target
    seed: int = -1  # ours: -1 takes the run's
    iterations: int = 1000  # Sec. 4: of every attack that has no number of its own
    lr: float = 0.01  # Sec. 4: Adam's, on delta
    restarts: int = 5  # Sec. 4: the best is kept
    decay: bool = False  # ours: learning rate falls linearly to zero
    square_stride: int = 5  # App. C: between the places searched, pixels
    square_search_iterations: int = 20  # App. C: at every place
    square_search_lr: float = 0.1  # App. C: in the search
    patch_train: int = 100  # App. C, Fig. 8: intruders that the universal patch is trained on
    patch_iterations: int = 5000  # App. C: of the universal patch
    patch_lr: float = 0.005  # App. C: of the universal patch
    patch_batch: int = 0  # ours: training intruders that a step sees, in turn; 0: all
    patterns: int = 1000  # App. B.2: random eyeglasses an intruder
    clean_intruders: int = 200  # ours: un-attacked intruders a target, the attacked ones first
    noise: float = 10 / 255  # App. B.2: uniform, plus or minus this
    evasion_iterations: int = 2000  # Sec. 4.3, released code: of the eyeglasses that hide the target
    evasion_lr: float = 0.05  # Sec. 4.3, released code: theirs
    evasion_restarts: int = 5  # Sec. 4.3, released code: theirs
    distal_iterations: int = 2000  # App. C: from noise
    distal_lr: float = 0.01  # App. C: from noise
    eot_samples: int = 4  # ours: transformed copies a step
    eot_tests: int = 16  # ours: fresh transformed copies that the patched face is scored on
    eot_shift: float = 2.0  # ours: pixels
    eot_scale: float = 0.05  # ours: 1 +- this
    eot_rotation: float = 5.0  # ours: degrees
    eot_brightness: float = 0.1  # ours: 1 +- this
    chunk: int = 0  # ours: images in one forward pass; 0: 128 on a CPU, 2048 on a GPU
    local: bool = True  # ours: recompute only what the patch changes (exact); --no-local runs whole images
    device: str = "auto"  # ours: cpu, cuda, ...; auto: a GPU if there is one
    figures: bool = True  # ours: keep example images in <attack>.npz
    resume: bool = False  # ours: keep what an interrupted run of the same config finished


PRESETS: dict[str, dict] = {
    "paper": {},
    "released": {},  # where the released code's attacks differ they are wrong, so nothing is taken from them
    # mean distance on 10 faces, 80 iterations at 0.2 falling to zero against 1000 at 0.01: +0.2 % (robust F), -2 % (untrained F)
    "demo": {
        "targets": 20, "intruders": 12, "clean_intruders": 60, "iterations": 80, "lr": 0.2, "restarts": 1,
        "decay": True, "square_search_iterations": 2, "square_search_lr": 0.3, "patch_train": 64,
        "patch_iterations": 60, "patch_lr": 0.2, "patch_batch": 16, "patterns": 100, "evasion_iterations": 80, "evasion_lr": 0.2,
        "evasion_restarts": 1, "distal_iterations": 150, "distal_lr": 0.2, "eot_samples": 1, "eot_tests": 8,
    },
}  # fmt: skip


@dataclass
class Attacked:
    images: Tensor  # (B, C, H, W)
    distance: Tensor  # (B,) root of the mean squared distance to the anchor
    zero_gradients: int = 0  # (image, iteration) pairs whose whole gradient was zero
    nonfinite: int = 0  # (image, iteration) pairs with a non-finite gradient, taken as zero
    gradients: int = 0  # (image, iteration) pairs in all
    mask: Tensor | None = None  # (H, W) or (B, H, W) bool: where the images may differ from the clean ones
    extra: dict = dataclasses.field(default_factory=dict)  # what one attack adds, as its docstring says


# Masks, Fig. 6
def eyeglasses_mask() -> Tensor:
    """(64, 64) bool, 107 pixels: the authors' eyeglasses."""
    rows = [[int(word, 16) >> (31 - bit) & 1 for bit in range(32)] for word in EYEGLASSES.split()]
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[24:40, 16:48] = torch.tensor(rows, dtype=torch.bool)
    return mask


def eye_patch_mask() -> Tensor:
    """(64, 64) bool, 12 x 32 pixels over the eyes."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[26:38, 16:48] = True
    return mask


def square_mask(row: int, column: int, size: int = 10, height: int = 64, width: int = 64) -> Tensor:
    """(height, width) bool, a square with its upper left pixel at (row, column)."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[row:row + size, column:column + size] = True
    return mask


def square_positions(stride: int = 5) -> list[tuple[int, int]]:
    """Starts 15, 15 + stride, ..., 35 in both directions, flush edge included (Fig. 7); 25 of them at stride 5."""
    starts = sorted({*range(15, 36, stride), 35})
    return [(row, column) for row in starts for column in starts]


# Distance and patch
@contextlib.contextmanager
def frozen(embed: Embed) -> Iterator[None]:
    """Evaluation mode without weight gradients; on leaving, every mode and requires_grad flag is as it was."""
    if not isinstance(embed, torch.nn.Module):
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


def squared_distance(embed: Embed, images: Tensor, anchor: Tensor, mirroring: bool = True,
                     transforms: Tensor | None = None) -> Tensor:
    """images (N, C, H, W), anchor (N, D) or (D,), transforms (S, 5) -> (N,), the mean over transforms and mirror."""
    N = len(images)
    views = images if transforms is None else transform(images, transforms)  # (S * N, C, H, W)
    if mirroring:
        views = torch.cat([views, views.flip(-1)])  # (2 * S * N, C, H, W)
    return mean_squared(embed(views), anchor, N)


def mean_squared(features: Tensor, anchor: Tensor, N: int) -> Tensor:
    """features (V * N, D) of V views of N images, anchor (N, D) or (D,) -> (N,)."""
    # Eq. (7)
    return (features.view(-1, N, features.shape[-1]) - anchor).square().sum(-1).mean(0)


def draw_transforms(n: int, shift: float, scale: float, rotation: float, brightness: float,
                    generator: torch.Generator) -> Tensor:
    """(n, 5): rows and columns of shift in pixels, scale, rotation in radians, brightness; uniform in +- the ranges."""
    unit = torch.rand(n, 5, generator=generator) * 2 - 1
    ranges = torch.tensor([shift, shift, scale, rotation * torch.pi / 180, brightness])
    return unit * ranges + torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])


def transform(images: Tensor, transforms: Tensor) -> Tensor:
    """images (N, C, H, W), transforms (S, 5) of `draw_transforms` -> (S * N, C, H, W), all under the first, then ..."""
    (N, C, H, W), S = images.shape, len(transforms)
    row, column, scale, angle, brightness = transforms.to(images).unbind(1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, -sin * H / W, 2 * column / W, sin * W / H, cos, 2 * row / H], 1).view(S, 2, 3)
    grid = nnf.affine_grid(theta.repeat_interleave(N, 0), [S * N, C, H, W], align_corners=False)
    moved = nnf.grid_sample(images.repeat(S, 1, 1, 1), grid, padding_mode="border", align_corners=False)
    return (moved * brightness.repeat_interleave(N).view(-1, 1, 1, 1)).clamp(0, 1)


def paste(images: Tensor, values: Tensor, pixels: Tensor) -> Tensor:
    """images (N, C, H, W), values (N, C, P), flat pixel numbers (N, P): the images with these pixels replaced."""
    N, C, H, W = images.shape
    index = pixels[:, None].expand(-1, C, -1)  # (N, C, P)
    return images.flatten(2).scatter(2, index, values).view(N, C, H, W)


def mask_pixels(mask: Tensor, rows: int) -> Tensor:
    """mask (H, W) or (rows, H, W) bool with equally many pixels each -> (rows, P) flat pixel numbers."""
    if mask.dim() == 2:
        return mask.flatten().nonzero().flatten().expand(rows, -1)
    counts = mask.flatten(1).sum(1)
    if (counts != counts[0]).any():
        raise ValueError("masks of one batch must have equally many pixels")
    return mask.flatten(1).nonzero()[:, 1].view(len(mask), -1)


def local_features(embed: Embed, images: Tensor, pixels: Tensor, mirroring: bool) -> Embed | None:
    """Patch-local recomputation: values (N, C, P) -> the features (N or 2 * N, D) of `images` (N, C, H, W) with these
    pixels (N, P) replaced, then of their mirrors. None if the model has no `patch_local`, or they lie too far apart.

    embed.patch_local(images, boxes (B, 4) = (top, left, height, width)) gives a callable on the pixels inside its own
    `boxes`, of one size, which cover the given ones, with `layers`, how many run on a window alone: `embed.PatchLocal`.
    """
    N, C, _, W = images.shape
    make = getattr(embed, "patch_local", None)
    if make is None or not pixels.shape[1]:
        return None
    row, col = pixels // W, pixels % W  # (N, P)
    if mirroring:
        images, row = torch.cat([images, images.flip(-1)]), torch.cat([row, row])
        col = torch.cat([col, W - 1 - col])
    top, left = row.amin(1), col.amin(1)
    local = make(images, torch.stack([top, left, row.amax(1) - top + 1, col.amax(1) - left + 1], 1))
    if not local.layers:
        return None
    (top, left), (h, w) = local.boxes[:, :2].T, local.boxes[0, 2:].tolist()
    inside = (torch.arange(h * w, device=images.device) // w + top[:, None]) * W
    inside = inside + torch.arange(h * w, device=images.device) % w + left[:, None]  # (V * N, h * w)
    crop = images.flatten(2).gather(2, inside[:, None].expand(-1, C, -1)).view(-1, C, h, w)
    index = (row - top[:, None]) * w + col - left[:, None]  # (V * N, P)
    return lambda values: local(paste(crop, values.repeat(len(crop) // N, 1, 1), index))


# The optimisation, App. C
def _optimise(embed: Embed, parts: Sequence[tuple[Tensor, Tensor, Tensor]], base: Tensor, start: Tensor, *, sign: int,
              mirroring: bool, iterations: int, lr: float, decay: bool, transforms: Tensor | None,
              validation: Tensor | None, local: bool, rotate: bool = False,
              ) -> tuple[Tensor, Tensor, dict[int, Tensor], Tensor]:
    """Adam on delta, the best iterate of each row kept.

    parts: (images (n, C, H, W), anchor (n, D), pixels (n, P)); one part with a delta for each image, or several parts
    that share a single delta; rotate: they take turns at its steps, and every tenth iterate is scored on all of them.
    base, start (N or 1, C, P): the pixels become (tanh(base + delta) + 1) / 2.
    Returns the best base + delta, its loss (N,), the loss (N,) of the iterate after an eighth, a quarter, half and all
    of the iterations, and counts (3,) of zero, non-finite and all gradients.
    """
    near = [local_features(embed, images, pixels, mirroring) if local and transforms is None else None
            for images, _, pixels in parts]
    total = sum(len(images) for images, _, _ in parts)
    shared, every = len(start) < total, 1 if transforms is None and not rotate else 10
    marks = {iterations, *(n - n % every for n in (iterations // 8, iterations // 4, iterations // 2))}
    delta, best, curve = start.clone(), start.clone(), {}
    best_loss, counts = start.new_full((len(start),), torch.inf), start.new_zeros(3, dtype=torch.long)
    optimiser = torch.optim.Adam([delta], lr=lr, fused=True if start.is_cuda else None)

    def objective(moves: Tensor | None, grad: Tensor | None = None, turn: slice = slice(None)) -> Tensor:
        losses, count = [], sum(len(images) for images, _, _ in parts[turn])
        for (images, anchor, pixels), nearby in zip(parts[turn], near[turn]):
            with torch.set_grad_enabled(grad is not None):
                leaf = delta.detach().requires_grad_(grad is not None)
                # App. C
                patch = ((torch.tanh(base + leaf) + 1) / 2).expand(len(images), -1, -1)
                if nearby is None:
                    loss = squared_distance(embed, paste(images, patch, pixels), anchor, mirroring, moves)
                else:
                    loss = mean_squared(nearby(patch), anchor, len(images))
                loss = sign * loss
            if grad is not None:
                grad += torch.autograd.grad(loss.sum(), leaf)[0] / (count if shared else 1)
            losses.append(loss.detach())
        return torch.cat(losses).mean(0, keepdim=True) if shared else torch.cat(losses)

    for step in range(iterations + 1):
        delta.grad = torch.zeros_like(delta)
        moves = None if transforms is None else transforms[min(step, iterations - 1)]
        turn = slice(step % len(parts), step % len(parts) + 1) if rotate else slice(None)
        loss = objective(moves, delta.grad if step < iterations else None, turn)
        if step % every == 0 or step == iterations:
            loss = loss if every == 1 else objective(validation)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better[:, None, None], delta, best)
        if step in marks:
            curve[step] = loss
        if step == iterations:
            break
        finite = delta.grad.isfinite().flatten(1).all(1)
        zero = (delta.grad == 0).flatten(1).all(1)
        counts += torch.stack([zero.sum(), (~finite).sum(), torch.full_like(counts[0], len(zero))])
        delta.grad = torch.where(finite[:, None, None], delta.grad, 0.0)
        optimiser.param_groups[0]["lr"] = lr * (1 - step / iterations) if decay else lr
        optimiser.step()
    return base + best, best_loss, curve, counts


def draw_start(rows: int, restarts: int, channels: int, pixels: int,
               generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """(restarts, rows, C, P) of U(-0.5, 0.5); restart r does not depend on how many follow it. With several generators
    each draws its equal share of the rows, so that several targets can go in one batch."""
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    share = (rows // len(generators), channels, pixels)
    return torch.stack([torch.cat([torch.rand(share, generator=g) for g in generators]) for _ in range(restarts)]) - 0.5


def tanh_attack(embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, *, direction: str = "impersonate",
                mirroring: bool = True, iterations: int = 1000, lr: float = 0.01, restarts: int = 5,
                decay: bool = False, chunk: int = 256, start: Tensor | None = None,
                generator: torch.Generator | Sequence[torch.Generator] | None = None,
                transforms: Tensor | None = None, validation: Tensor | None = None, local: bool = True) -> Attacked:
    """Attack each image by itself inside its mask, eq. (7) in the form of App. C.

    images (B, C, H, W) in [0, 1]; anchor (B, D) or (D,) features; mask (H, W) or (B, H, W) bool.
    direction: "impersonate" lowers the distance to the anchor, "evade" raises it.
    start (restarts, B, C, P): first delta, otherwise drawn from `generator` (seed 0 if None); the best restart wins.
    chunk: images in one forward pass, mirrors included; it changes speed and memory, not the draws.
    transforms (iterations, S, 5), validation (S, 5): with these the loss is the mean over the S transforms of an
    iteration, and the best iterate is chosen every tenth iteration under `validation`.
    local: recompute only what the pixels change, where the model can (`local_features`); this changes rounding alone.
    extra: loss (R, B), the signed squared distance of each restart; by_iterations, by_restarts {n: distance (B,)}.
    """
    sign, B, C = _sign(direction), *images.shape[:2]
    pixels, anchor = mask_pixels(mask.to(images.device), B), anchor.expand(B, -1)  # (B, P)
    if pixels.shape[1] == 0:
        return Attacked(images.clone(), distances(embed, images, anchor, mirroring, validation, chunk))
    if start is None:
        start = draw_start(B, restarts, C, pixels.shape[1], generator or torch.Generator().manual_seed(0))
    R, start = len(start), start.to(images).flatten(0, 1)  # (R * B, C, P)
    clean = images.flatten(2).gather(2, pixels[:, None].expand(-1, C, -1))  # (B, C, P)
    base = torch.atanh((2 * clean - 1) * 0.999999)
    rows = max(1, chunk // ((1 + mirroring) * (1 if transforms is None else transforms.shape[1])))
    with frozen(embed):
        runs: list = [_optimise(embed, [(images[i], anchor[i], pixels[i])], base[i], part, sign=sign, mirroring=mirroring,
                          iterations=iterations, lr=lr, decay=decay, transforms=transforms, validation=validation,
                          local=local)
                for i, part in zip((torch.arange(R * B, device=images.device) % B).split(rows), start.split(rows))]
    best, loss = (torch.cat([run[k] for run in runs]).unflatten(0, (R, B)) for k in (0, 1))
    each = torch.arange(B, device=images.device)
    by_restarts = {}
    for n in range(1, R + 1):  # measured on the images, not taken from the loop's losses: a wrong choice would show
        winner = loss[:n].argmin(0)
        attacked = paste(images, (torch.tanh(best[winner, each]) + 1) / 2, pixels)
        by_restarts[n] = distances(embed, attacked, anchor, mirroring, validation, chunk)
    curve = {n: torch.cat([run[2][n] for run in runs]).view(R, B)[winner, each].abs().sqrt() for n in runs[0][2]}
    return Attacked(attacked, by_restarts[R], *sum(run[3] for run in runs).tolist(),  # type: ignore[misc]
                    extra={"loss": loss, "by_iterations": curve, "by_restarts": by_restarts})


def _sign(direction: str) -> int:
    if direction not in ("impersonate", "evade"):
        raise ValueError(f"direction must be impersonate or evade, not {direction!r}")
    return 1 if direction == "impersonate" else -1


@torch.no_grad()
def distances(embed: Embed, images: Tensor, anchor: Tensor, mirroring: bool = True, transforms: Tensor | None = None,
              chunk: int = 256) -> Tensor:
    """images (N, C, H, W), anchor (N, D) or (D,) -> (N,) root of `squared_distance`, in passes of `chunk` images."""
    rows = max(1, chunk // ((1 + mirroring) * (1 if transforms is None else len(transforms))))
    anchor = anchor.expand(len(images), -1)
    with frozen(embed):
        return torch.cat([squared_distance(embed, x, a, mirroring, transforms).sqrt()
                          for x, a in zip(images.split(rows), anchor.split(rows))])


# Square with a search for its place, Sec. 3, App. C
def location_search(embed: Embed, images: Tensor, anchor: Tensor, positions: Sequence[tuple[int, int]], *,
                    size: int = 10, direction: str = "impersonate", mirroring: bool = True, iterations: int = 20,
                    lr: float = 0.1, chunk: int = 256, generator: torch.Generator | None = None,
                    local: bool = True) -> tuple[Tensor, Attacked]:
    """Short attack at each position. Returns distances (B, K), and the summed counters with no images."""
    B, C, H, W = images.shape
    K = len(positions)
    masks = torch.stack([square_mask(row, column, size, H, W) for row, column in positions])  # (K, H, W)
    start = draw_start(B * K, 1, C, size * size, generator or torch.Generator().manual_seed(0)).view(B, K, C, -1)
    total = Attacked(images[:0], images.new_empty(0))
    found = []
    group = max(1, chunk // (K * (1 + mirroring)))
    for x, a, s in zip(images.split(group), anchor.expand(B, -1).split(group), start.split(group)):
        result = tanh_attack(embed, x.repeat_interleave(K, 0), a.repeat_interleave(K, 0), masks.repeat(len(x), 1, 1),
                             direction=direction, mirroring=mirroring, iterations=iterations, lr=lr, chunk=chunk,
                             local=local, start=s.reshape(1, -1, *s.shape[2:]))
        found.append(result.distance.view(-1, K))
        _count(total, result)
    return torch.cat(found), total


def square_attack(embed: Embed, images: Tensor, anchor: Tensor, *, stride: int = 5, size: int = 10,
                  positions: Sequence[tuple[int, int]] | None = None, search_iterations: int = 20,
                  search_lr: float = 0.1, direction: str = "impersonate", mirroring: bool = True, chunk: int = 256,
                  generator: torch.Generator | None = None, local: bool = True, **settings) -> Attacked:
    """`location_search`, then `tanh_attack` from a new start at the best place of each image; extra: row, col (B,)."""
    sign = _sign(direction)
    positions = positions or square_positions(stride)
    generator = generator or torch.Generator().manual_seed(0)
    H, W = images.shape[2:]
    found, searched = location_search(embed, images, anchor, positions, size=size, direction=direction,
                                      mirroring=mirroring, iterations=search_iterations, lr=search_lr, chunk=chunk,
                                      generator=generator, local=local)
    places = [positions[best] for best in (sign * found).argmin(1).tolist()]
    masks = torch.stack([square_mask(row, column, size, H, W) for row, column in places])
    result = tanh_attack(embed, images, anchor, masks, direction=direction, mirroring=mirroring, chunk=chunk,
                         generator=generator, local=local, **settings)
    _count(result, searched)
    result.extra |= {"row": torch.tensor([p[0] for p in places]), "col": torch.tensor([p[1] for p in places])}
    return result


def _count(total: Attacked, part: Attacked) -> None:
    total.zero_gradients += part.zero_gradients
    total.nonfinite += part.nonfinite
    total.gradients += part.gradients


# Universal eye patch, Sec. 3, App. C
def universal_patch(embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, *, direction: str = "impersonate",
                    mirroring: bool = True, iterations: int = 5000, lr: float = 0.005, decay: bool = False,
                    chunk: int = 256, generator: torch.Generator | None = None, transforms: Tensor | None = None,
                    validation: Tensor | None = None, local: bool = True, batch: int = 0) -> tuple[Tensor, Attacked]:
    """One pattern that replaces the masked pixels of every image, for the lowest mean squared distance to the anchor.

    images (B, C, H, W): the training intruders, which alone decide the best iterate; mask (H, W); batch: how many of
    them a step sees, in turn (0: all); transforms, validation and local as in `tanh_attack`. Returns the pattern (C, P) in [0, 1] and the patched training images.
    """
    B, C = images.shape[:2]
    pixels = mask_pixels(mask.to(images.device), B)
    start = draw_start(1, 1, C, pixels.shape[1], generator or torch.Generator().manual_seed(0))[0].to(images)
    rows = max(1, chunk // ((1 + mirroring) * (1 if transforms is None else transforms.shape[1])))
    rows = min(rows, batch or B)
    anchor = anchor.expand(B, -1)
    parts = list(zip(images.split(rows), anchor.split(rows), pixels.split(rows)))
    with frozen(embed):
        best, _, curve, counts = _optimise(
            embed, parts, torch.zeros_like(start), start, sign=_sign(direction), mirroring=mirroring,
            iterations=iterations, lr=lr, decay=decay, transforms=transforms, validation=validation, local=local,
            rotate=0 < batch < B)
    pattern = ((torch.tanh(best) + 1) / 2)[0]  # (C, P)
    patched = apply_pattern(images, pattern, mask)
    return pattern, Attacked(patched, distances(embed, patched, anchor, mirroring, validation, chunk),  # type: ignore[misc]
                             *counts.tolist(),
                             extra={"by_iterations": {n: loss.abs().sqrt() for n, loss in curve.items()}})


def apply_pattern(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """images (B, C, H, W), pattern (C, P) or (B, C, P), mask (H, W): the masked pixels replaced by the pattern."""
    pixels = mask_pixels(mask.to(images.device), len(images))
    return paste(images, pattern.to(images).expand(len(images), -1, -1), pixels)


# Random perturbations, App. B.2
def random_patterns(embed: Embed, images: Tensor, anchor: Tensor, mask: Tensor, *, patterns: int = 1000,
                    direction: str = "impersonate", mirroring: bool = True, chunk: int = 256,
                    generator: torch.Generator | None = None) -> Attacked:
    """For each image the best of `patterns` uniform random fillings of the mask: no gradient at all."""
    sign, generator = _sign(direction), generator or torch.Generator().manual_seed(0)
    C, P = images.shape[1], int(mask.sum())
    anchor, attacked = anchor.expand(len(images), -1), images.clone()
    for i in range(len(images)):
        values = torch.rand(patterns, C, P, generator=generator).to(images)
        found = torch.cat([distances(embed, apply_pattern(images[i:i + 1].expand(len(part), -1, -1, -1), part, mask),
                                     anchor[i], mirroring, None, chunk) for part in values.split(chunk)])
        attacked[i] = apply_pattern(images[i:i + 1], values[(sign * found).argmin()], mask)[0]
    return Attacked(attacked, distances(embed, attacked, anchor, mirroring, None, chunk))


def uniform_noise(images: Tensor, amount: float = 10 / 255, generator: torch.Generator | None = None) -> Tensor:
    """images plus U(-amount, amount) in every pixel, clipped to [0, 1]."""
    noise = torch.rand(images.shape, generator=generator or torch.Generator().manual_seed(0)) * 2 - 1
    return (images + amount * noise.to(images)).clamp(0, 1)


# Indirect anchor and distal, Sec. 4.4
def indirect_attack(embed: Embed, images: Tensor, anchor: Tensor, virtual: Tensor, mask: Tensor, *,
                    mirroring: bool = True, chunk: int = 256, start: Tensor, **settings) -> Attacked:
    """Attack the anchor and, from the same start, the features `virtual` (D,) of the autoencoded target; both are
    scored by the distance to the true anchor, the closer one is kept for each image; extra: direct, indirect (B,)."""
    settings |= {"mirroring": mirroring, "chunk": chunk, "start": start}
    direct = tanh_attack(embed, images, anchor, mask, **settings)
    indirect = tanh_attack(embed, images, virtual, mask, **settings)
    indirect.distance = distances(embed, indirect.images, anchor, mirroring, None, chunk)
    result = worst(direct, indirect)
    result.extra = {"direct": direct.distance, "indirect": indirect.distance}
    return result


def distal_attack(embed: Embed, shape: Sequence[int], anchor: Tensor, *, generator: torch.Generator | None = None,
                  **settings) -> Attacked:
    """A whole free image from uniform random pixels, driven to the anchor's features; shape (B, C, H, W); Fig. 4."""
    generator = generator or torch.Generator().manual_seed(0)
    noise = torch.rand(tuple(shape), generator=generator).to(anchor)
    return tanh_attack(embed, noise, anchor, torch.ones(tuple(shape)[2:], dtype=torch.bool),
                       generator=generator, **settings)


def worst(*results: Attacked) -> Attacked:
    """Of several attacks on the same images, for each image the one that came closest; counters are summed."""
    distance = torch.stack([result.distance for result in results])  # (A, B)
    strongest, each = distance.argmin(0), torch.arange(distance.shape[1], device=distance.device)
    best = Attacked(torch.stack([result.images for result in results])[strongest, each], distance[strongest, each],
                    extra={"strongest": strongest})
    for result in results:
        _count(best, result)
    return best


# Scoring, Sec. 4
@torch.no_grad()
def extract(embed: Embed, images: Tensor, chunk: int = 256) -> Tensor:
    """images (N, C, H, W) uint8 or float in [0, 1] -> features (N, D)."""
    with frozen(embed):
        return torch.cat([embed(to_float(part)) for part in images.split(chunk)])


def to_float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def select_anchor(features: Tensor) -> int:
    """features (n, D) of one person -> the index with the lowest mean squared distance to the others (Sec. 4.2)."""
    squared = (features[:, None].double() - features[None].double()).square().sum(-1)  # (n, n)
    return int(squared.sum(1).argmin())


def stable_generator(*parts: object) -> torch.Generator:
    """A generator seeded from these values alone, the same in every process and on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def choose_intruders(person: Tensor, target: int, near: Sequence[int], far: Sequence[int], tests: int, training: int,
                     generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Image indices of other persons: the first `tests` (near persons before far ones) are attacked or compared; the
    universal patch is trained on `training` others, of far persons first, so as not to have seen the tested persons."""
    def shuffled(persons: Sequence[int]) -> list[int]:
        chosen = torch.tensor([p for p in persons if p != target], dtype=torch.long)
        images = torch.isin(person, chosen).nonzero().flatten()
        return images[torch.randperm(len(images), generator=generator)].tolist()

    first, second = shuffled(near), shuffled(far)
    tested = (first + second)[:tests]
    rest = set(tested)
    return tested, [i for i in second + first if i not in rest][:training]


def run_attack(name: str, config: Config, embed: Embed, images: Tensor, anchor: Tensor, *, mirroring: bool = True,
               generator: torch.Generator, training: Tensor | None = None, virtual: Tensor | None = None) -> Attacked:
    """One attack of `ATTACKS` under a Config. images (B, C, H, W): the intruders, or for evasion the target's own;
    training: the universal patch's intruders; virtual (D,): features of the autoencoded target, for `indirect`."""
    mask = eye_patch_mask() if name.endswith("eye_patch") else eyeglasses_mask()
    chunk, whole = config.chunk or 256, torch.ones_like(mask)
    common = {"mirroring": mirroring, "chunk": chunk}
    steps: dict = {"iterations": config.iterations, "lr": config.lr, "decay": config.decay, "local": config.local, **common}
    tests = None
    if name.endswith("eye_patch"):
        steps |= {"iterations": config.patch_iterations, "lr": config.patch_lr}
    if name.startswith("eot_"):
        ranges = (config.eot_shift, config.eot_scale, config.eot_rotation, config.eot_brightness, generator)
        drawn = draw_transforms(steps["iterations"] * config.eot_samples, *ranges)
        steps |= {"transforms": drawn.view(-1, config.eot_samples, 5)}
        steps |= {"validation": draw_transforms(config.eot_tests, *ranges)}
        tests = draw_transforms(config.eot_tests, *ranges)  # fresh: the attack sees neither
    if name == "clean":
        result = Attacked(images, distances(embed, images, anchor, mirroring, None, chunk))
    elif name in ("eyeglasses", "eot_eyeglasses"):
        result = tanh_attack(embed, images, anchor, mask, restarts=config.restarts, generator=generator, **steps)
    elif name == "square":
        result = square_attack(embed, images, anchor, stride=config.square_stride, restarts=config.restarts,
                               search_iterations=config.square_search_iterations, search_lr=config.square_search_lr,
                               generator=generator, **steps)
        mask = torch.stack([square_mask(row, col) for row, col in
                            zip(result.extra["row"].tolist(), result.extra["col"].tolist())])
    elif name in ("eye_patch", "eot_eye_patch"):
        pattern, result = universal_patch(embed, training, anchor, mask, generator=generator, batch=config.patch_batch, **steps)
        result.images = apply_pattern(images, pattern, mask)
        result.distance = distances(embed, result.images, anchor, mirroring, None, chunk)
        result.extra["pattern"] = pattern.view(-1, 12, 32)
    elif name == "grey_eye_patch":  # the control: what hiding the eyes does by itself
        hidden = apply_pattern(images, images.new_full((images.shape[1], int(mask.sum())), 0.5), mask)
        result = Attacked(hidden, distances(embed, hidden, anchor, mirroring, None, chunk))
    elif name == "random_eyeglasses":
        result = random_patterns(embed, images, anchor, mask, patterns=config.patterns, generator=generator, **common)
    elif name == "noise":
        mask, noisy = whole, uniform_noise(images, config.noise, generator)
        result = Attacked(noisy, distances(embed, noisy, anchor, mirroring, None, chunk))
    elif name == "evasion":
        steps |= {"iterations": config.evasion_iterations, "lr": config.evasion_lr}
        result = tanh_attack(embed, images, anchor, mask, direction="evade", restarts=config.evasion_restarts,
                             generator=generator, **steps)
    elif name == "indirect":
        start = draw_start(len(images), config.restarts, images.shape[1], int(mask.sum()), generator)
        result = indirect_attack(embed, images, anchor, virtual, mask, start=start, **steps)
    elif name == "distal":
        mask, steps = whole, steps | {"iterations": config.distal_iterations, "lr": config.distal_lr}
        result = distal_attack(embed, (1, *images.shape[1:]), anchor, restarts=1, generator=generator, **steps)
    else:
        raise ValueError(f"no such attack {name!r}: choose {', '.join(ATTACKS)}")
    if tests is not None:
        result.distance = distances(embed, result.images, anchor, mirroring, tests, chunk)
    result.mask = mask
    return result


def effort(name: str, config: Config) -> dict[str, int]:
    """The iterations and restarts, patterns and training intruders that an attack runs with."""
    if name in ("clean", "noise", "grey_eye_patch"):
        return {}
    if name == "random_eyeglasses":
        return {"patterns": config.patterns}
    if name.endswith("eye_patch"):
        return {"iterations": config.patch_iterations, "restarts": 1, "training_intruders": config.patch_train,
                "a_step": config.patch_batch or config.patch_train}
    if name == "distal":
        return {"iterations": config.distal_iterations, "restarts": 1}
    if name == "evasion":
        return {"iterations": config.evasion_iterations, "restarts": config.evasion_restarts}
    search = {"positions": len(square_positions(config.square_stride)),
              "search_iterations": config.square_search_iterations} if name == "square" else {}
    return {"iterations": config.iterations, "restarts": config.restarts, **search}


def work(names: Sequence[str], config: Config) -> float:
    """Images through the embedding, forward and backward, that these attacks take on all targets, roughly."""
    n, each = config.intruders, config.iterations * config.restarts
    patch = (config.patch_batch or config.patch_train) * config.patch_iterations
    eot = config.eot_samples + config.eot_tests / 30
    images = {"clean": config.clean_intruders / 3, "noise": n / 3, "grey_eye_patch": n / 3, "eyeglasses": n * each, "eye_patch": patch,
              "square": n * (each + len(square_positions(config.square_stride)) * config.square_search_iterations),
              "random_eyeglasses": n * config.patterns / 3, "indirect": 2 * n * each, "distal": 4 * config.distal_iterations,
              "evasion": n * config.evasion_iterations * config.evasion_restarts,
              "eot_eyeglasses": eot * n * each, "eot_eye_patch": eot * patch}
    views = sum(1 + DEFENCES[defence][0] for defence in choose("defences", config.defences, tuple(DEFENCES)))
    return config.targets * views * sum(images[name] for name in names)


# main
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


def parse(argv: Sequence[str] | None) -> Config:
    """The command line made from Config; a flag wins over the preset, the preset over the paper's default."""
    parser = Parser(prog="attacks.py", description="Attack a trained embedding (Sec. 3, 4, App. B.2, C). In brackets: the preset paper's value; the demo's.")
    for field in dataclasses.fields(Config):
        how: dict = {"action": argparse.BooleanOptionalAction} if field.type == "bool" else {
            "type": {"int": int, "float": float, "str": str}[str(field.type)], "metavar": field.type}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=described(field), **how)
    given = vars(parser.parse_args(argv))
    run = Path(given.get("run", ""))
    if not given.get("run") or not run.is_dir():
        raise UsageError(f"--run {given.get('run', '')}: no such folder; give the folder that embed.py wrote")
    about = read_json(run / "run.json")
    for key, kind in (("data", str), ("root", str), ("crop", str), ("preset", str), ("seed", int), ("options", dict)):
        if not isinstance(about.get(key, kind()), kind) or key == "data" and key not in about:
            raise UsageError(f"{run / 'run.json'}: {key} is {about.get(key)!r}, not what embed.py wrote; restore it, or run embed.py again")
    preset = given.get("preset") or (about.get("preset") if about.get("preset") in PRESETS else "demo")
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: choose {', '.join(PRESETS)}")
    config = Config(**{**PRESETS[preset], **given, "preset": preset})
    for field in dataclasses.fields(Config):
        lowest = {"seed": -1, "min_images": 2, "chunk": 0, "patch_batch": 0}.get(field.name, 1 if field.type == "int" else 0)
        if isinstance(getattr(config, field.name), list):  # what argparse makes of --flag=--
            raise UsageError(f"--{field.name.replace('_', '-')}: give a value")
        if field.type in ("int", "float") and not lowest <= getattr(config, field.name) < 2**31:
            raise UsageError(f"--{field.name.replace('_', '-')} {getattr(config, field.name)}: give {lowest} or more, less than 2^31")
    for flag, known in (("attacks", ATTACKS), ("defences", tuple(DEFENCES))):
        choose(flag, getattr(config, flag), known)
    return dataclasses.replace(config, seed=int(about.get("seed") or 0) if config.seed < 0 else config.seed)


def choose(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """A comma-separated list, or all; raises UsageError for an unknown name."""
    names = list(known) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [""]:
        if name not in known:
            raise UsageError(f"--{flag} {name}: choose all or some of {', '.join(known) or '(none found)'}")
    return names


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give the --run folder of a finished training") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, not an object; give the --run folder of a finished training")
    return content


def finished(table: Path, defences: str) -> bool:
    """Whether the rows of an attack are there, under at least these defences."""
    known = tuple(DEFENCES)
    held = read_json(table.with_suffix(".json")).get("config", {}).get("defences", "") if table.exists() else ""
    return bool(held) and {*choose("defences", defences, known)} <= {*choose("defences", held, known)}


def write(path: Path, text: str | None = None, **arrays: np.ndarray) -> None:
    """Text, or arrays as .npz, written beside, synced and moved into place."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            if text is None:
                np.savez_compressed(file, **arrays)
            else:
                file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written ({error.strerror}); free some space, then --resume") from None


def to_bytes(images: Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).cpu().numpy()


def progress(items: list, title: str, rank: int) -> Iterator:
    """The items, with a bar and the time left on stderr."""
    if tqdm is not None:
        yield from tqdm(items, title, unit="target", disable=rank > 0, mininterval=1)
        return
    start = time.monotonic()
    for done, item in enumerate(items):
        left = f", {(time.monotonic() - start) / done * (len(items) - done):.0f} s left" if done else ""
        print(f"{title}: target {done + 1} of {len(items)}{left}", file=sys.stderr, flush=True)
        yield item


def barrier(world: int) -> None:
    """Wait for the other processes that torchrun started; each attacks its share of the targets."""
    if world > 1:
        try:
            if not torch.distributed.is_initialized():
                signal.signal(signal.SIGTERM, lambda *_: ended("SIGTERM"))
                torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # targets may take hours
            torch.distributed.barrier()
        except RuntimeError as error:
            ended(error)


def ended(why: object) -> None:
    """One line and the end, whatever this process was doing."""
    line = "process {} of {} stops, as another one or torchrun has ended ({}); the same command with --resume goes on\n"
    numbers = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.write(2, f"{Path(sys.argv[0]).name}: {line}".format(*numbers, " ".join(str(why).split())[:120]).encode())
    os._exit(1)


def versions() -> dict[str, str]:
    """Of this checkout ("unknown" outside one) and of what it runs on."""
    found = {"commit": "unknown", "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent, text=True,
                                         capture_output=True, check=True, timeout=10).stdout.strip()
    return found


def autoencode(path: Path, images: Tensor) -> Tensor:
    """The generator's reconstruction of the images (Sec. 4.4)."""
    import generator

    try:
        lord, _ = generator.load_generator(path, images.device)
    except generator.UsageError as error:
        raise UsageError(f"--attacks indirect needs the run's generator: {error}") from None
    with torch.no_grad():
        return lord(images).clamp(0, 1)


def attack_target(config: Config, name: str, embed: Embed, faces, person: int, near: Sequence[int],
                  far: Sequence[int], device: torch.device, generator_file: Path, repeat: bool
                  ) -> tuple[dict, dict[str, np.ndarray]]:
    """One attack on one target under each defence asked for: rows with counters, and example images. The result depends
    on the seed and the target's name, not on which other targets are attacked, or where."""
    began, target = time.monotonic(), faces.names[person]

    def load(index: Sequence[int]) -> Tensor:
        return to_float(faces.images[list(index)].to(device))

    tests = max(config.clean_intruders, config.intruders) if name == "clean" else config.intruders
    tested, training = choose_intruders(faces.person, person, near, far, tests, config.patch_train,
                                        stable_generator(config.seed, target, "intruders"))
    if not tested or (name in ("eye_patch", "eot_eye_patch") and not training):
        raise UsageError(f"--intruders {config.intruders}: too few images of persons other than {target}; "
                         "add persons, or lower --intruders")
    own = (faces.person == person).nonzero().flatten().tolist()
    features = extract(embed, load(own), config.chunk)
    part: dict = {"rows": [], "zero_gradients": 0, "nonfinite": 0, "gradients": 0, "outside_mask_max": 0.0,
            "by_iterations": {}, "by_restarts": {}}
    for defence in choose("defences", config.defences, tuple(DEFENCES)):
        mirroring, selection = DEFENCES[defence]
        best = select_anchor(features) if selection else 0
        genuine = [i for i in own if i != own[best]]
        candidates = {"clean": genuine + tested, "noise": genuine + tested, "evasion": genuine}.get(name, tested)
        inputs = {"anchor": features[best], "mirroring": bool(mirroring)}
        if name.endswith("eye_patch"):
            inputs["training"] = load(training)
        if name == "indirect":
            inputs["virtual"] = extract(embed, autoencode(generator_file, load([own[best]])))[0]

        def attack(setting: Config, images: Tensor, inputs: dict = inputs) -> Attacked:
            seeded = stable_generator(config.seed, target, "eyeglasses" if name == "indirect" else name)
            return run_attack(name, setting, embed, images, generator=seeded, **inputs)

        images = load(candidates)
        result = attack(config, images)
        if repeat and "reproducible" not in part and name != "clean":
            short = dataclasses.replace(config, iterations=5, restarts=1, square_search_iterations=1, patterns=5,
                                        patch_iterations=5, evasion_iterations=5, evasion_restarts=1,
                                        distal_iterations=5)
            first, second = (attack(short, images[:2]) for _ in range(2))
            part["reproducible"] = torch.equal(first.images, second.images)
        if name == "distal":
            candidates, images = [-1], result.images
        assert result.mask is not None
        outside = (result.images - images).abs() * ~result.mask.to(device).expand(len(images), -1, -1)[:, None]
        part["outside_mask_max"] = max(part["outside_mask_max"], float(outside.max()) if name != "clean" else 0.0)
        for key in ("zero_gradients", "nonfinite", "gradients"):
            part[key] += getattr(result, key)
        for key in ("by_iterations", "by_restarts"):
            for n, distance in result.extra.get(key, {}).items():
                total, count = part[key].get(n, (0.0, 0))
                part[key][n] = (total + float(distance.sum()), count + len(distance))
        columns = {k: v.tolist() for k, v in result.extra.items() if k in ("row", "col", "direct", "indirect")}
        for n, (candidate, distance) in enumerate(zip(candidates, result.distance.tolist())):
            other = faces.names[int(faces.person[candidate])] if candidate >= 0 else ""
            role = "genuine" if other == target else "intruder"
            part["rows"].append([name, mirroring, selection, config.seed, target, own[best], candidate, other, role,
                                 distance, *(v[n] for v in columns.values())])
        shown = {"anchor": to_bytes(load([own[best]])[0]), "clean": to_bytes(images[:4]), "candidate": candidates[:4],
                 "attacked": to_bytes(result.images[:4]), "distance": result.distance[:4].cpu(),
                 "mask": result.mask if result.mask.dim() == 2 else result.mask[0]}
        if "pattern" in result.extra:
            shown["pattern"] = to_bytes(result.extra["pattern"])
    part |= {"header": [*COLUMNS, *columns], "seconds": time.monotonic() - began}
    return part, {k: np.asarray(v) for k, v in shown.items()} if config.figures and name != "clean" else {}


def merge(name: str, config: Config, names: Sequence[str], parts: list[dict], images: list[dict], table: Path,
          about: dict) -> str:
    """Put the targets' parts together as <attack>.csv, .json and .npz; returns the line to print."""
    rows = [row for part in parts for row in part["rows"]]
    if images:
        shown = {k: [part[k] for part in images] for k in images[0]}
        least = min(len(x) for x in shown["clean"])
        stacked = {k: np.stack([x if k in ("anchor", "pattern", "mask") else x[:least] for x in v])
                   for k, v in shown.items()}
        write(table.with_suffix(".npz"), target=np.array(names), **stacked)
    seconds = sum(part["seconds"] for part in parts)
    record = {"attack": name, **about, **effort(name, config), "n": len(rows), "n_targets": len(parts),
              "seconds": round(seconds, 2), "outside_mask_max": max(part["outside_mask_max"] for part in parts),
              "reproducible": next((part["reproducible"] for part in parts if "reproducible" in part), None),
              **{k: sum(part[k] for part in parts) for k in ("zero_gradients", "nonfinite", "gradients")}}
    for key in ("by_iterations", "by_restarts"):
        sums = {n: [sum(v) for v in zip(*(part[key][n] for part in parts))] for n in parts[0][key]}
        record[key] = {n: total / count for n, (total, count) in sums.items()}
    write(table.with_suffix(".json"), json.dumps(record, indent=1))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [parts[0]["header"], *([f"{v:.7g}" if isinstance(v, float) else v for v in row] for row in rows)])
    write(table, text.getvalue())
    mean = {role: [row[9] for row in rows if row[8] == role] for role in ("genuine", "intruder")}
    return f"{name}: " + ", ".join([
        *(f"{v} {k.replace('_', ' ')}" for k, v in effort(name, config).items()),
        f"{len(parts)} targets, {len(rows)} pairs",
        *(f"mean {role} distance {sum(d) / len(d):.3f}" for role, d in mean.items() if d), f"{seconds:.0f} s"])


def attack_method(config: Config, embed: Embed, faces, targets: list[int], near: list[int], far: list[int], out: Path,
                  about: dict) -> None:
    """Every attack asked for on one embedding. A target's part is a file of its own until the last is done."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for name in choose("attacks", config.attacks, ATTACKS):
        table, partial = out / f"{name}.csv", out / f".{name}.partial"
        title = f"{out.parent.name} {name}"
        old = partial / "config.json"
        begun = old.exists() and read_json(old)["config"].get("defences") == config.defences
        done = not begun and finished(table, config.defences)  # under fewer it is made again
        old = table.with_suffix(".json") if done else old
        if config.resume and (begun or done):
            before = read_json(old)["config"]
            for key, value in about["config"].items():
                if before.get(key, value) != value and not (done and key == "defences"):
                    raise UsageError(f"--resume: {old} was made with {key} {before.get(key)!r}, now {value!r}; give "
                                     "the same settings, or leave out --resume to start this attack again")
            if done:
                if rank == 0:
                    if not (partial / "config.json").exists():
                        shutil.rmtree(partial, ignore_errors=True)  # killed while it was removed
                    print(f"{title}: kept, {table} is finished", flush=True)
                continue
        elif rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        barrier(world)
        partial.mkdir(exist_ok=True)
        if rank == 0:
            write(partial / "config.json", json.dumps(about))
        waiting = [p for p in targets[rank::world] if not (partial / f"{p}.json").exists()]
        for person in progress(waiting, title, rank):
            part, images = attack_target(config, name, embed, faces, person, near, far, device,
                                         out.parents[1] / "generator.pt", repeat=person == targets[0])
            if images:
                write(partial / f"{person}.npz", **images)
            write(partial / f"{person}.json", json.dumps(part))
        barrier(world)
        if rank == 0:
            parts = [read_json(partial / f"{person}.json") for person in targets]
            files = [partial / f"{person}.npz" for person in targets]
            shown = [dict(np.load(file)) for file in files if file.exists()]
            line = merge(name, config, [faces.names[p] for p in targets], parts, shown, table, about)
            print(out.parent.name, line, flush=True)
            (partial / "config.json").unlink()  # from here on the table counts
            shutil.rmtree(partial)


def attack_run(config: Config) -> None:
    """Everything of `main` but the command line and the handling of errors."""
    import data
    import embed as embedding

    run, trained = Path(config.run), read_json(Path(config.run) / "run.json")
    methods = choose("method", config.method, sorted(path.parent.name for path in run.glob("*/embedding.pt")))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = " ".join(str(error).split())[:100]
        raise UsageError(f"--device {device}: cannot be used here ({told}); give cpu, or a device torch sees") from None
    torch.backends.cudnn.allow_tf32 = False  # reported attacks are those of full float32
    if device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    config = dataclasses.replace(config, device=device, chunk=config.chunk or (2048 if device != "cpu" else 128))
    folder, root = "attacks", config.root or None
    if config.data:
        same = os.path.realpath(root or "") == os.path.realpath(trained.get("root") or "")
        if same and config.data == trained["data"]:
            raise UsageError(f"--root {root}: the embedding was trained on these people; leave out --data and --root")
        faces = data.load(config.data, root, crop=config.crop or None)
        counts = torch.bincount(faces.person, minlength=len(faces.names)).tolist()
        near = [p for p, n in enumerate(counts) if n >= config.min_images]
        far = [p for p, n in enumerate(counts) if n < config.min_images]
        if not near:
            raise UsageError(f"--root {root}: nobody has {config.min_images} images; lower --min-images or add images")
        folder = f"attacks-{Path(root).resolve().name if root else config.data}"
    else:
        faces = data.load(trained["data"], trained.get("root") or None, crop=trained.get("crop") or None,
                          **trained.get("options") or {})
        split = data.read_manifest(run / "people.json", faces)
        people = read_json(run / "people.json")["sha256"]
        near, far = list(split.target), list(split.validation)
    drawn = sorted(near, key=lambda p: stable_generator(config.seed, faces.names[p]).initial_seed())
    targets = sorted(drawn[:config.targets])
    skip = {"run", "method", "attacks", "chunk", "local", "device", "figures", "resume"}
    used = {k: v for k, v in dataclasses.asdict(config).items() if k not in skip}
    used["people"] = hashlib.sha256(json.dumps([faces.names, faces.files, targets]).encode()).hexdigest()[:16]
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    for method in methods:
        file = run / method / "embedding.pt"
        try:
            embed = embedding.load_embedding(file, device=device)
            if not config.data and embedding.read(file, "embedding").get("people", people) != people:
                raise UsageError(f"{file}: trained on other persons than {run / 'people.json'} names; train it again with --overwrite")
        except embedding.UsageError as error:
            raise UsageError(str(error)) from None
        used["embedding"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        found = versions()
        about = {"config": used, "seed": config.seed, "commit": found.pop("commit"), "data": faces.data,
                 "device": name, "versions": found}
        attack_method(config, embed, faces, targets, near, far, run / method / folder, about)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        from data import DataError
    except ImportError:
        print("attacks.py: the command needs data/ and embed.py beside it", file=sys.stderr)
        return 2
    try:
        attack_run(parse(argv))
    except (UsageError, DataError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"attacks.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        told = f"{error.filename or 'output'}: {error.strerror}; mend that, then --resume goes on"
        print(f"attacks.py: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("attacks.py: stopped; the same command with --resume goes on after the last finished target",
                  file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
