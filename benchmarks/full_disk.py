"""Let the disk of each long stage fill up, make room, resume, and compare with a run that always had room.

    python benchmarks/full_disk.py [--stages pretrain]

The disk is a tmpfs that holds two saved states and not a third; mounting it needs root on Linux. The run must end
with status 2 and one clear line, and leave a state that is whole; resumed with more room it must end with the very
bits of the other run. The runs are those of `benchmarks/kill_resume.py`. Exit status 1 if one does not.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kill_resume import differences, run_to_end, saved_state, start  # noqa: E402
from booster_soccer import errors  # noqa: E402
from booster_soccer.store import checkpoints  # noqa: E402

_STATES_THAT_FIT = 2.5  # two are kept, a third is written beside them
_ROOM_BYTES = 256 << 20


@dataclass(frozen=True)
class Config:
    """What is tried."""

    stages: tuple[Literal["pretrain", "finetune"], ...] = ("pretrain", "finetune")
    cache: Path | None = None  # directory of compiled code, kept for the next time; None: a temporary one


def mount(place: Path, *options: str) -> None:
    """Mount a tmpfs, or change one."""
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        raise errors.UserError(f"cannot mount {place}: {done.stderr.strip()}; this needs root")


def size_bytes(directory: Path) -> int:
    """Of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def try_stage(stage: str, place: Path, cache: Path) -> bool:
    """Whether a run on a disk that fills up ends in order, and goes on to the very bits."""
    reference, disk = place / f"{stage}-with-room", place / f"{stage}-disk"
    run_to_end(stage, reference, cache, None)
    state = size_bytes(saved_state(reference).parent)
    disk.mkdir()
    mount(disk, "-o", f"size={int(_STATES_THAT_FIT * state)}")
    try:
        out, log = disk / "run", place / f"{stage}.log"
        status = start(stage, out, cache, None, log).wait()
        said = log.read_text().splitlines()
        wrong = [line for line in said if line.startswith("error: ")]
        print(f"{stage}: a disk of {_STATES_THAT_FIT} states of {state:,} bytes: status {status}: {' | '.join(wrong)}")
        if status != 2 or len(wrong) != 1 or not re.search("No space left", wrong[0]) or "Traceback" in "".join(said):
            print("\n".join(said[-20:]))
            return False
        kept = checkpoints.load_latest(saved_state(out).parent)
        mount(disk, "-o", f"remount,size={_ROOM_BYTES}")
        run_to_end(stage, out, cache, None)
        apart = list(differences(reference, out))
        print(f"{stage}: the state of step {kept.manifest['steps']} was whole; resumed with room: "
              f"{'identical' if not apart else f'{len(apart)} arrays differ, such as {apart[0]}'}", flush=True)  # fmt: skip
        return not apart
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main(config: Config) -> bool:
    """Try every stage; returns whether all went as they must."""
    with tempfile.TemporaryDirectory() as place:
        cache = (config.cache or Path(place) / "compiled").resolve()
        return all([try_stage(stage, Path(place), cache) for stage in config.stages])


if __name__ == "__main__":
    sys.exit(0 if errors.run(main, tyro.cli(Config, description=__doc__)) else 1)
