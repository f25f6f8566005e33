"""Left-right mirror of observations and actions: legs swap, y flips. Exact in the heading frame.

The robot's two legs differ by less than 0.5 % in mass, so a mirrored transition is as good as a real one.
Polar vectors (positions, velocities) flip y; axial ones (angular velocities) flip x and z.
"""

import numpy as np

from envs import constants as c
from preprocess.observation import OBS_SIZE, SLICES, TABLE

_HALF = c.NUM_JOINTS // 2
# Pitch joints keep their sign, roll and yaw joints change it.
JOINT_SIGN = np.array([1.0 if "Pitch" in name else -1.0 for name in c.JOINT_NAMES], dtype=np.float32)
JOINT_PERMUTATION = np.concatenate([np.arange(_HALF, c.NUM_JOINTS), np.arange(_HALF)])
_POLAR = np.array([1.0, -1.0, 1.0], dtype=np.float32)
_AXIAL = -_POLAR
_AXIAL_ROWS = ("gyro_b", "ball_angvel_rel_robot_h")


def _observation_mirror() -> tuple[np.ndarray, np.ndarray]:
    permutation, sign = np.arange(OBS_SIZE), np.ones(OBS_SIZE, dtype=np.float32)
    for row in TABLE:
        part = SLICES[row.name]
        if row.frame == "joint":
            permutation[part] = part.start + JOINT_PERMUTATION
            sign[part] = JOINT_SIGN
        elif row.frame in ("body", "heading"):
            sign[part] = np.tile(_AXIAL if row.name in _AXIAL_ROWS else _POLAR, row.width // 3)
    return permutation, sign


OBS_PERMUTATION, OBS_SIGN = _observation_mirror()


def mirror_observation(obs):
    """Mirrored observations (..., 87)."""
    return obs[..., OBS_PERMUTATION] * OBS_SIGN


def mirror_action(action):
    """Mirrored actions (..., 12)."""
    return action[..., JOINT_PERMUTATION] * JOINT_SIGN
