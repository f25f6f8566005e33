"""Judging a policy while it is trained: the official score, on the twin, always on the same seeds and noise."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.rollout.play import Episode, Policy, play_in_workers
from booster_soccer.store.run import Candidate


class Scores(NamedTuple):
    """Official episodes, each (tasks, N) by task and seed."""

    score: np.ndarray
    physics_steps: np.ndarray
    fell: np.ndarray
    success: np.ndarray

    @property
    def mean(self) -> float:
        """The mean of the tasks' means."""
        return float(self.score.mean())

    def numbers(self, prefix: str) -> dict[str, float]:
        """Means by task, named `<prefix>/score_goalie` and so on, and the mean score."""
        named = {f"{prefix}/score": self.mean}
        for name, values in self._asdict().items():
            named |= {f"{prefix}/{name}_{task}": float(values[i].mean()) for i, task in enumerate(c.TASKS)}
        return named

    def __str__(self) -> str:
        of_tasks = ", ".join(
            f"{task} {score.mean():+.2f} fell {fell.mean():.0%} hit {success.mean():.0%}"
            for task, score, fell, success in zip(c.TASKS, self.score, self.fell, self.success)
        )
        return f"{self.mean:+.3f} ({of_tasks})"


def judge(
    policy: Policy, seeds: list[int], start_noise_rad: float = c.START_NOISE_RAD, backend: str = "twin"
) -> Scores:
    """Play a policy on every seed in every task. An exception in the caller ends the workers at once."""
    episodes = [Episode(task, seed) for task in c.TASKS for seed in seeds]
    results = play_in_workers(backend, policy, episodes, start_noise_rad)

    def table(name: str) -> np.ndarray:
        return np.array([float(getattr(result, name)) for result in results]).reshape(c.NUM_TASKS, len(seeds))

    return Scores(*map(table, Scores._fields))


def gain(candidate: np.ndarray, start: np.ndarray) -> tuple[float, float]:
    """Mean gain of scores (tasks, N) over others on the same seeds, and its standard error."""
    difference = candidate - start
    standard_error = np.sqrt((difference.var(axis=1, ddof=1) / difference.shape[1]).sum()) / len(difference)
    return float(difference.mean()), float(standard_error)


def best_or_last(
    best: Candidate, last: dict[str, np.ndarray], steps: int, play: Callable[[dict[str, np.ndarray]], Scores]
) -> Candidate:
    """The best of many judgements or the networks of the last step, whichever scores more where `play` plays them.

    That must be on seeds of its own: the best of many short judgements is a lucky one (docs/experiments.md).
    """
    again, now = play(best.arrays), play(last)
    print(f"the best so far (step {best.steps:,}), on fresh seeds: {again}; the last policy: {now}", flush=True)
    if now.mean >= again.mean:
        return Candidate(last, steps, now.score)
    return best._replace(scores=again.score)
