"""The wheel, without development packages: every module imports, and a run works with no checkout near."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_in_a_fresh_environment(tmp_path):
    run = lambda *words, **more: subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True, **more)
    try:
        source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".venv", ".git", "runs", "scratch", "build", "*.egg-info"))
        run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source)
        wheel = next(tmp_path.glob("*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        assert "medgen_nb/notebooks/36_ehr_run.ipynb" in names and not any(name.startswith(("nbs/", "tests/")) for name in names)
        venv.create(tmp_path / "fresh", with_pip=True)
        python = tmp_path / "fresh" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"OMP_NUM_THREADS": "1"}
        installed = run(python, "-m", "pip", "list", "--format=freeze").stdout.lower()
        assert not any(f"\n{name}==" in installed for name in ("nbdev", "jupyterlab", "pytest", "ruff")), "a development package came along"
        modules = [name.removesuffix(".py").replace("/", ".") for name in names if name.startswith("medgen_nb/") and name.endswith(".py") and "__" not in name]
        run(python, "-c", "import importlib\nfor name in %r: importlib.import_module(name)" % [m for m in modules if not m.endswith("_modidx")], cwd=tmp_path, env=clean)
        done = run(tmp_path / "fresh" / "bin" / "medgen", "run", "ehr", "--scale", "smoke", "--out", "smoke", cwd=tmp_path, env=clean)
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{error.cmd}\n{error.stdout[-1500:]}\n{error.stderr[-3000:]}") from None
    finally:
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)   # 5 GB
    assert (tmp_path / "smoke" / "metrics.json").exists(), done.stdout
    assert (tmp_path / "runs" / "ledger.jsonl").exists(), "an installed package keeps its ledger in the working directory"
