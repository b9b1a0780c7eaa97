"""Kill -9: what is left loads, and the same command ends with what an undisturbed run makes.

generator.py, embed.py, attacks.py and verify.py, one after the other, in tiny sizes: once
undisturbed, once killed at random moments of any kind (while starting, training, writing).
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs/small")
KILLS = 3
COMMON = f"--run {RUN} --device cpu"
PEOPLE = "--synthetic-persons 10 --synthetic-images 10 --validation-persons 2 --target-persons 4"
FLAGS = {
    "generator": f"{PEOPLE} --class-dim 8 --content-dim 8 --hidden 16,16 --channels 8,8,8,8 "
    "--out-channels 4 --encoder-channels 4,4,8,8,8 --encoder-hidden 16 --batch 16 --epochs 3 "
    "--encoder-epochs 3",
    "embed": f"{PEOPLE} --width 0.03125 --dim 16 --batch 4 --steps 16 --validate-every 1 "
    "--attack-steps 2 --attack-warmup 0 --no-evaluation",
    "attacks": "--attacks clean,eyeglasses,square --targets 4 --intruders 3 --clean-intruders 4 "
    "--iterations 6 --square-stride 20",
    "verify": "--persons 2 --patch 10 --mask 30",
}
# a command is forked where torch is imported already: it starts in no time
DRIVER = """
import json, os, signal, sys, time, traceback
import sklearn.linear_model, torch._dynamo
import attacks, data.synthetic, embed, generator, verify
from data import run

run.CHECKPOINT_EVERY = 0.0
generator.compare_with_truth = lambda *_: {}  # renders faces for seconds and writes nothing
print("ready", flush=True)
for line in sys.stdin:
    script, argv, folder, seconds = json.loads(line)
    began, process, status = time.monotonic(), os.fork(), 70
    if not process:
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            status = sys.modules[script].main(argv)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    ended = 0
    while not ended and time.monotonic() < began + seconds:
        time.sleep(0.005)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
    print(os.waitstatus_to_exitcode(status), time.monotonic() - began, flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(script, name, seconds) -> exit status of a command in folder name, or minus the signal
    (killed after so many seconds); the folder; the seconds it took."""
    home = tmp_path_factory.mktemp("kills")
    env = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], env=env, cwd=home, **pipes)
    assert driver.stdout.readline() == "ready\n"

    def command(script, name, seconds=300.0):
        folder = home / name
        folder.mkdir(exist_ok=True)
        argv = f"{FLAGS[script]} {COMMON}".split()
        print(json.dumps([script, argv, str(folder), seconds]), file=driver.stdin, flush=True)
        status, took = driver.stdout.readline().split()
        return int(status), folder, float(took)

    yield command
    driver.stdin.close()
    driver.wait()


def check_files(folder):
    """Every file under its final name is whole."""
    for path in folder.rglob("*.*"):
        if path.suffix in (".pt", ".ckpt"):
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            dict(np.load(path))


def result(script, folder):
    """What nothing may change: weights, bit for bit, and log; or rows."""
    if script in ("attacks", "verify"):
        tables = sorted((folder / "ours/attacks").glob("*.csv"))
        assert tables
        return [(path.name, path.read_text()) for path in tables]
    file, key, own = (
        ("generator.pt", "lord", "generator")
        if script == "generator"
        else ("ours/embedding.pt", "model", "ours")
    )
    weights = torch.load(folder / file, weights_only=True)[key]
    lines = (folder / own / "log.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return [*((k, v.numpy().tobytes()) for k, v in weights.items()), *log]


def finished(folder):
    """The targets that are finished, and how long each took."""
    tables = (folder / "ours/attacks").glob("*.json")
    targets = {path.stem: json.loads(path.read_text())["targets"] for path in tables}
    return {(name, k): v["seconds"] for name, part in targets.items() for k, v in part.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("script", FLAGS)
def test_kills_lose_nothing_and_double_nothing(start, script):
    rng, done, killed = random.Random(script), {}, 0
    status, whole, took = start(script, "whole")
    assert status == 0, (whole / "output").read_text()
    for _ in range(KILLS):
        status, folder, _ = start(script, "killed", rng.uniform(0.1, 0.6) * took)
        assert status in (0, -signal.SIGKILL), (folder / "output").read_text()
        killed += status != 0
        check_files(folder)
        for path in folder.rglob("*.tmp"):
            os.utime(path, (0, 0))  # nobody has written to it for a minute
        before, done = done, finished(folder / RUN)
        assert before.items() <= done.items()  # nothing finished is attacked again
    assert killed
    status, folder, _ = start(script, "killed")
    assert status == 0, (folder / "output").read_text()
    assert result(script, folder / RUN) == result(script, whole / RUN)
    assert done.items() <= finished(folder / RUN).items()
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".ckpt")]
