"""The steps of every method and of the attacks, run on tensors that hold nothing and say they are
on a GPU: what would wait for it, and which kernels are launched. Needs no GPU.

Meta tensors, not FakeTensorMode: a torch built without CUDA cannot even slice a fake CUDA tensor.
"""

import contextlib
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import embed as e
import kernels

GPU = torch.device("meta")
KERNELS = {
    "adain": ("_forward_kernel", "_backward_kernel"),
    "augment": ("_kernel",),
    "gaussian_cutout": ("_kernel",),
    "masked_step": ("_kernel",),
    "place_patches": ("_kernel",),
    "tanh_perturb": ("_forward_kernel", "_backward_kernel"),
    "window_energy": ("_kernel",),
}
aten = torch.ops.aten
WAIT = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select)


class Rng(torch.Generator):
    """Says it is on the GPU: nothing is drawn."""

    device = GPU


class Recorder(TorchDispatchMode):
    """Counts operations; those that wait for the GPU by name, and answers them."""

    def __init__(self):
        super().__init__()
        self.waits, self.operations, self.launched = [], 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        packet = function.overloadpacket
        if packet in WAIT and args[0].device == GPU:
            self.waits.append(str(packet))
            x = args[0]
            if packet is aten.nonzero:  # as if it were true for half
                return x.new_empty(x.numel() // 2, x.dim(), dtype=torch.long)
            return 1
        if packet in (aten._to_copy, aten.copy_):
            source = args[0] if packet is aten._to_copy else args[1]
            target = kwargs.get("device") or args[0].device
            if source.device != target and source.numel():
                self.waits.append(f"{packet} {source.device} to {target}")
            if source.device == GPU != target:
                return torch.ones(source.shape, dtype=source.dtype, device="cpu")
        return function(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """Fake CUDA tensors, Triton's launches recorded by name."""
    recorder = Recorder()

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: recorder.launched.add(self.name)

    for name, each in KERNELS.items():
        module = importlib.import_module(f"kernels.{name}")
        for kernel in each:
            assert hasattr(module, kernel), (name, kernel)
            monkeypatch.setattr(module, kernel, Launch(name))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    on_gpu = property(lambda self: self.device == GPU)
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with GPU, recorder:
        yield recorder


def step(method, monkeypatch, **settings):
    small = {"preset": "demo", "width": 1 / 16, "dim": 16, "batch": 8, "attack_steps": 3}
    config = e.Config(method=method, **{**small, **settings})
    with fake_gpu(monkeypatch) as recorder:
        people = object.__new__(e.Sampler)
        people.images = torch.empty(40, 3, 64, 64, dtype=torch.uint8)
        people.person, people.count = (torch.empty(n, dtype=torch.long) for n in (40, 10))
        people.table, people.several = torch.empty(10, 4).long(), torch.empty(10).long()
        made = lambda identity, content, pixels=None: torch.empty(len(identity), 3, 64, 64)
        embed = e.Embedding(config.width, config.dim, True)
        adam = torch.optim.Adam(embed.parameters(), lr=1e-3, fused=False, foreach=True)
        recorder.waits.clear()
        e.train_step(config, embed, adam, people, made if config.generated else None, Rng(), 8.0)
    return recorder


LOSS, ROWS = "aten._to_copy meta to cpu", "aten.nonzero"
LAUNCHED = {"ours": {"augment", "masked_step"}, "no-at": {"augment"}}
LAUNCHED["weak-at"] = LAUNCHED["ours"] | {"gaussian_cutout"}
LAUNCHED["doa"] = LAUNCHED["weak-at"] | {"place_patches", "window_energy"}


@pytest.mark.skipif(kernels.triton is None, reason="no Triton")
@pytest.mark.parametrize("method", e.CHOICES["method"])
def test_a_step_waits_for_the_loss_and_the_erased_rows_alone(method, monkeypatch):
    found = step(method, monkeypatch)
    assert found.waits == [ROWS, LOSS][method == "no-at" :]
    assert found.launched == LAUNCHED[method]


@pytest.mark.skipif(kernels.triton is None, reason="no Triton")
def test_more_inner_steps_wait_for_nothing(monkeypatch):
    few, many = (step("doa", monkeypatch, attack_steps=n) for n in (1, 4))
    assert few.waits == many.waits and few.operations < many.operations


def test_the_recorder_notices_a_wait(monkeypatch):
    with fake_gpu(monkeypatch) as recorder:
        x = torch.ones(3)
        assert x.is_cuda and not recorder.waits
        float(x.sum())
        (x > 0).nonzero()
        torch.tensor([1, 2], device="cpu").to(GPU)
    assert recorder.waits == ["aten._local_scalar_dense", ROWS, "aten._to_copy cpu to meta"]
