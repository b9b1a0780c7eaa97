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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLUMNS = ("attack", "mirroring", "selection", "seed", "target", "anchor", "candidate", "person", "role", "distance")
FPR = 0.05  # Sec. 4.3
METHODS = ("ours", "ours-transfer", "weak-at", "doa-4", "doa-10", "no-at")


class UsageError(ValueError):
    """A one-line message that names a file, line or flag and says what to do."""


class Row(NamedTuple):
    """One compared pair; `row`, `col`: where a located patch sits, -1 without one; `direct`: an indirect attack's distance
    before the indirect one is taken into account, nan without one."""

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
    row: int = -1
    col: int = -1
    direct: float = math.nan


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


def detection_interval(
    genuine: Any,
    genuine_target: Any,
    attacked: Any,
    attacked_target: Any,
    fpr: float = FPR,
    evading: bool = False,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `detection_at_fpr`, resampling targets, delta anew each time; (nan, nan) below two targets."""
    g, d = np.asarray(genuine, dtype=np.float64), np.asarray(attacked, dtype=np.float64)
    _, code = np.unique(np.r_[np.asarray(genuine_target), np.asarray(attacked_target)], return_inverse=True)
    of_g, of_d, T = code[: len(g)], code[len(g) :], int(code.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(T, np.full(T, 1 / T), size=n)  # (n, T)
    drawn = drawn[(drawn[:, np.unique(of_g)].sum(1) > 0) & (drawn[:, np.unique(of_d)].sum(1) > 0)]
    if T < 2 or not len(drawn):
        return math.nan, math.nan
    shares = [detection_at_fpr(g.repeat(c[of_g]), d.repeat(c[of_d]), fpr, evading) for c in drawn]
    return _percentiles(np.array(shares), level)


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

    def length(name: str) -> float:
        try:
            value = float(v[name])
        except ValueError:
            raise ValueError(f"{name} is {v[name]!r}, not a number") from None
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, not a finite number from 0 up")
        return value

    if v["role"] not in ("genuine", "intruder"):
        raise ValueError(f"role is {v['role']!r}, not genuine or intruder")
    config = whole("mirroring", (0, 1)), whole("selection", (0, 1)), whole("seed")
    pair = v["target"], whole("anchor"), whole("candidate"), v["person"], v["role"], length("distance")
    place = [whole(name) if v.get(name) else -1 for name in ("row", "col")]
    return Row(v["attack"], *config, *pair, *place, length("direct") if v.get("direct") else math.nan)


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


DERIVED = ("direct+indirect", "worst")  # Sec. 4.4; ours
WORST = ("eyeglasses", "square", "eye_patch", "random_eyeglasses", "indirect")  # one printed patch, any of them


def sides(attacks: Mapping[str, Attack], name: str, mirroring: int, selection: int) -> tuple[list[Row], list[Row]]:
    """(genuine, intruder) rows that judge attack `name`: its own rows, and clean ones for a role it did not attack.
    The derived attacks take the lowest distance per pair: of the direct and the indirect attack, or of all (`worst`)."""
    genuine, intruders = (pick(attacks.get(name), role, mirroring, selection) for role in ("genuine", "intruder"))
    if name == "worst":
        intruders = worst(attacks, mirroring, selection)
    elif name == "direct+indirect":
        intruders = direct_and_either(attacks, mirroring, selection)[1]
    if genuine or intruders:
        genuine = genuine or pick(attacks.get("clean"), "genuine", mirroring, selection)
        intruders = intruders or pick(attacks.get("clean"), "intruder", mirroring, selection)
    return genuine, intruders


def closest(*several: Sequence[Row]) -> list[Row]:
    """Per pair (target, candidate) that every list holds, the row with the lowest distance."""
    by_pair = [{(r.target, r.candidate): r for r in rows} for rows in several]
    shared = set(by_pair[0]).intersection(*by_pair[1:]) if by_pair else set()
    return [min((d[key] for d in by_pair), key=lambda r: r.distance) for key in sorted(shared)]


def direct_and_either(attacks: Mapping[str, Attack], mirroring: int, selection: int) -> tuple[list[Row], list[Row]]:
    """Sec. 4.4: the rows of the direct attack, and those of the more successful of both per intruder, on the same pairs.
    The direct one is the column `direct` of the indirect attack's rows (same starts), else the eyeglasses' rows."""
    indirect = pick(attacks.get("indirect"), "intruder", mirroring, selection)
    if indirect and not any(math.isnan(r.direct) for r in indirect):
        return [r._replace(distance=r.direct) for r in indirect], [
            r._replace(distance=min(r.direct, r.distance)) for r in indirect
        ]
    eyeglasses = pick(attacks.get("eyeglasses"), "intruder", mirroring, selection)
    pairs = {(r.target, r.candidate) for r in indirect}
    return [r for r in eyeglasses if (r.target, r.candidate) in pairs], closest(eyeglasses, indirect)


def worst(attacks: Mapping[str, Attack], mirroring: int, selection: int) -> list[Row]:
    """Per intruder the strongest attack, over those that attacked every pair eyeglasses did; [] if fewer than two."""
    chosen = [pick(attacks.get(a), "intruder", mirroring, selection) for a in WORST]
    first = {(r.target, r.candidate) for r in chosen[0]}
    chosen = [rows for rows in chosen if first and first <= {(r.target, r.candidate) for r in rows}]
    return closest(*chosen) if len(chosen) > 1 else []


def merits(
    genuine: Sequence[Row], intruders: Sequence[Row], clean: Sequence[Row], evading: bool = False
) -> dict[str, Any]:
    """The figures of one attack; delta comes from the clean genuine rows."""
    g, i = [r.distance for r in genuine], [r.distance for r in intruders]
    detected = detection_at_fpr([r.distance for r in clean], g if evading else i, FPR, evading)
    return {
        "auroc": auroc(g, i),
        "aupr": aupr(g, i),
        "ap": average_precision(g, i),
        "n_targets": len({r.target for r in genuine} & {r.target for r in intruders}),
        "n_genuine": len(g),
        "n_intruders": len(i),
        "detected": detected,
    }


def measure(
    runs: Sequence[Run], method: str, name: str, mirroring: int = 1, selection: int = 1
) -> dict[str, Any] | None:
    """The figures of one method under one attack, None without its rows (or without clean rows to judge it against).

    Over several runs: means, counts summed, `range` [lowest, highest] of each mean, `runs` how many had the rows;
    `interval` is then that of the mean AU-ROC, targets resampled within each run.
    """
    found, draws = [], []
    for number, run in enumerate(runs):
        attacks = run.methods.get(method, {})
        clean = pick(attacks.get("clean"), "genuine", mirroring, selection)
        genuine, intruders = sides(attacks, name, mirroring, selection)
        if clean and genuine and intruders:
            evading = name not in (*DERIVED, "clean") and not pick(attacks[name], "intruder", mirroring, selection)
            found.append(merits(genuine, intruders, clean, evading))
            if found[-1]["n_targets"] > 1:
                draws.append(bootstrap(*_columns(genuine), *_columns(intruders), seed=number))
    if not found:
        return None
    result = {k: sum(f[k] for f in found) / (1 if k.startswith("n_") else len(found)) for k in found[0]}
    result["interval"] = [None, None]
    if len(draws) == len(found):
        shortest = min(map(len, draws))
        result["interval"] = list(_percentiles(np.mean([d[:shortest] for d in draws], 0)))
    if len(runs) > 1:
        spread = [k for k in found[0] if not k.startswith("n_")]
        result |= {"range": {k: [f(m[k] for m in found) for f in (min, max)] for k in spread}, "runs": len(found)}
    return result


def _columns(rows: Sequence[Row]) -> tuple[list[float], list[str]]:
    return [r.distance for r in rows], [r.target for r in rows]


def names(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{method: attacks}: the paper's methods first, clean first, the derived attacks last."""
    held: dict[str, set[str]] = {}
    for run in runs:
        for method, attacks in run.methods.items():
            held.setdefault(method, set()).update(attacks)
    methods = sorted(held, key=lambda m: (METHODS.index(m) if m in METHODS else len(METHODS), m))
    return {m: ["clean", *sorted(held[m] - {"clean"}), *DERIVED] for m in methods}


def summary(
    run: Run | Path | str | Sequence[Run], mirroring: int = 1, selection: int = 1
) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {attack: figures}}, see `measure`; `detected` is the share detected at 5 % FPR. Attacks without rows under
    this setting are left out."""
    runs = [read_run(run)] if isinstance(run, (str, Path)) else [run] if isinstance(run, Run) else list(run)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for method, attacks in names(runs).items():
        for name in attacks:
            if figures := measure(runs, method, name, mirroring, selection):
                result.setdefault(method, {})[name] = figures
    if not result:
        raise UsageError(
            f"--run {runs[0].folder}: no clean rows with mirroring {mirroring} and selection {selection}; "
            "run attacks.py with that setting"
        )
    return result


def table(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A summary as text, one line per method and attack."""
    lines = [
        f"{'method':<14}{'attack':<21}{'AU-ROC':>7}  {'95 % interval':<15}{'AU-PR':>6}{'AP':>7}{'detected':>10}  n"
    ]
    for method, attacks in result.items():
        for name, m in attacks.items():
            lo, hi = m["interval"]
            between = "one target" if lo is None else f"{lo:.3f}-{hi:.3f}"
            lines.append(
                f"{method:<14}{name:<21}{m['auroc']:>7.3f}  {between:<15}{m['aupr']:>6.3f}{m['ap']:>7.3f}"
                f"{m['detected']:>10.1%}  {m['n_targets']} targets, {m['n_genuine']} genuine, {m['n_intruders']} intruders"
            )
            if "range" in m:
                low, high = m["range"]["auroc"]
                lines[-1] += f", {m['runs']} runs: {low:.3f}-{high:.3f}"
    return "\n".join(lines)


