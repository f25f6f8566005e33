"""One way to tell the user what was wrong, where, and what to do, without a traceback."""

import dataclasses
import enum
import errno
import math
import signal
import sys
from collections.abc import Callable
from typing import Any

from booster_soccer.runtime import out_of_memory

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C
_INT_LIMIT = 2**62  # what arrays and random generators can hold, with room for a sum


class More(enum.StrEnum):
    """Paragraphs of the guides for a message to end with, where they say more than its one line: `f"...; {More.X}"`."""

    CHECKPOINT = "more: docs/01-environment-setup.md#checkpoint-refused"
    DISK_FULL = "more: docs/01-environment-setup.md#disk-full"
    DIVERGENCE = "more: docs/02-mjx-training.md#nan-and-divergence"
    DRY_RUN = "more: docs/03-finetuning-submission.md#dry-run-failed"
    ENVIRONMENT = "more: docs/07-databricks-mlops.md#environment-failed"
    GATE = "more: docs/05-verification-gates.md#gate-failed"
    GPU_CHECK = "more: docs/01-environment-setup.md#gpu-check-failed"
    NO_GPU = "more: docs/02-mjx-training.md#no-gpu"
    OPENGL = "more: docs/01-environment-setup.md#opengl"
    OUT_OF_MEMORY = "more: docs/02-mjx-training.md#out-of-memory"
    RUN = "more: docs/01-environment-setup.md#run-refused"
    STAGE = "more: docs/05-verification-gates.md#stage-failed"
    START = "more: docs/03-finetuning-submission.md#result-is-the-start"
    SUBMISSION = "more: docs/03-finetuning-submission.md#submission-refused"
    TWO_CUDAS = "more: docs/02-mjx-training.md#two-cudas"
    VERSIONS = "more: docs/02-mjx-training.md#versions"
    WATCHDOG = "more: docs/02-mjx-training.md#watchdog-status-75"


class UserError(Exception):
    """Bad input or a machine that lacks something: the message is one line and names the remedy."""

    def __init__(self, message: str):
        # It may quote a damaged file: half a surrogate pair can be read from JSON, but not be printed.
        super().__init__(message.encode(errors="backslashreplace").decode())

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the same one line as a script."""
        return [f"error: {one_line(str(self))}"]


def run(main: Callable[..., Any], *args: Any) -> Any:
    """Call `main(*args)`; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C one and 130.

    So does what a machine refuses wherever it happens: a full disk, a place without permission, too little
    memory; and, before `main`, a configuration with numbers that are none. Errors of the code keep their traceback.
    """
    try:
        for config in args:
            check_numbers(config)
        return main(*args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = of_the_machine(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one ends what is still being closed
        how = "with --resume where it has that " if any(hasattr(config, "resume") for config in args) else ""
        print(f"interrupted: the same command {how}starts again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        memory = out_of_memory(error, *args)
        if memory is None:
            sys.excepthook = sys.__excepthook__  # the platform's SDK has one that shows local variables
            raise
        message = f"{memory}; {More.OUT_OF_MEMORY}"
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


# What to do about what a machine refuses, by its number: where the place of a file is the matter, and where not.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_PLACE = {
    **dict.fromkeys(_FULL, "free space, or name a place to write to"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the place writable, or name another one"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "check the path"),
}
_OF_OTHER_CAUSES = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), or use fewer lanes"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "something is there already: name another place"),
    errno.ENOMEM: f"choose smaller settings, or end other processes; {More.OUT_OF_MEMORY}",
    errno.EAGAIN: "choose smaller settings, or end other processes",
    **dict.fromkeys((errno.EPIPE, errno.ECONNRESET), "the other side has ended: start again"),
    errno.EIO: "the disk or volume fails: name another place",
    errno.ESTALE: "the volume was mounted anew: start again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def of_the_machine(error: OSError | MemoryError) -> str:
    """What a machine refuses, and what to do about it."""
    if isinstance(error, MemoryError):
        return f"{out_of_memory(error)}; {More.OUT_OF_MEMORY}"
    where = "a file" if error.filename is None else error.filename
    return f"cannot use {where}: {error.strerror or error}; {remedy(error)}"


def remedy(error: OSError, of_the_place: str | None = None) -> str:
    """What to do about an error of the operating system; `of_the_place` knows better where a file cannot be."""
    known = _OF_OTHER_CAUSES | (_OF_THE_PLACE if of_the_place is None else {})
    what = known.get(error.errno or 0, of_the_place or "look at the place and its volume")
    return f"{what}; {More.DISK_FULL}" if error.errno in _FULL else what


def one_line(message: str) -> str:
    """A message without line breaks, which names of files may hold."""
    return " ".join(message.split())


def check_numbers(config: Any) -> None:
    """Raise `UserError` where a number in a configuration, nested ones too, is NaN, infinite or 2^62 and more."""
    if not dataclasses.is_dataclass(config):
        return
    for field in dataclasses.fields(config):
        name, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{name} cannot be {number}: give a finite number")
            if isinstance(number, int) and not -_INT_LIMIT <= number < _INT_LIMIT:
                raise UserError(f"{name} has more digits than can be counted with: give a number below 2^62")
        check_numbers(value)
