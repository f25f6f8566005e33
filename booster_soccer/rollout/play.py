"""The one place where whole episodes are played: on any lanes, here or in worker processes.

    results = play_in_workers("twin", policy, [Episode("target", 7)], start_noise_rad=0.02)
    results = list(play(OfficialLanes("target"), policy, [Episode("target", 7)]))

The policy is called for one lane at a time: a matrix product of many rows rounds differently from that of one
row. For the same reason BLAS must use one thread (OMP_NUM_THREADS=1); the worker processes do. So no number
depends on how many lanes or workers there are.
"""

import collections
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from booster_soccer.cores import usable_cores
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.envs.official import Ball
from booster_soccer.errors import More, UserError
from booster_soccer.rewards.official import WEIGHTS
from booster_soccer.rollout.lanes import Lanes, OfficialLanes, SceneLanes, Sight, TwinLanes
from booster_soccer.rollout.processes import Workers


class Act(Protocol):
    """(87,) float32 observation -> (12,) action in [-1, 1]."""

    def __call__(self, obs: np.ndarray, /) -> np.ndarray: ...


Policy = Act | None  # None stands for zero torque

BACKENDS = ("official", "twin", "scene")
PATH_COLUMNS = ("time_s", "imu_x_m", "imu_y_m", "ball_x_m", "ball_y_m", "ball_z_m")  # of the ball's centre
_PATH_PHYSICS_STEPS = 50  # 10 Hz
_EPISODES_PER_JOB = 25  # of one process of twins: enough lanes to share the overhead, few enough for progress


class Episode(NamedTuple):
    """What to run: a task and the seed given to the environment's `reset`."""

    task: str
    seed: int


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
    physics_steps: int
    fell: bool
    success: bool
    touches: int  # robot-ball contacts, each from first touch to release, as `ball_hits` counts them
    ball_speed_site_m_s: float  # at the end; what the score sees (the site turns with the ball)
    ball_speed_centre_m_s: float  # at the end; what the ball really does
    shot_speed_m_s: float | None  # of the ball's centre, in all three axes
    shot_direction_deg: float | None  # off the line to goal centre, window or target; positive to the left
    ball_height_max_m: float  # of the ball's centre; 0.12 lying on the pitch
    roll_phase_deg: float | None  # at the end, see `official.roll_phase_deg`
    roll_score: float  # part of the score: what the velocity term counts beyond the centre's own velocity
    walked_m: float  # path of the imu, sampled at every action
    ball_distance_min_m: float  # imu to ball centre, sampled at every action and at the end
    imu_height_m: float  # at the end
    aim_pos_w: list[float]  # (3,) m: the goal's centre, window or target
    path: list[list[float]]  # ten times a second and at the end, see `PATH_COLUMNS`; to the centimetre


def hold_default_pose(obs: np.ndarray) -> np.ndarray:
    """The action (12,) whose joint target is the default pose."""
    return np.zeros(c.NUM_JOINTS)


def reference_policy(name: str) -> Policy:
    """A baseline by name: 'zero' torque, or 'hold' the default pose through the PD layer."""
    policies: dict[str, Policy] = {"zero": None, "hold": hold_default_pose}
    if name not in policies:
        raise UserError(f"unknown reference policy '{name}': choose one of {', '.join(policies)}")
    return policies[name]


class Recorded(NamedTuple):
    """A policy that appends every observation it acts on to a file of its process."""

    policy: Act
    directory: Path

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        with (self.directory / f"{os.getpid()}.float32").open("ab") as file:
            file.write(np.asarray(obs, np.float32).tobytes())
        return self.policy(obs)


# --- one player -----------------------------------------------------------------------------------------


