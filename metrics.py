"""AU-ROC, AU-PR, detection, intervals, health checks, tables and figures from the rows of a run (Sec. 4).

    python metrics.py --run runs/synthetic-demo-0             # table, health checks, tables.md, figures/*.png
    python metrics.py --run runs/synthetic-demo-0 --json      # {"<method>": {"<attack>": {"auroc": ..., ...}}}
    python metrics.py --run runs/a-0 runs/a-1 runs/a-2        # mean and range over runs (seeds)

In: `<run>/<method>/attacks/<attack>.csv`, one row a compared pair, and what else the run wrote (logs, .npz, .json).
Out: `tables.md`, `figures/*.png`.

The positive class is the intruder ("different", eq. (1) = 1), the score is the distance: the balanced precision
TPR / (TPR + FPR) then starts at 1 when an attack moves some intruders all the way and leaves the rest alone, so
AU-PR lies above AU-ROC as in most of the paper's pairs (0.868 / 0.896); with the genuine class as the positive one it
would lie below. AU-PR is the step-wise sum, so that chance is exactly 0.5.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLUMNS = ("attack", "mirroring", "selection", "seed", "target", "anchor", "candidate", "person", "role", "distance")
FPR = 0.05  # Sec. 4.3
COUNTS = "targets / genuine / intruders"
ATTACKS = ("clean", "eyeglasses", "square", "eye_patch", "random_eyeglasses", "noise", "evasion", "indirect", "distal",
           "eot_eyeglasses", "eot_eye_patch", "grey_eye_patch")  # fmt: skip
METHODS = ("ours", "ours-transfer", "weak-at", "doa-4", "doa-10", "no-at")


try:
    from data.run import UsageError
except ImportError:  # copied alone

    class UsageError(ValueError):  # type: ignore[no-redef]
        """A one-line message that names a file, line or flag and says what to do."""


class Row(NamedTuple):
    """One compared pair; `row`, `col`: where a located patch sits, -1 without one; `direct`: the direct half's
    distance in a row of the indirect attack, nan without one."""

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
    """Probability that an intruder's distance (n,) is larger than a genuine one's (k,), a tie one half. Sec. 4."""
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

    Intruders are detected when eq. (1) calls them different, distance >= delta. Evading images (evading=True) are
    genuine and detected when they are still recognised, distance <= delta.
    """
    delta, d = threshold(genuine, fpr), np.asarray(attacked, dtype=np.float64).ravel()
    if not len(d):
        raise ValueError("no attacked distances")
    # Eq. (1)
    return float((d <= delta).mean() if evading else (d >= delta).mean())


def bootstrap(
    genuine: Any, genuine_target: Any, intruders: Any, intruder_target: Any, n: int = 1000, seed: int = 0,
    among: Sequence[str] | None = None,
) -> np.ndarray:  # fmt: skip
    """AU-ROC (n,) of n resamplings of the targets with replacement, nan where a resample holds one class alone.

    A target brings all its rows. Targets are drawn `among` these names (default: those of the rows), so that with one
    seed several runs get the same draw. Pairs are counted once per two targets, so the cost hardly depends on n.
    """
    g, i = np.asarray(genuine, dtype=np.float64), np.asarray(intruders, dtype=np.float64)
    held = np.r_[np.asarray(genuine_target), np.asarray(intruder_target)]
    everyone = np.unique(held if among is None else np.asarray(among))
    code, T = np.asarray(np.searchsorted(everyone, held)), len(everyone)
    of_g, of_i = code[: len(g)], code[len(g) :]
    wins = np.zeros((T, T))  # (T of genuine, T of intruder): pairs the intruder wins, ties one half
    for t in range(T):
        mine = np.sort(i[of_i == t])
        won = 2 * len(mine) - np.searchsorted(mine, g, "left") - np.searchsorted(mine, g, "right")
        wins[:, t] = np.bincount(of_g, won / 2, T)
    drawn = np.random.default_rng(seed).multinomial(T, np.full(T, 1 / T), size=n).astype(np.float64)  # (n, T)
    pairs = (drawn @ np.bincount(of_g, minlength=T)) * (drawn @ np.bincount(of_i, minlength=T))
    return np.divide(((drawn @ wins) * drawn).sum(1), pairs, out=np.full(n, math.nan), where=pairs > 0)


