"""Times every op of kernels/ and the loops around the model.

    python -m tests.bench [--ops adain ...] [--rounds 7] [--batch 128] [--out results/bench.csv]
    python -m tests.bench --profile [flags of embed.py]     # where a training step's time goes

The loops (on a CPU; F at a quarter of VGG16's channels): `pgd`, ten masked sign steps, against
loops that do what ART's and torchattacks' PGD do, and against these (and kornia's augmentations)
themselves when installed (requirements-bench.txt); `step`, a whole training step of "ours", against
the same with a plain inner attack, with that of the released code, and with its way of running G
too; `patch_local`, patch-local recomputation against the full pass.

On a GPU: the kernel against its PyTorch reference and torch.compile of it, with GB/s beside the
copy bandwidth measured in the same run. On a CPU, where an op is its reference: against what a user
would write instead; with one thread (the default) in CPU time, to which other load does not add.
One process, variants interleaved, median of the rounds with 10th and 90th percentile; `ratio` is
the median over rounds of this variant's time by the op's own in the same round. An op whose output
differs from the others' is not timed, and the exit status is 1. Rows are appended.
"""

import argparse
import copy
import csv
import dataclasses
import datetime
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import embed as embedding
import generator as lord
from data import run
from kernels.adain import adain, adain_ref
from kernels.augment import augment, augment_ref
from kernels.gaussian_cutout import gaussian_cutout, gaussian_cutout_ref
from kernels.masked_step import box_mask, masked_step, masked_step_ref
from kernels.patch_local import PatchLocal
from kernels.place_patches import painted, place_patches, place_patches_ref, positions
from kernels.tanh_perturb import tanh_perturb, tanh_perturb_ref, to_tanh
from kernels.window_energy import window_energy, window_energy_ref

COLUMNS = ["date", "op", "case", "variant", "device", "n", "median_ms", "p10_ms", "p90_ms"]
COLUMNS += ["ratio", "gb_s", "copy_gb_s", "torch", "triton", "threads", "commit"]
AREA, ASPECT = embedding.Config.cutout_area, embedding.Config.cutout_aspect


@dataclass
class Case:
    op: str
    name: str
    bytes: int  # least traffic: what must be read and written once
    variants: dict[str, Callable]  # the op first; each returns a tensor or a tuple
    tolerance: float = 0.0
    ties: float = 0.0  # share of the values that may differ: a ReLU, a pool or a sign at a tie
    check: Callable | None = None  # instead of comparing outputs, where they are random


def draw_boxes(B: int, rng: torch.Generator, p: float = 0.5) -> Tensor:
    return embedding.draw_boxes(B, 64, 64, p, AREA, ASPECT, rng)


def is_images(x: Tensor | tuple) -> bool:
    x = x[0] if isinstance(x, tuple) else x
    return x.shape[1:] == (3, 64, 64) and bool((x >= 0).all() and (x <= 1).all())


# What a user would write instead, on a CPU


def cutout_loop(images: Tensor, whole: bool = False, masks: bool = False) -> tuple[Tensor, ...]:
    """Erasing one image at a time in NumPy; whole: noise for all of the image, of which the
    rectangle is used. masks: in float64, and where it erased is told as an image of ones and zeros
    too, as in the released code."""
    out, (_, C, H, W), boxes = images.numpy(), images.shape, np.zeros((len(images), 4), int)
    out = out.astype(np.float64) if masks else out.copy()
    erased = np.zeros(out.shape) if masks else None
    for b, image in enumerate(out):
        if np.random.rand() >= 0.5:
            continue
        while True:
            area, ratio = np.random.uniform(0.02, 0.2) * H * W, np.random.uniform(0.5, 2)
            h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            top, left = np.random.randint(0, H), np.random.randint(0, W)
            if top + h <= H and left + w <= W:
                break
        at = (slice(None), slice(top, top + h), slice(left, left + w))
        noise = np.clip(np.random.normal(0.5, 0.25, (C, H, W) if whole else (C, h, w)), 0, 1)
        image[at] = noise[at] if whole else noise
        boxes[b] = top, left, h, w
        if erased is not None:
            erased[b][at] = 1
    found = torch.from_numpy(out).float(), torch.from_numpy(boxes)
    return found if erased is None else (*found, torch.from_numpy(erased))


