"""A run that does nothing ends by itself, so that a cloud job tries again instead of paying for nothing.

An iteration has five minutes. What takes longer by nature has half an hour: the first iteration, in which programs are
compiled, a judgement, a save. What plays or compiles much more has two hours: the timing of both engines, the critics'
warm-up, the comparison at the end. After that the stacks of all threads and one line go to standard error, and the
process ends at once with status 75 (`EX_TEMPFAIL`: try again). The last saved state is whole.
"""

import faulthandler
import os
import sys
import threading

from booster_soccer.errors import More

STALLED = os.EX_TEMPFAIL
ITERATION_S = 300.0
SLOW_S = 1800.0
LONG_S = 7200.0
_TICK_S = 1.0


class Watchdog:
    """A context in which whatever was announced last must end within its limit."""

    def __init__(self, what: str = "the start", limit_s: float = SLOW_S):
        self.expect(what, limit_s)
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._count, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def expect(self, what: str, limit_s: float) -> None:
        """What comes now, and how long it may take."""
        self._what, self._left_s = f"{what} did not end within {limit_s:g} s", limit_s

    def _count(self) -> None:
        """In its own thread. Counts its own ticks, not the clock: a process that was stopped meanwhile did not hang."""
        while not self._ended.wait(_TICK_S):
            self._left_s -= _TICK_S
            if self._left_s <= 0:
                faulthandler.dump_traceback(2, all_threads=True)  # standard error: a notebook's stream has no file
                line = f"error: {self._what}: the stacks are above, --resume goes on from the last saved state"
                print(f"{line}; {More.WATCHDOG}", file=sys.stderr, flush=True)
                os._exit(STALLED)
