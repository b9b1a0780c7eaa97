"""tests/torture.py, shortened: one kill and one full disk for generator.py."""

import subprocess
import sys
from pathlib import Path


def test_kills_and_full_disks_change_nothing():
    command = [sys.executable, "-m", "tests.torture", "--kills", "1"]
    command += ["--disks", "1", "--scripts", "generator.py"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 kills survived") == done.stdout.count("1 full disks survived") == 1