def doa_loop(
    images: Tensor,
    grad: Tensor,
    size: int,
    stride: int,
    candidates: int,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DOA's search one image and one place at a time, as the public codes do: sums, sorting,
    in-painting. masks (P, C, H, W): every window as an image of ones and zeros, as in the released
    code; else slices."""
    squares, pixels = grad.numpy() ** 2, images.numpy()
    places = positions(*images.shape[2:], size, size, stride).numpy()
    best, painted = [], []
    for b in range(len(images)):
        if masks is not None:
            energy = (squares[b] * masks.numpy()).sum((1, 2, 3))
            order = np.argsort(energy)[::-1][:candidates].copy()
            inside = masks.numpy()[order]
            painted.extend(pixels[b] * (1 - inside) + 0.5 * inside)
        else:
            energy = [squares[b, :, t : t + size, c : c + size].sum() for t, c in places]
            order = np.argsort(energy)[::-1][:candidates]
            for t, c in places[order]:
                grey = pixels[b].copy()
                grey[:, t : t + size, c : c + size] = 0.5
                painted.append(grey)
        best.append(places[order])
    painted = torch.from_numpy(np.stack(painted)).unflatten(0, (len(images), candidates))
    # F's part: every in-painting is read once
    return torch.from_numpy(np.stack(best)), painted.mean((2, 3, 4))


def doa(images: Tensor, grad: Tensor, size: int, stride: int, candidates: int) -> tuple:
    """The search of embed.doa_boxes, without F."""
    places = positions(*images.shape[2:], size, size, stride, images.device)
    best = places[window_energy(grad, size, size, stride).topk(candidates, 1).indices]
    grey = painted(images, 0.5, best, (size, size))
    return best, torch.stack([x.mean((1, 2, 3)) for x in grey], 1)


def pooled(grad: Tensor, size: int, stride: int) -> Tensor:
    energy = F.avg_pool2d(grad.square().sum(1, keepdim=True), size, 1, divisor_override=1)
    tops, lefts = positions(*grad.shape[2:], size, size, stride, grad.device).unbind(1)
    return energy[:, 0, tops, lefts]


def augment_loop(images: Tensor, flips: Tensor, shifts: Tensor, boxes: Tensor, noise: Tensor):
    out, s = [], int(shifts.abs().max())
    for b, image in enumerate(images):
        image = (image.flip(-1) if flips[b] else image).float() / 255
        down, right = (shifts[b] + s).tolist()
        H, W = image.shape[1:]
        image = F.pad(image[None], (s, s, s, s), mode="replicate")[0]
        image = image[:, down : down + H, right : right + W].clone()
        top, left, h, w = boxes[b].tolist()
        at = (slice(None), slice(top, top + h), slice(left, left + w))
        image[at] = noise[b][at]
        out.append(image)
    return torch.stack(out)


def place_loop(images: Tensor, patch: Tensor, places: Tensor) -> Tensor:
    h, w = patch.shape[-2:]
    out = images[:, None].repeat(1, len(places), 1, 1, 1)
    for p, (top, left) in enumerate(places.tolist()):
        out[:, p, :, top : top + h, left : left + w] = patch[0, 0]
    return out


def adain_plain(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    x = F.leaky_relu(x, 0.2)
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(var + 1e-5)
    return normal * scale[:, :, None, None] + offset[:, :, None, None]


def both_ways(function: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, y.detach())


# The ops on a CPU


def cpu_cases(B: int) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    images, grad, noise = torch.rand(3, B, 3, 64, 64, generator=rng)
    grad = grad - 0.5
    yield from patch_cases(B, images, grad)
    boxes, (flips, shifts) = draw_boxes(B, rng), embedding.draw_moves(B, 5, rng)
    pixels, one, moves = (images * 255).byte(), images.nbytes, (flips, shifts, boxes, noise)
    given = dict(zip(("flips", "shifts", "boxes", "noise"), moves))
    variants = {
        "op": lambda: augment(pixels, **given)[0],
        "per-image loop": lambda: augment_loop(pixels, *moves),
    }
    yield Case("augment", f"B={B}, uint8", one // 4 + one, variants)
    yield from kornia_cases(images)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(max(B // 4, 1), 64, 32, 32, generator=rng).contiguous(memory_format=layout)
        leaves = (x, *torch.rand(2, *x.shape[:2], generator=rng))
        variants = {
            "op": functools.partial(both_ways, adain, *leaves),
            "eager": functools.partial(both_ways, adain_plain, *leaves),
        }
        name = f"{tuple(x.shape)} {str(layout)[6:]}, both ways"
        yield Case("adain", name, 5 * x.nbytes, variants, 1e-2)
    yield from patch_local_cases(max(B // 4, 1))
    yield from pgd_cases(max(B // 4, 1))
    for precision in dict.fromkeys(("float32", run.precision("auto", torch.device("cpu")))):
        yield from step_cases(max(B // 4, 2), precision)


def patch_cases(B: int, images: Tensor, grad: Tensor) -> Iterator[Case]:
    """What changes a rectangle of each image: cutout, DOA's search, the masked step, patches. The
    ops get channels_last, the layout of training, the loops the usual one."""
    rng, one = torch.Generator().manual_seed(1), images.nbytes
    x, g = (v.contiguous(memory_format=torch.channels_last) for v in (images, grad))

    def erased(result: tuple) -> bool:
        out, boxes = result[:2]
        inside, drawn = box_mask(boxes, 64, 64).flatten(1), (boxes[:, 2] > 0).float().mean()
        changed = (out != images).any(1).flatten(1)
        random = out.flatten(2).transpose(1, 2)[inside]
        moments = abs(random.mean() - 0.5) < 0.02 and abs(random.std() - 0.24) < 0.02
        whole = bool((changed == inside).all()) and 0.3 < drawn < 0.7  # p is 0.5
        return whole and is_images(out) and bool(moments)

    variants = {
        "op": lambda: gaussian_cutout(x, boxes=draw_boxes(B, rng)),
        "NumPy loop, noise inside": lambda: cutout_loop(images),
        "NumPy loop, masks as images": lambda: cutout_loop(images, masks=True),
        "NumPy loop, whole noise": lambda: cutout_loop(images, True),
    }
    yield Case("gaussian_cutout", f"B={B}", 2 * one, variants, check=erased)
    places = positions(64, 64, 20, 20, 5)
    windows = torch.cat([places, torch.full_like(places, 20)], 1)
    windows = box_mask(windows, 64, 64).float().repeat(1, 3, 1, 1)
    for C in (1, 4, 10):
        search = (images, grad, 20, 5, C)
        variants = {
            "op": functools.partial(doa, x, g, 20, 5, C),
            "NumPy loop": functools.partial(doa_loop, *search),
            "NumPy loop, masks as images": functools.partial(doa_loop, *search, windows),
        }
        name = f"search, {C} in-painting{'s' * (C > 1)}, B={B}, 20x20, stride 5"
        yield Case("doa", name, (1 + 1 + C) * one, variants, 1e-5)
    variants = {
        "op": lambda: window_energy(g, 20, 20, 5),
        "average pooling": lambda: pooled(grad, 20, 5),
    }
    yield Case("window_energy", f"B={B}, 20x20, stride 5", one, variants, 1e-3)
    boxes, alpha = draw_boxes(B, rng), 16 / 255
    alphas, full = torch.full((B,), alpha), box_mask(boxes, 64, 64)
    variants = {
        "op": lambda: masked_step(x, g, alphas, boxes),
        "whole images": lambda: torch.where(full, (x + alpha * g.sign()).clamp(0, 1), x),
    }
    yield Case("masked_step", f"B={B}", int(2.1 * one), variants)
    patch, some = torch.rand(1, 1, 3, 10, 10), positions(64, 64, 10, 10, 27)
    variants = {
        "op": lambda: place_patches(x, patch, some),
        "slices": lambda: place_loop(images, patch, some),
    }
    name = f"B={B}, 10x10, P={len(some)}"
    yield Case("place_patches", name, (1 + len(some)) * one, variants)


def kornia_cases(images: Tensor) -> Iterator[Case]:
    """Beside kornia's own augmentations, which draw their own moves, shift by bilinear resampling
    and erase to one grey: timed, not compared."""
    if not importlib.util.find_spec("kornia"):
        return
    from kornia import augmentation as K

    B, rng, pixels = len(images), torch.Generator().manual_seed(2), (images * 255).byte()
    erase = K.RandomErasing(scale=AREA, ratio=ASPECT, value=0.5, p=0.5)
    affine = K.RandomAffine(0, translate=(5 / 64, 5 / 64), padding_mode="border", p=1.0)
    moves = torch.nn.Sequential(K.RandomHorizontalFlip(p=0.5), affine, erase)
    variants = {
        "op": lambda: gaussian_cutout(images, boxes=draw_boxes(B, rng)),
        "kornia RandomErasing": lambda: erase(images),
    }
    name = f"B={B}, own draws"
    yield Case("gaussian_cutout", name, 2 * images.nbytes, variants, check=is_images)

    def ours() -> Tensor:
        flips, shifts = embedding.draw_moves(B, 5, rng)
        return augment(pixels, flips=flips, shifts=shifts, boxes=draw_boxes(B, rng))[0]

    variants = {"op": ours, "kornia flip, affine, erasing": lambda: moves(images)}
    yield Case("augment", name, 2 * images.nbytes, variants, check=is_images)


# The loops around the model


class Plain(torch.nn.Module):
    """The same F as a user would write it: weights with gradients, memory as PyTorch makes it."""

    def __init__(self, embed: embedding.Embedding) -> None:
        super().__init__()
        self.inner = copy.deepcopy(embed).to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner.head(self.inner.trunk((images - 0.5) * 4))


def art_pgd(
    model: torch.nn.Module, loss: Callable, images: Tensor, masks: Tensor, steps: int, alpha: float
) -> Tensor:
    """ProjectedGradientDescent(mask=) of ART 1.20: NumPy on the host, loss.backward() with weight
    gradients, whole images projected."""
    start, mask = images.numpy(), masks.numpy().astype(np.float32)
    x = start.copy()
    for _ in range(steps):
        leaf = torch.from_numpy(x).requires_grad_()
        model.zero_grad()
        loss(model(leaf)).backward()
        perturbation = np.sign(leaf.grad.numpy()) * mask
        x = np.clip(x + alpha * perturbation, 0, 1).astype(np.float32)
        x = start + np.clip(x - start, -1, 1)
    return torch.from_numpy(x)


def torchattacks_pgd(
    model: torch.nn.Module, loss: Callable, images: Tensor, masks: Tensor, steps: int, alpha: float
) -> Tensor:
    """PGD of torchattacks 3.5, with the mask that it does not have."""
    x = images.clone().detach()
    for _ in range(steps):
        x.requires_grad = True
        (grad,) = torch.autograd.grad(loss(model(x)), x)
        x = x.detach() + alpha * grad.sign() * masks
        x = torch.clamp(images + torch.clamp(x - images, -1, 1), 0, 1).detach()
    return x


def installed_art(
    plain: torch.nn.Module,
    anchors: Tensor,
    images: Tensor,
    masks: Tensor,
    steps: int,
    alpha: float,
    targeted: bool = False,
) -> Callable | None:
    """ART's own attack: away from the anchors, or towards them if targeted."""
    if not importlib.util.find_spec("art"):
        return None
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    classifier = PyTorchClassifier(
        plain, loss, images.shape[1:], anchors.shape[1], clip_values=(0, 1), device_type="cpu"
    )
    classifier.reduce_labels = lambda y: y  # features stand where ART expects labels
    classifier._reduce_labels = False
    how = {"eps": 1.0, "eps_step": alpha, "max_iter": steps, "batch_size": len(images)}
    how |= {"targeted": targeted, "verbose": False}
    attack = ProjectedGradientDescent(classifier, **how)
    x, y, mask = images.numpy(), anchors.numpy(), masks.numpy().astype(np.float32)
    return lambda: torch.from_numpy(attack.generate(x, y=y, mask=mask))


def installed_torchattacks(
    plain: Plain, anchors: Tensor, images: Tensor, steps: int, alpha: float
) -> Callable | None:
    """Without a mask, which it does not have: its images may be anything, so it is timed beside,
    not compared."""
    if not importlib.util.find_spec("torchattacks"):
        return None
    import torchattacks

    attack = torchattacks.PGD(plain, eps=1.0, alpha=alpha, steps=steps, random_start=False)
    return lambda: attack(images, torch.arange(len(images)) % anchors.shape[1])


def pgd_cases(B: int) -> Iterator[Case]:
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, standardise=True)
    plain, steps, alpha = Plain(embed), 10, 16 / 255
    images, other = torch.rand(2, B, 3, 64, 64)
    with torch.no_grad():
        anchors = embed(other)
    away = torch.full((B,), alpha)

    def ours(boxes: Tensor) -> Tensor:
        attack = functools.partial(embedding.inner_attack, steps=steps)
        return embedding.local_attack(attack, embed, images, anchors, away, boxes)

    def loss(features: Tensor) -> Tensor:
        return (features - anchors).square().sum()

    def reached(images: Tensor) -> Tensor:
        """What is compared: the mean distance, since a sign of a gradient near zero may fall either
        way, and then leads elsewhere."""
        with torch.no_grad():
            return (embed(images) - anchors).square().sum(1).sqrt().mean()

    for size in (10, 20):
        boxes = torch.tensor([[20, 24, size, size]]).repeat(B, 1)
        how = (images, box_mask(boxes, 64, 64), steps, alpha)
        runs = {
            "op": functools.partial(ours, boxes),
            "loop as in ART": functools.partial(art_pgd, plain, loss, *how),
            "loop as in torchattacks": functools.partial(torchattacks_pgd, plain, loss, *how),
            "ART": installed_art(plain, anchors, *how),
        }
        variants = {k: lambda f=f: reached(f()) for k, f in runs.items() if f}
        yield Case("pgd", f"B={B}, {size}x{size}, {steps} steps", 0, variants, 0.02)
    if whole := installed_torchattacks(plain, anchors, images, steps, alpha):
        boxes = torch.tensor([[0, 0, 64, 64]]).repeat(B, 1)
        variants = {"op": lambda: ours(boxes), "torchattacks, its own loss": whole}
        yield Case("pgd", f"B={B}, whole images, {steps} steps", 0, variants, check=is_images)


