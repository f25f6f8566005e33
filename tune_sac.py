"""Tuning of pre-training with Optuna: the dense return at equal steps, pruned on the way.

    python tune_sac.py --out runs/tune --trials 40 [--preset cpu] [--total-steps 400000]

Input: nothing; what is varied stands in `booster_soccer/agents/search_space.py`. Output: under `--out`

    journal.log       the study: every trial with its settings and its curve
    trial-00000, ...  each trial's training, a run of train_mjx_sac.py, with its log
    best.json         the best trial as a preset file: train_mjx_sac.py --preset-file best.json --out DIR
    history.png, importances.png, curves.png

Several workers: the same command several times at once, with the same `--out`. One that is killed is started again with
the same command: its trial goes on from the training's last saved state, under its number; none is lost, none is run
twice. SIGTERM or Ctrl-C: the training saves its state, and the worker ends with status 143 or 130.

Several machines: `--storage` with the URL of a database that all reach, and for each its own `--out`, kept for its next
start (on Databricks: one task for each worker, and its run's directory comes back from the volume).
"""

from booster_soccer import terminal

terminal.begin(__name__)

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import optuna
import tyro
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from booster_soccer import errors
from booster_soccer.agents import search_space
from booster_soccer.errors import UserError
from booster_soccer.store.atomic import write_file
from booster_soccer.store.entry import guarded
from booster_soccer.store.run import read_records
from booster_soccer.store.signals import StopSignal, end

SCRIPT = Path(__file__).parent / "train_mjx_sac.py"
_POLL_S = 0.5
_PLACE = "place"  # attribute of a trial: the directory that it is trained in
_LOG, _REWARD, _LENGTH = "run.metrics.jsonl", "train/reward/total", "train/episode/length"  # docs/metrics.md


@dataclass(frozen=True)
class Config:
    """A worker of a study. All workers of a study get the same settings."""

    out: Path  # directory of the study
    trials: int = 40  # of the study, those of before included
    preset: str = "cpu"  # what the trials' other settings are
    preset_file: Path | None = None  # instead: settings from a file
    total_steps: int = 400_000  # of each trial
    report_every: int = 50_000  # steps between two looks at the return; a bad trial has two at least
    startup_trials: int = 8  # drawn at random, and never pruned
    seed: int = 0  # of the trainings
    storage: str | None = None  # URL of a database, where one machine is not enough; None: journal.log in --out


# --- study ------------------------------------------------------------------------------------------------


