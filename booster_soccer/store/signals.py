"""SIGTERM: a long run saves its state and ends with status 143 (128 + SIGTERM, as shells say it), within ten seconds.

Where a save cannot be done in time (a compiler that does not return, a slow volume), the process ends without it: the
last saved state is whole.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

STOPPED = 128 + signal.SIGTERM  # exit status after SIGTERM
_DEADLINE_S = 9.0


class Stopped(Exception):
    """SIGTERM came where the code waits for long."""


class StopSignal:
    """A context in which SIGTERM sets `received` instead of ending the process, which it does 9 s later.

    Left with `SystemExit(STOPPED)` that deadline stays, for what is closed after it.

    Does nothing outside the main thread, where Python gets no signals.
    """

    def __init__(self):
        self.received = False
        self._interrupts = False
        self._ended = threading.Event()

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # The byte that Python writes for a signal arrives even while XLA compiles; the handler does not.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = signal.signal(signal.SIGTERM, self._receive), signal.set_wakeup_fd(self._write)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        # A stopped run still has to close what it opened: the deadline holds until the process is gone.
        if not (isinstance(error, SystemExit) and error.code == STOPPED):
            self._ended.set()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._before[1])
            signal.signal(signal.SIGTERM, self._before[0])
            os.close(self._write)

    def _receive(self, *_) -> None:
        self.received = True
        if self._interrupts:
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, SIGTERM raises `Stopped`; so does entering after it. What it interrupts is left half done."""
        try:
            self._interrupts = True
            if self.received:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def _watch(self) -> None:
        """In its own thread: end the process if it has not ended by itself in time."""
        while byte := os.read(self._read, 1):
            if byte[0] == signal.SIGTERM:
                self.received = True
                if not self._ended.wait(_DEADLINE_S):
                    print("SIGTERM: out of time; the last saved state is whole", file=sys.stderr, flush=True)
                    os._exit(STOPPED)
        os.close(self._read)
