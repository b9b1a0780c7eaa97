"""AU-ROC, AU-PR, detection, intervals and health checks from the rows of a run (Sec. 4).

    python metrics.py --run runs/synthetic-demo-0            # tables, checks, tables.md, figures
    python metrics.py --run runs/synthetic-demo-0 --json     # {"<method>": {"<attack>": {...}}}
    python metrics.py --run runs/a-0 runs/a-1 runs/a-2       # mean and range over runs (seeds)

In: `<run>/<method>/attacks/<attack>.csv`, one row a compared pair, and the .json beside it.
Out: `tables.md` and `figures/*.png`, which results/ makes.

The positive class is the intruder ("different", eq. (1) = 1), the score is the distance: the
balanced precision TPR / (TPR + FPR) then starts at 1 when an attack moves some intruders all the
way and leaves the rest alone, so AU-PR lies above AU-ROC as in most of the paper's pairs (0.868 /
0.896); with the genuine class as the positive one it would lie below. AU-PR is the step-wise sum,
so that chance is exactly 0.5.

So the paper's FPR is the biometric FRR, genuine images refused. FAR, the biometric one, is the
share of intruders that pass, TAR that of genuine images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np

FPR = 0.05  # Sec. 4.3
# not in the paper: reported where at least so many of the unattacked intruders should pass
FARS, ERRORS = (0.1, 0.01), 10
# validation: genuine pairs of persons who set the rule's threshold
ROLES = ("genuine", "intruder", "validation")
COUNTS = "targets / genuine / intruders"
METHODS = ("ours", "ours-transfer", "ours-transfer-masked", "ours-mixed", "ours-mixed-all")
METHODS += ("weak-at", "weak-at-masked", "doa-4", "doa-10", "no-at")
ATTACKS = ("clean", "eyeglasses", "square", "eye_patch", "random_eyeglasses", "noise", "evasion")
ATTACKS += ("indirect", "distal", "eot_eyeglasses", "eot_eye_patch", "grey_eye_patch")
ATTACKS += ("mask", "transfer", "rule", "rule_places", "rule_one", "rule_attacked")
# genuine pairs under the rule beside a bound of the intruders: whose rows, and which column (not in
# the paper)
CERTIFIED = {"certified": ("rule", "bound"), "certified_places": ("rule_places", "bound")}
CERTIFIED |= {"certified_one": ("rule_one", "bound")}
CERTIFIED |= {f"certified_{side}": ("rule", f"bound_{side}") for side in (8, 6, 4, 2)}
# Sec. 4.4; the others are not in the paper
DERIVED = ("direct", "direct+indirect", "worst", *CERTIFIED)
# one printed patch, any of them
WORST = ("eyeglasses", "square", "eye_patch", "random_eyeglasses", "indirect", "mask")


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
    bound: float = math.nan  # of the rule: no patch brings the score below
    bound_2: float = math.nan  # no patch of 2 x 2 of 64
    bound_4: float = math.nan
    bound_6: float = math.nan
    bound_8: float = math.nan


COLUMNS = Row._fields[:10]  # that every file has


@dataclass(frozen=True)
class Attack:
    """The rows of one file and the settings written beside it ({} when there are none).

    Raises ValueError for a row that cannot be: a distance that is not finite, an unknown role.
    """

    rows: list[Row]
    sidecar: dict[str, Any]

    def __post_init__(self) -> None:
        for r in self.rows:
            known = r.role in ROLES and r.mirroring in (0, 1) and r.selection in (0, 1)
            if not known or not 0 <= r.distance < math.inf:
                raise ValueError(f"{r}: role, setting or distance is none that there is")


Attacks = Mapping[str, Attack]  # of one method


@dataclass(frozen=True)
class Run:
    """methods: method -> attack -> rows; people: what people.json says ({} without it)."""

    folder: Path
    methods: dict[str, dict[str, Attack]]
    people: dict[str, Any] = field(default_factory=dict)


# Areas, detection and intervals


def _distances(values: Any) -> np.ndarray:
    """float64 (n,); ValueError unless there are some and all are finite."""
    d = np.asarray(values, dtype=np.float64).ravel()
    if not len(d) or not np.isfinite(d).all():
        raise ValueError("distances must be finite, at least one on each side")
    return d


def _two(genuine: Any, intruders: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.sort(_distances(genuine)), np.sort(_distances(intruders))


# scikit-learn's areas differ from these in the last bit (1e-15): these count pairs, as the
# bootstrap does, and every published figure is theirs to the last digit


def auroc(genuine: Any, intruders: Any) -> float:
    """Chance that an intruder is farther (n,) than a genuine image (k,), a tie one half. Sec. 4."""
    g, i = _two(genuine, intruders)
    below = np.searchsorted(g, i, "left") + np.searchsorted(g, i, "right")
    return float(below.mean() / (2 * len(g)))


def roc(genuine: Any, intruders: Any) -> tuple[np.ndarray, np.ndarray]:
    """(FAR, TAR), the shares of intruders (n,) and of genuine images (k,) that pass at every delta
    that makes a difference, rising from (0, 0) to (1, 1)."""
    g, i = _two(genuine, intruders)
    at = np.append(np.unique(np.concatenate([g, i])), math.inf)
    return np.searchsorted(i, at, "left") / len(i), np.searchsorted(g, at, "left") / len(g)


def _area(genuine: Any, intruders: Any, odds: float) -> float:
    tpr, fpr = (1 - passing[-2::-1] for passing in roc(genuine, intruders))
    return float((np.diff(tpr, prepend=0.0) * tpr / (tpr + odds * fpr)).sum())


def aupr(genuine: Any, intruders: Any) -> float:
    """Area under precision over recall, precision = TPR / (TPR + FPR) as in the paper."""
    return _area(genuine, intruders, 1.0)


def average_precision(genuine: Any, intruders: Any) -> float:
    """Area under precision over recall at the prior of the sample (n intruders, k genuine)."""
    return _area(genuine, intruders, np.size(genuine) / max(np.size(intruders), 1))


def eer(genuine: Any, intruders: Any) -> float:
    """The equal error rate, FAR = 1 - TAR, on the straight line between the deltas around it."""
    far, tar = roc(genuine, intruders)
    return float(np.interp(0.0, far - (1 - tar), far))


def passing_at_far(images: Any, intruders: Any, far: float) -> float:
    """The share of `images` (k,) that passes at the largest delta that lets at most `far` of the
    intruders (n,) pass: of genuine images the TAR, of attacked intruders the attack's success."""
    d, i = _two(images, intruders)
    if not 0 <= far <= 1:
        raise ValueError(f"a FAR of {far}: give one in [0, 1]")
    passed = math.floor(far * len(i) + 1e-9)
    return float((d < (math.inf if passed == len(i) else i[passed])).mean())


