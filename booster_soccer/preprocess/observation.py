"""The policy's 87 numbers, in the robot's heading frame, from the official `obs` and `info`.

Why not the official 86 + task one-hot: they hold projected gravity but no yaw, and every position is in
world axes, so a policy could not tell where the ball lies from its own body. We turn every world vector
about z into the heading frame (x forward, y left, z up). The two numbers of `player_team` choose which
goal and keeper is "attacked" and which "own", and are then dropped; the three of the task come last.

One body serves NumPy and JAX (`xp`). `preprocess/submission.py` is its self-contained twin for the platform.
"""

import hashlib
import json
from typing import NamedTuple

from booster_soccer.envs import constants as c

ACCELEROMETER_LIMIT_MS2 = 50.0  # our choice: foot strikes peak at hundreds and would swamp the normaliser


class Row(NamedTuple):
    """One entry of the observation table."""

    name: str
    width: int
    unit: str
    frame: str  # joint, body (trunk axes), heading (world turned about z by the trunk's yaw), or none


TABLE = (
    Row("joint_pos", c.NUM_JOINTS, "rad", "joint"),
    Row("joint_vel", c.NUM_JOINTS, "rad/s", "joint"),
    Row("projected_gravity_b", 3, "1", "body"),
    Row("gyro_b", 3, "rad/s", "body"),
    Row("accelerometer_b", 3, "m/s^2", "body"),
    Row("velocimeter_b", 3, "m/s", "body"),
    Row("goal_attacked_rel_robot_h", 3, "m", "heading"),
    Row("goal_own_rel_robot_h", 3, "m", "heading"),
    Row("goal_attacked_rel_ball_h", 3, "m", "heading"),
    Row("goal_own_rel_ball_h", 3, "m", "heading"),
    Row("ball_pos_rel_robot_h", 3, "m", "heading"),
    Row("ball_vel_rel_robot_h", 3, "m/s", "heading"),
    Row("ball_angvel_rel_robot_h", 3, "rad/s", "heading"),
    Row("keeper_attacked_pos_rel_robot_h", 3, "m", "heading"),
    Row("keeper_attacked_vel_rel_robot_h", 3, "m/s", "heading"),
    Row("keeper_own_pos_rel_robot_h", 3, "m", "heading"),
    Row("keeper_own_vel_rel_robot_h", 3, "m/s", "heading"),
    Row("target_pos_rel_robot_h", 3, "m", "heading"),
    Row("target_vel_rel_robot_h", 3, "m/s", "heading"),
    Row("defenders_pos_rel_robot_h", 3 * c.NUM_DEFENDERS, "m", "heading"),
    Row("task_one_hot", c.NUM_TASKS, "1", "none"),
)
OBS_SIZE = sum(row.width for row in TABLE)


def _slices() -> dict[str, slice]:
    slices, start = {}, 0
    for row in TABLE:
        slices[row.name] = slice(start, start + row.width)
        start += row.width
    return slices


SLICES = _slices()
LAYOUT_HASH = hashlib.sha256(
    json.dumps({"table": TABLE, "accelerometer_limit_ms2": ACCELEROMETER_LIMIT_MS2}).encode()
).hexdigest()[:16]


def projected_gravity(quat_wxyz, xp):
    """Unit gravity direction in the body frame (..., 3) of an orientation (..., 4); upright is (0, 0, -1)."""
    w, x, y, z = (quat_wxyz[..., i] for i in range(4))
    return xp.stack([2 * (w * y - x * z), -2 * (y * z + w * x), 2 * (x * x + y * y) - 1], axis=-1)


def heading_cos_sin(quat_wxyz, xp):
    """Cosine and sine (...), (...) of the yaw of an orientation (..., 4).

    Without the angle, and with the cosine as products of differences: in float32 a rounded yaw near pi, or
    a cosine near zero by cancellation, costs 5e-6 m on a goal 20 m away. Zero both where the body's x axis
    is exactly vertical and there is no yaw.
    """
    w, x, y, z = (quat_wxyz[..., i] for i in range(4))
    cos = (w - z) * (w + z) + (x - y) * (x + y)
    sin = 2 * (w * z + x * y)
    norm = xp.maximum(xp.sqrt(cos * cos + sin * sin), 1e-9)
    return cos / norm, sin / norm


