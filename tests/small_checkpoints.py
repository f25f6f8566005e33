"""Small checkpoints for the tests of the store: networks eight units wide, and ways to spoil them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints, manifests

HIDDEN = 8
FILES = ("arrays.safetensors", "golden.safetensors", "manifest.json", "optimizer.safetensors")
OPTIMIZER = {
    "count": np.array(7),
    "key": np.array([1, 2**32 - 1], np.uint32),
    "qpos": np.linspace(0, 1, 5, dtype=np.float64),
    "done": np.array([True, False]),
}


def network(stage: str) -> dict[str, np.ndarray]:
    """Small random networks with the names and layouts of a stage."""
    rng = np.random.default_rng(0)
    outputs = 2 * c.NUM_JOINTS if stage == "pretrained" else c.NUM_JOINTS
    sizes = {"input": (OBS_SIZE, HIDDEN), "hidden": (HIDDEN, HIDDEN), "output": (HIDDEN, outputs)}
    arrays = {}
    for layer, size in sizes.items():
        kernel = rng.normal(0, 0.3, size).astype(np.float32)
        arrays[f"actor.{layer}.bias"] = rng.normal(0, 0.3, size[1]).astype(np.float32)
        if stage == "pretrained":
            arrays[f"actor.{layer}.kernel"] = kernel
        else:  # a transposed view: its memory does not lie in the order of its indices
            arrays[f"actor.{layer}.weight"] = kernel.T
    if stage == "pretrained":
        arrays |= {"normalizer.mean": rng.normal(size=OBS_SIZE).astype(np.float32)}
        arrays |= {"normalizer.std": rng.uniform(0.5, 2, OBS_SIZE).astype(np.float32)}
    return arrays


def save(path: Path, steps: int = 1, stage: str = "converted", arrays: dict | None = None, **changes) -> Path:
    arrays = arrays or network(stage)
    entries = {
        "golden_obs": np.random.default_rng(1).normal(size=(16, OBS_SIZE)).astype(np.float32),
        "config": {"out": path, "sizes": (8, 8), "rate": np.float32(0.5)},
        "seed": 3,
        "parents": [],
        "metrics": {"score": 1.25, "hits": float("nan")},
        "extra_arrays": {"optimizer": OPTIMIZER},
    } | changes
    return checkpoints.save(path, stage, arrays, steps=steps, **entries)


def one_line(action: Callable, *args, **kwargs) -> str:
    """The message of the `UserError` that the action must raise."""
    with pytest.raises(UserError) as refused:
        action(*args, **kwargs)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 600
    return message


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def seal(directory: Path, **entries) -> None:
    """Change the manifest as somebody would who knows the format: all checksums right."""
    file = directory / "manifest.json"
    manifest = json.loads(file.read_bytes()) | entries
    file.write_bytes(manifests.to_bytes(manifest))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Replace a file, and its checksum."""
    (directory / name).write_bytes(content)
    files = json.loads((directory / "manifest.json").read_bytes())["files"]
    seal(directory, files=files | {name: hashlib.sha256(content).hexdigest()})
