"""Checkpoint files: written atomically, and read without running code.

A file holds tensors and primitives only and is read with ``weights_only=True``. Its keys: ``format`` (an integer),
``version`` (of fitwatch), ``model``, ``trained`` (the weights in training, if the model's are others: an average),
``loss`` (its parameters), ``optimizer``, ``groups`` (names of its parameters),
``frozen`` (parameters that are not trained), ``scheduler``, ``scaler``, ``generators`` (of the loaders, their samplers
and data sets), ``callbacks`` (by class name), ``guard`` (counts of steps left out), ``calibration`` (of the model, if
it is measured), ``settings``, ``progress``, ``history``, ``train_loss`` (the sums since the last evaluation), ``rng``
(of rank 0), ``position`` (within an epoch: random states at its start, and the loader's own state), and
``other_ranks`` (``rng``, ``generators`` and ``position`` of the others).
"""

import logging
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import asdict, frozen
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fitwatch import files, ranks, resuming, schema
from fitwatch.calibration.calibrated import Calibration, Fitted
from fitwatch.data.position import random_states, set_random_states
from fitwatch.helpers import modules
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.primitives import plain_data, unreadable
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.restoring import restore_counters, undone_on_failure
from fitwatch.state import State
from fitwatch.version import __version__

logger = logging.getLogger("fitwatch")

FORMAT = 3
_UNSEALED = 2  # the format before, which differs only in that it has no checksum
_VERSIONS = {1: "0.1"}  # of fitwatch, by the format that it wrote, before files named it

Content = StateDict


def content_of(state: State, *, weights: StateDict | None = None) -> Content | None:
    """Return what a checkpoint of ``state`` holds, to be given to `write`. All ranks call it; None on all but rank 0.

    The tensors are those of the training, not copies.

    Args:
        state: What is saved.
        weights: Saved as the model's weights. None: the current ones.
    """
    state.train_loss.pull()
    since = state.train_loss.since_evaluation
    train_loss = ranks.sums([since.total, since.weight])
    loaders = (state.train_loader, state.val_loader, *state.val_loaders.values())
    generators = random_states(*loaders)
    validating = {"val_loader": state.val_loader, **state.val_loaders}
    position = state.position.saved(state.train_loader, validating, within=state.progress.epoch_batch > 0)
    (rng, generators, position), *others = ranks.gather((rng_state(), generators, position))
    if ranks.rank():
        return None
    return {
        "format": FORMAT,
        "version": __version__,
        "model": modules.weights(state.model) if weights is None else weights,
        "trained": _trained(state, weights),
        "loss": _loss_parameters(state),
        "optimizer": state.optimizer.state_dict(),
        "groups": resuming.group_names(state.optimizer, _named(state)),
        "frozen": [name for name, p in modules.named_parameters(state.model) if not p.requires_grad],
        "scheduler": state.scheduler.state_dict() if state.scheduler is not None else None,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "generators": generators,
        "callbacks": state.callbacks.state_dict() if state.callbacks is not None else {},
        "guard": state.guard.state_dict() if state.guard is not None else {},
        "calibration": None if state.calibration is None else state.calibration.state_dict(),
        "settings": {name: str(value) for name, value in state.settings.items()},
        "progress": asdict(state.progress),
        "history": list(state.history.entries),
        "train_loss": train_loss,
        "rng": rng,
        "position": position,
        "other_ranks": [dict(zip(("rng", "generators", "position"), other, strict=True)) for other in others],
    }


def _trained(state: State, measured: StateDict | None) -> StateDict | None:
    """Return the weights in training, to resume with, if others were measured and are saved as the model's."""
    own = modules.weights(state.model)
    if measured is None or all(torch.equal(own[n], w) for n, w in measured.items() if isinstance(w, Tensor)):
        return None
    return own


