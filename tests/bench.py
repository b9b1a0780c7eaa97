"""Times every op of kernels/ and the loops around the model.

    python -m tests.bench [--ops adain ...] [--rounds 7] [--batch 128] [--out results/bench.csv]

On a CPU, where an op is its reference: against what a user would write instead, in CPU time with
one thread (the default), to which other load does not add. The loops there, with F at a quarter of
VGG16's channels: `pgd`, ten masked sign steps; `step`, a whole training step of "ours";
`patch_local`, recomputation against the full pass. On a GPU: the kernel against its reference and
torch.compile of it, GB/s beside those of a copy, and a full-width step of every method.

One process, variants interleaved, median of the rounds with 10th and 90th percentile; `ratio` is
the median over rounds of this variant's time by the op's in the same round. An op whose output
differs from the others' is not timed, and the exit status is 1. Rows are appended.
"""

import argparse
import copy
import csv
import dataclasses
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import embed as embedding
import generator as lord
import kernels
from data import run
from kernels.adain import adain, adain_ref
from kernels.augment import augment, augment_ref
from kernels.gaussian_cutout import gaussian_cutout, gaussian_cutout_ref
from kernels.masked_step import box_mask, masked_step, masked_step_ref
from kernels.patch_local import PatchLocal
from kernels.place_patches import painted, place_patches, place_patches_ref, positions
from kernels.tanh_perturb import tanh_perturb, tanh_perturb_ref
from kernels.window_energy import window_energy, window_energy_ref

COLUMNS = ["date", "op", "case", "variant", "device", "n", "median_ms", "p10_ms", "p90_ms"]
COLUMNS += ["ratio", "gb_s", "copy_gb_s", "torch", "triton", "threads", "commit"]
AREA, ASPECT = embedding.Config.cutout_area, embedding.Config.cutout_aspect
LAYOUTS = (torch.contiguous_format, torch.channels_last)
METHODS = ("ours", "transfer", "mixed", "no-at", "weak-at", "doa")


@dataclass
class Case:
    op: str
    name: str
    bytes: int  # least traffic: what must be read and written once
    variants: dict[str, Callable]  # the op first; each returns a tensor or a tuple
    tolerance: float = 0.0
    ties: float = 0.0  # share of the values that may differ: a ReLU, a pool or a sign at a tie
    check: Callable | None = None  # instead of comparing outputs, where they are random


def draw_boxes(B: int, rng: torch.Generator) -> Tensor:
    return embedding.draw_boxes(B, 64, 64, 0.5, AREA, ASPECT, rng)


# What a user would write instead, on a CPU


def cutout_loop(images: Tensor, whole: bool = False, masks: bool = False) -> tuple[Tensor, ...]:
    """Erasing one image at a time in NumPy; whole: noise for all of the image. masks: in float64,
    and with an image of ones and zeros that says where it erased, as in the released code."""
    (_, C, H, W), boxes = images.shape, np.zeros((len(images), 4), int)
    out = images.numpy().astype(np.float64 if masks else np.float32)
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
    result = torch.from_numpy(out).float(), torch.from_numpy(boxes)
    return result if erased is None else (*result, torch.from_numpy(erased))


