"""pcg.metrics: contracts of the judges, oracles that are known from the simulator, and bad input."""

import numpy as np
import pandas as pd
import pytest
import torch

from medgen_nb.pcg.data import CONDITION, SITES, TRACKS, Scale, simulate_sounds, spectrogram
from medgen_nb.pcg.metrics import (
    CONTROLLED,
    JUDGED,
    SPACE_OF,
    TOKEN_S,
    FixedNet,
    Probe,
    beat_period,
    classes_of,
    component_error,
    condition_fidelity,
    dci,
    embeddings,
    fad_floor,
    fad_star,
    hear,
    information,
    mask_lag_test,
    mask_peak,
    mig,
    murmur_level_db,
    pds,
    plan_edits,
    plausibility,
    probe_table,
    rare_gain,
    rate_of,
    recalls,
    s1s2_level,
    scramble,
    site_vector,
    token_states,
    wishes,
)
from medgen_nb.training import FitConfig, fit
from medgen_nb.data import loader

SIZES = dict(widths=(8, 16, 16), width=16, dilations=(1, 2), features=16)


@pytest.fixture(scope="module")
def sounds():
    return simulate_sounds(160, seed=11)


@pytest.fixture(scope="module")
def magnitude(sounds):
    return spectrogram(sounds.waves)


@pytest.fixture(scope="module")
def scale(magnitude):
    return Scale.fit(magnitude)


@pytest.fixture(scope="module")
def table(sounds, scale):
    return probe_table(sounds, scale)


@pytest.fixture(scope="module")
def probe():
    torch.manual_seed(0)
    return Probe(**SIZES).eval()


class Oracle:
    "Hears what a list says, in the order of the calls: rows are recognised by x[:, 0, 0, 0]."

    def __init__(self, classes, states=None):
        self.classes = classes

    def __call__(self, x, site):
        rows = x[:, 0, 0, 0].long().numpy()
        said = {name: torch.nn.functional.one_hot(torch.tensor(self.classes[name].to_numpy()[rows].copy()), len(JUDGED[name])).float() for name in JUDGED}
        return said | {"states": torch.zeros(len(x), 4, 78)}


def numbered(rows):
    x = torch.zeros(len(rows), 1, 52, 312)
    x[:, 0, 0, 0] = torch.tensor(list(rows), dtype=torch.float32)
    return x


# ---------------------------------------------------------------- classes
def test_classes_by_hand(sounds):
    frame = sounds.attributes.head(5).copy()
    frame["rate"] = [74.9, 75.0, 109.9, 110.0, np.nan]
    frame["grade"] = [0.0, 2.0, 3.0, 4.0, np.nan]
    frame["timing"] = [None, "Continuous", "Early-systolic", "Mid-diastolic", None]
    frame["pitch"] = [None, "Low", "Medium", "High", None]
    frame["extra"] = ["", "S3", "snap", "rub", None]
    frame["snr"] = [6.9, 7.0, 13.9, 14.0, np.nan]
    frame["condition"] = ["normal", "AS", "rub", "MVP", None]
    classes = classes_of(frame)
    assert list(classes) == list(JUDGED) and (classes.dtypes == np.int64).all()
    assert classes["rate"].tolist() == [0, 1, 1, 2, -1] and classes["grade"].tolist() == [0, 1, 2, 3, -1]
    assert classes["timing"].tolist() == [0, JUDGED["timing"].index("Continuous"), 1, JUDGED["timing"].index("Mid-diastolic"), -1]
    assert classes["pitch"].tolist() == [0, 1, 2, 3, -1] and classes["extra"].tolist() == [0, 1, 4, 0, -1]
    assert classes["noise"].tolist() == [0, 1, 1, 2, -1] and classes["condition"].tolist() == [0, 2, 16, 6, -1]


def test_judged_names_are_complete():
    assert JUDGED["condition"] == tuple(CONDITION) and len(JUDGED["condition"]) == 17
    assert set(SPACE_OF.values()) == set(TRACKS) and set(SPACE_OF) == set(JUDGED) - {"condition"} == set(CONTROLLED)


def test_site_vector_and_token_states():
    assert site_vector([*SITES, None, "", "Phc"]).tolist() == [*np.eye(4).tolist(), *[[0.0] * 4] * 3]
    states = np.zeros((2, 250), dtype=np.uint8)
    states[0, :125], states[0, 125:] = 1, 4          # the change lies at 2.5 s, in token 39
    tokens = token_states(states)
    assert tokens.shape == (2, 78) and tokens.dtype == np.int64
    assert (tokens[0, :39] == 1).all() and (tokens[0, 40:] == 4).all() and (tokens[1] == 0).all()


