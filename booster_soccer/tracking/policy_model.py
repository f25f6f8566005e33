"""The policy as MLflow serves it: observations (B, 87) in, actions (B, 12) in [-1, 1] out.

MLflow copies this one file into the model and runs it where the model is loaded, so it imports nothing but NumPy and
MLflow: neither JAX nor PyTorch nor this repository. The arithmetic is that of `agents/policy.py`, to the bit.
"""

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Policy(PythonModel):
    """tanh(W3 silu(W2 silu(W1 x + b1) + b2) + b3) of x = (observation - mean) / std, in float64, rounded once."""

    def load_context(self, context) -> None:
        """Read the arrays that `registry.register` wrote."""
        with np.load(context.artifacts["policy"], allow_pickle=False) as arrays:
            self.layers = [(arrays[f"kernel_{i}"], arrays[f"bias_{i}"]) for i in range(3)]
            self.mean, self.std = arrays["mean"], arrays["std"]

    def predict(self, context, model_input, params=None):
        """Actions (B, 12) float32 for observations (B, 87), see `preprocess/observation.py` for their order."""
        x = (np.asarray(model_input, np.float64) - self.mean) / self.std
        for kernel, bias in self.layers[:-1]:
            x = x @ kernel + bias
            x = x / (1.0 + np.exp(-np.maximum(x, -80.0)))
        kernel, bias = self.layers[-1]
        return np.tanh(x @ kernel + bias).astype(np.float32)


set_model(Policy())
