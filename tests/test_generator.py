"""generator.py: both stages by hand-made values, the shortcuts, probes, the command."""

import ast
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import generator as g
from data import run as runs
from data import synthetic
from data.run import UsageError

# fmt: off
TINY = {
    "preset": "demo", "data": "synthetic", "class_dim": 8, "content_dim": 8, "hidden": (16, 16),
    "channels": (8, 8, 8, 8), "out_channels": 4, "encoder_channels": (4, 4, 8, 8, 8),
    "encoder_hidden": 16, "loss": "pyramid", "content_penalty": 1e-5, "lr": 2e-3, "code_lr": 4.0,
    "batch": 8, "epochs": 3, "encoder_epochs": 2, "encoder_lr": 1e-3,
}
# fmt: on
FLAGS = (
    "--synthetic-persons 14 --synthetic-images 10 --validation-persons 3 --target-persons 3 "
    "--class-dim 8 --content-dim 8 --hidden 16,16 --channels 8,8,8,8 --out-channels 4 "
    "--encoder-channels 4,4,8,8,8 --encoder-hidden 16 --epochs 2 --encoder-epochs 2 --batch 16 "
    "--images 6"
).split()


def toy(persons=4, each=4):
    """Blurred colour blobs, the colour by person, the place by image."""
    rng = torch.Generator().manual_seed(0)
    colour = torch.rand(persons, 1, 3, 1, 1, generator=rng)
    small = torch.rand(persons * each, 1, 4, 4, generator=rng)
    place = F.interpolate(small, 64, mode="bilinear").view(persons, each, 1, 64, 64)
    images = (colour * place * 255).flatten(0, 1).to(torch.uint8)
    return images, torch.arange(persons).repeat_interleave(each)


def trainer(**settings):
    return g.Trainer(g.Config(**{**TINY, **settings}), *toy(), g.pyramid_loss)


def epochs(trainer, stop, start=0):
    """The lines of these epochs; each is seeded by its number, as by the command."""
    steps = max(len(trainer.images) // trainer.config.batch, 1)
    return [
        trainer.train_epoch(n, trainer.config.seed * 100_003 + n, steps) for n in range(start, stop)
    ]


def gradients(y, inputs):
    weight = torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()
    return torch.autograd.grad((y * weight).sum(), inputs)


def test_script_forms_are_the_kernels():
    from kernels import adain, upsample_conv

    names = ("leaky_adain", "upsample_conv")
    tree = ast.parse(Path(g.__file__).read_text())
    forms = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    space = {"torch": torch, "Tensor": torch.Tensor, "F": F}
    exec(compile(ast.Module(forms, []), "generator.py", "exec"), space)  # noqa: S102
    shapes = (3, 4, 5, 6), (3, 4), (3, 4)
    inputs = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
    plain = space["leaky_adain"](*inputs)
    fast = adain.leaky_adain(inputs[0].clone(), *inputs[1:])  # changes its input
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(gradients(fast, inputs), gradients(plain, inputs))
    for size in (1, 4, 7):
        shapes = (2, 3, size, size), (5, 3, 3, 3), (5,)
        inputs = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
        plain, fast = space["upsample_conv"](*inputs), upsample_conv.upsample_conv(*inputs)
        assert torch.equal(plain, upsample_conv.upsample_conv_ref(*inputs))
        assert plain.shape == (2, 5, 2 * size, 2 * size)
        torch.testing.assert_close(fast, plain)
        torch.testing.assert_close(gradients(fast, inputs), gradients(plain, inputs))


def test_pyramid_loss_is_the_sum_of_the_levels_differences():
    def levels(x):
        while x.shape[-1] > 4:
            low = F.avg_pool2d(x, 2)
            yield x - F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
            x = low
        yield x

    a, b = torch.rand(2, 2, 3, 64, 64)
    wanted = sum((p - q).abs().mean() for p, q in zip(levels(a), levels(b)))
    torch.testing.assert_close(g.pyramid_loss(a, b), wanted)
    assert g.pyramid_loss(a, a) == 0


def vgg_state():
    state, previous, index = {}, 3, 0
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512):
        if width:
            scale = (2 / 9 / previous) ** 0.5
            state[f"features.{index}.weight"] = torch.randn(width, previous, 3, 3) * scale
            state[f"features.{index}.bias"] = torch.zeros(width)
            previous = width
        index += 2 if width else 1
    return state


