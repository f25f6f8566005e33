"""The whole chain: pre-training, conversion, gates, fine-tuning, official scores, submission package.

    python chain.py [--preset demo] [--out runs/demo] [--seed 0] [--resume]

Input: nothing. Output: under `--out`

    pretrain, converted, finetuned  the checkpoints of the stages
    gates.json                      what the gates measured
    evaluations                     the official scores, a JSON file for each row of the table
    submission                      the package for the platform; nothing is sent
    summary.json                    settings, seconds of each finished stage, scores; what `--resume` goes by

Each stage is one of the scripts beside this file, run as a process of its own. The first one that fails stops
the chain. `--resume` re-uses the stages that are finished and goes on with the others. SIGTERM is passed on to
the stage, which saves its state; the chain ends with it, within 10 s, with status 143.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from booster_soccer import errors
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints, resume

SCRIPTS = Path(__file__).parent
# preset -> episodes per task for every row of the table of scores
EPISODES = {"demo": 10, "cpu": 100, "l4": 100}
START_NOISE_RAD = 0.02  # without noise the goalie task is one and the same episode
# Asked of the pre-trained policy; zero torque falls at 278, holding the default pose at 576.
STAYS_UP_STEPS = 1000
WIDTH = 110  # of the tables, also where the output is a file
_POLL_S = 0.1
_PATIENCE_S = 9.5  # for a stage after SIGTERM: it ends itself before
_LEFT_BY_STAGES = (
    *("pretrain", "pretrain.resume", "pretrain.replay", "pretrain.metrics.jsonl", "converted", "gates.json"),
    *("finetuned", "finetuned.resume", "finetuned.replay", "evaluations", "submission"),
)


@dataclass(frozen=True)
class Config:
    """What to run, and where it goes."""

    preset: str = "demo"  # demo (minutes on two CPU cores), cpu or l4
    out: Path | None = None  # directory of the run; None: runs/<preset>
    seed: int = 0  # of every stage
    pretrain_steps: int | None = None  # shortens pre-training; None takes the preset's
    resume: bool = False  # re-use the finished stages in --out, go on with the others


class Evaluation(NamedTuple):
    """One row of the table of scores."""

    policy: str
    which: tuple[str, str]  # evaluate.py's option that names the policy, and its value
    seed: int
    backend: str  # what is shipped is scored officially, the rest in the twin: same numbers, faster
    file: Path


# --- the stages -----------------------------------------------------------------------------------------


def evaluations(config: Config) -> list[Evaluation]:
    """All rows start from the same seed; the pre-trained policy is played from a second one too."""
    out, seed = config.out, config.seed
    pretrained = ("--checkpoint", str(out / "pretrain"))
    rows = (
        ("zero torque", ("--policy", "zero"), seed, "twin", "zero"),
        ("pre-trained", pretrained, seed, "twin", "pretrained"),
        (f"pre-trained, seed {seed + 1}", pretrained, seed + 1, "twin", "pretrained_again"),
        ("converted", ("--checkpoint", str(out / "converted")), seed, "twin", "converted"),
        ("fine-tuned", ("--checkpoint", str(out / "finetuned")), seed, "official", "finetuned"),
    )
    return [Evaluation(*row, out / "evaluations" / f"{name}.json") for *row, name in rows]


def stages(config: Config) -> dict[str, list[list[str]]]:
    """The commands of each stage, in order: a script and its arguments."""
    out, seed, preset = config.out, ["--seed", str(config.seed)], ["--preset", config.preset]
    pretrained, converted, finetuned = (str(out / name) for name in ("pretrain", "converted", "finetuned"))
    pretrain = ["train_mjx_sac.py", *preset, "--out", pretrained, *seed]
    finetune = ["finetune_ddpg.py", "--checkpoint", converted, "--out", finetuned, *preset, *seed]
    gates = ["gates.py", "--pretrained", pretrained, "--converted", converted, *seed]
    gates += ["--json", str(out / "gates.json")]
    if config.pretrain_steps is not None:
        pretrain += ["--total-steps", str(config.pretrain_steps)]
    if config.resume:  # where there is nothing yet, the scripts start from the beginning
        pretrain.append("--resume")
        finetune.append("--resume")
    scores = ["--episodes", str(EPISODES[config.preset]), "--start-noise", str(START_NOISE_RAD)]
    return {
        "pretrain": [pretrain],
        "convert": [["convert_jax2torch.py", "--checkpoint", pretrained, "--out", converted, *seed]],
        "gates": [gates],
        "finetune": [finetune],
        "evaluate": [
            ["evaluate.py", *row.which, "--backend", row.backend, "--seed", str(row.seed)]
            + ["--json", str(row.file), *scores]
            for row in evaluations(config)
        ],
        "submit": [["submit.py", "--checkpoint", finetuned, "--out", str(out / "submission"), *seed]],
    }


def run_script(stage: str, command: list[str]) -> None:
    """Run one script to its end; `UserError` if it fails. It says itself what was wrong.

    SIGTERM ends the script, then the chain: `SystemExit`.
    """
    script, *arguments = command
    with resume.StopSignal() as stop:
        process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments])
        while not stop.received and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
    if stop.received:
        end(process)
        print(f"SIGTERM: stage '{stage}' is ended; the same command with --resume goes on from there", flush=True)
        raise SystemExit(resume.STOPPED)
    if status := process.returncode:
        raise UserError(
            f"stage '{stage}' failed: {script} ended with status {status}, its message is above; once its "
            "cause is removed, the same command with --resume goes on from here"
        )


def end(process: subprocess.Popen) -> None:
    """Pass SIGTERM on, and wait until the process has saved and ended; SIGKILL if it does not."""
    process.terminate()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- the record -----------------------------------------------------------------------------------------


def resolve(config: Config) -> Config:
    """Fill in `out` and check what can be checked without running."""
    if config.preset not in EPISODES:
        raise UserError(f"--preset {config.preset} is unknown: use one of {', '.join(EPISODES)}")
    if config.seed < 0 or (config.pretrain_steps is not None and config.pretrain_steps < 1):
        raise UserError(f"--seed {config.seed}, --pretrain-steps {config.pretrain_steps}: need at least 0 and 1")
    return Config(**vars(config) | {"out": config.out or Path("runs") / config.preset})


def start_summary(config: Config) -> dict[str, Any]:
    """The summary to go on from, or a new one; `UserError` rather than a run over another's results."""
    settings = {"preset": config.preset, "seed": config.seed, "pretrain_steps": config.pretrain_steps}
    file, new = _summary_files(config)
    there = [path for path in (file, new, *(config.out / name for name in _LEFT_BY_STAGES)) if path.exists()]
    if there in ([], [new]):  # killed before the first was whole
        return {"settings": settings, "seconds": {}}
    if not config.resume:
        raise UserError(f"{there[0]} exists: remove {config.out}, name another --out, or go on with --resume")
    try:
        summary = json.loads((file if file.exists() else new).read_text())
        theirs, seconds = summary["settings"], summary["seconds"]
        if not (theirs.keys() == settings.keys() and all(map(_is_seconds, seconds.values()))):
            raise ValueError("settings or seconds are not what the chain writes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{config.out} holds {there[-1].name} but no whole summary.json, so nobody can tell what is "
            "finished: remove it, or name another --out"
        ) from error
    for name, value in settings.items():
        if theirs[name] != value:
            raise UserError(
                f"{config.out} was run with {name} = {str(theirs[name])[:60]}, not {value}: give the same, "
                "or another --out"
            )
    saved = (config.out / f"pretrain.resume{suffix}" for suffix in ("", ".previous"))
    has_started = (config.out / "pretrain").exists() and "pretrain" not in summary["seconds"]
    if has_started and not any(path.exists() for path in saved):
        raise UserError(
            f"{config.out}: pre-training was stopped before it had saved a state to go on from: "
            "remove the directory and start again, or name another --out"
        )
    if not file.exists():
        os.rename(new, file)
    return summary


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12


