# A new machine needs Python 3.11 and make. `make demo` and `make test` run `make setup` first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-fast check docs bench bench-gpu gpu soak nemesis fuzz mutants sbom audit hashes clean
help:
	@echo "make demo    install, write four synthetic hospitals, train, show the result and the report"
	@echo "make test    install and run all tests (FEDSGCG_REAL_DATA=DIR for those on real images)"
	@echo "make test-fast  formulas and units only, in a few minutes"
	@echo "make check   formatting, lint, types, import rules, documentation"
	@echo "make docs    build the documentation site into site/index.html"
	@echo "make bench   speed and memory compared with alternatives, as ratios within one run"
	@echo "make bench-gpu  the same on a CUDA device: kernels, training step, evaluation"
	@echo "make gpu     benchmarks and a study (STUDY) on one CUDA device within LIMIT (540) seconds"
	@echo "make nemesis  faults in a real federation for SECONDS (600), judged by an independent checker"
	@echo "make fuzz    CASES (100000) mutated payloads and files, all decoders in turns"
	@echo "make mutants  SAMPLE (200) small changes of the pure core in MINUTES (10), which its tests must notice"
	@echo "make sbom    list what is installed, as CycloneDX in sbom.json"
	@echo "make audit   compare the installed versions with known vulnerabilities; needs the internet"
	@echo "make soak    200 rounds with real clients: the memory must stay flat"
	@echo "make setup   install into $(VENV) only"

setup: $(STAMP)

# torch is installed first, with its exact version: a free choice of version may download gigabytes
# of another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit('$(PYTHON) is Python ' \
	  + sys.version.split()[0] + '; fedsgcg needs 3.11, 3.12 or 3.13: make PYTHON=python3.11 setup')"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: setup
	$(RUN)/fedsgcg study experiment=demo method=source,sgcg heldout=all

test: setup
	$(RUN)/python -m pytest -n 2 --dist worksteal

test-fast: setup
	$(RUN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests/unit tests/laws

check: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/zensical build --strict

# Works offline. The generated parts of docs/reference are updated first.
docs: setup
	$(RUN)/python docs/generate.py
	$(RUN)/zensical build --strict --clean

bench: setup
	$(RUN)/python -m tests.benchmarks

bench-gpu: setup
	$(RUN)/python -m tests.benchmarks gpu --folder runs/benchmarks-gpu

LIMIT ?= 540
STUDY ?= experiment=promise12
gpu: setup
	$(RUN)/python -m tests.benchmarks.gpu_session --seconds $(LIMIT) -- $(STUDY)

SECONDS ?= 600
nemesis: setup
	$(RUN)/python -m tests.nemesis --seconds $(SECONDS)

CASES ?= 100000
fuzz: setup
	$(RUN)/python -m tests.faults.fuzz --cases $(CASES)

SAMPLE ?= 200
MINUTES ?= 10
mutants: setup
	$(RUN)/python -m tests.mutants --sample $(SAMPLE) --minutes $(MINUTES)

# The tools are in an environment of their own, so that the list holds nothing of theirs.
$(VENV)-audit/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet -c constraints.txt cyclonedx-bom pip-audit
	@touch $(VENV)-audit/.installed

sbom: setup $(VENV)-audit/.installed
	$(VENV)-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		-o sbom.json $(RUN)/python

# Without the internet, or with a package index that knows no vulnerabilities, it fails: nothing was compared.
audit: $(VENV)-audit/.installed
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

hashes:
	$(PYTHON) .ci/hashes.py

soak: setup
	$(RUN)/python -m tests.benchmarks.soak --rounds 200

clean:
	rm -rf $(VENV) $(VENV)-audit sbom.json runs site build dist *.egg-info
