"Cine MRI: hearts that keep their volume and their promises, phenotypes that belong together, readers that say what is wrong."

import io
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from medgen_nb.cmr.data import (
    ACDC_BOX,
    FIELD,
    GROUPS,
    LABELS,
    MEASURES,
    PHENOTYPES,
    SEGMENTS,
    UNLABELLED,
    CineRecord,
    Hearts,
    beat,
    check_acdc,
    check_ukb,
    draw_looks,
    draw_population,
    end_systole,
    find_heart,
    fullness,
    measure_masks,
    paint,
    phenotypes_of,
    prepare,
    prevalences,
    read_acdc,
    read_nifti,
    read_ukb,
    retime,
    scan,
    simulate_hearts,
    tidy_name,
    volumes,
    write_gif,
    write_nifti,
)
from medgen_nb.data import BadRecord

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "cine_mri"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real samples are not here ({REAL.name} beside the checkout)")


@pytest.fixture(scope="module")
def films():
    return simulate_hearts(160, seed=5)


@pytest.fixture(scope="module")
def people():
    return draw_population(1500, seed=3)


@pytest.fixture(scope="module")
def table(people):
    return phenotypes_of(people)


# ---------------------------------------------------------------- anatomy and phenotypes


def test_the_82():
    assert len(PHENOTYPES) == 82 and set(p.seen for p in PHENOTYPES.values()) == {"visible", "inferable", "invisible"}
    families = {key: sum(name.startswith(key) for name in PHENOTYPES) for key in ("WT_", "Ecc_", "Err_", "Ell_", "LV", "RV", "LA", "RA", "AAo", "DAo")}
    assert families == {"WT_": 17, "Ecc_": 17, "Err_": 17, "Ell_": 7, "LV": 6, "RV": 4, "LA": 4, "RA": 4, "AAo": 3, "DAo": 3}
    assert [name for name, p in PHENOTYPES.items() if p.seen == "visible"] == [f"{key}_{k}" for key in ("WT", "Ecc", "Err") for k in range(7, 13)]
    assert SEGMENTS[8] == "mid anteroseptal" and SEGMENTS[16] == "apical lateral" and all(p.unit and p.meaning for p in PHENOTYPES.values())


def test_phenotypes_belong_together(people, table):
    assert list(table) == list(PHENOTYPES) and table.shape == (1500, 82) and np.isfinite(table.to_numpy()).all() and (table.dtypes == float).all()
    for side in ("LV", "RV"):
        assert np.allclose(table[f"{side}SV"], table[f"{side}EDV"] - table[f"{side}ESV"]) and np.allclose(table[f"{side}EF"], 100 * table[f"{side}SV"] / table[f"{side}EDV"])
        assert (table[f"{side}ESV"] > 5).all() and table[f"{side}EF"].between(5, 82).all()
    for side in ("LA", "RA"):
        assert np.allclose(table[f"{side}SV"], table[f"{side}Vmax"] - table[f"{side}Vmin"]) and (table[f"{side}Vmin"] > 0).all()
    for side in ("AAo", "DAo"):
        assert (table[f"{side}_max"] > table[f"{side}_min"]).all() and (table[f"{side}_distensibility"] > 0).all()
    for key, count in (("WT", 16), ("Ecc", 16), ("Err", 16), ("Ell", 6)):
        assert np.allclose(table[[f"{key}_{k + 1}" for k in range(count)]].mean(1), table[f"{key}_global"])
    assert np.allclose(table["LVCO"], table["LVSV"] * people["rate"] / 1000)


def test_settings_are_what_they_say(people, table):
    for name in ("LVEDV", "LVEF", "WT_global", "RVEDV", "LAVmax", "RAVmax"):
        assert np.allclose(table[name], people[name], rtol=1e-9), name


def test_healthy_people_are_like_published_ones(people, table):
    "Petersen et al. 2017: LVEF 58 and 61 per cent, mass 53 and 42 g per m2 in men and women. Mass is not put in."
    for female, ef, mass in ((False, 58, 53), (True, 61, 42)):
        rows = (people.group == "NOR") & (people.female == female)
        assert abs(table.LVEF[rows].mean() - ef) < 1 and abs((table.LVM / people.surface)[rows].mean() - mass) < 4
        assert -24 < table.Ecc_global[rows].mean() < -16 and -21 < table.Ell_global[rows].mean() < -14 and 35 < table.Err_global[rows].mean() < 65


