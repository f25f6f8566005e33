"""Kill the long stages with SIGKILL at random instants, resume them, and compare with a run never killed.

    python benchmarks/kill_resume.py --trials 50
    python benchmarks/kill_resume.py --trials 2 --stages pretrain

Each trial is one run, killed `kills` times and started again with the same command. A third of the kills wait
until something of a saved state is just being written; one in ten may come before the first one is there. The
first trial gets SIGTERM as well, and must end within 10 s. The run never killed and every trial must end with
the same bits: policy, and for pre-training also optimisers, lanes, random generators and counters. The runs
are small, but wrap their buffer, randomise, save often, and in fine-tuning thaw layers inside the killed span.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from booster_soccer import errors  # noqa: E402
from booster_soccer.store import (
    checkpoints,  # noqa: E402
    resume,  # noqa: E402
)

_POLL_S = 0.005
_LIMIT_S = 1800.0  # no run takes so long, on the slowest machine


@dataclass(frozen=True)
class Config:
    """What is tried."""

    trials: int = 50  # of each stage
    kills: int = 1  # in each trial
    stages: tuple[Literal["pretrain", "mjx", "finetune"], ...] = ("pretrain", "finetune")  # mjx: compiles for minutes
    steps: int | None = None  # of each run; None takes the stage's own, below
    seed: int = 0  # of the instants
    cache: Path | None = None  # directory of compiled code, kept for the next time; None: with the runs
    keep: Path | None = None  # directory for the runs; None: a temporary one, deleted afterwards


# Small enough for seconds, and with everything in it that a state must hold.
STAGES = {
    "pretrain": [
        "train_mjx_sac.py", "--engine", "native", "--num-envs", "8", "--total-steps", "960", "--batch-size", "32",
        "--updates-per-iteration", "2", "--buffer-size", "300", "--learning-starts", "80", "--dr-level", "1",
        "--ramp-steps", "200", "600", "--max-actions", "40", "--evaluation-lanes", "3", "--evaluation-every", "400",
        "--log-every", "200", "--checkpoint-every", "40", "--checkpoint-interval-s", "0",
    ],
    "mjx": [  # pre-training on the other engine; one call is 20 actions of every lane
        "train_mjx_sac.py", "--engine", "mjx", "--resume-buffer", "saved", "--num-envs", "4", "--total-steps", "960",
        "--batch-size", "32", "--updates-per-iteration", "2", "--buffer-size", "300", "--learning-starts", "80",
        "--dr-level", "1", "--ramp-steps", "200", "600", "--max-actions", "40", "--evaluation-lanes", "3",
        "--evaluation-every", "400", "--log-every", "200", "--checkpoint-every", "80", "--checkpoint-interval-s", "0",
    ],
    "finetune": [
        "finetune_ddpg.py", "--from-scratch", "--num-lanes", "3", "--total-steps", "480", "--warmup-steps", "60",
        "--warmup-updates", "10", "--freeze-hidden-until", "160", "--freeze-input-until", "320",
        "--updates-per-round", "1", "--batch-size", "32", "--buffer-size", "150", "--validation-episodes", "2",
        "--confirmation-episodes", "2", "--validate-every", "480", "--log-every", "120", "--device", "cpu",
        "--checkpoint-every", "30", "--checkpoint-interval-s", "0", "--keep-state",
    ],
}  # fmt: skip


def start(stage: str, out: Path, cache: Path, steps: int | None, log: Path | None = None) -> subprocess.Popen:
    """Start a stage with `--resume`, in a process group of its own, its output in `log`, by default `<out>.log`."""
    command = [sys.executable, *STAGES[stage], "--out", str(out), "--resume"]
    if steps is not None:
        command[command.index("--total-steps") + 1] = str(steps)
    # Compiled code is kept between the processes: the same code, and a resumed run starts in seconds.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "MUJOCO_GL": "disable"}  # fmt: skip
    with open(log or f"{out}.log", "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def run_to_end(stage: str, out: Path, cache: Path, steps: int | None) -> tuple[float, float]:
    """Run without a kill; returns the seconds to the first saved state and from there to the end."""
    process, started, first_s = start(stage, out, cache, steps), time.monotonic(), None
    while process.poll() is None:
        if first_s is None and saved_state(out).exists():
            first_s = time.monotonic() - started
        if time.monotonic() - started > _LIMIT_S:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    if process.returncode:
        raise errors.UserError(f"a run ended with status {process.returncode}: see {out}.log")
    first_s = first_s or 0.0  # killed at its very end, it had nothing left to do
    return first_s, time.monotonic() - started - first_s


def saved_state(out: Path) -> Path:
    """Exists as soon as there is a state to resume from."""
    return out.with_name(f"{out.name}.resume") / checkpoints.MANIFEST


def writing(out: Path) -> bool:
    """Whether a saved state, or the policy, is being written or moved right now."""
    names = (f"{out.name}.resume", out.name)
    return any(out.with_name(f"{name}.writing").exists() for name in names) or (
        not saved_state(out).exists() and out.with_name(f"{out.name}.resume.previous").exists()
    )


def kill_once(stage: str, out: Path, cache: Path, steps: int | None, delay_s: float, write_s: float | None) -> str:
    """Start or resume a run and kill it `delay_s` after it goes on from a saved state, or from its start if negative.

    With `write_s` the kill then waits until that long after a state began to be written. Returns what the run
    was doing, or "ended" if it did that before.
    """
    process, started, under_way = start(stage, out, cache, steps), time.monotonic(), None
    log = Path(f"{out}.log")
    log_bytes = log.stat().st_size
    while process.poll() is None:
        now = time.monotonic()
        # A resumed run is under way when it says so, a new one when it has saved a state.
        if under_way is None and saved_state(out).exists() and log.stat().st_size > log_bytes:
            under_way = now
        due = now - started >= -delay_s if delay_s < 0 else under_way is not None and now - under_way >= delay_s
        if due and (write_s is None or writing(out)):
            time.sleep(write_s or 0.0)
            doing = "while writing" if writing(out) else "while running"
            os.killpg(process.pid, signal.SIGKILL)
            return doing if process.wait() == -signal.SIGKILL else "ended"
        if now - started > _LIMIT_S:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    if process.returncode:
        raise errors.UserError(f"a run ended with status {process.returncode}: see {out}.log")
    return "ended"


def terminate(stage: str, out: Path, cache: Path, steps: int | None, delay_s: float) -> float | None:
    """Start a run, send it SIGTERM `delay_s` after its first saved state; returns the seconds it took to end.

    None if the run had finished before.
    """
    process, started = start(stage, out, cache, steps), time.monotonic()
    while process.poll() is None and not saved_state(out).exists() and time.monotonic() - started < _LIMIT_S:
        time.sleep(_POLL_S)
    time.sleep(delay_s)
    sent = time.monotonic()
    process.terminate()
    status = process.wait()
    seconds = time.monotonic() - sent
    if status == 0:
        return None
    if status != resume.STOPPED:
        raise errors.UserError(f"SIGTERM: a run ended after {seconds:.1f} s with status {status}: see {out}.log")
    return seconds


def differences(a: Path, b: Path) -> Iterator[str]:
    """Names of the final arrays that are not bit for bit the same in two runs."""
    pairs = [(checkpoints.load(a), checkpoints.load(b))]
    states = [out.with_name(f"{out.name}.resume") for out in (a, b)]
    if any(state.exists() for state in states):
        pairs.append(tuple(checkpoints.load(state) for state in states))
    for ours, theirs in pairs:
        extra = sorted(name.removesuffix(".safetensors") for name in ours.manifest["files"])
        tables = {"arrays": (ours.arrays, theirs.arrays)}
        for name in extra:
            if name not in ("arrays", "golden", "replay"):  # where a segment ends depends on the kills
                tables[name] = checkpoints.load_extra(ours, name), checkpoints.load_extra(theirs, name)
        for table, (x, y) in tables.items():
            for name in sorted(x.keys() | y.keys()):
                if name not in x or name not in y or not _same_bits(x[name], y[name]):
                    yield f"{ours.path.name}: {table}: {name}"


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()


def try_stage(stage: str, config: Config, place: Path) -> int:
    """All trials of one stage; returns how many ended with the very bits. One that cannot go on counts as failed."""
    rng = random.Random(f"{config.seed} {stage}")
    cache = (config.cache or place / "compiled").resolve()
    reference, again = place / f"{stage}-never-killed", place / f"{stage}-again"
    first_s, span_s = run_to_end(stage, reference, cache, config.steps)
    if config.trials > 1:  # the first run compiled, this one shows how long they take
        first_s, span_s = run_to_end(stage, again, cache, config.steps)
        if wrong := list(differences(reference, again)):
            raise errors.UserError(f"{stage}: two runs never killed differ, in {len(wrong)} arrays such as {wrong[0]}")
    print(f"{stage}: {first_s:.1f} s to the first state and {span_s:.1f} s more without a kill", flush=True)
    good = 0
    for trial in range(config.trials):
        out, told = place / f"{stage}-{trial}", []
        try:
            took_s = kill_repeatedly(stage, out, cache, config, rng, (first_s, span_s), trial == 0, told)
            run_to_end(stage, out, cache, config.steps)
            wrong = list(differences(reference, out))
            verdict = "identical" if not wrong else f"{len(wrong)} arrays differ, such as {wrong[0]}"
            if took_s is not None and took_s > 10:
                verdict += ", but SIGTERM took too long"
        except errors.UserError as error:
            verdict = f"FAILED: {error}"
        good += verdict == "identical"
        print(f"{stage} {trial + 1}/{config.trials}: {', '.join(told)}: {verdict}", flush=True)
        if verdict == "identical":
            _remove_all(place, out.name)
    return good


def kill_repeatedly(stage: str, out: Path, cache: Path, config: Config, rng: random.Random,
                    times_s: tuple[float, float], terminates: bool, told: list[str]) -> float | None:  # fmt: skip
    """Start one run and kill it `config.kills` times, before that with SIGTERM if it `terminates`.

    `times_s` are the seconds to a run's first state and from there to its end; `told` takes what was done. Returns
    the seconds to its end after SIGTERM.
    """
    first_s, longest_s = times_s
    took_s = None
    while len(told) < config.kills + terminates:
        if terminates and not told:
            took_s = terminate(stage, out, cache, config.steps, rng.uniform(0, longest_s / 2))
            if took_s is None:
                longest_s *= 0.8
                _remove_all(out.parent, out.name)
                continue
            told.append(f"SIGTERM, ended after {took_s:.1f} s with status {resume.STOPPED}")
        delay_s = -rng.uniform(0, first_s) if rng.random() < 0.1 else rng.uniform(0, longest_s)
        write_s = rng.uniform(0, 0.03) if delay_s > 0 and rng.random() < 1 / 3 else None
        doing = kill_once(stage, out, cache, config.steps, delay_s, write_s)
        if doing == "ended":  # too late to be a kill: the trial starts over
            longest_s *= 0.8
            told.clear()
            _remove_all(out.parent, out.name)
        else:
            told.append(f"killed at {delay_s:+.1f} s {doing}")
    return took_s


def _remove_all(place: Path, name: str) -> None:
    """Delete a run and what lies beside it."""
    for path in (place / name, *place.glob(f"{name}.*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main(config: Config) -> bool:
    """Try every stage; returns whether all trials ended with the very bits."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = config.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise errors.UserError(f"{place} is not empty: give a new directory")
        for stage in config.stages:
            results[stage] = try_stage(stage, config, place)
    for stage, good in results.items():
        print(f"{stage}: {good} of {config.trials} ended with the very bits of the run never killed")
    return all(good == config.trials for good in results.values())


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config, description=__doc__)) else 1)