def play(
    lanes: Lanes, policy: Policy, episodes: Sequence[Episode], start_noise_rad: float = 0.0
) -> Iterator[EpisodeResult]:
    """Play each episode to its end on a lane of its task; the results in the given order, as they come.

    Raises `UserError` if no lane plays an episode's task, or if the policy returns a wrong shape or a number
    that is not finite.
    """
    waiting: dict[str, collections.deque[tuple[int, Episode]]] = {task: collections.deque() for task in lanes.tasks}
    for number, episode in enumerate(episodes):
        if episode.task not in waiting:
            raise UserError(f"no lane plays task '{episode.task}', only {', '.join(waiting)}: use other lanes")
        waiting[episode.task].append((number, episode))
    walked_m, nearest_m = np.zeros(len(lanes.tasks)), np.zeros(len(lanes.tasks))
    paths: list[list[list[float]]] = [[] for _ in lanes.tasks]
    playing: dict[int, tuple[int, Episode]] = {}  # by lane: an episode and its number
    done: dict[int, EpisodeResult] = {}
    for following in range(len(episodes)):
        while following not in done:
            free = [lane for lane, task in enumerate(lanes.tasks) if lane not in playing and waiting[task]]
            if free:
                playing |= {lane: waiting[lanes.tasks[lane]].popleft() for lane in free}
                lanes.reset(free, [playing[lane][1].seed for lane in free], start_noise_rad)
                now = lanes.look()
                walked_m[free], nearest_m[free] = 0.0, _from_ball_m(now)[free]
                for lane in free:
                    paths[lane] = [_place(now, lane)]
            action = None if policy is None else _actions(policy, lanes, now.steps, playing)
            ended = np.logical_or(*lanes.hold(action))
            before, now = now, lanes.look()
            walked_m += _horizontal_m(now.imu_pos_w - before.imu_pos_w)
            nearest_m = np.fmin(nearest_m, _from_ball_m(now))
            for lane in list(playing):
                if ended[lane] or now.steps[lane] % _PATH_PHYSICS_STEPS == 0:
                    paths[lane].append(_place(now, lane))
                if ended[lane]:
                    number, episode = playing.pop(lane)
                    done[number] = _result(lanes, now, lane, episode, walked_m[lane], nearest_m[lane], paths[lane])
        yield done.pop(following)


def _place(now: Sight, lane: int) -> list[float]:
    """A lane's row of a path."""
    place = (*now.imu_pos_w[lane, :2], *now.ball.centre_pos_w[lane])
    return [round(float(value), 2) for value in (now.steps[lane] * c.PHYSICS_DT_S, *place)]


def _horizontal_m(vector_w: np.ndarray) -> np.ndarray:
    return np.hypot(vector_w[..., 0], vector_w[..., 1])


def _from_ball_m(now: Sight) -> np.ndarray:
    return _horizontal_m(now.imu_pos_w - now.ball.centre_pos_w)


def _actions(policy: Act, lanes: Lanes, steps: np.ndarray, playing: dict[int, tuple[int, Episode]]) -> np.ndarray:
    """The policy's actions (B, 12), zero in lanes that do not play, in the type that it returns."""
    obs = lanes.observe()
    rows = {lane: np.asarray(policy(obs[lane])) for lane in playing}
    for lane, row in rows.items():
        task, seed = playing[lane][1]
        where = f"in task '{task}', seed {seed}, physics step {steps[lane]}"
        if row.shape != (c.NUM_JOINTS,):
            raise UserError(
                f"the policy returned shape {row.shape} instead of ({c.NUM_JOINTS},) {where}: "
                "it is not a policy of this robot"
            )
        if not np.all(np.isfinite(row)):
            raise UserError(
                f"the policy returned NaN or infinity {where}: its training diverged, use an earlier checkpoint; "
                f"{More.DIVERGENCE}"
            )
    actions = np.zeros((len(lanes.tasks), c.NUM_JOINTS), np.result_type(*rows.values()))
    actions[list(rows)] = list(rows.values())
    return actions


def _result(
    lanes: Lanes,
    end: Sight,
    lane: int,
    episode: Episode,
    walked_m: float,
    nearest_m: float,
    path: list[list[float]],
) -> EpisodeResult:
    """What is to be said of an episode that has just ended, one lane at a time: so all backends round alike."""
    outcome, ball = lanes.outcome(lane), Ball(*(vector_w[lane] for vector_w in end.ball))
    velocity_weight = WEIGHTS[episode.task].get("ball_vel_twd_goal", 0.0)  # of the site's velocity along -x
    return EpisodeResult(
        task=episode.task,
        seed=episode.seed,
        score=outcome.score,
        terms=outcome.terms,
        physics_steps=int(end.steps[lane]),
        fell=outcome.fell,
        success=outcome.success,
        touches=outcome.touches,
        ball_speed_site_m_s=float(np.linalg.norm(ball.site_vel_w)),
        ball_speed_centre_m_s=float(np.linalg.norm(ball.centre_vel_w)),
        ball_height_max_m=outcome.ball_height_max_m,
        **official.ball_quantities(outcome.shot, ball, end.aim_pos_w[lane]),
        roll_score=velocity_weight * float(ball.centre_vel_w[0] - ball.site_vel_w[0]),
        walked_m=float(walked_m),
        ball_distance_min_m=float(nearest_m),
        imu_height_m=float(end.imu_pos_w[lane, 2]),
        aim_pos_w=[round(float(value), 2) for value in end.aim_pos_w[lane]],
        path=path,
    )


# --- many of them ---------------------------------------------------------------------------------------


