"""A task on a cluster: its stage runs in the project's environment, on a directory that comes from the volume."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloud import environment, stage

ROOT = Path(__file__).resolve().parents[1]
# A stage that counts to nine in a file, one state after the other.
_STAGE = """
import json, os, sys, time
from pathlib import Path
state = Path("state.resume/state.json")
n = json.loads(state.read_text()) if state.exists() else 0
variables = [os.environ.get(name) for name in ("PYTHONPATH", "BOOSTER_SOCCER_COMMIT")]
Path("from.json").write_text(json.dumps([n, sys.argv[1:], *variables]))
while n < 9:
    n += 1
    state.parent.mkdir(exist_ok=True)
    Path("new").write_text(json.dumps(n))
    os.replace("new", state)
    while n == 5 and Path("state.resume/state.json").exists() and "--wait" in sys.argv:
        time.sleep(0.02)
Path("result.json").write_text(json.dumps(n))
sys.exit(int(sys.argv[sys.argv.index("--status") + 1]) if "--status" in sys.argv else 0)
"""


@pytest.fixture
def cluster(tmp_path):
    """A checkout with the stage, and an environment that is there already: this Python itself."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "cloud", code / "cloud", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, code)
    (code / "stage.py").write_text(_STAGE)
    return tmp_path


def start(cluster: Path, node: str, *stage: str, options: str = "", sync_s: float = 0.1) -> subprocess.Popen:
    local = cluster / node
    venv = local / "environments" / environment.key(cluster / "code", "", "cpu")
    if not venv.exists():
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to(sys.executable)
        (venv / "ready.json").write_text("{}")
    command = [sys.executable, str(cluster / "code" / "cloud" / "task.py"), "--code", str(cluster / "code")]
    command += ["--run", "r1", "--environment", "cpu", "--commit", "abc", "--local", str(local)]
    command += ["--checkpoints", str(cluster / "volume" / "checkpoints"), "--sync-s", str(sync_s)]
    command += ["--artifacts", str(cluster / "volume" / "artifacts"), f"--options={options}", "--", "stage.py", *stage]
    variables = os.environ | {"PYTHONPATH": "of-the-runtime"}
    return subprocess.Popen(command, cwd=cluster, env=variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_for_state(process: subprocess.Popen, cluster: Path) -> None:
    """Until the waiting stage's state is on the local disk."""
    state = cluster / "node" / "runs" / "r1" / "state.resume" / "state.json"
    while not (state.exists() and state.read_text() == "5"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def wait_for_snapshot(process: subprocess.Popen, cluster: Path) -> None:
    """Until the waiting stage's state is on the volume."""
    place = cluster / "volume" / "checkpoints" / "r1"
    while process.poll() is None:
        with contextlib.suppress(
            FileNotFoundError, ValueError, KeyError, IndexError
        ):  # not there yet, or being written
            newest = json.loads(sorted((place / "snapshots").glob("*.json"))[-1].read_text())
            digest, _ = newest["files"]["state.resume/state.json"]
            if (place / "files" / digest).read_text() == "5":
                return
        time.sleep(0.02)
    raise AssertionError(f"the state never came to the volume: {process.communicate()[0]}")


def test_a_stage_runs_in_its_environment_on_its_directory_and_leaves_its_results(cluster):
    status, output = finish(start(cluster, "node", "--x", "1", options="--seed 2"))
    assert status == 0, output
    results = cluster / "volume" / "artifacts" / "runs" / "r1"
    assert json.loads((results / "result.json").read_text()) == 9
    began, words, path, commit = json.loads((results / "from.json").read_text())
    assert began == 0 and words == ["--x", "1", "--seed", "2"] and path is None and commit == "abc"
    assert not (results / "state.resume").exists()
    status, output = finish(start(cluster, "another node"))
    assert status == 0 and json.loads((results / "from.json").read_text())[0] == 9


def test_after_the_machine_is_gone_another_goes_on_from_the_volume(cluster):
    process = start(cluster, "node", "--wait")
    wait_for_snapshot(process, cluster)
    process.kill()
    process.communicate()
    shutil.rmtree(cluster / "node" / "runs")  # also ends the stage's wait, should SIGTERM not have reached it
    status, output = finish(start(cluster, "another node"))
    assert status == 0, output
    results = cluster / "volume" / "artifacts" / "runs" / "r1"
    assert json.loads((results / "from.json").read_text())[0] == 5
    assert json.loads((results / "result.json").read_text()) == 9


def test_a_retry_on_the_same_machine_waits_for_what_the_killed_task_left(cluster):
    process = start(cluster, "node", "--wait", sync_s=600)
    wait_for_state(process, cluster)
    process.kill()  # its stage gets SIGTERM from the kernel
    process.communicate()
    status, output = finish(start(cluster, "node"))
    assert status == 0, output
    results = cluster / "volume" / "artifacts" / "runs" / "r1"
    assert json.loads((results / "from.json").read_text())[0] == 5  # from the disk: nothing was on the volume


def test_sigterm_is_passed_on_and_the_last_state_comes_to_the_volume(cluster):
    process = start(cluster, "node", "--wait", sync_s=600)
    wait_for_state(process, cluster)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM, output
    status, _ = finish(start(cluster, "another node"))
    results = cluster / "volume" / "artifacts" / "runs" / "r1"
    assert status == 0 and json.loads((results / "from.json").read_text())[0] == 5


def test_a_failed_stage_fails_its_task_and_publishes_nothing(cluster):
    status, output = finish(start(cluster, "node", "--status", "3"))
    assert status == 3 and "Traceback" not in output
    assert not (cluster / "volume" / "artifacts" / "runs").exists()
    assert (cluster / "volume" / "checkpoints" / "r1" / "snapshots").is_dir()


def test_a_check_that_failed_leaves_its_numbers(cluster):
    """Status 1 of gates.py and gpu_check.py: whoever is told to look at the numbers must find them."""
    status, output = finish(start(cluster, "node", "--status", "1"))
    assert status == 1 and "Traceback" not in output
    assert json.loads((cluster / "volume" / "artifacts" / "runs" / "r1" / "result.json").read_text()) == 9


def test_rows_of_a_run_are_merged_into_the_catalogs_table_by_spark(tmp_path, monkeypatch, capsys):
    """A stand-in for Spark notes what it is told."""
    said: list[str] = []
    frame = SimpleNamespace(createOrReplaceTempView=lambda name: said.append(f"view {name}"))
    reader = SimpleNamespace(load=lambda place: (said.append(f"load {place}"), frame)[1])
    session = SimpleNamespace(read=SimpleNamespace(format=lambda kind: (said.append(kind), reader)[1]), sql=said.append)
    builder = SimpleNamespace(builder=SimpleNamespace(getOrCreate=lambda: session))
    monkeypatch.setitem(sys.modules, "pyspark", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyspark.sql", SimpleNamespace(SparkSession=builder))
    stage._to_catalog(tmp_path, "a.b.runs")
    assert said[:3] == ["delta", f"load {tmp_path.as_uri()}", "view rows_of_run"]
    assert said[3].startswith("CREATE TABLE IF NOT EXISTS a.b.runs AS SELECT * FROM rows_of_run")
    assert said[4].startswith("MERGE INTO a.b.runs there USING rows_of_run new ON there.run = new.run AND ")
    monkeypatch.setattr(session, "sql", lambda text: 1 / 0)
    stage._to_catalog(tmp_path, "a.b.runs")  # training is not worth less for it
    assert "a.b.runs has no rows of this task yet" in capsys.readouterr().err


def test_a_run_is_a_name_and_no_path():
    command = [sys.executable, str(ROOT / "cloud" / "task.py"), "--code", str(ROOT), "--run", "../r", "--environment",
               "cpu", "--checkpoints", "c", "--artifacts", "a", "--", "x.py"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "'../r' is no name" in run.stderr


@pytest.mark.parametrize("module", ["__init__", "task", "stage", "environment", "volume"])
def test_what_runs_in_the_runtimes_python_needs_nothing_of_ours(module):
    names = set()
    for node in ast.walk(ast.parse((ROOT / "cloud" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) <= {"cloud", "databricks", "pyspark"}  # the latter two are its own
