"""What MJX's training loop needs: time of its parts, compilation, and memory by XLA's own account.

    python -m benchmarks.mjx_loop --preset l4
    python -m benchmarks.mjx_loop --preset cpu --num-envs 256

Input: a preset of train_mjx_sac.py. Output: a table: milliseconds for one action in every lane (min, median and max of
five calls) of the bare physics, of the gradient steps that belong to it, and of the whole loop, in which rules,
observation, reward, fresh starts and the replay buffer are the rest; seconds to compile each; and what the whole loop
holds and needs besides. Physics against whole loop without its gradient steps, in the same run, is what the football
costs. With `--memory-only` nothing is run, so that a preset larger than the machine can be looked at.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from booster_soccer import runtime

runtime.prepare()

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import train_mjx_sac
from booster_soccer import errors
from booster_soccer.agents.sac import Batch, Sac
from booster_soccer.envs import constants as c
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.tasks import Tasks
from booster_soccer.rollout.collect import ROW_SHAPES, MjxLoop

_CALLS = 5
_SETTLE = 25  # actions before physics is timed: feet are on the ground then


@dataclass(frozen=True)
class Config:
    """Which loop."""

    preset: str = "l4"
    num_envs: int | None = None  # None: the preset's
    buffer_size: int | None = None  # transitions; None: the preset's
    memory_only: bool = False


class Part(NamedTuple):
    """One measured program."""

    name: str
    compile_s: float
    held_gb: float  # arguments, which the loop carries from call to call
    needed_gb: float  # besides, while it runs
    action_ms: tuple[float, ...]  # of each call


def measure(name: str, program: Callable, arguments: tuple, run: Callable[[Any], Callable[[], Any]] | None,
            actions: int = 1) -> Part:  # fmt: skip
    """Compile a jitted program; `run` makes of it what one call is, `actions` of all lanes long."""
    started = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compile_s, memory = time.perf_counter() - started, compiled.memory_analysis()
    times = []
    if run is not None:
        call = run(compiled)
        for _ in range(_CALLS + 1):
            started = time.perf_counter()
            jax.block_until_ready(call())
            times.append((time.perf_counter() - started) * 1e3 / actions)
    return Part(name, compile_s, memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9, tuple(times[1:]))


def chosen(config: Config) -> train_mjx_sac.Config:
    """The preset with what was chosen."""
    if config.preset not in train_mjx_sac.PRESETS:
        raise errors.UserError(f"--preset {config.preset} is unknown: use one of {', '.join(train_mjx_sac.PRESETS)}")
    preset = train_mjx_sac.PRESETS[config.preset]
    changes = {"num_envs": config.num_envs, "buffer_size": config.buffer_size}
    collect = replace(preset.collect, **{name: value for name, value in changes.items() if value is not None})
    preset = replace(preset, engine="mjx", collect=collect)
    train_mjx_sac.check(preset)
    return preset


def parts(preset: train_mjx_sac.Config, memory_only: bool) -> list[Part]:
    """Physics, gradient steps, whole loop."""
    collect = preset.collect
    learner = Sac(preset.sac)
    state = learner.init(jax.random.key(0))
    loop = MjxLoop(collect, learner, Tasks(), 0, state)
    rng = np.random.default_rng(0)
    # As the untrained policy moves: lanes that stand still need fewer of the solver's iterations.
    target_rad = jnp.asarray(joint_target_rad(rng.uniform(-0.5, 0.5, (collect.num_envs, c.NUM_JOINTS))), jnp.float32)

    def physics(compiled):
        lanes = loop.carry.physics
        for _ in range(_SETTLE):
            lanes = compiled(lanes, target_rad)
        return lambda: compiled(lanes, target_rad)

    shape = (collect.updates_per_iteration, collect.batch_size)
    batches = Batch(**{name: jnp.asarray(rng.normal(size=(*shape, *row)), jnp.float32) * 0.1
                       for name, row in ROW_SHAPES.items()})  # fmt: skip

    def whole(compiled):
        held = [state, loop.carry]

        def call():
            held[0], held[1], sums, metrics = compiled(*held, jnp.array(True))
            return metrics

        return call

    def ready(run):
        return None if memory_only else run

    step = jax.jit(lambda lanes, target: loop.engine.step(lanes, target)[0])
    learn = jax.jit(learner.update_many)
    return [
        measure("physics", step, (loop.carry.physics, target_rad), ready(physics)),
        measure("gradient steps", learn, (state, batches, jnp.float32(0.0)),
                ready(lambda compiled: lambda: compiled(state, batches, jnp.float32(0.0)))),
        measure("whole loop", loop._run, (state, loop.carry, jnp.array(True)), ready(whole), loop.ITERATIONS_PER_CALL),
    ]  # fmt: skip


def print_table(preset: train_mjx_sac.Config, measured: list[Part]) -> None:
    """The table, and what it says."""
    collect, device = preset.collect, jax.devices()[0].device_kind
    size = f"{collect.num_envs} lanes, buffer {collect.buffer_size:,}"
    table = Table(title=f"{preset.preset}, {size}, {device}; ms for one action in every lane")
    for name in ("part", "min", "median", "max", "compile s", "held GB", "needed GB"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in measured:
        ms = [f"{of(part.action_ms):.1f}" if part.action_ms else "" for of in (min, median, max)]
        table.add_row(part.name, *ms, f"{part.compile_s:.0f}", f"{part.held_gb:.2f}", f"{part.needed_gb:.2f}")
    console = Console(width=110)
    console.print(table)
    if all(part.action_ms for part in measured):
        physics, learning, whole = (median(part.action_ms) for part in measured)
        console.print(
            f"{collect.num_envs / whole * 1e3:,.0f} actions/s; bare physics / (whole loop - gradient steps) = "
            f"{physics / (whole - learning):.2f}"
        )


def main(config: Config) -> list[Part]:
    """Measure and print."""
    preset = chosen(config)
    measured = parts(preset, config.memory_only)
    print_table(preset, measured)
    return measured


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
