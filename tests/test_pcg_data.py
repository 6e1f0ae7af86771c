"""pcg.data: what the simulator promises, readers on small generated folders and on the real sample, spectrograms and preparation."""

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from medgen_nb.data import BadRecord
from medgen_nb.pcg.data import (
    ATTRIBUTES,
    BINS,
    CONDITION,
    CONDITIONS,
    FS,
    GRADES,
    SECONDS,
    SITES,
    STATE_FS,
    TIMINGS,
    TRACKS,
    Recording,
    Scale,
    at_level,
    best_starts,
    check_cinc2016,
    check_circor,
    murmur_level,
    people,
    phase_of,
    prepare,
    promised_samples,
    quality,
    read_cinc2016,
    read_circor,
    read_segments,
    read_wave,
    simulate_sounds,
    spectrogram,
    tidy_fields,
    to_wave,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "pcg" / "circor-heart-sound-1.0.3"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real sample is not here ({REAL.name} beside the checkout)")


@pytest.fixture(scope="module")
def sounds():
    return simulate_sounds(300, seed=5)


def energy(tracks):
    return (tracks.astype(np.float64) ** 2).mean(-1)


# ---------------------------------------------------------------- simulator


def test_shapes_and_types(sounds):
    n, samples = 300, round(SECONDS * FS)
    assert sounds.waves.shape == (n, samples) and sounds.waves.dtype == np.float32 and np.isfinite(sounds.waves).all()
    assert sounds.truth["tracks"].shape == (n, len(TRACKS), samples) and sounds.truth["tracks"].dtype == np.float32
    assert sounds.states.shape == (n, round(SECONDS * STATE_FS)) and sounds.states.dtype == np.uint8 and set(np.unique(sounds.states)) == {1, 2, 3, 4}
    assert tuple(sounds.attributes.columns) == ATTRIBUTES and len(sounds.attributes) == n and len(set(sounds.ids)) == n == len(set(sounds.patients))
    assert 0.05 < np.abs(sounds.waves).max(1).min() and np.abs(sounds.waves).max() <= 1


def test_tracks_add_up(sounds):
    assert np.abs(sounds.truth["tracks"].sum(1) - sounds.waves).max() < 1e-6
    level = energy(sounds.truth["tracks"])
    assert (level[:, [0, 1, 3]] > 0).all()
    silent = (sounds.attributes.grade == 0) & (sounds.attributes.extra != "rub")
    assert (level[silent, 2] == 0).all() and (level[~silent, 2] > 0).all()


def test_snr_is_what_it_says(sounds):
    level = energy(sounds.truth["tracks"])
    assert np.allclose(10 * np.log10(level[:, 1] / level[:, 3]), sounds.attributes.snr, atol=0.01)


def test_seeds_and_populations():
    one, again, other = simulate_sounds(5, seed=1), simulate_sounds(5, seed=1), simulate_sounds(5, seed=2)
    assert one.fingerprint == again.fingerprint != other.fingerprint and np.array_equal(one.truth["tracks"], again.truth["tracks"])
    rounded = replace(one, waves=np.nextafter(one.waves, np.float32(9)))
    assert rounded.fingerprint != one.fingerprint and rounded.identity == one.identity == again.identity != other.identity
    elsewhere = simulate_sounds(5, seed=1, population=1)
    assert elsewhere.fingerprint != one.fingerprint and not set(elsewhere.ids) & set(one.ids)
    without = simulate_sounds(5, seed=1, tracks=False)
    assert without.fingerprint == one.fingerprint and "tracks" not in without.truth


def test_attributes_fit_their_condition(sounds):
    for row in sounds.attributes.to_dict("records"):
        condition = CONDITION[row["condition"]]
        assert condition.ages[0] <= row["age"] <= condition.ages[1] and row["site"] in SITES and row["sex"] in "FM"
        assert (row["grade"] > 0) == bool(condition.timings) and row["grade"] <= GRADES.get(row["phase"], 0)
        assert condition.grades[0] <= row["grade"] <= condition.grades[1] and row["grade"] % 1 == 0
        if row["grade"]:
            assert row["timing"] in condition.timings and row["shape"] in condition.shapes and row["phase"] == TIMINGS[row["timing"]][0]
            assert row["pitch"] in condition.pitches and row["quality"] in condition.qualities
        else:
            assert row["timing"] is None and row["shape"] is None and row["phase"] == "none"
        assert row["extra"] in ("", *(extra for extra, _ in condition.extras))
        assert row["outcome"] == ("Normal" if condition.key in ("normal", "Still") else "Abnormal")


def test_seventeen_conditions_occur(sounds):
    assert len(CONDITIONS) == 17 == len(CONDITION) and set(simulate_sounds(600, seconds=2, seed=0, tracks=False).attributes.condition) == set(CONDITION)
    chosen = simulate_sounds(40, seconds=2, conditions=["AS", "PDA"], tracks=False).attributes.condition
    assert set(chosen) == {"AS", "PDA"}


def test_murmur_lies_in_its_phase(sounds):
    systole = np.repeat(np.isin(sounds.states, (1, 2)), FS // STATE_FS, axis=1)
    track = sounds.truth["tracks"][:, 2].astype(np.float64) ** 2
    share = (track * systole).sum(1) / np.maximum(track.sum(1), 1e-30)
    phase = sounds.attributes.phase
    assert share[phase == "systolic"].min() > 0.9 and share[phase == "diastolic"].max() < 0.1 and 0.2 < np.median(share[phase == "continuous"]) < 0.8


@pytest.mark.parametrize("timing, middle", [("Early-systolic", 0.35), ("Mid-systolic", 0.53), ("Late-systolic", 0.75), ("Holosystolic", 0.53), ("Early-diastolic", 1.3), ("Mid-diastolic", 1.6)])
def test_timing_words(timing, middle):
    "The centre of a plateau murmur's energy, in phase."
    part = simulate_sounds(12, seed=3, given={"condition": "VSD", "timing": timing, "shape": "Plateau", "grade": 3, "rate": 70.0, "age": 30.0, "site": "TV"})
    first = np.array([row[np.isfinite(row)][:3] for row in part.truth["beats"]])
    second = np.array([[b[(b > s)][0] for s in row] for row, b in zip(first, (x[np.isfinite(x)] for x in part.truth["s2"]))])
    centre = []
    for k in range(12):
        phase = phase_of(first[k : k + 1], second[k : k + 1], np.arange(20000) / FS)[0]
        inside = (np.arange(20000) / FS > first[k, 0]) & (np.arange(20000) / FS < first[k, 2])
        power = part.truth["tracks"][k, 2, inside].astype(float) ** 2
        centre.append((power * phase[inside]).sum() / power.sum())
    assert abs(np.median(centre) - middle) < 0.06


def test_shapes_differ():
    "Energy of the later half of a holosystolic murmur: crescendo above plateau and diamond, decrescendo below."
    late = {}
    for shape in ("Plateau", "Diamond", "Crescendo", "Decrescendo"):
        part = simulate_sounds(16, seed=3, given={"condition": "VSD", "timing": "Holosystolic", "shape": shape, "grade": 3, "rate": 60.0, "age": 30.0, "site": "TV"})
        one, begin = part.truth["tracks"][:, 2].astype(float) ** 2, part.truth["beats"]
        shares = []
        for k in range(16):
            s1 = begin[k][np.isfinite(begin[k])][1]
            s2 = part.truth["s2"][k][np.isfinite(part.truth["s2"][k])]
            s2 = s2[s2 > s1][0]
            a, b, c = (int(x * FS) for x in (s1, (s1 + s2) / 2, s2))
            shares.append(one[k, b:c].sum() / one[k, a:c].sum())
        late[shape] = np.median(shares)
    assert late["Decrescendo"] < 0.3 < late["Diamond"] < 0.7 < late["Crescendo"] and 0.4 < late["Plateau"] < 0.65


def test_pitch_sets_the_band():
    middle, hz = {}, np.fft.rfftfreq(20000, 1 / FS)
    for pitch in ("Low", "Medium", "High"):
        part = simulate_sounds(8, seed=1, given={"condition": "MR", "site": "MV", "pitch": pitch, "grade": 3})
        power = (np.abs(np.fft.rfft(part.truth["tracks"][:, 2])) ** 2).mean(0)
        middle[pitch] = (power * hz).sum() / power.sum()
    assert 60 < middle["Low"] < 140 < middle["Medium"] < 260 < middle["High"] < 420


def test_twins_differ_in_the_murmur_only():
    grades = range(1, 7)
    twins = [simulate_sounds(20, seed=2, conditions=["VSD"], given={"grade": grade, "site": "PV"}) for grade in grades]
    same = np.all([twin.truth["gain"] == 1 for twin in twins], axis=0)
    assert same.sum() >= 10
    level = np.array([10 * np.log10(energy(twin.truth["tracks"][same, 2])) for twin in twins])
    assert np.allclose(np.diff(level, axis=0), 5, atol=0.01)
    for twin in twins[1:]:
        assert np.array_equal(twin.truth["tracks"][same][:, [0, 1, 3]], twins[0].truth["tracks"][same][:, [0, 1, 3]]) and np.array_equal(twin.states, twins[0].states)
    none = simulate_sounds(20, seed=2, conditions=["VSD"], given={"grade": 0, "site": "PV"})
    assert np.allclose(none.waves[same], (twins[0].waves - twins[0].truth["tracks"][:, 2])[same], atol=1e-6) and (none.attributes.phase == "none").all()


def test_other_condition_same_heart():
    "Twins across conditions keep the beats when age and rate are given."
    fixed = {"age": 40.0, "rate": 75.0, "site": "MV"}
    a, b = (simulate_sounds(30, seed=2, given={"condition": key, **fixed}) for key in ("normal", "MR"))
    steady = (a.truth["rhythm"] == "sinus") & (b.truth["rhythm"] == "sinus")
    assert steady.sum() > 10 and np.array_equal(a.truth["beats"][steady], b.truth["beats"][steady], equal_nan=True)
    assert np.array_equal(a.truth["tracks"][steady][:, 0], b.truth["tracks"][steady][:, 0])


def test_site_damps(sounds):
    level = {site: energy(simulate_sounds(10, seed=4, given={"condition": "AS", "grade": 4, "site": site}).truth["tracks"][:, 2]) for site in SITES}
    assert (level["AV"] > level["PV"]).all() and (level["PV"] > level["MV"]).all()
    assert murmur_level(3, "systolic") > murmur_level(2, "systolic") > murmur_level(0, "systolic") == 0


def test_rate_and_rhythm(sounds):
    for k in range(len(sounds)):
        s1, s2 = sounds.truth["beats"][k], sounds.truth["s2"][k]
        s1, s2 = s1[np.isfinite(s1)], s2[np.isfinite(s2)]
        assert (np.diff(s1) > 0.25).all() and ((s1[:, None] < s2).sum() >= 1)
    asked = simulate_sounds(60, seed=3, given={"rate": 80.0, "condition": "normal"})
    steady = asked.truth["rhythm"] == "sinus"
    assert np.abs(asked.attributes.rate[steady] / 80 - 1).max() < 0.12 and np.abs(np.median(asked.attributes.rate[steady]) / 80 - 1) < 0.02
    young, old = simulate_sounds(40, given={"age": 1.0}, seconds=3), simulate_sounds(40, given={"age": 40.0}, seconds=3)
    assert young.attributes.rate.median() > old.attributes.rate.median() + 30


def test_states_follow_the_beats(sounds):
    for k in range(0, len(sounds), 10):
        for onset in sounds.truth["beats"][k][np.isfinite(sounds.truth["beats"][k])]:
            frame = math.ceil(onset * STATE_FS - 0.5)
            assert frame >= sounds.states.shape[1] or sounds.states[k, frame] == 1
            assert frame < 1 or sounds.states[k, min(frame, sounds.states.shape[1]) - 1] in (4, 3)


def test_split_of_s2_and_loud_s1():
    first = {key: simulate_sounds(20, seed=8, given={"condition": key, "age": 30.0, "rate": 70.0, "site": "MV", "extra": ""}) for key in ("normal", "MS", "MR")}
    peak = {key: np.median([np.abs(row[: FS]).max() for row in part.truth["tracks"][:, 1]]) for key, part in first.items()}
    assert peak["MS"] > 1.3 * peak["normal"] > 1.3 * peak["MR"]


def test_rows_take_the_truth_along(sounds):
    part = sounds.rows([3, 1])
    assert part.ids == [sounds.ids[3], sounds.ids[1]] and np.array_equal(part.truth["tracks"], sounds.truth["tracks"][[3, 1]])
    assert part.attributes.condition.tolist() == sounds.attributes.condition.iloc[[3, 1]].tolist() and list(part.attributes.index) == [0, 1]
    assert len(sounds.rows(sounds.attributes.grade.to_numpy() > 0)) == (sounds.attributes.grade > 0).sum() and "300 recordings" in repr(sounds)


def test_other_lengths_and_rates():
    assert simulate_sounds(2, seconds=7.5, seed=1).waves.shape == (2, 30000) and simulate_sounds(2, seconds=2.00025).waves.shape == (2, 8001)
    slow = simulate_sounds(2, fs=2000, seed=1)
    assert slow.waves.shape == (2, 10000) and slow.fs == 2000 and np.abs(slow.truth["tracks"].sum(1) - slow.waves).max() < 1e-6


@pytest.mark.parametrize("wrong, says", [
    ({"n": 0}, "n >= 1"), ({"n": 2, "seconds": 1}, "seconds"), ({"n": 2, "conditions": ["flu"]}, "flu"), ({"n": 2, "conditions": []}, "keys of"),
    ({"n": 2, "given": {"condition": "flu"}}, "flu"), ({"n": 2, "given": {"timing": "lunch", "condition": "AS"}}, "lunch"), ({"n": 2, "given": {"grade": 3, "condition": "normal"}}, "needs timing"),
    ({"n": 2, "given": {"grade": 7, "condition": "AS"}}, "grades"), ({"n": 2, "given": {"grade": 5, "condition": "AR"}}, "grades"), ({"n": 2, "given": {"rate": 500.0}}, "rates"),
    ({"n": 2, "given": {"height": 3}}, "height"), ({"n": 2, "given": {"colour": 3}}, "colour"), ({"n": 2, "given": {"grade": [1, 2, 3]}}, "2 values")])
def test_simulator_refuses(wrong, says):
    with pytest.raises(ValueError, match=says):
        simulate_sounds(**wrong)


def test_speed():
    start = time.process_time()
    simulate_sounds(256, seed=3)
    assert 256 * SECONDS / (time.process_time() - start) > 250, "500 times real time and more on a free core; a busy one may halve it"


# ---------------------------------------------------------------- spectrogram


def test_spectrogram_and_back(sounds):
    x = sounds.waves[:12]
    magnitude = spectrogram(x)
    assert magnitude.shape == (12, BINS, 313) and magnitude.dtype == np.float32 and magnitude.min() >= 0 and BINS % 4 == 0
    tone = np.sin(2 * np.pi * 250 * np.arange(8000) / FS, dtype=np.float32)[None]
    assert spectrogram(tone)[0, :, 20].argmax() == 16                                      # 250 Hz / 15.625 Hz
    y = to_wave(magnitude)
    error = np.sqrt(((spectrogram(y) - magnitude) ** 2).sum((1, 2)) / (magnitude**2).sum((1, 2)))
    assert y.shape == x.shape and np.median(error) < 0.2 and np.array_equal(y, to_wave(magnitude))
    assert np.abs(np.fft.rfft(y))[:, np.fft.rfftfreq(20000, 1 / FS) > 900].max() < 0.02 * np.abs(np.fft.rfft(y)).max()


def test_scale(sounds):
    magnitude = spectrogram(sounds.waves[:40])
    scale = Scale.fit(magnitude)
    x = scale.as_input(magnitude)
    assert x.shape == (40, 1, BINS, 312) and x.dtype == np.float32 and abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    back = scale.back(x)
    assert back.shape == magnitude.shape and np.allclose(back[:, :, :312], magnitude[:, :, :312], atol=1e-4 * magnitude.max()) and (scale.back(x - 100) == 0).all()
    assert Scale.from_json(scale.to_json()) == scale and to_wave(back).shape == (40, 20000)
    with pytest.raises(ValueError, match="another transform"):
        Scale.from_json(scale.to_json().replace('"hop": 64', '"hop": 32'))


def test_spectrogram_refuses():
    with pytest.raises(ValueError, match="samples"):
        spectrogram(np.zeros(20000, dtype=np.float32))
    with pytest.raises(ValueError, match="frames"):
        to_wave(np.zeros((2, BINS, 40), dtype=np.float32))
    with pytest.raises(ValueError, match="finite"):
        Scale.fit(np.zeros((2, BINS, 40)))


# ---------------------------------------------------------------- CirCor on generated folders


SAID = {"Age": "Child", "Sex": "Female", "Height": "98.0", "Weight": "15.9", "Pregnancy status": "False", "Murmur": "Absent", "Murmur locations": "nan", "Most audible location": "nan",
        **{f"{phase} murmur {word}": "nan" for phase in ("Systolic", "Diastolic") for word in ("timing", "shape", "grading", "pitch", "quality")},
        "Outcome": "Normal", "Campaign": "CC2015", "Additional ID": "nan"}
TSV = "0\t0.5\t0\n0.5\t0.62\t1\n0.62\t0.75\t2\n0.7496\t0.85\t3\n0.85\t1.1\t4\n1.1\t1.22\t1\n1.22\t6\t0\n"


def wave_of(seed=0, samples=24000):
    return (0.3 * np.random.default_rng(seed).standard_normal(samples)).clip(-0.9, 0.9)


def write_circor(root, patient="9", sites=("AV", "MV"), layout="1.0.3", text=True, **said):
    folder = root / "training_data"
    folder.mkdir(parents=True, exist_ok=True)
    stems = [f"{patient}_{site}" + (f"_{sites[: k + 1].count(site)}" if sites.count(site) > 1 else "") for k, site in enumerate(sites)]
    for k, stem in enumerate(stems):
        soundfile.write(folder / f"{stem}.wav", wave_of(k), FS, subtype="PCM_16")
        (folder / f"{stem}.tsv").write_text(TSV)
        (folder / f"{stem}.hea").write_bytes(f"{stem} 1 4000 24000\r\n{stem}.wav 16+44 1 16 0 0 0 0 {sites[k]}\r\n".encode())
    said = {**SAID, **{key.replace("_", " "): value for key, value in said.items()}}
    if text:
        lines = [f"{patient} {len(stems)} 4000", *(f"{site} {stem}.hea {stem}.wav {stem}.tsv" for site, stem in zip(sites, stems)), *(f"#{key}: {value}" for key, value in said.items())]
        (folder / f"{patient}.txt").write_text("\n".join(lines) + "\n")
    table, name = root / "training_data.csv", {"1.0.3": "Recording locations:", "2022": "Locations"}[layout]
    row = pd.DataFrame([{"Patient ID": patient, name: "+".join(sites), **said}])
    row.to_csv(table, mode="a", header=not table.exists(), index=False)
    return folder


@pytest.mark.parametrize("layout", ["1.0.3", "2022"])
@pytest.mark.parametrize("text", [True, False])
def test_circor(tmp_path, layout, text):
    write_circor(tmp_path, "9", ("AV", "AV", "MV"), layout, text, Murmur="Present", Murmur_locations="AV+PV", Systolic_murmur_timing="Holosystolic", Systolic_murmur_shape="Plateau",
                 Systolic_murmur_grading="III/VI", Systolic_murmur_pitch="Low", Systolic_murmur_quality="Harsh", Height="nan")
    write_circor(tmp_path, "10", ("PV",), layout, text, Additional_ID="9.0", Age="nan", Pregnancy_status="True")
    recordings, rejected = read_circor(tmp_path)
    assert rejected == [] == check_circor(tmp_path)
    by = {recording.id: recording for recording in recordings}
    assert set(by) == {"9_AV_1", "9_AV_2", "9_MV", "10_PV"} and {r.patient for r in recordings} == {"9"}
    assert by["9_AV_2"].site == "AV" and by["9_AV_1"].fs == 4000 and by["9_AV_1"].flags == () and np.allclose(by["9_AV_1"].wave, wave_of(0), atol=1e-4)
    assert by["9_MV"].segments.shape == (7, 3) and by["9_MV"].segments[1].tolist() == [0.5, 0.62, 1] and math.isnan(by["9_MV"].fields["Height"])
    assert by["10_PV"].fields["Age"] is None and by["10_PV"].fields["Pregnancy status"] is True and by["10_PV"].fields["Murmur locations"] is None
    attributes = prepare(recordings).attributes.set_axis([r.id for r in recordings])
    assert attributes.loc["9_AV_2", "grade"] == 3 and attributes.loc["9_AV_2", "timing"] == "Holosystolic" and attributes.loc["9_AV_2", "phase"] == "systolic"
    assert attributes.loc["9_MV", "grade"] == 0 and attributes.loc["9_MV", "timing"] is None and attributes.loc["10_PV", "grade"] == 0 and math.isnan(attributes.loc["10_PV", "age"])
    assert attributes.loc["9_AV_1", "rate"] == pytest.approx(100) and attributes.loc["9_AV_1", "weight"] == 15.9


def test_unknown_and_diastolic(tmp_path):
    write_circor(tmp_path, "1", ("AV",), Murmur="Unknown")
    write_circor(tmp_path, "2", ("AV",), Murmur="Present", Diastolic_murmur_timing="Early-diastolic", Diastolic_murmur_grading="II/IV", Diastolic_murmur_shape="Decrescendo")
    rows = prepare(read_circor(tmp_path)[0]).attributes
    assert math.isnan(rows.grade[0]) and rows.phase[0] is None and rows.grade[1] == 2 and rows.phase[1] == "diastolic" and rows["shape"][1] == "Decrescendo"


def cut(folder):
    file = folder / "9_AV.wav"
    file.write_bytes(file.read_bytes()[:9000])


BREAK = {
    "cut sound": (cut, "9_AV.wav", "cut"),
    "sound of another length": (lambda d: soundfile.write(d / "9_AV.wav", wave_of(0, 20000), FS), "9_AV.wav", "promises"),
    "no WAV": (lambda d: (d / "9_AV.wav").write_bytes(b"RIFX" + bytes(100)), "9_AV.wav", "no WAV"),
    "empty WAV": (lambda d: (d / "9_AV.wav").write_bytes(b""), "9_AV.wav", "no WAV"),
    "no samples": (lambda d: (d / "9_AV.wav").write_bytes((d / "9_AV.wav").read_bytes()[:36]), "9_AV.wav", "no samples"),
    "missing sound": (lambda d: (d / "9_AV.wav").unlink(), "9_AV.wav", "does not exist"),
    "missing states": (lambda d: (d / "9_AV.tsv").unlink(), "9_AV.tsv", "does not exist"),
    "beyond the end": (lambda d: (d / "9_AV.tsv").write_text("0\t7\t1\n"), "9_AV.tsv", "ends at 7"),
    "overlap": (lambda d: (d / "9_AV.tsv").write_text("0\t1\t1\n0.5\t2\t2\n"), "9_AV.tsv", "overlap"),
    "backwards": (lambda d: (d / "9_AV.tsv").write_text("1\t0.5\t1\n"), "9_AV.tsv", "before it starts"),
    "unknown state": (lambda d: (d / "9_AV.tsv").write_text("0\t1\t7\n"), "9_AV.tsv", "state"),
    "words": (lambda d: (d / "9_AV.tsv").write_text("start\tend\tlabel\n"), "9_AV.tsv", "line 1"),
    "two columns": (lambda d: (d / "9_AV.tsv").write_text("0\t1\n"), "9_AV.tsv", "line 1"),
    "nan": (lambda d: (d / "9_AV.tsv").write_text("nan\t1\t1\n"), "9_AV.tsv", "line 1"),
    "binary states": (lambda d: (d / "9_AV.tsv").write_bytes(bytes(range(128, 256))), "9_AV.tsv", "line 1"),
    "empty states": (lambda d: (d / "9_AV.tsv").write_text(""), "9_AV.tsv", "empty"),
    "unnamed sound": (lambda d: soundfile.write(d / "77_AV.wav", wave_of(), FS), "77_AV.wav", "no patient"),
}


@pytest.mark.parametrize("how", list(BREAK))
def test_one_bad_file_does_not_stop_the_rest(tmp_path, how):
    harm, name, reason = BREAK[how]
    folder = write_circor(tmp_path)
    write_circor(tmp_path, "10", ("PV",))
    harm(folder)
    recordings, rejected = read_circor(tmp_path)
    (problem,) = rejected
    assert Path(problem.file).name == name and reason in str(problem) and {r.id for r in recordings} >= {"9_MV", "10_PV"} and len(recordings) == 2 + (how == "unnamed sound")


def test_bad_text_and_records(tmp_path):
    folder = write_circor(tmp_path)
    write_circor(tmp_path, "10", ("PV",))
    (folder / "10.txt").write_text("10 3 4000\nPV 10_PV.hea 10_PV.wav 10_PV.tsv\n")
    (tmp_path / "RECORDS").write_text("training_data/9_AV\ntraining_data/11_AV\n")
    recordings, rejected = read_circor(tmp_path)
    assert len(recordings) == 2 and sorted(Path(p.file).name for p in rejected) == ["10.txt", "RECORDS"]


@pytest.mark.parametrize("reader, check", [(read_circor, check_circor), (read_cinc2016, check_cinc2016)])
def test_nothing_to_read(tmp_path, reader, check):
    with pytest.raises(BadRecord, match="--root"):
        reader(tmp_path)
    assert len(check(tmp_path / "nowhere")) == 1


def test_bad_table(tmp_path):
    (tmp_path / "training_data.csv").write_text("a,b\n1,2\n")
    assert "Patient ID" in str(check_circor(tmp_path)[0])


def test_odd_sounds_are_kept_and_flagged(tmp_path):
    x = wave_of(samples=8000)
    odd = {"stereo": (np.stack([x, x], 1), FS), "clipped": (np.clip(5 * x, -0.8, 0.8), FS), "silent": (np.zeros(8000), FS), "8000 Hz": (x, 8000)}
    for flag, (wave, fs) in odd.items():
        soundfile.write(tmp_path / "x.wav", wave, fs, subtype="PCM_16")
        read, rate, flags = read_wave(tmp_path / "x.wav")
        assert flags == (flag,) and read.shape == (8000,) and rate == fs and read.dtype == np.float32
    soundfile.write(tmp_path / "x.wav", np.stack([x, -x], 1), FS, subtype="FLOAT")
    assert read_wave(tmp_path / "x.wav")[2] == ("stereo", "silent")
    assert quality(np.zeros(0)) == ("silent",) and quality(0.01 * np.sign(x)) == ()


def test_people_are_linked():
    assert people({"5": "12", "12": "5", "7": None, "20": "12"}) == {"5": "5", "12": "5", "7": "7", "20": "5"}
    assert people({"100": "99"}) == {"100": "99", "99": "99"}


def test_tidy_fields():
    fields = tidy_fields({"Recording locations:": "AV+MV", "Height": "tall", "Additional ID": "123.0", "Pregnancy status": "", "Age": " NaN "})
    assert fields["Locations"] == "AV+MV" and math.isnan(fields["Height"]) and fields["Additional ID"] == "123" and fields["Pregnancy status"] is None and fields["Age"] is None


def test_states_table(tmp_path):
    (tmp_path / "a.tsv").write_text(TSV)
    assert read_segments(tmp_path / "a.tsv", 5.995)[-1, 1] == 5.995      # rounding beyond the end is cut
    assert promised_samples(tmp_path / "none.hea") is None


# ---------------------------------------------------------------- CinC 2016


def write_cinc(root, name="a0001", label="Abnormal", fs=2000):
    folder = root / f"training-{name[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"{name}.wav", wave_of(samples=20000), fs, subtype="PCM_16")
    (folder / f"{name}.hea").write_text(f"{name} 1 {fs} 20000\r\n{name}.wav 16+44 1 16 0 0 0 0 PCG\r\n# {label}\r\n")
    return folder


def test_cinc2016(tmp_path):
    a = write_cinc(tmp_path, "a0001", "Abnormal")
    write_cinc(tmp_path, "b0001", "Normal")
    write_cinc(tmp_path, "b0002", "Normal")
    (a / "REFERENCE.csv").write_text("a0001,-1\na0009,1\n")               # the table overrules the header
    deep = tmp_path / "annotations" / "updated" / "training-b"
    deep.mkdir(parents=True)
    (deep / "REFERENCE-SQI.csv").write_text("b0001,1,0\n")
    recordings, rejected = read_cinc2016(tmp_path)
    assert [(r.id, r.fields["Outcome"], r.fields["Database"]) for r in recordings] == [("a0001", "Normal", "a"), ("b0001", "Abnormal", "b"), ("b0002", "Normal", "b")]
    assert recordings[1].flags == ("2000 Hz", "not annotated", "poor quality") and recordings[0].patient == "a0001" and recordings[0].site == ""
    (problem,) = rejected
    write_cinc(tmp_path, "b0002").rename(tmp_path / "validation")          # a copy under another folder
    write_cinc(tmp_path, "b0001"), write_cinc(tmp_path, "b0002")
    assert [r.id for r in read_cinc2016(tmp_path)[0]] == ["a0001", "b0001", "b0002"]
    assert problem.where == "a0009" and check_cinc2016(tmp_path)[0].where == "a0009"
    part = prepare(recordings)
    assert part.waves.shape == (3, 20000) and part.fs == FS and (part.states == 0).all() and part.attributes.outcome.tolist() == ["Normal", "Abnormal", "Normal"] and part.attributes.grade.isna().all()


def test_cinc2016_broken(tmp_path):
    folder = write_cinc(tmp_path)
    write_cinc(tmp_path, "a0002")
    (folder / "a0001.wav").write_bytes((folder / "a0001.wav").read_bytes()[:5000])
    (folder / "a0002.hea").write_text("a0002 1 2000 20000\n")
    recordings, rejected = read_cinc2016(tmp_path)
    assert [r.id for r in recordings] == ["a0002"] and "no label" in recordings[0].flags and "cut" in str(rejected[0])


# ---------------------------------------------------------------- preparation


def recording_of(segments, seconds=20.0, fs=4000.0, **more):
    return Recording(wave_of(samples=round(seconds * fs)).astype(np.float32), fs, "r", "p", "AV", np.array(segments, dtype=float).reshape(-1, 3), more)


def test_crop_lies_on_the_annotated_part():
    part = prepare([recording_of([(0, 9, 0), (9, 11, 1), (11, 14.5, 2), (14.5, 20, 0)])])
    assert part.truth["annotated"][0] == 1 and 9 <= part.truth["start"][0] <= 9.5 and set(np.unique(part.states)) == {1, 2}
    middle = prepare([recording_of([])])
    assert middle.truth["start"][0] == 7.5 and middle.truth["annotated"][0] == 0
    short = prepare([recording_of([(0, 3, 1)], seconds=3)])
    assert short.waves.shape == (1, 20000) and (short.waves[0, 12000:] == 0).all() and (short.states[0, 150:] == 0).all()


def test_many_crops_do_not_overlap():
    part = prepare([recording_of([(0, 17, 2)])], crops=9)
    assert len(part) == 3 and (np.diff(np.sort(part.truth["start"])) >= 5).all() and len(set(part.ids)) == 3 and set(part.patients) == {"p"}
    assert best_starts(np.r_[np.zeros(300, int), np.ones(250, int), np.zeros(100, int)], 250, 5) == [300]


def test_level_and_resampling():
    waves, gain = at_level(np.stack([wave_of(1), 0.01 * wave_of(1), np.zeros(24000)]))
    assert np.allclose(waves[0], waves[1], atol=1e-5) and (waves[2] == 0).all() and np.isfinite(gain).all() and np.quantile(np.abs(waves[0]), 0.995) == pytest.approx(0.5, abs=1e-3)
    t = np.arange(16000) / 2000
    tone = Recording(np.sin(2 * np.pi * 100 * t).astype(np.float32), 2000.0, "t", "t", "", np.zeros((0, 3)), {})
    x = prepare([tone]).waves[0]
    assert np.fft.rfftfreq(20000, 1 / FS)[np.abs(np.fft.rfft(x)).argmax()] == pytest.approx(100, abs=0.5)


def test_prepare_refuses():
    with pytest.raises(ValueError, match="read a data set"):
        prepare([])
    with pytest.raises(ValueError, match="crops"):
        prepare([recording_of([])], crops=0)


# ---------------------------------------------------------------- the real sample


@needs_real
def test_real_sample():
    recordings, rejected = read_circor(REAL)
    assert len(recordings) == 366 and rejected == [] and len({r.patient for r in recordings}) == 110
    assert sum(len(r.segments[r.segments[:, 2] == 1]) for r in recordings) == 6697 and all(r.fs == 4000 for r in recordings)
    assert sum(r.site == "MV" for r in recordings) == 99 and not any("not annotated" in r.flags for r in recordings)
    part = prepare(recordings)
    assert np.median(part.truth["annotated"]) > 0.95 and part.attributes.rate.between(45, 200).mean() > 0.9 and set(part.attributes.grade.dropna()) == {0, 1, 2, 3}
    assert part.attributes.outcome.value_counts().sum() == 366 and np.isfinite(part.waves).all()


@needs_real
def test_simulated_children_resemble_real_ones():
    "S1 to S2, and how far S1 stands above the noise of diastole: medians of murmur-free recordings."
    real = [r for r in read_circor(REAL)[0] if r.fields["Murmur"] == "Absent"]
    part = prepare(real)
    fake = simulate_sounds(200, seed=2, given={"condition": "normal", "age": 6.0})
    systole = lambda part: np.median([(np.isin(row, (1, 2)).sum() / max((np.diff((row == 1).astype(int)) == 1).sum(), 1)) / STATE_FS for row in part.states])
    above = lambda part: np.median([10 * np.log10(energy(w[np.repeat(s == 1, 80)]) / energy(w[np.repeat(s == 4, 80)])) for w, s in zip(part.waves, part.states) if (s == 1).any() and (s == 4).any()])
    assert abs(systole(part) - systole(fake)) < 0.04 and abs(above(part) - above(fake)) < 5