def play_in_workers(
    backend: str,
    policy: Policy,
    episodes: Sequence[Episode],
    start_noise_rad: float = 0.0,
    workers: int | None = None,
    progress: Callable[[Iterator[EpisodeResult]], Iterable[EpisodeResult]] = iter,
) -> list[EpisodeResult]:
    """Play the episodes in worker processes and return their results in the given order.

    `policy` must be picklable. `workers`: processes (threads of one process for "scene"), default one a core.
    `progress` wraps the results as they arrive (for example `tqdm`). An exception while we wait, such as one
    that a signal's handler raises, ends the processes at once.
    """
    limit = workers or usable_cores()
    jobs = _jobs(backend, episodes, limit)
    count = min(limit, len(jobs))
    arguments = [(backend, policy, start_noise_rad, limit)] * count
    remedy = f"try fewer than {limit} with --workers"
    with Workers(_Booth, arguments, ["a worker process"] * count, remedy) as processes:
        return list(progress(_played(processes, count, jobs)))


def check_backend(name: str) -> None:
    """Raise `UserError` unless there is such a backend."""
    if name not in BACKENDS:
        raise UserError(f"there is no backend '{name}': choose one of {', '.join(BACKENDS)}")


def _jobs(backend: str, episodes: Sequence[Episode], processes: int) -> list[list[Episode]]:
    """The episodes in order, in the parts that a process plays at once: enough for all the processes."""
    check_backend(backend)
    if backend == "scene":  # threads share it
        return [list(episodes)]
    size = min(_EPISODES_PER_JOB, math.ceil(len(episodes) / processes)) if backend == "twin" else 1
    of_tasks = [list(group) for _, group in itertools.groupby(episodes, key=lambda episode: episode.task)]
    return [group[i : i + size] for group in of_tasks for i in range(0, len(group), size)]


def _played(processes: Workers, count: int, jobs: list[list[Episode]]) -> Iterator[EpisodeResult]:
    """Results in the order of the jobs, each job as soon as all before it are done."""
    waiting, done = collections.deque(enumerate(jobs)), {}
    idle, busy = list(range(count)), {}  # processes, and the job of each
    for following in range(len(jobs)):
        while following not in done:
            while idle and waiting:
                number, job = waiting.popleft()
                processes.call(idle[-1], "play", job)
                busy[idle.pop()] = number
            for process in processes.ready(busy):
                done[busy.pop(process)] = processes.answer(process)
                idle.append(process)
        yield from done.pop(following)


class _Booth:
    """What a worker process holds."""

    def __init__(self, backend: str, policy: Policy, start_noise_rad: float, num_threads: int):
        self._backend, self._policy, self._start_noise_rad = backend, policy, start_noise_rad
        self._num_threads = num_threads
        self._official = functools.cache(OfficialLanes)  # making an environment takes a second

    def play(self, episodes: list[Episode]) -> list[EpisodeResult]:
        """The results of one job."""
        return list(play(self._lanes(episodes), self._policy, episodes, self._start_noise_rad))

    def _lanes(self, episodes: list[Episode]) -> Lanes:
        if self._backend == "scene":
            most = max(collections.Counter(task for task, _ in episodes).values())
            return SceneLanes(c.NUM_TASKS * most, self._num_threads)
        task = episodes[0].task
        return TwinLanes(task, len(episodes)) if self._backend == "twin" else self._official(task)


# --- what a policy meets --------------------------------------------------------------------------------


def record(
    task: str, policy: Act, count: int, seed_of: Callable[[int], int], start_noise_rad: float, env: gym.Env
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """What a policy meets in an official environment, one at each action: observations (count, 87), and the raw
    ones (count, raw) and info (count, ...) that they were made from.

    As many episodes as it takes, from seeds `seed_of(0)`, `seed_of(1)`, ...
    """
    lanes = OfficialLanes(task, gym.wrappers.TimeLimit(env, count * c.PHYSICS_STEPS_PER_ACTION))
    met = []

    def noting(obs: np.ndarray) -> np.ndarray:
        met.append((obs, lanes.obs[0], {key: values[0] for key, values in lanes.info.items() if values.ndim > 1}))
        return policy(obs)

    for _ in play(lanes, noting, [Episode(task, seed_of(i)) for i in range(count)], start_noise_rad):
        if len(met) >= count:
            break
    lanes.close()
    observed, raw, infos = zip(*met[:count], strict=True)
    return np.stack(observed), np.stack(raw), {key: np.stack([info[key] for info in infos]) for key in infos[0]}


def met_observations(policy: Act, per_task: int, seed: int, start_noise_rad: float) -> np.ndarray:
    """Observations (3 * per_task, 87) that a policy meets in the three official environments."""
    seed_of = functools.partial(episode_seed, seed)
    met = (record(task, policy, per_task, seed_of, start_noise_rad, official.make(task))[0] for task in c.TASKS)
    return np.concatenate(list(met))


def episode_seed(*key: int) -> int:
    """The seed of an episode from a key such as (run, lane, episode); the platform's own loads slowly."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
