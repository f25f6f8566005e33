"""The official environments as the platform runs them: task one-hot in `info`, seeds, start noise, 500 Hz steps.

An episode here is what `submit.py` proves through the platform's own SDK: every tenth physics step the
policy acts on the current observation, its joint target is held, and the PD torque is computed from the
observed joint state at every 500 Hz step. Nothing in this module imports JAX or PyTorch, so that worker
processes stay small.
"""

from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import sai_mujoco  # noqa: F401  registers the environments

from booster_soccer.envs import constants as c
from booster_soccer.envs import pd, scene
from booster_soccer.errors import UserError

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
    return TaskIndex(gym.make(c.GYM_ID[task]), task)


def match_seed(master: int, index: int) -> int:
    """The platform's seed of an episode: its own function, imported here because `sai_rl` is slow to load."""
    from sai_rl.benchmark.seed import get_match_seed

    return get_match_seed(master, index)


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


def aim_pos_w(task: str, imu_pos_w: np.ndarray, target_from_imu_w: np.ndarray) -> np.ndarray:
    """Where the ball should go (..., 3): the goal's centre in the goalie task, else window or target."""
    if task == "goalie":
        return np.broadcast_to(c.GOAL_POS_W[0], imu_pos_w.shape)
    return imu_pos_w + target_from_imu_w


class OfficialLane:
    """One official environment at 500 Hz, and what its episode is measured by."""

    def __init__(self, task: str, env: gym.Env | None = None):
        """`env`: instead of a new one, for example with a wrapper around it."""
        self.env = make(task) if env is None else env
        self.base = self.env.unwrapped
        self.obs: np.ndarray  # (45 | 54 | 39,) float32
        self.info: dict

    def reset(self, seed: int, start_noise_rad: float) -> None:
        """Start an episode."""
        self.obs, self.info = reset(self.env, seed, start_noise_rad)
        self._model, self._data = self.base.sim.model._model, self.base.sim.data._data
        self._ball_geom = self._model.geom("ball").id
        self._is_robot_geom = np.zeros(self._model.ngeom, dtype=bool)
        self._is_robot_geom[self.base.robot_geom_ids] = True
        self.steps = 0  # physics steps played
        self.touches = 0  # robot-ball contacts, each from first touch to release, as `ball_hits` counts them
        self.ball_height_max_m = 0.0  # of the centre, after a step
        self._touching, self._released = False, None

    def hold(self, action: np.ndarray | None, num_steps: int) -> tuple[bool, bool]:
        """Steps with an action (12,) held, None for zero torque, until the episode ends: terminated, truncated."""
        torque_nm = np.zeros(c.NUM_JOINTS)
        for _ in range(num_steps):
            if action is not None:
                torque_nm = pd.platform_torque_nm(action, self.obs[_JOINT_POS], self.obs[_JOINT_VEL])
            terminated, truncated = self._step(torque_nm)
            if terminated or truncated:
                break
        return bool(terminated), bool(truncated)

    def _step(self, torque_nm: np.ndarray) -> tuple[bool, bool]:
        self.obs, _, terminated, truncated, self.info = self.env.step(torque_nm)
        self.steps += 1
        one, other = self._data.contact.geom.T  # (2, contacts)
        robot, ball = self._is_robot_geom, self._ball_geom
        was_touching = self._touching
        self._touching = bool(((robot[one] & (other == ball)) | (robot[other] & (one == ball))).any())
        self.touches += self._touching and not was_touching
        if was_touching and not self._touching:
            self._released = self.ball
        self.ball_height_max_m = max(self.ball_height_max_m, float(self._data.geom("ball").xpos[2]))
        return terminated, truncated

    @property
    def imu_pos_w(self) -> np.ndarray:
        """(3,) m, with the official lag."""
        return self._data.site(self.base._root_site).xpos.copy()

    @property
    def ball(self) -> Ball:
        """The ball now, each (3,)."""
        velocities = self.base.sim.data.get_geom_xvelp("ball"), self.base.sim.data.get_site_xvelp("ball")
        positions = self._data.geom("ball").xpos.copy(), self._data.site("ball").xpos.copy()
        return Ball(positions[0], velocities[0], positions[1], velocities[1])

    @property
    def shot(self) -> Ball | None:
        """The ball when it was last released: right after the last contact, or now while it is touched."""
        return self.ball if self._touching else self._released
