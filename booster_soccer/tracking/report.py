"""Results on the screen and on the disk: tables of what `scores.evaluate` returns, and JSON files."""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from booster_soccer.errors import More, UserError, remedy
from booster_soccer.store.manifests import finite

WORST = 5  # episodes listed per task
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
# Rows of the ball's table: fields of `EpisodeResult`, and what they are called.
BALL_ROWS = {
    "shot_speed_m_s": "shot speed, m/s",
    "shot_direction_deg": "shot, deg left of aim",
    "ball_height_max_m": "highest, m",
    "roll_phase_deg": "roll phase, deg",
    "roll_score": "score from roll",
}


def print_scores(result: dict, title: str) -> None:
    """Print the table of the tasks, in 80 columns."""
    scores = Table(title=f"Official score: {title}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "n", "score", "std", "95 % CI", "success", "fell", "physics\nsteps", "hits"):
        scores.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for task, of_task in result["tasks"].items():
        scores.add_row(
            task,
            f"{of_task['episodes']}",
            f"{of_task['mean']:+.2f}",
            f"{of_task['std']:.2f}",
            _interval_text(of_task["ci95"]),
            f"{of_task['success_rate']:.0%}",
            f"{of_task['fall_rate']:.0%}",
            f"{of_task['mean_physics_steps']:.0f}",
            f"{of_task['mean_touches']:.1f}",
        )
    scores.add_section()
    scores.add_row("mean", "", f"{result['mean']:+.2f}", "", _interval_text(result["ci95"]))
    console = Console()
    console.print(scores)
    console.print(f"CI: {result['confidence_interval']}.")
    for task, of_task in result["tasks"].items():
        if of_task["distinct_episodes"] < of_task["episodes"]:
            console.print(
                f"{task}: without start noise every seed gives the same episode; "
                f"it was played once and stands for {of_task['episodes']}."
            )


def print_details(result: dict) -> None:
    """Print the tables of the score's terms, the ball and the worst episodes, in 80 columns."""
    names = list(dict.fromkeys(name for of_task in result["tasks"].values() for name in of_task["terms"]))
    terms = _table_by_task("Weighted terms, mean ± standard deviation", result)
    for name in names:
        terms.add_row(name, *(_term_text(of_task, name) for of_task in result["tasks"].values()))
    ball = _table_by_task("The ball, mean ± standard deviation", result)
    ball.add_row("episodes with a shot", *(f"{t['ball']['shot_speed_m_s']['n']}" for t in result["tasks"].values()))
    for name, label in BALL_ROWS.items():
        ball.add_row(label, *(_spread_text(of_task["ball"][name]) for of_task in result["tasks"].values()))
    worst = Table(title="Worst episodes", box=box.SIMPLE_HEAD)
    for name in ("task", "seed", "score", "ending", "physics steps"):
        worst.add_column(name, justify="right" if name in ("score", "physics steps") else "left")
    for of_task in result["tasks"].values():
        for row in worst_episodes(of_task):
            worst.add_row(
                row["task"], f"{row['seed']}", f"{row['score']:+.2f}", row["ending"], f"{row['physics_steps']}"
            )

    console = Console()
    for table in (terms, ball, worst):
        console.print(table)
    console.print("Ball: its centre; roll phase 180 is the site on top.")


def print_episode(result: dict, title: str) -> None:
    """Print everything that is measured in one episode."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in result["terms"].items():
        table.add_row(f"term {name}", f"{value:+.6f}")
    table.add_section()
    for name, value in result.items():
        if name not in ("terms", "path"):
            table.add_row(name, f"{value:.6f}" if isinstance(value, float) else f"{value}")
    Console().print(table)


def print_checks(checks: Sequence[Any]) -> None:
    """A table of what `gates.py` checked on stdout, a line for each failure on stderr."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("gate", "check", "measured", "limits", "of", ""):
        table.add_column(column)
    for check in checks:
        verdict, number = "passed" if check.passed else "FAILED", f"{check.measured:.3g}"
        table.add_row(str(check.gate), check.name, number, check.limits, check.where, verdict)
        if not check.passed:
            failure = f"{check.name}: {number} is not within {check.limits} ({check.where}); {check.remedy}"
            print(f"failed: gate {check.gate}, {failure}", file=sys.stderr)
    Console().print(table)
    if failed := sum(not check.passed for check in checks):
        print(f"failed: {failed} of {len(checks)} checks; {More.GATE}", file=sys.stderr)


def print_submission(score: dict[str, Any]) -> None:
    """Print the table of a package's proof."""
    print(f"\n{'task':<10}{'SDK':>9}{'replayed':>12}{'torque N m':>12}{'evaluate':>10}{'apart':>10}")
    for task, entry in score["tasks"].items():
        line = f"{task:<10}{entry['mean']:>9.3f}{entry['same_torques_max_difference']:>12.1e}"
        line += f"{entry['torque_max_difference_nm']:>12.1e}"
        if "evaluate_mean" in entry:
            line += f"{entry['evaluate_mean']:>10.3f}{entry['evaluate_max_difference']:>10.1e}"
        print(line)
    print(f"{'mean':<10}{score['mean']:>9.3f}")
    print(f"{score['episodes_per_task']} episodes a task, seed {score['seed']}. Largest differences:")
    print("  replayed    of a score, from our own runner with the same torques")
    print("  torque N m  of a torque, from our own control in the same state")
    print("  apart       of a score, from evaluate.py: where it rounds differently, episodes drift apart\n")


def worst_episodes(of_task: dict) -> list[dict]:
    """The episodes of a task's summary with the lowest scores, lowest first."""
    return sorted(of_task["results"], key=lambda row: row["score"])[:WORST]


def _table_by_task(title: str, result: dict) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("")
    for task in result["tasks"]:
        table.add_column(task, justify="right")
    return table


def _interval_text(interval: list[float]) -> str:
    return f"{interval[0]:+.2f} .. {interval[1]:+.2f}"


def _term_text(of_task: dict, name: str) -> str:
    if name not in of_task["terms"]:
        return ""
    return f"{of_task['terms'][name]:+.2f} ± {of_task['terms_std'][name]:.2f}"


def _spread_text(spread: dict) -> str:
    return f"{spread['mean']:.2f} ± {spread['std']:.2f}" if spread["n"] else ""


def replay_command(result: dict, row: dict) -> str:
    """The command that plays one of the evaluated episodes again, with the same score."""
    which = ("--checkpoint", result["checkpoint"]) if "checkpoint" in result else ("--policy", result["policy"])
    words = [sys.executable, "evaluate.py", *which, "--only", f"{row['task']}:{row['seed']}"]
    if result["start_noise_rad"] > 0.0:
        words += ["--start-noise", result["start_noise_rad"]]
    return shlex.join(map(str, words))


def finished(file: Path | None, identity: dict) -> dict | None:
    """The result that a file holds already, if it answers the same question; None if there is no such file yet.

    `identity` is the question, kept in the result under that name. Raises `UserError` where no new file can be written,
    or one that holds something else would be lost; creates the file's directory, so that it stays so.
    """
    if file is None:
        return None
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("x").close()
            file.unlink()
            return None
        content = json.loads(file.read_bytes())
        is_same = content["identity"] == json.loads(json.dumps(identity))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; {remedy(error, 'name another file')}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        is_same = False
    if not is_same:
        raise UserError(f"{file} exists and is not overwritten: name another file or remove it")
    print(f"{file} has this result already; remove it to measure again")
    return content


def write_json(content: dict, file: Path) -> None:
    """Write a new JSON file; a number that is not finite is null there (`manifests.finite`)."""
    text = json.dumps(finite(content), indent=2, allow_nan=False)
    # Indented, but for lists of numbers: a path of an episode has hundreds.
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    with file.open("x") as stream:
        try:
            stream.write(text + "\n")
            stream.flush()
        except OSError:
            file.unlink()  # on a full disk; half a file would only be in the way
            raise
