"""Dense rewards of pre-training: one function per term, one weight per term.

Terms are per action (50 Hz). The heart is `shot`: the *change* of the ball's value, an estimate of the
official score its motion will bring if nobody touches it again. Paid as a difference, a kick is rewarded
once, when it happens; dribbling slowly earns nothing extra, and a bad touch costs at once instead of
seconds later. Everything is shaped on the ball's centre: the official quantities use a site that turns
with the ball, whose speed swings between 0 and twice the centre's.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp

from booster_soccer.envs import constants as c
from booster_soccer.envs.pd import joint_target_rad, torque_nm
from booster_soccer.envs.tasks import Events, Readings, TaskState
from booster_soccer.preprocess.observation import projected_gravity, yaw_rad


@dataclass(frozen=True)
class DenseWeights:
    """Weight of each term; the names are the terms'.

    Those that teach football were tried one after the other (docs/experiments.md). `face_ball`, `alive` and the costs
    from `tilt` to `joint_vel` are of the size that the trial's were, small beside a step toward the ball; not varied.
    """

    shot: float = 2.0  # per point of expected official score gained
    approach: float = 0.2  # per action at 1 m/s toward the kicking position, new ground only
    dribble: float = 0.1  # per action at 1 m/s of the ball toward the target, new ground only
    follow: float = 0.1  # per action at the kicking position, falling off over a metre; target task only
    face_ball: float = 0.03  # per action, cosine
    alive: float = 0.05
    tilt: float = -0.2  # squared horizontal part of gravity in the body
    trunk_angvel: float = -0.005  # squared roll and pitch rate
    torque: float = -0.015  # sum of squared torques over limits
    action_rate: float = -0.005  # sum of squared action differences
    joint_vel: float = -0.00001  # sum of squared joint velocities
    fallen: float = -10.0  # once; less at first (rollout/collect.py)
    ball_done: float = 12.0  # once, where the task is over without a fall: what standing on would have earned
    success: float = 8.0  # once


_GRAVITY_M_S2 = 9.81
_ROLLING_M_S = 0.3  # ball centre; slower, it has only been brushed
_DETOUR_M = 1.2  # extra distance for standing at 90 degrees to the line from ball to aim; twice that opposite


class Transition(NamedTuple):
    """What the terms may look at."""

    readings: Readings
    before: TaskState  # before the action
    after: TaskState  # after it
    events: Events
    action: jax.Array  # (12,)
    shot_value: jax.Array  # () value of the ball's motion now


def _soft(margin_m: jax.Array, width_m: float) -> jax.Array:
    """Probability-like share of a margin: 0.5 at zero, near 1 at a few widths."""
    return jax.nn.sigmoid(margin_m / width_m)


def aim_point_w(state: TaskState) -> jax.Array:
    """Where the ball should go (3,): the goal's centre in penalty kicks, else the target."""
    return jnp.where(state.task == c.TARGET, state.target_pos_w, jnp.asarray(c.GOAL_POS_W[0]))


def penalty_shot_value(r: Readings, state: TaskState) -> jax.Array:
    """Expected score of the ball's motion in a penalty kick: speed at 1.5 per m/s, and where it will arrive."""
    x, y, z = r.ball_center_pos_w
    vx, vy, vz = r.ball_center_vel_w
    toward = -vx
    # Where it will end counts in full from 3.3 m/s: earlier, the -3 beside the goal would make a weak first
    # kick worse than none, and no kick would ever be tried.
    moving = jnp.clip((toward - 0.3) / 3.0, 0.0, 1.0)
    time_s = jnp.clip((x + c.FIELD_HALF_LENGTH_M - c.BALL_RADIUS_M) / jnp.maximum(toward, 0.3), 0.0, 8.0)
    y_cross = y + vy * time_s
    post_margin = c.GOAL_HALF_WIDTH_M - c.GOAL_POST_RADIUS_M - c.BALL_RADIUS_M - jnp.abs(y_cross)
    # Goalie: the keeper's place when the ball arrives is known, it is a function of time only.
    arrival_s = state.action_count * c.ACTION_DT_S + time_s
    keeper_y = c.KEEPER_AMPLITUDE_M * jnp.sin(2 * jnp.pi * c.KEEPER_FREQUENCY_HZ * arrival_s)
    keeper_margin = jnp.abs(y_cross - keeper_y) - c.KEEPER_HALF_WIDTH_LOW_M - c.BALL_RADIUS_M
    inside = _soft(post_margin, 0.1)
    past_keeper = _soft(keeper_margin, 0.1)
    speed_score = 1.5 * jnp.clip(toward, -1.0, 10.0)
    blocked = -0.5 - (1.0 - c.BLOCKED_SPEED_SHARE) * speed_score
    goalie = 2.5 * inside * past_keeper + blocked * inside * (1 - past_keeper) - 3.0 * (1 - inside)
    # Obstacle: a rolling ball must end on a defender, not past the line beside them (-3).
    z_cross = jnp.maximum(z + vz * time_s - 0.5 * _GRAVITY_M_S2 * time_s**2, c.BALL_RADIUS_M)
    window = jnp.stack([y_cross, z_cross]) - state.target_pos_w[1:]
    in_window = jnp.exp(-jnp.sum(window**2) / 0.35**2)
    reach = c.DEFENDER_HALF_WIDTH_M + c.BALL_RADIUS_M
    on_defender = _soft(jnp.max(reach - jnp.abs(y_cross - state.defender_pos_w[:, 1])), 0.1)
    rolling = blocked * on_defender - 3.0 * (1 - on_defender)
    obstacle = 2.5 * in_window + (1 - in_window) * rolling
    where_it_ends = jnp.where(state.task == c.OBSTACLE, obstacle, goalie)
    return speed_score + moving * where_it_ends