def patch_local_cases(B: int) -> Iterator[Case]:
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, standardise=True).requires_grad_(False)
    images, other = torch.rand(2, B, 3, 64, 64)
    with torch.no_grad():
        anchors = embed(other)
    for size in (10, 20):
        boxes, top, left = torch.tensor([[20, 24, size, size]]).repeat(B, 1), 20, 24
        inside = (..., slice(top, top + size), slice(left, left + size))
        cached, patch = PatchLocal(embed, images, boxes), images[inside].contiguous()

        def near(local=cached, patch=patch) -> tuple[Tensor, Tensor]:
            leaf = patch.clone().requires_grad_()
            distance = (local(leaf) - anchors).square().sum(1)
            (grad,) = torch.autograd.grad(distance.sum(), leaf)
            return distance.detach(), grad / grad.abs().max()

        def full(inside=inside) -> tuple[Tensor, Tensor]:
            leaf = images.clone().requires_grad_()
            distance = (embed(leaf) - anchors).square().sum(1)
            (grad,) = torch.autograd.grad(distance.sum(), leaf)
            return distance.detach(), grad[inside] / grad[inside].abs().max()

        def all_of_it(boxes=boxes, near=near) -> tuple[Tensor, Tensor]:
            local = PatchLocal(embed, images, boxes)
            return [near(local) for _ in range(10)][-1]

        name = f"B={B}, {size}x{size}, {cached.layers} of 18 layers"
        one = {"op": near, "full pass": full}
        yield Case("patch_local", f"{name}, one step", 0, one, 1e-4, 0.05)
        ten = {"op": all_of_it, "full pass": lambda full=full: [full() for _ in range(10)][-1]}
        yield Case("patch_local", f"{name}, 10 steps and cache", 0, ten, 1e-4, 0.05)


