"""The official score of a checkpoint of any stage, or of a baseline, in the official environments.

    python evaluate.py --checkpoint DIR [--episodes 100] [--seed 0] [--start-noise 0.02] [--json FILE]
    python evaluate.py --policy hold

Input: a checkpoint directory. Output: two tables, and with `--json` a file that holds per task the mean,
standard deviation, 95 % interval, success rate, fall rate, mean steps, mean of each term and every
episode, and the mean of the three tasks. The numbers do not depend on the number of workers.
"""

import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import checkpoints
import errors
from envs import constants as c
from envs import official
from envs.official import Episode, EpisodeResult, Policy
from errors import UserError
from models.numpy_policy import policy_from_arrays

CONFIDENCE_INTERVAL = "95 %, percentile bootstrap of the mean, 2000 resamples"
_RESAMPLES = 2000
_SAME_EVERY_SEED = ("goalie",)  # nothing in these tasks is drawn at reset that a robot could notice


@dataclass(frozen=True)
class Config:
    """Give either a checkpoint or a baseline policy."""

    checkpoint: Path | None = None  # checkpoint directory, of any stage
    policy: Literal["zero", "hold"] | None = None  # baseline: zero torque, or hold the default pose
    episodes: int = 100  # per task
    seed: int = 0  # master seed; episode i plays the platform's match seed i of it
    start_noise: float = 0.0  # standard deviation of the noise on each joint's start position, rad
    json: Path | None = None  # new file for the result
    backend: Literal["official", "twin"] = "official"  # which environment plays
    workers: int | None = None  # processes; default one per core


def evaluate(
    policy: Policy,
    episodes: int = 100,
    seed: int = 0,
    start_noise_rad: float = 0.0,
    backend: str = "official",
    workers: int | None = None,
) -> dict:
    """Score a policy, (87,) float32 -> (12,) in [-1, 1], on `episodes` episodes of each task.

    Returns the content of the JSON file described in the module's docstring.
    """
    if episodes < 1 or seed < 0 or start_noise_rad < 0.0 or (workers is not None and workers < 1):
        raise UserError(
            f"episodes ({episodes}) and workers ({workers}) must be at least 1, "
            f"seed ({seed}) and start noise ({start_noise_rad}) at least 0"
        )
    run_episodes = _backend(backend)
    seeds = [official.match_seed(seed, i) for i in range(episodes)]
    to_run = [
        Episode(task, match_seed)
        for task in c.TASKS
        for match_seed in (seeds[:1] if _is_one_episode(task, start_noise_rad) else seeds)
    ]
    results = run_episodes(
        policy,
        to_run,
        start_noise_rad,
        workers,
        progress=lambda arriving: tqdm(arriving, total=len(to_run), desc="episodes", unit="ep"),
    )
    tasks = {
        task: {"episodes": episodes} | _summary([result for result in results if result.task == task])
        for task in c.TASKS
    }
    resampled_means = _resampled_means([_scores(tasks[task]) for task in c.TASKS])
    for task, means in zip(c.TASKS, resampled_means):
        tasks[task]["ci95"] = _interval(means)
    return {
        "backend": backend,
        "seed": seed,
        "start_noise_rad": start_noise_rad,
        "confidence_interval": CONFIDENCE_INTERVAL,
        "mean": float(np.mean([tasks[task]["mean"] for task in c.TASKS])),
        "ci95": _interval(resampled_means.mean(axis=0)),
        "tasks": tasks,
    }


def _is_one_episode(task: str, start_noise_rad: float) -> bool:
    return task in _SAME_EVERY_SEED and start_noise_rad == 0.0


def _backend(name: str) -> Callable[..., list[EpisodeResult]]:
    """The `run_episodes` of `envs/<name>.py`."""
    if importlib.util.find_spec(f"envs.{name}") is None:
        raise UserError(f"there is no backend '{name}' (envs/{name}.py is missing): use --backend official")
    return importlib.import_module(f"envs.{name}").run_episodes


