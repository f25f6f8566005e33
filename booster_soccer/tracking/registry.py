"""The model registry: milestones of both learners as versions, their aliases, and where a checkpoint came from.

A version is tagged with its checkpoint's hash, which names it in every descendant's manifest. `Candidate-Pretrain` and
`Candidate-Finetuned` are each learner's newest. `Champion` is a fine-tuned policy whose converted ancestor passed
Gate 3, and whose official score is above that of the Champion before, on the same starts' noise and on at least as many
episodes.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints, manifests
from booster_soccer.store.checkpoints import Checkpoint

CATALOG_VARIABLE = "BOOSTER_CATALOG"  # of Unity Catalog, where names have three levels; set by cloud/bundle.py
CATALOG, SCHEMA = "booster_soccer", "rl_models"


class Model(NamedTuple):
    """A registered model, and the alias of its newest version."""

    name: str
    candidate: str


MODELS = {
    "pretrained": Model("mjx_sac_pretrained", "Candidate-Pretrain"),
    "finetuned": Model("ddpg_finetuned", "Candidate-Finetuned"),
}
CHAMPION = "Champion"
_SIGNATURE = ModelSignature(
    Schema([TensorSpec(np.dtype("float32"), (-1, OBS_SIZE))]),
    Schema([TensorSpec(np.dtype("float32"), (-1, c.NUM_JOINTS))]),
)


def model_name(stage: str) -> str:
    """The registered model of a stage, as the registry in use calls it."""
    name = MODELS[stage].name
    catalog = os.environ.get(CATALOG_VARIABLE, CATALOG)
    return f"{catalog}.{SCHEMA}.{name}" if mlflow.get_registry_uri().startswith("databricks-uc") else name


def find(client: MlflowClient, stage: str, hash_: str) -> str | None:
    """The version that a checkpoint was registered as."""
    try:
        versions = client.search_model_versions(f"name='{model_name(stage)}'")
    except MlflowException:  # Unity Catalog: no such model yet
        return None
    # Unity Catalog cannot be searched by tag, and a listing there lacks them.
    for version in versions:
        tags = version.tags or client.get_model_version(version.name, version.version).tags
        if tags.get("checkpoint") == hash_:
            return str(version.version)
    return None


def register(client: MlflowClient, run_id: str, checkpoint: Checkpoint) -> str:
    """Make a checkpoint the newest version of its stage's model, once, and its candidate; returns the version."""
    name = model_name(checkpoint.stage)
    version = find(client, checkpoint.stage, checkpoint.hash)
    if version is None:
        parents = ",".join(parent["hash"] for parent in checkpoint.manifest["parents"])
        uri = _log_policy(run_id, checkpoint)
        tags = {"checkpoint": checkpoint.hash, "parents": parents}
        version = str(mlflow.register_model(uri, name, tags=tags).version)
    client.set_registered_model_alias(name, MODELS[checkpoint.stage].candidate, version)
    return version


def _log_policy(run_id: str, checkpoint: Checkpoint) -> str:
    """Write the policy into a run as a model that needs NumPy alone; returns the model's URI."""
    policy = policy_from_arrays(checkpoint.arrays)
    arrays = {f"kernel_{i}": kernel for i, kernel in enumerate(policy.kernels)}
    arrays |= {f"bias_{i}": bias for i, bias in enumerate(policy.biases)}
    with tempfile.TemporaryDirectory() as directory, mlflow.start_run(run_id=run_id):
        file = Path(directory) / "policy.npz"
        np.savez(file, mean=policy.mean, std=policy.std, **arrays)  # type: ignore[arg-type]
        model = mlflow.pyfunc.log_model(
            name="policy",
            python_model=str(Path(__file__).with_name("policy_model.py")),
            artifacts={"policy": str(file)},
            signature=_SIGNATURE,
            pip_requirements=[f"numpy=={np.__version__}"],
            metadata={"checkpoint": checkpoint.hash, "stage": checkpoint.stage},
        )
    return model.model_uri


# --- the Champion -------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What a checkpoint's claim to be the Champion rests on: files of `gates.py` and `evaluate.py`."""

    checkpoint: Path
    gates: Path
    evaluation: Path


