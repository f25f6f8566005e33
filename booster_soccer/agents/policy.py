"""Deterministic policy of any checkpoint, in NumPy: 87 numbers in, 12 actions in [-1, 1] out.

Arrays of a pre-trained (JAX) checkpoint: `actor.{input,hidden,output}.{kernel,bias}` with kernels
(in, out) and an output of 24 = mean and log_std, and `normalizer.{mean,std}`. Arrays of a converted or
fine-tuned (PyTorch) one: `actor.{input,hidden,output}.{weight,bias}`, weights (out, in), 12 outputs, the
normaliser folded in.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c

LAYERS = ("input", "hidden", "output")  # of actor and critics, in both frameworks
HIDDEN = 256  # width of both hidden layers

# SAC clips log_std to this range in use: the upper end of 0 keeps tanh(N(mean, 1)) the widest policy (holosoma uses
# [-5, 0] too). What the network outputs before clipping must lie in the wider one, or its training diverged.
LOG_STD_CLIP = (-5.0, 0.0)
LOG_STD_RANGE = (-5.0, 2.0)

# Largest difference of an action, out of [-1, 1], between two computations of it. float32 sums in another order differ
# by up to 1.1e-5 once a policy kicks hard (measured after 11 M steps); a wrong weight by 1e-2.
ACTION_LIMITS = {"float64": 1e-5, "float32": 1e-4}


class NumpyPolicy(NamedTuple):
    """Mean policy tanh(W3 silu(W2 silu(W1 x + b1) + b2) + b3).

    Computed in float64 and rounded once to float32, as the submitted module does: float32 sums differ
    between BLAS libraries, float64 ones rounded to float32 practically never do.
    """

    kernels: tuple[np.ndarray, ...]  # (87, 256), (256, 256), (256, 12)
    biases: tuple[np.ndarray, ...]
    mean: np.ndarray  # (87,) subtracted first
    std: np.ndarray  # (87,) divided by next

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Actions (..., 12) in [-1, 1] for observations (..., 87)."""
        x = (np.asarray(obs, np.float64) - self.mean) / self.std
        for kernel, bias in zip(self.kernels[:-1], self.biases[:-1]):
            x = x @ kernel + bias
            x = x / (1.0 + np.exp(-np.maximum(x, -80.0)))
        return np.tanh(x @ self.kernels[-1] + self.biases[-1]).astype(np.float32)


def policy_from_arrays(arrays: Mapping[str, np.ndarray]) -> NumpyPolicy:
    """The mean policy from a checkpoint's arrays, of either layout."""
    if "actor.input.kernel" in arrays:
        kernels = [arrays[f"actor.{layer}.kernel"] for layer in LAYERS]
        biases = [arrays[f"actor.{layer}.bias"] for layer in LAYERS]
        kernels[-1], biases[-1] = kernels[-1][:, : c.NUM_JOINTS], biases[-1][: c.NUM_JOINTS]
        mean, std = arrays["normalizer.mean"], arrays["normalizer.std"]
    else:
        kernels = [arrays[f"actor.{layer}.weight"].T for layer in LAYERS]
        biases = [arrays[f"actor.{layer}.bias"] for layer in LAYERS]
        obs_size = kernels[0].shape[0]
        mean, std = np.zeros(obs_size), np.ones(obs_size)
    wide = [tuple(x.astype(np.float64) for x in group) for group in (kernels, biases, (mean, std))]
    return NumpyPolicy(wide[0], wide[1], *wide[2])
