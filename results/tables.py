"""The paper's tables from rows, the generated blocks of both READMEs, and packing of a run's rows.

    python -m results.tables                                             # fills in both READMEs
    python -m results.tables pack runs/synthetic-demo-0 results/demo/seed-0
    python -m results.tables report attacks OUT RUN [RUN ...]            # OUT/tables.md

`report` is what `python metrics.py` writes. The paper's own figures are for CelebA.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import metrics
from data import PARTS, run
from metrics import METHODS, NOT_RUN, Run, counts, measure, names

HERE = Path(__file__).resolve().parent
PATCHES, DOA = ("eyeglasses", "square", "eye_patch"), "doa-10"
LABELS = {"ours": "Ours", "transfer": "Transfer", "mixed": "Mixed", "weak-at": "Weak AT"}
LABELS |= {"doa-4": "DOA, C = 4", "doa-10": "DOA, C = 10", "no-at": "Without AT"}
LABELS |= {"facenet128-embed": "dlib's 128-d ResNet"}
RULE = """*The rule*: a mask hides a part of the candidate, at each of many places; its score is \
the largest distance. *Certified*:
AU-ROC with each intruder at a score that no patch of 10 x 10 pixels of 64 undercuts, or of \
*4 x 4*. *Certain rejection*: of intruders,
where 5 % of validation persons' genuine pairs are refused; *FRR*: of the targets' own. This is of \
the rule: it may exceed F's own."""
COUNTS = "targets / genuine / intruders"
# Table 1 and 2: the paper's AU-ROC of clean images, then AU-ROC / AU-PR under each patch
PAPER = {
    "ours": ("0.978", "0.868 / 0.896", "0.850 / 0.882", "0.893 / 0.903"),
    "weak-at": ("0.886", "0.704 / 0.726", "0.700 / 0.722", "0.571 / 0.556"),
    "doa-4": ("0.972", "0.830 / 0.873", "0.836 / 0.873", "0.826 / 0.844"),
    "doa-10": ("0.967", "0.843 / 0.878", "0.831 / 0.864", "0.879 / 0.886"),
    "no-at": ("0.977", "0.590 / 0.669", "0.695 / 0.757", "0.657 / 0.608"),
}
BASIC = {  # of ours: (mirroring, selection)
    (0, 0): ("0.957", "0.773 / 0.809", "0.742 / 0.785", "0.775 / 0.789"),
    (1, 0): ("0.959", "0.812 / 0.845", "0.789 / 0.825", "0.791 / 0.804"),
    (0, 1): ("0.976", "0.831 / 0.868", "0.809 / 0.848", "0.884 / 0.895"),
}
HOURS = {"ours": 11, "doa-10": 25, "generator": 14}  # Sec. 4: 20,000 steps, 200 epochs


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(m: Mapping[str, Any] | None, pr: bool = True, spread: bool = True) -> str:
    """Format `AU-ROC [interval; runs lowest to highest] / AU-PR` of a measure, or `not run`."""
    if m is None:
        return NOT_RUN
    notes = [] if m["interval"][0] is None else ["{:.3f}, {:.3f}".format(*m["interval"])]
    if spread and m.get("runs", 1) > 1:
        notes.append("runs {:.3f} to {:.3f}".format(*m["range"]["auroc"]))
    between = f" [{'; '.join(notes)}]" if notes else ""
    return f"{m['auroc']:.3f}{between}" + (f" / {m['aupr']:.3f}" if pr else "")


def rate(m: Mapping[str, Any]) -> str:
    """Format the share detected and its interval."""
    low, high = m["detected_interval"]
    return f"{m['detected']:.1%}" + ("" if low is None else f" [{low:.1%}, {high:.1%}]")


class Line(NamedTuple):
    """A line of `comparison`: whose rows, and the paper's figures by attack."""

    label: str
    runs: Sequence[Run]
    method: str
    setting: tuple[int, int] = (1, 1)
    paper: Mapping[str, str] = {}


