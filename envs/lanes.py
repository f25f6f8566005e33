"""Official environments side by side, one process each: what fine-tuning trains and validates in.

A lane plays one task at 50 Hz: an action in, ten physics steps with its joint target held, the next
observation out; an ended episode is followed by a fresh one at once. Lanes move in lockstep, so nothing
depends on which process is faster. An episode is a function of its seed and its actions, so a lane's state
is only those: `restore` plays them again. Nothing in this module imports JAX or PyTorch.
"""

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import mujoco
import numpy as np

from envs import constants as c
from envs import official, pd
from envs.official import EpisodeResult, Policy
from errors import UserError
from preprocess.observation import OBS_SIZE, observe
from rewards.finetune import Reading
from rewards.official import score_terms


# MuJoCo's warnings of NaN or huge numbers; a reset clears them.
_DIVERGED = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)


class LaneStep(NamedTuple):
    """What one action brought; of one lane as below, of B lanes with a leading axis."""

    obs: np.ndarray  # (87,) float32 true next observation, also where the episode ended
    reading: Reading  # (3,) each, for the dense reward
    terminated: bool  # the episode ended by its rules: no bootstrap
    truncated: bool  # the episode ended by time: bootstrap from `obs`
    score: float  # official score where the episode ended, else 0
    physics_steps: int  # length of the episode so far
    fell: bool  # where the episode ended
    success: bool  # where the episode ended
    next_obs: np.ndarray  # (87,) float32 observation to act on: that of a fresh start after an end
    next_reading: Reading  # (3,) each, likewise


class Lane:
    """One official environment of one task, with the 50 Hz control loop around it."""

    def __init__(self, task: str, seed_key: tuple[int, ...], start_noise_rad: float):
        """Episode number e starts from `episode_seed(*seed_key, e)`."""
        self._task, self._seed_key, self._start_noise_rad = task, seed_key, start_noise_rad
        self._env = official.make(task)

    def start(self, episode: int, actions: np.ndarray) -> tuple[np.ndarray, Reading]:
        """Begin an episode and play `actions` (n, 12) in it; observation and reading after the last."""
        self._reset(episode)
        for action in actions:
            self._hold(action)
        self._now = self._observe(), self._read()
        return self._now

    def step(self, action: np.ndarray) -> LaneStep:
        """Play one action (12,) in [-1, 1]."""
        terminated, truncated, diverged = self._hold(action)
        ended, length, score, fell, success = terminated or truncated or diverged, self._physics_steps, 0.0, False, False
        # What a diverged simulation says must not reach the learner either: it keeps the last good numbers.
        obs, reading = self._now if diverged else (self._observe(), self._read())
        if ended and not diverged:
            score = float(sum(score_terms(self._task, self._info["reward_terms"]).values()))
            fell = bool(self._env.unwrapped.robots[0].is_terminated())
            success = bool(self._info["success"])
        self._now = obs, reading
        if ended:
            self._reset(self._episode + 1)
            self._now = self._observe(), self._read()
        return LaneStep(
            obs,
            reading,
            terminated or diverged,
            truncated and not diverged,
            score,
            length,
            fell,
            success,
            *self._now,
        )

    def validate(self, policy: Policy, seeds: list[int], start_noise_rad: float) -> list[EpisodeResult]:
        """Play and score whole episodes; the running one is lost, `start` brings it back."""
        return [official.run_episode(self._env, self._task, policy, seed, start_noise_rad) for seed in seeds]

    def _reset(self, episode: int) -> None:
        self._episode, self._physics_steps = episode, 0
        seed = episode_seed(*self._seed_key, episode)
        self._obs, self._info = official.reset(self._env, seed, self._start_noise_rad)

    def _joints(self) -> tuple[np.ndarray, np.ndarray]:
        """Joint positions and velocities (12,), which lead the official observation."""
        return self._obs[: c.NUM_JOINTS], self._obs[c.NUM_JOINTS : 2 * c.NUM_JOINTS]

    def _hold(self, action: np.ndarray) -> tuple[bool, bool, bool]:
        """Ten physics steps, fewer if the episode ends: terminated, truncated, diverged.

        On NaN or huge numbers MuJoCo itself starts again, from the model's zero pose and time zero, and the
        official environment plays on. A learner must not see that jump: we end the episode there.
        """
        data = self._env.unwrapped.sim.data._data
        target_rad = pd.joint_target_rad(action)
        for _ in range(c.PHYSICS_STEPS_PER_ACTION):
            torque_nm = pd.torque_nm(target_rad, *self._joints(), np)
            self._obs, _, terminated, truncated, self._info = self._env.step(torque_nm)
            self._physics_steps += 1
            if any(data.warning[kind].number for kind in _DIVERGED):
                return False, False, True
            if terminated or truncated:
                break
        return terminated, truncated and not terminated, False

    def _observe(self) -> np.ndarray:
        return observe(*self._joints(), self._info, np).astype(np.float32)

    def _read(self) -> Reading:
        data = self._env.unwrapped.sim.data
        robot_pos_w = c.GOAL_POS_W[0] - self._info["goal_team_0_rel_robot"]
        aims_at_goal = self._task == "goalie"  # its `target` is the robot itself
        return Reading(
            robot_pos_w=robot_pos_w,
            ball_centre_pos_w=data.get_geom_xpos("ball").copy(),
            ball_centre_vel_w=data.get_geom_xvelp("ball").copy(),
            aim_pos_w=c.GOAL_POS_W[0] if aims_at_goal else robot_pos_w + self._info["target_xpos_rel_robot"],
        )


