# make run    sets up everything and runs the chain with the demo preset
# make check  sets up everything and looks for mistakes: ruff, import contracts, types; 'make fix' repairs what ruff can
# make test   sets up everything and runs the tests
# make drills runs the long tests at their full size: hours; each alone as its file says; the full disk needs root
# make score  official score of the shipped policy: 20 noisy starts a task, and the keeper's one nominal episode
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PRESET ?= demo
RUN ?= runs/$(PRESET)
export MUJOCO_GL ?= disable

.PHONY: setup run check fix test drills scene score check-pins clean

setup: $(READY)

# torch first and pinned: later requirements then find it satisfied.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

run: setup
	$(BIN)/python chain.py --preset $(PRESET) --out $(RUN)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

drills: setup
	$(BIN)/python -m tests.long.fuzz
	$(BIN)/python -m pytest -s -rs tests/long/full_disk.py tests/long/secrets_search.py
	$(BIN)/python -m tests.long.kill_resume
	$(BIN)/python -m tests.long.kill_resume --stages mjx --trials 8
	$(BIN)/python -m tests.long.cloud_jobs
	$(BIN)/python -m tests.long.notebook
	$(BIN)/python -m tests.long.tuning
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.twin_equality
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.twin_equality --sources policy --seeds 30 \
		--checkpoint assets/policies/final

scene: setup
	$(BIN)/python -m booster_soccer.envs.make_scene

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
	rm -rf $(VENV) runs
