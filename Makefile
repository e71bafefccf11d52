# make demo    set up, then learn aluminium from real DFT on this machine
# make test    set up, then lint and every test
# make setup   only set up: .venv with everything in it; nothing to do takes no time
# make lint    ruff, mypy, import-linter
# make bench   set up, install the peers, and compare speed with them; the table is kept under benchmarks/results/
# make clean   remove what set-up and builds made (the Horovod wheel stays in the user's cache)

# The first of these that is new enough; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test setup lint slurm bench clean

demo: setup
	@$(BIN)/smelt run configs/aluminum-demo.toml

# Files of tests run four at a time on two cores: tests/slurm, each with a cluster of its own, mostly wait. What Python
# compiles is kept, whatever the environment says: tests start hundreds of processes.
test: lint slurm
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadscope --no-loadscope-reorder

# The daemons that tests/slurm starts on loopback. Without root those tests are skipped and say what is missing.
slurm:
	@test -x "$$(PATH=$$PATH:/usr/sbin command -v slurmctld)" || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	{ mkdir -p build && echo "set-up: Slurm from this system's packages" && apt-get -qq update && \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	slurmctld slurmd slurm-client munge >build/slurm.log 2>&1; } || \
	echo "set-up: no Slurm could be installed, see build/slurm.log; its tests are skipped"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup
	@$(BIN)/python -c 'import torchani' 2>/dev/null || $(BIN)/python -m pip --disable-pip-version-check -q install \
	$$($(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')
	@$(BIN)/python -m benchmarks

setup:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "set-up: Python >= 3.11 is needed, found '$(PYTHON)'; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" tools/install.py

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find potential -name '*.so' -delete