def threshold(genuine: Any, fpr: float = FPR) -> float:
    """delta: the smallest that refuses at most `fpr` of the genuine distances (Sec. 4.3)."""
    g = np.sort(_distances(genuine))
    if not 0 <= fpr <= 1:
        raise ValueError(f"an FPR of {fpr}: give one in [0, 1]")
    refused = math.floor(fpr * len(g) + 1e-9)
    # just above the farthest that must pass: those as far as it, ties, pass too
    return float(g[0] if refused == len(g) else np.nextafter(g[-1 - refused], math.inf))


def fpr_at(genuine: Any, delta: float) -> float:
    """The share of the genuine distances that eq. (1) refuses at delta."""
    if math.isnan(delta):
        raise ValueError("delta is not a number")
    return float((_distances(genuine) >= delta).mean())


def detection_at_fpr(genuine: Any, attacked: Any, fpr: float = FPR, evading: bool = False) -> float:
    """Share of `attacked` distances that are detected at `threshold(genuine, fpr)`.

    Intruders are detected when eq. (1) calls them different. Evading images (evading=True) are
    genuine and detected when it does not.
    """
    delta, d = threshold(genuine, fpr), _distances(attacked)
    # Eq. (1)
    different = d >= delta
    return float((~different if evading else different).mean())


Sample = tuple[Sequence[float], Sequence[str]]  # distances (n,) and their targets (n,)


def _resampled(
    genuine: Sample, attacked: Sample, n: int, seed: int = 0, among: Sequence[str] = ()
) -> tuple[np.ndarray, ...]:
    """Distances and target numbers (0..T-1) of both, and how often each target is drawn (n, T)."""
    g, d = (_distances(distances) for distances, _ in (genuine, attacked))
    if (len(g), len(d)) != (len(genuine[1]), len(attacked[1])) or n < 1:
        raise ValueError("as many targets as distances are needed, and a resampling or more")
    held = np.r_[np.asarray(genuine[1]), np.asarray(attacked[1])]
    everyone = np.unique(np.asarray(among) if len(among) else held)
    if not np.isin(held, everyone).all():
        raise ValueError("a row's target is not among those to draw from")
    code, T = np.asarray(np.searchsorted(everyone, held)), len(everyone)
    drawn = np.random.default_rng(seed).multinomial(T, np.full(T, 1 / T), size=n)
    return g, code[: len(g)], d, code[len(g) :], drawn


def bootstrap(
    genuine: Sample, intruders: Sample, n: int = 1000, seed: int = 0, among: Sequence[str] = ()
) -> np.ndarray:
    """AU-ROC (n,) of n resamplings of the targets with replacement.

    A target brings all its rows; nan where a resample holds one class alone, or there is one
    target alone. Targets are drawn `among` these names (default: those of the rows), so that with
    one seed several runs get the same draw. Pairs are counted once per two targets, so the cost
    hardly depends on n.
    """
    g, of_g, i, of_i, drawn = _resampled(genuine, intruders, n, seed, among)
    T = drawn.shape[1]
    wins = np.zeros((T, T))  # (T of genuine, T of intruder): pairs the intruder wins, ties one half
    for t in range(T):
        mine = np.sort(i[of_i == t])
        won = 2 * len(mine) - np.searchsorted(mine, g, "left") - np.searchsorted(mine, g, "right")
        wins[:, t] = np.bincount(of_g, won / 2, T)
    held_g, held_i = (drawn @ np.bincount(of, minlength=T) for of in (of_g, of_i))
    met = held_g * held_i * (T > 1)  # (n,) pairs of a resample
    won = ((drawn @ wins) * drawn).sum(1)
    return np.divide(won, met, out=np.full(n, math.nan), where=met > 0)