def test_groups_differ_as_they_should(people, table):
    mean = table.groupby(people.group).mean()
    assert set(mean.index) == set(GROUPS)
    assert mean.LVEDV.idxmax() == "DCM" and mean.LVEF.idxmin() == "DCM" and mean.LVEF.idxmax() == "HCM" and mean.RVEDV.idxmax() == "RV" and mean.WT_global.idxmax() == "AMY"
    assert mean.loc["HCM", "WT_8"] > 1.4 * mean.loc["HCM", "WT_11"] and mean.loc["AMY", "Ell_global"] > 0.65 * mean.loc["NOR", "Ell_global"]
    front = table[people.territory == "LAD"].mean()
    assert front.WT_8 < 0.8 * front.WT_11 and front.Err_7 < 0.5 * front.Err_10


def test_walls_cannot_be_compressed_and_cavities_follow_their_curves(people):
    hearts = Hearts(people[:300])
    state = beat(hearts, np.arange(30) / 30)
    found = volumes(hearts, state)
    assert np.abs(found["wall"] / found["wall"][:, :1] - 1).max() < 1e-12
    assert np.allclose(found["LV"], state["left"][..., 0], rtol=1e-9) and np.allclose(found["RV"], state["right"][..., 0], rtol=1e-9)
    assert (found["wall"][:, 0] < hearts.muscle).all(), "the apex has muscle below the cavity, too"


def test_the_clock(people):
    phase = np.arange(400) / 400
    full = fullness(people[:200], phase)
    assert np.allclose(full[:, 0], 1) and full.min() >= 0 and full.max() <= 1 + 1e-12 and np.allclose(full.min(1), 0)
    assert np.allclose(fullness(people[:200], end_systole(people[:200])[:, None]), 0)
    assert (np.abs(np.diff(full, axis=1)) < 0.05).all() and np.abs(full[:, -1] - 1).max() < 0.05
    seconds = end_systole(people) * 60 / people.rate
    assert seconds.between(0.2, 0.5).all() and np.corrcoef(seconds, people.rate)[0, 1] < -0.7


def test_people_do_not_depend_on_how_many(people):
    few, other = draw_population(4, seed=3), draw_population(4, seed=4)
    pd.testing.assert_frame_equal(few, people[:4])
    assert not np.allclose(few.LVEDV, other.LVEDV)


@pytest.mark.parametrize("name, value", [("LVEF", 25.0), ("LVEDV", 200.0), ("WT_global", 9.0), ("rate", 90.0), ("RVEDV", 210.0), ("LAVmax", 80.0)])
def test_given_changes_only_what_it_must(people, name, value):
    twin = draw_population(50, seed=3, given={name: value})
    assert (twin[name] == value).all()
    changed = {column for column in twin if not twin[column].equals(people[:50][column])}
    assert changed <= {name, "LASV", "RASV", "LAVmax", "RAVmax"}, changed
    if name != "rate":
        assert np.allclose(phenotypes_of(twin)[name], value)


def test_what_cannot_be_given():
    for given, word in (({"LVEFF": 50}, "no setting"), ({"LVEF": 95}, "must lie"), ({"LVEF": np.nan}, "must lie"), ({"LVEF": [50, 60]}, "one for each")):
        with pytest.raises(ValueError, match=word):
            draw_population(3, given=given)
    with pytest.raises(ValueError, match="unknown groups"):
        draw_population(3, groups="FLU")
    with pytest.raises(ValueError):
        draw_population(0)
    with pytest.raises(ValueError):
        simulate_hearts(1, frames=3)


def test_another_population():
    assert np.isclose(prevalences(0).sum(), 1) and not np.allclose(prevalences(0), prevalences(1))
    here, there = simulate_hearts(6, seed=1), simulate_hearts(6, seed=1, population=1)
    assert here.fingerprint != there.fingerprint and not set(here.patients) & set(there.patients)
    rounded = replace(here, videos=np.nextafter(here.videos, np.float32(9)))
    assert rounded.fingerprint != here.fingerprint and rounded.identity == here.identity != there.identity


# ---------------------------------------------------------------- pictures


