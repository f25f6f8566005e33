"""Shared fixtures: the official environments and models are slow to build, so each is built once."""

import os
import tempfile

os.environ.setdefault("BOOSTER_TRACK", "none")  # trackers take seconds; the tests of tracking ask for them
# Networks as small as ours gain nothing from a second thread, and where others want the cores it waits in a busy loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compile more than they compute: MJX takes 22 s of CPU to compile instead of 36 s.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# What one test has compiled the next one need not, nor the processes that it starts.
_COMPILED = tempfile.TemporaryDirectory(prefix="xla-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0")

import gymnasium as gym
import pytest
import sai_mujoco  # noqa: F401  (registers the environments)

from booster_soccer.envs import constants as c


@pytest.fixture(scope="session")
def official_envs():
    """One official environment per task, unwrapped."""
    envs = {task: gym.make(c.GYM_ID[task]) for task in c.TASKS}
    yield {task: env.unwrapped for task, env in envs.items()}
    for env in envs.values():
        env.close()
