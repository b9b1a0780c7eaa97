"""Figures 1-9 of a run, ROC curves; the distances of Fig. 3.

    python -m results.figures                              # photographs.png, from committed rows
    python -m results.figures draw attacks OUT RUN 2 5 roc  # as `python metrics.py --run RUN` does
    python -m results.figures RUN weak-at doa-4            # Fig. 3 right: by these networks
    python -m results.figures identity RUN FILE.py:NAME    # Fig. 3 left: by a face network

In: logs, rows and the .npz of example images beside them, of any size. What is missing is named.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import embed
import generator
from attacks import scale, square_positions
from data import model, run
from metrics import (
    ERRORS,
    METHODS,
    Run,
    compared_rows,
    measure,
    names,
    pick,
    read_run,
    roc_of,
    under,
)

from .tables import HERE, LABELS, PATCHES, photographs, settings_of, trainings

RUN_FIRST = "run the stage that writes it"
NO_MATPLOTLIB = "not made, matplotlib is not installed (pip install matplotlib)"
COLORS = ("tab:blue", "tab:orange", "tab:green")


def load_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Load arrays of an .npz. Raises run.UsageError."""
    with run.reading(path, RUN_FIRST), np.load(path) as file:
        return [file[key] for key in keys]


def picture(image: np.ndarray) -> np.ndarray:
    """Convert (3, H, W), uint8 or float in [0, 1], to (H, W, 3) float."""
    scaled = image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
    return np.moveaxis(scaled, 0, -1).clip(0, 1)


def canvas(rows: int, columns: int, width: float, height: float, **how: Any) -> tuple[Any, Any]:
    """Make a figure of so many inches and its axes (rows, columns)."""
    from matplotlib.figure import Figure  # which may not be installed

    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def show(axis: Any, image: np.ndarray, title: str = "") -> None:
    """Show a picture without a frame."""
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=8)


def sheet(rows: Sequence[Sequence[tuple[np.ndarray, str]]], side: float = 1.2) -> Any:
    """Show pictures with their titles, row by row."""
    figure, axes = canvas(len(rows), len(rows[0]), side * len(rows[0]), (side + 0.2) * len(rows))
    for line, row in zip(axes, rows):
        for axis, (image, title) in zip(line, row):
            show(axis, image, title)
        for axis in line[len(row) :]:
            axis.set_axis_off()
    return figure


def load_quadruplets(one: Run) -> list[list[np.ndarray]]:
    """Load pictures x, y, t, u."""
    path = one.folder / "generator" / "quadruplets.npz"
    return [[picture(i) for i in four] for four in load_arrays(path, "quadruplets")[0]]


def figure_1(one: Run) -> Any:
    """Show one quadruplet x, y, t, u."""
    x, y, t, u = load_quadruplets(one)[0]
    real = [(x, "x, real"), (y, "y = G(E_cl(x), E_co(x))")]
    return sheet([real, [(t, "t, real, another person"), (u, "u = G(E_cl(x), E_co(t))")]], 2.1)


def figure_9(one: Run, across: int = 4, down: int = 2) -> Any:
    """Show quadruplets, each x y over t u."""
    blocks = []
    for four in load_quadruplets(one)[: across * down]:
        x, y, t, u = (np.pad(i, ((1, 1), (1, 1), (0, 0)), constant_values=1) for i in four)
        blocks.append((np.vstack([np.hstack([x, y]), np.hstack([t, u])]), ""))
    return sheet([blocks[k : k + across] for k in range(0, len(blocks), across)], 1.6)


