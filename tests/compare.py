"""Eyeglasses by attacks.py, by ART and by torchattacks: same pairs, passes, start; interleaved.

    pip install -r requirements-bench.txt
    python -m tests.compare LFW FILE.py:NAME 150 --out results/facenet128/others.csv
    python -m tests.compare LFW RUN/METHOD/embedding.pt 64 --out ... (appends)

A row an attack: passes through the model, mean distance (as reached; float32), CPU seconds (median
of the rounds). Of ART and torchattacks the best of the steps 4, 8 and 16 of 255, chosen before the
timed rounds.
"""

import argparse
import csv
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import attacks as a
import data
import embed as e
from data import model

from .bench import installed_art

STEPS = (4 / 255, 8 / 255, 16 / 255)


def ours(optimiser: str, passes: int, embed: Callable, x: Tensor, anchor: Tensor, mask: Tensor):
    how = {"optimiser": optimiser, "lr": 0.2, "decay": True, "restarts": 1}
    return a.tanh_attack(embed, x, anchor, mask, a.Effort(passes, **how)).images


def by_art(step: float, passes: int, embed: Callable, x: Tensor, anchor: Tensor, mask: Tensor):
    """What a user of ART 1.20 writes: `installed_art`, and the model as a Module."""

    class Model(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return embed(images)

    masks = mask.expand(len(x), 3, -1, -1)
    return installed_art(Model(), anchor, x, masks, passes, step, targeted=True)()


def by_torchattacks(
    step: float, passes: int, embed: Callable, x: Tensor, anchor: Tensor, mask: Tensor
):
    """What a user of torchattacks 3.5 writes; the sign of the gradient is that of the distance."""
    import torchattacks

    class Model(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            d = (embed(torch.where(mask, images, x)) - anchor).square().sum(1)
            return torch.stack([-d, torch.zeros_like(d)], 1) / d.detach().mean()

    attack = torchattacks.PGD(Model(), eps=1.0, alpha=step, steps=passes, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    return torch.where(mask, attack(x, torch.zeros(len(x), dtype=torch.long)), x)


def pairs_of(root: str, size: int, many: int) -> tuple[Tensor, Tensor]:
    """Intruders and the photograph each impersonates, (many, 3, size, size): persons in turn."""
    faces = data.load("folder", root, size=size)
    first = [int((faces.person == p).nonzero()[0]) for p in range(2 * many)]
    images = a.to_float(faces.images[first])
    return images[:many], images[many:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("root")
    parser.add_argument("model")
    parser.add_argument("size", type=int)
    parser.add_argument("--name", default="", help="what the rows call the model")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, nargs="+", default=[30, 80])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.model.endswith(".pt"):
        embed = e.load_embedding(args.model)
    else:
        embed, _ = model.load_model("--model", args.model, torch.device("cpu"))
    x, targets = pairs_of(args.root, args.size, args.pairs)
    with torch.no_grad():
        anchor = embed(targets)
    mask, rows = a.eyeglasses_mask(args.size, args.size), []

    def reached(images: Tensor) -> float:
        assert torch.equal(images[:, :, ~mask], x[:, :, ~mask]), "changed outside the mask"
        assert images.min() >= 0 and images.max() <= 1
        return float(a.distances(embed, images, anchor).mean())

    for passes in args.passes:
        runs = {"this, sign": (functools.partial(ours, "sign", passes), 2)}
        runs["this, Adam as in the demo"] = functools.partial(ours, "adam", passes), 2
        for name, attack, lines in (("ART", by_art, 20), ("torchattacks", by_torchattacks, 10)):
            every = {s: functools.partial(attack, s, passes) for s in STEPS}
            best = min(every, key=lambda s: reached(every[s](embed, x, anchor, mask)))
            runs[f"{name}, step {best * 255:.0f}/255"] = every[best], lines
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        found = {}
        for _ in range(args.rounds):
            for name, (attack, _) in runs.items():
                begin = time.process_time()
                images = attack(embed, x, anchor, mask)
                seconds[name].append(time.process_time() - begin)
                found[name] = reached(images)
        for name, (_, lines) in runs.items():
            spent = f"{statistics.median(seconds[name]):.1f}"
            told = [args.name or args.model, args.pairs, passes, name, lines]
            rows.append([*told, f"{found[name]:.4f}", spent, args.rounds])
            print(*rows[-1], sep="  ", flush=True)
    if args.out:
        new = not args.out.exists()
        with open(args.out, "a", newline="") as file:
            head = ["model", "pairs", "passes", "attack", "lines", "distance", "seconds", "n"]
            csv.writer(file, lineterminator="\n").writerows([head] * new + rows)


if __name__ == "__main__":
    main()
