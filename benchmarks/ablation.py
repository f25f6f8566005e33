"""What the main choices of pre-training are worth: the same recipe with one thing changed, for the same wall time.

    python -m benchmarks.ablation --out runs/ablation --minutes 20 --seeds 0 1

Each run is a pre-training from nothing, one after the other, in `<out>/<arm>-<seed>`; what is finished is not run
again, so the same command goes on. Output: a table of each arm's last judgements, the official score on the twin; an
arm that changes the code is judged by that code, on one core. Nothing else may use the run's cores: the arms share wall
time, not steps.
"""

import itertools
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.learning import read_judgements
from booster_soccer import errors
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.store.entry import guarded
from booster_soccer.store.manifests import MANIFEST
from booster_soccer.tracking.record import TrackConfig

_LAST = 3  # judgements that are averaged
_JUDGE_EVERY = 200_000


def _judge_here() -> None:
    """Judge in this process: worker processes import the code anew, without an arm's change."""
    from booster_soccer.rollout import judge, play
    from booster_soccer.rollout.lanes import TwinLanes

    def play_here(backend, policy, episodes, start_noise_rad):
        results = []
        for task, group in itertools.groupby(episodes, key=lambda episode: episode.task):
            of_task = list(group)
            results += play.play(TwinLanes(task, len(of_task)), policy, of_task, start_noise_rad)
        return results

    judge.play_in_workers = play_here


def _world_axes() -> None:
    """The official layout's fault: positions along world axes, while the robot's heading stays unknown."""
    from booster_soccer.preprocess import observation, privileged
    from booster_soccer.preprocess.observation import SLICES
    from booster_soccer.rollout import lanes

    def unturned(quat_wxyz, xp):
        return xp.ones_like(quat_wxyz[..., 0]), xp.zeros_like(quat_wxyz[..., 0])

    class Unturned:
        """In place of the class that is submitted, which has the frame in its own source."""

        def modify_state(self, obs, info):
            joints = obs[..., SLICES["joint_pos"]], obs[..., SLICES["joint_vel"]]
            return observation.observe(*joints, info, np).astype(np.float32)

    observation.heading_cos_sin = privileged.heading_cos_sin = unturned
    lanes.Preprocessor = Unturned


def _no_normalizer() -> None:
    """Observations as they are, but for the gains."""
    from booster_soccer.agents.sac import Normalizer

    Normalizer.update = lambda self, obs: self


def _scale_actions(factor: float) -> Callable[[], None]:
    def change() -> None:
        c.ACTION_SCALE_RAD *= factor

    return change


# Name: what is changed in the code of the arm's own process, and in the collecting and the learner's settings.
ARMS: dict[str, tuple[Callable[[], None] | None, dict, dict]] = {
    "base": (None, {}, {}),
    "updates-4": (None, {"updates_per_iteration": 4}, {}),
    "fall-share-0.3": (None, {"fall_share": (0.3, 1.0)}, {}),
    "discount-0.98": (None, {}, {"discount": (0.98, 0.99)}),
    "task-share-last": (None, {"first_task_share": (0.2, 0.2, 0.6)}, {}),
    "world-axes": (_world_axes, {}, {}),
    "no-normalizer": (_no_normalizer, {}, {}),
    "action-scale-half": (_scale_actions(0.5), {}, {}),
    **{f"dr-{level}": (None, {"dr_level": level}, {}) for level in (1, 2, 3)},
}


@dataclass(frozen=True)
class Config:
    """Which arms, and for how long."""

    out: Path  # directory of the runs
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1)
    minutes: float = 20.0  # of each run
    preset: str = "cpu"


def settings(arm: str, seed: int, config: Config):
    """The configuration of a run."""
    import train_mjx_sac

    base, (_, collect, sac) = train_mjx_sac.PRESETS[config.preset], ARMS[arm]
    return replace(
        base,
        out=config.out / f"{arm}-{seed}",
        seed=seed,
        collect=replace(base.collect, **collect),
        sac=replace(base.sac, **sac),
        records=replace(base.records, judge_every=_JUDGE_EVERY),
        judge_episodes=64,
        time_limit_s=60.0 * config.minutes,
        tracking=TrackConfig(("none",)),
    )


def run_arm(arm: str, seed: int, config: Config) -> None:
    """One run; in a process of its own, because the change stays."""
    if change := ARMS[arm][0]:
        change()
        _judge_here()
    import train_mjx_sac

    errors.run(train_mjx_sac.main, settings(arm, seed, config))


def metrics_of(arm: str, seed: int, config: Config) -> Path:
    """The metrics file of a run."""
    return config.out / f"{arm}-{seed}.metrics.jsonl"


def is_finished(arm: str, seed: int, config: Config) -> bool:
    """Whether the run's result is there; raises `UserError` if it was cut short."""
    if (config.out / f"{arm}-{seed}" / MANIFEST).exists():
        return True
    if metrics_of(arm, seed, config).exists():
        raise UserError(f"{arm}-{seed} was cut short: delete {config.out / arm}-{seed}*")
    return False


def print_table(config: Config) -> None:
    """Means of the last judgements, over the seeds that there are."""
    table = Table(title=f"Last {_LAST} judgements of {config.minutes:g} minutes, mean over seeds (each seed's)")
    for name in ("arm", "steps, M", *c.TASKS, "mean"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in config.arms:
        runs = [read_judgements(file) for seed in config.seeds if (file := metrics_of(arm, seed, config)).exists()]
        runs = [rows[-_LAST:] for rows in runs if rows]
        if not runs:
            continue
        cells = [arm, f"{np.mean([rows[-1]['step'] for rows in runs]) / 1e6:.2f}"]
        for name in (*(f"eval/score_{task}" for task in c.TASKS), "eval/score"):
            by_seed = [np.mean([row[name] for row in rows]) for rows in runs]
            cells.append(f"{np.mean(by_seed):+.2f} ({', '.join(f'{score:+.2f}' for score in by_seed)})")
        table.add_row(*cells)
    Console(width=120).print(table)


@guarded("out")
def main(config: Config) -> None:
    """Run what is missing, then print the table."""
    if unknown := set(config.arms) - set(ARMS):
        raise UserError(f"--arms: {', '.join(sorted(unknown))} unknown: use {', '.join(ARMS)}")
    if not config.minutes > 0:
        raise UserError(f"--minutes must be positive, got {config.minutes}")
    config.out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    failed = []  # an arm may diverge; the others are measured all the same
    for seed in config.seeds:
        for arm in config.arms:
            try:
                if is_finished(arm, seed, config):
                    continue
            except UserError as error:
                failed.append(str(error))
                continue
            process = spawn.Process(target=run_arm, args=(arm, seed, config))
            process.start()
            process.join()
            if process.exitcode:
                failed.append(f"{arm}-{seed} ended with status {process.exitcode}: its message is above")
    print_table(config)
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
