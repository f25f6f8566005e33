"""Dense rewards of every stage: one weight per term, one body for JAX and NumPy (`xp`).

Terms are per action (50 Hz). The heart is `shot`: the *change* of the ball's value, an estimate of the
official score its motion will bring if nobody touches it again. Paid as a difference, a kick is rewarded
once, when it happens; dribbling slowly earns nothing extra, and a bad touch costs at once instead of
seconds later. Everything is shaped on the ball's centre: the official quantities use a site that turns
with the ball, whose speed swings between 0 and twice the centre's.

Arrays have any leading axes `...`, of `envs/situation.py`'s tuples; a term is (...).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.envs.pd import joint_target_rad, torque_nm
from booster_soccer.envs.situation import Events, Memory, Situation, aim_pos_w, keeper_motion
from booster_soccer.preprocess.observation import projected_gravity, yaw_rad


@dataclass(frozen=True)
class DenseWeights:
    """Weight of each term; the names are the terms', a weight of 0 switches one off.

    Those that teach football were tried one after the other (docs/experiments.md). `face_ball`, `alive` and the costs
    from `tilt` to `joint_vel` are of the size that the trial's were, small beside a step toward the ball; not varied.
    """

    shot: float = 2.0  # per point of expected official score gained
    approach: float = 0.2  # per action at 1 m/s toward the kicking position, new ground only
    dribble: float = 0.1  # per action at 1 m/s of the ball toward the target, new ground only
    follow: float = 0.1  # per action at the kicking position, falling off over a metre; target task only
    face_ball: float = 0.03  # per action, cosine
    alive: float = 0.05  # per action
    tilt: float = -0.2  # squared horizontal part of gravity in the body
    trunk_angvel: float = -0.005  # squared roll and pitch rate
    torque: float = -0.015  # sum of squared torques over limits
    action_rate: float = -0.005  # sum of squared action differences
    joint_vel: float = -0.00001  # sum of squared joint velocities
    fallen: float = -10.0  # once; less at first (rollout/collect.py)
    ball_done: float = 12.0  # once, where the task is over without a fall: what standing on would have earned
    success: float = 8.0  # once
    idle: float = 0.0  # per action of standing about while the ball lies still; fine-tuning's guard


_GRAVITY_M_S2 = 9.81
_ROLLING_M_S = 0.3  # ball centre; slower, it has only been brushed
_STANDING_M_S = 0.1  # imu
_DETOUR_M = 1.2  # extra distance for standing at 90 degrees to the line from ball to aim; twice that opposite


def _soft(margin_m, width_m: float, xp):
    """Probability-like share (...) of a margin: 0.5 at zero, near 1 at a few widths."""
    return 1.0 / (1.0 + xp.exp(xp.minimum(-margin_m / width_m, 80.0)))  # without overflow in float32


def _length(vector, xp):
    """Length (...) of vectors (..., n), above zero, so that it can divide."""
    return xp.sqrt(xp.sum(vector**2, axis=-1) + 1e-8)


def _aim_from_ball_w(s: Situation, xp):
    """The way (..., 2) of the ball to where it should go: the goal's centre in penalty kicks, else the target."""
    return (aim_pos_w(s.task == c.TARGET, s.target_pos_w, xp) - s.ball_center_pos_w)[..., :2]