def aupr_bootstrap(
    genuine: Sample, intruders: Sample, n: int = 1000, among: Sequence[str] = ()
) -> np.ndarray:
    """`aupr` (n,) of resampled targets, as `bootstrap`; the cost grows with n."""
    g, of_g, i, of_i, drawn = _resampled(genuine, intruders, n, 0, among)
    T, found = drawn.shape[1], []
    at, where = np.unique(np.concatenate([-g, -i]), return_inverse=True)  # the farthest first
    held = np.zeros((2, T, len(at)))  # rows of each target at each distance
    np.add.at(held[0], (of_g, where[: len(g)]), 1)
    np.add.at(held[1], (of_i, where[len(g) :]), 1)
    for some in np.array_split(drawn.astype(float), math.ceil(n * len(at) / 1e6)):
        refused = (some @ held).cumsum(2)
        with np.errstate(invalid="ignore"):
            fpr, tpr = refused / refused[..., -1:] if T > 1 else refused * math.nan
            share = np.where(tpr + fpr == 0, 0, tpr / (tpr + fpr))
        found.append((np.diff(tpr, prepend=0) * share).sum(1))
    return np.concatenate(found)


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values (n,), nan left out; (nan, nan) without any."""
    values = np.asarray(replicates, dtype=np.float64)
    if not len(values) or np.isinf(values).any() or not 0 < level < 1:
        raise ValueError("values and a level between 0 and 1 are needed")
    if np.isnan(values).all():
        return math.nan, math.nan
    lo, hi = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def detection_bootstrap(
    genuine: Sample,
    attacked: Sample,
    fpr: float = FPR,
    evading: bool = False,
    n: int = 1000,
    among: Sequence[str] = (),
) -> np.ndarray:
    """`detection_at_fpr` (n,) of resampled targets, as `bootstrap`; each time delta is another."""
    g, of_g, d, of_d, drawn = _resampled(genuine, attacked, n, 0, among)
    if not 0 <= fpr < 1:
        raise ValueError(f"an FPR of {fpr}: give one in [0, 1)")
    drawn, everyone = drawn.astype(float), np.arange(drawn.shape[1])[:, None]
    order = np.argsort(-g)
    refused = drawn @ (of_g[order] == everyone).cumsum(1)  # (n, k), if delta lies just below
    beyond = [np.searchsorted(np.sort(d[of_d == t]), g[order], "right") for t in everyone[:, 0]]
    nearer = np.stack(beyond, 1)  # (k, T)
    must_pass = (refused > np.floor(fpr * refused[:, -1:] + 1e-9)).argmax(1)
    held = drawn @ np.bincount(of_d, minlength=len(everyone))
    same = (drawn * nearer[must_pass]).sum(1)
    met = (held > 0) & (refused[:, -1] > 0) & (len(everyone) > 1)
    return np.divide(same if evading else held - same, held, np.full(n, math.nan), where=met)


# Which rows judge an attack


def under(attacks: Attacks, mirroring: int, selection: int) -> Attacks:
    """The attacks with their rows under one setting of the defender's augmentations (Sec. 4.2)."""
    wanted = mirroring, selection
    if not {mirroring, selection} <= {0, 1}:
        raise ValueError(f"mirroring {mirroring}, selection {selection}: give 0 or 1")
    return {
        name: Attack([r for r in a.rows if (r.mirroring, r.selection) == wanted], a.sidecar)
        for name, a in attacks.items()
    }


def pick(attacks: Attacks, name: str, role: str) -> list[Row]:
    """The rows of one role; [] without the attack. Raises ValueError for a name never heard of."""
    if role not in ROLES or (name not in attacks and name.split("-")[0] not in ATTACKS):
        raise ValueError(f"{name}, {role}: not an attack and one of {', '.join(ROLES)}")
    return [r for r in attacks[name].rows if r.role == role] if name in attacks else []


def columns(rows: Sequence[Row]) -> Sample:
    return [r.distance for r in rows], [r.target for r in rows]


