"""The twin against the official environments, number by number, at every physics step.

    OMP_NUM_THREADS=1 python benchmarks/twin_equality.py                       # 100 seeds, up to 5,000 steps
    OMP_NUM_THREADS=1 python benchmarks/twin_equality.py --seeds 5 --steps 1000

Input: the installed `sai-mujoco`. Output: a table, one row for each task and action source, and exit status 1
if anything differs. Compared at the start and after every step: observation, every key of `info`, every raw
reward term, reward, terminated, truncated; at the end the weighted score terms. For the policies the 50 Hz
path is compared too, after every action.

Action sources:

* `zero`: no torque;
* `random`: uniform torque up to 1.2 times the limits, new at every physics step;
* `policy`: a balancing policy with noise on top, each action held for ten steps with the platform's PD
  torque; or with `--checkpoint` the policy of a checkpoint;
* `launched`: the balancing policy alone, and the ball thrown at the goal, the target or the robot, again
  every 300 steps, so that goals, blocks, offsides and several touches occur.
"""

import functools
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from booster_soccer import errors  # noqa: E402
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene
from booster_soccer.envs.twin import Step, TwinEnv  # noqa: E402
from booster_soccer.preprocess.observation import projected_gravity  # noqa: E402
from booster_soccer.preprocess.submission import Preprocessor  # noqa: E402
from booster_soccer.rewards.official import score_terms  # noqa: E402

SOURCES = ("zero", "random", "policy", "launched")
RELATIVE_TOLERANCE = 1e-9  # for observation and info; reward terms, ends and score must be equal
START_NOISE_RAD = 0.02  # of every second seed

# A stance and an ankle feedback that stand for seconds (found by random search with the twin).
_STANCE = {
    "Hip_Pitch": -0.15,
    "Hip_Roll": 0.085,
    "Knee_Pitch": 0.18,
    "Ankle_Pitch": -0.13,
    "Ankle_Roll": -0.085,
}
_ANKLE_PER_LEAN_RAD = 1.73
_ANKLE_PER_LEAN_RATE_S = 0.05
_ACTION_NOISE = 0.02  # of the source `policy`
_STEPS_BETWEEN_THROWS = 300  # a multiple of ten, so that the 50 Hz path can follow


@dataclass(frozen=True)
class Config:
    """How much to compare."""

    seeds: int = 100  # for each task and source
    steps: int = c.EPISODE_PHYSICS_STEPS  # at most, of each episode
    batch: int = 10  # episodes that the twin plays at once
    workers: int = 2  # processes
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
    unequal: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # relative differences

    def check(self, name: str, expected, found) -> None:
        """Compare two arrays to the bit (NaN equals NaN, False equals 0.0)."""
        expected, found = np.asarray(expected), np.asarray(found)
        self.values += expected.size
        if expected.shape != found.shape:
            self.unequal[f"{name}: shape"].append(np.inf)
        elif not np.array_equal(expected, found, equal_nan=True):
            a, b = expected.astype(np.float64), found.astype(np.float64)
            self.unequal[name].append(float(np.max(np.abs(a - b) / np.maximum(np.abs(a), 1.0))))

    def add(self, other: "Report") -> None:
        self.episodes, self.steps = self.episodes + other.episodes, self.steps + other.steps
        self.values += other.values
        self.events += other.events
        for name, differences in other.unequal.items():
            self.unequal[name] += differences

    @property
    def equal(self) -> bool:
        """Whether everything is equal, observation and info within the tolerance."""
        return all(
            name.startswith(("obs", "info")) and max(differences) <= RELATIVE_TOLERANCE
            for name, differences in self.unequal.items()
        )


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
    from booster_soccer.agents.policy import policy_from_arrays
    from booster_soccer.store import checkpoints

    policy = policy_from_arrays(checkpoints.load(checkpoint).arrays)
    return lambda obs, info: policy(Preprocessor().modify_state(obs, info)[0])


