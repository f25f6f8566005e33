"""The bundle in typed Python: five jobs, their pipeline, check of a GPU, tuning, and what they need in Unity Catalog.

    databricks bundle deploy -t dev --var notify_email=...      (databricks.yml names `load_resources`)
    make bundle-check                                           everything that can be told without a workspace
    make bundle-yaml                                            writes cloud/resources.yml, for readers

Each task is `cloud/task.py` with a stage's script and its options after `--`; paths in these are relative to the run's
directory, which the task keeps on the volume. A run is named by the job parameter `run`, the same in all its jobs.
"""

import shlex
from typing import NamedTuple

from databricks.bundles.catalogs import Catalog
from databricks.bundles.catalogs import Lifecycle as CatalogLifecycle
from databricks.bundles.core import Bundle, Resources, Variable, VariableOr, variables
from databricks.bundles.experiments import MlflowExperiment
from databricks.bundles.jobs import (
    ClusterSpec,
    DataSecurityMode,
    GcpAttributes,
    GcpAvailability,
    Job,
    JobCluster,
    JobEmailNotifications,
    JobParameterDefinition,
    RunJobTask,
    SparkPythonTask,
    Task,
    TaskDependency,
)
from databricks.bundles.registered_models import Lifecycle as ModelLifecycle
from databricks.bundles.registered_models import RegisteredModel
from databricks.bundles.schemas import Lifecycle as SchemaLifecycle
from databricks.bundles.schemas import Schema
from databricks.bundles.volumes import Lifecycle as VolumeLifecycle
from databricks.bundles.volumes import Volume

RUNTIME = {"cpu": "16.4.x-cpu-ml-scala2.12", "gpu": "16.4.x-gpu-ml-scala2.12"}
MODELS = {
    "mjx_sac_pretrained": "The policy of SAC pre-training",
    "ddpg_finetuned": "The policy of DDPG fine-tuning",
}
_CODE = "${workspace.file_path}"
# References, not names: the order of creation follows from them.
_CATALOG = "${resources.catalogs.booster_soccer.name}"
_RL_MODELS = "${resources.schemas.rl_models.name}"
_VOLUMES = f"/Volumes/{_CATALOG}/{_RL_MODELS}"
CHECKPOINTS = f"{_VOLUMES}/${{resources.volumes.checkpoints.name}}"
RUNS_TABLE = f"{_CATALOG}.${{resources.schemas.experiments.name}}.runs"
ARTIFACTS = f"{_VOLUMES}/${{resources.volumes.artifacts.name}}"


class Step(NamedTuple):
    """A task: a stage's script and its options, on a node with or without a GPU."""

    key: str
    node: str  # cpu or gpu
    hours: float  # at most
    command: str
    environment: str = ""  # the node's own kind


PRESET = "--preset {{job.parameters.preset}}"
# Each job's steps follow each other; the five jobs do in the pipeline.
FIVE = {
    "setup": [
        Step("environment_cpu", "cpu", 1, "cloud/inventory.py --json inventory_cpu.json"),
        # Built on a node without a GPU: minutes of an L4 cost more.
        Step("environment_gpu", "cpu", 1, "cloud/inventory.py --json inventory_gpu.json", "gpu"),
    ],
    "pretrain": [Step("pretrain", "gpu", 24, f"train_mjx_sac.py {PRESET} --out pretrain --resume")],
    "convert": [
        Step("convert", "cpu", 1, "convert_jax2torch.py --checkpoint pretrain --out converted"),
        Step("gates", "cpu", 2, "gates.py --pretrained pretrain --converted converted --json gates.json"),
    ],
    "finetune": [
        Step("finetune", "gpu", 12, f"finetune_ddpg.py {PRESET} --checkpoint converted --out finetuned --resume"),
    ],
    "submit": [
        Step(
            "evaluate",
            "cpu",
            3,
            "evaluate.py --checkpoint finetuned --start-noise 0.02 --gates gates.json --json evaluation.json",
        ),
        Step("submit", "cpu", 2, "submit.py --checkpoint finetuned --out submission"),  # a dry run: no --yes
    ],
}
GPU_CHECK = [Step("gpu_check", "gpu", 1, "cloud/gpu_check.py --out gpu_check")]
_TUNE = f"tune_sac.py {PRESET} --out tune --trials 40 --total-steps 4000000 --report-every 500000"
TUNE = [Step("tune", "gpu", 24, _TUNE)]
WORKERS = 8  # of a study, at most, each with a `run` of its own


@variables
class Variables:
    """Of databricks.yml."""

    catalog: Variable[str]
    notify_email: Variable[str]
    gpu_node: Variable[str]
    cpu_node: Variable[str]
    torch: Variable[str]


