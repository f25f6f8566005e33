"""How many cores this process may use."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

# Where the cpu controller of cgroup v1 may be mounted.
_V1 = ("cpu", "cpu,cpuacct", "cpuacct,cpu")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of the machine, or fewer where the process is bound to some (taskset, a container's cpuset) or its share of
    time is limited (a container's quota, rounded up). `root` is where `proc` and `sys` lie.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        bound = len(os.sched_getaffinity(0))
    else:
        bound = os.cpu_count() or 1
    return max(1, min([bound, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """What the process's control groups allow, and those around them, in cores; groups without a limit give none."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            places, files = [root / "sys/fs/cgroup"], ["cpu.max"]
        elif "cpu" in controllers.split(","):
            places, files = [root / "sys/fs/cgroup" / name for name in _V1], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # A container may see its own group at the top, and the path of the host: what is not there is not asked.
        group = Path(path.lstrip("/"))
        for place in places:
            for here in (place / group, *(place / parent for parent in group.parents)):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number
                    quota, period = (int(word) for file in files for word in (here / file).read_text().split())
                    if quota > 0:  # -1: no limit
                        yield quota / period
