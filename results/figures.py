"""Figures 1-9 of a run, ROC curves, the certificate's two; the distances of Fig. 3.

    python metrics.py --run RUN --figures 2 5 roc   # draws them into RUN/figures
    python -m results.figures RUN weak-at doa-4     # measures Fig. 3's distances by these networks
    python -m results.figures                       # photographs.png, from the rows in results/

In: logs, rows and the .npz of example images beside them, of any size. What is missing is said.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import run
from metrics import (
    ERRORS,
    FIGURES,
    METHODS,
    Row,
    Run,
    columns,
    measure,
    names,
    pairs,
    pick,
    roc,
    sides,
    threshold,
    under,
)

from .tables import HERE, LABELS, PATCHES, photographs, settings_of, trainings

RUN_FIRST = "run the stage that writes it"
NO_MATPLOTLIB = "not made, matplotlib is not installed (pip install matplotlib)"
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


def curve(training: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the log of one of `trainings`."""
    lines = [d for d in training.get("log", ()) if d.get(key) is not None and "step" in d]
    return np.array([d["step"] for d in lines]), np.array([float(d[key]) for d in lines])


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over a 25th of the curve."""
    window = np.ones(max(1, len(values) // 25))
    if not len(values):
        return values
    return np.convolve(values, window, "same") / np.convolve(values * 0 + 1, window, "same")


def limit(axis: Any, starts: Sequence[float]) -> None:
    """A loss that runs away leaves the panel."""
    axis.set_ylim(top=min(axis.get_ylim()[1], 3 * max(starts)))


def figure_2(one: Run) -> Any:
    """Train and test loss of each method, below it the AU-ROC of the same pairs, one column a
    method on one scale."""
    trained = [m for m in METHODS if m != "no-at" and not m.endswith("-masked")]
    logs = trainings(one.folder)
    found = {m: c for m in trained if len((c := curve(logs.get(m, {}), "val_loss"))[0])}
    if "doa-10" in found:
        found.pop("doa-4", None)
    if not found:
        raise run.UsageError(f"{one.folder}/<method>/log.jsonl with val_loss is missing")
    size = 2.8 * len(found) + 0.4, 4.6
    figure, axes = canvas(2, len(found), *size, sharey="row", sharex=True)
    for (above, below), (method, (steps, loss)) in zip(axes.T, found.items()):
        at, train = curve(logs[method], "loss")
        above.plot(at, smooth(train), color=COLORS[0], label="train")
        above.plot(steps, loss, color=COLORS[1], alpha=0.3, linewidth=0.8)
        above.plot(steps, smooth(loss), color=COLORS[1], label="test, real pairs")
        above.set_title(LABELS.get(method, method), fontsize=10)
        at, area = curve(logs[method], "val_auroc")
        below.plot(at, area, color=COLORS[2], alpha=0.3, linewidth=0.8)
        below.plot(at, smooth(area), color=COLORS[2])
        below.set_xlabel("step")
    limit(axes[0, 0], [loss[0] for _, loss in found.values()])
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("AU-ROC, real pairs")
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
    every = [one.folder / m / "attacks" / f"{name}.npz" for m in [*names([one]), "<method>"]]
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
    for method, training in trainings(one.folder).items():
        if not method.startswith("weak-at"):
            continue
        made, found = settings_of(training), curve(training, "val_loss")
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
    """The masks, in black over a face they were used on."""
    row = []
    for name in [a for a in PATCHES if first(one, a).exists()] or PATCHES[:1]:
        mask, faces = load_arrays(first(one, name), "mask", "clean")
        mask = mask[0] if mask.ndim == 3 else mask
        title = name.replace("_", " ") + ", location varies" * (name == "square")
        title += f"\n{mask.sum()} pixels, {mask.mean():.1%}"
        row.append((picture(faces[0, 0]) * ~mask[..., None], title))
    return sheet([row], 2.0)


def places_of(one: Run, name: str) -> dict[str, list[Row]]:
    """{method: intruders' rows that hold a place}. Raises run.UsageError."""
    found = {}
    for method, attacks in one.methods.items():
        rows = pick(under(attacks, 1, 1), name, "intruder")
        if placed := [r for r in rows if r.row >= 0]:
            found[method] = placed
    if not found:
        raise run.UsageError(f"{one.folder}/<method>/attacks/{name}.csv has no places")
    return {m: found[m] for m in names([one]) if m in found}


def setting(one: Run, method: str, name: str, key: str, default: Any) -> Any:
    """What an attack ran with, as its sidecar says."""
    return (one.methods[method][name].sidecar.get("config") or {}).get(key, default)


def mean_face(one: Run, method: str, name: str) -> np.ndarray:
    """(H, W, 3) of an attack's example images; without them grey."""
    if not (path := one.folder / method / "attacks" / f"{name}.npz").exists():
        side = setting(one, method, name, "size", 64)
        return np.full((side, side, 3), 0.8)
    faces = load_arrays(path, "clean")[0]
    return np.mean([picture(i) for i in faces.reshape(-1, *faces.shape[-3:])], 0)


def figure_7(one: Run) -> Any:
    """The square's search region, and how often each position won, over the mean face, if any."""
    from matplotlib.patches import Rectangle

    from attacks import scale, square_positions

    method, rows = next(iter(places_of(one, "square").items()))
    face = mean_face(one, method, "square")
    size = np.array(face.shape[:2])
    side, starts = [scale(10, n) for n in size], np.array([(r.row, r.col) for r in rows])
    searched = np.array(square_positions(5, *size))
    (top, left), (height, width) = searched.min(0), np.ptp(searched, 0) + side
    figure, axes = canvas(1, 2, 6.6, 3.2)
    show(axes[0, 0], face, "search region")
    frame: dict[str, Any] = {"fill": False, "color": "yellow", "linewidth": 2}
    axes[0, 0].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, **frame))
    stride = setting(one, method, "square", "square_stride", 5) * size / 64
    low, high = starts.min(0), starts.max(0)
    cells = np.rint((starts - low) / stride).astype(int)
    counts = np.zeros(cells.max(0) + 1)
    np.add.at(counts, tuple(cells.T), 1)
    title = f"centres of the {len(starts)} best squares, {LABELS.get(method, method)}"
    show(axes[0, 1], face, title)
    middle = (np.array(side) - 1) / 2
    (top, left), (bottom, right) = low + middle - stride / 2, high + middle + stride / 2
    seen = {"extent": (left, right, bottom, top), "cmap": "viridis", "alpha": 0.75, "vmin": 0}
    heat = axes[0, 1].imshow(counts, **seen)
    axes[0, 1].set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
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


