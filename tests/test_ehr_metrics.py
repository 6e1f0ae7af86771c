"Fidelity and privacy of binary records: equal to the reference implementations' numbers, exact, fast, and strict about input."
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from medgen_nb.ehr.metrics import (
    always_member_risk,
    attribute_inference_risk,
    code_correlation,
    codes_per_record,
    correlation_matrix_distance,
    mcad,
    membership_inference_risk,
    nearest_neighbour_adversarial_accuracy,
    prevalence_correlation,
    rarest,
)
from medgen_nb.metrics import bootstrap

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
    for metric in (prevalence_correlation, correlation_matrix_distance, mcad, lambda a, b: membership_inference_risk(a, a, b),
                   lambda a, b: attribute_inference_risk(a, b, 4), lambda a, b: nearest_neighbour_adversarial_accuracy(a, a, b)):
        with pytest.raises(ValueError, match="record matrices"):
            metric(records, synthetic)


def test_bad_arguments_are_refused(records):
    for call in (lambda: correlation_matrix_distance(records, records, "cosine"), lambda: rarest(records, 0.01), lambda: rarest(records, 1.5),
                 lambda: attribute_inference_risk(records, records, 12), lambda: attribute_inference_risk(records, records, 4, k=301)):
        with pytest.raises(ValueError):
            call()
