"""generator.py: the two stages, the exact shortcuts, the probes, checkpoints and the command."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generator as g
from data import run as runs
from data.run import UsageError

TINY = {
    "preset": "demo",
    "data": "synthetic",
    "class_dim": 8,
    "content_dim": 8,
    "hidden": (16, 16),
    "channels": (8, 8, 8, 8),
    "out_channels": 4,
    "encoder_channels": (4, 4, 8, 8, 8),
    "encoder_hidden": 16,
    "loss": "pyramid",
    "content_penalty": 1e-5,
    "lr": 2e-3,
    "code_lr": 4.0,
    "batch": 8,
    "epochs": 3,
    "encoder_epochs": 2,
    "encoder_lr": 1e-3,
}
FLAGS = (
    "--synthetic-persons 14 --synthetic-images 10 --validation-persons 3 --target-persons 3 "
    "--class-dim 8 --content-dim 8 --hidden 16,16 --channels 8,8,8,8 --out-channels 4 "
    "--encoder-channels 4,4,8,8,8 --encoder-hidden 16 --epochs 2 --encoder-epochs 2 --batch 16"
).split()


def toy(persons=4, each=8):
    """Blurred colour blobs, the colour by person, the place by image."""
    rng = torch.Generator().manual_seed(0)
    colour = torch.rand(persons, 1, 3, 1, 1, generator=rng)
    place = F.interpolate(
        torch.rand(persons * each, 1, 4, 4, generator=rng), 64, mode="bilinear"
    ).view(persons, each, 1, 64, 64)
    return (colour * place * 255).flatten(0, 1).to(torch.uint8), torch.arange(
        persons
    ).repeat_interleave(each)


def epochs(trainer, stop, start=0):
    """The lines of these epochs; each is seeded by its number, as by the command."""
    steps = max(len(trainer.images) // trainer.config.batch, 1)
    return [trainer.epoch(n, trainer.config.seed * 100_003 + n, steps) for n in range(start, stop)]


def test_script_forms_are_the_kernels():
    import ast

    from kernels import adain, upsample_conv

    tree = ast.parse(Path(g.__file__).read_text())
    names = ("leaky_adain", "upsample_conv")
    kept = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    space = {"torch": torch, "Tensor": torch.Tensor, "F": F}
    code = [ast.parse("from __future__ import annotations").body[0], *kept]
    exec(compile(ast.Module(code, []), "generator.py", "exec"), space)  # noqa: S102
    shapes = (3, 4, 5, 6), (3, 4), (3, 4)
    x, scale, offset = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)
    plain = space["leaky_adain"](x, scale, offset)
    fast = adain.leaky_adain(x.clone(), scale, offset)  # changes its input
    torch.testing.assert_close(fast, plain)
    weight = torch.randn_like(plain)
    grads = (torch.autograd.grad((y * weight).sum(), (x, scale, offset)) for y in (plain, fast))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(adain.AdaIN.apply, (x, scale, offset))
    for size in (1, 4, 7):
        shapes = (2, 3, size, size), (5, 3, 3, 3), (5,)
        inputs = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
        forms = space["upsample_conv"], upsample_conv.upsample_conv_ref, upsample_conv.upsample_conv
        plain, ref, fast = (form(*inputs) for form in forms)
        assert torch.equal(plain, ref) and plain.shape == (2, 5, 2 * size, 2 * size)
        torch.testing.assert_close(fast, plain)
        weight = torch.randn_like(plain)
        grads = (torch.autograd.grad((y * weight).sum(), inputs) for y in (plain, fast))
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other)


def test_pyramid_loss_is_the_sum_of_the_levels_differences():
    def levels(x):
        found = []
        while x.shape[-1] > 4:
            low = F.avg_pool2d(x, 2)
            found.append(
                x - F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
            )
            x = low
        return [*found, x]

    a, b = torch.rand(2, 2, 3, 64, 64)
    wanted = sum((p - q).abs().mean() for p, q in zip(levels(a), levels(b)))
    torch.testing.assert_close(g.pyramid_loss(a, b), wanted)
    assert g.pyramid_loss(a, a) == 0


def vgg_state():
    widths, state, previous, index = (
        (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512),
        {},
        3,
        0,
    )
    for width in widths:
        if width:
            state[f"features.{index}.weight"] = (
                torch.randn(width, previous, 3, 3) * (2 / 9 / previous) ** 0.5
            )
            state[f"features.{index}.bias"] = torch.zeros(width)
            previous = width
        index += 2 if width else 1
    return state


def test_vgg_loss_reads_the_five_layers(tmp_path):
    state = vgg_state()
    loss = g.VggLoss(state)
    a, b = torch.rand(2, 1, 3, 64, 64)
    assert [tuple(f.shape[1:]) for f in loss.features(a)] == [
        (64, 64, 64),
        (128, 32, 32),
        (256, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
    ]
    first = F.conv2d((a - loss.mean) / loss.std, state["features.0.weight"], padding=1).relu()
    second = F.conv2d(first, state["features.2.weight"], padding=1).relu()
    torch.testing.assert_close(next(loss.features(a)), second, rtol=1e-4, atol=1e-5)
    assert loss(a, a) == 0 and loss(a, b) > 0
    del state["features.26.weight"]
    with pytest.raises(KeyError):
        g.VggLoss(state)
    with pytest.raises(UsageError, match="--vgg-weights"):
        g.vgg_state(str(tmp_path / "absent.pth"))


def test_both_stages_learn_and_stage_two_matches_the_codes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # many steps: AdaIN's reference
    images, person = toy()
    quick = {"epochs": 14, "encoder_epochs": 20, "lr": 8e-3, "encoder_lr": 8e-3}
    config = g.Config(**{**TINY, **quick, "code_weight": 1.0})
    trainer = g.Trainer(config, images, person, g.pyramid_loss)
    lines = epochs(trainer, 34)
    assert [line["stage"] for line in lines] == [1] * 14 + [2] * 20
    assert lines[13]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["loss"] < 0.7 * lines[14]["loss"]
    class_code, _ = g.encode(trainer.lord, images)
    error = (class_code - trainer.class_codes[person]).square().mean() / trainer.class_codes.var()
    assert error < 0.3


def test_the_penalty_shrinks_content_codes_and_the_noise_moves_the_output():
    images, person = toy()
    sizes = []
    for penalty in (0.0, 0.1):
        trainer = g.Trainer(
            g.Config(**{**TINY, "content_penalty": penalty}), images, person, g.pyramid_loss
        )
        epochs(trainer, 3)
        sizes.append(float(trainer.content_codes.detach().square().mean()))
    assert sizes[1] < 0.5 * sizes[0]
    losses = []
    for noise in (0.0, 1.0):
        trainer = g.Trainer(g.Config(**{**TINY, "noise": noise}), images, person, g.pyramid_loss)
        loss, _ = trainer.stage1(torch.arange(8), 0.0, torch.Generator().manual_seed(0))
        losses.append(loss.item())
    assert losses[0] != losses[1]


def test_swap_takes_the_class_from_another_image_and_keeps_the_content_noisy_and_small(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # many steps: AdaIN's reference
    images, person = toy()
    sizes = []
    for penalty in (0.0, 0.1):
        config = g.Config(
            **{
                **TINY,
                "epochs": 0,
                "encoder_epochs": 10,
                "swap": True,
                "encoder_penalty": penalty,
                "code_weight": 0.1,
            }
        )
        trainer = g.Trainer(config, images, person, g.pyramid_loss)
        epochs(trainer, 10)
        sizes.append(float(g.encode(trainer.lord, images)[1].square().mean()))
    assert sizes[1] < 0.5 * sizes[0]
    index = torch.arange(len(images))
    partners = trainer.partner(index, torch.Generator().manual_seed(0))
    found = [
        [j for j in range(len(images)) if torch.equal(g.to_float(images[j : j + 1])[0], image)]
        for image in partners
    ]
    assert all(any(person[j] == person[i] for j in js) for i, js in enumerate(found)) and any(
        i not in js for i, js in enumerate(found)
    )
    losses = []
    for noise in (0.0, 1.0):  # the same start, the same partners: only the content's noise differs
        trainer = g.Trainer(
            dataclasses.replace(config, noise=noise), images, person, g.pyramid_loss
        )
        loss, _ = trainer.stage2(torch.arange(8), 0.0, torch.Generator().manual_seed(0))
        losses.append(loss.item())
    assert losses[0] != losses[1]


def test_resumed_training_equals_an_unbroken_one_bit_for_bit():
    images, person = toy()
    config = g.Config(**TINY)
    whole = g.Trainer(config, images, person, g.pyramid_loss)
    epochs(whole, 5)
    for stop in (1, 3, 4):  # inside stage 1, between the stages, inside stage 2
        first = g.Trainer(config, images, person, g.pyramid_loss)
        epochs(first, stop)
        second = g.Trainer(dataclasses.replace(config), images, person, g.pyramid_loss)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        epochs(second, 5, stop)
        for one, other in zip(whole.lord.state_dict().values(), second.lord.state_dict().values()):
            assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_names_itself_the_images_and_the_checkpoint(
    tmp_path, monkeypatch, capsys, what
):
    monkeypatch.chdir(tmp_path)
    real, calls = g.pyramid_loss, []

    def broken(made, images):
        calls.append(1)
        loss = real(made, images)
        if len(calls) != 7:  # the second of five steps, in the second epoch
            return loss
        return (
            loss * float("nan") if what == "loss" else loss + (made * 0).abs().sqrt().sum()
        )  # finite, but not its gradient

    monkeypatch.setattr(g, "pyramid_loss", broken)
    assert g.main(FLAGS) == 1
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    assert (
        "epoch 2, step 2: loss" in told
        and "images [" in told
        and "runs/synthetic-demo-0/generator/training.ckpt" in told
    )
    held = runs.load("runs/synthetic-demo-0/generator/training.ckpt", "training")
    assert held["step"] == 1


def test_other_persons_and_a_damaged_checkpoint_are_refused(
    tmp_path, monkeypatch, capsys, interrupted_at
):
    import data

    monkeypatch.chdir(tmp_path)
    run = Path("runs/synthetic-demo-0")
    with interrupted_at(g.Trainer, "epoch", 4):
        assert g.main(FLAGS) == 130
    part, people = run / "generator/training.ckpt", (run / "people.json").read_bytes()
    faces = data.load("synthetic", persons=14, images_per_person=10)
    other = dataclasses.replace(data.split_persons(faces, None, 3, 3, seed=1), seed=0)
    data.write_manifest(run / "people.json", faces, other)
    capsys.readouterr()
    assert g.main(FLAGS) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "another training" in line and "people" in line
    (run / "people.json").write_bytes(people)
    part.write_bytes(part.read_bytes()[:1000])
    assert g.main(FLAGS) == 2 and "training.ckpt: cannot be read" in capsys.readouterr().err
    assert g.main([*FLAGS, "--overwrite"]) == 0
    log = (run / "generator/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3, 4] and not part.exists()


def test_probes_read_what_is_there_and_only_that():
    rng = torch.Generator().manual_seed(0)
    person = torch.arange(20).repeat_interleave(10)
    telling = torch.randn(20, 8, generator=rng)[person] + 0.05 * torch.randn(200, 8, generator=rng)
    silent = torch.randn(200, 8, generator=rng)
    assert g.person_probe(telling, person) > 0.95
    assert g.person_probe(silent, person) < 0.2
    fit, test = g.halves(person)
    factors = torch.cat([silent @ torch.randn(8, 5, generator=rng), torch.ones(200, 1)], 1)
    first, second = person < 10, person >= 10
    for code, low, high in ((silent, 0.95, 1.0), (telling, -1.0, 0.1)):
        r2 = g.factor_probe(code[first], factors[first], code[second], factors[second])
        assert (
            r2.shape == (6,)
            and bool(((r2[:5] > low) & (r2[:5] <= high)).all())
            and bool(r2[5].isnan())
        )
    assert len(fit) == len(test) == 100 and not set(fit.tolist()) & set(test.tolist())


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    assert g.psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)


def test_u_has_the_class_of_x_and_the_content_of_t():
    lord = g.Lord(g.Config(**TINY)).eval()
    x, t = torch.rand(2, 3, 3, 64, 64)
    with torch.no_grad():
        y, u = g.quadruplets(lord, x, t)
        torch.testing.assert_close(y, lord(x))
        torch.testing.assert_close(
            u, lord.generator(lord.class_encoder(x), lord.content_encoder(t))
        )
    assert y.shape == u.shape == x.shape and float(u.min()) >= 0 and float(u.max()) <= 1


def test_an_oracle_sees_whose_identity_y_and_u_have():
    """Images whose mean red is the identity, mean green the content."""
    x, t = torch.zeros(2, 4, 3, 8, 8)
    x[:, 0], t[:, 0], t[:, 1] = 0.2, 0.8, 0.5
    y, u = x.clone(), x.clone()
    u[:, 1] = 0.5
    told, d = g.identity_kept(lambda v: v[:, :1].mean((2, 3)), x, y, t, u)
    assert told["x_y"] == told["x_u"] == 0 and told["t_u"] == pytest.approx(0.6)
    assert told["y_nearer_to_x_than_t"] == told["u_nearer_to_x_than_to_t"] == 1
    told, d = g.identity_kept(lambda v: v[:, 1:2].mean((2, 3)), x, y, t, u)  # sees content alone
    assert told["u_nearer_to_x_than_to_t"] == 0 and told["u_nearer_to_t_than_x_is"] == 1
    assert d.shape == (4, 4) and torch.allclose(d[2], torch.zeros(4))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_checkpoints_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        g.load_generator("absent.pt")
    Path("garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"kind": "generator", "config": Evil()}, "evil.pt")
    torch.save({"kind": "embedding"}, "other.pt")
    config = dataclasses.asdict(g.Config(**TINY))
    state = g.Lord(g.Config(**TINY)).state_dict()
    torch.save(
        {"kind": "generator", "config": {**config, "class_dim": 9}, "lord": state}, "width.pt"
    )
    runs.save("good.pt", "generator", config=config, lord=state, train=[])
    whole = Path("good.pt").read_bytes()
    Path("short.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("garbage.pt", "evil.pt", "other.pt", "width.pt", "short.pt"):
        with pytest.raises(UsageError, match=name) as error:
            g.load_generator(name)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()
    lord, _ = g.load_generator("good.pt")
    assert not lord.training and not any(p.requires_grad for p in lord.parameters())


def test_command_trains_stops_and_resumes(tmp_path, monkeypatch, capsys, interrupted_at):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/synthetic-demo-0")
    assert g.main(FLAGS) == 0
    whole = torch.load(run / "generator.pt", weights_only=True)["lord"]
    assert {p.name for p in run.iterdir()} == {
        "people.json",
        "run.json",
        "generator.pt",
        "generator",
    }
    names = {"log.jsonl", "result.json", "quadruplets.png", "quadruplets.npz"}
    assert {p.name for p in (run / "generator").iterdir()} == names
    report = json.loads((run / "generator/result.json").read_text())
    assert (
        report["persons"] == 6
        and report["chance"] == pytest.approx(1 / 6)
        and 0 < report["psnr_reconstruction"] < 40
    )
    assert {"psnr_true_u", "person_from_content", "content_factors_from_class"} <= set(report)
    assert np.load(run / "generator/quadruplets.npz")["quadruplets"].shape == (24, 4, 3, 64, 64)
    assert len((run / "generator/log.jsonl").read_text().splitlines()) == 4

    other = ["--run", "other run", *FLAGS]
    with interrupted_at(g.Trainer, "epoch", 4):
        assert g.main(other) == 130 and "same command" in capsys.readouterr().err
    assert g.main([*other, "--resume"]) == 2 and "--resume" in capsys.readouterr().err
    assert g.main([*other, "--lr", "0.5"]) == 2 and "lr" in capsys.readouterr().err
    assert g.main([*other, "--export", "small.pt"]) == 0
    resumed = torch.load(Path("other run") / "generator.pt", weights_only=True)["lord"]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    _, content = g.load_generator("small.pt")
    assert all(torch.equal(whole[k].half(), content["lord"][k]) for k in whole)
    assert g.main(other) == 0  # finished: the report alone
    assert g.main([*other, "--noise", "0.5"]) == 2 and "noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--data", "folder", "--root", "absent"], "absent"),
        (["--preset", "nonsense"], "nonsense"),
        (["--synthetic-persons", "5"], "persons"),
        (["--loss", "vgg"], "--vgg-weights"),
        (["--epochs", "many"], "--epochs"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(tmp_path, monkeypatch, capfd, flags, named):
    monkeypatch.chdir(tmp_path)
    assert g.main([*FLAGS, *flags]) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("generator.py:")]
    assert len(err) == 1 and named in err[0]


def test_the_oracle_command_reports_on_persons_never_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("def embed(x):\n    return x.mean((2, 3))\n")
    people = ["--synthetic-persons", "12", "--validation-persons", "3", "--target-persons", "3"]
    given = ["--run", "r", *people, "--oracle", "net.py:embed"]
    assert g.main(given) == 2  # the demo's own G, trained on some of these persons
    assert "generator_demo.pt: trained on person-" in capsys.readouterr().err
    shipped = runs.load(Path(g.__file__).parent / "data/generator_demo.pt", "generator")
    runs.save("r/generator.pt", **{**shipped, "train": []})
    assert g.main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == runs.read_json("r/generator/oracle-net-embed.json") and told["images"] > 100
    rows = Path("r/net-embed/attacks/figure3.csv").read_text().splitlines()
    assert rows[0] == "kind,distance" and len(rows) == 1 + 2 * told["images"]
    assert g.main(["--run", "q", *people, "--oracle", "net.py:none"]) == 2
    assert "--oracle net.py:none: net.py has no none" in capsys.readouterr().err
    assert not Path("q").exists()


def test_the_shipped_generator_is_at_most_four_megabytes():
    shipped = Path(g.__file__).parent / "data" / "generator_demo.pt"
    assert shipped.stat().st_size <= 4_000_000
    assert {v.dtype for v in g.load_generator(shipped)[1]["lord"].values()} == {torch.float16}


def test_how_many_images_of_a_person_g_may_see(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--synthetic-persons 9 --synthetic-images 10 --validation-persons 2 --target-persons 3"
    flags += " --epochs 1 --encoder-epochs 1 --batch 4 --images 2 --channels 4,4,4,4 --hidden 8,8"
    assert g.main(flags.split()) == 0
    assert "generator: 8 images of 4 persons" in capsys.readouterr().out
