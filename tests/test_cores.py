"""Cores that a process may use: those it is bound to, or its control groups' quota, rounded up."""

import os
from pathlib import Path

import pytest

from booster_soccer.cores import usable_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of eight cores, whose files are given by name."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def with_files(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return with_files


CGROUP, V2, V1 = "proc/self/cgroup", "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),  # no control groups at all
        ({CGROUP: "0::/\n"}, 8),  # v2, at the top of a machine: no cpu.max there
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, 8),
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "200000 100000\n"}, 2),  # docker --cpus 2
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "250000 100000\n"}, 3),  # rounded up
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "10000 100000\n"}, 1),
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "9900000 100000\n"}, 8),  # more than there are
        # A service of systemd: the tightest of its own group and those around it.
        ({CGROUP: "0::/a/b\n", f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "300000 100000\n"}, 3),
        ({CGROUP: "0::/a/b\n", f"{V2}/a/b/cpu.max": "50000 50000\n", f"{V2}/a/cpu.max": "300000 100000\n"}, 1),
        # v1, and both side by side.
        ({CGROUP: "4:cpu,cpuacct:/x\n0::/\n", f"{V1}/x/cpu.cfs_quota_us": "150000\n",
          f"{V1}/x/cpu.cfs_period_us": "100000\n"}, 2),
        ({CGROUP: "4:cpu,cpuacct:/x\n", f"{V1}/x/cpu.cfs_quota_us": "-1\n",
          f"{V1}/x/cpu.cfs_period_us": "100000\n"}, 8),
        # A container sees its own group at the top, and the host's name for it.
        ({CGROUP: "4:cpu,cpuacct:/docker/0123\n", f"{V1}/cpu.cfs_quota_us": "400000\n",
          f"{V1}/cpu.cfs_period_us": "100000\n"}, 4),
        # What cannot be read is no limit.
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "100000\n"}, 8),
        ({CGROUP: "0::/\n", f"{V2}/cpu.max": "100000 0\n"}, 8),
        ({CGROUP: "4:cpuset:/x\n0::/../..\n"}, 8),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_counts(machine, files, cores):
    assert usable_cores(machine(files)) == cores


def test_fewer_cores_than_the_quota_allows(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores(machine({CGROUP: "0::/\n", f"{V2}/cpu.max": "400000 100000\n"})) == 1


def test_this_machine_has_a_core():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
