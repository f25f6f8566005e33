"""Stage 1: SAC pre-training of one policy for the three tasks, on MJX (GPU) or native MuJoCo threads (CPU).

    python train_mjx_sac.py --preset cpu --out runs/cpu/pretrain
    python train_mjx_sac.py --preset l4 --out runs/l4/pretrain --resume

Input: nothing but the scene. Output: a "pretrained" checkpoint directory at `--out`, holding the policy
with the best evaluation score; next to it `<out>.resume` with the latest training state, and
`<out>.metrics.jsonl` with every log line's numbers.

Soft actor-critic after Haarnoja et al. 2018 (arXiv 1812.05905), with layer norm in the critics and the
mean of both as target and objective (holosoma, arXiv 2512.01996), no entropy bonus in the target, and
mirrored transitions as augmentation. One step is one policy action (50 Hz) in one lane.
"""

import functools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

# These count only if set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import checkpoints
import errors
from envs import constants as c
from envs.episode import Outcome, advance
from envs.native_engine import NativeEngine
from envs.pd import joint_target_rad
from envs.randomization import level
from envs.tasks import StartMix, Tasks, TaskState
from errors import UserError
from models import sac_networks as nets
from preprocess.observation import OBS_SIZE
from preprocess.symmetry import mirror_action, mirror_observation
from rewards.dense import DenseWeights


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The command line sets the first group; a preset sets the rest."""

    out: Path  # checkpoint directory to write
    preset: str = "cpu"  # demo, cpu, l4 or h200
    engine: Literal["auto", "mjx", "native"] = "auto"  # auto: MJX where JAX sees a GPU, else native
    num_envs: int | None = None  # lanes; None takes the preset's
    total_steps: int | None = None  # one step = one action in one lane; None takes the preset's
    seed: int = 0
    dr_level: int = 0  # domain randomisation, 0 (none) to 3
    resume: bool = False  # go on from <out>.resume
    init: Path | None = None  # start from another run's pre-trained checkpoint (networks and normaliser)
    time_limit_s: float = 0.0  # stop cleanly after this much wall time; 0: no limit

    # --- learning: the reasons are in docs/experiments.md
    # None takes the preset's value, also for evaluation_every below.
    batch_size: int | None = None
    updates_per_iteration: int | None = None  # gradient steps per action of all lanes
    buffer_size: int | None = None
    learning_starts: int | None = None  # steps with the untrained policy before the first update
    learning_rate: float = 3e-4
    adam_b2: float = 0.95
    weight_decay: float = 1e-3
    discount: float = 0.98
    target_tau: float = 0.01
    target_entropy: float = -6.0  # half the number of joints
    initial_temperature: float = 0.01
    mirror: bool = True  # mirror half of each batch

    # --- episodes
    max_actions: int = 300  # training episodes are cut (not ended) after this many actions
    starts: StartMix = field(default_factory=StartMix)
    weights: DenseWeights = field(default_factory=DenseWeights)

    # --- evaluation and checkpoints
    evaluation_every: int | None = None  # steps
    evaluation_lanes: int = 96
    checkpoint_every: int = 200_000  # steps, but never more often than every two minutes
    log_every: int = 50_000  # steps


_CPU = {"num_envs": 256, "total_steps": 20_000_000, "batch_size": 512, "updates_per_iteration": 4,
        "buffer_size": 1_000_000, "learning_starts": 20_000, "evaluation_every": 500_000}  # fmt: skip
# Measured times and scores: docs/experiments.md. The GPU presets have not been measured yet.
PRESETS: dict[str, dict[str, int]] = {
    "demo": _CPU | {"total_steps": 700_000, "evaluation_every": 100_000},
    "cpu": _CPU,
    "l4": {"num_envs": 2048, "total_steps": 100_000_000, "batch_size": 8192, "updates_per_iteration": 4,
           "buffer_size": 4_000_000, "learning_starts": 200_000, "evaluation_every": 5_000_000},
    "h200": {"num_envs": 4096, "total_steps": 200_000_000, "batch_size": 16384, "updates_per_iteration": 4,
             "buffer_size": 8_000_000, "learning_starts": 400_000, "evaluation_every": 10_000_000},
}  # fmt: skip


class Batch(NamedTuple):
    """Transitions, leading axes any."""

    obs: jax.Array  # (..., 87)
    action: jax.Array  # (..., 12)
    reward: jax.Array  # (...,)
    next_obs: jax.Array  # (..., 87) the true next observation, also at an episode's end
    terminated: jax.Array  # (...,) 1.0 where no bootstrap may happen


class SacState(NamedTuple):
    """Everything the learner carries."""

    actor: dict
    critic: dict
    target_critic: dict
    log_alpha: jax.Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    normalizer: nets.Normalizer
    key: jax.Array


def resolve(config: Config) -> Config:
    """Apply the preset (explicit values win) and check what can be checked without running."""
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown: use one of {', '.join(PRESETS)}")
    level(config.dr_level)
    chosen = {name: value for name, value in PRESETS[config.preset].items() if getattr(config, name) is None}
    config = replace(config, **chosen)
    for name in ("num_envs", "total_steps", "batch_size", "updates_per_iteration", "max_actions", "evaluation_lanes"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(config, name)}")
    if config.seed < 0:
        raise UserError(f"--seed must not be negative, got {config.seed}")
    if config.buffer_size < config.num_envs:
        raise UserError(f"--buffer-size {config.buffer_size} is less than one action of {config.num_envs} lanes")
    engine = config.engine
    if engine == "auto":
        engine = "mjx" if jax.default_backend() == "gpu" else "native"
    return replace(config, engine=engine)


# --- the learner -------------------------------------------------------------------------------------


class Sac:
    """Pure SAC functions for one configuration."""

    def __init__(self, config: Config):
        self.config = config

        def adam() -> optax.GradientTransformation:
            return optax.adamw(config.learning_rate, b2=config.adam_b2, weight_decay=config.weight_decay)

        self.actor_opt, self.critic_opt = adam(), adam()
        self.alpha_opt = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> SacState:
        """Fresh state."""
        key, actor_key, critic_key = jax.random.split(key, 3)
        actor, critic = nets.init_actor(actor_key, OBS_SIZE), nets.init_critics(critic_key, OBS_SIZE)
        log_alpha = jnp.log(jnp.array(self.config.initial_temperature))
        return SacState(
            actor=actor,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_alpha=log_alpha,
            actor_opt=self.actor_opt.init(actor),
            critic_opt=self.critic_opt.init(critic),
            alpha_opt=self.alpha_opt.init(log_alpha),
            normalizer=nets.Normalizer.create(OBS_SIZE),
            key=key,
        )

    def update(self, state: SacState, batch: Batch) -> tuple[SacState, dict[str, jax.Array]]:
        """One gradient step on a batch (B, ...)."""
        config = self.config
        key, mirror_key, target_key, actor_key = jax.random.split(state.key, 4)
        if config.mirror:
            flip = jax.random.bernoulli(mirror_key, 0.5, batch.reward.shape)[:, None]
            batch = batch._replace(
                obs=jnp.where(flip, mirror_observation(batch.obs), batch.obs),
                action=jnp.where(flip, mirror_action(batch.action), batch.action),
                next_obs=jnp.where(flip, mirror_observation(batch.next_obs), batch.next_obs),
            )
        obs, next_obs = state.normalizer(batch.obs), state.normalizer(batch.next_obs)
        alpha = jnp.exp(state.log_alpha)

        next_action, _ = nets.sample_action(state.actor, next_obs, target_key)
        next_q = nets.q_values(state.target_critic, next_obs, next_action).mean(0)
        target = batch.reward + config.discount * (1.0 - batch.terminated) * next_q

        def critic_loss(params):
            q = nets.q_values(params, obs, batch.action)
            return ((q - target) ** 2).mean(), q.mean()

        (critic_loss_value, q_mean), grads = jax.value_and_grad(critic_loss, has_aux=True)(state.critic)
        updates, critic_opt = self.critic_opt.update(grads, state.critic_opt, state.critic)
        critic = optax.apply_updates(state.critic, updates)

        def actor_loss(params):
            action, log_prob = nets.sample_action(params, obs, actor_key)
            return (alpha * log_prob - nets.q_values(critic, obs, action).mean(0)).mean(), log_prob.mean()

        (actor_loss_value, log_prob), grads = jax.value_and_grad(actor_loss, has_aux=True)(state.actor)
        updates, actor_opt = self.actor_opt.update(grads, state.actor_opt, state.actor)
        actor = optax.apply_updates(state.actor, updates)

        # d/d(log alpha) of -alpha (log_prob + target entropy)
        alpha_grad = -alpha * (log_prob + config.target_entropy)
        updates, alpha_opt = self.alpha_opt.update(alpha_grad, state.alpha_opt)
        tau = config.target_tau
        target_critic = jax.tree.map(lambda t, x: (1 - tau) * t + tau * x, state.target_critic, critic)
        state = SacState(actor, critic, target_critic, optax.apply_updates(state.log_alpha, updates), actor_opt,
                         critic_opt, alpha_opt, state.normalizer, key)  # fmt: skip
        return state, {
            "critic_loss": critic_loss_value,
            "actor_loss": actor_loss_value,
            "q": q_mean,
            "entropy": -log_prob,
            "alpha": alpha,
        }

    def update_many(self, state: SacState, batches: Batch) -> tuple[SacState, dict[str, jax.Array]]:
        """Gradient steps over batches (K, B, ...); metrics are means over K."""
        state, metrics = jax.lax.scan(self.update, state, batches)
        return state, jax.tree.map(jnp.mean, metrics)

    def act(self, state: SacState, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Exploring actions (B, 12) for observations (B, 87)."""
        return nets.sample_action(state.actor, state.normalizer(obs), key)[0]


