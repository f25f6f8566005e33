"""Dense reward of fine-tuning: one function per term, one weight per term; a weight of 0 switches it off.

Computed from what the official environment shows before and after one action, in NumPy, for a batch of
lanes. Scales follow `rewards/dense.py`, so that the pre-trained critics start near the truth. Shaped on the
ball's centre: the official ball quantities are those of a site that turns with the ball.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import SLICES

_POINTS_PER_M_S = 1.5  # the official weight of the ball's speed toward the goal
_MAX_PAID_M_S = np.array([10.0, 10.0, 2.0])  # by task: a ball too fast for its target only leaves the field
_ROLLING_M_S = 0.3  # ball centre speed from which it counts as played
_STANDING_M_S = 0.1  # horizontal robot speed below which it counts as idle


@dataclass(frozen=True)
class FinetuneWeights:
    """Weight of each term; the names are the terms'. `action_rate` and `idle` are the guards against collapse."""

    approach: float = 0.2  # per action at 1 m/s toward the ball
    shot: float = 1.0  # per point of ball speed gained toward the goal, window or target
    alive: float = 0.05  # per action
    tilt: float = -0.2  # squared horizontal part of gravity in the body
    action_rate: float = -0.005  # sum of squared action differences
    idle: float = -0.05  # per action of standing about while the ball lies still
    fallen: float = -3.0  # once


class Reading(NamedTuple):
    """What the reward needs of lanes beside their observations; world frame, m and m/s."""

    robot_pos_w: np.ndarray  # (B, 3) imu
    ball_centre_pos_w: np.ndarray  # (B, 3)
    ball_centre_vel_w: np.ndarray  # (B, 3)
    aim_pos_w: np.ndarray  # (B, 3) goal (goalie), window (obstacle) or target (target)


class Transition(NamedTuple):
    """One action of each lane."""

    before: Reading
    after: Reading
    obs_after: np.ndarray  # (B, 87)
    action: np.ndarray  # (B, 12)
    previous_action: np.ndarray  # (B, 12); zeros (the default pose) at an episode's first action
    fell: np.ndarray  # (B,) bool: the episode ended with a fall


def _horizontal_m(vector_w: np.ndarray) -> np.ndarray:
    return np.hypot(vector_w[..., 0], vector_w[..., 1])


def shot_points(reading: Reading, task_one_hot: np.ndarray) -> np.ndarray:
    """Worth (B,) of the ball's motion: its speed toward where it should go, in points of official score."""
    to_aim = (reading.aim_pos_w - reading.ball_centre_pos_w)[..., :2]
    direction = to_aim / np.maximum(_horizontal_m(to_aim), 1e-6)[..., None]
    toward_m_s = np.sum(reading.ball_centre_vel_w[..., :2] * direction, axis=-1)
    return _POINTS_PER_M_S * np.clip(toward_m_s, -1.0, task_one_hot @ _MAX_PAID_M_S)


def _task(t: Transition) -> np.ndarray:
    return t.obs_after[..., SLICES["task_one_hot"]]


def _approach(t: Transition) -> np.ndarray:
    """Speed toward the ball in m/s, clipped at 1; half of that while a shot is on its way."""
    distance_m = [_horizontal_m(r.ball_centre_pos_w - r.robot_pos_w) for r in (t.before, t.after)]
    speed_m_s = np.clip((distance_m[0] - distance_m[1]) / c.ACTION_DT_S, -1.0, 1.0)
    return np.where(shot_points(t.after, _task(t)) > 1.0, 0.5, speed_m_s)


def _shot(t: Transition) -> np.ndarray:
    """The change of the ball's worth: a kick is paid once, when it happens."""
    return shot_points(t.after, _task(t)) - shot_points(t.before, _task(t))


def _alive(t: Transition) -> np.ndarray:
    return np.ones(t.action.shape[:-1])


def _tilt(t: Transition) -> np.ndarray:
    return np.sum(t.obs_after[..., SLICES["projected_gravity_b"]][..., :2] ** 2, axis=-1)


def _action_rate(t: Transition) -> np.ndarray:
    return np.sum((t.action - t.previous_action) ** 2, axis=-1)


def _idle(t: Transition) -> np.ndarray:
    """1 where neither the robot nor the ball moves."""
    robot_m_s = _horizontal_m(t.after.robot_pos_w - t.before.robot_pos_w) / c.ACTION_DT_S
    ball_m_s = _horizontal_m(t.after.ball_centre_vel_w)
    return ((robot_m_s < _STANDING_M_S) & (ball_m_s < _ROLLING_M_S)).astype(np.float64)


def _fallen(t: Transition) -> np.ndarray:
    return t.fell.astype(np.float64)


TERMS = {
    "approach": _approach,
    "shot": _shot,
    "alive": _alive,
    "tilt": _tilt,
    "action_rate": _action_rate,
    "idle": _idle,
    "fallen": _fallen,
}
assert set(TERMS) == {field.name for field in fields(FinetuneWeights)}


def dense_terms(t: Transition) -> dict[str, np.ndarray]:
    """Every raw (unweighted) term, each (B,)."""
    return {name: term(t) for name, term in TERMS.items()}


def dense_reward(raw_terms: dict[str, np.ndarray], weights: FinetuneWeights) -> np.ndarray:
    """The weighted sum, (B,)."""
    return sum(getattr(weights, name) * value for name, value in raw_terms.items())
