"""Checkpoints: saved so that a complete one exists at every instant, loaded so that no code in one can run.

A file holds tensors and primitives only and is read with ``weights_only=True``. Its keys: ``format`` (a number),
``model``, ``optimizer``, ``scheduler``, ``scaler``, ``generators``, ``callbacks`` (by class name), ``progress``,
``history``, ``stop_reason``, ``train_loss`` (the sums since the last evaluation), ``rng``.
"""

import os
import random
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from torch import nn

from fitwatch.state import Progress, State

FORMAT = 1


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself where `torch.compile` wrapped it, so that names are the same compiled or not."""
    return getattr(model, "_orig_mod", model)


def save(path: Path, state: State) -> None:
    """Write a checkpoint of ``state`` to ``path``: whole, or not at all.

    Raises:
        OSError: It could not be written; the message names the path, and what stood there still stands.
    """
    state.pull_loss()
    content = {
        "format": FORMAT,
        "model": unwrap(state.model).state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict() if state.scheduler is not None else None,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "generators": [g.get_state() for g in _generators(state)],
        "callbacks": state.callbacks.state_dict() if state.callbacks is not None else {},
        "progress": asdict(state.progress),
        "history": state.history,
        "stop_reason": state.stop_reason,
        "train_loss": [state.train_loss.total, state.train_loss.weight],
        "rng": rng_state(),
    }
    write(path, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` atomically and durably."""
    # In the same folder: a rename across file systems is a copy, which can be cut off half-way.
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise OSError(f"could not write the checkpoint {path}: {error}") from error
        raise


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, as data only.

    Raises:
        FileNotFoundError: There is none at ``path``.
        ValueError: It is no checkpoint of this format, or holds more than tensors and primitives.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can't be read as a checkpoint: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has checkpoint format {found!r}; this version reads format {FORMAT}")
    return dict(content)


def load(path: Path, state: State) -> None:
    """Bring ``state`` to where it was when ``path`` was saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, was saved in mid-epoch, or does not fit the model, optimizer or scheduler.
    """
    content = read(path)
    progress = Progress(**content["progress"])
    if progress.epoch_batch:
        raise ValueError(
            f"{path} was saved before the end of an epoch (epoch {progress.epoch}, after {progress.epoch_batch} "
            "batches); "
            "training resumes at the boundary of an epoch only: use a checkpoint saved by every_epochs"
        )
    for name, part in (("scheduler", state.scheduler), ("scaler", state.scaler)):
        if (part is None) != (content[name] is None):
            raise ValueError(f"{path} was saved {'without' if content[name] is None else 'with'} a {name}")
    try:
        unwrap(state.model).load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(content["scheduler"])
        if state.scaler is not None:
            state.scaler.load_state_dict(content["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not fit this training: {error}") from error
    if state.callbacks is not None:
        state.callbacks.load_state_dict(content["callbacks"])
    state.progress, state.history = progress, content["history"]
    state.stop_reason = content["stop_reason"]  # a training that had stopped has nothing to go on with
    state.metrics = state.history[-1] if state.history else {}
    state.train_loss.total, state.train_loss.weight = content["train_loss"]
    generators = _generators(state)
    if len(generators) != len(content["generators"]):
        raise ValueError(
            f"{path} was saved with {len(content['generators'])} random generators in the loaders and their "
            f"samplers, and these have {len(generators)}: the order of the batches could not be resumed"
        )
    for generator, saved in zip(generators, content["generators"], strict=True):
        generator.set_state(saved)
    set_rng_state(content["rng"])
    state.resumed = True


def find(callbacks: Iterable[Any]) -> Path | None:
    """The newest checkpoint of the attached `Checkpoint`, for ``resume="auto"``; None if it has none yet."""
    for callback in callbacks:
        if hasattr(callback, "latest"):
            latest: Path | None = callback.latest()
            return latest
    raise ValueError('resume="auto" needs a Checkpoint among the callbacks, to know the folder')


def seed_all(seed: int) -> None:
    """Seed torch, Python and (where it is in use) NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _generators(state: State) -> list[torch.Generator]:
    """The generators that the loaders and their samplers own, which the global seed does not reach."""
    owners = [
        o for loader in (state.train_loader, state.val_loader) for o in (loader, getattr(loader, "sampler", None))
    ]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [g for i, g in enumerate(found) if isinstance(g, torch.Generator) and not any(g is f for f in found[:i])]


def rng_state() -> dict[str, Any]:
    """The state of torch's, Python's and (where it is in use) NumPy's global generators, as primitives."""
    kind, python, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [kind, list(python), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), *(float(r) if isinstance(r, float) else int(r) for r in rest)]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Take back what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    kind, python, gauss = state["python"]
    random.setstate((kind, tuple(python), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy as np  # noqa: PLC0415 - tensorboard brings it along; not worth an import where unused

        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - the global one
