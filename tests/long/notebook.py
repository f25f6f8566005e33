"""Execute the notebook for real, on settings of a minute or two, as somebody does who opens it in a clean checkout.

    python -m tests.long.notebook [--keep executed.ipynb]

Its parameters are replaced, nothing else. Every cell must run; a second run must find every stage finished.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbclient
import nbformat
import tyro

from booster_soccer import errors
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError

ROOT = Path(__file__).parents[2]
_PARAMETERS = """
preset, out, volume = "demo", {out!r}, {volume!r}
pretrain = {{"total_steps": 960, "judge_episodes": 2}}
collect = {{"num_envs": 8, "batch_size": 32, "updates_per_iteration": 2, "buffer_size": 300, "learning_starts": 80,
           "max_actions": 40}}
records = {{"judge_every": 480, "log_every": 200}}
finetune = {{"num_lanes": {lanes}, "total_steps": 480, "round_actions": 20, "warmup_rounds": 1,
            "validation_episodes": 2, "confirmation_episodes": 2, "device": "cpu"}}
gate = {{"states": 100, "episodes": 1, "behaviour_episodes": 2}}
score, package = {{"episodes": 2}}, {{"episodes": 1}}
"""


@dataclass(frozen=True)
class Config:
    """What stays."""

    keep: Path | None = None  # file for the executed notebook, with its outputs


def execute(out: Path, volume: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; `UserError` where a cell fails."""
    notebook = nbformat.read(ROOT / "cloud" / "notebook.ipynb", as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = _PARAMETERS.format(out=str(out), volume=str(volume), lanes=c.NUM_TASKS)
    try:
        nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(ROOT / "cloud")}}).execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise UserError(f"a cell failed: {str(error)[-1500:]}") from error
    return notebook


def text(notebook: nbformat.NotebookNode) -> str:
    """All that its cells printed."""
    return "\n".join(o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream")


def main(config: Config) -> None:
    """Execute it twice."""
    with tempfile.TemporaryDirectory() as place:
        out, volume = Path(place) / "run", Path(place) / "volume"
        for expected in ("dry run: nothing was sent", "pretrain is finished already"):
            started = time.monotonic()
            notebook = execute(out, volume)
            print(f"{time.monotonic() - started:.0f} s", flush=True)
            if config.keep is not None:
                nbformat.write(notebook, config.keep)
            if expected not in text(notebook):
                raise UserError(f"{expected!r} is not in the output:\n{text(notebook)[-2000:]}")
            images = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            if len(images) != 2:
                raise UserError(f"{len(images)} pictures instead of the learning curve and the scores")
            pages = [o.data["text/html"] for cell in notebook.cells for o in cell.get("outputs", [])
                     if "text/html" in o.get("data", {})]  # fmt: skip
            shown = {tag: sum(f"<{tag}" in page for page in pages) for tag in ("iframe", "video")}
            if shown != {"iframe": 1, "video": int((out / "goalie.mp4").exists())}:
                raise UserError(f"{shown} instead of the report and, where there is an OpenGL, the film")
        for name in ("pretrain", "converted", "finetuned", "submission"):
            if not (volume / name / "manifest.json").is_file():
                raise UserError(f"{name} is not on the volume")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