def _percentiles(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    lo, hi = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def bootstrap_interval(
    genuine: Any, genuine_target: Any, intruders: Any, intruder_target: Any,
    n: int = 1000, level: float = 0.95, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Percentile interval of the AU-ROC, resampling targets; (nan, nan) from fewer than two targets."""
    if len(set(genuine_target) | set(intruder_target)) < 2:
        return math.nan, math.nan
    return _percentiles(bootstrap(genuine, genuine_target, intruders, intruder_target, n, seed), level)


def detection_interval(
    genuine: Any, genuine_target: Any, attacked: Any, attacked_target: Any, fpr: float = FPR, evading: bool = False,
    n: int = 1000, level: float = 0.95, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """The same for `detection_at_fpr`, with delta anew each time."""
    g, d = np.asarray(genuine, dtype=np.float64), np.asarray(attacked, dtype=np.float64)
    _, code = np.unique(np.r_[np.asarray(genuine_target), np.asarray(attacked_target)], return_inverse=True)
    of_g, of_d, T = code[: len(g)], code[len(g) :], int(code.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(T, np.full(T, 1 / T), size=n)  # (n, T)
    drawn = drawn[(drawn[:, np.unique(of_g)].sum(1) > 0) & (drawn[:, np.unique(of_d)].sum(1) > 0)]
    if T < 2 or not len(drawn):
        return math.nan, math.nan
    shares = [detection_at_fpr(g.repeat(c[of_g]), d.repeat(c[of_d]), fpr, evading) for c in drawn]
    return _percentiles(np.array(shares), level)


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
    row, col = (whole(name) if v.get(name) else -1 for name in ("row", "col"))
    return Row(
        v["attack"], whole("mirroring", (0, 1)), whole("selection", (0, 1)), whole("seed"), v["target"],
        whole("anchor"), whole("candidate"), v["person"], v["role"], length("distance"), row, col,
        length("direct") if v.get("direct") else math.nan,
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


def read_run(folder: Path | str, rows: str = "attacks") -> Run:
    """All rows of a run; raises UsageError for a missing folder, one without rows, or a bad row."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--run {folder}: no such folder; give the folder that embed.py wrote")
    methods: dict[str, dict[str, Attack]] = {}
    for path in sorted(folder.glob(f"*/{rows}/*.csv")):
        if path.stem != "figure3":
            attack = Attack(read_rows(path), _json(path.with_suffix(".json")))
            methods.setdefault(path.parent.parent.name, {})[path.stem] = attack
    if not methods:
        raise UsageError(f"--run {folder}: holds no rows (<method>/{rows}/<attack>.csv); run attacks.py --run {folder}")
    return Run(folder, methods)


def pick(attack: Attack | None, role: str, mirroring: int, selection: int) -> list[Row]:
    """The rows of one role under one setting of the defender's augmentations; [] without the attack."""
    rows = attack.rows if attack else []
    return [r for r in rows if r.role == role and r.mirroring == mirroring and r.selection == selection]


DERIVED = ("direct", "direct+indirect", "worst")  # Sec. 4.4; ours
WORST = ("eyeglasses", "square", "eye_patch", "random_eyeglasses", "indirect")  # one printed patch, any of them


def sides(attacks: Mapping[str, Attack], name: str, mirroring: int, selection: int) -> tuple[list[Row], list[Row]]:
    """(genuine, intruder) rows that judge attack `name`: its own rows, and clean ones for a role it did not attack.
    The derived attacks take a pair's lowest distance: of the direct and the indirect attack, or of all (`worst`)."""
    genuine, intruders = (pick(attacks.get(name), role, mirroring, selection) for role in ("genuine", "intruder"))
    if name == "worst":
        intruders = worst(attacks, mirroring, selection)
    elif name in ("direct", "direct+indirect"):
        intruders = direct_and_either(attacks, mirroring, selection)[name != "direct"]
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
    """Sec. 4.4: the rows of the direct attack, and of the more successful of both per intruder, on the same pairs.
    The direct one is the column `direct` of the indirect attack's rows (same starts), else the eyeglasses' rows."""
    indirect = pick(attacks.get("indirect"), "intruder", mirroring, selection)
    if indirect and not any(math.isnan(r.direct) for r in indirect):
        direct = [r._replace(distance=r.direct) for r in indirect]
        return direct, [min(pair, key=lambda r: r.distance) for pair in zip(direct, indirect)]
    eyeglasses = pick(attacks.get("eyeglasses"), "intruder", mirroring, selection)
    pairs = {(r.target, r.candidate) for r in indirect}
    return [r for r in eyeglasses if (r.target, r.candidate) in pairs], closest(eyeglasses, indirect)


def worst(attacks: Mapping[str, Attack], mirroring: int, selection: int) -> list[Row]:
    """Per intruder the strongest attack, over those that attacked every pair eyeglasses did; [] if fewer than two."""
    chosen = [pick(attacks.get(a), "intruder", mirroring, selection) for a in WORST]
    first = {(r.target, r.candidate) for r in chosen[0]}
    chosen = [rows for rows in chosen if first and first <= {(r.target, r.candidate) for r in rows}]
    return closest(*chosen) if len(chosen) > 1 else []


def same_pairs(attacks: Mapping[str, Attack], attacked: Sequence[Row], mirroring: int, selection: int) -> list[Row]:
    """The clean rows of the pairs (target, candidate) that were attacked; [] unless all are there."""
    pairs = {(r.target, r.candidate) for r in attacked}
    clean = [r for r in pick(attacks.get("clean"), "intruder", mirroring, selection) if (r.target, r.candidate) in pairs]
    return clean if len(clean) == len(pairs) else []


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

    Over several runs: means, distinct targets, pairs summed, `range` [lowest, highest] of each mean, `runs` how many had
    the rows; `interval` is then that of the mean AU-ROC, a target resampled with its rows in every run that attacks it.
    `clean_same_pairs` is the AU-ROC of the attacked pairs without the attack, what it is to be set beside (None: no such
    rows); `of`, for `worst`, the attacks it is the strongest of.
    """
    found, several, before = [], [], []
    for number, run in enumerate(runs):
        attacks = run.methods.get(method, {})
        clean = pick(attacks.get("clean"), "genuine", mirroring, selection)
        genuine, intruders = sides(attacks, name, mirroring, selection)
        if clean and genuine and intruders:
            evading = name not in (*DERIVED, "clean") and not pick(attacks[name], "intruder", mirroring, selection)
            found.append(merits(genuine, intruders, clean, evading))
            same = [] if evading else same_pairs(attacks, intruders, mirroring, selection)
            before.append(auroc([r.distance for r in genuine], [r.distance for r in same]) if same else math.nan)
            # of one manifest the same name is the same person; without one, persons of another run are others
            people = str(_json(run.folder / "people.json").get("sha256", number))
            several.append([(d, [f"{people} {t}" for t in names]) for d, names in (_columns(genuine), _columns(intruders))])
    if not found:
        return None
    result: dict[str, Any] = {k: sum(f[k] for f in found) for k in found[0]}
    spread = [k for k in result if not k.startswith("n_")]
    result |= {k: result[k] / len(found) for k in spread}
    result["clean_same_pairs"] = None if np.isnan(before).any() else float(np.mean(before))
    if name == "worst":
        result["of"] = [a for a in WORST if all(a in run.methods.get(method, {}) for run in runs)]
    result["interval"] = [None, None]
    everyone = sorted({t for (_, a), (_, b) in several for t in {*a} & {*b}})
    result["n_targets"] = len(everyone)
    if all(f["n_targets"] > 1 for f in found):
        held = sorted({t for (_, a), (_, b) in several for t in {*a, *b}})
        result["interval"] = list(_percentiles(np.mean([bootstrap(*g, *i, among=held) for g, i in several], 0)))
    if len(runs) > 1:
        result |= {"range": {k: [f(m[k] for m in found) for f in (min, max)] for k in spread}, "runs": len(found)}
    return result


def _columns(rows: Sequence[Row]) -> tuple[list[float], list[str]]:
    return [r.distance for r in rows], [r.target for r in rows]


def names(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{method: attacks}, both in the paper's order, then those it does not know, the derived attacks last."""

    def ordered(found: set[str], known: Sequence[str]) -> list[str]:
        return [*(n for n in known if n in found), *sorted(found - set(known))]

    held = {m: {a for run in runs for a in run.methods.get(m, ())} for run in runs for m in run.methods}
    return {m: [*ordered(held[m], ATTACKS), *DERIVED[1:]] for m in ordered(set(held), METHODS)}


def summary(
    run: Run | Path | str | Sequence[Run], mirroring: int = 1, selection: int = 1
) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {attack: figures}}, see `measure`; `detected` is the share detected at 5 % FPR. Attacks without rows
    under this setting are left out."""
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
    head = f"{'AU-ROC':>7}  {'95 % interval':<15}{'AU-PR':>6}{'AP':>7}{'detected':>10}  {COUNTS}"
    first = max(14, *(len(method) + 2 for method in result))
    lines = [f"{'method':<{first}}{'attack':<21}{head}"]
    for method, attacks in result.items():
        for name, m in attacks.items():
            lo, hi = m["interval"]
            between = "one target" if lo is None else f"{lo:.3f}-{hi:.3f}"
            lines.append(
                f"{method:<{first}}{name:<21}{m['auroc']:>7.3f}  {between:<15}{m['aupr']:>6.3f}{m['ap']:>7.3f}"
                f"{m['detected']:>10.1%}  {_counts(m)}"
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


def _verdict(name: str, detail: str, bad: Sequence[str], ran: int, missing: str) -> Check:
    if not ran:
        return Check(name, NOT_RUN, missing)
    return Check(name, FAILED if bad else OK, "; ".join(bad) or detail)


def check_gradients(attacks: Mapping[str, Attack]) -> Check:
    """Fails when an attack met a gradient that was zero everywhere, or not finite: it cannot have followed that."""
    bad, ran = [], 0
    for name, attack in attacks.items():
        zero, nonfinite, of = (attack.sidecar.get(k) for k in ("zero_gradients", "nonfinite", "gradients"))
        ran += (zero is not None or nonfinite is not None) and of != 0
        if zero or nonfinite:
            bad.append(f"{name}: {zero or 0} zero and {nonfinite or 0} non-finite of {of or 'an unknown number'}")
    return _verdict("gradients", "none zero or non-finite", bad, ran, "no attack counted its gradients")


def _effort(attack: Attack) -> tuple[float, float]:
    return float(attack.sidecar.get("iterations") or 0), float(attack.sidecar.get("restarts") or 0)


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
            points = sorted((int(k), float(v)) for k, v in (attack.sidecar.get(curve) or {}).items())
            for (few, weak), (many, strong) in pairwise(points):
                judge(f"{name}, {few} to {many} {curve[3:]}", weak, strong, evading)
        for other, more in attacks.items():
            (i, r), (more_i, more_r) = _effort(attack), _effort(more)
            same = name.split("-")[0] == other.split("-")[0] and 0 < i <= more_i and 0 < r <= more_r
            if same and (i, r) != (more_i, more_r) and (both := _paired(attack.rows, more.rows)):
                label = f"{name} {i:g} x {r:g} to {other} {more_i:g} x {more_r:g}"
                judge(label, both[0].mean(), both[1].mean(), evading)
    return _verdict("more effort", "more never weakened an attack", bad, ran, "no attack ran at two strengths")


def _paired(a: Sequence[Row], b: Sequence[Row]) -> tuple[np.ndarray, np.ndarray] | None:
    """Distances of both over the pairs they share, None without one."""
    left, right = ({(*r[1:9],): r.distance for r in rows if r.distance >= 0} for rows in (a, b))
    shared = sorted(left.keys() & right.keys())
    return (np.array([left[k] for k in shared]), np.array([right[k] for k in shared])) if shared else None


def check_random(attacks: Mapping[str, Attack]) -> Check:
    """Fails when random patterns bring the intruders of the same pairs closer, on average, than gradients do."""
    bad, ran = [], 0
    gradient, random = (attacks[a].rows if a in attacks else [] for a in ("eyeglasses", "random_eyeglasses"))
    if both := _paired(gradient, random):
        ran = 1
        gradient_mean, random_mean = both[0].mean(), both[1].mean()
        if random_mean < gradient_mean:
            bad = [f"mean distance {random_mean:.4g} by random search, {gradient_mean:.4g} by gradients"]
    return _verdict("random search", "does not beat gradients", bad, ran, "no pairs under both kinds of eyeglasses")


def check_indirect(attacks: Mapping[str, Attack], margin: float = 0.02) -> Check:
    """Sec. 4.4: fails when the indirect attack takes more than `margin` of AU-ROC off the direct one, a sign that
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
    moved = {a: float(v.sidecar["outside_mask_max"]) for a, v in attacks.items() if "outside_mask_max" in v.sidecar and a != "clean"}
    bad = [f"{a}: by {v:.3g}" for a, v in moved.items() if not v <= tolerance]
    return _verdict("outside the mask", "nothing changed", bad, len(moved), "no attack measured it")