def test_vgg_loss_reads_the_five_layers(tmp_path):
    state = vgg_state()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "vgg.pth")
    loss = g.VggLoss(g.vgg_state(str(tmp_path / "vgg.pth")))
    a, b = torch.rand(2, 1, 3, 64, 64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x, features, taps = (a - mean) / std, [*loss.features(a)], []
    for name, weight in state.items():
        if name in {f"features.{k}.weight" for k in (5, 10, 17, 24)}:  # the first of a block
            x = F.max_pool2d(x, 2)
        if name.endswith("weight"):
            x = F.conv2d(x, weight, padding=1).relu()
            taps += [x] * (name.split(".")[1] in ("2", "7", "12", "19", "26"))
    assert len(features) == 5
    for feature, tap in zip(features, taps):
        torch.testing.assert_close(feature, tap, rtol=1e-3, atol=1e-4)
    apart = sum((p - q).abs().mean() for p, q in zip(features, loss.features(b)))
    torch.testing.assert_close(loss(a, b), apart)
    del state["features.26.weight"]
    with pytest.raises(KeyError):
        g.VggLoss(state)
    with pytest.raises(UsageError, match="--vgg-weights"):
        g.vgg_state(str(tmp_path / "absent.pth"))


INDEX = torch.tensor([1, 6, 12])  # images of persons 0, 1 and 3


def test_stage_one_is_the_loss_of_app_a():
    t = trainer(noise=0.5, content_penalty=0.01)
    loss, penalty = t.stage1(INDEX, 0.0, torch.Generator().manual_seed(7))
    sigma = torch.randn(3, 8, generator=torch.Generator().manual_seed(7))
    codes = t.class_codes[[0, 1, 3]], t.content_codes[[1, 6, 12]] + 0.5 * sigma
    images = t.images[[1, 6, 12]] / 255
    torch.testing.assert_close(loss, g.pyramid_loss(t.lord.generator(*codes), images))
    # the squared norm: a sum over dimensions, a mean over images
    squares = sum(float(v) ** 2 for i in (1, 6, 12) for v in t.content_codes[i].detach())
    assert penalty.detach().item() == pytest.approx(0.01 * squares / 3, rel=1e-5)


def test_stage_two_reproduces_the_image_and_both_codes_of_stage_one():
    t = trainer(code_weight=3.0, noise=0.5)
    loss, penalty = t.stage2(INDEX, 0.0, torch.Generator().manual_seed(7))
    x = t.images[[1, 6, 12]] / 255
    class_code, content_code = t.lord.class_encoder(x), t.lord.content_encoder(x)
    torch.testing.assert_close(loss, g.pyramid_loss(t.lord.generator(class_code, content_code), x))
    errors = (class_code - t.class_codes[[0, 1, 3]]).square().sum() / (3 * 8)
    errors = errors + (content_code - t.content_codes[[1, 6, 12]]).square().sum() / (3 * 8)
    torch.testing.assert_close(penalty, 3 * errors)
    penalty.backward()
    assert t.class_codes.grad is None and t.content_codes.grad is None


def test_stage_two_with_swap_takes_the_class_of_another_image_and_a_noisy_content():
    t = trainer(swap=True, code_weight=3.0, noise=0.5, encoder_penalty=0.2)
    loss, penalty = t.stage2(INDEX, 0.0, torch.Generator().manual_seed(7))
    rng = torch.Generator().manual_seed(7)
    # four images a person, in order: the r-th of them
    others = [4 * p + int(4 * r) for p, r in zip((0, 1, 3), torch.rand(3, generator=rng))]
    assert not {1, 6, 12} & {*others}
    sigma = torch.randn(3, 8, generator=rng)
    x = t.images[[1, 6, 12]] / 255
    class_code = t.lord.class_encoder(t.images[others] / 255)
    content_code = t.lord.content_encoder(x)
    images = t.lord.generator(class_code, content_code + 0.5 * sigma)
    torch.testing.assert_close(loss, g.pyramid_loss(images, x))
    wanted = 3 * (class_code - t.class_codes[[0, 1, 3]]).square().sum() / (3 * 8)
    wanted = wanted + 0.2 * content_code.square().sum() / 3
    torch.testing.assert_close(penalty, wanted)


def test_partners_are_images_of_the_same_person_in_any_order():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 3, 64, 64)
    person = torch.tensor([1, 0, 1, 2, 1, 0])
    t = g.Trainer(g.Config(**TINY), images, person, g.pyramid_loss)
    rng, index = torch.Generator().manual_seed(0), torch.arange(6).repeat(50)
    partners = (t.partners(index, rng)[:, 0, 0, 0] * 255).round().long().view(50, 6)
    every = [{0, 2, 4}, {1, 5}, {0, 2, 4}, {3}, {0, 2, 4}, {1, 5}]
    assert [{*column.tolist()} for column in partners.T] == every


