"""Counts what a GPU would do, without one: launches, waits of the host, bytes, FLOP of the training
step of every method, of an iteration of the attacks and of the certificate.

    python -m tests.count [--width 1] [--batch 128] [--chunk 2048]

The code itself runs on tensors that hold nothing and say they are on a GPU (meta tensors, not
FakeTensorMode: a torch built without CUDA cannot even slice a fake CUDA tensor). Counted: every
operation that is not a view is a launch, a convolution with a bias two, its backward pass one for
each gradient; each reads its inputs and writes its outputs once. Estimated, not measured: the time
on an H100, of each operation the longer of its bytes at RATE and its FLOP at a share of PEAK.
"""

import argparse
import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import attacks
import embed as embedding
import generator

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
NOTHING = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach)
NOTHING += (aten.new_empty_strided, aten._unsafe_view, aten.alias, aten._reshape_alias)
PEAK = {"bfloat16": 790e12, "TF32": 395e12, "float32": 60e12}  # FLOP a second, an H100's
RATE = 3.0e12  # bytes a second
REACHED = {"forward": 0.60, "input": 0.55, "weight": 0.45}  # of PEAK, by convolutions


class Rng(torch.Generator):
    """Says it is on the GPU: nothing is drawn."""

    device = GPU


class Recorder(TorchDispatchMode):
    """Counts operations; those that wait for the GPU by name, and answers them: a number is 1, none
    of `any` is true, nonzero finds a share of all, two whole numbers are `size`. full: products of
    float32 are float32's, not TF32's."""

    def __init__(
        self, share: float = 0.5, size: tuple[int, int] = (1, 1), full: bool = False
    ) -> None:
        super().__init__()
        self.share, self.size, self.full, self.none = share, size, full, list[Tensor]()
        self.waits, self.kernels = list[str](), list[str]()
        self.launches = self.bytes = self.flop = self.seconds = self.floor = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function.overloadpacket
        if packet in WAIT and args[0].device == GPU:
            self.waits.append(str(packet))
            if packet is aten.nonzero:
                many = int(args[0].numel() * self.share)
                return args[0].new_empty(many, args[0].dim(), dtype=torch.long)
            return int(not any(args[0] is each for each in self.none))
        if packet in (aten._to_copy, aten.copy_):
            source = args[0] if packet is aten._to_copy else args[1]
            target = kwargs.get("device") or args[0].device
            if source.device != target and source.numel():
                self.waits.append(f"{packet} {source.device} to {target}")
            if source.device == GPU != target:
                whole = source.shape == (2,) and not source.is_floating_point()
                answer = torch.tensor(self.size) if whole else torch.ones(source.shape)
                return answer.to(source.dtype)
        fused = packet is aten._fused_adam_  # has no form for meta tensors
        result = None if fused else function(*args, **kwargs)
        if packet is aten.any:
            self.none.append(result)
        self.count(packet, function, args, kwargs, result)
        return result

    def count(self, packet, function, args, kwargs, result) -> None:
        given, made = (tensors([x]) for x in ((args, kwargs), result))
        if function.is_view or packet in NOTHING or not any(x.device == GPU for x in given + made):
            return
        flop = (
            flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        )
        launches, reached = 1, {"forward": 1.0}
        if packet is aten.convolution:
            launches += args[2] is not None
        if packet is aten.convolution_backward:
            mask = args[-1]
            launches = sum(mask)
            given = [x for x, needed in zip(args[:3], (1, mask[1], mask[0])) if needed]
            reached = {k: 1.0 for k, on in zip(("input", "weight"), mask) if on}
        self.add(launches, sum(x.nbytes for x in given + made), flop, reached, given)

    def add(self, launches: int, moved: int, flop: int, reached: dict, given: list[Tensor]) -> None:
        self.launches, self.bytes, self.flop = (
            self.launches + launches,
            self.bytes + moved,
            self.flop + flop,
        )
        narrow = torch.bfloat16 in [x.dtype for x in given]
        peak = PEAK["bfloat16" if narrow else "float32" if self.full else "TF32"]
        self.floor += flop / peak
        took = sum(flop / len(reached) / peak / REACHED[k] for k in reached)
        self.seconds += max(took, moved / RATE)

    def launch(self, name: str, *arguments, **_) -> None:
        self.kernels.append(name)
        given = tensors(arguments)
        self.add(1, sum(x.nbytes for x in given), 0, {}, given)


def tensors(x: object) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    if isinstance(x, dict):
        x = [*x.values()]
    if isinstance(x, (list, tuple)):
        return [each for part in x for each in tensors(part)]
    return [x] if isinstance(x, Tensor) else []


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
def fake_gpu(**answers) -> Iterator[Recorder]:
    """Meta tensors say they are on a GPU; what is done with them is recorded."""
    recorder = Recorder(**answers)

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return functools.partial(recorder.launch, self.name)

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
        patch.setenv("TRITON_INTERPRET", "0")
        with recorder:
            yield recorder


