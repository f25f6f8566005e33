"""The directory that one stage hands to the next, and that a killed run goes on from.

    arrays.safetensors      the networks (see `agents/policy.py` for the names)
    golden.safetensors      16 observations `obs` (16, 87) and the `actions` (16, 12) they gave
    <name>.safetensors      extra arrays of the run itself, such as optimizer state
    manifest.json           stage, ancestors, code, versions, config, seed, metrics, checksums

Written under `<directory>.writing`, flushed, manifest last, then renamed: a directory without a whole
manifest is no checkpoint. With `overwrite` the one before is kept as `<directory>.previous`, and one found
damaged as `<directory>.broken`. No rename ever meets an existing name, so this also works where a rename
cannot replace; where directories cannot be renamed at all they are copied, manifest last.

The manifest holds the checksum of every file and its own, so no changed byte goes unnoticed, and the golden
pairs are computed again on loading, so arrays that do not act as they did are refused. No pickle. Whatever
else a user puts into the directory moves, and in the end goes, with it.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import LAYOUT_HASH, OBS_SIZE

STAGES = ("pretrained", "converted", "finetuned")
FORMAT = "booster-soccer checkpoint"
SCHEMA_VERSION = 1
GOLDEN_PAIRS = 16
# Largest difference of an action, out of [-1, 1]: float32 sums in another order differ by 1e-5 once a policy kicks
# hard (measured 1.1e-5 after 11 M steps); a wrong weight by 1e-2.
GOLDEN_TOLERANCE = 1e-4

MANIFEST = "manifest.json"
_MANIFEST_LIMIT_BYTES = 1 << 20  # ours has a few thousand; a foreign one is not worth the memory
_ARRAYS, _GOLDEN = "arrays.safetensors", "golden.safetensors"
_ARRAY_FILE = re.compile(r"[a-z][a-z0-9_]*\.safetensors", re.ASCII)  # no separators: stays in the directory
OTHER_PLACE = "free space, make the place writable, or choose another output directory"
_OTHER_NAME = "choose another output directory"
_OTHER_CODE = "use the code that wrote it, or train again"
_AGAIN = "write the checkpoint again"
_OTHER_COPY = "use another copy, or write it again"
_MANIFEST_TYPES = {
    "format": str,
    "schema_version": int,
    "stage": str,
    "parent": (dict, type(None)),
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
    *("numpy", "jax", "flax", "optax", "torch", "safetensors"),
    *("mujoco", "mujoco-mjx", "sai-mujoco", "sai-rl"),
)
_NO_RENAME = (errno.EXDEV, errno.ENOTSUP, errno.ENOSYS)  # the volume cannot rename directories
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # ... or not flush them


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint, checked and in memory; its extra arrays stay on disk until `load_extra`."""

    path: Path
    stage: str
    arrays: dict[str, np.ndarray]  # float32 or integer, finite
    golden_obs: np.ndarray  # (16, 87) float32
    golden_actions: np.ndarray  # (16, 12) float32, in [-1, 1]
    manifest: dict[str, Any]
    hash: str  # first 16 hex digits of the manifest's SHA-256: names this checkpoint in its descendants


class WrongRun(UserError):
    """A saved state is whole, but another run's: the one before it would be no better."""


# --- writing ----------------------------------------------------------------------------------------


