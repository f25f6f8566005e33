"""Where a checkpoint lies, and how a new one takes the place of the one before without losing either.

Written under `<directory>.writing`, then renamed. The one before is kept as `<directory>.previous`, and one found
damaged as `<directory>.broken`. No rename ever meets an existing name, so this also works where a rename cannot
replace; where directories cannot be renamed at all they are copied, manifest last.
"""

import errno
import os
import shutil
from pathlib import Path

from booster_soccer.errors import UserError
from booster_soccer.store import manifests
from booster_soccer.store.atomic import (
    OTHER_PLACE,
    beside,
    is_directory,
    os_errors,
    real_path,
    sync_directory,
    write_file,
)
from booster_soccer.store.manifests import ARRAY_FILE, FORMAT, LIMIT_BYTES, MANIFEST

_OTHER_NAME = "choose another output directory"
_NO_RENAME = (errno.EXDEV, errno.ENOTSUP, errno.ENOSYS)  # the volume cannot rename directories


def check_output_dir(path: Path | str) -> None:
    """Raise `UserError`, before any work is done, where `save(path, ..., overwrite=True)` could not write.

    That is a directory that holds something else than a checkpoint of ours, a file, or a place without
    permission to write.
    """
    target = real_path(path)
    with os_errors(f"use {target}", OTHER_PLACE):
        check_own_directory(target)
        _refuse_something_else(target)
        place = target.parent
        while not os.path.lexists(place):
            place = place.parent
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise UserError(f"cannot write into {place}: {OTHER_PLACE}")


def check_own_directory(path: Path | str) -> None:
    """Raise `UserError` for a directory that cannot be moved: where somebody works, or a volume is mounted."""
    target = real_path(path)
    if target in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(target):
        raise UserError(
            f"{target} cannot be written as a whole, because you are in it or a volume is mounted there: name a "
            f"directory inside, such as {target / 'run'}"
        )


def check_target(target: Path, stage: str, parents: list[Path], overwrite: bool) -> None:
    """Refuse, with nothing touched, to write where something would be lost."""
    _refuse_something_else(target)
    if {target, beside(target, "previous")} & set(map(real_path, parents)):
        raise UserError(f"{target} is what this stage starts from: {_OTHER_NAME}")
    if is_vacant(target):
        return
    if not overwrite:
        raise UserError(f"{target} already holds a checkpoint: {_OTHER_NAME}")
    try:
        there = manifests.read(target)[0]["stage"]
    except UserError:
        return  # damaged: set aside, not overwritten
    if there != stage:
        raise UserError(f"{target} holds a {there!r} checkpoint, not {stage!r}: {_OTHER_NAME}")


def _refuse_something_else(target: Path) -> None:
    """Raise `UserError` if the target, or a name beside it that `save` uses, is taken by something else."""
    taken = [] if is_vacant(target) or _is_ours(target) else [target]
    for sibling in (beside(target, suffix) for suffix in ("writing", "previous", "broken")):
        if not (is_vacant(sibling) or _names_our_format(sibling) or _holds_only_our_files(sibling)):
            taken.append(sibling)
    if taken:
        raise UserError(f"{taken[0]} holds something else than a checkpoint: {_OTHER_NAME}")


def step_aside(target: Path) -> None:
    """Make the name free: a whole checkpoint becomes the previous one, a damaged one never replaces it."""
    if is_vacant(target):
        if target.exists():
            os.rmdir(target)
        return
    try:
        manifest, _ = manifests.read(target)
        for name in manifest["files"]:
            manifests.read_content(target, manifest, name)
        kept = beside(target, "previous")
    except UserError:
        kept = beside(target, "broken")
    remove(kept)
    move(target, kept)


def is_vacant(path: Path) -> bool:
    """Whether nothing lies there, or an empty directory."""
    return not os.path.lexists(path) or (is_directory(path) and not any(path.iterdir()))


def _is_ours(path: Path) -> bool:
    """Whether `save` wrote this directory, whole or damaged.

    Its manifest names our format; or it has lost that, but holds nothing else and lies beside a previous
    checkpoint of ours, as after an interrupted move on a volume where a move is a copy.
    """
    return _names_our_format(path) or (_holds_only_our_files(path) and _names_our_format(beside(path, "previous")))


def _names_our_format(path: Path) -> bool:
    if not (is_directory(path) and (path / MANIFEST).is_file()):
        return False
    with open(path / MANIFEST, "rb") as file:  # not parsed: it may be damaged
        return f'"format": "{FORMAT}"'.encode() in file.read(LIMIT_BYTES)


def _holds_only_our_files(path: Path) -> bool:
    return is_directory(path) and all(map(_is_our_file, path.iterdir()))


def _is_our_file(path: Path) -> bool:
    return path.is_file() and bool(path.name == MANIFEST or ARRAY_FILE.fullmatch(path.name))


def _in_order(directory: Path) -> list[Path]:
    """Arrays, manifest, whatever else: a directory filled in this order, or emptied in the reverse one, is
    at every instant known as ours, and a checkpoint only if it is whole.
    """
    entries = directory.iterdir()
    return sorted(entries, key=lambda entry: (entry.name == MANIFEST) + 2 * (not _is_our_file(entry)))


def remove(directory: Path) -> None:
    if not directory.exists():
        return
    for entry in reversed(_in_order(directory)):
        if is_directory(entry):
            shutil.rmtree(entry)
        else:
            os.unlink(entry)
    os.rmdir(directory)


def move(source: Path, target: Path) -> None:
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
        remove(source)


def delete(path: Path | str) -> None:
    """Delete a checkpoint that is no longer needed, and what earlier or killed saves left beside it."""
    target = real_path(path)
    for place in (target, *(beside(target, suffix) for suffix in ("previous", "writing", "broken"))):
        if _names_our_format(place) or _holds_only_our_files(place):
            remove(place)


def places(path: Path | str) -> tuple[Path, Path]:
    """Where a run's saved state lies: the newest, and the one before (alone, if a save was killed between)."""
    return Path(path), beside(real_path(path), "previous")
