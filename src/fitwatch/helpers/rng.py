"""The global random generators of torch, Python and NumPy."""

import ast
import random
import sys
from typing import Any

import torch

from fitwatch.helpers.aliases import StateDict

RngState = StateDict  # primitives and tensors, by library


def seed_all(seed: int) -> None:
    """Seed torch, Python and, if it is imported, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def rng_state() -> RngState:
    """Return the state of the global generators of torch, Python and, if it is imported, NumPy."""
    state: RngState = {"torch": torch.get_rng_state(), "python": python_state(random)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        state["numpy"] = numpy_state(sys.modules["numpy"].random)
    return state


def set_rng_state(state: RngState) -> None:
    """Restore a state returned by `rng_state`."""
    torch.set_rng_state(state["torch"])
    set_python_state(random, state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "numpy" in state:
        import numpy as np  # noqa: PLC0415 - a dependency of tensorboard, imported only if it was in use

        set_numpy_state(np.random, state["numpy"])


def python_state(source: Any) -> list[Any]:
    """Return the state of a ``random.Random``, or of the module."""
    kind, values, gauss = source.getstate()
    return [kind, list(values), gauss]


def set_python_state(source: Any, state: list[Any]) -> None:
    """Restore what `python_state` returned."""
    kind, values, gauss = state
    source.setstate((kind, tuple(values), gauss))


def numpy_state(source: Any) -> list[Any]:
    """Return the state of NumPy's ``Generator`` or ``RandomState``, or of the module, as primitives."""
    if not hasattr(source, "get_state"):
        return ["generator", repr(_plain(source.bit_generator.state))]  # integers of 128 bits
    name, keys, *rest = source.get_state()
    return [name, keys.tolist(), *(float(r) if isinstance(r, float) else int(r) for r in rest)]


def set_numpy_state(source: Any, state: list[Any]) -> None:
    """Restore what `numpy_state` returned."""
    if not hasattr(source, "set_state"):
        source.bit_generator.state = ast.literal_eval(state[1])
    else:
        name, keys, *rest = state
        source.set_state((name, keys, *rest))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
