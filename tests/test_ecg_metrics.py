"Scores of 12-lead diagnosis: equal to the official code's numbers, to slow loops, quick, and strict about input."
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medgen_nb.ecg.metrics import (
    EQUIVALENT,
    NORMAL,
    SCALE,
    THRESHOLDS,
    best_threshold,
    best_thresholds,
    calibration_error,
    calibration_table,
    challenge_by_threshold,
    challenge_scores,
    challenge_weights,
    confusion,
    cooccurrence,
    decide,
    lead_agreement,
    merge_equivalent,
    merged_classes,
    prepare_scores,
)
from medgen_nb.metrics import auprc, auroc, bootstrap

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
CLASSES = list(SCALE)
MACRO = {"auroc": "auroc_macro", "auprc": "auprc_macro", "accuracy": "accuracy", "f1": "f_measure_macro", "f2": "f_beta2_macro", "g2": "g_beta2_macro", "challenge": "challenge_metric"}
PER_CLASS = {"auroc": "auroc_classes", "auprc": "auprc_classes", "f1": "f_measure_classes"}


def made_up(n: int, seed: int = 0, prevalence: float = 0.08) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Labels, decisions and probabilities with ties, (n, 27)."
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, 27)) < prevalence).astype(np.uint8)
    score = (0.4 * truth + 0.6 * rng.random((n, 27))).round(2)
    return truth, (score > 0.5).astype(np.uint8), score


@pytest.mark.parametrize("key, merge", [("evaluation-2020", True), ("threestage_27_unmerged", False)])
@pytest.mark.parametrize("case", ["a", "b"])
def test_scores_equal_the_official_code(case, key, merge):
    folder = SHARED / "oracles" / "ecg_challenge"
    if not folder.is_dir():
        pytest.skip("no folder shared/oracles/ecg_challenge beside this checkout: the official numbers are not at hand")
    arrays, expected = np.load(folder / f"case_{case}.npz"), json.loads((folder / f"case_{case}.json").read_text())["results"][key]
    labels, outputs = arrays["label_codes"].tolist(), arrays["output_codes"].tolist()
    classes = CLASSES if merge else expected["classes"]                     # the second is sorted as text: the order must not matter
    ours = challenge_scores(arrays["labels"][:, [labels.index(c) for c in classes]], *(arrays[name][:, [outputs.index(c) for c in classes]] for name in ("binary_outputs", "scalar_outputs")),
                            classes, merge=merge)
    assert list(ours["classes"]) == expected["classes"]
    for name, theirs in MACRO.items():
        assert ours[name] == pytest.approx(expected[theirs], abs=1e-9), name
    for name, theirs in PER_CLASS.items():
        np.testing.assert_allclose(ours[f"{name}_per_class"], np.array(expected[theirs], dtype=float), atol=1e-9, err_msg=name)
    if not merge:
        assert np.sqrt(ours["f2"] * ours["g2"]) == pytest.approx(expected["geometric_mean_fg"], abs=1e-9)


def test_weights_equal_the_official_file_bit_by_bit():
    file = SHARED / "real" / "ecg" / "evaluation-2020" / "weights.csv"
    if not file.is_file():
        pytest.skip("no file shared/real/ecg/evaluation-2020/weights.csv beside this checkout: the official weights are not at hand")
    official = pd.read_csv(file, index_col=0)
    assert official.columns.tolist() == CLASSES == official.index.astype(str).tolist()
    assert np.array_equal(challenge_weights(CLASSES), official.to_numpy())
    turned = CLASSES[::-1]
    assert np.array_equal(challenge_weights(turned), official.to_numpy()[::-1, ::-1])
    names = pd.read_csv(file.with_name("dx_mapping_scored.csv"), dtype=str).set_index("SNOMED CT Code").Abbreviation
    assert {code: short for code, (short, _) in SCALE.items()} == names.to_dict()


def test_classes_are_those_of_the_data_notebook():
    data = pytest.importorskip("medgen_nb.ecg.data", reason="notebook 50 is not there yet")
    assert [(d.code, d.short) for d in data.SCORED] == [(code, short) for code, (short, _) in SCALE.items()]


