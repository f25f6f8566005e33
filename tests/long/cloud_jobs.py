"""Run the bundle's five jobs here, from its own definitions, with machines that vanish on the way.

    python -m tests.long.cloud_jobs [--keep DIR]

A small stand-in for the platform: the pipeline's jobs and their tasks in the order of their dependencies, with the same
commands, parameters and environment variables; `/Volumes` is a folder, each start of a task a new machine with an empty
disk. The settings are the smallest that do everything. Once nothing is killed; then pre-training and fine-tuning are
killed with SIGKILL when a state has come to the volume, and tried again. Both must end with the same bytes. A gate may
fail: nothing is learned in so few steps. Exit status 1 if something differs.
"""

import graphlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from booster_soccer import errors
from booster_soccer.errors import UserError
from cloud import check, environment, stage
from tests.long.kill_resume import ROOT, STAGES

_LIMIT_S = 3600.0
_RUN = "drill"
_PARAMETERS = {
    "run": _RUN,
    "preset": "demo",
    "pretrain_options": shlex.join([word for word in STAGES["pretrain"][1:] if word != "--keep-state"]),
    "convert_options": "--real-observations 2",
    "gates_options": "--states 100 --episodes 1 --behaviour-episodes 2",
    "finetune_options": shlex.join([word for word in STAGES["finetune"][1:-2] if word != "--keep-state"]),
    "evaluate_options": "--episodes 1",
    "submit_options": "--episodes 1",
}
KILLED = {"pretrain": "pretrain.resume/manifest.json", "finetune": "finetuned.resume/manifest.json"}


@dataclass(frozen=True)
class Config:
    """What stays."""

    keep: Path | None = None  # new directory for volumes and logs; None: a temporary one


class Platform:
    """Volumes and machines."""

    def __init__(self, place: Path):
        self.place, self.volumes = place, place / "Volumes"
        self.machines = 0
        settings = yaml.safe_load((ROOT / "databricks.yml").read_text())
        self.variables = settings["variables"]
        self.resources = check.build(settings, "prod")
        self.references = {"workspace.file_path": str(ROOT), "bundle.git.commit": "0" * 40}
        for kind, by_name in self.resources.items():
            for name, definition in by_name.items():
                self.references[f"resources.{kind}.{name}.name"] = self.filled(definition["name"])

    def filled(self, text: str) -> str:
        """With the variables' defaults."""
        return re.sub(r"\$\{var\.([^}]*)\}", lambda match: str(self.variables[match[1]].get("default", "-")), text)

    def run_pipeline(self, kills: dict[str, str]) -> None:
        """All jobs in order."""
        tasks = in_order(self.resources["jobs"]["pipeline"]["tasks"])
        for entry in tasks:
            job = self.resources["jobs"][entry["run_job_task"]["job_id"].split(".")[2]]
            given = {name: _PARAMETERS[name] for name in entry["run_job_task"]["job_parameters"] if name in _PARAMETERS}
            defaults = {parameter["name"]: parameter["default"] for parameter in job["parameters"]}
            for task in in_order(job["tasks"]):
                self.run_task(task, job, defaults | given, kills.get(task["task_key"]))

    def run_task(self, task: dict[str, Any], job: dict, parameters: dict[str, str], kill_at: str | None) -> None:
        """A task, tried again as often as it says."""
        for attempt in range(task["max_retries"] + 1):
            status = self.start(task, job, parameters, kill_at if attempt == 0 else None)
            print(f"  {task['task_key']}: {'killed' if status is None else f'status {status}'}", flush=True)
            if status == 0 or (status == 1 and task["task_key"] == "gates"):
                return
            if status is not None:
                raise UserError(f"task {task['task_key']} ended with status {status}: see {self.log}")

    @property
    def log(self) -> Path:
        return self.place / f"machine-{self.machines:02d}.log"

    def start(self, task: dict[str, Any], job: dict, parameters: dict[str, str], kill_at: str | None) -> int | None:
        """On a new machine; its status, or None if it was killed once the volume had a snapshot with that file."""
        self.machines += 1
        disk = self.place / f"machine-{self.machines:02d}"
        for extras in stage.EXTRAS.values():  # this Python stands for the environments, which take minutes to build
            venv = disk / "environments" / environment.key(ROOT, extras, "cpu")
            (venv / "bin").mkdir(parents=True)
            python = venv / "bin" / "python"
            python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would lose its packages
            python.chmod(0o755)
            (venv / "ready.json").write_text("{}")
        file, *words = check.command(task, self.references, parameters, self.variables)
        words = [word.replace("/Volumes/", f"{self.volumes}/") for word in words]
        [cluster] = [c for c in job["job_clusters"] if c["job_cluster_key"] == task["job_cluster_key"]]
        variables = os.environ | cluster["new_cluster"]["spark_env_vars"]
        variables |= {"MLFLOW_TRACKING_URI": f"sqlite:///{disk}/mlflow.db", "MUJOCO_GL": "disable"}  # no workspace here
        variables.pop("MLFLOW_REGISTRY_URI")
        command = [sys.executable, file, "--local", str(disk), "--sync-s", "0.3", *words]
        with open(self.log, "wb") as log:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        limit = time.monotonic() + _LIMIT_S
        while process.poll() is None:
            killed = kill_at is not None and self.is_saved(kill_at)
            if killed or time.monotonic() > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.05)
        else:
            if kill_at is not None:
                raise UserError(f"task {task['task_key']} ended before it could be killed: see {self.log}")
        shutil.rmtree(disk)
        return process.returncode if process.returncode >= 0 else None

    def is_saved(self, file: str) -> bool:
        """Whether a snapshot of the run on the volume has that file."""
        for snapshot in self.volumes.glob(f"*/rl_models/checkpoints/{_RUN}/snapshots/*.json"):
            try:
                if file in json.loads(snapshot.read_text())["files"]:
                    return True
            except (ValueError, FileNotFoundError):
                continue
        return False

    def results(self) -> dict[str, bytes]:
        """Arrays of all checkpoints of the run, as published."""
        [published] = self.volumes.glob(f"*/rl_models/artifacts/runs/{_RUN}")
        for file in ("gates.json", "evaluation.json", "submission/score.json", "inventory_gpu.json"):
            if not (published / file).is_file() and file != "gates.json":  # of a task that failed nothing is published
                raise UserError(f"{file} was not published")
        return {str(path.relative_to(published)): path.read_bytes() for path in published.glob("*/arrays.safetensors")}


def in_order(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks, each after those that it depends on."""
    by_key = {task["task_key"]: task for task in tasks}
    after = {key: [on["task_key"] for on in task.get("depends_on", [])] for key, task in by_key.items()}
    return [by_key[key] for key in graphlib.TopologicalSorter(after).static_order()]


def main(config: Config) -> None:
    """Without kills, with kills, compare."""
    with tempfile.TemporaryDirectory() as temporary:
        place = config.keep or Path(temporary)
        results = []
        for name, kills in (("whole", {}), ("killed", KILLED)):
            print(name, flush=True)
            (place / name).mkdir(parents=True)
            platform = Platform(place / name)
            platform.run_pipeline(kills)
            results.append(platform.results())
        whole, killed = results
        if whole.keys() != {f"{of}/arrays.safetensors" for of in ("pretrain", "converted", "finetuned")}:
            raise UserError(f"published: {sorted(whole)}")
        if differing := [file for file in whole if whole[file] != killed.get(file)]:
            raise UserError(f"not the same bytes after a kill: {', '.join(differing)}")
        print(f"the same bytes: {', '.join(sorted(whole))}")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
