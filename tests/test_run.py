"""data/run.py: flags, exit statuses, files that are whole or not there, tables and trainings that
go on; and what data/model.py says of a user's model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from data import model, run

ROOT = Path(__file__).resolve().parents[1]


# the command line


@dataclass(frozen=True)
class Settings:
    preset: str = "paper"  # paper | demo
    steps: int = 10  # Sec. 1: the steps of the training
    # Sec. 2: Adam's, in 100 %,
    # as it was
    lr: float = 0.1
    method: Literal["ours", "doa"] = "ours"  # which
    words: tuple[Literal["one", "two"], ...] = ("one",)  # some
    area: tuple[float, float] = (0.1, 0.2)  # the share of the image
    patch: tuple[int, ...] = (10,)  # its height and width
    fast: bool = False  # not in the paper


PRESETS = {"paper": {}, "demo": {"steps": 3, "lr": 0.5}}


def parse(*argv, **flags):
    return run.parse(Settings, PRESETS, argv, "Test.", bounds={"lr": (0, 1)}, **flags)


def test_a_flag_wins_over_the_preset_and_that_over_the_default():
    assert parse()[0] == Settings("demo", 3, 0.5)
    assert parse("--steps", "4")[0] == Settings("demo", 4, 0.5)
    assert parse("--preset", "paper", "--steps", "4")[0] == Settings("paper", 4)
    changed = parse("--words", "all", "--area", "0,1", "--patch=8,6", "--fast")[0]
    assert changed == Settings("demo", 3, 0.5, "ours", ("one", "two"), (0.0, 1.0), (8, 6), True)
    pair = {"positional": True, "nargs": "*"}
    config, args = parse("a b", "c", "--method", "doa", "--run", "r", pair=pair)
    assert (args.pair, args.run, config.method) == (["a b", "c"], Path("r"), "doa")
    assert not hasattr(args, "steps") and args.overwrite is False and args.device == ""
    args = ["--run", "demo"]
    assert run.parse(Settings, PRESETS, args, "", lambda args: args.run.name)[0].steps == 3


def test_the_notes_of_fields_are_their_comments():
    notes = run.read_notes(Settings)
    assert notes["steps"] == "Sec. 1: the steps of the training"
    assert notes["lr"] == "Sec. 2: Adam's, in 100 %, as it was"
    assert notes.keys() == Settings.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--steps 0", "--steps 0: give a number from 1 to 2147483647"),
        ("--steps 2147483648", "--steps 2147483648: give"),
        ("--steps 1.5", "--steps invalid int value: '1.5'"),
        ("--steps=--", "--steps: give a value"),
        ("--lr nan", "--lr nan: give a number from 0 to 1"),
        ("--lr 2", "--lr 2: give a number from 0 to 1"),
        ("--area 1,inf", "--area inf: give a number from 0 to 1"),
        ("--area 1", "--area 1: give 2 numbers"),
        ("--patch 1,2,3", "--patch 1,2,3: give 1 or 2 numbers"),
        ("--method all", "--method all: choose ours, doa"),
        ("--words one,three", "--words three: choose one, two"),
        ("--words ,", "--words : choose one, two"),
        ("--preset none", "--preset none: choose paper, demo"),
        ("--resume", "--resume"),
    ],
)
def test_flags_that_are_refused(flags, named):
    with pytest.raises(run.UsageError, match=named) as error:
        parse(*flags.split())
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


def test_a_process_that_has_ended_is_one_line_and_a_fault_is_not(capsys, monkeypatch):
    def work(_):
        raise RuntimeError("Connection closed\nby peer")

    with pytest.raises(RuntimeError):
        run.command("script.py", work)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run.command("script.py", work) == 1
    text = "script.py: a process stopped (Connection closed by peer); the same command goes on\n"
    assert capsys.readouterr().err == text
    with pytest.raises(run.UsageError, match="--batch 7: must divide by torchrun's 2 processes"):
        run.share("--batch", 7)
    assert run.share("--batch", 8) == 4


def test_seeds_differ_by_seed_step_and_rank(monkeypatch):
    seeds = [run.step_seed(seed, step) for seed in (0, 1) for step in (0, 1, 500_009)]
    monkeypatch.setenv("RANK", "1")
    seeds += [run.step_seed(seed, step) for seed in (0, 1) for step in (0, 1, 500_009)]
    assert seeds[1] == 1 and seeds[3] == 1_000_003 and len({*seeds}) == 12
    assert run.gather(3) == [3]


def test_precision_is_low_where_that_is_fast(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for able, wanted in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert run.resolve_precision("auto", cpu) == wanted
        for name in ("float32", "bfloat16"):
            assert run.resolve_precision(name, cpu) == name
    for capability, wanted in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert run.resolve_precision("auto", cuda) == wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # an older torch
    assert run.resolve_precision("auto", cpu) == "float32"


# files


def test_a_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "kept.pt"
    run.save(path, "toy", value=torch.ones(2))
    left = tmp_path / "kept.pt.0123abcd.tmp"  # of a killed writer
    left.write_bytes(b"half")
    os.utime(left, (0, time.time() - 120))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "fsync", full)
        with pytest.raises(run.UsageError, match="kept.pt: cannot be written .No space left"):
            run.save(path, "toy", value=torch.zeros(2))
        patch.undo()
        patch.setattr(run.os, "replace", full)  # the last that happens
        with pytest.raises(run.UsageError):
            run.save(path, "toy", value=torch.zeros(2))
    assert torch.equal(run.load(path, "toy")["value"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.pt"]


def test_a_disk_that_is_really_full_is_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "kept.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    run.save(path, "toy", value=torch.zeros(1))
    table = tmp_path / "clean.csv"
    run.open_table(table, SETTINGS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for put in (
            lambda: run.save(path, "toy", value=torch.rand(100_000)),
            lambda: run.write(path, "x" * 30_000),
            lambda: run.append_rows(table, HEADER, 9000 * [["clean", "a", 1.0]], "a", {}),
        ):
            with pytest.raises(run.UsageError, match="cannot be written .File too large"):
                put()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.load(path, "toy")["value"] == 0
    assert table.stat().st_size == 20_000 and run.open_table(table, SETTINGS) == {}
    assert not table.exists()


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


def test_a_digest_is_of_every_row_and_file(tmp_path):
    a, file = torch.arange(9000.0), tmp_path / "f"
    file.write_bytes(b"1")
    before = run.digest(a, None, file)
    assert before == run.digest(a.clone(), file) and len(before) == 16
    for row in (0, 4096, 8999):  # the last too
        b = a.clone()
        b[row] += 1
        assert run.digest(b, file) != before
    assert run.digest(a[:-1], file) != before
    file.write_bytes(b"2")
    assert run.digest(a, file) != before


def test_differences_are_named():
    old, new = {"config": {"lr": 1, "area": (1, 2)}}, {"config": {"lr": 2, "area": [1, 2]}, "n": 1}
    assert run.differences(old, new) == "lr (1 before, 2 now), n (None before, 1 now)"
    assert not run.differences(old, old)


WRITER = """
import sys, time
from data import run
run.Training(sys.argv[1] + "/ours", {})
run.open_table(run.Path(sys.argv[1], "ours/attacks/clean.csv"), {"config": {}})
print("writes", flush=True)
time.sleep(600)
"""


def test_a_folder_that_a_process_writes_is_kept_for_it_until_it_ends(tmp_path, monkeypatch):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writes\n"
            begin = {
                "ours": lambda: run.Training(tmp_path / "ours", {}),
                "attacks": lambda: run.open_table(tmp_path / "ours/attacks/eye.csv", SETTINGS),
            }
            for folder, second in begin.items():
                who = f"/{folder}: process {process.pid} on .* writes there: wait until it ends"
                with pytest.raises(run.UsageError, match=who):
                    second()
            run.open_table(tmp_path / "weak-at/attacks/clean.csv", SETTINGS)  # another folder
            with monkeypatch.context() as patch:
                patch.setenv("RANK", "1")  # of torchrun's processes the first alone
                run.lock(tmp_path / "ours")
        finally:
            process.kill()
    for second in [*begin.values()] * 2:  # one's own is no other's
        second()
    with monkeypatch.context() as patch:
        patch.setattr(run.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks")))
        run.lock(tmp_path / "no-locks")


# tables

HEADER = ["attack", "target", "distance"]
SETTINGS = {"config": {"targets": 3, "area": (1, 2)}, "seed": 0, **run.versions()}
PARTS = {
    "Ann, B.": ([1 / 3, 0.5], {"seconds": 0.1, "zero_gradients": 1, "outside_mask_max": 0.25}),
    "Zoë": ([2.0], {"seconds": 0.2, "zero_gradients": 3, "outside_mask_max": 0.125}),
    "n": ([1e-9, 12345678.0], {"seconds": 0.4, "zero_gradients": 0, "outside_mask_max": 0.0}),
}
TEXT = """attack,target,distance
clean,"Ann, B.",0.3333333
clean,"Ann, B.",0.5
clean,Zoë,2
clean,n,1e-09
clean,n,1.234568e+07
"""


def fill(table, most=3, overwrite=False):
    """The command's loop: what is missing, at most so many; returns what was finished before."""
    finished = run.open_table(table, SETTINGS, overwrite)
    for target in [t for t in PARTS if t not in finished][:most]:
        distances, stats = PARTS[target]
        rows = [["clean", target, distance] for distance in distances]
        run.append_rows(table, HEADER, rows, target, stats)
    return [*finished]


