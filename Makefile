# make quickstart  creates .venv, runs the whole job on the Python packages installed in it, then a search
# make test        creates .venv, runs lint, types and the quick tests
# make test-slow   one scenario for each promise that needs kills, faults or several nodes; .ci/run runs both
# make test-all    everything: these two, all variants and every kill point, before a release
PYTHON ?= python3
BIN := .venv/bin
DATA ?= data
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: install install-dev quickstart test test-slow test-all audit lint bench clean

# uv where it is on the PATH, else pip; both print errors only
UV := $(shell command -v uv)
VENV := $(if $(UV),uv venv --quiet --allow-existing --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)
PIP := $(if $(UV),VIRTUAL_ENV=.venv uv pip install --quiet,$(BIN)/pip install -qq --disable-pip-version-check)
FAILED = { echo "The packages could not be installed: see the error above. Can this machine reach a package index?" >&2; exit 1; }
RAY := ray[default,train,data,tune]
INSTALL = echo "installing $(1)" >&2; $(PIP) -c constraints.txt $(2) || $(FAILED)

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found; 3.11 to 3.13 are allowed: make PYTHON=python3.11")'
	@echo "making .venv with the locked packages, which takes a few minutes" >&2
	@$(VENV)
	@$(call INSTALL,torch,torch)
	@$(call INSTALL,Ray,'$(RAY)')
	@$(call INSTALL,what reads and stores data,datasets pylance lancedb lance-ray obstore pinecone)
	@$(call INSTALL,pretrained models and metrics,transformers peft scikit-learn)
	@$(call INSTALL,the project and the rest,-e .)
	@touch $@

.venv/.installed-dev: .venv/.installed
	@$(call INSTALL,what the tests need,-e '.[dev]')
	@touch $@

install: .venv/.installed

install-dev: .venv/.installed-dev

quickstart: install
	$(BIN)/python jobs/run.py
	$(BIN)/python jobs/search.py "remove duplicate rows"

test: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

test-slow: install-dev
	$(PYTEST) -m "slow and not exhaustive"

test-all: test test-slow
	$(PYTEST) -m exhaustive

# known vulnerabilities of the locked packages: asks the Python advisory database, so it is no part of the tests
audit: install
	$(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit==2.10.1
	.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

lint: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# make bench DATA=folder-with-debian-linux-doc-sts_b-and-wordnet: the tables of real data in benchmarks/README.md, four hours
bench: install-dev
	$(BIN)/python benchmarks/retrieval.py --data $(DATA)
	$(BIN)/python benchmarks/recipes.py --data $(DATA)
	$(BIN)/python benchmarks/sweep.py --data $(DATA)
	$(BIN)/python benchmarks/mining.py --data $(DATA)
	$(BIN)/python benchmarks/fine_tuning.py --data $(DATA)
	$(BIN)/python benchmarks/pretrained.py --data $(DATA)
	$(BIN)/python benchmarks/denoising.py --data $(DATA)
	$(BIN)/python benchmarks/near_duplicates.py --data $(DATA)
	$(BIN)/python benchmarks/near_duplicates_accuracy.py --data $(DATA)
	$(BIN)/python benchmarks/signatures.py --data $(DATA)
	$(BIN)/python benchmarks/tokenizing.py --data $(DATA)
	$(BIN)/python benchmarks/memory.py --data $(DATA)
	$(BIN)/python benchmarks/feed.py --data $(DATA)
	$(BIN)/python benchmarks/encoding.py --data $(DATA)
	$(BIN)/python benchmarks/static_table.py --data $(DATA)
	$(BIN)/python benchmarks/embedding_memory.py --data $(DATA)
	$(BIN)/python benchmarks/words.py --data $(DATA)
	$(BIN)/python benchmarks/safety.py --data $(DATA)/linux-doc

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
