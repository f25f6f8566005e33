"""The report of each stage, of an evaluation and of the chain: one HTML page each, from what the runs leave on disk.

    <out>.html             beside the checkpoint of pre-training, conversion and fine-tuning, and the submission package
    <name>.html            beside the <name>.json of an evaluation or the gates
    <chain>/report.html    the chain's, which links the others

A page that cannot be written is a warning: the stage's own result is there already.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError, one_line
from booster_soccer.store import manifests
from booster_soccer.store.atomic import beside
from booster_soccer.store.run import read_records
from booster_soccer.tracking import advice, page, plots
from booster_soccer.tracking.advice import Advice
from booster_soccer.tracking.page import Section, Table
from booster_soccer.tracking.report import replay_command, worst_episodes

_NO_ADVICE = "No rule of the advice applies."


def _as_warning(write: Callable[..., Path]) -> Callable[..., list[Path]]:
    """The page that was written, or none: one that cannot be written ends no stage."""

    @wraps(write)
    def written(*args: Any, **kwargs: Any) -> list[Path]:
        try:
            return [write(*args, **kwargs)]
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            message = one_line(f"{type(error).__name__} {error}" if not isinstance(error, UserError) else str(error))
            print(f"warning: the report of {args[0]} is not written: {message[:300]}", file=sys.stderr)
            return []

    return written


# --- the pages ----------------------------------------------------------------------------------------------


@_as_warning
def of_run(out: Path) -> Path:
    """The page of a finished pre-training or fine-tuning."""
    manifest, hash_ = manifests.read(out)
    records = read_records(beside(out, "metrics.jsonl"))
    sections = [_identity(manifest, hash_, records)]
    if manifest["stage"] == "finetuned":
        sections.append(Section("Verdict", verdict_in_words(manifest["metrics"])))
    curves = curves_of(records)
    groups = {
        "Official score while training": [name for name in curves if name.startswith("eval/score")],
        "Score of the training episodes": [name for name in curves if "episode/score_" in name],
        "Success of the training episodes": [name for name in curves if "episode/success_" in name],
    }
    for title, names in groups.items():
        if names:
            figure = plots.curves_by_task({name: curves[name] for name in names}, title, "mean of the tasks")
            sections.append(Section(title, figure=plots.svg(figure)))
    drawn = {name for names in groups.values() for name in names}
    rewards = {name: curves[name] for name in curves if "reward/" in name}
    if rewards:
        text = ["Raw means of each term per action, before its weight; the weights are in the settings below."]
        sections.append(Section("Reward terms", text, figure=plots.svg(plots.small_multiples(rewards))))
    others = {name: curves[name] for name in curves if name not in drawn and name not in rewards and name != "wall_s"}
    if others:
        svg = plots.svg(plots.small_multiples(others))
        sections.append(Section("Everything else that was logged", figure=svg, is_folded=True))
    sections += _settings(manifest)
    return page.write(beside(out, "html"), f"{_STAGE_TITLES[manifest['stage']]}: {out.name}", str(out), sections)


@_as_warning
def of_conversion(out: Path) -> Path:
    """The page of a conversion."""
    manifest, hash_ = manifests.read(out)
    metrics = manifest["metrics"]
    differences = [(name, f"{value:.1e}") for name, value in metrics["max_difference"].items()]
    spread = [(joint, *(f"{row[name]:+.2f}" for name in ("min", "mean", "max")))
              for joint, row in metrics["log_std"]["by_joint"].items()]  # fmt: skip
    counts = ", ".join(f"{count} {name}" for name, count in metrics["observations"].items())
    low, high = metrics["log_std"]["range"]
    sections = [
        _identity(manifest, hash_, []),
        Section("JAX against PyTorch", [f"Largest differences on observations: {counts}."],
                Table(("what", "difference"), differences)),
        Section("The spread that was dropped", [f"log_std before clipping; allowed is {low:+.0f} to {high:+.0f}."],
                Table(("joint", "min", "mean", "max"), spread)),
        *_settings(manifest),
    ]  # fmt: skip
    return page.write(beside(out, "html"), f"Conversion: {out.name}", str(out), sections)


@_as_warning
def of_gates(file: Path) -> Path:
    """The page of a result of `gates.py`."""
    gates = json.loads(file.read_text())
    verdict = "All gates passed." if gates["passed"] else "A gate FAILED: see the advice and the rows marked so."
    of = [f"{name}: {path} ({gates['identity'][name]})." for name, path in gates["checkpoints"].items()]
    sections = [Section("Verdict", [verdict, *of]), _advice(advice.of_gates(gates, _dr_level(gates)))]
    for gate, title in ((1, "the observation"), (2, "the policy"), (3, "the behaviour")):
        rows = [_check_row(check) for check in gates["checks"] if check["gate"] == gate]
        table = Table(("check", "measured", "limits", "verdict", "of"), rows)
        sections.append(Section(f"Gate {gate}: {title}", table=table))
    for task, numbers in gates["behaviour"]["tasks"].items():
        rows = [
            (
                name,
                *(_spread(of_name[side]) for side in ("pretraining", "official")),
                f"{_number(of_name['difference']):+.2f}",
            )
            for name, of_name in numbers.items()
        ]
        sections.append(
            Section(f"Behaviour, {task}", table=Table(("", "pre-training", "official", "difference"), rows))
        )
    return page.write(file.with_suffix(".html"), "Verification gates", str(file), sections)


@_as_warning
def of_evaluation(file: Path) -> Path:
    """The page of a result of `evaluate.py --json`."""
    result = json.loads(file.read_text())
    who = result.get("checkpoint") or f"--policy {result['policy']}"
    facts = {"policy": who, "stage": result.get("stage", "baseline"), "checkpoint": result.get("hash", ""),
             "played in": result["backend"], "master seed": str(result["seed"]),
             "joint noise at the start": f"{result['start_noise_rad']} rad"}  # fmt: skip
    rows = [_score_row(task, of_task) for task, of_task in result["tasks"].items()]
    rows.append(("mean", "", f"{result['mean']:+.2f}", "", _interval(result["ci95"]), "", "", "", ""))
    header = ("task", "n", "score", "std", "95 % CI", "success", "fell", "physics steps", "touches")
    names = list(dict.fromkeys(name for of_task in result["tasks"].values() for name in of_task["terms"]))
    terms = [(name, *(_term(of_task, name) for of_task in result["tasks"].values())) for name in names]
    worst = [row for of_task in result["tasks"].values() for row in worst_episodes(of_task)]
    worst_rows = [
        (row["task"], str(row["seed"]), f"{row['score']:+.2f}", row["ending"], str(row["physics_steps"]))
        for row in worst
    ]
    rows_of = [sorted(of_task["results"], key=lambda row: row["score"]) for of_task in result["tasks"].values()]
    episodes = [_played(row) for of_task in rows_of for row in of_task if row.get("path")]
    sections = [
        Section("What was played", table=Table(("", ""), [(name, value) for name, value in facts.items() if value])),
        Section("Official score", [f"CI: {result['confidence_interval']}."], Table(header, rows),
                plots.svg(plots.scores(result))),
        _advice(advice.of_evaluation(result)),
        Section("Terms of the score", ["Weighted, mean ± standard deviation."],
                Table(("term", *result["tasks"]), terms), plots.svg(plots.terms(result))),
        Section("Episodes to play", ["Sorted from the worst of each task."], episodes=episodes),
        Section("Worst episodes", table=Table(("task", "seed", "score", "ending", "physics steps"), worst_rows),
                commands=["\n".join(replay_command(result, row) for row in worst)]),
    ]  # fmt: skip
    return page.write(file.with_suffix(".html"), f"Evaluation: {who}", f"{file}", sections)


@_as_warning
def of_submission(package: Path) -> Path:
    """The page of a submission package."""
    score = json.loads((package / "score.json").read_text())
    rows = [
        (task, f"{of_task['mean']:+.3f}", f"{of_task['same_torques_max_difference']:.1e}",
         f"{of_task['torque_max_difference_nm']:.1e}")
        for task, of_task in score["tasks"].items()
    ]  # fmt: skip
    rows.append(("mean", f"{score['mean']:+.3f}", "", ""))
    header = ("task", "score by the SDK", "apart from our runner, same torques", "torque apart, N m")
    text = [f"{score['episodes_per_task']} episodes a task by the platform's own SDK, seed {score['seed']}."]
    text.append("It was sent." if (package / "submission.json").exists() else "Nothing was sent; --yes sends it.")
    sections = [Section("Proof", text, Table(header, rows))]
    return page.write(beside(package, "html"), "Submission package", str(package), sections)


@_as_warning
def of_chain(out: Path) -> Path:
    """The page of a whole chain, from its `summary.json` and what the stages left."""
    summary = json.loads((out / "summary.json").read_text())
    rows = summary["scores"]
    verdict = manifests.read(out / "finetuned")[0]["metrics"]
    gates = json.loads((out / "gates.json").read_text())
    evaluation = json.loads((out / "evaluations" / "finetuned.json").read_text())
    found = [*advice.of_gates(gates, _dr_level(gates)), *advice.of_chain({row["policy"]: row for row in rows}, verdict)]
    found += advice.of_evaluation(evaluation)
    scores = [
        (
            row["policy"],
            row["backend"],
            *(f"{_number(row[name]):+.2f}" for name in (*c.TASKS, "mean")),
            _interval(row["ci95"]),
        )
        for row in rows
    ]
    seconds = [(stage, f"{value:.0f}") for stage, value in summary["seconds"].items()]
    places = [(name, out / f"{name}.html") for name in ("pretrain", "converted", "gates", "finetuned", "submission")]
    places += [(f"evaluation: {Path(row['file']).stem}", Path(row["file"]).with_suffix(".html")) for row in rows]
    places += [("film of a penalty", out / "evaluations" / "goalie.mp4")]
    links = [(name, str(file.relative_to(out))) for name, file in places if file.exists()]
    settings = ", ".join(f"{name} {value}" for name, value in summary["settings"].items() if value is not None)
    sections = [
        Section("Official scores", table=Table(("policy", "played in", *c.TASKS, "mean", "95 % CI"), scores),
                figure=plots.svg(plots.score_intervals(rows))),
        Section("Fine-tuning", verdict_in_words(verdict)),
        Section("Gates", ["All passed." if gates["passed"] else "A gate FAILED."]),
        _advice(found),
        Section("Pages of the stages", links=links),
        Section("Wall time of the last call", table=Table(("stage", "s"), seconds)),
    ]  # fmt: skip
    return page.write(out / "report.html", f"Chain: {out.name}", settings, sections)


# --- words --------------------------------------------------------------------------------------------------

_STAGE_TITLES = {"pretrained": "Pre-training", "converted": "Conversion", "finetuned": "Fine-tuning"}


def verdict_in_words(metrics: Mapping[str, Any]) -> list[str]:
    """What fine-tuning ended with, and why, from its checkpoint's metrics."""
    if "candidate_step" not in metrics:
        start = f"it scored {metrics['validation_start']:+.2f}"
        words = f"The start was kept, because no candidate scored above it in validation, where {start}."
    else:
        start, candidate = (metrics["confirmation"][f"{name}/score"] for name in ("start", "candidate"))
        step = f"{metrics['candidate_step']:,}"
        there = f"There the start scored {start:+.2f}, the candidate, of step {step}, {candidate:+.2f}"
        gain, error = metrics["gain"], metrics["standard_error"]
        on_fresh = f"on fresh seeds the candidate gained {gain:+.3f}, with a standard error of {error:.3f}"
        if metrics["result"] == "candidate":
            words = f"The candidate replaced the start, because {on_fresh}. {there}."
        else:
            words = f"The start was kept, because {on_fresh}, which is no proof. {there}."
    diverged = metrics.get("diverged_before_step")
    return [words] + ([f"Training diverged before step {diverged:,}."] if diverged else [])


