"""Whole episodes in the pre-training scene, from official starts: what the official environment is held against.

Seeds, joint noise, policy and 50 Hz control are those of `envs/official.py`; scene and rules those of
pre-training under native MuJoCo: keeper and defenders by geometry, ends and touches noticed once an action.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, scene
from booster_soccer.envs.cores import usable_cores
from booster_soccer.envs.native_engine import NativeEngine
from booster_soccer.envs.official import Episode, Policy
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.tasks import StartMix, Tasks, TaskState, View
from booster_soccer.rewards.official import official_score
from booster_soccer.rollout.episode import observe


class Behaviour(NamedTuple):
    """How episodes went, each (N,) float64, in the order in which they were asked for."""

    steps: np.ndarray  # physics steps
    fell: np.ndarray  # 0 or 1
    walked_m: np.ndarray  # horizontal path of the imu, sampled at every action
    touches: np.ndarray  # robot-ball contacts; here those in successive actions are one
    score: np.ndarray  # official score


def run_episodes(policy: Policy, episodes: list[Episode], start_noise_rad: float = 0.0) -> Behaviour:
    """Play all episodes at once. The policy takes (N, 87) float32; a lane whose physics breaks scores NaN."""
    tasks = Tasks()
    engine = NativeEngine(len(episodes), num_threads=usable_cores())
    qpos, state = official_starts(tasks, episodes, start_noise_rad)
    engine.reset(np.arange(len(episodes)), qpos, np.zeros((len(episodes), tasks.nv)))

    def advance(view: View, before: TaskState, action: jax.Array):
        after = tasks.count_touch(view, before, action)
        readings, events = tasks.read(view), tasks.events(view, after)
        score = official_score(tasks.official_terms(readings, after, events), after.task, jnp)
        return after, (observe(tasks, view, after), readings.imu_pos_w[:2], events, score)

    advance_all = jax.jit(jax.vmap(advance))
    obs = jax.jit(jax.vmap(lambda v, s: observe(tasks, v, s)))(engine.view(), state)
    imu_xy = qpos[:, tasks.address.root_q][:, :2]
    walked_m, actions_played, alive = np.zeros(len(episodes)), 0, np.ones(len(episodes), bool)
    ended = Behaviour(*(np.zeros(len(episodes)) for _ in Behaviour._fields))
    while alive.any():
        # Lanes that have ended are stepped too; they stand, so that their physics stays sound.
        action = np.where(alive[:, None], policy(np.asarray(obs)), 0.0).astype(np.float32)
        engine.step(joint_target_rad(action))
        state, seen = advance_all(engine.view(), state, action)
        obs, new_imu_xy, events, score = jax.device_get(seen)
        actions_played += 1
        walked_m += np.hypot(*(new_imu_xy - imu_xy).T)
        imu_xy = new_imu_xy
        ends = alive & (events.terminated | (actions_played >= c.EPISODE_ACTIONS))
        score = np.where(events.diverged, np.nan, score)
        steps = np.full(len(episodes), actions_played * c.PHYSICS_STEPS_PER_ACTION)
        now = Behaviour(steps, events.fallen, walked_m, np.asarray(state.hits), score)
        for values, new in zip(ended, now):
            values[ends] = new[ends]
        alive &= ~ends
    engine.close()
    return ended


def official_starts(tasks: Tasks, episodes: list[Episode], start_noise_rad: float) -> tuple[np.ndarray, TaskState]:
    """The official starts of episodes in our scene: qpos (N, nq) and the tasks' states (N, ...)."""
    envs = {task: official.make(task) for task in {episode.task for episode in episodes}}
    ours, qpos, targets, defenders = tasks.address, np.zeros((len(episodes), tasks.nq)), [], []
    for row, (task, seed) in zip(qpos, episodes):
        _, info = official.reset(envs[task], seed, start_noise_rad)
        base = envs[task].unwrapped
        model, data = base.sim.model._model, base.sim.data._data
        theirs = scene.official_addresses(model)
        for name in ("ball_q", "root_q", "joint_q"):
            row[getattr(ours, name)] = data.qpos[getattr(theirs, name)]
        has_target = np.any(info["target_xpos_rel_robot"])
        targets.append(info["target_xpos_rel_robot"] + data.site(base._root_site).xpos * has_target)
        defenders.append(np.reshape(info["defender_xpos"], (c.NUM_DEFENDERS, 3)))
    for env in envs.values():
        env.close()
    _, _, fresh = jax.jit(lambda key: tasks.reset(key, StartMix()))(jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(episodes), *leaf.shape)), fresh)
    return qpos, state._replace(
        task=jnp.array([c.TASKS.index(task) for task, _ in episodes], jnp.int32),
        target_pos_w=jnp.array(np.array(targets), jnp.float32),
        defender_pos_w=jnp.array(np.array(defenders), jnp.float32),
    )