OK, FAILED, NOT_RUN = "OK", "FAILED", "not run"


class Check(NamedTuple):
    """A health check's outcome: `status` is OK, FAILED or NOT_RUN."""

    name: str
    status: str
    detail: str


def field(sidecar: Mapping[str, Any], name: str) -> Any:
    """A value of an attack's sidecar, at the top or one level down (its config, its health); None without it."""
    inner = (v for v in sidecar.values() if isinstance(v, Mapping))
    return next((d[name] for d in (sidecar, *inner) if d.get(name) is not None), None)


def _verdict(name: str, detail: str, bad: Sequence[str], ran: int, missing: str) -> Check:
    if not ran:
        return Check(name, NOT_RUN, missing)
    return Check(name, FAILED if bad else OK, "; ".join(bad) if bad else f"{detail} ({ran} compared)")


def check_gradients(attacks: Mapping[str, Attack]) -> Check:
    """Fails when an attack met a gradient that was zero everywhere, or not finite: then it could not have succeeded."""
    counts = {a: [field(v.sidecar, k) for k in ("zero_gradients", "nonfinite")] for a, v in attacks.items()}
    counts = {a: [c or 0 for c in v] for a, v in counts.items() if v != [None, None]}
    bad = [f"{a}: {z} zero, {n} non-finite" for a, (z, n) in counts.items() if z or n]
    return _verdict("gradients", "none zero or non-finite", bad, len(counts), "no attack counted its gradients")


