"""The settings of a training: checked, and described for reports."""

from pathlib import Path
from typing import Any

from fitwatch.callback import Callbacks
from fitwatch.data import batches
from fitwatch.data.sharding import gives_part
from fitwatch.options import check_counts
from fitwatch.saving import unwrap
from fitwatch.step import parameters


def describe(trainer: Any) -> dict[str, Any]:
    """Name -> value of everything worth a line; always the same names, so that runs compare in one table."""
    model, optimizer, loss, scheduler = trainer.model, trainer.optimizer, trainer.loss, trainer.scheduler
    options = {name: getattr(trainer, name) for name in ("accumulate", "clip_norm", "precision", "device", "seed")}
    options["device"] = str(trainer.device)
    group = optimizer.param_groups[0]
    return {
        "model": type(unwrap(model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": type(optimizer).__name__,
        "lr": float(group["lr"]),
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "scheduler": "none" if scheduler is None else type(scheduler).__name__,
        "loss_function": getattr(loss, "__name__", type(loss).__name__),
        "class_weights": "none",
        **{name: "none" if value is None else value for name, value in options.items()},
    }


def shared_facts(trainer: Any, train_loader: Any, val_loader: Any) -> dict[str, Any]:
    """What has to be the same on all ranks, or they would wait for each other without end."""
    return {
        "callbacks": [type(c).__name__ for c in Callbacks(trainer.callbacks).callbacks],
        **{name: _shape(loader) for name, loader in (("train_loader", train_loader), ("val_loader", val_loader))},
        "metrics": sorted(trainer.metrics or {}),
        **{name: getattr(trainer, name) for name in ("accumulate", "clip_norm", "precision", "log_every")},
        "parameters": [(tuple(p.shape), str(p.dtype)) for p in parameters(trainer.optimizer)],
    }


def _shape(loader: Any) -> str:
    """Of a loader, as far as it has to be the same on all ranks."""
    kind = "none" if loader is None else type(loader).__name__
    return kind if gives_part(loader) else f"{kind} of {batches.length(loader)} batches"


def check_fit(
    train_loader: Any, val_loader: Any, *, epochs: Any, max_steps: Any, validate_every: Any, resume: Any
) -> None:
    """Refuse arguments of `Trainer.fit` that are out of range, or can't go together."""
    if epochs is None and max_steps is None:
        raise ValueError("fit needs epochs= or max_steps=")
    check_counts(epochs=epochs, max_steps=max_steps, validate_every=validate_every)
    if not (resume is None or isinstance(resume, (str, Path))):
        raise TypeError(f'resume must be a path or "auto", got {resume!r}')
    if validate_every is not None and val_loader is None:
        raise ValueError("validate_every needs a val_loader")
    batches.check_loader("train_loader", train_loader)
    if val_loader is not None:
        batches.check_loader("val_loader", val_loader)
