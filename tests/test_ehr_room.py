"""The room's surface: configs of every scale and ablation, the pipeline, the choice of codes on training patients alone."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from medgen_nb.ehr.data import Records
from medgen_nb.ehr.denoiser import EhrDenoiser
from medgen_nb.ehr.diffusion import MultinomialScheduler
from medgen_nb.ehr.room import ABLATIONS, READERS, Config, DataConfig, EHRD3PMPipeline, Pipeline, choose_codes, simulate
from medgen_nb.experiments import SCALES, flat_config, override


def denoiser(codes=6):
    torch.manual_seed(0)
    return EhrDenoiser(codes=codes, classes=2, width=8, depth=1, heads=2, rank=3, attention="linear", mlp_ratio=2.0, steps=10, schedule="geometric",
                       times="uniform", objective="ce", ce_weight=0.1, evidence=True, pairs=True, conditional=False)


@pytest.fixture
def pipeline():
    made = EHRD3PMPipeline(denoiser(), MultinomialScheduler(10, 2, "geometric"))
    made.set_progress_bar_config(disable=True)
    made.name_codes(["038", "428", "E880", "V10", "9:250", "10:I50"], list("abcdef"))
    return made


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_valid_at_every_scale(scale, name):
    config = override(Config.at(scale), ABLATIONS[name].overrides)
    assert config.sample.steps <= config.diffusion.steps and config.denoiser.width % config.denoiser.heads == 0
    assert flat_config(config)["fit.steps"] > 0 and ABLATIONS[name].tests[0] == "E"


def test_every_ablation_changes_something():
    base = flat_config(Config.at("teach"))
    assert all(flat_config(override(Config.at("teach"), a.overrides)) != base for name, a in ABLATIONS.items() if name != "base")


def test_same_seed_same_patients(pipeline):
    one, two, other = pipeline(n=30, seed=1), pipeline(n=30, seed=1), pipeline(n=30, seed=2)
    assert one.equals(two) and not one.equals(other)
    assert one.shape == (30, 6) and set(one.to_numpy().ravel()) <= {0, 1} and list(one.columns)[0] == "038"


def test_saved_and_loaded_it_makes_the_same_patients(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    assert again.codes == pipeline.codes and again.names == pipeline.names
    assert again(n=9, seed=3).equals(pipeline(n=9, seed=3))
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))


def test_csv_keeps_leading_zeros_and_is_whole(pipeline, tmp_path):
    made = pipeline(n=3, seed=0)
    assert pipeline.write(made, tmp_path / "deep" / "r.csv") == tmp_path / "deep" / "r.csv"
    assert list(pd.read_csv(tmp_path / "deep" / "r.csv", dtype=str).columns[:2]) == ["patient", "038"] and len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.parametrize("wrong, word", [({"n": 0}, "at least 1"), ({"num_inference_steps": 11}, "1..10")])
def test_bad_calls_are_told(pipeline, wrong, word):
    with pytest.raises(ValueError, match=word):
        pipeline(**wrong)


def test_wrong_vocabulary_is_told(pipeline):
    with pytest.raises(ValueError, match="makes 6 codes, got 2"):
        pipeline.name_codes(["a", "b"])


def test_codes_of_real_sets_are_chosen_on_training_patients_alone():
    rng = np.random.default_rng(0)
    matrix = (rng.random((60, 5)) < 0.5).astype(np.uint8)
    records = Records(matrix, list("abcde"), list("abcde"), [f"p{k}" for k in range(60)], np.full(60, 50.0), np.array(["F"] * 60))
    _, split = choose_codes(records, DataConfig(min_patients=1))
    matrix[:, 4] = 0
    matrix[split.test, 4] = 1   # a code that only test patients carry
    chosen, _ = choose_codes(records, DataConfig(min_patients=1))
    assert "e" not in chosen.codes and len(chosen) == 60


def test_simulated_parts_have_the_sizes_of_the_config():
    records, split = simulate(Config.at("smoke").data)
    assert (len(split.train), len(split.val), len(split.test)) == (400, 50, 200) and len(records.codes) == 16


def test_readers_are_named_as_their_cards():
    assert set(READERS) == {"mimic3", "mimic4"} and json.dumps(flat_config(Config.at("teach")))