def save(
    path: Path | str,
    stage: str,
    arrays: Mapping[str, np.ndarray],
    golden_obs: np.ndarray,
    golden_actions: np.ndarray,
    config: Mapping[str, Any],
    seed: int,
    steps: int,
    parent: Checkpoint | None,
    metrics: Mapping[str, Any],
    extra_arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint and return its path; either all of it is there afterwards, or what was before.

    `steps` are policy actions so far; `parent` is the checkpoint of the stage before (not this run's last
    save); `extra_arrays` maps a name such as "optimizer" to finite arrays of any number type or bool.
    `config` and `metrics` may hold paths, tuples and NumPy scalars; numbers not finite become null.

    `overwrite` is for the periodic saves of one run: it replaces a checkpoint of the same stage, and keeps
    it as `<path>.previous`. Without it a directory that holds anything is a `UserError`. So is whatever
    `load` would refuse, a full disk, or a directory that cannot be written.
    """
    tables = {_ARRAYS: arrays, _GOLDEN: {"obs": golden_obs, "actions": golden_actions}}
    tables |= {f"{name}.safetensors": table for name, table in (extra_arrays or {}).items()}
    if len(tables) != 2 + len(extra_arrays or {}) or not all(map(_ARRAY_FILE.fullmatch, tables)):
        raise ValueError(f"extra_arrays: names must be like 'optimizer', got {sorted(extra_arrays or {})}")
    # Contiguous, because safetensors writes the memory as it lies.
    tables = {
        name: {key: np.asarray(value, order="C") for key, value in table.items()} for name, table in tables.items()
    }
    ancestors = []
    if parent is not None:
        ancestors = [*parent.manifest["lineage"], {"stage": parent.stage, "hash": parent.hash}]
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "parent": ancestors[-1] if ancestors else None,
        "lineage": ancestors,  # oldest first, ends with the parent
        "code": dict(_code()),
        "versions": dict(_versions()),
        "config": _plain(config),
        "seed": int(seed),
        "steps": int(steps),
        "observation_layout": LAYOUT_HASH,
        "action": _action_layer(),
        "metrics": _plain(metrics),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": dict.fromkeys(tables, "0" * 64),
    }
    target = _real(path)
    _check_manifest(target, manifest)
    if len(_manifest_bytes(manifest)) > _MANIFEST_LIMIT_BYTES:
        raise ValueError("config and metrics are too large for a manifest: use extra_arrays")
    for name, table in tables.items():
        _check_table(target, name, table)
    _check_names(target, stage, tables[_ARRAYS])
    _check_golden(target, tables[_ARRAYS], tables[_GOLDEN])
    with os_errors(f"write checkpoint {target}", "the last one is kept; " + OTHER_PLACE):
        _check_target(target, stage, parent, overwrite)
        writing = _beside(target, "writing")
        _remove(writing)  # what a killed save left
        try:
            os.makedirs(writing)
            for name, table in tables.items():
                content = safetensors.numpy.save(table)
                manifest["files"][name] = hashlib.sha256(content).hexdigest()
                write_file(writing / name, content)
            write_file(writing / MANIFEST, _manifest_bytes(manifest))
            sync_directory(writing)
        except OSError:
            shutil.rmtree(writing, ignore_errors=True)  # on a full disk the room is needed
            raise
        _step_aside(target)
        _move(writing, target)
        sync_directory(target.parent)
    return Path(path)


def check_output_dir(path: Path | str) -> None:
    """Raise `UserError`, before any work is done, where `save(path, ..., overwrite=True)` could not write.

    That is a directory that holds something else than a checkpoint of ours, a file, or a place without
    permission to write.
    """
    target = _real(path)
    with os_errors(f"use {target}", OTHER_PLACE):
        _refuse_something_else(target)
        place = target.parent
        while not os.path.lexists(place):
            place = place.parent
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise UserError(f"cannot write into {place}: {OTHER_PLACE}")


def _check_target(target: Path, stage: str, parent: Checkpoint | None, overwrite: bool) -> None:
    """Refuse, with nothing touched, to write where something would be lost."""
    _refuse_something_else(target)
    if parent is not None and _real(parent.path) in (target, _beside(target, "previous")):
        raise UserError(f"{target} is what this stage starts from: {_OTHER_NAME}")
    if _is_vacant(target):
        return
    if not overwrite:
        raise UserError(f"{target} already holds a checkpoint: {_OTHER_NAME}")
    try:
        there = _read_manifest(target)[0]["stage"]
    except UserError:
        return  # damaged: set aside, not overwritten
    if there != stage:
        raise UserError(f"{target} holds a {there!r} checkpoint, not {stage!r}: {_OTHER_NAME}")


def _refuse_something_else(target: Path) -> None:
    """Raise `UserError` if the target, or a name beside it that `save` uses, is taken by something else."""
    taken = [] if _is_vacant(target) or _is_ours(target) else [target]
    for sibling in (_beside(target, suffix) for suffix in ("writing", "previous", "broken")):
        if not (_is_vacant(sibling) or _names_our_format(sibling) or _holds_only_our_files(sibling)):
            taken.append(sibling)
    if taken:
        raise UserError(f"{taken[0]} holds something else than a checkpoint: {_OTHER_NAME}")


def _step_aside(target: Path) -> None:
    """Make the name free: a whole checkpoint becomes the previous one, a damaged one never replaces it."""
    if _is_vacant(target):
        if target.exists():
            os.rmdir(target)
        return
    try:
        manifest, _ = _read_manifest(target)
        for name in manifest["files"]:
            _read_content(target, manifest, name)
        kept = _beside(target, "previous")
    except UserError:
        kept = _beside(target, "broken")
    _remove(kept)
    _move(target, kept)


def _is_vacant(path: Path) -> bool:
    """Whether nothing lies there, or an empty directory."""
    return not os.path.lexists(path) or (_is_directory(path) and not any(path.iterdir()))


def _is_ours(path: Path) -> bool:
    """Whether `save` wrote this directory, whole or damaged.

    Its manifest names our format; or it has lost that, but holds nothing else and lies beside a previous
    checkpoint of ours, as after an interrupted move on a volume where a move is a copy.
    """
    return _names_our_format(path) or (_holds_only_our_files(path) and _names_our_format(_beside(path, "previous")))


def _names_our_format(path: Path) -> bool:
    if not (_is_directory(path) and (path / MANIFEST).is_file()):
        return False
    with open(path / MANIFEST, "rb") as file:  # not parsed: it may be damaged
        return f'"format": "{FORMAT}"'.encode() in file.read(_MANIFEST_LIMIT_BYTES)


def _holds_only_our_files(path: Path) -> bool:
    return _is_directory(path) and all(map(_is_our_file, path.iterdir()))


def _is_our_file(path: Path) -> bool:
    return path.is_file() and bool(path.name == MANIFEST or _ARRAY_FILE.fullmatch(path.name))


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _real(path: Path | str) -> Path:
    """The place meant, symbolic links followed, so that the names beside it lie on the same volume."""
    return Path(os.path.realpath(path))


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f"{target.name}.{suffix}"


def _in_order(directory: Path) -> list[Path]:
    """Arrays, manifest, whatever else: a directory filled in this order, or emptied in the reverse one, is
    at every instant known as ours, and a checkpoint only if it is whole.
    """
    entries = directory.iterdir()
    return sorted(entries, key=lambda entry: (entry.name == MANIFEST) + 2 * (not _is_our_file(entry)))


def _remove(directory: Path) -> None:
    if not directory.exists():
        return
    for entry in reversed(_in_order(directory)):
        if _is_directory(entry):
            shutil.rmtree(entry)
        else:
            os.unlink(entry)
    os.rmdir(directory)


def _move(source: Path, target: Path) -> None:
    """Rename a directory to a name that is free; where the volume cannot, copy it."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        os.mkdir(target)
        for entry in _in_order(source):
            if entry.is_dir():
                shutil.copytree(entry, target / entry.name)
            else:
                write_file(target / entry.name, entry.read_bytes())
        sync_directory(target)
        _remove(source)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it to disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, on the volumes that can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors(doing: str, remedy: str) -> Iterator[None]:
    """Turn an error of the file system into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {doing}: {error.strerror or error}; {remedy}") from error


# --- reading ----------------------------------------------------------------------------------------


def load(path: Path | str, stages: tuple[str, ...] | None = None, verify: bool = True) -> Checkpoint:
    """The checkpoint in a directory, or a `UserError` that says in one line what is wrong with it.

    Every byte is held against the checksums. Refused too: another format, schema, observation layout or PD
    layer, a stage not in `stages`, arrays that are not finite, and, unless `verify` is off, a policy that
    does not give the golden actions within 1e-4.
    """
    path = Path(path)
    manifest, digest = _read_manifest(path)
    if manifest["stage"] not in (stages or STAGES):
        raise UserError(
            f"checkpoint {path} is {manifest['stage']!r}, but {' or '.join(stages or STAGES)} is needed: "
            "give a checkpoint of that stage"
        )
    if manifest["observation_layout"] != LAYOUT_HASH:
        raise UserError(
            f"checkpoint {path} was trained on another observation layout "
            f"({manifest['observation_layout'][:16]!r}, not {LAYOUT_HASH!r}): {_OTHER_CODE}"
        )
    for name, value in _action_layer().items():
        if manifest["action"].get(name) != value:
            raise UserError(
                f"checkpoint {path} was trained with another {name} than envs/constants.py has: {_OTHER_CODE}"
            )
    tables = {}
    for name in manifest["files"]:
        content = _read_content(path, manifest, name)
        if name in (_ARRAYS, _GOLDEN):
            tables[name] = _parse_table(path, name, content)
    arrays, golden = tables[_ARRAYS], tables[_GOLDEN]
    _check_names(path, manifest["stage"], arrays)
    if verify:
        _check_golden(path, arrays, golden)
    return Checkpoint(path, manifest["stage"], arrays, golden["obs"], golden["actions"], manifest, digest)


def load_extra(checkpoint: Checkpoint, name: str) -> dict[str, np.ndarray]:
    """The extra arrays saved under `name`, checked against the manifest that was loaded."""
    file = f"{name}.safetensors"
    if file not in checkpoint.manifest["files"]:
        raise UserError(f"checkpoint {checkpoint.path} was saved without {file}: start from another one")
    return _parse_table(checkpoint.path, file, _read_content(checkpoint.path, checkpoint.manifest, file))


def places(path: Path | str) -> tuple[Path, Path]:
    """Where a run's saved state lies: the newest, and the one before (alone, if a save was killed between)."""
    return Path(path), _beside(_real(path), "previous")


def load_latest(
    path: Path | str,
    stages: tuple[str, ...] | None = None,
    verify: bool = True,
    accept: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Checkpoint:
    """The checkpoint in `path`, or where that is missing or damaged the one before, with a warning.

    `accept` takes up what else belongs to a checkpoint; with a `UserError` it refuses it as damaged, with a
    `WrongRun` it ends the search.
    """

    def attempt(place: Path) -> Checkpoint:
        checkpoint = load(place, stages, verify)
        accept(checkpoint)
        return checkpoint

    path, previous = places(path)
    try:
        return attempt(path)
    except WrongRun:
        raise
    except UserError as error:
        newest = error
    if not os.path.exists(previous):
        raise newest
    try:
        checkpoint = attempt(previous)
    except WrongRun:
        raise
    except UserError as error:
        raise UserError(f"{newest}; and the one before: {error}") from error
    print(f"warning: {newest}; going on from the one before, {previous}", file=sys.stderr)
    return checkpoint


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a directory, whole and well-typed, and the checkpoint's hash."""
    damaged = UserError(f"checkpoint {path}: {MANIFEST} is damaged; {_OTHER_COPY}")
    with os_errors(f"read checkpoint {path}", _OTHER_COPY):
        if not path.is_dir():
            raise UserError(f"checkpoint {path} is not there: check the path, or run the stage before")
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path} is no checkpoint: it has no {MANIFEST}; check the path")
        with open(path / MANIFEST, "rb") as file:
            raw = file.read(_MANIFEST_LIMIT_BYTES)  # a longer one is cut, and so damaged
    try:
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path} is no checkpoint: its {MANIFEST} is something else's; check the path")
        if _manifest_bytes(manifest) != raw:
            raise damaged
    except (ValueError, RecursionError) as error:
        raise damaged from error
    del manifest["manifest_sha256"]
    _check_manifest(path, manifest)
    return manifest, hashlib.sha256(raw).hexdigest()[:16]


