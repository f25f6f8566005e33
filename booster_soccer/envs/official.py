"""The official environments as the platform runs them: task one-hot in `info`, seeds, start noise, 500 Hz steps.

An episode here is what `submit.py` proves through the platform's own SDK: every tenth physics step the
policy acts on the current observation, its joint target is held, and the PD torque is computed from the
observed joint state at every 500 Hz step. Nothing in this module imports JAX or PyTorch, so that worker
processes stay small.
"""

import functools
import importlib.util
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import sai_mujoco  # noqa: F401  registers the environments

from booster_soccer.envs import constants as c
from booster_soccer.envs import pd, scene
from booster_soccer.errors import More, UserError

_JOINT_POS = slice(0, c.NUM_JOINTS)  # of the official observation, which begins like our own
_JOINT_VEL = slice(c.NUM_JOINTS, 2 * c.NUM_JOINTS)
_STILL_M_S = 0.05  # horizontal speed below which a ball goes nowhere in particular
_NOISE_STREAM = 1  # our own random stream of an episode seed: the environment itself draws from the bare seed


class Ball(NamedTuple):
    """The ball at one physics step, each (..., 3), positions with the official lag."""

    centre_pos_w: np.ndarray  # m
    centre_vel_w: np.ndarray  # m/s
    site_pos_w: np.ndarray  # m
    site_vel_w: np.ndarray  # m/s


class TaskIndex(gym.Wrapper):
    """Adds the task one-hot (3,) float32 to `info`, on reset and step, like the platform's own wrapper."""

    def __init__(self, env: gym.Env, task: str):
        super().__init__(env)
        self.task_index = np.eye(c.NUM_TASKS, dtype=np.float32)[c.TASKS.index(task)]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        obs, info = self.env.reset(seed=seed, options=options)
        info["task_index"] = self.task_index
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        info["task_index"] = self.task_index
        return obs, reward, terminated, truncated, info


def make(task: str) -> TaskIndex:
    """The official environment of a task, in the three-task competition's setting.

    Raises `UserError` for an unknown task or a mujoco that cannot load it.
    """
    if task not in c.TASKS:
        raise UserError(f"unknown task '{task}': choose one of {', '.join(c.TASKS)}")
    scene.check_mujoco_version()
    scene.keep_mujoco_quiet()
    return TaskIndex(gym.make(c.GYM_ID[task]), task)


def match_seed(master: int, index: int) -> int:
    """The platform's seed of an episode, by its own function."""
    return _match_seed_of_the_platform()(master, index)


@functools.cache
def _match_seed_of_the_platform() -> Callable[[int, int], int]:
    """Run from its file alone: `sai_rl` itself takes seconds, wants a home directory to write to, and changes how
    tracebacks look.
    """
    package = importlib.util.find_spec("sai_rl")
    if package is None or package.origin is None:
        raise UserError(
            f"the platform's SDK is not there: install sai-rl, in the version of constraints.txt; {More.VERSIONS}"
        )
    return runpy.run_path(str(Path(package.origin).parent / "benchmark" / "seed.py"))["get_match_seed"]