def doa_loop(
    images: Tensor, grad: Tensor, size: int, stride: int, candidates: int, masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """DOA's search one image and one place at a time, as the public codes do: sums, sorting,
    in-painting. masks (P, C, H, W): every window as an image of ones and zeros, as in the released
    code; else slices."""
    squares, pixels = grad.numpy() ** 2, images.numpy()
    places = positions(*images.shape[2:], size, size, stride).numpy()
    best, grey = [], []
    for b in range(len(images)):
        if masks is not None:
            energy = (squares[b] * masks.numpy()).sum((1, 2, 3))
            order = np.argsort(energy)[::-1][:candidates].copy()
            inside = masks.numpy()[order]
            grey.extend(pixels[b] * (1 - inside) + 0.5 * inside)
        else:
            energy = [squares[b, :, t : t + size, c : c + size].sum() for t, c in places]
            order = np.argsort(energy)[::-1][:candidates]
            for t, c in places[order]:
                grey.append(pixels[b].copy())
                grey[-1][:, t : t + size, c : c + size] = 0.5
        best.append(places[order])
    tried = torch.from_numpy(np.stack(grey)).unflatten(0, (len(images), candidates))
    # F's part: every in-painting is read once
    return torch.from_numpy(np.stack(best)), tried.mean((2, 3, 4))


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


def both_ways(function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, y.detach())


# The ops on a CPU


def cpu_cases(B: int) -> Iterator[Case]:
    """The ops get channels_last, the layout of training, the loops the usual one."""
    rng = torch.Generator().manual_seed(0)
    images, grad, noise = torch.rand(3, B, 3, 64, 64, generator=rng)
    grad = grad - 0.5
    yield from patch_cases(B, images, grad)
    flips, shifts = embedding.draw_moves(B, 5, rng)
    moves = {"flips": flips, "shifts": shifts, "boxes": draw_boxes(B, rng), "noise": noise}
    pixels, one = (images * 255).byte(), images.nbytes
    variants = {
        "op": lambda: augment(pixels, **moves)[0],
        "per-image loop": lambda: augment_loop(pixels, **moves),
    }
    yield Case("augment", f"B={B}, uint8", one // 4 + one, variants)
    for layout in LAYOUTS:
        x = torch.randn(max(B // 4, 1), 64, 32, 32, generator=rng).contiguous(memory_format=layout)
        leaves = (x, *torch.rand(2, *x.shape[:2], generator=rng))
        variants = {
            "op": partial(both_ways, adain, *leaves),
            "eager": partial(both_ways, adain_plain, *leaves),
        }
        name = f"{tuple(x.shape)} {str(layout)[6:]}, both ways"
        yield Case("adain", name, 5 * x.nbytes, variants, 1e-2)
    yield from patch_local_cases(max(B // 4, 1))
    yield from pgd_cases(max(B // 4, 1))
    for precision in dict.fromkeys(("float32", run.resolve_precision("auto", torch.device("cpu")))):
        yield step_case(max(B // 4, 2), precision)


def patch_cases(B: int, images: Tensor, grad: Tensor) -> Iterator[Case]:
    """What changes a rectangle of each image: cutout, DOA's search, the masked step, patches."""
    rng, one = torch.Generator().manual_seed(1), images.nbytes
    x, g = (v.contiguous(memory_format=torch.channels_last) for v in (images, grad))

    def erases(result: tuple) -> bool:
        out, boxes = result[:2]
        inside, share = box_mask(boxes, 64, 64).flatten(1), (boxes[:, 2] > 0).float().mean()
        changed = (out != images).any(1).flatten(1)
        noise = out.flatten(2).transpose(1, 2)[inside]
        moments = abs(noise.mean() - 0.5) < 0.02 and abs(noise.std() - 0.24) < 0.02
        in_range = bool((out >= 0).all() and (out <= 1).all())
        return torch.equal(changed, inside) and 0.3 < share < 0.7 and in_range and bool(moments)

    variants = {
        "op": lambda: gaussian_cutout(x, boxes=draw_boxes(B, rng)),
        "NumPy loop, noise inside": lambda: cutout_loop(images),
        "NumPy loop, masks as images": lambda: cutout_loop(images, masks=True),
        "NumPy loop, whole noise": lambda: cutout_loop(images, whole=True),
    }
    yield Case("gaussian_cutout", f"B={B}", 2 * one, variants, check=erases)
    places = positions(64, 64, 20, 20, 5)
    windows = torch.cat([places, torch.full_like(places, 20)], 1)
    windows = box_mask(windows, 64, 64).float().repeat(1, 3, 1, 1)
    for C in (1, 4, 10):
        variants = {
            "op": partial(doa, x, g, 20, 5, C),
            "NumPy loop": partial(doa_loop, images, grad, 20, 5, C, None),
            "NumPy loop, masks as images": partial(doa_loop, images, grad, 20, 5, C, windows),
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


def pgd_cases(B: int) -> Iterator[Case]:
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, standardise=True)
    plain, steps, alpha = Plain(embed), 10, 16 / 255
    images, other = torch.rand(2, B, 3, 64, 64)
    with torch.no_grad():
        anchors = embed(other)

    def loss(features: Tensor) -> Tensor:
        return (features - anchors).square().sum()

    @torch.no_grad()
    def reached(attack: Callable, *inputs) -> Tensor:
        """What is compared: the mean distance, since a sign of a gradient near zero may fall either
        way, and then leads elsewhere."""
        with torch.enable_grad():
            attacked = attack(*inputs)
        return (embed(attacked) - anchors).square().sum(1).sqrt().mean()

    for size in (10, 20):
        boxes, away = torch.tensor([[20, 24, size, size]]).repeat(B, 1), torch.full((B,), alpha)
        loop = (plain, loss, images, box_mask(boxes, 64, 64), steps, alpha)
        ours = (embedding.inner_attack, embed, images, anchors, away, boxes, steps)
        variants = {
            "op": partial(reached, *ours),
            "loop as in ART": partial(reached, art_pgd, *loop),
            "loop as in torchattacks": partial(reached, torchattacks_pgd, *loop),
        }
        yield Case("pgd", f"B={B}, {size}x{size}, {steps} steps", 0, variants, 0.02)


def patch_local_cases(B: int) -> Iterator[Case]:
    torch.manual_seed(0)
    embed = embedding.Embedding(0.25, standardise=True).requires_grad_(False)
    images, other = torch.rand(2, B, 3, 64, 64)
    with torch.no_grad():
        anchors = embed(other)

    def gradient(features: Callable, leaf: Tensor, inside: tuple) -> tuple[Tensor, Tensor]:
        leaf = leaf.clone().requires_grad_()
        distance = (features(leaf) - anchors).square().sum(1)
        (grad,) = torch.autograd.grad(distance.sum(), leaf)
        return distance.detach(), grad[inside] / grad[inside].abs().max()

    def ten(prepare: Callable, *rest) -> tuple[Tensor, Tensor]:
        features = prepare()
        return [gradient(features, *rest) for _ in range(10)][-1]

    for size in (10, 20):
        boxes = torch.tensor([[20, 24, size, size]]).repeat(B, 1)
        inside = (..., slice(20, 20 + size), slice(24, 24 + size))
        local, patch = PatchLocal(embed, images, boxes), images[inside].contiguous()
        name = f"B={B}, {size}x{size}, {local.layers} of 18 layers"
        variants = {
            "op": partial(gradient, local, patch, (...,)),
            "full pass": partial(gradient, embed, images, inside),
        }
        yield Case("patch_local", f"{name}, one step", 0, variants, 1e-4, 0.05)
        variants = {
            "op": partial(ten, partial(PatchLocal, embed, images, boxes), patch, (...,)),
            "full pass": partial(ten, lambda: embed, images, inside),
        }
        yield Case("patch_local", f"{name}, 10 steps and cache", 0, variants, 1e-4, 0.05)


def plain_step(
    config: embedding.Config,
    model: Plain,
    adam: torch.optim.Optimizer,
    sampler: embedding.Sampler,
    G: Callable,
    rng: torch.Generator,
    cached: bool,
) -> Tensor:
    """A step of "ours" whose inner attack has weight gradients, NumPy on the host, and x and t one
    after the other; not `cached`: the anchors run again in every step, as in the released code."""
    q = embedding.generated_quadruplets(config, model, sampler, G, rng)
    attacked, alpha = [], config.attack_alpha / 255
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
        attacked.append(images.index_put((erased,), torch.from_numpy(x)))
    fx, fy, ft, fu = (model(v.contiguous()) for v in (attacked[0], q.y, attacked[1], q.u))
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

    def make(identity: Tensor, content: Tensor) -> Tensor:
        g, z = inner.generator, classes[identity]
        x = inner.content_encoder(images[content].float() / 255)
        for layer in g.dense:
            x = F.leaky_relu(layer(x), 0.2)
        x = x.view(-1, g.start, 4, 4)
        for conv, modulation in zip(g.blocks, g.modulation):
            scale, offset = modulation(z).chunk(2, 1)
            x = adain_plain(conv(F.interpolate(x, scale_factor=2.0)), 1 + scale, offset)
        return torch.sigmoid(g.conv7(F.leaky_relu(g.conv5(x), 0.2)))

    return make


def step_case(
    B: int, precision: str, width: float = 0.25, method: str = "ours", device: str = "cpu"
) -> Case:
    """Rate 0, the same random numbers: every run repeats the first. The others in float32, on a
    CPU alone."""
    config = embedding.Config(
        method=method, width=width, batch=B, standardise=True, precision=precision
    )
    torch.manual_seed(0)
    embed = embedding.Embedding(width, config.dim, True).to(device)
    images = torch.randint(0, 256, (8 * 8, 3, 64, 64), dtype=torch.uint8).to(device)
    sampler = embedding.Sampler(images, torch.arange(8, device=device).repeat_interleave(8))
    generator = lord.Lord(lord.Config(**{**lord.PRESETS["demo"], "preset": "demo"})).to(device)
    generator = generator.eval().requires_grad_(False)
    codes = lord.encode(generator, images)
    G = embedding.Generated(generator.generator, *codes, lord.decode(generator, *codes).half())
    adam, rng = torch.optim.Adam(embed.parameters(), lr=0.0), torch.Generator(device)

    def ours() -> Tensor:
        rng.manual_seed(1)
        alpha = config.attack_alpha
        values = embedding.train_step(config, embed, adam, sampler, G, rng, alpha)
        return torch.tensor([values[k] for k in ("loss", "d_positive", "d_negative")])

    def theirs(cached: bool, G: Callable) -> Callable:
        model, plain = Plain(embed), dataclasses.replace(config, precision="float32")
        adam = torch.optim.Adam(model.parameters(), lr=0.0)
        step = (plain, model, adam, sampler, G)
        return lambda: plain_step(*step, rng.manual_seed(1), cached)

    variants = {"op": ours}
    if device == "cpu":
        variants["anchors cached"] = theirs(True, G)
        variants["as in the released code"] = theirs(False, G)
        made = plain_maker(generator, images)
        variants["as in the released code, G too"] = theirs(False, made)
    name = f"{method}, B={B} quadruplets, {config.attack_steps} inner steps, {precision}"
    return Case("step", name, 0, variants, 0.02)


# The kernels on a GPU


def three(op: Callable, ref: Callable, *inputs, **named) -> dict[str, Callable]:
    compiled = torch.compile(ref, dynamic=False)
    functions = {"op": op, "reference": ref, "compiled reference": compiled}
    return {k: partial(f, *inputs, **named) for k, f in functions.items()}


def gpu_cases(B: int) -> Iterator[Case]:
    """Tensors well beyond the L2 cache: B defaults to 4096 images of 64x64, 0.2 GB in float32."""
    rng = torch.Generator("cuda").manual_seed(0)
    boxes, (flips, shifts) = draw_boxes(B, rng), embedding.draw_moves(B, 5, rng)
    alphas, share = boxes[:, 0] * 0 + 0.1, (boxes[:, 2] * boxes[:, 3]).float().mean().item() / 4096
    places = positions(64, 64, 20, 20, 5, "cuda")[:10]
    patch = torch.rand(1, 1, 3, 20, 20).cuda()
    kinds = [(d, m) for d in (torch.float32, torch.bfloat16) for m in LAYOUTS]
    for dtype, layout in kinds:

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
            w = torch.atanh((2 * x.float() - 1) * 0.999999).to(dtype).flatten(2)
            squash = three(tanh_perturb, tanh_perturb_ref, w, grad.flatten(2))
            yield Case("tanh_perturb", name, 3 * one, squash, eps)
        if dtype is torch.float32:
            moves = {"flips": flips, "shifts": shifts, "boxes": boxes, "noise": noise}
            pixels = (x * 255).byte()
            move = three(augment, augment_ref, pixels, **moves, layout=layout)
            yield Case("augment", f"{name} from uint8", pixels.nbytes + one, move, eps)
        planes, size = random(64, 256, 64, 64) - 0.5, "(64, 256, 64, 64)"
        leaves = (planes, *torch.rand(2, 64, 256, generator=rng, device="cuda"))
        ways = three(adain, adain_ref, *leaves)
        yield Case("adain", f"{size} {kind} forward", 2 * planes.nbytes, ways, max(eps, 1e-4))
        ways = {k: partial(both_ways, f.func, *leaves) for k, f in ways.items()}
        yield Case("adain", f"{size} {kind} both ways", 5 * planes.nbytes, ways, 0.05)
    for method in METHODS:
        for precision in ("float32", "bfloat16"):
            yield step_case(128, precision, 1.0, method, "cuda")


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
    ops, *_ = times.values()
    table = {}
    for k, ts in times.items():
        median, low, high = np.percentile(ts, (50, 10, 90)).tolist()
        numbers = {"median_ms": median * 1e3, "p10_ms": low * 1e3, "p90_ms": high * 1e3}
        numbers["ratio"] = statistics.median(t / op for t, op in zip(ts, ops))
        numbers["gb_s"] = case.bytes / median / 1e9
        table[k] = {name: f"{v:.4g}" for name, v in numbers.items()}
    return table


def copy_bandwidth(cuda: bool) -> float:
    """GB/s read and written by a copy: 1 GiB on a GPU, 64 MiB on a CPU; median of 7."""
    source = torch.ones((1 << 30 if cuda else 1 << 26) // 4, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), cuda) for _ in range(8)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def main(argv: Sequence[str] | None = None) -> int:
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
    shared = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "n": a.rounds,
        "copy_gb_s": f"{copy_bandwidth(cuda):.1f}",
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels.triton else "",
        "threads": torch.get_num_threads(),
        "commit": run.commit(),
    }
    print(" ".join(f"{k}={v}" for k, v in shared.items()))
    failed, new = False, not a.out.exists()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with a.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for case in gpu_cases(a.batch or 4096) if cuda else cpu_cases(a.batch or 128):
            if a.ops and case.op not in a.ops:
                continue
            if wrong := agrees(case):
                message = f"not timed, output differs: {', '.join(wrong)}"
                print(f"{case.op} {case.name}: {message}", file=sys.stderr)
                failed = True
                continue
            for k, numbers in measure(case, a.rounds, cuda).items():
                writer.writerow(shared | {"op": case.op, "case": case.name, "variant": k} | numbers)
                print(f"{case.op:16} {case.name:48} {k:28}", end=" ")
                print(*(f"{name} {v:8}" for name, v in numbers.items()), flush=True)
            file.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
