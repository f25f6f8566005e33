"""Collection: every lane acts, the buffer takes what came of it, and the learner its updates.

Two loops with one face: `NativeLoop` (physics on C threads, learning in XLA) and `MjxLoop` (all in one jitted
loop). Both give their whole state as arrays, so that a run can go on exactly where it was.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from booster_soccer.agents.sac import Batch, Sac, SacState, between
from booster_soccer.arrays import check_like, named, restore_rng, rng_array
from booster_soccer.envs import constants as c
from booster_soccer.envs.cores import usable_cores
from booster_soccer.envs.native_engine import NativeEngine
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.randomization import level
from booster_soccer.envs.tasks import StartMix, Tasks, TaskState
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.episode import Outcome, advance, critic_observation
from booster_soccer.store.replay import Replay

# Of one transition, by the names of `Batch`.
ROW_SHAPES = {"critic_obs": (CRITIC_OBS_SIZE,), "action": (c.NUM_JOINTS,), "reward": (),
              "next_critic_obs": (CRITIC_OBS_SIZE,), "terminated": ()}  # fmt: skip


@dataclass(frozen=True)
class CollectConfig:
    """How transitions are gathered and replayed; one step is one policy action in one lane."""

    num_envs: int = 256  # lanes
    buffer_size: int = 1_000_000  # transitions: the last tenth of `cpu`, 1 GB
    batch_size: int = 512
    updates_per_iteration: int = 8  # gradient steps per action of all lanes: 16 samples per transition (g4)
    learning_starts: int = 20_000  # steps with the untrained policy before the first update
    # First to walk and shoot, then to aim: pairs go from the first to the last value between these two steps.
    ramp_steps: tuple[int, int] = (4_000_000, 10_000_000)
    fall_share: tuple[float, float] = (0.1, 1.0)  # of the fall penalty: in full from the start, no step is dared
    first_task_share: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)  # before the ramp; starts.task_share after it
    max_actions: int = 300  # training episodes are cut (not ended) after this many actions
    dr_level: int = 0  # domain randomisation, 0 (none) to 3
    starts: StartMix = StartMix()
    weights: DenseWeights = DenseWeights()


def add_observation_noise(state: SacState, critic_obs: jax.Array, key: jax.Array, std: float) -> jax.Array:
    """Noise of the randomisation level on the policy's part (the first 87), in the normaliser's standard deviations."""
    if std == 0.0:
        return critic_obs
    noise = std * state.normalizer.std * jax.random.normal(key, (*critic_obs.shape[:-1], OBS_SIZE))
    return critic_obs.at[..., :OBS_SIZE].add(noise)


# --- episode statistics ---------------------------------------------------------------------------------


class Statistics:
    """Running sums over finished training episodes and dense terms, emptied at every log line."""

    def __init__(self):
        self.sums: dict[str, jax.Array] = {}

    def add(self, sums: dict[str, jax.Array]) -> None:
        """Add sums of one or more actions (see `iteration_sums`); they stay where they were computed."""
        self.sums = _add(self.sums, sums) if self.sums.keys() == sums.keys() else sums

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


def ramp(config: CollectConfig, steps: jax.Array) -> jax.Array:
    """How far, in [0, 1], the run is on its way between the pairs of its settings."""
    first, last = config.ramp_steps
    return jnp.clip((steps - first) / (last - first), 0.0, 1.0)


def start_mix(config: CollectConfig, progress: jax.Array) -> StartMix:
    """The starts of the moment."""
    shares = map(jnp.asarray, (config.first_task_share, config.starts.task_share))
    return replace(config.starts, task_share=between(tuple(shares), progress))


def lanes_advance(config: CollectConfig, tasks: Tasks):
    """`advance` over lanes, with the fall penalty of the moment."""

    def one(view, task_state, action, progress):
        weights = replace(config.weights, fallen=config.weights.fallen * between(config.fall_share, progress))
        return advance(tasks, view, task_state, action, weights, config.max_actions)

    return jax.vmap(one, in_axes=(0, 0, 0, None))


# --- native engine: physics on C threads, learning in XLA -------------------------------------------------


class NativeLoop:
    """Collection on native MuJoCo threads and updates in XLA, in turn; the buffer lies in host memory."""

    ITERATIONS_PER_CALL = 1

    def __init__(self, config: CollectConfig, sac: Sac, tasks: Tasks, seed: int):
        self.config = config
        self.engine = NativeEngine(config.num_envs, num_threads=usable_cores(), dr_level=config.dr_level,
                                   seed=seed)  # fmt: skip
        self.count = 0  # iterations: every draw has its own number, whatever other lanes do
        self.rng = np.random.default_rng(seed)
        noise = level(config.dr_level).obs_noise_std
        advance_lanes = lanes_advance(config, tasks)
        observe = jax.vmap(functools.partial(critic_observation, tasks))

        # Each jitted function derives its key from the iteration's number, to spare a dispatch per split.
        act_key, noise_key, reset_key = jax.random.split(jax.random.key(seed + 1), 3)

        @jax.jit
        def act(state, obs, count):
            return sac.act(state, obs, jax.random.fold_in(act_key, count))

        @jax.jit
        def after_physics(state, view, task_state, action, count):
            task_state, outcome = advance_lanes(view, task_state, action, ramp(config, count * config.num_envs))
            seen = add_observation_noise(state, outcome.critic_obs, jax.random.fold_in(noise_key, count), noise)
            return (
                task_state,
                outcome._replace(critic_obs=seen),
                iteration_sums(outcome, task_state),
                state.normalizer.update(seen[:, :OBS_SIZE]),
            )

        @jax.jit
        def reset(count):
            keys = jax.random.split(jax.random.fold_in(reset_key, count), config.num_envs)
            mix = start_mix(config, ramp(config, count * config.num_envs))
            return jax.vmap(lambda k: tasks.reset(k, mix))(keys)

        @jax.jit
        def restart(done, fresh, task_state, view, seen):
            task_state = select_lanes(done, fresh, task_state)
            return task_state, select_lanes(done, observe(view, task_state), seen)

        self._act, self._after_physics, self._reset, self._restart = act, after_physics, reset, restart
        self._update = jax.jit(sac.update_many, donate_argnums=0)
        self.replay = Replay(config.buffer_size, ROW_SHAPES)
        qpos, qvel, self.task_state = self._reset(self.count)
        self.engine.reset(np.arange(config.num_envs), np.asarray(qpos), np.asarray(qvel))
        # Each lane's first episode is cut somewhere, so that the lanes do not reset all at once later.
        self._first_cut = self.rng.integers(1, config.max_actions + 1, config.num_envs)
        self.critic_obs = jax.jit(observe)(self.engine.view(), self.task_state)

    @property
    def obs(self) -> jax.Array:
        """Current observations (B, 87)."""
        return self.critic_obs[:, :OBS_SIZE]

    def _sample(self) -> Batch:
        shape = (self.config.updates_per_iteration, self.config.batch_size)
        return Batch(**{name: jnp.asarray(rows) for name, rows in self.replay.sample(self.rng, shape).items()})

    def iterate(self, state: SacState, learn: bool, statistics: Statistics) -> tuple[SacState, dict]:
        """One action in every lane, and the updates that belong to it."""
        self.count += 1
        action = np.asarray(self._act(state, self.obs, self.count))
        self.engine.step(np.asarray(joint_target_rad(action)))
        self.task_state, outcome, sums, normalizer = self._after_physics(
            state, self.engine.view(), self.task_state, action, self.count
        )
        statistics.add(sums)
        state = state._replace(normalizer=normalizer)
        self.replay.add(
            critic_obs=np.asarray(self.critic_obs),
            action=action,
            reward=np.asarray(outcome.reward),
            next_critic_obs=np.asarray(outcome.critic_obs),
            terminated=np.asarray(outcome.terminated, np.float32),
        )
        self.critic_obs = self._reset_done(outcome)
        metrics: dict = {}
        if learn:
            state, metrics = self._update(state, self._sample(), ramp(self.config, self.count * self.config.num_envs))
            jax.block_until_ready(metrics)  # physics threads and XLA's in turn: at once they fight for the cores
        return state, metrics

    def _reset_done(self, outcome: Outcome) -> jax.Array:
        done = np.asarray(outcome.terminated) | np.asarray(outcome.truncated)
        first_cut = np.asarray(self.task_state.action_count) == self._first_cut
        self._first_cut = np.where(done | first_cut, -1, self._first_cut)  # once a lane, never again
        done = done | first_cut
        if not done.any():
            return outcome.critic_obs
        qpos, qvel, fresh = self._reset(self.count)
        lanes = np.flatnonzero(done)
        self.engine.reset(lanes, np.asarray(qpos)[lanes], np.asarray(qvel)[lanes])
        self.task_state, seen = self._restart(done, fresh, self.task_state, self.engine.view(), outcome.critic_obs)
        return seen

    def arrays(self) -> dict[str, np.ndarray]:
        """All that later iterations depend on besides the learner and the buffer's rows."""
        arrays = {f"engine.{name}": values for name, values in self.engine.arrays().items()}
        arrays |= {f"task.{name}": np.asarray(values) for name, values in self.task_state._asdict().items()}
        return arrays | {
            "critic_obs": np.asarray(self.critic_obs),
            "first_cut": self._first_cut,
            "count": np.array(self.count),
            "rng": rng_array(self.rng),
        }

    def restore(self, arrays: dict[str, np.ndarray], replay: Replay) -> None:
        """Go on from what `arrays` gave on a loop of the same settings, with the buffer as it was."""
        check_like(arrays, self.arrays(), "the saved state of the lanes")
        if not 0 <= arrays["count"] < 2**31:
            raise UserError(f"the saved state of the lanes counts {arrays['count']} iterations: use an older one")
        self.engine.restore(named(arrays, "engine."))
        self.task_state = TaskState(**{name: jnp.array(values) for name, values in named(arrays, "task.").items()})
        self.critic_obs = jnp.array(arrays["critic_obs"])
        self._first_cut = arrays["first_cut"].copy()
        self.count = int(arrays["count"])
        restore_rng(self.rng, arrays["rng"])
        self.replay = replay

    def close(self) -> None:
        """Stop the threads."""
        self.engine.close()


