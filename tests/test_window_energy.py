"""window_energy against its reference and against a loop over positions in float64."""

import pytest
import torch

from kernels.place_patches import positions
from kernels.window_energy import window_energy, window_energy_ref

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.float16, torch.bfloat16)]
CASES = [  # gradient, window, stride
    pytest.param((1, 1, 1, 1), (1, 1), 1, id="1x1"),
    pytest.param((2, 3, 7, 5), (3, 2), 2, id="odd-flush-edges"),
    pytest.param((2, 3, 6, 5), (6, 5), 1, id="window-as-large-as-the-image"),
    pytest.param((1, 3, 33, 15), (4, 15), 3, id="rows+1-columns-1"),
    pytest.param((2, 2, 32, 16), (1, 1), 1, id="tile"),
    pytest.param((1, 1, 31, 67), (5, 3), 1, id="rows-1-two-tiles-of-positions"),
    pytest.param((1, 3, 70, 65), (20, 20), 5, id="two-tiles-of-pixels"),
    pytest.param((1, 1, 20, 20), (5, 5), 50, id="stride-beyond-the-image"),
]


def loop(grad, h, w, stride):
    H, W = grad.shape[2:]
    places = positions(H, W, h, w, stride).tolist()
    energy = grad.double().square()
    return torch.stack([energy[:, :, t : t + h, c : c + w].sum((1, 2, 3)) for t, c in places], 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, size, stride", CASES)
def test_equals_reference_and_loop(shape, size, stride, dtype, layout, device):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grad = grad.to(device, dtype).contiguous(memory_format=layout)
    exact = loop(grad.cpu(), *size, stride)
    # relative: a sum of squares, each added up so many times at most
    rounding = 2.0**-24 * sum(shape[1:])
    for op in (window_energy, window_energy_ref):
        got = op(grad, *size, stride)
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert ((got.cpu() - exact).abs() <= rounding * exact).all()


def test_whole_numbers_are_exact_and_a_planted_square_wins(device):
    grad = (
        torch.randint(-3, 4, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
        .float()
        .to(device)
    )
    assert torch.equal(window_energy(grad, 20, 20, 5), window_energy_ref(grad, 20, 20, 5))
    assert torch.equal(window_energy(grad, 20, 20, 5).cpu().double(), loop(grad.cpu(), 20, 20, 5))
    planted = torch.zeros(1, 3, 64, 64, device=device)
    planted[:, :, 44:, 44:] = 1e-3  # the flush corner, which a stride of 5 alone would miss
    places = positions(64, 64, 20, 20, 5)
    assert places[window_energy(planted, 20, 20, 5).argmax().item()].tolist() == [44, 44]
    assert (window_energy(torch.zeros_like(planted), 20, 20, 5) == 0).all()


def test_every_branch_is_reached(launched, device):
    for layout in LAYOUTS:
        window_energy(torch.rand(1, 3, 8, 8, device=device).contiguous(memory_format=layout), 2, 2)
    assert [c["CHANNELS_LAST"] for _, c in launched] == [False, True]


def test_the_reference_runs_outside_the_interpreter_and_for_an_empty_batch(launched, monkeypatch):
    assert window_energy(torch.rand(0, 3, 8, 8), 2, 2).shape == (0, 49)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    grad = torch.rand(1, 3, 8, 8)
    assert torch.equal(window_energy(grad, 2, 2), window_energy_ref(grad, 2, 2)) and not launched


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param((torch.rand(3, 8, 8), 2, 2), r"grad must have shape \(B, C, H, W\)", id="3d"),
        pytest.param((torch.rand(1, 3, 8, 8).double(), 2, 2), "grad must be float32", id="double"),
        pytest.param(
            (torch.rand(1, 3, 8, 16)[..., ::2], 2, 2), "contiguous or channels_last", id="strided"
        ),
        pytest.param(
            (torch.rand(1, 3, 8, 8), 9, 2), "a 9x2 window with stride 1 does not fit", id="window"
        ),
        pytest.param((torch.rand(1, 3, 8, 8), 2, 2, 0), "stride 0", id="stride"),
    ],
)
def test_clear_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_energy(*arguments)
