"Every line of the room's grid runs at smoke scale; in this process, without a kernel, so that nineteen runs take a minute or two."
import json
from pathlib import Path

import matplotlib
import nbformat
import pytest

from medgen_nb.ehr.room import ABLATIONS, MEANING

CELLS = [cell for cell in nbformat.read(Path(__file__).parents[1] / "nbs" / "36_ehr_run.ipynb", 4).cells if cell.cell_type == "code"]
ALWAYS = {"prevalence_r", "cmd", "mmd", "mcad", "discriminator_auc", "air", "mir", "nnaa"}


def run_cells(tmp_path: Path, monkeypatch, **parameters) -> dict:
    "Run the notebook's cells in one namespace with some parameters replaced; returns metrics.json."
    matplotlib.use("Agg")
    monkeypatch.setenv("MEDGEN_HOME", str(tmp_path))
    space = {"__name__": "run"}
    for cell in CELLS:
        exec(compile(cell.source, "36_ehr_run", "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= {"scale": "smoke", "out": str(tmp_path / "run")} | parameters
    matplotlib.pyplot.close("all")
    return json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_line_of_the_grid_runs(tmp_path, monkeypatch, name):
    metrics = run_cells(tmp_path, monkeypatch, name=name)
    missing = [m + mark for m in ALWAYS for mark in ("", "_floor", "_trivial") if metrics.get(m + mark) is None]
    assert not missing
    assert ("guided_rate" in metrics) == (name in ("base", "conditional", "fault-drift") or name.startswith("guidance-"))
    assert ("rare_auprc_gain" in metrics) == (name == "base")
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_what_is_measured_is_explained(tmp_path, monkeypatch):
    metrics = run_cells(tmp_path, monkeypatch)
    measured = {m for m in metrics if not m.endswith(("_lo", "_hi", "_n", "_floor", "_trivial"))}
    assert measured <= set(MEANING), sorted(measured - set(MEANING))
