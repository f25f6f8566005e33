"""MLflow: a run for each stage, under the chain's; settings, numbers, files; the learners' policies as models.

`sqlite:///runs/mlflow.db` where nothing is set; MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI and MLFLOW_EXPERIMENT_NAME are
MLflow's own variables: `databricks` and `databricks-uc` bring the numbers to a workspace, the models to Unity Catalog.
All attempts of a run are one MLflow run.
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

for _name, _value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", "5"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")):
    os.environ.setdefault(_name, _value)  # by default a dead server is waited for many minutes

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints
from booster_soccer.store.run import flat
from booster_soccer.tracking import registry
from booster_soccer.tracking.writer import Record

EXPERIMENT = "booster_soccer"
DATABASE, ARTIFACTS = Path("runs/mlflow.db"), Path("runs/mlartifacts")
_BATCH = 1000  # numbers in one request; more are refused
_PARAMS = 100  # settings in one request
_PARENT_S = 10.0  # for the chain's run to be there, at the end of a stage
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}


def use_default_store() -> bool:
    """The database under `runs/`, unless MLFLOW_TRACKING_URI names another place; whether it is used."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return False
    DATABASE.parent.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{DATABASE.resolve()}")
    return True


def _make_store() -> None:
    """Let MLflow make its tables where they are not there yet; two processes at once would be in each other's way."""
    with DATABASE.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a chain and its stage begin at the same moment
        MlflowClient().search_experiments(max_results=1)


def connect() -> MlflowClient | None:
    """A client of the store in use; None where that is the default one and nothing was ever tracked."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not DATABASE.exists():
        return None
    use_default_store()
    return MlflowClient()


class MlflowWriter:
    """`writer.Writer` for MLflow."""

    LABEL = "MLflow"

    def __init__(self, place: Path):
        self.run_id = ""
        self._parent: Path | None = None

    def start(self, info: dict[str, Any], state: dict[str, Any]) -> None:
        """A new run, or that of the attempt before."""
        self._artifacts = None
        if use_default_store():
            self._artifacts = ARTIFACTS.resolve().as_uri()
            _make_store()
        self.client = MlflowClient()
        self.stage = info["stage"]
        self._parent = None if info["parent"] is None else Path(info["parent"]) / "mlflow.json"
        if state.get("run_id"):
            self.run_id = state["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.set_tag(self.run_id, "attempts", info["attempt"])
            # A process that was killed may have handed on more than it could write down.
            for name in self.client.get_run(self.run_id).data.metrics:
                state["delivered"][name] = max(m.step for m in self.client.get_metric_history(self.run_id, name))
            return
        tags = {"stage": self.stage, "run": info["key"], "attempts": info["attempt"], "commit": info["commit"]}
        tags["parents"] = ",".join(info["parents"])
        run = self.client.create_run(
            self._experiment(), tags={name: str(tag) for name, tag in tags.items()},
            run_name=f"{self.stage}-{info['key']}",
        )  # fmt: skip
        self.run_id = state["run_id"] = run.info.run_id
        params = [Param(name, str(value)[:500]) for name, value in flat(info["config"]).items()]
        for i in range(0, len(params), _PARAMS):
            self.client.log_batch(self.run_id, params=params[i : i + _PARAMS])

    def _experiment(self) -> str:
        """The experiment's id; made if it is not there, perhaps by another process at this moment."""
        is_workspace = mlflow.get_tracking_uri().startswith("databricks")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or (f"/Shared/{EXPERIMENT}" if is_workspace else EXPERIMENT)
        for _ in range(2):
            if experiment := self.client.get_experiment_by_name(name):
                return experiment.experiment_id
            with contextlib.suppress(MlflowException):
                return self.client.create_experiment(name, self._artifacts)
        return self.client.create_experiment(name, self._artifacts)  # its error says what is wrong

    def log(self, records: list[Record]) -> None:
        """Numbers by step."""
        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for step, numbers in records for name, value in numbers.items()]
        for i in range(0, len(metrics), _BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[i : i + _BATCH])
        self._join_parent()

    def _join_parent(self) -> bool:
        """Become a part of the chain's run, once that is there; whether nothing is left to do."""
        if self._parent is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.client.set_tag(self.run_id, "mlflow.parentRunId", json.loads(self._parent.read_text())["run_id"])
                self._parent = None
        return self._parent is None

    def alarm(self, text: str) -> None:
        """A tag; MLflow has no alerts."""
        self.client.set_tag(self.run_id, "alarm", text)

    def artifact(self, path: Path) -> None:
        """Copy a file or directory into the run."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self.client.log_artifact(self.run_id, str(path))

    def finish(self, end: dict[str, Any]) -> str:
        """Close the run; register a learner's policy, and let a fine-tuned one contest the Champion."""
        now_ms, words = int(time.time() * 1000), []
        metrics = [Metric(name, float(value), now_ms, 0) for name, value in end["numbers"].items() if value is not None]
        tags = [RunTag("checkpoint", end["hash"])] if end["hash"] else []
        self.client.log_batch(self.run_id, metrics=metrics, tags=tags)
        for file in end["files"]:
            self.artifact(Path(file))
        if end["checkpoint"] is not None and end["status"] == "finished" and self.stage in registry.MODELS:
            checkpoint = checkpoints.load(end["checkpoint"], (self.stage,))
            version = registry.register(self.client, self.run_id, checkpoint)
            words.append(f"{registry.model_name(self.stage)} version {version}")
        if end["claim"] is not None:
            claim = registry.Claim(*map(Path, end["claim"]))
            try:
                words.append(registry.promote(self.client, self.run_id, claim))
            except UserError as error:
                words.append(f"no {registry.CHAMPION}: {error}")
        until = time.monotonic() + _PARENT_S
        while not self._join_parent() and time.monotonic() < until:
            time.sleep(0.2)
        name = f"{self.stage}-{end['hash']}" if end["hash"] else None
        self.client.update_run(self.run_id, name=name)
        self.client.set_terminated(self.run_id, _STATUS[end["status"]])
        return ", ".join([f"run {self.run_id[:8]} in {_shown(mlflow.get_tracking_uri())}", *words])


def _shown(uri: str) -> str:
    """A URI without the password that it may hold."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if rest else uri
