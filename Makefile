# make run    sets up everything and runs the chain with the demo preset; PRESET=cpu SEED=1 RUN=DIR choose others
# make resume goes on with a run that was ended
# make setup  sets up everything; GPU=1 with JAX for a GPU
# make check  sets up everything and looks for mistakes: ruff, import contracts, types; 'make fix' repairs what ruff can
# make test   sets up everything and runs the tests
# make drills runs the long tests at their full size: hours; each alone as its file says; the full disk needs root
# make bench  measures speed as ratios within one run, into docs/performance.md; the machine must be quiet
# make clean  deletes what make made: the environment and the tools' caches; runs/ stays
# make picture draws docs/figures/play.webp again: the shipped policy on starts that chose nothing; needs an OpenGL
# make score  official score of the shipped policy: 20 noisy starts a task, and the keeper's one nominal episode
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HALF := $(VENV)/.half
PRESET ?= demo
SEED ?= 0
RUN ?= runs/$(PRESET)

.PHONY: setup run resume check fix test drills bench scene picture score check-pins clean

# GPU=1: PyTorch as a CPU build, so that JAX's CUDA is the only one.
setup: $(READY)
	@test -z "$(GPU)" || $(BIN)/python -c 'import jax_cuda12_plugin' 2>/dev/null || { echo "error: $(VENV) was made \
	without GPU=1: make clean, then make setup GPU=1" >&2; exit 2; }

# Made anew where its Python has gone, and where an installation was cut short: what is half there, pip takes for whole.
# The version is looked at first, before anything is loaded down.
$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "error: \
	$(PYTHON) is not Python 3.11 or 3.12: give one, make PYTHON=python3.12" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV)

# torch first and pinned: later requirements then find it satisfied.
PIP = $(BIN)/python -m pip install --quiet -c constraints.txt
INSTALL = $(PIP) torch==2.13.0 && $(PIP) -e ".[dev]"
ifdef GPU
INSTALL = $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu -c constraints.txt \
	-e ".[dev,gpu]"
endif

$(READY): pyproject.toml constraints.txt $(BIN)/python
	@if test -e $(HALF) || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "an installation was cut short: the environment is made anew"; rm -f $(BIN)/python; \
		$(MAKE) --no-print-directory $(BIN)/python; fi
	@touch $(HALF)
	{ $(INSTALL); } || { rm $(HALF); exit 2; }
	@rm $(HALF)
	@touch $@

run resume: setup
	@$(BIN)/python chain.py --preset $(PRESET) --seed $(SEED) --out "$(RUN)" $(if $(filter resume,$@),--resume) || { status=$$?; \
	echo "to go on: make resume PRESET=$(PRESET) SEED=$(SEED) RUN='$(RUN)'" >&2; exit $$status; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

drills: export BOOSTER_TRACK = none
drills: setup
	$(BIN)/python -m tests.long.fuzz
	$(BIN)/python -m pytest -s -rs tests/long/full_disk.py tests/long/secrets_search.py tests/long/trackers.py \
		tests/long/mjx_devices.py tests/long/mjx_lanes.py
	$(BIN)/python -m tests.long.kill_resume
	$(BIN)/python -m tests.long.kill_resume --stages mjx --trials 8
	$(BIN)/python -m tests.long.cloud_jobs
	$(BIN)/python -m tests.long.notebook
	$(BIN)/python -m tests.long.tuning
	$(BIN)/python -m tests.long.two_at_once
	$(BIN)/python -m tests.long.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.twin_equality
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.twin_equality --sources policy --seeds 30 \
		--checkpoint assets/policies/final

# BENCH="--rows P1 P2" chooses rows and other options.
bench: setup
	$(BIN)/python -m benchmarks.bench $(BENCH)

scene: setup
	$(BIN)/python -m booster_soccer.envs.make_scene

picture: setup
	rm -f docs/figures/play.webp
	$(BIN)/python evaluate.py --checkpoint assets/policies/final --backend twin --seed 5201 --start-noise 0.02 \
		--episodes 1 --video docs/figures/play.webp
	test -f docs/figures/play.webp

score: setup
	$(BIN)/python evaluate.py --checkpoint assets/policies/final --only goalie:0
	$(BIN)/python evaluate.py --checkpoint assets/policies/final --episodes 20 --start-noise 0.02

# The same pins for the cloud runtime's Python 3.12: all resolves to wheels, and a node with a GPU gets one CUDA.
check-pins: setup
	$(BIN)/python -m cloud.pins

.PHONY: bundle-check bundle-yaml gpu-check

# The bundle for Databricks, as far as it can be checked without a workspace.
bundle-check: setup
	$(BIN)/python -m cloud.check

bundle-yaml: setup
	$(BIN)/python -m cloud.check --write

# The first ten minutes on a GPU; without one, the same on the CPU. What a run costs: cloud/gpu_check.py --estimate.
gpu-check: setup
	$(BIN)/python cloud/gpu_check.py --out runs/gpu_check

clean:
	@if test -d $(VENV) && ! test -e $(VENV)/pyvenv.cfg; then \
		echo "error: $(VENV) is no environment of Python's, so it is not deleted" >&2; exit 2; fi
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path "./runs/*" -prune -exec rm -rf {} +
