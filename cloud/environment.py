"""The project's own Python environment on a cluster, beside the runtime's, which stays as it is.

    python -m cloud.environment --extra gpu,tune --torch cpu --place /local_disk0/booster_soccer/environments \
        --cache /Volumes/booster_soccer/rl_models/artifacts/environments

The runtime has NumPy 1, and pandas built against it; the project needs NumPy 2. So: a virtual environment on the local
disk, from `constraints.txt`, in which each stage runs as a process. PyTorch comes as a CPU build, or as one for the
CUDA of JAX's plugin: with two of them in one process the first to load cuDNN wins. Built once, then kept on the volume
as one tar file with a completion marker; another node unpacks it at the same path, since such an environment cannot
move. Nothing but Python itself: this runs in the platform's own.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from cloud.volume import VolumeError, copy_file

_READY = "ready.json"  # in a whole environment: what it was built from
# Set by a runtime for its own Python or CUDA: they would be found before the environment's.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CONDA_PREFIX")
_CUDA = (
    re.compile(r"^[\w-]+-cu(\d\d)=="),  # nvidia-cublas-cu12, ...
    re.compile(r"^jax-cuda(\d\d)-"),
    re.compile(r"^(?:cuda-toolkit|cuda-bindings|nvidia-cuda-runtime)==(\d+)\."),  # from CUDA 13 on
)


class More:
    """As in `booster_soccer/errors.py`, of which nothing may be imported here (tests/test_docs.py compares them)."""

    ENVIRONMENT = "more: docs/07-databricks-mlops.md#environment-failed"


class EnvironmentFailed(Exception):
    """In one line, why there is no environment."""


def cuda_majors(requirements: Iterable[str]) -> set[str]:
    """Major versions of CUDA whose libraries are in a list of `name==version`."""
    return {match[1] for line in requirements for rule in _CUDA if (match := rule.match(line))}


def clean(environment: dict[str, str]) -> dict[str, str]:
    """Environment variables for a process in an environment of its own."""
    return {name: value for name, value in environment.items() if name not in _FOREIGN}


def key(code: Path, extras: str, torch: str) -> str:
    """Names an environment by all that decides what is in it."""
    parts = [(code / name).read_bytes() for name in ("constraints.txt", "pyproject.toml")]
    parts += [extras.encode(), torch.encode(), platform.python_version().encode(), platform.machine().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    return f"{extras.replace(',', '-')}-{torch}-{digest}"


def ensure(code: Path, extras: str, torch: str, place: Path, cache: Path | None) -> Path:
    """The directory of the environment: found, unpacked from the cache, or built and put there."""
    name = key(code, extras, torch)
    target = place / name
    if (target / _READY).is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)  # what a killed build left
    if cache is not None and _unpack(cache, name, target):
        print(f"environment {name}: from {cache}", flush=True)
        return target
    print(f"environment {name}: building", flush=True)
    _build(code, extras, torch, target)
    if cache is not None:
        _pack(cache, name, target)
    return target


def python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _build(code: Path, extras: str, torch: str, target: Path) -> None:
    tools = target.parent / f"{target.name}.tools"
    constraints = code / "constraints.txt"
    uv = str(tools / "bin" / "uv")
    variables = clean(dict(os.environ))
    source = target.parent / f"{target.name}.source"
    commands = [
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tools),
         _pin(constraints, "uv")],
        [uv, "venv", "--quiet", "--python", sys.executable, str(target)],
        [uv, "pip", "install", "--quiet", "--python", str(python(target)), "--constraint", str(constraints),
         *([] if torch == "index" else ["--torch-backend", torch]), f"{source}[{extras}]" if extras else str(source)],
    ]  # fmt: skip
    try:
        # Building the library writes beside its files, and the code may lie where that is not possible.
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(code / name, source / name)
        shutil.copytree(code / "booster_soccer", source / "booster_soccer")
        for command in commands:
            if status := subprocess.run(command, env=variables).returncode:
                tool = Path(command[0]).name
                raise EnvironmentFailed(f"{tool} ended with status {status}: its message is above; {More.ENVIRONMENT}")
        listed = subprocess.run([uv, "pip", "freeze", "--python", str(python(target))], env=variables, text=True,
                                capture_output=True, check=True).stdout.splitlines()  # fmt: skip
        if len(found := cuda_majors(listed)) > 1:
            raise EnvironmentFailed(
                f"libraries of CUDA {' and '.join(sorted(found))} in one environment: change --torch; "
                f"{More.ENVIRONMENT}"
            )
        (target / _READY).write_text(json.dumps({"extras": extras, "torch": torch, "packages": listed}, indent=1))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        for helper in (tools, source):
            shutil.rmtree(helper, ignore_errors=True)


def _pin(constraints: Path, package: str) -> str:
    return next(line for line in constraints.read_text().splitlines() if line.startswith(f"{package}=="))


def _pack(cache: Path, name: str, target: Path) -> None:
    """Put the environment on the volume; its marker last."""
    local, remote, marker = target.with_suffix(".tar"), cache / f"{name}.tar", cache / f"{name}.json"
    try:
        with tarfile.open(local, "w") as tar:  # compressing costs more than it saves
            tar.add(target, arcname=".")
        cache.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        copy_file(local, remote)
        marker.write_text(json.dumps({"path": str(target), "size": local.stat().st_size, "sha256": _sha256(local)}))
    finally:
        local.unlink(missing_ok=True)


def _unpack(cache: Path, name: str, target: Path) -> bool:
    """Whether the environment was on the volume, whole and for this path."""
    local, remote, marker = target.with_suffix(".tar"), cache / f"{name}.tar", cache / f"{name}.json"
    try:
        expected = json.loads(marker.read_text())
        if expected["path"] != str(target) or remote.stat().st_size != expected["size"]:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(remote, local)
        if _sha256(local) != expected["sha256"]:
            return False
        unpacking = target.with_suffix(".unpacking")
        shutil.rmtree(unpacking, ignore_errors=True)
        with tarfile.open(local) as tar:
            tar.extractall(unpacking, filter="fully_trusted")
        unpacking.rename(target)
        return True
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    finally:
        local.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", default="gpu", help="extras of pyproject.toml, with commas")
    parser.add_argument("--torch", default="cpu", help="build of PyTorch, as uv names it: cpu, cu126, ...")
    parser.add_argument("--place", type=Path, required=True, help="local directory of environments")
    parser.add_argument("--cache", type=Path, help="directory of a volume for the tar file")
    args = parser.parse_args()
    code = Path(__file__).resolve().parent.parent
    try:
        print(python(ensure(code, args.extra, args.torch, args.place, args.cache)))
    except (EnvironmentFailed, VolumeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
