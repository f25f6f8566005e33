"""What tuning varies of `SacConfig`, and within which limits. `tune_sac.py` searches it.

Of a pair, the value at the run's start: a trial is over before the ramp begins. Networks are no setting, and what makes
a step dearer (batch, updates) or the reward larger (weights) would make trials incomparable at equal steps.
"""

from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from booster_soccer.agents.sac import SacConfig


class Range(NamedTuple):
    """Of one number."""

    low: float
    high: float
    log: bool = False  # drawn evenly in the logarithm


SPACE = {
    "learning_rate": Range(1e-4, 1e-3, log=True),
    "adam_b2": Range(0.9, 0.999),
    "weight_decay": Range(1e-5, 1e-2, log=True),
    "discount": Range(0.94, 0.99),
    "target_tau": Range(0.003, 0.03, log=True),
    "policy_tau": Range(1e-4, 3e-3, log=True),
    "target_entropy": Range(-12.0, -3.0),
    "initial_temperature": Range(1e-3, 0.1, log=True),
}


class Trial(Protocol):
    """What draws a number: an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...


def settings(trial: Trial) -> dict[str, Any]:
    """The varied settings of one trial by name, pairs with their unchanged last value."""
    defaults = asdict(SacConfig())
    drawn: dict[str, Any] = {}
    for name, (low, high, log) in SPACE.items():
        value = trial.suggest_float(name, low, high, log=log)
        drawn[name] = [value, defaults[name][1]] if isinstance(defaults[name], tuple) else value
    return drawn