def _effort(attack: Attack) -> tuple[float, float] | None:
    found = [field(attack.sidecar, k) for k in ("iterations", "restarts")]
    return None if None in found else (float(found[0]), float(found[1]))


def check_effort(attacks: Mapping[str, Attack], tolerance: float = 0.01) -> Check:
    """Fails when more iterations or restarts weaken an attack: its mean distance is on the defender's side by more than
    `tolerance` (a share). Compares `<attack>.csv` with `<attack>-<anything>.csv` on the pairs both hold, and the curves
    `by_iterations` and `by_restarts` (mean distance after so many) of a sidecar."""
    bad, ran = [], 0

    def judge(label: str, weak: float, strong: float, evading: bool) -> None:
        nonlocal ran
        ran += 1
        if strong < weak * (1 - tolerance) if evading else strong > weak * (1 + tolerance):
            bad.append(f"{label}: mean distance from {weak:.4g} to {strong:.4g}")

    for name, attack in attacks.items():
        evading = all(r.role == "genuine" for r in attack.rows)
        for curve in ("by_iterations", "by_restarts"):
            points = sorted((int(k), float(v)) for k, v in (field(attack.sidecar, curve) or {}).items())
            for (few, weak), (many, strong) in pairwise(points):
                judge(f"{name}, {few} to {many} {curve[3:]}", weak, strong, evading)
        for other, more in attacks.items():
            mine, theirs = _effort(attack), _effort(more)
            if name.split("-")[0] != other.split("-")[0] or not mine or not theirs or mine == theirs:
                continue
            weak_strong = _paired(attack.rows, more.rows)
            if mine[0] <= theirs[0] and mine[1] <= theirs[1] and weak_strong:
                judge(f"{name} {_times(mine)} to {other} {_times(theirs)}", *weak_strong, evading)
    return _verdict("more effort", "more never weakened an attack", bad, ran, "no attack ran at two strengths")


