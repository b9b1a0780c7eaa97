"""AU-ROC, AU-PR, detection, intervals and health checks from the rows of a run (Sec. 4).

    python metrics.py --run runs/synthetic-demo-0            # table, checks, tables.md, figures
    python metrics.py --run runs/synthetic-demo-0 --json     # {"<method>": {"<attack>": {...}}}
    python metrics.py --run runs/a-0 runs/a-1 runs/a-2       # mean and range over runs (seeds)

In: `<run>/<method>/attacks/<attack>.csv`, one row a compared pair, and the .json beside it, or all
of them in `<run>/attacks.csv.gz` and `attacks.json`. Out: `tables.md` and `figures/*.png`, which
results/ makes. Measured: six methods, 25,620 rows, on one busy CPU core: 10 s, --json alone 4 s.

The positive class is the intruder ("different", eq. (1) = 1), the score is the distance: the
balanced precision TPR / (TPR + FPR) then starts at 1 when an attack moves some intruders all the
way and leaves the rest alone, so AU-PR lies above AU-ROC as in most of the paper's pairs (0.868 /
0.896); with the genuine class as the positive one it would lie below. AU-PR is the step-wise sum,
so that chance is exactly 0.5. So the paper's FPR is the biometric FRR, genuine images refused.
FAR, the biometric one, is the share of intruders that pass, TAR that of genuine images.
"""

from __future__ import annotations

import csv
import functools
import gzip
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    from data import run
except ImportError:  # this file was copied alone: its functions work, its command does not
    run = None  # type: ignore[assignment]

FPR = 0.05  # Sec. 4.3
# not in the paper: rates at these FARs, where at least so many unattacked intruders should pass
FARS, ERRORS = (0.1, 0.01), 10
# validation: genuine pairs of persons who set the threshold of verify.py's rule
ROLES = ("genuine", "intruder", "validation")
METHODS = ("ours", "transfer", "mixed", "weak-at", "doa-4", "doa-10", "no-at")
ATTACKS = ("clean", "eyeglasses", "square", "eye_patch", "random_eyeglasses", "noise", "evasion")
ATTACKS += ("indirect", "distal", "eot_eyeglasses", "mask", "rule")
# not in the paper: the rule's genuine pairs beside its bounds of the intruders, by column
CERTIFIED = {"certified": "bound"} | {f"certified_{s}": f"bound_{s}" for s in (8, 6, 4, 2)}
# Sec. 4.4; the others are not in the paper
DERIVED = ("direct", "direct+indirect", "worst", *CERTIFIED)
# the attacks that one printed patch can carry out
WORST = ("eyeglasses", "square", "eye_patch", "random_eyeglasses", "indirect", "mask")
JUDGE = ", judge"  # ends the name of an attack whose images a second model measured


class Row(NamedTuple):
    """One compared pair."""

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
    row: int = -1  # where a located patch sits
    col: int = -1
    direct: float = math.nan  # of the indirect attack: the direct half's distance
    judge: float = math.nan  # of the same image on a second model
    bound: float = math.nan  # of the rule: no patch brings the score below
    bound_2: float = math.nan  # no patch of 2 x 2 of 64
    bound_4: float = math.nan
    bound_6: float = math.nan
    bound_8: float = math.nan


COLUMNS = Row._fields[:10]  # that every file has


class Attack(NamedTuple):
    """The rows of one file and the settings written beside it ({} when there are none)."""

    rows: list[Row]
    sidecar: dict[str, Any]


Attacks = Mapping[str, Attack]  # of one method


@dataclass(frozen=True)
class Run:
    """methods: method -> attack -> rows; people: what people.json says ({} without it)."""

    folder: Path
    methods: dict[str, dict[str, Attack]]
    people: dict[str, Any] = field(default_factory=dict)


# Areas and rates


# genuine images and intruders below each delta that makes a difference, counts (..., K) rising from
# none to all, a row for each resampling; every figure is made of it
Roc = tuple[np.ndarray, np.ndarray]


def check_distances(values: Any) -> np.ndarray:
    """Return the distances as float64 (n,); ValueError unless there are some, all finite."""
    distances = np.asarray(values, dtype=np.float64).ravel()
    if not len(distances) or not np.isfinite(distances).all():
        raise ValueError("distances must be finite, at least one on each side")
    return distances


