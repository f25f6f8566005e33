"""Let the disk of each long stage fill up, make room, resume, and compare with a run that always had room.

    python -m pytest tests/long/full_disk.py

The disk is a tmpfs that holds two saved states and not a third; mounting it needs root on Linux. The run must end
with status 2 and one clear line, and leave a state that is whole; resumed with more room it must end with the very
bits of the other run. The runs are those of `kill_resume.py`.
"""

import subprocess

import pytest

from booster_soccer.store import checkpoints, places
from tests.long.kill_resume import Run, differences
from tests.test_disk import contents, mounted

_STATES_THAT_FIT = 2.5  # two are kept, a third is written beside them


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_whose_disk_fills_up_goes_on_to_the_very_bits(stage, tmp_path):
    with_room = Run(stage, tmp_path / "with-room", tmp_path)
    with_room.finish()
    usual_state = places.places(with_room.state)[1]  # the last one may hold one more judged policy
    size = int(_STATES_THAT_FIT * sum(map(len, contents(usual_state).values())))
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as disk:
        run = Run(stage, disk / "run", tmp_path)
        status = run.start().wait()
        said = run.log.read_text()
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert status == 2 and "No space left on device" in line and "Traceback" not in said
        step = checkpoints.load_latest(run.state).manifest["steps"]
        print(f"{stage}, {size:,} bytes: {line}; the state of step {step} is whole")
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        run.finish()
        assert differences(with_room, run) == []
