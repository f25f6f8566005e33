"""Shared fixtures: the official environments and models are slow to build, so each is built once."""

import os

os.environ.setdefault("MUJOCO_GL", "disabled")  # tests never render

import gymnasium as gym
import pytest
import sai_mujoco  # noqa: F401  (registers the environments)

from envs import constants as c


@pytest.fixture(scope="session")
def official_envs():
    """One official environment per task, unwrapped."""
    envs = {task: gym.make(c.GYM_ID[task]) for task in c.TASKS}
    yield {task: env.unwrapped for task, env in envs.items()}
    for env in envs.values():
        env.close()
