"""Lanes of the three football tasks in worker processes: what fine-tuning trains in.

A lane plays one task at 50 Hz: an action in, ten physics steps with its joint target held, the next
observation out; an ended episode is followed by a fresh one at once. Lanes move in lockstep, so nothing
depends on which process is faster. An episode is a function of its seed and its actions, so a lane's state
is only those: `restore` plays them again. Nothing in this module imports JAX or PyTorch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.envs.cores import usable_cores
from booster_soccer.errors import UserError
from booster_soccer.rewards.finetune import Reading
from booster_soccer.rollout.lanes import Lanes, OfficialLanes, TwinLanes
from booster_soccer.rollout.play import episode_seed
from booster_soccer.rollout.processes import Workers

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


def read(lanes: Lanes) -> Reading:
    """What the dense reward needs of lanes beside their observations."""
    now = lanes.look()
    return Reading(now.imu_pos_w, now.ball.centre_pos_w, now.ball.centre_vel_w, now.aim_pos_w)


def _jumped(before: Reading, after: Reading) -> np.ndarray:
    """Lanes (B,) whose simulation broke: numbers that are not finite, or a jump no body can make."""
    moves = [after.robot_pos_w - before.robot_pos_w, after.ball_centre_pos_w - before.ball_centre_pos_w]
    broken = ~np.isfinite(after.ball_centre_vel_w).all(axis=-1)
    for move in moves:
        broken |= ~(np.linalg.norm(move, axis=-1) < _MAX_JUMP_M)
    return broken


class EndlessLanes:
    """Lanes of one task: episodes one after another, each from its own seed."""

    def __init__(self, backend: str, task: str, keys: list[tuple[int, ...]], start_noise_rad: float):
        """Lane i's episode number e starts from `episode_seed(*keys[i], e)`."""
        self.lanes: Lanes = TwinLanes(task, len(keys)) if backend == "twin" else OfficialLanes(task)
        self._keys, self._start_noise_rad = keys, start_noise_rad
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
            self.lanes.hold(actions)
        self._reset(np.flatnonzero(lengths == 0))
        self._now = self.lanes.observe(), read(self.lanes)
        return self._now

    def step(self, actions: np.ndarray) -> LaneStep:
        """Play one action (B, 12) in [-1, 1] in each lane."""
        for played, action in zip(self._actions, actions):
            played.append(action.copy())
        terminated, truncated = self.lanes.hold(actions)
        obs, reading, length = self.lanes.observe(), read(self.lanes), self.lanes.look().steps
        # On NaN MuJoCo itself starts again, from the model's zero pose, and the environment plays on. The
        # learner must not see that jump: the episode ends there, with the last good numbers and no score.
        broken = _jumped(self._now[1], reading)
        obs = np.where(broken[:, None], self._now[0], obs)
        reading = Reading(*(np.where(broken[:, None], old, new) for old, new in zip(self._now[1], reading)))
        terminated = terminated | broken
        truncated = truncated & ~terminated
        ended = np.flatnonzero(terminated | truncated)
        score, fell, success = np.zeros(len(actions)), np.zeros(len(actions), bool), np.zeros(len(actions), bool)
        for lane in ended:
            if not broken[lane]:
                outcome = self.lanes.outcome(lane)
                score[lane], fell[lane], success[lane] = outcome.score, outcome.fell, outcome.success
            self._actions[lane] = []
        self._now = obs, reading
        if len(ended):
            self._episode[ended] += 1
            self._reset(ended)
            self._now = self.lanes.observe(), read(self.lanes)
        return LaneStep(obs, reading, terminated, truncated, score, length, fell, success, *self._now)

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
            self.lanes.reset(lanes, seeds, self._start_noise_rad)


class WorkerLanes(Workers):
    """B lanes spread over processes of `EndlessLanes`. The tasks take turns: lane i plays task i modulo three."""

    def __init__(self, backend: str, num_lanes: int, seed: int, start_noise_rad: float):
        """Start the processes. Lane i's episode number e starts from `episode_seed(seed, i, e)`."""
        check_num_lanes(num_lanes)
        per_task = num_lanes // c.NUM_TASKS
        if backend == "twin":
            per_task = min(per_task, max(1, usable_cores() // c.NUM_TASKS))
        self.tasks = [c.TASKS[lane % c.NUM_TASKS] for lane in range(num_lanes)]
        # Process p has the lanes p, p + P, p + 2 P ..., all of one task, because P is a multiple of three.
        self._lanes_of = [list(range(num_lanes))[p :: c.NUM_TASKS * per_task] for p in range(c.NUM_TASKS * per_task)]
        names = [f"the process of {self.tasks[lanes[0]]} lanes {lanes}" for lanes in self._lanes_of]
        keys = [[(seed, lane) for lane in lanes] for lanes in self._lanes_of]
        arguments = [(backend, task, of_lanes, start_noise_rad) for task, of_lanes in zip(self.tasks, keys)]
        super().__init__(EndlessLanes, arguments, names, "use fewer lanes")

    def start(self) -> tuple[np.ndarray, Reading]:
        """Begin every lane's first episode: observations (B, 87) and readings."""
        return self._ask("start", lambda lanes: ())

    def send(self, actions: np.ndarray) -> None:
        """Set actions (B, 12) going; the caller may compute until it needs `receive`."""
        for p, lanes in enumerate(self._lanes_of):
            self.call(p, "step", actions[lanes])

    def receive(self) -> LaneStep:
        """What the actions of the last `send` brought."""
        return self._gather([self.answer(p) for p in range(len(self._lanes_of))])

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs, as of `EndlessLanes.state`."""
        return self._ask("state", lambda lanes: ())

    def restore(self, state: dict[str, np.ndarray]) -> tuple[np.ndarray, Reading]:
        """Bring every lane to where `state` was taken: observations (B, 87) and readings."""
        return self._ask("restore", lambda lanes: ({name: values[lanes] for name, values in state.items()},))

    def _ask(self, method: str, arguments_of: Callable[[list[int]], tuple]) -> Any:
        """Call a method of every process, with arguments made from its lanes; the answers of all lanes."""
        for p, lanes in enumerate(self._lanes_of):
            self.call(p, method, *arguments_of(lanes))
        return self.receive()

    def _gather(self, parts: list) -> Any:
        """Arrays, or tuples or dictionaries of them, of the processes' lanes as arrays of all lanes in order."""
        if isinstance(parts[0], dict):
            return {name: self._gather([part[name] for part in parts]) for name in parts[0]}
        if isinstance(parts[0], tuple):
            entries = [self._gather(list(column)) for column in zip(*parts)]
            return type(parts[0])(*entries) if hasattr(parts[0], "_fields") else tuple(entries)
        whole = np.zeros((len(self.tasks), *parts[0].shape[1:]), parts[0].dtype)
        for lanes, part in zip(self._lanes_of, parts):
            whole[lanes] = part
        return whole


def check_num_lanes(num_lanes: int) -> None:
    """Raise `UserError` unless every task gets the same number of lanes."""
    if num_lanes < c.NUM_TASKS or num_lanes % c.NUM_TASKS:
        raise UserError(f"{num_lanes} lanes cannot be shared by {c.NUM_TASKS} tasks: use a multiple of {c.NUM_TASKS}")
