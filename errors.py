"""One way to tell the user what was wrong, where, and what to do, without a traceback."""

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Bad input or a machine that lacks something: the message is one line and names the remedy."""


def run(main: Callable[..., Any], *args: Any) -> Any:
    """Call `main(*args)`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        return main(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
