"""Recall, precision and average precision of each class, measured where the classes have names."""

from collections.abc import Container, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from fitwatch.helpers.dtypes import wide_float
from fitwatch.losses import BinaryCrossEntropy, ExpectedCost, RealWorldCrossEntropy
from fitwatch.losses.base import ClassLoss

KINDS = ("recall", "precision", "average_precision")


def as_class_names(classes: object) -> tuple[str, ...] | None:
    """Return the names of the classes, or None.

    Raises:
        TypeError: They are not a sequence of strings.
        ValueError: There are fewer than two, or two are the same, or one is empty.
    """
    if classes is None:
        return None
    if not isinstance(classes, Sequence) or isinstance(classes, (str, bytes)):
        raise TypeError(f"classes must be a list of names, such as ['healthy', 'ill'], got {classes!r}")
    names = tuple(classes)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"classes must be names, that is strings, in the order of the class indices, got {classes!r}")
    if len(names) < 2 or len({*names}) < len(names) or not all(name.strip() for name in names):
        raise ValueError(f"classes must be two or more names, all different and none empty, got {classes!r}")
    return tuple(map(str, names))


def check_class_names(names: Sequence[str], output: Tensor) -> None:
    """Raise a ValueError if logits, of shape (N, C, ...) or (N,), are those of another number of classes."""
    columns = output.shape[1] if output.dim() > 1 else 1
    if columns != len(names) and not (columns == 1 and len(names) == 2):
        raise ValueError(
            f"classes has {len(names)} names, {', '.join(names)}, but the model has {columns} outputs for each example "
            f"(shape {tuple(output.shape)}): give one name for each output, in the order of the class indices"
        )


def per_class(loss: object, names: Sequence[str] | None, taken: Container[str]) -> dict[str, "PerClass"]:
    """Return the metrics of named classes by name, for a loss whose outputs are logits; ``taken`` are the user's."""
    if names is None or not has_classes(loss):
        return {}
    ignored = getattr(loss, "ignore_index", None)
    several = isinstance(loss, BinaryCrossEntropy)
    return {kind: PerClass(kind, tuple(names), ignored, several) for kind in KINDS if kind not in taken}


def has_classes(loss: object) -> bool:
    """Return whether outputs for a loss are logits of classes or of labels."""
    return isinstance(loss, (ClassLoss, BinaryCrossEntropy, ExpectedCost, RealWorldCrossEntropy))


@frozen(eq=False)
class PerClass:
    """A metric: one of `KINDS` for each class.

    The recall of a class is the share of its examples that are predicted to be of it, the precision the share of the
    examples predicted to be of it that are. The average precision is the sum of P_n (R_n - R_{n-1}) over all thresholds
    on its probability. Precision is 0 if the class is never predicted; the other two are NaN if it has no examples.

    Args:
        kind: Which one.
        classes: The names.
        ignore_index: Label to leave out, or None.
        several: Whether labels do not exclude each other, as for `BinaryCrossEntropy`.
    """

    kind: str
    classes: tuple[str, ...]
    ignore_index: int | None
    several: bool

    def __call__(self, outputs: Any, targets: Any, sample_weight: Tensor | None = None) -> list[float]:
        """Return a number for each class.

        Args:
            outputs: Logits of shape (N, C, ...), or one logit, of shape (N,) or (N, 1, ...).
            targets: Class indices of shape (N, ...), or probabilities or labels of the shape of the logits.
            sample_weight: Weight of each example, shape (N,), or of each position.

        Raises:
            TypeError: Outputs and targets are not tensors.
            ValueError: There is another number of classes.
        """
        if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            raise TypeError(
                f"classes= measures the {self.kind} of each class from logits and targets, and got "
                f"{type(outputs).__name__} and {type(targets).__name__}: pass the logits to update_metrics in "
                "validation_step, or leave classes out"
            )
        check_class_names(self.classes, outputs)
        scores, decided, positive, weights = self._columns(outputs.detach(), targets.detach(), sample_weight)
        if self.kind == "average_precision":
            found = [_average_precision(*parts) for parts in zip(scores.T, positive.T, weights.T, strict=True)]
            return torch.stack(found).tolist()
        hits = (decided * positive * weights).sum(0)
        if self.kind == "precision":
            chosen = (decided * weights).sum(0)
            return torch.where(chosen > 0, hits / chosen, 0.0).tolist()
        return (hits / (positive * weights).sum(0)).tolist()

    def _columns(self, z: Tensor, targets: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, ...]:
        """Return scores, decisions, targets in [0, 1] and weights, each with a column for each class."""
        wide = wide_float(z.device)
        z = z.to(wide)
        z = z.unsqueeze(1) if z.dim() == 1 else z
        weights = torch.ones((len(z), *z.shape[2:]), dtype=wide, device=z.device)
        if sample_weight is not None:
            given = sample_weight.detach().to(weights)
            given = given.reshape(weights.shape) if given.numel() == weights.numel() else given
            weights = weights * given.reshape(*given.shape, *[1] * (weights.dim() - given.dim()))
        z, weights = _rows(z), weights.reshape(-1, 1)
        if z.shape[1] == 1 or self.several:
            y = targets.reshape(-1, 1) if z.shape[1] == 1 else _rows(targets)
            weights = weights * (y != self.ignore_index) if self.ignore_index is not None else weights.expand_as(y)
            y = y.to(wide)
            if z.shape[1] == 1:
                y, z, weights = torch.cat([1 - y, y], 1), torch.cat([-z, z], 1), weights.expand(-1, 2)
                return z, torch.stack([z[:, 1] <= 0, z[:, 1] > 0], 1), y, weights
            return z, z > 0, y, weights
        if targets.is_floating_point():
            y = _rows(targets).to(wide)
        else:
            labels = targets.reshape(-1).long()
            valid = (labels >= 0) & (labels < z.shape[1]) & (labels != self.ignore_index)
            y = torch.nn.functional.one_hot(labels.where(valid, 0), z.shape[1]).to(wide)
            weights = weights * valid.unsqueeze(1)
        decided = torch.nn.functional.one_hot(z.argmax(1), z.shape[1]).bool()
        return _log_odds(z), decided, y, weights.expand_as(z)


def _rows(values: Tensor) -> Tensor:
    """Return (N, C, ...) as (positions, C)."""
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def _log_odds(z: Tensor) -> Tensor:
    """Return the log-odds of each class; unlike probabilities they do not all round to 1 for a confident model."""
    columns = range(z.shape[1])
    others = [torch.cat([z[:, :k], z[:, k + 1 :]], 1).logsumexp(1) for k in columns]
    return (z - torch.stack(others, 1)).float()  # so that equal examples tie, whatever the rounding of their sums


def _average_precision(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    order = scores.argsort(descending=True)
    scores, weights = scores[order], weights[order]
    last = torch.ones_like(scores, dtype=torch.bool)  # of the examples with one score: a threshold takes all of them
    last[:-1] = scores[1:] != scores[:-1]
    hits, chosen = (positive[order] * weights).cumsum(0)[last], weights.cumsum(0)[last]
    gained = hits.diff(prepend=hits.new_zeros(1))
    return (gained * hits / chosen.clamp_min(1e-300)).sum() / hits[-1]
