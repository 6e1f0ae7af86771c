"Every line of the room's grid runs at smoke scale; in this process, without a kernel, so that nineteen runs take a minute or two."
import pytest

from medgen_nb.ehr.room import ABLATIONS, MEANING

ALWAYS = {"prevalence_r", "cmd", "mmd", "mcad", "discriminator_auc", "air", "mir", "nnaa"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_line_of_the_grid_runs(run_cells, tmp_path, name):
    metrics = run_cells("36_ehr_run", name=name)
    missing = [m + mark for m in ALWAYS for mark in ("", "_floor", "_trivial") if metrics.get(m + mark) is None]
    assert not missing
    assert ("guided_rate" in metrics) == (name in ("base", "conditional", "fault-drift") or name.startswith("guidance-"))
    assert ("rare_auprc_gain" in metrics) == (name == "base")
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_what_is_measured_is_explained(run_cells):
    metrics = run_cells("36_ehr_run")
    measured = {m for m in metrics if not m.endswith(("_lo", "_hi", "_n", "_floor", "_trivial"))}
    assert measured <= set(MEANING), sorted(measured - set(MEANING))
