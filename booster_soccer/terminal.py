"""What a script does before its slow imports: Ctrl-C is one line, and no reader, closed or gone, ends the work."""

import contextlib
import os
import sys
import traceback
from types import TracebackType
from typing import Any, TextIO, cast

from booster_soccer.errors import INTERRUPTED, More, UserError, one_line


def begin(name: str) -> None:
    """Prepare the streams of a script, and one line instead of a traceback for what happens at its imports.

    `name` is its `__name__`: nothing happens where a notebook or a test imports it.
    """
    if name != "__main__":
        return
    for _ in range(3):  # a file opened later must not become one of the three
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
        os.set_inheritable(descriptor, True)
    for name in ("stdout", "stderr"):
        # None: it was closed when Python started.
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, _Lasting(stream)))
    sys.excepthook = _one_line


class _Lasting:
    """A text stream of which the reader may go away, or the disk fill up: that costs output, not work."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """As of any stream."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """What is still to come, of libraries in C and of Python at its exit as well, goes nowhere."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        message, status = "interrupted before it began", INTERRUPTED
    elif isinstance(error, UserError):
        message, status = f"error: {one_line(str(error))}", 2
    elif any(frame.f_globals.get("__name__") == "mujoco" for frame, _ in traceback.walk_tb(trace)):
        where = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}"  # all that can be wrong with it in a whole environment
        message = (
            f"error: cannot load MuJoCo with {where} ({one_line(str(error))[:200]}): unset it, or set it to disable; "
            f"{More.OPENGL}"
        )
        status = 2
    else:
        return sys.__excepthook__(kind, error, trace)
    print(message, file=sys.stderr, flush=True)
    os._exit(status)  # an exception has no status of its own, and nothing is open yet
