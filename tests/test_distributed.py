"""torchrun: two processes train on the same whole batch as one; one of them writes; a lost one ends the run with a line.

F is compared in float64: in float32 a gradient's rounding sooner or later turns a sign of the inner attack, and the runs part.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attacks
import embed as e
import generator as g
from kernels.augment import augment_ref

ROOT = Path(__file__).resolve().parents[1]
FACES = "--synthetic-persons 9 --synthetic-images 10 --validation-persons 2 --target-persons 3".split()
TRAIN = [*FACES, *"--width 0.03125 --dim 16 --batch 6 --steps 20 --validate-every 1 --attack-steps 2 --attack-warmup 0".split()]
LORD = [
    *FACES, *"--class-dim 8 --content-dim 8 --hidden 16,16 --channels 8,8,8,8 --out-channels 4 --encoder-channels 4,4,8,8,8".split(),
    *"--encoder-hidden 16 --batch 8 --epochs 4 --encoder-epochs 4".split(),
]  # fmt: skip
METHODS = {"ours": [], "doa-10": ["--method=doa"]}
RESUMED = [*TRAIN, "--method=weak-at"]
SMALL = dict(targets=2, intruders=2, clean_intruders=4, iterations=2)
DRIVER = """
import json, sys
sys.path.insert(0, {root!r})
import attacks, embed, generator, pytest
from tests.test_distributed import in_double
attacks.PRESETS["demo"] |= {small}
generator.evaluate = lambda *_: dict()  # as below
codes = [generator.main(flags) for flags in {made}]
in_double(pytest.MonkeyPatch())
codes += [embed.main(flags) for flags in {trained}]
assert codes == {codes}, codes
"""


def torchrun(*command: object, **options) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", *map(str, command)]
    return subprocess.Popen(start, env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}, text=True, **options)


def in_double(patch):
    torch.set_default_dtype(torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(e, "validate", lambda *_: {"val_loss": 1.0, "val_auroc": 0.5})  # slow in float64
    patch.setattr(e, "augment", functools.partial(augment_ref, dtype=torch.float64))
    for name in ("gaussian_cutout", "masked_step", "window_energy"):
        patch.setattr(sys.modules["kernels." + name], "expect", lambda *_, **__: None)  # their references take any dtype


@pytest.fixture
def double(monkeypatch):
    in_double(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def lines(path: str) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """one/ and two/, the same trainings by one process and by two, and what the two said."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("no gloo")
    folder, step, before, threads = tmp_path_factory.mktemp("torchrun"), e.train_step, Path.cwd(), torch.get_num_threads()
    device = ["--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRITON_INTERPRET", "0")  # conftest's comes after this fixture
        patch.setattr(g, "evaluate", lambda *_: {})  # the probes: slow, and after the training
        torch.set_num_threads(1)
        try:
            assert g.main([*LORD, *device, "--run=one"]) == 0
            in_double(patch)
            Path("two").mkdir()
            shutil.copy("one/generator.pt", "two")
            patch.setattr(e, "train_step", lambda *a: step(*a) if a[2].state_dict()["state"].get(0, {"step": 0})["step"] < 3 else 1 / 0)
            with pytest.raises(ZeroDivisionError):  # after the third checkpoint
                e.main([*RESUMED, *device, "--run=one"])
            shutil.copytree("one/weak-at-2", "two/weak-at-2")
            patch.setattr(e, "train_step", step)
            for flags in ([*RESUMED, "--resume"], *([*TRAIN, *m] for m in METHODS.values())):
                assert e.main([*flags, *device, "--run=one", "--no-evaluation"]) == 0
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(torch.float32)
    two = [*device, "--run=two"]
    made = [[*LORD, *device, "--run=made"], [*LORD, *device, "--run=made", "--batch=7", "--overwrite"]]
    trained = [*([*TRAIN, "--no-evaluation", *m, *two] for m in METHODS.values()), [*RESUMED, "--resume", *two]]
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), small=SMALL, made=made, trained=trained, codes=[0, 2, 0, 0, 0]))
    done = torchrun(driver, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate(timeout=600)
    assert done.returncode == 0, err
    assert Path.cwd() == before
    return folder, out, err


@pytest.mark.parametrize("name", [*METHODS, "weak-at-2"])
def test_two_processes_have_the_losses_of_one(runs, name):
    one, two = (lines(runs[0] / run / name / "log.jsonl") for run in ("one", "two"))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        assert a["step"] == b["step"] and b["loss"] == pytest.approx(a["loss"], rel=1e-5), (a, b)
        assert [b[k] for k in ("d_positive", "d_negative", "gradient")] == pytest.approx([a[k] for k in ("d_positive", "d_negative", "gradient")], rel=1e-5)
    assert json.loads((runs[0] / "two" / name / "result.json").read_text())["device"].endswith(", 2 processes")


def test_both_stages_of_the_generator_have_the_losses_of_one(runs):
    one, two = (lines(runs[0] / run / "generator.jsonl") for run in ("one", "made"))
    assert [line["stage"] for line in two] == [1] * 4 + [2] * 4 and len(one) == 8  # five steps each
    for a, b in zip(one, two):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), (a, b)
    codes = [torch.load(runs[0] / run / "generator.pt", weights_only=True)["lord"] for run in ("one", "made")]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(codes[0].values(), codes[1].values()))


