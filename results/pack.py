"""A run's evidence, to be committed: of each method its rows in one file, its log, its result.

    python -m results.pack runs/synthetic-demo-0 results/demo/seed-0

Out: <method>/attacks.csv.gz and attacks.json, which metrics.py reads as it does single files. Of
photographs the persons become numbers, and no machine's path stays.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import metrics
from data import run

OF_RUN = ("people.json", "generator/log.jsonl", "generator/result.json")
FILES = ("log.jsonl", "result.json", "attacks/figure3.csv", "soundness.jsonl")


def packed(folder: Path, number: dict[str, str]) -> tuple[bytes, dict]:
    """The rows of <attack>.csv in a folder, compressed, the same bytes for the same rows; and what
    stands beside each, by the attack. number: what persons are called instead."""
    rows: list[dict] = []
    beside = {}
    for path in sorted(folder.glob("*.csv")):
        if path.stem != "figure3":
            with open(path, newline="", encoding="utf-8") as file:
                rows += csv.DictReader(file)
            beside[path.stem] = metrics.optional_json(path.with_suffix(".json"))
            beside[path.stem].get("config", {}).pop("root", None)
            if "model" in beside[path.stem]:
                beside[path.stem]["model"] = Path(beside[path.stem]["model"]).name
    for row in rows:
        row |= {k: number.get(row[k], row[k]) for k in ("target", "person")}
    text = io.StringIO()
    fields = dict.fromkeys(k for row in rows for k in row)
    writer = csv.DictWriter(text, [*fields], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return gzip.compress(text.getvalue().encode(), mtime=0), beside


def pack(folder: Path, out: Path) -> None:
    """Copies a run's evidence. Raises run.UsageError, also where the copy would read otherwise."""
    before, number = metrics.read_run(folder), {}
    every = [r for v in before.methods.values() for a in v.values() for r in a.rows]
    if before.people.get("data") != "synthetic":
        names = sorted({name for r in every for name in (r.target, r.person)})
        number = {name: f"person-{k:04}" for k, name in enumerate(names)}
    others = {path.parent.name for path in out.glob("*/attacks.json")} - {*before.methods}
    if number and others:
        told = f"its {', '.join(sorted(others))} may number other persons: give an empty folder"
        raise run.UsageError(f"{out}: {told}")
    for method in before.methods:
        text, beside = packed(folder / method / "attacks", number)
        run.write(out / method / "attacks.csv.gz", text)
        # without indentation: a tenth of what is committed
        run.write(out / method / "attacks.json", json.dumps(beside) + "\n")
    asked = [f"generator/{path.name}" for path in folder.glob("generator/oracle-*.json")]
    for name in (*(f"{m}/{f}" for m in before.methods for f in FILES), *OF_RUN, *asked):
        if (folder / name).exists() and not (number and name == "people.json"):
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
