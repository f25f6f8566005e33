"""Rows P1, P2, P4 and P10 of `bench.py`: what pre-training needs, against the bare physics and another library."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from booster_soccer import runtime

runtime.prepare()

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import rollout

from benchmarks.pairs import Line, NotHere, compare, in_turn, per_s, rate, ratios
from booster_soccer.agents.policy import HIDDEN
from booster_soccer.agents.sac import Batch, Sac, SacConfig, SacState
from booster_soccer.cores import usable_cores
from booster_soccer.envs import constants as c
from booster_soccer.envs.native_engine import NativeEngine
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.scene import load_native_model
from booster_soccer.envs.tasks import Tasks
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.rollout.collect import ROW_SHAPES, CollectConfig, MjxLoop, NativeLoop, Statistics

_BUFFER_ACTIONS = 400  # of each lane: no more of the buffer is ever touched here
_SETTLE = 40  # actions before anything counts: robots walk, fall and start anew by then
_PIECE = 10  # actions of one measurement, native
_BATCH, _STEPS, _CALLS = 512, 8, 10  # of one measurement of P4: preset `cpu`, ten iterations' worth
LANES, THREADS, BATCHES = (64, 256, 1024), (1, 2), (128, 512, 2048, 8192)  # of P10
_LANE_ACTIONS = 5_120  # of one measurement in P10, whatever the number of lanes
_SAMPLES = 16_384  # of one measurement in P10, whatever the batch
_KNEE = 0.9  # of the best


def _learner() -> tuple[Sac, SacState]:
    learner = Sac(SacConfig())
    return learner, learner.init(jax.random.key(0))


def _settings(lanes: int) -> CollectConfig:
    return CollectConfig(num_envs=lanes, buffer_size=_BUFFER_ACTIONS * lanes)


# --- P1: MJX ------------------------------------------------------------------------------------------------


def mjx_loop(config) -> list[Line]:
    """P1: `MjxLoop.iterate` without updates against `MjxEngine.step` alone, a scan of ten `mjx.step`, both jitted.

    The bare side sets out from the states that the loop has just set out from, with actions of the same policy.
    """
    lanes, (learner, state) = config.mjx_lanes, _learner()
    loop = MjxLoop(_settings(lanes), learner, Tasks(), 0, state)
    actions = loop.ITERATIONS_PER_CALL
    keys = jax.random.split(jax.random.key(1), actions)
    acting = jax.vmap(lambda key: learner.act(state, loop.lanes.critic_obs[:, :OBS_SIZE], key))
    targets_rad = jax.jit(lambda keys: joint_target_rad(acting(keys)))(keys)  # (actions, B, 12)
    held = {"state": state}

    @jax.jit
    def bare(physics, targets_rad):
        return jax.lax.scan(lambda now, target: (loop.engine.step(now, target)[0], None), physics, targets_rad)[0]

    def iterate():
        held["state"], _ = loop.iterate(held["state"], False, Statistics())

    def ours() -> float:
        held["physics"] = jax.tree.map(jnp.copy, loop.carry.physics)  # the loop overwrites its own
        return per_s(physics_steps, iterate)

    def peer() -> float:
        return per_s(physics_steps, lambda: jax.block_until_ready(bare(held["physics"], targets_rad)))

    physics_steps = actions * lanes * c.PHYSICS_STEPS_PER_ACTION
    for _ in range(_SETTLE // actions):
        iterate()
    pairs = in_turn(ours, peer, config.repeats)
    device = jax.devices()[0].device_kind
    return [
        compare("P1", f"MJX training step without updates, {lanes} lanes, on {device}, physics steps/s", pairs,
                "steps/s", "bare scan of `mjx.step`", ">= 0.90")
    ]  # fmt: skip


# --- P2: native threads ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _native_loop(lanes: int) -> Iterator[tuple[NativeLoop, Callable[[int], None]]]:
    """A loop whose lanes have spread out, and what plays a number of its iterations without updates."""
    learner, state = _learner()
    loop, held = NativeLoop(_settings(lanes), learner, Tasks(), 0, state), {"state": state}

    def iterate(count: int) -> None:
        for _ in range(count):
            held["state"], _ = loop.iterate(held["state"], False, Statistics())

    try:
        iterate(_SETTLE)
        yield loop, iterate
    finally:
        loop.close()


def native_loop(config) -> list[Line]:
    """P2: `NativeLoop.iterate` without updates against the very same physics steps in bare `mujoco.rollout`.

    The bare side plays from each action's recorded states with the recorded action; restarts are the loop's own.
    """
    lanes, threads, model = config.native_lanes, usable_cores(), load_native_model()
    pool, datas = rollout.Rollout(nthread=threads), [mujoco.MjData(model) for _ in range(threads)]
    states: list[np.ndarray] = []
    physics_steps = _PIECE * lanes * c.PHYSICS_STEPS_PER_ACTION
    with pool, _native_loop(lanes) as (loop, iterate):

        def play() -> None:
            for _ in range(_PIECE):
                states.append(loop.engine.state.copy())
                iterate(1)

        def replay(controls: list[np.ndarray]) -> None:
            for state, control in zip(states, controls, strict=True):
                pool.rollout([model], datas, state, control, nstep=c.PHYSICS_STEPS_PER_ACTION)

        def ours() -> float:
            states.clear()
            return per_s(physics_steps, play)

        def peer() -> float:
            added, buffer = loop.replay.added, loop.replay
            firsts = range(added - _PIECE * lanes, added, lanes)
            targets_rad = (joint_target_rad(buffer.rows(first, first + lanes)["action"]) for first in firsts)
            controls = [np.repeat(np.asarray(target_rad, np.float64)[:, None], c.PHYSICS_STEPS_PER_ACTION, axis=1)
                        for target_rad in targets_rad]  # fmt: skip
            return per_s(physics_steps, lambda: replay(controls))

        pairs = in_turn(ours, peer, config.repeats)
    return [
        compare("P2", f"native training step without updates, {lanes} lanes, threads: {threads}, physics steps/s",
                pairs, "steps/s", "bare `mujoco.rollout`, the same steps", ">= 0.85")
    ]  # fmt: skip


# --- P4: gradient steps -----------------------------------------------------------------------------------------


def _updates(batch: int, steps: int) -> Callable[[int], None]:
    """What calls `Sac.update_many` a number of times, on synthetic transitions (steps, batch, ...) on the device."""
    rng, (learner, state) = np.random.default_rng(0), _learner()
    batches = Batch(**{name: jnp.asarray(rng.normal(size=(steps, batch, *shape)), jnp.float32)
                       for name, shape in ROW_SHAPES.items()})  # fmt: skip
    batches = batches._replace(action=jnp.tanh(batches.action), terminated=jnp.zeros((steps, batch)))
    update, held = jax.jit(learner.update_many, donate_argnums=0), {"state": state}

    def play(calls: int) -> None:
        for _ in range(calls):
            held["state"], metrics = update(held["state"], batches, jnp.float32(0.0))
        jax.block_until_ready((held["state"], metrics))

    return play


@contextlib.contextmanager
def _sbx(python: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """The versions of another library's SAC, and what measures its updates/s once, in a process of its own."""
    sizes = {"obs": OBS_SIZE, "critic_obs": CRITIC_OBS_SIZE, "actions": c.NUM_JOINTS, "hidden": HIDDEN, "batch": _BATCH,
             "steps": _STEPS, "calls": _CALLS}  # fmt: skip
    command = [str(python), str(Path(__file__).with_name("sbx_updates.py")), json.dumps(sizes)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)  # fmt: skip
    except OSError as error:
        raise NotHere(f"{python} cannot be run: {error.strerror}") from error

    def answer(request: str) -> str:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        if line := process.stdout.readline().strip():
            return line
        last = (process.stderr.read().strip().splitlines() or ["it ended without a word"])[-1]
        raise NotHere(f"no sbx-rl with that Python ({last}): pip install -e '.[bench]', or --sbx-python")

    with process:
        try:
            yield answer(""), lambda: float(answer("\n"))
        finally:
            process.kill()


