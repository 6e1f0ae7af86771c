"Fidelity, utility and privacy of binary records: equal to the reference implementations' numbers, exact, fast, and strict about input."
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from medgen_nb.ehr.data import simulate_records
from medgen_nb.ehr.metrics import (
    DISCRIMINATOR,
    FOLDS,
    MIN_CASES,
    PREDICTOR,
    adversarial_votes,
    always_member_risk,
    attack_f1,
    attribute_inference_risk,
    code_correlation,
    codes_per_record,
    correlation_matrix_distance,
    discriminator_scores,
    disease_scores,
    mcad,
    member_votes,
    membership_inference_risk,
    nearest_neighbour_adversarial_accuracy,
    prepare_attribute_inference,
    prevalence_by_decile,
    prevalence_correlation,
    rarest,
)
from medgen_nb.metrics import auprc, auroc, bootstrap, mmd

ORACLES = Path(__file__).resolve().parents[1].parent / "shared" / "oracles" / "ehr_metrics"


@pytest.fixture(params=[1, 2])
def oracle(request):
    "Matrices and the references' results of one pair."
    if not ORACLES.is_dir():
        pytest.skip("no folder shared/oracles/ehr_metrics beside this checkout: the references' numbers are not at hand")
    matrices = np.load(ORACLES / f"pair_{request.param}.npz")
    return [matrices[name] for name in ("real_train", "real_test", "synthetic")], json.loads((ORACLES / f"pair_{request.param}.json").read_text())["results"]


@pytest.fixture
def records() -> np.ndarray:
    rng = np.random.default_rng(0)
    severity = rng.normal(size=(300, 1))
    return (severity + rng.normal(size=(300, 12)) > np.linspace(0.5, 3, 12)).astype(np.uint8)


def test_fidelity_equals_the_references(oracle):
    (train, test, synthetic), expected = oracle
    assert mcad(train, synthetic) == pytest.approx(expected["mcad"]["definition"], abs=1e-12)
    assert mcad(train, test) == pytest.approx(expected["mcad"]["definition_test"], abs=1e-12)
    correlation = expected["correlation"]
    assert correlation_matrix_distance(train, synthetic) == pytest.approx(correlation["frobenius_synthehrella"], abs=1e-10)
    assert correlation_matrix_distance(train, test) == pytest.approx(correlation["frobenius_train_test"], abs=1e-10)
    assert correlation_matrix_distance(train, synthetic, "herdin") == pytest.approx(correlation["herdin_cmd"], abs=1e-10)
    assert correlation_matrix_distance(train, test, "herdin") == pytest.approx(correlation["herdin_cmd_train_test"], abs=1e-10)
    assert prevalence_correlation(train, synthetic) == pytest.approx(expected["prevalence"]["pearson"], abs=1e-12)


def test_privacy_equals_the_references(oracle):
    (train, test, synthetic), expected = oracle
    for name, risk in expected["mir_benchmark"].items():
        assert membership_inference_risk(train, test, synthetic, int(name.removeprefix("theta"))) == pytest.approx(risk, abs=1e-12)
    assert always_member_risk(len(train), len(test)) == pytest.approx(expected["mir_floor_always_member_f1"])
    for key, other in (("air_benchmark", synthetic), ("air_benchmark_test_as_reference", test)):
        for name, risk in expected[key].items():
            n_known, k = map(int, re.findall(r"\d+", name))
            assert attribute_inference_risk(train, other, n_known, k) == pytest.approx(risk, abs=1e-10)
    assert nearest_neighbour_adversarial_accuracy(train, test, synthetic) == pytest.approx(expected["nnaa_benchmark"]["first_m_rows"], abs=1e-12)


def test_every_distance_of_a_set_to_itself_is_zero(records):
    assert mcad(records, records) == 0 and prevalence_correlation(records, records) == pytest.approx(1)
    assert correlation_matrix_distance(records, records) == correlation_matrix_distance(records, records, "herdin") == 0


def test_correlation_equals_numpy_and_constant_columns_are_zero(records):
    np.testing.assert_allclose(code_correlation(records), np.corrcoef(records.T), atol=1e-12)
    constant = records.copy()
    constant[:, 3], constant[:, 5] = 0, 1
    r = code_correlation(constant)
    assert np.isfinite(r).all() and (np.diag(r) == 1).all()
    for column in (3, 5):
        assert (np.delete(r[column], column) == 0).all() and (np.delete(r[:, column], column) == 0).all()


