"""Stage 2: pre-trained (JAX) checkpoint to PyTorch: mean policy and critics, the observation normaliser folded in.

    python convert_jax2torch.py --checkpoint runs/pretrain --out runs/converted
    python convert_jax2torch.py --checkpoint runs/finetuned --onnx --out policy.onnx

Input: a "pretrained" checkpoint. Output: a "converted" one with `actor.{input,hidden,output}.{weight,bias}`
(12 outputs: the means) and `critic.{0,1}.*`, `target_critic.{0,1}.*`, all named like the state dicts of
`booster_soccer/agents/ddpg.py`. The spread log_std of the SAC policy is checked before it is dropped: a
deterministic policy needs none, but one out of range means that the means were trained badly.

Gate 2's comparison is part of it: JAX and PyTorch compute actions and values of the golden observations, of real ones
from the official environments, and of drawn ones. Nothing is written if the actions differ by more than 1e-5 computed
in float64 on both sides, or 1e-4 in float32. `<out>.html` is a report of it. A conversion that is there already is
recognised.

With `--onnx` the policy of a checkpoint of any stage becomes an ONNX file instead, for a robot's computer; ONNX Runtime
reproduces the golden actions, or nothing is written.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from booster_soccer import runtime

runtime.prepare()  # before jax is imported

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from booster_soccer import errors
from booster_soccer.agents import conversion, onnx_policy
from booster_soccer.agents.policy import ACTION_LIMITS, policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import LAYOUT_HASH, OBS_SIZE, TABLE
from booster_soccer.rollout.play import met_observations
from booster_soccer.store import checkpoints
from booster_soccer.store.atomic import OTHER_PLACE, os_errors, write_file
from booster_soccer.store.entry import guarded
from booster_soccer.store.manifests import MANIFEST, action_layer
from booster_soccer.store.places import check_output_dir
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig

_DRAWS_PER_REAL = 0.5  # drawn observations beside the real ones


@dataclass(frozen=True)
class Config:
    """What to convert."""

    checkpoint: Path  # "pretrained" checkpoint directory; with --onnx of any stage
    out: Path  # new directory for the "converted" checkpoint; with --onnx a new file
    onnx: bool = False  # write the policy as an ONNX file instead
    real_observations: int = 64  # per task, played in the official environments by the policy itself
    seed: int = 0  # of those episodes and of the drawn observations
    tracking: TrackConfig = TrackConfig()


def check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raise `UserError` unless the arrays are those of a pre-trained checkpoint of this architecture."""
    for name, shape in conversion.expected_shapes().items():
        found = arrays[name].shape if name in arrays else "missing"
        if found != shape:
            raise UserError(
                f"checkpoint {path}: {name} should have shape {shape}, found {found}: "
                f"it was written by other code; pre-train again with this one; {More.CHECKPOINT}"
            )
    if not (arrays["normalizer.std"] > 0).all():
        raise UserError(f"checkpoint {path}: normalizer.std is not positive: pre-train again")


def is_done(config: Config, parent: checkpoints.Checkpoint) -> bool:
    """Whether `out` holds this very conversion; `UserError`, before any work is done, where it cannot be written."""
    check_output_dir(config.out)
    if not (config.out / MANIFEST).exists():
        return False
    there = checkpoints.load(config.out, ("converted",))
    if there.manifest["parents"] != [{"stage": parent.stage, "hash": parent.hash}]:
        raise UserError(f"{config.out} already holds another conversion: choose another --out or move it away")
    return True


def observations(config: Config, checkpoint: checkpoints.Checkpoint) -> dict[str, np.ndarray]:
    """Golden, real and drawn observations, each (N, 87) float32."""
    groups = {"golden": checkpoint.golden_obs}
    if config.real_observations:
        policy = policy_from_arrays(checkpoint.arrays)
        groups["real"] = met_observations(policy, config.real_observations, config.seed, c.START_NOISE_RAD)
        rng = np.random.default_rng(config.seed)
        noise = rng.standard_normal((int(_DRAWS_PER_REAL * len(groups["real"])), OBS_SIZE))
        drawn = checkpoint.arrays["normalizer.mean"] + checkpoint.arrays["normalizer.std"] * noise
        groups["drawn"] = drawn.astype(np.float32)
    return groups


