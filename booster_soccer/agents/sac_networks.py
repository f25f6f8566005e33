"""Flax networks of pre-training: a tanh-Gaussian actor, a pair of critics, and the observation normaliser.

Layers are named `input`, `hidden`, `output` (and `input_norm`, `hidden_norm` in the critics); the names
are those of the checkpoint's arrays and of `agents/torch_networks.py`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES

HIDDEN = 256
# log_std is clipped to this range in use. The upper end of 0 keeps tanh(N(mean, 1)) the widest policy
# (holosoma uses [-5, 0] too); what the network outputs before clipping is checked against [-5, 2].
LOG_STD_MIN, LOG_STD_MAX = -5.0, 0.0


# About the spread that the target entropy of -6 asks for: exploration starts around the held default pose
# instead of flailing.
INITIAL_LOG_STD = -1.8


def _output_bias(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    half = shape[0] // 2
    return jnp.concatenate([jnp.zeros(half, dtype), jnp.full(half, INITIAL_LOG_STD, dtype)])


class ActorNetwork(nn.Module):
    """Normalised observation (..., 87) to mean and raw log_std (..., 12) each."""

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.silu(nn.Dense(HIDDEN, name="input")(obs))
        x = nn.silu(nn.Dense(HIDDEN, name="hidden")(x))
        # Near-zero start: the first policy is centred on the default pose.
        small = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
        output = nn.Dense(2 * c.NUM_JOINTS, kernel_init=small, bias_init=_output_bias, name="output")
        mean, log_std = jnp.split(output(x), 2, axis=-1)
        return mean, log_std


class CriticNetwork(nn.Module):
    """Q of normalised observation and privileged numbers (..., 109), and action (..., 12): (...,)."""

    @nn.compact
    def __call__(self, critic_obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([critic_obs, action], axis=-1)
        x = nn.silu(nn.LayerNorm(epsilon=1e-6, name="input_norm")(nn.Dense(HIDDEN, name="input")(x)))
        x = nn.silu(nn.LayerNorm(epsilon=1e-6, name="hidden_norm")(nn.Dense(HIDDEN, name="hidden")(x)))
        return nn.Dense(1, name="output")(x)[..., 0]


ACTOR = ActorNetwork()
CRITIC = CriticNetwork()


def init_actor(key: jax.Array, obs_size: int) -> dict:
    """Actor parameters."""
    return ACTOR.init(key, jnp.zeros((1, obs_size)))["params"]


def init_critics(key: jax.Array, critic_obs_size: int, count: int = 2) -> dict:
    """Parameters of `count` critics, stacked on a leading axis."""
    dummy = (jnp.zeros((1, critic_obs_size)), jnp.zeros((1, c.NUM_JOINTS)))
    return jax.vmap(lambda k: CRITIC.init(k, *dummy)["params"])(jax.random.split(key, count))


def actor_output(params: dict, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and raw log_std, (..., 12) each."""
    return ACTOR.apply({"params": params}, obs)


def mean_action(params: dict, obs: jax.Array) -> jax.Array:
    """Deterministic action tanh(mean), (..., 12)."""
    return jnp.tanh(actor_output(params, obs)[0])


def sample_action(params: dict, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sampled action (..., 12) and its log-probability (...,); Haarnoja et al. 2018, appendix C."""
    mean, log_std = actor_output(params, obs)
    log_std = jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)
    noise = jax.random.normal(key, mean.shape)
    raw = mean + jnp.exp(log_std) * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    # log(1 - tanh(x)^2) in the form that does not underflow.
    log_prob -= 2 * (jnp.log(2.0) - raw - jax.nn.softplus(-2 * raw))
    return jnp.tanh(raw), log_prob.sum(-1)


def q_values(params: dict, critic_obs: jax.Array, action: jax.Array) -> jax.Array:
    """Values of every critic, (critics, ...)."""
    return jax.vmap(lambda p: CRITIC.apply({"params": p}, critic_obs, action))(params)


def _gain() -> np.ndarray:
    """(87,) by how much more finely than by its spread a feature must be seen.

    A centimetre beside the foot decides a kick, but the ball is metres away much of the time: without these, the
    weights of ball and target (norm of a row) had to grow from 1.7 to 10 and 5.5 in 20 M steps.
    """
    gain = np.ones(OBS_SIZE, np.float32)
    for name, value in (("ball_pos_rel_robot_h", 4.0), ("target_pos_rel_robot_h", 3.0)):
        start = SLICES[name].start
        gain[start : start + 2] = value  # x and y
    return gain


GAIN = _gain()


class Normalizer(NamedTuple):
    """Running mean and variance of observations (Chan et al. 1979), with a gain for some; no clipping."""

    count: jax.Array  # ()
    mean: jax.Array  # (87,)
    squares: jax.Array  # (87,) sum of squared deviations

    MIN_STD = 0.05  # features that hardly vary must not be blown up
    MAX_COUNT = 2e6  # then old samples fade, so that the statistics follow the policy

    @classmethod
    def create(cls, obs_size: int) -> "Normalizer":
        """Zero mean, unit variance, almost no weight."""
        return cls(jnp.array(1e-2), jnp.zeros(obs_size), jnp.full(obs_size, 1e-2))

    @property
    def std(self) -> jax.Array:
        """Standard deviation (87,), at least MIN_STD."""
        return jnp.maximum(jnp.sqrt(self.squares / self.count), self.MIN_STD)

    @property
    def scale(self) -> jax.Array:
        """What observations are divided by (87,): what checkpoints call `normalizer.std`."""
        return self.std / GAIN

    def __call__(self, obs: jax.Array) -> jax.Array:
        """Normalised observations."""
        return (obs - self.mean) / self.scale

    def update(self, obs: jax.Array) -> "Normalizer":
        """Statistics after a batch (B, 87)."""
        fade = jnp.minimum(1.0, self.MAX_COUNT / self.count)
        count, squares = self.count * fade, self.squares * fade
        batch_count = obs.shape[0]
        batch_mean = obs.mean(0)
        delta = batch_mean - self.mean
        total = count + batch_count
        squares = squares + ((obs - batch_mean) ** 2).sum(0) + delta**2 * count * batch_count / total
        return Normalizer(total, self.mean + delta * batch_count / total, squares)


def normalize(normalizer: Normalizer, critic_obs: jax.Array) -> jax.Array:
    """(..., 109) with the policy's part normalised; the rest is of order one as it is."""
    return jnp.concatenate([normalizer(critic_obs[..., :OBS_SIZE]), critic_obs[..., OBS_SIZE:]], axis=-1)


def flatten(prefix: str, params: dict) -> dict[str, np.ndarray]:
    """Nested parameters as checkpoint arrays: `prefix.layer.kernel`."""
    flat = {}
    for name, value in params.items():
        path = f"{prefix}.{name}"
        flat |= flatten(path, value) if isinstance(value, dict) else {path: np.asarray(value)}
    return flat


def unflatten(prefix: str, arrays: dict[str, np.ndarray]) -> dict:
    """Nested parameters from checkpoint arrays."""
    params: dict = {}
    for path, value in arrays.items():
        head, _, rest = path.partition(".")
        if head != prefix:
            continue
        *parents, leaf = rest.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(value)
    return params
