"""Two processes started at the same instant in one `--out`: one runs, one is refused, and nothing is mixed.

    python -m tests.long.two_at_once --times 50

A toy stage (`tests/toy_stage.py`) with another seed in each process, behind a gate that both wait at. Every second time
a run killed before has left its state and its lock there, and both resume it. Exit status 1 if one time is not so.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from booster_soccer import errors
from booster_soccer.store import checkpoints

ROOT = Path(__file__).parents[2]
# Imported first, so that what comes after the gate takes the two equally long.
_PROGRAM = """
import sys
from pathlib import Path
from booster_soccer import errors
from tests import toy_stage
print("here", flush=True)
sys.stdin.readline()
out, seed, resume = sys.argv[1:]
config = toy_stage.Config(Path(out), int(seed), step_s=0.03, resume=resume == "resume")
errors.run(toy_stage.main, config)
"""


@dataclass(frozen=True)
class Config:
    """What is tried."""

    times: int = 50


def start(out: Path, seed: int, how: str) -> subprocess.Popen:
    """A process that waits at the gate."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(out), str(seed), how], cwd=ROOT, env=environment,
                               text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    return process


def leave_a_state(out: Path) -> None:
    """A run with the first seed, killed after its first save."""
    process = start(out, 0, "new")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    while process.stdout.readline() != "log of step 20\n":
        assert process.poll() is None
    process.kill()
    process.communicate()


def once(place: Path, resumes: bool) -> str:
    """Try it; returns what was wrong, nothing if it went as it must."""
    out = place / "run"
    if resumes:
        leave_a_state(out)
    seeds = (0, 0) if resumes else (1, 2)
    two = [start(out, seed, "resume" if resumes else "new") for seed in seeds]
    for process in two:
        assert process.stdin is not None
        process.stdin.write("\n")
    for process in two:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.flush()  # type: ignore[union-attr]
    said = [process.communicate(timeout=300)[0] for process in two]
    statuses = [process.returncode for process in two]
    if sorted(statuses) != [0, 2]:
        return f"they ended with {statuses}: {said}"
    first, second = statuses.index(0), statuses.index(2)
    if said[second].count("\n") != 1 or f"is being written by process {two[first].pid} " not in said[second]:
        return f"the second said {said[second]!r}, the first was {two[first].pid}"
    if checkpoints.load(out).manifest["seed"] != seeds[first] or "seed" not in said[first]:
        return "the result is not that of the first"
    left = sorted(path.name for path in place.iterdir())
    return "" if left == ["run", "run.metrics.jsonl"] else f"left behind: {left}"


def main(config: Config) -> bool:
    """Try it so many times; returns whether it always went as it must."""
    wrong = 0
    for time in range(config.times):
        with tempfile.TemporaryDirectory() as place:
            problem = once(Path(place), resumes=time % 2 == 1)
        print(f"{time + 1}/{config.times}: {problem or 'one ran, one was refused'}", flush=True)
        wrong += bool(problem)
    print(
        f"{config.times - wrong} of {config.times}: one ran, one was refused in one line that names it, nothing mixed"
    )
    return wrong == 0


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config, description=__doc__)) else 1)