def cluster(kind: str) -> JobCluster:
    """One preemptible node, with a GPU or without."""
    spec = ClusterSpec(
        spark_version=RUNTIME[kind],
        node_type_id=Variables.gpu_node if kind == "gpu" else Variables.cpu_node,
        num_workers=0,
        spark_conf={"spark.databricks.cluster.profile": "singleNode", "spark.master": "local[*]"},
        custom_tags={"ResourceClass": "SingleNode"},
        data_security_mode=DataSecurityMode.SINGLE_USER,
        # The availability governs what comes after the first nodes on demand, and a single node is the first.
        gcp_attributes=GcpAttributes(availability=GcpAvailability.PREEMPTIBLE_GCP, first_on_demand=0),
        spark_env_vars={
            "MLFLOW_TRACKING_URI": "databricks",
            "MLFLOW_REGISTRY_URI": "databricks-uc",
            "MLFLOW_EXPERIMENT_NAME": "${resources.experiments.training.name}",
            "MUJOCO_GL": "disable",  # what draws finds its OpenGL by itself (tracking/video.py)
            "BOOSTER_CATALOG": str(Variables.catalog),
        },
    )
    return JobCluster(job_cluster_key=kind, new_cluster=spec)


def task(step: Step, after: str | None) -> Task:
    """What runs a step; after a preemption, a failure or a time-out it is tried twice more."""
    parameters: list[VariableOr[str]] = [
        *("--code", _CODE, "--commit", "${bundle.git.commit}", "--torch", str(Variables.torch)),
        *("--run", "{{job.parameters.run}}", "--environment", step.environment or step.node),
        *("--checkpoints", CHECKPOINTS, "--artifacts", ARTIFACTS, "--runs-table", RUNS_TABLE),
        *(f"--options={{{{job.parameters.{step.key}_options}}}}", "--", *shlex.split(step.command)),
    ]
    return Task(
        task_key=step.key,
        job_cluster_key=step.node,
        depends_on=_after(after),
        spark_python_task=SparkPythonTask(python_file=f"{_CODE}/cloud/task.py", parameters=parameters),
        max_retries=2,
        min_retry_interval_millis=60_000,
        retry_on_timeout=True,
        timeout_seconds=int(step.hours * 3600),
    )


def _after(key: str | None) -> list[VariableOr[TaskDependency]]:
    return [] if key is None else [TaskDependency(task_key=key)]


def parameters(steps: list[Step]) -> dict[str, str]:
    """Of a job with these steps, with their defaults; `<step>_options` is appended to its command."""
    preset = {"preset": "l4"} if any(PRESET in step.command for step in steps) else {}
    return {"run": "l4"} | preset | {f"{step.key}_options": "" for step in steps}


def job(title: str, steps: list[Step], runs: int = 1) -> Job:
    """The steps one after the other, on one node of each kind that they need; at most `runs` of it at once."""
    keys = [None, *(step.key for step in steps)]
    return _job(
        title,
        [task(step, after) for step, after in zip(steps, keys)],
        parameters(steps),
        [cluster(kind) for kind in sorted({step.node for step in steps})],
        runs,
    )


def pipeline() -> Job:
    """The five jobs, one after the other, all with the pipeline's own parameters."""
    tasks: list[VariableOr[Task]] = []
    for before, (name, steps) in zip((None, *FIVE), FIVE.items()):
        run = RunJobTask(
            job_id=Variable(path=f"resources.jobs.{name}.id", type=int),
            job_parameters={parameter: f"{{{{job.parameters.{parameter}}}}}" for parameter in parameters(steps)},
        )
        tasks.append(Task(task_key=name, run_job_task=run, depends_on=_after(before)))
    return _job("pipeline", tasks, parameters(sum(FIVE.values(), [])), [], 1)


def _job(title: str, tasks: list, parameters: dict[str, str], clusters: list, runs: int) -> Job:
    return Job(
        name=f"booster_soccer {title}",
        job_clusters=clusters,
        tasks=tasks,
        parameters=[JobParameterDefinition(name=name, default=default) for name, default in parameters.items()],
        max_concurrent_runs=runs,
        email_notifications=JobEmailNotifications(on_failure=[Variables.notify_email]),
    )


def load_resources(bundle: Bundle) -> Resources:
    """All of it, as databricks.yml asks for."""
    resources = Resources()
    catalog = Catalog(name=Variables.catalog, lifecycle=CatalogLifecycle(prevent_destroy=True))
    resources.add_resource("booster_soccer", catalog)
    for name, comment in (("rl_models", "Checkpoints and models"), ("experiments", "The table of runs")):
        resources.add_resource(
            name,
            Schema(catalog_name=_CATALOG, name=name, comment=comment, lifecycle=SchemaLifecycle(prevent_destroy=True)),
        )
    for name, comment in (("checkpoints", "Snapshots of runs"), ("artifacts", "Results, environments, reports")):
        resources.add_resource(
            name,
            Volume(catalog_name=_CATALOG, schema_name=_RL_MODELS, name=name, comment=comment,
                   lifecycle=VolumeLifecycle(prevent_destroy=True)),
        )  # fmt: skip
    for name, comment in MODELS.items():
        resources.add_resource(
            name,
            RegisteredModel(catalog_name=_CATALOG, schema_name=_RL_MODELS, name=name, comment=comment,
                            lifecycle=ModelLifecycle(prevent_destroy=True)),
        )  # fmt: skip
    experiment = "/Users/${workspace.current_user.userName}/booster_soccer"
    resources.add_resource("training", MlflowExperiment(name=experiment))
    for number, (name, steps) in enumerate(FIVE.items(), 1):
        resources.add_resource(name, job(f"{number} {name}", steps))
    resources.add_resource("pipeline", pipeline())
    resources.add_resource("gpu_check", job("gpu check", GPU_CHECK))
    resources.add_resource("tune", job("tune", TUNE, WORKERS))
    return resources