def _read_content(path: Path, manifest: dict[str, Any], name: str) -> bytes:
    """The bytes of one file, if they are those that were written."""
    with os_errors(f"read {name} of checkpoint {path}", _OTHER_COPY):
        if not (path / name).is_file():
            raise UserError(f"checkpoint {path}: {name} is missing; {_OTHER_COPY}")
        content = (path / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
        raise UserError(f"checkpoint {path}: {name} is damaged; {_OTHER_COPY}")
    return content


def _parse_table(path: Path, name: str, content: bytes) -> dict[str, np.ndarray]:
    """The arrays in a file's bytes, checked."""
    try:
        # KeyError: a number format that NumPy lacks.
        table = safetensors.numpy.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path}: {name} is no safetensors file; write it again") from error
    _check_table(path, name, table)
    return table


# --- what a checkpoint must be, for writing and for reading -------------------------------------------


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `UserError` unless every entry has its type and range."""

    def refuse(key: str) -> UserError:
        value = repr(manifest[key])[:60]
        return UserError(f"checkpoint {path}: {key} in {MANIFEST} cannot be {value}; {_AGAIN}")

    if type(manifest.get("schema_version")) is not int or manifest["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"checkpoint {path} has schema version {repr(manifest.get('schema_version'))[:20]}, "
            f"this code reads {SCHEMA_VERSION}: use the code that wrote it"
        )
    if manifest.keys() != _MANIFEST_TYPES.keys():
        wrong = ", ".join(sorted(manifest.keys() ^ _MANIFEST_TYPES.keys()))
        raise UserError(f"checkpoint {path}: {MANIFEST} lacks or adds {wrong[:60]!r}; {_AGAIN}")
    for key, kind in _MANIFEST_TYPES.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise refuse(key)
    for key in ("seed", "steps"):
        if not 0 <= manifest[key] < 2**63:
            raise refuse(key)
    if manifest["stage"] not in STAGES:
        raise refuse("stage")
    for ancestor in manifest["lineage"]:
        if not (
            isinstance(ancestor, dict)
            and ancestor.keys() == {"stage", "hash"}
            and ancestor["stage"] in STAGES
            and isinstance(ancestor["hash"], str)
        ):
            raise refuse("lineage")
    if manifest["parent"] != (manifest["lineage"][-1] if manifest["lineage"] else None):
        raise refuse("parent")
    if manifest["code"].keys() != {"commit", "dirty"}:
        raise refuse("code")
    if not {_ARRAYS, _GOLDEN} <= manifest["files"].keys():
        raise refuse("files")
    for name, digest in manifest["files"].items():
        if not _ARRAY_FILE.fullmatch(name) or not isinstance(digest, str):
            raise refuse("files")


def _check_table(path: Path, name: str, table: dict[str, np.ndarray]) -> None:
    """Raise `UserError` unless the arrays of a file have their types and shapes and are finite."""
    for key, value in table.items():
        what = f"checkpoint {path}: {name}: {key[:60]!r}"
        is_network = name in (_ARRAYS, _GOLDEN)  # extra arrays may be simulator states and flags
        if not (value.dtype == np.float32 or value.dtype.kind in ("iu" if is_network else "iufb")):
            raise UserError(f"{what} has type {value.dtype}, not float32 or integer; {_AGAIN}")
        if not np.isfinite(value).all():
            raise UserError(f"{what} holds NaN or infinity; go back to an earlier checkpoint")
    if name == _GOLDEN:
        shapes = {key: (value.shape, value.dtype.name) for key, value in table.items()}
        if shapes != {
            "obs": ((GOLDEN_PAIRS, OBS_SIZE), "float32"),
            "actions": ((GOLDEN_PAIRS, c.NUM_JOINTS), "float32"),
        }:
            raise UserError(f"checkpoint {path}: {name} does not hold 16 pairs; {_AGAIN}")


def _check_names(path: Path, stage: str, arrays: dict[str, np.ndarray]) -> None:
    """Raise `UserError` if a stage's arrays have the names of another (`agents/policy.py`)."""
    if ("actor.input.kernel" in arrays) != (stage == "pretrained"):
        raise UserError(f"checkpoint {path}: {_ARRAYS} holds no {stage!r} policy; {_AGAIN}")


