"""metrics.py and results/ against scikit-learn, hand-made answers and runs with planted faults."""

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import data
import embed
import generator
import metrics
from data.run import UsageError
from metrics import aupr, auroc, bootstrap, detection_at_fpr, eer, interval, passing_at_far, roc
from results import figures, tables

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


SAMPLES = {name: sides for name, *sides in samples()}


@pytest.mark.parametrize("name", SAMPLES)
def test_areas_and_rates_equal_scikit_learn(name):
    genuine, intruders = map(np.array, SAMPLES[name])
    truth = np.r_[np.zeros(len(genuine)), np.ones(len(intruders))]
    score, curve = np.r_[genuine, intruders], roc(genuine, intruders)
    assert auroc(curve) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    balanced = np.where(truth == 1, 1 / len(intruders), 1 / len(genuine))
    expected = average_precision_score(truth, score, sample_weight=balanced)
    assert aupr(curve) == pytest.approx(expected, abs=1e-12)
    far, tar, _ = roc_curve(1 - truth, -score, drop_intermediate=False)
    shares = {(i / len(intruders), g / len(genuine)) for g, i in zip(*curve)}
    assert shares == set(zip(far, tar))
    between = [f(x) for f, x in ((max, far[far <= 1 - tar]), (min, far[far >= 1 - tar]))]
    assert between[0] <= eer(curve) <= between[1]
    deltas = [0.0, *np.unique(score), math.inf]
    for most in (0.0, 0.01, 0.1, 1 / 3, 0.5, 1.0):
        delta = max(d for d in deltas if (intruders < d).mean() <= most + 1e-9)
        assert passing_at_far(curve, most) == (genuine < delta).mean()
    for most in (0.0, 0.05, 0.1, 0.5):
        # eq. (1) at the smallest delta that refuses at most so many of the genuine
        at = [np.nextafter(d, math.inf) for d in [-1.0, *np.unique(genuine)]]
        delta = min(d for d in at if (genuine >= d).mean() <= most + 1e-9)
        assert detection_at_fpr(curve, most) == (intruders >= delta).mean()
        assert detection_at_fpr(curve, most, evading=True) == (intruders < delta).mean()
        assert detection_at_fpr(roc(genuine, genuine), most) <= most


def test_figures_by_hand():
    assert eer(roc([1.0, 2.0], [3.0, 4.0])) == 0 and eer(roc([3.0], [1.0])) == 1
    assert eer(roc([2.0] * 5, [2.0] * 3)) == 0.5  # chance: on the line between the corners
    assert eer(roc([1.0, 2.0, 3.0, 6.0], [4.0, 5.0, 7.0, 5.5])) == 0.25
    assert eer(roc([1.0, 2.0, 3.0, 6.0], [4.0, 7.0])) == 0.25  # FAR jumps past 1 - TAR
    genuine = np.arange(1.0, 101.0)  # delta is just above 95, so that five are refused
    assert detection_at_fpr(roc(genuine, [0.0, 95.0, 96.0])) == pytest.approx(1 / 3)
    assert detection_at_fpr(roc(genuine, [0.0, 95.0, 96.0, 300.0]), evading=True) == 0.5
    assert detection_at_fpr(roc([2.0] * 40, [2.0] * 40)) == 0  # a constant F detects nothing
    assert detection_at_fpr(roc([2.0] * 40, [2.0] * 40), evading=True) == 1
    assert aupr(roc([1.0] * 9, [1.0] * 2)) == 0.5  # chance, whatever the prior
    one, seven = (aupr(roc(np.arange(10.0), np.tile(np.arange(3.0, 9.0), k))) for k in (1, 7))
    assert one == pytest.approx(seven)