def test_independent_columns_fool_prevalence_but_not_correlation(records):
    columns = np.random.default_rng(1).permuted(records, axis=0)
    assert prevalence_correlation(records, columns) == pytest.approx(1)
    assert correlation_matrix_distance(records, columns) > 1 and mcad(records, columns) > 0.1


def test_mcad_of_histograms_done_by_hand():
    real = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])       # 1, 2, 3, 3 codes
    synthetic = np.array([[0, 0, 0, 0], [1, 1, 1, 1]])                                # 0 and 4: to the end bins
    assert mcad(real, synthetic, bins=2) == pytest.approx((abs(1 / 4 - 1 / 2) + abs(3 / 4 - 1 / 2)) / 2)
    assert codes_per_record(real).tolist() == [1, 2, 3, 3] and 0 <= mcad(real[:1], synthetic) <= 1


def test_rarest_codes_and_their_prevalence():
    real = np.repeat(np.eye(10, dtype=np.uint8), range(1, 11), axis=0)
    assert rarest(real).tolist() == [0, 1, 2] and rarest(real[:, ::-1]).tolist() == [9, 8, 7] and len(rarest(real, 1.0)) == 10
    swapped = real.copy()
    swapped[:, [0, 2]] = real[:, [2, 0]]
    assert prevalence_correlation(real, swapped, rarest(real)) == pytest.approx(-1) and prevalence_correlation(real, swapped) > 0.8
    assert np.isnan(prevalence_correlation(real, np.zeros_like(real)))


def test_bootstrap_of_4000_by_128_takes_seconds():
    rng = np.random.default_rng(2)
    real, synthetic = ((rng.random((4000, 128)) < 0.1).astype(np.uint8) for _ in range(2))
    start = time.process_time()
    e = bootstrap(lambda rows: correlation_matrix_distance(real[rows], synthetic), n=4000, replicates=50)
    assert time.process_time() - start < 15 and e.lo < e.hi < np.mean(e.replicates)


def test_privacy_of_a_copier_and_of_a_stranger(records):
    train, test, fresh = records[:100], records[100:200], records[200:]
    assert nearest_neighbour_adversarial_accuracy(train, test, train) > nearest_neighbour_adversarial_accuracy(train, test, test)
    assert membership_inference_risk(train, test, train, 0) >= membership_inference_risk(train, test, test, 0)
    assert membership_inference_risk(train, test, fresh, 12) == pytest.approx(always_member_risk(100, 100)) == pytest.approx(2 / 3)
    assert attribute_inference_risk(train, train, 6) >= attribute_inference_risk(train, fresh, 6)
    assert np.isnan(attribute_inference_risk(train[:, :6] * [1, 1, 1, 0, 0, 0], fresh[:, :6], 3)), "unknown codes that nobody carries"


def test_block_size_does_not_matter(records, monkeypatch):
    import medgen_nb.ehr.metrics as module
    train, test, fresh = records[:100], records[100:200], records[200:]
    whole = (attribute_inference_risk(train, fresh, 5, 3), nearest_neighbour_adversarial_accuracy(train, test, fresh))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    assert whole == (attribute_inference_risk(train, fresh, 5, 3), nearest_neighbour_adversarial_accuracy(train, test, fresh))


@pytest.mark.parametrize("synthetic", [np.zeros((5, 11), int), np.zeros(12, int), np.zeros((0, 12), int), np.full((5, 12), 0.3), np.full((5, 12), np.nan), np.full((5, 12), 2)])
def test_bad_matrices_are_refused(records, synthetic):
    for metric in (prevalence_correlation, prevalence_by_decile, correlation_matrix_distance, mcad, discriminator_scores, member_votes, prepare_attribute_inference,
                   lambda a, b: disease_scores(a, b, 0), lambda a, b: disease_scores(b, a, 0), lambda a, b: adversarial_votes(a, a, b), lambda a, b: membership_inference_risk(a, a, b),
                   lambda a, b: attribute_inference_risk(a, b, 4), lambda a, b: nearest_neighbour_adversarial_accuracy(a, a, b)):
        with pytest.raises(ValueError, match="record matrices"):
            metric(records, synthetic)


def test_bad_arguments_are_refused(records):
    for call in (lambda: correlation_matrix_distance(records, records, "cosine"), lambda: rarest(records, 0.01), lambda: rarest(records, 1.5),
                 lambda: attribute_inference_risk(records, records, 12), lambda: attribute_inference_risk(records, records, 4, k=301)):
        with pytest.raises(ValueError):
            call()