def test_only_one_process_speaks(runs):
    _, out, err = runs
    assert err.count("generator.py: --batch 7: must divide by torchrun's 2 processes") == 1 and "Traceback" not in err
    assert out.count("step 20/20") == len(METHODS) + 1 and out.count("resumed at step 3") == 1 and out.count("eyeglasses:") == 1
    assert not list(runs[0].rglob("*.part"))


def test_the_rows_of_two_processes_are_those_of_one(runs, monkeypatch, double):
    monkeypatch.chdir(runs[0])
    monkeypatch.setitem(attacks.PRESETS, "demo", {**attacks.PRESETS["demo"], **SMALL})
    found = Path("two/weak-at-2/attacks")
    rows = {name: (found / f"{name}.csv").read_bytes() for name in ("clean", "eyeglasses")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert attacks.main(["--run=two", "--method=weak-at-2", "--device=cpu", "--attacks=clean,eyeglasses"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert rows == {name: (found / f"{name}.csv").read_bytes() for name in rows}


@pytest.mark.parametrize("flags, named", [(["--batch", "7"], "--batch 7"), (["--all"], "--all")])
def test_what_torchrun_is_refused(monkeypatch, tmp_path, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    for rank in "01":
        for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(key, value)
        assert e.main([*TRAIN, *flags]) == 2
    err = capsys.readouterr().err.splitlines()  # of both processes
    assert len(err) == 1 and err[0].startswith(f"embed.py: {named}: ") and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_run_with_one_line(runs):
    log = runs[0] / "killed/weak-at-2/log.jsonl"
    flags = [*TRAIN, "--method=weak-at", "--run=killed", "--steps=1000000", "--device=cpu"]
    with torchrun(ROOT / "embed.py", *flags, cwd=runs[0], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        try:
            until = time.monotonic() + 300
            while not (log.exists() and log.read_text()) and run.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            victim = next(int(p) for p in children if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
            os.kill(victim, signal.SIGKILL)
            err = run.communicate(timeout=120)[1]
        finally:
            run.kill()
    said = [line for line in err.splitlines() if "embed.py: " in line]
    assert run.returncode != 0 and len(said) == 1 and said[0].startswith("embed.py: process 0 of 2 stops, as another one"), err
    assert 'embed.py", line' not in err  # torchrun's report, but no traceback of ours
    assert (log.parent / "training.ckpt").exists()


def test_the_helpers_are_the_same_in_both_scripts():
    parts = [(ROOT / name).read_text() for name in ("embed.py", "generator.py")]
    blocks = [text.split("several devices: torchrun", 1)[1].split("\n# ----", 1)[0] for text in parts]
    assert blocks[0] == blocks[1] and "def tell" in blocks[0]
