"""Settings of JAX's memory, and the one line when it is used up."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from jax.errors import JaxRuntimeError

from booster_soccer import errors, runtime

NAMES = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_CLIENT_MEM_FRACTION", "JAX_DEFAULT_MATMUL_PRECISION")


@dataclasses.dataclass(frozen=True)
class Inner:
    num_envs: int = 2048
    buffer_size: int = 4_000_000
    batch_size: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    collect: Inner = Inner()


def child(program: str, **environment: str) -> tuple[list[str], str]:
    """The settings that a fresh process ends with, and what it warned of."""
    kept = {name: value for name, value in os.environ.items() if "XLA" not in name and "JAX" not in name}
    program += f"\nimport os\nprint(*(os.environ.get(name) for name in {NAMES}))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.split(), done.stderr


PREPARE = "from booster_soccer import runtime\nruntime.prepare()\n"


def test_settings_are_made_and_the_users_own_are_kept():
    assert child(PREPARE) == (["false", "0.75", "highest"], "")
    assert child(PREPARE, XLA_CLIENT_MEM_FRACTION="0.5") == (["false", "0.5", "highest"], "")
    # The older name too: JAX ends with an error where both are set.
    assert child(PREPARE, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5") == (["false", "None", "highest"], "")


@pytest.mark.parametrize(("quota", "threads"), [(3, "3"), (8, None)])
def test_xla_gets_no_more_threads_than_a_quota_allows(monkeypatch, quota, threads):
    monkeypatch.setenv("NPROC", "")  # taken back afterwards
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(runtime, "usable_cores", lambda: quota)
    runtime.prepare()
    assert os.environ.get("NPROC") == threads


@pytest.mark.parametrize(
    ("used", "backend", "warns"), [(True, "gpu", True), (True, "cpu", False), (False, "gpu", False)]
)
def test_what_comes_too_late_is_named_once(used, backend, warns):
    fake = f"""
import sys
from types import SimpleNamespace as Names
bridge = Names(backends_are_initialized=lambda: {used})
sys.modules["jax"] = Names(_src=Names(xla_bridge=bridge), default_backend=lambda: "{backend}")
"""
    found, warned = child(fake + PREPARE + "runtime.prepare()\n", JAX_DEFAULT_MATMUL_PRECISION="high")
    assert found == ["false", "0.75", "high"] and warned.count("\n") == warns
    if warns:
        assert warned.startswith("warning: ") and "PREALLOCATE=false, XLA_CLIENT_MEM_FRACTION=0.75 may have" in warned


def test_whether_jax_was_used_before_is_known():
    found, _ = child("import jax\nused = jax._src.xla_bridge.backends_are_initialized\nprint(used())\n"
                     "jax.devices()\nprint(used())\n" + PREPARE)  # fmt: skip
    assert found == ["False", "True", "false", "0.75", "highest"]


@pytest.mark.parametrize("script", ["train_mjx_sac", "gates", "convert_jax2torch"])
def test_scripts_that_use_jax_make_them_before_it_is_imported(script):
    program = f"""
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            import os
            print(*(os.environ.get(name) for name in {NAMES}), file=sys.stderr)
            raise SystemExit
sys.meta_path.insert(0, Watch())
import {script}
from booster_soccer.agents import sac
"""
    environment = {name: value for name, value in os.environ.items() if "XLA" not in name and "JAX" not in name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stderr.split() == ["false", "0.75", "highest"]


LANES = "--num-envs 1024 instead of 2048 halves what the lanes need"
BUFFER = "--buffer-size 2000000 instead of 4000000 halves the replay buffer"


OUT = "RESOURCE_EXHAUSTED: "


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (JaxRuntimeError(OUT + "Out of memory while trying to allocate 4770354233 bytes.\nBuffer"), "4.8 GB"),
        (JaxRuntimeError(OUT + "Failed to allocate request for 6.27GiB (6727663616B) on device"), "6.7 GB"),
        (JaxRuntimeError(OUT + "Out of memory allocating 17592186044416 bytes."), "17592.2 GB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 23 GiB"), "21.5 GB"),
        (RuntimeError("CPUAllocator: can't allocate memory: tried to allocate 70368744177664 bytes."), "70368.7 GB"),
        (JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "CUDA_ERROR_OUT_OF_MEMORY"),
        (MemoryError("Unable to allocate 8.00 GiB for an array"), "8.6 GB"),
        (MemoryError(), "not enough memory: ;"),
    ],
)
def test_memory_that_is_used_up_is_one_line_that_says_what_halves_it(capsys, error, needed):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        errors.run(main, Config())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("error: not enough memory")
    assert needed in said and LANES in said and BUFFER in said and "--batch-size 4096 instead of 8192" in said


def test_an_array_of_the_buffer_points_at_the_buffer():
    for wanted, first, second in ((4_000_000 * 109 * 4, BUFFER, LANES), (94_000_001, LANES, BUFFER)):
        said = runtime.out_of_memory(JaxRuntimeError(f"{OUT}Out of memory allocating {wanted} bytes."), Config())
        assert said is not None and said.index(first) < said.index(second)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), ValueError("out of memory of things"), JaxRuntimeError("INTERNAL: x")):
        assert runtime.out_of_memory(error, Config()) is None
        with pytest.raises(type(error)):
            errors.run(lambda error=error: (_ for _ in ()).throw(error))
