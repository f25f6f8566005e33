"""The life cycle of a run, with a toy for a learner: what is due when, kills, SIGTERM, divergence, the end.

A kill is an exception that nothing of the code under test catches; after it another `Run` looks at the same files.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints
from booster_soccer.store import run as run_module
from booster_soccer.store.replay import Segments
from booster_soccer.store.run import Run
from booster_soccer.store.signals import StopSignal
from tests.toy_run import (
    LANES,
    OBS,
    RECORDS,
    Config,
    Inner,
    Killed,
    Toy,
    WorseAndWorse,
    go,
    keeping,
    kill,
    killed,
    names,
    numbers,
    one_line,
    parent,
    stopped,
    tables,
)


@pytest.fixture
def config(tmp_path) -> Config:
    (tmp_path / "here").mkdir()
    return Config(tmp_path / "here" / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Config:
    """A run that nothing ever stopped; its state is kept."""
    config = Config(tmp_path_factory.mktemp("whole") / "run", records=dataclasses.replace(RECORDS, keep_state=True))
    go(config)
    return config


# --- what is due, and what is there at the end ------------------------------------------------------------


def test_each_thing_is_done_when_its_multiple_is_passed_and_once_at_the_end(config):
    toy = go(config)
    assert toy.done["step"] == list(range(0, 40, LANES))
    assert toy.done["log"] == [12, 20, 32, 40]
    assert toy.done["judge"] == [12, 24, 36, 40]
    assert toy.done["state"] == [16, 32, 40]
    steps = [line["step"] for line in numbers(config)]
    assert steps == sorted([*toy.done["log"], *toy.done["judge"], *toy.done["state"]])
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_a_save_waits_for_its_interval_but_not_at_the_end(config):
    rare = dataclasses.replace(RECORDS, checkpoint_interval_s=1000.0)
    assert go(dataclasses.replace(config, records=rare)).done["state"] == [40]


def test_a_time_limit_ends_a_run_as_if_finished(config):
    toy = go(dataclasses.replace(config, time_limit_s=1e-9))
    assert toy.done == {"step": [0], "log": [4], "judge": [4], "state": [4]}
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_the_result_is_the_best_policy_and_says_where_it_came_from(config, tmp_path):
    start = parent(tmp_path / "start", seed=1)
    run = Run(config.out, "converted", config, [start], steps_before=start.manifest["steps"])
    toy = WorseAndWorse(config, run, {})
    first: list[np.ndarray] = []
    toy.events["judge 12"] = lambda: first.append(toy.bias.copy())
    assert not run.goes_on(resume=False)
    run.train(toy, 40, StopSignal())
    run.finish(run.kept["best"], OBS, {"best_step": run.kept["best"].steps})
    result = checkpoints.load(config.out, ("converted",))
    np.testing.assert_array_equal(result.arrays["actor.output.bias"], first[0])
    assert result.manifest["metrics"] == {"best_step": 12} and result.manifest["steps"] == 112
    assert result.manifest["parents"] == [{"stage": "converted", "hash": start.hash}]
    assert result.manifest["config"]["inner"] == {"size": 3} and result.manifest["config"]["records"]["log_every"] == 10


def test_a_new_run_does_not_go_over_an_old_one_and_starts_its_own_records(config):
    metrics = config.out.parent / "run.metrics.jsonl"
    metrics.write_text('{"step": 3, "wall_s": 9.0, "of": 1}\n')
    killed(config, "step_28")
    assert numbers(config)[0]["step"] == 12
    before = metrics.read_bytes()
    assert "holds a run: give --resume" in one_line(config)
    assert metrics.read_bytes() == before
    go(config, resume=True)
    assert "holds a run: give --resume" in one_line(config)


def test_resume_without_a_state_starts_from_the_beginning(config, whole, capsys):
    (config.out.parent / "run.metrics.jsonl").write_text('{"step": 3, "wall_s": 9.0}\n')
    go(keeping(config), resume=True)
    assert "run.resume is not there: starting from the beginning" in capsys.readouterr().out
    assert tables(config) == tables(whole) and numbers(config) == numbers(whole)


def test_records_are_json_whatever_the_numbers(config):
    """NaN is a word that other readers of JSON refuse."""
    run = Run(config.out, "converted", config)
    run.steps = 4
    run.record({"loss": float("nan"), "value": float("-inf"), "steps_per_s": 2.0})
    text = (config.out.parent / "run.metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert line == {"step": 4, "loss": None, "value": None, "steps_per_s": 2.0, "not_finite": 2}


# --- killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at", ["step_8", "judge_12", "log_12", "state_16", "step_16", "step_28", "state_32", "step_36", "judge_40"]
)
def test_a_killed_run_ends_with_the_very_bits(config, whole, at):
    killed(keeping(config), at)
    with (config.out.parent / "run.metrics.jsonl").open("a") as file:
        file.write('{"step": 5')  # killed while it wrote
    toy = go(keeping(config), resume=True)
    assert tables(config) == tables(whole)
    assert numbers(config) == numbers(whole)
    step = int(at.split("_")[1])
    saved = max(s for s in (0, 16, 32) if s < step or (s, at) == (step, "step_16"))
    assert toy.done["step"][0] == saved


def test_a_run_killed_again_and_again_ends_with_the_very_bits(config, whole):
    for at in ("step_8", "step_20", "step_36", "judge_36", "state_40"):
        killed(keeping(config), at, resume=True)
    go(keeping(config), resume=True)
    assert tables(config) == tables(whole) and numbers(config) == numbers(whole)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_before_old_segments_are_deleted(config, whole, monkeypatch, call):
    """The new state is whole then; at the third call it is the last one."""
    count = 0

    def count_to(*_):
        nonlocal count
        count += 1
        if count == call:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Segments, "delete_all_but", count_to)
        go(keeping(config))
    toy = go(keeping(config), resume=True)
    assert toy.done["step"][:1] == [16, 32, 40][call - 1 : call] or call == 3
    assert tables(config) == tables(whole)


@pytest.mark.parametrize(
    "file", ["arrays", "golden", "toy", "progress", "kept", "replay", "segment", "manifest.json", "all"]
)
def test_a_damaged_newest_state_means_the_one_before(config, whole, capsys, file):
    killed(keeping(config), "step_36")
    newest = config.out.parent / "run.resume"
    if file == "all":
        shutil.rmtree(newest)
    else:
        (segment,) = (config.out.parent / "run.replay").glob("*016-*.safetensors")
        path = {"segment": segment, "manifest.json": newest / file}.get(file, newest / f"{file}.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
    toy = go(keeping(config), resume=True)
    assert toy.done["step"][0] == 16
    warned = capsys.readouterr().err
    assert warned.startswith("warning: ") and warned.count("\n") == 1 and "run.resume.previous" in warned
    expected = tables(whole)
    assert {name: bits for name, bits in tables(config).items() if ".broken" not in name} == expected
    assert numbers(config) == numbers(whole)


def test_no_usable_state_is_one_line(config):
    killed(config, "step_36")
    for name in ("run.resume", "run.resume.previous"):
        (config.out.parent / name / "toy.safetensors").write_bytes(b"")
    assert "and the one before" in one_line(config, resume=True)


def test_judged_candidates_survive(config):
    killed(config, "step_36", kind=WorseAndWorse)
    go(config, resume=True, kind=WorseAndWorse)
    assert checkpoints.load(config.out).manifest["metrics"]["best_step"] == 12


def test_the_time_before_the_kill_counts(config):
    killed(config, "step_20")
    metrics = config.out.parent / "run.metrics.jsonl"
    lines = [line for line in map(json.loads, metrics.read_text().splitlines()) if line["step"] <= 16]
    before = [line | {"wall_s": 1000.0} if "wall_s" in line else line for line in lines]
    after = {"step": 20, "wall_s": 5000.0}  # to be cut
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*before, after]))
    go(config, resume=True)
    walls = [line["wall_s"] for line in map(json.loads, metrics.read_text().splitlines()) if "wall_s" in line]
    assert walls == sorted(walls) and walls[:2] == [1000.0, 1000.0] and 1000.0 < walls[-1] < 2000.0


# --- the same run only --------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", ["saved", "refill"])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rate": 0.25}, "rate = 0.5, not 0.25"),
        ({"inner": Inner(4)}, "inner.size = 3, not 4"),
        ({"sizes": (8,)}, "sizes = [8, 8], not [8]"),
        ({"seed": 1}, "seed = 0, not 1"),
    ],
)
def test_other_settings_are_refused(config, buffer, finished, change, word):
    """Without a saved buffer nothing was checked once."""
    config = dataclasses.replace(config, resume_buffer=buffer)
    if finished:
        go(config)
    else:
        killed(config, "step_36")
    before = tables(config)
    assert word in one_line(dataclasses.replace(config, **change), resume=True)
    assert tables(config) == before


@pytest.mark.parametrize("buffer", ["saved", "refill"])
@pytest.mark.parametrize("finished", [False, True])
def test_other_parents_are_refused_and_the_same_go_on(config, tmp_path, buffer, finished):
    config = dataclasses.replace(config, resume_buffer=buffer)
    one, two, three = (parent(tmp_path / str(i), seed=i) for i in range(3))
    if finished:
        go(config, parents=[one, two, one])
    else:
        killed(config, "step_36", parents=[one, two, one])
    for others in ([], [one], [two, one], [one, three], [one, two, three]):
        assert "started from other checkpoints" in one_line(config, resume=True, parents=others)
    moved = checkpoints.load(shutil.copytree(one.path, tmp_path / "moved"))
    toy = go(config, resume=True, parents=[moved, two, one])
    assert toy.done["step"] == ([] if finished else [32, 36])


def test_a_run_from_nothing_is_not_gone_on_from_a_parent(config, tmp_path):
    killed(config, "step_36")
    assert "started from no checkpoints" in one_line(config, resume=True, parents=[parent(tmp_path / "a", seed=1)])


def test_what_does_not_change_the_learning_may_change(config):
    killed(config, "step_36")
    more = dataclasses.replace(config, total_steps=48, records=dataclasses.replace(RECORDS, log_every=4))
    assert go(more, resume=True).done["log"] == [36, 40, 44, 48]


def test_a_run_with_a_new_buffer_writes_none(config):
    refill = dataclasses.replace(config, resume_buffer="refill")
    killed(refill, "step_36")
    assert "run.replay" not in names(config)
    toy = go(refill, resume=True)
    assert toy.done["step"] == [32, 36] and toy.replay.added == 8
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_with_a_new_buffer_what_is_due_stays_due(config):
    """Nothing of it is the buffer's: a judgement that was stopped, the counters, the time that is spent."""
    refill = dataclasses.replace(config, resume_buffer="refill")
    assert stopped(refill, "judge_24").done["judge"] == [12, 24]
    again = stopped(refill, "judge_40", resume=True)
    assert again.done["judge"] == [24, 36, 40] and "run" not in names(config)
    assert stopped(refill, "judge_40", resume=True).done == {"step": [], "log": [], "judge": [40], "state": [40]}
    last = go(refill, resume=True)
    assert last.done["judge"] == [40] and last.done["step"] == []
    assert checkpoints.load(config.out).manifest["metrics"]["best_step"] in (12, 24, 36, 40)


