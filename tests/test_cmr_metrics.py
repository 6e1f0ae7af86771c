"""cmr.metrics: contracts of the judges, answers that are known from the simulator, and bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import correlate1d, gaussian_filter

from medgen_nb.cmr.data import LABELS, PHENOTYPES, UNLABELLED, measure_masks, simulate_hearts
from medgen_nb.cmr.mar import patchify
from medgen_nb.cmr.metrics import (
    RULES,
    VISIBLE,
    FixedNet,
    MaskedFilm,
    Regressor,
    Ruler,
    Segmenter,
    alarms,
    as_films,
    dice,
    distance_to_real,
    diversity,
    edge_sharpness,
    embeddings,
    fid_star,
    flicker,
    flow_jitter,
    fvd_star,
    heart_box,
    jitter_ratio,
    phenotype_r2,
    pretraining_gain,
    psnr,
    rapid_motion_error,
    ratio_to,
    squares,
    ssim,
    structure_shift,
    table_of,
    tail_errors,
    unusual,
    vae_error,
    variety,
)
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, fit

QUICK = dict(warmup=3, ema=0.0, precision="fp32")


@pytest.fixture(scope="module")
def hearts():
    return simulate_hearts(40, seed=11)


@pytest.fixture(scope="module")
def x(hearts):
    return hearts.x.numpy()


@pytest.fixture(scope="module")
def table(hearts):
    return table_of(hearts)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return Segmenter(widths=(8, 16, 16), fine=4).eval()


@pytest.fixture(scope="module")
def regressor(hearts):
    torch.manual_seed(0)
    net = Regressor(widths=(8, 16, 16), features=12).eval()
    net.set_units(hearts.phenotypes)
    return net


@pytest.mark.parametrize("bad", [np.zeros((2, 20, 48, 48)), np.zeros((2, 3, 20, 48, 48)), np.full((1, 1, 4, 8, 8), np.nan)])
def test_films_are_checked(bad):
    with pytest.raises(ValueError, match="films"):
        as_films(bad)


def test_vae_error_is_error_over_variance(hearts, x):
    noisy = x + np.float32(0.1) * np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    assert vae_error(x, x) == 0
    assert vae_error(x, noisy) == pytest.approx(((noisy - x) ** 2).mean() / x.var(), rel=1e-4)
    assert vae_error(x, np.full_like(x, x.mean())) == pytest.approx(1, rel=1e-4)
    whole, heart = vae_error(x, noisy, hearts.masks)
    box = np.broadcast_to(heart_box(hearts.masks)[:, None, None], x.shape)
    assert whole == vae_error(x, noisy)
    assert heart == pytest.approx(((noisy - x)[box] ** 2).mean() / x[box].var(), rel=1e-4)
    error, spread = squares(x, noisy)
    assert error.shape == spread.shape == (len(x),) and error.sum() / spread.sum() == pytest.approx(whole)


def test_heart_box_is_two_pixels_wider_over_all_frames():
    masks = np.zeros((2, 3, 20, 20), np.uint8)
    masks[0, 0, 8, 9], masks[0, 2, 10, 5], masks[0, 1, 0, 0] = 1, 3, UNLABELLED
    rows, columns = np.nonzero(heart_box(masks)[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 12, 3, 11)
    assert not heart_box(masks)[1].any()


def test_vae_error_refuses_other_sizes(hearts, x):
    with pytest.raises(ValueError, match="same people"):
        vae_error(x, x[:-1])
    with pytest.raises(ValueError, match="same people"):
        vae_error(x[:4], x[:4], hearts.masks)


def slow_ssim(a, b):
    "Wang et al. 2004 for one frame in float64, window by window sums through scipy, borders mirrored as in torchmetrics."
    bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    smooth = lambda z: correlate1d(correlate1d(z, bell / bell.sum(), 0, mode="mirror"), bell / bell.sum(), 1, mode="mirror")
    ma, mb = smooth(a), smooth(b)
    va, vb, vab = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    return (((2 * ma * mb + 0.0004) * (2 * vab + 0.0036)) / ((ma**2 + mb**2 + 0.0004) * (va + vb + 0.0036))).mean()


def test_ssim_and_psnr(x):
    y = gaussian_filter(x[:3], (0, 0, 0, 1, 1))
    slow = [np.mean([slow_ssim(a.astype(float), b.astype(float)) for a, b in zip(one[0], other[0])]) for one, other in zip(x[:3], y)]
    assert np.allclose(ssim(x[:3], y), slow, atol=1e-4) and np.allclose(ssim(x[:2], x[:2]), 1)
    assert np.allclose(psnr(x[:3], x[:3] + np.float32(0.2)), 20, atol=1e-3)


def test_segmenter_learns_and_ignores_the_unlabelled(table, hearts, x, segmenter):
    batch = {name: tensor[:8] for name, tensor in table.items()}
    nothing = batch | {"masks": torch.full_like(batch["masks"], UNLABELLED)}
    assert float(segmenter.loss(nothing).detach()) == 0
    torch.manual_seed(0)
    net = Segmenter(widths=(8, 16, 16), fine=4)
    before = dice(net.segment(x[:6]), hearts.masks[:6])["mean"]
    for _ in fit(net, loader(table, 8), FitConfig(steps=40, batch_size=8, lr=1e-2, **QUICK), device="cpu"):
        pass
    after = dice(net.segment(x[:6]), hearts.masks[:6])["mean"]
    assert after > max(0.35, before + 0.15)
    assert net.segment(x[:2]).dtype == np.uint8 and net.segment(x[:2]).shape == (2, 20, 48, 48)


def test_segmenter_takes_sizes_in_eights(segmenter):
    assert segmenter.segment(np.zeros((1, 1, 9, 96, 64), np.float32)).shape == (1, 9, 96, 64)
    with pytest.raises(ValueError, match="multiples of 8"):
        segmenter.segment(np.zeros((1, 1, 9, 50, 48), np.float32))


def test_judges_survive_saving(tmp_path, regressor, segmenter, x):
    for net, kind in ((regressor, Regressor), (segmenter, Segmenter)):
        net.save_pretrained(tmp_path / kind.__name__)
        again = kind.from_pretrained(tmp_path / kind.__name__).eval()
        assert np.array_equal(embeddings(net, x[:3]), embeddings(again, x[:3]))
    assert np.allclose(Regressor.from_pretrained(tmp_path / "Regressor").eval().predict(x[:2]), regressor.predict(x[:2]))


def test_regressor_speaks_in_units(regressor, hearts, x):
    with torch.no_grad():
        regressor_zero = Regressor(widths=(8, 16, 16), features=12).eval()
        regressor_zero.set_units(hearts.phenotypes)
        regressor_zero.out.weight.zero_(), regressor_zero.out.bias.zero_()
    said = regressor_zero.predict(x[:2])
    assert list(said) == list(PHENOTYPES) and np.allclose(said.iloc[0], hearts.phenotypes.mean(), rtol=1e-4)
    assert regressor.predict(np.zeros((1, 1, 50, 96, 96), np.float32)).shape == (1, 82)   # another size is no problem


def test_regressor_ignores_unknown_phenotypes(regressor, table):
    batch = {name: tensor[:8].clone() for name, tensor in table.items()}
    batch["phenotypes"][:, 5:] = torch.nan
    torch.manual_seed(3)
    first = float(regressor.loss(batch).detach())
    batch["phenotypes"][0, :] = torch.nan
    assert np.isfinite(first) and np.isfinite(float(regressor.loss(batch).detach()))
    batch["phenotypes"][:] = torch.nan
    assert float(regressor.loss(batch).detach()) == 0


def test_regressor_learns(table):
    torch.manual_seed(0)
    net = Regressor(widths=(16, 16, 24), features=24)
    net.mean.copy_(table["phenotypes"].mean(0)), net.std.copy_(table["phenotypes"].std(0))
    history = [state.history[-1]["loss"] for state in fit(net, loader(table, 16), FitConfig(steps=30, batch_size=16, lr=6e-3, **QUICK), device="cpu") if state.history]
    assert history[-1] < 0.85 * history[0]


def test_dice_counts_by_hand():
    one, other = np.zeros((2, 1, 2, 2), np.uint8), np.zeros((2, 1, 2, 2), np.uint8)
    one[0, 0], other[0, 0] = [[1, 1], [3, 0]], [[1, 0], [3, UNLABELLED]]
    found = dice(one, other)
    assert found["RV"] == pytest.approx(2 / 3) and found["LV"] == 1 and np.isnan(found["myocardium"])   # the second person has no label at all: does not count
    with pytest.raises(ValueError, match="equal shape"):
        dice(one, other[:1])


def test_ruler_finds_a_line_and_leaves_out_what_nobody_knows(hearts):
    measures = measure_masks(hearts.masks, hearts.spacing, hearts.frame_time)
    phenotypes = hearts.phenotypes.assign(LVEF=3 * measures["area_change"] + 7, LVM=np.nan)
    ruler = Ruler.fit(measures, phenotypes)
    assert np.allclose(ruler.read(measures)["LVEF"], phenotypes["LVEF"]) and "LVM" not in ruler.lines.index
    with pytest.raises(ValueError, match="none of"):
        Ruler.fit(measures, phenotypes * np.nan)


def test_true_masks_and_a_ruler_obey_and_the_deaf_do_not(hearts):
    other = simulate_hearts(40, seed=12)
    read = lambda set_: measure_masks(set_.masks, set_.spacing, set_.frame_time)
    said = Ruler.fit(read(other), other.phenotypes).read(read(hearts))
    names = [f"WT_{k}" for k in range(7, 13)]
    good = phenotype_r2(hearts.phenotypes, said, names, also=("LVEF", "LVEDV", "LVM"))
    deaf = phenotype_r2(hearts.phenotypes, said.sample(frac=1, random_state=0).reset_index(drop=True), names)
    assert good.r2_median.value > 0.85 and good.each["LVEF"].value > 0.85 and deaf.r2_median.value < 0.2
    assert good.r2_median.lo < good.r2_median.value < good.r2_median.hi


def test_phenotype_r2_by_hand():
    wanted, measured = pd.DataFrame({"LVEF": [40.0, 50, 60, np.nan]}), pd.DataFrame({"LVEF": [40.0, 55, np.nan, 3]})
    found = phenotype_r2(wanted, measured, ["LVEF"], also=())
    assert found.each["LVEF"].value == pytest.approx(1 - (25 + 100) / 200)   # what was not found counts as the mean of the wishes, 50
    with pytest.raises(ValueError, match="same people"):
        phenotype_r2(wanted, measured[:2], ["LVEF"], also=())
    with pytest.raises(ValueError, match="LVM"):
        phenotype_r2(wanted, measured, ["LVEF"], also=("LVM",))


def test_visible_phenotypes():
    assert len(VISIBLE) == 18 and "WT_7" in VISIBLE and "LVEF" not in VISIBLE


def test_distances(x, regressor, segmenter):
    assert fvd_star(x, x, regressor) == pytest.approx(0, abs=1e-3) and fid_star(x, x, segmenter) == pytest.approx(0, abs=1e-3)
    assert fvd_star(x[:20], np.repeat(x[20:, :, :1], 20, 2), FixedNet(0)) > 0
    assert np.array_equal(embeddings(FixedNet(1), x[:2]), embeddings(FixedNet(1), x[:2])) and not np.array_equal(embeddings(FixedNet(1), x[:2]), embeddings(FixedNet(2), x[:2]))


def test_distance_to_real_is_about_one_for_the_same_population():
    rng = np.random.default_rng(0)
    real, made = rng.standard_normal((200, 5)), rng.standard_normal((100, 5))
    same, moved = distance_to_real(real, made), distance_to_real(real, made + 2)
    assert 0.6 < same.ratio < 1.7 and moved.distance == pytest.approx(20, rel=0.2) and moved.floor == same.floor
    frames = np.repeat(real[:, None], 4, 1)                      # four equal frames of each film: halves must be of people
    assert distance_to_real(frames, made[:, None].repeat(4, 1)).floor == pytest.approx(same.floor, rel=0.1)
    with pytest.raises(ValueError, match="make 100 or more"):
        distance_to_real(real, made[:50])


def test_jitter_sees_order_and_not_the_frozen(hearts):
    masks, rng = hearts.masks, np.random.default_rng(0)
    shuffled = np.stack([m[rng.permutation(20)] for m in masks])
    assert jitter_ratio(masks, masks).value == 1 and jitter_ratio(shuffled, masks).value > 3
    assert jitter_ratio(np.repeat(masks[:, :1], 20, 1), masks).value == 0
    assert np.isnan(jitter_ratio(np.zeros_like(masks), masks).value)


def test_flicker_sees_lamps_but_not_noise(hearts, x):
    rng = np.random.default_rng(0)
    lamp = x + np.float32(0.06) * rng.standard_normal((len(x), 1, 20, 1, 1)).astype(np.float32)
    noise = x + np.float32(0.02) * rng.standard_normal(x.shape).astype(np.float32)
    real = flicker(x, hearts.masks)
    assert np.nanmedian(flicker(lamp, hearts.masks)) > 4 * np.nanmedian(real) and np.nanmedian(flicker(noise, hearts.masks)) < 1.3 * np.nanmedian(real)
    assert np.isnan(flicker(x[:1], np.full((1, 20, 48, 48), LABELS["LV"]))).all()


def test_edges_lose_their_slope(hearts, x):
    real = edge_sharpness(x, hearts.masks)
    ratios = [ratio_to(edge_sharpness(gaussian_filter(x, (0, 0, 0, w, w)), hearts.masks), real).value for w in (0.5, 1.0, 2.0)]
    assert 1 > ratios[0] > ratios[1] > ratios[2] and np.isnan(edge_sharpness(x[:1], np.zeros_like(hearts.masks[:1]))).all()
    step = np.zeros((1, 1, 1, 8, 8), np.float32)
    step[..., 4:] = 1
    masks = np.full((1, 1, 8, 8), LABELS["myocardium"])
    masks[..., 4:6] = LABELS["LV"]
    masks[..., 6:] = 0
    assert edge_sharpness(step, masks) == pytest.approx(0.5)     # a step of 1 seen by central differences


def test_diversity():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 6))
    assert diversity(np.repeat(real[:20, None], 3, 1), real).value == 0
    assert diversity(rng.standard_normal((40, 3, 6)), real).value == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="two films"):
        diversity(real[:, None], real)


def test_tails_and_the_unusual():
    rng = np.random.default_rng(0)
    population, wanted = (pd.DataFrame(rng.standard_normal((n, 3)), columns=list("abc")) for n in (2000, 400))
    measured = wanted.clip(-1.5, 1.5)                            # a judge, or a generator, that never goes far out
    found = tail_errors(wanted, measured, population, list("abc"))
    assert found.tail_error.value > 0.5 > 0.1 > found.middle_error.value and 0.01 < found.cells / 1200 < 0.08
    assert np.isnan(tail_errors(wanted * 0, measured, population, list("abc")).tail_error.value)
    assert abs(unusual(population, wanted).mean() - 0.5) < 0.05 and unusual(population, wanted + 6).mean() > 0.98


def test_structure_and_fast_motion(hearts):
    measures = measure_masks(hearts.masks, hearts.spacing, hearts.frame_time)
    thicker = measures.assign(**{f"thickness_{k}": measures[f"thickness_{k}"] + 3 for k in range(7, 13)})
    same = structure_shift(measures, measures)
    assert all(value == (1 if name.startswith("spread") else 0) for name, value in same.items()) and len(same) == 7
    closer = measures.assign(area_LV_ED=measures["area_LV_ED"].mean() + 0.5 * (measures["area_LV_ED"] - measures["area_LV_ED"].mean()))
    assert structure_shift(closer, measures)["spread_volume"] == pytest.approx(0.5)
    found = structure_shift(thicker, measures)
    assert found["shift_wall"] == found["structure_shift"] > 0.5 and found["shift_area"] == 0
    masks = hearts.masks
    assert rapid_motion_error(masks, masks).max() == 0
    assert np.median(rapid_motion_error(np.roll(masks, 1, 1), masks)) < np.median(rapid_motion_error(np.repeat(masks[:, :1], 20, 1), masks))


def test_each_rule_fires_for_its_own_fault(hearts):
    sound = {"obeyed": 0.9, "jitter_ratio": 1.1, "flicker": 0.5, "edge_sharpness": 0.9, "variety": 0.9}
    assert not any(alarms(sound).values())
    for name, change in (("condition", {"obeyed": 0.1}), ("flicker", {"jitter_ratio": 2.0}), ("flicker", {"flicker": 2.0}), ("blur", {"edge_sharpness": 0.4}), ("collapse", {"variety": 0.2})):
        assert [rule for rule, fires in alarms(sound | change).items() if fires] == [name]
    assert alarms(sound | {"edge_sharpness": float("nan")})["blur"]
    with pytest.raises(ValueError, match="variety"):
        alarms({name: value for name, value in sound.items() if name != "variety"})
    assert set(RULES) == {"condition", "flicker", "blur", "collapse"}
    assert variety(hearts.phenotypes, hearts.phenotypes) == 1 and variety(0.3 * hearts.phenotypes, hearts.phenotypes) == pytest.approx(0.3)


SMALL = dict(film=(20, 48, 48), patch=(10, 16, 16), width=16, depth=1, heads=2)


def test_optical_flow_tells_a_stutter(x, hearts):
    films, masks, order = x[:4], hearts.masks[:4], np.clip(np.arange(20) + np.tile([0, 2, -1, 1], 5), 0, 19)
    steady, stutter = flow_jitter(films, masks), flow_jitter(films[:, :, order], masks[:, order])
    assert (stutter > 1.5 * steady).all() and (steady < 1.3).all()
    np.testing.assert_allclose(flow_jitter(np.roll(films, 7, 2), np.roll(masks, 7, 1)), steady, rtol=1e-4)                      # a beat is a circle
    assert np.isnan(flow_jitter(np.repeat(films[:, :, :1], 20, 2), masks)).all() and np.isnan(flow_jitter(films, np.zeros_like(masks))).all()


def test_patches_hold_every_pixel_once(x):
    cut = patchify(torch.from_numpy(x[:2]), (4, 8, 8))
    assert cut.shape == (2, 180, 256) and torch.equal(cut.sort().values.flatten().sort().values, torch.from_numpy(x[:2]).flatten().sort().values)
    assert torch.equal(cut[1, 7].reshape(4, 8, 8), torch.from_numpy(x[1, 0, :4, 8:16, 8:16]))   # 6 patches across: the eighth is second down, second across


def test_masked_film_is_judged_on_what_it_did_not_see(x):
    torch.manual_seed(0)
    net, films = MaskedFilm(**SMALL).eval(), torch.from_numpy(x[:3])
    visible = torch.tensor([[0, 3, 5, 9]] * 3)
    changed = films.clone()
    changed[:, :, 10:, :16, 16:32] += 1                                    # patch 10 is hidden: nobody may notice
    with torch.no_grad():
        assert net.encode(films, visible).shape == (3, 4, 16) and net.encode(films).shape == (3, 18, 16)
        assert torch.equal(net.guess(films, visible), net.guess(changed, visible))
        assert not torch.equal(net.guess(films, torch.tensor([[10]] * 3)), net.guess(changed, torch.tensor([[10]] * 3)))
        net.leave.weight.zero_(), net.leave.bias.zero_()                   # a guess of 0 everywhere
        flat = torch.ones(4, 1, 20, 48, 48)
        assert float(net.loss({"x": flat})) == pytest.approx(1)
    with pytest.raises(ValueError, match="built for films"):
        net.encode(films[:, :, :8])
    with pytest.raises(ValueError, match="do not divide"):
        MaskedFilm(**SMALL | {"patch": (3, 16, 16)})


def test_pretraining_gain(hearts, x):
    config = FitConfig(steps=2, batch_size=4, lr=1e-3, **QUICK)
    found = pretraining_gain(x[:8], x[8:16], hearts.rows(slice(16)), hearts.rows(slice(16, 40)), (0, 1), SMALL, config, config, replicates=3, device="cpu")
    assert [gain.films for gain in found.values()] == [0, 8, 16] and list(found) == [None, 0, 1]
    assert all(0 <= gain.downstream_auroc.value <= 1 and gain.downstream_r2.value < 1 and gain.downstream_r2.n == 24 for gain in found.values())
    with pytest.raises(ValueError, match="needs 16 made films"):
        pretraining_gain(x[:8], x[8:16], hearts, hearts, (0, 2), SMALL, config, config)
