"""Stage 2: pre-trained (JAX) checkpoint to PyTorch: mean policy and critics, the observation normaliser folded in.

    python convert_jax2torch.py --checkpoint runs/pretrain --out runs/converted

Input: a "pretrained" checkpoint. Output: a "converted" one with `actor.{input,hidden,output}.{weight,bias}`
(12 outputs: the means) and `critic.{0,1}.*`, `target_critic.{0,1}.*`, all named like the state dicts of
`booster_soccer/agents/torch_networks.py`. The spread log_std of the SAC policy is checked before it is dropped: a
deterministic policy needs none, but one far out of range means that the means were trained badly.

Gate 2 is part of it: JAX and PyTorch compute actions and values of the golden observations, of real ones
from the official environments, and of drawn ones. Nothing is written if the actions differ by more than 1e-4.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from booster_soccer import errors
from booster_soccer.agents.policy import LAYERS, policy_from_arrays
from booster_soccer.agents.torch_networks import HIDDEN, Actor, Critic
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, PRIVILEGED_SIZE
from booster_soccer.store import checkpoints

NUM_CRITICS = 2
MAX_ACTION_DIFFERENCE = checkpoints.GOLDEN_TOLERANCE
LOG_STD_RANGE = (-5.0, 2.0)
MAX_LOG_STD_OUTSIDE = 0.01  # share of entries out of range from which conversion is refused
_CRITIC_NORMS = ("input_norm", "hidden_norm")
_TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_START_NOISE_RAD = 0.02  # so that the deterministic goalie start gives more than one trajectory
_DRAWS_PER_REAL = 0.5  # drawn observations beside the real ones


@dataclass(frozen=True)
class Config:
    """What to convert."""

    checkpoint: Path  # "pretrained" checkpoint directory
    out: Path  # new directory for the "converted" checkpoint
    real_observations: int = 64  # per task, played in the official environments by the policy itself
    seed: int = 0  # of those episodes and of the drawn observations


# --- the arithmetic -----------------------------------------------------------------------------------


def fold_normalizer(
    kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (out, in) and bias (out,) of a layer on raw inputs that equals `kernel` (in, out) on normalised ones.

    (x - mean) / std @ kernel + bias = x @ (kernel / std) + (bias - mean / std @ kernel). The first
    `len(mean)` inputs are normalised, the others (a critic's action) are not. Computed in float64.
    """
    rest = kernel.shape[0] - len(mean)
    mean = np.concatenate([mean, np.zeros(rest)]).astype(np.float64)
    std = np.concatenate([std, np.ones(rest)]).astype(np.float64)
    scaled = kernel.astype(np.float64) / std[:, None]
    return scaled.T.astype(np.float32), (bias.astype(np.float64) - mean @ scaled).astype(np.float32)


