"""The environment on a cluster: one CUDA, found again on the volume, and never half of it."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from booster_soccer.errors import UserError
from cloud import environment, pins

ROOT = Path(__file__).resolve().parents[1]
# What `uv pip compile` gave for --extra gpu on 2026-11-26, in parts.
JAX_12 = ["jax==0.10.2", "jax-cuda12-plugin==0.10.2", "nvidia-cublas-cu12==12.9.3.13", "nvidia-nccl-cu12==2.32.3"]
TORCH_13 = ["cuda-toolkit==13.0.3.0", "nvidia-cuda-runtime==13.0.96", "nvidia-cudnn-cu13==9.20.0.48", "torch==2.13.0"]
NO_CUDA = ["nvidia-ml-py==13.615.71", "nvidia-curand==10.4.0.35", "numpy==2.4.6"]


def test_cuda_majors_by_hand():
    assert environment.cuda_majors(JAX_12 + NO_CUDA) == {"12"}
    assert environment.cuda_majors(TORCH_13 + NO_CUDA) == {"13"}
    assert environment.cuda_majors(JAX_12 + TORCH_13) == {"12", "13"}
    assert environment.cuda_majors(NO_CUDA) == set()
    for line in JAX_12[1:] + TORCH_13[:-1]:
        assert len(environment.cuda_majors([line])) == 1


def test_two_cudas_or_none_are_refused():
    pins.check_one_cuda(JAX_12)
    with pytest.raises(UserError, match="one CUDA, these pins bring 12 and 13: .*nvidia-cudnn-cu13"):
        pins.check_one_cuda(JAX_12 + TORCH_13)
    with pytest.raises(UserError, match="bring none"):
        pins.check_one_cuda(NO_CUDA)


def test_the_metadata_of_pytorchs_cpu_build_are_its_own():
    if not importlib.metadata.version("torch").endswith("+cpu"):
        pytest.skip("this PyTorch is no CPU build")
    [torch] = tomllib.loads((ROOT / "cloud" / "torch_cpu.toml").read_text())["dependency-metadata"]
    assert importlib.metadata.version("torch").split("+")[0] == torch["version"]
    needed = [line for line in importlib.metadata.requires("torch") if "extra ==" not in line]
    assert sorted(torch["requires-dist"]) == sorted(needed)


def test_the_runtimes_own_packages_and_cuda_stay_outside():
    inside = environment.clean(
        {"PATH": "p", "PYTHONPATH": "x", "LD_LIBRARY_PATH": "y", "VIRTUAL_ENV": "z", "HOME": "h"}
    )
    assert inside == {"PATH": "p", "HOME": "h"}


@pytest.fixture
def code(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "constraints.txt").write_text("uv==0.1\n")
    (code / "pyproject.toml").write_text("")
    return code


@pytest.fixture
def builds(monkeypatch):
    """Builds that only write a file; their number."""
    done = []

    def build(code, extras, torch, target):
        done.append(target)
        (target / "bin").mkdir(parents=True)
        (target / "bin" / "python").symlink_to(sys.executable)
        (target / "module.py").write_text("x = 1\n")
        (target / "ready.json").write_text("{}")

    monkeypatch.setattr(environment, "_build", build)
    return done


def test_an_environment_is_built_once_and_unpacked_on_the_next_machine(tmp_path, code, builds):
    place, cache = tmp_path / "disk", tmp_path / "volume"
    first = environment.ensure(code, "gpu", "cpu", place, cache)
    assert environment.ensure(code, "gpu", "cpu", place, cache) == first and len(builds) == 1
    place.rename(tmp_path / "gone")
    second = environment.ensure(code, "gpu", "cpu", place, cache)
    assert second == first and len(builds) == 1
    assert (second / "module.py").read_text() == "x = 1\n" and environment.python(second).exists()
    assert [path.name for path in place.iterdir()] == [first.name]


def test_pins_extras_and_build_of_torch_name_another_environment(tmp_path, code, builds):
    place = tmp_path / "disk"
    names = {
        environment.ensure(code, extras, torch, place, None) for extras in ("", "gpu") for torch in ("cpu", "cu126")
    }
    (code / "constraints.txt").write_text("uv==0.2\n")
    names.add(environment.ensure(code, "gpu", "cpu", place, None))
    assert len(names) == len(builds) == 5
    assert all(re.fullmatch(r"[a-z0-9-]+", path.name) for path in names)


@pytest.mark.parametrize("damage", ["cut", "changed", "no marker", "moved"])
def test_what_is_not_whole_on_the_volume_is_built_anew(tmp_path, code, builds, damage):
    place, cache = tmp_path / "disk", tmp_path / "volume"
    environment.ensure(code, "", "cpu", place, cache)
    [tar] = cache.glob("*.tar")
    raw = tar.read_bytes()
    if damage == "cut":
        tar.write_bytes(raw[:-10])
    elif damage == "changed":
        tar.write_bytes(raw.replace(b"x = 1", b"x = 2"))
    elif damage == "no marker":
        tar.with_suffix(".json").unlink()
    if damage == "moved":  # another disk: such an environment works at its own path only
        place = tmp_path / "another disk"
    else:
        place.rename(tmp_path / "gone")
    target = environment.ensure(code, "", "cpu", place, cache)
    assert len(builds) == 2 and (target / "module.py").read_text() == "x = 1\n"


def test_a_killed_build_is_begun_anew(tmp_path, code, builds, monkeypatch):
    half = tmp_path / environment.key(code, "", "cpu")
    (half / "bin").mkdir(parents=True)
    (half / "rest").touch()
    environment.ensure(code, "", "cpu", tmp_path, None)
    assert len(builds) == 1 and not (half / "rest").exists()
