"""Pre-trained (JAX) networks as PyTorch ones: mean policy and critics, the observation normaliser folded in.

The only module that knows both frameworks; JAX is imported where it is used.
"""

import numpy as np
import torch

from booster_soccer.agents.ddpg import NUM_CRITICS, Actor, critics_from_arrays, fold_normalizer, load_module
from booster_soccer.agents.policy import ACTION_LIMITS, HIDDEN, LAYERS, LOG_STD_RANGE
from booster_soccer.arrays import named
from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, PRIVILEGED_SIZE

_CRITIC_NORMS = ("input_norm", "hidden_norm")
_TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def convert(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a converted checkpoint from those of a pre-trained one; critics keep all their inputs."""
    networks = {"actor": named(arrays, "actor.")}
    for source in ("critic", "target_critic"):
        for i in range(NUM_CRITICS):
            networks[f"{source}.{i}"] = {name: pair[i] for name, pair in named(arrays, f"{source}.").items()}
    converted: dict[str, np.ndarray] = {}
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


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of a pre-trained checkpoint that conversion reads."""
    expected: dict[str, tuple[int, ...]] = {"normalizer.mean": (OBS_SIZE,), "normalizer.std": (OBS_SIZE,)}
    sizes = {"actor": (OBS_SIZE, HIDDEN, HIDDEN, 2 * c.NUM_JOINTS)}
    sizes |= dict.fromkeys(("critic", "target_critic"), (CRITIC_OBS_SIZE + c.NUM_JOINTS, HIDDEN, HIDDEN, 1))
    for network, widths in sizes.items():
        lead = () if network == "actor" else (NUM_CRITICS,)
        for layer, inputs, outputs in zip(LAYERS, widths, widths[1:]):
            expected[f"{network}.{layer}.kernel"] = (*lead, inputs, outputs)
            expected[f"{network}.{layer}.bias"] = (*lead, outputs)
        for norm in _CRITIC_NORMS if lead else ():
            expected[f"{network}.{norm}.scale"] = expected[f"{network}.{norm}.bias"] = (*lead, HIDDEN)
    return expected


def compare(arrays: dict[str, np.ndarray], converted: dict[str, np.ndarray], obs: np.ndarray) -> dict[str, float]:
    """Largest differences between JAX and PyTorch on observations (N, 87).

    `float64` and `float32` are those of the actor's actions, computed so on both sides; `critic` and `target_critic`
    those of values in float32, relative to max(1, |value|), with drawn privileged numbers and actions.
    """
    import jax  # only these comparisons need it: PyTorch stages do not

    from booster_soccer.agents import sac

    rng = np.random.default_rng(0)
    privileged = rng.standard_normal((len(obs), PRIVILEGED_SIZE)).astype(np.float32)
    action = rng.uniform(-1.0, 1.0, (len(obs), c.NUM_JOINTS)).astype(np.float32)
    differences = {}
    for name in ("float64", "float32"):
        with jax.enable_x64(name == "float64"), jax.default_matmul_precision("highest"), torch.no_grad():
            wide = {key: value.astype(name) for key, value in arrays.items()}
            normalized = (obs.astype(name) - wide["normalizer.mean"]) / wide["normalizer.std"]
            in_jax = np.asarray(sac.mean_action(sac.unflatten("actor", wide), normalized))
            actor = load_module(Actor(), "actor", converted).to(getattr(torch, name))
            in_torch = actor(torch.from_numpy(obs.astype(name))).numpy()
        differences[name] = np.abs(in_torch - in_jax).max()
    critic_obs = np.concatenate([obs, privileged], axis=-1)
    for name in ("critic", "target_critic"):
        with jax.default_matmul_precision("highest"), torch.no_grad():
            seen = np.concatenate([normalized, privileged], axis=-1)
            in_jax = np.asarray(sac.q_values(sac.unflatten(name, arrays), seen, action))
            inputs = torch.from_numpy(critic_obs), torch.from_numpy(action)
            in_torch = np.stack([critic(*inputs).numpy() for critic in critics_from_arrays(converted, name)])
        differences[name] = (np.abs(in_torch - in_jax) / np.maximum(1.0, np.abs(in_jax))).max()
    return {name: float(value) for name, value in differences.items()}


def log_std(arrays: dict[str, np.ndarray], obs: np.ndarray) -> np.ndarray:
    """Raw log_std (N, 12), before clipping, of a pre-trained policy on observations (N, 87)."""
    from booster_soccer.agents import sac

    normalized = (obs - arrays["normalizer.mean"]) / arrays["normalizer.std"]
    return np.asarray(sac.actor_output(sac.unflatten("actor", arrays), normalized)[1])


def log_std_report(values: np.ndarray) -> dict:
    """Smallest, mean and largest raw log_std (N, 12), by joint too; the one rule is that all lie in [-5, 2]."""

    def spread(column: np.ndarray) -> dict[str, float]:
        return {"min": float(column.min()), "mean": float(column.mean()), "max": float(column.max())}

    low, high = LOG_STD_RANGE
    inside = bool(((low <= values) & (values <= high)).all())  # NaN is outside
    by_joint = {joint: spread(column) for joint, column in zip(c.JOINT_NAMES, values.T)}
    return spread(values) | {"range": LOG_STD_RANGE, "inside": inside, "by_joint": by_joint}


def check_conversion(differences: dict[str, float], spread: dict) -> None:
    """Raise `UserError` unless the actors agree and log_std lies in its range."""
    for name, limit in ACTION_LIMITS.items():
        if not differences[name] <= limit:  # also when it is NaN
            raise UserError(
                f"actions of JAX and PyTorch in {name} differ by {differences[name]:.1e}, more than {limit:.0e}: "
                "nothing was written; look at normalizer.std (tiny entries make huge weights), or use "
                f"the code that trained the checkpoint; {More.GATE}"
            )
    if not spread["inside"]:
        raise UserError(
            f"the policy's log_std goes from {spread['min']:.2f} to {spread['max']:.2f}, outside {LOG_STD_RANGE}: "
            f"its training diverged; take an earlier checkpoint or train longer; {More.GATE}"
        )