def test_shapes_and_types(films):
    assert films.videos.shape == (160, 20, 48, 48) and films.videos.dtype == np.float32 and np.abs(films.videos).max() <= 1 and np.isfinite(films.videos).all()
    assert films.x.shape == (160, 1, 20, 48, 48) and films.x.dtype == torch.float32
    assert films.masks.shape == films.videos.shape and films.masks.dtype == np.uint8 and set(np.unique(films.masks)) == {0, 1, 2, 3}
    assert films.motion is None and np.allclose(films.spacing, FIELD / 48) and films.frame_time.shape == (160,) and set(films.groups) <= set(GROUPS)
    assert np.allclose(films.phenotypes["LVCO"], films.phenotypes["LVSV"] * 60 / (films.frame_time * 20) / 1000), "frames cover one beat"
    part = films.rows(np.array([3, 5]))
    assert len(part) == 2 and np.array_equal(part.masks[1], films.masks[5]) and part.phenotypes.LVEF[1] == films.phenotypes.LVEF[5] and "2 videos" in repr(part)


def test_same_seed_same_films(films):
    assert simulate_hearts(3, seed=5).fingerprint == films.rows(slice(0, 3)).fingerprint == simulate_hearts(7, seed=5, masks=False).rows(slice(0, 3)).fingerprint
    assert simulate_hearts(3, seed=6).fingerprint != simulate_hearts(3, seed=5).fingerprint


def test_masks_tell_the_phenotypes(films):
    seen = measure_masks(films.masks, films.spacing, films.frame_time)
    r = lambda a, b: np.corrcoef(seen[a], films.phenotypes[b])[0, 1]
    assert r("area_change", "LVEF") > 0.95 and r("area_RV_change", "RVEF") > 0.9 and r("area_LV_ED", "LVEDV") > 0.9 and r("area_myo_ED", "LVM") > 0.9
    for k in range(7, 13):
        assert r(f"thickness_{k}", f"WT_{k}") > 0.95 and abs(seen[f"thickness_{k}"] - films.phenotypes[f"WT_{k}"]).mean() < 1
    assert seen.time_ES.between(0.2, 0.55).all() and (seen.jitter < 0.1).all()


def test_noise_and_blur_leave_something_to_compress(films):
    quiet = draw_looks(40, 5, 0)
    quiet["noise"] = 0 * quiet["noise"]
    clean = np.concatenate([scan(signal, quiet) for _, signal, _ in paint(Hearts(draw_population(40, 5)), quiet, np.arange(20) / 20, 48)], axis=1)
    assert ((clean - films.videos[:40]) ** 2).mean() / films.videos[:40].var() < 0.015


def test_a_sweep_is_one_heart():
    low, high = (simulate_hearts(1, 16, 64, seed=2, groups="NOR", given={"LVEF": ef}) for ef in (20, 75))
    assert np.abs(low.videos[0, 0] - high.videos[0, 0]).max() < 0.02, "end-diastole is the same"
    assert np.isclose(low.phenotypes.LVM[0], high.phenotypes.LVM[0]) and low.phenotypes.LVEF[0] == pytest.approx(20) and high.phenotypes.LVEF[0] == pytest.approx(75)
    change = [measure_masks(one.masks, one.spacing, one.frame_time).area_change[0] for one in (low, high)]
    assert change[0] < 25 and change[1] > 60


def test_motion_moves_frames_onto_each_other():
    one = simulate_hearts(6, 20, 96, seed=4, motion=True)
    assert one.motion.shape == (6, 20, 2, 96, 96) and np.abs(one.motion[:, 0]).max() < 1e-4 and 2 < np.abs(one.motion).max() < 20
    grid, flow = torch.arange(96).float(), torch.from_numpy(one.motion[:, 7])
    source = torch.stack([grid - flow[:, 1], grid[:, None] - flow[:, 0]], dim=-1)
    pulled = torch.nn.functional.grid_sample(one.x[:, :, 0], (source + 0.5) / 48 - 1, align_corners=False)[:, 0].numpy()
    inside = one.masks[:, 7] > 0
    assert ((pulled - one.videos[:, 7]) ** 2)[inside].mean() < 0.4 * ((one.videos[:, 0] - one.videos[:, 7]) ** 2)[inside].mean()


