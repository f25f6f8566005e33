"""Speed of the twin against the official Python environments, on this machine, in one run.

    python benchmarks/twin.py [--lanes 256] [--threads 2] [--repeats 3]

Input: the installed `sai-mujoco`. Output: a table. The robot holds the default pose, from the start to 0.8 s.
The rates of one core are per second of CPU time, so that other programs on the machine do not count (they
still slow the caches down); the gain of several threads can only be taken by the clock, and is worth
something only where the load printed below the table is that of this program. Official and twin take turns,
and each rate is the best of the repeats.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported

import numpy as np  # noqa: E402
import tyro  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))

import errors  # noqa: E402
from envs import constants as c  # noqa: E402
from envs import official, pd  # noqa: E402
from envs.twin import TwinEnv  # noqa: E402

_STEPS = 400  # physics steps of each measurement: the default pose still stands


@dataclass(frozen=True)
class Config:
    """What to measure."""

    lanes: int = 256  # of the twin
    threads: int = 2  # compared with one
    repeats: int = 3  # best of


_ACTION = np.zeros(c.NUM_JOINTS, dtype=np.float32)  # hold the default pose


def _torque_nm(obs: np.ndarray) -> np.ndarray:
    joints = obs[..., : c.NUM_JOINTS], obs[..., c.NUM_JOINTS : 2 * c.NUM_JOINTS]
    return pd.platform_torque_nm(_ACTION, *joints)


def play_official(env: official.TaskIndex) -> Callable[[], int]:
    """Reset; returns the function to time, which returns its number of physics steps."""
    obs, _ = env.reset(seed=0)

    def play() -> int:
        nonlocal obs
        for _ in range(_STEPS):
            obs, *_ = env.step(_torque_nm(obs))
        return _STEPS

    return play


def play_torque(env: TwinEnv) -> Callable[[], int]:
    """The 500 Hz path, a quarter of the steps."""
    obs, _ = env.reset(range(env.num_lanes))
    steps = _STEPS // 4

    def play() -> int:
        nonlocal obs
        for _ in range(steps):
            obs = env.step_torque(_torque_nm(obs)).obs
        return steps * env.num_lanes

    return play


def play_action(env: TwinEnv) -> Callable[[], int]:
    """The 50 Hz path, a quarter of the steps."""
    env.reset(range(env.num_lanes))
    action = np.tile(_ACTION, (env.num_lanes, 1))
    num_actions = _STEPS // 4 // c.PHYSICS_STEPS_PER_ACTION

    def play() -> int:
        for _ in range(num_actions):
            env.step_action(action)
        return num_actions * c.PHYSICS_STEPS_PER_ACTION * env.num_lanes

    return play


def _rates(play: Callable[[], int]) -> np.ndarray:
    """Physics steps per second of CPU time and of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    steps = play()
    return steps / np.array([time.process_time() - cpu, time.perf_counter() - clock])


def main(config: Config) -> None:
    """Measure and print the table."""
    if min(config.lanes, config.threads, config.repeats) < 1:
        raise errors.UserError("lanes, threads and repeats must be at least 1")
    print(
        f"| task | official steps/s | twin steps/s, 500 Hz | ratio | twin actions/s, 50 Hz "
        f"| {config.threads} threads / 1: 500 Hz | 50 Hz |"
    )
    print("|---|---|---|---|---|---|---|")
    for task in c.TASKS:
        env = official.make(task)
        one, several = TwinEnv(task, config.lanes, 1), TwinEnv(task, config.lanes, config.threads)
        runs = {
            "official": functools.partial(play_official, env),
            "torque": functools.partial(play_torque, one),
            "torque, threads": functools.partial(play_torque, several),
            "action": functools.partial(play_action, one),
            "action, threads": functools.partial(play_action, several),
        }
        best = {name: np.zeros(2) for name in runs}
        for _ in range(config.repeats):
            for name, prepare in runs.items():
                best[name] = np.maximum(best[name], _rates(prepare()))
        cpu = {name: rates[0] for name, rates in best.items()}
        clock = {name: rates[1] for name, rates in best.items()}
        several.close()
        print(
            f"| {task} | {cpu['official']:,.0f} | {cpu['torque']:,.0f} "
            f"| {cpu['torque'] / cpu['official']:.1f} "
            f"| {cpu['action'] / c.PHYSICS_STEPS_PER_ACTION:,.0f} "
            f"| {clock['torque, threads'] / clock['torque']:.2f} "
            f"| {clock['action, threads'] / clock['action']:.2f} |",
            flush=True,
        )
    print(f"\n{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, {config.lanes} lanes")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config))