def _identity(manifest: Mapping[str, Any], hash_: str, records: Sequence[Mapping[str, float]]) -> Section:
    """What a checkpoint is, and what it came from."""
    code, config = manifest["code"], manifest["config"]
    parents = ", ".join(f"{parent['stage']} {parent['hash']}" for parent in manifest["parents"]) or "none"
    wall_s = max((record.get("wall_s", 0.0) for record in records), default=0.0)
    facts = {
        "checkpoint": hash_,
        "stage": manifest["stage"],
        "parents": parents,
        "ancestors": ", ".join(ancestor["hash"] for ancestor in manifest["lineage"]),
        "steps": f"{manifest['steps']:,} (one is one action in one lane, those of its parents included)",
        "preset, seed": f"{config.get('preset', '-')}, {manifest['seed']}",
        "wall time": f"{wall_s / 60:.1f} min" if wall_s else "",
        "written": manifest["time_utc"],
        "code": f"{code['commit'] or 'no git tree'}{' with changes' if code['dirty'] else ''}",
    }
    if "best_score" in manifest["metrics"]:
        facts["best score"] = (
            f"{manifest['metrics']['best_score']:+.3f} at step {manifest['metrics'].get('best_step', 0):,}"
        )
    return Section("What it is", table=Table(("", ""), [(name, value) for name, value in facts.items() if value]))


