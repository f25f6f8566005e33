"""Lanes of the three football tasks in worker processes: what fine-tuning trains in.

A lane plays one task at 50 Hz: an action in, ten physics steps with its joint target held, the next
observation out; an ended episode is followed by a fresh one at once. Lanes move in lockstep, so nothing
depends on which process is faster. An episode is a function of its seed and its actions, so a lane's state
is only those: `restore` plays them again. Nothing in this module imports JAX or PyTorch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from booster_soccer.cores import usable_cores
from booster_soccer.envs import constants as c
from booster_soccer.envs.situation import Memory, Situation
from booster_soccer.errors import UserError
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.lanes import OfficialLanes, TwinLanes
from booster_soccer.rollout.play import episode_seed
from booster_soccer.rollout.processes import Workers
from booster_soccer.rollout.shaping import DenseLanes

# Nothing on this field is so fast; MuJoCo is, when it finds NaN and starts again by itself.
_MAX_JUMP_M = 0.5  # in one action: 25 m/s


class LaneStep(NamedTuple):
    """What one action brought, for B lanes."""

    critic_obs: np.ndarray  # (B, 109) float32 what truly came next, also where the episode ended
    dense: np.ndarray  # (B,) dense reward
    dense_terms: dict[str, np.ndarray]  # raw, each (B,)
    terminated: np.ndarray  # (B,) bool: the episode ended by its rules, no bootstrap
    truncated: np.ndarray  # (B,) bool: the episode ended by time, bootstrap from `critic_obs`
    score: np.ndarray  # (B,) official score where the episode ended, else 0
    physics_steps: np.ndarray  # (B,) length of the episode so far
    fell: np.ndarray  # (B,) bool, where the episode ended
    success: np.ndarray  # (B,) bool, where the episode ended
    next_critic_obs: np.ndarray  # (B, 109) float32 what to act on: that of a fresh start after an end


def _jumped(before: Situation, after: Situation) -> np.ndarray:
    """Lanes (B,) whose simulation broke: numbers that are not finite, or a jump no body can make."""
    broken = ~np.isfinite(after.ball_center_vel_w).all(axis=-1)
    for name in ("imu_pos_w", "ball_center_pos_w"):
        broken |= ~(np.linalg.norm(getattr(after, name) - getattr(before, name), axis=-1) < _MAX_JUMP_M)
    return broken


class EndlessLanes:
    """Lanes of one task: episodes one after another, each from its own seed."""

    def __init__(
        self,
        backend: str,
        task: str,
        keys: list[tuple[int, ...]],
        start_noise_rad: float,
        weights: DenseWeights,
    ):
        """Lane i's episode number e starts from `episode_seed(*keys[i], e)`."""
        self.lanes = TwinLanes(task, len(keys)) if backend == "twin" else OfficialLanes(task)
        self.dense = DenseLanes(len(keys), weights)
        self._keys, self._start_noise_rad = keys, start_noise_rad
        self._episode = np.zeros(len(keys), dtype=np.int64)
        self._actions: list[list[np.ndarray]] = [[] for _ in keys]  # of the running episodes

    def start(self) -> np.ndarray:
        """Begin the present episodes and play what was played in them: what critics see (B, 109)."""
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
        self._now = self.lanes.situation()
        return self.dense.start(self.lanes.observe(), self._now, lengths == 0)

    def step(self, actions: np.ndarray) -> LaneStep:
        """Play one action (B, 12) in [-1, 1] in each lane."""
        for played, action in zip(self._actions, actions):
            played.append(action.copy())
        terminated, truncated = self.lanes.hold(actions)
        now, length = self.lanes.situation(), self.lanes.look().steps
        # On NaN MuJoCo itself starts again, from the model's zero pose, and the environment plays on. The
        # learner must not see that jump: the episode ends there, without a score.
        broken = _jumped(self._now, now)
        terminated = terminated | broken
        truncated = truncated & ~terminated
        with np.errstate(all="ignore"):  # of a broken lane
            shaped = self.dense.step(self.lanes.observe(), now, self.lanes.events(broken), actions.astype(np.float64))
        ended = terminated | truncated
        score, fell, success = np.zeros(len(actions)), np.zeros(len(actions), bool), np.zeros(len(actions), bool)
        for lane in np.flatnonzero(ended).tolist():
            if not broken[lane]:
                outcome = self.lanes.outcome(lane)
                score[lane], fell[lane], success[lane] = outcome.score, outcome.fell, outcome.success
            self._actions[lane] = []
        self._now, following = now, shaped.critic_obs
        if ended.any():
            self._episode[ended] += 1
            self._reset(np.flatnonzero(ended))
            self._now = self.lanes.situation()
            following = self.dense.start(self.lanes.observe(), self._now, ended)
        dense = shaped.critic_obs, shaped.reward, shaped.dense_terms
        return LaneStep(*dense, terminated, truncated, score, length, fell, success, following)

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs: numbers (B,), lengths (B,) and memory of the episodes, actions (B, 500, 12) so far."""
        actions = np.zeros((len(self._keys), c.EPISODE_ACTIONS, c.NUM_JOINTS), np.float32)
        for lane, played in enumerate(self._actions):
            if played:
                actions[lane, : len(played)] = played
        lengths = np.array([len(played) for played in self._actions])
        memory = {f"memory_{name}": np.array(values) for name, values in self.dense.memory._asdict().items()}
        return {"lane_episode": self._episode.copy(), "lane_length": lengths, "lane_actions": actions} | memory

    def restore(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """Bring every lane to where `state` was taken: what critics see (B, 109)."""
        self.dense.memory = Memory(**{name: state[f"memory_{name}"] for name in Memory._fields})
        self._episode = state["lane_episode"].copy()
        played = zip(state["lane_actions"], state["lane_length"])
        self._actions = [list(actions[:length]) for actions, length in played]
        return self.start()

    def _reset(self, lanes: np.ndarray) -> None:
        if len(lanes):
            seeds = [episode_seed(*self._keys[lane], int(self._episode[lane])) for lane in lanes]
            self.lanes.reset(lanes.tolist(), seeds, self._start_noise_rad)


class WorkerLanes(Workers):
    """B lanes spread over processes of `EndlessLanes`. The tasks take turns: lane i plays task i modulo three."""

    def __init__(self, backend: str, num_lanes: int, seed: int, start_noise_rad: float, weights: DenseWeights):
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
        arguments = [(backend, task, of_lanes, start_noise_rad, weights) for task, of_lanes in zip(self.tasks, keys)]
        super().__init__(EndlessLanes, arguments, names, "use fewer lanes")

    def start(self) -> np.ndarray:
        """Begin every lane's first episode: what critics see (B, 109)."""
        return self._gather(self._ask("start"))

    def send(self, actions: np.ndarray) -> None:
        """Set actions (B, 12) going; the caller may compute until it needs `receive`."""
        for p, lanes in enumerate(self._lanes_of):
            self.call(p, "step", actions[lanes])

    def receive(self) -> LaneStep:
        """What the actions of the last `send` brought."""
        return self._gather([self.answer(p) for p in range(len(self._lanes_of))])

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs, as of `EndlessLanes.state`."""
        return self._gather(self._ask("state"))

    def restore(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """Bring every lane to where `state` was taken: what critics see (B, 109)."""
        of_lanes = self._ask("restore", lambda _, lanes: ({name: values[lanes] for name, values in state.items()},))
        return self._gather(of_lanes)

    def _ask(self, method: str, arguments_of: Callable[[int, list[int]], tuple] = lambda p, lanes: ()) -> list:
        """Call a method of every process, with arguments made from its number and lanes; the answers."""
        for p, lanes in enumerate(self._lanes_of):
            self.call(p, method, *arguments_of(p, lanes))
        return [self.answer(p) for p in range(len(self._lanes_of))]

    def _gather(self, parts: list):
        """Arrays, or NamedTuples or dictionaries of them, of the processes' lanes as those of all lanes in order."""
        if isinstance(parts[0], dict):
            return {name: self._gather([part[name] for part in parts]) for name in parts[0]}
        if isinstance(parts[0], tuple):  # a NamedTuple
            return type(parts[0])(*(self._gather(list(column)) for column in zip(*parts)))
        whole = np.zeros((len(self.tasks), *parts[0].shape[1:]), parts[0].dtype)
        for lanes, part in zip(self._lanes_of, parts):
            whole[lanes] = part
        return whole


def check_num_lanes(num_lanes: int) -> None:
    """Raise `UserError` unless every task gets the same number of lanes."""
    if num_lanes < c.NUM_TASKS or num_lanes % c.NUM_TASKS:
        raise UserError(f"{num_lanes} lanes cannot be shared by {c.NUM_TASKS} tasks: use a multiple of {c.NUM_TASKS}")
