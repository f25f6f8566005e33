"""The twin against the official environments, number by number, at every physics step.

    OMP_NUM_THREADS=1 python -m tests.long.twin_equality              # 100 seeds
    OMP_NUM_THREADS=1 python -m tests.long.twin_equality --seeds 5 --sources policy --checkpoint DIR

Input: the installed `sai-mujoco`. Output: a table, one row for each task and action source, and exit status 1
if anything differs. Compared at the start and after every step: observation, every key of `info`, every raw
reward term, reward, terminated, truncated; at the end the weighted score terms. For the policies the 50 Hz
path is compared too, after every action.

Action sources: `zero` torque; `random` torque up to 1.2 times the limits, new at every physics step; `policy`, a
balancing policy with noise on top (or that of `--checkpoint`), each action held for ten steps with the platform's
PD torque; `launched`, the balancing policy alone, and the ball thrown at the goal, the target or the robot every
300 steps, so that goals, blocks, offsides and several touches occur.
"""

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from booster_soccer import errors
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene
from booster_soccer.envs.twin import Step, TwinEnv
from booster_soccer.preprocess.observation import projected_gravity
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.official import score_terms
from booster_soccer.rollout.processes import end_with_parent
from booster_soccer.store import checkpoints

SOURCES = ("zero", "random", "policy", "launched")
RELATIVE_TOLERANCE = 1e-9  # for observation and info; reward terms, ends and score must be equal

# A stance and an ankle feedback that stand for seconds (found by random search with the twin).
_STANCE = {"Hip_Pitch": -0.15, "Hip_Roll": 0.085, "Knee_Pitch": 0.18, "Ankle_Pitch": -0.13, "Ankle_Roll": -0.085}
_ANKLE_PER_LEAN_RAD = 1.73
_ANKLE_PER_LEAN_RATE_S = 0.05
_ACTION_NOISE = 0.02  # of the source `policy`
_STEPS_BETWEEN_THROWS = 300  # a multiple of ten, so that the 50 Hz path can follow
_BATCH = 10  # episodes that the twin plays at once


@dataclass(frozen=True)
class Config:
    """How much to compare."""

    seeds: int = 100  # for each task and source
    sources: tuple[Literal["zero", "random", "policy", "launched"], ...] = SOURCES
    checkpoint: Path | None = None  # its policy becomes the source `policy`


class Recording(NamedTuple):
    """One official episode of T steps."""

    seed: int
    noise_rad: float
    throws_m_s: dict[int, np.ndarray]  # ball velocity (3,) written before the step of that number, from 0
    obs: np.ndarray  # (T + 1, n)
    info: dict[str, np.ndarray]  # each (T + 1, ...)
    terms: dict[str, np.ndarray]  # each (T,)
    reward: np.ndarray  # (T,)
    terminated: np.ndarray  # (T,)
    truncated: np.ndarray  # (T,)
    torque_nm: np.ndarray  # (T, 12)
    action: np.ndarray  # (ceil(T / 10), 12) float32; empty where the source gives torque
    score: dict[str, float]  # weighted terms if the episode ended, else empty


