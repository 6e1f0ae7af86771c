"""The command end to end: runs, resume after a kill, sweeps, generation, and every kind of bad input."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real" / "ehr"
SETS = {"mimic3": REAL / "mimic-iii-clinical-database-demo-1.4", "mimic4": REAL / "mimic-iv-clinical-database-demo-2.2"}
MEDGEN = [sys.executable, "-c", "from medgen_nb.cli import main; main()"]
METRICS = {"prevalence_r", "prevalence_r_floor", "prevalence_r_rare", "prevalence_r_rare_floor", "cmd", "cmd_floor", "cmd_trivial", "mcad", "mcad_floor", "sample_seconds"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A house of its own, so that no run of the tests reaches your ledger."
    folder = tmp_path_factory.mktemp("house")
    for name in ("medgen_nb", "nbs", "data", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "start"], cwd=folder, check=True)
    return folder


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "MEDGEN_STAGES": str(place / "stages")}


def medgen(place: Path, *words: str, stages: str = "stages") -> subprocess.CompletedProcess:
    return subprocess.run([*MEDGEN, *words], cwd=place, env=environment(place) | {"MEDGEN_STAGES": str(place / stages)}, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def smoke(place):
    result = medgen(place, "run", "ehr", "--scale", "smoke", "--out", "smoke")
    assert result.returncode == 0, result.stdout + result.stderr
    return place / "smoke"


def test_a_run_leaves_what_it_promises(place, smoke):
    metrics = json.loads((smoke / "metrics.json").read_text())
    assert METRICS <= metrics.keys() and {"cmd_lo", "cmd_hi", "cmd_n"} <= metrics.keys()
    assert all(value is None or isinstance(value, (int, float)) for value in metrics.values())
    assert json.loads((smoke / "config.json").read_text())["config"]["fit.steps"] == 30
    assert (smoke / "notebook.ipynb").exists() and list(smoke.glob("checkpoint/*/step-*/tensors.safetensors"))
    assert (smoke / "pipeline" / "codes.json").exists() and len(list(smoke.glob("figures/*.png"))) >= 4
    assert len((place / "runs" / "ledger.jsonl").read_text().splitlines()) == 1


def test_the_same_again_does_nothing_and_another_config_is_refused(place, smoke):
    again = medgen(place, "run", "ehr", "--scale", "smoke", "--out", "smoke")
    assert again.returncode == 0 and "already finished" in again.stdout
    other = medgen(place, "run", "ehr", "--scale", "smoke", "--seed", "1", "--out", "smoke")
    assert other.returncode == 2 and "another run" in other.stderr and "seed" in other.stderr


def test_pictures_survive_in_the_report(place, smoke):
    result = medgen(place, "report", "smoke", "--out", "report.html")
    page = (place / "report.html").read_text()
    assert result.returncode == 0 and result.stdout.strip().endswith("report.html")
    assert page.count("data:image/png;base64") >= 4 and "src=\"http" not in page and "smoke run: too small to be evidence" in page


def test_generate_takes_a_target(place, smoke):
    result = medgen(place, "generate", "ehr", "--run", "smoke", "-n", "5", "--out", "ill.csv", "target.428=1", "seed=1", "num_inference_steps=3")
    assert result.returncode == 0 and len(pd.read_csv(place / "ill.csv")) == 5, result.stderr


def test_generate_takes_phenotypes_by_name(place):
    quick = ("num_steps=2", "head_steps=3", "seed=0")
    result = medgen(place, "generate", "cmr", "-n", "2", "LVEF=35", *quick, "--out", "films")
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(place / "films" / "phenotypes.csv")
    assert table["LVEF"].tolist() == [35.0, 35.0] and {"films.gif", "told.json", "video_00001.nii.gz"} <= {file.name for file in (place / "films").iterdir()}
    for wrong, said in (("LVFE=35", "no such phenotype: LVFE"), ("LVEF=low", "LVEF must be float"), ("LVEF=350", "far from all people")):
        result = medgen(place, "generate", "cmr", wrong, *quick, "--out", "none")
        assert result.returncode == 2 and said in result.stderr and not (place / "none").exists(), result.stderr


def test_generate_takes_a_film(place):
    from PIL import Image

    from medgen_nb.cxr.data import simulate_films
    film = simulate_films(1, 128, 3, findings="effusion").films[0]
    Image.fromarray(((film + 1) * 127.5).astype("uint8")).save(place / "film.png")
    result = medgen(place, "generate", "cxr", "-n", "2", "image=film.png", "num_steps=5", "seed=0", "--out", "maps")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {file.name for file in (place / "maps").iterdir()} == {"film_000.png", "maps.npz", "probabilities.json"}
    (place / "note.txt").write_text("no picture")
    for wrong, said in (("image=nowhere.png", "there is no file"), ("image=note.txt", "cannot be read"), ("strength=high", "strength must be"), ("imge=film.png", "unknown key imge")):
        result = medgen(place, "generate", "cxr", "image=film.png" if wrong[:5] == "stren" else wrong, *([wrong] if wrong[:5] == "stren" else []), "--out", "none")
        assert result.returncode == 2 and said in result.stderr and not (place / "none").exists(), result.stderr


def test_generate_writes_a_table_that_can_be_repeated(place, smoke):
    for name in ("one.csv", "two.csv"):
        result = medgen(place, "generate", "ehr", "--run", "smoke", "-n", "7", "--out", name, "seed=5", "num_inference_steps=3")
        assert result.returncode == 0, result.stderr
    one = pd.read_csv(place / "one.csv", index_col="patient")
    assert one.shape == (7, 16) and set(one.to_numpy().ravel()) <= {0, 1}
    assert (place / "one.csv").read_bytes() == (place / "two.csv").read_bytes()


@pytest.mark.parametrize("words, told", [
    (["run", "zoo"], "unknown room"), (["run", "ehr", "--name", "tall"], "unknown run name"), (["run", "ehr", "--scale", "huge"], "unknown scale"),
    (["run", "ehr", "-p", "fit.rl=1"], "unknown key"), (["run", "ehr", "-p", "fit.lr=fast"], "must be float"), (["run", "ehr", "-p", "fit.lr"], "key=value"),
    (["run", "ehr", "-p", "denoiser.attention=sparse"], "must be"), (["run", "ehr", "-p", "fit=3"], "is a group"), (["run", "ehr", "--data", "cinema"], "unknown data set"),
    (["run", "ehr", "--data", "mimic3"], "--root"), (["run", "ehr", "--data", "mimic3", "--root", "nowhere"], "no folder"), (["run", "ehr", "--device", "tpu"], "unknown device"),
    (["run", "ehr", "--seed", "-1"], "seed"), (["run", "ehr", "--seed", "4294967296"], "seed"), (["run", "ehr", "-p", "fit.schedule=square"], "schedule"),
    (["run", "ehr", "-p", "fit.save_every=0"], "at least 1"), (["run", "ehr", "-p", "fit.lr=.inf"], "must be float"), (["run", "ehr", "--out", "README.md"], "is a file"), (["run", "ehr", "--out", "nbs"], "holds no run"),
    (["sweep", "ehr", "--seeds", "a"], "--seeds"), (["sweep", "ehr", "--names", "x"], "unknown run name"), (["record", "nowhere"], "not finished"),
    (["generate", "ehr", "--run", "nowhere"], "no trained pipeline"), (["check-data", "cinema", "."], "unknown data set"), (["check-data", "mimic3", "nowhere"], "no folder"),
    (["predict", "ehr", "record"], "it generates"), (["predict", "ecg", "record", "--run", "nowhere"], "no trained pipeline"), (["generate", "ecg"], "medgen predict"),
    (["report", "nowhere"], "no finished run"), (["run", "ehr", "--colour", "red"], "No such option")])
def test_bad_input_is_one_line_exit_2_and_nothing_written(place, words, told, monkeypatch):
    from click.testing import CliRunner
    from medgen_nb.cli import main
    monkeypatch.chdir(place)
    monkeypatch.delenv("MEDGEN_DATA", raising=False)
    monkeypatch.setenv("MEDGEN_HOME", str(place))   # default folders would be made here
    contents = lambda: {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file() and "__pycache__" not in path.parts}
    before = contents()
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and told in result.output, result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1 and "Traceback" not in result.output
    assert contents() == before


def test_unknown_generation_key_is_told(place, smoke):
    result = medgen(place, "generate", "ehr", "--run", "smoke", "colour=blue")
    assert result.returncode == 2 and "unknown key colour" in result.stderr and "seed" in result.stderr


def test_wrong_type_of_a_generation_key_is_told(place, smoke):
    result = medgen(place, "generate", "ehr", "--run", "smoke", "seed=1.5")
    assert result.returncode == 2 and "seed must be" in result.stderr


def test_record_and_stages(place, smoke):
    teach = place / "teach"
    shutil.copytree(smoke, teach)
    row = json.loads((teach / "run.json").read_text()) | {"scale": "teach", "clean": True}
    (teach / "run.json").write_text(json.dumps(row))
    shutil.rmtree(place / "results"), shutil.copytree(ROOT / "results", place / "results")
    assert medgen(place, "record", "teach", "smoke").returncode == 2, "a smoke run among them: nothing is recorded"
    assert (place / "results" / "ledger.jsonl").read_bytes() == (ROOT / "results" / "ledger.jsonl").read_bytes()
    first, again = medgen(place, "record", "teach"), medgen(place, "record", "teach")
    assert first.returncode == again.returncode == 0 and "1 of 1 were in the ledger already" in again.stdout, first.stderr + again.stderr
    assert json.loads((place / "results" / "ledger.jsonl").read_text().splitlines()[-1])["scale"] == "teach"
    assert "denoiser" in medgen(place, "stages").stdout
    assert "removed" in medgen(place, "stages", "--prune", "0", stages="none").stdout


def test_failing_cell_gives_its_error_and_leaves_the_notebook(place):
    result = medgen(place, "run", "ehr", "--scale", "smoke", "--out", "failing", "-p", "sample.steps=30")
    assert result.returncode == 1 and "ValueError: can sample in 1..20 steps" in result.stderr
    assert (place / "failing" / "notebook.ipynb").exists() and not (place / "failing" / "metrics.json").exists()


def test_sweep_goes_on_after_a_failure_and_skips_what_is_done(place):
    words = ["sweep", "ehr", "--names", "base,steps-50", "--scale", "smoke", "--jobs", "2", "-p", "sample.steps=30"]   # too many steps for base, fine for steps-50
    first = medgen(place, *words)
    assert first.returncode == 1 and "1 of 2 runs failed: base-smoke" in first.stderr, first.stdout + first.stderr
    second = medgen(place, *words)
    assert second.returncode == 1 and "skip   steps-50-smoke" in second.stdout and "1 of 1 runs failed" in second.stderr


def test_killed_run_resumes_to_the_same_weights(place):
    words = ["run", "ehr", "--scale", "smoke", "-p", "fit.steps=2000", "-p", "data.seed=3"]
    killed = subprocess.Popen([*MEDGEN, *words, "--out", "killed"], cwd=place, env=environment(place) | {"MEDGEN_STAGES": str(place / "stages-killed")},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    reached = lambda: max([int(p.name[5:]) for p in (place / "killed").glob("checkpoint/*/step-*")], default=0)
    while reached() < 420 and time.time() < deadline:
        time.sleep(0.02)
    family = [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]   # the kernel has a session of its own
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=20)
    killed.wait()
    steps = [int(p.name[5:]) for p in (place / "killed").glob("checkpoint/*/step-*")]
    assert steps and max(steps) < 1900 and not (place / "killed" / "metrics.json").exists(), steps
    resumed = medgen(place, *words, "--out", "killed", stages="stages-killed")
    assert resumed.returncode == 0 and "loaded" not in resumed.stdout and "step 400 of" not in resumed.stdout, "it went on, neither from a stage nor from scratch"
    assert medgen(place, *words, "--out", "unbroken", stages="stages-unbroken").returncode == 0
    one, other = (load_file(next((place / name / "pipeline" / "denoiser").glob("*.safetensors"))) for name in ("killed", "unbroken"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    drop = lambda name: {k: v for k, v in json.loads((place / name / "metrics.json").read_text()).items() if k not in ("sample_seconds", "guided_seconds", "train_minutes")}
    assert drop("killed") == drop("unbroken")


@pytest.mark.parametrize("dataset", list(SETS))
def test_real_records_run_and_check(place, dataset):
    if not SETS[dataset].exists():
        pytest.skip(f"the real sample {SETS[dataset].name} does not lie beside the checkout")
    check = medgen(place, "check-data", dataset, str(SETS[dataset]))
    assert check.returncode == 0 and "patients" in check.stdout, check.stdout + check.stderr
    run = medgen(place, "run", "ehr", "--scale", "smoke", "--data", dataset, "--root", str(SETS[dataset]), "--out", f"real-{dataset}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "cmd" in json.loads((place / f"real-{dataset}" / "metrics.json").read_text())


def test_broken_real_data_is_named_file_by_file(place, tmp_path):
    (tmp_path / "PATIENTS.csv").write_text("row_id,subject_id\n1,2\n")
    result = medgen(place, "check-data", "mimic3", str(tmp_path))
    assert result.returncode == 1 and all(word in result.stdout for word in ("PATIENTS", "ADMISSIONS", "DIAGNOSES_ICD")), result.stdout


def test_list_tells_rooms_runs_and_data_sets(place):
    result = medgen(place, "list")
    assert result.returncode == 0 and all(word in result.stdout for word in ("ehr", "mimic3", "full-attention", "teach"))
    assert medgen(place, "list", "--names").stdout.split() == ["pcg", "cmr", "ehr", "cxr", "ecg"]
