"""Every kernel, as its op launches it, compiles for every GPU generation without a GPU and without
register spills.

`python -m tests.test_compile` prints the table: registers, spills and shared memory of each kernel
and target (bfloat16, contiguous).
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

try:
    import triton
except ImportError:
    triton = None

TARGETS = (75, 80, 86, 89, 90, 120)
COMPILED: dict[str, tuple[int, int]] = {}  # registers and spilled bytes of each binary


def calls():
    """Each op with arguments that launch its kernels once, on CPU tensors that stand for those of a
    GPU."""
    import torch

    from kernels.adain import adain
    from kernels.augment import augment
    from kernels.gaussian_cutout import gaussian_cutout
    from kernels.masked_step import masked_step
    from kernels.place_patches import place_patches, positions
    from kernels.tanh_perturb import tanh_perturb
    from kernels.window_energy import window_energy

    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16)

    def both_ways(op, *arguments):
        op(*arguments).sum().backward()

    x, boxes, alpha = zeros(2, 3, 64, 64), torch.tensor([[3, 4, 20, 20]] * 2), torch.ones(2)
    moves = {"flips": alpha > 0, "shifts": boxes[:, :2], "boxes": boxes}
    places = positions(64, 64, 20, 20, 5)
    plane, delta = zeros(2, 256, 64, 64).requires_grad_(), zeros(2, 3, 107).requires_grad_()
    return {
        "boxes": partial(masked_step, x, x, alpha, boxes),
        "gaussian": partial(gaussian_cutout, x, boxes=boxes),
        "shared": partial(place_patches, x, zeros(1, 1, 3, 20, 20), places),
        "stride 5": partial(window_energy, x, 20, 20, 5),
        "mask": partial(both_ways, tanh_perturb, zeros(2, 3, 107), delta),
        "bytes": partial(augment, x.byte(), layout=torch.channels_last, **moves),
        "256 channels 64x64": partial(both_ways, adain, plane, zeros(2, 256), zeros(2, 256)),
    }


def record(call):
    """The launches of one call, not executed: (kernel, arguments by name)."""
    from triton.runtime.jit import JITFunction

    launches = []

    def recorded(self, *args, grid=None, warmup=False, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", recorded)
        for name in [name for name in sys.modules if name.startswith("kernels.")]:
            patch.setattr(f"{name}.runs_triton", lambda x: True, raising=False)
        call()
    return launches


def compiled(kernel, arguments, target):
    """Compile one launch for one target; registers, bytes spilled, bytes of shared memory."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
    names |= {torch.int32: "*i32", torch.int64: "*i64"}
    options = {k: arguments[k] for k in ("num_warps", "num_stages") if k in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names)):
        value = arguments[name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = names[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if type(value) is int and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # what ptxas -v says
        binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    if used := re.search(r"Used (\d+) registers", log.getvalue()):
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
        COMPILED[binary.hash] = int(used[1]), spilled
    # two launches may be one kernel, which is compiled once
    return *COMPILED[binary.hash], binary.metadata.shared


def table(chosen=()):
    """Rows (kernel, label, target, registers, spilled, shared) of these modules, all by default."""
    for label, call in calls().items():
        for kernel, arguments in record(call):
            module = kernel.fn.__module__.removeprefix("kernels.")
            for target in TARGETS if not chosen or module in chosen else ():
                name = f"{module}.{kernel.fn.__name__.strip('_')}"
                label_of = f"bfloat16 contiguous {label}"
                yield name, label_of, target, *compiled(kernel, arguments, target)


def test_compiles_for_every_target_without_spills(tmp_path):
    from tests.conftest import OPS  # not above: it chooses the interpreter

    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    how = {"cwd": Path(__file__).parents[1], "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "tests.test_compile"]
    halves = [subprocess.Popen([*command, *OPS[k::2]], env=environment, **how) for k in (0, 1)]
    printed = [half.communicate()[0] for half in halves]  # at once, on two cores
    assert [half.returncode for half in halves] == [0, 0]
    rows = [line.split(",") for text in printed for line in text.splitlines()[1:]]
    assert {row[0].split(".")[0] for row in rows} == {*OPS}
    assert {int(row[2]) for row in rows} == set(TARGETS)
    # the pinned compiler; another one allots registers differently (3.6: augment on sm_120)
    if triton.__version__.startswith("3.7."):
        assert not [row for row in rows if row[4] != "0"], "register spills"


if __name__ == "__main__":
    print("kernel,variant,target,registers,spilled_bytes,shared_bytes")
    with tempfile.TemporaryDirectory() as cache:  # nothing cached: ptxas must speak
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        for row in table(sys.argv[1:]):
            print(*row, sep=",", flush=True)
