"""Whether a policy falls in the target task because it sees the ball pass by: falls near that moment, and elsewhere.

    python -m benchmarks.target_falls [--checkpoint assets/policies/final] [--episodes 150]

Input: a checkpoint of any stage, played in the twin, twice from the same starts: as it is, and shown a target that
always lies ahead on the ball's way. Output: falls per second of chase, from half a second before the ball's closest
pass by the true target to a second after it, and at all other times; and, of the policy as it is, by where the ball was
0.6 s before: its bearing off the robot's heading, and its distance. The chase begins 0.3 s after the kick.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from booster_soccer import errors
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.preprocess.observation import SLICES
from booster_soccer.rollout.lanes import TwinLanes
from booster_soccer.rollout.play import Policy
from booster_soccer.store import checkpoints

_KICK_M_S, _ROLLING_M_S, _SLOWEST_M_S = 0.5, 0.3, 0.2  # ball centre
_AFTER_KICK_ACTIONS = 15
_PASS_S = (-1.0, 0.5)  # time to the closest pass; below 0 it is over
_AHEAD_M = 8.0
_BEFORE_ACTIONS = 30
_BEARINGS_DEG = (0.0, 10.0, 20.0, 45.0, 90.0, 180.0)
_DISTANCES_M = (0.0, 0.6, 1.0, 1.5, 2.5, 40.0)


@dataclass(frozen=True)
class Config:
    """What to play."""

    checkpoint: Path = Path("assets/policies/final")
    episodes: int = 150
    seed: int = 0  # master seed, as of evaluate.py
    start_noise: float = c.START_NOISE_RAD  # standard deviation of the noise on each joint's start position, rad


def shown_ahead(obs: np.ndarray, chases: np.ndarray) -> np.ndarray:
    """Observations (B, 87), in lanes that chase with a target ahead on the ball's way."""
    ball_m = obs[:, SLICES["ball_pos_rel_robot_h"]][:, :2]
    velocity = obs[:, SLICES["ball_vel_rel_robot_h"]][:, :2] + obs[:, SLICES["velocimeter_b"]][:, :2]
    speed = np.linalg.norm(velocity, axis=-1, keepdims=True)
    target = obs[:, SLICES["target_pos_rel_robot_h"]].copy()
    ahead = ball_m + _AHEAD_M * velocity / np.maximum(speed, 1e-3)
    target[:, :2] = np.where(chases[:, None] & (speed > _ROLLING_M_S), ahead, target[:, :2])
    other = obs.copy()
    other[:, SLICES["target_pos_rel_robot_h"]] = target
    return other


def falls(policy: Policy, config: Config, ahead: bool) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Falls and seconds of chase: near the pass and elsewhere (2, 2), and (2,) for each place of the ball by name."""
    lanes = TwinLanes("target", config.episodes)
    seeds = [official.match_seed(config.seed, i) for i in range(config.episodes)]
    lanes.reset(range(config.episodes), seeds, config.start_noise)
    done, kicked_at, counts = np.zeros(config.episodes, bool), np.full(config.episodes, -1), np.zeros((2, 2))
    bearings_deg, distances_m, chased, fallen_at = [], [], [], np.full(config.episodes, -1)
    for action in range(c.EPISODE_ACTIONS):
        sight, obs = lanes.look(), lanes.observe()
        velocity = sight.ball.centre_vel_w[:, :2]
        speed = np.linalg.norm(velocity, axis=-1)
        kicked_at[(kicked_at < 0) & (speed > _KICK_M_S)] = action
        chases = (kicked_at >= 0) & (action - kicked_at >= _AFTER_KICK_ACTIONS)
        ball_m = obs[:, SLICES["ball_pos_rel_robot_h"]][:, :2]
        bearings_deg.append(np.abs(np.degrees(np.arctan2(ball_m[:, 1], ball_m[:, 0]))))
        distances_m.append(np.linalg.norm(ball_m, axis=1))
        chased.append(chases & ~done)
        way = (sight.aim_pos_w - sight.ball.centre_pos_w)[:, :2]
        to_pass_s = (way * velocity).sum(-1) / np.maximum(speed, _SLOWEST_M_S) ** 2
        near = (to_pass_s > _PASS_S[0]) & (to_pass_s < _PASS_S[1])
        terminated, truncated = lanes.hold(policy(shown_ahead(obs, chases) if ahead else obs))
        fell = [lane for lane in np.flatnonzero(terminated & ~done & chases) if lanes.outcome(lane).fell]
        fallen_at[fell] = action
        for row, there in enumerate((near, ~near)):
            counts[row] += there[fell].sum(), c.ACTION_DT_S * (there & chases & ~done).sum()
        done |= terminated | truncated
    lanes.close()
    chased_at = np.array(chased)
    places = [("deg off", np.array(bearings_deg), _BEARINGS_DEG), ("m away", np.array(distances_m), _DISTANCES_M)]
    found = [row for place in places for row in by_place(*place, chased_at, fallen_at)]
    return counts, found


def by_place(
    unit: str, values: np.ndarray, edges: tuple[float, ...], chased: np.ndarray, fallen_at: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Falls and seconds of chase (2,) between each two `edges` of the ball's bearing or distance, `values` (T, B).

    A fall, at action `fallen_at` (B,) or -1, counts where the ball was `_BEFORE_ACTIONS` earlier, if it was `chased`
    (T, B) then.
    """
    lanes = np.flatnonzero(fallen_at >= _BEFORE_ACTIONS)
    then = fallen_at[lanes] - _BEFORE_ACTIONS, lanes
    found = []
    for low, high in zip(edges, edges[1:]):
        there = (low <= values) & (values < high) & chased
        found.append((f"{low:g} to {high:g} {unit}", np.array([there[then].sum(), c.ACTION_DT_S * there.sum()])))
    return found


def said(counts: np.ndarray) -> str:
    """Falls (), seconds () of `counts` (2,), as a rate."""
    return f"{counts[0] / counts[1]:.3f} ({counts[0]:.0f} in {counts[1]:.0f} s)" if counts[1] else "never there"


def main(config: Config) -> dict[str, np.ndarray]:
    """Play both, print; returns the counts."""
    policy = policy_from_arrays(checkpoints.load(config.checkpoint).arrays)
    counts = {}
    for name, ahead in (("true target", False), ("shown ahead", True)):
        counts[name], places = falls(policy, config, ahead)
        near, elsewhere = (said(row) for row in counts[name])
        print(f"{name}: falls per second near the pass {near}, elsewhere {elsewhere}")
        if not ahead:
            print("\n| ball 0.6 s before | falls per second |\n|---|---|")
            print("".join(f"| {place} | {said(row)} |\n" for place, row in places))
    return counts


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
