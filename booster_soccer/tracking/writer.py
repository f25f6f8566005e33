"""What a tracker does, and what it is told: the interface between `worker.py` and W&B's and MLflow's writers."""

from pathlib import Path
from typing import Any, Protocol

Record = tuple[int, dict[str, float]]  # a step, and numbers by name

# The last word of a run; this one stands for a run that never said it.
END: dict[str, Any] = {"what": "finish", "status": "killed", "numbers": {}, "files": [], "checkpoint": None,
                       "hash": None, "claim": None}  # fmt: skip


class Writer(Protocol):
    """What a tracker does; each call may raise whatever its library raises."""

    LABEL: str

    def start(self, info: dict[str, Any], state: dict[str, Any]) -> None:
        """Open the run; `state` is kept on disk for the next attempt, `delivered` in it is what the tracker has."""

    def log(self, records: list[Record]) -> None:
        """Take all of the records, or raise."""

    def alarm(self, text: str) -> None:
        """Show a warning."""

    def artifact(self, path: Path) -> None:
        """Keep a file or directory."""

    def finish(self, end: dict[str, Any]) -> str:
        """Close the run; returns where it is to be found, in words."""
