"""The disentangled generator G and its encoders E_cl, E_co: Sec. 2 and App. A (LORD, Gabbay and Hoshen 2020).

    python generator.py                                               # demo: rendered faces, two CPU cores
    python generator.py --preset paper --data celeba --root CELEBA    # the paper's sizes, one GPU
    python generator.py --preset demo --data folder --root PHOTOS     # your own folder, one sub-folder a person

In:  faces from `data/` (train persons only; validation and target persons are never seen by G, E_cl, E_co).
Out: runs/<data>-<preset>-<seed>/ with people.json (who is in which part), generator.pt (weights), generator.jsonl (log),
     generator.json (disentanglement report), quadruplets.png and .npz (x, y, t, u: Fig. 1, Fig. 9).

Stage 1 optimises one content code an image and one class code a person together with G (latent optimisation); stage 2
trains the encoders to reproduce those codes from the image. Images are float NCHW in [0, 1], 64 x 64.

Measured (demo, 3,600 rendered faces, two x86-64 cores, 63 minutes): on 840 images of 70 persons never seen y 22.3 dB, u 20.3 dB,
person from the content code 0.045 (chance 0.014). The preset paper has not been run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UsageError(ValueError):
    """Something the user can mend: one line that names the file or flag and says what to do."""


class NotFinite(FloatingPointError):
    """A loss or gradient that is not finite: what was found, and the indices (B,) of the batch's images among those trained on."""

    def __init__(self, told: str, index: Tensor) -> None:
        super().__init__(f"{told}; images {index.tolist()}")
        self.told, self.index = told, index


@dataclass(frozen=True)
class Config:
    """Every setting of the two stages; the defaults are the paper's, a preset replaces some of them."""

    preset: str = "paper"  # demo | paper; on the command line demo unless named
    data: str = "celeba"  # synthetic | folder | celeba
    root: str = ""  # where the photographs are
    crop: str = ""  # lfw | centre | celeba; empty: by image size
    seed: int = 0  # ours: of everything random in the training
    split_seed: int = 0  # ours: who is train, validation, target
    train_persons: int = 9177  # Sec. 4: of G; 0: all that are left
    validation_persons: int = 100  # Sec. 4: of F, not trained on
    target_persons: int = 30  # Sec. 4.2: 30 drawn
    synthetic_persons: int = 370  # ours: size of the rendered set
    synthetic_images: int = 12  # ours: images of each rendered person
    class_dim: int = 256  # App. A (LORD): class code, one a person
    content_dim: int = 128  # App. A (LORD): content code, one an image
    hidden: tuple[int, ...] = (512, 1024)  # LORD: 4*4*32 and 4*4*64
    channels: tuple[int, ...] = (256, 256, 256, 256)  # LORD: the four AdaIN blocks, 8x8 to 64x64
    out_channels: int = 64  # LORD: between the 5x5 and the 7x7 convolution
    encoder_channels: tuple[int, ...] = (64, 128, 256, 256, 256)  # LORD: of their five convolutions
    encoder_hidden: int = 256  # LORD: of their dense layers
    loss: str = "vgg"  # LORD: vgg, perceptual; ours: pyramid, Laplacian L1
    vgg_weights: str = ""  # a torchvision VGG16 file, or the word download
    noise: float = 1.0  # App. A: sigma, added to the content code in training
    content_penalty: float = 0.001  # App. A: lambda, on the sum over dimensions, mean over the batch
    batch: int = 64  # LORD: images
    epochs: int = 200  # Sec. 4: of stage 1
    rate: float = 3e-4  # LORD: Adam's, in stage 1
    rate_end: float = 1e-5  # LORD: cosine down to this
    code_rate: float = 10.0  # LORD: times the rate, for the codes
    encoder_epochs: int = 200  # LORD: of stage 2
    encoder_rate: float = 1e-4  # LORD: Adam's, in stage 2
    encoder_rate_end: float = 1e-4  # LORD: constant
    code_weight: float = 1e4  # LORD: weight of the two code errors (means over dimensions and batch)
    # with swap the content code is free of stage 1's, but noisy and penalised as there, so that it holds no more than it must
    swap: bool = False  # ours: in stage 2 the class code comes from another image of the person, so that it can hold no content
    encoder_penalty: float = 0.0  # ours: lambda of stage 2, with swap

    @property
    def run(self) -> Path:
        """Folder of this run."""
        return Path("runs") / f"{self.data}-{self.preset}-{self.seed}"


PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "demo": dict(
        data="synthetic", train_persons=0, validation_persons=40, target_persons=30, class_dim=96, content_dim=96,
        hidden=(192, 256), channels=(128, 96, 48, 16), out_channels=12, encoder_channels=(16, 32, 64, 96, 96),
        encoder_hidden=128, loss="pyramid", content_penalty=1e-5, rate=1.5e-3, rate_end=5e-5, code_rate=40.0,
        epochs=60, encoder_epochs=20, encoder_rate=1e-3, encoder_rate_end=2e-5, swap=True, encoder_penalty=5e-4, code_weight=0.1,
    ),
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


# ---------------------------------------------------------------------------------------------- networks (Sec. 2, App. A)
def adain_ref(x: Tensor, scale: Tensor, offset: Tensor, eps: float = 1e-5) -> Tensor:
    """Adaptive instance normalisation: x (B, C, H, W) to zero mean, unit variance, times scale, plus offset (B, C)."""
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps) * scale[:, :, None, None] + offset[:, :, None, None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (biased) and mean over H and W of x (B, C, H, W), each (B, C)."""
    if x.is_cuda:
        return torch.var_mean(x, (2, 3), correction=0)
    mean = x.mean((2, 3))
    return (x - mean[:, :, None, None]).square_().mean((2, 3)), mean  # a fifth of var_mean's time in channels_last


class AdaIN(torch.autograd.Function):
    """`adain_ref` with its gradient in closed form: both ways one affine map a channel, a third of autograd's passes."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, offset: Tensor, eps: float = 1e-5) -> Tensor:
        var, mean = moments(x)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        a = scale * rstd
        return torch.addcmul((offset - mean * a)[:, :, None, None], x, a[:, :, None, None])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, mean, rstd = ctx.saved_tensors
        n = x.shape[2] * x.shape[3]
        d_offset = grad.sum((2, 3))  # (B, C)
        d_scale = ((grad * x).sum((2, 3)) - mean * d_offset) * rstd
        a, b = scale * rstd, -scale * rstd.square() * d_scale / n
        c = -a * d_offset / n - b * mean
        d_x = torch.addcmul(c[:, :, None, None], x, b[:, :, None, None]).addcmul_(grad, a[:, :, None, None])
        return d_x, d_scale, d_offset, None


def leaky_adain(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """LeakyReLU(0.2) in place, then AdaIN: x (B, C, H, W), scale and offset (B, C)."""
    if fused_adain is not None and x.is_cuda:
        return fused_adain(x, scale, offset)
    return AdaIN.apply(F.leaky_relu(x, 0.2, inplace=True), scale, offset)


try:  # the same in one pass, as a Triton kernel on a GPU; on a CPU the closed form above is the faster one
    from kernels.adain import adain as fused_adain
except ImportError:
    fused_adain = None  # type: ignore[assignment]


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest upsampling x2, then a 3x3 convolution of padding 1, (B, C, H, W) -> (B, O, 2H, 2W), with 2.25 times fewer products.

    Repeated pixels let the taps that meet them be added beforehand: a 4x4 transposed convolution of stride 2 (ours, exact).
    """
    taps = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))  # (C, O, 5, 5)
    taps = taps[..., 1:] + taps[..., :-1]
    return F.conv_transpose2d(x, taps[..., 1:, :] + taps[..., :-1, :], bias, stride=2, padding=1)


class Generator(nn.Module):
    """G(z_cl, z_co): the content code makes a 4x4 map, the class code modulates every AdaIN layer. Output (B, 3, 64, 64)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, (h1, h2) = config.channels, config.hidden
        self.dense = nn.ModuleList(
            [nn.Linear(config.content_dim, h1), nn.Linear(h1, h2), nn.Linear(h2, 4 * 4 * c[0])]
        )
        self.blocks = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip((c[0], *c[:-1]), c))
        self.modulation = nn.ModuleList(nn.Linear(config.class_dim, 2 * o) for o in c)
        self.conv5 = nn.Conv2d(c[-1], config.out_channels, 5, padding=2)
        self.conv7 = nn.Conv2d(config.out_channels, 3, 7, padding=3)
        self.start = c[0]

    def forward(self, class_code: Tensor, content_code: Tensor) -> Tensor:
        x = content_code
        for layer in self.dense:
            x = F.leaky_relu(layer(x), 0.2, inplace=True)
        x = x.view(-1, self.start, 4, 4).contiguous(memory_format=torch.channels_last)
        for conv, modulation in zip(self.blocks, self.modulation):
            scale, offset = modulation(class_code).chunk(2, 1)
            x = leaky_adain(upsample_conv(x, conv.weight, conv.bias), 1 + scale, offset)
        return torch.sigmoid(self.conv7(F.leaky_relu(self.conv5(x), 0.2, inplace=True)))


class Encoder(nn.Module):
    """E_cl or E_co: one 7x7 convolution, four 4x4 of stride 2, three dense layers. (B, 3, 64, 64) -> (B, code)."""

    def __init__(self, config: Config, code: int) -> None:
        super().__init__()
        c, h = config.encoder_channels, config.encoder_hidden
        self.convs = nn.Sequential(
            nn.Conv2d(3, c[0], 7, padding=3), nn.LeakyReLU(0.2),
            *(m for i, o in pairwise(c) for m in (nn.Conv2d(i, o, 4, stride=2, padding=1), nn.LeakyReLU(0.2))),
        )  # fmt: skip
        self.dense = nn.Sequential(
            nn.Linear(c[-1] * 16, h), nn.LeakyReLU(0.2), nn.Linear(h, h), nn.LeakyReLU(0.2), nn.Linear(h, code)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.convs(x * 2 - 1).flatten(1))


class Lord(nn.Module):
    """G with its two encoders; forward is the autoencoder G(E_cl(x), E_co(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.generator = Generator(config)
        self.class_encoder = Encoder(config, config.class_dim)
        self.content_encoder = Encoder(config, config.content_dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(self.class_encoder(x), self.content_encoder(x))


def quadruplets(lord: Lord, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The generated half of the quadruplets (Sec. 2): y copies x, u is x's identity with t's content.

    x, t: (B, 3, 64, 64) in [0, 1], of different persons. Returns y, u of the same shape.
    """
    class_code = lord.class_encoder(x)
    y = lord.generator(class_code, lord.content_encoder(x))
    u = lord.generator(class_code, lord.content_encoder(t))
    return y, u


# ------------------------------------------------------------------------------------------------ reconstruction losses
def pyramid_loss(a: Tensor, b: Tensor) -> Tensor:
    """Laplacian pyramid L1: the mean absolute difference of every level, summed, down to 4x4. Needs no weights (ours)."""
    d = a - b  # the pyramid is linear: that of the difference is the difference of the two
    total = d.new_zeros(())
    while d.shape[-1] > 4:
        low = F.avg_pool2d(d, 2)
        total = total + (d - F.interpolate(low, scale_factor=2.0, mode="bilinear", align_corners=False)).abs().mean()
        d = low
    return total + d.abs().mean()


class VggLoss(nn.Module):
    """Mean absolute difference of VGG16 (ImageNet) features, conv1_2, conv2_2, conv3_2, conv4_2, conv5_2, equal weights.

    state: a torchvision VGG16 state dict ("features.0.weight", ...). Raises KeyError or RuntimeError if it is another's.
    """

    taps = (3, 8, 13, 20, 27)  # after the ReLU, as in Keras
    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512):
            if width:
                conv = nn.Conv2d(previous, width, 3, padding=1)
                index = len(layers)
                conv.load_state_dict({k: state[f"features.{index}.{k}"] for k in ("weight", "bias")})
                layers += [conv, nn.ReLU()]
                previous = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers).requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def features(self, x: Tensor) -> Iterator[Tensor]:
        x = (x - self.mean) / self.std
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                yield x

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.features(a), self.features(b))
        return torch.stack([(p - q).abs().mean() for p, q in pairs]).sum()