# ---------------------------------------------------------------- probe
def test_probe_shapes_loss_and_file(probe, table, tmp_path):
    said = probe(table["x"][:5], table["site"][:5])
    assert set(said) == {*JUDGED, "states"} and said["states"].shape == (5, 4, 78)
    assert all(said[name].shape == (5, len(JUDGED[name])) for name in JUDGED) and probe.embed(table["x"][:5]).shape == (5, 16)
    loss = probe.loss(table)
    assert loss.ndim == 0 and torch.isfinite(loss)
    probe.save_pretrained(tmp_path)
    again = Probe.from_pretrained(tmp_path)
    assert torch.equal(again(table["x"][:5], table["site"][:5])["grade"], said["grade"])


def test_unknown_does_not_count(probe, table):
    batch = {name: tensor[:6] for name, tensor in table.items()}
    silent = batch | {name: torch.full_like(batch[name], -1) for name in JUDGED if name != "rate"} | {"states": torch.zeros_like(batch["states"])}
    said = probe(batch["x"], batch["site"])["rate"]
    assert torch.isclose(probe.loss(silent), torch.nn.functional.cross_entropy(said + probe.prior_rate, batch["rate"]))


def test_probe_learns_and_priors_count(table, sounds):
    torch.manual_seed(0)
    probe = Probe(**SIZES)
    probe.set_priors(classes_of(sounds.attributes))
    assert torch.isclose(probe.prior_condition.exp().sum(), torch.tensor(1.0)) and probe.prior_grade[0] > probe.prior_grade[3]
    before = float(probe.loss(table).detach())
    for _ in fit(probe, loader(table, 32), FitConfig(steps=60, batch_size=32, lr=5e-3, warmup=5, ema=0.9, precision="fp32"), device="cpu"):
        pass
    assert float(probe.loss(table).detach()) < 0.85 * before


def test_probe_refuses_other_shapes(probe):
    with pytest.raises(ValueError, match="312"):
        probe.embed(torch.zeros(2, 1, 52, 313))


# ---------------------------------------------------------------- distances
def test_fad_is_zero_for_itself_and_grows(probe, table):
    x = table["x"]
    for net in (probe, FixedNet(0)):
        assert fad_star(x, x, net) < 1e-3 * fad_floor(x, net) + 1e-6
        assert fad_star(x, torch.randn_like(x), net) > 3 * fad_floor(x, net) > 0
    assert np.array_equal(embeddings(FixedNet(3), x[:8]), embeddings(FixedNet(3), x[:8])) and not np.array_equal(embeddings(FixedNet(4), x[:8]), embeddings(FixedNet(3), x[:8]))


def test_nan_is_found(probe, table):
    x = table["x"].clone()
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fad_star(table["x"], x, probe)


# ---------------------------------------------------------------- fidelity
def test_recalls_by_hand():
    found = recalls(np.array([0, 0, 1, -1]), np.array([0, 1, 1, 2]), 3)
    np.testing.assert_allclose(found, [0.5, 1.0, np.nan])


def test_fidelity_of_an_oracle_and_of_a_liar(sounds):
    classes = classes_of(sounds.attributes)
    x, site = numbered(range(len(sounds))), site_vector(sounds.attributes["site"])
    perfect = condition_fidelity(Oracle(classes), x, site, sounds.attributes, replicates=20)
    assert perfect.cf.value == 1 and perfect.cf_condition.value == 1 and perfect.conditions["recordings"].sum() == len(sounds)
    constant = condition_fidelity(Oracle(classes * 0), x, site, sounds.attributes, replicates=20)
    assert constant.cf_condition.value == pytest.approx(1 / classes["condition"].nunique())
    assert constant.attributes["noise"].value == pytest.approx(1 / 3)
    assert constant.cf.value == pytest.approx(np.mean([constant.attributes[name].value for name in CONTROLLED]))
    with pytest.raises(ValueError, match="rows of attributes"):
        condition_fidelity(Oracle(classes), x[:-1], site, sounds.attributes)


# ---------------------------------------------------------------- edits, PDS
def test_edits_change_one_thing_and_render(sounds):
    before, after, edits = plan_edits(sounds.attributes, 6, seed=1)
    assert len(before) == len(after) == len(edits) == 36 and edits["attribute"].value_counts().eq(6).all()
    old, new = classes_of(before), classes_of(after)
    for k, (name, wanted) in enumerate(zip(edits["attribute"], edits["wanted"])):
        assert new.loc[k, name] == wanted != old.loc[k, name]
        others = [other for other in CONTROLLED if SPACE_OF[other] != SPACE_OF[name]]
        assert (new.loc[k, others] == old.loc[k, others]).all()
    twins = simulate_sounds(36, seed=5, given=wishes(after))
    assert (classes_of(twins.attributes)["timing"] == new["timing"]).all() and (classes_of(twins.attributes)["noise"] == new["noise"]).all()


