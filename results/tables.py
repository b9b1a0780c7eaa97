"""The paper's tables from rows, and the generated blocks of README.md and results/README.md.

    python -m results.tables    # fills in both files

`report` is the tables.md of `python metrics.py`. The paper's own figures are for CelebA.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import metrics
from data import run
from metrics import (
    COUNTS,
    METHODS,
    NOT_RUN,
    Attack,
    Row,
    Run,
    counts,
    measure,
    names,
    pick,
)

HERE = Path(__file__).resolve().parent
PATCHES = ("eyeglasses", "square", "eye_patch")
TABLE_1 = (  # row, method, mirroring, selection, and the paper's AU-ROC and AU-PR
    ("Ours, basic", "ours", 0, 0, ((0.957,), (0.773, 0.809), (0.742, 0.785), (0.775, 0.789))),
    ("Ours, mirroring", "ours", 1, 0, ((0.959,), (0.812, 0.845), (0.789, 0.825), (0.791, 0.804))),
    ("Ours, selection", "ours", 0, 1, ((0.976,), (0.831, 0.868), (0.809, 0.848), (0.884, 0.895))),
    ("Ours, both", "ours", 1, 1, ((0.978,), (0.868, 0.896), (0.850, 0.882), (0.893, 0.903))),
    ("Ours, transfer, both", "ours-transfer", 1, 1, ()),
    ("Ours, transfer, masks, both", "ours-transfer-masked", 1, 1, ()),
    ("Ours, mixed, both", "ours-mixed", 1, 1, ()),
    ("Ours, mixed, all attacked, both", "ours-mixed-all", 1, 1, ()),
    ("Weak AT, masks", "weak-at-masked", 1, 1, ()),
    ("Weak AT", "weak-at", 1, 1, ((0.886,), (0.704, 0.726), (0.700, 0.722), (0.571, 0.556))),
    ("DOA, C = 4", "doa-4", 1, 1, ((0.972,), (0.830, 0.873), (0.836, 0.873), (0.826, 0.844))),
    ("DOA, C = 10", "doa-10", 1, 1, ((0.967,), (0.843, 0.878), (0.831, 0.864), (0.879, 0.886))),
)
NO_AT = ("Without AT", "no-at", 1, 1, ((0.977,), (0.590, 0.669), (0.695, 0.757), (0.657, 0.608)))
TABLE_2 = (NO_AT, *TABLE_1[3:8])
HOURS = {"ours": 11, "doa-10": 25, "generator": 14}  # Sec. 4: 20,000 steps, 200 epochs
THREATS = (  # where the patch of at most that size may be; its rule, its bound, the rule attacked
    ("anywhere", "rule", "certified", "rule_attacked"),
    ("anywhere, up to 4 x 4", "rule", "certified_4", ""),
    ("App. C's places", "rule_places", "certified_places", ""),
    ("App. C's places, one mask over all", "rule_one", "certified_one", ""),
)
LABELS = {m: label.removesuffix(", both") for label, m, *_ in (*TABLE_1, *TABLE_2)}
MODELS = {**LABELS, "facenet128-embed": "dlib's 128-d ResNet"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept(one: Run, wanted: Callable[[str, str, Row], bool]) -> Run:
    """The run with the rows wanted: (method, attack, row)."""
    methods = {
        m: {
            a: Attack([r for r in v.rows if wanted(m, a, r)], v.sidecar) for a, v in attacks.items()
        }
        for m, attacks in one.methods.items()
    }
    return Run(one.folder, methods, one.people)


def cell(m: Mapping[str, Any] | None, pr: bool = True, spread: bool = True) -> str:
    """`AU-ROC [interval; runs lowest to highest] / AU-PR` of a measure, or `not run`."""
    if m is None:
        return NOT_RUN
    notes = [] if m["interval"][0] is None else ["{:.3f}, {:.3f}".format(*m["interval"])]
    if spread and m.get("runs", 1) > 1:
        notes.append("runs {:.3f} to {:.3f}".format(*m["range"]["auroc"]))
    between = f" [{'; '.join(notes)}]" if notes else ""
    return f"{m['auroc']:.3f}{between}" + (f" / {m['aupr']:.3f}" if pr else "")


def unattacked(*measures: Mapping[str, Any] | None) -> str:
    """AU-ROC of the attacked pairs without the attack."""
    found = [m["clean_same_pairs"] for m in measures if m and m["clean_same_pairs"] is not None]
    return f"{found[0]:.3f}" if found else NOT_RUN


def methods_of(runs: Sequence[Run], *first: str) -> list[str]:
    """The runs' methods, after the first ones where any is the paper's."""
    held = names(runs)
    return list(dict.fromkeys([*(first if {*held} & {*METHODS} else ()), *held]))


def comparison(runs: Sequence[Run], lines: Sequence[tuple]) -> str:
    """Table 1 or 2: the paper's figure beside ours."""
    header = ["", "clean", "paper", "clean, the attacked pairs"]
    for name in PATCHES:
        header += [name.replace("_", " "), "paper"]
    body = []
    known, held = methods_of(runs, *METHODS), names(runs)
    for label, method, m, s, paper in lines:
        if method not in (known if paper else held):
            continue
        found = [measure(runs, method, a, m, s) for a in ("clean", *PATCHES)]
        row = [label]
        for n, figures in enumerate(found):
            theirs = " / ".join(f"{v:.3f}" for v in paper[n]) if paper else "-"
            row += [cell(figures, n > 0), theirs]
        row.insert(3, unattacked(found[1]))
        body.append([*row, counts(found[1] or found[0])])
    return markdown([*header, f"{COUNTS} under eyeglasses"], body) if body else NOT_RUN


