"""`make bench`: how fast everything is, each as a ratio to its limit or peer within this one run.

    python -m benchmarks.bench [--rows P1 P2 ...] [--repeats 5] [--sbx-python PYTHON]

Output: a table, printed line by line and written into `docs/performance.md` between its two marker comments, with
commit, date, processor and versions. Both sides of a ratio are measured in turn, A B A B, after one uncounted turn
each; the table has smallest, median and largest ratio, and the median (smallest to largest) of each side. A row that
cannot be measured here says why. Nothing else may use the machine meanwhile. The rows:

    P1   MJX training step without updates, against the bare physics of the same scene
    P2   native training step without updates, against bare `mujoco.rollout`
    P3   the twin, against the official environments, one core
    P4   SAC updates, against `sbx-rl` (the extra `bench`, or another Python that has it)
    P5   fine-tuning's loop, against the competition's own
    P7   wall time from nothing to +4.0 and +8.0, read from the metrics of past runs
    P8   the submitted policy on the SDK's path, against real time
    P10  growth with lanes, threads and batch: against the best size, and where the knee is
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy and PyTorch are imported

import importlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro

from benchmarks.pairs import Line, NotHere
from booster_soccer import errors
from booster_soccer.cores import usable_cores
from booster_soccer.errors import UserError
from booster_soccer.rollout.workers import check_num_lanes
from booster_soccer.store import checkpoints, manifests

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# Module and function: imported only when it is their turn, as each needs other packages.
ROWS = {
    "P1": ("bench_pretraining", "mjx_loop"),
    "P2": ("bench_pretraining", "native_loop"),
    "P3": ("bench_finetuning", "twin_speed"),
    "P4": ("bench_pretraining", "sac_updates"),
    "P5": ("bench_finetuning", "finetuning_loop"),
    "P7": ("bench_finetuning", "wall_time"),
    "P8": ("bench_finetuning", "submitted_policy"),
    "P10": ("bench_pretraining", "growth"),
}
_VERSIONS = ("python", "numpy", "jax", "torch", "mujoco", "mujoco-mjx", "sai-mujoco", "sai-rl")


@dataclass(frozen=True)
class Config:
    """What to measure."""

    rows: tuple[str, ...] = tuple(ROWS)
    repeats: int = 5  # pairs
    mjx_lanes: int = 64  # of P1
    native_lanes: int = 256  # of P2
    twin_lanes: int = 256  # of P3
    finetune_lanes: int = 192  # of P5, a multiple of three
    checkpoint: Path = ROOT / "assets/policies/final"  # whose policy P5 and P8 play: converted or fine-tuned
    sbx_python: Path = Path(sys.executable)  # a Python that has sbx-rl, for P4
    document: Path = ROOT / "docs/performance.md"  # into which the table is written


def check(config: Config) -> None:
    """Everything that can be told before anything is measured."""
    unknown = [row for row in config.rows if row not in ROWS]
    if unknown or not config.rows:
        raise UserError(f"--rows: {', '.join(unknown) or 'none'} given: use some of {', '.join(ROWS)}")
    for name in ("repeats", "mjx_lanes", "native_lanes", "twin_lanes"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    check_num_lanes(config.finetune_lanes)
    checkpoints.load(config.checkpoint, ("converted", "finetuned"))
    with_table(config.document, "")


def measure(row: str, config: Config) -> list[Line]:
    """The lines of a row; one that says why where it cannot be measured here."""
    module, function = ROWS[row]
    try:
        return getattr(importlib.import_module(f"benchmarks.{module}"), function)(config)
    except (ModuleNotFoundError, NotHere, UserError) as error:
        return [Line(row, "", f"not measured: {errors.one_line(str(error))}", "", "", "")]


def text_of(line: Line) -> str:
    """A line of the Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


def _processor() -> str:
    """Its name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def heading(config: Config) -> str:
    """Where and when the table was measured."""
    code, versions, now = manifests.code(), manifests.versions(), datetime.now(UTC)
    commit = f"commit `{(code['commit'] or 'unknown')[:7]}`" + (", with changes" if code["dirty"] else "")
    packages = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS)
    return (
        f"{commit}, {now.day} {now:%B %Y}; {_processor()}, {usable_cores()} usable cores, load average "
        f"{os.getloadavg()[0]:.1f} at the start; {packages}. Ratios: smallest, **median**, largest of {config.repeats} "
        "pairs; rates: median (smallest to largest)."
    )


def table(title: str, lines: Sequence[Line]) -> str:
    """The whole block between the markers."""
    head = "| row | measured | ours | limit or peer, same run | ratio | to reach |\n|---|---|---|---|---|---|"
    return "\n".join([title, "", head, *map(text_of, lines)])


def with_table(document: Path, block: str) -> str:
    """The text of a document with `block` between its markers, all else as it is; `UserError` where it has none."""
    try:
        text = document.read_text()
    except OSError as error:
        raise UserError(f"--document {document} cannot be read: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"--document {document} has no line {BEGIN} with {END} after it: add them where the table goes")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(config: Config) -> list[Line]:
    """Measure row by row, then write the table; returns its lines."""
    check(config)
    title, lines = heading(config), []
    print(title, flush=True)
    for row in config.rows:
        for line in measure(row, config):
            lines.append(line)
            print(text_of(line), flush=True)
    config.document.write_text(with_table(config.document, table(title, lines)))
    print(config.document)
    return lines


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
