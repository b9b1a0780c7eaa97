"""Without a GPU the kernels run in the Triton interpreter: it must be chosen before Triton is first
imported. And one thread a process, also of commands that are started: small tensors are no faster
with two."""

import contextlib
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

from data import run, synthetic

run.CHECKPOINT_EVERY = 0.0  # at every line of a log: what is short here has several too

OPS = (
    "masked_step",
    "gaussian_cutout",
    "place_patches",
    "window_energy",
    "tanh_perturb",
    "augment",
    "adain",
)


def triton_version() -> tuple[int, ...]:
    """(major, minor); without Triton, where the references run, a large one."""
    from kernels import triton

    return tuple(int(n) for n in triton.__version__.split(".")[:2]) if triton is not None else (99,)


@pytest.fixture(autouse=True)
def kernel_mode(request, monkeypatch):
    """In tests/test_<op>.py: kernels run, and torch.empty comes filled with NaN. Elsewhere, also in
    subprocesses: the references run, since the interpreter is slow."""
    if request.module.__name__.split("test_")[-1] not in OPS:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        yield
        return
    numpy_is_new = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    if not torch.cuda.is_available() and triton_version() < (3, 7) and numpy_is_new:
        why = "Triton's interpreter before 3.7 fails on NumPy 2.4 (a loop to a bound of run time)"
        pytest.skip(f"{why}: pip install 'numpy<2.4'")
    before = torch.are_deterministic_algorithms_enabled()
    # its fill_uninitialized_memory is on by default
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def rendered_once(request, monkeypatch, faces={}):  # noqa: B006  kept from test to test
    """Many tests ask for the same rendered faces; tests/test_synthetic.py renders each time."""

    def chunk(*arguments, render=synthetic._render_chunk):
        identity, content, size = arguments
        key = identity.numpy().tobytes(), content.numpy().tobytes(), size
        if key not in faces:
            faces[key] = render(*arguments)
        return faces[key].clone()

    if not request.module.__name__.endswith("test_synthetic"):
        monkeypatch.setattr(synthetic, "_render_chunk", chunk)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launched(monkeypatch, request):
    """The kernels the test launched, in order, as (name, {constexpr: value})."""
    module = importlib.import_module("kernels." + request.module.__name__.split("test_")[-1])
    calls = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                calls.append((self.name, constants))
                return self.kernel[grid](*args, **constants)

            return launch

    for name, value in list(vars(module).items()):
        if name.startswith("_") and name.endswith("kernel") and hasattr(value, "arg_names"):
            monkeypatch.setattr(module, name, Recorder(name, value))
    return calls


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Bit for bit, except that the interpreter truncates to bfloat16 where a GPU rounds: there one
    bfloat16 step (2^-7) is allowed."""
    alike = got.dtype == want.dtype and got.shape == want.shape
    if got.dtype != torch.bfloat16 or got.is_cuda or not alike:
        return torch.equal(got, want)
    return bool(((got.float() - want.float()).abs() <= 2.0**-7 * want.float().abs()).all())


@pytest.fixture
def interrupted_at(monkeypatch):
    """interrupted_at(owner, name, n): Ctrl-C at the n-th call of owner.name, within the block; it
    gives the list of calls made."""

    @contextlib.contextmanager
    def block(owner, name, n):
        real, calls = getattr(owner, name), []

        def counted(*args, **keywords):
            calls.append(args)
            if len(calls) == n:
                raise KeyboardInterrupt
            return real(*args, **keywords)

        monkeypatch.setattr(owner, name, counted)
        yield calls
        monkeypatch.setattr(owner, name, real)

    return block