def sidecar(table):
    return json.loads(table.with_suffix(".json").read_text())


def test_rows_and_what_stands_beside_them(tmp_path):
    table = tmp_path / "clean.csv"
    assert fill(table) == [] and table.read_text(encoding="utf-8") == TEXT
    content = sidecar(table)
    totals = {"n": 5, "n_targets": 3, "zero_gradients": 4, "seconds": 0.7, "outside_mask_max": 0.25}
    targets = {name: stats | {"rows": len(d)} for name, (d, stats) in PARTS.items()}
    settings = {**SETTINGS, "config": {"targets": 3, "area": [1, 2]}}
    assert content == settings | totals | {"targets": targets}
    before = table.stat().st_mtime_ns
    assert fill(table) == [*PARTS] and table.stat().st_mtime_ns == before  # nothing is made again


@pytest.mark.parametrize("done", [0, 1, 2])
def test_rows_without_their_target_are_dropped(tmp_path, done):
    """A kill at any byte of the next target's rows, or between the rows and the target."""
    table, ends = tmp_path / "clean.csv", [0, TEXT.index("clean,Zo"), TEXT.index("clean,n")]
    start, end = (len(TEXT[:n].encode()) for n in [*ends, len(TEXT)][done : done + 2])
    fill(table, done)
    kept = table.with_suffix(".json").read_bytes()
    for size in range(start, end + 1):
        table.with_suffix(".json").write_bytes(kept)
        table.write_bytes(TEXT.encode()[:size])
        assert fill(table) == [*PARTS][:done]
        assert table.read_text(encoding="utf-8") == TEXT
        assert sidecar(table)["n"] == 5 and sidecar(table)["seconds"] == 0.7


