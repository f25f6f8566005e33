"""Collection: every lane acts, the buffer takes what came of it, and the learner its updates.

What happens in an iteration besides the physics is one body (`Iteration`), pure functions of the lanes and of the
iteration's number. Two loops drive it: `NativeLoop` (physics on C threads, learning in XLA) and `MjxLoop` (all in one
jitted loop). Both give their whole state as arrays, so that a run can go on exactly where it was.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from booster_soccer.agents.sac import Batch, Sac, SacState, between
from booster_soccer.arrays import check_like, named, restore_rng, rng_array
from booster_soccer.cores import usable_cores
from booster_soccer.envs import constants as c
from booster_soccer.envs.native_engine import NativeEngine
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.randomization import level
from booster_soccer.envs.tasks import StartMix, Tasks, TaskState, View
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.device_replay import DeviceReplay, Ring, SavedRows
from booster_soccer.rollout.episode import Outcome, advance, critic_observation
from booster_soccer.store.replay import Replay

# Of one transition, by the names of `Batch`.
ROW_SHAPES = {"critic_obs": (CRITIC_OBS_SIZE,), "action": (c.NUM_JOINTS,), "reward": (),
              "next_critic_obs": (CRITIC_OBS_SIZE,), "terminated": ()}  # fmt: skip


@dataclass(frozen=True)
class CollectConfig:
    """How transitions are gathered and replayed; one step is one policy action in one lane."""

    num_envs: int = 256  # lanes
    devices: int = 1  # GPUs over which MJX's lanes, buffer and batches are split; a resumed run may have another number
    buffer_size: int = 1_000_000  # transitions: the last tenth of `cpu`, 1 GB
    batch_size: int = 512  # transitions of a gradient step
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


# --- one body for both engines ------------------------------------------------------------------------------


class Lanes(NamedTuple):
    """What lanes carry besides their physics, leading axis B."""

    task_state: TaskState
    critic_obs: jax.Array  # (B, 109) as the learner sees it: with the randomisation level's noise
    first_cut: jax.Array  # (B,) int32 action at which the lane's first episode is cut; -1 after that


def select_lanes(done: jax.Array, if_done, if_not):
    """Lane by lane choice between two pytrees with leading axis B."""
    return jax.tree.map(lambda x, y: jnp.where(done.reshape(done.shape + (1,) * (x.ndim - 1)), x, y), if_done, if_not)


class Iteration:
    """One action of all lanes but for the physics. `count` numbers the iterations from 1; 0 is the start.

    Every draw has its own key, made from `count`, so that no draw depends on what happened before.
    """

    def __init__(self, config: CollectConfig, sac: Sac, tasks: Tasks, seed: int):
        self.config, self.sac, self.tasks = config, sac, tasks
        self.noise_std = level(config.dr_level).obs_noise_std
        self._keys = jax.random.split(jax.random.key(seed + 1), 4)

    def _key(self, purpose: int, count: jax.Array) -> jax.Array:
        return jax.random.fold_in(self._keys[purpose], count)

    def ramp(self, count: jax.Array) -> jax.Array:
        """How far, in [0, 1], the run is on its way between the pairs of its settings."""
        first, last = self.config.ramp_steps
        return jnp.clip((count * self.config.num_envs - first) / (last - first), 0.0, 1.0)

    def act(self, state: SacState, lanes: Lanes, count: jax.Array) -> jax.Array:
        """Exploring actions (B, 12)."""
        return self.sac.act(state, lanes.critic_obs[:, :OBS_SIZE], self._key(0, count))

    def start(self, count: jax.Array) -> tuple[jax.Array, jax.Array, TaskState]:
        """Fresh starts for all lanes, drawn from the starts of the moment: qpos, qvel and task state."""
        shares = (jnp.asarray(self.config.first_task_share), jnp.asarray(self.config.starts.task_share))
        mix = replace(self.config.starts, task_share=between(shares, self.ramp(count)))
        keys = jax.random.split(self._key(2, count), self.config.num_envs)
        return jax.vmap(lambda key: self.tasks.reset(key, mix))(keys)

    def observe(self, state: SacState, view: View, task_state: TaskState, count: jax.Array) -> jax.Array:
        """What the learner sees (B, 109) of lanes that have just started."""
        critic_obs = jax.vmap(functools.partial(critic_observation, self.tasks))(view, task_state)
        return self._with_noise(state, critic_obs, self._key(3, count))

    def _with_noise(self, state: SacState, critic_obs: jax.Array, key: jax.Array) -> jax.Array:
        """Noise of the randomisation level on the policy's part, in the normaliser's standard deviations."""
        if self.noise_std == 0.0:
            return critic_obs
        noise = self.noise_std * state.normalizer.std * jax.random.normal(key, (*critic_obs.shape[:-1], OBS_SIZE))
        return critic_obs.at[..., :OBS_SIZE].add(noise)

    def after(self, state: SacState, lanes: Lanes, view: View, action: jax.Array, count: jax.Array):
        """What actions (B, 12) brought, from the view after the physics.

        Returns the learner's state (its normaliser has seen more), the lanes, which of them ended (B,), the
        transitions, and the sums for the log.
        """
        fall_share = between(self.config.fall_share, self.ramp(count))
        weights = replace(self.config.weights, fallen=self.config.weights.fallen * fall_share)
        task_state, outcome = jax.vmap(
            lambda view, task_state, action: advance(
                self.tasks, view, task_state, action, weights, self.config.max_actions
            )
        )(view, lanes.task_state, action)
        seen = self._with_noise(state, outcome.critic_obs, self._key(1, count))
        rows = Batch(lanes.critic_obs, action, outcome.reward, seen, outcome.terminated.astype(jnp.float32))
        # Each lane's first episode is cut somewhere, so that the lanes do not reset all at once later.
        first_cut = task_state.action_count == lanes.first_cut
        done = outcome.terminated | outcome.truncated | first_cut
        lanes = Lanes(task_state, seen, jnp.where(done, -1, lanes.first_cut))
        state = state._replace(normalizer=state.normalizer.update(seen[:, :OBS_SIZE]))
        return state, lanes, done, rows, iteration_sums(outcome, task_state)

    def restart(
        self, state: SacState, lanes: Lanes, done: jax.Array, task_state: TaskState, view: View, count
    ) -> Lanes:
        """The lanes after fresh starts of those that ended."""
        task_state = select_lanes(done, task_state, lanes.task_state)
        fresh = self.observe(state, view, task_state, count)
        return Lanes(task_state, select_lanes(done, fresh, lanes.critic_obs), lanes.first_cut)


def first_cuts(config: CollectConfig, rng: np.random.Generator) -> np.ndarray:
    """Where each lane's first episode is cut, (B,) int32."""
    return rng.integers(1, config.max_actions + 1, config.num_envs).astype(np.int32)


