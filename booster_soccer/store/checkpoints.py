"""The directory that one stage hands to the next, and that a killed run goes on from.

    arrays.safetensors      the networks (see `agents/policy.py` for the names)
    golden.safetensors      16 observations `obs` (16, 87) and the `actions` (16, 12) that the policy gives them
    <name>.safetensors      extra arrays of the run itself, such as optimizer state
    manifest.json           what it is and came from, and the checksums (`store/manifests.py`)

A directory without a whole manifest is no checkpoint; how a new one takes an old one's place: `store/places.py`.
No changed byte goes unnoticed, and the golden pairs are computed again on loading, so arrays that do not act as they
did are refused. No pickle. Whatever else a user puts into the directory moves, and in the end goes, with it.
"""

import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from booster_soccer.agents.policy import ACTION_LIMITS, policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import LAYOUT_HASH, OBS_SIZE
from booster_soccer.store import manifests
from booster_soccer.store.atomic import OTHER_PLACE, beside, os_errors, real_path, sync_directory, write_file
from booster_soccer.store.manifests import AGAIN, ARRAY_FILE, ARRAYS, GOLDEN, MANIFEST, STAGES
from booster_soccer.store.places import check_target, move, places, remove, step_aside

GOLDEN_PAIRS = 16
GOLDEN_TOLERANCE = ACTION_LIMITS["float64"]
_OTHER_CODE = f"use the code that wrote it, or train again; {More.CHECKPOINT}"


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