def lines_of(runs: Sequence[Run], paper: Mapping[str, Mapping[str, str]] | None = None):
    """Make a line of each method, beside the paper's figures {method: {attack: figure}}."""
    present, theirs = names(runs), paper or {}
    own = {*present} & {*METHODS}
    methods = [m for m in METHODS if m in own or (own and m in theirs)]
    methods += [m for m in present if m not in METHODS]
    return [Line(LABELS.get(m, m), runs, m, paper=theirs.get(m, {})) for m in methods]


def comparison(lines: Sequence[Line], attacks: Sequence[str], pr: bool = False) -> str:
    """Format a line for each method, a column for each attack, the paper's figure beside ours."""
    header, body = ["", "clean, the attacked pairs"], []
    beside = [a for a in attacks if any(a in line.paper for line in lines)]
    for a in attacks:
        header += [a.replace("_", " "), *["paper"][: a in beside]]
    for line in lines:
        each = {a: measure(line.runs, line.method, a, *line.setting) for a in attacks}
        if not line.paper and not any(m for a, m in each.items() if a != "clean"):
            continue
        same = [m["clean_same_pairs"] for a, m in each.items() if m and a != "clean"]
        row = [line.label, f"{same[0]:.3f}" if same and same[0] is not None else NOT_RUN]
        for a, m in each.items():
            row += [cell(m, pr and a != "clean"), *[line.paper.get(a, "-")][: a in beside]]
        last = next((m for a, m in each.items() if m and a != "clean"), each.get("clean"))
        body.append([*row, str((last or {}).get("runs", 1)), counts(last)])
    return markdown([*header, "runs", COUNTS], body) if body else NOT_RUN


def tables_1_and_2(runs: Sequence[Run]) -> str:
    """Make Table 1 with the line of Table 2 (App. B.1), the paper's figures beside ours."""
    attacks, basic = ("clean", *PATCHES), []
    for setting, figures in BASIC.items() if "ours" in names(runs) else ():
        label = "Ours, {} mirroring, {} selection".format(*("with" if s else "no" for s in setting))
        basic.append(Line(label, runs, "ours", setting, dict(zip(attacks, figures))))
    paper = {m: dict(zip(attacks, figures)) for m, figures in PAPER.items()}
    return comparison([*basic, *lines_of(runs, paper)], attacks, pr=True)


def detection(runs: Sequence[Run]) -> str:
    """Make the table of evading images (Sec. 4.3) and of images made from noise (Sec. 4.4)."""
    body, paper = [], {"ours": "25.2 %", "doa-10": "19.8 % (C not said)"}
    for attack, theirs in (("evasion", paper), ("distal", {})):
        for method in names(runs):
            some = [one for one in runs if attack in one.methods.get(method, ())]
            m, clean = (measure(some, method, a) if some else None for a in (attack, "clean"))
            if m and clean:
                row = [f"{LABELS.get(method, method)}, {attack}", rate(m), theirs.get(method, "-")]
                row += [f"{m['fpr']:.1%}", rate(clean), f"{m['auroc']:.3f}"]
                body.append([*row, str(m.get("runs", 1)), counts(m)])
    header = ["", "detected", "paper", "at FPR", "intruders refused, no attack", "AU-ROC"]
    return markdown([*header, "runs", COUNTS], body) if body else NOT_RUN


def certificate(lines: Sequence[Line]) -> str:
    """Make the table of verify.py's rule: what no patch can reach."""
    body, attacks = [], ("clean", "rule", "certified", "certified_4")
    for label, runs, method, *_ in lines:
        judged = [one for one in runs if "rule" in one.methods.get(method, ())]
        each = [measure(judged, method, a) for a in attacks] if judged else [None] * 4
        if m := each[2]:
            label += ", threshold of its own pairs" * (m["n_setters"] == 0)
            row = [label, *(cell(v, False) for v in each), rate(m)]
            body.append([*row, f"{m['fpr']:.1%}", str(m.get("runs", 1)), counts(m)])
    header = ["", "clean, F itself", "clean, under the rule", "certified", "certified, 4 x 4"]
    header += ["certain rejection", "at FRR", "runs", COUNTS]
    return markdown(header, body) if body else NOT_RUN


