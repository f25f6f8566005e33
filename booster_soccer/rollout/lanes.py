"""Lanes of the three football tasks in worker processes: what fine-tuning trains and validates in.

A lane plays one task at 50 Hz: an action in, ten physics steps with its joint target held, the next
observation out; an ended episode is followed by a fresh one at once. Lanes move in lockstep, so nothing
depends on which process is faster. An episode is a function of its seed and its actions, so a lane's state
is only those: `restore` plays them again. Nothing in this module imports JAX or PyTorch.

Two engines give the same numbers: `OfficialEngine` is the platform's own environment, one to a process;
`TwinEngine` many lanes of `envs/twin.py`.
"""

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, twin
from booster_soccer.envs.cores import usable_cores
from booster_soccer.envs.official import EpisodeResult, Policy
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.finetune import Reading
from booster_soccer.rewards.official import score_terms

BACKENDS = ("official", "twin")
# Nothing on this field is so fast; MuJoCo is, when it finds NaN and starts again by itself.
_MAX_JUMP_M = 0.5  # in one action: 25 m/s


class LaneStep(NamedTuple):
    """What one action brought, for B lanes."""

    obs: np.ndarray  # (B, 87) float32 true next observation, also where the episode ended
    reading: Reading  # (B, 3) each, for the dense reward
    terminated: np.ndarray  # (B,) bool: the episode ended by its rules, no bootstrap
    truncated: np.ndarray  # (B,) bool: the episode ended by time, bootstrap from `obs`
    score: np.ndarray  # (B,) official score where the episode ended, else 0
    physics_steps: np.ndarray  # (B,) length of the episode so far
    fell: np.ndarray  # (B,) bool, where the episode ended
    success: np.ndarray  # (B,) bool, where the episode ended
    next_obs: np.ndarray  # (B, 87) float32 observation to act on: that of a fresh start after an end
    next_reading: Reading  # (B, 3) each, likewise


class Outcome(NamedTuple):
    """What ended episodes came to; entries of lanes that go on mean nothing."""

    score: np.ndarray  # (B,) official score
    fell: np.ndarray  # (B,) bool
    success: np.ndarray  # (B,) bool