def add_observation_noise(state: SacState, obs: jax.Array, key: jax.Array, std: float) -> jax.Array:
    """Observation noise of the randomisation level, in units of the normaliser's standard deviation."""
    return obs if std == 0.0 else obs + std * state.normalizer.std * jax.random.normal(key, obs.shape)


# --- episode statistics ---------------------------------------------------------------------------------


class Statistics:
    """Running sums over finished training episodes and dense terms, emptied at every log line."""

    def __init__(self):
        self.sums: dict[str, jax.Array] = {}

    def add(self, sums: dict[str, jax.Array]) -> None:
        """Add sums of one or more actions (see `iteration_sums`); they stay where they were computed."""
        self.sums = _add(self.sums, sums) if self.sums else sums

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        s, self.sums = {name: float(value) for name, value in self.sums.items()}, {}
        steps, episodes = max(s.get("steps", 0.0), 1.0), max(s.get("episodes", 0.0), 1.0)
        out = {f"reward/{k[5:]}": v / steps for k, v in s.items() if k.startswith("term/")}
        out |= {"reward/total": s.get("reward", 0.0) / steps, "episode/length": s.get("length", 0.0) / episodes,
                "episode/fall_rate": s.get("fallen", 0.0) / episodes, "diverged": s.get("diverged", 0.0)}  # fmt: skip
        for task in c.TASKS:
            n = max(s.get(f"episodes/{task}", 0.0), 1.0)
            out[f"episode/success_{task}"] = s.get(f"success/{task}", 0.0) / n
            out[f"episode/score_{task}"] = s.get(f"score/{task}", 0.0) / n
        return out