def yaw_rad(quat_wxyz, xp):
    """Yaw (...) of an orientation (..., 4): the angle from world x to the body's x axis, about world z."""
    cos, sin = heading_cos_sin(quat_wxyz, xp)
    return xp.arctan2(sin, cos)


def to_heading(vector_w, cos, sin, xp):
    """World vectors (..., 3) in the heading frame whose yaw has this cosine and sine (...)."""
    x, y = vector_w[..., 0], vector_w[..., 1]
    return xp.stack([cos * x + sin * y, cos * y - sin * x, vector_w[..., 2]], axis=-1)


def observe(joint_pos_rad, joint_vel_rad_s, info, xp):
    """The observation (..., 87) from joint states (..., 12) and an official-style `info`.

    The dictionary `info` holds every official key plus `task_index` (..., 3), with one shared batch shape;
    nothing in it is written to. `robot_quat` is x, y, z, w, as the official environments give it.
    """
    # The official quaternion is float32: widened first, NumPy computes in float64 (JAX in what it has).
    quat_wxyz = info["robot_quat"][..., [3, 0, 1, 2]].astype(float)
    cos, sin = heading_cos_sin(quat_wxyz, xp)

    def heading(vector_w):
        return to_heading(vector_w, cos, sin, xp)

    team = info["player_team"]
    is_team_0, is_team_1 = team[..., :1], team[..., 1:]

    def attacked(pattern):
        return heading(is_team_0 * info[pattern.format(0)] + is_team_1 * info[pattern.format(1)])

    def own(pattern):
        return heading(is_team_0 * info[pattern.format(1)] + is_team_1 * info[pattern.format(0)])

    # Defenders come as absolute positions. The robot's own follows from the goals, which lie opposite each
    # other about the origin; their mean loses less to float32 than one of them and its distance.
    robot_pos_w = -0.5 * (info["goal_team_0_rel_robot"] + info["goal_team_1_rel_robot"])
    defenders = [heading(info["defender_xpos"][..., 3 * i : 3 * i + 3] - robot_pos_w) for i in range(c.NUM_DEFENDERS)]
    parts = {
        "joint_pos": joint_pos_rad,
        "joint_vel": joint_vel_rad_s,
        "projected_gravity_b": projected_gravity(quat_wxyz, xp),
        "gyro_b": info["robot_gyro"],
        "accelerometer_b": xp.clip(info["robot_accelerometer"], -ACCELEROMETER_LIMIT_MS2, ACCELEROMETER_LIMIT_MS2),
        "velocimeter_b": info["robot_velocimeter"],
        "goal_attacked_rel_robot_h": attacked("goal_team_{}_rel_robot"),
        "goal_own_rel_robot_h": own("goal_team_{}_rel_robot"),
        "goal_attacked_rel_ball_h": attacked("goal_team_{}_rel_ball"),
        "goal_own_rel_ball_h": own("goal_team_{}_rel_ball"),
        "ball_pos_rel_robot_h": heading(info["ball_xpos_rel_robot"]),
        "ball_vel_rel_robot_h": heading(info["ball_velp_rel_robot"]),
        "ball_angvel_rel_robot_h": heading(info["ball_velr_rel_robot"]),
        "keeper_attacked_pos_rel_robot_h": attacked("goalkeeper_team_{}_xpos_rel_robot"),
        "keeper_attacked_vel_rel_robot_h": attacked("goalkeeper_team_{}_velp_rel_robot"),
        "keeper_own_pos_rel_robot_h": own("goalkeeper_team_{}_xpos_rel_robot"),
        "keeper_own_vel_rel_robot_h": own("goalkeeper_team_{}_velp_rel_robot"),
        "target_pos_rel_robot_h": heading(info["target_xpos_rel_robot"]),
        "target_vel_rel_robot_h": heading(info["target_velp_rel_robot"]),
        "defenders_pos_rel_robot_h": xp.concatenate(defenders, axis=-1),
        "task_one_hot": info["task_index"],
    }
    return xp.concatenate([parts[row.name] for row in TABLE], axis=-1)
