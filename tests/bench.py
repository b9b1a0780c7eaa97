"""Times every op of kernels/ and the loops around the model: python -m tests.bench [--ops adain ...] [--rounds 7] [--batch 128] [--out results/bench.csv]

The loops (on a CPU; F at a quarter of VGG16's channels): `pgd`, ten masked sign steps, against loops that do what ART's and torchattacks'
PGD do, and against these (and kornia's augmentations) themselves when installed (requirements-bench.txt); `step`, a whole training step of "ours", against the same
with a plain inner attack, with that of the released code, and with its way of running G too; `patch_local`, patch-local recomputation against the full pass.
On a GPU: the kernel against its PyTorch reference and torch.compile of it, with GB/s beside the copy bandwidth measured in the same run.
On a CPU, where an op is its reference: against what a user would write instead; with one thread (the default) in CPU time, to which other
load on the machine does not add. One process, variants interleaved, median of the rounds
with 10th and 90th percentile; `ratio` is the median over rounds of this variant's time by the op's own in the same round. An op
whose output differs from the others' is not timed, and the exit status is 1. Rows are appended.
"""

import argparse
import copy
import csv
import datetime
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import embed as embedding
import generator as lord
from kernels.adain import adain, adain_ref
from kernels.augment import augment, augment_ref, draw_moves
from kernels.gaussian_cutout import draw_boxes, gaussian_cutout, gaussian_cutout_ref
from kernels.masked_step import box_mask, masked_step, masked_step_ref
from kernels.place_patches import place_patches, place_patches_ref, positions
from kernels.tanh_perturb import attack_update, attack_update_ref, tanh_perturb, tanh_perturb_ref, to_tanh
from kernels.window_energy import window_energy, window_energy_ref

COLUMNS = [
    "date",
    "op",
    "case",
    "variant",
    "device",
    "n",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "ratio",
    "gb_s",
    "copy_gb_s",
    "torch",
    "triton",
    "threads",
    "commit",
]


@dataclass
class Case:
    op: str
    name: str
    bytes: int  # least traffic: what must be read and written once
    variants: dict[str, Callable]  # the op first; each returns a tensor or a tuple
    tolerance: float = 0.0
    ties: float = 0.0  # share of the values that may differ: a ReLU, a pool or a sign at a tie falls either way
    check: Callable | None = None  # instead of comparing outputs, where they are random
    compared: dict[str, Callable] | None = None  # of each variant what is compared instead of what is timed


# ------------------------------------------------------------------------------------ what a user would write instead, on a CPU
def cutout_loop(images: Tensor, whole: bool = False, in_place: bool = False, masks: bool = False) -> tuple[Tensor, ...]:
    """Erasing one image at a time in NumPy; whole: noise for all of the image, of which the rectangle is used.
    masks: in float64, and where it erased is told as an image of ones and zeros too, as in the released code."""
    out, (_, C, H, W), boxes = images.numpy(), images.shape, np.zeros((len(images), 4), int)
    out = out if in_place else out.astype(np.float64) if masks else out.copy()
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
        noise = np.clip(np.random.normal(0.5, 0.25, (C, H, W) if whole else (C, h, w)), 0, 1)
        image[:, top : top + h, left : left + w] = noise[:, top : top + h, left : left + w] if whole else noise
        boxes[b] = top, left, h, w
        if erased is not None:
            erased[b, :, top : top + h, left : left + w] = 1
    found = torch.from_numpy(out).float(), torch.from_numpy(boxes)
    return found if erased is None else (*found, torch.from_numpy(erased))