class TargetPath(NamedTuple):
    """What the ball's motion promises in the target task; it does not slow down. Each (); shares in [0, 1]."""

    speed_m_s: jax.Array  # horizontal
    cosine: jax.Array  # of the angle between its motion and the way to the target
    miss_m: jax.Array  # by how much the line of its motion misses the target
    ahead: jax.Array  # the target lies before it
    hit: jax.Array  # how nearly it hits
    in_time: jax.Array  # it gets there before the time is up
    lost: jax.Array  # it leaves the field before the time is up


def target_path(r: Readings, state: TaskState) -> TargetPath:
    """Where the ball is going."""
    to_target = (state.target_pos_w - r.ball_center_pos_w)[:2]
    velocity = r.ball_center_vel_w[:2]
    speed = jnp.sqrt(jnp.sum(velocity**2) + 1e-8)
    direction = velocity / speed
    along = jnp.dot(direction, to_target)
    miss_m = jnp.abs(direction[0] * to_target[1] - direction[1] * to_target[0])
    ahead = _soft(along, 0.3)
    left_s = c.EPISODE_ACTIONS * c.ACTION_DT_S - state.action_count * c.ACTION_DT_S
    half_field = jnp.array([c.FIELD_HALF_LENGTH_M, c.FIELD_HALF_WIDTH_M])
    room_m = jnp.maximum(half_field - jnp.sign(velocity) * r.ball_center_pos_w[:2], 0.0)
    out_s = jnp.min(room_m / jnp.maximum(jnp.abs(velocity), 1e-3))
    return TargetPath(
        speed_m_s=speed,
        cosine=along / jnp.sqrt(jnp.sum(to_target**2) + 1e-8),
        miss_m=miss_m,
        ahead=ahead,
        hit=ahead * 0.5 * (jnp.exp(-((miss_m / 0.5) ** 2)) + jnp.exp(-((miss_m / 1.5) ** 2))),
        in_time=_soft(left_s - along / speed, 0.3),
        lost=_soft(left_s - out_s, 0.3),
    )


def target_shot_value(r: Readings, state: TaskState) -> jax.Array:
    """Expected score of the ball's motion in the target task, times three so that it weighs beside a kick.

    By how much the line of its motion misses the target decides; the angle teaches from far off. A slow ball may
    be met again, and is still in the field when time is up: a lost one costs 1.
    """
    path = target_path(r, state)
    near = 0.5 * path.ahead * jnp.exp(-path.miss_m / 2.0) + 0.25 * (1.0 + path.cosine)
    moving = jnp.clip(path.speed_m_s - 0.2, 0.0, 1.0)
    return 3.0 * moving * (2.0 * path.hit * path.in_time + 0.7 * near - path.lost * (1.0 - path.hit))


def shot_value(r: Readings, state: TaskState) -> jax.Array:
    """Value of the ball's motion, in points of official score."""
    return jnp.where(state.task == c.TARGET, target_shot_value(r, state), penalty_shot_value(r, state))


def approach_distance_m(r: Readings, state: TaskState) -> jax.Array:
    """Distance to the ball plus a detour for standing on its wrong side."""
    to_ball = (r.ball_center_pos_w - r.imu_pos_w)[:2]
    to_aim = (aim_point_w(state) - r.ball_center_pos_w)[:2]
    distance = jnp.sqrt(jnp.sum(to_ball**2) + 1e-8)
    cosine = jnp.dot(to_ball, to_aim) / (distance * jnp.sqrt(jnp.sum(to_aim**2) + 1e-8))
    return distance + _DETOUR_M * (1.0 - cosine)


def aim_distance_m(r: Readings, state: TaskState) -> jax.Array:
    """Horizontal distance of the ball to where it should go."""
    to_aim = (aim_point_w(state) - r.ball_center_pos_w)[:2]
    return jnp.sqrt(jnp.sum(to_aim**2) + 1e-8)