class OfficialLanes:
    """B lanes in B processes. The tasks take turns: lane i plays task i modulo three.

    This is the seam between fine-tuning and its environment: another backend needs `start`, `send`,
    `receive`, `validate`, `state`, `restore`, `task` and `close`.
    """

    def __init__(self, num_lanes: int, seed: int, start_noise_rad: float):
        """Start the processes. Lane i's episode e starts from `episode_seed(seed, i, e)`."""
        self.task = [c.TASKS[lane % c.NUM_TASKS] for lane in range(num_lanes)]
        self._episode = np.zeros(num_lanes, dtype=np.int64)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(num_lanes)]  # of the running episodes
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        with official._lean_children():
            for lane, task in enumerate(self.task):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(there, task, (seed, lane), start_noise_rad), daemon=True
                )
                process.start()
                there.close()
                self._connections.append(here)
                self._processes.append(process)

    def __enter__(self) -> "OfficialLanes":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; nothing is lost that `state` does not hold."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def start(self) -> tuple[np.ndarray, Reading]:
        """Begin every lane's first episode: observations (B, 87) and readings."""
        return self._start()

    def send(self, actions: np.ndarray) -> None:
        """Set actions (B, 12) going; the caller may compute until it needs `receive`."""
        for lane, action in enumerate(actions):
            self._actions[lane].append(action.copy())
            self._connections[lane].send(("step", action))

    def receive(self) -> LaneStep:
        """What the actions of the last `send` brought, each entry with a leading axis B."""
        steps = [self._answer(lane) for lane in range(len(self.task))]
        batch = _stack(steps)
        for lane in np.flatnonzero(batch.terminated | batch.truncated):
            self._episode[lane] += 1
            self._actions[lane] = []
        return batch

    def validate(self, policy: Policy, seeds: list[int], start_noise_rad: float) -> list[EpisodeResult]:
        """Score a policy, (87,) -> (12,), on every seed in every task; results by task, then seed.

        Every lane is afterwards where it was: its running episode is played again.
        """
        lanes_of = {task: [i for i, other in enumerate(self.task) if other == task] for task in c.TASKS}
        for lanes in lanes_of.values():
            for share, lane in enumerate(lanes):
                self._connections[lane].send(("validate", policy, seeds[share :: len(lanes)], start_noise_rad))
        results = [result for lane in range(len(self.task)) for result in self._answer(lane)]
        self._start()
        order = {(task, seed): i for i, (task, seed) in enumerate((t, s) for t in c.TASKS for s in seeds)}
        return sorted(results, key=lambda result: order[result.task, result.seed])

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs: episode numbers (B,), lengths (B,) and actions (B, 500, 12) so far."""
        actions = np.zeros((len(self.task), c.EPISODE_ACTIONS, c.NUM_JOINTS), np.float32)
        for lane, played in enumerate(self._actions):
            if played:
                actions[lane, : len(played)] = played
        return {
            "lane_episode": self._episode.copy(),
            "lane_length": np.array([len(played) for played in self._actions]),
            "lane_actions": actions,
        }

    def restore(self, state: dict[str, np.ndarray]) -> tuple[np.ndarray, Reading]:
        """Bring every lane to where `state` was taken: observations (B, 87) and readings."""
        self._episode = state["lane_episode"].copy()
        self._actions = [
            list(actions[:length]) for actions, length in zip(state["lane_actions"], state["lane_length"])
        ]
        return self._start()

    def _start(self) -> tuple[np.ndarray, Reading]:
        for lane, played in enumerate(self._actions):
            actions = np.array(played, np.float32).reshape(-1, c.NUM_JOINTS)
            self._connections[lane].send(("start", int(self._episode[lane]), actions))
        answers = [self._answer(lane) for lane in range(len(self.task))]
        return np.stack([obs for obs, _ in answers]), _stack([reading for _, reading in answers])

    def _answer(self, lane: int):
        try:
            answer = self._connections[lane].recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(
                f"the process of lane {lane} ({self.task[lane]}) died, often for lack of memory: use fewer lanes"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, _Failure):
            raise RuntimeError(f"lane {lane} ({self.task[lane]}) failed:\n{answer.traceback}")
        return answer


def episode_seed(*key: int) -> int:
    """The seed of an episode from a key such as (run, lane, episode); the platform's own loads slowly."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def check_num_lanes(num_lanes: int) -> None:
    """Raise unless every task gets the same number of lanes."""
    if num_lanes < c.NUM_TASKS or num_lanes % c.NUM_TASKS:
        raise UserError(f"{num_lanes} lanes cannot be shared by {c.NUM_TASKS} tasks: use a multiple of {c.NUM_TASKS}")


