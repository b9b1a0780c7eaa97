"""The disentangled generator G, encoders E_cl, E_co: Sec. 2, App. A (LORD, Gabbay and Hoshen 2020).

    python generator.py                                             # demo: rendered, two CPU cores
    python generator.py --preset paper --data celeba --root CELEBA  # the paper's sizes, one GPU
    python generator.py --preset demo --data folder --root PHOTOS   # a sub-folder a person
    python generator.py --oracle FILE.py:NAME  # asks a face network about y and u; trains nothing

In:  faces from `data/` (train persons only; nobody held out is ever seen by G, E_cl, E_co).
Out: runs/<data>-<preset>-<seed>/ with people.json (who is in which part), generator.pt (weights),
     and in generator/ log.jsonl, result.json (disentanglement report), quadruplets.png and .npz
     (x, y, t, u: Fig. 1, Fig. 9). The same command goes on after a stop.

Stage 1 optimises one content code an image and one class code a person together with G (latent
optimisation); stage 2 trains the encoders to reproduce those codes from the image. Images are float
NCHW in [0, 1], 64 x 64.

Measured (demo, 3,600 rendered faces, two x86-64 cores, 63 minutes): on 840 images of 70 persons
never seen y 22.3 dB, u 20.3 dB, person from the content code 0.045 (chance 0.014). The preset paper
has not been run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Every setting of the two stages; the defaults are the paper's, a preset replaces some."""

    preset: str = "paper"  # demo | paper; on the command line demo unless named
    data: str = "celeba"  # synthetic | folder | celeba
    root: str = ""  # where the photographs are
    crop: str = ""  # lfw | centre | celeba | none; empty: by image size
    person_folder: str = ""  # first | last: which folder below root is the person's, if several
    seed: int = 0  # not in the paper: of everything random in the training
    split_seed: int = 0  # not in the paper: who is train, validation, target
    train_persons: int = 9177  # Sec. 4: of G; 0: all that are left
    validation_persons: int = 100  # Sec. 4: of F, not trained on
    target_persons: int = 30  # Sec. 4.2: 30 drawn
    synthetic_persons: int = 370  # not in the paper: size of the rendered set
    synthetic_images: int = 12  # not in the paper: images of each rendered person
    images: int = 0  # not in the paper: of each train person the first, that G may see; 0: all
    class_dim: int = 256  # App. A (LORD): class code, one a person
    content_dim: int = 128  # App. A (LORD): content code, one an image
    hidden: tuple[int, ...] = (512, 1024)  # LORD: 4*4*32 and 4*4*64
    channels: tuple[int, ...] = (256, 256, 256, 256)  # LORD: the four AdaIN blocks, 8x8 to 64x64
    out_channels: int = 64  # LORD: between the 5x5 and the 7x7 convolution
    encoder_channels: tuple[int, ...] = (64, 128, 256, 256, 256)  # LORD: of their five convolutions
    encoder_hidden: int = 256  # LORD: of their dense layers
    loss: str = "vgg"  # LORD: vgg, perceptual; not in the paper: pyramid, Laplacian L1
    vgg_weights: str = ""  # a torchvision VGG16 file, or the word download
    noise: float = 1.0  # App. A: sigma, added to the content code in training
    content_penalty: float = 0.001  # App. A: lambda, on the sum of squares, batch mean
    batch: int = 64  # LORD: images
    epochs: int = 200  # Sec. 4: of stage 1
    lr: float = 3e-4  # LORD: Adam's, in stage 1
    lr_end: float = 1e-5  # LORD: cosine down to this
    code_lr: float = 10.0  # LORD: times lr, for the codes
    encoder_epochs: int = 200  # LORD: of stage 2
    encoder_lr: float = 1e-4  # LORD: Adam's, in stage 2
    encoder_lr_end: float = 1e-4  # LORD: constant
    code_weight: float = 1e4  # LORD: weight of the two code errors, which are means
    # with swap the content code is free of stage 1's, but noisy and penalised as there, so that it
    # holds no more than it must
    swap: bool = False  # not in the paper: stage 2 takes class codes of another image of the person
    encoder_penalty: float = 0.0  # not in the paper: lambda of stage 2, with swap
    precision: str = "auto"  # not in the paper: float32 | tf32 | bfloat16, where fast
    compile: bool = False  # not in the paper: G and the encoders by torch.compile

    @property
    def run(self) -> Path:
        """Folder of this run."""
        return Path("runs") / f"{self.data}-{self.preset}-{self.seed}"


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {"data": "synthetic", "train_persons": 0, "validation_persons": 40}
    | {"target_persons": 30, "class_dim": 96, "content_dim": 96, "hidden": (192, 256)}
    | {"channels": (128, 96, 48, 16), "out_channels": 12, "loss": "pyramid"}
    | {"encoder_channels": (16, 32, 64, 96, 96), "encoder_hidden": 128}
    | {"content_penalty": 1e-5, "lr": 1.5e-3, "lr_end": 5e-5, "code_lr": 40.0, "epochs": 60}
    | {"encoder_epochs": 20, "encoder_lr": 1e-3, "encoder_lr_end": 2e-5}
    | {"swap": True, "encoder_penalty": 5e-4, "code_weight": 0.1},
}


