"""Every script copied alone into another project imports, without Triton, matplotlib or the rest of this one."""

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "import sys; sys.modules.update(dict.fromkeys(['triton', 'matplotlib', 'tqdm']))\n"
USE = {
    "generator": "import torch; m.Lord(m.Config(**{**m.PRESETS['demo'], 'preset': 'demo'}))(torch.rand(1, 3, 64, 64))",
    "embed": "import torch; f = m.Embedding(1 / 32); x = torch.rand(2, 3, 64, 64); b = m.draw_boxes(2, 64, 64, 1.0, (.02, .2), (.5, 2.), None); "
    "m.inner_attack(f, m.gaussian_cutout(x, boxes=b)[0], f(x).detach(), torch.ones(2), b, 2, .1)",
    "attacks": "import torch; m.eyeglasses_mask()",
    "metrics": "m.auroc([1., 2.], [3., 4.])",
}


@pytest.mark.parametrize("name", list(USE))
def test_script_alone(name, tmp_path):
    folder = tmp_path / "another project"
    folder.mkdir()
    shutil.copy(ROOT / f"{name}.py", folder)
    code = BLOCK + f"import {name} as m\n{USE[name]}\nprint('worked')"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "worked\n" and done.stderr == "", done.stderr  # importing prints nothing
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [f"{name}.py"]


@pytest.mark.parametrize("name", ["generator", "embed", "attacks"])
def test_help_says_what_each_setting_is(name, capsys):
    m = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        m.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and set(m.notes(m.Config)) == {f.name for f in dataclasses.fields(m.Config)}
    for field, note in m.notes(m.Config).items():
        flag = re.search(f"--{field.replace('_', '-')}[ ,]", told[told.index("options:") :]).start() + told.index("options:")
        value = repr(getattr(m.Config, field))
        assert 0 < told.index(value, flag) - flag < 400, field
        said = note.replace("-", "").replace(" ", "")  # argparse breaks lines at hyphens too
        assert said in told[flag : flag + 400].replace("-", "").replace(" ", ""), field


def test_the_command_without_triton_and_matplotlib_from_a_folder_with_spaces(tmp_path):
    folder = tmp_path / "a clone with spaces"
    folder.mkdir()
    for name in ("generator.py", "embed.py", "attacks.py", "metrics.py", "kernels", "data"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    flags = "--method weak-at --synthetic-persons 9 --synthetic-images 10 --validation-persons 2 --target-persons 3 --steps 2 --batch 4 --width 0.03125"
    code = BLOCK + f"import embed; sys.exit(embed.main({flags.split()!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/synthetic-demo-0/weak-at/attacks/eyeglasses.csv").exists()