def check_reproducible(attacks: Mapping[str, Attack], tolerance: float = 0.02) -> Check:
    """Fails when the same attack with the same seed gave other distances, on average by over `tolerance` (a share).
    Repeats: `reproducible` in a sidecar, `<attack>-<anything>.csv` with the same config, and the direct half of the
    indirect attack, which starts where the eyeglasses did."""
    flags = {a: v.sidecar.get("reproducible") for a, v in attacks.items()}
    bad, ran = [a for a, v in flags.items() if v is not None and not v], sum(v is not None for v in flags.values())
    indirect = [r._replace(distance=r.direct) for r in attacks["indirect"].rows] if "indirect" in attacks else []
    again = {**attacks, "eyeglasses (direct)": Attack(indirect, attacks["indirect"].sidecar)} if indirect else attacks
    for (a, one), (b, two) in combinations(again.items(), 2):
        if a.split("-")[0] != b.split("-")[0].removesuffix(" (direct)") or _effort(one) != _effort(two):
            continue
        settings = [{**(v.sidecar.get("config") or {}), "defences": ""} for v in (one, two)]
        if settings[0] == settings[1] and (both := _paired(one.rows, two.rows)):
            ran += 1
            if not np.mean(np.abs(both[0] - both[1])) <= tolerance * both[0].mean():
                bad.append(f"{a} and {b}: distances differ by {np.mean(np.abs(both[0] - both[1])):.3g} on average")
    return _verdict("same seed, same result", "repeated", bad, ran, "no attack was repeated")