@pytest.mark.parametrize("buffer", ["saved", "refill"])
def test_a_time_limit_counts_the_time_before_a_kill(config, buffer):
    config = dataclasses.replace(config, resume_buffer=buffer, time_limit_s=500.0)
    killed(config, "step_20")
    metrics = config.out.parent / "run.metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line | {"wall_s": 600.0}) + "\n" for line in lines))
    assert go(config, resume=True).done["step"] == []
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_from_a_saved_buffer_to_a_new_one_and_not_back(config):
    refill = dataclasses.replace(config, resume_buffer="refill")
    killed(config, "step_20")
    killed(refill, "step_36", resume=True)  # the state before still has its buffer
    assert "saved without its replay buffer: give --resume-buffer refill" in one_line(config, resume=True)
    shutil.rmtree(config.out.parent / "run.resume")
    assert go(config, resume=True).done["step"][0] == 16


# --- SIGTERM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at", ["step_0", "step_16", "log_20", "step_24", "judge_24", "state_32", "judge_40", "state_40"]
)
def test_a_stopped_run_saves_and_ends_with_the_same_numbers(config, whole, at):
    toy = stopped(config, at)
    what, step = at.split("_")
    saved = int(step) + LANES * (what == "step")  # a step is taken to its end
    assert toy.done["state"][-1] == saved
    again = go(config, resume=True)
    assert again.done["step"][:1] == ([saved] if saved < 40 else [])
    assert (config.out / "arrays.safetensors").read_bytes() == (whole.out / "arrays.safetensors").read_bytes()
    assert [line for line in numbers(config) if len(line) > 1] == [line for line in numbers(whole) if len(line) > 1]


