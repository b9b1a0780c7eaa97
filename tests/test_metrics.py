"""metrics.py and results/ against scikit-learn, hand-made answers and runs with planted faults."""

import csv
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import metrics
from data.run import UsageError
from results import figures, tables

ROOT = Path(metrics.__file__).parent
HEADER = "attack,mirroring,selection,seed,target,anchor,candidate,person,role,distance"


def samples():
    rng = np.random.default_rng(0)
    yield "separated", [0.1, 0.2], [0.3, 0.4, 0.5]
    yield "reversed", [3.0, 4.0], [1.0]
    yield "one each, tied", [1.0], [1.0]
    yield "constant", [2.0] * 5, [2.0] * 3
    yield "zeros", [0.0, 0.0, 1.0], [0.0, 2.0]
    yield "ties", rng.integers(0, 5, 40).astype(float), rng.integers(1, 7, 90).astype(float)
    yield "plain", rng.normal(1, 0.3, 101), rng.normal(1.4, 0.5, 33)


@pytest.mark.parametrize(
    "genuine, intruders", [s[1:] for s in samples()], ids=[s[0] for s in samples()]
)
def test_areas_equal_scikit_learn(genuine, intruders):
    truth = np.r_[np.zeros(len(genuine)), np.ones(len(intruders))]
    score = np.r_[genuine, intruders]
    balanced = np.where(truth == 1, 1 / len(intruders), 1 / len(genuine))
    assert metrics.auroc(genuine, intruders) == pytest.approx(
        roc_auc_score(truth, score), abs=1e-12
    )
    assert metrics.average_precision(genuine, intruders) == pytest.approx(
        average_precision_score(truth, score), abs=1e-12
    )
    expected = average_precision_score(truth, score, sample_weight=balanced)
    assert metrics.aupr(genuine, intruders) == pytest.approx(expected, abs=1e-12)


def test_balanced_precision_ignores_the_prior_and_starts_at_chance():
    genuine, intruders = np.arange(10.0), np.arange(3.0, 9.0)
    assert metrics.aupr(genuine, np.tile(intruders, 7)) == pytest.approx(
        metrics.aupr(genuine, intruders)
    )
    assert (
        metrics.average_precision(genuine, np.tile(intruders, 7))
        > metrics.average_precision(genuine, intruders) + 0.1
    )
    assert metrics.aupr([1.0] * 9, [1.0] * 2) == 0.5


def test_intruder_as_positive_class_fits_the_published_pairs():
    # an attack that carries a seventh of the intruders all the way: eyeglasses on ours, published
    # 0.868 / 0.896
    rng = np.random.default_rng(0)
    genuine = rng.normal(1.0, 0.25, 20000)
    intruders = np.r_[rng.normal(0.7, 0.3, 3000), rng.normal(1.9, 0.3, 17000)]
    area, positive_intruder = metrics.auroc(genuine, intruders), metrics.aupr(genuine, intruders)
    positive_genuine = metrics.aupr(-intruders, -genuine)
    assert 0.84 < area < 0.9 and area + 0.01 < positive_intruder < area + 0.06
    assert positive_genuine < area - 0.05
    # a published PR below ROC (weak AT, eye patch, 0.571 / 0.556) is possible too: genuine outliers
    # farthest of all
    genuine = np.r_[rng.normal(1.0, 0.2, 15000), rng.normal(1.6, 0.5, 5000)]
    intruders = rng.normal(1.14, 0.2, 20000)
    assert metrics.aupr(genuine, intruders) < metrics.auroc(genuine, intruders) - 0.01


@pytest.mark.parametrize(
    "bad", [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.inf])]
)
def test_no_area_without_both_classes_or_with_non_finite_distances(bad):
    for area in (metrics.auroc, metrics.aupr, metrics.average_precision):
        with pytest.raises(ValueError, match="distance"):
            area(*bad)


@pytest.mark.parametrize(
    "genuine, intruders", [s[1:] for s in samples()], ids=[s[0] for s in samples()]
)
def test_both_errors_and_what_passes_at_a_far(genuine, intruders):
    truth = np.r_[np.ones(len(genuine)), np.zeros(len(intruders))]
    far, tar, _ = roc_curve(truth, -np.r_[genuine, intruders], drop_intermediate=False)
    equal = brentq(lambda x: 1 - x - np.interp(x, far, tar), 0, 1)
    ours = metrics.roc(genuine, intruders)
    if 0 < equal < 1:  # np.interp is one of two values where the curve rises straight up
        between = [f(x) for f, x in ((max, far[far <= 1 - tar]), (min, far[far >= 1 - tar]))]
        assert between[0] <= metrics.eer(genuine, intruders) <= between[1]
    assert set(zip(*ours)) == set(zip(far, tar))
    every = [0.0, *np.unique(np.r_[genuine, intruders]), math.inf]
    genuine, intruders = np.array(genuine), np.array(intruders)
    for asked in (0.0, 0.01, 0.1, 1 / 3, 0.5, 1.0):
        delta = max(d for d in every if (intruders < d).mean() <= asked + 1e-9)
        found = metrics.passing_at_far(genuine, intruders, asked)
        assert found == (genuine < delta).mean()
        assert metrics.passing_at_far(intruders, intruders, asked) <= asked


def test_equal_error_rate_by_hand():
    assert metrics.eer([1.0, 2.0], [3.0, 4.0]) == 0 and metrics.eer([3.0], [1.0]) == 1
    assert metrics.eer([2.0] * 5, [2.0] * 3) == 0.5  # chance: on the line between the corners
    assert metrics.eer([1.0, 2.0, 3.0, 6.0], [4.0, 5.0, 7.0, 5.5]) == 0.25
    # where FAR jumps from 0 past 1 - TAR = 1 / 4
    assert metrics.eer([1.0, 2.0, 3.0, 6.0], [4.0, 7.0]) == 0.25


def test_detection_at_five_percent():
    genuine = np.arange(1.0, 101.0)
    delta = metrics.threshold(genuine, 0.05)
    # the smallest: just above 95, so that five are refused
    assert 95 < delta < 95 + 1e-9 and metrics.fpr_at(genuine, delta) == 0.05
    # eq. (1): at delta an image is different, an evading one too
    assert metrics.detection_at_fpr(genuine, [0.0, delta, 200.0]) == pytest.approx(2 / 3)
    assert metrics.detection_at_fpr(genuine, [0.0, delta, 200.0, 300.0], evading=True) == 0.25
    assert 100 < metrics.threshold(genuine, 0.0) < 100.1 and metrics.threshold(genuine, 1.0) == 1
    for bad in ([], 0.05), ([1.0], 1.5):
        with pytest.raises(ValueError):
            metrics.threshold(*bad)


@pytest.mark.parametrize(
    "genuine",
    [[2.0] * 200, [1.0] * 176 + [2.0] * 24, [1.0, 2.0, 3.0], list(range(39)), [0.0], [1, 2] * 50],
    ids=["constant", "tied at the top", "three pairs", "39 pairs", "a zero", "two values"],
)
def test_the_actual_fpr_is_at_most_what_was_asked_for(genuine):
    genuine = np.array(genuine, dtype=float)
    for fpr in (0.0, 0.05, 0.1, 0.5):
        delta = metrics.threshold(genuine, fpr)
        assert metrics.fpr_at(genuine, delta) <= fpr
        # a smaller one refuses more than that
        assert metrics.fpr_at(genuine, np.nextafter(delta, -np.inf)) > fpr


def test_a_constant_embedding_detects_nothing():
    constant = [2.0] * 40
    assert metrics.detection_at_fpr(constant, constant) == 0
    assert metrics.detection_at_fpr(constant, constant, evading=True) == 1


