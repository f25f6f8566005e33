"""The deterministic policy as an ONNX file, which a robot's computer runs without PyTorch, JAX or this repository.

Input `obs` (N, 87) float32, output `action` (N, 12) float32 in [-1, 1]. What else a robot has to know stands in the
file's metadata: the PD layer that turns an action into torque, and the checkpoint that the policy came from.
Needs the extra `onnx`.
"""

from collections.abc import Mapping

import numpy as np

from booster_soccer.agents.ddpg import fold_normalizer
from booster_soccer.agents.policy import ACTION_LIMITS, LAYERS, NumpyPolicy
from booster_soccer.errors import More, UserError

_OPSET, _IR_VERSION = 17, 8  # of 2022: what robots have; nothing newer is needed


def to_bytes(policy: NumpyPolicy, metadata: Mapping[str, str]) -> bytes:
    """The content of an ONNX file; the observation's normaliser is folded into the first layer."""
    onnx = _import("onnx")
    from onnx import TensorProto, helper, numpy_helper

    kernels, biases = list(policy.kernels), list(policy.biases)
    weight, biases[0] = fold_normalizer(kernels[0], biases[0], policy.mean, policy.std)
    kernels[0] = weight.T
    nodes, weights, inner = [], [], "obs"
    for layer, kernel, bias in zip(LAYERS, kernels, biases, strict=True):
        for kind, values in (("kernel", kernel), ("bias", bias)):
            weights.append(numpy_helper.from_array(values.astype(np.float32), f"{layer}.{kind}"))
        nodes.append(helper.make_node("Gemm", [inner, f"{layer}.kernel", f"{layer}.bias"], [layer]))
        inner = layer
        if layer != LAYERS[-1]:  # SiLU: x sigmoid(x)
            nodes.append(helper.make_node("Sigmoid", [layer], [f"{layer}.sigmoid"]))
            nodes.append(helper.make_node("Mul", [layer, f"{layer}.sigmoid"], [f"{layer}.silu"]))
            inner = f"{layer}.silu"
    nodes.append(helper.make_node("Tanh", [inner], ["action"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        for name, size in (("obs", len(kernels[0])), ("action", len(biases[-1])))
    ]
    graph = helper.make_graph(nodes, "policy", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def check(content: bytes, obs: np.ndarray, actions: np.ndarray) -> float:
    """Largest difference of actions (N, 12) on observations (N, 87), together and one by one, as ONNX Runtime has them.

    Raises `UserError` if it is more than float32 explains.
    """
    session = _import("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    together = session.run(["action"], {"obs": obs})[0]
    single = np.concatenate([session.run(["action"], {"obs": row[None]})[0] for row in obs])
    difference = float(np.abs(np.stack([together, single]) - actions).max())
    if not difference <= ACTION_LIMITS["float32"]:  # also when it is NaN
        raise UserError(
            f"actions of ONNX Runtime differ by {difference:.1e} from the golden ones, more than "
            f"{ACTION_LIMITS['float32']:.0e}: nothing was written; install the pinned versions (constraints.txt); "
            f"{More.VERSIONS}"
        )
    return difference


def _import(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(
            f"cannot import {name} ({error}): install it with pip install -c constraints.txt -e '.[onnx]'"
        ) from error