def slow(truth: np.ndarray, said: np.ndarray, classes: list[str]) -> dict:
    "F, G and the challenge metric, record by record and class by class."
    weights, k = challenge_weights(classes), len(classes)
    one, shared = np.zeros((2, k, 3))
    for y, p in zip(truth.astype(int), said.astype(int)):
        for c in range(k):
            place = 0 if y[c] and p[c] else 1 if p[c] else 2 if y[c] else None
            if place is not None:
                one[c, place] += 1
                shared[c, place] += 1 / max(1, y.sum())

    def credit(answers: np.ndarray) -> float:
        return sum(weights[i, j] / max(1, ((y + p) > 0).sum()) for y, p in zip(truth.astype(int), answers.astype(int)) for i in np.flatnonzero(y) for j in np.flatnonzero(p))

    asleep = np.zeros_like(said)
    asleep[:, classes.index(NORMAL)] = 1
    with np.errstate(invalid="ignore"):
        f1 = 2 * one[:, 0] / (2 * one[:, 0] + one[:, 1] + one[:, 2])
        f2 = 5 * shared[:, 0] / (5 * shared[:, 0] + shared[:, 1] + 4 * shared[:, 2])
        g2 = shared[:, 0] / (shared[:, 0] + shared[:, 1] + 2 * shared[:, 2])
    return {"f1": f1, "f2": f2, "g2": g2, "accuracy": np.mean([(y == p).all() for y, p in zip(truth, said)]),
            "challenge": (credit(said) - credit(asleep)) / (credit(truth) - credit(asleep))}


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_slow_loops_and_the_shared_curves(seed):
    truth, said, score = made_up(60, seed)
    truth[:, 4] = said[:, 4] = truth[:, 7] = 0
    truth[:, 9] = 1
    mixed = np.random.default_rng(seed).permutation(27)
    classes = [CLASSES[k] for k in mixed]
    ours, expected = challenge_scores(truth, said, score, classes, merge=False), slow(truth, said, classes)
    for name in ("f1", "f2", "g2"):
        np.testing.assert_allclose(ours[f"{name}_per_class"], expected[name], atol=1e-12)
        assert ours[name] == pytest.approx(np.nanmean(expected[name]))
    assert ours["accuracy"] == expected["accuracy"] and ours["challenge"] == pytest.approx(expected["challenge"], abs=1e-12)
    assert np.isnan(ours["f2_per_class"][4]) and ours["f2_per_class"][7] == 0, "nobody and nobody said: left out; false alarms alone: 0"
    np.testing.assert_allclose(ours["auroc_per_class"], [auroc(truth[:, k], score[:, k]) for k in range(27)], atol=1e-12)
    theirs = np.array([auprc(truth[:, k], score[:, k]) for k in range(27)])
    theirs[9] = 1                                              # all positive: 1 in the official code, NaN in notebook 06
    np.testing.assert_allclose(ours["auprc_per_class"], theirs, atol=1e-12)
    back = np.argsort(mixed)                                   # the order of the columns must not matter, twins included
    for name in MACRO:
        assert challenge_scores(truth[:, back], said[:, back], score[:, back], CLASSES)[name] == pytest.approx(challenge_scores(truth, said, score, classes)[name]), name


def test_asleep_is_zero_perfect_is_one_and_nothing_to_know_is_nan():
    truth, _, _ = made_up(200)
    asleep = np.zeros_like(truth)
    asleep[:, CLASSES.index(NORMAL)] = 1
    for merge in (True, False):
        assert challenge_scores(truth, asleep, asleep, CLASSES, merge)["challenge"] == 0
        perfect = challenge_scores(truth, truth, truth, CLASSES, merge)
        assert all(perfect[name] == pytest.approx(1) for name in MACRO)
        assert challenge_scores(truth, np.zeros_like(truth), truth * 0.5, CLASSES, merge)["challenge"] < 0
    nothing = challenge_scores(asleep, asleep, asleep, CLASSES)
    assert np.isnan(nothing["challenge"]) and nothing["f2"] == 1 and np.isnan(nothing["auroc"])