def figure_intruders(one: Run, down: int = 3) -> Any:
    """Targets, and intruders as adversarial eyeglasses left them: distance, and eq. (1)'s answer at
    the threshold in result.json."""
    path = first(one, "eyeglasses")
    targets, attacked, distance = load_arrays(path, "anchor", "attacked", "distance")
    delta = float(run.read_json(path.parents[1] / "result.json", RUN_FIRST)["threshold"])
    rows = []
    for target, images, found in list(zip(targets, attacked, distance))[:down]:
        told = [f"{d:.2f}, {'refused' if d >= delta else 'passes'}" for d in found]
        rows.append([(picture(target), "target"), *zip(map(picture, images), told)])
    return sheet(rows, 1.5)


def figure_places(one: Run) -> Any:
    """Of each method, over the mean face: how many intruders' weakest place under the rule, where
    the bound is lowest, lies over a pixel."""
    from attacks import scale

    panels = places_of(one, "rule")
    figure, axes = canvas(1, len(panels), 3.3 * len(panels), 3.2)
    for axis, (method, rows) in zip(axes.flat, panels.items()):
        face = mean_face(one, method, "rule")
        patch = setting(one, method, "rule", "rule_patch", (10,))
        counts = np.zeros(face.shape[:2])
        h, w = (scale(side, n) for side, n in zip((patch[0], patch[-1]), face.shape[:2]))
        for r in rows:
            counts[r.row : r.row + h, r.col : r.col + w] += 1
        title = f"weakest places of {h} x {w} pixels,\n{len(rows)} intruders"
        show(axis, face, f"{title}, {LABELS.get(method, method)}")
        heat = axis.imshow(np.ma.masked_equal(counts, 0), cmap="viridis", alpha=0.6, vmin=0)
        figure.colorbar(heat, ax=axis, label="intruders")
    return figure


def figure_certified(one: Run) -> Any:
    """AU-ROC under the rule against the side of the patch certified against, 0: none; around
    it the 95 % interval over targets."""
    figure, axes = canvas(1, 1, 5.2, 3.4)
    for method in names([one]):
        if "rule" not in one.methods[method]:
            continue
        patch = setting(one, method, "rule", "rule_patch", (10,))
        attacks = {0: "rule", **{s: f"certified_{s}" for s in (2, 4, 6, 8)}, patch[0]: "certified"}
        found = {s: m for s, name in attacks.items() if (m := measure([one], method, name))}
        if len(found) > 1:
            areas = [m["auroc"] for m in found.values()]
            (line,) = axes[0, 0].plot([*found], areas, "o-", label=LABELS.get(method, method))
            low, high = ([m["interval"][k] for m in found.values()] for k in (0, 1))
            if None not in low:
                axes[0, 0].fill_between([*found], low, high, alpha=0.12, color=line.get_color())
    if not axes[0, 0].lines:
        raise run.UsageError(f"{one.folder}/<method>/attacks/rule.csv has no bounds")
    axes[0, 0].set(xlabel="side of the patch, pixels of 64", ylabel="certified AU-ROC")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def figure_roc(one: Run, across: int = 3) -> Any:
    """TAR against FAR, a panel a method: clean, attacked, and under the rule of the certificate.
    Faint where fewer than ten intruders pass."""
    every = ("clean", *PATCHES, "worst", "rule", "certified")
    panels: dict[str, dict[str, tuple]] = {}
    for method, held in names([one]).items():
        attacks = under(one.methods[method], 1, 1)
        for name in (a for a in every if a in held):
            genuine, intruders = sides(attacks, name)
            if genuine and intruders:
                both = roc(columns(genuine)[0], columns(intruders)[0])
                panels.setdefault(method, {})[name] = *both, ERRORS / len(intruders)
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