def write_onnx(config: Config) -> Path:
    """Write the policy as an ONNX file that gives the golden actions; returns the file."""
    checkpoint = checkpoints.load(config.checkpoint)
    if os.path.lexists(config.out):
        raise UserError(f"{config.out} is there already: name a new file for --out, such as policy.onnx")
    layer = action_layer() | {"torque_limit_nm": c.TORQUE_LIMIT_NM.tolist()}
    about = {"stage": checkpoint.stage, "checkpoint": checkpoint.hash, "action": json.dumps(layer)}
    about |= {"observation_layout": LAYOUT_HASH, "observation": json.dumps([row._asdict() for row in TABLE])}
    content = onnx_policy.to_bytes(policy_from_arrays(checkpoint.arrays), about)
    difference = onnx_policy.check(content, checkpoint.golden_obs, checkpoint.golden_actions)
    with os_errors(f"write {config.out}", OTHER_PLACE):
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(config.out, content)
    print(f"golden actions and ONNX Runtime's differ by {difference:.1e} at most\n{config.out}")
    return config.out


@guarded("out")
def main(config: Config) -> Path:
    """Convert, check, write; returns the output directory."""
    if config.onnx:
        return write_onnx(config)
    if config.real_observations < 0 or config.seed < 0:
        raise UserError(f"real_observations ({config.real_observations}) and seed ({config.seed}) must be at least 0")
    checkpoint = checkpoints.load(config.checkpoint, stages=("pretrained",))
    check_arrays(config.checkpoint, checkpoint.arrays)
    if is_done(config, checkpoint):
        print(f"{config.out} is converted already\n{config.out}")
        return config.out
    with Recorder(config.out, "converted", config, [checkpoint]) as recorder:
        metrics = convert(config, checkpoint)
        differences = {f"convert/difference_{name}": value for name, value in metrics["max_difference"].items()}
        files = [config.out, *stage_pages.of_conversion(config.out)]
        recorder.result(Result(differences, files, checkpoints.load(config.out)))
    print(config.out)
    return config.out


def convert(config: Config, checkpoint: checkpoints.Checkpoint) -> dict[str, Any]:
    """Convert, check, write; returns what was measured."""
    converted = conversion.convert(checkpoint.arrays)
    groups = observations(config, checkpoint)
    differences = conversion.compare(checkpoint.arrays, converted, np.concatenate(list(groups.values())))
    met = [groups[name] for name in ("golden", "real") if name in groups]  # where a drawn one lies no robot goes
    spread = conversion.log_std_report(conversion.log_std(checkpoint.arrays, np.concatenate(met)))
    conversion.check_conversion(differences, spread)

    counts = {name: len(group) for name, group in groups.items()}
    metrics = {"observations": counts, "max_difference": differences, "log_std": spread}
    steps, obs = checkpoint.manifest["steps"], checkpoint.golden_obs
    checkpoints.save(config.out, "converted", converted, obs, asdict(config), config.seed, steps, [checkpoint], metrics)
    _print(metrics)
    return metrics


def _print(metrics: dict) -> None:
    console = Console()
    counts = ", ".join(f"{count} {name}" for name, count in metrics["observations"].items())
    gate = Table(title=f"JAX against PyTorch on observations: {counts}")
    for column in ("what", "largest difference", "limit"):
        gate.add_column(column)
    for name, difference in metrics["max_difference"].items():
        limit = ACTION_LIMITS.get(name)
        what = f"actions in {name}" if limit else f"values of {name}, relative"
        gate.add_row(what, f"{difference:.1e}", f"{limit:.0e}" if limit else "reported")
    console.print(gate)
    spread = Table(title="log_std before clipping, on golden and real observations")
    for column in ("joint", "min", "mean", "max"):
        spread.add_column(column)
    for joint, row in metrics["log_std"]["by_joint"].items():
        spread.add_row(joint, *(f"{row[name]:+.2f}" for name in ("min", "mean", "max")))
    console.print(spread)


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
