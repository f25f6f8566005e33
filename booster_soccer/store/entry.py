"""What every script's `main` begins with, from a notebook too: its paths, its numbers, and who owns the output.

Two processes that write to one place would mix their files, and one result would be gone. So a process holds
`<output>.lock`, a lock of the operating system that any death of it releases; a second one is refused.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
import socket
import sys
import time
import typing
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from booster_soccer.errors import More, UserError, check_numbers
from booster_soccer.store.atomic import OTHER_PLACE, beside, os_errors, real_path
from booster_soccer.store.signals import end_with_launcher

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # the volume has none
# Nothing can be written there, so there is nothing to own; what is there may still be a finished result.
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
_WIDTH = 400
_POLL_S = 0.05
_POLLS = 20  # for the first process to write who it is

Config = TypeVar("Config")
Result = TypeVar("Result")


def guarded(*outputs: str) -> Callable[[Callable[[Config], Result]], Callable[[Config], Result]]:
    """Decorator of a script's `main(config)`: no other process may write to the places that these settings name.

    Paths may be strings. Raises `UserError` for a number that is none, or a place that has its process already.
    """

    def decorate(main: Callable[[Config], Result]) -> Callable[[Config], Result]:
        @functools.wraps(main)
        def alone(config: Config) -> Result:
            end_with_launcher()
            config = with_paths(config)
            check_numbers(config)
            with contextlib.ExitStack() as held:
                for output in outputs:
                    place = getattr(config, output)
                    if place is not None:
                        held.enter_context(owned(place, f"--{output}"))
                return main(config)

        return alone

    return decorate


def with_paths(config: Config) -> Config:
    """The configuration, strings where a path belongs made to paths."""
    changed: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if "Path" in str(hint) and isinstance(value, (str, tuple, list)):
            changed[name] = Path(value) if isinstance(value, str) else tuple(map(Path, value))
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


@contextlib.contextmanager
def owned(place: Path, option: str = "--out") -> Iterator[None]:
    """Hold the lock of an output while the block runs; `UserError` if another process holds it."""
    lock, descriptor = beside(real_path(place), "lock"), None
    with os_errors(f"write {place}", OTHER_PLACE):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take(lock, place, option)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock)  # still held: nobody can have taken it meanwhile
            os.close(descriptor)


def _take(lock: Path, place: Path, option: str) -> int:
    """The descriptor that holds the lock: it is closed, and the lock free, whenever this process ends."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{place} is being written by {holder}: wait for it or end it, or choose another {option}; {More.RUN}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"warning: no lock can be held at {lock}: start no second run there", file=sys.stderr)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                break
        os.close(descriptor)  # the one who held it has just unlinked it
    with contextlib.suppress(OSError):  # a full disk holds a lock too
        started = datetime.now(UTC).isoformat(timespec="seconds")
        who = f"{os.getpid()} {socket.gethostname()} {started}"
        os.pwrite(descriptor, f"{who:<{_WIDTH}}\n".encode(), 0)  # as wide as what a killed one left
    return descriptor


def _holder(descriptor: int) -> str:
    """Who holds a lock, as it wrote itself; it may be about to."""
    for _ in range(_POLLS):
        words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
        if len(words) == 3 and words[0].isdigit() and (words[1] != socket.gethostname() or _is_alive(int(words[0]))):
            return f"process {words[0]} on {words[1]} since {words[2]}"
        time.sleep(_POLL_S)
    return "another process"


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True
