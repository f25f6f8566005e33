"""Recording a run: the one interface that the stages call. `--track wandb mlflow | none` says who else gets to know.

A stage writes its numbers into `<out>.metrics.jsonl` (`store/run.py`), whether anyone else wants them or not. Each
tracker is a process of its own (`worker.py`) that reads this file as it grows and hands the numbers on: a tracker that
is slow, refused, broken or dead neither stops nor changes a training, and what it could not take is still in the file.

    <out>.tracking/run.json        the key that joins all attempts of this run, their number, whether one ended
    <out>.tracking/wandb.json      what has arrived there, by name of metric; a later attempt goes on behind it
    <out>.tracking/mlflow.json
    <out>.tracking/*.log           what the trackers' libraries print
    <out>.tracking/wandb/          W&B's own files

The names of metrics: docs/metrics.md.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from booster_soccer.errors import UserError, one_line
from booster_soccer.store.atomic import beside
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.manifests import code, plain
from booster_soccer.store.signals import Stopped, is_stop_status
from booster_soccer.tracking import runs_table
from booster_soccer.tracking.gpu_monitor import GpuMonitor
from booster_soccer.tracking.writer import END

Tracker = Literal["wandb", "mlflow", "none"]
VARIABLE = "BOOSTER_TRACK"  # changes the default of --track, for a machine where the trackers are never wanted
PARENT_VARIABLE = "BOOSTER_PARENT_RUN"  # the place of the run that a stage is a part of: the chain's
_ROOT = Path(__file__).resolve().parents[2]
_ABOUT = "run.json"
_PATIENCE_S = 120.0  # for trackers at the end of a stage; those that know that they are broken end at once
_PATIENCE_STOPPED_S = 2.0  # after SIGTERM, with ten seconds for everything


def _default() -> tuple[Any, ...]:
    return tuple(os.environ.get(VARIABLE, "wandb mlflow").split())


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Who gets to know a run's numbers besides its metrics file."""

    # Any of wandb and mlflow, or none. Both work with files alone where there is no server. Default: BOOSTER_TRACK.
    track: tuple[Tracker, ...] = dataclasses.field(default_factory=_default)

    def chosen(self) -> tuple[Tracker, ...]:
        """The trackers, each once; `UserError` for an unknown one, or none together with others."""
        if set(self.track) - set(get_args(Tracker)) or (len(self.track) > 1 and "none" in self.track):
            raise UserError(f"--track {' '.join(self.track)}: give wandb, mlflow, both, or none alone")
        return tuple(dict.fromkeys(tracker for tracker in self.track if tracker != "none"))


@dataclasses.dataclass
class Result:
    """What a finished stage leaves, for trackers and the table of runs."""

    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by the names of docs/metrics.md
    files: Sequence[Path] = ()  # directories and files to keep: checkpoint, submission, report, video
    checkpoint: Checkpoint | None = None  # the stage's result; the models of both learners are registered
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more columns of the table of runs
    status: str = "finished"  # or failed: a gate
    claim: tuple[Path, Path, Path] | None = None  # to be the Champion: see `registry.Claim`


def score_columns(means: Mapping[str, float], backend: str, episodes: int, start_noise_rad: float) -> dict[str, Any]:
    """Columns of the table of runs for official scores, given the mean of each task."""
    scores = {f"score_{task}": float(mean) for task, mean in means.items()}
    played = {"backend": backend, "episodes": episodes, "start_noise_rad": start_noise_rad}
    return {"score": sum(scores.values()) / len(scores)} | scores | played


def has_claimed(place: Path | None) -> bool:
    """Whether a tracked run with this output ended after a claim to be the Champion, whatever came of it."""
    if place is not None:
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads((beside(place, "tracking") / _ABOUT).read_text()).get("claimed"))
    return False


