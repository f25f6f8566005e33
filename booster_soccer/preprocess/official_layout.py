"""The official feature layout, 86 numbers and the task one-hot, kept as a reference and for the ablation.

Source: the feature list of the competition's official training script. Positions are in world axes and
no feature holds the robot's yaw, which is why the policy does not use it (`preprocess/observation.py`).
"""

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import projected_gravity

# (info key, width) in the official order, after joint positions, joint velocities and projected gravity.
_INFO_FEATURES = (
    ("robot_gyro", 3),
    ("robot_accelerometer", 3),
    ("robot_velocimeter", 3),
    ("goal_team_0_rel_robot", 3),
    ("goal_team_1_rel_robot", 3),
    ("goal_team_0_rel_ball", 3),
    ("goal_team_1_rel_ball", 3),
    ("ball_xpos_rel_robot", 3),
    ("ball_velp_rel_robot", 3),
    ("ball_velr_rel_robot", 3),
    ("player_team", 2),
    ("goalkeeper_team_0_xpos_rel_robot", 3),
    ("goalkeeper_team_0_velp_rel_robot", 3),
    ("goalkeeper_team_1_xpos_rel_robot", 3),
    ("goalkeeper_team_1_velp_rel_robot", 3),
    ("target_xpos_rel_robot", 3),
    ("target_velp_rel_robot", 3),
    ("defender_xpos", 9),
)
OFFICIAL_SIZE = 2 * c.NUM_JOINTS + 3 + sum(width for _, width in _INFO_FEATURES)  # 86


def official_features(obs: np.ndarray, info: dict) -> np.ndarray:
    """The official features (86 + number of tasks,) float32 from one official `obs` and `info`.

    `task_index` is optional, as in a plain `gym.make`; it then adds nothing.
    """
    quat_wxyz = np.asarray(info["robot_quat"], dtype=np.float64)[[3, 0, 1, 2]]
    parts = [obs[: 2 * c.NUM_JOINTS], projected_gravity(quat_wxyz, np)]
    parts += [np.asarray(info[key]).reshape(width) for key, width in _INFO_FEATURES]
    if "task_index" in info:
        parts.append(np.asarray(info["task_index"]))
    return np.concatenate(parts).astype(np.float32)
