"""One way to tell the user what was wrong, where, and what to do, without a traceback."""

import dataclasses
import errno
import math
import signal
import sys
from collections.abc import Callable
from typing import Any

from booster_soccer.runtime import out_of_memory

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C
_INT_LIMIT = 2**62  # what arrays and random generators can hold, with room for a sum


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
        message = out_of_memory(error, *args) or ""
        if not message:
            sys.excepthook = sys.__excepthook__  # the platform's SDK has one that shows local variables
            raise
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


# What to do about what a machine refuses, by its number: where the place of a file is the matter, and where not.
_OF_THE_PLACE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space, or name a place to write to"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the place writable, or name another one"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "check the path"),
}
_OF_OTHER_CAUSES = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), or use fewer lanes"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "something is there already: name another place"),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "choose smaller settings, or end other processes"),
    **dict.fromkeys((errno.EPIPE, errno.ECONNRESET), "the other side has ended: start again"),
    errno.EIO: "the disk or volume fails: name another place",
    errno.ESTALE: "the volume was mounted anew: start again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def of_the_machine(error: OSError | MemoryError) -> str:
    """What a machine refuses, and what to do about it."""
    if isinstance(error, MemoryError):
        return out_of_memory(error) or ""
    where = "a file" if error.filename is None else error.filename
    return f"cannot use {where}: {error.strerror or error}; {remedy(error)}"


def remedy(error: OSError, of_the_place: str | None = None) -> str:
    """What to do about an error of the operating system; `of_the_place` knows better where a file cannot be."""
    known = _OF_OTHER_CAUSES | (_OF_THE_PLACE if of_the_place is None else {})
    return known.get(error.errno or 0, of_the_place or "look at the place and its volume")


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
