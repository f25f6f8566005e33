"""Writing so that a kill or a full disk leaves the old or the new, never half: files, directories, errors."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from booster_soccer.errors import UserError, remedy

OTHER_PLACE = "free space, make the place writable, or choose another output directory"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # the volume cannot flush directories


def is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def real_path(path: Path | str) -> Path:
    """The place meant, symbolic links followed, so that the names beside it lie on the same volume."""
    return Path(os.path.realpath(path))


def beside(target: Path, suffix: str) -> Path:
    return target.parent / f"{target.name}.{suffix}"


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it to disk; on a full disk nothing half written stays."""
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.unlink(path)
            raise


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
def os_errors(doing: str, of_the_place: str, kept: str = "") -> Iterator[None]:
    """Turn an error of the operating system into one line for the user: what is kept, and what to do.

    `of_the_place` is what to do where it is the place's fault; too many open files, for example, are not.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {doing}: {error.strerror or error}; {kept}{remedy(error, of_the_place)}") from error