def rates(adam):
    return [group["lr"] for group in adam.param_groups]


def test_learning_rates_follow_their_schedules():
    demo = {k: v for k, v in g.PRESETS["demo"].items() if "lr" in k}
    t = trainer(**demo)
    for progress, lr in ((0.0, 1.5e-3), (0.5, 7.75e-4), (1.0, 5e-5)):
        t.stage1(INDEX, progress, torch.Generator())
        assert rates(t.adam1) == pytest.approx([lr, 40 * lr])
    for progress, lr in ((0.0, 1e-3), (0.5, 5.1e-4), (1.0, 2e-5)):
        t.stage2(INDEX, progress, torch.Generator())
        assert rates(t.adam2) == pytest.approx([lr])
    paper = g.Config()
    t = trainer(encoder_lr=paper.encoder_lr, encoder_lr_end=paper.encoder_lr_end)
    for progress in (0.0, 0.5, 1.0):  # LORD: constant
        t.stage2(INDEX, progress, torch.Generator())
        assert rates(t.adam2) == [1e-4]
    t = trainer(**demo)
    epochs(t, 5)  # the last steps are the second of two, in the third of 3 and the second of 2
    lr = g.cosine(1.5e-3, 5e-5, 2.5 / 3)
    assert rates(t.adam1) == pytest.approx([lr, 40 * lr])
    assert rates(t.adam2) == pytest.approx([g.cosine(1e-3, 2e-5, 1.5 / 2)])


def test_a_step_of_adam_moves_what_the_stage_trains_by_its_rate():
    """The first step of Adam is the learning rate, whatever the gradient."""
    t = trainer(epochs=1, encoder_epochs=1, lr=1e-3, code_lr=4.0, encoder_lr=2e-3)
    assert t.adam1.defaults["betas"] == (0.5, 0.999) and t.adam2.defaults["betas"] == (0.9, 0.999)
    lord = t.lord
    values = [lord.generator.conv7.weight, lord.class_encoder.dense[0].weight]
    values += [lord.content_encoder.dense[0].weight, t.class_codes, t.content_codes]
    for n, rates in enumerate(((1e-3, 0, 0, 4e-3, 4e-3), (2e-3, 2e-3, 2e-3, 0, 0))):
        before = [value.detach().clone() for value in values]
        line = t.train_epoch(n, 0, 1)
        assert line["stage"] == n + 1 and 0 < line["loss"] < 2
        for old, new, rate in zip(before, values, rates):
            change = (new.detach() - old).abs()  # zero where there is no gradient
            assert change.max().item() == pytest.approx(rate, rel=0.02)


def test_resumed_training_equals_an_unbroken_one_bit_for_bit():
    whole = trainer()
    epochs(whole, 5)
    for stop in (1, 3, 4):  # inside stage 1, between the stages, inside stage 2
        first, second = trainer(), trainer()
        epochs(first, stop)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        epochs(second, 5, stop)
        for one, other in zip(whole.lord.state_dict().values(), second.lord.state_dict().values()):
            assert torch.equal(one, other)


