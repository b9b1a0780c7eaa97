"""`attacks.py --model`: a model that is not of a run, by one command; its misuse is one line."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attacks
import data
import embed
import metrics
from data.model import check_clean, model_name

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("clean", "eyeglasses", "square", "evasion")
SMALL = "--min-images 4 --targets 2 --intruders 2 --clean-intruders 4 --iterations 3"
SMALL += " --evasion-iterations 3 --square-stride 20 --size 32"
# the mean colours of a four by four grid, as a function, a module, and what makes one
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout()  # in training mode it would show

    def forward(self, images):
        return self.drop(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)) * self.scale

def make():
    return Net()

module, number, sizes = make(), 7, []
inner = make().eval()

def embed(images):
    sizes.append(tuple(images.shape[1:]))
    return inner(images)

class Needs(nn.Module):
    def __init__(self, width):
        super().__init__()
"""
READS = """
inner.load_state_dict(torch.load('weights.pt'))
nets = {'net': inner}

@__import__('functools').lru_cache
def net():
    return inner

def cached(images):
    return net()(images)

def by_name(images):
    return nets['net'](images)
"""
BAD = """
import torch
flat = lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
seen = []
def fails(x): return x @ torch.rand(5, 5)
def stops(x): raise SystemExit("no licence")
def deep(x): return x
def words(x): return "features"
def restless(x): return flat(x) + torch.rand(())
def batched(x): return flat(x) - flat(x).mean(0)
def detached(x): return flat(x.detach())
def rounded(x): return flat((x * 255).round())
def inplace(x): return flat(x.sub_(0.5))
def late(x):
    seen.append(len(x))
    return flat(x) / (len(seen) < 22)
"""


def write_people(root, persons=4, images=4, colour=(0, 1, 2)):
    """Each person a grid of colours of its own, each image a little noise; where a channel is not
    in colour it is noise alone."""
    rng = np.random.default_rng(0)
    for p in range(persons):
        (root / f"p{p}").mkdir(parents=True)
        own = rng.uniform(60, 190, (4, 4, 3))
        for k in range(images):
            grid = own + rng.normal(0, 8, own.shape)
            for channel in {0, 1, 2} - {*colour}:
                grid[..., channel] = rng.uniform(60, 190, (4, 4))
            image = grid.clip(0, 255).astype(np.uint8).repeat(16, 0).repeat(16, 1)
            Image.fromarray(image).save(root / f"p{p}/{k}.png")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """net.py, bad.py, folders of photographs."""
    home = tmp_path_factory.mktemp("model")
    write_people(home / "people")
    (home / "net.py").write_text(NET)
    (home / "bad.py").write_text(BAD)
    (home / "broken.py").write_text("1 / 0\n")
    return home