def check_harm(attacks: Mapping[str, Attack]) -> Check:
    """Fails when an attack leaves a higher AU-ROC than the same pairs have without it: it does nothing, whatever its figure."""
    bad, ran = [], 0
    for name in set(attacks) & {"eyeglasses", "square", "eye_patch", "indirect"}:
        for m, s in sorted({(r.mirroring, r.selection) for r in attacks[name].rows}):
            genuine, intruders = sides(attacks, name, m, s)
            if same := same_pairs(attacks, intruders, m, s):
                ran += 1
                before, after = (auroc(_columns(genuine)[0], _columns(rows)[0]) for rows in (same, intruders))
                if after > before:
                    bad.append(f"{name}: AU-ROC from {before:.3f} to {after:.3f}" + ("" if (m, s) == (1, 1) else f" with mirroring {m}, selection {s}"))
    return _verdict("attacks harm", "no attack raised the AU-ROC of its pairs", sorted(bad), ran, "no attacked pairs with clean rows")


CHECKS = (check_gradients, check_effort, check_harm, check_random, check_indirect, check_mask, check_reproducible)


def health(runs: Sequence[Run]) -> list[Check]:
    """Every check over every method of every run; one that fails anywhere has failed, and says where."""
    result = []
    for check in CHECKS:
        found = []
        for run in runs:
            where = f"{run.folder.name} " if len(runs) > 1 else ""
            found += [(method, f"{where}{method}", check(attacks)) for method, attacks in run.methods.items()]
        failed = [f"{where}: {c.detail}" for _, where, c in found if c.status == FAILED]
        passed = sorted({method for method, _, c in found if c.status == OK})
        name, status, detail = next((c for _, _, c in found if c.status == OK), found[0][2])
        if passed:
            detail = f"{detail} in {', '.join(passed)}"
        result.append(Check(name, FAILED, "; ".join(failed)) if failed else Check(name, status, detail))
    return result


def health_lines(checks: Sequence[Check]) -> str:
    """One line a check, to stand with every table."""
    return "\n".join(f"{c.status:<8} {c.name}: {c.detail}" for c in checks)


TABLE_1 = (  # row, method, mirroring, selection, and the paper's AU-ROC and AU-PR
    ("Ours, basic", "ours", 0, 0, ((0.957,), (0.773, 0.809), (0.742, 0.785), (0.775, 0.789))),
    ("Ours, mirroring", "ours", 1, 0, ((0.959,), (0.812, 0.845), (0.789, 0.825), (0.791, 0.804))),
    ("Ours, selection", "ours", 0, 1, ((0.976,), (0.831, 0.868), (0.809, 0.848), (0.884, 0.895))),
    ("Ours, both", "ours", 1, 1, ((0.978,), (0.868, 0.896), (0.850, 0.882), (0.893, 0.903))),
    ("Ours, transfer, both", "ours-transfer", 1, 1, ()),
    ("Weak AT", "weak-at", 1, 1, ((0.886,), (0.704, 0.726), (0.700, 0.722), (0.571, 0.556))),
    ("DOA, C = 4", "doa-4", 1, 1, ((0.972,), (0.830, 0.873), (0.836, 0.873), (0.826, 0.844))),
    ("DOA, C = 10", "doa-10", 1, 1, ((0.967,), (0.843, 0.878), (0.831, 0.864), (0.879, 0.886))),
)
TABLE_2 = (
    ("Without AT", "no-at", 1, 1, ((0.977,), (0.590, 0.669), (0.695, 0.757), (0.657, 0.608))),
    TABLE_1[3],
    TABLE_1[4],
)
HOURS = {"ours": 11, "doa-10": 25, "generator": 14}  # Sec. 4, one RTX 2080 Ti: 20,000 steps, the generator 200 epochs
LABELS = {m: label.removesuffix(", both") for label, m, *_ in (*TABLE_1, *TABLE_2)}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def cell(m: Mapping[str, Any] | None, pr: bool = True) -> str:
    """`AU-ROC [interval; runs lowest to highest] / AU-PR` of a measure, or `not run`."""
    if m is None:
        return NOT_RUN
    notes = [] if m["interval"][0] is None else ["{:.3f}, {:.3f}".format(*m["interval"])]
    if m.get("runs", 1) > 1:
        notes.append("runs {:.3f} to {:.3f}".format(*m["range"]["auroc"]))
    return f"{m['auroc']:.3f}" + (f" [{'; '.join(notes)}]" if notes else "") + (f" / {m['aupr']:.3f}" if pr else "")


def _counts(m: Mapping[str, Any] | None) -> str:
    return f"{m['n_targets']} / {m['n_genuine']} / {m['n_intruders']}" if m else "-"


def comparison(runs: Sequence[Run], lines: Sequence[tuple[str, str, int, int, tuple]]) -> str:
    """Table 1 or 2: the paper's figure beside ours."""
    header = ["", "clean", "paper"]
    for name in ("eyeglasses", "square", "eye patch"):
        header += [name, "paper"]
    body = []
    for label, method, m, s, paper in lines:
        row = [label]
        found = [measure(runs, method, a, m, s) for a in ("clean", "eyeglasses", "square", "eye_patch")]
        for n, figures in enumerate(found):
            row += [cell(figures, n > 0), " / ".join(f"{v:.3f}" for v in paper[n]) if paper else "-"]
        same = found[1]["clean_same_pairs"] if found[1] else None
        row.insert(3, NOT_RUN if same is None else f"{same:.3f}")
        body.append([*row, _counts(found[1] or found[0])])
    header.insert(3, "clean, the attacked pairs")
    return markdown([*header, f"{COUNTS} under eyeglasses"], body)


