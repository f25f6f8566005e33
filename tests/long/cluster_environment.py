"""Build a cluster's environment for real, from a Python that has NumPy 1 and pandas; both stay usable.

    python -m tests.long.cluster_environment [--python python3.12] [--torch cpu] [--extra gpu]

In a clean folder: an outer environment with NumPy 1 and pandas, as on Databricks; from its Python the project's own
(`cloud/environment.py`), kept in a cache; then the disk is lost, and it comes from the cache. `--torch index` takes
PyTorch from the package index, where its own index of CPU builds cannot be reached. Exit status 1 if something differs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from booster_soccer import errors
from cloud import environment

ROOT = Path(__file__).parents[2]
_OUTER = (
    "import numpy, pandas; assert numpy.__version__[0] == '1';"
    "print('NumPy', numpy.__version__, 'pandas', pandas.__version__, pandas.DataFrame({'x': [1, 2]}).x.sum())"
)
_INNER = (
    "import numpy, jax, torch, mujoco, sai_mujoco, booster_soccer; assert numpy.__version__[0] == '2';"
    "print(numpy.__version__, jax.__version__, torch.__version__, mujoco.__version__, booster_soccer.__file__)"
)


@dataclass(frozen=True)
class Config:
    """What to build."""

    python: str = sys.executable  # of the outer environment
    torch: str = "cpu"
    extra: str = ""


def run(*command: str | Path) -> str:
    """Output of a command; ends the drill if it fails."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment.clean(dict(os.environ)), text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    if done.returncode:
        raise errors.UserError(f"{' '.join(map(str, command))[:200]} ended with status {done.returncode}")
    return done.stdout.strip()


def main(config: Config) -> None:
    """Build, check, lose the disk, check again."""
    with tempfile.TemporaryDirectory() as place:
        outer, disk, volume = (Path(place) / name for name in ("outer", "disk", "volume"))
        run(sys.executable, "-m", "uv", "venv", "--quiet", "--seed", "--python", config.python, outer)
        python = outer / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "numpy<2", "pandas<3")
        before = run(python, "-m", "pip", "freeze")
        build = [python, "-m", "cloud.environment", "--extra", config.extra, "--torch", config.torch, "--place", disk]
        for what in ("built", "from the cache"):
            started = time.monotonic()
            inner = run(*build, "--cache", volume).splitlines()[-1]
            print(f"{what} in {time.monotonic() - started:.0f} s: {run(inner, '-c', _INNER)}", flush=True)
            run(inner, ROOT / "cloud" / "inventory.py")  # refuses a second CUDA
            print(f"  outside: {run(python, '-c', _OUTER)}", flush=True)
            if run(python, "-m", "pip", "freeze") != before:
                raise errors.UserError("the outer environment is another one now")
            shutil.rmtree(disk)
        print(f"on the volume: {sum(path.stat().st_size for path in volume.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
