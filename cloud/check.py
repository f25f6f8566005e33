"""What can be told of the bundle without a workspace: 'make bundle-check'; with `--write`, cloud/resources.yml anew.

    python -m cloud.check [--write]

The definition is built as the CLI builds it: by the program of the package `databricks-bundles`, from databricks.yml.
Then: every resource is read back by the real classes and must be unchanged; every reference and dependency leads
somewhere, and in no circle; every task's script is there and takes the options that it is given; resources.yml shows
what is defined. One line on stderr for each mistake, and status 1.
"""

import contextlib
import graphlib
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
import yaml
from databricks.bundles.catalogs import Catalog
from databricks.bundles.experiments import MlflowExperiment
from databricks.bundles.jobs import Job
from databricks.bundles.registered_models import RegisteredModel
from databricks.bundles.schemas import Schema
from databricks.bundles.volumes import Volume

from booster_soccer import cli, errors
from booster_soccer.errors import UserError
from cloud import task

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ROOT / "cloud" / "resources.yml"
_KINDS: dict[str, Any] = {
    "catalogs": Catalog, "schemas": Schema, "volumes": Volume, "registered_models": RegisteredModel,
    "experiments": MlflowExperiment, "jobs": Job,
}  # fmt: skip
_KNOWN = ("workspace.", "bundle.")  # references that the CLI itself fills in
_HEADER = "# What cloud/bundle.py defines, for readers: 'make bundle-yaml' writes it, nothing reads it.\n"


def build(settings: dict[str, Any], target: str) -> dict[str, Any]:
    """Resources by kind and name, made by the package's own program from the content of databricks.yml."""
    with tempfile.TemporaryDirectory() as place:
        files = {name: Path(place) / name for name in ("input", "output", "diagnostics", "locations")}
        bundle = settings | {"bundle": settings["bundle"] | {"target": target}}
        files["input"].write_text(json.dumps(bundle))
        command = [sys.executable, "-m", "databricks.bundles.build", "--phase", "load_resources"]
        options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
        run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            said = files["diagnostics"].read_text() if files["diagnostics"].exists() else run.stderr[-500:]
            raise UserError(f"the bundle cannot be built: {said}")
        return json.loads(files["output"].read_text())["resources"]


def problems(resources: dict[str, Any], variables: dict[str, Any]) -> Iterator[str]:
    """Every mistake, in one line each."""
    for kind, by_name in resources.items():
        for name, definition in by_name.items():
            where = f"{kind}.{name}"
            try:
                if _KINDS[kind].from_dict(definition).as_dict() != definition:
                    yield f"{where} is not what it was when it is read back"
            except (ValueError, TypeError, KeyError) as error:
                yield f"{where}: {error}"
            yield from (f"{where}: {problem}" for problem in _references(definition, resources, variables))
    jobs = resources["jobs"]
    for name, job in jobs.items():
        yield from (f"jobs.{name}: {problem}" for problem in _order(job["tasks"]))
        for entry in job["tasks"]:
            yield from (f"jobs.{name}, task {entry['task_key']}: {p}" for p in _task(entry, job, jobs, variables))


def _references(definition: Any, resources: dict[str, Any], variables: dict[str, Any]) -> Iterator[str]:
    for reference in sorted(set(re.findall(r"\$\{([^}]*)\}", json.dumps(definition)))):
        parts = reference.split(".")
        if parts[0] == "resources":
            known = len(parts) == 4 and parts[2] in resources.get(parts[1], {})
        else:
            known = parts[0] == "var" and parts[-1] in variables or reference.startswith(_KNOWN)
        if not known:
            yield f"${{{reference}}} leads nowhere"