D, T, NAN = [1.0, 2.0], ["a", "b"], math.nan
WRONG = {
    "nan": lambda: roc([1.0, NAN], D),
    "inf": lambda: roc(D, [math.inf]),
    "none": lambda: roc(D, []),
    "FPR": lambda: detection_at_fpr(roc(D, D), NAN),
    "FAR": lambda: passing_at_far(roc(D, D), 1.5),
    "bootstrap, nan": lambda: bootstrap(auroc, [(([1.0, NAN], T), (D, T))]),
    "bootstrap, lengths": lambda: bootstrap(auroc, [((D, T), (D, ["a"]))]),
    "bootstrap, n": lambda: bootstrap(auroc, [((D, T), (D, T))], n=0),
    "method": lambda: metrics.measure([], "our", "clean"),
    "attack": lambda: metrics.measure([], "ours", "cleen"),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_no_figure_of_what_cannot_be(call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value)


FIGURES = {"auroc": auroc, "aupr": aupr, "detection": detection_at_fpr}
FIGURES["at half"] = partial(detection_at_fpr, fpr=0.5)
FIGURES["evading"] = partial(detection_at_fpr, evading=True)


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES.keys())
def test_bootstrap_equals_a_loop_over_resampled_targets(figure):
    rng = np.random.default_rng(1)
    # ties, an intruder nearest of all, and a target that has intruders alone
    g, gt = rng.integers(1, 9, 40).astype(float), rng.integers(0, 5, 40)
    i, it = rng.integers(0, 12, 90).astype(float), rng.integers(0, 6, 90)
    fast = bootstrap(figure, [((g, gt), (i, it)), ((g[:20], gt[:20]), (i, it))], n=60, seed=3)
    for row, k in zip(fast, (40, 20)):
        slow = []
        for times in np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=60):
            a, b = np.repeat(g[:k], times[gt[:k]]), np.repeat(i, times[it])
            slow.append(figure(roc(a, b)) if len(a) and len(b) else NAN)
        assert row == pytest.approx(np.array(slow), abs=1e-12, nan_ok=True)
    assert np.isnan(bootstrap(figure, [((g, gt * 0), (i, it * 0))], n=5)).all()  # one target


def test_interval_is_of_the_middle_95_percent_nan_left_out():
    values = np.append(np.arange(1001.0), NAN)
    assert interval(values) == pytest.approx((25, 975))
    assert interval(values, 0.5) == pytest.approx((250, 750))
    assert all(math.isnan(v) for v in interval(np.array([NAN])))


def write(run, method, name, rows, sidecar=None, header=HEADER):
    """rows: (role, target, candidate, distance[, mirroring, selection]) or finished lines."""
    folder = run / method / "attacks"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header]
    for r in rows:
        if not isinstance(r, str):
            role, target, candidate, distance, *config = r
            m, s = config or (1, 1)
            person = target if role == "genuine" else "other"
            r = f"{name},{m},{s},0,{target},7,{candidate},{person},{role},{distance}"
        lines.append(r)
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    if sidecar is not None:
        (folder / f"{name}.json").write_text(json.dumps(sidecar))
    return folder / f"{name}.csv"


CLEAN = [("genuine", t, c, d) for t, c, d in zip("aabb", (1, 2, 3, 4), (0.1, 0.3, 0.2, 0.4))]
INTRUDERS = [("intruder", t, c, float(c - 9)) for t, c in zip("aabb", (10, 11, 12, 13))]


def attacked(*distances):
    return [(*row[:3], d) for row, d in zip(INTRUDERS, distances)]


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "run", "ours", "clean", CLEAN + INTRUDERS)
    write(tmp_path / "run", "ours", "eyeglasses", attacked(0.05, 2.0, 0.35, 4.0))
    return tmp_path / "run"


def test_summary_by_hand(run):
    evasion = [("genuine", "a", 1, 0.1), ("genuine", "a", 2, 3.5), ("genuine", "b", 3, 9.0)]
    write(run, "ours", "evasion", evasion)
    # both roles made anew
    write(run, "ours", "noise", [("genuine", "a", 1, 5.0), ("intruder", "a", 10, 1.0)])
    write(run, "ours", "square", attacked(2.0, 1.5, 0.3, 5.0))
    ours = metrics.summary(run)["ours"]
    assert list(ours) == ["clean", "eyeglasses", "square", "noise", "evasion", "worst"]
    assert ours["clean"]["auroc"] == 1 and ours["clean"]["interval"] == [1, 1]
    assert ours["clean"]["n_targets"] == 2 and ours["clean"]["detected"] == 1
    assert {m["fpr"] for m in ours.values()} == {0}  # of four pairs none may be refused
    assert ours["eyeglasses"]["auroc"] == (0 + 4 + 3 + 4) / 16
    assert metrics.counts(ours["eyeglasses"]) == "2 / 4 / 4"
    assert ours["eyeglasses"]["detected"] == 0.5  # delta is just above 0.4
    assert ours["eyeglasses"]["clean_same_pairs"] == 1
    assert metrics.counts(ours["evasion"]) == "2 / 3 / 4"  # against clean intruders
    assert ours["evasion"]["auroc"] == (4 + 1 + 0) / 12
    assert ours["evasion"]["detected"] == pytest.approx(1 / 3)
    assert ours["noise"]["auroc"] == 0 and ours["noise"]["interval"] == [None, None]
    # per intruder the nearer of eyeglasses and square: 0.05, 1.5, 0.3, 4
    assert ours["worst"]["auroc"] == (0 + 4 + 2.5 + 4) / 16
    assert ours["worst"]["of"] == ["eyeglasses", "square"]


