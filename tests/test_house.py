"""The house: above `# main` a script is the paper alone, and nothing stands in two files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("generator.py", "embed.py", "attacks.py", "metrics.py")  # in the order of the paper
QUIET = set("__future__ collections contextlib dataclasses functools itertools math".split())
QUIET |= {"typing", "pathlib", "torch", "numpy", "kernels"}
# not even in a function
LOUD = set("argparse csv json os sys signal subprocess time zipfile data results".split())
STAGES = ("generator", "embed", "attacks", "metrics")


def tree(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    marks = [n for n, line in enumerate(text.splitlines(), 1) if line == "# main"]
    return ast.parse(text), marks


def imported(node):
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_above_main_stands_the_paper_alone(name):
    found, (mark,) = tree(name)
    later = set(STAGES[STAGES.index(name[:-3]) + 1 :])
    for node in ast.walk(found):
        assert not imported(node) & later, f"{name}:{node.lineno} imports a later stage"
        if getattr(node, "lineno", mark) >= mark:
            continue
        assert not imported(node) & LOUD, f"{name}:{node.lineno} imports {imported(node)}"
        if imported(node) and node.col_offset == 0:
            assert imported(node) <= QUIET, f"{name}:{node.lineno} imports {imported(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "open", "input", "exit"), f"{name}:{node.lineno}"
        if isinstance(node, ast.FunctionDef):
            arguments = len(node.args.args) + len(node.args.kwonlyargs)
            assert arguments <= 9, f"{name}:{node.lineno} {node.name} takes {arguments}"
            assert node.end_lineno - node.lineno <= 60, f"{name}:{node.lineno} {node.name}"


def test_no_body_stands_in_two_files():
    seen = {}
    folders = (ROOT, ROOT / "data", ROOT / "kernels", ROOT / "results")
    for path in (p for folder in folders for p in sorted(folder.glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 2:
                body = ast.dump(ast.Module(node.body[1:], []))
                assert seen.setdefault(body, path) == path, f"{path}:{node.lineno} {node.name}"
