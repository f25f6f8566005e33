"""The chain again and again on its shortest settings, each time with a random fault; every end must be a clean one.

    python -m tests.long.soak --minutes 60
    python -m tests.long.soak --minutes 10 --toys --longest-s 10

A clean end is: every stage finished (status 0, and a summary), a refusal in one line (status 2), or a state that the
next time goes on from with `--resume` (killed, or ended by a signal with its status). Never a traceback, or a process
that lives on. A chain that has finished is looked at and deleted, and the next one begins. Exit status 1 if an end was
not clean.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

import chain
from booster_soccer import errors
from booster_soccer.store import checkpoints
from booster_soccer.tracking.record import Result
from tests.long.kill_resume import ROOT, STAGES

_LONGEST_S = 1200.0  # before a fault comes, or a chain is waited for
_PATIENCE_S = 30.0  # for what a dead chain leaves to end


@dataclass(frozen=True)
class Config:
    """How long it goes on."""

    minutes: float = 60.0
    seed: int = 0
    longest_s: float = 60.0  # a signal comes within this time
    toys: bool = False  # toys for stages (`tests/toy_stage.py`): the chain and the life of runs alone, in seconds


# --- the shortest chain -------------------------------------------------------------------------------------


def shortest(config: chain.Config, out: Path) -> dict[str, list[list[str]]]:
    """The chain's commands, as short as their scripts allow."""
    long, resume = _stages(config, out), ["--resume"] if config.resume else []
    pretrained, converted, finetuned = (str(out / name) for name in ("pretrain", "converted", "finetuned"))
    return {  # gates are not passed by a policy that has learned nothing
        "pretrain": [[*_without(STAGES["pretrain"], "--keep-state"), "--out", pretrained, *resume]],
        "convert": [[*long["convert"][0], "--real-observations", "2"]],
        "finetune": [[*_without(STAGES["finetune"], "--keep-state", "--preset", "scratch"), "--preset", "cpu",
                      "--checkpoint", converted, "--out", finetuned, *resume]],
        "evaluate": [_on_the_twin(command) for command in long["evaluate"]],
        "submit": long["submit"],
    }  # fmt: skip


def _without(command: list[str], *words: str) -> list[str]:
    return [word for word in command if word not in words]


def _on_the_twin(command: list[str]) -> list[str]:
    """Without a claim to be the Champion: no gates were run."""
    command = ["twin" if word == "official" else word for word in command]
    return (
        command[: command.index("--gates")] + command[command.index("--gates") + 2 :]
        if "--gates" in command
        else command
    )


_stages = chain.stages


def toys(config: chain.Config, out: Path) -> dict[str, list[list[str]]]:
    """Two long stages, and nothing of the others."""
    resume = ["--resume"] if config.resume else []
    names = ("pretrain", "finetuned")
    return {name: [["toy_stage.py", "--step-s", "0.2", "--out", str(out / name), *resume]] for name in names}


def run_chain(out: str, how: str, what: str) -> None:
    """In its own process: the chain with the shortest commands, or with toys."""
    chain.EPISODES["demo"], chain.stages = 1, shortest
    if what == "toys":
        chain.SCRIPTS, chain.stages, chain.evaluations = ROOT / "tests", toys, lambda *_: []
        chain.tracked = lambda *_: Result()  # there is no fine-tuned policy
        (Path(out) / "submission").mkdir(parents=True, exist_ok=True)
        (Path(out) / "submission" / "score.json").write_text('{"mean": 0.0}')
    errors.run(chain.main, chain.Config(out=Path(out), resume=how == "resume"))


# --- one time -----------------------------------------------------------------------------------------------


