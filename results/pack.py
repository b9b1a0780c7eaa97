"""A run's evidence, to be committed: the rows of all methods in one file, their logs and results.

    python -m results.pack runs/synthetic-demo-0 results/demo/seed-0

Out: attacks.csv.xz and attacks.json, which metrics.py reads as it does single files, and
trainings.json with each training's log and result; methods that stand there stay. Of photographs
the persons become numbers, and no machine's path stays.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import metrics
from data import PARTS, run

from .tables import trainings

FILES = ("attacks/figure3.csv", "soundness.jsonl")


def packed(folder: Path, method: str, number: dict[str, str]) -> tuple[list[dict], dict]:
    """The rows of a method's <attack>.csv in a folder, and what stands beside each, both by
    <method>/<attack>. number: what persons are called instead."""
    rows: list[dict] = []
    beside = {}
    for path in sorted(folder.glob("*.csv")):
        if path.stem != "figure3":
            key = f"{method}/{path.stem}"
            with open(path, newline="", encoding="utf-8") as file:
                rows += [{**row, "attack": key} for row in csv.DictReader(file)]
            beside[key] = metrics.optional_json(path.with_suffix(".json"))
            beside[key].get("config", {}).pop("root", None)
            if "model" in beside[key]:
                beside[key]["model"] = Path(beside[key]["model"]).name
    for row in rows:
        row |= {k: number.get(row[k], row[k]) for k in ("target", "person")}
    return rows, beside


def written(rows: list[dict]) -> bytes:
    """As a compressed table, the same bytes for the same rows."""
    text = io.StringIO()
    fields = dict.fromkeys(k for row in rows for k in row)
    writer = csv.DictWriter(text, [*fields], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lzma.compress(text.getvalue().encode(), preset=9)


def pack(folder: Path, out: Path) -> None:
    """Copies a run's evidence. Raises run.UsageError, also where the copy would read otherwise."""
    before, number, about = metrics.read_run(folder), {}, {}
    every = [r for v in before.methods.values() for a in v.values() for r in a.rows]
    if before.people.get("data") != "synthetic":
        held = {name for part in PARTS for name in before.people.get(part, ())}
        names = {name for r in every for name in (r.target, r.person)}
        number = {name: f"person-{k:04}" for k, name in enumerate(sorted(names | held))}
        if names <= held:  # then runs of one manifest number alike
            about = {key: before.people[key] for key in ("data", "images", "seed", "sha256")}
    table, beside = out / "attacks.csv.xz", metrics.optional_json(out / "attacks.json")
    stay = {k: v for k, v in beside.items() if k.partition("/")[0] not in before.methods}
    if number and stay and (not about or about != metrics.optional_json(out / "people.json")):
        told = f"its {', '.join(stay)} may number other persons: give an empty folder"
        raise run.UsageError(f"{out}: {told}")
    rows: list[dict] = []
    if stay:
        with metrics.opened(table) as file:
            rows += [row for row in csv.DictReader(file) if row["attack"] in stay]
    for method in before.methods:
        more, told_of = packed(folder / method / "attacks", method, number)
        rows += more
        stay |= told_of
    run.write(table, written(rows))
    if about:
        run.write(out / "people.json", about)
    # without indentation: a tenth of what is committed
    run.write(out / "attacks.json", json.dumps(stay) + "\n")
    made = trainings(out) | trainings(folder)
    lines = ",\n".join(f"{json.dumps(m)}: {json.dumps(made[m])}" for m in sorted(made))
    run.write(out / "trainings.json", f"{{\n{lines}\n}}\n")
    asked = [f"generator/{path.name}" for path in folder.glob("generator/oracle-*.json")]
    people = [] if number else ["people.json"]
    for name in (*(f"{m}/{f}" for m in before.methods for f in FILES), *people, *asked):
        if (folder / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    copied = metrics.read_run(out)
    own = {m: copied.methods[m] for m in before.methods}
    if metrics.summary(metrics.Run(out, own, copied.people)) != metrics.summary(before):
        raise run.UsageError(f"{out}: reads otherwise than {folder}")


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        raise run.UsageError("give the folder of a run, and where its evidence goes")
    pack(*map(Path, argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(run.command("results.pack", main, sys.argv[1:]))