def plain_step(
    config: embedding.Config,
    model: Plain,
    adam: torch.optim.Optimizer,
    people: embedding.Sampler,
    made: Callable,
    rng: torch.Generator,
    cached: bool,
) -> Tensor:
    """A step of "ours" whose inner attack has weight gradients, NumPy on the host, and x and t one
    after the other; not `cached`: the anchors run again in every step, as in the released code."""
    q = embedding.quadruplets(config, model, people, made, rng)
    found, alpha = [], config.attack_alpha / 255
    sides = ((q.x, q.x_boxes, q.y, q.fy, alpha), (q.t, q.t_boxes, q.u, q.fu, -alpha))
    for images, boxes, anchor, feature, step in sides:
        erased = boxes[:, 2] > 0
        mask = box_mask(boxes[erased], 64, 64).numpy()
        x, anchor, feature = images[erased].numpy(), anchor[erased], feature[erased]
        for _ in range(config.attack_steps):
            leaf = torch.from_numpy(x).requires_grad_()
            model.zero_grad()
            (model(leaf) - (feature if cached else model(anchor))).square().sum().backward()
            moved = np.clip(x + step * np.sign(leaf.grad.numpy()), 0, 1)
            x = np.where(mask, moved, x).astype(np.float32)
        found.append(images.index_put((erased,), torch.from_numpy(x)))
    fx, fy, ft, fu = (model(v.contiguous()) for v in (found[0], q.y, found[1], q.u))
    loss = embedding.two_pair_loss(fx, fy, ft, fu, config.margin, config.hinge)
    adam.zero_grad()
    loss.backward()
    adam.step()
    apart = [(a - b).detach().square().sum(1).sqrt().mean() for a, b in ((fx, fy), (ft, fu))]
    return torch.stack([loss.detach(), *apart])


