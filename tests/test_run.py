"""data/run.py: flags, exit statuses, files that are whole or not there, trainings that go on."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data import run


@dataclass(frozen=True)
class Settings:
    preset: str = "paper"
    steps: int = 10  # Sec. 1: of the training
    lr: float = 0.1  # Sec. 2: Adam's, in 100 %
    words: tuple[str, ...] = ("one",)  # which
    area: tuple[float, ...] = (0.1, 0.2)  # of the image
    fast: bool = False  # not in the paper


PRESETS = {"paper": {}, "demo": {"steps": 3, "lr": 0.5}}


def parse(*argv):
    choices = {"words": ("one", "two"), "lr": (0, 1)}
    return run.parse(Settings, PRESETS, argv, "Test.", choices)[0]


def test_a_flag_wins_over_the_preset_and_that_over_the_default():
    assert parse() == Settings("demo", 3, 0.5)
    assert parse("--preset", "paper", "--steps", "4") == Settings("paper", 4)
    assert parse("--words", "all", "--area", "0,1", "--fast").words == ("one", "two")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--steps", "0"], "--steps 0: give a number from 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "2"], "--lr 2.0: give a number from 0 to 1"),
        (["--words", "three"], "--words three: choose all or some of one, two"),
        (["--area", "1"], "--area 1.0: give 2 numbers"),
        (["--preset", "none"], "--preset none: choose paper, demo"),
        (["--resume"], "--resume"),
    ],
)
def test_flags_that_are_refused(flags, named):
    with pytest.raises(run.UsageError, match=named) as error:
        parse(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error, status",
    [
        (run.UsageError("x: y"), 2),
        (OSError(28, "No space left", "file"), 2),
        (FloatingPointError("loss nan"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda v: str(v)[:8],
)
def test_exit_statuses_are_one_line(capsys, error, status):
    def work(_):
        raise error

    assert run.command("script.py", work) == status
    err = capsys.readouterr().err
    assert err.startswith("script.py: ") and err.count("\n") == 1
    assert run.command("script.py", lambda _: None) == 0


def test_a_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "kept.pt"
    run.save(path, "toy", value=torch.ones(2))
    left = tmp_path / "kept.pt.0123abcd.tmp"  # of a killed writer
    left.write_bytes(b"half")
    os.utime(left, (0, time.time() - 120))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "fsync", full)
        with pytest.raises(run.UsageError, match="kept.pt: cannot be written .No space left"):
            run.save(path, "toy", value=torch.zeros(2))
    assert torch.equal(run.load(path, "toy")["value"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.pt"]


def test_a_disk_that_is_really_full_is_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "kept.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    run.save(path, "toy", value=torch.zeros(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for put in (
            lambda: run.save(path, "toy", value=torch.rand(100_000)),
            lambda: run.write(path, "x" * 30_000),
        ):
            with pytest.raises(run.UsageError, match="kept.pt: cannot be written .File too large"):
                put()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.load(path, "toy")["value"] == 0


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_checkpoints_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "toy", "value": Evil()}, "evil.pt")
    torch.save({"kind": "other"}, "other.pt")
    Path("short.pt").write_bytes(Path("other.pt").read_bytes()[:300])
    for name in ("evil.pt", "other.pt", "short.pt", "absent.pt"):
        with pytest.raises(run.UsageError, match=name) as error:
            run.load(name, "toy")
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_fingerprint_and_differences(tmp_path):
    a, file = torch.arange(6.0), tmp_path / "f"
    file.write_bytes(b"1")
    before = run.fingerprint(a, None, file)
    assert before == run.fingerprint(a.clone(), file) != run.fingerprint(a + 1, file)
    file.write_bytes(b"2")
    assert run.fingerprint(a, file) != before
    old, new = {"config": {"lr": 1, "area": (1, 2)}}, {"config": {"lr": 2, "area": [1, 2]}}
    assert run.differences(old, new) == "lr (1 before, 2 now)" and not run.differences(old, old)


def train(folder, steps=6, stop=99, overwrite=False, **made_of):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    training = run.Training(folder, {"n": 1, **made_of}, overwrite, model=model, adam=adam)
    while not training.done and training.step < steps:
        rng = torch.Generator().manual_seed(run.step_seed(0, training.step))
        loss = model(torch.randn(4, 3, generator=rng)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        training.count(loss=float(loss.detach()))
        if training.step == stop:
            raise KeyboardInterrupt
        if training.step % 2 == 0:
            training.log(steps)
    if not training.done:
        training.end(answer=42)
    return training, [p.detach().clone() for p in model.parameters()]


def test_a_training_goes_on_bit_for_bit(tmp_path, capsys):
    _, whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=5)
    log = tmp_path / "cut/log.jsonl"
    with open(log, "a") as file:  # a line beyond the checkpoint, and a torn one
        file.write('{"step": 6, "loss": 0}\n{"ste')
    with pytest.raises(
        run.UsageError, match=r"training.ckpt: another training: n \(1 before, 2 now\)"
    ):
        train(tmp_path / "cut", n=2)
    training, resumed = train(tmp_path / "cut")
    assert "goes on at step 4" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.open()]
        for path in (log, tmp_path / "whole/log.jsonl")
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [2, 4, 6]
    assert training.result["answer"] == 42 and not (tmp_path / "cut/training.ckpt").exists()
    again, _ = train(tmp_path / "cut")
    assert again.done and again.result["answer"] == 42
    before = dict(again.result)
    again.end(answer=43)  # another report of the same training: it took what it took
    assert again.result == {**before, "answer": 43} and before["seconds"] > 0
    with pytest.raises(run.UsageError, match="result.json: another training: n"):
        train(tmp_path / "cut", n=2)


def test_precision_is_low_where_that_is_fast(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for found, wanted in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert run.precision("auto", cpu) == wanted
        assert run.precision("float32", cpu) == "float32"
        assert run.precision("bfloat16", cpu) == "bfloat16"
    for capability, wanted in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert run.precision("auto", cuda) == wanted
        if wanted == "bfloat16":
            assert run.precision("tf32", cuda) == "tf32"
    with pytest.raises(run.UsageError, match="--precision tf32: cpu has none"):
        run.precision("tf32", cpu)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # an older torch
    assert run.precision("auto", cpu) == "float32"


def test_a_compiled_module_gives_the_same_numbers(monkeypatch):
    """Its graph: what inductor makes of it takes a compiler, and a minute."""
    layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    module, images = torch.nn.Sequential(*layers), torch.rand(4, 3, 8, 8, requires_grad=True)
    names, plain = [*module.state_dict()], module(images)
    (wanted,) = torch.autograd.grad(plain.sum(), images)
    run.compile_(module, backend="aot_eager")
    compiled = module(images)
    (found,) = torch.autograd.grad(compiled.sum(), images)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(found, wanted)
    assert [*module.state_dict()] == names and len(module(images[:3])) == 3

    def fails(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(run.UsageError, match=r"--compile: .*\(no compiler here\)"):
        run.compile_(module)


def test_checkpoints_come_once_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CHECKPOINT_EVERY", 60.0)
    _, whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=5)  # lines at 2 and 4, the first with a checkpoint
    _, resumed = train(tmp_path / "cut")
    assert "goes on at step 2" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61 * len(log.read_text().splitlines()))
    log = tmp_path / "slow/log.jsonl"
    log.parent.mkdir()
    log.touch()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "slow", stop=5)
    train(tmp_path / "slow")
    assert "goes on at step 4" in capsys.readouterr().out


def test_an_overwrite_that_is_killed_does_not_bring_the_old_result_back(
    tmp_path, monkeypatch, capsys
):
    train(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=1, overwrite=True, n=2)  # before its first checkpoint
    monkeypatch.setattr(run, "commit", lambda: "another")
    training, _ = train(tmp_path, n=2)
    assert training.result["made_of"] == {"n": 2} and training.step == 6
    assert "WARNING" in capsys.readouterr().err
    (tmp_path / "training.ckpt").write_bytes(b"damaged")
    with pytest.raises(run.UsageError, match="training.ckpt: cannot be read"):
        train(tmp_path, n=2)


FAULTS = """
import resource, sys, torch
from data import run
if sys.argv[1] == "start":
    run.start("cpu")
for n in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(6 * 2**20) for _ in range(4)]  # 96 MB
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_kept_for_the_next_step():
    # a fixed threshold: glibc's own grows, and what then stays on the heap depends on its layout
    command, fixed = [sys.executable, "-c", FAULTS], {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    faults = [
        int(subprocess.check_output([*command, how], cwd=run.HERE.parent, env=os.environ | fixed))
        for how in ("start", "")
    ]
    assert faults[0] < 50 < faults[1]
