"""What fine-tuning keeps of its play: rounds, from which it learns before the next one, and means for the log."""

import numpy as np

from booster_soccer.arrays import check_like
from booster_soccer.envs import constants as c
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE

# Of one action of one lane. The two parts of its reward are kept apart, and mixed when a round is learned from.
_SHAPES = {"critic_obs": (CRITIC_OBS_SIZE,), "mean": (c.NUM_JOINTS,), "noise": (c.NUM_JOINTS,), "dense": (),
           "score": (), "next_critic_obs": (CRITIC_OBS_SIZE,), "terminated": (), "ended": ()}  # fmt: skip


class RoundStatistics:
    """Means since the last line of the log."""

    def __init__(self, state: dict[str, np.ndarray]):
        """What `state` gave; empty at first."""
        self._sums = {name: float(value[0]) for name, value in state.items()}
        self._counts = {name: int(value[1]) for name, value in state.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Sum and count (2,) float64 of each quantity."""
        return {name: np.array([self._sums[name], self._counts[name]], np.float64) for name in self._sums}

    def add(self, name: str, values: np.ndarray) -> None:
        """Add values (B,) of one quantity."""
        self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values))
        self._counts[name] = self._counts.get(name, 0) + np.size(values)

    def take(self) -> dict[str, float]:
        """The means, and start again."""
        means = {name: self._sums[name] / self._counts[name] for name in self._sums if self._counts[name]}
        self._sums, self._counts = {}, {}
        return means


class Round:
    """T actions of B lanes, played with one policy, filled one after the other; `arrays` are (T, B, ...) float32."""

    def __init__(self, num_actions: int, num_lanes: int):
        self.arrays = {name: np.zeros((num_actions, num_lanes, *shape), np.float32) for name, shape in _SHAPES.items()}
        self.filled = 0  # actions

    @property
    def full(self) -> bool:
        """Whether the last action is there."""
        return self.filled == len(self.arrays["dense"])

    def add(self, **values: np.ndarray) -> None:
        """The next action of all lanes, (B, ...) each."""
        for name, array in self.arrays.items():
            array[self.filled] = values[name]
        self.filled += 1

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs."""
        played = {name: array[: self.filled].copy() for name, array in self.arrays.items()}
        return played | {"filled": np.array(self.filled)}

    def restore(self, state: dict[str, np.ndarray], what: str) -> None:
        """Go on with a round that was saved; `UserError` if it is of another shape."""
        filled = state.get("filled", np.array(0))
        # Anything else than a whole number is refused below.
        is_number = filled.shape == () and np.issubdtype(filled.dtype, np.integer)
        self.filled = int(np.clip(filled, 0, len(self.arrays["dense"]))) if is_number else 0
        check_like(state, self.state(), what)
        for name, array in self.arrays.items():
            array[: self.filled] = state[name]


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """Share of the variance of returns (N,) that values (N,) explain; below 0 where they are worse than a constant."""
    return float(1.0 - np.mean((returns - values) ** 2) / max(np.var(returns), 1e-9))
