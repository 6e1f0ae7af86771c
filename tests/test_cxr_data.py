"Chest films: twins that differ only where they should, readers that say what is wrong."

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medgen_nb.cxr.data import (
    CHEXPERT_CODES,
    CHEXPERT_OTHERS,
    CLOUD_RANGE,
    FINDINGS,
    NIH_CODES,
    NIH_OTHERS,
    PLACES,
    SEEN,
    SQUARE,
    SQUARE_HEIGHT,
    ZONES,
    ChestRecord,
    as_window,
    check_chexpert,
    check_covid_chestxray,
    check_covid_radiography,
    check_nih,
    crop_square,
    in_window,
    labels_of_chexpert,
    labels_of_cohen,
    prepare,
    prompt_of,
    read_chexpert,
    read_covid_chestxray,
    read_covid_radiography,
    read_grey,
    read_mask,
    read_nih,
    report_of,
    same_people,
    simulate_films,
    simulate_vagan,
)
from medgen_nb.data import BadRecord

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "cxr"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real samples are not here ({REAL.name} beside the checkout)")


@pytest.fixture(scope="module")
def films():
    return simulate_films(280, seed=5, findings=list(FINDINGS) * 40)


# ---------------------------------------------------------------- names


def test_findings_and_texts():
    assert list(FINDINGS) == ["covid", "opacity", "viral", "effusion", "nodule", "cardiomegaly", "pneumothorax"]
    assert PLACES == ("left upper zone", "left lower zone", "right upper zone", "right lower zone", "both lungs", "heart")
    assert all(set(finding.places) <= set(PLACES) for finding in FINDINGS.values())
    assert prompt_of("normal") == "chest film, no finding" and prompt_of("square") == "chest film, bright square"
    assert prompt_of("opacity", "right lower zone") == "chest film, lobar consolidation, right lower zone"
    for function in (prompt_of, report_of):
        with pytest.raises(ValueError, match="influenza"):
            function("influenza")


@pytest.mark.parametrize("code", ["normal", *FINDINGS])
def test_reports_say_finding_place_and_degree(code):
    for k in range(12):
        place = FINDINGS[code].places[k % len(FINDINGS[code].places)] if code in FINDINGS else ""
        said = report_of(code, place, 0.95 if code in FINDINGS else math.nan, k)
        assert said[0].isupper() and said.endswith(".") and "{" not in said and "  " not in said
        assert place in ("", "heart") or place in said
        assert code == "normal" or "severe" in said.lower()
        vague = report_of(code, rng=k)
        assert vague.endswith(".") and not any(word in vague.lower() for word in ("mild", "moderate", "severe", " ,", " .", "in density", "with ."))
    assert len({report_of(code, rng=k) for k in range(20)}) >= 2


# ---------------------------------------------------------------- simulated films


def test_the_set(films):
    assert films.films.shape == (280, 64, 64) and films.films.dtype == np.float32 and np.abs(films.films).max() <= 1
    assert films.x.shape == (280, 1, 64, 64) and films.x.data_ptr() == torch.from_numpy(films.films).data_ptr()
    assert list(films.labels) == list(FINDINGS) and (films.labels.sum(axis=1) == 1).all() and not films.normal.any()
    assert films.main.tolist() == list(FINDINGS) * 40 and len(set(films.patients)) == 280
    assert all(place in FINDINGS[code].places for code, place in zip(films.main, films.places))
    some = films.rows(films.main == "nodule")
    assert len(some) == 40 and (some.labels.nodule == 1).all() and some.labels.index.tolist() == list(range(40)) and len(some.lesions) == len(some.healthy) == 40
    assert films.rows(slice(0, 3)).fingerprint == simulate_films(3, seed=5, findings=list(FINDINGS)[:3]).fingerprint != films.rows(slice(1, 4)).fingerprint


def test_a_twin_differs_only_at_the_finding(films):
    effect = films.films - films.healthy
    assert (films.lesions == (np.abs(effect) > SEEN)).all() and films.lesions.any((1, 2)).all()
    for code, least, most in (("covid", 0.2, 0.5), ("opacity", 0.2, 0.55), ("viral", 0.12, 0.4), ("effusion", 0.3, 0.7), ("nodule", 0.2, 0.5),
                              ("cardiomegaly", 0.3, 0.65), ("pneumothorax", 0.15, 0.4)):
        rows = films.main == code
        inside = np.array([np.abs(e)[where].mean() for e, where in zip(effect[rows], films.lesions[rows])])
        assert least < inside.mean() < most, (code, inside.mean())
        assert (effect[rows] == 0).mean() > 0.7
    dark = films.main == "pneumothorax"
    assert effect[dark].sum() < 0 and (effect[~dark].sum((1, 2)) > 0).all()
    assert (films.lesions[films.main == "nodule"].sum((1, 2)) >= 7).all()                   # three pixels across


