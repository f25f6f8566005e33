"""The twin as a gymnasium vector environment, for code that expects one.

    envs = TwinVectorEnv("target", num_envs=64, num_threads=2)                   # torque, 500 Hz
    envs = TwinVectorEnv("target", num_envs=64, control="pd")                    # action in [-1, 1], 50 Hz

With `control="torque"` it gives what `gymnasium.vector.SyncVectorEnv` over the official environments gives,
next-step autoreset and random streams included.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from booster_soccer.envs import constants as c
from booster_soccer.envs.twin import TwinEnv
from booster_soccer.errors import UserError

Control = Literal["torque", "pd"]


class TwinVectorEnv(VectorEnv):
    """Official observations and infos; reward is the official step reward, summed over an action's steps.

    `control`: "torque" takes joint torques in N m, one physics step an action; "pd" takes actions in
    [-1, 1], held for ten physics steps with the platform's PD torque (`envs/pd.py`). Lanes that end are
    reset on the next step, their action of that step ignored.
    """

    def __init__(self, task: str, num_envs: int, num_threads: int = 1, control: Control = "torque"):
        if control not in get_args(Control):
            raise UserError(f"unknown control '{control}': choose one of {', '.join(get_args(Control))}")
        self.twin = TwinEnv(task, num_envs, num_threads)
        self.num_envs, self.control = num_envs, control
        unit = gym.spaces.Box(-1.0, 1.0, (c.NUM_JOINTS,), np.float32)
        self.single_observation_space = self.twin.observation_space
        self.single_action_space = self.twin.action_space if control == "torque" else unit
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        action_s = c.PHYSICS_DT_S if control == "torque" else c.ACTION_DT_S
        self.metadata = {
            "render_modes": [],
            "render_fps": round(1.0 / action_s),
            "autoreset_mode": AutoresetMode.NEXT_STEP,
        }

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all lanes. An integer seed gives lane i the seed plus i; None continues each lane's stream.

        `options` has no entries here.
        """
        if options:
            raise UserError(f"the twin's reset has no options, but was given {', '.join(options)}")
        if seed is None:
            seeds = [None] * self.num_envs
        elif np.ndim(seed) == 0:
            seeds = [seed + i for i in range(self.num_envs)]
        else:
            seeds = seed
        obs, info = self.twin.reset(seeds)
        return obs, _with_masks(info, np.ones(self.num_envs, dtype=bool))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the lanes that go on and reset those that ended on the step before."""
        ended = ~self.twin.alive
        if self.control == "torque":
            step = self.twin.step_torque(actions)
        else:
            step = self.twin.step_action(np.asarray(actions, dtype=np.float32))
        obs, info, terminated, truncated = step.obs, step.info, step.terminated, step.truncated
        if ended.any():
            obs, info = self.twin.reset([None] * int(ended.sum()), lanes=ended)
            terminated, truncated = terminated & ~ended, truncated & ~ended
        infos = _with_masks(info, np.ones(self.num_envs, dtype=bool))
        terms = {name: values * ~ended for name, values in step.reward_terms.items()}
        infos |= {"reward_terms": _with_masks(terms, ~ended), "_reward_terms": ~ended}
        return obs, step.reward, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self.twin.close()


def _with_masks(info: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """gymnasium's vector info: beside each `key` a mask `_key` of the lanes that have it."""
    return info | {f"_{key}": mask for key in info}