def efforts(runs: Sequence[Run]) -> str:
    """Make the table of what each attack really ran with."""
    used: dict[tuple[str, str, str], set[str]] = {}
    keys = ("iterations", "restarts", "patterns", "training_intruders", "positions")
    keys += ("search_iterations", "masks")
    for one in runs:
        for method, attacks in one.methods.items():
            for name, (_, sidecar) in attacks.items():
                effort = [f"{sidecar[k]} {k.replace('_', ' ')}" for k in keys if k in sidecar]
                sizes = sidecar.get("config", {}) if name == "rule" else {}
                effort += [f"{k} {sizes[k]}" for k in ("rule_mask", "rule_patch") if k in sizes]
                key = name, ", ".join(effort) or "-", str(sidecar.get("device", "-"))
                used.setdefault(key, set()).add(method)
    everyone = {*names(runs)}
    body = [[*k, "all" if v == everyone else ", ".join(sorted(v))] for k, v in sorted(used.items())]
    return markdown(["attack", "effort", "device", "methods"], body)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the finished lines of a log; run.UsageError names a line that is not JSON."""
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
    """Read {method or generator: {"log": lines, "result": report}} of a run, packed or not."""
    result = metrics.optional_json(folder / "trainings.json")
    paths = [*folder.glob("*/log.jsonl"), *folder.glob("*/result.json")]
    for own in sorted({path.parent for path in paths}):
        report = metrics.optional_json(own / "result.json")
        result[own.name] = {"log": read_log(own / "log.jsonl"), "result": report}
    return result


def settings_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one of `trainings`, {} without a result."""
    return training.get("result", {}).get("made_of", {}).get("config", {})


def costs(runs: Sequence[Run]) -> str:
    """Make the table of what training took, the paper's hours beside it."""
    body, every = [], [trainings(one.folder) for one in runs]
    for method in ("generator", *names(runs)):
        logs = [logs[method].get("log", ()) for logs in every if method in logs]
        last = [timed[-1] for log in logs if (timed := [d for d in log if d.get("seconds")])]
        if not last:
            continue
        steps = np.mean([d.get("step", d.get("epoch")) for d in last])
        seconds = np.mean([d["seconds"] for d in last])
        unit, number = ("epoch", 200) if method == "generator" else ("step", 20000)
        row = [f"{seconds / steps:.3g} s", f"{seconds / 60:.1f} min", f"{steps:.0f} {unit}s", "-"]
        if method in HOURS:
            row[3] = f"{HOURS[method]} h, {HOURS[method] * 3600 / number:.3g} s"
        body.append([LABELS.get(method, method), *row])
    header = ["", "a step or epoch", "in all", "number", "paper, one RTX 2080 Ti: in all, each"]
    return markdown(header, body) if body else NOT_RUN


def sections(runs: Sequence[Run]) -> dict[str, Callable[[], str]]:
    """Name what makes every table of the paper, its figures beside ours, by title."""
    several = ("clean", "random_eyeglasses", "noise", "direct", "direct+indirect")
    theirs = {"ours": dict(zip(several, ("0.978", "0.973", "0.965", "0.868", "0.867")))}
    beyond = ("eot_eyeglasses", "mask", "worst")
    return {
        "Health checks": lambda: f"```\n{metrics.health_lines(runs)}\n```",
        "Attacks as run": lambda: efforts(runs),
        "Tables 1 and 2": lambda: tables_1_and_2(runs),
        "App. B.2: random perturbations; Sec. 4.4: direct and indirect anchor": lambda: comparison(
            lines_of(runs, theirs), several
        ),
        "Sec. 4.3, 4.4: evasion and distal at an FPR of at most 5 %": lambda: detection(runs),
        "Beyond the paper": lambda: comparison(lines_of(runs), beyond),
        "The certificate": lambda: f"{RULE}\n\n{certificate(lines_of(runs))}",
        "Cost": lambda: costs(runs),
    }


