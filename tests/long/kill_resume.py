"""Kill the long stages with SIGKILL at random instants, resume them, and compare with a run never killed.

    python -m tests.long.kill_resume --trials 50
    python -m tests.long.kill_resume --trials 2 --stages pretrain
    python -m tests.long.kill_resume --trials 20 --stages toy

Each trial is one run, killed once and started again with the same command. A third of the kills wait until
something of a saved state is just being written; one in ten may come before the first one is there. Before that the
first trial gets SIGTERM, and must end within 10 s, and every second one Ctrl-C. The run never killed and every trial
must end with the same bits: result, policy, learner, lanes, random generators and counters. The runs are small, but
wrap their buffer, randomise, save often, judge on the way, and in fine-tuning thaw layers inside the killed span.
Nobody may edit the code meanwhile. Exit status 1 if one trial differs.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from booster_soccer import errors
from booster_soccer.envs import constants as c
from booster_soccer.errors import INTERRUPTED
from booster_soccer.store import checkpoints
from booster_soccer.store.atomic import beside
from booster_soccer.store.manifests import MANIFEST
from booster_soccer.store.signals import STOPPED

ROOT = Path(__file__).parents[2]
_POLL_S = 0.005
_LIMIT_S = 1800.0  # no run takes so long, on the slowest machine
_SIGTERM_LIMIT_S = 10.0
_STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}  # that it ends with

# The commands of every drill: small enough for seconds, and with everything in it that a state must hold.
_PRETRAIN = """train_mjx_sac.py --total-steps 960 --batch-size 32 --updates-per-iteration 2 --buffer-size 300
    --learning-starts 80 --dr-level 1 --ramp-steps 200 600 --max-actions 40 --judge-episodes 2
    --judge-every 480 --log-every 200 --checkpoint-interval-s 0 --keep-state"""
_FINETUNE = f"""finetune_ddpg.py --num-lanes {3 * c.NUM_TASKS} --total-steps 1440 --round-actions 20 --warmup-rounds 1
    --freeze-hidden-until 160 --freeze-input-until 320 --batch-size 32
    --validation-episodes 2 --confirmation-episodes 2 --judge-every 720 --log-every 360 --device cpu
    --checkpoint-every 90 --checkpoint-interval-s 0 --keep-state"""
STAGES = {
    "pretrain": f"{_PRETRAIN} --engine native --num-envs 8 --checkpoint-every 40".split(),
    # The other engine, of which one call is 20 actions of every lane; it compiles for minutes.
    "mjx": f"{_PRETRAIN} --engine mjx --num-envs 4 --checkpoint-every 80 --resume-buffer saved".split(),
    "finetune": f"{_FINETUNE} --preset scratch".split(),
    # A toy for a learner (`tests/toy_stage.py`): the life of a run alone, in seconds.
    "toy": ["-m", "tests.toy_stage", "--total-steps", "400", "--step-s", "0.03", "--keep-state"],
}


@dataclass(frozen=True)
class Config:
    """What is tried."""

    trials: int = 50  # of each stage
    stages: tuple[Literal["pretrain", "mjx", "finetune", "toy"], ...] = ("pretrain", "finetune")
    keep: Path | None = None  # new directory for the runs that fail; None: a temporary one, deleted afterwards


@dataclass(frozen=True)
class Run:
    """One run of a stage: `start` begins it, or goes on from its saved state."""

    stage: str
    out: Path
    place: Path  # of its log, and of the compiled code that all runs share

    @property
    def state(self) -> Path:
        """The directory it goes on from."""
        return beside(self.out, "resume")

    @property
    def log(self) -> Path:
        """What it printed, each time it was started."""
        return self.place / f"{self.out.name}.log"

    def start(self) -> subprocess.Popen:
        """Start it in a process group of its own."""
        # Compiled code is kept between the processes: the same code, and a resumed run starts in seconds.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.place.resolve() / "compiled"), "BOOSTER_TRACK": "none",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        command = [sys.executable, *STAGES[self.stage], "--out", str(self.out.resolve()), "--resume"]
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def saved(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.state / MANIFEST).exists()

    def writing(self) -> bool:
        """Whether a saved state, or the policy, is being written or moved right now."""
        moved = not self.saved() and beside(self.state, "previous").exists()
        return moved or any(beside(path, "writing").exists() for path in (self.state, self.out))

    def wait(self, process: subprocess.Popen, until: Callable[[], bool]) -> bool:
        """Wait until something is so; False if the run ended before, `UserError` if with an error."""
        limit = time.monotonic() + _LIMIT_S
        while process.poll() is None:
            if until():
                return True
            if time.monotonic() > limit:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        if process.returncode:
            raise errors.UserError(f"a run ended with status {process.returncode}: see {self.log}")
        return False

    def finish(self) -> tuple[float, float]:
        """Run to the end; returns the seconds to the first saved state, and from there to the end."""
        process, started = self.start(), time.monotonic()
        self.wait(process, self.saved)
        first_saved = time.monotonic()
        self.wait(process, lambda: False)
        return first_saved - started, time.monotonic() - first_saved

    def interrupt(self, how: signal.Signals, delay_s: float, write_s: float | None = None) -> str:
        """Start it and send a signal `delay_s` after it is under way, or if negative after its start.

        With `write_s` the signal then waits until that long after a state began to be written. Returns what was
        done, nothing if the run ended before; `UserError` if it ends otherwise than it should, or too late.
        """
        process, said = self.start(), self.log.stat().st_size
        # A resumed run is under way when it says so, a new one when it has saved a state.
        if delay_s >= 0 and not self.wait(process, lambda: self.saved() and self.log.stat().st_size > said):
            return ""
        due = time.monotonic() + abs(delay_s)
        if not self.wait(process, lambda: time.monotonic() >= due and (write_s is None or self.writing())):
            return ""
        time.sleep(write_s or 0.0)
        doing, sent = "while writing" if self.writing() else "while running", time.monotonic()
        if how == signal.SIGKILL:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        status, took_s = process.wait(), time.monotonic() - sent
        if status not in (0, _STATUS[how]) or (how == signal.SIGTERM and took_s > _SIGTERM_LIMIT_S):
            raise errors.UserError(f"{how.name}: ended after {took_s:.1f} s with status {status}: see {self.log}")
        return f"{how.name} at {delay_s:+.1f} s {doing}, ended after {took_s:.1f} s" if status else ""

    def remove(self) -> None:
        """Delete it and what lies beside it."""
        for path in (self.out, *self.out.parent.glob(f"{self.out.name}.*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def bits(path: Path) -> dict[str, tuple]:
    """All arrays of a checkpoint to the bit, by file and name."""
    saved = checkpoints.load(path)
    names = {name.removesuffix(".safetensors") for name in saved.manifest["files"]}
    return {f"{path.suffix or 'result'} {table} {name}": (value.shape, value.dtype, value.tobytes())
            for table in sorted(names - {"replay"})  # where a segment ends depends on the kills
            for name, value in checkpoints.load_extra(saved, table).items()}  # fmt: skip


def differences(a: Run, b: Run) -> list[str]:
    """Names of the arrays in result and last state that are not the same to the bit in two runs."""
    x, y = (bits(run.out) | bits(run.state) for run in (a, b))
    return sorted(name for name in x.keys() | y.keys() if x.get(name) != y.get(name))


def interrupt(run: Run, rng: random.Random, first_s: float, span_s: float, before: list[signal.Signals]) -> str:
    """Start a run and kill it, after the signals that it gets `before`; returns what was done.

    Seconds: to a run's first state, and from there to its end.
    """
    while True:
        done = [run.interrupt(how, rng.uniform(0, span_s / 2)) for how in before]
        if all(done):
            delay_s = -rng.uniform(0, first_s) if rng.random() < 0.1 else rng.uniform(0, span_s)
            write_s = rng.uniform(0, 0.03) if delay_s > 0 and rng.random() < 1 / 3 else None
            done.append(run.interrupt(signal.SIGKILL, delay_s, write_s))
        if all(done):
            return "; ".join(done)
        run.remove()  # it ended before, so this was no kill: the trial starts over, and sooner
        span_s *= 0.8


def try_stage(stage: str, trials: int, place: Path) -> int:
    """All trials of one stage; returns how many ended with the very bits. One that cannot go on counts as failed."""
    rng = random.Random(stage)
    reference, again = (Run(stage, place / f"{stage}-{name}", place) for name in ("never-killed", "again"))
    times_s = reference.finish()
    if trials > 1:  # the first run compiled, this one shows how long they take
        times_s = again.finish()
        if unequal := differences(reference, again):
            raise errors.UserError(f"{stage}: two runs never killed differ in {len(unequal)} arrays: {unequal[0]}")
    print(f"{stage}: {times_s[0]:.1f} s to the first state and {times_s[1]:.1f} s more without a kill", flush=True)
    good = 0
    for trial in range(trials):
        run, done = Run(stage, place / f"{stage}-{trial}", place), ""
        try:
            before = [signal.SIGTERM] * (trial == 0) + [signal.SIGINT] * (trial % 2 == 1)
            done = interrupt(run, rng, *times_s, before)
            run.finish()
            unequal = differences(reference, run)
            verdict = f"{len(unequal)} arrays differ, such as {unequal[0]}" if unequal else "identical"
        except errors.UserError as error:
            verdict = f"FAILED: {error}"
        print(f"{stage} {trial + 1}/{trials}: {done}: {verdict}", flush=True)
        if verdict == "identical":
            good += 1
            run.remove()
    return good


def main(config: Config) -> bool:
    """Try every stage; returns whether all trials ended with the very bits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` lets it be ignored, by its children too
    with tempfile.TemporaryDirectory() as temporary:
        place = config.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise errors.UserError(f"{place} is not empty: give a new directory")
        good = {stage: try_stage(stage, config.trials, place) for stage in config.stages}
    for stage, count in good.items():
        print(f"{stage}: {count} of {config.trials} ended with the very bits of the run never killed")
    return all(count == config.trials for count in good.values())


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config, description=__doc__)) else 1)
