"""States as named NumPy arrays: random generators, and the check that saved arrays fit."""

from collections.abc import Mapping

import numpy as np

from booster_soccer.errors import More, UserError


def rng_array(rng: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator, (6,) uint64."""
    state = rng.bit_generator.state
    words = [word >> shift & (2**64 - 1) for word in state["state"].values() for shift in (0, 64)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], np.uint64)


def restore_rng(rng: np.random.Generator, array: np.ndarray) -> None:
    """Bring a generator to the state that `rng_array` gave."""
    state, increment = (int(array[i]) | int(array[i + 1]) << 64 for i in (0, 2))
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": increment | 1},
        "has_uint32": int(array[4] != 0),
        "uinteger": int(array[5]) & (2**32 - 1),
    }


def check_like(arrays: Mapping[str, np.ndarray], template: Mapping[str, np.ndarray], what: str) -> None:
    """Raise `UserError` unless saved arrays have the names, shapes and types of a run of these settings."""
    for name in sorted(arrays.keys() | template.keys()):
        if name not in arrays or name not in template:
            raise UserError(f"{what} lacks or adds {name[:60]!r}: use the code that wrote it; {More.CHECKPOINT}")
        saved, ours = arrays[name], np.asarray(template[name])
        if (saved.shape, saved.dtype) != (ours.shape, ours.dtype):
            raise UserError(
                f"{what}: {name[:60]!r} is {saved.dtype}{saved.shape}, not {ours.dtype}{ours.shape}: "
                f"use the settings and code that wrote it; {More.CHECKPOINT}"
            )


def named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
