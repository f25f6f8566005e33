"""Recording a run, with stand-ins for the trackers: what they get, when they fail, and that no training notices."""

import dataclasses
import json
import queue
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints
from booster_soccer.store.run import Run
from booster_soccer.store.signals import STOPPED, Stopped, StopSignal
from booster_soccer.tracking import record, worker
from booster_soccer.tracking.record import Recorder, Result, TrackConfig
from booster_soccer.tracking.worker import Delivery, Tail, serve
from booster_soccer.tracking.writer import END
from tests.toy_run import OBS, Config, Killed, Toy, go, keeping, kill, killed, numbers

NONE, BOTH = TrackConfig(("none",)), TrackConfig(("wandb", "mlflow"))


@dataclasses.dataclass(frozen=True)
class Tracked(Config):
    tracking: TrackConfig = BOTH


class Memory:
    """A tracker that remembers, and refuses whatever `refuse` names."""

    LABEL = "Memory"

    def __init__(self, *refuse: str):
        self.refuse, self.points, self.said = set(refuse), [], []

    def _do(self, what: str, *about) -> None:
        if what in self.refuse:
            raise ConnectionError(f"no {what}")
        self.said.append((what, *about))

    def start(self, info, state):
        self._do("start", info["attempt"])

    def log(self, records):
        self._do("log")
        self.points += [(name, step, value) for step, values in records for name, value in values.items()]

    def alarm(self, text):
        self._do("alarm", text)

    def artifact(self, path):
        self._do("artifact", path.name)

    def finish(self, end):
        self._do("finish", end["status"])
        return "here"


def lines(*records: dict) -> str:
    return "".join(json.dumps(line) + "\n" for line in records)


def served(tmp_path, writer, messages=(END,), attempt: int = 1) -> list[str]:
    """One attempt of a tracker's process, from the run's first word to its last; what it told the user."""
    words, told = queue.Queue(), []
    for message in messages:
        words.put(message)
    info = {"metrics": str(tmp_path / "run.metrics.jsonl"), "key": "k", "attempt": attempt}
    serve(writer, tmp_path / "memory.json", info, words, told.append)
    return told


# --- the file as a queue --------------------------------------------------------------------------------------


def test_a_growing_file_is_read_line_by_line(tmp_path):
    file = tmp_path / "run.metrics.jsonl"
    tail = Tail(file)
    assert tail.read() == []
    file.write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a"')
    assert tail.read() == [(1, {"a": 2.0})] and tail.read() == []
    with file.open("a") as more:
        more.write(': 3.0}\nbroken\n{"no": "step"}\n{"step": 4, "b": 1}\n')
    assert tail.read() == [(2, {"a": 3.0}), (4, {"b": 1.0})]
    file.write_text('{"step": 1, "a": 2.0}\n')  # cut, by a run that goes on from an older state
    assert tail.read() == [(1, {"a": 2.0})]


def test_each_number_is_handed_on_once_by_name_and_step(tmp_path):
    memory = Memory()
    first = Delivery(memory, tmp_path / "memory.json")
    first.add([(10, {"a": 1.0, "b": 1.0}), (10, {"a": 5.0, "c": 2.0}), (20, {"a": 3.0})])
    first.try_now()
    again = Delivery(memory, tmp_path / "memory.json")  # another process
    again.add([(10, {"a": 1.0, "c": 2.0}), (20, {"a": 3.0, "d": 4.0}), (30, {"a": 6.0})])
    again.try_now()
    # Two lines of one step may repeat a name; the first counts.
    expected = [("a", 10, 1.0), ("b", 10, 1.0), ("c", 10, 2.0), ("a", 20, 3.0), ("d", 20, 4.0), ("a", 30, 6.0)]
    assert sorted(memory.points) == sorted(expected)


