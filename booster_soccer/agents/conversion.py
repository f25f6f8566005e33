"""Pre-trained (JAX) policies against their PyTorch conversions; JAX is imported where it is used."""

import numpy as np
import torch

from booster_soccer.agents.torch_networks import Actor
from booster_soccer.envs import constants as c

LOG_STD_RANGE = (-5.0, 2.0)

# Largest difference of an action, out of [-1, 1]. float32 sums in another order differ by up to 1.1e-5 once a policy
# kicks hard (measured after 11 M steps); a wrong weight by 1e-2.
ACTION_LIMITS = {"float64": 1e-5, "float32": 1e-4}


def load_module(module: torch.nn.Module, prefix: str, arrays: dict[str, np.ndarray]) -> torch.nn.Module:
    """`module` with the arrays named `prefix.*`."""
    state = {name: torch.from_numpy(arrays[f"{prefix}.{name}"].copy()) for name in module.state_dict()}
    module.load_state_dict(state)
    return module


def compare(arrays: dict[str, np.ndarray], converted: dict[str, np.ndarray], obs: np.ndarray) -> dict[str, float]:
    """Largest differences between JAX and PyTorch on observations (N, 87).

    `float64` and `float32` are those of the actor's actions, computed so on both sides.
    """
    import jax  # only these comparisons need it: PyTorch stages do not

    from booster_soccer.agents import sac_networks as sac

    differences = {}
    for name in ("float64", "float32"):
        with jax.enable_x64(name == "float64"), jax.default_matmul_precision("highest"), torch.no_grad():
            wide = {key: value.astype(name) for key, value in arrays.items()}
            normalized = (obs.astype(name) - wide["normalizer.mean"]) / wide["normalizer.std"]
            in_jax = np.asarray(sac.mean_action(sac.unflatten("actor", wide), normalized))
            actor = load_module(Actor(), "actor", converted).to(getattr(torch, name))
            in_torch = actor(torch.from_numpy(obs.astype(name))).numpy()
        differences[name] = np.abs(in_torch - in_jax).max()
    return {name: float(value) for name, value in differences.items()}


def log_std(arrays: dict[str, np.ndarray], obs: np.ndarray) -> np.ndarray:
    """Raw log_std (N, 12), before clipping, of a pre-trained policy on observations (N, 87)."""
    from booster_soccer.agents import sac_networks as sac

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
