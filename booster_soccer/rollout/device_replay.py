"""The replay buffer of a jitted loop: a ring on the device that holds each observation once.

What came next in a lane is the observation that it acted on in the next iteration, unless its episode ended. Then it is
needed only where time was up (a fall has no future), and that happens in a lane at most once in an episode's length:
so those few lie apart. A transition is 493 bytes instead of 928.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from booster_soccer.agents.sac import Batch
from booster_soccer.envs.constants import NUM_JOINTS
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE


class Ring(NamedTuple):
    """The last T iterations of B lanes, and the K newest ends by time of each lane. Iterations count from 0."""

    critic_obs: jax.Array  # (T + 1, B, 109) what iteration n acted on lies at n mod T + 1, what the next one will, too
    action: jax.Array  # (T, B, 12) of iteration n at n mod T; the next three likewise
    reward: jax.Array  # (T, B)
    terminated: jax.Array  # (T, B) 1.0 where no bootstrap may happen
    truncated: jax.Array  # (T, B) bool: time was up, and what came next is among the final observations
    final_obs: jax.Array  # (K, B, 109) of an episode whose time was up in iteration n, at n // max_actions mod K


@dataclass(frozen=True)
class DeviceReplay:
    """What rings of one size are used for; pure functions."""

    rows: int  # T
    lanes: int  # B, over all devices
    devices: int
    max_actions: int  # time is up after as many, so not twice within as many in one lane

    @property
    def final_rows(self) -> int:
        """K: T iterations lie in at most so many stretches of `max_actions`."""
        return (self.rows - 1) // self.max_actions + 2

    def empty(self, sharding: Any = None) -> Ring:
        """Zeros."""

        def zeros(rows: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.zeros((rows, self.lanes, *shape), dtype, device=sharding)

        return Ring(
            critic_obs=zeros(self.rows + 1, CRITIC_OBS_SIZE),
            action=zeros(self.rows, NUM_JOINTS),
            reward=zeros(self.rows),
            terminated=zeros(self.rows),
            truncated=zeros(self.rows, dtype=jnp.bool_),
            final_obs=zeros(self.final_rows, CRITIC_OBS_SIZE),
        )

    def add(self, ring: Ring, n: jax.Array, new: Batch, truncated: jax.Array, seen: jax.Array) -> Ring:
        """The ring with iteration `n`: its transitions (B, ...), where time was up, and what lanes act on next."""

        def put(values: jax.Array, at: jax.Array, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(values, row, at, 0)

        row, final = n % self.rows, n // self.max_actions % self.final_rows
        critic_obs = put(ring.critic_obs, n % (self.rows + 1), new.critic_obs)
        ends = jnp.where(truncated[:, None], new.next_critic_obs, ring.final_obs[final])
        return Ring(
            critic_obs=put(critic_obs, (n + 1) % (self.rows + 1), seen),
            action=put(ring.action, row, new.action),
            reward=put(ring.reward, row, new.reward),
            terminated=put(ring.terminated, row, new.terminated),
            truncated=put(ring.truncated, row, truncated),
            final_obs=put(ring.final_obs, final, ends),
        )

    def transitions(self, ring: Ring, n: jax.Array, lane: jax.Array) -> Batch:
        """Those of iterations `n` in lanes `lane`, any shape; after a fall, `next_critic_obs` is of the fresh start."""
        row, final = n % self.rows, n // self.max_actions % self.final_rows
        following = ring.critic_obs[(n + 1) % (self.rows + 1), lane]
        return Batch(
            critic_obs=ring.critic_obs[n % (self.rows + 1), lane],
            action=ring.action[row, lane],
            reward=ring.reward[row, lane],
            next_critic_obs=jnp.where(ring.truncated[row, lane][..., None], ring.final_obs[final, lane], following),
            terminated=ring.terminated[row, lane],
        )

    def sample(self, ring: Ring, added: jax.Array, key: jax.Array, updates: int, batch: int) -> Batch:
        """Batches (updates, batch, ...) after `added` iterations; each device's part is of its own lanes."""
        devices, lanes = self.devices, self.lanes // self.devices
        index = jax.random.randint(key, (updates, batch), 0, jnp.minimum(added, self.rows) * lanes)
        row, lane = jnp.divmod(index.reshape(updates, devices, -1), lanes)
        newest = added - 1
        n = newest - (newest - row) % self.rows  # the newest of those that lie or lay in that row
        parts = jax.tree.map(lambda values: values.reshape(len(values), devices, lanes, *values.shape[2:]), ring)
        drawn = jax.vmap(self.transitions, in_axes=1, out_axes=1)(parts, n, lane)
        return jax.tree.map(lambda values: values.reshape(updates, batch, *values.shape[3:]), drawn)

    def refilled(self, arrays: dict[str, np.ndarray], added: int, seen: np.ndarray) -> Ring:
        """The ring after `added` iterations, from transitions (T B, ...) as `store.replay.Replay` holds them.

        `seen` is what lanes act on next.
        """
        saved = Batch(**{name: rows.reshape(self.rows, self.lanes, *rows.shape[1:]) for name, rows in arrays.items()})
        ring = jax.tree.map(lambda values: np.zeros(values.shape, values.dtype), jax.eval_shape(self.empty))
        n = np.arange(max(0, added - self.rows), added)
        row = n % self.rows
        ring.critic_obs[n % (self.rows + 1)] = saved.critic_obs[row]
        ring.critic_obs[added % (self.rows + 1)] = seen
        other = (saved.next_critic_obs[row] != ring.critic_obs[(n + 1) % (self.rows + 1)]).any(axis=-1)
        truncated = other & (saved.terminated[row] == 0.0)
        ring.truncated[row] = truncated
        which, lane = np.nonzero(truncated)
        ring.final_obs[n[which] // self.max_actions % self.final_rows, lane] = saved.next_critic_obs[row[which], lane]
        whole = ring._replace(action=saved.action, reward=saved.reward, terminated=saved.terminated)
        return jax.tree.map(jnp.array, whole)


class SavedRows:
    """A ring's transitions after `iterations`, as `Segments.write` reads them."""

    def __init__(self, replay: DeviceReplay, ring: Ring, iterations: int):
        self._replay, self._ring = replay, ring
        self.added = iterations * replay.lanes
        self.capacity = replay.rows * replay.lanes

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Transitions [first, last), counted since the start."""
        n, lane = np.divmod(np.arange(first, last), self._replay.lanes)
        drawn = self._replay.transitions(self._ring, n, lane)
        return {name: np.asarray(values) for name, values in drawn._asdict().items()}