def _throw(task: str, info: dict, rng: np.random.Generator) -> np.ndarray:
    """Ball velocity (3,): at the robot in four throws of ten, else at the goal or target, not always well."""
    if rng.uniform() < 0.4:
        way = -info["ball_xpos_rel_robot"] + rng.uniform(-0.15, 0.15, 3)
        flight_s = rng.uniform(0.2, 0.6)
    elif task == "goalie":
        way = info["goal_team_0_rel_ball"] + [0.0, rng.uniform(-2.0, 2.0), 0.0]
        flight_s = rng.uniform(0.2, 0.6)
    else:
        way = info["target_xpos_rel_robot"] - info["ball_xpos_rel_robot"] + rng.normal(0.0, 0.3, 3)
        flight_s = rng.uniform(0.3, 0.6)
    velocity = way / flight_s
    velocity[2] += 0.5 * 9.81 * flight_s * (task == "obstacle")
    return velocity


# --- official episode -----------------------------------------------------------------------------------


def record(
    env: official.TaskIndex, task: str, source: str, seed: int, max_steps: int, checkpoint: Path | None = None
) -> Recording:
    """Play one official episode with an action source and keep everything it gave."""
    rng = np.random.default_rng([seed, SOURCES.index(source)])
    noise = START_NOISE_RAD * (seed % 2)
    obs, info = official.reset(env, seed, noise)
    model, data = env.unwrapped.sim.model._model, env.unwrapped.sim.data._data
    ball_velocity = data.qvel[scene.official_addresses(model).ball_v][:3]
    throws: dict[int, np.ndarray] = {}
    policy = _policy(source, rng, checkpoint)
    all_obs, infos, terms, ends, torques, actions = [obs], [info], [], [], [], []
    terminated = truncated = False
    while not (terminated or truncated) and len(ends) < max_steps:
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
        all_obs.append(obs)
        infos.append(info)
        ends.append((reward, terminated, truncated))
        torques.append(torque)
    reward, *flags = zip(*ends, strict=True)
    over = terminated or truncated
    return Recording(
        seed=seed,
        noise_rad=noise,
        throws_m_s=throws,
        obs=np.stack(all_obs),
        info={key: np.stack([i[key] for i in infos]) for key in infos[0]},
        terms={key: np.array([t[key] for t in terms]) for key in terms[0]},
        reward=np.array(reward),
        terminated=np.array(flags[0]),
        truncated=np.array(flags[1]),
        torque_nm=np.stack(torques),
        action=np.array(actions),
        score=score_terms(task, env.unwrapped.compute_reward()) if over else {},
    )


# --- comparison -----------------------------------------------------------------------------------------


def _start(task: str, recordings: list[Recording], num_threads: int, report: Report) -> TwinEnv:
    twin = TwinEnv(task, len(recordings), num_threads)
    for lane, recording in enumerate(recordings):  # each its own noise
        obs, info = twin.reset([recording.seed], recording.noise_rad, lanes=np.array([lane]))
    for lane, recording in enumerate(recordings):
        _check_view(report, recording, lane, 0, obs, info)
    return twin


def _throw_balls(twin: TwinEnv, recordings: list[Recording], before_step: int) -> None:
    for lane, recording in enumerate(recordings):
        if before_step in recording.throws_m_s:
            twin.ball_site_velocity_w[lane] = recording.throws_m_s[before_step]


def _check_view(report: Report, recording: Recording, lane: int, n: int, obs: np.ndarray, info: dict) -> None:
    report.check("obs", recording.obs[n], obs[lane])
    report.check("info keys", sorted(recording.info) == sorted(info), True)
    for key, values in recording.info.items():
        report.check(f"info {key}", values[n], info[key][lane])


def _check_step(report: Report, recording: Recording, lane: int, n: int, step: Step, num_steps: int) -> None:
    """Compare the lane after its `n`-th physics step, `num_steps` of which belong to this call."""
    _check_view(report, recording, lane, n, step.obs, step.info)
    report.check("reward term keys", list(recording.terms) == list(step.reward_terms), True)
    for key, values in recording.terms.items():
        report.check(f"reward term {key}", values[n - 1], step.reward_terms[key][lane])
    reward = np.sum(recording.reward[n - num_steps : n].astype(np.float64))
    report.check("reward", reward, step.reward[lane])
    report.check("terminated", recording.terminated[n - 1], step.terminated[lane])
    report.check("truncated", recording.truncated[n - 1], step.truncated[lane])


def _check_end(report: Report, recordings: list[Recording], twin: TwinEnv, step: Step) -> None:
    for lane, recording in enumerate(recordings):
        if recording.score:  # the episode ended
            report.check("steps", len(recording.reward), twin.steps[lane])
            found = score_terms(twin.task, {name: values[lane] for name, values in step.reward_terms.items()})
            for name, value in recording.score.items():
                report.check(f"score {name}", value, found[name])
    twin.close()