@jax.jit
def _add(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, a, b)


def iteration_sums(outcome: Outcome, task_state: TaskState) -> dict[str, jax.Array]:
    """Sums over lanes of one action: dense terms, and what the episodes that ended brought."""
    done = outcome.terminated | outcome.truncated
    sums = {f"term/{name}": value.sum() for name, value in outcome.dense_terms.items()}
    sums |= {
        "steps": jnp.float32(done.shape[0]),
        "reward": outcome.reward.sum(),
        "episodes": done.sum(),
        "length": (done * task_state.action_count).sum(),
        "fallen": (done & outcome.fallen).sum(),
        "diverged": outcome.diverged.sum(),
    }
    for index, task in enumerate(c.TASKS):
        ended = done & (task_state.task == index)
        sums |= {f"episodes/{task}": ended.sum(), f"success/{task}": (ended & outcome.success).sum(),
                 f"score/{task}": (ended * outcome.score).sum()}  # fmt: skip
    return {name: jnp.asarray(value, jnp.float32) for name, value in sums.items()}


def select_lanes(done: jax.Array, if_done, if_not):
    """Lane by lane choice between two pytrees with leading axis B."""
    return jax.tree.map(lambda x, y: jnp.where(done.reshape(done.shape + (1,) * (x.ndim - 1)), x, y), if_done, if_not)


# --- native engine: physics on C threads, learning in XLA -------------------------------------------------


