"""One stage on a cluster: its local run directory restored, its process in the project's environment, its saves."""

import argparse
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cloud import environment
from cloud.volume import Mirror, VolumeError, publish

EXTRAS = {"cpu": "", "gpu": "gpu,tune"}  # of pyproject.toml, by the bundle's name of an environment
_PATIENCE_S = 9.5  # after SIGTERM a stage saves its state and ends itself before
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec nothing may be loaded
_ROWS = ".runs_table"  # of this run alone, a Delta table in its directory
_NOT_CODE = (".git", ".venv", "runs", "__pycache__", "*.egg-info", ".*_cache")


def run(args: argparse.Namespace) -> int:
    """Run the stage that `task.parser` was given; returns its status."""
    place = args.local
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place / f"{args.run}.lock") as lock:
        venv = environment.ensure(
            args.code, EXTRAS[args.environment], args.torch, place / "environments", args.artifacts / "environments"
        )
        code = _local_code(args.code, place / "code" / args.run)
        of_run = Mirror(place / "runs" / args.run, args.checkpoints / args.run)
        number = of_run.restore()
        print(f"run {args.run}: from snapshot {number}" if number else f"run {args.run}: nothing there yet", flush=True)
        compiled = Mirror(place / "compiled" / venv.name, args.artifacts / "compiled" / venv.name)
        with contextlib.suppress(VolumeError):  # it only saves time
            compiled.restore()
        script, *options = args.stage
        command = [str(environment.python(venv)), str(code / script), *options, *args.options]
        rows = of_run.local / _ROWS
        variables = _variables(compiled.local, args.commit) | {"BOOSTER_RUNS_TABLE": str(rows)}
        status = _run_saving(command, variables, of_run, args.sync_s, lock)
        _try(compiled.save)
        if args.runs_table and rows.is_dir():
            _to_catalog(rows, args.runs_table)
        if status in (0, 1):  # 1: a check that failed, whose result says why
            publish(of_run.local, args.artifacts / "runs" / args.run)
    return status


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO]:
    """Wait until no other process on this machine works on the run; the stage inherits the lock.

    A retry on the same machine must not begin before what the killed task left has ended.
    """
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _local_code(code: Path, target: Path) -> Path:
    """A copy on the local disk: workspace files are slow to import from, and may change during a run."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(code, target, ignore=shutil.ignore_patterns(*_NOT_CODE))
    return target


def _variables(compiled: Path, commit: str) -> dict[str, str]:
    """Environment variables of a stage: the runtime's, less what would bring in its packages."""
    variables = environment.clean(dict(os.environ)) | {
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),  # a restart then compiles in seconds
    }
    if commit:
        variables["BOOSTER_SOCCER_COMMIT"] = commit
    if variables.get("MLFLOW_TRACKING_URI", "").startswith("databricks") and "DATABRICKS_TOKEN" not in variables:
        variables |= _credentials()
    return variables


def _credentials() -> dict[str, str]:
    """Host and token of the workspace, which only the runtime's own Python gets without being asked for."""
    try:
        from databricks.sdk import WorkspaceClient

        config = WorkspaceClient().config
        return {
            "DATABRICKS_HOST": config.host,
            "DATABRICKS_TOKEN": config.authenticate()["Authorization"].removeprefix("Bearer "),
        }
    except Exception as error:  # whatever it is, training goes on without
        print(f"warning: no access to the workspace's MLflow ({type(error).__name__})", flush=True)
        return {}


def _to_catalog(rows: Path, table: str) -> None:
    """The run's own rows into the table of Unity Catalog, which only Spark may write; a row that is there stays one."""
    try:
        from pyspark.sql import SparkSession

        spark = SparkSession.builder.getOrCreate()
        spark.read.format("delta").load(rows.as_uri()).createOrReplaceTempView("rows_of_run")
        spark.sql(f"CREATE TABLE IF NOT EXISTS {table} AS SELECT * FROM rows_of_run WHERE false")
        same = " AND ".join(f"there.{column} = new.{column}" for column in ("run", "stage", "time_utc"))
        spark.sql(f"MERGE INTO {table} there USING rows_of_run new ON {same} WHEN NOT MATCHED THEN INSERT *")
    except Exception as error:  # whatever it is: the rows stay with the run, and the next task brings them
        print(f"warning: {table} has no rows of this task yet: {str(error)[:200]}", file=sys.stderr, flush=True)


def _run_saving(command: list[str], variables: dict[str, str], mirror: Mirror, every_s: float, lock: IO) -> int:
    """Run the stage, save its directory meanwhile and afterwards; SIGTERM is passed on. Returns its status."""
    process = subprocess.Popen(command, cwd=mirror.local, env=variables, pass_fds=[lock.fileno()],
                               preexec_fn=_end_with_parent)  # fmt: skip
    stopped = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set()) if is_main else None
    saver = threading.Thread(target=_save_while, args=(process, mirror, every_s), daemon=True)
    saver.start()
    try:
        while process.poll() is None and not stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
            process.kill()
        status = process.wait()
        if is_main:
            signal.signal(signal.SIGTERM, before)
    saver.join()
    mirror.save()  # without this the stage has not succeeded
    return status if status >= 0 else 128 - status


def _end_with_parent() -> None:
    """In the stage's process: SIGTERM when the task is killed, so that a retry need not wait for its end."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _save_while(process: subprocess.Popen, mirror: Mirror, every_s: float) -> None:
    """In its own thread: a slow volume must not keep the stage waiting."""
    due = time.monotonic() + every_s
    while process.poll() is None:
        time.sleep(_POLL_S)
        if time.monotonic() >= due:
            _try(mirror.save)
            due = time.monotonic() + every_s


def _try(save) -> None:
    """Save; a volume that fails now may work the next time, and the run goes on."""
    try:
        save()
    except OSError as error:
        print(f"warning: not saved on the volume: {error}", file=sys.stderr, flush=True)
