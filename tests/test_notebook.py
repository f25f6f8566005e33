"""A notebook is not always clean: defaults of PyTorch, NumPy and JAX set before; ours do not depend on them."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import train_mjx_sac
from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints
from tests import small_checkpoints
from tests.small_pretraining import config
from tests.test_entry import ROOT

# Learner, conversion and submission on small networks, and the bits that come out.
_PROGRAM = """
import hashlib
import numpy as np
import torch
{before}
from booster_soccer.agents import ddpg
from booster_soccer.agents.submission_model import scripted
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE

rng = np.random.default_rng(0)
mean, scale = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
learner = ddpg.Ddpg(ddpg.DdpgConfig(), ddpg.random_arrays(0, mean, scale), mean, scale)
shapes = (CRITIC_OBS_SIZE,), (12,), (12,), (), ()
for _ in range(3):
    batch = ddpg.Batch(*(learner.tensor(rng.normal(size=(16, *shape))) for shape in shapes))
    learner.learn(batch, ("input", "hidden", "output"), rng)
arrays = learner.arrays() | learner.state()
learner = ddpg.Ddpg.restore(learner.config, learner.arrays(), learner.state(), "cpu")
arrays["act"] = learner.act(rng.normal(size=(4, OBS_SIZE)).astype(np.float32))
model = scripted(ddpg.load_module(ddpg.Actor(), "actor", arrays))
arrays["torque"] = model(torch.as_tensor(rng.normal(size=(3, OBS_SIZE)), dtype=torch.float32, device="cpu")).numpy()
assert [name for name, value in arrays.items() if value.dtype == np.float64] == ["actor_learning_rate"]
for name in sorted(arrays):
    print(name, hashlib.sha256(np.ascontiguousarray(arrays[name]).tobytes()).hexdigest())
"""


def printed(before: str) -> str:
    """What the program prints after a notebook's own cells."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", _PROGRAM.format(before=before)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def clean() -> str:
    return printed("")


@pytest.mark.parametrize(
    "before",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_device('meta')",
        "torch.set_grad_enabled(False)",
        "np.seterr(all='raise')",
    ],
)
def test_the_defaults_of_pytorch_and_numpy_change_no_bit(clean, before):
    assert "actor.input.weight" in clean and printed(before) == clean


def test_pretraining_sets_jax_up_for_itself(tmp_path, monkeypatch):
    """64 bits, another precision and NaN checks that a notebook switched on."""
    seen = {}

    def probe(*_):
        seen["dtype"], seen["precision"] = jnp.zeros(3).dtype.name, jax.config.jax_default_matmul_precision
        seen["nans"] = jax.config.jax_debug_nans
        raise UserError("enough")

    monkeypatch.setattr(train_mjx_sac, "Pretraining", probe)
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"), jax.debug_nans(True):
        with pytest.raises(UserError, match="enough"):
            train_mjx_sac.main(config(tmp_path / "run"))
        assert jnp.zeros(3).dtype == jnp.float64  # theirs again
    assert seen == {"dtype": "float32", "precision": "highest", "nans": False}


def test_a_checkpoint_is_saved_and_read_by_a_string(tmp_path):
    path = small_checkpoints.save(tmp_path / "run")
    assert checkpoints.load(str(path)).hash == checkpoints.load(path).hash


def test_numbers_that_are_none_are_refused_from_a_notebook_too(tmp_path):
    with pytest.raises(UserError, match="--time-limit-s cannot be nan"):
        train_mjx_sac.main(replace(config(tmp_path / "run"), time_limit_s=float("nan")))
