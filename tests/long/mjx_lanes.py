"""Pre-training on MJX with as many lanes as a batch is split for, on two cores: it must go on to its end.

    python -m pytest -s tests/long/mjx_lanes.py

MJX's own LAPACK calls split a batch into the thread pool that they run on; with two threads they waited for each other
for ever, at 64 lanes within minutes (docs/experiments.md). Nearly all of the limit is for compiling on a busy machine.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_CALLS, _LIMIT_S = 15, 1500.0


@pytest.mark.parametrize("lanes", [64, 256])
def test_many_lanes_on_two_cores_never_stop(lanes, tmp_path):
    arguments = f"""train_mjx_sac.py --engine mjx --num-envs {lanes} --total-steps {20 * lanes * _CALLS}
        --learning-starts {40 * lanes} --updates-per-iteration 2 --buffer-size {1000 * lanes} --log-every {20 * lanes}
        --judge-episodes 2 --judge-every 100000000 --out {tmp_path / "run"}""".split()
    cores = sorted(os.sched_getaffinity(0))[:2]
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, *arguments]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, timeout=_LIMIT_S, check=True)
    print(f"{lanes} lanes: {_CALLS} calls in {time.monotonic() - started:.0f} s, with compiling")