def sac_updates(config) -> list[Line]:
    """P4: `Sac.update_many` against `sbx-rl`, batch 512, eight to a call, the same widths and SiLU, on the device.

    Ours mirrors, normalises and averages the policy besides; theirs has none of these.
    """
    with _sbx(config.sbx_python) as (versions, peer):
        play = _updates(_BATCH, _STEPS)
        pairs = in_turn(lambda: per_s(_STEPS * _CALLS, lambda: play(_CALLS)), peer, config.repeats)
    return [compare("P4", f"SAC updates/s, batch {_BATCH}", pairs, "updates/s", versions, ">= 1.3")]


# --- P10: growth ------------------------------------------------------------------------------------------------


def knee(best_ratio: dict[int, list[tuple[float, float]]]) -> int:
    """The smallest size whose median ratio to the best size is at least 0.9."""
    return min(size for size, pairs in best_ratio.items() if median(mine / best for mine, best in pairs) >= _KNEE)


def curve(name: str, unit: str, rates: dict[int, list[float]]) -> list[Line]:
    """A line for each size: its rates, and their ratio to those of the fastest size in the same round."""
    best = max(rates, key=lambda size: median(rates[size]))
    against = {size: list(zip(values, rates[best])) for size, values in rates.items()}
    at = knee(against)
    return [
        Line("P10", name.format(size), rate(values, unit), f"the best, {best}", ratios(against[size]),
             "knee" if size == at else "")
        for size, values in rates.items()
    ]  # fmt: skip


def _use_threads(loop: NativeLoop, threads: int) -> None:
    """Let the same lanes be stepped by another number of threads."""
    arrays = loop.engine.arrays()
    loop.engine.close()
    loop.engine = NativeEngine(loop.config.num_envs, num_threads=threads)
    loop.engine.restore(arrays)


def growth(config) -> list[Line]:
    """P10: native lanes by threads (of the physics; XLA keeps all cores), and samples/s of `update_many` by batch."""
    threads = [count for count in THREADS if count <= usable_cores()]
    native: dict[int, dict[int, list[float]]] = {count: {lanes: [] for lanes in LANES} for count in threads}
    with contextlib.ExitStack() as stack:
        loops = {lanes: stack.enter_context(_native_loop(lanes)) for lanes in LANES}
        for _ in range(config.repeats):
            for lanes, (loop, iterate) in loops.items():
                for count in threads:
                    _use_threads(loop, count)
                    native[count][lanes].append(per_s(_LANE_ACTIONS, partial(iterate, _LANE_ACTIONS // lanes)))
    plays = {batch: _updates(batch, _SAMPLES // batch) for batch in BATCHES}
    for play in plays.values():
        play(1)  # compiles
    samples: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(config.repeats):
        for batch, play in plays.items():
            samples[batch].append(per_s(_SAMPLES, partial(play, 1)))
    lines = [Line("P10", f"native, {count} threads", "not measured: fewer cores here", "", "", "")
             for count in THREADS if count not in threads]  # fmt: skip
    for count in threads:
        lines += curve(f"native, {{}} lanes, {count} thread{'s' * (count > 1)}, without updates", "actions/s",
                       native[count])  # fmt: skip
    return lines + curve("`update_many`, batch {}", "samples/s", samples)