def noise(runs: Sequence[Run]) -> str:
    theirs = "100 targets x 900 intruders (random eyeglasses)"
    body = [["Paper", "0.978", "-", "0.973", "0.965", theirs]]
    for method in methods_of(runs, "ours", "ours-transfer"):
        found = [measure(runs, method, a) for a in ("clean", "random_eyeglasses", "noise")]
        if any(found[1:]) or method == "ours":
            clean, *others = (cell(m, False) for m in found)
            row = [clean, unattacked(*found[1:]), *others, counts(found[1] or found[2])]
            body.append([LABELS.get(method, method), *row])
    header = ["", "clean", "clean, the same pairs", "random eyeglasses", "uniform noise", COUNTS]
    return markdown(header, body)


def evasion(runs: Sequence[Run]) -> str:
    body = []
    for method in methods_of(runs, "ours", "ours-transfer", "doa-10"):
        paper = {"ours": "25.2 %", "doa-10": "19.8 % (C not said)"}.get(method, "-")
        each = [m for one in runs if (m := measure([one], method, "evasion"))]
        spread = [m["detected_interval"] for m in each]
        between = ["one target" if lo is None else f"{lo:.1%} to {hi:.1%}" for lo, hi in spread]
        m = measure(runs, method, "evasion")
        share = f"{m['detected']:.1%} [{'; '.join(between)}]" if m else NOT_RUN
        actual = f"{m['fpr']:.1%}" if m else NOT_RUN
        body.append([LABELS.get(method, method), share, actual, paper, counts(m)])
    header = ["", "evading images detected [a run's interval]", "at FPR", "paper, at 5 %"]
    return markdown([*header, COUNTS], body)


def indirect(runs: Sequence[Run]) -> str:
    body = [["Paper", "0.868", "0.867", "-"]]
    for method in methods_of(runs, "ours", "ours-transfer"):
        direct, either = (measure(runs, method, a) for a in ("direct", "direct+indirect"))
        if direct or method == "ours":
            row = [cell(direct, False), cell(either, False), counts(either)]
            body.append([LABELS.get(method, method), *row])
    return markdown(["", "direct", "more successful of direct and indirect", COUNTS], body)


def distal(runs: Sequence[Run]) -> str:
    """How many images made from noise eq. (1) takes for the target, at an FPR of at most 5 %."""
    lines = []
    for method in names(runs):
        each = [m for one in runs if (m := measure([one], method, "distal"))]
        made = sum(m["n_intruders"] for m in each)
        accepted = sum(round((1 - m["detected"]) * m["n_intruders"]) for m in each)
        if made:
            told = f"{accepted} of {made} images made from noise pass as the target"
            told += f" at an FPR of {np.mean([m['fpr'] for m in each]):.1%}."
            lines.append(f"- {LABELS.get(method, method)}: {told}")
    return "\n".join(lines) or f"- Distal: {NOT_RUN}"


