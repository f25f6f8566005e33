"""Why target episodes end as they do: kicks, the run after the ball, and hits, falls and lost balls.

    python -m benchmarks.target_kicks [--checkpoint assets/policies/final] [--episodes 100] [--start-noise 0.02]

Input: a checkpoint of any stage, played in the twin. Output: four tables. The first kick is the first action after
which the ball's centre is faster than 0.5 m/s; its motion is read 0.2 s later. Any kick changes its velocity by 0.25
m/s within an action. Directions are absolute angles, horizontal; speeds of the robot are means over 0.1 s.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from booster_soccer import errors
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.rollout.lanes import Sight, TwinLanes
from booster_soccer.rollout.play import Episode, play
from booster_soccer.store import checkpoints

_KICK_M_S = 0.5
_READ_AFTER_ACTIONS = 10
_DISTANCES_M = (0.0, 4.0, 6.0, 9.0, 40.0)
_PERCENTILES = (10, 25, 50, 75, 90)
_FROM_BALL_M = (0.0, 0.6, 1.0, 1.5, 2.5, 4.0, 40.0)
_MEAN_OVER_ACTIONS = 5
_TOUCH_M_S = 0.25
_READ_TOUCH_AFTER_ACTIONS = 5
_KICKS_SHOWN = 7


@dataclass(frozen=True)
class Config:
    """What to play."""

    checkpoint: Path = Path("assets/policies/final")
    episodes: int = 100
    seed: int = 0  # master seed, as of evaluate.py
    start_noise: float = c.START_NOISE_RAD  # standard deviation of the noise on each joint's start position, rad


def _angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between vectors (..., 2)."""
    turn = np.arctan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1))
    return np.abs(np.degrees(turn))


class WatchedLanes(TwinLanes):
    """Keeps what is seen of the lanes at each action."""

    def __init__(self, task: str, num_lanes: int):
        super().__init__(task, num_lanes)
        self.seen: list[Sight] = []

    def observe(self) -> np.ndarray:
        self.seen.append(self.look())
        return super().observe()


