"""SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP): a long run saves its state and ends.

The status is 128 and the signal's number, as shells say it. SIGTERM and SIGHUP come from a machine that waits for ten
seconds: where a save cannot be done in time (a compiler that does not return, a slow volume), the process ends without
it, and the last saved state is whole. Ctrl-C waits for the save; a second one ends the process at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from booster_soccer.errors import UserError

STOPPED = 128 + signal.SIGTERM  # exit status after SIGTERM
_DEADLINE_S = 9.0
_PATIENCE_OF_LAUNCHER_S = _DEADLINE_S + 0.5
_PATIENCE_S = 1.0  # after Ctrl-C, before somebody is told why nothing seems to happen
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAUNCHER = "BOOSTER_SOCCER_LAUNCHER"  # the process that a stage ends with
_PR_SET_PDEATHSIG = 1


def is_stop_status(status: object) -> bool:
    """Whether a process that ends with it was stopped by one of the signals."""
    return status in [128 + number for number in _SIGNALS]


class Stopped(Exception):
    """A signal came where the code waits for long."""


class StopSignal:
    """A context in which the signals set `received` instead of ending the process; SIGTERM and SIGHUP end it 9 s later.

    Left with `SystemExit(status)` that deadline stays, for what is closed after it. A signal that was ignored
    before, as `nohup` and the shell's `&` have it, stays so.

    Does nothing outside the main thread, where Python gets no signals.
    """

    def __init__(self):
        self.received: signal.Signals | None = None  # the first one
        self._interrupts = False
        self._ctrl_c = 0
        self._ended = threading.Event()

    @property
    def status(self) -> int:
        """Exit status after the signal."""
        return 128 + (self.received or 0)

    @property
    def name(self) -> str:
        """What it is called."""
        return "" if self.received is None else self.received.name

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # The byte that Python writes for a signal arrives even while XLA compiles; the handler does not.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heard}
            self._fd_before = signal.set_wakeup_fd(self._write)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        # A stopped run still has to close what it opened: the deadline holds until the process is gone.
        if not (isinstance(error, SystemExit) and self.received and error.code == self.status):
            self._ended.set()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write)

    def _receive(self, number: int, _) -> None:
        self.received = self.received or signal.Signals(number)
        self._ctrl_c += number == signal.SIGINT
        if self._ctrl_c > 1 and hasattr(sys, "ps1"):  # in a notebook; of a script `_watch` makes an end
            raise KeyboardInterrupt
        if self._interrupts:
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a signal raises `Stopped`; so does entering after it. What it interrupts is left half done."""
        try:
            self._interrupts = True
            if self.received:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def _watch(self) -> None:
        """In its own thread: end the process if it has not ended by itself in time, or is told twice."""
        told = 0
        while byte := os.read(self._read, 1):
            if byte[0] not in self._before:
                continue
            self.received = self.received or signal.Signals(byte[0])
            if byte[0] != signal.SIGINT:
                threading.Thread(target=self._end_late, args=(signal.Signals(byte[0]),), daemon=True).start()
            elif told == 0:
                told = 1
                threading.Thread(target=self._say_what_it_waits_for, daemon=True).start()
            elif not hasattr(sys, "ps1"):  # a notebook's process is not ours to end
                _end(signal.SIGINT, "again, so nothing more is saved")
        os.close(self._read)

    def _end_late(self, number: signal.Signals) -> None:
        if not self._ended.wait(_DEADLINE_S):
            _end(number, "out of time")

    def _say_what_it_waits_for(self) -> None:
        if not self._ended.wait(_PATIENCE_S):
            print("SIGINT: finishing this iteration and saving; Ctrl-C again ends at once", file=sys.stderr, flush=True)


def _end(number: signal.Signals, why: str) -> None:
    print(f"{number.name}: {why}; the last saved state is whole", file=sys.stderr, flush=True)
    os._exit(128 + number)


# --- a process and its launcher ---------------------------------------------------------------------------


def end(process: subprocess.Popen) -> None:
    """Pass SIGTERM on, and wait until the process has saved and ended; SIGKILL if it does not."""
    process.terminate()
    try:
        process.wait(_PATIENCE_OF_LAUNCHER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def as_launcher() -> dict[str, str]:
    """The environment of a process that calls `end_with_launcher`."""
    return os.environ | {_LAUNCHER: str(os.getpid())}


def end_with_launcher() -> None:
    """Have this process sent SIGTERM when its launcher ends, killed or not; only Linux can."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if str(os.getppid()) != launcher:
        raise UserError("the process that started this one has ended: start the same command again")