def test_a_run_that_was_killed_leaves_no_gap_and_no_point_twice(tmp_path):
    """The tracker saw steps that the resumed run takes again from an older state; and the kill left half a line."""
    config = keeping(Config(tmp_path / "run"))
    memory = Memory()
    killed(config, "step_36")  # its last state is that of step 32, its records go on to 36
    served(tmp_path, memory)
    assert max(step for _, step, _ in memory.points) == 36
    with (tmp_path / "run.metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    go(config, resume=True)
    served(tmp_path, memory, attempt=2)
    points = [(name, step) for name, step, _ in memory.points]
    assert len(points) == len(set(points))
    whole = go(dataclasses.replace(config, out=tmp_path / "whole" / "run"))
    assert whole.done["log"][-1] == 40
    recorded = [json.loads(line) for line in (tmp_path / "whole" / "run.metrics.jsonl").read_text().splitlines()]
    assert set(points) == {(name, line["step"]) for line in recorded for name in line if name != "step"}


# --- trackers that fail ---------------------------------------------------------------------------------------


def test_a_tracker_that_cannot_start_is_given_up_in_one_line(tmp_path):
    (tmp_path / "run.metrics.jsonl").write_text(lines({"step": 1, "a": 1.0}))
    memory = Memory("start")
    told = served(tmp_path, memory)
    assert told == ["Memory cannot be used (ConnectionError: no start): this run is not tracked there"]
    assert memory.said == [] and memory.points == []


def test_one_that_fails_for_a_while_gets_everything_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_AGAIN_S", 0.0)
    (tmp_path / "run.metrics.jsonl").write_text(lines(*({"step": i, "a": float(i)} for i in range(4))))
    memory = Memory("log")
    delivery = Delivery(memory, tmp_path / "memory.json")
    delivery.add(Tail(tmp_path / "run.metrics.jsonl").read())
    delivery.try_now()
    assert memory.points == [] and delivery.error is not None
    memory.refuse.clear()
    delivery.try_now()
    assert [step for _, step, _ in memory.points] == [0, 1, 2, 3] and delivery.error is None


def test_what_never_arrived_is_said_once_at_the_end_and_comes_with_the_next_attempt(tmp_path):
    (tmp_path / "run.metrics.jsonl").write_text(lines({"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}))
    failing = Memory("log")
    [told] = served(tmp_path, failing, messages=[{"what": "alarm", "text": "hot"}, END])
    assert "2 lines of numbers did not arrive" in told and "run.metrics.jsonl" in told and "no log" in told
    assert ("finish", "killed") not in failing.said  # a broken one is not waited for
    working = Memory()
    assert served(tmp_path, working, attempt=2) == ["Memory: here"]
    assert working.points == [("a", 1, 1.0), ("a", 2, 2.0)]


def test_alarms_and_files_are_passed_on_and_an_error_there_ends_nothing(tmp_path):
    memory = Memory("artifact")
    messages = [{"what": "artifact", "path": "a/film.mp4"}, {"what": "alarm", "text": "hot"}, END]
    assert served(tmp_path, memory, messages) == ["Memory: here"]
    assert memory.said == [("start", 1), ("alarm", "hot"), ("finish", "killed")]


# --- the recorder in the run ----------------------------------------------------------------------------------


def train(config: Tracked, resumed: bool = False, **events) -> Toy:
    """What the `main` of a learner's script does."""
    run = Run(config.out, "converted", config, free=("track",))
    toy = Toy(config, run, {name.replace("_", " "): event for name, event in events.items()})
    goes_on = run.goes_on(resumed)
    with StopSignal() as stop:
        if goes_on:
            run.restore(toy)
        with Recorder(run.out, "converted", config, (), goes_on) as recorder:
            run.watch = recorder.at
            run.train(toy, config.total_steps, stop)
            path = run.finish(run.kept["best"], OBS, {})
            recorder.result(Result({"result/step": 1.0}, [path], checkpoints.load(path)))
    return toy


def stand_in(monkeypatch, program: str) -> None:
    """Another program takes the place of the trackers' processes; it finds its place in `sys.argv[1]`."""
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, "-c", program, command[-1]], **options)

    monkeypatch.setattr(record.subprocess, "Popen", start)
    monkeypatch.setattr(record.runs_table, "append", lambda row: None)


TELLS = """
import sys
with open(sys.argv[1] + "/told", "ab") as file:
    file.write(sys.stdin.buffer.read())
"""


def told(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "told").read_text().splitlines()]


def test_without_trackers_nothing_is_written(tmp_path):
    train(Tracked(tmp_path / "run", tracking=NONE))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.metrics.jsonl"]


def test_a_tracker_is_told_what_the_run_is_and_how_it_ended(tmp_path, monkeypatch):
    stand_in(monkeypatch, TELLS)
    config = Tracked(tmp_path / "run", tracking=TrackConfig(("mlflow",)))
    train(config)
    info, end = told(tmp_path / "run.tracking")
    assert info["stage"] == "converted" and info["attempt"] == 1 and info["config"]["inner"] == {"size": 3}
    assert info["metrics"] == str(tmp_path / "run.metrics.jsonl")
    result = checkpoints.load(tmp_path / "run")
    assert end == END | {
        "status": "finished", "numbers": {"result/step": 1.0}, "files": [str(result.path)],
        "checkpoint": str(result.path), "hash": result.hash,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "stopped"), (SystemExit(STOPPED), "stopped"), (SystemExit(130), "stopped"),
     (Stopped(), "stopped"), (SystemExit(2), "failed"), (UserError("x"), "failed"), (Killed(), "failed")],
)  # fmt: skip
def test_a_run_that_ends_otherwise_is_marked(tmp_path, monkeypatch, error, status):
    stand_in(monkeypatch, TELLS)
    rows = []
    monkeypatch.setattr(record.runs_table, "append", rows.append)
    config = Tracked(tmp_path, tracking=TrackConfig(("mlflow",)))
    with pytest.raises(type(error)), Recorder(tmp_path / "run", "gates", config) as recorder:
        recorder.alarm("hot")
        raise error
    _, alarm, end = told(tmp_path / "run.tracking")
    assert (alarm["text"], end["status"], end["checkpoint"]) == ("hot", status, None)
    assert [row["status"] for row in rows] == ([] if status == "stopped" else ["failed"])