D, T, NAN = [1.0, 2.0], ["a", "b"], math.nan
WRONG = {
    "area, nan": lambda m: m.auroc([1.0, NAN], D),
    "balanced area, nan": lambda m: m.aupr(D, [NAN]),
    "average precision, inf": lambda m: m.average_precision(D, [math.inf]),
    "threshold, nan": lambda m: m.threshold([1.0, NAN]),
    "threshold, FPR": lambda m: m.threshold(D, NAN),
    "actual FPR, nan": lambda m: m.fpr_at([1.0, NAN], 1.0),
    "actual FPR, none": lambda m: m.fpr_at([], 1.0),
    "actual FPR, delta": lambda m: m.fpr_at(D, NAN),
    "detection, genuine": lambda m: m.detection_at_fpr([1.0, NAN], [2.0, 3.0]),
    "detection, attacked": lambda m: m.detection_at_fpr(D, [NAN]),
    "detection, none": lambda m: m.detection_at_fpr(D, [], evading=True),
    "ROC, nan": lambda m: m.roc([1.0, NAN], D),
    "equal errors, none": lambda m: m.eer(D, []),
    "passing, nan": lambda m: m.passing_at_far([NAN], D, 0.1),
    "passing, no intruders": lambda m: m.passing_at_far(D, [], 0.1),
    "passing, FAR": lambda m: m.passing_at_far(D, D, 1.5),
    "passing, FAR nan": lambda m: m.passing_at_far(D, D, NAN),
    "detection bootstrap, FPR": lambda m: m.detection_bootstrap((D, T), (D, T), 1.0),
    "detection bootstrap, names": lambda m: m.detection_bootstrap((D, T), (D, T), among=["a"]),
    "bootstrap, nan": lambda m: m.bootstrap(([1.0, NAN], T), (D, T)),
    "bootstrap, lengths": lambda m: m.bootstrap((D, T), (D, ["a"])),
    "bootstrap, longer": lambda m: m.bootstrap((D, ["a", "b", "a"]), (D, T)),
    "bootstrap, names": lambda m: m.bootstrap((D, T), (D, T), among=["a", "c"]),
    "bootstrap, n": lambda m: m.bootstrap((D, T), (D, T), n=0),
    "interval, none": lambda m: m.interval(np.array([])),
    "interval, inf": lambda m: m.interval(np.array([1.0, math.inf])),
    "interval, level": lambda m: m.interval(np.array(D), level=95),
    "detection bootstrap, nan": lambda m: m.detection_bootstrap((D, T), ([NAN, 1.0], T)),
    "detection bootstrap, lengths": lambda m: m.detection_bootstrap((D, T), (D, ["a", "b", "b"])),
    "a distance": lambda m: m.Attack([ROW._replace(distance=NAN)], {}),
    "a negative distance": lambda m: m.Attack([ROW._replace(distance=-1.0)], {}),
    "a role": lambda m: m.Attack([ROW._replace(role="friend")], {}),
    "a setting": lambda m: m.Attack([ROW._replace(mirroring=2)], {}),
    "under": lambda m: m.under({}, 2, 1),
    "pick, role": lambda m: m.pick({}, "clean", "friend"),
    "pick, attack": lambda m: m.pick({}, "eyeglases", "intruder"),
    "sides, attack": lambda m: m.sides({}, "eyeglases"),
    "closest, nan": lambda m: m.closest([ROW], [ROW._replace(distance=NAN)]),
    "closest, none": lambda m: m.closest(),
    "measure, method": lambda m: m.measure([], "our", "clean"),
    "measure, attack": lambda m: m.measure([], "ours", "cleen"),
    "measure, setting": lambda m: m.measure([m.Run(ROOT, {"ours": {}})], "ours", "clean", 1, 2),
}
ROW = metrics.Row("clean", 1, 1, 0, "a", 7, 1, "a", "genuine", 0.5)


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_no_figure_of_what_cannot_be(call):
    with pytest.raises(ValueError) as error:
        call(metrics)
    assert str(error.value)


def test_an_attack_of_one_run_alone_is_measured_there(run, tmp_path):
    write(run, "ours", "of_my_own", attacked(0.5, 0.5, 0.5, 0.5))
    write(tmp_path / "other", "ours", "clean", CLEAN + INTRUDERS)
    both = metrics.summary([metrics.read_run(run), metrics.read_run(tmp_path / "other")])
    assert both["ours"]["of_my_own"]["runs"] == 1
    assert metrics.measure([metrics.read_run(run)], "weak-at", "square") is None


def test_bootstrap_equals_a_loop_over_resampled_targets():
    rng = np.random.default_rng(1)
    g, gt = rng.integers(0, 9, 40).astype(float), rng.integers(0, 5, 40)
    i, it = (
        rng.integers(2, 12, 90).astype(float),
        rng.integers(0, 6, 90),
    )  # target 5 has intruders alone
    fast = metrics.bootstrap((g, gt), (i, it), n=50, seed=3)
    slow = []
    for counts in np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=50):
        a, b = np.repeat(g, counts[gt]), np.repeat(i, counts[it])
        if len(a) and len(b):
            slow.append(metrics.auroc(a, b))
    assert fast == pytest.approx(np.array(slow), abs=1e-12)


def test_interval_is_seeded_covers_and_is_fast():
    rng = np.random.default_rng(2)
    target = np.repeat(np.arange(30), 64)
    shift = rng.normal(0, 0.5, 30)
    g, gt = rng.normal(0, 1, 30 * 12) + np.repeat(shift, 12), np.repeat(np.arange(30), 12)
    i = rng.normal(1.5, 1, len(target)) + shift[target]
    samples = (g, gt), (i, target)
    start = time.process_time()
    lo, hi = metrics.interval(metrics.bootstrap(*samples))
    assert time.process_time() - start < 0.5
    assert lo < metrics.auroc(g, i) < hi and 0.005 < hi - lo < 0.2
    assert (lo, hi) == metrics.interval(metrics.bootstrap(*samples))
    assert (lo, hi) != metrics.interval(metrics.bootstrap(*samples, seed=1))
    narrow = metrics.interval(metrics.bootstrap(*samples), level=0.5)
    assert lo < narrow[0] < narrow[1] < hi
    one_target = metrics.bootstrap((g, gt * 0), (i, target * 0))
    assert all(math.isnan(v) for v in metrics.interval(one_target))


def write(run, method, name, rows, sidecar=None, header=HEADER):
    """rows: (role, target, candidate, distance[, mirroring, selection]) or finished lines."""
    folder = run / method / "attacks"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header]
    for r in rows:
        if isinstance(r, str):
            lines.append(r)
            continue
        role, target, candidate, distance, *config = r
        m, s = config or (1, 1)
        person = target if role == "genuine" else "other"
        lines.append(f"{name},{m},{s},0,{target},7,{candidate},{person},{role},{distance}")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    if sidecar is not None:
        (folder / f"{name}.json").write_text(json.dumps(sidecar))
    return folder / f"{name}.csv"


CLEAN = [
    ("genuine", "a", 1, 0.1),
    ("genuine", "a", 2, 0.3),
    ("genuine", "b", 3, 0.2),
    ("genuine", "b", 4, 0.4),
]
INTRUDERS = [
    ("intruder", "a", 10, 1.0),
    ("intruder", "a", 11, 2.0),
    ("intruder", "b", 12, 3.0),
    ("intruder", "b", 13, 4.0),
]


def attacked(*distances):
    return [(*row[:3], d) for row, d in zip(INTRUDERS, distances)]


@pytest.fixture
def run(tmp_path):
    write(tmp_path, "ours", "clean", CLEAN + INTRUDERS)
    write(tmp_path, "ours", "eyeglasses", attacked(0.05, 2.0, 0.35, 4.0))
    return tmp_path


def test_summary_by_hand(run):
    write(
        run,
        "ours",
        "evasion",
        [("genuine", "a", 1, 0.1), ("genuine", "a", 2, 3.5), ("genuine", "b", 3, 9.0)],
    )
    write(
        run, "ours", "noise", [("genuine", "a", 1, 5.0), ("intruder", "a", 10, 1.0)]
    )  # both roles made anew
    result = metrics.summary(run)["ours"]
    assert list(result) == ["clean", "eyeglasses", "noise", "evasion"]
    assert result["clean"]["auroc"] == 1 and result["clean"]["interval"] == [1, 1]
    assert result["clean"]["n_targets"] == 2 and result["clean"]["detected"] == 1
    assert {m["fpr"] for m in result.values()} == {0}  # of four pairs none may be refused
    assert result["eyeglasses"]["auroc"] == (0 + 4 + 3 + 4) / 16
    assert (result["eyeglasses"]["n_genuine"], result["eyeglasses"]["n_intruders"]) == (4, 4)
    assert result["eyeglasses"]["detected"] == 0.5  # delta is just above 0.4
    assert (
        result["evasion"]["n_genuine"] == 3 and result["evasion"]["n_intruders"] == 4
    )  # against clean intruders
    assert result["evasion"]["auroc"] == (4 + 1 + 0) / 12 and result["evasion"][
        "detected"
    ] == pytest.approx(1 / 3)
    assert result["noise"]["auroc"] == 0 and result["noise"]["interval"] == [None, None]


