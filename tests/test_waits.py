"""The steps of every method and of the attacks, run on tensors that hold nothing and say they are
on a GPU (tests/count.py): what would wait for it, and which kernels are launched. Needs no GPU."""

import pytest
import torch

import attacks
import embed as e
import kernels
from tests import count

pytestmark = [
    pytest.mark.skipif(kernels.triton is None, reason="no Triton"),
    pytest.mark.filterwarnings("ignore:.*the attack could not follow them"),  # numbers are all 1
]
LOSS, ROWS = "aten._to_copy meta to cpu", "aten.nonzero"
LAUNCHED = {"ours": {"adain", "augment", "masked_step"}, "no-at": {"adain", "augment"}}
LAUNCHED["weak-at"] = {"augment", "gaussian_cutout", "masked_step"}
LAUNCHED["doa"] = LAUNCHED["weak-at"] | {"place_patches", "window_energy"}


def step(method, **settings):
    small = {"preset": "demo", "width": 1 / 16, "dim": 16, "batch": 8, "attack_steps": 3}
    return count.training_step(method, **{**small, **settings})


@pytest.mark.parametrize("method", e.CHOICES["method"])
def test_a_step_waits_for_the_loss_and_for_the_erased_rows_where_not_all_are_attacked(method):
    found = step(method)
    assert found.waits == [ROWS, LOSS][method != "ours" :]
    assert set(found.kernels) == LAUNCHED[method]


def test_the_search_of_the_worst_mask_waits_for_nothing():
    for settings in ({"method": "ours"}, {"method": "weak-at", "attacked": "erased"}):
        plain, few, many = (step(**settings, masks=n) for n in (0, 1, 4))
        assert plain.waits == few.waits == many.waits == [ROWS, LOSS]
        assert plain.launches < few.launches < many.launches
    assert step("no-at", masks=4).waits == [ROWS, LOSS]


def test_more_inner_steps_wait_for_nothing():
    few, many = (step("doa", attack_steps=n) for n in (1, 4))
    assert few.waits == many.waits and few.launches < many.launches


EOT = attacks.Eot(torch.rand(12, 4, 5), torch.rand(16, 5))


@pytest.mark.parametrize(
    "attack, settings",
    [
        pytest.param(count.attack, {}, id="adam"),
        pytest.param(count.attack, {"optimiser": "sign"}, id="sign"),
        pytest.param(count.attack, {"decay": True, "restarts": 2}, id="decay"),
        pytest.param(count.attack, {"eot": EOT}, id="eot"),
        pytest.param(count.universal, {}, id="universal"),
        pytest.param(count.universal, {"batch": 2}, id="universal-in-turn"),
        pytest.param(count.search, {}, id="square-search"),
    ],
)
@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_an_iteration_of_an_attack_waits_for_nothing(attack, settings, precision):
    few, many = (
        attack(attacks.Effort(n, **{"restarts": 1, "precision": precision} | settings), 1 / 16, 4)
        for n in (2, 12)
    )
    assert few.waits == many.waits and few.launches < many.launches
    iterations = {"tanh_perturb"} if settings.get("optimiser") != "sign" else set()
    assert {*many.kernels[len(few.kernels) :]} == iterations


def test_the_certificate_covers_by_one_kernel_for_each_image():
    found = count.certificate(1 / 16, 3)
    assert found.kernels == ["place_patches"] * 3 and not found.waits


def test_the_recorder_notices_a_wait_and_counts():
    with count.fake_gpu() as recorder, count.GPU:
        x = torch.ones(3)
        assert x.is_cuda and not recorder.waits
        float(x.sum())
        (x > 0).nonzero()
        torch.tensor([1, 2], device="cpu").to(count.GPU)
    assert recorder.waits == ["aten._local_scalar_dense", ROWS, "aten._to_copy cpu to meta"]
    with count.fake_gpu() as recorder, count.GPU:
        a, b = torch.empty(4, 5), torch.empty(5, 6)
        (a @ b).view(24).relu_()
    # two reads and a write, then one of each
    moved = 4 * (20 + 30 + 24 + 24 + 24)
    assert (recorder.launches, recorder.flop, recorder.bytes) == (2, 2 * 4 * 5 * 6, moved)
