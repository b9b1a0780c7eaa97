"""window_energy against its reference and against a loop over positions in float64."""

import pytest
import torch

from kernels.place_patches import positions
from kernels.window_energy import window_energy, window_energy_ref
from tests.cases import LAYOUTS, dtypes, layouts, random, refused, seeded

CASES = {  # gradient, window, stride
    "1x1": ((1, 1, 1, 1), (1, 1), 1),
    "odd-flush-edges": ((2, 3, 7, 5), (3, 2), 2),
    "window-as-large-as-the-image": ((2, 3, 6, 5), (6, 5), 1),
    "rows+1-columns-1": ((1, 3, 33, 15), (4, 15), 3),
    "tile": ((2, 2, 32, 16), (1, 1), 1),
    "rows-1-two-tiles-of-positions": ((1, 1, 31, 67), (5, 3), 1),
    "two-tiles-of-pixels": ((1, 3, 70, 65), (20, 20), 5),
    "stride-beyond-the-image": ((1, 1, 20, 20), (5, 5), 50),
}


def loop(grad, h, w, stride):
    places = positions(*grad.shape[2:], h, w, stride).tolist()
    energy = grad.cpu().double().square()
    return torch.stack([energy[:, :, t : t + h, c : c + w].sum((1, 2, 3)) for t, c in places], 1)


@layouts
@dtypes
@pytest.mark.parametrize("shape, size, stride", CASES.values(), ids=CASES)
def test_equals_reference_and_loop(shape, size, stride, dtype, layout, device):
    grad = torch.randn(shape, generator=seeded(0))
    grad = grad.to(device, dtype).contiguous(memory_format=layout)
    exact = loop(grad, *size, stride)
    # relative: a sum of squares, each added up so many times at most
    rounding = 2.0**-24 * sum(shape[1:])
    for op in (window_energy, window_energy_ref):
        got = op(grad, *size, stride)
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert ((got.cpu() - exact).abs() <= rounding * exact).all()


def test_whole_numbers_are_exact_and_a_planted_square_wins(device):
    grad = torch.randint(-3, 4, (3, 3, 64, 64), generator=seeded(0)).float().to(device)
    energy = window_energy(grad, 20, 20, 5)
    assert torch.equal(energy, window_energy_ref(grad, 20, 20, 5))
    assert torch.equal(energy.cpu().double(), loop(grad, 20, 20, 5))
    planted = torch.zeros(1, 3, 64, 64, device=device)
    planted[:, :, 44:, 44:] = 1e-3  # the flush corner, which a stride of 5 alone would miss
    places = positions(64, 64, 20, 20, 5)
    assert places[window_energy(planted, 20, 20, 5).argmax().item()].tolist() == [44, 44]
    assert (window_energy(torch.zeros_like(planted), 20, 20, 5) == 0).all()


def test_every_branch_is_reached(launched, device, monkeypatch):
    for layout in LAYOUTS:
        window_energy(random(1, 3, 8, 8, device=device).contiguous(memory_format=layout), 2, 2)
    assert [c["CHANNELS_LAST"] for _, c in launched] == [False, True]
    launched.clear()
    assert window_energy(random(0, 3, 8, 8), 2, 2).shape == (0, 49)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    grad = random(1, 3, 8, 8)
    assert torch.equal(window_energy(grad, 2, 2), window_energy_ref(grad, 2, 2)) and not launched


def test_clear_errors():
    arguments = {"grad": torch.rand(1, 3, 8, 8), "h": 2, "w": 2}
    changes = {
        r"grad must have shape \(B, C, H, W\)": {"grad": torch.rand(3, 8, 8)},
        "grad must be float32": {"grad": torch.rand(1, 3, 8, 8).double()},
        "contiguous or channels_last": {"grad": torch.rand(1, 3, 8, 16)[..., ::2]},
        "a 9x2 window with stride 1 does not fit": {"h": 9},
        "stride 0": {"stride": 0},
    }
    refused(window_energy, arguments, changes)