def test_attempts_of_a_run_share_its_key_and_a_new_run_has_its_own(tmp_path, monkeypatch):
    stand_in(monkeypatch, TELLS)
    config = Tracked(tmp_path / "run", tracking=TrackConfig(("wandb",)))
    with pytest.raises(Killed):
        train(config, step_36=kill)
    train(config, resumed=True)
    first, _, second, _ = told(tmp_path / "run.tracking")
    assert first["key"] == second["key"] and (first["attempt"], second["attempt"]) == (1, 2)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run.tracking" / "wandb.json").write_text('{"delivered": {"train/bias": 40}}')
    train(config)
    third = told(tmp_path / "run.tracking")[4]
    assert third["key"] != first["key"] and third["attempt"] == 1
    assert not (tmp_path / "run.tracking" / "wandb.json").exists()  # or its numbers would be taken for known


def test_a_new_run_takes_nothing_from_the_state_that_a_killed_one_leaves_late(tmp_path):
    """The killed one's process may write its state after the new run has begun."""
    file, tracker = tmp_path / "state.json", Memory()
    file.write_text(json.dumps({"key": "old", "delivered": {"train/q": 500}, "run": "its"}))
    delivery = Delivery(tracker, file)
    delivery.start({"key": "new", "attempt": 1})
    delivery.add([(10, {"train/q": 1.0})])
    delivery.try_now()
    assert tracker.points == [("train/q", 10, 1.0)]
    assert json.loads(file.read_text()) == {"key": "new", "delivered": {"train/q": 10}}


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "import time; time.sleep(600)", "import os; os.close(0)"])
def test_trackers_that_end_hang_or_do_not_listen_change_nothing(tmp_path, monkeypatch, capfd, program):
    train(Tracked(tmp_path / "without" / "run", tracking=NONE))
    stand_in(monkeypatch, program)
    monkeypatch.setattr(record, "_PATIENCE_S", 0.5)
    alarms = []

    class Loud(Recorder):
        def at(self, step):
            alarms.append(step)
            for _ in range(1000):  # more than a pipe holds
                self._send({"what": "alarm", "text": "x" * 1000})
            return {}

    monkeypatch.setattr(sys.modules[__name__], "Recorder", Loud)
    train(Tracked(tmp_path / "with" / "run"))
    for name in ("arrays", "golden"):
        file = f"run/{name}.safetensors"
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    a, b = (numbers(Tracked(tmp_path / name / "run")) for name in ("with", "without"))
    assert a == b and len(alarms) == 10
    assert ("took more than" in capfd.readouterr().err) == ("sleep" in program)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, TELLS)
    (tmp_path / "run.tracking").write_text("in the way")
    train(Tracked(tmp_path / "run"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "this run is not tracked" in error and (tmp_path / "run").is_dir()


def test_a_table_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, TELLS)
    monkeypatch.setattr(record.runs_table, "append", lambda row: 1 / 0)
    train(Tracked(tmp_path / "run"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "did not take a row" in error


def test_numbers_of_the_machine_go_into_the_file_at_their_step(tmp_path):
    config = Tracked(tmp_path / "run", tracking=NONE)
    run = Run(config.out, "converted", config, free=("track",))
    toy = Toy(config, run, {})
    run.watch = lambda step: {"gpu/memory_percent": 50.0} if step == 8 else {}
    with StopSignal() as stop:
        run.train(toy, 40, stop)
    assert numbers(config)[0] == {"step": 8, "gpu/memory_percent": 50.0}


def test_the_option(monkeypatch):
    assert TrackConfig(("wandb", "mlflow", "wandb")).chosen() == ("wandb", "mlflow")
    assert TrackConfig(("none",)).chosen() == TrackConfig(()).chosen() == ()
    for wrong in (("none", "wandb"), ("comet",)):
        with pytest.raises(UserError, match="--track .*: give wandb, mlflow, both, or none alone"):
            TrackConfig(wrong).chosen()
    monkeypatch.delenv(record.VARIABLE)
    assert TrackConfig() == BOTH
    monkeypatch.setenv(record.VARIABLE, "none")
    assert TrackConfig().chosen() == ()


def test_the_real_process_says_in_one_line_that_its_library_is_broken(tmp_path):
    place = tmp_path / "run.tracking"
    place.mkdir()
    (tmp_path / "mlflow.py").write_text("raise ImportError('of another time')")
    command = [sys.executable, "-m", "booster_soccer.tracking.worker", "mlflow", str(place)]
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = subprocess.run(command, input=b"{}\n", capture_output=True, env=environment, cwd=tmp_path)
    error = "mlflow cannot be used (ImportError: of another time): this run is not tracked there\n"
    assert (done.returncode, done.stderr.decode()) == (0, error)
