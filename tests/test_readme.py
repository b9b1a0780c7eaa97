"""The generated blocks of the READMEs are what results/ makes of the committed rows."""

import re
from pathlib import Path

import pytest

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
    demo, strong = tables.runs_of("demo/strength/demo", "demo/strength/paper")
    for method, attacks in strong.methods.items():
        met = {r.target for r in attacks["eyeglasses"].rows}
        for name, role in (("eyeglasses", "intruder"), ("clean", "genuine"), ("clean", "intruder")):
            one, two = (pairs(pick(a.methods[method], name, role)) for a in (demo, strong))
            assert {pair for pair in one if pair[0] in met} == set(two) and two, (method, name)


def test_longer_trainings_are_four_times_the_demos():
    steps = re.findall(r"\| ([^|]*), (\S+) steps \|", tables.longer())
    assert [(label, "300") for label, _ in steps[::2]] == steps[::2] and len(steps) == 10
    assert [(label, "1200") for label, _ in steps[::2]] == steps[1::2]


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
