"""The README's table is what metrics.py makes of the committed rows; `python -m tests.test_readme` writes it anew."""

import csv
import json
import re
from pathlib import Path

import pytest

import metrics

ROOT = Path(__file__).resolve().parents[1]
LABELS = {"ours-transfer": "ours, `--positive transfer`", "no-at": "ours without inner attack (`no-at`)", "weak-at": "weak AT"}
LABELS |= {"doa-4": "DOA, C = 4", "doa-10": "DOA, C = 10"}


def table() -> str:
    """Means over the runs under results/demo as a Markdown table."""
    runs = sorted((ROOT / "results/demo").glob("seed-*"))
    found = metrics.summary([metrics.read_run(run) for run in runs])
    names = ("clean", "eyeglasses", "square", "eye_patch")
    lines = ["| method | clean | clean, the attacked pairs | eyeglasses | square | eye patch | seeds | targets / genuine / intruders, under eyeglasses |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for method, attacks in found.items():
        cells, counts = [], set()
        for name in names:
            m = attacks[name]
            low, high = m["range"]["auroc"] if "range" in m else (m["auroc"], m["auroc"])
            cells.append(f"**{m['auroc']:.3f}** [{m['interval'][0]:.3f}, {m['interval'][1]:.3f}]<br>{low:.3f} to {high:.3f} / {m['aupr']:.3f}")
            counts.add(sum((run / method / "attacks" / f"{name}.csv").exists() for run in runs))
        assert len(counts) == 1, (method, counts)
        m = attacks["eyeglasses"]
        cells.insert(1, f"**{m['clean_same_pairs']:.3f}**")
        lines.append(f"| {LABELS.get(method, method)} | {' | '.join(cells)} | {counts.pop()} | {m['n_targets']} / {m['n_genuine']} / {m['n_intruders']} |")
    times = []
    for method in found:
        results = [json.loads(p.read_text()) for run in runs if (p := run / method / "result.json").exists()]
        seconds = sorted(r["seconds"] for r in results)
        times.append(f"{method} {seconds[0]:.0f}-{seconds[-1]:.0f} s ({len(results)} runs)")
    first = results[0]
    lines += ["", f"Training time: {'; '.join(times)}; {first['config']['steps']} steps; {first['device']}, torch {first['torch']}."]
    return "\n".join(lines)


def generator_table() -> str:
    """The disentanglement report of the demo's generator, results/demo/generator.json."""
    r = json.loads((ROOT / "results/demo/generator.json").read_text())
    gap = r["psnr_reconstruction"] - r["psnr_true_u"]
    rows = [
        ("PSNR of the reconstruction y", f"{r['psnr_reconstruction']:.1f} dB", "at least 22 dB"),
        ("PSNR of u against the true rendering", f"{r['psnr_true_u']:.1f} dB, {gap:.1f} dB below y", "within 1.5 dB of y"),
        (f"person read from the content code (chance {r['chance']:.3f})", f"{r['person_from_content']:.3f}", "near chance"),
        ("person read from the class code", f"{r['person_from_class']:.3f}", "high"),
        *(
            (f"R^2 of {'the content factors, ' if name == 'mean of all' else ''}{name.replace('_', ' ')}, from class and content code",
             f"{value:.2f}, {r['content_factors_from_content'][name]:.2f}", "0, high")
            for name, value in r["content_factors_from_class"].items()
        ),
    ]
    head = f"| {r['images']} images of {r['persons']} persons never seen | found | wanted |"
    return "\n".join([head, "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def paper_tables() -> str:
    """Every table of the paper over the three seeds, its headings one level lower."""
    text = metrics.report([metrics.read_run(run) for run in sorted((ROOT / "results/demo").glob("seed-*"))])
    return "#" + text[text.index("## Health checks") :].replace("\n## ", "\n### ").rstrip()


def strength_table() -> str:
    """Eyeglasses by the demo's attack and by the paper's, on the same intruders of the same targets, results/demo/strength."""
    lines = ["| seed 0 | targets / intruders | clean | demo, 80 x 1 | paper, 1000 x 5 | loses |", "|---|---|---|---|---|---|"]
    demo, paper = (metrics.read_run(ROOT / "results/demo/strength" / name).methods for name in ("demo", "paper"))
    for method in paper:
        targets = {r.target for r in paper[method]["eyeglasses"].rows}
        kept = [[r for r in rows if r.target in targets] for a in (demo, paper) for rows in metrics.sides(a[method], "eyeglasses", 1, 1)]
        genuine, found, same, strong = kept
        assert [r[4:9] for r in found] == [r[4:9] for r in strong] and [r[4:9] for r in genuine] == [r[4:9] for r in same]
        clean = [r for r in metrics.sides(demo[method], "clean", 1, 1)[1] if r.target in targets]
        a, b, c = (metrics.auroc([r.distance for r in genuine], [r.distance for r in rows]) for rows in (clean, found, strong))
        lines.append(f"| {LABELS.get(method, method)} | {len(targets)} / {len(strong)} | {a:.3f} | {b:.3f} | {c:.3f} | {b - c:.3f} |")
    return "\n".join(lines)


def variants_table() -> str:
    """What else was trained: on windows or whole images, with G or with true renderings, in smaller batches."""
    demo = ROOT / "results/demo"
    every = [f"seed-{k}" for k in range(3)]
    several = [
        ("ours, inner attack on whole images (as above)", every, "ours"),
        ("ours, inner attack on windows (the default now)", [f"local/{seed}" for seed in every], "ours"),
        ("ours, y and u by G", every[:1], "ours"),
        ("ours, y and u rendered from the true factors", ["truth"], "ours-truth"),
        ("transfer, y and u by G", every[:1], "ours-transfer"),
        ("transfer, y and u rendered from the true factors", ["truth"], "ours-transfer-truth"),
        ("ours, windows, 300 steps of 32 (as above)", ["local/seed-0"], "ours"),
        ("ours, windows, 600 steps of 16", ["batch/16"], "ours"),
        ("ours, windows, 1200 steps of 8", ["batch/8"], "ours"),
    ]
    lines = ["| F | clean | eyeglasses | seeds |", "|---|---|---|---|"]
    for label, folders, method in several:
        found = metrics.summary([metrics.read_run(demo / folder) for folder in folders])[method]
        cells = [f"{m['auroc']:.3f} [{m['interval'][0]:.3f}, {m['interval'][1]:.3f}]" for m in (found["clean"], found["eyeglasses"])]
        lines.append(f"| {label} | {' | '.join(cells)} | {'0, 1, 2' if len(folders) == 3 else '0'} |")
    return "\n".join(lines)


FLOORS = {("pgd", "loop as in ART"): 2.0, ("pgd", "loop as in torchattacks"): 1.25, ("step", "anchors cached"): 1.5}
FLOORS |= {("step", "as in the released code"): 3.0, ("doa", "NumPy loop"): 8.0, ("gaussian_cutout", "NumPy loop, noise inside"): 3.0}
FLOORS |= {("step", "as in the released code, G too"): 3.0}
FLOORS |= {(op, "NumPy loop, masks as images"): floor for op, floor in (("doa", 8.0), ("gaussian_cutout", 3.0))}
FLOORS |= {("patch_local", "10x10"): 1.6, ("patch_local", "20x20"): 1.3}


def speed_table() -> str:
    """Of each op the rows that results/bench.csv got last on a CPU, beside the floors that were set."""
    with open(ROOT / "results/bench.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["device"] == "cpu"]
    newest = {r["op"]: (r["commit"], r["date"]) for r in rows}  # of each op the newest rows
    rows = [r for r in rows if (r["commit"], r["date"]) == newest[r["op"]]]
    lines = ["| ours | against | times as fast | floor | n | commit |", "|---|---|---|---|---|---|"]
    for r in rows:
        if r["variant"] != "op":
            floor = next((v for (op, word), v in FLOORS.items() if op == r["op"] and (word == r["variant"] or word in r["case"])), "")
            if r["op"] == "doa" and "search, 1 " not in r["case"] or "one step" in r["case"]:
                floor = ""
            missed = ", missed" if floor and float(r["ratio"]) < floor else ""
            lines.append(f"| `{r['op']}`, {r['case']} | {r['variant']} | {float(r['ratio']):.2f} | {floor}{missed} | {r['n']} | {r['commit']} |")
    assert all(any(r["op"] == op for r in rows) for op, _ in FLOORS)
    last = rows[-1]
    return "\n".join([*lines, "", f"Medians over n rounds, {last['threads']} thread, torch {last['torch']}."])


def longer_table() -> str:
    """Four times the steps beside the demo's, on the same targets and intruders, of each method the seeds that were trained so."""
    demo = ROOT / "results/demo"
    lines = ["| method | clean, 300 steps | 1200 steps | eyeglasses, 300 steps | 1200 steps | seeds |", "|---|---|---|---|---|---|"]
    for method in ("ours", "ours-transfer", "no-at", "weak-at", "doa-10"):
        seeds = [k for k in range(3) if (demo / f"long/seed-{k}/{method}/result.json").exists()]
        steps = {json.loads((demo / f"long/seed-{k}/{method}/result.json").read_text())["config"]["steps"] for k in seeds}
        if not seeds:
            continue
        assert steps == {1200}, (method, steps)
        few, many = (metrics.summary([metrics.read_run(folder / f"seed-{k}") for k in seeds])[method] for folder in (demo, demo / "long"))
        cells = [f"{m[a]['auroc']:.3f} [{m[a]['interval'][0]:.3f}, {m[a]['interval'][1]:.3f}]" for a in ("clean", "eyeglasses") for m in (few, many)]
        lines.append(f"| {LABELS.get(method, method)} | {' | '.join(cells)} | {', '.join(map(str, seeds))} |")
    return "\n".join(lines)


def lfw_table() -> str:
    """Real photographs: means over the runs under results/lfw as a Markdown table."""
    folders = sorted((ROOT / "results/lfw").glob("seed-*"))
    found = metrics.summary([metrics.read_run(run) for run in folders])
    lines = ["| method, LFW | clean | clean, the attacked pairs | eyeglasses | seeds | targets / genuine / intruders, under eyeglasses |", "|---|---|---|---|---|---|"]
    for method, attacks in found.items():
        seeds = [run.name[5:] for run in folders if (run / method / "attacks/eyeglasses.csv").exists()]
        cells = []
        for m in (attacks["clean"], attacks["eyeglasses"]):
            low, high = m["range"]["auroc"] if "range" in m else (m["auroc"], m["auroc"])
            cells.append(f"**{m['auroc']:.3f}** [{m['interval'][0]:.3f}, {m['interval'][1]:.3f}]<br>{low:.3f} to {high:.3f} / {m['aupr']:.3f}")
        m = attacks["eyeglasses"]
        cells.insert(1, f"**{m['clean_same_pairs']:.3f}**")
        lines.append(f"| {LABELS.get(method, method)} | {' | '.join(cells)} | {', '.join(seeds)} | {m['n_targets']} / {m['n_genuine']} / {m['n_intruders']} |")
    log = [json.loads(line) for line in (ROOT / "results/lfw/generator.jsonl").read_text().splitlines()]
    g = json.loads((ROOT / "results/lfw/generator.json").read_text())
    stages = [sum(row["stage"] == k for row in log) for k in (1, 2)]
    told = f"Generator: {stages[0]} epochs of stage 1, {stages[1]} of stage 2, {sum(row['seconds'] for row in log) / 60:.0f} minutes; on {g['images']} images of {g['persons']} persons never seen "
    told += f"{g['psnr_reconstruction']:.1f} dB; person from the content code {g['person_from_content']:.2f}, from the class code {g['person_from_class']:.2f}, chance {g['chance']:.3f}."
    return "\n".join([*lines, "", told])


BLOCKS = {"table": table, "lfw": lfw_table, "variants": variants_table, "longer": longer_table, "speed": speed_table, "strength": strength_table, "generator": generator_table, "paper": paper_tables}


def split(text: str, name: str) -> tuple[str, str, str]:
    start, end = f"<!-- {name}: python -m tests.test_readme -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(start, 1)
    inside, after = rest.split(end, 1)
    return before + start, inside, end + after


@pytest.mark.parametrize("name", list(BLOCKS))
def test_the_tables_are_made_from_the_rows(name):
    assert split((ROOT / "README.md").read_text(), name)[1] == BLOCKS[name]() + "\n"


def test_what_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:results|tests|data|kernels)/[^`*<> ]*)`|\]\(([^):#]+)\)", text)
    assert len(named) > 10
    missing = [a or b for a, b in named if not (ROOT / (a or b)).exists()]
    assert not missing


if __name__ == "__main__":
    for name, make in BLOCKS.items():
        before, _, after = split((ROOT / "README.md").read_text(), name)
        (ROOT / "README.md").write_text(f"{before}{make()}\n{after}")
