"""The global random generators of torch, Python and NumPy."""

import random
import sys

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
    kind, python, gauss = random.getstate()
    state: RngState = {"torch": torch.get_rng_state(), "python": [kind, list(python), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), *(float(r) if isinstance(r, float) else int(r) for r in rest)]
    return state


def set_rng_state(state: RngState) -> None:
    """Restore a state returned by `rng_state`."""
    torch.set_rng_state(state["torch"])
    kind, python, gauss = state["python"]
    random.setstate((kind, tuple(python), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "numpy" in state:
        import numpy as np  # noqa: PLC0415 - a dependency of tensorboard, imported only if it was in use

        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - the global one
