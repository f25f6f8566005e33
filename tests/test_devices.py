"""Several devices: what is drawn, what an update over two gives, and which settings are refused.

The whole loop over two: `tests/long/mjx_devices.py`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_mjx_sac as train
from booster_soccer.agents.sac import Batch
from booster_soccer.errors import UserError
from booster_soccer.rollout.device_replay import DeviceReplay, Ring
from tests.small_pretraining import COLLECT, config

ROOT = Path(__file__).parents[1]
REPLAY = DeviceReplay(rows=10, lanes=8, devices=1, max_actions=4)
_FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"


def numbered() -> Ring:
    """A ring (10, 8) whose rewards are the numbers of its rows."""
    return REPLAY.empty()._replace(reward=jnp.arange(80, dtype=jnp.float32).reshape(10, 8))


def draw(replay: DeviceReplay, updates: int) -> Batch:
    """Batches of six after four iterations."""
    return replay.sample(numbered(), jnp.int32(4), jax.random.key(3), updates, 6)


def test_one_device_draws_among_all_rows():
    expected = jax.random.randint(jax.random.key(3), (5, 6), 0, 4 * 8)
    np.testing.assert_array_equal(draw(REPLAY, 5).reward, expected)


def test_each_device_draws_from_its_own_lanes():
    reward = np.asarray(draw(replace(REPLAY, devices=2), 100).reward)
    lanes = [set(part.ravel() % 8) for part in np.split(reward, 2, axis=1)]
    assert lanes == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert set(reward.ravel()) == set(range(32))


_PROGRAM = """
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from booster_soccer.agents.sac import Sac
from booster_soccer.rollout.device_replay import DeviceReplay
from tests.small_pretraining import LEARNER

rng = np.random.default_rng(0)
mesh = jax.make_mesh((2,), ("lanes",), (AxisType.Auto,))
whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "lanes"))
replay = DeviceReplay(rows=10, lanes=8, devices=2, max_actions=4)
ring = jax.tree.map(lambda zeros: rng.normal(size=zeros.shape).astype(np.float32), replay.empty())
ring = ring._replace(truncated=ring.truncated > 0.0)
sample = lambda ring, key: replay.sample(ring, jnp.int32(25), key, 3, 32)
learner = Sac(LEARNER)
state = learner.init(jax.random.key(0))

def learn(state, ring):
    batches = sample(ring, jax.random.key(1))
    return learner.update_many(state, batches, jnp.float32(0.5)), batches

(one, metrics), drawn = jax.jit(learn)(state, ring)
split = jax.jit(learn, in_shardings=(whole, rows))
(two, metrics_of_two), drawn_by_two = split(state, ring)
jax.tree.map(np.testing.assert_array_equal, drawn, drawn_by_two)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
jax.tree.map(close, metrics, metrics_of_two)
jax.tree.map(close, one._replace(key=0), two._replace(key=0))
moved = np.abs(np.asarray(two.actor["output"]["kernel"]) - np.asarray(state.actor["output"]["kernel"])).max()
assert moved > 1e-4, moved

# Drawing brings nothing from one device to the other, an update its gradients.
draw = jax.jit(sample, in_shardings=(rows, whole))
program = draw.lower(ring, jax.random.key(1)).compile()
text = program.as_text()
assert "num_partitions=2" in text
assert all(sharding.spec[1] == "lanes" for sharding in program.output_shardings), program.output_shardings
for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert word not in text, word
assert "all-reduce" in split.lower(state, ring).compile().as_text()
"""


def test_two_devices_draw_without_each_other_and_give_the_update_of_one():
    environment = os.environ | {"XLA_FLAGS": _FLAGS, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", _PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(("engine", "changes", "words"), [
    ("native", {"devices": 2}, "--devices 2 is for MJX, and the engine is native"),
    ("mjx", {"devices": 0}, "--devices must be positive"),
    ("mjx", {"devices": 3}, "--devices 3: JAX sees 2 .cpu.: give at most 2"),
    ("mjx", {"devices": 2, "num_envs": 7}, "--num-envs 7 cannot be split over --devices 2"),
    ("mjx", {"devices": 2, "batch_size": 33}, "--batch-size 33 cannot be split over --devices 2")])  # fmt: skip
def test_what_cannot_be_split_is_refused(tmp_path, monkeypatch, engine, changes, words):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(UserError, match=words):
        train.main(config(tmp_path / "run", engine=engine, collect=replace(COLLECT, **changes)))
    assert list(tmp_path.glob("run*")) == []