def test_clean_same_pairs_are_the_attacked_ones_alone(run):
    write(run, "ours", "clean", [*CLEAN, *INTRUDERS, ("intruder", "b", 14, 0.0)])  # not attacked
    ours = metrics.summary(run)["ours"]
    assert ours["clean"]["clean_same_pairs"] == 16 / 20
    assert ours["eyeglasses"]["clean_same_pairs"] == 1


def test_an_attack_that_met_fewer_pairs_is_not_in_worst(run):
    write(run, "ours", "square", attacked(0.0, 0.0, 0.0))
    assert "worst" not in metrics.summary(run)["ours"]


def test_rows_of_another_f_or_of_other_photographs_are_left_out(run, capsys):
    inputs = {"embedding": "a1", "images": "b1"}
    write(run, "ours", "clean", CLEAN + INTRUDERS, {"config": inputs})
    changes = {"eyeglasses": {}, "square": {"embedding": "a2"}, "mask": {"images": "b2"}}
    for name, change in changes.items():
        write(run, "ours", name, attacked(0.0, 2.0, 0.3, 4.0), {"config": inputs | change})
    for _ in range(2):
        assert {"clean", "eyeglasses"} == {*metrics.summary(run)["ours"]} - {*metrics.DERIVED}
    lines = capsys.readouterr().err.splitlines()  # once
    assert ["mask.csv: left out" in lines[0], "square.csv: left out" in lines[1]] == [True] * 2
    assert "other images than clean.csv's" in lines[0] and len(lines) == 2
    assert "other embedding than" in lines[1] and "--attacks square --overwrite" in lines[1]


def test_summary_takes_only_the_setting_asked_for(run):
    other = [(*r[:3], 1.0, 0, 1) for r in CLEAN + INTRUDERS]
    write(run, "ours", "clean", CLEAN + INTRUDERS + other)
    assert metrics.summary(run, 0, 1)["ours"]["clean"]["auroc"] == 0.5
    assert "eyeglasses" not in metrics.summary(run, 0, 1)["ours"]
    assert metrics.summary(run)["ours"]["clean"]["auroc"] == 1
    with pytest.raises(UsageError, match="mirroring 0 and selection 0"):
        metrics.summary(run, 0, 0)


def test_more_successful_of_direct_and_indirect(run):
    direct = (0.5, 0.05, 0.5, 0.3)
    lines = [
        f"indirect,1,1,0,{t},7,{c},p,intruder,{d},{first}"
        for (_, t, c, d), first in zip(attacked(0.15, 0.25, 0.35, 0.5), direct)
    ]
    write(run, "ours", "indirect", lines, header=f"{HEADER},direct")
    one = metrics.read_run(run)
    areas = [metrics.measure([one], "ours", a)["auroc"] for a in ("direct", "direct+indirect")]
    assert areas == [(4 + 0 + 4 + 2.5) / 16, (1 + 0 + 3 + 2.5) / 16]


def test_a_second_model_is_measured_on_the_same_images(run):
    for name, rows in (("clean", CLEAN + INTRUDERS), ("eyeglasses", attacked(9, 9, 9, 9))):
        lines = [
            f"{name},1,1,0,{t},7,{c},p,{role},{d},{d / 2 if name == 'clean' else 0.1}"
            for role, t, c, d in rows
        ]
        write(run, "ours", name, lines, header=f"{HEADER},judge")
    ours = metrics.summary(run)["ours"]
    assert list(ours) == ["clean", "eyeglasses", "clean, judge", "eyeglasses, judge"]
    assert ours["eyeglasses"]["auroc"] == ours["clean, judge"]["auroc"] == 1
    assert ours["eyeglasses, judge"]["auroc"] == (1 + 0.5) / 4  # of 0.05, 0.15, 0.1, 0.2
    assert ours["eyeglasses, judge"]["detected"] == 0