def penalty_shot_value(s: Situation, xp):
    """Expected score (...) of the ball's motion in a penalty kick: 1.5 per m/s, and where it will arrive."""
    x, y, z = xp.moveaxis(s.ball_center_pos_w, -1, 0)
    vx, vy, vz = xp.moveaxis(s.ball_center_vel_w, -1, 0)
    toward = -vx
    # Where it will end counts in full from 3.3 m/s: earlier, the -3 beside the goal would make a weak first
    # kick worse than none, and no kick would ever be tried.
    moving = xp.clip((toward - 0.3) / 3.0, 0.0, 1.0)
    time_s = xp.clip((x + c.FIELD_HALF_LENGTH_M - c.BALL_RADIUS_M) / xp.maximum(toward, 0.3), 0.0, 8.0)
    y_cross = y + vy * time_s
    post_margin = c.GOAL_HALF_WIDTH_M - c.GOAL_POST_RADIUS_M - c.BALL_RADIUS_M - xp.abs(y_cross)
    # Goalie: the keeper's place when the ball arrives is known, it is a function of time only.
    arrival_s = s.action_count * c.ACTION_DT_S + time_s
    keeper_y, _ = keeper_motion(arrival_s, xp)
    keeper_margin = xp.abs(y_cross - keeper_y) - c.KEEPER_HALF_WIDTH_LOW_M - c.BALL_RADIUS_M
    inside = _soft(post_margin, 0.1, xp)
    past_keeper = _soft(keeper_margin, 0.1, xp)
    speed_score = 1.5 * xp.clip(toward, -1.0, 10.0)
    blocked = -0.5 - (1.0 - c.BLOCKED_SPEED_SHARE) * speed_score
    goalie = 2.5 * inside * past_keeper + blocked * inside * (1 - past_keeper) - 3.0 * (1 - inside)
    # Obstacle: a rolling ball must end on a defender, not past the line beside them (-3).
    z_cross = xp.maximum(z + vz * time_s - 0.5 * _GRAVITY_M_S2 * time_s**2, c.BALL_RADIUS_M)
    window = xp.stack([y_cross, z_cross], axis=-1) - s.target_pos_w[..., 1:]
    in_window = xp.exp(-xp.sum(window**2, axis=-1) / 0.35**2)
    reach = c.DEFENDER_HALF_WIDTH_M + c.BALL_RADIUS_M
    defender_margin = xp.max(reach - xp.abs(y_cross[..., None] - s.defender_pos_w[..., 1]), axis=-1)
    on_defender = _soft(defender_margin, 0.1, xp)
    rolling = blocked * on_defender - 3.0 * (1 - on_defender)
    obstacle = 2.5 * in_window + (1 - in_window) * rolling
    where_it_ends = xp.where(s.task == c.OBSTACLE, obstacle, goalie)
    return speed_score + moving * where_it_ends


class TargetPath(NamedTuple):
    """What the ball's motion promises in the target task; it does not slow down. Each (...); shares in [0, 1]."""

    speed_m_s: np.ndarray  # horizontal
    cosine: np.ndarray  # of the angle between its motion and the way to the target
    miss_m: np.ndarray  # by how much the line of its motion misses the target
    ahead: np.ndarray  # the target lies before it
    hit: np.ndarray  # how nearly it hits
    in_time: np.ndarray  # it gets there before the time is up
    lost: np.ndarray  # it leaves the field before the time is up


def target_path(s: Situation, xp) -> TargetPath:
    """Where the ball is going."""
    to_target = (s.target_pos_w - s.ball_center_pos_w)[..., :2]
    velocity = s.ball_center_vel_w[..., :2]
    speed = _length(velocity, xp)
    direction = velocity / speed[..., None]
    along = xp.sum(direction * to_target, axis=-1)
    miss_m = xp.abs(direction[..., 0] * to_target[..., 1] - direction[..., 1] * to_target[..., 0])
    ahead = _soft(along, 0.3, xp)
    left_s = c.EPISODE_ACTIONS * c.ACTION_DT_S - s.action_count * c.ACTION_DT_S
    half_field = xp.asarray([c.FIELD_HALF_LENGTH_M, c.FIELD_HALF_WIDTH_M])
    room_m = xp.maximum(half_field - xp.sign(velocity) * s.ball_center_pos_w[..., :2], 0.0)
    out_s = xp.min(room_m / xp.maximum(xp.abs(velocity), 1e-3), axis=-1)
    return TargetPath(
        speed_m_s=speed,
        cosine=along / _length(to_target, xp),
        miss_m=miss_m,
        ahead=ahead,
        hit=ahead * 0.5 * (xp.exp(-((miss_m / 0.5) ** 2)) + xp.exp(-((miss_m / 1.5) ** 2))),
        in_time=_soft(left_s - along / speed, 0.3, xp),
        lost=_soft(left_s - out_s, 0.3, xp),
    )


def target_shot_value(s: Situation, xp):
    """Expected score (...) of the ball's motion in the target task, times three so that it weighs beside a kick.

    By how much the line of its motion misses the target decides; the angle teaches from far off. A slow ball may
    be met again, and is still in the field when time is up: a lost one costs 1.
    """
    path = target_path(s, xp)
    near = 0.5 * path.ahead * xp.exp(-path.miss_m / 2.0) + 0.25 * (1.0 + path.cosine)
    moving = xp.clip(path.speed_m_s - 0.2, 0.0, 1.0)
    return 3.0 * moving * (2.0 * path.hit * path.in_time + 0.7 * near - path.lost * (1.0 - path.hit))


def shot_value(s: Situation, xp):
    """Value (...) of the ball's motion, in points of official score."""
    return xp.where(s.task == c.TARGET, target_shot_value(s, xp), penalty_shot_value(s, xp))


