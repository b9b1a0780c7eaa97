"""AU-ROC, AU-PR, detection, intervals, health checks, tables and figures from the rows of a run (Sec. 4).

    python metrics.py --run runs/synthetic-demo-0             # table, health checks, tables.md, figures/*.png
    python metrics.py --run runs/synthetic-demo-0 --json      # {"<method>": {"<attack>": {"auroc": ..., ...}}}
    python metrics.py --run runs/a-0 runs/a-1 runs/a-2        # mean and range over runs (seeds)

In: `<run>/<method>/attacks/<attack>.csv`, one row per compared pair, and what else the run wrote (log.jsonl, .npz, .json).
Out: figures of merit. The positive class is the intruder ("different", eq. (1) = 1), the score is the distance: the
balanced precision TPR / (TPR + FPR) then starts at 1 when an attack moves some intruders all the way and leaves the
rest where they were, so AU-PR lies above AU-ROC as in the paper's pairs (0.868 / 0.896); with the genuine class as the
positive one it would lie below. AU-PR here is the step-wise sum, so that chance is exactly 0.5.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLUMNS = ("attack", "mirroring", "selection", "seed", "target", "anchor", "candidate", "person", "role", "distance")
FPR = 0.05  # Sec. 4.3


class UsageError(ValueError):
    """A one-line message that names a file, line or flag and says what to do."""


class Row(NamedTuple):
    """One compared pair; `row`, `col`: where a located patch sits, -1 without one."""

    attack: str
    mirroring: int
    selection: int
    seed: int
    target: str
    anchor: int
    candidate: int
    person: str
    role: str
    distance: float
    row: int
    col: int


@dataclass(frozen=True)
class Attack:
    """The rows of one file and the settings written beside it ({} when there are none)."""

    rows: list[Row]
    sidecar: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """methods: method -> attack -> rows; the rest is what the run wrote beside them."""

    folder: Path
    methods: dict[str, dict[str, Attack]]


def _two(genuine: Any, intruders: Any) -> tuple[np.ndarray, np.ndarray]:
    g, i = (np.sort(np.asarray(a, dtype=np.float64).ravel()) for a in (genuine, intruders))
    if not len(g) or not len(i):
        raise ValueError("at least one genuine and one intruder distance are needed")
    if not np.isfinite(g).all() or not np.isfinite(i).all():
        raise ValueError("distances must be finite")
    return g, i


def auroc(genuine: Any, intruders: Any) -> float:
    """Probability that an intruder's distance (n,) is larger than a genuine one's (k,); a tie counts one half. Sec. 4."""
    g, i = _two(genuine, intruders)
    return float((np.searchsorted(g, i, "left") + np.searchsorted(g, i, "right")).mean() / (2 * len(g)))


def _area(genuine: Any, intruders: Any, prior: float | None) -> float:
    g, i = _two(genuine, intruders)
    at = np.unique(np.concatenate([g, i]))[::-1]
    tpr = 1 - np.searchsorted(i, at, "left") / len(i)
    fpr = 1 - np.searchsorted(g, at, "left") / len(g)
    odds = len(g) / len(i) if prior is None else (1 - prior) / prior
    return float((np.diff(tpr, prepend=0.0) * tpr / (tpr + odds * fpr)).sum())


def aupr(genuine: Any, intruders: Any) -> float:
    """Area under precision over recall with precision = TPR / (TPR + FPR), the paper's balanced prior; chance = 0.5."""
    return _area(genuine, intruders, 0.5)


def average_precision(genuine: Any, intruders: Any) -> float:
    """Area under precision over recall at the prior of the sample (n intruders, k genuine)."""
    return _area(genuine, intruders, None)


def threshold(genuine: Any, fpr: float = FPR) -> float:
    """delta: the (1 - fpr) quantile of genuine distances, linearly interpolated (Sec. 4.3: the 95th percentile)."""
    g = np.asarray(genuine, dtype=np.float64).ravel()
    if not len(g) or not 0 <= fpr <= 1:
        raise ValueError("a threshold needs genuine distances and a false positive rate in [0, 1]")
    return float(np.quantile(g, 1 - fpr))


def detection_at_fpr(genuine: Any, attacked: Any, fpr: float = FPR, evading: bool = False) -> float:
    """Share of `attacked` distances that are detected at `threshold(genuine, fpr)`.

    Intruders are detected when eq. (1) calls them different, distance >= delta. Evading images (evading=True), which are
    genuine, are detected when they are still recognised, distance <= delta.
    """
    delta, d = threshold(genuine, fpr), np.asarray(attacked, dtype=np.float64).ravel()
    if not len(d):
        raise ValueError("no attacked distances")
    # Eq. (1)
    return float((d <= delta).mean() if evading else (d >= delta).mean())