def _new_ground_m_s(before_m: jax.Array, after_m: jax.Array) -> jax.Array:
    """By how much a least distance has shrunk, as a speed clipped at 1 m/s; it is below 0 before the first action."""
    return jnp.where(before_m < 0.0, 0.0, jnp.minimum((before_m - after_m) / c.ACTION_DT_S, 1.0))


def _shot(t: Transition) -> jax.Array:
    return t.shot_value - t.before.shot_value


def _ball_rolls(t: Transition) -> jax.Array:
    return jnp.sum(t.readings.ball_center_vel_w**2) > _ROLLING_M_S**2


def _shot_under_way(t: Transition) -> jax.Array:
    """In a penalty kick: the ball rolls, and not to a bad end. A target may need another touch."""
    return _ball_rolls(t) & (t.shot_value > 0.0) & (t.after.task != c.TARGET)


def _approach(t: Transition) -> jax.Array:
    """Progress toward the kicking position in m/s, clipped at 1, where it is nearer than ever; 0.5 while a shot
    is under way.

    Only new ground pays: a ball that rolls away costs nothing, or no first touch is ever dared, and running
    after it brings nothing, or a kick into nowhere is worth the run (docs/experiments.md, e1, e2, e7).
    """
    return jnp.where(_shot_under_way(t), 0.5, _new_ground_m_s(t.before.nearest_approach_m, t.after.nearest_approach_m))


def _dribble(t: Transition) -> jax.Array:
    """Target task: one kick hits to 12 degrees at best, a metre and a half; the ball must be brought nearer first."""
    return jnp.where(t.after.task == c.TARGET, _new_ground_m_s(t.before.nearest_aim_m, t.after.nearest_aim_m), 0.0)


def _follow(t: Transition) -> jax.Array:
    """Target task: behind the ball; or a ball that will hit, behind which nobody needs to run (and fall)."""
    path = target_path(t.readings, t.after)
    will_hit = jnp.where(_ball_rolls(t), path.hit * path.in_time, 0.0)
    behind = jnp.exp(-approach_distance_m(t.readings, t.after))
    return jnp.where(t.after.task == c.TARGET, jnp.maximum(behind, will_hit), 0.0)


def _face_ball(t: Transition) -> jax.Array:
    to_ball = (t.readings.ball_center_pos_w - t.readings.imu_pos_w)[:2]
    bearing = jnp.arctan2(to_ball[1], to_ball[0]) - yaw_rad(t.readings.imu_quat_wxyz, jnp)
    return jnp.where(_shot_under_way(t), 0.5, jnp.cos(bearing))


def _alive(t: Transition) -> jax.Array:
    return jnp.array(1.0)


def _tilt(t: Transition) -> jax.Array:
    return jnp.sum(projected_gravity(t.readings.imu_quat_wxyz, jnp)[:2] ** 2)


def _trunk_angvel(t: Transition) -> jax.Array:
    return jnp.sum(t.readings.gyro_b[:2] ** 2)


def _torque(t: Transition) -> jax.Array:
    torque = torque_nm(joint_target_rad(t.action), t.readings.joint_pos, t.readings.joint_vel, jnp)
    return jnp.sum((torque / jnp.asarray(c.TORQUE_LIMIT_NM)) ** 2)


def _action_rate(t: Transition) -> jax.Array:
    return jnp.sum((t.action - t.before.prev_action) ** 2)


def _joint_vel(t: Transition) -> jax.Array:
    return jnp.sum(t.readings.joint_vel**2)


def _fallen(t: Transition) -> jax.Array:
    return t.events.fallen | t.events.diverged


def _ball_done(t: Transition) -> jax.Array:
    lost = t.events.out_of_field & (t.after.task == c.TARGET)  # in penalty kicks the shot's value has said it
    return t.events.terminated & ~_fallen(t) & ~lost


def _success(t: Transition) -> jax.Array:
    return t.events.success


TERMS = {
    "shot": _shot,
    "approach": _approach,
    "dribble": _dribble,
    "follow": _follow,
    "face_ball": _face_ball,
    "alive": _alive,
    "tilt": _tilt,
    "trunk_angvel": _trunk_angvel,
    "torque": _torque,
    "action_rate": _action_rate,
    "joint_vel": _joint_vel,
    "fallen": _fallen,
    "ball_done": _ball_done,
    "success": _success,
}
assert set(TERMS) == {field.name for field in fields(DenseWeights)}


def dense_terms(t: Transition) -> dict[str, jax.Array]:
    """Every raw (unweighted) term, each ()."""
    return {name: jnp.asarray(term(t), jnp.float32) for name, term in TERMS.items()}


def dense_reward(raw_terms: dict[str, jax.Array], weights: DenseWeights) -> jax.Array:
    """The weighted sum, ()."""
    return sum(getattr(weights, name) * value for name, value in raw_terms.items())
