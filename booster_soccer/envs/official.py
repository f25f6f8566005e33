"""The official environments as the platform runs them: task one-hot in `info`, seeds, held PD control, score.

An episode here is what `submit.py` proves through the platform's own SDK: every tenth physics step the
policy acts on the current observation, its joint target is held, and the PD torque is computed from the
observed joint state at every 500 Hz step. Nothing in this module imports JAX or PyTorch, so that worker
processes stay small.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import sai_mujoco  # noqa: F401  registers the environments

from booster_soccer.envs import constants as c
from booster_soccer.envs import pd, scene
from booster_soccer.envs.cores import usable_cores
from booster_soccer.errors import UserError
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.official import WEIGHTS, score_terms

# (87,) float32 observation -> (12,) action in [-1, 1]; None stands for zero torque.
Policy = Callable[[np.ndarray], np.ndarray] | None

_JOINT_POS = slice(0, c.NUM_JOINTS)  # of the official observation, which begins like our own
_JOINT_VEL = slice(c.NUM_JOINTS, 2 * c.NUM_JOINTS)
_STILL_M_S = 0.05  # horizontal speed below which a ball goes nowhere in particular
_NOISE_STREAM = 1  # our own random stream of an episode seed: the environment itself draws from the bare seed


@dataclass(frozen=True)
class EpisodeResult:
    """One scored episode. Lengths are horizontal where a name does not say otherwise.

    A shot is the ball when it was last released: right after the last contact with the robot, or at the end
    if it is still touched. None where there was none, or where the ball goes nowhere (below 0.05 m/s).
    """

    task: str
    seed: int
    score: float
    terms: dict[str, float]  # weighted; their sum is the score
    steps: int  # physics steps
    fell: bool
    success: bool
    touches: int  # robot-ball contacts, each from first touch to release, as `ball_hits` counts them
    ball_speed_site_m_s: float  # at the end; what the score sees (the site turns with the ball)
    ball_speed_centre_m_s: float  # at the end; what the ball really does
    shot_speed_m_s: float | None  # of the ball's centre, in all three axes
    shot_direction_deg: float | None  # off the line to goal centre, window or target; positive to the left
    ball_height_max_m: float  # of the ball's centre; 0.12 lying on the pitch
    roll_phase_deg: float | None  # at the end, see `roll_phase_deg`
    roll_score: float  # part of the score: what the velocity term counts beyond the centre's own velocity
    walked_m: float  # path of the imu, sampled at every action
    ball_distance_min_m: float  # imu to ball centre, sampled at every action and at the end
    imu_height_m: float  # at the end


class Episode(NamedTuple):
    """What to run: a task and the seed given to the environment's `reset`."""

    task: str
    seed: int


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


def reset(env: TaskIndex, seed: int, noise_sd_rad: float = 0.0) -> tuple[np.ndarray, dict]:
    """Reset with a seed, then move the joints by noise; velocities stay zero, as at every official start."""
    obs, info = env.reset(seed=seed)
    if noise_sd_rad == 0.0:
        return obs, info
    official = env.unwrapped
    model, data = official.sim.model._model, official.sim.data._data
    data.qpos[scene.official_addresses(model).joint_q] += start_noise_rad(seed, noise_sd_rad)
    mujoco.mj_forward(model, data)
    return official._get_obs(), official._get_info() | {"task_index": env.task_index}


def hold_default_pose(obs: np.ndarray) -> np.ndarray:
    """The action (12,) whose joint target is the default pose."""
    return np.zeros(c.NUM_JOINTS)


def reference_policy(name: str) -> Policy:
    """A baseline by name: 'zero' torque, or 'hold' the default pose through the PD layer."""
    policies: dict[str, Policy] = {"zero": None, "hold": hold_default_pose}
    if name not in policies:
        raise UserError(f"unknown reference policy '{name}': choose one of {', '.join(policies)}")
    return policies[name]


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


