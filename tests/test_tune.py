"""Tuning: several workers on one study, kills without a trial lost or run twice, pruning, and the best as a preset."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import tune_sac
from booster_soccer import cli
from booster_soccer.agents import search_space
from booster_soccer.agents.sac import SacConfig
from booster_soccer.errors import UserError
from tests import metric_names
from train_mjx_sac import PRESETS

ROOT = Path(tune_sac.__file__).parent
# Stands for train_mjx_sac.py: each step is noted, saved and logged; a log line every 10 steps; the return is how near
# the discount is to 0.96.
_TRAINING = """
import json, os, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1:], sys.argv[2:]))
out, total = Path(options["--out"]), int(options["--total-steps"])
if "fails" in os.environ.get("TRAINING", ""):
    sys.exit("error: it cannot run")
state, log = out.with_name("run.resume"), out.with_name("run.metrics.jsonl")
state.mkdir(exist_ok=True)
step = int((state / "step").read_text()) if (state / "step").exists() else 0
with open(out.with_name("starts"), "a") as file:
    file.write(f"{step}\\n")
while step < total:
    step += 1
    time.sleep(float(os.environ.get("PAUSE_S", "0")))
    with open(out.with_name("steps"), "a") as file:
        file.write(f"{step}\\n")
    if step % 10 == 0:
        with log.open("a") as file:
            value = -abs(float(options["--discount"]) - 0.96) * step
            file.write(json.dumps({"step": step, "train/reward/total": value, "train/episode/length": 2.0}) + "\\n")
    (state / "new").write_text(str(step))
    os.replace(state / "new", state / "step")
"""
# A worker without JAX, which takes seconds to import: it needs the learner's settings only.
_WORKER = """
import dataclasses, sys, types
from pathlib import Path
sac = sys.modules["booster_soccer.agents.sac"] = types.ModuleType("booster_soccer.agents.sac")
fields = [(name, object, dataclasses.field(default=value)) for name, value in {settings!r}]
sac.SacConfig = dataclasses.make_dataclass("SacConfig", fields)
import tune_sac
from booster_soccer import errors
tune_sac.SCRIPT, tune_sac._POLL_S = Path({script!r}), 0.02
errors.run(tune_sac.main, tune_sac.Config(out=Path({out!r}), trials={trials}, total_steps=40, report_every=10,
                                          startup_trials=100))
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "training.py"
    file.write_text(_TRAINING)
    monkeypatch.setattr(tune_sac, "SCRIPT", file)
    monkeypatch.setattr(tune_sac, "_POLL_S", 0.01)
    monkeypatch.setattr(tune_sac, "draw_plots", lambda *_: None)  # slow; the workers' test draws them
    return file


def config(tmp_path: Path, **changes) -> tune_sac.Config:
    small = {"trials": 3, "total_steps": 40, "report_every": 10, "startup_trials": 1}
    return tune_sac.Config(out=tmp_path / "study", **small | changes)


