PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow theory test-all lint clean

# Set-up happens once; touching pyproject.toml or constraints.txt repeats it.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; PyTorch is large)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/mlsbi run ou --budget 20000 --seed 1 --ensemble 5 --out runs/demo --overwrite

test: $(STAMP)
	@$(BIN)/python -m pytest tests mlsbi theory_checks --doctest-modules -m "not slow" -n 2 --dist worksteal

# What `make test` leaves out: more than a few seconds each.
slow: $(STAMP)
	@$(BIN)/python -m pytest tests mlsbi theory_checks --doctest-modules -m slow -n 2 --dist worksteal

# The property tests of the theory with ten times as many examples, others in every run.
theory: $(STAMP)
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest theory_checks -n 2 --dist worksteal

test-all: test slow theory

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