def roc(genuine: Any, intruders: Any) -> Roc:
    """Count the distances of genuine images (k,) and of intruders (n,) below every delta."""
    g, i = np.sort(check_distances(genuine)), np.sort(check_distances(intruders))
    deltas = np.append(np.unique(np.concatenate([g, i])), math.inf)
    return np.searchsorted(g, deltas), np.searchsorted(i, deltas)


def auroc(curve: Roc) -> np.ndarray:
    """Compute the chance that an intruder is farther than a genuine image, a tie one half."""
    genuine, intruders = curve
    # twice the pairs that the intruders between two deltas win
    won = np.diff(intruders) * (genuine[..., 1:] + genuine[..., :-1])
    return won.sum(-1) / intruders[..., -1] / (2 * genuine[..., -1])


def aupr(curve: Roc) -> np.ndarray:
    """Compute the area under precision over recall, precision = TPR / (TPR + FPR) (Sec. 4)."""
    # the share that each delta calls different, the largest delta first
    fpr, tpr = (1 - counts[..., -2::-1] / counts[..., -1:] for counts in curve)
    # of a resampling that refuses nobody yet both are 0, and it gains nothing there
    positives = np.maximum(tpr + fpr, 1e-300)
    return (np.diff(tpr, prepend=0.0) * tpr / positives).sum(-1)


def eer(curve: Roc) -> float:
    """Compute the equal error rate, FAR = 1 - TAR, on the line between the deltas around it."""
    tar, far = (counts / counts[-1] for counts in curve)
    return float(np.interp(0.0, far - (1 - tar), far))


def detection_at_fpr(curve: Roc, fpr: float = FPR, evading: bool = False) -> np.ndarray:
    """Compute the share of attacked images that eq. (1) detects at an FPR of at most `fpr`.

    curve: of the genuine pairs that set delta, the smallest that refuses at most `fpr` of them
    (Sec. 4.3), and of the attacked. Intruders are detected when eq. (1) calls them different,
    evading images, which are genuine, when it does not.
    """
    genuine, attacked = curve
    if not 0 <= fpr <= 1:
        raise ValueError(f"an FPR of {fpr}: give one in [0, 1]")
    every = genuine[..., -1:]
    must_pass = every - np.floor(fpr * every + 1e-9)
    at = (genuine >= must_pass).argmax(-1)[..., None]
    # Eq. (1): below delta is the same person
    same = np.take_along_axis(attacked, at, -1)[..., 0]
    return (same if evading else attacked[..., -1] - same) / attacked[..., -1]


def passing_at_far(curve: Roc, far: float) -> float:
    """Compute the share of images that pass at the largest delta with a FAR of at most `far`.

    curve: of the images (as if genuine) and of the unattacked intruders. Of genuine images it is
    the TAR, of attacked intruders the success of the attack (ASR).
    """
    images, intruders = curve
    if not 0 <= far <= 1:
        raise ValueError(f"a FAR of {far}: give one in [0, 1]")
    may_pass = math.floor(far * intruders[-1] + 1e-9)
    return float(images[intruders <= may_pass][-1] / images[-1])


# Intervals

Sample = tuple[Sequence[float], Sequence[str]]  # distances (n,) and their targets (n,)
Pair = tuple[Sample, Sample]  # genuine images and intruders


