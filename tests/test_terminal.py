"""Ctrl-C, a closed terminal, readers that go away, letters that cannot be shown: they cost output, never work."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
from booster_soccer import errors
from booster_soccer.rollout.processes import Workers
from booster_soccer.store import checkpoints
from tests.test_entry import ROOT, start

LONG = ("--total-steps", "1000000")


@pytest.fixture(autouse=True)
def not_ignored():
    """Whoever starts the tests with a shell's `&` lets them ignore Ctrl-C, and their processes with them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command of a shell, with $STAGE for the toy stage at `run`, which notes its status."""
    stage = f"{sys.executable} -m tests.toy_stage --out run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(["bash", "-c", command.replace("$STAGE", stage)], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=60)  # fmt: skip


# --- output that goes nowhere -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "($STAGE; echo $? > status) | head -n 1",
        "($STAGE 2>&1; echo $? > status) | true",
        "$STAGE >&-; echo $? > status",
        "$STAGE 2>&-; echo $? > status",
        "$STAGE <&- >&- 2>&-; echo $? > status",
        "$STAGE > /dev/full; echo $? > status",
    ],
)
def test_a_run_whose_output_goes_nowhere_is_finished_all_the_same(tmp_path, command):
    done = shell(command, tmp_path)
    assert (tmp_path / "status").read_text() == "0\n", done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    result = checkpoints.load(tmp_path / "run").manifest
    assert result["steps"] == result["metrics"]["best_step"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.metrics.jsonl", "status"]


def test_an_error_without_a_reader_keeps_its_status(tmp_path):
    (tmp_path / "run").write_text("mine")
    done = shell("($STAGE 2>&1; echo $? > status) | true; $STAGE 2>&-; echo $? >> status", tmp_path)
    assert (tmp_path / "status").read_text() == "2\n2\n", done.stderr


def test_what_an_ascii_terminal_cannot_show_is_escaped(tmp_path):
    program = "from booster_soccer import terminal; terminal.begin('__main__'); print('mean \\u00b1 0.5, \\u4e2d')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "mean \\xb1 0.5, \\u4e2d\n"), done.stderr


def test_a_library_is_imported_without_touching_the_streams():
    program = "import sys; a = sys.stdout, sys.stderr, sys.excepthook\nimport evaluate\n" \
              "print(a == (sys.stdout, sys.stderr, sys.excepthook))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("only", [None, "target:1"])
def test_results_are_written_before_they_are_shown(tmp_path, monkeypatch, only):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"mean": 1.0})
    monkeypatch.setattr(evaluate, "play_in_workers", lambda *_, **__: [Played(1.0)])
    monkeypatch.setattr(evaluate, "ending", lambda _: "fell")

    def unshowable(*_):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "ordinal not in range")

    monkeypatch.setattr(evaluate, "show", unshowable)
    monkeypatch.setattr(evaluate.plots, "scores", lambda result, title: Drawn())
    plot = None if only else tmp_path / "x.png"
    with pytest.raises(UnicodeEncodeError):
        evaluate.main(evaluate.Config(policy="zero", json=tmp_path / "x.json", plot=plot, only=only))
    assert json.loads((tmp_path / "x.json").read_text())["score" if only else "mean"] == 1.0
    assert plot is None or plot.read_text() == "plot"


class Drawn:
    def savefig(self, file: Path) -> None:
        file.write_text("plot")


@dataclasses.dataclass
class Played:
    score: float


# --- signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_means_a_saved_state_and_one_line(tmp_path, number):
    process = start(tmp_path / "run", *LONG, "--step-s", "0.05")
    while process.stdout.readline() != "log of step 12\n":
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    line = said.strip().splitlines()[-1]
    step = checkpoints.load(tmp_path / "run.resume").manifest["steps"]
    assert line == f"{number.name}: the state of step {step} is saved, --resume goes on from it"
    assert "Traceback" not in said and not (tmp_path / "run.lock").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = start(tmp_path / "run", *LONG, "--step-s", "30")
    assert process.stdout.readline() == "seed 0 runs\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends at once" in process.stdout.readline()
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "SIGINT: again" in said and "Traceback" not in said
    assert time.monotonic() - sent < 15  # of a step of 30 s


def test_what_was_ignored_stays_ignored(tmp_path):
    """As under `nohup`, and for what a script's shell starts with `&`."""
    command = "trap '' INT HUP; $STAGE --step-s 0.02 & sleep 1.5; kill -INT $!; kill -HUP $!; wait $!; echo $? > status"
    shell(command, tmp_path)
    assert (tmp_path / "status").read_text() == "0\n" and (tmp_path / "run").exists()


def test_a_terminal_that_is_closed_is_a_signal_and_no_crash(tmp_path):
    """SIGHUP comes, and both streams are gone."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "tests.toy_stage", "--out", str(tmp_path / "run"), *LONG, "--step-s", "0.02"]
    process = subprocess.Popen(["setsid", "--ctty", "--wait", *command], cwd=ROOT, stdin=slave, stdout=slave,
                               stderr=slave)  # fmt: skip
    os.close(slave)
    said = b""
    while b"log of step 32" not in said:
        said += os.read(master, 1000)
    os.close(master)
    assert process.wait(30) == 129
    assert checkpoints.load(tmp_path / "run.resume").manifest["steps"] >= 32


def test_ctrl_c_where_nothing_is_saved_is_one_line(capsys):
    @dataclasses.dataclass
    class Resumable:
        resume: bool = False

    before = signal.getsignal(signal.SIGINT)
    try:
        for config, how in ((None, "the same command starts again"), (Resumable(), "command with --resume where")):
            with pytest.raises(SystemExit) as ended:
                errors.run(lambda _: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1), config)
            assert ended.value.code == 130
            said = capsys.readouterr().err
            assert said.startswith("interrupted: ") and how in said and said.count("\n") == 1
            signal.signal(signal.SIGINT, before)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_script_imports_is_one_line():
    program = "from booster_soccer import terminal; terminal.begin('__main__')\n" \
              "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (130, "interrupted before it began\n")


def test_worker_processes_leave_ctrl_c_to_their_parent():
    """A terminal sends it to all of them, also while they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Workers(dict, [()], ["a dictionary"], "") as workers:
        pid = workers._processes[0].pid
        mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk"))
        assert int(mask.split()[1], 16) & 1 << signal.SIGINT - 1
        os.kill(pid, signal.SIGINT)
        workers.call(0, "__len__")
        assert workers.answer(0) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_bug_shows_no_local_variables(monkeypatch):
    """The platform's SDK installs a hook that does, as soon as it is imported."""
    monkeypatch.setattr(sys, "excepthook", lambda *_: pytest.fail("its hook was called"))
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 / 0)
    assert sys.excepthook is sys.__excepthook__