class NativeLoop:
    """Collection on native MuJoCo threads and updates in XLA, in turn; the buffer lies in host memory."""

    def __init__(self, config: Config, sac: Sac, tasks: Tasks):
        self.config, self.sac = config, sac
        self.engine = NativeEngine(config.num_envs, num_threads=os.cpu_count() or 2, dr_level=config.dr_level,
                                   seed=config.seed)  # fmt: skip
        key = jax.random.key(config.seed + 1)
        self.count = 0  # calls that drew randomness: every draw has its own number
        self.rng = np.random.default_rng(config.seed)
        noise = level(config.dr_level).obs_noise_std
        advance_lanes = jax.vmap(lambda v, s, a: advance(tasks, v, s, a, config.weights, config.max_actions))
        observe = jax.vmap(tasks.observe)

        # Each jitted function derives its key from the call's number, to spare a dispatch per split.
        @jax.jit
        def act(state, obs, count):
            return sac.act(state, obs, jax.random.fold_in(key, count))

        @jax.jit
        def after_physics(state, view, task_state, action, count):
            task_state, outcome = advance_lanes(view, task_state, action)
            obs = add_observation_noise(state, outcome.obs, jax.random.fold_in(key, count), noise)
            return (
                task_state,
                outcome._replace(obs=obs),
                iteration_sums(outcome, task_state),
                state.normalizer.update(obs),
            )

        @jax.jit
        def reset(count):
            keys = jax.random.split(jax.random.fold_in(key, count), config.num_envs)
            return jax.vmap(lambda k: tasks.reset(k, config.starts))(keys)

        @jax.jit
        def restart(done, fresh, task_state, view, obs):
            task_state = select_lanes(done, fresh, task_state)
            return task_state, select_lanes(done, observe(view, task_state), obs)

        self._act, self._after_physics, self._reset, self._restart = act, after_physics, reset, restart
        self._update = jax.jit(sac.update_many, donate_argnums=0)
        capacity = config.buffer_size
        self.buffer = Batch(
            np.zeros((capacity, OBS_SIZE), np.float32),
            np.zeros((capacity, c.NUM_JOINTS), np.float32),
            np.zeros(capacity, np.float32),
            np.zeros((capacity, OBS_SIZE), np.float32),
            np.zeros(capacity, np.float32),
        )
        self.cursor = self.filled = 0
        qpos, qvel, self.task_state = self._reset(self._next())
        self.engine.reset(np.arange(config.num_envs), np.asarray(qpos), np.asarray(qvel))
        # Each lane's first episode is cut somewhere, so that the lanes do not reset all at once later.
        self._first_cut = self.rng.integers(1, config.max_actions + 1, config.num_envs)
        self.obs = jax.jit(observe)(self.engine.view(), self.task_state)

    def _next(self) -> int:
        self.count += 1
        return self.count

    def _sample(self) -> Batch:
        shape = (self.config.updates_per_iteration, self.config.batch_size)
        rows = self.rng.integers(0, self.filled, shape)
        return Batch(*(jnp.asarray(array[rows]) for array in self.buffer))

    def iterate(self, state: SacState, learn: bool, statistics: Statistics) -> tuple[SacState, dict]:
        """One action in every lane, and the updates that belong to it."""
        action = np.asarray(self._act(state, self.obs, self._next()))
        self.engine.step(np.asarray(joint_target_rad(action)))
        self.task_state, outcome, sums, normalizer = self._after_physics(
            state, self.engine.view(), self.task_state, action, self._next()
        )
        statistics.add(sums)
        state = state._replace(normalizer=normalizer)
        self._store(Batch(np.asarray(self.obs), action, np.asarray(outcome.reward), np.asarray(outcome.obs),
                          np.asarray(outcome.terminated, np.float32)))  # fmt: skip
        self.obs = self._reset_done(outcome)
        metrics: dict = {}
        if learn:
            state, metrics = self._update(state, self._sample())
            jax.block_until_ready(metrics)  # physics threads and XLA's in turn: at once they fight for the cores
        return state, metrics

    def _store(self, batch: Batch) -> None:
        capacity, n = self.config.buffer_size, self.config.num_envs
        rows = (self.cursor + np.arange(n)) % capacity
        for array, values in zip(self.buffer, batch):
            array[rows] = values
        self.cursor, self.filled = (self.cursor + n) % capacity, min(self.filled + n, capacity)

    def _reset_done(self, outcome: Outcome) -> jax.Array:
        done = np.asarray(outcome.terminated) | np.asarray(outcome.truncated)
        first_cut = np.asarray(self.task_state.action_count) == self._first_cut
        self._first_cut = np.where(done | first_cut, -1, self._first_cut)  # once a lane, never again
        done = done | first_cut
        if not done.any():
            return outcome.obs
        qpos, qvel, fresh = self._reset(self._next())
        lanes = np.flatnonzero(done)
        self.engine.reset(lanes, np.asarray(qpos)[lanes], np.asarray(qvel)[lanes])
        self.task_state, obs = self._restart(done, fresh, self.task_state, self.engine.view(), outcome.obs)
        return obs

    def close(self) -> None:
        """Stop the threads."""
        self.engine.close()