def bootstrap(
    figure: Callable[[Roc], np.ndarray], pairs: Sequence[Pair], n: int = 1000, seed: int = 0
) -> np.ndarray:
    """Compute a figure of n resamplings of the targets with replacement, (pairs, n).

    figure: a function of a Roc of counts (n, K), such as `auroc`. pairs: one for each run or
    method. A target brings all its rows in all pairs at once, so that their differences are paired.
    nan where a resampling lacks one class, or there is one target alone. Raises ValueError.
    """
    everyone = np.unique(np.concatenate([targets for pair in pairs for _, targets in pair]))
    T = len(everyone)
    if n < 1 or any(len(values) != len(targets) for pair in pairs for values, targets in pair):
        raise ValueError("as many targets as distances are needed, and a resampling or more")
    times = np.random.default_rng(seed).multinomial(T, np.full(T, 1 / T), size=n)
    result = np.full((len(pairs), n), math.nan)
    for number, pair in enumerate(pairs):
        distances = [check_distances(side[0]) for side in pair]
        deltas = np.unique(np.concatenate(distances))
        below = []
        for values, (_, targets) in zip(distances, pair):
            rows = np.zeros((T, len(deltas) + 1))
            target, delta = np.searchsorted(everyone, targets), np.searchsorted(deltas, values)
            np.add.at(rows, (target, delta + 1), 1)  # below all that are larger
            below.append(rows.cumsum(1))  # (T, K)
        # about 50,000 counts at a time, which stay in the cache
        step = max(1, 50_000 // len(deltas))
        for start in range(0, n, step):
            some = times[start : start + step].astype(float)
            genuine, intruders = some @ below[0], some @ below[1]  # (step, K)
            met = (genuine[:, -1] > 0) & (intruders[:, -1] > 0) & (T > 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                values = figure((genuine, intruders))
            result[number, start : start + step] = np.where(met, values, math.nan)
    return result


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Compute the percentile interval of resampled values (n,), nan left out; else (nan, nan)."""
    if np.isnan(replicates).all():
        return math.nan, math.nan
    low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# Which rows judge an attack


def under(attacks: Attacks, mirroring: int, selection: int) -> dict[str, Attack]:
    """Select the rows under one setting of the defender's augmentations (Sec. 4.2)."""
    return {
        name: Attack([r for r in a.rows if r[1:3] == (mirroring, selection)], a.sidecar)
        for name, a in attacks.items()
    }


def pick(attacks: Attacks, name: str, role: str) -> list[Row]:
    """Select the rows of one role, [] without the attack."""
    return [r for r in attacks[name].rows if r.role == role] if name in attacks else []


def roc_of(genuine: Sequence[Row], intruders: Sequence[Row]) -> Roc:
    """Count the distances of two lists of rows."""
    return roc([r.distance for r in genuine], [r.distance for r in intruders])


def by_pair(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Index rows by target and candidate."""
    return {(r.target, r.candidate): r for r in rows}


def base_of(name: str) -> str:
    """Name the attack whose rows hold what `name` leaves alone: the rule has its own."""
    return "rule" if name == "rule" or name in CERTIFIED else "clean"


def closest(*several: Sequence[Row]) -> list[Row]:
    """Select, per pair that every list holds, the row with the lowest distance."""
    indexed = [by_pair(rows) for rows in several]
    shared = set(indexed[0]).intersection(*indexed[1:])
    return [min((rows[k] for rows in indexed), key=lambda r: r.distance) for k in sorted(shared)]


def strongest(attacks: Attacks) -> list[Row]:
    """Select, per intruder, the strongest of the attacks that met every pair eyeglasses did."""
    every = [pick(attacks, name, "intruder") for name in WORST]
    first = set(by_pair(every[0]))
    several = [rows for rows in every if first and first <= set(by_pair(rows))]
    return closest(*several) if len(several) > 1 else []


def same_pairs(attacks: Attacks, attacked: Sequence[Row]) -> list[Row]:
    """Select the clean rows of the pairs that were attacked; [] unless all are there."""
    clean, pairs = by_pair(pick(attacks, "clean", "intruder")), by_pair(attacked)
    return [clean[k] for k in clean if k in pairs] if pairs.keys() <= clean.keys() else []


def compared_rows(attacks: Attacks, name: str) -> tuple[list[Row], list[Row]]:
    """Select the (genuine, intruder) rows of an attack or of one of DERIVED, [] twice without them.

    Of a role that the attack left alone they are the unattacked ones.
    """
    genuine: list[Row] = []
    if name == "worst":
        intruders = strongest(attacks)
    elif name in CERTIFIED:
        bounds = [(r, getattr(r, CERTIFIED[name])) for r in pick(attacks, "rule", "intruder")]
        intruders = [r._replace(distance=b) for r, b in bounds if not math.isnan(b)]
    elif name in DERIVED:  # Sec. 4.4: both halves of the indirect attack have the same starts
        indirect = pick(attacks, "indirect", "intruder")
        intruders = [r._replace(distance=r.direct) for r in indirect if not math.isnan(r.direct)]
        intruders = closest(intruders, indirect) if name == "direct+indirect" else intruders
    else:
        genuine, intruders = (pick(attacks, name, role) for role in ROLES[:2])
    if genuine or intruders:
        genuine = genuine or pick(attacks, base_of(name), "genuine")
        intruders = intruders or pick(attacks, base_of(name), "intruder")
    return genuine, intruders


def judged(attacks: Attacks) -> dict[str, Attack]:
    """Put a second model's distances, where rows hold them, in place of the first's."""
    return {
        name: Attack([r._replace(distance=r.judge) for r in a.rows if r.judge >= 0], a.sidecar)
        for name, a in attacks.items()
    }


# The figures of a method under an attack


class Merits(NamedTuple):
    """The figures of one attack on one method in one run, and the rows that they rest on."""

    figures: dict[str, Any]
    areas: Pair
    detection: Pair  # the pairs that set delta, and the attacked
    evading: bool


def merits(one: Run, method: str, name: str, setting: tuple[int, int] = (1, 1)) -> Merits | None:
    """Compute the figures of one attack; None without its rows, or without clean ones."""
    attacks: Attacks = under(one.methods.get(method, {}), *setting)
    if name.endswith(JUDGE):
        attacks, name = judged(attacks), name.removesuffix(JUDGE)
    if name not in attacks and name not in DERIVED:
        return None
    genuine, intruders = compared_rows(attacks, name)
    clean = pick(attacks, "clean", "genuine")
    own, others, validation = (pick(attacks, base_of(name), role) for role in ROLES)
    if not (clean and genuine and intruders and own):
        return None
    evading = name not in (*DERIVED, "clean") and not pick(attacks, name, "intruder")
    attacked, setters = genuine if evading else intruders, validation or own
    same = [] if evading else same_pairs(attacks, intruders)
    own_clean = genuine if base_of(name) == "clean" else clean
    curve = roc_of(genuine, intruders)
    figures = {
        "auroc": float(auroc(curve)),
        "aupr": float(aupr(curve)),
        "eer": eer(curve),
        "n_targets": len({r.target for r in genuine} & {r.target for r in intruders}),
        "n_genuine": len(genuine),
        "n_intruders": len(intruders),
        "detected": float(detection_at_fpr(roc_of(setters, attacked), evading=evading)),
        "fpr": float(detection_at_fpr(roc_of(setters, own))),
        "clean_same_pairs": float(auroc(roc_of(own_clean, same))) if same else math.nan,
    }
    if base_of(name) == "rule":
        figures["n_setters"] = len(validation)
    for far in FARS:
        enough = len(others) * far >= ERRORS - 1e-9
        for key, images in (("tar", genuine), ("asr", intruders)):
            rate = passing_at_far(roc_of(images, others), far) if enough else math.nan
            figures[f"{key}_at_far_{far:g}"] = rate

    def sample(rows: list[Row]) -> Sample:
        # in runs of one manifest the same name is the same person; without one they are others
        people = one.people.get("sha256", one.folder)
        return [r.distance for r in rows], [f"{people} {r.target}" for r in rows]

    areas = sample(genuine), sample(intruders)
    return Merits(figures, areas, (sample(setters), sample(attacked)), evading)


def measure(
    runs: Sequence[Run],
    method: str,
    name: str,
    mirroring: int = 1,
    selection: int = 1,
    pr: bool = False,
) -> dict[str, Any] | None:
    """Compute the figures of one method under one attack, None without its rows or clean ones.

    Over several runs: means, distinct targets, pairs summed, `range` [lowest, highest] of each
    mean, `runs` how many had the rows; the intervals are those of the means. `tar_at_far_0.1`: the
    share of the genuine images that pass where 10 % of unattacked intruders do, `asr_at_far_0.1`:
    that of the attacked ones; None where fewer than ten errors are expected. `clean_same_pairs`:
    the AU-ROC of the attacked pairs without the attack. `of`: what `worst` is the strongest of.
    pr: `aupr_interval` too. Raises ValueError for a name that neither the paper nor the runs know.
    """
    present = {k for one in runs for m, attacks in one.methods.items() for k in (m, *attacks)}
    if unknown := {method, name.removesuffix(JUDGE)} - present - {*METHODS, *ATTACKS, *DERIVED}:
        raise ValueError(f"{unknown.pop()}: no method or attack of the paper or of these runs")
    each = [m for one in runs if (m := merits(one, method, name, (mirroring, selection)))]
    if not each:
        return None
    result: dict[str, Any] = {k: sum(m.figures[k] for m in each) for k in each[0].figures}
    means = [k for k in result if not k.startswith("n_")]
    result |= {k: None if math.isnan(result[k]) else result[k] / len(each) for k in means}
    if name == "worst":
        every = [one.methods.get(method, {}) for one in runs]
        result["of"] = [a for a in WORST if all(a in attacks for attacks in every)]
    shared = [{*genuine[1]} & {*intruders[1]} for genuine, intruders in (m.areas for m in each)]
    result["n_targets"] = len(set().union(*shared))
    areas, detections = [m.areas for m in each], [m.detection for m in each]
    detection = functools.partial(detection_at_fpr, evading=each[0].evading)
    spreads: dict[str, tuple[Any, list[Pair]]] = {"interval": (auroc, areas)}
    spreads["detected_interval"] = detection, detections
    spreads |= {"aupr_interval": (aupr, areas)} if pr else {}
    several_targets = all(m.figures["n_targets"] > 1 for m in each)
    for key, (figure, pairs) in spreads.items():
        ends = interval(bootstrap(figure, pairs).mean(0)) if several_targets else (None, None)
        result[key] = [*ends]
    if len(runs) > 1:
        several = [k for k in means if result[k] is not None and k != "clean_same_pairs"]
        result["range"] = {k: [f(m.figures[k] for m in each) for f in (min, max)] for k in several}
        result["runs"] = len(each)
    return result


def difference(
    runs: Sequence[Run], method: str, other: str, name: str
) -> tuple[float, float, float] | None:
    """Compute the AU-ROC of a method less that of another under an attack, and its interval.

    Both with mirroring and selection, means over the runs; a target is resampled for both at once,
    in every run that attacks it. None unless each run has the rows of both.
    """
    each = [merits(one, m, name) for one in runs for m in (method, other)]
    both = [m for m in each if m]
    if len(both) < len(each):
        return None
    areas = bootstrap(auroc, [m.areas for m in both])  # (2 runs, n)
    exact = [m.figures["auroc"] for m in both]
    gain = np.mean([a - b for a, b in zip(exact[::2], exact[1::2])])
    return float(gain), *interval((areas[::2] - areas[1::2]).mean(0))


def names(runs: Sequence[Run]) -> dict[str, list[str]]:
    """List {method: attacks} in the paper's order, then unknown ones, derived attacks last."""

    def ordered(some: set[str], known: Sequence[str]) -> list[str]:
        return [*(n for n in known if n in some), *sorted(some - set(known))]

    result = {}
    for method in ordered({m for one in runs for m in one.methods}, METHODS):
        tables = [one.methods[method] for one in runs if method in one.methods]
        attacks = ordered({a for table in tables for a in table}, ATTACKS)
        judge = {a for t in tables for a, v in t.items() if any(r.judge >= 0 for r in v.rows)}
        second = [f"{a}{JUDGE}" for a in attacks if a in judge]
        result[method] = [*attacks, *second, *DERIVED[1:]]
    return result


def counts(m: Mapping[str, Any] | None) -> str:
    """Format how many targets, genuine pairs and intruders a measure rests on."""
    return f"{m['n_targets']} / {m['n_genuine']} / {m['n_intruders']}" if m else "-"


def table(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Format a summary as text: a line for each method and attack."""
    left = max(map(len, ("method", *result))) + 2
    right = max(len(name) for attacks in result.values() for name in attacks) + 2
    rates = [f"{key}_at_far_{far:g}" for key in ("tar", "asr") for far in FARS]
    heads = "".join(f"{key} {far:.0%}".rjust(8) for key in ("TAR", "ASR") for far in FARS)
    lines = [f"{'method':<{left}}{'attack':<{right}}AU-ROC [95 %]         AU-PR detected at FPR"]
    lines[0] += f"    EER{heads}  pairs"
    for method, attacks in result.items():
        for name, m in attacks.items():
            low, high = m["interval"]
            ends = "one target" if low is None else f"[{low:.3f}, {high:.3f}]"
            line = f"{method:<{left}}{name:<{right}}{m['auroc']:.3f} {ends:<15} {m['aupr']:.3f}"
            line += f"{m['detected']:>9.1%}{m['fpr']:>7.1%}{m['eer']:>7.1%}"
            line += "".join(("-" if m[k] is None else f"{m[k]:.1%}").rjust(8) for k in rates)
            line += f"  {counts(m)}"
            if "range" in m:
                line += ", {} runs: {:.3f} to {:.3f}".format(m["runs"], *m["range"]["auroc"])
            line += ", threshold of its own pairs" * (m.get("n_setters") == 0)
            lines.append(line)
    note = f"""
pairs: targets / genuine pairs / intruders. detected: at an FPR (genuine refused) of at most 5 %.
TAR 10%: genuine images that pass where 10 % of the unattacked intruders do (FAR); ASR: intruders
as attacked that do; -: where fewer than {ERRORS} unattacked ones should."""
    return "\n".join(lines) + note


# Health checks: signs that an attack did not do its work

OK, FAILED, NOT_RUN = "OK", "FAILED", "not run"


class Check(NamedTuple):
    """A health check's outcome: `status` is OK, FAILED or NOT_RUN."""

    name: str
    status: str
    detail: str


def check_gradients(attacks: Attacks) -> Iterator[str]:
    """Report gradients that were zero everywhere or not finite: no attack can follow these."""
    for name, (_, sidecar) in attacks.items():
        zero, nonfinite, of = (sidecar.get(k) for k in ("zero_gradients", "nonfinite", "gradients"))
        if (zero is not None or nonfinite is not None) and of != 0:
            of = of or "an unknown number"
            line = f"{name}: {zero or 0} zero and {nonfinite or 0} non-finite of {of}"
            yield line if zero or nonfinite else ""


def check_effort(attacks: Attacks, tolerance: float = 0.01) -> Iterator[str]:
    """Report effort that weakened an attack: its mean distance by more than `tolerance` of it.

    Compares `<attack>.csv` with `<attack>-<anything>.csv` of more iterations or restarts, and
    random patterns with gradients (App. B.2), on the pairs that both hold.
    """
    for (weak, less), (strong, more) in itertools.permutations(attacks.items(), 2):
        a, b = ([v.sidecar.get(k) or 0 for k in ("iterations", "restarts")] for v in (less, more))
        grew = 0 < min(a) and a != b and a[0] <= b[0] and a[1] <= b[1]
        same = weak.split("-")[0] == strong.split("-")[0]
        left, right = ({r[1:9]: r.distance for r in v.rows} for v in (less, more))
        shared = sorted(left.keys() & right.keys())
        random = (weak, strong) == ("random_eyeglasses", "eyeglasses")
        if shared and (random or (grew and same)):
            before, after = (np.mean([d[k] for k in shared]) for d in (left, right))
            evading = all(r.role == "genuine" for r in less.rows)  # and to move away
            limit = before * (1 - tolerance if evading else 1 + tolerance)
            fine = after >= limit if evading else after <= limit
            line = f"mean distance from {before:.4g} ({weak}) to {after:.4g} ({strong})"
            yield "" if fine else line


def check_harm(attacks: Attacks) -> Iterator[str]:
    """Report attacks that leave a higher AU-ROC than the same pairs have without them."""
    for name in ("eye_patch", "eyeglasses", "indirect", "mask", "square"):
        rows = attacks[name].rows if name in attacks else []
        for setting in sorted({(r.mirroring, r.selection) for r in rows}):
            genuine, intruders = compared_rows(under(attacks, *setting), name)
            if same := same_pairs(under(attacks, *setting), intruders):
                before, after = (auroc(roc_of(genuine, rows)) for rows in (same, intruders))
                where = "" if setting == (1, 1) else " with mirroring {}, selection {}"
                line = f"{name}: AU-ROC from {before:.3f} to {after:.3f}{where.format(*setting)}"
                yield line if after > before else ""


def check_outside_mask(attacks: Attacks, tolerance: float = 1e-5) -> Iterator[str]:
    """Report attacked images that differ outside the mask, beyond rounding (range [0, 1])."""
    for name, attack in attacks.items():
        if name != "clean" and "outside_mask_max" in attack.sidecar:
            moved = float(attack.sidecar["outside_mask_max"])
            yield "" if moved <= tolerance else f"{name}: by {moved:.3g}"  # nan fails too


# each yields "" for a comparison that is well, else what is wrong
CHECKS: dict[str, Callable[[Attacks], Iterator[str]]] = {
    "gradients": check_gradients,
    "more effort": check_effort,
    "attacks harm": check_harm,
    "outside the mask": check_outside_mask,
}


def health(runs: Sequence[Run]) -> list[Check]:
    """Make every check of every method of every run; what fails anywhere has failed."""
    result = []
    for name, check in CHECKS.items():
        failures, passed = [], set()
        for one in runs:
            for method, attacks in one.methods.items():
                outcomes = list(check(attacks))
                where = f"{one.folder.name} {method}" if len(runs) > 1 else method
                if wrong := "; ".join(line for line in outcomes if line):
                    failures.append(f"{where}: {wrong}")
                elif outcomes:
                    passed.add(method)
        status = FAILED if failures else OK if passed else NOT_RUN
        result.append(Check(name, status, "; ".join(failures) or ", ".join(sorted(passed))))
    return result


def health_lines(runs: Sequence[Run]) -> str:
    """Format one line a check that was made, to stand with every table."""
    made = [c for c in health(runs) if c.status != NOT_RUN]
    return "\n".join(f"{c.status:<8} {c.name}: {c.detail}" for c in made)


# main

KINDS = get_type_hints(Row)
FAR_OFF = ("distance", "direct", "judge", *CERTIFIED.values())  # columns that hold distances


def optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON file's object, {} where there is no file. Raises run.UsageError."""
    return run.read_json(path, "write it again") if path.exists() else {}


def parse_row(texts: Mapping[str, str]) -> Row:
    """Convert a line's fields; ValueError names the one that is wrong."""
    values: dict[str, Any] = {}
    for name, kind in KINDS.items():
        if texts.get(name) or name in COLUMNS:
            try:
                values[name] = kind(texts[name])
            except ValueError:
                raise ValueError(f"{name} is {texts[name]!r}, not a number") from None
    if values["role"] not in ROLES or not {values["mirroring"], values["selection"]} <= {0, 1}:
        raise ValueError(f"role, mirroring or selection is none of {', '.join(ROLES)}, 0, 1")
    for name in (n for n in FAR_OFF if n in values):
        if not 0 <= values[name] < math.inf:
            raise ValueError(f"{name} is {texts[name]}, not finite and at least 0")
        if name.startswith("bound") and values[name] > values["distance"]:
            raise ValueError(f"{name} is {texts[name]}, above the score {texts['distance']}")
    return Row(**values)


def read_rows(path: Path) -> list[Row]:
    """Read every row of a table, packed or not; raises run.UsageError naming file and line."""
    rows: dict[Any, Row] = {}
    line = 1
    open_table: Any = gzip.open if path.suffix == ".gz" else open
    advice = "delete the file and run attacks.py for this attack again"
    with run.reading(path, advice), open_table(path, "rt", newline="", encoding="utf-8") as file:
        try:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [c for c in COLUMNS if c not in header]:
                raise ValueError(f"not a file of attack rows, column {missing[0]!r} is missing")
            for fields in reader:
                line = reader.line_num
                if len(fields) != len(header):
                    raise ValueError(f"{len(fields)} fields where the header has {len(header)}")
                row = parse_row(dict(zip(header, fields)))
                # an image made from noise has no number
                key = row[:8] if row.candidate >= 0 else line
                if key in rows:
                    pair = f"target {row.target} against image {row.candidate}"
                    raise ValueError(f"{pair} stands here twice")
                rows[key] = row
            if not rows:
                raise ValueError("no rows below the header")
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise run.UsageError(f"{path}:{line}: {error}; {advice}") from None
    return list(rows.values())


@functools.cache
def warn(line: str) -> None:
    """Print a line on stderr, however often the rows are read."""
    print(line, file=sys.stderr, flush=True)


def read_run(folder: Path | str, rows: str = "attacks") -> Run:
    """Read all rows of a run; raises run.UsageError for a folder without rows, or a bad row."""
    folder = Path(folder)
    if not folder.is_dir():
        raise run.UsageError(f"--run {folder}: no such folder; give the folder that embed.py wrote")
    tables: dict[str, tuple[Path, Attack]] = {}  # "<method>/<attack>" -> its file, its rows
    for path in sorted(folder.glob(f"*/{rows}/*.csv")):
        attack = Attack(read_rows(path), optional_json(path.with_suffix(".json")))
        tables[f"{path.parent.parent.name}/{path.stem}"] = path, attack
    packed = folder / f"{rows}.csv.gz"  # of all methods, by results/tables.py
    if packed.exists():
        sidecars = optional_json(folder / f"{rows}.json")
        for row in read_rows(packed):
            empty = packed, Attack([], sidecars.get(row.attack, {}))
            own = tables.setdefault(row.attack, empty)[1].rows
            own.append(row._replace(attack=row.attack.split("/")[-1]))
    if not tables:
        raise run.UsageError(
            f"--run {folder}: holds no rows (<method>/{rows}/<attack>.csv); "
            f"run attacks.py --run {folder}"
        )
    methods: dict[str, dict[str, Attack]] = {}
    for key, (path, attack) in tables.items():
        written = attack.sidecar.get("n", len(attack.rows))
        if written != len(attack.rows):
            raise run.UsageError(
                f"{path}: holds {len(attack.rows)} rows of {key}, {written} were written; "
                "run attacks.py for this attack again"
            )
        method, name = key.split("/")
        clean = tables.get(f"{method}/clean", (path, attack))[1].sidecar.get("config", {})
        own = attack.sidecar.get("config", {})
        shared = [k for k in ("embedding", "images") if k in own and k in clean]
        if other := [k for k in shared if own[k] != clean[k]]:
            advice = f"{path}: left out, rows of other {other[0]} than clean.csv's: make them again"
            warn(f"WARNING: {advice} by attacks.py --attacks {name} --overwrite")
            continue
        methods.setdefault(method, {})[name] = attack
    return Run(folder, methods, optional_json(folder / "people.json"))


def summary(runs: Any, mirroring: int = 1, selection: int = 1) -> dict[str, dict]:
    """Compute {method: {attack: figures}} of a folder, a Run, or several; else run.UsageError."""
    runs = read_run(runs) if isinstance(runs, (str, Path)) else runs
    runs = [runs] if isinstance(runs, Run) else runs
    result: dict[str, dict] = {}
    for method, attacks in names(runs).items():
        for name in attacks:
            figures = measure(runs, method, name, mirroring, selection, pr=True)
            shown = result.get(method, {})
            # the bounds of a smaller patch that are those of a larger one add nothing
            if figures and figures not in [shown.get(c) for c in CERTIFIED if name in CERTIFIED]:
                result[method] = shown | {name: figures}
    if not result:
        raise run.UsageError(
            f"--run {runs[0].folder}: no clean rows with mirroring {mirroring} and selection "
            f"{selection}; run attacks.py with that setting"
        )
    return result


@dataclass(frozen=True)
class Config:
    """The settings of a table, all of them flags."""

    mirroring: int = 1  # Sec. 4.2: use rows with the mirror image averaged in (0: without)
    selection: int = 1  # Sec. 4.2: use rows with the anchor selected (0: without)
    # not in the paper: read this folder of each method (attacks-<name>: other persons)
    rows: str = "attacks"


def show(argv: Sequence[str] | None) -> int:
    """Print the table and the checks; results/ writes tables.md and figures."""
    about = "Tables, figures and health checks from the rows of a run. FPR is the paper's, genuine "
    about += "refused (the biometric FRR): the intruder is the positive."
    config, args = run.parse(
        Config,
        {},
        argv,
        about,
        bounds={"mirroring": (0, 1), "selection": (0, 1)},
        run={
            "type": Path,
            "required": True,
            "nargs": "+",
            "help": "folders of runs; mean of several",
        },
        json={"action": "store_true", "help": "print the figures as JSON and write nothing"},
        figures={"nargs": "*", "default": [], "help": "draw only these, or none (default: all)"},
        out={"help": "where tables.md and figures/ go (default: the first run)"},
    )
    runs = [read_run(folder, config.rows) for folder in args.run]
    result = summary(runs, config.mirroring, config.selection)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{table(result)}\n\n{health_lines(runs)}\n")
    folders = [str(folder) for folder in args.run]
    out = args.out or folders[0]
    try:
        run.run_stage("results.tables", ["report", config.rows, out, *folders])
        if args.figures != ["none"]:
            run.run_stage("results.figures", ["draw", config.rows, out, folders[0], *args.figures])
    except ModuleNotFoundError as error:
        if error.name != "results":
            raise
        print("tables.md and figures: not made, the folder results/ is not beside metrics.py")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    if run is None:
        raise SystemExit("metrics.py: the command needs the folder data/ beside it")
    return run.command("metrics.py", show, argv)


if __name__ == "__main__":
    raise SystemExit(main())
