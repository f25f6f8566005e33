"""A checkpoint's manifest: what it says, how it is checked, and whether the files are those that were written.

stage, parents and lineage, code, versions, config, seed, steps, observation layout, PD layer, metrics, and the SHA-256
of every file and of the manifest itself.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import LAYOUT_HASH
from booster_soccer.store.atomic import os_errors

STAGES = ("pretrained", "converted", "finetuned")
FORMAT = "booster-soccer checkpoint"
SCHEMA_VERSION = 2
MANIFEST, ARRAYS, GOLDEN = "manifest.json", "arrays.safetensors", "golden.safetensors"
ARRAY_FILE = re.compile(r"[a-z][a-z0-9_]*\.safetensors", re.ASCII)  # no separators: stays in the directory
AGAIN = f"write the checkpoint again; {More.CHECKPOINT}"
LIMIT_BYTES = 1 << 20  # ours has a few thousand; a foreign one is not worth the memory
COMMIT_VARIABLE = "BOOSTER_SOCCER_COMMIT"  # of copied code, set by cloud/stage.py
_OTHER_COPY = f"use another copy, or write it again; {More.CHECKPOINT}"
_TYPES = {
    "format": str,
    "schema_version": int,
    "stage": str,
    "parents": list,
    "lineage": list,
    "code": dict,
    "versions": dict,
    "config": dict,
    "seed": int,
    "steps": int,
    "observation_layout": str,
    "action": dict,
    "metrics": dict,
    "time_utc": str,
    "files": dict,
}
_PACKAGES = (
    *("numpy", "jax", "flax", "optax", "torch", "safetensors", "gymnasium"),
    *("mujoco", "mujoco-mjx", "sai-mujoco", "sai-rl"),
)


def new(
    stage: str,
    parents: Sequence[tuple[str, str, dict[str, Any]]],
    config: Mapping[str, Any],
    seed: int,
    steps: int,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """A manifest without files; `parents` as (stage, hash, manifest), each once."""
    references, ancestors = _lineage(parents)
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "parents": references,
        "lineage": ancestors,
        "code": dict(code()),
        "versions": dict(versions()),
        "config": plain(config),
        "seed": int(seed),
        "steps": int(steps),
        "observation_layout": LAYOUT_HASH,
        "action": action_layer(),
        "metrics": plain(metrics),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {},
    }
    if len(to_bytes(manifest)) > LIMIT_BYTES // 2:
        raise ValueError("config and metrics are too large for a manifest: use extra_arrays")
    return manifest


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a directory, whole and well-typed, and the checkpoint's hash."""
    damaged = UserError(f"checkpoint {path}: {MANIFEST} is damaged; {_OTHER_COPY}")
    with os_errors(f"read checkpoint {path}", _OTHER_COPY):
        if path.name == MANIFEST and path.is_file():
            raise UserError(f"{path} is a checkpoint's manifest: give its directory, {path.parent}")
        if not path.is_dir():
            raise UserError(f"checkpoint {path} is not there: check the path, or run the stage before")
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path} is no checkpoint: it has no {MANIFEST}; check the path")
        with open(path / MANIFEST, "rb") as file:
            raw = file.read(LIMIT_BYTES)  # a longer one is cut, and so damaged
    try:
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path} is no checkpoint: its {MANIFEST} is something else's; check the path")
        if to_bytes(manifest) != raw:
            raise damaged
    except (ValueError, RecursionError) as error:
        raise damaged from error
    del manifest["manifest_sha256"]
    check(path, manifest)
    return manifest, hashlib.sha256(raw).hexdigest()[:16]


