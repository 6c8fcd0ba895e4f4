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

import errno
import logging
import os
import pickle
from contextlib import suppress
from pathlib import Path
from types import NoneType

import torch
from attrs import asdict, fields_dict, frozen
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fitwatch import ranks, resuming
from fitwatch.calibration.calibrated import Calibration, Fitted
from fitwatch.data.position import random_states
from fitwatch.helpers import modules
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.primitives import plain_data, unreadable
from fitwatch.helpers.rng import rng_state
from fitwatch.state import State
from fitwatch.state.progress import Progress
from fitwatch.version import __version__

logger = logging.getLogger("fitwatch")

FORMAT = 2
_VERSIONS = {1: "0.1"}  # of fitwatch, by the format that it wrote, before files named it

Content = StateDict


def save(path: Path, state: State, *, weights: StateDict | None = None) -> None:
    """Write a checkpoint of ``state`` to ``path``, completely or not at all. All ranks call it; rank 0 writes.

    Args:
        path: The file.
        state: What is saved.
        weights: Saved as the model's weights. None: the current ones.

    Raises:
        OSError: It could not be written; the message names the path, and the file that was there is unchanged.
        ValueError: It could not be read again; the message names the key.
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
        return
    content = {
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
        "history": state.history.entries,
        "train_loss": train_loss,
        "rng": rng,
        "position": position,
        "other_ranks": [dict(zip(("rng", "generators", "position"), other, strict=True)) for other in others],
    }
    write(path, content)


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
    # In the same folder: a rename across file systems is a copy, which can be cut off halfway.
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    content = plain_data(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # By its name, so that torch writes it without Python: Ctrl-C inside a Python file would end the process.
            torch.save(content, str(part))
            _load(part, data=False)
        except (AttributeError, TypeError, ValueError, pickle.PickleError) as error:
            raise ValueError(f"the checkpoint {path} was not written: {_reason(content, error)}") from error
        with part.open("r+b") as file:  # Windows flushes only what may be written
            _flush(file.fileno())
        part.replace(path)
        _flush_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        # Torch raises another error when it closes the file that Ctrl-C cut off.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise OSError(f"could not write the checkpoint {path}: {error}") from error
        raise


def _flush(descriptor: int) -> None:
    """Have the file system write a file or a folder to the disk, if it can.

    Raises:
        OSError: The disk is full or broken.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM}


def _flush_folder(folder: Path) -> None:
    """Have the rename itself survive a power cut, where folders can be opened: not on Windows and some mounts."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # the file has its name by now
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


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


def read(path: Path, *, data: bool = True) -> Content:
    """Read a checkpoint, as data only.

    Args:
        path: The file.
        data: False: the values of tensors stay on the disk, until they are used.

    Raises:
        FileNotFoundError: There is no file at ``path``.
        ValueError: It is not a checkpoint of this format, or holds more than tensors and primitives.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: name a file in it, such as {path / 'epoch-1.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        content = _load(path, data=data)
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
    """Restore ``state`` from the checkpoint at ``path``.

    Args:
        path: The file.
        state: The state of a fit that has not started.
        kept: Whether the options of optimizer and scheduler in the file hold; else those of the script.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, or does not fit the model, optimizer, scheduler or loader.
    """
    content = read(path)
    _check_kinds(path, content)
    loaders = (state.train_loader, state.val_loader, *state.val_loaders.values())
    _check(path, content, state, len(random_states(*loaders)))
    try:
        modules.load_weights(state.model, content["trained"] or content["model"])
        with torch.no_grad():
            for name, parameter in _loss_parameters(state).items():
                parameter.copy_(content["loss"][name])
        changes = _load_optimizer(content, state, kept=kept)
        if state.scaler is not None:
            state.scaler.load_state_dict(content["scaler"])
        if state.callbacks is not None:
            state.callbacks.load_state_dict(content["callbacks"])
        if state.guard is not None and content.get("guard"):
            state.guard.load_state_dict(content["guard"])
        calibration = content.get("calibration")  # older files have none
        known = None if calibration is None else Calibration.from_state_dict(calibration)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this training: {error}") from error
    for name, value in content["progress"].items():
        setattr(state.progress, name, value)
    state.fitted = None if known is None else Fitted.of(known, state.progress.step)
    state.history.entries = content["history"]
    if ranks.rank() == 0:  # the sums of all ranks
        since = state.train_loss.since_evaluation
        since.total, since.weight = content["train_loss"]
    own = [content, *content["other_ranks"]][ranks.rank()]
    state.position.resume(own["position"], own["rng"], own["generators"], *loaders)
    state.resumed, state.resumed_from = True, path
    return Before(content["settings"], changes, kept)


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


_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "trained": (dict, NoneType),
    "loss": dict,
    "optimizer": dict,
    "scheduler": (dict, NoneType),
    "scaler": (dict, NoneType),
    "generators": list,
    "callbacks": dict,
    "settings": dict,
    "progress": dict,
    "history": list,
    "train_loss": list,
    "rng": dict,
    "position": (dict, NoneType),
    "other_ranks": list,
}