def worker(tmp_path: Path, script: Path, trials: int, **variables) -> subprocess.Popen:
    settings = list(dataclasses.asdict(SacConfig()).items())
    program = _WORKER.format(script=str(script), out=str(tmp_path / "study"), trials=trials, settings=settings)
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ | variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_of_two_workers_one_is_killed_and_no_trial_is_lost_or_run_twice(tmp_path, script):
    tmp_path.joinpath("study").mkdir()
    first, second = (worker(tmp_path, script, 6, PAUSE_S="0.02") for _ in range(2))
    study = tmp_path / "study"
    while not all(len(numbers(study / f"trial-{n:05d}" / "steps")) > 5 for n in (0, 1)):
        assert first.poll() is None and second.poll() is None, (first.communicate(), second.communicate())
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)  # and the training with it
    first.communicate()
    third = worker(tmp_path, script, 6, PAUSE_S="0.02")
    for process in (second, third):
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    trials = tune_sac.open_study(config(tmp_path)).get_trials()
    assert [trial.number for trial in trials] == list(range(6))
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    places = [study / f"trial-{n:05d}" for n in range(6)]
    # Only the killed one was started twice, where it was; no step of any was done twice but the one that was cut off.
    assert sorted(len(numbers(place / "starts")) for place in places) == [1, 1, 1, 1, 1, 2]
    for place in places:
        steps = numbers(place / "steps")
        assert set(steps) == set(range(1, 41)) and len(steps) <= 40 + len(numbers(place / "starts")) - 1
    assert json.loads((study / "best.json").read_text())["preset"] == "cpu"
    for plot in ("history", "curves", "importances"):
        assert (study / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_sigterm_ends_a_worker_and_its_trial_goes_on(tmp_path, script):
    tmp_path.joinpath("study").mkdir()
    process = worker(tmp_path, script, 1, PAUSE_S="0.05")
    steps = tmp_path / "study" / "trial-00000" / "steps"
    while len(numbers(steps)) < 5:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 143 and "the same command goes on with it" in output
    assert tune_sac.open_study(config(tmp_path)).get_trials()[0].state == TrialState.RUNNING
    output, _ = worker(tmp_path, script, 1).communicate(timeout=600)
    [trial] = tune_sac.open_study(config(tmp_path)).get_trials()
    assert trial.state == TrialState.COMPLETE and numbers(steps.with_name("starts"))[1] >= 4
    assert list(trial.intermediate_values) == [10, 20, 30, 40]


def enqueue(of: tune_sac.Config, *discounts: float) -> optuna.Study:
    of.out.mkdir(exist_ok=True)
    study = tune_sac.open_study(of)
    for discount in discounts:
        study.enqueue_trial({"discount": discount})
    return study


def test_a_bad_curve_is_pruned_at_equal_steps_and_its_state_goes(tmp_path, script, monkeypatch):
    monkeypatch.setenv("PAUSE_S", "0.03")
    of = config(tmp_path, trials=2)
    study = enqueue(of, 0.96, 0.98)
    tune_sac.main(of)
    good, bad = study.get_trials()
    assert good.state == TrialState.COMPLETE and good.value == 0.0
    assert bad.state == TrialState.PRUNED and 20 <= max(bad.intermediate_values) < 40
    assert bad.intermediate_values[20] == pytest.approx(-0.02 * 20 * 2)
    assert not (of.out / "trial-00001" / "run.resume").exists()
    assert (of.out / "trial-00001" / "run.metrics.jsonl").exists()


def test_the_best_trial_is_a_preset_file_of_the_training_script(tmp_path, script, monkeypatch, capsys):
    of = config(tmp_path, trials=3, startup_trials=10)
    study = enqueue(of, 0.95, 0.961, 0.98)
    tune_sac.main(of)
    assert study.best_trial.number == 1 and "best of 3 trials" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train_mjx_sac.py", "--preset-file", str(of.out / "best.json")])
    parsed = cli.parse(PRESETS, "", "demo")
    drawn = study.best_trial.params
    assert parsed.sac.discount == (0.961, SacConfig().discount[1]) and parsed.preset == "cpu"
    assert parsed.sac.target_tau == drawn["target_tau"] and parsed.sac.learning_rate[0] == drawn["learning_rate"]
    assert dataclasses.replace(parsed, sac=SacConfig()) == PRESETS["cpu"]


def test_a_study_keeps_its_settings(tmp_path, script):
    of = config(tmp_path, trials=1)
    tune_sac.main(of)
    with pytest.raises(UserError, match="has --total-steps 40, not 80: trials would not compare"):
        tune_sac.main(dataclasses.replace(of, total_steps=80))
    with pytest.raises(UserError, match="reports must divide --total-steps"):
        tune_sac.main(dataclasses.replace(of, total_steps=45))


def test_a_training_that_cannot_run_ends_the_worker_in_one_line(tmp_path, script, monkeypatch):
    monkeypatch.setenv("TRAINING", "fails")
    of = config(tmp_path)
    with pytest.raises(UserError, match="trial 0 ended with status 1: see .*train.log"):
        tune_sac.main(of)
    [trial] = tune_sac.open_study(of).get_trials()
    assert trial.state == TrialState.FAIL
    assert "it cannot run" in (of.out / "trial-00000" / "train.log").read_text()


def test_with_a_database_another_machines_trial_is_left_alone(tmp_path, script):
    of = config(tmp_path, trials=2, storage=f"sqlite:///{tmp_path / 'study.db'}")
    study = enqueue(of)
    study.ask().set_user_attr("place", "of another machine")
    tune_sac.main(of)
    assert [trial.state for trial in study.get_trials()] == [TrialState.RUNNING, TrialState.COMPLETE]


def test_the_search_space_is_of_the_learner_and_around_its_settings():
    config = SacConfig()
    for name, (low, high, _) in search_space.SPACE.items():
        value = getattr(config, name)
        assert low < (value[0] if isinstance(value, tuple) else value) < high
    middle = {name: (low + high) / 2 for name, (low, high, _) in search_space.SPACE.items()}
    drawn = search_space.settings(optuna.trial.FixedTrial(middle))
    assert drawn["discount"] == [0.965, config.discount[1]] and drawn["target_tau"] == middle["target_tau"]


def test_a_command_is_one_that_the_training_script_takes(tmp_path, monkeypatch):
    of = config(tmp_path, preset="demo")
    trial = optuna.create_study().ask()
    monkeypatch.setattr(sys, "argv", tune_sac.command(of, trial, tmp_path)[1:])
    parsed = cli.parse(PRESETS, "", "cpu")
    assert parsed.preset == "demo" and parsed.total_steps == 40 and parsed.resume
    assert parsed.records.log_every == 10 and parsed.sac.weight_decay == trial.params["weight_decay"]


def test_the_names_that_it_reads_are_those_that_pretraining_logs():
    assert {tune_sac._REWARD, tune_sac._LENGTH} <= metric_names.documented("pretrained").keys()