# ---------------------------------------------------------------------------------------------------------- the two stages
def cosine(start: float, end: float, progress: float) -> float:
    """Cosine schedule from start to end; progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def batches(count: int, batch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """A seeded random order of range(count) in full batches; what does not fill a batch is left for another epoch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)
    for i in range(0, max(count - batch, 0) + 1, batch):
        yield order[i : i + batch]


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [0, 1], channels_last."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


class Trainer:
    """Both stages over images uint8 (N, 3, 64, 64) on one device and person int64 (N,) with values 0..P-1.

    `epoch()` runs one epoch of the stage whose turn it is and returns its log line; `state()` and `load()` carry everything
    that a resumed run needs. The random numbers of an epoch depend on (seed, epoch) alone.
    """

    def __init__(self, config: Config, images: Tensor, person: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.manual_seed(config.seed)
        self.config, self.images, self.person, self.loss = config, images, person, loss
        device = images.device
        persons = int(person.max()) + 1
        self.lord = Lord(config).to(device)
        # LORD starts its codes at uniform(-0.05, 0.05)
        self.class_codes = nn.Parameter(torch.empty(persons, config.class_dim, device=device).uniform_(-0.05, 0.05))
        self.content_codes = nn.Parameter(torch.empty(len(images), config.content_dim, device=device).uniform_(-0.05, 0.05))
        generator = list(self.lord.generator.parameters())
        codes, fused = [self.class_codes, self.content_codes], device.type == "cuda"
        self.adam1 = torch.optim.Adam([{"params": generator}, {"params": codes}], lr=config.rate, betas=(0.5, 0.999), fused=fused)
        self.adam2 = torch.optim.Adam(self.lord.parameters(), lr=config.encoder_rate, fused=fused)
        self.by_person, self.counts = person.argsort(stable=True), person.bincount()
        self.starts = self.counts.cumsum(0) - self.counts
        self.done = 0  # epochs, of both stages together

    @property
    def total(self) -> int:
        return self.config.epochs + self.config.encoder_epochs

    def epoch(self, tick: Callable[[], object] = lambda: None) -> dict[str, float]:
        """One epoch; `tick` is called after each batch. Raises FloatingPointError at a loss or gradient that is not finite."""
        first = self.done < self.config.epochs
        stage, adam = (self.stage1, self.adam1) if first else (self.stage2, self.adam2)
        step, total = (self.done, self.config.epochs) if first else (self.done - self.config.epochs, self.config.encoder_epochs)
        started, seed = time.time(), self.config.seed * 100003 + self.done
        noise = torch.Generator(self.images.device).manual_seed(seed)
        count = len(self.images)
        per_epoch = max(count // self.config.batch, 1)
        values, order = [], list(batches(count, self.config.batch, seed, self.images.device))
        for i, index in enumerate(order):
            loss = stage(index, (step + i / per_epoch) / total, noise).detach()
            norm = nn.utils.get_total_norm([p.grad for g in adam.param_groups for p in g["params"] if p.grad is not None])
            values.append(torch.stack([loss, norm]))
            tick()
        table = torch.stack(values)  # (steps, 2)
        all_reduce_mean([table])
        table = table.cpu()  # the one transfer to the host
        for i in (~table.isfinite()).any(1).nonzero()[:1, 0].tolist():
            loss_value, norm_value = table[i].tolist()
            raise NotFinite(f"epoch {self.done + 1}, step {i + 1}: loss {loss_value}, gradient norm {norm_value}", order[i])
        self.done += 1
        return {"epoch": self.done, "stage": 1 if first else 2, "loss": float(table[:, 0].mean()), "seconds": time.time() - started}

    def stage1(self, index: Tensor, progress: float, noise: torch.Generator) -> Tensor:
        """Latent optimisation: reconstruction from a noisy content code and the person's class code, plus the penalty."""
        c = self.config
        rate = cosine(c.rate, c.rate_end, progress)
        self.adam1.param_groups[0]["lr"], self.adam1.param_groups[1]["lr"] = rate, rate * c.code_rate
        person, mine = self.person[index], own(index)
        content = self.content_codes[mine]  # (B, content_dim)
        sigma = own(torch.randn(len(index), c.content_dim, generator=noise, device=content.device))
        made = self.lord.generator(self.class_codes[own(person)], content + c.noise * sigma)
        loss = self.loss(made, to_float(self.images[mine]))
        self.adam1.zero_grad()
        (loss + c.content_penalty * content.square().sum(1).mean()).backward()
        codes = [self.class_codes.grad[person], self.content_codes.grad[index]]  # of the batch's rows, no others have any
        all_reduce_mean([*codes, *(p.grad for p in self.lord.generator.parameters())])
        self.class_codes.grad[person], self.content_codes.grad[index] = codes
        self.adam1.step()
        return loss

    def stage2(self, index: Tensor, progress: float, noise: torch.Generator) -> Tensor:
        """Encoders, trained with G: reconstruct the image, and both codes of stage 1."""
        c = self.config
        for group in self.adam2.param_groups:
            group["lr"] = cosine(c.encoder_rate, c.encoder_rate_end, progress)
        mine = own(index)
        x = to_float(self.images[mine])
        content_code = self.lord.content_encoder(x)
        class_code = self.lord.class_encoder(own(self.partner(index, noise)) if c.swap else x)
        codes = c.code_weight * F.mse_loss(class_code, self.class_codes[self.person[mine]].detach())
        if c.swap:
            codes = codes + c.encoder_penalty * content_code.square().sum(1).mean()
            content_code = content_code + c.noise * own(torch.randn(len(index), c.content_dim, generator=noise, device=x.device))
        else:
            codes = codes + c.code_weight * F.mse_loss(content_code, self.content_codes[mine].detach())
        loss = self.loss(self.lord.generator(class_code, content_code), x)
        self.adam2.zero_grad()
        (loss + codes).backward()
        all_reduce_mean([p.grad for p in self.lord.parameters()])
        self.adam2.step()
        return loss

    def partner(self, index: Tensor, noise: torch.Generator) -> Tensor:
        """A random image of the same person for each of index (B,), as float (B, 3, 64, 64)."""
        person = self.person[index]
        r = torch.rand(len(index), generator=noise, device=index.device)
        place = self.starts[person] + (r * self.counts[person]).long()
        return to_float(self.images[self.by_person[place]])

    def state(self) -> dict[str, object]:
        optimiser = self.adam1 if self.done < self.config.epochs else self.adam2
        return {
            "done": self.done, "lord": self.lord.state_dict(), "class_codes": self.class_codes.data,
            "content_codes": self.content_codes.data, "optimiser": optimiser.state_dict(),
        }  # fmt: skip

    def load(self, state: dict) -> None:
        self.done = state["done"]
        self.lord.load_state_dict(state["lord"])
        self.class_codes.data.copy_(state["class_codes"])
        self.content_codes.data.copy_(state["content_codes"])
        (self.adam1 if self.done < self.config.epochs else self.adam2).load_state_dict(state["optimiser"])


# --------------------------------------------------------------------------------------- how well is it disentangled (Sec. 2)
def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], (B, C, H, W), the mean over images."""
    return float((-10 * torch.log10((a - b).square().flatten(1).mean(1).clamp_min(1e-12))).mean())


@torch.no_grad()
def encode(lord: Lord, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Class codes (N, class_dim) and content codes (N, content_dim) of images uint8 (N, 3, 64, 64)."""
    parts = [(lord.class_encoder(x), lord.content_encoder(x)) for x in map(to_float, images.split(batch))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.no_grad()
def decode(lord: Lord, class_code: Tensor, content_code: Tensor, batch: int = 256) -> Tensor:
    """G over (N, class_dim), (N, content_dim) in batches -> (N, 3, 64, 64) in [0, 1]."""
    pairs = zip(class_code.split(batch), content_code.split(batch))
    return torch.cat([lord.generator(a, b) for a, b in pairs])


def halves(person: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every person's first and second half of images, (N1,) and (N2,), for fitting and testing a probe."""
    order = torch.zeros_like(person)
    for p in person.unique():
        mine = (person == p).nonzero()[:, 0]
        order[mine] = (torch.arange(len(mine), device=person.device) * 2 >= len(mine)).to(order.dtype)
    return (order == 0).nonzero()[:, 0], (order == 1).nonzero()[:, 0]


def person_probe(code: Tensor, person: Tensor) -> float:
    """Accuracy of a logistic regression that reads the person (N,) from a code (N, D), on images it was not fitted on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit, test = halves(person)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    probe.fit(code[fit].cpu().numpy(), person[fit].cpu().numpy())
    return float(probe.score(code[test].cpu().numpy(), person[test].cpu().numpy()))


PROBED = ("yaw", "light_x", "exposure", "hair_length", "background_brightness")  # content factors large enough to be read linearly


def factor_probe(code: Tensor, factors: Tensor, unseen_code: Tensor, unseen_factors: Tensor) -> Tensor:
    """R^2 (K,) of a ridge regression from codes (N, D) to factors (N, K), on codes and factors of other persons; NaN for a constant factor."""
    import numpy as np
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, unseen_x, unseen_y = (v.cpu().numpy() for v in (code, factors, unseen_code, unseen_factors))
    varies = (y.std(0) > 1e-6) & (unseen_y.std(0) > 1e-6)
    probe = make_pipeline(StandardScaler(), RidgeCV(alphas=[1.0, 10.0, 100.0, 1000.0, 10000.0])).fit(x, y[:, varies])
    found = np.full(y.shape[1], np.nan)
    found[varies] = r2_score(unseen_y[:, varies], probe.predict(unseen_x), multioutput="raw_values")
    return torch.from_numpy(found)


def report(lord: Lord, images: Tensor, person: Tensor) -> dict[str, float]:
    """Reconstruction PSNR (dB) and person probes of both codes on unseen persons: images uint8 (N, 3, 64, 64), person (N,)."""
    class_code, content_code = encode(lord, images)
    made = decode(lord, class_code, content_code)
    return {
        "images": len(images),
        "persons": len(person.unique()),
        "psnr_reconstruction": psnr(made, to_float(images)),
        "person_from_content": person_probe(content_code, person),
        "person_from_class": person_probe(class_code, person),
        "chance": 1 / len(person.unique()),
    }


def sheet(rows: Tensor, columns: int, scale: int = 2) -> Any:
    """A PIL picture of quadruplets (n, 4, 3, H, W) in [0, 1]: blocks of 2x2 (x y over t u), as in Fig. 9."""
    from PIL import Image

    n, _, C, H, W = rows.shape
    blocks = F.pad(rows, (1, 1, 1, 1), value=1.0).view(n, 2, 2, C, H + 2, W + 2).permute(0, 3, 1, 4, 2, 5)
    blocks = F.pad(blocks.reshape(n, C, 2 * H + 4, 2 * W + 4), (2, 2, 2, 2), value=1.0)  # (n, C, 2H + 8, 2W + 8)
    lines = -(-n // columns)
    grid = torch.ones(lines * columns, *blocks.shape[1:])
    grid[:n] = blocks.cpu()
    grid = grid.view(lines, columns, *blocks.shape[1:]).permute(0, 3, 1, 4, 2).reshape(-1, columns * (2 * W + 8), C)
    picture = Image.fromarray((grid * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


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


def export(path: Path, content: dict[str, object]) -> None:
    """`save` in half precision, its archive deflated, which torch.load reads like any other: 8 % smaller, the same bytes every time."""
    whole = io.BytesIO()
    torch.save({**content, "lord": {k: v.half() for k, v in content["lord"].items()}}, whole)  # type: ignore[attr-defined]

    def deflate(file: BinaryIO) -> None:
        with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(file, "w") as small:
            for name in plain.namelist():
                small.writestr(zipfile.ZipInfo(name), plain.read(name), zipfile.ZIP_DEFLATED, 9)

    replace(path, deflate)


def read(path: Path, kind: str) -> dict:
    """A checkpoint of this project, loaded with weights_only. Raises UsageError if it is missing, broken or another kind."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint: train it first with generator.py, or name another run") from None
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


def load_generator(path: str | Path, device: str | torch.device = "cpu") -> tuple[Lord, dict]:
    """The trained G, E_cl, E_co in eval mode without gradients, and the checkpoint's other content (config, persons).

    Raises UsageError if the file is missing, broken, or of another architecture.
    """
    content = read(Path(path), "generator")
    known = {f.name: f for f in dataclasses.fields(Config)}
    try:
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in content["config"].items() if k in known})
        with torch.device("meta"):  # costs nothing, whatever the settings say
            shapes = {k: v.shape for k, v in Lord(config).state_dict().items()}
        if shapes != {k: v.shape for k, v in content["lord"].items()} or not isinstance(content["train"], list):
            raise ValueError("shapes differ")
        lord = Lord(config)
        lord.load_state_dict({k: v.float() for k, v in content["lord"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError, MemoryError) as error:
        line = " ".join(str(error).split())[:120]
        raise UsageError(f"{path}: weights and settings do not fit together ({line}): train it again") from None
    return lord.to(device).eval().requires_grad_(False), content


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


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(v) for v in text.split(","))


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """The command line made from Config; a flag wins over the preset, the preset over the paper's default."""
    parser = Parser(prog="generator.py", description="Train the disentangled generator (Sec. 2, App. A). In brackets: the preset paper's value; the demo's.")
    for field in dataclasses.fields(Config):
        flag, default, told = "--" + field.name.replace("_", "-"), field.default, described(field)
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=told)
        elif isinstance(default, tuple):
            parser.add_argument(flag, type=integers, metavar="N,N", help=told)
        else:
            choices = {"preset": list(PRESETS), "data": ["synthetic", "folder", "celeba"], "loss": ["vgg", "pyramid"]}
            kind, named = type(default), choices.get(field.name)
            parser.add_argument(flag, type=kind, choices=named, metavar=None if named else kind.__name__, help=told)
    parser.add_argument("--run", type=Path, help="folder to write (default runs/<data>-<preset>-<seed>)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted training stopped")
    parser.add_argument("--overwrite", action="store_true", help="train again over a finished or unfinished run")
    parser.add_argument("--export", type=Path, help="also write the weights alone, half precision, to this file")
    parser.add_argument("--device", default="", help="cpu, cuda, ... (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    preset = str(given.get("preset", "demo"))
    config = Config(**{**PRESETS[preset], "preset": preset, **given})  # type: ignore[arg-type]
    check(config)
    return config, args


def check(config: Config) -> None:
    """UsageError naming the flag unless every number can be trained with, and every list of widths is as long as the paper's."""
    zero = ("seed", "split_seed", "train_persons")
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        low, high = (0 if field.name in zero else 1, 2**31 - 1) if isinstance(field.default, (int, tuple)) else (0, 1e9)
        low = 1e-12 if field.name in ("rate", "encoder_rate") else low
        several = value if isinstance(value, tuple) else (value,)
        told = ",".join(map(str, several))
        if isinstance(value, list):  # what argparse makes of --flag=--
            raise UsageError(f"{flag}: give a value")
        if isinstance(value, tuple) and len(value) != len(field.default):
            raise UsageError(f"{flag} {told}: give {len(field.default)} numbers")
        if not isinstance(value, (bool, str)) and not all(low <= v <= high for v in several):
            raise UsageError(f"{flag} {told}: give {'numbers' if len(several) > 1 else 'a number'} from {low} to {high}")


def vgg_state(name: str) -> dict[str, Tensor]:
    """VGG16 weights from a local file, or, only when asked for by the word `download`, from PyTorch's server."""
    if not name:
        raise UsageError("--loss vgg needs --vgg-weights FILE (a torchvision VGG16) or --vgg-weights download")
    if name == "download":
        url = "https://download.pytorch.org/models/vgg16-397923af.pth"
        try:
            return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        except OSError as error:
            raise UsageError(f"--vgg-weights download: cannot reach {url} ({error}): give a local file") from None
    try:
        return torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 as above
        raise UsageError(f"--vgg-weights {name}: not readable ({str(error).splitlines()[0][:100]})") from None


def differing(old: dict, new: dict) -> str:
    """The fields in which two settings differ, as text; empty if they agree."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in new.items()}
    old = {k: list(v) if isinstance(v, tuple) else v for k, v in old.items()}
    return ", ".join(f"{k} ({old.get(k)} before, {plain.get(k)} now)" for k in sorted(set(old) | set(plain)) if old.get(k) != plain.get(k))


def commit() -> str:
    """The commit of this file's folder, for the checkpoint's record."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def train(config: Config, run: Path, args: argparse.Namespace, faces, split, device: torch.device) -> Lord:
    """Both stages, with log, progress and a checkpoint after every epoch."""
    pick = torch.isin(faces.person, torch.tensor(split.train))
    images, (_, person) = faces.images[pick].to(device), faces.person[pick].unique(return_inverse=True)
    world, batch = processes()[1], min(config.batch, len(images))
    if batch % world:
        raise UsageError(f"--batch {batch}: must divide by torchrun's {world} processes: give a multiple of {world}")
    loss = VggLoss(vgg_state(config.vgg_weights)).to(device) if config.loss == "vgg" else pyramid_loss
    trainer = Trainer(config, images, person.to(device), loss)
    part, log = run / "generator.ckpt", run / "generator.jsonl"
    settings = {"config": dataclasses.asdict(config), "people": json.loads((run / "people.json").read_text())["sha256"]}
    held = images if faces.identity is None else torch.cat([faces.identity.flatten(), faces.content.flatten()])
    # of photographs the pixels, of rendered faces the factors: how a pixel is rounded depends on the number of threads
    settings |= {"images": hashlib.sha256(held.cpu().numpy().tobytes()).hexdigest()[:16], "commit": commit()}
    if args.resume and part.exists():
        state = read_newest(part, "generator-training")
        try:
            if differs := differing(state["config"], settings["config"]):
                raise UsageError(f"--resume: {part} was made with other settings: {differs}; use those, or --overwrite")
            if state["people"] != settings["people"]:
                raise UsageError(f"--resume: {part} was trained on other persons than {run / 'people.json'} names; use --overwrite")
            if state["images"] != settings["images"]:
                raise UsageError(f"--resume: {part} was trained on other images than the data holds now; restore them, or --overwrite")
            trainer.load(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{part}: does not hold this training ({' '.join(str(error).split())[:120]}): use --overwrite") from None
        kept = []
        for text in log.read_text(errors="replace").splitlines() if log.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # whole lines
                if json.loads(text)["epoch"] <= trainer.done:
                    kept.append(text + "\n")
        replace(log, lambda f: f.write("".join(kept).encode()))
    elif part.exists() and not args.overwrite:
        raise UsageError(f"{part}: an unfinished training is here: --resume to go on, --overwrite to start again")
    elif processes()[0] == 0:
        log.unlink(missing_ok=True)
    held = torch.isin(faces.person, torch.tensor(split.validation))
    held_images = faces.images[held][:: max(int(held.sum()) // 256, 1)].to(device)
    steps, started, begun = max(len(images) // config.batch, 1), time.time(), trainer.done
    print(f"generator: {len(images)} images of {len(split.train)} persons, {trainer.total} epochs of {steps} steps on {device}")
    while trainer.done < trainer.total:
        try:
            line = trainer.epoch()
        except NotFinite as error:
            where = pick.nonzero()[error.index.cpu(), 0].tolist()
            raise FloatingPointError(f"{error.told}; images {where} of the data, the first is {faces.files[where[0]]}") from None
        if processes()[0]:
            continue
        if line["stage"] == 2:
            class_code, content_code = encode(trainer.lord, held_images)
            line["psnr_unseen"] = psnr(decode(trainer.lord, class_code, content_code), to_float(held_images))
        with open(log, "a") as f:  # before the checkpoint: a resumed training drops the lines beyond it
            f.write(json.dumps(line) + "\n")
        save(part, {"kind": "generator-training", **settings, **trainer.state()}, keep=True)
        left = (time.time() - started) / (trainer.done - begun) * (trainer.total - trainer.done)
        unseen = f"  unseen persons {line['psnr_unseen']:.2f} dB" if "psnr_unseen" in line else ""
        print(
            f"epoch {trainer.done}/{trainer.total}  stage {line['stage']}  loss {line['loss']:.4f}{unseen}"
            f"  {line['seconds']:.0f} s  left {left / 60:.0f} min", flush=True,
        )  # fmt: skip
    meet()
    if processes()[0]:
        return trainer.lord
    train_names = [faces.names[p] for p in split.train]
    save(run / "generator.pt", {"kind": "generator", **settings, "train": train_names, "lord": trainer.lord.state_dict()})
    for unfinished in (part.with_name(part.name + ".old"), part):
        unfinished.unlink(missing_ok=True)
    return trainer.lord


def main(argv: list[str] | None = None) -> int:
    import data

    try:
        config, args = parse(argv)
        run, rank = args.run or config.run, processes()[0]
        device = join(args.device)
        options = {}
        if config.data == "synthetic":
            options = dict(persons=config.synthetic_persons, images_per_person=config.synthetic_images)
        with rank_0_first():
            faces = data.load(config.data, config.root or None, crop=config.crop or None, **options)
            parts = config.train_persons or None, config.validation_persons, config.target_persons
            split = data.open_split(run / "people.json", faces, *parts, config.split_seed, anew=args.overwrite and rank == 0)
        finished = run / "generator.pt"
        if finished.exists() and not args.overwrite and not (run / "generator.ckpt").exists():
            lord, content = load_generator(finished, device)
            if differs := differing(content["config"], dataclasses.asdict(config)):
                raise UsageError(f"{finished}: trained with other settings: {differs}; use --overwrite or another --run")
            print(f"{finished} is there already: only its report is made again (--overwrite trains it anew)")
        else:
            lord = train(config, run, args, faces, split, device).eval().requires_grad_(False)
        meet()
        if rank:
            return 0
        if args.export:
            export(args.export, read(finished, "generator"))
            lord, _ = load_generator(args.export, device)  # the report is that of the exported weights
        result = evaluate(config, run, lord, faces, split, device)
        print(json.dumps(result, indent=1))
        print(f"wrote {run}/generator.pt, generator.jsonl, generator.json, quadruplets.png, quadruplets.npz")
    except (UsageError, data.DataError) as error:
        tell(f"generator.py: {error}")
        return 2
    except OSError as error:
        tell(f"generator.py: {error.filename or run}: {error.strerror}: mend that, then the same command with --resume goes on")
        return 2
    except FloatingPointError as error:
        part = run / "generator.ckpt"
        tell(f"generator.py: {error}; last good checkpoint: {part if part.exists() else 'none yet'}")
        return 1
    except KeyboardInterrupt:
        tell("\ngenerator.py: interrupted; the same command with --resume goes on after the last whole epoch")
        return 130
    return 0


def evaluate(config: Config, run: Path, lord: Lord, faces, split, device: torch.device) -> dict:
    """The report on persons never seen in training, and the sheet of quadruplets."""
    import numpy as np

    pick = torch.isin(faces.person, torch.tensor(split.validation + split.target)).nonzero()[:, 0]
    images, person = faces.images[pick].to(device), faces.person[pick]
    result: dict = {**report(lord, images, person)}
    rng = torch.Generator().manual_seed(config.seed)
    x, t = (torch.randint(len(pick), (512,), generator=rng) for _ in range(2))
    x, t = x[person[x] != person[t]], t[person[x] != person[t]]
    if config.data == "synthetic":
        from data import synthetic

        identity, content = faces.identity[faces.person[pick]], faces.content[pick]
        truth = to_float(synthetic.render(identity[x], content[t]).to(device))
        class_code, content_code = encode(lord, images)
        result["psnr_true_u"] = psnr(decode(lord, class_code[x], content_code[t]), truth)
        seen = torch.isin(faces.person, torch.tensor(split.train)).nonzero()[:, 0]  # the probes learn from train persons
        codes = encode(lord, faces.images[seen].to(device))
        for name, seen_code, code in (("class", codes[0], class_code), ("content", codes[1], content_code)):
            r2 = factor_probe(seen_code, faces.content[seen], code, content)
            told = {"mean of all": float(r2.nanmean())} | {f: float(r2[list(synthetic.CONTENT_FACTORS).index(f)]) for f in PROBED}
            result[f"content_factors_from_{name}"] = {k: v for k, v in told.items() if math.isfinite(v)}
    a, b = to_float(images[x[:24]]), to_float(images[t[:24]])
    with torch.no_grad():
        y, u = quadruplets(lord, a, b)
    rows = torch.stack([a, y, b, u], 1).cpu()  # (24, 4, 3, 64, 64)
    replace(run / "quadruplets.png", lambda f: sheet(rows, 6).save(f, "PNG"))
    replace(run / "quadruplets.npz", lambda f: np.savez_compressed(f, quadruplets=(rows * 255).round().to(torch.uint8).numpy()))
    replace(run / "generator.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    return result


if __name__ == "__main__":
    sys.exit(main())
