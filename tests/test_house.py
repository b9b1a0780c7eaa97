"""The house: above `# main` a script is the paper alone, imports follow the paper's order without a
circle, and nothing stands in two files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("generator", "embed", "attacks", "verify", "metrics")  # in the order of the paper
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("", "data", "kernels", "results")
    for path in sorted((ROOT / folder).glob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
# disk, screen, environment, process and clock: modules, functions, methods of a path
LOUD = set("argparse csv data io json os run shutil signal subprocess sys tempfile time".split())
CALLS = {"print", "open", "input", "exit", "tqdm"}
METHODS = set("exists is_file is_dir glob rglob mkdir unlink read_text read_bytes".split())
METHODS |= {"write_text", "write_bytes", "savez", "savez_compressed"}


def imported(name: str) -> set[str]:
    """The project's modules that a module imports anywhere, function-local imports too."""
    base = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, (base * bool(node.level), node.module)))
            for alias in node.names:  # a module of a package, or what a module defines
                names.add(inner if (inner := f"{module}.{alias.name}") in FILES else module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names & set(FILES)


def reached(name: str) -> set[str]:
    """The modules that an import of this one may import in turn."""
    seen, todo = set(), [name]
    while todo:
        new = imported(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_order_and_make_no_circle(name):
    others = reached(name)
    assert name not in others
    if name in STAGES:
        assert not others & {*STAGES[STAGES.index(name) :]}
    elif not name.startswith("results"):
        assert not others & {*STAGES}


def test_an_import_within_a_function_counts():
    assert "data.synthetic" in imported("data") and "data.run" in reached("embed")
    assert imported("data.model") == {"data.run"} and "generator" in imported("embed")


@pytest.mark.parametrize("name", STAGES)
def test_above_main_stands_the_paper_alone(name):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    (mark,) = (n for n, line in enumerate(lines, 1) if line == "# main")
    for part in TREES[name].body:
        imports = isinstance(part, (ast.Import, ast.ImportFrom, ast.Try))
        if part.lineno > mark or (imports and not isinstance(part, ast.Try)):
            continue
        if isinstance(part, ast.If) and "__main__" in ast.unparse(part.test):  # not when imported
            continue
        for node in ast.walk(part):
            where = f"{name}.py:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not imports:
                module = (getattr(node, "module", None) or node.names[0].name).split(".")[0]
                assert module not in LOUD | {*FILES}, where
            if isinstance(node, ast.Name):
                assert node.id not in LOUD | CALLS or isinstance(node.ctx, ast.Store), where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in METHODS, where


def test_no_body_stands_in_two_files():
    """But for the short forms of what a script copied alone cannot import."""
    seen = {}
    for name, tree in TREES.items():
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        alone = {node for handler in handlers for node in ast.walk(handler)}
        for node in {*ast.walk(tree)} - alone:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 2:
                body = ast.dump(ast.Module(node.body[1:], []))
                assert seen.setdefault(body, name) == name, f"{name}:{node.lineno} {node.name}"


def test_lines_and_names():
    odd = []
    for path in [*FILES.values(), *sorted((ROOT / "tests").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines() or [""])) <= 100, path
        if path.parent.name != "tests":
            odd += re.findall(r"\b(?:found|told|held|given|asked|drawn)\b", text)
    assert len(odd) <= 30  # verbs that say what happened to a value, not what it is