def test_certified_rows_are_scores_of_genuine_pairs_and_bounds_of_intruders(run):
    genuine, scores = [0.1, 0.2, 0.3, 0.4], [0.35, 0.5, 0.6, 0.7]
    bounds = [0.15, 0.25, 0.45, 0.5]
    rule = [f"rule,1,1,0,{t},7,{c},{t},genuine,{d},0" for (_, t, c, _), d in zip(CLEAN, genuine)]
    rule += [
        f"rule,1,1,0,{t},7,{c},p,intruder,{s},{b}"
        for (_, t, c, _), s, b in zip(INTRUDERS, scores, bounds)
    ]
    write(run, "ours", "rule", rule, header=f"{HEADER},bound")
    ours = metrics.summary(run)["ours"]
    assert ours["rule"]["auroc"] == auroc(roc(genuine, scores))
    assert ours["certified"]["auroc"] == auroc(roc(genuine, bounds)) == 11 / 16
    # eq. (1) with a threshold of the rule's own, above all four
    assert ours["certified"]["detected"] == 0.5 and ours["rule"]["detected"] == 0.75
    lines = metrics.table({"ours": ours}).splitlines()
    own = [line.split()[1] for line in lines if line.endswith(", threshold of its own pairs")]
    assert own == ["rule", "certified"]
    assert "| Ours, threshold of its own pairs |" in tables.certificate(
        tables.lines_of([metrics.read_run(run)])
    )
    # persons who are not judged set it, where there are some: just above 0.25, beyond which half of
    # the targets' own and two of the bounds lie
    rule += [f"rule,1,1,0,v,7,{i},v,validation,{d},0" for i, d in enumerate((0.2, 0.25))]
    write(run, "ours", "rule", rule, header=f"{HEADER},bound")
    ours = metrics.summary(run)["ours"]
    assert ours["certified"]["auroc"] == 11 / 16 and ours["certified"]["n_genuine"] == 4
    assert ours["certified"]["detected"] == 0.5 and ours["certified"]["fpr"] == 0.5
    assert ours["rule"]["detected"] == 1 and "own pairs" not in metrics.table({"ours": ours})
    text = tables.certificate(tables.lines_of([metrics.read_run(run)]))
    assert "| Ours | 1.000" in text and "0.688 [" in text and "| 50.0%" in text


def test_bounds_that_add_nothing_and_checks_that_were_not_made_are_silent(run):
    """Bounds of 8 x 8 as of the patch itself, of 4 x 4 higher, of 2 x 2 as of 4 x 4."""
    rule = [f"rule,1,1,0,{t},7,{c},{t},genuine,0.3,0,0,0,0" for _, t, c, _ in CLEAN]
    bounds = [(0.2, 0.2, 0.4, 0.4), (0.3, 0.3, 0.3, 0.3)]
    rule += [
        f"rule,1,1,0,{t},7,{c},p,intruder,0.5,{','.join(map(str, bounds[k % 2]))}"
        for k, (_, t, c, _) in enumerate(INTRUDERS)
    ]
    write(run, "ours", "rule", rule, header=f"{HEADER},bound,bound_8,bound_4,bound_2")
    shown = [*metrics.summary(run)["ours"]]
    assert shown[-2:] == ["certified", "certified_4"] and "rule" in shown
    one = metrics.Run(run, {"ours": {"eyeglasses": attack(FAR)}})
    assert metrics.health_lines([one]) == ""
    assert metrics.health_lines([metrics.Run(run, {"ours": HEALTH["zero gradient"][1]})]) != ""