def test_findings_lie_where_they_should(films):
    rows, columns = np.indices((64, 64))
    for code, place, where in zip(films.main, films.places, films.lesions):
        left = columns[where].mean() > 31.5                                                # the patient's left is right in the picture
        if place.startswith(("left", "right")):
            assert left == place.startswith("left"), (code, place)
    for code in ("covid", "opacity", "nodule"):
        height = {half: np.mean([rows[where].mean() for place, where in zip(films.places[films.main == code], films.lesions[films.main == code]) if half in place])
                  for half in ("upper", "lower")}
        assert height["upper"] + 8 < height["lower"], (code, height)
    heart = films.lesions[films.main == "cardiomegaly"]
    assert (heart & films.lungs[films.main == "cardiomegaly"]).any((1, 2)).all()           # a larger heart takes lung of the twin
    assert 0.15 < films.lungs.mean() < 0.4 and films.films[films.lungs].mean() < films.films[:, 56:].mean() - 0.5


def test_a_person_stays_the_same():
    base = simulate_films(6, seed=4)
    for code in ("normal", *FINDINGS):
        other = simulate_films(6, seed=4, findings=code)
        assert np.array_equal(other.healthy, base.healthy) and np.array_equal(other.lungs, base.lungs)
    many = simulate_films(40, seed=4)
    assert np.array_equal(many.films[:6], base.films) and (many.reports[:6] == base.reports).all()
    assert not np.array_equal(simulate_films(6, seed=5).healthy, base.healthy)
    elsewhere = simulate_films(6, seed=4, population=2)
    assert not np.array_equal(elsewhere.healthy, base.healthy) and not set(elsewhere.patients) & set(base.patients)


def test_mix_and_normals():
    some = simulate_films(320, seed=8)
    assert 0.32 < some.normal.mean() < 0.46 and set(some.main) == {"normal", *FINDINGS}
    assert np.array_equal(some.films[some.normal], some.healthy[some.normal]) and not some.lesions[some.normal].any()
    assert (some.severity[some.normal] == 0).all() and (some.severity[~some.normal] >= 0.4).all() and (some.places[some.normal] == "").all()


@pytest.mark.parametrize("code", list(FINDINGS))
def test_more_severe_is_more(code):
    doses = [np.abs((s := simulate_films(8, seed=3, findings=code, given={"severity": severity, "place": FINDINGS[code].places[0]})).films - s.healthy).sum()
             for severity in (0.1, 0.4, 0.7, 1.0)]
    assert (np.diff(doses) > 0).all() and doses[0] < 0.7 * doses[-1]
    if code != "cardiomegaly":
        none = simulate_films(2, seed=3, findings=code, given={"severity": 0.0})
        assert np.array_equal(none.films, none.healthy)


def test_places_and_severities_are_obeyed():
    given = simulate_films(8, seed=3, findings="opacity", given={"place": list(ZONES) * 2, "severity": np.linspace(0.3, 1, 8)})
    assert given.places.tolist() == list(ZONES) * 2 and np.allclose(given.severity, np.linspace(0.3, 1, 8))
    assert simulate_films(2, seed=3, findings=["normal", "nodule"], given={"place": "left upper zone"}).places.tolist() == ["", "left upper zone"]


@pytest.mark.parametrize("size", [96, 128])
def test_other_sizes_show_the_same_person(size):
    small, large = simulate_films(7, seed=2, findings=list(FINDINGS)), simulate_films(7, size=size, seed=2, findings=list(FINDINGS))
    shrunk = torch.nn.functional.interpolate(large.x, size=(64, 64), mode="area")[:, 0].numpy()
    assert np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(shrunk, small.films)]) > 0.98
    assert np.allclose(large.lesions.mean((1, 2)), small.lesions.mean((1, 2)), atol=0.05)


