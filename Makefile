# make demo: every room at demo scale, then runs/report.html · make test: all tests · make lab: JupyterLab on nbs/
# demo and test use one thread a process: on a busy machine numpy's and torch's thread pools wait for each other, and all takes many times as long.
# Each sets up .venv itself when it is missing or older than the package's description.

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lab
.DEFAULT_GOAL := demo

$(READY): settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "medgen-nb needs Python 3.11 or 3.12: install one, or name it with make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setting up .venv with $(PYTHON): about 5 GB of packages, a few minutes the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(READY)
	@rm -rf runs/demo
	@rooms=$$($(BIN)/medgen list --names) && test -n "$$rooms" && for room in $$rooms; do \
		OMP_NUM_THREADS=1 $(BIN)/medgen run $$room --scale demo --out runs/demo/$$room && $(BIN)/medgen report runs/demo/* || exit 1; done

test: $(READY)
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lab: $(READY)
	$(BIN)/jupyter lab nbs/