def promote(client: MlflowClient, run_id: str, claim: Claim) -> str:
    """Give the alias `Champion` to a fine-tuned checkpoint, if it has earned it; returns the verdict in words.

    One that is not registered (its training was not tracked there, or killed at its very end) is first, from this run.
    """
    checkpoint = checkpoints.load(claim.checkpoint, ("finetuned",))
    gates, evaluation = _read(claim.gates), _read(claim.evaluation)
    name, version = model_name("finetuned"), find(client, "finetuned", checkpoint.hash)
    if version is None:
        version = register(client, run_id, checkpoint)
    try:
        score, settings = float(evaluation["mean"]), evaluation["identity"]
        if reason := _not_proved(checkpoint, gates, settings):
            return f"{name} version {version} is no {CHAMPION}: {reason}"
        noise, episodes = float(settings["start_noise"]), int(settings["episodes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{claim.gates} or {claim.evaluation} is not of gates.py and evaluate.py: {error}") from error
    champion = _champion(client, name)
    if champion is not None and str(champion.version) != version:
        its_score, its_noise = float(champion.tags["official_score"]), float(champion.tags["start_noise"])
        if noise != its_noise or episodes < int(champion.tags["episodes"]):
            return (
                f"{name} version {version} is no {CHAMPION}: version {champion.version} was judged on "
                f"{champion.tags['episodes']} episodes a task with noise {its_noise}: evaluate this one so"
            )
        if not score > its_score:
            return (
                f"{name} version {version} ({score:+.2f}) is no {CHAMPION}: "
                f"version {champion.version} has {its_score:+.2f}"
            )
    for tag, value in (("official_score", score), ("start_noise", noise), ("episodes", episodes), ("gate3", "passed")):
        client.set_model_version_tag(name, version, tag, str(value))
    client.set_registered_model_alias(name, CHAMPION, version)
    return f"{name} version {version} is the {CHAMPION} ({score:+.2f})"


def _not_proved(checkpoint: Checkpoint, gates: dict[str, Any], settings: dict[str, Any]) -> str:
    """Why these files do not prove that the checkpoint may be the Champion, whatever its score; empty if they do."""
    if settings.get("hash") != checkpoint.hash or settings["only"] is not None:
        return "the evaluation is of another policy"
    if settings["backend"] != "official":
        return "it was not scored in the official environments"
    ancestors = {ancestor["hash"] for ancestor in checkpoint.manifest["lineage"]}
    if gates["identity"]["converted"] not in ancestors:
        return "the gates are of another policy"
    third = [check["passed"] for check in gates["checks"] if check["gate"] == 3]
    return "" if third and all(third) else "Gate 3 failed"


def _champion(client: MlflowClient, name: str):
    try:
        # By its alias: a listing of versions may leave aliases out.
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException:
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            return content
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give a file of gates.py or evaluate.py") from error
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{file} is no JSON of gates.py or evaluate.py")


# --- lineage --------------------------------------------------------------------------------------------------


def ancestors(path: Path) -> list[dict[str, Any]]:
    """What a submission or checkpoint directory came from, itself first: kind, hash and hashes of its parents."""
    manifest, own = _manifest(path)
    if "checkpoint" in manifest:  # a submission; its lineage is that of the checkpoint
        lineage = list(manifest["lineage"])
        known = {hash_ for ancestor in lineage for hash_ in ancestor["parents"]}
        parents = [ancestor["hash"] for ancestor in lineage if ancestor["hash"] not in known]
        lineage.append({"stage": manifest["stage"], "hash": manifest["checkpoint"], "parents": parents})
        own = {"stage": "submission", "hash": "", "parents": [manifest["checkpoint"]]}
    else:
        lineage = list(manifest["lineage"])
    return [own, *reversed(lineage)]


def _manifest(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file = path / manifests.MANIFEST
    try:
        if json.loads(file.read_bytes())["format"] == "booster-soccer submission":
            return json.loads(file.read_bytes()), {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    manifest, hash_ = manifests.read(path)
    parents = [parent["hash"] for parent in manifest["parents"]]
    return manifest, {"stage": manifest["stage"], "hash": hash_, "parents": parents}


def lineage(client: MlflowClient | None, path: Path) -> Sequence[str]:
    """One line for each ancestor of a submission or checkpoint: what it is, its runs and its version."""
    lines = []
    for entry in ancestors(path):
        words = [f"{entry['stage']:<11}{entry['hash'] or path!s:<18}"]
        if entry["hash"]:
            words += ["not in MLflow"] if client is None else _places(client, entry)
        if entry["parents"]:
            words.append("from " + ", ".join(entry["parents"]))
        lines.append("  ".join(words))
    return lines


def _places(client: MlflowClient, entry: dict[str, Any]) -> list[str]:
    """Where MLflow has a checkpoint: the run that wrote it, its version and aliases."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.checkpoint = '{entry['hash']}'") if experiments else []
    words = [f"run {run.info.run_name} ({run.info.run_id[:8]})" for run in runs]
    if entry["stage"] in MODELS and (version := find(client, entry["stage"], entry["hash"])):
        name = model_name(entry["stage"])
        aliases = client.get_model_version(name, version).aliases
        words.append(f"{name} version {version}" + (f" ({', '.join(aliases)})" if aliases else ""))
    return words or ["not in MLflow"]