def test_merging_joins_pairs_and_only_pairs():
    truth, said, score = made_up(50, prevalence=0.3)
    kept = merged_classes(CLASSES)
    assert len(kept) == 24 and not {other for _, other in EQUIVALENT} & set(kept)
    for matrix, how, join in ((truth, "any", np.maximum), (score, "mean", lambda a, b: (a + b) / 2)):
        merged = merge_equivalent(matrix, CLASSES, how)
        for k, code in enumerate(kept):
            column = matrix[:, CLASSES.index(code)]
            other = dict(EQUIVALENT).get(code)
            np.testing.assert_allclose(merged[:, k], join(column, matrix[:, CLASSES.index(other)]) if other else column)
    lonely = [code for code in CLASSES if code not in (EQUIVALENT[0][0], EQUIVALENT[1][1])]      # one of two pairs each is missing
    columns = [CLASSES.index(code) for code in lonely]
    assert len(merged_classes(lonely)) == 24 and EQUIVALENT[0][1] in merged_classes(lonely)
    assert challenge_scores(truth[:, columns], said[:, columns], score[:, columns], lonely)["f2_per_class"].shape == (24,)
    assert np.array_equal(merge_equivalent(truth[:, columns], lonely, "any")[:, lonely.index(EQUIVALENT[0][1])], truth[:, CLASSES.index(EQUIVALENT[0][1])])
    with pytest.raises(ValueError, match="any"):
        merge_equivalent(truth, CLASSES, "max")
    before = truth.copy()
    merge_equivalent(truth, CLASSES, "any")
    assert np.array_equal(before, truth), "the caller's labels stay"


def test_43000_records_take_less_than_a_second():
    truth, said, score = made_up(43_000)
    score = 0.99 * score + 1e-4 * np.random.default_rng(1).random(score.shape)          # hardly any ties: the slowest case
    seconds = []
    for _ in range(4):
        start = time.process_time()                                             # of this process: others may be at work beside it
        challenge_scores(truth, said, score, CLASSES)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1, f"{min(seconds):.2f} s"


@pytest.mark.parametrize("merge", [True, False])
def test_prepared_statistics_equal_scores_of_the_resampled_records(merge):
    truth, said, score = made_up(150, prevalence=0.03)
    prepared = prepare_scores(truth, said, score, CLASSES, merge)
    everybody = challenge_scores(truth, said, score, CLASSES, merge)
    assert set(prepared) == set(MACRO)
    for rows in (np.arange(150), np.random.default_rng(0).integers(150, size=150), np.arange(20), np.zeros(5, dtype=int)):
        expected = challenge_scores(truth[rows], said[rows], score[rows], CLASSES, merge)
        for name, statistic in prepared.items():
            assert statistic(rows) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
    assert all(statistic(np.arange(150)) == everybody[name] for name, statistic in prepared.items())


def test_two_hundred_replicates_take_seconds():
    prepared, start = prepare_scores(*made_up(2000), CLASSES), time.process_time()
    estimates = {name: bootstrap(prepared[name], n=2000) for name in ("f2", "g2", "challenge")}
    assert time.process_time() - start < 3 and all(e.lo < e.value < e.hi for e in estimates.values())


@pytest.mark.parametrize("merge", [True, False])
def test_one_threshold_is_the_first_of_the_best(merge):
    truth, _, score = made_up(120, seed=4)
    slowly = [challenge_scores(truth, (score > t).astype(int), score, CLASSES, merge)["challenge"] for t in THRESHOLDS]
    np.testing.assert_allclose(challenge_by_threshold(truth, score, CLASSES, merge), slowly, atol=1e-12)
    assert best_threshold(truth, score, CLASSES, merge) == THRESHOLDS[int(np.argmax(slowly))]
    assert len(THRESHOLDS) == 50 and THRESHOLDS[0] == 0 and THRESHOLDS[-1] == 0.98 and THRESHOLDS[29] == 0.58
    perfect = truth * 0.5                                      # every threshold below 0.5 is perfect
    assert best_threshold(truth, perfect, CLASSES, merge) == 0
    assert decide(np.array([[0.5, 0.51]]), 0.5).tolist() == [[0, 1]], "strictly greater"


