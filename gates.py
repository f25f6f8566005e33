"""The verification gates between pre-training and fine-tuning: measured numbers, each with its limits.

    python gates.py --pretrained DIR --converted DIR [--json FILE] [--seed 0] [--backend twin|official]

Input: a "pretrained" checkpoint and the "converted" one made from it. Output: tables, one line on stderr for
every check that fails, and with `--json` a file that holds all the numbers and a page beside it (.html). Exit status 1
if a check fails.

Gate 1: the observation is the same in JAX, in NumPy and in the class that is submitted, on states of the
official environments, those of turned and tilted robots too; and turning the robot proves that its
quaternion is read in the right order. Gate 2: the JAX actor and the converted PyTorch actor give the same
actions, log_std lies in its range before clipping, and from the same starts the converted policy acts at
every observation as the pre-trained one would, and scores like it. Gate 3: the converted policy does in the
official environment what the pre-trained one does in the pre-training scene, from the same starts: length of
the episode, falls, distance walked, touches and score, per task.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import functools
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from booster_soccer import runtime

runtime.prepare()  # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from booster_soccer import errors
from booster_soccer.agents import conversion
from booster_soccer.agents.policy import ACTION_LIMITS, policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.envs.turned import Info, Turned, random_quat_wxyz, turn, turned_rng
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES, TABLE, observe
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rollout import play
from booster_soccer.rollout.play import Episode, Recorded, play_in_workers
from booster_soccer.rollout.scores import evaluate, mean_interval
from booster_soccer.store import checkpoints
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.entry import guarded
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig
from booster_soccer.tracking.report import finished, print_checks, write_json

MIN_STATES = 100  # per task
FLOAT32_LIMIT, FLOAT64_LIMIT = 1e-6, 1e-12  # of an observed number or turned vector a, times max(1, |a|)
ROTATION_LIMIT = 1e-5  # metres and units of gravity; the official quaternion is float32
_TURNS = 20  # robots turned per task to prove the quaternion's order
_SCORE_ROUNDS = 4  # in how many, at most, the converted policy's score may miss before that is a failure


@dataclass(frozen=True)
class Config:
    """What to hold against what, and how long."""

    pretrained: Path  # "pretrained" checkpoint directory
    converted: Path  # the "converted" one made from it
    json: Path | None = None  # new file for the numbers
    seed: int = 0  # master seed of the official starts and of the turns
    states: int = 120  # official states per task for the comparisons, at least 100; half as many turned ones
    episodes: int = 10  # per task, policy and round, for actions and score along the trajectory
    start_noise: float = c.START_NOISE_RAD  # standard deviation of the noise on each joint's start position, rad
    behaviour_episodes: int = 40  # per task and side, for gate 3
    backend: Literal["official", "twin"] = "twin"  # where the official side of gates 2 and 3 is played
    tracking: TrackConfig = TrackConfig()


@dataclass(frozen=True)
class Check:
    """One number that must lie within its limits, both included."""

    gate: int
    name: str
    measured: float
    low: float | None  # None: no limit on this side
    high: float | None
    where: str  # what the number was taken from
    remedy: str  # where to look when it fails

    @property
    def passed(self) -> bool:
        """Whether it does; NaN does not."""
        return (self.low is None or self.low <= self.measured) and (self.high is None or self.measured <= self.high)

    @property
    def limits(self) -> str:
        """The limits as text."""
        if self.high is None:
            return f">= {self.low:+.3g}"
        if self.low is None or self.low == 0.0:
            return f"<= {self.high:.3g}"
        return f"{self.low:+.3g} .. {self.high:+.3g}"


# --- official states ----------------------------------------------------------------------------------


def record(
    task: str, policy: play.Act, states: int, seed: int, start_noise_rad: float, turned: bool = False
) -> tuple[np.ndarray, Info]:
    """Official observations (states, raw) and info (states, ...) that a policy meets, one at each action.

    As many episodes as it takes; with `turned` every one starts from a random orientation.
    """
    env = Turned(official.make(task), seed) if turned else official.make(task)
    return play.record(task, policy, states, functools.partial(official.match_seed, seed), start_noise_rad, env)[1:]


# --- gate 1: the observation ----------------------------------------------------------------------------


def observed(obs, info, xp=np):
    """Our observation (..., 87), by default in NumPy; the official `obs` begins with the same joint rows."""
    return observe(obs[..., SLICES["joint_pos"]], obs[..., SLICES["joint_vel"]], info, xp)


_observe_in_jax = jax.jit(functools.partial(observed, xp=jnp))


def in_jax(obs: np.ndarray, info: Info, x64: bool = False) -> np.ndarray:
    """The observation (..., 87) in JAX, compiled, in float32 or float64."""
    dtype = np.float64 if x64 else np.float32
    info = {key: value.astype(dtype) for key, value in info.items()}
    with jax.enable_x64(x64):
        return np.asarray(_observe_in_jax(obs.astype(dtype), info))


def submitted_preprocessor():
    """The class as the platform loads it: from its source, imports removed, alone, without an environment."""
    from sai_rl.model.custom import PreprocessingManager

    return PreprocessingManager(Preprocessor, env=None)


def difference(actual: np.ndarray, expected: np.ndarray) -> tuple[float, str]:
    """Largest |actual - expected| / max(1, |a|) of observations (N, 87), and the feature it is in.

    a is the expected number; of a vector turned into the heading frame, the vector: turning rounds in proportion to
    its length, and leaves that error in a component near zero too (a ball that spins at 50 rad/s: 2e-6).
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    apart, worst = np.abs(actual - expected), {}
    for row in TABLE:
        size = np.abs(expected[..., SLICES[row.name]])
        if row.frame == "heading":
            lengths = np.linalg.norm(size.reshape(*size.shape[:-1], -1, 3), axis=-1)
            size = np.repeat(lengths, 3, axis=-1)
        worst[row.name] = float((apart[..., SLICES[row.name]] / np.maximum(1.0, size)).max())
    feature = max(worst, key=lambda name: np.nan_to_num(worst[name], nan=np.inf))
    return worst[feature], feature


