"""The steps of every method and the loop of the attacks, run on tensors that hold nothing and say
they are on a GPU: what would make the host wait for it, and which kernels are launched. No GPU.

The tensors are meta tensors (not FakeTensorMode: a torch built without CUDA cannot even slice a
fake CUDA tensor).
"""

import contextlib
import importlib

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
import embed as e
import generator
import kernels

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="no Triton")
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
    """Notes what waits for the GPU, and answers: a number is 1, none of `any` is true, nonzero is
    a half of all, two whole numbers are the sides of the eyeglasses' box."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.kernels, self.operations = list[str](), list[str](), 0
        self.none = list[Tensor]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function.overloadpacket
        self.operations += 1
        if packet in WAIT and args[0].device == GPU:
            self.waits.append(str(packet))
            if packet is aten.nonzero:
                shape = int(args[0].numel() * 0.5), args[0].dim()
                return args[0].new_empty(*shape, dtype=torch.long)
            return int(not any(args[0] is each for each in self.none))
        if packet in (aten._to_copy, aten.copy_):
            source = args[0] if packet is aten._to_copy else args[1]
            target = kwargs.get("device") or args[0].device
            if source.device != target and source.numel():
                self.waits.append(f"{packet} {source.device} to {target}")
            if source.device == GPU != target:
                sides = source.shape == (2,) and not source.is_floating_point()
                answer = torch.tensor([16, 32]) if sides else torch.ones(source.shape)
                return answer.to(source.dtype)
        if packet is aten._fused_adam_:  # has no form for meta tensors
            return None
        result = function(*args, **kwargs)
        if packet is aten.any:
            self.none.append(result)
        return result


class Autocast(TorchFunctionMode):
    """torch.autocast knows no meta tensors: products in bfloat16, each weight cast once."""

    def __init__(self, _: str, dtype: torch.dtype, enabled: bool = True) -> None:
        super().__init__()
        self.dtype, self.enabled, self.cast = dtype, enabled, dict[int, Tensor]()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        products = (torch.conv2d, torch.nn.functional.linear, torch.matmul)
        if self.enabled and function in products:
            args = [self.narrow(x) if isinstance(x, Tensor) else x for x in args]
        return function(*args, **(kwargs or {}))

    def narrow(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype) if x.dtype == torch.float32 else x
        if id(x) not in self.cast:
            with torch.enable_grad():
                self.cast[id(x)] = x.to(self.dtype)
        return self.cast[id(x)]


@contextlib.contextmanager
def fake_gpu():
    """Meta tensors say they are on a GPU; what is done with them is recorded."""
    recorder = Recorder()

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: recorder.kernels.append(self.name)

    with pytest.MonkeyPatch.context() as patch:
        for name, each in KERNELS.items():
            module = importlib.import_module(f"kernels.{name}")
            for kernel in each:
                patch.setattr(module, kernel, Launch(name))
        patch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        patch.setattr(torch, "autocast", Autocast)
        rules = importlib.import_module(torch.optim.Adam.__module__)
        patch.setattr(rules, "_device_dtype_check_for_fused", lambda *_, **__: None)
        on_gpu = property(lambda self: self.device == GPU)
        patch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
        with recorder:
            yield recorder


def step(method, **settings):
    """One step of the product's training."""
    small = {"preset": "demo", "width": 1 / 16, "dim": 16, "batch": 8, "attack_steps": 3}
    config = e.Config(method=method, **{**small, **settings})
    with fake_gpu(), GPU:
        sampler = object.__new__(e.Sampler)
        sampler.images = torch.empty(40, 3, 64, 64, dtype=torch.uint8)
        sampler.person, sampler.count = (torch.empty(n, dtype=torch.long) for n in (40, 10))
        sampler.table, sampler.paired = torch.empty(10, 4).long(), torch.empty(10).long()
        lord = generator.Config(**generator.PRESETS["demo"])
        codes = torch.empty(40, lord.class_dim), torch.empty(40, lord.content_dim)
        G = generator.Lord(lord).eval().requires_grad_(False).generator
        copies = torch.empty(40, 3, 64, 64, dtype=torch.half)
        G = e.Generated(G, *codes, copies) if config.generated else None
        embed = e.Embedding(config.width, config.dim, config.standardise)
        adam = torch.optim.Adam(embed.parameters(), lr=1e-3, fused=True)
    with fake_gpu() as recorder, GPU:
        e.train_step(config, embed, adam, sampler, G, Rng(), 8.0)
    return recorder


LOSS, ROWS = "aten._to_copy meta to cpu", "aten.nonzero"
ALL = {"augment", "gaussian_cutout", "masked_step"}
STEPS = {  # what waits: the loss, and the erased rows where not all are attacked
    "ours": ([ROWS, LOSS], {"adain", "augment", "masked_step"}),
    "transfer": ([ROWS, LOSS], {"adain", "augment", "masked_step"}),
    "mixed": ([LOSS], ALL | {"adain"}),
    "no-at": ([LOSS], {"adain", "augment"}),
    "weak-at": ([LOSS], ALL),
    "doa": ([LOSS], ALL | {"place_patches", "window_energy"}),
}


@pytest.mark.parametrize("method", STEPS)
def test_a_step_waits_for_the_loss_and_for_the_erased_rows(method):
    recorder = step(method)
    assert (recorder.waits, {*recorder.kernels}) == STEPS[method]


def test_more_inner_steps_and_bfloat16_wait_for_nothing():
    few, many = (step("doa", attack_steps=n, precision="bfloat16") for n in (1, 4))
    assert few.waits == many.waits == [LOSS] and few.operations < many.operations
    assert many.kernels.count("masked_step") == 4


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
@pytest.mark.parametrize(
    "settings", ({}, {"optimiser": "sign"}, {"decay": True}, {"shared": True}), ids=str
)
def test_an_iteration_of_an_attack_waits_for_nothing(settings, precision):
    settings = {"precision": precision, "restarts": 1, **settings}
    shared = settings.pop("shared", False)

    def attack(iterations):
        """The loop of every attack: a patch for each of eight images, or one for all of them."""
        with GPU:
            embed = e.Mirrored(e.Embedding(1 / 16)).requires_grad_(False)
            images, anchor = torch.empty(8, 3, 64, 64), torch.empty(8, 128)
            pixels = torch.empty(8, 107, dtype=torch.long)
            start = torch.empty(1 if shared else 8, 3, 107)
        with fake_gpu() as recorder:
            size = 4 if shared else 8
            batches = [*zip(*(x.split(size) for x in (images, pixels, anchor)))]
            attacks.optimise(embed, batches, start, start, attacks.Effort(iterations, **settings))
        return recorder

    few, many = attack(2), attack(12)
    assert few.waits == many.waits and few.operations < many.operations
    sign = settings.get("optimiser") == "sign"
    assert {*many.kernels[len(few.kernels) :]} == (set() if sign else {"tanh_perturb"})


def test_the_recorder_notices_a_wait():
    with fake_gpu() as recorder, GPU:
        x = torch.ones(3)
        assert x.is_cuda and not recorder.waits
        float(x.sum())
        (x > 0).nonzero()
        torch.tensor([1, 2], device="cpu").to(GPU)
    assert recorder.waits == ["aten._local_scalar_dense", ROWS, "aten._to_copy cpu to meta"]
