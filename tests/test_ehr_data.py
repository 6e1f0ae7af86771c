"""ehr.data: readers on small generated folders and on the open demos, and what the simulator promises."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_nb.data import BadRecord
from medgen_nb.ehr.data import (
    Records,
    build_world,
    check_mimic3,
    check_mimic4,
    count_violations,
    read_mimic3,
    read_mimic4,
    roll_up,
    simulate_records,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "ehr"
DEMO3, DEMO4 = REAL / "mimic-iii-clinical-database-demo-1.4", REAL / "mimic-iv-clinical-database-demo-2.2"

MIMIC3 = {
    "PATIENTS": "ROW_ID,SUBJECT_ID,GENDER,DOB\n1,10,F,2080-03-01 00:00:00\n2,9,M,1833-01-20 00:00:00\n3,200,M,2090-05-05 00:00:00\n",
    "ADMISSIONS": "ROW_ID,SUBJECT_ID,HADM_ID,ADMITTIME\n1,10,1,2142-03-01 10:00:00\n2,10,2,2140-03-01 10:00:00\n3,9,3,2133-08-08 10:00:00\n4,200,4,2150-05-05 10:00:00\n",
    "DIAGNOSES_ICD": "ROW_ID,SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n1,10,1,1,0389\n2,10,2,1,4280\n3,10,2,2,42833\n4,9,3,1,E8889\n5,9,3,2,V270\n6,200,4,1,389\n",
}
MIMIC4 = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year\n10,F,50,2150\n11,M,91,2160\n",
    "hosp/admissions": "subject_id,hadm_id,admittime\n10,1,2152-01-01 08:00:00\n11,2,2160-01-01 08:00:00\n",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version\n10,1,1,0389,9\n10,1,2,I5032,10\n11,2,1,E8889,9\n11,2,2,E8801,10\n",
}


def write(root, tables, zipped=False, change=str):
    "A release folder; `change` acts on header and names (str.lower, str.upper)."
    for name, text in tables.items():
        header, _, body = text.partition("\n")
        file = root / f"{change(name)}.csv{'.gz' if zipped else ''}"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = (change(header) + "\n" + body).encode()
        file.write_bytes(gzip.compress(content) if zipped else content)
    return root


def append(root, name, text):
    file = root / f"{name}.csv"
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("change", [str.lower, str.upper])
def test_mimic3(tmp_path, zipped, change):
    records = read_mimic3(write(tmp_path, MIMIC3, zipped, change), strict=True)
    assert records.ids == ["9", "10", "200"] and records.codes == ["038", "389", "428", "E888", "V27"]
    assert records.matrix.dtype == np.uint8 and records.matrix.tolist() == [
        [0, 0, 0, 1, 1],
        [1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
    ]
    assert records.age.round(1).tolist() == [90, 60, 60] and records.sex.tolist() == ["M", "F", "M"]
    assert (
        records.rejected == []
        and records.truth == {}
        and check_mimic3(tmp_path) == []
        and records.names == records.codes
    )


def test_row_order_does_not_matter(tmp_path):
    shuffled = {
        name: "\n".join([(lines := text.strip().split("\n"))[0], *lines[:0:-1]]) + "\n" for name, text in MIMIC3.items()
    }
    assert (
        read_mimic3(write(tmp_path / "a", MIMIC3)).fingerprint
        == read_mimic3(write(tmp_path / "b", shuffled)).fingerprint
    )


@pytest.mark.parametrize("zipped", [False, True])
def test_mimic4_keeps_versions_apart(tmp_path, zipped):
    records = read_mimic4(write(tmp_path, MIMIC4, zipped), strict=True)
    assert records.codes == ["10:E88", "10:I50", "9:038", "9:E888"] and records.matrix.sum() == 4
    assert records.age.tolist() == [52, 90] and check_mimic4(tmp_path) == []


def test_names(tmp_path):
    write(
        tmp_path,
        {
            **MIMIC3,
            "D_ICD_DIAGNOSES": 'ROW_ID,ICD9_CODE,SHORT_TITLE,LONG_TITLE\n1,4280,CHF,"Heart failure, unspecified"\n2,0389,x,Septicemia\n',
        },
    )
    records = read_mimic3(tmp_path)
    assert (
        records.names[records.codes.index("428")] == "Heart failure, unspecified, etc."
        and records.names[0] == "Septicemia"
    )
    assert records.names[records.codes.index("V27")] == "V27"


@pytest.mark.parametrize(
    "code, version, category",
    [
        ("0389", 9, "038"),
        ("E8842", 9, "E884"),
        ("v5861", 9, "V58"),
        ("428.0", 9, "428"),
        ("I50.32", 10, "I50"),
        ("E8801", 10, "E88"),
    ],
)
def test_roll_up(code, version, category):
    assert roll_up(code, version) == category


@pytest.mark.parametrize("code, version", [("38", 9), ("", 9), ("I5032", 9), ("4280", 10), ("4280", 11), ("428", "9")])
def test_roll_up_refuses(code, version):
    with pytest.raises(ValueError):
        roll_up(code, version)


# ---------------------------------------------------------------- broken tables


def broken(tmp_path, part, read=read_mimic3, check=check_mimic3):
    "Reading raises, checking reports, and both say `part`, with a remedy."
    with pytest.raises(BadRecord, match=part) as caught:
        read(tmp_path)
    assert any(part in str(problem) for problem in check(tmp_path)) and caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", list(MIMIC3))
def test_missing_table(tmp_path, name):
    broken(write(tmp_path, {k: v for k, v in MIMIC3.items() if k != name}), name)


def test_missing_folder(tmp_path):
    broken(tmp_path / "nowhere", "PATIENTS")
    assert len(check_mimic3(tmp_path / "nowhere")) == 3
    broken(tmp_path, "hosp", read_mimic4, check_mimic4)


@pytest.mark.parametrize(
    "name, column", [("PATIENTS", "DOB"), ("ADMISSIONS", "ADMITTIME"), ("DIAGNOSES_ICD", "ICD9_CODE")]
)
def test_missing_column(tmp_path, name, column):
    broken(write(tmp_path, {**MIMIC3, name: MIMIC3[name].replace(column, "OTHER")}), column.lower())


def test_truncated_gzip(tmp_path):
    write(tmp_path, MIMIC3, zipped=True)
    file = tmp_path / "DIAGNOSES_ICD.csv.gz"
    file.write_bytes(file.read_bytes()[:-12])
    broken(tmp_path, "cut off")
    file.write_bytes(b"this is no gzip")
    broken(tmp_path, "cut off or damaged")


@pytest.mark.parametrize(
    "content", ["", "\n\n", MIMIC3["PATIENTS"].split("\n")[0] + "\n", MIMIC3["PATIENTS"].split("\n")[0] + "\n\n\n"]
)
def test_empty_table(tmp_path, content):
    write(tmp_path, MIMIC3)
    (tmp_path / "PATIENTS.csv").write_text(content)
    broken(tmp_path, "empty")


def test_undecodable_bytes_and_odd_rows(tmp_path):
    write(tmp_path, MIMIC3)
    file = tmp_path / "PATIENTS.csv"
    good = file.read_bytes()
    file.write_bytes(good + b"4,30,\xff,2080-01-01\n")
    broken(tmp_path, "line 5: it is not UTF-8")
    file.write_bytes(good + b"4,30,F,2080-01-01,one too many\n")
    broken(tmp_path, "line 5: not a proper CSV row")
    file.write_bytes(good + b'4,30,"F,2080-01-01\n')
    broken(tmp_path, "CSV")


def test_a_broken_dictionary_is_not_ignored(tmp_path):
    broken(write(tmp_path, {**MIMIC3, "D_ICD_DIAGNOSES": "ROW_ID,ICD9_CODE\n1,4280\n"}), "long_title")


def test_all_problems_at_once(tmp_path):
    write(tmp_path, {**MIMIC3, "PATIENTS": MIMIC3["PATIENTS"].replace("DOB", "X").replace("GENDER", "Y")})
    (tmp_path / "ADMISSIONS.csv").unlink()
    append(tmp_path, "DIAGNOSES_ICD", "7,10,1,2,\n")
    problems = [str(problem) for problem in check_mimic3(tmp_path)]
    assert (
        len(problems) == 3 and "gender, dob" in problems[0] and "ADMISSIONS" in problems[1] and "line 8" in problems[2]
    )


def test_no_usable_row(tmp_path):
    broken(
        write(tmp_path, {**MIMIC3, "DIAGNOSES_ICD": "SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n10,1,1,\n"}),
        "not one usable row",
    )


# ---------------------------------------------------------------- rejected rows


def rejected(tmp_path, part, line, read=read_mimic3, check=check_mimic3):
    "One row is reported with its line, reading goes on, and strict raises."
    records = read(tmp_path)
    hits = [problem for problem in records.rejected if part in problem.reason]
    assert len(hits) == 1 and hits[0].where == f"line {line}" and hits[0].remedy
    assert [str(problem) for problem in check(tmp_path)] == [str(problem) for problem in records.rejected]
    with pytest.raises(BadRecord, match=f"line {line}"):
        read(tmp_path, strict=True)
    return records


@pytest.mark.parametrize(
    "row, part",
    [
        ("7,10,1,1,0389\n", "repeats"),  # the row number differs, the content does not
        ("7,10,1,2,\n", "no code"),
        ("7,10,1,2,38\n", "'38' is not an ICD-9"),  # a lost zero
        ("7,10,1,2,I5032\n", "not an ICD-9"),
        ("7,77,1,1,4280\n", "'77' is not in PATIENTS"),
        ("7,10,1,2\n", "no code"),  # the file ends within a row
    ],
)
def test_bad_diagnosis(tmp_path, row, part):
    write(tmp_path, MIMIC3)
    before = read_mimic3(tmp_path)
    append(tmp_path, "DIAGNOSES_ICD", row)
    assert rejected(tmp_path, part, 8).fingerprint == before.fingerprint


def test_blank_lines_keep_line_numbers(tmp_path):
    append(write(tmp_path, MIMIC3), "DIAGNOSES_ICD", "\n\n7,10,1,2,\n\n")
    rejected(tmp_path, "no code", 10)


@pytest.mark.parametrize("version", ["", "11", "x"])
def test_unknown_version(tmp_path, version):
    append(write(tmp_path, MIMIC4), "hosp/diagnoses_icd", f"10,1,3,4280,{version}\n")
    records = rejected(tmp_path, "version", 6, read_mimic4, check_mimic4)
    assert "9:428" not in records.codes


def test_version_mixed_up(tmp_path):
    append(write(tmp_path, MIMIC4), "hosp/diagnoses_icd", "10,1,3,4280,10\n")
    rejected(tmp_path, "'4280' is not an ICD-10", 6, read_mimic4, check_mimic4)


@pytest.mark.parametrize(
    "birth", ["15 July", "", "2160-01-01", "1990-01-01"]
)  # no date, none, after admission, 150 years old
def test_bad_birth_date(tmp_path, birth):
    write(tmp_path, {**MIMIC3, "PATIENTS": MIMIC3["PATIENTS"].replace("2080-03-01 00:00:00", birth)})
    records = rejected(tmp_path, "the age of patient 10", 2)
    assert np.isnan(records.age[1]) and not np.isnan(records.age[[0, 2]]).any() and len(records) == 3


def test_bad_admission_time(tmp_path):
    write(tmp_path, {**MIMIC3, "ADMISSIONS": MIMIC3["ADMISSIONS"].replace("2140-03-01 10:00:00", "soon")})
    assert rejected(tmp_path, "'soon' is no date", 3).age[1].round() == 62


def test_no_admission(tmp_path):
    write(tmp_path, {**MIMIC3, "ADMISSIONS": MIMIC3["ADMISSIONS"].replace("3,9,3,", "3,99,3,")})
    assert np.isnan(rejected(tmp_path, "patient 9 has no dated admission", 3).age[0])


def test_bad_anchor(tmp_path):
    write(tmp_path, {**MIMIC4, "hosp/patients": MIMIC4["hosp/patients"].replace("10,F,50", "10,F,fifty")})
    assert np.isnan(rejected(tmp_path, "the age of patient 10", 2, read_mimic4, check_mimic4).age[0])


def test_odd_sex_and_a_patient_listed_twice(tmp_path):
    append(write(tmp_path, MIMIC3), "PATIENTS", "4,10,M,2000-01-01\n")
    assert rejected(tmp_path, "listed again", 5).sex[1] == "F"
    write(tmp_path, {**MIMIC3, "PATIENTS": MIMIC3["PATIENTS"].replace("10,F", "10,?")})
    assert rejected(tmp_path, "'?'", 2).sex[1] == ""


def test_patients_without_diagnosis_are_counted(tmp_path):
    append(write(tmp_path, MIMIC3), "PATIENTS", "4,30,F,2080-01-01\n5,31,F,2080-01-01\n")
    records = read_mimic3(tmp_path, strict=True)  # a decision, no defect
    assert (
        len(records) == 3
        and len(records.rejected) == 1
        and records.rejected[0].where == "2 patients"
        and check_mimic3(tmp_path) == []
    )


# ---------------------------------------------------------------- the open demos


@pytest.mark.skipif(not DEMO3.is_dir(), reason="the MIMIC-III demo is not beside the checkout")
def test_real_mimic3():
    records = read_mimic3(DEMO3, strict=True)
    assert (
        len(records) == 61
        and set(records.sex) == {"F", "M"}
        and ((records.age >= 0) & (records.age <= 90)).all()
        and (records.age == 90).any()
    )
    assert "038" in records.codes and "heart failure" in records.names[records.codes.index("428")].lower()
    assert check_mimic3(DEMO3) == [] and records.matrix.any(0).all() and records.matrix.any(1).all()


@pytest.mark.skipif(not DEMO4.is_dir(), reason="the MIMIC-IV demo is not beside the checkout")
def test_real_mimic4():
    records = read_mimic4(DEMO4, strict=True)
    assert len(records) == 59 and {code.split(":")[0] for code in records.codes} == {"9", "10"}
    assert "9:428" in records.codes and "10:I50" in records.codes and check_mimic4(DEMO4) == []


# ---------------------------------------------------------------- the simulator


@pytest.fixture(scope="module")
def records() -> Records:
    return simulate_records(30_000, 64, seed=3)


def test_deterministic():
    first, again, other = (simulate_records(300, 32, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(first.truth["rare"]["277"], again.truth["rare"]["277"])


def test_population_is_fixed_while_seed_and_n_change():
    one, two, far = (
        simulate_records(50, 32, seed=1),
        simulate_records(500, 32, seed=2),
        simulate_records(50, 32, seed=1, population=5),
    )
    for name in ("prevalence", "exclusions", "cluster"):
        assert one.truth[name] == two.truth[name]
    assert one.truth["prevalence"] != far.truth["prevalence"] and not set(one.ids) & set(two.ids)
    assert np.array_equal(build_world(32, 0).rare_weight, build_world(32, 0).rare_weight)


def test_prevalence(records):
    target = np.array([records.truth["prevalence"][code] for code in records.codes])
    found = records.matrix.mean(0)
    assert np.all(np.abs(found - target) < 4 * np.sqrt(target * (1 - target) / len(records)) + 0.04 * target)
    ordinary = np.sort(target[:-3])
    assert 1e-3 <= ordinary[0] < 1.1e-3 and 0.27 < ordinary[-1] <= 0.3
    assert np.allclose(np.diff(np.log(ordinary)), np.diff(np.log(ordinary))[0])  # log-uniform
    assert target[-3:].tolist() == [0.001, 0.005, 0.02] and list(records.truth["rare"]) == records.codes[-3:]


def test_rules_are_never_broken(records):
    rules = records.truth["exclusions"]
    assert len(rules) > 20 and not count_violations(records.matrix, rules).any()
    names = {(records.codes[a], records.codes[b]) for a, b in rules}
    assert ("650", "600") in names and ("401", "402") in names
    women, men = records.frame().loc[:, ["650", "V27"]].any(axis=1), records.frame()["600"] == 1
    assert set(records.sex[women]) == {"F"} and set(records.sex[men]) == {"M"}


def test_blocks(records):
    r = np.corrcoef(records.matrix[:, :-3].T.astype(float))
    cluster = np.array([records.truth["cluster"][code] for code in records.codes[:-3]])
    same, off = cluster[:, None] == cluster, ~np.eye(len(cluster), dtype=bool)
    assert r[same & off].mean() > 0.05 and 0 < r[~same].mean() < 0.03


@pytest.mark.parametrize("code", ["277", "710", "135"])
def test_rare_probability_is_honest(records, code):
    y, p = records.matrix[:, records.codes.index(code)], records.truth["rare"][code]
    for part in (p <= np.median(p), p > np.median(p), p > np.quantile(p, 0.95)):
        assert abs(y[part].sum() - p[part].sum()) < 4 * np.sqrt((p * (1 - p))[part].sum()) + 1
    assert p.max() > 20 * p.min() and np.isclose(p.mean(), records.truth["prevalence"][code], rtol=0.15)


def test_rare_probability_is_a_function_of_the_other_codes(records):
    world = build_world(64, 0)
    chance = 1 / (1 + np.exp(-(records.matrix[:, :-3] @ world.rare_weight.T + world.rare_intercept)))
    assert np.allclose(chance, np.stack(list(records.truth["rare"].values()), axis=1))


@pytest.mark.parametrize("n_codes", [8, 9, 13, 40, 200, 2048])
def test_sizes(n_codes):
    records = simulate_records(200, n_codes, seed=0)
    assert (
        records.matrix.shape == (200, n_codes)
        and len(set(records.codes)) == n_codes == len(records.names)
        and "428" in records.codes
    )
    assert records.truth["exclusions"] and not count_violations(records.matrix, records.truth["exclusions"]).any()
    assert set(records.truth["cluster"]) == set(records.truth["prevalence"]) == set(records.codes)


def test_impossible_orders():
    with pytest.raises(ValueError, match="at least 8"):
        simulate_records(10, 7, seed=0)
    with pytest.raises(ValueError, match="at least one patient"):
        simulate_records(0, 8, seed=0)


def test_rows_and_frequent(records):
    part = records.rows(np.arange(100)[::2])
    assert (
        len(part) == 50
        and part.ids[1] == records.ids[2]
        and part.truth["rare"]["135"].shape == (50,)
        and len(records.rows(records.age > 60)) < len(records)
    )
    common = records.frequent(300)
    counts = common.matrix.sum(0)
    assert counts.min() >= 300 and (np.diff(counts.astype(int)) <= 0).all() and len(common) == len(records)
    assert set(common.truth["rare"]) == {"135"} and {
        (records.codes[a], records.codes[b]) for a, b in records.truth["exclusions"]
    } >= {(common.codes[a], common.codes[b]) for a, b in common.truth["exclusions"]}
    assert set(common.truth["prevalence"]) == set(common.codes) and common.truth["severity"]["renal"].shape == (
        len(records),
    )
    with pytest.raises(ValueError, match="no code is left"):
        records.frequent(10**6)


def test_batch_frame_repr(records):
    batch = records.rows(slice(0, 7)).batch()
    assert set(batch) == {"codes"} and batch["codes"].shape == (7, 64) and batch["codes"].dtype == torch.int64
    assert (
        records.frame().shape == (30_000, 64)
        and "30,000 patients x 64 codes" in repr(records)
        and records.names[records.matrix.sum(0).argmax()] in records._repr_html_()
    )
    assert "0 patients" in repr(records.rows([]))


def test_count_violations():
    matrix = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]])
    assert count_violations(matrix, [(0, 1)]).tolist() == [True, False, False, False]
    assert count_violations(torch.from_numpy(matrix), [(0, 1), (1, 2)]).tolist() == [True, False, True, False]
    assert not count_violations(matrix, []).any()
    with pytest.raises(ValueError, match="columns"):
        count_violations(matrix, [(0, 3)])