def bootstrap(
    genuine: Any, genuine_target: Any, intruders: Any, intruder_target: Any, n: int = 1000, seed: int = 0
) -> np.ndarray:
    """AU-ROC (m,) of up to n resamplings of the targets with replacement; a target brings all its rows, m < n only
    where a resample holds one class alone. Pairs are counted once per two targets, so the cost hardly depends on n."""
    g, i = np.asarray(genuine, dtype=np.float64), np.asarray(intruders, dtype=np.float64)
    names, code = np.unique(
        np.concatenate([np.asarray(genuine_target), np.asarray(intruder_target)]), return_inverse=True
    )
    of_g, of_i, T = code[: len(g)], code[len(g) :], len(names)
    wins = np.zeros((T, T))  # (T of genuine, T of intruder): pairs the intruder wins, ties one half
    for t in range(T):
        mine = np.sort(i[of_i == t])
        won = 2 * len(mine) - np.searchsorted(mine, g, "left") - np.searchsorted(mine, g, "right")
        wins[:, t] = np.bincount(of_g, won / 2, T)
    drawn = np.random.default_rng(seed).multinomial(T, np.full(T, 1 / T), size=n).astype(np.float64)  # (n, T)
    pairs = (drawn @ np.bincount(of_g, minlength=T)) * (drawn @ np.bincount(of_i, minlength=T))
    return ((drawn @ wins) * drawn).sum(1)[pairs > 0] / pairs[pairs > 0]


