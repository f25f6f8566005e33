"""The GPU monitor, with a stub for NVML's module: when it asks, what it records, alarms, and drivers that fail."""

import time
from types import SimpleNamespace

import pytest

from booster_soccer.tracking import gpu_monitor
from booster_soccer.tracking.gpu_monitor import GpuMonitor


class Nvml:
    """What the monitor uses of `pynvml`. `fails` names the functions that raise; `asked` the ones called."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = "gpu", "sm", "mem"

    def __init__(self, gpus: int = 1):
        self.gpus, self.fails, self.asked = gpus, {}, []
        self.used, self.temperature_c = 12e9, 60

    def __getattr__(self, name: str):
        answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": self.gpus,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=self.used, total=24e9),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=80, memory=40),
            "nvmlDeviceGetTemperature": self.temperature_c,
            "nvmlDeviceGetPowerUsage": 70_500,
            "nvmlDeviceGetEnforcedPowerLimit": 72_000,
            "nvmlDeviceGetClockInfo": 2_040,
        }
        if name not in answers:
            raise AttributeError(name)

        def call(*_):
            self.asked.append(name)
            if name in self.fails:
                raise self.fails[name]
            return answers[name]

        return call


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(gpu_monitor.time, "monotonic", lambda: now.s)
    return now


def answer(monitor: GpuMonitor, step: int) -> dict[str, float]:
    """What is recorded of the question asked at a step; empty if none was."""
    before = monitor._count
    assert monitor.at(step) == {}
    if monitor._count == before:
        return {}
    for _ in range(2000):
        if numbers := monitor.at(step):
            return dict(numbers)
        time.sleep(0.001)
    raise AssertionError("no answer")


def started(nvml: Nvml, alarms: list | None = None) -> GpuMonitor:
    monitor = GpuMonitor((alarms if alarms is not None else []).append, nvml)
    monitor.start()
    return monitor


BRIEF = {"gpu/utilization_percent": 80.0, "gpu/memory_percent": 50.0, "gpu/memory_gb": 12.0, "gpu/temperature_c": 60.0}
FULL = BRIEF | {"gpu/power_w": 70.5, "gpu/power_limit_w": 72.0, "gpu/clock_mhz": 2040.0,
                "gpu/memory_clock_mhz": 2040.0, "gpu/memory_utilization_percent": 40.0}  # fmt: skip


def test_every_1000_steps_but_once_a_second_and_in_full_every_5000_but_once_in_five(clock):
    monitor = started(Nvml())
    assert answer(monitor, 999) == {}
    assert answer(monitor, 1000) == BRIEF
    clock.s += 0.9
    assert answer(monitor, 2000) == {}  # within the second
    clock.s += 0.1
    assert answer(monitor, 2001) == BRIEF
    kinds = []
    for step in range(5000, 5000 * 12, 5000):
        clock.s += 1.0
        kinds.append(answer(monitor, step) == FULL)
    assert kinds == [False, False, False, True, False, False, False, False, True, False, False]
    monitor.stop()


def test_slow_steps_are_in_full_every_5000(clock):
    monitor, in_full = started(Nvml()), []
    for step in range(1000, 21_000, 1000):
        clock.s += 1.0
        if answer(monitor, step) == FULL:
            in_full.append(step)
    assert len(in_full) == 3 and min(b - a for a, b in zip(in_full, in_full[1:])) >= 5000
    monitor.stop()


def test_alarms_come_once_for_each_crossing(clock):
    nvml, alarms = Nvml(), []
    monitor = started(nvml, alarms)
    for i, (used, temperature_c) in enumerate([(22e9, 85), (23e9, 86), (23.5e9, 90), (22e9, 84), (23e9, 84)]):
        clock.s += 1.0
        nvml.used, nvml.temperature_c = used, temperature_c
        answer(monitor, 1000 * (i + 1))
    assert alarms == [
        "gpu/memory_percent is 96 %, above 95 %",
        "gpu/temperature_c is 86 C, above 85 C",
        "gpu/memory_percent is 96 %, above 95 %",
    ]
    monitor.stop()


def test_several_gpus_have_names_of_their_own(clock):
    monitor = started(Nvml(gpus=2))
    assert {name.rsplit("/", 1)[0] for name in answer(monitor, 1000)} == {"gpu/0", "gpu/1"}
    monitor.stop()


def test_what_a_model_does_not_know_is_left_out(clock):
    nvml = Nvml()
    nvml.fails = {"nvmlDeviceGetPowerUsage": Nvml.NVMLError_NotSupported("Not Supported")}
    monitor = started(nvml)
    for step in (1000, 2000, 3000, 4000, 5000):
        clock.s += 1.0
        answer(monitor, step)
    clock.s += 1.0
    assert answer(monitor, 6000) == {name: value for name, value in FULL.items() if name != "gpu/power_w"}
    monitor.stop()


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_without_a_gpu_one_line_says_so_and_nothing_is_watched(capsys, fails):
    nvml = Nvml()
    nvml.fails = {fails: Nvml.NVMLError("Driver Not Loaded")}
    monitor = started(nvml)
    assert capsys.readouterr().err == "no GPU is watched: Driver Not Loaded\n"
    assert monitor.at(10**6) == {}
    monitor.stop()
    assert started(Nvml(gpus=0)).at(10**6) == {} and capsys.readouterr().err.count("\n") == 1


def test_a_driver_that_goes_away_is_one_line_and_the_run_goes_on(clock, capsys):
    nvml = Nvml()
    monitor = started(nvml)
    assert answer(monitor, 1000) == BRIEF
    nvml.fails = {"nvmlDeviceGetMemoryInfo": Nvml.NVMLError("GPU is lost")}
    for step in (2000, 3000, 4000):
        clock.s += 1.0
        monitor.at(step)
    monitor._thread.join(5.0)
    assert capsys.readouterr().err == "the GPU is watched no longer: GPU is lost\n"
    assert monitor.at(5000) == {}
    monitor.stop()


def test_the_real_module_says_that_there_is_no_gpu_here(capsys):
    """Where there is one, it is watched."""
    monitor = GpuMonitor(lambda text: None)
    monitor.start()
    said = capsys.readouterr().err
    assert said == "" if monitor._handles else said.startswith("no GPU is watched: ")
    monitor.stop()
