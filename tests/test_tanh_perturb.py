"""tanh_perturb and attack_update against their references; exp and tanh differ in the last places, so tolerances are a few roundings."""

import pytest
import torch

from kernels.tanh_perturb import attack_update, attack_update_ref, tanh_perturb, tanh_perturb_ref, to_tanh

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    pytest.param((1, 1, 1, 1), id="1x1"),
    pytest.param((3, 3, 7, 5), id="odd"),
    pytest.param((2, 3, 11, 31), id="block-1"),
    pytest.param((1, 1, 32, 32), id="block"),
    pytest.param((1, 5, 5, 41), id="block+1"),
]
DTYPES = [  # dtype, rounding of values in [0, 1]: the interpreter truncates to bfloat16
    pytest.param(torch.float32, 2.0**-22, id="float32"),
    pytest.param(torch.float16, 2.0**-11, id="float16"),
    pytest.param(torch.bfloat16, 2.0**-8, id="bfloat16"),
]


def random(*shape, seed=0, device="cpu"):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def masks(B, H, W):
    some = random(B, 1, H, W, seed=9) < 0.4
    return {
        "none": None,
        "HW": some[0, 0],
        "BHW": some[:, 0].float(),
        "B1HW": some,
        "empty": some[0, 0] & False,
        "full": some[0, 0] | True,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype, rounding", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype, rounding, layout, device):
    w = to_tanh(random(*shape).round(decimals=1)).to(device, dtype).contiguous(memory_format=layout)  # 0 and 1 occur
    delta = (random(*shape, seed=1, device=device) * 4 - 2).to(dtype)
    mask = masks(*shape[:1], *shape[2:])["HW"].to(device)
    got, want = (op(w, delta, mask) for op in (tanh_perturb, tanh_perturb_ref))
    for a, b in zip(got, want):
        assert (a.float() - b.float()).abs().max() <= rounding
        assert a.dtype == dtype and a.is_contiguous(memory_format=layout)
    assert torch.equal(got[1], got[0].flip(-1)) and got[0].min() >= 0 and got[0].max() <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("form", ("none", "HW", "BHW", "B1HW", "empty", "full"))
@pytest.mark.parametrize("shared", (False, True))
def test_gradient_equals_autograd(shared, form, layout, device):
    B, C, H, W = 3, 3, 9, 8
    w = to_tanh(random(B, C, H, W)).to(device).contiguous(memory_format=layout)
    mask = masks(B, H, W)[form]
    mask = mask if mask is None else mask.to(device)
    grads = []
    for op in (tanh_perturb, tanh_perturb_ref):
        delta = (random(1 if shared else B, C, H, W, seed=1, device=device) - 0.5).requires_grad_()
        x, mirrored = op(w, delta, mask)
        (
            x * random(B, C, H, W, seed=2, device=device) + mirrored * random(B, C, H, W, seed=3, device=device)
        ).sum().backward()
        grads.append(delta.grad)
    assert grads[0].shape == grads[1].shape
    assert (grads[0] - grads[1]).abs().max() <= 2.0**-21 * (B if shared else 1)  # 1 - tanh^2 loses 2^-23
    if form == "empty":
        assert (grads[0] == 0).all() and torch.equal(
            *(op(w, w * 0 + 5, mask)[0] for op in (tanh_perturb, tanh_perturb))
        )


def test_without_mirror_and_with_one_output_used(device):
    w = to_tanh(random(2, 3, 4, 5, device=device))
    for mirror in (False, True):
        grads = []
        for op in (tanh_perturb, tanh_perturb_ref):
            delta = torch.zeros(1, 3, 4, 5, device=device, requires_grad=True)
            x, mirrored = op(w, delta, mirror=mirror)
            assert (mirrored is not None) == mirror
            x.square().sum().backward()
            grads.append(delta.grad)
        assert (grads[0] - grads[1]).abs().max() <= 2.0**-20


def test_to_tanh_is_inverted(device):
    x = torch.linspace(0, 1, 256, device=device).reshape(1, 1, 16, 16)
    assert (tanh_perturb(to_tanh(x), torch.zeros_like(x))[0] - x).abs().max() < 6e-7


def problem(B, K, per_sample, mirror, layout, dtype, device, H=9, W=8, C=3):
    images = random(B, C, H, W, device=device).to(dtype).contiguous(memory_format=layout)
    order = [torch.randperm(H * W, generator=torch.Generator().manual_seed(s))[:K] for s in range(B)]
    index = (torch.stack(order) if per_sample else order[0]).to(device)
    pixels = images.float().flatten(2).gather(2, index.expand(B, K)[:, None].expand(B, C, K))
    w = to_tanh(pixels).contiguous()
    mirrored = images.flip(-1).contiguous(memory_format=layout) if mirror else None
    return [images, mirrored, w, *(torch.zeros_like(w) for _ in range(3)), index]


def run(op, problem, steps, on_device=False, lr=0.05):
    """Adam on a loss linear in the images, which differs between the halves."""
    images, mirrored, w, delta, first, second, index = (
        v.clone() if isinstance(v, torch.Tensor) else v for v in problem
    )
    for t in range(1, steps + 1):
        grad = random(*images.shape, seed=t, device=images.device) - 0.4
        grad_mirrored = (
            random(*images.shape, seed=100 + t, device=images.device) - 0.5 if mirrored is not None else None
        )
        step = torch.tensor([t], device=images.device) if on_device else t
        op(images, mirrored, grad, grad_mirrored, w, delta, first, second, index, step, lr)
    return [v for v in (images, mirrored, delta, first, second) if v is not None]


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype, rounding", DTYPES)
@pytest.mark.parametrize("K", (1, 7, 72))
@pytest.mark.parametrize("per_sample, mirror", [(False, True), (True, True), (True, False)])
def test_update_equals_reference(per_sample, mirror, K, dtype, rounding, layout, device):
    start = problem(2, K, per_sample, mirror, layout, dtype, device)
    got, want = (run(op, start, 3) for op in (attack_update, attack_update_ref))
    images = 2 if mirror else 1
    for n, (a, b) in enumerate(zip(got, want)):
        assert (a.float() - b.float()).abs().max() <= (rounding if n < images else 2.0**-20)
    untouched = (
        torch.ones(2, 72, dtype=torch.bool, device=device)
        .scatter_(1, start[-1].expand(2, K), False)
        .reshape(2, 1, 9, 8)
    )
    assert torch.equal(got[0].masked_select(untouched), start[0].masked_select(untouched))
    if mirror:
        assert torch.equal(got[1], got[0].flip(-1))


def test_update_equals_autograd_and_torch_adam(device):
    images, *_, index = start = problem(2, 20, False, True, torch.contiguous_format, torch.float32, device)
    mask = torch.zeros(72, device=device).index_fill_(0, index, 1).reshape(9, 8)
    full = to_tanh(images)
    delta = torch.zeros_like(full, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.05)
    for t in range(1, 6):
        x, mirrored = tanh_perturb_ref(full, delta, mask)
        grad, grad_mirrored = (random(*x.shape, seed=s, device=device) for s in (t, 100 + t))
        adam.zero_grad()
        ((grad - 0.4) * x + (grad_mirrored - 0.5) * mirrored).sum().backward()
        adam.step()
    for on_device in (False, True):
        got = run(attack_update, start, 5, on_device)
        want = (delta * mask).flatten(2)[:, :, index]
        assert (got[2] - want).abs().max() < 5e-6
        assert (got[0] - tanh_perturb_ref(full, delta.detach(), mask)[0]).abs().max() < 2e-6


def test_zero_gradient_moves_nothing_and_an_empty_mask_is_allowed(device):
    images, mirrored, w, delta, first, second, index = problem(
        2, 10, False, True, torch.contiguous_format, torch.float32, device
    )
    before, zero = images.clone(), torch.zeros_like(images)
    attack_update(images, mirrored, zero, zero, w, delta, first, second, index, 1, 0.1)
    assert (delta == 0).all() and (images - before).abs().max() < 6e-7
    empty = w[:, :, :0].contiguous()
    attack_update(images, mirrored, zero, zero, empty, empty, empty, empty, index[:0], 1, 0.1)


def test_every_branch_is_reached(launched, device, monkeypatch):
    mask = torch.ones(4, 4, device=device)
    for layout in LAYOUTS:
        w = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=layout)
        for m in (None, mask):
            for mirror in (False, True):
                for of in (1, 2):
                    tanh_perturb(w, torch.zeros(of, 3, 4, 4, device=device, requires_grad=True), m, mirror)[
                        0
                    ].sum().backward()
        for mirror in (False, True):
            for on_device in (False, True):
                run(attack_update, problem(2, 3, False, mirror, layout, torch.float32, device), 1, on_device)
    count = {name: len({tuple(c.items()) for n, c in launched if n == name}) for name, _ in launched}
    assert count == {"_forward_kernel": 8, "_backward_kernel": 16, "_update_kernel": 8}
    launched.clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if device == "cpu":
        tanh_perturb(w, w)
        run(attack_update, problem(2, 3, False, True, layout, torch.float32, device), 1)
        assert not launched


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param((torch.rand(3, 4, 4), torch.rand(3, 4, 4)), "w must have shape", id="w"),
        pytest.param(
            (torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4)), r"delta must have shape \(2, 3, 4, 4\)", id="delta"
        ),
        pytest.param(
            (torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4), torch.ones(4, 3)), "mask must have shape", id="mask"
        ),
        pytest.param(
            (torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(1, 3, 4, 4)), "w must not require", id="grad"
        ),
        pytest.param(
            (torch.rand(2, 3, 4, 8)[..., ::2], torch.rand(1, 3, 4, 4)), "contiguous or channels_last", id="strided"
        ),
    ],
)
def test_clear_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tanh_perturb(*arguments)


@pytest.mark.parametrize(
    "at, value, message",
    [
        pytest.param(1, None, "go together", id="mirror"),
        pytest.param(1, torch.rand(2, 9, 8, 3).permute(0, 3, 1, 2), "memory layout", id="mirror-layout"),
        pytest.param(4, torch.zeros(2, 3, 6), "w must have shape", id="w"),
        pytest.param(5, torch.zeros(2, 5, 3).mT, "delta must be contiguous", id="delta"),
        pytest.param(8, torch.zeros(5), "index must be int32 or int64", id="index"),
        pytest.param(9, torch.zeros(1), "step must be int32 or int64", id="step"),
    ],
)
def test_clear_errors_of_the_update(at, value, message):
    images, mirrored, w, delta, first, second, index = problem(
        2, 5, False, True, torch.contiguous_format, torch.float32, "cpu"
    )
    arguments = [images, mirrored, images, images, w, delta, first, second, index, 1, 0.1]
    arguments[at] = value
    with pytest.raises(ValueError, match=message):
        attack_update(*arguments)
