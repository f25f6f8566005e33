"""Wall time and steps from nothing to a mean score of -0.80 (what standing brings), 0 and +4.0, with a fixed recipe.

    python benchmarks/learning.py --out runs/learning/seed0 [--preset cpu] [--seed 0]
    python benchmarks/learning.py --metrics runs/cpu/pretrain.metrics.jsonl [MORE ...] [--plot FILE.png]

Input: nothing, or the metrics of finished runs. Output: a table of the first evaluation at or above each
score, and with `--plot` the learning curves against wall time and steps. Scores are those of pre-training's
own evaluation (our scene, official starts with joint noise); a new run stops once the last is reached.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from booster_soccer import errors  # noqa: E402
from booster_soccer.errors import UserError  # noqa: E402

SCORES = (-0.80, 0.0, 4.0)
_POLL_S = 5.0
_STOP_WITHIN_S = 60.0


@dataclass(frozen=True)
class Config:
    """Either a new run or the metrics of others."""

    out: Path | None = None  # new checkpoint directory for a run
    metrics: tuple[Path, ...] = ()  # metrics files of finished runs
    preset: str = "cpu"
    seed: int = 0
    evaluation_every: int = 250_000  # steps; the resolution of the answer
    time_limit_s: float = 7200.0  # give up after this much wall time
    plot: Path | None = None  # new image of the learning curves


def read_evaluations(file: Path) -> list[dict[str, float]]:
    """The evaluations of a metrics file, in order; a line that is being written is left out."""
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give a run's .metrics.jsonl") from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "eval/score" in row:
            rows.append(row)
    return rows


def first_reached(evaluations: list[dict[str, float]], score: float) -> dict[str, float] | None:
    """The first evaluation with at least this mean score."""
    return next((row for row in evaluations if row["eval/score"] >= score), None)


def train(config: Config) -> Path:
    """Run pre-training until the last score or the time limit; returns its metrics file."""
    metrics = config.out.with_name(f"{config.out.name}.metrics.jsonl")
    command = [sys.executable, str(ROOT / "train_mjx_sac.py"), "--preset", config.preset, "--seed", str(config.seed)]
    command += ["--out", str(config.out), "--evaluation-every", str(config.evaluation_every)]
    command += ["--time-limit-s", str(config.time_limit_s)]
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            if metrics.exists() and first_reached(read_evaluations(metrics), SCORES[-1]):
                process.terminate()
                try:
                    process.wait(_STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    raise UserError(
                        f"train_mjx_sac.py did not stop within {_STOP_WITHIN_S} s; {metrics} is whole"
                    ) from None
                return metrics
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode:
        raise UserError(f"train_mjx_sac.py ended with status {process.returncode}; its message is above")
    return metrics


def print_table(runs: dict[str, list[dict[str, float]]]) -> None:
    """One row a run: wall time and steps of each score, and the best."""
    table = Table(title="First evaluation at or above each mean score")
    table.add_column("run", no_wrap=True)
    for score in SCORES:
        table.add_column(f"{score:+.2f}", justify="right")
    table.add_column("best", justify="right")
    for name, evaluations in runs.items():
        cells = []
        for score in SCORES:
            row = first_reached(evaluations, score)
            cells.append(f"{row['wall_s'] / 60:.1f} min, {row['step'] / 1e6:.2f} M" if row else "not reached")
        best = max(evaluations, key=lambda row: row["eval/score"], default=None)
        cells.append(f"{best['eval/score']:+.2f} at {best['step'] / 1e6:.2f} M" if best else "")
        table.add_row(name, *cells)
    Console().print(table)


def plot_curves(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Mean score against wall time and against steps, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, evaluations in runs.items():
        scores = [row["eval/score"] for row in evaluations]
        axes[0].plot([row["wall_s"] / 60 for row in evaluations], scores, marker=".", label=name)
        axes[1].plot([row["step"] / 1e6 for row in evaluations], scores, marker=".", label=name)
    for axis, label in zip(axes, ("wall time, min", "steps, millions"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        for score in SCORES:
            axis.axhline(score, color="grey", linewidth=0.7, linestyle=":")
    axes[0].set_ylabel("mean score of evaluation")
    axes[0].legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(config: Config) -> dict[str, list[dict[str, float]]]:
    """Run or read, print the table; returns the evaluations of each run."""
    if (config.out is None) == (not config.metrics):
        raise UserError("give either --out DIR for a new run or --metrics FILE of finished ones")
    if config.plot is not None and config.plot.exists():
        raise UserError(f"{config.plot} exists and is not overwritten: name another file or remove it")
    files = config.metrics or (train(config),)
    runs = {
        str(file.parent.name + "/" + file.name.removesuffix(".metrics.jsonl")): read_evaluations(file) for file in files
    }
    print_table(runs)
    if config.plot is not None:
        plot_curves(runs, config.plot)
        print(config.plot)
    return runs


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
