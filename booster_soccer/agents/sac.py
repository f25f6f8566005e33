"""The soft actor-critic learner: pure functions on one immutable state.

After Haarnoja et al. 2018 (arXiv 1812.05905), with layer norm in the critics and the mean of both as target
and objective (holosoma, arXiv 2512.01996), no entropy bonus in the target, and mirrored transitions as
augmentation. The critics see more than the policy (`preprocess/privileged.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from booster_soccer.agents import sac_networks as nets
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, mirror_critic_observation
from booster_soccer.preprocess.symmetry import mirror_action


class Settings(Protocol):
    """What the learner reads from a script's configuration."""

    learning_rate: tuple[float, float]  # at the start, and at the end of the ramp
    adam_b2: float
    weight_decay: float
    discount: tuple[float, float]  # likewise
    target_tau: float
    policy_tau: float
    target_entropy: tuple[float, float]  # likewise
    initial_temperature: float
    mirror: bool  # mirror half of each batch
    imitation: tuple[float, float]  # likewise; share of the teachers in the actor's loss, where there are any


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
    policy: dict  # running average of the actor: what is evaluated and shipped
    critic: dict
    target_critic: dict
    log_alpha: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    normalizer: nets.Normalizer
    key: jax.Array


class Teachers(NamedTuple):
    """Other runs' policies, one per task on a leading axis."""

    actor: dict
    mean: jax.Array  # (tasks, 87) of the observation
    scale: jax.Array  # (tasks, 87)

    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and clipped log_std, (B, 12) each, of the task's teacher for observations (B, 87) as they are."""

        def of_one(actor, mean, scale):
            return nets.actor_output(actor, (obs - mean) / scale)

        outputs = jax.vmap(of_one)(self.actor, self.mean, self.scale)
        one_hot = obs[:, SLICES["task_one_hot"]]
        mean, log_std = (jnp.einsum("tbj,bt->bj", output, one_hot) for output in outputs)
        return mean, jnp.clip(log_std, nets.LOG_STD_MIN, nets.LOG_STD_MAX)


class Sac:
    """Pure SAC functions for one configuration.

    With teachers, the actor first imitates and then follows the critics (kickstarting, Schmitt et al. 2018,
    arXiv 1803.03835): they are asked in the states that the actor itself gets into.
    """

    def __init__(self, config: Settings, teachers: Teachers | None = None):
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
        actor, critic = nets.init_actor(actor_key, OBS_SIZE), nets.init_critics(critic_key, CRITIC_OBS_SIZE)
        log_alpha = jnp.log(jnp.array(self.config.initial_temperature))
        return SacState(
            actor=actor,
            policy=jax.tree.map(jnp.copy, actor),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_alpha=log_alpha,
            actor_opt=self.actor_opt.init(actor),
            critic_opt=self.critic_opt.init(critic),
            alpha_opt=self.alpha_opt.init(log_alpha),
            normalizer=nets.Normalizer.create(OBS_SIZE),
            key=key,
        )

    def update(self, state: SacState, batch: Batch, ramp: jax.Array) -> tuple[SacState, dict[str, jax.Array]]:
        """One gradient step on a batch (B, ...), at `ramp` () in [0, 1] of the way between the settings' pairs."""
        config = self.config
        pairs = (config.learning_rate, config.discount, config.target_entropy)
        learning_rate, discount, target_entropy = (between(pair, ramp) for pair in pairs)
        key, mirror_key, target_key, actor_key = jax.random.split(state.key, 4)
        if config.mirror:
            flip = jax.random.bernoulli(mirror_key, 0.5, batch.reward.shape)[:, None]
            batch = batch._replace(
                critic_obs=jnp.where(flip, mirror_critic_observation(batch.critic_obs), batch.critic_obs),
                action=jnp.where(flip, mirror_action(batch.action), batch.action),
                next_critic_obs=jnp.where(
                    flip, mirror_critic_observation(batch.next_critic_obs), batch.next_critic_obs
                ),
            )
        critic_obs = nets.normalize(state.normalizer, batch.critic_obs)
        next_critic_obs = nets.normalize(state.normalizer, batch.next_critic_obs)
        obs, next_obs = critic_obs[:, :OBS_SIZE], next_critic_obs[:, :OBS_SIZE]
        alpha = jnp.exp(state.log_alpha)

        next_action, _ = nets.sample_action(state.actor, next_obs, target_key)
        next_q = nets.q_values(state.target_critic, next_critic_obs, next_action).mean(0)
        target = batch.reward + discount * (1.0 - batch.terminated) * next_q

        def critic_loss(params):
            q = nets.q_values(params, critic_obs, batch.action)
            return ((q - target) ** 2).mean(), q.mean()

        (critic_loss_value, q_mean), grads = jax.value_and_grad(critic_loss, has_aux=True)(state.critic)
        updates, critic_opt = self.critic_opt.update(grads, state.critic_opt, state.critic)
        critic = _apply(state.critic, updates, learning_rate)

        taught_share = 0.0 if self.teachers is None else between(config.imitation, ramp)

        def actor_loss(params):
            action, log_prob = nets.sample_action(params, obs, actor_key)
            loss = (alpha * log_prob - nets.q_values(critic, critic_obs, action).mean(0)).mean()
            metrics = {"actor_loss": loss, "entropy": -log_prob.mean()}
            if self.teachers is not None:
                taught = self.teachers(batch.critic_obs[:, :OBS_SIZE])
                divergence = gaussian_kl(taught, nets.actor_output(params, obs)).mean()
                loss = (1.0 - taught_share) * loss + taught_share * divergence
                metrics["teacher_kl"] = divergence
            return loss, metrics

        (_, metrics), grads = jax.value_and_grad(actor_loss, has_aux=True)(state.actor)
        updates, actor_opt = self.actor_opt.update(grads, state.actor_opt, state.actor)
        actor = _apply(state.actor, updates, learning_rate)

        # d/d(log alpha) of -alpha (log_prob + target entropy)
        alpha_grad = -alpha * (target_entropy - metrics["entropy"])
        updates, alpha_opt = self.alpha_opt.update(alpha_grad, state.alpha_opt)
        state = SacState(
            actor=actor,
            policy=_toward(state.policy, actor, config.policy_tau),
            critic=critic,
            target_critic=_toward(state.target_critic, critic, config.target_tau),
            # Imitation decides the entropy where it decides the actor: the temperature waits.
            log_alpha=_apply(state.log_alpha, updates, (1.0 - taught_share) * learning_rate),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            alpha_opt=alpha_opt,
            normalizer=state.normalizer,
            key=key,
        )
        return state, metrics | {"critic_loss": critic_loss_value, "q": q_mean, "alpha": alpha}

    def update_many(self, state: SacState, batches: Batch, ramp: jax.Array) -> tuple[SacState, dict[str, jax.Array]]:
        """Gradient steps over batches (K, B, ...); metrics are means over K."""
        state, metrics = jax.lax.scan(lambda s, batch: self.update(s, batch, ramp), state, batches)
        return state, jax.tree.map(jnp.mean, metrics)

    def act(self, state: SacState, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Exploring actions (B, 12) for observations (B, 87)."""
        return nets.sample_action(state.actor, state.normalizer(obs), key)[0]


def gaussian_kl(p: tuple[jax.Array, jax.Array], q: tuple[jax.Array, jax.Array]) -> jax.Array:
    """KL(p || q) of diagonal Gaussians given by mean and log_std (..., n) each; (...,). q's log_std is not clipped."""
    (p_mean, p_log_std), (q_mean, q_log_std) = p, q
    ratio = jnp.exp(2.0 * (p_log_std - q_log_std)) + ((p_mean - q_mean) / jnp.exp(q_log_std)) ** 2
    return (q_log_std - p_log_std + 0.5 * (ratio - 1.0)).sum(-1)


def between(first_and_last: tuple[float, float], ramp: jax.Array) -> jax.Array:
    """The value at `ramp` in [0, 1] of the way from the first to the last."""
    first, last = first_and_last
    return first + ramp * (last - first)


def _apply(params, updates, learning_rate: jax.Array):
    return jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)


