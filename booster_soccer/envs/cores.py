"""How many cores this process may use."""

import os


def usable_cores() -> int:
    """Cores of the machine, or fewer where the process is bound to some (taskset, a container's cpuset)."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