def convert(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a converted checkpoint from those of a pre-trained one."""
    networks = {"actor": _network(arrays, "actor")}
    for source in ("critic", "target_critic"):
        for i in range(NUM_CRITICS):
            networks[f"{source}.{i}"] = {name: pair[i] for name, pair in _network(arrays, source).items()}
            # What only the pre-training critics see stays behind, as if it were zero: fine-tuning's learn first anyway.
            hidden = slice(OBS_SIZE, CRITIC_OBS_SIZE)
            networks[f"{source}.{i}"]["input.kernel"] = np.delete(networks[f"{source}.{i}"]["input.kernel"], hidden, 0)
    converted = {}
    for prefix, layers in networks.items():
        first = layers.pop("input.kernel"), layers.pop("input.bias")
        weight, bias = fold_normalizer(*first, arrays["normalizer.mean"], arrays["normalizer.std"])
        converted |= {f"{prefix}.input.weight": weight, f"{prefix}.input.bias": bias}
        for name, value in layers.items():
            layer, kind = name.split(".")
            converted[f"{prefix}.{layer}.{_TORCH_NAME[kind]}"] = value.T  # a vector is its own transpose
    for kind in ("weight", "bias"):  # the first twelve outputs are the means; log_std is dropped
        converted[f"actor.output.{kind}"] = converted[f"actor.output.{kind}"][: c.NUM_JOINTS]
    return {name: np.array(value, dtype=np.float32, order="C") for name, value in converted.items()}


def _network(arrays: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The arrays named `source.*`, without that prefix."""
    return {name.removeprefix(f"{source}."): a for name, a in arrays.items() if name.startswith(f"{source}.")}


def load_module(module: torch.nn.Module, prefix: str, arrays: dict[str, np.ndarray]) -> torch.nn.Module:
    """`module` with the arrays named `prefix.*`."""
    state = {name: torch.from_numpy(arrays[f"{prefix}.{name}"].copy()) for name in module.state_dict()}
    module.load_state_dict(state)
    return module


def critics_from_arrays(arrays: dict[str, np.ndarray], prefix: str) -> torch.nn.ModuleList:
    """The critics named `prefix.{0,1}.*`."""
    return torch.nn.ModuleList(load_module(Critic(), f"{prefix}.{i}", arrays) for i in range(NUM_CRITICS))


# --- the checks ---------------------------------------------------------------------------------------


def check_new(out: Path) -> None:
    """Raise `UserError`, before any work is done, unless a checkpoint can be written to `out`."""
    checkpoints.check_output_dir(out)
    if (out / checkpoints.MANIFEST).exists():
        raise UserError(f"{out} already holds a checkpoint: choose another --out or move it away")


def check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raise `UserError` unless the arrays are those of a pre-trained checkpoint of this architecture."""
    expected = {"normalizer.mean": (OBS_SIZE,), "normalizer.std": (OBS_SIZE,)}
    sizes = {"actor": (OBS_SIZE, HIDDEN, HIDDEN, 2 * c.NUM_JOINTS)}
    sizes |= dict.fromkeys(("critic", "target_critic"), (CRITIC_OBS_SIZE + c.NUM_JOINTS, HIDDEN, HIDDEN, 1))
    for network, widths in sizes.items():
        lead = () if network == "actor" else (NUM_CRITICS,)
        for layer, inputs, outputs in zip(LAYERS, widths, widths[1:]):
            expected[f"{network}.{layer}.kernel"] = (*lead, inputs, outputs)
            expected[f"{network}.{layer}.bias"] = (*lead, outputs)
        for norm in _CRITIC_NORMS if lead else ():
            expected[f"{network}.{norm}.scale"] = expected[f"{network}.{norm}.bias"] = (*lead, HIDDEN)
    for name, shape in expected.items():
        found = arrays[name].shape if name in arrays else "missing"
        if found != shape:
            raise UserError(
                f"checkpoint {path}: {name} should have shape {shape}, found {found}: "
                "it was written by other code; pre-train again with this one"
            )
    if not (arrays["normalizer.std"] > 0).all():
        raise UserError(f"checkpoint {path}: normalizer.std is not positive: pre-train again")


def check_log_std(log_std: np.ndarray) -> dict:
    """Report of raw log_std (N, 12) by joint; raises `UserError` if 1 % or more lie outside [-5, 2]."""
    low, high = LOG_STD_RANGE
    outside = 1.0 - float(np.mean((low <= log_std) & (log_std <= high)))  # NaN is outside
    if outside >= MAX_LOG_STD_OUTSIDE:
        raise UserError(
            f"{outside:.1%} of the policy's log_std lie outside [{low:g}, {high:g}], from {log_std.min():.2f} "
            f"to {log_std.max():.2f}: its training diverged; take an earlier checkpoint or train longer"
        )
    by_joint = {
        joint: {"min": float(column.min()), "mean": float(column.mean()), "max": float(column.max())}
        for joint, column in zip(c.JOINT_NAMES, log_std.T)
    }
    return {"range": LOG_STD_RANGE, "share_outside": outside, "by_joint": by_joint}


def compare(
    arrays: dict[str, np.ndarray], converted: dict[str, np.ndarray], obs: np.ndarray, action: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """Largest differences between JAX and PyTorch on (N, 87) and (N, 12), and JAX's raw log_std (N, 12).

    Values are compared relative to max(1, |value|).
    """
    import jax  # only this comparison needs it: PyTorch stages do not

    from booster_soccer.agents import sac_networks

    with jax.default_matmul_precision("highest"):
        normalized = (obs - arrays["normalizer.mean"]) / arrays["normalizer.std"]
        critic_obs = np.pad(normalized, ((0, 0), (0, PRIVILEGED_SIZE)))
        actor = sac_networks.unflatten("actor", arrays)
        _, log_std = sac_networks.actor_output(actor, normalized)
        jax_action = np.asarray(sac_networks.mean_action(actor, normalized))
        jax_values = {
            name: np.asarray(sac_networks.q_values(sac_networks.unflatten(name, arrays), critic_obs, action))
            for name in ("critic", "target_critic")
        }
    with torch.no_grad():
        obs_t, action_t = torch.from_numpy(obs), torch.from_numpy(action)
        differences = {"actor": np.abs(load_module(Actor(), "actor", converted)(obs_t).numpy() - jax_action).max()}
        for name, expected in jax_values.items():
            values = np.stack([critic(obs_t, action_t).numpy() for critic in critics_from_arrays(converted, name)])
            differences[name] = (np.abs(values - expected) / np.maximum(1.0, np.abs(expected))).max()
    return {name: float(value) for name, value in differences.items()}, np.asarray(log_std)


def check_differences(differences: dict[str, float]) -> None:
    """Raise `UserError` unless JAX and PyTorch actors agree."""
    if not differences["actor"] <= MAX_ACTION_DIFFERENCE:  # also when it is NaN
        raise UserError(
            f"actions of JAX and PyTorch differ by {differences['actor']:.1e}, more than "
            f"{MAX_ACTION_DIFFERENCE:.0e}: nothing was written; look at normalizer.std (tiny entries make huge "
            "weights), or use the code that trained the checkpoint"
        )


def observations(config: Config, checkpoint: checkpoints.Checkpoint) -> dict[str, np.ndarray]:
    """Golden, real and drawn observations, each (N, 87) float32."""
    groups = {"golden": checkpoint.golden_obs}
    if config.real_observations:
        from booster_soccer.rollout.play import met_observations

        policy = policy_from_arrays(checkpoint.arrays)
        groups["real"] = met_observations(policy, config.real_observations, config.seed, _START_NOISE_RAD)
        rng = np.random.default_rng(config.seed)
        noise = rng.standard_normal((int(_DRAWS_PER_REAL * len(groups["real"])), OBS_SIZE))
        drawn = checkpoint.arrays["normalizer.mean"] + checkpoint.arrays["normalizer.std"] * noise
        groups["drawn"] = drawn.astype(np.float32)
    return groups


# --- the stage ----------------------------------------------------------------------------------------


def main(config: Config) -> Path:
    """Convert, check, write; returns the output directory."""
    if config.real_observations < 0 or config.seed < 0:
        raise UserError(f"real_observations ({config.real_observations}) and seed ({config.seed}) must be at least 0")
    checkpoint = checkpoints.load(config.checkpoint, stages=("pretrained",))
    check_arrays(config.checkpoint, checkpoint.arrays)
    check_new(config.out)
    converted = convert(checkpoint.arrays)

    groups = observations(config, checkpoint)
    obs = np.concatenate(list(groups.values()))
    action = policy_from_arrays(checkpoint.arrays)(obs).astype(np.float32)
    differences, log_std = compare(checkpoint.arrays, converted, obs, action)
    met = len(groups["golden"]) + len(groups.get("real", ()))  # drawn observations lie where no robot goes
    spread = check_log_std(log_std[:met])
    check_differences(differences)

    metrics = {
        "observations": {name: len(group) for name, group in groups.items()},
        "max_difference": differences,
        "log_std": spread,
    }
    path = checkpoints.save(
        config.out,
        "converted",
        converted,
        checkpoint.golden_obs,
        policy_from_arrays(converted)(checkpoint.golden_obs).astype(np.float32),
        asdict(config),
        config.seed,
        checkpoint.manifest["steps"],
        checkpoint,
        metrics,
    )
    _print(metrics)
    print(path)
    return path


def _print(metrics: dict) -> None:
    console = Console()
    counts = ", ".join(f"{count} {name}" for name, count in metrics["observations"].items())
    gate = Table(title=f"JAX against PyTorch on observations: {counts}")
    for column in ("network", "largest difference", "limit"):
        gate.add_column(column)
    for name, difference in metrics["max_difference"].items():
        limit = f"{MAX_ACTION_DIFFERENCE:.0e}" if name == "actor" else "reported, relative"
        gate.add_row(name, f"{difference:.1e}", limit)
    console.print(gate)
    spread = Table(title="log_std before clipping, on golden and real observations")
    for column in ("joint", "min", "mean", "max"):
        spread.add_column(column)
    for joint, row in metrics["log_std"]["by_joint"].items():
        spread.add_row(joint, *(f"{row[name]:+.2f}" for name in ("min", "mean", "max")))
    console.print(spread)
    outside = metrics["log_std"]["share_outside"]
    if outside:
        console.print(f"warning: {outside:.2%} of log_std lie outside {LOG_STD_RANGE}")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
