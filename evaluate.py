"""The official score of a checkpoint of any stage, or of a baseline, in the official environments.

    python evaluate.py --checkpoint DIR [--episodes 100] [--seed 0] [--start-noise 0.02] [--json FILE]
                       [--plot FILE.png] [--backend official|twin]
    python evaluate.py --checkpoint DIR --only target:123 [--start-noise 0.02]
    python evaluate.py --policy hold

Input: a checkpoint directory. Output: tables of the score, its terms, the ball's motion and the worst
episodes; with `--json` a file that holds per task the mean, standard deviation, 95 % interval, success rate,
fall rate, mean steps, mean of each term and every episode, and the mean of the three tasks; with `--plot` the
distribution of the scores. `--only` plays one episode again, by its task and seed. The numbers do not depend
on the number of workers, nor on the backend: the twin gives the official numbers, faster.
"""

import importlib
import importlib.util
import json
import shlex
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

from booster_soccer import errors
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.envs.official import Episode, EpisodeResult, Policy
from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints
from booster_soccer.tracking.score_report import BALL_ROWS, PLOT_SUFFIXES, plot, print_result, worst_episodes

CONFIDENCE_INTERVAL = "95 %, percentile bootstrap of the mean, 2000 resamples"
_RESAMPLES = 2000
_ANGLES = ("shot_direction_deg", "roll_phase_deg")
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
    plot: Path | None = None  # new file for the distribution of the scores, .png, .svg or .pdf
    only: str | None = None  # task:seed, play this one episode instead, e.g. target:123
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
    _check_numbers(episodes, seed, start_noise_rad, workers)
    run_episodes = player(backend)
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


def _check_numbers(episodes: int, seed: int, start_noise_rad: float, workers: int | None) -> None:
    """Raise `UserError` for a number out of range; NaN is."""
    noise_is_fine = 0.0 <= start_noise_rad < np.inf
    if episodes < 1 or seed < 0 or not noise_is_fine or (workers is not None and workers < 1):
        raise UserError(
            f"episodes ({episodes}) and workers ({workers}) must be at least 1, "
            f"seed ({seed}) and start noise ({start_noise_rad}) at least 0"
        )


def _is_one_episode(task: str, start_noise_rad: float) -> bool:
    return task in _SAME_EVERY_SEED and start_noise_rad == 0.0


def player(name: str) -> Callable[..., list[EpisodeResult]]:
    """The `run_episodes` of `envs/<name>.py`."""
    if importlib.util.find_spec(f"booster_soccer.envs.{name}") is None:
        raise UserError(f"there is no backend '{name}' (envs/{name}.py is missing): use --backend official")
    return importlib.import_module(f"booster_soccer.envs.{name}").run_episodes


