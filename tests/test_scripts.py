"""Every script copied alone into another project imports and works; help says what a flag is."""

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
BLOCK = "import sys; sys.modules.update(dict.fromkeys(['triton', 'matplotlib', 'tqdm']))\n"
USE = {
    "generator": """
import torch
lord = m.Lord(m.Config(**{**m.PRESETS["demo"], "preset": "demo"}))
y, u = m.quadruplets(lord, torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
assert y.shape == u.shape == (1, 3, 64, 64)
""",
    "embed": """
import torch
f, x = m.Embedding(1 / 32), torch.rand(2, 3, 64, 64)
boxes = m.draw_boxes(2, 64, 64, 1.0, (0.02, 0.2), (0.5, 2.0), torch.Generator())
erased = m.gaussian_cutout(x, fill="gaussian", generator=None, boxes=boxes)[0]
assert m.inner_attack(f, erased, f(x).detach(), torch.full((2,), 0.1), boxes, 2).shape == x.shape
""",
    "attacks": """
import torch
torch.manual_seed(0)
weight = torch.randn(3 * 64 * 64, 8) / 64
embed = m.Mirrored(lambda x: x.flatten(1) @ weight)
x, t = torch.rand(2, 2, 3, 64, 64)
mask, effort = m.eyeglasses_mask(), m.Effort(iterations=3, restarts=1)
found = m.tanh_attack(embed, x, embed(t), mask, effort, torch.Generator().manual_seed(0))
assert torch.equal(found.images[:, :, ~mask], x[:, :, ~mask])
assert (found.distance < m.distances(embed, x, embed(t))).all()
""",
    "metrics": "assert m.auroc([1.0, 2.0], [3.0, 4.0]) == 1",
}


ALONE = """
sys.path[0] = {folder!r}
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
    code, told = BLOCK + "import runpy\n", ""
    for name, use in USE.items():
        folder = tmp_path / f"another project {name}"
        folder.mkdir()
        shutil.copy(ROOT / f"{name}.py", folder)
        code += ALONE.format(folder=str(folder), name=name, use=use)
        told += f"{name} works\n{name}.py: the command needs the folder data/ beside it\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    # importing prints nothing
    assert (done.stdout, done.stderr, done.returncode) == (told, "", 0)
    left = {path.name for path in tmp_path.glob("*/*")} - {"__pycache__"}
    assert left == {f"{name}.py" for name in USE}


@pytest.mark.parametrize("name", ["generator", "embed", "attacks"])
def test_help_says_what_each_setting_is(name, capsys):
    m = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        m.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    notes = run.notes(m.Config)
    assert end.value.code == 0 and set(notes) == {f.name for f in dataclasses.fields(m.Config)}
    start = told.index("options:")
    for field, note in notes.items():
        flag = re.search(f"--{field.replace('_', '-')}[ ,]", told[start:]).start() + start
        value = repr(getattr(m.Config, field))
        assert 0 < told.index(value, flag) - flag < 600, field
        said = note.replace("-", "").replace(" ", "")  # argparse breaks lines at hyphens too
        assert said in told[flag : flag + 600].replace("-", "").replace(" ", ""), field


def test_the_command_without_triton_and_matplotlib_from_a_folder_with_spaces(tmp_path):
    """And on a console that has no letter for the name of the run."""
    folder = tmp_path / "a clone with spaces"
    folder.mkdir()
    for name in ("generator.py", "embed.py", "attacks.py", "metrics.py", "kernels", "data"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    flags = "--method weak-at --synthetic-persons 9 --synthetic-images 10 --steps 2 --batch 4"
    flags += " --validation-persons 2 --target-persons 3 --width 0.03125 --run Läufe"
    command = [sys.executable, "-c", BLOCK + f"import embed; sys.exit(embed.main({flags.split()}))"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrote L\\xe4ufe/weak-at/embedding.pt" in done.stdout
    assert (folder / "Läufe/weak-at/attacks/eyeglasses.csv").exists()


def test_every_command_of_reproduce_is_understood(tmp_path, monkeypatch):
    """results/reproduce.sh with a `python` that writes down what it is asked for: each command
    parses, and attacks and draws methods that one before it has trained."""
    import attacks
    import embed
    from metrics import METHODS

    run = "runs/synthetic-demo-0"
    for name in ("results", "bin", run):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "results/reproduce.sh", tmp_path / "results")
    (tmp_path / run / "run.json").write_text('{"data": "synthetic", "preset": "demo"}')
    (tmp_path / run / "generator.pt").touch()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "$*" >>asked\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "results/reproduce.sh", *METHODS, "figure5"], check=True)
    trained, attacked, drawn = [], [], []
    for script, *flags in map(str.split, Path("asked").read_text().splitlines()):
        if script == "embed.py":
            config, _ = embed.parse(flags)
            assert str(config.run) == run
            trained.append(config.name)
        elif script == "attacks.py":
            attacked += attacks.parse(flags)[0].method
            assert attacked[-1] in trained
        elif script == "-m":
            assert flags[:2] == ["results.figures", run] and flags[2] in attacked
            drawn.append(flags[2])
        else:
            assert [script, *flags] == ["metrics.py", "--run", run]
    of_real_pairs = [m for m in METHODS if m.startswith(("weak-at", "doa"))]
    assert attacked == [*METHODS] and drawn == of_real_pairs
    assert {*trained} - {*attacked} == {"weak-at-4", "weak-at-10", "weak-at-20"}