def read_content(path: Path, manifest: dict[str, Any], name: str) -> bytes:
    """The bytes of one file, if they are those that were written."""
    with os_errors(f"read {name} of checkpoint {path}", _OTHER_COPY):
        if not (path / name).is_file():
            raise UserError(f"checkpoint {path}: {name} is missing; {_OTHER_COPY}")
        content = (path / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
        raise UserError(f"checkpoint {path}: {name} is damaged; {_OTHER_COPY}")
    return content


def check(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `UserError` unless every entry has its type and range."""

    def refuse(key: str) -> UserError:
        value = repr(manifest[key])[:60]
        return UserError(f"checkpoint {path}: {key} in {MANIFEST} cannot be {value}; {AGAIN}")

    if type(manifest.get("schema_version")) is not int or manifest["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"checkpoint {path} has schema version {repr(manifest.get('schema_version'))[:20]}, "
            f"this code reads {SCHEMA_VERSION}: use the code that wrote it; {More.CHECKPOINT}"
        )
    if manifest.keys() != _TYPES.keys():
        wrong = ", ".join(sorted(manifest.keys() ^ _TYPES.keys()))
        raise UserError(f"checkpoint {path}: {MANIFEST} lacks or adds {wrong[:60]!r}; {AGAIN}")
    for key, kind in _TYPES.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise refuse(key)
    for key in ("seed", "steps"):
        if not 0 <= manifest[key] < 2**63:
            raise refuse(key)
    if manifest["stage"] not in STAGES:
        raise refuse("stage")
    known: set[str] = set()
    for ancestor in manifest["lineage"]:
        if not (_is_reference(ancestor, {"stage", "hash", "parents"}) and set(ancestor["parents"]) <= known):
            raise refuse("lineage")
        known.add(ancestor["hash"])
    if not all(_is_reference(parent, {"stage", "hash"}) and parent["hash"] in known for parent in manifest["parents"]):
        raise refuse("parents")
    if manifest["code"].keys() != {"commit", "dirty"}:
        raise refuse("code")
    if not {ARRAYS, GOLDEN} <= manifest["files"].keys():
        raise refuse("files")
    for name, digest in manifest["files"].items():
        if not ARRAY_FILE.fullmatch(name) or not isinstance(digest, str):
            raise refuse("files")


def _is_reference(entry: Any, keys: set[str]) -> bool:
    """Whether an entry names a checkpoint by stage and hash."""
    if not (isinstance(entry, dict) and entry.keys() == keys and entry["stage"] in STAGES):
        return False
    parents = entry.get("parents", [])
    return isinstance(parents, list) and all(isinstance(hash_, str) for hash_ in [entry["hash"], *parents])


def _lineage(parents: Sequence[tuple[str, str, dict[str, Any]]]) -> tuple[list[dict], list[dict]]:
    """`parents` and `lineage` of a manifest from each parent's stage, hash and own manifest.

    The lineage names every ancestor once, parents before their children, each with the hashes of its own parents.
    """
    references: list[dict] = []
    ancestors: dict[str, dict] = {}
    for stage, hash_, manifest in parents:
        for ancestor in manifest["lineage"]:
            ancestors.setdefault(ancestor["hash"], ancestor)
        own = [parent["hash"] for parent in manifest["parents"]]
        ancestors.setdefault(hash_, {"stage": stage, "hash": hash_, "parents": own})
        if {"stage": stage, "hash": hash_} not in references:
            references.append({"stage": stage, "hash": hash_})
    return references, list(ancestors.values())


def to_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest as it is written, with the checksum of all that is in it."""

    def dump(entries: dict[str, Any]) -> bytes:
        return (json.dumps(entries, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    entries = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return dump(entries | {"manifest_sha256": hashlib.sha256(dump(entries)).hexdigest()})


def plain(value: Any, lost: list[float] | None = None) -> Any:
    """A value as JSON can hold it; numbers not finite become null, and are added to `lost`."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry, lost) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, lost) for entry in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy, JAX and PyTorch
        return plain(value.tolist(), lost)
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(value)
        return None
    return str(value) if isinstance(value, Path) else value


def finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file; where numbers are not finite, null, and in `not_finite` how many."""
    lost: list[float] = []
    written = plain(content, lost)
    return written | ({"not_finite": len(lost)} if lost else {})


def action_layer() -> dict[str, Any]:
    """What turns an action into torque: a policy is only right with the one it was trained with."""
    return {
        "joint_names": list(c.JOINT_NAMES),
        "default_pose_rad": c.DEFAULT_POSE_RAD.tolist(),
        "action_scale_rad": c.ACTION_SCALE_RAD.tolist(),
        "kp_nm_per_rad": c.KP_NM_PER_RAD.tolist(),
        "kd_nms_per_rad": c.KD_NMS_PER_RAD.tolist(),
        "physics_steps_per_action": c.PHYSICS_STEPS_PER_ACTION,
    }


@functools.cache
def code() -> dict[str, Any]:
    """Commit of this code and whether files differ from it; null where it has no git tree of its own.

    There, on a cluster, the commit is what COMMIT_VARIABLE says.
    """
    here = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        full = ("git", "--no-optional-locks", "-C", str(here), *command)
        return subprocess.run(full, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        root, commit = git("rev-parse", "--show-toplevel", "HEAD").split("\n")[:2]
        if Path(root).resolve() == here:
            return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"commit": os.environ.get(COMMIT_VARIABLE), "dirty": None}


@functools.cache
def versions() -> dict[str, str | None]:
    """Installed versions, without importing anything."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
