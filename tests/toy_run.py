"""A toy for a learner and its run, for the tests of `store/run.py`: a random walk with a tiny replay buffer."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from booster_soccer.arrays import restore_rng, rng_array
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.replay import Replay
from booster_soccer.store.run import Candidate, RecordConfig, Run, State
from booster_soccer.store.signals import STOPPED, StopSignal

HIDDEN, LANES, CAPACITY = 8, 4, 24
SHAPES = {"input": (HIDDEN, OBS_SIZE), "hidden": (HIDDEN, HIDDEN), "output": (12, HIDDEN)}
OBS = np.linspace(-1, 1, 16 * OBS_SIZE, dtype=np.float32).reshape(16, OBS_SIZE)
# Steps come in fours: logs at 12, 20, 32 and 40, judgements at 12, 24, 36 and 40, saves at 16, 32 and 40.
RECORDS = RecordConfig(log_every=10, judge_every=12, checkpoint_every=16, checkpoint_interval_s=0.0)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    rate: float = 0.5
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (8, 8)
    records: RecordConfig = RECORDS
    total_steps: int = 40
    seed: int = 0
    resume_buffer: str = "saved"
    time_limit_s: float = 0.0


class Killed(BaseException):
    """Stands for SIGKILL."""


class Toy:
    """A random walk of the output's bias, drawn from a small replay buffer; the score is the bias."""

    def __init__(self, config: Config, run: Run, events: dict[str, Callable[[], None]]):
        """`events` are called at "step 8" and "judge 12", for example."""
        self.config, self.run, self.events = config, run, events
        self.rng = np.random.default_rng(config.seed)
        self.replay = Replay(CAPACITY, {"x": ()})
        self.bias = np.zeros(12, np.float32)
        self.done: dict[str, list[int]] = {"step": [], "log": [], "judge": [], "state": []}
        self.diverges_at: float = np.inf

    def note(self, what: str) -> None:
        self.done[what].append(self.run.steps)
        self.events.get(f"{what} {self.run.steps}", lambda: None)()

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {f"actor.{layer}.weight": np.full(shape, 0.01, np.float32) for layer, shape in SHAPES.items()}
        arrays |= {f"actor.{layer}.bias": np.zeros(shape[0], np.float32) for layer, shape in SHAPES.items()}
        return arrays | {"actor.output.bias": self.bias.copy()}

    def advance(self) -> int:
        self.note("step")
        self.replay.add(x=self.rng.standard_normal(LANES).astype(np.float32))
        self.bias += np.float32(self.config.rate) * self.replay.sample(self.rng, 12)["x"]
        return LANES

    def diverged(self) -> bool:
        return self.run.steps >= self.diverges_at

    def log(self, steps_per_s: float) -> dict[str, float]:
        self.note("log")
        return {"steps_per_s": steps_per_s, "bias": float(self.bias.mean())}

    def score(self) -> float:
        return float(self.bias.mean())

    def judge(self) -> dict[str, float]:
        self.note("judge")
        scores = np.full((3, 2), self.score())
        if "best" not in self.run.kept or scores.mean() > self.run.kept["best"].scores.mean():
            self.run.kept["best"] = Candidate(self.arrays(), self.run.steps, scores)
        return {"eval/score": self.score()}

    def state(self) -> State:
        self.note("state")
        replay = self.replay if self.config.resume_buffer == "saved" else None
        return State(self.arrays(), OBS, {"toy": {"rng": rng_array(self.rng)}}, replay)

    def take_up(self, saved: Checkpoint, fill: Callable[[Replay], None]) -> None:
        self.bias = saved.arrays["actor.output.bias"].copy()
        restore_rng(self.rng, checkpoints.load_extra(saved, "toy")["rng"])
        self.replay = Replay(CAPACITY, {"x": ()})
        if self.config.resume_buffer == "saved":
            fill(self.replay)


class WorseAndWorse(Toy):
    """Its first judged policy is its best."""

    def score(self) -> float:
        return -float(self.run.steps)


def go(config: Config, resume: bool = False, parents=(), kind=Toy, diverges_at=np.inf, **events) -> Toy:
    """What the `main` of a script does. `events` as `step_8=function`."""
    run = Run(config.out, "converted", config, parents)
    toy = kind(config, run, {name.replace("_", " "): event for name, event in events.items()})
    toy.diverges_at = diverges_at
    if resume and run.is_finished():
        return toy
    goes_on = run.goes_on(resume)
    with StopSignal() as stop:
        try:
            if goes_on:
                run.restore(toy)
            run.train(toy, config.total_steps, stop, config.time_limit_s)
            best = run.kept["best"]
            run.finish(best, OBS, {"best_step": best.steps})
        except SystemExit as ended:  # must not leave the signal's context: its deadline would end pytest
            assert ended.code == STOPPED
    return toy


def kill() -> None:
    raise Killed


def terminate() -> None:
    """SIGTERM, as a platform sends it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # the handler runs here at the latest


def killed(config: Config, at: str, **arguments) -> None:
    with pytest.raises(Killed):
        go(config, **arguments, **{at: kill})


def stopped(config: Config, at: str, **arguments) -> Toy:
    toy = go(config, **arguments, **{at: terminate})
    assert not config.out.exists()
    return toy


def one_line(config: Config, **arguments) -> str:
    """The message of the `UserError` that a start must end with; no step is taken."""
    with pytest.raises(UserError) as refused:
        go(config, step_0=pytest.fail, step_16=pytest.fail, step_32=pytest.fail, **arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


def names(config: Config) -> list[str]:
    """What lies in the directory of the run."""
    return sorted(path.name for path in config.out.parent.iterdir())


def tables(config: Config) -> dict[str, bytes]:
    """All saved arrays, those of the state and the replay buffer too."""
    files = config.out.parent.rglob("*.safetensors")
    return {str(path.relative_to(config.out.parent)): path.read_bytes() for path in files}


def numbers(config: Config) -> list[dict[str, float]]:
    """The records, without those of time."""
    lines = map(json.loads, (config.out.parent / "run.metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("wall_s", "train/steps_per_s", "train/checkpoint_s")}
        for line in lines
    ]


def keeping(config: Config) -> Config:
    """The same run, whose state stays at the end."""
    return dataclasses.replace(config, records=dataclasses.replace(config.records, keep_state=True))


def parent(path: Path, seed: int) -> Checkpoint:
    """A checkpoint to start from."""
    arrays = Toy(Config(path), Run(path, "converted", Config(path)), {}).arrays()
    return checkpoints.load(checkpoints.save(path, "converted", arrays, OBS, {}, seed, 100, [], {}))
