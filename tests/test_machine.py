"""What a machine lacks or refuses: the cause and its own remedy, before any work is done where it can be known."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune_ddpg
import submit
import train_mjx_sac
from booster_soccer import errors
from booster_soccer.errors import UserError
from booster_soccer.rollout.processes import Workers
from booster_soccer.store import checkpoints, places
from booster_soccer.store.atomic import os_errors
from booster_soccer.store.entry import with_paths
from booster_soccer.store.run import Run
from tests import toy_run
from tests.test_entry import ROOT
from tests.test_errors import raiser, said
from tests.test_resume import SHAPES, filled


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A script to its end, with more in its environment."""
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, env=os.environ | environment, text=True, capture_output=True, timeout=120)


# --- the remedy is the cause's ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "ulimit -n"),
        (errno.EROFS, "make the place writable"),
        (errno.EACCES, "make the place writable"),
        (errno.EEXIST, "something is there already"),
        (errno.ENOENT, "check the path"),
        (errno.ENOMEM, "choose smaller settings"),
        (errno.EPIPE, "the other side has ended"),
        (errno.EIO, "the disk or volume fails"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EXDEV, "look at the place"),
    ],
)
def test_every_cause_has_its_own_remedy(capsys, number, words):
    error = OSError(number, os.strerror(number), "runs/x")
    line = said(capsys, raiser(error))
    assert words in line and f"cannot use runs/x: {os.strerror(number)};" in line
    assert ("free space" in line) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_where_a_file_cannot_be_its_own_remedy_stands_and_nowhere_else():
    for number, words in ((errno.EROFS, "kept; elsewhere"), (errno.EMFILE, "kept; raise the limit of open files")):
        with (
            pytest.raises(UserError, match=f"cannot write x: .*; {words}"),
            os_errors("write x", "elsewhere", "kept; "),
        ):
            raise OSError(number, os.strerror(number))


class Unlucky:
    """Fails as a process without free descriptors does."""

    def play(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "scene.xml")

    def grow(self):
        raise MemoryError("8 PiB")


@pytest.mark.parametrize(("method", "words"), [("play", "ulimit -n"), ("grow", "choose smaller settings")])
def test_what_a_worker_process_is_refused_is_one_line(method, words):
    with Workers(Unlucky, [()], ["a worker"], "") as workers:
        workers.call(0, method)
        with pytest.raises(UserError, match=words):
            workers.answer(0)


def test_only_what_has_the_option_is_told_to_use_it(tmp_path):
    """Fine-tuning has no --resume-buffer."""
    shapes = {"x": ()}
    for refillable in (True, False):
        config = toy_run.Config(tmp_path / "run")
        run = Run(config.out, "converted", config)
        if not refillable:
            config = finetune_ddpg.Config(tmp_path / "run", "cpu")
            run = Run(config.out, "finetuned", config)
        table = run.segments.write(filled(20, 12))
        shutil.rmtree(run.segments.directory)
        with pytest.raises(UserError) as refused:
            run.segments.read(table, toy_run.Replay(20, SHAPES | shapes), 12)
        assert ("--resume-buffer" in str(refused.value)) == refillable


# --- places that cannot be moved ----------------------------------------------------------------------------


@pytest.mark.parametrize("out", [".", "", "..", "../..", "/", "x/.."])
def test_a_directory_that_somebody_is_in_is_refused_before_any_work(tmp_path, monkeypatch, out):
    """It was noticed at the end of the run, which had no place then."""
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="name a directory inside"):
        places.check_output_dir(out)
    with pytest.raises(UserError, match="name a directory inside"):
        submit.main(submit.Config(tmp_path, Path(out)))
    assert list(here.iterdir()) == []


def test_a_mounted_volume_is_refused_before_any_work(tmp_path, monkeypatch):
    """Fault injection: `tests/test_disk.py` mounts real ones."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(UserError, match="a volume is mounted there"):
        places.check_output_dir(tmp_path)


def test_a_working_directory_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {sys.executable} -m tests.toy_stage --out run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No such file or directory" in done.stderr


# --- devices and libraries ------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_noticed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(finetune_ddpg, "WorkerLanes", lambda *_: pytest.fail("it began"))
    config = finetune_ddpg.PRESETS["scratch"]
    with pytest.raises(UserError, match="--device cuda: PyTorch sees no GPU"):
        finetune_ddpg.main(with_paths(finetune_ddpg.replace(config, out=tmp_path / "run", device="cuda")))


def test_a_jax_platform_that_is_not_there_is_noticed_at_once(tmp_path, monkeypatch):
    def no_backend():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(train_mjx_sac.jax, "default_backend", no_backend)
    with pytest.raises(UserError, match="JAX finds no device with JAX_PLATFORMS=.*backend 'tpu'"):
        train_mjx_sac.main(train_mjx_sac.replace(train_mjx_sac.PRESETS["cpu"], out=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--policy", "zero"]])
def test_an_opengl_that_is_not_there_is_one_line(tmp_path, arguments):
    """A PyOpenGL without its libraries, as on a bare machine."""
    (tmp_path / "OpenGL").mkdir()
    (tmp_path / "OpenGL" / "__init__.py").write_text("raise ImportError('Unable to load EGL library')\n")
    done = run_script("evaluate.py", *arguments, MUJOCO_GL="egl", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "error: cannot load MuJoCo with MUJOCO_GL='egl' (Unable to load EGL library): unset it"
    )
    assert done.stderr.endswith("; more: docs/01-environment-setup.md#opengl\n")


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_scores_need_no_home_directory(home):
    """The platform's SDK writes into it as soon as it is imported; its seeds are had without."""
    program = "import sys; from booster_soccer.envs import official\n" \
              "print(official.match_seed(7, 3)); assert 'sai_rl' not in sys.modules\n"  # fmt: skip
    environment = dict(os.environ, HOME=home or "")
    if home is None:
        del environment["HOME"]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    from sai_rl.benchmark.seed import get_match_seed

    assert int(done.stdout) == get_match_seed(7, 3)


def test_without_the_sdk_the_scores_say_what_to_install(monkeypatch):
    from booster_soccer.envs import official

    official._match_seed_of_the_platform.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="install sai-rl"):
        official.match_seed(0, 0)


def test_a_saved_state_of_a_run_is_not_lost_for_want_of_descriptors(tmp_path, monkeypatch):
    """The last checkpoint stays, and nobody is told to free space."""
    config = toy_run.Config(tmp_path / "run")
    toy_run.killed(config, "step_36")
    real_open = os.open

    def no_more(path, *arguments, **options):
        if ".writing" in str(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", no_more)
    monkeypatch.setattr("booster_soccer.store.checkpoints.sync_directory", lambda path: os.close(os.open(path, 0)))
    with pytest.raises(UserError, match="Too many open files; the last one is kept; raise the limit"):
        toy_run.go(config, resume=True)
    assert checkpoints.load(tmp_path / "run.resume").manifest["steps"] == 32
    assert errors.remedy(OSError(errno.EMFILE, "")) == errors.remedy(OSError(errno.EMFILE, ""), "free space")