def lane_arrays(lanes: Lanes) -> dict[str, np.ndarray]:
    """Lanes by name."""
    arrays = {f"task.{name}": values for name, values in lanes.task_state._asdict().items()}
    arrays |= {"critic_obs": lanes.critic_obs, "first_cut": lanes.first_cut}
    return {name: np.asarray(values) for name, values in arrays.items()}


def lanes_from(arrays: dict[str, np.ndarray]) -> Lanes:
    """Lanes from `lane_arrays`."""
    task_state = {name: jnp.array(values) for name, values in named(arrays, "task.").items()}
    return Lanes(TaskState(**task_state), jnp.array(arrays["critic_obs"]), jnp.array(arrays["first_cut"]))


# --- native engine: physics on C threads, learning in XLA -------------------------------------------------


class NativeLoop:
    """Collection on native MuJoCo threads and updates in XLA; the buffer lies in host memory.

    On a CPU in turn: its cores are full. A GPU gets an iteration's updates before the physics begin, always of the rows
    up to the action before, so that a run stays reproducible."""

    ITERATIONS_PER_CALL = 1

    def __init__(self, config: CollectConfig, sac: Sac, tasks: Tasks, seed: int, state: SacState):
        self.config = config
        self.engine = NativeEngine(config.num_envs, num_threads=usable_cores(), dr_level=config.dr_level, seed=seed)
        self.count: int  # iterations
        self.rng = np.random.default_rng(seed)
        body = Iteration(config, sac, tasks, seed)
        self.overlaps = jax.default_backend() != "cpu"
        self._ramp = jax.jit(body.ramp)
        self._act, self._after = jax.jit(body.act), jax.jit(body.after)
        self._start, self._restart = jax.jit(body.start), jax.jit(body.restart)
        self._update = jax.jit(sac.update_many, donate_argnums=0)
        self._observe = jax.jit(body.observe)
        self.begin(state, 0)

    def begin(self, state: SacState, count: int) -> None:
        """Fresh starts in all lanes, and an empty buffer, after `count` iterations; what ramps is that far then."""
        self.count, config = count, self.config
        self.replay = Replay(config.buffer_size, ROW_SHAPES)
        qpos, qvel, task_state = self._start(count)
        self.engine.reset(np.arange(config.num_envs), np.asarray(qpos), np.asarray(qvel))
        seen = self._observe(state, self.engine.view(), task_state, count)
        self.lanes = Lanes(task_state, seen, jnp.asarray(first_cuts(config, self.rng)))

    def _sample(self) -> Batch:
        shape = (self.config.updates_per_iteration, self.config.batch_size)
        return Batch(**{name: jnp.asarray(rows) for name, rows in self.replay.sample(self.rng, shape).items()})

    def iterate(self, state: SacState, learn: bool, statistics: Statistics) -> tuple[SacState, dict]:
        """One action in every lane, and the updates that belong to it."""
        self.count += 1
        metrics: dict = {}
        overlaps = self.overlaps and len(self.replay) > 0
        action = np.asarray(self._act(state, self.lanes, self.count))
        if learn and overlaps:
            state, metrics = self._update(state, self._sample(), self._ramp(self.count))
        self.engine.step(np.asarray(joint_target_rad(action)))
        before = state  # all noise of an iteration is of one normaliser
        state, self.lanes, done, rows, sums = self._after(before, self.lanes, self.engine.view(), action, self.count)
        statistics.add(sums)
        self.replay.add(**{name: np.asarray(values) for name, values in rows._asdict().items()})
        ended = np.flatnonzero(np.asarray(done))
        if len(ended):
            qpos, qvel, task_state = self._start(self.count)
            self.engine.reset(ended, np.asarray(qpos)[ended], np.asarray(qvel)[ended])
            self.lanes = self._restart(before, self.lanes, done, task_state, self.engine.view(), self.count)
        if learn and not overlaps:
            state, metrics = self._update(state, self._sample(), self._ramp(self.count))
            jax.block_until_ready(metrics)
        return state, metrics

    def arrays(self) -> dict[str, np.ndarray]:
        """All that later iterations depend on besides the learner and the buffer's rows."""
        arrays = {f"engine.{name}": values for name, values in self.engine.arrays().items()}
        return arrays | lane_arrays(self.lanes) | {"count": np.array(self.count), "rng": rng_array(self.rng)}

    def restore(self, arrays: dict[str, np.ndarray], replay: Replay) -> None:
        """Go on from what `arrays` gave on a loop of the same settings, with the buffer as it was."""
        check_like(arrays, self.arrays(), "the saved state of the lanes")
        if not 0 <= arrays["count"] < 2**31:
            raise UserError(
                f"the saved state of the lanes counts {arrays['count']} iterations: use an older one; {More.RUN}"
            )
        self.engine.restore(named(arrays, "engine."))
        self.lanes, self.count = lanes_from(arrays), int(arrays["count"])
        restore_rng(self.rng, arrays["rng"])
        self.replay = replay

    def close(self) -> None:
        """Stop the threads."""
        self.engine.close()