def rotation_error(task: str, seed: int) -> float:
    """Largest error of gravity and ball (heading frame, m) of turned robots, by MuJoCo's rotation matrix."""
    env, rng = official.make(task), turned_rng(seed)
    official.reset(env, official.match_seed(seed, 0))
    data, imu_site = env.unwrapped.sim.data._data, env.unwrapped._root_site
    errors_of_turns = []
    for _ in range(_TURNS):
        seen = observed(*turn(env, random_quat_wxyz(rng)))
        body_to_world = data.site(imu_site).xmat.reshape(3, 3)
        forward_w = body_to_world[:2, 0] / np.linalg.norm(body_to_world[:2, 0])
        left_w = np.array([-forward_w[1], forward_w[0]])
        ball_w = (data.site("ball").xpos - data.site(imu_site).xpos)[:2]
        errors_of_turns += [
            seen[SLICES["ball_pos_rel_robot_h"]][:2] - [forward_w @ ball_w, left_w @ ball_w],
            seen[SLICES["projected_gravity_b"]] - body_to_world.T @ [0.0, 0.0, -1.0],
        ]
    env.close()
    return float(np.abs(np.concatenate(errors_of_turns)).max())


def observation_checks(states: dict[str, tuple[np.ndarray, Info]], seed: int) -> list[Check]:
    """Gate 1 on official states of each task, and on robots turned at their start."""
    submitted = submitted_preprocessor()
    pairs: dict[str, list[tuple[float, str]]] = {}
    for task, (obs, info) in states.items():
        # JAX in float32 sees rounded states; what that alone changes (up to 9.5e-7) is no disagreement.
        rounded = obs.astype(np.float32), {key: value.astype(np.float32) for key, value in info.items()}
        held = rounded[0].astype(np.float64), {key: value.astype(np.float64) for key, value in rounded[1].items()}
        in_float32, in_float64 = in_jax(*rounded), observed(obs, info)
        for name, actual, expected in (
            ("JAX float32 and NumPy", in_float32, observed(*held)),
            ("JAX float64 and NumPy", in_jax(obs, info, x64=True), in_float64),
            ("submitted class and NumPy", submitted.modify_state(obs, info), in_float64),
            ("JAX float32 and submitted class", in_float32, submitted.modify_state(*held)),
        ):
            apart, feature = difference(actual, expected)
            pairs.setdefault(name, []).append((apart, f"{task}, {feature}"))
    checks, remedy = [], "compare this row in preprocess/observation.py and preprocess/submission.py"
    for name, found in pairs.items():
        apart, where = max(found, key=lambda pair: np.nan_to_num(pair[0], nan=np.inf))
        limit = FLOAT64_LIMIT if "float64" in name else FLOAT32_LIMIT
        checks.append(Check(1, f"observation, {name}", apart, 0.0, limit, where, remedy))
    worst, task = max((rotation_error(task, seed), task) for task in c.TASKS)
    remedy = "look at the quaternion's order in preprocess/observation.py (MuJoCo: wxyz, official info: xyzw)"
    rotation = "rotation, by MuJoCo's own matrix"
    return [*checks, Check(1, rotation, worst, 0.0, ROTATION_LIMIT, f"{task}, robots turned", remedy)]