def test_what_passes_at_a_far_is_known_where_ten_errors_are_expected(tmp_path):
    def many(n):
        """n clean intruders, half of them attacked."""
        clean = [("genuine", f"t{j % 2}", j, 0.5 + j) for j in range(40)]
        intruders = [("intruder", f"t{j % 2}", 100 + j, 10.0 + j) for j in range(n)]
        write(tmp_path / str(n), "mine", "clean", clean + intruders)
        near = [(*r[:3], r[3] - 9.5) for r in intruders[: n // 2]]
        write(tmp_path / str(n), "mine", "eyeglasses", near)
        return metrics.read_run(tmp_path / str(n))

    mine = metrics.summary(many(100))["mine"]
    # 10 of 100 intruders pass below a distance of 20
    assert mine["clean"]["tar_at_far_0.1"] == mine["eyeglasses"]["tar_at_far_0.1"] == 20 / 40
    assert mine["clean"]["asr_at_far_0.1"] == 0.1
    assert mine["eyeglasses"]["asr_at_far_0.1"] == 20 / 50
    assert mine["clean"]["tar_at_far_0.01"] is mine["clean"]["asr_at_far_0.01"] is None
    assert metrics.summary(many(99))["mine"]["clean"]["tar_at_far_0.1"] is None
    # of several runs all must have it
    assert metrics.measure([many(100), many(99)], "mine", "clean")["tar_at_far_0.1"] is None


def test_several_runs_give_mean_range_and_paired_differences(tmp_path):
    rng, runs = np.random.default_rng(1), []
    for k in range(2):
        near = [("genuine", f"t{t}", j, rng.uniform(0, 2)) for t in range(8) for j in range(5)]
        far = [("intruder", f"t{t}", 50 + j, rng.uniform(1, 3)) for t in range(8) for j in range(7)]
        write(tmp_path / str(k), "ours", "clean", near + far)
        write(tmp_path / str(k), "no-at", "clean", [(*r[:3], r[3] * 2) for r in near + far])
        some = [(*r[:3], r[3] - 0.5 * (r[2] % 2)) for r in far]
        write(tmp_path / str(k), "weak-at", "clean", near + some)
        runs.append(metrics.read_run(tmp_path / str(k)))
    each = [metrics.measure([one], "ours", "clean") for one in runs]
    both = metrics.measure(runs, "ours", "clean")
    areas = [m["auroc"] for m in each]
    assert both["auroc"] == np.mean(areas) and both["range"]["auroc"] == sorted(areas)
    # without one manifest the same name is another person in each run
    assert both["n_targets"] == 16 and both["n_genuine"] == 80 and both["runs"] == 2
    # a run without the rows counts for nothing
    write(tmp_path / "2", "no-at", "clean", near + far)
    assert metrics.measure([*runs, metrics.read_run(tmp_path / "2")], "ours", "clean") == both
    width = [m["interval"][1] - m["interval"][0] for m in (both, *each)]
    assert width[0] < min(width[1:])
    # noise that both methods share leaves no width
    assert metrics.difference(runs, "ours", "no-at", "clean") == (0, 0, 0)
    mean, low, high = metrics.difference(runs, "ours", "weak-at", "clean")
    weak = metrics.measure(runs, "weak-at", "clean")
    assert mean == pytest.approx(both["auroc"] - weak["auroc"]) and low < mean < high
    assert high - low < min(m["interval"][1] - m["interval"][0] for m in (both, weak))
    back = metrics.difference(runs, "weak-at", "ours", "clean")
    assert back == pytest.approx((-mean, -high, -low))
    assert metrics.difference(runs, "ours", "doa-4", "clean") is None
    text = metrics.table(metrics.summary(runs))
    assert "2 runs: {:.3f} to {:.3f}".format(*both["range"]["auroc"]) in text


GOOD = "clean,1,1,0,a,7,1,a,genuine,0.5"
BAD = {
    "missing column": (["clean,1"], "attack,mirroring", ":1:", "selection"),
    "short row": ([GOOD, "clean,1,1,0,a"], HEADER, ":3:", "5 fields"),
    "distance": ([GOOD, GOOD.replace("0.5", "near")], HEADER, ":3:", "'near'"),
    "not finite": ([GOOD.replace("0.5", "nan")], HEADER, ":2:", "finite"),
    "negative": ([GOOD.replace("0.5", "-1")], HEADER, ":2:", "at least 0"),
    "mirroring": ([GOOD.replace("clean,1", "clean,2")], HEADER, ":2:", "mirroring"),
    "candidate": ([GOOD.replace(",1,a,", ",x,a,")], HEADER, ":2:", "candidate is 'x'"),
    "role": ([GOOD.replace("genuine", "friend")], HEADER, ":2:", "role"),
    "twice": ([GOOD, GOOD], HEADER, ":3:", "twice"),
    "no rows": ([], HEADER, ":1:", "no rows"),
    "bound": ([f"{GOOD},0.6"], f"{HEADER},bound_4", ":2:", "0.6, above the score 0.5"),
}


@pytest.mark.parametrize("lines, header, place, why", BAD.values(), ids=BAD.keys())
def test_bad_rows_are_one_line_and_exit_2(tmp_path, capsys, lines, header, place, why):
    path = write(tmp_path, "ours", "clean", lines, header=header)
    assert metrics.main(["--run", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}{place}" in line and why in line


def test_bad_folders_bytes_json_counts_and_flags_are_one_line(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "bytes", "ours", "clean", [GOOD])
    broken.write_bytes(b"\xff\xfe\x00" + broken.read_bytes())
    write(tmp_path / "json", "ours", "clean", [GOOD], sidecar=[1])
    write(tmp_path / "cut", "ours", "clean", CLEAN, {"n": 8})
    for name, why in {
        "absent": "no such folder",
        "empty": "holds no rows",
        "bytes": "clean.csv:1",
        "json": "a list",
        "cut": "holds 4 rows of ours/clean, 8 were written",
    }.items():
        assert metrics.main(["--run", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and why in captured.err and not captured.out
    for flags in ([], ["--rum", "x"], ["--run", str(run), "--figures", "10"]):
        assert metrics.main(flags) == 2 and capsys.readouterr().err.count("\n") == 1


def test_json_table_and_rows_of_other_persons(run, capsys):
    (run / "ours/attacks").rename(run / "ours/attacks-lfw")
    flags = ["--run", str(run), "--rows", "attacks-lfw"]
    assert metrics.main([*flags, "--json"]) == 0
    expected = metrics.summary(metrics.read_run(run, "attacks-lfw"))
    assert json.loads(capsys.readouterr().out) == expected
    assert metrics.main([*flags, "--figures", "none", "--out", str(run / "out")]) == 0
    printed = capsys.readouterr().out
    (line,) = [text for text in printed.splitlines() if "eyeglasses " in text]
    numbers = "0.688 [0.500, 0.750]"  # a alone: 2 of 4 pairs, b alone: 3
    assert line.split(None, 2)[2].startswith(numbers) and line.endswith("2 / 4 / 4")
    assert "FAILED" not in printed and "OK       attacks harm: ours" in printed
    assert (run / "out/tables.md").exists() and not (run / "out/figures").exists()


def attack(rows=(), **sidecar):
    made = [metrics.Row("x", 1, 1, 0, t, 7, c, "p", role, d) for role, t, c, d in rows]
    return metrics.Attack(made, sidecar)


def evaded(*distances):
    return [(*row[:3], d) for row, d in zip(CLEAN, distances)]


FAR, NEAR = attacked(1.0, 2.0, 3.0, 4.0), attacked(0.9, 1.9, 2.5, 4.1)
WEAK, STRONG = {"iterations": 25, "restarts": 1}, {"iterations": 25, "restarts": 5}
CLOSE = [*evaded(1, 2, 3, 4), *attacked(2.5, 3.5, 4.5, 5.5)]
HEALTH = {  # the check, sidecars and rows with which it passes, and with which it fails
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
    "evasion": (
        "more effort",
        {"evasion": attack(CLEAN[:4], **WEAK), "evasion-5": attack(CLEAN[:4], **STRONG)},
        {"evasion": attack(evaded(1, 1, 1, 1), **WEAK), "evasion-5": attack(CLEAN, **STRONG)},
    ),
    "random search": (
        "more effort",
        {"eyeglasses": attack(NEAR), "random_eyeglasses": attack(FAR)},
        {"eyeglasses": attack(FAR), "random_eyeglasses": attack(NEAR)},
    ),
    "harm": (
        "attacks harm",
        {"clean": attack(CLOSE), "square": attack(attacked(0, 0, 0, 0))},
        {"clean": attack(CLOSE), "square": attack(attacked(9, 9, 9, 9))},
    ),
    "mask": (
        "outside the mask",
        {"eyeglasses": attack(outside_mask_max=1e-6)},
        {"eyeglasses": attack(outside_mask_max=0.004)},
    ),
    "mask not a number": (
        "outside the mask",
        {"eyeglasses": attack(outside_mask_max=0)},
        {"eyeglasses": attack(outside_mask_max=NAN)},
    ),
}


@pytest.mark.parametrize("name, healthy, ill", HEALTH.values(), ids=HEALTH.keys())
def test_health_check_passes_fails_and_says_when_it_did_not_run(name, healthy, ill):
    def outcome(**methods):
        checks = metrics.health([metrics.Run(Path("run"), methods)])
        return next(check for check in checks if check.name == name)

    assert outcome(ours=healthy)[1:] == ("OK", "ours")
    failed = outcome(ours=healthy, mine=ill)
    assert failed.status == "FAILED" and failed.detail.startswith("mine: ")
    assert outcome(ours={"eyeglasses": attack(FAR)}).status == "not run"


def test_packed_rows_read_as_the_single_files_did(run, tmp_path, capsys):
    (run / "ours/log.jsonl").write_text('{"step": 1}\n{"st')
    (run / "ours/result.json").write_text('{"made_of": {"config": {"steps": 1}}}')
    (run / "ours/attacks/clean.json").write_text(
        '{"n": 8, "model": "/home/me/net.py:f", "targets": {"a": {}, "b": {}}}'
    )
    people = {"data": "folder", "images": 9, "seed": 0, "sha256": "1", "train": ["Aaron"]}
    (run / "people.json").write_text(json.dumps(people | {"validation": [], "target": ["a", "b"]}))
    out = tmp_path / "packed"
    assert tables.main(["pack", str(run), str(out)]) == 0
    assert metrics.summary(out) == metrics.summary(run)
    files = ["attacks.csv.gz", "attacks.json", "people.json", "trainings.json"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert tables.trainings(out) == tables.trainings(run)
    assert tables.trainings(out)["ours"]["log"] == [{"step": 1}]
    # persons of photographs became numbers, of all in the manifest; no path stays
    rows = metrics.read_run(out).methods["ours"]["clean"].rows
    assert {r.candidate: r.target for r in rows}[1] == "person-0001"  # a, after Aaron
    assert json.loads((out / "attacks.json").read_text())["ours/clean"] == {
        "n": 8,
        "model": "net.py:f",
        "config": {},
    }
    assert json.loads((out / "people.json").read_text()).keys() == {*people} - {"train"}
    assert "Aaron" not in "".join(p.read_text() for p in out.glob("*.json"))
    before = (out / "attacks.csv.gz").read_bytes()
    assert before[4:8] == bytes(4)  # gzip's time: the same bytes for the same rows
    for broken in (before[:-20], b"no gzip"):
        (out / "attacks.csv.gz").write_bytes(broken)
        assert metrics.main(["--run", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "attacks.csv.gz" in line


def pictures_of(run):
    """A run of somebody's own model, of 112 pixels, and what each figure needs."""
    rng, size = np.random.default_rng(0), 112
    pairs = [("intruder", t, 10 + j) for t in "ab" for j in range(8)]
    genuine = [("genuine", t, j, rng.uniform(0.5, 1.0)) for t in "ab" for j in range(3)]
    write(run, "mine", "clean", genuine + [(*p, rng.uniform(1, 2)) for p in pairs])
    # of 64: (15, 20), and one in four at (35, 30)
    places = [(61, 53) if k % 4 == 0 else (26, 35) for k in range(len(pairs))]
    lines = [
        f"square,1,1,0,{t},7,{j},p,intruder,0.9,{r},{c}" for (_, t, j), (r, c) in zip(pairs, places)
    ]
    write(run, "mine", "square", lines, header=f"{HEADER},row,col")
    faces = rng.integers(0, 256, (2, 2, 3, size, size), dtype=np.uint8)
    arrays = {"anchor": faces[:, 0], "clean": faces, "attacked": faces, "distance": np.ones((2, 2))}
    arrays |= {"mask": np.eye(size, dtype=bool), "pattern": faces[:, 0, :, :12, :32]}
    for name in ("eyeglasses", "square", "eye_patch", "distal"):
        np.savez(run / f"mine/attacks/{name}.npz", **arrays)
    (run / "generator").mkdir()
    np.savez(run / "generator/quadruplets.npz", quadruplets=np.repeat(faces[:, :1], 4, 1))
    for name, steps in (("weak-at", 5), ("weak-at-4", 4)):
        log = [{"step": k, "loss": 9 / k, "val_loss": 5 + k % 4} for k in range(1, 9)]
        (run / name).mkdir()
        (run / name / "log.jsonl").write_text("".join(json.dumps(d) + "\n" for d in log))
        made = {"made_of": {"config": {"attack_steps": steps, "attack_alpha": 32.0}}}
        (run / name / "result.json").write_text(json.dumps(made))
    (run / "mine/figure3.csv").write_text("kind,distance\nreal-real,2\nreal-generated,1\n")
    return metrics.read_run(run)


def test_figures_show_the_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one = pictures_of(tmp_path)
    assert metrics.main(["--run", str(tmp_path)]) == 0 and "not made" not in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    assert made == {*(f"figure{n}.png" for n in range(1, 10)), "roc.png"}
    legend = figures.figure_5(one).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["4 steps of 32/255", "5 steps of 32/255"]
    # where the best squares fell: 12 of 16 at one place, the centre of that square of 10 of 64
    axis = figures.figure_7(one).axes[0]
    times, (left, _, bottom, _) = axis.images[1].get_array(), axis.images[1].get_extent()
    assert times.sum() == 16 and times[0, 0] == 12 and times[-1, -1] == 4
    assert left + 2.5 * 112 / 64 == pytest.approx(35 + 8.5)
    assert bottom - 2.5 * 112 / 64 == pytest.approx(61 + 8.5)
    assert (axis.patches[0].get_x(), axis.patches[0].get_width()) == (25.5, 53)  # searched
    (axis,) = figures.figure_roc(one).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert axis.get_title() == "mine" and names == ["clean", "square"]
    intruders, genuine = metrics.roc_of(*metrics.compared_rows(one.methods["mine"], "square"))[::-1]
    faint, sure = (line.get_xydata().T for line in axis.lines[2:4])
    assert (faint == [intruders / 16, genuine / 6]).all()
    assert sure.shape[1] == (intruders >= 10).sum() > 0
    (tmp_path / "weak-at/log.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    np.savez(tmp_path / "mine/attacks/distal.npz", anchor=np.zeros(3))
    (tmp_path / "generator/quadruplets.npz").write_bytes(b"PK no archive")
    (line,) = figures.draw(one, tmp_path, ["1", "2", "4"])
    for reason in ("quadruplets.npz: cannot be read", "log.jsonl:2", "'attacked is not a file"):
        assert reason in line


def test_without_matplotlib_tables_are_written_and_one_line_says_so(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert metrics.main(["--run", str(run)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and (run / "tables.md").exists()


def test_a_network_compares_y_and_u_with_x_and_t():
    x, y, t, u = (
        torch.tensor(v).reshape(2, 1, 1, 1) for v in ([0.0, 0], [1.0, 5], [4.0, 4], [3, 3.5])
    )
    values, d = figures.compare_identity(lambda images: images.flatten(1), x, y, t, u)
    assert d.tolist() == [[1, 5], [3, 3.5], [1, 0.5], [4, 4]]  # x-y, x-u, t-u, t-x
    assert values["x_y"] == 3 and values["t_u"] == 0.75 and values["y_nearer_to_x_than_t"] == 0.5
    assert values["u_nearer_to_x_than_to_t"] == 0 and values["u_nearer_to_t_than_x_is"] == 1


def test_distances_of_figure_3_are_those_of_target_persons(tmp_path, monkeypatch):
    demo = Path(data.__file__).parent / "demo"
    faces = data.load("synthetic", persons=6, images_per_person=4)
    split = data.split_persons(faces, 2, 2, 2, min_target_images=4)
    data.write_manifest(tmp_path / "people.json", faces, split)
    made = json.loads((demo / "run.json").read_text())
    made |= {"options": {"persons": 6, "images_per_person": 4}}
    (tmp_path / "run.json").write_text(json.dumps(made))
    shutil.copy(demo / "generator.pt", tmp_path)
    shutil.copytree(demo / "mixed", tmp_path / "weak-at")
    figures.measure_distances(tmp_path, "weak-at", pairs=40)
    # every pair there is, one by one
    one, two = (faces.images[faces.person == p] for p in split.target)
    f = embed.load_embedding(demo / "mixed/embedding.pt")
    lord, content = generator.load_generator(demo / "generator.pt")
    pairs = {"real-real": [], "real-generated": []}
    for x, t in ((one, two), (two, one)):
        z_cl, z_co = generator.encode(lord, x)[0], generator.encode(lord, t)[1]
        real, other = embed.features(f, t), embed.features(f, x)
        for k in range(4):
            u = generator.decode(lord, z_cl[k : k + 1].expand(4, -1), z_co)
            generated = embed.features(f, (u * 255).round().byte())
            pairs["real-generated"] += (real - generated).norm(dim=1).tolist()
            pairs["real-real"] += (real - other[k]).norm(dim=1).tolist()
    rows = [r.split(",") for r in (tmp_path / "weak-at/figure3.csv").read_text().splitlines()[1:]]
    for kind, every in pairs.items():
        values = [float(distance) for k, distance in rows if k == kind]
        nearest = np.abs(np.subtract.outer(values, every)).min(1)
        assert len(values) == 40 and nearest.max() < 1e-3 * np.median(every), kind
    assert np.median(pairs["real-real"]) != pytest.approx(np.median(pairs["real-generated"]), 0.01)
    # a face network that looks at colours alone, on validation and target persons
    (tmp_path / "colours.py").write_text("def embed(images):\n    return images.mean((2, 3))\n")
    network = f"{tmp_path / 'colours.py'}:embed"
    if {faces.names[p] for p in split.validation + split.target} & {*content["train"]}:
        with pytest.raises(UsageError, match="trained on"):
            figures.measure_identity(tmp_path, network)
    content["train"] = []
    torch.save(content, tmp_path / "generator.pt")
    pick = data.images_of(faces, split.validation + split.target)
    pairs = [index[:9] for index in generator.draw_pairs(faces.person[pick], 0)]
    monkeypatch.setattr(generator, "draw_pairs", lambda person, seed: pairs)
    figures.measure_identity(tmp_path, network)
    values = json.loads((tmp_path / "generator/identity-colours-embed.json").read_text())
    pick = data.images_of(faces, split.validation + split.target)
    x, t = (
        faces.images[pick[i]].float() / 255 for i in generator.draw_pairs(faces.person[pick], 0)
    )
    y, u = generator.generate_pair(lord, x, t)
    for key, a, b in (("x_y", x, y), ("x_u", x, u), ("t_u", t, u), ("t_x", t, x)):
        expected = (a.mean((2, 3)) - b.mean((2, 3))).norm(dim=1).mean()
        assert values[key] == pytest.approx(float(expected), rel=1e-4), key