def report(runs: Sequence[Run]) -> str:
    """Make tables.md."""
    sidecars = [a.sidecar for one in runs for v in one.methods.values() for a in v.values()]
    people = [one.people for one in runs]

    def said(key: str) -> str:
        every = [sorted({str(d[key]) for d in source if key in d}) for source in (sidecars, people)]
        return ", ".join(next((v for v in every if v), ["unknown"]))

    text = f"""# Tables

Data: {said("data")}; runs: {len(runs)}; seed: {said("seed")}; commit: {said("commit")}. \
The paper's figures are for CelebA.
Figures are AU-ROC / AU-PR, precision = TPR / (TPR + FPR), intruder positive; in brackets the \
95 % bootstrap interval of the AU-ROC over targets and, of several runs, the lowest and highest.
"""
    return text + "".join(f"\n## {k}\n\n{make()}\n" for k, make in sections(runs).items())


# The generated blocks of the READMEs

WHERE = (
    ("rendered, 12 photographs", "photographs-12"),
    ("rendered, 1 photograph", "photographs-1"),
    ("LFW, 1 photograph", "lfw-others"),
    ("LFW, all photographs", "lfw"),
)


@functools.cache
def runs_of(folder: str) -> list[Run]:
    """Read the committed runs of a folder of results/: its seeds, or itself."""
    seeds = sorted((HERE / folder).glob("seed-*"))
    return [metrics.read_run(path) for path in seeds or [HERE / folder]]


def photographs() -> dict[int, list[Run]]:
    """Read the runs whose F saw so many photographs of each train person, whom G never saw."""
    numbers = sorted(int(p.name.split("-")[1]) for p in HERE.glob("photographs-*"))
    return {k: runs_of(f"photographs-{k}") for k in numbers}


def gains(
    runs: Sequence[Run], methods: Sequence[str], others: Sequence[str], attacks: Sequence[str]
) -> list[list[str]]:
    """Format the AU-ROC of methods less that of others on the same pairs, with the runs' number."""
    body = []
    for method in methods:
        for other in others:
            both = [one for one in runs if {method, other} <= {*one.methods}]
            each = [metrics.difference(both, method, other, a) if both else None for a in attacks]
            cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*d) if d else NOT_RUN for d in each]
            cells = [f"**{c}**" if "[+" in c else c for c in cells]
            body.append([f"{LABELS[method]}, less {LABELS[other]}", *cells, str(len(both))])
    return body


def where() -> str:
    """Make the table of what each method of companions gains on the baselines, by setting."""
    baselines = {"weak-at": "weak AT", DOA: "DOA", "no-at": "without AT"}
    settings = [(setting, runs_of(folder)) for setting, folder in WHERE]
    one_less_twelve = []  # transfer from one photograph of each, the others from twelve
    for one, twelve in zip(settings[1][1], settings[0][1]):
        both = {m: twelve.methods[m] for m in baselines} | {"transfer": one.methods["transfer"]}
        one_less_twelve.append(Run(one.folder, both))
    settings.insert(2, ("rendered, 1 photograph, less 12", one_less_twelve))
    body = []
    for setting, runs in settings:
        for method in (m for m in names(runs) if m in METHODS[:3]):
            row = [setting, LABELS[method]]
            for other in baselines:
                row += gains(runs, [method], [other], ["clean", "worst"])[0][1:]
            body.append(row)
    header = ["photographs of each person", ""]
    for other in baselines.values():
        header += [f"clean, less {other}", f"worst, less {other}", "seeds"]
    return markdown(header, body)


def plural(seeds: int) -> str:
    """Format a number of seeds."""
    return f"{seeds} seed{'s' * (seeds > 1)}"


def overview() -> str:
    """Make README.md's table of settings by method, without an attack and under the worst."""
    methods = [m for m in METHODS if m != "doa-4"]
    body = []
    for setting, folder in WHERE:
        runs = runs_of(folder)
        row = [f"{setting}; {plural(len(runs))}"]
        for method in methods:
            both = [m for a in ("clean", "worst") if (m := measure(runs, method, a))]
            cells = " / ".join(f"{m['auroc']:.3f}" for m in both)
            seeds = sum(method in one.methods for one in runs)
            fewer = f" ({plural(seeds)})" if seeds < len(runs) else ""
            row.append(f"{cells}{fewer}" if len(both) == 2 else NOT_RUN)
        body.append(row)
    return markdown(["AU-ROC, clean / worst", *(LABELS[m] for m in methods)], body)