# --- MJX: collection and updates in one jitted loop --------------------------------------------------------


class MjxCarry(NamedTuple):
    """What the jitted loop carries besides the learner."""

    data: object  # mjx.Data, leading axis B
    task_state: TaskState
    critic_obs: jax.Array  # (B, 109)
    buffer: Batch  # leading axis = capacity
    added: jax.Array  # () rows ever: the next one goes to this, modulo the capacity
    key: jax.Array


# What a physics step reads of `mjx.Data`, and the sensors that the next observation may read.
_MJX_STATE = ("time", "qpos", "qvel", "qacc_warmstart", "ctrl", "sensordata")


class DeviceReplay:
    """The rows of a ring on the device, as `Segments.write` reads them."""

    def __init__(self, buffer: Batch, added: int):
        self._buffer = buffer
        self.added = added
        self.capacity = len(buffer.reward)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Rows [first, last), counted since the start."""
        where = np.arange(first, last) % self.capacity
        return {name: np.asarray(values[where]) for name, values in self._buffer._asdict().items()}


class MjxLoop:
    """Physics, rules, buffer and updates on one device."""

    ITERATIONS_PER_CALL = 20

    def __init__(self, config: CollectConfig, sac: Sac, tasks: Tasks, seed: int):
        from booster_soccer.envs.mjx_engine import MjxEngine  # slow to import, and not needed where there is no GPU

        self.config = config
        engine = MjxEngine(config.num_envs, config.dr_level, seed)
        noise = level(config.dr_level).obs_noise_std
        n, capacity = config.num_envs, config.buffer_size - config.buffer_size % config.num_envs
        advance_lanes = lanes_advance(config, tasks)
        untouched = jnp.zeros(n, bool)

        def start(key, progress):
            mix = start_mix(config, progress)
            qpos, qvel, task_state = jax.vmap(lambda k: tasks.reset(k, mix))(jax.random.split(key, n))
            data = engine.reset(qpos, qvel)
            observe = jax.vmap(functools.partial(critic_observation, tasks))
            return data, task_state, observe(engine.view(data, untouched), task_state)

        def iterate(carry, learn):
            state, loop = carry
            key, act_key, noise_key, reset_key, sample_key = jax.random.split(loop.key, 5)
            action = sac.act(state, loop.critic_obs[:, :OBS_SIZE], act_key)
            data, touched = engine.step(loop.data, joint_target_rad(action))
            progress = ramp(config, loop.added)
            task_state, outcome = advance_lanes(engine.view(data, touched), loop.task_state, action, progress)
            seen = add_observation_noise(state, outcome.critic_obs, noise_key, noise)
            rows = Batch(loop.critic_obs, action, outcome.reward, seen, outcome.terminated.astype(jnp.float32))
            buffer = jax.tree.map(
                lambda b, x: jax.lax.dynamic_update_slice_in_dim(b, x, loop.added % capacity, 0), loop.buffer, rows
            )
            added = loop.added + n
            filled = jnp.minimum(added, capacity)
            sums = iteration_sums(outcome, task_state)
            state = state._replace(normalizer=state.normalizer.update(seen[:, :OBS_SIZE]))
            index = jax.random.randint(sample_key, (config.updates_per_iteration, config.batch_size), 0, filled)
            batches = jax.tree.map(lambda b: b[index], buffer)
            # One compiled program for both phases: the physics is most of what there is to compile.
            _, shapes = jax.eval_shape(sac.update_many, state, batches, progress)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            state, metrics = jax.lax.cond(learn, sac.update_many, lambda s, *_: (s, nothing), state, batches, progress)
            done = outcome.terminated | outcome.truncated
            fresh_data, fresh_task, fresh_seen = start(reset_key, progress)
            data = select_lanes(done, fresh_data, data)
            task_state = select_lanes(done, fresh_task, task_state)
            seen = select_lanes(done, fresh_seen, seen)
            loop = MjxCarry(data, task_state, seen, buffer, added, key)
            return (state, loop), (sums, metrics)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def run(state, loop, learn):
            (state, loop), (sums, metrics) = jax.lax.scan(
                lambda carry, _: iterate(carry, learn), (state, loop), length=self.ITERATIONS_PER_CALL
            )
            return state, loop, jax.tree.map(jnp.sum, sums), jax.tree.map(jnp.mean, metrics)

        self._run = run
        key, start_key = jax.random.split(jax.random.key(seed + 1))
        data, task_state, seen = jax.jit(start)(start_key, 0.0)
        buffer = Batch(**{name: jnp.zeros((capacity, *shape)) for name, shape in ROW_SHAPES.items()})
        self.loop = MjxCarry(data, task_state, seen, buffer, jnp.int32(0), key)
        self.added = 0  # rows ever

    @property
    def obs(self) -> jax.Array:
        """Current observations (B, 87)."""
        return self.loop.critic_obs[:, :OBS_SIZE]

    def iterate(self, state: SacState, learn: bool, statistics: Statistics) -> tuple[SacState, dict]:
        """`ITERATIONS_PER_CALL` actions in every lane, with their updates."""
        state, self.loop, sums, metrics = self._run(state, self.loop, jnp.array(learn))
        self.added += self.config.num_envs * self.ITERATIONS_PER_CALL
        statistics.add(sums)
        return state, metrics

    @property
    def replay(self) -> "DeviceReplay":
        """The buffer, for saving."""
        return DeviceReplay(self.loop.buffer, self.added)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that later iterations depend on besides the learner and the buffer's rows."""
        arrays = {f"data.{name}": getattr(self.loop.data, name) for name in _MJX_STATE}
        arrays |= {f"task.{name}": values for name, values in self.loop.task_state._asdict().items()}
        arrays |= {"critic_obs": self.loop.critic_obs, "key": jax.random.key_data(self.loop.key)}
        return {name: np.asarray(values) for name, values in arrays.items()}

    def restore(self, arrays: dict[str, np.ndarray], replay: Replay) -> None:
        """Go on from what `arrays` gave on a loop of the same settings, with the buffer as it was."""
        check_like(arrays, self.arrays(), "the saved state of the lanes")
        arrays = {name: jnp.array(values) for name, values in arrays.items()}
        self.added = replay.added
        self.loop = MjxCarry(
            self.loop.data.replace(**named(arrays, "data.")),
            TaskState(**named(arrays, "task.")),
            arrays["critic_obs"],
            Batch(**{name: jnp.array(rows) for name, rows in replay.arrays.items()}),
            jnp.int32(replay.added),
            jax.random.wrap_key_data(arrays["key"]),
        )

    def close(self) -> None:
        """Nothing to stop."""
