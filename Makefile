# make demo      set up a fresh machine and run the main job on the embedded model
# make test      set up; lint, types and the tests of one process: minutes
# make check-all set up; lint, types and all tests: several processes, kills, full disks, bad files, notebooks, the
#                site, a browser and real models besides
# make coverage  set up; which lines the tests of one process reach
# make docs      set up and build the documentation site into build/site
# make dist      set up, build wheel and sdist into dist, and check what is in them
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# The packages are compiled when they are first imported. Where that may not be kept, as some images say, it is done anew
# by every process: 10 seconds each.
unexport PYTHONDONTWRITEBYTECODE
# A worker that has nothing left takes tests from another, so that no long file is waited for at the end.
SHARED_OUT = -n auto --dist worksteal

.PHONY: demo test check-all all-tests coverage check docs dist clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "torch==2.13.0" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/sku run

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -m "not integration" $(SHARED_OUT)

check-all: check all-tests

all-tests: $(VENV)/.installed
	$(BIN)/python -m pytest $(SHARED_OUT)

# Nearly doubles the time of the tests (9.5 minutes instead of 5 on two cores), so nothing waits for it.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not integration" $(SHARED_OUT) --cov --cov-report=term

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist

clean:
	rm -rf $(VENV) dist build