def write_summary(config: Config, summary: dict[str, Any]) -> None:
    """Write the new one beside it, then move: a kill leaves the old one or the new one, under either name.

    No rename ever meets an existing name, so this also works where a rename cannot replace.
    """
    file, new = _summary_files(config)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        checkpoints.write_file(new, (json.dumps(summary, indent=2) + "\n").encode())
        file.unlink(missing_ok=True)
        os.rename(new, file)
        checkpoints.sync_directory(config.out)
    except OSError as error:
        if file.exists():
            new.unlink(missing_ok=True)  # on a full disk the room is needed
        raise UserError(f"cannot write {file}: {error.strerror}; free space or name another --out") from error


def _summary_files(config: Config) -> tuple[Path, Path]:
    """Where the summary lies, and where a new one is written."""
    return config.out / "summary.json", config.out / "summary.json.writing"


def remove_unfinished_reports(config: Config, stage: str) -> None:
    """Reports of a stage that did not finish: its scripts refuse to write over them."""
    files = {"gates": [config.out / "gates.json"], "evaluate": [row.file for row in evaluations(config)]}
    for file in files.get(stage, []):
        file.unlink(missing_ok=True)


# --- the results ----------------------------------------------------------------------------------------


def read_scores(config: Config) -> list[dict[str, Any]]:
    """The rows of the table of scores, from the files of `evaluate.py`."""
    rows = []
    for row in evaluations(config):
        result = json.loads(row.file.read_text())
        tasks = [result["tasks"][task] for task in c.TASKS]
        scores = {task: of_task["mean"] for task, of_task in zip(c.TASKS, tasks, strict=True)}
        steps = sum(of_task["mean_steps"] for of_task in tasks) / len(tasks)
        rows.append(
            {"policy": row.policy, "seed": row.seed, "backend": row.backend, **scores, "mean": result["mean"]}
            | {"ci95": result["ci95"], "mean_physics_steps": steps, "file": str(row.file)}
        )
    return rows