# --- MJX: collection and updates in one jitted loop --------------------------------------------------------


class MjxCarry(NamedTuple):
    """What the jitted loop carries besides the learner."""

    data: object  # mjx.Data, leading axis B
    task_state: TaskState
    obs: jax.Array  # (B, 87)
    buffer: Batch  # leading axis = capacity
    cursor: jax.Array
    filled: jax.Array
    key: jax.Array


class MjxLoop:
    """Physics, rules, buffer and updates on one device."""

    ITERATIONS_PER_CALL = 20

    def __init__(self, config: Config, sac: Sac, tasks: Tasks):
        from envs.mjx_engine import MjxEngine

        self.config = config
        engine = MjxEngine(config.num_envs, config.dr_level, config.seed)
        noise = level(config.dr_level).obs_noise_std
        n, capacity = config.num_envs, config.buffer_size - config.buffer_size % config.num_envs
        reset_lanes = jax.vmap(lambda k: tasks.reset(k, config.starts))
        advance_lanes = jax.vmap(lambda v, s, a: advance(tasks, v, s, a, config.weights, config.max_actions))
        untouched = jnp.zeros(n, bool)

        def start(key):
            qpos, qvel, task_state = reset_lanes(jax.random.split(key, n))
            data = engine.reset(qpos, qvel)
            return data, task_state, jax.vmap(tasks.observe)(engine.view(data, untouched), task_state)

        def iterate(carry, learn):
            state, loop = carry
            key, act_key, noise_key, reset_key, sample_key = jax.random.split(loop.key, 5)
            action = sac.act(state, loop.obs, act_key)
            data, touched = engine.step(loop.data, joint_target_rad(action))
            task_state, outcome = advance_lanes(engine.view(data, touched), loop.task_state, action)
            next_obs = add_observation_noise(state, outcome.obs, noise_key, noise)
            rows = Batch(loop.obs, action, outcome.reward, next_obs, outcome.terminated.astype(jnp.float32))
            buffer = jax.tree.map(
                lambda b, x: jax.lax.dynamic_update_slice_in_dim(b, x, loop.cursor, 0), loop.buffer, rows
            )
            filled = jnp.minimum(loop.filled + n, capacity)
            sums = iteration_sums(outcome, task_state)
            state = state._replace(normalizer=state.normalizer.update(next_obs))
            index = jax.random.randint(sample_key, (config.updates_per_iteration, config.batch_size), 0, filled)
            batches = jax.tree.map(lambda b: b[index], buffer)
            # One compiled program for both phases: the physics is most of what there is to compile.
            _, shapes = jax.eval_shape(sac.update_many, state, batches)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            state, metrics = jax.lax.cond(learn, sac.update_many, lambda s, _: (s, nothing), state, batches)
            done = outcome.terminated | outcome.truncated
            fresh_data, fresh_task, fresh_obs = start(reset_key)
            data = select_lanes(done, fresh_data, data)
            task_state = select_lanes(done, fresh_task, task_state)
            obs = select_lanes(done, fresh_obs, next_obs)
            loop = MjxCarry(data, task_state, obs, buffer, (loop.cursor + n) % capacity, filled, key)
            return (state, loop), (sums, metrics)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def run(state, loop, learn):
            (state, loop), (sums, metrics) = jax.lax.scan(
                lambda carry, _: iterate(carry, learn), (state, loop), length=self.ITERATIONS_PER_CALL
            )
            return state, loop, jax.tree.map(jnp.sum, sums), jax.tree.map(jnp.mean, metrics)

        self._run = run
        key, start_key = jax.random.split(jax.random.key(config.seed + 1))
        data, task_state, obs = jax.jit(start)(start_key)
        buffer = Batch(jnp.zeros((capacity, OBS_SIZE)), jnp.zeros((capacity, c.NUM_JOINTS)), jnp.zeros(capacity),
                       jnp.zeros((capacity, OBS_SIZE)), jnp.zeros(capacity))  # fmt: skip
        self.loop = MjxCarry(data, task_state, obs, buffer, jnp.int32(0), jnp.int32(0), key)

    @property
    def obs(self) -> jax.Array:
        """Current observations (B, 87)."""
        return self.loop.obs

    def iterate(self, state: SacState, learn: bool, statistics: Statistics) -> tuple[SacState, dict]:
        """`ITERATIONS_PER_CALL` actions in every lane, with their updates."""
        state, self.loop, sums, metrics = self._run(state, self.loop, jnp.array(learn))
        statistics.add(sums)
        return state, metrics

    def close(self) -> None:
        """Nothing to stop."""