def curve(training: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Select steps and values of the log of one of `trainings`."""
    lines = [d for d in training.get("log", ()) if d.get(key) is not None and "step" in d]
    return np.array([d["step"] for d in lines]), np.array([float(d[key]) for d in lines])


def smooth(values: np.ndarray) -> np.ndarray:
    """Compute means over a 25th of the curve."""
    window = np.ones(max(1, len(values) // 25))
    if not len(values):
        return values
    return np.convolve(values, window, "same") / np.convolve(values * 0 + 1, window, "same")


def limit(axis: Any, starts: Sequence[float]) -> None:
    """Let a loss that runs away leave the panel."""
    axis.set_ylim(top=min(axis.get_ylim()[1], 3 * max(starts)))


def figure_2(one: Run) -> Any:
    """Plot each method's train and test loss, below it the AU-ROC of the same pairs."""
    logs = trainings(one.folder)
    curves = {m: curve(logs.get(m, {}), "val_loss") for m in METHODS if m != "no-at"}
    curves = {m: c for m, c in curves.items() if len(c[0])}
    if "doa-10" in curves:
        curves.pop("doa-4", None)
    if not curves:
        raise run.UsageError(f"{one.folder}/<method>/log.jsonl with val_loss is missing")
    size = 2.8 * len(curves) + 0.4, 4.6
    figure, axes = canvas(2, len(curves), *size, sharey="row", sharex=True)
    for (above, below), (method, (steps, loss)) in zip(axes.T, curves.items()):
        at, train = curve(logs[method], "loss")
        above.plot(at, smooth(train), color=COLORS[0], label="train")
        above.plot(steps, loss, color=COLORS[1], alpha=0.3, linewidth=0.8)
        above.plot(steps, smooth(loss), color=COLORS[1], label="test, real pairs")
        above.set_title(LABELS.get(method, method), fontsize=10)
        at, area = curve(logs[method], "val_auroc")
        below.plot(at, area, color=COLORS[2], alpha=0.3, linewidth=0.8)
        below.plot(at, smooth(area), color=COLORS[2])
        below.set_xlabel("step")
    limit(axes[0, 0], [loss[0] for _, loss in curves.values()])
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("AU-ROC, real pairs")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def figure_3(one: Run) -> Any:
    """Plot real-real and real-generated distances of different persons, a panel a network."""
    panels = {}
    for path in sorted(one.folder.glob("*/figure3.csv")):
        kinds: dict[str, list[float]] = {}
        with run.reading(path, RUN_FIRST), open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                kinds.setdefault(row["kind"], []).append(float(row["distance"]))
        panels[path.parent.name] = kinds
    if not panels:
        raise run.UsageError(f"{one.folder}/<method>/figure3.csv is missing")
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
    """Name the .npz of an attack, of the first method that has it; ours comes first."""
    every = [one.folder / m / "attacks" / f"{name}.npz" for m in [*names([one]), "<method>"]]
    return next((path for path in every if path.exists()), every[-1])


def figure_4(one: Run, across: int = 4) -> Any:
    """Show targets over the images made from noise (distal attack)."""
    targets, made, distance = load_arrays(first(one, "distal"), "anchor", "attacked", "distance")
    above = [(picture(target), "target") for target in targets[:across]]
    below = [(picture(i[0]), f"from noise\ndistance {d[0]:.2f}") for i, d in zip(made, distance)]
    return sheet([above, below[:across]])


def figure_5(one: Run) -> Any:
    """Plot weak AT's test loss by the steps of its inner attack; a dot where it stops early."""
    curves = {}
    for method, training in trainings(one.folder).items():
        made, points = settings_of(training), curve(training, "val_loss")
        if method.startswith("weak-at") and made and len(points[0]):
            curves[made["attack_steps"], made["attack_alpha"]] = points
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
    """Show the masks, in black over a face they were used on."""
    row = []
    for name in [a for a in PATCHES if first(one, a).exists()] or PATCHES[:1]:
        mask, faces = load_arrays(first(one, name), "mask", "clean")
        mask = mask[0] if mask.ndim == 3 else mask
        title = name.replace("_", " ") + ", location varies" * (name == "square")
        title += f"\n{mask.sum()} pixels, {mask.mean():.1%}"
        row.append((picture(faces[0, 0]) * ~mask[..., None], title))
    return sheet([row], 2.0)


def figure_7(one: Run) -> Any:
    """Show the square's search region, and how often each place was best, over the mean face."""
    from matplotlib.patches import Rectangle

    placed: dict[str, list[tuple[int, int]]] = {}
    for m in names([one]):
        rows = pick(under(one.methods[m], 1, 1), "square", "intruder")
        placed |= {m: [(r.row, r.col) for r in rows]} if any(r.row >= 0 for r in rows) else {}
    if not placed:
        raise run.UsageError(f"{one.folder}/<method>/attacks/square.csv has no places")
    method, places = next(iter(placed.items()))
    faces = load_arrays(one.folder / method / "attacks/square.npz", "clean")[0]
    face = np.mean([picture(i) for i in faces.reshape(-1, *faces.shape[-3:])], 0)
    size, starts = np.array(face.shape[:2]), np.array(places)
    side = np.array([scale(10, n) for n in size])
    config = one.methods[method]["square"].sidecar.get("config", {})
    stride = config.get("square_stride", 5) * size / 64
    low, high = starts.min(0), starts.max(0)
    cells = np.rint((starts - low) / stride).astype(int)
    times = np.zeros(cells.max(0) + 1)
    np.add.at(times, tuple(cells.T), 1)
    figure, axes = canvas(1, 1, 4.2, 3.4)
    axis = axes[0, 0]
    show(axis, face, f"centres of the {len(starts)} best squares, {LABELS.get(method, method)}")
    middle = (side - 1) / 2
    (top, left), (bottom, right) = low + middle - stride / 2, high + middle + stride / 2
    how = {"extent": (left, right, bottom, top), "cmap": "viridis", "alpha": 0.75, "vmin": 0}
    figure.colorbar(axis.imshow(times, **how), ax=axis, label="times best")
    searched = np.array(square_positions(5, *size))
    (top, left), (height, width) = searched.min(0), np.ptp(searched, 0) + side
    frame: dict[str, Any] = {"fill": False, "color": "yellow", "linewidth": 2}
    axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, **frame))
    axis.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
    return figure


