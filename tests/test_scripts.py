"""Every script copied alone into another project imports and works; help says what a flag is; the
commands of results/reproduce.sh are understood."""

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import run

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("generator", "embed", "attacks", "verify", "metrics")
BLOCK = "import sys; sys.modules.update(dict.fromkeys(['triton', 'matplotlib', 'tqdm']))\n"
USE = {
    "generator": """
import torch
lord = m.Lord(m.Config(**{**m.PRESETS["demo"], "preset": "demo"}))
y, u = m.generate_pair(lord, torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
assert y.shape == u.shape == (1, 3, 64, 64)
""",
    "embed": """
import torch
rng = torch.Generator().manual_seed(0)
f, x = m.Embedding(1 / 32), torch.rand(2, 3, 64, 64)
boxes = m.draw_boxes(2, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), rng)
erased = m.gaussian_cutout(x, generator=rng, boxes=boxes)[0]
attacked = m.inner_attack(f, erased, f(x).detach(), torch.full((2,), 0.1), boxes, 2)
inside = m.box_mask(boxes, 64, 64).expand_as(x)
assert torch.equal(attacked[~inside], x[~inside]) and not torch.equal(attacked, erased)
""",
    "attacks": """
import torch
torch.manual_seed(0)
weight = torch.randn(3 * 64 * 64, 8) / 64
embed = m.Mirrored(lambda x: x.flatten(1) @ weight)
x, t = torch.rand(2, 2, 3, 64, 64)
mask, effort = m.eyeglasses_mask(), m.Effort(iterations=3, restarts=1)
anchor = t.flatten(1) @ weight
result = m.tanh_attack(embed, x, anchor, mask, effort, torch.Generator().manual_seed(0))
assert torch.equal(result.images[:, :, ~mask], x[:, :, ~mask])
assert (result.distance < m.distances(embed, x, anchor)).all()
""",
    "verify": """
import torch
torch.manual_seed(0)
weight = torch.randn(3 * 64, 8) / 8
embed = lambda x: x.flatten(1) @ weight
x, t = torch.rand(2, 1, 3, 8, 8)
boxes, holds = m.cover(8, 8, (2, 2), (4, 4))
result = m.certify(m.MaskedVerifier(embed, embed(t)[0], boxes), holds, x)
assert (result.bound <= result.score).all() and holds.any(1).all()
assert m.is_different(embed(x), embed(t)[0], 1e-3) and not m.is_different(embed(x), embed(x)[0], 1)
""",
    "metrics": "assert m.auroc(m.roc([1.0, 2.0], [3.0, 2.0])) == 0.875",
}
ALONE = """
sys.path[:] = [{folder!r}, *path]
import {name} as m
{use}
print("{name} works")
try:
    runpy.run_path(m.__file__, run_name="__main__")
except SystemExit as end:
    print(end)
del sys.modules["{name}"]
"""


def test_each_script_alone(tmp_path):
    """Beside a copy of it stands nothing: its methods work, its command is one line."""
    code, lines = BLOCK + "import runpy\npath = sys.path[1:]\n", ""
    for name, use in USE.items():
        folder = tmp_path / f"another project {name}"
        folder.mkdir()
        shutil.copy(ROOT / f"{name}.py", folder)
        code += ALONE.format(folder=str(folder), name=name, use=use)
        lines += f"{name} works\n{name}.py: the command needs the folder data/ beside it\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    # importing prints nothing
    assert (done.stdout, done.stderr, done.returncode) == (lines, "", 0)
    left = {path.name for path in tmp_path.glob("*/*")} - {"__pycache__"}
    assert left == {f"{name}.py" for name in USE}


