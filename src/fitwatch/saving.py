"""Checkpoint files: written atomically, and read without running code.

A file holds tensors and primitives only and is read with ``weights_only=True``. Its keys: ``format`` (an integer),
``version`` (of fitwatch), ``model``, ``loss`` (its parameters), ``optimizer``, ``scheduler``, ``scaler``,
``generators`` (of the loaders), ``callbacks`` (by class name), ``settings``, ``progress``, ``history``,
``train_loss`` (the sums since the last evaluation), ``rng`` (of rank 0), and ``other_ranks`` (``rng`` and
``generators`` of the others).
"""

import copy
import os
from contextlib import suppress
from pathlib import Path

import torch
from attrs import asdict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitwatch import ranks
from fitwatch.data.batches import generators_of
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.state import State
from fitwatch.version import __version__

FORMAT = 2
_VERSIONS = {1: "0.1"}  # of fitwatch, by the format that it wrote, before files named it

Content = StateDict


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` or `DistributedDataParallel` wrapped, so that names do not change."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def copied_weights(model: nn.Module) -> StateDict:
    """Return a copy of the parameters and buffers of a model, as a state dict without the names of wrappers."""
    weights = unwrap(model).state_dict()
    return {name: w.detach().clone() if isinstance(w, Tensor) else copy.deepcopy(w) for name, w in weights.items()}


def save(path: Path, state: State, *, weights: StateDict | None = None) -> None:
    """Write a checkpoint of ``state`` to ``path``, completely or not at all. All ranks call it; rank 0 writes.

    Args:
        path: The file.
        state: What is saved.
        weights: Saved as the model's weights. None: the current ones.

    Raises:
        OSError: It could not be written; the message names the path, and the file that was there is unchanged.
    """
    state.train_loss.pull()
    since = state.train_loss.since_evaluation
    train_loss = ranks.sums([since.total, since.weight])
    generators = [
        g.get_state() for g in generators_of(state.train_loader, state.val_loader, *state.val_loaders.values())
    ]
    (rng, generators), *others = ranks.gather((rng_state(), generators))
    if ranks.rank():
        return
    content = {
        "format": FORMAT,
        "version": __version__,
        "model": unwrap(state.model).state_dict() if weights is None else weights,
        "loss": _loss_parameters(state),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict() if state.scheduler is not None else None,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "generators": generators,
        "callbacks": state.callbacks.state_dict() if state.callbacks is not None else {},
        "settings": {name: str(value) for name, value in state.settings.items()},
        "progress": asdict(state.progress),
        "history": state.history.entries,
        "train_loss": train_loss,
        "rng": rng,
        "other_ranks": [{"rng": own, "generators": theirs} for own, theirs in others],
    }
    write(path, content)


def write(path: Path, content: Content) -> None:
    """Write ``content`` to ``path``, atomically and durably.

    Raises:
        OSError: It could not be written; the message names the path.
    """
    # In the same folder: a rename across file systems is a copy, which can be cut off halfway.
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # By its name, so that torch writes it without Python: Ctrl-C inside a Python file would end the process.
        torch.save(content, str(part))
        with part.open("rb") as file:
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
        # Torch raises another error when it closes the file that Ctrl-C cut off.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise OSError(f"could not write the checkpoint {path}: {error}") from error
        raise


def read(path: Path) -> Content:
    """Read a checkpoint, as data only.

    Raises:
        FileNotFoundError: There is no file at ``path``.
        ValueError: It is not a checkpoint of this format, or holds more than tensors and primitives.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can't be read as a checkpoint: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(found, int):
        raise ValueError(  # noqa: TRY004 - the argument has the right type
            f"{path} is not a checkpoint of fitwatch: it has no format number"
        )
    if found != FORMAT:
        writer = content.get("version", _VERSIONS.get(found, "another version"))
        raise ValueError(
            f"{path} was written by fitwatch {writer} (checkpoint format {found}), and this is fitwatch "
            f"{__version__}, which reads format {FORMAT} only: finish that training with the version that "
            "started it, or load the weights alone: torch.load(path)['model']"
        )
    return content


def load(path: Path, state: State) -> dict[str, str]:
    """Restore ``state`` from the checkpoint at ``path``.

    Returns:
        The settings of the fit that saved it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, was saved mid-epoch, or does not fit the model, optimizer or scheduler.
    """
    content = read(path)
    generators = generators_of(state.train_loader, state.val_loader, *state.val_loaders.values())
    _check(path, content, state, len(generators))
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
    for name, value in content["progress"].items():
        setattr(state.progress, name, value)
    state.history.entries = content["history"]
    if ranks.rank() == 0:  # the sums of all ranks
        since = state.train_loss.since_evaluation
        since.total, since.weight = content["train_loss"]
    own = [content, *content["other_ranks"]][ranks.rank()]
    for generator, saved in zip(generators, own["generators"], strict=True):
        generator.set_state(saved)
    set_rng_state(own["rng"])
    state.resumed = True
    settings: dict[str, str] = content["settings"]
    return settings


def _check(path: Path, content: Content, state: State, generators: int) -> None:
    """Raise ValueError if ``content`` can't be resumed from, before ``state`` is changed."""
    epoch, batch = content["progress"]["epoch"], content["progress"]["epoch_batch"]
    if batch:
        raise ValueError(
            f"{path} was saved before the end of an epoch (epoch {epoch}, after {batch} batches); training resumes "
            "only between epochs: use a checkpoint saved by every_epochs"
        )
    saved_by = 1 + len(content["other_ranks"])
    if saved_by != ranks.size():
        raise ValueError(
            f"{path} was saved by {saved_by} rank{'s' * (saved_by > 1)}, and this fit has {ranks.size()}: the steps "
            "would see different examples"
        )
    before, now = content["settings"].get("optimizer"), type(state.optimizer).__name__
    if before not in (None, now):
        raise ValueError(f"{path} was saved with the optimizer {before}, and this fit has {now}")
    for name, part in (("scheduler", state.scheduler), ("scaler", state.scaler)):
        if (part is None) != (content[name] is None):
            raise ValueError(f"{path} was saved {'without' if content[name] is None else 'with'} a {name}")
    if generators != len(content["generators"]):
        raise ValueError(
            f"{path} was saved with {len(content['generators'])} random generators in the loaders and their "
            f"samplers, and these have {generators}: the order of the batches could not be resumed"
        )


def _loss_parameters(state: State) -> dict[str, Tensor]:
    """Return the learned parameters of the loss. Class weights are not saved: their source supplies them again."""
    loss = state.loss
    return {name: p.detach() for name, p in loss.named_parameters()} if isinstance(loss, nn.Module) else {}
