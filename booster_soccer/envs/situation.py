"""What rewards and critics look at, of our scene and of the official environments alike.

NamedTuples of JAX or NumPy arrays with any leading axes `...`; nothing here imports JAX, so that the PyTorch
stages may use it. Frames: _w world, _b body (trunk axes). Positions, orientation and inertial sensors are one
physics step old (the official lag), joint states and the ball's velocity are current.
"""

from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c


class Situation(NamedTuple):
    """Robot, ball and task at one instant. `Tasks.situation` makes it of our scene, `from_official` of theirs."""

    joint_pos_rad: np.ndarray  # (..., 12)
    joint_vel_rad_s: np.ndarray  # (..., 12)
    imu_pos_w: np.ndarray  # (..., 3) m
    imu_quat_wxyz: np.ndarray  # (..., 4)
    gyro_b: np.ndarray  # (..., 3) rad/s
    velocimeter_b: np.ndarray  # (..., 3) m/s of the imu
    ball_site_pos_w: np.ndarray  # (..., 3) m, one radius from the centre; turns with the ball
    ball_center_pos_w: np.ndarray  # (..., 3) m
    ball_center_vel_w: np.ndarray  # (..., 3) m/s
    task: np.ndarray  # (...) int, index into constants.TASKS
    target_pos_w: np.ndarray  # (..., 3) m, window centre (obstacle) or target (target); zeros in the goalie task
    defender_pos_w: np.ndarray  # (..., 3, 3) m, means something in the obstacle task only
    action_count: np.ndarray  # (...) int, actions begun since the reset


def aim_pos_w(has_aim, target_pos_w, xp):
    """Where the ball should go (..., 3), m: `target_pos_w` (..., 3) where `has_aim` (...), else the goal's centre."""
    return xp.where(has_aim[..., None], target_pos_w, xp.asarray(c.GOAL_POS_W[0]))


def keeper_motion(time_s, xp):
    """The keeper's place along y in m and its velocity in m/s, each (...), a time (...) after the reset."""
    angular_rad_s = 2 * np.pi * c.KEEPER_FREQUENCY_HZ
    angle_rad = angular_rad_s * time_s
    return c.KEEPER_AMPLITUDE_M * xp.sin(angle_rad), c.KEEPER_AMPLITUDE_M * angular_rad_s * xp.cos(angle_rad)


class Events(NamedTuple):
    """What can end an episode; each (...) bool."""

    fallen: np.ndarray
    success: np.ndarray
    out_of_field: np.ndarray
    blocked: np.ndarray
    diverged: np.ndarray  # the physics broke: nothing of its numbers may be used

    @property
    def terminated(self):
        """Any of them: the episode ends without a bootstrap."""
        return self.fallen | self.success | self.out_of_field | self.blocked | self.diverged


class Memory(NamedTuple):
    """What a lane remembers of its episode for the dense reward (`rewards/dense.py: next_memory`)."""

    prev_action: np.ndarray  # (..., 12) in [-1, 1]
    shot_value: np.ndarray  # (...) of the ball's motion, points of official score
    # Least values so far, below 0 before the first action:
    nearest_approach_m: np.ndarray  # (...) distance to the kicking position
    nearest_aim_m: np.ndarray  # (...) distance of the ball to the aim point

    @classmethod
    def start(cls, shape: tuple[int, ...], xp) -> "Memory":
        """Of fresh episodes, with these leading axes."""
        zero = xp.zeros(shape)
        return cls(xp.zeros((*shape, c.NUM_JOINTS)), zero, zero - 1.0, zero - 1.0)


def from_official(
    obs: np.ndarray,
    info: dict[str, np.ndarray],
    ball_center_pos_w: np.ndarray,
    ball_center_vel_w: np.ndarray,
    physics_steps: np.ndarray,
) -> Situation:
    """The situation of official or twin lanes, as team 0.

    `obs` (..., 39 or more) and `info` are the official ones with `task_index` (..., 3); the ball's centre (..., 3)
    in m and m/s is in neither, nor is the episode's length (...). Positions come out in float64; orientation,
    inertial sensors and joints are float32 officially.
    """
    imu_pos_w = c.GOAL_POS_W[0] - info["goal_team_0_rel_robot"]
    task = np.argmax(info["task_index"], axis=-1)
    has_target = (task != c.GOALIE)[..., None]
    return Situation(
        joint_pos_rad=obs[..., : c.NUM_JOINTS].astype(float),
        joint_vel_rad_s=obs[..., c.NUM_JOINTS : 2 * c.NUM_JOINTS].astype(float),
        imu_pos_w=imu_pos_w,
        imu_quat_wxyz=info["robot_quat"][..., [3, 0, 1, 2]].astype(float),
        gyro_b=info["robot_gyro"].astype(float),
        velocimeter_b=info["robot_velocimeter"].astype(float),
        ball_site_pos_w=c.GOAL_POS_W[0] - info["goal_team_0_rel_ball"],
        ball_center_pos_w=ball_center_pos_w,
        ball_center_vel_w=ball_center_vel_w,
        task=task,
        target_pos_w=np.where(has_target, imu_pos_w + info["target_xpos_rel_robot"], 0.0),
        defender_pos_w=info["defender_xpos"].reshape(*task.shape, c.NUM_DEFENDERS, 3),
        action_count=-(-physics_steps // c.PHYSICS_STEPS_PER_ACTION),
    )


def official_events(
    situation: Situation, info: dict[str, np.ndarray], reward_terms: dict[str, np.ndarray], diverged: np.ndarray
) -> Events:
    """What ends the episodes (...) of official or twin lanes, by their `info` and raw reward terms."""
    return Events(
        fallen=~(situation.imu_pos_w[..., 2] > c.FALL_HEIGHT_M),
        success=np.asarray(info["success"], bool),
        out_of_field=np.asarray(reward_terms["offside"], bool),
        blocked=np.asarray(reward_terms.get("ball_blocked", np.zeros_like(diverged)), bool),
        diverged=diverged,
    )
