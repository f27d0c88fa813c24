# make demo   set up a fresh machine and run the main job on the embedded model
# make test   set up and pass the checks that CI runs
# make faults run the batteries of faults: kills, signals, full disks, bad input
# make docs   set up and build the documentation site into build/site
# make dist   set up, build wheel and sdist into dist, and check what is in them
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test faults check docs dist clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/sku run

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/faults -n auto --dist loadfile --cov --cov-report=term

faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n auto

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist

clean:
	rm -rf $(VENV) dist build