def _evasion(runs: Sequence[Run]) -> str:
    body = []
    for method in dict.fromkeys(["ours", "ours-transfer", "doa-10", *names(runs)]):
        paper = {"ours": "25.2 %", "doa-10": "19.8 % (C not said)"}.get(method, "-")
        m, between = measure(runs, method, "evasion"), []
        for run in runs if m else ():
            clean, own = (pick(run.methods.get(method, {}).get(a), "genuine", 1, 1) for a in ("clean", "evasion"))
            if clean and own:
                lo, hi = detection_interval(*_columns(clean), *_columns(own), evading=True)
                between.append("one target" if math.isnan(lo) else f"{lo:.1%} to {hi:.1%}")
        share = f"{m['detected']:.1%} [{'; '.join(between)}]" if m else NOT_RUN
        body.append([LABELS.get(method, method), share, paper, _counts(m)])
    return markdown(["", "evading images detected [a run's interval]", "paper", COUNTS], body)


def _distal(runs: Sequence[Run]) -> str:
    """How many images made from noise eq. (1) takes for the target, at 5 % FPR."""
    lines = []
    for method in names(runs):
        made, accepted = 0, 0
        for run in runs:
            attacks = run.methods.get(method, {})
            clean, distal = pick(attacks.get("clean"), "genuine", 1, 1), pick(attacks.get("distal"), "intruder", 1, 1)
            if clean and distal:
                delta = threshold([r.distance for r in clean])
                made, accepted = made + len(distal), accepted + sum(r.distance < delta for r in distal)
        if made:
            lines.append(
                f"- {LABELS.get(method, method)}: {accepted} of {made} images made from noise pass as the target."
            )
    return "\n".join(lines) or f"- Distal: {NOT_RUN}"


def _settings(runs: Sequence[Run]) -> str:
    """What each attack really ran with, and who was attacked so."""
    used: dict[tuple[str, str, str], set[str]] = {}
    keys = ("iterations", "restarts", "patterns", "training_intruders", "a_step", "positions", "search_iterations")
    for run in runs:
        for method, attacks in run.methods.items():
            for name, attack in attacks.items():
                effort = ", ".join(f"{attack.sidecar[k]} {k.replace('_', ' ')}" for k in keys if k in attack.sidecar)
                used.setdefault((name, effort or "-", str(attack.sidecar.get("device", "-"))), set()).add(method)
    everyone = set(names(runs))
    body = [[*k, "all" if used[k] == everyone else ", ".join(sorted(used[k]))] for k in sorted(used)]
    return markdown(["attack", "effort", "device", "methods"], body)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The finished lines of a log, [] without one; raises UsageError naming the line that is not JSON."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    result = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            result.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            raise UsageError(f"{path}:{number}: not a JSON object; correct the line or train again") from None
    return result


def cost(folder: Path) -> tuple[float, float] | None:
    """(steps, seconds) of a training: the last line of log.jsonl, `seconds` since the start; None without one."""
    timed = [d for d in read_log(folder / "log.jsonl") if d.get("seconds") and d.get("step")]
    return (float(timed[-1]["step"]), float(timed[-1]["seconds"])) if timed else None


def generator_cost(run: Path) -> tuple[float, float] | None:
    """(epochs, seconds) of the generator's training, from its log; None without one."""
    if (run / "generator.jsonl").exists():  # rows of before: seconds of each epoch
        timed = [float(d["seconds"]) for d in read_log(run / "generator.jsonl") if d.get("seconds")]
        return (float(len(timed)), sum(timed)) if timed else None
    timed = [float(d["seconds"]) for d in read_log(run / "generator" / "log.jsonl") if d.get("seconds")]
    return (float(len(timed)), timed[-1]) if timed else None


def _costs(runs: Sequence[Run]) -> str:
    body = []
    for method in ("generator", *names(runs)):
        every = [generator_cost(r.folder) if method == "generator" else cost(r.folder / method) for r in runs]
        found, unit, count = [c for c in every if c], *(("epoch", 200) if method == "generator" else ("step", 20000))
        paper = f"{HOURS[method]} h, {HOURS[method] * 3600 / count:.3g} s" if method in HOURS else "-"
        mine = [NOT_RUN] * 3
        if found:
            steps, seconds = np.mean(found, 0)
            mine = [f"{seconds / steps:.3g} s", f"{seconds / 60:.1f} min", f"{steps:.0f} {unit}s"]
        body.append([LABELS.get(method, method), *mine, paper])
    return markdown(["", "a step or epoch", "in all", "number", "paper, one RTX 2080 Ti: in all, each"], body)


def _disentanglement(runs: Sequence[Run]) -> str:
    reports = [d for run in runs if (d := _json(run.folder / "generator.json") or _json(run.folder / "generator" / "result.json"))]
    reports = [{k: v for k, v in d.items() if k != "made_of" and not k.startswith("seconds")} for d in reports]
    flat: dict[str, list[float]] = {}
    for report in reports:
        for key, value in report.items():
            for inner, v in value.items() if isinstance(value, Mapping) else [("", value)]:
                if isinstance(v, (int, float)):
                    flat.setdefault(f"{key} {inner}".strip().replace("_", " "), []).append(float(v))
    body = [
        [k, f"{np.mean(v):.4g}" + (f" ({min(v):.4g} to {max(v):.4g})" if len(v) > 1 else "")] for k, v in flat.items()
    ]
    return markdown(["generator, persons it never saw", "value"], body) if body else NOT_RUN