def plain_maker(generator: lord.Lord, images: Tensor) -> Callable:
    """y and u as the released code makes them: the class codes are known, E_co and G run in every
    step, layer by layer."""
    inner = copy.deepcopy(generator).to(memory_format=torch.contiguous_format)
    classes, _ = lord.encode(generator, images)

    def made(identity: Tensor, content: Tensor, _: Tensor | None = None) -> Tensor:
        g, z = inner.generator, classes[identity]
        x = inner.content_encoder(images[content].float() / 255)
        for layer in g.dense:
            x = F.leaky_relu(layer(x), 0.2)
        x = x.view(-1, g.start, 4, 4)
        for conv, modulation in zip(g.blocks, g.modulation):
            scale, offset = modulation(z).chunk(2, 1)
            x = adain_plain(conv(F.interpolate(x, scale_factor=2.0)), 1 + scale, offset)
        return torch.sigmoid(g.conv7(F.leaky_relu(g.conv5(x), 0.2)))

    return made


def step_cases(B: int, precision: str) -> Iterator[Case]:
    """Rate 0, the same random numbers: every run repeats the first. The others in float32."""
    config = embedding.Config(width=0.25, batch=B, standardise=True, precision=precision)
    plain = dataclasses.replace(config, precision="float32")
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, config.dim, True)
    images = torch.randint(0, 256, (8 * 8, 3, 64, 64), dtype=torch.uint8)
    people = embedding.Sampler(images, torch.arange(8).repeat_interleave(8))
    generator = lord.Lord(lord.Config(**{**lord.PRESETS["demo"], "preset": "demo"}))
    generator = generator.eval().requires_grad_(False)
    codes = lord.encode(generator, images)
    copies = lord.decode(generator, *codes).half()
    made = embedding.Generated(generator.generator, *codes, copies)
    adam, rng = torch.optim.Adam(embed.parameters(), lr=0.0), torch.Generator()

    def ours() -> Tensor:
        rng.manual_seed(1)
        step = (config, embed, adam, people, made, rng, config.attack_alpha)
        found = embedding.train_step(*step)
        return torch.tensor([found[k] for k in ("loss", "d_positive", "d_negative")])

    def theirs(cached: bool, made=made) -> Callable:
        model = Plain(embed)
        adam = torch.optim.Adam(model.parameters(), lr=0.0)
        step = (plain, model, adam, people, made)
        return lambda: plain_step(*step, rng.manual_seed(1), cached)

    variants = {
        "op": ours,
        "anchors cached": theirs(True),
        "as in the released code": theirs(False),
        "as in the released code, G too": theirs(False, plain_maker(generator, images)),
    }
    name = f"ours, B={B} quadruplets, {config.attack_steps} inner steps, {precision}"
    yield Case("step", name, 0, variants, 0.02)