def test_a_run_stopped_in_its_last_judgement_judges_again(config):
    assert stopped(config, "judge_40").done["judge"] == [12, 24, 36, 40]
    assert numbers(config)[-1]["step"] == 40 and "eval/score" not in numbers(config)[-1]
    assert stopped(config, "judge_40", resume=True).done["step"] == []
    again = go(config, resume=True)
    assert again.done == {"step": [], "log": [], "judge": [40], "state": []}
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_a_state_that_is_kept_holds_the_last_judgement_too(config):
    class BetterAndBetter(Toy):
        def score(self) -> float:
            return float(self.run.steps)

    stopped(keeping(config), "judge_40", kind=BetterAndBetter)
    go(keeping(config), resume=True, kind=BetterAndBetter)
    state = checkpoints.load(config.out.with_name("run.resume"))
    assert checkpoints.load_extra(state, "kept")["best.steps"] == 40


# --- divergence ---------------------------------------------------------------------------------------


def test_a_diverged_run_ends_with_what_was_best_before(config, capsys):
    toy = go(keeping(config), kind=WorseAndWorse, diverges_at=28)
    assert toy.done["judge"] == [12, 24] and toy.done["state"] == [16]
    result = checkpoints.load(config.out)
    assert result.manifest["metrics"] == {"best_step": 12, "diverged_before_step": 32}  # the next thing due
    said = capsys.readouterr().err
    said, _, more = said.partition("; more: ")
    assert said == "warning: training diverged before step 32: only what was best before counts"
    assert more == "docs/02-mjx-training.md#nan-and-divergence\n"
    assert checkpoints.load(config.out.parent / "run.resume").manifest["steps"] == 16  # no diverged one is saved