def test_thresholds_per_class_maximise_f2_and_need_enough_patients():
    truth, _, score = made_up(400, seed=5)
    rare = 3                                                   # no twin
    truth[:, rare] = np.arange(400) < 9
    for merge in (True, False):
        ours = best_thresholds(truth, score, CLASSES, merge=merge)
        one = best_threshold(truth, score, CLASSES, merge)
        along = np.array([challenge_scores(truth, decide(score, t), score, CLASSES, merge)["f2_per_class"] for t in THRESHOLDS])
        kept = merged_classes(CLASSES) if merge else tuple(CLASSES)
        best = dict(zip(kept, THRESHOLDS[np.nan_to_num(along, nan=-1).argmax(0)]))
        for k, code in enumerate(CLASSES):
            first = code if code in best else {b: a for a, b in EQUIVALENT}[code]
            assert ours[k] == (one if k == rare else best[first])
        assert best_thresholds(truth, score, CLASSES, least=9, merge=merge)[rare] == best[CLASSES[rare]]
    assert challenge_scores(truth, decide(score, ours), score, CLASSES, False)["f2"] >= challenge_scores(truth, decide(score, one), score, CLASSES, False)["f2"]


def bad_calls() -> dict:
    truth, said, score = made_up(20)
    nan = score.copy()
    nan[3, 3] = np.nan
    normal = CLASSES.index(NORMAL)
    without = [k for k in range(27) if k != normal]
    return {
        "one shape": ((truth, said[:-1], score, CLASSES), "one shape"),
        "one-dimensional": ((truth[:, 0], said[:, 0], score[:, 0], CLASSES), "records, classes"),
        "empty": ((truth[:0], said[:0], score[:0], CLASSES), "records, classes"),
        "too few classes": ((truth, said, score, CLASSES[:-1]), "27 columns but 26 classes"),
        "unknown class": ((truth, said, score, [*CLASSES[:-1], "164873001"]), "164873001"),
        "abbreviations": ((truth, said, score, [short for short, _ in SCALE.values()]), "not scored"),
        "a class twice": ((truth, said, score, [*CLASSES[:-1], CLASSES[0]]), "twice"),
        "no sinus rhythm": ((truth[:, without], said[:, without], score[:, without], [CLASSES[k] for k in without]), "sinus rhythm"),
        "labels 2": ((truth * 2, said, score, CLASSES), "y_true must hold only 0 and 1"),
        "uncut decisions": ((truth, score, score, CLASSES), "y_pred must hold only 0 and 1"),
        "logits": ((truth, said, score * 5 - 2, CLASSES), "sigmoid"),
        "nan": ((truth, said, nan, CLASSES), "y_score holds NaN"),
        "nan label": ((np.where(truth, np.nan, 0), said, score, CLASSES), "y_true holds NaN"),
    }


@pytest.mark.parametrize("what", bad_calls())
def test_bad_input_is_refused(what):
    arguments, message = bad_calls()[what]
    for function in (challenge_scores, prepare_scores):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    if what not in ("uncut decisions", "one shape"):           # the decisions are not theirs
        truth, _, score, classes = arguments
        for function in (best_threshold, best_thresholds):
            with pytest.raises(ValueError, match=message):
                function(truth, score, classes)


def test_no_threshold_where_sleep_is_perfect():
    asleep = np.zeros((10, 27))
    asleep[:, CLASSES.index(NORMAL)] = 1
    with pytest.raises(ValueError, match="always saying sinus rhythm is perfect"):
        best_threshold(asleep, asleep, CLASSES)


