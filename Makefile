# Two commands do everything on a machine with Python ≥ 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests; each starts a Ray of its own with two workers.
JOBS ?= 2
BIN := $(VENV)/bin
# The environment is made anew whenever the pinned requirements change.
STAMP := $(VENV)/.requirements-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-cluster lint types format clean

demo: $(STAMP)  ## both tables on the embedded digits, offline, and the report
	$(BIN)/fedsim compare --preset quick --output runs --resume
	@echo "Now open runs/quick/report.html, or browse everything with: $(BIN)/fedsim ui"

test: lint types $(STAMP)  ## lint, format, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-cluster: $(STAMP)  ## `ray up` on several hosts on this machine; root, iproute2, openssh-server, rsync
	$(BIN)/python -m pytest -m cluster tests/cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	rm -f $(VENV)/.requirements-*
	touch $@

clean:
	rm -rf $(VENV) runs
