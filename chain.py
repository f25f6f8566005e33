"""The whole chain: pre-training, conversion, gates, fine-tuning, official scores, submission package.

    python chain.py [--preset demo] [--out runs/demo] [--seed 0] [--resume]

Input: nothing. Output: under `--out`

    pretrain, converted, finetuned  the checkpoints of the stages
    gates.json                      what the gates measured
    evaluations                     the official scores, a JSON file for each row of the table; goalie.mp4, a penalty of
                                    the fine-tuned policy, where the machine has an OpenGL
    submission                      the package for the platform; nothing is sent
    summary.json                    settings, seconds of each stage in this call, scores
    report.html                     scores, verdict and advice in words; links the pages of the stages

Each stage is one of the scripts beside this file, run as a process of its own. The first one that fails stops
the chain. The same command with `--resume` goes on: every stage knows its own finished output, and its unfinished one.
SIGTERM and Ctrl-C are passed on to the stage, which saves its state; the chain ends with it, within 10 s, with status
143 or 130.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from booster_soccer import errors
from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.store.atomic import OTHER_PLACE, os_errors, write_file
from booster_soccer.store.entry import guarded, owned
from booster_soccer.store.manifests import finite
from booster_soccer.store.signals import StopSignal, as_launcher, end
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig, score_columns

SCRIPTS = Path(__file__).parent
# preset -> episodes per task for every row of the table of scores, and for the proof of the package
EPISODES = {"demo": 10, "cpu": 100, "l4": 100, "h200": 100}
PROOF_EPISODES = {"demo": 1, "cpu": 3, "l4": 3, "h200": 3}
WIDTH = 110  # of the tables, also where the output is a file
FILM = Path("evaluations") / "goalie.mp4"  # moved away with the scores of a policy that is replaced
_POLL_S = 0.1


@dataclass(frozen=True)
class Config:
    """What to run, and where it goes."""

    preset: Literal["demo", "cpu", "l4", "h200"] = "demo"  # demo: minutes on two CPU cores
    out: Path | None = None  # directory of the run; None: runs/<preset>
    seed: int = 0  # of every stage
    pretrain_steps: int | None = None  # shortens pre-training; None takes the preset's
    resume: bool = False  # re-use the finished stages in --out, go on with the others
    tracking: TrackConfig = TrackConfig()


class Evaluation(NamedTuple):
    """One row of the table of scores."""

    policy: str
    which: tuple[str, str]  # evaluate.py's option that names the policy, and its value
    backend: str  # what is shipped is scored officially, the rest in the twin: same numbers, faster
    file: Path


def evaluations(out: Path) -> list[Evaluation]:
    """All rows, from the same starts."""

    def of(policy: str, directory: str, backend: str) -> Evaluation:
        file = out / "evaluations" / f"{directory}.json"
        return Evaluation(policy, ("--checkpoint", str(out / directory)), backend, file)

    return [
        Evaluation("zero torque", ("--policy", "zero"), "twin", out / "evaluations" / "zero.json"),
        of("pre-trained", "pretrain", "twin"),
        of("converted", "converted", "twin"),
        of("fine-tuned", "finetuned", "official"),
    ]


def film(config: Config, out: Path) -> list[str]:
    """The command that films a penalty of the result; where the machine cannot draw, it says so and goes on."""
    policy = ["--checkpoint", str(out / "finetuned"), "--backend", "twin", "--start-noise", str(c.START_NOISE_RAD)]
    return ["evaluate.py", *policy, "--only", f"goalie:{config.seed}", "--video", str(out / FILM)]


def stages(config: Config, out: Path) -> dict[str, list[list[str]]]:
    """The commands of each stage, in order: a script and its arguments."""
    seed, preset = ["--seed", str(config.seed)], ["--preset", config.preset]
    resume = ["--resume"] if config.resume else []  # where there is nothing yet, the scripts start from the beginning
    pretrained, converted, finetuned = (str(out / name) for name in ("pretrain", "converted", "finetuned"))
    pretrain = ["train_mjx_sac.py", *preset, "--out", pretrained, *seed, *resume]
    if config.pretrain_steps is not None:
        pretrain += ["--total-steps", str(config.pretrain_steps)]
    gates = ["gates.py", "--pretrained", pretrained, "--converted", converted, *seed]
    scores = ["--episodes", str(EPISODES[config.preset]), "--start-noise", str(c.START_NOISE_RAD)]
    commands = {
        "pretrain": [pretrain],
        "convert": [["convert_jax2torch.py", "--checkpoint", pretrained, "--out", converted, *seed]],
        "gates": [[*gates, "--json", str(out / "gates.json")]],
        "finetune": [["finetune_ddpg.py", *preset, "--checkpoint", converted, "--out", finetuned, *seed, *resume]],
        "evaluate": [
            ["evaluate.py", *row.which, "--backend", row.backend, *seed]
            + ["--json", str(row.file), *scores]
            + (["--gates", str(out / "gates.json")] if row.backend == "official" else [])
            for row in evaluations(out)
        ]
        + [film(config, out)] * (not (out / FILM).exists()),
        "submit": [
            ["submit.py", "--checkpoint", finetuned, "--out", str(out / "submission"), *seed]
            + ["--episodes", str(PROOF_EPISODES[config.preset])]
        ],
    }
    track = ["--track", *(config.tracking.chosen() or ("none",))]
    return {stage: [[*command, *track] for command in of_stage] for stage, of_stage in commands.items()}


def run_script(stage: str, command: list[str]) -> None:
    """Run one script to its end; `UserError` if it fails. It says itself what was wrong.

    SIGTERM and Ctrl-C end the script, then the chain: `SystemExit`. The script ends with the chain however that ends.
    """
    script, *arguments = command
    with StopSignal() as stop:
        process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments], env=as_launcher())
        while not stop.received and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
    if stop.received:
        end(process)
        print(f"{stop.name}: stage '{stage}' is ended; the same command with --resume goes on from there", flush=True)
        raise SystemExit(stop.status)
    if status := process.returncode:
        raise UserError(
            f"stage '{stage}' failed: {script} ended with status {status}, its message is above; once its "
            f"cause is removed, the same command with --resume goes on from here; {More.STAGE}"
        )


# --- the results ----------------------------------------------------------------------------------------


def read_scores(rows: list[Evaluation]) -> list[dict[str, Any]]:
    """The rows of the table of scores, from the files of `evaluate.py`; `UserError` for one that is none of them."""
    scores = []
    for row in rows:
        try:
            result = json.loads(row.file.read_text())
            tasks = {task: result["tasks"][task] for task in c.TASKS}
            means = {task: _number(of_task["mean"]) for task, of_task in tasks.items()}
            steps = sum(_number(of_task["mean_physics_steps"]) for of_task in tasks.values()) / len(tasks)
            low, high = map(_number, result["ci95"])
            mean = _number(result["mean"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{row.file} is no result of evaluate.py: remove it, --resume measures again") from error
        scores.append(
            {"policy": row.policy, "backend": row.backend, **means, "mean": mean}
            | {"ci95": [low, high], "mean_physics_steps": steps, "file": str(row.file)}
        )
    return scores


def _number(value: Any) -> float:
    """A number of a JSON file, where null stands for one that was not finite."""
    return math.nan if value is None else float(value)


def print_results(config: Config, scores: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    """The tables of scores and of wall time."""
    title = f"Official score, {EPISODES[config.preset]} episodes a task, joint noise {c.START_NOISE_RAD} rad"
    table = Table(title=f"{title}, seed {config.seed}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("policy", "played in"):
        table.add_column(name, no_wrap=True)
    for name in (*c.TASKS, "mean", "95 % CI", "physics steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in scores:
        means = [f"{row[name]:+.2f}" for name in (*c.TASKS, "mean")]
        interval = "{:+.2f} .. {:+.2f}".format(*row["ci95"])
        table.add_row(row["policy"], row["backend"], *means, interval, f"{row['mean_physics_steps']:.0f}")
    times = Table(title="Wall time of this call")
    for name in ("stage", "s"):
        times.add_column(name, justify="right" if name == "s" else "left")
    for stage, value in (seconds | {"all": sum(seconds.values())}).items():
        times.add_row(stage, f"{value:.0f}")
    console = Console(width=WIDTH)
    console.print(table)
    console.print(times)


def tracked(config: Config, out: Path, summary: dict[str, Any]) -> Result:
    """What trackers and the table of runs get to know of a chain, its page among it."""
    fine_tuned = next(row for row in summary["scores"] if row["policy"] == "fine-tuned")
    means = {task: fine_tuned[task] for task in c.TASKS}
    judged = score_columns(means, fine_tuned["backend"], EPISODES[config.preset], c.START_NOISE_RAD)
    seconds = {f"chain/seconds_{stage}": value for stage, value in summary["seconds"].items()}
    return Result(seconds, [out / "summary.json", *stage_pages.of_chain(out)], row=judged)


@guarded()
def main(config: Config) -> Path:
    """Run the stages that are not finished; returns the directory of the run."""
    if config.seed < 0 or (config.pretrain_steps is not None and config.pretrain_steps < 1):
        raise UserError(f"--seed {config.seed}, --pretrain-steps {config.pretrain_steps}: need at least 0 and 1")
    out = config.out or Path("runs") / config.preset
    with owned(out), Recorder(out, "chain", config, resumed=config.resume, is_parent=True) as recorder:
        recorder.result(tracked(config, out, run(config, out)))
    print(out)
    return out


def run(config: Config, out: Path) -> dict[str, Any]:
    """Run what is not finished and print the results; returns the summary, which is written too."""
    seconds: dict[str, float] = {}
    for stage, commands in stages(config, out).items():
        print(f"=== {stage}", flush=True)
        started = time.monotonic()
        for command in commands:
            run_script(stage, command)
        seconds[stage] = round(time.monotonic() - started, 1)
    scores = read_scores(evaluations(out))
    settings = {"preset": config.preset, "seed": config.seed, "pretrain_steps": config.pretrain_steps}
    sdk_score = json.loads((out / "submission" / "score.json").read_text())["mean"]
    summary = {"settings": settings, "seconds": seconds, "scores": scores, "sdk_score": sdk_score}
    with os_errors(f"write {out / 'summary.json'}", OTHER_PLACE):
        (out / "summary.json").unlink(missing_ok=True)
        write_file(out / "summary.json", (json.dumps(finite(summary), indent=2) + "\n").encode())
    print_results(config, scores, seconds)
    return summary


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