@pytest.mark.parametrize("size", range(0, len(TEXT), 9))
def test_a_target_without_its_rows_is_made_again(tmp_path, size):
    """Rows that somebody deleted, up to the whole table; the targets beside it are still there."""
    table = tmp_path / "clean.csv"
    fill(table)
    table.write_bytes(TEXT.encode()[:size])
    fill(table)
    lines = table.read_text(encoding="utf-8").splitlines()
    assert lines[0] == TEXT.splitlines()[0] and sorted(lines) == sorted(TEXT.splitlines())
    assert sidecar(table)["n"] == 5 and sidecar(table)["targets"].keys() == PARTS.keys()


def test_a_target_that_the_sidecar_lost_is_made_again(tmp_path):
    table = tmp_path / "clean.csv"
    fill(table)
    content = sidecar(table)
    del content["targets"]["n"]
    run.write(table.with_suffix(".json"), content)
    assert [*run.open_table(table, SETTINGS)] == ["Ann, B.", "Zoë"]
    assert table.read_text(encoding="utf-8") == TEXT[: TEXT.index("clean,n")]
    assert sidecar(table)["n"] == 3 and sidecar(table)["seconds"] == 0.3
    assert fill(table) == ["Ann, B.", "Zoë"] and table.read_text(encoding="utf-8") == TEXT