def test_pds_by_hand():
    names = list(JUDGED)
    classes = pd.DataFrame(0, index=range(8), columns=names)
    classes.loc[4:, "rate"] = [2, 2, 0, 0]                # rows 4...7 come after rows 0...3; wanted: 2
    classes.loc[[4, 6], "noise"] = 1                      # two of four leak into one of the five others
    edits = pd.DataFrame({"attribute": ["rate"] * 4, "wanted": 2})
    result = pds(Oracle(classes), numbered(range(4)), numbered(range(4, 8)), torch.zeros(4, 4), edits, replicates=20)
    assert result.pds.value == pytest.approx(0.5 * (1 - 0.5 / 5))
    assert result.table.loc["rate", ["hit", "leak"]].tolist() == pytest.approx([0.5, 0.1])
    murmur = pd.DataFrame({"attribute": ["grade"] * 4, "wanted": 0})
    classes.loc[4:, ["timing", "pitch"]] = 1              # the murmur's other attributes may change
    classes.loc[4:, ["rate", "noise"]] = 0
    assert pds(Oracle(classes), numbered(range(4)), numbered(range(4, 8)), torch.zeros(4, 4), murmur, replicates=20).pds.value == 1
    with pytest.raises(ValueError, match="attributes"):
        pds(Oracle(classes), numbered(range(4)), numbered(range(4, 8)), torch.zeros(4, 4), murmur.assign(attribute="shape"))


def test_scramble_parts_company_and_renders(sounds):
    frame = scramble(sounds.attributes, seed=2)
    assert frame["site"].equals(sounds.attributes["site"]) and not frame["rate"].equals(sounds.attributes["rate"])
    assert frame.equals(scramble(sounds.attributes, seed=2)) and frame["grade"].max() > 4
    heard = simulate_sounds(len(frame), seed=4, given=wishes(frame))
    assert (classes_of(heard.attributes)[["timing", "grade", "pitch", "extra", "noise"]] == classes_of(frame)[["timing", "grade", "pitch", "extra", "noise"]]).all(axis=None)


def test_one_lucky_peak_is_no_rhythm():
    found = []
    for k in range(20):
        mask = 0.3 * np.random.default_rng(k).normal(size=78)
        mask[14] += 2
        found.append(mask_lag_test(mask, 0.9, shuffles=199)[1])
    assert np.mean(np.array(found) < 0.05) <= 0.25 and np.median(found) > 0.05


# ---------------------------------------------------------------- latents
@pytest.fixture(scope="module")
def many():
    return classes_of(simulate_sounds(400, seconds=2.0, seed=3, tracks=False).attributes)


def onehots(classes, names, rng):
    return np.hstack([np.eye(len(JUDGED[name]))[classes[name]] for name in names]) + 0.1 * rng.normal(size=(len(classes), sum(len(JUDGED[n]) for n in names)))


def test_mig_and_dci_tell_apart(many):
    rng = np.random.default_rng(0)
    clean = {space: onehots(many, [name for name in CONTROLLED if SPACE_OF[name] == space], rng) for space in TRACKS}
    mixed = {space: sum(np.resize(z, (z.shape[0], 8)) for z in clean.values()) for space in TRACKS}
    swapped = dict(zip(TRACKS, [clean["S1/S2"], clean["rhythm"], clean["murmur"], clean["noise"]]))
    good, bad, wrong = mig(clean, many), mig(mixed, many), mig(swapped, many)
    assert good.mig > 0.5 and bad.mig < 0.1 and wrong.mig == pytest.approx(good.mig, abs=0.02) and wrong.right < good.right - 0.2
    assert dci(clean, many).disentanglement > 0.6 > 0.2 > dci(mixed, many).disentanglement, (dci(clean, many), dci(mixed, many))
    assert np.allclose(dci(clean, many).importance.sum(), 1)
    with pytest.raises(ValueError, match="rhythm"):
        mig({"rhythm": clean["rhythm"]}, many)


def test_information_of_nothing_and_all(many):
    y = many["noise"].to_numpy()
    assert information(np.random.default_rng(0).normal(size=(len(y), 4)), y) < 0.05 and information(np.eye(3)[y], y) > 0.8
    assert np.isnan(information(np.zeros((9, 2)), np.zeros(9, dtype=int)))


# ---------------------------------------------------------------- signal
def test_beat_period_is_the_truth(sounds, magnitude):
    calm = (sounds.truth["rhythm"] == "sinus") & (sounds.attributes["snr"] > 8)
    error = np.abs(rate_of(magnitude)[calm] / sounds.attributes["rate"][calm] - 1)
    assert np.nanmedian(error) < 0.03 and np.isfinite(error).mean() > 0.9
    assert np.isnan(beat_period(np.ones((1, 52, 313)))).all()