def test_a_run_that_diverges_before_it_is_judged_is_one_line(config):
    with pytest.raises(UserError, match=r"^training diverged before step 12, before any .* another --seed or [^\n]*$"):
        go(config, diverges_at=8)
    assert names(config) == []


# --- finished -----------------------------------------------------------------------------------------


def test_a_finished_run_is_recognised(config, capsys):
    go(config)
    before = tables(config)
    toy = go(config, resume=True)
    assert not any(toy.done.values()) and "is finished already" in capsys.readouterr().out
    assert tables(config) == before
    assert "total_steps = 40, not 48" in one_line(dataclasses.replace(config, total_steps=48), resume=True)


def test_a_damaged_result_is_not_taken_for_finished(config):
    go(config)
    (config.out / "arrays.safetensors").write_bytes(b"")
    assert "arrays.safetensors is damaged" in one_line(config, resume=True)


@pytest.mark.parametrize("half_deleted", [False, True])
def test_what_a_kill_after_the_result_left_is_deleted(config, monkeypatch, half_deleted):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "delete", lambda _: kill())
        go(config)
    assert names(config) == ["run", "run.metrics.jsonl", "run.replay", "run.resume", "run.resume.previous"]
    if half_deleted:
        (config.out.parent / "run.resume" / "manifest.json").unlink()
    (config.out.parent / "run.resume.writing").mkdir()
    go(config, resume=True)
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_a_run_killed_before_its_result_is_whole_is_not_finished(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "finish", lambda *_: kill())
        go(config)
    assert "run" not in names(config)
    assert not any(go(config, resume=True).done.values())  # all but the result was there
    assert names(config) == ["run", "run.metrics.jsonl"]


def test_a_kept_state_goes_on_with_more_steps_once_the_result_is_moved(config, tmp_path):
    go(keeping(config))
    kept = ["run", "run.metrics.jsonl", "run.replay", "run.resume", "run.resume.previous"]
    assert names(config) == kept
    go(config, resume=True)  # somebody forgets the option
    assert names(config) == kept
    config.out.rename(tmp_path / "moved")
    toy = go(dataclasses.replace(config, total_steps=48), resume=True)
    assert toy.done["step"] == [40, 44] and names(config) == ["run", "run.metrics.jsonl"]
