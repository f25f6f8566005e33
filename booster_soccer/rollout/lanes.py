"""Lanes: batches of episodes at 50 Hz behind one protocol, in the official environment, its twin, and our scene.

A lane holds an action for ten physics steps. `OfficialLanes` is the platform's own environment, a batch of
one; `TwinLanes` gives the same numbers for many lanes; `SceneLanes` plays the official starts in the
pre-training scene. `rollout/play.py` plays whole episodes on them, `rollout/workers.py` fine-tuning's.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from booster_soccer.cores import usable_cores
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene, situation
from booster_soccer.envs.official import Ball
from booster_soccer.envs.situation import Events, Situation, aim_pos_w
from booster_soccer.envs.twin import TwinEnv
from booster_soccer.errors import UserError
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.official import WEIGHTS, official_score, score_terms


class Sight(NamedTuple):
    """Where lanes stand; arrays of one's own."""

    steps: np.ndarray  # (B,) physics steps of the running episode
    imu_pos_w: np.ndarray  # (B, 3) m
    ball: Ball  # each (B, 3)
    aim_pos_w: np.ndarray  # (B, 3) m: the goal's centre, window or target


def _has_aim(tasks: list[str]) -> np.ndarray:
    """(B,) bool: of lanes with a window or target."""
    return np.array([task in c.TARGET_SITE for task in tasks])


class Outcome(NamedTuple):
    """What the episode of one lane came to."""

    score: float  # official score
    terms: dict[str, float]  # weighted; their sum is the score
    fell: bool
    success: bool
    touches: int  # robot-ball contacts
    ball_height_max_m: float  # of the ball's centre
    shot: Ball | None  # the ball when it was last released, or at the end if still touched, each (3,)