def approach_distance_m(s: Situation, xp):
    """Distance (...) to the ball plus a detour for standing on its wrong side."""
    to_ball = (s.ball_center_pos_w - s.imu_pos_w)[..., :2]
    to_aim = _aim_from_ball_w(s, xp)
    distance = _length(to_ball, xp)
    cosine = xp.sum(to_ball * to_aim, axis=-1) / (distance * _length(to_aim, xp))
    return distance + _DETOUR_M * (1.0 - cosine)


def aim_distance_m(s: Situation, xp):
    """Horizontal distance (...) of the ball to where it should go."""
    return _length(_aim_from_ball_w(s, xp), xp)


def next_memory(s: Situation, before: Memory, action, xp) -> Memory:
    """What a lane remembers after an action (..., 12) that led to a situation."""

    def least(so_far_m, now_m):
        return xp.where(so_far_m < 0.0, now_m, xp.minimum(so_far_m, now_m))

    return Memory(
        prev_action=action,
        shot_value=shot_value(s, xp),
        nearest_approach_m=least(before.nearest_approach_m, approach_distance_m(s, xp)),
        nearest_aim_m=least(before.nearest_aim_m, aim_distance_m(s, xp)),
    )


def _new_ground_m_s(before_m, after_m, xp):
    """By how much a least distance has shrunk, as a speed clipped at 1 m/s; it is below 0 before the first action."""
    return xp.where(before_m < 0.0, 0.0, xp.minimum((before_m - after_m) / c.ACTION_DT_S, 1.0))


def dense_terms(s: Situation, before: Memory, after: Memory, events: Events, action, xp) -> dict:
    """Every raw (unweighted) term, each (...) in the library's usual float.

    `s`, `events` and the memory `after` it are those that an action (..., 12) led to.

    `approach` pays new ground only: a ball that rolls away costs nothing, or no first touch is ever dared, and
    running after it brings nothing, or a kick into nowhere is worth the run (docs/experiments.md, e1, e2, e7).
    `dribble`: one kick hits to 12 degrees at best, a metre and a half; the ball must be brought nearer first.
    `follow` pays for being behind the ball, or a ball that will hit, behind which nobody needs to run (and fall).
    """
    is_target = s.task == c.TARGET
    rolls = xp.sum(s.ball_center_vel_w**2, axis=-1) > _ROLLING_M_S**2
    stands = xp.sum(s.velocimeter_b**2, axis=-1) < _STANDING_M_S**2  # along all three axes
    # In a penalty kick: the ball rolls, and not to a bad end. A target may need another touch.
    under_way = rolls & (after.shot_value > 0.0) & ~is_target
    path = target_path(s, xp)
    to_ball = s.ball_center_pos_w - s.imu_pos_w
    bearing = xp.arctan2(to_ball[..., 1], to_ball[..., 0]) - yaw_rad(s.imu_quat_wxyz, xp)
    torque_share = torque_nm(joint_target_rad(action), s.joint_pos_rad, s.joint_vel_rad_s, xp) / c.TORQUE_LIMIT_NM
    approach = _new_ground_m_s(before.nearest_approach_m, after.nearest_approach_m, xp)
    dribble = _new_ground_m_s(before.nearest_aim_m, after.nearest_aim_m, xp)
    follow = xp.maximum(xp.exp(-approach_distance_m(s, xp)), xp.where(rolls, path.hit * path.in_time, 0.0))
    fallen = events.fallen | events.diverged
    lost = events.out_of_field & is_target  # in penalty kicks the shot's value has said it
    terms = {
        "shot": after.shot_value - before.shot_value,
        "approach": xp.where(under_way, 0.5, approach),
        "dribble": xp.where(is_target, dribble, 0.0),
        "follow": xp.where(is_target, follow, 0.0),
        "face_ball": xp.where(under_way, 0.5, xp.cos(bearing)),
        "alive": xp.ones_like(after.shot_value),
        "tilt": xp.sum(projected_gravity(s.imu_quat_wxyz, xp)[..., :2] ** 2, axis=-1),
        "trunk_angvel": xp.sum(s.gyro_b[..., :2] ** 2, axis=-1),
        "torque": xp.sum(torque_share**2, axis=-1),
        "action_rate": xp.sum((action - before.prev_action) ** 2, axis=-1),
        "joint_vel": xp.sum(s.joint_vel_rad_s**2, axis=-1),
        "fallen": fallen,
        "ball_done": events.terminated & ~fallen & ~lost,
        "success": events.success,
        "idle": stands & ~rolls,
    }
    return {name: xp.asarray(value, dtype=float) for name, value in terms.items()}


def dense_reward(raw_terms: dict, weights: DenseWeights):
    """The weighted sum (...)."""
    return sum(getattr(weights, name) * value for name, value in raw_terms.items())
