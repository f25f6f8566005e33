"""The first ten minutes on a new GPU: versions, compiling, speed, memory, a kill, a frame; and what a run costs.

    python cloud/gpu_check.py --out runs/gpu_check [--preset l4]
    python cloud/gpu_check.py --out runs/gpu_check --estimate --price-per-hour 1.2

Output: `<out>/gpu_check.json` and `<out>/gpu_check.md`, expected beside measured; status 1 if something that must hold
does not. It trains as a user does, by train_mjx_sac.py, for a few calls of its loop, with SIGKILL in between. Without a
GPU it does the same on the CPU with four lanes: its speed and memory then say nothing.

`--estimate` says before a run what it takes: steps of the preset, steps/s of the check (or that there is none), hours,
price and when it would end.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from any directory

from booster_soccer import terminal

terminal.begin(__name__)

import tyro

from booster_soccer import errors
from booster_soccer.errors import More, UserError
from booster_soccer.store.entry import guarded
from booster_soccer.store.manifests import MANIFEST
from booster_soccer.store.run import read_records
from booster_soccer.tracking import video

CALL = 20  # actions of all lanes in one call of the loop: collect.MjxLoop.ITERATIONS_PER_CALL
CALLS, LEARN_FROM = 10, 2  # calls of the whole run, and those before the first update
KILL_AFTER = 4  # calls
CPU_LANES = 4  # without a GPU: enough to see it work
MEMORY_LIMIT_GB = 18.0  # three quarters of an L4
_REWARD, _LOSS = "train/reward/total", "train/critic_loss"  # docs/metrics.md
_POLL_S = 0.2
_LIMIT_S = 1800.0  # of one start: something hangs
_FRAME = """
import sys, mujoco
from PIL import Image
from booster_soccer.envs.scene import load_mjx_model
model = load_mjx_model()
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 240, 320) as renderer:
    renderer.update_scene(data)
    Image.fromarray(renderer.render()).save(sys.argv[1])
"""


@dataclass(frozen=True)
class Config:
    """What to check, or to estimate."""

    out: Path  # directory of the check
    preset: Literal["l4", "h200"] = "l4"
    estimate: bool = False  # only say what a run takes
    price_per_hour: float = 0.0  # of the node, in any currency
    finetune_steps_per_s: float = 0.0  # of fine-tuning, which runs on the node's CPU cores: its log says it


class Row(NamedTuple):
    """A line of the page."""

    what: str
    expected: str
    measured: str
    passed: bool | None  # None: nothing that must hold


# --- training, as a user does ---------------------------------------------------------------------------


@dataclass
class Training:
    """A short run of the preset, started as often as needed."""

    out: Path  # the checkpoint directory
    preset: str
    lanes: int | None  # None: the preset's, on a GPU
    preset_lanes: int
    compiled: Path  # JAX's cache, empty at first
    memory_gb: float | None = None  # the most that was used

    @property
    def steps_per_call(self) -> int:
        return CALL * (self.lanes or self.preset_lanes)

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}.metrics.jsonl")

    def command(self) -> list[str]:
        """All but size and length are the preset's."""
        call = self.steps_per_call
        words = [sys.executable, str(ROOT / "train_mjx_sac.py"), "--preset", self.preset, "--out", str(self.out)]
        words += ["--resume", "--total-steps", str(CALLS * call), "--learning-starts", str(LEARN_FROM * call)]
        words += ["--log-every", str(call), "--judge-every", str(10**9), "--judge-episodes", "2"]
        words += ["--checkpoint-every", str(call), "--checkpoint-interval-s", "0", "--track", "none"]
        if self.lanes is not None:
            words += ["--num-envs", str(self.lanes), "--batch-size", "64", "--buffer-size", str(CALLS * call)]
        return words

    def lines(self) -> list[dict[str, float]]:
        """The log's lines of numbers about learning, one a call."""
        return [line for line in read_records(self.log) if _REWARD in line]

    def run(self, kill_after: int | None = None) -> int | None:
        """To its end, or to a SIGKILL after that many calls; returns its status, None if it was killed."""
        variables = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled.resolve()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(self.out.with_name("training.log"), "ab") as log:
            process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=variables, start_new_session=True)
        limit = time.monotonic() + _LIMIT_S
        while process.poll() is None:
            time.sleep(_POLL_S)
            self._look_at_memory()
            done = kill_after is not None and len(self.lines()) >= kill_after and self._saved()
            if done or time.monotonic() > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
        return process.returncode

    def _saved(self) -> bool:
        return (self.out.with_name(f"{self.out.name}.resume") / MANIFEST).exists()

    def _look_at_memory(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            used = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used / 1e9
            self.memory_gb = max(self.memory_gb or 0.0, used)
        except Exception:  # not installed, no driver, no device: each has its own class
            return


def speeds(lines: list[dict[str, float]]) -> tuple[float, float]:
    """Seconds that the first call took longer than the others (compiling), and steps/s of the learning calls."""
    steps = [line["step"] for line in lines]
    walls = [line["wall_s"] for line in lines]
    seconds = [after - before for before, after in zip(walls, walls[1:])]
    learning = seconds[LEARN_FROM:] or seconds
    usual = median(learning)
    return walls[0] - usual, (steps[1] - steps[0]) / usual


# --- the check ------------------------------------------------------------------------------------------


def inventory(out: Path) -> dict[str, Any]:
    """Versions and devices, asked by a process of its own: this one must not take the GPU's memory."""
    file = out / "inventory.json"
    run = subprocess.run([sys.executable, str(ROOT / "cloud" / "inventory.py"), "--json", str(file)], text=True,
                         capture_output=True)  # fmt: skip
    if run.returncode:
        raise UserError(f"the environment is not in order: {run.stderr.strip()[-300:]}")
    return json.loads(file.read_text())


def frame(out: Path) -> str:
    """A frame of the scene, rendered without a screen; what was said instead if there is none."""
    file = out / "frame.png"
    try:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "MUJOCO_GL": video.opengl()}
    except UserError as error:
        return str(error)
    run = subprocess.run([sys.executable, "-c", _FRAME, str(file)], env=variables, capture_output=True, text=True)
    if run.returncode == 0:
        return file.name
    said = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
    return f"no OpenGL: {said[-1][:100]}"