def test_levels_answer_to_their_band():
    t = np.arange(20_000) / 4000
    low, high = spectrogram(np.stack([0.2 * np.sin(2 * np.pi * hz * t) for hz in (55, 300)]).astype(np.float32)).reshape(2, 1, 52, 313)
    assert s1s2_level(low)[0] > s1s2_level(high)[0] + 30 and murmur_level_db(high)[0] > murmur_level_db(low)[0] + 30
    assert s1s2_level(2 * low)[0] - s1s2_level(low)[0] == pytest.approx(20 * np.log10(2))
    with pytest.raises(ValueError, match="Scale.back"):
        s1s2_level(-low)


def test_louder_murmur_is_louder():
    base = dict(condition="MR", timing="Holosystolic", shape="Plateau", pitch="High", quality="Blowing", snr=20.0, site="MV", age=30.0)
    level = [murmur_level_db(spectrogram(simulate_sounds(6, seed=2, given=base | {"grade": float(grade)}).waves)).mean() for grade in range(1, 7)]
    assert (np.diff(level) > 1).all()


def test_plausibility(sounds, magnitude):
    logits = np.eye(4)[np.clip(token_states(sounds.states) - 1, 0, 3)].transpose(0, 2, 1)
    age = sounds.attributes["age"].to_numpy()
    passed, failed = plausibility(magnitude, logits, age)
    assert passed.shape == (160,) and set(np.unique(passed)) <= {0, 1} and passed.mean() > 0.8 and list(failed) == ["rate", "pause", "level", "order", "systole"]
    rng = np.random.default_rng(0)
    assert plausibility(rng.permuted(magnitude, axis=2), rng.permuted(logits, axis=2), age)[0].mean() < 0.1
    assert plausibility(0 * magnitude[:3], None, age[:3])[1]["level"].all()
    assert plausibility(100 * magnitude[:3], None, age[:3])[1]["level"].all()


def test_component_error(sounds):
    tracks = sounds.truth["tracks"][:24]
    power = spectrogram(tracks.reshape(-1, tracks.shape[2])).reshape(24, 4, 52, 313).astype(np.float64) ** 2
    assert np.allclose(np.diag(component_error(power, tracks)), 1)
    swapped = component_error(power[:, [0, 2, 1, 3]], tracks)
    assert swapped[1, 2] == pytest.approx(1) and swapped[1, 1] < 0.7
    assert np.allclose(component_error(np.zeros_like(power), tracks), 0)
    with pytest.raises(ValueError, match="parts"):
        component_error(power[0], tracks)


# ---------------------------------------------------------------- mask
def test_mask_peak_and_its_test():
    lag = np.arange(78) * TOKEN_S
    mask = np.cos(2 * np.pi * lag / 0.9) + 0.3 * np.random.default_rng(0).normal(size=78)
    assert mask_peak(np.cos(2 * np.pi * lag / 0.9)) == pytest.approx(0.9, abs=0.01)
    error, p = mask_lag_test(mask, 0.9)
    assert error < 0.1 and p < 0.01
    assert mask_lag_test(np.cos(2 * np.pi * lag / 0.65), 0.9)[1] > 0.2
    chance = [mask_lag_test(np.random.default_rng(k).normal(size=78), 0.9, shuffles=199)[1] for k in range(200)]
    assert 0.01 < np.mean(np.array(chance) < 0.05) < 0.11
    assert mask_lag_test(np.zeros(78), 0.9)[1] == 1
    with pytest.raises(ValueError, match="finite"):
        mask_peak(np.full(78, np.nan))
    with pytest.raises(ValueError, match="outside"):
        mask_lag_test(mask, 2.0)


# ---------------------------------------------------------------- rare classes
def test_rare_gain_needs_rare_recordings_and_pairs(table):
    y = table["condition"].numpy()
    config = FitConfig(steps=10, batch_size=16, lr=3e-3, warmup=2, ema=0.9, precision="fp32")
    more = table["x"][80:], y[80:]
    found, same = rare_gain(table["x"][:80], y[:80], {"more": more, "again": more}, *more, sorted(set(y[80:])), config=config, device="cpu").values()
    assert found.both.value == same.both.value, "equal additions give equal classifiers"
    assert found.gain.value == pytest.approx(found.both.value - found.real.value) and found.chance == pytest.approx(1 / 17)
    with pytest.raises(ValueError, match="rare"):
        rare_gain(table["x"], y, {"again": (table["x"], y)}, table["x"], y, [99])


def test_hear_is_the_probes_argmax(probe, table):
    classes, states = hear(probe, table["x"], table["site"])
    assert list(classes) == list(JUDGED) and states.shape == (160, 4, 78)
    with torch.no_grad():
        assert np.array_equal(classes["grade"][:9], probe(table["x"][:9], table["site"][:9])["grade"].argmax(1))
