"""The pins resolve for the cluster's Python 3.12, from wheels, and a node with a GPU gets one CUDA: 'make check-pins'.

Prints the packages of a node with a GPU, with PyTorch as a CPU build (`torch_cpu.toml`).
"""

import subprocess
import sys
from pathlib import Path

from booster_soccer import errors
from booster_soccer.errors import More, UserError
from cloud.environment import cuda_majors

ROOT = Path(__file__).resolve().parents[1]
# All are wheels but moviepy, which is pure Python.
_TARGET = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:",
           "--no-binary", "moviepy", "--no-header", "--no-annotate"]  # fmt: skip


def resolve(extra: str, *options: str) -> list[str]:
    """Requirements `name==version` of the project with an extra; `UserError` if there are none."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml", "--extra", extra]
    run = subprocess.run(
        [*command, "-c", "constraints.txt", *_TARGET, *options], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        raise UserError(f"the pins do not resolve for --extra {extra}: {run.stderr}")
    return run.stdout.split()


def check_one_cuda(requirements: list[str]) -> None:
    """Raise `UserError` unless the libraries of exactly one CUDA are among the requirements."""
    majors = sorted(cuda_majors(requirements))
    if len(majors) != 1:
        found = " and ".join(majors) or "none"
        named = [line for line in requirements if cuda_majors([line])]
        brought = f"{found}: {', '.join(named)}; {More.TWO_CUDAS}"
        raise UserError(f"a node with a GPU needs one CUDA, these pins bring {brought}")


def main() -> list[str]:
    """Resolve both sets; returns that of a node with a GPU."""
    resolve("dev")
    on_gpu = resolve("gpu", "--config-file", "cloud/torch_cpu.toml")
    check_one_cuda(on_gpu)
    print("\n".join(on_gpu))
    return on_gpu


if __name__ == "__main__":
    errors.run(main)