class OfficialEngine:
    """One official environment with the 50 Hz control loop around it: a batch of one lane."""

    def __init__(self, task: str, num_lanes: int):
        if num_lanes != 1:
            raise ValueError(f"an official environment is one lane, not {num_lanes}")
        self.task = task
        self._env = official.make(task)

    def reset(self, lanes: np.ndarray, seeds: list[int], start_noise_rad: float) -> None:
        """Start a fresh episode."""
        for seed in seeds:
            self._obs, self._info = official.reset(self._env, seed, start_noise_rad)

    def hold(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ten physics steps with actions (1, 12), fewer if the episode ends: terminated, truncated (1,)."""
        for _ in range(c.PHYSICS_STEPS_PER_ACTION):
            joints = self._obs[: c.NUM_JOINTS], self._obs[c.NUM_JOINTS : 2 * c.NUM_JOINTS]
            torque_nm = pd.platform_torque_nm(actions[0], *joints)
            self._obs, _, terminated, truncated, self._info = self._env.step(torque_nm)
            if terminated or truncated:
                break
        return np.array([terminated]), np.array([truncated])

    def observe(self) -> np.ndarray:
        """Observation (1, 87) float32."""
        return Preprocessor().modify_state(self._obs, self._info)

    def read(self) -> Reading:
        """What the reward needs, (1, 3) each."""
        data = self._env.unwrapped.sim.data
        ball = data.get_geom_xpos("ball"), data.get_geom_xvelp("ball")
        info = {name: self._info[name][None] for name in _READ_FROM_INFO}
        return _reading(self.task, info, *(vector_w.copy()[None] for vector_w in ball))

    def physics_steps(self) -> np.ndarray:
        """Length (1,) of the running episode."""
        return np.array([self._env.unwrapped.sim.data.time / c.PHYSICS_DT_S]).round().astype(np.int64)

    def outcome(self) -> Outcome:
        """Score and fate of the episode that ended."""
        score = sum(score_terms(self.task, self._info["reward_terms"]).values())
        fell = self._env.unwrapped.robots[0].is_terminated()
        return Outcome(np.array([score]), np.array([bool(fell)]), np.array([bool(self._info["success"])]))

    def validate(self, policy: Policy, seeds: list[int], start_noise_rad: float) -> list[EpisodeResult]:
        """Play and score whole episodes; the running one is lost."""
        return [official.run_episode(self._env, self.task, policy, seed, start_noise_rad) for seed in seeds]


class TwinEngine:
    """Lanes of the official environment's twin."""

    def __init__(self, task: str, num_lanes: int):
        self.task = task
        self._env = twin.TwinEnv(task, num_lanes)

    def reset(self, lanes: np.ndarray, seeds: list[int], start_noise_rad: float) -> None:
        """Start fresh episodes in some lanes."""
        self._obs, self._info = self._env.reset(seeds, start_noise_rad, lanes)

    def hold(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ten physics steps with actions (B, 12), fewer where the episode ends: terminated, truncated (B,)."""
        step = self._env.step_action(actions)
        self._obs, self._info = step.obs, step.info
        return step.terminated, step.truncated

    def observe(self) -> np.ndarray:
        """Observations (B, 87) float32."""
        return Preprocessor().modify_state(self._obs, self._info)

    def read(self) -> Reading:
        """What the reward needs, (B, 3) each."""
        return _reading(self.task, self._info, self._env.ball_centre_w.copy(), self._env.ball_centre_velocity_w)

    def physics_steps(self) -> np.ndarray:
        """Lengths (B,) of the running episodes."""
        return self._env.steps.copy()

    def outcome(self) -> Outcome:
        """Scores and fates of the episodes that ended."""
        fell = ~(self._env.imu_pos_w[:, 2] > c.FALL_HEIGHT_M)
        return Outcome(np.nan_to_num(self._env.score()), fell, self._info["success"].copy())

    def validate(self, policy: Policy, seeds: list[int], start_noise_rad: float) -> list[EpisodeResult]:
        """Play and score whole episodes, beside the running ones."""
        return twin.run_task(self.task, policy, seeds, start_noise_rad) if seeds else []


_ENGINES = {"official": OfficialEngine, "twin": TwinEngine}
_READ_FROM_INFO = ("goal_team_0_rel_robot", "target_xpos_rel_robot")


def _reading(task: str, info: dict, ball_centre_pos_w: np.ndarray, ball_centre_vel_w: np.ndarray) -> Reading:
    robot_pos_w = c.GOAL_POS_W[0] - info["goal_team_0_rel_robot"]
    aim_pos_w = robot_pos_w + info["target_xpos_rel_robot"]
    if task == "goalie":  # has no target of its own
        aim_pos_w = np.broadcast_to(c.GOAL_POS_W[0], robot_pos_w.shape)
    return Reading(robot_pos_w, ball_centre_pos_w, ball_centre_vel_w, aim_pos_w)


def _jumped(before: Reading, after: Reading) -> np.ndarray:
    """Lanes (B,) whose simulation broke: numbers that are not finite, or a jump no body can make."""
    moves = [after.robot_pos_w - before.robot_pos_w, after.ball_centre_pos_w - before.ball_centre_pos_w]
    broken = ~np.isfinite(after.ball_centre_vel_w).all(axis=-1)
    for move in moves:
        broken |= ~(np.linalg.norm(move, axis=-1) < _MAX_JUMP_M)
    return broken


class Player:
    """Lanes of one engine: episodes one after another, each from its own seed."""

    def __init__(self, engine: OfficialEngine | TwinEngine, keys: list[tuple[int, ...]], start_noise_rad: float):
        """Lane i's episode number e starts from `episode_seed(*keys[i], e)`."""
        self._engine, self._keys, self._start_noise_rad = engine, keys, start_noise_rad
        self._episode = np.zeros(len(keys), dtype=np.int64)
        self._actions: list[list[np.ndarray]] = [[] for _ in keys]  # of the running episodes

    def start(self) -> tuple[np.ndarray, Reading]:
        """Begin the present episodes and play what was played in them: observations (B, 87), readings."""
        lengths = np.array([len(played) for played in self._actions])
        rounds = lengths.max()
        self._reset(np.arange(len(lengths)))
        for round_ in range(rounds):
            # A shorter episode begins later, so that all of them arrive together.
            self._reset(np.flatnonzero(lengths == rounds - round_))
            actions = np.zeros((len(lengths), c.NUM_JOINTS), np.float32)
            for lane in np.flatnonzero(lengths >= rounds - round_):
                actions[lane] = self._actions[lane][round_ - rounds]
            self._engine.hold(actions)
        self._reset(np.flatnonzero(lengths == 0))
        self._now = self._engine.observe(), self._engine.read()
        return self._now

    def step(self, actions: np.ndarray) -> LaneStep:
        """Play one action (B, 12) in [-1, 1] in each lane."""
        for played, action in zip(self._actions, actions):
            played.append(action.copy())
        terminated, truncated = self._engine.hold(actions)
        obs, reading, length = self._engine.observe(), self._engine.read(), self._engine.physics_steps()
        # On NaN MuJoCo itself starts again, from the model's zero pose, and the environment plays on. The
        # learner must not see that jump: the episode ends there, with the last good numbers and no score.
        broken = _jumped(self._now[1], reading)
        obs = np.where(broken[:, None], self._now[0], obs)
        reading = Reading(*(np.where(broken[:, None], old, new) for old, new in zip(self._now[1], reading)))
        terminated = terminated | broken
        truncated = truncated & ~terminated
        ended = terminated | truncated
        counts = ended & ~broken
        outcome = self._engine.outcome() if counts.any() else Outcome(*np.zeros((3, len(ended))))
        self._now = obs, reading
        if ended.any():
            for lane in np.flatnonzero(ended):
                self._actions[lane] = []
            self._episode[ended] += 1
            self._reset(np.flatnonzero(ended))
            self._now = self._engine.observe(), self._engine.read()
        return LaneStep(
            obs,
            reading,
            terminated,
            truncated,
            np.where(counts, outcome.score, 0.0),
            length,
            counts & outcome.fell.astype(bool),
            counts & outcome.success.astype(bool),
            *self._now,
        )

    def validate(self, policy: Policy, seeds: list[int], start_noise_rad: float) -> list[EpisodeResult]:
        """Play and score whole episodes; every lane is afterwards where it was."""
        results = self._engine.validate(policy, seeds, start_noise_rad)
        if isinstance(self._engine, OfficialEngine):
            self.start()
        return results

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs: numbers (B,) and lengths (B,) of the episodes, actions (B, 500, 12) so far."""
        actions = np.zeros((len(self._keys), c.EPISODE_ACTIONS, c.NUM_JOINTS), np.float32)
        for lane, played in enumerate(self._actions):
            if played:
                actions[lane, : len(played)] = played
        lengths = np.array([len(played) for played in self._actions])
        return {"lane_episode": self._episode.copy(), "lane_length": lengths, "lane_actions": actions}

    def restore(self, state: dict[str, np.ndarray]) -> tuple[np.ndarray, Reading]:
        """Bring every lane to where `state` was taken: observations (B, 87), readings."""
        self._episode = state["lane_episode"].copy()
        played = zip(state["lane_actions"], state["lane_length"])
        self._actions = [list(actions[:length]) for actions, length in played]
        return self.start()

    def _reset(self, lanes: np.ndarray) -> None:
        if len(lanes):
            seeds = [episode_seed(*self._keys[lane], int(self._episode[lane])) for lane in lanes]
            self._engine.reset(lanes, seeds, self._start_noise_rad)


class Lanes:
    """B lanes spread over processes. The tasks take turns: lane i plays task i modulo three."""

    def __init__(self, backend: str, num_lanes: int, seed: int, start_noise_rad: float):
        """Start the processes. Lane i's episode number e starts from `episode_seed(seed, i, e)`."""
        check_num_lanes(num_lanes)
        per_task = num_lanes // c.NUM_TASKS
        if backend == "twin":
            per_task = min(per_task, max(1, usable_cores() // c.NUM_TASKS))
        self.task = [c.TASKS[lane % c.NUM_TASKS] for lane in range(num_lanes)]
        # Process p has the lanes p, p + P, p + 2 P ..., all of one task, because P is a multiple of three.
        self._lanes_of = [list(range(num_lanes))[p :: c.NUM_TASKS * per_task] for p in range(c.NUM_TASKS * per_task)]
        self._connections: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("spawn")
        with official._lean_children():
            for lanes in self._lanes_of:
                here, there = context.Pipe()
                keys = [(seed, lane) for lane in lanes]
                arguments = there, backend, self.task[lanes[0]], keys, start_noise_rad
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                there.close()
                self._connections.append(here)
                self._processes.append(process)

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; nothing is lost that `state` does not hold."""
        for process in self._processes:
            process.kill()  # it holds nothing, and ignores SIGTERM
        for process in self._processes:
            process.join()

    def start(self) -> tuple[np.ndarray, Reading]:
        """Begin every lane's first episode: observations (B, 87) and readings."""
        self._ask("start")
        return self._gather(self._answers())

    def send(self, actions: np.ndarray) -> None:
        """Set actions (B, 12) going; the caller may compute until it needs `receive`."""
        self._ask("step", lambda lanes: [actions[lanes]])

    def receive(self) -> LaneStep:
        """What the actions of the last `send` brought."""
        return self._gather(self._answers())

    def validate(self, policy: Policy, seeds: list[int], start_noise_rad: float) -> list[EpisodeResult]:
        """Score a policy, (87,) -> (12,), on every seed in every task; results by task, then seed.

        Every lane is afterwards where it was.
        """
        share = len(self._lanes_of) // c.NUM_TASKS  # processes of a task, numbered p // 3
        self._ask("validate", lambda lanes: [policy, seeds[lanes[0] // c.NUM_TASKS :: share], start_noise_rad])
        results = [result for answer in self._answers() for result in answer]
        order = {(task, seed): i for i, (task, seed) in enumerate((t, s) for t in c.TASKS for s in seeds)}
        return sorted(results, key=lambda result: order[result.task, result.seed])

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs, as of `Player.state`."""
        self._ask("state")
        answers = self._answers()
        return {name: self._gather([answer[name] for answer in answers]) for name in answers[0]}

    def restore(self, state: dict[str, np.ndarray]) -> tuple[np.ndarray, Reading]:
        """Bring every lane to where `state` was taken: observations (B, 87) and readings."""
        self._ask("restore", lambda lanes: [{name: values[lanes] for name, values in state.items()}])
        return self._gather(self._answers())

    def _ask(self, name: str, arguments_of=lambda lanes: []) -> None:
        """Call a method of every `Player`, with arguments made from its lanes."""
        for p, lanes in enumerate(self._lanes_of):
            try:
                self._connections[p].send((name, *arguments_of(lanes)))
            except ConnectionError:
                self._answer(p)  # says why

    def _answers(self) -> list:
        return [self._answer(p) for p in range(len(self._lanes_of))]

    def _answer(self, p: int):
        where = f"the process of {self.task[p]} lanes {self._lanes_of[p]}"
        try:
            answer = self._connections[p].recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(f"{where} died, often for lack of memory: use fewer lanes") from error
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, _Failure):
            raise RuntimeError(f"{where} failed:\n{answer.traceback}")
        return answer

    def _gather(self, parts: list):
        """Arrays, or tuples of them, of the processes' lanes as arrays of all lanes in order."""
        if isinstance(parts[0], tuple):
            entries = [self._gather(list(column)) for column in zip(*parts)]
            return type(parts[0])(*entries) if hasattr(parts[0], "_fields") else tuple(entries)
        whole = np.zeros((len(self.task), *parts[0].shape[1:]), parts[0].dtype)
        for lanes, part in zip(self._lanes_of, parts):
            whole[lanes] = part
        return whole


def episode_seed(*key: int) -> int:
    """The seed of an episode from a key such as (run, lane, episode); the platform's own loads slowly."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def check_num_lanes(num_lanes: int) -> None:
    """Raise `UserError` unless every task gets the same number of lanes."""
    if num_lanes < c.NUM_TASKS or num_lanes % c.NUM_TASKS:
        raise UserError(f"{num_lanes} lanes cannot be shared by {c.NUM_TASKS} tasks: use a multiple of {c.NUM_TASKS}")


def real_observations(policy: Policy, per_task: int, seed: int, start_noise_rad: float) -> np.ndarray:
    """Observations (3 * per_task, 87) that a policy meets in the three official environments."""
    met = np.zeros((c.NUM_TASKS, per_task, OBS_SIZE), np.float32)
    for row, task in zip(met, c.TASKS):
        player = Player(OfficialEngine(task, 1), [(seed,)], start_noise_rad)
        obs, _ = player.start()
        for i in range(per_task):
            row[i] = obs[0]
            obs = player.step(policy(obs)).next_obs
    return met.reshape(-1, OBS_SIZE)


class _Failure(NamedTuple):
    """An unexpected error in a worker process."""

    traceback: str


def _serve(
    connection: Connection, backend: str, task: str, keys: list[tuple[int, ...]], start_noise_rad: float
) -> None:
    """A worker process: answer calls of `Player` by name until the connection closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to end, after it has saved
        signal.signal(number, signal.SIG_IGN)
    try:
        player = Player(_ENGINES[backend](task, len(keys)), keys, start_noise_rad)
        while True:
            name, *arguments = connection.recv()
            connection.send(getattr(player, name)(*arguments))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(_Failure(traceback.format_exc()))
