"""What is installed in an environment, and which devices it sees; more than one CUDA is an error.

python cloud/inventory.py [--json FILE]
"""

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

import tyro

from booster_soccer import errors
from booster_soccer.errors import More, UserError
from booster_soccer.store.entry import guarded
from cloud.environment import cuda_majors

_SHOWN = ("numpy", "jax", "jaxlib", "jax-cuda12-plugin", "flax", "optax", "torch", "mujoco", "mujoco-mjx", "sai-mujoco",
          "sai-rl", "mlflow", "wandb")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Where to write it."""

    json: Path | None = None  # file for the result, written anew


def gpu() -> dict[str, Any] | None:
    """Name, memory and driver of the first GPU by NVIDIA's library; None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        total_gb = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
        return {
            "name": pynvml.nvmlDeviceGetName(handle),
            "memory_gb": round(total_gb, 1),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    except Exception:  # not installed, no driver, no device: each has its own class
        return None


def collect() -> dict[str, Any]:
    """Versions, CUDA majors and devices; `UserError` if there are two CUDAs."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    majors = sorted(cuda_majors(f"{name}=={version}" for name, version in installed.items()))
    if len(majors) > 1:
        found = f"libraries of CUDA {' and '.join(majors)} in {sys.prefix}"
        raise UserError(f"{found}: build the environment anew; {More.TWO_CUDAS}")
    import jax

    return {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: installed[name] for name in _SHOWN if name in installed},
        "cuda": majors,
        "gpu": gpu(),
        "jax_devices": [str(device.device_kind) for device in jax.devices()],
    }


@guarded("json")
def main(config: Config) -> dict[str, Any]:
    """Print it, write it if a file is named, return it."""
    found = collect()
    print(json.dumps(found, indent=2))
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