def _beyond(runs: Sequence[Run]) -> str:
    header = ("eyeglasses", "eot_eyeglasses", "eye_patch", "grey_eye_patch", "eot_eye_patch", "worst")
    every = [attacks for run in runs for attacks in run.methods.values()]
    common = [a for a in WORST if all(a in attacks for attacks in every)]  # the strongest of other attacks is not to be set beside it
    fewer = [
        Run(run.folder, {m: {a: v for a, v in attacks.items() if a in ("clean", *common)} for m, attacks in run.methods.items()})
        for run in runs
    ]
    body = []
    for m in names(runs):
        body.append([LABELS.get(m, m), *(cell(measure(runs, m, a)) for a in header), cell(measure(fewer, m, "worst"))])
    return markdown(["", *(h.replace("grey_eye_patch", "grey eye patch, no attack") for h in header[:-1]), "worst of all it met", f"worst of {', '.join(common) or 'those all met'}"], body)


def _noise(runs: Sequence[Run]) -> str:
    body = [["Paper", "0.978", "-", "0.973", "0.965", "100 targets x 900 intruders (random eyeglasses)"]]
    for method in dict.fromkeys(["ours", "ours-transfer", *names(runs)]):
        found = [measure(runs, method, a) for a in ("clean", "random_eyeglasses", "noise")]
        if any(found[1:]) or method == "ours":
            same = next((m["clean_same_pairs"] for m in found[1:] if m and m["clean_same_pairs"] is not None), None)
            row = [cell(m, False) for m in found]
            row.insert(1, NOT_RUN if same is None else f"{same:.3f}")
            body.append([LABELS.get(method, method), *row, _counts(found[1] or found[2])])
    return markdown(["", "clean", "clean, the same pairs", "random eyeglasses", "uniform noise", COUNTS], body)


def _indirect(runs: Sequence[Run]) -> str:
    body = [["Paper", "0.868", "0.867", "-"]]
    for method in dict.fromkeys(["ours", "ours-transfer", *names(runs)]):
        direct, either = (measure(runs, method, a) for a in ("direct", "direct+indirect"))
        if direct or method == "ours":
            body.append([LABELS.get(method, method), cell(direct, False), cell(either, False), _counts(either)])
    return markdown(["", "direct", "more successful of direct and indirect", COUNTS], body)


def report(runs: Sequence[Run]) -> str:
    """tables.md: every table of the paper, the paper's figures beside ours, `not run` where a run has no rows."""
    sidecars = [a.sidecar for run in runs for attacks in run.methods.values() for a in attacks.values()]
    people = [_json(run.folder / "people.json") for run in runs]
    data, seeds, commits = (
        ", ".join(sorted({str(d[key]) for d in (found if any(key in d for d in found) else people) if key in d}))
        or "unknown"
        for key, found in (("data", sidecars), ("seed", people), ("commit", sidecars))
    )
    several = " and the lowest and highest run" if len(runs) > 1 else ""
    return f"""# Tables

Data: {data}; runs: {len(runs)}; seed: {seeds}; commit: {commits}. The paper's figures are for CelebA.
Figures are AU-ROC / AU-PR, precision = TPR / (TPR + FPR), intruder positive; in brackets the 95 % bootstrap interval of
the AU-ROC over targets{several}.

## Health checks

```
{health_lines(health(runs))}
```

## Attacks as run

{_settings(runs)}

## Table 1

{comparison(runs, TABLE_1)}

## Table 2: without adversarial training

{comparison(runs, TABLE_2)}

## App. B.2: random perturbations, AU-ROC

{_noise(runs)}

## Sec. 4.3: evasion at 5 % FPR

{_evasion(runs)}

## Sec. 4.4: indirect anchor and distal attacks

{_indirect(runs)}

{_distal(runs)}

## Beyond the paper: transformed patches, and the strongest attack per intruder

{_beyond(runs)}

## Disentanglement

{_disentanglement(runs)}

## Cost

{_costs(runs)}
"""


class Missing(ValueError):
    """A figure's input that the run does not hold; the text names it."""


STEPS = {"weak-at-7": (7, 30), "weak-at-10": (10, 16), "weak-at-20": (20, 12), "weak-at-40": (40, 6)}  # App. A, Fig. 5


def load_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of an .npz; raises Missing naming the file or the array."""
    if not path.exists():
        raise Missing(f"{path} is missing")
    try:
        with np.load(path) as file:
            if absent := [k for k in keys if k not in file]:
                raise Missing(f"{path} holds no array {absent[0]!r}")
            return [file[k] for k in keys]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise error if isinstance(error, Missing) else Missing(f"{path} is not readable ({error})") from None


def picture(image: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 or float in [0, 1] -> (H, W, 3) float."""
    return np.moveaxis(image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1), 0, -1).clip(0, 1)


def _new(rows: int, columns: int, width: float, height: float, **how: Any) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return made, made.subplots(rows, columns, squeeze=False, **how)


def _show(axis: Any, image: np.ndarray, title: str = "") -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    if title:
        axis.set_title(title, fontsize=9)


def _blocks(quadruplets: np.ndarray) -> list[np.ndarray]:
    """(n, 4, 3, H, W) in the order x, y, t, u -> n pictures of 2 x 2: x y over t u, a white line between."""
    made = []
    for x, y, t, u in quadruplets:
        x, y, t, u = (np.pad(picture(i), ((1, 1), (1, 1), (0, 0)), constant_values=1.0) for i in (x, y, t, u))
        made.append(np.concatenate([np.concatenate([x, y], 1), np.concatenate([t, u], 1)], 0))
    return made


def _quadruplets(run: Run) -> Path:
    before = run.folder / "quadruplets.npz"
    return before if before.exists() else run.folder / "generator" / "quadruplets.npz"


def figure_1(run: Run) -> Any:
    """One quadruplet x, y, t, u."""
    (rows,) = load_arrays(_quadruplets(run), "quadruplets")
    figure, axes = _new(2, 2, 4.2, 4.6)
    titles = ("x, real", "y = G(E_cl(x), E_co(x))", "t, real, another person", "u = G(E_cl(x), E_co(t))")
    for axis, image, title in zip(axes.flat, rows[0], titles):
        _show(axis, picture(image), title)
    return figure