def test_prevalence_by_decile_done_by_hand():
    real = np.repeat(np.eye(4, dtype=np.uint8), [1, 2, 3, 4], axis=0)[:, [2, 0, 3, 1]]          # prevalences 0.3, 0.1, 0.4, 0.2
    synthetic = np.zeros((5, 4), dtype=np.uint8)
    synthetic[:2, 2], synthetic[:1, 1] = 1, 1                                                    # 0, 0.2, 0.4, 0
    table = prevalence_by_decile(real, synthetic, groups=2)
    assert table.codes.tolist() == [2, 2] and table.index.tolist() == [1, 2]
    np.testing.assert_allclose(table[["real", "synthetic"]], [[0.15, 0.1], [0.35, 0.2]])
    np.testing.assert_allclose(table.relative_error, [(0.1 + 0.2) / 0.3, 0.3 / 0.7])


def test_prevalence_by_decile_groups_and_unseen_codes(records):
    table = prevalence_by_decile(records, records, groups=5)
    assert table.codes.tolist() == [3, 3, 2, 2, 2] and (np.diff(table.real) >= 0).all() and (table.relative_error == 0).all()
    assert len(prevalence_by_decile(records, records)) == 10 and (prevalence_by_decile(records, 0 * records).relative_error == 1).all()
    unseen = records * (np.arange(12) < 8)
    assert np.isnan(prevalence_by_decile(unseen, records, groups=3).relative_error[1]), "nobody real has a code of the group"
    for groups in (0, 13):
        with pytest.raises(ValueError, match="groups"):
            prevalence_by_decile(records, records, groups)


def test_mmd_of_records_is_the_sum_over_pairs_of_differing_codes(records):
    x, y = records[:60], records[60:130]
    k = lambda a, b: np.mean([np.exp(-(a[:, None] != b[None]).sum(-1) / (2 * width**2)) for width in (1.0, 2.0)], axis=0)
    apart = lambda kernel: (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))
    assert mmd(x, y, bandwidths=(1.0, 2.0)) == pytest.approx(apart(k(x, x)) + apart(k(y, y)) - 2 * k(x, y).mean(), abs=1e-6)


def test_votes_equal_distances_taken_one_by_one(records):
    train, test, made = records[:90], records[90:150], records[150:270]
    distance = cdist(train, made, "hamming") * 12
    for threshold in (0, 1, 3):
        votes = member_votes(train, made, threshold)
        assert votes.dtype == bool and np.array_equal(votes, distance.min(axis=1) < threshold + 0.5)
        said, member = np.concatenate([votes, member_votes(test, made, threshold)]), np.arange(150) < 90
        assert membership_inference_risk(train, test, made, threshold) == attack_f1(member, said) == pytest.approx(f1_score(member, said))
    assert np.isnan(attack_f1(np.zeros(3, bool), np.zeros(3, bool)))

    def accuracy(a: np.ndarray, b: np.ndarray) -> float:
        own = [cdist(x, x, "cityblock") + np.diag([99] * len(x)) for x in (a, b)]
        across = cdist(a, b, "cityblock")
        return ((across.min(1) > own[0].min(1)).mean() + (across.min(0) > own[1].min(1)).mean()) / 2

    votes = adversarial_votes(train, test, made)
    assert votes.shape == (60,) and votes.mean() == nearest_neighbour_adversarial_accuracy(train, test, made)
    assert votes.mean() == pytest.approx(accuracy(test, made[:60]) - accuracy(train[:60], made[:60]))


def test_attribute_inference_over_rows_equals_a_slow_attack(records):
    x, made, n_known, k = records[:80], records[80:], 5, 3
    known = np.argsort(-x.sum(0).astype(int), kind="stable")[:n_known]
    unknown = [c for c in range(12) if c not in known]

    def slow(rows: np.ndarray) -> float:
        people, score, weight = x[rows], 0.0, 0.0
        guesses = []
        for person in people:
            distance = (made[:, known] != person[known]).sum(1)
            guesses.append(made[distance <= np.sort(distance)[k - 1]].mean(0) > 0.5)
        for c in unknown:
            p = people[:, c].mean()
            entropy = 0.0 if p in (0, 1) else -p * np.log(p) - (1 - p) * np.log(1 - p)
            score, weight = score + entropy * f1_score(people[:, c], np.array(guesses)[:, c], zero_division=0), weight + entropy
        return score / weight

    statistic, everybody = prepare_attribute_inference(x, made, n_known, k), np.arange(80)
    assert statistic(everybody) == attribute_inference_risk(x, made, n_known, k) == pytest.approx(slow(everybody), abs=1e-12)
    for rows in (np.arange(30), np.random.default_rng(0).integers(80, size=80)):
        assert statistic(rows) == pytest.approx(slow(rows), abs=1e-12)
    assert statistic(np.repeat(everybody, 2)) == pytest.approx(statistic(everybody)), "known codes do not depend on the rows"
    nobody = np.flatnonzero(x[:, unknown].sum(1) == 0)[:1]
    assert np.isnan(statistic(nobody)) and bootstrap(statistic, n=80, replicates=20).lo < statistic(everybody)