def watch(config: Config) -> dict[str, np.ndarray]:
    """Per action and lane (T, B, 2): ball velocity, ball to target, robot to ball, robot; per lane (B,): its end."""
    policy = policy_from_arrays(checkpoints.load(config.checkpoint).arrays)
    episodes = [Episode("target", official.match_seed(config.seed, i)) for i in range(config.episodes)]
    lanes = WatchedLanes("target", config.episodes)
    results = list(play(lanes, policy, episodes, config.start_noise))
    lanes.close()
    seen = [(now.imu_pos_w, now.aim_pos_w, now.ball.centre_pos_w, now.ball.centre_vel_w) for now in lanes.seen]
    robot, aim, ball, ball_vel = np.array(seen)[..., :2].swapaxes(0, 1)
    found = {"robot": robot, "to_target": aim - ball, "to_ball": ball - robot, "ball_vel": ball_vel}
    for name in ("physics_steps", "touches", "success", "fell"):
        found[name] = np.array([getattr(result, name) for result in results])
    out = np.array([result.terms["offside"] != 0.0 for result in results])
    return found | {"out": out, "actions": -(-found["physics_steps"] // c.PHYSICS_STEPS_PER_ACTION)}


def print_chase(p: dict[str, np.ndarray], after_kick: np.ndarray) -> None:
    """How near the robot stays to the ball after the first kick (T, B), and how fast both are."""
    n = _MEAN_OVER_ACTIONS
    moved = np.linalg.norm(p["robot"][n:] - p["robot"][:-n], axis=-1) / (n * c.ACTION_DT_S)
    playing = (np.arange(len(after_kick))[:, None] < p["actions"]) & after_kick
    playing, from_ball = playing[n:], np.linalg.norm(p["to_ball"], axis=-1)[n:]
    ball = np.linalg.norm(p["ball_vel"], axis=-1)[n:]
    print(f"\ntouches an episode: {p['touches'].mean():.1f}\n")
    print("| robot to ball after the first kick | share of time | robot, m/s | ball, m/s |\n|---|---|---|---|")
    for low, high in zip(_FROM_BALL_M, _FROM_BALL_M[1:]):
        mine = playing & (low <= from_ball) & (from_ball < high)
        speeds = [np.median(v[mine]) if mine.any() else np.nan for v in (moved, ball)]
        share = mine.sum() / max(playing.sum(), 1)
        print(f"| {low:.1f} to {high:.1f} m | {share:.0%} | {speeds[0]:.2f} | {speeds[1]:.2f} |")


def touches(p: dict[str, np.ndarray], lane: int) -> list[tuple[int, int]]:
    """Actions before and after each kick of a lane's episode: a touch is over when the next one is looked for."""
    end, found, t = int(p["actions"][lane]) - 1, [], 1
    change = np.linalg.norm(np.diff(p["ball_vel"][:, lane], axis=0), axis=-1)
    while t < end:
        if change[t - 1] > _TOUCH_M_S:
            found.append((t - 1, min(t + _READ_TOUCH_AFTER_ACTIONS, end)))
            t += _READ_TOUCH_AFTER_ACTIONS
        t += 1
    return found


def print_touches(p: dict[str, np.ndarray]) -> None:
    """How fast and how well directed the ball is before and after each kick, in the order of kicks."""
    lanes = range(len(p["actions"]))
    kicks = [(number, lane, *kick) for lane in lanes for number, kick in enumerate(touches(p, lane), 1)]
    print("\n| kick | episodes | ball before, m/s | after, m/s | off target before, deg | after, deg |")
    print("|---|---|---|---|---|---|")
    for shown in range(1, _KICKS_SHOWN + 1):
        chosen = np.array([kick[1:] for kick in kicks if kick[0] == shown])
        if len(chosen):
            lane, before, after = chosen.T
            speeds = [np.median(np.linalg.norm(p["ball_vel"][t, lane], axis=-1)) for t in (before, after)]
            angles = [np.median(_angle_deg(p["ball_vel"][t, lane], p["to_target"][t, lane])) for t in (before, after)]
            print(
                f"| {shown} | {len(chosen)} | {speeds[0]:.2f} | {speeds[1]:.2f} | {angles[0]:.0f} | {angles[1]:.0f} |"
            )


def main(config: Config) -> None:
    """Play and print the tables."""
    if config.episodes < 1:
        raise errors.UserError(f"--episodes must be at least 1, got {config.episodes}")
    if not config.start_noise >= 0.0:
        raise errors.UserError(f"--start-noise must be at least 0, got {config.start_noise}")
    p = watch(config)
    lanes = np.arange(config.episodes)
    fast = np.linalg.norm(p["ball_vel"], axis=-1) > _KICK_M_S
    kicked = fast.any(0)
    kick = fast.argmax(0)[kicked]
    then = np.minimum(kick + _READ_AFTER_ACTIONS, p["actions"][kicked] - 1)
    at_kick, after = (kick, lanes[kicked]), (then, lanes[kicked])
    table = {
        "first kick, s": kick * c.ACTION_DT_S,
        "ball speed, m/s": np.linalg.norm(p["ball_vel"][after], axis=-1),
        "ball off target, deg": _angle_deg(p["ball_vel"][after], p["to_target"][after]),
        "robot-ball line off target, deg": _angle_deg(p["to_ball"][at_kick], p["to_target"][at_kick]),
        "fall, s": p["actions"][p["fell"]] * c.ACTION_DT_S,
    }
    print(f"{kicked.sum()} of {config.episodes} kick; percentiles {_PERCENTILES}:")
    for name, values in table.items():
        text = "  ".join(f"{v:7.2f}" for v in np.percentile(values, _PERCENTILES)) if len(values) else "never"
        print(f"  {name:32s} {text}")
    print_touches(p)
    print_chase(p, np.maximum.accumulate(fast))
    distance_m = np.linalg.norm(p["to_target"][0], axis=-1)
    print("\n| ball to target at the start | episodes | hit | fell | out | time up |\n|---|---|---|---|---|---|")
    for low, high in [*zip(_DISTANCES_M, _DISTANCES_M[1:]), (0.0, _DISTANCES_M[-1])]:
        mine = (low <= distance_m) & (distance_m < high)
        hit, out = p["success"][mine], p["out"][mine]
        fell = p["fell"][mine] & ~hit & ~out
        shares = [x.mean() if mine.any() else np.nan for x in (hit, fell, out, ~hit & ~out & ~fell)]
        print(f"| {low:.0f} to {high:.0f} m | {mine.sum()} | " + " | ".join(f"{s:.0%}" for s in shares) + " |")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config))
