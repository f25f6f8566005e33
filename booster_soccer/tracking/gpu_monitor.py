"""Watches the GPU while a run uses it: load, memory, temperature, and now and then everything; alarms.

A thread asks the driver (NVML, by the module `pynvml` of the package `nvidia-ml-py`), because a driver in trouble takes
its time; the run only says at which step it is, and takes what is there. Where there is no GPU, or the driver goes
away, one line says so and that is all.
"""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

EVERY, EVERY_IN_FULL = 1_000, 5_000  # steps; but ...
LEAST_S = 1.0  # ... at least this long between two questions, and ...
FULL_ONE_IN = 5  # ... at most one question in five is for everything
# How a watched number's name ends -> above what there is an alarm.
LIMITS = {"/memory_percent": (95.0, "%"), "/temperature_c": (85.0, "C")}


class GpuMonitor:
    """`at(step)` in every iteration of the run; `alarm` gets a text once for each crossing of a limit."""

    def __init__(self, alarm: Callable[[str], None], nvml: ModuleType | Any = None):
        """`nvml` stands for the module `pynvml` in tests."""
        self._alarm, self._nvml = alarm, nvml
        self._questions: queue.Queue[bool | None] = queue.Queue(1)
        self._answers: queue.Queue[dict[str, float]] = queue.Queue()
        self._last_step, self._last_full_step, self._asked_s, self._count = 0, 0, -LEAST_S, 0
        self._above: set[str] = set()
        self._handles: list[Any] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look for GPUs; without one nothing is watched."""
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        except ImportError:
            return self._say("no GPU is watched: nvidia-ml-py is not installed")
        except self._nvml.NVMLError as error:
            return self._say(f"no GPU is watched: {error}")
        if not self._handles:
            return self._say("no GPU is watched: the driver knows none")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return None

    def stop(self) -> None:
        """End the thread; a driver that does not answer is not waited for."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._questions.put_nowait(None)
            self._thread.join(1.0)
            self._thread = None

    def at(self, step: int) -> Mapping[str, float]:
        """Ask for what is due at a step; returns what was answered since the last call, often nothing."""
        if self._thread is None:
            return {}
        if step // EVERY > self._last_step // EVERY and time.monotonic() - self._asked_s >= LEAST_S:
            full_due = step // EVERY_IN_FULL > self._last_full_step // EVERY_IN_FULL
            in_full = full_due and self._count % FULL_ONE_IN == 0
            with contextlib.suppress(queue.Full):  # the last question is not answered yet
                self._questions.put_nowait(in_full)
                self._asked_s, self._last_step, self._count = time.monotonic(), step, self._count + 1
                self._last_full_step = step if in_full else self._last_full_step
        try:
            numbers = self._answers.get_nowait()
        except queue.Empty:
            return {}
        self._sound_alarms(numbers)
        return numbers

    def _sound_alarms(self, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            what = next((what for what in LIMITS if name.endswith(what)), None)
            if what is None:
                continue
            limit, unit = LIMITS[what]
            if value > limit and name not in self._above:
                self._above.add(name)
                self._alarm(f"{name} is {value:.0f} {unit}, above {limit:.0f} {unit}")
            elif value <= limit:
                self._above.discard(name)

    def _watch(self) -> None:
        """In its own thread: answer questions until the driver fails."""
        try:
            while (in_full := self._questions.get()) is not None:
                numbers: dict[str, float] = {}
                for i, handle in enumerate(self._handles):
                    prefix = "gpu/" if len(self._handles) == 1 else f"gpu/{i}/"
                    numbers |= {prefix + name: value for name, value in self._ask(handle, in_full).items()}
                self._answers.put(numbers)
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            self._say(f"the GPU is watched no longer: {error}")

    def _ask(self, handle: Any, in_full: bool) -> dict[str, float]:
        """What one GPU says; with `in_full` also what takes longer, as far as this model knows it."""
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        numbers = {
            "utilization_percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "memory_percent": 100.0 * memory.used / memory.total,
            "memory_gb": memory.used / 1e9,
            "temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        }
        if in_full:
            for name, ask in {
                "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
                "clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                "memory_utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).memory,
            }.items():
                with contextlib.suppress(nvml.NVMLError_NotSupported):
                    numbers[name] = float(ask())
        return numbers

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
