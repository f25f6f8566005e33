"""Every number of the robot, the field and the tasks that more than one module needs.

Source: the installed `sai-mujoco` 0.1.30 (its compiled model and its environment code), unless a line
says otherwise. `tests/test_scene.py` checks the physical ones against the official compiled model.

Conventions: metres, seconds, radians, N m; world frame z up; quaternions are w, x, y, z unless a name
says `xyzw`. Joint vectors have shape (12,), left leg first, in the order of `JOINT_NAMES`.
"""

from typing import Literal, get_args

import numpy as np

# --- time -------------------------------------------------------------------------------------------
PHYSICS_DT_S = 0.002
PHYSICS_STEPS_PER_ACTION = 10  # 50 Hz policy; each joint target is held for ten 500 Hz physics steps
ACTION_DT_S = PHYSICS_DT_S * PHYSICS_STEPS_PER_ACTION
EPISODE_PHYSICS_STEPS = 5000  # official truncation: 10 s
EPISODE_ACTIONS = EPISODE_PHYSICS_STEPS // PHYSICS_STEPS_PER_ACTION

# --- robot ------------------------------------------------------------------------------------------
_LEG_JOINTS = ("Hip_Pitch", "Hip_Roll", "Hip_Yaw", "Knee_Pitch", "Ankle_Pitch", "Ankle_Roll")
JOINT_NAMES = tuple(f"{side}_{joint}" for side in ("Left", "Right") for joint in _LEG_JOINTS)
NUM_JOINTS = len(JOINT_NAMES)


def _both_legs(*per_leg: float) -> np.ndarray:
    return np.array(per_leg * 2, dtype=np.float64)


TORQUE_LIMIT_NM = _both_legs(45.0, 45.0, 30.0, 65.0, 24.0, 15.0)
# Our choice: a slightly crouched stance, so that the straight knee is not a singular start of every motion.
DEFAULT_POSE_RAD = _both_legs(-0.2, 0.0, 0.0, 0.4, -0.25, 0.0)
# Our choice: gains of the PD layer (N m/rad and N m s/rad).
KP_NM_PER_RAD = _both_legs(200.0, 200.0, 200.0, 200.0, 50.0, 50.0)
KD_NMS_PER_RAD = _both_legs(5.0, 5.0, 5.0, 5.0, 1.0, 1.0)
# Our choice: joint target = default pose + action * scale, action in [-1, 1].
ACTION_SCALE_RAD = _both_legs(1.0, 0.5, 0.5, 1.0, 0.6, 0.4)

IMU_START_HEIGHT_M = 0.70  # the official drop: all joint angles zero, imu site at this height
FALL_HEIGHT_M = 0.40  # fallen when the imu site is at or below this height

# --- ball -------------------------------------------------------------------------------------------
BALL_RADIUS_M = 0.11  # the body frame and the `ball` site lie this far BELOW the centre and turn with it

# --- field ------------------------------------------------------------------------------------------
FIELD_HALF_LENGTH_M = 10.97
FIELD_HALF_WIDTH_M = 6.87
GOAL_HALF_WIDTH_M = 1.6
GOAL_HEIGHT_M = 1.9
GOAL_DEPTH_M = 1.6
GOAL_POST_RADIUS_M = 0.07
GOAL_POS_W = {0: np.array([-FIELD_HALF_LENGTH_M, 0.0, 0.0]), 1: np.array([FIELD_HALF_LENGTH_M, 0.0, 0.0])}

# --- tasks ------------------------------------------------------------------------------------------
Task = Literal["goalie", "obstacle", "target"]
TASKS: tuple[str, ...] = get_args(Task)  # the order of the platform's task one-hot
NUM_TASKS = len(TASKS)
GOALIE, OBSTACLE, TARGET = range(NUM_TASKS)
GYM_ID = {
    "goalie": "LowerT1GoaliePenaltyKick-v0",
    "obstacle": "LowerT1ObstaclePenaltyKick-v0",
    "target": "LowerT1KickToTarget-v0",
}
# Official site of the window or target; a task without one aims at the goal.
TARGET_SITE = {"obstacle": "goalarea_site", "target": "target0"}

# Ours: standard deviation of the noise on each joint's start position, where a policy is judged. Officially there is
# none, and the goalie task is one and the same episode.
START_NOISE_RAD = 0.02

# Penalty kicks (goalie and obstacle), as played by team 0, the only team of the competition.
PENALTY_ROBOT_X_M = -6.77
PENALTY_BALL_X_M = -8.77
PENALTY_YAW_RAD = 3.14  # official: 3.14, not pi

# Goalie: the keeper slides along y as a function of simulation time only.
KEEPER_AMPLITUDE_M = GOAL_HALF_WIDTH_M - 0.6
KEEPER_FREQUENCY_HZ = 0.3
KEEPER_SITE_Z_M = 0.2
# Convex hulls of keeper and defender, measured on the compiled meshes (x thickness, y half width, z range).
# The keeper is narrow at the feet and widest at the arms: half width at z = 0.15 m and from z = 0.92 m up.
KEEPER_HALF_THICKNESS_M = 0.0035
KEEPER_HALF_WIDTH_LOW_M = 0.49
KEEPER_HALF_WIDTH_HIGH_M = 0.693
KEEPER_WIDTH_Z_M = (0.15, 0.92)
KEEPER_TOP_Z_M = 1.72
# A ball that meets keeper or defender keeps this share of its speed in the step that ends the episode (measured in
# the twin: 8.6 -> 6.9 m/s and 9.2 -> 7.4 m/s, 22 and 18 balls): the official score counts what is left.
BLOCKED_SPEED_SHARE = 0.8
NUM_DEFENDERS = 3
DEFENDER_HALF_WIDTH_M = 0.28
DEFENDER_HALF_THICKNESS_M = 0.02
DEFENDER_TOP_Z_M = 1.63
DEFENDER_SLOTS_Y_M = np.array([-1.17, -0.39, 0.39, 1.17])  # three defenders and the window share these
DEFENDER_BODY_Z_M = 0.2
DEFENDER_GEOM_Z_M = 0.4
WINDOW_Z_RANGE_M = (0.44, GOAL_HEIGHT_M - 0.5)  # above the body, itself at 0.2 m
WINDOW_BODY_Z_M = 0.2
WINDOW_RADIUS_M = 0.3

# Kick to target.
TARGET_RADIUS_M = 0.4
TARGET_OFFSET_Y_M = (2.0, 3.5)
TARGET_BALL_DISTANCE_M = (0.5, 2.0)
FIELD_BORDER_M = 0.5