def _check_kinds(path: Path, content: Content) -> None:
    """Raise ValueError if a value has another type than `save` gives it: counters become names of files."""
    for key, kind in _KINDS.items():
        if key not in content or not isinstance(content[key], kind):
            raise ValueError(
                f"{path} is not a valid checkpoint: {key} must be a {'list' if kind is list else 'dict'}, got "
                f"{content.get(key)!r:.80}"
            )
    counters = [("progress", name, value) for name, value in content["progress"].items()]
    for number, entry in enumerate(content["history"]):
        known = entry if isinstance(entry, dict) else {}
        counters += [(f"history[{number}]", name, known.get(name)) for name in ("epoch", "step")]
    for key, name, value in counters:
        if name not in fields_dict(Progress) or type(value) is not int or value < 0:
            raise ValueError(
                f"{path} is not a valid checkpoint: {key}[{name!r}] must be a counter of 0 or more, got {value!r:.80}"
            )


def _check(path: Path, content: Content, state: State, generators: int) -> None:
    """Raise ValueError if ``content`` can't be resumed from, before ``state`` is changed."""
    epoch, batch = content["progress"]["epoch"], content["progress"]["epoch_batch"]
    if batch and content["position"] is None:
        raise ValueError(
            f"{path} was saved within an epoch (epoch {epoch}, after {batch} batches) by a loop over its own loader, "
            "whose place is unknown: iterate over watch.train(), or use a checkpoint saved between epochs"
        )
    saved_by = 1 + len(content["other_ranks"])
    if saved_by != ranks.size():
        raise ValueError(
            f"{path} was saved by {saved_by} rank{'s' * (saved_by > 1)}, and this fit has {ranks.size()}: the steps "
            "would see different examples"
        )
    for name, part in (("scheduler", state.scheduler), ("scaler", state.scaler)):
        if (part is None) != (content[name] is None):
            raise ValueError(f"{path} was saved {'without' if content[name] is None else 'with'} a {name}")
    for name, part in (("optimizer", state.optimizer), ("scheduler", state.scheduler)):
        before, now = content["settings"].get(name), type(part).__name__
        if part is not None and before not in (None, now):
            raise ValueError(
                f"{path} was saved with the {name} {before}, and this fit has {now}, for which its state means "
                f"nothing: resume with {before}, or start a new fit from the weights alone: "
                "model.load_state_dict(torch.load(path)['model'])"
            )
    if generators != len(content["generators"]):
        raise ValueError(
            f"{path} was saved with {len(content['generators'])} random generators in the loaders and their "
            f"samplers, and these have {generators}: the order of the batches could not be resumed"
        )


def _loss_parameters(state: State) -> dict[str, Tensor]:
    """Return the learned parameters of the loss. Class weights are not saved: their source supplies them again."""
    loss = state.loss
    return {name: p.detach() for name, p in modules.named_parameters(loss)} if isinstance(loss, nn.Module) else {}