def save(
    path: Path | str,
    stage: str,
    arrays: Mapping[str, np.ndarray],
    golden_obs: np.ndarray,
    config: Mapping[str, Any],
    seed: int,
    steps: int,
    parents: Sequence[Checkpoint],
    metrics: Mapping[str, Any],
    extra_arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint and return its path; either all of it is there afterwards, or what was before.

    `golden_obs` (16, 87) are kept with the actions that the arrays' policy gives them. `steps` are policy actions
    so far; `parents` all checkpoints that this one was made from (not this run's last save); `extra_arrays` maps
    a name such as "optimizer" to finite arrays of any number type or bool. `config` and `metrics` may hold paths,
    tuples and NumPy scalars; numbers not finite become null.

    `overwrite` is for the periodic saves of one run: it replaces a checkpoint of the same stage, and keeps
    it as `<path>.previous`. Without it a directory that holds anything is a `UserError`. So is whatever
    `load` would refuse, a full disk, or a directory that cannot be written.
    """
    target = real_path(path)
    _check_names(target, stage, arrays)
    if np.shape(golden_obs) != (GOLDEN_PAIRS, OBS_SIZE):
        raise UserError(f"checkpoint {target}: golden_obs is {np.shape(golden_obs)}, not {(GOLDEN_PAIRS, OBS_SIZE)}")
    tables = {ARRAYS: arrays, GOLDEN: {"obs": golden_obs, "actions": _actions(target, arrays, golden_obs)}}
    tables |= {f"{name}.safetensors": table for name, table in (extra_arrays or {}).items()}
    if len(tables) != 2 + len(extra_arrays or {}) or not all(map(ARRAY_FILE.fullmatch, tables)):
        raise ValueError(f"extra_arrays: names must be like 'optimizer', got {sorted(extra_arrays or {})}")
    # Contiguous, because safetensors writes the memory as it lies.
    files = {
        name: {key: np.asarray(value, order="C") for key, value in table.items()} for name, table in tables.items()
    }
    for name, arrays_of_file in files.items():
        _check_table(target, name, arrays_of_file)
    manifest = manifests.new(stage, [(p.stage, p.hash, p.manifest) for p in parents], config, seed, steps, metrics)
    manifest["files"] = dict.fromkeys(files, "0" * 64)
    manifests.check(target, manifest)
    with os_errors(f"write checkpoint {target}", OTHER_PLACE, "the last one is kept; "):
        check_target(target, stage, [parent.path for parent in parents], overwrite)
        writing = beside(target, "writing")
        remove(writing)  # what a killed save left
        try:
            os.makedirs(writing)
            for name, arrays_of_file in files.items():
                content = safetensors.numpy.save(arrays_of_file)
                manifest["files"][name] = hashlib.sha256(content).hexdigest()
                write_file(writing / name, content)
            write_file(writing / MANIFEST, manifests.to_bytes(manifest))
            sync_directory(writing)
        except OSError:
            shutil.rmtree(writing, ignore_errors=True)  # on a full disk the room is needed
            raise
        step_aside(target)
        move(writing, target)
        sync_directory(target.parent)
    return Path(path)


# --- reading ----------------------------------------------------------------------------------------


def load(path: Path | str, stages: tuple[str, ...] | None = None, verify: bool = True) -> Checkpoint:
    """The checkpoint in a directory, or a `UserError` that says in one line what is wrong with it.

    Every byte is held against the checksums. Refused too: another format, schema, observation layout or PD
    layer, a stage not in `stages`, arrays that are not finite, and, unless `verify` is off, a policy that
    does not give the golden actions within 1e-5.
    """
    path = Path(path)
    manifest, digest = manifests.read(path)
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
    for name, value in manifests.action_layer().items():
        if manifest["action"].get(name) != value:
            raise UserError(
                f"checkpoint {path} was trained with another {name} than envs/constants.py has: {_OTHER_CODE}"
            )
    tables = {}
    for name in manifest["files"]:
        content = manifests.read_content(path, manifest, name)
        if name in (ARRAYS, GOLDEN):
            tables[name] = _parse_table(path, name, content)
    arrays, golden = tables[ARRAYS], tables[GOLDEN]
    _check_names(path, manifest["stage"], arrays)
    if verify:
        _check_golden(path, arrays, golden)
    return Checkpoint(path, manifest["stage"], arrays, golden["obs"], golden["actions"], manifest, digest)


def load_extra(checkpoint: Checkpoint, name: str) -> dict[str, np.ndarray]:
    """The extra arrays saved under `name`, checked against the manifest that was loaded."""
    file = f"{name}.safetensors"
    if file not in checkpoint.manifest["files"]:
        raise UserError(f"checkpoint {checkpoint.path} was saved without {file}: start from another one")
    return _parse_table(checkpoint.path, file, manifests.read_content(checkpoint.path, checkpoint.manifest, file))


def load_latest(
    path: Path | str,
    stages: tuple[str, ...] | None = None,
    accept: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Checkpoint:
    """The checkpoint in `path`, or where that is missing or damaged the one before, with a warning.

    `accept` takes up what else belongs to a checkpoint; with a `UserError` it refuses it as damaged, with a
    `WrongRun` it ends the search.
    """

    def attempt(place: Path) -> Checkpoint:
        checkpoint = load(place, stages)
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
    said = str(newest).partition("; more: ")[0]  # such a pointer ends a line
    try:
        checkpoint = attempt(previous)
    except WrongRun:
        raise
    except UserError as error:
        raise UserError(f"{said}; and the one before: {error}") from error
    print(f"warning: {said}; going on from the one before, {previous}", file=sys.stderr)
    return checkpoint


def _parse_table(path: Path, name: str, content: bytes) -> dict[str, np.ndarray]:
    """The arrays in a file's bytes, checked."""
    try:
        # KeyError: a number format that NumPy lacks.
        table = safetensors.numpy.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path}: {name} is no safetensors file; {AGAIN}") from error
    _check_table(path, name, table)
    return table


def _check_table(path: Path, name: str, table: Mapping[str, np.ndarray]) -> None:
    """Raise `UserError` unless the arrays of a file have their types and shapes and are finite."""
    for key, value in table.items():
        what = f"checkpoint {path}: {name}: {key[:60]!r}"
        is_network = name in (ARRAYS, GOLDEN)  # extra arrays may be simulator states and flags
        if not (value.dtype == np.float32 or value.dtype.kind in ("iu" if is_network else "iufb")):
            raise UserError(f"{what} has type {value.dtype}, not float32 or integer; {AGAIN}")
        if not np.isfinite(value).all():
            raise UserError(f"{what} holds NaN or infinity; go back to an earlier checkpoint; {More.DIVERGENCE}")
    if name == GOLDEN:
        shapes = {key: (value.shape, value.dtype.name) for key, value in table.items()}
        if shapes != {
            "obs": ((GOLDEN_PAIRS, OBS_SIZE), "float32"),
            "actions": ((GOLDEN_PAIRS, c.NUM_JOINTS), "float32"),
        }:
            raise UserError(f"checkpoint {path}: {name} does not hold 16 pairs; {AGAIN}")


def _check_names(path: Path, stage: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `UserError` if a stage's arrays have the names of another (`agents/policy.py`)."""
    if ("actor.input.kernel" in arrays) != (stage == "pretrained"):
        raise UserError(f"checkpoint {path}: {ARRAYS} holds no {stage!r} policy; {AGAIN}")


def _actions(path: Path, arrays: Mapping[str, np.ndarray], obs: np.ndarray) -> np.ndarray:
    """Actions (N, 12) of the policy in the arrays, computed in float64; `UserError` if they hold none."""
    try:
        with np.errstate(all="ignore"):
            actions = policy_from_arrays(arrays)(obs)
        if actions.shape != (len(obs), c.NUM_JOINTS):
            raise ValueError(f"actions of shape {actions.shape}")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"checkpoint {path}: {ARRAYS} holds no policy of {OBS_SIZE} observations and {c.NUM_JOINTS} "
            f"actions ({type(error).__name__}); {AGAIN}"
        ) from error
    return actions


def _check_golden(path: Path, arrays: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> None:
    """Raise `UserError` unless the policy in the arrays gives the golden actions."""
    difference = float(np.abs(_actions(path, arrays, golden["obs"]) - golden["actions"]).max())
    if not difference <= GOLDEN_TOLERANCE:  # also when it is NaN
        raise UserError(
            f"checkpoint {path}: its policy differs from its golden actions by {difference:.1e}, more than "
            f"{GOLDEN_TOLERANCE:.0e}: other code wrote it; {AGAIN}"
        )