def print_scores(config: Config, rows: list[dict[str, Any]]) -> None:
    """The table, and whether the pre-trained policy stays up."""
    episodes = EPISODES[config.preset]
    title = f"Official score, {episodes} episodes a task, joint noise {START_NOISE_RAD} rad, seed {config.seed}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    table.add_column("played in", no_wrap=True)
    for name in (*c.TASKS, "mean", "95 % CI", "physics steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        scores = [f"{row[name]:+.2f}" for name in (*c.TASKS, "mean")]
        low, high = row["ci95"]
        table.add_row(
            row["policy"],
            row["backend"],
            *scores,
            f"{low:+.2f} .. {high:+.2f}",
            f"{row['mean_physics_steps']:.0f}",
        )
    Console(width=WIDTH).print(table)
    pretrained = [row["mean_physics_steps"] for row in rows if row["policy"].startswith("pre-trained")]
    steps = " and ".join(f"{value:.0f}" for value in pretrained)
    verdict = "yes" if min(pretrained) > STAYS_UP_STEPS else "NO"
    print(
        f"pre-trained: up for {steps} physics steps on average, "
        f"{episodes * c.NUM_TASKS} noisy starts each; more than {STAYS_UP_STEPS:,}: {verdict}",
        flush=True,
    )


def print_times(seconds: dict[str, float]) -> None:
    """Wall time of each stage."""
    table = Table(title="Wall time")
    table.add_column("stage")
    table.add_column("s", justify="right")
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.0f}")
    table.add_section()
    table.add_row("all", f"{sum(seconds.values()):.0f}")
    Console(width=WIDTH).print(table)


def main(config: Config) -> Path:
    """Run the stages that are not finished; returns the directory of the run."""
    config = resolve(config)
    summary = start_summary(config)
    write_summary(config, summary)
    for stage, commands in stages(config).items():
        if stage in summary["seconds"]:
            print(f"=== {stage}: finished before, re-used", flush=True)
            continue
        print(f"=== {stage}", flush=True)
        remove_unfinished_reports(config, stage)
        started = time.monotonic()
        for command in commands:
            run_script(stage, command)
        summary["seconds"][stage] = round(time.monotonic() - started, 1)
        if stage == "evaluate":
            summary["scores"] = read_scores(config)
            print_scores(config, summary["scores"])
        if stage == "submit":
            summary["sdk_score"] = json.loads((config.out / "submission" / "score.json").read_text())["mean"]
        write_summary(config, summary)
        print(f"=== {stage}: {summary['seconds'][stage]:.0f} s", flush=True)
    print_times(summary["seconds"])
    print(config.out)
    return config.out


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
