"""A run, for every script: flags, devices, files, and trainings that go on by themselves.

    config, args = run.parse(Config, PRESETS, argv, "Train F.")  # a flag for each field
    device = run.start(args.device)  # a GPU if there is one; under torchrun this process's own
    training = run.Training(folder, made_of, args.overwrite, model=model, adam=adam)
    run.command("embed.py", main, argv)  # exit status, one line for an error

What stands here is neither the paper nor one stage's own command. A file is written beside its
place, synced and renamed, so that a crash leaves the old file or the new one. Checkpoints are read
with `weights_only`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # of an integer flag
CHECKPOINT_EVERY = 60.0  # seconds: at full width a checkpoint holds 179 MB
HERE = Path(__file__).parent
File = str | os.PathLike[str]


class UsageError(ValueError):
    """Something the user can put right: one line that names the file or flag and says what to
    do."""


# the command line


@functools.cache
def notes(settings: type) -> dict[str, str]:
    """What the source says beside each of a dataclass's fields: the help of its flag."""
    with contextlib.suppress(OSError):  # no source at hand
        source = inspect.getsource(settings)
        return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    return {}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (--help lists the flags)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _several(kind: type) -> Callable[[str], tuple]:
    def values(text: str) -> tuple:
        return tuple(kind(value.strip()) for value in text.split(",") if value.strip())

    values.__name__ = f"list of {kind.__name__}s"
    return values


def parse(
    settings: type,
    presets: dict[str, dict],
    argv: Sequence[str] | None,
    about: str,
    choices: dict[str, tuple] | None = None,
    preset: str | Callable[[argparse.Namespace], str] = "demo",
    **more: dict,
) -> tuple[Any, argparse.Namespace]:
    """A frozen dataclass made from the command line, and the flags that are not its fields.

    A flag wins over the preset, the preset (field `preset`; by default this one) over the field's
    default. choices: for a field the words it takes, or (lowest, highest); without them an integer
    is at least 1, a float at least 0. A tuple is given with commas, one of words also as `all`.
    more: further flags, name -> arguments of `add_argument`. Always there: --run (by default the
    settings' own `run`, if they have one), --overwrite, --device. Raises UsageError.
    """
    choices, fields = choices or {}, dataclasses.fields(settings)
    words = {k: v for k, v in choices.items() if isinstance(v[0], str)}
    parser = _Parser(description=f"{about} In brackets: the paper's value; the demo's.")
    for field in fields:
        default, known = field.default, words.get(field.name)
        demo = presets.get("demo", {}).get(field.name, default)
        note = notes(settings).get(field.name, "")
        told = f"{note} [{default!r}{f'; demo: {demo!r}' * (demo != default)}]".replace("%", "%%")
        how: dict[str, Any] = {"help": told.strip(), "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            how |= {"type": _several(type(default[0])), "metavar": "A,B"}
        else:
            kind = type(default)
            how |= {"type": kind, "choices": known, "metavar": None if known else kind.__name__}
        parser.add_argument(_flag(field.name), **how)
    usual: dict[str, dict] = {
        "run": {"type": Path, "help": "folder of the run (default runs/<data>-<preset>-<seed>)"},
        "overwrite": {"action": "store_true", "help": "start again over what is there"},
        "device": {"default": "", "help": "cpu, cuda, ... (default: a GPU if there is one)"},
    }
    for name, how in (usual | more).items():
        parser.add_argument(_flag(name), **how)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}
    if any(f.name == "preset" for f in fields):
        if "preset" not in given:
            given["preset"] = preset if isinstance(preset, str) else preset(args)
        if given["preset"] not in presets:
            raise UsageError(f"--preset {given['preset']}: choose {', '.join(presets)}")
    config = settings(**{**presets.get(given.get("preset", ""), {}), **given})
    checked = {f.name: _checked(config, f.name, choices.get(f.name)) for f in fields}
    config = dataclasses.replace(config, **checked)
    args.run = args.run or getattr(config, "run", None)
    return config, args


