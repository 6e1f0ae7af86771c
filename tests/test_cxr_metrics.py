"""cxr.metrics: contracts of the judges, answers that are known from true twins, and bad input."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from sklearn.metrics import f1_score, roc_auc_score

from medgen_nb.cxr.data import FINDINGS, simulate_films
from medgen_nb.cxr.metrics import (
    CALLED,
    MARGIN,
    RULES,
    SCALES,
    Classifier,
    FixedNet,
    abnormal_probability,
    alarms,
    as_films,
    best_dice,
    box_around,
    choose_threshold,
    dice_at,
    distance_to_real,
    embeddings,
    fid_by_class,
    fid_star,
    finding_auroc,
    flip_rate,
    induction,
    localisation,
    lung_overlap,
    macro_mean,
    map_strength,
    ms_ssim,
    ms_ssim_weights,
    ncc,
    normal_ratio,
    outside,
    pixel_auprc,
    pixel_auroc,
    pointing,
    prior_maps,
    ssim,
    ssim_outside,
    table_of,
    vary,
)
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, fit

SMALL = dict(findings=tuple(FINDINGS), shrink=2, widths=(8, 8, 16), features=12)


@pytest.fixture(scope="module")
def people():
    return simulate_films(70, seed=11)


@pytest.fixture(scope="module")
def ill(people):
    return people.rows(~people.normal)


@pytest.fixture(scope="module")
def effect(ill):
    return ill.films - ill.healthy


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return Classifier(**SMALL).eval()


def test_films_are_checked():
    with pytest.raises(ValueError, match="axis of one channel"):
        as_films(np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="NaN"):
        as_films(np.full((1, 1, 8, 8), np.nan))
    with pytest.raises(ValueError, match="same people"):
        ssim(np.zeros((2, 1, 16, 16)), np.zeros((3, 1, 16, 16)))
    with pytest.raises(ValueError, match="masks"):
        ssim(np.zeros((2, 1, 16, 16)), np.zeros((2, 1, 16, 16)), np.ones((2, 8, 8), bool))


def test_ssim_against_another_library(ill):
    x, y = ill.films[:3], ill.healthy[:3] + np.float32(0.05)
    inner = np.zeros_like(ill.lesions[:3])
    inner[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = True                      # libraries treat borders differently
    slow = [structural_similarity(a, b, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False) for a, b in zip(x, y)]
    assert np.allclose(ssim(x[:, None], y[:, None], inner), slow, atol=1e-3)
    assert np.allclose(ssim(x[:, None], x[:, None]), 1) and np.isnan(ssim(x[:1, None], y[:1, None], np.zeros((1, *x.shape[1:]), bool))).all()


def test_scales_of_ms_ssim(ill):
    assert [len(ms_ssim_weights(size)) for size in (11, 32, 64, 128, 176, 512)] == [1, 2, 3, 4, 5, 5]
    assert sum(ms_ssim_weights(64)) == pytest.approx(1) and ms_ssim_weights(512) == pytest.approx(tuple(s / sum(SCALES) for s in SCALES))
    with pytest.raises(ValueError, match="larger films"):
        ms_ssim_weights(10)
    x = ill.x[:70]
    soft = torch.from_numpy(gaussian_filter(ill.films, (0, 1, 1)))[:, None]
    assert np.allclose(ms_ssim(x, x), 1, atol=1e-5) and (ms_ssim(x, soft) < 1).all() and ms_ssim(x, soft).shape == (len(x),)
    assert (ms_ssim(x, soft) > ssim(x, soft)).mean() > 0.9                # a blur is forgiven at coarse scales
    assert np.isfinite(ms_ssim(x[:2], -x[:2])).all()                     # negative parts do not become nan


def test_every_size_works():
    for size in (32, 64, 96, 176, 200):
        x = torch.rand(2, 1, size, size)
        assert ms_ssim(x, x) == pytest.approx(1, abs=1e-4) and ssim(x, x) == pytest.approx(1)


def test_only_the_lesion_may_change(ill):
    x, twin = ill.x, torch.from_numpy(ill.healthy)[:, None]
    assert np.nanmin(ssim_outside(x, twin, ill.lesions)) > 0.98 and ssim(x, twin).mean() < 0.97
    moved = torch.roll(twin, 3, 3)
    assert np.nanmean(ssim_outside(x, moved, ill.lesions)) < 0.7
    one = np.zeros((1, 32, 32), bool)
    one[0, 16, 16] = True
    assert (~outside(one)).sum() == (2 * MARGIN + 1) ** 2 and outside(~one & False).all()


def test_classifier_contract(classifier, people, tmp_path):
    said = classifier.predict(people.x)
    assert list(said) == list(FINDINGS) and said.shape == (len(people), 7) and said.to_numpy().min() > 0 and said.to_numpy().max() < 1
    assert embeddings(classifier, people.x[:5]).shape == (5, 12 + 7)
    assert np.allclose(classifier.predict(people.x[3:6]), said.iloc[3:6], atol=1e-5)                 # films do not change each other
    assert np.allclose(classifier.predict(0.5 * people.x + 0.2), said, atol=1e-4)                    # nor do brightness and contrast
    classifier.save_pretrained(tmp_path)
    assert np.array_equal(Classifier.from_pretrained(tmp_path).predict(people.x[:3]), classifier.predict(people.x[:3]))
    assert classifier.predict(np.zeros((1, 1, 96, 128), np.float32)).shape == (1, 7)                 # another size is no problem, nor is a flat film
    with pytest.raises(ValueError, match="divides"):
        classifier.embed(torch.zeros(1, 1, 63, 64))


def test_unknown_labels_do_not_count(classifier, people):
    batch = {name: tensor[:8].clone() for name, tensor in table_of(people).items()}
    loss = lambda labels: (torch.manual_seed(0), float(classifier.loss(batch | {"labels": labels}).detach()))[1]
    partly = batch["labels"].clone()
    partly[:, 1:] = torch.nan
    other = batch["labels"].clone()
    other[:, 1:] = 1 - other[:, 1:]
    assert loss(partly) != loss(batch["labels"]) and np.isfinite(loss(partly))
    other[:, 1:] = torch.nan
    assert loss(other) == loss(partly) and loss(torch.full_like(partly, torch.nan)) == 0
    assert list(table_of(people, ["nodule", "covid"])["labels"].shape) == [len(people), 2]
    with pytest.raises(ValueError, match="hernia"):
        table_of(people, ["hernia"])


def test_variation_keeps_the_film(people):
    torch.manual_seed(0)
    x = people.x[:20]
    y = vary(x)
    likeness = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x.numpy(), y.numpy())]
    assert y.shape == x.shape and 0.6 < min(likeness) < max(likeness) < 1


def test_classifier_learns():
    people, other = (simulate_films(n, seed=seed, findings=[("normal", "effusion", "cardiomegaly")[k % 3] for k in range(n)]) for n, seed in ((240, 1), (90, 2)))
    names = ("effusion", "cardiomegaly")
    torch.manual_seed(0)
    net = Classifier(**SMALL | {"findings": names})
    for _ in fit(net, loader(table_of(people, names), 24), FitConfig(steps=60, batch_size=24, lr=1e-2, warmup=3, ema=0.9, precision="fp32"), device="cpu"):
        pass
    assert finding_auroc(other.labels, net.predict(other.x)).min() > 0.9


def test_auroc_of_findings():
    labels = pd.DataFrame({"a": [1.0, 0, np.nan, 0], "b": [0.0, 0, 0, 0]})
    said = pd.DataFrame({"a": [0.9, 0.1, 1.0, 0.2], "b": [0.1] * 4})
    found = finding_auroc(labels, said)
    assert found["a"] == 1 and np.isnan(found["b"])
    with pytest.raises(ValueError, match="same films"):
        finding_auroc(labels[["a"]], said)


def test_flip_rate_by_hand():
    before, after = np.array([0.9, 0.8, 0.5, 0.4, 0.9]), np.array([0.1, 0.7, 0.49, 0.1, 0.5])
    found = flip_rate(before, after)
    assert found.value == 0.5 and found.n == 5                              # the fourth was never called; 0.5 is still called
    assert flip_rate(before, after, np.array([True, False, True, True, False])).value == 1
    assert np.isnan(flip_rate(after * 0, after).value)
    assert np.array_equal(abnormal_probability(pd.DataFrame([[0.2, 0.7], [0.1, 0.0]])), [0.7, 0.1]) and CALLED == 0.5
    with pytest.raises(ValueError, match="same films"):
        flip_rate(before, after[:3])


def test_distances(people, classifier):
    rng = np.random.default_rng(0)
    real, made = rng.standard_normal((200, 5)), rng.standard_normal((80, 5))
    same, moved = distance_to_real(real, made), distance_to_real(real, made + 2)
    assert 0.6 < same.ratio < 1.7 and same.n == 80 and moved.distance == pytest.approx(20, rel=0.2) and moved.floor == same.floor
    with pytest.raises(ValueError, match="at least 4 and 2"):
        distance_to_real(real[:3], made)
    x = people.x.numpy()
    for net in (classifier, FixedNet(0)):
        assert fid_star(x, gaussian_filter(x, (0, 0, 2, 2)), net).ratio > 2 * fid_star(x, x[::-1][:40].copy(), net).ratio
    table = fid_by_class(x, x[:30], np.array(["a"] * 20 + ["b"] * 9 + ["c"]), FixedNet(0))
    assert list(table.index) == ["a", "b"] and table["n"].tolist() == [20, 9]
    assert np.array_equal(embeddings(FixedNet(1), x[:2]), embeddings(FixedNet(1), x[:2])) and not np.array_equal(embeddings(FixedNet(1), x[:2]), embeddings(FixedNet(2), x[:2]))


def test_the_true_map_is_perfect(ill, effect):
    assert np.min(pixel_auroc(abs(effect), ill.lesions)) > 0.99 and np.min(best_dice(abs(effect), ill.lesions)) > 0.9
    assert np.min(pointing(abs(effect), ill.lesions)) == 1 and np.allclose(ncc(effect, effect), 1) and np.allclose(ncc(effect, effect, signed=True), 1)
    assert np.allclose(ncc(-effect, effect), 1) and np.allclose(ncc(-2 * effect, effect, signed=True), -1)


def test_maps_against_another_library(ill):
    rng = np.random.default_rng(0)
    maps, lesions = rng.standard_normal((4, 64, 64)).round(1), ill.lesions[:4]           # rounded: with ties
    assert np.allclose(pixel_auroc(maps, lesions), [roc_auc_score(truth.ravel(), m.ravel()) for truth, m in zip(lesions, maps)])
    slow = [max(f1_score(truth.ravel(), (m >= level).ravel()) for level in np.unique(m)) for truth, m in zip(lesions, maps)]
    assert np.allclose(best_dice(maps, lesions), slow)
    assert np.allclose(dice_at(maps, lesions, 0.3), [f1_score(truth.ravel(), (m >= 0.3).ravel()) for truth, m in zip(lesions, maps)])


def test_maps_that_know_nothing(ill, effect):
    rng, share = np.random.default_rng(0), ill.lesions.mean((1, 2))
    flat, noise = np.zeros_like(effect), rng.standard_normal(effect.shape)
    assert (pixel_auroc(flat, ill.lesions) == 0.5).all() and np.allclose(pixel_auprc(flat, ill.lesions), share) and np.allclose(best_dice(flat, ill.lesions), 2 * share / (share + 1))
    assert (ncc(flat, effect) == 0).all() and np.allclose(pointing(flat, ill.lesions, 0), share)
    assert abs(pixel_auroc(noise, ill.lesions).mean() - 0.5) < 0.02 and abs(ncc(noise, effect, signed=True).mean()) < 0.01


def test_films_without_a_lesion_are_nan(people, ill, effect):
    nothing = np.zeros_like(ill.lesions[:2])
    for values in (pixel_auroc(effect[:2], nothing), pixel_auprc(effect[:2], nothing), best_dice(effect[:2], nothing), dice_at(effect[:2], nothing, 0.1), pointing(effect[:2], nothing), ncc(effect[:2], 0 * effect[:2])):
        assert np.isnan(values).all()
    with pytest.raises(ValueError, match="cannot be chosen"):
        choose_threshold(effect[:2], nothing)
    with pytest.raises(ValueError, match="same films"):
        pixel_auroc(effect[:2], ill.lesions[:3])
    with pytest.raises(ValueError, match="NaN"):
        pixel_auroc(effect[:2] * np.nan, ill.lesions[:2])


def test_threshold_is_found():
    lesions = np.zeros((3, 16, 16), bool)
    lesions[:, 4:8, 4:8] = True
    maps = lesions * 0.6 + np.random.default_rng(0).uniform(0, 0.3, lesions.shape)
    level = choose_threshold(maps, lesions)
    assert 0.25 < level < 0.65 and dice_at(maps, lesions, level).min() > 0.9


def test_localisation(people, effect):
    maps = people.films - people.healthy
    found = localisation(maps[:, None], people, threshold=0.1, replicates=20)
    assert found.left_out == int(people.normal.sum()) == len(people) - len(found.each)
    assert set(found.macro) == {"pixel_auroc", "pixel_auprc", "dice", "dice_fixed", "pointing", "ncc", "ncc_signed"} and found.macro["ncc"].value == pytest.approx(1)
    assert found.table["n"].sum() == len(found.each) and set(found.table.index) == set(people.main) - {"normal"}
    noise = np.random.default_rng(0).standard_normal(maps.shape)
    other = localisation(noise, people, replicates=20)
    assert other.macro["pixel_auroc"].value == pytest.approx(other.table["pixel_auroc"].mean()) and "dice_fixed" not in other.macro
    assert (people.main[found.each["row"]] == found.each["finding"]).all()
    with pytest.raises(ValueError, match="lung_overlap"):
        localisation(maps, dataclasses.replace(people, lesions=None))
    with pytest.raises(ValueError, match="at least two"):
        localisation(maps[people.normal], people.rows(people.normal))
    assert set(localisation(maps, dataclasses.replace(people, healthy=None), replicates=5).macro) == {"pixel_auroc", "pixel_auprc", "dice", "pointing"}


def test_macro_mean_weighs_classes_alike():
    found = macro_mean(np.array([1.0, 1, 1, 0, np.nan]), ["a", "a", "a", "b", "b"], replicates=50)
    assert found.value == 0.5 and found.n == 5
    assert np.isnan(macro_mean(np.array([np.nan, np.nan]), ["a", "b"], replicates=5).value)


def test_prior_never_looks(people, ill):
    maps = prior_maps(people, ill.main)
    assert maps.shape == ill.films.shape and 0 <= maps.min() and maps.max() <= 1
    same = np.flatnonzero(ill.main == ill.main[0])
    assert all(np.array_equal(maps[0], maps[k]) for k in same)
    with pytest.raises(ValueError, match="hernia"):
        prior_maps(people, ["hernia"])
    with pytest.raises(ValueError, match="these films"):
        prior_maps(dataclasses.replace(people, lesions=None), ["covid"])


def test_lung_overlap(ill):
    lungs = ill.lungs.copy()
    lungs[0] = False
    flat, exact = lung_overlap(np.ones(lungs.shape), lungs), lung_overlap(-1.0 * lungs, lungs)
    assert np.isnan(flat.share[0]) and np.isnan(flat.rank[0]) and np.allclose(flat.share[1:], flat.area[1:]) and np.allclose(flat.rank[1:], 0.5)
    assert np.allclose(exact.share[1:], 1) and np.allclose(exact.rank[1:], 1)
    assert np.allclose(lung_overlap(np.zeros(lungs.shape), lungs).share[1:], flat.area[1:])


def test_induction(ill):
    class Oracle:                                                   # names what was put in, surely
        config = type("Config", (), {"findings": tuple(FINDINGS)})
        def predict(self, x): return pd.DataFrame([[0.9 * (code == c) for code in FINDINGS] for c in ill.main], columns=list(FINDINGS))
    before, after, box = ill.healthy[:, None], ill.films[:, None], box_around(ill.lesions)
    found = induction(before, after, box, Oracle(), ill.main, replicates=10)
    assert found.induction_class.value == 1 and found.induction_inside.value > 0.95
    assert induction(before, after, box, Oracle(), "nodule", replicates=10).named.sum() == (ill.main == "nodule").sum()
    assert (induction(before, before, box, Oracle(), ill.main, replicates=10).inside == 0).all()
    half = np.zeros((len(ill), 1, 64, 64), np.float32)
    quarter = np.zeros((len(ill), 64, 64), bool)
    quarter[:, :32, :32] = True
    assert induction(half, half + 1, quarter, Oracle(), "covid", replicates=5).induction_inside.value == pytest.approx(0.25)
    for change, match in ((dict(box=box & False), "none of them empty"), (dict(wanted="hernia"), "hernia"), (dict(after=after[:3]), "same people")):
        with pytest.raises(ValueError, match=match):
            induction(**dict(before=before, after=after, box=box, classifier=Oracle(), wanted=ill.main) | change)


def test_boxes():
    lesion = np.zeros((2, 12, 12), bool)
    lesion[0, 4, 5] = lesion[0, 7, 6] = True
    box = box_around(lesion, 0)
    assert box[0].sum() == 4 * 2 and box[0, 4:8, 5:7].all() and not box[1].any() and box_around(lesion, 2)[0].sum() == 8 * 6


def test_each_rule_fires_for_its_own_fault():
    sound = {"outside_ratio": 0.98, "flip_rate": 0.9, "normal_ratio": 0.4, "pixel_auroc": 0.9}
    assert not any(alarms(sound).values()) and set(RULES) == {"over-editing", "no-flip", "autoencoder", "blind"}
    for name, change in (("over-editing", {"outside_ratio": 0.7}), ("no-flip", {"flip_rate": 0.1}), ("autoencoder", {"normal_ratio": 1.0}), ("blind", {"pixel_auroc": 0.5})):
        assert [rule for rule, fires in alarms(sound | change).items() if fires] == [name]
    assert alarms(sound | {"flip_rate": float("nan")})["no-flip"] and alarms(sound | {"normal_ratio": float("nan")})["autoencoder"]
    with pytest.raises(ValueError, match="pixel_auroc"):
        alarms({name: value for name, value in sound.items() if name != "pixel_auroc"})


def test_strength(effect):
    assert np.allclose(map_strength(np.full((2, 8, 8), -0.5)), 0.5) and normal_ratio(effect, effect[:, None]) == 1
    assert normal_ratio(0 * effect, effect) == 0 and np.isnan(normal_ratio(effect, 0 * effect))