def _percentiles(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    lo, hi = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def bootstrap_interval(
    genuine: Any,
    genuine_target: Any,
    intruders: Any,
    intruder_target: Any,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the AU-ROC, resampling targets; (nan, nan) from fewer than two targets."""
    if len(set(genuine_target) | set(intruder_target)) < 2:
        return math.nan, math.nan
    return _percentiles(bootstrap(genuine, genuine_target, intruders, intruder_target, n, seed), level)


def read_rows(path: Path) -> list[Row]:
    """Every row of one attack's file; raises UsageError naming file and line."""
    rows: list[Row] = []
    seen: set[tuple[Any, ...]] = set()
    line = 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [c for c in COLUMNS if c not in header]:
                raise ValueError(f"not a file of attack rows, column {missing[0]!r} is missing")
            for fields in reader:
                line = reader.line_num
                if len(fields) != len(header):
                    raise ValueError(f"{len(fields)} fields where the header has {len(header)}")
                row = _row(dict(zip(header, fields)))
                key = row[:8]
                if row.candidate >= 0 and key in seen:
                    raise ValueError(f"target {row.target} against image {row.candidate} stands here twice")
                seen.add(key)
                rows.append(row)
            if not rows:
                raise ValueError("no rows below the header")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); run attacks.py for this attack") from None
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise UsageError(f"{path}:{line}: {error}; delete the file and run attacks.py for this attack again") from None
    return rows


def _row(v: Mapping[str, str]) -> Row:
    def whole(name: str, among: tuple[int, ...] = ()) -> int:
        try:
            value = int(v[name])
        except ValueError:
            raise ValueError(f"{name} is {v[name]!r}, not a whole number") from None
        if among and value not in among:
            raise ValueError(f"{name} is {value}, not one of {among}")
        return value

    if v["role"] not in ("genuine", "intruder"):
        raise ValueError(f"role is {v['role']!r}, not genuine or intruder")
    try:
        distance = float(v["distance"])
    except ValueError:
        raise ValueError(f"distance is {v['distance']!r}, not a number") from None
    if not 0 <= distance < math.inf:
        raise ValueError(f"distance is {distance}, not a finite number from 0 up")
    place = [whole(name) if v.get(name) else -1 for name in ("row", "col")]
    return Row(
        v["attack"], whole("mirroring", (0, 1)), whole("selection", (0, 1)), whole("seed"), v["target"], whole("anchor"),
        whole("candidate"), v["person"], v["role"], distance, *place,
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """A json file's object; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); write it again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__}, not an object; write it again")
    return value


def read_run(folder: Path | str) -> Run:
    """All rows of a run; raises UsageError for a missing folder, one without rows, or a bad row."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--run {folder}: no such folder; give the folder that embed.py wrote")
    methods: dict[str, dict[str, Attack]] = {}
    for path in sorted(folder.glob("*/attacks/*.csv")):
        if path.stem != "figure3":
            attack = Attack(read_rows(path), _json(path.with_suffix(".json")))
            methods.setdefault(path.parent.parent.name, {})[path.stem] = attack
    if not methods:
        raise UsageError(
            f"--run {folder}: holds no rows (<method>/attacks/<attack>.csv); run attacks.py --run {folder}"
        )
    return Run(folder, methods)


def pick(attack: Attack | None, role: str, mirroring: int, selection: int) -> list[Row]:
    """The rows of one role under one setting of the defender's augmentations; [] without the attack."""
    rows = attack.rows if attack else []
    return [r for r in rows if r.role == role and r.mirroring == mirroring and r.selection == selection]


def sides(attacks: Mapping[str, Attack], name: str, mirroring: int, selection: int) -> tuple[list[Row], list[Row]]:
    """(genuine, intruder) rows that judge attack `name`: its own rows, and clean ones for a role it did not attack.
    `worst` is the lowest distance per pair over every attack (see `worst`)."""
    if name == "worst":
        return pick(attacks.get("clean"), "genuine", mirroring, selection), worst(attacks, mirroring, selection)
    own, clean = attacks.get(name), attacks.get("clean")
    parts = [pick(own, role, mirroring, selection) for role in ("genuine", "intruder")]
    if any(parts):
        parts = [p or pick(clean, role, mirroring, selection) for p, role in zip(parts, ("genuine", "intruder"))]
    return parts[0], parts[1]


def closest(*several: Sequence[Row]) -> list[Row]:
    """Per pair (target, candidate) that every list holds, the row with the lowest distance."""
    by_pair = [{(r.target, r.candidate): r for r in rows} for rows in several]
    shared = set(by_pair[0]).intersection(*by_pair[1:]) if by_pair else set()
    return [min((d[key] for d in by_pair), key=lambda r: r.distance) for key in sorted(shared)]


WORST = ("eyeglasses", "square", "eye_patch", "random_eyeglasses", "indirect")  # one printed patch, any of them


def worst(attacks: Mapping[str, Attack], mirroring: int, selection: int) -> list[Row]:
    """Per intruder the strongest attack, over those that attacked the very pairs eyeglasses did; [] if fewer than two."""
    chosen = [pick(attacks.get(a), "intruder", mirroring, selection) for a in WORST]
    first = {(r.target, r.candidate) for r in chosen[0]}
    chosen = [rows for rows in chosen if first and first <= {(r.target, r.candidate) for r in rows}]
    return [r for r in closest(*chosen) if (r.target, r.candidate) in first] if len(chosen) > 1 else []


def merits(
    genuine: Sequence[Row], intruders: Sequence[Row], evading: bool = False, delta_from: Sequence[Row] = ()
) -> dict:
    """The figures of one attack; `delta_from`: clean genuine rows that set delta where the genuine ones are attacked."""
    g, i = [r.distance for r in genuine], [r.distance for r in intruders]
    reference = [r.distance for r in delta_from] or g
    lo, hi = bootstrap_interval(g, [r.target for r in genuine], i, [r.target for r in intruders])
    return {
        "auroc": auroc(g, i),
        "aupr": aupr(g, i),
        "ap": average_precision(g, i),
        "n_targets": len({r.target for r in genuine} & {r.target for r in intruders}),
        "n_genuine": len(g),
        "n_intruders": len(i),
        "interval": [None if math.isnan(lo) else lo, None if math.isnan(hi) else hi],
        "detected": detection_at_fpr(reference, g if evading else i, FPR, evading),
    }


def summary(run: Run | Path | str, mirroring: int = 1, selection: int = 1) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {attack: figures}}; `detected` is the share detected at 5 % FPR. Attacks without rows under this setting,
    or without clean rows to be judged against, are left out."""
    run = run if isinstance(run, Run) else read_run(run)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for method, attacks in run.methods.items():
        clean = pick(attacks.get("clean"), "genuine", mirroring, selection)
        for name in ["clean", *sorted(set(attacks) - {"clean"}), "worst"]:
            genuine, intruders = sides(attacks, name, mirroring, selection)
            if clean and genuine and intruders:
                evading = name != "clean" and not pick(attacks.get(name), "intruder", mirroring, selection)
                evading = evading and name != "worst"
                result.setdefault(method, {})[name] = merits(genuine, intruders, evading, clean)
    if not result:
        raise UsageError(
            f"--run {run.folder}: no clean rows with mirroring {mirroring} and selection {selection}; "
            "run attacks.py with that setting"
        )
    return result


def table(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A summary as text, one line per method and attack."""
    lines = [
        f"{'method':<14}{'attack':<20}{'AU-ROC':>7}  {'95 % interval':<15}{'AU-PR':>6}{'AP':>7}{'detected':>10}  n"
    ]
    for method, attacks in result.items():
        for name, m in attacks.items():
            lo, hi = m["interval"]
            between = "one target" if lo is None else f"{lo:.3f}-{hi:.3f}"
            lines.append(
                f"{method:<14}{name:<20}{m['auroc']:>7.3f}  {between:<15}{m['aupr']:>6.3f}{m['ap']:>7.3f}"
                f"{m['detected']:>10.1%}  {m['n_targets']} targets, {m['n_genuine']} genuine, {m['n_intruders']} intruders"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables, figures and health checks from the rows of a run.")
    parser.add_argument("--run", type=Path, required=True, help="the folder embed.py wrote")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and write nothing")
    parser.add_argument(
        "--mirroring", type=int, choices=(0, 1), default=1, help="rows with the mirror image averaged in"
    )
    parser.add_argument("--selection", type=int, choices=(0, 1), default=1, help="rows with the anchor selected")
    args = parser.parse_args(argv)
    try:
        run = read_run(args.run)
        result = summary(run, args.mirroring, args.selection)
        print(json.dumps(result, indent=1) if args.json else table(result))
    except UsageError as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metrics.py: stopped; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
