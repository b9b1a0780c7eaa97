"""Figures 1-9 of a run, and the distances of Fig. 3.

    python metrics.py --run RUN --figures 2 5       # draws them into RUN/figures
    python -m results.figures RUN weak-at doa-4     # measures Fig. 3's distances by these networks

In: logs, rows and the .npz of example images beside them. What is missing is said, not drawn.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import run
from metrics import Run, columns, names, pick, threshold, under

from .tables import LABELS, read_log, settings_of

RUN_FIRST = "run the stage that writes it"
COLORS = ("tab:blue", "tab:orange", "tab:green")


def load_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of an .npz. Raises run.UsageError."""
    with run.reading(path, RUN_FIRST), np.load(path) as file:
        return [file[key] for key in keys]


def picture(image: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 or float in [0, 1] -> (H, W, 3) float."""
    scale = 255 if image.dtype == np.uint8 else 1
    return np.moveaxis(image.astype(np.float64) / scale, 0, -1).clip(0, 1)


def canvas(rows: int, columns: int, width: float, height: float, **how: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return made, made.subplots(rows, columns, squeeze=False, **how)


def show(axis: Any, image: np.ndarray, title: str = "") -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=8)


def sheet(rows: Sequence[Sequence[tuple[np.ndarray, str]]], side: float = 1.2) -> Any:
    """Pictures with their titles, row by row."""
    figure, axes = canvas(len(rows), len(rows[0]), side * len(rows[0]), (side + 0.2) * len(rows))
    for line, row in zip(axes, rows):
        for axis, (image, title) in zip(line, row):
            show(axis, image, title)
        for axis in line[len(row) :]:
            axis.set_axis_off()
    return figure


def quadruplets_of(one: Run) -> list[list[np.ndarray]]:
    """Pictures x, y, t, u."""
    path = one.folder / "generator" / "quadruplets.npz"
    return [[picture(i) for i in four] for four in load_arrays(path, "quadruplets")[0]]


def figure_1(one: Run) -> Any:
    """One quadruplet x, y, t, u."""
    x, y, t, u = quadruplets_of(one)[0]
    real = [(x, "x, real"), (y, "y = G(E_cl(x), E_co(x))")]
    return sheet([real, [(t, "t, real, another person"), (u, "u = G(E_cl(x), E_co(t))")]], 2.1)


def figure_9(one: Run, across: int = 6, down: int = 4) -> Any:
    """Quadruplets, each x y over t u."""
    blocks = []
    for four in quadruplets_of(one)[: across * down]:
        x, y, t, u = (np.pad(i, ((1, 1), (1, 1), (0, 0)), constant_values=1) for i in four)
        blocks.append((np.vstack([np.hstack([x, y]), np.hstack([t, u])]), ""))
    return sheet([blocks[k : k + across] for k in range(0, len(blocks), across)], 1.6)


def curve(one: Run, method: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a log."""
    lines = read_log(one.folder / method / "log.jsonl")
    lines = [d for d in lines if d.get(key) is not None and "step" in d]
    return np.array([d["step"] for d in lines]), np.array([float(d[key]) for d in lines])


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over a 25th of the curve."""
    window = np.ones(max(1, len(values) // 25))
    return np.convolve(values, window, "same") / np.convolve(values * 0 + 1, window, "same")


def limit(axis: Any, starts: Sequence[float]) -> None:
    """A loss that runs away leaves the panel."""
    axis.set_ylim(top=min(axis.get_ylim()[1], 3 * max(starts)))


def figure_2(one: Run) -> Any:
    """Train and test loss of each method, one panel a method on one scale."""
    doa = "doa-10" if len(curve(one, "doa-10", "loss")[0]) else "doa-4"
    methods = ("ours", "ours-transfer", doa, "weak-at")
    found = {m: c for m in methods if len((c := curve(one, m, "val_loss"))[0])}
    if not found:
        raise run.UsageError(f"{one.folder}/<method>/log.jsonl with val_loss is missing")
    figure, axes = canvas(1, len(found), 3.1 * len(found) + 0.4, 3.0, sharey=True)
    for axis, (method, (steps, loss)) in zip(axes.flat, found.items()):
        at, train = curve(one, method, "loss")
        axis.plot(at, smooth(train), color=COLORS[0], label="train")
        axis.plot(steps, loss, color=COLORS[1], alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth(loss), color=COLORS[1], label="test, real pairs")
        axis.set_title(LABELS.get(method, method), fontsize=10)
        axis.set_xlabel("step")
    limit(axes[0, 0], [loss[0] for _, loss in found.values()])
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def figure_3(one: Run) -> Any:
    """Distances of real-real and real-generated pairs of different persons, one panel a network."""
    panels = {}
    for path in sorted(one.folder.glob("*/attacks/figure3.csv")):
        kinds: dict[str, list[float]] = {}
        with run.reading(path, RUN_FIRST), open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                kinds.setdefault(row["kind"], []).append(float(row["distance"]))
        if kinds:
            panels[path.parent.parent.name] = kinds
    if not panels:
        raise run.UsageError(f"{one.folder}/<method>/attacks/figure3.csv is missing")
    figure, axes = canvas(1, len(panels), 3.6 * len(panels), 3.0)
    for axis, (method, kinds) in zip(axes.flat, panels.items()):
        bins = np.linspace(0, max(max(v) for v in kinds.values()), 41)
        for color, (kind, values) in zip(COLORS, sorted(kinds.items(), reverse=True)):
            label = f"{kind}, median {np.median(values):.2f}, n = {len(values)}"
            axis.hist(values, bins, density=True, alpha=0.5, color=color, label=label)
            line = {"color": color, "linestyle": "--", "linewidth": 1}
            axis.axvline(np.median(values), ymax=0.78, **line)
        axis.set_title(f"measured by {LABELS.get(method, method)}", fontsize=10)
        axis.set(xlabel="distance, different persons", yticks=[])
        axis.legend(fontsize=7, frameon=False, loc="upper left")
        axis.set_ylim(top=axis.get_ylim()[1] * 1.25)
    return figure


def first(one: Run, name: str) -> Path:
    """The .npz of an attack, of the first method that has it; ours comes first."""
    every = [one.folder / m / "attacks" / f"{name}.npz" for m in [*names([one]), "ours"]]
    return next((path for path in every if path.exists()), every[-1])


def figure_4(one: Run, across: int = 8) -> Any:
    """Targets over the images made from noise (distal attack)."""
    path = first(one, "distal")
    targets, made, distance = load_arrays(path, "anchor", "attacked", "distance")
    attacks = under(one.methods.get(path.parent.parent.name, {}), 1, 1)
    clean = columns(pick(attacks, "clean", "genuine"))[0]
    above, below = [], []
    for target, image, d in zip(targets[:across], made[:, 0], distance[:, 0]):
        verdict = ("\npasses" if d < threshold(clean) else "\nis refused") if clean else ""
        above.append((picture(target), "target"))
        below.append((picture(image), f"from noise\ndistance {d:.2f}{verdict}"))
    return sheet([above, below])


def figure_5(one: Run) -> Any:
    """Test loss of weak adversarial training for the step settings; a dot at the lowest, where it
    would stop early."""
    curves = {}
    for path in one.folder.glob("weak-at*/log.jsonl"):
        made, found = settings_of(path.parent), curve(one, path.parent.name, "val_loss")
        if made and len(found[0]):
            curves[made["attack_steps"], made["attack_alpha"]] = found
    if not curves:
        raise run.UsageError(f"{one.folder}/weak-at-<4|10|20>/log.jsonl is missing")
    figure, axes = canvas(1, 1, 5.2, 3.4)
    for color, ((count, size), (steps, loss)) in enumerate(sorted(curves.items())):
        low, style = smooth(loss), {"color": f"C{color}"}
        axes[0, 0].plot(steps, low, label=f"{count} steps of {size:g}/255", **style)
        axes[0, 0].plot(steps, loss, alpha=0.25, linewidth=0.8, **style)
        axes[0, 0].plot(steps[low.argmin()], low.min(), "o", **style)
    limit(axes[0, 0], [loss[0] for _, loss in curves.values()])
    axes[0, 0].set(xlabel="step", ylabel="test loss, real pairs (dot: lowest)")
    axes[0, 0].set_title("Weak adversarial training")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def figure_6(one: Run) -> Any:
    """The three masks, in black over a face they were used on."""
    row = []
    for name in ("eyeglasses", "square", "eye_patch"):
        mask, faces = load_arrays(first(one, name), "mask", "clean")
        mask = mask[0] if mask.ndim == 3 else mask
        title = name.replace("_", " ") + ", location varies" * (name == "square")
        title += f"\n{mask.sum()} pixels, {mask.mean():.1%}"
        row.append((picture(faces[0, 0]) * ~mask[..., None], title))
    return sheet([row], 2.0)


def figure_7(one: Run) -> Any:
    """The square's search region, and how often each position won, over the mean face, if any."""
    from matplotlib.patches import Rectangle

    method = next((m for m in names([one]) if "square" in one.methods[m]), "")
    rows = pick(under(one.methods.get(method, {}), 1, 1), "square", "intruder")
    starts = np.array([(r.row, r.col) for r in rows if r.row >= 0])
    if not len(starts):
        raise run.UsageError(f"{one.folder}/<method>/attacks/square.csv has no places")
    face = np.full((64, 64, 3), 0.8)
    if first(one, "square").exists():
        faces = load_arrays(first(one, "square"), "clean")[0]
        face = np.mean([picture(i) for i in faces.reshape(-1, *faces.shape[-3:])], 0)
    figure, axes = canvas(1, 2, 6.6, 3.2)
    show(axes[0, 0], face, "search region")
    region = Rectangle((14.5, 14.5), 30, 30, fill=False, color="yellow", linewidth=2)
    axes[0, 0].add_patch(region)
    low, high, places = starts.min(0), starts.max(0), np.unique(starts)
    stride = int(np.diff(places).min()) if len(places) > 1 else 5
    counts = np.zeros((high - low) // stride + 1)
    np.add.at(counts, tuple(((starts - low) // stride).T), 1)
    title = f"centres of the {len(starts)} best squares, {LABELS.get(method, method)}"
    show(axes[0, 1], face, title)
    (top, left), (bottom, right) = low + 4.5 - stride / 2, high + 4.5 + stride / 2
    seen = {"extent": (left, right, bottom, top), "cmap": "viridis", "alpha": 0.75, "vmin": 0}
    heat = axes[0, 1].imshow(counts, **seen)
    axes[0, 1].set(xlim=(-0.5, 63.5), ylim=(63.5, -0.5))
    figure.colorbar(heat, ax=axes[0, 1], label="times best")
    return figure


def figure_8(one: Run, down: int = 4, across: int = 5) -> Any:
    """Targets, their universal patches, and these on intruders they were not trained on."""
    arrays = load_arrays(first(one, "eye_patch"), "anchor", "pattern", "attacked")
    titles = ["target", "universal patch", "patched intruders", *[""] * across]
    rows = []
    for target, patch, attacked in zip(*(a[:down] for a in arrays)):
        pictures = [picture(i) for i in (target, patch, *attacked[:across])]
        rows.append([*zip(pictures, titles)])
        titles = [""] * len(titles)
    return sheet(rows)


def draw(one: Run, folder: Path, numbers: Sequence[int] = range(1, 10)) -> list[str]:
    """Figures of these numbers as PNG into the folder; returns a line for each not made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ["figures: not made, matplotlib is not installed (pip install matplotlib)"]
    told = []
    for number in numbers:
        try:
            buffer = io.BytesIO()
            figure = globals()[f"figure_{number}"](one)
            figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)
            run.write(folder / f"figure{number}.png", buffer.getvalue())
        except run.UsageError as error:
            told.append(f"figure {number}: not made, {error}")
    return told


def measure_figure_3(folder: Path, method: str, pairs: int = 500) -> None:
    """Fig. 3: distances by F from t to an image of another target person, once the real x, once u
    with x's identity and t's content; into <method>/attacks/figure3.csv. Raises run.UsageError."""
    import torch

    import data
    import embed
    import generator

    held = run.read_json(folder / "run.json", "give the folder of a training")
    crop, options = held["crop"] or None, held["options"]
    faces = data.load(held["data"], held["root"] or None, crop=crop, **options)
    split = data.read_manifest(folder / "people.json", faces)
    lord, _ = generator.load_generator(folder / "generator.pt")
    f = embed.load_embedding(folder / method / "embedding.pt")
    persons = embed.sampler_of(faces, split.target, torch.device("cpu"))
    x, _, t = persons.draw(pairs, 1, torch.Generator().manual_seed(held["seed"]))
    class_codes, content_codes = generator.encode(lord, persons.images)
    u = generator.decode(lord, class_codes[x], content_codes[t[:, 0]])
    real, made = (
        embed.features(f, persons.images),
        embed.features(f, (u * 255).round().to(torch.uint8)),
    )
    lines = ["kind,distance\n"]
    for kind, other in (("real-real", real[x]), ("real-generated", made)):
        distances = embed.squared_distance(real[t[:, 0]], other).sqrt().tolist()
        lines += [f"{kind},{d:.7g}\n" for d in distances]
    run.write(folder / method / "attacks" / "figure3.csv", "".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    folder, *methods = argv or ("",)
    for method in methods:
        measure_figure_3(Path(folder), method)
    return 0


if __name__ == "__main__":
    raise SystemExit(run.command("results.figures", main, sys.argv[1:]))