def doa_loop(images: Tensor, grad: Tensor, size: int, stride: int, candidates: int, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """DOA's search one image and one place at a time, as the public codes do: sums, sorting, in-painting.
    masks (P, C, H, W): every window as an image of ones and zeros, as in the released code; else slices."""
    squares, pixels = grad.numpy() ** 2, images.numpy()
    places = positions(*images.shape[2:], size, size, stride).numpy()
    best, painted = [], []
    for b in range(len(images)):
        if masks is not None:
            order = np.argsort((squares[b] * masks.numpy()).sum((1, 2, 3)))[::-1][:candidates].copy()
            inside = masks.numpy()[order]
            painted.extend(pixels[b] * (1 - inside) + 0.5 * inside)
        else:
            order = np.argsort([squares[b, :, t : t + size, c : c + size].sum() for t, c in places])[::-1][:candidates]
            for t, c in places[order]:
                copy = pixels[b].copy()
                copy[:, t : t + size, c : c + size] = 0.5
                painted.append(copy)
        best.append(places[order])
    painted = torch.from_numpy(np.stack(painted)).unflatten(0, (len(images), candidates))
    return torch.from_numpy(np.stack(best)), painted.mean((2, 3, 4))  # F's part: every in-painting is read once


def doa(images: Tensor, grad: Tensor, size: int, stride: int, candidates: int) -> tuple[Tensor, Tensor]:
    places = positions(*images.shape[2:], size, size, stride, images.device)
    best = places[window_energy(grad, size, size, stride).topk(candidates, 1).indices]  # (B, candidates, 2)
    painted = (place_patches(images, 0.5, each, (size, size)) for each in best.split(1, 1))  # one at a time, as embed.doa_boxes
    return best, torch.cat([each.mean((2, 3, 4)) for each in painted], 1)


def pooled(grad: Tensor, size: int, stride: int) -> Tensor:
    energy = F.avg_pool2d(grad.square().sum(1, keepdim=True), size, 1, divisor_override=1)
    tops, lefts = positions(*grad.shape[2:], size, size, stride, grad.device).unbind(1)
    return energy[:, 0, tops, lefts]


def augment_loop(images: Tensor, flips: Tensor, shifts: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    out, s = [], int(shifts.abs().max())
    for b, image in enumerate(images):
        image = (image.flip(-1) if flips[b] else image).float() / 255
        down, right = shifts[b].tolist()
        H, W = image.shape[1:]
        image = F.pad(image[None], (s, s, s, s), mode="replicate")[
            0, :, s + down : s + down + H, s + right : s + right + W
        ]
        top, left, h, w = boxes[b].tolist()
        image = image.clone()
        image[:, top : top + h, left : left + w] = noise[b, :, top : top + h, left : left + w]
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
    return (x - mean) * torch.rsqrt(var + 1e-5) * scale[:, :, None, None] + offset[:, :, None, None]


def both_ways(function: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, y.detach())


# --------------------------------------------------------------------------------------------------------------------- the cases
def cpu_cases(B: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    images, grad, noise = torch.rand(3, B, 3, 64, 64, generator=generator)
    grad = grad - 0.5
    one, boxes = images.nbytes, draw_boxes(B, 64, 64, generator=generator)
    flips, shifts = draw_moves(B, generator=generator)
    moves = (flips, shifts, boxes, noise)

    def erased(result):
        out, boxes = result[:2]
        inside, drawn = box_mask(boxes, 64, 64).flatten(1), (boxes[:, 2] > 0).float().mean()
        changed = (out != images).any(1).flatten(1)
        random = out.flatten(2).transpose(1, 2)[inside]
        whole = bool((changed == inside).all()) and 0.3 < drawn < 0.7  # p is 0.5
        return whole and bool(out.min() >= 0 and out.max() <= 1 and abs(random.mean() - 0.5) < 0.02 and abs(random.std() - 0.24) < 0.02)

    yield Case("gaussian_cutout", f"B={B}", 2 * one, {
        "op": lambda: gaussian_cutout(images),
        "NumPy loop, noise inside": lambda: cutout_loop(images),
        "NumPy loop, masks as images": lambda: cutout_loop(images, masks=True),
        "NumPy loop, whole noise": lambda: cutout_loop(images, True),
    }, check=erased)  # fmt: skip
    mine, theirs = images.clone(), images.clone()
    yield Case("gaussian_cutout", f"B={B}, in place", one // 10, {
        "op": lambda: gaussian_cutout(mine, out=mine),
        "NumPy loop, noise inside": lambda: cutout_loop(theirs, in_place=True),
    }, check=erased, compared={
        "op": lambda: gaussian_cutout(copied := images.clone(), out=copied),
        "NumPy loop, noise inside": lambda: cutout_loop(images.clone(), in_place=True),
    })  # fmt: skip
    places = positions(64, 64, 20, 20, 5)
    windows = box_mask(torch.cat([places, torch.full_like(places, 20)], 1), 64, 64).float().repeat(1, 3, 1, 1)
    for C in (1, 4, 10):
        yield Case("doa", f"search, {C} in-painting{'s' * (C > 1)}, B={B}, 20x20, stride 5", (1 + 1 + C) * one, {
            "op": lambda C=C: doa(images, grad, 20, 5, C),
            "NumPy loop": lambda C=C: doa_loop(images, grad, 20, 5, C),
            "NumPy loop, masks as images": lambda C=C: doa_loop(images, grad, 20, 5, C, windows),
        }, 1e-5)  # fmt: skip
    yield Case("window_energy", f"B={B}, 20x20, stride 5", one, {
        "op": lambda: window_energy(grad, 20, 20, 5),
        "average pooling": lambda: pooled(grad, 20, 5),
    }, 1e-3)  # fmt: skip
    alphas, full = torch.full((B,), 16 / 255), box_mask(boxes, 64, 64)
    yield Case("masked_step", f"B={B}", int(2.1 * one), {
        "op": lambda: masked_step(images, grad, alphas, boxes),
        "whole images": lambda: torch.where(full, (images + 16 / 255 * grad.sign()).clamp(0, 1), images),
    })  # fmt: skip
    patch, places = torch.rand(1, 1, 3, 10, 10), positions(64, 64, 10, 10, 27)
    yield Case("place_patches", f"B={B}, 10x10, P={len(places)}", (1 + len(places)) * one, {
        "op": lambda: place_patches(images, patch, places),
        "slices": lambda: place_loop(images, patch, places),
    })  # fmt: skip
    pixels = (images * 255).byte()
    yield Case("augment", f"B={B}, uint8", one // 4 + one, {
        "op": lambda: augment(pixels, flips=flips, shifts=shifts, boxes=boxes, noise=noise)[0],
        "per-image loop": lambda: augment_loop(pixels, *moves),
    })  # fmt: skip
    yield from kornia_cases(images)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(max(B // 4, 1), 64, 32, 32, generator=generator).contiguous(memory_format=layout)
        scale, offset = torch.rand(2, *x.shape[:2], generator=generator)
        yield Case("adain", f"{tuple(x.shape)} {str(layout)[6:]}, both ways", 5 * x.nbytes, {
            "op": lambda x=x, s=scale, o=offset: both_ways(adain, x, s, o),
            "eager": lambda x=x, s=scale, o=offset: both_ways(adain_plain, x, s, o),
        }, 1e-2)  # fmt: skip
    yield from update_cases(images, grad, {"op": attack_update, "full-size autograd and Adam": None})
    yield from patch_local_cases(max(B // 4, 1))
    yield from pgd_cases(max(B // 4, 1))
    yield from step_cases(max(B // 4, 2))


# --------------------------------------------------------------------------------------------------------------------- the loops
class Plain(torch.nn.Module):
    """The same F as a user would write it: weights with gradients, memory contiguous as PyTorch makes it."""

    def __init__(self, embed: embedding.Embedding) -> None:
        super().__init__()
        self.inner = copy.deepcopy(embed).to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner.head(self.inner.trunk((images - 0.5) * 4))


def art_pgd(model: torch.nn.Module, loss: Callable, images: Tensor, masks: Tensor, steps: int, alpha: float) -> Tensor:
    """ProjectedGradientDescent(mask=) of ART 1.20: NumPy on the host, loss.backward() with weight gradients, whole images projected."""
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


def torchattacks_pgd(model: torch.nn.Module, loss: Callable, images: Tensor, masks: Tensor, steps: int, alpha: float) -> Tensor:
    """PGD of torchattacks 3.5, with the mask that it does not have."""
    x = images.clone().detach()
    for _ in range(steps):
        x.requires_grad = True
        (grad,) = torch.autograd.grad(loss(model(x)), x)
        x = x.detach() + alpha * grad.sign() * masks
        x = torch.clamp(images + torch.clamp(x - images, -1, 1), 0, 1).detach()
    return x


def installed_art(plain: Plain, anchors: Tensor, images: Tensor, masks: Tensor, steps: int, alpha: float) -> Callable | None:
    if not importlib.util.find_spec("art"):
        return None
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    classifier = PyTorchClassifier(plain, loss, images.shape[1:], anchors.shape[1], clip_values=(0, 1), device_type="cpu")
    classifier.reduce_labels = lambda y: y  # features stand where ART expects labels
    classifier._reduce_labels = False
    attack = ProjectedGradientDescent(classifier, eps=1.0, eps_step=alpha, max_iter=steps, batch_size=len(images), verbose=False)
    return lambda: torch.from_numpy(attack.generate(images.numpy(), y=anchors.numpy(), mask=masks.numpy().astype(np.float32)))


def installed_torchattacks(plain: Plain, anchors: Tensor, images: Tensor, steps: int, alpha: float) -> Callable | None:
    """Without a mask, which it does not have: its images may be anything, so it is timed beside, not compared."""
    if not importlib.util.find_spec("torchattacks"):
        return None
    import torchattacks

    attack = torchattacks.PGD(plain, eps=1.0, alpha=alpha, steps=steps, random_start=False)
    return lambda: attack(images, torch.arange(len(images)) % anchors.shape[1])


def kornia_cases(images: Tensor) -> Iterator[Case]:
    """Beside kornia's own augmentations, which draw their own moves, shift by bilinear resampling and erase to one grey: timed, not compared."""
    if not importlib.util.find_spec("kornia"):
        return
    from kornia import augmentation as K

    B = len(images)
    inside = lambda x: (x := x[0] if isinstance(x, tuple) else x).shape == images.shape and bool((x >= 0).all() and (x <= 1).all())
    erase = K.RandomErasing(scale=(0.02, 0.2), ratio=(0.5, 2.0), value=0.5, p=0.5)
    moves = torch.nn.Sequential(K.RandomHorizontalFlip(p=0.5), K.RandomAffine(0, translate=(5 / 64, 5 / 64), padding_mode="border", p=1.0), erase)
    yield Case("gaussian_cutout", f"B={B}, own draws", 2 * images.nbytes, {"op": lambda: gaussian_cutout(images), "kornia RandomErasing": lambda: erase(images)}, check=inside)  # fmt: skip

    def ours() -> Tensor:
        flips, shifts = draw_moves(B)
        return augment(images, flips=flips, shifts=shifts, boxes=draw_boxes(B, 64, 64))[0]

    yield Case("augment", f"B={B}, own draws", 2 * images.nbytes, {"op": ours, "kornia flip, affine, erasing": lambda: moves(images)}, check=inside)


def pgd_cases(B: int) -> Iterator[Case]:
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, standardise=True)
    plain, steps, alpha = Plain(embed), 10, 16 / 255
    images, other = torch.rand(2, B, 3, 64, 64)
    with torch.no_grad():
        anchors = embed(other)
    for size in (10, 20):
        boxes = torch.tensor([[20, 24, size, size]]).repeat(B, 1)
        masks, sign = box_mask(boxes, 64, 64), torch.ones(B)

        def loss(features: Tensor) -> Tensor:
            return (features - anchors).square().sum()

        def reached(images: Tensor) -> Tensor:
            """What is compared: the mean distance, since a sign of a gradient near zero may fall either way, and then leads elsewhere."""
            with torch.no_grad():
                return (embed(images) - anchors).square().sum(1).sqrt().mean()

        runs = {
            "op": lambda boxes=boxes, sign=sign: embedding.inner_attack(embed, images, anchors, sign, boxes, steps, alpha),
            "loop as in ART": lambda masks=masks: art_pgd(plain, loss, images, masks, steps, alpha),
            "loop as in torchattacks": lambda masks=masks: torchattacks_pgd(plain, loss, images, masks, steps, alpha),
            "ART": installed_art(plain, anchors, images, masks, steps, alpha),
        }
        variants = {k: lambda f=f: reached(f()) for k, f in runs.items() if f}
        yield Case("pgd", f"B={B}, {size}x{size}, {steps} steps", 0, variants, 0.02)
    if whole := installed_torchattacks(plain, anchors, images, steps, alpha):
        boxes = torch.tensor([[0, 0, 64, 64]]).repeat(B, 1)
        ours = lambda: embedding.inner_attack(embed, images, anchors, sign, boxes, steps, alpha)
        inside = lambda x: x.shape == images.shape and bool((x >= 0).all() and (x <= 1).all())
        yield Case("pgd", f"B={B}, whole images, {steps} steps", 0, {"op": ours, "torchattacks, its own loss": whole}, check=inside)


def patch_local_cases(B: int) -> Iterator[Case]:
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, standardise=True).requires_grad_(False)
    images, other = torch.rand(2, B, 3, 64, 64)
    with torch.no_grad():
        anchors = embed(other)
    for size in (10, 20):
        boxes, top, left = torch.tensor([[20, 24, size, size]]).repeat(B, 1), 20, 24
        inside = (..., slice(top, top + size), slice(left, left + size))
        local, patch = embedding.PatchLocal(embed, images, boxes), images[inside].contiguous()

        def near(local=local, patch=patch) -> tuple[Tensor, Tensor]:
            leaf = patch.clone().requires_grad_()
            distance = (local(leaf) - anchors).square().sum(1)
            (grad,) = torch.autograd.grad(distance.sum(), leaf)
            return distance.detach(), grad / grad.abs().max()

        def full(inside=inside) -> tuple[Tensor, Tensor]:
            leaf = images.clone().requires_grad_()
            distance = (embed(leaf) - anchors).square().sum(1)
            (grad,) = torch.autograd.grad(distance.sum(), leaf)
            return distance.detach(), grad[inside] / grad[inside].abs().max()

        def all_of_it(local=None, boxes=boxes, near=near, patch=patch) -> tuple[Tensor, Tensor]:
            local = embedding.PatchLocal(embed, images, boxes)
            return [near(local, patch) for _ in range(10)][-1]

        name = f"B={B}, {size}x{size}, {local.layers} of 18 layers"
        yield Case("patch_local", f"{name}, one step", 0, {"op": near, "full pass": full}, 1e-4, 0.05)
        ten = {"op": all_of_it, "full pass": lambda full=full: [full() for _ in range(10)][-1]}
        yield Case("patch_local", f"{name}, 10 steps and cache", 0, ten, 1e-4, 0.05)


def plain_step(config: embedding.Config, model: Plain, adam: torch.optim.Optimizer, sampler, make, rng, cached: bool) -> Tensor:
    """A step of "ours" whose inner attack has weight gradients, NumPy on the host, and x and t one after the other; not `cached`:
    the anchors run again in every step, as in the released code."""
    batch = embedding.make_batch(config, model, sampler, make, rng)
    found = []
    for side, anchor, sign in (("x", "y", 1.0), ("t", "u", -1.0)):
        erased = batch[side + "_boxes"][:, 2] > 0
        mask = box_mask(batch[side + "_boxes"][erased], 64, 64).numpy()
        x, constants, features = batch[side][erased].numpy(), batch[anchor][erased], batch["anchor_" + side][erased]
        for _ in range(config.attack_steps):
            leaf = torch.from_numpy(x).requires_grad_()
            model.zero_grad()
            (model(leaf) - (features if cached else model(constants))).square().sum().backward()
            x = np.where(mask, np.clip(x + sign * config.attack_alpha / 255 * np.sign(leaf.grad.numpy()), 0, 1), x).astype(np.float32)
        found.append(batch[side].index_put((erased,), torch.from_numpy(x)))
    fx, fy, ft, fu = (model(v.contiguous()) for v in (found[0], batch["y"], found[1], batch["u"]))
    loss = embedding.two_pair_loss(fx, fy, ft, fu, config.margin, config.hinge)
    adam.zero_grad()
    loss.backward()
    adam.step()
    return torch.stack([loss.detach(), *((a - b).detach().square().sum(1).sqrt().mean() for a, b in ((fx, fy), (ft, fu)))])


def plain_maker(generator: lord.Lord, images: Tensor) -> embedding.Make:
    """y and u as the released code makes them: the class codes are known, E_co and G run in every step, layer by layer."""
    inner, (classes, _) = copy.deepcopy(generator).to(memory_format=torch.contiguous_format), lord.encode(generator, images)

    def make(identity: Tensor, content: Tensor, _: Tensor) -> Tensor:
        g, z, x = inner.generator, classes[identity], inner.content_encoder(images[content].float() / 255)
        for layer in g.dense:
            x = F.leaky_relu(layer(x), 0.2)
        x = x.view(-1, g.start, 4, 4)
        for conv, modulation in zip(g.blocks, g.modulation):
            scale, offset = modulation(z).chunk(2, 1)
            x = adain_plain(conv(F.interpolate(x, scale_factor=2.0)), 1 + scale, offset)
        return torch.sigmoid(g.conv7(F.leaky_relu(g.conv5(x), 0.2)))

    return make


def step_cases(B: int) -> Iterator[Case]:
    """Rate 0, the same random numbers: every run repeats the first."""
    config = embedding.Config(width=0.25, batch=B, standardise=True, hinge="distance")
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, config.dim, True)
    images, person = torch.randint(0, 256, (8 * 8, 3, 64, 64), dtype=torch.uint8), torch.arange(8).repeat_interleave(8)
    sampler = embedding.Sampler(images, person)
    generator = lord.Lord(lord.Config(**{**lord.PRESETS["demo"], "preset": "demo"})).eval().requires_grad_(False)
    make, rng = embedding.maker(config, generator, images, person), torch.Generator()

    adam = torch.optim.Adam(embed.parameters(), lr=0.0)

    def ours() -> Tensor:
        found = embedding.train_step(config, embed, adam, sampler, make, rng.manual_seed(1))
        return torch.tensor([found[k] for k in ("loss", "d_positive", "d_negative")])

    def theirs(cached: bool, make=make) -> Callable:
        model = Plain(embed)
        adam = torch.optim.Adam(model.parameters(), lr=0.0)
        return lambda: plain_step(config, model, adam, sampler, make, rng.manual_seed(1), cached)

    variants = {"op": ours, "anchors cached": theirs(True), "as in the released code": theirs(False)}
    variants["as in the released code, G too"] = theirs(False, plain_maker(generator, images))
    yield Case("step", f"ours, B={B} quadruplets, {config.attack_steps} inner steps", 0, variants, 0.02)


def update_cases(images: Tensor, grad: Tensor, updates: dict) -> Iterator[Case]:
    """The attack's update under a mask of 107 pixels, the share of the eyeglasses; None: what autograd and torch's Adam do."""
    B, device = len(images), images.device
    index = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:107].to(device)
    mask = torch.zeros(4096, device=device).index_fill_(0, index, 1).reshape(64, 64)
    w = to_tanh(images)
    compact = w.flatten(2)[:, :, index].contiguous()

    def fused(update, rate=0.0):
        state = [images.clone(), images.flip(-1), compact.clone(), *(torch.zeros_like(compact) for _ in range(3))]
        x, mirrored, under, *adam = state

        def run(step=1):
            update(x, mirrored, grad, grad, under, *adam, index, step, rate)  # rate 0: every run repeats the first
            return x

        return run

    def plain(rate=0.0):
        delta = torch.zeros_like(images, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=rate)

        def run(_=1):
            x, mirrored = tanh_perturb_ref(w, delta, mask)
            adam.zero_grad()
            torch.autograd.backward([x, mirrored], [grad, grad])
            adam.step()
            return x.detach()

        return run

    def compared(update):
        """The images after three updates that move: the plain loop's fourth pass shows what its third made."""
        run = plain(0.1) if update is None else fused(update, 0.1)
        return [run(n + 1).clone() for n in range(3 + (update is None))][-1]

    variants = {name: plain() if update is None else fused(update) for name, update in updates.items()}
    same = {name: lambda update=update: compared(update) for name, update in updates.items()}
    yield Case("attack_update", f"B={B}, 107 pixels", 11 * compact.nbytes, variants, 1e-5, compared=same)


def gpu_cases(B: int) -> Iterator[Case]:
    """Tensors well beyond the L2 cache: B defaults to 4096 images of 64x64, 0.2 GB in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    boxes = draw_boxes(B, 64, 64, generator=generator, device="cuda")
    flips, shifts = draw_moves(B, generator=generator, device="cuda")
    places = positions(64, 64, 20, 20, 5, "cuda")[:10]
    patch, mask = torch.rand(1, 1, 3, 20, 20, device="cuda"), torch.rand(64, 64, device="cuda") < 0.03
    share = (boxes[:, 2] * boxes[:, 3]).float().mean().item() / 4096
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, grad, noise = (
                torch.rand(B, 3, 64, 64, generator=generator, device="cuda").to(dtype).contiguous(memory_format=layout)
                for _ in range(3)
            )
            grad, one, name = grad - 0.5, x.nbytes, f"B={B} {str(dtype)[6:]} {str(layout)[6:]}"
            eps = 1e-6 if dtype is torch.float32 else 2**-7

            def three(op, ref, *arguments, **named):
                compiled = torch.compile(ref, dynamic=False)
                functions = {"op": op, "reference": ref, "compiled reference": compiled}
                return {k: lambda f=f: f(*arguments, **named) for k, f in functions.items()}

            yield Case(
                "masked_step", name, int((2 + share) * one), three(masked_step, masked_step_ref, x, grad, 0.1, boxes)
            )
            cut = three(gaussian_cutout, gaussian_cutout_ref, x, boxes=boxes, noise=noise)
            yield Case("gaussian_cutout", name, 2 * one, cut)
            small = x[: B // 8]
            paste = three(place_patches, place_patches_ref, small, patch.to(dtype), places)
            yield Case("place_patches", f"{name}, P=10", (1 + 10) * small.nbytes, paste)
            yield Case("window_energy", name, one, three(window_energy, window_energy_ref, grad, 20, 20, 5), 1e-2)
            squash = three(tanh_perturb, tanh_perturb_ref, to_tanh(x).to(dtype), grad, mask)
            yield Case("tanh_perturb", name, 4 * one, squash, eps)
            given = {"flips": flips, "shifts": shifts, "boxes": boxes, "noise": noise, "dtype": dtype, "layout": layout}
            pixels = (x * 255).byte()
            move = three(augment, augment_ref, pixels, **given)
            yield Case("augment", f"{name} from uint8", pixels.nbytes + one, move, eps)
            planes = (
                torch.randn(64, 256, 64, 64, generator=generator, device="cuda")
                .to(dtype)
                .contiguous(memory_format=layout)
            )
            scale, offset = torch.rand(2, 64, 256, generator=generator, device="cuda")
            functions = {
                "op": adain,
                "reference": adain_ref,
                "compiled reference": torch.compile(adain_ref, dynamic=False),
            }
            ways = {k: lambda f=f, p=planes, s=scale, o=offset: f(p, s, o) for k, f in functions.items()}
            yield Case(
                "adain", f"(64, 256, 64, 64) {name.split(' ', 1)[1]} forward", 2 * planes.nbytes, ways, max(eps, 1e-4)
            )
            ways = {k: lambda f=f, p=planes, s=scale, o=offset: both_ways(f, p, s, o) for k, f in functions.items()}
            yield Case("adain", f"(64, 256, 64, 64) {name.split(' ', 1)[1]} both ways", 5 * planes.nbytes, ways, 0.05)
    yield from update_cases(
        x.float(), grad.float(), {"op": attack_update, "reference": attack_update_ref, "eager": None}
    )


# --------------------------------------------------------------------------------------------------------------------- measuring
def agrees(case: Case) -> list[str]:
    """Variants whose output is wrong: differs from the op's beyond the tolerance (relative beyond 1), or fails the case's check."""
    outputs = {k: f() for k, f in (case.compared or case.variants).items()}
    if case.check:
        return [k for k, out in outputs.items() if not case.check(out)]
    first, *_ = outputs.values()
    first = first if isinstance(first, tuple) else (first,)
    wrong = []
    for k, out in outputs.items():
        for a, b in zip(first, out if isinstance(out, tuple) else (out,), strict=True):
            a, b = a.double(), b.double()
            if not (a.isfinite().all() and b.isfinite().all()) or a.shape != b.shape or ((a - b).abs() > case.tolerance * b.abs().clamp(min=1)).double().mean() > case.ties:
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


def measure(case: Case, rounds: int, cuda: bool) -> dict[str, tuple[float, float, float, float]]:
    """median, 10th and 90th percentile in seconds, and the ratio to the op, of each variant; one untimed round first."""
    times = {k: [] for k in case.variants}
    for n in range(rounds + 1):
        for k, function in case.variants.items():
            t = seconds(function, cuda)
            if n:
                times[k].append(t)
    own, *_ = times.values()
    return {
        k: (*np.percentile(ts, (50, 10, 90)).tolist(), statistics.median(t / o for t, o in zip(ts, own)))
        for k, ts in times.items()
    }


def copy_bandwidth(cuda: bool) -> float:
    """GB/s read and written by a copy: 1 GiB on a GPU, 64 MiB on a CPU; median of 7."""
    source = torch.ones((1 << 30 if cuda else 1 << 26) // 4, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), cuda) for _ in range(8)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="*", help="only these")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, at least 5")
    parser.add_argument("--batch", type=int, help="images; default 128 on a CPU, 4096 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; more than one: wall time")
    parser.add_argument("--out", type=Path, default=Path("results/bench.csv"))
    a = parser.parse_args(argv)
    if a.rounds < 5:
        parser.error("--rounds must be at least 5")
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(a.threads)
    cuda = torch.cuda.is_available()
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../*.py", "../kernels", "../data", "."], check=False, capture_output=True, text=True
    ).stdout
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    shared = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "n": a.rounds,
        "copy_gb_s": f"{copy_bandwidth(cuda):.1f}",
        "torch": torch.__version__,
        "triton": triton or "",
        "threads": torch.get_num_threads(),
        "commit": commit.strip() + ("-changed" if changed else ""),
    }
    print(" ".join(f"{k}={v}" for k, v in shared.items()))
    cases = gpu_cases(a.batch or 4096) if cuda else cpu_cases(a.batch or 128)
    failed = False
    for case in cases:
        if a.ops and case.op not in a.ops:
            continue
        wrong = agrees(case)
        if wrong:
            print(f"{case.op} {case.name}: not timed, output differs: {', '.join(wrong)}", file=sys.stderr)
            failed = True
            continue
        rows = []
        for variant, (median, low, high, ratio) in measure(case, a.rounds, cuda).items():
            gb_s = case.bytes / median / 1e9
            numbers = {
                "median_ms": median * 1e3,
                "p10_ms": low * 1e3,
                "p90_ms": high * 1e3,
                "ratio": ratio,
                "gb_s": gb_s,
            }
            numbers = {k: f"{v:.4g}" for k, v in numbers.items()}
            rows.append(shared | {"op": case.op, "case": case.name, "variant": variant} | numbers)
            print(f"{case.op:16} {case.name:48} {variant:28}", *(f"{k} {v:8}" for k, v in numbers.items()), flush=True)
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