def write(path: Path, content: Content) -> None:
    """Write ``content`` to ``path``, atomically and durably; it is read again before it gets its name.

    Raises:
        OSError: It could not be written; the message names the path.
        ValueError: It can't be read again; the message names the key.
    """
    content = plain_data(content)
    try:
        with files.appearing(path) as (descriptor, name):
            try:
                # By a name, so that torch writes it without Python: Ctrl-C inside a Python file would end the process.
                torch.save(content, name)
                _load(Path(name), data=False)
            except (AttributeError, TypeError, ValueError, pickle.PickleError) as error:
                raise ValueError(f"the checkpoint {path} was not written: {_reason(content, error)}") from error
            files.seal(descriptor)
    except BaseException as error:
        # Torch raises another error when it closes the file that Ctrl-C cut off.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise OSError(f"could not write the checkpoint {path}: {error}") from error
        raise


def _reason(content: Content, error: Exception) -> str:
    found = unreadable(content)
    if found is None:
        return str(error)
    place, value = found
    return (
        f"{place} is {' '.join(repr(value).split()):.80}, of type {type(value).__name__}, and a file holds only "
        "tensors, numbers, strings, None, and lists, tuples and dicts of them"
    )


def _load(path: Path, *, data: bool = True) -> object:
    """Read a file as data only; with ``data=False`` in a millisecond, since the values of tensors stay on the disk."""
    if data:
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError):  # a file system without mmap
        return torch.load(path, map_location="cpu", weights_only=True)


class DamagedError(ValueError):
    """A file that is not what was saved, or not a checkpoint at all."""


def read(path: Path, *, data: bool = True, verify: bool | None = None) -> Content:
    """Read a checkpoint, as data only.

    Args:
        path: The file.
        data: False: the values of tensors stay on the disk, until they are used.
        verify: Whether to compute the checksum, for which the whole file is read. Default: with ``data``.

    Raises:
        FileNotFoundError: There is no file at ``path``.
        DamagedError: It is incomplete or changed, not a checkpoint, or holds more than tensors and primitives.
        ValueError: It is a checkpoint of another format.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: name a file in it, such as {path / 'epoch-1.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    verify = data if verify is None else verify
    sealed = files.sealed(path) if verify else None
    if sealed is False:
        raise DamagedError(f"{path} is damaged: its content does not have the checksum that was saved with it")
    try:
        content = _load(path, data=data)
    except Exception as error:
        raise DamagedError(f"{path} can't be read as a checkpoint: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(found, int):
        raise DamagedError(f"{path} is not a checkpoint of fitwatch: it has no format number")
    if found not in (_UNSEALED, FORMAT):
        writer = content.get("version", _VERSIONS.get(found, "another version"))
        raise ValueError(
            f"{path} was written by fitwatch {writer} (checkpoint format {found}), and this is fitwatch "
            f"{__version__}, which reads formats {_UNSEALED} and {FORMAT} only: finish that training with the version "
            "that started it, or load the weights alone: torch.load(path)['model']"
        )
    if verify and sealed is None:
        _check_unsealed(path, found)
    return content


def _check_unsealed(path: Path, found: int) -> None:
    """Raise DamagedError if a file lacks the checksum of its format, or its parts lack those of a zip file."""
    if found == FORMAT:
        raise DamagedError(f"{path} is damaged, or was not written by fitwatch: it has no checksum")
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # of many kinds, for a changed header
        raise DamagedError(f"{path} is damaged: {error}") from error
    if part is not None:
        raise DamagedError(f"{path} is damaged: its part {part} does not have its checksum")


@frozen
class Before:
    """What a checkpoint says about the fit that saved it.

    Attributes:
        settings: Its settings.
        changes: Options of optimizer and scheduler that differ from those of the script, in words.
        kept: Whether they hold.
    """

    settings: dict[str, str]
    changes: list[str]
    kept: bool


def load(path: Path, state: State, *, kept: bool = True) -> Before:
    """Restore ``state`` from the checkpoint at ``path``, wholly or not at all.

    Args:
        path: The file.
        state: The state of a fit that has not started.
        kept: Whether the options of optimizer and scheduler in the file hold; else those of the script.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, or does not fit the model, optimizer, scheduler or loader.
    """
    content = read(path)
    loaders = (state.train_loader, state.val_loader, *state.val_loaders.values())
    schema.check(path, content, state, named=_named(state), loss=_loss_parameters(state))
    with undone_on_failure(state, *loaders):
        try:
            changes = _apply(content, state, loaders, kept=kept)
        except _Unfit as error:
            raise ValueError(f"{path} does not fit this training: {error}") from error.__cause__
    state.resumed, state.resumed_from = True, path
    return Before(content["settings"], changes, kept)


class _Unfit(Exception):  # noqa: N818 - never leaves this module
    """A key, and what failed when its value was used."""


@contextmanager
def _using(key: str) -> Iterator[None]:
    """Name the key whose value a part does not take."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise _Unfit(f"{key}: {error}") from error


