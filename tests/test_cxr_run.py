"Every line of the chest film room's grid runs at smoke scale; in this process, without a kernel."
import json
from pathlib import Path

import numpy as np
import pytest

from medgen_nb.cxr.counterfactual import VALDPipeline
from medgen_nb.cxr.data import FINDINGS, simulate_films
from medgen_nb.cxr.room import ABLATIONS, MEANING, UNSEEN, Config, pairs_to_induce, simulate, words_for

REAL = Path(__file__).parents[2] / "shared" / "real" / "cxr"
MAPS = {"pixel_auroc", "pixel_auprc", "dice", "pointing", "ncc", "normal_ratio", "parameters", "train_minutes"}
HEALTHY = {"flip_rate", "fid_star", "fid_floor", "ssim", "ms_ssim"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_line_of_the_grid_runs(run_cells, tmp_path, name):
    metrics, lines = run_cells("45_cxr_run", name=name), ABLATIONS[name].overrides
    method = lines.get("judge.method", "vald")
    assert not MAPS - set(metrics)
    assert (not HEALTHY - set(metrics)) == (method in ("vald", "va-gan", "autoencoder"))
    assert ("induction_class" in metrics) == (method == "vald" and lines.get("judge.induce", 1) > 0)
    captions = json.loads((tmp_path / "run" / "figures" / "captions.json").read_text())
    assert "2-maps.png" in captions
    measured = {m for m in metrics if not m.endswith(("_lo", "_hi", "_n", "_floor", "_trivial"))}
    assert measured <= set(MEANING), sorted(measured - set(MEANING))
    if method == "vald":
        made = VALDPipeline.from_pretrained(tmp_path / "run" / "pipeline")(np.zeros((32, 32), np.float32), n=2, seed=0, num_steps=4, strength=0.5)
        assert made.healthy.shape == (1, 32, 32) and np.isfinite(made.signed).all() and 0 <= made.before.to_numpy().min() <= made.after.to_numpy().max() <= 1


@pytest.mark.parametrize("data, folder", [("nih", "nih_chestxray14_64px"), ("covid_chestxray", "covid-chestxray-dataset")])
def test_real_films_run(run_cells, data, folder):
    if not (REAL / folder).is_dir():
        pytest.skip(f"the real films of {folder} do not lie beside the checkout")
    metrics = run_cells("45_cxr_run", data=data, root=str(REAL / folder))
    assert "flip_rate" in metrics and "pixel_auroc" not in metrics and ("lung_preference" in metrics) == (data == "covid_chestxray")


@pytest.mark.parametrize("scale", ["smoke", "demo", "teach", "paper"])
def test_scales_are_whole_configs(scale):
    config = Config.at(scale)
    latent = config.data.size // 2 ** (len(config.model.vae) - 1)
    assert latent % 2 ** (len(config.model.unet) - 1) == 0 and int(config.judge.steps * config.judge.strength) >= 1
    if scale == "paper":
        assert (config.tune_fit.steps, config.tune_fit.batch_size, config.tune_fit.lr, config.data.size) == (2_700, 2, 5e-5, 512)


def test_nobody_is_in_two_groups_and_unseen_pairs_are_unseen():
    films = simulate(Config.at("smoke").data)
    groups = [set(part.patients) for part in (films.base, films.tune, films.test, films.judges, films.witness)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    for part in (films.base, films.tune):
        assert not set(zip(part.main, part.places)) & set(UNSEEN)
    assert set(pairs_to_induce(30, seen=False)) == set(UNSEEN) and not set(pairs_to_induce(30, seen=True)) & set(UNSEEN)
    assert all(place in FINDINGS[code].places for code, place in UNSEEN)


def test_films_without_reports_are_told_by_prompts():
    films = simulate_films(3, 32, 0, findings=["normal", "opacity", "nodule"])
    reports, prompts = words_for(films)
    assert reports == list(films.reports) and prompts[0] == "chest film, no finding" and all(prompt.startswith("chest film, ") for prompt in prompts)
    silent = type(films)(**{**vars(films), "reports": np.array(["", "", ""])})
    assert words_for(silent)[0] == prompts
