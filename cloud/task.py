"""What every task of the bundle runs, in the runtime's Python: one stage, as a process in the project's environment.

    python cloud/task.py --code DIR --run NAME --environment cpu --checkpoints DIR --artifacts DIR
        [--torch cpu] [--options "--seed 1"] [--local DIR] [--sync-s 180] -- SCRIPT.py [its options]

The stage's working directory is the run's directory on the local disk, so its paths are relative: `--out pretrain`.
That directory comes from the newest snapshot on the volume if this machine has none, and is saved there every
`--sync-s` seconds and at the end: after a preemption the same task goes on from it. At the end the results lie as
plain files in `<artifacts>/runs/<run>`. The status is the stage's. Standard library only.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def parser() -> argparse.ArgumentParser:
    """The options of a task, of which all after `--` is the stage's."""
    options = argparse.ArgumentParser(prog="cloud/task.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    options.add_argument("--code", type=Path, required=True, help="the checkout")
    options.add_argument("--run", type=_name, required=True, help="name of the run: all its stages have the same")
    options.add_argument("--environment", choices=("cpu", "gpu"), required=True)
    options.add_argument("--torch", default="cpu", help="build of PyTorch, as uv names it: cpu, cu126, ...")
    options.add_argument("--checkpoints", type=Path, required=True, help="volume of the runs' snapshots")
    options.add_argument("--artifacts", type=Path, required=True, help="volume of results and environments")
    options.add_argument("--options", type=shlex.split, default=[], help="more options of the stage, in one word")
    options.add_argument("--commit", default="", help="of the code, for the checkpoints' manifests")
    options.add_argument("--runs-table", default="", help="of Unity Catalog: catalog.schema.table")
    options.add_argument("--local", type=Path, default=Path("/local_disk0/booster_soccer"), help="on the local disk")
    options.add_argument("--sync-s", type=float, default=180.0, help="seconds between two saves to the volume")
    options.add_argument("stage", nargs="+", help="script and its options")
    return options


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters, digits, dot, hyphen and underscore only")
    return text


def main(arguments: list[str]) -> int:
    """Run one task; returns the stage's status."""
    args = parser().parse_args(arguments)
    sys.path.insert(0, str(args.code))  # the platform does not say where this file lies
    from cloud import stage
    from cloud.environment import EnvironmentFailed
    from cloud.volume import VolumeError

    try:
        return stage.run(args)
    except (EnvironmentFailed, VolumeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    # Where a task runs inside the platform's interpreter, even `SystemExit(0)` counts as a failure.
    if status := main(sys.argv[1:]):
        sys.stdout.flush()
        sys.exit(status if os.environ.get("DATABRICKS_RUNTIME_VERSION") is None else f"the stage ended with {status}")