def test_a_table_of_other_settings_is_refused_and_overwritten(tmp_path):
    table = tmp_path / "clean.csv"
    fill(table)
    other = SETTINGS | {"config": {"targets": 4, "area": (1, 2)}}
    named = r"clean.json: other settings: targets \(3 before, 4 now\): .* --overwrite"
    with pytest.raises(run.UsageError, match=named):
        run.open_table(table, other)
    assert table.read_text(encoding="utf-8") == TEXT
    assert run.open_table(table, other, overwrite=True) == {} and not table.exists()
    assert sidecar(table)["config"]["targets"] == 4 and sidecar(table)["n"] == 0
    assert fill(table) == [] and table.read_text(encoding="utf-8") == TEXT  # no rows rested on them
    assert sidecar(table)["config"]["targets"] == 3
    run.write(table.with_suffix(".json"), {"n": 2})
    with pytest.raises(run.UsageError, match="clean.json: does not say"):
        fill(table)


def test_rows_that_do_not_fit_are_an_error_and_another_commit_is_told(
    tmp_path, monkeypatch, capsys
):
    table = tmp_path / "clean.csv"
    fill(table, 1)
    with pytest.raises(ValueError, match="columns .*'row'.*, not attack,target,distance"):
        run.append_rows(table, [*HEADER, "row"], [["clean", "Zoë", 1.0, 2]], "Zoë", {})
    with pytest.raises(AssertionError, match="Ann, B. is finished"):
        run.append_rows(table, HEADER, [["clean", "Ann, B.", 1.0]], "Ann, B.", {})
    monkeypatch.setattr(run, "commit", lambda: "another")
    monkeypatch.setitem(SETTINGS, "commit", "another")
    monkeypatch.setitem(SETTINGS, "torch", "9.0")
    monkeypatch.setattr(torch, "__version__", "9.0")
    before = sidecar(table)
    fill(table)
    assert table.read_text(encoding="utf-8") == TEXT
    assert sidecar(table)["commit"] == f"{before['commit']}, another"
    assert sidecar(table)["torch"] == f"{before['torch']}, 9.0"
    warnings = capsys.readouterr().err.splitlines()  # once, not at each of two targets
    assert [line.split(" begun ")[1] for line in warnings] == [
        f"at commit {before['commit']}, now another",
        f"at torch {before['torch']}, now 9.0",
    ]
    fill(table)
    assert not capsys.readouterr().err


# trainings


def train(folder, steps=6, stop=99, overwrite=False, **made_of):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3)
    adam = torch.optim.Adam(layer.parameters(), lr=0.1)
    training = run.Training(folder, {"n": 1, **made_of}, overwrite, model=layer, adam=adam)
    while not training.done and training.step < steps:
        rng = torch.Generator().manual_seed(run.step_seed(0, training.step))
        loss = layer(torch.randn(4, 3, generator=rng)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        training.best = max(training.best, float(loss.detach()))  # that of the first step
        training.count(loss=float(loss.detach()))
        if training.step == stop:
            raise KeyboardInterrupt
        if training.step % 2 == 0:
            training.log(steps)
    if not training.done:
        training.end(answer=training.best)
    return training, [p.detach().clone() for p in layer.parameters()]


def test_a_training_goes_on_bit_for_bit(tmp_path, capsys):
    whole, weights = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=5)
    log = tmp_path / "cut/log.jsonl"
    with open(log, "a") as file:  # a line beyond the checkpoint, and a torn one
        file.write('{"step": 6, "loss": 0}\n{"ste')
    named = r"training.ckpt: other settings: n \(1 before, 2 now\)"
    with pytest.raises(run.UsageError, match=named):
        train(tmp_path / "cut", n=2)
    training, resumed = train(tmp_path / "cut")
    assert "goes on at step 4" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed))
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.open()]
        for path in (log, tmp_path / "whole/log.jsonl")
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [2, 4, 6]
    assert training.result["answer"] == whole.result["answer"]
    assert not (tmp_path / "cut/training.ckpt").exists()
    again, _ = train(tmp_path / "cut")
    assert again.done and again.result == training.result
    before = dict(again.result)
    again.end(answer=43)  # another report of the same training: it took what it took
    assert again.result == {**before, "answer": 43} and before["seconds"] > 0
    with pytest.raises(run.UsageError, match="result.json: other settings: n"):
        train(tmp_path / "cut", n=2)


