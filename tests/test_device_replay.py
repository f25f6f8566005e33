"""The ring on the device gives back what a ring of whole transitions holds, episodes ending wherever they may."""

import jax
import numpy as np
import pytest

from booster_soccer.agents.sac import Batch
from booster_soccer.rollout.collect import ROW_SHAPES
from booster_soccer.rollout.device_replay import DeviceReplay, Ring, SavedRows
from booster_soccer.store.replay import Replay

LANES = 5


def play(replay: DeviceReplay, iterations: int) -> tuple[Ring, Replay, np.ndarray]:
    """Made-up episodes: the ring, the same transitions whole, and what lanes act on next.

    First episodes are cut somewhere, some fall, the others last `max_actions`. What fell and what started anew differ.
    """
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=(LANES, *shape)).astype(np.float32)

    add = jax.jit(replay.add)
    ring, whole = replay.empty(), Replay(replay.rows * LANES, ROW_SHAPES)
    seen, age = drawn(*ROW_SHAPES["critic_obs"]), rng.integers(0, replay.max_actions, LANES)
    for n in range(iterations):
        following, age = drawn(*ROW_SHAPES["critic_obs"]), age + 1
        fell = rng.random(LANES) < 0.5 / replay.max_actions
        truncated = ~fell & (age >= replay.max_actions)
        new = Batch(seen, drawn(*ROW_SHAPES["action"]), drawn(), following, fell.astype(np.float32))
        age[fell | truncated] = 0
        seen = np.where((fell | truncated)[:, None], drawn(*ROW_SHAPES["critic_obs"]), following)
        ring = add(ring, n, new, truncated, seen)
        whole.add(**(new._asdict() | {"next_critic_obs": np.where(fell[:, None], seen, following)}))
    return ring, whole, seen


# Shorter, as long, and longer than an episode; a ring that is not full, just full, and written over several times.
sizes = pytest.mark.parametrize(("rows", "max_actions", "iterations"), [
    (20, 7, 13), (20, 7, 20), (20, 7, 21), (21, 7, 200), (20, 1, 47), (5, 30, 100), (7, 7, 64)])  # fmt: skip


@sizes
def test_it_gives_back_what_was_put_in(rows, max_actions, iterations):
    replay = DeviceReplay(rows, LANES, 1, max_actions)
    ring, whole, _ = play(replay, iterations)
    saved = SavedRows(replay, ring, iterations)
    assert saved.added == whole.added and len(saved) == len(whole) and saved.capacity == whole.capacity
    assert ring.truncated.any()
    for first in range(saved.added - len(saved), saved.added, LANES):
        ours, theirs = saved.rows(first, first + LANES), whole.rows(first, first + LANES)
        for name in ROW_SHAPES:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@sizes
def test_it_draws_what_was_put_in(rows, max_actions, iterations):
    """All rows, and nothing that is not there."""
    replay = DeviceReplay(rows, LANES, 1, max_actions)
    ring, whole, _ = play(replay, iterations)
    drawn = jax.jit(replay.sample, static_argnums=(3, 4))(ring, iterations, jax.random.key(0), 30, 64)
    where = {float(reward): row for row, reward in enumerate(whole.arrays["reward"][: len(whole)])}
    index = [where[float(reward)] for reward in np.ravel(drawn.reward)]
    assert set(index) == set(range(len(whole)))
    for name, values in drawn._asdict().items():
        np.testing.assert_array_equal(values.reshape(len(index), *values.shape[2:]), whole.arrays[name][index])


@sizes
def test_from_whole_transitions_it_is_as_it_was(rows, max_actions, iterations):
    """So a run that goes on draws the same; of the rows that no longer count nothing is known."""
    replay = DeviceReplay(rows, LANES, 1, max_actions)
    ring, whole, seen = play(replay, iterations)
    again = replay.refilled(whole.arrays, iterations, seen)
    for a, b in zip(again, ring, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    for name in set(Ring._fields) - {"final_obs", "critic_obs"}:
        np.testing.assert_array_equal(getattr(again, name), getattr(ring, name), err_msg=name)
    key, draw = jax.random.key(1), jax.jit(replay.sample, static_argnums=(3, 4))
    for a, b in zip(draw(again, iterations, key, 8, 64), draw(ring, iterations, key, 8, 64), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_transition_is_493_bytes():
    """And four million of them in 2,048 lanes less than 2 GB."""
    replay = DeviceReplay(1953, 2048, 1, 300)
    sizes = {
        name: values.size * values.dtype.itemsize for name, values in jax.eval_shape(replay.empty)._asdict().items()
    }
    assert sum(sizes.values()) < 1.01 * 493 * 1953 * 2048 < 2e9
    assert sizes["final_obs"] < 0.005 * sum(sizes.values())
