"""Kill -9 and full disks: what is left loads, and the same command ends with what an undisturbed
run makes.

    python -m tests.torture              # 20 kills and 5 full disks for each script, a few minutes
    python -m tests.torture --kills 1 --disks 1 --scripts generator.py   # what pytest runs
    python -m tests.torture --demo       # 20 kills over the demo, half an hour on one core

generator.py, embed.py and attacks.py, in tiny sizes on rendered faces, one after the other in a
temporary folder: once undisturbed, once killed at random moments of any kind (while starting,
training, writing), once with a random limit on the size of files. Prints a line for each; exit
status 1 if anything differs.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = (
    "1"  # processes are forked: no threads before that
)

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn.linear_model  # noqa: F401  imported here once instead of in every process
import torch
import torch._dynamo  # optimisers import it

import attacks
import data.synthetic  # noqa: F401
import embed
import generator
from data import run
from tests.test_attacks import SMALL
from tests.test_embed import FLAGS as EMBED_FLAGS
from tests.test_generator import FLAGS as GENERATOR_FLAGS

RUN = Path("runs/tortured")
SCRIPTS: dict[str, Callable] = {
    "generator.py": generator.main,
    "embed.py": embed.main,
    "attacks.py": attacks.main,
}
LOGS = {"generator.py": RUN / "generator" / "log.jsonl", "embed.py": RUN / "ours" / "log.jsonl"}
ROWS = RUN / "ours" / "attacks"
TARGETS = 6


def flags(script: str, kills: int, demo: bool) -> list[str]:
    """The command line: enough checkpoints that so many kills fall into one training."""
    if demo:
        return ["--method", "ours", "--run", str(RUN), "--device", "cpu"]
    units = 3 * kills + 2  # a kill comes at most three checkpoints after a start
    common = ["--run", str(RUN), "--device", "cpu"]
    people = ["--synthetic-persons", "17", "--target-persons", str(TARGETS)]
    if script == "generator.py":
        return [
            *GENERATOR_FLAGS,
            *people,
            *common,
            "--epochs",
            str(units // 2),
            "--encoder-epochs",
            str(units - units // 2),
        ]
    if script == "embed.py":
        return [*EMBED_FLAGS, *people, *common, "--steps", str(units), "--validate-every", "1"]
    return [
        *SMALL,
        *common,
        "--targets",
        str(TARGETS),
        "--attacks",
        ",".join(attacks.ATTACKS[: -(-units // TARGETS)]),
    ]


def start(script: str, argv: list[str], limit: int | None = None) -> tuple[int, int]:
    """The command in a process of its own, forked where torch is imported already: its id, and the
    pipe of its output."""
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        return process, reading
    status = 70
    try:
        sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        status = SCRIPTS[script](argv)
    except BaseException:  # noqa: BLE001  nothing may leave the forked process
        traceback.print_exc()
    os._exit(status)


def end(started: tuple[int, int]) -> tuple[int, str]:
    """Waits for the process: its exit status, or minus the signal, and what it said."""
    with os.fdopen(started[1]) as output:
        told = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(started[0], 0)[1]), told


def progress(script: str) -> int:
    """Checkpoints, or finished targets, so far. The script goes on meanwhile: what it removes
    during the look is looked for again."""
    while True:
        try:
            if script in LOGS:
                return len(LOGS[script].read_text().splitlines()) if LOGS[script].exists() else 0
            return len(list(ROWS.glob(".*.partial/[0-9]*.json"))) + TARGETS * len(
                list(ROWS.glob("*.csv"))
            )
        except (
            FileNotFoundError
        ):  # Python 3.11's glob, where a folder goes between its listing and its opening
            continue


def written() -> dict[Path, int]:
    """When each finished target and each finished table was written."""
    return {
        path: path.stat().st_mtime_ns
        for path in [*ROWS.glob(".*.partial/[0-9]*.json"), *ROWS.glob("*.csv")]
    }


def check_files() -> None:
    """Every file under its final name is whole."""
    for path in Path("runs").rglob("*.*"):
        if path.suffix in (".pt", ".ckpt"):
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            dict(np.load(path))


def result(script: str) -> list:
    """What nothing may change: weights, bit for bit, and log; or rows."""
    if script not in LOGS:
        return [(path.name, path.read_text()) for path in sorted(ROWS.glob("*.csv"))]
    path, key = (
        (RUN / "generator.pt", "lord")
        if script == "generator.py"
        else (RUN / "ours" / "embedding.pt", "model")
    )
    weights = torch.load(path, weights_only=True)[key]
    log = [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in LOGS[script].read_text().splitlines()
    ]
    return [*((k, v.numpy().tobytes()) for k, v in weights.items()), *log]


def finish(script: str, argv: list[str]) -> list:
    """The last start, which nobody disturbs: `result`, and nothing unfinished left beside it."""
    for path in Path("runs").rglob("*.tmp"):
        os.utime(path, (0, 0))  # what nobody has written to for a minute
    status, told = end(start(script, argv))
    assert status == 0, f"status {status}: {told}"
    left = [
        path.name
        for path in Path("runs").rglob("*")
        if path.name.endswith((".tmp", ".ckpt", ".partial"))
    ]
    assert not left, f"left behind: {left}"
    return result(script)


def undisturbed(script: str, argv: list[str]) -> tuple[float, float, int]:
    """Seconds before the first checkpoint, and between two; how many there were."""
    began, times, started = time.monotonic(), [0.0], start(script, argv)
    while not os.waitid(os.P_PID, started[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
        times += [time.monotonic() - began] * (progress(script) - len(times) + 1)
        time.sleep(0.005)
    status, told = end(started)
    assert status == 0, f"status {status}: {told}"
    return times[1], (times[-1] - times[1]) / (len(times) - 2), progress(script)


def kill(
    script: str,
    argv: list[str],
    rng: random.Random,
    first: float,
    each: float,
    checkpoints: int,
    steps: int,
) -> None:
    """Kill -9 at a random moment: while starting, or after so many more checkpoints; at the latest
    when the last is there."""
    before, kept, deadline = progress(script), written(), 0.0
    delay, started = rng.uniform(0, each if steps else first), start(script, argv)
    while not deadline or time.monotonic() < deadline:
        done = progress(script) - before
        if done >= steps and not deadline:
            deadline = time.monotonic() + delay
        if done > steps + 1 or before + done >= checkpoints:
            break
        time.sleep(0.005)
    os.kill(started[0], signal.SIGKILL)
    status, told = end(started)
    assert status == -signal.SIGKILL, (
        f"ended before it could be killed, with status {status}: {told}"
    )
    check_files()
    now = written()
    assert all(now.get(path, when) == when for path, when in kept.items()), (
        "a finished target was attacked again"
    )


def fill_disk(script: str, argv: list[str], rng: random.Random, largest: int) -> None:
    """A disk that takes no file beyond a random size: one line says so, and what was whole stays
    whole."""
    limit = rng.randrange(largest)
    status, told = end(start(script, argv, limit))
    lines = [
        line
        for line in told.splitlines()
        if line.startswith(f"{script}:") and "File too large" in line
    ]
    assert status == 2 and len(lines) == 1 and "Traceback" not in told, (
        f"files up to {limit} bytes, status {status}: {told}"
    )
    check_files()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill -9 and full disks, survived by every script."
    )
    parser.add_argument("--kills", type=int, default=20, help="for each script")
    parser.add_argument("--disks", type=int, default=5, help="full disks for each script")
    parser.add_argument(
        "--demo", action="store_true", help="embed.py alone, in the demo's sizes; no full disks"
    )
    parser.add_argument("--scripts", default=",".join(SCRIPTS), help="which, in this order")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    run.CHECKPOINT_EVERY = run.CHECKPOINT_EVERY if args.demo else 0.0
    scripts, disks = (["embed.py"], 0) if args.demo else (args.scripts.split(","), args.disks)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("undisturbed", "killed", "full"):
            Path(folder, name).mkdir()
        try:
            for script in scripts:
                argv = flags(script, args.kills, args.demo)
                what = "weights and log" if script in LOGS else "rows"
                os.chdir(Path(folder, "undisturbed"))
                others = {*RUN.rglob("*.*")}
                first, each, checkpoints = undisturbed(script, argv)
                wanted = result(script)
                largest = max(path.stat().st_size for path in {*RUN.rglob("*.*")} - others)
                os.chdir(Path(folder, "killed"))
                for k in range(args.kills):
                    if args.demo:  # few checkpoints: the kills spread evenly over them
                        steps = max(0, (k + 1) * (checkpoints - 1) // args.kills - progress(script))
                    else:
                        steps = rng.randrange(3 if script in LOGS else 2)
                    kill(script, argv, rng, first, each, checkpoints, steps)
                    if args.demo:
                        there = f"{progress(script)} of {checkpoints} checkpoints"
                        print(f"kill {k + 1} of {args.kills}, {there}", flush=True)
                assert finish(script, argv) == wanted, (
                    f"{what} differ from those of an undisturbed run after {args.kills} kills"
                )
                print(f"{script}: {args.kills} kills survived, {what} equal", flush=True)
                if not disks:
                    continue
                os.chdir(Path(folder, "full"))
                for _ in range(disks):
                    fill_disk(script, argv, rng, largest)
                assert finish(script, argv) == wanted, (
                    f"{what} differ from those of an undisturbed run after {disks} full disks"
                )
                print(f"{script}: {disks} full disks survived, {what} equal", flush=True)
        except AssertionError as error:
            print(f"{script}: FAILED in {Path.cwd().name}: {error}")
            return 1
        finally:
            os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