def test_a_line_is_the_mean_of_its_steps(tmp_path):
    training = run.Training(tmp_path, {})
    for loss in (1.0, 2.0, 6.0):
        training.count(loss=loss)
    line = training.log(9, extra=7.0)
    assert (line["step"], line["loss"], line["extra"]) == (3, 3.0, 7.0)
    training.count(loss=5.0)
    assert training.log(9)["loss"] == 5.0
    files, pick = [f"{n}.png" for n in range(9)], torch.tensor([2, 4, 8])
    text = training.describe_failure(torch.tensor([2, 0]), files, pick)
    assert text.startswith("images [8, 2] of the data, the first is 8.png; last good checkpoint: ")
    assert text.endswith("training.ckpt")


def test_checkpoints_come_once_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CHECKPOINT_EVERY", 60.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=5)  # lines at 2 and 4, the first with a checkpoint
    train(tmp_path / "cut")
    assert "goes on at step 2" in capsys.readouterr().out
    log = tmp_path / "slow/log.jsonl"
    log.parent.mkdir()
    log.touch()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61 * len(log.read_text().splitlines()))
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
    monkeypatch.setattr(torch, "__version__", "9.0")
    training, _ = train(tmp_path, n=2)
    assert training.result["made_of"] == {"n": 2} and training.step == 6
    error = capsys.readouterr().err
    assert "now another\n" in error and ", now 9.0\n" in error and error.count("WARNING") == 2
    (tmp_path / "training.ckpt").write_bytes(b"damaged")
    with pytest.raises(run.UsageError, match="training.ckpt: cannot be read"):
        train(tmp_path, n=2)


# a user's model


def test_a_model_is_its_file_and_its_distances(tmp_path):
    file, images = tmp_path / "net.py", torch.rand(4, 3, 8, 8)
    file.write_text("1")
    weight = torch.linspace(-1, 1, 3 * 64 * 5).view(-1, 5)
    before = model.model_digest(lambda x: x.flatten(1) @ weight, file, images)
    nearly = model.model_digest(lambda x: x.flatten(1) @ weight * (1 + 1e-7), file, images)
    other = weight.clone()
    other[-1, -1] += 0.5
    assert before == nearly and before != model.model_digest(
        lambda x: x.flatten(1) @ other, file, images
    )
    file.write_text("2")
    assert before != model.model_digest(lambda x: x.flatten(1) @ weight, file, images)


def test_a_model_is_asked_what_the_photographs_should_be():
    """Persons differ in colour alone; a model of red minus blue wants RGB, its threshold [0, 1]."""
    rng = torch.Generator().manual_seed(0)
    own = torch.rand(6, 3, 1, 1, generator=rng) * 180 + 30
    noise = torch.randn(24, 3, 8, 8, generator=rng) * 5
    images = (own.repeat_interleave(4, 0) + noise).clamp(0, 255).to(torch.uint8)
    person = torch.arange(24) // 4
    mean = lambda x: x.mean((2, 3))
    check = lambda embed, cosine=False: model.check_clean(
        "--model", embed, images, person, cosine, 5
    )
    assert check(mean) == ["clean AU-ROC 1.000, 36 genuine of 276 pairs"]
    blind = lambda x: mean(x)[:, :1] * 0 + mean(x).clamp(0.9) * 100
    (low, warning) = check(blind)
    areas = [float(word) for word in warning.split() if word[0] in "01" and "." in word]
    assert low.startswith("clean AU-ROC 0.5") and "as BGR" in warning
    assert np.argmax(areas) == 3 and areas[3] > 0.99  # in 0 to 255
    length = lambda x: mean(x) * (1 + 50 * torch.rand(len(x), 1, generator=rng))
    assert "by the other distance: --distance cosine" in check(length)[1]
    images[:, :2] = torch.randint(256, (24, 2, 8, 8), generator=rng)  # the persons are in blue
    warning = check(lambda x: mean(x)[:, :1])[-1]
    assert 0.9 < float(re.search(r"(\S+) as BGR", warning)[1])