def beyond(runs: Sequence[Run]) -> str:
    """Attacks that the paper does not have; the worst of those that every method met, too."""
    every = [attacks for one in runs for attacks in one.methods.values()]
    common = [a for a in metrics.WORST if all(a in attacks for attacks in every)]
    fewer = [kept(one, lambda m, a, r: a in ("clean", *common)) for one in runs]
    attacks = ("eyeglasses", "eot_eyeglasses", "eye_patch", "grey_eye_patch", "eot_eye_patch")
    own = ("mask", "transfer")  # by --mask and --judge alone
    attacks += tuple(a for a in own if any(a in attacks for attacks in every))
    body = []
    for m in names(runs):
        cells = [cell(measure(runs, m, a)) for a in (*attacks, "worst")]
        body.append([LABELS.get(m, m), *cells, cell(measure(fewer, m, "worst"))])
    header = [a.replace("grey_eye_patch", "grey eye patch, no attack") for a in attacks]
    told = f"worst of {', '.join(common) or 'those all met'}"
    return markdown(["", *header, "worst of all it met", told], body)


def rule_attacked(one: Run) -> Run:
    """The run with the rule's rows of the intruders alone whose patch attacked it."""
    met = {
        (m, r.target, r.candidate)
        for m, attacks in one.methods.items()
        for r in pick(attacks, "rule_attacked", "intruder")
    }
    return kept(
        one,
        lambda m, a, r: a != "rule" or r.role != "intruder" or (m, r.target, r.candidate) in met,
    )


def sides(given: Sequence[int]) -> str:
    """Of a patch or mask, height x width, of one side or both."""
    return " x ".join(map(str, ([*given] * 2)[:2]))


def certificate(runs: Sequence[Run]) -> str:
    """The section on the rule of attacks.py's `certify`, "" without its rows: what no patch can
    reach, beside what the attack on it reached."""
    rules = [a["rule"].sidecar for one in runs for a in one.methods.values() if "rule" in a]
    if not rules:
        return ""
    attacked_pairs, body = [rule_attacked(one) for one in runs], []
    for method in names(runs):
        clean = measure(runs, method, "clean")
        for places, *attacks in THREATS:
            rule, bound, on = (measure(runs, method, a) if a else None for a in attacks)
            if not (rule and bound):
                continue
            row = [f"{LABELS.get(method, method)}, {places}", cell(clean, False), unattacked(bound)]
            row += [cell(m, False) for m in (rule, bound)]
            lo, hi = bound["detected_interval"]
            spread = "" if lo is None else f" [{lo:.1%}, {hi:.1%}]"
            row += [f"{bound['detected']:.1%}{spread}", f"{bound['fpr']:.1%}"]
            same = measure(attacked_pairs, method, attacks[1]) if on else None
            body.append([*row, cell(on, False), cell(same, False), counts(on), counts(bound)])
    header = ["", "clean, F itself", "the same pairs", "clean, under the rule", "certified"]
    header += ["certain rejection", "at FRR", "attacked under the rule", "certified, these pairs"]

    def told(key: str) -> str:
        found = [{**(s.get("config") or {}), **s}.get(key, "unknown") for s in rules]
        return ", ".join(sorted({str(v) if isinstance(v, str | int) else sides(v) for v in found}))

    return f"""## Certificate

A candidate is covered by each of {told("masks")} masks of {told("rule_mask")} of 64 in turn \
(fill: {told("fill")}; the anchor {told("anchor_seen")}), at
App. C's places by masks of their own; its score under the rule is the largest of the distances.
Fill *around*: of each pixel the mean of the next outside the mask up, down, left and right, \
nearer ones counting more.
*Certified*: AU-ROC with each intruder at its bound: no patch of at most {told("rule_patch")}, \
wherever it lies and whatever it
shows, brings the score below (at App. C's places: no eyeglasses, eye patch or square of the 25).
*Certain rejection*: the share of intruders whose bound is at least delta, 1 less the certified \
FAR; delta refuses at most 5 % of the
genuine pairs of validation persons under the rule, *at FRR* of the targets' own.
The best attack on the rule lies between *certified, these pairs* and *attacked*.

It bounds the rule, not F. It holds for one photograph, not for another pose, light or crop, and \
for one patch, no larger than said.
It says nothing on evasion, which the rule makes easier. What F says of an image must not depend \
on the rest of its batch.

{markdown([*header, f"{COUNTS}, attacked", COUNTS], body)}

"""


