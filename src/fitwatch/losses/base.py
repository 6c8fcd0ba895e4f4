"""The base classes of all losses."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from fitwatch.helpers.options import plain
from fitwatch.losses.errors import check_binary, check_classes, check_types, check_values
from fitwatch.losses.weighting import as_class_weights

PRECISE = frozenset({torch.float32, torch.float64})
"""The dtypes that losses compute in; outputs in half precision are computed in float32."""

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
"""What torch raises for invalid outputs or targets, to be replaced by a descriptive error."""


class LossFunction(Protocol):
    """A plain loss function: takes outputs and targets, returns the mean over the batch as a scalar tensor."""

    def __call__(self, output: Any, target: Any, /) -> Tensor: ...


class LossSum(NamedTuple):
    """A weighted mean, not yet divided.

    Attributes:
        total: The sum of w_i l_i, 0-dim, differentiable.
        weight: The sum of w_i, 0-dim or a number.
    """

    total: Tensor
    weight: Tensor | float

    @property
    def mean(self) -> Tensor:
        """Total over weight; nan where the weight is 0."""
        return self.total / self.weight

    # A training step may add a penalty or apply a factor: arithmetic on the mean, not on the tuple.
    def __add__(self, penalty: Tensor | float | tuple[object, ...]) -> LossSum:
        """Add a penalty, 0-dim or a number, to the mean."""
        if isinstance(penalty, tuple):
            raise TypeError("a LossSum can't be added to another, since their weights may differ: add their means")
        return LossSum(self.total + penalty * self.weight, self.weight)

    def __radd__(self, penalty: Tensor | float) -> LossSum:
        return self + penalty

    def __mul__(self, factor: Tensor | float) -> LossSum:  # type: ignore[override] # tuples repeat
        """Multiply the loss by a factor, 0-dim or a number."""
        return LossSum(self.total * factor, self.weight)

    def __rmul__(self, factor: Tensor | float) -> LossSum:  # type: ignore[override] # as above
        return self * factor


class Loss(nn.Module, abc.ABC):
    """Base class of losses that return weighted sums.

    Subclasses implement `unreduced`; everything else follows from it, weights of the examples included.
    """

    _classes_first: ClassVar[bool] = False  # whether outputs have their classes in dimension 1, before the positions

    def forward(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Return the weighted mean over the batch, 0-dim: `sums(output, target, sample_weight).mean`."""
        fused = self._fused(output, target, mean=True) if sample_weight is None else None
        return self.sums(output, target, sample_weight).mean if fused is None else fused[0]

    @abc.abstractmethod
    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        """Compute the weighted losses w_i l_i and the weights w_i, before any reduction.

        Args:
            output: Outputs of the model, as the class documents them.
            target: Targets, as the class documents them.

        Returns:
            Both of shape (N,), or (N, d1, ...) where an example has several positions (pixels, labels). The
            weights may be a single number for all positions. Where you return a weight of 0, the loss must be finite:
            replace outputs there by `torch.where` before, since 0 times nan is nan in the gradient.

        Raises:
            ValueError: Shapes, dtypes or devices that do not fit; the message names them.
            IndexError: A class index out of range (on the CPU; other devices assert, as torch does).
            TypeError: Outputs or targets that are not tensors.
        """

    def sums(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> LossSum:
        """Compute the weighted sum over the batch and the sum of the weights.

        Args:
            output: As for `unreduced`.
            target: As for `unreduced`.
            sample_weight: Weight of each example, shape (N,), or of each position, with the shape of the positions;
                finite, at least 0, any dtype. It multiplies the loss's own weights. An example of weight 0 (a mask)
                adds nothing to the value and the gradient: its output and target may be nan or infinite. Values are
                checked on the CPU only.

        Returns:
            Sums to add up over batches and divide once.

        Raises:
            ValueError, IndexError, TypeError: As for `unreduced`, and for weights of another shape, or negative.
        """
        fused = self._fused(output, target, mean=False) if sample_weight is None else None
        if fused is not None:
            return LossSum(*fused)
        losses, weights = self._weighed(output, target, sample_weight)
        return LossSum(losses.sum(), weights.sum() if isinstance(weights, Tensor) else weights * losses.numel())

    def per_example(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the loss and the weight of every example; arguments as for `sums`.

        Returns:
            Losses and weights, both of shape (N,); sum(losses * weights) / sum(weights) is the loss of the batch.
            The weight of an example is the sum over its positions (pixels, labels), its loss their weighted mean,
            or 0 where the weight is 0.
        """
        losses, weights = self._weighed(output, target, sample_weight)
        if not isinstance(weights, Tensor):
            weights = torch.full_like(losses, weights)
        losses, weights = (t.reshape(-1) if t.dim() < 2 else t.flatten(1).sum(1) for t in (losses, weights))
        counts = weights != 0
        return torch.where(counts, losses / torch.where(counts, weights, 1), 0), weights

    def weighted(self, weights: Tensor) -> Loss:
        """Return a copy with these class weights, shape (C,), instead of its current ones.

        Raises:
            TypeError: The loss takes no class weights.
        """
        raise TypeError(f"{type(self).__name__} takes no class weights (got weights of shape {tuple(weights.shape)})")

    def unweighted(self) -> Loss:
        """Return the same loss without class weights."""
        return self

    @property
    def has_weights(self) -> bool:
        """Whether some classes count more than others."""
        return False

    @property
    def fixed_classes(self) -> int | None:
        """The number of classes that the loss's weights, costs or counts fix; None if it takes any number."""
        per_class = self._per_class()
        return None if per_class is None else len(per_class)

    def _per_class(self) -> Tensor | None:
        """Per-class tensor, shape (C, ...), or None."""
        return None

    def _fused(self, _output: Tensor, _target: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | float] | None:  # noqa: ARG002
        """Compute total and weight (or mean and 1) of the batch in one kernel; return None if no kernel takes it."""
        return None

    def _twin(self) -> Self:
        """Return a copy for other weights that shares all parameters, since no optimizer would know copies of them."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)  # noqa: SLF001 - of the same class
        return twin

    def _weighed(self, output: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor | float]:
        if sample_weight is None:
            return self.unreduced(output, target)
        classes_first = self._classes_first
        output = without_masked_outputs(output, sample_weight, classes_first=classes_first)
        target = without_masked(target, sample_weight, classes_first=classes_first)
        losses, weights = self.unreduced(output, target)
        scale = as_sample_weight(sample_weight, losses)
        # a masked loss may be infinite, and 0 times infinity is nan
        return torch.where(scale != 0, losses * scale, 0), weights * scale


AnyLoss: TypeAlias = Loss | LossFunction
"""What a user may give as a loss."""


class ClassLoss(Loss):
    """Base class of losses over exclusive classes, with optional class weights.

    Args:
        weight: Class weights, shape (C,), finite, at least 0, not all 0. Kept as a buffer.
        ignore_index: Class index of positions that do not count.
    """

    weight: Tensor | None
    _classes_first = True

    def __init__(self, weight: Tensor | Sequence[float] | None = None, *, ignore_index: int = -100) -> None:
        super().__init__()
        self._searched: Tensor | None = None  # the weights in which zeros were looked for
        self._has_zeros = False
        index = plain(ignore_index)
        if not isinstance(index, int):
            raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")  # noqa: TRY004
        self.register_buffer("weight", None if weight is None else as_class_weights(weight))
        self.ignore_index = index

    def weighted(self, weights: Tensor) -> Self:
        loss = self._twin()
        loss.weight = as_class_weights(weights)
        return loss

    def unweighted(self) -> Self:
        loss = self._twin()
        loss.weight = None
        return loss

    @property
    def has_weights(self) -> bool:
        return self._buffers["weight"] is not None

    def extra_repr(self) -> str:
        weight = None if self.weight is None else self.weight.tolist()
        return f"weight={weight}, ignore_index={self.ignore_index}"

    def _per_class(self) -> Tensor | None:
        return self.weight

    def _weights(self, labels: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight of each position: that of its class, or 0 where it does not count."""
        weights = counts.to(dtype)
        return weights if self.weight is None else weights * self.weight.to(dtype)[labels]

    def _as_weighted_classes(
        self, output: Tensor, target: Tensor, per_class: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `as_classes` with the weights of the positions; logits without weight are 0."""
        logits, labels, counts = as_classes(output, target, per_class, self.ignore_index)
        weights = self._weights(labels, counts, logits.dtype)
        if self._some_weigh_nothing():
            logits = torch.where(weights.unsqueeze(-1) != 0, logits, 0)
        return logits, labels, weights

    def _some_weigh_nothing(self) -> bool:
        """Return whether a class has weight 0. Looks once at the same weights, since on a GPU this waits for it."""
        weight = self._buffers["weight"]
        if weight is not self._searched:
            self._searched, self._has_zeros = weight, weight is not None and not bool(weight.all())
        return self._has_zeros

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._searched = None  # the values were replaced in place


def as_classes(
    output: Tensor, target: Tensor, per_class: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check outputs and targets, see `as_two_classes` and `check_classes`, and bring them into one form.

    Returns:
        Logits in float32 or float64, (N, ..., C), and class indices in range, (N, ...), both 0 where ignored; and
        which positions count, (N, ...).
    """
    output, target = as_two_classes(output, target)
    check = partial(check_classes, output, target, per_class, ignore_index)
    check()
    if output.dim() == 1:
        output, target = output.unsqueeze(0), target.unsqueeze(0)
    logits, labels = precise(output).movedim(1, -1), target.long()
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    if may_ignore(labels, ignore_index):
        logits = torch.where(counts.unsqueeze(-1), logits, 0)
    labels = torch.where(counts, labels, 0)
    if labels.is_cpu and labels.numel():
        low, high = labels.aminmax()
        if low.item() < 0 or high.item() >= logits.shape[-1]:
            check(labels=True)
    return logits, labels, counts


def as_two_classes(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Turn one logit z, shape (N,) or (N, 1), into the logits (0, z) of two classes; return other outputs unchanged.

    One logit is known by targets of its own shape, any dtype; they must be 0 or 1 (checked on the CPU only).

    Raises:
        ValueError: A target is neither 0 nor 1.
    """
    check_types(output, target)
    if output.shape != target.shape or output.dim() not in (1, 2) or (output.dim() == 2 and output.shape[1] != 1):
        return output, target
    labels = target.reshape(-1)
    if labels.is_cpu:
        check_binary("binary targets must be 0 or 1", labels, (labels != 0) & (labels != 1))
    z = output.reshape(-1)
    return torch.stack([torch.zeros_like(z), z], 1), labels.long()


def as_sample_weight(sample_weight: Tensor, like: Tensor) -> Tensor:
    """Expand weights of examples or positions to the shape of ``like``, the losses of shape (N, d1, ...).

    Raises:
        ValueError: The shape does not fit, or (checked on the CPU only) a weight is negative or not finite.
    """
    if not isinstance(sample_weight, Tensor):
        raise TypeError(
            f"sample_weight must be a tensor, got {type(sample_weight).__name__}: give a weight for each example; if "
            "this third part of the batch is not a weight, drop it, or override training_step and validation_step"
        )
    weight = sample_weight.detach().to(like.dtype)
    if weight.shape != like.shape:
        if weight.shape != like.shape[:1] and weight.shape != (*like.shape[:1], *[1] * (like.dim() - 1)):
            either = f" or {tuple(like.shape)}" if like.dim() > 1 else ""
            raise ValueError(
                f"sample_weight must have shape {tuple(like.shape[:1])}{either}, one weight for each example"
                f"{' or position' if either else ''}, got shape {tuple(sample_weight.shape)}"
            )
        weight = weight.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like)
    if weight.device != like.device:
        raise ValueError(f"sample_weight is on {weight.device} and the outputs are on {like.device}")
    if weight.is_cpu and weight.numel():
        low, high = weight.aminmax()
        if not (low.item() >= 0 and high.item() < torch.inf):  # nan fails both
            wrong = ~(weight.isfinite() & (weight >= 0))
            check_values("sample_weight must be finite and at least 0", weight, wrong)
    return weight


def without_masked(target: Tensor, sample_weight: Tensor, *, classes_first: bool = False) -> Tensor:
    """Replace targets of weight 0 by 0, since a nan there would reach the gradient."""
    counts = _counting(target, sample_weight, classes_first=classes_first)
    return target if counts is None else torch.where(counts, target, 0)


def without_masked_outputs(output: Tensor, sample_weight: Tensor, *, classes_first: bool) -> Tensor:
    """Cut outputs of weight 0 off from the gradient, and replace those that are not finite.

    The others keep their values, which a loss may need to be in a range; 0.5 is in that of logits and probabilities.
    """
    counts = _counting(output, sample_weight, classes_first=classes_first)
    return output if counts is None else torch.where(counts, output, output.detach().nan_to_num(0.5, 0.5, 0.5))


def _counting(values: Tensor, sample_weight: Tensor, *, classes_first: bool) -> Tensor | None:
    """Return where the weight is not 0, in a shape that broadcasts to that of ``values``.

    None if there is nothing to mask in ``values``, or the weights do not fit, which the loss then refuses.
    """
    if not (isinstance(values, Tensor) and isinstance(sample_weight, Tensor) and values.is_floating_point()):
        return None
    if values.device != sample_weight.device:
        return None
    given, shape = sample_weight.shape, values.shape
    counts = sample_weight != 0
    if given == shape or (given == (1,) and len(shape) == 1):  # one example of C classes has outputs (C,)
        return counts
    if given[:1] == shape[:1] and math.prod(given[1:]) == 1:  # one weight for each example
        return counts.reshape(-1, *[1] * (len(shape) - 1))
    by_position = counts.unsqueeze(1) if given == shape[:1] + shape[2:] else None
    if given != shape[: len(given)] or (by_position is not None and classes_first):
        return by_position
    leading = counts.reshape(*given, *[1] * (len(shape) - len(given)))
    return leading if by_position is None else by_position | leading  # either may be meant: mask what neither counts


def is_readable(values: Tensor) -> bool:
    """Return whether values can be read without waiting: on the CPU, not under `torch.compile` and `torch.func`."""
    # there is no public query for torch.func
    return values.is_cpu and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())  # noqa: SLF001


def may_ignore(target: Tensor, ignore_index: int | None) -> bool:
    """Return whether some class indices are ``ignore_index``; also True if the values can't be read."""
    if ignore_index is None:
        return False
    if not is_readable(target):
        return True
    if ignore_index >= 0:
        return bool((target == ignore_index).any())
    return target.numel() > 0 and target.min().item() < 0  # faster; other indices below 0 are refused later


def precise(output: Tensor) -> Tensor:
    """Return the outputs in float32 or float64."""
    if output.dtype in PRECISE:
        return output
    if not output.is_floating_point():
        raise TypeError(f"outputs of {output.dtype}")
    return output.float()
