"""The whole loop of MJX over two devices gives what one device gives, and its state goes to disk and back.

    python -m pytest -s tests/long/mjx_devices.py

Two devices that XLA makes of a CPU. Nearly all of the time is for compiling MJX twice.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
_PROGRAM = """
import jax, numpy as np
from dataclasses import replace
from booster_soccer.agents import sac
from booster_soccer.agents.sac import Sac
from booster_soccer.envs.tasks import Tasks
from booster_soccer.rollout.collect import ROW_SHAPES, MjxLoop, Statistics
from booster_soccer.store.replay import Replay
from tests.small_pretraining import COLLECT, LEARNER

lanes = 8
MjxLoop.ITERATIONS_PER_CALL = CALL = 2  # rounding grows a hundredfold in ten actions: few are compared
config = replace(COLLECT, num_envs=lanes, buffer_size=lanes * (CALL + 4), devices=2, ramp_steps=(0, lanes))
learner = Sac(LEARNER)
fresh = lambda: learner.init(jax.random.key(0))
loop = MjxLoop(config, learner, Tasks(), 0, fresh())
start = jax.tree.map(np.asarray, loop.carry)  # on no device

# The very same calls, the same rows drawn, on one device.
alone = jax.jit(loop._iterations)
state, carry = fresh(), start
for _ in range(2):
    state, carry, sums, metrics = alone(state, carry, True)
assert len(carry.physics.qpos.sharding.device_set) == 1

statistics, state_of_two = Statistics(), fresh()
for _ in range(2):
    state_of_two, metrics_of_two = loop.iterate(state_of_two, True, statistics)

def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x, float) - np.asarray(y, float)).max()) for x, y in pairs)

pairs = {"actor": (state.actor, state_of_two.actor), "critic": (state.critic, state_of_two.critic),
         "normaliser": (state.normalizer.mean, state_of_two.normalizer.mean),
         "critic_obs": (carry.lanes.critic_obs, loop.carry.lanes.critic_obs),
         "reward": (carry.buffer.reward, loop.carry.buffer.reward),
         "qpos": (carry.physics.qpos, loop.carry.physics.qpos)}
for name, both in pairs.items():
    print(f"{name} differs by {difference(*both):.1e}")
assert all(difference(*both) < 1e-3 for both in pairs.values())
assert difference(state.actor, fresh().actor) > 1e-3  # it has learned

# Each device has half of what grows with the lanes, from call to call; one program was compiled.
for leaf in jax.tree.leaves((loop.carry.physics, loop.carry.lanes)):
    assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {lanes // 2}
assert {shard.data.shape[1] for shard in loop.carry.buffer.reward.addressable_shards} == {lanes // 2}
assert loop._run._cache_size() == 1

# To disk and back: the next call has the same bits.
kept = Replay(loop.replay.capacity, ROW_SHAPES)
kept.added = loop.replay.added
oldest = kept.added - len(loop.replay)
kept.put(oldest, loop.replay.rows(oldest, kept.added))
saved = {name: np.array(values) for name, values in loop.arrays().items()}
learned = {name: np.array(values) for name, values in sac.state_arrays(state_of_two).items()}

def go_on(state):
    state, _ = loop.iterate(state, True, statistics)
    arrays = sac.state_arrays(state) | loop.arrays() | {"reward": loop.carry.buffer.reward}
    return {name: np.array(values) for name, values in arrays.items()}

expected = go_on(state_of_two)
loop.restore(saved, kept)
for name, values in go_on(sac.restore(fresh(), learned)).items():
    np.testing.assert_array_equal(values, expected[name], err_msg=name)
"""


def test_two_devices_give_what_one_gives():
    environment = os.environ | {"XLA_FLAGS": _FLAGS, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _PROGRAM], cwd=ROOT, env=environment, check=True)
