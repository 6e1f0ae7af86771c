"The shared metrics: closed forms, reference formulas, shared resamples, two-level differences, bad input."
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import scipy

from medgen_nb.metrics import (
    Estimate,
    auprc,
    auroc,
    bootstrap,
    copies,
    flatten,
    floor_halves,
    frechet_distance,
    memorisation,
    mmd,
    neighbourhoods,
    paired_difference,
    precision_recall_density_coverage,
    prepare_mmd,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_frechet_equals_the_matrix_root(rng):
    x, y = rng.normal(size=(400, 10)) @ rng.normal(size=(10, 10)), rng.normal(size=(300, 10)) + 0.3
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    eigen = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    assert frechet_distance(x, y) == pytest.approx(eigen, rel=1e-8) == pytest.approx(frechet_distance(y, x), rel=1e-8)


@pytest.mark.parametrize("n, d", [(50, 1), (200, 6), (5, 20)])
def test_frechet_closed_form_also_with_fewer_records_than_features(rng, n, d):
    x = rng.normal(size=(n, d))
    stretched = 3 * (x - x.mean(0)) + x.mean(0) + 2
    assert frechet_distance(x, stretched) == pytest.approx(4 * d + 4 * x.var(0, ddof=1).sum(), rel=1e-7)
    assert 0 <= frechet_distance(x, x) < 1e-6


@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
def test_mmd_equals_the_definition(rng, kernel):
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 1.5 + 0.5
    def k(a, b):
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.mean([np.exp(-squared / (2 * s**2)) for s in (0.7, 2.0)], axis=0) if kernel == "rbf" else (a @ b.T / 3 + 1) ** 3
    off = lambda z: (k(z, z).sum() - np.trace(k(z, z))) / (len(z) * (len(z) - 1))
    expected = off(x) + off(y) - 2 * k(x, y).mean()
    assert mmd(x, y, kernel, bandwidths=(0.7, 2.0)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_mmd_is_unbiased_and_its_ruler_is_the_real_set(rng):
    values = [mmd(rng.normal(size=(25, 3)), rng.normal(size=(25, 3))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200) and min(values) < 0
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) * 9
    median = np.median(scipy.spatial.distance.pdist(x))
    assert mmd(x, y) == pytest.approx(mmd(x, y, bandwidths=median * np.array([0.25, 0.5, 1, 2, 4])), abs=1e-6)


def test_prepared_mmd_never_counts_a_record_with_itself(rng):
    x, y = rng.normal(size=(12, 2)), rng.normal(size=(10, 2))
    statistic, rows = prepare_mmd(x, y, bandwidths=[1.0]), np.array([0, 0, 0, 1, 5, 5])
    k = lambda a, b: np.exp(-((a - b) ** 2).sum() / 2)
    within = np.mean([k(x[i], x[j]) for i in rows for j in rows if i != j])
    rest = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    assert statistic(rows) == pytest.approx(within + rest - 2 * np.mean([k(x[i], b) for i in rows for b in y]), abs=1e-6)
    assert statistic(np.arange(12)) == mmd(x, y, bandwidths=[1.0])


def test_precision_recall_density_coverage_against_loops(rng):
    real, fake, k = rng.normal(size=(60, 3)), 1.4 * rng.normal(size=(45, 3)), 4
    cdist = scipy.spatial.distance.cdist
    r, f = (np.sort(cdist(z, z), axis=1)[:, k] for z in (real, fake))
    inside = cdist(real, fake) <= r[:, None]
    expected = {"precision": inside.any(0).mean(), "recall": (cdist(real, fake) <= f).any(1).mean(),
                "density": inside.sum(0).mean() / k, "coverage": inside.any(1).mean()}
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected)
    each = neighbourhoods(real, fake, k)
    assert each["coverage"].shape == each["recall"].shape == (60,) and each["precision"].shape == each["density"].shape == (45,)


def test_memorisation_extremes(rng):
    train, test, fresh = (rng.normal(size=(150, 4)) for _ in range(3))
    assert memorisation(train, test, train) == 1 and memorisation(train, test, test) == 0
    assert memorisation(train, train, fresh) == 0.5 and set(copies(train, train, fresh)) == {0.5}
    assert abs(memorisation(train, test, fresh) - 0.5) < 0.15
    with pytest.raises(ValueError, match="equal sizes"):
        memorisation(train, test[:-1], fresh)


def test_degenerate_labels_are_nan():
    for metric in (auroc, auprc):
        assert metric([0, 1, 0], [0.1, 0.9, 0.2]) == 1
        assert np.isnan(metric([1, 1], [0.1, 0.9])) and np.isnan(metric([0, 0], [0.1, 0.9]))


def test_floor_halves_are_disjoint_and_equal():
    for n in (10, 11):
        a, b = floor_halves(n, seed=3)
        assert len(a) == len(b) == 5 and not set(a) & set(b)
    assert list(floor_halves(10, 3)[0]) == list(floor_halves(10, 3)[0]) != list(floor_halves(10, 4)[0])
    with pytest.raises(ValueError, match="halved"):
        floor_halves(3)


def test_bootstrap_is_the_basic_interval_of_scipy(rng):
    x = rng.exponential(size=80)
    e = bootstrap(lambda rows: x[rows].mean(), n=80, replicates=300)
    given = scipy.stats.bootstrap((x,), np.mean, n_resamples=0, method="basic",
                                  bootstrap_result=SimpleNamespace(bootstrap_distribution=np.array(e.replicates)))
    assert (e.lo, e.hi) == pytest.approx(tuple(given.confidence_interval)) and e.value == x.mean() and e.n == 80
    drawn = scipy.stats.bootstrap((x,), np.mean, n_resamples=4000, method="basic", rng=1).confidence_interval
    assert (e.lo, e.hi) == pytest.approx(tuple(drawn), abs=0.05)


def test_two_runs_see_the_same_resamples():
    seen = [[], []]
    for log in seen:
        bootstrap(lambda rows, log=log: float(log.append(rows.copy()) or 0), n=17, replicates=5)
    assert all(np.array_equal(a, b) for a, b in zip(*seen)) and np.array_equal(seen[0][0], np.arange(17))
    assert np.array_equal(seen[0][3], np.random.default_rng([0, 2]).integers(17, size=17))
    longer = bootstrap(lambda rows: rows.mean(), n=17, replicates=9).replicates
    assert longer[:5] == bootstrap(lambda rows: rows.mean(), n=17, replicates=5).replicates


def test_missing_replicates_are_left_out():
    holes = bootstrap(lambda rows: float("nan") if rows[0] == 0 else rows.mean(), n=10, replicates=100)
    assert np.isnan(holes.value) and np.isnan(holes.lo)            # arange(n) begins with 0
    some = bootstrap(lambda rows: float("nan") if rows[0] == 9 else rows.mean(), n=10, replicates=100)
    assert some.lo < some.value < some.hi and np.isnan(some.replicates).any()


def test_estimate_prints_and_survives_json():
    assert str(Estimate(0.934, 0.912, 0.951, 10, ())) == "0.93 [0.91, 0.95]"
    assert str(Estimate(float("nan"), float("nan"), float("nan"), 10, ())) == "nan [nan, nan]"
    e = bootstrap(lambda rows: rows.mean(), n=9, replicates=4)
    again = Estimate(**json.loads(json.dumps(asdict(e))))
    assert paired_difference([again], [e]).value == 0 and list(again.replicates) == list(e.replicates)


def test_paired_difference_of_one_run_is_the_bootstrap_of_the_difference(rng):
    x, y = rng.normal(size=(2, 60))
    a, b, gap = (bootstrap(lambda rows, v=v: v[rows].mean(), n=60, replicates=400) for v in (x, y, x - y))
    d = paired_difference([a], [b], draws=20_000)
    assert (d.value, d.lo, d.hi) == pytest.approx((gap.value, gap.lo, gap.hi), abs=0.02) and d.per_seed == pytest.approx((gap.value,))


def test_paired_difference_has_two_levels(rng):
    base = rng.normal(size=100)
    run = lambda offset: bootstrap(lambda rows: base[rows].mean() + offset, n=100)
    zero = [run(0.0)] * 3
    seeds_only = paired_difference([run(0.1), run(0.2), run(0.3)], zero)     # pairing removes the patients entirely
    assert seeds_only.value == pytest.approx(0.2) and seeds_only.same_sign and 0 < seeds_only.lo < seeds_only.hi < 0.4
    assert not paired_difference([run(-0.1), run(0.2), run(0.3)], zero).same_sign
    noise = bootstrap(lambda rows: rng.permutation(base)[rows].mean(), n=100)
    once, thrice = paired_difference([noise], [zero[0]]), paired_difference([noise] * 3, zero)
    assert (thrice.hi - thrice.lo) == pytest.approx(once.hi - once.lo, rel=0.1), "the same run three times is no news about patients"


def test_paired_difference_refuses_what_is_not_paired():
    a, b = (bootstrap(lambda rows: 0.0, n=n) for n in (10, 11))
    for left, right in (([a], [b]), ([a, a], [a]), ([], []), ([a], [bootstrap(lambda rows: 0.0, n=10, replicates=9)])):
        with pytest.raises(ValueError):
            paired_difference(left, right)


def test_flatten():
    e = Estimate(0.5, float("nan"), 0.7, 12, (0.1,))
    flat = flatten({"auroc": e, "codes": np.int64(3), "loss": float("inf"), "rate": np.float32(0.5)})
    assert flat == {"auroc": 0.5, "auroc_lo": None, "auroc_hi": 0.7, "auroc_n": 12, "codes": 3, "loss": None, "rate": 0.5}
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    with pytest.raises(ValueError, match="twice"):
        flatten({"auroc": e, "auroc_n": 1})


@pytest.mark.parametrize("x, y", [(np.zeros((5, 2)), np.zeros((5, 3))), (np.zeros(5), np.zeros(5)), (np.zeros((1, 2)), np.zeros((5, 2))),
                                  (np.full((5, 2), np.nan), np.zeros((5, 2)))])
def test_bad_features_are_refused(x, y):
    for metric in (frechet_distance, mmd, precision_recall_density_coverage):
        with pytest.raises(ValueError):
            metric(x, y)


def test_bad_arguments_are_refused():
    x = np.zeros((8, 2))
    for call in (lambda: mmd(x, x), lambda: mmd(x, x, kernel="cosine"), lambda: mmd(x, x, bandwidths=[0.0]), lambda: neighbourhoods(x, x, k=8),
                 lambda: bootstrap(lambda rows: 0.0, n=1), lambda: bootstrap(lambda rows: 0.0, n=5, level=95)):
        with pytest.raises(ValueError):
            call()