def ball_quantities(task: str, shot: Ball | None, end: Ball, aim_pos_w: np.ndarray) -> dict[str, float | None]:
    """What `EpisodeResult` says about shot and roll; one lane at a time, so that both backends round alike.

    `end` is the ball at the end of the episode, `aim_pos_w` (3,) the goal's centre, window or target.
    """
    speed, direction, phase = None, None, None
    if shot is not None:
        speed = float(np.linalg.norm(shot.centre_vel_w))
        if np.hypot(*shot.centre_vel_w[:2]) >= _STILL_M_S:
            direction = direction_deg(shot.centre_vel_w, aim_pos_w - shot.centre_pos_w)
    if np.hypot(*end.centre_vel_w[:2]) >= _STILL_M_S:
        phase = roll_phase_deg(end.site_pos_w - end.centre_pos_w, end.centre_vel_w)
    velocity_weight = WEIGHTS[task].get("ball_vel_twd_goal", 0.0)  # of the site's velocity along -x
    return {
        "shot_speed_m_s": speed,
        "shot_direction_deg": direction,
        "roll_phase_deg": phase,
        "roll_score": velocity_weight * float(end.centre_vel_w[0] - end.site_vel_w[0]),
    }


def aim_pos_w(task: str, imu_pos_w: np.ndarray, target_from_imu_w: np.ndarray) -> np.ndarray:
    """Where the ball should go (3,): the goal's centre in the goalie task, else window or target."""
    return c.GOAL_POS_W[0] if task == "goalie" else imu_pos_w + target_from_imu_w


def run_episode(
    env: TaskIndex,
    task: str,
    policy: Policy,
    seed: int,
    start_noise_rad: float = 0.0,
    hold: int = c.PHYSICS_STEPS_PER_ACTION,
) -> EpisodeResult:
    """Play one episode to its end and score it as the platform does.

    `policy` acts on every `hold`-th physics step. Raises `UserError` if it returns a wrong shape or a
    number that is not finite.
    """
    obs, info = reset(env, seed, start_noise_rad)
    official = env.unwrapped
    model, data = official.sim.model._model, official.sim.data._data
    imu_pos_w = data.site(official._root_site).xpos
    ball_centre_w = data.geom("ball").xpos
    ball_geom = model.geom("ball").id
    is_robot_geom = np.zeros(model.ngeom, dtype=bool)
    is_robot_geom[official.robot_geom_ids] = True

    torque_nm = np.zeros(c.NUM_JOINTS)
    steps, touches, touching, walked_m = 0, 0, False, 0.0
    ball_distance_min_m, ball_height_max_m, shot = np.inf, 0.0, None
    last_imu_pos_w = imu_pos_w.copy()
    terminated = truncated = False

    def ball() -> Ball:
        velocities = official.sim.data.get_geom_xvelp("ball"), official.sim.data.get_site_xvelp("ball")
        return Ball(ball_centre_w.copy(), velocities[0], data.site("ball").xpos.copy(), velocities[1])

    while not (terminated or truncated):
        joint_pos_rad, joint_vel_rad_s = obs[_JOINT_POS], obs[_JOINT_VEL]
        if steps % hold == 0:
            walked_m += _horizontal_distance_m(imu_pos_w, last_imu_pos_w)
            last_imu_pos_w = imu_pos_w.copy()
            ball_distance_min_m = min(ball_distance_min_m, _horizontal_distance_m(imu_pos_w, ball_centre_w))
            if policy is not None:
                # float32, as the submitted preprocessor returns it
                action = policy(Preprocessor().modify_state(obs, info)[0])
                _check_action(action, task, seed, steps)
        if policy is not None:
            torque_nm = pd.platform_torque_nm(action, joint_pos_rad, joint_vel_rad_s)
        obs, _, terminated, truncated, info = env.step(torque_nm)
        steps += 1
        one, other = data.contact.geom.T  # (2, contacts)
        with_robot = (is_robot_geom[one] & (other == ball_geom)) | (is_robot_geom[other] & (one == ball_geom))
        was_touching, touching = touching, bool(with_robot.any())
        touches += touching and not was_touching
        if was_touching and not touching:
            shot = ball()
        ball_height_max_m = max(ball_height_max_m, float(ball_centre_w[2]))

    # The platform asks once more after the environment's own call in `step`. That leaves `ball_hits` as it
    # is: a touch counts on the change from "no contact" to "contact", and the contacts have not changed.
    terms = score_terms(task, official.compute_reward())
    end = ball()
    aim_w = aim_pos_w(task, imu_pos_w, info["target_xpos_rel_robot"])
    return EpisodeResult(
        task=task,
        seed=seed,
        score=sum(terms.values()),
        terms=terms,
        steps=steps,
        fell=bool(official.robots[0].is_terminated()),
        success=bool(info["success"]),
        touches=touches,
        ball_speed_site_m_s=float(np.linalg.norm(end.site_vel_w)),
        ball_speed_centre_m_s=float(np.linalg.norm(end.centre_vel_w)),
        ball_height_max_m=ball_height_max_m,
        **ball_quantities(task, end if touching else shot, end, aim_w),
        walked_m=walked_m + _horizontal_distance_m(imu_pos_w, last_imu_pos_w),
        ball_distance_min_m=min(ball_distance_min_m, _horizontal_distance_m(imu_pos_w, ball_centre_w)),
        imu_height_m=float(imu_pos_w[2]),
    )