@pytest.fixture
def judge(home, monkeypatch, capsys):
    """judge(model, *flags) -> exit status, what was printed, the line of the error."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def command(model, *flags, root="people"):
        capsys.readouterr()
        people = ("--data", "folder", "--root", root) if root else ()
        status = attacks.main(["--model", model, *people, *SMALL.split(), *flags])
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if "attacks.py:" in line]

    return command


def table(folder, attack):
    with open(folder / f"{attack}.csv", newline="") as file:
        return list(csv.DictReader(file))


def pairs_of(folder, attack, column="distance"):
    rows = [row for row in table(folder, attack) if row["role"] == "intruder"]
    return {(row["target"], row["candidate"]): float(row[column]) for row in rows}


@pytest.mark.parametrize("size", [32, 45])
def test_one_command_judges_it_at_any_size(home, judge, size):
    run = f"sized-{size}"
    status, out, errors = judge("net.py:embed", "--size", str(size), "--run", run)
    assert (status, errors) == (0, [])
    lines = out.splitlines()
    assert "runs this Python code" in lines[0]
    line = f"net-embed: {size} x {size}, crop none, 2 targets of 4 persons, 4 pairs, preset model"
    assert any(text.startswith(line) for text in lines), out
    assert "clean AU-ROC 1.000, 24 genuine of 120 pairs" in lines and "WARNING" not in out
    assert {*sys.modules["of_user_net"].sizes} == {(3, size, size)}
    folder, counts = home / run / "net-embed/attacks", {"clean": 2 * (3 + 4), "evasion": 2 * 3}
    for name in NAMES:
        assert len(table(folder, name)) == counts.get(name, 2 * 2), name
        about = json.loads((folder / f"{name}.json").read_text())
        assert about["model"] == "net.py:embed" and about["config"]["size"] == size
        assert about["outside_mask_max"] == 0.0
    clean = {(r["target"], r["candidate"]): float(r["distance"]) for r in table(folder, "clean")}
    for name, sign in (("eyeglasses", -1), ("square", -1), ("evasion", 1)):
        for row in table(folder, name):
            moved = float(row["distance"]) - clean[row["target"], row["candidate"]]
            assert sign * moved > 0, name
    with np.load(folder / "eyeglasses.npz") as shown:
        assert shown["attacked"].shape[2:] == (3, size, size)
        assert (shown["mask"][0] == attacks.eyeglasses_mask(size, size).numpy()).all()
    figures = metrics.summary(home / run)["net-embed"]
    assert figures["clean"]["auroc"] == 1.0 and {*figures} >= {*NAMES}
    assert sum(text.startswith("net-embed ") for text in lines) >= 2 * len(NAMES)  # and its table
    assert (home / run / "tables.md").exists() and not (home / run / "people.json").exists()


@pytest.mark.parametrize("name", ["module", "make", "Net", "net_for_test"])
def test_a_module_what_makes_one_and_a_package_are_the_function(home, judge, name):
    flags = ("--attacks", "clean,eyeglasses", "--targets", "1")
    assert judge("net.py:embed", *flags, "--run", "forms")[0] == 0
    model, folder = f"net.py:{name}", f"net-{name}"
    if name == "net_for_test":  # a module of a package
        (home / "package").mkdir()
        shutil.copy(home / "net.py", home / "package/net_for_test.py")
        model, folder = "package.net_for_test:make", "package.net_for_test-make"
    assert judge(model, *flags, "--run", "forms")[0] == 0 and model_name(model) == folder
    for attack in ("clean", "eyeglasses"):
        one, two = (table(home / "forms" / m / "attacks", attack) for m in ("net-embed", folder))
        assert one == two and len(one) > 1


def test_a_module_normalises_for_itself_and_rows_are_its_distances(home, judge):
    normal = NET.replace("adaptive_avg_pool2d(images", "adaptive_avg_pool2d((images - 0.3) / 0.2")
    (home / "normal.py").write_text(normal)
    assert judge("normal.py:Net", "--attacks", "clean", "--run", "normal")[0] == 0
    images = data.load("folder", "people", size=32).images.double() / 255

    def features(images):
        return 2 * torch.nn.functional.adaptive_avg_pool2d((images - 0.3) / 0.2, 4).flatten(1)

    rows = table(home / "normal/normal-Net/attacks", "clean")
    for row in rows:
        anchor, candidate = (images[int(row[k])][None] for k in ("anchor", "candidate"))
        views = features(torch.cat([candidate, candidate.flip(3)])) - features(anchor)
        wanted = views.square().sum(1).mean().sqrt().item()
        assert float(row["distance"]) == pytest.approx(wanted, rel=1e-5)
    assert len(rows) == 14


def test_runs_go_by_photographs_and_name_and_a_file_named_as_a_script_hides_none(home, judge):
    (home / "other").mkdir()
    (home / "other/helper_for_test.py").write_text("half = 0.5\n")
    (home / "other/embed.py").write_text("from helper_for_test import half\n" + NET)
    assert judge("other/embed.py:embed", "--attacks", "clean")[0] == 0
    assert len(table(home / "runs/people-embed-embed/embed-embed/attacks", "clean")) == 14
    assert Path(embed.__file__).parent == ROOT


def test_goes_on_after_a_stop_and_refuses_another_model_or_size(home, judge, interrupted_at):
    flags = ("--attacks", "eyeglasses", "--run", "stopped")
    shutil.copy(home / "net.py", home / "changing.py")
    with interrupted_at(attacks, "attack_target", 2):
        assert judge("changing.py:make", *flags)[0] == 130
    known = json.loads((home / "stopped/changing-make/result.json").read_text())
    assert known["threshold"] > 0  # before the first attack: verify.py needs no more
    with interrupted_at(attacks, "attack_target", 0) as calls:
        status, out, _ = judge("changing.py:make", *flags)
    assert status == 0 and len(calls) == 1 + 2  # clean rows too, whatever the flags
    assert "\nchanging-make  clean " in out and "\nchanging-make  eyeglasses " in out
    assert out.endswith("the table again: stopped/tables.md\n")
    status, out, _ = judge("changing.py:make", *flags, "--attacks", "clean,eyeglasses")
    assert status == 0 and "changing-make eyeglasses: " in out and "kept" in out
    status, _, errors = judge("changing.py:make", *flags, "--size", "48")
    assert status == 2 and "size (32 before, 48 now)" in errors[0]
    (home / "changing.py").write_text(NET.replace("tensor(2.0)", "tensor(3.0)"))
    status, _, errors = judge("changing.py:make", *flags)
    assert status == 2 and "embedding (" in errors[0] and "--overwrite" in errors[0]


def test_the_table_is_of_the_defence_and_what_cannot_end_does_not_begin(
    home, judge, interrupted_at
):
    flags, rows = ("--run", "basic", "--attacks"), home / "basic/net-embed/attacks"
    status, out, _ = judge("net.py:embed", *flags, "eyeglasses", "--defences", "basic")
    figures = metrics.summary(home / "basic", 0, 0)["net-embed"]
    line = next(line for line in out.splitlines() if line.startswith("net-embed  eyeglasses "))
    assert status == 0 and line.split()[2] == f"{figures['eyeglasses']['auroc']:.3f}"
    known = (rows.parent / "result.json").read_bytes()
    for attack, more, named in (
        ("square", "--defences mirroring", "clean.json: other settings: defences ("),
        ("square", "--defences basic --target-images 1", "--target-images 1: no genuine pair"),
        ("square,eyeglasses", "--defences basic --iterations 4", "iterations (3 before, 4 now)"),
        ("square", "--defences basic --distance cosine", "clean.json: other settings: distance ("),
    ):
        with interrupted_at(attacks, "attack_target", 1) as calls:
            status, _, errors = judge("net.py:embed", *flags, attack, *more.split())
        assert (status, calls) == (2, []) and named in errors[0]
    assert (rows.parent / "result.json").read_bytes() == known
    assert not (rows / "square.csv").exists()


def test_weights_that_the_file_reads_count_as_the_model(home, judge):
    """However the function reaches them."""
    (home / "reads.py").write_text(NET + READS)
    for name in ("embed", "cached", "by_name"):
        for scale, wanted in ((1.0, 0), (1.0, 0), (1.5, 2)):
            torch.save({"scale": torch.tensor(scale)}, home / "weights.pt")
            flags = ("--attacks", "clean", "--run", f"reads-{name}")
            status, _, errors = judge(f"reads.py:{name}", *flags)
            assert status == wanted, name
        assert "embedding (" in errors[0]


def test_rows_are_of_the_photographs_not_of_their_names(home, judge):
    write_people(home / "moving")
    flags = ("--attacks", "clean", "--run", "moving-run")
    assert judge("net.py:embed", *flags, root="moving")[0] == 0
    rows = (home / "moving-run/net-embed/attacks/clean.csv").read_text()
    for same in ("moving/", "./moving", str(home / "moving")):
        status, out, _ = judge("net.py:embed", *flags, root=same)
        assert status == 0 and "kept" in out, same
    for name in ("p0/0.png", "p3/3.png"):  # other photographs of the same names
        picture = home / "moving" / name
        before = picture.read_bytes()
        Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
        status, _, errors = judge("net.py:embed", *flags, root="moving")
        assert status == 2 and "other settings: images (" in errors[0]
        picture.write_bytes(before)
    assert (home / "moving-run/net-embed/attacks/clean.csv").read_text() == rows


WRONG = {
    "nowhere.py:embed": "no such file nowhere.py",
    "net.py:nobody": "net.py has no nobody",
    "net.py": "give FILE.py:NAME or package.module:NAME",
    "no_such_package.net:embed": "cannot be loaded: ModuleNotFoundError",
    "broken.py:embed": "cannot be loaded: ZeroDivisionError",
    "net.py:number": "number is a int, wanted a function of images",
    "net.py:Needs": "Needs is a type, wanted",
    "bad.py:fails": "fails on the first images, cpu: RuntimeError",
    "bad.py:stops": "fails on the first images, cpu: SystemExit: no licence",
    "bad.py:deep": "gives Tensor [16, 3, 32, 32] for 16 images, wanted (16, D)",
    "bad.py:words": "gives str",
    "bad.py:restless": "answers an image differently alone and in a batch",
    "bad.py:batched": "answers an image differently alone and in a batch",
    "bad.py:detached": "no gradient reaches the images",
    "bad.py:rounded": "the gradient for the images is zero",
    "bad.py:inplace": "changes its images in place",
    "bad.py:late": "not finite",
    "net.py:embed --size 31": "--size 31: give a number from 32 to 256",
    "net.py:embed --min-images 5": "nobody has 5 images",
    "net.py:embed --attacks indirect": "needs the generator",
    "net.py:embed --method ours": "--method",
    "net.py:embed --distance taxi": "--distance",
    "net.py:embed --root one": "one person alone has no intruders",
    "net.py:embed --root nowhere": "nowhere",
    "net.py:embed --mask nowhere.png": "nowhere.png",
    "net.py:embed --mask bad.py": "bad.py: cannot be read (cannot identify image file",
    "net.py:embed --mask black.png": "of one colour",
    "net.py:embed --judge bad.py:detached": "--judge bad.py:detached: no gradient",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_judged_is_one_line_and_writes_no_rows(home, judge, words):
    if not (home / "one").exists():
        write_people(home / "one", persons=1)
        Image.new("RGB", (32, 32)).save(home / "black.png")
    model, *flags = words.split()
    status, _, errors = judge(model, *flags, "--run", "bad")
    assert status == 2 and len(errors) == 1, errors
    assert WRONG[words] in errors[0] and not [*home.glob("bad/*/attacks/*.csv")]


def test_a_low_clean_figure_names_the_cause_and_shows_the_picture(home, judge):
    write_people(home / "blue", persons=6, colour=(2,))
    (home / "bgr.py").write_text(NET.replace("(images, 4)", "(images[:, :1], 4)"))  # of BGR: blue
    status, out, _ = judge("bgr.py:embed", "--attacks", "clean", "--run", "bgr", root="blue")
    warning = next(line for line in out.splitlines() if line.startswith("WARNING"))
    assert status == 0 and "1.000 as BGR" in warning and "in [-1, 1]" in warning
    assert float(warning.split()[1]) < 0.75 and "colours or range may be wrong" in warning
    picture = home / "bgr/bgr-embed/input.png"
    assert str(picture.relative_to(home)) in warning
    seen, size = np.asarray(Image.open(picture)).astype(int), (32, 32)
    person = Image.open(home / "blue/p2/0.png").resize(size, Image.Resampling.BICUBIC)
    assert seen.shape == (32, 6 * 32, 3) and np.abs(seen[:, 64:96] - np.asarray(person)).max() < 9


def test_cosine_is_asked_for_where_the_norm_says_nothing(home, judge):
    loud = NET.replace("return inner(images)", "return inner(images - 0.5) * loudness(images)")
    loud += "\ndef loudness(images):\n    return 1 + (1e4 * images.mean((1, 2, 3))[:, None]) % 9\n"
    (home / "loud.py").write_text(loud)
    flags = ("--attacks", "clean", "--run", "loud")
    status, out, _ = judge("loud.py:embed", *flags)
    assert status == 0 and "1.000 by the other distance: --distance cosine" in out
    status, _, errors = judge("loud.py:embed", *flags, "--distance", "cosine")
    assert status == 2 and "distance (euclidean before, cosine now)" in errors[0]
    status, out, _ = judge("loud.py:embed", *flags, "--distance", "cosine", "--overwrite")
    assert status == 0 and "clean AU-ROC 1.000" in out and "WARNING" not in out
    rows = table(home / "loud/loud-embed/attacks", "clean")
    assert max(float(row["distance"]) for row in rows) <= 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_of_half_precision_is_judged_to_the_end(home, judge, dtype):
    cast = f"\ndef half(images):\n    return embed(images).to(torch.{dtype})\n"
    (home / f"{dtype}.py").write_text(NET + cast)
    flags = ("--run", dtype, "--attacks", "clean,eyeglasses")
    for distance in ("euclidean", "cosine"):
        more = (*flags, "--distance", distance, "--overwrite")
        assert [judge(f"{dtype}.py:{name}", *more)[0] for name in ("half", "embed")] == [0, 0]
        for name in ("clean", "eyeglasses"):
            half, full = (
                pairs_of(home / dtype / f"{dtype}-{f}/attacks", name) for f in ("half", "embed")
            )
            assert half == pytest.approx(full, rel=0.02) and half != full


def test_photographs_of_a_target_are_limited_and_persons_lie_two_folders_deep(home, judge):
    for p in range(4):
        shutil.copytree(home / f"people/p{p}", home / f"deep/p{p}/monday")
        shutil.copytree(home / f"people/p{p}", home / f"deep/p{p}/tuesday")
        for path in (home / f"deep/p{p}/tuesday").iterdir():
            Image.open(path).point(lambda v: v + 3).save(path)
    flags = ("--attacks", "clean", "--run", "deep-run", "--target-images", "6")
    assert judge("net.py:embed", *flags, root="deep")[0] == 2
    assert judge("net.py:embed", *flags, "--person-folder", "first", root="deep")[0] == 0
    rows = table(home / "deep-run/net-embed/attacks", "clean")
    assert sum(row["role"] == "genuine" for row in rows) == 2 * 5


def test_a_mask_of_ones_own_is_one_more_attack(home, judge):
    picture = Image.new("L", (48, 48))
    picture.paste(255, (12, 24, 30, 36))
    picture.save(home / "own.png")
    flags = ("--attacks", "clean", "--size", "48", "--run", "masked", "--mask", "own.png")
    status, out, _ = judge("net.py:embed", *flags)
    assert "--mask own.png: 216 of 48 x 48 pixels may change, rows 24-35, columns 12-29\n" in out
    folder = home / "masked/net-embed/attacks"
    with np.load(folder / "mask.npz") as shown:
        mask, changed = shown["mask"][0], (shown["clean"] != shown["attacked"]).any((1, 2))
    wanted = np.zeros((48, 48), bool)
    wanted[24:36, 12:30] = True
    assert status == 0 and (mask == wanted).all() and not (changed & ~wanted).any()
    clean, attacked = (pairs_of(folder, attack) for attack in ("clean", "mask"))
    assert attacked and all(d < clean[pair] for pair, d in attacked.items())
    assert "kept" in judge("net.py:embed", *flags)[1]
    picture.paste(255, (0, 0, 10, 10))
    picture.save(home / "own.png")
    status, _, errors = judge("net.py:embed", *flags)
    assert status == 2 and "mask (" in errors[0] and "--overwrite" in errors[0]


def test_a_second_model_measures_what_was_made_on_the_first(home, judge):
    """The column `judge`: its distances for the very same images, of 8 bits, mirrored too."""
    (home / "second.py").write_text(NET.replace("images, 4", "images, 8"))
    flags = ("--attacks", "clean,eyeglasses", "--run", "judged")
    status, out, _ = judge("net.py:embed", *flags, "--judge", "second.py:embed")
    assert status == 0 and "second-embed: clean AU-ROC 1.000" in out
    folder, second = home / "judged/net-embed/attacks", sys.modules["of_user_second"].inner
    assert not (home / "judged/second-embed").exists()
    white, other = (pairs_of(folder, "eyeglasses", k) for k in ("distance", "judge"))
    assert sum(other.values()) > sum(white.values())
    with np.load(folder / "eyeglasses.npz") as shown, torch.no_grad():
        for t, target in enumerate(shown["target"]):
            images, anchor = (torch.from_numpy(shown[k][t]) / 255 for k in ("attacked", "anchor"))
            for net, rows in ((sys.modules["of_user_net"].inner, white), (second, other)):
                views = torch.stack([net(x) for x in (images, images.flip(3))])
                d = (views - net(anchor[None])).square().sum(2).mean(0).sqrt().tolist()
                seen = [rows[str(target), str(candidate)] for candidate in shown["candidate"][t]]
                assert seen == pytest.approx(d, rel=1e-6)
    status, _, errors = judge("net.py:embed", *flags)  # the first alone is another table
    assert status == 2 and "judge (" in errors[0]


def test_which_attacks_a_model_meets(judge):
    status, _, errors = judge("net.py:embed", root="")
    assert status == 2 and "give --data folder --root PHOTOS" in errors[0]

    def attacks_of(*flags):
        flags = ["--model=net.py:f", "--data=folder", "--root=.", *flags]
        return attacks.parse(flags)[0].attacks

    assert attacks_of() == attacks_of("--preset", "paper") == NAMES
    assert attacks_of("--attacks", "clean,eyeglasses") == ("clean", "eyeglasses")
    every = tuple(name for name in attacks.ATTACKS if name != "indirect")
    assert attacks_of("--attacks", "all") == every


# what the photographs and the user's folder do (issue 28)


@pytest.mark.parametrize("wrong", ["", "as BGR", "in [-1, 1]"])
def test_a_better_order_or_range_is_named_also_where_the_clean_figure_is_high(wrong):
    """Red is the least noisy channel; dark values of blue tell something beside it."""
    several, person = torch.Generator().manual_seed(0), torch.arange(12).repeat_interleave(4)
    own = torch.rand(12, 3, 1, 1, generator=several).repeat_interleave(4, 0)
    noise = torch.randn(48, 3, 1, 1, generator=several)
    noise *= torch.tensor([0.02, 0.1, 0.12])[:, None, None]
    images = ((own + noise).clamp(0, 1) * 255).byte().expand(-1, -1, 8, 8)
    models = {"": lambda x: x[:, 0, 0], "as BGR": lambda x: x[:, 2, 0]}
    models["in [-1, 1]"] = lambda x: torch.cat([x[:, 0, 0], 0.3 * x[:, 2, 0].clamp(max=0)], 1)
    clean, *warning = check_clean("--model", models[wrong], images, person, False, 16)
    given = float(clean.split()[2].rstrip(","))
    assert given == {"": 0.957, "as BGR": 0.824, "in [-1, 1]": 0.957}[wrong]
    assert len(warning) == bool(wrong)
    for line in warning:
        better = {"as BGR": 0.957, "in [-1, 1]": 0.971}[wrong]
        assert f"{given:.3f} as given" in line and f"{better:.3f} {wrong}" in line


def test_a_folder_that_the_users_file_puts_first_hides_none_of_ours(home, judge, monkeypatch):
    """Its metrics.py comes from another project; the table is made by ours."""
    (home / "first").mkdir()
    for name in ("metrics", "results"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (home / f"first/{name}.py").write_text("raise SystemExit('not ours')")
    (home / "first/net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(home / 'first')!r})\n{NET}"
    )
    status, out, _ = judge("first/net.py:embed", "--attacks", "clean", "--run", "first-run")
    assert status == 0 and "net-embed  clean" in out and (home / "first-run/tables.md").exists()
    assert Path(sys.modules["metrics"].__file__).parent == ROOT


@pytest.mark.parametrize("line", [
    "from metrics import accuracy", "from data.nets import Net", "import metrics; metrics.accuracy"
])  # fmt: skip
@pytest.mark.parametrize("form", ["hides/net.py", "hides_net_for_test"])
def test_a_users_module_that_ours_hides_is_named(home, judge, monkeypatch, line, form):
    folder = home / "hides"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.py").write_text("accuracy = 1")
    for name in ("net.py", "hides_net_for_test.py"):
        (folder / name).write_text(f"{line}\n{NET}")
    root = home / "people"
    if not form.endswith(".py"):  # a module of the folder that one stands in
        monkeypatch.chdir(folder)
        sys.modules.pop(form, None)
    status, _, errors = judge(f"{form}:embed", "--root", str(root), "--run", str(home / "bad"))
    assert status == 2 and len(errors) == 1 and "cannot be loaded: " in errors[0]
    assert errors[0].endswith(": that module is ours, rename yours")


def test_the_universal_patch_is_a_picture_to_print_which_comes_back_as_a_mask(home, judge):
    flags = "--size 64 --run printed --patch-train 4 --patch-iterations 3".split()
    assert judge("net.py:embed", "--attacks", "clean,eye_patch", *flags)[0] == 0
    folder, wanted = home / "printed/net-embed/attacks", attacks.eye_patch_mask().numpy()
    with np.load(folder / "eye_patch.npz") as shown:
        for target, attacked in zip(shown["target"], shown["attacked"].transpose(0, 1, 3, 4, 2)):
            patch = np.asarray(Image.open(folder / f"eye_patch/{target}.png"))
            assert (patch[..., 3] == 255 * wanted).all() and patch.shape == (64, 64, 4)
            assert len(attacked) and (attacked[:, wanted] == patch[wanted][:, :3]).all()
    printed = f"printed/net-embed/attacks/eye_patch/{target}.png"
    status, out, errors = judge("net.py:embed", "--attacks", "clean", *flags, "--mask", printed)
    line = "384 of 64 x 64 pixels may change, rows 26-37, columns 16-47"
    assert status == 0 and f"--mask {printed}: {line}" in out, errors
    with np.load(folder / "mask.npz") as shown:
        assert (shown["mask"] == wanted).all()


def test_a_mask_of_the_photographs_size_goes_through_their_crop(home, judge):
    for p in range(3):
        for k in range(4):
            image = Image.open(home / f"people/p{p}/{k}.png").resize((250, 250))
            (home / f"large/p{p}").mkdir(parents=True, exist_ok=True)
            image.save(home / f"large/p{p}/{k}.png")
    drawn = Image.new("L", (250, 250))
    drawn.paste(255, (57, 39, 127, 109))  # of the crop lfw the upper left
    drawn.save(home / "drawn.png")
    flags = ("--attacks", "clean", "--size", "139", "--run", "large-run", "--mask")
    status, out, _ = judge("net.py:embed", *flags, "drawn.png", root="large")
    assert status == 0 and "4900 of 139 x 139 pixels may change, rows 0-69, columns 0-69" in out
    drawn.resize((320, 240)).save(home / "squeezed.png")
    status, _, errors = judge("net.py:embed", *flags, "squeezed.png", root="large")
    wanted = "320 x 240 pixels: draw it 139 x 139 or 250 x 250, as --size or a photograph"
    assert status == 2 and wanted in errors[0]