def _checked(config: Any, name: str, known: tuple | None) -> Any:
    """The value of a field; UsageError naming the flag unless it is within its bounds or words."""
    value, flag = getattr(config, name), _flag(name)
    default = type(config).__dataclass_fields__[name].default
    if isinstance(value, list):  # what argparse makes of --flag=--
        raise UsageError(f"{flag}: give a value")
    several = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and isinstance(default[0], str):
        if known and value == ("all",):
            return known
        for word in value or ("",):
            if known and word not in known:
                raise UsageError(f"{flag} {word}: choose all or some of {', '.join(known)}")
        return value
    told = ",".join(map(str, several))
    if isinstance(value, tuple):
        counts = (1, 2) if len(default) == 1 else (len(default),)  # a side, or height and width
        if len(value) not in counts:
            raise UsageError(f"{flag} {told}: give {' or '.join(map(str, counts))} numbers")
    if isinstance(value, (bool, str)):
        return value
    whole = isinstance(default[0] if isinstance(default, tuple) else default, int)
    low, high = known or ((1, LARGEST) if whole else (0, 1e9))
    if not all(low <= v <= high for v in several):
        numbers = "numbers" if len(several) > 1 else "a number"
        raise UsageError(f"{flag} {told}: give {numbers} from {low} to {high}")
    return value


def command(name: str, work: Callable, argv: Sequence[str] | None = None) -> int:
    """work(argv) and its exit status; what the user, the disk or the numbers did is one line.

    0; 2 for UsageError and OSError, 1 for a loss that is not finite, 130 for Ctrl-C. Rank 0 speaks.
    """
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # a name that the console has no letters for ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        return work(argv) or 0
    except UsageError as error:
        status, line = 2, str(error)
    except OSError as error:
        status, what = 2, error.strerror or error
        line = f"{error.filename or 'files'}: {what}: fix that and run the same command again"
    except FloatingPointError as error:
        status, line = 1, str(error)
    except KeyboardInterrupt:
        status, line = 130, "interrupted; the same command goes on from the last checkpoint"
    if world() > 1:
        # torchrun's, which follows, needs no line of its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{name}: {line}", file=sys.stderr)
    return status


def then(stage: str, argv: Sequence[str]) -> int:
    """The command of another stage, by name, in this process: its exit status."""
    return importlib.import_module(stage).main(argv)


# devices and processes: torchrun starts one process for each


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(flag: str, whole: int) -> int:
    """This process's part of a batch; UsageError unless torchrun's processes divide it."""
    if whole % world():
        told = f"must divide by torchrun's {world()} processes: give a multiple of {world()}"
        raise UsageError(f"{flag} {whole}: {told}")
    return whole // world()


def _ended(why: object) -> None:
    """One line and the end, whatever this process was doing."""
    why = " ".join(str(why).split())[:120]
    line = f"process {rank()} of {world()} stops, as another one or torchrun has ended ({why})"
    os.write(2, f"{Path(sys.argv[0]).name}: {line}; the same command goes on\n".encode())
    os._exit(1)


def _together(collective: Callable, *args: object) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        _ended(error)


def barrier() -> None:
    """Wait for the other processes; nothing without torchrun."""
    if world() > 1:
        _together(torch.distributed.barrier)


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others, which find what it wrote, or fail too."""
    if rank():
        barrier()
    try:
        yield
    finally:
        if not rank():
            barrier()


def keep_memory() -> None:
    """What is freed is kept for the next step: else glibc gives it back to the kernel, and a demo
    step faults 13,000 pages in again, 4 to 10 % of its time. Nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if not libc.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD
            libc.mallopt(-3, 1 << 25)  # the most that some take