def test_discriminator_equals_folds_done_by_hand_and_repeats(records):
    real, made = records[:60], records[60:160]
    labels, scores = discriminator_scores(real, made, seed=3)
    assert labels.tolist() == [0] * 60 + [1] * 60 and scores.shape == (120,) and (scores >= 0).all() and (scores <= 1).all()
    assert np.array_equal(scores, discriminator_scores(real, made, seed=3)[1]) and not np.array_equal(scores, discriminator_scores(real, made, seed=4)[1])
    rng = np.random.default_rng(3)
    x, by_hand = np.concatenate([real[rng.permutation(60)], made[rng.permutation(100)[:60]]]), np.empty(120)
    for learn, judge in StratifiedKFold(FOLDS, shuffle=True, random_state=3).split(x, labels):
        by_hand[judge] = HistGradientBoostingClassifier(**DISCRIMINATOR, random_state=3).fit(x[learn], labels[learn]).predict_proba(x[judge])[:, 1]
    np.testing.assert_allclose(scores, by_hand)
    with pytest.raises(ValueError, match="folds"):
        discriminator_scores(real, made[: FOLDS - 1])


def test_discriminator_and_mmd_pass_other_patients_and_see_independent_coins():
    everyone = simulate_records(2000, 96, seed=3).matrix
    real, fresh = everyone[:1000], everyone[1000:]
    coins = np.random.default_rng(0).permuted(fresh, axis=0)
    assert abs(auroc(*discriminator_scores(real, fresh)) - 0.5) < 0.04 and auroc(*discriminator_scores(real, coins)) > 0.6
    assert mmd(real, coins) > 2 * abs(mmd(real, fresh))
    assert auroc(*discriminator_scores(real, real)) < 0.3, "twins in other folds carry the other label"
    assert auroc(*discriminator_scores(real, np.zeros_like(fresh))) > 0.95


def test_disease_scores_come_from_the_other_codes_alone(records):
    train, test, code = records[:200], records[200:], 2
    scores = disease_scores(train, test, code, seed=5)
    others = np.delete(np.arange(12), code)
    trees = HistGradientBoostingClassifier(**PREDICTOR, random_state=5).fit(train[:, others], train[:, code])
    np.testing.assert_allclose(scores, trees.predict_proba(test[:, others])[:, 1])
    flipped = test.copy()
    flipped[:, code] ^= 1
    assert np.array_equal(scores, disease_scores(train, flipped, np.int64(code), seed=5)) and not np.array_equal(scores, disease_scores(train, test, code, seed=6))
    assert auroc(test[:, code], scores) > 0.65 and scores.shape == (100,)


def test_real_records_alone_make_a_strong_baseline():
    "A weak one would make any augmentation look good; copies of what is known must not help."
    world = simulate_records(24_000, 96, seed=3)
    code, learn, judged = world.codes.index("135"), world.matrix[:4000], world.matrix[4000:]
    ill, truth = judged[:, code], world.truth["rare"]["135"][4000:]
    ours = auprc(ill, disease_scores(learn, judged, code))
    defaults = HistGradientBoostingClassifier(early_stopping=False).fit(np.delete(learn, code, 1), learn[:, code]).predict_proba(np.delete(judged, code, 1))[:, 1]
    assert auprc(ill, defaults) < ours - 0.05 and ours > 0.8 * auprc(ill, truth)
    assert auprc(ill, disease_scores(np.vstack([learn, learn]), judged, code)) < ours + 0.01


def test_diseases_that_cannot_be_learned_are_refused(records):
    few = records.copy()
    few[:, 4] = np.arange(300) < MIN_CASES
    assert len(disease_scores(few, records, 4)) == 300
    for scarce in (np.arange(300) < MIN_CASES - 1, np.arange(300) >= MIN_CASES - 1, np.zeros(300)):
        few[:, 4] = scarce
        with pytest.raises(ValueError, match="training records carry"):
            disease_scores(few, records, 4)
    for code in (-1, 12, "710", 2.0, None):
        with pytest.raises(ValueError, match="column number"):
            disease_scores(records, records, code)
    with pytest.raises(ValueError, match="column number"):
        disease_scores(records[:, :1], records[:, :1], 0)
