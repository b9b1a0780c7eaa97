"""The generated blocks of the READMEs are what results/ makes of the committed rows."""

import itertools
import re
from pathlib import Path

import pytest

import metrics
from metrics import pairs, pick
from results import tables

ROOT = Path(__file__).resolve().parents[1]
NAMES = [(file, name) for file, blocks in tables.BLOCKS.items() for name in blocks]


@pytest.mark.parametrize("file, name", NAMES, ids=[name for _, name in NAMES])
def test_the_tables_are_made_from_the_rows(file, name):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert tables.fill(text, name, tables.BLOCKS[file][name]()) == text


def test_every_generated_block_is_known():
    for file, blocks in tables.BLOCKS.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.findall(r"<!-- (.*?): python -m results.tables -->", text) == [*blocks]


def test_fill_replaces_the_block_alone():
    text = "a\n<!-- t: python -m results.tables -->\nold\n<!-- end of t -->\nb\n"
    assert tables.fill(text, "t", "new") == text.replace("old", "new")


def test_both_strengths_met_the_same_pairs():
    demo, strong = tables.runs_of("demo/seed-0", "strength")
    for method, attacks in strong.methods.items():
        for name, role in (("eyeglasses", "intruder"), ("clean", "genuine"), ("clean", "intruder")):
            one, two = (pairs(pick(a, name, role)) for a in (demo.methods[method], attacks))
            assert {*two} <= {*one} and two, (method, name)


def test_rows_that_are_compared_come_from_one_commit_and_setting():
    """Of each folder of seeds: the same code, steps and effort for every method."""
    for folder in ("demo", "photographs-1", "long", "thousand", "lfw", "lfw-1", "lfw-others"):
        runs = tables.runs_of(*tables.seeds(folder))
        found = {
            a.sidecar["commit"] for one in runs for m in one.methods.values() for a in m.values()
        }
        assert len(found) == 1, (folder, found)
        trainings = [tables.trainings(one.folder) for one in runs]
        trained = [
            tables.settings_of(held[m]) for one, held in zip(runs, trainings) for m in one.methods
        ]
        for key in ("steps", "batch", "images", "attack_steps", "attack_alpha", "lr", "preset"):
            assert len({made[key] for made in trained}) == 1, (folder, key)
        efforts = {
            (name, a.sidecar["iterations"])
            for one in runs
            for m in one.methods.values()
            for name, a in m.items()
            if "iterations" in a.sidecar
        }
        assert len(efforts) == len({name for name, _ in efforts}), (folder, efforts)


def test_the_evidence_is_small():
    files = [
        p for p in (ROOT / "results").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    assert len(files) <= 250 and sum(p.stat().st_size for p in files) <= 6e6


def test_the_papers_figures_stand_under_their_own_attack_alone():
    """It has no certificate; ours, weak AT, DOA and no AT of Tables 1 and 2 under the others."""
    lines = [line.split(" | ") for line in tables.overview().splitlines() if line.startswith("| ")]
    head, told = lines[0], {row[0][2:]: row[1:] for row in lines[2:]}
    assert head[3].startswith("certified")
    assert not any("(" in cell for row in told.values() for cell in row[2:])
    for method, figures in (("Ours", "0.978 0.868"), ("Without AT", "0.977 0.590")):
        assert [cell.split("(")[1][:5] for cell in told[method][:2]] == figures.split()


def test_a_column_of_the_overview_rests_on_the_same_runs_for_every_method():
    runs, attacks = tables.runs_of(*tables.seeds("demo")), ("clean", "certified")
    both = {"weak-at", "ours-transfer"}
    assert len(tables.complete(runs, both, attacks)) == len(runs) == 3
    (one,) = tables.complete(runs, {"ours", *both}, attacks)  # of ours one seed met the rule
    assert one.folder.name == "seed-0"
    told = tables.overview()
    assert "not CelebA: seed 0, the same pairs" in told and "the mean of 3 seeds" in told
    assert "not run" not in told


def test_every_floor_is_one_of_a_row():
    text = tables.speed()
    assert all(f"`{op}`" in text for op in tables.FLOORS)
    found = re.findall(r"\| (\d+\.\d+)(?:, missed)? \| \d+ \| \w+ \|$", text, re.MULTILINE)
    asked = {v for floors in tables.FLOORS.values() for v in floors.values()}
    assert {float(v) for v in found} == asked


def test_what_the_readmes_name_is_there():
    paths = []
    for file in tables.BLOCKS:
        text = (ROOT / file).read_text(encoding="utf-8")
        named = re.findall(r"`((?:results|tests|data|kernels)/[^`*<> ]*)`", text)
        linked = re.findall(r"\]\(([^):#]+)\)", text)
        paths += [ROOT / name for name in named] + [(ROOT / file).parent / name for name in linked]
    assert len(paths) > 10
    assert not [path for path in paths if not path.exists()]


@pytest.mark.parametrize(
    "folder, every, others, more",
    [
        ("photographs-1", "ours ours-transfer ours-mixed-all", "weak-at doa-10", "certified"),
        ("lfw-others", "ours", "weak-at", ""),
    ],
)
def test_with_one_photograph_of_each_generated_companions_win_in_the_rows(
    folder, every, others, more
):
    runs = tables.runs_of(*tables.seeds(folder))
    assert len(runs) == 3
    attacks = ["clean", *tables.PATCHES, "worst", "evasion", *more.split()]
    for ours, other, attack in itertools.product(every.split(), others.split(), attacks):
        mean, low, high = metrics.difference(runs, ours, other, attack)
        assert 0 < low < mean < high, (ours, other, attack)


def test_the_figure_by_photographs_shows_the_measures():
    pytest.importorskip("matplotlib")
    from results import figures

    (axis,) = figures.figure_photographs(("clean",)).axes
    shown = {bar.get_label(): bar.lines[0].get_ydata().tolist() for bar in axis.containers}
    at = tables.photographs()
    for method in ("ours-transfer", "weak-at"):
        found = [metrics.measure(at[k], method, "clean")["auroc"] for k in sorted(at)]
        assert shown[tables.LABELS[method]] == pytest.approx(found)


def test_figure_2_shows_every_method_of_the_run():
    pytest.importorskip("matplotlib")
    from results import figures

    drawn = figures.figure_2(tables.photographs()[1][0])
    told = {axis.get_title() for axis in drawn.axes} - {""}
    mixed = "Ours, mixed, all attacked"
    assert told == {"Ours", "Ours, transfer", mixed, "Weak AT", "DOA, C = 10"}