# --- gate 2: the policy ---------------------------------------------------------------------------------


def actor_checks(pretrained: Checkpoint, converted: Checkpoint, real_obs: np.ndarray) -> tuple[list[Check], dict]:
    """JAX against PyTorch on real (N, 87) and golden observations, and log_std on the real ones."""
    obs = np.concatenate([real_obs, pretrained.golden_obs])
    differences = conversion.compare(pretrained.arrays, converted.arrays, obs)
    where, remedy = f"{len(obs)} real and golden observations", "convert again with convert_jax2torch.py"
    checks = [
        Check(2, f"action, JAX and PyTorch actors, {name}", differences[name], 0.0, limit, where, remedy)
        for name, limit in ACTION_LIMITS.items()
    ]
    spread = conversion.log_std_report(conversion.log_std(pretrained.arrays, real_obs))
    low, high = spread.pop("range")
    where, remedy = f"{len(real_obs)} real observations", "pre-training diverged: take an earlier checkpoint"
    for end in ("min", "max"):
        checks.append(Check(2, f"log_std before clipping, {end}", spread[end], low, high, where, remedy))
    return checks, spread


def trajectory_checks(pretrained: Checkpoint, converted: Checkpoint, config: Config) -> tuple[list[Check], list]:
    """Play both policies from the same starts: the converted one's actions along its way, and its score.

    Contacts are chaotic: a seventh digit can decide an episode. Measured with a policy that walks and kicks:
    every penalty episode went another way, and of two samples of ten starts the second's mean missed the
    first's 95 % interval 27 times in 100. So a miss is repeated on fresh starts.
    """
    before, after = (policy_from_arrays(checkpoint.arrays) for checkpoint in (pretrained, converted))
    apart, observations, rounds = 0.0, 0, []
    for seed in range(config.seed, config.seed + _SCORE_ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            recorded = Recorded(after, Path(directory))
            played = evaluate(recorded, config.episodes, seed, config.start_noise, config.backend)
            files = [np.fromfile(file, np.float32) for file in sorted(Path(directory).iterdir())]
        expected = evaluate(before, config.episodes, seed, config.start_noise, config.backend)
        met = np.concatenate(files).reshape(-1, OBS_SIZE)
        apart = float(np.maximum(apart, np.abs(after(met) - before(met)).max()))
        observations += len(met)
        rounds.append({"seed": seed, "pretrained": _scores(expected), "converted": _scores(played)})
        low, high = expected["ci95"]
        if low <= played["mean"] <= high:
            break
    where, remedy = f"{observations:,} observations that the converted policy met", "convert again"
    limit = ACTION_LIMITS["float64"]  # that is how both are computed here
    actions = Check(2, "action along the trajectory", apart, 0.0, limit, where, remedy)
    where = f"{config.episodes} starts per task, master seed {seed}, round {len(rounds)} of at most {_SCORE_ROUNDS}"
    remedy = "every round missed, so the two policies play differently: convert again"
    name = "converted score in pre-trained one's 95 % interval"
    return [actions, Check(2, name, played["mean"], low, high, where, remedy)], rounds


def _scores(result: dict) -> dict:
    """Mean score, its interval and the tasks' means, of a result of `evaluate`."""
    tasks = {task: of_task["mean"] for task, of_task in result["tasks"].items()}
    return {"mean": result["mean"], "ci95": result["ci95"], "tasks": tasks}


# --- gate 3: the behaviour ------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    """How far a mean in the official environment may lie from pre-training's, whatever the spread."""

    least: float
    share: float = 0.0  # of pre-training's mean, where that is more
    worse: Literal["more", "less", "both"] = "both"  # the side that fails


# Why these: a second of ten; a fall in seven; half a metre, or a quarter of the way of a policy that runs. A
# touch counts anew after each 2 ms without contact in the official environment, after each 20 ms in
# pre-training, so dribbling differs by more than a bit. The score: half a m/s of ball speed.
TOLERANCES = {
    "physics_steps": Tolerance(500.0),
    "fell": Tolerance(0.15, worse="more"),
    "walked_m": Tolerance(0.5, 0.25),
    "touches": Tolerance(1.0, 0.5),
    "score": Tolerance(0.75, worse="less"),
}
# A difference within so many standard errors is chance. Three, not 1.96: there are fifteen checks, and one in
# twenty of them would fail a faithful policy about every other time.
_STANDARD_ERRORS = 3.0


def limit(tolerance: Tolerance, expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """The allowed difference of the means of paired samples (N,), N > 1, and its standard error."""
    standard_error = float(np.std(actual - expected, ddof=1) / np.sqrt(len(actual)))
    tolerated = max(tolerance.least, tolerance.share * abs(float(np.mean(expected))))
    return max(tolerated, _STANDARD_ERRORS * standard_error), standard_error


def compare_behaviour(
    task: str, expected: dict[str, np.ndarray], actual: dict[str, np.ndarray]
) -> tuple[list[Check], dict]:
    """Checks and numbers of one task, from what pre-training (expected) and official episodes (N,) did."""
    checks, numbers = [], {}
    for name, tolerance in TOLERANCES.items():
        allowed, standard_error = limit(tolerance, expected[name], actual[name])
        sides = {"pretraining": _side(expected[name]), "official": _side(actual[name])}
        apart = sides["official"]["mean"] - sides["pretraining"]["mean"]
        numbers[name] = sides | {"difference": apart, "standard_error": standard_error, "limit": allowed}
        low, high = (None if tolerance.worse == side else sign * allowed for side, sign in (("more", -1), ("less", 1)))
        spreads = ", ".join(f"{side} {of['mean']:.3g} ± {of['std']:.3g}" for side, of in sides.items())
        where = f"{len(actual[name])} starts, {spreads}"
        remedy = "the simulators differ for this policy: pre-train at the next --dr-level, and fine-tune longer"
        checks.append(Check(3, f"{task}: {name}, official - pre-training", apart, low, high, where, remedy))
    return checks, numbers


def _side(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "ci95": mean_interval(values)}


def behaviour_checks(pretrained: Checkpoint, converted: Checkpoint, config: Config) -> tuple[list[Check], dict]:
    """Play the pre-trained policy in the pre-training scene, the converted one officially; compare."""
    seeds = [official.match_seed(config.seed, i) for i in range(config.behaviour_episodes)]
    episodes = [Episode(task, seed) for task in c.TASKS for seed in seeds]
    sides = []
    for backend, checkpoint in (("scene", pretrained), (config.backend, converted)):
        results = play_in_workers(backend, policy_from_arrays(checkpoint.arrays), episodes, config.start_noise)
        sides.append({name: np.array([float(getattr(result, name)) for result in results]) for name in TOLERANCES})
    checks, numbers = [], {}
    for i, task in enumerate(c.TASKS):
        mine = slice(i * len(seeds), (i + 1) * len(seeds))
        pair = ({name: values[mine] for name, values in side.items()} for side in sides)
        of_task, numbers[task] = compare_behaviour(task, *pair)
        checks += of_task
    return checks, {"backend": config.backend, "starts_per_task": len(seeds), "tasks": numbers}


# --- the command ----------------------------------------------------------------------------------------


def load(config: Config) -> tuple[Checkpoint, Checkpoint]:
    """The two checkpoints; `UserError` for numbers out of range, or unless one was made from the other."""
    if config.states < MIN_STATES or config.episodes < 1 or config.seed < 0 or config.start_noise < 0.0:
        raise UserError(
            f"--states {config.states}, --episodes {config.episodes}, --seed {config.seed}, --start-noise "
            f"{config.start_noise}: at least {MIN_STATES} states, 1 episode, and nothing negative"
        )
    if config.behaviour_episodes < 2:
        raise UserError(f"--behaviour-episodes {config.behaviour_episodes}: at least 2, one has no spread")
    pretrained = checkpoints.load(config.pretrained, ("pretrained",))
    converted = checkpoints.load(config.converted, ("converted",))
    if converted.manifest["parents"] != [{"stage": pretrained.stage, "hash": pretrained.hash}]:
        raise UserError(
            f"checkpoint {config.converted} was not converted from {config.pretrained}: give the one it came from"
        )
    return pretrained, converted


@guarded("json")
def main(config: Config) -> dict[str, Any]:
    """Measure, print, write the JSON file if one is named; returns its content, `passed` is the verdict."""
    pretrained, converted = load(config)
    no_settings = ("pretrained", "converted", "json", "tracking")
    settings = {name: value for name, value in asdict(config).items() if name not in no_settings}
    identity = settings | {"pretrained": pretrained.hash, "converted": converted.hash}
    if there := finished(config.json, identity):
        print_checks(checks_of(there))
        return there
    paths = {"pretrained": str(config.pretrained), "converted": str(config.converted)}
    with Recorder(config.json, "gates", config, [pretrained, converted]) as recorder:
        checks, measured = measure(config, pretrained, converted)
        report = measured | {"identity": identity, "checkpoints": paths}
        files: list[Path] = []
        if config.json is not None:
            write_json(report, config.json)
            files = [config.json, *stage_pages.of_gates(config.json)]
        failed = {f"gates/failed_{gate}": sum(check.gate == gate and not check.passed for check in checks)
                  for gate in (1, 2, 3)}  # fmt: skip
        recorder.result(Result(failed, files, converted, status="finished" if report["passed"] else "failed"))
    print_checks(checks)
    if config.json is not None:
        print(config.json)
    return report


def checks_of(report: dict[str, Any]) -> list[Check]:
    """The checks of a JSON file's content; a number that was not finite is null there."""
    try:
        rows = [{field.name: row[field.name] for field in fields(Check)} for row in report["checks"]]
    except (KeyError, TypeError) as error:
        raise UserError("this result of gates.py is another code's: remove the file to measure again") from error
    return [Check(**row | {"measured": math.nan if row["measured"] is None else row["measured"]}) for row in rows]


def measure(config: Config, pretrained: Checkpoint, converted: Checkpoint) -> tuple[list[Check], dict[str, Any]]:
    """All gates' checks, and the JSON file's content but for its identity."""
    policy = policy_from_arrays(converted.arrays)
    visited, states = {}, {}
    for task in c.TASKS:
        visited[task] = record(task, policy, config.states, config.seed, config.start_noise)
        turned = record(task, policy, config.states // 2, config.seed, config.start_noise, turned=True)
        joined = {key: np.concatenate([values, turned[1][key]]) for key, values in visited[task][1].items()}
        states[task] = np.concatenate([visited[task][0], turned[0]]), joined
    # Robots turned away from everything met in training strain float32; only where a policy goes counts.
    real_obs = np.concatenate([observed(*visited[task]) for task in c.TASKS]).astype(np.float32)

    checks = observation_checks(states, config.seed)
    of_actor, log_std = actor_checks(pretrained, converted, real_obs)
    of_trajectory, scores = trajectory_checks(pretrained, converted, config)
    of_behaviour, behaviour = behaviour_checks(pretrained, converted, config)
    checks += of_actor + of_trajectory + of_behaviour
    return checks, {
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "log_std": log_std,
        "scores": scores,
        "behaviour": behaviour,
    }


if __name__ == "__main__":
    report = errors.run(main, tyro.cli(Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
    sys.exit(0 if report["passed"] else 1)