def start_noise_rad(seed: int, sd_rad: float) -> np.ndarray:
    """Normal noise (12,) on the start's joint positions, a function of the episode's seed alone."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_NOISE_STREAM,)))
    return rng.normal(0.0, sd_rad, c.NUM_JOINTS)


def reset(env: gym.Env, seed: int, noise_sd_rad: float = 0.0) -> tuple[np.ndarray, dict]:
    """Reset with a seed, then move the joints by noise; velocities stay zero, as at every official start."""
    obs, info = env.reset(seed=seed)
    if noise_sd_rad == 0.0:
        return obs, info
    official = env.unwrapped
    model, data = official.sim.model._model, official.sim.data._data
    data.qpos[scene.official_addresses(model).joint_q] += start_noise_rad(seed, noise_sd_rad)
    mujoco.mj_forward(model, data)
    return official._get_obs(), official._get_info() | {"task_index": info["task_index"]}


def direction_deg(vector_w: np.ndarray, line_w: np.ndarray) -> float:
    """Angle of a vector (3,) from a line (3,), seen from above, in (-180, 180]; positive to the left."""
    (x, y), (line_x, line_y) = vector_w[:2], line_w[:2]
    return float(np.degrees(np.arctan2(line_x * y - line_y * x, line_x * x + line_y * y)))


def roll_phase_deg(site_from_centre_w: np.ndarray, velocity_w: np.ndarray) -> float:
    """Where the ball's site is on its way round the centre, in [0, 360), of a ball that rolls along a velocity.

    0 under the centre, 90 behind it and going up, 180 on top, 270 in front. A ball that rolls at v without
    slipping has its site at v (1 - cos phase) along its way: nothing at 0, twice the centre's speed at 180.
    """
    ahead = velocity_w[:2] / np.hypot(*velocity_w[:2])
    return float(np.degrees(np.arctan2(-site_from_centre_w[:2] @ ahead, -site_from_centre_w[2])) % 360.0)


def ball_quantities(shot: Ball | None, end: Ball, aim_pos_w: np.ndarray) -> dict[str, float | None]:
    """Speed and direction of a shot, and the roll of the ball at the end, as `EpisodeResult` names them.

    `aim_pos_w` (3,): the goal's centre, window or target.
    """
    speed, direction, phase = None, None, None
    if shot is not None:
        speed = float(np.linalg.norm(shot.centre_vel_w))
        if np.hypot(*shot.centre_vel_w[:2]) >= _STILL_M_S:
            direction = direction_deg(shot.centre_vel_w, aim_pos_w - shot.centre_pos_w)
    if np.hypot(*end.centre_vel_w[:2]) >= _STILL_M_S:
        phase = roll_phase_deg(end.site_pos_w - end.centre_pos_w, end.centre_vel_w)
    return {"shot_speed_m_s": speed, "shot_direction_deg": direction, "roll_phase_deg": phase}


class Step(NamedTuple):
    """What one call brought, each with a leading axis of one lane, as of `envs/twin.py`."""

    obs: np.ndarray  # (1, 45 | 54 | 39) float32
    info: dict[str, np.ndarray]
    reward_terms: dict[str, np.ndarray]  # raw, of the last physics step
    terminated: np.ndarray
    truncated: np.ndarray


class OfficialEnv:
    """One official environment as a batch of one, with the interface of its twin (`envs/twin.py: TwinEnv`)."""

    num_lanes = 1

    def __init__(self, task: str, env: gym.Env | None = None, steps_per_action: int = c.PHYSICS_STEPS_PER_ACTION):
        """`env`: instead of a new one, for example with a wrapper around it."""
        self.env = make(task) if env is None else env
        self._base, self._steps_per_action = self.env.unwrapped, steps_per_action

    def reset(
        self, seeds: Sequence[int], start_noise_rad: float = 0.0, lanes: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Start an episode."""
        self._obs, self._info = reset(self.env, seeds[0], start_noise_rad)
        self._model, self._data = self._base.sim.model._model, self._base.sim.data._data
        self._ball_geom = self._model.geom("ball").id
        self._is_robot_geom = np.zeros(self._model.ngeom, dtype=bool)
        self._is_robot_geom[self._base.robot_geom_ids] = True
        self.steps, self.touches = np.zeros((2, 1), dtype=np.int64)
        self.ball_height_max_m = np.zeros(1)
        self.shot = self.ball  # the last one; means nothing before a touch
        self._touching = False
        return self._obs[None], _batch(self._info)

    def step_torque(self, torque_nm: np.ndarray, num_steps: int = 1) -> Step:
        """Physics steps with joint torques (1, 12) in N m, until the episode ends."""
        return self._step(lambda: torque_nm[0], num_steps)

    def step_action(self, action: np.ndarray) -> Step:
        """An action (1, 12) in [-1, 1] held for its physics steps, until the episode ends."""
        return self._step(
            lambda: pd.platform_torque_nm(action[0], self._obs[_JOINT_POS], self._obs[_JOINT_VEL]),
            self._steps_per_action,
        )

    def _step(self, torque_nm: Callable[[], np.ndarray], num_steps: int) -> Step:
        for _ in range(num_steps):
            self._obs, _, terminated, truncated, self._info = self.env.step(torque_nm())
            self.steps += 1
            self._note_ball(terminated or truncated)
            if terminated or truncated:
                break
        terms, ends = self._info["reward_terms"], (np.array([bool(end)]) for end in (terminated, truncated))
        return Step(self._obs[None], _batch(self._info), _batch(terms), *ends)

    def _note_ball(self, ended: bool) -> None:
        """Keep touches, height, and the last shot: after a release, or at the end if still touched."""
        one, other = self._data.contact.geom.T  # (2, contacts)
        robot, ball = self._is_robot_geom, self._ball_geom
        touching = bool(((robot[one] & (other == ball)) | (robot[other] & (one == ball))).any())
        self.touches += touching and not self._touching
        if self._touching and not touching or touching and ended:
            self.shot = self.ball
        self._touching = touching
        self.ball_height_max_m = np.fmax(self.ball_height_max_m, self._data.geom("ball").xpos[2])

    @property
    def imu_pos_w(self) -> np.ndarray:
        """(1, 3) m, with the official lag."""
        return self._data.site(self._base._root_site).xpos[None]

    @property
    def ball(self) -> Ball:
        """The ball now, each (1, 3)."""
        sim, positions = self._base.sim.data, (self._data.geom("ball").xpos, self._data.site("ball").xpos)
        vectors_w = positions[0], sim.get_geom_xvelp("ball"), positions[1], sim.get_site_xvelp("ball")
        return Ball(*(vector_w.copy()[None] for vector_w in vectors_w))

    def close(self) -> None:
        """Give back the environment."""
        self.env.close()


def _batch(values: dict) -> dict[str, np.ndarray]:
    """Numbers and arrays with a leading axis of one."""
    return {key: np.asarray(value)[None] for key, value in values.items() if not isinstance(value, dict)}