class Lanes(Protocol):
    """B lanes. What a lane that has ended holds is to be read before the next `hold` or `reset`."""

    tasks: list[str]  # of each lane

    def reset(self, lanes: Sequence[int], seeds: Sequence[int], start_noise_rad: float) -> None:
        """Start an episode in each of some lanes, from the official start of its seed."""

    def hold(self, action: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """An action (B, 12) in [-1, 1] for ten physics steps, fewer where the episode ends; None is zero torque.

        Terminated and truncated, (B,) bool; ended lanes ignore their actions.
        """

    def observe(self) -> np.ndarray:
        """The policy's observations (B, 87) float32."""

    def look(self) -> Sight:
        """Where the lanes stand."""

    def situation(self) -> Situation:
        """What the dense reward looks at, each (B, ...)."""

    def events(self, diverged: np.ndarray) -> Events:
        """What ended the lanes' episodes, each (B,); `diverged` (B,) is the caller's judgement."""

    def outcome(self, lane: int) -> Outcome:
        """Score and fate of a lane that has just ended."""

    def close(self) -> None:
        """Give back threads and environments."""


class _PlatformLanes:
    """Lanes of one task in the official environment or its twin."""

    def __init__(self, task: str, env: official.OfficialEnv | TwinEnv):
        self.tasks, self.env = [task] * env.num_lanes, env

    def reset(self, lanes: Sequence[int], seeds: Sequence[int], start_noise_rad: float) -> None:
        self.obs, self.info = self.env.reset(seeds, start_noise_rad, np.asarray(lanes, int))

    def hold(self, action: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if action is None:
            nothing_nm = np.zeros((len(self.tasks), c.NUM_JOINTS))
            step = self.env.step_torque(nothing_nm, c.PHYSICS_STEPS_PER_ACTION)
        else:
            step = self.env.step_action(action)
        self.obs, self.info, self.raw_terms = step.obs, step.info, step.reward_terms
        return step.terminated, step.truncated

    def observe(self) -> np.ndarray:
        return Preprocessor().modify_state(self.obs, self.info)

    def look(self) -> Sight:
        env, imu_pos_w = self.env, self.env.imu_pos_w.copy()
        aim_w = aim_pos_w(_has_aim(self.tasks), imu_pos_w + self.info["target_xpos_rel_robot"], np)
        return Sight(env.steps.copy(), imu_pos_w, Ball(*(vector_w.copy() for vector_w in env.ball)), aim_w)

    def situation(self) -> Situation:
        ball = self.env.ball
        return situation.from_official(self.obs, self.info, ball.centre_pos_w, ball.centre_vel_w, self.env.steps)

    def events(self, diverged: np.ndarray) -> Events:
        return situation.official_events(self.situation(), self.info, self.raw_terms, diverged)

    def outcome(self, lane: int) -> Outcome:
        env = self.env
        terms = score_terms(self.tasks[lane], {name: values[lane] for name, values in self.raw_terms.items()})
        fell, success = not env.imu_pos_w[lane, 2] > c.FALL_HEIGHT_M, bool(self.info["success"][lane])
        shot = Ball(*(vector_w[lane].copy() for vector_w in env.shot)) if env.touches[lane] else None
        of_ball = int(env.touches[lane]), float(env.ball_height_max_m[lane]), shot
        return Outcome(sum(terms.values()), terms, fell, success, *of_ball)

    def close(self) -> None:
        self.env.close()


class OfficialLanes(_PlatformLanes):
    """One lane of the official environment."""

    def __init__(self, task: str, env: gym.Env | None = None, hold_steps: int = c.PHYSICS_STEPS_PER_ACTION):
        """`env`: instead of a new one, for example with a wrapper; `hold_steps`: physics steps an action."""
        super().__init__(task, official.OfficialEnv(task, env, hold_steps))


class TwinLanes(_PlatformLanes):
    """Lanes of one task in the official environment's twin."""

    env: TwinEnv

    def __init__(self, task: str, num_lanes: int, num_threads: int = 1):
        super().__init__(task, TwinEnv(task, num_lanes, num_threads))


class SceneLanes:
    """Lanes of the pre-training scene under native MuJoCo; the tasks take turns: lane i plays task i modulo three.

    Starts are the official ones; keeper and defenders are geometry, and ends, touches and the ball are seen
    once an action. A lane whose physics breaks scores NaN. Imports JAX, when it is made.
    """

    def __init__(self, num_lanes: int, num_threads: int | None = None):
        import jax

        from booster_soccer.envs.native_engine import NativeEngine
        from booster_soccer.envs.tasks import StartMix, Tasks
        from booster_soccer.rollout import episode

        self.tasks = [c.TASKS[lane % c.NUM_TASKS] for lane in range(num_lanes)]
        self._rules, self._jax = Tasks(), jax
        self._engine = NativeEngine(num_lanes, num_threads=num_threads or usable_cores())
        self._official = {task: official.make(task) for task in set(self.tasks)}
        self._observe_lane = lambda view, state: episode.observe(self._rules, view, state)
        self._observe = jax.jit(jax.vmap(self._observe_lane))
        self._situation = jax.jit(jax.vmap(self._rules.situation))
        self._advance = jax.jit(jax.vmap(self._advance_lane))
        # Every lane stands somewhere until it is reset, so that its physics is sound.
        qpos, qvel, fresh = jax.jit(lambda key: self._rules.reset(key, StartMix()))(jax.random.key(0))
        self._engine.reset(np.arange(num_lanes), *(np.tile(values, (num_lanes, 1)) for values in (qpos, qvel)))
        self._fresh = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], num_lanes, axis=0), fresh)
        self._state = jax.tree.map(np.copy, self._fresh)
        self._alive = np.zeros(num_lanes, bool)
        self._imu_pos_w = np.zeros((num_lanes, 3))
        self._ball = Ball(*np.zeros((4, num_lanes, 3)))
        self._shot = Ball(*np.zeros((4, num_lanes, 3)))
        self._ball_height_max_m = np.zeros(num_lanes)

    def _advance_lane(self, view, before, action):
        rules = self._rules
        after = rules.count_touch(view, before, action)
        r, events = rules.read(view), rules.events(view, after)
        raw = rules.official_terms(r, after, events)
        ball = Ball(r.ball_center_pos_w, r.ball_center_vel_w, r.ball_site_pos_w, r.ball_site_vel_w)
        score = official_score(raw, after.task, self._jax.numpy)
        return after, self._observe_lane(view, after), r.imu_pos_w, ball, events, raw, score

    def reset(self, lanes: Sequence[int], seeds: Sequence[int], start_noise_rad: float) -> None:
        address = self._rules.address
        state = self._jax.tree.map(np.array, self._state)
        for leaf, fresh in zip(self._jax.tree.leaves(state), self._jax.tree.leaves(self._fresh), strict=True):
            leaf[list(lanes)] = fresh[list(lanes)]
        qpos = np.zeros((len(lanes), self._rules.nq))
        for row, lane, seed in zip(qpos, lanes, seeds, strict=True):
            task = self.tasks[lane]
            _, info = official.reset(self._official[task], seed, start_noise_rad)
            base = self._official[task].unwrapped
            theirs = scene.official_addresses(base.sim.model._model)
            for name in ("ball_q", "root_q", "joint_q"):
                row[getattr(address, name)] = base.sim.data._data.qpos[getattr(theirs, name)]
            target_rel_w = info["target_xpos_rel_robot"]
            imu_pos_w = base.sim.data._data.site(base._root_site).xpos
            state.task[lane] = c.TASKS.index(task)
            state.target_pos_w[lane] = target_rel_w + imu_pos_w * np.any(target_rel_w)  # the goalie task has none
            state.defender_pos_w[lane] = np.reshape(info["defender_xpos"], (c.NUM_DEFENDERS, 3))
        self._engine.reset(np.asarray(lanes, int), qpos, np.zeros((len(lanes), self._rules.nv)))
        self._state, self._alive[lanes], self._ball_height_max_m[lanes] = state, True, 0.0
        self._obs = np.array(self._observe(self._engine.view(), state))
        self._imu_pos_w = np.array(self._imu_pos_w, float)
        self._imu_pos_w[lanes] = qpos[:, address.root_q][:, :3]
        self._ball.centre_pos_w[lanes] = qpos[:, address.ball_q][:, :3] + [0.0, 0.0, c.BALL_RADIUS_M]

    def hold(self, action: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if action is None:
            raise UserError("our scene has no zero torque: its PD layer always acts; give a policy")
        # Lanes that have ended are stepped too; they stand, so that their physics stays sound.
        action = np.where(self._alive[:, None], action, 0.0).astype(np.float32)
        self._engine.step(pd.joint_target_rad(action))
        was_touching = self._state.in_contact
        after, *seen = self._jax.device_get(self._advance(self._engine.view(), self._state, action))
        self._obs, self._imu_pos_w, ball, self._events, self._raw_terms, self._score = seen
        self._state, self._ball = after, Ball(*(np.array(vector_w, float) for vector_w in ball))
        self._ball_height_max_m = np.fmax(self._ball_height_max_m, self._ball.centre_pos_w[:, 2])
        for kept, now in zip(self._shot, self._ball):
            kept[...] = np.where((was_touching | after.in_contact)[:, None], now, kept)
        terminated, truncated = self._events.terminated, after.action_count >= c.EPISODE_ACTIONS
        self._alive &= ~(terminated | truncated)
        return terminated, truncated & ~terminated

    def observe(self) -> np.ndarray:
        return self._obs

    def look(self) -> Sight:
        aim_w = aim_pos_w(_has_aim(self.tasks), self._state.target_pos_w, np)
        steps = np.asarray(self._state.action_count) * c.PHYSICS_STEPS_PER_ACTION
        return Sight(steps, self._imu_pos_w.copy(), Ball(*(vector_w.copy() for vector_w in self._ball)), aim_w)

    def situation(self) -> Situation:
        return self._jax.device_get(self._situation(self._engine.view(), self._state))

    def events(self, diverged: np.ndarray) -> Events:
        return self._events._replace(diverged=self._events.diverged | diverged)

    def outcome(self, lane: int) -> Outcome:
        events, touches = self._events, int(self._state.hits[lane])
        share = np.nan if events.diverged[lane] else 1.0
        weights = WEIGHTS[self.tasks[lane]]
        terms = {name: share * weight * float(self._raw_terms[name][lane]) for name, weight in weights.items()}
        fell, success = bool(events.fallen[lane]), bool(events.success[lane])
        shot = Ball(*(vector_w[lane].copy() for vector_w in self._shot)) if touches else None
        of_ball = touches, float(self._ball_height_max_m[lane]), shot
        return Outcome(share * float(self._score[lane]), terms, fell, success, *of_ball)

    def close(self) -> None:
        self._engine.close()
        for env in self._official.values():
            env.close()
