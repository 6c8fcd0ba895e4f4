"""The settings of a fit, described for reports and compared between ranks and with a checkpoint."""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fitwatch.data import batches
from fitwatch.data.sharding import gives_part
from fitwatch.engine.step import parameters
from fitwatch.helpers.modules import unwrap, weights
from fitwatch.saving import Before
from fitwatch.state import State
from fitwatch.state.history import History
from fitwatch.state.progress import Plan

logger = logging.getLogger("fitwatch")

_FROM_CHECKPOINT = ("lr", "weight_decay")  # restored with the optimizer state of a checkpoint
_MAY_DIFFER = ("device", "seed")
_OPTIONS = (bool, int, float, str)


def describe(
    model: nn.Module, optimizer: Optimizer, loss: object, scheduler: object, *, plan: Plan, more: Mapping[str, object]
) -> dict[str, object]:
    """Return the settings to report, name -> value; the names never vary, so that runs can be compared."""
    group = optimizer.param_groups[0]
    settings: dict[str, object] = {
        "model": type(unwrap(model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters() if not is_lazy(p)),
        "optimizer": type(optimizer).__name__,
        "lr": float(group["lr"]),
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "scheduler": "none" if scheduler is None else type(scheduler).__name__,
        "loss_function": getattr(loss, "__name__", type(loss).__name__),
        "class_weights": "none",
        "accumulate": plan.accumulate,
        "clip_norm": plan.clip_norm,
        "precision": "fp32",
        "device": "cpu",
        "seed": None,
        **more,
    }
    return {name: "none" if value is None else value for name, value in settings.items()}


def warn_of_changes(state: State, before: Before) -> None:
    """Warn once about settings that differ from those of the checkpoint that training resumes from."""
    now = {name: str(value) for name, value in state.settings.items()}
    changes = [
        f"{name} {now[name]} (was {was}{', which is kept' * (before.kept and name in _FROM_CHECKPOINT)})"
        for name, was in before.settings.items()
        if name not in _MAY_DIFFER and now.get(name, was) != was
    ]
    changes += before.changes
    if changes:
        logger.warning(
            "resumed with different settings: %s; losses before and after may not be comparable%s",
            ", ".join(changes),
            '; options_from="script" takes those of the script' * any("which is kept" in change for change in changes),
        )


def continued(history: History | None, model: nn.Module, val_loader: object) -> History:
    """Return the history to continue; an empty one, with a warning, if the model has other weights by now."""
    shapes = {n: tuple(w.shape) for n, w in weights(model).items() if isinstance(w, Tensor) and not is_lazy(w)}
    facts: dict[str, object] = {"weights": shapes, "examples": _examples(val_loader)}
    history = History() if history is None else history
    before = history.facts if history else facts
    if before["weights"] != shapes:
        logger.warning(
            "the model has other weights (by name or shape) than in the last fit, so its best ones can't be restored: "
            "a new history begins, as with reset=True"
        )
        history = History()
    elif before["examples"] not in (None, facts["examples"]) and facts["examples"] is not None:
        logger.warning(
            "the validation set has %s examples, and had %s in the last fit: the best evaluation is chosen over both; "
            "if they don't compare, pass reset=True to fit, or no history to the Watch",
            facts["examples"],
            before["examples"],
        )
    if history and "loss" in history.facts:
        facts["loss"] = history.facts["loss"]  # until this fit's is known
    history.facts = facts
    return history


def warn_of_another_loss(history: History, loss: object) -> None:
    """Warn if validation measures another loss than in the last fit; callbacks have set it by now."""
    now, before = (loss, _described(loss)), history.facts.get("loss")
    history.facts["loss"] = now
    if not (history and isinstance(before, tuple)) or before[1] == now[1]:
        return
    if before[0] is loss and not _is_known(loss):  # it may change its own attributes in training
        return
    name, was = (getattr(one, "__name__", type(one).__name__) for one in (loss, before[0]))
    what = f"is {name}, and was {was}" if name != was else f"({name}) has other options or weights than"
    logger.warning(
        "the loss %s in the last fit: the best evaluation is chosen over both; if they don't compare, pass reset=True "
        "to fit, or no history to the Watch",
        what,
    )


def _described(loss: object) -> list[object]:
    """Return what tells losses apart: types, options, and the constants in the buffers of known types."""
    if isinstance(loss, functools.partial):
        return [*_described(loss.func), repr(loss.args), repr(loss.keywords)]
    code = getattr(loss, "__code__", None)
    if code is not None:
        return [code]
    found: list[object] = []
    for part in loss.modules() if isinstance(loss, nn.Module) else [loss]:
        attributes = getattr(part, "__dict__", {}).items()
        options = {name: value for name, value in attributes if isinstance(value, _OPTIONS) and name != "training"}
        constants = part.named_buffers(recurse=False) if isinstance(part, nn.Module) and _is_known(part) else ()
        found += [type(part), options, {name: values.tolist() for name, values in constants}]
    return found


def _is_known(loss: object) -> bool:
    """Return whether it is a loss of fitwatch or torch, which training does not change."""
    return type(loss).__module__.partition(".")[0] in ("fitwatch", "torch")


def _examples(loader: object) -> int | None:
    """Return the number of examples in a loader, or of batches in a list; None if unknown."""
    source = getattr(loader, "dataset", loader)
    return None if loader is None else batches.length(source)


def shared_facts(state: State, callbacks: Iterable[object]) -> dict[str, Any]:
    """Return the settings that must be equal on all ranks; otherwise these would wait for each other forever."""
    return {
        "callbacks": [type(c).__name__ for c in callbacks],
        "train_loader": _shape(state.train_loader),
        "val_loader": _shape(state.val_loader),
        "val_loaders": {name: _shape(loader) for name, loader in state.val_loaders.items()},
        "metrics": sorted(state.validation.metrics),
        "accumulate": state.plan.accumulate,
        "clip_norm": state.plan.clip_norm,
        "log_every": state.plan.log_every,
        "max_steps": state.plan.max_steps,
        "precision": state.settings["precision"],
        "parameters": [(tuple(p.shape), str(p.dtype)) for p in parameters(state.optimizer)],
    }


def _shape(loader: object) -> str:
    """Describe the properties of a loader that all ranks must share."""
    kind = "none" if loader is None else type(loader).__name__
    return kind if gives_part(loader) else f"{kind} of {batches.length(loader)} batches"
