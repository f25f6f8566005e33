"""One action of one lane of our scene, after the physics: rules, rewards, end of episode. Pure, for every engine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from booster_soccer.envs.tasks import Tasks, TaskState, View
from booster_soccer.preprocess import observation
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rewards.official import official_score
from booster_soccer.rollout import shaping


class Outcome(NamedTuple):
    """What one action brought."""

    critic_obs: jax.Array  # (109,) what comes next, also where the episode ended: see `critic_observation`
    reward: jax.Array  # () dense
    terminated: jax.Array  # () bool: no bootstrap
    truncated: jax.Array  # () bool: time is up; bootstrap from `critic_obs`
    dense_terms: dict[str, jax.Array]  # raw
    score: jax.Array  # () official score if the episode ended here
    fallen: jax.Array  # () bool
    success: jax.Array  # () bool
    diverged: jax.Array  # () bool: NaN or infinity, counted and reset


def observe(tasks: Tasks, view: View, state: TaskState) -> jax.Array:
    """The policy's observation (87,)."""
    r = tasks.read(view)
    return observation.observe(r.joint_pos_rad, r.joint_vel_rad_s, tasks.info(view, state), jnp)


def critic_observation(tasks: Tasks, view: View, state: TaskState) -> jax.Array:
    """The policy's observation (87,), followed by what only the critics see (22,)."""
    obs, situation = observe(tasks, view, state), tasks.situation(view, state)
    return shaping.critic_observation(obs, situation, state.memory, jnp)


def advance(
    tasks: Tasks, view: View, before: TaskState, action: jax.Array, weights: DenseWeights, max_actions: int
) -> tuple[TaskState, Outcome]:
    """The lane's next task state and outcome, from the view after its action."""
    after = tasks.count_touch(view, before, action)
    events = tasks.events(view, after)
    obs, situation = observe(tasks, view, after), tasks.situation(view, after)
    memory, shaped = shaping.shape(obs, situation, before.memory, events, action, weights, jnp)
    score = official_score(tasks.official_terms(tasks.read(view), after, events), after.task, jnp)
    outcome = Outcome(
        **shaped._asdict(),
        terminated=events.terminated,
        truncated=(after.action_count >= max_actions) & ~events.terminated,
        score=jnp.where(events.diverged, 0.0, score),
        fallen=events.fallen,
        success=events.success,
        diverged=events.diverged,
    )
    return after._replace(**memory._asdict()), outcome
