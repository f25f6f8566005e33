"""One way to tell the user what was wrong, where, and what to do, without a traceback."""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

from booster_soccer.runtime import out_of_memory

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
    """Call `main(*args)`; a `UserError` becomes one line on stderr and exit status 2.

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
        where = f" {error.filename}" if error.filename is not None else ""
        message = f"cannot use{where or ' a file'}: {error.strerror or error}; free space, or name a place to write to"
    except (MemoryError, RuntimeError) as error:  # XLA's and PyTorch's of a GPU are of the latter kind
        message = out_of_memory(error, *args) or ""
        if not message:
            raise
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


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