# Networks (Sec. 2, App. A)


def leaky_adain(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """LeakyReLU(0.2), then AdaIN to scale and offset (B, C) of each channel of x (B, C, H, W)."""
    x = F.leaky_relu(x, 0.2)
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * scale[:, :, None, None] + offset[:, :, None, None]


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest upsampling x2, then a 3x3 convolution: (B, C, H, W) -> (B, O, 2H, 2W)."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


try:
    from kernels.adain import leaky_adain  # type: ignore[no-redef]
    from kernels.upsample_conv import upsample_conv  # type: ignore[no-redef]
except ImportError:
    pass


class Generator(nn.Module):
    """G(z_cl, z_co) -> (B, 3, 64, 64): the content code makes a 4x4 map, the class code modulates
    every AdaIN layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, (h1, h2) = config.channels, config.hidden
        self.dense = nn.ModuleList(
            [nn.Linear(config.content_dim, h1), nn.Linear(h1, h2), nn.Linear(h2, 4 * 4 * c[0])]
        )
        self.blocks = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip((c[0], *c[:-1]), c)
        )
        self.modulation = nn.ModuleList(nn.Linear(config.class_dim, 2 * o) for o in c)
        self.conv5 = nn.Conv2d(c[-1], config.out_channels, 5, padding=2)
        self.conv7 = nn.Conv2d(config.out_channels, 3, 7, padding=3)
        self.start = c[0]

    def forward(self, class_code: Tensor, content_code: Tensor) -> Tensor:
        x = content_code
        for layer in self.dense:
            x = F.leaky_relu(layer(x), 0.2, inplace=True)
        x = x.view(-1, self.start, 4, 4).contiguous(memory_format=torch.channels_last)
        conv: Any
        for conv, modulation in zip(self.blocks, self.modulation):
            scale, offset = modulation(class_code).chunk(2, 1)
            x = leaky_adain(upsample_conv(x, conv.weight, conv.bias), 1 + scale, offset)
        return torch.sigmoid(self.conv7(F.leaky_relu(self.conv5(x), 0.2, inplace=True)))


class Encoder(nn.Module):
    """E_cl or E_co, (B, 3, 64, 64) -> (B, code): one 7x7 convolution, four 4x4 of stride 2, three
    dense layers."""

    def __init__(self, config: Config, code: int) -> None:
        super().__init__()
        c, h = config.encoder_channels, config.encoder_hidden
        layers: list[nn.Module] = [nn.Conv2d(3, c[0], 7, padding=3), nn.LeakyReLU(0.2)]
        for i, o in pairwise(c):
            layers += [nn.Conv2d(i, o, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.convs = nn.Sequential(*layers)
        first, second, last = nn.Linear(c[-1] * 16, h), nn.Linear(h, h), nn.Linear(h, code)
        self.dense = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.convs(x * 2 - 1).flatten(1))


class Lord(nn.Module):
    """G with its two encoders; forward is the autoencoder G(E_cl(x), E_co(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.generator = Generator(config)
        self.class_encoder = Encoder(config, config.class_dim)
        self.content_encoder = Encoder(config, config.content_dim)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(self.class_encoder(x), self.content_encoder(x))


def quadruplets(lord: Lord, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The generated half of the quadruplets (Sec. 2): y copies x, u is x's identity with t's
    content.

    x, t: (B, 3, 64, 64) in [0, 1], of different persons. Returns y, u of the same shape.
    """
    class_code = lord.class_encoder(x)
    y = lord.generator(class_code, lord.content_encoder(x))
    u = lord.generator(class_code, lord.content_encoder(t))
    return y, u


# Reconstruction losses


def pyramid_loss(a: Tensor, b: Tensor) -> Tensor:
    """Laplacian pyramid L1: the mean absolute difference of every level, summed, down to 4x4. Needs
    no weights (not in the paper)."""
    d = a - b  # the pyramid is linear: that of the difference is the difference of the two
    total = d.new_zeros(())
    while d.shape[-1] > 4:
        low = F.avg_pool2d(d, 2)
        up = F.interpolate(low, scale_factor=2.0, mode="bilinear", align_corners=False)
        total = total + (d - up).abs().mean()
        d = low
    return total + d.abs().mean()


class VggLoss(nn.Module):
    """Mean absolute difference of VGG16 (ImageNet) features, conv1_2, conv2_2, conv3_2, conv4_2,
    conv5_2, equal weights.

    state: a torchvision VGG16 state dict ("features.0.weight", ...). Raises KeyError or
    RuntimeError if it is another's.
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
                conv, name = nn.Conv2d(previous, width, 3, padding=1), f"features.{len(layers)}."
                conv.load_state_dict({k: state[name + k] for k in ("weight", "bias")})
                layers += [conv, nn.ReLU()]
                previous = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers).requires_grad_(False).eval()
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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


# The two stages


def cosine(start: float, end: float, progress: float) -> float:
    """Cosine schedule from start to end; progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def batches(count: int, batch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """A seeded order of range(count) in full batches; what fills none is left for another epoch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)
    for i in range(0, max(count - batch, 0) + 1, batch):
        yield order[i : i + batch]


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [0, 1], channels_last."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: give uint8, 0 to 255")
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


class Trainer:
    """Both stages over images uint8 (N, 3, 64, 64) on one device and person int64 (N,), 0..P-1.

    `epoch(n, seed, steps)` runs the n-th epoch, of the stage whose turn it is; its random numbers
    depend on the seed alone.
    """

    def __init__(self, config: Config, images: Tensor, person: Tensor, loss: Callable) -> None:
        torch.manual_seed(config.seed)
        self.config, self.images, self.person, self.loss = config, images, person, loss
        device, fused = images.device, images.is_cuda
        self.lord = Lord(config).to(device)
        # LORD starts its codes at uniform(-0.05, 0.05)
        shapes = (int(person.max()) + 1, config.class_dim), (len(images), config.content_dim)
        self.class_codes, self.content_codes = (
            nn.Parameter(torch.empty(shape, device=device).uniform_(-0.05, 0.05))
            for shape in shapes
        )
        groups = [list(self.lord.generator.parameters()), [self.class_codes, self.content_codes]]
        self.adam1 = torch.optim.Adam(
            [{"params": group} for group in groups], lr=config.lr, betas=(0.5, 0.999), fused=fused
        )
        self.adam2 = torch.optim.Adam(self.lord.parameters(), lr=config.encoder_lr, fused=fused)
        self.by_person, self.counts = person.argsort(stable=True), person.bincount()
        self.starts = self.counts.cumsum(0) - self.counts

    def epoch(self, n: int, seed: int, steps: int) -> dict[str, float]:
        """Stage and mean loss. Raises FloatingPointError(what, indices of the batch's images)."""
        c, first = self.config, n < self.config.epochs
        stage, adam = (self.stage1, self.adam1) if first else (self.stage2, self.adam2)
        done, total = (n, c.epochs) if first else (n - c.epochs, c.encoder_epochs)
        rng, device = torch.Generator(self.images.device).manual_seed(seed), self.images.device.type
        values, order = [], list(batches(len(self.images), c.batch, seed, self.images.device))
        for i, index in enumerate(order[:steps]):
            with torch.autocast(device, torch.bfloat16, enabled=c.precision == "bfloat16"):
                loss, codes = stage(index, (done + i / steps) / total, rng)
            adam.zero_grad()
            (loss + codes).backward()
            weights = [p for group in adam.param_groups for p in group["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
            values.append(torch.stack([loss.detach(), norm]))
            adam.step()
        table = torch.stack(values).cpu()  # (steps, 2), the one transfer to the host
        for i in (~table.isfinite()).any(1).nonzero()[:1, 0].tolist():
            what = f"step {i + 1}: loss {table[i, 0].item()}, gradient norm {table[i, 1].item()}"
            raise FloatingPointError(what, order[i])
        return {"stage": 1 if first else 2, "loss": float(table[:, 0].mean())}

    def stage1(self, index: Tensor, progress: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latent optimisation: reconstruction from a noisy content code and the class code."""
        c = self.config
        lr = cosine(c.lr, c.lr_end, progress)
        for group, times in zip(self.adam1.param_groups, (1, c.code_lr)):
            group["lr"] = lr * times
        content = self.content_codes[index]  # (B, content_dim)
        sigma = torch.randn(content.shape, generator=rng, device=content.device)
        class_code = self.class_codes[self.person[index]]
        made = self.lord.generator(class_code, content + c.noise * sigma)
        loss = self.loss(made, to_float(self.images[index]))
        # App. A: the reconstruction loss, plus lambda times the squared norm of the content code
        return loss, c.content_penalty * content.square().sum(1).mean()

    def stage2(self, index: Tensor, progress: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encoders, trained with G: reconstruct the image, and both codes of stage 1."""
        c = self.config
        self.adam2.param_groups[0]["lr"] = cosine(c.encoder_lr, c.encoder_lr_end, progress)
        x = to_float(self.images[index])
        content_code = self.lord.content_encoder(x)
        class_code = self.lord.class_encoder(self.partner(index, rng) if c.swap else x)
        wanted = self.class_codes[self.person[index]].detach()
        codes = c.code_weight * F.mse_loss(class_code, wanted)
        if c.swap:
            codes = codes + c.encoder_penalty * content_code.square().sum(1).mean()
            sigma = torch.randn(content_code.shape, generator=rng, device=x.device)
            content_code = content_code + c.noise * sigma
        else:
            wanted = self.content_codes[index].detach()
            codes = codes + c.code_weight * F.mse_loss(content_code, wanted)
        return self.loss(self.lord.generator(class_code, content_code), x), codes

    def state_dict(self) -> dict:
        """What the next epoch needs."""
        modules = {k: getattr(self, k).state_dict() for k in ("lord", "adam1", "adam2")}
        return {**modules, "codes": [self.class_codes.data, self.content_codes.data]}

    def load_state_dict(self, state: dict) -> None:
        for name in ("lord", "adam1", "adam2"):
            getattr(self, name).load_state_dict(state[name])
        for code, held in zip((self.class_codes, self.content_codes), state["codes"]):
            code.data.copy_(held)

    def partner(self, index: Tensor, rng: torch.Generator) -> Tensor:
        """A random image of the same person for each of index (B,), as float (B, 3, 64, 64)."""
        person = self.person[index]
        r = torch.rand(len(index), generator=rng, device=index.device)
        place = self.starts[person] + (r * self.counts[person]).long()
        return to_float(self.images[self.by_person[place]])


# How well is it disentangled (Sec. 2)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], (B, C, H, W), the mean over images."""
    return float((-10 * torch.log10((a - b).square().flatten(1).mean(1).clamp_min(1e-12))).mean())


@torch.no_grad()
def encode(lord: Lord, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) -> class codes (N, class_dim), content codes (N, content_dim)."""
    parts = map(to_float, images.split(batch))
    both = [(lord.class_encoder(x), lord.content_encoder(x)) for x in parts]
    class_code, content_code = zip(*both)
    return torch.cat(class_code), torch.cat(content_code)


@torch.no_grad()
def decode(lord: Lord, class_code: Tensor, content_code: Tensor, batch: int = 256) -> Tensor:
    """G over (N, class_dim), (N, content_dim) in batches -> (N, 3, 64, 64) in [0, 1]."""
    pairs = zip(class_code.split(batch), content_code.split(batch))
    return torch.cat([lord.generator(a, b) for a, b in pairs])


def halves(person: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every person's first and second half of images: to fit and to test a probe."""
    each = [(person == p).nonzero()[:, 0] for p in person.unique()]
    first, second = zip(*(own.tensor_split([-(-len(own) // 2)]) for own in each))
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def person_probe(code: Tensor, person: Tensor) -> float:
    """Accuracy of a logistic regression that reads the person (N,) from a code (N, D), on images it
    was not fitted on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit, test = halves(person)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    probe.fit(code[fit].cpu().numpy(), person[fit].cpu().numpy())
    return float(probe.score(code[test].cpu().numpy(), person[test].cpu().numpy()))


# content factors large enough to be read linearly
PROBED = ("yaw", "light_x", "exposure", "hair_length", "background_brightness")


def factor_probe(
    code: Tensor, factors: Tensor, unseen_code: Tensor, unseen_factors: Tensor
) -> Tensor:
    """R^2 (K,) of a ridge regression from codes (N, D) to factors (N, K), on codes and factors of
    other persons; NaN for a constant factor."""
    import numpy as np
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    held = (code, factors, unseen_code, unseen_factors)
    x, y, unseen_x, unseen_y = (v.cpu().numpy() for v in held)
    varies = (y.std(0) > 1e-6) & (unseen_y.std(0) > 1e-6)
    ridge = RidgeCV(alphas=[1.0, 10.0, 100.0, 1000.0, 10000.0])
    probe = make_pipeline(StandardScaler(), ridge).fit(x, y[:, varies])
    found = np.full(y.shape[1], np.nan)
    found[varies] = r2_score(unseen_y[:, varies], probe.predict(unseen_x), multioutput="raw_values")
    return torch.from_numpy(found)


def report(lord: Lord, images: Tensor, person: Tensor) -> dict[str, float]:
    """Reconstruction PSNR (dB) and person probes of both codes on unseen persons: images uint8 (N,
    3, 64, 64), person (N,)."""
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


@torch.no_grad()
def identity_kept(
    oracle: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, t: Tensor, u: Tensor
) -> tuple[dict[str, float], Tensor]:
    """What a network that never saw a generated image says of y and u, (N, 3, 64, 64) as x and t:
    mean distances, and shares (both 1/2 by chance) in which u lies nearer to x than to t, as it has
    x's identity, and nearer to t than x does, as a hard negative. Also the distances (4, N) x-y,
    x-u, t-u and t-x, of which Fig. 3 shows the last two."""
    f = [torch.cat([oracle(part) for part in images.split(256)]) for images in (x, y, t, u)]
    pairs = (f[0], f[1]), (f[0], f[3]), (f[2], f[3]), (f[2], f[0])
    d = torch.stack([(a - b).square().sum(1).sqrt() for a, b in pairs])
    told = dict(zip(("x_y", "x_u", "t_u", "t_x"), d.mean(1).tolist()))
    told["y_nearer_to_x_than_t"] = float((d[0] < d[3]).float().mean())
    told["u_nearer_to_x_than_to_t"] = float((d[1] < d[2]).float().mean())
    told["u_nearer_to_t_than_x_is"] = float((d[2] < d[3]).float().mean())
    return told, d


# main

CHOICES = {
    "data": ("synthetic", "folder", "celeba"),
    "person_folder": ("", "first", "last"),
    "loss": ("vgg", "pyramid"),
    "precision": ("auto", "float32", "tf32", "bfloat16"),
    **{k: (0, 2**31 - 1) for k in ("seed", "split_seed", "train_persons", "images")},
    **{k: (1e-12, 1e9) for k in ("lr", "encoder_lr")},
}


def parse(argv: Sequence[str] | None):
    """Config and flags. Raises run.UsageError."""
    from data import run

    about = "Train the disentangled generator (Sec. 2, App. A)."
    told = "also write the weights alone, half precision, to this file"
    oracle = {"default": "", "metavar": "FILE.py:NAME"}
    oracle["help"] = "ask this face network about the run's y and u; its code is run"
    export = {"type": Path, "help": told}
    return run.parse(Config, PRESETS, argv, about, CHOICES, export=export, oracle=oracle)


def load_generator(path: str | Path, device: str | torch.device = "cpu") -> tuple[Lord, dict]:
    """The trained G, E_cl, E_co in eval mode without gradients, and the file's other content.

    Raises run.UsageError if the file is missing, broken, or of another architecture.
    """
    from data import run

    content = run.load(path, "generator")
    names = {f.name for f in dataclasses.fields(Config)}
    with run.reading(path, "weights and settings do not fit together: train it again"):
        held: dict[str, Any] = {k: v for k, v in content["config"].items() if k in names}
        lists = {k: tuple(v) for k, v in held.items() if isinstance(v, list)}
        config = Config(**(held | lists))
        with torch.device("meta"):  # costs nothing, whatever the settings say
            shapes = {k: v.shape for k, v in Lord(config).state_dict().items()}
        if shapes != {k: v.shape for k, v in content["lord"].items()}:
            raise ValueError("shapes differ")
        if not isinstance(content["train"], list):
            raise TypeError("the train persons are no list")
        lord = Lord(config)
        lord.load_state_dict({k: v.float() for k, v in content["lord"].items()})
    return lord.to(device).eval().requires_grad_(False), content


def vgg_state(name: str) -> dict[str, Tensor]:
    """VGG16 weights from a local file, or, only for the word `download`, from PyTorch's server."""
    from data import run

    if not name:
        told = "--loss vgg needs --vgg-weights FILE (a torchvision VGG16) or --vgg-weights download"
        raise run.UsageError(told)
    if name == "download":
        url = "https://download.pytorch.org/models/vgg16-397923af.pth"
        try:
            return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        except OSError as error:
            told = f"--vgg-weights download: cannot reach {url} ({error}): give a local file"
            raise run.UsageError(told) from None
    return read_vgg(name, "--vgg-weights")


def read_vgg(path: str, flag: str) -> dict[str, Tensor]:
    """A torchvision VGG16 state dict from a file, also as DataParallel or a training wraps it."""
    from data import run

    with run.reading(path, f"{flag}: name a torchvision VGG16"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {k.removeprefix("module."): v for k, v in state.items()}
        if "features.0.weight" not in state:
            raise ValueError(f"no features.0.weight in it, but {', '.join([*state][:3])}")
    return state


def export(path: Path, content: dict) -> None:
    """The weights in half precision, the archive deflated: 8 % smaller, the same bytes always."""
    import io
    import zipfile

    from data import run

    whole = io.BytesIO()
    torch.save({**content, "lord": {k: v.half() for k, v in content["lord"].items()}}, whole)

    def deflate(file) -> None:
        with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(file, "w") as small:
            for name in plain.namelist():
                info = zipfile.ZipInfo(name)
                small.writestr(info, plain.read(name), zipfile.ZIP_DEFLATED, 9)

    run.write(path, deflate)


def train(argv: Sequence[str] | None) -> None:
    """`python generator.py`: both stages, then the report."""
    import json

    import data
    from data import run

    config, args = parse(argv)
    device, finished = run.start(args.device), args.run / "generator.pt"
    config = dataclasses.replace(config, precision=run.precision(config.precision, device))
    run.tf32(config.precision == "tf32")
    if args.oracle:
        return ask(config, args, device)
    with run.rank_0_first():
        overwrite = args.overwrite and run.rank() == 0
        faces, split = data.open_run(config, args.run, overwrite=overwrite)
    pick = data.images_of(faces, split.train, config.images)
    images, person = faces.images[pick].to(device), faces.person[pick]
    person = person.unique(return_inverse=True)[1].to(device)
    batch = min(config.batch, len(images))
    share = dataclasses.replace(config, batch=run.share("--batch", batch))
    loss: Callable = pyramid_loss
    if config.loss == "vgg":
        loss = VggLoss(vgg_state(config.vgg_weights)).to(device)
    trainer = Trainer(share, images, person, loss)
    if config.compile:
        run.compile_(*trainer.lord.children())
    run.average_gradients(trainer.adam1)
    run.average_gradients(trainer.adam2)
    # of rendered faces the factors: how a pixel is rounded depends on the number of threads
    held = (images,) if faces.identity is None else (faces.identity, faces.content)
    made_of = {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "root"},
        "people": run.read_json(args.run / "people.json")["sha256"],
        "images": run.fingerprint(*held),
    }
    folder = args.run / "generator"
    training = run.Training(folder, made_of, args.overwrite, "epoch", trainer=trainer)
    if training.done:
        print(f"{finished} is there already: only its report is made again (--overwrite trains it)")
    else:
        fit(config, training, trainer, faces, split, pick)
        if run.rank() == 0:
            names = [faces.names[p] for p in split.train]
            weights = {"train": names, "lord": trainer.lord.state_dict()}
            run.save(finished, "generator", **made_of, commit=run.commit(), **weights)
    run.barrier()
    if run.rank():
        training.end()  # waits for the report
        return
    if args.export:
        export(args.export, run.load(finished, "generator"))
    lord, _ = load_generator(args.export or finished, device)  # the report is of what was written
    result = evaluate(config, training.folder, lord, faces, split)
    training.end(**result, **run.record(device))
    print(json.dumps(result, indent=1))
    print(f"wrote {finished} and {training.folder}: log.jsonl, result.json, quadruplets.png, .npz")


def fit(config: Config, training, trainer: Trainer, faces, split, pick: Tensor) -> None:
    """Both stages, a line of the log and a checkpoint an epoch."""
    from data import run

    steps = max(len(trainer.images) // config.batch, 1)
    epochs = config.epochs + config.encoder_epochs
    told = f"{len(trainer.images)} images of {len(split.train)} persons, {epochs} epochs"
    print(f"generator: {told} of {steps} steps on {trainer.images.device}", flush=True)
    held_out = faces.images[torch.isin(faces.person, torch.tensor(split.validation))]
    held_out = held_out[:: max(len(held_out) // 256, 1)].to(trainer.images.device)
    while training.step < epochs:
        seed = run.step_seed(config.seed, training.step, 100_003)
        try:
            found = trainer.epoch(training.step, seed, steps)
        except FloatingPointError as error:
            what, index = error.args
            left = training.left_by(index, faces.files, pick)
            told = f"epoch {training.step + 1}, {what}; {left}"
            raise FloatingPointError(told) from None
        training.count()
        if found["stage"] == 2 and run.rank() == 0:
            made = decode(trainer.lord, *encode(trainer.lord, held_out))
            found["psnr_unseen"] = psnr(made, to_float(held_out))
        training.log(epochs, **found)


def evaluate(config: Config, folder: Path, lord: Lord, faces, split) -> dict:
    """The report on persons never seen in training, and the sheet of quadruplets."""
    import numpy as np

    from data import run

    device = next(lord.parameters()).device
    held_out = torch.tensor(split.validation + split.target)
    pick = torch.isin(faces.person, held_out).nonzero()[:, 0]
    images, person = faces.images[pick].to(device), faces.person[pick]
    result: dict = report(lord, images, person)
    x, t = pairs_of(person, config.seed)
    if faces.identity is not None:
        result |= against_the_truth(lord, faces, split, pick, x, t)
    a, b = to_float(images[x[:24]]), to_float(images[t[:24]])
    with torch.no_grad():
        y, u = quadruplets(lord, a, b)
    rows = torch.stack([a, y, b, u], 1).cpu()  # (24, 4, 3, 64, 64)
    run.write(folder / "quadruplets.png", lambda file: sheet(rows, 6).save(file, "PNG"))
    small = (rows * 255).round().to(torch.uint8).numpy()
    run.write(folder / "quadruplets.npz", lambda file: np.savez_compressed(file, quadruplets=small))
    return result


def pairs_of(person: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Up to 512 pairs of indices x and t, images of different persons (N,)."""
    rng = torch.Generator().manual_seed(seed)
    x, t = (torch.randint(len(person), (512,), generator=rng) for _ in range(2))
    return x[person[x] != person[t]], t[person[x] != person[t]]


def ask(config: Config, args, device: torch.device) -> None:
    """`--oracle`: Fig. 3 left, and the identity of y and u, on persons that G never saw."""
    import json

    import data
    from data import model, run

    shipped = Path(__file__).resolve().parent / "data" / "generator_demo.pt"
    held, demo = args.run / "generator.pt", (config.preset, config.data) == ("demo", "synthetic")
    file = shipped if demo and not held.exists() else held
    flag = f"--oracle {args.oracle}"
    oracle, _ = model.load_model(flag, args.oracle, device)
    lord, content = load_generator(file, device)
    faces, split = data.open_run(config, args.run)
    index = torch.isin(faces.person, torch.tensor(split.validation + split.target))
    pick = index.nonzero()[:, 0]
    if seen := {faces.names[int(p)] for p in faces.person[pick]} & {*content["train"]}:
        raise run.UsageError(f"{file}: trained on {min(seen)}, who is to judge it: name its --run")
    x, t = (to_float(faces.images[pick[i]].to(device)) for i in pairs_of(faces.person[pick], 0))
    with torch.no_grad():
        y, u = (
            torch.cat(v) for v in zip(*map(partial(quadruplets, lord), x.split(64), t.split(64)))
        )
    with model.of_the_user(flag, "fails on the photographs"):
        told, d = identity_kept(oracle, x, y, t, u)
    name = model.model_name(args.oracle)
    result = {"generator": str(file.name), "images": len(x), **told, **run.record(device)}
    run.write(args.run / "generator" / f"oracle-{name}.json", result)
    rows = [("real-generated", v) for v in d[2].tolist()] + [
        ("real-real", v) for v in d[3].tolist()
    ]
    lines = "".join(f"{kind},{v:.7g}\n" for kind, v in rows)
    run.write(args.run / name / "attacks" / "figure3.csv", f"kind,distance\n{lines}")
    print(json.dumps(result, indent=1))


def against_the_truth(lord: Lord, faces, split, pick: Tensor, x: Tensor, t: Tensor) -> dict:
    """Rendered faces: u of images x and t (n,) of the picked beside the true one, factors read."""
    import data
    from data import synthetic

    device = next(lord.parameters()).device
    person, content = faces.person[pick], faces.content[pick]
    truth = synthetic.render(faces.identity[person][x], content[t]).to(device)
    class_code, content_code = encode(lord, faces.images[pick].to(device))
    made = decode(lord, class_code[x], content_code[t])
    result: dict = {"psnr_true_u": psnr(made, to_float(truth))}
    # the probes learn from train persons
    seen = data.images_of(faces, split.train)
    seen_codes = encode(lord, faces.images[seen].to(device))
    for name, known, code in zip(("class", "content"), seen_codes, (class_code, content_code)):
        r2 = factor_probe(known, faces.content[seen], code, content)
        factors = {f: float(r2[list(synthetic.CONTENT_FACTORS).index(f)]) for f in PROBED}
        told = {"mean of all": float(r2.nanmean())} | factors
        result[f"content_factors_from_{name}"] = {k: v for k, v in told.items() if math.isfinite(v)}
    return result


def sheet(rows: Tensor, columns: int, scale: int = 2):
    """A PIL picture of quadruplets (n, 4, 3, H, W) in [0, 1]: blocks of 2x2 (x y over t u), as in
    Fig. 9."""
    from PIL import Image

    n, _, C, H, W = rows.shape
    blocks = F.pad(rows, (1, 1, 1, 1), value=1.0).view(n, 2, 2, C, H + 2, W + 2)
    blocks = blocks.permute(0, 3, 1, 4, 2, 5).reshape(n, C, 2 * H + 4, 2 * W + 4)
    blocks = F.pad(blocks, (2, 2, 2, 2), value=1.0)  # (n, C, 2H + 8, 2W + 8)
    lines = -(-n // columns)
    grid = torch.ones(lines * columns, *blocks.shape[1:])
    grid[:n] = blocks.cpu()
    grid = grid.view(lines, columns, *blocks.shape[1:]).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(-1, columns * (2 * W + 8), C)
    picture = Image.fromarray((grid * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    try:
        from data import run
    except ModuleNotFoundError:
        raise SystemExit("generator.py: the command needs the folder data/ beside it") from None
    return run.command("generator.py", train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