def measure(config: Config) -> dict[str, Any]:
    """Everything that is measured, by name."""
    found = inventory(config.out)
    has_gpu = found["gpu"] is not None
    import train_mjx_sac

    lanes = train_mjx_sac.PRESETS[config.preset].collect.num_envs
    training = Training(
        config.out / "run", config.preset, None if has_gpu else CPU_LANES, lanes, config.out / "compiled"
    )
    training.run(KILL_AFTER)
    before = training.lines()
    if len(before) < 2:
        raise UserError(f"training does not get under way: see {config.out / 'training.log'}; {More.GPU_CHECK}")
    compile_s, _ = speeds(before)
    started = time.monotonic()
    status = training.run()
    again_s = time.monotonic() - started
    lines = training.lines()
    _, steps_per_s = speeds(lines[-(CALLS - KILL_AFTER) :])
    losses = [line[_LOSS] for line in lines if line.get(_LOSS)]
    return {
        "preset": config.preset,
        "lanes": lanes if has_gpu else CPU_LANES,
        "inventory": found,
        "compile_s": round(compile_s, 1),
        "resumed": status == 0 and (training.out / MANIFEST).exists(),
        "resumed_run_s": round(again_s, 1),
        "steps_per_s": round(steps_per_s),
        "memory_gb": None if training.memory_gb is None else round(training.memory_gb, 2),
        "critic_losses": losses,
        "frame": frame(config.out),
        "time": datetime.now().isoformat(timespec="seconds"),
    }


def rows(m: dict[str, Any]) -> list[Row]:
    """Expected beside measured."""
    found, gpu = m["inventory"], m["inventory"]["gpu"]
    device = "none: this ran on the CPU" if gpu is None else f"{gpu['name']}, driver {gpu['driver']}"
    cuda = "CUDA " + " and ".join(found["cuda"]) if found["cuda"] else "none"
    learned = len(m["critic_losses"]) > 0 and all(map(math.isfinite, m["critic_losses"]))
    memory = "not measured" if m["memory_gb"] is None else f"{m['memory_gb']} GB"
    return [
        Row("GPU", "one", device, None),
        Row("JAX's device", "that GPU", ", ".join(found["jax_devices"]), None),
        # Without a GPU they are what PyTorch's own build brought, and used by nobody.
        Row("CUDA libraries in the environment", "of one version", cuda,
            None if gpu is None else len(found["cuda"]) == 1),
        Row("compiling the loop", "112 s on an H100", f"{m['compile_s']:.0f} s", None),
        Row("steps/s with updates", "30,000 on an H100 (`l4`)", f"{m['steps_per_s']:,}", None),
        Row(
            "GPU memory, most", f"at most {MEMORY_LIMIT_GB:.0f} GB; 3.5 GB on an H100 (`l4`)", memory,
            None if m["memory_gb"] is None else m["memory_gb"] <= MEMORY_LIMIT_GB,
        ),
        Row("critic loss over the updates", "finite", ", ".join(f"{x:.3g}" for x in m["critic_losses"]), learned),
        Row("SIGKILL, then --resume to the end", "finishes", f"{m['resumed_run_s']:.0f} s", m["resumed"]),
        Row("a frame without a screen", "frame.png", m["frame"], None),
    ]  # fmt: skip


