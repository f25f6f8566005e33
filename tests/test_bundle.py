"""The bundle: what is defined is in order, and each kind of mistake is found and named."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from databricks.bundles.jobs import Task

from booster_soccer.errors import UserError
from cloud import bundle, check

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = yaml.safe_load((ROOT / "databricks.yml").read_text())


@pytest.fixture(scope="module")
def built():
    return check.build(SETTINGS, "dev")


@pytest.fixture
def resources(built):
    return copy.deepcopy(built)


def found(resources) -> list[str]:
    return list(check.problems(resources, SETTINGS["variables"]))


def task(resources, job: str, number: int = 0) -> dict:
    return resources["jobs"][job]["tasks"][number]


def words(resources, job: str, number: int = 0) -> list[str]:
    return task(resources, job, number)["spark_python_task"]["parameters"]


def test_the_bundle_is_in_order_and_its_yaml_is_of_today():
    assert check.main(write=False) == []


def test_a_key_misspelt_where_it_is_written_is_refused():
    with pytest.raises(TypeError, match="max_retriez"):
        Task(task_key="x", max_retriez=2)


def test_a_misspelt_key_is_found(resources):
    entry = task(resources, "pretrain")
    entry["max_retriez"] = entry.pop("max_retries")
    assert found(resources) == ["jobs.pretrain: Unexpected field 'max_retriez' for class Task"]
    resources["volumes"]["artifacts"]["comments"] = "x"
    assert any(problem.startswith("volumes.artifacts: Unexpected field 'comments'") for problem in found(resources))


def test_a_value_that_does_not_come_back_is_found(resources):
    task(resources, "pretrain")["run_if"] = None  # left out when it is written again
    assert found(resources) == ["jobs.pretrain is not what it was when it is read back"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gates.py", "gate.py", "gate.py is not there"),
        ("--json", "--jsn", "gates.py .*--jsn"),
        ("--run", "--rum", "arguments are required: --run"),
    ],
)
def test_a_missing_script_and_an_unknown_flag_are_found(resources, old, new, message):
    parameters = words(resources, "convert", 1)
    parameters[parameters.index(old)] = new
    [problem] = found(resources)
    assert re.match(f"jobs.convert, task gates: .*{message}", problem)


def test_an_unknown_preset_is_found(resources):
    for parameter in resources["jobs"]["finetune"]["parameters"]:
        if parameter["name"] == "preset":
            parameter["default"] = "l5"
    assert found(resources) == [
        "jobs.finetune, task finetune: finetune_ddpg.py: --preset l5 is unknown: "
        "use one of demo, cpu, l4, h200, scratch"
    ]


def test_a_missing_task_file_is_found(resources):
    task(resources, "submit")["spark_python_task"]["python_file"] = "${workspace.file_path}/cloud/tasks.py"
    assert [problem for problem in found(resources) if problem.endswith("cloud/tasks.py is not there")]


def test_a_circle_and_a_dependency_on_nothing_are_found(resources):
    task(resources, "pipeline")["depends_on"] = [{"task_key": "submit"}]
    [problem] = found(resources)
    assert problem.startswith("jobs.pipeline: tasks wait for each other in a circle: ")
    assert all(name in problem for name in bundle.FIVE)
    task(resources, "pipeline")["depends_on"] = [{"task_key": "sumbit"}]
    assert found(resources) == ["jobs.pipeline: task setup waits for sumbit, which is not there"]


def test_references_and_parameters_lead_somewhere(resources):
    task(resources, "pipeline", 2)["run_job_task"]["job_id"] = "${resources.jobs.konvert.id}"
    assert "jobs.pipeline: ${resources.jobs.konvert.id} leads nowhere" in found(resources)
    task(resources, "pipeline", 2)["run_job_task"]["job_id"] = "${resources.jobs.pretrain.id}"
    assert "jobs.pipeline, task convert: ${resources.jobs.pretrain.id} has no parameter gates_options" in found(
        resources
    )


def test_a_parameter_that_no_job_has_is_found(resources):
    parameters = words(resources, "pretrain")
    parameters[parameters.index("{{job.parameters.run}}")] = "{{job.parameters.runs}}"
    assert found(resources) == ["jobs.pretrain, task pretrain: {{job.parameters.runs}} is no parameter of the job"]


def test_a_definition_that_cannot_be_built_is_one_line():
    wrong = SETTINGS | {"python": {"resources": ["cloud.bundle:load_resource"]}}
    with pytest.raises(UserError, match="the bundle cannot be built: .*load_resource"):
        check.build(wrong, "dev")


def test_clusters_are_preemptible_single_nodes_and_tasks_are_tried_again(resources):
    """The driver is the only node: with a first node on demand nothing would be preemptible."""
    for name, job in resources["jobs"].items():
        assert job["email_notifications"]["on_failure"] == ["${var.notify_email}"]
        for cluster in job.get("job_clusters", []):
            spec = cluster["new_cluster"]
            assert spec["gcp_attributes"] == {"availability": "PREEMPTIBLE_GCP", "first_on_demand": 0}
            assert spec["num_workers"] == 0 and spec["custom_tags"] == {"ResourceClass": "SingleNode"}
        for entry in job["tasks"]:
            if name != "pipeline":
                assert entry["max_retries"] == 2 and entry["retry_on_timeout"] and entry["timeout_seconds"] > 0
    for long in ("pretrain", "finetune"):
        assert "--resume" in words(resources, long)
    # Two tasks at once would write the same run; workers of a study have one each.
    assert [name for name, job in resources["jobs"].items() if job["max_concurrent_runs"] != 1] == ["tune"]


def test_catalog_schemas_volumes_and_models_have_their_names(resources):
    assert SETTINGS["variables"]["catalog"]["default"] == "booster_soccer"
    assert set(resources["schemas"]) == {"rl_models", "experiments"}
    assert set(resources["volumes"]) == {"checkpoints", "artifacts"}
    assert set(resources["registered_models"]) == {"mjx_sac_pretrained", "ddpg_finetuned"}
    for kind in ("catalogs", "schemas", "volumes", "registered_models"):
        assert all(resource["lifecycle"]["prevent_destroy"] for resource in resources[kind].values())


def test_nobodys_address_stands_in_the_bundle():
    for file in ("databricks.yml", "cloud/bundle.py", "cloud/resources.yml"):
        assert "@" not in (ROOT / file).read_text().replace("@variables", "")
