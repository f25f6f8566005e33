"""Soft actor-critic in JAX (Flax, Optax): networks, losses, update, and the learner's state as arrays.

After Haarnoja et al. 2018 (arXiv 1812.05905), with layer norm in the critics and the mean of both as target
and objective (holosoma, arXiv 2512.01996), no entropy bonus in the target, and mirrored transitions as
augmentation. The critics see more than the policy (`preprocess/privileged.py`). With teachers, the actor first imitates
and then follows the critics (kickstarting, Schmitt et al. 2018, arXiv 1803.03835): they are asked in the states that
the actor itself gets into.

Everything is pure functions on one immutable `SacState`. Layers are named `input`, `hidden`, `output` (and
`input_norm`, `hidden_norm` in the critics); the names are those of the checkpoint's arrays and of `agents/ddpg.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from booster_soccer.agents.policy import HIDDEN, LOG_STD_CLIP
from booster_soccer.arrays import check_like
from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, mirror_critic_observation
from booster_soccer.preprocess.symmetry import mirror_action

NUM_CRITICS = 2
# About the spread that the target entropy of -6 asks for: exploration starts around the held default pose
# instead of flailing.
_INITIAL_LOG_STD = -1.8


@dataclass(frozen=True)
class SacConfig:
    """The learner. Pairs go from the first to the last value along the ramp; reasons: docs/experiments.md."""

    learning_rate: tuple[float, float] = (3e-4, 1e-4)  # of actor, critics and temperature
    adam_b2: float = 0.95  # this, the next and target_tau: as in the trial that this began with, not varied
    weight_decay: float = 1e-3  # AdamW's, of actor and critics
    discount: tuple[float, float] = (0.97, 0.99)  # later it pays to take one's time before a kick
    target_tau: float = 0.01  # of the target critics
    policy_tau: float = 0.0003  # of the average that is judged and shipped: 3,300 gradient steps, 0.1 M of `cpu`
    target_entropy: tuple[float, float] = (-6.0, -14.0)  # half the number of joints, then a steady hand
    initial_temperature: float = 0.01  # small, or noise drowns the first gait
    imitation: tuple[float, float] = (1.0, 0.0)  # of the teachers, if any, in the actor's loss
    mirror: bool = True  # mirror half of each batch: the robot's legs are alike to 0.5 %


def between(first_and_last: tuple[float, float], ramp: jax.Array) -> jax.Array:
    """The value at `ramp` in [0, 1] of the way from the first to the last."""
    first, last = first_and_last
    return first + ramp * (last - first)


# --- networks -----------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """Normalised observation (..., 87) to mean and raw log_std (..., 12) each."""

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.silu(nn.Dense(HIDDEN, name="input")(obs))
        x = nn.silu(nn.Dense(HIDDEN, name="hidden")(x))
        # Near-zero start: the first policy is centred on the default pose.
        small = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
        start = nn.initializers.constant(np.repeat([0.0, _INITIAL_LOG_STD], c.NUM_JOINTS))
        output = nn.Dense(2 * c.NUM_JOINTS, kernel_init=small, bias_init=start, name="output")
        mean, log_std = jnp.split(output(x), 2, axis=-1)
        return mean, log_std


class Critic(nn.Module):
    """Q of normalised observation and privileged numbers (..., 109), and action (..., 12): (...,)."""

    @nn.compact
    def __call__(self, critic_obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([critic_obs, action], axis=-1)
        x = nn.silu(nn.LayerNorm(epsilon=1e-6, name="input_norm")(nn.Dense(HIDDEN, name="input")(x)))
        x = nn.silu(nn.LayerNorm(epsilon=1e-6, name="hidden_norm")(nn.Dense(HIDDEN, name="hidden")(x)))
        return nn.Dense(1, name="output")(x)[..., 0]


def init_actor(key: jax.Array) -> dict:
    """Actor parameters."""
    return Actor().init(key, jnp.zeros((1, OBS_SIZE)))["params"]


def init_critics(key: jax.Array) -> dict:
    """Parameters of the critics, stacked on a leading axis."""
    dummy = (jnp.zeros((1, CRITIC_OBS_SIZE)), jnp.zeros((1, c.NUM_JOINTS)))
    return jax.vmap(lambda k: Critic().init(k, *dummy)["params"])(jax.random.split(key, NUM_CRITICS))


def actor_output(params: dict, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and raw log_std, (..., 12) each."""
    return Actor().apply({"params": params}, obs)


