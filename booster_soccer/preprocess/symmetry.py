"""Left-right mirror of observations and actions: legs swap, y flips. Exact in the heading frame.

The robot's two legs differ by less than 0.5 % in mass, so a mirrored transition is as good as a real one.
Polar vectors (positions, velocities) flip y; axial ones (angular velocities) flip x and z.
"""

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import Row

_HALF = c.NUM_JOINTS // 2
# Pitch joints keep their sign, roll and yaw joints change it.
JOINT_SIGN = np.array([1.0 if "Pitch" in name else -1.0 for name in c.JOINT_NAMES], dtype=np.float32)
JOINT_PERMUTATION = np.concatenate([np.arange(_HALF, c.NUM_JOINTS), np.arange(_HALF)])
_POLAR = np.array([1.0, -1.0, 1.0], dtype=np.float32)
_AXIAL = -_POLAR
_AXIAL_ROWS = ("gyro_b", "ball_angvel_rel_robot_h")


def mirror_table(table: tuple[Row, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Permutation and sign of the numbers of a table."""
    permutation, sign, start = [], [], 0
    for row in table:
        here = np.arange(start, start + row.width)
        if row.frame == "joint":
            permutation.append(here[JOINT_PERMUTATION])
            sign.append(JOINT_SIGN)
        else:
            permutation.append(here)
            vector = _AXIAL if row.name in _AXIAL_ROWS else _POLAR
            sign.append(np.ones(row.width, np.float32) if row.frame == "none" else np.tile(vector, row.width // 3))
        start += row.width
    return np.concatenate(permutation), np.concatenate(sign)


def mirror_action(action):
    """Mirrored actions (..., 12)."""
    return action[..., JOINT_PERMUTATION] * JOINT_SIGN