def test_each_script_where_python_leaves_its_folder_out(tmp_path):
    """PYTHONSAFEPATH=1: data/ beside a script is there all the same."""
    code = "import runpy, sys\npath, known = [*sys.path], {*sys.modules}\n"
    code += f"assert {str(ROOT)!r} not in path\nfor name in {STAGES}:\n"
    code += "    sys.path[:], sys.argv = path, [name, '--help']\n"
    code += (
        "    for module in ('data', 'embed', 'generator', 'attacks', 'data.run', 'data.model'):\n"
    )
    code += "        sys.modules.pop(module, None)\n"
    code += "    try:\n"
    code += f"        runpy.run_path(f'{ROOT}/{{name}}.py', run_name='__main__')\n"
    code += "    except SystemExit as end:\n        print(name, 'ends with', end.code)\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    ends = [line for line in done.stdout.splitlines() if " ends with " in line]
    assert ends == [f"{name} ends with 0" for name in STAGES], done.stdout + done.stderr


@pytest.mark.parametrize("name", ["generator", "embed", "attacks", "verify"])
def test_help_says_what_each_setting_is(name, capsys):
    m = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        m.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    notes = run.read_notes(m.Config)
    assert end.value.code == 0 and {*notes} == {f.name for f in dataclasses.fields(m.Config)}
    start = shown.index("options:")
    for field, note in notes.items():
        assert len(note) > 4, field
        flag = re.search(f"--{field.replace('_', '-')}[ ,]", shown[start:]).start() + start
        value = repr(getattr(m.Config, field))
        assert 0 < shown.index(value, flag) - flag < 600, field
        text = note.replace("-", "").replace(" ", "")  # argparse breaks lines at hyphens too
        assert text in shown[flag : flag + 600].replace("-", "").replace(" ", ""), field


def test_the_command_without_triton_and_matplotlib_from_a_folder_with_spaces(tmp_path):
    """And on a console that has no letter for the name of the run."""
    folder = tmp_path / "a clone with spaces"
    folder.mkdir()
    for name in (*(f"{stage}.py" for stage in STAGES), "kernels", "data"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    flags = "--method weak-at --synthetic-persons 9 --synthetic-images 10 --steps 2 --batch 4"
    flags += " --validation-persons 2 --target-persons 3 --width 0.03125 --run Läufe"
    code = "import sys; sys.modules.update(triton=None, matplotlib=None); import embed; "
    command = [sys.executable, "-c", f"{code}sys.exit(embed.main({flags.split()}))"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrote L\\xe4ufe/weak-at/embedding.pt" in done.stdout
    assert (folder / "Läufe/weak-at/attacks/eyeglasses.csv").exists()


def test_every_command_of_reproduce_is_understood(tmp_path, monkeypatch):
    """results/reproduce.sh with a `python` that writes down its arguments: each command parses,
    and attacks and draws methods that one before it has trained."""
    attacks, embed, verify = map(importlib.import_module, ("attacks", "embed", "verify"))
    methods = importlib.import_module("metrics").METHODS
    folder = "runs/synthetic-demo-0"
    for name in ("results", "bin", folder):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "results/reproduce.sh", tmp_path / "results")
    (tmp_path / folder / "run.json").write_text('{"data": "synthetic", "preset": "demo"}')
    (tmp_path / folder / "generator.pt").touch()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "$*" >>commands\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "results/reproduce.sh", *methods, "figure5", "generator"], check=True)
    trained, attacked, certified, figures = [], [], [], []
    for script, *flags in map(str.split, Path("commands").read_text().splitlines()):
        if script == "embed.py":
            config, _ = embed.parse(flags)
            assert str(config.run) == folder
            trained.append(config.name)
        elif script == "generator.py":
            _, args = importlib.import_module("generator").parse(flags)
            assert args.run == Path("runs/generator")
        elif script == "attacks.py":
            attacked += attacks.parse(flags)[0].method
            assert attacked[-1] in trained
        elif script == "verify.py":
            certified += verify.parse(flags)[0].method
            assert certified[-1] in trained
        elif script == "-":
            assert flags == ["runs/generator"]
        elif script == "-m":
            assert flags[:2] == ["results.figures", folder] and flags[2] in attacked
            figures.append(flags[2])
        else:
            assert [script, *flags] == ["metrics.py", "--run", folder]
    assert attacked == [*methods]
    assert figures == [m for m in methods if m.startswith(("weak-at", "doa"))]  # of real pairs
    assert {*trained} - {*attacked} == {"weak-at-4", "weak-at-10", "weak-at-20"}
