"""The PD layer: action in [-1, 1] -> joint target -> torque, one definition for every stage.

The policy acts at 50 Hz; its target is held for ten physics steps while the torque is computed from the
state before each. In our own scene the same law sits in the actuators (`envs/scene.py: write_pd_layer`).
"""

import numpy as np

from booster_soccer.envs import constants as c


def joint_target_rad(action):
    """Joint target (..., 12) in radians of an action (..., 12) in [-1, 1]."""
    return c.DEFAULT_POSE_RAD + action * c.ACTION_SCALE_RAD


def torque_nm(target_rad, joint_pos_rad, joint_vel_rad_s, xp):
    """Torque (..., 12) in N m, clipped to the motors' limits; `xp` is numpy, jax.numpy or torch."""
    torque = c.KP_NM_PER_RAD * (target_rad - joint_pos_rad) - c.KD_NMS_PER_RAD * joint_vel_rad_s
    return xp.clip(torque, -c.TORQUE_LIMIT_NM, c.TORQUE_LIMIT_NM)


def platform_torque_nm(action, joint_pos_rad, joint_vel_rad_s):
    """Torque (..., 12) as the submitted module and the SDK compute it, bit for bit; all float32."""
    pose, scale, kp, kd, limit = (
        constant.astype(np.float32)
        for constant in (
            c.DEFAULT_POSE_RAD,
            c.ACTION_SCALE_RAD,
            c.KP_NM_PER_RAD,
            c.KD_NMS_PER_RAD,
            c.TORQUE_LIMIT_NM,
        )
    )
    spring = kp * (pose + action * scale - joint_pos_rad)
    unit = np.clip((spring - kd * joint_vel_rad_s) / limit, -1.0, 1.0)
    return -limit + 2 * limit * ((unit + 1) / 2)
