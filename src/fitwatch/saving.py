"""Checkpoints: saved so that a complete one exists at every instant, loaded so that no code in one can run.

A file holds tensors and primitives only and is read with ``weights_only=True``. Its keys: ``format`` (a number),
``model``, ``loss`` (its parameters), ``optimizer``, ``scheduler``, ``scaler``, ``generators`` (of the loaders),
``callbacks`` (by class name), ``progress``,
``history``, ``train_loss`` (the sums since the last evaluation), ``rng`` (of rank 0), ``other_ranks`` (``rng`` and
``generators`` of the others).
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitwatch import ranks
from fitwatch.data.batches import generators_of
from fitwatch.rng import rng_state, set_rng_state
from fitwatch.state import Progress, State

FORMAT = 1


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile` or `DistributedDataParallel` wrapped it: names are always the same."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def save(path: Path, state: State) -> None:
    """Write a checkpoint of ``state`` to ``path``: whole, or not at all. All ranks call it, and rank 0 writes.

    Raises:
        OSError: It could not be written; the message names the path, and what stood there still stands.
    """
    state.pull_loss()
    train_loss = ranks.sums([state.train_loss.total, state.train_loss.weight])
    generators = [g.get_state() for g in generators_of(state.train_loader, state.val_loader)]
    (rng, generators), *others = ranks.gather((rng_state(), generators))
    if ranks.rank():
        return
    content = {
        "format": FORMAT,
        "model": unwrap(state.model).state_dict(),
        "loss": _loss_parameters(state),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict() if state.scheduler is not None else None,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "generators": generators,
        "callbacks": state.callbacks.state_dict() if state.callbacks is not None else {},
        "settings": {name: str(value) for name, value in state.settings.items()},
        "progress": asdict(state.progress),
        "history": state.history,
        "train_loss": train_loss,
        "rng": rng,
        "other_ranks": [{"rng": own, "generators": theirs} for own, theirs in others],
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
        if isinstance(error.__context__, KeyboardInterrupt):  # closing the file it was cut off in, torch raises anew
            raise error.__context__ from None
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
    return {"other_ranks": [], "settings": {}, **content}  # which older files may lack


def load(path: Path, state: State) -> None:
    """Bring ``state`` to where it was when ``path`` was saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, was saved in mid-epoch, or does not fit the model, optimizer or scheduler.
    """
    content = read(path)
    progress = Progress(**content["progress"])
    generators = generators_of(state.train_loader, state.val_loader)
    _refuse(path, content, state, progress, len(generators))
    try:
        unwrap(state.model).load_state_dict(content["model"])
        with torch.no_grad():
            for name, parameter in _loss_parameters(state).items():
                parameter.copy_(content["loss"][name])
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
    state.metrics = state.history[-1] if state.history else {}
    if ranks.rank() == 0:  # a sum over the ranks
        state.train_loss.total, state.train_loss.weight = content["train_loss"]
    own = [content, *content["other_ranks"]][ranks.rank()]
    for generator, saved in zip(generators, own["generators"], strict=True):
        generator.set_state(saved)
    set_rng_state(own["rng"])
    state.resumed, state.settings_before = True, content["settings"]


def find(callbacks: Iterable[Any]) -> Path | None:
    """The newest checkpoint of the attached `Checkpoint`, for ``resume="auto"``; None if it has none yet."""
    for callback in callbacks:
        if hasattr(callback, "latest"):
            latest: Path | None = callback.latest()
            return latest
    raise ValueError('resume="auto" needs a Checkpoint among the callbacks, to know the folder')


def _refuse(path: Path, content: dict[str, Any], state: State, progress: Progress, generators: int) -> None:
    """Raise ValueError if ``content`` can't be resumed from, before anything of ``state`` is changed."""
    if progress.epoch_batch:
        raise ValueError(
            f"{path} was saved before the end of an epoch (epoch {progress.epoch}, after {progress.epoch_batch} "
            "batches); training resumes at the boundary of an epoch only: use a checkpoint saved by every_epochs"
        )
    saved_by = 1 + len(content["other_ranks"])
    if saved_by != ranks.size():
        raise ValueError(
            f"{path} was saved by {saved_by} rank{'s' * (saved_by > 1)}, and this fit has {ranks.size()}: a step would "
            "have other examples than it had"
        )
    kind, now = content["settings"].get("optimizer"), type(state.optimizer).__name__
    if kind not in (None, now):
        raise ValueError(f"{path} was saved with the optimizer {kind}, and this fit has {now}")
    for name, part in (("scheduler", state.scheduler), ("scaler", state.scaler)):
        if (part is None) != (content[name] is None):
            raise ValueError(f"{path} was saved {'without' if content[name] is None else 'with'} a {name}")
    if generators != len(content["generators"]):
        raise ValueError(
            f"{path} was saved with {len(content['generators'])} random generators in the loaders and their "
            f"samplers, and these have {generators}: the order of the batches could not be resumed"
        )


def _loss_parameters(state: State) -> dict[str, Tensor]:
    """What a loss learns; its class weights are not among it: they are the business of who gave them."""
    loss = state.loss
    return {name: p.detach() for name, p in loss.named_parameters()} if isinstance(loss, nn.Module) else {}