def paper() -> str:
    """Select the sections on twelve photographs that a claim rests on, and add the gains."""
    runs = runs_of("photographs-12")
    every = sections(runs)
    every["What companions gain"] = lambda: gained(runs)
    left_out = ("Attacks as run", "Beyond the paper", "The certificate", "Cost")
    kept = {k: v for k, v in every.items() if k not in left_out}
    return "\n\n".join(f"### {title}\n\n{make()}" for title, make in kept.items())


def gained(runs: Sequence[Run]) -> str:
    """Make the table of companions less real pairs, and of ours less ours without AT, by attack."""
    attacks = ("clean", *PATCHES, "worst", "evasion", "certified")
    companions = [m for m in names(runs) if m in METHODS[:3]]
    baselines = [m for m in ("weak-at", DOA) if m in names(runs)]
    body = gains(runs, companions, baselines, attacks)
    body += gains(runs, ["ours"], ["no-at"], attacks) if "no-at" in names(runs) else []
    return markdown(["AU-ROC", *(a.replace("_", " ") for a in attacks), "runs"], body)


def compared(lines: Sequence[Line]) -> str:
    """Make the table of these methods under every patch and the worst."""
    return comparison(lines, ("clean", *PATCHES, "worst"))


def one_photograph() -> str:
    """Make the tables of one photograph of each train person."""
    runs = runs_of("photographs-1")
    return "\n\n".join([compared(lines_of(runs)), gained(runs), costs(runs)])


def lines_by_setting(folders: Sequence[str]) -> list[Line]:
    """Make a line of each method of several settings, its setting in the label."""
    each = [(setting, lines_of(runs_of(folder))) for setting, folder in WHERE if folder in folders]
    return [v._replace(label=f"{v.label}; {setting}") for setting, lines in each for v in lines]


def lfw() -> str:
    """Make the table of LFW."""
    return compared(lines_by_setting(["lfw-others", "lfw"]))


def certificates() -> str:
    """Make the table of the certificate, without the last setting."""
    table = certificate(lines_by_setting(["photographs-12", "photographs-1", "lfw-others"]))
    return f"{RULE}\n\n{table}"


def generators() -> str:
    """Make the table of G: of rendered faces (results/generators.csv), then of LFW."""
    with open(HERE / "generators.csv", newline="", encoding="utf-8") as file:
        header, *body = csv.reader(file)
    shares = ("y_nearer_to_x_than_t", "u_nearer_to_x_than_to_t", "u_nearer_to_t_than_x_is")
    for label, size, steps, folder in (
        ("of half of LFW", "785 x 4.3", "4,160", "lfw-others/seed-0"),
        ("of all of LFW", "1,570 x 4.3", "4,200", "lfw/seed-0"),
    ):
        made = trainings(HERE / folder)["generator"]["result"]
        judged = run.read_json(HERE / folder / "generator/identity-facenet128-embed.json")
        row = [label, size, steps, f"{made['psnr_reconstruction']:.1f}", "-"]
        row += [f"{made[k]:.2f}" for k in ("person_from_content", "person_from_class")]
        body.append([*row, *(f"{judged[k]:.0%}".replace("%", " %") for k in shares)])
    return markdown(header, body)


def models() -> str:
    """Make README.md's table of a public descriptor, attacked by --model."""
    attacks, method = ("clean", "eyeglasses", "square", "certified"), "facenet128-embed"
    each = [cell(measure(runs_of("facenet128"), method, a), False) for a in attacks]
    return markdown(["LFW, AU-ROC", *attacks], [[LABELS[method], *each]])


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": overview, "models": models},
    "results/README.md": {
        "where": where,
        "paper": paper,
        "one_photograph": one_photograph,
        "lfw": lfw,
        "certificates": certificates,
        "generators": generators,
    },
}