def _times(effort: tuple[float, float]) -> str:
    return f"{effort[0]:g} x {effort[1]:g}"


def _paired(a: Sequence[Row], b: Sequence[Row]) -> tuple[float, float] | None:
    """Mean distances of both over the pairs they share, None without one."""
    left, right = ({(r.mirroring, r.selection, r.role, r.target, r.candidate): r.distance for r in x} for x in (a, b))
    shared = left.keys() & right.keys()
    return (float(np.mean([left[k] for k in shared])), float(np.mean([right[k] for k in shared]))) if shared else None


def check_random(attacks: Mapping[str, Attack]) -> Check:
    """Fails when random patterns bring the intruders of the same pairs closer, on average, than gradients do."""
    bad, ran = [], 0
    gradient, random = (attacks[a].rows if a in attacks else [] for a in ("eyeglasses", "random_eyeglasses"))
    if both := _paired(gradient, random):
        ran = 1
        if both[1] < both[0]:
            bad = [f"mean distance {both[1]:.4g} by random search, {both[0]:.4g} by gradients"]
    return _verdict("random search", "does not beat gradients", bad, ran, "no pairs under both kinds of eyeglasses")


def check_indirect(attacks: Mapping[str, Attack], margin: float = 0.02) -> Check:
    """Sec. 4.4: fails when adding the indirect attack takes more than `margin` of AU-ROC from the direct one, a sign that
    gradients towards the real anchor are masked."""
    bad, ran = [], 0
    for m, s in sorted({(r.mirroring, r.selection) for r in attacks["indirect"].rows} if "indirect" in attacks else ()):
        clean, (direct, either) = pick(attacks.get("clean"), "genuine", m, s), direct_and_either(attacks, m, s)
        if clean and direct:
            ran += 1
            before, after = (auroc(_columns(clean)[0], _columns(rows)[0]) for rows in (direct, either))
            if before - after > margin:
                bad.append(f"AU-ROC from {before:.3f} to {after:.3f} with the indirect attack")
    return _verdict("indirect attack", f"takes at most {margin} of AU-ROC", bad, ran, "no pairs under both attacks")


def check_mask(attacks: Mapping[str, Attack], tolerance: float = 1e-5) -> Check:
    """Fails when an attacked image differs from its original outside the mask by more than rounding (range [0, 1])."""
    moved = {a: field(v.sidecar, "outside_mask_max") for a, v in attacks.items()}
    moved = {a: float(v) for a, v in moved.items() if v is not None}
    bad = [f"{a}: by {v:.3g}" for a, v in moved.items() if not v <= tolerance]
    return _verdict("outside the mask", "nothing changed", bad, len(moved), "no attack measured it")


def check_reproducible(attacks: Mapping[str, Attack]) -> Check:
    """Fails when an attack, repeated with the same seed, gave other distances."""
    same = {a: field(v.sidecar, "reproducible") for a, v in attacks.items()}
    bad = [a for a, v in same.items() if v is not None and not v]
    ran = sum(v is not None for v in same.values())
    return _verdict("same seed, same result", "repeated", bad, ran, "no attack was repeated")


CHECKS = (check_gradients, check_effort, check_random, check_indirect, check_mask, check_reproducible)


def health(runs: Sequence[Run]) -> list[Check]:
    """Every check over every method of every run; one that fails anywhere has failed, and says where."""
    result = []
    for check in CHECKS:
        found = [(method, check(attacks)) for run in runs for method, attacks in run.methods.items()]
        failed = [f"{method}: {c.detail}" for method, c in found if c.status == FAILED]
        passed = [(method, c) for method, c in found if c.status == OK]
        status = FAILED if failed else OK if passed else NOT_RUN
        detail = "; ".join(failed) or found[0][1].detail
        if status == OK:
            detail = f"{passed[0][1].detail.rpartition(' (')[0]} ({', '.join(sorted({m for m, _ in passed}))})"
        result.append(Check(found[0][1].name, status, detail))
    return result


def health_lines(checks: Sequence[Check]) -> str:
    """One line a check, to stand with every table."""
    return "\n".join(f"{c.status:<8} {c.name}: {c.detail}" for c in checks)


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
        print(json.dumps(result, indent=1) if args.json else f"{table(result)}\n\n{health_lines(health([run]))}")
    except UsageError as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metrics.py: stopped; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
