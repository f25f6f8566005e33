"""How well a converted checkpoint's critics predict the returns of its own policy, in our scene and in the twin.

    python -m benchmarks.critics --checkpoint runs/cpu/converted [--episodes 50] [--discount 0.99]

The policy plays without exploration noise from official starts with joint noise; at every action the critics' mean
value is held against the discounted dense return that followed, to the episode's end. Output: for each task and side
the returns' spread, the root mean square error, and the share of the returns' variance that the values explain. Both
sides pay the same dense reward (`rewards/dense.py`), so what differs is the physics and the rules.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from booster_soccer import errors
from booster_soccer.agents.ddpg import critics_from_arrays
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.lanes import Lanes, SceneLanes, TwinLanes
from booster_soccer.rollout.play import episode_seed
from booster_soccer.rollout.shaping import DenseLanes
from booster_soccer.store import checkpoints


@dataclass(frozen=True)
class Config:
    """What is compared."""

    checkpoint: Path  # "converted" or "finetuned" checkpoint
    episodes: int = 50  # per task
    discount: float = 0.99  # that of the critics: pre-training's last
    seed: int = 0


def returns_and_values(lanes: Lanes, arrays: dict, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discounted returns, values and tasks, (N,) each, of one episode on every lane."""
    policy, critics = policy_from_arrays(arrays), critics_from_arrays(arrays, "critic")
    count = len(lanes.tasks)
    tasks = np.array([c.TASKS.index(task) for task in lanes.tasks])
    lanes.reset(range(count), [episode_seed(config.seed, lane) for lane in range(count)], c.START_NOISE_RAD)
    shaping, alive = DenseLanes(count, DenseWeights()), np.ones(count, bool)
    critic_obs = shaping.start(lanes.observe(), lanes.situation(), alive)
    rewards, values, played = [], [], []
    while alive.any():
        action = policy(critic_obs[:, :OBS_SIZE])
        with torch.no_grad():
            inputs = torch.from_numpy(critic_obs), torch.from_numpy(action)
            values.append(np.mean([critic(*inputs).numpy() for critic in critics], axis=0))
        played.append(alive.copy())
        ended = np.logical_or(*lanes.hold(action))
        with np.errstate(all="ignore"):  # of lanes that have ended
            events = lanes.events(np.zeros(count, bool))
            shaped = shaping.step(lanes.observe(), lanes.situation(), events, action.astype(np.float64))
        rewards.append(np.where(alive, shaped.reward, 0.0))
        critic_obs, alive = shaped.critic_obs, alive & ~ended
    following, returns = np.zeros(count), []
    for reward in reversed(rewards):
        following = reward + config.discount * following
        returns.append(following)
    mask = np.array(played)
    return np.array(returns[::-1])[mask], np.array(values)[mask], np.broadcast_to(tasks, mask.shape)[mask]


def main(config: Config) -> dict[str, dict[str, float]]:
    """Play both sides and print the table; returns its numbers by task and side."""
    arrays = checkpoints.load(config.checkpoint, ("converted", "finetuned")).arrays
    sides = {"our scene": [SceneLanes(c.NUM_TASKS * config.episodes)],
             "twin": [TwinLanes(task, config.episodes) for task in c.TASKS]}  # fmt: skip
    table = Table(title=f"Critics of {config.checkpoint}: discounted dense return at {config.discount}")
    for name in ("task", "side", "actions", "return, mean", "std", "value, mean", "RMS error", "explained"):
        table.add_column(name, justify="left" if name in ("task", "side") else "right")
    numbers = {}
    for side, all_lanes in sides.items():
        parts = [returns_and_values(lanes, arrays, config) for lanes in all_lanes]
        returns, values, tasks = (np.concatenate(part) for part in zip(*parts))
        for index, task in enumerate(c.TASKS):
            g, q = returns[tasks == index], values[tasks == index]
            row = {"return": g.mean(), "std": g.std(), "value": q.mean(), "rms_error": np.sqrt(np.mean((g - q) ** 2)),
                   "explained": 1.0 - np.mean((g - q) ** 2) / g.var()}  # fmt: skip
            numbers[f"{task}, {side}"] = {name: float(value) for name, value in row.items()}
            table.add_row(task, side, f"{len(g):,}", *(f"{value:.2f}" for value in row.values()))
    Console(width=110).print(table)
    return numbers


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
