"""The official environments with their robot turned where it stands, which proves its quaternion's order (gates.py)."""

import gymnasium as gym
import mujoco
import numpy as np

from booster_soccer.envs import scene

_TILT_RAD = 0.2  # standard deviation of roll and pitch
_STREAM = 1  # a random stream beside the bare seed's

Info = dict[str, np.ndarray]


def turned_rng(seed: int) -> np.random.Generator:
    """What draws the turns of a master seed."""
    return np.random.default_rng((seed, _STREAM))


def turn(env: gym.Env, quat_wxyz: np.ndarray) -> tuple[np.ndarray, Info]:
    """Turn the official robot where it stands; `obs` and `info` from the environment's own methods."""
    base = env.unwrapped
    model, data = base.sim.model._model, base.sim.data._data
    root = scene.official_addresses(model).root_q
    data.qpos[root] = [*data.qpos[root][:3], *quat_wxyz]
    mujoco.mj_forward(model, data)
    return base._get_obs(), base._get_info() | {"task_index": env.task_index}


def random_quat_wxyz(rng: np.random.Generator) -> np.ndarray:
    """Any heading, and a tilt as of a stumbling robot."""
    roll_pitch_yaw_rad = [*rng.normal(0.0, _TILT_RAD, 2), rng.uniform(-np.pi, np.pi)]
    quat_wxyz = np.zeros(4)
    mujoco.mju_euler2Quat(quat_wxyz, roll_pitch_yaw_rad, "XYZ")
    return quat_wxyz


class Turned(gym.Wrapper):
    """The official environment, its robot turned at every start."""

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self._rng = turned_rng(seed)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, Info]:
        self.env.reset(seed=seed, options=options)
        return turn(self.env, random_quat_wxyz(self._rng))
