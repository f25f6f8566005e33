"""Speed of the twin against the official Python environments, on this machine, in one run.

    python -m benchmarks.twin [--lanes 256] [--threads 2] [--repeats 5]

Input: the installed `sai-mujoco`. Output: a table. The robot holds the default pose, from the start to 0.8 s,
in every column.

The rates of one core are per second of CPU time, so that other programs on the machine do not count (they
still slow the caches down). The gain of several threads can only be taken by the clock, and is worth
something only where the load printed below the table is that of this program. The ceiling is the same gain
for the bare physics: `mj_step` from the states of the same lanes, many steps a call, no Python between them.
Two cores that share a clock or a cache do not reach 2.

All columns take turns, 0.1 s of simulated time each, and each such piece counts with the best of the repeats.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported

import mujoco
import numpy as np
import tyro

from booster_soccer import errors
from booster_soccer.cores import usable_cores
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd
from booster_soccer.envs.twin import TwinEnv
from booster_soccer.envs.twin_physics import memory_of

PIECES, PIECE_STEPS = 8, 50  # physics steps: the default pose still stands after them


@dataclass(frozen=True)
class Config:
    """What to measure."""

    lanes: int = 256  # of the twin
    threads: int = 2  # compared with one
    repeats: int = 5  # best of


_ACTION = np.zeros(c.NUM_JOINTS, dtype=np.float32)  # hold the default pose


def _torque_nm(obs: np.ndarray) -> np.ndarray:
    joints = obs[..., : c.NUM_JOINTS], obs[..., c.NUM_JOINTS : 2 * c.NUM_JOINTS]
    return pd.platform_torque_nm(_ACTION, *joints)


# Each of these prepares up to its first yield, and then plays one piece up to each further one.


def pieces(start: Callable, step: Callable, calls: int = PIECE_STEPS) -> Iterator[None]:
    """`start()` gives the observation of the first of the `calls` of `step(obs)` in a piece, each that of the next."""
    obs = start()
    while True:
        yield
        for _ in range(calls):
            obs = step(obs)


def play_official(env: official.TaskIndex) -> Iterator[None]:
    """One official environment."""
    return pieces(lambda: env.reset(seed=0)[0], lambda obs: env.step(_torque_nm(obs))[0])


def play_torque(env: TwinEnv) -> Iterator[None]:
    """The 500 Hz path."""
    return pieces(lambda: env.reset(range(env.num_lanes))[0], lambda obs: env.step_torque(_torque_nm(obs)).obs)


def play_action(env: TwinEnv) -> Iterator[None]:
    """The 50 Hz path."""
    action = np.tile(_ACTION, (env.num_lanes, 1))
    calls = PIECE_STEPS // c.PHYSICS_STEPS_PER_ACTION
    return pieces(lambda: env.reset(range(env.num_lanes)), lambda _: env.step_action(action), calls)


def play_physics(env: TwinEnv, num_threads: int) -> Iterator[None]:
    """Bare physics from the states in which `env` is, its lanes shared by threads."""

    def advance(data: mujoco.MjData) -> None:
        memory = memory_of(data)
        for row in waiting:  # shared: each thread takes the next lane
            memory[:] = row
            mujoco.mj_step(env._source.model, data, PIECE_STEPS)

    with ThreadPoolExecutor(num_threads) as pool:
        data = [mujoco.MjData(env._source.model) for _ in range(num_threads)]
        while True:
            yield
            waiting = iter(env.physics.state.memory)
            list(pool.map(advance, data))


def measure(plays: dict[str, Iterator[None]]) -> dict[str, np.ndarray]:
    """Seconds (2, pieces) of CPU time and of the clock for each play."""
    for play in plays.values():
        next(play)
    seconds = {name: np.zeros((2, PIECES)) for name in plays}
    for piece in range(PIECES):
        for name, play in plays.items():
            cpu, clock = time.process_time(), time.perf_counter()
            next(play)
            seconds[name][:, piece] = time.process_time() - cpu, time.perf_counter() - clock
    return seconds


def main(config: Config) -> None:
    """Measure and print the table."""
    if min(config.lanes, config.threads, config.repeats) < 1:
        raise errors.UserError("lanes, threads and repeats must be at least 1")
    print(
        f"| task | official steps/s | twin steps/s, 500 Hz | ratio | twin actions/s, 50 Hz "
        f"| {config.threads} threads / 1: 500 Hz | 50 Hz | ceiling |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task in c.TASKS:
        one, several = (
            [TwinEnv(task, config.lanes, num_threads) for _ in range(2)] for num_threads in (1, config.threads)
        )
        env = official.make(task)
        repeats = []
        for _ in range(config.repeats):
            plays = {
                "official": play_official(env),
                "torque": play_torque(one[0]),
                "torque, threads": play_torque(several[0]),
                "action": play_action(one[1]),
                "action, threads": play_action(several[1]),
                "physics": play_physics(several[1], 1),
                "physics, threads": play_physics(several[1], config.threads),
            }
            repeats.append(measure(plays))
        best = {name: np.min([seconds[name] for seconds in repeats], axis=0).sum(axis=1) for name in repeats[0]}
        cpu = {name: seconds[0] for name, seconds in best.items()}
        clock = {name: seconds[1] for name, seconds in best.items()}
        steps = PIECES * PIECE_STEPS
        for env_ in several:
            env_.close()
        print(
            f"| {task} | {steps / cpu['official']:,.0f} | {steps * config.lanes / cpu['torque']:,.0f} "
            f"| {config.lanes * cpu['official'] / cpu['torque']:.1f} "
            f"| {steps * config.lanes / cpu['action'] / c.PHYSICS_STEPS_PER_ACTION:,.0f} "
            + "".join(f"| {clock[name] / clock[name + ', threads']:.2f} " for name in ("torque", "action", "physics"))
            + "|",
            flush=True,
        )
    print(f"\n{usable_cores()} cores, load average {os.getloadavg()[0]:.1f}, {config.lanes} lanes")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config))