def test_heart_fits_into_the_picture(films):
    edge = np.concatenate([films.masks[:, :, 0].ravel(), films.masks[:, :, -1].ravel(), films.masks[..., 0].ravel(), films.masks[..., -1].ravel()])
    assert (edge > 0).mean() < 0.01


# ---------------------------------------------------------------- measures


def rings(inner=10.0, outer=15.0, right=(24, 48), size=96):
    "A disc in a ring, and a square right ventricle to the left."
    y, x = np.indices((size, size)) - (size - 1) / 2
    r = np.hypot(x, y)
    mask = np.where(r < inner, LABELS["LV"], np.where(r < outer, LABELS["myocardium"], 0)).astype(np.uint8)
    row, column = right
    mask[row - 6 : row + 6, column - 6 : column + 6] = LABELS["RV"]
    return mask


def test_measures_of_a_known_mask():
    full, empty = rings(right=(48, 20)), rings(inner=6.0, right=(48, 20))
    seen = measure_masks(np.stack([full, empty, full])[None], 2.0, 0.1)
    assert list(seen) == list(MEASURES)
    assert seen.area_LV_ED[0] == pytest.approx(np.pi * 400, rel=0.02) and seen.area_change[0] == pytest.approx(64, abs=2) and seen.time_ES[0] == pytest.approx(0.1)
    assert seen.area_RV_ED[0] == 144 * 4 and seen.area_RV_change[0] == 0 and np.allclose(seen.filter(like="thickness"), 10, rtol=0.08)


def test_thickness_turns_with_the_right_ventricle():
    y, x = np.indices((96, 96)) - 47.5
    r, left = np.hypot(x, y), x < 0
    mask = np.where(r < 12, 3, np.where(r < np.where(left, 24, 18), 2, 0)).astype(np.uint8)
    mask[40:56, 4:16] = 1                                              # to the left: the thick half is the septum
    for turn in range(4):
        seen = measure_masks(np.rot90(mask, turn)[None, None], 1.0, 0.1)
        assert seen.thickness_8[0] == pytest.approx(12, abs=1) and seen.thickness_9[0] == pytest.approx(12, abs=1) and seen.thickness_11[0] == pytest.approx(6, abs=1)


def test_measures_of_what_is_not_there():
    seen = measure_masks(np.zeros((2, 5, 20, 20), np.uint8), 1.0, np.nan)
    assert seen.isna().all().all()
    only = rings(right=(48, 20))
    only[only == LABELS["RV"]] = 0
    seen = measure_masks(np.stack([only] * 3)[None], 1.0, 0.1)
    assert np.isnan(seen.area_RV_ED[0]) and np.isnan(seen.area_RV_change[0]) and seen.thickness_8[0] == pytest.approx(5, abs=0.6)
    with pytest.raises(ValueError, match="n, frames, h, w"):
        measure_masks(only, 1.0, 0.1)


