"""The life of a long run on disk, one for both learners: start, resume, save, record, end.

    <out>                  the result: there when the run is finished, and only then
    <out>.resume           the newest saved state, which is also a checkpoint of the policy then; the one before it
                           is kept as `<out>.resume.previous`
    <out>.replay           the rows of the replay buffer that these two need
    <out>.metrics.jsonl    the numbers of every log line, judgement and save

A stage (`Stage`) says what it does in one iteration, what its state is, and how its policy is judged; when that is due,
and everything about the files, is said here. A run that was killed and is started again goes on where its newest whole
state was saved. SIGTERM, Ctrl-C and a closed terminal: the state is saved and the process ends (`store/signals.py`).
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from booster_soccer.arrays import check_like, named
from booster_soccer.errors import More, UserError
from booster_soccer.store import checkpoints, manifests
from booster_soccer.store.atomic import OTHER_PLACE, beside, os_errors
from booster_soccer.store.checkpoints import Checkpoint, WrongRun
from booster_soccer.store.manifests import MANIFEST, finite, plain
from booster_soccer.store.places import check_output_dir, delete, places
from booster_soccer.store.replay import REFILL, Replay, Rows, Segments
from booster_soccer.store.signals import Stopped, StopSignal
from booster_soccer.store.watchdog import ITERATION_S, SLOW_S, Watchdog


@dataclass(frozen=True)
class RecordConfig:
    """When a run writes something down; steps are policy actions in one lane."""

    log_every: int = 50_000  # steps
    judge_every: int = 500_000  # steps
    checkpoint_every: int = 200_000  # steps between saved states ...
    checkpoint_interval_s: float = 120.0  # ... and the least time between them
    video_every_s: float = 0.0  # least time between videos of the judged policy, <out>.videos/<steps>.mp4; 0: none
    # Leave the last saved state there at the end: once `out` is moved away, `--resume` goes on with more steps.
    keep_state: bool = False


# Nothing here changes what a run learns, so a continuation may have its own.
_FREE = ("out", "resume", "resume_buffer", "preset", "total_steps", "time_limit_s", *RecordConfig.__dataclass_fields__)


class Candidate(NamedTuple):
    """A policy that was judged."""

    arrays: dict[str, np.ndarray]  # its networks
    steps: int
    scores: np.ndarray  # (tasks, episodes) on the judge's seeds


class State(NamedTuple):
    """All that a stage needs to go on."""

    arrays: dict[str, np.ndarray]  # the networks, as in the stage's checkpoints
    golden_obs: np.ndarray  # (16, 87)
    tables: dict[str, dict[str, np.ndarray]]  # everything else, by name
    replay: Rows | None  # the buffer; None: it is not saved


class Stage(Protocol):
    """What a learner brings to its run."""

    def advance(self) -> int:
        """One iteration; returns the steps it took."""

    def diverged(self) -> bool:
        """Whether something it learned is no longer finite."""

    def log(self, steps_per_s: float) -> dict[str, float]:
        """Print a line about the time since the last one; returns its numbers, recorded as `train/<name>`."""

    def judge(self) -> dict[str, float]:
        """Score the present policy, put it into `Run.kept` if it is the best; returns the numbers."""

    def state(self) -> State:
        """All that `take_up` needs."""

    def take_up(self, saved: Checkpoint, replay: Callable[[Replay], None]) -> None:
        """Go on from a saved state; `replay` fills an empty buffer. `UserError` if it does not fit."""


class Run:
    """Counters, saved states, records and result of one run."""

    def __init__(
        self,
        out: Path,
        stage: str,
        config: Any,
        parents: Sequence[Checkpoint] = (),
        free: Collection[str] = (),
        steps_before: int = 0,
    ):
        """`config` is a dataclass with `seed` and `records`; `free` names more settings that may change.

        `steps_before` are those of the policy that it starts from.
        """
        self.out, self.stage, self.parents = Path(out), stage, list(parents)
        self.seed, self.records, self.settings = config.seed, config.records, asdict(config)
        self.free, self.steps_before = {*_FREE, *free}, steps_before
        self.steps = 0
        self.last = {"log": 0, "judge": 0, "save": 0}  # the steps at which each was done
        self.kept: dict[str, Candidate] = {}  # "best", and what else a stage wants to compare with
        self.diverged_at: int | None = None
        self.watch: Callable[[int], Mapping[str, float]] = lambda step: {}  # numbers of the machine, for the record
        self.resume_path = beside(self.out, "resume")
        self.metrics_path = beside(self.out, "metrics.jsonl")
        remedy = REFILL if "resume_buffer" in self.settings else "start again with another --out"
        self.segments = Segments(beside(self.out, "replay"), f"{remedy}; {More.RUN}")

    # --- start ------------------------------------------------------------------------------------------

    def is_finished(self) -> bool:
        """Whether the result of this very run is there; then what a kill left of its state goes."""
        if not (self.out / MANIFEST).exists():
            return False
        result = checkpoints.load(self.out, (self.stage,))
        self._check_same(result, self.free - {"total_steps"})
        if not flat(result.manifest["config"]).get("records.keep_state"):
            self._delete_state()
        print(f"{self.out} is finished already")
        return True

    def goes_on(self, resume: bool) -> bool:
        """Whether there is a state to go on from; a new run never goes over an old one."""
        check_output_dir(self.out)
        check_output_dir(self.resume_path)
        has_result = (self.out / MANIFEST).exists()
        has_state = any(place.exists() for place in places(self.resume_path))
        if not resume and (has_result or has_state):
            raise UserError(f"{self.out} holds a run: give --resume to go on with it, or another --out; {More.RUN}")
        if not has_state:
            if resume:
                print(f"{self.resume_path} is not there: starting from the beginning", flush=True)
            self.metrics_path.unlink(missing_ok=True)
        return has_state

    def restore(self, stage: Stage) -> None:
        """Go on from the newest state that is whole."""

        def accept(saved: Checkpoint) -> None:
            self._check_same(saved, self.free)
            progress = checkpoints.load_extra(saved, "progress")
            check_like(progress, self._progress(), f"{saved.path}: the saved progress")
            kept = _from_table(checkpoints.load_extra(saved, "kept"), saved.path)

            def fill(replay: Replay) -> None:
                if "replay.safetensors" not in saved.manifest["files"]:
                    raise WrongRun(
                        f"{saved.path} was saved without its replay buffer: give --resume-buffer refill for a new one; "
                        f"{More.RUN}"
                    )
                table = checkpoints.load_extra(saved, "replay")
                self.segments.read(table, replay, int(progress["added"]))

            self.steps, self.kept = int(progress["steps"]), kept
            stage.take_up(saved, fill)
            self.last = {name: int(progress[f"last_{name}"]) for name in self.last}

        checkpoints.load_latest(self.resume_path, (self.stage,), accept=accept)
        _cut_records(self.metrics_path, self.steps)

    def _check_same(self, saved: Checkpoint, free: Collection[str]) -> None:
        """Raise `WrongRun` where a run on disk has other parents or other settings than this one."""
        parents = [parent["hash"] for parent in saved.manifest["parents"]]
        if parents != list(dict.fromkeys(parent.hash for parent in self.parents)):
            raise WrongRun(
                f"{saved.path} is a run that started from {'other' if parents else 'no'} checkpoints: "
                f"give the same ones, or another --out; {More.RUN}"
            )
        theirs, ours = flat(saved.manifest["config"]), flat(plain(self.settings))
        for name in sorted(ours):
            if name.split(".")[-1] not in free and theirs.get(name) != ours[name]:
                raise WrongRun(
                    f"{saved.path} was run with {name} = {str(theirs.get(name))[:60]}, not {str(ours[name])[:60]}: "
                    f"give the same settings, or another --out; {More.RUN}"
                )

    # --- the loop ---------------------------------------------------------------------------------------

    def train(self, stage: Stage, total_steps: int, stop: StopSignal, time_limit_s: float = 0.0) -> None:
        """To the last step, the time limit (0: none), or until it diverges.

        On a signal the state is saved, then `SystemExit` raised.
        """
        started = last_save_s = time.monotonic()
        first_step, before_s = self.steps, _last_recorded(self.metrics_path, "wall_s")
        bar = tqdm(total=total_steps, initial=first_step, unit="step", unit_scale=True, mininterval=5,
                   disable=not sys.stderr.isatty())  # fmt: skip
        with bar, Watchdog() as watchdog:
            while True:
                # First what is due at this step, so that a run which goes on finds it due as well.
                elapsed_s = time.monotonic() - started
                # Of all the run's processes; at least one step, so that there is something to judge.
                out_of_time = 0 < time_limit_s <= before_s + elapsed_s and self.steps > 0
                finished = self.steps >= total_steps or out_of_time
                log_due = self._due("log", self.records.log_every, finished)
                judge_due = self._due("judge", self.records.judge_every, finished)
                in_time = time.monotonic() - last_save_s >= self.records.checkpoint_interval_s
                save_due = self._due("save", self.records.checkpoint_every, finished) and (in_time or finished)
                watchdog.expect(f"what is due at step {self.steps:,}", SLOW_S)
                if (log_due or judge_due or save_due or stop.received) and stage.diverged():
                    self._note_divergence()
                    return
                if log_due:
                    self.last["log"] = self.steps
                    numbers = stage.log((self.steps - first_step) / max(elapsed_s, 1e-9))
                    self.record({"wall_s": before_s + elapsed_s} | of_training(numbers))
                if judge_due:
                    self.judge(stage, stop, before_s + elapsed_s)
                    # Stopped in its last judgement, it had saved that step without it.
                    save_due |= finished and self.records.keep_state
                if save_due or stop.received:
                    self.save(stage)
                    last_save_s = time.monotonic()
                if stop.received:
                    tqdm.write(f"{stop.name}: the state of step {self.steps:,} is saved, --resume goes on from it")
                    raise SystemExit(stop.status)
                if finished:
                    return
                limit_s = SLOW_S if self.steps == first_step else ITERATION_S  # at first programs are compiled
                watchdog.expect(f"the iteration after step {self.steps:,}", limit_s)
                steps = stage.advance()
                self.steps += steps
                bar.update(steps)
                if watched := self.watch(self.steps):
                    self.record(watched)

    def _due(self, what: str, every: int, finished: bool) -> bool:
        """Whether a multiple of `every` steps was passed since it was done last, or the end is reached."""
        last = self.last[what]
        return self.steps > last and (finished or self.steps // every > last // every)

    def judge(self, stage: Stage, stop: StopSignal, wall_s: float) -> None:
        """Let the stage judge its policy; if a signal comes meanwhile, it stays due."""
        with contextlib.suppress(Stopped):
            with stop.interrupting():
                numbers = stage.judge()
            self.last["judge"] = self.steps
            self.record({"wall_s": wall_s} | numbers)
        sys.stdout.flush()

    def _note_divergence(self) -> None:
        """A diverged run ends; what was the best before is its result, if there is one."""
        self.diverged_at = self.steps
        if not self.kept:
            raise UserError(
                f"training diverged before step {self.steps:,}, before any policy was judged: use another --seed or a "
                f"lower learning rate; a saved state is older and good; {More.DIVERGENCE}"
            )
        message = f"warning: training diverged before step {self.steps:,}: only what was best before counts"
        print(f"{message}; {More.DIVERGENCE}", file=sys.stderr, flush=True)

    # --- what is written --------------------------------------------------------------------------------

    def record(self, numbers: Mapping[str, float]) -> None:
        """Append one line of numbers to `<out>.metrics.jsonl`."""
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": self.steps} | {name: round(float(value), 6) for name, value in numbers.items()}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")

    def save(self, stage: Stage) -> None:
        """Write the state; the one before stays as it is until this one is whole, and as the previous one after."""
        started, state = time.monotonic(), stage.state()
        self.last["save"] = self.steps
        extra = state.tables | {"kept": _as_table(self.kept)}
        tables = []
        if state.replay is not None:
            tables.append(self.segments.write(state.replay))
            extra["replay"] = tables[0]
        extra["progress"] = self._progress(0 if state.replay is None else state.replay.added)
        self._write(self.resume_path, self.steps, state.arrays, state.golden_obs, {}, extra, overwrite=True)
        with contextlib.suppress(UserError):  # there is none before, or none that can be read
            previous = checkpoints.load(places(self.resume_path)[1], (self.stage,), verify=False)
            tables.append(checkpoints.load_extra(previous, "replay"))
        self.segments.delete_all_but(*tables)
        self.record(of_training({"checkpoint_s": time.monotonic() - started}))

    def finish(self, result: Candidate, golden_obs: np.ndarray, metrics: Mapping[str, Any]) -> Path:
        """Write the result; the state and its buffer are no longer needed."""
        if self.diverged_at is not None:
            metrics = dict(metrics) | {"diverged_before_step": self.diverged_at}
        self._write(self.out, result.steps, result.arrays, golden_obs, metrics, {}, overwrite=False)
        if not self.records.keep_state:
            self._delete_state()
        print(self.out)
        return self.out

    def _write(self, path: Path, steps: int, arrays, golden_obs, metrics, extra, overwrite: bool) -> None:
        checkpoints.save(path, self.stage, arrays, golden_obs, self.settings, self.seed, self.steps_before + steps,
                         self.parents, metrics, extra, overwrite)  # fmt: skip

    def _delete_state(self) -> None:
        delete(self.resume_path)
        self.segments.delete_all_but()

    def _progress(self, added: int = 0) -> dict[str, np.ndarray]:
        last = {f"last_{name}": np.array(value) for name, value in self.last.items()}
        return last | {"steps": np.array(self.steps), "added": np.array(added)}


# --- candidates as arrays ---------------------------------------------------------------------------------


def _as_table(kept: Mapping[str, Candidate]) -> dict[str, np.ndarray]:
    table: dict[str, np.ndarray] = {}
    for name, candidate in kept.items():
        table |= {f"{name}.steps": np.array(candidate.steps), f"{name}.scores": candidate.scores}
        table |= {f"{name}.arrays.{path}": value for path, value in candidate.arrays.items()}
    return table


def _from_table(table: Mapping[str, np.ndarray], path: Path) -> dict[str, Candidate]:
    kept = {}
    for name in {key.partition(".")[0] for key in table}:
        own = named(table, f"{name}.")
        if not {"steps", "scores"} <= own.keys() or own["steps"].shape or own["scores"].ndim != 2:
            raise UserError(
                f"{path}: its judged policies are another code's: use the code that wrote it; {More.CHECKPOINT}"
            )
        kept[name] = Candidate(named(own, "arrays."), int(own["steps"]), own["scores"])
    return kept


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    by_name: dict[str, Any] = {}
    for name, value in settings.items():
        by_name |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return by_name


def recorded(out: Path, name: str) -> Any:
    """A setting, by dotted name, of the run at `out`: of its result, or its newest readable state; None without."""
    for place in (out, *places(beside(out, "resume"))):
        with contextlib.suppress(UserError):
            return flat(manifests.read(place)[0]["config"]).get(name)
    return None


# --- records ------------------------------------------------------------------------------------------------


def of_training(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers of the learner by the names of docs/metrics.md."""
    return {f"train/{name}": value for name, value in numbers.items()}


def _cut_records(path: Path, steps: int) -> None:
    """Cut from the end of a file of JSON lines what a killed run wrote after the state that is gone on from."""
    with os_errors(f"read {path}", OTHER_PLACE), contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().splitlines(keepends=True)
        keep = len(lines)
        while keep and not _is_at_most(lines[keep - 1], steps):
            keep -= 1
        if keep < len(lines):
            os.truncate(path, sum(map(len, lines[:keep])))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file, without those that are cut; none where there is no such file."""
    records = []
    with os_errors(f"read {path}", OTHER_PLACE), contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def _last_recorded(path: Path, name: str) -> float:
    """The newest number of that name in a run's metrics file; 0 where there is none."""
    numbers = [record[name] for record in read_records(path) if isinstance(record.get(name), float)]
    return numbers[-1] if numbers else 0.0


def _is_at_most(line: bytes, steps: int) -> bool:
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by the kill
        return line.endswith(b"\n") and json.loads(line)["step"] <= steps
    return False