def figure_8(one: Run, down: int = 2, across: int = 5) -> Any:
    """Show targets, their universal patches, and these on intruders not trained on."""
    arrays = load_arrays(first(one, "eye_patch"), "anchor", "pattern", "attacked")
    titles = ["target", "universal patch", "patched intruders", *[""] * across]
    rows = []
    for target, patch, attacked in zip(*(a[:down] for a in arrays)):
        pictures = [picture(i) for i in (target, patch, *attacked[:across])]
        rows.append([*zip(pictures, titles)])
        titles = [""] * len(titles)
    return sheet(rows)


def figure_roc(one: Run, across: int = 3) -> Any:
    """Plot TAR against FAR, a panel a method; faint where fewer than ten intruders pass."""
    every = ("clean", *PATCHES, "worst", "rule", "certified")
    panels: dict[str, dict[str, tuple]] = {}
    for method, attacks in names([one]).items():
        for name in (a for a in every if a in attacks):
            genuine, intruders = compared_rows(under(one.methods[method], 1, 1), name)
            if genuine and intruders:
                tar, far = (counts / counts[-1] for counts in roc_of(genuine, intruders))
                panels.setdefault(method, {})[name] = far, tar, ERRORS / len(intruders)
    if not panels:
        raise run.UsageError(f"{one.folder} has no clean rows with mirroring and selection")
    down, across = -(-len(panels) // across), min(across, len(panels))
    figure, axes = canvas(down, across, 3.6 * across, 3.2 * down, sharey=True)
    for axis, (method, curves) in zip(axes.flat, panels.items()):
        for name, (far, tar, least) in curves.items():
            number = every.index(name)
            how = {"color": f"C{number}", "linestyle": "-" if number < 5 else "--"}
            axis.plot(far, tar, alpha=0.3, linewidth=0.8, **how)
            sure = far >= least
            axis.plot(far[sure], tar[sure], label=name.replace("_", " "), **how)
        axis.set(xscale="log", xlabel="FAR: intruders that pass", ylim=(0, 1.02))
        axis.set_title(LABELS.get(method, method), fontsize=10)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for line in axes:
        line[0].set_ylabel("TAR: genuine images that pass")
    return figure


def figure_photographs(attacks: Sequence[str] = ("clean", "eyeglasses", "worst")) -> Any:
    """Plot each method's AU-ROC by the number of photographs of each train person; 95 % bars."""
    figure, axes = canvas(1, len(attacks), 3.0 * len(attacks), 3.2, sharey=True)
    at = photographs()
    methods = names([one for runs in at.values() for one in runs])
    several = [m for m in methods if sum(any(m in r.methods for r in v) for v in at.values()) > 1]
    for color, method in enumerate(several):
        for axis, attack in zip(axes[0], attacks):
            each = {k: m for k, runs in at.items() if (m := measure(runs, method, attack))}
            mean = np.array([m["auroc"] for m in each.values()])
            ends = np.array([m["interval"] for m in each.values()]).T
            how = {"label": LABELS[method], "color": f"C{color}", "capsize": 2, "marker": "o"}
            x = np.array([*each]) * (1 + 0.02 * color)  # bars beside each other
            axis.errorbar(x, mean, abs(ends - mean), markersize=3, linewidth=1, **how)
            axis.set(xscale="log", xticks=[*at], xticklabels=[*at], title=attack)
            axis.minorticks_off()
    figure.supxlabel("photographs of each train person", fontsize=10)
    axes[0, 0].set_ylabel("AU-ROC")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


FIGURES = {str(n): globals()[f"figure_{n}"] for n in range(1, 10)}
FIGURES["roc"] = figure_roc


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    buffer = io.BytesIO()
    how = {"bbox_inches": "tight", "pad_inches": 0.05, "pil_kwargs": {"optimize": True}}
    figure.savefig(buffer, format="png", **how)
    run.write(path, buffer.getvalue())


def draw(one: Run, folder: Path, wanted: Sequence[str]) -> list[str]:
    """Write these figures (none named: all) into the folder; return a line for all not made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return [f"figures: {NO_MATPLOTLIB}"]
    missing: dict[str, list[str]] = {}
    for name in wanted or FIGURES:
        if name not in FIGURES:
            raise run.UsageError(f"--figures {name}: choose {', '.join(FIGURES)} or none")
        try:
            save(FIGURES[name](one), folder / f"{'figure' * name.isdigit()}{name}.png")
        except run.UsageError as error:
            reason = str(error).removeprefix(f"{one.folder}/").removesuffix(f": {RUN_FIRST}")
            missing.setdefault(reason, []).append(name)
    line = "; ".join(f"{', '.join(which)} ({reason})" for reason, which in missing.items())
    return [f"figures not made: {line}"] if line else []


# Fig. 3


def load_people(folder: Path) -> tuple[data.Faces, data.Split, dict]:
    """Load the faces of a run, their split and what run.json says. Raises run.UsageError."""
    made = run.read_json(folder / "run.json", "give the folder of a training")
    root, crop = made["root"] or None, made["crop"] or None
    faces = data.load(made["data"], root, crop=crop, **made["options"])
    return faces, data.read_manifest(folder / "people.json", faces), made


def write_distances(path: Path, kinds: Mapping[str, Tensor]) -> None:
    """Write the distances that figure_3 reads."""
    rows = [f"{kind},{d:.7g}\n" for kind, values in kinds.items() for d in values.tolist()]
    run.write(path, "".join(["kind,distance\n", *rows]))


def measure_distances(folder: Path, method: str, pairs: int = 500) -> None:
    """Measure by F how far t lies from another person's real x, and from u (Fig. 3 right).

    Of target persons, into <method>/figure3.csv. Raises run.UsageError.
    """
    faces, split, made = load_people(folder)
    lord, _ = generator.load_generator(folder / "generator.pt")
    f = embed.load_embedding(folder / method / "embedding.pt")
    persons = embed.sampler_of(faces, data.images_of(faces, split.target), torch.device("cpu"))
    x, _, t = persons.draw(pairs, 1, torch.Generator().manual_seed(made["seed"]))
    class_codes, content_codes = generator.encode(lord, persons.images)
    u = generator.decode(lord, class_codes[x], content_codes[t[:, 0]])
    real = embed.features(f, persons.images)
    generated = embed.features(f, (u * 255).round().to(torch.uint8))
    kinds = {"real-real": real[x], "real-generated": generated}
    kinds = {k: embed.squared_distance(real[t[:, 0]], v).sqrt() for k, v in kinds.items()}
    write_distances(folder / method / "figure3.csv", kinds)


def compare_identity(
    network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, t: Tensor, u: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Compare y and u with x and t, all (N, 3, H, W), by a network that saw no generated image.

    Returns mean distances, shares (1/2 by chance) in which u lies nearer to x than to t, as it has
    x's identity, and nearer to t than x does, as a hard negative; and the distances (4, N) x-y,
    x-u, t-u and t-x, of which Fig. 3 shows the last two.
    """
    f = [torch.cat([network(part) for part in images.split(256)]) for images in (x, y, t, u)]
    pairs = (f[0], f[1]), (f[0], f[3]), (f[2], f[3]), (f[2], f[0])
    d = torch.stack([embed.squared_distance(a, b).sqrt() for a, b in pairs])
    values = dict(zip(("x_y", "x_u", "t_u", "t_x"), d.mean(1).tolist()))
    values["y_nearer_to_x_than_t"] = float((d[0] < d[3]).float().mean())
    values["u_nearer_to_x_than_to_t"] = float((d[1] < d[2]).float().mean())
    values["u_nearer_to_t_than_x_is"] = float((d[2] < d[3]).float().mean())
    return values, d


def measure_identity(folder: Path, text: str) -> None:
    """Ask a face network, FILE.py:NAME, about y and u of persons that G never saw (Fig. 3 left).

    Into generator/identity-<name>.json and <name>/figure3.csv. Raises run.UsageError.
    """
    flag, name, cpu = f"identity {text}", model.model_name(text), torch.device("cpu")
    network, _ = model.load_model(flag, text, cpu)
    faces, split, _ = load_people(folder)
    lord, content = generator.load_generator(folder / "generator.pt")
    judged = data.images_of(faces, split.validation + split.target)
    if seen := {faces.names[p] for p in faces.person[judged].tolist()} & {*content["train"]}:
        raise run.UsageError(f"{folder}/generator.pt: trained on {min(seen)}: name another run")
    pairs = generator.draw_pairs(faces.person[judged], 0)
    x, t = (generator.to_float(faces.images[judged[i]]) for i in pairs)
    with torch.no_grad(), model.user_code(flag, "fails on the photographs"):
        parts = [generator.generate_pair(lord, *both) for both in zip(x.split(64), t.split(64))]
        y, u = (torch.cat(images) for images in zip(*parts))
        values, d = compare_identity(network, x, y, t, u)
    result = {"images": len(x), **values, **run.machine(cpu)}
    run.write(folder / "generator" / f"identity-{name}.json", result)
    write_distances(folder / name / "figure3.csv", {"real-generated": d[2], "real-real": d[3]})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    match [*(argv or ())]:
        case []:
            try:
                save(figure_photographs(), HERE / "photographs.png")
            except ImportError:
                raise run.UsageError(f"photographs.png: {NO_MATPLOTLIB}") from None
        case ["draw", rows, out, folder, *wanted]:
            for line in draw(read_run(folder, rows), Path(out) / "figures", wanted):
                print(line)
        case ["identity", folder, text]:
            measure_identity(Path(folder), text)
        case [folder, *methods]:
            for method in methods:
                measure_distances(Path(folder), method)
    return 0


if __name__ == "__main__":
    raise SystemExit(run.command("results.figures", main, sys.argv[1:]))