@pytest.mark.parametrize("wrong, words", [
    ({"n": 0}, "at least 1"), ({"size": 16}, "32"), ({"findings": "flu"}, "flu"), ({"findings": ["covid"] * 3}, "3 findings"), ({"given": {"age": 3}}, "age"),
    ({"given": {"severity": 1.5}}, "0...1"), ({"given": {"severity": [0.5] * 3}}, "0...1"), ({"given": {"place": ["heart"]}}, "1 places"),
    ({"findings": "cardiomegaly", "given": {"place": "both lungs"}}, "cannot be given"),
])
def test_what_cannot_be_asked_for(wrong, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        simulate_films(**({"n": 4} | wrong))


def test_hospitals_differ_and_findings_can_be_learnt():
    one, other = simulate_films(40, seed=1, findings="normal"), simulate_films(40, seed=1, population=1, findings="normal")
    assert abs(one.films.std((1, 2)).mean() - other.films.std((1, 2)).mean()) > 0.02
    some = simulate_films(300, seed=12, findings=["normal", "effusion", "cardiomegaly"] * 100)
    thumbs = some.films.reshape(-1, 16, 4, 16, 4).mean((2, 4)).reshape(300, -1)
    for code in ("effusion", "cardiomegaly"):
        model = LogisticRegression(C=0.3, max_iter=2000).fit(thumbs[:200], some.labels[code][:200])
        assert roc_auc_score(some.labels[code][200:], model.decision_function(thumbs[200:])) > 0.9


def test_squares():
    clouds = simulate_vagan(40, seed=2)
    assert clouds.films.shape == (40, 112, 112) and clouds.main.tolist().count("square") == 20 and clouds.normal.sum() == 20 and list(clouds.labels) == ["square"]
    effect = (clouds.films - clouds.healthy)[~clouds.normal]
    assert np.isclose(np.median(effect[clouds.lesions[~clouds.normal]]), SQUARE_HEIGHT / CLOUD_RANGE, atol=1e-3) and (effect[~clouds.lesions[~clouds.normal]] == 0).all()
    sizes = clouds.lesions.sum((1, 2))
    assert set(sizes[clouds.normal]) == {0} and set(sizes[~clouds.normal]) == {2 * SQUARE**2} and clouds.lesions[~clouds.normal][:, 46:66, 46:66].all()
    assert np.isclose((clouds.healthy * CLOUD_RANGE).std((1, 2)), 50, rtol=0.02).all()
    small = simulate_vagan(40, size=56, seed=2)
    assert np.allclose(small.lesions.mean((1, 2)), clouds.lesions.mean((1, 2)), atol=0.01) and (small.labels.square == clouds.labels.square).all()
    assert np.array_equal(simulate_vagan(6, seed=2).healthy, clouds.healthy[:6])
    with pytest.raises(ValueError, match="16"):
        simulate_vagan(3, size=8)


# ---------------------------------------------------------------- pictures


def picture(file: Path, size=(64, 64), mode: str = "L", seed: int = 0) -> Path:
    "Something that is no constant."
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), dtype=np.uint8)
    image = Image.fromarray(noise.astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(file)
    return file


@pytest.mark.parametrize("mode, said", [("L", ()), ("RGB", ("colour to grey",)), ("RGBA", ("colour to grey, alpha dropped",)), ("I;16", ("16 bits",)), ("P", ("palette to grey",)), ("LA", ("alpha dropped",))])
def test_modes_are_converted_and_named(tmp_path, mode, said):
    grey, flags = read_grey(picture(tmp_path / "a.png", mode=mode))
    assert grey.shape == (64, 64) and grey.dtype == np.float32 and flags == said
    assert np.corrcoef(grey.ravel(), read_grey(picture(tmp_path / "b.png"))[0].ravel())[0, 1] > 0.99


def test_broken_pictures(tmp_path):
    file = picture(tmp_path / "a.png")
    file.write_bytes(file.read_bytes()[:800])
    Image.new("L", (64, 64), 7).save(tmp_path / "flat.png")
    picture(tmp_path / "tiny.png", (20, 20))
    picture(tmp_path / "long.png", (400, 64))
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (("a", "cannot be read"), ("flat", "all the same"), ("tiny", "at least 32"), ("long", "nearly square"), ("text", "cannot be read"), ("absent", "cannot be read")):
        with pytest.raises(BadRecord, match=words):
            read_grey(tmp_path / f"{name}.png")


def test_masks_of_another_size(tmp_path):
    Image.fromarray(np.pad(np.full((128, 128), 255, np.uint8), ((0, 128), (0, 128)))).save(tmp_path / "m.png")
    mask, flags = read_mask(tmp_path / "m.png", (299, 299))
    assert mask.shape == (299, 299) and abs(mask.mean() - 0.25) < 0.01 and mask[:148, :148].all() and flags == ("mask resampled",)
    assert read_mask(tmp_path / "m.png", (256, 256))[1] == ()
    with pytest.raises(BadRecord, match="the film has"):
        read_mask(tmp_path / "m.png", (256, 300))


def test_prepare(tmp_path):
    records = [ChestRecord(picture(tmp_path / "a.png", (100, 80)), "1", {"nodule": 1.0, "Hernia": 0.0}), ChestRecord(picture(tmp_path / "b.png", mode="RGB"), "2", {"nodule": math.nan}),
               ChestRecord(picture(tmp_path / "c.png"), "2", {}, view="lateral"), ChestRecord(tmp_path / "d.png", "3", {"nodule": 0.0})]
    ready = prepare(records, 64)
    assert len(ready) == 2 and ready.films.min() == -1 and ready.films.max() == 1 and ready.labels.columns.tolist() == ["nodule", "Hernia"]
    assert ready.notes == {"cropped to a square": 1, "no lung mask": 2, "colour to grey": 1, "left out: lateral": 1} and len(ready.rejected) == 1
    assert ready.main.tolist() == ["nodule", "unknown"] and ready.lungs is None and ready.healthy is None and ready.rows([1]).notes == ready.notes
    assert len(prepare(records[:3], views=("", "lateral"))) == 3
    with pytest.raises(BadRecord):
        prepare(records, strict=True)
    with pytest.raises(ValueError, match="left out: lateral"):
        prepare(records[2:3])
    assert crop_square(np.arange(12).reshape(2, 6)).tolist() == [[2, 3], [8, 9]]


# ---------------------------------------------------------------- COVID-19 Radiography


def test_covid_radiography(tmp_path):
    for k, name in enumerate(("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")):
        picture(tmp_path / name / "images" / f"{name}-1.png", (299, 299), seed=k)
        (tmp_path / name / "masks").mkdir()
        Image.fromarray(np.full((256, 256), 255, np.uint8)).convert("RGB").save(tmp_path / name / "masks" / f"{name}-1.png")
    assert not check_covid_radiography(tmp_path)
    records, rejected = read_covid_radiography(tmp_path)
    ready = prepare(records, 32, rejected)
    assert sorted(ready.main) == ["covid", "normal", "opacity", "viral"] and ready.labels.notna().all(axis=None) and ready.lungs.all() and ready.notes["mask resampled"] == 4
    (tmp_path / "COVID" / "images" / "COVID-1.png").unlink()
    Image.new("L", (256, 200)).save(tmp_path / "Normal" / "masks" / "Normal-1.png")
    picture(tmp_path / "Normal" / "images" / "Normal-2.png")
    assert [Path(problem.file).name for problem in check_covid_radiography(tmp_path)] == ["COVID-1.png", "Normal-1.png"]
    assert prepare(*read_covid_radiography(tmp_path)[:1]).notes["no lung mask"] == 1
    with pytest.raises(BadRecord, match="none of COVID/images"):
        read_covid_radiography(tmp_path / "COVID")


# ---------------------------------------------------------------- COVID chest X-ray


def write_table(file: Path, rows: list[dict], ending: str = "") -> None:
    "A csv; `ending` is put behind the header, as the official one has a comma there."
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        opened.write(",".join(rows[0]) + ending + "\n")
        writer.writerows(rows)


def cohen(name: str, patient: str, finding: str, view: str = "PA", modality: str = "X-ray") -> dict:
    return {"patientid": patient, "finding": finding, "view": view, "modality": modality, "folder": "images", "filename": name, "clinical_notes": "fever, cough"}


def test_covid_chestxray(tmp_path):
    rows = [cohen("a.png", "1", "Pneumonia/Viral/COVID-19"), cohen("b.png", "2", "No Finding"), cohen("b.png", "3", "No Finding"), cohen("c.png", "3", "Pneumonia"),
            cohen("d.png", "4", "COVID-19", "L"), cohen("e.png", "5", "COVID-19", "Axial", "CT"), cohen("gone.png", "6", "COVID-19"), cohen("two.png", "7", "SARS"), cohen("two.png", "7", "COVID-19")]
    write_table(tmp_path / "metadata.csv", rows, ",")
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.png")
    picture(tmp_path / "images" / "stray.jpg")
    picture(tmp_path / "images" / "two.png")
    (tmp_path / "annotations" / "lungVAE-masks").mkdir(parents=True)
    Image.new("L", (64, 64), 255).save(tmp_path / "annotations" / "lungVAE-masks" / "a_mask.png")
    records, rejected = read_covid_chestxray(tmp_path)
    assert sorted(problem.where for problem in rejected) == ["the picture", "the row of gone.png", "the rows of two.png"] and len(check_covid_chestxray(tmp_path)) == 3
    ready = prepare(records, 64, rejected)
    assert ready.main.tolist() == ["covid", "normal", "Pneumonia"] and ready.patients.tolist() == ["1", "2", "2"]       # 2 and 3 share a film
    assert ready.notes["left out: lateral"] == ready.notes["left out: CT"] == 1 and ready.notes["listed for several patients"] == 1 and ready.lungs[0].all() and not ready.lungs[1].any()
    write_table(tmp_path / "metadata.csv", [{"patientid": "1", "filename": "a.png"}])
    with pytest.raises(BadRecord, match="finding"):
        read_covid_chestxray(tmp_path)


def test_words_of_cohen():
    assert labels_of_cohen("COVID-19, ARDS") == labels_of_cohen("Pneumonia/Viral/COVID-19") == {"covid": 1.0, "viral": 0.0}
    assert labels_of_cohen("Pneumonia/Viral/SARS") == {"covid": 0.0, "viral": 1.0} and labels_of_cohen("Pneumonia/Bacterial/Legionella")["Legionella"] == 1
    assert math.isnan(labels_of_cohen("Pneumonia")["viral"]) and math.isnan(labels_of_cohen("todo")["covid"])


def test_people_under_two_names():
    assert same_people([("x", "b"), ("x", "c"), ("y", "c"), ("y", "a"), ("z", "d")]) == {"a": "a", "b": "a", "c": "a", "d": "d"}


# ---------------------------------------------------------------- NIH


NIH_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"


def test_nih(tmp_path):
    for k in range(5):
        picture(tmp_path / f"images_00{k % 2}" / "images" / f"0000000{k}_000.png", seed=k)
    said = ["No Finding", "Effusion|Infiltration", "Nodule", "Bunion", "No Finding|Mass", "Hernia"]
    lines = [f"0000000{k}_000.png,{words},0,{k // 2},60,M,PA,2500,2048,0.168,0.168" for k, words in enumerate(said)]
    table = tmp_path / "Data_Entry_2017.csv"
    table.write_text("\n".join([NIH_HEADER + ",", *(line + "," for line in lines)]))             # the official one ends its lines with a comma
    records, rejected = read_nih(tmp_path)
    assert [problem.reason.split()[0] for problem in rejected] == ["unknown", "No", "there"] and len(check_nih(tmp_path)) == 3
    ready = prepare(records, 64)
    assert ready.main.tolist() == ["normal", "effusion", "nodule"] and ready.labels.Infiltration.tolist() == [0, 1, 0] and ready.labels.shape == (3, 14) and ready.patients.tolist() == ["0", "0", "1"]
    assert set(NIH_CODES) | set(NIH_OTHERS) == {"Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule",
                                                "Pleural_Thickening", "Pneumonia", "Pneumothorax"}
    picture(tmp_path / "images_000" / "images" / "stray.png")
    table.write_text("\n".join([NIH_HEADER, lines[0], lines[0]]))
    assert {"this film has a row already", "no row of Data_Entry_2017.csv names it"} <= {problem.reason for problem in read_nih(tmp_path)[1]}
    table.write_text("Image Index,Patient ID\n")
    with pytest.raises(BadRecord, match="Finding Labels"):
        read_nih(tmp_path)
    table.unlink()
    with pytest.raises(BadRecord, match="0 tables"):
        read_nih(tmp_path)


# ---------------------------------------------------------------- CheXpert


def test_chexpert(tmp_path):
    names = ["No Finding", *CHEXPERT_CODES, *CHEXPERT_OTHERS]
    def row(path: str, side: str = "Frontal", **said) -> dict:
        return {"Path": f"CheXpert-v1.0-small/train/{path}", "Sex": "Male", "Age": "60", "Frontal/Lateral": side, "AP/PA": "AP" if side == "Frontal" else ""} | dict.fromkeys(names, "") | said
    rows = [row("patient00001/study1/view1_frontal.jpg", Cardiomegaly="1.0", Edema="-1.0", Pneumothorax="0.0"), row("patient00001/study1/view2_lateral.jpg", "Lateral"),
            row("patient00002/study1/view1_frontal.jpg", **{"No Finding": "1.0", "Support Devices": "1.0"}), row("patient00003/study1/view1_frontal.jpg", Edema="2"), row("patient00004/study1/view1_frontal.jpg")]
    write_table(tmp_path / "train.csv", rows)
    for each in rows[:4]:
        picture(tmp_path / Path(each["Path"]).relative_to("CheXpert-v1.0-small"))
    picture(tmp_path / "train" / "stray.jpg")
    records, rejected = read_chexpert(tmp_path)
    assert [problem.reason.split(";")[0] for problem in rejected] == ["Edema is '2'", "there is no such picture", "no row names it"] and len(check_chexpert(tmp_path)) == 3
    ready = prepare(records, 64, rejected)
    assert ready.patients.tolist() == ["patient00001", "patient00002"] and ready.labels.cardiomegaly.tolist() == [1, 0] and ready.labels.pneumothorax.tolist() == [0, 0]
    assert math.isnan(ready.labels.Edema[0]) and math.isnan(ready.labels.nodule[0]) and ready.notes["uncertain labels, taken as unknown"] == ready.notes["left out: lateral"] == 1
    write_table(tmp_path / "valid.csv", [{"Path": "a", "Frontal/Lateral": "Frontal"}])
    with pytest.raises(BadRecord, match="AP/PA"):
        read_chexpert(tmp_path)
    with pytest.raises(BadRecord, match="neither"):
        read_chexpert(tmp_path / "train")


def test_chexpert_support_devices_are_no_finding_of_the_lung():
    row = dict.fromkeys(["No Finding", *CHEXPERT_CODES, *CHEXPERT_OTHERS], "") | {"No Finding": "1.0"}
    labels, _ = labels_of_chexpert(row)
    assert math.isnan(labels.pop("Support Devices")) and set(labels.values()) == {0.0}


# ---------------------------------------------------------------- real samples


@needs_real
def test_real_nih():
    root = REAL / "nih_chestxray14_64px"
    assert not check_nih(root)
    records, rejected = read_nih(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready = prepare(records, 64, rejected)
    assert len(ready) == 600 and len(set(ready.patients)) == 139 and ready.normal.sum() == 312 and ready.labels.effusion.sum() == 86 and ready.labels.Infiltration.sum() == 110
    assert ready.notes["colour to grey"] == 589 and ready.notes["colour to grey, alpha dropped"] == 11 and np.isfinite(ready.films).all()
    usual = simulate_films(100, seed=1, findings="normal").films.mean(0)
    assert np.corrcoef(usual.ravel(), ready.films[ready.normal].mean(0).ravel())[0, 1] > 0.7             # our people look like people


@needs_real
def test_real_large_nih():
    ready = prepare(read_nih(REAL / "nih_chestxray14_512px")[0], 128)
    assert ready.main.tolist() == ["cardiomegaly", "normal"] and ready.films.shape == (2, 128, 128)


@needs_real
def test_real_covid_chestxray():
    records, rejected = read_covid_chestxray(REAL / "covid-chestxray-dataset")
    assert not rejected and len(records) == 65
    ready = prepare(records, 64)
    assert len(ready) == 65 and (ready.labels.covid == 1).sum() == 30 and ready.normal.sum() == 4 and ready.notes["listed for several patients"] == 3
    assert len(set(ready.patients)) == 39                                                     # of 40 numbers, two are one person
    assert ready.notes["no lung mask"] == 65 - 24 and 0.1 < ready.lungs[ready.lungs.any((1, 2))].mean() < 0.6


def test_simulated_films_are_windowed_like_files(tmp_path):
    films = simulate_films(6, 64, 3)
    seen = in_window(films)
    file = tmp_path / "film.png"
    Image.fromarray(np.round((films.films[0] - films.films[0].min()) / np.ptp(films.films[0]) * 65535).astype(np.uint16)).save(file)
    again = as_window(read_grey(file)[0])
    np.testing.assert_allclose(again, seen.films[0], atol=1e-3)
    assert np.abs(as_window(seen.films[0]) - seen.films[0]).max() < 1e-3      # a second time changes nothing
    gain = (seen.films - seen.healthy)[films.lesions].mean() / (films.films - films.healthy)[films.lesions].mean()
    assert gain > 1 and np.array_equal(seen.lesions, films.lesions)
