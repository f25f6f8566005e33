"""A whole stage with a toy for a learner, as a process: `python -m tests.toy_stage --out DIR [--resume]`."""

from booster_soccer import terminal

terminal.begin(__name__)

import dataclasses
import time
from pathlib import Path

import tyro

from booster_soccer import errors
from booster_soccer.store.entry import guarded
from booster_soccer.store.run import Run
from booster_soccer.store.signals import StopSignal
from tests import toy_run


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    seed: int = 0
    total_steps: int = 40
    step_s: float = 0.0  # how long a step takes
    resume: bool = False
    keep_state: bool = False


@guarded("out")
def main(config: Config) -> Path:
    settings = toy_run.Config(config.out, total_steps=config.total_steps, seed=config.seed)
    settings = toy_run.keeping(settings) if config.keep_state else settings
    run = Run(config.out, "converted", settings)
    if config.resume and run.is_finished():
        return config.out
    goes_on = run.goes_on(config.resume)
    with StopSignal() as stop:
        toy = Slow(settings, run, {})
        toy.step_s = config.step_s
        if goes_on:
            run.restore(toy)
        print(f"seed {config.seed} runs", flush=True)
        run.train(toy, config.total_steps, stop)
        best = run.kept["best"]
        return run.finish(best, toy_run.OBS, {"best_step": best.steps})


class Slow(toy_run.Toy):
    step_s = 0.0

    def advance(self) -> int:
        time.sleep(self.step_s)
        return super().advance()

    def log(self, steps_per_s: float) -> dict[str, float]:
        print(f"log of step {self.run.steps}", flush=True)
        return super().log(steps_per_s)


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