# --- evaluation in our own scene ---------------------------------------------------------------------------


class Evaluator:
    """Deterministic policy from official starts with joint noise, in our scene under native MuJoCo.

    An estimate while training; the score that counts is taken in the official environment (`evaluate.py`).
    """

    def __init__(self, config: Config, tasks: Tasks):
        self.lanes = config.evaluation_lanes
        self.engine = NativeEngine(self.lanes, num_threads=os.cpu_count() or 2)
        mix = StartMix(task_share=(1 / 3, 1 / 3, 1 / 3), official_pose=1.0, official_place=1.0, joint_noise_rad=0.035)

        def reset_lane(key, task):
            # Draw until the lane's own task comes up: the first of 32 draws that fits.
            draws = jax.vmap(lambda k: tasks.reset(k, mix))(jax.random.split(key, 32))
            pick = jnp.argmax(draws[2].task == task)
            return jax.tree.map(lambda x: x[pick], draws)

        self._reset = jax.jit(jax.vmap(reset_lane))
        self._observe = jax.jit(jax.vmap(tasks.observe))
        self._act = jax.jit(lambda actor, normalizer, obs: nets.mean_action(actor, normalizer(obs)))
        self._advance = jax.jit(jax.vmap(lambda v, s, a: advance(tasks, v, s, a, config.weights, c.EPISODE_ACTIONS)))

    def __call__(self, state: SacState) -> dict[str, float]:
        """Mean official score, success, fall rate and length per task, always on the same starts."""
        task = np.arange(self.lanes) % c.NUM_TASKS
        qpos, qvel, task_state = self._reset(jax.random.split(jax.random.key(12345), self.lanes), jnp.asarray(task))
        self.engine.reset(np.arange(self.lanes), np.asarray(qpos), np.asarray(qvel))
        obs = self._observe(self.engine.view(), task_state)
        alive = np.ones(self.lanes, bool)
        score, length = np.zeros(self.lanes), np.zeros(self.lanes)
        fallen, success = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        for _ in range(c.EPISODE_ACTIONS):
            action = np.asarray(self._act(state.actor, state.normalizer, obs))
            self.engine.step(np.asarray(joint_target_rad(action)))
            task_state, outcome = self._advance(self.engine.view(), task_state, action)
            obs, outcome = outcome.obs, jax.device_get(outcome)
            ends = alive & (outcome.terminated | outcome.truncated)
            score[ends], fallen[ends], success[ends] = outcome.score[ends], outcome.fallen[ends], outcome.success[ends]
            length += alive
            alive &= ~ends
            if not alive.any():
                break
        result = {}
        for index, name in enumerate(c.TASKS):
            mine = task == index
            result |= {f"eval/score_{name}": score[mine].mean(), f"eval/success_{name}": success[mine].mean(),
                       f"eval/fall_rate_{name}": fallen[mine].mean(), f"eval/actions_{name}": length[mine].mean()}  # fmt: skip
        result["eval/score"] = float(np.mean([result[f"eval/score_{name}"] for name in c.TASKS]))
        return {name: float(value) for name, value in result.items()}

    def close(self) -> None:
        """Stop the threads."""
        self.engine.close()


# --- checkpoints ---------------------------------------------------------------------------------------------