def _horizontal_distance_m(a_w: np.ndarray, b_w: np.ndarray) -> float:
    return float(np.hypot(a_w[0] - b_w[0], a_w[1] - b_w[1]))


def _check_action(action: np.ndarray, task: str, seed: int, steps: int) -> None:
    where = f"in task '{task}', seed {seed}, physics step {steps}"
    if np.shape(action) != (c.NUM_JOINTS,):
        raise UserError(
            f"the policy returned shape {np.shape(action)} instead of ({c.NUM_JOINTS},) {where}: "
            "it is not a policy of this robot"
        )
    if not np.all(np.isfinite(action)):
        raise UserError(
            f"the policy returned NaN or infinity {where}: its training diverged, use an earlier checkpoint"
        )


def run_episodes(
    policy: Policy,
    episodes: list[Episode],
    start_noise_rad: float = 0.0,
    workers: int | None = None,
    progress: Callable[[Iterator[EpisodeResult]], Iterator[EpisodeResult]] = iter,
) -> list[EpisodeResult]:
    """Play the episodes in worker processes and return their results in the given order.

    Even one worker is a process of its own, with one BLAS thread: so no number depends on how many there
    are. `policy` must be picklable. `progress` wraps the results as they arrive (for example `tqdm`).
    """
    workers = min(workers or usable_cores(), len(episodes))
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(policy, start_noise_rad),
    )
    try:
        with executor:
            with _lean_children():
                results = executor.map(_run_in_worker, episodes)
            return list(progress(results))
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died (often out of memory): try fewer than {workers} with --workers"
        ) from error


@contextlib.contextmanager
def _lean_children() -> Iterator[None]:
    """Processes started inside get one BLAS thread, and do not import the caller's main module.

    `spawn` would import it again in each of them, JAX included; nothing of it is needed there.
    """
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    saved = {name: os.environ.get(name) for name in variables}
    main_module = sys.modules["__main__"]
    try:
        os.environ.update(dict.fromkeys(variables, "1"))
        sys.modules["__main__"] = types.ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = main_module
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_worker: dict = {}  # policy and start noise of this worker process


def _start_worker(policy: Policy, start_noise_rad: float) -> None:
    end_with_parent()
    _worker.update(policy=policy, start_noise_rad=start_noise_rad)


def end_with_parent() -> None:
    """In a worker process: end when the parent is gone, however it went. A pool's workers would play on."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


_env_of = functools.cache(make)  # one environment per task and process: making one takes a second


def _run_in_worker(episode: Episode) -> EpisodeResult:
    task, seed = episode
    return run_episode(_env_of(task), task, _worker["policy"], seed, _worker["start_noise_rad"])
