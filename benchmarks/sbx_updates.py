"""Updates/s of SAC in Stable-Baselines3 for JAX, for row P4 of `bench.py`, in whatever Python has `sbx-rl`.

    PYTHON benchmarks/sbx_updates.py '{"obs": 87, "critic_obs": 109, "actions": 12, "hidden": 256, "batch": 512,
                                       "steps": 8, "calls": 10}'

Prints its versions once it has compiled; then, for each line that it reads, makes `calls` times `steps` updates and
prints updates/s. It imports nothing of this project, which that Python may not have. What is timed is the library's
jitted `SAC._train` on transitions that lie on the device: sampling from its replay buffer and its log are not.
"""

import importlib.metadata
import json
import sys
import time

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from sbx import SAC
from sbx.common.policies import SquashedGaussianActor
from sbx.common.type_aliases import ReplayBufferSamplesNp

SIZES = json.loads(sys.argv[1])


class Actor(SquashedGaussianActor):
    """The library's actor, which sees only the first `obs` numbers of what the critics see."""

    def __call__(self, critic_obs):
        return super().__call__(critic_obs[..., : SIZES["obs"]])


class Spaces(gym.Env):
    """Only the sizes of an environment: nothing is played."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (SIZES["critic_obs"],))
    action_space = gym.spaces.Box(-1.0, 1.0, (SIZES["actions"],))


def transitions() -> ReplayBufferSamplesNp:
    """Synthetic ones for one call, on the device."""
    rng, count = np.random.default_rng(0), SIZES["batch"] * SIZES["steps"]
    obs, next_obs = rng.normal(size=(2, count, SIZES["critic_obs"]))
    action, reward = rng.uniform(-1.0, 1.0, (count, SIZES["actions"])), rng.normal(size=count)
    arrays = obs, action, next_obs, np.zeros(count), reward, np.full(count, 0.99)
    return ReplayBufferSamplesNp(*(jnp.asarray(values, jnp.float32) for values in arrays))


def main() -> None:
    """Answer each line with updates/s."""
    layers = [SIZES["hidden"]] * 2
    networks = {"net_arch": layers, "layer_norm": True, "activation_fn": nn.silu, "n_critics": 2, "actor_class": Actor}
    learner = SAC("MlpPolicy", Spaces(), policy_kwargs=networks, buffer_size=1, seed=0)
    carry = (learner.policy.qf_state, learner.policy.actor_state, learner.ent_coef_state, learner.key)
    data, target_entropy = transitions(), jnp.float32(learner.target_entropy)

    def play(carry, calls):
        for _ in range(calls):
            *carry, losses = learner._train(learner.tau, target_entropy, SIZES["steps"], data, 1, 0, *carry)
        jax.block_until_ready((carry, losses))
        return carry

    carry = play(play(carry, 1), 1)  # the second call is compiled anew where types had been weak
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("sbx-rl", "jax", "flax")), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        carry = play(carry, SIZES["calls"])
        print(SIZES["calls"] * SIZES["steps"] / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