def _apply(content: Content, state: State, loaders: tuple[object, ...], *, kept: bool) -> list[str]:
    """Restore all parts; return what differs from the script."""
    with _using("callbacks"):
        if state.callbacks is not None:
            state.callbacks.load_state_dict(content["callbacks"])
    with _using("model"):
        modules.load_weights(state.model, content["trained"] or content["model"])
    with _using("loss"), torch.no_grad():
        for name, parameter in _loss_parameters(state).items():
            parameter.copy_(content["loss"][name])
    with _using("optimizer"):
        changes = _load_optimizer(content, state, kept=kept)
    with _using("scaler"):
        if state.scaler is not None:
            state.scaler.load_state_dict(content["scaler"])
    with _using("guard"):
        if state.guard is not None and content.get("guard"):
            state.guard.load_state_dict(content["guard"])
    with _using("calibration"):
        calibration = content.get("calibration")  # files of a fit without logits have none
        known = None if calibration is None else Calibration.from_state_dict(calibration)
    restore_counters(content, state)
    state.fitted = None if known is None else Fitted.of(known, state.progress.step)
    own = [content, *content["other_ranks"]][ranks.rank()]
    position = own["position"]
    with _using("position"):
        if position is not None and position["started"] is not None:  # used later: what does not fit must fail now
            set_random_states(position["started"]["sources"], loaders[0])
            set_rng_state(position["started"]["rng"])
    with _using("rng or generators"):
        state.position.resume(position, own["rng"], own["generators"], *loaders)
    return changes


def _load_optimizer(content: Content, state: State, *, kept: bool) -> list[str]:
    """Restore the optimizer and the scheduler; describe the options that differ."""
    optimizer, scheduler, saved = state.optimizer, state.scheduler, content["optimizer"]
    now = resuming.options(optimizer.param_groups)
    groups = resuming.options(saved["param_groups"])
    lr_moved = scheduler is not None or str(float(groups[0]["lr"])) != content["settings"].get("lr")
    changes = resuming.worded(resuming.optimizer_changes(groups, now, lr_moved=lr_moved), kept=kept)
    if scheduler is not None:
        differing = resuming.scheduler_changes(scheduler, content["scheduler"], scheduler.state_dict())
        changes += resuming.worded(differing, kept=kept)
    if kept:
        resuming.restore_trainable(state.model, content.get("frozen", []))
    elif scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        resuming.replay(scheduler, content["scheduler"])
        now = resuming.options(optimizer.param_groups)
    if "groups" in content:
        resuming.restore_groups(optimizer, content["groups"], saved, _named(state))
    optimizer.load_state_dict(saved)
    if kept:
        if scheduler is not None:
            scheduler.load_state_dict(content["scheduler"])
        return changes
    for group, own in zip(optimizer.param_groups, now, strict=False):
        lr = group["lr"]
        group.update(own)
        if isinstance(scheduler, ReduceLROnPlateau):  # what it has reduced stays reduced
            group["lr"] = lr
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.load_state_dict(resuming.with_own_options(scheduler, content["scheduler"]))
    return changes


def _named(state: State) -> dict[str, Tensor]:
    """Return the parameters of the model and of the loss by name."""
    named: dict[str, Tensor] = dict(modules.named_parameters(state.model))
    if isinstance(state.loss, nn.Module):
        named |= {f"loss.{name}": p for name, p in modules.named_parameters(state.loss)}
    return named


def _loss_parameters(state: State) -> dict[str, Tensor]:
    """Return the learned parameters of the loss. Class weights are not saved: their source supplies them again."""
    loss = state.loss
    return {name: p.detach() for name, p in modules.named_parameters(loss)} if isinstance(loss, nn.Module) else {}