def policy_arrays(state: SacState) -> dict[str, np.ndarray]:
    """The arrays the next stages read."""
    arrays = nets.flatten("actor", state.actor) | nets.flatten("critic", state.critic)
    arrays |= nets.flatten("target_critic", state.target_critic)
    arrays |= {"normalizer.mean": state.normalizer.mean, "normalizer.std": state.normalizer.std,
               "log_alpha": state.log_alpha}  # fmt: skip
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def resume_arrays(state: SacState) -> dict[str, np.ndarray]:
    """All of the learner's state, leaves numbered in tree order."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return {f"leaf_{i:03d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


def restore(state: SacState, arrays: dict[str, np.ndarray]) -> SacState:
    """The learner's state from `resume_arrays`, in the structure of a fresh `state`."""
    template = state._replace(key=jax.random.key_data(state.key))
    leaves, structure = jax.tree.flatten(template)
    loaded = [jnp.asarray(arrays[f"leaf_{i:03d}"], leaf.dtype) for i, leaf in enumerate(leaves)]
    if any(a.shape != b.shape for a, b in zip(leaves, loaded)):
        raise UserError("the resume state was written by another network: start without --resume")
    restored = jax.tree.unflatten(structure, loaded)
    return restored._replace(key=jax.random.wrap_key_data(restored.key))


