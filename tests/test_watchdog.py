"""A run that hangs ends by itself, and only that one."""

import subprocess
import sys

from booster_soccer.store.watchdog import STALLED

# Every iteration, judgement and save has its own time: those that may take long take longer than an iteration may.
_RUN = """
import time
from pathlib import Path
from booster_soccer.store import run, watchdog
from tests.toy_run import Config, go
run.ITERATION_S, run.SLOW_S, watchdog._TICK_S = {iteration_s}, {slow_s}, 0.02
def slowly():
    time.sleep(0.8)
def hang():
    time.sleep(60)
go(Config(Path({out!r})), step_0=slowly, judge_12=slowly, state_16=slowly, {hangs}=hang)
"""


def run(tmp_path, hangs: str, iteration_s: float, slow_s: float) -> tuple[int, list[str]]:
    code = _RUN.format(out=str(tmp_path / "run"), hangs=hangs, iteration_s=iteration_s, slow_s=slow_s)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    return done.returncode, done.stderr.splitlines()


def test_an_iteration_that_hangs_ends_the_run(tmp_path):
    """With status 75, one line and the stack of the place; the first iteration, judgements and saves may be slow."""
    status, said = run(tmp_path, "step_20", iteration_s=0.5, slow_s=30.0)
    assert status == STALLED == 75
    (line,) = (line for line in said if line.startswith("error: "))
    assert said[-1] == line and "the iteration after step 20 did not end within 0.5 s" in line and "--resume" in line
    assert line.endswith("; more: docs/02-mjx-training.md#watchdog-status-75")
    assert any("in hang" in line for line in said) and any("in train" in line for line in said)
    assert (tmp_path / "run.resume").is_dir() and not (tmp_path / "run").exists()


def test_a_judgement_that_hangs_ends_the_run_too(tmp_path):
    status, said = run(tmp_path, "judge_24", iteration_s=10.0, slow_s=1.0)
    assert status == STALLED and "what is due at step 24" in said[-1]


def test_what_comes_before_and_after_the_iterations_is_watched_too():
    """The timing of the engines, here; the warm-up and the comparison at the end in the same way."""
    code = """
import time
import train_mjx_sac as train
from booster_soccer.store import watchdog
from booster_soccer.store.signals import StopSignal
watchdog._TICK_S, train.LONG_S = 0.02, 0.5
train.faster = lambda begin: time.sleep(40)
with StopSignal() as stop:
    train.timed_engine(train.PRESETS["l4"], None, [], stop)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == STALLED
    assert "the timing of both engines did not end within 0.5 s" in done.stderr.splitlines()[-1]