def _order(tasks: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with the tasks' dependencies."""
    after = {entry["task_key"]: [on["task_key"] for on in entry.get("depends_on", [])] for entry in tasks}
    if len(after) < len(tasks):
        yield "two tasks have one key"
    for key, others in after.items():
        yield from (f"task {key} waits for {other}, which is not there" for other in others if other not in after)
    try:
        graphlib.TopologicalSorter(after).prepare()
    except graphlib.CycleError as error:
        yield f"tasks wait for each other in a circle: {' -> '.join(reversed(error.args[1]))}"


def _task(entry: dict[str, Any], job: dict[str, Any], jobs: dict[str, Any], variables: dict[str, Any]) -> Iterator[str]:
    defaults = {parameter["name"]: parameter["default"] for parameter in job["parameters"]}
    for name in sorted(set(re.findall(r"\{\{job\.parameters\.([^}]*)\}\}", json.dumps(entry)))):
        if name not in defaults:
            yield f"{{{{job.parameters.{name}}}}} is no parameter of the job"
            return
    if "run_job_task" in entry:
        called = entry["run_job_task"]
        theirs = jobs.get(called["job_id"].split(".")[2], {"parameters": []})["parameters"]
        for name in called["job_parameters"].keys() - {parameter["name"] for parameter in theirs}:
            yield f"{called['job_id']} has no parameter {name}"
        return
    if entry["job_cluster_key"] not in [cluster["job_cluster_key"] for cluster in job["job_clusters"]]:
        yield f"the job has no cluster {entry['job_cluster_key']}"
    words = command(entry, {"workspace.file_path": str(ROOT)}, defaults, variables)
    if not Path(words[0]).is_file():
        yield f"{words[0]} is not there"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            stage = task.parser().parse_args(words[1:]).stage
    except SystemExit:
        yield said.getvalue().splitlines()[-1]
        return
    if problem := refused(stage[0], stage[1:]):
        yield problem


def command(
    entry: dict[str, Any], references: dict[str, str], parameters: dict[str, str], variables: dict[str, Any]
) -> list[str]:
    """File and options of a task, with what the platform fills in; what is not given becomes `x`."""
    known = {f"var.{name}": str(value.get("default", "x")) for name, value in variables.items()} | references

    def filled(text: str) -> str:
        text = re.sub(r"\$\{([^}]*)\}", lambda match: known.get(match[1], "x"), text)
        return re.sub(r"\{\{job\.parameters\.([^}]*)\}\}", lambda match: parameters[match[1]], text)

    python_task = entry["spark_python_task"]
    return [filled(text) for text in (python_task["python_file"], *python_task["parameters"])]


def refused(script: str, options: list[str]) -> str:
    """Why a script of ours does not take these options; nothing if it does."""
    if not (ROOT / script).is_file():
        return f"{script} is not there"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if hasattr(module, "PRESETS"):
                with mock.patch.object(sys, "argv", [script, *options]):
                    cli.parse(module.PRESETS, "", next(iter(module.PRESETS)))
            else:
                tyro.cli(module.Config, args=options, config=(tyro.conf.OmitArgPrefixes,))
    except UserError as error:
        return f"{script}: {error}"
    except SystemExit:
        text = " ".join(said.getvalue().translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
        return f"{script} {' '.join(options)}: {text[:200]}"
    return ""


def shown(resources: dict[str, Any]) -> str:
    """The content of resources.yml."""
    return _HEADER + yaml.safe_dump({"resources": resources}, sort_keys=False, width=120)


def main(write: bool) -> list[str]:
    """Look for mistakes, or write resources.yml; returns the mistakes."""
    settings = yaml.safe_load((ROOT / "databricks.yml").read_text())
    by_target = {target: build(settings, target) for target in settings["targets"]}
    resources = next(iter(by_target.values()))
    if write:
        SHOWN.write_text(shown(resources))
        print(SHOWN)
        return []
    found = [problem for of_target in by_target.values() for problem in problems(of_target, settings["variables"])]
    if not SHOWN.is_file() or SHOWN.read_text() != shown(resources):
        found.append(f"{SHOWN.name} is not what bundle.py defines: 'make bundle-yaml' writes it")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    mistakes = errors.run(main, "--write" in sys.argv[1:])
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    if mistakes:
        sys.exit(1)
    if "--write" not in sys.argv[1:]:
        print("the bundle is in order")
