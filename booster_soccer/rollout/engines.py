"""Which engine is the faster one here: both are timed at what the run is going to do (`--engine auto`)."""

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Literal

from booster_soccer.agents.sac import SacState
from booster_soccer.rollout.collect import MjxLoop, NativeLoop, Statistics

Engine = Literal["native", "mjx"]
ENGINES: tuple[Engine, ...] = ("native", "mjx")
# P1 against P2 of docs/performance.md, after a minute of compiling.
SLOW_ON_A_CPU = "MJX is some eight times slower than --engine native here"

# Of every lane, before the clock starts: programs are compiled, and some lanes have started again.
_WARM_ACTIONS = 40
_TIMED_S = 20.0  # of each engine


def steps_per_s(loop: NativeLoop | MjxLoop, state: SacState) -> float:
    """Steps/s of a loop that has just begun, updates included; compiling does not count. The loop is closed then."""
    statistics, calls, passed_s = Statistics(), 0, 0.0
    with contextlib.closing(loop):
        for _ in range(0, _WARM_ACTIONS, loop.ITERATIONS_PER_CALL):
            state, _ = loop.iterate(state, True, statistics)
        started_s = time.perf_counter()
        while passed_s < _TIMED_S:
            state, _ = loop.iterate(state, True, statistics)
            calls, passed_s = calls + 1, time.perf_counter() - started_s
    return calls * loop.ITERATIONS_PER_CALL * loop.config.num_envs / passed_s


def faster(begin: Callable[[Engine], tuple[NativeLoop | MjxLoop, SacState]]) -> Engine:
    """The faster engine, and a line with both speeds; `begin` makes an engine's loop and a learner, both new."""
    speeds: dict[Engine, float] = {}
    for engine in ENGINES:
        print(f"--engine auto: {engine} is timed", flush=True)
        speeds[engine] = steps_per_s(*begin(engine))
        gc.collect()  # MjxLoop refers to itself, and its buffer must be gone before the next one is made
    taken = max(ENGINES, key=speeds.__getitem__)
    numbers = ", ".join(f"{engine} {speed:,.0f} steps/s" for engine, speed in speeds.items())
    print(f"--engine auto: {numbers}: {taken} is taken", flush=True)
    return taken
