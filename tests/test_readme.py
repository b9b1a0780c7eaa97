"""The README's table is what metrics.py makes of the committed rows; `python -m tests.test_readme` writes it anew."""

import json
from pathlib import Path

import metrics

ROOT = Path(__file__).resolve().parents[1]
LABELS = {"ours": "ours", "ours-transfer": "ours, `--positive transfer`", "no-at": "ours without inner attack (`no-at`)"}


def table() -> str:
    """Means over the runs under results/demo as a Markdown table."""
    runs = sorted(p for p in (ROOT / "results/demo").iterdir() if p.is_dir())
    found = metrics.summary([metrics.read_run(run) for run in runs])
    lines = ["| method | attack | AU-ROC | 95 % interval | AU-PR | over seeds | targets / genuine / intruders |", "|---|---|---|---|---|---|---|"]
    for method, attacks in found.items():
        for name, m in attacks.items():
            if name in metrics.ATTACKS:
                low, high = m["range"]["auroc"] if "range" in m else (m["auroc"], m["auroc"])
                lines.append(
                    f"| {LABELS.get(method, method)} | {name} | {m['auroc']:.3f} | {m['interval'][0]:.3f}-{m['interval'][1]:.3f} | {m['aupr']:.3f} "
                    f"| {low:.3f}-{high:.3f} | {m['n_targets']} / {m['n_genuine']} / {m['n_intruders']} |"
                )
    times = []
    for method in found:
        results = [json.loads(p.read_text()) for run in runs if (p := run / method / "result.json").exists()]
        seconds = sorted(r["seconds"] for r in results)
        times.append(f"{method} {seconds[0]:.0f}-{seconds[-1]:.0f} s ({len(results)} runs)")
    first = results[0]
    lines += ["", f"Training time: {'; '.join(times)}; {first['config']['steps']} steps; {first['device']}, torch {first['torch']}."]
    return "\n".join(lines)


def split(text: str) -> tuple[str, str, str]:
    before, rest = text.split("<!-- table: python -m tests.test_readme -->\n", 1)
    inside, after = rest.split("\n<!-- end of table -->", 1)
    return before, inside, after


def test_the_table_is_made_from_the_rows():
    assert split((ROOT / "README.md").read_text())[1] == table()


if __name__ == "__main__":
    before, _, after = split((ROOT / "README.md").read_text())
    (ROOT / "README.md").write_text(f"{before}<!-- table: python -m tests.test_readme -->\n{table()}\n<!-- end of table -->{after}")
