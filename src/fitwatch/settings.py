"""The settings of a training, for reports."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from fitwatch.checkpoint import unwrap


def describe(model: nn.Module, optimizer: Optimizer, loss: Any, scheduler: Any, **options: Any) -> dict[str, Any]:
    """Name -> value of everything worth a line; always the same names, so that runs compare in one table."""
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