def training_step(method: str, **settings) -> Recorder:
    """One step of the product's training."""
    config = embedding.Config(method=method, **settings)
    with fake_gpu(), GPU:
        people = object.__new__(embedding.Sampler)
        people.images = torch.empty(40, 3, 64, 64, dtype=torch.uint8)
        people.person, people.count = (torch.empty(n, dtype=torch.long) for n in (40, 10))
        people.table, people.several = torch.empty(10, 4).long(), torch.empty(10).long()
        lord = generator.Config(**generator.PRESETS["demo"] if config.width < 1 else {})
        codes = torch.empty(40, lord.class_dim), torch.empty(40, lord.content_dim)
        G = generator.Lord(lord).eval().requires_grad_(False).generator
        copies = torch.empty(40, 3, 64, 64, dtype=torch.half)
        made = embedding.Generated(G, *codes, copies) if config.generated else None
        embed = embedding.Embedding(config.width, config.dim, config.standardise)
        adam = torch.optim.Adam(embed.parameters(), lr=1e-3, fused=True)
    with fake_gpu() as recorder, GPU:
        embedding.train_step(config, embed, adam, people, made, Rng(), 8.0)
    return recorder


def victim(width: float, images: int) -> tuple:
    """F with its mirror, images and an anchor."""
    with GPU:
        embed = attacks.Mirrored(embedding.Embedding(width))
        return embed, torch.empty(images, 3, 64, 64), torch.empty(128)


def attack(effort: attacks.Effort, width: float, images: int) -> Recorder:
    """Each of the images attacked under eyeglasses."""
    given = victim(width, images)
    with fake_gpu(share=107 / 4096, full=True, size=(16, 32)) as recorder:
        attacks.tanh_attack(*given, attacks.eyeglasses_mask(), effort)
    return recorder


def universal(effort: attacks.Effort, width: float, images: int) -> Recorder:
    """One eye patch for all images."""
    given = victim(width, images)
    with fake_gpu(share=384 / 4096, full=True, size=(12, 32)) as recorder:
        attacks.universal_patch(*given, attacks.eye_patch_mask(), effort, torch.Generator())
    return recorder


def search(effort: attacks.Effort, width: float, images: int) -> Recorder:
    """The square tried at each of its places."""
    given, places = victim(width, images), attacks.square_positions()
    with fake_gpu(share=100 / 4096, full=True, size=(12, 12)) as recorder:
        attacks.location_search(*given, places, effort, torch.Generator())
    return recorder


def certificate(width: float, images: int) -> Recorder:
    """The certificate of images against a 10 x 10 patch."""
    embed, given, _ = victim(width, images)
    with fake_gpu() as recorder:
        fill = torch.empty(3, 64, 64, device=GPU)
        rule = attacks.Covered(embed, given[0], attacks.cover(64, 64), fill)
    with fake_gpu(full=True) as recorder:
        rule.squared(given)
    return recorder


def iteration(of: Callable[[int], Recorder]) -> Recorder:
    """What one more iteration takes: a tenth of what 12 take more than 2."""
    few, many = of(2), of(12)
    for name in ("launches", "bytes", "flop", "seconds", "floor"):
        setattr(many, name, (getattr(many, name) - getattr(few, name)) / 10)
    many.waits = many.waits[len(few.waits) :: 10]
    return many


def rows(width: float, batch: int, chunk: int) -> Iterator[tuple[str, str, Recorder]]:
    """What is counted, in which products."""
    for products in ("TF32", "bfloat16"):
        how = {"width": width, "batch": batch, "precision": products.lower()}
        for method in embedding.CHOICES["method"]:
            yield f"training step, {method}", products, training_step(method, **how)
    eot = attacks.Eot(torch.rand(12, 4, 5), torch.rand(16, 5))
    efforts = {"Adam": {}, "sign": {"optimiser": "sign"}, "Adam, EOT": {"eot": eot}}
    for products in ("float32", "bfloat16"):
        for name, settings in efforts.items():

            def of(n: int, precision=products, settings=settings) -> Recorder:
                effort = attacks.Effort(n, 0.01, 1, chunk=chunk, precision=precision, **settings)
                return attack(effort, width, chunk // 2)

            yield f"iteration, {name}, {chunk // 2} images", products, iteration(of)
    yield "certificate, one image", "float32", certificate(width, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=float, default=1.0, help="of F, 1 is VGG16")
    parser.add_argument("--batch", type=int, default=128, help="quadruplets of a training step")
    parser.add_argument("--chunk", type=int, default=2048, help="views in a pass of an attack")
    a = parser.parse_args(argv)
    columns = "what, products, launches, waits, TFLOP, GB, estimated ms, estimated share of peak"
    print("|", columns.replace(", ", " | "), "|")
    print("| --- " * (columns.count(",") + 1) + "|")
    for name, products, found in rows(a.width, a.batch, a.chunk):
        numbers = f"{found.launches:.0f} | {len(found.waits)} | {found.flop / 1e12:.2f} | "
        numbers += f"{found.bytes / 1e9:.1f} | {found.seconds * 1e3:.1f} | "
        share = f"{found.floor / found.seconds:.0%}"
        print(f"| {name} | {products} | {numbers}{share} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