def test_an_epoch_takes_each_image_once_in_an_order_of_its_own():
    t, taken = trainer(), []  # 16 images, two steps an epoch
    stage1, stage2 = t.stage1, t.stage2
    t.stage1 = lambda index, *more: taken.append(index.tolist()) or stage1(index, *more)
    t.stage2 = lambda index, *more: taken.append(index.tolist()) or stage2(index, *more)
    epochs(t, 5)
    orders = {(*first, *second) for first, second in zip(taken[::2], taken[1::2])}
    assert len(orders) == 5 and all(sorted(order) == [*range(16)] for order in orders)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_names_itself_and_the_images(what):
    t, order = trainer(), []

    def broken(a, b):
        order.append(b)
        loss = g.pyramid_loss(a, b)
        if len(order) == 2:
            loss = loss * float("nan") if what == "loss" else loss + (a * 0).abs().sqrt().sum()
        return loss

    t.loss = broken
    with pytest.raises(FloatingPointError) as error:
        epochs(t, 1)
    text, index = error.value.args
    assert text.startswith("step 2: loss ") and ("loss nan" in text) is (what == "loss")
    assert torch.equal(g.to_float(t.images[index]), order[1])


def test_probes_read_what_is_there_and_only_that():
    rng = torch.Generator().manual_seed(0)
    person = torch.arange(20).repeat_interleave(10)
    clear = torch.randn(20, 8, generator=rng)[person] + 0.05 * torch.randn(200, 8, generator=rng)
    silent = torch.randn(200, 8, generator=rng)
    assert g.person_probe(clear, person) > 0.95
    assert g.person_probe(silent, person) < 0.2
    fit, test = g.halves(person)
    factors = torch.cat([silent @ torch.randn(8, 5, generator=rng), torch.ones(200, 1)], 1)
    first, second = person < 10, person >= 10
    for code, low, high in ((silent, 0.95, 1.0), (clear, -1.0, 0.1)):
        r2 = g.factor_probe(code[first], factors[first], code[second], factors[second])
        assert r2.shape == (6,) and r2[5].isnan()
        assert bool(((r2[:5] > low) & (r2[:5] <= high)).all())
    assert len(fit) == len(test) == 100 and not {*fit.tolist()} & {*test.tolist()}


def test_psnr_and_pairs():
    a = torch.zeros(2, 3, 4, 4)
    assert g.psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    apart = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)  # of each image, then their mean
    assert g.psnr(a, a + apart) == pytest.approx((20 + 40) / 2, abs=1e-3)
    person = torch.tensor([0, 0, 1, 2])
    x, t = g.draw_pairs(person, 0)
    assert 250 < len(x) == len(t) < 400 and not (person[x] == person[t]).any()


def test_u_has_the_class_of_x_and_the_content_of_t():
    lord = g.Lord(g.Config(**TINY)).eval()
    x, t = torch.rand(2, 3, 3, 64, 64)
    with torch.no_grad():
        y, u = g.generate_pair(lord, x, t)
        torch.testing.assert_close(y, lord(x))
        wanted = lord.generator(lord.class_encoder(x), lord.content_encoder(t))
        torch.testing.assert_close(u, wanted)
    assert y.shape == u.shape == x.shape and float(u.min()) >= 0 and float(u.max()) <= 1


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    config = dataclasses.asdict(g.Config(**TINY))
    state = g.Lord(g.Config(**TINY)).state_dict()
    runs.save(tmp_path / "good.pt", "generator", config=config, lord=state)
    runs.save(tmp_path / "width.pt", "generator", config={**config, "class_dim": 9}, lord=state)
    with pytest.raises(UsageError, match="width.pt: cannot be read .*: train it again$"):
        g.load_generator(tmp_path / "width.pt")
    lord, _ = g.load_generator(tmp_path / "good.pt")
    assert not lord.training and not any(p.requires_grad for p in lord.parameters())