def open_study(config: Config) -> optuna.Study:
    """The study of `out`, new or as it is."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage: str | optuna.storages.JournalStorage | None = config.storage
    if storage is None:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(config.out / "journal.log")))
    study = optuna.create_study(
        study_name="booster-soccer-sac",
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=config.startup_trials, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(config.startup_trials, n_warmup_steps=2 * config.report_every),
    )
    same = {name: getattr(config, name) for name in ("preset", "total_steps", "report_every", "seed")}
    same["preset_file"] = None if config.preset_file is None else config.preset_file.read_text()
    before = study.user_attrs.get("settings", same)
    for name, value in same.items():
        if before.get(name) != value:
            raise UserError(
                f"the study of {config.out} has --{name.replace('_', '-')} {before.get(name)}, not {value}: trials "
                "would not compare; give the same, or another --out"
            )
    study.set_user_attr("settings", same)
    return study


def directory(out: Path, trial: FrozenTrial | Trial) -> Path:
    return out / f"trial-{trial.number:05d}"


@contextlib.contextmanager
def next_trial(study: optuna.Study, config: Config) -> Iterator[tuple[Trial, IO] | None]:
    """A trial that nobody works on, or else a new one, with its lock; None when all are begun.

    A lock lives as long as a process that holds it, the worker or its training.
    """
    lock = None
    with open(config.out / "study.lock", "w") as of_study:
        fcntl.flock(of_study, fcntl.LOCK_EX)
        place, trial = str(config.out.resolve()), None
        for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Without the attribute it was killed right after it began; whose it was is known on one machine only.
            if trial is None and running.user_attrs.get(_PLACE, config.storage or place) == place:
                lock = _lock(directory(config.out, running))
                trial = Trial(study, running._trial_id) if lock else None
        begun = [state for state in TrialState if state != TrialState.WAITING]  # not what was only enqueued
        if trial is None and len(study.get_trials(deepcopy=False, states=begun)) < config.trials:
            trial = study.ask()
            trial.set_user_attr(_PLACE, place)
            lock = _lock(directory(config.out, trial))
    if trial is None or lock is None:
        yield None
        return
    with lock:
        yield trial, lock


def _lock(place: Path) -> IO | None:
    """Its lock, if nobody holds it."""
    place.mkdir(exist_ok=True)
    file = open(place / "lock", "w")  # noqa: SIM115  (stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


# --- one trial ----------------------------------------------------------------------------------------------


def command(config: Config, trial: Trial, place: Path) -> list[str]:
    """The training of a trial; the judge, whose score says nothing so early, looks once and briefly."""
    base = ["--preset", config.preset]
    if config.preset_file is not None:
        base = ["--preset-file", str(config.preset_file)]
    words = [sys.executable, str(SCRIPT), *base, "--out", str(place / "run"), "--resume", "--seed", str(config.seed)]
    words += ["--total-steps", str(config.total_steps), "--log-every", str(config.report_every)]
    words += ["--judge-every", str(config.total_steps), "--judge-episodes", "2"]
    words += ["--track", "none"]  # the study has its own record
    for name, value in search_space.settings(trial).items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def curve(place: Path, every: int) -> dict[int, float]:
    """Dense return of a training episode at each multiple of `every` steps that the log has reached."""
    points: dict[int, float] = {}
    for numbers in read_records(place / _LOG):
        if numbers.get(_REWARD) is not None and numbers["step"] >= every:  # null: it diverged
            points.setdefault(numbers["step"] // every * every, numbers[_REWARD] * numbers[_LENGTH])
    return points


def run_trial(study: optuna.Study, trial: Trial, lock: IO, config: Config) -> None:
    """Train, watch the curve, tell the study how it ended. A signal: `SystemExit`, and the trial stays begun."""
    place = directory(config.out, trial)
    with StopSignal() as stop, open(place / "train.log", "ab") as log:
        process = subprocess.Popen(command(config, trial, place), stdout=log, stderr=log, pass_fds=[lock.fileno()])
        pruned, points = False, dict(study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def report_new() -> bool:
            new = {step: value for step, value in curve(place, config.report_every).items() if step not in points}
            for step, value in new.items():
                trial.report(value, step)
            points.update(new)
            return bool(new)

        try:
            while process.poll() is None and not stop.received and not pruned:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                pruned = report_new() and config.total_steps not in points and trial.should_prune()
        finally:
            end(process)
        report_new()
    if stop.received:
        print(f"{stop.name}: trial {trial.number} is saved; the same command goes on with it", flush=True)
        raise SystemExit(stop.status)
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        _forget_state(place)
    elif process.returncode == 0 and config.total_steps in points:
        study.tell(trial, points[config.total_steps])
    else:  # diverged, or it could not run at all
        study.tell(trial, state=TrialState.FAIL)
        if not points:
            raise UserError(f"trial {trial.number} ended with status {process.returncode}: see {place / 'train.log'}")
    done = study.get_trials(deepcopy=False)[trial.number]
    print(f"trial {trial.number}: {done.state.name.lower()}, return {done.value} {trial.params}", flush=True)


def _forget_state(place: Path) -> None:
    """A pruned trial's saved state and buffer are of no use."""
    for path in place.glob("run.*"):
        if path.is_dir():
            shutil.rmtree(path)


# --- results ------------------------------------------------------------------------------------------------


def write_best(study: optuna.Study, config: Config) -> None:
    """best.json, as of now."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        print("no trial has run to its end: there is no best one")
        return
    best = study.best_trial
    base = {"preset": config.preset}
    if config.preset_file is not None:
        base = json.loads(config.preset_file.read_text())
    file = config.out / "best.json"
    file.unlink(missing_ok=True)
    content = base | search_space.settings(optuna.trial.FixedTrial(best.params))
    write_file(file, (json.dumps(content, indent=2) + "\n").encode())
    print(f"best of {len(finished)} trials that ran to their end: {best.number}, return {best.value:.2f}")
    print(file)


def draw_plots(study: optuna.Study, out: Path) -> None:
    """The history of the study, all curves, and, from two trials on, what the settings matter."""
    plot = optuna.visualization.matplotlib
    plots = {"history": plot.plot_optimization_history, "curves": plot.plot_intermediate_values}
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) > 1:
        plots["importances"] = plot.plot_param_importances
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of these functions' interface
        for name, draw in plots.items():
            figure = draw(study).get_figure(root=True)
            if figure is not None:
                figure.savefig(out / f"{name}.png", bbox_inches="tight")


@guarded()
def main(config: Config) -> Path:
    """Work on the study until all its trials are begun; returns its directory."""
    if min(config.trials, config.report_every, config.startup_trials) < 1 or config.total_steps % config.report_every:
        raise UserError("--trials, --report-every, --startup-trials: at least 1, and reports must divide --total-steps")
    config.out.mkdir(parents=True, exist_ok=True)
    study = open_study(config)
    while True:
        with next_trial(study, config) as found:
            if found is None:
                break
            run_trial(study, *found, config)
    write_best(study, config)
    draw_plots(study, config.out)
    return config.out


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
