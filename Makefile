# Every target installs what it needs into .venv by itself. One command = CI: `bash .ci/run`.
PYTHON ?= python3
VENV ?= .venv
NPROC ?= 2
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test soak check docs pictures bench clean

# Train the default job on two ranks; more arguments: make train ARGS="train.epochs=5 run.name=short"
train: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) launch/train.py configs/credit_risk.yaml $(ARGS)

# Everything that proves the promises, in minutes
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(ARGS)

# The long versions: random kills by the dozen
soak: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

# Lint, types, import contracts
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Regenerate the table of configuration keys in the README
docs: $(INSTALLED)
	$(BIN)/python -m dist_train.config.reference README.md

# The pictures of the README, from a real run
pictures: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/pictures.py

# Everything that is measured, beside the tutorial loop, Lightning and Accelerate; a part of it: make bench ARGS="--only cpu"
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dist_train needs Python >= 3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
