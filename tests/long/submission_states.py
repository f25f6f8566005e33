"""The shipped policy's scores through the platform's SDK, however the platform treats the module: a table.

    python -m tests.long.submission_states --checkpoint assets/policies/final --episodes 2

The package is that of `submit.py`; the SDK's own benchmark plays it in the official environments, lanes batched. Each
row puts something between the benchmark and the loaded module that a server might do. `same` counts the episodes whose
score is that of the first row to the bit. The last rows show what the module cannot survive.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import submit
from booster_soccer import errors
from booster_soccer.agents.submission_model import scripted
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.store import checkpoints

Call = Callable[[torch.Tensor], torch.Tensor]
_EVERY = 137  # calls: no multiple of the hold's ten
_ORDER_SEED = 0


@dataclass(frozen=True)
class Config:
    """What is played."""

    checkpoint: Path = Path("assets/policies/final")
    episodes: int = 2  # per task
    seed: int = 0
    rows: tuple[str, ...] = ()  # some of them; empty: all


class Treated:
    """A module as a server might treat it; stands for it in the SDK's manager."""

    def __init__(self, path: Path):
        self.load: Callable[[], Any] = lambda: torch.jit.load(str(path))
        self.model, self.calls = self.load(), 0

    def __call__(self, obs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.call(obs)

    def call(self, obs: torch.Tensor) -> torch.Tensor:
        return self.model(obs)

    def between_tasks(self) -> None:
        """By default a task gets a new one."""
        self.model = self.load()


class Kept(Treated):
    def between_tasks(self) -> None:
        pass


class Copied(Treated):
    def call(self, obs):
        if self.calls % _EVERY == 0:
            self.model = copy.deepcopy(self.model)
        return self.model(obs)


class Saved(Treated):
    def call(self, obs):
        if self.calls % _EVERY == 0:
            with tempfile.TemporaryDirectory() as place:
                torch.jit.save(self.model, f"{place}/m.pt")
                self.model = torch.jit.load(f"{place}/m.pt")
        return self.model(obs)


class Inferred(Treated):
    def call(self, obs):
        if self.calls % 3 == 0:
            return self.model(obs)
        with torch.inference_mode():
            return self.model(obs).clone()


class OneByOne(Treated):
    """A module for each lane, at batch 1."""

    def call(self, obs):
        if not isinstance(self.model, list) or len(self.model) != len(obs):
            self.model = [self.load() for _ in obs]
        return torch.cat([model(obs[i : i + 1]) for i, model in enumerate(self.model)])


class Permuted(Treated):
    """The lanes in another order, the same all episode."""

    def call(self, obs):
        order = torch.arange(len(obs)).flip(0)
        return self.model(obs[order])[torch.argsort(order)]


class Shuffled(Treated):
    """The lanes in another order at every call."""

    def __init__(self, path):
        super().__init__(path)
        self.rng = np.random.default_rng(_ORDER_SEED)

    def call(self, obs):
        order = torch.as_tensor(self.rng.permutation(len(obs)))
        return self.model(obs[order])[torch.argsort(order)]


class Shared(Treated):
    """One module at batch 1 for all lanes in turn."""

    def call(self, obs):
        return torch.cat([self.model(obs[i : i + 1]) for i in range(len(obs))])


class Reloaded(Treated):
    """Loaded anew in the middle of an episode: what was held is forgotten."""

    def call(self, obs):
        if self.calls % _EVERY == 0:
            self.model = self.load()
        return self.model(obs)


ROWS: dict[str, tuple[type[Treated], bool]] = {
    "loaded for each task, lanes batched": (Treated, True),
    "one module for all three tasks": (Kept, True),
    "deep-copied in the middle of episodes": (Copied, True),
    "saved and loaded in the middle of episodes": (Saved, True),
    "two calls of three under inference_mode": (Inferred, True),
    "batch 1, a module for each lane": (OneByOne, True),
    "lanes in another order, all episode": (Permuted, True),
    "file loaded anew in the middle of episodes": (Reloaded, True),
    "lanes in another order at every call": (Shuffled, True),
    "batch 1, one module for all lanes in turn": (Shared, True),
    "stateless module (--no-hold)": (Treated, False),
}


def scores(config: Config, kind: type[Treated], hold: bool, place: Path) -> np.ndarray:
    """Scores (tasks, episodes) by the SDK's benchmark."""
    sdk = submit._import_sdk()
    checkpoint = checkpoints.load(config.checkpoint)
    place.mkdir()
    torch.jit.save(scripted(submit.actor_from_checkpoint(checkpoint), hold), str(place / submit.MODEL))
    (place / submit.PREPROCESSOR).write_text(submit.inspect.getsource(Preprocessor))
    treated, rows = kind(place / submit.MODEL), []
    for task in c.TASKS:
        treated.between_tasks()
        env = official.make(task)
        settings = submit.Config(config.checkpoint, place, episodes=config.episodes, seed=config.seed, hold=hold)

        class Manager(sdk.ModelManager):  # type: ignore[name-defined]
            def __init__(self, **arguments):
                super().__init__(**arguments)
                self._model = treated  # what it loaded itself is of no use then

        sdk.ModelManager, original = Manager, sdk.ModelManager
        played, *_ = submit.sdk_benchmark(sdk, place, env, task, settings)
        sdk.ModelManager = original
        env.close()
        rows.append(played)
    return np.array(rows)


def main(config: Config) -> None:
    """Play every row and print the table."""
    first: np.ndarray | None = None
    print(f"{'how the module is treated':<46}" + "".join(f"{task:>10}" for task in c.TASKS) + f"{'mean':>8}{'same':>8}")
    with tempfile.TemporaryDirectory() as place:
        for number, (name, (kind, hold)) in enumerate(ROWS.items()):
            if config.rows and not any(part in name for part in config.rows):
                continue
            played = scores(config, kind, hold, Path(place) / str(number))
            first = played if first is None else first
            same = int((played == first).sum())
            means = "".join(f"{mean:>+10.2f}" for mean in played.mean(axis=1))
            print(f"{name:<46}{means}{played.mean():>+8.2f}{same:>5}/{played.size}", flush=True)


if __name__ == "__main__":
    sys.exit(errors.run(main, tyro.cli(Config, description=__doc__)))
