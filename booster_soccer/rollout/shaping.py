"""What one action is worth to the learner, and what its critics see: the same for every engine and stage.

Nothing here imports JAX: `rollout/episode.py` uses it on lanes of our scene, and `DenseLanes` on official and twin
lanes.
"""

from typing import NamedTuple

import numpy as np

from booster_soccer.envs.situation import Events, Memory, Situation
from booster_soccer.preprocess.privileged import privileged
from booster_soccer.rewards import dense
from booster_soccer.rewards.dense import DenseWeights


class Shaped(NamedTuple):
    """What an action brought, but for the official score."""

    critic_obs: np.ndarray  # (..., 109) what comes next, also where the episode ended
    reward: np.ndarray  # (...) dense
    dense_terms: dict[str, np.ndarray]  # raw, each (...)


def critic_observation(obs, s: Situation, memory: Memory, xp):
    """The policy's observation (..., 87), followed by what only the critics see (..., 22)."""
    distances = dense.approach_distance_m(s, xp), dense.aim_distance_m(s, xp)
    return xp.concatenate([obs, privileged(s, memory, *distances, xp)], axis=-1)


def shape(
    obs, s: Situation, before: Memory, events: Events, action, weights: DenseWeights, xp
) -> tuple[Memory, Shaped]:
    """The lanes' next memory, and reward and critic observation, of an action (..., 12) that led to `s` and `obs`."""
    after = dense.next_memory(s, before, action, xp)
    raw = dense.dense_terms(s, before, after, events, action, xp)
    # A diverged lane is reset; nothing of its broken numbers may reach the learner.
    bad = events.diverged
    reward = xp.where(bad, weights.fallen, dense.dense_reward(raw, weights))
    critic_obs = xp.where(bad[..., None], 0.0, critic_observation(obs, s, after, xp))
    return after, Shaped(critic_obs, reward, {name: xp.where(bad, 0.0, value) for name, value in raw.items()})


class DenseLanes:
    """The dense reward of B official or twin lanes, with their memory.

    `memory` is all that a later step depends on: save it, and assign it to go on from there.
    """

    def __init__(self, num_lanes: int, weights: DenseWeights):
        self.weights = weights
        self.memory = Memory.start((num_lanes,), np)

    def start(self, obs: np.ndarray, situation: Situation, started: np.ndarray) -> np.ndarray:
        """Forget what was before in lanes where `started` (B,); critic observations (B, 109) float32 of all lanes.

        `obs` (B, 87) and `situation` are the present ones: where an episode ended, of the fresh start.
        """
        fresh = Memory.start(started.shape, np)
        self.memory = Memory(*(np.where(started[(...,) + (None,) * (old.ndim - 1)], new, old)
                               for new, old in zip(fresh, self.memory)))  # fmt: skip
        return critic_observation(obs, situation, self.memory, np).astype(np.float32)

    def step(self, obs: np.ndarray, situation: Situation, events: Events, action: np.ndarray) -> Shaped:
        """What actions (B, 12) brought that led to these observations (B, 87), situations and events.

        Where an episode ended they are its last ones; `start` comes next there.
        """
        self.memory, shaped = shape(obs, situation, self.memory, events, action, self.weights, np)
        return shaped._replace(critic_obs=shaped.critic_obs.astype(np.float32))