def _toward(average: dict, new: dict, tau: float) -> dict:
    """The running average one step of `tau` nearer to the new parameters."""
    return jax.tree.map(lambda a, x: (1 - tau) * a + tau * x, average, new)


def policy_arrays(state: SacState) -> dict[str, np.ndarray]:
    """The arrays of a "pretrained" checkpoint, which the next stages read."""
    arrays = nets.flatten("actor", state.policy) | nets.flatten("critic", state.critic)
    arrays |= nets.flatten("target_critic", state.target_critic)
    arrays |= {"normalizer.mean": state.normalizer.mean, "normalizer.std": state.normalizer.scale,
               "log_alpha": state.log_alpha}  # fmt: skip
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def teachers_from(arrays: Sequence[dict[str, np.ndarray]]) -> Teachers:
    """The policies of "pretrained" checkpoints, in the order of the tasks."""
    actors = [nets.unflatten("actor", one) for one in arrays]
    mean, scale = (jnp.stack([one[f"normalizer.{name}"] for one in arrays]) for name in ("mean", "std"))
    return Teachers(jax.tree.map(lambda *leaves: jnp.stack(leaves), *actors), mean, scale)


def warm_start(state: SacState, arrays: dict[str, np.ndarray]) -> SacState:
    """A fresh learner with another run's networks and normaliser."""
    std, count = jnp.asarray(arrays["normalizer.std"]) * nets.GAIN, jnp.array(nets.Normalizer.MAX_COUNT)
    normalizer = nets.Normalizer(count, jnp.asarray(arrays["normalizer.mean"]), std**2 * count)
    return state._replace(
        actor=nets.unflatten("actor", arrays),
        policy=nets.unflatten("actor", arrays),
        critic=nets.unflatten("critic", arrays),
        target_critic=nets.unflatten("target_critic", arrays),
        log_alpha=jnp.asarray(arrays["log_alpha"]),
        normalizer=normalizer,
    )


def state_arrays(state: SacState) -> dict[str, np.ndarray]:
    """All of the learner's state, leaves numbered in tree order."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return {f"leaf_{i:03d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


def restore(state: SacState, arrays: dict[str, np.ndarray]) -> SacState:
    """The learner's state from `state_arrays`, in the structure of a fresh `state`."""
    template = state._replace(key=jax.random.key_data(state.key))
    leaves, structure = jax.tree.flatten(template)
    loaded = [arrays.get(f"leaf_{i:03d}") for i in range(len(leaves))]
    for leaf, array in zip(leaves, loaded):
        if array is None or (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise UserError("the saved learner is another network's: use the code that wrote it, or another --out")
    restored = jax.tree.unflatten(structure, [jnp.array(array) for array in loaded])
    return restored._replace(key=jax.random.wrap_key_data(restored.key))