def start(device: str = "") -> torch.device:
    """The device asked for, else a GPU if there is one; under torchrun this process's own.

    There it joins the group, and from here on rank 0 alone prints. Raises UsageError.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:100]
        told = f"cannot be used here ({reason}): give cpu, or a device torch sees"
        raise UsageError(f"--device {device}: {told}") from None
    keep_memory()
    if world() > 1 and found.type == "cuda":
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if found.index >= (there := torch.cuda.device_count()):
            raise UsageError(f"torchrun: this machine has {there} GPUs: start no more processes")
        torch.cuda.set_device(found)
    if world() > 1 and not torch.distributed.is_initialized():
        signal.signal(signal.SIGTERM, lambda *_: _ended("SIGTERM"))
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        backend = "nccl" if found.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))
    return found


def precision(asked: str, device: torch.device) -> str:
    """float32, tf32 or bfloat16; auto: bfloat16 where the device multiplies it faster. Raises
    UsageError for tf32 where there is none."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked == "tf32" and not ampere:
        told = f"{device.type} has none, NVIDIA GPUs from compute capability 8.0 have"
        raise UsageError(f"--precision tf32: {told}: give float32 or bfloat16")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if ampere else "float32"
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    fast = found.get("avx512_bf16") or found.get("amx_bf16")
    return "bfloat16" if fast and device.type == "cpu" else "float32"