def page(m: dict[str, Any]) -> str:
    """The page, in Markdown."""
    verdict = {True: "passed", False: "FAILED", None: ""}
    lines = [f"# GPU check, preset `{m['preset']}`, {m['lanes']} lanes, {m['time']}", ""]
    if m["inventory"]["gpu"] is None:
        lines += ["There was no GPU: speed, compiling and memory say nothing about one.", ""]
    lines += ["| what | expected | measured | |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.expected} | {row.measured} | {verdict[row.passed]} |" for row in rows(m)]
    packages = ", ".join(f"{name} {version}" for name, version in m["inventory"]["packages"].items())
    return "\n".join([*lines, "", f"Python {m['inventory']['python']}, {packages}.", ""])


# --- cost -----------------------------------------------------------------------------------------------


def estimate(steps: dict[str, int], speed: dict[str, float | None], price_per_hour: float, now: datetime) -> list[str]:
    """What the stages on this node take, each with its steps and steps/s (None: not measured), in lines."""
    lines, hours = [], 0.0
    for stage, count in steps.items():
        per_s = speed[stage]
        if per_s is None:
            lines.append(f"{stage}: {count:,} steps, steps/s not measured, so neither are hours and price")
            continue
        hours += count / per_s / 3600
        lines.append(f"{stage}: {count:,} steps at {per_s:,.0f}/s, {count / per_s / 3600:.1f} hours")
    if not hours:
        return lines
    price = f"{hours * price_per_hour:.2f}" if price_per_hour else "give --price-per-hour"
    of = "" if None not in speed.values() else " of what is measured"
    end = f"{now + timedelta(hours=hours):%Y-%m-%d %H:%M}"
    return [*lines, f"together{of}: {hours:.1f} hours, price: {price}, it would end at {end}"]


def measured_speed(file: Path, preset: str) -> float | None:
    """Of an earlier check of this preset on a GPU."""
    try:
        content = json.loads(file.read_text())
        return content["steps_per_s"] if content["inventory"]["gpu"] and content["preset"] == preset else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no result of gpu_check.py: remove it") from error


@guarded("out")
def main(config: Config) -> list[Row]:
    """Check, write both files, or print the estimate; returns the page's rows."""
    result = config.out / "gpu_check.json"
    for name in ("price_per_hour", "finetune_steps_per_s"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: at least 0")
    if config.estimate:
        import finetune_ddpg
        import train_mjx_sac

        stages = {"pre-training": train_mjx_sac, "fine-tuning": finetune_ddpg}
        steps = {name: stage.PRESETS[config.preset].total_steps for name, stage in stages.items()}
        speed = {
            "pre-training": measured_speed(result, config.preset),
            "fine-tuning": config.finetune_steps_per_s or None,
        }
        print("\n".join(estimate(steps, speed, config.price_per_hour, datetime.now())))
        return []
    for name in ("run", "run.resume", "run.resume.previous", "run.replay", "compiled"):  # of a check before
        shutil.rmtree(config.out / name, ignore_errors=True)
    for name in ("run.metrics.jsonl", "training.log"):
        (config.out / name).unlink(missing_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)
    measured = measure(config)
    result.write_text(json.dumps(measured, indent=2) + "\n")
    text = page(measured)
    (config.out / "gpu_check.md").write_text(text)
    print(text)
    return rows(measured)


if __name__ == "__main__":
    if failed := [row.what for row in errors.run(main, tyro.cli(Config, description=__doc__)) if row.passed is False]:
        print(f"failed: {', '.join(failed)}; {More.GPU_CHECK}", file=sys.stderr)
        sys.exit(1)