class Attempt:
    """One start of the chain, and what is done to it."""

    def __init__(self, out: Path, rng: random.Random, config: Config):
        self.out, self.rng, self.longest_s = out, rng, config.longest_s
        self.what = "toys" if config.toys else "stages"
        self.log = out.parent / "log"
        self.statuses: set[int] = {0}  # that it may end with

    def start(self, before: str = "", **environment: str) -> subprocess.Popen:
        """Start it in a session of its own; `before` are commands of the shell."""
        program = "import sys; from booster_soccer import terminal; terminal.begin('__main__'); "  # as scripts begin
        program += "from tests.long import soak; soak.run_chain(*sys.argv[1:])"
        command = ["bash", "-c", f'{before} exec "$@"', "bash", sys.executable, "-c", program, str(self.out), "resume",
                   self.what]  # fmt: skip
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(self.out.parent / "compiled"), "BOOSTER_TRACK": "none",
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | compiled | environment, stdout=log, stderr=log,
                                    stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    def sent(self, number: signal.Signals, twice: bool = False) -> subprocess.Popen:
        """Start it, and send it a signal after a while."""
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0, self.longest_s))
        if twice:
            process.send_signal(number)
            time.sleep(0.3)
        return self.sent_to(process, number)

    def second(self) -> subprocess.Popen:
        """Another chain, started in the same place a little later, is refused."""
        process = self.start()
        time.sleep(self.rng.uniform(3, 10))
        if process.poll() is None:
            other = self.start()
            if other.wait(_LONGEST_S) not in (0, 2):
                raise errors.UserError(f"a second chain ended with status {other.returncode}")
            self.statuses |= {2}  # it may have been the quicker one
        return self.sent_to(process, signal.SIGTERM)

    def sent_to(self, process: subprocess.Popen, number: signal.Signals) -> subprocess.Popen:
        """Send a signal: before its handlers are there it ends it as any process."""
        process.send_signal(number)
        self.statuses |= {128 + number, -number}
        return process

    def damaged(self) -> subprocess.Popen:
        """A byte of the newest state is another one: the one before is used, or a refusal says what is wrong."""
        files = sorted(self.out.glob("*.resume/*.safetensors"))
        if files:
            file = self.rng.choice(files)
            content = bytearray(file.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1
            file.write_bytes(content)
            self.statuses |= {2}
        return self.sent(signal.SIGTERM)

    def sent_later(self, process: subprocess.Popen, *statuses: int) -> subprocess.Popen:
        """Let it run for a while under the fault, then end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0, self.longest_s))
        self.statuses |= set(statuses)
        return self.sent_to(process, signal.SIGTERM)

    def wait(self, process: subprocess.Popen) -> str:
        """Wait for its end; returns what was not clean about it."""
        status = process.wait(_LONGEST_S)
        said = self.log.read_text(errors="replace")
        if "Traceback" in said or "Exception ignored" in said:
            return "a traceback"
        if status not in self.statuses:
            return f"status {status}"
        limit = time.monotonic() + _PATIENCE_S
        while members := _members(process.pid):
            if time.monotonic() > limit:
                return f"processes live on: {members}"
            time.sleep(0.2)
        if status == 0 and not (self.out / "summary.json").exists():
            return "finished without a summary"
        if status == 2 and not said.rstrip().splitlines()[-1].startswith("error: "):
            return "a refusal without its line"
        return ""


def _members(session: int) -> list[str]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = stat.read_text().rpartition(") ")[2].split()
            if int(words[3]) == session and words[0] != "Z":
                found.append(stat.parent.name)
    return found


FAULTS: dict[str, Callable[[Attempt], subprocess.Popen]] = {
    "SIGKILL": lambda a: a.sent(signal.SIGKILL),
    "SIGTERM": lambda a: a.sent(signal.SIGTERM),
    "Ctrl-C": lambda a: a.sent(signal.SIGINT),
    "Ctrl-C twice": lambda a: a.sent(signal.SIGINT, twice=True),
    "a closed terminal": lambda a: a.sent(signal.SIGHUP),
    "a second chain": lambda a: a.second(),
    "a damaged state": lambda a: a.damaged(),
    "closed streams": lambda a: a.sent_later(a.start("exec <&- >&- 2>&-;")),
    "a full disk under the log": lambda a: a.sent_later(a.start("exec >/dev/full 2>&1;")),
    "a reader that goes away": lambda a: a.sent_later(a.start("exec > >(head -n 1 >/dev/null) 2>&1;")),
    "letters of ASCII only": lambda a: a.sent_later(a.start(PYTHONIOENCODING="ascii", LC_ALL="C")),
    "a home that is not there": lambda a: a.sent_later(a.start(HOME="/proc/nowhere"), 2),
    "few open files": lambda a: a.sent_later(a.start("ulimit -n 40;"), 2),
    "nothing": lambda a: a.start(),
}


def main(config: Config) -> bool:
    """Go on for so many minutes; returns whether every end was clean."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` lets it be ignored, by its children too
    rng, clean, ends, finished = random.Random(config.seed), True, Counter[str](), 0
    limit = time.monotonic() + 60 * config.minutes
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "chain"
        while time.monotonic() < limit:
            fault = rng.choice(sorted(FAULTS))
            attempt = Attempt(out, rng, config)
            attempt.log.unlink(missing_ok=True)
            process = FAULTS[fault](attempt)
            problem = attempt.wait(process)
            ends[f"status {process.returncode}"] += 1
            print(f"{fault}: status {process.returncode}{': NOT CLEAN: ' + problem if problem else ''}", flush=True)
            if problem:
                clean = False
                print(attempt.log.read_text(errors="replace")[-3000:], flush=True)
            if process.returncode == 0:
                checkpoints.load(out / "finetuned")
                finished += 1
                shutil.rmtree(out)
            elif process.returncode == 2 and fault in ("a damaged state", "few open files"):
                shutil.rmtree(out, ignore_errors=True)  # nothing usable may be left
    print(
        f"{sum(ends.values())} times, {finished} chains finished: {dict(ends)}; {'all' if clean else 'NOT all'} clean"
    )
    return clean


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config, description=__doc__)) else 1)