# --- MJX: collection and updates in one jitted loop --------------------------------------------------------


class MjxCarry(NamedTuple):
    """What the jitted loop carries besides the learner."""

    physics: Any  # MjxState, whose module is slow to import
    lanes: Lanes
    buffer: Ring
    count: jax.Array  # () iterations
    first: jax.Array  # () those before the buffer's first row: 0, unless the run went on with a new buffer


class MjxLoop:
    """Physics, rules, buffer and updates on GPUs: each has its share of the lanes, their rows and every batch.

    All have the whole learner, and gradients are means over all: one program, which XLA splits (`jax.sharding`).
    """

    ITERATIONS_PER_CALL = 20

    def __init__(self, config: CollectConfig, sac: Sac, tasks: Tasks, seed: int, state: SacState):
        from booster_soccer.envs.mjx_engine import MjxEngine  # slow to import, and not needed where there is no GPU

        self.config, self.sac = config, sac
        self.engine = MjxEngine(config.num_envs, config.dr_level, seed)
        self.body = Iteration(config, sac, tasks, seed)
        rows = config.buffer_size // config.num_envs
        self._replay = DeviceReplay(rows, config.num_envs, config.devices, config.max_actions)
        self._sample_key = jax.random.key(seed)
        self._rng = np.random.default_rng(seed)
        mesh = jax.make_mesh((config.devices,), ("lanes",), (AxisType.Auto,), devices=jax.devices()[: config.devices])
        whole, lanes, ring = (NamedSharding(mesh, spec) for spec in (P(), P("lanes"), P(None, "lanes")))
        self._places = (whole, MjxCarry(lanes, lanes, ring, whole, whole))  # of the learner and the carry
        self._flags = jax.device_put((False, True), whole)  # there already
        self._run = jax.jit(self._iterations, donate_argnums=(0, 1), out_shardings=(*self._places, whole, whole))
        self._begin, self._observe = jax.jit(self._start), jax.jit(self.body.observe)
        self.begin(state, 0)

    def begin(self, state: SacState, count: int) -> None:
        """Fresh starts in all lanes, and an empty buffer, after `count` iterations; what ramps is that far then."""
        physics, task_state, view = self._begin(count)
        seen = self._observe(state, view, task_state, count)
        cuts = jnp.asarray(first_cuts(self.config, self._rng))
        buffer = self._replay.empty(self._places[1].buffer)
        self.carry = MjxCarry(physics, Lanes(task_state, seen, cuts), buffer, jnp.int32(count), jnp.int32(count))

    def _start(self, count: jax.Array):
        """Fresh starts for all lanes: physics, task state and view."""
        qpos, qvel, task_state = self.body.start(count)
        physics = self.engine.reset(qpos, qvel)
        view = self.engine.view(physics, jnp.zeros(self.config.num_envs, bool))
        return physics, task_state, view

    def _iterate(self, state: SacState, carry: MjxCarry, learn: jax.Array):
        """One action in every lane, and its updates."""
        body = self.body
        count = carry.count + 1
        action = body.act(state, carry.lanes, count)
        physics, touched = self.engine.step(carry.physics, joint_target_rad(action))
        before = state  # all noise of an iteration is of one normaliser
        view = self.engine.view(physics, touched)
        state, lanes, done, rows, sums = body.after(before, carry.lanes, view, action, count)
        fresh, task_state, view = self._start(count)
        physics = select_lanes(done, fresh, physics)
        lanes = body.restart(before, lanes, done, task_state, view, count)

        added, truncated = carry.count - carry.first, done & (rows.terminated == 0.0)
        buffer = self._replay.add(carry.buffer, added, rows, truncated, lanes.critic_obs)
        config, key = self.config, jax.random.fold_in(self._sample_key, count)
        batches = self._replay.sample(buffer, added + 1, key, config.updates_per_iteration, config.batch_size)
        ramp = body.ramp(count)
        # One compiled program for both phases: the physics is most of what there is to compile.
        _, shapes = jax.eval_shape(self.sac.update_many, state, batches, ramp)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state, metrics = jax.lax.cond(learn, self.sac.update_many, lambda s, *_: (s, nothing), state, batches, ramp)
        return state, MjxCarry(physics, lanes, buffer, count, carry.first), (sums, metrics)

    def _iterations(self, state: SacState, carry: MjxCarry, learn: jax.Array):
        def one(both, _):
            state, carry = both
            state, carry, out = self._iterate(state, carry, learn)
            return (state, carry), out

        (state, carry), (sums, metrics) = jax.lax.scan(one, (state, carry), length=self.ITERATIONS_PER_CALL)
        return state, carry, jax.tree.map(jnp.sum, sums), jax.tree.map(jnp.mean, metrics)

    @property
    def lanes(self) -> Lanes:
        """The lanes now."""
        return self.carry.lanes

    def iterate(self, state: SacState, learn: bool, statistics: Statistics) -> tuple[SacState, dict]:
        """`ITERATIONS_PER_CALL` actions in every lane, with their updates."""
        state, carry = jax.device_put((state, self.carry), self._places)  # what is new lies on the first device
        state, self.carry, sums, metrics = self._run(state, carry, self._flags[learn])
        jax.block_until_ready(metrics)  # a step that is counted is done: for the watchdog, and for a save on SIGTERM
        statistics.add(sums)
        return state, metrics

    @property
    def replay(self) -> SavedRows:
        """The buffer, for saving."""
        return SavedRows(self._replay, self.carry.buffer, int(self.carry.count - self.carry.first))

    def arrays(self) -> dict[str, np.ndarray]:
        """All that later iterations depend on besides the learner and the buffer's rows."""
        arrays = {f"physics.{name}": np.asarray(values) for name, values in self.carry.physics._asdict().items()}
        return arrays | lane_arrays(self.lanes) | {"count": np.asarray(self.carry.count)}

    def restore(self, arrays: dict[str, np.ndarray], replay: Replay) -> None:
        """Go on from what `arrays` gave on a loop of the same settings, with the buffer as it was."""
        check_like(arrays, self.arrays(), "the saved state of the lanes")
        saved = {name: jnp.array(values) for name, values in named(arrays, "physics.").items()}
        buffer = self._replay.refilled(replay.arrays, replay.added // self.config.num_envs, arrays["critic_obs"])
        count = jnp.asarray(arrays["count"])
        physics = self.carry.physics._replace(**saved)
        self.carry = MjxCarry(physics, lanes_from(arrays), buffer, count, jnp.zeros_like(count))

    def close(self) -> None:
        """Nothing to stop."""
