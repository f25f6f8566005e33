"""Two workers tune real trainings on one study, and one is killed with SIGKILL: no trial is lost, none is run twice.

    python -m tests.long.tuning [--trials 6]

Trainings are as small as they can be. Exit status 1 if a trial is missing, or was begun anew instead of gone on with.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from optuna.trial import TrialState

import tune_sac
from booster_soccer import errors
from booster_soccer.errors import UserError

ROOT = Path(tune_sac.__file__).parent
_SMALL = {"preset": "demo", "num_envs": 8, "batch_size": 32, "updates_per_iteration": 2, "buffer_size": 300,
          "learning_starts": 80, "max_actions": 40, "checkpoint_every": 80, "checkpoint_interval_s": 0}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How much."""

    trials: int = 6


def worker(config: tune_sac.Config) -> subprocess.Popen:
    """A worker of the study, in a process group of its own."""
    words = ["--out", config.out, "--trials", config.trials, "--preset-file", config.preset_file]
    words += ["--total-steps", config.total_steps, "--report-every", config.report_every, "--startup-trials", 2]
    command = [sys.executable, str(ROOT / "tune_sac.py"), *map(str, words)]
    with open(config.out / "workers.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def main(config: Config) -> None:
    """Run, kill, run on, count."""
    with tempfile.TemporaryDirectory() as place:
        out, file = Path(place) / "study", Path(place) / "small.json"
        out.mkdir()
        file.write_text(json.dumps(_SMALL))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(place) / "compiled")
        study = tune_sac.Config(out, config.trials, preset_file=file, total_steps=960, report_every=240)
        first, second = worker(study), worker(study)
        while not all((out / f"trial-{n:05d}" / "run.resume" / "manifest.json").exists() for n in (0, 1)):
            if first.poll() is not None or second.poll() is not None:
                raise UserError(f"a worker ended early:\n{(out / 'workers.log').read_text()}")
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        if (second.wait(), worker(study).wait()) != (0, 0):
            raise UserError(f"a worker failed:\n{(out / 'workers.log').read_text()}")
        trials = tune_sac.open_study(study).get_trials()
        states = [trial.state.name for trial in trials]
        resumed = [
            n for n in range(len(trials)) if "resuming at step" in (out / f"trial-{n:05d}/train.log").read_text()
        ]
        print(f"{len(trials)} trials: {', '.join(states)}; gone on with after the kill: {resumed}")
        if len(trials) != config.trials or {trial.state for trial in trials} - {TrialState.COMPLETE, TrialState.PRUNED}:
            raise UserError("trials were lost, or are still begun")
        if len(resumed) != 1:
            raise UserError("not exactly the killed trial was gone on with")
        print((out / "workers.log").read_text())


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