def _curve(run: Run, method: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    lines = [d for d in read_log(run.folder / method / "log.jsonl") if d.get(key) is not None and "step" in d]
    return np.array([d["step"] for d in lines]), np.array([float(d[key]) for d in lines])


def _smooth(values: np.ndarray, share: int = 25) -> np.ndarray:
    width = max(1, len(values) // share)
    weight = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.convolve(values, np.ones(width), "same") / weight


def figure_2(run: Run) -> Any:
    """Train and test loss of each method, one panel a method on one scale."""
    doa = "doa-10" if len(_curve(run, "doa-10", "loss")[0]) else "doa-4"
    found = [m for m in ("ours", "ours-transfer", doa, "weak-at") if len(_curve(run, m, "val_loss")[0])]
    if not found:
        raise Missing(f"{run.folder}/<method>/log.jsonl with val_loss is missing")
    figure, axes = _new(1, len(found), 3.1 * len(found) + 0.4, 3.0, sharey=True)
    for axis, method in zip(axes.flat, found):
        steps, loss = _curve(run, method, "loss")
        axis.plot(steps, _smooth(loss), color="tab:blue", label="train")
        steps, loss = _curve(run, method, "val_loss")
        smooth = _smooth(loss)
        axis.plot(steps, loss, color="tab:orange", alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth, color="tab:orange", label="test, real pairs")
        axis.set_title(LABELS.get(method, method), fontsize=10)
        axis.set_xlabel("step")
    start = max(_curve(run, m, "val_loss")[1][0] for m in found)
    axes[0, 0].set_ylim(0, min(axes[0, 0].get_ylim()[1], 3 * start))  # a loss that runs away leaves the panel
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def figure_3(run: Run) -> Any:
    """Distances of real-real and real-generated pairs of different persons, one panel a network."""
    panels = {}
    for path in sorted(run.folder.glob("*/attacks/figure3.csv")):
        kinds: dict[str, list[float]] = {}
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    kinds.setdefault(row["kind"], []).append(float(row["distance"]))
                except (KeyError, TypeError, ValueError):
                    raise Missing(f"{path} has a row without kind and distance") from None
        if kinds:
            panels[path.parent.parent.name] = kinds
    if not panels:
        raise Missing(f"{run.folder}/<method>/attacks/figure3.csv is missing")
    figure, axes = _new(1, len(panels), 3.6 * len(panels), 3.0)
    for axis, (method, kinds) in zip(axes.flat, panels.items()):
        bins = np.linspace(0, max(max(v) for v in kinds.values()), 41)
        for color, (kind, values) in zip(("tab:blue", "tab:orange", "tab:green"), sorted(kinds.items(), reverse=True)):
            label = f"{kind}, median {np.median(values):.2f}, n = {len(values)}"
            axis.hist(values, bins, density=True, alpha=0.5, color=color, label=label)
            axis.axvline(np.median(values), ymax=0.78, color=color, linestyle="--", linewidth=1)
        axis.set_title(f"measured by {LABELS.get(method, method)}", fontsize=10)
        axis.set_xlabel("distance, different persons")
        axis.legend(fontsize=7, frameon=False, loc="upper left")
        axis.set_ylim(top=axis.get_ylim()[1] * 1.25)
        axis.set_yticks([])
    return figure


def _first(run: Run, name: str) -> Path:
    """The .npz of an attack, of the first method that has it; ours comes first."""
    found = [p for m in names([run]) if (p := run.folder / m / "attacks" / f"{name}.npz").exists()]
    return found[0] if found else run.folder / "ours" / "attacks" / f"{name}.npz"


def figure_4(run: Run, columns: int = 8) -> Any:
    """Targets over the images made from noise (distal attack)."""
    path = _first(run, "distal")
    targets, made, distance = load_arrays(path, "anchor", "attacked", "distance")
    clean = pick(run.methods.get(path.parent.parent.name, {}).get("clean"), "genuine", 1, 1)
    delta = threshold([r.distance for r in clean]) if clean else None
    n = min(columns, len(made))
    figure, axes = _new(2, n, 1.1 * n + 0.3, 2.7)
    for k in range(n):
        _show(axes[0, k], picture(targets[k]))
        _show(axes[1, k], picture(made[k, 0]))
        verdict = "" if delta is None else "\npasses" if distance[k, 0] < delta else "\nis refused"
        axes[1, k].set_xlabel(f"distance {distance[k, 0]:.2f}{verdict}", fontsize=7)
    if delta is not None:
        figure.suptitle(f"eq. (1) at 5 % FPR: passes below {delta:.2f}", fontsize=8)
    axes[0, 0].set_ylabel("target", fontsize=9)
    axes[1, 0].set_ylabel("from noise", fontsize=9)
    return figure


def figure_5(run: Run) -> Any:
    """Test loss of weak adversarial training for the step settings; a dot at the lowest, where it would stop early."""
    curves: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}
    for method in (path.parent.name for path in sorted(run.folder.glob("weak-at*/log.jsonl"))):
        result = _json(run.folder / method / "result.json")
        config = result.get("made_of", result).get("config", {})
        count, size = STEPS.get(method, (10, 16))
        curve = _curve(run, method, "val_loss")
        if len(curve[0]):
            curves[config.get("attack_steps", count), config.get("attack_alpha", size)] = curve
    if not curves:
        raise Missing(f"{run.folder}/weak-at-<7|10|20|40>/log.jsonl is missing")
    figure, axes = _new(1, 1, 5.2, 3.4)
    for (count, size), (steps, loss) in sorted(curves.items()):
        smooth = _smooth(loss)
        (line,) = axes[0, 0].plot(steps, smooth, label=f"{count} steps of {size:g}/255")
        axes[0, 0].plot(steps, loss, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axes[0, 0].plot(steps[smooth.argmin()], smooth.min(), "o", color=line.get_color())
    highest = 3 * max(loss[0] for _, loss in curves.values())
    axes[0, 0].set_ylim(top=min(axes[0, 0].get_ylim()[1], highest))  # a loss that runs away leaves the panel
    axes[0, 0].set(xlabel="step", ylabel="test loss, real pairs (dot: lowest)", title="Weak adversarial training")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def _face(run: Run) -> np.ndarray:
    """(64, 64, 3): the mean of the faces that the square attack shows, grey without them."""
    try:
        (faces,) = load_arrays(_first(run, "square"), "clean")
    except Missing:
        return np.full((64, 64, 3), 0.8)
    return np.mean([picture(i) for i in faces.reshape(-1, *faces.shape[-3:])], 0)


def figure_6(run: Run) -> Any:
    """The three masks, in black over a face they were used on."""
    figure, axes = _new(1, 3, 6.0, 2.5)
    for axis, name in zip(axes.flat, ("eyeglasses", "square", "eye_patch")):
        mask, faces = load_arrays(_first(run, name), "mask", "clean")
        mask = mask[0] if mask.ndim == 3 else mask
        title = f"{name.replace('_', ' ')}{', location varies' if name == 'square' else ''}"
        _show(axis, picture(faces[0, 0]) * ~mask[..., None], f"{title}\n{mask.sum()} pixels, {mask.mean():.1%}")
    return figure


def figure_7(run: Run) -> Any:
    """The square's search region, and how often each position won, over the mean face."""
    from matplotlib.patches import Rectangle

    found = [m for m in names([run]) if "square" in run.methods[m]]
    rows = [r for m in found[:1] for r in pick(run.methods[m]["square"], "intruder", 1, 1) if r.row >= 0]
    if not rows:
        raise Missing(f"{run.folder}/<method>/attacks/square.csv with columns row and col is missing")
    starts = np.array([(r.row, r.col) for r in rows])
    figure, axes = _new(1, 2, 6.6, 3.2)
    low, high = starts.min(0), starts.max(0) + 10
    _show(axes[0, 0], _face(run), "search region")
    axes[0, 0].add_patch(Rectangle((14.5, 14.5), 30, 30, fill=False, color="yellow", linewidth=2))
    places = np.unique(starts)
    stride = int(np.diff(places).min()) if len(places) > 1 else 5
    counts = np.zeros((high - 10 - low) // stride + 1)
    np.add.at(counts, tuple(((starts - low) // stride).T), 1)
    _show(axes[0, 1], _face(run), f"centres of the {len(rows)} best squares, {LABELS.get(found[0], found[0])}")
    (top, left), (bottom, right) = low + 4.5 - stride / 2, high - 10 + 4.5 + stride / 2
    heat = axes[0, 1].imshow(counts, extent=(left, right, bottom, top), cmap="viridis", alpha=0.75, vmin=0)
    axes[0, 1].set(xlim=(-0.5, 63.5), ylim=(63.5, -0.5))
    figure.colorbar(heat, ax=axes[0, 1], label="times best")
    return figure


def figure_8(run: Run, lines: int = 4, columns: int = 5) -> Any:
    """Targets, their universal eye patches, and the patches on intruders they were not trained on."""
    targets, patches, images = load_arrays(_first(run, "eye_patch"), "anchor", "pattern", "attacked")
    n, k = min(lines, len(targets)), min(columns, images.shape[1])
    figure, axes = _new(n, k + 2, 1.15 * (k + 2.6), 1.15 * n + 0.3, width_ratios=[1, 1.6] + [1] * k)
    for row, axis in enumerate(axes):
        _show(axis[0], picture(targets[row]), "" if row else "target")
        _show(axis[1], picture(patches[row]), "" if row else "universal patch")
        for column in range(k):
            _show(
                axis[2 + column],
                picture(images[row, column]),
                "patched intruders" if row == 0 and column == k // 2 else "",
            )
    return figure


def figure_9(run: Run, columns: int = 6) -> Any:
    """Quadruplets, each x y over t u."""
    (rows,) = load_arrays(_quadruplets(run), "quadruplets")
    blocks = _blocks(rows[: 4 * columns])
    lines = -(-len(blocks) // columns)
    figure, axes = _new(lines, columns, 1.6 * columns, 1.6 * lines)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, block in zip(axes.flat, blocks):
        _show(axis, block)
    return figure


FIGURES = (figure_1, figure_2, figure_3, figure_4, figure_5, figure_6, figure_7, figure_8, figure_9)


def write(path: Path, content: bytes) -> None:
    """Beside, then moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)


def draw(run: Run, folder: Path, numbers: Sequence[int] = range(1, 10)) -> list[str]:
    """Figures of these numbers (1-9) as PNG into `folder`; returns one line for each that could not be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ["figures: not made, matplotlib is not installed (pip install matplotlib)"]
    told = []
    for number in numbers:
        figure = FIGURES[number - 1]
        try:
            buffer = io.BytesIO()
            figure(run).savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)
            write(folder / f"figure{number}.png", buffer.getvalue())
        except (Missing, UsageError) as error:
            told.append(f"figure {number}: not made, {error}")
    return told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables, figures and health checks from the rows of a run.")
    parser.add_argument(
        "--run", type=Path, required=True, nargs="+", help="the folder embed.py wrote; several: their mean"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and write nothing")
    parser.add_argument(
        "--mirroring", type=int, choices=(0, 1), default=1, help="rows with the mirror image averaged in"
    )
    parser.add_argument("--selection", type=int, choices=(0, 1), default=1, help="rows with the anchor selected")
    parser.add_argument(
        "--rows", default="attacks", help="folder of rows in each method, attacks-<name> for other people"
    )
    parser.add_argument(
        "--figures", type=int, nargs="*", choices=range(1, 10), default=range(1, 10), help="only these, none when empty"
    )
    parser.add_argument("--out", type=Path, help="where tables.md and figures/ go (default: the first run)")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder, args.rows) for folder in args.run]
        result = summary(runs, args.mirroring, args.selection)
        if args.json:
            print(json.dumps(result, indent=1))
            return 0
        print(f"{table(result)}\n\n{health_lines(health(runs))}\n")
        out = args.out or args.run[0]
        write(out / "tables.md", report(runs).encode())
        told = draw(runs[0], out / "figures", args.figures)
        print("\n".join([*told, f"wrote {out}/tables.md" + (f" and {out}/figures" if args.figures else "")]))
    except UsageError as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"metrics.py: {error.filename}: {error.strerror}; give a folder that can be written as --out",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("metrics.py: stopped; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