def settings(runs: Sequence[Run]) -> str:
    """What each attack really ran with, and who was attacked so."""
    used: dict[tuple[str, str, str], set[str]] = {}
    keys = ("iterations", "restarts", "patterns", "training_intruders", "a_step", "positions")
    keys += ("search_iterations",)
    for one in runs:
        for method, attacks in one.methods.items():
            for name, attack in attacks.items():
                held = attack.sidecar
                effort = ", ".join(f"{held[k]} {k.replace('_', ' ')}" for k in keys if k in held)
                key = name, effort or "-", str(held.get("device", "-"))
                used.setdefault(key, set()).add(method)
    everyone = set(names(runs))
    body = [[*k, "all" if v == everyone else ", ".join(sorted(v))] for k, v in sorted(used.items())]
    return markdown(["attack", "effort", "device", "methods"], body)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The finished lines of a log, [] without one; run.UsageError names a line that is not JSON."""
    result = []
    with run.reading(path, "correct it or train again"):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                result.append(dict(json.loads(line)))
            except (TypeError, ValueError):
                raise run.UsageError(f"{path}:{number}: not a JSON object; correct it") from None
    return result


def trainings(folder: Path) -> dict[str, dict[str, Any]]:
    """{method or generator: {"log": lines, "result": report}} of a run's trainings, from
    trainings.json as far as results/pack.py has put them there."""
    found = metrics.optional_json(folder / "trainings.json")
    for name in sorted(
        {p.parent.name for n in ("log.jsonl", "result.json") for p in folder.glob(f"*/{n}")}
    ):
        own = folder / name
        result = metrics.optional_json(own / "result.json")
        found[name] = {"log": read_log(own / "log.jsonl"), "result": result}
    return found


def cost(training: Mapping[str, Any]) -> tuple[float, float] | None:
    """(steps, seconds) of a training, of the generator (epochs, seconds); None without a log."""
    timed = [d for d in training.get("log", ()) if d.get("seconds")]
    return (timed[-1].get("step", len(timed)), timed[-1]["seconds"]) if timed else None


def costs(runs: Sequence[Run]) -> str:
    body, logs = [], [trainings(one.folder) for one in runs]
    for method in ("generator", *names(runs)):
        found = [c for held in logs if (c := cost(held.get(method, {})))]
        unit, count = ("epoch", 200) if method == "generator" else ("step", 20000)
        paper, mine = "-", [NOT_RUN] * 3
        if method in HOURS:
            paper = f"{HOURS[method]} h, {HOURS[method] * 3600 / count:.3g} s"
        if found:
            steps, seconds = np.mean(found, 0)
            mine = [f"{seconds / steps:.3g} s", f"{seconds / 60:.1f} min", f"{steps:.0f} {unit}s"]
        body.append([LABELS.get(method, method), *mine, paper])
    told = "paper, one RTX 2080 Ti: in all, each"
    return markdown(["", "a step or epoch", "in all", "number", told], body)


def disentanglement(runs: Sequence[Run]) -> str:
    """What generator.py reports of the persons it never saw, means over the runs."""
    found: dict[str, list[float]] = {}
    for one in runs:
        for key, value in trainings(one.folder).get("generator", {}).get("result", {}).items():
            if key == "made_of" or key.startswith("seconds"):
                continue
            for inner, v in value.items() if isinstance(value, Mapping) else [("", value)]:
                if isinstance(v, (int, float)):
                    found.setdefault(f"{key} {inner}".strip().replace("_", " "), []).append(v)
    body = []
    for key, v in found.items():
        between = f" ({min(v):.4g} to {max(v):.4g})" if len(v) > 1 else ""
        body.append([key, f"{np.mean(v):.4g}{between}"])
    return markdown(["generator, persons it never saw", "value"], body) if body else NOT_RUN


def report(runs: Sequence[Run]) -> str:
    """tables.md: every table of the paper, the paper's figures beside ours, `not run` where a run
    has no rows."""
    sidecars = [a.sidecar for one in runs for held in one.methods.values() for a in held.values()]
    people = [one.people for one in runs]

    def said(key: str, *sources: list[dict]) -> str:
        """What the first source that says anything says."""
        every = [sorted({str(d[key]) for d in found if key in d}) for found in sources]
        return ", ".join(next((v for v in every if v), ["unknown"]))

    own = [(m, m, 1, 1, ()) for m in names(runs) if m not in METHODS]  # that the paper has not
    data, seeds = said("data", sidecars, people), said("seed", people)
    several = " and the lowest and highest run" if len(runs) > 1 else ""
    return f"""# Tables

Data: {data}; runs: {len(runs)}; seed: {seeds}; commit: {said("commit", sidecars, people)}. \
The paper's figures are for CelebA.
Figures are AU-ROC / AU-PR, precision = TPR / (TPR + FPR), intruder positive; in brackets the \
95 % bootstrap interval of
the AU-ROC over targets{several}.

## Health checks

```
{metrics.health_lines(metrics.health(runs))}
```

## Attacks as run

{settings(runs)}

## Table 1

{comparison(runs, (*TABLE_1, *own))}

## Table 2: without adversarial training

{comparison(runs, TABLE_2)}

## App. B.2: random perturbations, AU-ROC

