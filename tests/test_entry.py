"""What `main` begins with: one process owns an output and ends with its launcher; paths may be strings."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import chain
import convert_jax2torch
import evaluate
import finetune_ddpg
import gates
import submit
import train_mjx_sac
from benchmarks import ablation, learning
from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints
from booster_soccer.store.entry import guarded, owned, with_paths
from cloud import gpu_check, inventory

ROOT = Path(__file__).parents[1]
SCRIPTS = (ablation, chain, convert_jax2torch, evaluate, finetune_ddpg, gates, gpu_check, inventory, learning, submit,
           train_mjx_sac)  # fmt: skip


def start(out: Path | str, *options: str, cwd: Path = ROOT) -> subprocess.Popen:
    """A toy stage as a process."""
    command = [sys.executable, "-m", "tests.toy_stage", "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


@pytest.fixture
def running(tmp_path) -> Iterator[subprocess.Popen]:
    """A stage that goes on and on, at `run`."""
    process = start(tmp_path / "run", "--step-s", "0.05", "--total-steps", "1000000")
    assert process.stdout is not None and process.stdout.readline() == "seed 0 runs\n"
    yield process
    process.kill()
    process.communicate()


# --- who owns an output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "link", "here/../run"])
def test_a_second_process_is_refused_in_one_line_that_names_the_first(tmp_path, running, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("run")
    second = start(name, "--resume", cwd=tmp_path)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and said.count("\n") == 1
    assert f"is being written by process {running.pid} on {os.uname().nodename} since " in said


def test_any_death_of_the_first_frees_its_output(tmp_path, running):
    running.kill()
    running.wait()
    assert (tmp_path / "run.lock").exists()  # of no meaning any more
    after = start(tmp_path / "run", "--resume", "--total-steps", "40")
    said, _ = after.communicate(timeout=60)
    assert after.returncode == 0, said
    assert sorted(path.name for path in tmp_path.iterdir() if "link" not in path.name) == ["run", "run.metrics.jsonl"]


def test_of_two_that_start_at_once_one_runs(tmp_path):
    """Fifty times: `tests/long/two_at_once.py`."""
    two = [start(tmp_path / "run", "--seed", str(seed), "--step-s", "0.1") for seed in (0, 1)]
    said = [process.communicate(timeout=60)[0] for process in two]
    assert sorted(process.returncode for process in two) == [0, 2]
    (winner,) = (seed for seed in (0, 1) if two[seed].returncode == 0)
    assert f"is being written by process {two[winner].pid} " in said[1 - winner]
    assert checkpoints.load(tmp_path / "run").manifest["seed"] == winner


def test_a_lock_is_free_after_an_error_and_leaves_no_file(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), owned(tmp_path / "deep" / "run"):
            again = owned(tmp_path / "deep" / "run", "--json")
            with pytest.raises(UserError, match=f"being written by process {os.getpid()} on .*another --json"), again:
                pytest.fail("it is ours twice")
            raise ZeroDivisionError
        assert list((tmp_path / "deep").iterdir()) == []


def test_a_lock_that_was_just_given_up_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, the one who held it unlinks it."""
    lock, real_open, opened = tmp_path / "run.lock", os.open, []

    def unlinked_once(path, *arguments, **options):
        descriptor = real_open(path, *arguments, **options)
        if path == lock and not opened:
            os.unlink(path)
        opened.append(path)
        return descriptor

    monkeypatch.setattr(os, "open", unlinked_once)
    with owned(tmp_path / "run"):
        assert opened == [lock, lock] and lock.exists()


def test_a_place_that_cannot_be_written_can_still_be_looked_at(tmp_path, monkeypatch):
    """Fault injection, for root may write everywhere: a finished result is recognised there too."""
    finished = start(tmp_path / "run", "--resume")
    assert finished.wait(60) == 0

    def read_only(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)
    with owned(tmp_path / "run"):
        assert (tmp_path / "run").exists() and not (tmp_path / "run.lock").exists()


def test_a_volume_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    """Fault injection: no file system here lacks them."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with owned(tmp_path / "run"):
        pass
    assert "no lock can be held at" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["json", "plot"])
def test_a_file_of_results_is_owned_too(tmp_path, monkeypatch, output):
    """Refused before anything is played: both would play, and one result would be gone."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("it played"))
    file = tmp_path / "result.png"
    config = evaluate.Config(policy="zero", **{output: file})
    with owned(file), pytest.raises(UserError, match=f"result.png is being written by .*another --{output}"):
        evaluate.main(config)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_owns_its_outputs(tmp_path, script):
    settings = {field.name for field in dataclasses.fields(script.Config)}
    others = {"engine": "native", "total_steps": 1} | ({} if script is chain else {"preset": "cpu"})
    others |= {"preset": "l4"} if script is gpu_check else {"metrics": (str(tmp_path),)}
    known = {name: value for name, value in others.items() if name in settings}
    for output in {"out", "json", "plot"} & settings:
        places = {"checkpoint", "pretrained", "converted", "out", "json", output} & settings
        config = script.Config(**{name: str(tmp_path / name) for name in places}, **known)
        with owned(tmp_path / output), pytest.raises(UserError, match=f"{output} is being written by"):
            script.main(config)


# --- a stage and its launcher -------------------------------------------------------------------------------

_CHAIN = """
import chain
from pathlib import Path
chain.SCRIPTS = Path({scripts!r})
chain.main(chain.Config(out=Path({out!r})))
"""
_STAGE = """
import runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ["toy_stage", "--out", {out!r}, "--step-s", "0.02", "--total-steps", "1000000"]
runpy.run_module("tests.toy_stage", run_name="__main__")
"""


def test_a_stage_saves_and_ends_when_its_chain_is_killed(tmp_path):
    out = tmp_path / "out" / "pretrain"
    (tmp_path / "train_mjx_sac.py").write_text(_STAGE.format(root=str(ROOT), out=str(out)))
    program = _CHAIN.format(scripts=str(tmp_path), out=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while process.stdout.readline() != "log of step 32\n":
        assert process.poll() is None
    stage = int((tmp_path / "out" / "pretrain.lock").read_text().split()[0])
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read()  # to the end: the stage has closed it, too
    assert "SIGTERM: the state of step" in said and "is saved" in said
    for _ in range(100):
        if not Path(f"/proc/{stage}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the stage lives on")
    assert checkpoints.load(tmp_path / "out" / "pretrain.resume").manifest["steps"] >= 32


def test_a_stage_whose_launcher_has_gone_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOSTER_SOCCER_LAUNCHER", "1234567")
    with pytest.raises(UserError, match="has ended: start"):
        guarded("out")(pytest.fail)(evaluate.Config())
    assert "BOOSTER_SOCCER_LAUNCHER" not in os.environ


# --- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_paths_may_be_strings(script):
    """As a notebook gives them: every setting that takes a path."""
    paths = {field.name for field in dataclasses.fields(script.Config) if "Path" in str(field.type)}
    assert paths
    others = {"preset": "cpu", "engine": "native", "total_steps": 1}
    known = {field.name for field in dataclasses.fields(script.Config)}
    texts = {name: ["a/b", "c"] if name == "teachers" else "a/b" for name in paths}
    config = with_paths(script.Config(**texts, **{name: value for name, value in others.items() if name in known}))
    for name in paths:
        expected = (Path("a/b"), Path("c")) if name == "teachers" else Path("a/b")
        assert getattr(config, name) == expected