def test_summary_takes_only_the_setting_asked_for(run):
    write(
        run, "ours", "clean", CLEAN + INTRUDERS + [(*r[:3], 1.0, 0, 1) for r in CLEAN + INTRUDERS]
    )
    assert metrics.summary(run, 0, 1)["ours"]["clean"]["auroc"] == 0.5
    assert "eyeglasses" not in metrics.summary(run, 0, 1)["ours"]
    assert metrics.summary(run)["ours"]["clean"]["auroc"] == 1
    with pytest.raises(UsageError, match="mirroring 0 and selection 0"):
        metrics.summary(run, 0, 0)


def test_worst_is_the_strongest_attack_per_intruder(run):
    write(run, "ours", "square", attacked(3.0, 0.01, 0.5, 4.0))
    write(
        run, "ours", "eye_patch", [("intruder", "a", 99, 0.0)]
    )  # other intruders: cannot be compared per intruder
    rows = metrics.worst(metrics.under(metrics.read_run(run).methods["ours"], 1, 1))
    assert [r.distance for r in rows] == [0.05, 0.01, 0.35, 4.0]
    assert metrics.summary(run)["ours"]["worst"]["auroc"] == (0 + 0 + 3 + 4) / 16


def test_command_prints_table_or_json(run, capsys):
    assert metrics.main(["--run", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == metrics.summary(run)
    keys = {"auroc", "aupr", "ap", "n_targets", "n_genuine", "n_intruders", "interval", "fpr"}
    assert keys <= set(printed["ours"]["eyeglasses"])
    assert metrics.main(["--run", str(run)]) == 0
    assert "eyeglasses" in capsys.readouterr().out


GOOD = "clean,1,1,0,a,7,1,a,genuine,0.5"
BAD = {
    "missing column": (["clean,1"], "attack,mirroring", ":1:", "selection"),
    "short row": ([GOOD, "clean,1,1,0,a"], HEADER, ":3:", "5 fields"),
    "distance": ([GOOD, GOOD.replace("0.5", "near")], HEADER, ":3:", "'near'"),
    "not finite": ([GOOD.replace("0.5", "nan")], HEADER, ":2:", "finite"),
    "negative": ([GOOD.replace("0.5", "-1")], HEADER, ":2:", "finite"),
    "mirroring": ([GOOD.replace("clean,1", "clean,2")], HEADER, ":2:", "mirroring is 2"),
    "candidate": ([GOOD.replace(",1,a,", ",x,a,")], HEADER, ":2:", "candidate is 'x'"),
    "role": ([GOOD.replace("genuine", "friend")], HEADER, ":2:", "friend"),
    "twice": ([GOOD, GOOD], HEADER, ":3:", "twice"),
    "no rows": ([], HEADER, ":1:", "no rows"),
}


@pytest.mark.parametrize("lines, header, place, why", BAD.values(), ids=BAD.keys())
def test_bad_rows_are_one_line_and_exit_2(tmp_path, capsys, lines, header, place, why):
    path = write(tmp_path, "ours", "clean", lines, header=header)
    assert metrics.main(["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path}{place}" in error and why in error


@pytest.mark.parametrize("kept, status", [(1, 2), (5, 2), (7, 2), (8, 0)])
def test_rows_cut_short_are_one_line(run, capsys, kept, status):
    path = write(run, "ours", "clean", (CLEAN + INTRUDERS)[::-1], {"n": 8})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: kept + 1]))
    assert metrics.main(["--run", str(run), "--json"]) == status
    told = capsys.readouterr()
    if status:
        assert told.err.startswith(
            f"metrics.py: {path}: holds {kept} rows of clean, 8 were written"
        )
        assert told.err.count("\n") == 1 and not told.out
    else:
        assert not told.err and json.loads(told.out)["ours"]["clean"]["n_genuine"] == 4


def test_bad_folders_bytes_and_json_are_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "bytes", "ours", "clean", [GOOD])
    broken.write_bytes(b"\xff\xfe\x00" + broken.read_bytes())
    write(tmp_path / "json", "ours", "clean", [GOOD], sidecar=[1])
    for name, why in (
        ("absent", "no such folder"),
        ("empty", "holds no rows"),
        ("bytes", "clean.csv:1"),
        ("json", "a list"),
    ):
        assert metrics.main(["--run", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and why in captured.err and not captured.out


def test_the_difference_of_two_methods_is_paired(tmp_path):
    """Both draw the same targets: noise that they share leaves no width."""
    rng = np.random.default_rng(1)
    for k in range(2):
        rows = [("genuine", f"t{t}", j, rng.uniform(0, 2)) for t in range(8) for j in range(5)]
        far = [("intruder", f"t{t}", 50 + j, rng.uniform(1, 3)) for t in range(8) for j in range(7)]
        write(tmp_path / str(k), "ours", "clean", rows + far)
        write(tmp_path / str(k), "no-at", "clean", [(*r[:3], r[3] * 2) for r in rows + far])
        near = [(*r[:3], r[3] - 0.5 * (r[2] % 2)) for r in far]
        write(tmp_path / str(k), "weak-at", "clean", rows + near)
    runs = [metrics.read_run(tmp_path / str(k)) for k in range(2)]
    assert metrics.difference(runs, "ours", "no-at", "clean") == (0, 0, 0)
    mean, low, high = metrics.difference(runs, "ours", "weak-at", "clean")
    each = [metrics.measure(runs, m, "clean") for m in ("ours", "weak-at")]
    assert mean == pytest.approx(each[0]["auroc"] - each[1]["auroc"]) and low < mean < high
    apart = [m["interval"][1] - m["interval"][0] for m in each]
    assert high - low < min(apart)
    again = metrics.difference(runs, "weak-at", "ours", "clean")
    assert again == pytest.approx((-mean, -high, -low))
    assert metrics.difference(runs, "ours", "doa-4", "clean") is None


def test_packed_rows_read_as_the_single_files_did(run, tmp_path, capsys):
    from results import pack

    (run / "ours/log.jsonl").write_text('{"step": 1}\n')
    (run / "ours/result.json").write_text('{"made_of": {"config": {"steps": 1}}}')
    found = metrics.summary(run)
    out = tmp_path / "packed"
    pack.pack(run, out)
    # those of photographs: persons became numbers, nothing else
    assert metrics.summary(out) == found and not (out / "ours").exists()
    assert tables.trainings(out) == tables.trainings(run) and tables.trainings(run)["ours"]["log"]
    named = {r.target for a in metrics.read_run(out).methods["ours"].values() for r in a.rows}
    assert named == {"person-0000", "person-0001"}
    assert not (out / "ours/attacks").exists()
    before = (out / "attacks.csv.xz").read_bytes()
    pack.pack(run, out)
    assert (out / "attacks.csv.xz").read_bytes() == before
    for broken in (before[:-20], b"no xz"):
        (out / "attacks.csv.xz").write_bytes(broken)
        assert metrics.main(["--run", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "attacks.csv.xz" in line


def test_methods_of_another_run_are_packed_beside_where_persons_have_names(run, tmp_path):
    from results import pack

    out, other = tmp_path / "packed", tmp_path / "other"
    write(other, "weak-at", "clean", CLEAN + INTRUDERS)
    pack.pack(run, out)
    with pytest.raises(Exception, match="its ours/.* may number other persons: give an empty"):
        pack.pack(other, out)
    shutil.rmtree(out)
    for folder in (run, other):
        (folder / "people.json").write_text('{"data": "synthetic"}')
        pack.pack(folder, out)
    found, each = metrics.summary(out), (metrics.summary(run), metrics.summary(other))
    assert found == {**each[0], **each[1]}


def test_photographs_of_one_manifest_are_numbered_alike(run, tmp_path):
    from results import pack

    out, other = tmp_path / "packed", tmp_path / "other"
    write(other, "weak-at", "clean", [r for r in CLEAN + INTRUDERS if r[1] != CLEAN[0][1]])
    both = [
        a.rows
        for f in (run, other)
        for v in metrics.read_run(f).methods.values()
        for a in v.values()
    ]
    everyone = sorted({name for rows in both for r in rows for name in (r.target, r.person)})
    held = {"data": "folder", "images": 9, "seed": 0, "sha256": "one", "train": ["Aaron"]}
    held |= {"validation": [], "target": everyone}
    for folder in (run, other):
        (folder / "people.json").write_text(json.dumps(held))
        pack.pack(folder, out)
    assert {*json.loads((out / "people.json").read_text())} == {"data", "images", "seed", "sha256"}
    methods, number = metrics.read_run(out).methods, [*everyone, "Aaron"]
    ours, theirs = ({r.target for r in methods[m]["clean"].rows} for m in ("ours", "weak-at"))
    assert ours == {f"person-{sorted(number).index(name):04}" for name in ("a", "b")}
    assert theirs == ours - {f"person-{sorted(number).index(CLEAN[0][1]):04}"}
    (other / "people.json").write_text(json.dumps({**held, "sha256": "another"}))
    with pytest.raises(Exception, match="its ours/.* may number other persons: give an empty"):
        pack.pack(other, out)


def test_several_runs_give_mean_range_and_the_interval_of_the_mean(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for k in range(2):
        rows = [
            ("genuine", f"t{t}", j, abs(rng.normal(1, 0.3))) for t in range(6) for j in range(5)
        ]
        rows += [
            ("intruder", f"t{t}", 50 + j, abs(rng.normal(1.2 + k, 0.5)))
            for t in range(6)
            for j in range(9)
        ]
        write(tmp_path / str(k), "ours", "clean", rows)
        runs.append(metrics.read_run(tmp_path / str(k)))
    write(tmp_path / "1", "no-at", "clean", CLEAN + INTRUDERS)
    runs[1] = metrics.read_run(tmp_path / "1")
    a, b = (metrics.summary(r)["ours"]["clean"] for r in runs)
    both = metrics.summary(runs)
    assert both["ours"]["clean"]["auroc"] == pytest.approx((a["auroc"] + b["auroc"]) / 2)
    assert (
        both["ours"]["clean"]["range"]["auroc"] == [a["auroc"], b["auroc"]]
        and both["ours"]["clean"]["runs"] == 2
    )
    assert "range" not in a and "runs" not in a  # one run has none
    assert {(r.row, r.col) for r in runs[0].methods["ours"]["clean"].rows} == {
        (-1, -1)
    }  # a row without a place
    assert both["ours"]["clean"]["n_targets"] == 12
    lo, hi = both["ours"]["clean"]["interval"]
    assert (
        lo < both["ours"]["clean"]["auroc"] < hi and hi - lo < a["interval"][1] - a["interval"][0]
    )
    assert both["no-at"]["clean"]["runs"] == 1 and "runs 1" not in metrics.table(both)
    assert "2 runs: " in metrics.table(both)


def test_detection_interval(tmp_path):
    def spread(*samples, **how):
        return metrics.interval(metrics.detection_bootstrap(*samples, **how))

    rng = np.random.default_rng(0)
    g, gt = rng.normal(1, 0.3, 300), np.repeat(np.arange(30), 10)
    d, dt = rng.normal(1.6, 0.3, 150), np.repeat(np.arange(30), 5)
    lo, hi = spread((g, gt), (d, dt), evading=True)
    assert lo < metrics.detection_at_fpr(g, d, evading=True) < hi and hi - lo < 0.3
    assert spread((g, gt), (d, dt))[0] == pytest.approx(1 - hi, abs=0.02)
    assert all(math.isnan(v) for v in spread((g, gt * 0), (d, dt * 0)))


@pytest.mark.parametrize("evading", [False, True])
@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.5])
def test_detection_bootstrap_equals_a_loop_over_resampled_targets(evading, fpr):
    rng = np.random.default_rng(1)
    g, gt = rng.integers(0, 9, 40).astype(float), rng.integers(0, 5, 40)  # ties
    d, dt = rng.integers(2, 12, 90).astype(float), rng.integers(0, 6, 90)
    fast = metrics.detection_bootstrap((g, gt), (d, dt), fpr, evading, n=60)
    slow = []
    for counts in np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=60):
        both = np.repeat(g, counts[gt]), np.repeat(d, counts[dt])
        slow.append(metrics.detection_at_fpr(*both, fpr, evading) if all(map(len, both)) else NAN)
    assert fast == pytest.approx(np.array(slow), abs=1e-12, nan_ok=True)


def test_aupr_bootstrap_equals_a_loop_over_resampled_targets():
    rng = np.random.default_rng(1)
    g, gt = rng.integers(0, 9, 40).astype(float), rng.integers(0, 5, 40)  # ties
    i, it = rng.integers(2, 12, 90).astype(float), rng.integers(0, 6, 90)
    fast, slow = metrics.aupr_bootstrap((g, gt), (i, it), n=60), []
    for counts in np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=60):
        both = np.repeat(g, counts[gt]), np.repeat(i, counts[it])
        slow.append(metrics.aupr(*both) if all(map(len, both)) else NAN)
    assert fast == pytest.approx(np.array(slow), abs=1e-12, nan_ok=True)
    one = np.zeros(40), np.zeros(90)
    assert np.isnan(metrics.aupr_bootstrap((g, one[0]), (i, one[1]), n=5)).all()


def many(folder, n=100):
    """A run of one method with n clean intruders, half of them attacked."""
    clean = [("genuine", f"t{j % 2}", j, 0.5 + j) for j in range(40)]
    intruders = [("intruder", f"t{j % 3 % 2}", 100 + j, 10.0 + j) for j in range(n)]
    write(folder, "mine", "clean", clean + intruders)
    write(folder, "mine", "eyeglasses", [(*r[:3], r[3] - 9.5) for r in intruders[: n // 2]])
    return folder


def test_what_passes_at_a_far_is_told_where_ten_errors_are_expected(tmp_path, capsys):
    assert metrics.main(["--run", str(many(tmp_path / "100")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mine"]
    # 10 of 100 intruders pass below a distance of 20
    clean, attacked = found["clean"], found["eyeglasses"]
    assert clean["tar_at_far_0.1"] == attacked["tar_at_far_0.1"] == 20 / 40
    assert clean["asr_at_far_0.1"] == 0.1 and attacked["asr_at_far_0.1"] == 20 / 50
    assert clean["tar_at_far_0.01"] is clean["asr_at_far_0.01"] is None
    few = metrics.summary(many(tmp_path / "99", 99))["mine"]
    assert few["clean"]["tar_at_far_0.1"] is few["eyeglasses"]["asr_at_far_0.1"] is None
    # under the rule scores are lower, with thresholds of their own: 10 of 100 pass below 5
    lines = [f"rule,1,1,0,t{j % 2},7,{j},p,genuine,{j / 10},0" for j in range(40)]
    lines += [
        f"rule,1,1,0,t{j % 2},7,{100 + j},p,intruder,{4 + j / 10},{j / 10}" for j in range(100)
    ]
    write(tmp_path / "100", "mine", "rule", lines, header=HEADER + ",bound")
    found = metrics.summary(tmp_path / "100")["mine"]
    assert found["rule"]["asr_at_far_0.1"] == 0.1 and found["certified"]["asr_at_far_0.1"] == 0.5
    assert found["rule"]["tar_at_far_0.1"] == found["certified"]["tar_at_far_0.1"] == 1
    # of several runs all must tell it
    runs = [metrics.read_run(tmp_path / name) for name in ("100", "99", "100")]
    assert metrics.measure(runs, "mine", "clean")["tar_at_far_0.1"] is None
    both = metrics.measure(runs[::2], "mine", "eyeglasses")
    assert both["asr_at_far_0.1"] == 0.4 and both["range"]["asr_at_far_0.1"] == [0.4, 0.4]


def test_printed_tables_hold_the_rates_and_are_narrow(tmp_path, capsys):
    folder = many(tmp_path)
    assert metrics.main(["--run", str(folder), str(folder), "--figures", "none"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 130
    m = metrics.summary(folder)["mine"]["eyeglasses"]
    _, rates = (line for line in printed.splitlines() if "eyeglasses    " in line)
    detected = "{:.1%}  {:.1%}-{:.1%}".format(m["detected"], *m["detected_interval"])
    assert detected in rates and m["detected_interval"][0] < m["detected"]
    assert rates.split()[-5:] == [f"{m['eer']:.1%}", "50.0%", "-", "40.0%", "-"]
    with pytest.raises(SystemExit):
        metrics.main(["--help"])
    assert "biometric FRR" in " ".join(capsys.readouterr().out.split())


def test_more_successful_of_direct_and_indirect(run):
    write(run, "ours", "indirect", attacked(0.5, 0.3, 0.5, 5.0))
    result = metrics.summary(run)["ours"]
    assert (
        result["direct+indirect"]["auroc"] == (0 + 2.5 + 3 + 4) / 16
    )  # eyeglasses is the direct one
    assert result["indirect"]["auroc"] > result["direct+indirect"]["auroc"]
    rows = [
        f"indirect,1,1,0,{t},7,{c},p,intruder,{d},9.0,0.2"
        for _, t, c, d in attacked(0.15, 0.25, 0.35, 0.5)
    ]
    write(run, "ours", "indirect", rows, header=HEADER + ",indirect,direct")
    attacks = metrics.under(metrics.read_run(run).methods["ours"], 1, 1)
    direct, either = metrics.direct_and_either(attacks)
    assert [r.distance for r in direct] == [0.2] * 4 and [r.distance for r in either] == [
        0.15,
        0.2,
        0.2,
        0.2,
    ]


def attack(rows=(), **sidecar):
    made = [
        metrics.Row("x", 1, 1, 0, target, 7, candidate, "p", role, distance)
        for role, target, candidate, distance in rows
    ]
    return metrics.Attack(made, sidecar)


def evaded(*distances):
    return [(*row[:3], d) for row, d in zip(CLEAN, distances)]


def direct(rows):
    """Rows of the indirect attack whose direct half reached these distances."""
    return metrics.Attack(
        [r._replace(distance=0.1, direct=r.distance) for r in attack(rows).rows], {}
    )


FAR, NEAR = attacked(1.0, 2.0, 3.0, 4.0), attacked(0.9, 1.9, 2.5, 4.1)
WEAK, STRONG = {"iterations": 25, "restarts": 1}, {"iterations": 25, "restarts": 5}
HEALTH = {
    "zero gradient": (
        "gradients",
        {"eyeglasses": attack(zero_gradients=0, nonfinite=0)},
        {"eyeglasses": attack(zero_gradients=3, nonfinite=0, gradients=900)},
    ),
    "non-finite gradient": (
        "gradients",
        {"square": attack(zero_gradients=0, nonfinite=0, gradients=9)},
        {"square": attack(zero_gradients=0, nonfinite=1, gradients=9)},
    ),
    "restarts": (
        "more effort",
        {"eyeglasses": attack(FAR, **WEAK), "eyeglasses-5": attack(NEAR, **STRONG)},
        {"eyeglasses": attack(NEAR, **WEAK), "eyeglasses-5": attack(FAR, **STRONG)},
    ),
    "a curve that is not a number": (
        "more effort",
        {"square": attack(FAR, by_restarts={"1": 3.0, "5": 2.0})},
        {"square": attack(FAR, by_restarts={"1": 3.0, "5": math.nan})},
    ),
    "evasion": (
        "more effort",
        {
            "evasion": attack(evaded(1, 1, 1, 1), **WEAK),
            "evasion-5": attack(evaded(1, 2, 1, 1), **STRONG),
        },
        {
            "evasion": attack(evaded(1, 2, 1, 1), **WEAK),
            "evasion-5": attack(evaded(1, 1, 1, 1), **STRONG),
        },
    ),
    "iterations": (
        "more effort",
        {"square": attack(FAR, by_iterations={"5": 3.0, "25": 1.0, "125": 1.001})},
        {"square": attack(FAR, by_iterations={"5": 3.0, "25": 1.0, "125": 1.1})},
    ),
    "restart curve": (
        "more effort",
        {"square": attack(FAR, by_restarts={"1": 3.0, "5": 2.0, "10": 2.0})},
        {"square": attack(FAR, by_restarts={"1": 3.0, "5": 2.0, "10": 2.1})},
    ),
    "random": (
        "random search",
        {"eyeglasses": attack(NEAR), "random_eyeglasses": attack(FAR)},
        {"eyeglasses": attack(FAR), "random_eyeglasses": attack(NEAR)},
    ),
    "indirect": (
        "indirect attack",
        {
            "clean": attack(CLEAN),
            "eyeglasses": attack(NEAR),
            "indirect": attack(attacked(0.6, 3, 3, 3)),
        },
        {
            "clean": attack(CLEAN),
            "eyeglasses": attack(NEAR),
            "indirect": attack(attacked(0.2, 3, 3, 3)),
        },
    ),
    "mask": (
        "outside the mask",
        {"eyeglasses": attack(outside_mask_max=1e-6)},
        {"eyeglasses": attack(outside_mask_max=0.004)},
    ),
    "mask not a number": (
        "outside the mask",
        {"eyeglasses": attack(outside_mask_max=0)},
        {"eyeglasses": attack(outside_mask_max=math.nan)},
    ),
    "reproducible": (
        "same seed, same result",
        {"eyeglasses": attack(reproducible=True)},
        {"eyeglasses": attack(reproducible=True), "square": attack(reproducible=False)},
    ),
    "repeated": (
        "same seed, same result",
        {
            "eyeglasses": attack(FAR, config={"lr": 1}),
            "eyeglasses-again": attack(FAR, config={"lr": 1}),
        },
        {
            "eyeglasses": attack(FAR, config={"lr": 1}),
            "eyeglasses-again": attack(NEAR, config={"lr": 1}),
        },
    ),
    "direct half": (
        "same seed, same result",
        {"eyeglasses": attack(FAR), "indirect": direct(FAR)},
        {"eyeglasses": attack(FAR), "indirect": direct(NEAR)},
    ),
}


def verdict(name, attacks):
    """The outcome of one check on a run of one method."""
    found = metrics.health([metrics.Run(Path("run"), {"ours": attacks})])
    return next(check for check in found if check.name == name)


@pytest.mark.parametrize("check, healthy, ill", HEALTH.values(), ids=HEALTH.keys())
def test_health_check_passes_fails_and_says_when_it_did_not_run(check, healthy, ill):
    assert verdict(check, healthy).status == "OK"
    failed = verdict(check, ill)
    assert failed.status == "FAILED" and failed.detail.removeprefix("ours: ")
    assert verdict(check, {"eyeglasses": attack(FAR)}).status == "not run"


def test_health_of_a_run_fails_where_one_method_does(run, capsys):
    write(
        run,
        "ours",
        "eyeglasses",
        attacked(1, 1, 1, 1),
        {"zero_gradients": 0, "nonfinite": 0, "reproducible": True},
    )
    found = {c.name: c.status for c in metrics.health([metrics.read_run(run)])}
    assert (
        set(found.values()) == {"OK", "not run"}
        and found["gradients"] == "OK"
        and len(found) == len(metrics.CHECKS)
    )
    write(run, "no-at", "eyeglasses", attacked(1, 1, 1, 1), {"zero_gradients": 2})
    assert metrics.main(["--run", str(run)]) == 0
    printed = capsys.readouterr().out
    both = metrics.health([metrics.read_run(run)] * 2)[0]
    assert (
        both.status == "FAILED"
        and f"{run.name} no-at: eyeglasses" in both.detail
        and "ours" not in both.detail
    )
    assert (
        "FAILED   gradients: no-at: eyeglasses: 2 zero" in printed
        and "not run  random search" in printed
    )
    assert "OK       same seed, same result: repeated in ours" in printed


def full_run(folder):
    """A made-up run that holds every input of every table and figure."""
    rng = np.random.default_rng(0)
    pairs = [("intruder", t, 10 + j) for t in ("a", "b", "c") for j in range(4)]
    for method in ("ours", "ours-transfer", "weak-at", "doa-4", "doa-10", "no-at"):
        configs = [(0, 0), (1, 0), (0, 1), (1, 1)] if method == "ours" else [(1, 1)]
        genuine = [
            ("genuine", t, j, rng.uniform(0.5, 1.0), *c)
            for c in configs
            for t in ("a", "b", "c")
            for j in range(3)
        ]
        write(
            folder,
            method,
            "clean",
            genuine + [(*p, rng.uniform(1, 2), *c) for c in configs for p in pairs],
        )
        for name in (
            "eyeglasses",
            "eye_patch",
            "random_eyeglasses",
            "noise",
            "eot_eyeglasses",
            "eot_eye_patch",
        ):
            effort = {
                "iterations": 80,
                "restarts": 1,
                "device": "CPU",
                "data": "synthetic",
                "commit": "c0ffee",
            }
            write(
                folder,
                method,
                name,
                [(*p, rng.uniform(0.5, 2), *c) for c in configs for p in pairs],
                effort,
            )
        write(
            folder,
            method,
            "evasion",
            [(*r[:3], r[3] * 1.5) for r in genuine if tuple(r[4:]) == (1, 1)],
        )
        lines = [f"indirect,1,1,0,{t},7,{j},p,intruder,0.6,0.7" for _, t, j in pairs]
        write(folder, method, "indirect", lines, header=HEADER + ",direct")
        lines = [
            f"square,{m},{s},0,{t},7,{j},p,intruder,0.9,{15 + 5 * (j % 5)},20"
            for m, s in configs
            for _, t, j in pairs
        ]
        write(folder, method, "square", lines, header=HEADER + ",row,col")
        write(
            folder,
            method,
            "distal",
            [("intruder", t, -1, d) for t, d in (("a", 0.1), ("b", 0.2), ("c", 5.0))],
        )
        log = [
            {"step": 50 * k, "loss": 9 / k, "val_loss": 5 + k % 4, "seconds": 25.0 * k}
            for k in range(1, 9)
        ]
        (folder / method / "log.jsonl").write_text(
            "".join(json.dumps(d) + "\n" for d in log) + '{"step": 450, "lo'
        )
    (folder / "ours/attacks/figure3.csv").write_text(
        "kind,distance\nreal-real,2\nreal-real,3\nreal-generated,1\n"
    )
    for name, steps in (("weak-at-7", 7), ("weak-at-20", 20), ("weak-at-40", 40)):
        (folder / name).mkdir()
        made = {"made_of": {"config": {"attack_steps": steps, "attack_alpha": 9.0}}}
        (folder / name / "result.json").write_text(json.dumps(made))
        (folder / name / "log.jsonl").write_bytes((folder / "weak-at/log.jsonl").read_bytes())
    faces = rng.integers(0, 256, (3, 2, 3, 64, 64), dtype=np.uint8)
    arrays = {"anchor": faces[:, 0], "clean": faces, "attacked": faces, "distance": np.ones((3, 2))}
    arrays |= {"mask": np.ones((3, 64, 64), bool), "pattern": faces[:, 0, :, :12, :32]}
    for name in ("eyeglasses", "square", "eye_patch", "distal"):
        np.savez(folder / f"ours/attacks/{name}.npz", **arrays)
    (folder / "generator").mkdir()
    quadruplets = rng.integers(0, 256, (7, 4, 3, 64, 64), dtype=np.uint8)
    np.savez(folder / "generator/quadruplets.npz", quadruplets=quadruplets)
    (folder / "generator/result.json").write_text(
        '{"psnr_true_u": 21.25, "content_factors_from_class": {"yaw": 0.03}}'
    )
    (folder / "generator/log.jsonl").write_text(
        '{"epoch": 1, "seconds": 20}\n{"epoch": 2, "seconds": 42}\n'
    )
    (folder / "people.json").write_text('{"data": "synthetic", "seed": 4}')
    return folder


def section(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def lines_of(text):
    """{first cell: other cells} of the Markdown table in `text`."""
    cells = [
        [c.strip() for c in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {c[0]: c[1:] for c in cells[2:]}


def test_tables_hold_every_row_beside_the_papers(tmp_path, capsys):
    folder = full_run(tmp_path)
    assert metrics.main(["--run", str(folder)]) == 0
    (lacking,) = [t for t in capsys.readouterr().out.splitlines() if "not made" in t]
    there = "<method>/attacks/rule.csv has no"
    point = "point (no-at/attacks/eyeglasses.npz: no such file)"
    told = f"figures not made: places ({there} places); certified ({there} bounds); {point}"
    told += "; intruders (ours/result.json: no such file)"
    assert lacking == told
    text = (folder / "tables.md").read_text()
    assert (
        "Data: synthetic" in text
        and "seed: 4" in text
        and "c0ffee" in text
        and "not run  " not in text.split("## Attacks")[1]
    )
    result = metrics.summary(folder)
    one, two = lines_of(section(text, "Table 1")), lines_of(section(text, "Table 2"))
    ours = ["Ours, basic", "Ours, mirroring", "Ours, selection", "Ours, both"]
    others = ["Ours, transfer, both", "Weak AT", "DOA, C = 4", "DOA, C = 10"]
    assert list(one) == ours + others
    assert (
        list(two) == ["Without AT", "Ours, both", "Ours, transfer, both"]
        and two["Ours, both"] == one["Ours, both"]
    )
    eyeglasses = result["ours"]["eyeglasses"]
    expected = "{:.3f} [{:.3f}, {:.3f}] / {:.3f}".format(
        eyeglasses["auroc"], *eyeglasses["interval"], eyeglasses["aupr"]
    )
    assert (
        one["Ours, both"][2:5] == ["1.000", expected, "0.868 / 0.896"]
        and one["Ours, both"][-1] == "3 / 9 / 12"
    )
    basic = metrics.summary(folder, 0, 0)["ours"]["clean"]
    assert (
        one["Ours, basic"][0].startswith(f"{basic['auroc']:.3f} [")
        and one["Ours, basic"][1] == "0.957"
    )
    assert two["Without AT"][4] == "0.590 / 0.669" and one["Ours, transfer, both"][4] == "-"
    assert lines_of(section(text, "App. B.2"))["Paper"][:4] == ["0.978", "-", "0.973", "0.965"]
    evasion = lines_of(section(text, "Sec. 4.3"))["Ours"]
    assert evasion[0].startswith(f"{result['ours']['evasion']['detected']:.1%} [") and evasion[
        1:3
    ] == ["0.0%", "25.2 %"]
    assert lines_of(section(text, "Sec. 4.4"))["Paper"][:2] == ["0.868", "0.867"]
    assert "Ours: 2 of 3 images made from noise" in section(text, "Sec. 4.4")
    assert lines_of(section(text, "Disentanglement")) == {
        "psnr true u": ["21.25"],
        "content factors from class yaw": ["0.03"],
    }
    costs = lines_of(section(text, "Cost"))
    assert (
        costs["Ours"] == ["0.5 s", "3.3 min", "400 steps", "11 h, 1.98 s"]
        and costs["generator"][0] == "21 s"
    )
    assert "## Certificate" not in text
    for name in (*(f"figure{number}" for number in range(1, 10)), "roc"):
        assert (folder / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_lacks_is_said_and_the_rest_is_made(run, capsys):
    assert metrics.main(["--run", str(run), "--out", str(run / "report")]) == 0
    printed = capsys.readouterr().out
    (told,) = [line for line in printed.splitlines() if "not made" in line]
    lacking = {"1, 9": "quadruplets.npz", "2": "log.jsonl", "3": "figure3.csv", "4": "distal.npz"}
    lacking |= {"5": "weak-at-<4", "6, intruders": "eyeglasses.npz", "7": "square.csv"}
    lacking |= {"8": "eye_patch.npz"}
    for numbers, name in (lacking | {"places": "rule.csv"}).items():
        assert f"{numbers} (" in told and name in told.split(f"{numbers} (")[1].split(";")[0]
    assert sorted(p.name for p in (run / "report/figures").iterdir()) == ["roc.png"]
    assert metrics.main(["--run", str(run), "--out", str(run / "all"), "--figures"]) == 0
    assert told in capsys.readouterr().out and (run / "all/figures/roc.png").exists()
    assert metrics.main(["--run", str(run), "--out", str(run / "none"), "--figures", "none"]) == 0
    assert "figure" not in capsys.readouterr().out and not (run / "none/figures").exists()
    text = (run / "report" / "tables.md").read_text()
    one = lines_of(section(text, "Table 1"))
    assert (
        one["Weak AT"][0] == "not run"
        and one["Ours, both"][0].startswith("1.000")
        and one["Ours, basic"][0] == "not run"
    )
    assert (
        section(text, "Disentanglement").strip() == "not run" and not (run / "tables.md").exists()
    )
    assert {line[0] for line in lines_of(section(text, "Cost")).values()} == {"not run"}


def test_damaged_inputs_of_figures_are_named(run, capsys):
    (run / "generator").mkdir()
    (run / "generator/quadruplets.npz").write_bytes(b"PK\x03\x04 not an archive")
    (run / "ours" / "log.jsonl").write_text('{"step": 1, "val_loss": 2}\n{"step": 2\n{"step": 3}\n')
    np.savez(run / "ours/attacks/distal.npz", anchor=np.zeros(3))
    told = figures.draw(metrics.read_run(run), run / "figures")
    assert any("quadruplets.npz: cannot be read" in line for line in told)
    assert any("log.jsonl:2" in line for line in told)
    assert any("distal.npz: cannot be read ('attacked is not a file" in line for line in told)
    assert metrics.main(["--run", str(run)]) == 2  # the cost table needs the same log
    assert capsys.readouterr().err.count("\n") == 1


def test_without_matplotlib_tables_are_written_and_one_line_says_so(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert metrics.main(["--run", str(run)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and (run / "tables.md").exists()


def test_without_the_folder_results_the_table_is_printed(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "results", None)
    assert metrics.main(["--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "eyeglasses" in printed and "results/ is not beside" in printed
    assert not (run / "tables.md").exists()


@pytest.mark.parametrize("flags", [[], ["--run"], ["--figures", "10"], ["--rum", "x"]])
def test_a_bad_flag_is_one_line_and_exit_2(run, capsys, flags):
    flags = flags if not flags or "--run" in flags else ["--run", str(run), *flags]
    assert metrics.main(flags) == 2
    told = capsys.readouterr()
    assert told.err.startswith("metrics.py: ") and told.err.count("\n") == 1 and not told.out


def test_rows_of_other_persons(run):
    (run / "ours" / "attacks").rename(run / "ours" / "attacks-lfw")
    found = metrics.summary(metrics.read_run(run, "attacks-lfw"))
    assert found["ours"]["clean"]["auroc"] == 1


def test_figure_5_draws_each_step_setting_once(run):
    log = "".join(
        json.dumps({"step": 50 * k, "loss": 1.0, "val_loss": 9.0 - k}) + "\n" for k in range(1, 5)
    )
    for name, steps, alpha in (
        ("weak-at", 5, 32.0),
        ("weak-at-4", 4, 52.5),
        ("weak-at-10", 10, 24.0),
        ("weak-at-20", 20, 12.0),
    ):
        (run / name).mkdir(exist_ok=True)
        (run / name / "log.jsonl").write_text(log)
        (run / name / "result.json").write_text(
            json.dumps({"config": {"attack_steps": steps, "attack_alpha": alpha}})
        )
    legend = figures.figure_5(metrics.read_run(run)).axes[0].get_legend()
    told = [text.get_text() for text in legend.get_texts()]
    assert told == [
        "4 steps of 52.5/255",
        "5 steps of 32/255",
        "10 steps of 24/255",
        "20 steps of 12/255",
    ]


def test_worst_is_not_set_beside_that_of_fewer_attacks(run):
    one = metrics.read_run(run)
    attack = (
        one.methods["ours"]["eyeglasses"]
        if "eyeglasses" in one.methods["ours"]
        else one.methods["ours"]["clean"]
    )
    more = {
        "clean": one.methods["ours"]["clean"],
        "eyeglasses": attack,
        "square": attack,
        "indirect": attack,
    }
    less = {name: more[name] for name in ("clean", "eyeglasses", "square")}
    better = metrics.Attack(
        [r._replace(distance=r.distance / 9) for r in attack.rows], attack.sidecar
    )
    runs = [metrics.Run(one.folder, {"ours": {**more, "indirect": better}, "no-at": less})]
    head, _, ours, without = (line.split(" | ") for line in tables.beyond(runs).splitlines())
    assert (
        head[-1].startswith("worst of eyeglasses, square")
        and ours[-1].removesuffix(" |") == without[-1].removesuffix(" |") != ours[-2]
    )
    found = metrics.summary(runs)
    assert found["ours"]["worst"]["of"] == ["eyeglasses", "square", "indirect"] and found["no-at"][
        "worst"
    ]["of"] == ["eyeglasses", "square"]


def test_an_attack_that_does_nothing_fails_its_check(run):
    near = [
        r._replace(distance=0.0) if r.role == "intruder" and r.candidate % 2 else r
        for r in metrics.read_run(run).methods["ours"]["clean"].rows
    ]
    clean = metrics.Attack(near, {})
    both = ("intruder", "genuine")
    pairs, genuine = (metrics.pick({"clean": clean}, "clean", role) for role in both)
    assert 0 < metrics.auroc([r.distance for r in genuine], [r.distance for r in pairs]) < 1
    for distance, status in ((1e3, metrics.FAILED), (0.0, metrics.OK)):
        attacked = metrics.Attack(
            [r._replace(attack="square", distance=distance) for r in pairs], {}
        )
        attacks = {"clean": clean, "square": attacked}
        assert verdict("attacks harm", attacks).status == status
    assert verdict("attacks harm", {"clean": clean}).status == metrics.NOT_RUN


def test_figure_3_is_measured_between_target_persons(tmp_path):
    import data
    import embed
    import generator

    shutil.copy(ROOT / "data/generator_demo.pt", tmp_path / "generator.pt")
    flags = ["--method", "weak-at", "--run", str(tmp_path), "--width", "0.03125"]
    flags += ["--synthetic-persons", "6", "--synthetic-images", "10", "--target-persons", "2"]
    flags += ["--validation-persons", "2", "--steps", "1", "--batch", "2", "--no-evaluation"]
    assert embed.main(flags) == 0
    assert figures.main([str(tmp_path), "weak-at"]) == 0
    with open(tmp_path / "weak-at/attacks/figure3.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # every pair there is, one by one
    faces = data.load("synthetic", persons=6, images_per_person=10)
    split = data.read_manifest(tmp_path / "people.json", faces)
    one, two = (faces.images[faces.person == p] for p in split.target)
    f = embed.load_embedding(tmp_path / "weak-at/embedding.pt")
    lord, _ = generator.load_generator(tmp_path / "generator.pt")
    pairs = {"real-real": [], "real-generated": []}
    for x, t in ((one, two), (two, one)):
        z_cl, z_co = generator.encode(lord, x)[0], generator.encode(lord, t)[1]
        real, other = embed.features(f, t), embed.features(f, x)
        for k in range(10):
            u = generator.decode(lord, z_cl[k : k + 1].expand(10, -1), z_co)
            made = embed.features(f, (u * 255).round().byte())
            pairs["real-generated"] += (real - made).norm(dim=1).tolist()
            pairs["real-real"] += (real - other[k]).norm(dim=1).tolist()
    for kind, every in pairs.items():
        found = [float(r["distance"]) for r in rows if r["kind"] == kind]
        nearest = np.abs(np.subtract.outer(found, every)).min(1)
        assert len(found) == 500 and nearest.max() < 1e-3 * np.median(every), kind
    assert np.median(pairs["real-real"]) != pytest.approx(np.median(pairs["real-generated"]), 0.01)


def test_certified_rows_are_scores_of_genuine_pairs_and_bounds_of_intruders(tmp_path):
    def row(attack, candidate, role, distance, bound=""):
        person = "a" if role == "genuine" else "b"
        return f"{attack},1,1,0,t{candidate % 2},7,{candidate},{person},{role},{distance},{bound}"

    folder = tmp_path / "run/ours/attacks"
    folder.mkdir(parents=True)
    genuine = [0.1, 0.2, 0.3, 0.4]
    scores, bounds, attacked = [0.35, 0.5, 0.6, 0.7], [0.15, 0.25, 0.45, 0.5], [0.3, 0.4, 0.45, 0.5]
    clean = [row("clean", i, "genuine", d) for i, d in enumerate([0.1, 0.15, 0.2, 0.25])]
    clean += [row("clean", 10 + i, "intruder", d) for i, d in enumerate([0.3, 0.6, 0.7, 0.8])]
    rule = [row("rule", i, "genuine", d, 0.0) for i, d in enumerate(genuine)]
    rule += [row("rule", 10 + i, "intruder", s, b) for i, (s, b) in enumerate(zip(scores, bounds))]
    on = [row("rule_attacked", 10 + i, "intruder", d, 0.0) for i, d in enumerate(attacked)]
    for name, rows in {"clean": clean, "rule": rule, "rule_attacked": on}.items():
        (folder / f"{name}.csv").write_text("\n".join([f"{HEADER},bound", *rows]) + "\n")
    found = metrics.summary(tmp_path / "run")["ours"]
    assert found["rule"]["auroc"] == metrics.auroc(genuine, scores)
    assert found["certified"]["auroc"] == metrics.auroc(genuine, bounds) == 11 / 16
    assert found["rule_attacked"]["auroc"] == metrics.auroc(genuine, attacked)
    # eq. (1) with a threshold of the rule's own: above all four, so that at most 5 % are refused
    assert found["certified"]["detected"] == 0.5 and found["rule"]["detected"] == 0.75
    assert found["certified"]["clean_same_pairs"] == 1
    # persons who are not judged set it, where there are some: just above 0.25, beyond which half of
    # the targets' own and three of the bounds lie
    setters = [f"rule,1,1,0,v,7,{i},v,validation,{d},0" for i, d in enumerate((0.2, 0.25))]
    with open(folder / "rule.csv", "a") as file:
        file.write("\n".join(setters) + "\n")
    found = metrics.summary(tmp_path / "run")["ours"]
    assert found["certified"]["auroc"] == 11 / 16 and found["certified"]["n_genuine"] == 4
    assert found["certified"]["detected"] == 0.5 and found["certified"]["fpr"] == 0.5
    assert found["rule"]["detected"] == 1
    (check,) = [
        c for c in metrics.health([metrics.read_run(tmp_path / "run")]) if c[0] == "certificate"
    ]
    assert check.status == metrics.OK
    text = (
        (folder / "rule_attacked.csv").read_text().replace("genuine", "").replace(",0.3,", ",0.14,")
    )
    (folder / "rule_attacked.csv").write_text(text)
    (check,) = [
        c for c in metrics.health([metrics.read_run(tmp_path / "run")]) if c[0] == "certificate"
    ]
    assert check.status == metrics.FAILED and "1 of 4 below their bound" in check.detail


def model_run(folder, size):
    """What a run of somebody's own model holds: rows and pictures of its size, nothing else."""
    rng = np.random.default_rng(0)
    pairs = [("intruder", t, 10 + j) for t in "ab" for j in range(8)]
    genuine = [("genuine", t, j, rng.uniform(0.5, 1.0)) for t in "ab" for j in range(3)]
    write(folder, "mine", "clean", genuine + [(*p, rng.uniform(1, 2)) for p in pairs])
    for name in ("eyeglasses", "eye_patch"):
        write(folder, "mine", name, [(*p, rng.uniform(0.5, 2)) for p in pairs])
    places = [(15, 20), (35, 30)]  # of 64
    placed = [tuple((2 * v * size + 64) // 128 for v in place) for place in places]
    lines = [
        f"square,1,1,0,{t},7,{j},p,intruder,0.9,{r},{c}"
        for k, (_, t, j) in enumerate(pairs)
        for r, c in [placed[k % 4 == 0]]
    ]
    write(folder, "mine", "square", lines, header=HEADER + ",row,col")
    rule = [f"rule,1,1,0,{t},7,{j},{t},genuine,{d},0,0,{d}" for _, t, j, d in genuine]
    rule += [
        f"rule,1,1,0,{t},7,{j},p,intruder,{1 + j / 10},{size - 9},3,{j / 10}" for _, t, j in pairs
    ]
    sidecar = {"config": {"rule_patch": [5], "rule_mask": [7]}, "masks": 400, "fill": "mean"}
    sidecar |= {"anchor_seen": "whole"}
    write(folder, "mine", "rule", rule, sidecar, HEADER + ",row,col,bound")
    on = [f"rule_attacked,1,1,0,{t},7,{j},p,intruder,{0.5 + j / 10}" for _, t, j in pairs[::2]]
    write(folder, "mine", "rule_attacked", on)
    faces = rng.integers(0, 256, (2, 2, 3, size, size), dtype=np.uint8)
    arrays = {"anchor": faces[:, 0], "clean": faces, "attacked": faces, "distance": np.ones((2, 2))}
    arrays |= {"mask": np.eye(size, dtype=bool), "pattern": faces[:, 0, :, :12, :32]}
    for name in ("eyeglasses", "square", "eye_patch", "rule"):
        np.savez(folder / f"mine/attacks/{name}.npz", **arrays)
    (folder / "mine/result.json").write_text('{"threshold": 0.9}')
    return folder


@pytest.mark.parametrize("size", [64, 112])
def test_figures_of_a_run_of_ones_own_model(tmp_path, capsys, size):
    folder = model_run(tmp_path, size)
    assert metrics.main(["--run", str(folder), "--figures"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "not made" in line]
    assert [part.split(" (")[0] for part in told.split(": ", 1)[1].split("; ")] == [
        "1, 9",
        "2",
        "3",
        "4",
        "5",
        "point",
    ]
    made = {path.name for path in (folder / "figures").iterdir()}
    assert made == {
        *(f"figure{n}.png" for n in (6, 7, 8)),
        *("certified.png", "intruders.png", "places.png", "roc.png"),
    }
    one = metrics.read_run(folder)
    told = [axis.get_title() for axis in figures.figure_intruders(one).axes]
    assert told == ["target", "1.00, refused", "1.00, refused"] * 2
    # where the best squares fell: 12 of 16 at one place, the centre of that square of 10 of 64
    region, heat, _ = figures.figure_7(one).axes
    counts, (left, _, bottom, _) = heat.images[1].get_array(), heat.images[1].get_extent()
    assert counts.sum() == 16 and counts[0, 0] == 12 and counts[-1, -1] == 4
    assert left + 2.5 * size / 64 == pytest.approx((20 + 4.5) * size / 64, abs=1)
    assert bottom - 2.5 * size / 64 == pytest.approx((35 + 4.5) * size / 64, abs=1)
    frame = region.patches[0]
    assert (frame.get_x(), frame.get_width()) == {64: (14.5, 30), 112: (25.5, 53)}[size]
    # the weakest place, a patch of 5 of 64 at the lower edge
    (axis, _) = figures.figure_places(one).axes
    covered = axis.images[1].get_array().filled(0)
    side = {64: 5, 112: 9}[size]
    assert covered.shape == (size, size) and covered.sum() == 16 * min(9, side) * side
    assert covered[size - 9, 3] == 16 and covered[size - 10, 3] == covered[size - 9, 2] == 0


def test_certified_figure_draws_the_bounds_by_size(tmp_path):
    one = metrics.read_run(model_run(tmp_path, 64))
    found = metrics.summary(one)["mine"]
    (axis,) = figures.figure_certified(one).axes
    (line,) = axis.lines
    assert line.get_xydata().tolist() == [
        [0, found["rule"]["auroc"]],
        [5, found["certified"]["auroc"]],
    ]


def test_roc_figure_draws_the_rates_of_each_attack(tmp_path):
    one = metrics.read_run(model_run(tmp_path, 64))
    (axis,) = figures.figure_roc(one).axes
    assert axis.get_title() == "mine" and axis.get_xscale() == "log"
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["clean", "eyeglasses", "square", "eye patch", "worst", "rule", "certified"]
    drawn = {name: axis.lines[2 * k : 2 * k + 2] for k, name in enumerate(legend)}
    for name in ("clean", "eyeglasses", "certified"):
        genuine, intruders = metrics.sides(one.methods["mine"], name)
        far, tar = metrics.roc(metrics.columns(genuine)[0], metrics.columns(intruders)[0])
        faint, sure = (line.get_xydata().T for line in drawn[name])
        assert (faint == [far, tar]).all()
        # ten of sixteen intruders
        assert (sure == [far[far >= 10 / 16], tar[far >= 10 / 16]]).all()


def test_certificate_section(tmp_path):
    one = metrics.read_run(model_run(tmp_path, 64))
    text = section(tables.report([one]), "Certificate")
    for told in ("each of 400 masks of 7 x 7 of", "at most 5 x 5", "not F", "one photograph"):
        assert told in text
    for told in ("nothing on evasion", "one patch", "rest of its batch", "mean", "whole"):
        assert told in text
    found = metrics.summary(one)["mine"]
    (line,) = lines_of(text).values()
    assert "mine, anywhere" in lines_of(text)
    for place, name in ((0, "clean"), (2, "rule"), (3, "certified"), (6, "rule_attacked")):
        assert line[place] == tables.cell(found[name], False), name
    certified = found["certified"]
    lo, hi = certified["detected_interval"]
    assert line[1] == f"{certified['clean_same_pairs']:.3f}"
    assert line[4] == f"{certified['detected']:.1%} [{lo:.1%}, {hi:.1%}]" and line[5] == "0.0%"
    # the bounds of the attacked pairs alone: every second intruder, 1.0 to 1.6 and so on
    genuine = metrics.columns(metrics.pick(one.methods["mine"], "rule", "genuine"))[0]
    met = [j / 10 for j in range(10, 18, 2)] * 2
    assert line[7].startswith(f"{metrics.auroc(genuine, met):.3f} [")
    assert line[8:] == ["2 / 6 / 8", "2 / 6 / 16"]
    # its own table, without lines for methods that it does not have
    assert list(lines_of(section(tables.report([one]), "Table 1"))) == ["mine"]
    assert section(tables.report([one]), "Table 2").strip().endswith("not run")
    without = {"mine": {a: v for a, v in one.methods["mine"].items() if "rule" not in a}}
    assert "## Certificate" not in tables.report([metrics.Run(one.folder, without)])