# The kernels on a GPU


def three(op: Callable, ref: Callable, *arguments, **named) -> dict[str, Callable]:
    compiled = torch.compile(ref, dynamic=False)
    functions = {"op": op, "reference": ref, "compiled reference": compiled}
    return {k: functools.partial(f, *arguments, **named) for k, f in functions.items()}


def gpu_cases(B: int) -> Iterator[Case]:
    """Tensors well beyond the L2 cache: B defaults to 4096 images of 64x64, 0.2 GB in float32."""
    rng = torch.Generator("cuda").manual_seed(0)
    boxes, (flips, shifts) = draw_boxes(B, rng), embedding.draw_moves(B, 5, rng)
    alphas, share = boxes[:, 0] * 0 + 0.1, (boxes[:, 2] * boxes[:, 3]).float().mean().item() / 4096
    places = positions(64, 64, 20, 20, 5, "cuda")[:10]
    patch = torch.rand(1, 1, 3, 20, 20).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):

            def random(*shape: int, dtype=dtype, layout=layout) -> Tensor:
                x = torch.rand(shape, generator=rng, device="cuda").to(dtype)
                return x.contiguous(memory_format=layout)

            x, grad, noise = (random(B, 3, 64, 64) for _ in range(3))
            grad, one, kind = grad - 0.5, x.nbytes, f"{str(dtype)[6:]} {str(layout)[6:]}"
            name, eps = f"B={B} {kind}", 1e-6 if dtype is torch.float32 else 2**-7
            step = three(masked_step, masked_step_ref, x, grad, alphas, boxes)
            yield Case("masked_step", name, int((2 + share) * one), step)
            cut = three(gaussian_cutout, gaussian_cutout_ref, x, boxes=boxes, noise=noise)
            yield Case("gaussian_cutout", name, 2 * one, cut)
            small = x[: B // 8]
            paste = three(place_patches, place_patches_ref, small, patch.to(dtype), places)
            yield Case("place_patches", f"{name}, P=10", (1 + 10) * small.nbytes, paste)
            energy = three(window_energy, window_energy_ref, grad, 20, 20, 5)
            yield Case("window_energy", name, one, energy, 1e-2)
            if layout is torch.contiguous_format:
                w = to_tanh(x).to(dtype).flatten(2)
                squash = three(tanh_perturb, tanh_perturb_ref, w, grad.flatten(2))
                yield Case("tanh_perturb", name, 3 * one, squash, eps)
            if dtype is torch.float32:
                given = {"flips": flips, "shifts": shifts, "boxes": boxes, "noise": noise}
                pixels = (x * 255).byte()
                move = three(augment, augment_ref, pixels, **given, layout=layout)
                yield Case("augment", f"{name} from uint8", pixels.nbytes + one, move, eps)
            planes, size = random(64, 256, 64, 64) - 0.5, "(64, 256, 64, 64)"
            leaves = (planes, *torch.rand(2, 64, 256, generator=rng, device="cuda"))
            ways = three(adain, adain_ref, *leaves)
            traffic = 2 * planes.nbytes
            yield Case("adain", f"{size} {kind} forward", traffic, ways, max(eps, 1e-4))
            ways = {k: functools.partial(both_ways, f.func, *leaves) for k, f in ways.items()}
            yield Case("adain", f"{size} {kind} both ways", 5 * planes.nbytes, ways, 0.05)


# Measuring


def agrees(case: Case) -> list[str]:
    """Variants whose output is wrong: differs from the op's beyond the tolerance (relative beyond
    1), or fails the case's check."""
    outputs = {k: f() for k, f in case.variants.items()}
    if case.check:
        return [k for k, out in outputs.items() if not case.check(out)]
    outputs = {k: out if isinstance(out, tuple) else (out,) for k, out in outputs.items()}
    first, *_ = outputs.values()
    wrong = []
    for k, out in outputs.items():
        for a, b in zip(first, out, strict=True):
            a, b = a.double(), b.double()
            finite = bool(a.isfinite().all() and b.isfinite().all()) and a.shape == b.shape
            far = (a - b).abs() > case.tolerance * b.abs().clamp(min=1) if finite else None
            if far is None or far.double().mean() > case.ties:
                wrong.append(k)
    return wrong


def seconds(function: Callable, cuda: bool) -> float:
    if not cuda:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        function()
        return clock() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(case: Case, rounds: int, cuda: bool) -> dict[str, dict[str, str]]:
    """Median, 10th and 90th percentile, ratio to the op and GB/s of each variant; one untimed round
    first."""
    times: dict[str, list[float]] = {k: [] for k in case.variants}
    for n in range(rounds + 1):
        for k, function in case.variants.items():
            t = seconds(function, cuda)
            if n:
                times[k].append(t)
    own, *_ = times.values()
    found = {}
    for k, ts in times.items():
        median, low, high = np.percentile(ts, (50, 10, 90)).tolist()
        numbers = {"median_ms": median * 1e3, "p10_ms": low * 1e3, "p90_ms": high * 1e3}
        numbers["ratio"] = statistics.median(t / o for t, o in zip(ts, own))
        numbers["gb_s"] = case.bytes / median / 1e9
        found[k] = {name: f"{v:.4g}" for name, v in numbers.items()}
    return found


def copy_bandwidth(cuda: bool) -> float:
    """GB/s read and written by a copy: 1 GiB on a GPU, 64 MiB on a CPU; median of 7."""
    source = torch.ones((1 << 30 if cuda else 1 << 26) // 4, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), cuda) for _ in range(8)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def said_by(*command: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *command]
    return subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()


def about(rounds: int, cuda: bool) -> dict[str, object]:
    """The columns that all rows of a run share."""
    changed = said_by("status", "--porcelain", "--", "../*.py", "../kernels", "../data", ".")
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "n": rounds,
        "copy_gb_s": f"{copy_bandwidth(cuda):.1f}",
        "torch": torch.__version__,
        "triton": triton or "",
        "threads": torch.get_num_threads(),
        "commit": said_by("rev-parse", "--short", "HEAD") + ("-changed" if changed else ""),
    }


# Where the time of a training step goes


def profile(argv: Sequence[str], repeats: int = 5) -> int:
    """Seconds of a training step and of its parts (medians), its FLOPs and the FLOP/s of a matrix
    product, on 50 train persons."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    import data

    class Count(TorchDispatchMode):  # FlopCounterMode hooks modules: torch.autograd.grad refuses
        flops = 0

        def __torch_dispatch__(self, function, types, inputs=(), named=None):
            result = function(*inputs, **(named or {}))
            if count := flop_registry.get(function._overloadpacket):
                self.flops += count(*inputs, **(named or {}), out_val=result)
            return result

    config, args = embedding.parse(argv)
    device = run.start(args.device)
    faces, split = data.open_run(config, args.run)
    persons = min(config.persons or 50, 50, len(split.train))
    chosen = {"persons": persons, "precision": run.precision(config.precision, device)}
    config = dataclasses.replace(config, **chosen)
    index = embedding.trained_on(config, faces, split)
    people = embedding.sampler_of(faces, index, device)
    file, embed = (
        embedding.generator_file(config, args.run),
        embedding.new_embedding(config, device),
    )
    made = embedding.generated(config, file, faces, split, people) if file else None
    if config.compile:
        run.compile_(embed)
    adam = torch.optim.Adam(
        embed.parameters(), lr=config.lr, amsgrad=config.amsgrad, fused=device.type == "cuda"
    )
    rng, alpha = torch.Generator(device).manual_seed(config.seed), config.attack_alpha
    # as the convolutions: bfloat16 operands made beforehand, or TF32 where these may take it
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    factors = torch.randn(2, *[8192 if device.type == "cuda" else 1024] * 2, device=device)
    factors = factors.to(getattr(torch, config.precision))
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

    mine = functools.partial(timed, "mining", embed)
    generate = functools.partial(timed, "generator", made) if made else None
    parts = ("step", "batch", "generator", "mining", "inner attack", "product")
    for n in range(repeats + 1):
        if n <= 1:  # the first one warms up
            spent = {name: [] for name in parts}
        for times in spent.values():
            times.append(0.0)
        timed("product", torch.mm, *factors)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            q = timed("batch", embedding.quadruplets, config, mine, people, generate, rng)
            timed("inner attack", embedding.attacked, config, embed, q, alpha, rng)
        timed("step", embedding.train_step, config, embed, adam, people, made, rng, alpha)
    with Count() as counter:
        embedding.train_step(config, embed, adam, people, made, rng, alpha)
    m = {name: statistics.median(times) for name, times in spent.items()}
    rest = zip(spent["batch"], spent["generator"], spent["mining"])
    found = {"data": statistics.median(b - g - n for b, g, n in rest)}
    found |= {k: m[k] for k in ("generator", "mining", "inner attack")}
    found["update"] = m["step"] - m["batch"] - m["inner attack"]
    for name, value in (*found.items(), ("step", m["step"])):
        print(f"{name:14}{value * 1e3:10.2f} ms{value / m['step'] * 100:7.1f} %")
    flops, side = counter.flops, len(factors[0])
    peak = 2 * side**3 / m["product"]
    print(
        f"{flops / 1e9:.1f} GFLOP a step of {config.batch}, {flops / m['step'] / 1e9:.0f} GFLOP/s, "
        f"{flops / m['step'] / peak:.0%} of the {peak / 1e9:.0f} of a {side} x {side} product here "
        f"({config.precision}, {run.record(device)['device']}); "
        f"medians of {repeats}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--profile" in argv:
        return run.command("tests.bench", profile, [a for a in argv if a != "--profile"])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="*", help="only these")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, at least 5")
    parser.add_argument("--batch", type=int, help="images; default 128 on a CPU, 4096 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; above one: wall time")
    parser.add_argument("--out", type=Path, default=Path("results/bench.csv"))
    a = parser.parse_args(argv)
    if a.rounds < 5:
        parser.error("--rounds must be at least 5")
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(a.threads)
    run.keep_memory()  # for all, as in a training
    cuda = torch.cuda.is_available()
    shared, failed = about(a.rounds, cuda), False
    print(" ".join(f"{k}={v}" for k, v in shared.items()))
    for case in gpu_cases(a.batch or 4096) if cuda else cpu_cases(a.batch or 128):
        if a.ops and case.op not in a.ops:
            continue
        if wrong := agrees(case):
            told = f"not timed, output differs: {', '.join(wrong)}"
            print(f"{case.op} {case.name}: {told}", file=sys.stderr)
            failed = True
            continue
        rows = []
        for variant, numbers in measure(case, a.rounds, cuda).items():
            rows.append(shared | {"op": case.op, "case": case.name, "variant": variant} | numbers)
            print(f"{case.op:16} {case.name:48} {variant:28}", end=" ")
            print(*(f"{k} {v:8}" for k, v in numbers.items()), flush=True)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        new = not a.out.exists()
        with a.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
