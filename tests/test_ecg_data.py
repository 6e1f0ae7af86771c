"""ecg.data: what the simulator promises, readers on small generated folders and on real samples, and the preparation."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat

from medgen_nb.data import BadRecord
from medgen_nb.ecg.data import (
    COLUMN,
    DIAGNOSES,
    EQUIVALENT,
    LEADS,
    MECHANISMS,
    SCORED,
    TWINLESS,
    WIDE,
    Record,
    WideScaler,
    as_input,
    band_pass,
    build_waves,
    check_cinc,
    check_ludb,
    check_ptbxl,
    draw_beats,
    draw_people,
    ecg_paper,
    lead_matrix,
    ludb_codes,
    prepare,
    quality,
    r_peaks,
    read_cinc,
    read_ludb,
    read_ptbxl,
    render,
    simulate_ecgs,
    stratified_folds,
    to_leads,
    wide_features,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "ecg"
LUDB = REAL / "lobachevsky-university-electrocardiography-database-1.0.1"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real samples are not here ({REAL.name} beside the checkout)")


@pytest.fixture(scope="module")
def ecgs():
    return simulate_ecgs(700, seed=5)


def has(ecgs, short):
    return ecgs.labels[:, COLUMN[short]] == 1


# ---------------------------------------------------------------- simulator


def test_shapes_and_types(ecgs):
    assert ecgs.signals.shape == (700, 12, 2500) and ecgs.signals.dtype == np.float32 and np.isfinite(ecgs.signals).all()
    assert ecgs.labels.shape == (700, len(DIAGNOSES)) and ecgs.labels.dtype == np.uint8
    assert len(set(ecgs.ids)) == 700 and set(np.unique(ecgs.sex)) == {0, 1} and ecgs.age.min() >= 18
    assert ecgs.truth["lead_share"].shape == (700, len(DIAGNOSES), 12) and ecgs.truth["potassium"].shape == (700,)
    assert 0.3 < np.abs(ecgs.signals).max(axis=(1, 2)).min() and np.abs(ecgs.signals).max() < 20


def test_einthoven_goldberger_wilson(ecgs):
    lead = dict(zip(LEADS, ecgs.signals.swapaxes(0, 1)))
    for law in (
        lead["I"] + lead["III"] - lead["II"],
        lead["aVR"] + (lead["I"] + lead["II"]) / 2,
        lead["aVL"] - (lead["I"] - lead["III"]) / 2,
        lead["aVF"] - (lead["II"] + lead["III"]) / 2,
    ):
        assert np.abs(law).max() < 1e-5
    assert np.linalg.matrix_rank(lead_matrix()) == 8 and np.abs(lead_matrix().sum(1)).max() < 1e-15


def test_every_label_occurs_and_exclusions_hold(ecgs):
    assert (ecgs.labels.sum(0) > 0).all()
    rhythms = ecgs.labels[:, [COLUMN[key] for key in ("NSR", "SB", "STach", "SA", "AF", "AFL", "Brady", "PR")]]
    assert (rhythms.sum(1) == 1).all()
    for a, b in (*EQUIVALENT, ("LBBB", "RBBB"), ("LAD", "RAD"), ("AF", "IAVB"), ("LQRSV", "LVH"), ("TAb", "TInv")):
        assert not (has(ecgs, a) & has(ecgs, b)).any(), (a, b)
    assert has(ecgs, "LAD")[has(ecgs, "LAnFB")].all() and (ecgs.labels.sum(1) > 2).any()


def test_same_seed_same_records():
    one, again, other = simulate_ecgs(7, seed=1), simulate_ecgs(7, seed=1), simulate_ecgs(7, seed=2)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(one.truth["fiducials"], again.truth["fiducials"])
    rounded = replace(one, signals=np.nextafter(one.signals, np.float32(9)))
    assert rounded.fingerprint != one.fingerprint and rounded.identity == one.identity == again.identity != other.identity
    elsewhere = simulate_ecgs(7, seed=1, population=1)
    assert elsewhere.fingerprint != one.fingerprint and not set(elsewhere.ids) & set(one.ids)


def test_lead_share(ecgs):
    share = ecgs.truth["lead_share"]
    known = np.isfinite(share).all(2)
    assert np.isfinite(share).any(2)[~known].sum() == 0 and np.allclose(share[known].sum(1), 1, atol=1e-4) and share[known].min() >= 0
    assert not known[ecgs.labels == 0].any() and not known[:, [COLUMN[key] for key in TWINLESS]].any()
    mean = {short: np.nanmean(share[:, COLUMN[short]], 0) for short in ("RBBB", "STEant", "STEinf", "STElat")}
    top = {short: LEADS[values.argmax()] for short, values in mean.items()}
    assert top["RBBB"] == "V1" and top["STEant"] in ("V2", "V3", "V4") and top["STEinf"] in ("III", "aVF") and top["STElat"] in ("V5", "V6")
    assert known[has(ecgs, "TInv"), COLUMN["TInv"]].mean() > 0.95


def test_twin_of_one_wall_is_seen_by_its_leads_only():
    "By hand, from the parts: an injured inferior wall lifts III and aVF and lowers aVL, and changes nothing before the QRS ends."
    rng = np.random.default_rng(3)
    on = {key: np.array([key == "NSR"]) for key in MECHANISMS}
    draw = draw_people(1, rng)
    time, kind, mean, _ = draw_beats(on, 10.0, rng)
    one, twin = (to_leads(render(*build_waves(on | {"STEinf": np.array([hurt])}, draw, mean), time, kind, 10.0, 250))[0] for hurt in (True, False))
    rise = dict(zip(LEADS, (one - twin).mean(1)))
    assert min(rise["III"], rise["aVF"], rise["II"]) > 0.02 and rise["aVL"] < 0
    start = int(250 * time[0][(time[0] > 1)][0])
    assert np.abs((one - twin)[:, start - 20 : start]).max() < 0.01


def test_rates_and_intervals(ecgs):
    rate = ecgs.truth["heart_rate"]
    assert rate[has(ecgs, "SB")].max() < 62 and rate[has(ecgs, "STach")].min() > 95
    place = ecgs.truth["fiducials"].astype(float)
    place[place < 0] = np.nan
    own = np.where(ecgs.truth["kinds"] == 0, 1.0, np.nan)
    pr, qrs = (1000 / ecgs.fs * (place[..., b] - place[..., a]) * own for a, b in ((0, 3), (3, 5)))   # ms, every beat
    usual = has(ecgs, "NSR") & ~has(ecgs, "IAVB") & ~has(ecgs, "LPR")
    assert np.nanmin(pr[has(ecgs, "IAVB") & ~has(ecgs, "STach")]) > 190 > np.nanmedian(pr[usual])
    assert np.nanmedian(qrs[has(ecgs, "LBBB")]) > 125 > 105 > np.nanmedian(qrs[usual])
    assert (place[has(ecgs, "AF")][..., :3][own[has(ecgs, "AF")] == 1] >= 0).sum() == 0, "no P wave in fibrillation"


def test_fiducials_are_ordered_and_near_the_peak(ecgs):
    place = ecgs.truth["fiducials"]
    for wave in (0, 3, 6):
        whole = (place[..., wave : wave + 3] >= 0).all(-1)
        onset, peak, offset = place[..., wave : wave + 3][whole].T
        assert (onset <= peak).all() and (peak <= offset).all() and offset.max() < 2500
    r = np.flatnonzero(has(ecgs, "NSR") & (ecgs.labels.sum(1) == 1))[0]
    found, true = r_peaks(prepare(ecgs.rows([r])).signals[0, 1].astype(float), 250), place[r, :, 4]
    assert max(np.abs(true - f).min() for f in found) <= 10


def test_potassium_is_graded(ecgs):
    potassium = ecgs.truth["potassium"]
    assert np.array_equal(potassium > 5.5, has(ecgs, "HyperK")) and potassium[has(ecgs, "HyperK")].std() > 0.4


def test_low_voltage_and_axis(ecgs):
    low = np.ptp(ecgs.signals[:, :6], axis=2).max(1)
    assert np.median(low[has(ecgs, "LQRSV")]) < 0.5 * np.median(low[~has(ecgs, "LQRSV")])
    place, net = ecgs.truth["fiducials"], []
    for r in range(len(ecgs)):
        k = (place[r, :, 3:6] >= 0).all(1).argmax()
        a, b = place[r, k, 3], place[r, k, 5]
        net.append(ecgs.signals[r][[0, 5], a:b].sum(1) - (b - a) * ecgs.signals[r][[0, 5], a])
    axis = np.rad2deg(np.arctan2(np.array(net)[:, 1] * 2 / 3**0.5, np.array(net)[:, 0]))
    assert np.mean(axis[has(ecgs, "LAD")] < -20) > 0.9 and np.mean(axis[has(ecgs, "RAD")] > 80) > 0.85


def test_rows_take_the_truth_along(ecgs):
    part = ecgs.rows([3, 1])
    assert part.ids == [ecgs.ids[3], ecgs.ids[1]] and np.array_equal(part.truth["potassium"], ecgs.truth["potassium"][[3, 1]])
    assert len(ecgs.rows(slice(0, 4))) == 4 and len(ecgs.rows(has(ecgs, "AF"))) == has(ecgs, "AF").sum()


def test_other_rates_and_lengths():
    other = simulate_ecgs(3, seconds=12, fs=500, seed=1)
    assert other.signals.shape == (3, 12, 6000) and other.fs == 500


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 2, "seconds": 2}, {"n": 2, "fs": 10}])
def test_simulator_refuses(wrong):
    with pytest.raises(ValueError, match="give n"):
        simulate_ecgs(**wrong)


@pytest.mark.skipif(not (REAL / "evaluation-2020").is_dir(), reason="the official weights are not here")
def test_order_of_scored_classes_is_the_official_one():
    official = (REAL / "evaluation-2020" / "weights.csv").read_text().splitlines()[0].split(",")[1:]
    assert [diagnosis.code for diagnosis in SCORED] == official
    mapping = pd.read_csv(REAL / "evaluation-2020" / "dx_mapping_scored.csv", dtype=str).set_index("SNOMED CT Code").Abbreviation
    assert all(mapping[diagnosis.code] == diagnosis.short for diagnosis in SCORED) and set(MECHANISMS) <= set(COLUMN)


# ---------------------------------------------------------------- readers on generated files


def signal_of(seed=0, samples=1000):
    return np.cumsum(np.random.default_rng(seed).normal(0, 0.02, (12, samples)), axis=1).round(3)


def write_cinc(folder, name="A1", signal=None, dx="164889003", space=" ", gain="1000.0(0)/mV", leads=LEADS, age="63", sex="Female"):
    folder.mkdir(parents=True, exist_ok=True)
    signal = signal_of() if signal is None else signal
    whole = np.round(signal * 1000).astype(np.int16)
    savemat(folder / f"{name}.mat", {"val": whole}, format="4")
    lines = [f"{name} {len(whole)} 500 {whole.shape[1]}"]
    lines += [f"{name}.mat 16+24 {gain} 16 0 {row[0]} {row.sum(dtype=np.int16)} 0 {lead}" for lead, row in zip(leads, whole)]
    lines += [f"#{space}{key}: {value}" for key, value in (("Age", age), ("Sex", sex), ("Dx", dx))]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("space", [" ", ""])
@pytest.mark.parametrize("gain", ["1000.0(0)/mV", "1000/mV", "1000/mv", "1000(0)/MV", "1(0)/uV"])
def test_cinc(tmp_path, space, gain):
    records, rejected = read_cinc(write_cinc(tmp_path / "g1", space=space, gain=gain, dx="164889003,999"))
    (record,) = records
    assert rejected == [] and check_cinc(tmp_path) == [] and record.codes == {"164889003", "999"}
    assert record.age == 63 and record.sex == "F" and record.fs == 500 and record.signal.dtype == np.float32 and record.flags == ()
    assert np.allclose(record.signal, signal_of(), atol=1e-6)


def test_leads_by_name(tmp_path):
    order = [5, 3, 0, 1, 2, 4, 11, 10, 9, 8, 7, 6]
    write_cinc(tmp_path, signal=signal_of()[order], leads=[LEADS[k].lower() for k in order], age="NaN", sex="Unknown")
    (record,), _ = read_cinc(tmp_path)
    assert np.allclose(record.signal, signal_of(), atol=1e-6) and np.isnan(record.age) and record.sex == ""


BREAK = {
    "truncated": (lambda d: (d / "B.mat").write_bytes((d / "B.mat").read_bytes()[:999]), "bytes"),
    "cut in its first bytes": (lambda d: (d / "B.mat").write_bytes(b"abc"), "bytes"),
    "absent": (lambda d: (d / "B.mat").unlink(), "does not exist"),
    "missing lead": (lambda d: edit(d, " aVL", " X"), "aVL"),
    "twice": (lambda d: edit(d, " V6", " V5"), "V6"),
    "length": (lambda d: edit(d, "B 12 500 1000", "B 12 500 1200"), "promises"),
    "first sample": (lambda d: edit(d, f"/mV 16 0 {round(1000 * signal_of()[0, 0])} ", "/mV 16 0 4242 "), "begin"),
    "unit": (lambda d: edit(d, "/mV", "/bananas"), "bananas"),
    "no header": (lambda d: (d / "B.hea").write_text("nothing\n"), "header"),
    "empty header": (lambda d: (d / "B.hea").write_text(""), "header"),
    "binary header": (lambda d: (d / "B.hea").write_bytes(bytes(range(256))), "header"),
    "promised, never written": (lambda d: ((d / "B.hea").unlink(), (d / "RECORDS").write_text("A\nB\n")), "does not exist"),
}


def edit(folder, old, new):
    file = folder / "B.hea"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("how", list(BREAK))
def test_broken_recording_is_listed_and_reading_goes_on(tmp_path, how):
    for name in "ABC":
        write_cinc(tmp_path, name)
    spoil, said = BREAK[how]
    spoil(tmp_path)
    records, rejected = read_cinc(tmp_path)
    assert [record.id for record in records] == ["A", "C"] and len(rejected) == 1
    assert said in str(rejected[0]) and rejected[0].remedy and isinstance(rejected[0], BadRecord)
    assert str(pickle.loads(pickle.dumps(rejected[0]))) == str(rejected[0]) == str(check_cinc(tmp_path)[0])


def test_three_broken_files_of_ten_thousand(tmp_path):
    write_cinc(tmp_path / "one", "NAME", signal=signal_of(samples=100))
    header, data = (tmp_path / "one" / "NAME.hea").read_text(), (tmp_path / "one" / "NAME.mat").read_bytes()
    shutil.rmtree(tmp_path / "one")
    for k in range(100):                       # folders of a hundred, as in the challenge
        (tmp_path / f"g{k}").mkdir()
        for name in (f"A{k:02}{j:02}" for j in range(100)):
            (tmp_path / f"g{k}" / f"{name}.hea").write_text(header.replace("NAME", name))
            (tmp_path / f"g{k}" / f"{name}.mat").write_bytes(data)
    (tmp_path / "g3" / "A0307.mat").unlink()
    (tmp_path / "g50" / "A5000.mat").write_bytes(b"abc")
    (tmp_path / "g99" / "A9999.hea").write_text("nothing\n")
    records, rejected = read_cinc(tmp_path)
    assert len(records) == 9_997 and sorted(Path(bad.file).stem for bad in rejected) == ["A0307", "A5000", "A9999"]


@pytest.mark.parametrize("read, check", [(read_cinc, check_cinc), (read_ludb, check_ludb), (read_ptbxl, check_ptbxl)])
def test_nothing_to_read(tmp_path, read, check):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadRecord):
            read(root)
        assert len(check(root)) == 1 and check(root)[0].remedy


def test_quality_flags(tmp_path):
    signal = signal_of()
    signal[2], signal[7] = 0.5, np.clip(signal[7], -0.01, 0.01)
    (record,), _ = read_cinc(write_cinc(tmp_path, signal=signal))
    assert record.flags == ("flat III", "saturated V2")
    signal[4, :3] = np.nan
    assert "nan aVL" in quality(signal, 500) and quality(signal_of(), 500) == ()


def write_ptbxl(root, **changes):
    for k in (1, 2):
        write_cinc(root / "records500" / "00000", f"{k:05d}_hr", signal=signal_of(k))
    table = pd.DataFrame({"ecg_id": [1, 2], "patient_id": [77.0, 77.0], "age": [56.0, np.nan], "sex": [1, 0],
                          "scp_codes": ["{'NORM': 100.0, 'SR': 0.0}", "{'AFIB': 0.0, 'LAFB': 50.0}"], "heart_axis": ["MID", "ALAD"],
                          "filename_hr": ["records500/00000/00001_hr", "records500/00000/00002_hr"]})
    for column, values in changes.items():
        table[column] = values
    table.to_csv(root / "ptbxl_database.csv", index=False)
    return root


def test_ptbxl(tmp_path):
    records, rejected = read_ptbxl(write_ptbxl(tmp_path))
    assert rejected == [] and [record.patient for record in records] == ["77", "77"] and [record.sex for record in records] == ["F", "M"]
    assert records[0].codes == {"426783006", "SCP:NORM"} and records[1].codes == {"164889003", "445118002", "39732003"}
    assert records[0].age == 56 and np.isnan(records[1].age) and check_ptbxl(tmp_path) == []


def test_ptbxl_bad_rows(tmp_path):
    write_ptbxl(tmp_path, scp_codes=["{'SR': 0.0}", "{broken"])
    records, rejected = read_ptbxl(tmp_path)
    assert len(records) == 1 and "scp_codes" in str(rejected[0])
    pd.DataFrame({"ecg_id": [1]}).to_csv(tmp_path / "ptbxl_database.csv", index=False)
    with pytest.raises(BadRecord, match="patient_id"):
        read_ptbxl(tmp_path)


@pytest.mark.parametrize("text, code", [
    ("Rhythm: Sinus rhythm.", "426783006"), ("I degree AV block. ", "270492004"), ("III degree AV-block.", "27885002"),
    ("Incomplete right bundle branch block.", "713426002"), ("Complete left bundle branch block.", "164909002"),
    ("STEMI: apical.", "164931005:anterior"), ("Undefined ischemia/scar/supp.NSTEMI: lateral wall.", "LUDB:undefined ischemia/scar/supp.nstemi: lateral wall"),
    ("UNIpolar ventricular pacing.", "10370003"), ("Rhythm: Irregular sinus rhythm.", "427393009"),
])
def test_ludb_sentences(text, code):
    assert ludb_codes([text]) == {code} and ludb_codes(["Electric axis of the heart: normal."]) == set()


# ---------------------------------------------------------------- real samples


@needs_real
def test_real_challenge():
    records, rejected = read_cinc(REAL / "challenge-2021")
    assert len(records) == 25 and rejected == [] and {record.fs for record in records} == {500}
    one = {record.id: record for record in records}["E07500"]
    assert one.codes == {"67741000119109", "426177001"} and one.age == 78 and one.sex == "M" and one.signal[0, 0] == np.float32(-0.068)
    limb = np.concatenate([record.signal[0] + record.signal[2] - record.signal[1] for record in records])
    assert np.quantile(np.abs(limb), 0.99) < 0.02, "Einthoven holds in real recordings, to a few hundredths of a millivolt"


@needs_real
def test_real_ludb(tmp_path):
    for stem in ("1", "8", "39", "100"):
        for file in (LUDB / "data").glob(f"{stem}.*"):
            shutil.copy(file, tmp_path)
    records, rejected = read_ludb(tmp_path)
    assert rejected == [] and len(records) >= 1
    one = {record.id: record for record in records}["39"]
    assert one.age == 74 and one.sex == "M" and {"426177001", "164873001", "428750005"} < one.codes and one.delineation.keys() == set(LEADS)
    onset, peak, offset = one.delineation["II"]["QRS"].T
    assert ((onset < peak) & (peak < offset)).all() and abs(one.signal[1]).max() < 5


@needs_real
def test_real_ptbxl_without_its_table():
    with pytest.raises(BadRecord, match="ptbxl_database.csv"):
        read_ptbxl(REAL / "ptb-xl_1record", rate=100)
    records, rejected = read_cinc(REAL / "ptb-xl_1record")     # the files alone can be read: leads are spelled AVR
    assert rejected == [] and records[0].signal.shape == (12, 1000) and records[0].fs == 100


# ---------------------------------------------------------------- preparation


def test_band_pass_has_no_delay_and_the_right_band():
    t = np.arange(5000) / 500
    for hz, low, high in ((0.3, 0.0, 0.3), (15, 0.95, 1.05), (60, -0.03, 0.03)):
        wave = np.sin(2 * np.pi * hz * t)
        kept = band_pass(wave, 500)[1000:4000]
        gain = np.dot(kept, wave[1000:4000]) / np.dot(wave[1000:4000], wave[1000:4000])
        assert low <= gain <= high
    pulse = np.zeros(1001)
    pulse[500] = 1
    assert band_pass(pulse, 500).argmax() == 500


def test_prepare_records():
    records = [Record(signal_of(k, samples).astype(np.float32), fs, frozenset({"164889003", "999"}), 50.0, "F", str(k))
               for k, (samples, fs) in enumerate([(5000, 500), (1000, 100), (2500, 250), (9000, 500)])]
    records[2].signal[3, 5:50] = np.nan
    records[3].signal[4] = np.nan
    ecgs = prepare(records, fs=250, seconds=10)
    assert ecgs.signals.shape == (4, 12, 2500) and np.isfinite(ecgs.signals).all() and ecgs.labels.sum() == 4
    assert ecgs.truth["codes"][0] == {"164889003", "999"} and ecgs.patients == ["0", "1", "2", "3"] and (ecgs.sex == 1).all()
    assert prepare(records[:1], seconds=15).signals[:, :, 2500:].any() == False  # noqa: E712
    with pytest.raises(ValueError, match="at least one"):
        prepare([])


def test_prepare_keeps_truth_in_step(ecgs):
    few = ecgs.rows(slice(0, 5))
    double = prepare(few, fs=500, seconds=8)
    old, new = few.truth["fiducials"], double.truth["fiducials"]
    assert double.signals.shape == (5, 12, 4000) and np.array_equal(new[new >= 0], 2 * old[(old >= 0) & (2 * old < 4000)])


def test_as_input():
    x = as_input(np.stack([signal_of(), signal_of(1)]) * np.array([0.001, 1])[:, None, None] * 50)
    assert x.dtype == np.float32 and x.min() == -1 and x.max() == 1 and np.allclose(x.max(2), 1) and np.allclose(x.min(2), -1)
    assert not as_input(np.full((1, 12, 9), 4.0)).any()


def test_wide_features(ecgs):
    few = prepare(ecgs.rows(slice(0, 60)))
    wide = wide_features(few.signals, few.fs, few.age, few.sex)
    assert wide.shape == (60, 22) == (60, len(WIDE)) and wide.dtype == np.float32 and len(set(WIDE)) == 22
    assert np.nanmedian(np.abs(wide[:, WIDE.index("heart_rate_mean")] - few.truth["heart_rate"])) < 0.5
    nothing = wide_features(np.zeros((1, 12, 2500), np.float32), 250, np.array([np.nan]), np.array([1.0]))
    assert np.isnan(nothing[0, 2:]).all()
    scaler = WideScaler.fit(wide)
    assert np.array_equal(scaler(nothing)[0, [0, *range(2, 22)]], np.zeros(21)) and np.abs(np.nanmean(scaler(wide), 0)).max() < 1e-3
    assert WideScaler.from_json(scaler.to_json()) == scaler
    with pytest.raises(ValueError, match="features"):
        WideScaler.fit(wide[:, :5])
    with pytest.raises(ValueError, match="scaler"):
        WideScaler.from_json(scaler.to_json().replace("rr_rms", "other"))


def test_folds():
    patients = [f"p{k // 2}" for k in range(400)]
    labels = (np.random.default_rng(0).random((400, 3)) < [0.5, 0.2, 0.05]).astype(np.uint8)
    fold = stratified_folds(labels, patients)
    assert all(len(set(fold[2 * k : 2 * k + 2])) == 1 for k in range(200)) and np.bincount(fold).min() >= 38
    rare = np.array([labels[fold == k, 2].sum() for k in range(10)])
    assert rare.max() - rare.min() <= 2 and np.array_equal(fold, stratified_folds(labels, patients))
    with pytest.raises(ValueError, match="folds"):
        stratified_folds(labels[:3], patients[:3])


def test_paper_refuses_what_is_no_recording():
    with pytest.raises(ValueError, match="12"):
        ecg_paper(np.zeros((3, 100)), 250)