{noise(runs)}

## Sec. 4.3: evasion at an FPR of at most 5 %

{evasion(runs)}

## Sec. 4.4: indirect anchor and distal attacks

{indirect(runs)}

{distal(runs)}

## Beyond the paper: transformed patches, and the strongest attack per intruder

{beyond(runs)}

{certificate(runs)}## Disentanglement

{disentanglement(runs)}

## Cost

{costs(runs)}
"""


# What is generated in the READMEs


WHERE = (
    ("rendered, 1; of others; 400", "photographs-1"),
    ("rendered, 2; of others; 400", "photographs-2"),
    ("rendered, 4; of others; 400", "photographs-4"),
    ("rendered, 12; of others; 400", "photographs-12"),
    ("rendered, 12; of these; 400", "demo"),
    ("rendered, 12; of these; 1,000", "thousand"),
    ("rendered, 2; of these; 2,000", "long"),
    ("LFW, 1; of others; 2,000", "lfw-others"),
    ("LFW, 1; of these, all theirs; 2,000", "lfw-1"),
    ("LFW, all; of these; 3,000", "lfw"),
)
CLEAN_WORST = ("clean", "worst")


@functools.cache
def runs_of(*folders: str) -> list[Run]:
    """The committed runs of these folders, below results/."""
    return [metrics.read_run(HERE / folder) for folder in folders]


def seeds(folder: str) -> list[str]:
    """The folders seed-0, seed-1, ..."""
    return sorted(f"{folder}/{p.name}" for p in (HERE / folder).glob("seed-*"))


def complete(runs: Sequence[Run], methods: Iterable[str], attacks: Sequence[str]) -> list[Run]:
    """The runs in which each of the methods met each of the attacks."""
    asked = [(m, a) for m in methods for a in attacks]
    return [one for one in runs if all(measure([one], m, a) for m, a in asked)]


def overview() -> str:
    """README.md's table: twelve photographs of each train person, then one; the other patches are
    in the other README."""
    shown = ("clean", "eyeglasses", "certified")
    every, body = {m for one in runs_of(*seeds("demo")) for m in one.methods}, []
    runs = complete(runs_of(*seeds("demo")), every, shown)  # the same pairs in every column
    few = complete(photographs()[1], ("ours-transfer", "weak-at"), shown)
    for _, method, m, s, figures in (line for line in (*TABLE_1[3:], NO_AT) if line[1] in every):
        paper, row = dict(zip(shown, figures[:2])), [LABELS[method]]
        for name in shown:
            theirs = f" ({paper[name][0]:.3f})" if name in paper else ""
            row.append(cell(measure(runs, method, name, m, s), False, False) + theirs)
        whole = len(complete(few, [method], shown)) == len(few)
        mine = [measure(few, method, a) if whole else None for a in shown]
        body.append([*row, *(cell(m, False, False) for m in mine)])
    named = ", ".join(one.folder.name.replace("-", " ") for one in runs)
    told = f"AU-ROC on rendered faces, not CelebA: {named}, the same pairs for every method, with "
    told += f"one photograph the mean of {len(few)} seeds [95 % interval over persons] (the "
    told += "paper's, CelebA)."
    header = [*shown[:2], "certified, 10 x 10", *(f"one photograph: {a}" for a in shown)]
    return f"{told}\n\n{markdown(['', *header], body)}"


def side_by_side(
    lines: Sequence[tuple[str, Sequence[Run], str]], attacks: Sequence[str] = PATCHES[:1]
) -> str:
    """(label, runs, method), one a line: clean and under the attacks."""
    body = []
    for label, runs, method in lines:
        clean, *found = (measure(runs, method, a) for a in ("clean", *attacks))
        row = [cell(clean, False), unattacked(*found), *(cell(m, False) for m in found)]
        body.append([label, *row, str(len(runs)), counts(found[0])])
    header = ["F", "clean", "clean, the attacked pairs", *(a.replace("_", " ") for a in attacks)]
    return markdown([*header, "runs", f"{COUNTS} under {attacks[0]}"], body)


def by_method(runs: Sequence[Run], before: str = "") -> list[tuple[str, list[Run], str]]:
    """The lines of `side_by_side` for every method of the runs."""
    every = names(runs)
    return [(before + LABELS.get(m, m), [r for r in runs if m in r.methods], m) for m in every]


def compared(
    runs: Sequence[Run],
    methods: Sequence[str],
    others: Sequence[str],
    attacks: Sequence[str],
    before: str = "",
) -> list[list[str]]:
    """AU-ROC of methods less that of others on the same pairs, with paired intervals: a
    table's header, then its lines."""
    body = [["AU-ROC", *(a.replace("_", " ") for a in attacks), "runs"]]
    for method, other in itertools.product(methods, others):
        both = [one for one in runs if {method, other} <= {*one.methods}]
        if not both:
            continue
        found = [metrics.difference(both, method, other, a) for a in attacks]
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*d) if d else NOT_RUN for d in found]
        body.append([f"{before}{LABELS[method]}, less {LABELS[other]}", *cells, str(len(both))])
    return body


