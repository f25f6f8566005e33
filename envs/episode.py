"""One action of one lane, after the physics: rules, rewards, end of episode. Pure, for every engine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.tasks import Tasks, TaskState, View
from rewards.dense import (
    DenseWeights,
    Transition,
    aim_distance_m,
    approach_distance_m,
    dense_reward,
    dense_terms,
    shot_value,
)


class Outcome(NamedTuple):
    """What one action brought."""

    obs: jax.Array  # (87,) the true next observation, also where the episode ended
    reward: jax.Array  # () dense
    terminated: jax.Array  # () bool: no bootstrap
    truncated: jax.Array  # () bool: time is up; bootstrap from `obs`
    dense_terms: dict[str, jax.Array]  # raw
    score: jax.Array  # () official score if the episode ended here
    fallen: jax.Array  # () bool
    success: jax.Array  # () bool
    diverged: jax.Array  # () bool: NaN or infinity, counted and reset


def _least(so_far: jax.Array, now: jax.Array) -> jax.Array:
    """The smaller one; `so_far` is below 0 before the first action."""
    return jnp.where(so_far < 0.0, now, jnp.minimum(so_far, now))


def advance(
    tasks: Tasks, view: View, before: TaskState, action: jax.Array, weights: DenseWeights, max_actions: int
) -> tuple[TaskState, Outcome]:
    """The lane's next task state and outcome, from the view after its action."""
    after = tasks.count_touch(view, before, action)
    r = tasks.read(view)
    events = tasks.events(view, after)
    value = shot_value(r, after)
    after = after._replace(
        nearest_approach_m=_least(before.nearest_approach_m, approach_distance_m(r, after)),
        nearest_aim_m=_least(before.nearest_aim_m, aim_distance_m(r, after)),
    )
    raw = dense_terms(Transition(r, before, after, events, action, value))
    reward = dense_reward(raw, weights)
    official = tasks.official_terms(r, after, events)
    terminated = events.terminated
    outcome = Outcome(
        obs=tasks.observe(view, after),
        reward=reward,
        terminated=terminated,
        truncated=(after.action_count >= max_actions) & ~terminated,
        dense_terms=raw,
        score=tasks.official_score(official, after.task),
        fallen=events.fallen,
        success=events.success,
        diverged=events.diverged,
    )
    # A diverged lane is reset; nothing of its broken numbers may reach the learner.
    bad = events.diverged

    def heal(x):
        return jnp.where(bad, jnp.zeros_like(x), x)

    outcome = outcome._replace(
        obs=heal(outcome.obs),
        reward=jnp.where(bad, weights.fallen, outcome.reward),
        score=heal(outcome.score),
        dense_terms={name: heal(x) for name, x in raw.items()},
    )
    return after._replace(shot_value=heal(value)), outcome
