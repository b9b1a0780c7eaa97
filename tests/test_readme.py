"""The READMEs say what is there: generated blocks, names of functions and files, claims."""

import ast
import itertools
import re
from pathlib import Path

import pytest

import metrics
from data import run
from results import tables

ROOT = Path(__file__).resolve().parents[1]
NAMES = [(file, name) for file, blocks in tables.BLOCKS.items() for name in blocks]


@pytest.mark.parametrize("file, name", NAMES, ids=[name for _, name in NAMES])
def test_the_tables_are_made_from_the_rows(file, name):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert tables.fill(text, name, tables.BLOCKS[file][name]()) == text


def test_every_generated_block_is_known_and_fill_replaces_it_alone():
    for file, blocks in tables.BLOCKS.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.findall(r"<!-- (.*?): python -m results.tables -->", text) == [*blocks]
    text = "a\n<!-- t: python -m results.tables -->\nold\n<!-- end of t -->\nb\n"
    assert tables.fill(text, "t", "new") == text.replace("old", "new")


def test_every_difference_that_the_text_gives_stands_in_a_table():
    figure = r"[+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]"
    block = r"(?s)<!-- .*?: python -m .*?<!-- end of .*? -->"
    both = "".join((ROOT / file).read_text(encoding="utf-8") for file in tables.BLOCKS)
    said = re.findall(figure, re.sub(block, "", both))
    assert len(said) > 5
    assert {*said} <= {*re.findall(figure, "".join(re.findall(block, both)))}


def test_every_function_beside_the_paper_exists():
    """README.md: "| paper section | `file.py` `function`, `function`; `file.py` `function` |"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## The paper and the code")[1].split("\n## ")[0]
    lines = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    named = []
    for cells in lines[1:]:  # the first is the header
        file = None
        for name in re.findall(r"`([\w./]+)`", cells[2]):
            file, function = (name, None) if name.endswith(".py") else (file, name)
            named += [(file, function)] if function else []
        assert file, cells
    assert len(named) > 15
    for file, function in named:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        defined = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert function in defined, f"{file} has no {function}"


def test_what_the_readmes_name_is_there():
    paths = []
    for file in tables.BLOCKS:
        text = (ROOT / file).read_text(encoding="utf-8")
        named = re.findall(r"`((?:results|tests|data|kernels)/[^`*<> ]*)`", text)
        linked = re.findall(r"\]\(([^):#]+)\)", text)
        paths += [ROOT / name for name in named] + [(ROOT / file).parent / name for name in linked]
    assert len(paths) > 10
    assert not [path for path in paths if not path.exists()]


def attacks_of(folder):
    """Every attack's name and table in the runs of a folder of results/."""
    runs = tables.runs_of(folder)
    return [(a, v) for one in runs for m in one.methods.values() for a, v in m.items()]


def test_rows_that_are_compared_come_from_one_setting():
    """Of each folder of seeds: the same steps and effort for every method.

    Where the demo's inner attack makes a training on LFW fail, it takes the paper's.
    """
    paper = {"lfw-others": ("doa-10",), "lfw": ("doa-10", "mixed", "transfer")}
    for _, folder in tables.WHERE:
        made = [
            (method, tables.settings_of(t[method]))
            for one in tables.runs_of(folder)
            for t in [tables.trainings(one.folder)]
            for method in one.methods
        ]
        for key in ("steps", "batch", "images", "lr", "preset"):
            assert len({settings[key] for _, settings in made}) == 1, (folder, key)
        for method, settings in made:
            inner = settings["attack_steps"], settings["attack_alpha"]
            expected = (10, 16) if method in paper.get(folder, ()) else (2, 64)
            assert inner == expected, (folder, method)
        attacks = attacks_of(folder)
        efforts = {(a, v.sidecar["iterations"]) for a, v in attacks if "iterations" in v.sidecar}
        assert len(efforts) == len({a for a, _ in efforts}), (folder, efforts)


def test_all_rows_are_of_one_commit_and_torch():
    """LFW's and the public descriptor's, too; and what that network says of y and u."""
    folders = [folder for _, folder in tables.WHERE] + ["facenet128"]
    sidecars = [v.sidecar for folder in folders for _, v in attacks_of(folder)]
    paths = [*(ROOT / "results").rglob("identity-*.json")]
    assert len(sidecars) > 100 and len(paths) == 3
    made = [*sidecars, *map(run.read_json, paths)]
    assert len({(m["commit"], m["torch"].partition("+")[0]) for m in made}) == 1


def test_all_rows_of_rendered_faces_are_of_one_generator():
    folders = ("photographs-1", "photographs-12")
    runs = [one for folder in folders for one in tables.runs_of(folder)]
    made_of = [
        t["result"]["made_of"] for one in runs for t in tables.trainings(one.folder).values()
    ]
    generators = {made.get("generator") for made in made_of} - {"", None}  # weak AT and DOA: none
    assert generators == {run.digest(ROOT / "data/demo/generator.pt")}


def test_the_evidence_is_small():
    files = [
        p for p in (ROOT / "results").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    assert len(files) <= 120 and sum(p.stat().st_size for p in files) <= 4e6


@pytest.mark.parametrize(
    "folder, seeds, every, others",
    [
        ("photographs-1", 3, "ours transfer mixed", "weak-at doa-10"),
        ("lfw-others", 3, "ours", "weak-at doa-10"),
        ("lfw-others", 3, "mixed", "weak-at"),
        ("lfw-others", 2, "transfer", "weak-at doa-10"),
    ],
)
def test_with_one_photograph_of_each_generated_companions_win_in_the_rows(
    folder, seeds, every, others
):
    attacks = ["clean", *tables.PATCHES, "worst", "evasion"]
    for ours, other in itertools.product(every.split(), others.split()):
        runs = [one for one in tables.runs_of(folder) if {ours, other} <= {*one.methods}]
        assert len(runs) == seeds
        certified = ["certified"] if (folder, other) == ("photographs-1", "weak-at") else []
        for attack in [*attacks, *certified]:
            mean, low, high = metrics.difference(runs, ours, other, attack)
            assert 0 < low < mean < high, (ours, other, attack)


def test_with_twelve_photographs_mixed_is_more_robust_in_the_rows():
    runs = tables.runs_of("photographs-12")
    for other, attack in itertools.product(
        ("weak-at", "doa-10"), ("eyeglasses", "square", "worst", "evasion")
    ):
        _, low, _ = metrics.difference(runs, "mixed", other, attack)
        assert low > 0, (other, attack)


def test_the_figure_by_photographs_shows_the_measures():
    pytest.importorskip("matplotlib")
    from results import figures

    (axis,) = figures.figure_photographs(("clean",)).axes
    shown = {bar.get_label(): bar.lines[0].get_ydata().tolist() for bar in axis.containers}
    at = tables.photographs()
    for method in ("transfer", "weak-at"):
        areas = [metrics.measure(at[k], method, "clean")["auroc"] for k in sorted(at)]
        assert shown[tables.LABELS[method]] == pytest.approx(areas)
    titles = {axis.get_title() for axis in figures.figure_2(at[1][0]).axes} - {""}
    assert titles == {"Ours", "Transfer", "Mixed", "Weak AT", "DOA, C = 10"}