def pairs(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    return {(r.target, r.candidate): r for r in rows}


def base_of(name: str) -> str:
    """Whose rows hold what an attack leaves alone and set its thresholds: the rule has its own."""
    if name.startswith("rule"):
        return "rule" if name.startswith("rule_attacked") else name
    return CERTIFIED[name][0] if name in CERTIFIED else "clean"


def sides(attacks: Attacks, name: str) -> tuple[list[Row], list[Row]]:
    """(genuine, intruder) rows to judge an attack by: unattacked ones of a role it left alone."""
    genuine, intruders, base = [], [], base_of(name)
    if name == "worst":
        intruders = worst(attacks)
    elif name in CERTIFIED:
        bounds = ((r, getattr(r, CERTIFIED[name][1])) for r in pick(attacks, base, "intruder"))
        intruders = [r._replace(distance=b) for r, b in bounds if not math.isnan(b)]
    elif name in DERIVED:
        intruders = direct_and_either(attacks)[name != "direct"]
    else:
        genuine, intruders = (pick(attacks, name, role) for role in ROLES[:2])
    if genuine or intruders:
        genuine = genuine or pick(attacks, base, "genuine")
        intruders = intruders or pick(attacks, base, "intruder")
    return genuine, intruders


def closest(*several: Sequence[Row]) -> list[Row]:
    """Per pair (target, candidate) that every list holds, the row with the lowest distance."""
    if not several or not all(math.isfinite(r.distance) for rows in several for r in rows):
        raise ValueError("lists of rows with finite distances are needed")
    by_pair = [pairs(rows) for rows in several]
    shared = set(by_pair[0]).intersection(*by_pair[1:])
    return [min((d[k] for d in by_pair), key=lambda r: r.distance) for k in sorted(shared)]


def direct_and_either(attacks: Attacks) -> tuple[list[Row], list[Row]]:
    """Sec. 4.4, on the same pairs: the direct attack's rows, and per intruder the stronger of both.

    The direct one is the column `direct` of the indirect attack (same starts), else eyeglasses.
    """
    found, eyeglasses = (pick(attacks, a, "intruder") for a in ("indirect", "eyeglasses"))
    if found and not any(math.isnan(r.direct) for r in found):
        direct = [r._replace(distance=r.direct) for r in found]
        return direct, [min(both, key=lambda r: r.distance) for both in zip(direct, found)]
    return [r for r in eyeglasses if r[4:7:2] in pairs(found)], closest(eyeglasses, found)


def worst(attacks: Attacks) -> list[Row]:
    """Per intruder the strongest of the attacks that met every pair eyeglasses did, if several."""
    chosen = [pick(attacks, name, "intruder") for name in WORST]
    first = set(pairs(chosen[0]))
    chosen = [rows for rows in chosen if first and first <= set(pairs(rows))]
    return closest(*chosen) if len(chosen) > 1 else []


def same_pairs(attacks: Attacks, attacked: Sequence[Row]) -> list[Row]:
    """The clean rows of the pairs that were attacked; [] unless all are there."""
    clean, met = pairs(pick(attacks, "clean", "intruder")), pairs(attacked)
    return [row for pair, row in clean.items() if pair in met] if met.keys() <= clean.keys() else []


# The figures of a method under an attack


def area_of(genuine: Sequence[Row], intruders: Sequence[Row]) -> float:
    return auroc(columns(genuine)[0], columns(intruders)[0])


def merits(attacks: Attacks, name: str) -> tuple[dict[str, Any], dict[str, list[Row]]] | None:
    """The figures of one attack on one method in one run and the rows that they rest on, `real`
    setting the threshold of `detected`; None without its rows or clean ones."""
    if name not in attacks and name not in DERIVED:
        return None
    clean, (genuine, intruders) = pick(attacks, "clean", "genuine"), sides(attacks, name)
    own, others, setters = (pick(attacks, base_of(name), role) for role in ROLES)
    real = setters or own
    if not (clean and genuine and intruders and own):
        return None
    evading = name not in (*DERIVED, "clean") and not pick(attacks, name, "intruder")
    detected = genuine if evading else intruders
    same = [] if evading else same_pairs(attacks, intruders)
    own_clean = genuine if base_of(name) == "clean" else clean  # not under the rule
    (g, g_target), (i, i_target) = columns(genuine), columns(intruders)
    r, o, d = (columns(rows)[0] for rows in (real, others, detected))
    figures = {
        "auroc": auroc(g, i),
        "aupr": aupr(g, i),
        "ap": average_precision(g, i),
        "eer": eer(g, i),
        "n_targets": len({*g_target} & {*i_target}),
        "n_genuine": len(g),
        "n_intruders": len(i),
        "detected": detection_at_fpr(r, d, FPR, evading),
        "fpr": fpr_at(columns(own)[0], threshold(r)),
        "clean_same_pairs": area_of(own_clean, same) if same else math.nan,
    }
    for far in FARS:
        told = len(o) * far >= ERRORS - 1e-9
        for key, images in (("tar", g), ("asr", i)):
            value = passing_at_far(images, o, far) if told else math.nan
            figures[f"{key}_at_far_{far:g}"] = value
    rows = {"genuine": genuine, "intruders": intruders, "real": real, "detected": detected}
    return figures, rows


def measure(
    runs: Sequence[Run],
    method: str,
    name: str,
    mirroring: int = 1,
    selection: int = 1,
    pr: bool = False,
) -> dict[str, Any] | None:
    """The figures of one method under one attack, None without its rows or clean ones; ValueError
    for a name that neither the paper nor the runs know. pr: `aupr_interval` too, which takes time.

    Over several runs: means, distinct targets, pairs summed, `range` [lowest, highest] of each
    mean, `runs` how many had the rows; `interval` is then that of the mean AU-ROC, a target
    resampled with its rows in every run that attacks it. `detected`: the share at an FPR of at
    most 5 %, with its `detected_interval`; `fpr`: the actual one. `tar_at_far_0.1`: the share of
    the genuine images that pass where 10 % of unattacked intruders do, `asr_at_far_0.1`: that of
    the attacked ones; None where fewer than ten errors are expected. `eer`: where both errors are
    equal. `clean_same_pairs`: the AU-ROC of the attacked pairs without the attack, what it is to be
    set beside (None: no such rows). `of`, for `worst`: the attacks it is the strongest of.
    """
    held = names(runs)
    attacks_held = {a for every in held.values() for a in every}
    if method not in {*METHODS, *held} or name not in {*ATTACKS, *DERIVED, *attacks_held}:
        raise ValueError(f"{method}, {name}: not a method and an attack")
    found, samples, evading = [], [], False
    for number, run in enumerate(runs):
        attacks = under(run.methods.get(method, {}), mirroring, selection)
        if merit := merits(attacks, name):
            found.append(merit[0])
            evading = merit[1]["detected"][0].role == "genuine"
            samples.append(_samples(merit[1], run, number))
    if not found:
        return None
    result: dict[str, Any] = {k: sum(f[k] for f in found) for k in found[0]}
    means = [k for k in result if not k.startswith("n_")]
    result |= {k: None if math.isnan(result[k]) else result[k] / len(found) for k in means}
    if name == "worst":
        every = [run.methods.get(method, {}) for run in runs]
        result["of"] = [a for a in WORST if all(a in attacks for attacks in every)]
    shared = ({*s["genuine"][1]} & {*s["intruders"][1]} for s in samples)
    result["n_targets"] = len(set().union(*shared))

    def resampled(draw: Any, a: str, b: str) -> list[float | None]:
        everyone = sorted({t for s in samples for t in (*s[a][1], *s[b][1])})
        means = np.mean([draw(s[a], s[b], among=everyone) for s in samples], 0)
        return [None if math.isnan(v) else v for v in interval(means)]

    detection = functools.partial(detection_bootstrap, evading=evading)
    asked: dict[str, tuple] = {"interval": (bootstrap, "genuine", "intruders")}
    asked |= {"detected_interval": (detection, "real", "detected")}
    asked |= {"aupr_interval": (aupr_bootstrap, "genuine", "intruders")} if pr else {}
    several = all(f["n_targets"] > 1 for f in found)
    result |= {k: resampled(*how) if several else [None, None] for k, how in asked.items()}
    if len(runs) > 1:
        known = [k for k in means if result[k] is not None and k != "clean_same_pairs"]
        result["range"] = {k: [f(m[k] for m in found) for f in (min, max)] for k in known}
        result["runs"] = len(found)
    return result


def _samples(rows: Mapping[str, list[Row]], run: Run, number: int) -> dict[str, Sample]:
    # one manifest: the same name is the same person; without one they are others
    people = run.people.get("sha256", number)
    return {k: (columns(v)[0], [f"{people} {r.target}" for r in v]) for k, v in rows.items()}


def difference(
    runs: Sequence[Run], method: str, other: str, name: str
) -> tuple[float, float, float] | None:
    """AU-ROC of a method less that of another under an attack, with mirroring and selection, mean
    over the runs, and its 95 % interval: a target is resampled for both at once, in every run that
    attacks it. None unless each run has the rows of both."""
    found, draws = [], []
    for number, run in enumerate(runs):
        both = [merits(under(run.methods.get(m, {}), 1, 1), name) for m in (method, other)]
        if None in both:
            return None
        found.append(both[0][0]["auroc"] - both[1][0]["auroc"])
        draws.append([_samples(merit[1], run, number) for merit in both])
    sides = [(s["genuine"], s["intruders"]) for pair in draws for s in pair]
    everyone = sorted({t for pair in sides for _, targets in pair for t in targets})
    each = np.array([bootstrap(*pair, among=everyone) for pair in sides])  # (2 runs, n)
    return float(np.mean(found)), *interval((each[::2] - each[1::2]).mean(0))


def names(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{method: attacks} in the paper's order, then what it does not know, derived attacks last."""

    def ordered(found: set[str], known: Sequence[str]) -> list[str]:
        return [*(n for n in known if n in found), *sorted(found - set(known))]

    methods = ordered({m for run in runs for m in run.methods}, METHODS)
    held = {m: {a for run in runs for a in run.methods.get(m, ())} for m in methods}
    return {m: [*ordered(held[m], ATTACKS), *DERIVED[1:]] for m in methods}


def counts(m: Mapping[str, Any] | None) -> str:
    """How many targets, genuine pairs and intruders a measure rests on."""
    return f"{m['n_targets']} / {m['n_genuine']} / {m['n_intruders']}" if m else "-"


def table(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A summary as text: of each method and attack a line of areas, further down one of rates."""

    def told(value: float | None, interval: Sequence[float | None], form: str) -> str:
        lo, hi = interval
        return f"{value:>9{form}}  " + ("one target" if lo is None else f"{lo:{form}}-{hi:{form}}")

    first = max(14, *(len(method) + 2 for method in result))
    rates = [f"{key}_at_far_{far:g}" for key in ("tar", "asr") for far in FARS]
    asked = "".join(f"{key} at {far:.0%}".rjust(11) for key in ("TAR", "ASR") for far in FARS)
    head = f"{'method':<{first}}{'attack':<21}"
    spread = f"{{:>9}}  {'95 % interval':<15}"
    areas = [f"{head}{spread.format('AU-ROC')}{spread.format('AU-PR')}{'AP':>5}  {COUNTS}"]
    lines = [f"{head}{spread.format('detected')}{'at FPR':>6}{'EER':>7}{asked}"]
    for method, attacks in result.items():
        for name, m in attacks.items():
            named = f"{method:<{first}}{name:<21}"
            both = (("auroc", "interval"), ("aupr", "aupr_interval"))
            spread = "".join(f"{told(m[a], m[b], '.3f'):<26}" for a, b in both)
            areas.append(f"{named}{spread}{m['ap']:>5.3f}  {counts(m)}")
            if "range" in m:
                low, high = m["range"]["auroc"]
                areas[-1] += f", {m['runs']} runs: {low:.3f}-{high:.3f}"
            spread = f"{told(m['detected'], m['detected_interval'], '.1%'):<26}{m['fpr']:>6.1%}"
            values = ("-" if m[k] is None else f"{m[k]:.1%}" for k in rates)
            lines.append(f"{named}{spread}{m['eer']:>7.1%}" + "".join(v.rjust(11) for v in values))
    note = (
        "TAR at 10%: genuine images that pass where 10 % of the unattacked intruders do (FAR); ASR:"
    )
    note += f"\nintruders as attacked that do; -: where fewer than {ERRORS} unattacked ones should."
    return "\n".join([*areas, "", *lines, note])


# Health checks: signs that an attack did not do its work

OK, FAILED, NOT_RUN = "OK", "FAILED", "not run"


class Check(NamedTuple):
    """A health check's outcome: `status` is OK, FAILED or NOT_RUN."""

    name: str
    status: str
    detail: str


def gradients(attacks: Attacks) -> Iterator[str]:
    """An attack cannot have followed a gradient that was zero everywhere, or not finite.

    One on the rule can: where the mask that decides hides the patch, nothing is left to gain.
    """
    for name, attack in attacks.items():
        if name == "rule_attacked":
            continue
        keys = ("zero_gradients", "nonfinite", "gradients")
        zero, nonfinite, of = (attack.sidecar.get(k) for k in keys)
        if (zero is not None or nonfinite is not None) and of != 0:
            told = f"{zero or 0} zero and {nonfinite or 0} non-finite"
            of = of or "an unknown number"
            yield f"{name}: {told} of {of}" if zero or nonfinite else ""


def _effort(attack: Attack) -> list[float]:
    return [float(attack.sidecar.get(k) or 0) for k in ("iterations", "restarts")]


def _means(a: Sequence[Row], b: Sequence[Row]) -> tuple[float, float, float] | None:
    """Mean distance of both over the pairs they share, and of their difference; None without."""
    left, right = ({(*r[1:9],): r.distance for r in rows} for rows in (a, b))
    if not (shared := sorted(left.keys() & right.keys())):
        return None
    one, two = (np.array([d[k] for k in shared]) for d in (left, right))
    return one.mean(), two.mean(), np.abs(one - two).mean()


def effort(attacks: Attacks, tolerance: float = 0.01) -> Iterator[str]:
    """More iterations or restarts must not weaken an attack: its mean distance on the defender's
    side by more than `tolerance` (a share).

    Compares `<attack>.csv` with `<attack>-<anything>.csv` on the pairs both hold, and the curves
    `by_iterations` and `by_restarts` (mean distance after so many) of a sidecar.
    """

    def judge(label: str, weak: float, strong: float, evading: bool) -> str:
        fine = strong >= weak * (1 - tolerance) if evading else strong <= weak * (1 + tolerance)
        return "" if fine else f"{label}: mean distance from {weak:.4g} to {strong:.4g}"  # nan: not

    for name, attack in attacks.items():
        evading = all(r.role == "genuine" for r in attack.rows)
        for curve in ("by_iterations", "by_restarts"):
            held = attack.sidecar.get(curve) or {}
            points = sorted((int(k), float(v)) for k, v in held.items())
            for (few, weak), (many, strong) in pairwise(points):
                yield judge(f"{name}, {few} to {many} {curve[3:]}", weak, strong, evading)
        for other, more in attacks.items():
            (i, r), (more_i, more_r) = _effort(attack), _effort(more)
            same = name.split("-")[0] == other.split("-")[0]
            grew = 0 < i <= more_i and 0 < r <= more_r and i + r < more_i + more_r
            if same and grew and (means := _means(attack.rows, more.rows)):
                label = f"{name} {i:g} x {r:g} to {other} {more_i:g} x {more_r:g}"
                yield judge(label, *means[:2], evading)


def _settings(attacks: Attacks, name: str) -> Iterator[tuple[str, Attacks]]:
    """(how to name it, attacks) of each setting of the defence that the attack has rows under."""
    rows = attacks[name].rows if name in attacks else []
    for m, s in sorted({(r.mirroring, r.selection) for r in rows}):
        told = "" if (m, s) == (1, 1) else f" with mirroring {m}, selection {s}"
        yield told, under(attacks, m, s)


def harm(attacks: Attacks) -> Iterator[str]:
    """An attack that leaves a higher AU-ROC than the same pairs have without it does nothing."""
    for name in ("eye_patch", "eyeglasses", "indirect", "mask", "square"):
        for setting, chosen in _settings(attacks, name):
            genuine, intruders = sides(chosen, name)
            if same := same_pairs(chosen, intruders):
                before, after = (area_of(genuine, rows) for rows in (same, intruders))
                told = f"{name}: AU-ROC from {before:.3f} to {after:.3f}{setting}"
                yield told if after > before else ""


def chance(
    attacks: Attacks, name: str = "random_eyeglasses", by: str = "random search"
) -> Iterator[str]:
    """Random patterns, or patches made on another model, must not bring the intruders closer, on
    average, than gradients do."""
    both = [attacks[a].rows if a in attacks else [] for a in ("eyeglasses", name)]
    if means := _means(*both):
        told = f"mean distance {means[1]:.4g} by {by}, {means[0]:.4g} by gradients"
        yield told if means[1] < means[0] else ""


def indirect(attacks: Attacks, margin: float = 0.02) -> Iterator[str]:
    """Sec. 4.4: an indirect attack that takes more than `margin` of AU-ROC off the direct one is a
    sign that gradients towards the real anchor are masked."""
    for _, chosen in _settings(attacks, "indirect"):
        clean, both = pick(chosen, "clean", "genuine"), direct_and_either(chosen)
        if clean and both[0]:
            before, after = (area_of(clean, rows) for rows in both)
            told = f"AU-ROC from {before:.3f} to {after:.3f} with the indirect attack"
            yield told if before - after > margin else ""


def outside_mask(attacks: Attacks, tolerance: float = 1e-5) -> Iterator[str]:
    """An attacked image is its original outside the mask, up to rounding (range [0, 1])."""
    for name, attack in attacks.items():
        if name != "clean" and "outside_mask_max" in attack.sidecar:
            moved = float(attack.sidecar["outside_mask_max"])
            yield "" if moved <= tolerance else f"{name}: by {moved:.3g}"  # nan fails too


def soundness(attacks: Attacks, tolerance: float = 1e-5) -> Iterator[str]:
    """An attack on the rule that gets below a bound has refuted the certificate."""
    for told, held in _settings(attacks, "rule_attacked") if "rule" in attacks else ():
        bounds = pairs(pick(held, "rule", "intruder"))
        found = pairs(pick(held, "rule_attacked", "intruder"))
        below = [k for k, r in found.items() if r.distance < bounds[k].bound * (1 - tolerance)]
        yield f"{len(below)} of {len(found)} below their bound{told}" if below else ""


def reproducible(attacks: Attacks, tolerance: float = 0.02) -> Iterator[str]:
    """The same attack with the same seed must give the same distances, on average within
    `tolerance` (a share).

    Repeats: `reproducible` in a sidecar, `<attack>-<anything>.csv` with the same config, and the
    direct half of the indirect attack, which starts where the eyeglasses did.
    """
    for name, attack in attacks.items():
        if (flag := attack.sidecar.get("reproducible")) is not None:
            yield "" if flag else name
    again = dict(attacks)
    if half := attacks.get("indirect"):
        rows = [r._replace(distance=r.direct) for r in half.rows if not math.isnan(r.direct)]
        again["eyeglasses (direct)"] = Attack(rows, half.sidecar)
    for (a, one), (b, two) in combinations(again.items(), 2):
        same = a.split("-")[0] == b.split("-")[0].removesuffix(" (direct)")
        settings = [{**(v.sidecar.get("config") or {}), "defences": ""} for v in (one, two)]
        if not same or _effort(one) != _effort(two) or settings[0] != settings[1]:
            continue
        if means := _means(one.rows, two.rows):
            told = f"{a} and {b}: distances differ by {means[2]:.3g} on average"
            yield "" if means[2] <= tolerance * means[0] else told


# name: what yields "" for a comparison that is well and else what is wrong; what is said when all
# are well; when there are none
CHECKS: dict[str, tuple[Callable[[Attacks], Iterator[str]], str, str]] = {
    "gradients": (gradients, "none zero or non-finite", "no attack counted its gradients"),
    "more effort": (effort, "more never weakened an attack", "no attack ran at two strengths"),
    "attacks harm": (harm, "no attack raised the AU-ROC of its pairs", "no pairs with clean rows"),
    "random search": (chance, "does not beat gradients", "no pairs under both kinds of eyeglasses"),
    "transfer": (
        functools.partial(chance, name="transfer", by="patches of another model"),
        "does not beat the white box",
        "no patch was made on another model",
    ),
    "indirect attack": (indirect, "takes at most 0.02 of AU-ROC", "no pairs under both attacks"),
    "certificate": (soundness, "no attack on the rule went below a bound", "no attack on the rule"),
    "outside the mask": (outside_mask, "nothing changed", "no attack measured it"),
    "same seed, same result": (reproducible, "repeated", "no attack was repeated"),
}


def health(runs: Sequence[Run]) -> list[Check]:
    """Every check over every method of every run; what fails anywhere has failed, saying where."""
    result = []
    for name, (find, well, missing) in CHECKS.items():
        failed, passed = [], set()
        for run in runs:
            for method, attacks in run.methods.items():
                found = list(find(attacks))
                where = f"{run.folder.name} {method}" if len(runs) > 1 else method
                if bad := "; ".join(told for told in found if told):
                    failed.append(f"{where}: {bad}")
                elif found:
                    passed.add(method)
        if failed:
            result.append(Check(name, FAILED, "; ".join(failed)))
        elif passed:
            result.append(Check(name, OK, f"{well} in {', '.join(sorted(passed))}"))
        else:
            result.append(Check(name, NOT_RUN, missing))
    return result


def health_lines(checks: Sequence[Check]) -> str:
    """One line a check, to stand with every table."""
    return "\n".join(f"{c.status:<8} {c.name}: {c.detail}" for c in checks)


# main


FIGURES = [*map(str, range(1, 10)), "roc", "places", "certified", "point", "intruders"]
KINDS = get_type_hints(Row)
LIMITS: dict[str, tuple[float, float]] = {"mirroring": (0, 1), "selection": (0, 1)}
FAR_OFF = ("distance", "direct", "bound", "bound_2", "bound_4", "bound_6", "bound_8")
LIMITS |= dict.fromkeys(FAR_OFF, (0, 1e300))


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no file. Raises run.UsageError."""
    from data import run

    return run.read_json(path, "write it again") if path.exists() else {}


def _row(values: Mapping[str, str]) -> Row:
    """A line's fields; ValueError names the one that is wrong."""
    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        text = values.get(name, "")
        if not text and name not in COLUMNS:
            continue
        try:
            found[name] = kind(text)
        except ValueError:
            whole = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} is {text!r}, not {whole}") from None
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if kind is not str and not low <= found[name] <= high:
            raise ValueError(f"{name} is {found[name]}, not finite and from {low} to {high:g}")
    if found["role"] not in ROLES:
        raise ValueError(f"role is {found['role']!r}, not one of {', '.join(ROLES)}")
    return Row(**found)


def opened(path: Path) -> Any:
    """A table as text, unpacked if it is packed."""
    how: dict[str, Any] = {"newline": "", "encoding": "utf-8"}
    if path.suffix != ".xz":
        return open(path, **how)
    import lzma  # which some builds of Python lack

    return lzma.open(path, "rt", **how)


def read_rows(path: Path) -> list[Row]:
    """Every row of one attack's file; raises run.UsageError naming file and line."""
    import csv

    from data import run

    rows: dict[Any, Row] = {}
    line, again = 1, "run attacks.py for this attack again"
    with run.reading(path, again), opened(path) as file:
        try:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [c for c in COLUMNS if c not in header]:
                raise ValueError(f"not a file of attack rows, column {missing[0]!r} is missing")
            for fields in reader:
                line = reader.line_num
                if len(fields) != len(header):
                    raise ValueError(f"{len(fields)} fields where the header has {len(header)}")
                row = _row(dict(zip(header, fields)))
                # an image made from noise has no number
                key = row[:8] if row.candidate >= 0 else line
                if key in rows:
                    raise ValueError(
                        f"target {row.target} against image {row.candidate} stands here twice"
                    )
                rows[key] = row
            if not rows:
                raise ValueError("no rows below the header")
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise run.UsageError(f"{path}:{line}: {error}; delete the file and {again}") from None
    return list(rows.values())


def read_run(folder: Path | str, rows: str = "attacks") -> Run:
    """All rows of a run; raises run.UsageError for a folder without rows, or a bad row."""
    from data import run

    folder = Path(folder)
    if not folder.is_dir():
        raise run.UsageError(f"--run {folder}: no such folder; give the folder that embed.py wrote")
    methods: dict[str, dict[str, Attack]] = {}

    def add(path: Path, method: str, name: str, attack: Attack) -> None:
        held, written = len(attack.rows), attack.sidecar.get("n")
        if written is not None and held != written:
            told = f"holds {held} rows of {name}, {written} were written"
            again = "delete it and run attacks.py for this attack again"
            raise run.UsageError(f"{path}: {told}; {again}")
        methods.setdefault(method, {})[name] = attack

    for path in sorted(folder.glob(f"*/{rows}/*.csv")):
        if path.stem != "figure3":
            attack = Attack(read_rows(path), optional_json(path.with_suffix(".json")))
            add(path, path.parent.parent.name, path.stem, attack)
    packed = folder / f"{rows}.csv.xz"  # of all methods, by results/pack.py
    every: dict[str, list[Row]] = {}
    for row in read_rows(packed) if packed.exists() else ():
        every.setdefault(row.attack, []).append(row._replace(attack=row.attack.split("/")[-1]))
    sidecars = optional_json(packed.with_name(f"{rows}.json"))
    for key, own in every.items():
        method, _, name = key.partition("/")
        add(packed, method, name, Attack(own, sidecars.get(key, {})))
    if not methods:
        told = f"holds no rows (<method>/{rows}/<attack>.csv); run attacks.py --run {folder}"
        raise run.UsageError(f"--run {folder}: {told}")
    return Run(folder, methods, optional_json(folder / "people.json"))


def summary(
    runs: Run | Path | str | Sequence[Run], mirroring: int = 1, selection: int = 1
) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {attack: figures}} of `measure`, as far as there are rows; else run.UsageError."""
    from data import run

    if isinstance(runs, (str, Path)):
        runs = read_run(runs)
    if isinstance(runs, Run):
        runs = [runs]
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for method, attacks in names(runs).items():
        for name in attacks:
            if figures := measure(runs, method, name, mirroring, selection, pr=True):
                result.setdefault(method, {})[name] = figures
    if not result:
        told = f"no clean rows with mirroring {mirroring} and selection {selection}"
        raise run.UsageError(f"--run {runs[0].folder}: {told}; run attacks.py with that setting")
    return result


def parse(argv: Sequence[str] | None):
    """The flags. Raises run.UsageError."""
    import argparse

    from data import run

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise run.UsageError(f"{message} (--help lists the flags)")

    about = "Tables, figures and health checks from the rows of a run."
    frr = "FPR is the paper's, genuine refused (the biometric FRR): the intruder is the positive."
    parser = Parser(description=about, epilog=frr)
    add = parser.add_argument
    add("--run", type=Path, required=True, nargs="+", help="folders of embed.py; several: the mean")
    add("--json", action="store_true", help="print the figures as JSON and write nothing")
    setting: dict[str, Any] = {"type": int, "choices": (0, 1), "default": 1}
    add("--mirroring", **setting, help="rows with the mirror image averaged in")
    add("--selection", **setting, help="rows with the anchor selected")
    add("--rows", default="attacks", help="each method's folder, attacks-<name> for other persons")
    add("--figures", nargs="*", choices=[*FIGURES, "none"], help="only these (default: all)")
    add("--out", type=Path, help="where tables.md and figures/ go (default: the first run)")
    return parser.parse_args(argv)


def show(argv: Sequence[str] | None) -> int:
    """`python metrics.py`: the table and the checks; tables.md and figures by results/."""
    import json

    from data import run

    args = parse(argv)
    runs = [read_run(folder, args.rows) for folder in args.run]
    result = summary(runs, args.mirroring, args.selection)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{table(result)}\n\n{health_lines(health(runs))}\n")
    try:
        from results import figures, tables
    except ModuleNotFoundError:
        print("tables.md and figures: not made, the folder results/ is not beside metrics.py")
        return 0
    out = args.out or args.run[0]
    run.write(out / "tables.md", tables.report(runs))
    wanted = [name for name in args.figures or FIGURES if name != "none"]
    told = figures.draw(runs[0], out / "figures", wanted)
    wrote = f"wrote {out}/tables.md" + (f" and {out}/figures" if wanted else "")
    print("\n".join([*told, wrote]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    try:
        from data import run
    except ModuleNotFoundError:
        raise SystemExit("metrics.py: the command needs the folder data/ beside it") from None
    return run.command("metrics.py", show, argv)


if __name__ == "__main__":
    raise SystemExit(main())