def _settings(manifest: Mapping[str, Any]) -> list[Section]:
    config = json.dumps(manifest["config"], indent=1)
    versions = "\n".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return [
        Section("Settings", commands=[config], is_folded=True),
        Section("Versions", commands=[versions], is_folded=True),
    ]


def _advice(found: Sequence[Advice]) -> Section:
    notes = [(one.rule, one.seen, one.do) for one in found]
    return Section("Advice", [] if notes else [_NO_ADVICE], notes=notes)


def _dr_level(gates: Mapping[str, Any]) -> int:
    """The level of randomisation of the pre-training that the gates looked at; 0 where it is gone."""
    with contextlib.suppress(UserError):
        config = manifests.read(Path(gates["checkpoints"]["pretrained"]))[0]["config"]
        return int(config.get("collect", {}).get("dr_level", 0))  # an older checkpoint may have no such setting
    return 0


def _check_row(check: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = check["low"], check["high"]
    limits = " .. ".join("" if limit is None else f"{limit:.3g}" for limit in (low, high))
    verdict = "passed" if check["passed"] else "FAILED"
    return check["name"], f"{_number(check['measured']):.3g}", limits, verdict, check["where"]


def _score_row(task: str, of_task: Mapping[str, Any]) -> tuple[str, ...]:
    shares = f"{of_task['success_rate']:.0%}", f"{of_task['fall_rate']:.0%}"
    rest = f"{of_task['mean_physics_steps']:.0f}", f"{of_task['mean_touches']:.1f}"
    mean, std = f"{_number(of_task['mean']):+.2f}", f"{_number(of_task['std']):.2f}"
    return task, str(of_task["episodes"]), mean, std, _interval(of_task["ci95"]), *shares, *rest


def _played(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the player needs of an episode; its seed as text, because JavaScript's numbers have 53 bits."""
    names = ("task", "score", "ending", "aim_pos_w", "path")
    return {name: row[name] for name in names} | {"seed": str(row["seed"])}


def _interval(interval: Sequence[float]) -> str:
    return f"{_number(interval[0]):+.2f} .. {_number(interval[1]):+.2f}"


def _term(of_task: Mapping[str, Any], name: str) -> str:
    if name not in of_task["terms"]:
        return ""
    return f"{_number(of_task['terms'][name]):+.2f} ± {_number(of_task['terms_std'][name]):.2f}"


def _spread(side: Mapping[str, float]) -> str:
    return f"{_number(side['mean']):.2f} ± {_number(side['std']):.2f}"


def _number(value: float | None) -> float:
    """A number of a JSON file, where null stands for one that was not finite."""
    return math.nan if value is None else value


# --- numbers of a run ---------------------------------------------------------------------------------------


def curves_of(records: Sequence[Mapping[str, float]]) -> dict[str, plots.Curve]:
    """Steps and values of each number, by name."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return dict(sorted(curves.items()))