def test_unlabelled_frames_are_left_out():
    full, empty = rings(right=(48, 20)), rings(inner=6.0, right=(48, 20))
    seen = measure_masks(np.stack([full, np.full_like(full, UNLABELLED), empty])[None], 1.0, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = measure_masks(np.stack([full, np.full_like(full, UNLABELLED), empty])[None], 1.0, 0.1)
    assert seen.area_change[0] == pytest.approx(64, abs=2) and seen.time_ES[0] == pytest.approx(0.2) and np.isnan(seen.jitter[0]) and again.equals(seen)


# ---------------------------------------------------------------- ACDC


def save(file: Path, array: np.ndarray, zooms) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_zooms(zooms)
    nibabel.save(image, file)
    return file


def stack_of(film: np.ndarray, slices: int = 3) -> np.ndarray:
    "ACDC's order (columns, rows, slices, frames) out of (frames, rows, columns); outer slices are dimmer."
    weight = 1 - 0.3 * np.abs(np.linspace(-1, 1, slices))
    return (film.transpose(2, 1, 0)[:, :, None] * weight[:, None] + 2).astype(np.float32)


@pytest.fixture
def acdc(tmp_path):
    "Two patients, the second without masks; the films begin two frames before end-diastole."
    made = simulate_hearts(2, 12, 64, seed=8, groups=["DCM", "NOR"])
    for k, name in enumerate(("patient001", "patient002")):
        folder = tmp_path / "training" / name
        film, masks = np.roll(made.videos[k], 2, axis=0), np.roll(made.masks[k], 2, axis=0)
        save(folder / f"{name}_4d.nii.gz", stack_of(film), (2.1, 2.1, 10, 0.05))
        (folder / "Info.cfg").write_text(f"ED: 3\nES: 7\nGroup: {made.groups[k]}\nHeight: 170.0\nNbFrame: 12\nWeight: 70.0\n")
        for number in (3, 7) if k == 0 else ():
            save(folder / f"{name}_frame{number:02d}.nii.gz", stack_of(film)[..., number - 1], (2.1, 2.1, 10))
            save(folder / f"{name}_frame{number:02d}_gt.nii.gz", np.repeat(masks[number - 1].T[:, :, None], 3, axis=2), (2.1, 2.1, 10))
    return tmp_path, made


def test_acdc(acdc):
    root, made = acdc
    records, rejected = read_acdc(root)
    assert not rejected and not check_acdc(root) and [r.patient for r in records] == ["patient001", "patient002"] and [r.group for r in records] == ["DCM", "NOR"]
    one = records[0]
    assert one.volume.shape == (12, 3, 64, 64) and one.start == 2 and set(one.masks) == {2, 6} and one.spacing == pytest.approx((2.1, 2.1)) and one.frame_time == pytest.approx(0.05)
    assert one.fields["Height"] == "170.0" and one.phenotypes["LVEDV"] == pytest.approx((one.masks[2] == 3).sum() * 2.1 * 2.1 * 10 / 1000, rel=1e-4)
    assert one.phenotypes["LVEF"] < 60 and not records[1].phenotypes
    ready = prepare(records, 12, 64, 2.1)
    assert ready.videos.shape == (2, 12, 64, 64) and np.allclose(ready.spacing, 2.1) and np.isnan(ready.phenotypes.loc[1]).all() and np.allclose(ready.frame_time, 0.05)
    assert [np.corrcoef(ready.videos[k, 0].ravel(), np.roll(made.videos[k, 0], 0).ravel())[0, 1] > 0.5 for k in range(2)] == [True, True]
    assert (ready.masks[0, [0, 4]] != UNLABELLED).all() and (ready.masks[0, [1, 2, 3, 5]] == UNLABELLED).all() and (ready.masks[1] == UNLABELLED).all()


def test_acdc_in_two_trees(acdc):
    "Films cut to a box and with spacing lost, whole frames elsewhere."
    root, _ = acdc
    film_file = root / "training" / "patient001" / "patient001_4d.nii.gz"
    film = np.asarray(nibabel.load(film_file).dataobj)
    row, column, first = ACDC_BOX
    whole = lambda part: np.pad(part, ((column, 9), (row, 9), (first, 1)))
    whole_x = lambda part: np.pad(part, ((column, 9), (row, 9), (first, 1)), constant_values=7)
    for number in (3, 7):
        for kind, pad in (("", whole_x), ("_gt", whole)):
            old = root / "training" / "patient001" / f"patient001_frame{number:02d}{kind}.nii.gz"
            save(root / "frames" / "patient001" / old.name, pad(np.asarray(nibabel.load(old).dataobj)), (1.9, 1.9, 8))
            old.unlink()
    save(film_file, film, (1, 1, 1, 1))
    records, rejected = read_acdc(root)
    assert not rejected and records[0].masks[2].shape == (3, 64, 64) and records[0].spacing == pytest.approx((1.9, 1.9))
    assert records[0].phenotypes["LVEDV"] == pytest.approx((records[0].masks[2] == 3).sum() * 1.9 * 1.9 * 8 / 1000, rel=1e-4)
    (root / "frames" / "patient001" / "patient001_frame03.nii.gz").unlink()                # without the picture nobody knows where the box lies
    assert any("its shape" in problem.where for problem in check_acdc(root))


def test_acdc_spacing_that_nobody_knows(acdc):
    root, _ = acdc
    file = root / "training" / "patient002" / "patient002_4d.nii.gz"
    save(file, np.asarray(nibabel.load(file).dataobj), (1, 1, 1, 1))
    record = read_acdc(root)[0][1]
    assert record.flags == ("spacing unknown",) and np.isnan(record.spacing).all() and np.isnan(record.frame_time)
    assert np.isfinite(prepare([record]).videos).all()


def spoil_acdc(folder: Path, what: str) -> None:
    "Break the film, the masks or the text of patient001."
    film, gt = folder / "patient001_4d.nii.gz", folder / "patient001_frame03_gt.nii.gz"
    array, mask = (np.asarray(nibabel.load(file).dataobj) for file in (film, gt))
    if what == "truncated":
        film.write_bytes(film.read_bytes()[:5000])
    elif what == "empty":
        film.write_bytes(b"")
    elif what == "3-D":
        save(film, array[..., 0], (2.1, 2.1, 10))
    elif what == "few":
        save(film, array[..., :5], (2.1, 2.1, 10, 0.05))
    elif what == "nan":
        array = array.copy()
        array[3, 3, 1, 1] = np.nan
        save(film, array, (2.1, 2.1, 10, 0.05))
    elif what == "flat":
        save(film, np.zeros_like(array), (2.1, 2.1, 10, 0.05))
    elif what == "zero spacing":
        raw = nibabel.Nifti1Image(array, np.eye(4))
        raw.header["pixdim"][2] = 0
        plain = folder / "patient001_4d.nii"
        content = bytearray(raw.to_bytes())
        content[80:84] = bytes(4)
        film.unlink()
        plain.write_bytes(bytes(content))
    elif what == "mask shape":
        save(gt, mask[:-2], (2.1, 2.1, 10))
    elif what == "mask values":
        save(gt, mask + 4, (2.1, 2.1, 10))
    elif what == "twice":
        save(folder.parent / "copy" / film.name, array, (2.1, 2.1, 10, 0.05))
    elif what == "no film":
        film.unlink()
    elif what == "NbFrame":
        (folder / "Info.cfg").write_text("ED: 3\nES: 7\nGroup: DCM\nNbFrame: 30\n")
    elif what == "ED":
        (folder / "Info.cfg").write_text("ED: first\nES: 7\nGroup: DCM\nNbFrame: 12\n")


@pytest.mark.parametrize("what, word", [
    ("truncated", "cannot be read"), ("empty", "cannot be read"), ("3-D", "4-D"), ("few", "at least 8"), ("nan", "NaN"), ("flat", "all the same"), ("zero spacing", "spacing"),
    ("mask shape", "shape"), ("mask values", "known"), ("twice", "one film"), ("no film", "there are 0"), ("NbFrame", "Info.cfg says 30"), ("ED", "no frame number")])
def test_acdc_that_is_broken(acdc, what, word):
    root, _ = acdc
    spoil_acdc(root / "training" / "patient001", what)
    records, rejected = read_acdc(root)
    assert [r.patient for r in records] == ["patient002"] and len(rejected) == 1 and word in str(rejected[0]), str(rejected[0])
    assert [str(p) for p in check_acdc(root)] == [str(p) for p in rejected]


def test_nothing_to_read(tmp_path):
    for reader, checker in ((read_acdc, check_acdc), (read_ukb, check_ukb)):
        with pytest.raises(BadRecord, match="the whole folder"):
            reader(tmp_path)
        assert len(checker(tmp_path)) == 1
    with pytest.raises(ValueError, match="read a data set first"):
        prepare([])


# ---------------------------------------------------------------- UK Biobank


@pytest.fixture
def ukb(tmp_path):
    made = simulate_hearts(3, 16, 48, seed=9)
    write_nifti(made.videos, tmp_path, made.spacing, made.frame_time, ["1001", "1002", "1003"], made.phenotypes)
    return tmp_path, made


def test_ukb_there_and_back(ukb):
    root, made = ukb
    records, rejected = read_ukb(root)
    assert not rejected and not check_ukb(root) and [r.patient for r in records] == ["1001", "1002", "1003"]
    assert all(np.array_equal(r.volume[:, 0], video) for r, video in zip(records, made.videos))
    assert np.allclose([r.frame_time for r in records], made.frame_time) and np.allclose([r.spacing for r in records], 2.8)
    ready = prepare(records, 16, 48)
    assert np.allclose(ready.phenotypes, made.phenotypes) and ready.masks is None and np.allclose(ready.frame_time, made.frame_time) and np.abs(ready.videos).max() == 1


def test_ukb_with_names_of_the_literature(ukb):
    root, made = ukb
    file = root / "phenotypes.csv"
    text = pd.read_csv(file, dtype=str).set_index("subject")
    text.columns = [name.replace("_", "_AHA_", 1) + f" ({p.unit})" if name[:2] in ("WT", "Ec", "Er") and name[-1].isdigit() else f"{name} ({p.unit})" for name, p in PHENOTYPES.items()]
    text = text.rename(columns={"LAVmax (mL)": "LAV max (mL)", "AAo_max (mm2)": "AAo max area (mm2)", "Ecc_global (%)": "Ecc_Global (%)", "AAo_distensibility (1/1000 mmHg)": "AAo distensibility (10-3 mmHg-1)"})
    text.iloc[1, 3] = ""
    text.assign(age=60).to_csv(file)
    records, rejected = read_ukb(root)
    assert not rejected and "LVEF" not in records[1].phenotypes and records[0].phenotypes["WT_8"] == pytest.approx(made.phenotypes.WT_8[0])
    assert tidy_name("RAV min (mL)") == "RAVmin" and tidy_name("sex") == "sex" and np.isnan(prepare(records).phenotypes.LVEF[1])


def spoil_ukb(root: Path, made, what: str) -> None:
    table, film = root / "phenotypes.csv", root / "1001.nii.gz"
    lines = table.read_text().splitlines()
    if what == "truncated":
        film.write_bytes(film.read_bytes()[:4000])
    elif what == "no row":
        table.write_text("\n".join(line for line in lines if not line.startswith("1001")))
    elif what == "short row":
        table.write_text("\n".join(line.rsplit(",", 2)[0] if line.startswith("1001") else line for line in lines))
    elif what == "no number":
        table.write_text("\n".join(line.rsplit(",", 1)[0] + ",thick" if line.startswith("1001") else line for line in lines))
    elif what == "row twice":
        table.write_text("\n".join([*lines, lines[1]]))
    elif what == "film twice":
        (root / "again").mkdir()
        (root / "again" / film.name).write_bytes(film.read_bytes())
    elif what == "no film":
        film.unlink()
    elif what == "stack":
        save(film, np.repeat(made.videos[0].transpose(2, 1, 0)[:, :, None], 2, axis=2), (2.8, 2.8, 8, 0.03))
    elif what == "2-D":
        save(film, made.videos[0, 0].T, (2.8, 2.8))
    elif what == "few":
        save(film, made.videos[0, :6].transpose(2, 1, 0), (2.8, 2.8, 0.03))
    elif what == "nan":
        save(film, np.full((48, 48, 16), np.nan, np.float32), (2.8, 2.8, 0.03))


@pytest.mark.parametrize("what, word, kept", [
    ("truncated", "cannot be read", 2), ("no row", "has no row", 2), ("short row", "values, and the header has", 2), ("no number", "thick", 2),
    ("row twice", "has a row already", 3), ("film twice", "has a film already", 3), ("no film", "there is no film", 2), ("stack", "one slice over time", 2), ("2-D", "one slice over time", 2),
    ("few", "at least 8", 2), ("nan", "NaN", 2)])
def test_ukb_that_is_broken(ukb, what, word, kept):
    root, made = ukb
    spoil_ukb(root, made, what)
    records, rejected = read_ukb(root)
    assert len(records) == kept and any(word in str(problem) for problem in rejected), [str(p) for p in rejected]
    assert 1 <= len(check_ukb(root)) <= 2


def test_ukb_table_without_columns(ukb):
    root, _ = ukb
    pd.read_csv(root / "phenotypes.csv").drop(columns=["LVEF", "WT_3"]).to_csv(root / "phenotypes.csv", index=False)
    with pytest.raises(BadRecord, match="2 phenotypes have no column, LVEF, WT_3"):
        read_ukb(root)


def test_time_as_third_axis(tmp_path):
    made = simulate_hearts(1, 16, 48, seed=9)
    save(tmp_path / "7.nii.gz", made.videos[0].transpose(2, 1, 0), (2.8, 2.8, 31.0))              # milliseconds
    made.phenotypes.set_axis(pd.Index(["7"], name="eid")).to_csv(tmp_path / "phenotypes.csv")
    (record,), rejected = read_ukb(tmp_path)
    assert not rejected and record.volume.shape == (16, 1, 48, 48) and record.frame_time == pytest.approx(0.031)


# ---------------------------------------------------------------- preparation, files


def test_the_heart_is_found_where_it_beats():
    made = simulate_hearts(12, 16, 48, seed=1)
    off = []
    for video, mask in zip(made.videos, made.masks):
        padded = np.pad(video, ((0, 0), (30, 2), (4, 25)), constant_values=-1)[:, None]
        chosen, row, column = find_heart(CineRecord(padded, (2.8, 2.8), 0.03, "x"), (2.8, 2.8))
        rows, columns = np.nonzero(mask[0])
        off.append(np.hypot(row - 30 - (rows.min() + rows.max()) / 2, column - 4 - (columns.min() + columns.max()) / 2) * 2.8)
        assert chosen == 0
    assert np.mean(off) < 12 and max(off) < 30, off


def test_retime_keeps_the_beat():
    t = np.arange(30) / 30
    film = np.cos(2 * np.pi * t)[:, None, None].astype(np.float32) * np.ones((1, 2, 2), np.float32)
    assert np.allclose(retime(film, 20, 0)[:, 0, 0], np.cos(2 * np.pi * np.arange(20) / 20), atol=0.03)
    assert np.allclose(retime(np.roll(film, 7, axis=0), 30, 7), film) and np.allclose(retime(film, 30, 0), film)


def test_prepare_changes_spacing():
    made = simulate_hearts(2, 16, 96, seed=1)
    records = [CineRecord(np.ascontiguousarray(video[:, None]) * 300 + 400, (1.4, 1.4), 0.04, str(k), masks={0: mask[:1], 6: mask[6:7]}) for k, (video, mask) in enumerate(zip(made.videos, made.masks))]
    ready = prepare(records, 16, 48)
    assert np.allclose(ready.spacing, 2.8) and np.quantile(ready.videos[0], 0.995) == 1 and ready.videos.min() == -1
    here, there = measure_masks(made.masks[:, [0, 6]], 1.4, 0.04), measure_masks(ready.masks[:, [0, 6]], 2.8, 0.04)
    assert np.allclose(here.area_LV_ED, there.area_LV_ED, rtol=0.05) and np.allclose(here.area_change, there.area_change, atol=4)


def test_write_nifti(tmp_path):
    made = simulate_hearts(2, 8, 32, seed=1)
    files = write_nifti(made.videos, tmp_path / "out", 4.2, 0.05)
    array, steps, tick = read_nifti(files[1])
    assert [f.name for f in files] == ["video_00000.nii.gz", "video_00001.nii.gz"] and array.shape == (32, 32, 1, 8) and steps[:2] == pytest.approx((4.2, 4.2)) and tick == pytest.approx(0.05)
    assert np.array_equal(array[:, :, 0].transpose(2, 1, 0), made.videos[1]) and np.isnan(read_nifti(write_nifti(made.videos[0], tmp_path, 4.2, np.nan)[0])[2])
    with pytest.raises(ValueError, match="must be as many"):
        write_nifti(made.videos, tmp_path, 4.2, 0.05, ["one"])


def test_write_gif(tmp_path):
    made = simulate_hearts(3, 8, 32, seed=1)
    write_gif(made.videos, tmp_path / "film.gif", zoom=2, columns=2)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 8 and film.size == (128, 128)
    content = io.BytesIO()
    write_gif(simulate_hearts(7, seed=2).videos, content)
    assert len(content.getvalue()) < 60 * 1024


# ---------------------------------------------------------------- real films


@needs_real
def test_real_acdc():
    records, rejected = read_acdc(REAL)
    assert not rejected and len(records) == 31 and {r.group for r in records} == {"DCM", "HCM", "MINF", "NOR", "RV"}
    drawn = {r.patient: r for r in records if r.masks}
    assert set(drawn) == {"patient007", "patient016", "patient020"} and all(r.phenotypes["LVEF"] < 40 for r in drawn.values())
    assert sum("spacing unknown" in r.flags for r in records) > 10 and drawn["patient016"].spacing == pytest.approx((1.445, 1.445), abs=1e-3)
    ready = prepare(records)
    assert ready.videos.shape == (31, 20, 48, 48) and np.isfinite(ready.videos).all() and (ready.videos.std((1, 2, 3)) > 0.1).all()
    seen = measure_masks(ready.masks, ready.spacing, ready.frame_time)
    assert seen.area_LV_ED.notna().sum() == 3 and (seen.area_change.dropna() < 30).all()
