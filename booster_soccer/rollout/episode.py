"""One action of one lane, after the physics: rules, rewards, end of episode. Pure, for every engine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from booster_soccer.envs import constants as c
from booster_soccer.envs.tasks import Readings, Tasks, TaskState, View
from booster_soccer.preprocess.observation import OBS_SIZE, heading_cos_sin, to_heading
from booster_soccer.preprocess.privileged import TABLE as PRIVILEGED_TABLE
from booster_soccer.rewards.dense import (
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

    critic_obs: jax.Array  # (109,) what comes next, also where the episode ended: see `critic_observation`
    reward: jax.Array  # () dense
    terminated: jax.Array  # () bool: no bootstrap
    truncated: jax.Array  # () bool: time is up; bootstrap from `critic_obs`
    dense_terms: dict[str, jax.Array]  # raw
    score: jax.Array  # () official score if the episode ended here
    fallen: jax.Array  # () bool
    success: jax.Array  # () bool
    diverged: jax.Array  # () bool: NaN or infinity, counted and reset

    @property
    def obs(self) -> jax.Array:
        """The policy's observation (..., 87)."""
        return self.critic_obs[..., :OBS_SIZE]


def privileged(r: Readings, state: TaskState) -> jax.Array:
    """The critics' additional inputs (22,), from a lane's readings and its task's state after the action."""
    cos, sin = heading_cos_sin(r.imu_quat_wxyz, jnp)

    def above_least(now_m: jax.Array, least_m: jax.Array) -> jax.Array:
        return jnp.where(least_m < 0.0, 0.0, jnp.clip(now_m - least_m, 0.0, 2.0))

    parts = {
        "ball_center_rel_site_h": to_heading(r.ball_center_pos_w - r.ball_site_pos_w, cos, sin, jnp) / c.BALL_RADIUS_M,
        "ball_center_vel_h": to_heading(r.ball_center_vel_w, cos, sin, jnp) / 2.0,
        "shot_value": state.shot_value / 5.0,
        "approach_above_least": above_least(approach_distance_m(r, state), state.nearest_approach_m),
        "aim_above_least": above_least(aim_distance_m(r, state), state.nearest_aim_m),
        "time_left": 1.0 - state.action_count / c.EPISODE_ACTIONS,
        "prev_action": state.prev_action,
    }
    return jnp.concatenate([jnp.atleast_1d(parts[row.name]) for row in PRIVILEGED_TABLE])


def critic_observation(tasks: Tasks, view: View, state: TaskState) -> jax.Array:
    """The policy's observation (87,), followed by what only the critics see (22,)."""
    return jnp.concatenate([tasks.observe(view, state), privileged(tasks.read(view), state)])


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
    after = after._replace(shot_value=jnp.where(events.diverged, 0.0, value))
    reward = dense_reward(raw, weights)
    official = tasks.official_terms(r, after, events)
    terminated = events.terminated
    outcome = Outcome(
        critic_obs=critic_observation(tasks, view, after),
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
        critic_obs=heal(outcome.critic_obs),
        reward=jnp.where(bad, weights.fallen, outcome.reward),
        score=heal(outcome.score),
        dense_terms={name: heal(x) for name, x in raw.items()},
    )
    return after, outcome
