"""A run, for every script: flags, devices, files, tables of rows, and trainings that go on.

    config, args = run.parse(Config, PRESETS, argv, "Train F.")  # a flag for each field
    device = run.start(args.device)  # a GPU if there is one; under torchrun this process's own
    training = run.Training(folder, made_of, args.overwrite, model=model, adam=adam)
    finished = run.open_table(table, settings)  # targets whose rows are there already
    run.command("embed.py", main, argv)  # exit status, one line for an error

A file is written beside its place, synced and renamed, so that a crash leaves the old file or the
new one. Checkpoints are read with `weights_only`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import functools
import glob
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LARGEST = 2**31 - 1  # of an integer flag
CHECKPOINT_EVERY = 60.0  # seconds: at full width a checkpoint holds 179 MB
HERE = Path(__file__).parent
LOCKS: dict[Path, Any] = {}  # lock files of the folders that this process writes, open
File = str | os.PathLike[str]


class UsageError(ValueError):
    """An error that the user can put right: one line that names the file or flag.

    flags: added to the command line, they would do.
    """

    def __init__(self, line: str, flags: str = "") -> None:
        super().__init__(line)
        self.flags = flags


# the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        message = re.sub(r"^argument (--[\w-]+)(/--[\w-]+)?: ", r"\1 ", message)
        raise UsageError(f"{message} (--help lists the flags)")


def read_notes(settings: type) -> dict[str, str]:
    """Read the comment of each field, behind it or on the lines above it, from the source."""
    notes: dict[str, str] = {}
    above: list[str] = []
    with contextlib.suppress(OSError):  # no source at hand
        for line in inspect.getsource(settings).splitlines():
            if field := re.match(r"    (\w+): (?:.*?  # (.*))?", line):
                notes[field[1]] = field[2] or " ".join(above)
            above = [*above, line[6:]] if line.startswith("    # ") else []
    return notes


def _reader(hint: Any, default: Any, bounds: tuple | None) -> Callable[[str], Any]:
    """Return the function that reads the text of a flag with this annotation and default."""
    several = isinstance(default, tuple)
    kind = type(default[0] if several else default)
    words = get_args(get_args(hint)[0] if several else hint)  # of Literal["...", "..."]
    low, high = bounds or ((1, LARGEST) if kind is int else (0, 1e9))

    def read_one(text: str) -> Any:
        value = kind(text)
        if words and value not in words:
            choice = ", ".join(filter(None, words))
            raise argparse.ArgumentTypeError(f"{text}: choose {choice}")
        if kind is not str and not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: give a number from {low} to {high}")
        return value

    def read(text: str) -> Any:
        if not several:
            return read_one(text)
        values = [value.strip() for value in text.split(",") if value.strip()]
        if kind is str:
            return words if words and values == ["all"] else tuple(map(read_one, values or [""]))
        counts = (1, 2) if len(default) == 1 else (len(default),)  # a side, or height and width
        if len(values) not in counts:
            wanted = " or ".join(map(str, counts))
            raise argparse.ArgumentTypeError(f"{text}: give {wanted} numbers")
        return tuple(map(read_one, values))

    read.__name__ = kind.__name__  # argparse says it of what kind refuses
    return read


def parse(
    settings: type,
    presets: dict[str, dict],
    argv: Sequence[str] | None,
    about: str,
    preset: str | Callable[[argparse.Namespace], str] = "demo",
    bounds: dict[str, tuple] | None = None,
    **flags: dict,
) -> tuple[Any, argparse.Namespace]:
    """Make a frozen dataclass from the command line, and return it with the flags beside it.

    A flag wins over the preset (field `preset`, by default this one), and that over the field's
    default. A flag takes the words of a `Literal` annotation; a tuple is written with commas, one
    of words also as `all`. bounds: field -> (lowest, highest); else an integer is at least 1, a
    float at least 0. flags: further ones, name -> arguments of `add_argument`, and `positional`.
    Always there: --run (else the settings' own `run`), --overwrite, --device. Raises UsageError.
    """
    fields = dataclasses.fields(settings)
    hints, notes, bounds = get_type_hints(settings), read_notes(settings), bounds or {}
    parser = _Parser(description=f"{about} In brackets: the paper's value; the demo's.")
    for field in fields:
        default, hint = field.default, hints[field.name]
        demo = presets.get("demo", {}).get(field.name, default)
        values = f"[{default!r}]" if demo == default else f"[{default!r}; demo: {demo!r}]"
        how: dict[str, Any] = {"help": f"{notes.get(field.name, '')} {values}".replace("%", "%%")}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = _reader(hint, default, bounds.get(field.name))
            how["metavar"] = "A,B" if isinstance(default, tuple) else type(default).__name__
            if isinstance(default, str) and get_args(hint):
                how["metavar"] = "{" + ",".join(get_args(hint)) + "}"
        parser.add_argument(flag_of(field.name), default=argparse.SUPPRESS, **how)
    usual: dict[str, dict] = {
        "run": {"type": Path, "help": "folder of the run (default runs/<data>-<preset>-<seed>)"},
        "overwrite": {"action": "store_true", "help": "start again over what is there"},
        "device": {"default": "", "help": "cpu, cuda, ... (default: a GPU if there is one)"},
    }
    for name, arguments in (usual | flags).items():
        how = {k: v for k, v in arguments.items() if k != "positional"}
        parser.add_argument(name if arguments.get("positional") else flag_of(name), **how)
    args = parser.parse_args(argv)
    chosen = {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}
    for name, value in chosen.items():
        if value == []:  # argparse reads --flag=-- as no value at all
            raise UsageError(f"{flag_of(name)}: give a value")
    if "preset" in hints:
        chosen.setdefault("preset", preset(args) if callable(preset) else preset)
        if chosen["preset"] not in presets:
            raise UsageError(f"--preset {chosen['preset']}: choose {', '.join(presets)}")
    config = settings(**{**presets.get(chosen.get("preset", ""), {}), **chosen})
    args.run = args.run or getattr(config, "run", None)
    return config, args


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def command(name: str, work: Callable, argv: Sequence[str] | None = None) -> int:
    """Do work(argv) and return its exit status; print an error as one line, on rank 0.

    0; 2 for UsageError and OSError, 1 for a loss that is not finite, 130 for Ctrl-C; under torchrun
    1 where another process has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # a name that the console has no letters for ends no run
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return work(argv) or 0
    except UsageError as error:
        status, line = 2, str(error)
        if error.flags:
            given = shlex.join(sys.argv[1:] if argv is None else argv)
            line += f": python {name} {given} {error.flags}"
    except OSError as error:
        status, what = 2, error.strerror or error
        line = f"{error.filename or 'files'}: {what}: fix that and run the same command again"
    except FloatingPointError as error:
        status, line = 1, str(error)
    except KeyboardInterrupt:
        status, line = 130, "interrupted; the same command goes on from the last checkpoint"
    except RuntimeError as error:  # a collective whose other process has ended raises no subclass
        if world() == 1:
            raise
        reason = " ".join(str(error).split())[:120]
        status, line = 1, f"a process stopped ({reason}); the same command goes on"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{name}: {line}", file=sys.stderr)
    return status


def run_stage(stage: str, argv: Sequence[str]) -> int:
    """Run the command of another stage in this process and return its exit status."""
    return importlib.import_module(stage).main(argv)


# devices and processes: torchrun starts one process for each


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(flag: str, whole: int) -> int:
    """Return this process's part of a batch; UsageError unless the processes divide it."""
    if whole % world():
        raise UsageError(f"{flag} {whole}: must divide by torchrun's {world()} processes")
    return whole // world()


def barrier() -> None:
    """Wait for the other processes; do nothing without torchrun."""
    if world() > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 go through the block before the others, which read what it wrote, or fail too."""
    if rank():
        barrier()
    try:
        yield
    finally:
        if not rank():
            barrier()


def gather(item: Any) -> list:
    """Return the items of all processes in order of rank, on rank 0; [] on the others."""
    if world() == 1:
        return [item]
    items = None if rank() else [None] * world()
    torch.distributed.gather_object(item, items)
    return items or []


def keep_memory() -> None:
    """Keep freed memory for the next step, where there is glibc: it gives memory back to the
    kernel, and a demo step faults 13,000 pages in again, 4 to 10 % of its time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if not libc.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD
            libc.mallopt(-3, 1 << 25)  # the most that some take


def start(name: str = "") -> torch.device:
    """Return the device of this name, by default a GPU if there is one. Raises UsageError.

    Under torchrun it is this process's own; the process joins the group, and rank 0 alone prints.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"--device {name}: cannot be used ({reason}): give cpu") from None
    keep_memory()
    if world() > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (count := torch.cuda.device_count()):
            raise UsageError(f"torchrun: this machine has {count} GPUs: start no more processes")
        torch.cuda.set_device(device)
    if world() > 1 and not torch.distributed.is_initialized():
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Return float32 or bfloat16; auto means bfloat16 where the device multiplies it faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    able: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return "bfloat16" if fast and device.type == "cpu" else "float32"


def average_gradients(optimiser: torch.optim.Optimizer) -> None:
    """Let each step of the optimiser take the mean of the processes' gradients, in one message."""

    def average(optimiser: torch.optim.Optimizer, *_: object) -> None:
        weights = [p for group in optimiser.param_groups for p in group["params"]]
        grads = [p.grad for p in weights if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
        for g, mean in zip(grads, (flat / world()).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

    if world() > 1:
        optimiser.register_step_pre_hook(average)


def step_seed(seed: int, step: int, spread: int = 1_000_003) -> int:
    """Return the seed of a step, of seed, step and rank alone: no random state is saved."""
    return seed * spread + step + rank() * 2_000_000_011


# files


@contextlib.contextmanager
def writing(path: File) -> Iterator[None]:
    """Turn a disk that is full or refuses the file into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        advice = "free some space, or name another place"
        raise UsageError(f"{path}: cannot be written ({reason}): {advice}") from None


def lock(folder: File) -> None:
    """Keep a folder for this process, of torchrun's for rank 0, until it ends, by a kill too.

    Raises UsageError where another process writes there.
    """
    path = Path(folder).resolve() / ".lock"
    if rank() or fcntl is None or path in LOCKS:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read() or "another process"
        advice = "wait until it ends, or name another --run"
        raise UsageError(f"{folder}: {who} writes there: {advice}") from None
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    LOCKS[path] = file


def write(path: File, content: bytes | str | dict | Callable[[Any], object]) -> None:
    """Write bytes, text, a dict as JSON, or what content(file) writes. Raises UsageError."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    if isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    raw = content.encode() if isinstance(content, str) else content
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
                with contextlib.suppress(OSError):  # of a killed writer, once a minute old
                    if time.time() - left.stat().st_mtime > 60:
                        left.unlink()
            with open(beside, "wb") as file:
                raw(file) if callable(raw) else file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: File, advice: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line: file, reason, advice."""
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file: {advice}") from None
    except Exception as error:  # noqa: BLE001  torch.load raises many kinds
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UsageError(f"{path}: cannot be read ({reason}): {advice}") from None


def read_json(path: File, advice: str = "restore it, or use --overwrite") -> dict:
    """Read a JSON file's object. Raises UsageError."""
    with reading(path, advice):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not an object")
        return content


def save(path: File, kind: str, **content: object) -> None:
    """Write a checkpoint that says what it is. Raises UsageError."""
    write(path, lambda file: torch.save({"kind": kind, **content}, file))


def load(path: File, kind: str) -> dict:
    """Read a checkpoint to the CPU. Raises UsageError if missing, broken, or of another kind."""
    with reading(path, "restore the file, train it again, or name another --run"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise ValueError(f"not a checkpoint of kind {kind!r}")
        return content


def digest(*parts: Tensor | File | None) -> str:
    """Return sixteen hexadecimal digits that another value, or a file's other content, changes."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            for rows in part.split(4096):
                total.update(rows.cpu().contiguous().numpy().tobytes())
        elif part is not None:
            total.update(Path(part).read_bytes())
    return total.hexdigest()[:16]


def differences(old: dict, new: dict) -> str:
    """Return the entries in which two records differ, as text; empty if they agree."""

    def flatten(record: dict) -> dict:
        plain = json.loads(json.dumps(record))  # tuples become lists
        inner = [flatten(v) if isinstance(v, dict) else {k: v} for k, v in plain.items()]
        return {k: v for part in inner for k, v in part.items()}

    a, b = flatten(old), flatten(new)
    names = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return ", ".join(f"{k} ({a.get(k)} before, {b.get(k)} now)" for k in names)


def check_same(path: Path, old: object, new: dict) -> None:
    """Raise UsageError, naming the difference, unless what path was made of is this."""
    if not isinstance(old, dict):
        raise UsageError(f"{path}: does not say what it was made of: use --overwrite")
    if changes := differences(old, new):
        advice = "use those again, --overwrite, or another --run"
        raise UsageError(f"{path}: other settings: {changes}: {advice}")


@functools.cache
def commit() -> str:
    """Return this checkout's commit, with -dirty after a change; "unknown" outside a checkout."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return "unknown"


def versions() -> dict[str, str]:
    """Return what may change the numbers of what goes on, and is reported then."""
    return {"commit": commit(), "torch": str(torch.__version__)}


def changed_versions(path: Path, before: dict) -> dict[str, str]:
    """Return the versions that `before` does not name, with a line for each on stderr."""
    now = {k: v for k, v in versions().items() if v not in str(before.get(k, v)).split(", ")}
    for key, version in now.items():
        line = f"WARNING: {path}: begun at {key} {before[key]}, now {version}"
        print(line, file=sys.stderr, flush=True)
    return now


def machine(device: torch.device) -> dict[str, str]:
    """Return device, versions and commit, to stand beside every result."""
    name = f"{platform.machine()} x{torch.get_num_threads()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    if world() > 1:
        name += f", {world()} processes"
    return {"device": name, "python": platform.python_version(), **versions()}


# tables: an attack's rows, a target at a time, in <attack>.csv; settings and targets in .json


def _sidecar(settings: dict, targets: dict[str, dict]) -> dict:
    """Return settings, totals over the targets (of a name in _max the largest), and targets."""
    totals = {"n": sum(stats["rows"] for stats in targets.values()), "n_targets": len(targets)}
    for stats in targets.values():
        for name, value in stats.items():
            if name.endswith("_max"):
                totals[name] = max(totals.get(name, 0), value)
            elif name != "rows" and isinstance(value, (int, float)):
                totals[name] = round(totals.get(name, 0) + value, 6)
    return settings | totals | {"targets": targets}


def _csv(rows: list[list]) -> str:
    text = io.StringIO()
    lines = ([f"{v:.7g}" if isinstance(v, float) else v for v in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def open_table(table: Path, settings: dict, overwrite: bool = False) -> dict[str, dict]:
    """Return the targets that are finished: name -> statistics. Rank 0 alone writes.

    settings: what stands beside the targets; its "config" must be the same as before, else
    UsageError. Rows without their target, as a kill leaves them, are dropped, and so is a target
    without its rows.
    """
    lock(table.parent)
    path, old = table.with_suffix(".json"), {}
    if path.exists() and not overwrite:
        old = read_json(path)
        if old.get("targets") != {}:  # nothing rests on the settings of a table without rows
            check_same(path, old.get("config"), settings["config"])
            settings = {k: old.get(k, v) for k, v in settings.items()}
    with reading(table, "delete it, and run the same command again"):
        text = table.read_bytes().decode(errors="replace") if table.exists() else ""
        lines = io.StringIO(text[: text.rfind("\n") + 1], newline="")  # only whole ones
        header, *rows = [*csv.reader(lines)] or [["target"]]
        where = header.index("target") if "target" in header else 0
        rows = [row for row in rows if len(row) == len(header)]
        count = Counter(row[where] for row in rows)
        finished = {k: v for k, v in old.get("targets", {}).items() if count[k] == v["rows"]}
    barrier()  # every process has looked before rank 0 writes
    if rank() == 0:
        if (content := _sidecar(settings, finished)) != old:
            write(path, content)
        whole = _csv([header, *(row for row in rows if row[where] in finished)])
        if not finished:
            table.unlink(missing_ok=True)
        elif text != whole:
            write(table, whole)
    return finished


def append_rows(table: Path, header: list[str], rows: list[list], target: str, stats: dict) -> None:
    """Append a target's rows to the table, then the target to the file beside it, on rank 0.

    A kill between the two leaves rows without a target, which `open_table` drops.
    """
    if rank():
        return
    path = table.with_suffix(".json")
    settings = read_json(path)
    targets = settings.pop("targets")
    assert target not in targets, f"{table}: {target} is finished"
    for key, version in changed_versions(table, settings).items():  # rows of two commits say so
        settings[key] += f", {version}"
    with writing(table), open(table, "a+b") as file:
        file.seek(0)
        before = file.readline().decode()
        if before not in ("", _csv([header])):
            raise ValueError(f"{table}: columns {header}, not {before.strip()}")
        file.write(_csv(rows if before else [header, *rows]).encode())
        file.flush()
        os.fsync(file.fileno())
    write(path, _sidecar(settings, targets | {target: stats | {"rows": len(rows)}}))


# trainings


class Training:
    """A training that goes on by itself: log.jsonl, training.ckpt until it ends, then result.json.

    made_of: what must be the same to go on (settings, persons, images, ...), else UsageError;
    overwrite starts again. parts: what has a state_dict. After a stop the same command goes on from
    the last checkpoint, bit for bit if a step's random numbers depend on `step_seed` alone. `step`
    counts, `seconds` it took, `best` is the caller's to keep, `result` is there once it is `done`.
    """

    def __init__(
        self, folder: Path, made_of: dict, overwrite: bool = False, unit: str = "step", **parts: Any
    ) -> None:
        lock(folder)
        self.folder, self.made_of, self.unit, self.parts = Path(folder), made_of, unit, parts
        self.step, self.seconds, self.best, self.result = 0, 0.0, -math.inf, {}
        self.log_file, self.checkpoint = self.folder / "log.jsonl", self.folder / "training.ckpt"
        ended, unfinished = self.folder / "result.json", self.checkpoint.exists()
        finished = ended.exists() and not unfinished
        barrier()  # every process has looked before rank 0 writes
        if unfinished and not overwrite:
            self._go_on()
        elif finished and not overwrite:
            self.result = read_json(ended)
            check_same(ended, self.result.get("made_of"), made_of)
        elif rank() == 0:
            if finished or unfinished:  # what is there counts as unfinished from here on
                self._save()
            write(self.log_file, "")
        self._begun, self._before, self._first = time.time(), self.seconds, self.step
        self._saved = -math.inf
        self._values: list[dict[str, float]] = []

    @property
    def done(self) -> bool:
        return bool(self.result)

    def _go_on(self) -> None:
        state = load(self.checkpoint, "training")
        check_same(self.checkpoint, state.get("made_of"), self.made_of)
        with reading(self.checkpoint, "it does not hold this training: use --overwrite"):
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.best = float(state["best"])
        print(f"{self.folder}: goes on at {self.unit} {self.step}", flush=True)
        if rank():
            return
        changed_versions(self.folder, state)
        lines = []  # of the log, those that are whole and not beyond the checkpoint
        if self.log_file.exists():
            for line in self.log_file.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)[self.unit] <= self.step:
                        lines.append(f"{line}\n")
        write(self.log_file, "".join(lines))

    def _save(self) -> None:
        numbers = {k: getattr(self, k) for k in ("made_of", "step", "seconds", "best")}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.checkpoint, "training", **versions(), **numbers, **states)
        self._saved = time.time()

    def count(self, **values: float) -> None:
        """Count a step; its values wait for the log."""
        self.step += 1
        self._values.append(values)

    def log(self, steps: int, **values: float) -> dict[str, float]:
        """Log the means of what was counted since the last line; save a checkpoint first, last and
        once a minute. Return the line, on rank 0 alone."""
        counted, self._values = self._values, []
        if rank():
            return {}
        self.seconds = self._before + time.time() - self._begun
        names = counted[0] if counted else ()
        means = {k: sum(v[k] for v in counted) / len(counted) for k in names}
        line = {self.unit: self.step, **means, **values, "seconds": self.seconds}
        # before the checkpoint: what goes on drops the lines beyond it
        with open(self.log_file, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.step >= steps or time.time() - self._saved >= CHECKPOINT_EVERY:
            self._save()
        each = (self.seconds - self._before) / max(self.step - self._first, 1)
        left = each * (steps - self.step) / 60
        text = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in {**means, **values}.items())
        print(f"{self.unit} {self.step}/{steps}  {text}  left {left:.1f} min", flush=True)
        return line

    def describe_failure(self, index: Tensor, files: Sequence[str], pick: Tensor) -> str:
        """Name the images of a step that failed, by index into pick (N,), and the checkpoint."""
        where = pick[index.cpu()].tolist()
        last = self.checkpoint if self.checkpoint.exists() else "none yet"
        images = f"images {where} of the data, the first is {files[where[0]]}"
        return f"{images}; last good checkpoint: {last}"

    def end(self, **result: object) -> None:
        """Write the result and remove the checkpoint, on rank 0 alone."""
        times = {
            "seconds": self.seconds,
            f"seconds_per_{self.unit}": self.seconds / max(self.step, 1),
        }
        if self.done:  # another result of the same training: it took what it took
            times = {k: self.result[k] for k in times if k in self.result}
        self.result = {"made_of": self.made_of, **times, **result}
        if rank() == 0:
            write(self.folder / "result.json", self.result)
            self.checkpoint.unlink(missing_ok=True)
        barrier()