def settings_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one of `trainings`, {} without a result."""
    result = training.get("result", {})
    return result.get("made_of", result).get("config", {})


def where() -> str:
    """In every setting: what each method of generated companions gains on the two baselines; bold
    where its interval lies above 0."""
    body = []
    for told, folder in WHERE:
        runs = runs_of(*seeds(folder))
        for method in (m for m in names(runs) if m.startswith("ours")):
            row = [told, LABELS[method]]
            for other in ("weak-at", "doa-10"):
                _, *found = compared(runs, [method], [other], CLEAN_WORST)
                cells = found[0][1:] if found else [NOT_RUN, NOT_RUN, "0"]
                row += [f"**{c}**" if "[+" in c else c for c in cells]
            body.append(row)
    head = ["photographs a person; G made of; steps", ""]
    for other in ("weak AT", "DOA"):
        head += [*(f"{a}, less {other}" for a in CLEAN_WORST), "seeds"]
    return markdown(head, body)


def paper() -> str:
    text = report(runs_of(*seeds("demo")))
    return "#" + text[text.index("## Health checks") :].replace("\n## ", "\n### ").rstrip()


def margins() -> str:
    """What the two headline methods gain on the baselines, as many images a person as there are."""
    runs, attacks = runs_of(*seeds("demo")), ("clean", *PATCHES, "worst", "certified")
    every = ("weak-at", "doa-10", "doa-4", "no-at")
    tables = [compared(runs, [m], every, attacks) for m in ("ours-mixed-all", "ours-transfer")]
    return "\n\n".join(markdown(head, body) for head, *body in tables)


def photographs() -> dict[int, list[Run]]:
    """The runs whose F saw so many photographs of each train person, none of whom G had seen."""
    numbers = sorted(int(p.name.split("-")[1]) for p in HERE.glob("photographs-*"))
    return {k: runs_of(*seeds(f"photographs-{k}")) for k in numbers}


def regime(folder: str, *more: str) -> str:
    """Every method of a folder of seeds on the same targets and intruders, and what ours gain,
    under more attacks too."""
    runs, attacks = runs_of(*seeds(folder)), (*PATCHES, "worst")
    ours = [m for m in names(runs) if m.startswith("ours")]
    baselines = [m for m in ("weak-at", "doa-10", "no-at") if m in names(runs)]
    head, *gains = compared(runs, ours, baselines, ("clean", *attacks, *more))
    tables = side_by_side(by_method(runs), attacks), markdown(head, gains), costs(runs)
    return "\n\n".join(tables)


def one() -> str:
    """One photograph of each train person."""
    return regime("photographs-1", "evasion", "certified")


def several() -> str:
    """AU-ROC against the number of photographs of each train person."""
    lines, gains, attacks = [], [], (*PATCHES, "worst")
    head: list[str] = []
    for k, runs in photographs().items():
        lines += by_method(runs, f"{k}: ")
        baselines, every = ("weak-at", "doa-10"), ("clean", *attacks)
        ours = ("ours-transfer", "ours-mixed-all")
        head, *found = compared(runs, ours, baselines, every, f"{k}: ")
        gains += found
    return f"{side_by_side(lines, attacks)}\n\n{markdown(head, gains)}"


def longer() -> str:
    """The same, 2,000 steps at a constant rate."""
    return regime("long")


def thousand() -> str:
    """1,000 steps, transfer with the certificate's masks beside the baselines."""
    return regime("thousand", "certified")


def proved() -> str:
    """What no patch can reach for the F of `thousand`."""
    text = certificate(runs_of(*seeds("thousand")))
    return text[text.index("\n|") + 1 :].rstrip()


