"""Domain randomisation in three levels (level 0 is none).

The native engine draws anew at every reset, MJX once a lane.

Each number acts where it has an effect. A contact takes the larger friction of its two geoms, so the
ground's is set low and each robot geom's and the ball's own decides. Damping means the PD layer's, because
the joints' own is zero.
"""

from typing import NamedTuple

import mujoco
import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError

GROUND_GEOMS = ("sai_logo1", "sai_logo2", "pitch", "pitch_for_ball", "field_base", "floor")
_GROUND_FRICTION = 0.01


class Level(NamedTuple):
    """Half ranges of uniform factors around 1, and the standard deviation of observation noise."""

    mass: float
    friction: float
    damping: float
    obs_noise_std: float  # in units of the normaliser's standard deviation
    ball_mass: float = 0.0
    ball_friction: float = 0.0
    foot_friction: float = 0.0


LEVELS = (
    Level(0.0, 0.0, 0.0, 0.0),
    Level(0.05, 0.10, 0.05, 0.005),
    Level(0.10, 0.30, 0.15, 0.02),
    Level(0.20, 0.50, 0.20, 0.03, ball_mass=0.20, ball_friction=0.30, foot_friction=0.50),
)


class Physics(NamedTuple):
    """The model fields that are randomised, with the fields' own shapes."""

    body_mass: np.ndarray  # (nbody,)
    body_inertia: np.ndarray  # (nbody, 3)
    geom_friction: np.ndarray  # (ngeom, 3)
    actuator_biasprm: np.ndarray  # (nu, 10)


def level(index: int) -> Level:
    """Look a level up; raises UserError outside 0..3."""
    if not 0 <= index < len(LEVELS):
        raise UserError(f"--dr-level {index} is not a level: use 0 (none) to {len(LEVELS) - 1}")
    return LEVELS[index]


class Randomizer:
    """Draws `Physics` around a nominal model."""

    def __init__(self, model: mujoco.MjModel, level_index: int):
        self.level = level(level_index)
        self.nominal = Physics(*(np.array(getattr(model, name)) for name in Physics._fields))
        self.ball_body = model.body("soccer_ball").id
        names = [model.geom(i).name for i in range(model.ngeom)]
        self.ball_geom = names.index("ball")
        self.feet = [names.index(name) for name in ("left_foot_link", "right_foot_link")]
        self.ground = [names.index(name) for name in names if name in GROUND_GEOMS]

    def draw(self, rng: np.random.Generator) -> Physics:
        """One robot, ball and ground."""
        level_, nominal = self.level, self.nominal

        def factor(half_range: float, shape: int | tuple[int, ...] = ()) -> np.ndarray:
            return 1.0 + rng.uniform(-half_range, half_range, shape)

        mass = factor(level_.mass, len(nominal.body_mass))
        mass[self.ball_body] = factor(level_.ball_mass)
        friction = nominal.geom_friction.copy()
        friction[:, 0] *= factor(level_.friction)  # column 0 is sliding
        friction[self.ball_geom, 0] *= factor(level_.ball_friction)
        friction[self.feet, 0] *= factor(level_.foot_friction)
        friction[self.ground, 0] = _GROUND_FRICTION
        bias = nominal.actuator_biasprm.copy()
        bias[:, 2] *= factor(level_.damping, c.NUM_JOINTS)  # -kd
        return Physics(nominal.body_mass * mass, nominal.body_inertia * mass[:, None], friction, bias)
