"""What long runs share to go on exactly where they were: SIGTERM, random generators, settings, records.

A run that gets SIGTERM saves its state and ends with status 143 (128 + SIGTERM, as shells say it), within ten
seconds. Where a save cannot be done in time (a compiler that does not return, a slow volume), the process
ends without it: the last saved state is whole.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
from errors import UserError

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
        self._interrupts = True
        try:
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


def rng_array(rng: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator, (6,) uint64."""
    state = rng.bit_generator.state
    words = [word >> shift & (2**64 - 1) for word in state["state"].values() for shift in (0, 64)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], np.uint64)


def restore_rng(rng: np.random.Generator, array: np.ndarray) -> None:
    """Bring a generator to the state that `rng_array` gave."""
    state, increment = (int(array[i]) | int(array[i + 1]) << 64 for i in (0, 2))
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": increment | 1},
        "has_uint32": int(array[4] != 0),
        "uinteger": int(array[5]) & (2**32 - 1),
    }


def check_like(arrays: Mapping[str, np.ndarray], template: Mapping[str, np.ndarray], what: str) -> None:
    """Raise `UserError` unless saved arrays have the names, shapes and types of a run of these settings."""
    for name in sorted(arrays.keys() | template.keys()):
        if name not in arrays or name not in template:
            raise UserError(f"{what} lacks or adds {name[:60]!r}: use the code that wrote it")
        saved, ours = arrays[name], np.asarray(template[name])
        if (saved.shape, saved.dtype) != (ours.shape, ours.dtype):
            raise UserError(
                f"{what}: {name[:60]!r} is {saved.dtype}{saved.shape}, not {ours.dtype}{ours.shape}: "
                "use the settings and code that wrote it"
            )


def check_settings(saved: checkpoints.Checkpoint, config: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise `checkpoints.WrongRun` where a saved run's settings differ from `config`, but for those `free`."""
    theirs, ours = saved.manifest["config"], json.loads(json.dumps(config, default=str))
    for name in sorted(ours.keys() - set(free)):
        if theirs.get(name) != ours[name]:
            raise checkpoints.WrongRun(
                f"{saved.path} was run with {name} = {str(theirs.get(name))[:60]}, not {str(ours[name])[:60]}: "
                "give the same settings, or another --out"
            )


def check_parent(saved: checkpoints.Checkpoint, parent: checkpoints.Checkpoint | None) -> None:
    """Raise `checkpoints.WrongRun` where a saved run started from another checkpoint than `parent`."""
    if saved.manifest["parent"] != (parent and {"stage": parent.stage, "hash": parent.hash}):
        raise checkpoints.WrongRun(
            f"{saved.path} is a run that started from {'another' if saved.manifest['parent'] else 'no'} checkpoint: "
            "give the same one, or another --out"
        )


def cut_records(path: Path, steps: int) -> None:
    """Cut from the end of a file of JSON lines what a killed run wrote after the state that is gone on from."""
    with checkpoints.os_errors(f"read {path}", checkpoints.OTHER_PLACE), contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().splitlines(keepends=True)
        keep = len(lines)
        while keep and not _is_at_most(lines[keep - 1], steps):
            keep -= 1
        if keep < len(lines):
            os.truncate(path, sum(map(len, lines[:keep])))


def last_recorded(path: Path, name: str) -> float:
    """The newest number of that name in a file of JSON lines; 0 where there is none."""
    with checkpoints.os_errors(f"read {path}", checkpoints.OTHER_PLACE), contextlib.suppress(FileNotFoundError):
        for line in reversed(path.read_bytes().splitlines()):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get(name), float):
                    return record[name]
    return 0.0


def _is_at_most(line: bytes, steps: int) -> bool:
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by the kill
        return line.endswith(b"\n") and json.loads(line)["step"] <= steps
    return False