def config_dict(config: Config) -> dict:
    """The configuration as plain JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def write_checkpoint(path: Path, config: Config, state: SacState, steps: int, metrics: dict, golden_obs: np.ndarray,
                     extra: dict | None = None) -> None:  # fmt: skip
    """Write the policy (and, for resuming, the learner) with golden pairs taken from real observations."""
    golden_obs = np.resize(np.asarray(golden_obs, np.float32), (16, OBS_SIZE))  # fewer lanes repeat
    actions = nets.mean_action(state.actor, state.normalizer(jnp.asarray(golden_obs)))
    checkpoints.save(path, "pretrained", policy_arrays(state), golden_obs, np.asarray(actions, np.float32),
                     config_dict(config), config.seed, steps, None, metrics, extra or {}, overwrite=True)  # fmt: skip


def record(out: Path, numbers: dict[str, float]) -> None:
    """Append one line of numbers to `<out>.metrics.jsonl`."""
    path = out.with_name(out.name + ".metrics.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({name: round(float(value), 6) for name, value in numbers.items()}) + "\n")


def find_resume(config: Config, path: Path) -> checkpoints.Checkpoint | None:
    """The saved state to go on from, or None for a new run; a new run never goes over an old one."""
    exists = any(p.exists() for p in (path, path.with_name(f"{path.name}.previous")))
    if config.resume:
        if exists:
            return checkpoints.load_latest(path, ("pretrained",))
        if (config.out / checkpoints.MANIFEST).exists():
            raise UserError(
                f"{config.out} holds a policy but no state to resume from: move it away or name another --out"
            )
        print(f"{path} is not there: starting from the beginning", flush=True)
    checkpoints.check_output_dir(config.out)
    if exists or (config.out / checkpoints.MANIFEST).exists():
        raise UserError(f"{config.out} holds a run: give --resume to go on with it, or another --out")
    return None


# --- main ----------------------------------------------------------------------------------------------------


def main(config: Config) -> Path:
    """Train; returns the checkpoint directory."""
    config = resolve(config)
    resume_path = config.out.with_name(config.out.name + ".resume")
    saved = find_resume(config, resume_path)
    tasks, sac = Tasks(), Sac(config)
    state = sac.init(jax.random.key(config.seed))
    steps, best_score = 0, -np.inf
    if saved is not None:
        state = restore(state, checkpoints.load_extra(saved, "learner"))
        steps = saved.manifest["steps"]
        best_score = saved.manifest["metrics"]["best_score"]
        best_score = -np.inf if best_score is None else best_score  # not finite is written as null
        if (config.out / checkpoints.MANIFEST).exists():  # may be newer than the state
            best_score = max(
                best_score, checkpoints.load(config.out, ("pretrained",)).manifest["metrics"]["best_score"]
            )
        if steps >= config.total_steps:
            print(f"{config.out} is finished already, at step {steps:,}\n{config.out}")
            return config.out
        print(f"resuming at step {steps:,}; the replay buffer is refilled with the restored policy", flush=True)
    elif config.init is not None:
        state = warm_start(state, checkpoints.load(config.init, ("pretrained",)).arrays)
    loop = (NativeLoop if config.engine == "native" else MjxLoop)(config, sac, tasks)
    evaluator, statistics = Evaluator(config, tasks), Statistics()
    print(
        f"{config.preset}: {config.engine} engine, {config.num_envs} lanes, {config.total_steps:,} steps, seed {config.seed}",
        flush=True,
    )

    started = last_checkpoint_s = time.monotonic()
    first_step, last_log, last_eval, last_save = steps, steps, steps, steps
    metrics: dict = {}
    bar = tqdm(
        total=config.total_steps,
        initial=steps,
        unit="step",
        unit_scale=True,
        mininterval=5,
        disable=not sys.stderr.isatty(),
    )
    while True:
        collected = steps - first_step
        state, learned = loop.iterate(state, collected >= config.learning_starts, statistics)
        metrics = learned or metrics
        advance_by = config.num_envs * getattr(loop, "ITERATIONS_PER_CALL", 1)
        steps += advance_by
        bar.update(advance_by)
        elapsed = time.monotonic() - started
        finished = steps >= config.total_steps or (config.time_limit_s and elapsed >= config.time_limit_s)

        save_due = steps - last_save >= config.checkpoint_every and time.monotonic() - last_checkpoint_s >= 120
        log_due = steps - last_log >= config.log_every
        if (log_due or save_due or finished) and not np.isfinite(float(metrics.get("critic_loss", 0.0))):
            bar.close()
            raise UserError(
                f"training diverged before step {steps:,}: the critic loss is not finite; what {config.out} and {resume_path} "
                "hold is older and good: go on from there with another --seed or a lower learning rate"
            )
        if log_due or finished:
            last_log = steps
            line = statistics.take() | {k: float(v) for k, v in metrics.items()}
            rate = (steps - first_step) / elapsed
            record(config.out, {"step": steps, "wall_s": elapsed, "steps_per_s": rate} | line)
            scores = " ".join(f"{line[f'episode/score_{task}']:+.2f}" for task in c.TASKS)
            successes = " ".join(f"{line[f'episode/success_{task}']:.2f}" for task in c.TASKS)
            tqdm.write(
                f"{elapsed:6.0f}s {steps / 1e6:6.2f}M {rate:6.0f}/s len {line['episode/length']:5.1f} fall {line['episode/fall_rate']:.2f}"
                f" score {scores} success {successes}"
                f" rew {line['reward/total']:+.3f} q {line.get('q', 0):+.2f} loss {line.get('critic_loss', 0):.3f}"
                f" H {line.get('entropy', 0):+.1f} alpha {line.get('alpha', 0):.4f}"
            )
            sys.stdout.flush()
        if steps - last_eval >= config.evaluation_every or finished:
            last_eval = steps
            result = evaluator(state)
            record(config.out, {"step": steps, "wall_s": time.monotonic() - started} | result)
            tqdm.write(
                f"  eval at {steps:,}: score {result['eval/score']:+.3f} | "
                + " | ".join(
                    f"{t} {result['eval/score_' + t]:+.2f} success {result['eval/success_' + t]:.2f}"
                    f" fall {result['eval/fall_rate_' + t]:.2f} {result['eval/actions_' + t]:.0f} actions"
                    for t in c.TASKS
                )
            )
            sys.stdout.flush()
            if result["eval/score"] > best_score:
                best_score = result["eval/score"]
                write_checkpoint(config.out, config, state, steps, result | {"best_score": best_score}, loop.obs)
        if save_due or finished:
            last_save, last_checkpoint_s = steps, time.monotonic()
            write_checkpoint(resume_path, config, state, steps, {"best_score": best_score}, loop.obs,
                             {"learner": resume_arrays(state)})  # fmt: skip
        if finished:
            break
    bar.close()
    loop.close()
    evaluator.close()
    print(config.out)
    return config.out


def warm_start(state: SacState, arrays: dict[str, np.ndarray]) -> SacState:
    """A fresh learner with another run's networks and normaliser."""
    std, count = arrays["normalizer.std"], jnp.array(nets.Normalizer.MAX_COUNT)
    normalizer = nets.Normalizer(count, jnp.asarray(arrays["normalizer.mean"]), jnp.asarray(std) ** 2 * count)
    return state._replace(
        actor=nets.unflatten("actor", arrays),
        critic=nets.unflatten("critic", arrays),
        target_critic=nets.unflatten("target_critic", arrays),
        log_alpha=jnp.asarray(arrays["log_alpha"]),
        normalizer=normalizer,
    )


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config))
