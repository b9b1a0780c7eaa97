"""The disentangled generator G, encoders E_cl, E_co: Sec. 2, App. A (LORD, Gabbay and Hoshen 2020).

    python generator.py                                             # demo: rendered, two CPU cores
    python generator.py --preset paper --data celeba --root CELEBA  # the paper's sizes, one GPU
    python generator.py --preset demo --data folder --root PHOTOS   # a sub-folder a person

In:  faces from `data/`; G, E_cl and E_co see train persons only.
Out: runs/<data>-<preset>-<seed>/ with people.json (who is in which part), generator.pt (weights in
     half precision), and in generator/ log.jsonl, result.json (disentanglement report),
     quadruplets.png and .npz (x, y, t, u: Fig. 1, Fig. 9). The same command goes on after a stop.

Stage 1 optimises one content code an image and one class code a person together with G (latent
optimisation); stage 2 trains the encoders to reproduce those codes from the image. Images are float
NCHW in [0, 1], 64 x 64.

Measured (demo, 3,600 rendered faces, two x86-64 cores, 63 minutes): on 840 images of 70 persons
never seen y 22.3 dB, u 20.3 dB, person from the content code 0.045 (chance 0.014). That of
data/demo, of 2,400 persons (one core, 110 minutes): 24.0 dB, 21.7 dB, 0.038. The preset paper
has not been run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

try:  # what stands above `# main` needs none of these
    from PIL import Image

    import data
    from data import run, synthetic
except ImportError:
    run = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Config:
    """Every setting of the two stages; the defaults are the paper's, a preset replaces some."""

    preset: str = "paper"  # demo | paper; the command takes demo unless it is named
    data: Literal["synthetic", "folder", "celeba"] = "celeba"  # Sec. 4: the faces to load
    root: str = ""  # folder of the photographs
    crop: str = ""  # lfw | centre | celeba | none; empty: chosen by the size of the images
    person_folder: Literal["", "first", "last"] = ""  # which folder below root names the person
    seed: int = 0  # not in the paper: seed of everything random in the training
    split_seed: int = 0  # not in the paper: seed of the draw of persons for the three parts
    train_persons: int = 9177  # Sec. 4: train G on this many persons (0: all that are left)
    validation_persons: int = 100  # Sec. 4: keep this many persons for the validation of F
    target_persons: int = 30  # Sec. 4.2: keep this many persons as targets
    synthetic_persons: int = 370  # not in the paper: render this many persons
    synthetic_images: int = 12  # not in the paper: render this many images of each person
    images: int = 0  # not in the paper: use only the first n images of each person (0: all)
    class_dim: int = 256  # App. A (LORD): size of the class code, one a person
    content_dim: int = 128  # App. A (LORD): size of the content code, one an image
    hidden: tuple[int, ...] = (512, 1024)  # LORD: widths of G's dense layers, 4*4*32 and 4*4*64
    channels: tuple[int, ...] = (256, 256, 256, 256)  # LORD: widths of the AdaIN blocks
    out_channels: int = 64  # LORD: width between the 5x5 and the 7x7 convolution
    encoder_channels: tuple[int, ...] = (64, 128, 256, 256, 256)  # LORD: widths of the convolutions
    encoder_hidden: int = 256  # LORD: width of the encoders' dense layers
    loss: Literal["vgg", "pyramid"] = "vgg"  # LORD: vgg; not in the paper: pyramid, Laplacian L1
    vgg_weights: str = ""  # LORD: a torchvision VGG16 file, or the word download
    noise: float = 1.0  # App. A: sigma of the noise on the content code in training
    content_penalty: float = 0.001  # App. A: lambda of the content code's squared norm
    batch: int = 64  # LORD: images of a step
    epochs: int = 200  # Sec. 4: epochs of stage 1
    lr: float = 3e-4  # LORD: Adam's learning rate of G in stage 1
    lr_end: float = 1e-5  # LORD: end of its cosine
    code_lr: float = 10.0  # LORD: factor on lr for the codes
    encoder_epochs: int = 200  # LORD: epochs of stage 2
    encoder_lr: float = 1e-4  # LORD: Adam's learning rate in stage 2
    encoder_lr_end: float = 1e-4  # LORD: constant; not in the paper: end of a cosine
    code_weight: float = 1e4  # LORD: weight of the mean squared errors of the two codes
    # With swap the content code is free of stage 1's, but noisy and penalised as it was there, so
    # that it holds no more than it must.
    swap: bool = False  # not in the paper: stage 2 encodes the class of another image of the person
    encoder_penalty: float = 0.0  # not in the paper: lambda of stage 2 with swap
    # not in the paper: number format of the products; auto: bfloat16 where it is fast
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def run(self) -> Path:
        """The folder of this run."""
        return Path("runs") / f"{self.data}-{self.preset}-{self.seed}"


# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {
        "data": "synthetic", "train_persons": 0, "validation_persons": 40, "target_persons": 30,
        "class_dim": 96, "content_dim": 96, "hidden": (192, 256), "channels": (128, 96, 48, 16),
        "out_channels": 12, "encoder_channels": (16, 32, 64, 96, 96), "encoder_hidden": 128,
        "loss": "pyramid", "content_penalty": 1e-5, "code_weight": 0.1,
        "epochs": 60, "lr": 1.5e-3, "lr_end": 5e-5, "code_lr": 40.0,
        "encoder_epochs": 20, "encoder_lr": 1e-3, "encoder_lr_end": 2e-5,
        "swap": True, "encoder_penalty": 5e-4,
    },
}
# fmt: on


# Networks (Sec. 2, App. A)


def leaky_adain(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Apply LeakyReLU(0.2), then AdaIN to scale and offset (B, C), to x (B, C, H, W)."""
    x = F.leaky_relu(x, 0.2)
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * scale[:, :, None, None] + offset[:, :, None, None]


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Upsample x by two (nearest), then convolve 3x3: (B, C, H, W) -> (B, O, 2H, 2W)."""
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
        c = config.channels
        h1, h2 = config.hidden
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
        c = config.encoder_channels
        h = config.encoder_hidden
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


def generate_pair(lord: Lord, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Generate y, a copy of x, and u, x's identity with t's content (Sec. 2).

    x, t: (B, 3, 64, 64) in [0, 1], of different persons. Returns y, u of the same shape.
    """
    class_code = lord.class_encoder(x)
    # y = G(E_cl(x), E_co(x))
    y = lord.generator(class_code, lord.content_encoder(x))
    # u = G(E_cl(x), E_co(t))
    u = lord.generator(class_code, lord.content_encoder(t))
    return y, u


# Reconstruction losses


def pyramid_loss(a: Tensor, b: Tensor) -> Tensor:
    """Sum the mean absolute differences of all levels of two Laplacian pyramids, down to 4x4 (not
    in the paper; it needs no weights)."""
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
                conv = nn.Conv2d(previous, width, 3, padding=1)
                name = f"features.{len(layers)}."
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
    """Compute the cosine schedule from start to end; progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def to_float(images: Tensor) -> Tensor:
    """Convert images uint8 (B, 3, H, W) to float in [0, 1], channels_last."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: give uint8, 0 to 255")
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


class Trainer:
    """Both stages over images uint8 (N, 3, 64, 64) of persons int64 (N,), 0..P-1, on one device.

    loss(a, b): the reconstruction loss of two batches of images. `train_epoch` runs an epoch of the
    stage whose turn it is.
    """

    def __init__(self, config: Config, images: Tensor, person: Tensor, loss: Callable) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.images = images
        self.person = person
        self.loss = loss
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
        self.by_person = person.argsort(stable=True)
        self.counts = person.bincount()
        self.starts = self.counts.cumsum(0) - self.counts

    def train_epoch(self, n: int, seed: int, steps: int) -> dict[str, float]:
        """Train the n-th epoch, of stage 1 and then of stage 2, with random numbers of this seed.

        Returns the stage and the mean loss. Raises FloatingPointError(what, indices of the batch's
        images) where a loss or a gradient is not finite.
        """
        c = self.config
        device = self.images.device
        rng = torch.Generator(device).manual_seed(seed)
        if n < c.epochs:
            number, stage, adam = 1, self.stage1, self.adam1
            done, total = n, c.epochs
        else:
            number, stage, adam = 2, self.stage2, self.adam2
            done, total = n - c.epochs, c.encoder_epochs
        values = []
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        order = order.to(device).split(c.batch)
        for i, index in enumerate(order[:steps]):
            with torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bfloat16"):
                loss, penalty = stage(index, (done + i / steps) / total, rng)
            adam.zero_grad()
            (loss + penalty).backward()
            weights = [p for group in adam.param_groups for p in group["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
            values.append(torch.stack([loss.detach(), norm]))
            adam.step()
        table = torch.stack(values).cpu()  # (steps, 2), the one transfer to the host
        for i in (~table.isfinite()).any(1).nonzero()[:1, 0].tolist():
            what = f"step {i + 1}: loss {table[i, 0].item()}, gradient norm {table[i, 1].item()}"
            raise FloatingPointError(what, order[i])
        return {"stage": number, "loss": float(table[:, 0].mean())}

    def stage1(self, index: Tensor, progress: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Compute the loss of latent optimisation on images index (B,), and the codes' penalty.

        progress in [0, 1] sets the learning rates.
        """
        c = self.config
        lr = cosine(c.lr, c.lr_end, progress)
        for group, factor in zip(self.adam1.param_groups, (1, c.code_lr)):
            group["lr"] = lr * factor
        content_code = self.content_codes[index]  # (B, content_dim)
        sigma = torch.randn(content_code.shape, generator=rng, device=content_code.device)
        class_code = self.class_codes[self.person[index]]
        images = self.lord.generator(class_code, content_code + c.noise * sigma)
        loss = self.loss(images, to_float(self.images[index]))
        # App. A: the reconstruction loss, plus lambda times the squared norm of the content code
        return loss, c.content_penalty * content_code.square().sum(1).mean()

    def stage2(self, index: Tensor, progress: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Compute the loss of G on the encoders' codes of images index (B,), and that of the codes.

        progress in [0, 1] sets the learning rate.
        """
        c = self.config
        self.adam2.param_groups[0]["lr"] = cosine(c.encoder_lr, c.encoder_lr_end, progress)
        x = to_float(self.images[index])
        content_code = self.lord.content_encoder(x)
        class_code = self.lord.class_encoder(self.partners(index, rng) if c.swap else x)
        # LORD: both codes of stage 1 are what the encoders learn
        stage1_class = self.class_codes[self.person[index]].detach()
        penalty = c.code_weight * F.mse_loss(class_code, stage1_class)
        if c.swap:
            penalty = penalty + c.encoder_penalty * content_code.square().sum(1).mean()
            sigma = torch.randn(content_code.shape, generator=rng, device=x.device)
            content_code = content_code + c.noise * sigma
        else:
            stage1_content = self.content_codes[index].detach()
            penalty = penalty + c.code_weight * F.mse_loss(content_code, stage1_content)
        return self.loss(self.lord.generator(class_code, content_code), x), penalty

    def partners(self, index: Tensor, rng: torch.Generator) -> Tensor:
        """Draw an image of the same person for each of index (B,): float (B, 3, 64, 64)."""
        person = self.person[index]
        r = torch.rand(len(index), generator=rng, device=index.device)
        place = self.starts[person] + (r * self.counts[person]).long()
        return to_float(self.images[self.by_person[place]])

    def state_dict(self) -> dict:
        """Return what the next epoch needs."""
        modules = {k: getattr(self, k).state_dict() for k in ("lord", "adam1", "adam2")}
        return {**modules, "codes": [self.class_codes.data, self.content_codes.data]}

    def load_state_dict(self, state: dict) -> None:
        for name in ("lord", "adam1", "adam2"):
            getattr(self, name).load_state_dict(state[name])
        for code, saved in zip((self.class_codes, self.content_codes), state["codes"]):
            code.data.copy_(saved)


# How well is it disentangled (Sec. 2)


def psnr(a: Tensor, b: Tensor) -> float:
    """Compute the peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1], their mean."""
    return float((-10 * torch.log10((a - b).square().flatten(1).mean(1).clamp_min(1e-12))).mean())


@torch.no_grad()
def encode(lord: Lord, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Encode images uint8 (N, 3, 64, 64): codes (N, class_dim) and (N, content_dim)."""
    parts = map(to_float, images.split(batch))
    codes = [(lord.class_encoder(x), lord.content_encoder(x)) for x in parts]
    class_code, content_code = zip(*codes)
    return torch.cat(class_code), torch.cat(content_code)


@torch.no_grad()
def decode(lord: Lord, class_code: Tensor, content_code: Tensor, batch: int = 256) -> Tensor:
    """Run G over codes (N, class_dim), (N, content_dim) in batches -> (N, 3, 64, 64) in [0, 1]."""
    pairs = zip(class_code.split(batch), content_code.split(batch))
    return torch.cat([lord.generator(a, b) for a, b in pairs])


def halves(person: Tensor) -> tuple[Tensor, Tensor]:
    """Split every person's images in two: indices to fit a probe on, indices to test it on."""
    indices = [(person == p).nonzero()[:, 0] for p in person.unique()]
    first, second = zip(*(index.tensor_split([-(-len(index) // 2)]) for index in indices))
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def person_probe(code: Tensor, person: Tensor) -> float:
    """Measure the accuracy of a logistic regression that reads the person (N,) from a code (N, D),
    on images that it was not fitted on."""
    # here, as importing it takes seconds that no other stage needs
    from sklearn import linear_model, pipeline, preprocessing

    fit, test = halves(person)
    regression = linear_model.LogisticRegression(max_iter=500)
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    probe.fit(code[fit].cpu().numpy(), person[fit].cpu().numpy())
    return float(probe.score(code[test].cpu().numpy(), person[test].cpu().numpy()))


# content factors large enough to be read linearly
PROBED = ("yaw", "light_x", "exposure", "hair_length", "background_brightness")


def factor_probe(
    code: Tensor, factors: Tensor, unseen_code: Tensor, unseen_factors: Tensor
) -> Tensor:
    """Measure R^2 (K,) of a ridge regression from codes (N, D) to factors (N, K), on codes and
    factors of other persons; NaN for a constant factor."""
    from sklearn import linear_model, metrics, pipeline, preprocessing

    y, unseen_y = factors.cpu().numpy(), unseen_factors.cpu().numpy()
    varies = (y.std(0) > 1e-6) & (unseen_y.std(0) > 1e-6)
    ridge = linear_model.RidgeCV(alphas=[1.0, 10.0, 100.0, 1000.0, 10000.0])
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), ridge)
    probe.fit(code.cpu().numpy(), y[:, varies])
    predicted = probe.predict(unseen_code.cpu().numpy())
    r2 = np.full(y.shape[1], np.nan)
    r2[varies] = metrics.r2_score(unseen_y[:, varies], predicted, multioutput="raw_values")
    return torch.from_numpy(r2)


def report(lord: Lord, images: Tensor, person: Tensor) -> dict[str, float]:
    """Measure the reconstruction's PSNR (dB) and person probes of both codes on unseen persons.

    images: uint8 (N, 3, 64, 64); person: (N,).
    """
    class_code, content_code = encode(lord, images)
    copies = decode(lord, class_code, content_code)
    return {
        "images": len(images),
        "persons": len(person.unique()),
        "psnr_reconstruction": psnr(copies, to_float(images)),
        "person_from_content": person_probe(content_code, person),
        "person_from_class": person_probe(class_code, person),
        "chance": 1 / len(person.unique()),
    }


def draw_pairs(person: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw up to 512 pairs of indices x and t, images of different persons (N,)."""
    rng = torch.Generator().manual_seed(seed)
    x, t = (torch.randint(len(person), (512,), generator=rng) for _ in range(2))
    return x[person[x] != person[t]], t[person[x] != person[t]]


# main


def parse(argv: Sequence[str] | None):
    """Read Config and flags from the command line. Raises run.UsageError."""
    about = "Train the disentangled generator (Sec. 2, App. A)."
    bounds: dict[str, tuple] = {k: (1e-12, 1e9) for k in ("lr", "encoder_lr")}
    for name in ("seed", "split_seed", "train_persons", "images"):
        bounds[name] = (0, run.LARGEST)
    return run.parse(Config, PRESETS, argv, about, bounds=bounds)


def load_generator(path: str | Path, device: str | torch.device = "cpu") -> tuple[Lord, dict]:
    """Load the trained G, E_cl, E_co, in eval mode without gradients, and the file's other content.

    Raises run.UsageError if the file is missing, broken, or of another architecture.
    """
    content = run.load(path, "generator")
    names = {f.name for f in dataclasses.fields(Config)}
    with run.reading(path, "weights and settings do not fit together: train it again"):
        settings: dict[str, Any] = {k: v for k, v in content["config"].items() if k in names}
        lists = {k: tuple(v) for k, v in settings.items() if isinstance(v, list)}
        config = Config(**(settings | lists))
        lord = Lord(config)
        lord.load_state_dict({k: v.float() for k, v in content["lord"].items()})
    return lord.to(device).eval().requires_grad_(False), content


def vgg_state(name: str) -> dict[str, Tensor]:
    """Load VGG16 from a local file, or, only for the word `download`, from PyTorch's server."""
    if name == "download":
        url = "https://download.pytorch.org/models/vgg16-397923af.pth"
        with run.reading(f"--vgg-weights download: {url}", "give a local file"):
            return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
    return read_vgg(name, "--vgg-weights")


def read_vgg(path: str, flag: str) -> dict[str, Tensor]:
    """Read a torchvision VGG16 state dict, also as DataParallel or a training wraps it."""
    with run.reading(path, f"{flag}: name a torchvision VGG16"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {k.removeprefix("module."): v for k, v in state.items()}
        if "features.0.weight" not in state:
            raise ValueError(f"no features.0.weight in it, but {', '.join([*state][:3])}")
    return state


def train(argv: Sequence[str] | None) -> None:
    """Run `python generator.py`: both stages, then the report."""
    config, args = parse(argv)
    device = run.start(args.device)
    file = args.run / "generator.pt"
    precision = run.resolve_precision(config.precision, device)
    config = dataclasses.replace(config, precision=precision)
    with run.rank_0_first():
        overwrite = args.overwrite and run.rank() == 0
        faces, split = data.open_run(config, args.run, overwrite=overwrite)
    pick = data.images_of(faces, split.train, config.images)
    images = faces.images[pick].to(device)
    person = faces.person[pick].unique(return_inverse=True)[1].to(device)
    loss: Callable = pyramid_loss
    if config.loss == "vgg":
        loss = VggLoss(vgg_state(config.vgg_weights)).to(device)
    batch = run.share("--batch", min(config.batch, len(images)))
    trainer = Trainer(dataclasses.replace(config, batch=batch), images, person, loss)
    run.average_gradients(trainer.adam1)
    run.average_gradients(trainer.adam2)
    # Of rendered faces the factors: how a pixel is rounded depends on the number of threads.
    sources = (images,) if faces.identity is None else (faces.identity, faces.content)
    vgg = config.vgg_weights
    settings = dataclasses.asdict(config)
    if vgg not in ("", "download"):
        settings["vgg_weights"] = run.digest(vgg)  # wherever that file lies
    made_of = {
        "config": {k: v for k, v in settings.items() if k != "root"},
        "people": run.read_json(args.run / "people.json")["sha256"],
        "images": run.digest(*sources),
    }
    folder = args.run / "generator"
    training = run.Training(folder, made_of, args.overwrite, "epoch", trainer=trainer)
    steps = max(len(images) // config.batch, 1)
    epochs = config.epochs + config.encoder_epochs
    size = f"{len(images)} images of {len(split.train)} persons"
    if training.done:
        print(f"{file} is there already: only its report is made again (--overwrite trains it)")
    else:
        print(f"generator: {size}, {epochs} epochs of {steps} steps on {device}", flush=True)
    unseen = faces.images[torch.isin(faces.person, torch.tensor(split.validation))]
    unseen = unseen[:: max(len(unseen) // 256, 1)].to(device)
    while not training.done and training.step < epochs:
        seed = run.step_seed(config.seed, training.step, 100_003)
        try:
            values = trainer.train_epoch(training.step, seed, steps)
        except FloatingPointError as error:
            what, index = error.args
            context = training.describe_failure(index, faces.files, pick)
            raise FloatingPointError(f"epoch {training.step + 1}, {what}; {context}") from None
        training.count()
        if values["stage"] == 2 and run.rank() == 0:
            copies = decode(trainer.lord, *encode(trainer.lord, unseen))
            values["psnr_unseen"] = psnr(copies, to_float(unseen))
        training.log(epochs, **values)
    if not training.done and run.rank() == 0:
        names = [faces.names[p] for p in split.train]
        weights = {k: v.half() for k, v in trainer.lord.state_dict().items()}
        run.save(file, "generator", **made_of, commit=run.commit(), train=names, lord=weights)
    run.barrier()
    if run.rank():
        training.end()  # waits for the report
        return
    lord, _ = load_generator(file, device)  # the report is of what was written
    result = evaluate(config, folder, lord, faces, split)
    training.end(**result, **run.machine(device))
    print(json.dumps(result, indent=1))
    print(f"wrote {file} and {folder}: log.jsonl, result.json, quadruplets.png, .npz")


def evaluate(config: Config, folder: Path, lord: Lord, faces, split) -> dict:
    """Write the sheet of quadruplets; return the report on persons never seen in training."""
    device = next(lord.parameters()).device
    unseen = torch.tensor(split.validation + split.target)
    pick = torch.isin(faces.person, unseen).nonzero()[:, 0]
    images = faces.images[pick].to(device)
    person = faces.person[pick]
    result: dict = report(lord, images, person)
    x, t = draw_pairs(person, config.seed)
    if faces.identity is not None:
        result |= compare_with_truth(lord, faces, split, pick, x, t)
    a, b = to_float(images[x[:24]]), to_float(images[t[:24]])
    with torch.no_grad():
        y, u = generate_pair(lord, a, b)
    rows = torch.stack([a, y, b, u], 1).cpu()  # (24, 4, 3, 64, 64)
    run.write(folder / "quadruplets.png", lambda file: sheet(rows, 6).save(file, "PNG"))
    small = (rows * 255).round().to(torch.uint8).numpy()
    run.write(folder / "quadruplets.npz", lambda file: np.savez_compressed(file, quadruplets=small))
    return result


def compare_with_truth(lord: Lord, faces, split, pick: Tensor, x: Tensor, t: Tensor) -> dict:
    """Compare u of rendered faces x and t (n,), among the images pick, with the true u, and probe
    the codes for the factors they were rendered from."""
    device = next(lord.parameters()).device
    person = faces.person[pick]
    content = faces.content[pick]
    truth = synthetic.render(faces.identity[person][x], content[t]).to(device)
    class_code, content_code = encode(lord, faces.images[pick].to(device))
    u = decode(lord, class_code[x], content_code[t])
    result: dict = {"psnr_true_u": psnr(u, to_float(truth))}
    # the probes learn from train persons
    fit = data.images_of(faces, split.train)
    fit_codes = encode(lord, faces.images[fit].to(device))
    probed = [[*synthetic.CONTENT_FACTORS].index(name) for name in PROBED]
    for code_name, a, b in zip(("class", "content"), fit_codes, (class_code, content_code)):
        r2 = factor_probe(a, faces.content[fit], b, content)
        values = [float(r2.nanmean()), *r2[probed].tolist()]
        result[f"content_factors_from_{code_name}"] = {
            k: v for k, v in zip(("mean of all", *PROBED), values) if math.isfinite(v)
        }
    return result


def sheet(rows: Tensor, columns: int, scale: int = 2):
    """Draw a PIL picture of quadruplets (n, 4, 3, H, W) in [0, 1], x y over t u, as in Fig. 9."""
    tiles = F.pad(rows, (1, 1, 1, 1), value=1.0).unflatten(1, (2, 2))  # (n, 2, 2, C, h, w)
    blocks = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (n, C, 2 h, 2 w)
    more = -len(rows) % columns
    blocks = F.pad(blocks, (2, 2, 2, 2, 0, 0, 0, more), value=1.0)
    lines = [torch.cat([*line], 2) for line in blocks.split(columns)]
    grid = torch.cat(lines, 1).permute(1, 2, 0)
    picture = Image.fromarray((grid * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    if run is None:
        raise SystemExit("generator.py: the command needs the folder data/ beside it")
    return run.command("generator.py", train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