def real_observations(policy: Policy, per_task: int, seed: int, start_noise_rad: float) -> np.ndarray:
    """Observations (3 * per_task, 87) that a policy meets in the three official environments."""
    met = np.zeros((c.NUM_TASKS, per_task, OBS_SIZE), np.float32)
    for row, task in zip(met, c.TASKS):
        lane = Lane(task, (seed,), start_noise_rad)
        obs, _ = lane.start(0, np.zeros((0, c.NUM_JOINTS)))
        for i in range(per_task):
            row[i] = obs
            obs = lane.step(policy(obs)).next_obs
    return met.reshape(-1, OBS_SIZE)


class _Failure(NamedTuple):
    """An unexpected error in a lane's process."""

    traceback: str


def _stack(entries: list) -> NamedTuple:
    """A batch of equal NamedTuples: the same one, every entry with a leading axis."""
    return type(entries[0])(
        *(_stack(list(column)) if isinstance(column[0], tuple) else np.stack(column) for column in zip(*entries))
    )


def _serve(connection: Connection, task: str, seed_key: tuple[int, ...], start_noise_rad: float) -> None:
    """A lane's process: answer calls of `Lane` by name until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    try:
        lane = Lane(task, seed_key, start_noise_rad)
        while True:
            name, *arguments = connection.recv()
            connection.send(getattr(lane, name)(*arguments))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(_Failure(traceback.format_exc()))
