"""The chain as a process: SIGTERM reaches the stage, and its record survives a kill at every instant."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chain

ROOT = Path(chain.__file__).parent
_CHAIN = """
import sys
from pathlib import Path
import chain
from booster_soccer import errors
chain.SCRIPTS, chain._PATIENCE_S = Path({scripts!r}), 1.5
errors.run(chain.main, chain.Config(out=Path({out!r})))
"""
_STAGE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from booster_soccer.store import resume
place = Path({place!r})
{body}
"""
_SAVES = """
with resume.StopSignal() as stop:
    (place / "pid").write_text(str(os.getpid()))
    while not stop.received:
        time.sleep(0.01)
    (place / "saved").touch()
    raise SystemExit(resume.STOPPED)
"""
_IGNORES = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(place / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(("body", "saved"), [(_SAVES, True), (_IGNORES, False)])
def test_sigterm_reaches_the_stage_and_ends_both(tmp_path, body, saved):
    stage = _STAGE.format(root=str(ROOT), place=str(tmp_path), body=body)
    (tmp_path / "train_mjx_sac.py").write_text(stage)
    program = _CHAIN.format(scripts=str(tmp_path), out=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)  # to the chain alone, as a platform does
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == 143
    assert "SIGTERM: stage 'pretrain' is ended; the same command with --resume goes on" in output
    assert "Traceback" not in output
    assert (tmp_path / "saved").exists() == saved
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["seconds"] == {}


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_summary_survives_a_kill_at_every_instant_where_a_rename_cannot_replace(tmp_path, monkeypatch):
    """Fault injection: a rename over an existing name fails, and the kill comes before the nth change on disk."""
    old, new = ({"settings": {"preset": "demo", "seed": 0, "pretrain_steps": None}, "seconds": {"pretrain": seconds}}
                for seconds in (1.0, 2.0))  # fmt: skip
    for there in ("summary.json", "summary.json.writing"):  # the second is what a kill between two steps leaves
        stop_before, finished = 0, False
        while not finished:
            stop_before += 1
            config = chain.Config(out=tmp_path / f"{there}{stop_before}", resume=True)
            (config.out / "pretrain").mkdir(parents=True)
            (config.out / there).write_text(json.dumps(old))
            count = 0

            def counted(function, count_to=stop_before):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == count_to:
                        raise Killed
                    if function.__name__ == "rename" and os.path.lexists(args[1]):
                        raise FileExistsError(args[1])
                    return function(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                for name in ("rename", "unlink", "fsync", "mkdir"):
                    patch.setattr(os, name, counted(getattr(os, name)))
                patch.setattr(os, "replace", lambda *_: pytest.fail("a rename over an existing name"))
                try:
                    assert chain.start_summary(config) == old
                    chain.write_summary(config, new)
                    finished = True
                except Killed:
                    pass
            assert chain.start_summary(config) in ([new] if finished else [old, new])
            assert [path.name for path in config.out.glob("summary*")] == ["summary.json"] or not finished
        assert stop_before > 4


def test_a_chain_killed_before_its_first_record_starts(tmp_path):
    (tmp_path / "summary.json.writing").write_text('{"settings": {"pre')
    assert chain.start_summary(chain.Config(out=tmp_path))["seconds"] == {}