def compare_torque(task: str, recordings: list[Recording], num_threads: int = 1) -> Report:
    """The 500 Hz path against recorded episodes, fed with their torques."""
    report = Report()
    twin = _start(task, recordings, num_threads, report)
    for n in range(1, max(len(recording.reward) for recording in recordings) + 1):
        _throw_balls(twin, recordings, n - 1)
        step = twin.step_torque(np.stack([r.torque_nm[min(n, len(r.reward)) - 1] for r in recordings]))
        for lane, recording in enumerate(recordings):
            if n <= len(recording.reward):
                _check_step(report, recording, lane, n, step, num_steps=1)
    _check_end(report, recordings, twin, step)
    return report


def compare_action(task: str, recordings: list[Recording], num_threads: int = 1) -> Report:
    """The 50 Hz path against recorded episodes, fed with their actions."""
    report = Report()
    twin = _start(task, recordings, num_threads, report)
    for k in range(max(len(recording.action) for recording in recordings)):
        before = k * c.PHYSICS_STEPS_PER_ACTION
        _throw_balls(twin, recordings, before)
        step = twin.step_action(np.stack([r.action[min(k, len(r.action) - 1)] for r in recordings]))
        for lane, recording in enumerate(recordings):
            n = min(before + c.PHYSICS_STEPS_PER_ACTION, len(recording.reward))
            if n > before:
                _check_step(report, recording, lane, n, step, num_steps=n - before)
    _check_end(report, recordings, twin, step)
    return report


def compare(task: str, source: str, recordings: list[Recording]) -> Report:
    """Both paths, and what happened in the episodes."""
    report = compare_torque(task, recordings)
    if len(recordings[0].action):
        report.add(compare_action(task, recordings))
    report.episodes = len(recordings)
    report.steps = sum(len(recording.reward) for recording in recordings)
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


class _Job(NamedTuple):
    task: str
    source: str
    seeds: range
    steps: int
    checkpoint: Path | None


def _run(job: _Job) -> tuple[_Job, Report]:
    env = official.make(job.task)
    recordings = [record(env, job.task, job.source, seed, job.steps, job.checkpoint) for seed in job.seeds]
    return job, compare(job.task, job.source, recordings)


def _table(reports: dict[tuple[str, str], Report]) -> Iterator[str]:
    columns = ("task", "actions", "episodes", "physics steps", "numbers compared", "unequal", "what happened")
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for (task, source), report in reports.items():
        unequal = "none"
        if report.unequal:
            unequal = "; ".join(
                f"{name}: {len(differences)} times, up to {max(differences):.1e} relative"
                for name, differences in report.unequal.items()
            )
        seen = ", ".join(f"{name} {count}" for name, count in report.events.most_common())
        yield (
            f"| {task} | {source} | {report.episodes} | {report.steps:,} | {report.values:,} | {unequal} "
            f"| {seen or 'not ended'} |"
        )


def main(config: Config) -> bool:
    """Compare, print the table; True if everything is equal."""
    if config.steps < 1 or config.steps % c.PHYSICS_STEPS_PER_ACTION or min(config.seeds, config.workers) < 1:
        raise errors.UserError(
            f"steps ({config.steps}) must be a multiple of {c.PHYSICS_STEPS_PER_ACTION}, "
            f"seeds ({config.seeds}) and workers ({config.workers}) at least 1"
        )
    jobs = [
        _Job(
            task,
            source,
            range(first, min(first + config.batch, config.seeds)),
            config.steps,
            config.checkpoint,
        )
        for task, source in itertools.product(c.TASKS, config.sources)
        for first in range(0, config.seeds, config.batch)
    ]
    reports = {(job.task, job.source): Report() for job in jobs}
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as executor:
        for job, report in executor.map(_run, jobs):
            reports[job.task, job.source].add(report)
            verdict = "UNEQUAL" if report.unequal else "equal"
            print(f"{job.task} {job.source} seeds {job.seeds[0]} to {job.seeds[-1]}: {verdict}", file=sys.stderr)
    equal = all(report.equal for report in reports.values())
    print("\n".join(_table(reports)))
    print(f"\n{'equal' if equal else 'NOT equal'}")
    return equal


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config)) else 1)