def covers() -> str:
    """The certificate under other masks, fills, anchors and patches, each on the same pairs."""
    body, sizes = [], ("rule_patch", "rule_mask")
    for folder in sorted((HERE / "covers").iterdir()):
        (one,) = runs_of(f"covers/{folder.name}")
        for method in names([one]):
            held = one.methods[method]["rule"].sidecar
            patch, mask = (sides(held["config"][k]) for k in sizes)
            told = [patch, f"{held['masks']} of {mask}", held["fill"], held["anchor_seen"]]
            found = [measure([one], method, a) for a in ("clean", "rule", "certified")]
            last = found[-1]
            row = [MODELS.get(method, method), *told, *(cell(m, False) for m in found)]
            body.append([*row, f"{last['detected']:.1%}", f"{last['fpr']:.1%}", counts(last)])
    header = ["F", "patch", "masks", "fill", "anchor", "clean, F itself", "clean, under the rule"]
    return markdown([*header, "certified", "certain rejection", "at FRR", COUNTS], body)


def soundness() -> str:
    """What the attacks of tests/soundness.py reached, aimed at the rule itself."""
    body = []
    for path in sorted(HERE.glob("*/seed-*/*/soundness.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        method, pairs = path.parts[-2], sum(line["pairs"] for line in lines)
        for attack in lines[0]["attacks"]:
            found = [(line["pairs"], *line["attacks"][attack]) for line in lines]
            bound, score = (sum(v[0] * v[k] for v in found) / pairs for k in (2, 3))
            row = [LABELS.get(method, method), attack, str(pairs), f"{bound:.3f}", f"{score:.3f}"]
            body.append([*row, f"{min(v[1] for v in found):+.1e}"])
    header = ["F", "rule: attack", "pairs", "mean bound", "mean score reached"]
    return markdown([*header, "least of score / bound - 1"], body)


def preset() -> str:
    """What the demo's preset was chosen by: validation persons, seed 0."""
    lines = []
    for name in ("300x32x5", "400x32x2", "600x16x2", "400x24x2"):
        (one,) = runs_of(f"preset/{name}")
        held = trainings(one.folder)
        for m in names([one]):
            made = settings_of(held[m])
            inner = f"{made['attack_steps']} of {made['attack_alpha']:g}/255"
            told = f"{made['steps']} steps of {made['batch']}, inner {inner}"
            lines.append((f"{LABELS[m]}, {told}", [one], m))
    return side_by_side(lines, PATCHES[:2])


def strength() -> str:
    """Eyeglasses at the demo's and at the paper's strength, on the pairs that met both."""
    lines = []
    demo, strong = runs_of("demo/seed-0", "strength")
    for method, attacks in strong.methods.items():
        met = {(r.target, r.candidate) for r in pick(attacks, "eyeglasses", "intruder")}
        same = kept(
            demo,
            lambda m, a, r: a != "eyeglasses" or (r.target, r.candidate) in met,  # noqa: B023
        )
        for one, told in ((same, "80 x 1"), (strong, "1000 x 5")):
            lines.append((f"{LABELS[method]}, attacked {told}", [one], method))
    return side_by_side(lines)


def photographs_of(folder: str) -> str:
    """`regime`, and what G of photographs reports."""
    return f"{regime(folder, 'evasion')}\n\n{disentanglement(runs_of(*seeds(folder)))}"


def lfw() -> str:
    return photographs_of("lfw")


def lfw_one() -> str:
    """One photograph of each train person of LFW, who are G's too."""
    return regime("lfw-1", "evasion")


def lfw_others() -> str:
    """One photograph of each of half of LFW's train persons; G was made of the other half."""
    return photographs_of("lfw-others")


def oracle() -> str:
    """What an independent face network says of y and u of persons that G never saw."""
    body = []
    for label, folder in (("rendered faces", "demo/seed-0"), ("LFW", "lfw/seed-0")):
        (path,) = (HERE / folder / "generator").glob("oracle-*.json")
        held = run.read_json(path)
        shares = ("y_nearer_to_x_than_t", "u_nearer_to_x_than_to_t", "u_nearer_to_t_than_x_is")
        row = [f"{held[k]:.3f}" for k in ("x_y", "x_u", "t_x", "t_u")]
        body.append([label, str(held["images"]), *row, *(f"{held[k]:.0%}" for k in shares)])
    header = ["G of", "quadruplets", "d(x, y)", "d(x, u)", "d(t, x)", "d(t, u)"]
    told = ["y nearer to x than t is", "u nearer to x than to t", "u nearer to t than x is"]
    return markdown([*header, *told], body)


def models() -> str:
    """README.md's row of a public descriptor, attacked by --model, beside F on the same data."""
    body = []
    lines = (
        (MODELS["facenet128-embed"], "facenet128", "facenet128-embed"),
        (f"F, {LABELS['weak-at']}", "lfw/seed-0", "weak-at"),
    )
    for label, folder, method in lines:
        found = [measure(runs_of(folder), method, a) for a in ("clean", "eyeglasses", "square")]
        shares = [f"{m['detected']:.0%}" if m else NOT_RUN for m in found]
        body.append([label, *(cell(m, False) for m in found), ", ".join(shares)])
    told = "detected at 5 % FPR: each"
    return markdown(["LFW, AU-ROC", "clean", "eyeglasses", "square", told], body)


def descriptor() -> str:
    """Every attack on the public descriptor: areas, rates, counts."""
    runs, method, body = runs_of("facenet128"), "facenet128-embed", []
    for name in names(runs)[method]:
        if name.startswith("certified_") or not (m := measure(runs, method, name, pr=True)):
            continue
        spread = [
            f"{m[k]:{form}} [{m[v][0]:{form}}, {m[v][1]:{form}}]"
            for k, v, form in (
                ("auroc", "interval", ".3f"),
                ("aupr", "aupr_interval", ".3f"),
                ("detected", "detected_interval", ".1%"),
            )
        ]
        passing = (m[f"{k}_at_far_0.1"] for k in ("tar", "asr"))
        rates = ("-" if v is None else f"{v:.1%}" for v in (m["eer"], *passing))
        body.append([name.replace("_", " "), *spread, *rates, counts(m)])
    header = ["", "AU-ROC", "AU-PR", "detected at 5 % FPR", "EER", "TAR at FAR 10 %", "ASR there"]
    return markdown([*header, COUNTS], body)


def others() -> str:
    """The command's attack against what other libraries reach on the same pairs and passes."""
    with open(HERE / "facenet128/others.csv", newline="") as file:
        body = [[*row] for row in csv.reader(file)][1:]
    header = ["model", "pairs", "passes", "attack", "lines", "mean distance", "CPU s", "rounds"]
    return markdown(header, body)


FLOORS = {  # of an op: variant or a word of the case, how many times as fast was asked for
    "pgd": {"loop as in ART": 3.0, "loop as in torchattacks": 2.0},
    "step": {"anchors cached": 1.5, "in the released code": 3.0},
    "doa": {"NumPy loop": 8.0},
    "gaussian_cutout": {"NumPy loop, noise inside": 3.0, "masks as images": 3.0},
    "patch_local": {"10x10": 1.6, "20x20": 1.3},
}


def floor(op: str, case: str, variant: str) -> float | None:
    if "one step" in case:
        return None
    return next((v for k, v in FLOORS.get(op, {}).items() if k in f"{case}, {variant}"), None)


def speed() -> str:
    """Of each op the rows that results/bench.csv got last on a CPU, beside the floors."""
    with open(HERE / "bench.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["device"] == "cpu"]
    newest = {r["op"]: (r["commit"], r["date"]) for r in rows}
    rows = [r for r in rows if (r["commit"], r["date"]) == newest[r["op"]]]
    body = []
    for r in rows:
        case, ratio, asked = r["case"], float(r["ratio"]), floor(r["op"], r["case"], r["variant"])
        told = f"{asked}{', missed' * (ratio < asked)}" if asked else ""
        if r["op"] == "gaussian_cutout" and told:
            told += ": half of ours is a copy of the images, which the loop makes too"
        row = [f"`{r['op']}`, {case}", r["variant"], f"{ratio:.2f}", told, r["n"], r["commit"]]
        if r["variant"] != "op":
            body.append(row)
    told = f"Medians over n rounds, {rows[-1]['threads']} thread, torch {rows[-1]['torch']}."
    header = ["ours", "against", "times as fast", "floor", "n", "commit"]
    return f"{markdown(header, body)}\n\n{told}"


BLOCKS = {
    "README.md": {"results": overview, "models": models},
    "results/README.md": {
        f.__name__: f
        for f in (
            where,
            paper,
            margins,
            one,
            several,
            longer,
            thousand,
            proved,
            preset,
            strength,
            lfw,
            lfw_one,
            lfw_others,
            oracle,
            descriptor,
            others,
            covers,
            soundness,
            speed,
        )
    },
}


def fill(text: str, name: str, content: str) -> str:
    """The text with the content between the two lines that name the block."""
    start, end = f"<!-- {name}: python -m results.tables -->\n", f"<!-- end of {name} -->"
    (head, rest) = text.split(start, 1)
    return f"{head}{start}{content}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    for file, blocks in BLOCKS.items():
        path = HERE.parent / file
        text = path.read_text(encoding="utf-8")
        for name, make in blocks.items():
            text = fill(text, name, make())
        run.write(path, text)


if __name__ == "__main__":
    main()