class Recorder:
    """A context around one run of a stage; nothing in it raises because of a tracker.

    Left with an exception, the run is marked: SIGTERM and Ctrl-C as stopped, all else as failed.
    """

    def __init__(
        self,
        place: Path | None,
        stage: str,
        config: Any,
        parents: Sequence[Checkpoint] = (),
        resumed: bool = False,
        watch_gpu: bool = False,
        is_parent: bool = False,
    ):
        """`place` is the stage's output, `config` its dataclass with `tracking`; `resumed`: an attempt was before.

        `is_parent`: processes started meanwhile are parts of this run.
        """
        self.trackers = config.tracking.chosen()
        self.stage, self.config, self.parents, self.resumed = stage, config, list(parents), resumed
        self._key = secrets.token_hex(4)
        self.out = Path(place) if place is not None else Path("runs") / "tracking" / f"{stage}-{self._key}"
        self.place = beside(self.out, "tracking")
        self.attempt = 1
        self._workers: dict[str, subprocess.Popen] = {}
        self._monitor = GpuMonitor(self.alarm) if watch_gpu else None
        self._is_parent = is_parent
        self._result: Result | None = None
        self._about: dict[str, Any] = {}  # this run and its attempts, as its file has it

    # --- the interface --------------------------------------------------------------------------------------

    def __enter__(self) -> "Recorder":
        self._started = time.monotonic()
        if self._monitor is not None:
            self._monitor.start()
        if self.trackers:
            try:
                self._take_place()
                for tracker in self.trackers:
                    self._workers[tracker] = self._start(tracker)
                if self._is_parent:
                    os.environ[PARENT_VARIABLE] = str(self.place.resolve())
            except OSError as error:
                _warn(f"cannot use {self.place} ({error.strerror or error}): this run is not tracked")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if self._monitor is not None:
            self._monitor.stop()
        if self._is_parent:
            os.environ.pop(PARENT_VARIABLE, None)
        by_signal = isinstance(error, SystemExit) and is_stop_status(error.code)
        is_stopped = by_signal or kind in (KeyboardInterrupt, Stopped)
        status = "stopped" if is_stopped else "failed"
        if self._result is not None and kind is None:
            status = self._result.status
        result = self._result or Result()
        scores = {f"result/{name}": value for name, value in result.row.items() if name.startswith("score")}
        result = dataclasses.replace(result, numbers={**result.numbers, **scores})
        if self._workers and status != "stopped" and not self._about.get("ended"):
            self._append_row(status, result)
        self._finish(status, result)
        if self._workers and status == "finished":
            with contextlib.suppress(OSError):
                self._write_about(ended=True, claimed=result.claim is not None)

    def at(self, step: int) -> Mapping[str, float]:
        """Numbers of the machine to record at this step, often none; called in every iteration."""
        return {} if self._monitor is None else self._monitor.at(step)

    def alarm(self, text: str) -> None:
        """A warning that must not wait: on the screen, and through the trackers."""
        _warn(text)
        self._send({"what": "alarm", "text": text})

    def artifact(self, path: Path) -> None:
        """A file or directory to keep while the run goes on, such as a video."""
        self._send({"what": "artifact", "path": str(path.resolve())})

    def result(self, result: Result) -> None:
        """What the stage leaves; it has come to its end."""
        self._result = result

    # --- the trackers' processes ----------------------------------------------------------------------------

    def _take_place(self) -> None:
        """A new run forgets one that was here; another attempt of the same run keeps its key."""
        file, run = self.place / _ABOUT, {}
        if self.resumed:
            with contextlib.suppress(FileNotFoundError, ValueError):
                run = json.loads(file.read_text())
        if not run:
            for tracker in self.trackers:
                (self.place / f"{tracker}.json").unlink(missing_ok=True)
        self._key = run.get("key", self._key)
        self.attempt = int(run.get("attempt", 0)) + 1
        self.place.mkdir(parents=True, exist_ok=True)
        self._about = run | {"key": self._key, "attempt": self.attempt, "stage": self.stage}
        self._write_about()

    def _write_about(self, **end: bool) -> None:
        (self.place / _ABOUT).write_text(json.dumps(self._about | end))

    def _start(self, tracker: str) -> subprocess.Popen:
        command = [sys.executable, "-P", "-m", "booster_soccer.tracking.worker", tracker, str(self.place.resolve())]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # A session of its own: what ends this process (Ctrl-C, a killed group) leaves it time to say so.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   env=os.environ | {"PYTHONPATH": path}, start_new_session=True)  # fmt: skip
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # a tracker that hangs must not make a training hang
        self._send(self._introduction(), process)
        return process

    def _introduction(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "key": self._key,
            "attempt": self.attempt,
            "parent": os.environ.get(PARENT_VARIABLE),
            "metrics": str(beside(self.out, "metrics.jsonl").resolve()),
            "config": plain(dataclasses.asdict(self.config)),
            "parents": [parent.hash for parent in self.parents],
            "commit": code()["commit"],
        }

    def _send(self, message: Mapping[str, Any], process: subprocess.Popen | None = None) -> None:
        """To one worker, or to all; what does not fit into a pipe that nobody reads is dropped."""
        line = (json.dumps(message) + "\n").encode()
        for worker in [process] if process is not None else self._workers.values():
            assert worker.stdin is not None
            with contextlib.suppress(OSError, ValueError):  # it is gone; its pipe is full
                os.write(worker.stdin.fileno(), line)

    def _finish(self, status: str, result: Result) -> None:
        """Tell the workers, and wait for them, but not for ever."""
        checkpoint = result.checkpoint
        self._send(
            END
            | {
                "status": status,
                "numbers": plain(dict(result.numbers)),
                "files": [str(file.resolve()) for file in result.files],
                "checkpoint": None if checkpoint is None else str(checkpoint.path.resolve()),
                "hash": None if checkpoint is None else checkpoint.hash,
                "claim": None if result.claim is None else [str(path.resolve()) for path in result.claim],
            }
        )
        stopped = status == "stopped"
        until = time.monotonic() + (_PATIENCE_STOPPED_S if stopped else _PATIENCE_S)
        for worker in self._workers.values():
            with contextlib.suppress(OSError):
                assert worker.stdin is not None
                worker.stdin.close()
        for tracker, worker in self._workers.items():
            try:
                worker.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                if not stopped:  # a stopped run's worker sends on, and ends by itself
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(worker.pid, signal.SIGKILL)
                    worker.wait()
                    _warn(f"{tracker} took more than {_PATIENCE_S:.0f} s to end, see {self.place / tracker}.log")

    def _append_row(self, status: str, result: Result) -> None:
        """One row of the table of runs."""
        config = plain(dataclasses.asdict(self.config))
        checkpoint = result.checkpoint
        row = {
            "time_utc": datetime.now(UTC),
            "run": self._key,
            "stage": self.stage,
            "status": status,
            "preset": config.get("preset"),
            "seed": config.get("seed"),
            "steps": None if checkpoint is None else checkpoint.manifest["steps"],
            "seconds": time.monotonic() - self._started,
            "out": str(self.out),
            "checkpoint": None if checkpoint is None else checkpoint.hash,
            "parents": [parent.hash for parent in self.parents],
            "commit": code()["commit"],
            "settings": json.dumps(config),
            "metrics": json.dumps(plain(dict(result.numbers))),
        }
        try:
            runs_table.append(row | dict(result.row))
        # Spark, Delta or the disk: whatever it is, the stage is done and its result is on disk.
        except Exception as error:
            _warn(f"the table of runs {runs_table.where()} did not take a row: {one_line(str(error))[:300]}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