def mean_action(params: dict, obs: jax.Array) -> jax.Array:
    """Deterministic action tanh(mean), (..., 12)."""
    return jnp.tanh(actor_output(params, obs)[0])


def sample_action(params: dict, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sampled action (..., 12) and its log-probability (...,); Haarnoja et al. 2018, appendix C."""
    mean, log_std = actor_output(params, obs)
    log_std = jnp.clip(log_std, *LOG_STD_CLIP)
    noise = jax.random.normal(key, mean.shape)
    raw = mean + jnp.exp(log_std) * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    # log(1 - tanh(x)^2) in the form that does not underflow.
    log_prob -= 2 * (jnp.log(2.0) - raw - jax.nn.softplus(-2 * raw))
    return jnp.tanh(raw), log_prob.sum(-1)


def q_values(params: dict, critic_obs: jax.Array, action: jax.Array) -> jax.Array:
    """Values of every critic, (critics, ...)."""
    return jax.vmap(lambda p: Critic().apply({"params": p}, critic_obs, action))(params)


# --- normaliser -----------------------------------------------------------------------------------------------


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
_MIN_STD = 0.05  # features that hardly vary must not be blown up
_MAX_COUNT = 2e6  # then old samples fade, so that the statistics follow the policy


class Normalizer(NamedTuple):
    """Running mean and variance of observations (Chan et al. 1979), with a gain for some; no clipping."""

    count: jax.Array  # ()
    mean: jax.Array  # (87,)
    squares: jax.Array  # (87,) sum of squared deviations

    @classmethod
    def create(cls) -> "Normalizer":
        """Zero mean, unit variance, almost no weight."""
        return cls(jnp.float32(1e-2), jnp.zeros(OBS_SIZE), jnp.full(OBS_SIZE, 1e-2, jnp.float32))

    @property
    def std(self) -> jax.Array:
        """Standard deviation (87,), at least 0.05."""
        return jnp.maximum(jnp.sqrt(self.squares / self.count), _MIN_STD)

    @property
    def scale(self) -> jax.Array:
        """What observations are divided by (87,): what checkpoints call `normalizer.std`."""
        return self.std / GAIN

    def __call__(self, obs: jax.Array) -> jax.Array:
        """Normalised observations (..., 87)."""
        return (obs - self.mean) / self.scale

    def critic(self, critic_obs: jax.Array) -> jax.Array:
        """(..., 109) with the policy's part normalised; the rest is of order one as it is."""
        return jnp.concatenate([self(critic_obs[..., :OBS_SIZE]), critic_obs[..., OBS_SIZE:]], axis=-1)

    def update(self, obs: jax.Array) -> "Normalizer":
        """Statistics after a batch (B, 87)."""
        fade = jnp.minimum(1.0, _MAX_COUNT / self.count)
        count, squares = self.count * fade, self.squares * fade
        batch_count = obs.shape[0]
        batch_mean = obs.mean(0)
        delta = batch_mean - self.mean
        total = count + batch_count
        squares = squares + ((obs - batch_mean) ** 2).sum(0) + delta**2 * count * batch_count / total
        return Normalizer(total, self.mean + delta * batch_count / total, squares)


# --- what the learner carries -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions, leading axes any."""

    critic_obs: jax.Array  # (..., 109) the policy's observation, then what only the critics see
    action: jax.Array  # (..., 12)
    reward: jax.Array  # (...,)
    next_critic_obs: jax.Array  # (..., 109) what truly came next, also at an episode's end
    terminated: jax.Array  # (...,) 1.0 where no bootstrap may happen


class SacState(NamedTuple):
    """Everything the learner carries."""

    actor: dict  # what explores and learns
    policy: dict  # running average of the actor: what is judged and shipped
    critic: dict
    target_critic: dict
    log_alpha: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    normalizer: Normalizer
    key: jax.Array


class Teachers(NamedTuple):
    """Other runs' policies, one per task on a leading axis."""

    actor: dict
    mean: jax.Array  # (tasks, 87) of the observation
    scale: jax.Array  # (tasks, 87)

    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and clipped log_std, (B, 12) each, of the task's teacher for observations (B, 87) as they are."""

        def of_one(actor, mean, scale):
            return actor_output(actor, (obs - mean) / scale)

        outputs = jax.vmap(of_one)(self.actor, self.mean, self.scale)
        one_hot = obs[:, SLICES["task_one_hot"]]
        mean, log_std = (jnp.einsum("tbj,bt->bj", output, one_hot) for output in outputs)
        return mean, jnp.clip(log_std, *LOG_STD_CLIP)


# --- losses: one function each -------------------------------------------------------------------------------------


def critic_target(state: SacState, batch: Batch, next_critic_obs: jax.Array, discount, key: jax.Array) -> jax.Array:
    """y = r + discount (1 - terminated) mean_i Q'_i(s', a'), a' ~ pi(s'); (B,). Haarnoja et al. 2018, eq. 5.

    Without the entropy bonus, and with the mean of the target critics.
    """
    next_action, _ = sample_action(state.actor, next_critic_obs[:, :OBS_SIZE], key)
    next_q = q_values(state.target_critic, next_critic_obs, next_action).mean(0)
    return batch.reward + discount * (1.0 - batch.terminated) * next_q


def critic_loss(params: dict, critic_obs: jax.Array, action: jax.Array, target: jax.Array) -> tuple:
    """mean (Q_i(s, a) - y)^2 over critics and batch, and the mean value."""
    q = q_values(params, critic_obs, action)
    return ((q - target) ** 2).mean(), q.mean()


def actor_loss(params: dict, critic: dict, critic_obs: jax.Array, alpha: jax.Array, key: jax.Array) -> tuple:
    """mean alpha log pi(a|s) - mean_i Q_i(s, a), a ~ pi(s) reparametrised (eq. 7), and the policy's entropy."""
    action, log_prob = sample_action(params, critic_obs[:, :OBS_SIZE], key)
    loss = (alpha * log_prob - q_values(critic, critic_obs, action).mean(0)).mean()
    return loss, -log_prob.mean()


def gaussian_kl(p: tuple[jax.Array, jax.Array], q: tuple[jax.Array, jax.Array]) -> jax.Array:
    """KL(p || q) of diagonal Gaussians given by mean and log_std (..., n) each; (...,). q's log_std is not clipped."""
    (p_mean, p_log_std), (q_mean, q_log_std) = p, q
    ratio = jnp.exp(2.0 * (p_log_std - q_log_std)) + ((p_mean - q_mean) / jnp.exp(q_log_std)) ** 2
    return (q_log_std - p_log_std + 0.5 * (ratio - 1.0)).sum(-1)


# --- update ---------------------------------------------------------------------------------------------------------


class Sac:
    """Pure SAC functions for one configuration."""

    def __init__(self, config: SacConfig, teachers: Teachers | None = None):
        self.config = config
        self.teachers = teachers

        # A learning rate of one: `_apply` brings that of the moment.
        def adam() -> optax.GradientTransformation:
            return optax.adamw(1.0, b2=config.adam_b2, weight_decay=config.weight_decay)

        self.actor_opt, self.critic_opt = adam(), adam()
        self.alpha_opt = optax.adam(1.0)

    def init(self, key: jax.Array) -> SacState:
        """Fresh state."""
        key, actor_key, critic_key = jax.random.split(key, 3)
        actor, critic = init_actor(actor_key), init_critics(critic_key)
        # Typed: a bare Python number would make the first update another program than all that follow.
        log_alpha = jnp.log(jnp.float32(self.config.initial_temperature))
        return SacState(
            actor=actor,
            policy=jax.tree.map(jnp.copy, actor),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_alpha=log_alpha,
            actor_opt=self.actor_opt.init(actor),
            critic_opt=self.critic_opt.init(critic),
            alpha_opt=self.alpha_opt.init(log_alpha),
            normalizer=Normalizer.create(),
            key=key,
        )

    def update(self, state: SacState, batch: Batch, ramp: jax.Array) -> tuple[SacState, dict[str, jax.Array]]:
        """One gradient step on a batch (B, ...), at `ramp` () in [0, 1] of the way between the settings' pairs."""
        config = self.config
        pairs = (config.learning_rate, config.discount, config.target_entropy)
        learning_rate, discount, target_entropy = (between(pair, ramp) for pair in pairs)
        key, mirror_key, target_key, actor_key = jax.random.split(state.key, 4)
        if config.mirror:
            batch = _mirror_half(batch, mirror_key)
        critic_obs = state.normalizer.critic(batch.critic_obs)
        alpha = jnp.exp(state.log_alpha)

        target = critic_target(state, batch, state.normalizer.critic(batch.next_critic_obs), discount, target_key)
        (loss_value, q_mean), grads = jax.value_and_grad(critic_loss, has_aux=True)(
            state.critic, critic_obs, batch.action, target
        )
        updates, critic_opt = self.critic_opt.update(grads, state.critic_opt, state.critic)
        critic = _apply(state.critic, updates, learning_rate)

        taught_share = 0.0 if self.teachers is None else between(config.imitation, ramp)

        def objective(params):
            loss, entropy = actor_loss(params, critic, critic_obs, alpha, actor_key)
            metrics = {"actor_loss": loss, "entropy": entropy}
            if self.teachers is not None:
                taught = self.teachers(batch.critic_obs[:, :OBS_SIZE])
                divergence = gaussian_kl(taught, actor_output(params, critic_obs[:, :OBS_SIZE])).mean()
                loss = (1.0 - taught_share) * loss + taught_share * divergence
                metrics["teacher_kl"] = divergence
            return loss, metrics

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.actor)
        updates, actor_opt = self.actor_opt.update(grads, state.actor_opt, state.actor)
        actor = _apply(state.actor, updates, learning_rate)

        # d/d(log alpha) of -alpha (log_prob + target entropy); eq. 18
        alpha_grad = -alpha * (target_entropy - metrics["entropy"])
        updates, alpha_opt = self.alpha_opt.update(alpha_grad, state.alpha_opt)
        state = state._replace(
            actor=actor,
            policy=_toward(state.policy, actor, config.policy_tau),
            critic=critic,
            target_critic=_toward(state.target_critic, critic, config.target_tau),
            # Imitation decides the entropy where it decides the actor: the temperature waits.
            log_alpha=_apply(state.log_alpha, updates, (1.0 - taught_share) * learning_rate),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            alpha_opt=alpha_opt,
            key=key,
        )
        return state, metrics | {"critic_loss": loss_value, "q": q_mean, "alpha": alpha}

    def update_many(self, state: SacState, batches: Batch, ramp: jax.Array) -> tuple[SacState, dict[str, jax.Array]]:
        """Gradient steps over batches (K, B, ...); metrics are means over K."""
        state, metrics = jax.lax.scan(lambda s, batch: self.update(s, batch, ramp), state, batches)
        return state, jax.tree.map(jnp.mean, metrics)

    @staticmethod
    def act(state: SacState, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Exploring actions (B, 12) for observations (B, 87)."""
        return sample_action(state.actor, state.normalizer(obs), key)[0]


def _mirror_half(batch: Batch, key: jax.Array) -> Batch:
    """Each transition mirrored with probability one half."""
    flip = jax.random.bernoulli(key, 0.5, batch.reward.shape)[:, None]
    return batch._replace(
        critic_obs=jnp.where(flip, mirror_critic_observation(batch.critic_obs), batch.critic_obs),
        action=jnp.where(flip, mirror_action(batch.action), batch.action),
        next_critic_obs=jnp.where(flip, mirror_critic_observation(batch.next_critic_obs), batch.next_critic_obs),
    )


def _apply(params, updates, learning_rate: jax.Array):
    return jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)


def _toward(average: dict, new: dict, tau: float) -> dict:
    """The running average one step of `tau` nearer to the new parameters."""
    return jax.tree.map(lambda a, x: (1 - tau) * a + tau * x, average, new)


# --- state to arrays and back -----------------------------------------------------------------------------------------


def flatten(prefix: str, params: dict) -> dict[str, np.ndarray]:
    """Nested parameters as checkpoint arrays: `prefix.layer.kernel`."""
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        path = f"{prefix}.{name}"
        flat |= flatten(path, value) if isinstance(value, dict) else {path: np.asarray(value)}
    return flat


def unflatten(prefix: str, arrays: dict[str, np.ndarray]) -> dict:
    """Nested parameters from checkpoint arrays."""
    params: dict = {}
    for path, value in arrays.items():
        head, _, rest = path.partition(".")
        if head == prefix:
            layer, leaf = rest.split(".")
            params.setdefault(layer, {})[leaf] = jnp.asarray(value)
    return params


def policy_arrays(state: SacState) -> dict[str, np.ndarray]:
    """The arrays of a "pretrained" checkpoint, which the next stages read."""
    arrays = flatten("actor", state.policy) | flatten("critic", state.critic)
    arrays |= flatten("target_critic", state.target_critic)
    arrays |= {"normalizer.mean": state.normalizer.mean, "normalizer.std": state.normalizer.scale,
               "log_alpha": state.log_alpha}  # fmt: skip
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def teachers_from(arrays: Sequence[dict[str, np.ndarray]]) -> Teachers:
    """The policies of "pretrained" checkpoints, in the order of the tasks."""
    actors = [unflatten("actor", one) for one in arrays]
    mean, scale = (jnp.stack([one[f"normalizer.{name}"] for one in arrays]) for name in ("mean", "std"))
    return Teachers(jax.tree.map(lambda *leaves: jnp.stack(leaves), *actors), mean, scale)


def warm_start(state: SacState, arrays: dict[str, np.ndarray]) -> SacState:
    """A fresh learner with another run's networks and normaliser."""
    std, count = jnp.asarray(arrays["normalizer.std"]) * GAIN, jnp.array(_MAX_COUNT)
    return state._replace(
        actor=unflatten("actor", arrays),
        policy=unflatten("actor", arrays),
        critic=unflatten("critic", arrays),
        target_critic=unflatten("target_critic", arrays),
        log_alpha=jnp.asarray(arrays["log_alpha"]),
        normalizer=Normalizer(count, jnp.asarray(arrays["normalizer.mean"]), std**2 * count),
    )


def state_arrays(state: SacState) -> dict[str, np.ndarray]:
    """All of the learner's state, leaves numbered in tree order."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return {f"leaf_{i:03d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


def restore(state: SacState, arrays: dict[str, np.ndarray]) -> SacState:
    """The learner's state from `state_arrays`, in the structure of a fresh `state`."""
    check_like(arrays, state_arrays(state), "the saved learner")
    leaves = [jnp.array(arrays[name]) for name in sorted(arrays)]
    restored = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return restored._replace(key=jax.random.wrap_key_data(restored.key))
