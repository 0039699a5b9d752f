# make venv | demo | test | tensorboard | clean. Every target builds .venv first.
# PyPI's torch for Linux brings CUDA along. For the small CPU build, point PIP_EXTRA_INDEX_URL at
# PyTorch's index of CPU wheels; pip prefers them, and constraints.txt keeps the version.
PYTHON ?= python3
PORT ?= 6006
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
CODE := hypertorch experiments tests

.PHONY: venv demo test lint types tensorboard clean

venv: $(STAMP)

# torch comes first and torchvision without its dependencies, so that one torch is resolved, once.
$(STAMP): constraints.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) --no-deps torchvision
	$(PIP) numpy pillow
	$(PIP) --no-build-isolation --editable '.[experiments,test]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m experiments.demo

test: lint types
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(STAMP)
	$(BIN)/mypy hypertorch experiments

tensorboard: $(STAMP)
	$(BIN)/tensorboard --logdir runs --port $(PORT)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hypertorch experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
