# make quickstart  a fresh machine → .venv, then the whole job on the Python packages installed in it, then a search
# make test        a fresh machine → .venv, then the quick tests; make test-slow: kills, faults, whole jobs
PYTHON ?= python3
BIN := .venv/bin
DATA ?= data

.PHONY: quickstart test test-slow test-autoscaling audit lint bench clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found; 3.11 to 3.13 are allowed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@$(BIN)/pip install --progress-bar off -c constraints.txt -e '.[dev]' || { \
		echo "The packages could not be installed: pip's own words are above. Is its index reachable from here?" >&2; exit 1; }
	touch $@

quickstart: .venv/.installed
	$(BIN)/python jobs/run.py
	$(BIN)/python jobs/search.py "remove duplicate rows"

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.installed
	$(BIN)/python -m pytest -n 2 --maxschedchunk 1 -m slow

# starts a Ray of its own, whose nodes are processes: after all other tests
test-autoscaling: .venv/.installed
	$(BIN)/python -m pytest -m autoscaling

# known vulnerabilities of the locked packages: asks the Python advisory database, so it is no part of the tests
audit: .venv/.installed
	$(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit==2.10.1
	.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

lint: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# make bench DATA=folder-with-debian-linux-doc-sts_b-and-wordnet: the tables in benchmarks/README.md, four hours of them
bench: .venv/.installed
	$(BIN)/python benchmarks/retrieval.py --data $(DATA)
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
	$(BIN)/python benchmarks/embedding_memory.py --data $(DATA)
	$(BIN)/python benchmarks/safety.py --data $(DATA)/linux-doc

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