def test_calibration_by_hand():
    table = calibration_table([0, 1, 1, 0], [0.05, 0.15, 0.15, 1.0], bins=10)
    assert table.answers.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1] and table.seen[1] == 1 and table.said[1] == pytest.approx(0.15) and np.isnan(table.seen[5])
    assert calibration_error(table) == pytest.approx((0.05 + 2 * 0.85 + 1) / 4) and table.hi.tolist()[-1] == 1
    truth, _, score = made_up(100)
    everything = calibration_table(truth, score)
    assert everything.answers.sum() == truth.size and everything.equals(calibration_table(truth.ravel(), score.ravel()))
    rng = np.random.default_rng(0)
    honest = rng.random(200_000)
    assert calibration_error(calibration_table(rng.random(200_000) < honest, honest)) < 0.005
    for labels, scores, bins in (([0, 1], [0.5], 10), ([0, 1], [0.5, 1.5], 10), ([0, 2], [0.5, 0.5], 10), ([], [], 10), ([0, 1], [0.5, np.nan], 10), ([0, 1], [0.5, 0.5], 0)):
        with pytest.raises(ValueError):
            calibration_table(labels, scores, bins)


def test_cooccurrence_and_confusion_by_loops():
    truth, said, _ = made_up(80, prevalence=0.2)
    truth[:, 5] = 0
    together, taken = cooccurrence(truth), confusion(truth, said)
    for j in range(27):
        rows = truth[:, j] == 1
        for k in range(27):
            if j == 5:
                assert np.isnan(together[j, k]) and np.isnan(taken[j, k])
                continue
            assert together[j, k] == pytest.approx(truth[rows, k].mean())
            expected = said[rows, j].mean() if j == k else np.mean([not p[j] and p[k] and not y[k] for y, p in zip(truth[rows], said[rows])])
            assert taken[j, k] == pytest.approx(expected)
    with pytest.raises(ValueError, match="one shape"):
        confusion(truth, said[:, :-1])
    with pytest.raises(ValueError, match="labels"):
        cooccurrence(truth * 0.5)


def test_lead_agreement_chance_habit_and_ceiling():
    rng = np.random.default_rng(0)
    weights, share = rng.dirichlet(np.ones(12), size=(40, 5)), rng.dirichlet(0.3 * np.ones(12), size=(40, 5))
    share[rng.random((40, 5)) < 0.6] = np.nan
    share[:, 4] = np.nan                                       # a class without any truth is left out
    weights[:, 4] = np.nan                                     # and nobody looks at its weights
    found = lead_agreement(weights, share)
    by_class = [np.mean([weights[i, k] @ share[i, k] for i in range(40) if np.isfinite(share[i, k, 0])]) for k in range(4)]
    assert found.agreement == pytest.approx(np.mean(by_class)) and found.chance == pytest.approx(1 / 12) and 0 < found.agreement < found.ceiling < 1
    shuffled = [lead_agreement(rng.permuted(np.nan_to_num(weights, nan=1 / 12), axis=2), share).agreement for _ in range(200)]
    assert np.mean(shuffled) == pytest.approx(found.chance, abs=0.005)
    one_pattern = np.broadcast_to(rng.dirichlet(np.ones(12)), share.shape)
    assert lead_agreement(one_pattern, share).agreement == pytest.approx(lead_agreement(one_pattern, share).habit)
    pointing = np.eye(12)[np.nan_to_num(share).argmax(2)]
    assert lead_agreement(pointing, share).agreement == pytest.approx(found.ceiling) == lead_agreement(pointing, share).ceiling
    assert lead_agreement(weights.astype(np.float32), share.astype(np.float32)).agreement == pytest.approx(found.agreement, abs=1e-6)


def test_lead_agreement_refuses_what_it_cannot_compare():
    weights = np.full((6, 3, 12), 1 / 12)
    share = weights.copy()
    partly = share.copy()
    partly[0, 0, 3] = np.nan
    broken = weights.copy()
    broken[2, 1] = np.nan
    for w, s, message in ((weights, share[:, :2], "records, classes, leads"), (weights[0], share[0], "records, classes, leads"), (weights, share * np.nan, "known"), (weights, partly, "known"),
                          (weights * 2, share, "weights must be"), (weights, share - 0.1, "share must be"), (broken, share, "weights must be")):
        with pytest.raises(ValueError, match=message):
            lead_agreement(w, s)
