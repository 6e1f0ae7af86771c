"What several test files use."
import json
from pathlib import Path

import matplotlib
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "nbs"


@pytest.fixture
def run_cells(tmp_path, tmp_path_factory, monkeypatch):
    "Run a run notebook's cells at smoke scale in one namespace, without a kernel, with some parameters replaced; returns metrics.json. Stages that lines have in common are trained once."
    def run(notebook: str, **parameters) -> dict:
        matplotlib.use("Agg")
        monkeypatch.setenv("MEDGEN_HOME", str(tmp_path))
        monkeypatch.setenv("MEDGEN_STAGES", str(tmp_path_factory.getbasetemp() / "stages"))
        space = {"__name__": "run"}
        for cell in (cell for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells if cell.cell_type == "code"):
            exec(compile(cell.source, notebook, "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space |= {"scale": "smoke", "out": str(tmp_path / "run")} | parameters
        matplotlib.pyplot.close("all")
        return json.loads((tmp_path / "run" / "metrics.json").read_text())
    return run
