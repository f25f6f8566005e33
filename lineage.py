"""Where a submission or a checkpoint came from, back to pre-training: runs, registered versions and aliases.

    python lineage.py --of runs/demo/submission

Input: a submission's or a checkpoint's directory, and MLflow's store (MLFLOW_TRACKING_URI; `runs/mlflow.db` by
default). Output: one line for each ancestor, the newest first. The ancestors themselves are in the directory's own
manifest; what MLflow does not know of them is said to be missing there.
"""

from booster_soccer import terminal

terminal.begin(__name__)

from dataclasses import dataclass
from pathlib import Path

import tyro

from booster_soccer import errors
from booster_soccer.store.entry import guarded


@dataclass(frozen=True)
class Config:
    """Whose lineage to print."""

    of: Path  # directory of a submission or a checkpoint


@guarded()
def main(config: Config) -> list[str]:
    """Print the lineage; returns its lines."""
    # MLflow takes seconds to import; `--help` need not wait for it.
    from booster_soccer.tracking import registry
    from booster_soccer.tracking.mlflow_writer import connect

    lines = list(registry.lineage(connect(), config.of))
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