def _summary(results: list[EpisodeResult]) -> dict:
    """Means over the episodes of one task; `distinct_episodes` is how many were really played."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(result, name) for result in results]))

    terms = {name: [result.terms[name] for result in results] for name in results[0].terms}
    endings = [ending(result) for result in results]
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
        "ball": {name: _spread(results, name) for name in BALL_ROWS},
        "endings": {name: endings.count(name) for name in sorted(set(endings))},
        "mean_walked_m": mean("walked_m"),
        "mean_ball_distance_min_m": mean("ball_distance_min_m"),
        "terms": {name: float(np.mean(values)) for name, values in terms.items()},
        "terms_std": {name: _std(values) for name, values in terms.items()},
        "results": [asdict(result) | {"ending": word} for result, word in zip(results, endings)],
    }


def ending(result: EpisodeResult) -> str:
    """What ended an episode, in a word; several at once are joined by +."""
    events = {
        "success": result.success,
        "blocked": result.terms.get("ball_blocked", 0.0) < 0.0,
        "offside": result.terms.get("offside", 0.0) < 0.0,
        "fell": result.fell,
    }
    otherwise = "timeout" if result.steps >= c.EPISODE_PHYSICS_STEPS else "diverged"
    return "+".join(name for name, happened in events.items() if happened) or otherwise


def _spread(results: list[EpisodeResult], name: str) -> dict:
    """Mean and standard deviation of a field over the episodes that have it, `n`; circular ones of an angle."""
    values = [value for value in (getattr(result, name) for result in results) if value is not None]
    if not values:
        return {"n": 0, "mean": None, "std": None}
    if name not in _ANGLES:
        return {"n": len(values), "mean": float(np.mean(values)), "std": _std(values)}
    mean_vector = np.exp(1j * np.radians(values)).mean()
    length = np.clip(np.abs(mean_vector), np.finfo(float).tiny, 1.0)
    mean_deg, std_deg = np.degrees([np.angle(mean_vector), np.sqrt(np.abs(2.0 * np.log(length)))])
    if name == "roll_phase_deg":
        mean_deg %= 360.0
    return {"n": len(values), "mean": float(mean_deg), "std": float(std_deg)}


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


def mean_interval(values: np.ndarray) -> list[float]:
    """The 95 % interval of the mean of values (N,)."""
    return _interval(_resampled_means([np.asarray(values)])[0])


def _interval(resampled_means: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(resampled_means, [2.5, 97.5])]


def reserve(file: Path) -> None:
    """Raise `UserError` unless a new file can be written there; creates its directory, so that it stays so."""
    try:
        is_new = not file.exists()
        if is_new:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("x").close()
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; name another file") from error
    if not is_new:
        raise UserError(f"{file} exists and is not overwritten: name another file or remove it")


def write_json(content: dict, file: Path) -> None:
    """Write a new JSON file and print its name."""
    with file.open("x") as stream:
        try:
            stream.write(json.dumps(content, indent=2) + "\n")
            stream.flush()
        except OSError:
            file.unlink()  # on a full disk; half a file would only be in the way
            raise
    print(file)


def _check(config: Config) -> None:
    """Everything that can be told before the first episode."""
    if (config.checkpoint is None) == (config.policy is None):
        raise UserError("give either --checkpoint DIR or --policy zero|hold")
    _check_numbers(config.episodes, config.seed, config.start_noise, config.workers)
    if config.plot is not None and (config.only is not None or config.plot.suffix not in PLOT_SUFFIXES):
        raise UserError(
            f"--plot {config.plot} needs a name that ends in {', '.join(PLOT_SUFFIXES)}, and no --only: "
            "one episode has no distribution"
        )
    if config.only is not None:
        _episode(config.only)
    for file in (config.json, config.plot):
        if file is not None:
            reserve(file)


def _episode(text: str) -> Episode:
    """The episode of `--only task:seed`."""
    task, _, seed = text.partition(":")
    if task not in c.TASKS or not (seed.isascii() and seed.isdigit() and int(seed) < 2**64):
        raise UserError(
            f"--only {text} is not task:seed: give one of {', '.join(c.TASKS)} and a seed below 2^64, "
            "as the table of worst episodes lists them"
        )
    return Episode(task, int(seed))


def replay_command(config: Config, episode: Episode) -> str:
    """The command that plays one of the evaluated episodes again, with the same score."""
    which = ("--checkpoint", config.checkpoint) if config.checkpoint is not None else ("--policy", config.policy)
    words = ["python", "evaluate.py", *which, "--only", f"{episode.task}:{episode.seed}"]
    if config.start_noise > 0.0:
        words += ["--start-noise", config.start_noise]
    return shlex.join(map(str, words))


def _play_only(config: Config, policy: Policy, title: str) -> dict:
    """Play the episode of `--only` and print everything that is measured in it."""
    [result] = player(config.backend)(policy, [_episode(config.only)], config.start_noise, workers=1)
    table = Table(title=f"{title}, {config.only}: {ending(result)}", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    rows = asdict(result)
    for name, value in rows.pop("terms").items():
        table.add_row(f"term {name}", f"{value:+.6f}")
    table.add_section()
    for name, value in rows.items():
        table.add_row(name, f"{value:.6f}" if isinstance(value, float) else f"{value}")
    Console().print(table)
    settings = {"backend": config.backend, "start_noise_rad": config.start_noise}
    return settings | asdict(result) | {"ending": ending(result)}


def main(config: Config) -> dict:
    """Evaluate, print the tables, write the files that are named; returns the JSON file's content."""
    _check(config)
    if config.checkpoint is not None:
        checkpoint = checkpoints.load(config.checkpoint)
        policy = policy_from_arrays(checkpoint.arrays)
        subject = {"checkpoint": str(config.checkpoint), "stage": checkpoint.stage, "hash": checkpoint.hash}
        title = f"{config.checkpoint} ({checkpoint.stage})"
    else:
        policy = official.reference_policy(config.policy)
        subject, title = {"policy": config.policy}, config.policy

    started = time.perf_counter()
    if config.only is not None:
        result = subject | _play_only(config, policy, title)
    else:
        result = subject | evaluate(
            policy, config.episodes, config.seed, config.start_noise, config.backend, config.workers
        )
        print_result(result, title)
        worst = worst_episodes(result["tasks"]["target"])[0]
        print(f"one of them again: {replay_command(config, Episode(worst['task'], worst['seed']))}")
    print(f"{time.perf_counter() - started:.0f} s")
    if config.plot is not None:
        plot(result, title, config.plot)
        print(config.plot)
    if config.json is not None:
        write_json(result, config.json)
    return result


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