def test_the_report_of_the_shipped_generator_by_hand(tmp_path):
    shipped = Path(g.__file__).parent / "data" / "demo" / "generator.pt"
    assert shipped.stat().st_size <= 4_000_000
    lord, content = g.load_generator(shipped)
    assert {v.dtype for v in content["lord"].values()} == {torch.float16}
    faces = data.load("synthetic", persons=16, images_per_person=10, cache="")
    split = data.split_persons(faces, None, 3, 5)
    report = g.evaluate(g.Config(seed=2), tmp_path, lord, faces, split)
    pick = torch.isin(faces.person, torch.tensor(split.validation + split.target)).nonzero()[:, 0]
    copies = lord(faces.images[pick] / 255)
    assert report["psnr_reconstruction"] == pytest.approx(g.psnr(copies, faces.images[pick] / 255))
    assert report["psnr_reconstruction"] > 22 and report["persons"] == 8 and report["images"] == 80
    assert report["person_from_class"] > 0.9 and report["person_from_content"] < 0.4
    yaw = [report[f"content_factors_from_{code}"]["yaw"] for code in ("content", "class")]
    assert yaw[0] > 0.4 and yaw[1] < 0.1
    x, t = (pick[index] for index in g.draw_pairs(faces.person[pick], 2))
    y, u = g.generate_pair(lord, g.to_float(faces.images[x]), g.to_float(faces.images[t]))
    truth = synthetic.render(faces.identity[faces.person[x]], faces.content[t])
    assert report["psnr_true_u"] == pytest.approx(g.psnr(u, truth / 255), abs=1e-3)
    rows = torch.from_numpy(np.load(tmp_path / "quadruplets.npz")["quadruplets"])
    assert rows.shape == (24, 4, 3, 64, 64) and (tmp_path / "quadruplets.png").exists()
    assert torch.equal(rows[:, 0], faces.images[x[:24]])
    assert torch.equal(rows[:, 2], faces.images[t[:24]])
    assert ((rows[:, 1] / 255 - y[:24]).abs() < 0.6 / 255).all()
    assert ((rows[:, 3] / 255 - u[:24]).abs() < 0.6 / 255).all()


def test_the_command_trains_stops_resumes_and_reports(
    tmp_path, monkeypatch, capsys, interrupted_at
):
    monkeypatch.chdir(tmp_path)
    trainers = []

    class Trainer(g.Trainer):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            trainers.append(self)

    monkeypatch.setattr(g, "Trainer", Trainer)
    run = Path("runs/synthetic-demo-0")
    with interrupted_at(Trainer, "train_epoch", 4):
        assert g.main(FLAGS) == 130 and "same command" in capsys.readouterr().err
    for flags, named in ((["--lr", "0.5"], "lr (0.0015"), (["--loss", "vgg"], "--vgg-weights")):
        assert g.main([*FLAGS, *flags]) == 2 and named in capsys.readouterr().err
    assert g.main(FLAGS) == 0
    assert "generator: 48 images of 8 persons" in capsys.readouterr().out
    log = (run / "generator/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3, 4]
    assert {p.name for p in run.iterdir()} == {
        *"people.json run.json generator.pt generator".split()
    }
    content = g.load_generator(run / "generator.pt")[1]
    for name, weight in trainers[-1].lord.state_dict().items():
        assert torch.equal(weight.half(), content["lord"][name])

    faces, split = data.open_run(g.Config(**content["config"]), run)
    assert content["train"] == [faces.names[p] for p in split.train]
    unseen = faces.images[data.images_of(faces, split.validation)]
    copies = g.decode(trainers[-1].lord, *g.encode(trainers[-1].lord, unseen))
    assert json.loads(log[-1])["psnr_unseen"] == pytest.approx(g.psnr(copies, unseen / 255))
    report = json.loads((run / "generator/result.json").read_text())
    assert report["persons"] == 6 and report["images"] == 60 and "psnr_true_u" in report

    # a VGG16 file counts by its content
    (tmp_path / "a.pth").write_bytes(b"1")
    vgg = [*FLAGS, "--run", "runs/vgg", "--vgg-weights"]
    assert g.main([*vgg, "a.pth"]) == 0
    (tmp_path / "a.pth").rename("b.pth")
    assert g.main([*vgg, "b.pth"]) == 0
    (tmp_path / "b.pth").write_bytes(b"2")
    assert g.main([*vgg, "b.pth"]) == 2 and "vgg_weights (" in capsys.readouterr().err

    # other persons are another training
    other = dataclasses.replace(data.split_persons(faces, None, 3, 3, seed=1), seed=0)
    data.write_manifest(run / "people.json", faces, other)
    assert g.main(FLAGS) == 2 and "people" in capsys.readouterr().err.splitlines()[-1]