def tf32(allowed: bool) -> None:
    """Whether a GPU may take TF32 for products of float32, from here on."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def compile_(*modules: torch.nn.Module, backend: str = "inductor") -> None:
    """These modules by torch.compile from here on, for any batch. Raises UsageError without a
    compiler."""
    device = next(modules[0].parameters()).device
    try:
        torch.compile(torch.sin, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001  dynamo raises many kinds
        reason = " ".join(str(error).split())[:100]
        told = f"torch.compile fails on {device} ({reason}): leave it out, or install a compiler"
        raise UsageError(f"--compile: {told}") from None
    for module in modules:
        module.compile(dynamic=True, backend=backend)


def average_gradients(optimiser: torch.optim.Optimizer) -> None:
    """Each step of the optimiser takes the mean of the processes' gradients, in one message."""

    def mean(optimiser: torch.optim.Optimizer, *_: object) -> None:
        weights = [p for group in optimiser.param_groups for p in group["params"]]
        grads = [p.grad for p in weights if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        _together(torch.distributed.all_reduce, flat)
        for g, found in zip(grads, (flat / world()).split([g.numel() for g in grads])):
            g.copy_(found.view_as(g))

    if world() > 1:
        optimiser.register_step_pre_hook(mean)


def step_seed(seed: int, step: int, spread: int = 1_000_003) -> int:
    """Of a step's random numbers: of seed, step and rank alone, so no random state is saved."""
    return seed * spread + step + rank() * 2_000_000_011


# files


def write(path: File, content: bytes | str | dict | Callable[[Any], object]) -> None:
    """Bytes, text, a dict as JSON, or what content(file) writes. Raises UsageError."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    if isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    raw = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with open(beside, "wb") as file:
            raw(file) if callable(raw) else file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        told = f"cannot be written ({reason}): free some space, or name another place"
        raise UsageError(f"{path}: {told}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed writers of path left beside it, once a minute old."""
    for beside in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - beside.stat().st_mtime > 60:
                beside.unlink()


@contextlib.contextmanager
def reading(path: File, advice: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes one line: file, reason, advice."""
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
    """A JSON file's object. Raises UsageError."""
    with reading(path, advice):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not an object")
        return content


def save(path: File, kind: str, **content: object) -> None:
    """A checkpoint that says what it is. Raises UsageError."""
    write(path, lambda file: torch.save({"kind": kind, **content}, file))


def load(path: File, kind: str) -> dict:
    """A checkpoint, on the CPU. Raises UsageError if missing, broken, or of another kind."""
    with reading(path, "restore the file, train it again, or name another --run"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise ValueError(f"not a checkpoint of kind {kind!r}")
        return content


def fingerprint(*parts: Tensor | File | None) -> str:
    """Sixteen hexadecimal digits that another value, or another file's content, changes."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            for some in part.split(4096):
                found.update(some.cpu().contiguous().numpy().tobytes())
        elif part is not None:
            found.update(Path(part).read_bytes())
    return found.hexdigest()[:16]


def differences(old: dict, new: dict) -> str:
    """The entries in which two records differ, as text; empty if they agree."""

    def flat(record: dict) -> dict:
        plain = json.loads(json.dumps(record))  # tuples become lists
        inner = [flat(v) if isinstance(v, dict) else {k: v} for k, v in plain.items()]
        return {k: v for part in inner for k, v in part.items()}

    a, b = flat(old), flat(new)
    names = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return ", ".join(f"{k} ({a.get(k)} before, {b.get(k)} now)" for k in names)


@functools.cache
def commit() -> str:
    """Of this checkout, with -dirty where a tracked file was changed; "unknown" outside one."""
    git = f"git -C {shlex.quote(str(HERE))} describe --always --dirty --abbrev=7 --exclude=*"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            shlex.split(git), text=True, stderr=subprocess.DEVNULL, timeout=10
        ).strip()
    return "unknown"


def record(device: torch.device) -> dict[str, str]:
    """Device, versions and commit, to stand beside every result."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} x{torch.get_num_threads()}"
    name += f", {world()} processes" * (world() > 1)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, **versions, "commit": commit()}


class Training:
    """A training that goes on by itself: log.jsonl, training.ckpt until it ends, then result.json.

    made_of: what must be the same to go on (settings, persons, images, ...), a dict for JSON;
    parts: what has a state_dict. After a stop the same command goes on from the last checkpoint,
    bit for bit if a step's random numbers depend on `step_seed` alone. Raises UsageError, naming
    the difference, where another training is in the folder; overwrite starts again. `step` counts,
    `seconds` it took, `best` is the caller's to keep, `result` is there once it is `done`.
    """

    def __init__(
        self, folder: Path, made_of: dict, overwrite: bool = False, unit: str = "step", **parts: Any
    ) -> None:
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
            self._same(self.result.get("made_of"), ended)
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

    def _same(self, made_of: object, path: Path) -> None:
        if not isinstance(made_of, dict):
            raise UsageError(f"{path}: does not say what was trained: use --overwrite")
        if differs := differences(made_of, self.made_of):
            advice = "use those again, --overwrite, or another --run"
            raise UsageError(f"{path}: another training: {differs}: {advice}")

    def _go_on(self) -> None:
        state = load(self.checkpoint, "training")
        self._same(state.get("made_of"), self.checkpoint)
        with reading(self.checkpoint, "it does not hold this training: use --overwrite"):
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.best = float(state["best"])
        if rank() == 0:
            write(self.log_file, "".join(f"{line}\n" for line in self._lines()))
            if (now := commit()) != state["commit"]:
                told = f"WARNING: {self.folder}: begun at commit {state['commit']}, now {now}"
                print(told, file=sys.stderr)
        print(f"{self.folder}: goes on at {self.unit} {self.step}", flush=True)

    def _lines(self) -> Iterator[str]:
        """The log's lines that are whole and not beyond the checkpoint."""
        held = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        for line in held.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)[self.unit] <= self.step:
                    yield line

    def _save(self) -> None:
        numbers = {k: getattr(self, k) for k in ("made_of", "step", "seconds", "best")}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.checkpoint, "training", commit=commit(), **numbers, **states)
        self._saved = time.time()

    def count(self, **values: float) -> None:
        """A step is done; its values wait for the log."""
        self.step += 1
        self._values.append(values)

    def log(self, steps: int, **values: float) -> dict[str, float]:
        """The means of what was counted since the last line; a checkpoint, at first, at the end and
        once a minute. Rank 0's alone."""
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
        told = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in {**means, **values}.items())
        print(f"{self.unit} {self.step}/{steps}  {told}  left {left:.1f} min", flush=True)
        return line

    def left_by(self, index: Tensor, files: Sequence[str], pick: Tensor) -> str:
        """For a step that failed: its images, by index among the picked (N,) of all files, and the
        last checkpoint."""
        where = pick[index.cpu()].tolist()
        left = self.checkpoint if self.checkpoint.exists() else "none yet"
        told = f"images {where} of the data, the first is {files[where[0]]}"
        return f"{told}; last good checkpoint: {left}"

    def end(self, **result: object) -> None:
        """The result is written and the checkpoint goes; rank 0's alone."""
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
