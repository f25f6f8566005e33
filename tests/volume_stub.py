"""Two stand-ins for a volume that is no disk: a folder guarded within this process, and a real FUSE file system.

Neither renames, links, appends, truncates or writes in the middle, and each can be made slow.

    python -m tests.volume_stub ROOT MOUNTPOINT [SECONDS_PER_WRITE]        mounts the second, until it is unmounted
"""

import builtins
import contextlib
import errno
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

_REFUSED = ("rename", "replace", "link", "symlink", "truncate")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test sees it."""


class Guard:
    """Refuses below `volume` what a volume refuses; dies at the operation `die_at` that changes it."""

    def __init__(self, volume: Path, die_at: int | None = None):
        self.volume, self.die_at, self.changes = str(volume), die_at, 0

    def concerns(self, *paths) -> bool:
        places = [os.path.abspath(path) for path in paths if isinstance(path, (str, os.PathLike))]
        return any(place == self.volume or place.startswith(self.volume + os.sep) for place in places)

    def change(self) -> None:
        self.changes += 1
        if self.changes == self.die_at:
            raise Killed

    @contextlib.contextmanager
    def active(self) -> Iterator["Guard"]:
        with contextlib.ExitStack() as stack:
            for name in _REFUSED:
                stack.enter_context(mock.patch.object(os, name, self._refusing(getattr(os, name))))
            for name in ("unlink", "remove", "mkdir"):
                stack.enter_context(mock.patch.object(os, name, self._counting(getattr(os, name))))
            for module in (builtins, io):
                stack.enter_context(mock.patch.object(module, "open", self._opening(module.open)))
            yield self

    def _refusing(self, function):
        def refuse(*args, **kwargs):
            if self.concerns(*args):
                raise OSError(errno.ENOTSUP, "the volume cannot", str(args[0]))
            return function(*args, **kwargs)

        return refuse

    def _counting(self, function):
        def count(path, *args, **kwargs):
            if self.concerns(path):
                self.change()
            return function(path, *args, **kwargs)

        return count

    def _opening(self, function):
        def open_(path, mode="r", *args, **kwargs):
            writes = self.concerns(path) and not set(mode) <= set("rbt")
            if writes and (set(mode) & set("a+")):
                raise OSError(errno.ENOTSUP, "the volume cannot append", str(path))
            file = function(path, mode, *args, **kwargs)
            return _Written(file, self) if writes else file

        return open_


class _Written:
    """A file on the volume: from beginning to end, or not at all. Half of what is written when it is killed stays."""

    def __init__(self, file, guard: Guard):
        self._file, self._guard = file, guard

    def write(self, content) -> int:
        try:
            self._guard.change()
        except Killed:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


# --- FUSE -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(root: Path, place: Path, seconds_per_write: float = 0.0) -> Iterator[Path]:
    """The FUSE file system over `root`, mounted at `place`; skips the test where that cannot be done."""
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("no /dev/fuse")
    root.mkdir()
    place.mkdir()
    command = [sys.executable, "-m", "tests.volume_stub", str(root), str(place), str(seconds_per_write)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not os.path.ismount(place):
            if process.poll() is not None:
                pytest.skip(f"FUSE does not work here: {process.stderr.read()[-200:]}")
            time.sleep(0.02)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=False)
        process.wait(10)


def _serve(root: str, place: str, seconds_per_write: float) -> None:
    import mfusepy

    class Volume(mfusepy.Operations):
        """A folder that is passed through, less what a volume refuses (which `Operations` does by itself)."""

        use_ns = True

        def __init__(self):
            self.ends: dict[int, int] = {}  # of the files open for writing

        def path(self, path: str) -> str:
            return root + path

        def getattr(self, path, fh=None):
            status = os.lstat(self.path(path))
            names = ("st_mode", "st_nlink", "st_size", "st_ino", "st_uid", "st_gid")
            return {name: getattr(status, name) for name in names} | {"st_mtime": status.st_mtime_ns}

        def readdir(self, path, fh):
            return [".", "..", *os.listdir(self.path(path))]

        def mkdir(self, path, mode):
            os.mkdir(self.path(path), mode)

        def rmdir(self, path):
            os.rmdir(self.path(path))

        def unlink(self, path):
            os.unlink(self.path(path))

        def create(self, path, mode, fi=None):
            handle = os.open(self.path(path), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
            self.ends[handle] = 0
            return handle

        def open(self, path, flags):
            if flags & (os.O_WRONLY | os.O_RDWR) and not flags & os.O_TRUNC:
                raise mfusepy.FuseOSError(errno.ENOTSUP)
            handle = os.open(self.path(path), flags & ~os.O_APPEND)
            self.ends[handle] = 0
            return handle

        def read(self, path, size, offset, fh):
            return os.pread(fh, size, offset)

        def write(self, path, data, offset, fh):
            if offset != self.ends[fh]:
                raise mfusepy.FuseOSError(errno.ENOTSUP)
            time.sleep(seconds_per_write)
            self.ends[fh] += len(data)
            return os.pwrite(fh, data, offset)

        def truncate(self, path, length, fh=None):
            if length:
                raise mfusepy.FuseOSError(errno.ENOTSUP)
            os.truncate(self.path(path), 0)

        def rename(self, old, new):
            raise mfusepy.FuseOSError(errno.ENOTSUP)

        def link(self, target, source):
            raise mfusepy.FuseOSError(errno.ENOTSUP)

        def release(self, path, fh):
            self.ends.pop(fh, None)
            os.close(fh)

    mfusepy.FUSE(Volume(), place, foreground=True, nothreads=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
