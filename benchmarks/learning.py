"""Wall time and steps from nothing to mean scores of -0.80 (what standing brings), 0, +4.0 and +8.0.

    python train_mjx_sac.py --preset cpu --seed 0 --judge-every 250000 --out runs/learning/seed0
    python -m benchmarks.learning --metrics runs/learning/seed0.metrics.jsonl [MORE ...] [--plot FILE.png]

Input: the metrics of finished or running pre-trainings. Output: a table of the first judgement at or above each score,
and with `--plot` the learning curves against wall time and steps, and hits and falls of the target task. Scores are
official ones on the twin, always on the same starts with joint noise; how often a run judges is the resolution of the
answer.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from booster_soccer import errors
from booster_soccer.errors import UserError
from booster_soccer.store.entry import guarded
from booster_soccer.store.run import read_records

SCORES = (-0.80, 0.0, 4.0, 8.0)
# Runs are told apart without colour too: (marker, line), as often as there are runs.
_STYLES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("x", "--"), ("+", "-."))


@dataclass(frozen=True)
class Config:
    """Which runs."""

    metrics: tuple[Path, ...]  # `.metrics.jsonl` of pre-trainings
    plot: Path | None = None  # new image of the learning curves


def read_judgements(file: Path) -> list[dict[str, float]]:
    """The judgements of a metrics file, in order; a line that is being written is left out."""
    if not file.is_file():
        raise UserError(f"{file} is no file: give a run's .metrics.jsonl")
    return [row for row in read_records(file) if "eval/score" in row]


def first_reached(judgements: list[dict[str, float]], score: float) -> dict[str, float] | None:
    """The first judgement with at least this mean score."""
    return next((row for row in judgements if row["eval/score"] >= score), None)


def print_table(runs: dict[str, list[dict[str, float]]]) -> None:
    """One row a run: wall time and steps of each score, and the best."""
    table = Table(title="First judgement at or above each mean score")
    table.add_column("run", no_wrap=True)
    for score in SCORES:
        table.add_column(f"{score:+.2f}", justify="right")
    table.add_column("best", justify="right")
    for name, judgements in runs.items():
        cells = []
        for score in SCORES:
            row = first_reached(judgements, score)
            cells.append(f"{row['wall_s'] / 60:.1f} min, {row['step'] / 1e6:.2f} M" if row else "not reached")
        best = max(judgements, key=lambda row: row["eval/score"], default=None)
        cells.append(f"{best['eval/score']:+.2f} at {best['step'] / 1e6:.2f} M" if best else "")
        table.add_row(name, *cells)
    Console().print(table)


def plot_curves(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """One line a run: mean score against wall time and steps; hits and falls of the target task against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    for number, (name, judgements) in enumerate(runs.items()):
        marker, line = _STYLES[number % len(_STYLES)]
        steps = [row["step"] / 1e6 for row in judgements]
        times = [[row["wall_s"] / 60 for row in judgements], steps, steps, steps]
        shown = ("eval/score", "eval/score", "eval/success_target", "eval/fell_target")
        for axis, at, key in zip(axes.flat, times, shown, strict=True):
            values = [row[key] for row in judgements]
            axis.plot(at, values, marker=marker, markersize=4, linestyle=line, label=name)
    for axis, label in zip(axes.flat, ("wall time, min", *["steps, millions"] * 3), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    for axis in axes[0]:
        low, high = axis.get_ylim()
        for score in (score for score in SCORES if low < score < high):  # of the table
            axis.axhline(score, color="grey", linewidth=0.7, linestyle=":")
    axes[0, 0].set_ylabel("official score on the twin, points")
    axes[1, 0].set_ylabel("share of target episodes")
    axes[1, 0].set_title("target task: hits", fontsize="medium")
    axes[1, 1].set_title("target task: falls", fontsize="medium")
    axes[0, 0].legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


@guarded("plot")
def main(config: Config) -> dict[str, list[dict[str, float]]]:
    """Read, print the table; returns the judgements of each run."""
    if not config.metrics:
        raise UserError("give --metrics FILE of at least one run")
    if config.plot is not None and config.plot.exists():
        raise UserError(f"{config.plot} exists and is not overwritten: name another file or remove it")
    runs = {f"{file.parent.name}/{file.name.removesuffix('.metrics.jsonl')}": read_judgements(file)
            for file in config.metrics}  # fmt: skip
    print_table(runs)
    if config.plot is not None:
        plot_curves(runs, config.plot)
        print(config.plot)
    return runs


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