def figure_point(one: Run, without: str = "no-at") -> Any:
    """The point in one picture: an intruder that adversarial eyeglasses let pass F trained without
    patches, and not F trained with them; distances beside the threshold of validation persons."""
    best = [
        m for m in ("ours-mixed-all", "ours-mixed", "ours-transfer", "ours") if m in one.methods
    ]
    shown: dict[str, dict] = {}
    for method in (without, *best[:1]):
        keys = "target", "anchor", "clean", "attacked", "candidate", "distance"
        held = load_arrays(one.folder / method / "attacks" / "eyeglasses.npz", *keys)
        result = run.read_json(one.folder / method / "result.json", RUN_FIRST)
        whole = pairs(pick(under(one.methods[method], 1, 1), "clean", "intruder"))
        shown[method] = {"threshold": float(result["threshold"])}
        for target, anchor, *each in zip(*held):
            for before, after, candidate, distance in zip(*each):
                if (pair := (str(target), int(candidate))) in whole:
                    seen = whole[pair].distance, float(distance)
                    shown[method][pair] = seen, (anchor, before, after)
    if len(shown) < 2:
        raise run.UsageError(f"{one.folder}: only {without}: train another method")
    weak, strong = shown.values()
    common = [p for p in weak if p in strong and p != "threshold"]
    fooled = [p for p in common if weak[p][0][1] < weak["threshold"] <= weak[p][0][0]]
    held_off = [p for p in fooled if strong[p][0][1] >= strong["threshold"]]
    if not held_off:
        raise run.UsageError(f"{one.folder}: no pair shows it")
    rows = []
    for method, found in shown.items():
        seen, images = found[held_off[0]]
        delta, titles = found["threshold"], [f"{LABELS.get(method, method)}\ntarget"]
        for name, d in zip(("intruder", "the same, eyeglasses"), seen):
            told = "refused" if d >= delta else "ACCEPTED"
            titles.append(f"{name}\n{d:.2f} {'>=' if d >= delta else '<'} {delta:.2f}: {told}")
        rows.append([(picture(image), title) for image, title in zip(images, titles)])
    return sheet(rows, 1.7)


def figure_photographs(attacks: Sequence[str] = ("clean", "eyeglasses", "worst")) -> Any:
    """AU-ROC of each method against the number of photographs of each train person, a panel an
    attack; bars: 95 % over persons."""
    figure, axes = canvas(1, len(attacks), 3.0 * len(attacks), 3.2, sharey=True)
    at = photographs()
    methods = names([one for runs in at.values() for one in runs])
    numbers = {
        m: sum(any(m in one.methods for one in runs) for runs in at.values()) for m in methods
    }
    for color, method in enumerate(m for m in methods if numbers[m] > 1):
        for axis, attack in zip(axes[0], attacks):
            found = {k: m for k, runs in at.items() if (m := measure(runs, method, attack))}
            mean = np.array([m["auroc"] for m in found.values()])
            ends = np.array([m["interval"] for m in found.values()]).T
            how = {"label": LABELS[method], "color": f"C{color}", "capsize": 2, "marker": "o"}
            x = np.array([*found]) * (1 + 0.02 * color)  # bars beside each other
            axis.errorbar(x, mean, abs(ends - mean), markersize=3, linewidth=1, **how)
            axis.set(xscale="log", xticks=[*at], xticklabels=[*at], title=attack)
            axis.minorticks_off()
    figure.supxlabel("photographs of each train person", fontsize=10)
    axes[0, 0].set_ylabel("AU-ROC")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)
    run.write(path, buffer.getvalue())


def draw(one: Run, folder: Path, wanted: Sequence[str] = FIGURES) -> list[str]:
    """These figures as PNG into the folder; returns what to say, one line for all not made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return [f"figures: {NO_MATPLOTLIB}"]
    lacking: dict[str, list[str]] = {}
    for name in wanted:
        try:
            figure = globals()[f"figure_{name}"](one)
            save(figure, folder / f"{'figure' * name.isdigit()}{name}.png")
        except run.UsageError as error:
            reason = str(error).removeprefix(f"{one.folder}/").removesuffix(f": {RUN_FIRST}")
            lacking.setdefault(reason, []).append(name)
    told = "; ".join(f"{', '.join(which)} ({reason})" for reason, which in lacking.items())
    return [f"figures not made: {told}"] if told else []


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
    persons = embed.sampler_of(faces, data.images_of(faces, split.target), torch.device("cpu"))
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
    if not argv:
        try:
            save(figure_photographs(), HERE / "photographs.png")
        except ImportError:
            raise run.UsageError(f"photographs.png: {NO_MATPLOTLIB}") from None
        return 0
    folder, *methods = argv
    for method in methods:
        measure_figure_3(Path(folder), method)
    return 0


if __name__ == "__main__":
    raise SystemExit(run.command("results.figures", main, sys.argv[1:]))
