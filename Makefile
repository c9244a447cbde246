# `make demo` and `make test` work out of the box with make and Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.catpo-installed

.DEFAULT_GOAL := help
.PHONY: help install check docs format test test-all test-latest test-lowest nightly kills demo dist release-check bench gpu clean

help:
	@echo "make demo          pair, score, train, evaluate and report on built-in pictures"
	@echo "make test          run the tests (seconds each);  make test-all  adds the slow ones"
	@echo "make nightly       property tests with thousands of examples"
	@echo "make test-latest   contract tests against the newest supported transformers, peft and accelerate;  make test-lowest  the oldest"
	@echo "make kills         kill every command at many moments, resume, compare (long); WORK=score runs one command"
	@echo "make bench         measure speed and memory against TRL; OUT=FILE saves the figures, CASE=NAME runs one case"
	@echo "make gpu           on one GPU: check the numbers, measure published models' shapes; OUT=FILE, MINUTES=10, PART=NAME"
	@echo "make check         format, lint, types, imports, spelling, docs;  make format  fixes the first two"
	@echo "make dist          build wheel and sdist in dist/, and check them;  make release-check  runs the demo from them in a new environment"
	@echo "make docs          build the documentation site in build/site"
	@echo "make install       create the virtual environment in $(VENV); any of these does so on first use"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10. Use a newer one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Could not create a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --progress-bar off --constraint constraints.txt --editable ".[dev]"
	@touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(MAKE) docs

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

nightly: $(STAMP)
	$(BIN)/python -m pytest -m nightly --hypothesis-profile=nightly -n $(WORKERS) --dist worksteal

test-latest: $(STAMP)
	$(BIN)/python tools/test_releases.py latest

test-lowest: $(STAMP)
	$(BIN)/python tools/test_releases.py lowest

kills: $(STAMP)
	$(BIN)/python -m bench.kills $(if $(WORK),--work "$(WORK)")

demo: $(STAMP)
	$(BIN)/catpo demo

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

release-check: dist
	rm -rf build/release && $(BIN)/python -m venv build/release
	build/release/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/release && bin/catpo doctor && bin/catpo demo

bench: $(STAMP)
	$(BIN)/python -m bench.run $(foreach name,$(CASE),--case $(name)) $(if $(OUT),--out $(OUT)) $(if $(REPEAT),--repeat $(REPEAT)) $(if $(NOTES),--notes)

gpu: $(STAMP)
	$(BIN)/python -m bench.gpu $(if $(OUT),--out "$(OUT)") $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PART),--part "$(PART)")

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -exec rm -rf {} +
