"""Every kernel, as its op launches it, compiles for every GPU generation without a GPU and without
register spills.

`python -m tests.test_compile` prints the table: registers, spills and shared memory of each variant
and target.
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


def cases(quick=False):
    """(label, call): each call launches the kernels of one op once, on CPU tensors that stand for
    those of a GPU."""
    import torch

    from kernels.adain import adain
    from kernels.augment import augment
    from kernels.gaussian_cutout import gaussian_cutout
    from kernels.masked_step import masked_step
    from kernels.place_patches import place_patches, positions
    from kernels.tanh_perturb import tanh_perturb
    from kernels.window_energy import window_energy

    def backward(op, *arguments):
        op(*arguments).sum().backward()

    def leaf(*shape):
        return torch.zeros(shape, requires_grad=True)

    boxes, alpha = torch.tensor([[3, 4, 20, 20]] * 2), torch.ones(2)
    places = positions(64, 64, 20, 20, 5)
    moves = {"flips": alpha > 0, "shifts": boxes[:, :2], "boxes": boxes}
    last = torch.channels_last
    for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.float16, torch.bfloat16):
        for layout in (torch.contiguous_format, last):
            if quick and layout is last:
                continue
            x = torch.zeros(2, 3, 64, 64, dtype=dtype).contiguous(memory_format=layout)
            u, under = (
                x.byte().contiguous(memory_format=layout),
                x[:, :, 0].repeat(1, 1, 2)[..., :107],
            )
            name = f"{str(dtype)[6:]} {str(layout)[6:].removesuffix('_format')}"

            def patch(*shape, dtype=dtype):
                return leaf(*shape).detach().to(dtype).requires_grad_()

            def normalise(C, side, layout=layout, patch=patch):
                plane = patch(2, C, side, side).detach().contiguous(memory_format=layout)
                backward(adain, plane.requires_grad_(), patch(2, C), patch(2, C))

            calls = {
                "boxes": partial(masked_step, x, x, alpha, boxes),
                "gaussian": partial(gaussian_cutout, x, boxes=boxes),
                "shared": partial(place_patches, x, patch(1, 1, 3, 20, 20), places),
                "stride 5": partial(window_energy, x, 20, 20, 5),
                "mask": partial(backward, tanh_perturb, under, patch(2, 3, 107)),
                "bytes": partial(augment, u, layout=last, **moves),
                "256 channels 64x64": partial(normalise, 256, 64),
            }
            if not quick:
                each = patch(2, len(places), 3, 20, 20)
                calls |= {
                    "uniform": partial(gaussian_cutout, x, boxes=boxes, fill="uniform"),
                    "grey": partial(place_patches, x, 0.5, places, (20, 20)),
                    "each": partial(place_patches, x, each, places),
                    "stride 1": partial(window_energy, x, 10, 10),
                    "universal": partial(backward, tanh_perturb, under, patch(1, 3, 107)),
                    "bytes uniform": partial(augment, u, fill="uniform", layout=layout, **moves),
                    "256 channels 4x4": partial(normalise, 256, 4),
                    "256 channels 32x32": partial(normalise, 256, 32),
                    "64 channels 256x256": partial(normalise, 64, 256),
                }
            for label, call in calls.items():
                yield f"{name} {label}", call


def record(call):
    """The launches of one call, not executed: (kernel, arguments by name)."""
    from triton.runtime.jit import JITFunction

    import kernels

    launches, run, runs_triton = [], JITFunction.run, kernels.runs_triton

    def recorded(self, *args, grid=None, warmup=False, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs))

    modules = [m for name, m in sys.modules.items() if name.startswith("kernels.")]
    try:
        JITFunction.run = recorded
        for module in modules:
            module.runs_triton = lambda x: True
        call()
    finally:
        JITFunction.run = run
        for module in modules:
            module.runs_triton = runs_triton
    return launches


def compiled(kernel, arguments, target):
    """Compile one launch for one target; registers, bytes spilled, bytes of shared memory."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    names |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
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
    if told := re.search(r"Used (\d+) registers", log.getvalue()):
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
        COMPILED[binary.hash] = int(told[1]), spilled
    # two variants may be one kernel, which is compiled once
    return *COMPILED[binary.hash], binary.metadata.shared


def table(quick=False, chosen=()):
    """Rows (kernel, label, target, registers, spilled, shared); quick: one variant of each kernel,
    bfloat16 contiguous."""
    for label, call in cases(quick):
        for kernel, arguments in record(call):
            module = kernel.fn.__module__.removeprefix("kernels.")
            name = f"{module}.{kernel.fn.__name__.strip('_')}"
            if chosen and module not in chosen:
                continue
            for target in TARGETS:
                yield name, label, target, *compiled(kernel, arguments, target)


def test_compiles_for_every_target_without_spills(tmp_path):
    from tests.conftest import OPS  # not above: it chooses the interpreter

    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.test_compile", "--quick"]
    told = {"cwd": Path(__file__).parents[1], "stdout": subprocess.PIPE, "text": True}
    halves = [subprocess.Popen([*command, *OPS[k::2]], env=environment, **told) for k in (0, 1)]
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
        chosen = [a for a in sys.argv[1:] if a != "--quick"]
        for row in table("--quick" in sys.argv, chosen):
            print(*row, sep=",", flush=True)