def _check_golden(path: Path, arrays: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> None:
    """Raise `UserError` unless the policy in the arrays gives the golden actions."""
    try:
        with np.errstate(all="ignore"):
            actions = policy_from_arrays(arrays)(golden["obs"])
        if actions.shape != golden["actions"].shape:
            raise ValueError(f"actions of shape {actions.shape}")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"checkpoint {path}: {_ARRAYS} holds no policy of {OBS_SIZE} observations and {c.NUM_JOINTS} "
            f"actions ({type(error).__name__}); {_AGAIN}"
        ) from error
    difference = float(np.abs(actions - golden["actions"]).max())
    if not difference <= GOLDEN_TOLERANCE:  # also when it is NaN
        raise UserError(
            f"checkpoint {path}: its policy differs from its golden actions by {difference:.1e}, more than "
            f"{GOLDEN_TOLERANCE:.0e}; write it again, with the highest float32 matmul precision"
        )


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest as it is written, with the checksum of all that is in it."""

    def dump(entries: dict[str, Any]) -> bytes:
        return (json.dumps(entries, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    entries = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return dump(entries | {"manifest_sha256": hashlib.sha256(dump(entries)).hexdigest()})


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy, JAX and PyTorch
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _action_layer() -> dict[str, Any]:
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
def _code() -> dict[str, Any]:
    """Commit of this code and whether files differ from it; null where it has no git tree of its own."""
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
    return {"commit": None, "dirty": None}


@functools.cache
def _versions() -> dict[str, str | None]:
    """Installed versions, without importing anything."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
