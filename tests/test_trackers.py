"""W&B without a server, MLflow on SQLite, both real: runs, attempts, models, aliases, lineage."""

import json
import os
import queue
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.tracking import registry
from booster_soccer.tracking.mlflow_writer import MlflowWriter
from booster_soccer.tracking.registry import Claim
from booster_soccer.tracking.wandb_writer import WandbWriter
from booster_soccer.tracking.worker import serve
from booster_soccer.tracking.writer import END
from tests import small_checkpoints, wandb_file

OBS = np.random.default_rng(5).normal(size=(6, OBS_SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The directory of a fresh MLflow; making its tables takes seconds, so all tests share it."""
    place = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
            patch.delenv(name)
        yield place
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def attempt(writer, place: Path, lines: list[dict], number: int = 1, end: dict | None = None, **info) -> list[str]:
    """One attempt of a run, whose metrics file has these lines; what the user is told."""
    metrics = place / "run.metrics.jsonl"
    place.mkdir(exist_ok=True)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words, told = queue.Queue(), []
    words.put(END | {"status": "finished"} | (end or {}))
    about = {"stage": "pretrained", "key": "ab12", "attempt": number, "parent": None, "metrics": str(metrics),
             "config": {"seed": 3, "sac": {"discount": 0.5}}, "parents": [], "commit": "c0ffee"} | info  # fmt: skip
    serve(writer(place), place / f"{writer.LABEL}.json", about, words, told.append)
    return told


def ends(checkpoint: Checkpoint, **end) -> dict:
    path = str(checkpoint.path)
    return {"checkpoint": path, "hash": checkpoint.hash, "files": [path], "numbers": {"result/score": 1.5}} | end


FIRST = [{"step": 10, "wall_s": 1.0, "train/q": 1.0}, {"step": 20, "train/q": 2.0, "gpu/memory_percent": 7.0}]
SECOND = [FIRST[0], {"step": 20, "train/q": 2.5}, {"step": 30, "train/q": 3.0}]  # step 20 was lost, and came again


@pytest.fixture(scope="module")
def stages(store) -> dict[str, Checkpoint]:
    """Checkpoints of the chain's stages, and a second fine-tuned one."""
    found: dict[str, Checkpoint] = {}
    for name, stage, parents in (("pretrained", "pretrained", []), ("converted", "converted", ["pretrained"]),
                                 ("finetuned", "finetuned", ["converted"]), ("again", "finetuned", ["finetuned"]),
                                 ("stranger", "finetuned", [])):  # fmt: skip
        small_checkpoints.save(store / name, stage=stage, seed=len(found), parents=[found[p] for p in parents])
        found[name] = checkpoints.load(store / name)
    return found


# --- MLflow ---------------------------------------------------------------------------------------------------


def test_attempts_are_one_run_under_the_chains_run(store, stages):
    [chain] = attempt(MlflowWriter, store / "chain.tracking", [], stage="chain", key="cha1n")
    (store / "chain.tracking" / "MLflow.json").rename(store / "chain.tracking" / "mlflow.json")
    place, parent = store / "run.tracking", str(store / "chain.tracking")
    attempt(MlflowWriter, place, FIRST, end={"status": "killed"}, parent=parent)
    state = json.loads((place / "MLflow.json").read_text())
    assert state["delivered"] == {"wall_s": 10, "train/q": 20, "gpu/memory_percent": 20}
    (place / "MLflow.json").write_text(
        json.dumps(state | {"delivered": {"train/q": 10}})
    )  # killed before it was written
    [told] = attempt(MlflowWriter, place, SECOND, 2, ends(stages["pretrained"]), parent=parent)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("booster_soccer")
    runs = {run.data.tags["stage"]: run for run in client.search_runs([experiment.experiment_id])}
    run = runs["pretrained"]
    assert set(runs) == {"chain", "pretrained"} and run.info.run_id[:8] in told
    assert run.data.tags["mlflow.parentRunId"] == runs["chain"].info.run_id
    assert run.data.params == {"seed": "3", "sac.discount": "0.5"}
    assert (run.info.status, run.data.tags["attempts"], run.data.tags["commit"]) == ("FINISHED", "2", "c0ffee")
    assert run.info.run_name == f"pretrained-{stages['pretrained'].hash}" and run.data.metrics["result/score"] == 1.5
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/q")]
    assert history == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["pretrained"]


def test_a_registered_policy_acts_as_the_checkpoint_does(store, stages):
    """By alias, with a signature, on any batch, to the bit; a second registration of the same one changes nothing."""
    for name, model in (("pretrained", "mjx_sac_pretrained"), ("finetuned", "ddpg_finetuned")):
        checkpoint = stages[name]
        for number in (1, 2):
            place = store / f"{name}-{number}.tracking"
            [told] = attempt(MlflowWriter, place, [], end=ends(checkpoint), stage=checkpoint.stage)
            assert told.endswith(f"{model} version 1")
        loaded = mlflow.pyfunc.load_model(f"models:/{model}@{registry.MODELS[checkpoint.stage].candidate}")
        np.testing.assert_array_equal(loaded.predict(OBS), policy_from_arrays(checkpoint.arrays)(OBS))
        signature = loaded.metadata.signature
        assert signature.inputs.inputs[0].shape == (-1, OBS_SIZE) and signature.outputs.inputs[0].shape == (-1, 12)
        with pytest.raises(Exception, match=f"(?i)shape|{OBS_SIZE}"):
            loaded.predict(OBS[:, :-1])


def test_names_have_three_levels_in_unity_catalog(monkeypatch):
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: "databricks-uc")
    assert registry.model_name("pretrained") == "booster_soccer.rl_models.mjx_sac_pretrained"
    assert registry.model_name("finetuned") == "booster_soccer.rl_models.ddpg_finetuned"


def proof(store: Path, checkpoint: Checkpoint, score: float, converted: str, **changes) -> Claim:
    """The files of a claim; `gate3` and the evaluation's settings may be changed."""
    passed = changes.pop("gate3", True)
    identity = {"hash": checkpoint.hash, "only": None, "backend": "official", "episodes": 10, "start_noise": 0.02}
    checks = [{"gate": 1, "passed": True}, {"gate": 3, "passed": True}, {"gate": 3, "passed": passed}]
    (store / "gates.json").write_text(json.dumps({"identity": {"converted": converted}, "checks": checks}))
    (store / "evaluation.json").write_text(json.dumps({"mean": score, "identity": identity | changes}))
    return Claim(checkpoint.path, store / "gates.json", store / "evaluation.json")


def test_only_a_proved_and_better_policy_becomes_the_champion(store, stages):
    client, converted = MlflowClient(), stages["converted"].hash
    run = client.create_run(client.get_experiment_by_name("booster_soccer").experiment_id).info.run_id
    for name in ("finetuned", "stranger"):  # "again" comes with its claim
        registry.register(client, run, stages[name])

    def verdict(name: str, score: float, **changes) -> str:
        return registry.promote(client, run, proof(store, stages[name], score, **{"converted": converted} | changes))

    def champion() -> str:
        version = client.get_model_version_by_alias("ddpg_finetuned", "Champion")
        return client.get_model_version("ddpg_finetuned", version.version).tags["checkpoint"]

    assert "Gate 3 failed" in verdict("finetuned", 5.0, gate3=False)
    assert "official environments" in verdict("finetuned", 5.0, backend="twin")
    assert "evaluation is of another" in verdict("finetuned", 5.0, hash="0" * 16)
    assert "evaluation is of another" in verdict("finetuned", 5.0, only="target:3")
    assert "gates are of another" in verdict("stranger", 5.0)
    with pytest.raises(Exception, match="(?i)champion"):
        champion()
    assert "is the Champion (+5.00)" in verdict("finetuned", 5.0)
    assert "is no Champion: version 1 has +5.00" in verdict("again", 5.0)
    assert "10 episodes a task with noise 0.02" in verdict("again", 6.0, episodes=9)
    assert "10 episodes a task with noise 0.02" in verdict("again", 6.0, start_noise=0.0)
    assert champion() == stages["finetuned"].hash
    assert "is the Champion" in verdict("again", 5.1, episodes=100)
    assert champion() == stages["again"].hash
    assert "is the Champion (+4.00)" in verdict("again", 4.0, episodes=100)  # judged anew
    with pytest.raises(UserError, match="gates.json or .*evaluation.json is not of gates.py and evaluate.py"):
        claim = proof(store, stages["again"], 1.0, converted)
        claim.gates.write_text("{}")
        registry.promote(client, run, claim)


def test_lineage_goes_from_a_submission_back_to_pretraining(store, stages):
    checkpoint = stages["again"]
    attempt(MlflowWriter, store / "again.tracking", [], end=ends(checkpoint), stage="finetuned", key="f1ne")
    submission = store / "submission"
    submission.mkdir()
    manifest = {"format": "booster-soccer submission", "checkpoint": checkpoint.hash, "stage": "finetuned",
                "lineage": checkpoint.manifest["lineage"]}  # fmt: skip
    (submission / "manifest.json").write_text(json.dumps(manifest))
    lines = registry.lineage(MlflowClient(), submission)
    hashes = [stages[name].hash for name in ("again", "finetuned", "converted", "pretrained")]
    assert [line.split()[0] for line in lines] == ["submission", "finetuned", "finetuned", "converted", "pretrained"]
    assert [line.split()[1] for line in lines] == [str(submission), *hashes]
    assert all(line.endswith(f"from {hash_}") for line, hash_ in zip(lines, hashes))
    assert "run finetuned-" in lines[1] and "ddpg_finetuned version" in lines[1] and "Candidate-Finetuned" in lines[1]
    assert "not in MLflow" in lines[3] and "from" not in lines[4]
    assert registry.lineage(MlflowClient(), checkpoint.path) == lines[1:]


# --- W&B ------------------------------------------------------------------------------------------------------


def test_offline_attempts_are_runs_of_their_own_in_one_group(store, stages):
    place = store / "wandb.tracking"
    attempt(WandbWriter, place, FIRST, end={"status": "killed"})
    [told] = attempt(WandbWriter, place, SECOND, 2, ends(stages["pretrained"]))
    assert told.startswith("W&B: offline (no key); 'wandb sync ") and told.endswith("-ab12-2' sends it")
    files = sorted(place.glob("wandb/offline-run-*/*.wandb"))
    runs = [next(record.run for record in wandb_file.records(file) if record.HasField("run")) for file in files]
    assert [run.run_id for run in runs] == ["ab12-1", "ab12-2"]
    assert {run.run_group for run in runs} == {"pretrained-ab12"} and {run.project for run in runs} == {
        "booster_soccer"
    }
    first, second = map(wandb_file.history, files)
    assert first == {"wall_s": [(10, 1.0)], "train/q": [(10, 1.0), (20, 2.0)], "gpu/memory_percent": [(20, 7.0)]}
    assert second == {"train/q": [(30, 3.0)]}
    [artifact] = [record.artifact for record in wandb_file.records(files[1]) if record.HasField("artifact")]
    assert artifact.type == "model" and [entry.path for entry in artifact.manifest.contents] == sorted(
        file.name for file in stages["pretrained"].path.iterdir()
    )


def test_a_film_between_numbers_of_one_step_loses_none_of_them(store):
    place, film = store / "film.tracking", store / "1000.mp4"
    place.mkdir()
    film.write_bytes(b"not looked into")
    writer = WandbWriter(place)
    writer.start({"stage": "pretrained", "key": "cd34", "attempt": 1, "config": {}, "parents": [], "commit": None,
                  "parent": None}, {})  # fmt: skip
    writer.log([(1000, {"train/q": 1.0})])
    writer.artifact(film)
    writer.log([(1000, {"eval/score": 2.0}), (2000, {"train/q": 3.0})])
    writer.finish(END | {"status": "finished"})
    [file] = place.glob("wandb/offline-run-*/*.wandb")
    # W&B's own process writes its last block when it gets to it; in a stage it ends with the tracker.
    for _ in range(100):
        points = wandb_file.history(file)
        if len(points.get("train/q", [])) > 1:
            break
        time.sleep(0.1)
    assert points["train/q"] == [(1000, 1.0), (2000, 3.0)] and points["eval/score"] == [(1000, 2.0)]
    assert {step for name, values in points.items() if name.startswith("video") for step, _ in values} == {1000}
