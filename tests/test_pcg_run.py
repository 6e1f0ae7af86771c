"Every line of the heart-sound room's grid runs at smoke scale; in this process, without a kernel."
import json
from pathlib import Path

import numpy as np
import pytest

from medgen_nb.pcg.pipeline import HLDMPipeline
from medgen_nb.pcg.room import ABLATIONS, MEANING, Config

REAL = Path(__file__).parents[2] / "shared" / "real" / "pcg" / "circor-heart-sound-1.0.3"
ALWAYS = {"vae_mae", "fad_star", "fad_floor", "cf", "plausibility", "lambda_text", "lambda_graph", "memorisation", "realtime_factor", "parameters"}
LABELLED = {"pds", "pds_whole", "pds_swap", "mig", "cf_condition", "grade_spearman", "rate_change", "s1s2_change_db"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_line_of_the_grid_runs(run_cells, tmp_path, name):
    metrics = run_cells("16_pcg_run", name=name)
    assert not {m for m in ALWAYS | LABELLED if m not in metrics}
    assert ("mask_lag_error" in metrics) == (name != "no-mask") and ("rare_gain" in metrics) == (name in ("base", "external"))
    made = HLDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")("grade IV holosystolic murmur at the apex", seed=0, num_inference_steps=2)
    assert made.waves.shape == (1, 20_000) and np.isfinite(made.waves).all() and (made.mask is None) == (name == "no-mask")
    players = [file for file in (tmp_path / "run" / "figures").glob("*.wav")]
    captions = json.loads((tmp_path / "run" / "figures" / "captions.json").read_text())
    assert players and all(player.stem and player.name in captions for player in players)
    measured = {m for m in metrics if not m.endswith(("_lo", "_hi", "_n", "_floor", "_trivial"))}
    assert measured <= set(MEANING), sorted(measured - set(MEANING))


def test_real_recordings_run(run_cells):
    if not REAL.is_dir():
        pytest.skip("the real sample of CirCor does not lie beside the checkout")
    metrics = run_cells("16_pcg_run", data="circor", root=str(REAL))
    assert not {m for m in ALWAYS if m not in metrics} and "pds" not in metrics


@pytest.mark.parametrize("scale", ["smoke", "demo", "teach", "paper"])
def test_scales_are_whole_configs(scale):
    config = Config.at(scale)
    assert config.judge.n % 17 == 0 and config.denoiser.width % config.denoiser.heads == 0
