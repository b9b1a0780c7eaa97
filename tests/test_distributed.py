"""torchrun: two processes train one model on halves of a batch that they draw themselves; one of
them writes; the rows of their targets are those of one process.

Each draws with a seed of its own, so a run of two processes has other numbers than one of one; what
must hold is that the gradient of a step is the mean of theirs and that their weights stay the same,
bit for bit.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attacks
import embed

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = "--synthetic-persons 9 --synthetic-images 10 --validation-persons 2 --target-persons 3"
COMMON = [*PEOPLE.split(), "--device=cpu", "--run=runs/two"]
TRAIN = "--width 0.03125 --dim 16 --batch 6 --steps 6 --validate-every 2 --attack-steps 3"
TRAIN = [*COMMON, *TRAIN.split(), "--attack-warmup=0"]
LORD = "--class-dim 8 --content-dim 8 --hidden 16,16 --channels 8,8,8,8 --out-channels 4"
LORD += " --encoder-channels 4,4,8,8,8 --encoder-hidden 16 --batch 8 --epochs 2 --encoder-epochs 2"
LORD = [*COMMON, *LORD.split()]
WEAK = ["--method=weak-at"]
SMALL = {"targets": 3, "intruders": 2, "clean_intruders": 4, "iterations": 2}
DRIVER = f"""
import os, sys, traceback
from types import SimpleNamespace

sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist

import attacks, embed, generator
from data import run

attacks.PRESETS["demo"] |= {SMALL}
generator.compare_with_truth = lambda *_: {{}}  # renders faces for seconds
sys.modules["metrics"] = SimpleNamespace(main=lambda flags: print("the table", *flags) or 0)
counts = {{"compared": 0, "averaged": 0, "apart": 0}}


def gathered(x):
    both = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(both, x)
    return both


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    parts = [tensors(v) for v in parts if isinstance(v, (dict, list, tuple, torch.Tensor))]
    return [x for part in parts for x in part]


def watched(optimiser, average=run.average_gradients):
    def flat():
        grads = [p.grad for group in optimiser.param_groups for p in group["params"]]
        return torch.cat([g.flatten() for g in grads if g is not None])

    def before(*_):
        kept[:] = gathered(flat())

    def after(*_):
        assert torch.equal(flat(), (kept[0] + kept[1]) / 2)
        counts["averaged"] += 1
        counts["apart"] += not torch.equal(*kept)

    kept = []
    optimiser.register_step_pre_hook(before)
    average(optimiser)
    optimiser.register_step_pre_hook(after)


def log(self, steps, write=run.Training.log, **values):
    states = [x for part in self.parts.values() for x in tensors(part.state_dict())]
    one, other = gathered(torch.cat([x.detach().double().flatten() for x in states]))
    assert len(one) > 1000 and one.isfinite().all() and torch.equal(one, other)
    counts["compared"] += 1
    return write(self, steps, **values)


def halved(config, *rest, step=embed.train_step):
    assert config.batch == 3
    return step(config, *rest)


run.average_gradients, run.Training.log, embed.train_step = watched, log, halved
try:
    for stage, flags in PLAN:
        assert sys.modules[stage].main(flags) == (2 if "--batch=7" in flags else 0), flags
        print(stage, flags[-1], counts, flush=True)
    assert run.gather(os.environ["RANK"]) == ([] if run.rank() else ["0", "1"])
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder in which two processes made runs/two, and what they said."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("no gloo")
    folder = tmp_path_factory.mktemp("torchrun")
    plan = [
        ("embed", [*TRAIN, "--no-evaluation", "--batch=7"]),
        ("generator", LORD),
        ("embed", [*TRAIN, "--no-evaluation"]),
        ("embed", [*TRAIN, *WEAK]),
        ("embed", [*TRAIN, *WEAK, "--no-evaluation"]),
    ]
    driver = folder / "driver.py"
    driver.write_text(f"PLAN = {plan!r}\n{DRIVER}")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    how = {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*start, driver], check=False, **how)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_weights_stay_equal_and_gradients_are_the_mean(two):
    """The driver's assertions; here, that they were reached, at every step of every training, and
    that the processes drew different halves."""
    lines = [line for line in two[1].splitlines() if re.match(r"(generator|embed) ", line)]
    counts = [{k: int(v) for k, v in re.findall(r"'(\w+)': (\d+)", line)} for line in lines]
    _, lord, ours, weak, again = counts
    assert lord["compared"] == 4 and lord["averaged"] == lord["apart"] > 4  # both stages
    assert ours == {k: v + (3 if k == "compared" else 6) for k, v in lord.items()}
    assert weak == again == {k: v + (3 if k == "compared" else 6) for k, v in ours.items()}


@pytest.mark.parametrize("name", ["ours", "weak-at-3"])
def test_the_training_is_whole(two, name):
    folder = two[0] / "runs/two" / name
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    result = (folder / "result.json").read_text()
    assert '"batch": 6' in result and ", 2 processes" in result
    weights = torch.load(folder / "embedding.pt", weights_only=True)["model"]
    assert all(v.isfinite().all() for v in weights.values())


def test_only_one_process_speaks(two):
    _, out, err = two
    assert "Traceback" not in err
    assert err.count("embed.py: --batch 7: must divide by torchrun's 2 processes") == 1
    assert out.count("step 6/6") == 2 and out.count("is trained already") == 1
    assert out.count("the table --run") == 1
    names = [path.name for path in two[0].rglob("*")]
    assert not [n for n in names if n.endswith((".ckpt", ".tmp"))]


def test_the_rows_of_two_processes_are_those_of_one(two, monkeypatch):
    monkeypatch.chdir(two[0])
    monkeypatch.setitem(attacks.PRESETS, "demo", {**attacks.PRESETS["demo"], **SMALL})
    shutil.copytree("runs/two", "runs/one", ignore=shutil.ignore_patterns("attacks"))
    flags = ["--run=runs/one", "--method=weak-at-3", "--attacks=clean,eyeglasses"]
    assert attacks.main([*flags, "--device=cpu"]) == 0
    for name in ("clean", "eyeglasses"):
        one, both = (Path("runs", n, "weak-at-3/attacks", f"{name}.csv") for n in ("one", "two"))
        assert one.read_bytes() == both.read_bytes() and one.read_text().count("\n") > 3


@pytest.mark.parametrize("flags, named", [(["--steps", "0"], "--steps 0"), (["--all"], "--all")])
def test_a_bad_flag_is_one_line_of_all_processes(monkeypatch, tmp_path, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    for rank in "01":
        for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(key, value)
        assert embed.main([*TRAIN, *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("embed.py: ") and named in err[0]
    assert not list(tmp_path.iterdir())