@dataclass
class Report:
    """What a comparison found; reports add up."""

    episodes: int = 0
    steps: int = 0
    values: int = 0
    events: Counter = field(default_factory=Counter)
    unequal: dict[str, float] = field(default_factory=dict)  # largest relative difference, by name

    def check(self, name: str, expected, found) -> None:
        """Compare two arrays to the bit (NaN equals NaN, False equals 0.0)."""
        expected, found = np.asarray(expected), np.asarray(found)
        self.values += expected.size
        if np.array_equal(expected, found, equal_nan=expected.dtype.kind == "f"):
            return
        difference = np.inf
        if expected.shape == found.shape and expected.dtype.kind != "U":
            a, b = expected.astype(np.float64), found.astype(np.float64)
            difference = float(np.nan_to_num(np.abs(a - b) / np.maximum(np.abs(a), 1.0), nan=np.inf).max())
        self.unequal[name] = max(difference, self.unequal.get(name, 0.0))

    def add(self, other: "Report") -> None:
        for name in ("episodes", "steps", "values", "events"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, difference in other.unequal.items():
            self.unequal[name] = max(difference, self.unequal.get(name, 0.0))

    @property
    def equal(self) -> bool:
        """Whether everything is equal, observation and info within the tolerance."""
        apart = self.unequal.items()
        return all(name.startswith(("obs", "info")) and value <= RELATIVE_TOLERANCE for name, value in apart)


# --- action sources -------------------------------------------------------------------------------------

Policy = Callable[[np.ndarray, dict], np.ndarray]  # official obs and info -> action (12,) float32


def balance(obs: np.ndarray, info: dict) -> np.ndarray:
    """Action (12,) float32 of a stance with ankle feedback on the trunk's lean."""
    lean = projected_gravity(info["robot_quat"][[3, 0, 1, 2]], np)[0]
    ankle = _ANKLE_PER_LEAN_RAD * lean - _ANKLE_PER_LEAN_RATE_S * info["robot_gyro"][1]
    target = np.zeros(c.NUM_JOINTS)
    for i, name in enumerate(c.JOINT_NAMES):
        side, joint = name.split("_", 1)
        mirrored = -1.0 if side == "Right" and joint.endswith("Roll") else 1.0
        target[i] = mirrored * _STANCE.get(joint, 0.0) + (ankle if joint == "Ankle_Pitch" else 0.0)
    return ((target - c.DEFAULT_POSE_RAD) / c.ACTION_SCALE_RAD).astype(np.float32)


def _policy(source: str, rng: np.random.Generator, checkpoint: Path | None) -> Policy:
    if source == "launched":
        return balance
    if checkpoint is None:
        noise = functools.partial(rng.normal, 0.0, _ACTION_NOISE, c.NUM_JOINTS)
        return lambda obs, info: (balance(obs, info) + noise()).astype(np.float32)
    policy = policy_from_arrays(checkpoints.load(checkpoint).arrays)
    return lambda obs, info: policy(Preprocessor().modify_state(obs, info)[0])


def _throw(task: str, info: dict, rng: np.random.Generator) -> np.ndarray:
    """Ball velocity (3,): at the robot in four throws of ten, else at the goal or target, not always well."""
    if rng.uniform() < 0.4:
        way, shortest_s = -info["ball_xpos_rel_robot"] + rng.uniform(-0.15, 0.15, 3), 0.2
    elif task == "goalie":
        way, shortest_s = info["goal_team_0_rel_ball"] + [0.0, rng.uniform(-2.0, 2.0), 0.0], 0.2
    else:
        way = info["target_xpos_rel_robot"] - info["ball_xpos_rel_robot"] + rng.normal(0.0, 0.3, 3)
        shortest_s = 0.3
    flight_s = rng.uniform(shortest_s, 0.6)
    velocity = way / flight_s
    velocity[2] += 0.5 * 9.81 * flight_s * (task == "obstacle")
    return velocity


# --- official episode -----------------------------------------------------------------------------------


def record(env: official.TaskIndex, task: str, source: str, seed: int, max_steps: int = c.EPISODE_PHYSICS_STEPS,
           checkpoint: Path | None = None) -> Recording:  # fmt: skip
    """Play one official episode with an action source and keep everything it gave."""
    rng = np.random.default_rng([seed, SOURCES.index(source)])
    noise = c.START_NOISE_RAD * (seed % 2)
    obs, info = official.reset(env, seed, noise)
    model, data = env.unwrapped.sim.model._model, env.unwrapped.sim.data._data
    ball_velocity = data.qvel[scene.official_addresses(model).ball_v][:3]
    throws: dict[int, np.ndarray] = {}
    policy = _policy(source, rng, checkpoint)
    seen, terms, ends, torques, actions = [(obs, info)], [], [], [], []
    while not (ends and any(ends[-1][1:])) and len(ends) < max_steps:
        if source == "launched" and len(ends) % _STEPS_BETWEEN_THROWS == 0:
            throws[len(ends)] = ball_velocity[:] = _throw(task, info, rng)
        if source == "zero":
            torque = np.zeros(c.NUM_JOINTS)
        elif source == "random":
            torque = rng.uniform(-1.2, 1.2, c.NUM_JOINTS) * c.TORQUE_LIMIT_NM
        else:
            if len(ends) % c.PHYSICS_STEPS_PER_ACTION == 0:
                actions.append(policy(obs, info))
            joints = obs[: c.NUM_JOINTS], obs[c.NUM_JOINTS : 2 * c.NUM_JOINTS]
            torque = pd.platform_torque_nm(actions[-1], *joints)
        obs, reward, terminated, truncated, info = env.step(torque)
        terms.append(info.pop("reward_terms"))
        seen.append((obs, info))
        ends.append((reward, terminated, truncated))
        torques.append(torque)

    def stacked(dicts: Sequence[dict]) -> dict[str, np.ndarray]:
        return {key: np.stack([values[key] for values in dicts]) for key in dicts[0]}

    score = score_terms(task, env.unwrapped.compute_reward()) if any(ends[-1][1:]) else {}
    all_obs, infos = zip(*seen)
    return Recording(seed, noise, throws, np.stack(all_obs), stacked(infos), stacked(terms), *map(np.array, zip(*ends)),
                     np.stack(torques), np.array(actions), score)  # fmt: skip


# --- comparison -----------------------------------------------------------------------------------------


def _compare_path(task: str, recordings: list[Recording], hold: int, report: Report) -> None:
    """Feed the twin with the recorded torques, or with the actions that it holds for ten physics steps."""
    twin = TwinEnv(task, len(recordings))
    for lane, recording in enumerate(recordings):  # each its own noise
        start = twin.reset([recording.seed], recording.noise_rad, lanes=np.array([lane]))
    act = twin.step_torque if hold == 1 else twin.step_action
    held = [recording.torque_nm if hold == 1 else recording.action for recording in recordings]
    steps = []
    for k in range(max(map(len, held))):
        for lane, recording in enumerate(recordings):
            if k * hold in recording.throws_m_s:
                twin.ball_site_velocity_w[lane] = recording.throws_m_s[k * hold]
        steps.append(act(np.stack([values[min(k, len(values) - 1)] for values in held])))
    for lane, recording in enumerate(recordings):
        _compare_lane(report, recording, lane, hold, start, steps[: len(held[lane])])
        if recording.score:
            score = score_terms(task, {name: values[lane] for name, values in steps[-1].reward_terms.items()})
            report.check("steps and score", [len(recording.reward), *recording.score.values()],
                         [twin.steps[lane], *score.values()])  # fmt: skip
    twin.close()


def _compare_lane(report: Report, recording: Recording, lane: int, hold: int, start: tuple, steps: list[Step]) -> None:
    """One lane after its reset and after each call, which made `hold` physics steps or ended within them."""
    total = len(recording.reward)
    ends = np.arange(hold, total + hold, hold).clip(max=total)  # physics steps made after each call
    obs, info = zip(start, *(step[:2] for step in steps))
    report.check("obs", recording.obs[[0, *ends]], [values[lane] for values in obs])
    report.check("info keys", sorted(recording.info), sorted(info[0]))
    for key, values in recording.info.items():
        report.check(f"info {key}", values[[0, *ends]], [found[key][lane] for found in info])
    report.check("reward term keys", list(recording.terms), list(steps[0].reward_terms))
    for key, values in recording.terms.items():
        report.check(f"reward term {key}", values[ends - 1], [step.reward_terms[key][lane] for step in steps])
    reward = [np.sum(recording.reward[n : n + hold].astype(np.float64)) for n in range(0, total, hold)]
    report.check("reward", reward, [step.reward[lane] for step in steps])
    report.check("terminated", recording.terminated[ends - 1], [step.terminated[lane] for step in steps])
    report.check("truncated", recording.truncated[ends - 1], [step.truncated[lane] for step in steps])


def compare(task: str, source: str, recordings: list[Recording]) -> Report:
    """Both paths, and what happened in the episodes."""
    report = Report(len(recordings), sum(len(recording.reward) for recording in recordings))
    _compare_path(task, recordings, 1, report)
    if source in ("policy", "launched"):
        _compare_path(task, recordings, c.PHYSICS_STEPS_PER_ACTION, report)
    for recording in recordings:
        report.events += events(recording)
    return report


def events(recording: Recording) -> Counter:
    """How a recorded episode ended, and whether the robot touched the ball."""
    last = {name: values[-1] for name, values in recording.terms.items()}
    names = {"goal_scored": "success", "success": "success", "offside": "offside", "ball_blocked": "blocked"}
    found = Counter(name for term, name in names.items() if last.get(term))
    found["fall"] = int(not found and recording.terminated[-1])
    found["time up"] = int(recording.truncated[-1])
    found["touched"] = int(last.get("ball_vel_twd_goal") is not None and last["robot_distance_ball"] == 1.5)
    found["touched again"] = int(last.get("ball_hits", 0.0) > 0.0)
    return +found


# --- command --------------------------------------------------------------------------------------------


def _run(task: str, source: str, seeds: range, checkpoint: Path | None) -> Report:
    env = official.make(task)
    return compare(task, source, [record(env, task, source, seed, checkpoint=checkpoint) for seed in seeds])


def _row(task: str, source: str, report: Report) -> str:
    unequal = "; ".join(f"{name}: up to {value:.1e} relative" for name, value in report.unequal.items()) or "none"
    seen = ", ".join(f"{name} {count}" for name, count in report.events.most_common())
    counts = f"{report.episodes} | {report.steps:,} | {report.values:,}"
    return f"| {task} | {source} | {counts} | {unequal} | {seen} |"


def main(config: Config) -> bool:
    """Compare, print the table; True if everything is equal."""
    if config.seeds < 1:
        raise errors.UserError(f"--seeds {config.seeds}: give at least 1")
    reports = {key: Report() for key in itertools.product(c.TASKS, config.sources)}
    batches = [range(first, min(first + _BATCH, config.seeds)) for first in range(0, config.seeds, _BATCH)]
    jobs = [(task, source, seeds, config.checkpoint) for task, source in reports for seeds in batches]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=end_with_parent) as executor:
        for (task, source, seeds, _), report in zip(jobs, executor.map(_run, *zip(*jobs)), strict=True):
            reports[task, source].add(report)
            verdict = "UNEQUAL" if report.unequal else "equal"
            print(f"{task} {source} seeds {seeds[0]} to {seeds[-1]}: {verdict}", file=sys.stderr)
    print(
        "| task | actions | episodes | physics steps | numbers compared | unequal | what happened |\n"
        + "|---" * 7
        + "|"
    )
    for (task, source), report in reports.items():
        print(_row(task, source, report))
    equal = all(report.equal for report in reports.values())
    print(f"\n{'equal' if equal else 'NOT equal'}")
    return equal


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config, description=__doc__)) else 1)