def fill(text: str, name: str, content: str) -> str:
    """Put the content between the two lines that name the block."""
    start, end = f"<!-- {name}: python -m results.tables -->\n", f"<!-- end of {name} -->"
    head, rest = text.split(start, 1)
    return f"{head}{start}{content}\n{end}{rest.split(end, 1)[1]}"


# Packing


def pack(folder: Path, out: Path) -> None:
    """Write a run's rows, settings, logs and reports into four files that metrics.py reads.

    Of photographs the persons become numbers, and no machine's path stays. Raises run.UsageError,
    also where the copy would read otherwise.
    """
    before, number = metrics.read_run(folder), {}
    tables = [(m, a, v) for m, attacks in before.methods.items() for a, v in attacks.items()]
    if before.people.get("data") != "synthetic":
        everyone = {name for part in PARTS for name in before.people.get(part, ())}
        everyone |= {name for *_, v in tables for r in v.rows for name in (r.target, r.person)}
        number = {name: f"person-{k:04}" for k, name in enumerate(sorted(everyone))}
    rows, sidecars = [], {}
    for method, name, attack in tables:
        with open(
            folder / method / "attacks" / f"{name}.csv", newline="", encoding="utf-8"
        ) as file:
            for row in csv.DictReader(file):
                renamed = {k: number.get(row[k], row[k]) for k in ("target", "person")}
                rows.append({**row, **renamed, "attack": f"{method}/{name}"})
        # the sums stay, not each target's; of paths the file's name
        sidecar = {k: v for k, v in attack.sidecar.items() if k != "targets"}
        sidecar |= {k: Path(sidecar[k]).name for k in ("model", "judge") if k in sidecar}
        sidecar["config"] = {k: v for k, v in sidecar.get("config", {}).items() if k != "root"}
        sidecars[f"{method}/{name}"] = sidecar
    # gzip looks 32 KB back: rows of one pair stand together
    rows.sort(key=lambda row: (row["target"], row["candidate"], row["attack"]))
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*dict.fromkeys(k for row in rows for k in row)], restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    run.write(out / "attacks.csv.gz", gzip.compress(text.getvalue().encode(), mtime=0))
    short = functools.partial(json.dumps, separators=(",", ":"))
    run.write(out / "attacks.json", short(sidecars) + "\n")
    whole = short(trainings(folder))  # six digits of what was logged
    made = json.loads(whole, parse_float=lambda text: float(f"{float(text):.6g}"))
    lines = ",\n".join(f"{short(m)}:{short(made[m])}" for m in sorted(made))
    run.write(out / "trainings.json", f"{{\n{lines}\n}}\n")
    if before.people:
        about = {k: before.people[k] for k in ("data", "images", "seed", "sha256")}
        run.write(out / "people.json", about)
    distances = [] if number else folder.glob("*/figure3.csv")  # Fig. 3 is of rendered faces
    for path in [*distances, *folder.glob("generator/identity-*.json")]:
        copy = out / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if metrics.summary([metrics.read_run(out)]) != metrics.summary([before]):
        raise run.UsageError(f"{out}: reads otherwise than {folder}; give an empty folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    match [*(argv or ())]:
        case []:
            for file, blocks in BLOCKS.items():
                path = HERE.parent / file
                text = path.read_text(encoding="utf-8")
                for name, make in blocks.items():
                    text = fill(text, name, make())
                run.write(path, text)
        case ["pack", folder, out]:
            pack(Path(folder), Path(out))
        case ["report", rows, out, *folders]:
            text = report([metrics.read_run(folder, rows) for folder in folders])
            run.write(Path(out) / "tables.md", text)
            print(f"wrote {out}/tables.md")
        case _:
            raise run.UsageError("give nothing, or: pack RUN OUT, or: report attacks OUT RUN ...")
    return 0


if __name__ == "__main__":
    raise SystemExit(run.command("results.tables", main, sys.argv[1:]))