def _summary(results: list[EpisodeResult]) -> dict:
    """Means over the episodes of one task; `distinct_episodes` is how many were really played."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(result, name) for result in results]))

    terms = {name: [result.terms[name] for result in results] for name in results[0].terms}
    return {
        "distinct_episodes": len(results),
        "mean": mean("score"),
        "std": _std([result.score for result in results]),
        "success_rate": mean("success"),
        "fall_rate": mean("fell"),
        "mean_steps": mean("steps"),
        "mean_touches": mean("touches"),
        "mean_ball_speed_site_m_s": mean("ball_speed_site_m_s"),
        "mean_ball_speed_centre_m_s": mean("ball_speed_centre_m_s"),
        "mean_walked_m": mean("walked_m"),
        "mean_ball_distance_min_m": mean("ball_distance_min_m"),
        "terms": {name: float(np.mean(values)) for name, values in terms.items()},
        "terms_std": {name: _std(values) for name, values in terms.items()},
        "results": [asdict(result) for result in results],
    }


def _std(values: list[float]) -> float:
    """Sample standard deviation; 0 of a single value, which here stands for identical ones."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _scores(of_task: dict) -> np.ndarray:
    """Scores (episodes,) of a task's summary, identical episodes repeated."""
    return np.resize([result["score"] for result in of_task["results"]], of_task["episodes"])


def _resampled_means(scores: list[np.ndarray]) -> np.ndarray:
    """Means (tasks, 2000) of bootstrap resamples of the scores (N,) of each task.

    A resample takes the same seeds in every task: episode i starts with the same joint noise in all three,
    so their scores are not independent. A fixed stream, so that a result repeats.
    """
    count = len(scores[0])
    samples = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    return np.array([of_task[samples].mean(axis=1) for of_task in scores])


def _interval(resampled_means: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(resampled_means, [2.5, 97.5])]


def print_result(result: dict, title: str) -> None:
    """Print a table of the tasks and one of the score's terms, in 80 columns."""
    scores = Table(title=f"Official score: {title}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "n", "score", "std", "95 % CI", "success", "fell", "steps", "hits"):
        scores.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for task, of_task in result["tasks"].items():
        scores.add_row(
            task,
            f"{of_task['episodes']}",
            f"{of_task['mean']:+.2f}",
            f"{of_task['std']:.2f}",
            _interval_text(of_task["ci95"]),
            f"{of_task['success_rate']:.0%}",
            f"{of_task['fall_rate']:.0%}",
            f"{of_task['mean_steps']:.0f}",
            f"{of_task['mean_touches']:.1f}",
        )
    scores.add_section()
    scores.add_row("mean", "", f"{result['mean']:+.2f}", "", _interval_text(result["ci95"]))

    names = list(dict.fromkeys(name for of_task in result["tasks"].values() for name in of_task["terms"]))
    terms = Table(title="Weighted terms, mean and standard deviation", box=box.SIMPLE_HEAD)
    terms.add_column("term")
    for task in result["tasks"]:
        terms.add_column(task, justify="right")
    for name in names:
        terms.add_row(name, *(_term_text(of_task, name) for of_task in result["tasks"].values()))

    console = Console()
    console.print(scores)
    console.print(terms)
    console.print(f"CI: {result['confidence_interval']}.")
    for task, of_task in result["tasks"].items():
        if of_task["distinct_episodes"] < of_task["episodes"]:
            console.print(
                f"{task}: without start noise every seed gives the same episode; "
                f"it was played once and stands for {of_task['episodes']}."
            )


def _interval_text(interval: list[float]) -> str:
    return f"{interval[0]:+.2f} .. {interval[1]:+.2f}"


def _term_text(of_task: dict, name: str) -> str:
    if name not in of_task["terms"]:
        return ""
    return f"{of_task['terms'][name]:+.2f} ± {of_task['terms_std'][name]:.2f}"


def main(config: Config) -> dict:
    """Evaluate, print the tables, write the JSON file if one is named; returns its content."""
    if (config.checkpoint is None) == (config.policy is None):
        raise UserError("give either --checkpoint DIR or --policy zero|hold")
    if config.json is not None and config.json.exists():
        raise UserError(f"{config.json} exists and is not overwritten: name another file or remove it")
    if config.checkpoint is not None:
        checkpoint = checkpoints.load(config.checkpoint)
        policy = policy_from_arrays(checkpoint.arrays)
        subject = {"checkpoint": str(config.checkpoint), "stage": checkpoint.stage, "hash": checkpoint.hash}
        title = f"{config.checkpoint} ({checkpoint.stage})"
    else:
        policy = official.reference_policy(config.policy)
        subject, title = {"policy": config.policy}, config.policy

    started = time.perf_counter()
    result = subject | evaluate(
        policy, config.episodes, config.seed, config.start_noise, config.backend, config.workers
    )
    print_result(result, title)
    print(f"{time.perf_counter() - started:.0f} s")
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        with config.json.open("x") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
        print(config.json)
    return result


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
