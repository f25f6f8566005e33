"""What a policy is worth: scores of many episodes, their means, spreads and intervals."""

import functools
import sys
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.errors import UserError
from booster_soccer.rollout.play import Episode, EpisodeResult, Policy, check_backend, play_in_workers

CONFIDENCE_INTERVAL = "95 %, percentile bootstrap of the mean, 2000 resamples"
_RESAMPLES = 2000
_OF_THE_BALL = ("shot_speed_m_s", "shot_direction_deg", "ball_height_max_m", "roll_phase_deg", "roll_score")
_ANGLES = ("shot_direction_deg", "roll_phase_deg")
_MEANS = ("physics_steps", "touches", "ball_speed_site_m_s", "ball_speed_centre_m_s", "walked_m", "ball_distance_min_m")
_SAME_EVERY_SEED = ("goalie",)  # nothing in these tasks is drawn at reset that a robot could notice


def evaluate(
    policy: Policy,
    episodes: int = 100,
    seed: int = 0,
    start_noise_rad: float = 0.0,
    backend: str = "official",
    workers: int | None = None,
) -> dict:
    """Score a policy, (87,) float32 -> (12,) in [-1, 1], on `episodes` episodes of each task.

    Returns what `evaluate.py --json` writes. Raises `UserError` for an unknown backend or a number out of range.
    """
    check_numbers(episodes, seed, start_noise_rad, workers)
    check_backend(backend)
    seeds = [official.match_seed(seed, i) for i in range(episodes)]
    to_run = []
    for task in c.TASKS:
        one_episode = task in _SAME_EVERY_SEED and start_noise_rad == 0.0
        to_run += [Episode(task, match_seed) for match_seed in (seeds[:1] if one_episode else seeds)]
    # A progress bar where somebody looks.
    bar = functools.partial(tqdm, total=len(to_run), desc="episodes", unit="ep", disable=not sys.stderr.isatty())
    results = play_in_workers(backend, policy, to_run, start_noise_rad, workers, bar)
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


def check_numbers(episodes: int, seed: int, start_noise_rad: float, workers: int | None) -> None:
    """Raise `UserError` for a number out of range; NaN is."""
    noise_is_fine = 0.0 <= start_noise_rad < np.inf
    if episodes < 1 or seed < 0 or not noise_is_fine or (workers is not None and workers < 1):
        raise UserError(
            f"episodes ({episodes}) and workers ({workers}) must be at least 1, "
            f"seed ({seed}) and start noise ({start_noise_rad}) at least 0"
        )


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
        **{f"mean_{name}": mean(name) for name in _MEANS},
        "ball": {name: _spread(results, name) for name in _OF_THE_BALL},
        "endings": {name: endings.count(name) for name in sorted(set(endings))},
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
    otherwise = "timeout" if result.physics_steps >= c.EPISODE_PHYSICS_STEPS else "diverged"
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
