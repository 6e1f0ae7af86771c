"Every line of the ECG room's grid runs at smoke scale; in this process, without a kernel."
from pathlib import Path

import pytest

from medgen_nb.ecg.model import EcgPipeline
from medgen_nb.ecg.room import ABLATIONS, MEANING, Config

REAL = Path(__file__).parents[2] / "shared" / "real" / "ecg"
SETS = {"cinc2021": REAL / "challenge-2021", "ludb": REAL / "lobachevsky-university-electrocardiography-database-1.0.1"}
ALWAYS = {"f2", "g2", "challenge", "auroc", "auprc", "parameters", "multiply_adds", "latency_ms"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_line_of_the_grid_runs(run_cells, tmp_path, name):
    metrics = run_cells("53_ecg_run", name=name)
    assert not {m for m in ALWAYS if metrics.get(m) is None}
    assert ("lead_agreement" in metrics) == (name not in ("prna", "no-gate"))
    table, weights = EcgPipeline.from_pretrained(tmp_path / "run" / "pipeline")(signal(), fs=250.0)
    assert len(table) == 32 and table.probability.between(0, 1).all() and (weights is None) == (name in ("prna", "no-gate"))
    measured = {m for m in metrics if not m.endswith(("_lo", "_hi", "_n", "_floor", "_trivial"))}
    assert measured <= set(MEANING), sorted(measured - set(MEANING))


def signal():
    from medgen_nb.ecg.data import simulate_ecgs
    return simulate_ecgs(1).signals[0]


@pytest.mark.parametrize("data", SETS)
def test_real_sets_run(run_cells, data):
    if not SETS[data].is_dir():
        pytest.skip("the real samples do not lie beside the checkout")
    metrics = run_cells("53_ecg_run", data=data, root=str(SETS[data]))
    assert metrics["parameters"] > 0 and "lead_agreement" not in metrics and "auroc_simulated_only" not in metrics


def test_from_simulated_hearts_to_real_ones(run_cells):
    if not SETS["ludb"].is_dir():
        pytest.skip("the real samples do not lie beside the checkout")
    teach = {"model.width": 96, "model.heads": 4, "model.hidden": 384, "fit.steps": 10}          # the sizes of the pretrained pipeline
    metrics = run_cells("53_ecg_run", data="ludb", root=str(SETS["ludb"]), name="fine-tune", overrides=teach)
    assert 0.5 < metrics["rhythm_auroc_simulated_only"] <= 1 and metrics["auroc"] > 0


@pytest.mark.parametrize("scale", ["smoke", "demo", "teach", "paper"])
def test_scales_are_whole_configs(scale):
    config = Config.at(scale)
    assert config.model.width % 12 == 0 and config.data.seconds >= 5
