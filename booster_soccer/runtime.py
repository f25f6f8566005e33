"""The memory of JAX: its settings, which count only if made before JAX is used, and what to say when it is used up.

Every script that uses JAX calls `prepare` first. So does the first cell of a notebook:

    from booster_soccer import runtime
    runtime.prepare()

What draws videos needs no setting: `tracking/video.py` finds an OpenGL by itself, in processes of its own.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from booster_soccer.cores import usable_cores

# name, value, and the older name that a user may have set instead (both at once is an error of JAX)
_SETTINGS = (
    ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", ""),  # take memory as it is needed: others use the GPU too
    ("XLA_CLIENT_MEM_FRACTION", "0.75", "XLA_PYTHON_CLIENT_MEM_FRACTION"),  # never more than this share of it
    ("JAX_DEFAULT_MATMUL_PRECISION", "highest", ""),  # MJX diverges with the lower one of recent GPUs
)
# What a run's memory grows with: setting -> what is halved with it.
_GROWS_WITH = {
    "buffer_size": "the replay buffer",
    "num_envs": "what the lanes need",
    "num_lanes": "what the lanes need",
    "batch_size": "what an update needs",
}
_WANTED = (
    re.compile(r"allocate request for \S+ \((\d+)B\)"),
    re.compile(r"allocat\w* (\d+) bytes"),
    re.compile(r"allocate ([\d.]+ [KMG]iB)"),
)
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def prepare() -> None:
    """Make the settings that the user has not made; a warning names those that come too late for a GPU."""
    # XLA takes a thread for each core that it may run on, and knows no quota of time.
    if hasattr(os, "sched_getaffinity") and usable_cores() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("NPROC", str(usable_cores()))
    late, is_late = [], _is_gpu_in_use()
    for name, value, older in _SETTINGS:
        if name not in os.environ and older not in os.environ:
            os.environ[name] = value
            late += [f"{name}={value}"] * is_late
    if late:
        print(
            f"warning: JAX uses a GPU already, so {', '.join(late)} may have no effect: call runtime.prepare() before "
            "in a fresh process (a notebook: restart its kernel)",
            file=sys.stderr,
        )


def _is_gpu_in_use() -> bool:
    """Whether this process has begun to use JAX, and on more than a CPU."""
    jax = sys.modules.get("jax")
    return jax is not None and jax._src.xla_bridge.backends_are_initialized() and jax.default_backend() != "cpu"


def out_of_memory(error: BaseException, *configs: Any) -> str | None:
    """One line about an error that says that memory is used up, for a run with these settings; None for any other."""
    text = " ".join(str(error).split())
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("resource_exhausted", "resource exhausted", "out of memory", "out_of_memory", "can't allocate memory")
    if not (is_memory or (isinstance(error, RuntimeError) and any(word in text.lower() for word in words))):
        return None
    wanted = _wanted_bytes(text)
    settings = dict(_growing(configs))
    # An array of the replay buffer is a multiple of its rows.
    is_buffer = wanted is not None and "buffer_size" in settings and wanted % settings["buffer_size"] == 0
    remedies = [
        f"--{name.replace('_', '-')} {value // 2} instead of {value} halves {_GROWS_WITH[name]}"
        for name, value in sorted(settings.items(), key=lambda item: (item[0] == "buffer_size") != is_buffer)
    ]
    needed = f"{wanted / 1e9:.1f} GB more were wanted than there is" if wanted else text[:100]
    return f"not enough memory: {needed}; {', '.join(remedies) or 'choose smaller settings'}"


def _wanted_bytes(text: str) -> int | None:
    """How much was asked for, as XLA, PyTorch and NumPy say it."""
    for pattern in _WANTED:
        if found := pattern.search(text):
            number, _, unit = found[1].partition(" ")
            return int(float(number) * _UNITS.get(unit, 1))
    return None


def _growing(configs: Any) -> Iterator[tuple[str, int]]:
    """The settings, nested ones too, that memory grows with."""
    for config in configs:
        if dataclasses.is_dataclass(config):
            for name, value in vars(config).items():
                if name in _GROWS_WITH and isinstance(value, int):
                    yield name, value
                yield from _growing((value,))
